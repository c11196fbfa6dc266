"""A programme's documents: every number is the files', and what was not measured says so."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dashboards.program_text import NOT_MEASURED, documents
from search.arms import read_arms, replicates_of
from search.improvement import LayerChange, correlation, spearman
from search.program import walk
from search.program_report import ProgramReport, as_tree, report_program
from spaces.programme import load_programme
from tests.written_sweeps import QUESTIONS, make_arm, study, write_sweep

PLAN = load_programme("plan")
CONTROL = [280, 291, 276, 288]
BROKE: list[Any] = [("collapsed", 60), ("collapsed", 90)]
BELOW = [250, 262, 247, 259]
BOTH_COLLAPSE = {"control": CONTROL, "e13i-baseline": BROKE, "e13i-targeted": BROKE}


def reported(tmp_path: Path, right: dict[str, list[Any]], changes: dict[str, Any] | None = None) -> ProgramReport:
    config = study(tmp_path, trials=len(right), replicates=4)
    write_sweep(config, [make_arm(config, name) for name in right], right)
    outcomes = {
        arm.name: {run.seed - config.seed: run for run in replicates_of(config, arm)} for arm in read_arms(config)
    }
    walks = {"": walk(PLAN, outcomes)}
    return report_program(config, PLAN, "programme plan, registered today as 1f0c5e", walks, changes or {})


def test_what_did_not_run_says_why_and_that_it_was_not_measured(tmp_path: Path) -> None:
    files = documents(reported(tmp_path, BOTH_COLLAPSE))
    skipped = files["e13k-constant.md"]
    assert f"Results: {NOT_MEASURED}." in skipped
    assert "Skipped after phase foundation: both break generation" in skipped
    assert "phase variable has not been reached yet" in files["e13j-variable.md"].lower()
    assert set(files) == {"summary.md", *(f"{name}.md" for name in PLAN.experiments)}


def test_an_experiment_has_the_numbers_of_its_trials(tmp_path: Path) -> None:
    report = reported(tmp_path, {"control": CONTROL, "e13i-baseline": BROKE, "e13i-targeted": BELOW})
    rows = {row.name: row for row in report.families[0].experiments}
    targeted = rows["e13i-targeted"]
    differences = (np.array(BELOW) - np.array(CONTROL)) / QUESTIONS
    assert targeted.beside_control is not None
    assert targeted.beside_control.difference == pytest.approx(differences.mean())
    assert targeted.end == pytest.approx(np.mean(BELOW) / QUESTIONS)
    assert (rows["e13i-baseline"].collapsed, len(rows["e13i-baseline"].trials)) == (2, 2)
    log = documents(report)["e13i-targeted.md"]
    assert f"vs its control, `control`: {100 * differences.mean():+.2f} points (4 pairs)" in log
    assert f"Step 10: {NOT_MEASURED}" in log
    assert "1f0c5e" in log


def test_the_summary_tells_the_decision_and_its_reason(tmp_path: Path) -> None:
    report = reported(tmp_path, BOTH_COLLAPSE)
    text = documents(report)["summary.md"]
    assert "Phase foundation -> smaller, since e13i-baseline collapses and e13i-targeted collapses" in text
    assert "It has not ended: phase smaller is next" in text
    assert "E13i-baseline collapsed in 2 of 2 runs, e13i-targeted collapsed in 2 of 2 runs: accuracies" in text
    assert as_tree(report)["families"][0]["path"][0]["skipped"] == ["e13l-conservative", "e13k-constant"]


def test_hypotheses_that_did_not_run_keep_their_confidence(tmp_path: Path) -> None:
    report = reported(tmp_path, BOTH_COLLAPSE)
    rows = {row.name: row.weighed for row in report.families[0].hypotheses}
    assert rows["H3"].not_tested.startswith("not measured")
    assert all(belief.posterior == belief.prior for belief in rows["H3"].beliefs)
    assert rows["H2"].arms[:2] == ("e13i-high", "e13i-low")


@pytest.mark.parametrize("right", [BOTH_COLLAPSE, {"control": []}, {"control": CONTROL, "e13i-baseline": CONTROL[:1]}])
def test_no_document_shows_a_number_that_is_none(tmp_path: Path, right: dict[str, list[Any]]) -> None:
    for name, text in documents(reported(tmp_path, right)).items():
        plain = re.sub(r"```yaml.*?```", "", text, flags=re.DOTALL)
        assert not re.search(r"\b(nan|None|inf|null)\b", plain), f"{name}: {plain}"


def test_programmes_without_hypotheses_and_words_have_documents(tmp_path: Path) -> None:
    report = reported(tmp_path, {"control": CONTROL, "e13i-baseline": BELOW, "e13i-targeted": BELOW})
    assert "below its minimum" in documents(report)["e13i-baseline.md"]


# --- improvement of layers --------------------------------------------------------------------------------------------


def test_the_interval_of_a_rank_correlation_holds_the_truth() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        x = rng.normal(size=8)
        y = 0.5 * x + math.sqrt(0.75) * rng.normal(size=8)
        found = spearman(list(x), list(y))
        assert found.r == pytest.approx(float(stats.spearmanr(x, y).statistic))
        held += found.low <= 0.483 <= found.high  # of a bivariate normal with correlation 0.5
    assert held > 0.9 * 300


def change(replicate: int, gains: list[float]) -> LayerChange:
    before = (0.30, 0.32, 0.40, 0.41, 0.33)
    after = tuple(error - gain for error, gain in zip(before, gains, strict=True))
    numbers = {"relative_error": before, "deadzone": before}
    return LayerChange(replicate=replicate, before=numbers, after=dict.fromkeys(numbers, after), middle=(2, 3))


def test_layers_with_more_error_that_improve_more_correlate(tmp_path: Path) -> None:
    changes = [change(0, [0.00, 0.01, 0.04, 0.05, 0.02]), change(1, [0.01, 0.01, 0.03, 0.05, 0.02])]
    found = correlation(changes)
    assert (found.replicates, found.layers) == (2, 5)
    assert found.by["relative_error"].r == pytest.approx(1.0)
    assert (found.middle, found.elsewhere) == pytest.approx((0.0425, 0.0116667), abs=1e-6)
    report = reported(tmp_path, BOTH_COLLAPSE, {"e13i-baseline": changes, "control": changes})
    log = documents(report)["e13i-baseline.md"]
    assert "final weights of 2 replicates" in log
    assert "layers with more error improved more" in log


def test_a_side_that_does_not_vary_has_no_coefficient() -> None:
    assert math.isnan(spearman([0.3] * 5, [0.1, 0.2, 0.3, 0.4, 0.5]).r)

"""pass@k beside accuracy in a sweep: curves with bands, paired comparisons, and pass@k as the objective that arms are
chosen, reported and confirmed by. Sweeps are written by hand; their numbers are computed a second time."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dashboards.options import SweepOptions, study_config
from dashboards.report_text import as_tree, confirmation_lines, report_lines
from dashboards.sweep_text import candidate_line
from dashboards.tables import curve_rows
from search.arms import Arm, candidate_of, measured, read_arms, trial_folder
from search.confirm import planned_confirmation, read_confirmation
from search.evidence import evidence_from_arms
from search.lineup import fixed_arms
from search.objectives import told
from search.report import StudyReport, report_study
from search.statistics import compare, mean_interval
from search.store import StudyConfig, load_study_config
from spaces.config import ConfigError
from spaces.library import SPACES
from tests.written_sweeps import make_arm, outcome, study, write_sweep
from trainable.disk.trial_folder import write_outcome

ASKED, SAMPLES = 200, 4
SEEDS = 4
GREEDY = {"control": 120, "wide": 116, "narrow": 124}  # right greedy answers of 200
CHANCES = {"control": (2.0, 2.0), "wide": (6.0, 5.0), "narrow": (0.6, 0.5)}  # of a question's samples, beta


def right_of(arm: str, replicate: int) -> list[int]:
    rng = np.random.default_rng(replicate)
    return np.random.default_rng(7 + replicate).binomial(SAMPLES, rng.beta(*CHANCES[arm], ASKED)).tolist()


def share(right: Sequence[int], k: int) -> NDArray[np.float64]:
    """By scipy's hypergeometric distribution: no right one among k drawn from the samples."""
    return np.asarray(1 - stats.hypergeom(SAMPLES, np.array(right), k).pmf(0), dtype=np.float64)


@pytest.fixture
def sweep(tmp_path: Path) -> StudyConfig:
    return written(tmp_path)


def written(store: Path, *objectives: str) -> StudyConfig:
    settings = {"eval": {"questions": ASKED, "samples": SAMPLES}}
    config = study(store, trials=3, replicates=SEEDS, settings=settings, objectives=objectives or ("accuracy",))
    arms = [make_arm(config, name) for name in GREEDY]
    write_sweep(config, arms, {})
    for arm in arms:
        for replicate in range(SEEDS):
            ended = outcome(arm, replicate, GREEDY[arm.name] + replicate)
            scores = replace(ended.eval, right=tuple(right_of(arm.name, replicate)), right_start=(1,) * ASKED)
            write_outcome(trial_folder(config, arm.name, replicate), replace(ended, eval=scores), [])
    return config


def row(report: StudyReport, arm: str) -> Any:
    return next(row for row in report.arms if row.arm == arm)


def test_a_curve_is_the_mean_over_seeds_with_a_band_over_seeds_and_questions(sweep: StudyConfig) -> None:
    report = report_study(sweep)
    assert [point.k for point in row(report, "wide").curve] == [1, 2, 4]
    for point in row(report, "wide").curve:
        every = np.array([share(right_of("wide", replicate), point.k) for replicate in range(SEEDS)])
        assert point.share == pytest.approx(every.mean())
        assert point.seeds
        assert point.low <= mean_interval(every.tolist())[0] < point.share < mean_interval(every.tolist())[1]
        assert point.start == pytest.approx(1 - (SAMPLES - point.k) / SAMPLES)
    shares = [point.share for point in row(report, "wide").curve]
    assert shares == sorted(shares)


def test_below_three_seeds_a_band_is_over_questions_and_says_so(sweep: StudyConfig) -> None:
    report = report_study(sweep.model_copy(update={"replicates": 2}))
    assert not any(point.seeds for point in row(report, "wide").curve)
    assert any("bands over questions (below 3 runs)" in line for line in report_lines(report))


def test_the_interval_of_a_mean_is_that_of_its_runs_where_questions_do_not_matter() -> None:
    """Each run answers all questions alike: a t interval over runs; with questions that differ it is wider."""
    runs = [0.4, 0.5, 0.45, 0.55]
    alike = [[run] * 50 for run in runs]
    interval = stats.t.interval(0.95, 3, loc=np.mean(runs), scale=stats.sem(runs))
    assert mean_interval(alike) == pytest.approx(interval)
    differing = [[run + 0.4 * (-1) ** question for question in range(50)] for run in runs]
    low, high = mean_interval(differing)
    assert low < interval[0] < interval[1] < high


def test_pass_at_k_is_compared_with_the_control_seed_by_seed(sweep: StudyConfig) -> None:
    """The paired t test of accuracies, on the shares of each seed; corrected for two arms at three k."""
    beside = row(report_study(sweep), "wide").beside
    for k in (1, 2, 4):
        arms = [[share(right_of(arm, seed), k) for seed in range(SEEDS)] for arm in ("wide", "control")]
        means = [[float(run.mean()) for run in arm] for arm in arms]
        seen, alone = beside[f"pass@{k}"].corrected, beside[f"pass@{k}"].alone.primary
        assert alone.difference == pytest.approx(np.mean(means[0]) - np.mean(means[1]))
        wider = compare(*means, correct=(arms[0], arms[1]))
        assert (alone.low, alone.high, alone.p) == pytest.approx((wider.low, wider.high, wider.p))
        assert beside[f"pass@{k}"].family == 6
        assert seen.high - seen.low > alone.high - alone.low
    assert beside["pass@4"].corrected.difference > 0.05
    assert beside["pass@4"].finding.words().startswith("better")
    assert row(report_study(sweep), "wide").difference < 0, "greedy accuracy says the contrary"


def test_rows_and_lines_show_every_arm_at_every_k_and_never_say_better(sweep: StudyConfig) -> None:
    report = report_study(sweep)
    rows = curve_rows(report.arms)
    assert [(line["arm"], line["k"]) for line in rows] == [(arm, k) for arm in GREEDY for k in (1, 2, 4)]
    assert all(line["difference"] is None for line in rows if line["arm"] == "control")
    wide = next(line for line in rows if (line["arm"], line["k"]) == ("wide", 4))
    assert wide["verdict"].startswith("ahead")
    said = next(line for line in report_lines(report) if line.startswith("wide: pass@4"))
    assert f"-> {100 * wide['share']:.1f} % [" in said
    assert f"{100 * wide['difference']:+.1f} points [" in said
    assert "better" not in said
    tree = json.loads(json.dumps(as_tree(report), allow_nan=False))
    assert [line["k"] for line in tree["arms"][1]["curve"]] == [1, 2, 4]


def test_a_sweep_without_samples_has_no_curve(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=3)
    write_sweep(config, [make_arm(config, name) for name in ("control", "c01")], {"control": [200] * 3, "c01": [9] * 3})
    report = report_study(config)
    assert curve_rows(report.arms) == []
    assert not any("pass@" in line for line in report_lines(report))


# --- as the objective -------------------------------------------------------------------------------------------------


def test_the_objective_is_what_arms_are_compared_and_chosen_by(tmp_path: Path) -> None:
    """Greedy accuracy and pass@4 put another arm forward."""
    found = {}
    for objective in ("accuracy", "pass@4"):
        config = written(tmp_path / objective, objective)
        report, candidate = report_study(config), candidate_of(config, read_arms(config))
        found[objective] = candidate.arm.name
        assert row(report, candidate.arm.name).candidate
        assert ("of pass@4" in candidate_line(candidate)) == (objective == "pass@4")
    assert found == {"accuracy": "narrow", "pass@4": "wide"}
    wide = row(report, "wide")
    assert wide.score == pytest.approx(np.mean([share(right_of("wide", seed), 4).mean() for seed in range(SEEDS)]))
    assert (wide.accuracy, wide.score_start, wide.measure) == (pytest.approx(117.5 / ASKED), 1.0, "pass@4")
    tree = next(arm for arm in as_tree(report)["arms"] if arm["arm"] == "wide")  # type: ignore[index]
    assert (tree["measure"], tree["accuracy"], tree["score"]) == ("pass@4", wide.accuracy, wide.score)


def test_a_confirmation_asks_what_the_sweep_was_chosen_by(tmp_path: Path) -> None:
    config, arms = planned_confirmation(written(tmp_path, "hours", "pass@4"), (3, 5))
    assert (config.measure, arms[1].name) == ("pass@4", "wide")
    assert [arm.config.eval.samples for arm in arms] == [SAMPLES] * 2


def test_what_it_found_is_about_pass_at_k(tmp_path: Path) -> None:
    config, arms = planned_confirmation(written(tmp_path, "pass@4"), (3, SEEDS))
    config = config.model_copy(update={"replicates": SEEDS})
    write_sweep(config, arms, {})
    for arm, like in zip(arms, ("control", "wide"), strict=True):
        for replicate in range(SEEDS):
            ended = outcome(arm, replicate, GREEDY[like])
            scores = replace(ended.eval, right=tuple(right_of(like, replicate)), right_start=(0,) * ASKED)
            write_outcome(trial_folder(config, arm.name, replicate), replace(ended, eval=scores), [])
    state = read_confirmation(load_study_config(config.store, config.name))
    apart = [share(right_of("wide", seed), 4).mean() - share(right_of("control", seed), 4).mean() for seed in range(3)]
    assert state.comparison.difference == pytest.approx(np.mean(apart)), "decided at the first look"
    assert state.finding is not None
    assert state.finding.accuracies.verdict == "better"
    said = confirmation_lines(state)[1]
    assert said.startswith(f"  difference {100 * np.mean(apart):+.2f} points of pass@4 [")


def test_the_searcher_is_told_the_median_of_pass_at_k(tmp_path: Path) -> None:
    config = written(tmp_path, "pass@2", "accuracy")
    arm = read_arms(config)[1]
    result = told(arm, config.objectives, SEEDS)
    shares = [share(right_of("wide", seed), 2).mean() for seed in range(SEEDS)]
    assert result is not None
    assert result.values == pytest.approx((np.median(shares), 117.5 / ASKED))


def test_what_was_not_sampled_is_not_known(tmp_path: Path) -> None:
    config = written(tmp_path, "pass@4")
    arm = read_arms(config)[1]
    ended = arm.results[0]
    assert measured(ended, "pass@5") is None
    bare = replace(ended, eval=replace(ended.eval, right=(), right_start=()))
    assert measured(bare, "pass@1") is None
    lacking = Arm(name="x", origin="searcher", config=arm.config, results={**arm.results, 2: bare})
    result = told(lacking, config.objectives, SEEDS)
    assert result is not None
    assert result.state == "failed"


def test_an_earlier_sweep_tells_its_pass_at_k_where_it_was_sampled(tmp_path: Path) -> None:
    config = written(tmp_path)
    arms = read_arms(config)
    for arm in arms:
        arm.params = {"noise.modules": "rmsnorm", "noise.sigma_start@rmsnorm": 0.01, "noise.sigma_end": 0.001}
    base: dict[str, Any] = {"eval": {"questions": ASKED}}
    told_of = {
        objectives: evidence_from_arms(arms, SEEDS, SPACES["sigma"], "s", base, objectives)
        for objectives in (("accuracy",), ("pass@4",), ("pass@5",))
    }
    assert [len(items) for items in told_of.values()] == [len(told_of[("accuracy",)]), len(told_of[("accuracy",)]), 0]
    shares = [share(right_of("wide", seed), 4).mean() for seed in range(SEEDS)]
    wide = next(item for item in told_of[("pass@4",)] if ": wide; different there: " in item.source)
    assert wide.passed == {"pass@4": pytest.approx(np.median(shares))}


@pytest.mark.parametrize("objective", ["pass@0", "pass@-1", "pass@", "pass@4.0", "Pass@4"])
def test_an_objective_that_is_none_is_refused(objective: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--objective {objective}: unknown; choose one of .*pass@K"):
        study_config(SweepOptions(objectives=[objective], store=str(tmp_path)))


def test_pass_at_k_needs_as_many_samples_in_every_trial(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"objectives": ["pass@4"], "store": str(tmp_path), "workload": "tiny"}
    for samples in (0, 3):
        with pytest.raises(ConfigError, match=f"--objective pass@4: .*one has {samples}; add --set eval.samples=4"):
            study_config(SweepOptions(**asked, overrides=[f"eval.samples={samples}"]))
    config = study_config(SweepOptions(**asked, overrides=["eval.samples=4"]))
    assert (config.measure, fixed_arms(config)[0].config.eval.samples) == ("pass@4", 4)

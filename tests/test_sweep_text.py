"""What a sweep says at its end, on sweeps that were written by hand."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from dashboards.sweep_text import COLUMNS, Ending, announced, collapse_lines, ending_of
from search.arms import candidate_of, read_arms, trial_folder, unfinished
from search.report import report_study
from search.store import StudyConfig
from search.study import StudyResult
from spaces.errors import NoCandidate
from tests.drawn_sweeps import RULE, steps_of
from tests.written_sweeps import attempt, make_arm, outcome, study, write_sweep, write_trial


def said(tmp_path: Path, right: dict[str, list[Any]], *, more: int = 0, **changes: Any) -> Ending:
    config = study(tmp_path, trials=len(right), replicates=1, budget_hours=2.0)
    write_sweep(config, [make_arm(config, name) for name in right], right)
    arms = read_arms(config)
    try:
        candidate = candidate_of(config, arms)
    except NoCandidate:
        candidate = None
    left = unfinished(config, arms)
    result = StudyResult(config=config, arms=tuple(arms), candidate=candidate, unfinished=left, **changes)
    return ending_of(result, config.runs + more, " --store X --tracking-uri U", " --store X")


def test_a_candidate_is_told_with_its_difference_and_what_to_do_next(tmp_path: Path) -> None:
    ending = said(tmp_path, {"control": [280], "c01": [284], "c02": [270]})
    first, rest = ending.lines[0], ending.commands
    assert first.startswith("candidate: c01, +1.0 points against control on the selection questions (chosen and judged")
    assert f"  rin trial --config {tmp_path}/s/best.yaml   # repeat it" in rest
    assert any(line.startswith("  rin confirm s --store X --tracking-uri U") for line in rest)
    assert "  rin export s --store X --to verl   # take it to another trainer" in rest, "which asks no tracking"
    assert (ending.troubles, ending.code) == ((), 0)


def test_a_candidate_behind_its_control_is_said_to_be(tmp_path: Path) -> None:
    first, second = said(tmp_path, {"control": [280], "c01": [260]}).lines
    assert "c01, -5.0 points" in first
    assert second == "no configuration with noise came out ahead of its control"


def test_where_everything_collapsed_there_is_a_hint_and_no_command_that_needs_a_candidate(tmp_path: Path) -> None:
    ending = said(tmp_path, {"control": [280], "c01": [("collapsed", 10)]})
    assert ending.lines == (
        "no configuration with noise has completed all its replicates: nothing to export. Try smaller sigmas, or "
        "--set collapse.mode=monitor",
    )
    assert (ending.code, ending.commands) == (0, ()), "a collapse is a result"


@pytest.mark.parametrize("spent", [False, True])
def test_what_is_missing_is_counted_with_the_way_to_go_on(tmp_path: Path, spent: bool) -> None:
    ending = said(tmp_path, {"control": [280], "c01": [None]}, budget_spent=spent)
    if spent:
        assert ending.lines[-2:] == (
            "the budget of 2 hours is spent: 1 of 2 trials are not finished",
            "with a larger one: rin resume s --budget HOURS --store X --tracking-uri U",
        )
        assert (ending.troubles, ending.code) == ((), 0)
    else:
        again = "rin resume s --store X --tracking-uri U"
        line = f"interrupted: 1 of 2 trials are not finished; what ran is kept. Go on: {again}"
        assert (ending.troubles, ending.code) == ((line,), 1)


def test_a_failure_is_named_and_is_no_interruption(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=1)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [280]})
    write_trial(config, arms[1], 0, None, attempts=[attempt(ended="error", reason="OSError: Boom")])
    assert "attempt-001.json" in trial_folder(config, "c01", 0).names()
    result = StudyResult(config=config, arms=tuple(read_arms(config)), candidate=None, unfinished=1)
    ending = ending_of(result, 2, "", "")
    assert ending.troubles[0] == "c01/0 failed: OSError: Boom"
    assert ending.troubles[1].startswith("1 of 2 trials are not finished")
    assert ending.code == 1


def test_what_mlflow_did_not_take_and_a_space_that_ended_are_told(tmp_path: Path) -> None:
    ending = said(tmp_path, {"control": [280], "c01": [284]}, more=2, untold=7)
    assert "the space has no further configuration that fits into the trials: 2 were all" in ending.lines
    (trouble,) = ending.troubles
    assert trouble.startswith("MLflow did not take 7 records")
    assert trouble.endswith("Once it answers: rin resume s --store X --tracking-uri U")
    assert ending.code == 0


# A collapse


def broken(store: Path, *names: str, text: str = "+7<?9") -> StudyConfig:
    """A control, and arms that broke; what they wrote then."""
    config = study(store, trials=1 + len(names), settings={"grpo": {"steps": 29}, "eval": {"questions": 400}})
    arms = [make_arm(config, "control"), *(make_arm(config, name, *LOUD) for name in names)]
    write_sweep(config, arms, {"control": [280]})
    for arm in arms[1:]:
        reports = steps_of(arm, random.Random(0))
        wrong = [replace(one, samples=tuple(replace(s, completion=text) for s in one.samples)) for one in reports[-3:]]
        ended = replace(outcome(arm, 0, 40, "collapsed", rule=RULE), step=len(reports))
        write_trial(config, arm, 0, ended, reports=[*reports[:-3], *wrong])
    return config


LOUD = ("noise.modules=[linear]", "noise.sigma_start=0.05", "noise.sigma_end=0.0005")


def test_a_collapse_is_shown_with_what_the_model_wrote_before_and_after(tmp_path: Path) -> None:
    said = collapse_lines(report_study(broken(tmp_path, "e13i-baseline")))
    head, evidence, *steps = said
    assert head == f"what a collapse looks like: e13i-baseline/0, linear 0.05 -> 0.0005, rule {RULE}"
    assert evidence == "  entropy 2.45 nats, baseline 0.612, 3 steps in a row"
    before, after = steps[::2]
    assert before.startswith("  step 10, sigma 0.05 ")
    assert "'123+456=' -> '579'" in before
    assert after.startswith("  step 11, sigma 0.05 ")
    assert "'123+456=' -> '+7<?9'" in after
    assert (before.split()[-2:], after.split()[-2:]) == (["reward", "1"], ["reward", "0"])


@pytest.mark.parametrize("text", ["9" * 500, "zeile\n\tzwei\x1b[31m\u202e" * 20, "数学" * 50, "'\"" * 60, ""])
def test_whatever_a_model_writes_it_takes_one_line_of_eighty_columns_and_no_control_sequence(
    tmp_path: Path, text: str
) -> None:
    said = collapse_lines(report_study(broken(tmp_path, "c01", text=text)))
    assert len(said) == 6
    assert max(map(cell_len, said)) <= COLUMNS
    assert all(line.isprintable() for line in said)
    assert all(line.split()[-2] == "reward" for line in said[2:])


def test_the_experiment_of_the_plan_is_the_one_that_is_shown_and_without_a_collapse_there_is_none(
    tmp_path: Path,
) -> None:
    config = broken(tmp_path / "a", "c01", "e13i-baseline")
    report = report_study(config)
    searched = tuple(replace(row, origin="searcher") if row.arm == "c01" else row for row in report.arms)
    assert "e13i-baseline/0" in collapse_lines(replace(report, arms=searched))[0]
    assert collapse_lines(report_study(broken(tmp_path / "b"))) == []


def test_what_else_trains_is_said_before_it_does(tmp_path: Path) -> None:
    assert list(announced(study(tmp_path), begins=True)) == []
    known, then = announced(study(tmp_path, points=("e13i-baseline", "e13m-rmsnorm"), confirm_pairs=8), begins=True)
    assert known == "among them e13i-baseline, an experiment of the plan that was recorded to collapse in step 3"
    assert then.startswith("then its candidate is confirmed: up to 8 pairs")
    assert then.endswith("(--no-confirm leaves that out)")
    assert list(announced(study(tmp_path, confirm_pairs=8), begins=False)) == [then.rpartition(" (")[0]]

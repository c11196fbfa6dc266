"""What a sweep says at its end, on sweeps that were written by hand."""

from pathlib import Path
from typing import Any

import pytest

from dashboards.sweep_text import Ending, ending_of
from search.arms import candidate_of, read_arms, trial_folder, unfinished
from search.study import StudyResult
from spaces.errors import NoCandidate
from tests.written_sweeps import attempt, make_arm, study, write_sweep, write_trial


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
    first, *rest = ending.lines
    assert first.startswith("candidate: c01, +1.0 points against control on the selection questions (chosen and judged")
    assert f"  rin trial --config {tmp_path}/s/best.yaml   # repeat it" in rest
    assert any(line.startswith("  rin confirm s --store X --tracking-uri U") for line in rest)
    assert "  rin export s --store X --to verl   # take it to another trainer" in rest, "which asks no tracking"
    assert (ending.troubles, ending.code) == ((), 0)


def test_a_candidate_behind_its_control_is_said_to_be(tmp_path: Path) -> None:
    first, second, *_ = said(tmp_path, {"control": [280], "c01": [260]}).lines
    assert "c01, -5.0 points" in first
    assert second == "no configuration with noise came out ahead of its control"


def test_where_everything_collapsed_there_is_a_hint_and_no_command_that_needs_a_candidate(tmp_path: Path) -> None:
    ending = said(tmp_path, {"control": [280], "c01": [("collapsed", 10)]})
    assert ending.lines == (
        "no configuration with noise has completed all its replicates: nothing to export. Try smaller sigmas, or "
        "--set collapse.mode=monitor",
    )
    assert ending.code == 0, "a collapse is a result"


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

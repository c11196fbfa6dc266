"""What is read from a trial's folder, whoever wrote it and however it ended."""

import json
from pathlib import Path
from typing import Any

import pytest

from spaces.config import ConfigError
from tests.written_sweeps import attempt, make_arm, outcome, report, study
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import (
    end_attempt,
    read_attempts,
    read_outcome,
    read_reports,
    read_stopped,
    read_trial,
    write_outcome,
)
from trainable.failure import FAILURES, TrialFailed
from trainable.outcome import Ending, Outcome, StepReport


@pytest.fixture
def trial(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


def ended(tmp: Folder, how: Ending) -> Outcome:
    return outcome(make_arm(study(tmp.uri), "control"), 0, 300, how)


def checkpoint(trial: Folder, step: int, *, text: str | None = None) -> None:
    values = json.dumps({"reports": [report(number).as_record() for number in range(step)]})
    (trial / f"checkpoint-{step:06d}").write("progress.json", text if text is not None else f"{{}}\n{values}\n")


def steps(reports: list[StepReport]) -> list[int]:
    return [row.step for row in reports]


@pytest.mark.parametrize(
    ("files", "over"),
    [
        ((), None),
        (("stopped",), None),  # by a person, a signal, the budget: it goes on
        (("outcome",), "completed"),
        (("outcome", "stopped"), "completed"),
    ],
)
def test_when_a_trial_is_over(trial: Folder, files: tuple[str, ...], over: str | None) -> None:
    if "outcome" in files:
        write_outcome(trial, ended(trial, "completed"), [report(0)])
    if "stopped" in files:
        write_outcome(trial, ended(trial, "stopped"), [report(0)])
    found = read_outcome(trial)
    assert (found.outcome if found else None) == over
    assert (read_stopped(trial) is not None) == ("stopped" in files)


def test_outcomes_and_reports_come_back_as_they_were(trial: Folder) -> None:
    written, reports = ended(trial, "completed"), [report(0), report(1, seconds=0.1 + 0.2, wasted=float("inf"))]
    write_outcome(trial, written, reports)
    assert read_outcome(trial) == written
    assert read_reports(trial) == reports


def test_reports_are_those_of_the_outcome_else_of_the_newest_checkpoint(trial: Folder) -> None:
    assert read_reports(trial) == []
    checkpoint(trial, 2)
    checkpoint(trial, 3)
    assert steps(read_reports(trial)) == [0, 1, 2]
    write_outcome(trial, ended(trial, "completed"), [report(step) for step in range(6)])
    assert steps(read_reports(trial)) == list(range(6))


@pytest.mark.parametrize("text", ["", "{}", '{}\n{"reports": [', "\x00\x00", "garbage\nmore"])
def test_reports_of_a_damaged_checkpoint_are_those_of_the_one_before(trial: Folder, text: str) -> None:
    checkpoint(trial, 2)
    checkpoint(trial, 3, text=text)
    assert steps(read_reports(trial)) == [0, 1]


def test_reports_of_a_checkpoint_that_was_never_finished_are_those_of_the_one_before(trial: Folder) -> None:
    checkpoint(trial, 2)
    (trial / "checkpoint-000003").write("tensors.safetensors", b"half")
    assert steps(read_reports(trial)) == [0, 1]


def test_after_a_million_steps_the_newest_is_still_the_newest(trial: Folder) -> None:
    """Names of six digits and of seven do not sort as text."""
    checkpoint(trial, 2)
    (trial.local or Path()).joinpath("checkpoint-000002").rename((trial.local or Path()) / "checkpoint-999999")
    checkpoint(trial, 3)
    (trial.local or Path()).joinpath("checkpoint-000003").rename((trial.local or Path()) / "checkpoint-1000000")
    assert steps(read_reports(trial)) == [0, 1, 2]


def test_attempts_are_read_in_order_with_their_hours(trial: Folder) -> None:
    for number in (1, 2, 10, 999, 1000):
        trial.write(f"attempt-{number:03d}.json", json.dumps(attempt(0.0, 36.0 * number)))
    trial.write("attempt-notes.json", "{}")
    assert [round(one.hours, 6) for one in read_attempts(trial)] == [0.01, 0.02, 0.1, 9.99, 10.0]


def test_an_attempt_that_was_killed_while_loading_counts_with_what_it_had(trial: Folder) -> None:
    trial.write("attempt-001.json", json.dumps({"started": 100.0, "host": "h", "ended": "", "seen": 136.0, "step": 0}))
    (one,) = read_attempts(trial)
    assert (one.hours, one.ended, one.loading_seconds, one.reason) == (0.01, "", 0.0, "")


def test_a_clock_that_was_set_back_does_not_give_hours_back(trial: Folder) -> None:
    trial.write("attempt-001.json", json.dumps(attempt(1000.0, 10.0)))
    assert read_attempts(trial)[0].hours == 0.0


def test_an_attempt_that_cannot_be_read_counts_as_no_time(trial: Folder) -> None:
    for number, text in enumerate(("", "{}", "[]", json.dumps(attempt()), "null"), start=1):
        trial.write(f"attempt-{number:03d}.json", text)
    assert len(read_attempts(trial)) == 1


@pytest.mark.parametrize(
    ("attempts", "driven", "status", "rule", "reason"),
    [
        ([], True, "waiting", "", ""),
        ([attempt(ended="")], True, "running", "", ""),
        ([attempt(ended="")], False, "stopped", "", "its process was killed"),
        ([attempt(ended="killed")], True, "waiting", "", ""),
        ([attempt(ended="killed")], False, "stopped", "", "its process was killed"),
        ([attempt(ended="stopped")], False, "stopped", "", ""),
        ([attempt(ended="hang", reason="step 3: too long")], False, "failed", "hang", "step 3: too long"),
        (
            [attempt(ended="hang", reason="too long"), attempt(ended="error", reason="OSError: gone")],
            False,
            "failed",
            "",
            "OSError: gone (2 attempts)",
        ),
        ([attempt(ended="error", reason="x"), attempt(ended="")], True, "running", "", ""),
    ],
)
def test_where_a_trial_stands_says_its_last_attempt(
    trial: Folder, attempts: list[dict[str, Any]], driven: bool, status: str, rule: str, reason: str
) -> None:
    for number, tree in enumerate(attempts, start=1):
        trial.write(f"attempt-{number:03d}.json", json.dumps(tree))
    state = read_trial(trial, driven=driven)
    assert (state.status, state.rule, state.reason) == (status, rule, reason)


@pytest.mark.parametrize("rule", FAILURES)
def test_whatever_a_trial_can_fail_by_is_the_rule_of_its_state(trial: Folder, rule: str) -> None:
    failed = TrialFailed(rule, "twice")
    trial.write("attempt-001.json", json.dumps(attempt(ended=failed.rule, reason=failed.reason)))
    state = read_trial(trial, driven=False)
    assert (state.status, state.rule, state.reason) == ("failed", rule, "twice")


def test_an_outcome_says_where_a_trial_stands_whatever_its_attempts_say(trial: Folder) -> None:
    trial.write("attempt-001.json", json.dumps(attempt(ended="")))
    write_outcome(trial, ended(trial, "collapsed"), [])
    assert read_trial(trial, driven=False).status == "collapsed"


def test_a_stopped_trial_has_its_evaluation(trial: Folder) -> None:
    trial.write("attempt-001.json", json.dumps(attempt(ended="stopped", step=4)))
    write_outcome(trial, ended(trial, "stopped"), [])
    state = read_trial(trial, driven=False)
    assert (state.status, state.outcome and state.outcome.eval.accuracy) == ("stopped", 0.75)


def test_a_process_that_died_for_good_is_a_failure_and_one_that_spoke_is_left_alone(trial: Folder) -> None:
    end_attempt(trial, "nothing there to end")
    trial.write("attempt-001.json", json.dumps(attempt(ended="")))
    end_attempt(trial, "its process was killed")
    state = read_trial(trial, driven=False)
    assert (state.status, state.rule, state.reason) == ("failed", "", "its process was killed")
    trial.write("attempt-002.json", json.dumps(attempt(ended="hang", reason="too long")))
    end_attempt(trial, "its process was killed")
    assert read_trial(trial, driven=False).rule == "hang"


@pytest.mark.parametrize("name", ["outcome.json", "stopped.json"])
@pytest.mark.parametrize("text", ["", "{", "\x00\x00", "{}", "[]", '{"version": 2}'])
def test_a_damaged_ending_is_named_with_the_remedy(trial: Folder, name: str, text: str) -> None:
    trial.write(name, text)
    with pytest.raises(
        ConfigError,
        match=rf"{name}: is damaged \(not the JSON of an ending\); remove it, and rin resume runs the trial again",
    ):
        read_outcome(trial) if name == "outcome.json" else read_stopped(trial)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, "written by version 3, this program reads 2"),
        ({"config": {"noise": {"colour": "pink"}}}, "noise.colour"),
    ],
)
def test_an_ending_that_another_version_wrote_is_whole_and_not_to_be_removed(
    trial: Folder, change: dict[str, Any], words: str
) -> None:
    write_outcome(trial, ended(trial, "completed"), [])
    tree = json.loads(trial.read("outcome.json") or b"")
    tree |= {key: change[key] for key in tree.keys() & change.keys()}
    tree["outcome"] |= {key: change[key] for key in tree["outcome"].keys() & change.keys()}
    trial.write("outcome.json", json.dumps(tree))
    with pytest.raises(ConfigError, match=f"outcome.json: .*{words}.*; use the program that wrote it") as caught:
        read_outcome(trial)
    assert "remove" not in str(caught.value)

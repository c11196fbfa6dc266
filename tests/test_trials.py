"""What is read from a trial's folder, whoever wrote it and however it ended."""

import json
from pathlib import Path
from typing import Any

import pytest
from search.trials import read_attempts, read_failure, read_outcome, read_reports, read_stopped, write_decision

from spaces.config import ConfigError
from tests.written_sweeps import attempt, report
from trainable.folder import Folder


@pytest.fixture
def trial(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


def ending(how: str, reports: int = 1) -> str:
    return json.dumps({"version": 1, "outcome": {"outcome": how}, "reports": [report(step) for step in range(reports)]})


def checkpoint(trial: Folder, step: int, *, text: str | None = None) -> None:
    values = json.dumps({"reports": [report(number) for number in range(step)]})
    (trial / f"checkpoint-{step:06d}").write("progress.json", text if text is not None else f"{{}}\n{values}\n")


def steps(reports: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in reports]


@pytest.mark.parametrize(
    ("files", "over"),
    [
        ((), None),
        (("stopped",), None),  # by a person, a signal, the budget: it goes on
        (("outcome",), "completed"),
        (("outcome", "stopped"), "completed"),
        (("decision",), "stopped"),  # killed before it could evaluate itself
        (("decision", "stopped"), "stopped"),
        (("decision", "outcome"), "completed"),  # it ended by itself while it was being stopped
    ],
)
def test_when_a_trial_is_over(trial: Folder, files: tuple[str, ...], over: str | None) -> None:
    if "outcome" in files:
        trial.write("outcome.json", ending("completed"))
    if "stopped" in files:
        trial.write("stopped.json", ending("stopped"))
    if "decision" in files:
        write_decision(trial, "by the scheduler asha after step 3")
    found = read_outcome(trial)
    assert (found["outcome"] if found else None) == over
    assert (read_stopped(trial) is not None) == ("stopped" in files)


def test_reports_are_those_of_the_outcome_else_of_the_newest_checkpoint(trial: Folder) -> None:
    assert read_reports(trial) == []
    checkpoint(trial, 2)
    checkpoint(trial, 3)
    assert steps(read_reports(trial)) == [0, 1, 2]
    trial.write("outcome.json", ending("completed", reports=6))
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
    (trial / "checkpoint-999999").write("progress.json", '{}\n{"reports": [{"step": 1}]}')
    (trial / "checkpoint-1000000").write("progress.json", '{}\n{"reports": [{"step": 2}]}')
    assert steps(read_reports(trial)) == [2]


def test_attempts_are_read_in_order_with_their_hours(trial: Folder) -> None:
    for number in (1, 2, 10, 999):
        trial.write(f"attempt-{number:03d}.json", json.dumps(attempt(0.0, 36.0 * number)))
    trial.write("attempt-notes.json", "{}")
    assert [round(one.hours, 6) for one in read_attempts(trial)] == [0.01, 0.02, 0.1, 9.99]


def test_an_attempt_that_was_killed_while_loading_counts_with_what_it_had(trial: Folder) -> None:
    trial.write("attempt-001.json", json.dumps({"started": 100.0, "host": "h", "ended": "", "seen": 136.0, "step": 0}))
    (one,) = read_attempts(trial)
    assert (one.hours, one.ended, one.first_step, one.loading_seconds, one.reason) == (0.01, "", 0, 0.0, "")


def test_a_clock_that_was_set_back_does_not_give_hours_back(trial: Folder) -> None:
    trial.write("attempt-001.json", json.dumps(attempt(1000.0, 10.0)))
    assert read_attempts(trial)[0].hours == 0.0


def test_an_attempt_that_cannot_be_read_counts_as_no_time(trial: Folder) -> None:
    trial.write("attempt-001.json", "")
    trial.write("attempt-002.json", json.dumps(attempt()))
    assert len(read_attempts(trial)) == 1


def test_a_failure_is_a_hang_only_when_the_last_attempt_hung(trial: Folder) -> None:
    assert read_failure(trial) == ("", "")
    trial.write("attempt-001.json", json.dumps(attempt(ended="hang", reason="step 3: phase rollout took over 900 s")))
    assert read_failure(trial) == ("hang", "step 3: phase rollout took over 900 s (1 attempts)")
    trial.write("attempt-002.json", json.dumps(attempt(ended="error")))
    assert read_failure(trial) == ("", "")


@pytest.mark.parametrize("name", ["outcome.json", "stopped.json"])
@pytest.mark.parametrize("text", ["", "{", "\x00\x00"])
def test_a_damaged_ending_is_named_with_the_remedy(trial: Folder, name: str, text: str) -> None:
    trial.write(name, text)
    with pytest.raises(ConfigError, match=rf"{name}: is damaged \(not JSON\); remove it, and rin resume runs the trial again"):
        read_outcome(trial) if name == "outcome.json" else read_stopped(trial)

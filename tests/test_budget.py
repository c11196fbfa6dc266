"""Hours against a limit, with a clock that the test winds."""

import json
import math
from pathlib import Path

import pytest

from dashboards.live_folder import SweepFolder
from search.arms import read_arms, trial_folder
from search.budget import Budget
from search.ledger import read_ledger
from search.store import gpus_of, slots_of
from search.told import last_metrics
from tests.written_sweeps import attempt, make_arm, outcome, report, study, write_sweep, write_trial
from trainable.disk.trial_folder import read_trial


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def hours(self, hours: float) -> None:
        self.now += 3600 * hours


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("search.budget.time.monotonic", lambda: clock.now)
    return clock


def make_budget(tmp_path: Path, hours: float | None, **changes: object) -> Budget:
    config = study(tmp_path, budget_hours=hours, replicates=2, **changes)
    return Budget(config, [make_arm(config, "control"), make_arm(config, "c01")])


def test_without_a_limit_nothing_is_stopped_however_long_it_takes(tmp_path: Path, clock: Clock) -> None:
    budget = make_budget(tmp_path, None)
    budget.started("a")
    clock.hours(1e5)
    assert not budget.stop_all()
    assert not budget.spent
    assert math.isclose(budget.hours, 1e5)


def test_running_and_ended_trials_add_up(tmp_path: Path, clock: Clock) -> None:
    budget = make_budget(tmp_path, 10.0)
    budget.started("a")
    clock.hours(1)
    budget.started("b")
    clock.hours(1)
    budget.ended("a")
    clock.hours(3)
    budget.ended("b")
    clock.hours(100)
    assert budget.hours == pytest.approx(2 + 4)
    budget.ended("b")
    budget.ended("never started")
    assert budget.hours == pytest.approx(6)


def test_a_trial_that_is_started_again_after_a_fault_is_counted_once(tmp_path: Path, clock: Clock) -> None:
    budget = make_budget(tmp_path, 10.0)
    budget.started("a")
    clock.hours(1)
    budget.started("a")
    clock.hours(1)
    assert budget.hours == pytest.approx(2)


def test_at_the_limit_everything_is_stopped_and_stays_stopped(tmp_path: Path, clock: Clock) -> None:
    budget = make_budget(tmp_path, 2.0)
    budget.started("a")
    clock.hours(1.9)
    assert not budget.stop_all()
    clock.hours(0.11)
    assert budget.stop_all()
    budget.ended("a")
    assert budget.stop_all()
    assert budget.spent


def test_it_stops_the_longest_step_ahead_for_each_running_trial(tmp_path: Path, clock: Clock) -> None:
    budget = make_budget(tmp_path, 2.0)
    for trial in ("a", "b", "c"):
        budget.started(trial)
    budget.reported(360.0)
    budget.reported(36.0)  # the longest counts, not the last
    budget.ended("c")  # ended: nothing of it is to come
    clock.hours(0.85)
    assert not budget.stop_all()  # 1.7 used, 0.2 to come
    clock.hours(0.06)
    assert budget.stop_all()


def test_the_longest_step_of_earlier_drivers_is_known(tmp_path: Path, clock: Clock) -> None:
    config = study(tmp_path, budget_hours=2.0)
    arm = make_arm(config, "control")
    write_trial(
        config,
        arm,
        0,
        outcome(arm, 0, 300),
        reports=[report(0, seconds=1800.0), report(1, seconds=1.0)],
        attempts=[attempt(0, 0)],
    )
    budget = Budget(config, [arm])
    budget.started("a")
    clock.hours(1.4)
    assert not budget.stop_all()
    clock.hours(0.11)
    assert budget.stop_all()


def test_the_hours_of_earlier_drivers_count_killed_ones_too(tmp_path: Path, clock: Clock) -> None:
    config = study(tmp_path, budget_hours=2.0, replicates=2)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_trial(config, arms[0], 0, None, attempts=[attempt(0, 1800, ended=""), attempt(0, 1800)])
    write_trial(config, arms[1], 1, None, attempts=[attempt(0, 900)])
    trial_folder(config, "stranger", 0).write("attempt-001.json", json.dumps(attempt(0, 1e9)))
    budget = Budget(config, arms)
    assert budget.earlier_hours == pytest.approx(1.25)
    assert not budget.spent
    budget.started("a")
    clock.hours(0.8)
    assert budget.stop_all()


def test_hours_are_of_the_gpus_that_an_attempt_held_and_not_of_those_of_a_resume(tmp_path: Path) -> None:
    ranks = {"parallel": {"ranks": 4}}
    config = study(tmp_path, gpus=2.0, settings=ranks, budget_hours=8.0)
    arm = make_arm(config, "control")
    write_sweep(config, [arm], {})
    held = [attempt(0, 3600, slots=4.0), attempt(0, 3600, slots=2.0), attempt(0, 3600)]  # the last does not say
    write_trial(config, arm, 0, outcome(arm, 0, 9), attempts=held)
    budget = Budget(config, [arm])
    assert (budget.hours, budget.spent) == (4 + 2 + 2, True)
    assert read_ledger(config, read_arms(config)).hours == 8
    assert SweepFolder(config).look(driven=False, now=0.0).hours == 8
    state = read_trial(trial_folder(config, "control", 0), driven=False)
    assert last_metrics(config, arm.config, state, None, None)["rin/hours"] == 8


def test_a_budget_that_was_spent_before_is_spent_at_once(tmp_path: Path) -> None:
    config = study(tmp_path, budget_hours=0.5)
    arm = make_arm(config, "control")
    write_trial(config, arm, 0, None, attempts=[attempt(0, 1800)])
    assert Budget(config, [arm]).spent
    assert not Budget(config.model_copy(update={"budget_hours": 0.51}), [arm]).spent


@pytest.mark.parametrize(("gpus", "slots"), [(None, 1.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0)])
def test_an_hour_counts_its_gpus_or_its_slot(tmp_path: Path, clock: Clock, gpus: float | None, slots: float) -> None:
    config = study(tmp_path, gpus=gpus)
    assert slots_of(config) == slots
    budget = make_budget(tmp_path, 10.0, gpus=gpus)
    budget.started("a")
    clock.hours(2)
    assert budget.hours == pytest.approx(2 * slots)
    budget.ended("a")
    assert budget.hours == pytest.approx(2 * slots)


def test_gpus_are_the_workload_s_unless_said_otherwise(tmp_path: Path) -> None:
    assert gpus_of(study(tmp_path, workload="qwen2.5-1.5b-gsm8k")) > 0
    assert gpus_of(study(tmp_path, workload="qwen2.5-1.5b-gsm8k", gpus=0.25)) == 0.25


def test_one_trial_is_never_stopped_by_its_own_result(tmp_path: Path) -> None:
    """Tune asks that as well; the budget stops all or nothing."""
    assert make_budget(tmp_path, 0.001)("a", {"seconds": 1e9}) is False

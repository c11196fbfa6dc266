"""Hours by where they went, added up by hand."""

from pathlib import Path

import pytest

from search.arms import Arm, read_arms, write_arm
from search.ledger import read_ledger
from search.store import StudyConfig
from tests.written_sweeps import attempt, make_arm, outcome, report, study, write_trial


def written(config: StudyConfig) -> list[Arm]:
    """360 s are a tenth of an hour."""
    control, noisy = make_arm(config, "control"), make_arm(config, "c01")
    for number, arm in enumerate((control, noisy)):
        write_arm(config, number, arm)
    # completed in one go: 360 s, 60 s of them loading; 5 steps of 60 s, of which half of 20 s generation was thrown
    # away
    reports = [report(step, seconds=60.0, rollout=20.0, wasted=0.5) for step in range(5)]
    write_trial(
        config, control, 0, outcome(control, 0, 300), reports=reports, attempts=[attempt(0, 360, loading_seconds=60.0)]
    )
    # killed after 3 of 5 steps and started again from step 2: 60 + 180 s, then 60 + 180 s; 300 s are useful
    attempts = [
        attempt(0, 240, loading_seconds=60.0, ended=""),
        attempt(1000, 1240, loading_seconds=60.0, first_step=2),
    ]
    reports = [report(step, seconds=60.0, rollout=20.0, wasted=0.0) for step in range(5)]
    write_trial(config, control, 1, outcome(control, 1, 300), reports=reports, attempts=attempts)
    # collapsed after two steps
    reports = [report(step, seconds=60.0, rollout=20.0, wasted=1.0) for step in range(2)]
    write_trial(
        config,
        noisy,
        0,
        outcome(noisy, 0, 100, "collapsed"),
        reports=reports,
        attempts=[attempt(0, 180, loading_seconds=60.0)],
    )
    # running: nothing reported yet
    write_trial(config, noisy, 1, None, attempts=[attempt(0, 36, ended="")])
    return read_arms(config)


def test_hours_are_those_of_every_process_by_arm_and_kind(tmp_path: Path) -> None:
    config = study(tmp_path, replicates=2)
    ledger = read_ledger(config, written(config))
    assert ledger.arms == pytest.approx({"control": (360 + 480) / 3600, "c01": (180 + 36) / 3600})
    assert ledger.hours == pytest.approx(sum(ledger.arms.values()))
    assert ledger.collapsed == pytest.approx(180 / 3600)
    assert ledger.repeated == pytest.approx((480 - 300 - 60) / 3600), "one repeated step and one more loading"
    assert ledger.filtered == pytest.approx((5 * 10 + 2 * 20) / 3600)
    assert ledger.unit == "trial-slot hours"


@pytest.mark.parametrize("gpus", [0.5, 1.0])
def test_with_gpus_every_figure_is_in_gpu_hours(tmp_path: Path, gpus: float) -> None:
    config = study(tmp_path, replicates=2, gpus=gpus)
    arms = written(config)
    plain, ledger = read_ledger(config.model_copy(update={"gpus": None}), arms), read_ledger(config, arms)
    for name in ("hours", "collapsed", "repeated", "filtered"):
        assert getattr(ledger, name) == pytest.approx(gpus * getattr(plain, name))
    assert ledger.unit == "GPU hours"


def test_a_sweep_without_trials_has_no_hours(tmp_path: Path) -> None:
    ledger = read_ledger(study(tmp_path), [])
    assert (ledger.hours, ledger.collapsed, ledger.repeated, ledger.filtered, dict(ledger.arms)) == (0, 0, 0, 0, {})


def test_what_was_taken_over_is_saved_and_neither_spent_nor_repeated_nor_filtered(tmp_path: Path) -> None:
    config = study(tmp_path)
    arm = make_arm(config, "control")
    write_arm(config, 0, arm)
    reports = [report(step, seconds=60.0, rollout=20.0, wasted=0.5) for step in range(5)]
    shared = {"trial": "c01-0", "steps": 2, "seconds": 120.0}
    # killed after step 3, of which it had made one itself, and again from step 2
    attempts = [
        attempt(0, 90, loading_seconds=30.0, ended="", shared=shared),
        attempt(100, 310, loading_seconds=30.0, first_step=2, shared=shared),
    ]
    write_trial(config, arm, 0, outcome(arm, 0, 300), reports=reports, attempts=attempts)
    ledger = read_ledger(config, read_arms(config))
    assert ledger.hours == pytest.approx(300 / 3600)
    assert ledger.saved == pytest.approx(120 / 3600)
    assert ledger.repeated == pytest.approx((300 - 30 - 3 * 60) / 3600)
    assert ledger.filtered == pytest.approx(3 * 10 / 3600)


@pytest.mark.parametrize(("given", "first", "saved"), [(0.0, 150, 0), (60.0, 90, 60)])
def test_what_a_retry_took_over_from_the_trial_itself_is_neither_saved_nor_repeated(
    given: float, first: int, saved: int, tmp_path: Path
) -> None:
    """The first process loaded for 30 s and made two steps of 60 s, the one with the start: 60 s of them another trial
    may have given it. It died before a checkpoint; the second one took over both steps and made three more."""
    config = study(tmp_path)
    arm = make_arm(config, "control")
    write_arm(config, 0, arm)
    reports = [report(step, seconds=60.0) for step in range(5)]
    shared = {"trial": "c01-0", "steps": 0, "seconds": given} if given else None
    attempts = [
        attempt(0, first, loading_seconds=30.0, ended="", shared=shared),
        attempt(200, 410, loading_seconds=30.0, shared=shared),
    ]
    write_trial(config, arm, 0, outcome(arm, 0, 300), reports=reports, attempts=attempts)
    ledger = read_ledger(config, read_arms(config))
    assert ledger.repeated == pytest.approx(30 / 3600), "the second loading"
    assert ledger.saved == pytest.approx(saved / 3600)


def test_an_attempt_s_time_that_no_report_explains_is_not_negative(tmp_path: Path) -> None:
    """A killed process is seen up to ten seconds before its end, so reports may add up to more than its attempts."""
    config = study(tmp_path)
    arm = make_arm(config, "control")
    write_arm(config, 0, arm)
    reports = [report(step, seconds=60.0) for step in range(5)]
    write_trial(
        config, arm, 0, outcome(arm, 0, 300), reports=reports, attempts=[attempt(0, 100, ended=""), attempt(0, 150)]
    )
    assert read_ledger(config, read_arms(config)).repeated == 0.0

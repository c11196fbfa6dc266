"""What survives, a moment of each fault; `tests/benchmarks/faults.py` strikes more often and writes docs/faults.md."""

import json
import random
import time

import pytest

from search.store import load_study_config
from search.study import resume_study
from spaces.errors import ConfigError
from tests.benchmarks import faults
from tests.benchmarks.faults import DEADLINE, FAULTS, Sweep, Tally

pytestmark = pytest.mark.slow

LONGER = ("--set", "grpo.steps=24")  # all faults are to strike one sweep
LONG = ("--set", "grpo.steps=120")  # and to find it in work


def assert_every_trial_is_there_once_with_the_undisturbed_numbers(sweep: Sweep) -> None:
    tally = sweep.tally
    sweep.finish()
    faults.check(sweep)
    assert tally.found == tally.expected > 0
    assert (tally.twice, tally.lost, tally.unclosed, tally.other_numbers) == (0, 0, 0, 0), tally.notes
    assert tally.notes == []


def hangs(sweep: Sweep) -> int:
    """Attempts that were ended because a step took too long."""
    attempts = [json.loads(file.read_text()) for file in sweep.folder.glob("trials/*/attempt-*.json")]
    return sum(attempt["ended"] == "hang" for attempt in attempts)


def test_a_sweep_whose_driver_is_ended_thrice_and_resumed_has_every_trial_once_with_the_undisturbed_numbers() -> None:
    """By SIGKILL, SIGTERM to its group, and SIGKILL with a damaged newest checkpoint: what one leaves meets the next
    one."""
    with faults.new_store("driver") as store:
        sweep = Sweep("driver", store, random.Random(1), Tally(), more=LONG, latest=2.0)
        for fault in ("driver", "group", "checkpoint"):
            FAULTS[fault].strike(sweep)
        assert sweep.tally.faults == 3, "each found it in work"
        assert_every_trial_is_there_once_with_the_undisturbed_numbers(sweep)


def test_a_second_driver_is_refused_and_trials_that_hang_or_die_are_tried_again_with_the_undisturbed_numbers() -> None:
    with faults.new_store("hang") as store:
        sweep = Sweep("hang", store, random.Random(1), Tally(), more=LONGER)
        faults.prepare_freeze(sweep)
        running = sweep.start()
        sweep.wait_for_life(running)
        with pytest.raises(ConfigError, match="is being run by another process"):
            resume_study(load_study_config(str(store), sweep.name), lambda event: pytest.fail("it runs"))
        assert running.poll() is None, "there was a first one"
        faults.freeze_a_rollout(sweep, running)
        until = time.monotonic() + DEADLINE
        while not hangs(sweep) and running.poll() is None and time.monotonic() < until:
            time.sleep(0.1)  # or the next strike might hit the frozen one
        faults.kill_an_actor(sweep, running)
        running.wait(DEADLINE)
        assert sweep.tally.faults == 2
        assert hangs(sweep) == 1
        assert_every_trial_is_there_once_with_the_undisturbed_numbers(sweep)

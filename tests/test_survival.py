"""What survives, a few moments of each fault; `tests/benchmarks/faults.py` strikes more often and writes docs/faults.md."""

import pytest

from tests.benchmarks.faults import FAULTS, run_fault


@pytest.mark.slow
@pytest.mark.parametrize("name", ["driver", "actor", "sigterm", "checkpoint", "hang"])
def test_a_sweep_that_is_hurt_and_resumed_has_every_trial_once_with_the_undisturbed_numbers(name: str) -> None:
    tally = run_fault(name, FAULTS[name], seed=1, enough=2 if name in ("actor", "hang") else 1)
    assert tally.faults >= 1
    assert tally.found == tally.expected > 0
    assert (tally.twice, tally.lost, tally.unclosed, tally.other_numbers) == (0, 0, 0, 0), tally.notes
    assert tally.notes == []


@pytest.mark.slow
def test_a_second_driver_is_refused() -> None:
    tally = run_fault("second", FAULTS["second"], seed=1, enough=1)
    assert tally.faults >= 1
    assert tally.notes == []

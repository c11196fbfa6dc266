"""What runs next where only the number of runs is given: something new, or something again.

A fixed number of replicates spends most runs on configurations that are out of the question, and one replicate each
puts forward whoever was lucky, or held by chance where runs begin to break. So a sweep of N runs first explores: each
arm that is asked for once, then new configurations, since the surrogate lends each the runs of its neighbours
(`search/surrogate.py`). The last sqrt(N) runs are spent on knowing the best better. The arm that promises most runs
again,

    promise = (control + posterior mean of the gain) x P(it holds) - control

by all runs before: what it gains on its own control counts, as when a candidate is chosen (`search/promise.py`), and
not how high that control stands. A lucky one falls behind, and the next is asked. An arm is out when even one posterior
standard deviation more would not reach the best promise, and after STOPPED collapses whatever it promises. While a run
of an arm is not over, the next best goes ahead.

No arm has more replicates than its control, which runs first: replicate k has the same seed in both, so differences
stay paired.

A decision depends on what was decided and on what has ended, and is written down before it runs (the arm's file), so
that a sweep which was killed goes on with it. Left out: buying a verdict. A sweep finds a candidate; `rin confirm`
judges it, with a number of replicates for that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from search.store import MOST
from search.surrogate import Seen, expected
from spaces.library import Space

STOPPED = 2
"""Collapses of an arm after which it is not run again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An arm as it stands. Example: Standing(seen=Seen(...), level=0.70, control=0, planned=2, ended=1)."""

    seen: Seen
    """Of its runs that ended."""
    level: float = 0.0
    """Mean accuracy of its control."""
    control: int | None = None
    """Index of its control; None = it is one."""
    planned: int = 1
    """Replicates that were decided on."""
    ended: int = 0
    """Of these, that are over, whatever became of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Example: Run(arm=3, replicate=1); Run(arm=None, replicate=0) is a new configuration."""

    arm: int | None
    replicate: int


NEW = Run(arm=None, replicate=0)


def new_configurations(runs: int, arms: int) -> int:
    """That are tried beside so many arms before anything runs again."""
    return max(0, runs - math.ceil(math.sqrt(runs)) - arms)


def next_run(
    space: Space, arms: Sequence[Standing], *, runs: int, most: int = MOST, exhausted: bool = False
) -> Run | None:
    """None when `runs` have been decided on, or nothing is left that may run: every arm has `most` replicates, or is
    stopped, and the space has no further configuration (`exhausted`)."""
    left = runs - sum(arm.planned for arm in arms)
    if left <= 0:
        return None
    if not exhausted and new_configurations(runs, len(arms)):
        return NEW
    may = [
        number
        for number, arm in enumerate(arms)
        if arm.control is not None
        and arm.planned < most
        and arm.seen.collapsed < STOPPED
        # The last run is none for a control whose arm could not follow.
        and (left > 1 or arm.planned < arms[arm.control].planned)
    ]
    worth = _worth(space, arms)
    best = max((promise for promise, _ in worth.values()), default=-math.inf)
    hopeful = [number for number in may if number in worth and worth[number][1] >= best]
    if not hopeful and not exhausted:
        return NEW
    if not may:
        return None
    promise = {number: worth[number][0] if number in worth else -math.inf for number in hopeful or may}
    chosen = min(promise, key=lambda number: (arms[number].planned > arms[number].ended, -promise[number]))
    control = arms[chosen].control
    assert control is not None
    number = control if arms[control].planned <= arms[chosen].planned else chosen
    return Run(arm=number, replicate=arms[number].planned)


def _worth(space: Space, arms: Sequence[Standing]) -> dict[int, tuple[float, float]]:
    """Of each arm with a run that is over: what another run promises, and what may be hoped of it."""
    numbers = [n for n, arm in enumerate(arms) if arm.control is not None and arm.seen.held + arm.seen.collapsed > 0]
    if not any(arms[n].seen.held for n in numbers):
        return {}
    found = expected(space, [arms[n].seen for n in numbers])
    worth = {}
    for n, what in zip(numbers, found, strict=True):
        level, expected_there = arms[n].level, arms[n].level + what.gain
        worth[n] = what.holds * expected_there - level, what.holds * (expected_there + what.sd) - level
    return worth

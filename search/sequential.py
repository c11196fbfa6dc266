"""Replicates are added until a comparison is decided, and the error level holds over all looks.

To look at an ordinary 95 % interval five times is wrong in 15 % of null cases. Alpha spending (Lan & DeMets 1983) gives
each look the part of the level that its share of the last look's replicates has earned, so a look that was not planned
(the budget ended) has its part too; Pocock's function spends evenly and can end at the first look, which is the purpose
where a replicate is hours of training.

What a look may use is turned into a level for its t test under the joint distribution of the t statistics of all looks.
That distribution is the same for any spread and is drawn here, with a fixed seed: the normal approximation (Jennison &
Turnbull 2000, ch. 11) makes 5.3 to 5.9 % out of 5 % at so few replicates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from search.replicates import MIN_REPLICATES, check_looks
from search.statistics import Comparison, compare_pairs, pair
from spaces.errors import ConfigError

NULL_PATHS = 400_000
"""Experiments drawn for the levels of looks: 18 in 1,000 of them are known to 0.2 in 1,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialRule:
    """When arms are compared while replicates are still being added, and how much of the error level each look may use.

    Example: SequentialRule(looks=(5, 8, 12, 16, 20)).levels((5, 8)) == (0.0179, 0.0135)
    """

    looks: tuple[int, ...] = (5, 8, 12, 16, 20)
    """Replicates per arm at each planned look."""
    level: float = 0.05
    """Two-sided, over all looks."""

    def __post_init__(self) -> None:
        check_looks(self.looks)
        if not 0 < self.level <= 0.5:
            raise ConfigError(f"level {self.level}: an error level is a share between 0 and 0.5, such as 0.05")

    def levels(self, taken: Sequence[int]) -> tuple[float, ...]:
        """The two-sided level of the t test at each of these looks."""
        return _levels_of_looks(tuple(taken), self.looks[-1], self.level)


CONFIRM = SequentialRule()
"""What `rin confirm` uses unless told otherwise."""


def sequential_compare(
    treated: Sequence[float],
    control: Sequence[float],
    *,
    rule: SequentialRule = CONFIRM,
    final: bool = False,
    margin: float = 0.01,
    correct: tuple[ArrayLike, ArrayLike] | None = None,
    questions: int | None = None,
    verdict_stands: bool = True,
) -> Comparison:
    """`compare` while replicates are being added: what is said at all looks together is false with `rule.level` at
    most.

    Replicates in the order in which they were planned. A decision at a look stands, so replicates after it are not
    used. Between looks the last planned one counts; `final=True` says that no replicate will follow, and judges all of
    them at their own part of the level. Before the first look nothing has been spent: undecided, infinite interval.

    The interval is a repeated confidence interval (Jennison & Turnbull 1989): those of all looks together hold the
    truth with 1 - level, for whatever reason one stops. So `same` keeps the level too, and a single one of them is
    wider than an interval of its number of replicates alone would be. `level` of the result is that of its look;
    `needs` counts from there, at the level of the last look.

    `verdict_stands=False`: the interval at the last of these looks, also where the verdict fell at an earlier one, for
    questions that the verdict does not answer (more than a point?).
    """
    pairs = pair(treated, control, correct, questions)
    count = len(treated)
    if count > rule.looks[-1]:
        raise ValueError(f"{count} replicates, but the last look was planned at {rule.looks[-1]}: the level is spent")
    taken = [look for look in rule.looks if look <= count]
    if final and count >= MIN_REPLICATES and count not in taken:
        taken.append(count)
    levels = rule.levels(taken)
    later_level = rule.levels(rule.looks)[-1]
    judged = list(zip(taken, levels, strict=True))
    for look, level in judged if verdict_stands else judged[-1:]:
        result = compare_pairs(pairs.first(look), margin=margin, level=level, later_level=later_level)
        if result.verdict != "undecided":
            return result
    return result if taken else compare_pairs(pairs, margin=margin, level=0.0, later_level=later_level)


@lru_cache(maxsize=64)
def _levels_of_looks(taken: tuple[int, ...], last: int, level: float) -> tuple[float, ...]:
    """Runs the t statistics of NULL_PATHS experiments without a difference through the looks; each ends its part."""
    rng = np.random.default_rng(0)
    sums, squares = np.zeros(NULL_PATHS), np.zeros(NULL_PATHS)
    running = np.ones(NULL_PATHS, dtype=np.bool_)
    result: list[float] = []
    before, spent = 0, 0
    for look in taken:
        added = look - before
        # z: the sum of the new differences over its root; their squares around it are chi-square.
        z = rng.standard_normal(NULL_PATHS)
        sums += math.sqrt(added) * z
        squares += z**2 + (rng.chisquare(added - 1, NULL_PATHS) if added > 1 else 0.0)
        t = np.abs(sums) / np.sqrt(np.maximum(squares - sums**2 / look, 1e-300) * look / (look - 1))
        ending = round(NULL_PATHS * _spent(look / last, level)) - spent
        if result:
            kept = t[running]
            critical = float(np.partition(kept, len(kept) - ending)[len(kept) - ending])
            result.append(2 * float(special.stdtr(look - 1, -critical)))
        else:  # the first look is an ordinary t test: no need to draw its level
            result.append(_spent(look / last, level))
            critical = float(special.stdtrit(look - 1, 1 - result[0] / 2))
        running &= t < critical
        before, spent = look, NULL_PATHS - int(running.sum())
    return tuple(result)


def _spent(fraction: float, level: float) -> float:
    """Of the two-sided level, up to this share of the last look's replicates: Pocock's spending (Lan & DeMets 1983)."""
    return level * math.log(1 + (math.e - 1) * fraction)

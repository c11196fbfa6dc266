"""What may be concluded from replicates.

The unit of inference for a configuration is the replicate: training with another seed differs by more than answering other
questions. Arms share seeds, so the difference per seed is what is looked at: a paired t interval with R - 1 degrees of freedom
(Student 1908). Fewer than three replicates say nothing about their own spread, so the verdict is then `undecided`, whatever the
difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

MIN_REPLICATES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Example: Comparison(verdict="undecided", difference=0.012, low=-0.02, high=0.044, replicates=3)."""

    verdict: str
    """better | worse | same | undecided"""
    difference: float
    """Mean of treated minus control, as a share (0.01 = one point)."""
    low: float
    high: float
    """Interval of the difference; infinite with one replicate."""
    replicates: int


def compare(treated: Sequence[float], control: Sequence[float], *, confidence: float = 0.95, margin: float = 0.01) -> Comparison:
    """Accuracies [replicates] of an arm and of its control, paired by seed. Within +-margin the interval says `same`.

    Raises ValueError for unequal or empty lists and for accuracies that are not finite (a NaN is never averaged away).
    """
    if len(treated) != len(control) or len(treated) == 0:
        raise ValueError(f"needs as many treated as control replicates and at least one, but got {len(treated)} and {len(control)}")
    if not all(math.isfinite(value) for value in (*treated, *control)):
        raise ValueError("an accuracy is not finite; a failed run has no accuracy and must be run again")
    differences = [float(t) - float(c) for t, c in zip(treated, control, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    if count == 1:
        return Comparison(verdict="undecided", difference=mean, low=-math.inf, high=math.inf, replicates=1)
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * deviation / math.sqrt(count)
    low, high = mean - half, mean + half
    return Comparison(verdict=_verdict(low, high, margin, count), difference=mean, low=low, high=high, replicates=count)


def _verdict(low: float, high: float, margin: float, replicates: int) -> str:
    if replicates < MIN_REPLICATES:
        return "undecided"
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "same" if -margin <= low and high <= margin else "undecided"

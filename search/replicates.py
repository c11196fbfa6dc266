"""What a comparison is made of: replicates, how few say nothing, and after how many it looks.

Light on purpose: options are checked, and sweeps listed, without numpy and scipy, which only judging needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from spaces.errors import ConfigError

MIN_REPLICATES = 3
"""Fewer say nothing about their own spread."""
AT_ONCE = 5
"""Pairs up to which a sweep confirms its candidate by itself: the first look of the default plan."""
FRESH = 1000
"""Distance between the sweep's seeds and the confirmation's: no arm has as many replicates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicate:
    """Example: Replicate(seed=3, accuracy=0.71, collapsed=True)."""

    seed: int
    accuracy: float
    """Share of the questions that the clean model answers right (or its pass@k): at the end, or at the stop of a
    collapsed run."""
    collapsed: bool
    correct: tuple[float, ...] | None = None
    """Question by question, where they were kept: 1 right, 0 wrong, or the estimate of pass@k."""


def check_looks(looks: Sequence[int]) -> tuple[int, ...]:
    """Replicates per arm at each planned look. Raises ConfigError."""
    if not looks or looks[0] < MIN_REPLICATES or any(b <= a for a, b in pairwise(looks)):
        given, remedy = ",".join(map(str, looks)), f"from {MIN_REPLICATES} on, such as 5,8,12,16,20"
        raise ConfigError(f"looks {given}: name growing numbers of replicates {remedy}")
    return tuple(looks)

"""pass@k: the chance that at least one of k sampled answers to a question is right.

Greedy accuracy asks what the model says first. A method that widens what it says at all (noise in rollouts is said to)
moves pass@k at larger k, and may leave the first answer where it was.

**Estimate** (Chen et al. 2021, arXiv 2107.03374): of n sampled answers to a question c are right. Of all choices of k
among the n, the share C(n-c, k) / C(n, k) holds no right one, so 1 minus that is unbiased for every k up to n. The
obvious 1 - (1 - c/n)^k is too low wherever k is not small beside n.

**Interval**, 95 %, over questions: they are a sample of all that could be asked. It is Wilson's score interval (1927)
of as many coin tosses as the questions are worth, m (1 - m) / (s^2 / Q) for the mean m and the variance s^2 of their Q
estimates (the effective sample size of Korn & Graubard 1998). Estimates lie between 0 and 1, so they are worth no fewer
tosses than questions, and counted as no more than all samples; where all questions came to the same, as their number.
At 0 and at 1 it still has a width. What another seed would train is not in it: arms are compared over replicates.

Counts c are what a trial keeps (`Scores.right`): every k up to n, and every comparison, follows from them. Plain
Python, since reports read it without torch.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from trainable.metrics import PASS_AT

_NAME = re.compile(r"pass@([1-9]\d*)")
_Z = 1.959963984540054  # 95 %, two-sided


@dataclass(frozen=True, slots=True, kw_only=True)
class PassAt:
    """Example: PassAt(k=4, share=0.81, low=0.79, high=0.83)"""

    k: int
    share: float
    """Mean over questions, 0 to 1."""
    low: float
    high: float


@cache
def chances(samples: int, k: int) -> tuple[float, ...]:
    """pass@k of a question of which c = 0, 1, ... of the samples are right."""
    assert 1 <= k <= samples, f"{k=} {samples=}"
    every = math.comb(samples, k)
    return tuple((every - math.comb(samples - right, k)) / every for right in range(samples + 1))


def per_question(right: Sequence[int], samples: int, k: int) -> tuple[float, ...]:
    """`right`: for each question how many of its samples are."""
    of = chances(samples, k)
    return tuple(of[count] for count in right)


def pass_at(right: Sequence[int], samples: int, k: int) -> PassAt:
    """Of at least one question."""
    of, counts = chances(samples, k), Counter(right)
    share = math.fsum(of[count] * times for count, times in counts.items()) / len(right)
    squares = math.fsum((of[count] - share) ** 2 * times for count, times in counts.items())
    low, high = interval(share, squares, len(right), len(right) * samples)
    return PassAt(k=k, share=share, low=low, high=high)


def interval(share: float, squares: float, questions: int, most: int) -> tuple[float, float]:
    """Of a mean of estimates between 0 and 1, with the sum of their squared distances from it; worth `most` tosses at
    most."""
    tosses = float(questions)
    if squares > 0 and questions > 1:
        variance_of_mean = squares / (questions - 1) / questions
        tosses = min(max(share * (1 - share) / variance_of_mean, tosses), float(most))
    middle = (share + _Z**2 / (2 * tosses)) / (1 + _Z**2 / tosses)
    half = _Z / (1 + _Z**2 / tosses) * math.sqrt(share * (1 - share) / tosses + (_Z / (2 * tosses)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def metrics(right: Sequence[int], samples: int) -> dict[str, float]:
    """By tracked name, for every k; none where nothing was sampled."""
    found: dict[str, float] = {}
    for k in range(1, samples + 1 if right else 1):
        at = pass_at(right, samples, k)
        found |= {f"{PASS_AT}{k}": at.share, f"{PASS_AT}{k}_low": at.low, f"{PASS_AT}{k}_high": at.high}
    return found


def k_of(measure: str) -> int | None:
    """`pass@4` -> 4; None for what is none."""
    found = _NAME.fullmatch(measure)
    return None if found is None else int(found[1])


def shown(samples: int) -> list[int]:
    """The k that tables have room for: 1, 2, 4, ... and the last."""
    return [k for k in range(1, samples + 1) if k & (k - 1) == 0 or k == samples]

"""Clocks for benchmarks: medians with quartiles, and ratios of rivals that took turns in one run."""

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Each of `repeats` runs, after three that warm up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def in_turns(rivals: Mapping[str, Callable[[], object]], repeats: int, rounds: int = 5) -> dict[str, list[float]]:
    """Per rival the median of each round; the rivals take turns, so that what disturbs the machine disturbs all of
    them."""
    medians: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, work in rivals.items():
            medians[name].append(median(seconds(work, repeats)))
    return medians


def ratio(medians: Mapping[str, list[float]], name: str, to: str, digits: int = 2) -> str:
    """Median of the rounds' ratios with their range: `1.84 (1.80-1.91)`."""
    ratios = sorted(a / b for a, b in zip(medians[name], medians[to], strict=True))
    return f"{median(ratios):.{digits}f} ({ratios[0]:.{digits}f}-{ratios[-1]:.{digits}f})"


def spread(times: list[float], unit: float = 1.0) -> str:
    """Median and quartiles."""
    low, _, high = quantiles(times, n=4)
    return f"{median(times) / unit:.3g} ({low / unit:.3g} to {high / unit:.3g})"


def never_end(tokenizer: Any) -> None:
    """From now on all completions are as long as they may be: no token is the end."""
    tokenizer.__class__ = type("Endless", (type(tokenizer),), {"eos_token_id": property(lambda self: 1_000_000)})

"""Did layers with a large quantisation error improve more? The plan's question to every experiment (SRDD correlation).

The model is scanned as it was before training and with the weights that a trial ended with, on the same prompts: what a
layer's error is now less than it was is its improvement. Over the layers, rank by rank, it is held against the error
before: Spearman's coefficient with the interval of Bonett & Wright (2000), in which few layers say little (eight leave
about +-0.7). An experiment's coefficient means something only beside its control's: training moves errors
without noise, too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import stats

MEASURES = ("relative_error", "deadzone")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """A trial's layers, before and after training: measure -> one number per layer."""

    replicate: int
    before: Mapping[str, tuple[float, ...]]
    after: Mapping[str, tuple[float, ...]]
    middle: tuple[int, ...]
    """Layers of the plan's middle zone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spearman:
    """Example: Spearman(r=0.52, low=-0.31, high=0.90)"""

    r: float
    """NaN where one side does not vary."""
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """Of an arm, mean over the replicates that were scanned."""

    replicates: int
    layers: int
    by: Mapping[str, Spearman]
    """Measure -> error before against improvement of the same, over layers."""
    middle: float
    """Mean improvement of relative error in the middle zone, a share; positive is less error than before."""
    elsewhere: float


def correlation(changes: Sequence[LayerChange]) -> Correlation:
    """Of at least one replicate."""
    gains = {measure: _mean_gain(changes, measure) for measure in MEASURES}
    middle = set(changes[0].middle)
    gain = gains["relative_error"]
    return Correlation(
        replicates=len(changes),
        layers=len(gain),
        by={measure: spearman(changes[0].before[measure], gains[measure]) for measure in MEASURES},
        middle=fmean(value for layer, value in enumerate(gain) if layer in middle),
        elsewhere=fmean([value for layer, value in enumerate(gain) if layer not in middle] or [math.nan]),
    )


def _mean_gain(changes: Sequence[LayerChange], measure: str) -> list[float]:
    gains = [
        [before - after for before, after in zip(change.before[measure], change.after[measure], strict=True)]
        for change in changes
    ]
    return [fmean(column) for column in zip(*gains, strict=True)]


def spearman(x: Sequence[float], y: Sequence[float]) -> Spearman:
    """With its 95 % interval: Fisher's z, standard error sqrt((1 + r^2 / 2) / (n - 3))."""
    if len(x) < 4 or len(set(x)) == 1 or len(set(y)) == 1:
        return Spearman(r=math.nan, low=-1.0, high=1.0)
    r = float(stats.spearmanr(x, y).statistic)
    z = math.atanh(r) if abs(r) < 1 else math.copysign(math.inf, r)
    half = 1.96 * math.sqrt((1 + r * r / 2) / (len(x) - 3))
    return Spearman(r=r, low=math.tanh(z - half), high=math.tanh(z + half))

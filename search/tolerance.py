"""How much noise a model stands: the sigma tolerance boundary, per quantisation mode and module kind.

Whether a run collapses is yes or no, and more noise is not less dangerous. So the chance of a collapse is taken as a
logistic function of log sigma, and the boundary is the sigma at which half the runs collapse.

A few runs per sigma often separate completely: all below some sigma held, all above broke. The maximum likelihood slope
is then infinite and any single number would be an invention. What is known is a bracket: the largest sigma up to which
every run held, the smallest from which on every run broke. Where all runs ended alike, one side of it is known.

Half is late for whoever chooses a sigma, so the sigma at which a tenth collapse is told beside it.

The interval is a posterior's: beforehand every sigma_50 is as likely as any other, on the log scale, and the slope is
one of SLOPES. It needs no estimate of the slope, so it holds under separation too, where it lies within the bracket
when runs are many and is wider when they are few. 96 % of the posterior lie between its ends, which hold the truth in
about 95 % of sweeps whatever the slope (93 to 98, measured in docs/calibration.md; a likelihood ratio holds it in 81 to
96 with chi-square's own limit, and in up to 99.9 with one that is never below 93). Where all runs ended alike nothing
bounds the other side: the end is the sigma at which that would happen in TAIL of such sweeps.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Status = Literal["fitted", "bracketed", "held", "broke", "one sigma", "unordered"]

FLATTEST, STEEPEST = 1.0, 50.0
"""Slopes per unit of log sigma: from a tenth to nine tenths collapsing, sigma grows 81-fold at the first, 1.09-fold at
the last."""
_NARROW, _WIDE = STEEPEST**-0.5, FLATTEST**-0.5
SLOPES: NDArray[np.float64] = (_NARROW + (_WIDE - _NARROW) * (np.arange(24) + 0.5) / 24) ** -2.0
"""Equally likely beforehand: the square root of a curve's width, which is one by its slope, has an even chance."""
LIKELY = 16.0
"""How far below the highest a log likelihood counts: to a ten-millionth."""
STEP = 1e8
"""Slope that stands for a step: where a likelihood only rises with it."""
TAIL = 0.02
"""On each side of an interval."""
TENTH = float(special.logit(0.1))
REACH = 15.0
"""In units of log sigma from the runs: where the flattest curve leaves a millionth."""
ITERATIONS = 10_000
"""Brent's method always ends; scipy gives up after 100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyRun:
    """Example: NoisyRun(mode="w4a4", kind="linear", sigma=0.05, collapsed=True)."""

    mode: str
    """Quantisation mode: w4a4, w4a8, ..."""
    kind: str
    """Module kind that the noise was added to: rmsnorm, linear."""
    sigma: float
    """`noise.sigma_start`, above 0: the control has no noise to tolerate."""
    collapsed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """One line of the sigma lookup table.

    Example: Boundary(mode="w4a4", kind="linear", runs=10, collapsed=5, status="bracketed", held=0.01, broke=0.05,
    sigma_50=None, low_50=0.01, high_50=0.05, sigma_10=None, low_10=0.01, high_10=0.05).
    """

    mode: str
    kind: str
    runs: int
    collapsed: int
    status: Status
    """`fitted`: outcomes overlap, a slope exists. `bracketed`: they are separated, or meet at one sigma. `held` or
    `broke`: all runs ended alike. `one sigma`: only one was tried, and runs ended both ways. `unordered`: collapses do
    not grow with sigma."""
    held: float | None
    """Largest sigma tried up to which every run held. None: some run broke at the smallest."""
    broke: float | None
    """Smallest sigma tried from which on every run broke."""
    sigma_50: float | None
    """Half the runs collapse; only where `fitted`."""
    low_50: float
    high_50: float
    """Interval of it; 0 and infinity where that side is open."""
    sigma_10: float | None
    """A tenth of the runs collapse; only where `fitted`."""
    low_10: float
    high_10: float

    def words(self) -> str:
        """Example: `half the runs collapse at sigma 0.021 [0.014, 0.035], a tenth at 0.012 [0.003, 0.018]`."""
        low, high = _end(self.low_50), _end(self.high_50)
        if self.status == "fitted":
            assert self.sigma_50 is not None
            assert self.sigma_10 is not None
            tenth = f"a tenth at {_end(self.sigma_10)} [{_end(self.low_10)}, {_end(self.high_10)}]"
            return f"half the runs collapse at sigma {_end(self.sigma_50)} [{low}, {high}], {tenth}"
        if self.status == "held":
            assert self.held is not None
            few = (
                "so few exclude only that half collapse below"
                if self.low_50 < self.held
                else "half collapse at more than"
            )
            return f"every run held, up to sigma {self.held:.3g}; {few} {low}"
        if self.status == "broke":
            assert self.broke is not None
            few = (
                "so few exclude only that half collapse above"
                if self.high_50 > self.broke
                else "half collapse at less than"
            )
            return f"every run broke, down to sigma {self.broke:.3g}; {few} {high}"
        if self.status == "one sigma":
            return f"{self.collapsed} of {self.runs} runs broke at the only sigma tried"
        if self.status == "unordered":
            return "collapses do not grow with sigma: no boundary in these runs"
        all_held = None if self.held is None else f"every run held up to sigma {self.held:.3g}"
        all_broke = None if self.broke is None else f"every run broke from {self.broke:.3g}"
        between = f"{all_held or 'some broke at the smallest sigma'}, {all_broke or 'some held at the largest'}"
        return f"{between}; half collapse within [{low}, {high}]"


def boundaries(runs: Iterable[NoisyRun]) -> tuple[Boundary, ...]:
    """A line per mode and module kind, sorted by them. Raises ValueError for a sigma that is not above 0 and finite."""
    groups: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    for run in runs:
        if not (math.isfinite(run.sigma) and run.sigma > 0):
            raise ValueError(f"sigma {run.sigma} has no logarithm: the boundary is about runs with noise")
        groups[run.mode, run.kind].append((run.sigma, run.collapsed))
    return tuple(_boundary(mode, kind, groups[mode, kind]) for mode, kind in sorted(groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contour:
    """Example: Contour(share=0.25, sigma=0.013, low=0.009, high=0.019)."""

    share: float
    """Of the runs that collapse."""
    sigma: float | None
    """At which so many do; only where a slope exists."""
    low: float
    high: float
    """Interval of it, as in `Boundary`."""


def contours(runs: Iterable[tuple[float, bool]], shares: Sequence[float]) -> tuple[Contour, ...]:
    """Of (sigma, collapsed) of one mode and kind: at which sigma each share of the runs collapses. Empty where that
    cannot be said of any."""
    seen = list(runs)
    x = np.log([sigma for sigma, _ in seen])
    y = np.array([collapsed for _, collapsed in seen], dtype=np.float64)
    first_broke = min((sigma for sigma, collapsed in seen if collapsed), default=math.inf)
    status = _status(x, y, overlap=max((sigma for sigma, bad in seen if not bad), default=0.0) > first_broke)
    if status in ("one sigma", "unordered"):
        return ()
    levels = [float(special.logit(share)) for share in shares]
    slope, offset = _likeliest(x, y) if status == "fitted" else (math.nan, math.nan)
    return tuple(
        Contour(share=share, sigma=_sigma((level - offset) / slope) if status == "fitted" else None, low=low, high=high)
        for share, level, (low, high) in zip(shares, levels, _intervals(x, y, status, levels), strict=True)
    )


def _boundary(mode: str, kind: str, runs: list[tuple[float, bool]]) -> Boundary:
    sigmas = {sigma for sigma, _ in runs}
    first_broke = min((sigma for sigma, collapsed in runs if collapsed), default=math.inf)
    last_held = max((sigma for sigma, collapsed in runs if not collapsed), default=0.0)
    held = max((sigma for sigma in sigmas if sigma < first_broke), default=None)
    broke = min((sigma for sigma in sigmas if sigma > last_held), default=None)
    x = np.log([sigma for sigma, _ in runs])
    y = np.array([collapsed for _, collapsed in runs], dtype=np.float64)
    status = _status(x, y, overlap=last_held > first_broke)
    slope, offset = _likeliest(x, y) if status == "fitted" else (math.nan, math.nan)
    (low, high), (low_10, high_10) = _intervals(x, y, status)
    return Boundary(
        mode=mode,
        kind=kind,
        runs=len(runs),
        collapsed=int(y.sum()),
        status=status,
        held=held,
        broke=broke,
        sigma_50=_sigma(-offset / slope) if status == "fitted" else None,
        low_50=low,
        high_50=high,
        sigma_10=_sigma((TENTH - offset) / slope) if status == "fitted" else None,
        low_10=low_10,
        high_10=high_10,
    )


def _sigma(logarithm: float) -> float:
    """A slope of nearly nothing puts a boundary where floats end."""
    return math.exp(logarithm) if logarithm < 700 else math.inf


def _end(sigma: float) -> str:
    return "..." if math.isinf(sigma) else f"{sigma:.3g}"


def _status(x: NDArray[np.float64], y: NDArray[np.float64], overlap: bool) -> Status:
    if y.min() == y.max():
        return "held" if y.max() == 0 else "broke"
    if x.min() == x.max():
        return "one sigma"
    # The sign of the likeliest slope is that of its score at 0: the likelihood is concave.
    if float(((y - y.mean()) * (x - x.mean())).sum()) <= 1e-9 * float(x.std()):
        return "unordered"
    return "fitted" if overlap else "bracketed"


def _likeliest(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Slope (at least the flattest) and offset of the highest likelihood: the root of its score in the slope, the
    offset being the best for each slope. Both scores only fall, so both roots are bracketed; nothing is inverted that
    could be singular."""
    centre = float(x.mean())
    z = x - centre

    def best_offset(slope: float) -> float:
        reach = slope * float(np.abs(z).max()) + 40
        return _root(lambda offset: float((y - special.expit(offset + slope * z)).sum()), -reach, reach)

    def falling(log_slope: float) -> float:
        slope = math.exp(log_slope)
        return float(((y - special.expit(best_offset(slope) + slope * z)) * z).sum())

    flat, steep = math.log(FLATTEST), math.log(STEP)
    slope = math.exp(flat if falling(flat) <= 0 else steep if falling(steep) >= 0 else _root(falling, flat, steep))
    return slope, best_offset(slope) - slope * centre


def _intervals(
    x: NDArray[np.float64], y: NDArray[np.float64], status: Status, levels: Sequence[float] = (0.0, TENTH)
) -> list[tuple[float, float]]:
    """Of the sigma at which the logit is each level: half the runs collapse, and a tenth; 0 and infinity where a side
    is open."""
    if status in ("one sigma", "unordered"):
        return [(0.0, math.inf)] * len(levels)
    wide = np.union1d(
        np.linspace(x.min() - REACH, x.max() + REACH, 300), np.linspace(x.min() - 1.0, x.max() + 1.0, 300)
    )
    logs = _log_likelihoods(wide, x, y)
    if status in ("held", "broke"):
        return [_one_end(wide, logs, level, status) for level in levels]
    likely = wide[logs.max(axis=1) > logs.max() - LIKELY]
    edges = np.linspace(likely[0] - 0.1, likely[-1] + 0.1, 500)
    logs = _log_likelihoods(edges, x, y)
    return [_central(edges, logs, level) for level in levels]


def _log_likelihoods(edges: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """[E, S]: of the runs, if half collapse at log sigma `edges`, for each of SLOPES."""
    logs = np.zeros((len(edges), len(SLOPES)))
    for (log_sigma, collapsed), count in Counter(zip(x, y, strict=True)).items():
        sign = 1.0 if collapsed else -1.0
        logs += count * special.log_expit(sign * SLOPES * (log_sigma - edges)[:, None])
    return logs


def _central(edges: NDArray[np.float64], logs: NDArray[np.float64], level: float) -> tuple[float, float]:
    """The ends of the posterior without its tails, of the sigma at which the logit is `level`; edges are equally far
    apart."""
    where = (edges[:, None] + level / SLOPES).ravel()
    order = np.argsort(where)
    below = np.cumsum(np.exp(logs.ravel()[order] - logs.max()))
    low, high = where[order][np.searchsorted(below, below[-1] * np.array([TAIL, 1 - TAIL]))]
    return _sigma(float(low)), _sigma(float(high))


def _one_end(
    edges: NDArray[np.float64], logs: NDArray[np.float64], level: float, status: Status
) -> tuple[float, float]:
    """Of runs that ended alike: the sigma from which on they are likely enough, over all slopes alike."""
    chances = [
        np.interp(edges, edges + level / slope, column) for slope, column in zip(SLOPES, np.exp(logs).T, strict=True)
    ]
    chance = np.mean(chances, axis=0)  # [E], rising where all held, falling where all broke
    if status == "held":
        return _sigma(float(np.interp(TAIL, chance, edges))), math.inf
    return 0.0, _sigma(float(np.interp(TAIL, chance[::-1], edges[::-1])))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(optimize.brentq(function, low, high, xtol=1e-12, maxiter=ITERATIONS))

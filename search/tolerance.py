"""How much noise a model stands: the sigma tolerance boundary, per quantisation mode and module kind.

Whether a run collapses is yes or no, and more noise is not less dangerous. So the chance of a collapse is taken as a
logistic function of log sigma, and the boundary is the sigma at which half the runs collapse.

A few runs per sigma often separate completely: all below some sigma held, all above broke. The maximum likelihood slope
is then infinite and any single number would be an invention. What is known is a bracket: the largest sigma up to which
every run held, the smallest from which on every run broke. Where all runs ended alike, one side of it is known.

Half is late for whoever chooses a sigma, so the sigma at which a tenth collapse is told beside it.

The interval is the profile likelihood's (Venzon & Moolgavkar 1988): all sigma_50 for which some slope of at least 0
makes the runs likely enough (2 log likelihood ratio within a limit). It needs no finite slope, so it holds
under separation too, where it is wider than the bracket (two runs that held prove little), and it is open on the side
about which the runs say nothing. The limit is not chi-square's own (1 df), which is that of many runs: with the dozens
that a sweep has, 3.84 holds the truth in 84 to 93 % instead of 95. It is the one at which chi-square would be exceeded
a fifth as often, 6.63 (measured in docs/calibration.md).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Status = Literal["fitted", "bracketed", "held", "broke", "one sigma", "unordered"]

STEEP = 1e8
"""Slope per unit of log sigma that stands for a step."""
FLAT = 1e-10
"""Slope that stands for none."""
FAR = 30.0
"""In units of log sigma from the runs: where an interval that has not ended yet is open."""
FEW_RUNS = 5
"""How much rarer than its name the limit of the likelihood ratio is exceeded in many runs."""
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
            more = f"half collapse at more than {low}" if self.low_50 > 0 else "too few runs to say more"
            return f"every run held, up to sigma {self.held:.3g}; {more}"
        if self.status == "broke":
            more = "too few runs to say more" if math.isinf(self.high_50) else f"half collapse at less than {high}"
            return f"every run broke, down to sigma {self.broke:.3g}; {more}"
        if self.status == "one sigma":
            return f"{self.collapsed} of {self.runs} runs broke at the only sigma tried"
        if self.status == "unordered":
            return "collapses do not grow with sigma: no boundary in these runs"
        all_held = None if self.held is None else f"every run held up to sigma {self.held:.3g}"
        all_broke = None if self.broke is None else f"every run broke from {self.broke:.3g}"
        known = self.low_50 > 0 or math.isfinite(self.high_50)
        within = f"half collapse within [{low}, {high}]" if known else "too few runs for an interval"
        return f"{all_held or 'some broke at the smallest sigma'}, {all_broke or 'some held at the largest'}; {within}"


def boundaries(runs: Iterable[NoisyRun], *, confidence: float = 0.95) -> tuple[Boundary, ...]:
    """A line per mode and module kind, sorted by them. Raises ValueError for a sigma that is not above 0 and finite."""
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is a share between 0.5 and 1 (0.95 = 95 %), but got {confidence}")
    groups: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    for run in runs:
        if not (math.isfinite(run.sigma) and run.sigma > 0):
            raise ValueError(f"sigma {run.sigma} has no logarithm: the boundary is about runs with noise")
        groups[run.mode, run.kind].append((run.sigma, run.collapsed))
    return tuple(_boundary(mode, kind, groups[mode, kind], confidence) for mode, kind in sorted(groups))


def _boundary(mode: str, kind: str, runs: list[tuple[float, bool]], confidence: float) -> Boundary:
    sigmas = {sigma for sigma, _ in runs}
    first_broke = min((sigma for sigma, collapsed in runs if collapsed), default=math.inf)
    last_held = max((sigma for sigma, collapsed in runs if not collapsed), default=0.0)
    held = max((sigma for sigma in sigmas if sigma < first_broke), default=None)
    broke = min((sigma for sigma in sigmas if sigma > last_held), default=None)
    x = np.log([sigma for sigma, _ in runs])
    y = np.array([collapsed for _, collapsed in runs], dtype=np.float64)
    status, slope, offset = _fit(x, y, overlap=last_held > first_broke)
    (low, high), (low_10, high_10) = (
        (0.0, math.inf) if slope == 0 else _interval(x, y, slope, offset, share, confidence) for share in (0.5, 0.1)
    )
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
        sigma_10=_sigma((float(special.logit(0.1)) - offset) / slope) if status == "fitted" else None,
        low_10=low_10,
        high_10=high_10,
    )


def _sigma(logarithm: float) -> float:
    """A slope of nearly nothing puts a boundary where floats end."""
    return math.exp(logarithm) if logarithm < 700 else math.inf


def _end(sigma: float) -> str:
    return "..." if math.isinf(sigma) else f"{sigma:.3g}"


def _fit(x: NDArray[np.float64], y: NDArray[np.float64], overlap: bool) -> tuple[Status, float, float]:
    """Status, slope and offset of the logit; under separation a step in the middle of the bracket, from which the
    interval is sought."""
    if y.min() == y.max():
        edge = x.max() + FAR / 2 if y.max() == 0 else x.min() - FAR / 2
        return ("held" if y.max() == 0 else "broke"), STEEP, -STEEP * float(edge)
    if x.min() == x.max():
        return "one sigma", 0.0, 0.0
    scale, centre = float(x.std()), float(x.mean())
    z = (x - centre) / scale
    # The slope's sign is that of its score at 0: the likelihood is concave.
    if float(((y - y.mean()) * z).sum()) <= 1e-9:
        return "unordered", 0.0, 0.0
    if not overlap:
        middle = float(x[y == 0].max() + x[y == 1].min()) / 2
        return "bracketed", STEEP, -STEEP * middle
    slope, offset = _steepest(z, y)
    return "fitted", slope / scale, offset - slope * centre / scale


def _steepest(z: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and offset of the highest likelihood: the root of its score in the slope, the offset being the best for
    each slope. Both scores only fall, so both roots are bracketed; nothing is inverted that could be singular."""

    def best_offset(slope: float) -> float:
        reach = slope * float(np.abs(z).max()) + 40
        return _root(lambda offset: float((y - special.expit(offset + slope * z)).sum()), -reach, reach)

    def score(slope: float) -> float:
        return float(((y - special.expit(best_offset(slope) + slope * z)) * z).sum())

    slope = _slope(score)
    return slope, best_offset(slope)


def _log_likelihood(logits: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(special.log_expit(np.where(y == 1, logits, -logits)).sum())


def _interval(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    slope: float,
    offset: float,
    share: float,
    confidence: float,
) -> tuple[float, float]:
    """All sigma at which this share of the runs may collapse; slopes from 0 to a step."""
    allowed = float(stats.chi2.isf((1 - confidence) / FEW_RUNS, 1)) / 2
    level = float(special.logit(share))
    inside = (level - offset) / slope
    best = _profile(x - inside, y, level)

    def missing(edge: float) -> float:
        """How far the likelihood falls below what is allowed, if that share collapses at log sigma `edge`."""
        return best - _profile(x - edge, y, level) - allowed

    low, high = min(float(x.min()), inside) - FAR, max(float(x.max()), inside) + FAR
    return (
        _sigma(_root(missing, low, inside)) if missing(low) > 0 else 0.0,
        _sigma(_root(missing, inside, high)) if missing(high) > 0 else math.inf,
    )


def _profile(distance: NDArray[np.float64], y: NDArray[np.float64], level: float) -> float:
    """The highest log likelihood over slopes of at least 0, the logit being `level` at distance 0; concave in the
    slope."""

    def score(slope: float) -> float:
        return float(((y - special.expit(level + slope * distance)) * distance).sum())

    slope = _slope(score)
    return _log_likelihood(level + slope * distance, y)


def _slope(score: Callable[[float], float]) -> float:
    """The slope at which a falling score is 0, sought by its logarithm: it may be anything from nothing to a step."""
    flat, steep = math.log(FLAT), math.log(STEEP)

    def falling(log_slope: float) -> float:
        return score(math.exp(log_slope))

    if falling(flat) <= 0:
        return FLAT
    return math.exp(_root(falling, flat, steep)) if falling(steep) < 0 else STEEP


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(optimize.brentq(function, low, high, xtol=1e-12, maxiter=ITERATIONS))

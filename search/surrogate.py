"""What a configuration would come to if it ran again: the searcher's kind of model, asked about what has been run.

The best of thirty runs is mostly the luckiest: its accuracy is partly its run's, and one that lies where runs begin to
break has held by chance. Both are known better from its neighbours. So two Gaussian processes look at all arms, as
those of the searcher do: one at the gains of the runs that held, one at the share of runs that collapsed. Asked for an
arm they give the posterior mean of its gain, and the probability that it holds: that the second process lies below one
half, the searcher's own constraint.

Kernel: Matern 5/2 with a length scale per axis (Rasmussen & Williams 2006, ch. 4-5), equal labels of a choice at
distance 0 and different ones at 1. Length scales are log-normal around half the range, as the searcher's; scale and
noise of the standardised data log-normal around 0.7 and 0.3: runs of one configuration differ by as much as
configurations do. All at the maximum of the posterior. A run that is repeated n times has 1/n of the noise. An arm
without a place in the space (a point of the plan) has no neighbours: it is drawn towards the mean of all, the more the
fewer runs it has.

In numpy, since whoever reads a sweep asks it and needs neither optuna nor torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize, special

from search.coordinates import Params, coordinates, encode
from spaces.library import Space

Array = NDArray[np.float64]

APART = 1e6
"""Squared distance of arms that know nothing of each other."""
JITTER = 1e-8
"""On the diagonal: equal configurations stay invertible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An arm. Example: Seen(params={"noise.sigma_start": 0.01}, gain=0.02, held=3, collapsed=0)."""

    params: Params
    """Empty for an arm without a place in the space."""
    gain: float | None
    """Mean difference to its control over the runs that held, a share; None where none did."""
    held: int
    collapsed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Example: Expected(gain=0.012, sd=0.006, holds=0.87)."""

    gain: float
    """Posterior mean, a share; NaN where nothing that held was seen at all."""
    sd: float
    """Posterior standard deviation of that mean; NaN likewise."""
    holds: float
    """Probability that it does not collapse."""


def expected(space: Space, arms: Sequence[Seen]) -> list[Expected]:
    """Of each arm, in their order."""
    distances = _distances(space, [arm.params for arm in arms])  # [D, A, A]
    runs = np.array([arm.held + arm.collapsed for arm in arms], dtype=np.float64)
    held = np.array([arm.held > 0 and arm.gain is not None for arm in arms])
    gains, spreads = np.full((2, len(arms)), np.nan)
    if held.any():
        seen = np.array([arm.gain for arm in arms if arm.held > 0 and arm.gain is not None])
        counts = np.array([arm.held for arm in arms], dtype=np.float64)[held]
        gains, spreads = _posterior(distances[:, held][:, :, held], seen, 1 / counts, distances[:, :, held])
    holds = np.ones(len(arms))
    collapsed = np.array([arm.collapsed for arm in arms], dtype=np.float64)
    if collapsed.any():
        mean, spread = _posterior(distances, collapsed / runs, 1 / runs, distances)
        holds = special.ndtr((0.5 - mean) / spread)
    return [
        Expected(gain=float(gain), sd=float(sd), holds=float(chance))
        for gain, sd, chance in zip(gains, spreads, holds, strict=True)
    ]


def _distances(space: Space, params: Sequence[Params]) -> Array:
    """Squared, per axis [D, A, A]."""
    points = [encode(space, drawn) for drawn in params]
    axes = []
    for axis in coordinates(space):
        if axis.labels:
            labels = np.array([axis.labels.index(point[axis.name]) for point in points])
            axes.append((labels[:, None] != labels).astype(np.float64))
        else:
            places = np.array([point[axis.name] for point in points], dtype=np.float64)
            axes.append((places[:, None] - places) ** 2)
    distances = np.stack(axes)
    placed = np.array([bool(drawn) for drawn in params])
    alone = ~(placed[:, None] & placed) & ~np.eye(len(params), dtype=np.bool_)
    distances[:, alone] = APART
    return distances


def _posterior(distances: Array, seen: Array, shares: Array, asked: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of the process at the arms asked, `asked` [D, A, N] being their distances to those
    seen, [D, N, N] the distances among these, and `shares` [N] what part of the noise of one run each has."""
    mean, spread = float(seen.mean()), float(seen.std()) or 1.0
    z = (seen - mean) / spread

    def factor(logs: Array) -> tuple[Array, Array]:
        covariance = _kernel(distances, logs) + np.diag(math.exp(logs[-1]) * shares + JITTER)
        lower: Array = linalg.cholesky(covariance, lower=True)
        return lower, np.asarray(linalg.cho_solve((lower, True), z))

    def unlikeliness(logs: Array) -> float:
        lower, weights = factor(logs)
        prior = ((logs - centre) ** 2).sum() / 2
        return float(z @ weights / 2 + np.log(np.diag(lower)).sum() + prior)

    centre = np.log([*[4.0] * len(distances), 0.7, 0.3])  # 1 / length scale^2 per axis, scale, noise
    best = optimize.minimize(unlikeliness, centre, method="L-BFGS-B", bounds=[(c - 6, c + 6) for c in centre]).x
    lower, weights = factor(best)
    across = _kernel(asked, best)  # [A, N]
    left = linalg.solve_triangular(lower, across.T, lower=True)
    variance = math.exp(best[-2]) - (left**2).sum(axis=0)
    return mean + spread * (across @ weights), spread * np.sqrt(np.maximum(variance, JITTER))


def _kernel(distances: Array, logs: Array) -> Array:
    r = np.sqrt(5 * np.tensordot(np.exp(logs[:-2]), distances, 1))
    return np.asarray(math.exp(logs[-2]) * (1 + r + r**2 / 3) * np.exp(-r))

"""Do scores rank with effects? Small samples, exact where that is possible.

`spread_of`: whether units (layers, zones) differ at all. `correlations`: Spearman's, of each of many scores with one
effect. `smallest_seen`: what so few units could show. How they fit together: `scan_validity.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
DRAWS = 4000
"""Of a bootstrap, and of a permutation test that is not exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Whether units (layers, zones) differ from each other by more than chance.

    Example: Spread(units=8, seeds=5, f=0.8, p_f=0.6, p=0.61, sd_units=0.0, sd_seeds=0.02, reliability=0.0)
    """

    units: int
    seeds: int
    f: float
    p_f: float
    p: float
    """Of labels permuted within seeds, which needs no normal distribution."""
    sd_units: float
    """Of the units' own effects, chance taken off; 0 where nothing is left."""
    sd_seeds: float
    """Of one run's effect around its unit's."""
    reliability: float
    """Share of the variance of the units' means that is their own."""


def spread_of(table: Array, seed: int = 0) -> Spread:
    """Of effects [S seeds, U units]; two of each at least. A number that all units of a seed share cancels out. F is
    NaN where all are alike, which is no difference (p 1), and infinite where seeds do not differ."""
    seeds, units = table.shape
    centred = table - table.mean(axis=1, keepdims=True)
    between = seeds * float((centred.round(12).mean(axis=0) ** 2).sum()) / (units - 1)
    rest = (centred - centred.mean(axis=0)).round(12)
    within = float((rest**2).sum()) / ((units - 1) * (seeds - 1))
    shuffled = np.random.default_rng(seed).permuted(np.broadcast_to(centred, (DRAWS, seeds, units)).copy(), axis=2)
    by_chance = (shuffled.mean(axis=1) ** 2).sum(axis=1)  # [DRAWS]; grows as F does, whose total is fixed
    reached = int((by_chance >= float((centred.mean(axis=0) ** 2).sum()) * (1 - 1e-9)).sum())
    f = between / within if within else math.inf if between else math.nan
    return Spread(
        units=units,
        seeds=seeds,
        f=f,
        p_f=float(stats.f.sf(f, units - 1, (units - 1) * (seeds - 1))) if between else 1.0,
        p=(reached + 1) / (DRAWS + 1),
        sd_units=math.sqrt(max(0.0, between - within) / seeds),
        sd_seeds=math.sqrt(within),
        reliability=max(0.0, 1 - within / between) if between else 0.0,
    )


def _standard_ranks(values: Array) -> Array:
    """Of each row [..., n], with mean 0 and length 1, so that Spearman's rho is a scalar product; NaN where all are
    equal."""
    ranks = stats.rankdata(values, axis=-1)
    centred = ranks - ranks.mean(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.asarray(centred / np.sqrt((centred**2).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """Example: Correlation(score="deadzone@down", rho=-0.19, low=-0.64, high=0.33, p=0.66, p_corrected=1.0)"""

    score: str
    rho: float
    low: float
    high: float
    """95 % of the bootstrap over seeds."""
    p: float
    p_corrected: float
    """For all scores that were held against this effect."""


def correlations(scores: Mapping[str, Sequence[float]], effect: Array, draws: Array) -> list[Correlation]:
    """Of scores [n units each] with an effect [n] and its bootstrap draws [B, n]; scores that are the same everywhere
    have no ranks and are left out; of an effect that is the same everywhere there is nothing. n up to 8."""
    kinds = [kind for kind, values in scores.items() if len(set(values)) > 1]
    if not kinds or len(set(effect.tolist())) == 1:
        return []
    scored = _standard_ranks(np.array([scores[kind] for kind in kinds], dtype=float))  # [K, n]
    target = _standard_ranks(effect)
    rho = scored @ target  # [K]
    orders = np.array(list(permutations(range(len(effect)))))  # [n!, n]
    by_chance = np.abs(target[orders] @ scored.T)  # [n!, K]
    largest = by_chance.max(axis=1)
    with np.errstate(invalid="ignore"):
        drawn = _standard_ranks(draws) @ scored.T  # [B, K]
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    reached = np.abs(rho) - 1e-9
    return [
        Correlation(
            score=kind,
            rho=float(rho[i]),
            low=float(low[i]),
            high=float(high[i]),
            p=float((by_chance[:, i] >= reached[i]).mean()),
            p_corrected=float((largest >= reached[i]).mean()),
        )
        for i, kind in enumerate(kinds)
    ]


def smallest_seen(units: int, level: float = 0.05) -> float | None:
    """The smallest |rho| of so many units without ties that a two-sided exact test tells from 0; None: none."""
    ranks = _standard_ranks(np.arange(units, dtype=float))
    orders = np.array(list(permutations(range(units))))
    values = np.sort(np.abs(ranks[orders] @ ranks))
    for value in np.unique(values.round(9)):
        if float((values >= value - 1e-9).mean()) <= level:
            return float(value)
    return None


def smallest_seen_corrected(scores: Mapping[str, Sequence[float]], units: int, level: float = 0.05) -> float | None:
    """The same of the largest among these scores."""
    kinds = [values for values in scores.values() if len(set(values)) > 1]
    scored = _standard_ranks(np.array(kinds, dtype=float))
    orders = np.array(list(permutations(range(units))))
    largest = np.abs(_standard_ranks(np.arange(units, dtype=float))[orders] @ scored.T).max(axis=1)
    for value in np.unique(largest.round(9)):
        if float((largest >= value - 1e-9).mean()) <= level:
            return float(value)
    return None


def over_seeds(table: Array, seed: int = 0) -> Array:
    """Bootstrap draws [DRAWS, U] of the means of [S, U]: whole seeds are drawn, since their runs are paired."""
    chosen = np.random.default_rng(seed).integers(0, len(table), (DRAWS, len(table)))
    return np.asarray(table[chosen].mean(axis=1))

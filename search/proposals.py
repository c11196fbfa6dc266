"""Which configuration next: five methods, each a function of what is known.

A proposal depends on the space, on the results so far, on the sweep's seed and on how many configurations were proposed
before; on nothing else. So a sweep that was interrupted goes on as if nothing had happened, and there is no sampler
state to save, to lose or to unpickle. Each number of a configuration has its own seed (a stable hash), so a resumed
search never repeats the random draws of the first session. A method yields candidates, best first: the caller takes the
first that is valid and new.

Conditional spaces. Optuna's samplers model the dimensions that all trials have in common and draw the rest at random,
so they are given coordinates, which every configuration has (`search/coordinates.py`).

Collapses. The number of collapsed replicates is a constraint: c - 1/2 is told, violated when positive. The half is a
margin: a surrogate that has seen only 0 and 1 would otherwise call a configuration that never collapsed feasible with
probability 1/2. A configuration whose accuracy nobody knows (a collapse out of the plan) is told with the median of the
others: a Gaussian process fits its objective to infeasible trials too, and any other number would be an opinion; TPE
ranks a collapse by the constraint alone.

Non-finite values are not told at all: such a trial is failed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, product
from statistics import median
from typing import Any

import numpy as np
import optuna

from search.coordinates import Coordinate, Params, Point, coordinates, decode, encode
from search.evidence import Known
from search.objectives import objective
from search.smooth_gp import SmoothGP
from spaces.library import Float, Int, Space
from trainable.hashing import stable_hash

STARTUP = 5
"""Finished configurations before a model is asked; until then the points of `sobol`."""
GRID_LEVELS = 5
"""Values per numeric dimension of the grid, both ends included."""
_MODEL_DRAWS = 3  # a model that proposes what was run already is asked again this often; then chance decides
_RANDOM_DRAWS = 100
_CHUNK = 256


Proposer = Callable[[Known], Iterator[Params]]


def _from_unit(space: Space, unit: Sequence[float]) -> Params:
    """The configuration at a point of the unit cube, one number in [0, 1) per coordinate."""
    point: Point = {}
    for coordinate, u in zip(coordinates(space), unit, strict=True):
        labels = coordinate.labels
        point[coordinate.name] = labels[int(u * len(labels))] if labels else float(u)
    return decode(space, point)


# --- without a model --------------------------------------------------------------------------------------------------


def random(known: Known) -> Iterator[Params]:
    """Independent draws, each setting evenly over its range or options."""
    axes = len(coordinates(known.space))
    for attempt in range(_RANDOM_DRAWS):
        rng = np.random.default_rng(stable_hash("random", known.seed, known.number, attempt))
        yield _from_unit(known.space, rng.random(axes).tolist())


def sobol(known: Known) -> Iterator[Params]:
    """A scrambled Sobol sequence over all coordinates (Owen 1998): the next element that was not run yet."""
    engine = _sobol_engine(len(coordinates(known.space)), rng=stable_hash("qmc", known.seed))
    # Each configuration took at least one element, so what comes before is known to be used or useless.
    if known.number:
        engine.fast_forward(known.number)
    for _ in range(_RANDOM_DRAWS):
        yield _from_unit(known.space, engine.random(1)[0].tolist())


def _sobol_engine(axes: int, rng: int) -> Any:
    from scipy.stats import qmc

    return qmc.Sobol(axes, scramble=True, rng=rng)


def grid(known: Known) -> Iterator[Params]:
    """All combinations: five values of each number (all, where there are fewer), every option of each choice."""
    return islice(lattice(known.space, GRID_LEVELS), known.number, None)


def every(space: Space) -> Iterator[Params] | None:
    """All configurations of a finite space, in the order of `grid`; None for a space with a real number in it."""
    if any(isinstance(dimension.domain, Float) for dimension in space.dimensions):
        return None
    return lattice(space, None)


def lattice(space: Space, levels: int | None) -> Iterator[Params]:
    """Every combination once, in the order in which a Sobol sequence first comes by, so that any beginning is spread
    out over all pairs of dimensions; what the sequence has missed follows in plain order."""
    axes = coordinates(space)
    values: list[list[Any]] = [_levels(axis, levels) for axis in axes]
    engine = _sobol_engine(len(axes), rng=0)
    lengths = [len(of_axis) for of_axis in values]
    chunks = max(1, min(8 * math.prod(lengths), 2**16) // _CHUNK)
    units = (unit for _ in range(chunks) for unit in engine.random(_CHUNK))
    spread = ([int(u * n) for u, n in zip(unit, lengths, strict=True)] for unit in units)
    seen = set()
    for cell in chain(spread, product(*(range(n) for n in lengths))):
        params = decode(space, {axis.name: of_axis[i] for axis, of_axis, i in zip(axes, values, cell, strict=True)})
        identity = tuple(params.items())  # cells that differ where no dimension exists are one configuration
        if identity not in seen:
            seen.add(identity)
            yield params


def _levels(axis: Coordinate, levels: int | None) -> list[Any]:
    if axis.labels:
        return list(axis.labels)
    sizes = [d.domain.high - d.domain.low + 1 for d in axis.dimensions if isinstance(d.domain, Int)]
    if len(sizes) == len(axis.dimensions) and (levels is None or max(sizes) <= levels):
        return [(i + 0.5) / max(sizes) for i in range(max(sizes))]
    assert levels is not None, "a real number has no list of all its values"
    return [i / (levels - 1) for i in range(levels)]


# --- with a model -----------------------------------------------------------------------------------------------------


def gp(known: Known) -> Iterator[Params]:
    """Gaussian processes of the objectives and of the constraint; expected improvement times the probability to be
    feasible."""
    return _modelled(known, SmoothGP)


def tpe(known: Known) -> Iterator[Params]:
    """Tree-structured Parzen estimators, all coordinates jointly; constrained as in Optuna's c-TPE."""
    return _modelled(known, lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=0))


def _modelled(known: Known, sampler: Callable[[int], Any]) -> Iterator[Params]:
    if sum(told.state == "complete" for told in known.told) < STARTUP:
        yield from sobol(known)
        return
    distributions = _distributions(known)
    for attempt in range(_MODEL_DRAWS):
        study = optuna_study(known, sampler(stable_hash("model", known.seed, known.number, attempt) % 2**32))
        drawn = study.ask(distributions).params
        point = {axis.name: _from_optuna(axis, drawn[axis.name]) for axis in coordinates(known.space)}
        yield decode(known.space, point)
    yield from random(known)


# --- Optuna's words ---------------------------------------------------------------------------------------------------


def optuna_study(known: Known, sampler: Any = None) -> Any:
    """An Optuna study in memory that holds what is known: finished trials with their constraint, and the running
    ones."""
    # It announces each study, and that greenlet would make it quicker.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(),
        sampler=sampler,
        directions=[objective(name).direction for name in known.objectives],
    )
    distributions = _distributions(known)
    unknown = _medians(known)
    # A constraint that nothing has ever violated has nothing to teach.
    constrained = any(told.collapses for told in known.told) and "collapses" not in known.objectives
    for told in known.told:
        complete = told.state == "complete"
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE if complete else optuna.trial.TrialState.FAIL,
            values=(told.values or unknown) if complete else None,
            params=_optuna_params(known.space, told.params),
            distributions=distributions,
        )
        if complete and constrained:
            trial.set_constraint("collapses", told.collapses - 0.5)
        study.add_trial(trial)
    for params in known.running:
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=_optuna_params(known.space, params),
                distributions=distributions,
            )
        )
    return study


def _medians(known: Known) -> list[float]:
    seen = [told.values for told in known.told if told.state == "complete" and told.values is not None]
    return [median(of_objective) for of_objective in zip(*seen, strict=True)] if seen else [0.0] * len(known.objectives)


def _distributions(known: Known) -> dict[str, Any]:
    """One per coordinate; as wide as the space, and wider where a known result lies beyond it."""
    points = [encode(known.space, params) for params in (*(told.params for told in known.told), *known.running)]
    distributions: dict[str, Any] = {}
    for axis in coordinates(known.space):
        if axis.labels:
            distributions[axis.name] = optuna.distributions.CategoricalDistribution(axis.labels)
            continue
        low = min(0.0, *(point[axis.name] for point in points), 0.0)
        high = max(1.0, *(point[axis.name] for point in points), 1.0)
        size = _size(axis)
        distributions[axis.name] = (
            optuna.distributions.FloatDistribution(low, high)
            if size is None
            else optuna.distributions.IntDistribution(math.floor(low * size), math.ceil(high * size) - 1)
        )
    return distributions


def _size(axis: Coordinate) -> int | None:
    """Number of values of a single whole number; None for anything else."""
    domain = axis.dimensions[0].domain
    return domain.high - domain.low + 1 if isinstance(domain, Int) and len(axis.dimensions) == 1 else None


def _optuna_params(space: Space, params: Params) -> dict[str, Any]:
    point = encode(space, params)
    sizes = {axis.name: _size(axis) for axis in coordinates(space)}
    return {name: point[name] if size is None else math.floor(point[name] * size) for name, size in sizes.items()}


def _from_optuna(axis: Coordinate, value: Any) -> Any:
    size = _size(axis)
    return value if size is None else (value + 0.5) / size


# --- choices by name --------------------------------------------------------------------------------------------------

SEARCHERS: dict[str, Proposer] = {
    "gp": gp,
    "tpe": tpe,
    "random": random,
    "grid": grid,
    "qmc": sobol,
}

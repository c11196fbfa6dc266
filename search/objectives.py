"""What a configuration is judged by: one number per objective, from the outcomes of its replicates.

Two lessons of earlier sweeps are built in. One seed per configuration is an anecdote: a configuration counts once, when
all its replicates are in, by the median accuracy (or pass@k, where answers were sampled). And a collapse is knowledge:
a violated constraint (the number of collapsed replicates), so that one collapse among three is not averaged away and
the searcher learns where not to look. A failed run (a bug, the machine, an accuracy that is not a number) teaches
nothing and is told as failed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Literal

from search.arms import Arm, measured
from search.coordinates import Params
from trainable.outcome import Outcome
from trainable.pass_at_k import k_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a finished configuration came to.

    Example: Told(params={"noise.num_stages": 4}, state="complete", values=(0.74,), collapses=0)
    """

    params: Params
    state: Literal["complete", "failed"]
    values: tuple[float, ...] | None = None
    """One per objective; None = nobody knows."""
    collapses: int = 0
    """Replicates that collapsed; the constraint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A number that a configuration is judged by."""

    direction: Literal["maximize", "minimize"]
    value: Callable[[Sequence[Outcome], float], float]
    """(outcomes of the replicates that ended, share of collapsed replicates) -> the number."""


def told(arm: Arm, objectives: Sequence[str], replicates: int) -> Told | None:
    """What a searcher is told about an arm; None while replicates are missing.

    A collapse counts whatever happened to the other replicates. Without one, a failed replicate, an accuracy that is
    not finite or a pass@k that was not sampled makes the arm failed.
    """
    if any(replicate not in arm.results and replicate not in arm.failed for replicate in range(replicates)):
        return None
    ended = [arm.results[replicate] for replicate in range(replicates) if replicate in arm.results]
    finite = [run for run in ended if all(measured(run, name) for name in ("accuracy", *filter(k_of, objectives)))]
    collapses = sum(result.collapsed for result in ended)
    if not collapses and len(finite) < replicates:
        return Told(params=arm.params, state="failed")
    values = tuple(objective(name).value(finite, collapses / replicates) for name in objectives) if finite else None
    return Told(params=arm.params, state="complete", values=values, collapses=collapses)


def objective(name: str) -> Objective:
    """Of `OBJECTIVES`, or pass@k: the median of what all runs have sampled."""

    def passed(runs: Sequence[Outcome], share: float) -> float:
        return median(seen.share for run in runs if (seen := measured(run, name)) is not None)

    return Objective(direction="maximize", value=passed) if k_of(name) else OBJECTIVES[name]


def told_in_full(arm: Arm, objectives: Sequence[str], replicates: int | None) -> Told | None:
    """Of an arm with all its outcomes; None for another. `replicates`: None = as many as it has, at least one."""
    count = len(arm.results) if replicates is None else replicates
    return told(arm, objectives, count) if 0 < count == len(arm.results) else None


def told_by_run(arm: Arm, objectives: Sequence[str]) -> list[Told]:
    """Each run that is over, so that a model knows how many there are and how far apart they lie."""
    over = sorted(arm.results.keys() | arm.failed)
    alone = [
        replace(arm, results={0: arm.results[n]}) if n in arm.results else replace(arm, results={}, failed={0})
        for n in over
    ]
    return [result for one in alone if (result := told(one, objectives, 1)) is not None]


def pareto_front(arms: Sequence[Arm], objectives: Sequence[str], replicates: int | None) -> list[Arm]:
    """The arms that no other arm beats in one objective without losing in another, in their order.

    `replicates`: of every arm; None = as many as each has. Arms that lack an outcome of any are left out; so are those
    with a collapse, unless collapses are an objective themselves.
    """
    judged = []
    for arm in arms:
        result = told_in_full(arm, objectives, replicates)
        if result is None or result.values is None or (result.collapses and "collapses" not in objectives):
            continue
        signs = [-1 if objective(name).direction == "maximize" else 1 for name in objectives]
        judged.append((arm, [sign * value for sign, value in zip(signs, result.values, strict=True)]))

    def beaten(costs: list[float]) -> bool:
        return any(all(a <= b for a, b in zip(other, costs, strict=True)) and other != costs for _, other in judged)

    return [arm for arm, costs in judged if not beaten(costs)]


OBJECTIVES: dict[str, Objective] = {
    "accuracy": Objective(direction="maximize", value=lambda runs, share: median(run.eval.accuracy for run in runs)),
    "collapses": Objective(direction="minimize", value=lambda runs, share: share),
    "hours": Objective(direction="minimize", value=lambda runs, share: fmean(run.seconds / 3600 for run in runs)),
}

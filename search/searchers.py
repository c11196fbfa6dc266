"""Who proposes the next configuration, and what it is told about the last.

The space is translated to Optuna's words here and nowhere else, define-by-run, so that a dimension may depend on another. Fixed
arms come first: the control is always configuration 0, then the points that were asked for, then the sampler's own.

Two lessons of earlier sweeps are built in. One seed per configuration is an anecdote: each configuration is run once per
replicate, with the same seeds in every arm, and the sampler is told once, when all replicates are in: the median accuracy. And
a collapse is knowledge: it is told as a violated constraint (the number of collapsed replicates), so that one collapse among
three is not averaged away and the sampler learns where not to look; only a failed run (a bug, the machine) is told as failed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from spaces.config import ConfigError
from spaces.library import Choice, Dimension, Float, Space
from spaces.reading import as_tree, merge, read_config, unflatten

if TYPE_CHECKING:
    import optuna

METRIC = "accuracy"
_REDRAWS = 100  # of configurations that contradict themselves, before the space is called unusable


@dataclass(slots=True, kw_only=True)
class Arm:
    """One configuration and what its replicates came to."""

    name: str
    origin: str
    """control | point | searcher"""
    tree: Mapping[str, Any]
    """Settings without a seed."""
    optuna_trial: Any = None
    """What Optuna is told about; None for fixed arms."""
    results: dict[int, Mapping[str, Any] | None] = field(default_factory=dict)
    """Last Tune result per replicate; None = failed."""


class RinSearch(OptunaSearch):  # type: ignore[misc]
    """Hands out arms x replicates. Its suggestion is {"config", "arm", "replicate", "origin"}."""

    def __init__(
        self,
        *,
        space: Space,
        base: Mapping[str, Any],
        fixed: list[Arm],
        configurations: int,
        replicates: int,
        seed: int,
        sampler: "optuna.samplers.BaseSampler",
        storage: "optuna.storages.BaseStorage",
        study_name: str,
    ) -> None:
        """`base` is the tree of workload, space and overrides; `configurations` counts the fixed arms."""
        self.rin_space = space
        self.base = base
        self.fixed = list(fixed)
        self.configurations = configurations
        self.replicates = replicates
        self.first_seed = seed
        self.arms: list[Arm] = []
        self.waiting: list[tuple[Arm, int]] = []
        self.running: dict[str, tuple[Arm, int]] = {}
        # OptunaSearch wants the space as a function; the sampler's own seed is set by SEARCHERS.
        super().__init__(space=self._draw, metric=METRIC, mode="max", sampler=sampler, storage=storage, study_name=study_name)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if not self.waiting:
            if len(self.arms) >= self.configurations:
                finished: str = Searcher.FINISHED
                return finished
            arm = self._next_arm()
            self.arms.append(arm)
            self.waiting = [(arm, replicate) for replicate in range(self.replicates)]
        arm, replicate = self.waiting.pop(0)
        self.running[trial_id] = (arm, replicate)
        config = read_config(merge(arm.tree, {"seed": self.first_seed + replicate}))
        return {"config": as_tree(config), "arm": arm.name, "replicate": replicate, "origin": arm.origin}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Intermediate accuracies are measured under different noise; the sampler hears of the end alone."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        arm, replicate = self.running.pop(trial_id)
        arm.results[replicate] = None if error or not result or "outcome" not in result else result
        if len(arm.results) == self.replicates and arm.optuna_trial is not None:
            self._tell(arm)

    def _next_arm(self) -> Arm:
        if len(self.arms) < len(self.fixed):
            return self.fixed[len(self.arms)]
        problem = ""
        for _ in range(_REDRAWS):
            trial = self._ot_study.ask()
            tree = merge(self.base, unflatten(self._draw(trial)))
            try:
                read_config(tree, origin=f"space {self.rin_space.name}")
            except ConfigError as error:
                # Two ranges that overlap the wrong way (sigma_end above sigma_start): not a finding, draw again.
                problem = str(error)
                self._ot_study.tell(trial, state=TrialState.FAIL)
                continue
            return Arm(name=f"c{len(self.arms):02d}", origin="searcher", tree=tree, optuna_trial=trial)
        raise ConfigError(f"space {self.rin_space.name}: {_REDRAWS} draws in a row contradict themselves; the last: {problem}")

    def _tell(self, arm: Arm) -> None:
        finished = [result for result in arm.results.values() if result is not None]
        accuracies = [float(result["outcome"]["eval"]["accuracy"]) for result in finished]
        if len(finished) < self.replicates or not all(math.isfinite(a) for a in accuracies):
            self._ot_study.tell(arm.optuna_trial, state=TrialState.FAIL)
            return
        collapses = sum(result["outcome"]["outcome"] == "collapsed" for result in finished)
        arm.optuna_trial.set_constraint("collapses", float(collapses))
        self._ot_study.tell(arm.optuna_trial, median(accuracies))

    def _draw(self, trial: "optuna.Trial") -> dict[str, Any]:
        """Dotted settings of one configuration; dimensions whose condition does not hold are left out."""
        drawn: dict[str, Any] = {}
        labels: dict[str, str] = {}
        for dimension in self.rin_space.dimensions:
            when = dimension.when
            if when is not None and labels.get(when.parent) != when.value:
                continue
            drawn[dimension.key] = _suggest(trial, dimension, labels)
        return drawn


def _suggest(trial: "optuna.Trial", dimension: Dimension, labels: dict[str, str]) -> Any:
    domain = dimension.domain
    if isinstance(domain, Choice):
        label = trial.suggest_categorical(dimension.name, tuple(domain.options))
        labels[dimension.key] = label
        return domain.options[label]
    if isinstance(domain, Float):
        return trial.suggest_float(dimension.name, domain.low, domain.high, log=domain.log)
    return trial.suggest_int(dimension.name, domain.low, domain.high)


def _gp(seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=5)


def _tpe(seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)


def _random(seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)


SEARCHERS: dict[str, Callable[[int], "optuna.samplers.BaseSampler"]] = {
    "gp": _gp,
    "tpe": _tpe,
    "random": _random,
}

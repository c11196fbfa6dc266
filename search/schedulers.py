"""Who may stop a trial early because others are better, and when that is right. By default nobody.

The danger is known from the recorded runs of the plan's programme: noise on RMSNorm led at step 20 (70.2 against 60.7 %) and lost at
step 29 (66.0 against 71.4 %). A rung at step 20 would have thrown away the winner. Sigma decays in stages; while arms stand at
different points of different schedules, their order says who is noisier now, not who will be better. So a rung is allowed only

- where every configuration of the space has entered its last stage: nothing about its noise changes any more; and
- where that last noise is the same in all of them: the same sigma in the same weights. From there to the end all arms train under
  equal conditions, and what differs between them is in their weights already; and
- at a step that evaluates: `eval/accuracy` is measured with clean weights, on the same questions.

A space that searches training settings alone (learning rate, temperature, scale rule) without noise, or with constant noise, has
rungs from its first evaluation on. A space that searches `noise.sigma_end` or `noise.modules` has none, and the guard says so
before anything runs. With the default decay (ten stages, 29 steps) the last stage begins after step 26: little is left to save.

A configuration is judged once all its replicates have reported at a rung, by their median, against the other configurations
that got there; then all its replicates stop, each at its next evaluation. Controls and points are neither stopped nor ranked: every
other arm is paired with them. A stopped configuration is told to the searcher as pruned, never as complete. An accuracy that is
not finite is not ranked. What a rung has seen is not kept over `rin resume`, so a resumed sweep stops later rather than wrongly.

Left out: PBT and PB2. Both copy one trial's weights into another and change its settings under way. A member of such a population is
no configuration: its accuracy belongs to the path that it took through several, so no arm stands for it, it has no control that
shares its path, the configuration in `best.yaml` would not give its numbers again, and its numbers would hang on which trial
reported first, which no resumed sweep repeats. Replicates are worse: a copy crosses seeds and ends the pairing. Tune itself refuses
both beside any search algorithm, for the same reason. A decay of the learning rate or of the temperature can be had honestly: as a
dimension of a space.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.proposals import GRID_LEVELS, lattice, settings_of
from spaces.config import ConfigError, TrialConfig
from spaces.library import Space
from spaces.reading import merge, read_config, unflatten
from trainable.noise import sigma_at, stage_at

ETA = 3
"""ASHA keeps about one in ETA configurations at each rung, and its rungs lie a factor ETA apart."""
MEDIAN_PEERS = 3
"""Other configurations at a rung before the median rule stops any."""

Rule = Callable[[Sequence[float], Sequence[Sequence[float]]], bool]
"""(accuracies of a configuration at the rungs so far, the same of the others that reached its last rung) -> stop it."""


# --- the guard ---------------------------------------------------------------------------------------------------------------


def rungs(space: Space, base: Mapping[str, Any], name: str = "asha") -> tuple[int, ...]:
    """Numbers of steps done at which configurations of this space may be ranked, ascending; never empty.

    `base` is the tree under every configuration. Raises ConfigError with the reason where there is none.
    """
    refuse = f"--scheduler {name}"
    moved = [d.key for d in space.dimensions if d.key == "grpo.steps" or d.key.startswith(("eval.", "task."))]
    if moved:
        raise ConfigError(f"{refuse}: {moved[0]} is searched, so equal steps are not comparable; use --scheduler none")
    config = read_config(base)
    steps, every = config.grpo.steps, config.eval.every
    if not every or every >= steps:
        raise ConfigError(f"{refuse}: eval.every={every} evaluates at the end only; set eval.every below grpo.steps={steps}")
    first = _settled(space, base, refuse)
    evaluated = tuple(range(every * -(-first // every), steps, every))
    if not evaluated:
        remedy = f"set eval.every={first} or use --scheduler none" if first < steps else "use --scheduler none"
        raise ConfigError(
            f"{refuse}: noise still changes until step {first} of {steps} and eval.every={every} evaluates before it alone, where leaders "
            f"can still change places (they did between steps 20 and 29 of the recorded runs); {remedy}"
        )
    return evaluated


def _settled(space: Space, base: Mapping[str, Any], refuse: str) -> int:
    """Steps done when every configuration has made a step of its last stage. Raises ConfigError where that stage's noise differs
    between configurations."""
    first, reference = 1, None
    for config in _noise_variants(space, base):
        reference = reference or config
        first = max(first, _last_stage_begins(config))
        last = config.grpo.steps - 1  # noise is constant within the stage
        if _noise_at(config, last) != _noise_at(reference, last):
            raise ConfigError(
                f"{refuse}: configurations stand at different noise even in their last stage (from {_describe(reference)} to "
                f"{_describe(config)}), so their order before the end says nothing; use --scheduler none"
            )
    return first


def _noise_variants(space: Space, base: Mapping[str, Any]) -> Iterator[TrialConfig]:
    """What the space's noise can be: ends and middles of numbers, every option, the rest of the settings as in `base`."""
    noisy = {d.key for d in space.dimensions if d.key.startswith("noise.")}
    noisy |= {d.when.parent for d in space.dimensions if d.key in noisy and d.when is not None}
    kept = tuple(d for d in space.dimensions if d.key in noisy)
    if not kept:
        yield read_config(base)
        return
    part = space.model_copy(update={"dimensions": kept})
    for params in lattice(part, GRID_LEVELS):
        try:
            yield read_config(merge(base, unflatten(settings_of(part, params))))
        except ConfigError:
            continue  # ranges that contradict each other here: never drawn


def _last_stage_begins(config: TrialConfig) -> int:
    """Steps done when the first step of the last stage that this run reaches is made; 1 where noise never changes."""
    steps, noise = config.grpo.steps, config.noise
    if noise.sigma_start == 0:
        return 1
    last = stage_at(noise, steps - 1, steps)
    return 1 + next(step for step in range(steps) if stage_at(noise, step, steps) == last)


def _noise_at(config: TrialConfig, step: int) -> tuple[Any, ...]:
    """Noise at a step, such that equal tuples mean equal noise; numbers within rounding."""
    noise, steps = config.noise, config.grpo.steps
    if noise.sigma_start == 0:
        return ()
    pairs = [(noise.sigma_start, noise.sigma_end), *((zone.sigma_start, zone.sigma_end) for zone in noise.zones)]
    sigmas = tuple(
        float(f"{sigma_at(noise.model_copy(update={'sigma_start': start, 'sigma_end': end}), step, steps):.9g}") for start, end in pairs
    )
    if not any(sigmas):
        return ()
    where = (tuple(sorted(noise.modules)), noise.final_norm, noise.layers, noise.layer_multipliers, tuple(z.zone for z in noise.zones))
    return (sigmas, *where, noise.scale, noise.placement)


def _describe(config: TrialConfig) -> str:
    sigma = sigma_at(config.noise, config.grpo.steps - 1, config.grpo.steps)
    return f"sigma {sigma:.3g} on {'+'.join(config.noise.modules)} of layers {config.noise.layers}" if sigma else "no noise"


# --- the rules ---------------------------------------------------------------------------------------------------------------


def halving(mine: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Asynchronous successive halving (arXiv 1810.05934): stop unless among the best 1 / ETA seen at this rung."""
    if not others:
        return False
    return bool(mine[-1] < np.percentile([of_other[-1] for of_other in others], (1 - 1 / ETA) * 100))


def below_median(mine: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Vizier's median rule: stop when the best so far is below the median of the others' running means."""
    return len(others) >= MEDIAN_PEERS and max(mine) < median(fmean(of_other) for of_other in others)


class StopWeak(FIFOScheduler):  # type: ignore[misc]
    """Stops configurations, not trials; at rungs alone."""

    def __init__(self, *, rungs: Sequence[int], replicates: int, rule: Rule) -> None:
        super().__init__()
        self._rungs = tuple(rungs)
        self._replicates = replicates
        self._rule = rule
        self._seen: dict[int, dict[str, dict[int, float]]] = {rung: {} for rung in rungs}  # rung -> arm -> replicate -> accuracy
        self._stopped: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        proceed: str = TrialScheduler.CONTINUE
        stop: str = TrialScheduler.STOP
        arm, replicate = trial.config["arm"], trial.config["replicate"]
        if trial.config["origin"] != "searcher" or result.get("done") or "eval/accuracy" not in result:
            return proceed
        if arm in self._stopped:
            return stop
        rung, accuracy = int(result["rin/steps_done"]), float(result["eval/accuracy"])
        if rung not in self._seen or not math.isfinite(accuracy):
            return proceed
        self._seen[rung].setdefault(arm, {})[replicate] = accuracy
        if len(self._seen[rung][arm]) < self._replicates:
            return proceed
        others = [self._curve(other, rung) for other, seen in self._seen[rung].items() if other != arm and len(seen) == self._replicates]
        if not self._rule(self._curve(arm, rung), others):
            return proceed
        self._stopped.add(arm)
        return stop

    def _curve(self, arm: str, last: int) -> list[float]:
        """Medians over replicates at the rungs that all of them have reported, up to `last`."""
        reported = [self._seen[rung].get(arm, {}) for rung in self._rungs if rung <= last]
        return [median(seen.values()) for seen in reported if len(seen) == self._replicates]

    def debug_string(self) -> str:
        return f"rungs {self._rungs}: {len(self._stopped)} configurations stopped"


# --- choices by name ---------------------------------------------------------------------------------------------------------


def _none(space: Space, base: Mapping[str, Any], replicates: int = 1) -> Any:
    return FIFOScheduler()


def _asha(space: Space, base: Mapping[str, Any], replicates: int = 1) -> Any:
    spaced: list[int] = []
    for rung in rungs(space, base, "asha"):
        if not spaced or rung >= ETA * spaced[-1]:
            spaced.append(rung)
    return StopWeak(rungs=spaced, replicates=replicates, rule=halving)


def _median(space: Space, base: Mapping[str, Any], replicates: int = 1) -> Any:
    return StopWeak(rungs=rungs(space, base, "median"), replicates=replicates, rule=below_median)


SCHEDULERS: dict[str, Callable[..., Any]] = {
    "none": _none,
    "asha": _asha,
    "median": _median,
}
"""Each takes (space, base tree, replicates) and raises ConfigError where it cannot be right."""

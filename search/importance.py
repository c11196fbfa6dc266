"""Which dimension of a sweep mattered: importance per dimension over the trials of an Optuna study.

The question is PED-ANOVA's (Watanabe et al. 2023): where must a dimension be for a trial to be among the best? Left
out: fANOVA (Hutter et al. 2014), which asks how much of the variance of the result a dimension explains over its whole
range, and to which one that only breaks runs at one end matters more.

**Dimensions that exist in some trials only** (sigma of linear layers exists where noise goes into linear layers) are
assessed among those trials, beside the dimensions that all of them have. Each row names its number of trials; shares of
rows with different trials are not parts of one whole, and must not be added or ranked against each other.

**Chance.** Every dimension gets some importance from noise, a lot of it from few trials. So the results are dealt out
to the trials at random, 19 times, and the highest importance that the dimension then reaches is told as `chance`, on
the same scale: one without influence stays below it in 95 of 100 cases. With fewer than MIN_TRIALS trials there is no
number at all.

A sampler that learns looks closely where results are good. What is described are then the trials that were run, not
the whole space.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

MIN_TRIALS = 20
MIN_BEST = 5
"""PED-ANOVA describes the best tenth, but no fewer trials than these."""
DEALS = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Example: Importance(dimension="noise.sigma_start|linear", importance=0.81, chance=0.55, trials=34, of=60,
    note="")."""

    dimension: str
    importance: float | None
    """Share among the dimensions assessed on the same trials, 0 to 1; None where it cannot be said, and `note` tells
    why."""
    chance: float | None
    """What it would stay below without any influence, in 95 of 100 cases; 0 to 1."""
    trials: int
    """Complete trials in which the dimension exists."""
    of: int
    """Complete trials."""
    note: str = ""
    """Why there is no number; or that the dimension exists in some trials only."""


def importance(study: optuna.Study) -> tuple[Importance, ...]:
    """A row per dimension: those of all trials first, then conditional ones, each group by falling importance.

    Of a study with several objectives, for the first one. Complete trials with a finite value count; a failed one has
    none.
    """
    finished = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    trials = [trial for trial in finished if math.isfinite(trial.values[0])]
    ranges: dict[str, set[Any]] = defaultdict(set)
    members: dict[str, list[int]] = defaultdict(list)
    for place, trial in enumerate(trials):
        for name, domain in trial.distributions.items():
            ranges[name].add(domain)
            members[name].append(place)
    # Dimensions that exist in the same trials are assessed together, beside those that exist in more.
    together: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, places in members.items():
        together[tuple(places)].append(name)
    rows = []
    for group, names in together.items():
        chosen = [trials[place] for place in group]
        steady = [name for name in members if len(ranges[name]) == 1 and set(group) <= set(members[name])]
        shares: dict[str, float] = {}
        chance: dict[str, float] = {}
        reason = _reason([trial.values[0] for trial in chosen])
        if not reason and any(name in steady for name in names):
            shares, chance = _assess(study.directions[0], chosen, steady)
        for name in names:
            note = reason or ("" if name in steady else "not assessable: its range changed between trials")
            if not note and len(group) < len(trials):
                note = f"exists in {len(group)} of {len(trials)} trials; its share is among these"
            rows.append(
                Importance(
                    dimension=name,
                    importance=shares.get(name),
                    chance=chance.get(name),
                    trials=len(group),
                    of=len(trials),
                    note=note,
                )
            )
    return tuple(
        sorted(rows, key=lambda row: (row.trials < row.of, -row.trials, -(row.importance or 0.0), row.dimension))
    )


def _reason(values: Sequence[float]) -> str:
    if len(values) < MIN_TRIALS:
        return f"not assessable: too few trials ({len(values)} of at least {MIN_TRIALS})"
    return "not assessable: all trials had the same result" if min(values) == max(values) else ""


def _assess(
    direction: optuna.study.StudyDirection, trials: Sequence[optuna.trial.FrozenTrial], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of these dimensions in these trials, and the highest of each under DEALS random deals of the results, as a
    share of the same whole: among dealt results shares would say nothing, since they add up to 1 there too."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # and scikit-learn with it

    def raw(values: Sequence[float]) -> dict[str, float]:
        """Before it is made a share; from a study in memory that holds these trials and dimensions with these
        results."""
        part = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=0))
        for trial, value in zip(trials, values, strict=True):
            params = {name: trial.params[name] for name in names}
            distributions = {name: trial.distributions[name] for name in names}
            part.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
        evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, MIN_BEST / len(trials)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            found = get_param_importances(part, evaluator=evaluator, params=list(names), normalize=False)
        return {name: float(value) for name, value in found.items()}

    values = [trial.values[0] for trial in trials]
    rng = np.random.default_rng(0)
    found = raw(values)
    dealt = [raw(rng.permutation(values).tolist()) for _ in range(DEALS)]
    whole = sum(found.values()) or 1.0
    return (
        {name: value / whole for name, value in found.items()},
        {name: min(1.0, max(deal[name] for deal in dealt) / whole) for name in names},
    )

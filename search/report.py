"""Every arm of a study against its control: what was seen, how sure it is, what it cost, and what it would take to know more.

Read from the sweep's own files, so it needs no tracking server. Collapsed replicates count with the accuracy of their clean model at
the stop (intention to treat); replicates that failed or have not ended are missing, and said to be; a replicate that a scheduler stopped
has no accuracy at the end and is not compared. Several arms share one control, so verdicts and intervals are corrected for their
number (Holm, Bonferroni).

A sweep's report never says better or worse: arms were chosen and judged on the same questions, so one that stands out is `ahead`
or `behind` and the best one a `candidate`. Only a confirmation says more (`search/confirm.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from search.importance import Importance, importance
from search.journal import filter_policy, read_arms, unfinished
from search.ledger import Ledger, read_ledger
from search.searchers import Arm
from search.statistics import ArmComparison, Comparison, Replicate, adjust, compare_arms
from search.store import StudyConfig
from search.study import searcher_of
from search.tolerance import Boundary, NoisyRun, boundaries
from spaces.config import ConfigError, TrialConfig
from spaces.reading import read_config

MARGIN = 0.01
"""Accuracies within one point count as the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmReport:
    """One arm."""

    arm: str
    origin: str
    config: TrialConfig
    """Of replicate 0."""
    replicates: int
    """That have ended with an accuracy."""
    missing: int
    """Failed, stopped or still to run."""
    collapsed: int
    rules: tuple[str, ...]
    accuracy: float | None
    """Mean over replicates of the clean model's accuracy at the end or the stop."""
    start: float | None
    """Before training."""
    control: str
    """Name of the arm that it is compared with; empty for a control."""
    comparison: ArmComparison | None
    """As it stands alone; None for a control, and where no replicates can be compared."""
    corrected: Comparison | None
    """Of all replicates, corrected for the number of arms that share the study."""
    dose: float | None
    """Applied noise: rms change of the noised weights relative to their size, mean over noisy stages; None without noise."""
    hours: float
    candidate: bool

    @property
    def verdict(self) -> str:
        """One of `ahead`, `behind`, `same within ...`, `undecided, ...`; empty for a control."""
        return "" if self.corrected is None else screening_words(self.corrected)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyReport:
    """What a study says so far."""

    config: StudyConfig
    arms: tuple[ArmReport, ...]
    ledger: Ledger
    unfinished: int
    tolerance: tuple[Boundary, ...]
    """Where noise begins to break runs, per quantisation mode and module kind."""
    importance: tuple[Importance, ...]
    """What the searcher's settings mattered; empty for a study without a searcher."""

    @property
    def candidate(self) -> ArmReport | None:
        return next((arm for arm in self.arms if arm.candidate), None)

    @property
    def questions(self) -> int:
        return self.arms[0].config.eval.questions if self.arms else 0


def report_study(config: StudyConfig) -> StudyReport:
    """Raises ConfigError for files that are damaged."""
    arms = read_arms(config)
    ledger = read_ledger(config, arms)
    try:
        best: str | None = winner_of(config, arms)[0].name
    except ConfigError:
        best = None
    comparisons = {arm.name: comparison for arm in arms if (comparison := _against_control(config, arm, arms)) is not None}
    corrected = adjust({name: comparison.primary for name, comparison in comparisons.items()})
    rows = tuple(_row(config, arm, arms, comparisons.get(arm.name), corrected.get(arm.name), ledger, best) for arm in arms)
    return StudyReport(
        config=config,
        arms=rows,
        ledger=ledger,
        unfinished=unfinished(config, arms),
        tolerance=boundaries(noisy_runs(arms)),
        importance=importance(searcher_of(config, arms).study()) if config.kind == "sweep" else (),
    )


def replicates_of(config: StudyConfig, arm: Arm) -> list[Replicate]:
    """Those that ended by themselves, with the accuracy of their clean model at the end or at the stop."""
    return [
        Replicate(
            seed=config.seed + number,
            accuracy=float(outcome["eval"]["accuracy"]),
            collapsed=outcome["outcome"] == "collapsed",
            correct=tuple(bool(answer) for answer in outcome["eval"]["correct"]),
        )
        for number, outcome in sorted(arm.results.items())
        if outcome is not None and outcome["outcome"] in ("completed", "collapsed") and math.isfinite(outcome["eval"]["accuracy"])
    ]


def control_for(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The control with the arm's own filter policy, which alone moves an accuracy by points; else one with the same filter."""
    policy = filter_policy(arm.tree)
    controls = [(filter_policy(other.tree), other) for other in arms if other.origin == "control"]
    exact = [control for other, control in controls if other == policy]
    near = [control for other, control in controls if other[0] == policy[0]]
    return next(iter(exact + near), None)


def winner_of(config: StudyConfig, arms: Sequence[Arm], named: str | None = None) -> tuple[Arm, Arm]:
    """The arm with the highest median accuracy among those of which every replicate completed (or the one that is named), and its
    control.

    Controls themselves do not count. Raises ConfigError when no arm is left.
    """
    if named is not None and named not in [arm.name for arm in arms if arm.origin != "control"]:
        others = ", ".join(arm.name for arm in arms if arm.origin != "control") or "none"
        raise ConfigError(f"--arm {named}: no such arm in {config.name}; it has {others}")
    scores = {}
    for arm in arms:
        runs = replicates_of(config, arm)
        if arm.origin != "control" and len(runs) == config.replicates and not any(run.collapsed for run in runs):
            scores[arm.name] = median(run.accuracy for run in runs)
    if not scores and named is None:
        raise ConfigError(
            f"NAME={config.name}: no configuration with noise completed all its replicates, so there is no winner; "
            f"rin report {config.name} shows why (rin resume {config.name}, smaller sigmas)"
        )
    name = named or max(scores, key=lambda name: scores[name])
    best = next(arm for arm in arms if arm.name == name)
    control = control_for(best, arms)
    if control is None:
        raise ConfigError(
            f"NAME={config.name}: {best.name} has no control with grpo.filter_groups={filter_policy(best.tree)[0]}; name another arm: --arm"
        )
    return best, control


def screening_words(comparison: Comparison) -> str:
    """What a sweep may say: never better or worse."""
    return {"better": "ahead", "worse": "behind"}.get(comparison.verdict, comparison.words())


def dose_of(receipt: dict[str, Any]) -> float | None:
    """Applied noise over the size of the weights, mean over weights and noisy stages."""
    effects = receipt["effects"]
    return fmean(effect["applied_relative"] for effect in effects) if effects else None


def noisy_runs(arms: Sequence[Arm]) -> list[NoisyRun]:
    """Every replicate that ended by itself with one absolute sigma on all layers: other doses share no axis with it."""
    runs = []
    for arm in arms:
        config = read_config(arm.tree)
        noise = config.noise
        if noise.sigma_start == 0 or noise.scale != "absolute" or noise.zones or noise.layer_multipliers or noise.layers != "all":
            continue
        kind = "+".join(config.noise.modules)
        ended = [o for o in arm.results.values() if o is not None and o["outcome"] in ("completed", "collapsed")]
        runs += [
            NoisyRun(mode=config.quant.mode, kind=kind, sigma=config.noise.sigma_start, collapsed=outcome["outcome"] == "collapsed")
            for outcome in ended
        ]
    return runs


def _against_control(config: StudyConfig, arm: Arm, arms: Sequence[Arm]) -> ArmComparison | None:
    control = control_for(arm, arms)
    if arm.origin == "control" or control is None:
        return None
    treated, plain = replicates_of(config, arm), replicates_of(config, control)
    return compare_arms(treated, plain, margin=MARGIN) if treated and plain else None


def _row(
    config: StudyConfig,
    arm: Arm,
    arms: Sequence[Arm],
    comparison: ArmComparison | None,
    corrected: Comparison | None,
    ledger: Ledger,
    best: str | None,
) -> ArmReport:
    runs = replicates_of(config, arm)
    outcomes = [outcome for outcome in arm.results.values() if outcome is not None and "eval" in outcome]
    doses = [dose for outcome in outcomes if (dose := dose_of(outcome["receipt"])) is not None]
    control = control_for(arm, arms)
    return ArmReport(
        arm=arm.name,
        origin=arm.origin,
        config=read_config(arm.tree),
        replicates=len(runs),
        missing=config.replicates - len(runs),
        collapsed=sum(run.collapsed for run in runs),
        rules=tuple(sorted({outcome["rule"] for outcome in outcomes} - {""})),
        accuracy=fmean(run.accuracy for run in runs) if runs else None,
        start=fmean(outcome["eval"]["accuracy_start"] for outcome in outcomes) if outcomes else None,
        control="" if arm.origin == "control" or control is None else control.name,
        comparison=comparison,
        corrected=corrected,
        dose=fmean(doses) if doses else None,
        hours=ledger.arms.get(arm.name, 0.0),
        candidate=arm.name == best,
    )

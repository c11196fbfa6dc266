"""Rows of the figures that look into trials: learning curves, the anatomy of a collapse, the receipt as a picture.

Pure functions of runs, which are read once from the sweep's folder (`read_runs`). NaN rule: a number that is not finite
is None, a gap in its curve.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev

from dashboards.tables import finite
from search.arms import Arm, planned, trial_folder
from search.report import ArmReport, StudyReport
from search.store import StudyConfig
from spaces.naming import describe_noise
from spaces.schedules import sigma_at
from trainable.collapse_rules import RULES, drawn_limit
from trainable.disk.trial_folder import TrialState, read_reports
from trainable.metrics import (
    ALL_WRONG,
    ENTROPY,
    GIBBERISH,
    KEPT_GROUPS,
    LENGTH,
    METRICS,
    REWARD,
    ROLLOUT_KL,
    SIGMA,
)
from trainable.outcome import Sample, StepReport

AROUND = 12
"""Steps before the end that the anatomy of a collapse draws."""
SHOWN = (SIGMA, REWARD, ENTROPY, LENGTH, GIBBERISH, ALL_WRONG, KEPT_GROUPS, ROLLOUT_KL)
"""Signals that its table holds, besides that of the rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One trial, as its folder tells it."""

    arm: str
    replicate: int
    seed: int
    state: TrialState
    reports: Sequence[StepReport]

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.replicate}"

    @property
    def collapsed(self) -> bool:
        return self.state.status == "collapsed"


def read_runs(config: StudyConfig, arms: Sequence[Arm], report: StudyReport) -> tuple[Run, ...]:
    """Every trial that has begun, in order. Raises ConfigError for files that are damaged."""
    rows = {row.arm: row for row in report.arms}
    return tuple(
        Run(
            arm=arm.name,
            replicate=replicate,
            seed=config.seed_of(replicate),
            state=state,
            reports=read_reports(trial_folder(config, arm.name, replicate)),
        )
        for arm in arms
        for replicate, state in zip(planned(config, arm), rows[arm.name].trials, strict=True)
        if state.status != "waiting"
    )


# --- learning curves --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A seed. Example: Curve(name="c03/1", steps=(0, 1), values=(0.2, 0.25), ending="collapsed", rule="gibberish")."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]
    ending: str
    rule: str
    alarms: tuple[tuple[int, str], ...] = ()
    """Step and rule where one spoke that did not in the step before, and the trial went on (collapse.mode=monitor)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Steps of one sigma. Example: Stage(first=3, last=5, sigma=0.05)."""

    first: int
    last: int
    sigma: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePanel:
    """An arm with every seed, and its control behind it."""

    arm: str
    noise: str
    candidate: bool
    control: str
    seeds: tuple[Curve, ...]
    behind: tuple[Curve, ...]
    stages: tuple[Stage, ...]
    """Those with noise."""
    steps: int
    """That were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanPoint:
    """Over seeds, with its 95 % t interval. Example: MeanPoint(step=3, mean=0.25, low=0.2, high=0.3)."""

    step: int
    mean: float
    low: float
    high: float


def mean_curve(curves: Sequence[Curve]) -> tuple[MeanPoint, ...]:
    """In steps that every seed made, from the first on, with a number in each: what is left of an arm after one of its
    runs has collapsed is no mean of it. Empty below two seeds."""
    from scipy import stats

    found: list[MeanPoint] = []
    if len(curves) < 2:
        return ()
    by_step = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    for step in sorted(set.intersection(*map(set, by_step))):
        values = [value for seed in by_step if (value := seed[step]) is not None]
        if len(values) < len(curves):
            continue
        mean = fmean(values)
        half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
        found.append(MeanPoint(step=step, mean=mean, low=mean - half, high=mean + half))
    return tuple(found)


def curve_panels(report: StudyReport, runs: Sequence[Run], metric: str = REWARD) -> tuple[CurvePanel, ...]:
    """A panel per arm of which something ran: the candidate, then controls, then by how many seeds and how much noise
    it has."""
    by_arm: dict[str, list[Curve]] = defaultdict(list)
    for run in runs:
        if run.reports:
            by_arm[run.arm].append(_curve(run, metric))
    panels = [
        CurvePanel(
            arm=row.arm,
            noise=describe_noise(row.config),
            candidate=row.candidate,
            control=row.control,
            seeds=tuple(by_arm[row.arm]),
            behind=tuple(by_arm.get(row.control, ())),
            stages=stages_of(row),
            steps=row.config.grpo.steps,
        )
        for row in ordered(report.arms)
        if row.arm in by_arm
    ]
    return tuple(panels)


def ordered(rows: Sequence[ArmReport]) -> list[ArmReport]:
    """The candidate first, then controls, then the rest by falling difference; those without one last."""

    def place(row: ArmReport) -> tuple[int, float]:
        rank = 0 if row.candidate else 1 if row.origin == "control" else 2 if row.difference is not None else 3
        return rank, -(row.difference or 0.0)

    return sorted(rows, key=place)


def stages_of(row: ArmReport) -> tuple[Stage, ...]:
    steps = row.config.grpo.steps
    sigmas = [(step, sigma_at(row.config.noise, step, steps)) for step in range(steps)]
    found = []
    for sigma, group in groupby(sigmas, key=lambda pair: pair[1]):
        members = [step for step, _ in group]
        if sigma > 0:
            found.append(Stage(first=members[0], last=members[-1], sigma=sigma))
    return tuple(found)


def _curve(run: Run, metric: str) -> Curve:
    return Curve(
        name=f"{run.name} (seed {run.seed})",
        steps=tuple(report.step for report in run.reports),
        values=tuple(finite(report.signals.get(metric)) for report in run.reports),
        ending=run.state.status,
        rule=run.state.rule,
        alarms=_alarms(run),
    )


def _alarms(run: Run) -> tuple[tuple[int, str], ...]:
    went_on = run.reports[:-1] if run.collapsed else run.reports
    before = ("", *(report.verdict.rule for report in went_on))
    return tuple(
        (now.step, now.verdict.rule)
        for now, was in zip(went_on, before, strict=False)
        if now.verdict.rule not in ("", was)
    )


# --- the anatomy of a collapse ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One step around a collapse. Example: Moment(label="t - 1", step=3, signals={...}, samples=(...))."""

    label: str
    step: int
    signals: Mapping[str, float | None]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What a collapsed trial looked like where it broke."""

    name: str
    arm: str
    noise: str
    rule: str
    evidence: str
    signal: str
    """Tracked name of what the rule looks at; empty where none is known."""
    limit: float | None
    below: bool
    """Wrong below the limit."""
    first: int
    """t: the first step in which the rule held."""
    steps: tuple[int, ...]
    values: tuple[float | None, ...]
    """Of the signal, over the last steps."""
    moments: tuple[Moment, ...]
    """t - 1, t, t + 1, as far as there are such steps."""


def anatomies(report: StudyReport, runs: Sequence[Run]) -> tuple[Anatomy, ...]:
    """Of every trial that collapsed with steps to show, in order."""
    rows = {row.arm: row for row in report.arms}
    return tuple(_anatomy(rows[run.arm], run) for run in runs if run.collapsed and run.reports)


def _anatomy(row: ArmReport, run: Run) -> Anatomy:
    config, last = row.config, run.reports[-1]
    verdict = last.verdict
    rule = run.state.rule or verdict.rule
    signal, limit = signal_of(rule, verdict.evidence), drawn_limit(rule, verdict.evidence, config.collapse)
    if rule == "filter_rejection":
        limit = float(config.grpo.prompts)
    patience = config.collapse.patience if rule in RULES else 1
    first = max(last.step - patience + 1, run.reports[0].step)
    tail = run.reports[-AROUND:]
    near = {report.step: report for report in run.reports}
    moments = [
        Moment(
            label=label,
            step=step,
            signals={name: finite(near[step].signals.get(name)) for name in dict.fromkeys((*SHOWN, signal)) if name},
            samples=near[step].samples,
        )
        for label, step in (("t - 1", first - 1), ("t", first), ("t + 1", first + 1))
        if step in near
    ]
    return Anatomy(
        name=run.name,
        arm=run.arm,
        noise=describe_noise(config),
        rule=rule,
        evidence=verdict.evidence,
        signal=signal,
        limit=limit,
        below=rule == "filter_rejection" or (rule in RULES and RULES[rule].below),
        first=first,
        steps=tuple(report.step for report in tail),
        values=tuple(finite(report.signals.get(signal)) for report in tail),
        moments=tuple(moments),
    )


def signal_of(rule: str, evidence: str) -> str:
    """Tracked name of what a rule looks at: `nonfinite` says it in its evidence (`gen/entropy is nan`)."""
    if rule == "nonfinite":
        return evidence.partition(" is ")[0]
    if rule == "filter_rejection":
        return KEPT_GROUPS
    field = RULES[rule].signal if rule in RULES else ""
    tracked = (name for name in METRICS if name.split("/")[0] not in ("eval", "perf"))
    return next((name for name in tracked if name.split("/")[1] == field), "")


# --- the receipt ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedSigma:
    """One layer in one stage, mean over its weights and over seeds.

    Example: AppliedSigma(kind="linear", stage=1, layer=3, nominal=0.01, applied=0.0093)
    """

    kind: str
    stage: int
    layer: int
    nominal: float
    applied: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptPanel:
    arm: str
    kind: str
    noise: str
    candidate: bool
    cells: tuple[AppliedSigma, ...]
    """By stage, then layer."""


def receipt_panels(report: StudyReport) -> tuple[ReceiptPanel, ...]:
    """Of the candidate, and of the arm with the most replicates for each kind of module that it does not noise."""
    chosen: dict[str, ReceiptPanel] = {}
    by_size = sorted(report.arms, key=lambda row: (not row.candidate, -row.replicates))
    for row in by_size:
        grouped: dict[tuple[str, int, int], list[tuple[float, float]]] = defaultdict(list)
        for state in row.trials:
            for effect in state.outcome.receipt.effects if state.outcome is not None else ():
                if effect.layer is not None and finite(effect.applied) is not None:
                    grouped[effect.kind, effect.stage, effect.layer].append((effect.nominal, effect.applied))
        for kind in dict.fromkeys(kind for kind, _, _ in grouped):
            cells = tuple(
                AppliedSigma(kind=kind, stage=stage, layer=layer, nominal=_mean(pairs, 0), applied=_mean(pairs, 1))
                for (of, stage, layer), pairs in sorted(grouped.items())
                if of == kind
            )
            panel = ReceiptPanel(
                arm=row.arm, kind=kind, noise=describe_noise(row.config), candidate=row.candidate, cells=cells
            )
            chosen.setdefault(kind, panel)
    return tuple(chosen.values())


def _mean(pairs: Sequence[tuple[float, float]], place: int) -> float:
    return fmean(pair[place] for pair in pairs)

"""Every arm of a study against its control: what was seen, how sure it is, what it cost, and what it would take to know
more.

Read from the sweep's own files, so it needs no tracking server. Collapsed replicates count with the accuracy of their
clean model at the stop (intention to treat); replicates that failed or have not ended are missing, and said to be.
Several arms share one control, so verdicts and intervals are corrected for their number (Holm, Bonferroni); those of
pass@k for the number of k shown, too: no verdict hangs on which k one looks at. An arm that
is ahead is told with the collapse risk that its runs do not exclude (`search/finding.py`).

A sweep's report never says better or worse: arms were chosen and judged on the same questions, so one that stands out
is `ahead` or `behind` and the best one a `candidate`. Only a confirmation says more (`search/confirm.py`).

Controls are compared with one another, too, apart from the arms: what the precision, or the filter, does without noise
(W4A4 against bf16). Each is compared with the one before it that is most like it; all settings that differ are named.

An analysis that fails is a line in its place (`failed`): whoever asks for a report has hours of runs to read, and a
root that was not found must not hide them. Damaged files are still the user's to mend.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any, TypeVar

from search.arms import (
    Arm,
    Candidate,
    Origin,
    apart,
    candidate_of,
    control_for,
    measured,
    planned,
    read_arms,
    read_trials,
    replicates_of,
    unfinished,
)
from search.curves import CurvePoint, curve_of, sampled_in
from search.evidence import known_of, read_evidence
from search.finding import Finding, find, lowest_collapsed
from search.importance import Importance, importance
from search.ledger import Ledger, read_ledger
from search.proposals import optuna_study
from search.replicates import Replicate
from search.statistics import ArmComparison, Comparison, adjust, compare_arms
from search.store import StudyConfig, is_driven
from search.tolerance import Boundary, NoisyRun, boundaries
from spaces.config import TrialConfig
from spaces.errors import ConfigError, NoCandidate
from spaces.reading import as_tree, flatten
from trainable.disk.trial_folder import TrialState
from trainable.pass_at_k import shown

Row = TypeVar("Row")

MARGIN = 0.01
"""Accuracies within one point count as the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmReport:
    """One arm: a row of every table."""

    arm: str
    origin: Origin
    config: TrialConfig
    trials: tuple[TrialState, ...]
    """Where each replicate stands, in order."""
    measure: str
    """What arms are compared by: accuracy, or pass@k."""
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
    score: float | None
    """By the measure: the accuracy, or pass@k; mean over replicates."""
    score_start: float | None
    """Before training."""
    curve: tuple[CurvePoint, ...]
    """pass@k over k, where answers were sampled."""
    beside: Mapping[str, "Judged"]
    """pass@k against that of its control, by the name of the measure; corrected for arms and k."""
    warnings: tuple[str, ...]
    """Of the receipts of its trials, each once."""
    marks: Mapping[str, float]
    """Mean of each mark of the task, a share: the one that is the accuracy, and those that are only logged."""
    control: str
    """Name of the arm that it is compared with; empty for a control."""
    comparison: ArmComparison | None
    """As it stands alone; None for a control, and where no replicates can be compared."""
    corrected: Comparison | None
    """Of all replicates, corrected for the number of arms that share its control."""
    finding: Finding | None
    """Of these and the collapse risk together."""
    family: int
    """How many arms share its control."""
    dose: float | None
    """Applied noise: rms change of the noised weights relative to their size, mean over noisy stages; None without
    noise."""
    hours: float
    candidate: bool
    failed: str = ""
    """Why it could not be compared with its control."""

    @property
    def status(self) -> str:
        """`completed`, or `2 completed, 1 collapsed`; of replicates that have begun."""
        counts = Counter(trial.status for trial in self.trials if trial.status != "waiting") or {"waiting": 1}
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {word}" for word, n in counts.items())

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps done that occur among its replicates, ascending."""
        return tuple(sorted({trial.step for trial in self.trials if trial.status != "waiting"}))

    @property
    def difference(self) -> float | None:
        """To its control, a share: mean over common seeds; None where there is none."""
        return None if self.corrected is None or self.corrected.replicates == 0 else self.corrected.difference

    @property
    def verdict(self) -> str:
        """`ahead`, `behind`, `same within ...`, `ahead where it holds; ...`, `undecided, ...`; empty for a control."""
        return "" if self.finding is None else screening(self.finding.words())


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlsApart:
    """A control against another one: neither has noise.

    Example: ControlsApart(control="bf16", other="control", settings={"quant.weights": ("none", "mxfp4"), ...},
    comparison=Comparison(...))
    """

    control: str
    other: str
    settings: Mapping[str, tuple[Any, Any]]
    """In which they differ: key -> (here, of the other)."""
    comparison: Comparison
    """Over common seeds, corrected for the number of controls that are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyReport:
    """What a study says so far."""

    config: StudyConfig
    arms: tuple[ArmReport, ...]
    controls: tuple[ControlsApart, ...]
    """A sweep with one control has none."""
    ledger: Ledger
    unfinished: int
    tolerance: tuple[Boundary, ...]
    """Where noise begins to break runs, per quantisation mode and module kind."""
    importance: tuple[Importance, ...]
    """What the searcher's settings mattered; empty for a study without a searcher."""
    failed: tuple[str, ...] = ()
    """A line for each analysis that could not be made, which one and why."""

    @property
    def candidate(self) -> ArmReport | None:
        return next((arm for arm in self.arms if arm.candidate), None)

    @property
    def versions(self) -> list[Mapping[str, str]]:
        """That its trials ran with, each once; none where none was written down."""
        found: list[Mapping[str, str]] = []
        for attempt in (attempt for arm in self.arms for trial in arm.trials for attempt in trial.attempts):
            if attempt.versions and attempt.versions not in found:
                found.append(attempt.versions)
        return found


def report_study(config: StudyConfig, arms: Sequence[Arm] | None = None) -> StudyReport:
    """`arms`: where they have been read already. Raises ConfigError for files that are damaged."""
    arms = read_arms(config) if arms is None else arms
    ledger = read_ledger(config, arms)
    failed: list[str] = []
    noisy: dict[tuple[str, str], list[NoisyRun]] = defaultdict(list)
    for run in noisy_runs(arms):
        noisy[run.mode, run.kind].append(run)
    tolerance: list[Boundary] = []
    for (mode, kind), runs in sorted(noisy.items()):
        tolerance += _made(f"the boundary of {mode}, noise on {kind}", partial(boundaries, runs), failed)
    mattered: Sequence[Importance] = ()
    if config.kind == "sweep":
        known = known_of(config, arms, read_evidence(config), by_run=False)
        mattered = _made("the importance of dimensions", lambda: importance(optuna_study(known)), failed)
    rows = _rows(config, arms, ledger)
    return StudyReport(
        config=config,
        arms=rows,
        controls=tuple(_made("the controls among themselves", partial(_controls_apart, config, arms), failed)),
        ledger=ledger,
        unfinished=unfinished(config, arms),
        tolerance=tuple(tolerance),
        importance=tuple(mattered),
        failed=(*failed, *(row.failed for row in rows if row.failed)),
    )


def _made(what: str, analysis: Callable[[], Sequence[Row]], failed: list[str]) -> Sequence[Row]:
    """Its rows; where it fails none, and a line that says so."""
    try:
        return analysis()
    except ConfigError:
        raise
    except Exception as error:  # whatever an analysis cannot do, the rest of the report is there to be read
        failed.append(f"{what} could not be computed ({type(error).__name__}: {' '.join(str(error).split())})")
        return ()


def arm_reports(config: StudyConfig, arms: Sequence[Arm]) -> tuple[ArmReport, ...]:
    """A row per arm, in their order. Raises ConfigError for files that are damaged."""
    return _rows(config, arms, read_ledger(config, arms))


def _rows(config: StudyConfig, arms: Sequence[Arm], ledger: Ledger) -> tuple[ArmReport, ...]:
    best = None
    if config.kind != "confirm":  # which chooses nothing
        with suppress(NoCandidate):
            best = candidate_of(config, arms).arm.name
    controls = {arm.name: control_for(arm, arms) for arm in arms}
    failed: dict[str, list[str]] = defaultdict(list)
    judged = _judged(config, arms, controls, (config.measure,), failed)
    samples = sampled_in(arms)
    passes = _judged(config, arms, controls, tuple(f"pass@{k}" for k in shown(samples)), failed)
    driven = is_driven(config)

    def row(arm: Arm) -> ArmReport:
        beside = {measure: found for (name, measure), found in passes.items() if name == arm.name}
        own = judged.get((arm.name, config.measure))
        made = _row(config, arm, controls[arm.name], driven, own, ledger, best, curve_of(arm, samples), beside)
        return replace(made, failed="; ".join(failed[arm.name]))

    return tuple(map(row, arms))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """An arm against its control, alone and among those that share it."""

    alone: ArmComparison
    corrected: Comparison
    finding: Finding
    family: int


def _judged(
    config: StudyConfig,
    arms: Sequence[Arm],
    controls: Mapping[str, Arm | None],
    measures: Sequence[str],
    failed: Mapping[str, list[str]],
) -> dict[tuple[str, str], Judged]:
    """(arm, measure) -> against its control; those that share one are corrected together, over all the measures."""
    runs = {(arm.name, measure): replicates_of(config, arm, measure) for arm in arms for measure in measures}
    worth = {measure: lowest_collapsed(run for arm in arms for run in runs[arm.name, measure]) for measure in measures}
    found: dict[tuple[str, str], Judged] = {}
    for control in arms:
        family: dict[tuple[str, str], ArmComparison] = {}
        for arm, measure in product(arms, measures):
            if controls[arm.name] is control:
                what = f"{arm.name} against its control" + (f" by {measure}" if measure != config.measure else "")
                pair = runs[arm.name, measure], runs[control.name, measure]
                for comparison in _made(what, partial(_against, *pair), failed[arm.name]):
                    family[arm.name, measure] = comparison
        corrected = adjust({key: comparison.primary for key, comparison in family.items()})
        for (name, measure), alone in family.items():
            both = corrected[name, measure], runs[name, measure], runs[control.name, measure]
            finding = find(*both, collapsed_elsewhere=worth[measure], arms=len(family))
            found[name, measure] = Judged(alone=alone, corrected=both[0], finding=finding, family=len(family))
    return found


def leading(config: StudyConfig, arms: Sequence[Arm]) -> tuple[Candidate, Judged | None] | None:
    """The candidate so far, and how it stands among the arms that share its control; None where there is none."""
    try:
        candidate = candidate_of(config, arms)
    except NoCandidate:
        return None
    controls = {arm.name: control_for(arm, arms) for arm in arms}
    judged = _judged(config, arms, controls, (config.measure,), defaultdict(list))
    return candidate, judged.get((candidate.arm.name, config.measure))


def _controls_apart(config: StudyConfig, arms: Sequence[Arm]) -> list[ControlsApart]:
    """In the order in which they hang together, from the sweep's own on."""
    runs = {arm.name: replicates_of(config, arm) for arm in arms}
    left = [arm for arm in arms if arm.origin == "control" and runs[arm.name]]
    joined: list[Arm] = []
    pairs: list[tuple[Arm, Arm]] = []
    while left:
        if joined:
            pairs.append(min(product(left, joined), key=lambda pair: len(apart(pair[0].config, pair[1].config))))
        joined.append(pairs[-1][0] if pairs else left[0])
        left.remove(joined[-1])
    alone = {one.name: compare_arms(runs[one.name], runs[other.name], margin=MARGIN).primary for one, other in pairs}
    corrected = adjust(alone)
    return [
        ControlsApart(
            control=one.name, other=other.name, settings=_differing(one, other), comparison=corrected[one.name]
        )
        for one, other in pairs
    ]


def _differing(one: Arm, other: Arm) -> dict[str, tuple[Any, Any]]:
    here, there = flatten(as_tree(one.config)), flatten(as_tree(other.config))
    return {key: (here.get(key), there.get(key)) for key in sorted(apart(one.config, other.config))}


def screening(words: str) -> str:
    """What a sweep may say: never better or worse."""
    return words.replace("better", "ahead").replace("worse", "behind")


def noisy_runs(arms: Sequence[Arm]) -> list[NoisyRun]:
    """Every replicate that ended by itself with one absolute sigma on all layers: other doses share no axis with it."""
    runs = []
    for arm in arms:
        noise = arm.config.noise
        if (
            noise.sigma_start == 0
            or noise.scale != "absolute"
            or noise.zones
            or noise.layer_multipliers
            or noise.layers != "all"
        ):
            continue
        mode, kind = arm.config.quant.mode, "+".join(noise.modules)
        runs += [
            NoisyRun(mode=mode, kind=kind, sigma=noise.sigma_start, collapsed=outcome.collapsed)
            for outcome in arm.results.values()
        ]
    return runs


def _against(treated: Sequence[Replicate], plain: Sequence[Replicate]) -> tuple[ArmComparison, ...]:
    """One, or none where there is nothing to compare."""
    return (compare_arms(treated, plain, margin=MARGIN),) if treated and plain else ()


def _row(
    config: StudyConfig,
    arm: Arm,
    control: Arm | None,
    driven: bool,
    judged: Judged | None,
    ledger: Ledger,
    best: str | None,
    curve: tuple[CurvePoint, ...],
    beside: Mapping[str, Judged],
) -> ArmReport:
    runs = replicates_of(config, arm)
    greedy = replicates_of(config, arm, "accuracy")
    seen = [one for outcome in arm.results.values() if (one := measured(outcome, config.measure)) is not None]
    outcomes = list(arm.results.values())
    doses = [dose for outcome in outcomes if (dose := outcome.receipt.dose) is not None]
    return ArmReport(
        arm=arm.name,
        origin=arm.origin,
        config=arm.config,
        trials=tuple(read_trials(config, arm, driven=driven)),
        replicates=len(runs),
        missing=len(planned(config, arm)) - len(runs),
        collapsed=sum(run.collapsed for run in runs),
        rules=tuple(sorted({outcome.rule for outcome in outcomes} - {""})),
        measure=config.measure,
        accuracy=fmean(run.accuracy for run in greedy) if greedy else None,
        score=fmean(run.accuracy for run in runs) if runs else None,
        score_start=fmean(one.start for one in seen) if seen else None,
        curve=curve,
        beside=beside,
        start=fmean(outcome.eval.accuracy_start for outcome in outcomes) if outcomes else None,
        warnings=tuple(dict.fromkeys(warning for outcome in outcomes for warning in outcome.receipt.warnings)),
        marks={
            name: fmean(outcome.eval.parts[name] for outcome in outcomes if name in outcome.eval.parts)
            for name in dict.fromkeys(name for outcome in outcomes for name in outcome.eval.parts)
        },
        control="" if control is None else control.name,
        comparison=None if judged is None else judged.alone,
        corrected=None if judged is None else judged.corrected,
        finding=None if judged is None else judged.finding,
        family=0 if judged is None else judged.family,
        dose=fmean(doses) if doses else None,
        hours=ledger.arms.get(arm.name, 0.0),
        candidate=arm.name == best,
    )

"""What a programme's documents say: rows from the registered programme, its walk and the trials' own files.

    experiment   what was predicted, what ran, what came of it, what it was compared with, what followed
    hypothesis   the confidences beforehand, the probabilities now (`search/hypotheses.py`)
    rank         what remains, by the plan's order and by what is known now
    sigma        how much noise each precision stands (`search/tolerance.py`)

Nothing is judged anew: verdicts are those by which the programme decided, at its part of the level, and differences
beside them are means over the seeds that both arms have. What was not measured is None here, and `not measured` in the
documents (`dashboards/program_text.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median, pstdev
from typing import Any

from search.arms import Arm, paired_differences, read_arms, read_trials, trial_folder
from search.hypotheses import Alternative, Weighed, weigh
from search.improvement import Correlation, LayerChange, correlation
from search.program import Decision, End, Walk, ranked
from search.replicates import Replicate
from search.report import noisy_runs
from search.statistics import Comparison
from search.store import StudyConfig
from search.tolerance import Boundary, boundaries
from spaces.config import TrialConfig
from spaces.programme import BASE, CONTROL, Experiment, Programme
from spaces.workloads import WORKLOADS
from trainable.disk.trial_folder import TrialState, read_reports
from trainable.metrics import ACCURACY, GRAD_NORM, LOSS, REWARD
from trainable.outcome import StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One replicate of an experiment."""

    replicate: int
    seed: int
    state: TrialState
    accuracy: float | None
    """At its end or its stop; None while it has no outcome."""
    reports: tuple[StepReport, ...]

    @property
    def at(self) -> dict[int, float]:
        """Steps done -> accuracy, where it was evaluated on the way."""
        return {report.step + 1: report.signals[ACCURACY] for report in self.reports if ACCURACY in report.signals}


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """An experiment and what it is compared with, over the seeds of both. Example: Beside(name="control-resample",
    difference=-0.041, pairs=4)"""

    name: str
    difference: float
    """A share."""
    pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamics:
    """Of one signal, mean over replicates: at the first and the last step, and how it moved in between."""

    first: float
    last: float
    middle: float
    """Median over steps."""
    largest: float
    turns: float
    """Std of the change from step to step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentRow:
    name: str
    experiment: Experiment
    arm: str
    """Where it ran; empty where it did not."""
    control: str
    base: str
    """The winner that its settings lie over; empty without one."""
    config: TrialConfig | None
    why_not: str
    """Why it has not run; empty where it has."""
    trials: tuple[TrialRow, ...]
    collapsed: int
    rules: tuple[str, ...]
    start: float | None
    """Accuracy before training, a share."""
    at: Mapping[int, tuple[float, int]]
    """Steps done -> mean accuracy and replicates that were evaluated there."""
    end: float | None
    """Mean over replicates, collapsed ones with the accuracy at their stop."""
    judged: Comparison | None
    """By which the programme decides, against the control; None before the first look, and of one that collapsed."""
    beside_control: Beside | None
    beside_best: Beside | None
    """Of the experiments before it, the one that held and gained most on its control."""
    best_before: str
    beside: Mapping[str, Beside]
    """Every other experiment that has run, over the seeds of both."""
    dynamics: Mapping[str, Dynamics]
    """Reward, gradient norm, loss."""
    correlation: Correlation | None
    decision: Decision | None
    """What followed from it."""

    @property
    def reached(self) -> str:
        """The word for its gain on the control: excellent, good, minimum; empty where none was reached, or none is
        named."""
        if self.experiment.success is None or self.beside_control is None or self.collapsed:
            return ""
        gain, success = 100 * self.beside_control.difference, self.experiment.success
        words = {"excellent": success.excellent, "good": success.good, "minimum": success.minimum}
        return next((word for word, least in words.items() if gain >= least), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class HypothesisRow:
    name: str
    question: str
    says: Mapping[str, str]
    """Alternative -> what it says."""
    weighed: Weighed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """An experiment that has not run. Example: Rank(name="e13k-constant", priority=4, before=0.3, now=0.097, why_not=
    "skipped ...")"""

    name: str
    priority: int
    before: float | None
    """The plan's confidence."""
    now: float | None
    """Probability of the alternative that it speaks to; None where it speaks to none."""
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyReport:
    """A programme in one precision."""

    mode: str
    """Empty where the programme names the precision itself."""
    walk: Walk
    experiments: tuple[ExperimentRow, ...]
    """Those that ran in their order, then those that did not."""
    hypotheses: tuple[HypothesisRow, ...]
    ranks: tuple[Rank, ...]
    controls: Mapping[str, Correlation]
    """By name: what training without noise did to the errors of layers, where it was scanned."""

    @property
    def ran(self) -> tuple[ExperimentRow, ...]:
        return tuple(row for row in self.experiments if row.arm)

    @property
    def best(self) -> ExperimentRow | None:
        """Of those that held, the one with the largest mean gain on its control."""
        return _best(self.ran)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramReport:
    study: StudyConfig
    programme: Programme
    registered: str
    """The registration in words: when, its hash, what was changed in it. Example: `programme plan, registered ... as
    1f0c5e...`."""
    families: tuple[FamilyReport, ...]
    sigmas: tuple[Boundary, ...]
    hours: float
    """Of all trials, in trial-slot hours."""


def report_program(
    study: StudyConfig,
    programme: Programme,
    registered: str,
    walks: Mapping[str, Walk],
    changes: Mapping[str, Sequence[LayerChange]],
) -> ProgramReport:
    """`walks`: by mode, "" where there is one. `changes`: of an arm, what training did to the errors of its layers;
    arms that were not scanned are left out."""
    arms = {arm.name: arm for arm in read_arms(study)}
    return ProgramReport(
        study=study,
        programme=programme,
        registered=registered,
        families=tuple(_family(study, mode, walk, arms, changes) for mode, walk in walks.items()),
        sigmas=boundaries(noisy_runs(list(arms.values()))),
        hours=sum(state.hours for arm in arms.values() for state in read_trials(study, arm, driven=False)),
    )


def _family(
    study: StudyConfig,
    mode: str,
    walk: Walk,
    arms: Mapping[str, Arm],
    changes: Mapping[str, Sequence[LayerChange]],
) -> FamilyReport:
    rows: list[ExperimentRow] = []
    for name in [*walk.shown, *(name for name in walk.programme.experiments if name not in walk.shown)]:
        rows.append(_row(study, walk, arms, name, rows, changes))
    known_sd = WORKLOADS[study.workload].difference_sd
    hypotheses = tuple(_hypothesis(walk, name, known_sd) for name in walk.programme.hypotheses)
    return FamilyReport(
        mode=mode,
        walk=walk,
        experiments=tuple(rows),
        hypotheses=hypotheses,
        ranks=_ranks(walk, rows, hypotheses),
        controls={
            name: correlation(changes[name])
            for name in dict.fromkeys(row.control for row in rows if row.arm)
            if name in changes
        },
    )


def _row(
    study: StudyConfig,
    walk: Walk,
    arms: Mapping[str, Arm],
    name: str,
    before: Sequence[ExperimentRow],
    changes: Mapping[str, Sequence[LayerChange]],
) -> ExperimentRow:
    ran, entry = name in walk.shown, walk.entries.get(name)
    arm = arms.get(entry.arm) if ran and entry is not None else None
    runs = walk.runs(name) if ran else []
    trials = () if arm is None else _trials(study, arm, walk.shown[name])
    beside_control = _beside(entry.control, runs, walk.runs(CONTROL, beside=name)) if ran and entry else None
    best = _best(before)
    judged = walk.compare(name) if ran and not walk.collapsed(name) else None
    outcomes = [] if arm is None else [arm.results[trial.replicate] for trial in trials if trial.accuracy is not None]
    measured: dict[int, list[float]] = {}
    for trial in trials:
        for step, accuracy in trial.at.items():
            measured.setdefault(step, []).append(accuracy)
    return ExperimentRow(
        name=name,
        experiment=walk.programme.experiments[name],
        arm=arm.name if arm is not None else "",
        control=entry.control if ran and entry is not None else "",
        base=walk.bases.get(name, "") if ran else "",
        config=arm.config if arm is not None else None,
        why_not="" if arm is not None else _why_not(walk, name),
        trials=trials,
        collapsed=sum(run.collapsed for run in runs),
        rules=tuple(sorted({outcome.rule for outcome in outcomes} - {""})),
        start=fmean(outcome.eval.accuracy_start for outcome in outcomes) if outcomes else None,
        at={step: (fmean(values), len(values)) for step, values in sorted(measured.items())},
        end=fmean(run.accuracy for run in runs) if runs else None,
        judged=judged if judged is not None and judged.replicates else None,
        beside_control=beside_control,
        beside_best=_beside(best.name, runs, walk.runs(best.name)) if best is not None and runs else None,
        best_before=best.name if best is not None else "",
        beside={other: found for other in walk.shown if (found := _beside(other, runs, walk.runs(other))) is not None},
        dynamics=_dynamics(trials),
        correlation=correlation(changes[arm.name]) if arm is not None and arm.name in changes else None,
        decision=_decision(walk, name) if ran else None,
    )


def _trials(study: StudyConfig, arm: Arm, count: int) -> tuple[TrialRow, ...]:
    states = read_trials(study, arm, driven=False)
    rows = []
    for number, state in list(enumerate(states))[:count]:
        outcome = arm.results.get(number)
        rows.append(
            TrialRow(
                replicate=number,
                seed=study.seed_of(number),
                state=state,
                accuracy=None if outcome is None else outcome.eval.accuracy,
                reports=tuple(read_reports(trial_folder(study, arm.name, number))),
            )
        )
    return tuple(rows)


def _beside(name: str, treated: Sequence[Replicate], other: Sequence[Replicate]) -> Beside | None:
    differences = paired_differences(treated, other)
    return Beside(name=name, difference=fmean(differences), pairs=len(differences)) if differences else None


def _best(rows: Sequence[ExperimentRow]) -> ExperimentRow | None:
    gains = {row.name: row.beside_control.difference for row in rows if row.beside_control and not row.collapsed}
    return max((row for row in rows if row.name in gains), key=lambda row: gains[row.name], default=None)


def _dynamics(trials: Sequence[TrialRow]) -> dict[str, Dynamics]:
    found = {}
    for signal in (REWARD, GRAD_NORM, LOSS):
        curves = [[report.signals[signal] for report in trial.reports if signal in report.signals] for trial in trials]
        if curves := [curve for curve in curves if curve]:
            found[signal] = Dynamics(
                first=fmean(curve[0] for curve in curves),
                last=fmean(curve[-1] for curve in curves),
                middle=fmean(map(median, curves)),
                largest=max(map(max, curves)),
                turns=fmean(_turns(curve) for curve in curves),
            )
    return found


def _turns(curve: Sequence[float]) -> float:
    changes = [later - earlier for earlier, later in pairwise(curve)]
    return pstdev(changes) if changes else 0.0


def _decision(walk: Walk, name: str) -> Decision | None:
    """Of the phase in which it ran."""
    return next((made for made in walk.decisions if name in made.replicates), None)


def _why_not(walk: Walk, name: str) -> str:
    for made in walk.decisions:
        if name in made.skipped:
            return f"skipped after phase {made.phase}: {made.because}"
    phases = [phase.name for phase in walk.programme.phases_of(name)]
    if isinstance(walk.next, End):
        return f"phase {' or '.join(phases)} was not reached"
    return f"phase {' or '.join(phases)} has not been reached yet"


# --- hypotheses -------------------------------------------------------------------------------------------------------


def _hypothesis(walk: Walk, name: str, known_sd: float | None) -> HypothesisRow:
    hypothesis = walk.programme.hypotheses[name]
    alternatives, others = [], []
    for label, one in hypothesis.alternatives.items():
        better, than = _arms(walk, one.better, one.than)
        alternatives.append(Alternative(name=label, arm=better, confidence=one.confidence))
        others.append(than)
    named = {one.arm for one in alternatives}
    others = [other for other in dict.fromkeys(others) if other not in named]
    runs = _runs(walk, [*(one.arm for one in alternatives), *others])
    return HypothesisRow(
        name=name,
        question=hypothesis.question,
        says={label: one.says for label, one in hypothesis.alternatives.items()},
        weighed=_weighed(walk, alternatives, others, runs, known_sd),
    )


def _arms(walk: Walk, better: str, than: str) -> tuple[str, str]:
    """Experiments, and controls by their own names; `base` stays a word where there is none."""
    resolved = []
    for said, other in ((better, than), (than, better)):
        if said == BASE:
            resolved.append(walk.bases.get(other, BASE))
        elif said == CONTROL:
            resolved.append(walk.entries[other].control if other in walk.entries else CONTROL)
        else:
            resolved.append(said)
    return resolved[0], resolved[1]


def _runs(walk: Walk, names: Sequence[str]) -> dict[str, list[Replicate]]:
    """Of these, and of what else has run, each arm once: by it the run-to-run spread is known."""
    runs = {name: walk.runs(name) for name in names if name in walk.shown}
    seen = {walk.entries[name].arm for name in runs}
    for name in walk.shown:
        entry = walk.entries[name]
        if name not in runs and entry.arm not in seen:
            runs[name] = walk.runs(name)
        seen.add(entry.arm)
        held = walk.outcomes.get(entry.control, {})
        runs[entry.control] = [held[number] for number in sorted(held)]
    return runs


def _weighed(
    walk: Walk,
    alternatives: Sequence[Alternative],
    others: Sequence[str],
    runs: Mapping[str, Sequence[Replicate]],
    known_sd: float | None,
) -> Weighed:
    names = [*(one.arm for one in alternatives), *others]
    ran = [walk.entries[name].arm if name in walk.entries else name for name in names if runs.get(name)]
    if len(set(ran)) == len(ran):
        return weigh(alternatives, runs, others=others, known_sd=known_sd)
    why = f"not measured: {' and '.join(names)} are one configuration here"
    empty = weigh(alternatives, {name: own for name, own in runs.items() if name not in names}, others=others)
    beliefs = tuple(replace(belief, reason=why) for belief in empty.beliefs)
    return replace(empty, beliefs=beliefs, not_tested=why)


def _ranks(walk: Walk, rows: Sequence[ExperimentRow], hypotheses: Sequence[HypothesisRow]) -> tuple[Rank, ...]:
    """What has not run, by the plan's priority and then by what is believed now."""
    believed = {belief.name: belief.posterior for row in hypotheses for belief in row.weighed.beliefs}
    worth: dict[str, float] = {}
    for row in rows:
        if known := [believed[name] for name in row.experiment.tests if name in believed]:
            worth[row.name] = max(known)
    left = {row.name: row for row in rows if not row.arm}
    return tuple(
        Rank(
            name=name,
            priority=left[name].experiment.priority,
            before=left[name].experiment.confidence,
            now=worth.get(name),
            why_not=left[name].why_not,
        )
        for name in ranked(walk.programme, list(left), worth)
    )


def as_tree(report: ProgramReport) -> dict[str, Any]:
    """The numbers of the summary, for programs."""
    return {
        "name": report.study.name,
        "programme": report.programme.name,
        "registered": report.registered,
        "hours": report.hours,
        "families": [_family_tree(family) for family in report.families],
    }


def _family_tree(family: FamilyReport) -> dict[str, Any]:
    last = family.walk.next
    return {
        "mode": family.mode,
        "scenario": last.scenario if isinstance(last, End) else None,
        "ended": isinstance(last, End),
        "path": [
            {"phase": made.phase, "go": made.go, "because": made.because, "skipped": list(made.skipped)}
            for made in family.walk.decisions
        ],
        "experiments": {
            row.name: {
                "replicates": len(row.trials),
                "collapsed": row.collapsed,
                "accuracy": row.end,
                "difference": None if row.beside_control is None else row.beside_control.difference,
                "why_not": row.why_not,
            }
            for row in family.experiments
        },
        "hypotheses": {
            row.name: {
                belief.name: {"prior": belief.prior, "posterior": belief.posterior, "status": belief.status}
                for belief in row.weighed.beliefs
            }
            for row in family.hypotheses
        },
    }

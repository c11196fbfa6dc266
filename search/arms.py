"""The arms of a sweep, in its folder: what was decided, what came of it, which control each is compared with, and who
is ahead.

The folder is the truth. An arm is written before its first replicate runs, an outcome by the trial itself when it ends;
whatever was killed in between is found here by the next start: an arm without all its outcomes has runs to go, a trial
folder without an outcome has a checkpoint. MLflow is told all of it and is never asked.

One rule names the candidate, for the table at the end, `best.yaml`, status, report, export, confirmation and ablation
alike: among configurations with noise of which every replicate completed, the one with the most to expect of another
run, against its own control: the posterior mean of its accuracy times the probability that it holds
(`search/surrogate.py`). The highest difference seen would name the luckiest run, and one near the edge at which runs
break. Controls do not count, so that "the control is best" is said by a candidate whose difference is below zero.

The control of an arm is sigma = 0 on its own code path: the arm's configuration with the noise taken out
(`control_for`). The filter alone moves an accuracy by points, and so does the precision; what else a point changes may.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from search.replicates import Replicate
from search.store import StudyConfig
from spaces.config import ConfigError, Record, TrialConfig
from spaces.errors import NoCandidate
from spaces.reading import as_tree, flatten, merge, read_config, unflatten
from spaces.scans import RANKED, is_rule
from spaces.uses import idle, is_noisy, setting
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import PREFIXES, TrialState, read_outcome, read_trial
from trainable.outcome import Outcome
from trainable.pass_at_k import k_of, pass_at, per_question

Origin = Literal["control", "point", "searcher", "ablation", "winner"]

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Arm:
    """One configuration and what its replicates came to.

    Example: Arm(name="c03", origin="searcher", config=..., params={"noise.sigma_start": 0.011}, results={0:
    Outcome(...)})
    """

    name: str
    """control, a point's name, c07"""
    origin: Origin
    config: TrialConfig
    """Of every replicate; its seed means nothing, each replicate has the study's."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Dimension name -> drawn value, labels for choices; empty for fixed arms."""
    results: dict[int, Outcome] = field(default_factory=dict)
    """Replicate -> how it ended; one without an entry has not."""
    planned: int = 1
    """Replicates that were decided on so far, of a sweep that decides run by run; the others give each arm the same."""
    failed: set[int] = field(default_factory=set)
    """Replicates that this run of the sweep has given up; the next run tries them again."""

    @property
    def ran(self) -> TrialConfig:
        """Its configuration with the numbers that its trials took from a scan, once one of them has ended."""
        rules = [key for key in RANKED if is_rule(setting(self.config, key))]
        if not rules or not self.results:
            return self.config
        ran = next(iter(self.results.values())).config
        taken = {key: _plain(setting(ran, key)) for key in rules}
        return read_config(merge(as_tree(self.config), unflatten(taken)))


def as_ran(*arms: Arm) -> list[TrialConfig]:
    """What their trials ran, numbers alone; as they are written where one of them has not ended, so that what two of
    them follow stays one thing."""
    return [arm.ran if all(one.results for one in arms) else arm.config for arm in arms]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --- files ------------------------------------------------------------------------------------------------------------


def trial_folder(study: StudyConfig, arm: str, replicate: int) -> Folder:
    return study.folder / "trials" / f"{arm}-{replicate}"


def trial_config(study: StudyConfig, arm: Arm, replicate: int) -> TrialConfig:
    """What this replicate runs."""
    return arm.config.model_copy(update={"seed": study.seed_of(replicate)})


def planned(study: StudyConfig, arm: Arm) -> range:
    """Its replicates: those that have run, run, or are to run."""
    return range(study.each or arm.planned)


def write_arm(study: StudyConfig, number: int, arm: Arm) -> None:
    """The whole configuration, so that another version's defaults do not change what a resumed sweep runs."""
    config = as_tree(arm.config)
    del config["seed"]
    tree: dict[str, Any] = {"name": arm.name, "origin": arm.origin, "config": config, "params": dict(arm.params)}
    if study.total is not None:
        tree["planned"] = arm.planned
    (study.folder / "arms").write(f"{number:04d}.json", json.dumps(tree, indent=1))


def read_arms(study: StudyConfig) -> list[Arm]:
    """In their order, with the outcome of every trial that is over. Raises ConfigError for a damaged file."""
    folder = study.folder / "arms"
    arms = []
    for name in folder.names():
        arm = read_arm(folder, name)
        for replicate in planned(study, arm):
            outcome = read_outcome(trial_folder(study, arm.name, replicate))
            if outcome is not None:
                arm.results[replicate] = outcome
        _check_alike(arm)
        arms.append(arm)
    return arms


def read_arm(folder: Folder, name: str) -> Arm:
    """Of a file, without outcomes. Raises ConfigError where it is damaged."""
    try:
        tree = json.loads(folder.read(name) or b"")
        return Arm(
            name=tree["name"],
            origin=tree["origin"],
            config=read_config(tree["config"], origin=f"{folder.uri}/{name}"),
            params=tree["params"],
            planned=int(tree.get("planned", 1)),
        )
    except ConfigError:  # a ValueError, too: a configuration that this version does not take
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{folder.uri}/{name}: is damaged (not the JSON of an arm); restore it from a backup"
        ) from None


def _check_alike(arm: Arm) -> None:
    """Raises ConfigError for an arm whose replicates took other numbers from their scans: they are no replicates."""
    for key, rule in arm.config.rules.items():
        taken = {replicate: setting(outcome.config, key) for replicate, outcome in arm.results.items()}
        first = next(iter(taken.values()), None)
        for replicate, value in taken.items():
            if value != first:
                raise ConfigError(
                    f"{key}: arm {arm.name} follows a scan (by {rule.score}), and its replicates took {_plain(first)} "
                    f"and {_plain(value)}; remove trials/{arm.name}-{replicate} of the sweep, and rin resume runs it "
                    "again"
                )


def read_trials(study: StudyConfig, arm: Arm, *, driven: bool) -> list[TrialState]:
    """Where each replicate stands, in order; `driven`: a process runs the sweep now."""
    return [
        read_trial(trial_folder(study, arm.name, replicate), driven=driven, outcome=arm.results.get(replicate))
        for replicate in planned(study, arm)
    ]


def failures(study: StudyConfig, arms: Sequence[Arm]) -> list[str]:
    """A line for each trial that has failed, of a sweep that nobody runs."""
    return [
        f"{arm.name}/{replicate} failed: {trial.reason}"
        for arm in arms
        for replicate, trial in enumerate(read_trials(study, arm, driven=False))
        if trial.status == "failed"
    ]


def as_far_as_it_goes(study: StudyConfig) -> StudyConfig:
    """Of a sweep whose space came to its end: what was decided on is all there is."""
    arms = read_arms(study)
    runs = None if study.total is None else sum(len(planned(study, arm)) for arm in arms)
    return study.model_copy(update={"trials": len(arms), "total": runs})


def unfinished(study: StudyConfig, arms: Sequence[Arm]) -> int:
    """Runs that are still to be made, of arms that are known and of those to come; of a programme of those that are
    known, since what comes then hangs on them."""
    if study.kind == "program":
        return sum(len(planned(study, arm)) - len(arm.results) for arm in arms)
    return study.runs - sum(len(arm.results) for arm in arms)


def confirms(study: StudyConfig, sweep: StudyConfig) -> bool:
    """Whether it is a confirmation of this sweep, and not of another that had its name. An earlier version wrote no id
    of the sweep; where questions are endless, those that it asks have it."""
    if study.kind != "confirm":
        return False
    folder = study.folder / "arms"
    known = study.parent_id or next((read_arm(folder, name).config.eval.draw for name in folder.names()), "")
    return known in ("", sweep.id)


# --- who is compared with whom ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a trial came to, by greedy accuracy or by pass@k. Example: Measured(share=0.71, start=0.15, answers=(1, 0,
    ...))"""

    share: float
    """Of the clean model, at the end or at the stop."""
    start: float
    """Before training."""
    answers: tuple[float, ...]
    """The same question by question."""


def measured(outcome: Outcome, measure: str) -> Measured | None:
    """None where that was not measured: too few samples for pass@k, or an accuracy that is no number."""
    scores, k, samples = outcome.eval, k_of(measure), outcome.config.eval.samples
    if not math.isfinite(scores.accuracy):
        return None
    if k is None:
        return Measured(share=scores.accuracy, start=scores.accuracy_start, answers=scores.correct)
    if k > samples or not scores.right:
        return None
    shares = [pass_at(right, samples, k).share for right in (scores.right, scores.right_start)]
    return Measured(share=shares[0], start=shares[1], answers=per_question(scores.right, samples, k))


def replicates_of(study: StudyConfig, arm: Arm, measure: str = "") -> list[Replicate]:
    """Those with an outcome in which that was measured; by the study's own measure unless another is named."""
    return [
        Replicate(
            seed=study.seed_of(number), accuracy=seen.share, collapsed=outcome.collapsed, correct=tuple(seen.answers)
        )
        for number, outcome in sorted(arm.results.items())
        if (seen := measured(outcome, measure or study.measure)) is not None
    ]


def apart(one: TrialConfig, other: TrialConfig) -> set[str]:
    """Keys besides those of the noise in which two configurations run differently; seed and threads are the sweep's."""
    found = set()
    for part in set(TrialConfig.model_fields) - {"noise", "seed", "threads"}:
        here, there = getattr(one, part), getattr(other, part)
        if here != there:
            trees = [flatten({part: as_tree(side) if isinstance(side, Record) else side}) for side in (here, there)]
            found |= {key for key in trees[0].keys() | trees[1].keys() if trees[0].get(key) != trees[1].get(key)}
    if not found:  # as in most sweeps, and then nothing has to be asked
        return found
    return found - (idle(one) & idle(other))  # how often a filter resamples that is off in both


def control_for(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The control that differs from the arm in its noise alone, or, of a negative control, in what is learned from
    alone. None for a control, and where there is none.

    A configuration of the searcher may differ in what the space searches of training, too (a learning rate): that is
    part of what is tried, and ranges have no control for each value. Never in the filter, the reward and the
    quantisation; and never in what a point of the user's changes.
    """
    if arm.origin == "control":
        return None
    controls = [other for other in arms if other.origin == "control"]
    fitting = []
    for other in controls:
        keys = apart(arm.config, other.config) - ({"grpo.reward"} if is_negative(arm) else set())
        if not keys or (arm.origin != "point" and _differs_in_what_is_tried(keys, other, controls[0])):
            fitting.append((len(keys), other))
    return min(fitting, key=lambda found: found[0])[1] if fitting else None


def _differs_in_what_is_tried(keys: set[str], control: Arm, plain: Arm) -> bool:
    """Whether these keys hold nothing of the path, and nothing that the control has from a point of its own: it trains
    like the sweep's."""
    own = apart(control.config, plain.config)
    return not any(is_of_the_path(key) for key in keys) and all(is_of_the_path(key) for key in own)


def is_negative(arm: Arm) -> bool:
    """A negative control: a point without noise that is no control, because it learns from another reward. It is shown
    beside its control and is never the candidate."""
    return arm.origin == "point" and not is_noisy(arm.config)


def _nearest(arm: Arm, arms: Sequence[Arm]) -> list[str]:
    """Keys in which the control that is most like the arm differs from it."""
    found = [sorted(apart(arm.config, other.config)) for other in arms if other.origin == "control"]
    return min(found, key=len, default=[])


def is_of_the_path(key: str) -> bool:
    """Whether a control shares it whoever changes it: what noise does hangs on it."""
    return key in ("grpo.filter_groups", "grpo.reward") or key.startswith("quant.")


def paired_differences(treated: Sequence[Replicate], control: Sequence[Replicate]) -> list[float]:
    """Of accuracies, shares, over common seeds."""
    plain = {run.seed: run.accuracy for run in control}
    return [run.accuracy - plain[run.seed] for run in treated if run.seed in plain]


# --- who is ahead -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The arm that the study puts forward, or another one that was asked for."""

    study: StudyConfig
    arm: Arm
    control: Arm
    difference: float | None
    """Mean over common seeds, a share; None where the control has no outcome for any of them."""

    @property
    def caveat(self) -> str:
        """What must be known of its accuracy."""
        if self.study.kind == "confirm":
            return f"judged on questions that chose nothing: what that found says rin report {self.study.name}"
        return "a candidate is not a finding: it was chosen and judged on the same questions"

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Of the replicates that ended, in order."""
        return tuple(run.accuracy for run in replicates_of(self.study, self.arm))

    @property
    def control_accuracies(self) -> tuple[float, ...]:
        return tuple(run.accuracy for run in replicates_of(self.study, self.control))

    @property
    def config(self) -> TrialConfig:
        """Of its first replicate, as it ran: `rin trial --config` repeats that run."""
        ran = self.arm.results.get(0)
        first = self.study.seed_of(0)
        return ran.config if ran is not None else self.arm.ran.model_copy(update={"seed": first})


def candidate_of(study: StudyConfig, arms: Sequence[Arm], named: str | None = None) -> Candidate:
    """By the one rule (above), or the arm that is named, whatever became of it.

    Raises NoCandidate when no arm qualifies, ConfigError for a name that is no arm with noise, and for an arm without a
    control.
    """
    treated = {arm.name: arm for arm in arms if arm.origin != "control"}
    if named is not None and named not in treated:
        raise ConfigError(f"--arm {named}: no such arm in {study.name}; it has {', '.join(treated) or 'none'}")
    found = []
    for arm in [one for one in treated.values() if not is_negative(one)] if named is None else [treated[named]]:
        control = control_for(arm, arms)
        if control is None:
            if named is None:
                continue
            raise ConfigError(
                f"--arm {named}: has no control in {study.name}: what ran there without noise differs from it in "
                f"{', '.join(_nearest(arm, arms)) or 'everything'}, too; name another arm"
            )
        runs = replicates_of(study, arm)
        differences = paired_differences(runs, replicates_of(study, control))
        difference = fmean(differences) if differences else None
        held = not any(run.collapsed for run in runs)
        completed = held and len(runs) >= (study.each or 1)
        if named is not None or (completed and difference is not None):
            found.append(Candidate(study=study, arm=arm, control=control, difference=difference))
    if not found:
        raise NoCandidate(
            f"NAME={study.name}: no configuration with noise completed all its replicates beside its control, "
            f"so there is no candidate; rin report {study.name} shows why ({study.go_on}, or smaller sigmas)"
        )
    if len(found) == 1:
        return found[0]
    from search.promise import promises  # numpy and scipy: who reads arms without choosing does without

    promise = promises(study, arms)
    return max(found, key=lambda candidate: (promise[candidate.arm.name], candidate.difference))


def forget_beginnings(config: StudyConfig, arms: Sequence[Arm]) -> None:
    """Those that trials share, where no trial has yet to begin; of an earlier driver, too, that was killed before it
    was here."""
    if unfinished(config, arms):
        return
    try:
        config.folder.remove(PREFIXES)
    except OSError as error:  # the sweep has all that it is about
        log.warning("%s/%s is of no use any more, and was not removed: %s", config.folder.uri, PREFIXES, error)

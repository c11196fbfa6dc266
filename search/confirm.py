"""Is the winner better? The only place that may say so.

The winner of a sweep was chosen because it looked good, on the questions it was chosen by, with the seeds it was chosen
with: its advantage there is partly luck, and that luck is what selection finds. So it runs again beside its control
with seeds that no arm has had, and is judged on questions that nobody has looked at. Replicates are added until the
comparison is decided, by a rule that keeps the error level over all looks (`search/sequential.py`); a decision stands,
and what is undecided when the replicates or the budget end is called undecided. A gain is told with the collapse risk
that its runs do not exclude (`search/finding.py`): where a look that is planned could exclude it, replicates go on.

A confirmation is a study of its own, NAME-confirm, with two arms: everything that is true of a sweep's survival is true
of it, and calling it again goes on where it stopped. One that confirms another arm than NAME-confirm does is
NAME-confirm-ARM. Both hold the id of their sweep: a sweep that has the name of an earlier one has none of its verdicts.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from search.arms import Arm, as_ran, candidate_of, confirms, failures, read_arms, replicates_of, unfinished
from search.finding import Finding, find, lowest_collapsed
from search.replicates import FRESH, MIN_REPLICATES
from search.report import MARGIN
from search.sequential import CONFIRM, SequentialRule, sequential_compare
from search.statistics import ArmComparison, Comparison, compare_arms
from search.store import (
    STUDY_FILE,
    StudyConfig,
    confirmation_name,
    load_study_config,
    new_id,
    save_study_config,
    sweeps,
)
from spaces.config import ConfigError, TrialConfig
from spaces.errors import NoCandidate

if TYPE_CHECKING:
    from search.events import View
    from trainable.policy.embedded import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """What a confirmation came to, so far."""

    config: StudyConfig
    winner: str
    control: str
    comparison: Comparison
    """Of the accuracies alone, by the stopping rule; collapsed replicates with the accuracy at their stop."""
    finding: Finding | None
    """Accuracies and collapse risk together: what is said. None before the first pair."""
    arms: ArmComparison | None
    """Collapse risks and the completed-only comparison, of all replicates; None before the first pair."""
    replicates: int
    """Pairs that have ended."""
    unfinished: int
    """Trials of the present look without an outcome."""
    looks: tuple[int, ...]
    """Replicates at which it looks."""
    budget_spent: bool = False
    interrupted: bool = False
    notes: tuple[str, ...] = ()
    """What else must be known: trials that failed, a winner that has changed, other confirmations of this sweep."""

    @property
    def settled(self) -> bool:
        """No look that is planned could change what is said."""
        return self.finding is not None and self.finding.settled(self.looks[-1])

    @property
    def pairs(self) -> str:
        """Those that the comparison is made of, in words: a decision at a look stands, whatever ran after it."""
        judged, run = self.comparison.replicates, self.replicates
        words = f"{judged} pair{'s'[: judged != 1]}"
        look = "its last look" if self.comparison.verdict == "undecided" else "the look that decided"
        return words if judged == run else f"{words} of {run}, at {look}"

    def taken(self, pairs: int) -> bool:
        """Whether no look within so many pairs is left to take."""
        return self.settled or not any(self.replicates < look <= pairs for look in self.looks)


def planned_confirmation(
    parent: StudyConfig, looks: Sequence[int], arm: str | None = None
) -> tuple[StudyConfig, list[Arm]]:
    """The study NAME-confirm of a sweep (NAME-confirm-ARM for an arm that is not the winner), and its two arms.

    Raises NoCandidate when there is nothing to confirm, ConfigError for an arm that does not exist.
    """
    if parent.kind == "confirm":
        raise ConfigError(f"NAME={parent.name}: is a confirmation itself; give the sweep: rin confirm {parent.parent}")
    candidate = candidate_of(parent, read_arms(parent), arm)
    best, control = candidate.arm, candidate.control
    plain, won = (_on_confirm_questions(config, parent.id) for config in as_ran(control, best))
    arms = [
        Arm(name=control.name, origin="control", config=plain),
        Arm(name=best.name, origin="winner", config=won),
    ]
    config = parent.model_copy(
        update={
            "id": new_id(),
            "name": confirmation_name(parent.name, arm),
            "kind": "confirm",
            "parent": parent.name,
            "parent_id": parent.id,
            "looks": SequentialRule(looks=tuple(looks)).looks,
            "seed": parent.seed + parent.replicates + FRESH,
            "trials": 2,
            "replicates": looks[0],
            "total": None,
            "points": (),
            "evidence": (),
            "warm_start": "",
            "given": None,
            "derived": None,
            "confirm_pairs": 0,
            "extensions": (),
        }
    )
    return config, arms


def confirm(
    parent: StudyConfig,
    view: "View",
    progress: "Progress | None" = None,
    *,
    looks: Sequence[int] | None = None,
    arm: str | None = None,
    until: int | None = None,
    stepwise: bool = True,
    budget_hours: float | None = None,
    address: str | None = None,
) -> Confirmation:
    """Run until decided, or until the replicates or the budget end.

    `until`: pause after the last look within so many pairs; the looks that are left stay planned, and the next call
    takes them. Not `stepwise`: all pairs of these looks run together, and are judged look by look all the same.

    `looks`: numbers of replicates after which to compare; those of a confirmation that has begun stay as they were
    planned, since the error level is spent by that plan. One that has found a gain may have more after them, to exclude
    a collapse risk: whatever is called better then was called so by the first plan, and each look of a longer one has
    less of the level. Raises ConfigError for what the user can mend.
    """
    from search.study import resume_study, run_study  # torch and Ray: who reads a confirmation does without

    place = parent.model_copy(update={"name": confirmation_name(parent.name, arm)})
    begun = STUDY_FILE in place.folder.names()
    if begun:
        config, arms = load_study_config(parent.store, place.name), None
        if why := in_its_place(parent, arm):
            raise ConfigError(f"NAME={parent.name}: {why}")
        if looks is not None and _may_follow(config, looks, _collapsed_in(parent)):
            config = config.model_copy(update={"looks": SequentialRule(looks=tuple(looks)).looks})
            save_study_config(config)
        elif looks is not None and tuple(looks) != config.looks:
            given, planned = (",".join(map(str, numbers)) for numbers in (looks, config.looks))
            raise ConfigError(
                f"--looks {given}: this confirmation began with {planned}, which its error level hangs on; "
                "leave --looks out (one that has found a gain where it holds takes more looks after these)"
            )
    else:
        config, arms = planned_confirmation(parent, looks or CONFIRM.looks, arm)
    as_the_sweep = {name: getattr(parent, name) for name in ("tracking_uri", "concurrent", "cpus", "gpus")}
    config = config.model_copy(update={**as_the_sweep, "address": address})
    if budget_hours is not None or not begun:
        config = config.model_copy(update={"budget_hours": budget_hours})
    to_take = [look for look in config.looks if config.replicates <= look <= (until or config.looks[-1])]
    if not to_take:
        return read_confirmation(config)
    for look in to_take if stepwise else to_take[-1:]:
        config = config.model_copy(update={"replicates": look})
        if arms is None:
            result = resume_study(config, view, progress)
        else:
            result, arms = run_study(config, view, progress, arms), None
        worth = _collapsed_in(parent)
        state = judge(config, unfinished=result.unfinished, ends=result.budget_spent, collapsed_elsewhere=worth)
        state = replace(_noted(parent, state, result.arms), interrupted=result.interrupted)
        if result.unfinished or result.interrupted or state.settled:
            break
    if result.budget_spent and state.replicates not in config.looks and state.replicates >= MIN_REPLICATES:
        # It has been looked at, so it is a look: whoever goes on with more budget has spent that part of the level.
        save_study_config(config.model_copy(update={"looks": tuple(sorted({*config.looks, state.replicates}))}))
    return state


def read_confirmation(config: StudyConfig) -> Confirmation:
    """What it has come to; runs nothing. Raises ConfigError for files that are damaged."""
    arms = read_arms(config)
    left = unfinished(config, arms)
    try:
        parent = load_study_config(config.store, config.parent)
        if not confirms(config, parent):
            raise ConfigError(f"NAME={parent.name}: is another sweep by now")
        return _noted(parent, judge(config, unfinished=left, collapsed_elsewhere=_collapsed_in(parent)), arms)
    except ConfigError as error:  # what it found stands
        state = judge(config, unfinished=left)
        return replace(state, notes=(*failures(config, arms), f"its sweep cannot be read: {error}"))


def confirmation_of(config: StudyConfig) -> Confirmation | None:
    """Of a sweep's candidate, else the one that its candidate had when it began, where they are in the store and can be
    read; of a confirmation itself. Raises ConfigError where that one is damaged."""
    if config.kind == "confirm":
        return read_confirmation(config)
    if not any(name.startswith(confirmation_name(config.name)) for name in sweeps(config.store)):
        return None
    now = _candidate_now(config)
    found = []
    for arm in (None, now) if now else (None,):
        with suppress(ConfigError):  # not there, damaged, or of another version: the sweep can be read without it
            begun = load_study_config(config.store, confirmation_name(config.name, arm))
            if confirms(begun, config):
                found.append(read_confirmation(begun))
    return next((state for state in found if state.winner == now), found[0] if found else None)


def confirm_command(sweep: StudyConfig, arm: str, where: str = "") -> str:
    """What confirms its candidate, by name where NAME-confirm is of another arm or another sweep. `where`: options that
    find the sweep again."""
    try:
        begun = load_study_config(sweep.store, confirmation_name(sweep.name))
        other = not confirms(begun, sweep) or read_arms(begun)[-1].name != arm
    except ConfigError:  # there is none; of a damaged one the command says what is wrong
        other = False
    return f"rin confirm {sweep.name}{f' --arm {arm}' if other else ''}{where}"


def in_its_place(sweep: StudyConfig, arm: str | None = None) -> str:
    """Of what has the name of its confirmation and is none of it: that, with the remedy; else empty."""
    name = confirmation_name(sweep.name, arm)
    with suppress(ConfigError):  # there is none, or nobody can read whose it is
        if not confirms(load_study_config(sweep.store, name), sweep):
            return (
                f"{name} is no confirmation of this sweep but another one's, and says nothing here: rin delete {name}"
            )
    return ""


def _candidate_now(sweep: StudyConfig) -> str:
    """Empty where there is none."""
    try:
        return candidate_of(sweep, read_arms(sweep)).arm.name
    except NoCandidate:
        return ""


def _noted(parent: StudyConfig, state: Confirmation, arms: Sequence[Arm]) -> Confirmation:
    return replace(state, notes=(*failures(state.config, arms), *_cautions(parent, state)))


def _cautions(parent: StudyConfig, state: Confirmation) -> list[str]:
    """Whatever makes this answer another one than it seems."""
    cautions = []
    if state.config.name == confirmation_name(parent.name) and (now := _candidate_now(parent)) != state.winner:
        again = f"{now}: {confirm_command(parent, now)}" if now else "none"
        cautions.append(f"this confirms {state.winner}, which was the winner when it began; now it is {again}")
    if others := _same_questions(state.config):
        cautions.append(
            f"the same questions have been asked by {len(others)} other confirmation{'s' * (len(others) > 1)} "
            f"({', '.join(others)}): the error level holds for each alone and not for all together"
        )
    return cautions


def _same_questions(config: StudyConfig) -> list[str]:
    """Other confirmations of the store that ask what this one asks: of the same sweep, or of the same data set."""

    def asked(study: StudyConfig) -> tuple[Any, ...]:
        asks = read_arms(study)[0].config
        task = asks.task
        return task.name, task.path, task.eval_path, task.digits, task.options, asks.eval.split, asks.eval.draw

    def others() -> Iterator[str]:
        mine = asked(config)
        for name in sweeps(config.store):
            with suppress(ConfigError, IndexError):  # one that cannot be read, or has not begun, asks nothing
                other = load_study_config(config.store, name)
                if other.kind == "confirm" and name != config.name and asked(other) == mine:
                    yield name

    return list(others())


def _may_follow(config: StudyConfig, looks: Sequence[int], worth: float | None) -> bool:
    """More looks after those planned, of a confirmation that has found a gain and not what a collapse would undo."""
    longer = len(looks) > len(config.looks) and tuple(looks[: len(config.looks)]) == config.looks
    finding = judge(config, collapsed_elsewhere=worth).finding if longer else None
    return finding is not None and finding.verdict == "better where it holds"


def _collapsed_in(parent: StudyConfig) -> float | None:
    """What the collapsed run of the sweep that was left with the least is worth."""
    return lowest_collapsed(run for arm in read_arms(parent) for run in replicates_of(parent, arm))


def judge(
    config: StudyConfig,
    *,
    unfinished: int = 0,
    ends: bool = False,
    collapsed_elsewhere: float | None = None,
    arms: Sequence[Arm] | None = None,
) -> Confirmation:
    """What the pairs that have ended say. `ends`: none will follow. `collapsed_elsewhere`: the accuracy of the sweep's
    collapsed run that was left with the least. `arms`: where they have been read already."""
    rule = SequentialRule(looks=config.looks)
    control, winner = read_arms(config) if arms is None else arms
    treated, plain = replicates_of(config, winner), replicates_of(config, control)
    both = {run.seed for run in treated} & {run.seed for run in plain}
    # As they were planned, up to the first that is missing: which one failed must not choose what is looked at.
    seeds = list(takewhile(both.__contains__, map(config.seed_of, range(config.replicates))))
    by_seed = {run.seed: run for run in treated}, {run.seed: run for run in plain}
    a, b = ([runs[seed] for seed in seeds] for runs in by_seed)
    if not seeds:
        comparison = Comparison(difference=math.nan, replicates=0, margin=MARGIN)
    else:
        correct = None
        if all(run.correct is not None for run in (*a, *b)):
            correct = [run.correct or () for run in a], [run.correct or () for run in b]
        comparison = sequential_compare(
            [run.accuracy for run in a],
            [run.accuracy for run in b],
            rule=rule,
            final=ends or len(seeds) >= rule.looks[-1],
            margin=MARGIN,
            correct=correct,
        )
    return Confirmation(
        config=config,
        winner=winner.name,
        control=control.name,
        comparison=comparison,
        finding=find(comparison, a, b, collapsed_elsewhere=collapsed_elsewhere) if seeds else None,
        arms=compare_arms(a, b, margin=MARGIN) if seeds else None,
        replicates=len(seeds),
        unfinished=unfinished,
        looks=rule.looks,
        budget_spent=ends,
    )


def _on_confirm_questions(config: TrialConfig, sweep: str) -> TrialConfig:
    """Those of this sweep alone, where they are drawn; a data set has one list for all."""
    draw = sweep if config.task.endless else ""
    return config.model_copy(update={"eval": config.eval.model_copy(update={"split": "confirm", "draw": draw})})

"""Who is next: Tune asks here for a trial, and gets the next replicate of an arm.

The truth about a sweep is in its files: an arm is written down before its first replicate is handed out, an outcome
when a trial ends. `RinSearch` is made anew from those whenever a sweep starts or resumes: it hands out what is
unfinished first (the control is always configuration 0), then what its study's method proposes (`search/proposals.py`).
Every configuration is run once per replicate, with the same seeds in every arm; where only the number of runs is given,
`search/allocation.py` says run by run whether that is a new configuration or an old one again. The Optuna study is in
memory and is made from the arms for each draw: nothing stale, nothing left running, nothing unpickled.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from ray.tune.search import Searcher

from search.allocation import NEW, Run, Standing, next_run
from search.arms import Arm, control_for, planned, trial_config, trial_folder, write_arm
from search.coordinates import Params, settings_of
from search.evidence import Evidence, known_of
from search.lineup import base_tree, missing_control
from search.program_study import due, stopped
from search.promise import seen_of
from search.proposals import GRID_LEVELS, SEARCHERS, every, lattice
from search.registration import Registration, read_registrations
from search.rewards import pinned
from search.store import StudyConfig, slots_of
from search.surrogate import Seen
from spaces.config import ConfigError, TrialConfig
from spaces.reading import as_tree, flatten, merge, read_config, unflatten
from spaces.uses import SCHEDULE, idle, timetable
from trainable.disk.trial_folder import read_outcome
from trainable.outcome import Outcome
from trainable.ray_trainable import REFUSED

_ENUMERABLE = 20_000  # configurations of a finite space that are tried one by one to find out whether all have been run


_NO_ROOM = "needs a control of its own, for which no trial is left"


class RinSearch(Searcher):  # type: ignore[misc]
    """Hands out arms x replicates. Its suggestion is {"config", "arm", "replicate", "number", "folder", "slots"}."""

    def __init__(self, study: StudyConfig, arms: Sequence[Arm], evidence: Sequence[Evidence] = ()) -> None:
        """`arms`: those that are written down, in their order, with the results of the replicates that ended."""
        super().__init__()
        # Tune pickles its searcher into the store, and a tracking URI may hold a password.
        self.study = study.model_copy(update={"tracking_uri": ""})
        self.base = base_tree(study)
        self.evidence = tuple(evidence)
        self.arms = list(arms)
        self.waiting = [(arm, k) for arm in self.arms for k in planned(study, arm) if k not in arm.results]
        if study.kind in ("confirm", "program"):
            self.waiting.sort(key=lambda run: run[1])  # pair by pair: a budget that ends leaves whole pairs
        self._programme = read_registrations(study)[-1] if study.kind == "program" else None
        self._asked = -1
        """Results that were known when the programme was last asked what is due."""
        self.running: dict[str, tuple[Arm, int]] = {}
        self.exhausted = False
        """A finite space came to its end before the configurations that were asked for."""
        self._seen = {_identity(arm.config) for arm in self.arms}

    def record(self, number: int, arm: Arm) -> None:
        """Write an arm down, before a replicate that it has not had is handed out. Raises OSError."""
        write_arm(self.study, number, arm)

    def outcome(self, arm: Arm, replicate: int) -> Outcome | None:
        """How a trial ended; None while it has steps to go. Raises ConfigError for a damaged file."""
        return read_outcome(trial_folder(self.study, arm.name, replicate))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """None: nothing at this moment, since what is next hangs on a trial that runs."""
        if self._programme is not None:
            self._leave_stopped()
        if not self.waiting and not self._decide():
            if self._programme is not None and self.running:
                return None
            self.exhausted = self._room() > 0
            return str(Searcher.FINISHED)
        arm, replicate = self.waiting.pop(0)
        self.running[trial_id] = (arm, replicate)
        return {
            "config": as_tree(trial_config(self.study, arm, replicate)),
            "arm": arm.name,
            "replicate": replicate,
            "number": [known.name for known in self.arms].index(arm.name),
            "folder": trial_folder(self.study, arm.name, replicate).uri,
            "slots": slots_of(self.study),
        }

    def _decide(self) -> bool:
        """Write down what is handed out next; False when nothing is left."""
        if self._programme is not None:
            return self._decide_by(self._programme)
        run = self._next_run(exhausted=False)
        if run is None:
            return False
        arm = self._next_arm() if run is NEW else None
        if run is NEW and arm is None:
            run = self._next_run(exhausted=True)
        if arm is not None:
            # What it is compared with runs before it; a sweep that is killed between the two proposes it again.
            for new in [arm] if (control := missing_control(arm, self.arms)) is None else [control, arm]:
                self.record(len(self.arms), new)
                self.arms.append(new)
                self._seen.add(_identity(new.config))
                self.waiting += [(new, replicate) for replicate in planned(self.study, new)]
        elif run is not None and run.arm is not None:
            again = self.arms[run.arm]
            self.record(run.arm, replace(again, planned=run.replicate + 1))
            again.planned = run.replicate + 1
            self.waiting = [(again, run.replicate)]
        return bool(self.waiting)

    def _decide_by(self, registration: Registration) -> bool:
        known = sum(len(arm.results) for arm in self.arms)
        if known == self._asked:
            return False
        self._asked = known
        names = [arm.name for arm in self.arms]
        for new in due(self.study, registration, self.arms):
            number = names.index(new.name) if new.name in names else len(self.arms)
            self.record(number, new)
            if number == len(self.arms):
                names.append(new.name)
                self.arms.append(replace(new, planned=0))
            arm = self.arms[number]
            self.waiting += [(arm, replicate) for replicate in range(arm.planned, new.planned)]
            arm.planned = new.planned
        self.waiting.sort(key=lambda run: run[1])
        return bool(self.waiting)

    def _leave_stopped(self) -> None:
        """An arm of a programme that has collapsed too often is not run again: what was planned of it is not."""
        for arm in {arm.name: arm for arm, _ in self.waiting if stopped(arm)}.values():
            left = [(other, replicate) for other, replicate in self.waiting if other is not arm]
            arm.planned -= len(self.waiting) - len(left)
            self.record([known.name for known in self.arms].index(arm.name), arm)
            self.waiting = left

    def _next_run(self, *, exhausted: bool) -> Run | None:
        study = self.study
        if study.total is None:
            return None if exhausted else NEW
        found = seen_of(study, self.arms)
        names = [arm.name for arm in self.arms]
        standings = []
        for arm in self.arms:
            level, seen = found.get(arm.name, (0.0, Seen(params=arm.params, gain=None, held=0, collapsed=0)))
            control = control_for(arm, self.arms)
            standings.append(
                Standing(
                    seen=seen,
                    level=level,
                    control=None if control is None else names.index(control.name),
                    planned=arm.planned,
                    ended=len(arm.results.keys() | arm.failed),
                )
            )
        return next_run(study.space, standings, runs=study.total, most=study.replicates, exhausted=exhausted)

    def _room(self) -> int:
        """How many more arms there may be."""
        study = self.study
        if study.total is None:
            return study.trials - len(self.arms)
        return study.total - sum(arm.planned for arm in self.arms)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """How it ended stands in its folder. Without an outcome there it has failed, or was stopped and has steps to
        go."""
        arm, replicate = self.running.pop(trial_id)
        outcome = self.outcome(arm, replicate)
        if outcome is not None:
            arm.results[replicate] = outcome
        elif error or REFUSED in (result or {}):
            arm.failed.add(replicate)

    def save(self, checkpoint_path: str) -> None:
        """Tune wants to pickle its searcher every few seconds; all that this one knows is in the sweep's own files."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a search is made anew from the sweep's files, never from Tune's")

    def _next_arm(self) -> Arm | None:
        """None when the search has ended: enough configurations, a finite space without a new one, or a last trial that
        would need a control of its own as well."""
        study, space = self.study, self.study.space
        if self._room() <= 0:
            return None
        known = known_of(study, self.arms, self.evidence)
        found, problem = self._first_new(SEARCHERS[study.searcher](known))
        if found is None and (rest := every(space)) is not None:
            found, problem = self._first_new(params for number, params in enumerate(rest) if number < _ENUMERABLE)
        if found is not None:
            return found
        # The grid, or a finite space, has come to its end, unless it was unusable to begin with.
        ends = study.searcher == "grid" or every(space) is not None
        if problem == _NO_ROOM or (ends and (known.number > 0 or not problem)):
            return None
        last, remedy = problem or "was run already", "widen its ranges or choose fewer --trials"
        raise ConfigError(
            f"space {space.name}: no draw gave a configuration that is valid and new; the last: {last}; {remedy}",
        )

    def further(self, limit: int) -> int | None:
        """Configurations that are valid and were not run yet, counted up to a limit; None where there is no end of
        them."""
        space, seen = self.study.space, set(self._seen)
        rest = every(space)
        if rest is None and self.study.searcher != "grid":
            return None
        for params in lattice(space, GRID_LEVELS) if rest is None else islice(rest, _ENUMERABLE):
            tree = merge(self.base, unflatten(settings_of(space, params)))
            with suppress(ConfigError):  # two ranges that overlap the wrong way
                seen.add(_identity(self._with_rewards(read_config(tree, origin=f"space {space.name}"))))
            if len(seen) - len(self._seen) >= limit:
                break
        return len(seen) - len(self._seen)

    def _with_rewards(self, config: TrialConfig) -> TrialConfig:
        """As the sweep began with them, which may have been in another process."""
        known = [arm.config.task for arm in self.arms if arm.config.task.reward == config.task.reward]
        update = {"reward_sha256": known[0].reward_sha256} if known else {}
        task = config.task.model_copy(update=update)
        return pinned(config.model_copy(update={"task": task}), self.study.derived)

    def _first_new(self, candidates: Iterable[Params]) -> tuple[Arm | None, str]:
        """The first candidate that is valid and was not run yet; else what was wrong with the last invalid one."""
        problem = ""
        for params in candidates:
            tree = merge(self.base, unflatten(settings_of(self.study.space, params)))
            try:
                config = self._with_rewards(read_config(tree, origin=f"space {self.study.space.name}"))
            except ConfigError as error:
                # Two ranges that overlap the wrong way (sigma_end above sigma_start): not a finding, draw again.
                problem = str(error)
                continue
            if _identity(config) in self._seen:
                continue
            arm = Arm(name="", origin="searcher", config=config, params=dict(params))
            controls = int(missing_control(arm, self.arms) is not None)
            if controls < self._room():
                return replace(arm, name=f"c{len(self.arms) + controls:02d}"), ""
            problem = _NO_ROOM
        return None, problem


def _identity(config: TrialConfig) -> str:
    """Equal for configurations that would run the same: settings without a use are left out, a schedule is what it
    comes to in each step, numbers are equal within rounding."""
    unread = idle(config) | {"seed", *SCHEDULE}
    plain = {key: value for key, value in flatten(as_tree(config)).items() if key not in unread}
    rounded = {key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in plain.items()}
    return json.dumps([rounded, timetable(config)], sort_keys=True)

"""Who is next: Tune asks here for a trial, and gets the next replicate of an arm.

The truth about a sweep is in its files: an arm is written down before its first replicate is handed out, an outcome
when a trial ends. `RinSearch` is made anew from those whenever a sweep starts or resumes: it hands out what is
unfinished first (the control is always configuration 0), then what its study's method proposes (`search/proposals.py`).
Every configuration is run once per replicate, with the same seeds in every arm. The Optuna study is in memory and is
made from the arms for each draw: nothing stale, nothing left running, nothing unpickled.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.tune.search import Searcher

from search.arms import Arm, trial_config, trial_folder, write_arm
from search.coordinates import Params, settings_of
from search.evidence import Evidence, known_of
from search.lineup import base_tree, missing_control
from search.proposals import SEARCHERS, every
from search.rewards import pinned
from search.store import StudyConfig
from spaces.config import ConfigError, TrialConfig
from spaces.reading import as_tree, flatten, merge, read_config, unflatten
from spaces.uses import SCHEDULE, idle, timetable
from trainable.disk.trial_folder import read_outcome
from trainable.outcome import Outcome
from trainable.ray_trainable import REFUSED

_ENUMERABLE = 20_000  # configurations of a finite space that are tried one by one to find out whether all have been run


_NO_ROOM = "needs a control of its own, for which no trial is left"


class RinSearch(Searcher):  # type: ignore[misc]
    """Hands out arms x replicates. Its suggestion is {"config", "arm", "replicate", "number", "folder"}."""

    def __init__(self, study: StudyConfig, arms: Sequence[Arm], evidence: Sequence[Evidence] = ()) -> None:
        """`arms`: those that are written down, in their order, with the results of the replicates that ended."""
        super().__init__()
        # Tune pickles its searcher into the store, and a tracking URI may hold a password.
        self.study = study.model_copy(update={"tracking_uri": ""})
        self.base = base_tree(study)
        self.evidence = tuple(evidence)
        self.arms = list(arms)
        self.waiting = [(arm, k) for arm in self.arms for k in range(study.replicates) if k not in arm.results]
        if study.kind == "confirm":
            self.waiting.sort(key=lambda run: run[1])  # pair by pair: a budget that ends leaves whole pairs
        self.running: dict[str, tuple[Arm, int]] = {}
        self.exhausted = False
        """A finite space came to its end before the configurations that were asked for."""
        self._seen = {_identity(arm.config) for arm in self.arms}

    def record(self, arm: Arm) -> None:
        """Write a new arm down, before its first replicate is handed out. Raises OSError."""
        write_arm(self.study, len(self.arms), arm)

    def outcome(self, arm: Arm, replicate: int) -> Outcome | None:
        """How a trial ended; None while it has steps to go. Raises ConfigError for a damaged file."""
        return read_outcome(trial_folder(self.study, arm.name, replicate))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if not self.waiting:
            arm = self._next_arm()
            if arm is None:
                self.exhausted = len(self.arms) < self.study.trials
                return str(Searcher.FINISHED)
            # What it is compared with runs before it; a sweep that is killed between the two proposes it again.
            for new in [arm] if (control := missing_control(arm, self.arms)) is None else [control, arm]:
                self.record(new)
                self.arms.append(new)
                self._seen.add(_identity(new.config))
                self.waiting += [(new, replicate) for replicate in range(self.study.replicates)]
        arm, replicate = self.waiting.pop(0)
        self.running[trial_id] = (arm, replicate)
        return {
            "config": as_tree(trial_config(self.study, arm, replicate)),
            "arm": arm.name,
            "replicate": replicate,
            "number": [known.name for known in self.arms].index(arm.name),
            "folder": trial_folder(self.study, arm.name, replicate).uri,
        }

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
        if len(self.arms) >= study.trials:
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

    def _with_rewards(self, config: TrialConfig) -> TrialConfig:
        """As the sweep began with them, which may have been in another process."""
        known = [arm.config.task for arm in self.arms if arm.config.task.reward == config.task.reward]
        update = {"reward_sha256": known[0].reward_sha256} if known else {}
        return pinned(config.model_copy(update={"task": config.task.model_copy(update=update)}))

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
            number = len(self.arms) + (missing_control(arm, self.arms) is not None)
            if number < self.study.trials:
                return replace(arm, name=f"c{number:02d}"), ""
            problem = _NO_ROOM
        return None, problem


def _identity(config: TrialConfig) -> str:
    """Equal for configurations that would run the same: settings without a use are left out, a schedule is what it
    comes to in each step, numbers are equal within rounding."""
    unread = idle(config) | {"seed", *SCHEDULE}
    plain = {key: value for key, value in flatten(as_tree(config)).items() if key not in unread}
    rounded = {key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in plain.items()}
    return json.dumps([rounded, timetable(config)], sort_keys=True)

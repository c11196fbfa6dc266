"""Hours: how many a sweep has used, and the limit at which everything is stopped.

An hour is a trial-slot hour, or a GPU hour where trials have GPUs. What counts is the time of every process that worked
on a trial, loading, evaluating and repeated steps included, as the attempts in the trials' folders tell (also those of
a driver that was killed). The limit is hard: a stopped trial still saves itself and evaluates, so everything is stopped
one such time ahead, judged by the longest step that any trial has reported.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune

from search.arms import Arm, planned, trial_folder
from search.store import StudyConfig, slots_of
from trainable.disk.trial_folder import read_attempts, read_reports


class Budget(tune.Stopper):  # type: ignore[misc]
    """Tune asks it after each event whether to stop everything."""

    def __init__(self, config: StudyConfig, arms: Sequence[Arm]) -> None:
        self.limit_hours = math.inf if config.budget_hours is None else config.budget_hours
        self.slots = slots_of(config)
        folders = [trial_folder(config, arm.name, replicate) for arm in arms for replicate in planned(config, arm)]
        self.earlier_hours = sum(one.slot_hours(self.slots) for folder in folders for one in read_attempts(folder))
        self.spent = self.earlier_hours >= self.limit_hours
        self._ended_hours = 0.0
        self._since: dict[str, float] = {}
        steps = (report.seconds for folder in folders for report in read_reports(folder))
        # That of a trial's first step, which evaluates.
        self._longest = max(steps, default=0.0) if config.budget_hours else 0.0

    def started(self, trial: str) -> None:
        self._since.setdefault(trial, time.monotonic())

    def ended(self, trial: str) -> None:
        since = self._since.pop(trial, None)
        if since is not None:
            self._ended_hours += self.slots * (time.monotonic() - since) / 3600

    @property
    def running(self) -> int:
        """Trials."""
        return len(self._since)

    def reported(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)

    @property
    def hours(self) -> float:
        """Used so far, those of running trials included."""
        running = sum(time.monotonic() - since for since in self._since.values())
        return self.earlier_hours + self._ended_hours + self.slots * running / 3600

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        ahead = self.slots * len(self._since) * self._longest / 3600
        self.spent = self.spent or self.hours + ahead >= self.limit_hours
        return self.spent

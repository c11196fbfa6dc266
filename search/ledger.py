"""Where a sweep's hours went.

An hour is a trial-slot hour, or a GPU hour where trials have GPUs. What counts is every process that worked on a trial,
from its start to its last sign of life: loading, evaluating, and steps that were done again after a fault. Three kinds
of hours bought no answer by themselves and are named apart: those of collapsed trials, those of repeated steps, and the
share of generation whose groups the filter threw away. What a trial took over from another one (`trainable/prefix.py`)
is among none of these, and is told as saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from search.arms import Arm, planned, trial_folder
from search.store import StudyConfig, gpus_of, slots_of
from trainable.disk.trial_folder import read_attempts, read_reports
from trainable.metrics import ROLLOUT_SECONDS, WASTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Example: Ledger(hours=0.11, collapsed=0.02, repeated=0.0, filtered=0.004, saved=0.01, arms={"control": 0.03,
    "c01": 0.08}, unit="trial-slot hours")."""

    hours: float
    """Trial-slot hours, or GPU hours."""
    collapsed: float
    """Of trials that collapsed."""
    repeated: float
    """Of steps that were done again, and of starts after the first."""
    filtered: float
    """Of generating groups that were not trained on."""
    saved: float
    """That no trial had to spend, since another one of the same seed had made the same beginning."""
    arms: Mapping[str, float]
    unit: Literal["trial-slot hours", "GPU hours"]


def read_ledger(config: StudyConfig, arms: Sequence[Arm]) -> Ledger:
    by_arm: dict[str, float] = {}
    collapsed = repeated = filtered = saved = 0.0
    for arm in arms:
        for replicate in planned(config, arm):
            folder = trial_folder(config, arm.name, replicate)
            attempts, reports = read_attempts(folder), read_reports(folder)
            took = sum(attempt.hours for attempt in attempts)
            hours = sum(attempt.slot_hours(slots_of(config)) for attempt in attempts)
            slots = hours / took if took else slots_of(config)  # on average, where its attempts had unlike ones
            by_arm[arm.name] = by_arm.get(arm.name, 0.0) + hours
            outcome = arm.results.get(replicate)
            if outcome is not None and outcome.collapsed:
                collapsed += hours
            shared = attempts[-1].shared if attempts else None
            steps, seconds = (0, 0.0) if shared is None else (shared.steps, shared.seconds)
            saved += slots * seconds / 3600
            if len(attempts) > 1:  # loading before the first step: every trial has it once
                useful = attempts[0].loading_seconds + sum(report.seconds for report in reports) - seconds
                repeated += max(hours - slots * useful / 3600, 0.0)
            wasted = sum(report.signals[ROLLOUT_SECONDS] * report.signals[WASTED] for report in reports[steps:])
            filtered += slots * wasted / 3600
    return Ledger(
        hours=sum(by_arm.values()),
        collapsed=collapsed,
        repeated=repeated,
        filtered=filtered,
        saved=saved,
        arms=by_arm,
        unit="GPU hours" if gpus_of(config) else "trial-slot hours",
    )

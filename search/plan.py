"""What a sweep would run, in which order, how long, and what its answers could show. Trains nothing.

Time comes from trials of the same workload that this store has seen (their median), else from the workload's own measured
figure. The worst case is that no trial collapses: a collapsed one stops early and only saves time.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from search.searchers import Arm
from search.store import StudyConfig, load_study_config, sweeps
from search.study import fixed_arms
from search.tracking import load_study
from spaces.config import ConfigError, TrialConfig
from spaces.reading import read_config
from spaces.workloads import WORKLOADS


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """Example: StudyPlan(arms=..., searched=7, runs=8, slots=2, trial_seconds=20.0, ...).wall_seconds == 80.0"""

    arms: tuple[Arm, ...]
    """Known beforehand, in order: controls, then points."""
    searched: int
    """Configurations that the searcher will choose after them."""
    runs: int
    slots: int
    """Trials at once."""
    trial_seconds: float
    seconds_source: str
    cpus: int
    gpus: float
    config: TrialConfig
    """Of the control: what every configuration starts from."""

    @property
    def wall_seconds(self) -> float:
        """Worst case: nothing collapses."""
        return math.ceil(self.runs / self.slots) * self.trial_seconds

    @property
    def slot_hours(self) -> float:
        """Hours of trial slots (times gpus: GPU hours)."""
        return self.runs * self.trial_seconds / 3600

    @property
    def standard_error(self) -> float:
        """Of one accuracy near one half from answering questions alone, as a share."""
        return 0.5 / math.sqrt(self.config.eval.questions)


def plan_study(config: StudyConfig, cpus: int) -> StudyPlan:
    """Raises ConfigError for whatever `rin sweep` would refuse."""
    workload = WORKLOADS[config.workload]
    arms = fixed_arms(config)
    measured = _measured_seconds(Path(config.store), config.workload)
    return StudyPlan(
        arms=tuple(arms),
        searched=config.trials - len(arms),
        runs=config.trials * config.replicates,
        slots=config.concurrent or max(1, cpus // workload.trial_cpus),
        trial_seconds=measured or workload.trial_seconds,
        seconds_source="median of completed trials in this store" if measured else "the workload's figure (README, Measurements)",
        cpus=workload.trial_cpus,
        gpus=workload.trial_gpus,
        config=read_config(arms[0].tree),
    )


def _measured_seconds(store: Path, workload: str) -> float | None:
    seconds = []
    for name in sweeps(store):
        try:
            study = load_study_config(store, name)
            records = load_study(study.tracking_uri, study.name) if study.workload == workload else ()
        except ConfigError:
            continue  # an old sweep that cannot be read is no reason not to plan a new one
        seconds += [r.metrics["perf/trial_seconds"] for r in records if r.status == "completed" and "perf/trial_seconds" in r.metrics]
    return median(seconds) if seconds else None

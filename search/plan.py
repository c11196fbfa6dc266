"""What a sweep would run, in which order, how long, and what its answers could show. Trains nothing.

Time and spread come from trials of the same work (model, task, sizes) that this store holds (medians), else from the
workload's own measured figures where the sweep runs just that; else they are not known yet, and said not to be. The
worst case is that no trial collapses: a collapsed one stops early and only saves time. How much it saves is told apart,
from the share of collapsed trials and the step at which they stopped in this store, or at which the plan recorded it
for a point.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median, variance

from search.allocation import new_configurations
from search.arms import (
    Arm,
    Origin,
    control_for,
    is_negative,
    paired_differences,
    read_arms,
    replicates_of,
    trial_folder,
)
from search.lineup import fixed_arms
from search.power import detectable_difference
from search.store import StudyConfig, gpus_of, load_study_config, processes_of, slots_of, sweeps
from spaces.config import ConfigError, TrialConfig
from spaces.points import POINTS
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS, Workload
from trainable.disk.trial_folder import read_attempts
from trainable.outcome import Ending


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """What earlier trials teach, each None without any."""

    trial_seconds: float | None = None
    """Of a completed trial, loading included."""
    difference_sd: float | None = None
    """Std from seed to seed of the accuracy difference between two arms that share the seed."""
    searched_share: float | None = None
    """Part of a whole trial's time that a configuration of the searcher took on average; below 1 because some
    collapsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """Example: StudyPlan(study=..., arms=..., searched=7, slots=2, trial_seconds=20.0, ...).wall_seconds == 80.0  # of
    8 runs"""

    study: StudyConfig
    arms: tuple[Arm, ...]
    """Known beforehand, in order: controls, then points."""
    searched: int
    """Configurations that the searcher will choose after them, the controls of those included; before it gives
    replicates, where it is told how many runs there are."""
    slots: int
    """Trials at once."""
    trial_seconds: float | None
    """None: nobody has measured such a trial."""
    seconds_source: str
    difference_sd: float | None
    sd_source: str
    adjusted_share: float
    """Expected part of the worst case when collapses are counted, 0 to 1."""
    processes: int
    """Of one trial."""
    cpus: int
    """Of one trial."""
    gpus: float
    """Of one trial."""
    config: TrialConfig
    """Of the control: what every configuration starts from."""

    @property
    def sampled(self) -> int:
        """Answers that a trial samples for pass@k, before its first step and after its last."""
        return 2 * self.config.eval.questions * self.config.eval.samples

    @property
    def wall_seconds(self) -> float | None:
        """Worst case: nothing collapses."""
        return None if self.trial_seconds is None else math.ceil(self.study.runs / self.slots) * self.trial_seconds

    @property
    def hours(self) -> float | None:
        """Trial-slot hours, or GPU hours; worst case."""
        return (
            None if self.trial_seconds is None else self.study.runs * self.trial_seconds / 3600 * slots_of(self.study)
        )

    @property
    def confirm_runs(self) -> int:
        """Of the confirmation that follows, at most; beyond those of the sweep."""
        return 2 * self.study.confirm_pairs

    @property
    def confirm_seconds(self) -> float | None:
        return None if self.trial_seconds is None else math.ceil(self.confirm_runs / self.slots) * self.trial_seconds

    @property
    def confirm_hours(self) -> float | None:
        return (
            None if self.trial_seconds is None else self.confirm_runs * self.trial_seconds / 3600 * slots_of(self.study)
        )

    @property
    def question_se(self) -> float:
        """Standard error of one accuracy near one half from its questions alone, a share."""
        return 0.5 / math.sqrt(self.config.eval.questions)

    @property
    def affordable(self) -> int | None:
        """Configurations, with all their replicates, that the budget pays for if nothing collapses, or runs where those
        are what is given; all of them without a budget, None where nobody knows."""
        budget, asked = self.study.budget_hours, self.study.total or self.study.trials
        if self.hours is None:
            return asked if budget is None else None
        if budget is None or budget >= self.hours:
            return asked
        return int(budget / (self.hours / asked))

    @property
    def detectable(self) -> float | None:
        """Smallest true difference of one arm that would be seen with 80 % power; None where the spread or the number
        of replicates is not known."""
        each = self.study.each
        return None if self.difference_sd is None or each is None else detectable_difference(self.difference_sd, each)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What this sweep will not be able to do, a line each."""
        lines = []
        budget = self.study.budget_hours
        if budget is not None and self.affordable is None:
            lines.append(f"what the budget of {budget:g} hours pays for is not known yet")
        asked, what = self.study.total or self.study.trials, "runs" if self.study.total else "configurations"
        if budget is not None and self.affordable is not None and self.affordable < asked:
            lines.append(f"the budget of {budget:g} hours pays for about {self.affordable} of {asked} {what}")
        if budget is not None and self.affordable is not None and self.affordable < 2:
            lines.append("so it cannot decide anything: no configuration would have a control to be compared with")
        if (
            budget is not None
            and self.hours is not None
            and self.confirm_hours
            and budget < self.hours + self.confirm_hours
        ):
            lines.append("the budget holds for the confirmation, too, and does not pay for all of it")
        if self.study.each is not None and self.study.each < 3 and not self.confirm_runs:
            lines.append("fewer than 3 replicates: every comparison will say undecided (rin confirm runs its own)")
        elif self.detectable is not None and self.detectable > 0.02:
            lines.append(
                f"differences below {100 * self.detectable:.1f} points will mostly stay undecided; "
                "the field argues about 1 to 2: more replicates, or fewer configurations"
            )
        steps, stages = self.config.grpo.steps, self.config.noise.num_stages
        if stages > steps:
            lines.append(
                f"noise.num_stages={stages} is more than grpo.steps={steps}: "
                "stages are skipped, sigma_end may not be reached"
            )
        return tuple(lines)


def plan_study(config: StudyConfig, cpus: int, gpus_here: int = 0) -> StudyPlan:
    """For a machine with so many CPUs and GPUs. Raises ConfigError for whatever `rin sweep` would refuse."""
    workload = WORKLOADS[config.workload]
    arms = fixed_arms(config)
    control = arms[0].config
    known = experience(config.store, control)
    as_it_stands = _work(control) == _work(read_config(merge(workload.settings, workload.with_vllm)))
    seconds, source = _seconds(config.store, control, known, workload, as_it_stands)
    processes, gpus = processes_of(config), gpus_of(config)
    per_trial = processes * (config.cpus or workload.trial_cpus)
    searched = config.trials - len(arms) if config.total is None else new_configurations(config.total, len(arms))
    share = sum(_recorded_share(arm) for arm in arms) + searched * (known.searched_share or 1.0)
    return StudyPlan(
        study=config,
        arms=tuple(arms),
        searched=searched,
        slots=config.concurrent or max(1, min(cpus // per_trial, int(gpus_here / gpus)) if gpus else cpus // per_trial),
        trial_seconds=seconds,
        seconds_source=source,
        difference_sd=known.difference_sd or (workload.difference_sd if as_it_stands else None),
        sd_source="from replicates in this store" if known.difference_sd else "the workload's figure (docs/science.md)",
        adjusted_share=share / (len(arms) + searched),
        processes=processes,
        cpus=per_trial,
        gpus=gpus,
        config=control,
    )


def _seconds(
    store: str, control: TrialConfig, known: Experience, workload: Workload, as_it_stands: bool
) -> tuple[float | None, str]:
    """Of one trial, and where that is from. Where none has sampled so many answers, the time of one without samples
    and what they take on this workload."""
    here, figure = (
        "median of completed trials in this store",
        "the workload's figure (docs/architecture.md, Measurements)",
    )
    evaluated = control.eval
    if known.trial_seconds is not None:
        return known.trial_seconds, here
    if not evaluated.samples:
        return (workload.trial_seconds if as_it_stands else None), figure
    greedy = control.model_copy(update={"eval": evaluated.model_copy(update={"samples": 0})})
    seconds = experience(store, greedy).trial_seconds
    source = figure if seconds is None else here
    if not as_it_stands or workload.answer_seconds is None:
        return None, source
    sampling = 2 * evaluated.questions * evaluated.samples * workload.answer_seconds
    return (seconds or workload.trial_seconds) + sampling, f"{source}, and {sampling:.0f} s of pass@k"


def _work(config: TrialConfig) -> tuple[object, ...]:
    """What decides how long a trial takes (but for its samples) and how far seeds are apart: the model, the task, and
    how much of it."""
    grpo, rollout = config.grpo, config.rollout
    sizes = (grpo.steps, grpo.updates_per_step, grpo.prompts, grpo.group_size, config.eval.questions, config.eval.every)
    return config.model, config.task, config.parallel, rollout.backend, rollout.max_new_tokens, *sizes


def experience(store: str, like: TrialConfig) -> Experience:
    """From every sweep in the store whose trials do the same work; one that cannot be read is no reason not to plan a
    new one."""
    seconds: list[float] = []
    spent: list[float] = []
    spreads: list[tuple[float, int]] = []
    for name in sweeps(store) if "://" not in store else []:
        try:
            study = load_study_config(store, name)
            arms = [arm for arm in read_arms(study) if _work(arm.config) == _work(like)]
        except ConfigError:
            continue
        timed = [arm for arm in arms if arm.config.eval.samples == like.eval.samples]
        runs = [run for arm in timed for run in _runs(study, arm)]
        done = [taken for _, outcome, taken in runs if outcome == "completed"]
        seconds += done
        spent += [min(taken / median(done), 1.0) for origin, _, taken in runs if done and origin == "searcher"]
        spreads += _spread(study, arms)
    freedom = sum(df for _, df in spreads)
    return Experience(
        trial_seconds=median(seconds) if seconds else None,
        difference_sd=math.sqrt(sum(square * df for square, df in spreads) / freedom) if freedom >= 2 else None,
        searched_share=sum(spent) / len(spent) if len(spent) >= 5 else None,
    )


def _runs(study: StudyConfig, arm: Arm) -> Iterator[tuple[Origin, Ending, float]]:
    """(origin, outcome, seconds) of trials that ended in one go."""
    for replicate, outcome in arm.results.items():
        attempts = read_attempts(trial_folder(study, arm.name, replicate))
        if len(attempts) == 1:
            yield arm.origin, outcome.outcome, attempts[0].hours * 3600


def _spread(study: StudyConfig, arms: list[Arm]) -> list[tuple[float, int]]:
    """(variance, degrees of freedom) of differences from the control over seeds, for each arm with 2 replicates or more
    that did not collapse."""
    found = []
    for arm in arms:
        control = None if is_negative(arm) else control_for(arm, arms)
        healthy = [run for run in replicates_of(study, arm, "accuracy") if not run.collapsed]
        plain = [] if control is None else replicates_of(study, control, "accuracy")
        differences = paired_differences(healthy, plain)
        if len(differences) >= 2:
            found.append((variance(differences), len(differences) - 1))
    return found


def _recorded_share(arm: Arm) -> float:
    """Part of a trial that an arm of the plan ran until it collapsed; 1 for the others."""
    step = recorded_collapse(arm)
    return 1.0 if step is None else min((step + 1) / arm.config.grpo.steps, 1.0)


def recorded_collapse(arm: Arm) -> int | None:
    """The step at which the plan recorded one for this point; None for the others."""
    return POINTS[arm.name].collapsed_at_step if arm.name in POINTS else None

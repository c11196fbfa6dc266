"""One sweep, from its name to its candidate, and on from wherever it was cut off. Read this first.

    refuse what cannot work        a name that is taken, tracking that is down, a point that contradicts its workload
    write down what will run       STORE/NAME/study.json, the fixed arms, what the searcher is told beforehand
    the arms                       controls first (one per code path), then named points, then the searcher's own
    run what has no outcome yet    Ray Tune: arms x replicates, paired by seed, or --runs in all, where they matter;
                                   collapses end trials early and are results
    choose                         the arm with the most to expect of another run -> STORE/NAME/best.yaml
                                   (`arms.candidate_of`)

A first run and a resumed one differ in the second line alone: both read the folder and run what is missing there. So a
sweep can be killed at any moment; what lies where, and why that is enough, says `search/store.py`. Which arms there are
at first says `lineup.py`, what is asked before anything starts `preflight.py` and `start.py`, how trials run
`execution.py`, what MLflow has yet to hear `mirror.py`. One process at a time drives a sweep and tells a view of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from search.arms import (
    Arm,
    Candidate,
    as_far_as_it_goes,
    forget_beginnings,
    planned,
    read_arms,
    trial_folder,
    unfinished,
    write_arm,
)
from search.budget import Budget
from search.events import CHECKS, StudyEvent, View
from search.evidence import Evidence, evidence_of, write_evidence
from search.execution import run_trials
from search.export import to_yaml
from search.first_build import build_once
from search.interruption import Interruption
from search.lineup import fixed_arms
from search.logged_model import candidate_now
from search.mirror import catch_up, tell_candidate, tell_endings
from search.mlflow_client import check_tracking, claim
from search.preflight import check_sources
from search.rewards import bring_rewards, keep_rewards
from search.start import at_rest, on_ray
from search.store import (
    BEST_FILE,
    STUDY_FILE,
    StudyConfig,
    check_ranks,
    check_writable,
    only_driver,
    refuse_stale,
    refuse_taken_name,
    save_study_config,
)
from search.tracking import Tracker
from spaces.config import ConfigError
from trainable.disk.trial_folder import KILLED, end_attempt

if TYPE_CHECKING:
    from trainable.policy.embedded import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """What a sweep came to."""

    config: StudyConfig
    arms: tuple[Arm, ...]
    candidate: Candidate | None
    """None when no configuration with noise completed beside its control."""
    unfinished: int
    """Trials without an outcome: the sweep was interrupted, its budget is spent, or they failed."""
    budget_spent: bool = False
    interrupted: bool = False
    """It was asked to end: nothing else begins, also where the last trial had just ended."""
    untold: int = 0
    """Records that MLflow did not take; the folder has what they are of, and the next resume tells it."""


def run_study(
    config: StudyConfig,
    view: View,
    progress: "Progress | None" = None,
    fixed: Sequence[Arm] | None = None,
    files: Mapping[str, str] | None = None,
) -> StudyResult:
    """Run a sweep to its end. `fixed`: its arms, where they are known already or chosen elsewhere; else those of
    `fixed_arms`. `files`: what else is written down beside `study.json` before it starts.

    Raises ConfigError for whatever the user can mend, before anything is written down.
    """
    view(StudyEvent(study=config, doing=CHECKS))
    arms, evidence = _checked(config, fixed)
    with on_ray(config, arms, view, progress) as interruption:
        _write_down(config, arms, evidence, files or {})
        with only_driver(config):
            return _advance(config, view, interruption)


def begin_study(config: StudyConfig, progress: "Progress | None" = None, fixed: Sequence[Arm] | None = None) -> None:
    """Refuse what cannot work, and write down what will run; `resume_study` can do the rest, also in another
    process."""
    arms, evidence = _checked(config, fixed)
    check_tracking(config.tracking_uri, config.name, config.owner)
    build_once(config, [arm.config for arm in arms], progress)
    _write_down(config, arms, evidence, {})


def _checked(config: StudyConfig, fixed: Sequence[Arm] | None) -> tuple[Sequence[Arm], Sequence[Evidence]]:
    """What it begins with. Raises ConfigError."""
    arms = list(fixed) if fixed is not None else fixed_arms(config)
    check_ranks(config, [arm.config for arm in arms])
    refuse_taken_name(config)
    evidence = evidence_of(config)
    check_writable(config.store)
    bring_rewards(config, arms)
    check_sources(config, arms)
    return arms, evidence


def _write_down(
    config: StudyConfig, arms: Sequence[Arm], evidence: Sequence[Evidence], files: Mapping[str, str]
) -> None:
    with only_driver(config):
        if STUDY_FILE in config.folder.names():  # since it was checked
            raise ConfigError(
                f"--name {config.name}: another process has begun a sweep of that name; choose another name"
            )
        config.folder.remove("arms")  # of a start that was killed before it wrote its study.json
        write_evidence(config, evidence)
        keep_rewards(config, arms)
        for number, arm in enumerate(arms):
            write_arm(config, number, arm)
        for name, text in files.items():
            config.folder.write(name, text)
        save_study_config(config)


def resume_study(config: StudyConfig, view: View, progress: "Progress | None" = None) -> StudyResult:
    """Run what is missing of a sweep that was written down. Raises ConfigError when another process is at it, and
    leaves it as it was."""
    check_writable(config.store)
    with only_driver(config):
        refuse_stale(config)
        arms = read_arms(config)
        runs = unfinished(config, arms) > 0 and not Budget(config, arms).spent
        if runs:
            bring_rewards(config, arms)
            check_sources(config, arms)
        with on_ray(config, arms, view, progress) if runs else at_rest(config, view) as interruption:
            save_study_config(config)  # a new budget or another place holds for the next resume, too
            return _advance(config, view, interruption)


def _advance(config: StudyConfig, view: View, interruption: Interruption) -> StudyResult:
    """Everything that has no outcome yet, then the candidate."""
    claim(config.tracking_uri, config.name, config.owner)
    arms = read_arms(config)
    budget = Budget(config, arms)
    tracker = Tracker(config)
    try:
        catch_up(config, arms, tracker)
        if unfinished(config, arms) and not budget.spent:
            for folder in (trial_folder(config, arm.name, n) for arm in arms for n in planned(config, arm)):
                end_attempt(folder, KILLED)  # with an earlier driver: it waits, and does not run
            config.folder.remove(BEST_FILE)  # of the state that it goes on from: whoever is killed leaves none behind
            exhausted = run_trials(config, arms, budget, tracker, view, interruption)
            if exhausted:  # a finite space: what there is has been run
                config = as_far_as_it_goes(config)
                save_study_config(config)
    except KeyboardInterrupt:
        pass  # twice Ctrl-C, or once before the first trial; what is missing says the rest
    finally:
        tell_endings(config, tracker)
        untold = tracker.close()
    arms = read_arms(config)
    candidate = _save_candidate(config, arms)
    untold += tell_candidate(config, candidate)
    forget_beginnings(config, arms)
    return StudyResult(
        config=config,
        arms=tuple(arms),
        candidate=candidate,
        unfinished=unfinished(config, arms),
        budget_spent=budget.spent,
        interrupted=interruption.asked,
        untold=untold,
    )


def _save_candidate(config: StudyConfig, arms: Sequence[Arm]) -> Candidate | None:
    candidate = candidate_now(config, arms)
    if candidate is None:
        config.folder.remove(BEST_FILE)  # of a state in which there was one
        return None
    config.folder.write(BEST_FILE, to_yaml(candidate))
    return candidate

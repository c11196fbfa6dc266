"""One sweep, from its name to its candidate, and on from wherever it was cut off. Read this first.

    refuse what cannot work        a name that is taken, tracking that is down, a point that contradicts its workload
    write down what will run       STORE/NAME/study.json, the fixed arms, what the searcher is told beforehand
    the arms                       control first (one per filter policy), then named points, then the searcher's own
    run what has no outcome yet    Ray Tune: arms x replicates, paired by seed; collapses end trials early and are results
    choose                         the best feasible configuration, as a candidate -> STORE/NAME/best.yaml

A first run and a resumed one differ in the second line alone: both read the folder and run what is missing there. So a sweep can be
killed at any moment; what lies where, and why that is enough, says `search/store.py`. Tune is the executor only: nothing is read
back from its files, and a new Tuner is made each time. One process at a time drives a sweep.

The sweep reports what happens to a view (a live table, plain lines, or nothing); it prints nothing itself.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune

from search.budget import Budget
from search.cluster import check_fits, connected, resources
from search.export import BestConfig, choose_best, to_yaml
from search.journal import filter_policy, read_arms, read_evidence, trial_folder, unfinished, write_arm, write_evidence
from search.mlflow_client import check_tracking
from search.schedulers import SCHEDULERS
from search.searchers import Arm, Evidence, RinSearch, evidence_from_arms, evidence_from_points
from search.store import BEST_FILE, STUDY_FILE, StudyConfig, load_study_config, only_driver, save_study_config
from search.tracking import MLflowCallback, TrialRecord, load_study
from search.trials import read_failure, read_reports, read_stopped, write_decision
from spaces.config import ConfigError, TrialConfig
from spaces.library import Choice
from spaces.paths import home, load_settings
from spaces.points import POINTS
from spaces.reading import as_tree, merge, read_config
from spaces.workloads import TRIAL_ENVIRONMENT, WORKLOADS
from trainable.embedded import Progress, ensure_base
from trainable.folder import Folder
from trainable.model import load_policy
from trainable.noise import noise_targets
from trainable.ray_trainable import RinTrainable, with_outcome

RETRIES = 2
"""Times that a trial is started again from its checkpoint after its process died, hung or raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEvent:
    """Something happened to a trial; what a view draws.

    Example: TrialEvent(trial="c03/0", arm="c03", replicate=0, status="running", settings={...}, step=4, steps=29, metrics={...})
    """

    trial: str
    arm: str
    replicate: int
    status: str
    """running | completed | collapsed | stopped | failed"""
    settings: Mapping[str, Any]
    """Tree of the TrialConfig."""
    steps: int
    step: int = 0
    """Steps done."""
    metrics: Mapping[str, float]
    rule: str = ""


View = Callable[[TrialEvent], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """What a sweep came to."""

    config: StudyConfig
    records: tuple[TrialRecord, ...]
    best: BestConfig | None
    """None when no configuration completed."""
    unfinished: int
    """Trials without an outcome: the sweep was interrupted, its budget is spent, or they failed."""
    budget_spent: bool = False
    tracking_lost: str = ""
    """Why nothing could be read back; what the trials reported is then in the sweep's queue, for the next command to deliver."""


def run_study(config: StudyConfig, view: View, progress: Progress | None = None, fixed: Sequence[Arm] | None = None) -> StudyResult:
    """Run a sweep to its end. `fixed`: its arms, where they are known already or chosen elsewhere; else those of `fixed_arms`.

    Raises ConfigError before any training for whatever the user can mend.
    """
    begin_study(config, progress, fixed)
    with only_driver(config):
        return _advance(config, view)


def begin_study(config: StudyConfig, progress: Progress | None = None, fixed: Sequence[Arm] | None = None) -> None:
    """Refuse what cannot work, and write down what will run; `resume_study` can do the rest, also in another process."""
    arms = list(fixed) if fixed is not None else fixed_arms(config)
    if STUDY_FILE in config.folder.names():
        raise ConfigError(
            f"--name {config.name}: {config.folder.uri} exists already; go on with it by: rin resume {config.name}, or choose another name"
        )
    evidence = evidence_of(config)
    SCHEDULERS[config.scheduler](config.space, base_tree(config), config.replicates)  # refuses what cannot be ranked
    check_tracking(config.tracking_uri, config.name, Folder(config.store).local)
    _preflight(arms, progress)
    with only_driver(config):
        if STUDY_FILE in config.folder.names():  # since then
            raise ConfigError(f"--name {config.name}: another process has begun a sweep of that name; choose another name")
        config.folder.remove("arms")  # of a start that was killed before it wrote its study.json
        write_evidence(config, evidence)
        for number, arm in enumerate(arms):
            write_arm(config, number, arm)
        save_study_config(config)


def resume_study(config: StudyConfig, view: View, progress: Progress | None = None) -> StudyResult:
    """Run what is missing of a sweep that was written down. Raises ConfigError when another process is at it."""
    check_tracking(config.tracking_uri, config.name, Folder(config.store).local)
    with only_driver(config):
        _preflight(read_arms(config), progress)
        save_study_config(config)  # a new budget holds for the next resume, too
        return _advance(config, view)


def _advance(config: StudyConfig, view: View) -> StudyResult:
    """Everything that has no outcome yet, then the candidate."""
    arms = read_arms(config)
    budget = Budget(config, arms)
    tracker = MLflowCallback(uri=config.tracking_uri, experiment=config.name, sweep=config.name, spool=config.scratch)
    try:
        _catch_up(config, arms, tracker)
        if unfinished(config, arms) and not budget.spent:
            with _ray(config):
                exhausted = _fit(config, arms, budget, tracker, view)
            if exhausted:  # a finite space: what there is has been run
                config = config.model_copy(update={"trials": len(read_arms(config))})
                save_study_config(config)
    except KeyboardInterrupt:
        pass  # twice Ctrl-C; what is missing says the rest
    finally:
        tracker.close()
        _tell_late_endings(config, tracker)
    left = unfinished(config, read_arms(config))
    try:
        records = load_study(config.tracking_uri, config.name)
    except ConfigError as error:
        return StudyResult(config=config, records=(), best=None, unfinished=left, budget_spent=budget.spent, tracking_lost=str(error))
    best = _save_best(config, records) if config.kind != "confirm" else None
    return StudyResult(config=config, records=records, best=best, unfinished=left, budget_spent=budget.spent)


def base_tree(config: StudyConfig) -> dict[str, Any]:
    """Settings under every configuration: workload, space, overrides; one thread per CPU of a trial."""
    workload = WORKLOADS[config.workload]
    threads = {"threads": config.cpus or workload.trial_cpus}
    return merge(merge(merge(threads, workload.settings), config.space.settings), config.settings)


def fixed_arms(config: StudyConfig) -> list[Arm]:
    """The control first, a further control for each other filter policy that a point or the space brings, then the points.

    Raises ConfigError for an unknown point and for settings that contradict each other.
    """
    base = base_tree(config)
    if read_config(base).eval.split != "selection":
        raise ConfigError("--set eval.split=confirm: those questions are for rin confirm, and lose their worth by choosing; leave it out")
    points = []
    for given in config.points:
        name, settings = _point(given)
        if name != "control":
            # A point says what it changes; what the user sets himself wins.
            points.append(Arm(name=name, origin="point", tree=merge(merge(base, settings), config.settings)))
    arms = [*_controls(config, base, points), *points]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--points {','.join(config.points)}: {name} would be there twice; name each point once")
    for arm in arms:
        read_config(arm.tree, origin=arm.name)
    if config.trials < len(arms):
        raise ConfigError(
            f"--trials {config.trials}: the control and the points are {len(arms)} ({', '.join(names)}); raise --trials to that"
        )
    return arms


def _controls(config: StudyConfig, base: Mapping[str, Any], points: Sequence[Arm]) -> list[Arm]:
    """One per filter policy: the policy alone moves an accuracy by points."""
    quiet = merge(base, {"noise": {"sigma_start": 0.0, "zones": []}})
    searched = [d.domain for d in config.space.dimensions if d.key == "grpo.filter_groups"]
    options = [value for domain in searched if isinstance(domain, Choice) for value in domain.options.values()]
    trees = [point.tree for point in points] + [merge(base, {"grpo": {"filter_groups": option}}) for option in options]
    controls = {filter_policy(quiet): Arm(name="control", origin="control", tree=quiet)}
    for tree in trees:
        policy = filter_policy(tree)
        if policy not in controls:
            taken = f"control-{policy[0]}" in [arm.name for arm in controls.values()]
            name = f"control-{policy[0]}-{policy[1]}" if taken else f"control-{policy[0]}"
            grpo = read_config(tree).grpo
            changes = {"grpo": {"filter_groups": grpo.filter_groups, "max_gen_batches": grpo.max_gen_batches}}
            controls[policy] = Arm(name=name, origin="control", tree=merge(quiet, changes))
    return list(controls.values())


def _point(named: str) -> tuple[str, Mapping[str, Any]]:
    """Name and settings of a point of the plan, or of a YAML file with settings of a trial (`rin export` writes such files)."""
    path = home(named)
    if path.suffix not in (".yaml", ".yml"):
        if named not in POINTS:
            raise ConfigError(f"--points {named}: unknown point; choose from {', '.join(POINTS)}, or give a YAML file")
        return named, POINTS[named].settings
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", path.stem) or path.stem in POINTS or re.fullmatch(r"c\d+|control.*", path.stem):
        raise ConfigError(
            f"--points {named}: {path.stem} would name an arm; rename the file (letters, digits, '.', '_', '-'; no name of another arm)"
        )
    settings = load_settings(path)
    return path.stem, {key: value for key, value in settings.items() if key not in ("seed", "threads", "hang_seconds")}


def evidence_of(config: StudyConfig) -> list[Evidence]:
    """What the searcher is told beforehand: recorded collapses of the plan, results of an earlier sweep. Raises ConfigError."""
    base = base_tree(config)
    evidence = evidence_from_points(config.evidence, config.space, base)
    if config.warm_start:
        earlier = load_study_config(config.store, config.warm_start)
        if earlier.kind == "confirm":
            raise ConfigError(f"--warm-start {config.warm_start}: its questions are for confirming and not for choosing; give a sweep")
        arms = read_arms(earlier)
        evidence += evidence_from_arms(arms, config.space, f"sweep {config.warm_start}", base)
    return evidence


def _preflight(arms: Sequence[Arm], progress: Progress | None) -> None:
    """Build what every trial will build, where that is quick, so that a setting that touches nothing is an error here and not
    in each trial."""
    for arm in arms:
        trial: TrialConfig = read_config(arm.tree, origin=arm.name)
        if trial.model.recipe is not None:
            ensure_base(trial.model.recipe, progress)
            noise_targets(load_policy(trial.model, trial.quant, trial.seed), trial.noise)


# --- running ----------------------------------------------------------------------------------------------------------------------


def _fit(config: StudyConfig, arms: Sequence[Arm], budget: Budget, tracker: MLflowCallback, view: View) -> bool:
    """Whether the space came to its end before the configurations that were asked for."""
    workload = WORKLOADS[config.workload]
    # Tune pickles the searcher into the store, and a tracking URI may hold a password.
    searcher = searcher_of(config.model_copy(update={"tracking_uri": ""}), arms)
    tuner = tune.Tuner(
        tune.with_resources(RinTrainable, resources(workload, config.cpus, config.gpus)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=SCHEDULERS[config.scheduler](config.space, base_tree(config), config.replicates),
            num_samples=config.trials * config.replicates,
            max_concurrent_trials=config.concurrent or _in_flight(config),
            reuse_actors=True,  # imports take longer than many a trial
            trial_dirname_creator=lambda trial: f"{trial.config['arm']}-{trial.config['replicate']}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=config.folder.uri,
            stop=budget,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),  # a trial saves itself
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[tracker, _Watcher(config, budget, view)],
            verbose=0,
            log_to_file=True,
        ),
    )
    with _sigterm_is_a_first_ctrl_c():
        tuner.fit()
    return searcher.exhausted


def _in_flight(config: StudyConfig) -> int:
    """Trials at a time: on this machine as many as fit, which Tune then starts together, and one that is ready when a place is free.
    0: as many as there are places, for a cluster, which may grow."""
    if config.address is not None:
        return 0
    bundle = resources(WORKLOADS[config.workload], config.cpus, config.gpus).bundles[0]
    return 1 + min(int(ray.cluster_resources()[kind] // amount) for kind, amount in bundle.items())


def searcher_of(config: StudyConfig, arms: Sequence[Arm]) -> RinSearch:
    """Made from what is written down; a new arm is written down before it is handed out."""
    numbers = {arm.name: number for number, arm in enumerate(arms)}

    def record(arm: Arm) -> None:
        assert arm.name not in numbers, arm.name
        numbers[arm.name] = len(numbers)
        write_arm(config, numbers[arm.name], arm)

    searcher = RinSearch(
        space=config.space,
        base=base_tree(config),
        fixed=(),
        known=arms,
        record=record,
        place=lambda arm, replicate: trial_folder(config, arm, replicate).uri,
        configurations=config.trials,
        replicates=config.replicates,
        seed=config.seed,
        searcher=config.searcher,
        objectives=config.objectives,
        evidence=read_evidence(config),
    )
    if config.kind == "confirm":
        searcher.waiting.sort(key=lambda run: run[1])  # pair by pair: a budget that ends leaves whole pairs
    return searcher


class _Watcher(tune.Callback):  # type: ignore[misc]
    """Turns what happens to trials into events for the view, hours for the budget, and a note beside a trial that a scheduler
    stopped. Tune pickles its callbacks; none of that is part of this one's pickle."""

    def __init__(self, config: StudyConfig | None = None, budget: Budget | None = None, view: View = lambda event: None) -> None:
        self._config, self._budget, self._view = config, budget, view

    def __reduce__(self) -> Any:
        return _Watcher, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._budget is not None:
            self._budget.started(trial.trial_id)
        self._tell(trial, "running")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if self._budget is not None:
            self._budget.reported(result.get("seconds", 0.0))
        outcome = result.get("outcome")
        self._tell(trial, outcome["outcome"] if outcome else "running", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._budget is None or self._config is None:
            return
        self._budget.ended(trial.trial_id)
        last = trial.last_result or {}
        if "outcome" not in last and not self._budget.spent:
            write_decision(self._folder(trial), f"by the scheduler {self._config.scheduler} after step {last.get('step')}")
            self._tell(trial, "stopped", last)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._budget is not None:
            self._budget.ended(trial.trial_id)
        self._tell(trial, "failed", trial.last_result, rule=read_failure(self._folder(trial))[0])

    def _folder(self, trial: Any) -> Any:
        assert self._config is not None
        return trial_folder(self._config, trial.config["arm"], trial.config["replicate"])

    def _tell(self, trial: Any, status: str, result: Mapping[str, Any] | None = None, rule: str = "") -> None:
        result = result or {}
        setting = trial.config
        self._view(
            TrialEvent(
                trial=f"{setting['arm']}/{setting['replicate']}",
                arm=setting["arm"],
                replicate=setting["replicate"],
                status=status,
                settings=setting["config"],
                steps=setting["config"]["grpo"]["steps"],
                step=int(result["step"]) + 1 if "step" in result else 0,
                metrics={name: value for name, value in result.items() if "/" in name},
                rule=rule or result.get("rule", ""),
            )
        )


@contextmanager
def _sigterm_is_a_first_ctrl_c() -> Iterator[None]:
    """A batch system that ends a job sends SIGTERM and waits a little: every trial saves itself, as after Ctrl-C. Tune takes
    SIGUSR1 for that, however often it comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    ctrl_c = signal.getsignal(signal.SIGINT)  # Tune puts its own in place, and leaves it there
    early = signal.signal(signal.SIGUSR1, leave)  # until Tune is ready for it
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, ctrl_c or signal.SIG_DFL)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, early or signal.SIG_DFL)


# --- what an earlier process left -------------------------------------------------------------------------------------------------


def _catch_up(config: StudyConfig, arms: Sequence[Arm], tracker: MLflowCallback) -> None:
    """Tracking learns what trials wrote down and no driver passed on; what it knows already is sent again without effect. Runs
    that a killed driver left open are taken up, so that the end of this one closes them."""
    try:
        known = {(record.arm, record.replicate): record for record in load_study(config.tracking_uri, config.name)}
    except ConfigError:
        known = {}
    for number, arm in enumerate(arms):
        for replicate in range(config.replicates):
            record, outcome = known.get((arm.name, replicate)), arm.results.get(replicate)
            if record is not None and record.ended is not None and outcome is not None and record.status == outcome["outcome"]:
                continue
            if record is not None and record.status == "failed":
                continue  # stays so until it is started again
            _pass_on(config, number, arm, replicate, tracker, known=record is not None)


def _pass_on(config: StudyConfig, number: int, arm: Arm, replicate: int, tracker: MLflowCallback, *, known: bool) -> None:
    """All that a trial wrote down; `known`: it has a run already, also without any report."""
    reports, outcome = read_reports(trial_folder(config, arm.name, replicate)), arm.results.get(replicate)
    if not reports and not known:
        return
    tree = merge(arm.tree, {"seed": config.seed + replicate})
    setting = {"config": as_tree(read_config(tree)), "arm": arm.name, "replicate": replicate, "origin": arm.origin, "number": number}
    trial = SimpleNamespace(config=setting)
    tracker.on_trial_start(trial=trial)
    if reports and outcome is not None and outcome["outcome"] != "stopped":
        reports[-1] = with_outcome(reports[-1], outcome)
    for report in reports:
        tracker.on_trial_result(trial=trial, result=report)


def _tell_late_endings(config: StudyConfig, tracker: MLflowCallback) -> None:
    """What came after a trial's last word to Tune: one that is stopped from outside evaluates itself as it leaves, or ends in the
    very step in which everything is stopped."""
    for number, arm in enumerate(read_arms(config)):
        for replicate in range(config.replicates):
            if not tracker.called_stopped(arm.name, replicate):
                continue
            evaluation = read_stopped(trial_folder(config, arm.name, replicate))
            outcome = arm.results.get(replicate)
            if outcome is not None and outcome["outcome"] != "stopped":
                _pass_on(config, number, arm, replicate, tracker, known=True)
            elif evaluation is not None:
                tracker.add_outcome(arm.name, replicate, evaluation)
    tracker.close()


def _save_best(config: StudyConfig, records: tuple[TrialRecord, ...]) -> BestConfig | None:
    try:
        best = choose_best(config.name, records, config.tracking_uri, config.replicates)
    except ConfigError:
        return None
    config.folder.write(BEST_FILE, to_yaml(best))
    return best


# --- Ray --------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _ray(config: StudyConfig) -> Iterator[None]:
    """A local Ray for this sweep, or the cluster at `address`.

    Workers get a small working folder of our own: Ray would put the driver's current folder ahead of site-packages.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a banner even when it is told to be silent
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    # Only the last result has an accuracy.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    work = config.scratch / "work"
    work.mkdir(parents=True, exist_ok=True)
    runtime_env = {"working_dir": str(work), "env_vars": {**TRIAL_ENVIRONMENT, **_cache_environment(config)}}
    with connected(config.address, runtime_env):
        if config.address is None:  # a cluster may grow when it is asked to
            check_fits(resources(WORKLOADS[config.workload], config.cpus, config.gpus), ray.nodes())
        yield


def _cache_environment(config: StudyConfig) -> dict[str, str]:
    """On this machine workers look for the base model where this process does."""
    return {name: os.environ[name] for name in ("RIN_CACHE", "XDG_CACHE_HOME") if name in os.environ and config.address is None}

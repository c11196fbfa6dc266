"""One sweep, from its name to its candidate. Read this first.

    refuse what cannot work        a name that is taken, tracking that is down, a point that contradicts its workload
    write down what will run       STORE/NAME/study.json
    the arms                       control first (one per filter policy), then named points, then the searcher's own
    run them                       Ray Tune: arms x replicates, paired by seed; collapses end trials early and are results
    choose                         the best feasible configuration, as a candidate -> STORE/NAME/best.yaml

What lies where: `search/store.py`. The sweep reports what happens to a view (a live table, plain lines, or nothing); it prints
nothing itself.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune

from search.export import BestConfig, choose_best, to_yaml
from search.searchers import SEARCHERS, Arm, RinSearch
from search.store import BEST_FILE, STUDY_FILE, StudyConfig
from search.tracking import MLflowCallback, TrialRecord, check_tracking, load_study, strip_password
from spaces.config import ConfigError, TrialConfig
from spaces.points import POINTS
from spaces.reading import merge, read_config
from spaces.workloads import TRIAL_ENVIRONMENT, WORKLOADS, Workload
from trainable.embedded import Progress, ensure_base
from trainable.model import load_policy
from trainable.noise import noise_targets
from trainable.ray_trainable import OUTCOME_FILE, RinTrainable


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
    interrupted: bool
    tracking_lost: str = ""
    """Why nothing could be read back; what the trials reported is then in the sweep's spool, for the next command to deliver."""


def run_study(config: StudyConfig, view: View, progress: Progress | None = None) -> StudyResult:
    """Run a sweep to its end. Raises ConfigError before any training for whatever the user can mend."""
    workload = WORKLOADS[config.workload]
    arms = fixed_arms(config)
    if config.folder.exists():
        raise ConfigError(f"--name {config.name}: {config.folder} exists already; choose another name or remove that folder")
    check_tracking(config.tracking_uri, config.name)
    _preflight(arms, progress)

    config.folder.mkdir(parents=True)
    shown = config.model_copy(update={"tracking_uri": strip_password(config.tracking_uri)})
    (config.folder / STUDY_FILE).write_text(shown.model_dump_json(indent=1), encoding="utf-8")
    tracker = MLflowCallback(uri=config.tracking_uri, experiment=config.name, sweep=config.name, spool=config.folder)
    searcher = RinSearch(
        space=config.space,
        base=base_tree(config),
        fixed=arms,
        configurations=config.trials,
        replicates=config.replicates,
        seed=config.seed,
        sampler=SEARCHERS[config.searcher](config.seed),
        storage=_optuna_storage(config.folder),
        study_name=config.name,
    )
    interrupted = False
    try:
        with _ray(config):
            _fit(config, workload, searcher, tracker, view)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        tracker.close()
        _add_late_outcomes(config, tracker)
    try:
        records = load_study(config.tracking_uri, config.name)
    except ConfigError as error:
        return StudyResult(config=config, records=(), best=None, interrupted=interrupted, tracking_lost=str(error))
    interrupted = interrupted or len(records) < config.trials * config.replicates
    return StudyResult(config=config, records=records, best=_save_best(config, records), interrupted=interrupted)


def base_tree(config: StudyConfig) -> dict[str, Any]:
    """Settings under every configuration: workload, space, overrides; one thread per CPU of a trial."""
    workload = WORKLOADS[config.workload]
    return merge(merge(merge({"threads": workload.trial_cpus}, workload.settings), config.space.settings), config.settings)


def fixed_arms(config: StudyConfig) -> list[Arm]:
    """The control first, a further control for each other filter policy that a point brings, then the points.

    Raises ConfigError for an unknown point and for settings that contradict each other.
    """
    base = base_tree(config)
    quiet = {"noise": {"sigma_start": 0.0, "zones": []}}
    arms = [Arm(name="control", origin="control", tree=merge(base, quiet))]
    policies = {_filter_policy(arms[0].tree)}
    points = []
    for name in config.points:
        if name not in POINTS:
            raise ConfigError(f"--points {name}: unknown point; choose from {', '.join(POINTS)}")
        if name == "control":
            continue
        # A point says what it changes; what the user sets himself wins.
        tree = merge(merge(base, POINTS[name].settings), config.settings)
        points.append(Arm(name=name, origin="point", tree=tree))
        policy = _filter_policy(tree)
        if policy not in policies:
            policies.add(policy)
            changes = {"grpo": {"filter_groups": policy[0], "max_gen_batches": policy[1]}}
            arms.append(Arm(name=f"control-{policy[0]}", origin="control", tree=merge(merge(base, quiet), changes)))
    arms += points
    for arm in arms:
        read_config(arm.tree, origin=arm.name)
    if config.trials < len(arms):
        names = ", ".join(arm.name for arm in arms)
        raise ConfigError(f"--trials {config.trials}: the control and the points are {len(arms)} ({names}); raise --trials to that")
    return arms


def _filter_policy(tree: Mapping[str, Any]) -> tuple[str, int]:
    grpo = read_config(tree).grpo
    return grpo.filter_groups, grpo.max_gen_batches


def _preflight(arms: list[Arm], progress: Progress | None) -> None:
    """Build what every trial will build, where that is quick, so that a setting that touches nothing is an error here and not
    in each trial."""
    for arm in arms:
        trial: TrialConfig = read_config(arm.tree, origin=arm.name)
        if trial.model.recipe is not None:
            ensure_base(trial.model.recipe, progress)
            noise_targets(load_policy(trial.model, trial.quant, trial.seed), trial.noise)


def _fit(config: StudyConfig, workload: Workload, searcher: RinSearch, tracker: MLflowCallback, view: View) -> None:
    tune.Tuner(
        tune.with_resources(RinTrainable, {"cpu": workload.trial_cpus, "gpu": workload.trial_gpus}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=config.trials * config.replicates,
            max_concurrent_trials=config.concurrent or 0,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(config.folder),
            stop={"collapsed": 1},
            callbacks=[tracker, _Watcher(view)],
            verbose=0,
            log_to_file=True,
        ),
    ).fit()


class _Watcher(tune.Callback):  # type: ignore[misc]
    """Turns what happens to trials into events for the view. Tune pickles its callbacks; a view (a terminal) is not part of
    that."""

    def __init__(self, view: View | None = None) -> None:
        self._view = view or (lambda event: None)

    def __reduce__(self) -> Any:
        return _Watcher, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, "running")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        outcome = result.get("outcome")
        self._tell(trial, outcome["outcome"] if outcome else "running", result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, "failed", trial.last_result)

    def _tell(self, trial: Any, status: str, result: Mapping[str, Any] | None = None) -> None:
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
                rule=result.get("rule", ""),
            )
        )


def _add_late_outcomes(config: StudyConfig, tracker: MLflowCallback) -> None:
    """Trials that were stopped from outside (Ctrl-C) evaluated themselves as they left, and wrote it beside their results."""
    for path in config.folder.glob(f"trials/*/{OUTCOME_FILE}"):
        tracker.add_outcome(path.parent.name, json.loads(path.read_text(encoding="utf-8")))
    tracker.close()


def _save_best(config: StudyConfig, records: tuple[TrialRecord, ...]) -> BestConfig | None:
    try:
        best = choose_best(config.name, records, config.tracking_uri)
    except ConfigError:
        return None
    (config.folder / BEST_FILE).write_text(to_yaml(best), encoding="utf-8")
    return best


def _optuna_storage(folder: Path) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.storages.RDBStorage(f"sqlite:///{folder / 'optuna.db'}")


@contextmanager
def _ray(config: StudyConfig) -> Iterator[None]:
    """A local Ray for this sweep (bound to localhost), or the cluster at `address`.

    Workers get a small working folder of our own: Ray would put the driver's current folder ahead of site-packages.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a banner even when it is told to be silent
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    # Only the last result has an accuracy.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    work = config.folder / "work"
    work.mkdir(exist_ok=True)
    runtime_env = {"working_dir": str(work), "env_vars": {**TRIAL_ENVIRONMENT, **_cache_environment(config)}}
    if config.address is None:
        ray.init(
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            runtime_env=runtime_env,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    else:
        try:
            ray.init(address=config.address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--address {config.address}: no Ray cluster answers there ({str(error).splitlines()[0]})") from error
    try:
        yield
    finally:
        ray.shutdown()


def _cache_environment(config: StudyConfig) -> dict[str, str]:
    """On this machine workers look for the base model where this process does."""
    return {name: os.environ[name] for name in ("RIN_CACHE", "XDG_CACHE_HOME") if name in os.environ and config.address is None}

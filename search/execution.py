"""Running a sweep's trials: Ray, Tune, and what is heard from trials on the way.

Tune is the executor only: nothing is read back from its files, and a new Tuner is made each time. What happens to a
trial goes from one callback to the budget, to MLflow and to the view.
"""

import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune

from search.arms import Arm, trial_folder
from search.budget import Budget
from search.cluster import check_fits, connected, lacking, resources
from search.events import ENDS, StudyEvent, TrialEvent, View
from search.evidence import read_evidence
from search.interruption import Interruption
from search.mirror import tell_beginning
from search.ray_internals import trials_leave_in_their_time
from search.searchers import RinSearch
from search.store import StudyConfig, gpus_of
from search.tracking import Tracker
from spaces.workloads import TRIAL_ENVIRONMENT
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import (
    DIED,
    AttemptLog,
    end_attempt,
    read_attempts,
    read_outcome,
    read_trial,
)
from trainable.outcome import Status, StepReport
from trainable.ray_trainable import REFUSED, RinTrainable

RETRIES = 2
"""Times that a trial is started again from its checkpoint after its process died, hung or raised. What the user has to
mend is no such end: it would come again."""


def run_trials(
    study: StudyConfig, arms: Sequence[Arm], budget: Budget, tracker: Tracker, view: View, interruption: Interruption
) -> bool:
    """Run what has no outcome, on the Ray of `sweep_ray`. Whether the space came to its end before the configurations
    that were asked for.

    Raises KeyboardInterrupt for a second Ctrl-C.
    """
    tell_beginning(study)
    searcher = RinSearch(study, arms, read_evidence(study))
    lack = lacking(resources(study), ray.nodes())  # of a cluster, which may grow
    tuner = tune.Tuner(
        tune.with_resources(RinTrainable, resources(study)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=study.runs,
            max_concurrent_trials=study.concurrent or _in_flight(study),
            reuse_actors=True,  # imports take longer than many a trial
            trial_dirname_creator=lambda trial: f"{trial.config['arm']}-{trial.config['replicate']}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=study.folder.uri,
            stop=budget,
            # A trial saves itself.
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[SweepCallback(study, searcher.arms, budget, tracker, view, waits=bool(lack))],
            verbose=0,
            log_to_file=True,
        ),
    )

    def end_early() -> None:
        """In a signal's handler. Tune takes SIGUSR1 for a first Ctrl-C, however often it comes."""
        saved = f"{budget.running} trial{'s'[: budget.running != 1]}"
        doing = f"ends early: {saved} save themselves; Ctrl-C again does not wait for them"
        view(StudyEvent(study=study, doing=doing, asked=True))
        os.kill(os.getpid(), signal.SIGUSR1)

    view(StudyEvent(study=study, doing=f"waits for a node: {lack}" if lack else ""))
    try:
        with trials_leave_in_their_time(), _tune_ends_early(), interruption.passed_on(end_early):
            tuner.fit()
    finally:
        view(StudyEvent(study=study, doing=ENDS))
    return searcher.exhausted


@contextmanager
def _tune_ends_early() -> Iterator[None]:
    """SIGUSR1 ends the run, also before Tune is ready for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)


def _in_flight(config: StudyConfig) -> int:
    """Trials at a time: on this machine as many as fit, which Tune then starts together, and one that is ready when a
    place is free. 0: as many as there are places, for a cluster, which may grow."""
    if config.address is not None:
        return 0
    needed = resources(config).required_resources
    return 1 + min(int(ray.cluster_resources()[kind] // amount) for kind, amount in needed.items())


class SweepCallback(tune.Callback):  # type: ignore[misc]
    """Hears from Tune what happens to trials, and passes it on. Tune pickles its callbacks into the store; of this one
    nothing is in the pickle, neither a thread nor a tracking URI with a password, and nothing reads it."""

    def __init__(
        self,
        study: StudyConfig,
        arms: Sequence[Arm],
        budget: Budget,
        tracker: Tracker,
        view: View,
        *,
        waits: bool = False,
    ) -> None:
        """`arms`: the searcher's own list, which grows as it proposes. `waits`: it was said that no node holds a
        trial."""
        self.study, self.arms, self.budget, self.tracker, self.view = study, arms, budget, tracker, view
        self.waits = waits

    def __reduce__(self) -> Any:
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Also after a retry."""
        if self.waits:
            self.waits = False
            self.view(StudyEvent(study=self.study, doing=""))
        self.budget.started(trial.trial_id)
        number, arm, replicate = self._trial(trial)
        self.tracker.begin(arm, number, replicate)
        self._tell(trial, "running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tune brings the last result here too, before on_trial_complete."""
        if REFUSED in result:
            self._failed(trial)
            return
        report = StepReport.from_record(result)
        self.budget.reported(report.seconds)
        _, arm, replicate = self._trial(trial)
        self.tracker.report(arm, replicate, report)
        status: Status = "running"
        if "outcome" in result:
            outcome = read_outcome(trial_folder(self.study, arm.name, replicate))
            assert outcome is not None
            self.tracker.end(arm, replicate)
            status = outcome.outcome
        seen = {"step": report.step + 1, "metrics": report.signals, "seconds": report.seconds}
        self._tell(trial, status, **seen, rule=report.verdict.rule, why=report.verdict.evidence)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Without an outcome it was stopped from outside and evaluates itself as it leaves: `mirror.tell_endings` hears
        of that."""
        self.budget.ended(trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _, arm, replicate = self._trial(trial)
        folder = trial_folder(self.study, arm.name, replicate)
        self.tracker.retry(arm, replicate, trial.num_failures, read_trial(folder, driven=False).reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """All its attempts are used up. Tune comes here without on_trial_start when a process does not even start."""
        self.budget.ended(trial.trial_id)
        number, arm, replicate = self._trial(trial)
        folder = trial_folder(self.study, arm.name, replicate)
        began = (arm.name, replicate) in self.tracker.open()
        _write_death(folder, trial.error_file, began)
        if not began:
            self.tracker.begin(arm, number, replicate)
        self._failed(trial)

    def _failed(self, trial: Any) -> None:
        """As its folder says."""
        _, arm, replicate = self._trial(trial)
        self.tracker.end(arm, replicate)
        state = read_trial(trial_folder(self.study, arm.name, replicate), driven=False)
        self._tell(trial, state.status, step=state.step, rule=state.rule, why=state.reason)

    def _trial(self, trial: Any) -> tuple[int, Arm, int]:
        number = trial.config["number"]
        return number, self.arms[number], trial.config["replicate"]

    def _tell(self, trial: Any, status: Status, **seen: Any) -> None:
        """`seen`: fields of the event, as far as there are any."""
        _, arm, replicate = self._trial(trial)
        hours = self.budget.hours
        self.view(TrialEvent(arm=arm.name, replicate=replicate, status=status, config=arm.config, hours=hours, **seen))


def _write_death(folder: Folder, error_file: str | None, began: bool) -> None:
    """Of a trial whose process could not write down how it ended, or was none: it did not even start, and what an
    earlier run of the sweep says of its end is not how this one ended."""
    attempts = read_attempts(folder)
    if began and attempts and attempts[-1].ended != "stopped":
        end_attempt(folder, DIED)
        return
    attempt = AttemptLog(folder)
    attempt.step = attempts[-1].step if attempts else 0
    attempt.end(DIED, reason=f"its process did not start: {_last_line(error_file)}")


def _last_line(error_file: str | None) -> str:
    """The error itself, without its traceback, from the file where Tune keeps it."""
    try:
        text = Path(error_file or "").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "no reason is known"
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason is known"


@contextmanager
def sweep_ray(config: StudyConfig) -> Iterator[None]:
    """A local Ray for this sweep, or the cluster at `address`. Raises ConfigError when there is none, and for a trial
    that no node of this machine can hold.

    Workers get an empty working folder: Ray would put the driver's current folder ahead of site-packages.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a banner even when it is told to be silent
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")  # nobody reads Tune's own state
    # Only the last result has an accuracy.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # signals come by way of `interruption`
    with tempfile.TemporaryDirectory(prefix="rin-work-") as work:
        runtime_env = {"working_dir": work, "env_vars": trial_environment(config)}
        with connected(config.address, runtime_env):
            if config.address is None:  # a cluster may grow when it is asked to
                check_fits(resources(config), ray.nodes())
            yield


def trial_environment(config: StudyConfig) -> dict[str, str]:
    """Of every trial's process. A trial that asked for no GPU sees none, also on a machine that has one; on this
    machine it looks for the base model where this process does."""
    hidden = {} if gpus_of(config) else dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
    here = () if config.address is not None else ("RIN_CACHE", "XDG_CACHE_HOME")
    return {**TRIAL_ENVIRONMENT, **hidden, **{name: os.environ[name] for name in here if name in os.environ}}

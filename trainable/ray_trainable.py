"""A `Trial` inside Ray Tune: the only module here that imports ray.

A class trainable, because only its `cleanup` reliably runs when a trial is stopped early. A collapse arrives as a result with
`collapsed` = 1 and ends the trial; an exception means a bug or the machine, and Tune counts it as such.

What a trial has done lies in its own folder of the store and nowhere else, in files that anyone can read:

    outcome.json              how it ended, and every report; the trial is over and is never run again
    final.safetensors         the clean weights it ended with, those that are trained (`rin export --to checkpoint`)
    checkpoint-000012/        where it goes on, by whoever starts it next: a retry, another node, `rin resume`
    attempt-001.json          one process that worked on it: since when, last seen, how it ended
    stopped.json              evaluation of a trial that was stopped from outside, at its last step

So every start looks into the folder first, and a restarted trial continues bit for bit; Tune's own checkpoints, which it unpickles,
are not used. A checkpoint is written as often as takes 2 % of the time, at most once a step, by a thread of its own: training waits
for the copy of the state and not for the disk. When the disk is full the trial goes on without, and says so.

The final weights are written before the outcome. A trial that is killed between the two has no outcome yet: it goes on from its
checkpoint, ends in the same bits and writes both. The other way round it would be over, and nobody would ever write its weights.
"""

import gc
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ray import tune

from spaces.config import TrialConfig
from trainable.checkpoint import FINAL_FILE, newest_checkpoint, remove_checkpoints, save_checkpoint, save_final
from trainable.engine import TrialFailed
from trainable.folder import Folder
from trainable.trial import Outcome, StepReport, Trial
from trainable.watchdog import Watchdog

log = logging.getLogger(__name__)

OUTCOME_FILE, STOPPED_FILE = "outcome.json", "stopped.json"
VERSION = 1
CHECKPOINT_SHARE = 0.02  # of a trial's time


class RinTrainable(tune.Trainable):  # type: ignore[misc]
    """Its config is {"config": tree of TrialConfig, "arm": str, "replicate": int, "origin": str, "number": int, "folder": place of the
    trial}; the number is the arm's."""

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing that takes time or can fail: Tune tries a failed step again, and a failed start in a used process not."""
        self.settings = TrialConfig.model_validate(config["config"])
        self.folder = Folder(config["folder"])
        self.work: _Work | None = None
        self.over: bytes | None = None

    def step(self) -> dict[str, Any]:
        if self.work is None:
            self.over = self.folder.read(OUTCOME_FILE)
            if self.over is not None:  # by a process that died before Tune heard of it
                ended = json.loads(self.over)
                return with_outcome(ended["reports"][-1], ended["outcome"])
            self.work = _Work(self.folder, self.settings)
        return self.work.step()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in this process, which saves it the imports. It is built from its configuration alone, like the first one; of
        the last trial nothing is kept."""
        self.cleanup()
        self.work = None
        gc.collect()  # a model and its hooks refer to each other
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Runs on every ending but a killed process."""
        if self.work is not None:
            self.work.leave()


class _Work:
    """One process's work on one trial, from wherever the last one left it."""

    def __init__(self, folder: Folder, settings: TrialConfig) -> None:
        self.folder, self.settings = folder, settings
        self.attempt = _Attempt(folder)
        self.watchdog = Watchdog(settings.hang_seconds, self._hangs, self.attempt.beat)
        self.broken, self.ended = False, False
        self.failure = ("error", "")
        self.reports: list[dict[str, Any]] = []
        self.trial: Trial | None = None
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] = Future()
        self.writing.set_result(None)

    def step(self) -> dict[str, Any]:
        """Load where nothing is loaded yet, then one step of the trial."""
        self.broken = True  # until the step has returned
        try:
            trial = self.trial = self.trial or self._load()
            report = trial.step()
        except TrialFailed as failed:
            self.failure = (failed.rule, failed.reason)
            raise
        self.attempt.step = report.step + 1
        outcome = trial.outcome() if trial.done else None
        result = as_result(report)
        self.reports.append(result)
        self.watchdog.enter("save")
        if outcome is not None:
            self.writing.result()
            self._keep_weights(trial)  # first: once there is an outcome, nobody runs the trial again for its weights
            self.folder.write(OUTCOME_FILE, _ending(outcome, self.reports))
            self.attempt.end("outcome")
            self.ended = True
            trial.close()
            self.watchdog.stop()  # the process may wait for its next trial, on nobody's account
            self.writer.shutdown()
            remove_checkpoints(self.folder)
        elif self._save_is_due():
            self._save(trial)
        self.watchdog.enter("")
        self.broken = False
        return result if outcome is None else with_outcome(result, outcome.as_tree())

    def leave(self) -> None:
        """Stopped from outside. Saves first: whoever stops a trial may not wait for its evaluation."""
        try:
            if self.broken:
                rule, reason = self.failure
                self.attempt.end(rule, reason=reason)
            elif self.trial is not None and not self.ended:
                self.writing.result()
                if self.trial.so_far.next_step > self.saved_step:
                    self._save(self.trial)
                    self.writing.result()
                self.attempt.end("stopped")
                self.folder.write(STOPPED_FILE, _ending(self.trial.outcome(), self.reports))
                self.attempt.end("stopped")  # the evaluation took its time too
        except OSError as error:  # a full disk must not cost the next trial in this process
            log.warning("%s: its evaluation at the stop is lost: %s", self.folder.uri, error)
        finally:
            if self.trial is not None and not self.ended:
                self.trial.close()
            self.writer.shutdown()
            self.watchdog.stop()

    def _load(self) -> Trial:
        self.watchdog.enter("load")
        trial = Trial(self.settings, on_phase=self.watchdog.enter)
        state, passed = newest_checkpoint(self.folder)
        for line in passed:
            log.warning("%s: %s", self.folder.uri, line)
        if state is not None:
            trial.load_state_dict(state)
            self.reports = list(state["reports"])
        self.attempt.ready(first_step=trial.so_far.next_step, damaged=passed)
        self.folder.remove(STOPPED_FILE)  # of an earlier step
        self.saved_at, self.saving_seconds, self.saved_step = time.monotonic(), 0.0, trial.so_far.next_step
        return trial

    def _save_is_due(self) -> bool:
        """Raises what went wrong in the last write, other than a full disk."""
        if not self.writing.done():
            return False
        self.writing.result()
        return time.monotonic() - self.saved_at >= self.saving_seconds / CHECKPOINT_SHARE

    def _save(self, trial: Trial) -> None:
        started, step = time.monotonic(), trial.so_far.next_step
        state = {**trial.state_dict(), "reports": list(self.reports)}
        self.writing = self.writer.submit(self._write, step, state, started)

    def _write(self, step: int, state: dict[str, Any], started: float) -> None:
        """In the writer's thread."""
        try:
            save_checkpoint(self.folder, step, state)
        except OSError as error:  # a full disk: training is worth more than its insurance, and the last checkpoint is still there
            log.warning("%s: no checkpoint of step %d: %s", self.folder.uri, step, error)
        else:
            self.saved_step = step
        self.saved_at = time.monotonic()
        self.saving_seconds = self.saved_at - started

    def _keep_weights(self, trial: Trial) -> None:
        try:
            save_final(self.folder, trial.policy.trainable())
        except OSError as error:  # a full disk: the outcome is what the sweep is about
            log.warning("%s: no %s, so this trial cannot be exported as a checkpoint: %s", self.folder.uri, FINAL_FILE, error)

    def _hangs(self, phase: str, seconds: float, stacks: str) -> None:
        log.error("phase %s took over %.0f s\n%s", phase, seconds, stacks)
        step = self.trial.so_far.next_step if self.trial is not None else 0
        self.attempt.end("hang", reason=f"step {step}: phase {phase} took over {seconds:.0f} s", stacks=stacks)


class _Attempt:
    """attempt-K.json: one process's work on a trial. What cannot be written is only missing in the ledger."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        number = sum(bool(re.fullmatch(r"attempt-\d+\.json", name)) for name in folder.names()) + 1
        self._name = f"attempt-{number:03d}.json"
        self._values: dict[str, Any] = {"started": time.time(), "host": socket.gethostname(), "ended": ""}
        self.step = 0
        self._lock = threading.Lock()  # the watchdog's thread beats too
        self.beat()

    def ready(self, *, first_step: int, damaged: list[str]) -> None:
        """Loaded; `damaged`: a line for each checkpoint that had to be passed over."""
        self.step = first_step
        loading = time.time() - self._values["started"]
        self._values |= {"first_step": first_step, "loading_seconds": loading, "damaged": damaged}
        self.beat()

    def end(self, how: str, **more: str) -> None:
        self._values |= {"ended": how, **more}
        self.beat()

    def beat(self) -> None:
        with self._lock:
            self._values |= {"seen": time.time(), "step": self.step}
            try:
                self._folder.write(self._name, json.dumps(self._values))
            except OSError as error:
                log.warning("%s: %s: %s", self._folder.uri, self._name, error)


def _ending(outcome: Outcome, reports: list[dict[str, Any]]) -> str:
    return json.dumps({"version": VERSION, "outcome": outcome.as_tree(), "reports": reports})


def as_result(report: StepReport) -> dict[str, Any]:
    """A flat Tune result: metrics by tracked name, and what belongs to the step."""
    return {
        "step": report.step,
        "seconds": report.seconds,
        "time_ms": time.time_ns() // 1_000_000,
        "collapsed": 0,
        "rule": report.verdict.rule,
        "evidence": report.verdict.evidence,
        "samples": list(report.samples),
        **report.signals,
        "rin/steps_done": float(report.step + 1),
    }


def with_outcome(result: Mapping[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The last result of a trial: its last step, and how it ended."""
    return {
        **result,
        "outcome": outcome,
        "collapsed": int(outcome["outcome"] == "collapsed"),
        "accuracy": outcome["eval"]["accuracy"],
        "done": True,
    }

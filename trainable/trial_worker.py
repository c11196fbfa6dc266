"""One process's work on one trial: load, step by step, save, and write down how it ended.

What a trial has done lies in its own folder of the store and nowhere else (`trial_folder.py`). So every start looks
into the folder first, and a restarted trial continues bit for bit; Tune's own checkpoints, which it unpickles, are not
used. A checkpoint is written as often as takes 2 % of the time, at most once a step, by a thread of its own: training
waits for the copy of the state and not for the disk. When the disk is full the trial goes on without, and says so.

The final weights are written before the outcome. A trial that is killed between the two has no outcome yet: it goes on
from its checkpoint, ends in the same bits and writes both. The other way round it would be over, and nobody would ever
write its weights.
"""

import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

from spaces.config import TrialConfig
from trainable import prefix
from trainable.disk.checkpoint import newest_checkpoint, remove_checkpoints, save_checkpoint, save_final
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import (
    ANSWERS_FILE,
    FINAL_FILE,
    PREFIXES,
    STOPPED_FILE,
    AttemptLog,
    write_answers,
    write_outcome,
)
from trainable.disk.watchdog import Watchdog
from trainable.failure import TrialFailed
from trainable.following import SCANS
from trainable.outcome import Outcome, StepReport
from trainable.tasks.code import bring
from trainable.team import Team
from trainable.trial import Trial

log = logging.getLogger(__name__)
T = TypeVar("T")

_OF_SWEEP = re.compile(r"/trials/([^/?]+)(?=\?|$)")
CHECKPOINT_SHARE = 0.02  # of a trial's time
NEAR_BEAT_SECONDS = 2.0
"""Between two signs of life in a folder: 0.2 ms of a thread that waits. An object store wants to be paid for more."""


class Others(Protocol):
    """The processes that compute a trial together with this one, which drives it."""

    @property
    def team(self) -> Team:
        """This process among them."""

    def join(self) -> None:
        """They are there from now on."""

    def all(self, call: str, own: Callable[[], T], *given: object) -> T:
        """What this process calls `own` and they by that name, at the same time."""

    def leave(self) -> None:
        """They are gone from now on."""


class Nobody:
    """This process computes the trial alone."""

    def __init__(self, settings: TrialConfig) -> None:
        self.team = Team(0, 1, settings.parallel.ranks)

    def join(self) -> None: ...

    def all(self, call: str, own: Callable[[], T], *given: object) -> T:
        return own()

    def leave(self) -> None: ...


class TrialWorker:
    """One process's work on one trial, from wherever the last one left it."""

    def __init__(
        self, folder: Folder, settings: TrialConfig, others: Others | None = None, slots: float | None = None
    ) -> None:
        self.folder, self.settings = folder, settings
        self.others = others or Nobody(settings)
        self.attempt = AttemptLog(folder, slots)
        beat = None if folder.local is None else NEAR_BEAT_SECONDS
        self.watchdog = Watchdog(settings.hang_seconds, self._hangs, self.attempt.beat, beat)
        self.broken, self.ended = False, False
        self.reports: list[StepReport] = []
        self.untold: list[StepReport] = []  # of steps that were taken over
        self.beginnings: Folder | None = None  # where this trial's is for others
        self.trial: Trial | None = None
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] = Future()
        self.writing.set_result(None)

    def step(self) -> tuple[StepReport, Outcome | None]:
        """Load where nothing is loaded yet, then one step of the trial: its report, and the outcome where it was the
        last. What it breaks by is written down before Tune, and so the sweep, hears of it."""
        self.broken = True  # until the step has returned
        try:
            result = self._step()
        except TrialFailed as failed:
            self.attempt.end(failed.rule, reason=failed.reason)
            raise
        except Exception as error:
            self.attempt.end("error", reason=f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        self.broken = False
        return result

    def _step(self) -> tuple[StepReport, Outcome | None]:
        trial = self.trial = self.trial or self._load()
        if self.untold:
            self.watchdog.enter("")
            report = self.untold.pop(0)
            self.attempt.stepped(report)
            return report, None
        if self.beginnings is not None and not trial.begun:
            trial.begin()
            self._share(trial)
        report = self.others.all("step", trial.step)
        self.attempt.stepped(report)
        outcome = self.others.all("outcome", trial.outcome) if trial.done else None
        self.reports.append(report)
        self.watchdog.enter("save")
        if outcome is not None:
            self.writing.result()
            self._keep_weights(trial)  # first: once there is an outcome, nobody runs the trial again for its weights
            self._keep_answers(trial)
            write_outcome(self.folder, outcome, self.reports)
            self.attempt.end("outcome")
            self.ended = True
            trial.close()
            self.others.leave()
            self.watchdog.stop()  # the process may wait for its next trial, on nobody's account
            self.writer.shutdown()
            remove_checkpoints(self.folder)
        else:
            self._share(trial)
            if self._save_is_due():
                self._save(trial)
        self.watchdog.enter("")
        return report, outcome

    def leave(self) -> None:
        """Stopped from outside. Saves first: whoever stops a trial may not wait for its evaluation."""
        try:
            if self.broken:
                self.attempt.end_once("error", "its step was cut off")
            elif self.trial is not None and not self.ended:
                self.writing.result()
                if self.trial.so_far.next_step > self.saved_step:
                    self._save(self.trial)
                    self.writing.result()
                self.attempt.end("stopped")
                outcome = self.others.all("outcome", self.trial.outcome)
                self._keep_answers(self.trial)
                write_outcome(self.folder, outcome, self.reports)
                self.attempt.end("stopped")  # the evaluation took its time too
        except OSError as error:  # a full disk must not cost the next trial in this process
            log.warning("%s: its evaluation at the stop is lost: %s", self.folder.uri, error)
        finally:
            if self.trial is not None and not self.ended:
                self.trial.close()
            self.others.leave()
            self.writer.shutdown()
            self.watchdog.stop()

    def _load(self) -> Trial:
        self.watchdog.enter("load")
        self.others.join()
        team, hears = self.others.team, self.watchdog.enter
        trial = self.others.all("load", lambda: make_trial(self.folder, self.settings, team, hears))
        state, passed = newest_checkpoint(self.folder)
        resumed = state is not None
        if state is None and (name := self._name) is not None and self.settings.parallel.ranks == 1:
            self.beginnings = _of_the_sweep(self.folder, PREFIXES) / prefix.key_of(trial)
            state, damaged = prefix.find(self.beginnings, name, trial)
            passed += damaged
        for line in passed:
            log.warning("%s: %s", self.folder.uri, line)
        if state is not None:
            step = state["progress"]["so_far"]["next_step"]
            self.others.all("load_state_dict", partial(trial.load_state_dict, state), step)
            self.reports = [StepReport.from_record(record) for record in state["reports"]]
        self.untold = [] if resumed else list(self.reports)
        self.saved_step = trial.so_far.next_step if resumed else 0
        self.attempt.ready(first_step=self.saved_step, damaged=passed, shared=trial.so_far.shared)
        self.folder.remove(STOPPED_FILE)  # of an earlier step
        self.saved_at, self.saving_seconds = time.monotonic(), 0.0
        return trial

    @property
    def _name(self) -> str | None:
        """Of the trial in its sweep; None of one that is in no sweep."""
        found = _OF_SWEEP.search(self.folder.uri)
        return None if found is None else found[1]

    def _share(self, trial: Trial) -> None:
        """Where others may go on otherwise, write down how far it is; training waits for the copy of the state."""
        if self.beginnings is None or self._name is None or not prefix.wanted(self.beginnings, trial):
            return
        self.writing.result()  # before another copy of the state is made
        state = prefix.give(self._name, trial, self.reports)
        self.writing = self.writer.submit(prefix.keep, self.beginnings, state)

    def _save_is_due(self) -> bool:
        """Raises what went wrong in the last write, other than a full disk."""
        if not self.writing.done():
            return False
        self.writing.result()
        return time.monotonic() - self.saved_at >= self.saving_seconds / CHECKPOINT_SHARE

    def _save(self, trial: Trial) -> None:
        started, step = time.monotonic(), trial.so_far.next_step
        state = self.others.all("state_dict", trial.state_dict)
        state = {**state, "reports": [report.as_record() for report in self.reports]}
        self.writing = self.writer.submit(self._write, step, state, started)

    def _write(self, step: int, state: dict[str, Any], started: float) -> None:
        """In the writer's thread."""
        try:
            save_checkpoint(self.folder, step, state)
        except OSError as error:  # a full disk: training is worth more than its insurance; the last one is still there
            log.warning("%s: no checkpoint of step %d: %s", self.folder.uri, step, error)
        else:
            self.saved_step = step
        self.saved_at = time.monotonic()
        self.saving_seconds = self.saved_at - started

    def _keep_weights(self, trial: Trial) -> None:
        try:
            save_final(self.folder, trial.final)
        except OSError as error:  # a full disk: the outcome is what the sweep is about
            log.warning(
                "%s: no %s, so this trial cannot be exported as a checkpoint: %s", self.folder.uri, FINAL_FILE, error
            )

    def _keep_answers(self, trial: Trial) -> None:
        try:
            write_answers(self.folder, trial.answers())
        except OSError as error:  # as of the weights: which were right is in the outcome
            log.warning("%s: no %s: %s", self.folder.uri, ANSWERS_FILE, error)

    def _hangs(self, phase: str, seconds: float, stacks: str) -> None:
        log.error("phase %s took over %.0f s\n%s", phase, seconds, stacks)
        step = self.trial.so_far.next_step if self.trial is not None else 0
        self.attempt.end("hang", reason=f"step {step}: phase {phase} took over {seconds:.0f} s", stacks=stacks)


def make_trial(
    folder: Folder, settings: TrialConfig, team: Team, on_phase: Callable[[str], None] = lambda phase: None
) -> Trial:
    """On every process that computes it, with what its sweep keeps for it."""
    bring(settings.task, _of_the_sweep(folder, "code"))
    return Trial(settings, on_phase=on_phase, scans=_of_the_sweep(folder, SCANS), team=team)


def _of_the_sweep(trial: Folder, name: str) -> Folder:
    return Folder(_OF_SWEEP.sub(f"/{name}", trial.uri))

"""A trial's folder in the store: what a trial writes there and what anyone reads, side by side.

    outcome.json              how it ended, and every report; the trial is over and is never run again
    final.safetensors         the clean weights it ended with, those that are trained (`rin export --to checkpoint`)
    checkpoint-000012/        where it goes on, by whoever starts it next: a retry, another node, `rin resume`
                              (`checkpoint.py`)
    attempt-001.json          one process that worked on it: since when, last seen, how it ended
    answers.json              what it answered to each question of its evaluation, as a table
    stopped.json              evaluation of a trial that was stopped from outside, at its last step

A trial writes these itself, so they are there whether or not a driver heard of them. It is over when it has an outcome;
stopped, failed or killed, it has steps to go. Plain JSON, read without torch and without Ray.
"""

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from pydantic import TypeAdapter

from spaces.config import ConfigError
from trainable.disk.folder import Folder
from trainable.failure import FAILURES
from trainable.metrics import ACCURACY, ENTROPY, GIBBERISH, REWARD, SIGMA
from trainable.outcome import Answers, Outcome, Shared, Status, StepReport
from trainable.versions import versions

log = logging.getLogger(__name__)

VERSION = 2
OUTCOME_FILE, STOPPED_FILE = "outcome.json", "stopped.json"
ANSWERS_FILE = "answers.json"
FINAL_FILE, PROGRESS_FILE = "final.safetensors", "progress.json"
PREFIXES = "prefixes"
"""Of a sweep: beginnings that its trials share (`prefix.py`)."""
DIED, KILLED = "died", "killed"
"""How an attempt ended that could not say so itself. died: its process was killed, and the sweep did not start the
trial again; killed: with the driver before this one."""
SHOWN = (SIGMA, REWARD, ENTROPY, GIBBERISH, ACCURACY)
"""What an attempt's file tells of its last steps, for whoever watches."""
RECENT = 40
"""How many steps that are: those between two signs of life, unless a step takes less than a quarter of a second."""
Parsed = TypeVar("Parsed")
_ATTEMPT_FILE = re.compile(r"attempt-(\d+)\.json")
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")


# --- how it ended -----------------------------------------------------------------------------------------------------


def write_outcome(trial: Folder, outcome: Outcome, reports: Sequence[StepReport]) -> None:
    """The trial is over, or was stopped from outside, and this is what it had come to. Raises OSError."""
    records = [report.as_record() for report in reports]
    ending = json.dumps({"version": VERSION, "outcome": outcome.as_tree(), "reports": records})
    trial.write(STOPPED_FILE if outcome.outcome == "stopped" else OUTCOME_FILE, ending)


def write_answers(trial: Folder, answers: Answers) -> None:
    """Raises OSError."""
    trial.write(ANSWERS_FILE, json.dumps(answers.as_table(), ensure_ascii=False))


def read_outcome(trial: Folder) -> Outcome | None:
    """How a trial ended; None while it has steps to go. Raises ConfigError for a damaged file."""
    return _read_ending(trial, OUTCOME_FILE, _outcome_of)


def read_stopped(trial: Folder) -> Outcome | None:
    """Evaluation of a trial that was stopped from outside; None where there is none. Raises ConfigError for a damaged
    file."""
    return _read_ending(trial, STOPPED_FILE, _outcome_of)


def read_reports(trial: Folder) -> list[StepReport]:
    """What a trial has reported, as far as it is safe on disk, in order. Raises ConfigError for a damaged outcome."""
    reports = _read_ending(trial, OUTCOME_FILE, _reports_of)
    if reports is not None:
        return reports
    for name in checkpoints(trial):
        try:
            _, values = progress_parts((trial / name).read(PROGRESS_FILE) or b"")
            return _reports_of(json.loads(values))
        except (ValueError, KeyError, TypeError):
            continue  # unfinished or damaged: the one before it is what the trial goes on from, too
    return []


def _outcome_of(tree: Mapping[str, Any]) -> Outcome:
    return Outcome.from_tree(tree["outcome"])


def _reports_of(tree: Mapping[str, Any]) -> list[StepReport]:
    return [StepReport.from_record(record) for record in tree["reports"]]


def _read_ending(trial: Folder, name: str, parse: Callable[[Any], Parsed]) -> Parsed | None:
    text = trial.read(name)
    if text is None:
        return None
    try:
        tree = json.loads(text)
        version = tree["version"]
        if version == VERSION:
            return parse(tree)
    except ConfigError as error:  # a ValueError, too: a configuration that this version does not take
        raise ConfigError(f"{trial.uri}/{name}: {error}; use the program that wrote it") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{trial.uri}/{name}: is damaged (not the JSON of an ending); remove it, and rin resume runs the trial "
            "again"
        ) from None
    raise ConfigError(
        f"{trial.uri}/{name}: written by version {version}, this program reads {VERSION}; use the program that wrote it"
    )


# --- checkpoints, as far as they can be read without torch ------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    """Of a trial after so many steps."""
    return f"checkpoint-{step:06d}"


def checkpoints(trial: Folder) -> list[str]:
    """Names, newest first."""
    return _numbered(trial, _CHECKPOINT)[::-1]


def _numbered(trial: Folder, names: re.Pattern[str]) -> list[str]:
    """Those that match, in order: digits sort as numbers, not as text."""
    found = [match for name in trial.names() if (match := names.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: int(match[1]))]


def progress_text(head: Mapping[str, Any], values: str) -> str:
    """Of a checkpoint's `progress.json`: a line with version and checksums, a line with the values that they are of."""
    return f"{json.dumps(head)}\n{values}\n"


def progress_parts(text: bytes) -> tuple[bytes, bytes]:
    """(head, values) of what `progress_text` wrote."""
    head, _, values = text.rstrip(b"\n").partition(b"\n")
    return head, values


# --- attempts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One process's work on one trial."""

    started: float
    """Unix seconds."""
    seen: float
    """Unix seconds; of a killed process up to 10 s before its end."""
    step: int
    """Steps done at its last sign of life."""
    ended: str
    """outcome | stopped | error | died | killed | hang | engine | rollout_mismatch, or empty: killed, or it runs."""
    reason: str = ""
    loading_seconds: float = 0.0
    """Until it was ready for its first step."""
    slots: float | None = None
    """That an hour of it counts: the GPUs it held, 1 where it had none; None where an earlier version did not write it
    down."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the programs it ran; empty where an earlier version did not write them down."""
    shared: Shared | None = None
    """What of the trial, as this process had it, another trial has computed."""
    recent: tuple[Mapping[str, Any], ...] = ()
    """Records of its last steps, of the signals SHOWN alone: a checkpoint, which has them all, may be an hour old."""

    @property
    def hours(self) -> float:
        return max(self.seen - self.started, 0.0) / 3600

    def slot_hours(self, now: float) -> float:
        """GPU hours, or trial-slot hours; of an attempt that does not say how many slots it held, by those of now."""
        return self.hours * (now if self.slots is None else self.slots)


_ATTEMPT = TypeAdapter(Attempt)


class AttemptLog:
    """attempt-K.json: one process's work on a trial. What cannot be written is only missing in the ledger."""

    def __init__(self, trial: Folder, slots: float | None = None) -> None:
        self._trial = trial
        number = len(_numbered(trial, _ATTEMPT_FILE)) + 1
        self._name = f"attempt-{number:03d}.json"
        self._values: dict[str, Any] = {"started": time.time(), "host": socket.gethostname(), "ended": ""}
        self._values |= {"slots": slots, "versions": versions()}
        self.step = 0
        self.recent: tuple[Mapping[str, Any], ...] = ()
        self._lock = threading.Lock()  # the watchdog's thread beats too
        self.beat()

    def ready(self, *, first_step: int, damaged: Sequence[str], shared: Shared | None) -> None:
        """Loaded; `damaged`: a line for each checkpoint, and each beginning of others, that had to be passed over."""
        self.step = first_step
        loading = time.time() - self._values["started"]
        self._values |= {"first_step": first_step, "loading_seconds": loading, "damaged": list(damaged)}
        self._values["shared"] = None if shared is None else asdict(shared)
        self.beat()

    def stepped(self, report: StepReport) -> None:
        """Written with the next sign of life: a step must not wait for a file of a far store."""
        self.step = report.step + 1
        self.recent = (*self.recent[1 - RECENT :], _shown(report))

    def end(self, how: str, **more: str) -> None:
        self._values |= {"ended": how, **more}
        self.beat()

    def end_once(self, how: str, reason: str) -> None:
        """`end`, unless an ending stands there already."""
        if not self._values["ended"]:
            self.end(how, reason=reason)

    def beat(self) -> None:
        with self._lock:
            self._values |= {"seen": time.time(), "step": self.step, "recent": self.recent}
            try:
                self._trial.write(self._name, json.dumps(self._values))
            except OSError as error:
                log.warning("%s: %s: %s", self._trial.uri, self._name, error)


def _shown(report: StepReport) -> Mapping[str, Any]:
    signals = {name: report.signals[name] for name in SHOWN if name in report.signals}
    return replace(report, signals=signals, samples=()).as_record()


def read_attempts(trial: Folder) -> list[Attempt]:
    """In order. A file that cannot be read counts as no time."""
    attempts = []
    for name in _numbered(trial, _ATTEMPT_FILE):
        with suppress(ValueError):
            attempts.append(_ATTEMPT.validate_json(trial.read(name) or b""))
    return attempts


def end_attempt(trial: Folder, how: str) -> None:
    """Write down, for a process that is gone and could not, how the last attempt ended. Nothing happens when it has an
    ending."""
    names = _numbered(trial, _ATTEMPT_FILE)
    tree: dict[str, Any] = json.loads(trial.read(names[-1]) or b"{}") if names else {}
    if tree and not tree["ended"]:
        trial.write(names[-1], json.dumps({**tree, "ended": how, "reason": "its process was killed"}))


# --- all of it together -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialState:
    """Where a trial stands.

    Example: TrialState(status="failed", rule="hang", reason="step 3: phase rollout took over 900 s (3 attempts)", ...)
    """

    status: Status
    rule: str = ""
    """Of the collapse, or of the failure."""
    reason: str = ""
    """Of a failure, in one line."""
    outcome: Outcome | None = None
    """Final; of a stopped trial its evaluation at the stop."""
    attempts: tuple[Attempt, ...] = ()

    @property
    def step(self) -> int:
        """Steps done."""
        if self.outcome is not None:
            return self.outcome.step
        return self.attempts[-1].step if self.attempts else 0

    @property
    def hours(self) -> float:
        """In which some process worked on it."""
        return sum(attempt.hours for attempt in self.attempts)

    def slot_hours(self, now: float) -> float:
        return sum(attempt.slot_hours(now) for attempt in self.attempts)


def read_trial(trial: Folder, *, driven: bool, outcome: Outcome | None = None) -> TrialState:
    """`driven`: a process runs the sweep now. `outcome`: where it has been read already. Raises ConfigError for a
    damaged one."""
    attempts = tuple(read_attempts(trial))
    outcome = outcome or read_outcome(trial)
    if outcome is not None:
        return TrialState(status=outcome.outcome, rule=outcome.rule, outcome=outcome, attempts=attempts)
    if not attempts:
        return TrialState(status="waiting")
    last = attempts[-1]
    if last.ended == "stopped":
        return TrialState(status="stopped", outcome=read_stopped(trial), attempts=attempts)
    if last.ended in ("", KILLED):
        if driven:
            return TrialState(status="waiting" if last.ended else "running", attempts=attempts)
        return TrialState(status="stopped", reason="its process was killed", attempts=attempts)
    again = f" ({len(attempts)} attempts)" if len(attempts) > 1 else ""
    rule = last.ended if last.ended in FAILURES else ""
    return TrialState(status="failed", rule=rule, reason=f"{last.reason}{again}", attempts=attempts)

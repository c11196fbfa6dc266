"""Rewards that the user brought along, on the trial's side of a process boundary (`worker.py` is the other side).

User code hangs, crashes its interpreter, prints megabytes, forks, changes directory, seeds generators and sets threads.
All of that happens in a process of its own, which is started like any program (not forked), asked one call at a time,
and given a limit for each call. One that ends or is late is started again once and asked the same again; the second
time the trial fails, with rule `reward`. What the user's code raises, or gives that is no mark, is the user's mistake:
an error with file, line and the row, never a zero.

What is printed there is drained and forgotten, but for the last line, which is told when the process ends.
"""

import contextlib
import json
import logging
import math
import os
import pickle
import re
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from spaces.config import ConfigError, TaskConfig
from trainable.failure import TrialFailed
from trainable.metrics import EVAL, METRICS
from trainable.tasks import worker
from trainable.tasks.code import at_hand
from trainable.tasks.task import Answer, Question, Task
from trainable.tasks.worker import LENGTH

log = logging.getLogger(__name__)

Convention = Literal["verl", "trl", "verifiers", "python"]

_LONGEST_REPLY = 1 << 28
_LOOK_SECONDS = 0.1
_ROUNDING = 1e-9
_START_SECONDS = 120.0
"""Longest time to load the user's code, which may import much."""
_KEPT_OUTPUT = 2000
"""Bytes of what was printed last."""


class WorkerDied(Exception):
    """It ended or did not answer in time; it may be started again."""


class Worker:
    """A process that answers one call at a time."""

    def __init__(self) -> None:
        asked, self._requests = os.pipe()
        self._replies, answers = os.pipe()
        life, self._life = os.pipe()
        self._output, printed = os.pipe()
        theirs = (asked, answers, life)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", worker.__file__, *map(str, theirs)],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,  # Ctrl-C is for the trial, which then ends it
                env=os.environ | {"PYTHONHASHSEED": "0"},
            )
        finally:
            for end in (*theirs, printed):
                os.close(end)
        for end in (self._requests, self._replies, self._output):
            os.set_blocking(end, False)
        self._printed = b""
        ours = (self._requests, self._replies, self._life, self._output)
        self._end = weakref.finalize(self, _end, self._process, ours)

    def ask(self, call: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """Raises WorkerDied, after which it is gone."""
        body = pickle.dumps({"call": call, "arguments": arguments})
        try:
            reply = json.loads(self._exchange(LENGTH.pack(len(body)) + body, seconds))
        except (OSError, EOFError, ValueError) as error:  # a pipe that is closed, an answer that is none
            reason = str(error) if isinstance(error, TimeoutError) else self._last_words()
            self.close()
            raise WorkerDied(f"{reason} in {call}") from None
        if not isinstance(reply, dict) or not reply.keys() & {"value", "mistake"}:
            self.close()
            raise WorkerDied(f"its answer to {call} is none")
        return reply

    def close(self) -> None:
        """End it and all that it has started."""
        self._end()

    def _exchange(self, message: bytes, seconds: float) -> bytes:
        """Write, read and drain at once: whoever waits for the other side to read would wait for ever."""
        until, reply = time.monotonic() + seconds, b""
        while True:
            writing = [self._requests] if message else []
            readable, writable, _ = select.select([self._replies, self._output], writing, [], _LOOK_SECONDS)
            if self._output in readable:
                self._printed = (self._printed + _read(self._output))[-_KEPT_OUTPUT:]
            if writable:
                with contextlib.suppress(BlockingIOError):
                    message = message[os.write(self._requests, message) :]
            if self._replies in readable:
                part = _read(self._replies)
                reply += part
                if len(reply) >= LENGTH.size and LENGTH.unpack(reply[: LENGTH.size])[0] > _LONGEST_REPLY:
                    raise ValueError
                if len(reply) >= LENGTH.size and len(reply) - LENGTH.size >= LENGTH.unpack(reply[: LENGTH.size])[0]:
                    return reply[LENGTH.size :]
                if not part:
                    raise EOFError
            elif self._process.poll() is not None:
                raise EOFError
            if time.monotonic() > until:
                raise TimeoutError(f"it took over {seconds:g} s")

    def _last_words(self) -> str:
        """Of a worker that has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        with contextlib.suppress(OSError):
            self._printed += _read(self._output)
        code = self._process.poll()
        lines = self._printed.decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"it ended with exit code {code}" + (f" ({said[-200:]})" if said else "")


def _read(end: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(end, 1 << 16)
    return b""


def _end(process: "subprocess.Popen[bytes]", ends: Sequence[int]) -> None:
    """Closing its pipes tells the guard, which ends whatever is left."""
    for end in ends:
        os.close(end)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(slots=True, kw_only=True)
class ForeignReward:
    """A reward in a worker, which is started when it is first needed; `Task.reward`."""

    convention: Convention
    config: TaskConfig
    functions: tuple[str, ...]
    hashes: tuple[str, ...] = ()
    """Of each function: the sha256 of its file; known once it is open."""
    deaths: list[str] = field(default_factory=list)
    _worker: Worker | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of each function: its mark. A name that an earlier one has gets a number."""
        names: list[str] = []
        for written in self.functions:
            name = written.rpartition(":")[2]
            names.append(f"{name}_{names.count(name) + 1}" if name in names else name)
        return tuple(names)

    @property
    def weights(self) -> dict[str, float]:
        weights = self.config.reward_weights or (1.0,) * len(self.functions)
        return dict(zip(map(metric_name, self.names), weights, strict=True))

    @property
    def judges(self) -> dict[str, float]:
        """In their order: the first that applies to an answer decides."""
        return dict.fromkeys(map(metric_name, self.names), self.config.correct_at - _ROUNDING)

    def __call__(self, answers: Sequence[Answer]) -> list[dict[str, float | None]]:
        """Raises ConfigError for what the user's code gets wrong, TrialFailed when its process died twice."""
        rows = {id(answer.question): answer.question for answer in answers}
        numbers = {key: number for number, key in enumerate(rows)}
        marks = self._ask(
            "score",
            answers,
            rows=[_row(question, self.convention) for question in rows.values()],
            asked=[(numbers[id(answer.question)], answer.text, answer.ids) for answer in answers],
        )
        if not isinstance(marks, list) or len(marks) != len(answers):
            raise ConfigError(
                f"task.reward: {', '.join(self.functions)} gave no marks for {len(answers)} answers; mend it"
            )
        return [self._checked(own, answer) for own, answer in zip(marks, answers, strict=True)]

    def _checked(self, marks: Mapping[str, Any], answer: Answer) -> dict[str, float | None]:
        """Raises ConfigError for a mark that is not finite, and for an answer that no function has marked."""
        for name, mark in marks.items():
            if mark is not None and not math.isfinite(mark):
                raise ConfigError(f"task.reward: {name} is {mark}{_of(answer)}; give a finite number")
        if all(marks[name] is None for name in self.names):
            raise ConfigError(f"task.reward: {', '.join(self.names)} gave None{_of(answer)}: nothing marks it; mend it")
        tracked = {metric_name(name): mark for name, mark in marks.items()}
        if len(tracked) < len(marks):
            raise ConfigError(
                f"task.reward: two of the marks {', '.join(marks)} would be tracked under one name ("
                f"{', '.join(tracked)}); call one of them otherwise"
            )
        return tracked

    def call(self, function: str, *arguments: Any) -> Any:
        """What another function of the first file gives, as JSON can hold it."""
        return self._ask("call", (), function=function, arguments=arguments)

    def open(self) -> None:
        """Load the functions. Raises ConfigError where one is not there, or its file is not the one that it was."""
        if self._worker is None:
            self._insist(self._start)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _start(self) -> None:
        started = Worker()
        try:
            seconds = max(self.config.reward_timeout_seconds, _START_SECONDS)
            options = dict(self.config.reward_options)
            known = (*self.config.reward_sha256, *[""] * len(self.functions))
            functions = list(zip(self.names, map(at_hand, self.functions, known), strict=False))
            reply = started.ask("open", seconds, convention=self.convention, functions=functions, options=options)
            self.hashes = tuple(self._value(reply, ()))
            self._check_unchanged()
        except BaseException:
            started.close()
            raise
        self._worker = started

    def _check_unchanged(self) -> None:
        for written, was, now in zip(self.functions, self.config.reward_sha256, self.hashes, strict=False):
            if was != now:
                raise ConfigError(
                    f"task.reward={written}: its file has changed (sha256 {now[:12]}, and {was[:12]} when this began); "
                    "put it back, or begin anew"
                )

    def _ask(self, call: str, answers: Sequence[Answer], **arguments: Any) -> Any:
        def ask() -> dict[str, Any]:
            if self._worker is None:
                self._start()
            assert self._worker is not None
            return self._worker.ask(call, self.config.reward_timeout_seconds, **arguments)

        return self._value(self._insist(ask), answers)

    def _insist(self, attempt: Any) -> Any:
        while True:
            try:
                return attempt()
            except WorkerDied as death:
                self._worker = None
                self.deaths.append(str(death))
                if len(self.deaths) > 1:
                    told = "; then, started again, ".join(self.deaths[-2:])
                    raise TrialFailed("reward", f"the process of {', '.join(self.functions)} died: {told}") from None
                log.warning("the process of the reward died (%s); it is started again", death)

    def _value(self, reply: Mapping[str, Any], answers: Sequence[Answer]) -> Any:
        if "value" in reply:
            return reply["value"]
        row = reply["row"]
        raise ConfigError(f"task.reward: {reply['mistake']}{'' if row is None else _of(answers[row])}; mend it")


def with_reward(task: Task, config: TaskConfig) -> Task:
    """A task of ours that is learned by the user's rewards. Its own marks are logged, and go on telling right from
    wrong."""
    foreign, own = ForeignReward(convention="python", config=config, functions=config.reward), task.reward

    def reward(answers: Sequence[Answer]) -> list[Mapping[str, float | None]]:
        return [_joined(theirs, ours, task.name) for theirs, ours in zip(foreign(answers), own(answers), strict=True)]

    return replace(task, reward=reward, weights=foreign.weights, foreign=foreign)


def _joined(
    theirs: Mapping[str, float | None], ours: Mapping[str, float | None], task: str
) -> Mapping[str, float | None]:
    if both := sorted(theirs.keys() & ours.keys()):
        raise ConfigError(
            f"task.reward: {both[0]} is a mark of task.name={task} itself; give the function another name"
        )
    return {**theirs, **ours}


def _of(answer: Answer) -> str:
    return f" (of the answer {answer.text[:40]!r} to {answer.question.name})"


def metric_name(mark: str) -> str:
    """As it can be tracked: `f1@10` -> `f1_10`, and `accuracy`, which is the judge's, -> `accuracy_mark`."""
    plain = re.sub(r"[^\w./: -]", "_", mark, flags=re.ASCII) or "_"
    return f"{plain}_mark" if f"{EVAL}{plain}" in METRICS or plain.endswith("_start") else plain


def _row(question: Question, convention: Convention) -> dict[str, Any]:
    """What the user's functions see of a question; TRL's see the columns of its row, and no others."""
    messages = [{"role": role, "content": content} for role, content in question.messages]
    known = {} if convention == "trl" else {"answer": question.answer}
    return {"prompt": messages or question.prompt, **known, **question.entry}

"""Signals: each is a first Ctrl-C, none tears what must not be torn, and a pipe that closes costs nothing."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dashboards.lasting import lasting_output
from search.interruption import SIGNALS, interruptible
from search.ray_internals import trials_leave_in_their_time


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    assert [(number, signal.getsignal(number)) for number in SIGNALS] == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.sigpending()  # a call in which Python runs handlers


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_is_passed_on_and_ends_nothing(number: int) -> None:
    taken: list[int] = []
    with interruptible() as interruption, interruption.passed_on(lambda: taken.append(1)):
        send(number)
        assert taken == [1]
        assert interruption.asked
        if number != signal.SIGINT:
            send(number)  # a batch system may say it twice


def test_a_handler_that_ray_s_start_leaves_behind_is_replaced() -> None:
    taken: list[int] = []
    with interruptible() as interruption:
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("Ray ends the process"))
        interruption.listen()
        with interruption.passed_on(lambda: taken.append(1)):
            send(signal.SIGTERM)
    assert taken == [1]


def test_a_second_ctrl_c_does_not_wait() -> None:
    with interruptible() as interruption, interruption.passed_on(lambda: None):
        send(signal.SIGTERM)
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_while_ray_starts_and_then_no_trial_does(number: int) -> None:
    with interruptible() as interruption:
        send(number)
        send(number)
        for enter in (interruption.refuse, interruption.passed_on(lambda: pytest.fail("too late")).__enter__):
            with pytest.raises(KeyboardInterrupt):
                enter()


def test_a_signal_that_has_to_wait_is_answered_and_one_that_is_passed_on_needs_none() -> None:
    answered: list[int] = []
    with interruptible(lambda: answered.append(1)):
        send(signal.SIGTERM)
        assert answered == [1]
    with interruptible(lambda: answered.append(2)) as interruption, interruption.passed_on(lambda: None):
        send(signal.SIGTERM)
    assert answered == [1]


@pytest.mark.slow
def test_a_third_ctrl_c_ends_what_hangs() -> None:
    code = (
        "import os, signal\nfrom search.interruption import interruptible\n"
        "with interruptible():\n    for _ in range(3):\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_what_the_process_was_started_to_ignore_stays_ignored() -> None:
    """nohup, and jobs in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with suppress(KeyboardInterrupt), interruptible() as interruption:
        send(signal.SIGHUP)
        assert not interruption.asked
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


def test_a_closed_pipe_does_no_harm() -> None:
    """`rin sweep | head -1`: rich would end the program, and print would raise."""
    read, write = os.pipe()
    stream = os.fdopen(write, "w", buffering=1)
    os.close(read)
    before, sys.stdout = sys.stdout, stream
    try:
        with lasting_output():
            from dashboards.tables import terminal

            for _ in range(3):
                print("a line that nobody reads", flush=True)
                terminal().print("nor this one")
    finally:
        sys.stdout = before
        stream.close()


class Leaving:
    """Tune's actors, of which one leaves after it has been waited for `waits` times."""

    def __init__(self, waits: int) -> None:
        self.waits, self.killed = waits, False

    def is_actor_started(self, tracked_actor: object) -> bool:
        return self.waits > 0

    def next(self, timeout: float) -> None:
        self.waits -= 1

    def remove_actor(self, tracked_actor: object, kill: bool) -> None:
        self.killed = kill


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("run_ends", [True, False])
def test_a_trial_that_takes_an_hour_to_leave_is_waited_for(
    patient: bool, run_ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Tune alone it would be killed: before it has evaluated itself, or in the middle of a step."""
    monkeypatch.setattr(ray, "cluster_resources", dict)
    with trials_leave_in_their_time() if patient else nullcontext():
        nowhere: Any = SimpleNamespace()
        controller = importlib.import_module("ray.tune.tune").TuneController(
            resource_manager_factory=lambda: None, storage=nowhere
        )
    leaving = controller._actor_manager = Leaving(waits=3)
    controller._earliest_stopping_actor = time.monotonic() - 3600
    controller._stopping_actors = {"c01/0": controller._earliest_stopping_actor}
    controller._cleanup_stopping_actors(force_all=run_ends)
    assert leaving.killed != patient

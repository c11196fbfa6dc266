"""Whoever asks a sweep to end: Ctrl-C, SIGTERM of a batch system, SIGHUP of a terminal that closes.

Each is a first Ctrl-C: no trial starts any more, those that run save themselves, MLflow hears of it, and `rin resume`
goes on. A second Ctrl-C does not wait for the trials. While something is under way that must not be torn (Ray starts or
ends, MLflow is told), a signal is noted and waits; a third Ctrl-C ends the program there. What this process was started
to ignore stays ignored (nohup, a shell's job in the background).
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
IMPATIENT = 3


class Interruption:
    """Takes the signals; `asked` once there was one."""

    def __init__(self, numbers: Sequence[int] = (), waits: Callable[[], None] = lambda: None) -> None:
        """`waits` is called for a signal that has to wait."""
        self.asked = False
        self._waits = waits
        self._numbers = numbers
        self._strokes = 0
        self._take: Callable[[], None] | None = None

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True
        self._strokes += number == signal.SIGINT
        if self._take is not None:
            if self._strokes > 1:
                raise KeyboardInterrupt
            self._take()
        elif self._strokes >= IMPATIENT:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            self._waits()

    def listen(self) -> None:
        """Take the signals; again where somebody else has taken one (Ray's start leaves a handler of SIGTERM that ends
        the process)."""
        for number in self._numbers:
            signal.signal(number, self)

    def refuse(self) -> None:
        """Raises KeyboardInterrupt when it was asked."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def passed_on(self, take: Callable[[], None]) -> Iterator[None]:
        """Within this `take` is called for each, also for one that has waited, and a second Ctrl-C is a
        KeyboardInterrupt."""
        self.listen()
        self.refuse()
        self._take = take
        try:
            yield
        finally:
            self._take = None


@contextmanager
def interruptible(waits: Callable[[], None] = lambda: None) -> Iterator[Interruption]:
    if threading.current_thread() is not threading.main_thread():
        yield Interruption()
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    interruption = Interruption(taken, waits)
    interruption.listen()
    try:
        yield interruption
    finally:
        for number in taken:
            signal.signal(number, before[number] or signal.SIG_DFL)

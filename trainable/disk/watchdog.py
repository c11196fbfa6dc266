"""A phase that never ends is ended from outside.

Tune hears of a trial only when it reports, so a step that hangs (a lost file server, a collective that waits for a dead
peer, an engine that stopped answering) would hold its slot for ever. A thread beside the trial knows when the present
phase began; past the limit it writes down what was running, with every stack, and kills the process. The sweep then
starts the trial again from its checkpoint, a limited number of times. Should the hung call never give Python's lock
back, the thread cannot run either: the C-level timer of `faulthandler` then ends the process a little later, with the
stacks on stderr.

The same thread shows every few seconds that the process lives; the sweep's ledger counts hours by that, and whoever
watches sees how far a trial is.
"""

import faulthandler
import io
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable

BACKSTOP_SECONDS = 30.0
BEAT_SECONDS = 10.0


class Watchdog:
    """Call `enter` at the start of every phase and `stop` at the end.

    `on_hang(phase, seconds, stacks)` and `on_beat()` run in the watching thread.
    """

    def __init__(
        self,
        limit_seconds: float,
        on_hang: Callable[[str, float, str], None],
        on_beat: Callable[[], None],
        beat_seconds: float | None = None,
    ) -> None:
        self.limit, self.beat = limit_seconds, BEAT_SECONDS if beat_seconds is None else beat_seconds
        self._on_hang, self._on_beat = on_hang, on_beat
        self._now = ("", time.monotonic())  # phase and its begin, replaced in one go
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """A new phase begins; an empty name means that nobody waits for anything."""
        self._now = (phase, time.monotonic())
        if phase and not self._stopped.is_set():
            faulthandler.dump_traceback_later(self.limit + BACKSTOP_SECONDS, exit=True, file=_stderr())
        else:
            faulthandler.cancel_dump_traceback_later()

    def stop(self) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join(timeout=5.0)

    def _watch(self) -> None:
        beaten = time.monotonic()
        while not self._stopped.wait(min(1.0, self.limit / 4)):
            now = time.monotonic()
            phase, since = self._now
            if phase and now - since > self.limit:
                self._on_hang(phase, now - since, _stacks())
                os.kill(os.getpid(), signal.SIGKILL)
            if now - beaten > self.beat:
                beaten = now
                self._on_beat()


def _stderr() -> int:
    """Of the process itself: Python's own may have been replaced by something without a file descriptor."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, ValueError, io.UnsupportedOperation):
        return 2


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()

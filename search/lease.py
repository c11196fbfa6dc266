"""One owner at a time, where there are no file locks: an object store.

The owner writes its name with the time, and again every few seconds; whoever finds a fresh name that is not its own
stays away, and a name that has not been renewed for a minute belongs to a dead process. Two that start in the same
instant both write, wait, and read again: the later writer's name is there, and the other one withdraws. An owner that
finds that it has lost the lease interrupts itself as Ctrl-C would. Clocks of the machines must agree within half a
minute.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

from trainable.disk.folder import Folder

FILE = "driver.json"
RENEW_SECONDS, STALE_SECONDS, SETTLE_SECONDS = 15.0, 60.0, 1.0


class Lease:
    """`with Lease(folder, lambda owner: SomeError(owner)): ...`; raises that error when somebody else holds it."""

    def __init__(self, folder: Folder, busy: Callable[[str], Exception]) -> None:
        self._folder, self._busy = folder, busy
        self._host, self._token = socket.gethostname(), uuid.uuid4().hex
        self._ended = threading.Event()

    def __enter__(self) -> None:
        self._refuse_other()
        self._write()
        time.sleep(SETTLE_SECONDS)
        self._refuse_other()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._other() == "":
            self._folder.remove(FILE)

    def _other(self) -> str:
        """Who else holds it; empty when nobody does, or nobody alive."""
        text = self._folder.read(FILE)
        held: dict[str, Any] = json.loads(text) if text is not None else {"token": self._token}
        if held["token"] == self._token or time.time() - held["seen"] > STALE_SECONDS:
            return ""
        if held["host"] == self._host and not _alive(held["pid"]):
            return ""
        return f"process {held['pid']} on {held['host']}"

    def _refuse_other(self) -> None:
        other = self._other()
        if other:
            raise self._busy(other)

    def _write(self) -> None:
        held = {"host": self._host, "pid": os.getpid(), "token": self._token, "seen": time.time()}
        self._folder.write(FILE, json.dumps(held))

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(RENEW_SECONDS):
            try:
                taken = bool(self._other())
                if not taken:
                    self._write()
                    renewed = time.monotonic()
            except OSError:  # the store is away for a moment
                taken = False
            if taken or time.monotonic() - renewed > STALE_SECONDS:  # a suspended machine, a minute without the store
                os.kill(os.getpid(), signal.SIGINT)
                return


def holder(folder: Folder) -> str:
    """Who holds the lease; empty when nobody does, or nobody alive."""
    return Lease(folder, RuntimeError)._other()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True

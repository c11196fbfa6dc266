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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trainable.disk.folder import Folder

FILE = "driver.json"
RENEW_SECONDS, STALE_SECONDS, SETTLE_SECONDS = 15.0, 60.0, 1.0


@contextmanager
def leased(folder: Folder, busy: Callable[[str], Exception]) -> Iterator[None]:
    """`with leased(folder, lambda owner: SomeError(owner)): ...`; raises that error when somebody else holds it."""
    token, ended = uuid.uuid4().hex, threading.Event()
    if other := holder(folder):
        raise busy(other)
    _write(folder, token)
    time.sleep(SETTLE_SECONDS)
    if other := holder(folder, token):
        raise busy(other)
    thread = threading.Thread(target=_renew, args=(folder, token, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if not holder(folder, token):
            folder.remove(FILE)


def holder(folder: Folder, token: str = "") -> str:
    """Who holds the lease, other than the owner of `token`; empty when nobody does, or nobody alive."""
    text = folder.read(FILE)
    held: dict[str, Any] = json.loads(text) if text is not None else {"token": token}
    if held["token"] == token or time.time() - held["seen"] > STALE_SECONDS:
        return ""
    if held["host"] == socket.gethostname() and not _alive(held["pid"]):
        return ""
    return f"process {held['pid']} on {held['host']}"


def _write(folder: Folder, token: str) -> None:
    held = {"host": socket.gethostname(), "pid": os.getpid(), "token": token, "seen": time.time()}
    folder.write(FILE, json.dumps(held))


def _renew(folder: Folder, token: str, ended: threading.Event) -> None:
    renewed = time.monotonic()
    while not ended.wait(RENEW_SECONDS):
        try:
            taken = bool(holder(folder, token))
            if not taken:
                _write(folder, token)
                renewed = time.monotonic()
        except OSError:  # the store is away for a moment
            taken = False
        if taken or time.monotonic() - renewed > STALE_SECONDS:  # a suspended machine, a minute without the store
            os.kill(os.getpid(), signal.SIGINT)
            return


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True

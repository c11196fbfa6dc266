"""A queue of records that one background thread delivers in order, and that outlives its process.

A record is appended to a file before it is queued, and the file is emptied when everything in it has been delivered; so while the
receiver is down, and after `kill -9`, the file holds what is missing, and the next process starts with it. A record may be
delivered twice (killed between delivering it and emptying the file): the receiver's records must be safe to repeat.

Left out: fsync (a power cut may take the last records, a killed process does not) and a second reader (a lock keeps it away).
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spaces.config import ConfigError

log = logging.getLogger(__name__)

LONGEST_PAUSE = 30.0  # seconds between two attempts
CLOSE_SECONDS = 30.0  # `close` waits this long for the next record to be delivered

Record = dict[str, Any]
Send = Callable[[Sequence[Record], Callable[[], None]], tuple[list[Record], str]]
"""Delivers records, calling its second argument after each; returns those that it could not deliver, in order, and why."""


class Spool:
    """`put` takes microseconds and never waits for the receiver; `close` waits while records are being delivered, then gives
    up."""

    def __init__(self, path: Path, send: Send, receiver: str) -> None:
        self.path = path
        self._send, self._receiver = send, receiver
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._queue: list[Record] = []
        self._thread: threading.Thread | None = None
        self._disk_trouble = ""
        self._delivered_at = 0.0

    def start(self, patience: float = 10.0) -> None:
        """Take the file and begin with what an earlier process left in it. Raises ConfigError when another process holds it."""
        if self._thread is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_suffix(".lock"), thread_local=False)
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            raise ConfigError(f"{self.path} is being written by another process; wait for it or stop it") from None
        self._closing.clear()
        self._queue = _read(self.path)
        self._file = self.path.open("ab")
        self._thread = threading.Thread(target=self._deliver, name=self.path.stem, daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        self.start()
        with self._changed:
            try:
                self._file.write(as_json(record).encode() + b"\n")
                self._file.flush()
            except OSError as error:  # a full disk; the record still goes its way, only not past a kill
                if not self._disk_trouble:
                    log.warning("%s: %s; records are kept in memory only", self.path, error.strerror)
                self._disk_trouble = str(error)
            self._queue.append(record)
            self._changed.notify()

    def close(self) -> int:
        """How many records stay behind, in the file."""
        if self._thread is None:
            return 0
        self._note_delivery()
        with self._changed:
            self._closing.set()
            self._changed.notify()
        while self._thread.is_alive() and time.monotonic() - self._delivered_at < CLOSE_SECONDS:
            self._thread.join(0.1)
        if self._queue:
            log.warning("%d records for %s are not delivered; they stay in %s", len(self._queue), self._receiver, self.path)
        if not self._thread.is_alive():  # else it hangs in a request, and keeps the file until this process ends
            self._file.close()
            self._lock.release()
            self._thread = None
        return len(self._queue)

    def _note_delivery(self) -> None:
        self._delivered_at = time.monotonic()

    def _deliver(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                while not self._queue and not self._closing.is_set():
                    self._changed.wait()
                records = list(self._queue)
            last = self._closing.is_set()
            left, trouble = self._send(records, self._note_delivery)
            with self._changed:
                self._queue[: len(records)] = left
                if not self._queue:
                    self._file.truncate(0)
                if last and (left or not self._queue):
                    return
            if not left:
                pause = 0.0
                continue
            if not pause:
                log.warning("%s does not take records: %s; they are kept in %s", self._receiver, trouble, self.path)
            pause = min(max(2 * pause, 1.0), LONGEST_PAUSE)
            self._closing.wait(pause)


def deliver(path: Path, send: Send, receiver: str) -> int:
    """Deliver what an earlier process left; how many records are still left. A file in use is its owner's to deliver."""
    if not path.exists() or not path.stat().st_size:
        return 0
    spool = Spool(path, send, receiver)
    try:
        spool.start(patience=0.0)
    except ConfigError:
        return 0
    return spool.close()


def _read(path: Path) -> list[Record]:
    """A line that a kill or a full disk cut short is dropped, with a warning unless it is the last."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    records: list[Record] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            log.warning("%s, line %d: not a whole record; dropped", path, number)
    return records


def as_json(value: Any) -> str:
    """Compact; arrays and scalars of numpy and torch become Python's, and what JSON does not know becomes text."""
    return json.dumps(value, separators=(",", ":"), default=lambda other: other.tolist() if hasattr(other, "tolist") else str(other))

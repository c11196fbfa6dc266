"""One owner at a time in a place without locks; the clock and the owners are the test's."""

import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from search import lease
from search.lease import FILE, STALE_SECONDS, leased
from trainable.disk.folder import Folder


class Busy(Exception):
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    return Folder(str(tmp_path))


def held(folder: Folder, **changes: Any) -> None:
    """By another process of this machine that lives: our parent."""
    owner = {"host": socket.gethostname(), "pid": os.getppid(), "token": "other", "seen": time.time()}
    folder.write(FILE, json.dumps({**owner, **changes}))


def token(folder: Folder) -> str:
    return str(json.loads(folder.read(FILE) or b"{}").get("token", ""))


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_owner_s_name_is_there_while_it_works_and_gone_afterwards(folder: Folder) -> None:
    with leased(folder, Busy):
        tree = json.loads(folder.read(FILE) or b"")
        assert (tree["pid"], tree["host"]) == (os.getpid(), socket.gethostname())
    assert folder.names() == []


def test_a_living_owner_is_named_and_left_alone(folder: Folder) -> None:
    held(folder)
    with pytest.raises(Busy, match=f"process {os.getppid()} on {socket.gethostname()}"), leased(folder, Busy):
        pytest.fail("two owners")
    assert token(folder) == "other"


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        ({"seen": time.time() + 1e6}, False),  # a clock that is ahead
        ({"host": "another-machine", "pid": 1}, False),
        ({"host": "another-machine", "seen": 0.0}, True),
        ({"seen": 0.0}, True),  # lives, but has not renewed: it lost the lease
        ({"pid": "dead"}, True),
        ({"host": "another-machine", "pid": "dead"}, False),  # process numbers of other machines say nothing
    ],
)
def test_a_name_is_free_when_it_is_stale_or_its_process_on_this_machine_is_dead(
    folder: Folder, owner: dict[str, Any], free: bool
) -> None:
    if owner.get("pid") == "dead":
        owner = owner | {"pid": dead_process()}
    held(folder, **owner)
    if free:
        with leased(folder, Busy):
            assert token(folder) != "other"
    else:
        with pytest.raises(Busy), leased(folder, Busy):
            pytest.fail("two owners")


@pytest.mark.parametrize(("age", "free"), [(STALE_SECONDS - 5, False), (STALE_SECONDS + 5, True)])
def test_the_limit_between_alive_and_stale(folder: Folder, age: float, free: bool) -> None:
    held(folder, seen=time.time() - age)
    taken = False
    try:
        with leased(folder, Busy):
            taken = True
    except Busy:
        pass
    assert taken == free


def test_of_two_that_start_in_the_same_instant_only_the_later_writer_goes_on(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one writes while this one waits."""
    monkeypatch.setattr("search.lease.time.sleep", lambda seconds: held(folder))
    with pytest.raises(Busy), leased(folder, Busy):
        pytest.fail("two owners")
    assert token(folder) == "other", "who withdraws leaves the other's name"


def test_of_two_real_threads_at_most_one_is_in(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not two processes: whether they are the same process must not matter."""
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.3)
    inside: list[int] = []
    most: list[int] = []
    leave = threading.Event()

    def take() -> None:
        try:
            with leased(folder, Busy):
                inside.append(1)
                most.append(len(inside))
                leave.wait(5)
                inside.pop()
        except Busy:
            leave.set()

    both = [threading.Thread(target=take) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert max(most, default=1) == 1


def test_a_lease_is_renewed_while_it_is_held_and_not_after(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    with leased(folder, Busy):
        first, deadline = json.loads(folder.read(FILE) or b"")["seen"], time.monotonic() + 30
        while json.loads(folder.read(FILE) or b"")["seen"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    time.sleep(0.3)
    assert folder.names() == []


def test_who_lost_the_lease_does_not_remove_the_next_owner_s_name(folder: Folder) -> None:
    with leased(folder, Busy):
        held(folder)
    assert token(folder) == "other"


def test_a_store_that_is_away_for_a_moment_does_not_end_the_renewing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    calls: list[int] = []
    write = lease._write

    def sometimes(folder: Folder, token: str) -> None:
        calls.append(1)
        if len(calls) in (2, 3):
            raise OSError("the network is away")
        write(folder, token)

    monkeypatch.setattr(lease, "_write", sometimes)
    with leased(folder, Busy):
        deadline = time.monotonic() + 30
        while len(calls) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.02)

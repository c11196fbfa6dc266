"""Real Ray nodes on this machine: `ray start` as an administrator would call it, on free ports, with a token of their
own.

Each node is a process group of its own and is ended through it; `ray stop` would end every Ray on the machine.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.processes import free_port

START_SECONDS = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running head."""

    address: str
    """HOST:PORT, for --address."""
    dashboard: str
    """http://127.0.0.1:PORT, for --submit."""
    environment: Mapping[str, str]
    """Of whoever talks to it: it holds the token."""
    head: subprocess.Popen[bytes]


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short name: Ray makes sockets below it, whose paths end at 107 characters."""
    with tempfile.TemporaryDirectory(prefix="rin-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def head_node(folder: Path, *, cpus: int, python: str = sys.executable) -> Iterator[Cluster]:
    """A head with a job server, run by this interpreter; `folder` must be short (Ray makes sockets in it)."""
    port, dashboard = free_port(), free_port()
    token = folder / "token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(python).parent}:{environment['PATH']}"
    options = [
        f"--port={port}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
    ]
    options += [f"--temp-dir={folder / 'ray'}", "--ray-client-server-port", str(free_port())]
    with _node(["--head", *options], cpus, environment, folder / "head.log", python) as process:
        address = _address(folder / "head.log")
        yield Cluster(address=address, dashboard=f"http://127.0.0.1:{dashboard}", environment=environment, head=process)


def _address(log: Path) -> str:
    """What a worker has to call; Ray prints it after it has said that it runs."""
    deadline = time.monotonic() + START_SECONDS
    while not (found := re.search(r"ray start --address='([^']+)'", log.read_text(errors="replace"))):
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.1)
    return found[1]


@contextmanager
def worker_node(cluster: Cluster, folder: Path, *, cpus: int) -> Iterator[subprocess.Popen[bytes]]:
    """A further node of the cluster."""
    with _node(
        [f"--address={cluster.address}"], cpus, cluster.environment, folder / "worker.log", sys.executable
    ) as process:
        yield process


def kill_raylet(node: subprocess.Popen[bytes]) -> None:
    """As a power cut: the raylet and all its workers at once, without a word to the head."""
    for process in reversed(_family(node.pid)):
        with suppress(psutil.NoSuchProcess):  # died of its parent's death
            process.kill()


@contextmanager
def _node(
    options: list[str], cpus: int, environment: Mapping[str, str], log: Path, python: str
) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        python,
        "-m",
        "ray.scripts.scripts",
        "start",
        *options,
        f"--num-cpus={cpus}",
        "--disable-usage-stats",
        "--block",
    ]
    command += [
        f"--dashboard-agent-listen-port={free_port()}"
    ]  # by default one port, and an agent that does not get it takes no jobs
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=dict(environment), stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start did not come up:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield process
    finally:
        family = _family(process.pid)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        for left in alive:
            left.kill()
        process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []

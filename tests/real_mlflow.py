"""MLflow from outside: what it shows of a sweep, and a server of its own that a test can kill."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.mlflow_client import client

BIGGEST = sys.float_info.max  # what MLflow keeps of an infinity


def runs(uri: str, experiment: str) -> list[Any]:
    """The runs of a sweep, in the order of their arms and replicates."""
    mlflow = client(uri)
    found = mlflow.get_experiment_by_name(experiment)
    shown = [] if found is None else mlflow.search_runs([found.experiment_id])
    return sorted(shown, key=lambda run: (int(run.data.tags["arm_number"]), int(run.data.tags["replicate"])))


def points(uri: str, run: Any, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every point that is kept, doubled ones too."""
    history = client(uri).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in history)


def text(uri: str, run: Any, path: str) -> str:
    """Content of a run's file."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(client(uri).download_artifacts(run.info.run_id, path, folder)).read_text(encoding="utf-8")


def files(uri: str, run: Any) -> list[str]:
    return sorted(file.path for file in client(uri).list_artifacts(run.info.run_id))


def everything(uri: str, experiment: str) -> str:
    """Whatever a second delivery could double or change; two of these texts are compared."""
    return repr(
        [
            (
                run.data.params,
                run.data.tags,
                run.info.status,
                run.info.start_time,
                run.info.end_time,
                {name: points(uri, run, name) for name in run.data.metrics},
                {path: text(uri, run, path) for path in files(uri, run)},
            )
            for run in runs(uri, experiment)
        ]
    )


def eventually(claim: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """`mlflow server` in a process group of its own, to be killed whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        stores = [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as out:
            self.process = subprocess.Popen(
                command + stores,
                env=os.environ | quiet,
                stdout=out,
                stderr=out,
                cwd=self.folder,
                start_new_session=True,
            )
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.5)
        pytest.fail((self.folder / "server.log").read_text())

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

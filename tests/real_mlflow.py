"""MLflow from outside: what it shows of a sweep, and a server of its own that a test can kill."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search.mlflow_client import client
from tests.processes import free_port

BIGGEST = sys.float_info.max  # what MLflow keeps of an infinity


def runs(uri: str, experiment: str) -> list[Any]:
    """The runs of a sweep, in the order of their arms and replicates."""
    mlflow = client(uri)
    found = mlflow.get_experiment_by_name(experiment)
    shown = [] if found is None else mlflow.search_runs([found.experiment_id])
    shown = [run for run in shown if "arm" in run.data.tags]
    return sorted(shown, key=lambda run: (int(run.data.tags["arm_number"]), int(run.data.tags["replicate"])))


def others(uri: str, experiment: str) -> list[Any]:
    """Its runs that are no trials."""
    mlflow = client(uri)
    shown = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    return [run for run in shown if "arm" not in run.data.tags]


def points(uri: str, run: Any, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every point that is kept, doubled ones too."""
    history = client(uri).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in history)


def text(uri: str, run: Any, path: str) -> str:
    """Content of a run's file."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(client(uri).download_artifacts(run.info.run_id, path, folder)).read_text(encoding="utf-8")


def answered(uri: str, run: Any) -> list[int]:
    """Which answers to its evaluation were right, in the order of the questions, as its table has them."""
    table = json.loads(text(uri, run, "answers.json"))
    place = table["columns"].index("correct")
    return [{"yes": 1, "no": 0}[row[place]] for row in sorted(table["data"])]


def files(uri: str, run: Any) -> list[str]:
    return sorted(file.path for file in client(uri).list_artifacts(run.info.run_id))


def traces(uri: str, run: Any) -> list[dict[str, Any]]:
    """A run's, in the order of their times."""
    found = client(uri).search_traces(locations=[run.info.experiment_id], run_id=run.info.run_id, max_results=500)
    return [trace.to_dict() for trace in sorted(found, key=lambda trace: trace.info.request_time)]


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
                traces(uri, run),
            )
            for run in runs(uri, experiment)
        ]
    )


def eventually(claim: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Server:
    """`mlflow server` in a process group of its own, to be killed whole and started again."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.folder, self.backend, self.port = folder, backend, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """The database's URI, which may hold a password, comes by the environment: a command line is for all to see."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--artifacts-destination", str(self.folder / "artifacts")]
        switches = {
            "MLFLOW_BACKEND_STORE_URI": self.backend,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        log = self.folder / "server.log"
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, env=os.environ | switches, stdout=out, stderr=out, cwd=self.folder, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def mlflow_server(folder: Path, backend: str | None = None) -> Iterator[Server]:
    """A running server; its database lies in the folder too, unless told otherwise."""
    server = Server(folder, backend or f"sqlite:///{folder}/mlflow.db")
    try:
        server.start()
        yield server
    finally:
        server.kill()

"""A sweep in MLflow's own UI: its saved view as code, and the server that shows it.

MLflow opens an experiment with neither parameter nor metric columns, draws the first ten runs only, one chart per
metric in alphabetical order, and greets a training sweep in its mode for chat applications: of a sweep of 24 trials one
sees almost nothing. It can keep a view and share it by link, but only from its UI, by hand, for one experiment at a
time.

So the view is written here. It lives in the experiment tag `mlflow.sharedViewState.<key>` as an envelope {name,
createdAt, updatedAt, state}; `state` is the JSON of the page's own fields, which the page merges over its defaults:
what it searches (`orderByKey`, ...) and what it shows (`selectedColumns`, `compareRunCharts`, ...). A link with
`viewStateShareKey=<key>` opens it, and the UI lists it under "Views". This is MLflow's client code
(ExperimentPageUIState.tsx, runs-charts.types.ts), not a documented interface: mlflow is pinned, and a test renders the
view of a real store in a real browser. The rest of the link: `workflowType=machine_learning` puts the sidebar into its
mode for training, `compareRunsMode=CHART` shows the charts beside the names of the runs, `TABLE` the table. MLflow's
Assistant panel opens by itself once per browser and address, and stays closed once closed; neither the link nor the
server has a switch for it.

The server is for one person on one machine: localhost, no login, one worker, neither telemetry nor job runners (with 4
workers and 7 job runners it takes 2.7 GB). Left out: means over replicates with intervals, which MLflow cannot draw;
`rin report` does.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from search.mlflow_client import ENVIRONMENT, absolute_uri, client, one_line
from search.secrets import strip_password
from spaces.config import ConfigError
from trainable.metrics import ACCURACY, ALL_WRONG, ENTROPY, GIBBERISH, REWARD, ROLLOUT_KL, SIGMA

KEY = "rin-sweep"
NAME = "RIN sweep"
TAG = f"mlflow.sharedViewState.{KEY}"
HOST = "127.0.0.1"
START_SECONDS = 120.0  # 5 s on a quiet machine; the first start after an installation compiles mlflow's modules
STOP_SECONDS = 10.0  # then it is killed

COLUMNS = {
    **{"tags.`status`": 95, "tags.`collapse/rule`": 115},
    **{"params.`noise.modules`": 115, "params.`noise.sigma_start`": 135, "params.`noise.layers`": 100},
    **{f"metrics.`{ACCURACY}`": 110, f"metrics.`{ENTROPY}`": 105, f"metrics.`{REWARD}`": 105},
    **{"tags.`arm`": 80, "tags.`replicate`": 80},  # last, because a run's name is arm/replicate already
}
"""In this order, with their widths in pixels: all but the last two fit beside the name of the run in a window of 1,500.
"""
ALWAYS_SHOWN = {"attributes.`Run Name`": 130, "runDateAndNestInfo": 148}
SCATTERS = (("noise.sigma_start", "PARAM"), (ROLLOUT_KL, "METRIC"))
"""Horizontal axes; the vertical one is the accuracy."""
LINES = (ACCURACY, REWARD, ENTROPY, SIGMA, GIBBERISH, ALL_WRONG)
"""Over the step."""
PARALLEL = {"selectedParams": ["noise.sigma_start"], "selectedMetrics": [ROLLOUT_KL, ENTROPY, REWARD, ACCURACY]}


# The view


def save_view(uri: str, experiment: str) -> str:
    """Its place on any server of that store. Saving it again changes nothing, or undoes what was changed under its
    name: keep your own view under another name.

    Raises ConfigError when there is no such experiment or the tracking store cannot be reached.
    """
    with one_line(uri, f"cannot save the view of experiment {experiment}"):
        mlflow = client(uri)
        found = mlflow.get_experiment_by_name(experiment)
        if found is None:
            raise ConfigError(
                f"tracking {strip_password(uri)}: no experiment {experiment}; "
                "give the name of a sweep that `rin list` shows"
            )
        view = envelope(created=found.creation_time)
        if found.tags.get(TAG) != view:
            mlflow.set_experiment_tag(found.experiment_id, TAG, view)
        query = f"viewStateShareKey={KEY}&workflowType=machine_learning&compareRunsMode=TABLE"
        return f"#/experiments/{found.experiment_id}/runs?{query}"


def envelope(created: int) -> str:
    """The tag's value; `created` is in Unix ms. The same for every sweep, whatever it searches: the page hides a chart
    without data."""
    return json.dumps({"name": NAME, "createdAt": created, "updatedAt": created, "state": json.dumps(view_state())})


def view_state() -> dict[str, Any]:
    """The page's fields; what is not named here keeps MLflow's default."""
    accuracy = {"key": ACCURACY, "type": "METRIC"}
    scatters = [{"type": "SCATTER", "xaxis": {"key": key, "type": kind}, "yaxis": accuracy} for key, kind in SCATTERS]
    own_axis: dict[str, Any] = {"xAxisKey": "step", "useGlobalXaxisKey": False}
    line = {"type": "LINE", **own_axis, "lineSmoothness": 0, "useGlobalLineSmoothing": False}
    lines = [line | {"metricKey": name, "selectedMetricKeys": [name], "displayName": name} for name in LINES]
    sections: dict[str, tuple[list[dict[str, Any]], int]] = {  # charts, columns
        "Accuracy": (scatters, 2),
        "Steps": (lines, 3),
        "Together": ([{"type": "PARALLEL", **PARALLEL}], 1),
    }
    chosen = {"deleted": False, "isGenerated": False, "runsCountToCompare": 100}
    return {
        "orderByKey": f"metrics.`{ACCURACY}`",
        "orderByAsc": False,
        "selectedColumns": list(COLUMNS),
        "columnOrder": [*ALWAYS_SHOWN, *COLUMNS],
        "columnWidths": ALWAYS_SHOWN | COLUMNS,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # else MLflow sorts sections by name, its own for all other metrics among them
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": True, "columns": columns, "cardHeight": 320}
            for name, (_, columns) in sections.items()
        ],
        "compareRunCharts": [
            {**chart, **chosen, "uuid": f"{name}-{index}", "metricSectionId": name}
            for name, (charts, _) in sections.items()
            for index, chart in enumerate(charts)
        ],
    }


# The server


def serve_ui(uri: str, experiment: str, port: int, *, on_ready: Callable[[str], None]) -> None:
    """Saves the view, serves MLflow's UI over the store, calls `on_ready` with the view's address and blocks until
    Ctrl-C.

    Where `uri` is a server already, nothing is started: the view is saved there, `on_ready` is called and this returns.
    Raises ConfigError when the port is not free, before anything is started, and RuntimeError when the server ends by
    itself.
    """
    if uri.startswith(("http://", "https://")):
        return on_ready(f"{strip_password(uri).rstrip('/')}/{save_view(uri, experiment)}")
    _check_port(port)
    view = save_view(uri, experiment)
    base = f"http://{HOST}:{port}"
    with suppress(KeyboardInterrupt), _ended_like_ctrl_c(), _server(uri, port) as (process, log):
        _wait_until_ready(process, log, f"{base}/health")
        on_ready(f"{base}/{view}")
        raise _ended(process.wait(), log)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        # As the server will: a connection just closed is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason, free = getattr(error, "strerror", None) or error, port % 60000 + 1
            raise ConfigError(f"port {port} on {HOST}: {reason}; give another --port, for example {free}") from None


@contextmanager
def _server(uri: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process and the file of its output. On leaving, the whole process group is gone."""
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    # A local store is read where it lies; what is switched off is the upload of artifacts through the server.
    command += ["--uvicorn-opts", "--log-level warning", "--no-serve-artifacts"]
    # Not as options: a URI may hold a password.
    switches = {"MLFLOW_BACKEND_STORE_URI": absolute_uri(uri), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryDirectory(prefix="rin-mlflow-") as folder, (Path(folder) / "server.log").open("wb") as log:
        environment = {**ENVIRONMENT, **os.environ, **switches}
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process, Path(log.name)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """`kill` and a closed terminal raise KeyboardInterrupt too, except where they are ignored (nohup): the server must
    not stay behind."""
    signals = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in signals:
            signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, url: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # http_proxy is not for this machine
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None:
        try:
            direct.open(url, timeout=5).close()
            return
        except OSError:  # refused, until it listens
            time.sleep(0.2)
        if time.monotonic() > deadline:
            raise RuntimeError(f"MLflow's server does not answer after {START_SECONDS:.0f} s; it said:\n{_tail(log)}")
    raise _ended(process.returncode, log)


def _ended(code: int, log: Path) -> RuntimeError:
    return RuntimeError(f"MLflow's server ended with exit code {code}; it said:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return strip_password("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:]))

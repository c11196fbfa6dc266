"""A sweep in MLflow's own UI: its saved views as code, and the server that shows them.

MLflow opens an experiment with neither parameter nor metric columns, draws the first ten runs only, one chart per
metric in alphabetical order, and greets a training sweep in its mode for chat applications: of a sweep of 24 trials one
sees almost nothing. It can keep a view and share it by link, but only from its UI, by hand, for one experiment at a
time.

So the views are written here, from the sweep's own space: a column and an axis for each setting that it searches, a
column for others in which its arms differ. `runs` has a row and a trace for each run; `arms` groups by the tag `arm`: a
mean line with a band from the lowest to the highest replicate, and the runs of an arm under it. Each lies in an
experiment tag `mlflow.sharedViewState.<key>` as an envelope {name, createdAt, updatedAt, state}; `state` is the JSON of
the page's own fields, which the page merges over its defaults: what it searches (`orderByKey`, ...) and what it shows
(`selectedColumns`, `compareRunCharts`, ...). A link with `viewStateShareKey=<key>` opens it, and the UI lists it under
"Views". This is MLflow's client code (ExperimentPageUIState.tsx, runs-charts.types.ts), not a documented interface:
mlflow is pinned, and a test renders the views of a real store in a real browser. The rest of the link:
`workflowType=machine_learning` puts the sidebar into its mode for training, `compareRunsMode=CHART` shows the charts
beside the names of the runs, `TABLE` the table. `mlflow_app.py` is the door by which a browser comes in,
`mlflow_note.py` the description of the experiment.

The server is for one person on one machine: localhost, no login, one worker, neither telemetry nor job runners (with 4
workers and 7 job runners it takes 2.7 GB). Left out, since MLflow's charts cannot: means with intervals (`rin report`
has them), an axis of its own for sigma, and hiding a run from one chart alone (docs/mlflow.md).
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from search.arms import Arm, read_arms
from search.mlflow_client import ENVIRONMENT, absolute_uri, client, one_line
from search.secrets import strip_password
from search.store import StudyConfig
from search.told import log_keys
from spaces.config import ConfigError
from spaces.library import Choice, Space
from spaces.reading import as_tree, flatten
from spaces.uses import is_noisy
from trainable.metrics import (
    ACCURACY,
    ALL_WRONG,
    DIFFERENCE,
    DOSE,
    ENTROPY,
    GIBBERISH,
    GRAD_NORM,
    HOURS,
    LENGTH,
    LOG10,
    REWARD,
    ROLLOUT_KL,
    SIGMA,
    UNQUANTIZED,
)

TAG = "mlflow.sharedViewState."
ViewName = Literal["runs", "arms"]
KEYS: dict[ViewName, str] = {"runs": "rin-sweep", "arms": "rin-arms"}
TITLES: dict[ViewName, str] = {"runs": "RIN sweep: runs", "arms": "RIN sweep: arms"}
TRIALS = "tags.arm != ''"
"""A page, documents and scans are no rows beside trials."""
HOST = "127.0.0.1"
APP, ENTRANCE = "rin-search", "/rin"
"""Of `mlflow_app.py`: its name as a plug-in, and its page."""
START_SECONDS = 120.0  # 5 s on a quiet machine; the first start after an installation compiles mlflow's modules
STOP_SECONDS = 10.0  # then it is killed

# Columns, with their widths in pixels: a header of MLflow's is the name that something is logged by.
FRONT: dict[ViewName, dict[str, int]] = {
    "runs": {"attributes.`Run Name`": 110, "runDateAndNestInfo": 48},
    "arms": {"attributes.`Run Name`": 175, "runDateAndNestInfo": 48},
}
"""Always shown by MLflow, in front; of the second only its mark, which is green or red."""
FIRST = {"tags.`ended`": 265, f"metrics.`{ACCURACY}`": 112, f"metrics.`{UNQUANTIZED}`": 148}
FIRST |= {f"metrics.`{DIFFERENCE}`": 125}
LAST = {f"metrics.`{DOSE}`": 85, "tags.`replicate`": 85, f"metrics.`{HOURS}`": 90}
SETTINGS = {
    **{"noise.sigma_start": 140, "noise.sigma_end": 130, "noise.num_stages": 140, "noise.schedule": 125},
    **{"noise.modules": 120, "noise.layers": 110, "quant.weights": 0, "quant.activations": 0},
}
"""In this order, as far as a sweep searches them or its arms differ in them; others follow."""
OTHER = 150
MOST = 14
"""Settings that have a column: experiments of a plan differ in many."""

LINES = (SIGMA, ACCURACY, REWARD, ENTROPY, ROLLOUT_KL, GIBBERISH, LENGTH, ALL_WRONG, GRAD_NORM)
"""Over the step; sigma first, so that it stands beside what it does."""
LOGARITHMIC = {SIGMA, ROLLOUT_KL}


# What a sweep searches


def settings_of(study: StudyConfig, arms: Sequence[Arm]) -> list[str]:
    """Those that its space searches or in which its noisy arms differ, the most important first; sigma always."""
    trees = [flatten(as_tree(arm.config)) for arm in arms if is_noisy(arm.config)]
    differ = [key for key in (trees[0] if trees else ()) if len({str(tree.get(key)) for tree in trees}) > 1]
    known = list(SETTINGS)
    found = dict.fromkeys(["noise.sigma_start", *(one.key for one in study.space.dimensions), *differ])
    return sorted(found, key=lambda key: known.index(key) if key in known else len(known))[:MOST]


def columns_of(settings: Sequence[str]) -> dict[str, int]:
    """Formats are one column: the mode that they make."""
    formats = ("quant.weights", "quant.activations")
    named = {f"params.`{key}`": SETTINGS.get(key, OTHER) for key in settings if key not in formats}
    mode = {"tags.`mode`": 75} if set(formats) & set(settings) else {}
    return {**FIRST, **named, **mode, **LAST}


Axis = dict[str, str]
"""Example: {"key": "log10/noise.sigma_start", "type": "METRIC"}"""


def axes_of(study: StudyConfig) -> list[tuple[Axis, bool, bool]]:
    """An axis for each setting that is searched, logarithmic where it is searched so; whether it is a number, and
    whether every noisy run has it."""
    space, logs, known = study.space, log_keys(study), list(SETTINGS)
    keys = dict.fromkeys(["noise.sigma_start", *(one.key for one in space.dimensions)])
    found = []
    for key in sorted(keys, key=lambda key: known.index(key) if key in known else len(known)):
        axis = _axis(f"{LOG10}{key}") if key in logs else {"key": key, "type": "PARAM"}
        owners = [one for one in space.dimensions if one.key == key]
        found.append((axis, not any(isinstance(one.domain, Choice) for one in owners), _is_everywhere(space, key)))
    return found


def _is_everywhere(space: Space, key: str) -> bool:
    """Without a condition, or under every label of its parent."""
    whens = [one.when for one in space.dimensions if one.key == key]
    conditions = [when for when in whens if when is not None]
    if len(conditions) < len(whens) or not whens:
        return True
    labels = {label for when in conditions for label in when.labels}
    parents = [one.domain for one in space.dimensions if one.key == conditions[0].parent]
    return all(isinstance(domain, Choice) and labels >= domain.options.keys() for domain in parents)


# The views


def save_views(study: StudyConfig) -> dict[ViewName, str]:
    """Their places on any server of the sweep's tracking. Saving them again changes nothing, or undoes what was changed
    under their names, or follows a sweep that has grown: keep your own view under another name.

    Raises ConfigError when there is no such experiment or the tracking store cannot be reached.
    """
    uri, experiment, arms = study.tracking_uri, study.name, read_arms(study)
    with one_line(uri, f"cannot save the views of experiment {experiment}"):
        mlflow = client(uri)
        found = mlflow.get_experiment_by_name(experiment)
        if found is None:
            raise ConfigError(
                f"tracking {strip_password(uri)}: no experiment {experiment}; "
                "give the name of a sweep that `rin list` shows"
            )
        for name, key in KEYS.items():
            view = envelope(TITLES[name], view_state(study, arms, name), created=found.creation_time)
            if found.tags.get(f"{TAG}{key}") != view:
                mlflow.set_experiment_tag(found.experiment_id, f"{TAG}{key}", view)
    rest = "workflowType=machine_learning&compareRunsMode="
    modes: dict[ViewName, str] = {"runs": "TABLE", "arms": "CHART"}
    page = f"#/experiments/{found.experiment_id}/runs?"
    return {name: f"{page}viewStateShareKey={key}&{rest}{modes[name]}" for name, key in KEYS.items()}


def envelope(title: str, state: dict[str, Any], created: int) -> str:
    """The tag's value; `created` is in Unix ms."""
    return json.dumps({"name": title, "createdAt": created, "updatedAt": created, "state": json.dumps(state)})


def view_state(study: StudyConfig, arms: Sequence[Arm], view: ViewName) -> dict[str, Any]:
    """The page's fields; what is not named here keeps MLflow's default."""
    columns = columns_of(settings_of(study, arms))
    sections = charts_of(study, view)
    chosen = {"deleted": False, "isGenerated": False, "runsCountToCompare": 100}
    grouped = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "arm"}]}
    return {
        **({"groupBy": grouped, "useGroupedValuesInCharts": True} if view == "arms" else {}),
        "searchFilter": TRIALS,
        "orderByKey": f"metrics.`{ACCURACY}`",
        "orderByAsc": False,
        "selectedColumns": list(columns),
        "columnOrder": [*FRONT[view], *columns],
        "columnWidths": FRONT[view] | columns,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # else MLflow sorts sections by name, its own for all other metrics among them
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": True, "columns": wide, "cardHeight": 320}
            for name, (_, wide) in sections.items()
        ],
        "compareRunCharts": [
            {**chart, **chosen, "uuid": f"{name}-{index}", "metricSectionId": name}
            for name, (charts, _) in sections.items()
            for index, chart in enumerate(charts)
        ],
    }


def charts_of(study: StudyConfig, view: ViewName) -> dict[str, tuple[list[dict[str, Any]], int]]:
    """Section -> its charts, and how many stand side by side. MLflow hides a chart without data, and an arm
    has numbers alone: means of its runs'."""
    axes, accuracy = axes_of(study), _axis(ACCURACY)
    numbers = [axis for axis, number, _ in axes if number]
    if view == "arms":
        axes = [found for found in axes if found[1]]
    across = [axes[0][0], _axis(DOSE), _axis(f"{LOG10}{ROLLOUT_KL}")]
    scatters: list[dict[str, Any]] = [{"type": "SCATTER", "xaxis": axis, "yaxis": accuracy} for axis in across]
    contour = [{"type": "CONTOUR", "xaxis": numbers[0], "yaxis": other, "zaxis": accuracy} for other in numbers[1:2]]
    wide = [axis for axis, _, everywhere in axes if everywhere]
    together = [_parallel(wide)]
    if len(wide) < len(axes):  # runs that lack one of its axes are in the first alone
        together.append(_parallel([axis for axis, *_ in axes]))
    return {
        "Accuracy": ([*scatters, *contour], 2),
        "Steps": ([_line(name) for name in LINES], 3),
        "Together": (together, 1),
    }


def _axis(metric: str) -> Axis:
    return {"key": metric, "type": "METRIC"}


def _line(metric: str) -> dict[str, Any]:
    own_axis = {"xAxisKey": "step", "useGlobalXaxisKey": False, "lineSmoothness": 0, "useGlobalLineSmoothing": False}
    scale = "log" if metric in LOGARITHMIC else "linear"
    named = {"metricKey": metric, "selectedMetricKeys": [metric], "displayName": metric}
    return {"type": "LINE", **own_axis, **named, "scaleType": scale}


def _parallel(axes: Sequence[Axis]) -> dict[str, Any]:
    """Coloured by its last axis."""
    metrics = [axis["key"] for axis in axes if axis["type"] == "METRIC"]
    return {
        "type": "PARALLEL",
        "selectedParams": [axis["key"] for axis in axes if axis["type"] == "PARAM"],
        "selectedMetrics": [*metrics, f"{LOG10}{ROLLOUT_KL}", ENTROPY, ACCURACY],
    }


# The server


def serve_ui(study: StudyConfig, port: int, *, on_ready: Callable[[str], None]) -> None:
    """Saves the views, serves MLflow's UI over the store, calls `on_ready` with the address of the view of runs and
    blocks until Ctrl-C.

    Where the sweep's tracking is a server already, nothing is started: the views are saved there, `on_ready` is called
    and this returns. Raises ConfigError when the port is not free, before anything is started, and RuntimeError when
    the server ends by itself.
    """
    uri = study.tracking_uri
    if uri.startswith(("http://", "https://")):
        return on_ready(f"{strip_password(uri).rstrip('/')}/{save_views(study)['runs']}")
    _check_port(port)
    view = save_views(study)["runs"]
    base = f"http://{HOST}:{port}"
    with suppress(KeyboardInterrupt), _ended_like_ctrl_c(), _server(uri, port) as (process, log):
        _wait_until_ready(process, log, f"{base}/health")
        on_ready(f"{base}{ENTRANCE}{view}")
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
    command += ["--app-name", APP]
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

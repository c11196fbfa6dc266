"""The saved views: what they show of a sweep's own space; `slow`: of a sweep that ran, served by a real MLflow server
and drawn by a real browser."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from dashboards import mlflow_views
from dashboards.mlflow_views import KEYS, LINES, TAG, ViewName, save_views, serve_ui, view_state
from search import mlflow_client
from search.mlflow_client import check_tracking
from search.store import StudyConfig, load_study_config, save_study_config
from search.study import run_study
from search.told import params_of
from spaces.config import ConfigError
from spaces.library import SPACES
from tests.browser import Browser, browser
from tests.plain_sweeps import without_ray
from tests.processes import free_port, program
from tests.real_mlflow import runs as shown_runs
from tests.written_sweeps import make_arm, study
from trainable.metrics import DIFFERENCE, DOSE, HOURS, UNQUANTIZED
from trainable.signals import NAMES

__all__ = ["browser"]  # a fixture
EXPERIMENT = "e13-sweep"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """Nothing of it has run; MLflow has its experiment."""
    config = study(tmp_path_factory.mktemp("store"), name=EXPERIMENT)
    save_study_config(config)
    check_tracking(config.tracking_uri, EXPERIMENT, config.owner)
    return config


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """Three arms of two replicates, run here on the tiny model; one of them has so much noise that it collapses."""
    store = str(tmp_path_factory.mktemp("ran"))
    rules = {"patience": 1, "mismatch_kl": 0.5}
    config = study(store, name=EXPERIMENT, trials=3, replicates=2, settings={"collapse": rules})
    arms = [make_arm(config, name) for name in ("control", "c01")]
    arms.append(make_arm(config, "c02", "noise.modules=linear", "noise.sigma_start=3", "noise.sigma_end=1"))
    for arm in arms[1:]:
        arm.origin = "searcher"
    with without_ray():
        result = run_study(config, lambda event: None, fixed=arms)
    assert (result.unfinished, result.untold) == (0, 0)
    return load_study_config(store, EXPERIMENT)


def experiment(config: StudyConfig) -> Any:
    return mlflow_client.client(config.tracking_uri).get_experiment_by_name(EXPERIMENT)


def columns(config: StudyConfig, view: ViewName = "runs") -> list[str]:
    """Names of what the columns show, in order."""
    shown = view_state(config, [], view)["selectedColumns"]
    return [column.split("`")[1] for column in shown]


def test_views_fit_into_their_tags_and_saving_them_again_changes_nothing(sweep: StudyConfig) -> None:
    from mlflow.utils.validation import MAX_EXPERIMENT_TAG_VAL_LENGTH

    places = save_views(sweep)
    first = dict(experiment(sweep).tags)
    for view, key in KEYS.items():
        assert f"viewStateShareKey={key}&" in places[view]
        assert len(first[f"{TAG}{key}"]) < MAX_EXPERIMENT_TAG_VAL_LENGTH / 2
        assert json.loads(json.loads(first[f"{TAG}{key}"])["state"]) == view_state(sweep, [], view)
    assert save_views(sweep) == places
    assert experiment(sweep).tags == first


def test_a_view_of_an_earlier_version_is_brought_up_to_date(sweep: StudyConfig) -> None:
    save_views(sweep)
    now = experiment(sweep)
    mlflow_client.client(sweep.tracking_uri).set_experiment_tag(now.experiment_id, f"{TAG}{KEYS['runs']}", "{}")
    save_views(sweep)
    assert experiment(sweep).tags == now.tags


def test_what_matters_comes_first_and_then_what_the_space_searches() -> None:
    ends = ["ended", "eval/accuracy", UNQUANTIZED, DIFFERENCE], [DOSE, "replicate", HOURS]
    for name, searched in {
        "sigma": ["noise.sigma_start", "noise.sigma_end", "noise.modules"],
        "targets": ["noise.sigma_start", "noise.modules", "noise.layers"],
        "schedule": ["noise.sigma_start", "noise.sigma_end", "noise.num_stages", "noise.schedule"],
    }.items():
        assert columns(study("/s", space=SPACES[name])) == [*ends[0], *searched, *ends[1]]
    fixed = study("/s", space=SPACES["sigma"], settings={"noise": {"modules": ["linear"]}})
    assert "noise.modules" not in columns(fixed), "it is the same everywhere"


def test_settings_in_which_experiments_differ_are_columns_and_formats_are_one() -> None:
    config = study("/s", space=SPACES["sigma"])
    arms = [
        make_arm(config, "control", "quant.weights=none", "quant.activations=none", "grpo.learning_rate=1e-3"),
        make_arm(config, "one", "grpo.filter_groups=drop"),
        make_arm(config, "two", "quant.activations=none", "noise.layers=middle"),
    ]
    shown = view_state(config, arms, "runs")["selectedColumns"]
    assert [column for column in shown if "params" in column or "mode" in column] == [
        *(f"params.`noise.{name}`" for name in ("sigma_start", "sigma_end", "modules", "layers")),
        *("params.`grpo.filter_groups`", "tags.`mode`"),
    ], "a control has no say: what it differs in from noise is the noise"


@pytest.mark.parametrize("name", SPACES)
def test_views_name_only_what_a_run_has(name: str) -> None:
    """A renamed signal or field would leave an empty column or chart behind."""
    config = study("/s", space=SPACES[name])
    made = make_arm(config, "c01", "noise.num_stages=4").config
    params = {*params_of(config, made), *(dimension.key for dimension in config.space.dimensions)}
    logs = {f"log10/{key}" for key in params} | {"log10/rollout_corr/kl"}
    metrics = {*NAMES.values(), "eval/accuracy", UNQUANTIZED, DIFFERENCE, DOSE, HOURS, *logs}
    known = {"params": params, "metrics": metrics, "tags": {"ended", "replicate", "mode"}}
    for view in KEYS:
        state = view_state(config, [], view)
        for column in state["selectedColumns"]:
            assert column.split("`")[1] in known[column.split(".")[0]]
        for chart in state["compareRunCharts"]:
            assert {*chart.get("selectedMetricKeys", ()), *chart.get("selectedMetrics", ())} <= metrics
            assert set(chart.get("selectedParams", ())) <= params
            for axis in (chart[side] for side in ("xaxis", "yaxis", "zaxis") if side in chart):
                assert axis["key"] in (params if axis["type"] == "PARAM" else metrics)


def test_a_chart_of_all_runs_has_no_axis_that_some_of_them_lack() -> None:
    """MLflow leaves a run out of parallel coordinates that lacks one of their axes."""
    charts = view_state(study("/s", space=SPACES["schedule"]), [], "runs")["compareRunCharts"]
    every, decaying = [chart for chart in charts if chart["type"] == "PARALLEL"]
    assert every["selectedParams"] == ["noise.schedule"]
    assert set(decaying["selectedParams"]) == {"noise.num_stages", "noise.schedule"}
    assert [name for name in decaying["selectedMetrics"] if name not in every["selectedMetrics"]] == [
        "log10/noise.sigma_end"
    ]


def test_an_arm_has_numbers_alone_on_its_axes() -> None:
    charts = view_state(study("/s"), [], "arms")["compareRunCharts"]
    (parallel,) = [chart for chart in charts if chart["type"] == "PARALLEL"]
    assert parallel["selectedParams"] == []


def test_an_experiment_that_mlflow_lacks_is_the_users_mistake(sweep: StudyConfig) -> None:
    with pytest.raises(ConfigError, match="no experiment e99; give the name of a sweep"):
        save_views(sweep.model_copy(update={"name": "e99"}))


def test_taken_port_is_the_users_mistake_before_anything_starts(
    sweep: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_views, "save_views", lambda *_: pytest.fail("went on"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"port {port} on 127.0.0.1: Address already in use; give another --port"
        ):
            serve_ui(sweep, port, on_ready=print)
    with pytest.raises(ConfigError, match=r"port 70000 on 127.0.0.1: .*; give another --port"):
        serve_ui(sweep, 70000, on_ready=print)


@pytest.mark.slow
def test_server_that_ends_by_itself_is_an_error_with_its_last_words(
    sweep: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho cannot import sqlalchemy >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RuntimeError, match="exit code 3; it said:\ncannot import sqlalchemy"):
        serve_ui(sweep, free_port(), on_ready=lambda _: pytest.fail("not ready"))


@contextmanager
def serving(config: StudyConfig, number: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rin ui` in a process of its own, and the address that it gives; that signal ends it, with all its processes."""
    script = "import sys; from dashboards.mlflow_views import serve_ui; from search.store import load_study_config; "
    script += "store, name, port = sys.argv[1:]; "
    script += "serve_ui(load_study_config(store, name), int(port), on_ready=lambda url: print(url, flush=True))"
    command = [sys.executable, "-c", script, config.store, config.name, str(free_port())]
    with program(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        yield process, url
        family = psutil.Process(process.pid).children(recursive=True)
        assert 1 <= len(family) <= 2, "mlflow and its one worker"
        process.send_signal(number)
        assert process.wait(30) == 0
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    with socket.socket() as probe:  # the port may be somebody's end of a connection by now, but nobody answers there
        assert probe.connect_ex(("127.0.0.1", int(url.split("/rin#")[0].rsplit(":", 1)[1]))) != 0


@pytest.fixture(scope="module")
def page(ran: StudyConfig) -> Iterator[str]:
    with serving(ran, signal.SIGINT) as (_, url):  # Ctrl-C, behind the last test that looks at it
        yield url


CELLS = """
[...document.querySelectorAll('[role=gridcell][col-id="COLUMN"]')]
  .map(cell => [Number(cell.closest('[role=row]').getAttribute('row-index')), cell.textContent.trim()])
  .sort((one, other) => one[0] - other[0]).map(([_, text]) => text)
"""
NAMES_OF_RUNS = """
[...document.querySelectorAll('[role=row] a[href*="/runs/"]')]
  .map(link => [Number(link.closest('[role=row]').getAttribute('row-index')), link.textContent.trim()])
  .sort((one, other) => one[0] - other[0]).map(([_, text]) => text)
"""
HEADERS = """
[...document.querySelectorAll('.ag-header-cell')]
  .map(cell => [Number(cell.getAttribute('aria-colindex')), cell.getAttribute('col-id')])
  .sort((one, other) => one[0] - other[0]).map(([_, column]) => column)
"""
CARDS = """
[...document.querySelectorAll('[data-testid=experiment-view-compare-runs-card]')]
  .map(card => ({
    title: card.querySelector('h4').title, traces: card.querySelectorAll('g.trace').length, text: card.innerText
  }))
"""


@pytest.mark.slow
def test_browser_comes_in_by_the_mode_for_training_and_sees_the_table(
    page: str, ran: StudyConfig, browser: Browser
) -> None:
    shown = view_state(ran, [], "runs")["selectedColumns"]
    browser.open(page, f"document.querySelectorAll('[role=gridcell]').length >= {6 * len(shown)}")
    kept = browser.evaluate("({...localStorage})")
    assert kept["mlflow.workflowType_v1"] == '"machine_learning"'
    assert kept["mlflow.assistant.panelOpen_v1"] == "false"
    text = browser.evaluate("document.body.innerText")
    assert "RIN sweep: runs" in text, "the name of the view, in the list of views"
    assert "Judges" not in text, "the sidebar of the mode for chat applications"
    assert "What can I help" not in text, "the assistant's panel"
    assert [column for column in browser.evaluate(HEADERS) if column in shown] == shown
    table = {column.split("`")[1]: browser.evaluate(CELLS.replace("COLUMN", column)) for column in shown}
    by_name = {name: row for row, name in enumerate(browser.evaluate(NAMES_OF_RUNS))}
    runs = {by_name[run.info.run_name]: run for run in shown_runs(ran.tracking_uri, EXPERIMENT)}
    assert sorted(runs) == list(range(6))
    for name in ("eval/accuracy", UNQUANTIZED, HOURS):
        assert [float(cell) for cell in table[name]] == [runs[row].data.metrics[name] for row in range(6)]
    assert sorted(table["eval/accuracy"], key=float, reverse=True) == table["eval/accuracy"]
    control, held, broken = (by_name[name] for name in ("control/0", "c01/0", "c02/0"))
    assert table["ended"][broken] == runs[broken].data.tags["ended"]
    assert re.fullmatch(r"collapsed at step [2-5] of 6, \w+", table["ended"][broken])
    assert table["ended"][held] == "completed, 6 steps"
    assert (table["noise.modules"][broken], table["noise.sigma_start"][broken]) == ("linear", "3")
    assert (table["noise.modules"][control], table["noise.sigma_start"][control]) == ("-", "0")
    assert table[DIFFERENCE][control] == table[DOSE][control] == "-"
    apart = 100 * (float(table["eval/accuracy"][broken]) - float(table["eval/accuracy"][control]))
    assert float(table[DIFFERENCE][broken]) == pytest.approx(apart, abs=0.02)
    assert all(len(cell) <= 10 for name in table if name != "ended" for cell in table[name]), "rounded"


@pytest.mark.slow
@pytest.mark.parametrize("view", KEYS)
def test_browser_shows_the_charts_with_a_trace_for_every_run_or_arm(
    view: ViewName, page: str, ran: StudyConfig, browser: Browser
) -> None:
    state = view_state(ran, [], view)
    arms = ["control", "c01", "c02"]
    traces = arms if view == "arms" else [f"{arm}/{replicate}" for arm in arms for replicate in range(2)]
    place = page.replace("TABLE", "CHART").replace(KEYS["runs"], KEYS[view])
    drawn = f"{CARDS.strip()}.filter(card => card.traces >= {len(traces)}).length >= {len(LINES)}"
    # What is out of sight is not drawn.
    browser.call("Emulation.setDeviceMetricsOverride", width=2600, height=3600, deviceScaleFactor=1, mobile=False)
    browser.open(place, f"Boolean({drawn} && document.querySelector('.parcoords'))")
    cards = browser.evaluate(CARDS)[: len(state["compareRunCharts"])]  # MLflow's own follow, a chart for each metric
    titles = [card["title"] for card in cards]
    assert titles[:3] == [
        f"{axis} vs. eval/accuracy" for axis in ("log10/noise.sigma_start", "rin/dose", "log10/rollout_corr/kl")
    ]
    for card in cards[4 : 4 + len(LINES)]:
        assert card["title"] in LINES
        assert all(f"{trace} ({card['title']})" in card["text"].splitlines() for trace in traces), "the legend"
    together = cards[-1]
    assert together["title"] == "Parallel Coordinates"
    assert {"gen/entropy", "eval/accuracy"} <= set(together["text"].splitlines())
    if view == "arms":
        assert {f"Group: {arm}" for arm in arms} <= set(browser.evaluate("document.body.innerText").splitlines())


@pytest.mark.slow
def test_a_run_s_page_opens_on_its_accuracy_and_says_how_it_ended(
    page: str, ran: StudyConfig, browser: Browser
) -> None:
    run = next(run for run in shown_runs(ran.tracking_uri, EXPERIMENT) if run.info.run_name == "c02/0")
    base = page.split("/rin#")[0]
    place = f"{base}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    browser.open(place, "document.body.innerText.includes('perf/trial_seconds')")
    lines = browser.evaluate("document.body.innerText").splitlines()
    names = [line for line in lines if line in run.data.metrics]
    assert names[0] == "eval/accuracy"
    assert any(line.startswith(f"{run.data.tags['ended']}: ") for line in lines), "and why"
    assert any("difference " in line and "Its control control/0" in line for line in lines)


@pytest.mark.slow
def test_files_of_a_run_can_be_read_in_the_ui(page: str, ran: StudyConfig) -> None:
    run_id = shown_runs(ran.tracking_uri, EXPERIMENT)[0].info.run_id
    base = page.split("/rin#")[0]
    with urllib.request.urlopen(f"{base}/ajax-api/2.0/mlflow/artifacts/list?run_id={run_id}") as answer:
        assert {"config.yaml", "answers.json"} <= {file["path"] for file in json.load(answer)["files"]}
    with urllib.request.urlopen(f"{base}/get-artifact?path=answers.json&run_uuid={run_id}") as answer:
        table = json.load(answer)
    assert {row[table["columns"].index("correct")] for row in table["data"]} == {"no", "yes"}


@pytest.mark.slow
def test_where_a_server_runs_already_only_the_views_are_saved(
    page: str, ran: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_views, "_server", lambda *_: pytest.fail("started a server"))
    base = page.split("/rin#")[0]
    urls: list[str] = []
    tag = f"{TAG}{KEYS['runs']}"
    mlflow_client.client(ran.tracking_uri).set_experiment_tag(experiment(ran).experiment_id, tag, "{}")
    serve_ui(ran.model_copy(update={"tracking_uri": f"{base}/"}), 0, on_ready=urls.append)
    assert urls == [page.replace("/rin#", "/#")]
    assert json.loads(experiment(ran).tags[tag])["name"] == "RIN sweep: runs"


@pytest.mark.slow
def test_the_end_of_a_session_ends_the_server_with_all_its_processes_as_ctrl_c_does(sweep: StudyConfig) -> None:
    with serving(sweep, signal.SIGTERM) as (process, _):
        assert process.poll() is None

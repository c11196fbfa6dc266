"""The saved view in a real sqlite store; `slow`: served by a real MLflow server and drawn by a real browser."""

import json
import math
import random
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dashboards import mlflow_views
from dashboards.mlflow_views import COLUMNS, LINES, PARALLEL, SCATTERS, TAG, save_view, serve_ui, view_state
from search import mlflow_client
from search.arms import Arm
from search.mlflow_client import check_tracking
from search.store import StudyConfig
from search.tracking import Tracker
from spaces.config import ConfigError, NoiseConfig, TrialConfig
from spaces.reading import flatten_fields
from tests.browser import Browser, browser
from tests.processes import free_port, program
from tests.real_mlflow import runs as shown_runs
from tests.written_sweeps import outcome, scores, study, write_trial
from trainable.outcome import HEALTHY, CollapseVerdict, Ending, StepReport
from trainable.signals import NAMES

__all__ = ["browser"]  # a fixture
EXPERIMENT = "e13-sweep"
STEPS = 29
ARMS = (  # sigma_start, modules, step of its collapse
    *((0.0, "linear", None), (0.005, "linear", None), (0.01, "linear", None), (0.05, "linear", 6)),
    *((0.01, "rmsnorm", None), (0.05, "rmsnorm", None)),
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """A sweep that MLflow has heard of."""
    config = study(tmp_path_factory.mktemp("store"), name=EXPERIMENT, replicates=2, settings={"eval": {"questions": 4}})
    check_tracking(config.tracking_uri, EXPERIMENT, config.owner)
    return config


@pytest.fixture(scope="module")
def uri(sweep: StudyConfig) -> str:
    return sweep.tracking_uri


@pytest.fixture(scope="module")
def filled(sweep: StudyConfig) -> str:
    """With twelve runs: six arms of two replicates, of which one arm collapses, told as a sweep tells them."""
    tracker = Tracker(sweep)
    for number, (sigma, modules, collapse) in enumerate(ARMS):
        config = TrialConfig(noise=NoiseConfig(sigma_start=sigma, sigma_end=sigma / 10, modules=(modules,)))
        arm = Arm(name="control" if number == 0 else f"c{number:02}", origin="searcher", config=config)
        for replicate in range(2):
            tell_run(sweep, tracker, arm, number, replicate, collapse)
    assert tracker.close() == 0
    return sweep.tracking_uri


def tell_run(sweep: StudyConfig, tracker: Tracker, arm: Arm, number: int, replicate: int, collapse: int | None) -> None:
    noise, draw = arm.config.noise, random.Random(10 * number + replicate)
    last = STEPS - 1 if collapse is None else collapse
    reports = []
    for step in range(last + 1):
        share = step / (STEPS - 1)
        broken = collapse is not None and step > 3
        sigma = 0.0 if step < 3 else noise.sigma_start * 0.1**share
        accuracy = 0.05 if broken else 0.2 + 0.25 * share - 2 * sigma + draw.gauss(0, 0.01)
        signals = {
            "rin/sigma": sigma,
            "grpo/reward": accuracy + draw.gauss(0, 0.02),
            "gen/entropy": 2.5 if broken else 0.6 - 0.3 * share + 4 * sigma + draw.gauss(0, 0.02),
            "gen/length": 6 + draw.gauss(0, 0.1),
            "gen/gibberish": 0.3 if broken else 0.2 * sigma,
            "filter/all_wrong": 0.9 if broken else 0.4 - 0.2 * share,
            "rollout_corr/kl": 0.01 + 400 * sigma**2 * math.exp(draw.gauss(0, 0.1)),
        }
        if step % 10 == 9 or step == last:
            signals["eval/accuracy"] = accuracy
        ends_it = collapse is not None and step == last
        verdict = (
            CollapseVerdict(collapsed=True, rule="gibberish", evidence="gen/gibberish 0.3 above 0.05")
            if ends_it
            else HEALTHY
        )
        reports.append(
            StepReport(
                step=step,
                sigma=sigma,
                signals=signals,
                verdict=verdict,
                seconds=2.5,
                samples=(),
                time_ms=1_700_000_000_000 + step,
            )
        )
    how: Ending = "completed" if collapse is None else "collapsed"
    ended = replace(
        outcome(arm, replicate, 0, how, rule="" if collapse is None else "gibberish", seconds=70.0),
        eval=scores([1, 0, 0, 1], accuracy),
        step=last + 1,
    )
    write_trial(sweep, arm, replicate, ended, reports=reports)
    tracker.begin(arm, number, replicate)
    for report in reports:
        tracker.report(arm, replicate, report)
    tracker.end(arm, replicate)


def experiment(uri: str) -> Any:
    return mlflow_client.client(uri).get_experiment_by_name(EXPERIMENT)


def test_view_fits_into_its_tag_and_saving_it_again_changes_nothing(uri: str) -> None:
    from mlflow.utils.validation import MAX_EXPERIMENT_TAG_VAL_LENGTH

    place = save_view(uri, EXPERIMENT)
    first = dict(experiment(uri).tags)
    assert TAG in first
    assert f"viewStateShareKey={TAG.removeprefix('mlflow.sharedViewState.')}&" in place
    assert len(first[TAG]) < MAX_EXPERIMENT_TAG_VAL_LENGTH / 2
    assert json.loads(json.loads(first[TAG])["state"]) == view_state()
    assert save_view(uri, EXPERIMENT) == place
    assert experiment(uri).tags == first


def test_view_of_an_earlier_version_is_brought_up_to_date(uri: str) -> None:
    save_view(uri, EXPERIMENT)
    now = experiment(uri)
    mlflow_client.client(uri).set_experiment_tag(now.experiment_id, TAG, "{}")
    save_view(uri, EXPERIMENT)
    assert experiment(uri).tags == now.tags


def test_view_names_only_what_a_trial_tracks() -> None:
    """A renamed signal or field would leave an empty column or chart behind."""
    metrics = {*NAMES.values(), "eval/accuracy"}
    params = set(flatten_fields(TrialConfig))
    named = {column: column.split("`")[1] for column in COLUMNS}
    assert {name for column, name in named.items() if column.startswith("tags.")} == {
        "arm",
        "replicate",
        "status",
        "collapse/rule",
    }
    assert {name for column, name in named.items() if column.startswith("params.")} <= params
    assert {name for column, name in named.items() if column.startswith("metrics.")} <= metrics
    assert {*LINES, *PARALLEL["selectedMetrics"]} <= metrics
    assert set(PARALLEL["selectedParams"]) <= params
    assert all(name in (params if kind == "PARAM" else metrics) for name, kind in SCATTERS)


def test_unknown_experiment_is_the_users_mistake(uri: str) -> None:
    with pytest.raises(ConfigError, match="no experiment e99; give the name of a sweep"):
        save_view(uri, "e99")


def test_taken_port_is_the_users_mistake_before_anything_starts(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_views, "save_view", lambda *_: pytest.fail("went on"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"port {port} on 127.0.0.1: Address already in use; give another --port"
        ):
            serve_ui(uri, EXPERIMENT, port, on_ready=print)
    with pytest.raises(ConfigError, match=r"port 70000 on 127.0.0.1: .*; give another --port"):
        serve_ui(uri, EXPERIMENT, 70000, on_ready=print)


@pytest.mark.slow
def test_server_that_ends_by_itself_is_an_error_with_its_last_words(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho cannot import sqlalchemy >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RuntimeError, match="exit code 3; it said:\ncannot import sqlalchemy"):
        serve_ui(uri, EXPERIMENT, free_port(), on_ready=lambda _: pytest.fail("not ready"))


@contextmanager
def serving(uri: str, number: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rin ui` in a process of its own, and the address that it gives; that signal ends it, with all its processes."""
    script = "import sys; from dashboards.mlflow_views import serve_ui; uri, name, port = sys.argv[1:]; "
    script += "serve_ui(uri, name, int(port), on_ready=lambda url: print(url, flush=True))"
    command = [sys.executable, "-c", script, uri, EXPERIMENT, str(free_port())]
    with program(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        yield process, url
        family = psutil.Process(process.pid).children(recursive=True)
        assert 1 <= len(family) <= 2, "mlflow and its one worker"
        process.send_signal(number)
        assert process.wait(30) == 0
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    with socket.create_server(("127.0.0.1", int(url.split("/#/")[0].rsplit(":", 1)[1]))):
        pass


@pytest.fixture(scope="module")
def page(filled: str) -> Iterator[str]:
    with serving(filled, signal.SIGINT) as (_, url):  # Ctrl-C, behind the last test that looks at it
        yield url


CELLS = """
[...document.querySelectorAll('[role=gridcell][col-id="COLUMN"]')]
  .map(cell => [Number(cell.closest('[role=row]').getAttribute('row-index')), cell.textContent.trim()])
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
def test_browser_shows_the_table_with_its_columns_sorted_by_accuracy(page: str, browser: Browser) -> None:
    browser.open(page, f"document.querySelectorAll('[role=gridcell]').length >= {2 * len(ARMS) * len(COLUMNS)}")
    assert [column for column in browser.evaluate(HEADERS) if column in COLUMNS] == list(COLUMNS)
    table = {column: browser.evaluate(CELLS.replace("COLUMN", column)) for column in COLUMNS}
    accuracies = [float(cell) for cell in table["metrics.`eval/accuracy`"]]
    assert len(accuracies) == 2 * len(ARMS)
    assert accuracies == sorted(accuracies, reverse=True)
    assert table["tags.`arm`"][-2:] == ["c03", "c03"]
    assert sorted(table["tags.`replicate`"][-2:]) == ["0", "1"]
    assert table["tags.`status`"] == ["completed"] * 10 + ["collapsed"] * 2
    assert table["tags.`collapse/rule`"] == ["-"] * 10 + ["gibberish"] * 2
    assert table["params.`noise.modules`"][-1] == '["linear"]'
    assert table["params.`noise.sigma_start`"][-1] == "0.05"
    text = browser.evaluate("document.body.innerText")
    assert "RIN sweep" in text, "the name of the view, in the list of views"
    assert "Judges" not in text, "the sidebar of the mode for chat applications"


@pytest.mark.slow
def test_browser_shows_the_charts_of_all_runs(page: str, browser: Browser) -> None:
    runs = [
        f"{'control' if arm == 0 else f'c{arm:02}'}/{replicate}" for arm in range(len(ARMS)) for replicate in range(2)
    ]
    ready = (
        f"{CARDS}.filter(card => card.traces >= {len(runs)}).length >= {len(SCATTERS + LINES)} && "
        "document.querySelector('.parcoords')"
    )
    browser.open(page.replace("TABLE", "CHART"), f"Boolean({ready.strip()})")
    cards = browser.evaluate(CARDS)
    scatters, lines, together = cards[:2], cards[2:8], cards[8]
    assert [card["title"] for card in scatters] == [f"{name} vs. eval/accuracy" for name, _ in SCATTERS]
    assert [card["title"] for card in lines] == list(LINES)
    for card in scatters:
        assert all(run in card["text"].splitlines() for run in runs), "the legend"
    for card in lines:
        assert all(f"{run} ({card['title']})" in card["text"].splitlines() for run in runs), "the legend"
    assert together["title"] == "Parallel Coordinates"
    for axis in PARALLEL["selectedParams"] + PARALLEL["selectedMetrics"]:
        assert axis in together["text"].splitlines()


@pytest.mark.slow
def test_files_of_a_run_can_be_read_in_the_ui(page: str, filled: str) -> None:
    run_id = shown_runs(filled, EXPERIMENT)[0].info.run_id
    base = page.split("/#/")[0]
    with urllib.request.urlopen(f"{base}/ajax-api/2.0/mlflow/artifacts/list?run_id={run_id}") as answer:
        assert {"config.yaml", "correct.json"} <= {file["path"] for file in json.load(answer)["files"]}
    with urllib.request.urlopen(f"{base}/get-artifact?path=correct.json&run_uuid={run_id}") as answer:
        assert json.load(answer) == [1, 0, 0, 1]


@pytest.mark.slow
def test_where_a_server_runs_already_only_the_view_is_saved(
    page: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_views, "_server", lambda *_: pytest.fail("started a server"))
    base = page.split("/#/")[0]
    urls: list[str] = []
    mlflow_client.client(uri).set_experiment_tag(experiment(uri).experiment_id, TAG, "{}")
    serve_ui(f"{base}/", EXPERIMENT, 0, on_ready=urls.append)
    assert urls == [page]
    assert json.loads(experiment(uri).tags[TAG])["name"] == "RIN sweep"


@pytest.mark.slow
def test_the_end_of_a_session_ends_the_server_with_all_its_processes_as_ctrl_c_does(uri: str) -> None:
    with serving(uri, signal.SIGTERM) as (process, _):
        assert process.poll() is None

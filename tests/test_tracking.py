"""The MLflow callback and its readers, against real sqlite stores, a real server that dies, and a real Tune run."""

import json
import logging
import math
import os
import pickle
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search import spool as spool_module
from search import tracking
from search.secrets import strip_password
from search.store import default_tracking_uri
from search.tracking import (
    MLflowCallback,
    check_tracking,
    deliver_spool,
    load_config,
    load_correct,
    load_history,
    load_study,
)
from spaces.config import ConfigError, NoiseConfig, TrialConfig
from spaces.reading import as_tree, flatten

CONFIG = as_tree(TrialConfig(noise=NoiseConfig(sigma_start=0.05, modules=("linear",)), seed=3))
SAMPLES = [{"step": 0, "prompt": "1+2=", "completion": "3", "answer": "3", "reward": 1.0}]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = default_tracking_uri(str(tmp_path_factory.mktemp("my store")))
    check_tracking(uri, "makes the database")  # any test may be the first one that a process runs
    return uri


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture
def callback(uri: str, experiment: str, tmp_path: Path) -> Iterator[MLflowCallback]:
    callback = make_callback(uri, experiment, tmp_path)
    yield callback
    callback.close()


def make_callback(uri: str, experiment: str, folder: Path) -> MLflowCallback:
    return MLflowCallback(uri=uri, experiment=experiment, sweep="it's a sweep", spool=folder / "spool")


def make_trial(
    arm: str = "c03", config: dict[str, Any] | None = None, error_file: str | None = None, folder: str = "/nowhere", number: int = 3
) -> Any:
    """As Tune hands it over; its own id differs at each start."""
    setting = {
        "config": CONFIG if config is None else config,
        "arm": arm,
        "replicate": 2,
        "origin": "searcher",
        "number": number,
        "folder": folder,
    }
    return SimpleNamespace(trial_id=uuid.uuid4().hex, config=setting, error_file=error_file, num_failures=1)


def result(step: int, **more: Any) -> dict[str, Any]:
    return {"trial_id": "t1", "config": {}, "training_iteration": step + 1, "step": step, "seconds": 0.5, "collapsed": 0, "rule": ""} | more


def outcome(status: str, step: int, **more: Any) -> dict[str, Any]:
    evaluation = {"accuracy": 0.75, "accuracy_bf16": 0.8, "accuracy_start": 0.2, "n": 4, "correct": [1, 1, 0, 1]}
    base = {
        "outcome": status,
        "rule": "",
        "step": step,
        "eval": evaluation,
        "receipt": {"quantized": ["q"]},
        "config": CONFIG,
        "seconds": 9.0,
    }
    return base | more


def run_one(callback: MLflowCallback, steps: int = 3, status: str = "completed") -> None:
    trial = make_trial()
    callback.on_trial_start(trial=trial)
    for step in range(steps):
        last = {"outcome": outcome(status, step)} if step == steps - 1 else {}
        callback.on_trial_result(trial=trial, result=result(step, **{"grpo/reward": step / 10, "eval/n": 4}, samples=SAMPLES, **last))
    callback.on_trial_complete(trial=trial)


def mlflow_run(uri: str, run_id: str) -> Any:
    return tracking._client(uri).get_run(run_id)


def eventually(claim: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def whole_experiment(uri: str, experiment: str) -> Any:
    """Everything that a second delivery could double or change."""
    return [
        (
            record.params,
            record.status,
            {name: load_history(uri, record.run_id, name) for name in record.metrics},
            {name: len(tracking._client(uri).get_metric_history(record.run_id, name)) for name in record.metrics},
            mlflow_run(uri, record.run_id).data.tags,
            mlflow_run(uri, record.run_id).info.status,
        )
        for record in load_study(uri, experiment)
    ]


# Where the tracking is


@pytest.mark.slow
def test_importing_tracking_imports_neither_mlflow_nor_ray() -> None:
    code = "import sys, search.tracking; print([name for name in ('mlflow', 'ray', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("first_use", ["check_tracking(uri, 'x')", "deliver_spool(folder, uri)"])
def test_telemetry_is_off_before_mlflow_loads(first_use: str, tmp_path: Path) -> None:
    (tmp_path / tracking.SPOOL).write_text('{"do": "log", "experiment": "x", "key": "k", "time": 1, "tags": {"arm": "a"}}\n')
    if first_use.startswith("deliver"):  # which makes no database
        check_tracking(f"sqlite:///{tmp_path}/m.db", "x")
    code = (
        "import os; [os.environ.pop(name, None) for name in ('CI', 'DO_NOT_TRACK', 'MLFLOW_DISABLE_TELEMETRY')]\n"
        "from search.tracking import check_tracking, deliver_spool; from pathlib import Path\n"
        f"folder = Path({str(tmp_path)!r}); uri = f'sqlite:///{{folder}}/m.db'; {first_use}\n"
        "from mlflow.telemetry.client import get_telemetry_client; from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "print(is_telemetry_disabled(), get_telemetry_client())"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.strip() == "True None"
    assert done.stderr == ""  # and a new database is made without a page of log


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("http://user:secret@host:5000/path", "http://user@host:5000/path"),
        ("postgresql+psycopg2://rin:p@ss:secret@db/mlflow", "postgresql+psycopg2://rin@db/mlflow"),
        ("https://:secret@host", "https://@host"),
        ("API request to http://u:secret@h:1/api failed, see a@b", "API request to http://u@h:1/api failed, see a@b"),
        ("mysql://host/db?user=me&password=secret&x=1", "mysql://host/db?user=me&password=&x=1"),
        ("https://host/?access_token=secret", "https://host/?access_token="),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////home/me/a:b@c/mlflow.db", "sqlite:////home/me/a:b@c/mlflow.db"),
    ],
)
def test_strip_password(text: str, stripped: str) -> None:
    assert strip_password(text) == stripped


def test_check_tracking_makes_an_experiment_once(uri: str, experiment: str) -> None:
    assert check_tracking(uri, experiment) == check_tracking(uri, experiment)
    artifacts = tracking._client(uri).get_experiment_by_name(experiment).artifact_location
    assert Path(artifacts).parent == Path(uri.removeprefix("sqlite:///")).parent  # beside the database, not ./mlruns


def test_a_relative_sqlite_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment_id = check_tracking("sqlite:///sub/mlflow.db", "x")
    assert (tmp_path / "sub" / "mlflow.db").exists()
    assert (
        tracking.absolute_uri("sqlite:///sub/mlflow.db")
        == f"sqlite:///{tmp_path}/sub/mlflow.db"
        == default_tracking_uri(str(tmp_path / "sub"))
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert check_tracking(f"sqlite:///{tmp_path}/sub/mlflow.db", "x") == experiment_id
    check_tracking("sqlite:///sub/mlflow.db", "x")  # MLflow itself remembers the store of this text
    assert load_study(default_tracking_uri(str(tmp_path / "elsewhere" / "sub")), "x") == ()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    "bad",
    [
        "http://rin:secret@127.0.0.1:{port}",
        "sqlite:///{tmp}/text.db",
        "sqlite:///{tmp}/text.db/below/mlflow.db",
        "postgresql://rin:secret@127.0.0.1:{port}/mlflow",
        "nonsense://rin:secret@host",
        "{tmp}/mlruns",
    ],
)
def test_unusable_tracking_is_one_line_within_seconds(bad: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, though it is long enough to be looked at as one" * 20)
    bad = bad.format(port=free_port(), tmp=tmp_path)
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        check_tracking(bad, "x")
    message = str(caught.value)
    assert time.monotonic() - start < 8
    assert "\n" not in message
    assert strip_password(bad) in message
    assert "--tracking-uri" in message
    assert "secret" not in message


def test_a_deleted_experiment_is_refused_with_the_remedy(uri: str, experiment: str) -> None:
    tracking._client(uri).delete_experiment(check_tracking(uri, experiment))
    with pytest.raises(ConfigError, match="restore"):
        check_tracking(uri, experiment)


def test_a_store_that_can_be_read_but_not_written_is_refused(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path))
    check_tracking(uri, "x")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:  # file permissions do not stop root
        database.execute("CREATE TRIGGER t BEFORE INSERT ON experiment_tags BEGIN SELECT RAISE(ABORT, 'read only'); END")
        database.execute("DELETE FROM experiment_tags")
    with pytest.raises(ConfigError, match=r"cannot write to experiment x: .*read only"):
        check_tracking(uri, "x")


def test_reading_makes_no_database(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_study(default_tracking_uri(str(tmp_path)), "x")
    assert list(tmp_path.iterdir()) == []


# One run per trial


def test_a_completed_trial_reads_back_as_it_was(callback: MLflowCallback, uri: str, experiment: str) -> None:
    started = time.time()
    run_one(callback)
    callback.close()
    (record,) = load_study(uri, experiment)
    assert (record.arm, record.replicate, record.origin) == ("c03", 2, "searcher")
    assert (record.status, record.rule, record.reason) == ("completed", "", "")
    assert record.params.keys() == flatten(CONFIG).keys()
    assert (record.params["noise.sigma_start"], record.params["noise.modules"], record.params["quant.scale_rule"]) == (
        "0.05",
        '["linear"]',
        "floor",
    )
    assert record.metrics["grpo/reward"] == 0.2
    assert (record.metrics["eval/accuracy"], record.metrics["eval/accuracy_start"], record.metrics["perf/trial_seconds"]) == (
        0.75,
        0.2,
        9.0,
    )
    assert not {name for name in record.metrics if name.startswith(("config", "trial", "training"))}
    assert started - 1 < record.started <= (record.ended or 0) < time.time() + 1
    assert load_history(uri, record.run_id, "grpo/reward") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert load_correct(uri, record.run_id) == [1, 1, 0, 1]
    assert TrialConfig.model_validate(load_config(uri, record.run_id)) == TrialConfig.model_validate(CONFIG)
    assert json.loads(tracking._read_file(uri, record.run_id, "receipt.json")) == {"quantized": ["q"]}
    run = mlflow_run(uri, record.run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["sweep"]) == ("FINISHED", "c03/2", "it's a sweep")


def test_samples_are_an_mlflow_table(callback: MLflowCallback, uri: str, experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # load_table looks there, whatever its client says
    trial = make_trial()
    for step, reward in ((0, 1.0), (1, math.nan)):
        callback.on_trial_result(trial=trial, result=result(step, samples=[SAMPLES[0] | {"step": step, "reward": reward}]))
    callback.on_trial_result(trial=trial, result=result(2, samples=None, outcome=outcome("completed", 2)))
    callback.close()
    (record,) = load_study(uri, experiment)
    client = tracking._client(uri)
    table = client.load_table(check_tracking(uri, experiment), "samples.json", run_ids=[record.run_id])
    assert list(table.columns) == ["step", "prompt", "completion", "answer", "reward"]
    assert table["step"].tolist() == [0, 1]
    json.loads(tracking._read_file(uri, record.run_id, "samples.json"), parse_constant=pytest.fail)  # browsers refuse NaN
    assert json.loads(client.get_run(record.run_id).data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]


def test_a_collapsed_trial_is_killed_and_keeps_its_non_finite_metrics(callback: MLflowCallback, uri: str, experiment: str) -> None:
    trial = make_trial()
    callback.on_trial_start(trial=trial)
    callback.on_trial_result(
        trial=trial, result=result(0, **{"grpo/loss": 0.5, "grpo/kl": 0.1, "gen/entropy": -math.inf, "eval/accuracy": None})
    )
    callback.on_trial_result(trial=trial, result=result(1, **{"grpo/loss": math.nan, "grpo/kl": math.inf, "gen/entropy": 1}))
    verdict = {"collapsed": 1, "rule": "nonfinite", "evidence": "grpo/loss is nan"}
    last = {"grpo/loss": math.nan, "grpo/kl": math.inf, "outcome": outcome("collapsed", 2, rule="nonfinite")}
    callback.on_trial_result(trial=trial, result=result(2, **verdict, **last))
    callback.on_trial_complete(trial=trial)
    callback.close()
    (record,) = load_study(uri, experiment)
    assert (record.status, record.rule, record.reason) == ("collapsed", "nonfinite", "grpo/loss is nan")
    assert math.isnan(record.metrics["grpo/loss"])
    assert record.metrics["grpo/kl"] == math.inf
    assert load_history(uri, record.run_id, "gen/entropy") == [(0, -math.inf), (1, 1.0)]
    loss = load_history(uri, record.run_id, "grpo/loss")
    assert [step for step, value in loss if math.isnan(value)] == [1, 2]
    run = mlflow_run(uri, record.run_id)
    assert run.info.status == "KILLED"
    nonfinite = {name: value for name, value in run.data.tags.items() if name.startswith("nonfinite/")}
    assert nonfinite == {"nonfinite/grpo/loss": "1", "nonfinite/grpo/kl": "1", "nonfinite/gen/entropy": "0"}
    assert run.data.tags["collapse/step"] == "2"


def test_a_rule_that_only_monitors_keeps_its_first_word(callback: MLflowCallback, uri: str, experiment: str) -> None:
    trial = make_trial()
    callback.on_trial_result(trial=trial, result=result(4, rule="entropy_high", evidence="3.1 nats"))
    callback.on_trial_result(trial=trial, result=result(5, rule="reward_low", evidence="0.01", outcome=outcome("completed", 5)))
    callback.close()
    (record,) = load_study(uri, experiment)
    assert (record.status, record.rule, record.reason) == ("completed", "entropy_high", "3.1 nats")


def test_many_and_long_params_arrive_and_a_cut_is_marked(callback: MLflowCallback, uri: str, experiment: str) -> None:
    config = {f"key{index}": index for index in range(250)} | {"long": "x" * 7000, "edge": "y" * 6000, "list": list(range(3000))}
    callback.on_trial_start(trial=make_trial(config=config))
    callback.close()
    (record,) = load_study(uri, experiment)
    assert len(record.params) == 253
    assert record.params["long"].endswith("xx... (7000 characters)")
    assert len(record.params["long"]) == 6000
    assert record.params["edge"] == "y" * 6000
    assert record.params["list"].startswith("[0,1,2,")
    assert load_config(uri, record.run_id) == config  # whole, in the file


def test_a_trial_that_fails_in_its_setup_has_a_run_with_the_error(
    callback: MLflowCallback, uri: str, experiment: str, tmp_path: Path
) -> None:
    (tmp_path / "error.txt").write_text("Failure # 1\nTraceback\n  File x\n\x1b[36mRuntimeError: no GPU\x1b[39m\n\n")
    callback.on_trial_error(trial=make_trial(error_file=str(tmp_path / "error.txt")))
    callback.on_trial_error(trial=make_trial(arm="c04", error_file=None))
    callback.close()
    first, second = sorted(load_study(uri, experiment), key=lambda record: record.arm)
    assert (first.status, first.reason) == ("failed", "RuntimeError: no GPU")
    assert (second.status, second.reason) == ("failed", "unknown")
    assert mlflow_run(uri, first.run_id).info.status == "FAILED"
    with pytest.raises(ConfigError, match=r"has no correct\.json"):
        load_correct(uri, first.run_id)


def test_a_trial_that_hung_until_its_retries_were_used_up_failed_by_rule_hang(
    callback: MLflowCallback, uri: str, experiment: str, tmp_path: Path
) -> None:
    attempt = {"started": 1.0, "seen": 2.0, "step": 3, "ended": "hang", "reason": "step 3: phase rollout took over 900 s"}
    for number in (1, 2, 3):
        (tmp_path / f"attempt-{number:03d}.json").write_text(json.dumps(attempt))
    (tmp_path / "error.txt").write_text("ray.exceptions.ActorDiedError: the actor died")
    callback.on_trial_error(trial=make_trial(error_file=str(tmp_path / "error.txt"), folder=str(tmp_path)))
    callback.close()
    (record,) = load_study(uri, experiment)
    assert (record.status, record.rule) == ("failed", "hang")
    assert record.reason == "step 3: phase rollout took over 900 s (3 attempts)"


def test_a_stopped_trial_s_evaluation_arrives_after_its_end_and_only_there(callback: MLflowCallback, uri: str, experiment: str) -> None:
    callback.on_trial_start(trial=make_trial())
    callback.on_trial_result(trial=make_trial(), result=result(0))
    callback.on_trial_complete(trial=make_trial())
    completed = make_trial(arm="c04")
    callback.on_trial_result(trial=completed, result=result(0, outcome=outcome("completed", 0)))
    callback.close()
    changed = outcome("stopped", 1)
    changed["eval"] = changed["eval"] | {"accuracy": 0.5}
    for arm, replicate in (("c03", 2), ("c04", 2), ("nobody", 0)):
        callback.add_outcome(arm, replicate, changed)
    callback.close()
    stopped, done = sorted(load_study(uri, experiment), key=lambda record: record.arm)
    assert (stopped.status, stopped.metrics["eval/accuracy"]) == ("stopped", 0.5)
    assert (done.status, done.metrics["eval/accuracy"]) == ("completed", 0.75)
    assert load_correct(uri, stopped.run_id) == [1, 1, 0, 1]


def test_an_error_that_a_retry_mended_is_not_the_reason_of_the_outcome(
    callback: MLflowCallback, uri: str, experiment: str, tmp_path: Path
) -> None:
    (tmp_path / "error.txt").write_text("OSError: node lost")
    callback.on_trial_start(trial=make_trial())
    callback.on_trial_recover(trial=make_trial(error_file=str(tmp_path / "error.txt")))
    run_one(callback)
    callback.close()
    (record,) = load_study(uri, experiment)
    assert (record.status, record.reason) == ("completed", "")
    tags = mlflow_run(uri, record.run_id).data.tags
    assert (tags["retries"], tags["error"]) == ("1", "OSError: node lost")


def test_a_failure_after_the_outcome_does_not_undo_it(callback: MLflowCallback, uri: str, experiment: str) -> None:
    run_one(callback)
    callback.on_trial_error(trial=make_trial())
    callback.close()
    assert [record.status for record in load_study(uri, experiment)] == ["completed"]


def test_a_failure_of_a_retry_after_the_outcome_counts(callback: MLflowCallback, uri: str, experiment: str) -> None:
    run_one(callback)
    callback.on_trial_recover(trial=make_trial())
    callback.on_trial_start(trial=make_trial())
    callback.on_trial_error(trial=make_trial())
    callback.close()
    assert [record.status for record in load_study(uri, experiment)] == ["failed"]


def test_a_trial_stopped_by_the_scheduler_is_stopped_and_finished(callback: MLflowCallback, uri: str, experiment: str) -> None:
    trial = make_trial()
    callback.on_trial_start(trial=trial)
    callback.on_trial_result(trial=trial, result=result(0, done=True, **{"eval/accuracy": 0.3}))
    callback.on_trial_complete(trial=trial)
    callback.on_trial_complete(trial=make_trial(arm="c09"))
    callback.close()
    (record,) = load_study(uri, experiment)
    assert (record.status, record.metrics["eval/accuracy"], mlflow_run(uri, record.run_id).info.status) == ("stopped", 0.3, "FINISHED")


def test_close_without_completion_closes_every_run_with_what_it_has(callback: MLflowCallback, uri: str, experiment: str) -> None:
    for arm in ("c03", "c04"):
        callback.on_trial_start(trial=make_trial(arm=arm))
    callback.on_trial_result(trial=make_trial(), result=result(0, samples=SAMPLES, **{"grpo/reward": 0.1}))
    callback.close()
    callback.close()
    records = load_study(uri, experiment)
    assert [record.status for record in records] == ["stopped", "stopped"]
    assert [mlflow_run(uri, record.run_id).info.status for record in records] == ["KILLED", "KILLED"]
    assert all(record.ended for record in records)
    (sampled,) = [record for record in records if record.arm == "c03"]
    assert json.loads(tracking._read_file(uri, sampled.run_id, "samples.json"))["data"][0][2] == "3"


@pytest.mark.parametrize("state_is_saved", [True, False])
def test_a_resumed_trial_goes_on_in_its_run(uri: str, experiment: str, tmp_path: Path, state_is_saved: bool) -> None:
    first, trial = make_callback(uri, experiment, tmp_path), make_trial()
    first.on_trial_start(trial=trial)
    for step in range(3):
        metrics = {"grpo/reward": step / 10, "grpo/kl": math.nan}
        first.on_trial_result(trial=trial, result=result(step, samples=[SAMPLES[0] | {"step": step}], **metrics))
    state = pickle.loads(pickle.dumps(first.get_state()))
    first.close()
    (stopped,) = load_study(uri, experiment)
    second = make_callback(uri, experiment, tmp_path)
    if state_is_saved:
        second.set_state(state)
    second.on_trial_start(trial=trial)
    for step in (2, 3):  # the checkpoint was one step older than the last report
        last = {"outcome": outcome("completed", step)} if step == 3 else {}
        rows = [SAMPLES[0] | {"step": step}]
        metrics = {"grpo/reward": step / 20, "grpo/kl": math.nan}
        second.on_trial_result(trial=trial, result=result(step, samples=rows, **metrics, **last))
        if step == 2:
            eventually(lambda: not second._spool._queue)
            (again,) = load_study(uri, experiment)
            assert (again.status, again.ended, mlflow_run(uri, again.run_id).info.status) == ("running", None, "RUNNING")
    second.on_trial_complete(trial=trial)
    assert second.get_state() is None
    second.close()
    (record,) = load_study(uri, experiment)
    assert (record.ended or 0) > (stopped.ended or math.inf)
    assert (record.run_id, record.status, stopped.status) == (stopped.run_id, "completed", "stopped")
    assert load_history(uri, record.run_id, "grpo/reward") == [(0, 0.0), (1, 0.1), (2, 0.1), (3, 0.15)]
    sampled = [row[0] for row in json.loads(tracking._read_file(uri, record.run_id, "samples.json"))["data"]]
    assert sampled == ([0, 1, 2, 3] if state_is_saved else [2, 3])
    if state_is_saved:
        assert mlflow_run(uri, record.run_id).data.tags["nonfinite/grpo/kl"] == "0"


def test_runs_open_at_the_snapshot_are_closed_even_if_they_never_start_again(uri: str, experiment: str, tmp_path: Path) -> None:
    first = make_callback(uri, experiment, tmp_path)
    first.on_trial_start(trial=make_trial())
    state = first.get_state()
    first._spool.close()  # killed: the records are out, nothing was closed
    assert [record.status for record in load_study(uri, experiment)] == ["running"]
    second = make_callback(uri, experiment, tmp_path)
    assert state is not None
    second.set_state(state)
    second.close()
    assert [record.status for record in load_study(uri, experiment)] == ["stopped"]


def test_a_pickled_callback_is_the_live_one_and_holds_no_password(tmp_path: Path) -> None:
    callback = MLflowCallback(uri="http://rin:secret@host:5000", experiment="x", sweep="s", spool=tmp_path)
    pickled = pickle.dumps(callback)
    assert b"secret" not in pickled
    assert pickle.loads(pickled) is callback
    tracking._LIVE.pop("s")
    with pytest.raises(ConfigError, match="belongs to the process that made it; make a new one"):
        pickle.loads(pickled)


def test_a_study_is_read_page_by_page_in_the_order_of_its_arms_without_the_runs_of_others(
    callback: MLflowCallback, uri: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking._client(uri).create_run(check_tracking(uri, experiment), tags={"status": "somebody's own run"})
    for arm, number in (("c01", 1), ("c02", 2), ("control", 0)):  # started in this order
        callback.on_trial_start(trial=make_trial(arm=arm, number=number))
        time.sleep(0.002)
    callback.close()
    monkeypatch.setattr(tracking, "RUNS_PER_PAGE", 2)
    assert [record.arm for record in load_study(uri, experiment)] == ["control", "c01", "c02"]


def test_study_that_does_not_exist_is_the_users_mistake(uri: str) -> None:
    check_tracking(uri, "another")
    with pytest.raises(ConfigError, match="no experiment nowhere"):
        load_study(uri, "nowhere")


# When the tracking is away


def test_an_outage_costs_nothing_but_a_line_and_is_delivered_once(
    uri: str, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = f"http://rin:secret@127.0.0.1:{free_port()}"
    callback = make_callback(away, experiment, tmp_path)
    start = time.monotonic()
    run_one(callback, steps=29)
    assert time.monotonic() - start < 1
    with caplog.at_level(logging.WARNING):
        callback.close()
    folder = tmp_path / "spool"
    records = (folder / tracking.SPOOL).read_text().splitlines()
    assert len(records) == 3 + 29 + 4 + 2  # start, reports, files, end
    (line,) = [message for message in caplog.messages if "not delivered" in message]
    assert f"{len(records)} records" in line
    assert str(folder) in line
    assert "secret" not in caplog.text
    shutil.copytree(folder, tmp_path / "killed before the file was emptied")
    assert deliver_spool(folder, uri) == 0
    assert (folder / tracking.SPOOL).read_text() == ""
    once = whole_experiment(uri, experiment)
    assert once[0][1] == "completed"
    assert len(once[0][2]["grpo/reward"]) == 29
    assert deliver_spool(folder, uri) == 0
    assert deliver_spool(tmp_path / "killed before the file was emptied", uri) == 0
    assert repr(whole_experiment(uri, experiment)) == repr(once)


def test_delivering_what_was_left_makes_no_database_and_keeps_the_records(tmp_path: Path) -> None:
    """A study.json of somebody else may name any file of this machine."""
    record = '{"do": "log", "experiment": "x", "key": "k", "time": 1, "tags": {"arm": "a"}}\n'
    (tmp_path / tracking.SPOOL).write_text(record)
    assert deliver_spool(tmp_path, default_tracking_uri(str(tmp_path / "elsewhere"))) == 1
    assert (tmp_path / tracking.SPOOL).read_text() == record
    assert [path.name for path in tmp_path.iterdir() if path.name == "elsewhere"] == []


@pytest.mark.parametrize("delivered", [1, 2, 4, 9, 11])
def test_a_crash_in_the_middle_of_delivery_doubles_nothing(uri: str, experiment: str, tmp_path: Path, delivered: int) -> None:
    callback = make_callback(f"sqlite:///{__file__}/below/mlflow.db", experiment, tmp_path)
    run_one(callback)
    callback.close()
    folder = tmp_path / "spool"
    records = [json.loads(line) for line in (folder / tracking.SPOOL).read_text().splitlines()]
    assert len(records) == 12
    assert tracking._Backend(uri, folder).send(records[:delivered], lambda: None) == ([], "")
    assert deliver_spool(folder, uri) == 0
    ((params, status, history, points, tags, run_status),) = whole_experiment(uri, experiment)
    assert (status, tags["status"], run_status, len(params)) == ("completed", "completed", "FINISHED", len(flatten(CONFIG)))
    assert history["grpo/reward"] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert (points["grpo/reward"], points["eval/accuracy"]) == (3, 1)
    assert not (folder / "mlflow-refused.jsonl").exists()


def test_what_a_killed_process_left_is_delivered_before_what_comes_next(uri: str, experiment: str, tmp_path: Path) -> None:
    away = make_callback(f"sqlite:///{__file__}/below/mlflow.db", experiment, tmp_path)
    trial = make_trial()
    away.on_trial_start(trial=trial)
    away.on_trial_result(trial=trial, result=result(0, **{"grpo/reward": 0.5}))
    away._spool.close()
    with (tmp_path / "spool" / tracking.SPOOL).open("a") as file:
        file.write('{"do": "log", "cut by a ki')
    back = make_callback(uri, experiment, tmp_path)
    back.on_trial_start(trial=trial)
    back.on_trial_result(trial=trial, result=result(1, outcome=outcome("completed", 1), **{"grpo/reward": 0.7}))
    back.close()
    (record,) = load_study(uri, experiment)
    assert record.status == "completed"
    assert load_history(uri, record.run_id, "grpo/reward") == [(0, 0.5), (1, 0.7)]
    assert (tmp_path / "spool" / tracking.SPOOL).read_text() == ""


def test_the_spool_tries_again_in_order_and_complains_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spool_module, "LONGEST_PAUSE", 0.01)
    attempts: list[int] = []
    received: list[int] = []

    def send(records: Sequence[dict[str, Any]], note_delivery: Any) -> tuple[list[dict[str, Any]], str]:
        attempts.append(len(records))
        if len(attempts) < 5:
            return list(records), "it is down"
        received.extend(record["n"] for record in records)
        return [], ""

    path = tmp_path / "spool.jsonl"
    path.write_text('{"n": -1}\n{"n": 99, "cut by a ki')
    spool = spool_module.Spool(path, send, "the receiver")
    for n in range(3):
        spool.put({"n": n})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] in ([-1, 0, 1, 2], [])
    eventually(lambda: not spool._queue)
    assert spool.close() == 0
    assert received == [-1, 0, 1, 2]
    assert path.read_text() == ""
    assert [message for message in caplog.messages if "the receiver does not take records: it is down" in message] == caplog.messages[:1]
    assert len(caplog.messages) == 1


def test_close_waits_while_records_are_delivered_and_not_for_a_receiver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "CLOSE_SECONDS", 0.5)
    hangs = threading.Event()

    def send(records: Sequence[dict[str, Any]], note_delivery: Any) -> tuple[list[dict[str, Any]], str]:
        for record in records:
            if record["n"] == "hang":
                hangs.wait(20)
            time.sleep(0.2)
            note_delivery()
        return [], ""

    slow = spool_module.Spool(tmp_path / "slow.jsonl", send, "the receiver")
    for n in range(6):
        slow.put({"n": n})
    assert slow.close() == 0  # 1.2 s, though no one waits longer than 0.5 s
    hung = spool_module.Spool(tmp_path / "hung.jsonl", send, "the receiver")
    hung.put({"n": "hang"})
    start = time.monotonic()
    assert hung.close() == 1
    assert time.monotonic() - start < 5
    assert json.loads((tmp_path / "hung.jsonl").read_text()) == {"n": "hang"}
    assert spool_module.deliver(tmp_path / "hung.jsonl", send, "another") == 0  # still in use by the thread that hangs
    hangs.set()


def test_a_spool_in_use_is_left_to_its_owner(uri: str, experiment: str, tmp_path: Path) -> None:
    owner = make_callback(f"sqlite:///{__file__}/below/mlflow.db", experiment, tmp_path)
    owner.on_trial_start(trial=make_trial())
    before = (tmp_path / "spool" / tracking.SPOOL).read_text()
    assert before
    assert deliver_spool(tmp_path / "spool", uri) == 0
    assert (tmp_path / "spool" / tracking.SPOOL).read_text() == before
    other = spool_module.Spool(tmp_path / "spool" / tracking.SPOOL, lambda records, note: ([], ""), "nobody")
    with pytest.raises(ConfigError, match="another process"):
        other.start(patience=0.1)
    owner.close()


def test_a_refused_record_is_kept_aside_and_does_not_block(
    callback: MLflowCallback, uri: str, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        callback.on_trial_start(trial=make_trial(config={"seed": 1}))
        callback.on_trial_start(trial=make_trial(config={"seed": 2}))  # MLflow allows no change of a param
        callback.on_trial_result(trial=make_trial(), result=result(0, outcome=outcome("completed", 0)))
        callback.close()
    (record,) = load_study(uri, experiment)
    assert (record.status, record.params) == ("completed", {"seed": "1"})
    (refused,) = [json.loads(line) for line in (tmp_path / "spool" / "mlflow-refused.jsonl").read_text().splitlines()]
    assert refused["record"]["params"] == {"seed": "2"}
    assert "MLflow refuses" in caplog.text


def test_a_proxy_that_knows_no_mlflow_is_an_outage_not_a_refusal(experiment: str, tmp_path: Path) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"The plain HTTP request was sent to HTTPS port")

        do_POST = do_GET

        def log_message(self, *args: Any) -> None: ...

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    callback = make_callback(f"http://127.0.0.1:{proxy.server_port}", experiment, tmp_path)
    callback.on_trial_start(trial=make_trial())
    callback.close()
    proxy.shutdown()
    assert len((tmp_path / "spool" / tracking.SPOOL).read_text().splitlines()) == 5
    assert not (tmp_path / "spool" / "mlflow-refused.jsonl").exists()


def test_after_one_file_fails_the_others_are_not_tried_in_that_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def apply(self: Any, record: dict[str, Any]) -> None:
        tried.append(record["n"])
        if record["do"] == "file":
            raise TimeoutError("the artifact store hangs")

    monkeypatch.setattr(tracking._Backend, "_apply", apply)
    records = [{"do": "file", "n": 0}, {"do": "log", "n": 1}, {"do": "file", "n": 2}, {"do": "log", "n": 3}]
    left, trouble = tracking._Backend("http://host", tmp_path).send(records, lambda: None)
    assert ([record["n"] for record in left], tried, trouble) == ([0, 2], [0, 1, 3], "TimeoutError: the artifact store hangs")


def test_metrics_do_not_wait_for_files(uri: str, experiment: str, tmp_path: Path) -> None:
    client = tracking._client(uri, create=True)
    (tmp_path / "file").write_text("in the way of the artifacts' folder")
    client.create_experiment(experiment, artifact_location=str(tmp_path / "file"))
    callback = make_callback(uri, experiment, tmp_path)
    run_one(callback)
    callback.close()
    (record,) = load_study(uri, experiment)
    assert (record.status, record.metrics["grpo/reward"]) == ("completed", 0.2)
    left = [json.loads(line)["do"] for line in (tmp_path / "spool" / tracking.SPOOL).read_text().splitlines()]
    assert left.count("file") == 5
    (tmp_path / "file").unlink()
    assert deliver_spool(tmp_path / "spool", uri) == 0
    assert load_correct(uri, record.run_id) == [1, 1, 0, 1]


# The real things


def test_the_callback_answers_every_method_of_tunes_callback() -> None:
    from ray.tune import Callback

    names = {name for name in vars(Callback) if not name.startswith("_")}
    assert "on_trial_result" in names
    assert not {name for name in names if not callable(getattr(MLflowCallback, name, None))}


@pytest.mark.slow
def test_every_ending_of_a_real_tune_run_closes_its_run(uri: str, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray import tune

    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    monkeypatch.setenv("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    repaired = tmp_path / "repaired"

    class Toy(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            self.arm, self.own = config["arm"], Path(config["folder"]) / config["arm"]
            self.steps_done = int(self.own.read_text()) if self.own.exists() else 0
            if self.arm == "bad-setup" and not repaired.exists():
                raise RuntimeError("no GPU in setup")

        def step(self) -> dict[str, Any]:
            step, self.steps_done = self.steps_done, self.steps_done + 1
            self.own.write_text(str(step))
            if self.arm == "bad-step" and step == 1 and not repaired.exists():
                raise ValueError("boom in step")
            report = {"step": step, "seconds": 0.1, "collapsed": 0, "rule": "", "evidence": "", "grpo/reward": step / 10}
            report["done"] = step == 2 and self.arm != "endless"
            if self.arm == "collapses" and step == 1:
                report |= {"collapsed": 1, "rule": "nonfinite", "evidence": "loss is nan", "grpo/loss": float("nan"), "done": True}
            if report["done"]:
                status = "collapsed" if report["collapsed"] else "completed"
                result = {"accuracy": 0.5, "n": 2, "correct": [0, 1]}
                report["outcome"] = {"outcome": status, "rule": report["rule"], "step": step, "eval": result, "receipt": {}, "seconds": 1.0}
            return report

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            raise AssertionError("nothing here is saved by Tune")

    arms = ["completes", "collapses", "bad-step", "bad-setup", "endless"]
    setting = {
        "config": {"seed": 1, "noise": {"sigma_start": 0.05}},
        "replicate": 0,
        "origin": "point",
        "number": 0,
        "folder": str(tmp_path),
    }
    calls: list[tuple[str, str]] = []

    class Watched(MLflowCallback):
        def on_trial_start(self, *, trial: Any, **info: Any) -> None:
            calls.append((trial.config["arm"], "start"))
            super().on_trial_start(trial=trial, **info)

        def on_trial_result(self, *, trial: Any, result: Any, **info: Any) -> None:
            calls.append((trial.config["arm"], f"result {result['step']} done={result['done']}"))
            super().on_trial_result(trial=trial, result=result, **info)

        def on_trial_complete(self, *, trial: Any, **info: Any) -> None:
            calls.append((trial.config["arm"], "complete"))
            super().on_trial_complete(trial=trial, **info)

        def on_trial_error(self, *, trial: Any, **info: Any) -> None:
            calls.append((trial.config["arm"], "error"))
            super().on_trial_error(trial=trial, **info)

    home = tmp_path / "workers"
    home.mkdir()
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"working_dir": str(home)}, log_to_driver=False)

    def run(arms: list[str], name: str) -> Any:
        callback = Watched(uri=uri, experiment=experiment, sweep="toy", spool=tmp_path / "spool")
        config = tune.RunConfig(
            name=name,
            storage_path=str(tmp_path),
            callbacks=[callback],
            stop={"training_iteration": 4},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
        )
        return tune.Tuner(Toy, param_space={**setting, "arm": tune.grid_search(arms)}, run_config=config).fit()

    try:
        grid = run(arms, "first")
        assert len(grid) == 5
        assert grid.num_errors == 2
        records = {record.arm: record for record in load_study(uri, experiment)}
        assert {arm: record.status for arm, record in records.items()} == {
            "completes": "completed",
            "collapses": "collapsed",
            "bad-step": "failed",
            "bad-setup": "failed",
            "endless": "stopped",
        }
        states = {arm: mlflow_run(uri, record.run_id).info.status for arm, record in records.items()}
        assert states == {
            "completes": "FINISHED",
            "collapses": "KILLED",
            "bad-step": "FAILED",
            "bad-setup": "FAILED",
            "endless": "FINISHED",
        }
        assert records["bad-step"].reason == "ValueError: boom in step"
        assert records["bad-setup"].reason == "RuntimeError: no GPU in setup"
        assert (records["collapses"].rule, records["collapses"].reason) == ("nonfinite", "loss is nan")
        assert math.isnan(records["collapses"].metrics["grpo/loss"])
        assert load_history(uri, records["endless"].run_id, "grpo/reward") == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)]
        assert load_correct(uri, records["completes"].run_id) == [0, 1]
        # what this callback is built on: the last result comes to on_trial_result, and a failed set-up has no on_trial_start
        assert [call for arm, call in calls if arm == "endless"][-2:] == ["result 3 done=True", "complete"]
        assert [call for arm, call in calls if arm == "completes"][-2:] == ["result 2 done=True", "complete"]
        assert next(call for arm, call in calls if arm == "bad-setup") == "error"

        repaired.touch()
        assert run(["bad-step", "bad-setup"], "again").num_errors == 0  # another Tuner, other ids of Tune's
        resumed = {record.arm: record for record in load_study(uri, experiment)}
        assert {arm: record.run_id for arm, record in resumed.items()} == {arm: record.run_id for arm, record in records.items()}
        assert [resumed[arm].status for arm in arms] == ["completed", "collapsed", "completed", "completed", "stopped"]
        assert load_history(uri, resumed["bad-step"].run_id, "grpo/reward") == [(0, 0.0), (1, 0.1), (2, 0.2)]
        assert mlflow_run(uri, resumed["bad-step"].run_id).info.status == "FINISHED"
    finally:
        ray.shutdown()


class Server:
    """`mlflow server` in a process group of its own, to be killed whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as out:
            self.process = subprocess.Popen(
                command + stores, env=os.environ | quiet, stdout=out, stderr=out, cwd=self.folder, start_new_session=True
            )
        for _ in range(120):
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_killed_and_restarted_in_mid_sweep_misses_nothing(
    server: Server, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    check_tracking(server.uri, experiment)
    callback, trial = make_callback(server.uri, experiment, tmp_path), make_trial()
    callback.setup()
    callback.on_trial_start(trial=trial)
    callback.on_trial_result(trial=trial, result=result(0, samples=SAMPLES, **{"grpo/reward": 0.0, "grpo/kl": math.inf}))
    eventually(lambda: not callback._spool._queue)
    server.kill()
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 20):
            callback.on_trial_result(trial=trial, result=result(step, **{"grpo/reward": step / 10, "grpo/kl": math.nan}))
        assert time.monotonic() - start < 0.5  # training went on
        eventually(lambda: "does not take records" in caplog.text)
    assert len((tmp_path / "spool" / tracking.SPOOL).read_text().splitlines()) == 19
    server.start()
    eventually(lambda: not callback._spool._queue, seconds=60)
    assert (tmp_path / "spool" / tracking.SPOOL).read_text() == ""
    callback.on_trial_result(trial=trial, result=result(20, outcome=outcome("completed", 20), **{"grpo/reward": 2.0}))
    callback.on_trial_complete(trial=trial)
    callback.close()
    (record,) = load_study(server.uri, experiment)
    assert (record.status, mlflow_run(server.uri, record.run_id).info.status) == ("completed", "FINISHED")
    assert load_history(server.uri, record.run_id, "grpo/reward") == [(step, step / 10) for step in range(21)]
    kl = load_history(server.uri, record.run_id, "grpo/kl")
    assert kl[0] == (0, math.inf)
    assert all(math.isnan(value) for _, value in kl[1:])
    assert math.isnan(record.metrics["grpo/kl"])
    assert load_correct(server.uri, record.run_id) == [1, 1, 0, 1]
    assert load_config(server.uri, record.run_id) == CONFIG
    client = tracking._client(server.uri)
    assert len(client.load_table(check_tracking(server.uri, experiment), "samples.json")) == 1
    # delivered exactly once: the same records again change nothing
    before = whole_experiment(server.uri, experiment)
    killed = make_callback(f"http://127.0.0.1:{free_port()}", experiment, tmp_path / "again")
    run_one(killed)
    killed.close()
    shutil.copytree(tmp_path / "again", tmp_path / "copy")
    assert deliver_spool(tmp_path / "again" / "spool", server.uri) == 0
    once = whole_experiment(server.uri, experiment)
    assert deliver_spool(tmp_path / "copy" / "spool", server.uri) == 0
    assert repr(whole_experiment(server.uri, experiment)) == repr(once)
    assert len(once) == len(before) == 1

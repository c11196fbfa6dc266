"""MLflow as it is told of trials: what it shows, when it is away, what it refuses. Real sqlite stores, a real server, a
real Tune run."""

import json
import logging
import math
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from search import mlflow_client, tracking
from search.arms import read_arms, trial_folder, write_arm
from search.budget import Budget
from search.delivery import Delivery, MlflowWriter
from search.mirror import send_missing, tell_endings
from search.mlflow_client import Owner, check_tracking, claim
from search.secrets import strip_password
from search.store import StudyConfig, default_tracking_uri, save_study_config
from search.tracking import Tracker, known_trials
from spaces.config import ConfigError, EvalConfig, TrialConfig
from spaces.reading import as_tree, parse_yaml, read_config
from tests.processes import free_port
from tests.real_mlflow import BIGGEST, Server, eventually, everything, files, points, runs, text, traces
from tests.written_sweeps import attempt, make_arm, outcome, study, write_trial
from trainable.disk.trial_folder import AttemptLog, read_reports, write_answers, write_outcome
from trainable.outcome import HEALTHY, Answers, CollapseVerdict, Outcome, Sample, StepReport

pytestmark = pytest.mark.slow  # many seconds of computing

SAMPLE = Sample(step=0, prompt="1+2=", completion="3", answer="3", reward=1.0)
SOMEBODY = Owner(id="0" * 32, store="/somewhere")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = default_tracking_uri(str(tmp_path_factory.mktemp("my store")))
    check_tracking(uri, "makes the database", SOMEBODY)  # any test may be the first one that a process runs
    return uri


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W+", "-", request.node.name)


class Sweep:
    """A sweep of one trial, c03/2, that a test drives as a sweep and its trials do: files first, then what MLflow is
    told."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.arm = make_arm(config, "c03", "noise.modules=linear", origin="searcher")
        self.tracker = Tracker(config)
        self.reports: list[StepReport] = []
        save_study_config(config)
        write_arm(config, 3, self.arm)

    @property
    def uri(self) -> str:
        return self.config.tracking_uri

    def begin(self, **more: Any) -> None:
        self.attempt = AttemptLog(trial_folder(self.config, "c03", 2))
        self.tracker.begin(self.arm, 3, 2)

    def step(
        self, rule: str = "", evidence: str = "", samples: tuple[Sample, ...] = (), **signals: float
    ) -> StepReport:
        """`reward=0.1` is grpo/reward."""
        number = len(self.reports)
        report = StepReport(
            step=number,
            sigma=0.0,
            signals={"rin/sigma": 0.0, **{f"grpo/{name}": value for name, value in signals.items()}},
            verdict=CollapseVerdict(collapsed=True, rule=rule, evidence=evidence) if rule else HEALTHY,
            seconds=0.5,
            samples=samples,
            time_ms=1_700_000_000_000 + number,
        )
        self.reports.append(report)
        self.attempt.step = number + 1
        self.tracker.report(self.arm, 2, report)
        return report

    def end(self, **how: Any) -> Outcome:
        ended = replace(outcome(self.arm, 2, 3, seconds=9.0, **how), step=len(self.reports))
        write_outcome(trial_folder(self.config, "c03", 2), ended, self.reports)
        self.attempt.end("outcome")
        self.tracker.end(self.arm, 2)
        return ended

    def run(self, steps: int = 3) -> Outcome:
        self.begin()
        for number in range(steps):
            self.step(reward=number / 10, samples=(SAMPLE,))
        return self.end()

    def again(self) -> Any:
        """Another process, that finds what this one left."""
        return send_missing(self.config)

    def shown(self) -> Any:
        (run,) = runs(self.uri, self.config.name)
        return run


def make_sweep(uri: str, experiment: str, folder: Path) -> Sweep:
    return Sweep(study(folder, name=experiment, tracking_uri=uri, replicates=3, settings={"eval": {"questions": 4}}))


@pytest.fixture
def sweep(uri: str, experiment: str, tmp_path: Path) -> Iterator[Sweep]:
    sweep = make_sweep(uri, experiment, tmp_path)
    yield sweep
    sweep.tracker.close()


# Where the tracking is


@pytest.mark.slow
def test_importing_tracking_imports_neither_mlflow_nor_ray_nor_torch() -> None:
    code = (
        "import sys, search.tracking, search.mirror; "
        "print([name for name in ('mlflow', 'ray', 'torch') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.slow
@pytest.mark.parametrize("first_use", ["check_tracking(uri, 'x', owner)", "known_trials(uri, 'x', owner)"])
def test_telemetry_is_off_before_mlflow_loads(first_use: str, tmp_path: Path) -> None:
    if first_use.startswith("known"):  # which makes no database
        check_tracking(f"sqlite:///{tmp_path}/m.db", "x", SOMEBODY)
    code = (
        "import os; [os.environ.pop(name, None) for name in ('CI', 'DO_NOT_TRACK', 'MLFLOW_DISABLE_TELEMETRY')]\n"
        "from search.mlflow_client import Owner, check_tracking; from search.tracking import known_trials\n"
        f"uri = 'sqlite:///{tmp_path}/m.db'; owner = Owner(id='i', store='/s'); {first_use}\n"
        "from mlflow.telemetry.client import get_telemetry_client; "
        "from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "print(is_telemetry_disabled(), get_telemetry_client())"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.strip() == "True None"
    assert done.stderr == ""  # and a new database is made without a page of log


@pytest.mark.parametrize(
    ("given", "stripped"),
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
def test_strip_password(given: str, stripped: str) -> None:
    assert strip_password(given) == stripped


def test_check_tracking_makes_an_experiment_once(uri: str, experiment: str) -> None:
    assert check_tracking(uri, experiment, SOMEBODY) == check_tracking(uri, experiment, SOMEBODY)
    artifacts = mlflow_client.client(uri).get_experiment_by_name(experiment).artifact_location
    assert Path(artifacts).parent == Path(uri.removeprefix("sqlite:///")).parent  # beside the database, not ./mlruns


def test_a_relative_sqlite_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment_id = check_tracking("sqlite:///sub/mlflow.db", "x", SOMEBODY)
    assert (tmp_path / "sub" / "mlflow.db").exists()
    absolute = mlflow_client.absolute_uri("sqlite:///sub/mlflow.db")
    assert absolute == f"sqlite:///{tmp_path}/sub/mlflow.db" == default_tracking_uri(str(tmp_path / "sub"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert check_tracking(absolute, "x", SOMEBODY) == experiment_id
    check_tracking("sqlite:///sub/mlflow.db", "y", SOMEBODY)  # MLflow itself remembers the store of this text
    elsewhere = mlflow_client.client(default_tracking_uri(str(tmp_path / "elsewhere" / "sub")))
    assert elsewhere.get_experiment_by_name("y") is not None
    assert mlflow_client.client(absolute).get_experiment_by_name("y") is None


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
def test_unusable_tracking_is_one_line(bad: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, though it is long enough to be looked at as one" * 20)
    bad = bad.format(port=free_port(), tmp=tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_tracking(bad, "x", SOMEBODY)
    message = str(caught.value)
    assert "\n" not in message
    assert strip_password(bad) in message
    assert "--tracking-uri" in message
    assert "secret" not in message


def test_a_deleted_experiment_is_refused_with_the_remedy(uri: str, experiment: str) -> None:
    mlflow_client.client(uri).delete_experiment(check_tracking(uri, experiment, SOMEBODY))
    with pytest.raises(ConfigError, match="restore"):
        check_tracking(uri, experiment, SOMEBODY)


def test_a_store_that_can_be_read_but_not_written_is_refused(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path))
    check_tracking(uri, "x", SOMEBODY)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:  # file permissions do not stop root
        database.execute(
            "CREATE TRIGGER t BEFORE INSERT ON experiment_tags BEGIN SELECT RAISE(ABORT, 'read only'); END"
        )
        database.execute("DELETE FROM experiment_tags")
    with pytest.raises(ConfigError, match=r"cannot write to experiment x: .*read only"):
        check_tracking(uri, "x", SOMEBODY)


def test_asking_makes_no_database(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        known_trials(default_tracking_uri(str(tmp_path)), "x", SOMEBODY)
    assert list(tmp_path.iterdir()) == []


# Whose an experiment is


def test_an_experiment_of_another_sweep_is_refused_with_whose_it_is_and_the_remedy(uri: str, experiment: str) -> None:
    mine, other = Owner(id="a" * 32, store="/data/mine"), Owner(id="b" * 32, store="/data/other")
    claim(uri, experiment, mine)
    claim(uri, experiment, mine)
    for refused in (check_tracking, claim, known_trials):
        with pytest.raises(ConfigError) as caught:
            refused(uri, experiment, other)
        message = str(caught.value)
        assert message.startswith(f"--name {experiment}: ")
        assert (
            "another sweep (aaaaaaaa, which lies or lay in /data/mine); give another --name, or another --tracking-uri"
            in message
        )
    moved = Owner(id=mine.id, store="/data/moved")
    claim(uri, experiment, moved)
    with pytest.raises(ConfigError, match="lay in /data/moved"):
        check_tracking(uri, experiment, other)


def test_a_start_that_goes_no_further_than_the_check_leaves_the_name_free(uri: str, experiment: str) -> None:
    check_tracking(uri, experiment, SOMEBODY)
    claim(uri, experiment, Owner(id="a" * 32, store="/data/mine"))


def test_a_writer_never_writes_into_another_sweep_s_experiment(sweep: Sweep, tmp_path: Path) -> None:
    """Both were there when the experiment was nobody's."""
    sweep.run()
    assert sweep.tracker.close() == 0
    before = everything(sweep.uri, sweep.config.name)
    other = make_sweep(sweep.uri, sweep.config.name, tmp_path / "another store")
    other.run(steps=5)
    assert other.tracker.close() > 0
    assert everything(sweep.uri, sweep.config.name) == before


# One run per trial


def test_a_completed_trial_is_shown_as_it_was(sweep: Sweep) -> None:
    started = time.time()
    ended = sweep.run()
    assert sweep.tracker.close() == 0
    run = sweep.shown()
    tags = run.data.tags
    assert (tags["sweep"], tags["arm"], tags["replicate"], tags["origin"]) == (
        sweep.config.name,
        "c03",
        "2",
        "searcher",
    )
    assert (tags["status"], tags["error"], tags["failure/rule"], tags.get("collapse/rule")) == (
        "completed",
        "",
        "",
        None,
    )
    assert (run.info.status, run.info.run_name) == ("FINISHED", "c03/2")
    assert run.data.params == {
        "eval.questions": "4",
        "noise.modules": "linear",
        "noise.sigma_start": "0.01",
        "noise.sigma_end": "0.001",
        "seed": "2",
        "threads": "1",
    }, "what is searched or differs from the workload"
    assert ended.config.quant.scale_rule == "floor", "which config.yaml has"
    metrics = run.data.metrics
    assert (metrics["eval/accuracy"], metrics["eval/accuracy_start"], metrics["eval/n"]) == (0.75, 0.25, 4)
    assert (metrics["perf/trial_seconds"], metrics["perf/step_seconds"], metrics["rin/steps_done"]) == (9.0, 0.5, 3)
    assert not {name for name in metrics if "/" not in name}
    assert started - 1 < run.info.start_time / 1000 <= run.info.end_time / 1000 < time.time() + 1
    assert points(sweep.uri, run, "grpo/reward") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert json.loads(text(sweep.uri, run, "correct.json")) == [1, 1, 0, 1]
    assert read_config(parse_yaml(text(sweep.uri, run, "config.yaml"), "config.yaml")) == ended.config
    assert json.loads(text(sweep.uri, run, "receipt.json")) == json.loads(json.dumps(ended.receipt.as_tree()))


def test_counts_of_samples_and_pass_at_every_k_arrive_however_many_they_are(sweep: Sweep) -> None:
    """MLflow refuses a thousand at once, and what it refuses is lost."""
    sampled = sweep.arm.config.model_copy(update={"eval": EvalConfig(questions=4, samples=256)})
    sweep.begin()
    sweep.step(**{f"x{number}": float(number) for number in range(2000)})
    right = (256, 0, 64, 1)
    ended = outcome(sweep.arm, 2, 3)
    ended = replace(ended, eval=replace(ended.eval, right=right), step=1, config=sampled)
    write_outcome(trial_folder(sweep.config, "c03", 2), ended, sweep.reports)
    sweep.attempt.end("outcome")
    sweep.tracker.end(sweep.arm, 2)
    assert sweep.tracker.close() == 0
    run = sweep.shown()
    metrics = run.data.metrics
    assert [metrics[f"grpo/x{number}"] for number in (0, 799, 800, 1999)] == [0.0, 799.0, 800.0, 1999.0]
    assert metrics["eval/pass_at_1"] == 0.3135 == round((1 + 64 / 256 + 1 / 256) / 4, 4), "four digits"
    assert (metrics["eval/pass_at_256"], metrics["eval/accuracy"]) == (0.75, 0.75)
    assert metrics["eval/pass_at_256_low"] < 0.75 < metrics["eval/pass_at_256_high"]
    assert json.loads(text(sweep.uri, run, "right.json")) == list(right)


def test_samples_are_an_mlflow_table_with_a_name_for_each_in_front(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sweep.uri)  # load_table looks there, whatever its client says
    sweep.begin()
    sweep.step(samples=(SAMPLE, replace(SAMPLE, correct=True)))
    sweep.step(samples=(Sample(step=1, prompt="p", completion="c", answer="a", reward=math.nan),))
    sweep.step()
    sweep.end()
    sweep.tracker.close()
    run, client = sweep.shown(), mlflow_client.client(sweep.uri)
    table = client.load_table(run.info.experiment_id, "samples.json", run_ids=[run.info.run_id])
    assert list(table.columns) == ["completion_id", "prompt", "completion", "answer", "reward", "sigma", "correct"]
    assert table["completion_id"].tolist() == ["step 00, 1", "step 00, 2", "step 01, 1"]
    assert table["correct"].fillna("unknown").tolist() == ["unknown", "yes", "unknown"]
    json.loads(text(sweep.uri, run, "samples.json"), parse_constant=pytest.fail)  # browsers refuse NaN
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]


def test_a_collapsed_trial_is_killed_and_keeps_its_non_finite_metrics(sweep: Sweep) -> None:
    sweep.begin()
    sweep.step(loss=0.5, kl=0.1, entropy=-math.inf)
    sweep.step(loss=math.nan, kl=math.inf, entropy=1.0)
    sweep.step("nonfinite", "grpo/loss is nan", loss=math.nan, kl=math.inf)
    sweep.end(how="collapsed", rule="nonfinite")
    sweep.tracker.close()
    run = sweep.shown()
    tags = run.data.tags
    assert (tags["status"], run.info.status) == ("collapsed", "KILLED")
    assert (tags["collapse/rule"], tags["collapse/step"], tags["collapse/evidence"]) == (
        "nonfinite",
        "2",
        "grpo/loss is nan",
    )
    assert math.isnan(run.data.metrics["grpo/loss"])
    assert run.data.metrics["grpo/kl"] == pytest.approx(BIGGEST)
    assert points(sweep.uri, run, "grpo/entropy") == [(0, pytest.approx(-BIGGEST)), (1, 1.0)]
    assert [step for step, value in points(sweep.uri, run, "grpo/loss") if math.isnan(value)] == [1, 2]
    nonfinite = {name: value for name, value in tags.items() if name.startswith("nonfinite/")}
    assert nonfinite == {"nonfinite/grpo/loss": "1", "nonfinite/grpo/kl": "1", "nonfinite/grpo/entropy": "0"}


def test_a_rule_that_only_monitors_keeps_its_first_word(sweep: Sweep) -> None:
    sweep.begin()
    sweep.step("entropy_high", "3.1 nats")
    sweep.step("reward_low", "0.01")
    sweep.end()
    sweep.tracker.close()
    tags = sweep.shown().data.tags
    assert (tags["status"], tags["collapse/rule"], tags["collapse/evidence"]) == (
        "completed",
        "entropy_high",
        "3.1 nats",
    )


def test_many_and_long_params_arrive_and_a_cut_is_marked(sweep: Sweep) -> None:
    options = {f"key{index}": index for index in range(250)} | {"long": "x" * 7000, "edge": "y" * 6000}
    task = {"name": "reasoning_gym:chain_sum", "options": options}
    tree = as_tree(sweep.arm.config) | {"task": task, "model": {"name": "/models/one", "recipe": None}}
    sweep.arm.config = TrialConfig.model_validate(tree)
    sweep.begin()
    sweep.tracker.close()
    run = sweep.shown()
    params = {
        name.rpartition(".")[2]: value for name, value in run.data.params.items() if name.startswith("task.options.")
    }
    assert len(params) == 252
    assert params["long"].endswith("xx... (7000 characters)")
    assert len(params["long"]) == 6000
    assert params["edge"] == "y" * 6000
    shown = read_config(parse_yaml(text(sweep.uri, run, "config.yaml"), "config.yaml"))
    assert dict(shown.task.options) == options  # whole, in the file


@pytest.mark.parametrize(
    ("attempts", "rule", "reason"),
    [
        ([{"ended": "error", "reason": "RuntimeError: no GPU"}], "", "RuntimeError: no GPU"),
        (
            [{"ended": "hang", "reason": "step 3: phase rollout took over 900 s"}] * 3,
            "hang",
            "step 3: phase rollout took over 900 s (3 attempts)",
        ),
        ([{"ended": "died", "reason": "its process was killed"}], "", "its process was killed"),
    ],
)
def test_a_failed_trial_says_why(sweep: Sweep, attempts: list[dict[str, Any]], rule: str, reason: str) -> None:
    write_trial(sweep.config, sweep.arm, 2, None, attempts=[attempt(**one) for one in attempts])
    sweep.tracker.begin(sweep.arm, 3, 2)
    sweep.tracker.end(sweep.arm, 2)
    sweep.tracker.close()
    run = sweep.shown()
    assert (run.data.tags["status"], run.info.status) == ("failed", "FAILED")
    assert (run.data.tags["failure/rule"], run.data.tags["error"]) == (rule, reason)
    assert files(sweep.uri, run) == ["config.yaml"]


def test_a_trial_stopped_from_outside_has_the_evaluation_that_it_made_as_it_left(sweep: Sweep) -> None:
    sweep.begin()
    sweep.step(reward=0.1, samples=(SAMPLE,))
    write_outcome(
        trial_folder(sweep.config, "c03", 2), replace(outcome(sweep.arm, 2, 2, how="stopped"), step=1), sweep.reports
    )
    sweep.attempt.end("stopped")
    sweep.tracker.end(sweep.arm, 2)
    sweep.tracker.close()
    run = sweep.shown()
    assert (run.data.tags["status"], run.info.status, run.data.metrics["eval/accuracy"]) == ("stopped", "KILLED", 0.5)
    assert sum(json.loads(text(sweep.uri, run, "correct.json"))) == 2


def test_an_error_that_a_retry_mended_is_not_the_reason_of_the_outcome(sweep: Sweep) -> None:
    sweep.begin()
    sweep.tracker.retry(sweep.arm, 2, 1, "OSError: node lost")
    sweep.run()
    sweep.tracker.close()
    tags = sweep.shown().data.tags
    assert (tags["status"], tags["retries"], tags["error"]) == ("completed", "1", "")


def test_a_failure_after_the_outcome_does_not_undo_it(sweep: Sweep) -> None:
    sweep.run()
    sweep.tracker.end(sweep.arm, 2)
    sweep.tracker.close()
    assert (sweep.shown().data.tags["status"], sweep.shown().info.status) == ("completed", "FINISHED")


def test_in_the_end_every_open_run_is_closed_with_what_its_folder_has(sweep: Sweep) -> None:
    other = make_arm(sweep.config, "c04")
    write_arm(sweep.config, 4, other)
    sweep.begin()
    sweep.tracker.begin(other, 4, 0)
    write_trial(sweep.config, other, 0, outcome(other, 0, 4))
    assert sweep.tracker.open() == [("c03", 2), ("c04", 0)]
    tell_endings(sweep.config, sweep.tracker)
    assert sweep.tracker.open() == []
    sweep.tracker.close()
    shown = runs(sweep.uri, sweep.config.name)
    assert [(run.data.tags["status"], run.info.status) for run in shown] == [
        ("stopped", "KILLED"),
        ("completed", "FINISHED"),
    ]


def test_known_trials_are_read_page_by_page_without_the_runs_of_others(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = check_tracking(sweep.uri, sweep.config.name, sweep.config.owner)
    mlflow_client.client(sweep.uri).create_run(number, tags={"status": "somebody's own run"})
    for name in ("c01", "c02", "control"):
        sweep.tracker.begin(make_arm(sweep.config, name), 0, 0)
    sweep.tracker.close()
    monkeypatch.setattr(tracking, "RUNS_PER_PAGE", 2)
    known = known_trials(sweep.uri, sweep.config.name, sweep.config.owner)
    assert sorted(known) == [f"{sweep.config.name}/{arm}/0" for arm in ("c01", "c02", "control")]


def test_of_an_experiment_that_is_not_there_nothing_is_known(uri: str) -> None:
    assert known_trials(uri, "nowhere", SOMEBODY) == {}


def test_answers_to_the_evaluation_are_a_table_in_place_of_zeros_and_ones(sweep: Sweep) -> None:
    answers = Answers(questions=("1+2=", "2+2="), expected=("3", "4"), given=("3", "5"), correct=(1, 0))
    write_answers(trial_folder(sweep.config, "c03", 2), answers)
    sweep.run()
    sweep.tracker.close()
    run = sweep.shown()
    assert files(sweep.uri, run) == ["answers.json", "config.yaml", "receipt.html", "receipt.json", "samples.json"]
    table = json.loads(text(sweep.uri, run, "answers.json"))
    assert table["data"] == [[1, "2+2=", "4", "5", "no"], [0, "1+2=", "3", "3", "yes"]]  # what went wrong first
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert [one["path"] for one in shown] == ["samples.json", "answers.json"]


# When the tracking is away


def test_an_outage_costs_nothing_but_a_line_and_is_told_once(
    uri: str, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = make_sweep(f"http://rin:secret@127.0.0.1:{free_port()}", experiment, tmp_path)
    with caplog.at_level(logging.WARNING):
        away.run(steps=29)
        left = away.tracker.close()
    assert left == 3 + 29 + 1 + 5 + 3  # start, reports, traces, files, end
    (line,) = [message for message in caplog.messages if "does not take records" in message]
    assert "they are told again later" in line
    assert "secret" not in caplog.text
    here = away.config.model_copy(update={"tracking_uri": uri})
    assert send_missing(here) == 0
    (run,) = runs(uri, experiment)
    assert (run.data.tags["status"], run.info.status) == ("completed", "FINISHED")
    assert points(uri, run, "grpo/reward") == [(step, step / 10) for step in range(29)]
    once = everything(uri, experiment)
    assert send_missing(here) == 0
    assert everything(uri, experiment) == once


def test_telling_what_is_missing_makes_no_database(tmp_path: Path) -> None:
    """A study.json of somebody else may name any file of this machine."""
    sweep = make_sweep(default_tracking_uri(str(tmp_path / "elsewhere")), "x", tmp_path / "store")
    with pytest.raises(ConfigError, match="no such file"):
        send_missing(sweep.config)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("delivered", [1, 2, 4, 7, 9, 11, 13])
def test_a_crash_in_the_middle_of_delivery_doubles_nothing(
    sweep: Sweep, delivered: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[dict[str, Any]] = []
    with monkeypatch.context() as during:
        during.setattr(Delivery, "put", lambda self, record: records.append(record))
        sweep.run()
    assert len(records) == 15
    assert MlflowWriter(sweep.uri, sweep.config.owner).send(records[:delivered], lambda: None) == ([], "")
    assert sweep.again() == 0
    run = sweep.shown()
    assert (run.data.tags["status"], run.info.status) == ("completed", "FINISHED")
    assert run.data.params["noise.modules"] == "linear"
    assert points(sweep.uri, run, "grpo/reward") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert points(sweep.uri, run, "eval/accuracy") == [(2, 0.75)]
    assert files(sweep.uri, run) == ["config.yaml", "correct.json", "receipt.html", "receipt.json", "samples.json"]
    assert "refuses" not in caplog.text


def test_records_are_tried_again_in_order_with_one_complaint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("search.delivery.LONGEST_PAUSE", 0.01)
    monkeypatch.setattr("search.delivery.GATHER_SECONDS", 0.2)
    attempts: list[int] = []
    received: list[int] = []

    def send(records: Sequence[dict[str, Any]], note_delivery: Any) -> tuple[list[dict[str, Any]], str]:
        attempts.append(len(records))
        if len(attempts) < 5:
            return list(records), "it is down"
        received.extend(record["n"] for record in records)
        return [], ""

    delivery = Delivery(send, "the receiver")
    for n in range(3):
        delivery.put({"n": n})
    eventually(lambda: received == [0, 1, 2])
    assert delivery.close() == 0
    assert attempts[:5] == [3] * 5, "they gather before the first attempt, too"
    (line,) = [message for message in caplog.messages if "the receiver" in message]
    assert "does not take records: it is down" in line


def test_after_a_close_delivery_goes_on_with_the_next_record() -> None:
    received: list[int] = []

    def send(records: Sequence[dict[str, Any]], note_delivery: Any) -> tuple[list[dict[str, Any]], str]:
        received.extend(record["n"] for record in records)
        return [], ""

    delivery = Delivery(send, "the receiver")
    for n in range(3):
        delivery.put({"n": n})
        assert delivery.close() == 0
    assert received == [0, 1, 2]


def test_close_waits_while_records_are_delivered_and_not_for_a_receiver_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("search.delivery.CLOSE_SECONDS", 0.5)
    hangs = threading.Event()

    def send(records: Sequence[dict[str, Any]], note_delivery: Any) -> tuple[list[dict[str, Any]], str]:
        for record in records:
            if record["n"] == "hang":
                hangs.wait(60)
            time.sleep(0.2)
            note_delivery()
        return [], ""

    slow = Delivery(send, "the receiver")
    for n in range(6):
        slow.put({"n": n})
    assert slow.close() == 0  # 1.2 s, though no one waits longer than 0.5 s
    hung = Delivery(send, "the receiver")
    hung.put({"n": "hang"})
    assert hung.close() == 1
    assert not hangs.is_set()
    hangs.set()


def test_a_refused_record_is_told_of_and_does_not_block(sweep: Sweep, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sweep.begin()
        sweep.arm.config = make_arm(
            sweep.config, "c03", "noise.modules=rmsnorm"
        ).config  # MLflow allows no change of a param
        sweep.run()
        assert sweep.tracker.close() == 0
    run = sweep.shown()
    assert (run.data.tags["status"], run.data.params["noise.modules"]) == ("completed", "linear")
    assert f"MLflow refuses a record of {sweep.config.name}/c03/2" in caplog.text


def test_of_reports_that_are_told_together_only_the_refused_one_is_lost(
    sweep: Sweep, caplog: pytest.LogCaptureFixture
) -> None:
    sweep.begin()
    sweep.step(reward=0.1)
    sweep.step(reward=0.2, **{"§": 1.0})  # no name for a metric
    sweep.step(reward=0.3)
    assert sweep.tracker.close() == 0
    assert points(sweep.uri, sweep.shown(), "grpo/reward") == [(0, 0.1), (2, 0.3)]
    (line,) = [message for message in caplog.messages if "refuses" in message]
    assert "grpo/\\u00a7" in line


def test_a_proxy_that_knows_no_mlflow_is_an_outage_not_a_refusal(
    experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"The plain HTTP request was sent to HTTPS port")

        do_POST = do_GET

        def log_message(self, *args: Any) -> None: ...

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    sweep = make_sweep(f"http://127.0.0.1:{proxy.server_port}", experiment, tmp_path)
    sweep.begin()
    assert sweep.tracker.close() == 3
    proxy.shutdown()
    assert "refuses" not in caplog.text


def test_after_one_file_fails_no_file_is_tried_in_that_round_and_the_trial_is_not_told_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def apply(self: Any, group: list[dict[str, Any]]) -> None:
        (record,) = group
        tried.append(record["n"])
        if record["do"] == "file":
            raise TimeoutError("the artifact store hangs")

    monkeypatch.setattr(MlflowWriter, "_apply", apply)
    order = ["file", "log", "file", "log", "end", "told"]
    records = [{"do": what, "key": "a trial", "n": number} for number, what in enumerate(order)]
    left, trouble = MlflowWriter("http://host", SOMEBODY).send(records, lambda: None)
    assert ([record["n"] for record in left], tried) == ([0, 2, 5], [0, 1, 3, 4])
    assert trouble == "TimeoutError: the artifact store hangs"


def test_metrics_do_not_wait_for_files_and_files_come_later(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of the artifacts' folder")
    client = mlflow_client.client(sweep.uri)
    client.create_experiment(sweep.config.name, artifact_location=str(tmp_path / "file"))
    sweep.run()
    assert sweep.tracker.close() == 6 + 1  # files, and that everything was told
    run = sweep.shown()
    assert (run.data.tags["status"], run.data.metrics["grpo/reward"]) == ("completed", 0.2)
    (tmp_path / "file").unlink()
    assert sweep.again() == 0
    assert json.loads(text(sweep.uri, run, "correct.json")) == [1, 1, 0, 1]
    assert points(sweep.uri, run, "grpo/reward") == [(0, 0.0), (1, 0.1), (2, 0.2)]


# The real things


@pytest.mark.slow
def test_every_ending_of_a_real_tune_run_closes_its_run(
    uri: str, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray import tune

    from search.events import TrialEvent
    from search.execution import SweepCallback

    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    monkeypatch.setenv("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    repaired = tmp_path / "repaired"
    names = ["completes", "collapses", "bad-step", "bad-setup", "endless"]
    config = study(tmp_path, name=experiment, tracking_uri=uri, trials=5, settings={"eval": {"questions": 4}})
    for number, name in enumerate(names):
        write_arm(config, number, make_arm(config, name))

    class Toy(tune.Trainable):  # type: ignore[misc]
        """Writes what a trial writes; its step number is on disk."""

        def setup(self, setting: dict[str, Any]) -> None:
            self.arm = read_arms(config)[setting["number"]]
            self.place = trial_folder(config, self.arm.name, 0)
            if self.arm.name == "bad-setup" and not repaired.exists():
                raise RuntimeError("no GPU in setup")
            self.reports: list[StepReport] = read_reports(self.place)
            self.attempt = AttemptLog(self.place)

        def step(self) -> dict[str, Any]:
            number, name = len(self.reports), self.arm.name
            if name == "bad-step" and number == 1 and not repaired.exists():
                self.attempt.end("error", reason="ValueError: boom in step")
                raise ValueError("boom in step")
            collapses = name == "collapses" and number == 1
            report = StepReport(
                step=number,
                sigma=0.0,
                signals={"rin/sigma": 0.0, "grpo/reward": number / 10} | ({"grpo/loss": math.nan} if collapses else {}),
                verdict=CollapseVerdict(collapsed=True, rule="nonfinite", evidence="loss is nan")
                if collapses
                else HEALTHY,
                seconds=0.1,
                samples=(),
                time_ms=time.time_ns() // 1_000_000,
            )
            self.reports.append(report)
            self.attempt.step = number + 1
            result = {**report.as_record(), "collapsed": int(collapses)}  # ours, whose module imports torch
            if not collapses and (number < 2 or name == "endless"):
                return result
            how: Any = "collapsed" if collapses else "completed"
            ended = replace(outcome(self.arm, 0, 2, how, rule=report.verdict.rule), step=number + 1)
            write_outcome(self.place, ended, self.reports)
            self.attempt.end("outcome")
            return {**result, "outcome": how, "done": True}

        def cleanup(self) -> None:
            if self.arm.name == "endless":
                write_outcome(
                    self.place, replace(outcome(self.arm, 0, 1, "stopped"), step=len(self.reports)), self.reports
                )
                self.attempt.end("stopped")

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            raise AssertionError("nothing here is saved by Tune")

    home = tmp_path / "workers"
    home.mkdir()
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"working_dir": str(home)}, log_to_driver=False)

    def run(arms: list[str], name: str) -> tuple[Any, list[TrialEvent]]:
        events: list[TrialEvent] = []
        tracker, written = Tracker(config), read_arms(config)
        setting = {"replicate": 0, "number": tune.grid_search([names.index(arm) for arm in arms])}
        run_config = tune.RunConfig(
            name=name,
            storage_path=str(tmp_path / "tune"),
            callbacks=[SweepCallback(config, written, Budget(config, written), tracker, events.append)],
            stop={"training_iteration": 4},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
        )
        grid = tune.Tuner(Toy, param_space=setting, run_config=run_config).fit()
        tell_endings(config, tracker)
        assert tracker.close() == 0
        return grid, events

    def shown() -> dict[str, Any]:
        return {run.data.tags["arm"]: run for run in runs(uri, experiment)}

    try:
        grid, events = run(names, "first")
        assert (len(grid), grid.num_errors) == (5, 2)
        first = shown()
        assert {name: (run.data.tags["status"], run.info.status) for name, run in first.items()} == {
            "completes": ("completed", "FINISHED"),
            "collapses": ("collapsed", "KILLED"),
            "bad-step": ("failed", "FAILED"),
            "bad-setup": ("failed", "FAILED"),
            "endless": ("stopped", "KILLED"),
        }
        assert first["bad-step"].data.tags["error"] == "ValueError: boom in step"
        assert first["bad-setup"].data.tags["error"] == "its process did not start: RuntimeError: no GPU in setup"
        assert first["collapses"].data.tags["collapse/evidence"] == "loss is nan"
        assert math.isnan(first["collapses"].data.metrics["grpo/loss"])
        assert points(uri, first["endless"], "grpo/reward") == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)]
        assert points(uri, first["endless"], "eval/accuracy") == [(3, 0.25)]
        assert len(json.loads(text(uri, first["completes"], "correct.json"))) == 4
        ended = {event.arm: event.status for event in events if event.status != "running"}
        assert ended == {
            "completes": "completed",
            "collapses": "collapsed",
            "bad-step": "failed",
            "bad-setup": "failed",
        }
        # what the callback is built on: the last result comes to on_trial_result, and a failed set-up has no
        # on_trial_start
        assert [event.step for event in events if event.arm == "completes"][-1] == 3
        assert [event.status for event in events if event.arm == "bad-setup"] == ["failed"]

        repaired.touch()
        grid, _ = run(["bad-step", "bad-setup"], "again")  # another Tuner, other ids of Tune's
        assert grid.num_errors == 0
        again = shown()
        assert {name: run.info.run_id for name, run in again.items()} == {
            name: run.info.run_id for name, run in first.items()
        }
        assert [again[name].data.tags["status"] for name in names] == [
            "completed",
            "collapsed",
            "completed",
            "completed",
            "stopped",
        ]
        assert (again["bad-step"].info.status, again["bad-step"].data.tags["error"]) == ("FINISHED", "")
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_a_server_killed_and_restarted_in_mid_sweep_misses_nothing(
    server: Server, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    sweep = make_sweep(server.uri, experiment, tmp_path / "store")
    sweep.begin()
    sweep.step(reward=0.0, kl=math.inf, samples=(SAMPLE,))
    eventually(lambda: [run.data.metrics.get("rin/steps_done") for run in runs(server.uri, experiment)] == [1])
    server.kill()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 20):
            sweep.step(reward=step / 10, kl=math.nan)  # training goes on
        eventually(lambda: "does not take records" in caplog.text)
    server.start()
    eventually(lambda: sweep.shown().data.metrics["rin/steps_done"] == 20)
    sweep.step(reward=2.0)
    ended = sweep.end()
    assert sweep.tracker.close() == 0
    run = sweep.shown()
    assert (run.data.tags["status"], run.info.status) == ("completed", "FINISHED")
    assert points(server.uri, run, "grpo/reward") == [(step, step / 10) for step in range(21)]
    kl = points(server.uri, run, "grpo/kl")
    assert kl[0][1] == pytest.approx(BIGGEST)
    assert [step for step, value in kl if math.isnan(value)] == list(range(1, 20))
    assert json.loads(text(server.uri, run, "correct.json")) == list(ended.eval.correct)
    client = mlflow_client.client(server.uri)
    assert len(client.load_table(run.info.experiment_id, "samples.json", run_ids=[run.info.run_id])) == 1
    (trace,) = traces(server.uri, run)
    assert (trace["info"]["request_preview"], trace["info"]["response_preview"]) == ("1+2=", "3")
    # told exactly once: the same records again change nothing
    once = everything(server.uri, experiment)
    known = known_trials(server.uri, experiment, sweep.config.owner)
    assert [heard.standing for heard in known.values()] == ["completed after 21 steps, attempt 1"]
    teller = Tracker(sweep.config)
    teller.begin(sweep.arm, 3, 2)
    for report in sweep.reports:
        teller.report(sweep.arm, 2, report)
    teller.end(sweep.arm, 2)
    assert teller.close() == 0
    assert everything(server.uri, experiment) == once

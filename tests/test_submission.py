"""A sweep that is sent to a cluster: what is refused, what travels, what the job makes of it; with a real job server at
the end."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus

from dashboards import cli
from search import submission
from search.arms import read_arms
from search.evidence import read_evidence
from search.jobs import Job, note_job, noted_job
from search.lineup import fixed_arms
from search.store import load_study_config, save_study_config
from search.submission import (
    JobServer,
    begin_shipped,
    check_paths,
    check_places,
    check_space_paths,
    has_begun,
    job_server,
    ship,
    submit_resume,
    submit_sweep,
)
from spaces.errors import ConfigError
from spaces.library import read_space
from tests.ray_nodes import Cluster, head_node, short_folder
from tests.test_cli import here
from tests.written_sweeps import make_arm, study, write_sweep

NOBODY = "http://127.0.0.1:1"
RIN = [sys.executable, "-c", "from dashboards.cli import main; main()"]


class Head:
    """Takes jobs as Ray's client does, and keeps what is sent; its job says `says` (None: that it begins) and ends as
    `ends`."""

    def __init__(self, kept: Path, says: Sequence[str] | None = None, ends: JobStatus = JobStatus.RUNNING) -> None:
        self.kept, self.says, self.ends = kept, says, ends
        self.jobs: list[dict[str, Any]] = []
        self.busy_for = 0
        """Times that it takes no job yet."""

    def submit_job(self, **job: Any) -> str:
        if self.busy_for:
            self.busy_for -= 1
            raise RuntimeError(
                "Request failed with status code 500: No available agent to submit job, please try again later.."
            )
        shutil.copytree(job["runtime_env"]["working_dir"], self.kept)
        self.packages = sorted(Path(package).name for package in job["runtime_env"]["py_modules"])
        self.jobs.append(job)
        return "job-1"

    def get_job_status(self, job: str) -> JobStatus:
        return self.ends

    def get_job_logs(self, job: str) -> str:
        says = [f"sweep {self.jobs[-1]['metadata']['sweep']}: 3 trials, 3 to go"] if self.says is None else self.says
        return "".join(f"{line}\n" for line in says)

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(message="runtime environment: no space left")


def server(head: Any, *, on_this_machine: bool = True) -> JobServer:
    return JobServer(address="http://head:8265", client=head, on_this_machine=on_this_machine)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission.time, "sleep", lambda seconds: None)  # type: ignore[attr-defined]


# What is refused before anything is sent


@pytest.mark.parametrize(
    "changes",
    [
        {"tracking_uri": "http://me:canary-4711@host:5000"},
        {"tracking_uri": "postgresql://me:canary-4711@host/mlflow"},
        {"store": "s3://key:canary-4711@bucket/runs"},
        {"settings": {"task": {"path": "https://me:canary-4711@host/q.jsonl"}}},
    ],
)
def test_a_password_does_not_travel_in_a_job(changes: dict[str, Any], tmp_path: Path) -> None:
    head = Head(tmp_path / "kept")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        submit_sweep(server(head), study("/shared/runs").model_copy(update=changes), [])
    assert "canary-4711" not in str(caught.value)
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as caught:
        submit_resume(server(head), "s", "s3://b/r?secret_key=canary-4711", tracking_uri=None, changes={})
    assert "canary-4711" not in str(caught.value)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        job_server("http://me:canary-4711@head:8265")
    assert head.jobs == []


def test_a_cluster_that_does_not_answer_is_one_line() -> None:
    with pytest.raises(ConfigError, match="start the head") as caught:
        job_server(NOBODY)
    assert "\n" not in str(caught.value)


def test_ray_s_own_variable_must_not_send_the_job_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    with pytest.raises(ConfigError, match="unset RAY_ADDRESS"):
        job_server(NOBODY)


def test_without_ray_default_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape('pip install "ray[default,tune]==2.60.*"')):
        job_server(NOBODY)


@pytest.mark.parametrize(
    ("store", "tracking", "said"),
    [
        ("runs", None, "--store runs"),
        ("~/runs", "http://head:5000", "--store ~/runs"),
        ("/shared/runs", None, "--tracking-uri sqlite in the store"),
        ("s3://bucket/runs", "sqlite:////shared/mlflow.db", "--tracking-uri sqlite:////shared/mlflow.db"),
        ("/shared/runs", "http://localhost:5000", "http://HEAD:5000"),
        ("/shared/runs", "http://[::1]:5000", "http://HEAD:5000"),
    ],
)
def test_another_machine_gets_no_place_of_this_one(store: str, tracking: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_places(store, tracking, begun=False)


@pytest.mark.parametrize(
    ("store", "tracking", "begun"),
    [
        ("/shared/runs", "http://head:5000", False),
        ("s3://bucket/runs", "postgresql://mlflow@db/mlflow", False),
        ("/shared/runs", None, True),  # study.json says where its runs are tracked
    ],
)
def test_places_that_a_cluster_can_reach_are_taken(store: str, tracking: str | None, begun: bool) -> None:
    check_places(store, tracking, begun=begun)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": {"path": "questions.jsonl"}}, "task.path=questions.jsonl"),
        ({"task": {"path": "~/questions.jsonl"}}, "task.path=~/questions.jsonl"),
        ({"model": {"name": "model"}}, "model.name=model"),
        ({"model": {"name": "Qwen/Qwen2.5-1.5B-Instruct"}, "task": {"path": "/shared/q.jsonl"}}, None),
    ],
)
def test_settings_name_no_file_of_this_machine(settings: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "space.yaml").write_text(
        f"name: mine\ndescription: d\nsettings: {json.dumps(settings)}\n"
        "dimensions: [{key: noise.num_stages, domain: {kind: int, low: 1, high: 2}}]\n"
    )
    space = read_space(tmp_path / "space.yaml")
    if said is None:
        check_paths("--set ", settings, tmp_path)
        check_space_paths("space.yaml: ", space, tmp_path)
        return
    with pytest.raises(ConfigError, match=re.escape(f"--set {said}: lies on this machine")):
        check_paths("--set ", settings, tmp_path)
    with pytest.raises(ConfigError, match=re.escape(f"space.yaml: {said}: lies on this machine")):
        check_space_paths("space.yaml: ", space, tmp_path)


def test_nor_does_a_choice_of_a_space(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "name: mine\ndescription: d\ndimensions: "
        "[{key: task.path, domain: {kind: choice, options: {a: /shared/a, b: b.jsonl}}}]\n"
    )
    with pytest.raises(ConfigError, match=re.escape("task.path=b.jsonl: lies on this machine")):
        check_space_paths("", read_space(tmp_path / "space.yaml"), tmp_path)


# The command line


@pytest.fixture
def reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Head]:
    """reached(on_this_machine=True): a head that `--submit` finds; the current folder is `laptop`."""
    (tmp_path / "laptop").mkdir()
    monkeypatch.chdir(tmp_path / "laptop")

    def reach(*, on_this_machine: bool = True) -> Head:
        head = Head(tmp_path / "kept")
        monkeypatch.setattr(submission, "job_server", lambda address: server(head, on_this_machine=on_this_machine))
        return head

    return reach


@pytest.mark.slow
def test_a_sweep_travels_with_all_that_was_read_here(
    reached: Callable[..., Head], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The space, the point and the paths in them are no files any more when the job reads them."""
    head = reached()
    Path("space.yaml").write_text(
        "name: mine\ndescription: d\ndimensions: "
        "[{key: noise.sigma_start, domain: {kind: float, low: 0.001, high: 0.002}}]\n"
    )
    Path("point.yaml").write_text("noise: {sigma_start: 0.0015}\n")
    words = ["sweep", "space.yaml", "--workload", "tiny", "--name", "s", "--points", "point.yaml", "--trials", "3"]
    code, out, err = here(
        monkeypatch, capsys, *words, "--submit", "http://head:8265", "--set", "noise.sigma_end=0.0005"
    )
    assert (code, err) == (0, "")
    (job,) = head.jobs
    store = tmp_path / "laptop" / "runs"
    assert job["entrypoint"] == f"python rin.py resume s --store {store} --address auto"
    assert out.splitlines()[0] == f"submitted as job-1: {job['entrypoint']}"
    assert f"  rin status s --store {store}" in out.splitlines()
    assert out.endswith("it has begun\n")
    assert job["metadata"] == {"sweep": "s"}
    assert head.packages == ["dashboards", "search", "spaces", "trainable"]
    assert not store.exists(), "the job writes the store, and nobody else"

    (tmp_path / "head").mkdir()
    monkeypatch.chdir(tmp_path / "head")
    shutil.rmtree(tmp_path / "laptop")
    assert begin_shipped(str(tmp_path / "kept" / "sweep")) == []
    begun = load_study_config(str(store), "s")
    assert (begun.space.name, begun.trials, begun.settings) == ("mine", 3, {"noise": {"sigma_end": 0.0005}})
    assert [(arm.name, arm.config.noise.sigma_start) for arm in read_arms(begun)] == [
        ("control", 0.0),
        ("point", 0.0015),
    ]


def test_on_other_machines_relative_paths_are_refused_wherever_they_stand(
    reached: Callable[..., Head], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = reached(on_this_machine=False)
    Path("point.yaml").write_text("task: {name: gsm8k, path: q.jsonl}\n")
    places = ["--store", "/shared/runs", "--tracking-uri", "http://head:5000", "--submit", "http://head:8265"]
    model = [
        "--workload",
        "tiny",
        "--set",
        "model.name=/shared/m",
        "--set",
        "model.recipe=null",
        "--set",
        "task.name=gsm8k",
    ]
    for words, said in (
        (["--set", "task.path=q.jsonl"], "--set task.path=q.jsonl: lies on this machine"),
        (
            ["--set", "task.path=/shared/q.jsonl", "--points", "point.yaml"],
            "point.yaml: task.path=q.jsonl: lies on this machine",
        ),
    ):
        code, _, err = here(monkeypatch, capsys, "sweep", *model, *words, *places)
        assert (code, said in err) == (2, True), err
    code, _, err = here(monkeypatch, capsys, "sweep", "--workload", "tiny", "--submit", "http://head:8265")
    assert (code, err.split(":")[1]) == (2, " --store runs")
    code, _, err = here(monkeypatch, capsys, "sweep", "--submit", "http://head:8265", "--address", "auto")
    assert (code, "leave --address out" in err) == (2, True)
    assert head.jobs == []


@pytest.mark.slow
def test_an_ablation_can_be_sent_too(
    reached: Callable[..., Head], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reached()
    parent = study(tmp_path / "laptop" / "runs", trials=2, replicates=3)
    arms = [make_arm(parent, "control"), make_arm(parent, "c01", "rollout.temperature=0.9", origin="searcher")]
    write_sweep(parent, arms, {"control": [280, 285, 283], "c01": [330, 336, 332]})
    code, out, err = here(monkeypatch, capsys, "sweep", "--ablate", "s", "--submit", "http://head:8265")
    assert (code, "resume s-ablation --store" in out) == (0, True), err
    begin_shipped(str(tmp_path / "kept" / "sweep"))
    begun = load_study_config(parent.store, "s-ablation")
    assert (begun.kind, begun.parent) == ("ablation", "s")
    assert [arm.name for arm in read_arms(begun)] == [
        "control",
        "c01",
        "c01-without-sigma-end",
        "c01-without-temperature",
    ]


def test_the_same_sweep_with_a_change_is_sent_to_the_tracking_of_that_one(
    reached: Callable[..., Head], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reached(on_this_machine=False)
    parent = study(tmp_path / "shared", tracking_uri="http://head:5000")
    write_sweep(parent, fixed_arms(parent), {"control": [280]})
    words = ["sweep", "--from", "s", "--name", "b", "--set", "grpo.steps=5", "--store", parent.store]
    code, out, err = here(monkeypatch, capsys, *words, "--submit", "http://head:8265")
    assert (code, out.splitlines()[0]) == (0, "the same as s but grpo.steps=5"), err
    sent = load_study_config(str(tmp_path / "kept" / "sweep"), "b")
    assert (sent.tracking_uri, sent.derived and sent.derived.id) == ("http://head:5000", parent.id)


def test_a_resumed_sweep_sends_its_name_and_nothing_else(
    reached: Callable[..., Head], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it lies in the store is seen by those who reach the store."""
    head = reached(on_this_machine=False)
    words = [
        "resume",
        "s",
        "--store",
        "/shared/runs",
        "--budget",
        "4",
        "--concurrent",
        "2",
        "--tracking-uri",
        "http://head:5000",
    ]
    assert here(monkeypatch, capsys, *words, "--submit", "http://head:8265")[0] == 0
    wanted = "resume s --store /shared/runs --tracking-uri http://head:5000 --budget 4 --concurrent 2 --address auto"
    assert shlex.split(head.jobs[0]["entrypoint"]) == ["python", "rin.py", *wanted.split()]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["rin.py"]
    assert begin_shipped(str(tmp_path / "kept" / "sweep")) == []
    parsed: Any = cli.typer.main.get_command(cli.app)
    parsed.commands["resume"].make_context("resume", wanted.split()[1:])


# What the job says


def test_a_head_whose_agent_is_not_up_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(tmp_path / "kept")
    head.busy_for = 2
    assert submit_sweep(server(head), study(tmp_path), []).id == "job-1"
    assert head.busy_for == 0
    head.busy_for = 2
    monkeypatch.setattr(submission, "AGENT_SECONDS", 0.0)
    with pytest.raises(ConfigError, match="No available agent"):
        submit_sweep(server(head), study(tmp_path), [])


@pytest.mark.parametrize(
    ("says", "ends", "said"),
    [
        (
            ["INFO ray", "rin: --name s: /runs/s exists already; choose another name"],
            JobStatus.FAILED,
            "--name s: /runs/s exists already",
        ),
        (
            ["Traceback", "ModuleNotFoundError: No module named 'torch'", ""],
            JobStatus.FAILED,
            "No module named 'torch'",
        ),
        ([], JobStatus.FAILED, "runtime environment: no space left"),
        ([], JobStatus.STOPPED, "runtime environment: no space left"),
        (["sweep other: 3 trials"], JobStatus.FAILED, "sweep other"),
    ],
)
def test_a_job_that_ends_before_the_sweep_begins_is_told_with_its_last_word(
    says: Sequence[str], ends: JobStatus, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"job job-1 ended before the sweep began: .*{re.escape(said)}"):
        followed(Head(tmp_path / "kept", says, ends), tmp_path)


def followed(head: Head, store: Path) -> bool:
    return has_begun(server(head), submit_sweep(server(head), study(store), []))


@pytest.mark.parametrize(
    ("says", "ends", "begun"),
    [
        (["sweep s: 3 trials"], JobStatus.RUNNING, True),
        (["told", "sweep s: 3 trials", "candidate"], JobStatus.SUCCEEDED, True),
        (["building the embedded base model, once: 2 minutes"], JobStatus.RUNNING, True),
        (["sweep other: 3 trials"], JobStatus.RUNNING, False),
        ([], JobStatus.PENDING, False),
    ],
)
def test_a_job_is_listened_to_until_its_sweep_begins(
    says: Sequence[str], ends: JobStatus, begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "SIGN_SECONDS", 0.0)
    assert followed(Head(tmp_path / "kept", says, ends), tmp_path) == begun


def test_status_asks_the_job_where_the_sweep_is_not_there_yet_or_nobody_is_heard_to_run_it(
    reached: Callable[..., Head], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RIN_CACHE", str(tmp_path / "cache"))
    head = reached()
    words = ["sweep", "--workload", "tiny", "--name", "s", "--trials", "2", "--submit", "http://head:8265"]
    assert here(monkeypatch, capsys, *words)[0] == 0
    code, out, _ = here(monkeypatch, capsys, "status", "s")
    assert (code, "s: no sweep of that name in" in out) == (0, True)
    assert out.endswith("its job job-1 at http://head:8265 is RUNNING\n")
    assert here(monkeypatch, capsys, "status", "s", "--json")[:2] == (0, "[]\n")
    head.ends, head.says = JobStatus.FAILED, ["Traceback", "rin: --gpus 9: there are 8"]
    code, out, _ = here(monkeypatch, capsys, "status", "s")
    assert (code, out.split("8265 ")[-1]) == (1, "is FAILED: --gpus 9: there are 8\n")
    code, _, err = here(monkeypatch, capsys, "status", "s", "--store", str(tmp_path))
    assert (code, "job-1" in err) == (2, False), "of another store"

    config = study(tmp_path / "laptop" / "runs", trials=1, replicates=2)
    write_sweep(config, [make_arm(config, "control")], {"control": [280, None]})
    code, out, _ = here(monkeypatch, capsys, "status", "s")
    assert (code, "is FAILED: --gpus 9" in out, "nobody is running them" in out) == (0, True, True)
    head.ends = JobStatus.RUNNING
    assert here(monkeypatch, capsys, "status", "s")[1].endswith("is RUNNING\n")
    monkeypatch.setattr(submission, "job_server", job_server)
    shutil.rmtree(tmp_path / "laptop" / "runs")
    note_job(str(tmp_path / "laptop" / "runs"), "s", Job(id="job-1", address=NOBODY))
    code, _, err = here(monkeypatch, capsys, "status", "s")
    assert (code, f"its job job-1 at {NOBODY} cannot be asked: " in err) == (2, True)


def test_a_job_that_is_refused_leaves_the_name_to_the_one_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIN_CACHE", str(tmp_path / "cache"))
    first = Job(id="job-0", address=NOBODY)
    note_job(str(tmp_path), "s", first)
    with pytest.raises(ConfigError, match="exists already"):
        followed(Head(tmp_path / "kept", ["rin: --name s: exists already"], JobStatus.FAILED), tmp_path)
    assert noted_job(str(tmp_path), "s") == first


# In the job


def test_a_name_that_is_taken_is_refused_where_the_store_is(tmp_path: Path) -> None:
    config = study(tmp_path / "runs")
    ship(config, fixed_arms(config), tmp_path / "kept" / "sweep")
    save_study_config(config.model_copy(update={"seed": 7}))
    with pytest.raises(ConfigError, match=r"--name s: .* exists already"):
        begin_shipped(str(tmp_path / "kept" / "sweep"))
    assert load_study_config(config.store, "s").seed == 7


@pytest.mark.slow
def test_what_the_searcher_is_told_is_found_where_the_store_is(tmp_path: Path) -> None:
    """An earlier sweep may lie where this machine cannot look."""
    config = study(tmp_path / "runs", evidence=("e13i-baseline",), warm_start="earlier", settings={})
    ship(config, fixed_arms(config), tmp_path / "kept" / "sweep")
    earlier = study(tmp_path / "runs", name="earlier", trials=2, settings={})
    arm = make_arm(earlier, "c01", "eval.questions=400")
    write_sweep(earlier, [arm], {"c01": [300]})
    told = begin_shipped(str(tmp_path / "kept" / "sweep"))
    assert [line.split(":")[0].split(" (")[0] for line in told] == ["e13i-baseline of the plan", "sweep earlier"]
    assert [evidence.source for evidence in read_evidence(config)] == told


# A real cluster


@pytest.fixture
def short() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


def bare_python(folder: Path) -> str:
    """An interpreter with everything that rin needs, and without rin."""
    venv.create(folder, symlinks=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(
        f"{Path(ray.__file__).parents[1]}\n"
    )  # its own .pth files are not followed from here
    python = str(folder / "bin" / "python")
    found = subprocess.run(
        [python, "-c", "import ray, torch, mlflow, spaces"], capture_output=True, text=True, cwd=folder, check=False
    )
    assert "No module named 'spaces'" in found.stderr
    return python


def jobs(running: Cluster) -> dict[str, Any]:
    token = Path(running.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{running.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return {job["submission_id"]: job for job in json.load(answer) if job["submission_id"]}


@pytest.mark.slow
def test_a_submitted_sweep_outlives_the_submitter_on_nodes_without_rin(short: Path, tmp_path: Path) -> None:
    """The program and the sweep travel; the cluster has only what rin depends on. A second one of that name is refused
    there."""
    laptop = tmp_path / "laptop"
    laptop.mkdir()
    (laptop / "space.yaml").write_text(
        "name: mine\ndescription: one dimension\ndimensions:\n"
        "  - {key: noise.sigma_start, domain: {kind: float, low: 0.001, high: 0.002}}\n"
    )
    with head_node(short, cpus=1, python=bare_python(short / "env")) as running:
        arguments = [
            "sweep",
            "space.yaml",
            "--workload",
            "tiny",
            "--trials",
            "2",
            "--no-confirm",
            "--name",
            "s",
            "--submit",
            running.dashboard,
        ]
        arguments += ["--set", "grpo.steps=3", "--set", "noise.sigma_end=0.0005"]

        def submitted() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*RIN, *arguments],
                env=dict(running.environment),
                cwd=laptop,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )

        done = submitted()
        assert done.returncode == 0, done.stderr
        (job,) = re.findall(r"submitted as (\w+):", done.stdout)
        assert f"rin status s --store {laptop}/runs" in done.stdout
        assert done.stdout.endswith("it has begun\n")
        space = (laptop / "space.yaml").rename(laptop / "away.yaml")

        stranger = urllib.request.Request(f"{running.dashboard}/api/jobs/")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(stranger, timeout=20)

        deadline = time.monotonic() + 240
        while (state := jobs(running)[job])["status"] in ("PENDING", "RUNNING") and time.monotonic() < deadline:
            time.sleep(0.5)
        log = "\n".join(
            path.read_text(errors="replace") for path in short.glob(f"ray/session_2*/logs/job-driver-{job}.log")
        )
        assert state["status"] == "SUCCEEDED", log
        assert state["entrypoint"] == f"python rin.py resume s --store {laptop}/runs --address auto"
        assert state["metadata"] == {"sweep": "s"}

        space.rename(laptop / "space.yaml")
        again = submitted()
        assert again.returncode == 2
        assert re.search("rin: --name s: .*/s exists already", again.stderr), "seen from here, so nothing is sent"
    outcomes = sorted((laptop / "runs" / "s" / "trials").glob("*/outcome.json"))
    assert [path.parent.name for path in outcomes] == ["c01-0", "control-0"]
    found = json.loads(outcomes[0].read_text())["outcome"]
    assert found["outcome"] == "completed"
    assert 0.001 <= found["config"]["noise"]["sigma_start"] <= 0.002

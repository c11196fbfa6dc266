"""What a sweep tells whom: secrets stay out of everything it writes, files of others run no code and lead nowhere,
ports stay local."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from search.arms import read_arms
from search.mirror import send_missing
from search.secrets import strip_password
from search.store import StudyConfig, absolute_store, check_name, load_study_config
from spaces.errors import ConfigError
from spaces.library import SPACES, load_space
from spaces.reading import load_yaml, parse_overrides, parse_yaml
from tests.processes import program, rin
from tests.real_mlflow import mlflow_server
from tests.test_architecture import MODULES, relative

RIN = [sys.executable, "-c", "from dashboards.cli import main; main()"]
SHORT = ["--workload", "tiny", "--trials", "2", "--no-confirm", "--concurrent", "1"]  # one process imports for both
SHORT += ["--set", "grpo.steps=3", "--set", "noise.num_stages=2", "--set", "eval.questions=32"]
IN_URI, IN_ENVIRONMENT = "canary-4711-in-the-uri", "canary-4711-in-the-environment"


# What the program is made of

FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.save",
    "tempfile.mktemp",
    "Tuner.restore",
    "tune.Tuner.restore",
}


MEANT = {
    "trainable/tasks/foreign.py": {"pickle"},
    "trainable/tasks/worker.py": {"pickle"},
    "trainable/tasks/conventions.py": {"exec", "compile"},
}
"""Where a user's own code runs, which is what he asked for: the trial writes to that process what it alone reads."""


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_module_unpickles_evaluates_or_calls_a_shell(path: Path) -> None:
    """safetensors, JSON and safe YAML are all that is read."""
    meant = MEANT.get(relative(path), set())
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES - meant
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS - meant, f"line {node.lineno}"
            for keyword in node.keywords:
                risky = (
                    keyword.arg in ("shell", "trust_remote_code", "allow_pickle")
                    and ast.unparse(keyword.value) != "False"
                )
                assert not risky, f"line {node.lineno}: {keyword.arg}"


def test_a_trial_unpickles_nothing_that_a_user_s_code_says() -> None:
    """The other side of its pipe is untrusted: it answers in JSON."""
    calls = {
        relative(path): {
            ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        }
        for path in MODULES
    }
    reading = {name for name, called in calls.items() if called & {"pickle.load", "pickle.loads", "pickle.Unpickler"}}
    assert reading == {"trainable/tasks/worker.py"}


TAGGED = [
    "!!python/object/apply:os.system ['true']",
    "!!python/name:os.system",
    "!<tag:yaml.org,2002:python/object/new:os.system> [true]",
]


@pytest.mark.parametrize("text", TAGGED)
def test_yaml_builds_no_objects_wherever_it_comes_from(text: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(f"name: {text}\n")
    readers: list[Callable[[], Any]] = [
        lambda: parse_yaml(text, "text"),
        lambda: parse_overrides([f"model.name={text}"]),
        lambda: load_yaml(file),
        lambda: load_space(file),
    ]
    for read in readers:
        with pytest.raises(ConfigError):
            read()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://me@host:5000/x"),
        ("postgresql+psycopg://me:se:cr@t@db/mlflow", "postgresql+psycopg://me@db/mlflow"),
        ("http://host/?token=secret&x=1", "http://host/?token=&x=1"),
        ("s3://key:secret@bucket/runs", "s3://key@bucket/runs"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_a_password_is_cut_out_of_whatever_is_shown(text: str, shown: str) -> None:
    assert strip_password(text) == shown


# A real sweep with secrets in its reach


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A sweep whose tracking URI and environment hold canaries; what its processes said, listened to and were called
    meanwhile."""
    import tempfile

    folder = tmp_path_factory.mktemp("swept")
    with (
        tempfile.TemporaryDirectory(prefix="rin-ray-", dir="/tmp", ignore_cleanup_errors=True) as ray,
        mlflow_server(folder) as server,
    ):
        secrets = {"AWS_SECRET_ACCESS_KEY": IN_ENVIRONMENT, "HF_TOKEN": IN_ENVIRONMENT, "PGPASSWORD": IN_ENVIRONMENT}
        environment = {**os.environ, **secrets, "RAY_TMPDIR": ray}
        tracking = ["--tracking-uri", server.uri.replace("://", f"://me:{IN_URI}@")]
        listening: set[str] = set()
        called: set[str] = set()
        with program(
            [*RIN, "sweep", *SHORT, "--name", "s", "--store", str(folder / "runs"), *tracking],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as running:
            assert running.stdout is not None
            said = ""
            for line in running.stdout:
                said += line
                if "step" in line:
                    listening |= set(sockets(running.pid))
                    called |= {
                        " ".join(process.cmdline())
                        for process in psutil.Process(running.pid).children(recursive=True)
                        if alive(process)
                    }
        assert running.returncode == 0, said
        with pytest.MonkeyPatch.context() as patch:
            for name, value in secrets.items():
                patch.setenv(name, value)
            for command in (["list"], ["status", "s"], ["status", "s", "--json"], ["export", "s"]):
                done = rin(
                    *command, "--store", str(folder / "runs"), *(tracking if command[0] == "status" else []), cwd=folder
                )
                assert done.code == 0, done.err
                said += done.out + done.err
        yield {"folder": folder, "ray": Path(ray), "said": said, "listening": listening, "called": called}


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.cmdline())
    except psutil.Error:
        return False


def sockets(pid: int) -> Iterator[str]:
    """Addresses at which a process and its children listen."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            yield from (link.laddr.ip for link in process.net_connections("inet") if link.status == psutil.CONN_LISTEN)
        except psutil.Error:  # gone meanwhile
            continue


def holding(text: str, folder: Path) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes():
            found.append(str(path.relative_to(folder)))
    return sorted(found)


@pytest.mark.slow
def test_no_secret_is_written_into_the_store_or_into_mlflow(swept: dict[str, Any]) -> None:
    """study.json, Tune's pickles, outcomes, params, tags, artifacts, the database itself."""
    assert "mlflow.db" in holding("grpo/reward", swept["folder"]), "the search reads the database too"
    for secret in (IN_URI, IN_ENVIRONMENT):
        assert holding(secret, swept["folder"]) == []


@pytest.mark.slow
def test_no_secret_is_printed(swept: dict[str, Any]) -> None:
    assert "2 of 2" in swept["said"]
    for secret in (IN_URI, IN_ENVIRONMENT):
        assert [line for line in swept["said"].splitlines() if secret in line] == []


@pytest.mark.slow
def test_no_secret_is_in_ray_s_logs(swept: dict[str, Any]) -> None:
    assert holding("raylet", swept["ray"]), "the search reads Ray's session"
    for secret in (IN_URI, IN_ENVIRONMENT):
        assert holding(secret, swept["ray"]) == []


@pytest.mark.slow
def test_no_process_that_a_sweep_starts_carries_a_secret_in_its_command_line(swept: dict[str, Any]) -> None:
    assert any("raylet" in words for words in swept["called"])
    for secret in (IN_URI, IN_ENVIRONMENT):
        assert [words for words in swept["called"] if secret in words] == []


@pytest.mark.slow
def test_a_sweep_on_this_machine_listens_to_this_machine_alone(swept: dict[str, Any]) -> None:
    assert swept["listening"]
    assert {address.removeprefix("::ffff:") for address in swept["listening"]} <= {"127.0.0.1", "::1"}


# A store that somebody else wrote


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_the_bomb_explodes(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_nothing_unpickles_what_lies_in_a_store(swept: dict[str, Any], tmp_path: Path) -> None:
    """Every file that Tune pickled, and each place where a pickle could lie in wait, is a bomb when the sweep is
    resumed: a copy of it, which is all that another store holds."""
    mark = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(mark))

    sweep = shutil.copytree(swept["folder"] / "runs" / "s", tmp_path / "runs" / "s")
    (sweep / "trials" / "c01-0" / "outcome.json").unlink()  # so that there is something to resume
    planted = [path for path in (sweep / "tune").rglob("*") if path.is_file()]
    assert any(path.suffix == ".pkl" for path in planted), "Tune pickles"
    planted += [
        sweep / "optuna.pkl",
        sweep / "trials" / "c01-0" / "checkpoint-000002.pkl",
        sweep / "tune" / "searcher-state-latest.pkl",
    ]
    for path in planted:
        path.write_bytes(bomb)
    tracking = ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    for command in (["list"], ["status", "s", *tracking], ["resume", "s", *tracking], ["export", "s"]):
        said = rin(*command, "--store", str(tmp_path / "runs"), cwd=tmp_path)
        assert said.code == 0, said.err
    assert (sweep / "trials" / "c01-0" / "outcome.json").exists(), "it was resumed"
    assert not mark.exists()


ESCAPES = ["../out", "/tmp/out", "a/../../out", "..", ".", "", "a/b", "a\\..\\b", "a\nb", ".hidden", "x" * 101]


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_of_a_sweep_leads_out_of_the_store(name: str, tmp_path: Path) -> None:
    store = tmp_path / "runs"
    store.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.json").write_text("{}")
    with pytest.raises(ConfigError):
        load_study_config(str(store), name)
    with pytest.raises(ConfigError):
        check_name(name)


def test_the_command_line_refuses_such_a_name_before_it_writes_anything(tmp_path: Path) -> None:
    done = rin("sweep", *SHORT, "--name", "../out", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "--name ../out" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def foreign(tmp_path: Path) -> StudyConfig:
    """A sweep whose files somebody else wrote: they name places outside of the store."""
    config = StudyConfig(
        name="s",
        space=SPACES["sigma"],
        workload="tiny",
        store="/elsewhere",
        tracking_uri=f"sqlite:///{tmp_path}/out/mlflow.db",
    )
    (tmp_path / "runs" / "s").mkdir(parents=True)
    (tmp_path / "runs" / "s" / "study.json").write_text(config.model_dump_json())
    return load_study_config(str(tmp_path / "runs"), "s")


def outside(tmp_path: Path) -> list[str]:
    return [
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*")
        if "runs" not in path.relative_to(tmp_path).parts[:1]
    ]


def test_a_sweep_lies_where_it_is_found_and_not_where_it_says(foreign: StudyConfig, tmp_path: Path) -> None:
    assert foreign.store == str(tmp_path / "runs")
    assert foreign.folder.local == foreign.scratch == tmp_path / "runs" / "s"


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", "a/b", "..", ""])
def test_no_name_of_an_arm_leads_out_of_the_store(foreign: StudyConfig, name: str, tmp_path: Path) -> None:
    arms = tmp_path / "runs" / "s" / "arms"
    arms.mkdir()
    (arms / "0000.json").write_text(json.dumps({"name": name, "origin": "control", "config": {}, "params": {}}))
    with pytest.raises(ConfigError, match="nothing may lead out of its folder"):
        read_arms(foreign)


def test_telling_mlflow_of_somebody_else_s_sweep_makes_no_database_where_it_names_one(
    foreign: StudyConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        send_missing(foreign)
    assert outside(tmp_path) == []


def test_a_store_s_name_holds_no_secret_since_a_sweep_writes_it_down() -> None:
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as caught:
        absolute_store("s3://key:canary-4711@bucket/runs")
    assert "canary-4711" not in str(caught.value)

"""Tracking in a real PostgreSQL, straight and behind MLflow's server; its password appears nowhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest

from spaces.reading import parse_yaml, read_config
from tests.conftest import require
from tests.plain_sweeps import without_ray
from tests.processes import free_port, program, rin
from tests.real_mlflow import mlflow_server

PASSWORD = "canary-4711-postgres"
RIN = [sys.executable, "-c", "from dashboards.cli import main; main()"]
SHORT = ["--workload", "tiny", "--trials", "2", "--no-confirm", "--concurrent", "1"]  # one process imports for both
SHORT += ["--set", "grpo.steps=3", "--set", "noise.num_stages=2", "--set", "eval.questions=32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Postgres:
    port: int

    @property
    def uri(self) -> str:
        return f"postgresql://rin@127.0.0.1:{self.port}/postgres"

    @property
    def uri_with_password(self) -> str:
        return self.uri.replace("rin@", f"rin:{PASSWORD}@")

    def rows(self, query: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.uri_with_password) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server of this test alone, on localhost, that wants its password; as another user where this one is root."""
    programs = [Path(found).parent for found in [shutil.which("initdb")] if found] + sorted(
        Path("/usr/lib/postgresql").glob("*/bin")
    )
    require(programs, "needs PostgreSQL: apt-get update && apt-get install -y postgresql")
    user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="rin-pg-", dir="/tmp") as folder:
        secret, data, port = Path(folder) / "password", Path(folder) / "data", free_port()
        secret.write_text(PASSWORD)
        if user:
            for path in (folder, secret):
                shutil.chown(path, **user)
        begin = [
            str(programs[0] / "initdb"),
            "-D",
            str(data),
            "-U",
            "rin",
            "--auth=scram-sha-256",
            f"--pwfile={secret}",
            "--no-sync",
        ]
        subprocess.run(begin, cwd=folder, check=True, capture_output=True, **user)  # type: ignore[call-overload]
        serve = [str(programs[0] / "postgres"), "-D", str(data), "-k", folder, "-p", str(port)]
        serve += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        running = subprocess.Popen(serve, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user)  # type: ignore[call-overload]
        try:
            server = Postgres(port=port)
            deadline = time.monotonic() + 30
            while True:
                try:
                    server.rows("select 1")
                    break
                except psycopg.OperationalError:
                    assert running.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            yield server
        finally:
            running.send_signal(signal.SIGINT)  # fast: connections are cut
            running.wait(30)


def watched(folder: Path, *arguments: str) -> str:
    """What `rin` prints; libpq finds the password in its environment, as the documentation advises, and no command line
    shows it."""
    environment = {**os.environ, "PGPASSWORD": PASSWORD}
    with program(
        [*RIN, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        said = ""
        for line in running.stdout:
            said += line
            assert not [words for words in command_lines(running.pid) if PASSWORD in words]
    assert running.returncode == 0, said
    return said


def said_here(folder: Path, *arguments: str) -> str:
    done = rin(*arguments, cwd=folder)
    assert done.code == 0, done.err
    return done.out + done.err


def command_lines(pid: int) -> list[str]:
    lines = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:  # gone meanwhile
            continue
    return lines


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def check_sweep(postgres: Postgres, name: str) -> None:
    """By SQL, past MLflow's client and ours."""
    of_sweep = f"from runs r join experiments e on r.experiment_id = e.experiment_id where e.name = '{name}'"
    assert postgres.rows(f"select r.status, r.end_time is not null {of_sweep}") == [("FINISHED", True)] * 3, (
        "two trials, and the page"
    )
    points = f"select count(*) from metrics where key = 'grpo/reward' and run_uuid in (select r.run_uuid {of_sweep})"
    assert postgres.rows(points) == [(6,)]


@pytest.mark.slow
def test_a_sweep_is_tracked_in_postgresql_and_its_password_appears_nowhere(postgres: Postgres, tmp_path: Path) -> None:
    said = watched(tmp_path, "sweep", *SHORT, "--name", "straight", "--tracking-uri", postgres.uri)
    check_sweep(postgres, "straight")
    runs = tmp_path / "runs"
    assert [path for path in (runs / "artifacts").rglob("*") if path.is_file()], "files of runs lie in the store"
    assert not (tmp_path / "mlruns").exists()
    # Where a password is given in the URI all the same, it is used and not repeated.
    given = ["--tracking-uri", postgres.uri_with_password]
    said += said_here(tmp_path, "status", "straight", *given)
    assert "2 of 2" in said
    printed = said_here(tmp_path, "status", "straight", "--json", *given)
    rows = json.loads(printed)
    assert [row["status"] for row in rows] == ["completed"] * 2
    exported = said_here(tmp_path, "export", "straight")
    assert read_config(parse_yaml(exported, "export")).grpo.steps == 3
    assert PASSWORD not in said + printed + exported
    assert files_with("straight", tmp_path), "the search below would find something"
    assert files_with(PASSWORD, tmp_path) == []
    assert PASSWORD not in said_here(tmp_path, "resume", "straight", *given)
    check_sweep(postgres, "straight")


@pytest.mark.slow
def test_a_sweep_is_tracked_by_mlflow_s_server_over_postgresql(postgres: Postgres, tmp_path: Path) -> None:
    with mlflow_server(tmp_path, postgres.uri_with_password) as server:
        with without_ray():
            said_here(tmp_path, "sweep", *SHORT, "--name", "served", "--tracking-uri", server.uri)
        assert "2 of 2" in said_here(tmp_path, "status", "served")  # study.json knows where
        assert read_config(parse_yaml(said_here(tmp_path, "export", "served"), "export")).grpo.steps == 3
    check_sweep(postgres, "served")
    assert files_with(PASSWORD, tmp_path) == []


@pytest.mark.slow
def test_a_wrong_password_is_one_line_that_does_not_repeat_it(postgres: Postgres, tmp_path: Path) -> None:
    wrong = postgres.uri.replace("rin@", "rin:wrong-4711@")
    done = rin("sweep", *SHORT, "--name", "s", "--tracking-uri", wrong, cwd=tmp_path)
    assert done.code == 2, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("rin: ")]
    assert "password authentication failed" in line
    assert "wrong-4711" not in done.out + done.err
    assert not (tmp_path / "runs").exists()

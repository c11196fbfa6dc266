"""A store in an object store: a real sweep against a local S3 server, killed in the middle and resumed.

NFS is not tried here: a test cannot mount one. What differs there from a local folder (a rename is atomic on the
server, locks need NFS 4) is left to the file system.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow.fs import FileSelector, FileSystem

from tests.processes import free_port, program, rin
from tests.real_mlflow import runs

RIN = [sys.executable, "-c", "from dashboards.cli import main; main()"]
SECRET = "canary-4711-s3"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of moto's S3 server; credentials come by the environment, as on a real machine."""
    address = f"127.0.0.1:{free_port()}"
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    host, port = address.split(":")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", host, "-p", port], stdout=log, stderr=log, start_new_session=True
    )
    before = dict(os.environ)
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(
                    urllib.request.Request(f"http://{address}/bucket", method="PUT"), timeout=5
                ).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield address
    finally:
        os.environ.clear()
        os.environ |= before
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()


def names(store: str) -> list[str]:
    """Of every object below the store, by pyarrow and not by us; a running sweep takes some away again."""
    system, root = FileSystem.from_uri(store)
    found = system.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    return [info.path.removeprefix(f"{root}/") for info in found if info.is_file]


def files(store: str) -> dict[str, bytes]:
    """Every object with its content, while nothing runs."""
    system, root = FileSystem.from_uri(store)
    return {name: system.open_input_stream(f"{root}/{name}").readall() for name in names(store)}


def said_here(folder: Path, *arguments: str) -> str:
    done = rin(*arguments, cwd=folder)
    assert done.code == 0, done.err
    return done.out + done.err


@pytest.mark.slow
def test_a_sweep_in_an_object_store_goes_on_after_its_driver_was_killed(endpoint: str, tmp_path: Path) -> None:
    store = f"s3://bucket/runs?scheme=http&endpoint_override={endpoint}"
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    places = ["--store", store, "--tracking-uri", tracking]
    sweep = [
        "sweep",
        "--workload",
        "tiny",
        "--trials",
        "2",
        "--no-confirm",
        "--name",
        "s",
        "--concurrent",
        "1",
        "--set",
        "grpo.steps=120",
        *places,
    ]
    sweep += ["--set", "eval.questions=64", "--set", "collapse.mode=off"]
    with program(
        [*RIN, *sweep], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as first:
        deadline = time.monotonic() + 180
        while not in_second_trial(names(store)):
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()

    said = said_here(tmp_path, "resume", "s", *places)
    assert "2 of 2" in said_here(tmp_path, "status", "s", *places)
    shown = [(run.data.tags["arm"], run.data.tags["status"], run.info.status) for run in runs(tracking, "s")]
    assert shown == [(arm, "completed", "FINISHED") for arm in ("control", "c01")]
    there = files(store)
    assert {name for name in there if name.endswith("/outcome.json")} == {
        f"s/trials/{arm}-0/outcome.json" for arm in ("control", "c01")
    }
    second = json.loads(there["s/trials/c01-0/attempt-002.json"])
    assert second["first_step"] > 0, "the trial went on from its checkpoint in the object store"
    assert "s/trials/control-0/attempt-002.json" not in there, "what was over was not run again"
    assert "s/best.yaml" in there
    assert SECRET not in said
    assert [name for name, content in there.items() if SECRET.encode() in content] == []


def in_second_trial(there: list[str]) -> bool:
    """It has checkpoints."""
    return any(re.match(r"s/trials/c01-0/checkpoint-0*[1-9]\d*/progress\.json", name) for name in there)

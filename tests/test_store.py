"""A sweep's own file: found where it lies, refused when it is not ours, driven by one process at a time."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout

from dashboards.listing import sweep_line, sweep_row
from search import mlflow_client
from search.arms import trial_folder
from search.mlflow_client import absolute_uri
from search.store import (
    STUDY_FILE,
    VERSION,
    absolute_store,
    check_name,
    check_store,
    check_writable,
    default_tracking_uri,
    is_driven,
    load_study_config,
    newest_study,
    only_driver,
    refuse_second_driver,
    refuse_taken_name,
    save_study_config,
    sweeps,
)
from search.study import begin_study, resume_study
from spaces.config import ConfigError
from tests.processes import program
from tests.written_sweeps import make_arm, study, write_sweep


def changed(place: Path, /, **changes: Any) -> None:
    path = place / "s" / STUDY_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_study_comes_back_as_it_was(tmp_path: Path) -> None:
    config = study(
        tmp_path, kind="confirm", parent="p", looks=(5, 8), points=("e12",), budget_hours=1.5, seed=7, gpus=0.5
    )
    save_study_config(config)
    assert load_study_config(str(tmp_path), "s") == config


def test_a_study_comes_back_as_it_was_from_an_object_store(s3_store: Callable[[str], str], tmp_path: Path) -> None:
    config = study(s3_store(tmp_path.name))
    save_study_config(config)
    assert load_study_config(config.store, "s") == config
    assert sweeps(config.store) == ["s"]
    assert config.scratch.is_absolute()
    assert "://" not in str(config.scratch)


def test_where_a_store_lies_now_wins_over_where_it_says_it_was_and_its_database_follows(tmp_path: Path) -> None:
    save_study_config(study(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = load_study_config(str(tmp_path / "there"), "s")
    assert (moved.store, moved.folder.local) == (str(tmp_path / "there"), tmp_path / "there" / "s")
    assert moved.tracking_uri == default_tracking_uri(str(tmp_path / "there"))


def test_a_tracking_server_stays_where_it_is_when_the_store_moves(tmp_path: Path) -> None:
    save_study_config(study(tmp_path / "here", tracking_uri="http://host:5000"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert load_study_config(str(tmp_path / "there"), "s").tracking_uri == "http://host:5000"


def test_a_file_cannot_say_that_it_lies_elsewhere(tmp_path: Path) -> None:
    """A sweep that somebody sent: neither its name nor its store leads out of the folder in which it lies."""
    save_study_config(study(tmp_path / "store"))
    changed(tmp_path / "store", name="../../victim", store="/etc")
    config = load_study_config(str(tmp_path / "store"), "s")
    assert config.folder.local == tmp_path / "store" / "s"
    assert config.scratch == tmp_path / "store" / "s"
    assert trial_folder(config, "c00", 0).local == tmp_path / "store" / "s" / "trials" / "c00-0"


@pytest.mark.parametrize("name", ["../up", "/etc", "", ".", "..", "a/b", "-x", "a b", "x" * 101, "a\n"])
def test_a_name_that_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use letters, digits"):
        check_name(name)
    with pytest.raises(ConfigError, match="use letters, digits"):
        load_study_config(str(tmp_path), name)


@pytest.mark.parametrize("version", [1, VERSION - 1, VERSION + 1, None, "x"])
def test_another_version_is_refused_by_number(tmp_path: Path, version: Any) -> None:
    save_study_config(study(tmp_path))
    changed(tmp_path, version=version)
    with pytest.raises(
        ConfigError, match=rf"written by version {version}, this program reads {VERSION}; use the program that wrote it"
    ):
        load_study_config(str(tmp_path), "s")


@pytest.mark.parametrize("text", ["", "{", '{"version": 2, "name"', "\x00\x00\x00", "not json"])
def test_a_damaged_file_is_one_line_with_what_to_do(tmp_path: Path, text: str) -> None:
    save_study_config(study(tmp_path))
    (tmp_path / "s" / STUDY_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"study\.json: is damaged \(not JSON\); restore it from a backup") as caught:
        load_study_config(str(tmp_path), "s")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
def test_json_that_is_no_study_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    save_study_config(study(tmp_path))
    (tmp_path / "s" / STUDY_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"study\.json"):
        load_study_config(str(tmp_path), "s")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("replicates", 0),
        ("searcher", "cmaes"),
        ("objectives", []),
        ("trials", "many"),
        ("colour", "red"),
        ("budget_hours", -1),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path: Path, key: str, value: Any) -> None:
    save_study_config(study(tmp_path))
    changed(tmp_path, **{key: value})
    with pytest.raises(ConfigError, match=key) as caught:
        load_study_config(str(tmp_path), "s")
    assert "\n" not in str(caught.value)


def test_a_sweep_that_does_not_exist_names_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"NAME=x: no sweep of that name .*; it holds none"):
        load_study_config(str(tmp_path), "x")
    save_study_config(study(tmp_path, name="b"))
    save_study_config(study(tmp_path, name="a"))
    with pytest.raises(ConfigError, match="there are a, b"):
        load_study_config(str(tmp_path), "x")


def test_sweeps_are_folders_with_a_study_in_them_sorted(tmp_path: Path) -> None:
    assert sweeps(str(tmp_path / "none")) == []
    for name in ("b", "a"):
        save_study_config(study(tmp_path, name=name))
    (tmp_path / "notes").mkdir()
    (tmp_path / "mlflow.db").write_text("")
    (tmp_path / ".hidden").mkdir()
    assert sweeps(str(tmp_path)) == ["a", "b"]


def test_a_sweep_does_not_begin_where_a_confirmation_of_its_name_lies(tmp_path: Path) -> None:
    left = study(tmp_path, name="s-confirm", kind="confirm", parent="s", parent_id="of a sweep that is gone")
    save_study_config(left)
    with pytest.raises(
        ConfigError, match=r"--name s: s-confirm lies in .* already, .*; rin delete s-confirm, or choose"
    ):
        refuse_taken_name(study(tmp_path))
    refuse_taken_name(study(tmp_path, name="t"))
    refuse_taken_name(study(tmp_path, name="s-confirm-c01", kind="confirm", parent="s"))


def test_a_relative_store_is_anchored_and_a_uri_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_store("runs") == str(tmp_path / "runs")
    assert absolute_store("s3://bucket/runs") == "s3://bucket/runs"


def test_an_object_store_holds_no_database(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--store s3://bucket/runs: .*give --tracking-uri") as caught:
        default_tracking_uri("s3://bucket/runs?secret_key=canary")
    assert "canary" not in str(caught.value)


@pytest.mark.slow
def test_reading_sweeps_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys, search.store; "
        "print([name for name in ('ray', 'torch', 'mlflow', 'optuna') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# One driver

HOLD = """
import sys
from search.store import load_study_config, only_driver
with only_driver(load_study_config(sys.argv[1], "s")):
    print("holds it", flush=True)
    sys.stdin.read()
"""


def driver(store: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, store], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds it\n"
    return process


@pytest.mark.slow
def test_a_second_driver_is_refused_until_the_first_has_ended_however_it_ended(tmp_path: Path) -> None:
    config = study(tmp_path)
    save_study_config(config)
    for ending in (signal.SIGKILL, None):
        first = driver(str(tmp_path))
        try:
            with (
                pytest.raises(ConfigError, match=r"sweep s is being run by another process; .*rin resume s"),
                only_driver(config),
            ):
                pytest.fail("two drivers")
        finally:
            if ending is None:
                first.communicate("")
            else:
                first.send_signal(ending)
                first.wait()
        with only_driver(config):
            pass


@pytest.mark.slow
def test_in_an_object_store_a_second_driver_is_refused_and_a_killed_one_s_place_is_free(
    s3_store: Callable[[str], str], tmp_path: Path
) -> None:
    config = study(s3_store(tmp_path.name))
    save_study_config(config)
    first = driver(config.store)
    try:
        with (
            pytest.raises(ConfigError, match=rf"being run by another process \(process {first.pid} on "),
            only_driver(config),
        ):
            pytest.fail("two drivers")
    finally:
        first.kill()
        first.wait()
    with only_driver(config):
        assert "driver.json" in config.folder.names()
    assert "driver.json" not in config.folder.names()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_sweep_is_known_to_run_while_a_living_process_drives_it(
    place: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store = str(tmp_path) if place == "disk" else request.getfixturevalue("s3_store")(tmp_path.name)
    config = study(store)
    save_study_config(config)
    assert not is_driven(config)
    first = driver(store)
    try:
        assert is_driven(config)
        owner = "" if place == "disk" else rf" \(process {first.pid} on .*\)"
        with pytest.raises(ConfigError, match=rf"sweep s is being run by another process{owner}; .*rin resume s"):
            refuse_second_driver(config)
    finally:
        first.kill()
        first.wait()
    assert not is_driven(config)
    refuse_second_driver(config)
    second = driver(store)  # whoever only looked holds nothing
    second.kill()
    second.wait()


def test_a_sweep_that_nobody_drives_is_not_listed_as_running(tmp_path: Path) -> None:
    """Its driver was killed, and its trial has an attempt that never ended."""
    config = study(tmp_path)
    write_sweep(config, [make_arm(config, "control")], {"control": [None]})
    row = sweep_row(str(tmp_path), config.name)
    assert (row["driven"], "running" in row["status"], "running" in sweep_line(row)) == (False, False, False)
    with only_driver(config):
        row = sweep_row(str(tmp_path), config.name)
        assert (row["status"], row["driven"], sweep_line(row).endswith(" (running)")) == ({"running": 1}, True, True)


def test_two_sweeps_of_a_store_are_driven_side_by_side(tmp_path: Path) -> None:
    with only_driver(study(tmp_path, name="a")), only_driver(study(tmp_path, name="b")):
        pass


# Which one, and whether there is a place for it


def test_the_newest_study_is_the_one_that_was_begun_or_gone_on_with_last(tmp_path: Path) -> None:
    for age, (name, kind) in enumerate([("b", "sweep"), ("a-confirm", "confirm"), ("a", "sweep"), ("z", "sweep")]):
        config = study(tmp_path, name=name, kind=kind)
        save_study_config(config)
        os.utime(tmp_path / name / STUDY_FILE, (1e9 - age, 1e9 - age))
    assert newest_study(str(tmp_path)).name == "b"
    os.utime(tmp_path / "a-confirm" / STUDY_FILE)
    assert newest_study(str(tmp_path)).name == "a-confirm"
    assert newest_study(str(tmp_path), confirmations=False).name == "b"
    save_study_config(study(tmp_path, name="w", confirm_pairs=8))
    os.utime(tmp_path / "w" / STUDY_FILE, (1e9 - 9, 1e9 - 9))
    save_study_config(study(tmp_path, name="w-confirm", kind="confirm", parent="w"))
    os.utime(tmp_path / "w-confirm" / STUDY_FILE, (3e9, 3e9))
    for confirmations in (True, False):
        assert newest_study(str(tmp_path), confirmations=confirmations).name == "w", "it is the second part of that"
    with pytest.raises(ConfigError, match=r"no sweeps in .*; start one with: rin sweep"):
        newest_study(str(tmp_path / "empty"))


def test_a_store_that_is_no_folder_is_told_as_that(tmp_path: Path) -> None:
    """Under root nothing is forbidden: a file in the way stands for missing rights."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--store .*/nowhere: there is no such folder"):
        check_store(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"--store .*/file: is no folder"):
        check_store(str(tmp_path / "file"))
    for place in ("file", "file/below"):
        with pytest.raises(
            ConfigError, match=rf"--store .*/{place}: nothing can be written there \(.*\); give a folder"
        ):
            check_writable(str(tmp_path / place))


def test_a_sweep_without_a_place_is_told_of_the_place_and_not_of_its_tracking(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--store .*: nothing can be written there"):
        begin_study(study(tmp_path / "file" / "runs"))


def test_arms_of_other_ranks_and_gpus_without_a_rank_are_refused_whoever_made_the_arms(tmp_path: Path) -> None:
    config = study(tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"parallel\.ranks=2: in a sweep all trials have as many"):
        begin_study(config, fixed=[make_arm(config, "control", "parallel.ranks=2")])
    with pytest.raises(ConfigError, match=r"--gpus 4: a trial of s has parallel\.ranks=1"):
        begin_study(study(tmp_path / "runs", gpus=4.0), fixed=[make_arm(config, "control")])
    assert config.folder.names() == []


def test_whether_a_place_can_be_written_is_found_out_without_a_trace(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


# Places that cannot be


@pytest.mark.parametrize("sign", ["%", "?", "#"])
def test_a_folder_whose_path_means_something_in_a_database_s_address_is_refused(tmp_path: Path, sign: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--store {tmp_path}/a{sign}20b: {sign} means something")):
        absolute_store(f"{tmp_path}/a{sign}20b")
    assert absolute_store(f"s3://b/r{sign}x=1") == f"s3://b/r{sign}x=1"


def test_a_tilde_is_the_home_in_a_store_and_in_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_store("~/runs") == f"{tmp_path}/runs"
    assert absolute_uri("sqlite:///~/x.db") == f"sqlite:///{tmp_path}/x.db"


@pytest.mark.parametrize("uri", ["", "http://127.0.0.1:9"])
def test_a_store_that_cannot_be_written_to_is_one_line_whoever_tracks(tmp_path: Path, uri: str) -> None:
    """A file stands where the folder should be: root may write everywhere else."""
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "store"
    config = study(place, **({"tracking_uri": uri} if uri else {}))
    for begin in (lambda: begin_study(config), lambda: resume_study(config, lambda event: None)):
        with pytest.raises(ConfigError, match=r"--store .*/file/store: nothing can be written there"):
            begin()


def test_who_only_looks_needs_no_rights_on_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(tmp_path)
    with only_driver(config):
        opened: list[int] = []
        original = os.open
        monkeypatch.setattr(os, "open", lambda path, flags, *more: opened.append(flags) or original(path, flags, *more))
        assert is_driven(config)
        assert opened == [os.O_RDONLY]
    assert not is_driven(config)


def test_a_new_database_is_made_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow makes the tables when it first opens a database; of two sweeps that began at once one failed."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    made: list[str] = []

    class Opened:
        def __init__(self, tracking_uri: str) -> None:
            with pytest.raises(Timeout):
                mlflow_client._first_opening(tracking_uri).acquire(timeout=0)

        def search_experiments(self, max_results: int) -> None:
            self.__init__(uri)  # type: ignore[misc]
            made.append("tables")

    monkeypatch.setattr("mlflow.MlflowClient", Opened)
    mlflow_client.client(uri, create=True)
    assert made == ["tables"]
    mlflow_client._first_opening(uri).acquire(timeout=0).lock.release()


OPENING = """
import sys, time
from types import ModuleType

class MlflowClient:
    def __init__(self, tracking_uri): ...
    def search_experiments(self, max_results):
        for word in ("makes", "made"):
            print(word, file=open(sys.argv[2], "a"))
            time.sleep(0.3)

fake = ModuleType("mlflow")
fake.MlflowClient = MlflowClient
sys.modules["mlflow"] = fake
from search.mlflow_client import client
print("ready", flush=True)
sys.stdin.readline()
client(sys.argv[1], create=True)
"""


@pytest.mark.slow
def test_two_processes_that_open_a_new_store_at_once_make_its_database_one_after_the_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENING, default_tracking_uri(str(tmp_path)), str(tmp_path / "said")]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with program(command, **pipes) as one, program(command, **pipes) as other:
        for process in (one, other):
            assert process.stdout.readline() == "ready\n"
        for process in (one, other):
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.wait(60) for process in (one, other)] == [0, 0]
    assert (tmp_path / "said").read_text().split() == ["makes", "made"] * 2

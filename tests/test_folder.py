"""Whole files under safe names, the same on a disk and in an object store (a local S3 server)."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow.fs import FileSystem

from spaces.errors import ConfigError
from trainable.disk.folder import Folder


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "disk":
        yield Folder(str(tmp_path / "not made yet"))
    else:
        store: Callable[[str], str] = request.getfixturevalue("s3_store")
        yield Folder(store(tmp_path.name))


def test_a_file_is_read_back_and_a_second_write_replaces_the_whole_of_it(folder: Folder) -> None:
    folder.write("a.bin", bytes(range(256)) * 100)
    assert folder.read("a.bin") == bytes(range(256)) * 100
    folder.write("a.bin", "shorter, and text: ä")
    assert folder.read("a.bin") == "shorter, and text: ä".encode()
    folder.write("a.bin", b"")
    assert folder.read("a.bin") == b""


def test_what_is_not_there_is_none_and_an_empty_list(folder: Folder) -> None:
    assert folder.read("a.json") is None
    assert folder.names() == []
    assert (folder / "below").names() == []
    folder.remove("a.json")


def test_names_are_files_and_folders_directly_below_sorted(folder: Folder) -> None:
    for name in ("c.json", "a.json"):
        folder.write(name, "{}")
    (folder / "b" / "deep").write("hidden.json", "{}")
    assert folder.names() == ["a.json", "b", "c.json"]
    assert (folder / "b").names() == ["deep"]
    assert (folder / "b" / "deep").read("hidden.json") == b"{}"


def test_a_folder_is_no_file(folder: Folder) -> None:
    (folder / "b").write("a.json", "{}")
    assert folder.read("b") is None


def test_remove_takes_a_file_or_a_folder_with_all_it_holds_and_nothing_else(folder: Folder) -> None:
    for name in ("a.json", "ab.json"):
        folder.write(name, "{}")
    for name in ("x", "xy"):
        (folder / name / "deep").write("a.json", "{}")
    folder.remove("a.json")
    folder.remove("x")
    assert folder.names() == ["ab.json", "xy"]
    assert (folder / "x" / "deep").read("a.json") is None
    assert (folder / "xy" / "deep").read("a.json") == b"{}"


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "/", "/etc/passwd", "a/b", "../a", ".hidden", "a\\b", "a\n", "a\0", "~", "a b", "-r", "?x=1"],
)
def test_a_name_that_could_lead_out_is_refused_by_everything(folder: Folder, name: str, tmp_path: Path) -> None:
    for use in (folder.__truediv__, folder.read, folder.remove, lambda name: folder.write(name, "x")):
        with pytest.raises(ConfigError, match="is no name of a file"):
            use(name)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "name", ["c03-0", "outcome.json", "0001.json", "checkpoint-000012", "control-resample-2", "_x", "a+b"]
)
def test_the_names_of_a_sweep_are_allowed(folder: Folder, name: str) -> None:
    (folder / name).write(name, name)
    assert (folder / name).read(name) == name.encode()


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    Folder(str(tmp_path / "folder")).remove("link")
    assert (tmp_path / "elsewhere" / "a.json").exists()
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_reader_never_sees_half_a_file(folder: Folder) -> None:
    """Contents of one letter each, 4 MiB on a disk: a torn one would be short, or of two letters."""
    size = 1 << (22 if folder.local is not None else 18)
    folder.write("a.bin", b"a" * size)
    over = threading.Event()

    def write() -> None:
        for letter in (b"b", b"c", b"d", b"e") * 3:
            folder.write("a.bin", letter * size)
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not over.is_set():
        data = folder.read("a.bin")
        assert data is not None
        assert data == data[:1] * size
        seen.add(data[:1])
    writer.join()
    assert folder.read("a.bin") == b"e" * size
    assert seen


@pytest.mark.parametrize("broken", ["write", "rename"])
def test_a_write_that_fails_leaves_the_old_content_and_no_scratch_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    folder = Folder(str(tmp_path))
    folder.write("a.json", "old")
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        whole(path, data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    def refused(source: object, target: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_bytes", full) if broken == "write" else (os, "replace", refused)))
        with pytest.raises(OSError, match=r"No space|Input/output"):
            folder.write("a.json", "new")
    assert folder.read("a.json") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_scratch_files_of_a_killed_writer_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".a.json.4711.part").write_text("half")
    (tmp_path / "a.json").write_text("whole")
    assert Folder(str(tmp_path)).names() == ["a.json"]


def test_the_query_of_a_uri_stays_at_its_end(s3_store: Callable[[str], str], tmp_path: Path) -> None:
    """Read by pyarrow and not by us: the object lies where the path says, and the query is no part of it."""
    uri = s3_store(tmp_path.name)
    (Folder(uri) / "sweep" / "trials").write("a.json", "{}")
    place, _, query = uri.partition("?")
    assert (Folder(uri) / "sweep" / "trials").uri == f"{place}/sweep/trials?{query}"
    system, root = FileSystem.from_uri(uri)
    with system.open_input_stream(f"{root}/sweep/trials/a.json") as stream:
        assert stream.read() == b"{}"


def test_a_place_on_this_disk_is_local_and_an_object_store_is_not() -> None:
    assert Folder("/data/runs").local == Path("/data/runs")
    assert Folder("s3://bucket/runs").local is None


@pytest.mark.parametrize("uri", ["nonsense://bucket/runs", "s3://", "s3://bucket/runs?password=secret&scheme=http"])
def test_a_store_that_nobody_knows_is_the_users_mistake_in_one_line(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"--store .*give a folder or an s3:// URI") as caught:
        Folder(uri).read("a.json")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)

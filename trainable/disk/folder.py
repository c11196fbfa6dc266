"""A folder that may lie anywhere: on this disk, on NFS, in an object store.

Everything that must survive a killed process is written through here, whole files only: a reader sees the old content
or the new one, never half of it (a rename on a disk; an object store's `put` is like that by nature). A place is text:
an absolute path, or a URI that pyarrow reads, such as `s3://bucket/runs` or
`s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:9000`. Names are single path segments, so that nothing a
configuration says can lead out of the folder.

Left out: fsync. A power cut may tear the last files; who cannot afford that writes a checksum beside them
(`checkpoint.py`).
"""

import os
import re
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from spaces.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, slots=True)
class Folder:
    """Example: Folder("/data/runs") / "sweep" / "trials"; Folder("s3://bucket/runs").read("study.json")."""

    uri: str
    """Absolute path, or a URI of pyarrow.fs."""

    def __truediv__(self, name: str) -> "Folder":
        place, mark, query = self.uri.partition("?")
        return Folder(f"{place.rstrip('/')}/{_checked(name)}{mark}{query}")

    @property
    def local(self) -> Path | None:
        """The path on this disk (or NFS); None for an object store."""
        return None if "://" in self.uri else Path(self.uri)

    def read(self, name: str) -> bytes | None:
        """Content of a file; None when there is none."""
        if self.local is not None:
            path = self.local / _checked(name)
            return path.read_bytes() if path.is_file() else None
        store, root = _store(self.uri)
        try:
            with store.open_input_stream(f"{root}/{_checked(name)}") as stream:
                data: bytes = stream.read()
                return data
        except FileNotFoundError:
            return None

    def changed(self, name: str) -> float:
        """When a file was last written, in Unix seconds; 0 where there is none."""
        if self.local is not None:
            path = self.local / _checked(name)
            return path.stat().st_mtime if path.is_file() else 0.0
        store, root = _store(self.uri)
        nanoseconds = store.get_file_info(f"{root}/{_checked(name)}").mtime_ns
        return (nanoseconds or 0) / 1e9

    def write(self, name: str, data: bytes | str) -> None:
        """Put the whole content in place, making the folder where it is missing. Raises OSError."""
        data = data.encode() if isinstance(data, str) else data
        if self.local is None:
            store, root = _store(self.uri)
            with store.open_output_stream(f"{root}/{_checked(name)}") as stream:
                stream.write(data)
            return
        self.local.mkdir(parents=True, exist_ok=True)
        scratch = self.local / f".{_checked(name)}.{uuid.uuid4().hex[:12]}.part"
        try:
            scratch.write_bytes(data)
            os.replace(scratch, self.local / name)
        finally:
            scratch.unlink(missing_ok=True)

    def write_once(self, name: str, data: bytes | str) -> None:
        """Put it in place unless there is one: the first writer's stays. An object store may keep the last one's of
        two that write at the same moment. Raises OSError."""
        if self.local is None:
            if self.read(name) is None:
                self.write(name, data)
            return
        scratch = f"{_checked(name)}.{uuid.uuid4().hex[:12]}"
        self.write(scratch, data)
        try:
            os.link(self.local / scratch, self.local / name)
        except FileExistsError:
            pass
        finally:
            self.remove(scratch)

    def names(self) -> list[str]:
        """Files and folders directly below, sorted; [] when the folder does not exist."""
        if self.local is not None:
            return (
                sorted(path.name for path in self.local.iterdir() if path.name[0] != ".") if self.local.is_dir() else []
            )
        from pyarrow.fs import FileSelector

        store, root = _store(self.uri)
        return sorted(info.base_name for info in store.get_file_info(FileSelector(root, allow_not_found=True)))

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with all it holds; nothing happens when there is none."""
        import shutil

        if self.local is not None:
            path = self.local / _checked(name)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        from pyarrow.fs import FileType

        store, root = _store(self.uri)
        path_there = f"{root}/{_checked(name)}"
        kind = store.get_file_info(path_there).type
        if kind == FileType.Directory:
            store.delete_dir(path_there)
        elif kind == FileType.File:
            store.delete_file(path_there)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name of a file: use letters, digits, '.', '_', '+' and '-'; "
            "nothing may lead out of its folder"
        )
    return name


@cache
def _store(uri: str) -> tuple[Any, str]:
    """pyarrow's file system and the path in it."""
    from pyarrow.fs import FileSystem

    try:
        store, root = FileSystem.from_uri(uri)
    except Exception as error:  # pyarrow.lib's errors, ImportError of a build without that store
        raise ConfigError(
            f"--store {uri.partition('?')[0]}: {str(error).splitlines()[0]}; give a folder or an s3:// URI"
        ) from None
    if not root.strip("/"):
        raise ConfigError(
            f"--store {uri.partition('?')[0]}: names no bucket; give a folder or an s3:// URI such as s3://bucket/runs"
        )
    return store, root.rstrip("/")

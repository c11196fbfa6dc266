"""The files of the user's rewards: which version a sweep began with, and where a machine has it that is not the user's.

A sweep writes the sha256 of each file into its arms and keeps a copy of it, under that hash, beside them. A machine on
which the file does not lie (a node of a cluster, the head that a sweep was sent to) brings the copy into its cache and
runs that. A file that does lie there is run where it lies, with its neighbours, and must be the one that was hashed.
Only the file itself goes along: what it imports from beside itself must be installed, or lie on shared storage.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from spaces.cache import cache_folder
from spaces.config import TaskConfig
from trainable.disk.folder import Folder


def at_hand(written: str, sha256: str) -> str:
    """`FILE.py:FUNCTION`, with the copy in the place of a file that is not on this machine."""
    source, _, function = written.rpartition(":")
    copy = _copy(source, sha256)
    return f"{copy}:{function}" if sha256 and copy.exists() and not Path(source).exists() else written


def keep(task: TaskConfig, kept: Folder) -> None:
    """A copy of each file among a sweep's own."""
    for written, _, sha256 in _files(task):
        path = Path(at_hand(written, sha256).rpartition(":")[0])
        if path.name not in (kept / sha256).names():
            (kept / sha256).write(path.name, path.read_bytes())


def bring(task: TaskConfig, kept: Folder) -> None:
    """What does not lie on this machine, from a sweep's copies."""
    for _, source, sha256 in _files(task):
        copy = _copy(source, sha256)
        if Path(source).exists() or copy.exists():
            continue
        content = (kept / sha256).read(copy.name)
        if content is not None and hashlib.sha256(content).hexdigest() == sha256:
            Folder(str(copy.parent)).write(copy.name, content)


def _files(task: TaskConfig) -> Iterator[tuple[str, str, str]]:
    """As it is written, the file, its hash; packages do not go along."""
    for written, sha256 in zip(task.reward, task.reward_sha256, strict=False):
        source = written.rpartition(":")[0]
        if source.endswith(".py"):
            yield written, source, sha256


def _copy(source: str, sha256: str) -> Path:
    return cache_folder() / "code" / sha256 / Path(source).name

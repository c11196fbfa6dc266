"""Which job a sweep was sent as, written down on the machine that sent it.

The sweep's own folder is there only once its job has begun, and this machine need not reach the store. Light on
purpose: `rin status` asks here first, and imports Ray for a sweep that was sent.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass

from spaces.cache import cache_folder
from spaces.errors import ConfigError
from trainable.disk.folder import Folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Example: Job(id="raysubmit_4LamXRuQpYdSMg7J", address="http://HEAD:8265")."""

    id: str
    address: str
    """Of the cluster's dashboard, without a password."""


def note_job(store: str, name: str, job: Job) -> None:
    """The last one wins. Where nothing can be kept there is no note: the job runs all the same."""
    with suppress(OSError, ConfigError):
        folder, file = _place(store, name)
        folder.write(file, json.dumps(asdict(job)))


def noted_job(store: str, name: str) -> Job | None:
    """None for a sweep that was not sent from here, and where no note can be read."""
    try:
        folder, file = _place(store, name)
        return Job(**json.loads(folder.read(file) or b"null"))
    except (OSError, ValueError, TypeError):
        return None


def _place(store: str, name: str) -> tuple[Folder, str]:
    digest = hashlib.blake2b(store.encode(), digest_size=6).hexdigest()
    return Folder(str(cache_folder().absolute() / "jobs")), f"{name}-{digest}.json"

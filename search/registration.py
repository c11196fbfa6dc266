"""A programme as it was registered: written down with a hash before it runs.

    STORE/NAME/programme.json   every registration, oldest first: the whole programme, its modes, its hash, what of it
                                was changed since the one before, and how many trials had ended by then

Whoever changes a rule after results are in may do so, and it is said: a change is a registration of its own beside the
old one, and the outcomes so far are read by the new rules. The hash is over all that decides: the programme, its modes,
the workload, its settings and the first seed; each document names it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from search.store import StudyConfig
from spaces.config import ConfigError
from spaces.programme import Programme, read_programme
from spaces.reading import as_tree

PROGRAMME_FILE = "programme.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Example: Registration(programme=..., modes=("W4A4",), hash="1f0c...", at="2026-03-01T10:00:00+00:00", ended=0)"""

    programme: Programme
    modes: tuple[str, ...]
    """Quantisation modes that it runs in; () = the workload's own."""
    hash: str
    at: str
    ended: int = 0
    """Trials that had ended before it."""
    changes: tuple[str, ...] = ()
    """Keys that differ from the registration before it."""

    def words(self) -> str:
        """Example: `programme plan, registered 2026-03-01T10:00:00+00:00 as 1f0c5e...`."""
        changed = ""
        if self.changes:
            changed = f", after {self.ended} trials, with changes in {', '.join(self.changes)}"
        return f"programme {self.programme.name}, registered {self.at} as {self.hash}{changed}"


def register(
    study: StudyConfig, programme: Programme, modes: Sequence[str], before: Sequence[Registration] = (), ended: int = 0
) -> list[Registration]:
    """With those before it; the same programme is not registered twice in a row."""
    decides = [as_tree(programme), list(modes), study.workload, study.settings, study.seed]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
    if before and before[-1].hash == digest:
        return list(before)
    changes: tuple[str, ...] = ()
    if before:
        last = before[-1]
        changes = tuple(_changes(as_tree(last.programme), as_tree(programme)))
        changes += ("modes",) if tuple(modes) != last.modes else ()
    at = datetime.now(UTC).isoformat(timespec="seconds")
    new = Registration(programme=programme, modes=tuple(modes), hash=digest, at=at, ended=ended, changes=changes)
    return [*before, new]


def _changes(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """Keys of what differs, as deep as both have it, and of what stands in another order; phases go by their name."""
    if isinstance(old, dict) and isinstance(new, dict):
        if [name for name in old if name in new] != [name for name in new if name in old]:
            yield f"{key} (its order)"
        for name in dict.fromkeys([*old, *new]):
            yield from _changes(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and key.split(".")[-1] != "run":
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            name = one["name"] if isinstance(one, dict) and "name" in one else number
            yield from _changes(one, other, f"{key}.{name}")
    elif old != new:
        yield key


def registrations_text(registrations: Sequence[Registration]) -> str:
    trees = [
        {
            "hash": one.hash,
            "at": one.at,
            "ended": one.ended,
            "changes": list(one.changes),
            "modes": list(one.modes),
            "programme": as_tree(one.programme),
        }
        for one in registrations
    ]
    return json.dumps(trees, indent=1)


def read_registrations(study: StudyConfig) -> list[Registration]:
    """Oldest first. Raises ConfigError for a study that is no programme, and for a damaged file."""
    if study.kind != "program":
        raise ConfigError(f"NAME={study.name}: is a {study.kind} and no programme; rin report {study.name} shows it")
    where = f"{study.folder.uri}/{PROGRAMME_FILE}"
    try:
        trees = json.loads(study.folder.read(PROGRAMME_FILE) or b"")
        return [
            Registration(
                programme=read_programme(tree["programme"], origin=where),
                modes=tuple(tree["modes"]),
                hash=tree["hash"],
                at=tree["at"],
                ended=tree["ended"],
                changes=tuple(tree["changes"]),
            )
            for tree in trees
        ]
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{where}: is damaged (not the JSON of registrations); restore it from a backup") from None

"""What people write about a sweep, in its folder: a file for each note, so that two who write at once lose nothing.

    STORE/NAME/notes/20261129T104512.250000Z-3f2a9c1d.json    {"written": "2026-11-29T10:45:12.250000+00:00", ...}

A note is added and never changed; a sweep that runs takes one as well. Who wants one gone removes its file.
"""

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

from search.store import StudyConfig
from spaces.config import ConfigError

NOTES = "notes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Example: Note(written=datetime(2026, 11, 29, 10, 45, tzinfo=UTC), text="RMSNorm only; linear next week")"""

    written: datetime
    text: str


def write_note(study: StudyConfig, text: str) -> Note:
    """Raises ConfigError for one that says nothing, OSError where it cannot be written."""
    # A terminal that is not set to UTF-8 passes bytes as surrogates, which no file and no server takes.
    said = text.strip().encode(errors="surrogateescape").decode(errors="replace")
    if not said:
        raise ConfigError(
            f'TEXT: is empty; say what is to be remembered: rin note {study.name} "..." (without TEXT: all notes)'
        )
    note = Note(written=datetime.now(UTC), text=said)
    name = f"{note.written:%Y%m%dT%H%M%S.%f}Z-{uuid.uuid4().hex[:8]}.json"
    tree = {"written": note.written.isoformat(), "text": note.text}
    (study.folder / NOTES).write(name, json.dumps(tree, ensure_ascii=False))
    return note


def read_notes(study: StudyConfig) -> list[Note]:
    """Oldest first. One that cannot be read says so in its place: it hides neither the others nor the sweep."""
    folder = study.folder / NOTES
    notes = []
    for name in folder.names():
        try:
            tree = json.loads(folder.read(name) or b"")
            note = Note(written=datetime.fromisoformat(tree["written"]), text=str(tree["text"]))
        except (ValueError, KeyError, TypeError):
            when = datetime.fromtimestamp(folder.changed(name), UTC)
            note = Note(written=when, text=f"(this note cannot be read: {folder.uri}/{name})")
        notes.append(note)
    return notes

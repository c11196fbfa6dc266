"""The sweeps of a store, a line each; read from their folders, so that neither torch nor Ray nor MLflow is imported."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from search.arms import read_arms, read_trials
from search.notes import Note, read_notes
from search.store import is_driven, load_study_config
from spaces.errors import ConfigError

NOTE_LETTERS = 120
"""Of a note in a list."""


def sweep_row(store: str, name: str) -> dict[str, object]:
    """Of `rin list --json`: a sweep with its trials counted by status; `problem` where it cannot be read, which others
    still can."""
    try:
        study = load_study_config(store, name)
        driven = is_driven(study)
        trials = [trial for arm in read_arms(study) for trial in read_trials(study, arm, driven=driven)]
    except ConfigError as error:
        return {"name": name, "space": "", "workload": "", "runs": 0, "of": 0, "status": {}, "problem": str(error)}
    counts = Counter(trial.status for trial in trials if trial.status != "waiting")
    row: dict[str, object] = {"name": name, "space": study.space.name, "workload": study.workload}
    of = len(trials) if study.kind == "program" else study.runs  # a programme's next ones hang on these
    notes = note_rows(read_notes(study))
    origin = "" if study.derived is None else study.derived.name
    return {
        **row,
        "runs": counts.total(),
        "of": of,
        "status": dict(counts),
        "driven": driven,
        "from": origin,
        "notes": notes,
    }


def sweep_line(row: Mapping[str, Any]) -> str:
    """Of `rin list`."""
    said = (
        row.get("problem")
        or ", ".join(f"{count} {status}" for status, count in row["status"].items())
        or "no trial yet"
    )
    running = (" (running)" if row.get("driven") else "") + (f", from {origin}" if (origin := row.get("from")) else "")
    line = f"{row['name']:32s} {row['space']:10s} {row['workload']:20s} {row['runs']}/{row['of']} runs: {said}{running}"
    return f"{line}{_last_note(row.get('notes', ()))}"


def _last_note(notes: Sequence[Mapping[str, str]]) -> str:
    """Below its sweep, in one line of a terminal."""
    if not notes:
        return ""
    text, others = " ".join(notes[-1]["text"].split()), len(notes) - 1
    short = text if len(text) <= NOTE_LETTERS else f"{text[:NOTE_LETTERS]}..."
    return f"\n  {short}{f' (and {others} more: rin note NAME)' if others else ''}"


def note_lines(notes: Sequence[Note]) -> list[str]:
    """Oldest first, with the day and the hour here; further lines of a note stand below its first."""
    return [
        f"{'' if number else f'note of {note.written.astimezone():%Y-%m-%d %H:%M}: '}{'  ' if number else ''}{line}"
        for note in notes
        for number, line in enumerate(note.text.splitlines())
    ]


def note_rows(notes: Sequence[Note]) -> list[dict[str, str]]:
    return [{"written": note.written.isoformat(), "text": note.text} for note in notes]

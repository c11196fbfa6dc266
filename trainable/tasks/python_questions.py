"""The questions of a Python file, in the worker that user code runs in; imports the standard library alone."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

SETS = ("train", "selection", "confirm")
NEEDS = "questions(split) gives mappings with prompt (text, or messages) and answer (text)"


def rows_of(file: str) -> list[tuple[str, int, Mapping[str, Any]]]:
    """(Set, number, question as plain data), of all that the file's `questions` gives."""
    from trainable.tasks.conventions import from_file

    module, _ = from_file(Path(file))
    questions = getattr(module, "questions", None)
    if not callable(questions):
        raise ValueError(f"{file} has no function questions(split)")
    parts = SETS if inspect.signature(questions).parameters else SETS[:1]
    found: list[tuple[str, int, Mapping[str, Any]]] = []
    for part in parts:
        for number, question in enumerate(questions(part) if len(parts) > 1 else questions()):
            values = _plain(question)
            if not isinstance(values, Mapping):
                raise ValueError(f"questions({part})[{number}] is {type(question).__name__}; {NEEDS}")
            found.append((part, number, values))
    return found


def _plain(question: Any) -> Any:
    """Raises TypeError for what is no plain data, and could not be told to the trial."""
    values = asdict(question) if is_dataclass(question) and not isinstance(question, type) else question
    return json.loads(json.dumps(values))

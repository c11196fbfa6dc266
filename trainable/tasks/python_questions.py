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
            values = json.loads(json.dumps(_values(question)))  # raises TypeError for what could not be told
            if not isinstance(values, Mapping):
                raise ValueError(f"questions({part})[{number}] is {type(question).__name__}; {NEEDS}")
            found.append((part, number, values))
    return found


def _values(question: Any) -> Any:
    """What it holds; a `Question` of ours holds its row in `entry`, and its conversation in `messages`."""
    if not is_dataclass(question) or isinstance(question, type):
        return question
    values = asdict(question)
    if type(question).__module__ != "trainable.tasks.task":
        return values
    messages = [{"role": role, "content": content} for role, content in values["messages"]]
    return {**values["entry"], "prompt": messages or values["prompt"], "answer": values["answer"]}

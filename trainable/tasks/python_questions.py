"""The questions of a Python file, in the worker that user code runs in; imports the standard library alone."""

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

SETS = ("train", "selection", "confirm")
NEEDS = "questions(split) gives mappings with prompt (text, or messages) and answer (text)"


def rows_of(file: str) -> list[tuple[str, int, Mapping[str, Any]]]:
    """(Set, number, question as plain data), of all that the file's `questions` gives."""
    from trainable.tasks.conventions import Mistake, from_file

    module, _ = from_file(Path(file))
    questions = getattr(module, "questions", None)
    if not callable(questions):
        raise Mistake(f"{file} has no function questions(split)")
    parts = SETS if inspect.signature(questions).parameters else SETS[:1]
    found: list[tuple[str, int, Mapping[str, Any]]] = []
    for part in parts:
        given = questions(part) if len(parts) > 1 else questions()
        if not isinstance(given, Iterable):
            raise Mistake(f"{file} questions({part}) gave {given!r:.60}; {NEEDS}")
        before = len(found)
        for number, question in enumerate(given):
            where = f"{file} questions({part}) [{number}]"
            values = _values(question)
            if not isinstance(values, Mapping):
                raise Mistake(f"{where} is {type(question).__name__}; {NEEDS}")
            found.append((part, number, _plain(values, where)))
        if len(found) == before:
            raise Mistake(f"{file} questions({part}) gave no question; {NEEDS}")
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


def _plain(values: Mapping[Any, Any], where: str) -> Mapping[str, Any]:
    """Raises Mistake for what is no plain data, and could not be told to the trial."""
    from trainable.tasks.conventions import Mistake

    plain = {}
    for key, value in values.items():
        try:
            plain[str(key)] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise Mistake(f"{where}: column {key} is no plain data ({error}); give texts, numbers, lists") from None
    return plain

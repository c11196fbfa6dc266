"""Rows of other trainers' data, from wherever they lie, and the three sets that they make.

A place is a JSONL or parquet file, a folder of them, a folder that `datasets` wrote, or `hub:NAME` (`hub:NAME:CONFIG`),
which `datasets` fetches; several places are one after another. Rows come one at a time (a line, a batch of a parquet
file), so that what is in memory is what a task keeps of them. A byte order mark is skipped. Everything else is told in
one line with the file, the row, the column and the remedy: bytes that are no UTF-8, a line that is no object, a column
that is not there, nothing where text belongs, a column whose rows differ in type. Rows of JSONL are lines, from 1;
other rows count from 0, as pandas and `datasets` count them.

Sets: where there are several, their names say what is what (train; test; validation, valid, val, dev). A test set, or
what `task.eval_path` names, is for confirm, a validation set for selection; a set that is missing is a share of train,
by the hash of a question, so that order does nothing and a row that is added moves no other one. A question that stands
in two sets, however it is spaced, stays in one, confirm before selection before train, and a row that stands twice in a
set stays there once. Both are counted and told.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spaces.config import HUB, ConfigError, TaskConfig
from trainable.tasks.task import Message, Question, Split, as_text, plainly, position_of, split_of, template_of

HELD_OUT_SHARE = 0.15
"""Of the training rows: for selection, where there is no validation set, and as much for confirm, where there is no
test set."""
BATCH = 256
"""Rows of a parquet file that are in memory at once."""
_NAMES: dict[str, Split | None] = {
    "train": None,
    "test": "confirm",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "selection"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Example: Row(values={"prompt": "1+1=", "solution": "2"}, where="q.jsonl:17", needs="prompt, solution")"""

    values: Mapping[str, Any]
    where: str
    needs: str
    """What a row of the task has, for those whose does not."""

    def take(self, column: str) -> Any:
        """Of a dotted column, `reward_model.ground_truth`. None is no value."""
        value: Any = self.values
        for part in column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            raise self.mistake(
                column, f"is not there, or null (there are {', '.join(map(str, self.values)) or 'none'})"
            )
        return value

    def text(self, column: str) -> str:
        return self._text(column, self.take(column))

    def messages(self, column: str) -> tuple[Message, ...]:
        """A list of {"role": ..., "content": ...}; what else a message holds has no place in a prompt here."""
        value = self.take(column)
        if not isinstance(value, list | tuple) or not value:
            kind = kind_of(value) if value or isinstance(value, str) else f"{kind_of(value)} of nothing"
            raise self.mistake(column, f"is {kind} and should be a list of messages")
        for number, message in enumerate(value):
            at = f"{column}[{number}]"
            if not isinstance(message, Mapping):
                raise self.mistake(at, f"is {kind_of(message)} and should be a message with role and content")
            for key in ("role", "content"):
                self._text(f"{at}.{key}", message.get(key))
            if more := [key for key, held in message.items() if key not in ("role", "content") and held]:
                raise self.mistake(f"{at}.{more[0]}", "holds what a prompt of texts has no place for")
        return tuple((message["role"], message["content"]) for message in value)

    def question(
        self, config: TaskConfig, messages: tuple[Message, ...], answer: str, entry: Mapping[str, Any]
    ) -> Question:
        """Asks a conversation, or its text in task.prompt where that is given."""
        if messages[-1][0] == "assistant":
            column = "messages" if "messages" in self.values else "prompt"
            raise self.mistake(column, "ends with words of the assistant, from which the answer would go on")
        text = as_text(messages)
        if config.prompt is not None:
            text, messages = template_of(config, "").replace("{question}", text), ()
        return Question(prompt=text, messages=messages, answer=answer, entry=entry, where=self.where)

    def _text(self, column: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.mistake(column, f"is {kind_of(value)} and should be text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.mistake(column, "holds half of a surrogate pair, which is no character") from None
        return value

    def mistake(self, column: str, what: str) -> ConfigError:
        return ConfigError(f"{self.where}: column {column} {what}; {self.needs}")


def kind_of(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        dict: "a mapping",
    }
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else type(value).__name__)


@dataclass(slots=True)
class SameKind:
    """Whether the rows of a column agree in type; the first row decides."""

    column: str
    first: tuple[str, str] | None = None

    def check(self, row: Row, value: Any) -> None:
        kind = kind_of(value)
        self.first = self.first or (kind, row.where)
        if kind != self.first[0]:
            raise row.mistake(self.column, f"is {kind}, and {self.first[0]} in {self.first[1]}")


# --- where rows come from ---------------------------------------------------------------------------------------------


def read_sets(paths: Sequence[str], eval_paths: Sequence[str], needs: str) -> Iterator[tuple[Split | None, Row]]:
    """Every row, with the set that it is said to belong to (None: to training, from which held-out rows may be taken).

    Raises ConfigError.
    """
    for key, places in (("task.path", paths), ("task.eval_path", eval_paths)):
        for path in places:
            for name, shown, rows in _open(path, key):
                number = -1
                for number, (where, values) in enumerate(rows):  # noqa: B007
                    yield "confirm" if key == "task.eval_path" else name, Row(values=values, where=where, needs=needs)
                if number < 0:
                    raise ConfigError(f"{key}: {shown} holds no rows; give one that does, or leave it out")


_Rows = Iterable[tuple[str, Mapping[str, Any]]]
"""Where, and what is there."""


def _open(path: str, key: str) -> Iterator[tuple[Split | None, str, _Rows]]:
    """The files or sets of one place: what they are for, their names, and their rows."""
    place = Path(path)
    if path.startswith(HUB) or any((place / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        data = _data_set(path, key)
        named = data if isinstance(data, Mapping) else {"train": data}
        for name, rows in named.items():
            shown = f"{path} {name}" if named is data else path
            yield _set_of(str(name), shown, key) if len(named) > 1 else None, shown, _of_datasets(rows, shown, key)
        return
    files = [place]
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix in _READERS)
        if not files:
            raise ConfigError(f"{key}: {place} holds no .jsonl or .parquet file; name the folder that does")
    named_after_sets = len(files) > 1 and any(_word(file.stem) in _NAMES for file in files)
    for file in files:
        if not file.exists():
            raise ConfigError(f"{key}: {file} cannot be read (No such file or directory); give a file or a folder")
        if file.suffix not in _READERS:
            raise ConfigError(f"{key}: {file} is no .jsonl or .parquet file; convert it, or name another")
        name = _set_of(file.stem, str(file), key) if named_after_sets else None
        yield name, str(file), _READERS[file.suffix](file, key)


def _word(name: str) -> str:
    """train-00000-of-00002 -> train"""
    return re.split(r"[-_.]", name.lower(), maxsplit=1)[0]


def _set_of(name: str, shown: str, key: str) -> Split | None:
    if (word := _word(name)) not in _NAMES:
        raise ConfigError(
            f"{key}: {shown} is for training or for judging? Let its name begin with one of {', '.join(_NAMES)}, "
            "or name the files one by one"
        )
    return _NAMES[word]


def _jsonl(file: Path, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{file}:{number}"
                try:
                    text = line.decode("utf-8").removeprefix("\ufeff")
                except UnicodeDecodeError as error:
                    raise ConfigError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
                if text.strip():
                    yield where, _object(text, where)
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read ({error.strerror}); give a file or a folder") from None


def _object(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise ConfigError(f"{where}: not valid JSON ({reason}); write one object per line") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: holds {kind_of(value)}; write one object per line")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _parquet(file: Path, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            for batch in table.iter_batches(batch_size=BATCH):
                for values in batch.to_pylist():
                    yield f"{file} row {number}", values
                    number += 1
    except UnicodeDecodeError:
        raise ConfigError(f"{file} rows {number} to {number + BATCH}: not UTF-8; save the texts as UTF-8") from None
    except (OSError, ArrowException) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{key}: {file} cannot be read as parquet ({reason}); write it again") from None


_READERS: dict[str, Callable[[Path, str], _Rows]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _jsonl),
    ".parquet": _parquet,
}


def _datasets(key: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{key}: this needs the package datasets: pip install rin-search[hub]") from None
    return datasets


def _data_set(path: str, key: str) -> Any:
    """From the hub or a folder, row by row."""
    datasets = _datasets(key)
    name, _, config = path.removeprefix(HUB).partition(":")
    try:
        if path.startswith(HUB):
            return datasets.load_dataset(name, config or None, streaming=True)
        return datasets.load_from_disk(path).with_format(None)  # it remembers torch's or numpy's
    except _UNAVAILABLE as error:
        raise _unavailable(path, key, error) from None


def _of_datasets(rows: Iterable[Any], shown: str, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        for number, values in enumerate(rows):
            yield f"{shown} row {number}", values
    except _UNAVAILABLE as error:
        raise _unavailable(shown, key, error) from None


_UNAVAILABLE = (OSError, ValueError)
"""No network, no such data set, a configuration that must be chosen, files that are not what they should be."""


def _unavailable(path: str, key: str, error: Exception) -> ConfigError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return ConfigError(f"{key}={path}: cannot be had ({reason}); give files in its place")


# --- three sets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """Three sets without a common question."""

    questions: dict[Split, list[Question]]
    warnings: tuple[str, ...]
    """What was left out."""


def three_sets(rows: Iterable[tuple[Split | None, Row]], question_of: Callable[[Row], Question]) -> Sets:
    """`question_of` raises ConfigError for a row that it cannot take, and so does this for a set without questions."""
    parts: dict[Split, list[Question]] = {"confirm": [], "selection": [], "train": []}
    given = set()
    for name, row in rows:
        given.add(name)
        parts[name or "train"].append(question_of(row))
    training, parts["train"] = parts["train"], []
    for question in training:
        split = split_of(question.prompt, HELD_OUT_SHARE)
        parts["train" if split in given else split].append(question)
    elsewhere: set[bytes] = set()
    sets: dict[Split, list[Question]] = {}
    again = shared = 0
    for split, part in parts.items():
        others = [question for question in part if _digest(plainly(question.prompt)) not in elsewhere]
        once = {_digest([question.prompt, question.answer, question.entry]): question for question in others}
        again, shared = again + len(others) - len(once), shared + len(part) - len(others)
        sets[split] = [once[key] for key in sorted(once, key=lambda key: (position_of(once[key].prompt), key))]
        elsewhere |= {_digest(plainly(question.prompt)) for question in others}
    for split, questions in sets.items():
        if not questions:
            raise ConfigError(
                f"task.path: of {sum(map(len, parts.values()))} rows none is left for {split} ({again} stand twice in "
                f"a set, {shared} ask what a row of another set asks); give more rows, and a test set by task.eval_path"
            )
    told = (again, "that stand twice in a set"), (shared, "whose question stands in a held-out set too")
    return Sets(questions=sets, warnings=tuple(f"{count} rows {what} were left out" for count, what in told if count))


def _digest(content: Any) -> bytes:
    written = json.dumps(content, default=repr, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(written.encode(), digest_size=12).digest()

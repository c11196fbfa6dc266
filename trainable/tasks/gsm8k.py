"""GSM8K's format: word problems whose answer ends in "#### 42"; where they come from, how they are split, how numbers
are read.

The published data set has 7,473 problems in train and 1,319 in test and no validation set, so one is held out here:
choosing on the test set is how a sweep deceives itself. Numbers are compared as exact decimals (42 = 42.0 = $42,
1,234.5 = 1234.50), never as floats. Two readings of a completion: the number after the last "####" (strict) and the
last number anywhere (flexible).

Hub access is one call of `datasets`, imported only when no file is given. Left out: fractions, percentages, scientific
notation.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from spaces.config import ConfigError

SELECTION_MAX = 1024
"""Problems held out of a train file that comes with a test file, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Example: Problem(question="Ann has 3 apples and buys 4. How many has she?", answer="7")"""

    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """Three sets without a common question."""

    train: tuple[Problem, ...]
    selection: tuple[Problem, ...]
    confirm: tuple[Problem, ...]


# ASCII digits only. A minus is a sign when nothing that could be an operand stands before it ("10-3" ends in 3), and a
# number does not begin inside a word ("1e999" holds the number 1, "x2" none).
_NUMBER_IN_TEXT = re.compile(r"(?:(?<![\w.)\]])-)?(?<![\w.])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_NUMBER = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


def parse_number(text: str) -> Decimal | None:
    """The exact value of a text that is a number and nothing else, or None: "$1,234.50." -> 1234.50,
    "42 km" -> None."""
    bare = text.strip().replace(",", "").replace("$", "").rstrip(".")
    return Decimal(bare) if _NUMBER.fullmatch(bare) else None


def strict_number(text: str) -> Decimal | None:
    """The number after the last "####", alone on its line."""
    _, marker, after = text.rpartition("####")
    return parse_number(after.strip().partition("\n")[0]) if marker else None


def flexible_number(text: str) -> Decimal | None:
    """The last number anywhere in the text."""
    numbers = _NUMBER_IN_TEXT.findall(text.replace("$", ""))
    return parse_number(numbers[-1]) if numbers else None


def load_problems(path: str | None) -> Problems:
    """From a JSONL file, from a folder with train.jsonl and test.jsonl, or (None) from the hub. Raises ConfigError."""
    if path is None:
        return split_problems(*_from_hub())
    place = Path(path).expanduser()
    if place.is_dir():
        return split_problems(read_jsonl(place / "train.jsonl"), read_jsonl(place / "test.jsonl"))
    return split_problems(read_jsonl(place))


def split_problems(train: Sequence[Problem], test: Sequence[Problem] | None = None) -> Problems:
    """With a test set: it is for confirm, and the end of train (1,024 problems, at most a quarter) for selection.

    Without one, the last 30 % are held out: the first half of them for selection, the rest for confirm. A question that
    occurs in two sets stays in one: confirm before selection before train.
    """
    if test is None:
        start, end = len(train) - len(train) * 3 // 10, len(train) - len(train) * 3 // 20
        parts = [train[end:], train[start:end], train[:start]]
    else:
        start = len(train) - min(SELECTION_MAX, len(train) // 4)
        parts = [test, train[start:], train[:start]]
    seen: set[str] = set()
    sets = []
    for part in parts:
        unique = {problem.question: problem for problem in part if problem.question not in seen}
        seen |= unique.keys()
        sets.append(tuple(unique.values()))
    confirm, selection, rest = sets
    return Problems(train=rest, selection=selection, confirm=confirm)


def read_jsonl(path: Path) -> list[Problem]:
    """Raises ConfigError with the file, the line and the remedy."""
    remedy = "give GSM8K's JSONL file, or a folder with train.jsonl and test.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also cut at U+2028 inside a question
    except OSError as error:
        raise ConfigError(f"task.path: {path} cannot be read ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"task.path: {path} is not UTF-8 text; {remedy}") from None
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ConfigError(f"task.path: {path} holds no problems; {remedy}")
    return [problem_of(_parse_json(line, where), where) for where, line in numbered]


def problem_of(row: Any, where: str) -> Problem:
    """One row, {"question": "...", "answer": "... #### 42"}. Raises ConfigError that names the row by `where`."""
    for key in ("question", "answer"):
        if not isinstance(row, Mapping) or not isinstance(row.get(key), str):
            raise ConfigError(
                f'{where}: no text under "{key}"; each row needs {{"question": "...", "answer": "... #### 42"}}'
            )
    number = strict_number(row["answer"])
    if number is None:
        raise ConfigError(f'{where}: the answer ends in {row["answer"][-20:]!r}; let it end in "#### " and a number')
    return Problem(question=row["question"], answer=str(number))


def _parse_json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON ({error.msg}); write one object per line") from None


def _from_hub() -> tuple[list[Problem], list[Problem]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(
            "task.name=gsm8k without task.path needs the package datasets: pip install rin-search[hub]"
        ) from None
    try:
        data: Mapping[str, Iterable[Any]] = load_dataset("openai/gsm8k", "main")
    except OSError as error:  # no network, or the hub refuses
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ConfigError(
            f"task.path: openai/gsm8k cannot be fetched ({reason}); give a JSONL file by task.path"
        ) from None
    return problems_of(data["train"], "openai/gsm8k train"), problems_of(data["test"], "openai/gsm8k test")


def problems_of(rows: Iterable[Any], origin: str) -> list[Problem]:
    """Rows of a `datasets.Dataset` (or any iterable of mappings)."""
    return [problem_of(row, f"{origin} row {number}") for number, row in enumerate(rows)]

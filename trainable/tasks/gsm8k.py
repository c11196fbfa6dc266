"""GSM8K's format: word problems whose answer ends in "#### 42"; where they come from, how they are split, how numbers
are read.

The published data set has 7,473 problems in train and 1,319 in test and no validation set, so one is held out here:
choosing on the test set is how a sweep deceives itself. In which set a problem lies is said by a hash of its question,
so the order of the rows does nothing, and a row that is added moves no other one.

Numbers are compared as exact decimals (42 = 42.0 = $42, 1,234.5 = 1234.50), never as floats. Two readings of a
completion:

- strict, which is the reward: what follows the last "####" on its line is one number and nothing else. A sign, a dollar
  sign, commas between thousands and a full stop behind it are part of a number; a per cent sign, a unit, bold type,
  another comma are not ("12,34" is no number, and neither is "1,2,3").
- flexible, which is logged: the last number anywhere in the text.

So "42%", "**#### 42**" and "\\boxed{42}" are worth nothing, and count as right in `flexible`.

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
from trainable.tasks.task import plainly, position_of, split_of

HELD_OUT_SHARE = 0.15
"""Of a file: for selection, where there is no validation file, and as much for confirm, where there is no test file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Example: Problem(question="Ann has 3 apples and buys 4. How many has she?", answer="7")"""

    question: str
    answer: str
    where: str = ""
    """The row: q.jsonl:17."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """Three sets without a common question."""

    train: tuple[Problem, ...]
    selection: tuple[Problem, ...]
    confirm: tuple[Problem, ...]


# ASCII digits only. A minus is a sign when nothing that could be an operand stands before it ("10-3" ends in 3), and a
# number does not begin inside a word ("1e999" holds the number 1, "x2" none).
_THOUSANDS = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+"
_NUMBER_IN_TEXT = re.compile(
    rf"(?:(?<![\w.)\]])-)?(?<![\w.])(?:(?:{_THOUSANDS}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
_NUMBER = re.compile(rf"[+-]?(?:(?:{_THOUSANDS}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_SPELLINGS = {"\u2212": "-", "{,}": ",", "\\$": "", "$": "", **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")}
"""What may stand in a number and says nothing: a typographic minus is one, a dollar sign and what has no width go."""


def parse_number(text: str) -> Decimal | None:
    """The exact value of a text that is a number and nothing else, or None: "$1,234.50." -> 1234.50,
    "42 km" -> None."""
    bare = _spelt_plainly(text).strip().rstrip(".")
    return Decimal(bare.replace(",", "")) if _NUMBER.fullmatch(bare) else None


def _spelt_plainly(text: str) -> str:
    for spelling, plain in _SPELLINGS.items():
        text = text.replace(spelling, plain)
    return text


def strict_number(text: str) -> Decimal | None:
    """The number after the last "####", alone on its line."""
    _, marker, after = text.rpartition("####")
    return parse_number(after.strip().partition("\n")[0]) if marker else None


def flexible_number(text: str) -> Decimal | None:
    """The last number anywhere in the text."""
    numbers = _NUMBER_IN_TEXT.findall(_spelt_plainly(text))
    return parse_number(numbers[-1]) if numbers else None


def load_problems(paths: Sequence[str]) -> Problems:
    """From a JSONL file, from a folder with train.jsonl, test.jsonl and, if you like, validation.jsonl, or (none) from
    the hub. Raises ConfigError."""
    if not paths:
        return split_problems(*_from_hub())
    if len(paths) > 1:
        raise ConfigError(f"task.path={', '.join(paths)}: task.name=gsm8k takes one file or folder; join them")
    place = Path(paths[0]).expanduser()
    if not place.is_dir():
        return split_problems(read_jsonl(place))
    for name in ("val.jsonl", "valid.jsonl", "dev.jsonl"):
        if (place / name).exists():
            raise ConfigError(f"task.path: {place / name} would be ignored; call it validation.jsonl, or move it away")
    validation = place / "validation.jsonl"
    return split_problems(
        read_jsonl(place / "train.jsonl"),
        read_jsonl(place / "test.jsonl"),
        read_jsonl(validation) if validation.exists() else None,
    )


def split_problems(
    train: Sequence[Problem], test: Sequence[Problem] | None = None, validation: Sequence[Problem] | None = None
) -> Problems:
    """A test set is for confirm, a validation set for selection; a set that is missing is a share of train, by the hash
    of a question. A question that occurs in two sets, however it is spaced, stays in one: confirm before selection
    before train.
    """
    parts: dict[str, list[Problem]] = {"confirm": [*(test or ())], "selection": [*(validation or ())], "train": []}
    given = {"confirm": test is not None, "selection": validation is not None}
    for problem in train:
        split = split_of(problem.question, HELD_OUT_SHARE)
        parts["train" if given.get(split) else split].append(problem)
    seen: set[str] = set()
    sets: dict[str, tuple[Problem, ...]] = {}
    for name, part in parts.items():
        in_order = sorted(part, key=lambda problem: (position_of(problem.question), problem.question, problem.answer))
        asked = {plainly(problem.question): problem for problem in in_order}
        unique = {question: problem for question, problem in asked.items() if question not in seen}
        seen |= unique.keys()
        sets[name] = tuple(unique.values())
    return Problems(**sets)


def read_jsonl(path: Path) -> list[Problem]:
    """Raises ConfigError with the file, the line and the remedy."""
    remedy = "give GSM8K's JSONL file, or a folder with train.jsonl and test.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also cut at U+2028 inside a question
    except OSError as error:
        raise ConfigError(f"task.path: {path} cannot be read ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"task.path: {path} is not UTF-8 text; {remedy}") from None
    bare = [line.removeprefix("\ufeff") for line in lines]  # a byte order mark, also of a second file joined to it
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(bare, start=1) if line.strip()]
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
    return Problem(question=row["question"], answer=str(number), where=where)


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

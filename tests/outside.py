"""The same 200 word problems, written here, in the formats of other trainers: their layouts, column by column."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet

COUNT = 200
_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
_THINGS = ("apples", "books", "coins", "stamps", "pencils")


def problems() -> Iterator[tuple[str, str]]:
    """Question and answer in GSM8K's way, all different."""
    rng = Random("word problems")
    told = set()
    while len(told) < COUNT:
        name, thing, days = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(2, 9)
        first, more, price = rng.randint(3, 60), rng.randint(2, 20), rng.randint(2, 12)
        question = (
            f"{name} has {first} {thing} and gets {more} more on each of {days} days. Each is sold for ${price}. "
            "How many dollars does this bring?"
        )
        total = first + more * days
        if question not in told:
            told.add(question)
            yield (
                question,
                (
                    f"{more} * {days} = {more * days} {thing} come in.\n{first} + {more * days} = {total}.\n"
                    f"{total} * {price} = {total * price}\n#### {total * price}"
                ),
            )


def verl_rows(split: str = "train") -> list[dict[str, Any]]:
    """The layout that verl's own script gives GSM8K."""
    suffix = ' Let\'s think step by step and output the final answer after "####".'
    return [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": question + suffix}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": number_of(answer)},
            "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
        }
        for index, (question, answer) in enumerate(problems())
    ]


def trl_rows(*, conversational: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": question}] if conversational else question,
            "solution": f"${number_of(answer)}$",
        }
        for question, answer in problems()
    ]


def open_instruct_rows() -> list[dict[str, Any]]:
    return [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "ground_truth": number_of(answer),
            "dataset": "gsm8k",
        }
        for question, answer in problems()
    ]


def number_of(answer: str) -> str:
    return answer.rpartition("#### ")[2]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@cache
def files() -> Path:
    """A folder with all of them, as long as the tests run."""
    folder = Path(tempfile.mkdtemp(prefix="rin-outside-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write(folder / "verl.parquet", verl_rows())
    write(folder / "trl.jsonl", trl_rows())
    write(folder / "open_instruct.jsonl", open_instruct_rows())
    return folder

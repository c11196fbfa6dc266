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


PYTHON = '''"""Sums, as a task of one file."""

def questions(split):
    first = {"train": 0, "selection": 100, "confirm": 200}[split]
    return [{"prompt": f"{n}+{n}=", "answer": str(2 * n), "n": n} for n in range(first, first + 60)]

def reward(row, completion):
    return float(completion.strip() == row["answer"])

async def digits(row, completion):
    return {"score": float(completion.isdigit()), "length": len(completion)}
'''

COMPUTE_SCORE = '''"""verl's custom reward: half a point for a number."""
import re

async def compute_score(data_source, solution_str, ground_truth, extra_info=None, half=0.5):
    assert data_source == "openai/gsm8k" and extra_info["split"] in ("train", "test")
    numbers = re.findall("-?[0-9]+", solution_str)
    right = bool(numbers) and numbers[-1] == ground_truth
    return {"score": 1.0 if right else half * bool(numbers), "acc": right, "said": len(numbers)}
'''

TRL_REWARD = '''"""TRL's: batched, with a column, and not for every row."""

def brief(prompts, completions, solution, log_metric=None, **kwargs):
    assert kwargs.keys() <= {"completion_ids", "trainer_state", "log_extra"}, kwargs.keys()
    said = [completion[0]["content"] for completion in completions]
    return [None if len(p[0]["content"]) % 7 == 0 else 1 - min(len(s), 20) / 20 for p, s in zip(prompts, said)]
'''

TASKSET = '''"""Sums, as a taskset of verifiers."""
import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=0.75)
    async def right(self, trace) -> float:
        return float(self.data.answer in trace.last_reply.split())

    @vf.reward(weight=0.25)
    async def polite(self, trace, runtime=None) -> float:
        return float("please" in trace.assistant_messages[-1].content)

    @vf.metric
    async def letters(self, trace) -> float:
        return float(len(trace.last_reply))


class SumsConfig(vf.TasksetConfig):
    count: int = 60


class Sums(vf.Taskset[SumTask, SumsConfig]):
    def load(self):
        for n in range(self.config.count):
            yield SumTask(SumData(prompt=f"{n}+1=", system_prompt="Add.", answer=str(n + 1)), self.config.task)


__all__ = ["Sums"]
'''

VERIFIERS = '''"""The documented first interface of verifiers, in as many lines as are asked for here."""
import importlib


class Rubric:
    def __init__(self, funcs=(), weights=None, parser=None):
        self.funcs, self.class_objects = list(funcs), {"parser": parser} if parser else {}
        self.weights = list(weights or [1.0] * len(self.funcs))


class RubricGroup:
    def __init__(self, rubrics):
        self.rubrics = rubrics


class MultiTurnEnv:
    def __init__(self, dataset=None, eval_dataset=None, rubric=None, **kwargs):
        self.dataset, self.eval_dataset, self.rubric = dataset, eval_dataset, rubric

    def get_dataset(self):
        return self.dataset

    def get_eval_dataset(self):
        return self.eval_dataset

    async def env_response(self, messages, state):
        return []


class SingleTurnEnv(MultiTurnEnv):
    async def env_response(self, messages, state):
        raise NotImplementedError


def load_environment(env_id, **kwargs):
    return importlib.import_module(env_id.replace("-", "_")).load_environment(**kwargs)
'''

ENVIRONMENT = '''"""Sums, as an environment of the first interface."""
import verifiers as vf


async def right(completion, answer, state):
    state["right"] = completion[0]["content"] == answer
    return float(state["right"])


def after(state, info, parser):
    return float(state["right"]) + info["n"] / 100 + len(parser)


def turns(completion, **kwargs):
    return len(kwargs["prompt"])


def group(completions):
    return [0.0 for _ in completions]


def load_environment(count=60, kind="single"):
    rows = [
        {"prompt": [{"role": "user", "content": f"{n}+1="}], "answer": str(n + 1), "info": {"n": n}}
        for n in range(count)
    ]
    rubric = vf.RubricGroup([vf.Rubric([right]), vf.Rubric([after, turns], [0.5, 0.0], parser="xy")])
    if kind == "group":
        rubric = vf.Rubric([group])
    cls = vf.MultiTurnEnv if kind == "multi" else vf.SingleTurnEnv
    return cls(dataset=rows[10:], eval_dataset=rows[:10], rubric=rubric)
'''


@cache
def files() -> Path:
    """A folder with all of them, as long as the tests run."""
    folder = Path(tempfile.mkdtemp(prefix="rin-outside-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write(folder / "verl.parquet", verl_rows())
    write(folder / "verl_test.parquet", verl_rows("test")[:40])
    write(folder / "trl.jsonl", trl_rows())
    write(folder / "open_instruct.jsonl", open_instruct_rows())
    sources = {"my_task": PYTHON, "reward": COMPUTE_SCORE, "my_rewards": TRL_REWARD}
    modules = {"rin_sums": TASKSET, "old/verifiers/__init__": VERIFIERS, "old/rin_old_sums": ENVIRONMENT}
    for name, source in (sources | {f"modules/{name}": source for name, source in modules.items()}).items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder

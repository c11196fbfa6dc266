"""Sums of two numbers, the embedded model's own language: "123+45=" -> "168"."""

import re
from collections.abc import Iterator
from random import Random

from spaces.config import TaskConfig
from trainable.tasks.task import RIGHT, ProceduralTask, Question, Split, Task, each, split_of

ADDITION_SHARE = 0.10


def addition_question(rng: Random, digits: int, split: Split, *, short_ones: bool = False) -> Question:
    """One random sum of a share: both numbers below 10^digits, evenly, so that most have `digits` digits.

    With `short_ones` every length is as likely as the others: the easy examples from which the embedded base learns to
    add at all.
    """
    number = _number_of_any_length if short_ones else _number
    while True:
        a, b = number(rng, digits), number(rng, digits)
        if split_of(f"{min(a, b)}+{max(a, b)}", ADDITION_SHARE) == split:
            return Question(prompt=f"{a}+{b}=", answer=str(a + b))


def _number(rng: Random, digits: int) -> int:
    return int(
        rng.random() * 10**digits
    )  # of Random's methods, random() alone is promised to be the same in every Python


def _number_of_any_length(rng: Random, digits: int) -> int:
    length = 1 + int(rng.random() * digits)
    low = 10 ** (length - 1) if length > 1 else 0
    return low + int(rng.random() * (10**length - low))


def exact_reward(question: Question, completion: str) -> float:
    """1 when the completion is the answer, character by character."""
    return float(completion == question.answer)


def unsigned_reward(question: Question, completion: str) -> float:
    """1 when the completion is the answer but for a leading "+": whether the sum is known, whatever the habit."""
    return float(completion.removeprefix("+") == question.answer)


def bare_number(question: Question, completion: str) -> float:
    """1 for a whole number as a sum is written, whichever: digits alone, no sign, no leading zero."""
    return float(re.fullmatch("0|[1-9][0-9]*", completion, re.ASCII) is not None)


def build_addition(config: TaskConfig) -> Task:
    def draws(rng: Random, split: Split) -> Iterator[Question]:
        while True:
            yield addition_question(rng, config.digits, split)

    reward = each(exact=exact_reward, unsigned=unsigned_reward)
    return ProceduralTask(
        name=config.name,
        reward=reward,
        weights={"exact": 1.0},
        judges={"exact": RIGHT},
        form=bare_number,
        draws=draws,
    )

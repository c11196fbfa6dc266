"""What the model is asked and what an answer is worth: questions that a program can mark.

A task has three sets of questions that never meet: `train`, `selection` (for choosing among trials) and `confirm` (never used for
choosing). Three kinds of task:

- `addition`: "123+45=" -> "168", the embedded model's own language. Strict: only the bare number is correct, "+168" is not
  (a mark that forgives the sign, `unsigned`, weighs nothing and is logged).
- `gsm8k`: word problems (`gsm8k.py`). Two marks: `strict` (the number after the last "####") is the reward; `flexible` (the last
  number of the text) weighs nothing and is logged, because a low strict mark next to a high flexible one is a model that has not
  learned the format yet, not one that cannot count.
- `reasoning_gym:NAME`: a procedural data set of that package (`gym.py`), with partial credit in [0, 1] as its own scorer gives it.

Procedural questions (addition, reasoning_gym) are endless, so a set is a *share*: a stable hash of the question says to which of
the three it belongs, in every process, whatever was drawn before. 3+4 and 4+3 fall into the same share. Each held-out share has
10 % of all sums, and 25 % of a reasoning_gym data set (a held-out question costs four generated ones). The questions of one list
differ from one another as long as the share has new ones to give; when PATIENCE draws in a row brought nothing new it counts as
exhausted and its questions repeat in order. A finite data set never repeats: more asked than exist is the user's mistake. In both
kinds a shorter held-out list is the beginning of a longer one.

Model output is untrusted: garbage is worth 0 and never raises. Our own reward functions are not wrapped: one that raises, or
returns nan or infinity, is a bug and fails the trial.

Left out: chat templates (they need the tokenizer), length penalties (`grpo.py`), curricula.
"""

import difflib
import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from random import Random
from typing import Any, Literal

from spaces.config import ConfigError, TaskConfig
from trainable.gsm8k import Problem, flexible_number, load_problems, strict_number
from trainable.gym import open_gym

Split = Literal["train", "selection", "confirm"]
HeldOut = Literal["selection", "confirm"]

PATIENCE = 1000
"""Draws in a row without a new question after which a share counts as exhausted."""
ADDITION_SHARE = 0.10
GYM_SHARE = 0.25
GSM8K_PROMPT = '{question}\n\nReason step by step. On the last line write "#### " followed by the final answer as a bare number.'
GYM_PROMPT = "{question}\n\nAnswer with the result alone, without any explanation."


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Example: Question(prompt="123+45=", answer="168")"""

    prompt: str
    answer: str
    entry: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What a reward function needs beyond the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Example: Score(reward=0.0, parts={"strict": 0.0, "flexible": 1.0}, correct=False)"""

    reward: float
    """Sum of the weighted parts."""
    parts: Mapping[str, float]
    """What each reward function said, unweighted."""
    correct: bool


RewardFunction = Callable[[Question, str], float]
Draws = Callable[[Random, Split], Iterator[Question | None]]
"""Endless random questions of one share; None is a draw that fell into another."""


@dataclass(slots=True, kw_only=True)
class Task(ABC):
    """A reward function is added by `task.rewards["short"] = f; task.weights["short"] = 0.1`; weight 0 only logs it."""

    name: str
    rewards: dict[str, RewardFunction]
    weights: dict[str, float]
    judge: str
    """The reward function that decides: an answer is correct when it gives 1."""

    @abstractmethod
    def sample(self, count: int, *, seed: int, step: int, batch: int) -> list[Question]:
        """Training questions. They depend on the arguments alone, so that a resumed trial draws the same ones."""

    @abstractmethod
    def held_out(self, split: HeldOut, count: int) -> list[Question]:
        """The first `count` questions of a fixed set, the same for every seed and process."""

    def score(self, question: Question, completion: str) -> Score:
        """Raises what a reward function raises, and ValueError when one returns nan or infinity."""
        parts = {name: float(reward(question, completion)) for name, reward in self.rewards.items()}
        for name, value in parts.items():
            if not math.isfinite(value):
                raise ValueError(f"reward function {name} of {self.name} must return a finite number, but returned {value}")
        reward = sum(self.weights[name] * value for name, value in parts.items())
        return Score(reward=reward, parts=parts, correct=parts[self.judge] >= 1 - 1e-9)


@dataclass(slots=True, kw_only=True)
class ProceduralTask(Task):
    draws: Draws

    def sample(self, count: int, *, seed: int, step: int, batch: int) -> list[Question]:
        return self._distinct(count, "train", Random(f"{self.name} train {seed} {step} {batch}"))

    def held_out(self, split: HeldOut, count: int) -> list[Question]:
        return self._distinct(count, split, Random(f"{self.name} {split}"))

    def _distinct(self, count: int, split: Split, rng: Random) -> list[Question]:
        draws, found, idle = self.draws(rng, split), dict[str, Question](), 0
        while len(found) < count and idle < PATIENCE:
            question = next(draws)
            if question is None or question.prompt in found:
                idle += 1
            else:
                found[question.prompt] = question
                idle = 0
        if count and not found:
            raise ConfigError(f"task.options: {PATIENCE} draws of {self.name} gave no question for {split}; allow more variety")
        return list(itertools.islice(itertools.cycle(found.values()), count))


@dataclass(slots=True, kw_only=True)
class FiniteTask(Task):
    questions: Mapping[Split, Sequence[Question]]

    def sample(self, count: int, *, seed: int, step: int, batch: int) -> list[Question]:
        self._check_enough("train", count, "grpo.prompts")
        return Random(f"{self.name} train {seed} {step} {batch}").sample(self.questions["train"], count)

    def held_out(self, split: HeldOut, count: int) -> list[Question]:
        self._check_enough(split, count, "eval.questions")
        return list(self.questions[split][:count])

    def _check_enough(self, split: Split, count: int, key: str) -> None:
        if count > (most := len(self.questions[split])):
            raise ConfigError(f"{key}={count}: {self.name} has {most} questions for {split}; ask for at most {most}")


def split_of(text: str, share: float) -> Split:
    """Where a question belongs by a hash of its text; `share` is the size of each held-out set."""
    position = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) / 2**32  # [0, 1)
    return "selection" if position < share else "confirm" if position < 2 * share else "train"


def addition_question(rng: Random, digits: int, split: Split, *, short_ones: bool = False) -> Question:
    """One random sum of a share: both numbers below 10^digits, evenly, so that most have `digits` digits.

    With `short_ones` every length is as likely as the others: the easy examples from which the embedded base learns to add at all.
    """
    number = _number_of_any_length if short_ones else _number
    while True:
        a, b = number(rng, digits), number(rng, digits)
        if split_of(f"{min(a, b)}+{max(a, b)}", ADDITION_SHARE) == split:
            return Question(prompt=f"{a}+{b}=", answer=str(a + b))


def _number(rng: Random, digits: int) -> int:
    return int(rng.random() * 10**digits)  # of Random's methods, random() alone is promised to be the same in every Python


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


def _build_addition(config: TaskConfig) -> Task:
    def draws(rng: Random, split: Split) -> Iterator[Question]:
        while True:
            yield addition_question(rng, config.digits, split)

    rewards: dict[str, RewardFunction] = {"exact": exact_reward, "unsigned": unsigned_reward}
    return ProceduralTask(name=config.name, rewards=rewards, weights={"exact": 1.0, "unsigned": 0.0}, judge="exact", draws=draws)


def strict_reward(question: Question, completion: str) -> float:
    """1 when the number after the last "####" is the answer."""
    return float(strict_number(completion) == Decimal(question.answer))


def flexible_reward(question: Question, completion: str) -> float:
    """1 when the last number of the completion is the answer."""
    return float(flexible_number(completion) == Decimal(question.answer))


def _build_gsm8k(config: TaskConfig) -> Task:
    problems, template = load_problems(config.path), _template(config, GSM8K_PROMPT)

    def questions(part: Sequence[Problem]) -> list[Question]:
        return [Question(prompt=template.replace("{question}", problem.question), answer=problem.answer) for problem in part]

    sets: dict[Split, Sequence[Question]] = {
        "train": questions(problems.train),
        "selection": questions(problems.selection),
        "confirm": questions(problems.confirm),
    }
    rewards: dict[str, RewardFunction] = {"strict": strict_reward, "flexible": flexible_reward}
    return FiniteTask(name=config.name, rewards=rewards, weights={"strict": 1.0, "flexible": 0.0}, judge="strict", questions=sets)


def _template(config: TaskConfig, default: str) -> str:
    if config.prompt is not None and "{question}" not in config.prompt:
        raise ConfigError(f"task.prompt={config.prompt[:60]}: has no place for the question; put {{question}} into it")
    return default if config.prompt is None else config.prompt


def _build_gym(config: TaskConfig) -> Task:
    dataset, template = open_gym(config.name.partition(":")[2], dict(config.options)), _template(config, GYM_PROMPT)

    def draws(rng: Random, split: Split) -> Iterator[Question | None]:
        for entry in dataset.entries(rng):
            prompt = template.replace("{question}", entry["question"])
            mine = split_of(entry["question"], GYM_SHARE) == split
            yield Question(prompt=prompt, answer=str(entry["answer"]), entry=entry) if mine else None

    def score(question: Question, completion: str) -> float:
        return dataset.score(completion, question.entry)

    return ProceduralTask(name=config.name, rewards={"score": score}, weights={"score": 1.0}, judge="score", draws=draws)


def build_task(config: TaskConfig) -> Task:
    """Raises ConfigError for a task, a data set, an option or a file that does not exist."""
    kind, colon, dataset = config.name.partition(":")
    if kind not in TASKS or bool(colon) != (kind == "reasoning_gym"):
        near = difflib.get_close_matches(kind, TASKS, n=1, cutoff=0.0)[0]
        near += f":{dataset or 'chain_sum'}" if near == "reasoning_gym" else ""
        raise ConfigError(f"task.name={config.name}: no such task; did you mean {near}?")
    return TASKS[kind](config)


TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "addition": _build_addition,
    "gsm8k": _build_gsm8k,
    "reasoning_gym": _build_gym,
}

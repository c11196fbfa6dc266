"""What the model is asked and what an answer is worth: questions that a program can mark.

A task has three sets of questions that never meet: `train`, `selection` (for choosing among trials) and `confirm`
(never used for choosing). Three kinds of task:

- `addition`: "123+45=" -> "168", the embedded model's own language. Strict: only the bare number is correct, "+168" is
  not (a mark that forgives the sign, `unsigned`, weighs nothing and is logged).
- `gsm8k`: word problems (`gsm8k.py`). Two marks: `strict` (what follows the last "####" is a number and no more) is
  the reward; `flexible` (the last number of the text) weighs nothing and is logged, because a low strict mark next to a
  high flexible one is a model that has not learned the format yet, not one that cannot count.
- `reasoning_gym:NAME`: a procedural data set of that package (`gym.py`), with partial credit in [0, 1] as its own
  scorer gives it.

Procedural questions (addition, reasoning_gym) are endless, so a set is a *share*: a stable hash of the question says to
which of the three it belongs, in every process, whatever was drawn before. 3+4 and 4+3 fall into the same share. Each
held-out share has 10 % of all sums, and 25 % of a reasoning_gym data set (a held-out question costs four generated
ones). The questions of one list differ from one another as long as the share has new ones to give; when PATIENCE draws
in a row brought nothing new it counts as exhausted and its questions repeat in order. A finite data set never repeats:
more asked than exist is the user's mistake. In both kinds a shorter held-out list is the beginning of a longer one.

A reward marks all answers of a rollout in one call, and gives each its marks by name. Those with a weight make up what
is learned from; the others are logged; the first of `judges` that has anything to say about an answer tells whether it
is correct.

Model output is untrusted: garbage is worth 0 and never raises. Our own reward functions are not wrapped: one that
raises, or returns nan or infinity, is a bug and fails the trial.

Left out: chat templates (`prompts.py`: they need the tokenizer), length penalties (`grpo.py`), curricula.
"""

import hashlib
import itertools
import json
import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, Protocol

from spaces.config import ConfigError, TaskConfig

Split = Literal["train", "selection", "confirm"]
HeldOut = Literal["selection", "confirm"]

PATIENCE = 1000
"""Draws in a row without a new question after which a share counts as exhausted."""


Message = tuple[str, str]
"""Role and text: ("user", "What is 1 + 2?")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Example: Question(prompt="123+45=", answer="168")"""

    prompt: str
    answer: str
    messages: tuple[Message, ...] = ()
    """A prompt that is a conversation, for the model's chat template; `prompt` is then its text, for people to read."""
    entry: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What a reward function needs beyond the answer."""
    where: str = ""
    """The row that it was read from; empty where it was drawn."""

    @property
    def name(self) -> str:
        """What an error calls it."""
        return self.where or repr(self.prompt[:40])


def as_text(messages: Sequence[Message]) -> str:
    """A conversation as plain text: what is said, with a blank line between."""
    return "\n\n".join(content for _, content in messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Example: Answer(question=Question(prompt="12+3=", answer="15"), text="15", ids=(4, 8, 1))"""

    question: Question
    text: str
    """Decoded without special tokens."""
    ids: tuple[int, ...] = ()
    """Its tokens, the end token among them where it came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Example: Score(reward=0.0, parts={"strict": 0.0, "flexible": 1.0}, correct=False)"""

    reward: float
    """Sum of the weighted parts."""
    parts: Mapping[str, float]
    """Every mark that was given, unweighted."""
    correct: bool


RewardFunction = Callable[[Question, str], float]
"""Marks one answer."""
Reward = Callable[[Sequence[Answer]], Sequence[Mapping[str, float | None]]]
"""Marks all of them, in their order; None is a mark that does not apply to an answer."""


class Foreign(Protocol):
    """A reward that is the user's own code, in a process of its own."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the functions' marks."""

    @property
    def hashes(self) -> tuple[str, ...]:
        """sha256 of the file of each function; known once it is open."""

    def open(self) -> None:
        """Load it. Raises ConfigError."""

    def close(self) -> None:
        """End its process."""


RIGHT = 1 - 1e-9
"""A mark that is full but for the rounding of a sum."""
Draws = Callable[[Random, Split], Iterator[Question | None]]
"""Endless random questions of one share; None is a draw that fell into another."""


@dataclass(slots=True, kw_only=True)
class Task(ABC):
    name: str
    reward: Reward
    weights: Mapping[str, float]
    """Of the marks that are learned from."""
    judges: Mapping[str, float]
    """Mark -> value from which on an answer is correct; the first of them that was given decides."""
    form: RewardFunction | None = None
    """1 for a well-formed answer, right or wrong, for the control `grpo.reward=format`; None: it does not say."""
    warnings: tuple[str, ...] = ()
    """What the user should know of the questions."""
    foreign: Foreign | None = None
    """What of the reward must be closed in the end."""

    @abstractmethod
    def sample(self, count: int, *, seed: int, step: int, batch: int) -> list[Question]:
        """Training questions. They depend on the arguments alone, so that a resumed trial draws the same ones."""

    @abstractmethod
    def held_out(self, split: HeldOut, count: int, draw: str = "") -> list[Question]:
        """The first `count` questions of a fixed set, the same for every seed and process. `draw`: another list of the
        same share, where questions are endless; a finite set has one list."""

    def fingerprint(self) -> str:
        """Of its rows; empty where questions are drawn, from what the configuration says."""
        return ""

    def scores(self, answers: Sequence[Answer]) -> list[Score]:
        """Raises what the reward raises, and ValueError for a mark that is nan or infinity, or that judges and is
        nowhere."""
        return [self._score(marks, answer) for marks, answer in zip(self.reward(answers), answers, strict=True)]

    def _score(self, marks: Mapping[str, float | None], answer: Answer) -> Score:
        parts = {name: float(mark) for name, mark in marks.items() if mark is not None}
        where = answer.question.where or repr(answer.question.prompt[:40])
        for name, value in parts.items():
            if not math.isfinite(value):
                raise ValueError(f"{self.name}: mark {name} of {where} must be a finite number, but is {value}")
        judge = next((name for name in self.judges if name in parts), None)
        if judge is None:
            raise ValueError(f"{self.name}: {where} has none of the marks that tell right from wrong: {[*self.judges]}")
        reward = sum(weight * parts[name] for name, weight in self.weights.items() if name in parts)
        return Score(reward=reward, parts=parts, correct=parts[judge] >= self.judges[judge])


@dataclass(slots=True, kw_only=True)
class ProceduralTask(Task):
    draws: Draws

    def sample(self, count: int, *, seed: int, step: int, batch: int) -> list[Question]:
        return self._distinct(count, "train", Random(f"{self.name} train {seed} {step} {batch}"))

    def held_out(self, split: HeldOut, count: int, draw: str = "") -> list[Question]:
        return self._distinct(count, split, Random(f"{self.name} {split} {draw}".rstrip()))

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
            raise ConfigError(
                f"task.options: {PATIENCE} draws of {self.name} gave no question for {split}; allow more variety"
            )
        return list(itertools.islice(itertools.cycle(found.values()), count))


@dataclass(slots=True, kw_only=True)
class FiniteTask(Task):
    questions: Mapping[Split, Sequence[Question]]

    def sample(self, count: int, *, seed: int, step: int, batch: int) -> list[Question]:
        self._check_enough("train", count, "grpo.prompts")
        return Random(f"{self.name} train {seed} {step} {batch}").sample(self.questions["train"], count)

    def held_out(self, split: HeldOut, count: int, draw: str = "") -> list[Question]:
        self._check_enough(split, count, "eval.questions")
        return list(self.questions[split][:count])

    def fingerprint(self) -> str:
        return fingerprint_of(self.questions)

    def _check_enough(self, split: Split, count: int, key: str) -> None:
        if count > (most := len(self.questions[split])):
            raise ConfigError(f"{key}={count}: {self.name} has {most} questions for {split}; ask for at most {most}")


def fingerprint_of(questions: Mapping[Split, Sequence[Question]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for split, some in questions.items():
        for question in some:
            told = [split, question.prompt, question.messages, question.answer, question.entry]
            digest.update(json.dumps(told, default=lambda other: type(other).__name__).encode())
    return digest.hexdigest()


def template_of(config: TaskConfig, default: str) -> str:
    """What stands around a question. Raises ConfigError."""
    if config.prompt is not None and "{question}" not in config.prompt:
        raise ConfigError(f"task.prompt={config.prompt[:60]}: has no place for the question; put {{question}} into it")
    return default if config.prompt is None else config.prompt


def each(**functions: RewardFunction) -> Reward:
    """The reward that is made of functions which mark one answer at a time."""

    def reward(answers: Sequence[Answer]) -> list[dict[str, float | None]]:
        return [{name: mark(answer.question, answer.text) for name, mark in functions.items()} for answer in answers]

    return reward


def split_of(text: str, share: float) -> Split:
    """Where a question belongs by a hash of its text; `share` is the size of each held-out set."""
    position = position_of(text)
    return "selection" if position < share else "confirm" if position < 2 * share else "train"


def plainly(text: str) -> str:
    """A question however it is spaced and its accents are written: the same here is the same question."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def position_of(text: str) -> float:
    """In [0, 1), by a hash of the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) / 2**32

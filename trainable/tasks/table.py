"""The tasks by name; a new one is a row here, its name in the documentation of `task.name`, and a test row."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from random import Random

from spaces.config import KINDS, NAMED, ConfigError, TaskConfig
from trainable.tasks.addition import build_addition
from trainable.tasks.foreign import with_reward
from trainable.tasks.gsm8k import Problem, flexible_number, load_problems, parse_number, strict_number
from trainable.tasks.gym import extract_answer, open_gym
from trainable.tasks.open_instruct import build_open_instruct
from trainable.tasks.python_file import build_python
from trainable.tasks.task import RIGHT, FiniteTask, ProceduralTask, Question, Split, Task, each, split_of, template_of
from trainable.tasks.trl import build_trl
from trainable.tasks.verifiers import build_verifiers
from trainable.tasks.verl import build_verl

GYM_SHARE = 0.25
GSM8K_PROMPT = (
    '{question}\n\nReason step by step. On the last line write "#### " followed by the final answer as a bare number.'
)
GYM_PROMPT = "{question}\n\nAnswer with the result alone, without any explanation."


def strict_reward(question: Question, completion: str) -> float:
    """1 when the number after the last "####" is the answer."""
    return float(strict_number(completion) == Decimal(question.answer))


def flexible_reward(question: Question, completion: str) -> float:
    """1 when the last number of the completion is the answer."""
    return float(flexible_number(completion) == Decimal(question.answer))


def numbered(question: Question, completion: str) -> float:
    """1 when what follows the last "####" is a number, whichever."""
    return float(strict_number(completion) is not None)


def alone(question: Question, completion: str) -> float:
    """1 for nothing but an answer, whichever: in its tags, or as many lines as the known one has; a number where that
    is one."""
    answer = extract_answer(completion, lines=1 + question.answer.count("\n"))
    bare = answer == completion.strip() or completion.strip().endswith("</answer>")
    number = parse_number(question.answer) is None or parse_number(answer) is not None
    return float(bool(answer) and bare and number)


def _build_gsm8k(config: TaskConfig) -> Task:
    problems, template = load_problems(config.path), template_of(config, GSM8K_PROMPT)

    def questions(part: Sequence[Problem]) -> list[Question]:
        return [
            Question(
                prompt=template.replace("{question}", problem.question), answer=problem.answer, where=problem.where
            )
            for problem in part
        ]

    sets: dict[Split, Sequence[Question]] = {
        "train": questions(problems.train),
        "selection": questions(problems.selection),
        "confirm": questions(problems.confirm),
    }
    reward = each(strict=strict_reward, flexible=flexible_reward)
    return FiniteTask(
        name=config.name,
        reward=reward,
        weights={"strict": 1.0},
        judges={"strict": RIGHT},
        form=numbered,
        questions=sets,
    )


def _build_gym(config: TaskConfig) -> Task:
    dataset, template = open_gym(config.name.partition(":")[2], dict(config.options)), template_of(config, GYM_PROMPT)

    def draws(rng: Random, split: Split) -> Iterator[Question | None]:
        for entry in dataset.entries(rng):
            prompt = template.replace("{question}", entry["question"])
            mine = split_of(entry["question"], GYM_SHARE) == split
            yield Question(prompt=prompt, answer=str(entry["answer"]), entry=entry) if mine else None

    def score(question: Question, completion: str) -> float:
        return dataset.score(completion, question.entry)

    return ProceduralTask(
        name=config.name,
        reward=each(score=score),
        weights={"score": 1.0},
        judges={"score": RIGHT},
        form=alone,
        draws=draws,
    )


def build_task(config: TaskConfig) -> Task:
    """Raises ConfigError for a task, a data set, an option or a file that does not exist."""
    kind, colon, dataset = config.name.partition(":")
    if kind not in TASKS or bool(colon and dataset) != (kind in NAMED):
        near = [
            f"{name}:{dataset or NAMED[name]}" if name in NAMED else name
            for name in difflib.get_close_matches(kind, TASKS, n=1) or KINDS
        ]
        remedy = f"did you mean {near[0]}?" if len(near) == 1 else f"choose one of {', '.join(near)}"
        raise ConfigError(f"task.name={config.name}: no such task; {remedy}")
    task = TASKS[kind](config)
    return with_reward(task, config) if config.reward and task.foreign is None else task


TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "addition": build_addition,
    "gsm8k": _build_gsm8k,
    "open_instruct": build_open_instruct,
    "python": build_python,
    "trl": build_trl,
    "verifiers": build_verifiers,
    "verl": build_verl,
    "reasoning_gym": _build_gym,
}

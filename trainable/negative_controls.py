"""What is learned from when it is not the task: the negative controls of a method (`grpo.reward`).

A method that gains from a reward which knows nothing of the task has not learned the task, and neither has one that
gains as much from its form alone. Qwen2.5-Math-7B was seen to gain 21 points on MATH-500 from random rewards and 29
from true ones (Shao et al. 2025, arXiv 2506.10947), so a gain is worth what it is beyond that. Two such rewards:

- `random`: a fair coin per completion, by (seed, step, batch, prompt, sample). It does not look at the answer.
- `format`: 1 for any well-formed answer, right or wrong. What is well-formed a task says itself (`Task.form`):
  a bare number for sums; a number alone behind the last "####" for GSM8K; for reasoning_gym nothing but an answer, a
  number where the known answer is one.

Only what is learned from changes. Whether an answer is correct, every evaluation and the marks that are logged stay the
task's own; the group filter and the collapse rules see the reward that is learned from.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from spaces.config import ConfigError, LearnedFrom
from trainable.episode import Episode, Group
from trainable.hashing import stable_hash
from trainable.tasks.task import Task


def check_reward(reward: LearnedFrom, task: Task) -> None:
    """Raises ConfigError for a task that cannot give it."""
    if reward == "format" and task.form is None:
        raise ConfigError(
            f"grpo.reward=format: task {task.name} does not say what a well-formed answer is; choose random or task"
        )


def learned_from(reward: LearnedFrom, groups: list[Group], task: Task, draw: Sequence[object]) -> list[Group]:
    """The groups with that reward. `draw` names the rollout: seed, step, batch."""
    give = REWARDS[reward]
    if give is None:
        return groups
    return [
        tuple(
            replace(episode, score=replace(episode.score, reward=give(task, episode, (*draw, prompt, sample))))
            for sample, episode in enumerate(group)
        )
        for prompt, group in enumerate(groups)
    ]


def _coin(task: Task, episode: Episode, place: Sequence[object]) -> float:
    return float(stable_hash("coin", *place) % 2)


def _form(task: Task, episode: Episode, place: Sequence[object]) -> float:
    assert task.form is not None, "check_reward was not asked"
    return task.form(episode.question, episode.text)


REWARDS: dict[LearnedFrom, Callable[[Task, Episode, Sequence[object]], float] | None] = {
    "task": None,  # its own, as it was judged
    "random": _coin,
    "format": _form,
}

"""A sweep's rewards that are the user's own code: read once, when it begins, and the same ever after."""

from collections.abc import Iterable
from functools import lru_cache

from search.arms import Arm
from search.store import StudyConfig
from spaces.config import TaskConfig, TrialConfig
from trainable.disk.folder import Folder
from trainable.tasks.code import bring, keep
from trainable.tasks.foreign import ForeignReward

CODE = "code"
"""Folder of a sweep with the files of its rewards."""


def pinned(config: TrialConfig) -> TrialConfig:
    """With the hashes of the files as they are now, where none are written down. Raises ConfigError for one that does
    not load."""
    task = config.task
    if not task.reward or task.reward_sha256:
        return config
    return config.model_copy(update={"task": task.model_copy(update={"reward_sha256": hashes(task)})})


@lru_cache(maxsize=64)
def hashes(task: TaskConfig) -> tuple[str, ...]:
    """As this process saw them first."""
    loaded = ForeignReward(convention="python", config=task, functions=task.reward)
    try:
        loaded.open()
        return loaded.hashes
    finally:
        loaded.close()


def keep_rewards(study: StudyConfig, arms: Iterable[Arm]) -> None:
    """Beside its arms, for machines that do not have them."""
    for task in {arm.config.task for arm in arms}:
        keep(task, study.folder / CODE)


def bring_rewards(study: StudyConfig, arms: Iterable[Arm]) -> None:
    """From the sweep's own folder, or from that of the one that it confirms or takes apart."""
    for name in filter(None, (study.name, study.parent)):
        for task in {arm.config.task for arm in arms}:
            bring(task, Folder(study.store) / name / CODE)

"""A sweep's rewards that are the user's own code: read once, when it begins, and the same ever after."""

from collections.abc import Iterable
from functools import lru_cache

from search.arms import Arm
from search.store import Derived, StudyConfig
from spaces.config import TaskConfig, TrialConfig
from trainable.disk.folder import Folder
from trainable.tasks.code import bring, keep
from trainable.tasks.foreign import ForeignReward

CODE = "code"
"""Folder of a sweep with the files of its rewards."""


def pinned(config: TrialConfig, derived: Derived | None = None) -> TrialConfig:
    """With the hashes of the files as they are now, where none are written down; of a sweep that is the same as an
    earlier one, as they were there. Raises ConfigError for one that does not load."""
    task = config.task
    known = {} if derived is None else derived.rewards
    written = functions_of(task)
    if not task.reward_sha256 and written and known.keys() >= set(written):
        then = tuple(known[function] for function in written)
        return config.model_copy(update={"task": task.model_copy(update={"reward_sha256": then})})
    if not task.reward or task.reward_sha256:
        return config
    return config.model_copy(update={"task": task.model_copy(update={"reward_sha256": hashes(task)})})


def functions_of(task: TaskConfig) -> tuple[str, ...]:
    """The user's own functions that judge, as they are written; a task in Python has one in its own file."""
    own = tuple(f"{path}:reward" for path in task.path) if task.kind == "python" else ()
    return task.reward or own


def recorded(arms: Iterable[Arm]) -> dict[str, str]:
    """Function -> sha256 of its file in a sweep that ran; what its arms do not say, its outcomes do."""
    found: dict[str, str] = {}
    for arm in arms:
        for task in (*(outcome.config.task for outcome in arm.results.values()), arm.config.task):
            found |= dict(zip(functions_of(task), task.reward_sha256, strict=False))
    return found


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
    """From the sweep's own folder, or from that of the one that it confirms, takes apart or changes."""
    changed = "" if study.derived is None else study.derived.name
    for name in filter(None, (study.name, study.parent, changed)):
        for task in {arm.config.task for arm in arms}:
            bring(task, Folder(study.store) / name / CODE)

"""`verifiers:ENV_ID`: an installed environment of that package, of one question and one answer.

It is loaded in the worker (`verifiers_environment.py`), with task.options as its own; its training rows are ours, its
evaluation rows, where it has them, are for confirm. What is learned is the weighted sum of its rewards, `score`; each
of them, and each metric, is a mark of its own. An answer is correct when the reward that weighs most gives 1.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from spaces.config import ConfigError, TaskConfig
from trainable.tasks.foreign import ForeignReward
from trainable.tasks.rows import Row, three_sets
from trainable.tasks.task import RIGHT, FiniteTask, Question, Split, Task

NEEDS = "a row of an environment has prompt (text, or messages) or question"
_WORKER = "trainable.tasks.verifiers_environment"


def build_verifiers(config: TaskConfig) -> Task:
    """Raises ConfigError for a package or an environment that is not there, and for one that is more than that."""
    env = config.name.partition(":")[2]
    if find_spec("verifiers") is None:
        raise ConfigError(f"task.name={config.name}: the package verifiers is not installed; pip install verifiers")
    options = {"env": env, **dict(config.options)}
    worker = config.model_copy(update={"reward_options": tuple(options.items())})
    reward = ForeignReward(convention="python", config=worker, functions=(f"{_WORKER}:score",))

    def rows() -> Iterator[tuple[Split | None, Row]]:
        for number, (part, values) in enumerate(reward.call("rows", env, dict(config.options))):
            yield "confirm" if part == "test" else None, Row(values=values, where=f"{env} row {number}", needs=NEEDS)

    def question_of(row: Row) -> Question:
        column = "prompt" if row.values.get("prompt") is not None else "question"
        value: Any = row.take(column)
        messages = (("user", row.text(column)),) if isinstance(value, str) else row.messages(column)
        answer = row.values.get("answer")
        entry = {key: held for key, held in row.values.items() if key not in ("prompt", "question")}
        return row.question(config, messages, answer if isinstance(answer, str) else str(answer or ""), entry)

    sets = three_sets(rows(), question_of)
    return FiniteTask(
        name=config.name,
        reward=reward,
        weights=reward.weights,
        judges={"correct": RIGHT},
        foreign=reward,
        questions=sets.questions,
        warnings=sets.warnings,
    )

"""`python`: a file of the user's with questions and rewards.

    def questions(split): ...      # train, selection, confirm: a list of mappings, each with prompt and answer
    def reward(row, completion): ...

A prompt is a text or messages; whatever else a mapping holds, plain data, the reward finds in its row. `questions()`
without an argument gives one list, which is split by the hash of each question. The file is read in the worker alone
(`foreign.py`): nothing of it touches the trial. `task.reward` names its functions where they are several, or are not
called `reward`.
"""

from collections.abc import Iterator
from pathlib import Path

from spaces.config import ConfigError, TaskConfig
from trainable.tasks.foreign import ForeignReward
from trainable.tasks.python_questions import NEEDS
from trainable.tasks.rows import Row, three_sets
from trainable.tasks.task import FiniteTask, Question, Split, Task, template_of


def build_python(config: TaskConfig) -> Task:
    """Raises ConfigError for a file that is not so."""
    if len(config.path) != 1 or not config.path[0].endswith(".py"):
        raise ConfigError(f"task.path={', '.join(config.path)}: task.name=python takes one .py file; name that")
    (file,) = config.path
    if not Path(file).exists():
        raise ConfigError(f"task.path: {file} cannot be read (No such file or directory); give a .py file")
    reward = ForeignReward(convention="python", config=config, functions=config.reward or (f"{file}:reward",))
    alone = config.model_copy(update={"reward_sha256": (), "reward_options": ()})
    asked = ForeignReward(convention="python", config=alone, functions=("trainable.tasks.python_questions:rows_of",))

    def rows() -> Iterator[tuple[Split | None, Row]]:
        for part, number, values in given:
            yield (
                None if part == "train" else part,
                Row(values=values, where=f"{file} questions({part}) [{number}]", needs=NEEDS),
            )

    def question_of(row: Row) -> Question:
        entry = {key: held for key, held in row.values.items() if key not in ("prompt", "answer")}
        if isinstance(row.values.get("prompt"), str):
            text = template_of(config, "{question}").replace("{question}", row.text("prompt"))
            return Question(prompt=text, answer=row.text("answer"), entry=entry, where=row.where)
        return row.question(config, row.messages("prompt"), row.text("answer"), entry)

    try:
        given = asked.call("rows_of", file)
        sets = three_sets(rows(), question_of)
    finally:
        asked.close()
    return FiniteTask(
        name=config.name,
        reward=reward,
        weights=reward.weights,
        judges=reward.judges,
        foreign=reward,
        questions=sets.questions,
        warnings=sets.warnings,
    )

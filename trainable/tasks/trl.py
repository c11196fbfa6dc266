"""Rows in the layout of TRL, and its reward functions.

A column `prompt`, a text or messages, the same in all rows; every other column goes to the reward functions by its
name. `task.reward` names one or several, `my_rewards.py:f` or `trl.rewards:accuracy_reward`; `task.reward_weights` are
TRL's. An answer is correct where the first function that has anything to say of it gives 1. Images, tools and
environments have no place here.
"""

from spaces.config import TaskConfig
from trainable.tasks.foreign import ForeignReward
from trainable.tasks.rows import Row, SameKind, read_sets, three_sets
from trainable.tasks.task import FiniteTask, Question, Task, template_of

NEEDS = "a row of task.name=trl has prompt (text, or messages), and columns for its reward functions"
ANSWERS = ("answer", "solution", "ground_truth", "target", "label")
"""Columns that may hold what is true, for people to read and for the check of the reward; the first that is there."""

ARGUMENTS = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")
"""What a reward function is given by TRL itself."""
IMAGES = ("image", "images")


def build_trl(config: TaskConfig) -> Task:
    """Raises ConfigError for rows that are not so."""
    prompts = SameKind("prompt")

    def question_of(row: Row) -> Question:
        prompt = row.take("prompt")
        prompts.check(row, prompt)
        for column in ARGUMENTS:
            if column in row.values:
                raise row.mistake(column, "has the name of an argument that TRL gives; call it otherwise")
        for column in IMAGES:
            if row.values.get(column):
                raise row.mistake(column, "holds what a prompt of texts has no place for")
        columns = {name: value for name, value in row.values.items() if name != "prompt"}
        known = next((name for name in ANSWERS if columns.get(name) is not None), None)
        answer = "" if known is None else columns[known]
        answer = answer if isinstance(answer, str) else str(answer)
        if isinstance(prompt, str):
            text = template_of(config, "{question}").replace("{question}", row.text("prompt"))
            return Question(prompt=text, answer=answer, entry=columns, where=row.where)
        return row.question(config, row.messages("prompt"), answer, columns)

    sets = three_sets(read_sets(config.path, config.eval_path, NEEDS), question_of)
    reward = ForeignReward(convention="trl", config=config, functions=config.reward)
    return FiniteTask(
        name=config.name,
        reward=reward,
        weights=reward.weights,
        judges=reward.judges,
        foreign=reward,
        questions=sets.questions,
        warnings=sets.warnings,
    )

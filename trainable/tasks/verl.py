"""Rows in the layout of verl, and its rewards.

    data_source: text   prompt: [{role, content}]   reward_model: {ground_truth: ...}   extra_info: {...} or null

`task.reward=path/to/reward.py:compute_score` names the function that verl is given as custom_reward_function; without
one the row's data_source chooses among verl's own (`verl_scores.py`). An answer is correct where `acc` is 1, or, from
functions that tell none, where the score is; where task.correct_at says of which score, by that. Images, videos and
tools have no place in prompts here.
"""

from importlib.util import find_spec

from spaces.config import ConfigError, TaskConfig
from trainable.tasks.foreign import ForeignReward
from trainable.tasks.rows import Row, SameKind, read_sets, three_sets
from trainable.tasks.task import RIGHT, FiniteTask, Question, Task
from trainable.tasks.verl_scores import SOURCES, gsm8k, scorer_of

NEEDS = (
    "a row of task.name=verl has data_source (text), prompt (messages), reward_model.ground_truth, perhaps extra_info"
)
DEFAULT = ("trainable.tasks.verl_scores:compute_score",)


def build_verl(config: TaskConfig) -> Task:
    """Raises ConfigError for rows that are not so, and for a source that has no scorer here."""
    truths = SameKind("reward_model.ground_truth")

    def question_of(row: Row) -> Question:
        source, truth = row.text("data_source"), row.take("reward_model.ground_truth")
        truths.check(row, truth)
        if not config.reward:
            row.text("reward_model.ground_truth")
            scorer = scorer_of(source)
            if scorer is None:
                raise row.mistake("data_source", f"is {source}, which needs task.reward (without: {SOURCES})")
            if scorer is not gsm8k and find_spec("math_verify") is None:
                raise ConfigError(f"{row.where}: {source} is marked by math-verify: pip install math-verify")
        for column in ("images", "videos", "audios"):
            if row.values.get(column):
                raise row.mistake(column, "holds what a prompt of texts has no place for")
        given = {"data_source": source, "ground_truth": truth, "extra_info": row.values.get("extra_info")}
        return row.question(config, row.messages("prompt"), truth if isinstance(truth, str) else str(truth), given)

    sets = three_sets(read_sets(config.path, config.eval_path, NEEDS), question_of)
    reward = ForeignReward(convention="verl", config=config, functions=config.reward or DEFAULT)
    return FiniteTask(
        name=config.name,
        reward=reward,
        weights=reward.weights,
        judges={"acc": RIGHT, **reward.judges} if config.correct_at == 1 else reward.judges,
        foreign=reward,
        questions=sets.questions,
        warnings=sets.warnings,
    )

"""open-instruct's rows: its verifiers give what they give there, and what is not here is refused by name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spaces.config import ConfigError, TaskConfig
from trainable.tasks.table import build_task
from trainable.tasks.task import Answer, FiniteTask, Question, Score

TALK = [{"role": "user", "content": "{n}+1?"}, {"role": "assistant", "content": "It is {n}."}]


def rows(count: int = 40, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "messages": [{**message, "content": message["content"].replace("{n}", str(n))} for message in TALK],
            "ground_truth": str(n + 1),
            "dataset": "gsm8k",
            **more,
        }
        for n in range(count)
    ]


def task_of(tmp_path: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> FiniteTask:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = build_task(TaskConfig.model_validate({"name": "open_instruct", "path": str(path), **settings}))
    assert isinstance(task, FiniteTask)
    return task


def test_the_answer_of_the_row_is_no_part_of_what_is_asked(tmp_path: Path) -> None:
    task = task_of(tmp_path, rows())
    asked = task.questions["train"][0]
    assert asked.messages == (("user", asked.prompt),)
    assert asked.prompt == f"{int(asked.answer) - 1}+1?"
    alone = rows()
    for row in alone:
        del row["messages"][1:]
    assert task_of(tmp_path, alone).questions["train"] == task.questions["train"]
    plain = task_of(tmp_path, rows(), prompt="Q: {question}").questions["train"]
    assert {question.prompt for question in plain} >= {"Q: 3+1?"} - {q.prompt for q in plain if q.messages}
    assert all(not question.messages for question in plain)


VERIFIED: list[tuple[str, Any, str, int, float]] = [
    ("gsm8k", "42", "so 6*7 = 42", 3, 1.0),
    ("gsm8k", "1234", "it is 1,234 km", 3, 1.0),
    ("gsm8k", "0.5", "half, .5 or 0.5", 3, 1.0),
    ("gsm8k", "42", "42 or 43", 3, 0.0),
    ("gsm8k", "Yes", "YES", 3, 1.0),  # without a number the whole text counts
    ("string_matcher", "The Cat", "<answer>a cat!</answer>", 3, 1.0),
    ("string_matcher", "cat", "cat", 3, 0.0),  # tags are asked for
    ("string_matcher", "cat", "<answer>dog</answer><answer>cat</answer>", 3, 1.0),
    ("string_f1", "the red cat", "<think>dog</think> a red dog", 3, 0.5),
    ("string_f1", ["dog", "red dog"], "red dog", 3, 1.0),
    ("string_f1", "cat", "", 0, 0.0),
    ("flan", "Paris", "I think. The answer is: paris.", 3, 1.0),
    ("puzzle", "A, B", "<think>C</think><answer>a, b</answer>", 3, 1.0),
    ("puzzle", "x y", "y x", 3, 0.0),
    ("max_length", "100", "", 100, 1.0),
    ("max_length", 100, "", 4196, 0.5),
    ("max_length", "4196", "", 100, 0.5),
    ("up_to_max_length", "100", "", 10, 1.0),
    ("up_to_max_length", "100", "", 4196, 0.5),
]


@pytest.mark.parametrize(("verifier", "truth", "text", "tokens", "mark"), VERIFIED)
def test_a_verifier_gives_what_it_gives_there(
    verifier: str, truth: Any, text: str, tokens: int, mark: float, tmp_path: Path
) -> None:
    score = scored(tmp_path, verifier, [truth] if isinstance(truth, list) else truth, text, tokens)
    assert score.parts[verifier] == score.reward == pytest.approx(mark)
    assert score.correct == (mark == 1.0)


def scored(tmp_path: Path, verifier: Any, truth: Any, text: str, tokens: int = 5) -> Score:
    task = task_of(tmp_path, rows(dataset=verifier, ground_truth=truth))
    question: Question = task.questions["train"][0]
    return task.scores([Answer(question=question, text=text, ids=(1,) * tokens)])[0]


def test_several_verifiers_are_summed_and_all_must_be_satisfied(tmp_path: Path) -> None:
    both = ["gsm8k", "up_to_max_length"], ["7", "8"]
    short, long = scored(tmp_path, *both, "7", 8), scored(tmp_path, *both, "7", 8 + 4096)
    assert (short.reward, short.correct) == (2.0, True)
    assert (long.reward, long.correct) == (1.5, False)
    assert long.parts == {"gsm8k": 1.0, "up_to_max_length": 0.5, "correct": 0.0}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"dataset": "ifeval"}, r"column dataset names the verifier ifeval, and those here are gsm8k, string_matcher"),
        ({"dataset": ["gsm8k", "flan"]}, r"column ground_truth is text and should have one member for each verifier"),
        ({"dataset": "max_length"}, r"column ground_truth is 'x' and should be a number of tokens for max_length"),
        ({"dataset": None}, r"column dataset is not there, or null"),
        ({"ground_truth": {"a": 1}}, r"column ground_truth is a mapping and should be text for gsm8k"),
        ({"ground_truth": ["42", "43"]}, r"column ground_truth is a list and should be text for gsm8k"),
        ({"ground_truth": True}, r"column ground_truth is a truth value and should be text for gsm8k"),
        ({"messages": [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]}, r"asks nothing when"),
        ({"dataset": ["gsm8k"] * 2, "ground_truth": ["1", "2"]}, r"names a verifier twice"),
        ({"messages": [{"role": "assistant", "content": "1"}]}, r"ends with words of the assistant"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = {"ground_truth": "x", **row}
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:1: .*{said}") as error:
        task_of(tmp_path, rows(**given))
    assert "\n" not in str(error.value)


def test_truths_that_no_answer_meets_are_counted_and_told(tmp_path: Path) -> None:
    many = rows()
    many[3]["ground_truth"], many[5]["ground_truth"] = "1,000", "-5"
    (said,) = task_of(tmp_path, many).warnings
    assert said.startswith("2 rows have a truth that no answer meets, as ")
    fine = rows(dataset=["string_f1", "string_matcher", "max_length"], ground_truth=[["an elk", "b"], "a <b>", 7])
    assert task_of(tmp_path, fine).warnings == ()


def test_rows_are_needed() -> None:
    with pytest.raises(ValueError, match=r"name=open_instruct needs rows; set task\.path"):
        TaskConfig(name="open_instruct")

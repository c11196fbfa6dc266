"""Tasks in other trainers' formats: what a reward gives there it gives here, and rows that cannot be are refused."""

import asyncio
import json
import os
import re
import runpy
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dashboards.options import trial_config
from spaces.config import NAMED, ROWS, ConfigError, TaskConfig
from spaces.reading import read_config
from spaces.uses import idle
from tests.conftest import ModelFolder
from tests.outside import COUNT, files, open_instruct_rows, verl_rows, write
from trainable.metrics import REWARD
from trainable.tasks.table import build_task
from trainable.tasks.task import Answer, FiniteTask, Question, Score
from trainable.trial import Trial, run_trial

Build = Callable[..., FiniteTask]


@pytest.fixture
def build() -> Iterator[Build]:
    """build(name="verl", ...): closed in the end."""
    built: list[FiniteTask] = []

    def make(**settings: Any) -> FiniteTask:
        task = build_task(TaskConfig.model_validate(settings))
        assert isinstance(task, FiniteTask)
        built.append(task)
        return task

    yield make
    for task in built:
        if task.foreign is not None:
            task.foreign.close()


def completions(task: FiniteTask, count: int = COUNT) -> list[Answer]:
    """Right, wrong, in several forms, and garbage."""
    rng = Random("completions")
    questions = [question for part in task.questions.values() for question in part]
    forms = (
        "#### {}",
        "\\boxed{{{}}}",
        "it is ${}$.",
        "{}",
        "<think>so</think> {} please",
        "12 #### 7",
        "",
        "#### {},",
        "9" * 500,
    )
    return [
        Answer(
            question=(question := questions[n % len(questions)]),
            text=rng.choice(forms).format(question.answer),
            ids=(5,) * (n % 9),
        )
        for n in range(count)
    ]


def conversation(question: Question) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in question.messages]


def different(scores: Sequence[Score]) -> bool:
    return len({score.reward for score in scores}) > 1 and {score.correct for score in scores} == {True, False}


# --- verl -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_verl_s_reward_gives_here_what_it_gives_called_by_keyword(build: Build) -> None:
    reward = files() / "reward.py"
    task = build(
        name="verl", path=str(files() / "verl.parquet"), reward=f"{reward}:compute_score", reward_options={"half": 0.25}
    )
    compute_score = runpy.run_path(str(reward))["compute_score"]
    answers = completions(task)
    scores = task.scores(answers)
    assert different(scores)
    rows = {row["prompt"][0]["content"]: row for row in verl_rows()}
    for answer, score in zip(answers, scores, strict=True):
        row = rows[answer.question.prompt]
        given = asyncio.run(
            compute_score(
                data_source=row["data_source"],
                solution_str=answer.text,
                ground_truth=row["reward_model"]["ground_truth"],
                extra_info=row["extra_info"],
                half=0.25,
            )
        )
        assert (score.reward, score.correct) == (given["score"], given["acc"])
        assert score.parts == {
            "compute_score": given["score"],
            "acc": float(given["acc"]),
            "said": float(given["said"]),
        }


DEFAULTS = [
    ("openai/gsm8k", "42", "so #### 42", 1.0, True),
    ("openai/gsm8k", "1234", "#### 5 and then #### 1,234", 1.0, True),
    ("openai/gsm8k", "42", "#### 42.", 0.0, False),  # the full stop is taken for a part of the number, there too
    ("openai/gsm8k", "42", "42", 0.0, False),
    ("openai/gsm8k", "42", "#### 42" + " and so on" * 30, 0.0, False),  # its last 300 characters hold none
    ("lighteval/MATH", "\\frac{1}{2}", "it is $0.5$", 1.0, True),
    ("lighteval/MATH", "\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", 1.0, True),
    ("DigitalLearningGmbH/MATH-lighteval", "x^2-1", "\\boxed{(x-1)(x+1)}", 1.0, True),
    ("HuggingFaceH4/MATH-500", "7", "no idea", 0.0, False),
    ("math_dapo", "34", "Answer: \\boxed{34}", 1.0, True),
    ("aime2024", "34", "Answer: $33$", -1.0, False),
]


@pytest.mark.slow
def test_rows_without_a_reward_are_marked_by_their_source(build: Build, tmp_path: Path) -> None:
    rows = verl_rows()
    for number, row in enumerate(rows):
        source, truth, *_ = DEFAULTS[number % len(DEFAULTS)]
        row |= {"data_source": source, "reward_model": {"style": "rule", "ground_truth": truth}}
    task = build(name="verl", path=write(tmp_path / "mixed.jsonl", rows))
    by_row = {(q.entry["data_source"], q.answer): q for q in task.questions["train"]}
    asked = [Answer(question=by_row[source, truth], text=text) for source, truth, text, *_ in DEFAULTS]
    assert [(score.reward, score.correct) for score in task.scores(asked)] == [
        (mark, right) for *_, mark, right in DEFAULTS
    ]


@pytest.mark.slow
def test_mathematics_are_the_same_where_math_verify_says_so(build: Build, tmp_path: Path) -> None:
    from math_verify import parse, verify

    rows = verl_rows()
    for number, row in enumerate(rows):
        truth = f"\\frac{{{number + 1}}}{{4}}" if number % 3 else str(number)
        row |= {"data_source": "HuggingFaceH4/MATH-500", "reward_model": {"ground_truth": truth}}
    task = build(name="verl", path=write(tmp_path / "math.parquet", rows))
    answers = completions(task)
    scores = task.scores(answers)
    assert different(scores)
    for answer, score in zip(answers, scores, strict=True):
        assert score.correct == verify(parse(f"${answer.question.answer}$"), parse(answer.text)), answer.text


def changed(**columns: Any) -> list[dict[str, Any]]:
    rows = verl_rows()
    rows[3] |= columns
    return rows


BAD_VERL: dict[str, tuple[dict[str, Any], str]] = {
    "source": (
        {"data_source": "mine"},
        r"column data_source is mine, which needs task\.reward \(without: openai/gsm8k",
    ),
    "truth": (
        {"reward_model": {"ground_truth": 42}},
        r"column reward_model\.ground_truth is a number, and text in .*:1",
    ),
    "no truth": ({"reward_model": {"style": "rule"}}, r"column reward_model\.ground_truth is not there, or null"),
    "text": ({"prompt": "How many?"}, r"column prompt is text and should be a list of messages"),
    "image": ({"images": [{"bytes": "00"}]}, r"column images holds what a prompt of texts has no place for"),
}


@pytest.mark.parametrize(("columns", "said"), BAD_VERL.values(), ids=BAD_VERL)
def test_verl_rows_that_cannot_be_marked_are_refused(
    columns: dict[str, Any], said: str, build: Build, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"q\.jsonl:4: {said}.*; a row of task\.name=verl has") as error:
        build(name="verl", path=write(tmp_path / "q.jsonl", changed(**columns)))
    assert "\n" not in str(error.value)


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trl_s_rewards_give_here_what_they_give_called_directly(build: Build) -> None:
    from trl.rewards import accuracy_reward, think_format_reward

    mine = files() / "my_rewards.py"
    functions = ["trl.rewards:accuracy_reward", "trl.rewards:think_format_reward", f"{mine}:brief"]
    task = build(name="trl", path=str(files() / "trl.jsonl"), reward=functions, reward_weights=[1.0, 0.5, 0.0])
    answers = completions(task)
    scores = task.scores(answers)
    assert different(scores)
    said = [[{"role": "assistant", "content": answer.text}] for answer in answers]
    columns = {"solution": [answer.question.answer for answer in answers]}
    prompts = [conversation(answer.question) for answer in answers]
    accuracy = accuracy_reward(said, **columns)
    form = think_format_reward(said)
    brief = runpy.run_path(str(mine))["brief"](prompts, said, **columns)
    assert None in brief
    for number, score in enumerate(scores):
        marks = {"accuracy_reward": accuracy[number], "think_format_reward": form[number], "brief": brief[number]}
        assert {name: score.parts[name] for name in marks if name in score.parts} == {
            name: mark for name, mark in marks.items() if mark is not None
        }
        assert score.reward == accuracy[number] + 0.5 * form[number]
        assert score.correct == (accuracy[number] == 1)


def test_trl_s_prompts_are_texts_or_messages_and_not_both(build: Build, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "solution": "1"} for n in range(60)]
    plain = build(
        name="trl",
        path=write(tmp_path / "plain.jsonl", rows),
        reward="trl.rewards:accuracy_reward",
        prompt="Q {question}",
    )
    assert all(q.prompt.startswith("Q ") and not q.messages for q in plain.questions["train"])
    rows[7]["prompt"] = [{"role": "user", "content": "7?"}]  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"q\.jsonl:8: column prompt is a list, and text in .*q\.jsonl:1; a row of"):
        build(name="trl", path=write(tmp_path / "q.jsonl", rows), reward="trl.rewards:accuracy_reward")
    with pytest.raises(ValueError, match=r"name=trl needs a reward; set task\.reward"):
        TaskConfig(name="trl", path=(str(tmp_path / "q.jsonl"),))


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("completions", "column completions has the name of an argument that TRL gives; call it otherwise"),
        ("log_metric", "column log_metric has the name of an argument that TRL gives; call it otherwise"),
        ("image", "column image holds what a prompt of texts has no place for"),
    ],
)
def test_trl_s_columns_are_neither_its_arguments_nor_images(
    column: str, said: str, build: Build, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}?", "solution": "1", column: {"bytes": "00"}} for n in range(60)]
    with pytest.raises(ConfigError, match=rf"q\.jsonl:1: {said}"):
        build(name="trl", path=write(tmp_path / "q.jsonl", rows), reward="trl.rewards:accuracy_reward")


# --- verifiers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where environments are installed."""
    place = files() / "modules"
    monkeypatch.setenv("PYTHONPATH", str(place), prepend=os.pathsep)
    return place


@pytest.mark.slow
def test_a_taskset_of_verifiers_marks_here_as_it_does_there(
    build: Build, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build(name="verifiers:rin-sums", options={"count": 70})
    assert sum(map(len, task.questions.values())) == 70
    asked = task.questions["train"][0]
    assert asked.messages == (("system", "Add."), ("user", asked.prompt.removeprefix("Add.\n\n")))
    answers = completions(task)
    scores = task.scores(answers)
    assert different(scores)
    for answer, score in zip(answers, scores, strict=True):
        said = answer.text.strip()
        right, polite = float(answer.question.answer in said.split()), float("please" in said)
        assert score.parts == {
            "score": 0.75 * right + 0.25 * polite,
            "correct": right,
            "right": right,
            "polite": polite,
            "letters": float(len(said)),
        }
        assert (score.reward, score.correct) == (score.parts["score"], right == 1)


@pytest.mark.slow
def test_an_environment_of_the_first_interface_is_called_by_the_names_of_its_arguments(
    build: Build, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(modules / "old"), prepend=os.pathsep)
    task = build(name="verifiers:rin-old-sums")
    assert len(task.questions["confirm"]) == 10, "its evaluation rows are for confirming"
    right, wrong = (
        Answer(question=task.questions["confirm"][0], text=text) for text in (task.questions["confirm"][0].answer, "?")
    )
    n = right.question.entry["info"]["n"]
    assert [score.parts for score in task.scores([right, wrong])] == [
        pytest.approx(
            {"score": 1 + 0.5 * (3 + n / 100), "right": 1.0, "after": 3 + n / 100, "turns": 1.0, "correct": 1.0}
        ),
        pytest.approx({"score": 0.5 * (2 + n / 100), "right": 0.0, "after": 2 + n / 100, "turns": 1.0, "correct": 0.0}),
    ]
    for kind, said in {"multi": "goes on after the first answer", "group": "group marks a whole group"}.items():
        with pytest.raises(ConfigError, match=rf"{said}.*; only environments of one question, one answer and marks"):
            build(name="verifiers:rin-old-sums", options={"kind": kind})
    with pytest.raises(ConfigError, match=r"ModuleNotFoundError: No module named 'rin_nowhere'"):
        build(name="verifiers:rin-nowhere")


def test_an_environment_has_a_name_and_rewards_of_its_own(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"did you mean verifiers:ENVIRONMENT\?"):
        build(name="verifiers")
    with pytest.raises(ValueError, match=r"name=verifiers:rin-sums has rewards of its own; remove it"):
        TaskConfig.model_validate({"name": "verifiers:rin-sums", "reward": "a.py:f"})


# --- python -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_python_file_asks_and_marks(build: Build) -> None:
    path = str(files() / "my_task.py")
    task = build(name="python", path=path, reward=[f"{path}:reward", f"{path}:digits"], reward_weights=[1.0, 0.25])
    assert [q.entry for q in task.questions["confirm"] if q.answer == "420"] == [{"n": 210}]
    right, number, word = (
        Answer(question=task.questions["train"][0], text=text)
        for text in (task.questions["train"][0].answer, "7777", "x")
    )
    scores = task.scores([right, number, word])
    assert [(score.reward, score.correct) for score in scores] == [(1.25, True), (0.25, False), (0.0, False)]
    assert scores[1].parts == {"reward": 0.0, "digits": 1.0, "length": 4.0}


@pytest.mark.slow
def test_a_row_of_a_python_file_holds_whatever_its_question_does(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from trainable.tasks.task import Question\n"
        "def questions(split):\n"
        "    held = {'where': 'Rome', 'entry': 'x', 'messages': [1]}\n"
        "    if split == 'train':\n"
        "        return [{'prompt': 'a', 'answer': '1', **held}]\n"
        "    said = (('system', split), ('user', 'b')) if split == 'confirm' else ()\n"
        "    return [Question(prompt=split, answer='1', messages=said, entry=held)]\n"
        "def reward(row, completion):\n    return 1.0\n"
    )
    task = build(name="python", path=str(path))
    (confirm,), (selection,), (train,) = (task.questions[split] for split in ("confirm", "selection", "train"))
    held = {"where": "Rome", "entry": "x", "messages": [1]}
    assert [question.entry for question in (train, selection, confirm)] == [held] * 3
    assert (train.prompt, selection.prompt) == ("a", "selection")
    assert confirm.messages == (("system", "confirm"), ("user", "b"))


PYTHON: dict[str, tuple[str, str]] = {
    "no questions": ("def reward(row, completion): return 0.0", r"bad\.py has no function questions\(split\)"),
    "raises": ("def questions(split):\n    return [1 / 0]", r"bad\.py:2: ZeroDivisionError: division by zero"),
    "syntax": ("def questions(:", r"bad\.py:1: SyntaxError"),
    "no mapping": (
        "def questions():\n    return ['1+1=']",
        r"bad\.py questions\(train\) \[0\] is str; questions\(split\) gives mappings",
    ),
    "no answer": (
        "def questions():\n    return [{'prompt': '1'}]",
        r"questions\(train\) \[0\]: column answer is not there",
    ),
    "no data": (
        "def questions():\n    return [{'prompt': '1', 'answer': {1}}]",
        r"bad\.py questions\(train\) \[0\]: column answer is no plain data \(Object of type set is not JSON",
    ),
    "nothing": ("def questions(split):\n    print(split)", r"bad\.py questions\(train\) gave None; questions\(split\)"),
    "an empty split": (
        "def questions(split):\n    return [{'prompt': split, 'answer': '1'}] if split == 'train' else []",
        r"bad\.py questions\(selection\) gave no question",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "said"), PYTHON.values(), ids=PYTHON)
def test_a_python_file_that_is_not_so_is_told_in_one_line(source: str, said: str, build: Build, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=said) as error:
        build(name="python", path=str(path))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_questions_without_a_split_are_split_by_their_hash_and_may_be_conversations(
    build: Build, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    talk = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
    path.write_text(
        f"TALK = {json.dumps(talk)}\n"
        "def questions():\n"
        "    return [{'prompt': [TALK[0], {**TALK[1], 'content': str(n)}], 'answer': '1'} for n in range(50)]\n"
        "def reward(row, completion):\n    return float(row['prompt'][0]['content'] == 'Add.')\n"
    )
    task = build(name="python", path=str(path))
    assert all(task.questions.values())
    question = task.questions["train"][0]
    assert question.messages[0] == ("system", "Add.")
    assert task.scores([Answer(question=question, text="")])[0].reward == 1.0


def test_a_chat_template_is_not_asked_for_where_every_prompt_is_a_conversation() -> None:
    def idle_chat(**task: Any) -> bool:
        return "task.chat" in idle(read_config({"model": {"name": "m"}, "task": {"chat": True, **task}}))

    assert idle_chat(name="verl", path="q.parquet")
    assert not idle_chat(name="verl", path="q.parquet", prompt="{question}")
    assert not idle_chat(name="trl", path="q.parquet", reward="a.py:f")


def test_rows_that_were_left_out_are_told_in_the_receipt(model_folder: ModelFolder, tmp_path: Path) -> None:
    path = write(tmp_path / "twice.jsonl", [*open_instruct_rows(), *open_instruct_rows()[:3]])
    task = {"name": "open_instruct", "path": path}
    given = {"model": {"name": model_folder(text=True)}, "task": task, "eval": {"questions": 5}}
    trial = Trial(read_config(given, ["rollout.max_prompt_tokens=512"]))
    assert trial.receipt().warnings == ("3 rows that stand twice in a set were left out",)


# --- the commands of the documentation --------------------------------------------------------------------------------

DOCS = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
COMMANDS = {
    line.partition("task.name=")[2].split()[0]: line
    for line in re.findall(r"^rin trial control(?:.*\\\n)*.*", DOCS, re.M)
}
LIES_IN = {"train.parquet": "verl.parquet", "test.parquet": "verl_test.parquet", "rows.jsonl": "trl.jsonl"}


def test_every_kind_of_task_has_its_command() -> None:
    assert {name.partition(":")[0] for name in COMMANDS} == {*ROWS, *NAMED, "python"}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_documented_command_trains(
    name: str, model_folder: ModelFolder, modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    (tmp_path / "my_task.py").write_text(example)
    for file in ("train.parquet", "test.parquet", "rows.jsonl", "open_instruct.jsonl", "reward.py", "my_rewards.py"):
        (tmp_path / file).write_bytes((files() / LIES_IN.get(file, file)).read_bytes())
    monkeypatch.setenv("PYTHONPATH", str(modules / "old"), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    _, _, point, *words = shlex.split(COMMANDS[name].replace("\\\n", " ").replace("my-env", "rin-old-sums"))
    given = [word for word in words if word != "--set"]
    small = [
        "rollout.max_new_tokens=4",
        "grpo.steps=3",
        "grpo.prompts=4",
        "grpo.group_size=4",
        "grpo.updates_per_step=1",
    ]
    small += ["eval.questions=5", "eval.every=0", "collapse.mode=off", "grpo.overlong_buffer=0"]
    settings = {word.partition("=")[0]: word for word in (*given, f"model.name={model_folder(text=True)}", *small)}
    reports = list(run_trial(trial_config(point, None, None, list(settings.values()))))
    marks = {"python": "close", "verl": "acc", "trl": "brief", "open_instruct": "gsm8k", "verifiers": "after"}
    mark = marks.get(name.partition(":")[0], "score")
    assert [report.step for report in reports] == [0, 1, 2]
    assert all(0 <= report.signals[f"{REWARD}/{mark}"] <= 3 for report in reports)

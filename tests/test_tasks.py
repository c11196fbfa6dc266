"""Tasks: three sets that never meet, strict marks, garbage worth nothing, and mistakes explained in one line."""

import itertools
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pytest

from spaces.config import FOREIGN, KINDS, ConfigError, TaskConfig
from spaces.reading import read_config
from tests.outside import files
from trainable.signals import mean_parts
from trainable.tasks.addition import addition_question
from trainable.tasks.gsm8k import (
    Problem,
    Problems,
    flexible_number,
    load_problems,
    parse_number,
    problems_of,
    read_jsonl,
    split_problems,
    strict_number,
)
from trainable.tasks.gym import HARMLESS, REFUSED, extract_answer, open_gym
from trainable.tasks.table import TASKS, build_task
from trainable.tasks.task import Answer, Question, Reward, Score, Split, Task, each, split_of

SMALL = Path(__file__).parent / "data" / "gsm8k_small.jsonl"
HELD_OUT: tuple[Any, ...] = ("selection", "confirm")
GARBAGE = [
    "",
    " \n\t",
    "no idea",
    "nan",
    "-inf",
    "1e999",
    "#### nan",
    "#### 1e999",
    "####",
    "#### ####",
    "\x00\ud800é∑٤٢",
    "-" * 5000,
    "9" * 100_000,
    "[" * 100_000,
    "<answer>" * 20_000,
    "1,1," * 20_000,
    "(((1/0",
    "{'a': [1,",
]

CONFIGS = {
    "addition": TaskConfig(),
    "addition of one digit": TaskConfig(digits=1),
    "gsm8k": TaskConfig(name="gsm8k", path=str(SMALL)),
    "chain_sum": TaskConfig(name="reasoning_gym:chain_sum"),
    "chain_sum of 200 questions": TaskConfig(
        name="reasoning_gym:chain_sum",
        options=(("max_digits", 1), ("max_terms", 2)),
    ),
    "basic_arithmetic": TaskConfig(name="reasoning_gym:basic_arithmetic"),
    "gcd": TaskConfig(name="reasoning_gym:gcd"),
    "gcd and chain_sum": TaskConfig(name="reasoning_gym:gcd+chain_sum"),
    "open_instruct": TaskConfig(name="open_instruct", path=str(files() / "open_instruct.jsonl")),
}


@pytest.fixture(params=list(CONFIGS.values()), ids=list(CONFIGS))
def task(request: pytest.FixtureRequest) -> Task:
    return build_task(request.param)


def score_of(task: Task, question: Question, text: str) -> Score:
    return task.scores([Answer(question=question, text=text)])[0]


def with_mark(task: Task, name: str, value: float | None) -> Reward:
    """The task's reward with one more mark, the same for all."""
    given = task.reward
    return lambda answers: [{**marks, name: value} for marks in given(answers)]


def prompts(questions: list[Question]) -> list[str]:
    return [question.prompt for question in questions]


def output_of(code: str, hash_seed: str) -> str:
    """What a new process prints whose sets and dicts of strings are ordered otherwise."""
    root = Path(__file__).parent.parent
    environment = {"PYTHONHASHSEED": hash_seed}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    ).stdout


# Contract of every task


def test_every_kind_of_task_is_under_contract() -> None:
    assert {config.kind for config in CONFIGS.values()} | set(FOREIGN) == TASKS.keys()  # those: test_outside.py
    assert set(KINDS) == TASKS.keys()


def test_sample_depends_on_its_arguments_alone(task: Task) -> None:
    first = task.sample(12, seed=3, step=5, batch=0)
    task.sample(12, seed=0, step=0, batch=0)
    task.held_out("selection", 4)
    assert task.sample(12, seed=3, step=5, batch=0) == first
    assert len(first) == 12


@pytest.mark.parametrize("other", [{"seed": 4}, {"step": 6}, {"batch": 1}])
def test_another_seed_step_or_batch_draws_other_questions(task: Task, other: dict[str, int]) -> None:
    arguments = {"seed": 3, "step": 5, "batch": 0}
    assert task.sample(12, **arguments) != task.sample(12, **(arguments | other))


def test_train_selection_and_confirm_never_meet(task: Task) -> None:
    selection, confirm = (set(prompts(task.held_out(split, 6))) for split in HELD_OUT)
    train = {prompt for step in range(10) for prompt in prompts(task.sample(20, seed=1, step=step, batch=0))}
    assert selection
    assert confirm
    assert not selection & confirm
    assert not train & (selection | confirm)


@pytest.mark.parametrize("split", HELD_OUT)
def test_shorter_held_out_list_is_the_beginning_of_a_longer_one(task: Task, split: Any) -> None:
    assert task.held_out(split, 3) == task.held_out(split, 6)[:3]


def test_reference_answer_is_correct_with_reward_1(task: Task) -> None:
    for question in task.sample(8, seed=0, step=0, batch=0):
        score = score_of(task, question, f"#### {question.answer}" if task.name == "gsm8k" else question.answer)
        assert score.correct
        assert score.reward == 1.0
        assert score.parts.keys() >= {*task.weights, *task.judges}


@pytest.mark.parametrize("completion", GARBAGE, ids=lambda text: repr(text[:12]))
def test_garbage_is_worth_nothing(task: Task, completion: str) -> None:
    question = next(q for q in task.held_out("selection", 6) if q.answer not in completion)
    score = score_of(task, question, completion)
    assert not score.correct
    assert score.reward == 0.0


def test_reward_function_that_raises_fails_the_trial(task: Task) -> None:
    def broken(question: Question, completion: str) -> float:
        raise ZeroDivisionError("a bug")

    task.reward = each(broken=broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        score_of(task, task.held_out("selection", 1)[0], "7")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reward_that_is_not_finite_is_an_error(task: Task, value: float) -> None:
    task.reward = with_mark(task, "wild", value)
    with pytest.raises(ValueError, match=r"mark wild .* must be a finite number"):
        score_of(task, task.held_out("selection", 1)[0], "7")


def test_added_mark_counts_by_its_weight_and_leaves_correctness_alone(task: Task) -> None:
    task.reward = with_mark(task, "short", 1.0)
    task.weights = {**task.weights, "short": 0.25}
    score = score_of(task, task.held_out("selection", 1)[0], "?")
    assert score.parts["short"] == 1.0
    assert score.reward == 0.25
    assert not score.correct


def test_a_mark_that_does_not_apply_is_left_out_and_the_next_one_judges(task: Task) -> None:
    task.reward = lambda answers: [{"a": None, "b": 1.0}, {"a": 0.0, "b": 1.0}]
    task.weights, task.judges = {"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 1.0}
    one, two = task.scores([Answer(question=q, text="") for q in task.held_out("selection", 2)])
    assert (one.reward, one.parts, one.correct) == (0.5, {"b": 1.0}, True)
    assert (two.reward, two.parts, two.correct) == (0.5, {"a": 0.0, "b": 1.0}, False)
    assert mean_parts([one, two]) == {"a": 0.0, "b": 1.0}
    task.judges = {"c": 1.0}
    with pytest.raises(ValueError, match=r"has none of the marks that tell right from wrong: \['c'\]"):
        task.scores([Answer(question=q, text="") for q in task.held_out("selection", 2)])


def test_marks_for_too_few_answers_are_an_error(task: Task) -> None:
    task.reward = lambda answers: [dict.fromkeys(task.judges, 1.0)]
    with pytest.raises(ValueError, match="argument 2"):
        task.scores([Answer(question=q, text="") for q in task.held_out("selection", 2)])


@pytest.mark.slow
def test_questions_are_the_same_in_another_process() -> None:
    code = (
        "from spaces.config import TaskConfig; from trainable.tasks.table import build_task\n"
        "for name in ('addition', 'reasoning_gym:gcd'):\n"
        "    task = build_task(TaskConfig(name=name))\n"
        "    print([q.prompt for q in task.held_out('selection', 20) + task.sample(20, seed=1, step=2, batch=3)])\n"
    )
    runs = [output_of(code, salt) for salt in ("1", "2")]
    assert runs[0] == runs[1]
    assert runs[0].count("[") == 2


# Addition


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        ("168", True),
        ("+168", False),
        (" 168", False),
        ("168 ", False),
        ("0168", False),
        ("168=", False),
        ("16", False),
        ("", False),
    ],
)
def test_addition_wants_the_bare_number(completion: str, correct: bool) -> None:
    score = score_of(build_task(TaskConfig()), Question(prompt="123+45=", answer="168"), completion)
    assert (score.correct, score.reward) == (correct, float(correct))
    assert score.parts == {"exact": float(correct), "unsigned": float(completion in ("168", "+168"))}


@pytest.mark.parametrize("short_ones", [False, True])
@pytest.mark.parametrize("digits", [1, 2, 3, 6])
def test_addition_operands_are_even_by_value_or_by_length_and_have_no_leading_zero(
    digits: int, short_ones: bool
) -> None:
    rng = Random(0)
    questions = [addition_question(rng, digits, "train", short_ones=short_ones) for _ in range(600)]
    lengths = []
    for question in questions:
        a, b = question.prompt.removesuffix("=").split("+")
        assert str(int(a)) == a
        assert str(int(b)) == b
        assert question.answer == str(int(a) + int(b))
        lengths += [len(a), len(b)]
    for length in range(1, digits + 1):
        by_value = (0.9 if length > 1 else 1.0) * 10.0 ** (length - digits)
        expected = 1 / digits if short_ones else by_value
        assert lengths.count(length) / len(lengths) == pytest.approx(expected, abs=0.08)


def test_a_sum_and_its_mirror_are_in_the_same_share() -> None:
    rng = Random(1)
    shares: dict[str, set[str]] = {}
    for split in ("train", *HELD_OUT):
        sums = {addition_question(rng, 2, split).prompt for _ in range(300)}
        shares[split] = sums | {"{1}+{0}=".format(*text.removesuffix("=").split("+")) for text in sums}
    assert not shares["train"] & (shares["selection"] | shares["confirm"])
    assert not shares["selection"] & shares["confirm"]


def test_shares_have_the_sizes_that_the_docstring_says() -> None:
    pairs = [f"{a}+{b}" for a in range(0, 1000, 7) for b in range(a, 1000, 3)]
    counts: dict[Split, int] = {"train": 0, "selection": 0, "confirm": 0}
    for pair in pairs:
        counts[split_of(pair, 0.1)] += 1
    for split, share in (("train", 0.8), ("selection", 0.1), ("confirm", 0.1)):
        assert counts[split] / len(pairs) == pytest.approx(share, abs=0.01)  # type: ignore[index]


def test_held_out_sets_are_the_same_for_ever() -> None:
    task = build_task(TaskConfig())
    assert prompts(task.held_out("selection", 3)) == ["67+634=", "590+487=", "688+970="]
    assert prompts(task.held_out("confirm", 3)) == ["448+703=", "712+855=", "331+119="]


def test_each_draw_is_another_list_of_the_same_share() -> None:
    task = build_task(TaskConfig())
    lists = [prompts(task.held_out("confirm", 200, draw)) for draw in ("", "a", "b", "a")]
    assert lists[1] == lists[3]
    assert len({tuple(sorted(asked)) for asked in lists}) == 3
    assert len(set(lists[1]) & set(lists[2])) < 20
    chosen = set(prompts(task.held_out("selection", 2000)))
    assert all(chosen.isdisjoint(asked) for asked in lists)


def test_a_draw_where_there_is_one_list_is_an_error() -> None:
    for settings in (
        {"eval": {"draw": "x"}},
        {"eval": {"draw": "x", "split": "confirm"}, "task": {"name": "gsm8k"}, "model": {"name": "folder"}},
    ):
        with pytest.raises(ConfigError, match=r"eval\.draw=x has no use"):
            read_config(settings)


def test_held_out_sums_differ_while_the_share_lasts_and_repeat_in_order_after() -> None:
    assert len(set(prompts(build_task(TaskConfig()).held_out("confirm", 2048)))) == 2048
    few = prompts(build_task(TaskConfig(digits=1)).held_out("confirm", 128))
    distinct = len(set(few))
    assert 5 <= distinct <= 20
    assert few == (few[:distinct] * 30)[:128]


# GSM8K


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        (" 42.0 ", "42"),
        ("42.", "42"),
        ("$1,234.50", "1234.5"),
        ("-7", "-7"),
        ("-$7", "-7"),
        ("$-7", "-7"),
        (".5", "0.5"),
        ("007", "7"),
        ("1e3", None),
        ("42 km", None),
        ("4 2", None),
        ("1.2.3", None),
        ("٤٢", None),
        ("--7", None),
        ("nan", None),
        ("Infinity", None),
        ("", None),
        ("+3", "3"),
        ("-+3", None),
        ("1,2,3", None),
        ("12,34", None),
        ("3,5", None),
        ("0,500", None),
        ("1,000,00", None),
        ("1,234,567.25", "1234567.25"),
        ("$9{,}500", "9500"),
        ("\\$12", "12"),
        ("\u22127", "-7"),
        ("\u200b42\u200b", "42"),
    ],
)
def test_parse_number(text: str, number: str | None) -> None:
    assert parse_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("completion", "strict", "flexible"),
    [
        ("6*7=42\n#### 42", "42", "42"),
        ("#### 42.0", "42", "42"),
        ("####42.", "42", "42"),
        ("####\n42", "42", "42"),
        ("#### $1,042", "1042", "1042"),
        ("#### 7\nno, wait\n#### 42", "42", "42"),
        ("#### 42\nHope that helps, ask me 3 more!", "42", "3"),
        ("#### 42 apples", None, "42"),
        ("#### **42**", None, "42"),
        ("#### x = 42", None, "42"),
        ("The answer is 42.", None, "42"),
        ("The answer is \\boxed{42}", None, "42"),
        ("It costs $1,042.50.", None, "1042.5"),
        ("It is 42km", None, "42"),
        ("It fell to -42", None, "-42"),
        ("50-8", None, "8"),
        ("(50)-8", None, "8"),
        ("one of 1,2,42", None, "42"),
        ("12,3456", None, "3456"),
        ("1e999", None, "1"),
        ("x2", None, None),
        ("#### 1,2,3", None, "3"),
        ("#### 12,34", None, "34"),
        ("#### +3", "3", "3"),
        ("\\boxed{$9{,}500}", None, "9500"),
        ("#### .5", "0.5", "0.5"),
        ("#### -.5", "-0.5", "-0.5"),
        ("it is 3.5", None, "3.5"),
        ("#### \u22127", "-7", "-7"),
        ("#### 4\u200b2", "42", "42"),
        ("#### 42%", None, "42"),
        ("**#### 42**", None, "42"),
        ("forty-two", None, None),
        ("", None, None),
    ],
)
def test_strict_and_flexible_readings(completion: str, strict: str | None, flexible: str | None) -> None:
    assert strict_number(completion) == (None if strict is None else Decimal(strict))
    assert flexible_number(completion) == (None if flexible is None else Decimal(flexible))


def test_gsm8k_is_paid_for_strict_and_logs_flexible() -> None:
    score = score_of(build_task(CONFIGS["gsm8k"]), Question(prompt="", answer="42"), "It is 42.")
    assert (score.reward, score.correct, score.parts) == (0.0, False, {"strict": 0.0, "flexible": 1.0})


def test_numbers_are_compared_exactly() -> None:
    task = build_task(CONFIGS["gsm8k"])
    assert not score_of(task, Question(prompt="", answer="0.3"), "#### 0.30000000000000001").correct
    assert score_of(task, Question(prompt="", answer="1000.50"), "#### 1,000.5").correct


def test_small_file_is_split_70_15_15() -> None:
    rows = [json.loads(line) for line in SMALL.read_text().splitlines()]
    problems = load_problems([str(SMALL)])
    assert [len(part) for part in (problems.train, problems.selection, problems.confirm)] == [28, 6, 6]
    assert {p.question for p in (*problems.train, *problems.selection, *problems.confirm)} == {
        row["question"] for row in rows
    }
    answers = {p.answer for p in (*problems.train, *problems.selection, *problems.confirm)}
    assert {"2000", "-7", "13.50", "1290000"} <= answers


def numbered(count: int, start: int = 0) -> list[Problem]:
    return [Problem(question=f"q{i}", answer=str(i)) for i in range(start, start + count)]


def sets_of(problems: Problems) -> dict[str, str]:
    """Question -> the set in which it lies."""
    return {p.question: name for name in ("train", "selection", "confirm") for p in getattr(problems, name)}


@pytest.mark.parametrize(
    ("test", "validation", "shares"),
    [
        (None, None, (0.70, 0.15, 0.15)),
        (10, None, (0.85, 0.15, 0)),
        (None, 10, (0.85, 0, 0.15)),
        (10, 10, (1, 0, 0)),
    ],
)
def test_a_set_that_is_not_given_is_a_share_of_train(
    test: int | None, validation: int | None, shares: tuple[float, float, float]
) -> None:
    files = ((test, 10_000), (validation, 20_000))
    given = [None if count is None else numbered(count, start) for count, start in files]
    problems = split_problems(numbered(4000), *given)
    for name, share, extra in zip(("train", "selection", "confirm"), shares, (0, validation, test), strict=True):
        assert len(getattr(problems, name)) - (extra or 0) == pytest.approx(4000 * share, abs=80)


def test_the_order_of_the_rows_does_nothing_and_a_row_that_is_added_moves_no_other() -> None:
    rows = numbered(300)
    problems = split_problems(rows)
    assert split_problems(rows[::-1]) == problems
    grown = sets_of(split_problems([*numbered(5, start=9000), *rows]))
    assert {question: grown[question] for question in sets_of(problems)} == sets_of(problems)


def test_a_problem_that_is_spaced_otherwise_is_the_same_problem() -> None:
    spaced = [Problem(question=f"{problem.question} ", answer=problem.answer) for problem in numbered(60)]
    problems = split_problems([*numbered(60), *spaced], [*spaced[:9]])
    asked = [question.strip() for question in sets_of(problems)]
    assert len(asked) == len(set(asked)) == 60


def test_question_in_two_files_stays_in_confirm() -> None:
    problems = split_problems([*numbered(8), *numbered(2), *numbered(2, start=100)], numbered(1))
    sets = [{p.question for p in part} for part in (problems.train, problems.selection, problems.confirm)]
    assert "q0" in sets[2]
    assert not sets[0] & sets[1]
    assert not (sets[0] | sets[1]) & sets[2]


def test_folder_uses_its_test_file_for_confirm(tmp_path: Path) -> None:
    lines = SMALL.read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:30]))
    (tmp_path / "test.jsonl").write_text("".join(lines[30:]))
    problems = load_problems([str(tmp_path)])
    assert {p.question for p in problems.confirm} == {json.loads(line)["question"] for line in lines[30:]}
    assert 0 < len(problems.selection) < len(problems.train) < 30


def test_a_validation_file_is_for_selection(tmp_path: Path) -> None:
    lines = SMALL.read_text().splitlines(keepends=True)
    for name, part in (("train", lines[:20]), ("validation", lines[20:30]), ("test", lines[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    problems = load_problems([str(tmp_path)])
    assert {p.question for p in problems.selection} == {json.loads(line)["question"] for line in lines[20:30]}
    assert len(problems.train) == 20
    (tmp_path / "validation.jsonl").rename(tmp_path / "val.jsonl")
    with pytest.raises(ConfigError, match=r"val\.jsonl would be ignored; call it validation\.jsonl"):
        load_problems([str(tmp_path)])


def test_jsonl_round_trip_keeps_unicode_and_skips_blank_lines(tmp_path: Path) -> None:
    rows = [{"question": f"Zoë\u2028has {i} €?", "answer": f"so\n#### {i}"} for i in range(10)]
    path = tmp_path / "z.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    problems = load_problems([str(path)])
    everything = (*problems.train, *problems.selection, *problems.confirm)
    assert {(p.question, p.answer) for p in everything} == {(row["question"], str(i)) for i, row in enumerate(rows)}


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    text = "".join(f'\ufeff{{"question": "q{i}", "answer": "#### {i}"}}\n' for i in range(2))
    (tmp_path / "windows.jsonl").write_text(text, encoding="utf-8")
    assert {p.question for p in read_jsonl(tmp_path / "windows.jsonl")} == {"q0", "q1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a", "answer": "#### 1"}\n{oops', r"f\.jsonl:2: not valid JSON"),
        ('{"question": "a"}', r'f\.jsonl:1: no text under "answer"'),
        ('{"question": 3, "answer": "#### 1"}', r'f\.jsonl:1: no text under "question"'),
        ("[1]", r'f\.jsonl:1: no text under "question"'),
        ('\n\n{"question": "a", "answer": "it is 1"}', r"f\.jsonl:3: the answer ends in 'it is 1'"),
        ('{"question": "a", "answer": "#### 3,5"}', r"f\.jsonl:1: the answer ends in '#### 3,5'"),
        ("\n", r"f\.jsonl holds no problems"),
    ],
)
def test_bad_file_is_explained_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        build_task(TaskConfig(name="gsm8k", path=str(path)))


def test_missing_or_binary_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl cannot be read .*; give"):
        load_problems([str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(ConfigError, match=r"train\.jsonl cannot be read"):
        load_problems([str(tmp_path)])
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"b\.jsonl is not UTF-8"):
        load_problems([str(tmp_path / "b.jsonl")])


def test_more_questions_than_exist_is_the_users_mistake() -> None:
    task = build_task(CONFIGS["gsm8k"])
    with pytest.raises(
        ConfigError, match=r"eval\.questions=2048: gsm8k has 6 questions for confirm; ask for at most 6"
    ):
        task.held_out("confirm", 2048)
    with pytest.raises(ConfigError, match=r"grpo\.prompts=29: gsm8k has 28 questions for train"):
        task.sample(29, seed=0, step=0, batch=0)


def test_hub_rows_become_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in SMALL.read_text().splitlines()]
    hub = datasets.DatasetDict(train=datasets.Dataset.from_list(rows[:32]), test=datasets.Dataset.from_list(rows[32:]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, part: {("openai/gsm8k", "main"): hub}[name, part])
    task = build_task(TaskConfig(name="gsm8k"))
    assert len(task.held_out("confirm", 8)) == 8
    assert len(task.held_out("selection", 4)) == 4
    with pytest.raises(ConfigError, match=r'hub row 0: no text under "answer"'):
        problems_of(hub["train"].remove_columns("answer"), "hub")


def test_without_datasets_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install rin-search\[hub\]"):
        build_task(TaskConfig(name="gsm8k"))


def test_without_network_the_remedy_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(name: str, part: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ConfigError, match=r"cannot be fetched \(ConnectionError: no route\); give a JSONL file by task\.path"
    ):
        build_task(TaskConfig(name="gsm8k"))


def test_prompt_template_is_used_and_may_hold_braces() -> None:
    task = build_task(TaskConfig(name="gsm8k", path=str(SMALL), prompt="Q: {question} {x}\nA:"))
    assert task.held_out("selection", 1)[0].prompt.startswith("Q: ")
    assert task.held_out("selection", 1)[0].prompt.endswith(" {x}\nA:")


# reasoning_gym


@pytest.mark.parametrize(
    ("completion", "lines", "answer"),
    [
        ("12", 1, "12"),
        ("Let me see.\n12\n", 1, "12"),
        ("<answer>11</answer> no: <answer> 12 </answer> done", 1, "12"),
        ("<answer>1\n2</answer>", 1, "1\n2"),
        ("so:\n1\n2", 2, "1\n2"),
        ("2", 2, "2"),
        ("<answer>12", 1, "<answer>12"),
        ("12</answer>", 1, "12</answer>"),
        ("", 1, ""),
    ],
)
def test_extract_answer(completion: str, lines: int, answer: str) -> None:
    assert extract_answer(completion, lines) == answer


def test_gym_gives_partial_credit_without_calling_it_correct() -> None:
    task = build_task(CONFIGS["gcd"])
    question = next(q for q in task.held_out("selection", 5) if len(q.answer) == 1)
    score = score_of(task, question, f"it is {question.answer}")
    assert 0 < score.reward < 1
    assert not score.correct


def test_tables_fill_in_what_they_say() -> None:
    from reasoning_gym.factory import DATASETS

    assert REFUSED.keys() | HARMLESS.keys() <= DATASETS.keys()
    assert not REFUSED.keys() & HARMLESS.keys()


def test_every_data_set_is_either_built_or_refused_with_a_reason() -> None:
    from reasoning_gym.factory import DATASETS

    for name in DATASETS:
        if name in REFUSED:
            with pytest.raises(ConfigError, match=f"reasoning_gym:{name}: it"):
                open_gym(name, {})
        else:
            assert open_gym(name, {}).name == name


@pytest.mark.parametrize("name", ["boxnet", "game_of_life", "prime_factorization", "time_intervals"])
def test_scorers_that_raise_on_garbage_give_0(name: str) -> None:
    dataset = open_gym(name, {})
    entry = next(dataset.entries(Random(0)))
    for completion in ("[[1]]", "1e999", '{"a": {"b": [1]}}', "nan", "9" * 5000, "null"):
        assert 0 <= dataset.score(completion, entry) < 0.1


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_scorers_that_evaluate_see_no_code(name: str, tmp_path: Path) -> None:
    dataset = open_gym(name, {})
    entry = next(dataset.entries(Random(0)))
    witness = tmp_path / "witness"
    for completion in (
        f"open({str(witness)!r}, 'w')",
        f"__import__('pathlib').Path({str(witness)!r}).touch()",
        "exit()",
        "9**9**9**9",
    ):
        assert dataset.score(completion, entry) == 0.0
    assert not witness.exists()


@pytest.mark.parametrize("name", sorted(HARMLESS.keys() - {"puzzle24", "countdown"}))
def test_scorers_that_evaluate_see_every_reference_answer(name: str) -> None:
    dataset = open_gym(name, {})
    for entry, _ in zip(dataset.entries(Random(0)), range(10), strict=False):
        assert dataset.score(f"<answer>{entry['answer']}</answer>", entry) == 1.0
        assert dataset.score(f"Result:\n{entry['answer']}", entry) == 1.0


def test_countdown_is_solved_by_an_expression() -> None:
    dataset = open_gym("countdown", {})
    entry = next(dataset.entries(Random(0)))
    assert dataset.score(entry["metadata"]["expression"], entry) == 1.0


@pytest.mark.slow
def test_every_accepted_data_set_makes_the_same_questions_in_every_process() -> None:
    code = (
        "from itertools import islice; from random import Random; from reasoning_gym.factory import DATASETS\n"
        "from trainable.tasks.gym import REFUSED, open_gym\n"
        "for name in sorted(DATASETS.keys() - REFUSED.keys()):\n"
        "    count = 3 if name in ('futoshiki', 'zebra_puzzles', 'puzzle24') else 10\n"
        "    for entry in islice(open_gym(name, {}).entries(Random(1)), count):\n"
        "        print(name, repr(entry['question']), repr(entry['answer']))\n"
    )
    runs = [output_of(code, salt).splitlines() for salt in ("1", "2")]
    assert len(runs[0]) > 800
    for first, second in zip(*runs, strict=True):
        assert first == second


@pytest.mark.slow
def test_every_accepted_data_set_marks_garbage_with_less_than_1() -> None:
    from reasoning_gym.factory import DATASETS

    for name in sorted(DATASETS.keys() - REFUSED.keys()):
        dataset = open_gym(name, {})
        entry = next(dataset.entries(Random(0)))
        for completion in GARBAGE:
            assert 0 <= dataset.score(completion, entry) < 1, (name, completion[:20])


def test_a_mixture_asks_each_data_set_as_often_as_it_weighs_and_marks_it_as_alone() -> None:
    options = {"gcd": {"weight": 3}, "chain_sum": {"max_terms": 2}}
    task = build_task(TaskConfig.model_validate({"name": "reasoning_gym:gcd+chain_sum", "options": options}))
    asked = task.sample(400, seed=0, step=0, batch=0)
    parts = [question.entry["part"] for question in asked]
    assert 270 < parts.count("gcd") < 330
    sums = [question.entry["metadata"] for question in asked if question.entry["part"] == "chain_sum"]
    assert {metadata["num_terms"] for metadata in sums} == {2}
    alone = {name: open_gym(name, {}) for name in ("gcd", "chain_sum")}
    for question in asked[:40]:
        for text in (question.answer, "12", f"<answer>{question.answer}</answer>", "it is " + question.answer):
            (score,) = task.scores([Answer(question=question, text=text)])
            assert score.reward == alone[question.entry["part"]].score(text, question.entry)


# The user's mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adition"}, "task.name=adition: no such task; did you mean addition?"),
        ({"name": "gsm8k:main"}, "did you mean gsm8k?"),
        ({"name": "verrl", "path": "a.parquet"}, "task.name=verrl: no such task; did you mean verl?"),
        (
            {"name": "mine"},
            "no such task; choose one of addition, gsm8k, open_instruct, python, reasoning_gym",
        ),
        ({"name": "resoning_gym:gcd"}, "did you mean reasoning_gym:gcd?"),
        ({"name": "reasoning_gym"}, "did you mean reasoning_gym:chain_sum?"),
        ({"name": "reasoning_gym:chainsum"}, "no such data set; did you mean reasoning_gym:chain_sum?"),
        (
            {"name": "reasoning_gym:chain_sum", "options": {"terms": 2}},
            "chain_sum has no option terms; it has allow_negation, ",
        ),
        ({"name": "reasoning_gym:chain_sum", "options": {"seed": 2}}, "chain_sum has no option seed"),
        ({"name": "reasoning_gym:chain_sum", "options": {"min_terms": 0}}, "min_terms must be positive"),
        (
            {"name": "reasoning_gym:chain_sum", "options": {"min_terms": "two"}},
            "chain_sum refuses {'min_terms': 'two'}",
        ),
        ({"name": "reasoning_gym:gcd+gdc"}, "reasoning_gym:gdc: no such data set; did you mean reasoning_gym:gcd?"),
        ({"name": "reasoning_gym:gcd+word_ladder"}, "it makes other questions in every process"),
        ({"name": "reasoning_gym:gcd+gcd"}, "names a data set twice; say how often by its weight"),
        (
            {"name": "reasoning_gym:gcd+chain_sum", "options": {"min_terms": 2}},
            "min_terms of which data set? Say gcd.min_terms, or chain_sum.min_terms",
        ),
        (
            {"name": "reasoning_gym:gcd+chain_sum", "options": {"gcd": {"weight": 0}}},
            "gcd.weight=0: give a number above 0, or leave gcd out",
        ),
        ({"name": "reasoning_gym:gcd", "prompt": "Solve it"}, "task.prompt=Solve it: has no place for the question"),
    ],
)
def test_mistakes_name_the_key_the_value_and_the_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_task(TaskConfig.model_validate(settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_without_variety_are_explained_and_do_not_hang() -> None:
    options = (("max_digits", 1), ("max_terms", 1), ("min_terms", 1))  # ten questions
    task = build_task(TaskConfig(name="reasoning_gym:chain_sum", options=options))
    assert len(set(prompts(task.sample(64, seed=0, step=0, batch=0)))) == 2
    task.draws = lambda rng, split: itertools.repeat(None)  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"1000 draws of reasoning_gym:chain_sum gave no question for confirm; allow more variety"
    ):
        task.held_out("confirm", 4)


@pytest.mark.slow
def test_tasks_are_built_without_torch_and_without_reasoning_gym() -> None:
    code = (
        "import sys; from spaces.config import TaskConfig; from trainable.tasks.table import build_task\n"
        "build_task(TaskConfig()).held_out('selection', 4)\n"
        "assert not {'torch', 'reasoning_gym', 'datasets', 'ray'} & sys.modules.keys()\n"
    )
    output_of(code, "1")

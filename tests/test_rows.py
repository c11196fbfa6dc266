"""Rows from files: all that are there, each in one of three sets, and every mistake in one line with its place."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from spaces.config import ConfigError
from trainable.tasks.rows import Row, SameKind, Sets, read_sets, three_sets
from trainable.tasks.task import Question

NEEDS = "a row has prompt, answer"
ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(60)]


def write(path: Path, rows: Sequence[Any] = ROWS) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=16)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question_of(row: Row) -> Question:
    return Question(prompt=row.text("prompt"), answer=row.text("answer"), where=row.where)


def sets(*paths: str, eval_path: str | None = None) -> Sets:
    return three_sets(read_sets(paths, [eval_path] if eval_path else [], NEEDS), question_of)


def prompts(found: Sets) -> dict[str, list[str]]:
    return {split: [question.prompt for question in questions] for split, questions in found.questions.items()}


# --- where they lie ---------------------------------------------------------------------------------------------------


def test_the_same_rows_make_the_same_sets_wherever_they_lie(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "parts"
    folder.mkdir()
    for name, part in {"a.jsonl": ROWS[40:], "b.parquet": ROWS[:40]}.items():
        write(folder / name, part)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "dict")
    one = prompts(sets(write(tmp_path / "q.jsonl")))
    assert sorted(prompt for part in one.values() for prompt in part) == sorted(row["prompt"] for row in ROWS)
    assert all(one.values())
    for places in (
        [write(tmp_path / "q.parquet")],
        [write(tmp_path / "turned.jsonl", ROWS[::-1])],
        [write(tmp_path / "one.jsonl", ROWS[:7]), write(tmp_path / "two.parquet", ROWS[7:])],
        [str(folder)],
        [str(tmp_path / "saved")],
        [str(tmp_path / "dict")],
    ):
        assert prompts(sets(*places)) == one, places


def test_a_folder_of_datasets_gives_plain_values_whatever_format_it_was_saved_in(tmp_path: Path) -> None:
    import datasets

    columns = {"prompt": [f"{n}?" for n in range(60)], "answer": [str(n) for n in range(60)], "n": list(range(60))}
    datasets.Dataset.from_dict(columns).with_format("numpy").save_to_disk(tmp_path / "numpy")
    ((_, row), *_) = read_sets((str(tmp_path / "numpy"),), (), NEEDS)
    assert {name: type(value) for name, value in row.values.items()} == {"prompt": str, "answer": str, "n": int}


def test_the_hub_is_asked_by_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*names: Any, **options: Any) -> dict[str, Any]:
        asked.append((names, options))
        return {"train": iter(ROWS[:50]), "test": iter(ROWS[50:])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(sets("hub:openai/gsm8k:main").questions["confirm"]) == 10
    sets("hub:mine/questions")
    assert asked == [(("openai/gsm8k", "main"), {"streaming": True}), (("mine/questions", None), {"streaming": True})]


def test_a_data_set_that_cannot_be_fetched_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*names: Any, **options: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=r"task\.path=hub:a/b: cannot be had \(ConnectionError: no network\); give f"):
        sets("hub:a/b")


def test_a_data_set_that_breaks_off_or_is_damaged_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def broken() -> Iterator[dict[str, str]]:
        yield from ROWS[:5]
        raise ConnectionError("reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: {"train": broken()})
    with pytest.raises(ConfigError, match=r"task\.path=hub:a/b train: cannot be had \(ConnectionError: reset\); give"):
        sets("hub:a/b")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"task\.path=.*saved: cannot be had \(FileNotFoundError: .*\); give files"):
        sets(str(tmp_path / "saved"))


def test_names_say_what_is_for_judging_and_nothing_of_it_is_trained_on(tmp_path: Path) -> None:
    for name, part in {
        "train-00000-of-00002.parquet": ROWS[:20],
        "train-00001-of-00002.parquet": ROWS[20:30],
        "val.parquet": ROWS[30:45],
        "test.jsonl": ROWS[45:],
    }.items():
        write(tmp_path / name, part)
    (tmp_path / "README.md").write_text("about")
    found = prompts(sets(str(tmp_path)))
    assert {split: sorted(part) for split, part in found.items()} == {
        split: sorted(row["prompt"] for row in part)
        for split, part in {"train": ROWS[:30], "selection": ROWS[30:45], "confirm": ROWS[45:]}.items()
    }
    write(tmp_path / "more.jsonl", ROWS[:3])
    with pytest.raises(ConfigError, match=r"more\.jsonl is for training or for judging\? Let its name begin with"):
        sets(str(tmp_path))


def test_the_only_set_is_for_training_whatever_its_name(tmp_path: Path) -> None:
    import datasets

    write(tmp_path / "test.jsonl")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert prompts(sets(str(tmp_path / "saved"))) == prompts(sets(str(tmp_path / "test.jsonl")))


def test_rows_that_are_given_for_judging_are_for_confirming_alone(tmp_path: Path) -> None:
    found = sets(write(tmp_path / "train.jsonl", ROWS[:40]), eval_path=write(tmp_path / "eval.parquet", ROWS[40:]))
    assert sorted(prompts(found)["confirm"]) == sorted(row["prompt"] for row in ROWS[40:])
    assert found.warnings == ()


def test_what_stands_in_two_sets_is_for_judging_and_what_stands_twice_stands_once(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [*ROWS[:50], *ROWS[:3], {"prompt": "0+1=", "answer": "one"}])
    found = sets(train, eval_path=write(tmp_path / "eval.jsonl", ROWS[45:]))
    questions = prompts(found)
    assert len(questions["confirm"]) == 15
    assert not set(questions["confirm"]) & {*questions["train"], *questions["selection"]}
    assert len(questions["train"]) + len(questions["selection"]) == 46, "two answers to one question are two rows"
    assert found.warnings == (
        "3 rows that stand twice in a set were left out",
        "5 rows whose question stands in a held-out set too were left out",
    )


def test_a_question_that_is_spaced_otherwise_is_the_same_question(tmp_path: Path) -> None:
    spaced = [{**row, "prompt": f" {row['prompt']}\n"} for row in ROWS]
    questions = prompts(found := sets(write(tmp_path / "q.jsonl", [*ROWS, *spaced])))
    asked = [{prompt.strip() for prompt in part} for part in questions.values()]
    assert sum(map(len, asked)) == len(set.union(*asked)) == len(ROWS)
    assert "whose question stands in a held-out set too were left out" in found.warnings[0]


def test_a_row_that_is_added_moves_no_other(tmp_path: Path) -> None:
    before, after = (prompts(sets(write(tmp_path / "q.jsonl", rows))) for rows in (ROWS[:50], ROWS))
    assert all(set(before[split]) <= set(after[split]) for split in before)
    assert all([p for p in after[split] if p in set(before[split])] == before[split] for split in before)


# --- mistakes ---------------------------------------------------------------------------------------------------------

LINES: dict[str, tuple[bytes, str]] = {
    "latin-1": (b'{"prompt": "caf\xe9", "answer": "1"}', r"q\.jsonl:2: byte 15 is not UTF-8; save the file as UTF-8"),
    "broken": (b'{"prompt": "1+1=", "ans', r"q\.jsonl:2: not valid JSON \(.*\); write one object per line"),
    "NaN": (b'{"prompt": "1", "answer": NaN}', r"q\.jsonl:2: not valid JSON \(NaN is no number\)"),
    "deep": (b"[" * 100_000, r"q\.jsonl:2: not valid JSON"),
    "array": (b'[{"prompt": "1+1="}]', r"q\.jsonl:2: holds a list; write one object per line"),
    "null": (
        b'{"prompt": null, "answer": "1"}',
        r"q\.jsonl:2: column prompt is not there, or null \(there are prompt, an",
    ),
    "missing": (
        b'{"question": "1"}',
        r"q\.jsonl:2: column prompt is not there, or null \(there are question\); a row has",
    ),
    "number": (b'{"prompt": "1", "answer": 1}', r"q\.jsonl:2: column answer is a number and should be text; a row has"),
    "surrogate": (b'{"prompt": "\\ud800", "answer": "1"}', r"q\.jsonl:2: column prompt holds half of a surrogate pair"),
}


@pytest.mark.parametrize(("line", "said"), LINES.values(), ids=LINES)
def test_a_bad_line_is_told_with_its_place_and_the_remedy(line: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\r\n" + line + b"\n")
    with pytest.raises(ConfigError, match=said) as error:
        sets(str(path))
    assert "\n" not in str(error.value)


def test_byte_order_marks_and_empty_lines_are_no_rows(tmp_path: Path) -> None:
    part = write(tmp_path / "part.jsonl")
    joined = tmp_path / "joined.jsonl"
    joined.write_bytes(b"\xef\xbb\xbf" + Path(part).read_bytes() + b"\n\n")
    assert prompts(sets(str(joined))) == prompts(sets(part))


def test_parquet_without_the_columns_empty_files_and_files_of_other_kinds(tmp_path: Path) -> None:
    def said(path: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as error:
            sets(path)
        assert "\n" not in str(error.value)

    said(
        write(tmp_path / "q.parquet", [{"text": "1", "label": 2}]),
        r"q\.parquet row 0: column prompt is not there, or null \(there are text, label\); a row has prompt, answer",
    )
    said(write(tmp_path / "e.jsonl", []), r"task\.path: .*e\.jsonl holds no rows; give one that does")
    empty = pyarrow.Table.from_pylist([], schema=pyarrow.schema([("prompt", "string")]))
    pyarrow.parquet.write_table(empty, tmp_path / "e.parquet")
    said(str(tmp_path / "e.parquet"), r"task\.path: .*e\.parquet holds no rows")
    (tmp_path / "q.csv").write_text("a,b")
    said(str(tmp_path / "q.csv"), r"q\.csv is no \.jsonl or \.parquet file; convert it")
    (tmp_path / "fake.parquet").write_text("no parquet")
    said(str(tmp_path / "fake.parquet"), r"fake\.parquet cannot be read as parquet \(.*\); write it again")
    said(str(tmp_path / "nowhere.jsonl"), r"nowhere\.jsonl cannot be read \(No such file or directory\)")
    said(str(tmp_path / "nowhere.parquet"), r"nowhere\.parquet cannot be read \(No such file or directory\)")
    (tmp_path / "bare").mkdir()
    said(str(tmp_path / "bare"), r"bare holds no \.jsonl or \.parquet file")
    said(
        write(tmp_path / "few.jsonl", ROWS[:1]),
        r"of 1 rows none is left for \w+ \(0 stand twice in a set, 0 ask what .*; give more rows, and a",
    )
    said(
        write(tmp_path / "same.jsonl", ROWS[:1] * 9), r"of 9 rows none is left for \w+ \(8 stand twice in a set, 0 ask"
    )
    table = pyarrow.table({"prompt": ["abcdefgh"] * 3, "answer": ["1"] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", use_dictionary=False, compression="none")
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes().replace(b"abcdefgh", b"\xe9bcdefgh"))
    said(str(tmp_path / "t.parquet"), r"t\.parquet rows 0 to 256: not UTF-8; save the texts as UTF-8")


MESSAGES: list[tuple[Any, str]] = [
    ("1+1=", r"column prompt is text and should be a list of messages"),
    ([], r"column prompt is a list of nothing and should be a list of messages"),
    (["1+1="], r"column prompt\[0\] is text and should be a message"),
    ([{"role": "user"}], r"column prompt\[0\]\.content is null and should be text"),
    ([{"role": "user", "content": [{"type": "image"}]}], r"column prompt\[0\]\.content is a list and should be text"),
    (
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [1]}],
        r"column prompt\[1\]\.tool_calls holds what a prompt of texts has no place for",
    ),
]


@pytest.mark.parametrize(("prompt", "said"), MESSAGES)
def test_messages_are_roles_and_texts_and_nothing_else(prompt: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"q\.jsonl:3: {said}.*; a row has"):
        Row(values={"prompt": prompt}, where="q.jsonl:3", needs=NEEDS).messages("prompt")


def test_messages_may_hold_keys_that_say_nothing() -> None:
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "", "tool_calls": None}]
    row = Row(values={"prompt": talk}, where="", needs=NEEDS)
    assert row.messages("prompt") == (("system", "Be short."), ("user", ""))


def test_a_column_has_one_kind_of_value_in_all_its_rows() -> None:
    column = SameKind("reward_model.ground_truth")
    for number, value in enumerate(["1", "2"]):
        column.check(Row(values={}, where=f"q.jsonl:{number}", needs=NEEDS), value)
    with pytest.raises(
        ConfigError, match=r"q\.jsonl:9: column reward_model\.ground_truth is a number, and text in q\.js"
    ):
        column.check(Row(values={}, where="q.jsonl:9", needs=NEEDS), 2)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_large_file_is_read_in_the_memory_of_what_is_kept(suffix: str, tmp_path: Path) -> None:
    """64 MB, of which 1 MB is kept: the peak of the process rises by less than a third of the file."""
    rows = [{"prompt": f"{n:08d}" * 4, "answer": "1", "ballast": os.urandom(16_000).hex()} for n in range(2000)]
    path = write(tmp_path / f"large{suffix}", rows)
    size = Path(path).stat().st_size
    program = (
        "import resource, sys; import pyarrow.parquet\n"
        "from tests.test_rows import sets\n"
        "sets(sys.argv[2])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert sum(map(len, sets(sys.argv[1]).questions.values())) == 2000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    small = write(tmp_path / f"small{suffix}")
    ran = subprocess.run([sys.executable, "-c", program, path, small], capture_output=True, text=True, check=True)
    assert int(ran.stdout) * 1024 < size / 3, (ran.stdout, size)

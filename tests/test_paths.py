"""Paths in settings are settled where they are written, and nothing else is touched."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from spaces.config import FUNCTION, Record
from spaces.library import load_space
from spaces.paths import PATHS, anchored, anchored_value, load_settings, path_settings, relative_paths


def test_the_configuration_says_which_settings_are_paths() -> None:
    assert PATHS == {
        "model.name": ("embedded", "smollm2-135m"),
        "task.path": ("hub:",),
        "task.eval_path": ("hub:",),
        "task.reward": (FUNCTION,),
    }


@pytest.mark.parametrize(
    ("written", "anchored"),
    [
        ("r.py:f", "/here/r.py:f"),
        ("../r.py:f", "/here/../r.py:f"),
        ("/there/r.py:f", "/there/r.py:f"),
        ("package.rewards:f", "package.rewards:f"),
        (["r.py:f", "a.b:g"], ["/here/r.py:f", "a.b:g"]),
    ],
)
def test_the_file_of_a_function_is_a_path_and_a_package_is_none(written: Any, anchored: Any) -> None:
    assert anchored_value("task.reward", written, Path("/here")) == anchored
    assert relative_paths({"task": {"reward": written}}, Path("/here")) == []  # it goes along with a sweep


def test_a_mark_is_found_at_any_depth() -> None:
    class Inner(Record):
        script: str = Field("", json_schema_extra={"path": []})
        other: str = ""

    class Outer(Record):
        inner: Inner | None = None
        model: str = Field("", json_schema_extra={"path": ["none"], "units": "m"})

    assert path_settings(Outer) == {"inner.script": (), "model": ("none",)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a model, one called as the embedded one, and the home beside it; the current folder is another."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("place/weights", "place/embedded", "home", "elsewhere/gone"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "place"


@pytest.mark.parametrize(
    ("key", "given", "settled"),
    [
        ("task.path", "q.jsonl", "{place}/q.jsonl"),  # always a path, also where nothing lies
        ("task.path", "sub/q.jsonl", "{place}/sub/q.jsonl"),
        ("task.path", "~/q.jsonl", "{home}/q.jsonl"),
        ("task.path", "~nobody-of-that-name/q.jsonl", "{place}/~nobody-of-that-name/q.jsonl"),
        ("task.path", "/shared/q.jsonl", "/shared/q.jsonl"),
        ("task.path", None, None),
        ("task.path", "hub:openai/gsm8k", "hub:openai/gsm8k"),
        ("model.name", "weights", "{place}/weights"),
        ("model.name", "gone", "gone"),  # lies in the current folder, which has no say
        ("model.name", "./gone", "{place}/gone"),
        ("model.name", "../weights", "{place}/../weights"),
        ("model.name", "~/weights", "{home}/weights"),
        ("model.name", "/shared/weights", "/shared/weights"),
        ("model.name", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("model.name", "embedded", "embedded"),  # whatever lies there
        ("model.name", "./embedded", "{place}/embedded"),
        ("task.name", "weights", "weights"),
    ],
)
def test_a_path_begins_at_its_folder_and_a_name_stays_a_name(key: str, given: Any, settled: Any, folder: Path) -> None:
    section, leaf = key.split(".")
    tree = {section: {leaf: given}, "eval": {"questions": 3}}
    wanted = settled and settled.format(place=folder, home=folder.parent / "home")
    assert anchored(tree, folder) == {section: {leaf: wanted}, "eval": {"questions": 3}}
    assert tree[section][leaf] == given
    assert relative_paths(tree, folder) == ([] if given == wanted else [(key, given)])
    assert anchored(anchored(tree, folder), Path("/other")) == anchored(tree, folder) or wanted == given


def test_every_member_of_a_list_is_a_path(folder: Path) -> None:
    tree = {"task": {"path": ["a.parquet", "hub:b", "/c"]}}
    settled = {"task": {"path": [f"{folder}/a.parquet", "hub:b", "/c"]}}
    assert anchored(tree, folder) == settled
    assert [key for key, _ in relative_paths(tree, folder)] == ["task.path"]
    assert relative_paths(settled, Path("/other")) == []


@pytest.mark.parametrize("tree", [{}, {"model": 3}, {"task": {"path": 7}}, {"task": {"path": ""}}, {"task": None}])
def test_a_mistake_is_left_for_those_who_tell_it(tree: dict[str, Any], folder: Path) -> None:
    assert anchored(tree, folder) == tree


def test_paths_in_a_file_begin_at_the_file(folder: Path) -> None:
    (folder / "trial.yaml").write_text("task: {path: q.jsonl}\nmodel: {name: weights}\n")
    assert load_settings(folder / "trial.yaml") == {
        "task": {"path": f"{folder}/q.jsonl"},
        "model": {"name": f"{folder}/weights"},
    }
    (folder / "space.yaml").write_text(
        "name: mine\ndescription: which data\nsettings: {model: {name: weights}}\ndimensions:\n"
        "- {key: task.path, domain: {kind: choice, options: {small: s.jsonl, large: /shared/l.jsonl, hub: null}}}\n"
        "- {key: task.prompt, domain: {kind: choice, options: {plain: s.jsonl}}}\n"
    )
    space = load_space(folder / "space.yaml")
    assert space.settings == {"model": {"name": f"{folder}/weights"}}
    paths, prompts = (dimension.domain.options for dimension in space.dimensions if dimension.domain.kind == "choice")
    assert paths == {"small": f"{folder}/s.jsonl", "large": "/shared/l.jsonl", "hub": None}
    assert prompts == {"plain": "s.jsonl"}

"""Tests of what trials build once, in a process beside the one that drives the sweep."""

from pathlib import Path
from typing import Any

import pytest

import search.first_build
from search.first_build import build_once, built_beside, to_build
from search.lineup import fixed_arms
from search.store import StudyConfig, default_tracking_uri
from spaces.cache import base_folder
from spaces.config import BaseRecipe, ConfigError, TrialConfig
from spaces.library import SPACES
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS

pytestmark = pytest.mark.slow  # each starts a Python with torch


def study(folder: Path, **changes: Any) -> StudyConfig:
    places = {"store": str(folder), "tracking_uri": default_tracking_uri(str(folder))}
    return StudyConfig(**{"name": "s", "space": SPACES["sigma"], "workload": "tiny", **places, **changes})


def tiny(*overrides: str) -> TrialConfig:
    return read_config(WORKLOADS["tiny"].settings, overrides)


def test_a_setting_that_touches_nothing_is_the_user_s_mistake_in_one_line(tmp_path: Path) -> None:
    wrong = [tiny(), tiny("quant.exclude=nope")]
    with pytest.raises(
        ConfigError, match=r"^quant\.exclude=nope: matches no linear layer; one of them is model\.layers\.0"
    ):
        build_once(study(tmp_path), wrong, None)


def test_what_is_right_says_nothing_and_can_be_waited_for_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = study(tmp_path)
    with built_beside(config, [arm.config for arm in fixed_arms(config)], None) as built:
        built()
        built()
    assert capfd.readouterr().out == "", "stdout is for results"


def test_a_base_that_is_not_there_is_built_before_anything_else_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIN_CACHE", str(tmp_path / "cache"))
    recipe = {"depth": 1, "hidden_size": 32, "heads": 1, "intermediate_size": 32, "batch_size": 8}
    small = read_config(
        merge(WORKLOADS["tiny"].settings, {"model": {"recipe": {**recipe, "clean_steps": 3, "signed_steps": 2}}})
    )
    assert isinstance(small.model.recipe, BaseRecipe)
    steps: list[tuple[int, int, str]] = []
    with built_beside(study(tmp_path), [small], lambda *said: steps.append(said)) as built:
        assert base_folder(small.model.recipe).exists(), "its training takes the whole machine"
        assert steps[-1][:2] == (5, 5)
        built()


def test_a_bug_is_none_of_the_user_s_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(search.first_build, "as_tree", lambda trial: {"nonsense": 1})
    monkeypatch.setattr("sys.executable", str(broken := tmp_path / "python"))
    broken.write_text("#!/bin/sh\ncat > /dev/null; echo Traceback >&2; exit 1\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeError, match="ended with 1"):
        build_once(study(tmp_path), [tiny()], None)
    assert "Traceback" in capfd.readouterr().err


def test_one_trial_of_each_kind_is_built(tmp_path: Path) -> None:
    config = study(tmp_path)
    seeds = [tiny(f"seed={seed}") for seed in range(3)]
    assert to_build(config, [*seeds, tiny("grpo.steps=2"), tiny("quant.weights=none")]) == [
        seeds[-1].model_copy(update={"grpo": tiny("grpo.steps=2").grpo, "seed": 0}),
        tiny("quant.weights=none"),
    ]
    assert to_build(config, []) == []

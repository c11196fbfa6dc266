"""Tests of what trials build once, in a process beside the one that drives the sweep."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import search.first_build
from search.first_build import build_once, built_beside, lacks_a_base, to_build
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


def test_a_base_that_is_not_there_is_built_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIN_CACHE", str(tmp_path / "cache"))
    recipe = {"depth": 1, "hidden_size": 32, "heads": 1, "intermediate_size": 32, "batch_size": 8}
    small = read_config(
        merge(WORKLOADS["tiny"].settings, {"model": {"recipe": {**recipe, "clean_steps": 3, "signed_steps": 2}}})
    )
    assert isinstance(small.model.recipe, BaseRecipe)
    steps: list[tuple[int, int, str]] = []
    assert lacks_a_base([small])
    build_once(study(tmp_path), [small], lambda *said: steps.append(said))
    assert steps[-1][:2] == (5, 5)
    assert base_folder(small.model.recipe).exists()
    assert not lacks_a_base([small])


def test_a_bug_is_none_of_the_user_s_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(search.first_build, "as_tree", lambda trial: {"nonsense": 1})
    monkeypatch.setattr("sys.executable", str(broken := tmp_path / "python"))
    broken.write_text("#!/bin/sh\ncat > /dev/null; echo Traceback >&2; exit 1\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeError, match="ended with 1"):
        build_once(study(tmp_path), [tiny()], None)
    assert "Traceback" in capfd.readouterr().err


KILLED = """
import os, signal, sys
import search.first_build as module
from tests.test_first_build import study, tiny
from pathlib import Path

with module.built_beside(study(Path(sys.argv[1])), [tiny()], None):
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    print(*children, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_the_driver_however_that_ends(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (child,) = map(int, done.stdout.split())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError("it goes on by itself")


def test_one_trial_of_each_kind_is_built(tmp_path: Path) -> None:
    config = study(tmp_path)
    seeds = [tiny(f"seed={seed}") for seed in range(3)]
    assert to_build(config, [*seeds, tiny("grpo.steps=2"), tiny("quant.weights=none")]) == [
        seeds[-1].model_copy(update={"grpo": tiny("grpo.steps=2").grpo, "seed": 0}),
        tiny("quant.weights=none"),
    ]
    assert to_build(config, []) == []
    rules = ("noise.layers=srdd:cosine:top1",)
    apart = [tiny(*rules, f"grpo.learning_rate={rate}") for rate in (1e-4, 2e-4)]
    assert to_build(config, apart) == apart, "what a scan measures hangs on how is learned"

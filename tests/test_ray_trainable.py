"""The Tune trainable, driven as Tune drives it, without a cluster."""

import json
from pathlib import Path
from typing import Any

import pytest

from spaces.points import POINTS
from spaces.reading import as_tree, merge, read_config
from spaces.workloads import WORKLOADS
from trainable.ray_trainable import OUTCOME_FILE, RinTrainable
from trainable.trial import run_trial


def setting(point: str = "e13i-v3", *overrides: str) -> dict[str, Any]:
    config = read_config(merge(WORKLOADS["tiny"].settings, POINTS[point].settings), ("eval.questions=16", "threads=1", *overrides))
    return {"config": as_tree(config), "arm": "a", "replicate": 0, "origin": "point"}


def start(config: dict[str, Any]) -> RinTrainable:
    return RinTrainable(config=config)


def outcome_file(trainable: RinTrainable) -> Path:
    return Path(trainable.logdir) / OUTCOME_FILE


def numbers(result: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if "/" in name and not name.startswith("perf/")}


def test_its_results_are_those_of_the_plain_trial_and_the_last_one_holds_the_outcome() -> None:
    config = setting()
    reports = list(run_trial(read_config(config["config"])))
    trainable = start(config)
    for report in reports:
        result = trainable.train()
        plain = {k: v for k, v in report.signals.items() if not k.startswith("perf/")}
        assert {k: v for k, v in numbers(result).items() if k in plain} == plain
    assert result["done"]
    assert result["outcome"]["outcome"] == "completed"
    assert result["accuracy"] == result["outcome"]["eval"]["accuracy"]
    trainable.stop()
    assert json.loads(outcome_file(trainable).read_text())["outcome"] == "completed"


def test_a_restored_trainable_continues_bit_for_bit(tmp_path: Path) -> None:
    config = setting()
    first = start(config)
    for _ in range(3):
        first.train()
    first.save(str(tmp_path / "checkpoint"))
    undisturbed = [numbers(first.train()) for _ in range(3)]
    second = start(config)
    second.restore(str(tmp_path / "checkpoint"))
    assert [numbers(second.train()) for _ in range(3)] == undisturbed


def test_a_collapse_ends_it_as_a_result() -> None:
    trainable = start(setting("e13i-baseline", "noise.sigma_start=5", "noise.sigma_end=5"))
    for _ in range(6):
        result = trainable.train()
        if result["done"]:
            break
    assert (result["collapsed"], result["outcome"]["outcome"]) == (1, "collapsed")
    assert result["rule"] == result["outcome"]["rule"] == "filter_rejection"


def test_a_trial_that_is_stopped_is_evaluated_as_it_leaves() -> None:
    trainable = start(setting())
    trainable.train()
    trainable.stop()
    outcome = json.loads(outcome_file(trainable).read_text())
    assert outcome["outcome"] == "stopped"
    assert outcome["eval"]["n"] == 16


def test_a_bug_in_a_step_propagates_and_is_not_evaluated() -> None:
    trainable = start(setting())
    trainable.train()

    def broken(question: object, completion: str) -> float:
        raise ZeroDivisionError("a reward function with a bug")

    trainable.trial.task.rewards["broken"] = broken
    trainable.trial.task.weights["broken"] = 0.0
    with pytest.raises(ZeroDivisionError):
        trainable.train()
    trainable.stop()
    assert not outcome_file(trainable).exists()

"""Sweeps that nobody ran: their files as trials and drivers write them, from numbers that a test chose."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search.journal import trial_folder, write_arm

from search.searchers import Arm
from search.store import StudyConfig, default_tracking_uri, save_study_config
from search.study import base_tree
from spaces.library import SPACES
from spaces.reading import as_tree, merge, parse_overrides, read_config

QUESTIONS = 400


def study(store: Path | str, **changes: Any) -> StudyConfig:
    given = {
        "name": "s",
        "space": SPACES["sigma"],
        "workload": "tiny",
        "store": str(store),
        "tracking_uri": default_tracking_uri(str(store)) if "://" not in str(store) else "http://127.0.0.1:9",
        "settings": {"eval": {"questions": QUESTIONS}},
    }
    return StudyConfig(**{**given, **changes})


def make_arm(config: StudyConfig, name: str, *overrides: str, origin: str = "") -> Arm:
    """`control...` without noise, everything else with a sigma of 0.01 unless it says another."""
    control = name.startswith("control")
    noise = {"noise": {"sigma_start": 0.0 if control else 0.01, "sigma_end": 0.0 if control else 0.001}}
    tree = merge(merge(base_tree(config), noise), parse_overrides(list(overrides)))
    return Arm(name=name, origin=origin or ("control" if control else "point"), tree=tree)


def outcome(
    arm: Arm, replicate: int, right: int, how: str = "completed", *, rule: str = "", dose: float | None = None, seconds: float = 60.0
) -> dict[str, Any]:
    """Of a trial that answered `right` of its questions. Which ones goes round with the replicates, so that no question is easy or
    hard, and a comparison is a plain paired t test."""
    asked = read_config(arm.tree).eval.questions
    correct = [int((number + replicate * asked // 5) % asked < right) for number in range(asked)]
    assert sum(correct) == right
    scores = {"accuracy": right / asked, "accuracy_bf16": right / asked, "n": asked, "correct": correct}
    scores |= {"accuracy_start": 0.25, "accuracy_bf16_start": 0.25}
    effects = [] if dose is None else [{"applied_relative": dose}]
    config = as_tree(read_config(merge(arm.tree, {"seed": replicate})))
    receipt = {"quantized": [], "noised": [], "effects": effects, "warnings": []}
    base = {"outcome": how, "rule": rule, "step": 6, "eval": scores, "receipt": receipt, "alarms": []}
    return {**base, "config": config, "seconds": seconds}


def report(step: int, seconds: float = 10.0, rollout: float = 4.0, wasted: float = 0.0) -> dict[str, Any]:
    return {"step": step, "seconds": seconds, "time_ms": 1, "perf/rollout_seconds": rollout, "filter/wasted": wasted}


def attempt(started: float = 0.0, seen: float = 60.0, **more: Any) -> dict[str, Any]:
    return {"started": started, "seen": seen, "first_step": 0, "step": 6, "ended": "outcome", "loading_seconds": 0.0, **more}


def write_trial(
    config: StudyConfig,
    arm: Arm,
    replicate: int,
    ended: Mapping[str, Any] | None,
    *,
    reports: Sequence[Mapping[str, Any]] = (),
    attempts: Sequence[Mapping[str, Any]] = (),
) -> None:
    folder = trial_folder(config, arm.name, replicate)
    for number, tree in enumerate(attempts or [attempt()], start=1):
        folder.write(f"attempt-{number:03d}.json", json.dumps(tree))
    if ended is not None:
        folder.write("outcome.json", json.dumps({"version": 1, "outcome": ended, "reports": list(reports)}))


def write_sweep(config: StudyConfig, arms: Sequence[Arm], right: Mapping[str, Sequence[Any]]) -> None:
    """`right`: for each arm and replicate the right answers: 310; ("collapsed", 200); None for one that did not end."""
    save_study_config(config)
    for number, arm in enumerate(arms):
        write_arm(config, number, arm)
        for replicate, given in enumerate(right.get(arm.name, ())):
            if given is None:
                write_trial(config, arm, replicate, None)
                continue
            how, count = given if isinstance(given, tuple) else ("completed", given)
            rule = "filter_rejection" if how == "collapsed" else ""
            dose = None if arm.origin == "control" else read_config(arm.tree).noise.sigma_start
            write_trial(config, arm, replicate, outcome(arm, replicate, count, how, rule=rule, dose=dose))

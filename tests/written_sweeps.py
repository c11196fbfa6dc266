"""Sweeps that nobody ran: their files as trials and drivers write them, from numbers that a test chose."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search.arms import Arm, Origin, trial_folder, write_arm
from search.lineup import base_tree
from search.store import StudyConfig, default_tracking_uri, save_study_config
from spaces.library import SPACES
from spaces.reading import merge, parse_overrides, read_config
from trainable.disk.trial_folder import write_outcome
from trainable.outcome import HEALTHY, Coverage, Effect, EffectReceipt, Ending, Outcome, Scores, StepReport

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


def make_arm(config: StudyConfig, name: str, *overrides: str, origin: Origin | None = None) -> Arm:
    """`control...` without noise, everything else with a sigma of 0.01 unless it says another."""
    control = name.startswith("control")
    noise = {"noise": {"sigma_start": 0.0 if control else 0.01, "sigma_end": 0.0 if control else 0.001}}
    tree = merge(merge(base_tree(config), noise), parse_overrides(list(overrides)))
    return Arm(name=name, origin=origin or ("control" if control else "point"), config=read_config(tree))


def outcome(
    arm: Arm,
    replicate: int,
    right: int,
    how: Ending = "completed",
    *,
    rule: str = "",
    dose: float | None = None,
    seconds: float = 60.0,
) -> Outcome:
    """Of a trial that answered `right` of its questions. Which ones goes round with the replicates, so that no question
    is easy or hard, and a comparison is a plain paired t test."""
    asked = arm.config.eval.questions
    correct = tuple(int((number + replicate * asked // 5) % asked < right) for number in range(asked))
    assert sum(correct) == right
    return Outcome(
        outcome=how,
        rule=rule,
        step=6,
        eval=scores(correct),
        receipt=receipt(dose),
        alarms=(),
        config=arm.config.model_copy(update={"seed": replicate}),
        seconds=seconds,
    )


def scores(correct: Sequence[int], accuracy: float | None = None) -> Scores:
    return Scores(
        accuracy=sum(correct) / len(correct) if accuracy is None else accuracy,
        accuracy_bf16=sum(correct) / len(correct) if accuracy is None else accuracy,
        parts={},
        accuracy_start=0.25,
        accuracy_bf16_start=0.25,
        parts_start={},
        n=len(correct),
        correct=tuple(correct),
    )


def receipt(dose: float | None = None) -> EffectReceipt:
    """Of one noised weight, or of none."""
    effect = {
        "stage": 1,
        "step": 1,
        "name": "norm",
        "layer": 0,
        "kind": "rmsnorm",
        "nominal": dose,
        "applied": dose,
        "changed": 1.0,
    }
    effects = () if dose is None else (Effect(**effect, applied_relative=dose),)
    return EffectReceipt(
        quantized=(),
        coverage=Coverage(),
        adapted=(),
        norms={},
        arithmetic=(),
        noised=(),
        moved={},
        effects=effects,
        warnings=(),
        forward={},
    )


def report(step: int, seconds: float = 10.0, rollout: float = 4.0, wasted: float = 0.0) -> StepReport:
    signals = {"rin/sigma": 0.0, "perf/rollout_seconds": rollout, "filter/wasted": wasted}
    return StepReport(step=step, sigma=0.0, signals=signals, verdict=HEALTHY, seconds=seconds, samples=(), time_ms=1)


def attempt(started: float = 0.0, seen: float = 60.0, **more: Any) -> dict[str, Any]:
    return {
        "started": started,
        "seen": seen,
        "first_step": 0,
        "step": 6,
        "ended": "outcome",
        "loading_seconds": 0.0,
        **more,
    }


def write_trial(
    config: StudyConfig,
    arm: Arm,
    replicate: int,
    ended: Outcome | None,
    *,
    reports: Sequence[StepReport] = (),
    attempts: Sequence[Mapping[str, Any]] = (),
) -> None:
    folder = trial_folder(config, arm.name, replicate)
    for number, tree in enumerate(attempts or [attempt()], start=1):
        folder.write(f"attempt-{number:03d}.json", json.dumps(tree))
    if ended is not None:
        write_outcome(folder, ended, reports)


def write_sweep(config: StudyConfig, arms: Sequence[Arm], right: Mapping[str, Sequence[Any]]) -> None:
    """`right`: for each arm and replicate the right answers: 310; ("collapsed", 200); None for one that did not end."""
    save_study_config(config)
    for number, arm in enumerate(arms):
        write_arm(config, number, arm)
        for replicate, given in enumerate(right.get(arm.name, ())):
            if given is None:
                write_trial(config, arm, replicate, None, attempts=[attempt(ended="")])
                continue
            how, count = given if isinstance(given, tuple) else ("completed", given)
            rule = "filter_rejection" if how == "collapsed" else ""
            dose = None if arm.origin == "control" else arm.config.noise.sigma_start
            write_trial(config, arm, replicate, outcome(arm, replicate, count, how, rule=rule, dose=dose))

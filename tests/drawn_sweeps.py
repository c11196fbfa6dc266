"""Sweeps that nobody ran with all that a picture is made of: steps, completions, receipts by layer, hours."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from search.arms import Arm, write_arm
from search.lineup import base_tree
from search.store import StudyConfig, save_study_config
from spaces.reading import merge, read_config, unflatten
from spaces.schedules import sigma_at, stage_at
from tests.written_sweeps import attempt, make_arm, outcome, study, write_trial
from trainable.outcome import HEALTHY, CollapseVerdict, Effect, Outcome, Sample, StepReport

LIMIT = {"linear": 0.012, "rmsnorm": 0.06}
"""Sigma from which a run of these sweeps breaks."""
RULE, EVIDENCE = "entropy_high", "entropy 2.45 nats, baseline 0.612, 3 steps in a row"


def drawn_sweep(
    store: Path | str,
    *,
    arms: int = 7,
    replicates: int = 3,
    steps: int = 29,
    questions: int = 400,
    weights: int = 1,
    **changes: Any,
) -> StudyConfig:
    """A control and arms of rising sigma in turns on two kinds of module; those beyond LIMIT collapse. `weights`:
    noised ones of each layer."""
    settings = {"eval": {"questions": questions}, "grpo": {"steps": steps}}
    config = study(store, trials=arms, replicates=replicates, **{"settings": settings, **changes})
    save_study_config(config)
    for number in range(arms):
        arm = _arm(config, number, arms)
        write_arm(config, number, arm)
        for replicate in range(replicates):
            draw = random.Random(1000 * number + replicate)
            reports = steps_of(arm, draw)
            write_trial(config, arm, replicate, _ended(arm, replicate, reports, draw, weights), reports=reports)
    return config


def _arm(config: StudyConfig, number: int, arms: int) -> Arm:
    if number == 0:
        return make_arm(config, "control")
    kind, share = ("linear", "rmsnorm")[number % 2], number / max(arms - 1, 1)
    low, high = {"linear": (0.002, 0.02), "rmsnorm": (0.005, 0.1)}[kind]
    sigma = low * (high / low) ** share
    drawn = {"noise.modules": [kind], "noise.sigma_start": sigma, "noise.sigma_end": sigma / 10}
    params = {"noise.modules": kind, f"noise.sigma_start|{kind}": sigma, "noise.sigma_end": 0.001}
    tree = merge(base_tree(config), unflatten(drawn))
    return Arm(name=f"c{number:02d}", origin="searcher", config=read_config(tree), params=params)


def broken_from(arm: Arm, draw: random.Random) -> int | None:
    """The first broken step, of an arm whose sigma is beyond its limit give or take: among the first noisy ones."""
    noise, steps = arm.config.noise, arm.config.grpo.steps
    if noise.sigma_start < LIMIT[noise.modules[0]] * math.exp(draw.gauss(0, 0.2)):
        return None
    return next(step for step in range(steps) if sigma_at(noise, step, steps)) + draw.choice((0, 1, 3))


def steps_of(arm: Arm, draw: random.Random) -> list[StepReport]:
    noise, steps = arm.config.noise, arm.config.grpo.steps
    broken = None if noise.sigma_start == 0 else broken_from(arm, draw)
    last = steps - 1 if broken is None else min(broken + 2, steps - 1)
    reports = []
    for step in range(last + 1):
        share, bad = step / max(steps - 1, 1), broken is not None and step >= broken
        sigma = sigma_at(noise, step, steps)
        gain = 0.1 if noise.modules[0] == "rmsnorm" and 0 < noise.sigma_start < 0.03 else 0.0
        accuracy = 0.03 if bad else 0.2 + (0.35 + gain) * (1 - math.exp(-3 * share)) - 3 * sigma
        signals = {
            "rin/sigma": sigma,
            "grpo/reward": accuracy + draw.gauss(0, 0.02),
            "grpo/accuracy": accuracy + draw.gauss(0, 0.02),
            "gen/entropy": 2.5 if bad else 0.6 - 0.3 * share + 4 * sigma + draw.gauss(0, 0.02),
            "gen/length": 6 + draw.gauss(0, 0.1),
            "gen/gibberish": 0.3 if bad else 0.2 * sigma,
            "gen/truncated": 0.4 if bad else 0.02,
            "filter/all_wrong": 0.9 if bad else 0.4 - 0.2 * share,
            "filter/kept_groups": 2.0 if bad else 20.0,
            "filter/wasted": 0.0,
            "rollout_corr/kl": 0.8 if bad else 0.01 + 40 * sigma**2,
            "perf/rollout_seconds": 4.0,
            "perf/update_seconds": 5.0,
            "perf/step_seconds": 10.0,
        }
        ends = broken is not None and step == last
        verdict = CollapseVerdict(collapsed=True, rule=RULE, evidence=EVIDENCE) if ends else HEALTHY
        text = "+7<?9 zß" if bad else "579"
        samples = tuple(
            Sample(step=step, prompt=f"{123 + n}+456=", completion=text, answer=f"{579 + n}", reward=float(not bad))
            for n in range(2)
        )
        reports.append(
            StepReport(
                step=step, sigma=sigma, signals=signals, verdict=verdict, seconds=10.0, samples=samples, time_ms=step
            )
        )
    return reports


def _ended(arm: Arm, replicate: int, reports: Sequence[StepReport], draw: random.Random, weights: int) -> Outcome:
    asked, broke = arm.config.eval.questions, reports[-1].verdict.collapsed
    share = 0.15 if broke else reports[-1].signals["grpo/accuracy"] + draw.gauss(0, 0.01)
    ended = outcome(
        arm,
        replicate,
        max(0, min(asked, round(asked * share))),
        "collapsed" if broke else "completed",
        rule=RULE if broke else "",
        seconds=10.0 * len(reports),
    )
    effects = tuple(effects_of(arm, len(reports), weights))
    return replace(ended, step=len(reports), receipt=replace(ended.receipt, effects=effects))


def effects_of(arm: Arm, done: int, weights: int = 1) -> list[Effect]:
    """Small noise on linear layers is rounded away more, as MXFP4 does it."""
    noise, steps = arm.config.noise, arm.config.grpo.steps
    found: list[Effect] = []
    seen: set[int] = set()
    for step in range(done):
        stage, sigma = stage_at(noise, step, steps), sigma_at(noise, step, steps)
        if sigma == 0 or stage in seen:
            continue
        seen.add(stage)
        for layer, weight in product(range(8), range(weights)):
            applied = sigma * (0.98 if noise.modules[0] == "rmsnorm" else min(1.0, 0.3 + 20 * sigma) + 0.01 * layer)
            found.append(
                Effect(
                    stage=stage,
                    step=step,
                    name=f"layers.{layer}.x{weight or ''}",
                    layer=layer,
                    kind=noise.modules[0],
                    nominal=sigma,
                    applied=applied,
                    applied_relative=applied / (1.0 if noise.modules[0] == "rmsnorm" else 0.05),
                    changed=0.4,
                )
            )
    return found


def unfinished_trial(config: StudyConfig, arm: Arm, replicate: int, **more: Any) -> None:
    ending: Mapping[str, Any] = attempt(**more)
    write_trial(config, arm, replicate, None, attempts=[ending])

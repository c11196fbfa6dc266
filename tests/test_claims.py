"""One seed of each claim that the README makes about the embedded workload. Full replicates: `make science`,
docs/science.md.

These tests train (about 25 s each, and 2 minutes for the base where it is not cached). They assert what the product
promises of its own workload; differences between arms, which one seed cannot show, are reported by `make science` and
asserted nowhere.
"""

from functools import cache
from typing import Any

import pytest
import torch

from spaces.config import TrialConfig
from spaces.points import POINTS
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS
from trainable.outcome import Outcome
from trainable.trial import Trial

pytestmark = pytest.mark.slow


@cache
def run(point: str, *overrides: str) -> tuple[list[dict[str, Any]], Outcome]:
    config: TrialConfig = read_config(
        merge(WORKLOADS["embedded"].settings, POINTS[point].settings), ("eval.every=0", *overrides)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trial = Trial(config)
        reports = []
        while not trial.done:
            reports.append(trial.step().as_tree())
        return reports, trial.outcome()
    finally:
        torch.set_num_threads(threads)


def test_the_positive_control_gains_at_least_five_points() -> None:
    _, outcome = run("bf16")
    assert outcome.outcome == "completed"
    assert outcome.eval.accuracy - outcome.eval.accuracy_start >= 0.05


def test_w4a4_costs_accuracy_before_training_and_training_wins_some_back() -> None:
    _, quantised = run("control")
    _, plain = run("bf16")
    assert quantised.eval.parts_start["unsigned"] < plain.eval.parts_start["unsigned"] - 0.03
    assert quantised.eval.accuracy > quantised.eval.accuracy_start + 0.05


def test_the_healthy_control_raises_no_alarm_under_enforce() -> None:
    _, outcome = run("control")
    assert (outcome.outcome, outcome.step) == ("completed", 29)


def test_e13i_baseline_collapses_by_filter_rejection_in_the_first_noisy_step() -> None:
    reports, outcome = run("e13i-baseline")
    assert (outcome.outcome, outcome.rule) == ("collapsed", "filter_rejection")
    assert [r["sigma"] for r in reports] == [0.0, 0.0, 0.0, 0.05]
    assert reports[-1]["step"] == 3
    assert "groups with variance after 5 batches" in reports[-1]["verdict"]["evidence"]
    assert outcome.eval.n == 2048, "a collapsed trial is evaluated all the same"


def test_without_the_filter_the_same_noise_is_stopped_by_another_named_rule() -> None:
    _, outcome = run("e13i-v4-filter-off")
    assert outcome.outcome == "collapsed"
    assert outcome.rule not in ("", "filter_rejection", "nonfinite")


def test_without_the_filter_and_only_watched_it_completes_with_alarms() -> None:
    _, outcome = run("e13i-v4-filter-off", "collapse.mode=monitor")
    assert (outcome.outcome, outcome.step) == ("completed", 29)
    assert outcome.alarms


def test_e13m_rmsnorm_does_not_collapse() -> None:
    _, outcome = run("e13m-rmsnorm")
    assert (outcome.outcome, outcome.step) == ("completed", 29)


def test_the_receipt_shows_that_the_smallest_sigmas_do_not_arrive_on_linear_weights() -> None:
    _, outcome = run("e13i-v4-filter-off", "collapse.mode=monitor")
    effects = outcome.receipt.effects
    assert {e.stage for e in effects} == set(range(1, 10))
    first = [e for e in effects if e.stage == 1]
    assert len(first) == 56
    assert all(0.5 < e.applied / e.nominal < 2 for e in first)
    assert any("stage 9, linear: 56 of 56" in w for w in outcome.receipt.warnings)


def test_a_real_pretrained_model_takes_a_grpo_step_in_w4a4(smollm2: str) -> None:
    """SmolLM2-135M from its PyPI package, on a reasoning-gym task; sizes cut down, arithmetic untouched."""
    sizes = (
        f"model.name={smollm2}",
        "grpo.steps=1",
        "grpo.prompts=2",
        "grpo.group_size=2",
        "grpo.updates_per_step=1",
        "eval.questions=2",
        "noise.num_stages=1",
    )
    config = read_config(merge(WORKLOADS["smollm2-135m"].settings, POINTS["e13i-v3"].settings), sizes)
    trial = Trial(config)
    report = trial.step()
    assert trial.done
    assert len(trial.policy.quantized) == 210
    assert report.sigma == 0.05
    assert 0 < report.signals["gen/entropy"] < 11
    outcome = trial.outcome()
    assert len(outcome.receipt.noised) == 60
    assert all(0.8 < e.applied / e.nominal < 1.2 for e in outcome.receipt.effects)

"""pass@k is unbiased and its interval holds the truth: by enumeration, by drawing, at every edge. In a trial it is
drawn beside everything else and moves nothing."""

import math
import re
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import special

from tests.conftest import Tiny
from tests.test_trial import (
    TWO_DIGITS,
    comparable,
    comparable_outcome,
    finish,
    same_weights,
    weights_of,
    with_checksums,
)
from trainable.pass_at_k import chances, interval, metrics, pass_at, per_question, shown
from trainable.trial import Trial

SAMPLED = ("eval.samples=4", "eval.questions=48", "grpo.steps=2", "eval.every=1", "noise.num_stages=2", *TWO_DIGITS)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_one_question_is_every_choice_of_k_among_its_samples(samples: int) -> None:
    for right in range(samples + 1):
        drawn = [1] * right + [0] * (samples - right)
        for k in range(1, samples + 1):
            choices = list(combinations(drawn, k))
            assert chances(samples, k)[right] == float(Fraction(sum(map(any, choices)), len(choices)))


def test_where_nothing_or_everything_is_right_it_is_0_or_1_at_every_k() -> None:
    for samples in (1, 8, 256):
        for k in (1, samples // 2 or 1, samples):
            assert (chances(samples, k)[0], chances(samples, k)[samples]) == (0.0, 1.0)
    assert chances(256, 256)[1] == 1.0, "of all samples, one right one is always among them"
    assert chances(256, 1)[64] == 0.25
    assert chances(256, 128)[1] == 0.5, "numbers of choices beyond any float"


def test_its_mean_over_draws_is_the_truth_where_the_obvious_estimate_is_too_low() -> None:
    """256,000 questions with a chance of 0.2, 8 samples each: pass@4 is 1 - 0.8^4."""
    right = np.random.default_rng(0).binomial(8, 0.2, 256_000)
    truth = 1 - 0.8**4
    error = 4 * math.sqrt(truth * (1 - truth) / len(right))
    assert pass_at(right.tolist(), 8, 4).share == pytest.approx(truth, abs=error)
    assert float((1 - (1 - right / 8) ** 4).mean()) < truth - 5 * error


def test_the_mean_over_questions_is_that_of_the_questions() -> None:
    right = [0, 3, 8, 8, 1, 5]
    for k in (1, 3, 8):
        assert pass_at(right, 8, k).share == pytest.approx(float(np.mean(per_question(right, 8, k))))


# chances of questions: (a, b) of a beta distribution; half of them hopeless and half certain, but for a little
@pytest.mark.parametrize("spread", [(0.3, 0.7), (8, 8), (0.05, 0.05), (1, 30)])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_the_interval_holds_the_truth_in_about_95_of_100(spread: tuple[float, float], k: int) -> None:
    """Truth: over all questions there are. 60 questions in 1,000 draws: few, and skewed where nearly all are right."""
    rng = np.random.default_rng(k)
    a, b = spread
    truth = 1 - float(special.beta(a, b + k) / special.beta(a, b))
    held = 0
    for right in rng.binomial(8, rng.beta(*spread, (1000, 60))).tolist():
        at = pass_at(right, 8, k)
        held += at.low <= truth <= at.high
    assert 0.91 <= held / 1000 <= 0.985


@pytest.mark.parametrize("right", [[0] * 20, [8] * 20, [3] * 20, [3]])
def test_an_interval_has_a_width_where_every_question_came_to_the_same(right: list[int]) -> None:
    at = pass_at(right, 8, 1)
    assert 0 <= at.low <= at.share <= at.high <= 1
    assert at.high - at.low > 0.1


def test_an_interval_is_between_those_of_as_many_tosses_as_questions_and_as_samples() -> None:
    right = [2, 4, 5, 3, 4, 6, 2, 4] * 20  # nearer to each other than tosses of one coin would be
    at, share = pass_at(right, 8, 1), sum(right) / 8 / 160
    widest, narrowest = interval(share, 0.0, 160, 160), interval(share, 0.0, 160 * 8, 160 * 8)
    assert widest[0] < at.low <= narrowest[0] < narrowest[1] <= at.high < widest[1]


def test_metrics_have_a_name_that_mlflow_takes_for_every_k() -> None:
    found = metrics([1, 2, 0], 3)
    assert list(found) == [f"eval/pass_at_{k}{end}" for k in (1, 2, 3) for end in ("", "_low", "_high")]
    assert all(re.fullmatch(r"[\w\-. :/]+", name, re.ASCII) for name in found), "what MLflow's own check says"
    assert metrics([], 0) == metrics([], 8) == {}


def test_tables_show_powers_of_two_and_the_last() -> None:
    assert [shown(n) for n in (0, 1, 6, 8)] == [[], [1], [1, 2, 4, 6], [1, 2, 4, 8]]


# --- in a trial -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(tiny: Tiny) -> Any:
    trial = with_checksums(Trial(tiny(*SAMPLED)))
    reports = finish(trial)
    return trial, reports, trial.outcome()


def test_samples_change_no_other_number_of_a_trial(tiny: Tiny, sampled: Any) -> None:
    trial, reports, outcome = sampled
    plain = with_checksums(Trial(tiny(*SAMPLED, "eval.samples=0")))
    names = {name for report in reports for name in report.signals if "pass_at" in name}
    assert names == {f"{name}{end}" for name in metrics([0], 4) for end in ("", "_start")}
    assert [comparable(r) for r in finish(plain)] == [comparable(r, without=tuple(names)) for r in reports]
    assert same_weights(weights_of(plain), weights_of(trial))
    without, given = comparable_outcome(plain.outcome()), comparable_outcome(outcome)
    assert without["eval"]["right"] == without["eval"]["right_start"] == ()
    for tree in (without, given):
        del tree["config"]["eval"]["samples"], tree["eval"]["right"], tree["eval"]["right_start"]
    assert without == given


def test_counts_are_kept_per_question_before_and_after_and_metrics_follow_from_them(sampled: Any) -> None:
    _, reports, outcome = sampled
    scores = outcome.eval
    assert len(scores.right) == len(scores.right_start) == 48
    assert {*scores.right, *scores.right_start} <= set(range(5))
    assert scores.right != scores.right_start
    assert len({*scores.right}) > 2, "samples of one question differ"
    assert reports[-1].signals["eval/pass_at_3"] == pass_at(scores.right, 4, 3).share
    assert reports[0].signals["eval/pass_at_3_low_start"] == pass_at(scores.right_start, 4, 3).low
    assert type(outcome).from_tree(outcome.as_tree()).eval == scores


def test_the_same_trial_draws_the_same_samples_and_another_seed_others(tiny: Tiny, sampled: Any) -> None:
    _, _, outcome = sampled
    assert [
        with_checksums(trial).outcome().eval.right_start == outcome.eval.right_start
        for trial in (Trial(tiny(*SAMPLED)), Trial(tiny(*SAMPLED, "seed=1")))
    ] == [True, False]


def test_each_part_of_the_samples_is_heard_to_begin(tiny: Tiny) -> None:
    """So that many samples are not taken for one evaluation that hangs."""
    heard: dict[str, list[str]] = {"eval.samples=0": [], "eval.samples=4": []}
    for samples, phases in heard.items():
        trial = Trial(tiny(*SAMPLED, samples, "eval.batch_size=48"), on_phase=phases.append)
        trial.outcome()
    counts = [phases.count("evaluate") for phases in heard.values()]
    assert counts[1] - counts[0] == 48 * 4 // 48 + 1


def test_a_trial_that_is_asked_before_its_end_draws_none_and_the_end_is_the_undisturbed_one(
    tiny: Tiny, sampled: Any
) -> None:
    """It may be waited for. What it drew before its first step stays."""
    trial = with_checksums(Trial(tiny(*SAMPLED)))
    trial.step()
    stopped = trial.outcome()
    assert (stopped.outcome, stopped.eval.right) == ("stopped", ())
    assert stopped.eval.right_start == sampled[2].eval.right_start
    finish(trial)
    assert trial.outcome().eval == sampled[2].eval


def test_samples_are_of_the_clean_model_at_the_rollouts_temperature(tiny: Tiny) -> None:
    """At a temperature near 0 all samples are the greedy answer, in the middle of a noisy run."""
    noisy = ("noise.num_stages=1", "noise.sigma_start=1", "noise.sigma_end=1", "rollout.temperature=1e-4")
    trial = with_checksums(Trial(tiny(*SAMPLED, *noisy, "collapse.mode=off", "grpo.steps=1")))
    trial.step()
    scores = trial.outcome().eval
    assert list(scores.right) == [4 * correct for correct in scores.correct]
    assert 0 < sum(scores.correct) < 48

"""Nothing is called better inside the interval; the interval is the paired t-test's."""

import math
import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from search.statistics import MIN_REPLICATES, Comparison, compare


def arms(seed: int, replicates: int) -> tuple[list[float], list[float]]:
    """Accuracies of two arms that share the luck of their seeds."""
    rng = random.Random(seed)
    luck = [rng.gauss(0.5, 0.05) for _ in range(replicates)]
    effect = rng.choice([0.0, 0.01, -0.03, 0.1])
    return [x + effect + rng.gauss(0, 0.01) for x in luck], [x + rng.gauss(0, 0.01) for x in luck]


@pytest.mark.parametrize("replicates", [2, 3, 5, 10])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_the_interval_is_that_of_scipys_paired_t_test(replicates: int, confidence: float, seed: int) -> None:
    treated, control = arms(seed, replicates)
    test: Any = stats.ttest_rel(treated, control)
    interval = test.confidence_interval(confidence)
    result = compare(treated, control, confidence=confidence)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert result.difference == pytest.approx(sum(treated) / replicates - sum(control) / replicates)
    assert result.replicates == replicates
    if replicates >= MIN_REPLICATES:  # better or worse exactly where the test rejects
        assert (result.verdict in ("better", "worse")) == (test.pvalue < 1 - confidence)
        assert result.verdict != ("better" if test.statistic < 0 else "worse")


def test_exchanging_the_arms_turns_the_verdict_around() -> None:
    turned = {"better": "worse", "worse": "better", "same": "same", "undecided": "undecided"}
    for seed in range(20):
        treated, control = arms(seed, 4)
        there, back = compare(treated, control), compare(control, treated)
        assert back.verdict == turned[there.verdict]
        assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))


# treated, control (0.5 throughout), verdict at 95 % and a margin of one point
VERDICTS: list[tuple[list[float], str]] = [
    ([0.60, 0.61, 0.62], "better"),
    ([0.40, 0.39, 0.38], "worse"),
    ([0.501, 0.500, 0.499], "same"),
    ([0.500, 0.500, 0.500], "undecided"),  # copies: no spread was measured, and nothing is known of the questions
    ([0.503, 0.502, 0.503, 0.502], "better"),  # small, but outside of its own interval
    ([0.52, 0.48, 0.51], "undecided"),  # the interval is wider than the margin
    ([0.55, 0.60, 0.45, 0.50, 0.56], "undecided"),
    ([0.500, 0.505, 0.510], "undecided"),  # inside the margin on one side only
    ([0.500, 0.495, 0.490], "undecided"),
    ([0.70, 0.70], "undecided"),  # two replicates, whatever the difference
    ([0.90], "undecided"),
]


@pytest.mark.parametrize(("treated", "verdict"), VERDICTS)
def test_verdicts(treated: list[float], verdict: str) -> None:
    assert compare(treated, [0.5] * len(treated)).verdict == verdict


def test_pairing_by_seed_finds_what_the_spread_between_seeds_would_hide() -> None:
    control = [0.30, 0.45, 0.60, 0.75]
    treated = [x + d for x, d in zip(control, (0.020, 0.021, 0.019, 0.020), strict=True)]
    assert compare(treated, control).verdict == "better"
    assert compare(treated[::-1], control).verdict == "undecided"


@pytest.mark.parametrize(("margin", "verdict"), [(0.001, "undecided"), (0.02, "same")])
def test_the_margin_says_what_counts_as_the_same(margin: float, verdict: str) -> None:
    assert compare([0.501, 0.505, 0.496, 0.499], [0.5] * 4, margin=margin).verdict == verdict


def test_one_replicate_has_an_infinite_interval() -> None:
    assert compare([0.9], [0.5]) == Comparison(verdict="undecided", difference=0.4, low=-math.inf, high=math.inf, replicates=1)


def test_arrays_are_taken_and_plain_floats_given_back() -> None:
    treated, control = arms(1, 3)
    result = compare(np.array(treated), np.array(control))  # type: ignore[arg-type]
    assert result == compare(treated, control)
    assert {type(value) for value in (result.difference, result.low, result.high)} == {float}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_accuracy_that_is_not_finite_is_an_error(bad: float, place: int) -> None:
    values = [0.5, 0.6, 0.7]
    broken = [bad if i == place else value for i, value in enumerate(values)]
    for treated, control in ((broken, values), (values, broken)):
        with pytest.raises(ValueError, match="not finite"):
            compare(treated, control)


@pytest.mark.parametrize(("treated", "control"), [([], []), ([0.5], []), ([0.5, 0.6], [0.5])])
def test_unequal_or_empty_arms_are_an_error(treated: list[float], control: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(treated)} and {len(control)}"):
        compare(treated, control)

"""Looking again and again keeps the error level. Oracles: scipy's t tests, statsmodels' power, the tables of Jennison &
Turnbull."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.power import TTestPower

from search.sequential import SequentialRule, sequential_compare
from search.statistics import compare
from spaces.errors import ConfigError
from tests.test_statistics import answers


def sequences(paths: int, replicates: int, seed: int, effect: float = 0.0) -> NDArray[np.float64]:
    return 0.5 + np.random.default_rng(seed).normal(effect, 0.02, (paths, replicates))


@pytest.mark.parametrize(
    "rule",
    [
        SequentialRule(),
        SequentialRule(looks=(3, 5, 8)),
        SequentialRule(looks=(3, 4, 5, 6, 7, 8)),
        SequentialRule(level=0.2),
    ],
    ids=str,
)
def test_all_looks_together_keep_the_level(rule: SequentialRule) -> None:
    """200,000 experiments without a difference: the t tests of all looks at their levels reject together in `level` of
    them."""
    x = sequences(200_000, rule.looks[-1], seed=11) - 0.5
    rejected = np.zeros(len(x), dtype=bool)
    for look, level in zip(rule.looks, rule.levels(rule.looks), strict=True):
        t = stats.ttest_1samp(x[:, :look], 0, axis=1)
        rejected |= t.pvalue < level
    assert rejected.mean() == pytest.approx(rule.level, abs=4 * math.sqrt(rule.level / len(x)) + 0.0005)


def test_levels_of_looks_are_those_of_the_normal_design_for_many_replicates() -> None:
    """Pocock's spending at five equal looks: boundaries of Jennison & Turnbull (2000), table 7.x, as z values."""
    looks = (400, 800, 1200, 1600, 2000)
    z = [stats.norm.isf(level / 2) for level in SequentialRule(looks=looks).levels(looks)]
    assert z == pytest.approx([2.438, 2.427, 2.410, 2.397, 2.386], abs=0.02)


def test_a_decision_at_a_look_stands() -> None:
    treated = [0.60, 0.605, 0.61, 0.60, 0.605, 0.1, 0.2, 0.3]
    first = sequential_compare(treated[:5], [0.5] * 5)
    assert first.verdict == "better"
    assert sequential_compare(treated, [0.5] * 8) == first


def test_what_a_look_needs_is_counted_at_the_level_of_the_last() -> None:
    treated = [0.52, 0.48, 0.53, 0.51, 0.53]
    rule = SequentialRule(looks=(5, 8, 12), level=0.1)
    result = sequential_compare(treated, [0.5] * 5, rule=rule, margin=0.0)
    first, *_, last = rule.levels(rule.looks)
    assert result.level == first
    total = TTestPower().solve_power(effect_size=result.difference / np.std(treated, ddof=1), alpha=last, power=0.8)
    assert result.needs == math.ceil(total) - 5


def test_between_looks_only_an_end_is_judged() -> None:
    treated, control = sequences(1, 7, seed=3)[0].tolist(), [0.5] * 7
    at_five = sequential_compare(treated[:5], control[:5])
    assert sequential_compare(treated, control) == at_five
    ended = sequential_compare(treated, control, final=True)
    assert (ended.replicates, ended.level) == (7, SequentialRule().levels((5, 7))[1])
    wide = compare(treated, control, confidence=1 - ended.level)
    assert (ended.low, ended.high) == pytest.approx((wide.low, wide.high), rel=1e-6)


def test_a_budget_that_ends_anywhere_keeps_the_level() -> None:
    """Ends at 3 to 20 replicates, whatever has been seen: 40,000 experiments without a difference through the levels of
    the looks."""
    rule = SequentialRule()
    rng = np.random.default_rng(8)
    x = sequences(40_000, 20, seed=12) - 0.5
    ends = rng.integers(3, 21, len(x))
    rejected = np.zeros(len(x), dtype=bool)
    for end in range(3, 21):
        taken = sorted({look for look in rule.looks if look <= end} | {end})
        mine = x[ends == end]
        hits = np.zeros(len(mine), dtype=bool)
        for look, level in zip(taken, rule.levels(taken), strict=True):
            hits |= stats.ttest_1samp(mine[:, :look], 0, axis=1).pvalue < level
        rejected[ends == end] = hits
    assert rejected.mean() < 0.05
    accuracies = (0.5 + x[0, :4]).tolist()
    assert sequential_compare(accuracies, [0.5] * 4).high == math.inf
    assert sequential_compare(accuracies, [0.5] * 4, final=True).high < math.inf


def test_intervals_of_all_looks_hold_the_truth_together() -> None:
    missed = 0
    for row in sequences(400, 12, seed=5, effect=0.01):
        results = [
            sequential_compare(row[:n].tolist(), [0.5] * n, rule=SequentialRule(looks=(5, 8, 12))) for n in (5, 8, 12)
        ]
        missed += any(not r.low <= 0.01 <= r.high for r in results)
    assert missed / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_before_the_first_look_nothing_is_said() -> None:
    result = sequential_compare([0.9, 0.91, 0.92, 0.93], [0.5] * 4)
    assert (result.verdict, result.low, result.high) == ("undecided", -math.inf, math.inf)


def test_the_same_is_found_by_looking_too_and_answers_are_passed_on() -> None:
    sides = answers(np.random.default_rng(1), 8, 4000)
    accuracies = [side.mean(axis=1).tolist() for side in sides]
    result = sequential_compare(*accuracies, correct=sides, margin=0.03)
    assert result.verdict == "same"
    assert sequential_compare(*accuracies, correct=sides, margin=0.0001).replicates == 8
    copies = answers(np.random.default_rng(1), 5, 4000, copies=True)
    accuracies = [side.mean(axis=1).tolist() for side in copies]
    assert sequential_compare(*accuracies, correct=copies).se == compare(*accuracies, correct=copies).se
    assert sequential_compare(*accuracies).se is None, "without the answers copies say nothing"


def test_rules_that_cannot_work_are_the_users_mistake() -> None:
    for looks in ((), (2, 5), (5, 5), (8, 5)):
        with pytest.raises(ConfigError, match="looks"):
            SequentialRule(looks=looks)
    with pytest.raises(ConfigError, match="level"):
        SequentialRule(level=5)
    with pytest.raises(ValueError, match="the level is spent"):
        sequential_compare([0.5] * 6, [0.5] * 6, rule=SequentialRule(looks=(3, 5)))

"""Nothing is called better inside the interval; the interval is the paired t-test's, and wider where replicates cannot
see the spread.

Oracles: scipy's tests, statsmodels' power, Holm's correction and binomial intervals.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from search.replicates import MIN_REPLICATES, Replicate
from search.statistics import Comparison, adjust, compare, compare_arms


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
    assert compare([0.9], [0.5]) == Comparison(
        verdict="undecided", difference=0.4, low=-math.inf, high=math.inf, replicates=1
    )


def test_arrays_are_taken_and_plain_floats_given_back() -> None:
    treated, control = arms(1, 3)
    result = compare(np.array(treated), np.array(control))  # type: ignore[arg-type]
    assert result == compare(treated, control)
    assert {type(value) for value in (result.difference, result.low, result.high)} == {float}


@pytest.mark.parametrize("bad", [72.0, 1.001, -0.01])
def test_an_accuracy_that_is_no_share_is_an_error(bad: float) -> None:
    for treated, control in (([0.5, bad], [0.5, 0.6]), ([0.5, 0.6], [bad, 0.6])):
        with pytest.raises(ValueError, match=r"a share from 0 to 1 \(0\.72, not 72\)"):
            compare(treated, control)
    assert compare([0.0, 1.0], [1.0, 0.0]).difference == 0


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


# What replicates cannot see: the questions they share.


def answers(
    rng: np.random.Generator,
    replicates: int,
    questions: int,
    *,
    run_sd: float = 0.0,
    lean: float = 0.0,
    copies: bool = False,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Answers [replicates, questions] of two arms of equal accuracy over all questions there are, to a sample of them.

    `lean`: how much the arms differ from question to question, a share; `copies`: seeds change nothing.
    """
    hard = rng.beta(6, 2, questions)
    leaning = rng.normal(0, lean, questions) / 2
    sides = []
    for sign in (1, -1):
        chances = np.clip(hard + sign * leaning + rng.normal(0, run_sd, (replicates, 1)), 0, 1)
        drawn = rng.random((replicates, questions)) < chances
        sides.append(np.repeat(drawn[:1], replicates, axis=0) if copies else drawn)
    return sides[0], sides[1]


def judged(sides: tuple[NDArray[np.bool_], NDArray[np.bool_]], **settings: Any) -> Comparison:
    return compare(sides[0].mean(axis=1).tolist(), sides[1].mean(axis=1).tolist(), correct=sides, **settings)


def test_identical_replicates_leave_what_the_questions_leave_open() -> None:
    """Copies of one run are one run: the interval is that of the paired differences over questions, whatever the number
    of copies."""
    sides = answers(np.random.default_rng(0), 5, 400, copies=True)
    result = judged(sides)
    over_questions: Any = stats.ttest_rel(sides[0][0].astype(float), sides[1][0].astype(float))
    interval = over_questions.confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert result.p == pytest.approx(over_questions.pvalue)
    assert result.words() == "undecided, needs more questions: replicates alone will not decide"


def test_arms_that_agree_on_every_question_still_have_an_interval() -> None:
    right = np.tile(np.arange(500) % 4 > 0, (5, 1))
    result = judged((right, right))
    assert result.difference == 0
    assert result.high == pytest.approx(1.9647 * math.sqrt(2) / 500, rel=1e-3)
    assert result.verdict == "same"


@pytest.mark.parametrize(
    ("accuracy", "questions", "verdict", "half"),
    [
        (0.75, 2048, "undecided", 1.9611 * math.sqrt(2 * 0.1875 / 2048)),  # the binomial spread of one run of each arm
        (0.75, 100_000, "same", 1.9600 * math.sqrt(2 * 0.1875 / 100_000)),
        (1.0, 2048, "same", 1.9611 * math.sqrt(2) / 2048),
    ],
)
def test_the_number_of_questions_alone_keeps_identical_accuracies_from_being_certain(
    accuracy: float, questions: int, verdict: str, half: float
) -> None:
    result = compare([accuracy] * 5, [accuracy] * 5, questions=questions)
    assert (result.verdict, result.high) == (verdict, pytest.approx(half, rel=1e-3))


def test_a_spread_that_questions_explain_is_left_alone() -> None:
    treated, control = arms(3, 5)
    assert compare(treated, control, questions=2048) == compare(treated, control)


def test_identical_accuracies_with_nothing_known_of_the_questions_decide_nothing() -> None:
    result = compare([0.9] * 4, [0.5] * 4)
    assert (result.verdict, result.low, result.high, result.p) == ("undecided", -math.inf, math.inf, None)
    assert "identical" in result.words()


def test_answers_never_narrow_the_paired_interval() -> None:
    for seed in range(30):
        sides = answers(np.random.default_rng(seed), 3 + seed % 4, 200, run_sd=0.02 * (seed % 3), lean=0.1 * (seed % 2))
        plain = compare(sides[0].mean(axis=1).tolist(), sides[1].mean(axis=1).tolist())
        full = judged(sides)
        assert full.high - full.low >= (plain.high - plain.low) * (1 - 1e-12)
        assert full.difference == pytest.approx(plain.difference)


@pytest.mark.parametrize(("lean", "copies"), [(0.0, False), (0.25, False), (0.0, True)])
def test_intervals_hold_the_truth_in_95_of_100_when_seeds_do_not_matter(lean: float, copies: bool) -> None:
    """Truth: equal over all questions there are. With a lean towards questions the plain paired t interval holds it too
    rarely."""
    rng = np.random.default_rng(1)
    held, plain = [], []
    for _ in range(1000):
        sides = answers(rng, 5, 300, lean=lean, copies=copies)
        result, naive = judged(sides), compare(sides[0].mean(axis=1).tolist(), sides[1].mean(axis=1).tolist())
        held.append(result.low <= 0 <= result.high)
        plain.append(naive.low <= 0 <= naive.high)
    assert 0.93 <= np.mean(held) <= 0.975
    if lean:
        assert np.mean(plain) < 0.93


def test_the_standard_error_is_the_spread_of_the_simulated_differences() -> None:
    """Over 400 worlds with runs that vary by 2 points and arms that suit different questions."""
    rng = np.random.default_rng(2)
    results = [judged(answers(rng, 6, 300, run_sd=0.02, lean=0.2)) for _ in range(400)]
    spread = np.std([result.difference for result in results])
    assert math.sqrt(np.mean([(result.se or 0) ** 2 for result in results])) == pytest.approx(spread, rel=0.1)


def test_answers_that_do_not_belong_to_the_accuracies_are_an_error() -> None:
    sides = answers(np.random.default_rng(0), 3, 50)
    accuracies = [side.mean(axis=1).tolist() for side in sides]
    with pytest.raises(ValueError, match="do not add up"):
        compare(accuracies[1], accuracies[0], correct=sides)
    with pytest.raises(ValueError, match=r"\(3, 50\) and \(3, 49\)"):
        compare(*accuracies, correct=(sides[0], sides[1][:, 1:]))
    with pytest.raises(ValueError, match="do not add up"):
        compare(*accuracies, correct=(sides[0] * 0.5, sides[1]))
    for wrong in (2.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="right \\(1\\), wrong"):
            compare(*accuracies, correct=(sides[0] * wrong, sides[1]))


@pytest.mark.parametrize("confidence", [0.0, 0.3, 0.5, 1.0, 95.0])
def test_a_confidence_that_is_no_share_is_an_error(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        compare([0.5, 0.6, 0.7], [0.5, 0.6, 0.6], confidence=confidence)


# The words.

WORDS: list[tuple[list[float], str]] = [
    ([0.60, 0.61, 0.62], "better"),
    ([0.40, 0.39, 0.38], "worse"),
    ([0.501, 0.500, 0.499], "same within ±1 points"),
    ([0.70, 0.705], "undecided, needs about 1 more replicate"),
    ([0.90], "undecided, needs at least 2 more replicates"),
]


@pytest.mark.parametrize(("treated", "words"), WORDS)
def test_words(treated: list[float], words: str) -> None:
    assert compare(treated, [0.5] * len(treated)).words() == words


def test_the_words_name_the_margin() -> None:
    assert compare([0.501, 0.500, 0.499], [0.5] * 3, margin=0.005).words() == "same within ±0.5 points"


def test_needs_is_what_the_power_of_the_t_test_says() -> None:
    """No margin, so that only better or worse can decide."""
    treated = [0.53, 0.47, 0.54, 0.50, 0.53]
    result = compare(treated, [0.5] * 5, margin=0.0)
    total = TTestPower().solve_power(effect_size=result.difference / np.std(treated, ddof=1), alpha=0.05, power=0.8)
    assert result.needs == math.ceil(total) - 5
    assert result.words() == f"undecided, needs about {result.needs} more replicates"


def test_about_so_many_more_replicates_do_decide_in_four_of_five() -> None:
    rng = np.random.default_rng(4)
    needed = compare([0.5 + 0.008 + x for x in (-0.02, 0.01, 0.03, -0.02, 0.0)], [0.5] * 5).needs
    assert needed is not None
    sd = float(np.std([-0.02, 0.01, 0.03, -0.02, 0.0], ddof=1))
    decided = [
        compare(rng.normal(0.508, sd, 5 + needed).tolist(), [0.5] * (5 + needed)).verdict != "undecided"
        for _ in range(500)
    ]
    assert 0.75 <= np.mean(decided) <= 0.95  # better or same: a little more than four of five


# Arms whose seeds do not all match.


def runs(accuracies: Sequence[float], collapsed: Sequence[int] = (), seeds: Sequence[int] = ()) -> list[Replicate]:
    numbers = seeds or range(len(accuracies))
    return [Replicate(seed=k, accuracy=a, collapsed=k in collapsed) for k, a in zip(numbers, accuracies, strict=True)]


def test_arms_are_compared_on_the_seeds_of_both_whatever_their_order() -> None:
    treated, control = arms(7, 6)
    some = runs([treated[k] for k in (4, 0, 3, 2, 1)], seeds=(4, 0, 3, 2, 1))
    others = runs([control[k] for k in (1, 5, 3, 4, 2)], seeds=(1, 5, 3, 4, 2))
    seen = compare_arms(some, others).primary
    assert seen == replace(compare(treated[1:5], control[1:5]), unpaired=2)
    oracle: Any = stats.ttest_rel(treated[1:5], control[1:5])
    assert (seen.p, seen.df, seen.replicates) == (pytest.approx(oracle.pvalue), 3, 4)


# seeds of the treated arm, seeds of the control, pairs, words
TOO_FEW: list[tuple[tuple[int, ...], tuple[int, ...], int, str]] = [
    ((0, 1, 2, 3), (10, 11, 12), 0, "undecided: no seed in both arms, needs at least 3 more replicates"),
    ((0, 1, 2, 3), (3, 4, 5), 1, "undecided: one seed in both arms, needs at least 2 more replicates"),
    ((0,), (0,), 1, "undecided, needs at least 2 more replicates"),
]


@pytest.mark.parametrize(("ours", "theirs", "pairs", "words"), TOO_FEW)
def test_fewer_than_two_common_seeds_decide_nothing_and_say_why(
    ours: tuple[int, ...],
    theirs: tuple[int, ...],
    pairs: int,
    words: str,
) -> None:
    """However far apart the arms are: their own spreads say nothing about pairs."""
    treated = runs([0.90 + 0.001 * k for k in range(len(ours))], seeds=ours)
    control = runs([0.10 + 0.001 * k for k in range(len(theirs))], seeds=theirs)
    seen = compare_arms(treated, control).primary
    assert (seen.verdict, seen.low, seen.high, seen.p) == ("undecided", -math.inf, math.inf, None)
    assert (seen.replicates, seen.unpaired) == (pairs, len(ours) + len(theirs) - 2 * pairs)
    assert seen.difference == pytest.approx(0.8 if pairs else math.nan, abs=0.005, nan_ok=True)
    assert seen.words() == words
    assert adjust({"arm": seen})["arm"] == seen


def test_two_common_seeds_have_an_interval_and_no_verdict() -> None:
    seen = compare_arms(runs([0.9, 0.91, 0.92]), runs([0.1, 0.1], seeds=(1, 2))).primary
    assert (seen.verdict, seen.replicates, seen.unpaired) == ("undecided", 2, 1)
    assert seen.low > 0


def test_answers_of_common_seeds_are_used_and_without_them_the_number_of_questions() -> None:
    sides = answers(np.random.default_rng(3), 4, 60)
    treated, control = (
        [
            Replicate(seed=k, accuracy=row.mean(), collapsed=False, correct=tuple(row.tolist()))
            for k, row in enumerate(side)
        ]
        for side in sides
    )
    assert compare_arms(treated, control).primary == judged(sides)
    part = judged((sides[0][1:], sides[1][1:]))
    assert compare_arms(treated[1:], control).primary == replace(part, unpaired=1)
    copies = runs([0.5] * 5)
    known = [replace(run, correct=(True, False) * 500) for run in copies[:1]] + copies[1:]
    assert compare_arms(known, copies).primary == compare([0.5] * 5, [0.5] * 5, questions=1000)


# Intention to treat.


def test_a_collapsed_run_keeps_its_place() -> None:
    """What survived looks better than control; the arm as a whole does not."""
    control = runs([0.75, 0.74, 0.76, 0.75, 0.74, 0.75])
    treated = runs([0.781, 0.770, 0.790, 0.779, 0.40, 0.35], collapsed=(4, 5))
    result = compare_arms(treated, control)
    assert result.primary == compare([run.accuracy for run in treated], [run.accuracy for run in control])
    assert result.primary.verdict != "better"
    assert result.completed is not None
    assert (result.completed.verdict, result.completed.replicates, result.completed.unpaired) == ("better", 4, 2)


def test_an_arm_that_always_collapses_has_no_completed_comparison() -> None:
    result = compare_arms(runs([0.5] * 5, collapsed=range(5)), runs([0.7, 0.71, 0.72, 0.70, 0.69]))
    assert result.completed is None
    assert result.primary.verdict == "worse"
    assert result.risk_p == pytest.approx(2 / 2**10)  # both halves of the only extreme tables


@pytest.mark.parametrize(("collapsed", "of"), [(0, 5), (1, 3), (5, 5), (3, 8)])
def test_collapse_intervals_are_clopper_and_pearsons(collapsed: int, of: int) -> None:
    risk = compare_arms(
        runs([0.5 + 0.01 * k for k in range(of)], collapsed=range(collapsed)), runs([0.6] * of)
    ).treated_risk
    assert (risk.low, risk.high) == pytest.approx(proportion_confint(collapsed, of, method="beta"), nan_ok=True)
    assert risk.probability == collapsed / of


def test_equal_risks_are_not_tested_into_a_difference() -> None:
    assert compare_arms(runs([0.5, 0.6, 0.7]), runs([0.5, 0.6, 0.8])).risk_p == 1.0
    assert compare_arms(runs([0.5, 0.6, 0.7], (0, 1, 2)), runs([0.5, 0.6, 0.8], (0, 1, 2))).risk_p == 1.0
    assert compare_arms(runs([0.5, 0.6, 0.7], (0,)), runs([0.5, 0.6, 0.8])).risk_p > 0.3


@pytest.mark.parametrize(("collapsed", "of"), [((4, 1), (5, 5)), ((3, 0), (8, 8)), ((2, 1), (3, 8))])
def test_the_risk_test_is_boschloos(collapsed: tuple[int, int], of: tuple[int, int]) -> None:
    """The largest probability, over the common risk, of tables that Fisher's test finds at least as extreme."""

    def fisher(a: int, b: int) -> float:
        """One-sided; Boschloo's two-sided value is twice the smaller one."""
        return float(stats.hypergeom.sf(a - 1, sum(of), of[0], a + b))

    seen = fisher(*collapsed)
    tables = [(a, b) for a in range(of[0] + 1) for b in range(of[1] + 1) if fisher(a, b) <= seen * (1 + 1e-9)]
    risks = np.linspace(0, 1, 20001)
    chance = sum(stats.binom.pmf(a, of[0], risks) * stats.binom.pmf(b, of[1], risks) for a, b in tables)
    arms_ = [runs([0.5 + 0.01 * k for k in range(n)], range(c)) for c, n in zip(collapsed, of, strict=True)]
    assert compare_arms(*arms_).risk_p == pytest.approx(2 * chance.max(), rel=1e-5)


def test_the_risk_test_never_rejects_more_often_than_its_level() -> None:
    """Every pair of outcomes of 5 against 5 runs, for every common probability on a grid: the exact size."""
    p = {}
    for a in range(6):
        for b in range(6):
            p[a, b] = compare_arms(runs([0.5] * 5, range(a)), runs([0.6] * 5, range(b))).risk_p
    for chance in np.linspace(0.05, 0.95, 19):
        weights = stats.binom.pmf(np.arange(6), 5, chance)
        assert sum(weights[a] * weights[b] for (a, b), value in p.items() if value < 0.05) <= 0.05


def test_a_seed_that_occurs_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="twice"):
        compare_arms([Replicate(seed=1, accuracy=0.5, collapsed=False)] * 2, runs([0.5, 0.6]))


# Several arms.


def several(count: int, seed: int) -> dict[str, Comparison]:
    rng = np.random.default_rng(seed)
    control = rng.normal(0.7, 0.02, 6)
    return {
        f"arm {k}": compare((control + 0.01 * (k % 3) + rng.normal(0, 0.01, 6)).tolist(), control.tolist(), margin=0.03)
        for k in range(count)
    }


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_corrected_p_values_are_holms(count: int) -> None:
    arms_ = several(count, count)
    rejected, p, _, _ = multipletests([c.p for c in arms_.values()], method="holm")
    corrected = adjust(arms_)
    assert [c.p for c in corrected.values()] == pytest.approx(list(p))
    assert [c.verdict in ("better", "worse") for c in corrected.values()] == list(rejected)


def test_simultaneous_intervals_are_those_of_a_higher_confidence() -> None:
    rng = np.random.default_rng(1)
    pairs = {name: (rng.normal(0.7, 0.01, 5).tolist(), rng.normal(0.7, 0.01, 5).tolist()) for name in "abcd"}
    corrected = adjust({name: compare(*pair) for name, pair in pairs.items()})
    for name, pair in pairs.items():
        wide = compare(*pair, confidence=1 - 0.05 / 4)
        assert (corrected[name].low, corrected[name].high) == pytest.approx((wide.low, wide.high))
        assert corrected[name].level == 0.05


def test_one_arm_needs_no_correction_and_an_undecidable_one_still_counts() -> None:
    single = several(1, 3)
    assert adjust(single) == {"arm 0": replace(single["arm 0"])}
    first = compare([0.52, 0.53, 0.54], [0.5] * 3)
    assert first.p is not None
    corrected = adjust({"a": first, "b": compare([0.9], [0.5])})
    assert corrected["a"].p == pytest.approx(2 * first.p)
    assert (corrected["b"].verdict, corrected["b"].p) == ("undecided", None)
    assert adjust({}) == {}


def test_arms_compared_at_different_levels_cannot_be_corrected_together() -> None:
    with pytest.raises(ValueError, match="different levels"):
        adjust({"a": compare([0.5, 0.6, 0.7], [0.5] * 3), "b": compare([0.5, 0.6, 0.7], [0.5] * 3, confidence=0.9)})

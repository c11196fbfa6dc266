"""Nothing is called better inside the interval; the interval is the paired t-test's, and wider where replicates cannot see the spread.

Oracles: scipy's tests, statsmodels (mixed model, power, Holm), and numbers recorded from R.
"""

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import statsmodels.formula.api as smf
from numpy.typing import NDArray
from scipy import integrate, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from search.statistics import (
    MIN_REPLICATES,
    Comparison,
    Replicate,
    SequentialRule,
    adjust,
    checkpoints_differ,
    compare,
    compare_arms,
    compare_by_seed,
    detectable_difference,
    mixed_model,
    replicates_needed,
    sequential_compare,
)
from spaces.errors import ConfigError


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


# What replicates cannot see: the questions they share.


def answers(
    rng: np.random.Generator, replicates: int, questions: int, *, run_sd: float = 0.0, lean: float = 0.0, copies: bool = False
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
    """Copies of one run are one run: the interval is that of the paired differences over questions, whatever the number of copies."""
    sides = answers(np.random.default_rng(0), 5, 400, copies=True)
    result = judged(sides)
    over_questions: Any = stats.ttest_rel(sides[0][0].astype(float), sides[1][0].astype(float))
    interval = over_questions.confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert result.p == pytest.approx(over_questions.pvalue)
    assert result.question_share == pytest.approx(1)
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
    """Truth: equal over all questions there are. With a lean towards questions the plain paired t interval holds it too rarely."""
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


def test_the_question_share_is_that_of_the_simulated_variances() -> None:
    """400 questions whose answers vary with 0.75 * 0.25 minus the spread of their difficulty; runs vary by 4 points."""
    rng = np.random.default_rng(2)
    results = [judged(answers(rng, 12, 400, run_sd=0.04)) for _ in range(60)]
    hard = stats.beta(6, 2)
    answer = 2 * (hard.mean() * (1 - hard.mean()) - hard.var()) / 400
    shares = [r.question_share for r in results if r.question_share is not None]
    assert np.mean(shares) == pytest.approx(answer / (answer + 2 * 0.04**2 * 0.9), abs=0.08)  # 0.9: chances end at 0 and 1
    assert np.mean([(r.question_se or 0) ** 2 for r in results]) == pytest.approx(answer / 12, rel=0.1)


def test_answers_that_do_not_belong_to_the_accuracies_are_an_error() -> None:
    sides = answers(np.random.default_rng(0), 3, 50)
    accuracies = [side.mean(axis=1).tolist() for side in sides]
    with pytest.raises(ValueError, match="do not add up"):
        compare(accuracies[1], accuracies[0], correct=sides)
    with pytest.raises(ValueError, match=r"\(3, 50\) and \(3, 49\)"):
        compare(*accuracies, correct=(sides[0], sides[1][:, 1:]))
    with pytest.raises(ValueError, match="right \\(1\\) or wrong"):
        compare(*accuracies, correct=(sides[0] * 0.5, sides[1]))


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
    decided = [compare(rng.normal(0.508, sd, 5 + needed).tolist(), [0.5] * (5 + needed)).verdict != "undecided" for _ in range(500)]
    assert 0.75 <= np.mean(decided) <= 0.95  # better or same: a little more than four of five


# Arms whose seeds do not all match.


def by_seed(accuracies: Sequence[float], seeds: Sequence[int]) -> dict[int, float]:
    return dict(zip(seeds, accuracies, strict=True))


# lmerTest::lmer(acc ~ arm + (1 | seed), REML = TRUE), R 4.2.2, lmerTest 3.1.3, lme4 1.1.31: estimate, standard error, df, p
RECORDED: list[tuple[dict[int, float], dict[int, float], tuple[float, float, float, float]]] = [
    (
        by_seed([0.752, 0.731, 0.768, 0.744, 0.759], [1, 2, 3, 4, 5]),
        by_seed([0.741, 0.722, 0.749, 0.751], [1, 2, 3, 6]),
        (0.0126275943905, 0.0029484755946, 2.29482437779, 0.039308685193),
    ),
    (
        by_seed([0.70, 0.74, 0.66, 0.72], [1, 2, 3, 4]),
        by_seed([0.69, 0.745, 0.67, 0.60, 0.77, 0.71], [1, 2, 3, 5, 6, 7]),
        (-0.00141370323285, 0.00598786173977, 2.02858441858, 0.835059962488),
    ),
    (  # seeds explain nothing: the fit is on its boundary
        by_seed([0.75, 0.71, 0.77, 0.73, 0.74], [1, 2, 3, 4, 5]),
        by_seed([0.72, 0.76, 0.70, 0.745, 0.73], [1, 2, 3, 4, 8]),
        (0.009, 0.0143527000944, 7.99999999995, 0.548093909974),
    ),
    (
        by_seed([0.61, 0.65, 0.58, 0.63, 0.66, 0.60, 0.64], [1, 2, 3, 4, 5, 6, 7]),
        by_seed([0.60, 0.63, 0.585], [1, 2, 3]),
        (0.00952665015741, 0.00710215023938, 2.19377747577, 0.301766100042),
    ),
]


@pytest.mark.parametrize(("treated", "control", "recorded"), RECORDED)
def test_the_mixed_model_is_lmertests(
    treated: dict[int, float], control: dict[int, float], recorded: tuple[float, float, float, float]
) -> None:
    fit = mixed_model(treated, control)
    p = 2 * stats.t.sf(abs(fit.difference) / fit.se, fit.df)
    assert (fit.difference, fit.se, fit.df, p) == pytest.approx(recorded, rel=1e-6)


@pytest.mark.parametrize(("treated", "control", "recorded"), RECORDED)
def test_unmatched_arms_are_judged_by_the_mixed_model_with_no_more_certainty_than_its_pairs(
    treated: dict[int, float], control: dict[int, float], recorded: tuple[float, float, float, float]
) -> None:
    result = compare_by_seed(treated, control)
    assert result.method == "mixed model"
    assert (result.difference, result.se) == pytest.approx(recorded[:2], rel=1e-6)
    df = min(recorded[2], len(treated.keys() & control.keys()) - 1)
    half = stats.t.ppf(0.975, df) * recorded[1]
    assert (result.low, result.high) == pytest.approx((recorded[0] - half, recorded[0] + half), abs=1e-7)


@pytest.mark.parametrize(("treated", "control", "recorded"), RECORDED)
def test_the_mixed_models_estimate_is_statsmodels_too(
    treated: dict[int, float], control: dict[int, float], recorded: tuple[float, float, float, float]
) -> None:
    rows = [(accuracy, arm, seed) for arm, runs in ((1, treated), (0, control)) for seed, accuracy in runs.items()]
    data = {name: [row[k] for row in rows] for k, name in enumerate(("accuracy", "arm", "seed"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = smf.mixedlm("accuracy ~ arm", data, groups=np.array(data["seed"])).fit(reml=True, method="powell")
    result = mixed_model(treated, control)
    assert result.difference == pytest.approx(fit.params["arm"], abs=2e-5)
    assert result.se == pytest.approx(fit.bse["arm"], rel=0.03)  # its Hessian is another one: it counts the variances in


def test_arms_with_the_same_seeds_are_the_paired_t_test_exactly() -> None:
    treated, control = arms(7, 5)
    seeds = [11, 3, 8, 1, 20]
    again = dict(sorted(by_seed(control, seeds).items()))  # another order of the same runs
    result, paired = compare_by_seed(by_seed(treated, seeds), again), compare(treated, control)
    assert (result.method, result.verdict, result.df) == ("paired t", paired.verdict, 4)
    assert (result.difference, result.low, result.high, result.p) == pytest.approx(
        (paired.difference, paired.low, paired.high, paired.p), rel=1e-12
    )


def test_one_unmatched_run_hardly_moves_a_paired_comparison() -> None:
    """The mixed model comes down to the paired t test as the unmatched part gets uninformative (here: seeds differ a lot)."""
    luck = [0.2, 0.5, 0.8, 0.35, 0.65]
    gains = [0.021, 0.018, 0.024, 0.020, 0.017]
    control = by_seed(luck, range(5))
    treated = by_seed([x + d for x, d in zip(luck, gains, strict=True)], range(5))
    paired = compare_by_seed(treated, control)
    more = compare_by_seed({**treated, 9: 0.45}, control)
    assert more.method == "mixed model"
    assert (more.difference, more.se, more.df) == pytest.approx((paired.difference, paired.se, paired.df), rel=0.01)


def test_arms_without_common_seeds_are_welchs_test() -> None:
    treated, control = [0.71, 0.74, 0.77, 0.70], [0.60, 0.66, 0.55]
    result = compare_by_seed(by_seed(treated, range(4)), by_seed(control, range(10, 13)))
    oracle: Any = stats.ttest_ind(treated, control, equal_var=False)
    assert (result.method, result.verdict, result.replicates) == ("Welch", "better", 3)
    assert (result.p, result.df) == pytest.approx((oracle.pvalue, oracle.df))


def test_mixed_intervals_hold_the_truth_in_about_95_of_100() -> None:
    rng = np.random.default_rng(5)
    held = []
    for _ in range(600):
        luck = rng.normal(0.7, 0.03, 9)
        treated = by_seed((luck[:6] + rng.normal(0, 0.02, 6)).tolist(), range(6))
        control = by_seed((luck[2:9] + rng.normal(0, 0.02, 7)).tolist(), range(2, 9))
        result = compare_by_seed(treated, control)
        held.append(result.low <= 0 <= result.high)
    assert 0.925 <= np.mean(held) <= 0.975


def test_few_or_identical_unmatched_runs_decide_nothing() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        mixed_model({1: 0.9, 2: 0.8}, {2: 0.1, 3: 0.2})
    assert compare_by_seed({1: 0.9}, {2: 0.1}).words() == "undecided, needs at least 2 more replicates"
    assert compare_by_seed({1: 0.9, 2: 0.91}, {2: 0.1, 3: 0.11, 4: 0.1}).verdict == "undecided"
    assert compare_by_seed(by_seed([0.9] * 3, range(3)), by_seed([0.5] * 4, range(4))).verdict == "undecided"
    assert compare_by_seed(by_seed([0.9] * 3, range(3)), by_seed([0.5] * 4, range(4)), questions=2048).verdict == "better"


# Intention to treat.


def runs(accuracies: Sequence[float], collapsed: Sequence[int] = ()) -> list[Replicate]:
    return [Replicate(seed=k, accuracy=accuracy, collapsed=k in collapsed) for k, accuracy in enumerate(accuracies)]


def test_a_collapsed_run_keeps_its_place() -> None:
    """What survived looks better than control; the arm as a whole does not."""
    control = runs([0.75, 0.74, 0.76, 0.75, 0.74, 0.75])
    treated = runs([0.781, 0.770, 0.790, 0.779, 0.40, 0.35], collapsed=(4, 5))
    result = compare_arms(treated, control)
    assert result.primary == compare([run.accuracy for run in treated], [run.accuracy for run in control])
    assert result.primary.verdict != "better"
    assert result.completed is not None
    assert (result.completed.verdict, result.completed.method) == ("better", "mixed model")


def test_an_arm_that_always_collapses_has_no_completed_comparison() -> None:
    result = compare_arms(runs([0.5] * 5, collapsed=range(5)), runs([0.7, 0.71, 0.72, 0.70, 0.69]))
    assert result.completed is None
    assert result.primary.verdict == "worse"
    assert (result.risk_difference, result.risk_p) == (1.0, pytest.approx(2 / 2**10))  # both halves of the only extreme tables


@pytest.mark.parametrize(("collapsed", "of"), [(0, 5), (1, 3), (5, 5), (3, 8)])
def test_collapse_intervals_are_clopper_and_pearsons(collapsed: int, of: int) -> None:
    risk = compare_arms(runs([0.5 + 0.01 * k for k in range(of)], collapsed=range(collapsed)), runs([0.6] * of)).treated_risk
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


def test_answers_of_replicates_reach_the_comparison() -> None:
    sides = answers(np.random.default_rng(3), 4, 60)
    arm_runs = [
        [Replicate(seed=k, accuracy=row.mean(), collapsed=False, correct=tuple(row.tolist())) for k, row in enumerate(side)]
        for side in sides
    ]
    assert compare_arms(*arm_runs).primary == judged(sides)


def test_a_seed_that_occurs_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="twice"):
        compare_arms([Replicate(seed=1, accuracy=0.5, collapsed=False)] * 2, runs([0.5, 0.6]))


# Two checkpoints.


def test_two_checkpoints_are_compared_by_the_exact_mcnemar_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(500) < 0.8, rng.random(500) < 0.75
    result = checkpoints_differ(a, b)
    table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
    assert result.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert (result.only_a, result.only_b, result.questions) == (table[0][1], table[1][0], 500)
    assert result.difference == pytest.approx(a.mean() - b.mean())
    assert "nothing about their configurations" in result.words()


def test_checkpoints_that_agree_everywhere_do_not_differ() -> None:
    assert checkpoints_differ([1, 0, 1], [1, 0, 1]).p == 1.0


@pytest.mark.parametrize(("a", "b"), [([1, 0], [1]), ([], []), ([[1]], [[0]])])
def test_checkpoints_need_the_same_questions(a: list[Any], b: list[Any]) -> None:
    with pytest.raises(ValueError, match="same questions"):
        checkpoints_differ(a, b)


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


# Looking again and again.


def sequences(paths: int, replicates: int, seed: int, effect: float = 0.0) -> NDArray[np.float64]:
    return 0.5 + np.random.default_rng(seed).normal(effect, 0.02, (paths, replicates))


@pytest.mark.parametrize(
    "rule",
    [
        SequentialRule(),
        SequentialRule(looks=(3, 5, 8)),
        SequentialRule(looks=(3, 4, 5, 6, 7, 8)),
        SequentialRule(spending="obrien-fleming"),
        SequentialRule(level=0.2),
    ],
    ids=str,
)
def test_all_looks_together_keep_the_level(rule: SequentialRule) -> None:
    """200,000 experiments without a difference: the t tests of all looks at their levels reject together in `level` of them."""
    x = sequences(200_000, rule.looks[-1], seed=11) - 0.5
    rejected = np.zeros(len(x), dtype=bool)
    for look, level in zip(rule.looks, rule.levels(rule.looks), strict=True):
        t = stats.ttest_1samp(x[:, :look], 0, axis=1)
        rejected |= t.pvalue < level
    assert rejected.mean() == pytest.approx(rule.level, abs=4 * math.sqrt(rule.level / len(x)) + 0.0005)


def test_levels_of_looks_are_those_of_the_normal_design_for_many_replicates() -> None:
    """Pocock's and O'Brien and Fleming's spending at five equal looks: boundaries of Jennison & Turnbull (2000), table 7.x, as z values."""
    looks = (400, 800, 1200, 1600, 2000)
    z = [stats.norm.isf(level / 2) for level in SequentialRule(looks=looks).levels(looks)]
    assert z == pytest.approx([2.438, 2.427, 2.410, 2.397, 2.386], abs=0.02)
    z = [stats.norm.isf(level / 2) for level in SequentialRule(looks=looks, spending="obrien-fleming").levels(looks)]
    assert z[1:] == pytest.approx([3.357, 2.680, 2.290, 2.031], abs=0.03)


def test_a_decision_at_a_look_stands() -> None:
    treated = [0.60, 0.605, 0.61, 0.60, 0.605, 0.1, 0.2, 0.3]
    first = sequential_compare(treated[:5], [0.5] * 5)
    assert first.verdict == "better"
    assert sequential_compare(treated, [0.5] * 8) == first


def test_what_a_look_needs_is_counted_at_the_level_of_the_last() -> None:
    treated = [0.52, 0.48, 0.53, 0.51, 0.53]
    rule = SequentialRule(looks=(5, 8, 12), level=0.1, spending="obrien-fleming")
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
    """Ends at 3 to 20 replicates, whatever has been seen: 40,000 experiments without a difference through the levels of the looks."""
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
    assert sequential_compare(x[0, :4].tolist(), [0.0] * 4).high == math.inf
    assert sequential_compare(x[0, :4].tolist(), [0.0] * 4, final=True).high < math.inf


def test_intervals_of_all_looks_hold_the_truth_together() -> None:
    missed = 0
    for row in sequences(400, 12, seed=5, effect=0.01):
        results = [sequential_compare(row[:n].tolist(), [0.5] * n, rule=SequentialRule(looks=(5, 8, 12))) for n in (5, 8, 12)]
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
    assert result.question_se is not None
    assert sequential_compare(*accuracies, correct=sides, margin=0.0001).replicates == 8


def test_rules_that_cannot_work_are_the_users_mistake() -> None:
    for looks in ((), (2, 5), (5, 5), (8, 5)):
        with pytest.raises(ConfigError, match="looks"):
            SequentialRule(looks=looks)
    with pytest.raises(ConfigError, match="level"):
        SequentialRule(level=5)
    with pytest.raises(ValueError, match="the level is spent"):
        sequential_compare([0.5] * 6, [0.5] * 6, rule=SequentialRule(looks=(3, 5)))
    assert [SequentialRule().next_look(n) for n in (0, 4, 5, 19, 20)] == [5, 5, 8, 20, None]


# Planning.


@pytest.mark.parametrize("replicates", [3, 5, 8, 40])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_the_detectable_difference_is_that_of_the_paired_t_test(replicates: int, power: float, confidence: float) -> None:
    found = detectable_difference(0.02, replicates, power=power, confidence=confidence)
    critical, shift = stats.t.ppf(0.5 + confidence / 2, replicates - 1), found / 0.02 * math.sqrt(replicates)

    def rejecting(spread: float) -> float:
        """By the normal distribution, given the spread that came out."""
        mean = stats.norm.sf(critical * spread - shift) + stats.norm.cdf(-critical * spread - shift)
        return float(mean * stats.chi.pdf(spread * math.sqrt(replicates - 1), replicates - 1) * math.sqrt(replicates - 1))

    assert integrate.quad(rejecting, 0, 8, points=[shift / critical], limit=200)[0] == pytest.approx(power, abs=1e-6)
    achieved = TTestPower().power(found / 0.02, replicates, 1 - confidence)
    assert math.isnan(achieved) or achieved == pytest.approx(power, abs=1e-6)  # it has no number where scipy's tail has none


@pytest.mark.parametrize("difference", [-0.03, 0.005, 0.01, 0.02, 0.1])
@pytest.mark.parametrize("power", [0.8, 0.9])
def test_replicates_needed_are_the_fewest_with_that_power(difference: float, power: float) -> None:
    needed = replicates_needed(difference, 0.02, power=power)
    assert needed is not None
    test = TTestPower()
    assert test.power(abs(difference) / 0.02, needed, 0.05) >= power
    assert needed == MIN_REPLICATES or test.power(abs(difference) / 0.02, needed - 1, 0.05) < power
    assert detectable_difference(0.02, needed, power=power) <= abs(difference)


def test_what_no_number_of_replicates_can_show_is_said() -> None:
    assert replicates_needed(0.0, 0.02) is None
    assert replicates_needed(1e-6, 0.02) is None
    assert replicates_needed(0.01, 0.02, question_se=0.005) is None  # 80 % need 2.8 standard errors
    assert replicates_needed(0.02, 0.02, question_se=0.005) is not None
    assert detectable_difference(0.02, 2) == math.inf
    assert detectable_difference(0.02, 10_000, question_se=0.005) == pytest.approx(0.005 * 2.802, rel=1e-2)


@pytest.mark.parametrize("bad", [{"sd": math.nan}, {"sd": -0.1}, {"power": 1.0}, {"power": 0.1}, {"confidence": 1.0}])
def test_impossible_plans_are_an_error(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="but got"):
        detectable_difference(**{"sd": 0.02, "replicates": 5, **bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0.4, 0.05, 0.001, 1e-5, 1e-7])
def test_power_is_a_number_everywhere_and_grows_with_the_difference(level: float) -> None:
    """At degrees of freedom and levels where scipy's noncentral t has none for a tail: plans must not stumble over it."""
    for replicates in (3, 4, 5, 9, 20, 41, 101, 401, 10_000):
        found = [detectable_difference(0.02, replicates, power=power, confidence=1 - level) for power in (0.5, 0.8, 0.9, 0.99)]
        assert found == sorted(found)
        assert all(0 <= difference < math.inf for difference in found)

"""What so many replicates can show. Oracles: statsmodels' power of the t test, and an integral over the spread that
came out."""

import math

import pytest
from scipy import integrate, stats
from statsmodels.stats.power import TTestPower

from search.power import detectable_difference, replicates_to_decide
from search.replicates import MIN_REPLICATES


@pytest.mark.parametrize("replicates", [3, 5, 8, 40])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_the_detectable_difference_is_that_of_the_paired_t_test(
    replicates: int, power: float, confidence: float
) -> None:
    found = detectable_difference(0.02, replicates, power=power, confidence=confidence)
    critical, shift = stats.t.ppf(0.5 + confidence / 2, replicates - 1), found / 0.02 * math.sqrt(replicates)

    def rejecting(spread: float) -> float:
        """By the normal distribution, given the spread that came out."""
        mean = stats.norm.sf(critical * spread - shift) + stats.norm.cdf(-critical * spread - shift)
        return float(
            mean * stats.chi.pdf(spread * math.sqrt(replicates - 1), replicates - 1) * math.sqrt(replicates - 1)
        )

    assert integrate.quad(rejecting, 0, 8, points=[shift / critical], limit=200)[0] == pytest.approx(power, abs=1e-6)
    achieved = TTestPower().power(found / 0.02, replicates, 1 - confidence)
    assert math.isnan(achieved) or achieved == pytest.approx(
        power, abs=1e-6
    )  # it has no number where scipy's tail has none


@pytest.mark.parametrize("difference", [-0.03, 0.005, 0.01, 0.02, 0.1])
def test_replicates_to_decide_are_the_fewest_with_that_power(difference: float) -> None:
    """Without a margin, so that only better or worse can decide; from two replicates on."""
    more = replicates_to_decide(difference, 0.02, 0.02 / math.sqrt(2), 2, margin=0.0, level=0.05)
    assert more is not None
    total, test = 2 + more, TTestPower()
    assert test.power(abs(difference) / 0.02, total, 0.05) >= 0.8
    assert total == MIN_REPLICATES or test.power(abs(difference) / 0.02, total - 1, 0.05) < 0.8
    assert detectable_difference(0.02, total) <= abs(difference)


# difference, standard error of five replicates (sd 2 points: 0.89 points of it are theirs), margin, can be decided
DECIDABLE: list[tuple[float, float, float, bool]] = [
    (0.0, 0.02 / math.sqrt(5), 0.0, False),
    (0.0, 0.02 / math.sqrt(5), 0.01, True),  # as the same
    (1e-6, 0.02 / math.sqrt(5), 0.0, False),
    (0.01, math.hypot(0.02 / math.sqrt(5), 0.005), 0.0, False),  # 80 % need 2.8 standard errors, half a point stays
    (0.02, math.hypot(0.02 / math.sqrt(5), 0.005), 0.0, True),
]


@pytest.mark.parametrize(("difference", "se", "margin", "decidable"), DECIDABLE)
def test_what_no_number_of_replicates_can_decide_is_said(
    difference: float, se: float, margin: float, decidable: bool
) -> None:
    assert (replicates_to_decide(difference, 0.02, se, 5, margin=margin, level=0.05) is not None) == decidable


def test_fewer_than_three_replicates_can_show_nothing_and_no_spread_shows_everything() -> None:
    assert detectable_difference(0.02, 2) == math.inf
    assert detectable_difference(0.0, 3) == 0.0


@pytest.mark.parametrize("bad", [{"sd": math.nan}, {"sd": -0.1}, {"power": 1.0}, {"power": 0.1}, {"confidence": 1.0}])
def test_impossible_plans_are_an_error(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="but got"):
        detectable_difference(**{"sd": 0.02, "replicates": 5, **bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0.4, 0.05, 0.001, 1e-5, 1e-7])
def test_power_is_a_number_everywhere_and_grows_with_the_difference(level: float) -> None:
    """At degrees of freedom and levels where scipy's noncentral t has none for a tail: plans must not stumble over
    it."""
    for replicates in (3, 4, 5, 9, 20, 41, 101, 401, 10_000):
        found = [
            detectable_difference(0.02, replicates, power=power, confidence=1 - level)
            for power in (0.5, 0.8, 0.9, 0.99)
        ]
        assert found == sorted(found)
        assert all(0 <= difference < math.inf for difference in found)

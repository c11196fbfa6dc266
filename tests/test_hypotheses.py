"""H1 to H5: probabilities against quadrature, and what they are worth by simulation."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, stats

from search.hypotheses import (
    CONFIRMED,
    KNOWN_DF,
    MOST_SPREAD,
    NO_DIFFERENCE,
    OTHERWISE,
    PRIOR_SD,
    Alternative,
    Spread,
    Weighed,
    priors,
    run_spread,
    weigh,
)
from search.replicates import Replicate

H1 = (
    Alternative(name="H1a", arm="global", confidence=0.7),
    Alternative(name="H1b", arm="targeted", confidence=0.6),
)
H4 = (
    Alternative(name="H4a", arm="aggressive", confidence=0.7),
    Alternative(name="H4b", arm="conservative", confidence=0.4),
    Alternative(name="H4c", arm="constant", confidence=0.3),
)


def runs_of(accuracies: Sequence[float] | NDArray[np.float64], collapsed: Sequence[bool] = ()) -> list[Replicate]:
    broke = [*collapsed, *[False] * len(accuracies)]
    return [Replicate(seed=n, accuracy=float(a), collapsed=broke[n]) for n, a in enumerate(accuracies)]


CONTROLS = {
    "control": runs_of([0.65, 0.67, 0.64, 0.66, 0.65]),
    "control-resample": runs_of([0.66, 0.67, 0.66, 0.65, 0.66]),
}
"""Of the same programme: what is known of the run-to-run spread."""


def shares(found: Weighed) -> dict[str, float]:
    return {belief.name: belief.posterior for belief in found.beliefs}


def statuses(found: Weighed) -> dict[str, str]:
    return {belief.name: belief.status for belief in found.beliefs}


# --- beforehand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alternatives", "others", "expected"),
    [
        (H1, False, [0.48276, 0.31034, 0.20690]),  # odds 2.33, 1.5 and 1
        (H4, False, [0.52685, 0.15053, 0.09677, 0.22584]),
        (H1, True, [0.48276, 0.31034, 0.10345, 0.10345]),
    ],
)
def test_confidences_become_probabilities_that_sum_to_one(
    alternatives: Sequence[Alternative], others: bool, expected: list[float]
) -> None:
    prior = priors(alternatives, others=others)
    assert sum(prior.values()) == pytest.approx(1)
    assert list(prior.values()) == pytest.approx(expected, abs=1e-4)


# --- against quadrature -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("treated", "control"),
    [([0.62, 0.63, 0.60], [0.61, 0.60, 0.60]), ([0.65, 0.62], [0.60, 0.61]), ([0.60] * 4, [0.612] * 4)],
)
def test_two_arms_agree_with_the_integral_over_effect_and_spread(treated: list[float], control: list[float]) -> None:
    d = np.array(treated) - np.array(control)
    spread = 0.014
    effect = np.linspace(0, 0.15, 1501)[:, None]
    log = np.linspace(-14, 2 * math.log(MOST_SPREAD * spread), 1501)
    variance = np.exp(log)
    scale = KNOWN_DF * spread**2 / 2
    weight = stats.invgamma.pdf(variance, KNOWN_DF / 2, scale=scale) * variance

    def over_spread(effects: NDArray[np.float64]) -> NDArray[np.float64]:
        chances = np.prod([stats.norm.pdf(one, effects, np.sqrt(variance)) for one in d], axis=0)
        return np.asarray(integrate.simpson(chances * weight, x=log, axis=1))

    def better(sign: int) -> float:
        density = 2 * stats.norm.pdf(effect[:, 0], 0, PRIOR_SD) * over_spread(sign * effect)
        return float(integrate.simpson(density, x=effect[:, 0]))

    evidence = {"H1a": better(1), "H1b": better(-1), NO_DIFFERENCE: float(over_spread(np.zeros((1, 1)))[0])}
    prior = priors(H1, others=False)
    total = sum(prior[name] * evidence[name] for name in prior)
    found = weigh(H1, {"global": runs_of(treated), "targeted": runs_of(control)}, known_sd=spread)
    expected = {name: prior[name] * evidence[name] / total for name in prior}
    assert shares(found) == pytest.approx(expected, abs=2e-5)
    factor = found.beliefs[0].bayes_factor
    assert factor == pytest.approx(evidence["H1a"] / evidence[NO_DIFFERENCE], rel=1e-4)


def test_three_arms_agree_with_drawing_effects_from_the_prior() -> None:
    rng = np.random.default_rng(0)
    table = np.array([[0.62, 0.60, 0.61], [0.63, 0.60, 0.60], [0.62, 0.62, 0.60]])  # [R, K]
    spread, draws = 0.014, 1_000_000
    contrasts = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])  # orthonormal
    z = table @ contrasts.T  # [R, 2]
    effects = rng.normal(0, PRIOR_SD / math.sqrt(2), (draws, 3))
    variance = spread**2 / 2 * KNOWN_DF / rng.chisquare(KNOWN_DF, draws)
    inside = variance < (MOST_SPREAD * spread) ** 2 / 2
    effects, variance = effects[inside], variance[inside]

    def likelihood(centre: NDArray[np.float64]) -> NDArray[np.float64]:
        squares = ((z[None] - centre[:, None]) ** 2).sum(axis=(1, 2))
        return np.asarray(variance ** (-z.size / 2) * np.exp(-squares / (2 * variance)))

    values, best = likelihood(effects @ contrasts.T), effects.argmax(axis=1)
    evidence = {one.name: float(values[best == arm].mean()) for arm, one in enumerate(H4)}
    evidence[NO_DIFFERENCE] = float(likelihood(np.zeros((len(variance), 2))).mean())
    prior = priors(H4, others=False)
    total = sum(prior[name] * evidence[name] for name in prior)
    found = weigh(H4, {one.arm: runs_of(table[:, arm]) for arm, one in enumerate(H4)}, known_sd=spread)
    assert shares(found) == pytest.approx({n: prior[n] * evidence[n] / total for n in prior}, abs=0.005)


def test_an_arm_that_nobody_speaks_for_can_be_the_best() -> None:
    found = weigh(
        H1,
        {"global": runs_of([0.60] * 5), "targeted": runs_of([0.59] * 5), "uniform": runs_of([0.66] * 5)},
        others=["uniform"],
        known_sd=0.014,
    )
    assert statuses(found) == {
        "H1a": "rejected",
        "H1b": "rejected",
        NO_DIFFERENCE: "rejected",
        OTHERWISE: "confirmed",
    }


# --- what it is worth -------------------------------------------------------------------------------------------------


def simulated(count: int, replicates: int, spread: float, seed: int = 0) -> list[tuple[str, Weighed]]:
    """What is true, drawn from the prior of H4 (three arms), and what is then believed of the runs; a control and
    another arm of the programme have run, too."""
    rng = np.random.default_rng(seed)
    prior = priors(H4, others=False)
    result = []
    for truth in rng.choice(list(prior), count, p=list(prior.values())):
        effects = rng.normal(0, PRIOR_SD / math.sqrt(2), 3) * (truth != NO_DIFFERENCE)
        if truth != NO_DIFFERENCE:
            arm, best = [one.name for one in H4].index(truth), int(effects.argmax())
            effects[[arm, best]] = effects[[best, arm]]
        sd = spread * math.sqrt(KNOWN_DF / rng.chisquare(KNOWN_DF) / 2)
        table = 0.6 + rng.normal(0, 0.02, (5, 1)) + rng.normal(0, sd, (5, 5))
        table[:, :3] += effects
        arms = {one.arm: runs_of(table[:replicates, k]) for k, one in enumerate(H4)}
        arms |= {"control": runs_of(table[:, 3]), "other": runs_of(table[:, 4])}
        result.append((str(truth), weigh(H4, arms, known_sd=0.014)))
    return result


@pytest.mark.parametrize(("replicates", "spread"), [(2, 0.014), (5, 0.014), (3, 0.007), (5, 0.028)])
def test_of_what_is_called_confirmed_the_stated_share_is_true(replicates: int, spread: float) -> None:
    """Also where the spread from seed to seed is half or twice what was thought of the workload."""
    stated, true = [], []
    for truth, found in simulated(250, replicates, spread):
        for belief in found.beliefs:
            if belief.status == "confirmed":
                stated.append(belief.posterior)
                true.append(belief.name == truth)
    assert len(true) > 20
    error = math.sqrt(sum(share * (1 - share) for share in stated)) / len(stated)
    assert np.mean(true) > np.mean(stated) - 3 * error
    assert np.mean(true) > CONFIRMED - 3 * error


def test_without_a_difference_its_probability_mostly_rises() -> None:
    rng = np.random.default_rng(1)
    rose = 0
    for _ in range(200):
        a, b = 0.6 + rng.normal(0, 0.014 / math.sqrt(2), (2, 5))
        found = weigh(H1, {"global": runs_of(a), "targeted": runs_of(b)}, known_sd=0.014)
        belief = found.beliefs[2]
        assert belief.name == NO_DIFFERENCE
        rose += belief.posterior > belief.prior
    assert rose > 0.8 * 200


def test_more_seeds_do_not_turn_the_luck_of_one_list_of_questions_into_evidence() -> None:
    """Each seed gives the very same answers: 20 runs say no more of other questions than 5."""

    def of(count: int) -> float:
        rng = np.random.default_rng(0)
        answers = rng.random((2, 500)) < [[0.62], [0.60]]
        arms = {
            arm: [
                Replicate(seed=n, accuracy=float(own.mean()), collapsed=False, correct=tuple(own * 1.0))
                for n in range(count)
            ]
            for arm, own in zip(("global", "targeted"), answers, strict=True)
        }
        return weigh(H1, arms, known_sd=0.014).beliefs[0].posterior

    assert abs(of(20) - of(5)) < 0.02 < of(20) < CONFIRMED


# --- collapses, and what is not there ---------------------------------------------------------------------------------


def test_two_arms_that_collapse_are_inconclusive_and_the_reason_says_why() -> None:
    broke = [True] * 3
    arms = {"global": runs_of([0.53, 0.54, 0.52], broke), "targeted": runs_of([0.63, 0.64, 0.63], broke)}
    found = weigh(H1, arms, known_sd=0.014)
    assert set(statuses(found).values()) == {"inconclusive"}
    assert all("collapsed in 3 of 3" in belief.reason for belief in found.beliefs)


def test_an_arm_that_collapses_loses_with_the_accuracy_at_its_stop() -> None:
    arms = {"global": runs_of([0.53, 0.54, 0.52], [True] * 3), "targeted": runs_of([0.63, 0.64, 0.63]), **CONTROLS}
    assert statuses(weigh(H1, arms, known_sd=0.014)) == {
        "H1a": "rejected",
        "H1b": "confirmed",
        NO_DIFFERENCE: "rejected",
    }


def test_arms_that_are_worlds_apart_are_not_taken_for_alike() -> None:
    arms = {"global": runs_of([0.2, 0.19], [True] * 2), "targeted": runs_of([0.72, 0.71]), **CONTROLS}
    assert statuses(weigh(H1, arms, known_sd=0.014))["H1b"] == "confirmed"


def test_an_arm_that_collapses_is_not_confirmed_by_being_ahead_at_its_stop() -> None:
    arms = {"global": runs_of([0.63, 0.64, 0.63], [True] * 3), "targeted": runs_of([0.53, 0.54, 0.52]), **CONTROLS}
    first = weigh(H1, arms, known_sd=0.014).beliefs[0]
    assert (first.status, first.posterior > CONFIRMED) == ("inconclusive", True)
    assert "global collapsed in 3 of 3 runs" in first.reason


@pytest.mark.parametrize(
    ("targeted", "reason"),
    [([], "not measured: no runs of targeted"), ([Replicate(seed=9, accuracy=0.6, collapsed=False)], "no seed is")],
)
def test_what_was_not_measured_leaves_the_probabilities_and_says_so(targeted: list[Replicate], reason: str) -> None:
    found = weigh(H1, {"global": runs_of([0.6, 0.6]), "targeted": targeted})
    assert all(belief.posterior == belief.prior for belief in found.beliefs)
    assert all(belief.reason.startswith(reason) and belief.bayes_factor is None for belief in found.beliefs)


def test_what_hangs_on_the_width_of_the_prior_is_inconclusive() -> None:
    found = weigh(H1, {"global": runs_of([0.6] * 20), "targeted": runs_of([0.6] * 20)}, known_sd=0.014)
    nothing = found.beliefs[2]
    assert nothing.by_sd[0][1] < CONFIRMED
    assert (nothing.status, nothing.by_sd[0][1] < nothing.posterior < nothing.by_sd[2][1]) == ("inconclusive", True)


@pytest.mark.parametrize(
    ("alternatives", "words"),
    [
        (H1[:1], "at least two arms"),
        ((H1[0], Alternative(name="H1b", arm="global", confidence=0.5), H4[0]), "do not exclude"),
        ((H1[0], Alternative(name="H1b", arm="targeted", confidence=1.0)), "leaves nothing to learn"),
    ],
)
def test_hypotheses_that_are_none_are_refused(alternatives: Sequence[Alternative], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        weigh(alternatives, {})


def test_an_accuracy_that_is_no_number_is_never_averaged_away() -> None:
    with pytest.raises(ValueError, match="not finite"):
        weigh(H1, {"global": runs_of([0.6, math.nan]), "targeted": runs_of([0.6, 0.6])})


def test_the_spread_is_what_seeds_and_arms_leave_over_in_runs_that_held() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 0.03, 400)
    arms = {name: runs_of(0.6 + shift + seeds + rng.normal(0, 0.01, 400)) for name, shift in (("a", 0.1), ("b", 0.0))}
    broke = runs_of(rng.uniform(0, 1, 400), [True] * 400)
    found = run_spread({**arms, "broke": broke}, 0.02)
    assert found.df == KNOWN_DF + 399
    assert found.sd == pytest.approx(0.01 * math.sqrt(2), rel=0.1)
    assert run_spread({}, 0.02) == Spread(sd=0.02, df=KNOWN_DF)

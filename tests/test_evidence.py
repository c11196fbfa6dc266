"""What is known without a trial: told where it answers the same question, refused where not."""

from collections.abc import Sequence

import pytest

from search.arms import Arm
from search.evidence import Evidence, evidence_from_arms, evidence_from_points
from spaces.config import ConfigError
from spaces.library import SPACES, Choice, Dimension, Space
from spaces.reading import merge
from tests.searches import BASE, cliff, drive, outcome, searcher, trade, trees


def test_the_plans_collapses_are_told_without_spending_a_trial() -> None:
    evidence = evidence_from_points(["e13i-baseline", "e13i-v2"], SPACES["sigma"], {})
    assert [e.params["noise.sigma_start|linear"] for e in evidence] == [0.05, 0.01]
    assert all(e.accuracy is None and e.collapses == 1 for e in evidence)
    assert "collapsed in step 3; different there: grpo.filter_groups=resample (here off)" in evidence[0].source
    search = searcher(searcher="gp", evidence=evidence, trials=3)
    drive(search, cliff)
    assert [t.state.name for t in search.optuna().trials] == ["COMPLETE"] * 4
    assert [t.constraints["collapses"] > 0 for t in search.optuna().trials[:2]] == [True, True]


def test_evidence_beyond_a_range_widens_the_model_and_not_the_space() -> None:
    evidence = evidence_from_points(["e13i-baseline"], SPACES["sigma"], {})
    for name in ("gp", "tpe"):
        search = searcher(searcher=name, evidence=evidence, trials=14)
        drive(
            search, lambda s: outcome(0.5 + s["config"]["noise"]["sigma_start"])
        )  # draws towards the end of the range
        for drawn in search.arms[1:]:
            for dimension, value in drawn.params.items():
                domain = {d.name: d.domain for d in SPACES["sigma"].dimensions}[dimension]
                assert isinstance(domain, Choice) or domain.low <= value <= domain.high, (name, dimension)


def test_an_unknown_accuracy_is_told_as_the_median_of_the_known_ones() -> None:
    evidence = evidence_from_points(["e13i-v2"], SPACES["sigma"], {})
    values = iter([0.1, 0.2, 0.4, 0.9])
    search = searcher(evidence=evidence, trials=4)
    drive(search, lambda s: outcome(next(values)))
    assert search.optuna().trials[0].value == 0.4


def test_evidence_keeps_a_model_away_from_a_collapse() -> None:
    """Linear noise collapses everywhere: with evidence at both ends a model proposes it less often."""
    linear = [
        Evidence(
            params={"noise.modules": "linear", "noise.sigma_start|linear": s, "noise.sigma_end": 0.0005},
            accuracy=None,
            collapses=1,
            source="",
        )
        for s in (0.002, 0.005, 0.01, 0.02)
    ]

    def collapses(evidence: Sequence[Evidence]) -> int:
        count = 0
        for seed in (1, 2, 3):
            search = searcher(searcher="gp", evidence=evidence, trials=10, seed=seed)
            given = drive(
                search,
                lambda s: outcome(0.5, "collapsed" if s["config"]["noise"]["modules"] == ["linear"] else "completed"),
            )
            count += sum(s["config"]["noise"]["modules"] == ["linear"] for s in given[1:])
        return count

    assert collapses(linear) < collapses(())


NORMS_ALONE = SPACES["sigma"].model_copy(
    update={"dimensions": (Dimension(key="noise.modules", domain=Choice(options={"rmsnorm": ["rmsnorm"]})),)}
)
# names, space -> words of the refusal
REFUSED: list[tuple[list[str], Space, str]] = [
    (["e13m-rmsnorm"], SPACES["sigma"], "recorded no collapse.*e13i-baseline, e13i-v2"),
    (["nothing"], SPACES["sigma"], "recorded no collapse"),
    (["e13i-v2"], SPACES["schedule"], r"noise.modules=\['linear'\] there and \['rmsnorm'\]"),
    (["e13i-v2"], NORMS_ALONE, r"noise.modules=\['linear'\] is not an option of space sigma"),
]


@pytest.mark.parametrize(("names", "space", "words"), REFUSED)
def test_evidence_of_another_question_is_refused_in_one_line(names: list[str], space: Space, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        evidence_from_points(names, space, merge({}, space.settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("failed", [0, 2])
def test_an_earlier_sweep_is_evidence_where_it_fits(failed: int) -> None:
    earlier = searcher(SPACES["sigma"], trials=8, replicates=3, seed=11)
    drive(earlier, trade)
    del earlier.arms[-1].results[failed]  # nobody knows
    evidence = evidence_from_arms(earlier.arms, 3, SPACES["sigma"], "sweep first", earlier.base)
    assert len(evidence) == 6, "without the control, whose sigma lies outside, and the failed one"
    assert all(e.source.startswith("sweep first (2 of its 8 arms left out): c0") for e in evidence)
    for given, told in zip(evidence, earlier.arms[1:-1], strict=True):
        sigma = told.config.noise.sigma_start
        assert dict(given.params) == pytest.approx(dict(told.params))
        assert (given.accuracy, given.hours) == (pytest.approx(0.3 + sigma), pytest.approx(sigma))
        assert given.collapses == (1 if sigma > 0.03 else 0)
    later = searcher(SPACES["sigma"], searcher="gp", evidence=evidence, trials=2, objectives=("accuracy", "hours"))
    drive(later, cliff)
    assert len(later.optuna().trials) == 7


def test_an_earlier_sweep_on_other_modules_or_precision_is_left_out() -> None:
    earlier = searcher(SPACES["w4a16"], trials=5)
    drive(earlier, cliff)
    assert len(evidence_from_arms(earlier.arms, 1, SPACES["w4a16"], "s", earlier.base)) == 4
    assert evidence_from_arms(earlier.arms, 1, SPACES["sigma"], "s", BASE) == []


def test_an_earlier_sweep_says_what_else_was_different_there_and_another_reward_is_left_out() -> None:
    earlier = searcher(SPACES["w4a16"], trials=4)
    drive(earlier, cliff)
    here = merge(earlier.base, {"grpo": {"learning_rate": 0.5}})
    told = evidence_from_arms(earlier.arms, 1, SPACES["w4a16"], "s", here)
    rate = earlier.arms[0].config.grpo.learning_rate
    assert [e.source.partition("; ")[2] for e in told] == [f"different there: grpo.learning_rate={rate} (here 0.5)"] * 3
    random = merge(earlier.base, {"grpo": {"reward": "random"}})
    assert evidence_from_arms(earlier.arms, 1, SPACES["w4a16"], "s", random) == []


def test_a_warm_start_spares_the_model_its_start_up() -> None:
    earlier = searcher(trials=8)
    drive(earlier, cliff)
    evidence = evidence_from_arms(earlier.arms, 1, SPACES["sigma"], "s", earlier.base)
    cold, warm = searcher(searcher="tpe", seed=5), searcher(searcher="tpe", seed=5, evidence=evidence)
    drive(cold, cliff)
    drive(warm, cliff)
    assert trees(cold.arms[1:2]) == trees([*_drawn("qmc", 5)])
    assert trees(warm.arms[1:2]) != trees(cold.arms[1:2])


def _drawn(name: str, seed: int) -> list[Arm]:
    search = searcher(searcher=name, seed=seed)
    drive(search, cliff)
    return search.arms[1:2]

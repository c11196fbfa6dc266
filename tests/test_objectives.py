"""What a configuration is judged by, and which are beaten by none."""

import random
from typing import Any

import pytest

from search.arms import Arm
from search.objectives import OBJECTIVES, pareto_front
from search.proposals import SEARCHERS, STARTUP
from tests.searches import control, drive, outcome, searcher, trade


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("objectives", [("accuracy", "hours"), ("accuracy", "collapses", "hours")])
def test_several_objectives_are_told_in_their_directions(name: str, objectives: tuple[str, ...]) -> None:
    search = searcher(searcher=name, trials=STARTUP + 4, replicates=3, objectives=objectives)
    drive(search, trade)
    study = search.optuna()
    assert [d.name for d in study.directions] == ["MAXIMIZE", *["MINIMIZE"] * (len(objectives) - 1)]
    for trial, arm in zip(study.trials, search.arms[1:], strict=True):
        sigma = arm.config.noise.sigma_start
        assert trial.values[0] == pytest.approx(0.3 + sigma)
        assert trial.values[-1] == pytest.approx(sigma)
        if "collapses" in objectives:
            assert trial.values[1] == pytest.approx(1 / 3 if sigma > 0.03 else 0.0)
            assert trial.constraints == {}, "an objective is not a constraint as well"


def arm(name: str, *results: Any) -> Arm:
    ended = {k: result for k, result in enumerate(results) if result is not None}
    failed = {k for k, result in enumerate(results) if result is None}
    return Arm(name=name, origin="searcher", config=control().config, results=ended, failed=failed)


def test_the_pareto_front_holds_what_nothing_beats() -> None:
    arms = [
        arm("good", outcome(0.7, seconds=100)),
        arm("quick", outcome(0.5, seconds=50)),
        arm("beaten", outcome(0.5, seconds=80)),
        arm("twin of good", outcome(0.7, seconds=100)),
        arm("best but collapsed", outcome(0.9, "collapsed", seconds=1)),
        arm("failed", None),
        arm("not begun"),
    ]
    names = [a.name for a in pareto_front(arms, ("accuracy", "hours"), 1)]
    assert names == ["good", "quick", "twin of good"]
    assert [a.name for a in pareto_front(arms, ("accuracy",), 1)] == ["good", "twin of good"]
    with_risk = [a.name for a in pareto_front(arms, ("accuracy", "collapses"), 1)]
    assert with_risk == ["good", "twin of good", "best but collapsed"]


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_whichever_replicate_is_lacking_its_arm_is_not_in_the_pareto_front(lacking: int) -> None:
    whole, best = arm("whole", *3 * [outcome(0.5)]), arm("best", *3 * [outcome(0.9)])
    del best.results[lacking]
    assert [a.name for a in pareto_front([whole, best], ("accuracy", "hours"), 3)] == ["whole"]


def test_the_pareto_front_agrees_with_optunas() -> None:
    search = searcher(trials=30, replicates=3, objectives=("accuracy", "hours"))
    rng = random.Random(0)
    drive(search, lambda s: outcome(rng.random(), seconds=rng.random()))
    wanted = {tuple(t.values) for t in search.optuna().best_trials}
    front = pareto_front(search.arms[1:], ("accuracy", "hours"), 3)
    told = {tuple(t.values): a.name for t, a in zip(search.optuna().trials, search.arms[1:], strict=True)}
    assert {a.name for a in front} == {told[values] for values in wanted}


def test_objectives_have_a_direction() -> None:
    assert {name: o.direction for name, o in OBJECTIVES.items()} == {
        "accuracy": "maximize",
        "collapses": "minimize",
        "hours": "minimize",
    }

"""The searcher without Ray: what it hands out, and what Optuna is told."""

import json
from typing import Any

import optuna
import pytest
from ray.tune.search import Searcher

from search.searchers import SEARCHERS, Arm, RinSearch
from spaces.config import ConfigError, TrialConfig
from spaces.library import SPACES, Choice, Dimension, Float, Space, When
from spaces.reading import merge
from spaces.workloads import WORKLOADS

BASE = WORKLOADS["tiny"].settings
CONTROL = Arm(name="control", origin="control", tree=merge(BASE, {"noise": {"sigma_start": 0.0}}))


def searcher(
    space: Space = SPACES["sigma"], configurations: int = 4, replicates: int = 1, sampler: str = "random", seed: int = 3
) -> RinSearch:
    return RinSearch(
        space=space,
        base=BASE,
        fixed=[Arm(name=CONTROL.name, origin=CONTROL.origin, tree=CONTROL.tree)],
        configurations=configurations,
        replicates=replicates,
        seed=seed,
        sampler=SEARCHERS[sampler](seed),
        storage=optuna.storages.InMemoryStorage(),
        study_name="test",
    )


def outcome(accuracy: float, word: str = "completed") -> dict[str, Any]:
    return {"outcome": {"outcome": word, "eval": {"accuracy": accuracy}}, "training_iteration": 1}


def drive(search: RinSearch, results: Any) -> list[dict[str, Any]]:
    """Run a whole search; `results(suggestion)` is what a trial reports."""
    given = []
    for number in range(1000):
        suggestion = search.suggest(f"t{number}")
        if suggestion == Searcher.FINISHED:
            return given
        assert isinstance(suggestion, dict)
        given.append(suggestion)
        result = results(suggestion)
        search.on_trial_complete(f"t{number}", result, error=result is None)
    raise AssertionError("the search never ends")


def test_the_control_is_handed_out_first_and_configurations_are_counted_with_it() -> None:
    given = drive(searcher(configurations=4), lambda s: outcome(0.5))
    assert [s["arm"] for s in given] == ["control", "c01", "c02", "c03"]
    assert [s["origin"] for s in given] == ["control", "searcher", "searcher", "searcher"]
    assert given[0]["config"]["noise"]["sigma_start"] == 0.0
    assert all(s["config"]["noise"]["sigma_start"] > 0 for s in given[1:])


def test_replicates_share_their_seeds_across_arms() -> None:
    given = drive(searcher(configurations=3, replicates=3, seed=7), lambda s: outcome(0.5))
    seeds = {(s["arm"], s["replicate"]): s["config"]["seed"] for s in given}
    assert seeds == {(arm, k): 7 + k for arm in ("control", "c01", "c02") for k in range(3)}
    for arm in ("control", "c01", "c02"):
        configs = [json.dumps({**s["config"], "seed": 0}) for s in given if s["arm"] == arm]
        assert len(set(configs)) == 1, "replicates differ in their seed alone"


def test_every_suggestion_is_a_valid_trial_within_its_range() -> None:
    for s in drive(searcher(SPACES["full"], configurations=25), lambda s: outcome(0.1)):
        config = TrialConfig.model_validate(s["config"])
        if config.noise.sigma_start > 0:
            low, high = (0.002, 0.02) if config.noise.modules == ("linear",) else (0.005, 0.1)
            assert low <= config.noise.sigma_start <= high


def test_optuna_is_told_the_median_of_all_replicates_once() -> None:
    values = iter([0.5, 0.5, 0.5, 0.1, 0.9, 0.4])
    search = searcher(configurations=2, replicates=3)
    drive(search, lambda s: outcome(next(values)))
    (told,) = search._ot_study.trials
    assert told.value == 0.4
    assert told.state == optuna.trial.TrialState.COMPLETE


def test_one_collapse_among_three_replicates_makes_the_configuration_infeasible() -> None:
    search = searcher(configurations=3, replicates=3)

    def result(s: dict[str, Any]) -> dict[str, Any]:
        bad = s["arm"] == "c01" and s["replicate"] == 1
        return outcome(0.9 if s["arm"] == "c01" else 0.3, "collapsed" if bad else "completed")

    drive(search, result)
    assert search._ot_study.best_trial.value == 0.3, "the better median is not chosen: one of its replicates collapsed"


@pytest.mark.parametrize("result", [None, {"training_iteration": 3}, outcome(float("nan"))], ids=["error", "no outcome", "nan"])
def test_a_failed_trial_is_told_as_failed_and_never_left_running(result: dict[str, Any] | None) -> None:
    search = searcher(configurations=3)
    drive(search, lambda s: result if s["arm"] == "c01" else outcome(0.5))
    assert [t.state.name for t in search._ot_study.trials] == ["FAIL", "COMPLETE"]


def test_a_conditional_dimension_is_drawn_only_under_its_condition() -> None:
    space = Space(
        name="conditional",
        description="",
        dimensions=(
            Dimension(key="noise.schedule", domain=Choice(options={"constant": "constant", "log": "log"})),
            Dimension(key="noise.num_stages", domain=Choice(options={"7": 7}), when=When(parent="noise.schedule", value="log")),
        ),
    )
    for s in drive(searcher(space, configurations=12), lambda s: outcome(0.5))[1:]:
        noise = s["config"]["noise"]
        assert (noise["num_stages"] == 7) == (noise["schedule"] == "log")


def test_a_space_that_always_contradicts_itself_is_an_error_with_the_reason() -> None:
    space = Space(
        name="upside-down",
        description="",
        dimensions=(
            Dimension(key="noise.sigma_start", domain=Float(low=0.001, high=0.002)),
            Dimension(key="noise.sigma_end", domain=Float(low=0.01, high=0.02)),
        ),
    )
    search = searcher(space)
    search.suggest("t0")
    with pytest.raises(ConfigError, match=r"upside-down.*sigma_end must be"):
        search.suggest("t1")


@pytest.mark.parametrize("name", list(SEARCHERS))
def test_every_searcher_learns_on_a_conditional_space(name: str) -> None:
    """A landscape with a collapse region: linear noise above 0.01 collapses."""

    def result(s: dict[str, Any]) -> dict[str, Any]:
        noise = s["config"]["noise"]
        bad = noise["modules"] == ["linear"] and noise["sigma_start"] > 0.01
        return outcome(0.1 if bad else 0.5 + noise["sigma_start"], "collapsed" if bad else "completed")

    search = searcher(sampler=name, configurations=10)
    drive(search, result)
    assert search._ot_study.best_trial.value > 0.5
    assert all(t.state.is_finished() for t in search._ot_study.trials)

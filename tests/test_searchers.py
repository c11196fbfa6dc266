"""The searcher without Ray: what it hands out, what Optuna is told, and that it does not matter when a sweep was interrupted."""

import json
import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from ray.tune.search import Searcher
from ray.tune.utils.util import flatten_dict
from scipy.stats import qmc

from search.proposals import GRID_LEVELS, STARTUP, coordinates, decode, encode, every, lattice
from search.searchers import (
    OBJECTIVES,
    SEARCHERS,
    Arm,
    Evidence,
    RinSearch,
    evidence_from_arms,
    evidence_from_points,
    pareto_front,
)
from spaces.config import ConfigError, TrialConfig
from spaces.library import SPACES, Choice, Dimension, Float, Int, Space, When
from spaces.reading import merge
from spaces.workloads import WORKLOADS

BASE = WORKLOADS["tiny"].settings
Result = dict[str, Any]
WITHOUT_A_MODEL = ["random", "grid", "qmc"]


def control() -> Arm:
    return Arm(name="control", origin="control", tree=merge(BASE, {"noise": {"sigma_start": 0.0}}))


def searcher(space: Space = SPACES["sigma"], **changes: Any) -> RinSearch:
    arguments: dict[str, Any] = {
        "base": merge(BASE, space.settings),
        "fixed": [control()],
        "configurations": 4,
        "replicates": 1,
        "seed": 3,
        "searcher": "random",
    }
    return RinSearch(space=space, **(arguments | changes))


def outcome(accuracy: float, word: str = "completed", seconds: float = 36.0) -> Result:
    return {"outcome": {"outcome": word, "eval": {"accuracy": accuracy}, "seconds": seconds}, "training_iteration": 1}


def drive(search: RinSearch, results: Callable[[Any], Any], trials: int = 1000) -> list[Any]:
    """Run a search to its end or for some trials; `results(suggestion)` is what a trial reports, None = it fails."""
    given: list[Any] = []
    while len(given) < trials:
        suggestion = search.suggest(f"t{len(given)}")
        if suggestion == Searcher.FINISHED:
            return given
        result = results(suggestion)
        search.on_trial_complete(f"t{len(given)}", result and flatten_dict(result), error=result is None)  # flattened: as Tune does
        given.append(suggestion)
    return given


def cliff(s: Any) -> Result:
    """Linear noise above 0.01 collapses; more noise on norms is better."""
    noise = s["config"]["noise"]
    bad = noise["modules"] == ["linear"] and noise["sigma_start"] > 0.01
    return outcome(0.1 if bad else 0.5 + noise["sigma_start"], "collapsed" if bad else "completed")


def trees(arms: Sequence[Arm]) -> list[str]:
    return [json.dumps([arm.name, arm.tree, arm.params], sort_keys=True) for arm in arms]


def reread(arms: Sequence[Arm]) -> list[Arm]:
    """As if from files."""
    plain = [json.loads(json.dumps([a.name, a.origin, a.tree, a.params, list(a.results.items())])) for a in arms]
    return [Arm(name=name, origin=origin, tree=tree, params=params, results=dict(results)) for name, origin, tree, params, results in plain]


def choices(**options: int) -> Space:
    """A finite space: `options` labels for each key, on keys that always make a valid trial."""
    values = {"grpo__steps": range(3, 99), "grpo__prompts": range(2, 99), "grpo__group_size": range(2, 99)}
    return Space(
        name="finite",
        description="",
        dimensions=tuple(
            Dimension(key=key.replace("__", "."), domain=Choice(options={f"v{v}": v for v in list(values[key])[:n]}))
            for key, n in options.items()
        ),
    )


# --- order, replicates, seeds -----------------------------------------------------------------------------------------------------


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


def test_an_arm_is_written_down_before_its_first_replicate_is_handed_out() -> None:
    written: list[str] = []
    search = searcher(replicates=2, record=lambda arm: written.append(arm.name))
    for number in range(8):
        suggestion = search.suggest(f"t{number}")
        assert isinstance(suggestion, dict)
        assert written == ["control", "c01", "c02", "c03"][: number // 2 + 1]
        assert written[-1] == suggestion["arm"]


def test_an_arm_that_could_not_be_written_down_is_not_run() -> None:
    def full(arm: Arm) -> None:
        raise OSError("no space left on device")

    search = searcher(record=full)
    with pytest.raises(OSError, match="no space left"):
        search.suggest("t0")
    assert search.arms == []


@pytest.mark.parametrize("name", SEARCHERS)
def test_every_suggestion_of_every_searcher_is_a_valid_trial_within_its_range(name: str) -> None:
    domains = {d.name: d.domain for d in SPACES["full"].dimensions}
    search = searcher(SPACES["full"], configurations=9, searcher=name)
    for s in drive(search, lambda s: outcome(0.1))[1:]:
        TrialConfig.model_validate(s["config"])
    for arm in search.arms[1:]:
        assert len(arm.params) == len(domains) - 1, "sigma_start exists for one module kind alone"
        for dimension, value in arm.params.items():
            domain = domains[dimension]
            assert value in domain.options if isinstance(domain, Choice) else domain.low <= value <= domain.high, dimension


@pytest.mark.parametrize("name", SEARCHERS)
def test_every_searcher_ends_with_nothing_running_and_learns_where_collapses_are(name: str) -> None:
    search = searcher(searcher=name, configurations=13)
    drive(search, cliff)
    study = search.study()
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 12
    for trial, arm in zip(study.trials, search.arms[1:], strict=True):
        collapsed = arm.results[0]["outcome"] == "collapsed"  # type: ignore[index]
        assert (trial.constraints.get("collapses", 0.0) > 0) == collapsed
    assert study.best_trial.value > 0.5


@pytest.mark.parametrize("name", ["gp", "tpe", "cmaes"])
def test_a_model_collapses_less_often_than_chance_does(name: str) -> None:
    """Three quarters of this space collapse, and nothing else tells the rest apart."""

    def result(s: Any) -> Result:
        noise = s["config"]["noise"]
        good = noise["modules"] == ["linear"] and noise["sigma_start"] < 0.0063
        return outcome(0.5, "completed" if good else "collapsed")

    def late_collapses(which: str) -> int:
        total = 0
        for seed in (1, 2, 3):
            search = searcher(searcher=which, configurations=32, seed=seed)
            drive(search, result)
            total += sum(arm.results[0]["outcome"] == "collapsed" for arm in search.arms[16:])  # type: ignore[index]
        return total

    assert late_collapses(name) < 0.8 * late_collapses("random")


def test_the_same_results_lead_to_the_same_draws() -> None:
    one, other = searcher(searcher="gp", configurations=10), searcher(searcher="gp", configurations=10)
    drive(one, cliff)
    drive(other, cliff)
    assert trees(one.arms) == trees(other.arms)


# --- what is told -----------------------------------------------------------------------------------------------------------------


def test_optuna_is_told_the_median_of_all_replicates_once() -> None:
    values = iter([0.5, 0.5, 0.5, 0.1, 0.9, 0.4])
    search = searcher(configurations=2, replicates=3)
    drive(search, lambda s: outcome(next(values)))
    (told,) = search.study().trials
    assert told.value == 0.4
    assert told.state.name == "COMPLETE"


def test_an_outcome_arrives_whole_flattened_or_not() -> None:
    for hand_over in (flatten_dict, dict):
        search = searcher(configurations=1)
        search.suggest("t")
        search.on_trial_complete("t", hand_over(outcome(0.25, "collapsed", seconds=7.0)))
        assert search.arms[0].results == {0: {"outcome": "collapsed", "eval": {"accuracy": 0.25}, "seconds": 7.0}}


def test_a_trial_that_was_stopped_before_its_first_result_has_not_failed() -> None:
    search = searcher(configurations=1)
    search.suggest("t")
    search.on_trial_complete("t")
    assert search.arms[0].results == {0: {"outcome": "stopped"}}


def test_a_configuration_with_replicates_to_go_is_running() -> None:
    search = searcher(configurations=2, replicates=3)
    drive(search, lambda s: outcome(0.5), trials=5)
    assert [t.state.name for t in search.study().trials] == ["RUNNING"]


def test_one_collapse_among_three_replicates_makes_the_configuration_infeasible() -> None:
    search = searcher(configurations=3, replicates=3)

    def result(s: Any) -> Result:
        bad = s["arm"] == "c01" and s["replicate"] == 1
        return outcome(0.9 if s["arm"] == "c01" else 0.3, "collapsed" if bad else "completed")

    drive(search, result)
    assert search.study().best_trial.value == 0.3, "the better median is not chosen: one of its replicates collapsed"


STOPPED = {"training_iteration": 3, "step": 2}
# results of three replicates -> state in Optuna, violated constraint
TOLD: list[tuple[str, list[Any], str, bool]] = [
    ("all completed", [outcome(0.5), outcome(0.6), outcome(0.7)], "COMPLETE", False),
    ("a failure", [outcome(0.5), None, outcome(0.7)], "FAIL", False),
    ("nan", [outcome(0.5), outcome(math.nan), outcome(0.7)], "FAIL", False),
    ("infinite", [outcome(0.5), outcome(math.inf), outcome(0.7)], "FAIL", False),
    ("stopped without an outcome", [outcome(0.5), STOPPED, outcome(0.7)], "PRUNED", False),
    ("stopped with an outcome", [outcome(0.5), outcome(0.4, "stopped"), outcome(0.7)], "PRUNED", False),
    ("stopped and failed", [None, STOPPED, outcome(0.7)], "FAIL", False),
    ("a collapse beside a failure", [outcome(0.5, "collapsed"), None, outcome(0.7)], "COMPLETE", True),
    ("a collapse beside a stop", [outcome(0.5, "collapsed"), STOPPED, STOPPED], "COMPLETE", True),
    ("a collapse without an accuracy", [outcome(math.nan, "collapsed"), None, None], "COMPLETE", True),
]


@pytest.mark.parametrize(("results", "state", "violated"), [row[1:] for row in TOLD], ids=[row[0] for row in TOLD])
def test_what_three_replicates_come_to(results: list[Any], state: str, violated: bool) -> None:
    search = searcher(configurations=3, replicates=3)
    other = outcome(0.9, "collapsed")  # so that there is a constraint at all
    drive(search, lambda s: {"control": outcome(0.5), "c01": results[s["replicate"]], "c02": other}[s["arm"]])
    told = search.study().trials[0]
    assert told.state.name == state
    assert (told.constraints.get("collapses", 0.0) > 0) == violated
    assert told.value is None or math.isfinite(told.value)


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("result", [None, STOPPED, outcome(math.nan)], ids=["error", "stopped", "nan"])
def test_a_search_in_which_nothing_is_ever_completed_goes_on_to_its_end(name: str, result: Any) -> None:
    search = searcher(searcher=name, configurations=9)
    assert len(drive(search, lambda s: result)) == 9
    assert all(t.state.is_finished() for t in search.study().trials)


@pytest.mark.parametrize("name", ["gp", "tpe", "cmaes"])
def test_a_search_in_which_everything_collapses_goes_on_to_its_end(name: str) -> None:
    search = searcher(searcher=name, configurations=12)
    assert len(drive(search, lambda s: outcome(0.1, "collapsed"))) == 12


def test_running_configurations_are_not_proposed_again_by_a_model() -> None:
    search = searcher(searcher="gp", configurations=16)
    drive(search, cliff, trials=8)
    asked = [search.suggest(f"p{k}") for k in range(4)]
    assert len({json.dumps(s["config"]) for s in asked if isinstance(s, dict)}) == 4
    states = [t.state.name for t in search.study().trials]
    assert states == ["COMPLETE"] * 7 + ["RUNNING"] * 4


# --- interruption -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHERS)
def test_an_interrupted_search_goes_on_with_the_configurations_of_an_undisturbed_one(name: str) -> None:
    """Also a model's, one trial at a time: a proposal depends on the results and on nothing else."""
    whole = searcher(searcher=name, configurations=12)
    drive(whole, cliff)
    for moment in random.Random(name).sample(range(1, 12), 3):
        first = searcher(searcher=name, configurations=12)
        drive(first, cliff, trials=moment)
        second = searcher(searcher=name, configurations=12, known=reread(first.arms))
        drive(second, cliff)
        assert trees(second.arms) == trees(whole.arms), f"interrupted after {moment}"
        assert all(t.state.name == "COMPLETE" for t in second.study().trials)


@pytest.mark.parametrize("name", WITHOUT_A_MODEL)
def test_what_was_running_at_the_interruption_is_handed_out_first(name: str) -> None:
    whole = searcher(searcher=name, configurations=6, replicates=3)
    drive(whole, cliff)
    first = searcher(searcher=name, configurations=6, replicates=3)
    drive(first, cliff, trials=7)
    lost = [first.suggest("x"), first.suggest("y")]
    recorded: list[str] = []
    second = searcher(searcher=name, configurations=6, replicates=3, known=reread(first.arms), record=lambda arm: recorded.append(arm.name))
    given = drive(second, cliff)
    assert given[:2] == lost
    assert len(given) == 18 - 7
    assert trees(second.arms) == trees(whole.arms)
    assert recorded == ["c03", "c04", "c05"], "what is known is not written down again"


def test_fixed_arms_that_were_not_yet_written_down_come_after_what_is_unfinished() -> None:
    point = Arm(name="p", origin="point", tree=merge(BASE, {"noise": {"sigma_start": 0.02}}))
    first = searcher(fixed=[control(), point])
    drive(first, cliff, trials=1)
    second = searcher(fixed=[control(), point], known=reread(first.arms))
    assert [s["arm"] for s in drive(second, cliff)] == ["p", "c02", "c03"]


def test_a_failed_replicate_has_ended_and_is_not_handed_out_again() -> None:
    first = searcher(configurations=2)
    drive(first, lambda s: None)
    assert drive(searcher(configurations=2, known=reread(first.arms)), cliff) == []


def test_tune_gets_nothing_to_pickle_and_nothing_to_unpickle(tmp_path: Any) -> None:
    search = searcher(record=lambda arm: None)  # a closure cannot be pickled
    search.save_to_dir(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="anew"):
        search.restore(str(tmp_path))


# --- nothing twice ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_finite_space_is_run_once_over_and_then_the_search_is_finished(name: str) -> None:
    search = searcher(choices(grpo__steps=3, grpo__prompts=4), searcher=name, configurations=40)
    drive(search, lambda s: outcome(0.5 + s["config"]["grpo"]["steps"] / 100))
    assert len(search.arms) == 1 + 12
    assert len({json.dumps(arm.params) for arm in search.arms[1:]}) == 12


def test_a_configuration_that_equals_a_point_within_rounding_is_not_run_again() -> None:
    space = Space(name="one", description="", dimensions=(Dimension(key="noise.num_stages", domain=Int(low=2, high=3)),))
    point = Arm(name="p", origin="point", tree=merge(BASE, {"noise": {"num_stages": 2, "sigma_start": 0.01 * (1 + 1e-14)}}))
    search = searcher(space, fixed=[control(), point], configurations=9, base=merge(BASE, {"noise": {"sigma_start": 0.01}}))
    drive(search, lambda s: outcome(0.5))
    assert [dict(arm.params) for arm in search.arms] == [{}, {}, {"noise.num_stages": 3}]


def test_a_space_that_always_contradicts_itself_is_an_error_with_the_reason() -> None:
    space = Space(
        name="upside-down",
        description="",
        dimensions=(
            Dimension(key="noise.sigma_start", domain=Float(low=0.001, high=0.002)),
            Dimension(key="noise.sigma_end", domain=Float(low=0.01, high=0.02)),
        ),
    )
    for name in SEARCHERS:
        search = searcher(space, searcher=name)
        search.suggest("t0")
        with pytest.raises(ConfigError, match=r"upside-down.*sigma_end must be"):
            search.suggest("t1")


def test_draws_that_contradict_themselves_are_drawn_again() -> None:
    space = Space(
        name="overlapping",
        description="",
        dimensions=(
            Dimension(key="noise.sigma_start", domain=Float(low=0.001, high=0.02)),
            Dimension(key="noise.sigma_end", domain=Float(low=0.001, high=0.02)),
        ),
    )
    for name in SEARCHERS:
        search = searcher(space, searcher=name, configurations=12)
        assert len(drive(search, lambda s: outcome(0.5 + s["config"]["noise"]["sigma_end"]))) == 12, name


# --- coordinates, grid, quasi-random ----------------------------------------------------------------------------------------------

CONDITIONAL = Space(
    name="conditional",
    description="",
    dimensions=(
        Dimension(key="noise.schedule", domain=Choice(options={"constant": "constant", "log": "log"})),
        Dimension(key="noise.num_stages", domain=Int(low=2, high=4), when=When(parent="noise.schedule", value="log")),
        Dimension(key="noise.modules", domain=Choice(options={"rmsnorm": ["rmsnorm"], "linear": ["linear"]})),
        Dimension(key="noise.sigma_start", domain=Float(low=0.005, high=0.1, log=True), when=When(parent="noise.modules", value="rmsnorm")),
        Dimension(key="noise.sigma_start", domain=Float(low=0.002, high=0.02, log=True), when=When(parent="noise.modules", value="linear")),
    ),
)


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_conditional_dimension_is_drawn_only_under_its_condition(name: str) -> None:
    search = searcher(CONDITIONAL, searcher=name, configurations=14)
    drive(search, lambda s: outcome(0.5))
    for arm in search.arms[1:]:
        assert ("noise.num_stages|log" in arm.params) == (arm.params["noise.schedule"] == "log")
        assert f"noise.sigma_start|{arm.params['noise.modules']}" in arm.params
        assert sum(name.startswith("noise.sigma_start") for name in arm.params) == 1


def test_dimensions_of_one_key_share_a_coordinate() -> None:
    assert [len(c.dimensions) for c in coordinates(CONDITIONAL)] == [1, 1, 1, 2]
    place = {c.name: c.middle for c in coordinates(CONDITIONAL)} | {"noise.modules": "linear"}
    assert decode(CONDITIONAL, place)["noise.sigma_start|linear"] == pytest.approx(math.sqrt(0.002 * 0.02))


@pytest.mark.parametrize(("beyond", "end"), [(1.4, 0.02), (-0.3, 0.002)])
def test_a_proposal_beyond_a_range_is_moved_to_its_end(beyond: float, end: float) -> None:
    place = {c.name: c.middle for c in coordinates(CONDITIONAL)} | {"noise.modules": "linear", coordinates(CONDITIONAL)[3].name: beyond}
    assert decode(CONDITIONAL, place)["noise.sigma_start|linear"] == end


@pytest.mark.parametrize("space", [*SPACES.values(), CONDITIONAL], ids=lambda space: space.name)
def test_every_configuration_survives_the_way_to_coordinates_and_back(space: Space) -> None:
    search = searcher(space, searcher="random", configurations=30)
    drive(search, lambda s: outcome(0.5))
    for arm in search.arms[1:]:
        assert decode(space, encode(space, arm.params)) == pytest.approx(dict(arm.params))


def test_the_grid_is_every_combination_once_with_both_ends() -> None:
    found = [dict(params) for params in lattice(SPACES["sigma"], GRID_LEVELS)]
    assert len(found) == 2 * GRID_LEVELS * GRID_LEVELS
    assert len({json.dumps(p, sort_keys=True) for p in found}) == len(found)
    for module, (low, high) in {"rmsnorm": (0.005, 0.1), "linear": (0.002, 0.02)}.items():
        sigmas = sorted({p[f"noise.sigma_start|{module}"] for p in found if p["noise.modules"] == module})
        assert (sigmas[0], sigmas[-1]) == (low, high)
        assert all(b / a == pytest.approx((high / low) ** 0.25) for a, b in pairwise(sigmas)), "evenly on a log scale"


def test_the_grid_of_a_conditional_space_has_no_value_where_there_is_no_dimension() -> None:
    found = list(lattice(CONDITIONAL, GRID_LEVELS))
    assert len(found) == (1 + 3) * 2 * GRID_LEVELS


def test_the_beginning_of_the_grid_is_spread_out() -> None:
    """Against the plain order, whose first ten of fifty know one module kind and two values of sigma_start."""
    first = list(lattice(SPACES["sigma"], GRID_LEVELS))[:10]
    assert {p["noise.modules"] for p in first} == {"rmsnorm", "linear"}
    assert len({p["noise.sigma_end"] for p in first}) == GRID_LEVELS
    assert len({round(encode(SPACES["sigma"], p)[coordinates(SPACES["sigma"])[1].name], 9) for p in first}) == GRID_LEVELS


def test_a_finite_space_can_be_listed_and_a_real_number_cannot() -> None:
    rows = every(choices(grpo__steps=3, grpo__prompts=4))
    assert rows is not None
    assert len(list(rows)) == 12
    assert every(SPACES["sigma"]) is None


def test_quasi_random_points_are_more_even_than_random_ones() -> None:
    """By scipy's discrepancy of the coordinates."""
    space = Space(
        name="square",
        description="",
        dimensions=(
            Dimension(key="noise.sigma_start", domain=Float(low=0.01, high=0.1)),
            Dimension(key="noise.sigma_end", domain=Float(low=0.0001, high=0.001)),
        ),
    )

    def discrepancy(name: str) -> float:
        search = searcher(space, searcher=name, configurations=33)
        drive(search, lambda s: outcome(0.5))
        return float(qmc.discrepancy([list(encode(space, arm.params).values()) for arm in search.arms[1:]]))

    assert discrepancy("qmc") < discrepancy("random") / 3


@pytest.mark.parametrize("name", ["random", "qmc"])
def test_a_long_search_does_not_run_dry(name: str) -> None:
    assert len(drive(searcher(searcher=name, configurations=130), lambda s: outcome(0.5))) == 130


def test_another_seed_draws_other_configurations() -> None:
    for name in ("random", "qmc", "gp", "cmaes"):
        one, other = searcher(searcher=name, seed=1), searcher(searcher=name, seed=2)
        drive(one, cliff)
        drive(other, cliff)
        assert not set(trees(one.arms[1:])) & set(trees(other.arms[1:])), name


# --- objectives -------------------------------------------------------------------------------------------------------------------


def trade(s: Any) -> Result:
    """More stages cost more time and give more accuracy; one of three replicates collapses where sigma is large."""
    noise = s["config"]["noise"]
    collapsed = noise["sigma_start"] > 0.03 and s["replicate"] == 0
    return outcome(0.3 + noise["sigma_start"], "collapsed" if collapsed else "completed", seconds=3600 * noise["sigma_start"])


@pytest.mark.parametrize("name", [name for name, method in SEARCHERS.items() if method.several])
@pytest.mark.parametrize("objectives", [("accuracy", "hours"), ("accuracy", "collapses", "hours")])
def test_several_objectives_are_told_in_their_directions(name: str, objectives: tuple[str, ...]) -> None:
    search = searcher(searcher=name, configurations=STARTUP + 4, replicates=3, objectives=objectives)
    drive(search, trade)
    study = search.study()
    assert [d.name for d in study.directions] == ["MAXIMIZE", *["MINIMIZE"] * (len(objectives) - 1)]
    for trial, arm in zip(study.trials, search.arms[1:], strict=True):
        sigma = arm.tree["noise"]["sigma_start"]
        assert trial.values[0] == pytest.approx(0.3 + sigma)
        assert trial.values[-1] == pytest.approx(sigma)
        if "collapses" in objectives:
            assert trial.values[1] == pytest.approx(1 / 3 if sigma > 0.03 else 0.0)
            assert trial.constraints == {}, "an objective is not a constraint as well"


def test_a_searcher_that_cannot_follow_several_objectives_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"--searcher cmaes.*accuracy,hours.*gp"):
        searcher(searcher="cmaes", objectives=("accuracy", "hours"))


@pytest.mark.parametrize(("objectives", "words"), [(("speed",), "speed is unknown"), ((), "once"), (("accuracy", "accuracy"), "once")])
def test_objectives_that_make_no_sense_are_refused(objectives: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        searcher(objectives=objectives)


def test_an_unknown_searcher_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"--searcher bohb.*gp, tpe"):
        searcher(searcher="bohb")


def arm(name: str, *results: Any) -> Arm:
    outcomes = [result and result["outcome"] for result in results]
    return Arm(name=name, origin="searcher", tree={}, results=dict(enumerate(outcomes)))


def test_the_pareto_front_holds_what_nothing_beats() -> None:
    arms = [
        arm("good", outcome(0.7, seconds=100)),
        arm("quick", outcome(0.5, seconds=50)),
        arm("beaten", outcome(0.5, seconds=80)),
        arm("twin of good", outcome(0.7, seconds=100)),
        arm("best but collapsed", outcome(0.9, "collapsed", seconds=1)),
        arm("failed", None),
        arm("stopped", outcome(0.9, "stopped", seconds=1)),
        arm("not begun"),
    ]
    names = [a.name for a in pareto_front(arms, ("accuracy", "hours"))]
    assert names == ["good", "quick", "twin of good"]
    assert [a.name for a in pareto_front(arms, ("accuracy",))] == ["good", "twin of good"]
    with_risk = [a.name for a in pareto_front(arms, ("accuracy", "collapses"))]
    assert with_risk == ["good", "twin of good", "best but collapsed"]


def test_the_pareto_front_agrees_with_optunas() -> None:
    search = searcher(configurations=30, replicates=3, objectives=("accuracy", "hours"))
    rng = random.Random(0)
    drive(search, lambda s: outcome(rng.random(), seconds=rng.random()))
    wanted = {tuple(t.values) for t in search.study().best_trials}
    front = pareto_front(search.arms[1:], ("accuracy", "hours"))
    told = {tuple(t.values): a.name for t, a in zip(search.study().trials, search.arms[1:], strict=True)}
    assert {a.name for a in front} == {told[values] for values in wanted}


def test_objectives_have_a_direction() -> None:
    assert {name: o.better for name, o in OBJECTIVES.items()} == {"accuracy": "more", "collapses": "less", "hours": "less"}


# --- evidence ---------------------------------------------------------------------------------------------------------------------


def test_the_plans_collapses_are_told_without_spending_a_trial() -> None:
    evidence = evidence_from_points(["e13i-baseline", "e13i-v2"], SPACES["sigma"], merge({}, {}))
    assert [e.params["noise.sigma_start|linear"] for e in evidence] == [0.05, 0.01]
    assert all(e.accuracy is None and e.collapses == 1 for e in evidence)
    assert "collapsed at step 3; different there: grpo.filter_groups=resample (here off)" in evidence[0].source
    search = searcher(searcher="gp", evidence=evidence, configurations=3)
    drive(search, cliff)
    assert [t.state.name for t in search.study().trials] == ["COMPLETE"] * 4
    assert [t.constraints["collapses"] > 0 for t in search.study().trials[:2]] == [True, True]


def test_evidence_beyond_a_range_widens_the_model_and_not_the_space() -> None:
    evidence = evidence_from_points(["e13i-baseline"], SPACES["sigma"], {})
    for name in ("gp", "tpe", "cmaes"):
        search = searcher(searcher=name, evidence=evidence, configurations=14)
        drive(search, lambda s: outcome(0.5 + s["config"]["noise"]["sigma_start"]))  # draws towards the end of the range
        for drawn in search.arms[1:]:
            for dimension, value in drawn.params.items():
                domain = {d.name: d.domain for d in SPACES["sigma"].dimensions}[dimension]
                assert isinstance(domain, Choice) or domain.low <= value <= domain.high, (name, dimension)


def test_an_unknown_accuracy_is_told_as_the_median_of_the_known_ones() -> None:
    evidence = evidence_from_points(["e13i-v2"], SPACES["sigma"], {})
    values = iter([0.1, 0.2, 0.4, 0.9])
    search = searcher(evidence=evidence, configurations=4)
    drive(search, lambda s: outcome(next(values)))
    assert search.study().trials[0].value == 0.4


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
            search = searcher(searcher="gp", evidence=evidence, configurations=10, seed=seed)
            given = drive(search, lambda s: outcome(0.5, "collapsed" if s["config"]["noise"]["modules"] == ["linear"] else "completed"))
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


def test_an_earlier_sweep_is_evidence_where_it_fits() -> None:
    earlier = searcher(SPACES["sigma"], configurations=8, replicates=3, seed=11)
    drive(earlier, trade)
    earlier.arms[-1].results[0] = None  # failed: nobody knows
    evidence = evidence_from_arms(earlier.arms, SPACES["sigma"], "sweep first")
    assert len(evidence) == 6, "without the control, whose sigma lies outside, and the failed one"
    assert all(e.source.startswith("sweep first (2 of its 8 arms left out): c0") for e in evidence)
    for given, told in zip(evidence, earlier.arms[1:-1], strict=True):
        sigma = told.tree["noise"]["sigma_start"]
        assert dict(given.params) == pytest.approx(dict(told.params))
        assert (given.accuracy, given.hours) == (pytest.approx(0.3 + sigma), pytest.approx(sigma))
        assert given.collapses == (1 if sigma > 0.03 else 0)
    later = searcher(SPACES["sigma"], searcher="gp", evidence=evidence, configurations=2, objectives=("accuracy", "hours"))
    drive(later, cliff)
    assert len(later.study().trials) == 7


def test_an_earlier_sweep_on_other_modules_or_precision_is_left_out() -> None:
    earlier = searcher(SPACES["w4a16"], configurations=5)
    drive(earlier, cliff)
    assert len(evidence_from_arms(earlier.arms, SPACES["w4a16"], "s", earlier.base)) == 4
    assert evidence_from_arms(earlier.arms, SPACES["sigma"], "s", BASE) == []


def test_a_warm_start_spares_the_model_its_start_up() -> None:
    earlier = searcher(configurations=8)
    drive(earlier, cliff)
    evidence = evidence_from_arms(earlier.arms, SPACES["sigma"], "s")
    cold, warm = searcher(searcher="tpe", seed=5), searcher(searcher="tpe", seed=5, evidence=evidence)
    drive(cold, cliff)
    drive(warm, cliff)
    assert trees(cold.arms[1:2]) == trees([*_drawn("qmc", 5)])
    assert trees(warm.arms[1:2]) != trees(cold.arms[1:2])


def _drawn(name: str, seed: int) -> list[Arm]:
    search = searcher(searcher=name, seed=seed)
    drive(search, cliff)
    return search.arms[1:2]

"""The searcher without Ray: what it hands out, what Optuna is told, and that it does not matter when a sweep was
interrupted."""

import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from search.arms import Arm, read_arms
from search.lineup import base_tree
from search.proposals import SEARCHERS
from search.searchers import RinSearch
from spaces.config import ConfigError, TrialConfig
from spaces.library import SPACES, Choice, Dimension, Float, Int, Space
from spaces.reading import merge, read_config
from tests.searches import STOPPED, Search, choices, cliff, control, drive, outcome, reread, searcher, trees
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import write_outcome
from trainable.outcome import Outcome
from trainable.ray_trainable import REFUSED

WITHOUT_A_MODEL = ["random", "grid", "qmc"]


# --- order, replicates, seeds -----------------------------------------------------------------------------------------


def test_the_control_is_handed_out_first_and_configurations_are_counted_with_it() -> None:
    search = searcher(trials=4)
    given = drive(search, lambda s: outcome(0.5))
    assert [s["arm"] for s in given] == ["control", "c01", "c02", "c03"]
    assert [search.arms[s["number"]].name for s in given] == [s["arm"] for s in given]
    assert [arm.origin for arm in search.arms] == ["control", "searcher", "searcher", "searcher"]
    assert given[0]["config"]["noise"]["sigma_start"] == 0.0
    assert all(s["config"]["noise"]["sigma_start"] > 0 for s in given[1:])


def test_a_trial_is_told_how_many_gpus_its_hours_count() -> None:
    for gpus, slots in ((0.5, 0.5), (None, 1.0)):
        assert {s["slots"] for s in drive(searcher(trials=2, gpus=gpus), lambda s: outcome(0.5))} == {slots}


def test_replicates_share_their_seeds_across_arms() -> None:
    given = drive(searcher(trials=3, replicates=3, seed=7), lambda s: outcome(0.5))
    seeds = {(s["arm"], s["replicate"]): s["config"]["seed"] for s in given}
    assert seeds == {(arm, k): 7 + k for arm in ("control", "c01", "c02") for k in range(3)}
    for arm in ("control", "c01", "c02"):
        configs = [json.dumps({**s["config"], "seed": 0}) for s in given if s["arm"] == arm]
        assert len(set(configs)) == 1, "replicates differ in their seed alone"


def test_an_arm_is_written_down_before_its_first_replicate_is_handed_out() -> None:
    search = searcher(replicates=2)
    for number in range(8):
        suggestion = search.suggest(f"t{number}")
        assert isinstance(suggestion, dict)
        assert search.written == ["c01", "c02", "c03"][: number // 2], "the control was there"
        assert suggestion["arm"] == ["control", *search.written][-1]


def test_an_arm_that_could_not_be_written_down_is_not_run() -> None:
    class Full(Search):
        def record(self, number: int, arm: Arm) -> None:
            raise OSError("no space left on device")

    search = Full(searcher().study, [control()])
    search.suggest("t0")
    with pytest.raises(OSError, match="no space left"):
        search.suggest("t1")
    assert [arm.name for arm in search.arms] == ["control"]


@pytest.mark.parametrize("name", SEARCHERS)
def test_every_suggestion_of_every_searcher_is_a_valid_trial_within_its_range(name: str) -> None:
    domains = {d.name: d.domain for d in SPACES["full"].dimensions}
    search = searcher(SPACES["full"], trials=9, searcher=name)
    for s in drive(search, lambda s: outcome(0.1))[1:]:
        TrialConfig.model_validate(s["config"])
    for arm in (arm for arm in search.arms if arm.origin == "searcher"):
        gone = 3 if arm.params["noise.schedule"] == "constant" else 1
        assert len(arm.params) == len(domains) - gone, "sigma_start exists for one module kind, a decay for no constant"
        for dimension, value in arm.params.items():
            domain = domains[dimension]
            assert value in domain.options if isinstance(domain, Choice) else domain.low <= value <= domain.high, (
                dimension
            )


@pytest.mark.parametrize("name", SEARCHERS)
def test_every_searcher_ends_with_nothing_running_and_learns_where_collapses_are(name: str) -> None:
    search = searcher(searcher=name, trials=13)
    drive(search, cliff)
    study = search.optuna()
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 12
    for trial, arm in zip(study.trials, search.arms[1:], strict=True):
        collapsed = arm.results[0].collapsed
        assert (trial.constraints.get("collapses", 0.0) > 0) == collapsed
    assert study.best_trial.value > 0.5


@pytest.mark.parametrize("name", ["gp", "tpe"])
def test_a_model_collapses_less_often_than_chance_does(name: str) -> None:
    """Three quarters of this space collapse, and nothing else tells the rest apart."""

    def result(s: Any) -> Outcome:
        noise = s["config"]["noise"]
        good = noise["modules"] == ["linear"] and noise["sigma_start"] < 0.0063
        return outcome(0.5, "completed" if good else "collapsed")

    def late_collapses(which: str) -> int:
        total = 0
        for seed in (1, 2, 3):
            search = searcher(searcher=which, trials=32, seed=seed)
            drive(search, result)
            total += sum(arm.results[0].collapsed for arm in search.arms[16:])
        return total

    assert late_collapses(name) < 0.8 * late_collapses("random")


def test_the_same_results_lead_to_the_same_draws() -> None:
    one, other = searcher(searcher="gp", trials=10), searcher(searcher="gp", trials=10)
    drive(one, cliff)
    drive(other, cliff)
    assert trees(one.arms) == trees(other.arms)


# --- what is told -----------------------------------------------------------------------------------------------------


def test_optuna_is_told_the_median_of_all_replicates_once() -> None:
    values = iter([0.5, 0.5, 0.5, 0.1, 0.9, 0.4])
    search = searcher(trials=2, replicates=3)
    drive(search, lambda s: outcome(next(values)))
    (told,) = search.optuna().trials
    assert told.value == 0.4
    assert told.state.name == "COMPLETE"


def test_how_a_trial_ended_is_read_from_its_folder(tmp_path: Path) -> None:
    begun = searcher(store=str(tmp_path), trials=3)
    search = RinSearch(begun.study, begun.arms)
    search.suggest("t0")
    suggestion = search.suggest("t1")
    assert isinstance(suggestion, dict)
    (written,) = read_arms(begun.study)
    assert (written.name, written.params) == (suggestion["arm"], search.arms[1].params)
    write_outcome(Folder(suggestion["folder"]), outcome(0.25, "collapsed", seconds=7.0), [])
    search.on_trial_complete("t1", {"whatever": "Tune hands over"}, error=True)
    assert search.arms[1].results == {0: outcome(0.25, "collapsed", seconds=7.0)}
    assert search.arms[1].results == read_arms(begun.study)[0].results


def test_a_trial_that_was_refused_has_failed(tmp_path: Path) -> None:
    begun = searcher(store=str(tmp_path), trials=2)
    search = RinSearch(begun.study, begun.arms)
    search.suggest("t0")
    search.on_trial_complete("t0", {REFUSED: "model.name=/nope: cannot be loaded"})
    assert (search.arms[0].results, search.arms[0].failed) == ({}, {0})


def test_a_trial_that_was_stopped_has_neither_ended_nor_failed() -> None:
    search = searcher(trials=1)
    drive(search, lambda s: STOPPED)
    assert (search.arms[0].results, search.arms[0].failed) == ({}, set())


def test_a_configuration_with_replicates_to_go_is_running() -> None:
    search = searcher(trials=2, replicates=3)
    drive(search, lambda s: outcome(0.5), trials=5)
    assert [t.state.name for t in search.optuna().trials] == ["RUNNING"]


def test_one_collapse_among_three_replicates_makes_the_configuration_infeasible() -> None:
    search = searcher(trials=3, replicates=3)

    def result(s: Any) -> Outcome:
        bad = s["arm"] == "c01" and s["replicate"] == 1
        return outcome(0.9 if s["arm"] == "c01" else 0.3, "collapsed" if bad else "completed")

    drive(search, result)
    assert search.optuna().best_trial.value == 0.3, "the better median is not chosen: one of its replicates collapsed"


# results of three replicates -> state in Optuna, violated constraint
TOLD: list[tuple[str, list[Any], str, bool]] = [
    ("all completed", [outcome(0.5), outcome(0.6), outcome(0.7)], "COMPLETE", False),
    ("a failure", [outcome(0.5), None, outcome(0.7)], "FAIL", False),
    ("nan", [outcome(0.5), outcome(math.nan), outcome(0.7)], "FAIL", False),
    ("infinite", [outcome(0.5), outcome(math.inf), outcome(0.7)], "FAIL", False),
    ("stopped", [outcome(0.5), STOPPED, outcome(0.7)], "RUNNING", False),
    ("stopped and failed", [None, STOPPED, outcome(0.7)], "RUNNING", False),
    ("a collapse beside a failure", [outcome(0.5, "collapsed"), None, outcome(0.7)], "COMPLETE", True),
    ("a collapse without an accuracy", [outcome(math.nan, "collapsed"), None, None], "COMPLETE", True),
]


@pytest.mark.parametrize(("results", "state", "violated"), [row[1:] for row in TOLD], ids=[row[0] for row in TOLD])
def test_what_three_replicates_come_to(results: list[Any], state: str, violated: bool) -> None:
    search = searcher(trials=3, replicates=3)
    other = outcome(0.9, "collapsed")  # so that there is a constraint at all
    drive(search, lambda s: {"control": outcome(0.5), "c01": results[s["replicate"]], "c02": other}[s["arm"]])
    of_c01 = -1 if state == "RUNNING" else 0  # what has ended comes first
    told = search.optuna().trials[of_c01]
    assert told.state.name == state
    assert (told.constraints.get("collapses", 0.0) > 0) == violated
    assert told.value is None or math.isfinite(told.value)


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("result", [None, outcome(math.nan)], ids=["error", "nan"])
def test_a_search_in_which_nothing_is_ever_completed_goes_on_to_its_end(name: str, result: Any) -> None:
    search = searcher(searcher=name, trials=9)
    assert len(drive(search, lambda s: result)) == 9
    assert all(t.state.is_finished() for t in search.optuna().trials)


@pytest.mark.parametrize("name", ["gp", "tpe"])
def test_a_search_in_which_everything_collapses_goes_on_to_its_end(name: str) -> None:
    search = searcher(searcher=name, trials=12)
    assert len(drive(search, lambda s: outcome(0.1, "collapsed"))) == 12


def test_running_configurations_are_not_proposed_again_by_a_model() -> None:
    search = searcher(searcher="gp", trials=16)
    drive(search, cliff, trials=8)
    asked = [search.suggest(f"p{k}") for k in range(4)]
    assert len({json.dumps(s["config"]) for s in asked if isinstance(s, dict)}) == 4
    states = [t.state.name for t in search.optuna().trials]
    assert states == ["COMPLETE"] * 7 + ["RUNNING"] * 4


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHERS)
def test_an_interrupted_search_goes_on_with_the_configurations_of_an_undisturbed_one(name: str) -> None:
    """Also a model's, one trial at a time: a proposal depends on the results and on nothing else."""
    whole = searcher(searcher=name, trials=12)
    drive(whole, cliff)
    for moment in random.Random(name).sample(range(1, 12), 3):
        first = searcher(searcher=name, trials=12)
        drive(first, cliff, trials=moment)
        second = searcher(searcher=name, trials=12, known=reread(first.arms))
        drive(second, cliff)
        assert trees(second.arms) == trees(whole.arms), f"interrupted after {moment}"
        assert all(t.state.name == "COMPLETE" for t in second.optuna().trials)


@pytest.mark.parametrize("name", WITHOUT_A_MODEL)
def test_what_was_running_at_the_interruption_is_handed_out_first(name: str) -> None:
    whole = searcher(searcher=name, trials=6, replicates=3)
    drive(whole, cliff)
    first = searcher(searcher=name, trials=6, replicates=3)
    drive(first, cliff, trials=7)
    lost = [first.suggest("x"), first.suggest("y")]
    second = searcher(searcher=name, trials=6, replicates=3, known=reread(first.arms))
    given = drive(second, cliff)
    assert given[:2] == lost
    assert len(given) == 18 - 7
    assert trees(second.arms) == trees(whole.arms)
    assert second.written == ["c03", "c04", "c05"], "what is known is not written down again"


def test_a_failed_replicate_is_given_up_by_this_run_and_tried_again_by_the_next() -> None:
    first = searcher(trials=2)
    assert len(drive(first, lambda s: None)) == 2
    again = drive(searcher(trials=2, known=reread(first.arms)), cliff)
    assert [s["arm"] for s in again] == ["control", "c01"]


def test_a_confirmation_goes_pair_by_pair() -> None:
    treated = Arm(name="c01", origin="winner", config=control().config)
    search = searcher(trials=2, replicates=3, kind="confirm", known=[control(), treated])
    given = drive(search, lambda s: outcome(0.5))
    assert [(s["replicate"], s["arm"]) for s in given] == [(k, arm) for k in range(3) for arm in ("control", "c01")]


def test_tune_gets_nothing_to_pickle_and_nothing_to_unpickle(tmp_path: Any) -> None:
    search = searcher(tracking_uri="postgresql://me:secret@host/db")
    assert b"secret" not in pickle.dumps(RinSearch(search.study, search.arms)), (
        "Tune writes its searcher into the store"
    )
    search.save_to_dir(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="anew"):
        search.restore(str(tmp_path))


# --- nothing twice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_finite_space_is_run_once_over_and_then_the_search_is_finished(name: str) -> None:
    search = searcher(choices(grpo__steps=3, grpo__prompts=4), searcher=name, trials=40)
    drive(search, lambda s: outcome(0.5 + s["config"]["grpo"]["steps"] / 100))
    assert len(search.arms) == 1 + 12
    assert len({json.dumps(arm.params) for arm in search.arms[1:]}) == 12


def test_a_configuration_that_equals_a_point_within_rounding_is_not_run_again() -> None:
    space = Space(
        name="one", description="", dimensions=(Dimension(key="noise.num_stages", domain=Int(low=2, high=3)),)
    )
    settings = {"noise": {"sigma_start": 0.01}}
    base = base_tree(searcher(space, settings=settings).study)
    near = read_config(merge(base, {"noise": {"num_stages": 2, "sigma_start": 0.01 * (1 + 1e-14)}}))
    point = Arm(name="p", origin="point", config=near)
    search = searcher(space, known=[control(), point], trials=9, settings=settings)
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
        search = searcher(space, searcher=name, trials=12)
        assert len(drive(search, lambda s: outcome(0.5 + s["config"]["noise"]["sigma_end"]))) == 12, name

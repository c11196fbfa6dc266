"""What runs next where only the number of runs is given: by tables, and through a whole search."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dashboards.report_text import plan_lines
from search.allocation import NEW, Run, Standing, new_configurations, next_run
from search.arms import candidate_of, planned, read_arms, unfinished, write_arm
from search.confirm import planned_confirmation
from search.events import TrialEvent
from search.evidence import known_of
from search.lineup import fixed_arms
from search.plan import plan_study
from search.promise import seen_of
from search.report import report_study
from search.searchers import RinSearch
from search.store import MOST
from search.study import resume_study, run_study
from search.surrogate import Seen
from spaces.library import SPACES, Choice, Dimension, Space
from tests.plain_sweeps import of_trials, without_ray
from tests.searches import Search, cliff, drive, outcome, reread, searcher
from tests.written_sweeps import make_arm, study, write_sweep, write_trial

SPACE = SPACES["sigma"]


def arm(gain: float | None, held: int, collapsed: int = 0, *, sigma: float = 0.01, running: int = 0) -> Standing:
    params = {"noise.modules": "rmsnorm", "noise.sigma_start|rmsnorm": sigma, "noise.sigma_end": 0.0005}
    seen = Seen(params=params, gain=gain, held=held, collapsed=collapsed)
    ended = held + collapsed
    return Standing(seen=seen, level=0.7, control=0, planned=ended + running, ended=ended)


def plain(planned: int = 1) -> Standing:
    return Standing(seen=Seen(params={}, gain=None, held=0, collapsed=0), planned=planned, ended=planned)


GOOD, POOR, FAR = arm(0.05, 1, sigma=0.01), arm(-0.04, 1, sigma=0.06), arm(-0.04, 1, sigma=0.09)
THREE = [GOOD, POOR, FAR]
TABLE: list[tuple[str, list[Standing], dict[str, Any], Run | None]] = [
    ("nothing but the control: something new", [plain()], {"runs": 10}, NEW),
    ("until so many configurations are there", [plain(), GOOD, POOR], {"runs": 10}, NEW),
    ("then again; the control first, so that it is paired", [plain(), *THREE], {"runs": 6}, Run(arm=0, replicate=1)),
    ("and the best of them", [plain(2), *THREE], {"runs": 6}, Run(arm=1, replicate=1)),
    ("all runs are decided on", [plain(), *THREE], {"runs": 4}, None),
    ("more than all", [plain(3), *THREE], {"runs": 5}, None),
    ("the last run is none for a control alone", [plain(), *THREE], {"runs": 5}, NEW),
    (
        "the best is running: the next of those that may be best",
        [plain(2), arm(0.05, 1, running=1), arm(0.049, 1, sigma=0.0101), FAR],
        {"runs": 8, "exhausted": True},
        Run(arm=2, replicate=1),
    ),
    (
        "nobody else may be: it again",
        [plain(3), arm(0.06, 1, running=1), arm(-0.3, 1, sigma=0.05), arm(-0.3, 1, sigma=0.09)],
        {"runs": 8, "exhausted": True},
        Run(arm=1, replicate=2),
    ),
    (
        "stopped after two collapses, whatever it promises",
        [plain(4), arm(0.2, 2, 2), arm(0.0, 1, sigma=0.0101)],
        {"runs": 20, "exhausted": True},
        Run(arm=2, replicate=1),
    ),
    (
        "what it gains on its own control counts, not whose control is higher",
        [plain(), plain(2), arm(0.01, 1, sigma=0.002), replace(arm(0.1, 1, sigma=0.09), level=0.4, control=1)],
        {"runs": 12, "exhausted": True},
        Run(arm=3, replicate=1),
    ),
    (
        "at its most",
        [plain(4), arm(0.2, 2), arm(0.0, 1, sigma=0.0101)],
        {"runs": 9, "most": 2, "exhausted": True},
        Run(arm=2, replicate=1),
    ),
    ("nothing may run any more", [plain(4), arm(None, 0, 2)], {"runs": 9, "exhausted": True}, None),
    ("all collapsed once, and the space goes on", [plain(4), arm(None, 0, 1), arm(None, 0, 1)], {"runs": 9}, NEW),
    ("nothing has ended", [plain(), arm(None, 0, running=1), arm(None, 0, running=1)], {"runs": 4}, NEW),
]


@pytest.mark.parametrize(("why", "arms", "given", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_what_runs_next(why: str, arms: Sequence[Standing], given: dict[str, Any], expected: Run | None) -> None:
    assert next_run(SPACE, arms, **given) == expected


def test_more_runs_try_more_and_the_points_count() -> None:
    assert [new_configurations(runs, 1) for runs in (2, 8, 10, 30)] == sorted(
        new_configurations(n, 1) for n in (2, 8, 10, 30)
    )
    assert new_configurations(10, 20) == 0


def ran(search: Search) -> list[tuple[str, int]]:
    return [(given["arm"], given["replicate"]) for given in drive(search, cliff)]


def by_runs(runs: int = 20, **changes: Any) -> Search:
    return searcher(total=runs, trials=runs, replicates=MOST, searcher="qmc", **changes)


def test_a_search_of_so_many_runs_makes_so_many_and_pairs_each() -> None:
    search = by_runs()
    done = ran(search)
    assert (len(done), len(set(done)), search.exhausted) == (20, 20, False)
    assert done[0] == ("control", 0)
    counts = Counter(name for name, _ in done)
    assert len(counts) - new_configurations(20, 0) in (0, 1), (
        "a last run is a new one where its partner would be missing"
    )
    for number, (name, replicate) in enumerate(done):
        assert replicate == [other for other, _ in done[:number]].count(name), "in order, none left out"
        assert name == "control" or ("control", replicate) in done[:number], "its partner has run"
    best = max(
        (a for a in search.arms if a.params), key=lambda a: a.results[0].eval.accuracy * (not a.results[0].collapsed)
    )
    assert counts[best.name] == max(counts[a.name] for a in search.arms if a.params) >= 3
    assert {counts[a.name] for a in search.arms if a.params and a.results[0].collapsed} == {1}


def test_replicate_k_has_the_same_seed_in_every_arm() -> None:
    search = by_runs()
    for given in drive(search, cliff):
        assert given["config"]["seed"] == search.study.seed + given["replicate"]


def test_the_same_results_in_the_same_order_lead_to_the_same_runs() -> None:
    assert ran(by_runs()) == ran(by_runs())


@pytest.mark.parametrize("cut", [7, 15, 18])
def test_a_search_that_was_killed_goes_on_with_what_it_had_decided(cut: int) -> None:
    whole, first = by_runs(), by_runs()
    expected = ran(whole)
    drive(first, cliff, trials=cut)
    assert ran(by_runs(known=reread(first.arms))) == expected[cut:]


def test_a_run_that_was_decided_on_and_killed_is_run_before_anything_else(tmp_path: Path) -> None:
    """By the files alone: the arm says how many replicates there are to be."""
    config = study(tmp_path, total=9, trials=9, replicates=MOST, settings={})
    arms = fixed_arms(config)
    write_arm(config, 0, arms[0])
    write_trial(config, arms[0], 0, outcome(0.5))
    searching = RinSearch(config, read_arms(config))
    for number in range(6):
        given: Any = searching.suggest(f"t{number}")
        write_trial(config, searching.arms[given["number"]], given["replicate"], outcome(0.5 + number / 100))
        searching.on_trial_complete(f"t{number}")
    lost: Any = searching.suggest("lost")
    assert lost["replicate"] == 1, "a replicate, and not a new arm"
    again = RinSearch(config, read_arms(config))
    found: Any = again.suggest("t0")
    assert (found["arm"], found["replicate"]) == (lost["arm"], lost["replicate"])
    assert unfinished(config, read_arms(config)) == 9 - 7
    assert [len(planned(config, one)) for one in again.arms] == [len(planned(config, one)) for one in searching.arms]


def test_a_finite_space_gives_the_rest_to_replicates_and_then_ends() -> None:
    few = Space(
        name="few",
        description="",
        dimensions=(Dimension(key="noise.sigma_start", domain=Choice(options={"a": 0.01, "b": 0.02, "c": 0.005})),),
    )
    search = searcher(few, total=14, trials=14, replicates=3, searcher="random")
    done = ran(search)
    assert (Counter(name for name, _ in done), search.exhausted) == (
        dict.fromkeys(["control", "c01", "c02", "c03"], 3),
        True,
    )


def test_the_model_is_told_every_run_and_a_report_every_configuration() -> None:
    search = by_runs(12)
    drive(search, cliff)
    told = known_of(search.study, search.arms, []).told
    assert len(told) == 12 - len(search.arms[0].results)
    assert len(known_of(search.study, search.arms, [], by_run=False).told) == len(search.arms) - 1
    assert max(Counter(str(one.params) for one in told).values()) > 1


def test_a_lucky_seed_is_no_gain_of_the_arms_that_have_it(tmp_path: Path) -> None:
    """Seed 1 adds 10 points to every run of it: c01, which alone has it beside the control, is no better for it."""
    config = study(tmp_path, total=6, trials=6, replicates=MOST)
    arms = [make_arm(config, name) for name in ("control", "c01", "c02", "c03")]
    arms[0].planned = arms[1].planned = 2
    write_sweep(config, arms, {"control": [280, 320], "c01": [282, 322], "c02": [284], "c03": [278]})
    seen = {name: found.gain for name, (_, found) in seen_of(config, read_arms(config)).items()}
    assert seen["c01"] == pytest.approx(0.005)
    truth = {"c02": 0.01, "c03": -0.005}  # 0.05 lower as the mean of the control has it
    assert {name: seen[name] for name in truth} == pytest.approx(truth, abs=0.02)


def test_a_report_misses_no_replicate_that_nobody_decided_on(tmp_path: Path) -> None:
    config = study(tmp_path, total=7, trials=7, replicates=MOST)
    arms = [make_arm(config, name) for name in ("control", "c01", "c02")]
    arms[0].planned = arms[1].planned = 3
    write_sweep(config, arms, {"control": [280, 291, 283], "c01": [330, 341, None], "c02": [300]})
    report = report_study(config)
    rows = {row.arm: (row.replicates, row.missing, len(row.trials)) for row in report.arms}
    assert rows == {"control": (3, 0, 3), "c01": (2, 1, 3), "c02": (1, 0, 1)}
    assert report.unfinished == 1
    assert {row.arm: row.family for row in report.arms if row.family} == {"c01": 2, "c02": 2}, "each arm counts"


def test_a_confirmation_has_pairs_and_seeds_of_its_own(tmp_path: Path) -> None:
    config = study(tmp_path, total=4, trials=4, replicates=MOST)
    arms = [make_arm(config, name) for name in ("control", "c01")]
    arms[0].planned = arms[1].planned = 2
    write_sweep(config, arms, {"control": [280, 282], "c01": [300, 302]})
    fresh, _ = planned_confirmation(config, (5, 8))
    assert (fresh.runs, fresh.each) == (10, 5)
    assert config.seed_of(MOST - 1) < fresh.seed


def test_what_a_plan_says_is_what_runs_at_most(tmp_path: Path) -> None:
    config = study(tmp_path, total=16, trials=16, replicates=MOST, settings={}, budget_hours=0.001)
    plan = plan_study(config, cpus=2)
    said = "\n".join(plan_lines(plan))
    assert (
        "runs: 16: 12 configurations once, then replicates where they matter, up to 8 of an arm (seeds 0 to 7)" in said
    )
    assert "pays for about 1 of 16 runs" in said
    assert plan.hours == pytest.approx(16 * plan.trial_seconds / 3600)
    assert "fewer than 3 replicates" not in said


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_to_just_its_runs(tmp_path: Path) -> None:
    small = {"eval": {"questions": 16, "every": 0}, "grpo": {"steps": 3}}
    config = study(tmp_path, total=7, trials=7, replicates=MOST, searcher="random", settings=small, evidence=())
    begun: list[str] = []

    def view(event: TrialEvent) -> None:
        if event.status == "running" and event.step == 0:
            begun.append(event.trial)
        if begun.count("control/1") and event.trial != "control/1":
            raise KeyboardInterrupt

    with without_ray():
        stopped = run_study(config, of_trials(view))
        assert stopped.unfinished > 0
        assert len(stopped.arms[0].results) == 2
        result = resume_study(config, lambda event: None)
    assert (result.unfinished, sum(len(arm.results) for arm in result.arms)) == (0, 7)
    assert [arm.name for arm in result.arms[: len(stopped.arms)]] == [arm.name for arm in stopped.arms]
    assert len(result.arms) == new_configurations(7, 0)
    for arm in result.arms:
        assert list(arm.results) == list(planned(config, arm))
        assert [arm.results[k].config.seed for k in arm.results] == [config.seed_of(k) for k in arm.results]


def test_the_candidate_may_have_any_number_of_replicates(tmp_path: Path) -> None:
    config = study(tmp_path, total=6, trials=6, replicates=MOST)
    arms = [make_arm(config, name) for name in ("control", "c01", "c02")]
    arms[0].planned = arms[1].planned = 2
    write_sweep(config, arms, {"control": [280, 282], "c01": [300, 302], "c02": [("collapsed", 100)]})
    assert candidate_of(config, read_arms(config)).arm.name == "c01"

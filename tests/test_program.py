"""What a programme decides: tables of outcomes and the path that follows, restarts at any point, and how often it says
a difference where there is none."""

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest

from search.program import (
    Decision,
    End,
    Outcomes,
    Run,
    Walk,
    fact,
    next_step,
    path_lines,
    ranked,
    rule_of,
    walk,
)
from search.replicates import Replicate
from spaces.programme import CONTROL, Programme, load_programme

PLAN = load_programme("plan")
LAST = PLAN.replicates.looks[-1]
WAVE = [0.003 * np.sin(7.0 * k) for k in range(LAST)]  # what seeds differ by: enough for an interval to exist


def arm(gain: float | str, place: int = 0, last: int = LAST) -> dict[int, Replicate]:
    """`gain`: points over the control; or `collapses`, or `undecided` (widely spread)."""
    runs = {}
    for k in range(last):
        own = 0.002 * np.sin(3.0 * k + place)
        if gain == "collapses":
            runs[k] = Replicate(seed=k, accuracy=0.2, collapsed=True)
        elif gain == "undecided":
            runs[k] = Replicate(seed=k, accuracy=0.6 + 0.1 * (-1) ** k, collapsed=False)
        else:
            runs[k] = Replicate(seed=k, accuracy=0.6 + WAVE[k] + own + float(gain) / 100, collapsed=False)
    return runs


def outcomes(said: Mapping[str, float | str], programme: Programme = PLAN) -> dict[str, dict[int, Replicate]]:
    """Of every arm; those that are not said gain nothing."""
    found = {name: arm(said.get(name, 0.0), place) for place, name in enumerate(programme.experiments)}
    return found | {CONTROL: {k: Replicate(seed=k, accuracy=0.6 + WAVE[k], collapsed=False) for k in range(LAST)}}


def path(seen: Walk) -> list[str]:
    return [step.phase for step in seen.decisions]


def ending(seen: Walk) -> str | None:
    assert isinstance(seen.next, End)
    return seen.next.scenario


BOTH = {"e13i-baseline": "collapses", "e13i-targeted": "collapses"}
TABLE: list[tuple[dict[str, float | str], list[str], str | None]] = [
    # nothing differs: neither is shown to help, and every interval ends below what would count
    ({}, ["foundation", "smaller", "diagnosis", "ablations"], "C"),
    ({"e13i-baseline": -3, "e13i-targeted": -3}, ["foundation", "smaller", "diagnosis", "ablations"], "C"),
    ({"e13i-baseline": "undecided", "e13i-targeted": "undecided"}, ["foundation", "ablations"], None),
    ({"e13i-baseline": "undecided"}, ["foundation", "ablations"], None),  # one of them, at the last look
    # global noise helps
    ({"e13i-baseline": 3}, ["foundation", "sigma", "variable"], "A"),  # and the scan gains nothing: pivot
    ({"e13i-baseline": 3, "e13i-targeted": 3}, ["foundation", "sigma", "variable", "ablations"], "A"),  # a tie
    ({"e13i-baseline": 3, "e13i-targeted": "collapses"}, ["foundation", "sigma", "variable"], "A"),
    ({"e13i-baseline": "collapses", "e13i-targeted": 3}, ["foundation", "sigma", "variable", "ablations"], "B"),
    ({"e13i-baseline": 3, "e13i-targeted": 6}, ["foundation", "sigma", "variable", "ablations"], "B"),
    # more, less, or the same sigma in the middle zone; a sigma that breaks beats nothing
    ({"e13i-baseline": 3, "e13i-high": 6}, ["foundation", "sigma", "variable"], "D"),
    ({"e13i-baseline": 3, "e13i-low": 6}, ["foundation", "sigma", "variable"], "E"),
    ({"e13i-baseline": 3, "e13i-high": 6, "e13i-low": 6}, ["foundation", "sigma", "variable"], "A"),
    ({"e13i-baseline": 3, "e13i-high": 6, "e13i-low": "collapses"}, ["foundation", "sigma", "variable"], "D"),
    ({"e13i-baseline": 3, "e13i-high": "collapses", "e13i-low": "collapses"}, ["foundation", "sigma", "variable"], "A"),
    # sigma by layer is worth it
    ({"e13i-baseline": 3, "e13j-variable": 6}, ["foundation", "sigma", "variable", "ablations"], "A"),
    # both collapse: the diagnosis that the plan went through
    (BOTH, ["foundation", "smaller", "diagnosis", "ablations"], "C"),
    # two that collapsed say nothing of layers chosen by the scan: no pivot away from it
    (BOTH | {"e13i-v3": 3}, ["foundation", "smaller", "diagnosis", "sigma", "variable", "ablations"], None),
    # a fifth of the noise is no base: the plan's sigma for the middle zone would be three times as much there
    (BOTH | {"e13i-v2": 6}, ["foundation", "smaller", "diagnosis", "ablations"], None),
    (
        BOTH | {"e13i-v3": "collapses", "e13i-v4-rmsnorm": "collapses"},
        ["foundation", "smaller", "diagnosis", "validation"],
        "C",
    ),
    (
        BOTH | {"e13i-v3": "collapses", "e13i-v4-rmsnorm": "collapses", "e14": "collapses"},
        ["foundation", "smaller", "diagnosis", "validation"],
        "C",
    ),
    (dict.fromkeys(PLAN.experiments, "collapses"), ["foundation", "smaller", "diagnosis", "validation"], "C"),
]


@pytest.mark.parametrize(("said", "phases", "scenario"), TABLE)
def test_outcomes_decide_the_path(said: dict[str, float | str], phases: list[str], scenario: str | None) -> None:
    seen = walk(PLAN, outcomes(said))
    assert path(seen) == phases
    assert ending(seen) == scenario


def test_beside_a_control_that_collapses_nothing_helps_hurts_or_wins() -> None:
    broken = {k: Replicate(seed=k, accuracy=0.2, collapsed=True) for k in range(LAST)}
    seen = walk(PLAN, outcomes({"e13i-targeted": "collapses"}) | {CONTROL: broken})
    assert path(seen) == ["foundation", "ablations"]
    assert ending(seen) is None
    assert not seen.winners
    assert set(seen.shown.values()) <= {2, PLAN.replicates.looks[0]}, "more replicates would decide nothing"
    assert "4 of control, which has no noise: nothing can be compared with it" in seen.decisions[0].facts[0]


def test_an_arm_that_collapsed_twice_is_not_run_again_and_what_hangs_on_it_is_skipped() -> None:
    seen = walk(PLAN, outcomes(BOTH))
    assert {seen.shown[name] for name in BOTH} == {2}
    first = seen.decisions[0]
    assert first.skipped == ("e13l-conservative", "e13k-constant")
    assert not set(first.skipped) & set(seen.shown)
    assert "2 of 2 runs collapsed, and it was not run again" in first.facts[0]


def test_one_collapse_is_no_collapse_and_counts_with_its_accuracy() -> None:
    held = outcomes({"e13i-baseline": 3})
    held["e13i-baseline"][1] = Replicate(seed=1, accuracy=0.2, collapsed=True)
    seen = walk(PLAN, held)
    assert not seen.collapsed("e13i-baseline")
    found = seen.compare("e13i-baseline")
    assert found is not None
    assert found.verdict == "undecided"
    assert seen.shown["e13i-baseline"] == LAST
    assert fact(seen, "e13i-baseline").endswith("1 collapsed")


def test_replicates_go_on_only_while_a_decision_hangs_on_them() -> None:
    sure = walk(PLAN, outcomes({"e13i-baseline": 3, "e13i-targeted": 6}))
    assert sure.shown["e13i-baseline"] == sure.shown["e13i-targeted"] == PLAN.replicates.looks[0]
    open_ = walk(PLAN, outcomes({"e13i-baseline": "undecided"}))
    assert open_.shown["e13i-baseline"] == LAST
    assert open_.shown["e13i-targeted"] < LAST


def test_replicates_after_a_verdict_count_where_a_gain_or_a_failure_is_asked() -> None:
    said = outcomes({"e13i-baseline": 3})
    ends = {
        k: run.accuracy + 0.025 + (0.0027 if k < 4 else 0.0005) * (-1) ** k for k, run in said["e13i-baseline"].items()
    }
    said["e13j-variable"] = {k: Replicate(seed=k, accuracy=end, collapsed=False) for k, end in ends.items()}
    seen = walk(PLAN, said)
    early, late = (seen.compare("e13j-variable", "base", verdict_stands=stands) for stands in (True, False))
    assert early is not None
    assert late is not None
    assert (early.verdict, early.replicates, late.replicates) == ("better", 4, 8)
    assert early.low < 0.01 < late.low
    decided = next(step for step in seen.decisions if step.phase == "variable")
    assert decided.because == "sigma by layer is worth its complexity"


def test_a_winner_is_gone_on_with_and_the_base_of_a_phase_is_the_nearest_one_that_has_won() -> None:
    seen = walk(PLAN, outcomes({"e13i-baseline": 3, "e13i-targeted": 6, "e13i-low": 9}))
    assert seen.winners == {"foundation": "e13i-targeted", "sigma": "e13i-low"}
    assert seen.bases == {"e13i-high": "e13i-targeted", "e13i-low": "e13i-targeted", "e13j-variable": "e13i-low"}
    plain = walk(PLAN, outcomes({"e13i-baseline": 3, "e13i-low": 3}))
    assert plain.bases["e13j-variable"] == "e13i-baseline", "what does not beat its base is no winner"


def drive(said: Mapping[str, float | str], order: int) -> tuple[Walk, list[list[str]], int]:
    """Trial by trial, as a driver does that is killed and started anew after each: path after each, and runs."""
    world, held = outcomes(said), {}
    paths, runs = [], 0
    while True:
        seen = walk(PLAN, held)
        paths.append([str(step) for step in seen.steps if isinstance(step, Decision)])
        if isinstance(seen.next, End):
            return seen, paths, runs
        name, number = seen.next.missing[0 if order == 0 else -1]  # whichever trial ends first
        held.setdefault(name, {})[number] = world[name][number]
        runs += 1


@pytest.mark.parametrize("said", [{}, BOTH, {"e13i-baseline": 3, "e13i-targeted": "undecided", "e13i-low": 6}])
def test_killed_after_any_trial_it_goes_on_to_the_same_end_and_takes_no_decision_back(
    said: dict[str, float | str],
) -> None:
    whole = walk(PLAN, outcomes(said))
    for order in (0, -1):
        seen, paths, _ = drive(said, order)
        assert seen.steps == whole.steps
        for before, after in pairwise(paths):
            assert after[: len(before)] == before
    more = walk(PLAN, outcomes(said) | {"e12": arm(5)})
    assert more.steps == whole.steps, "what no phase asked for changes nothing"


def test_a_trial_without_an_outcome_is_asked_for_again_and_nothing_is_decided_without_it() -> None:
    held = outcomes({"e13i-baseline": 3})
    del held["e13i-baseline"][3]
    step = next_step(PLAN, held)
    assert isinstance(step, Run)
    assert step.missing == (("e13i-baseline", 3),)
    assert walk(PLAN, held).decisions == []
    held = outcomes({"e13i-baseline": 3})
    del held[CONTROL][0]
    step = next_step(PLAN, held)
    assert isinstance(step, Run)
    assert step.missing == ((CONTROL, 0),)


def test_the_first_step_runs_both_experiments_and_one_control_twice() -> None:
    step = next_step(PLAN, {})
    assert isinstance(step, Run)
    assert step.replicates == {"e13i-baseline": 2, "e13i-targeted": 2}
    assert len(step.missing) == 6
    (line,) = path_lines(walk(PLAN, {}))
    assert line.startswith("next: phase foundation, e13i-baseline to 2, e13i-targeted to 2 replicates (6 runs): ")


def test_what_is_said_of_the_path_names_condition_reason_numbers_and_scenario() -> None:
    lines = "\n".join(path_lines(walk(PLAN, outcomes({"e13i-baseline": 3}))))
    assert "e13i-baseline: +3.0" in lines
    assert "4 replicates: better" in lines
    assert "-> sigma, since e13i-baseline helps or e13i-targeted helps: noise helps" in lines
    assert "winner: e13i-baseline" in lines
    assert "end: scenario A, global noise works (e13i-baseline helps)" in lines


def test_what_remains_is_ranked_by_priority_then_by_what_is_known_then_by_registered_confidence() -> None:
    names = ["e13k-constant", "e13l-conservative", "e13m-rmsnorm", "e13j-variable"]
    assert ranked(PLAN, names) == ["e13j-variable", "e13m-rmsnorm", "e13l-conservative", "e13k-constant"]
    assert ranked(PLAN, names, {"e13k-constant": 0.9})[1] == "e13k-constant"


def test_the_level_is_shared_by_all_comparisons_and_by_modes() -> None:
    assert rule_of(PLAN).level == pytest.approx(0.05 / 21)
    assert rule_of(PLAN, families=3).level == pytest.approx(0.05 / 63)


# --- landscapes -------------------------------------------------------------------------------------------------------


def landscape(
    rng: np.random.Generator, gains: Mapping[str, float] | None = None, risks: Mapping[str, float] | None = None
) -> Outcomes:
    """Accuracies with the luck of the seed in common, and differences between arms that spread by 1.4 points; twelve
    pairs of the embedded model spread by 1.7 to 3.1."""
    luck = rng.normal(0.0, 0.02, LAST)
    found = {}
    for name in (CONTROL, *PLAN.experiments):
        accuracies = 0.6 + luck + (gains or {}).get(name, 0.0) / 100 + rng.normal(0.0, 0.014 / np.sqrt(2), LAST)
        broken = rng.random(LAST) < (risks or {}).get(name, 0.0)
        found[name] = {
            k: Replicate(seed=k, accuracy=float(accuracies[k] - 0.3 * broken[k]), collapsed=bool(broken[k]))
            for k in range(LAST)
        }
    return found


def claims(seen: Walk) -> list[tuple[str, str, str]]:
    """Every comparison that says a difference."""
    pairs = [(one, other) for one, other in PLAN.comparisons() if one in seen.shown]
    judged = [(one, other, seen.compare(one, other)) for one, other in pairs]
    return [(one, other, c.verdict) for one, other, c in judged if c is not None and c.verdict in ("better", "worse")]


@pytest.mark.slow
def test_where_nothing_differs_500_programmes_say_a_difference_in_at_most_six_per_cent() -> None:
    rng = np.random.default_rng(2)
    walks = [walk(PLAN, landscape(rng)) for _ in range(500)]
    assert sum(bool(claims(seen)) for seen in walks) <= 0.06 * 500
    ends = Counter(ending(seen) for seen in walks)
    assert ends[None] + ends["C"] >= 0.94 * 500
    assert sum(seen.shown["e13i-baseline"] for seen in walks) < 500 * 13


def test_where_only_collapses_differ_no_arm_is_called_better() -> None:
    rng, risks = np.random.default_rng(3), {"e13i-baseline": 1.0, "e13i-targeted": 0.5, "e13i-v4-filter-off": 1.0}
    walks = [walk(PLAN, landscape(rng, risks=risks)) for _ in range(40)]
    assert sum(any(verdict == "better" for *_, verdict in claims(seen)) for seen in walks) <= 3
    assert all(seen.collapsed("e13i-baseline") for seen in walks)


def test_a_true_gain_of_three_points_is_found_in_nine_programmes_of_ten() -> None:
    """96 % of 200 programmes; 42 % where differences spread by 2.4 points."""
    rng = np.random.default_rng(4)
    walks = [walk(PLAN, landscape(rng, gains={"e13i-baseline": 3.0})) for _ in range(40)]
    assert sum(seen.winners.get("foundation") == "e13i-baseline" for seen in walks) >= 36

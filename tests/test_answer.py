"""The answer in one sentence, on sweeps that were written by hand: it says no more than was found."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dashboards.answer import answer_of
from dashboards.page import page, read_material
from dashboards.report_text import confirmation_lines, report_lines
from dashboards.side_by_side_text import side_by_side_lines
from dashboards.sweep_text import ending_of
from search.arms import candidate_of, read_arms
from search.confirm import confirmation_of, planned_confirmation
from search.report import report_study
from search.sequential import CONFIRM
from search.side_by_side import read_side, side_by_side
from search.store import StudyConfig, load_study_config, save_study_config
from search.study import StudyResult
from tests.written_sweeps import make_arm, study, write_sweep

PLAIN = (280, 284, 281, 287, 283, 279, 285, 282, 280, 284, 281, 287)


def sentence(config: StudyConfig) -> str:
    return answer_of(report_study(config), confirmation_of(config)).sentence


def swept(store: Path, **right: Sequence[Any]) -> StudyConfig:
    """A control and these arms, one run each; `linear_005`: linear noise of 0.05, `norm_001`: RMSNorm noise of 0.01."""
    config = study(store, trials=1 + len(right), replicates=1)
    arms = [make_arm(config, "control")]
    for name in right:
        kind, _, sigma = name.partition("_")
        modules = "linear" if kind == "linear" else "rmsnorm"
        start = float(f"{sigma[0]}.{sigma[1:]}")
        overrides = (f"noise.modules=[{modules}]", f"noise.sigma_start={start}", f"noise.sigma_end={start / 10:g}")
        arms.append(make_arm(config, name, *overrides))
    write_sweep(config, arms, {"control": [280], **right})
    return config


def overtaken(config: StudyConfig) -> StudyConfig:
    """The same sweep with an arm more, which is ahead."""
    larger = swept(Path(config.store), norm_001=[284], norm_002=[320]).model_copy(update={"id": config.id})
    save_study_config(larger)
    return larger


def confirmed(config: StudyConfig, differences: Sequence[Any], plain: Sequence[Any] = PLAIN) -> str:
    """The sentence once its candidate was `differences` of 400 right answers above the control in so many pairs; the
    confirmation itself says the same."""
    planned, arms = planned_confirmation(config, CONFIRM.looks)
    confirmation = planned.model_copy(update={"replicates": len(differences)})
    control, winner = (replace(arm, config=arm.config) for arm in arms)
    runs = [
        apart if isinstance(apart, tuple) else right + apart for apart, right in zip(differences, PLAIN, strict=False)
    ]
    write_sweep(confirmation, [control, winner], {control.name: plain[: len(runs)], winner.name: runs})
    said = sentence(config)
    assert sentence(confirmation) == said
    return said


CLEAR = (28, 30, 27, 31, 30)
NEAR = (3, -1, 2, 4, 0, -2, 3, 1)
FAR = (14, -11, 9, 12, -6, -13, 10, 5)
HELD = "+7.3 points [+6.5, +8.1] (5 pairs; a collapse risk up to 52 % is not excluded)"
BETWEEN = (
    "undecided, within ±3.9 points of control: +0.6 points [-2.6, +3.8] (8 pairs; needs about 197 more replicates)"
)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        (CLEAR, f"better than control where it holds: {HELD}"),
        (tuple(-one for one in CLEAR), "worse than control: -7.3 points [-8.1, -6.5] (5 pairs)"),
        (FAR, BETWEEN),  # the bound: the interval's end that is further away, rounded away from 0
        (NEAR[:2], "undecided; +0.3 points against control (2 pairs; the first look is after 5)"),
        ((), "undecided; +1.0 points against control on the questions that chose it (1 pair), which is no finding"),
    ],
)
def test_it_says_what_the_confirmation_found_and_without_one_that_it_is_no_finding(
    tmp_path: Path, differences: Sequence[int], said: str
) -> None:
    config = swept(tmp_path, norm_001=[284])
    told = confirmed(config, differences) if differences else sentence(config)
    assert told == f"norm_001, rmsnorm 0.01 -> 0.001: {said}"


def test_a_confirmation_of_what_is_no_longer_the_candidate_says_so(tmp_path: Path) -> None:
    config = swept(tmp_path, norm_001=[284])
    told = confirmed(config, CLEAR)
    larger = overtaken(config)
    assert sentence(larger) == f"{told}; by now the candidate is norm_002"


def test_that_of_the_present_candidate_comes_first_wherever_the_answer_stands(tmp_path: Path) -> None:
    config = swept(tmp_path, norm_001=[284])
    confirmed(config, [-apart for apart in CLEAR])
    larger = overtaken(config)
    assert "worse than control" in sentence(larger)
    planned, arms = planned_confirmation(larger, CONFIRM.looks, "norm_002")
    better = [right + apart for apart, right in zip(CLEAR, PLAIN, strict=False)]
    write_sweep(planned, arms, {"control": PLAIN[:5], "norm_002": better})
    assert sentence(larger).startswith(
        "norm_002, rmsnorm 0.02 -> 0.002: better than control where it holds: +7.3 points"
    )
    assert "by now" not in sentence(larger)
    assert "Yes where it holds" in page(read_material(larger))


def test_each_line_that_names_the_command_gives_the_arm_where_the_confirmation_is_another_s(tmp_path: Path) -> None:
    config = swept(tmp_path, norm_001=[284])

    def commands(config: StudyConfig) -> set[str]:
        report, arms = report_study(config), tuple(read_arms(config))
        result = StudyResult(
            config=config,
            arms=arms,
            candidate=candidate_of(config, arms),
            unfinished=0,
            budget_spent=False,
            interrupted=False,
        )
        other = replace(read_side(config), config=config.model_copy(update={"name": "other"}))
        lines = [
            *ending_of(result, config.runs, "", "").commands,
            *report_lines(report),
            *answer_of(report, None).lines,
            *side_by_side_lines(side_by_side(read_side(config), other))[1],
        ]
        return set(re.findall(r"rin confirm s\b(?: --arm \w+)?", "\n".join(lines)))

    assert commands(config) == {"rin confirm s"}
    confirmed(config, FAR)
    assert commands(config) == {"rin confirm s"}
    assert commands(overtaken(config)) == {"rin confirm s --arm norm_002"}


def test_another_sweep_that_has_the_name_has_none_of_its_verdicts(tmp_path: Path) -> None:
    confirmed(swept(tmp_path, norm_001=[320]), CLEAR)
    other = swept(tmp_path, norm_001=[320])
    assert "which is no finding" in sentence(other)
    lines = [*report_lines(report_study(other)), *answer_of(report_study(other), confirmation_of(other)).lines]
    said = "s-confirm is no confirmation of this sweep but another one's, and says nothing here: rin delete s-confirm"
    assert lines.count(said) == 2
    assert confirmation_of(load_study_config(other.store, "s-confirm")) is not None, "of its own it tells"


def test_collapses_of_a_confirmation_are_in_the_sentence_the_control_s_too(tmp_path: Path) -> None:
    config = swept(tmp_path, norm_001=[284])
    told = confirmed(config, (*FAR[:7], ("collapsed", 100)), (*PLAIN[:6], *[("collapsed", 90)] * 2))
    assert "1 of its 8 runs collapsed; 2 of 8 runs of the control collapsed" in told


BROKE = ("collapsed", 60)
CANCELLED = "collapses as often as seen (3 of 8 runs) would cancel the gain"


def test_collapses_after_the_look_that_decided_are_told_wherever_the_gain_is(tmp_path: Path) -> None:
    config = swept(tmp_path, norm_001=[284])
    told = confirmed(config, (*CLEAR, *[BROKE] * 3))
    assert told.startswith("norm_001, rmsnorm 0.01 -> 0.001: better than control where it holds: +7.3 points")
    assert told.endswith(f"(5 pairs of 8, at the look that decided; {CANCELLED})")
    state = confirmation_of(config)
    assert state is not None
    assert confirmation_lines(state)[0] == f"norm_001 against control: better where it holds; {CANCELLED}"
    answer = answer_of(report_study(config), state)
    assert answer.word == "Yes where it holds: collapses as often as seen would cancel that"
    assert f"better where it holds; {CANCELLED}." in answer.lines[0]


def test_nothing_is_the_same_where_no_run_held(tmp_path: Path) -> None:
    config = swept(tmp_path, norm_001=[284])
    told = confirmed(config, [BROKE] * 8, [BROKE] * 8)
    assert "undecided: no run held, neither of it nor of its control; +0.0 points" in told
    assert "same" not in told
    assert answer_of(report_study(config), confirmation_of(config)).word == "Undecided, also by its confirmation"


def test_noise_that_broke_runs_is_told_from_which_sigma_on_and_in_how_many(tmp_path: Path) -> None:
    broke = ("collapsed", 40)
    told = sentence(swept(tmp_path, norm_001=[284], linear_0012=[270], linear_002=[broke], linear_005=[broke]))
    assert told.endswith("; linear noise broke every W4A4 run from sigma 0.02 on, and none up to 0.012 (3 runs)")
    assert "broke" not in told.partition("; linear")[0], "noise that held everywhere broke nothing"


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ({"linear_005": [("collapsed", 40)]}, "linear noise broke every W4A4 run from sigma 0.05 on (1 run)"),
        (
            {"linear_001": [("collapsed", 40)], "linear_002": [270], "linear_003": [("collapsed", 40)]},
            "linear noise broke 2 of 3 W4A4 runs",
        ),
    ],
)
def test_it_says_no_sigma_that_the_runs_do_not_show(tmp_path: Path, right: dict[str, Any], said: str) -> None:
    assert sentence(swept(tmp_path, **right)).endswith(said)


def test_where_nothing_held_it_says_so(tmp_path: Path) -> None:
    told = sentence(swept(tmp_path, linear_005=[("collapsed", 40)]))
    assert told.startswith("undecided: all of the 1 configurations with noise that ended collapsed in some run;")

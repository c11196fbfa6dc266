"""What follows a sweep by itself: its candidate is confirmed, also after an interruption in either part, and what it
came to is the last line. Trials are files that a stand-in writes."""

import json
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest

from dashboards.answer import answer_of
from dashboards.page import PAGE_FILE
from search.arms import read_arms, write_arm
from search.confirm import confirmation_of
from search.followup import FollowUp, follow_up, second_part
from search.replicates import AT_ONCE
from search.report import report_study
from search.sequential import CONFIRM, SequentialRule
from search.store import StudyConfig, load_study_config, save_study_config
from tests.processes import Said, rin
from tests.test_confirm import Sweeps, nothing, strong
from tests.written_sweeps import attempt, make_arm, outcome, study, write_sweep, write_trial

PLAN = CONFIRM.looks


def swept(store: Path, *, control: Any = 280, c01: Any = 300, seconds: float = 3600.0, **changes: Any) -> StudyConfig:
    """Its trials took an hour each, so that it is worth to stop at each look."""
    config = study(store, trials=2, **{"confirm_pairs": 8, **changes})
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [control], "c01": [c01]})
    for arm in read_arms(config):
        for replicate, ended in arm.results.items():
            write_trial(config, arm, replicate, replace(ended, seconds=seconds))
    return config


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    runs = Sweeps(nothing)
    monkeypatch.setattr("search.study.run_study", runs.run)
    monkeypatch.setattr("search.study.resume_study", runs.resume)
    return runs


@pytest.fixture
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes seconds."""
    for name in ("leave_behind", "left_behind"):
        monkeypatch.setattr(f"dashboards.page.{name}", lambda config, **options: None)


def resumed(store: Path, command: str = "resume", *options: str) -> Said:
    return rin(command, "s", "--store", str(store), *options)


def last_line(said: Said) -> str:
    return said.out.rstrip().splitlines()[-1]


def ran(sweeps: Sweeps) -> list[tuple[str, str, int]]:
    """Study, how, replicates of each call."""
    return [(config.name, how, pairs) for config, (how, pairs) in zip(sweeps.configs, sweeps.calls, strict=True)]


def test_the_candidate_is_confirmed_up_to_the_pairs_that_were_asked_for_and_the_last_line_is_the_answer(
    tmp_path: Path, sweeps: Sweeps
) -> None:
    config = swept(tmp_path)
    said = resumed(tmp_path)
    assert (said.code, said.err) == (0, "")
    assert ran(sweeps) == [("s", "resume", 1), ("s-confirm", "run", 5), ("s-confirm", "resume", 8)]
    assert "then its candidate is confirmed: up to 8 pairs of runs" in said.out.splitlines()[1]
    assert "is that a finding? c01 against control: up to 8 pairs with fresh seeds" in said.out
    assert "looks after 12, 16, 20 pairs are left; go on: rin confirm s --store" in said.out
    sentence = answer_of(report_study(config), confirmation_of(config)).sentence
    assert "(8 pairs; needs about" in sentence
    assert last_line(said) == f"{sentence}."
    page = (tmp_path / "s" / PAGE_FILE).read_text(encoding="utf-8")
    assert escape(sentence) in page, "the page says the same"
    assert last_line(resumed(tmp_path, "report")) == f"{sentence}."


def test_it_is_one_plan_whoever_runs_its_parts(tmp_path: Path, sweeps: Sweeps) -> None:
    """Eight pairs by the sweep and twelve by hand are judged as twenty that were planned at once."""
    config = swept(tmp_path)
    resumed(tmp_path)
    again = resumed(tmp_path)
    assert ran(sweeps)[-1] == ("s-confirm", "resume", 8), "nothing more by itself"
    assert "is that a finding?" not in again.out, "nothing begins, so nothing is announced"
    resumed(tmp_path, "confirm")
    assert [pairs for _, _, pairs in ran(sweeps)[-4:]] == [8, 12, 16, 20]
    state = confirmation_of(config)
    assert state is not None
    assert (state.looks, state.replicates) == (PLAN, 20)
    assert state.comparison.level == SequentialRule().levels(PLAN)[-1]
    assert ran(sweeps)[-1][2] == 20
    resumed(tmp_path)
    assert ran(sweeps)[-1][0] == "s", "one that went further is read, and not run"


def test_a_later_look_that_is_killed_goes_on_by_the_command_that_began_it(tmp_path: Path, sweeps: Sweeps) -> None:
    swept(tmp_path)
    resumed(tmp_path)
    sweeps.room = 3
    resumed(tmp_path, "confirm")
    assert "a later look of its confirmation is not finished; go on: rin confirm s" in resumed(tmp_path, "status").out
    sweeps.room = 10**6
    assert resumed(tmp_path).code == 0, "the sweep's own part is done"
    resumed(tmp_path, "confirm")
    assert "not finished" not in resumed(tmp_path, "status").out


def test_both_pages_and_both_descriptions_are_of_what_the_confirmation_came_to(
    tmp_path: Path, sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("dashboards.page.leave_note", lambda config: told.append(config.name))
    config = swept(tmp_path)
    resumed(tmp_path)
    assert told == ["s-confirm", "s"]
    resumed(tmp_path, "confirm")
    assert told[2:] == ["s-confirm", "s"]
    sentence = answer_of(report_study(config), confirmation_of(config)).sentence
    assert "(20 pairs" in sentence
    for name in told[2:]:
        assert escape(sentence) in (tmp_path / name / PAGE_FILE).read_text(encoding="utf-8")


def test_what_a_sweep_goes_on_with_holds_for_its_confirmation(tmp_path: Path, sweeps: Sweeps) -> None:
    swept(tmp_path)
    resumed(tmp_path)
    rin("resume", "s", "--store", str(tmp_path), "--concurrent", "1", "--cpus", "2", "--gpus", "0.5")
    resumed(tmp_path, "confirm")
    assert {(one.concurrent, one.cpus, one.gpus) for one in sweeps.configs[-4:]} == {(1, 2, 0.5)}


def test_a_decision_at_the_first_look_ends_it(tmp_path: Path, sweeps: Sweeps) -> None:
    sweeps.truth = lambda arm, number: 560 - strong(arm, number)
    swept(tmp_path)
    assert "worse than control" in last_line(resumed(tmp_path))
    assert ran(sweeps)[-1] == ("s-confirm", "run", 5)


def test_short_trials_run_to_the_last_look_at_once_and_a_decision_at_an_earlier_one_stands(
    tmp_path: Path, sweeps: Sweeps
) -> None:
    sweeps.truth = lambda arm, number: 560 - strong(arm, number)
    config = swept(tmp_path, seconds=12.0)
    said = resumed(tmp_path)
    assert ran(sweeps)[-1] == ("s-confirm", "run", 8)
    state = confirmation_of(config)
    assert state is not None
    assert (state.replicates, state.comparison.replicates, state.comparison.level) == (
        8,
        5,
        SequentialRule().levels((5,))[0],
    )
    assert "(5 pairs of 8, at the look that decided)" in last_line(said)
    assert said.out.count("5 pairs of 8, at the look that decided") == 2, "its lines and its sentence"


def test_an_interruption_in_the_second_part_goes_on_by_resume(tmp_path: Path, sweeps: Sweeps) -> None:
    swept(tmp_path)
    sweeps.room = 3
    said = resumed(tmp_path)
    assert (said.code, "its confirmation is not finished. Go on: rin resume s --store" in said.err) == (1, True)
    assert "its candidate is not confirmed yet; go on: rin resume s --store" in resumed(tmp_path, "status").out
    sweeps.room = 10**6
    said = resumed(tmp_path)
    assert (said.code, ran(sweeps)[-2:]) == (0, [("s-confirm", "resume", 5), ("s-confirm", "resume", 8)])
    assert "not confirmed yet" not in resumed(tmp_path, "status").out


@pytest.mark.parametrize("when", ["s", "s-confirm"])
def test_whoever_asks_it_to_end_as_a_last_trial_ends_sees_nothing_else_begin(
    tmp_path: Path, sweeps: Sweeps, when: str
) -> None:
    """Ctrl-C after the last trial of the first part, or of the first look."""
    swept(tmp_path)
    sweeps.interrupted = when
    said = resumed(tmp_path)
    assert ran(sweeps)[-1][:1] == (when,)
    assert len(ran(sweeps)) == (1 if when == "s" else 2)
    assert (said.code, "Go on: rin resume s --store" in said.err) == (1, True)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"c01": ("collapsed", 40)}, "no configuration with noise has completed all its replicates"),
        ({"control": ("collapsed", 40)}, "control itself collapsed, and beside a control that does not hold noise"),
        ({"budget_hours": 0.02}, "the budget of 0.02 hours is spent"),  # two trials of a minute each
    ],
)
def test_where_it_could_say_nothing_there_is_none_and_why_is_said(
    tmp_path: Path, sweeps: Sweeps, changes: dict[str, Any], why: str
) -> None:
    swept(tmp_path, **changes)
    said = resumed(tmp_path)
    assert (said.code, [name for name, _, _ in ran(sweeps)]) == (0, ["s"])
    assert f"no confirmation: {why}" in said.out
    assert last_line(said).endswith(".")


def test_a_sweep_with_missing_trials_is_not_confirmed(tmp_path: Path, sweeps: Sweeps) -> None:
    config = swept(tmp_path, c01=None)
    sweeps.room = 0
    follow = follow_up(config, read_arms(config))
    assert follow is not None
    assert follow.why_not == "trials of the sweep are missing"
    assert resumed(tmp_path).code == 1
    assert [name for name, _, _ in ran(sweeps)] == ["s"]


def test_one_budget_holds_for_both_parts(tmp_path: Path, sweeps: Sweeps) -> None:
    config = swept(tmp_path, budget_hours=1.0)
    write_trial(config, read_arms(config)[1], 0, None, attempts=[attempt(seen=1800.0)])
    resumed(tmp_path)
    assert sweeps.configs[-1].budget_hours == pytest.approx(1.0 - 0.5 - 60 / 3600)


@pytest.mark.usefixtures("no_pages")
def test_a_confirmation_whose_part_of_the_budget_is_spent_is_not_gone_on_with(tmp_path: Path, sweeps: Sweeps) -> None:
    config = swept(tmp_path, budget_hours=0.12)  # each run is a minute: 0.0167 hours
    sweeps.room, sweeps.budget_spent = 6, True
    resumed(tmp_path)
    why = "the budget of s-confirm is spent; with a larger one: rin resume s --budget HOURS"
    assert follow_up(config, read_arms(config)) == FollowUp(
        candidate=None, arm=None, taken=False, budget_hours=None, why_not=why
    )
    assert second_part(config, read_arms(config)) == ""
    said = resumed(tmp_path)
    assert (said.code, ran(sweeps)[-1][0], f"no confirmation: {why}" in said.out) == (0, "s", True)
    assert "undecided" in last_line(said)


@pytest.mark.usefixtures("no_pages")
def test_one_that_is_finished_is_told_though_the_budget_is_spent_or_it_is_interrupted_again(
    tmp_path: Path, sweeps: Sweeps
) -> None:
    config = swept(tmp_path)
    resumed(tmp_path)
    save_study_config(config.model_copy(update={"budget_hours": 0.01}))
    said = resumed(tmp_path)
    assert (said.code, said.err, "no confirmation" in said.out) == (0, "", False)
    assert "c01 against control: undecided" in said.out
    assert load_study_config(str(tmp_path), "s-confirm").budget_hours is None
    sweeps.interrupted = "s"
    said = resumed(tmp_path)
    assert (said.code, said.err) == (0, "")


@pytest.mark.usefixtures("no_pages")
def test_after_an_extension_it_goes_on_with_the_confirmation_of_the_new_candidate_once_that_has_begun(
    tmp_path: Path, sweeps: Sweeps
) -> None:
    config = swept(tmp_path)
    resumed(tmp_path)
    larger, arm = config.model_copy(update={"trials": 3}), make_arm(config, "c02", "noise.sigma_start=0.02")
    save_study_config(larger)
    write_arm(larger, 2, arm)
    write_trial(larger, arm, 0, outcome(arm, 0, 340, seconds=3600.0))
    assert "now it is c02: rin confirm s --arm c02" in resumed(tmp_path).out
    assert ran(sweeps)[-1] == ("s", "resume", 1)
    sweeps.room = 4
    resumed(tmp_path, "confirm", "--arm", "c02")
    sweeps.room = 10**6
    assert "its candidate is not confirmed yet; go on: rin resume s" in resumed(tmp_path, "status").out
    said = resumed(tmp_path)
    assert ran(sweeps)[-3:] == [("s", "resume", 1), ("s-confirm-c02", "resume", 5), ("s-confirm-c02", "resume", 8)]
    assert last_line(said).startswith("c02, rmsnorm 0.02")
    assert second_part(larger, read_arms(larger)) == ""


@pytest.mark.usefixtures("no_pages")
def test_what_another_sweep_of_that_name_confirmed_is_not_gone_on_with(tmp_path: Path, sweeps: Sweeps) -> None:
    swept(tmp_path)
    resumed(tmp_path)
    swept(tmp_path)
    said = resumed(tmp_path)
    assert (said.code, ran(sweeps)[-1]) == (0, ("s", "resume", 1))
    assert "no confirmation: s-confirm is no confirmation of this sweep but another one's" in said.out
    assert "which is no finding" in last_line(said)


@pytest.mark.parametrize("written", [True, False])
def test_without_it_nothing_follows_and_a_sweep_of_before_asked_for_nothing(
    tmp_path: Path, sweeps: Sweeps, written: bool
) -> None:
    config = swept(tmp_path, confirm_pairs=0)
    if not written:
        tree = json.loads((tmp_path / "s" / "study.json").read_text())
        del tree["confirm_pairs"]
        (tmp_path / "s" / "study.json").write_text(json.dumps(tree))
    said = resumed(tmp_path)
    assert (said.code, [name for name, _, _ in ran(sweeps)]) == (0, ["s"])
    assert "confirm" not in "".join(said.out.splitlines()[1:2])
    assert "undecided; +5.0 points against control on the questions that chose it" in last_line(said)
    assert follow_up(config, read_arms(config)) is None


def test_a_confirmation_is_followed_by_none(tmp_path: Path, sweeps: Sweeps) -> None:
    save_study_config(swept(tmp_path))
    resumed(tmp_path)
    assert load_study_config(str(tmp_path), "s-confirm").confirm_pairs == 0


def test_what_a_sweep_confirms_by_itself_ends_with_a_planned_look() -> None:
    assert AT_ONCE in PLAN

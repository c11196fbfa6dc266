"""A confirmation without Ray: trials are files that a stand-in for the sweep writes, their accuracies drawn by the
test."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashboards.report_text import confirmation_lines, confirmation_tree
from search.arms import Arm, read_arms, trial_folder, unfinished, write_arm
from search.confirm import Confirmation, confirm, confirmation_of, judge, planned_confirmation, read_confirmation
from search.sequential import SequentialRule, sequential_compare
from search.store import StudyConfig, load_study_config, new_id, save_study_config
from search.study import StudyResult
from spaces.config import ConfigError
from spaces.errors import NoCandidate
from tests.written_sweeps import QUESTIONS, attempt, make_arm, outcome, study, write_sweep, write_trial

LOOKS = (3, 5, 8)
Truth = Callable[[str, int], Any]


def strong(arm: str, number: int) -> int:
    """About twelve points above, in every seed."""
    return 280 + (number * 5) % 11 + (48 + number % 3 if arm != "control" else 0)


def nothing(arm: str, number: int) -> int:
    """Sometimes above and sometimes below."""
    return 280 + (0 if arm == "control" else (30, -34, 28, -25, 31, -29, 27, -30)[number % 8])


def late(arm: str, number: int) -> int:
    """Three pairs that scatter, then a difference that shows."""
    return 280 + (0 if arm == "control" else (60, 10, 45, 36, 38, 37, 39, 36)[number % 8])


class Sweeps:
    """In place of run_study and resume_study: runs what is missing, up to `room` trials per call."""

    def __init__(self, truth: Truth) -> None:
        self.truth, self.room, self.budget_spent = truth, 10**6, False
        self.interrupted = ""  # name of the study in which Ctrl-C comes as its last trial ends
        self.calls: list[tuple[str, int]] = []
        self.configs: list[StudyConfig] = []

    def run(
        self, config: StudyConfig, view: object, progress: object = None, fixed: Sequence[Arm] | None = None
    ) -> StudyResult:
        assert fixed is not None
        for number, arm in enumerate(fixed):
            write_arm(config, number, arm)
        save_study_config(config)
        return self._advance("run", config)

    def resume(self, config: StudyConfig, view: object, progress: object = None) -> StudyResult:
        save_study_config(config)
        return self._advance("resume", config)

    def _advance(self, how: str, config: StudyConfig) -> StudyResult:
        self.calls.append((how, config.replicates))
        self.configs.append(config)
        room = self.room
        for replicate in range(config.replicates):
            for arm in read_arms(config):
                if replicate not in arm.results and room > 0:
                    room -= 1
                    given = self.truth(arm.name, replicate)
                    how_ended, right = given if isinstance(given, tuple) else ("completed", given)
                    if right is not None:
                        write_trial(config, arm, replicate, outcome(arm, replicate, right, how_ended))
        arms = read_arms(config)
        left = unfinished(config, arms)
        spent = self.budget_spent and left > 0
        return StudyResult(
            config=config,
            arms=tuple(arms),
            candidate=None,
            unfinished=left,
            budget_spent=spent,
            interrupted=config.name == self.interrupted,
        )


@pytest.fixture
def parent(tmp_path: Path) -> StudyConfig:
    config = study(tmp_path, trials=3, replicates=3, seed=7)
    arms = [make_arm(config, "control"), make_arm(config, "c01"), make_arm(config, "c02", "noise.sigma_start=0.02")]
    write_sweep(config, arms, {"control": [280, 281, 282], "c01": [300, 301, 302], "c02": [310, 330, 290]})
    return config


def confirmed(parent: StudyConfig, monkeypatch: pytest.MonkeyPatch, sweeps: Sweeps, **options: Any) -> Confirmation:
    monkeypatch.setattr("search.study.run_study", sweeps.run)
    monkeypatch.setattr("search.study.resume_study", sweeps.resume)
    return confirm(parent, lambda event: None, **options)


def accuracies(config: StudyConfig, arm: str, count: int) -> list[float]:
    """From the files, in the order of the seeds."""
    folders = [trial_folder(config, arm, number) for number in range(count)]
    return [json.loads(folder.read("outcome.json") or b"")["outcome"]["eval"]["accuracy"] for folder in folders]


# What is run


def test_the_winner_and_its_control_run_on_other_questions_with_seeds_that_no_arm_has_had(parent: StudyConfig) -> None:
    config, (control, winner) = planned_confirmation(parent, LOOKS)
    assert (config.name, config.kind, config.parent, config.trials) == ("s-confirm", "confirm", "s", 2)
    assert (control.name, control.origin, winner.name, winner.origin) == ("control", "control", "c02", "winner")
    swept = set(range(parent.seed, parent.seed + parent.replicates))
    assert swept.isdisjoint(range(config.seed, config.seed + LOOKS[-1]))
    arms = {arm.name: arm for arm in read_arms(parent)}
    for arm in (control, winner):
        asked, before = arm.config, arms[arm.name].config
        assert (before.eval.split, asked.eval.split) == ("selection", "confirm")
        assert asked.model_copy(update={"eval": before.eval}) == before, "nothing else is changed"
        assert asked.eval.draw == parent.id, "of this sweep alone"


def test_a_data_set_has_one_list_of_questions_for_all_and_it_is_counted_who_asked_them(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirmed(parent, monkeypatch, Sweeps(strong), looks=LOOKS)
    finite = ("model.name=folder", "model.recipe=null", "task.name=gsm8k", "task.path=rows.jsonl")
    for name in ("a", "b"):
        config = study(Path(parent.store), name=name, trials=2, replicates=3)
        arms = [make_arm(config, "control", *finite), make_arm(config, "c02", *finite)]
        write_sweep(config, arms, {"control": [280, 281, 282], "c02": [310, 330, 290]})
        state = confirmed(config, monkeypatch, Sweeps(strong), looks=LOOKS)
        assert read_arms(state.config)[0].config.eval.draw == ""
        said = [note for note in state.notes if "the same questions" in note]
        assert said == (
            []
            if name == "a"
            else [
                "the same questions have been asked by 1 other confirmation (a-confirm): "
                "the error level holds for each alone and not for all together"
            ]
        )


def test_seeds_are_fresh_however_many_the_sweep_had(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=5, seed=998)
    write_sweep(
        config, [make_arm(config, "control"), make_arm(config, "c01")], {"control": [280] * 5, "c01": [300] * 5}
    )
    fresh, _ = planned_confirmation(config, (20,))
    assert set(range(998, 1003)).isdisjoint(range(fresh.seed, fresh.seed + 20))


def test_the_control_is_the_one_with_the_winner_s_own_filter_policy(tmp_path: Path) -> None:
    config = study(tmp_path, trials=3, replicates=1)
    resample = "grpo.filter_groups=resample"
    arms = [
        make_arm(config, "control"),
        make_arm(config, "control-resample", resample),
        make_arm(config, "c01", resample),
    ]
    write_sweep(config, arms, {"control": [280], "control-resample": [250], "c01": [300]})
    assert [arm.name for arm in planned_confirmation(config, LOOKS)[1]] == ["control-resample", "c01"]


def test_another_arm_has_a_confirmation_of_its_own(parent: StudyConfig) -> None:
    config, arms = planned_confirmation(parent, LOOKS, "c01")
    assert (config.name, [arm.name for arm in arms]) == ("s-confirm-c01", ["control", "c01"])


def test_what_cannot_be_confirmed_is_refused(parent: StudyConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a confirmation itself; give the sweep: rin confirm s"):
        planned_confirmation(planned_confirmation(parent, LOOKS)[0], LOOKS)
    with pytest.raises(ConfigError, match="--arm c09: no such arm in s; it has c01, c02"):
        planned_confirmation(parent, LOOKS, "c09")
    empty = study(tmp_path, name="empty")
    write_sweep(empty, [make_arm(empty, "control")], {"control": [280]})
    with pytest.raises(NoCandidate, match="there is no candidate"):
        planned_confirmation(empty, LOOKS)
    for looks in ((), (2, 5), (5, 5), (8, 5)):
        with pytest.raises(ConfigError, match="name growing numbers of replicates"):
            planned_confirmation(parent, looks)


@pytest.mark.parametrize("known", ["its id", "its questions", "nothing"])
def test_a_sweep_that_has_the_name_of_another_does_not_go_on_with_the_other_s_confirmation(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    """An earlier version wrote no id; the list of questions has it, where questions are endless."""
    sweeps = Sweeps(strong)
    confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    begun = load_study_config(parent.store, "s-confirm")
    assert begun.parent_id == parent.id
    if known != "its id":
        save_study_config(begun.model_copy(update={"parent_id": ""}))
    if known == "nothing":
        for number, arm in enumerate(read_arms(begun)):
            asked = arm.config.eval.model_copy(update={"draw": ""})
            write_arm(begun, number, replace(arm, config=arm.config.model_copy(update={"eval": asked})))
    assert confirmation_of(parent) is not None
    other = parent.model_copy(update={"id": new_id()})
    save_study_config(other)
    if known == "nothing":
        assert confirmation_of(other) is not None
        return
    assert confirmation_of(other) is None
    with pytest.raises(
        ConfigError, match=r"NAME=s: s-confirm is no confirmation of this sweep.*: rin delete s-confirm$"
    ):
        confirmed(other, monkeypatch, sweeps)
    assert len(sweeps.calls) == 1
    alone = read_confirmation(load_study_config(parent.store, "s-confirm"))
    assert alone.finding is not None
    assert alone.notes == ("its sweep cannot be read: NAME=s: is another sweep by now",)


def test_a_sweep_that_has_the_name_of_a_confirmation_is_none(parent: StudyConfig) -> None:
    write_sweep(study(Path(parent.store), name="s-confirm"), read_arms(parent), {})
    assert confirmation_of(parent) is None
    with pytest.raises(ConfigError, match="s-confirm is no confirmation of this sweep"):
        confirm(parent, lambda event: None)


# When it ends


def test_it_ends_at_the_first_look_that_decides_with_the_verdict_of_the_stopping_rule(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps = Sweeps(strong)
    state = confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    assert sweeps.calls == [("run", 3)]
    treated, plain = accuracies(state.config, "c02", 3), accuracies(state.config, "control", 3)
    expected = sequential_compare(treated, plain, rule=SequentialRule(looks=LOOKS))
    assert state.comparison.verdict == expected.verdict == "better"
    assert state.comparison.difference == pytest.approx(np.mean(np.array(treated) - np.array(plain)))
    assert (state.winner, state.control, state.replicates, state.unfinished) == ("c02", "control", 3, 0)
    assert state.finding is not None
    assert state.finding.verdict == "better where it holds", "a look at eight pairs could not exclude the risk either"
    assert confirmation_lines(state)[0] == (
        "c02 against control: better where it holds; a collapse risk up to 71 % is not excluded"
    )


def test_replicates_are_added_look_by_look_until_it_is_decided(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps = Sweeps(late)
    state = confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    assert sweeps.calls[0] == ("run", 3)
    assert [replicates for _, replicates in sweeps.calls] == list(LOOKS[: len(sweeps.calls)])
    assert len(sweeps.calls) > 1
    treated, plain = (
        accuracies(state.config, "c02", state.replicates),
        accuracies(state.config, "control", state.replicates),
    )
    for look in LOOKS:
        expected = sequential_compare(treated[:look], plain[:look], rule=SequentialRule(looks=LOOKS))
        assert (expected.verdict != "undecided") == (look >= sweeps.calls[-1][1])
    assert state.comparison.verdict == "better"


def test_what_is_not_decided_by_the_last_look_is_called_undecided(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps = Sweeps(nothing)
    state = confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    assert [replicates for _, replicates in sweeps.calls] == list(LOOKS)
    assert (state.comparison.verdict, state.replicates) == ("undecided", 8)
    again = confirmed(parent, monkeypatch, sweeps)
    assert sweeps.calls[-1] == ("resume", 8)
    assert again.comparison == state.comparison


def test_a_decision_stands_when_it_is_asked_again(parent: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = Sweeps(strong)
    first = confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    second = confirmed(parent, monkeypatch, sweeps)
    assert sweeps.calls == [("run", 3), ("resume", 3)]
    assert second.comparison == first.comparison


def test_a_worse_winner_is_called_worse_and_an_equal_one_the_same(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = confirmed(parent, monkeypatch, Sweeps(lambda arm, number: 560 - strong(arm, number)), looks=LOOKS)
    assert state.comparison.verdict == "worse"


def test_a_collapse_counts_with_its_accuracy_and_is_told_apart(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsing(arm: str, number: int) -> Any:
        return ("collapsed", 60 + number) if arm != "control" else 280 + number * 2

    state = confirmed(parent, monkeypatch, Sweeps(collapsing), looks=LOOKS)
    assert state.comparison.verdict == "worse"
    assert state.arms is not None
    assert (state.arms.treated_risk.collapsed, state.arms.control_risk.collapsed) == (state.replicates, 0)
    assert any(
        line.startswith(f"  collapsed: {state.replicates} of {state.replicates}") for line in confirmation_lines(state)
    )


def test_replicates_go_on_where_a_planned_look_could_exclude_the_collapse_risk(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve points gained; a run of the sweep that collapsed was left with 55 %, so that a risk of 43 % would cancel
    them. Three pairs do not exclude that, eight do (37 %)."""
    arm = make_arm(parent, "c03", "noise.sigma_start=0.05")
    write_arm(parent, 3, arm)
    write_trial(parent, arm, 0, outcome(arm, 0, 220, "collapsed"))
    sweeps = Sweeps(strong)
    state = confirmed(parent, monkeypatch, sweeps, looks=(3, 8))
    assert [replicates for _, replicates in sweeps.calls] == [3, 8]
    assert state.comparison.replicates == 3, "the accuracies were decided there, and that stands"
    assert state.finding is not None
    assert (state.finding.verdict, state.finding.runs, state.finding.worth) == ("better", 8, 0.55)
    assert (state.finding.risk_high, state.finding.tipping) == (
        pytest.approx(0.37, abs=0.005),
        pytest.approx(0.43, abs=0.005),
    )
    assert confirmation_lines(state)[0] == "c02 against control: better"
    assert confirmation_tree(state)["verdict"] == "better"
    assert read_confirmation(state.config) == state


def test_a_gain_may_have_more_looks_to_exclude_a_collapse_risk_and_nothing_else_may(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps = Sweeps(strong)
    state = confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    assert state.finding is not None
    assert state.finding.needs is not None
    needed = 3 + state.finding.needs
    assert f"  to find out: rin confirm s --looks 3,5,8,{needed}" in confirmation_lines(state)
    for looks in ((3, 5), (3, 6, 30), (4, 5, 8, 30)):
        with pytest.raises(ConfigError, match="this confirmation began with 3,5,8"):
            confirmed(parent, monkeypatch, sweeps, looks=looks)
    longer = confirmed(parent, monkeypatch, sweeps, looks=(*LOOKS, needed))
    assert longer.finding is not None
    assert (longer.finding.verdict, longer.finding.runs) == ("better", needed)
    assert longer.finding.risk_high < 0.15
    assert load_study_config(parent.store, "s-confirm").looks == (*LOOKS, needed)
    assert confirmed(parent, monkeypatch, sweeps).finding == longer.finding


def test_an_undecided_confirmation_has_no_more_looks(parent: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = Sweeps(nothing)
    confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    with pytest.raises(ConfigError, match=r"--looks 3,5,8,20: this confirmation began with 3,5,8"):
        confirmed(parent, monkeypatch, sweeps, looks=(*LOOKS, 20))


# Interrupted


def test_it_goes_on_where_it_stopped(parent: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = Sweeps(late)
    sweeps.room = 4
    state = confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    assert (state.replicates, state.unfinished, state.comparison.verdict) == (2, 2, "undecided")
    assert any("2 trials are not finished; go on: rin confirm s" in line for line in confirmation_lines(state))
    before = accuracies(state.config, "c02", 2)
    sweeps.room = 10**6
    state = confirmed(parent, monkeypatch, sweeps)
    assert sweeps.calls[:3] == [("run", 3), ("resume", 3), ("resume", 5)]
    assert accuracies(state.config, "c02", 2) == before
    undisturbed = sequential_compare(
        accuracies(state.config, "c02", state.replicates),
        accuracies(state.config, "control", state.replicates),
        rule=SequentialRule(looks=LOOKS),
    )
    assert state.comparison.verdict == undisturbed.verdict


def test_the_looks_stay_as_they_were_planned(parent: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = Sweeps(nothing)
    sweeps.room = 2
    confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    with pytest.raises(ConfigError, match=r"--looks 5,20: this confirmation began with 3,5,8, .*leave --looks out"):
        confirmed(parent, monkeypatch, sweeps, looks=(5, 20))
    assert confirmed(parent, monkeypatch, sweeps, looks=LOOKS).looks == LOOKS
    assert confirmed(parent, monkeypatch, sweeps).looks == LOOKS


def test_the_default_looks_are_five_to_twenty(parent: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert confirmed(parent, monkeypatch, Sweeps(strong)).looks == (5, 8, 12, 16, 20)


def test_which_replicate_failed_does_not_choose_what_is_looked_at(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs count in the order in which they were planned, up to the first that is missing."""

    def failing(arm: str, number: int) -> Any:
        return None if (arm, number) == ("c02", 1) else strong(arm, number)

    sweeps = Sweeps(failing)
    state = confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    assert (state.replicates, state.unfinished, state.comparison.verdict) == (1, 1, "undecided")
    assert sweeps.calls == [("run", 3)], "no more replicates while one of this look is missing"


# The budget


def test_the_end_of_the_budget_is_a_look_and_spends_its_part_of_the_level(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps = Sweeps(nothing)
    confirmed(parent, monkeypatch, sweeps, looks=LOOKS, budget_hours=None)  # all eight pairs are there
    config = load_study_config(parent.store, "s-confirm")
    for number in (6, 7):
        trial_folder(config, "c02", number).remove("outcome.json")
    sweeps.room, sweeps.budget_spent = 0, True
    state = confirmed(parent, monkeypatch, sweeps, budget_hours=1.5)
    assert sweeps.configs[-1].budget_hours == 1.5
    assert (state.replicates, state.budget_spent, state.unfinished) == (6, True, 2)
    treated, plain = accuracies(config, "c02", 6), accuracies(config, "control", 6)
    expected = sequential_compare(treated, plain, rule=SequentialRule(looks=LOOKS), final=True)
    assert (state.comparison.verdict, state.comparison.level) == (expected.verdict, expected.level)
    assert load_study_config(parent.store, "s-confirm").looks == (3, 5, 6, 8)
    sweeps.room, sweeps.budget_spent = 10**6, False
    state = confirmed(parent, monkeypatch, sweeps, budget_hours=9.0)
    assert (state.looks, state.replicates) == ((3, 5, 6, 8), 8)
    final = SequentialRule(looks=(3, 5, 6, 8))
    assert state.comparison.level == pytest.approx(final.levels(final.looks)[-1])
    assert state.comparison.level < SequentialRule(looks=LOOKS).levels(LOOKS)[-1], "it costs something"


def test_a_budget_that_ends_before_three_pairs_is_no_look(parent: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = Sweeps(strong)
    sweeps.room, sweeps.budget_spent = 4, True
    state = confirmed(parent, monkeypatch, sweeps, looks=LOOKS, budget_hours=0.1)
    assert (state.replicates, state.comparison.verdict) == (2, "undecided")
    assert load_study_config(parent.store, "s-confirm").looks == LOOKS


def test_before_the_first_pair_nothing_is_known(parent: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = Sweeps(strong)
    sweeps.room, sweeps.budget_spent = 0, True
    state = confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    assert (state.replicates, state.comparison.verdict, state.arms) == (0, "undecided", None)
    assert "[unknown]" in "\n".join(confirmation_lines(state))


# Where it is told


@pytest.mark.parametrize("room", [0, 2, 4, 10**6])
def test_its_json_is_strict_however_little_has_ended(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    sweeps = Sweeps(strong)
    sweeps.room = room
    state = confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    tree = json.loads(
        json.dumps(confirmation_tree(state)), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert state.finding is None or tree["finding"]["verdict"] == state.finding.verdict
    said = "undecided" if state.finding is None else state.finding.verdict
    assert (tree["winner"], tree["verdict"], tree["looks"]) == ("c02", said, list(LOOKS))
    assert tree["replicates"] == min(room // 2, 3)


def test_judging_runs_nothing_and_changes_nothing(parent: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    state = confirmed(parent, monkeypatch, Sweeps(strong), looks=LOOKS)
    place = state.config.folder.local
    assert place is not None
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert judge(state.config).comparison == state.comparison
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("since", "said"),
    [
        ({}, []),
        ({"c01": 390}, ["which was the winner when it began; now it is c01: rin confirm s --arm c01"]),
        ({"c01": None, "c02": None}, ["which was the winner when it began; now it is none"]),
    ],
)
def test_a_report_has_the_notes_of_the_confirmation_itself(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch, since: dict[str, int | None], said: list[str]
) -> None:
    """Whatever makes the answer another one than it seems must not be missing where it is read again."""
    sweeps = Sweeps(lambda arm, number: None if (arm, number) == ("c02", 1) else strong(arm, number))
    confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    config = load_study_config(parent.store, "s-confirm")
    trial_folder(config, "c02", 1).write("attempt-001.json", json.dumps(attempt(ended="hang", reason="too long")))
    for name, right in since.items():
        arm = next(arm for arm in read_arms(parent) if arm.name == name)
        for number in range(3):
            trial_folder(parent, name, number).remove("outcome.json")
            if right is not None:
                write_trial(parent, arm, number, outcome(arm, number, right))
    state = confirmed(parent, monkeypatch, sweeps)
    assert state.notes[0] == "c02/1 failed: too long"
    assert len(state.notes) == 1 + len(said)
    assert all(text in note for text, note in zip(said, state.notes[1:], strict=True))
    assert read_confirmation(config) == state


def test_a_confirmation_whose_sweep_is_gone_is_still_read(parent: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    state = confirmed(parent, monkeypatch, Sweeps(strong), looks=LOOKS)
    parent.folder.remove("study.json")
    seen = read_confirmation(state.config)
    assert seen.comparison == state.comparison
    assert "its sweep cannot be read: NAME=s: no sweep of that name" in seen.notes[-1]


def test_a_store_that_moved_goes_on_with_its_tracking_where_the_sweep_has_it(
    parent: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps = Sweeps(strong)
    confirmed(parent, monkeypatch, sweeps, looks=LOOKS)
    moved = parent.model_copy(update={"tracking_uri": "http://elsewhere:5000"})
    confirmed(moved, monkeypatch, sweeps, address="HEAD:6379")
    assert (sweeps.configs[-1].tracking_uri, sweeps.configs[-1].address) == ("http://elsewhere:5000", "HEAD:6379")
    assert read_arms(sweeps.configs[-1])[0].config.eval.questions == QUESTIONS

"""`rin extend`: more of the same sweep, written down, without a change of what has an outcome."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from dashboards import cli
from dashboards.page import page, read_material
from dashboards.report_text import as_tree, report_lines
from search.arms import Arm, read_arms, unfinished
from search.confirm import planned_confirmation
from search.extension import extended, refuse_what_is_not_there, refuse_while_it_runs, write_extension
from search.followup import follow_up
from search.replicates import FRESH
from search.report import report_study
from search.searchers import RinSearch
from search.store import MOST, Derived, StudyConfig, load_study_config, only_driver, save_study_config
from search.study import resume_study
from spaces.config import ConfigError
from spaces.library import Dimension, Float, Space
from tests.conftest import Rin
from tests.searches import Search, choices, cliff, control, drive, reread, searcher, trees
from tests.written_sweeps import make_arm, study, write_sweep

ONE_SIGMA = Space(
    name="one",
    description="",
    dimensions=(Dimension(key="noise.sigma_start", domain=Float(low=0.01, high=0.1, log=True)),),
)


def more(
    config: StudyConfig,
    arms: Sequence[Arm],
    *,
    trials: int | None = None,
    replicates: int | None = None,
    runs: int | None = None,
) -> StudyConfig:
    return extended(config, arms, trials=trials, replicates=replicates, runs=runs)


def written(tmp_path: Path, **changes: Any) -> tuple[StudyConfig, list[Arm]]:
    """A control, and two configurations of which c01 is ahead, two replicates each."""
    config = study(tmp_path, **{"trials": 3, "replicates": 2, **changes})
    arms = [make_arm(config, "control"), make_arm(config, "c01", origin="searcher"), make_arm(config, "c02")]
    write_sweep(config, arms, {"control": [200, 202], "c01": [220, 224], "c02": [210, 212]})
    return config, read_arms(config)


# --- the searcher -----------------------------------------------------------------------------------------------------


def drive_three_at_once(search: Search) -> None:
    flying: list[tuple[str, Any]] = []
    number = 0
    while True:
        while len(flying) < 3 and isinstance(given := search.suggest(f"t{number}"), dict):
            flying.append((f"t{number}", given))
            number += 1
        if not flying:
            return
        trial, given = flying.pop()
        search.ended[given["arm"], given["replicate"]] = cliff(given)
        search.on_trial_complete(trial, {})


@pytest.mark.parametrize("method", ["random", "qmc", "grid", "gp", "tpe"])
def test_an_extended_sweep_is_the_one_that_was_that_large_from_the_start(method: str) -> None:
    """With a model: where trials run one after another, as here."""
    large, small = (searcher(searcher=method, trials=trials) for trials in (10, 7))
    drive(large, cliff)
    drive(small, cliff)
    longer = Search(more(small.study, small.arms, trials=3), reread(small.arms))
    drive(longer, cliff)
    assert len(longer.arms) == 10
    assert trees(longer.arms) == trees(large.arms)


@pytest.mark.parametrize("method", ["random", "qmc", "grid"])
def test_without_a_model_it_is_that_whatever_ran_at_the_same_time(method: str) -> None:
    large, small = (searcher(searcher=method, trials=trials, replicates=2) for trials in (10, 5))
    drive_three_at_once(large)
    drive_three_at_once(small)
    longer = Search(more(small.study, small.arms, trials=5), reread(small.arms))
    drive_three_at_once(longer)
    assert trees(longer.arms) == trees(large.arms)


def test_the_searcher_is_told_all_that_ran_before() -> None:
    small = searcher(searcher="gp", trials=7)
    drive(small, cliff)
    longer = Search(more(small.study, small.arms, trials=1), reread(small.arms))
    assert len(longer.optuna().trials) == 6


def test_further_replicates_run_in_every_arm_with_the_seeds_that_come_next() -> None:
    small = searcher(trials=3, replicates=2)
    drive(small, cliff)
    longer = Search(more(small.study, small.arms, trials=1, replicates=2), reread(small.arms))
    given = drive(longer, cliff)
    old = [(s["arm"], s["replicate"], s["config"]["seed"]) for s in given[:6]]
    assert old == [(name, k, 3 + k) for name in ("control", "c01", "c02") for k in (2, 3)]
    assert [(s["arm"], s["config"]["seed"]) for s in given[6:]] == [("c03", seed) for seed in (3, 4, 5, 6)]


def test_further_runs_go_where_they_matter() -> None:
    small = searcher(trials=12, replicates=MOST, total=12)
    drive(small, cliff)
    longer = Search(more(small.study, small.arms, runs=6), reread(small.arms))
    assert len(drive(longer, cliff)) == 6
    assert sum(arm.planned for arm in longer.arms) == 18


# --- the folder -------------------------------------------------------------------------------------------------------


def test_what_has_an_outcome_is_not_touched_and_the_rest_is_what_resume_runs(tmp_path: Path) -> None:
    config, arms = written(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "study.json"}
    write_extension(more(config, arms, trials=1, replicates=1))
    assert {path: path.read_bytes() for path in before} == before
    again = load_study_config(config.store, "s")
    assert (again.trials, again.replicates, again.runs) == (4, 3, 12)
    assert unfinished(again, read_arms(again)) == 6
    assert [(arm.name, k) for arm, k in RinSearch(again, read_arms(again)).waiting] == [
        (name, 2) for name in ("control", "c01", "c02")
    ]


def test_each_extension_is_written_down_and_told(tmp_path: Path) -> None:
    config, arms = written(tmp_path)
    once = more(config, arms, replicates=1)
    write_extension(once)
    twice = more(once, arms, trials=4)
    write_extension(twice)
    read = load_study_config(config.store, "s")
    assert [(one.trials, one.replicates, one.ended, one.candidate) for one in read.extensions] == [
        ((3, 3), (2, 3), 6, "c01"),
        ((3, 7), (3, 3), 6, ""),
    ]
    said = re.sub(r"\d{4}-\d\d-\d\d \([^)]*\)", "DAY", " ".join(read.history))
    assert said.startswith(
        "extended twice: 2 -> 3 replicates on DAY, after 6 trials had ended; 3 -> 7 configurations on DAY, "
        "after 6 trials had ended whoever sees results and then asks for more chooses when to stop"
    )
    lines, html = report_lines(report_study(read)), page(read_material(read))
    for line in read.history:
        assert line in lines
        assert line.partition(":")[0] in html
    (first, _) = json.loads(json.dumps(as_tree(report_study(read))))["extensions"]
    assert first["replicates"] == [2, 3]


def test_a_sweep_that_was_not_extended_says_nothing_of_it(tmp_path: Path) -> None:
    config, _ = written(tmp_path)
    assert config.history == ()
    assert not any("chooses when to stop" in line for line in report_lines(report_study(config)))


def test_a_candidate_that_an_extension_has_overtaken_is_named_with_its_confirmation(tmp_path: Path) -> None:
    config, arms = written(tmp_path)
    confirmation, pair = planned_confirmation(config, (3, 5))
    write_sweep(confirmation, pair, {})
    larger = more(config, arms, replicates=1)
    write_sweep(larger, arms, {"control": [200, 202, 201], "c01": [220, 224, 100], "c02": [260, 262, 261]})
    report = report_study(larger)
    (line,) = [line for line in report_lines(report) if line.startswith("before it was extended")]
    assert line.endswith("the candidate was c01, now it is c02: a confirmation that began then stays one of c01")
    follow = follow_up(larger.model_copy(update={"confirm_pairs": 8}), read_arms(larger))
    assert follow is not None
    assert (follow.candidate, follow.why_not) == (
        None,
        "s-confirm confirms c01, which was the candidate when it began; now it is c02: rin confirm s --arm c02",
    )
    (stays,) = [one for one in pair if one.origin == "winner"]
    assert (stays.name, confirmation.extensions) == ("c01", ())
    same = larger.model_copy(update={"extensions": (larger.extensions[0].model_copy(update={"candidate": "c02"}),)})
    save_study_config(same)
    assert not [line for line in report_lines(report_study(same)) if line.startswith("before it was extended")]


def test_a_confirmation_after_an_extension_has_seeds_that_no_replicate_has(tmp_path: Path) -> None:
    config, arms = written(tmp_path)
    confirmation, _ = planned_confirmation(config, (3, 5))
    most = more(config, arms, replicates=FRESH - config.replicates)
    assert most.seed_of(most.replicates - 1) < confirmation.seed
    changed = most.model_copy(update={"derived": Derived(name="a", id="b", changes=("seed=1 (there 0)",))})
    assert (len(changed.history), planned_confirmation(changed, (3, 5), "c01")[0].history) == (3, ())


# --- what is refused --------------------------------------------------------------------------------------------------

SIZES = {"trials": None, "replicates": None, "runs": None}
REFUSED: list[tuple[dict[str, Any], dict[str, int], str]] = [
    ({}, {}, "--trials, --replicates: say how many more configurations than 3, or replicates of each than 2, s gets"),
    ({}, {"runs": 4}, "--runs 4: s has 3 configurations x 2 replicates; give --trials or --replicates"),
    ({"total": 12}, {"trials": 4}, "--trials 4: s was given 12 runs, and decides itself what they are; give --runs"),
    ({"total": 12}, {"replicates": 1, "runs": 3}, "--replicates 1: s was given 12 runs"),
    ({"total": 12}, {}, "--runs: say how many more than its 12 runs s gets"),
    ({"kind": "ablation", "parent": "p"}, {"trials": 1}, "--trials 1: s is an ablation, whose arms come from p"),
    ({"kind": "program"}, {"trials": 1}, "NAME=s: is a programme, which says itself how much runs"),
    (
        {"name": "p-confirm", "kind": "confirm", "parent": "p", "looks": (3, 5)},
        {"replicates": 1},
        "NAME=p-confirm: is a confirmation, whose looks were planned; one that may have more of them takes: "
        "rin confirm p --looks 3,5,...",
    ),
    ({}, {"replicates": 999}, "--replicates 999: s has 2, and seeds for 1000 of an arm before"),
]


@pytest.mark.parametrize(("changes", "asked", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
def test_what_a_sweep_cannot_have_more_of(changes: Any, asked: dict[str, int], said: str) -> None:
    config = study("/nowhere", **{"trials": 3, "replicates": 2, **changes})
    with pytest.raises(ConfigError, match="^" + re.escape(said)):
        more(config, [], **asked)


def test_an_ablation_takes_replicates() -> None:
    assert more(study("/nowhere", kind="ablation", trials=3), [], replicates=2).replicates == 3


def asked_of(space: Space, searched: int, **asked: int) -> None:
    """Of a sweep that has run so many configurations of a space beside its control."""
    method = "grid" if space is ONE_SIGMA else "random"
    done = searcher(space, searcher=method, trials=1 + searched, settings={"noise": {"sigma_end": 0.001}})
    drive(done, cliff)
    assert len(done.arms) == 1 + searched
    refuse_what_is_not_there(done.study, more(done.study, done.arms, **asked), done.arms)


@pytest.mark.parametrize("space", [choices(grpo__steps=3, grpo__prompts=2), ONE_SIGMA], ids=["finite", "grid"])
def test_more_configurations_than_the_space_holds_are_refused(space: Space) -> None:
    """Six of the one, five of the other."""
    has = 6 if space.name == "finite" else 5
    asked_of(space, has - 2, trials=2)
    with pytest.raises(ConfigError, match=r"--trials 3: space \w+ has 2 further configurations; give --trials 2$"):
        asked_of(space, has - 2, trials=3)
    with pytest.raises(ConfigError, match=r"has no further configurations; give --replicates, or a larger space"):
        asked_of(space, has, trials=1)
    asked_of(space, has, replicates=2)


def test_configurations_that_are_to_come_anyway_are_no_room(tmp_path: Path) -> None:
    """Of a sweep that was interrupted."""
    config = study(tmp_path, space=choices(grpo__steps=3, grpo__prompts=2), trials=5)
    arms = [control(config)]
    refuse_what_is_not_there(config, more(config, arms, trials=2), arms)
    with pytest.raises(ConfigError, match="--trials 3: space finite has 2 further configurations"):
        refuse_what_is_not_there(config, more(config, arms, trials=3), arms)


def test_more_runs_than_its_arms_can_take_are_refused() -> None:
    done = searcher(choices(grpo__steps=2), trials=9, replicates=MOST, total=9)
    drive(done, cliff)
    assert (len(done.arms), sum(arm.planned for arm in done.arms)) == (3, 9)
    refuse_what_is_not_there(done.study, more(done.study, done.arms, runs=15), done.arms)
    with pytest.raises(ConfigError, match=r"--runs 16: .*can take 15 more, of 8 replicates each"):
        refuse_what_is_not_there(done.study, more(done.study, done.arms, runs=16), done.arms)


def test_a_spent_budget_needs_a_larger_one(tmp_path: Path) -> None:
    config, arms = written(tmp_path, budget_hours=0.05)
    larger = more(config, arms, replicates=1)
    with pytest.raises(ConfigError, match=r"--budget 0\.05: s has used 0\.1 hours, so nothing would run; give more"):
        refuse_what_is_not_there(config, larger, arms)
    refuse_what_is_not_there(config, larger.model_copy(update={"budget_hours": 0.2}), arms)


def test_a_sweep_that_runs_is_not_extended(tmp_path: Path) -> None:
    config, arms = written(tmp_path)
    with only_driver(config), pytest.raises(ConfigError, match="sweep s is being run by another process"):
        write_extension(more(config, arms, replicates=1))
    assert load_study_config(config.store, "s") == config


def test_a_sweep_whose_candidate_is_being_confirmed_is_not_extended(tmp_path: Path) -> None:
    config, _ = written(tmp_path)
    confirmation, pair = planned_confirmation(config, (3, 5))
    write_sweep(confirmation, pair, {})
    refuse_while_it_runs(config)
    with only_driver(confirmation), pytest.raises(ConfigError, match=r"s-confirm is being run .*then: rin confirm s$"):
        refuse_while_it_runs(config)


def test_an_extension_is_not_taken_back_by_who_read_the_sweep_before_it(tmp_path: Path) -> None:
    config, arms = written(tmp_path)
    other = more(config, arms, trials=5)
    write_extension(more(config, arms, replicates=1))
    for stale in (config, other):
        with pytest.raises(ConfigError, match="NAME=s: another process has extended it meanwhile"):
            resume_study(stale, lambda event: None)
    with pytest.raises(ConfigError, match="another process has extended it meanwhile"):
        write_extension(other)
    assert load_study_config(config.store, "s").replicates == 3


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_it_down_and_says_how_it_runs(tmp_path: Path, rin: Rin) -> None:
    written(tmp_path / "runs")
    code, out, err = rin("extend", "s", "--trials", "2", "--replicates", "1", "--no-run")
    assert (code, err) == (0, "")
    assert re.fullmatch(
        r"extended: 3 -> 5 configurations, 2 -> 3 replicates on [\d-]+ \([\w. -]+\), after 6 trials had ended\n"
        r"9 trials to go: rin resume s\n",
        out,
    )
    code, out, _ = rin("report", "s")
    assert code == 0
    assert "extended once: 3 -> 5 configurations" in " ".join(out.split())
    code, _, err = rin("extend", "s", "--trials", "0")
    assert code == 2
    assert "--trials" in err
    code, _, err = rin("extend", "--trials", "1")
    assert (code, err) == (
        2,
        "rin: NAME: say which sweep gets more: a wrong one would train for hours; rin list shows them\n",
    )


def test_its_help_says_that_numbers_are_added() -> None:
    group: Any = typer.main.get_command(cli.app)
    told = {p.name: p.help for p in group.commands["extend"].params}
    assert all(told[name].startswith("So many more") for name in ("trials", "replicates", "runs"))

"""A programme from registration to report, by command and by searcher: what each says, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dashboards.cli import app
from search.arms import read_arms
from search.program_study import due, read_state
from search.registration import PROGRAMME_FILE, read_registrations, register, registrations_text
from search.what_if import tree
from spaces.config import ConfigError
from spaces.points import POINTS
from spaces.programme import (
    Alternative,
    Experiment,
    Hypothesis,
    Phase,
    Programme,
    Replicates,
    Rule,
    Scenario,
    SigmaTable,
    digest,
    load_programme,
    programme_yaml,
    read_programme,
)
from spaces.reading import as_tree, merge, parse_yaml
from tests.written_programs import begun, documented, drive, finished, small


def helps(arm: str, replicate: int) -> int:
    """`small` and `large` gain 25 points and 35; the table's largest sigma breaks every run in W4A4."""
    gain = {"small": 100, "large": 140}.get(arm.rsplit("w4a4-")[-1].rsplit("w4a16-")[-1], 0)
    return -80 if arm == "w4a4-sigma-0.04" else 200 + gain + (3 * replicate + len(arm)) % 4


def level(arm: str, replicate: int) -> int:
    return 200 + (3 * replicate + len(arm)) % 4


def rin(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the page of its words --------------------------------------------------------------------------------------------


def test_the_documented_programme_is_read_and_ends_whatever_happens(tmp_path: Path) -> None:
    programme = small(tmp_path)
    begun(tmp_path, programme)  # every arm that it may run can run
    ends = {branch.end.scenario for branch in tree(programme) if branch.end is not None}
    assert ends == {"stronger", "enough", None}


def test_the_page_of_words_has_every_word_of_a_programme_and_of_its_conditions() -> None:
    text = (Path(__file__).parents[1] / "docs" / "programs.md").read_text(encoding="utf-8").split("## The words")[1]
    records = (Programme, Experiment, Alternative, Hypothesis, Phase, Rule, Scenario, SigmaTable, Replicates)
    words = {word for record in records for word in record.model_fields}
    conditions = {"helps", "hurts", "collapses", "fails", "undecided", "beats", "gain", "every", "some", "all", "any"}
    missing = [word for word in words | conditions | {"not"} if not re.search(rf"`{word}(: [^`]*)?`", text)]
    assert not missing


@pytest.mark.parametrize("where", ["all", "large"])
def test_a_programme_whose_arms_have_other_ranks_than_its_study_is_refused(tmp_path: Path, where: str) -> None:
    written = parse_yaml(documented(tmp_path).read_text(), "mine.yaml")
    within = written if where == "all" else written["experiments"][where]
    within["settings"]["parallel"] = {"ranks": 2}
    with pytest.raises(ConfigError, match=r"parallel\.ranks=2: in a sweep all trials have as many"):
        begun(tmp_path, read_programme(written, "mine.yaml"))


# --- registration -----------------------------------------------------------------------------------------------------


def test_the_same_programme_is_registered_once_and_has_the_same_hash(tmp_path: Path) -> None:
    programme = small(tmp_path)
    config, first = begun(tmp_path, programme)
    again = register(config, read_programme(as_tree(programme), origin="x"), (), [first], ended=4)
    assert again == [first]
    assert register(config, programme, ())[0].hash == first.hash


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("phases", 1, "then", 0, "when", "gain", "above"), 2.0, "phases.more.then.0.when.gain.above"),
        (("replicates", "level"), 0.1, "replicates.level"),
        (("experiments", "large", "priority"), 1, "experiments.large.priority"),
        (("scenarios",), "turned round", "scenarios (its order)"),
    ],
)
def test_a_change_is_a_registration_of_its_own_that_says_what_and_when(
    tmp_path: Path, path: tuple[Any, ...], value: Any, said: str
) -> None:
    config, first = begun(tmp_path, small(tmp_path))
    changed = json.loads(json.dumps(as_tree(first.programme)))
    if value == "turned round":
        value = dict(reversed(changed["scenarios"].items()))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    both = register(config, read_programme(changed, origin="x"), (), [first], ended=5)
    config.folder.write(PROGRAMME_FILE, registrations_text(both))
    kept = read_registrations(config)
    assert kept[0] == first
    assert (kept[1].changes, kept[1].hash != first.hash) == ((said,), True)
    assert f"after 5 trials, with changes in {said}" in kept[1].words()
    assert f"before it: {first.words()}" in rin("program", "show", "--name", "mine", "--store", str(tmp_path))


def test_other_modes_are_another_registration(tmp_path: Path) -> None:
    config, first = begun(tmp_path, small(tmp_path))
    both = register(config, first.programme, ("W4A4",), [first], ended=1)
    assert (len(both), both[1].changes) == (2, ("modes",))


def test_a_damaged_registration_is_one_line(tmp_path: Path) -> None:
    config, _ = begun(tmp_path, small(tmp_path))
    config.folder.write(PROGRAMME_FILE, "[{}]")
    assert "is damaged" in refused("program", "show", "--name", "mine", "--store", str(tmp_path))


# --- show, what-if, report --------------------------------------------------------------------------------------------


def test_show_of_one_that_has_not_begun_tells_phases_rules_and_scenarios(tmp_path: Path) -> None:
    said = rin("program", "show", "plan", "--store", str(tmp_path))
    programme = load_programme("plan")
    for word in (*(f"phase {phase.name}" for phase in programme.phases), *programme.experiments, "scenario D"):
        assert word in said


@pytest.mark.parametrize("name", ["plan", "mine"])
def test_show_as_yaml_is_the_same_programme_again(tmp_path: Path, name: str) -> None:
    named = name if name == "plan" else str(documented(tmp_path))
    text = rin("program", "show", named, "--yaml")
    assert digest(read_programme(parse_yaml(text, "x"), origin="x")) == digest(load_programme(named))


def test_as_yaml_a_setting_that_is_null_or_empty_stays(tmp_path: Path) -> None:
    changed = as_tree(small(tmp_path))
    changed["experiments"]["large"]["settings"]["noise"] |= {"zones": [], "layers": None}
    programme = read_programme(changed, origin="x")
    assert digest(read_programme(parse_yaml(programme_yaml(programme), "x"), origin="x")) == digest(programme)


def test_show_tells_the_path_with_reasons_and_then_its_end(tmp_path: Path) -> None:
    config, _ = begun(tmp_path, small(tmp_path))
    where = ("--name", "mine", "--store", str(tmp_path))
    assert "next: phase first, small to 2 replicates" in rin("program", "show", *where)
    drive(config, helps)
    said = rin("program", "show", *where)
    assert "-> more, since small helps: it helps, so more may help more" in said
    assert "end: scenario stronger" in said
    seen = json.loads(rin("program", "show", *where, "--json"))
    assert seen["ended"]
    assert [step["step"] for step in seen["modes"][""]["steps"]] == ["decision", "decision", "end"]


def test_show_says_that_a_file_is_not_what_is_registered(tmp_path: Path) -> None:
    begun(tmp_path, small(tmp_path))
    file = documented(tmp_path)
    file.write_text(file.read_text().replace("level: 0.05", "level: 0.1"))
    assert "is not what is registered" in rin("program", "show", str(file), "--store", str(tmp_path)).replace("\n", " ")


@pytest.mark.slow
def test_the_whole_tree_of_the_plan_ends_and_each_way_in_a_scenario_or_in_none(tmp_path: Path) -> None:
    said = rin("program", "what-if")
    assert said.splitlines()[0].startswith("foundation [")
    assert {name for name in "ABC" if f"scenario {name}" in said} == set("ABC")
    assert "scenario D" in rin("program", "what-if", "--assume", "e13i-baseline=2", "--assume", "e13i-high=6")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nobody=1"], "unknown experiment nobody"),
        (["e14=lots"], "give a gain in points"),
        (["e14=nan"], "give a gain in points"),
        (["e14=99"], "give a gain in points"),
        (["e14"], "give a gain in points"),
        (["e14=1", "e14=2"], "assumed twice"),
    ],
)
def test_a_wrong_assumption_is_one_line(given: list[str], said: str) -> None:
    assert said in refused("program", "what-if", *(part for one in given for part in ("--assume", one)))


def test_the_documents_of_a_programme_say_its_end_its_hash_and_what_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, str] = {}
    monkeypatch.setattr("dashboards.program_documents.tell_documents", lambda study, files: told.update(files))
    config = finished(tmp_path, small(tmp_path), level)
    said = rin("program", "report", "mine", "--store", str(tmp_path))
    (registration,) = read_registrations(config)
    assert registration.hash in said
    assert set(told) == {"summary.md", "small.md", "large.md"}
    assert "Skipped after phase first" in told["large.md"]
    assert (config.folder / "documents").read("summary.md") == told["summary.md"].encode()


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workload", "embedded"], "--workload embedded: mine began with tiny"),
        (["--seed", "3"], "--seed 3: mine began with 0"),
        (["--set", "grpo.steps=4"], "mine began with"),
        (["--modes", "w4a5"], "--modes w4a5: w4a5 unknown; choose from"),
        (["--modes", "w4a4,w4a4"], "w4a4 is named twice"),
        (["--name", "s"], "is a sweep in"),
    ],
)
def test_options_that_a_programme_cannot_take_are_one_line_and_change_nothing(
    tmp_path: Path, options: list[str], said: str
) -> None:
    from search.store import save_study_config
    from tests.written_sweeps import study

    config, _ = begun(tmp_path, small(tmp_path))
    save_study_config(study(tmp_path))
    before = {name: config.folder.read(name) for name in ("study.json", PROGRAMME_FILE)}
    named = () if "--name" in options else ("--name", "mine")
    assert said in refused("program", "run", *named, *options, "--store", str(tmp_path))
    assert {name: config.folder.read(name) for name in before} == before


def test_an_experiment_that_ran_with_other_settings_is_refused(tmp_path: Path) -> None:
    config, first = begun(tmp_path, small(tmp_path))
    drive(config, level, most=4)
    changed = as_tree(first.programme)
    settings = merge(POINTS["e13m-rmsnorm"].settings, {"noise": {"sigma_start": 0.2}})
    changed["experiments"]["small"] = {"settings": settings}
    both = register(config, read_programme(changed, origin="x"), (), [first])
    with pytest.raises(ConfigError, match="small has run there with other settings; give the experiment another"):
        due(config, both[-1], read_arms(config))


# --- modes and the table ----------------------------------------------------------------------------------------------


def test_each_mode_walks_alone_with_a_control_of_its_precision_and_fills_the_table(tmp_path: Path) -> None:
    table = SigmaTable(point="e13m-rmsnorm", sigmas={"W4A16": (0.03, 0.06), "W4A4": (0.02, 0.04)})
    programme = small(tmp_path).model_copy(update={"table": table})
    config, first = begun(tmp_path, programme, ("W4A16", "W4A4"))
    names = {arm.name for arm in read_arms(config)}
    assert {"w4a16-control", "w4a16-small", "w4a16-sigma-0.06", "w4a4-control", "w4a4-small"} <= names
    assert not any("large" in name for name in names)  # due only after the first phase
    ran = drive(config, helps)
    state = read_state(config)
    arms = {arm.name: arm for arm in state.arms}
    for mode, activations in (("W4A16", "none"), ("W4A4", "mxfp4")):
        seen = state.walks[mode]
        for name in ("small", "large"):
            entry = seen.entries[name]
            assert entry.arm == f"{mode.lower()}-{name}"
            assert entry.control.startswith(f"{mode.lower()}-control")
            assert {arms[arm].config.quant.activations for arm in (entry.arm, entry.control)} == {activations}
    assert {(row.mode, row.sigma): (row.runs, row.collapsed) for row in state.table} == {
        ("W4A16", 0.03): (3, 0),
        ("W4A16", 0.06): (3, 0),
        ("W4A4", 0.02): (3, 0),
        ("W4A4", 0.04): (2, 2),  # two collapses, and it is not run again
    }
    assert {bound.mode for bound in state.boundaries} <= {"W4A16", "W4A4"}
    assert state.boundaries
    assert state.ended
    assert len(ran) == len(set(ran)) == sum(len(arm.results) for arm in state.arms)
    said = rin("program", "show", "--name", "mine", "--store", str(tmp_path)).replace("\n", " ")
    assert "W4A4: sigma 0.02 held 3 of 3, 0.04 held 0 of 2" in said
    assert "the same configuration as" not in said
    assert first.modes == ("W4A16", "W4A4")


def test_a_sigma_of_the_table_that_is_an_experiment_too_runs_once(tmp_path: Path) -> None:
    config = finished(tmp_path, small(tmp_path), lambda arm, k: 200 + 40 * ("sigma" in arm) + k, ("W4A16", "W4A4"))
    arms = [arm.config for arm in read_arms(config)]
    assert not [one for number, one in enumerate(arms) if one in arms[:number]]
    said = rin("program", "show", "--name", "mine", "--store", str(tmp_path)).replace("\n", " ")
    assert "small (the same configuration as w4a4-sigma-0.05)" in said


def test_what_is_due_grows_with_the_outcomes_and_a_killed_driver_s_successor_runs_the_same(tmp_path: Path) -> None:
    for place in ("whole", "killed"):
        (tmp_path / place).mkdir()
    config, _ = begun(tmp_path / "whole", small(tmp_path))
    whole = drive(config, helps)
    config, first = begun(tmp_path / "killed", small(tmp_path))
    parts: list[tuple[str, int]] = []
    while more := drive(config, helps, most=3):
        parts += more
    assert sorted(parts) == sorted(whole)
    assert [name for name, _ in whole].index("large") >= 8  # the first look of the phase before it
    assert not due(config, first, read_arms(config))


def test_the_page_says_the_programme_s_own_path_before_a_sweep_s_words(tmp_path: Path) -> None:
    finished(tmp_path, small(tmp_path), level)
    rin("report", "mine", "--store", str(tmp_path), "--html")
    text = (tmp_path / "mine" / "report.html").read_text(encoding="utf-8")
    assert text.index("judged by its own rules at its own level") < text.index("it is not shown to help")
    assert re.search(r"<h1>programme mine on tiny, \d+ trials</h1>", text)  # no space, no bound

"""`rin sweep --from NAME`: everything is taken over but what is given, and nothing is read that has changed since."""

import hashlib
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer

from dashboards import cli
from dashboards.listing import sweep_line, sweep_row
from dashboards.options import WHAT_RUNS, SweepOptions, refuse_with_ablate, study_config
from dashboards.page import page, read_material
from dashboards.report_text import report_lines
from search import rewards
from search.arms import read_arms, write_arm
from search.lineup import base_tree, fixed_arms
from search.replicates import AT_ONCE
from search.report import report_study
from search.searchers import RinSearch
from search.store import StudyConfig, load_study_config, save_study_config
from spaces.config import ConfigError
from spaces.library import SPACES
from spaces.reading import as_tree, dump_yaml, flatten
from tests.written_sweeps import make_arm, study, write_sweep
from trainable.tasks import code

OF_ANOTHER_KIND = {
    "space": "schedule",
    "workload": "tiny",
    "trials": 12,
    "replicates": 3,
    "concurrent": 2,
    "seed": 5,
    "overrides": ["noise.modules=linear", "eval.questions=16"],
    "points": "e12,e13h",
    "evidence": "e13i-baseline",
    "warm_start": "earlier",
    "searcher": "tpe",
    "objectives": ["accuracy", "hours"],
    "confirm": False,
    "budget": 1.5,
    "cpus": 2,
    "gpus": 0.5,
    "tracking_uri": "http://host:5000",
    "address": "HEAD:6379",
}
PLAIN: dict[str, tuple[Any, dict[str, Any]]] = {
    "space": ("sigma", {"space": "sigma"}),
    "workload": ("embedded", {"workload": "embedded"}),
    "trials": (8, {"trials": 8}),
    "replicates": (1, {"replicates": 1}),
    "runs": (9, {"trials": 9, "replicates": 8, "total": 9}),
    "concurrent": (1, {"concurrent": 1}),
    "seed": (0, {"seed": 0}),
    "overrides": (["eval.questions=32"], {"settings": {"noise": {"modules": "linear"}, "eval": {"questions": 32}}}),
    "points": ("", {"points": ()}),
    "evidence": ("", {"evidence": ()}),
    "warm_start": ("", {"warm_start": ""}),
    "searcher": ("gp", {"searcher": "gp"}),
    "objectives": (["accuracy"], {"objectives": ("accuracy",)}),
    "confirm": (True, {"confirm_pairs": AT_ONCE}),
    "budget": (9.0, {"budget_hours": 9.0}),
    "cpus": (1, {"cpus": 1}),
    "gpus": (0.0, {"gpus": 0.0}),
    "tracking_uri": ("http://other:5000", {"tracking_uri": "http://other:5000"}),
    "address": ("local", {"address": None}),
}
"""What holds without the option, given all the same, and what comes of it."""


def begun(tmp_path: Path, **given: Any) -> StudyConfig:
    """As a sweep is written down."""
    config = study_config(SweepOptions(**{"name": "a", "store": str(tmp_path / "runs"), **given}))
    save_study_config(config)
    for number, arm in enumerate(fixed_arms(config)):
        write_arm(config, number, arm)
    return config


def changed(tmp_path: Path, **given: Any) -> StudyConfig:
    return study_config(SweepOptions(**{"source": "a", "name": "b", "store": str(tmp_path / "runs"), **given}))


def same_but(config: StudyConfig) -> dict[str, Any]:
    shown = config.model_dump(exclude={"name", "id", "derived", "given", "space"})
    return {**shown, "space": config.space.name}


def test_no_option_of_a_sweep_has_a_value_of_its_own() -> None:
    """Else nobody knew whether it was given."""
    assert {field.name for field in fields(SweepOptions) if getattr(SweepOptions(), field.name) is not None} == {
        "store"
    }


def test_a_sweep_from_another_one_takes_everything_over(tmp_path: Path) -> None:
    before = begun(tmp_path, **OF_ANOTHER_KIND)
    after = changed(tmp_path)
    assert same_but(after) == same_but(before)
    assert (after.space, after.given) == (before.space, before.given)
    assert (after.id != before.id, after.name, after.derived and after.derived.id) == (True, "b", before.id)
    assert after.history == ("the same as a without a change",)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyConfig]:
    place = tmp_path_factory.mktemp("other")
    return place, begun(place, **OF_ANOTHER_KIND)


@pytest.mark.parametrize("option", PLAIN)
def test_an_option_that_is_given_wins_also_with_its_default(option: str, other: tuple[Path, StudyConfig]) -> None:
    place, before = other
    value, comes_to = PLAIN[option]
    assert same_but(changed(place, **{option: value})) == same_but(before) | comes_to


def test_the_tables_hold_every_option() -> None:
    options = {field.name for field in fields(SweepOptions)} - {"name", "store", "source"}
    assert set(PLAIN) == options
    assert set(OF_ANOTHER_KIND) == options - {"runs"}


def test_what_is_different_is_written_down_and_shown(tmp_path: Path) -> None:
    begun(tmp_path, workload="tiny", overrides=["eval.questions=16", "noise.num_stages=4"], points="e12")
    given = ["grpo.learning_rate=2e-4", "noise.num_stages=5"]
    after = changed(tmp_path, overrides=given, trials=9, points="e12,e13h")
    assert after.settings == {
        "eval": {"questions": 16},
        "noise": {"num_stages": 5},
        "grpo": {"learning_rate": 2e-4},
    }
    words = (
        "the same as a but grpo.learning_rate=0.0002, noise.num_stages=5 (there 4), "
        "points=e12,e13h (there e12), trials=9 (there 3)"
    )
    assert sorted(re.split(r" but |, (?=\w)", after.history[0])) == sorted(re.split(r" but |, (?=\w)", words))
    write_sweep(after, [make_arm(after, "control"), make_arm(after, "e12")], {"control": [9], "e12": [10]})
    assert load_study_config(after.store, "b").derived == after.derived
    assert after.history[0] in report_lines(report_study(after))
    assert after.history[0] in page(read_material(after))
    assert sweep_line(sweep_row(after.store, "b")).endswith(", from a")


def test_a_space_of_ours_has_the_ranges_of_what_the_change_makes_of_it(tmp_path: Path) -> None:
    """A choice that the first sweep had fixed had taken its other ranges out."""
    given = {"workload": "tiny", "overrides": ["noise.modules=rmsnorm"]}
    begun(tmp_path, **given)
    after = changed(tmp_path, overrides=["noise.modules=linear"])
    fresh = study_config(SweepOptions(store=after.store, workload="tiny", overrides=["noise.modules=linear"]))
    assert after.space == fresh.space
    assert "searched: noise.sigma_start 0.002..0.02 (there noise.sigma_start 0.005..0.1)" in after.history[0]


def test_a_setting_that_the_change_leaves_without_a_use_is_taken_out_and_said(tmp_path: Path) -> None:
    begun(tmp_path, workload="tiny", overrides=["grpo.filter_groups=resample", "grpo.max_gen_batches=7"])
    after = changed(tmp_path, overrides=["grpo.filter_groups=off"])
    assert after.settings == {"grpo": {"filter_groups": "off"}}
    assert "without grpo.max_gen_batches=7, which has no use here" in after.history[0]
    with pytest.raises(ConfigError, match=r"--set grpo.max_gen_batches=8: does nothing here"):
        changed(tmp_path, overrides=["grpo.filter_groups=off", "grpo.max_gen_batches=8"])


def own_files(tmp_path: Path, sigma: float) -> dict[str, str]:
    space, point = tmp_path / "mine.yaml", tmp_path / "loud.yaml"
    tree = as_tree(SPACES["sigma"]) | {"name": "mine", "settings": {"grpo": {"clip_low": sigma}}}
    space.write_text(dump_yaml(tree))
    point.write_text(f"noise: {{sigma_start: {sigma}, sigma_end: {sigma}}}\n")
    return {"space": str(space), "points": str(point)}


def test_files_are_as_the_sweep_read_them_unless_they_are_given_again(tmp_path: Path) -> None:
    given = own_files(tmp_path, 0.03)
    before = begun(tmp_path, workload="tiny", **given)
    own_files(tmp_path, 0.04)
    again = changed(tmp_path, overrides=["grpo.steps=5"])
    assert (again.space, again.points) == (before.space, before.points)
    then, now = ({arm.name: flatten(as_tree(arm.config)) for arm in fixed_arms(one)} for one in (before, again))
    assert {name: now[name] | {"grpo.steps": then[name]["grpo.steps"]} for name in now} == then
    assert now["loud"]["noise.sigma_start"] == 0.03
    anew = changed(tmp_path, points=given["points"])
    assert {arm.name: arm.config.noise.sigma_start for arm in fixed_arms(anew)} == {"control": 0.0, "loud": 0.04}
    assert anew.history[0].endswith(f"but {given['points']} as it is now")
    for file in given.values():
        Path(file).unlink()
    assert fixed_arms(changed(tmp_path))[1].config.noise.sigma_start == 0.03


def test_of_a_sweep_of_an_earlier_version_nobody_guesses_what_its_files_held(tmp_path: Path) -> None:
    given = own_files(tmp_path, 0.03)
    before = begun(tmp_path, workload="tiny", overrides=["noise.modules=rmsnorm"], **given)
    save_study_config(before.model_copy(update={"given": None}))
    with pytest.raises(ConfigError, match=r"did not keep what .*loud\.yaml held; give its points again"):
        changed(tmp_path)
    with pytest.raises(ConfigError, match=r"name the space as well: rin sweep SPACE --from a"):
        changed(tmp_path, overrides=["noise.modules=linear"], points="")
    assert changed(tmp_path, points="").space == before.space


def test_what_the_program_has_changed_since_is_one_of_the_changes(tmp_path: Path) -> None:
    """In the workload, and in a point of the plan; each once."""
    before = begun(tmp_path, workload="tiny", points="e13m-rmsnorm")
    arms = fixed_arms(before)
    assert changed(tmp_path).history == ("the same as a without a change",)
    for number, arm in enumerate(arms):
        grpo = arm.config.grpo.model_copy(update={"steps": 77})
        noise = arm.config.noise.model_copy(update={"sigma_end": 0.002} if arm.origin == "point" else {})
        write_arm(before, number, replace(arm, config=arm.config.model_copy(update={"grpo": grpo, "noise": noise})))
    steps, now = base_tree(before)["grpo"]["steps"], "by this version of the program"
    assert changed(tmp_path).history == (
        f"the same as a but grpo.steps={steps} {now} (there 77), "
        f"e13m-rmsnorm: noise.sigma_end=0.0005 {now} (there 0.002)",
    )


def test_what_was_allocated_by_runs_stays_so_unless_both_numbers_are_given(tmp_path: Path) -> None:
    before = begun(tmp_path, workload="tiny", runs=12)
    assert changed(tmp_path).runs == before.runs == 12
    assert changed(tmp_path, runs=20).total == 20
    with pytest.raises(ConfigError, match=r"--trials 4: a has --runs 12, .*give --trials and --replicates, or --runs"):
        changed(tmp_path, trials=4)
    both = changed(tmp_path, trials=4, replicates=2)
    assert (both.trials, both.replicates, both.total) == (4, 2, None)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("confirm", "--from a: is a confirmation; give its sweep: --from p"),
        ("ablation", "--from a: is an ablation, .*give that sweep: --from p, or take it apart again: --ablate p"),
        ("program", "--from a: is a programme, .*rin program run --name NEW --set"),
    ],
)
def test_what_has_no_arms_of_its_own_choosing_is_no_source(kind: str, said: str, tmp_path: Path) -> None:
    save_study_config(study(tmp_path / "runs", name="a", kind=kind, parent="p"))
    with pytest.raises(ConfigError, match=said):
        changed(tmp_path)


@pytest.mark.parametrize("option", [*WHAT_RUNS, "confirm"])
def test_an_ablation_refuses_whatever_is_its_sweep_s_also_with_its_default(option: str) -> None:
    value = "a" if option == "source" else PLAIN[option][0]
    with pytest.raises(ConfigError, match="has no use with --ablate"):
        refuse_with_ablate(SweepOptions(**{option: value}))


def rewarded(config: StudyConfig) -> list[tuple[str, ...]]:
    return [arm.config.task.reward_sha256 for arm in fixed_arms(config)]


def test_a_reward_is_the_code_that_the_sweep_ran_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hash alone is asked for: a file that has changed is refused by it, one that is gone comes from the copies."""
    monkeypatch.setattr(rewards, "hashes", lambda task: (hashlib.sha256(path.read_bytes()).hexdigest(),))
    monkeypatch.setattr(code, "cache_folder", lambda: tmp_path / "cache")
    path = tmp_path / "reward.py"
    path.write_text("def f(row, completion): ...\n")
    before = begun(tmp_path, workload="tiny", overrides=[f"task.reward={path}:f"], points="e13i-baseline")
    rewards.keep_rewards(before, fixed_arms(before))
    path.write_text("def f(row, completion): pass\n")
    same = changed(tmp_path, overrides=["grpo.steps=5"])
    assert rewarded(same) == [arm.config.task.reward_sha256 for arm in read_arms(before)] != rewarded(before)
    drawn = RinSearch(same, fixed_arms(same))._with_rewards(fixed_arms(same)[0].config)
    assert drawn.task.reward_sha256 == rewarded(same)[0]
    path.unlink()
    rewards.bring_rewards(same, fixed_arms(same))
    there = code.at_hand(f"{path}:f", rewarded(same)[0][0]).removesuffix(":f")
    assert Path(there).read_text() == "def f(row, completion): ...\n"
    path.write_text("def f(row, completion): return 1\n")
    assert rewarded(changed(tmp_path, overrides=[f"task.reward={path}:f"])) == rewarded(before), "given again"


TEXTS = ("model.name=/m", "model.recipe=null", "task.name=gsm8k")


def test_rows_are_read_as_they_are_today_and_that_is_said(tmp_path: Path) -> None:
    rows = str(Path(__file__).parent / "data" / "gsm8k_small.jsonl")
    begun(tmp_path, workload="tiny", overrides=[*TEXTS, f"task.path={rows}"])
    assert changed(tmp_path).history[0].endswith(f"; rows as they were when this began, not as there: {rows}")


def test_a_plan_of_the_same_sweep_with_a_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(tmp_path, workload="tiny", trials=5)
    group: Any = typer.main.get_command(cli.app)
    group(["plan", "--from", "a", "--store", str(tmp_path / "runs"), "--replicates", "3"], standalone_mode=False)
    said = capsys.readouterr().out
    assert said.startswith("the same as a but replicates=3 (there 1)\n")
    assert "runs: 15 = 5 configurations x 3 replicates" in said

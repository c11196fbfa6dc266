"""From the options of `rin` to the study that runs, or to one line that says what is wrong."""

import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer

from dashboards import cli, sweep_cli
from dashboards.options import (
    COLLAPSES,
    NO_USE_IN_A_PLAN,
    Place,
    SweepOptions,
    numbers,
    ray_address,
    study_config,
    trial_config,
)
from search.ablation import ablation
from search.lineup import fixed_arms
from search.objectives import OBJECTIVES
from search.proposals import SEARCHERS
from search.replicates import AT_ONCE
from search.store import StudyConfig, default_tracking_uri, processes_of, ranks_of, save_study_config
from spaces.config import ConfigError
from spaces.library import SPACES
from spaces.points import POINTS
from spaces.reading import as_tree, dump_yaml
from spaces.workloads import WORKLOADS
from tests.written_sweeps import make_arm, study, write_sweep


def made(tmp_path: Path, **given: Any) -> StudyConfig:
    return study_config(SweepOptions(**{"store": str(tmp_path), **given}))


def test_without_options_it_is_the_default_sweep_in_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = study_config(SweepOptions())
    assert re.fullmatch(r"sigma-\d{8}-\d{6}", config.name)
    assert (config.space, config.workload, config.trials, config.replicates) == (SPACES["sigma"], "embedded", 8, 1)
    assert [arm.name for arm in fixed_arms(config)] == ["control", "control-resample", "e13i-baseline"]
    assert config.confirm_pairs == AT_ONCE
    assert (config.searcher, config.objectives) == ("gp", ("accuracy",))
    assert (config.store, config.tracking_uri) == (str(tmp_path / "runs"), default_tracking_uri(str(tmp_path / "runs")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "trials"),
    [
        ({"space": "schedule"}, 8),
        ({"workload": "tiny"}, 8),
        ({"trials": 2}, 2),
        ({"runs": 12}, 12),
        ({"overrides": ["grpo.steps=20"]}, 8),
        ({"evidence": "e13i-baseline"}, 8),
        ({"points": "control"}, 1),
    ],
)
def test_the_experiment_that_collapses_runs_where_nothing_was_asked_for(
    tmp_path: Path, given: dict[str, Any], trials: int
) -> None:
    """Among its eight configurations, with the control of its own; the searcher has five."""
    config = made(tmp_path, **given)
    assert "e13i-baseline" not in config.points
    assert config.trials == trials
    plain = made(tmp_path, seed=3, budget=2.0, replicates=2, confirm=False)
    assert (plain.points, plain.trials - len(fixed_arms(plain))) == ((COLLAPSES,), 5)
    assert POINTS[COLLAPSES].collapsed_at_step is not None


def test_a_sweep_is_confirmed_unless_it_is_told_not_to_be_and_an_ablation_never_is(tmp_path: Path) -> None:
    assert made(tmp_path, workload="tiny").confirm_pairs == AT_ONCE
    assert made(tmp_path, workload="tiny", confirm=False).confirm_pairs == 0
    config = study(tmp_path, trials=2)
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "c01")], {"control": [280], "c01": [300]})
    parts = ablation(config, made(tmp_path), named=False)
    assert (parts.config.confirm_pairs, parts.config.points) == (0, ())


def test_a_store_where_no_database_can_lie_wants_its_tracking_said(tmp_path: Path) -> None:
    config = made(tmp_path, store="s3://bucket/runs", tracking_uri="http://host:5000")
    assert (config.store, config.tracking_uri) == ("s3://bucket/runs", "http://host:5000")


def test_every_option_reaches_the_study(tmp_path: Path) -> None:
    given = {
        "space": "schedule",
        "workload": "tiny",
        "trials": 12,
        "replicates": 3,
        "concurrent": 2,
        "seed": 5,
        "overrides": ["noise.modules=linear", "eval.questions=16"],
        "points": "e12, e13h",
        "evidence": "e13i-baseline",
        "warm_start": "earlier",
        "searcher": "tpe",
        "objectives": ["accuracy", "collapses", "accuracy"],
        "confirm": False,
        "budget": 1.5,
        "cpus": 2,
        "gpus": 0.5,
        "name": "mine",
        "tracking_uri": "http://host:5000",
        "address": "HEAD:6379",
    }
    assert set(given) | {"store", "runs", "source"} == {field.name for field in fields(SweepOptions)}, (
        "a new option belongs into this test"
    )
    config = made(tmp_path, **given)
    assert (config.name, config.space.name, config.workload, config.trials, config.replicates) == (
        "mine",
        "schedule",
        "tiny",
        12,
        3,
    )
    assert (config.concurrent, config.seed, config.searcher) == (2, 5, "tpe")
    assert config.settings == {"noise": {"modules": "linear"}, "eval": {"questions": 16}}
    assert (config.points, config.evidence, config.warm_start) == (("e12", "e13h"), ("e13i-baseline",), "earlier")
    assert config.objectives == ("accuracy", "collapses")
    assert (config.total, config.runs) == (None, 36)
    assert (config.budget_hours, config.cpus, config.gpus) == (1.5, 2, 0.5)
    assert (config.tracking_uri, config.address) == ("http://host:5000", "HEAD:6379")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"space": "nothing"}, f"SPACE=nothing: unknown; choose one of {', '.join(SPACES)}, or give a YAML file"),
        ({"space": "missing.yaml"}, "missing.yaml"),
        ({"workload": "big"}, f"--workload big: unknown; choose one of {', '.join(WORKLOADS)}"),
        ({"name": "s-confirm"}, "--name s-confirm: the confirmation of a sweep s has that name; choose another"),
        ({"name": "s-confirm-c01"}, "--name s-confirm-c01: the confirmation of a sweep s has that name"),
        ({"runs": 9, "trials": 3}, "--trials 3: with --runs 9 the sweep decides how many configurations"),
        ({"runs": 9, "replicates": 1}, "--replicates 1: with --runs 9 the sweep decides how many configurations"),
        (
            {"runs": 2, "points": "e12"},
            "--runs 2: the control and the points are 3 (control, control-resample",
        ),
        ({"searcher": "magic"}, f"--searcher magic: unknown; choose one of {', '.join(SEARCHERS)}"),
        ({"objectives": ["fun"]}, f"--objective fun: unknown; choose one of {', '.join(OBJECTIVES)}"),
        ({"points": "e99"}, "--points e99: unknown point"),
        ({"name": "../up"}, "--name ../up: use letters"),
        ({"name": ".hidden"}, "--name .hidden: use letters"),
        ({"budget": 0.0}, "--budget 0: nothing could run"),
        ({"overrides": ["noise"]}, "--set noise: expected dotted.key=value"),
        ({"overrides": ["grpo.steps=3", "grpo.steps=4"]}, "--set grpo.steps=4: grpo.steps=3 is given, too; keep one"),
        ({"store": "s3://bucket/runs"}, "--store s3://bucket/runs: a database cannot lie there; give --tracking-uri"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option_and_what_is_allowed(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, **given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Asked(Exception):
    """What a command made of its options."""


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> SweepOptions:
    def ask(options: SweepOptions) -> StudyConfig:
        raise Asked(options)

    monkeypatch.setattr(sweep_cli, "study_config", ask)
    with pytest.raises(Asked) as caught:
        typer.main.get_command(cli.app)(list(words), standalone_mode=False)
    options: SweepOptions = caught.value.args[0]
    return options


def test_every_word_of_a_command_line_reaches_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, "sweep") == SweepOptions()
    assert asked(monkeypatch, "sweep", "--seed", "0", "--from", "a") == SweepOptions(seed=0, source="a")
    plan = ["schedule", "--workload", "tiny", "--trials", "12", "--replicates", "3", "--concurrent", "2", "--seed", "5"]
    plan += ["--set", "noise.modules=linear", "--set", "eval.questions=16", "--points", "e12,e13h", "--searcher", "tpe"]
    plan += ["--no-confirm", "--budget", "1.5", "--cpus", "2", "--gpus", "0.5", "--store", "there"]
    more = ["--evidence", "e13i-baseline", "--warm-start", "earlier", "--objective", "accuracy", "--objective", "hours"]
    more += ["--name", "mine", "--tracking-uri", "http://host:5000", "--address", "HEAD:6379"]
    planned = SweepOptions(
        space="schedule",
        workload="tiny",
        trials=12,
        replicates=3,
        concurrent=2,
        seed=5,
        overrides=["noise.modules=linear", "eval.questions=16"],
        points="e12,e13h",
        searcher="tpe",
        confirm=False,
        budget=1.5,
        cpus=2,
        gpus=0.5,
        store="there",
    )
    assert asked(monkeypatch, "sweep", *plan, *more) == replace(
        planned,
        evidence="e13i-baseline",
        warm_start="earlier",
        objectives=["accuracy", "hours"],
        name="mine",
        tracking_uri="http://host:5000",
        address="HEAD:6379",
    )
    assert asked(monkeypatch, "plan", *plan) == replace(planned, name="plan", tracking_uri="sqlite:///:memory:")


def test_a_plan_has_the_options_of_a_sweep_that_it_has_a_use_for() -> None:
    group: Any = typer.main.get_command(cli.app)
    sweep, plan = ({p.name: p for p in group.commands[name].params if p.name != "help"} for name in ("sweep", "plan"))
    assert set(sweep) == {field.name for field in fields(SweepOptions)} | {"ablate", "submit", "scheduler"}
    assert sweep["scheduler"].hidden, "it is there to be refused with the reason"
    assert plan.pop("device")  # of a GPU that is not here: its own
    assert set(plan) == {field.name for field in fields(SweepOptions)} - set(NO_USE_IN_A_PLAN)
    assert {name: plan[name].help for name in plan} == {name: sweep[name].help for name in plan}


def test_points_alone_say_how_many_configurations_there_are(tmp_path: Path) -> None:
    """The control, the control of the other filter policy, the point."""
    assert made(tmp_path, points="e13i-baseline").trials == 3
    assert made(tmp_path, points="e13i-baseline", trials=9).trials == 9


@pytest.mark.parametrize("space", SPACES)
def test_every_named_space_makes_a_study(space: str, tmp_path: Path) -> None:
    assert made(tmp_path, space=space).space == SPACES[space]


def test_a_file_of_the_user_s_is_a_space_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\ndescription: my own\ndimensions:\n- key: noise.sigma_start\n"
        "  domain: {kind: float, low: 0.001, high: 0.01}\n"
    )
    config = made(tmp_path / "store", space=str(file))
    assert (config.space.name, config.name.split("-")[0]) == ("mine", "mine")


def test_files_that_trials_read_are_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line from this folder, in a file from the file's folder: trials run in others."""
    (tmp_path / "here" / "weights").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = ["model.name=weights", "model.recipe=null", "task.name=gsm8k"]
    assert made(tmp_path, overrides=[*model, "task.path=q.jsonl"]).settings["task"]["path"] == str(
        tmp_path / "here" / "q.jsonl"
    )
    (tmp_path / "there" / "mine.yaml").write_text(
        "name: mine\ndescription: my own\nsettings: {model: {name: ../here/weights, recipe: null}, "
        "task: {name: gsm8k, path: q.jsonl}}\n"
        "dimensions:\n- {key: noise.sigma_start, domain: {kind: float, low: 0.001, high: 0.01}}\n"
    )
    (tmp_path / "there" / "longer.yaml").write_text("task: {path: longer.jsonl}\n")
    config = made(tmp_path, space="../there/mine.yaml", points="../there/longer.yaml")
    weights = f"{tmp_path}/here/weights"
    assert {arm.name: places(as_tree(arm.config)) for arm in fixed_arms(config)} == {
        "control": (weights, f"{tmp_path}/there/q.jsonl"),
        "control-2": (weights, f"{tmp_path}/there/longer.jsonl"),
        "longer": (weights, f"{tmp_path}/there/longer.jsonl"),
    }
    trial = trial_config(None, Path("../there/longer.yaml"), None, [*model])
    assert places(as_tree(trial)) == (weights, f"{tmp_path}/there/longer.jsonl")


def places(tree: Any) -> tuple[str, str]:
    """The model's and the data's, without the `..` that may be in them."""
    paths = tree["model"]["name"], *tree["task"]["path"]
    assert all(path.startswith("/") for path in paths)
    return os.path.normpath(paths[0]), os.path.normpath(paths[1])


def test_the_home_is_written_as_a_shell_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a comma or an equals sign no shell expands it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "space.yaml").write_text(dump_yaml(as_tree(SPACES["sigma"])))
    (tmp_path / "point.yaml").write_text("noise: {sigma_start: 0.02}\n")
    config = made(
        tmp_path, space="~/space.yaml", points="e12,~/point.yaml", store="~/runs", tracking_uri="sqlite:///~/m.db"
    )
    assert (config.store, config.tracking_uri) == (str(tmp_path / "runs"), f"sqlite:///{tmp_path}/m.db")
    assert "point" in [arm.name for arm in fixed_arms(config)]
    assert (
        trial_config("control", None, "tiny", ["model.name=~/m", "model.recipe=null", "task.name=gsm8k"]).model.name
        == f"{tmp_path}/m"
    )


# A sweep that is there


def test_a_sweep_is_found_with_its_tracking_where_it_now_is(tmp_path: Path) -> None:
    save_study_config(study(tmp_path, tracking_uri="http://old:5000"))
    assert Place(name="s", store=str(tmp_path)).sweep().tracking_uri == "http://old:5000"
    assert (
        Place(name="s", store=str(tmp_path), tracking_uri="http://new:5000").sweep().tracking_uri == "http://new:5000"
    )
    with pytest.raises(ConfigError, match=r"NAME=x: no sweep of that name in .*there are s"):
        Place(name="x", store=str(tmp_path)).sweep()


def test_a_relative_store_is_found_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_study_config(study(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    assert Place(name="s", store="runs").sweep().store == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("address", "before", "place"),
    [
        (None, None, None),
        (None, "HEAD:6379", "HEAD:6379"),
        ("local", "HEAD:6379", None),
        ("auto", "HEAD:6379", "auto"),
        ("auto", None, "auto"),
    ],
)
def test_it_goes_on_where_it_ran_before_unless_told_otherwise(
    address: str | None, before: str | None, place: str | None
) -> None:
    assert ray_address(address, before) == place


@pytest.mark.parametrize(
    ("store", "tracking_uri", "said"),
    [
        ("runs", None, ""),
        ("/data", None, " --store /data"),
        ("s3://b/r?scheme=http&endpoint_override=h:1", None, " --store 's3://b/r?scheme=http&endpoint_override=h:1'"),
        ("runs", "http://h:5000", " --tracking-uri http://h:5000"),
        ("/my store", "http://h:5000/?a=1&b=2", " --store '/my store' --tracking-uri 'http://h:5000/?a=1&b=2'"),
        ("/data", "http://h:5000", " --store /data --tracking-uri http://h:5000"),
    ],
)
def test_the_next_command_repeats_what_it_needs_and_a_shell_reads_it_right(
    store: str, tracking_uri: str | None, said: str
) -> None:
    assert Place(name="s", store=store, tracking_uri=tracking_uri).again == said
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n'{said}"], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert [word for word in words if "/" in word] == [
        word for word in (store if store != "runs" else None, tracking_uri) if word
    ]


@pytest.mark.parametrize(("text", "found"), [("5", (5,)), ("5,8,12", (5, 8, 12)), (" 5 , 8,", (5, 8))])
def test_numbers(text: str, found: tuple[int, ...]) -> None:
    assert numbers("--looks", text) == found


@pytest.mark.parametrize("text", ["five", "5;8", "5,8.5"])
def test_what_is_no_list_of_numbers_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"--looks {text}: give whole numbers separated by commas, for example 5,8,12")
    ):
        numbers("--looks", text)


# One trial


def test_a_trial_is_a_point_on_a_workload_or_a_file(tmp_path: Path) -> None:
    config = trial_config("e13m-rmsnorm", None, "tiny", ["eval.questions=16"])
    assert (config.eval.questions, config.noise.modules) == (16, ("rmsnorm",))
    assert config.grpo.steps == WORKLOADS["tiny"].settings["grpo"]["steps"]
    file = tmp_path / "t.yaml"
    file.write_text("seed: 5\n")
    assert trial_config(None, file, None, ["seed=6"]).seed == 6


@pytest.mark.parametrize(
    ("point", "config", "workload", "said"),
    [
        (None, None, None, "POINT or --config: give one of the two"),
        ("control", Path("x.yaml"), None, "POINT or --config: give one of the two"),
        (None, Path("x.yaml"), "tiny", "--workload tiny: has no use with --config"),
        ("e99", None, None, f"POINT=e99: unknown; choose one of {', '.join(POINTS)}"),
        ("control", None, "big", "--workload big: unknown"),
    ],
)
def test_a_trial_s_mistakes(point: str | None, config: Path | None, workload: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        trial_config(point, config, workload, [])


@pytest.mark.slow
def test_options_import_nothing_heavy() -> None:
    code = (
        "import sys, dashboards.options; "
        "print([m for m in ('torch', 'ray', 'mlflow', 'optuna', 'pydantic') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


EARLY = """
import sys, typer
from contextlib import redirect_stderr
from dashboards.cli import app
from spaces.errors import ConfigError

command = typer.main.get_command(app)
for words in open(sys.argv[1]).read().splitlines():
    try:
        with redirect_stderr(None):
            command(words.split(), standalone_mode=False)
        said = "nothing"
    except (ConfigError, typer._click.exceptions.UsageError) as error:
        said = str(error)
    print(said, [m for m in ("torch", "ray", "mlflow", "optuna", "numpy", "scipy", "pyarrow") if m in sys.modules])
"""
MISTAKES = {
    "sweep --set noise.sigma_strat=0.1": "config: unknown key noise.sigma_strat=0.1; did you mean noise.sigma_start?",
    "sweep --set noise.num_stages=2 --set noise.schedule=log": "--set noise.schedule=log: does nothing here",
    "sweep nowhere": "SPACE=nowhere: unknown",
    "sweep --workload big": "--workload big: unknown",
    "sweep --points e99": "--points e99: unknown point",
    "sweep --points missing.yaml": "missing.yaml: cannot be read",
    "sweep --points e12 --trials 1": "--trials 1: the control and the points are 3",
    "sweep --evidence e99": "--evidence e99: the plan recorded no collapse of it",
    "sweep --warm-start before": "NAME=before: no sweep of that name",
    "sweep --searcher magic": "--searcher magic: unknown",
    "sweep --objective fun": "--objective fun: unknown",
    "sweep --budget nan": "--budget nan: nothing could run",
    "sweep --gpus 2.5": "--gpus 2.5: a trial computes on whole GPUs",
    "sweep --gpus 2 --set parallel.ranks=3": "--gpus 2: parallel.ranks=3 takes a GPU for each",
    "sweep --gpus 0.5 --set parallel.ranks=2": "--gpus 0.5: parallel.ranks=2 takes a GPU for each",
    "sweep --name ../x": "--name ../x: use letters",
    "sweep --name there": "--name there: ",
    "sweep --store s3://b/r": "--store s3://b/r: a database cannot lie there",
    "sweep --ablate x": "NAME=x: no sweep of that name",
    "sweep --submit me:secret@head:8265": "--submit head:8265: give the address of the cluster's dashboard",
    "plan --searcher magic": "--searcher magic: unknown",
    "plan --gpus 1.5": "--gpus 1.5: a trial computes on whole GPUs",
    "resume --gpus 1.5": "--gpus 1.5: a trial computes on whole GPUs",
    "resume there --gpus 4": "--gpus 4: a trial of there has parallel.ranks=1, each of which computes on one GPU",
    "resume x": "NAME=x: no sweep of that name",
    "extend --trials 1": "NAME: say which sweep gets more",
    "extend x --trials 1": "NAME=x: no sweep of that name",
    "extend there": "--trials, --replicates: say how many more",
    "extend there --runs 1": "--runs 1: there has 8 configurations x 1 replicates",
    "sweep --from x": "NAME=x: no sweep of that name",
    "status x": "NAME=x: no sweep of that name",
    "report x": "NAME=x: no sweep of that name",
    "confirm --looks five": "--looks five: give whole numbers",
    "confirm --looks 8,5": "--looks 8,5: name growing numbers",
    "confirm --budget -1": "--budget -1: nothing could run",
    "confirm there --arm x": "--arm x: no such arm in there",
    "export --to paper": "--to paper: choose one of yaml",
    "export there --arm x": "--arm x: no such arm in there",
    "ui x": "NAME=x: no sweep of that name",
    "list --store /nowhere": "--store /nowhere: there is no such folder",
    "trial e99": "POINT=e99: unknown",
    "trial control --set seed=x": "control: seed=x",
    "probe nowhere": "MODEL=nowhere: unknown",
    "probe tiny --dtype float8": "--dtype float8: choose",
    "probe tiny --plot x.jpg": "--plot x.jpg: is drawn as PNG",
}


@pytest.mark.parametrize(
    ("given", "before", "ranks", "gpus"),
    [
        ({"gpus": 4.0}, None, 4, 4.0),
        ({"gpus": 0.5}, None, 1, 0.5),
        ({"overrides": ["parallel.ranks=2"]}, None, 2, None),
        ({"overrides": ["parallel.ranks=2"], "gpus": 2.0}, None, 2, 2.0),
        ({"overrides": ["parallel.ranks=2"], "gpus": 0.0}, None, 2, 0.0),
        ({}, {"gpus": 4.0}, 4, 4.0),
        ({"gpus": 2.0}, {"gpus": 4.0}, 2, 2.0),
        ({"overrides": ["parallel.ranks=1"], "gpus": 1.0}, {"gpus": 4.0}, 1, 1.0),
        ({"overrides": ["parallel.ranks=2"]}, {"gpus": 4.0}, "--set parallel.ranks=2: the sweep of --from", None),
        ({"gpus": 1.0}, {"gpus": 4.0}, "--gpus 1: parallel.ranks=4 takes a GPU for each", None),
    ],
)
def test_a_trial_has_as_many_ranks_as_gpus_in_every_arm(
    tmp_path: Path, given: dict[str, Any], before: dict[str, Any] | None, ranks: int | str, gpus: float | None
) -> None:
    if before is not None:
        earlier = made(tmp_path, name="before", **before)
        save_study_config(earlier)
        given = {**given, "source": "before"}
    if isinstance(ranks, str):
        with pytest.raises(ConfigError, match=re.escape(ranks)):
            made(tmp_path, **given)
        return
    config = made(tmp_path, **given)
    assert (ranks_of(config), config.gpus) == (ranks, gpus)
    assert {arm.config.parallel.ranks for arm in fixed_arms(config)} == {ranks}
    assert processes_of(config) == ranks


def test_all_trials_of_a_sweep_have_as_many_ranks(tmp_path: Path) -> None:
    point = tmp_path / "point.yaml"
    point.write_text("noise: {sigma_start: 0.01, sigma_end: 0.001}\nparallel: {ranks: 2}\n")
    with pytest.raises(
        ConfigError, match=r"parallel\.ranks=2: in a sweep all trials have as many, and the others have 1"
    ):
        made(tmp_path, points=str(point))


@pytest.mark.slow
def test_a_mistake_in_an_option_is_told_before_the_slow_imports(tmp_path: Path) -> None:
    save_study_config(study(tmp_path / "runs", name="there"))
    (tmp_path / "words").write_text("\n".join(MISTAKES))
    command = [sys.executable, "-c", EARLY, "words"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    told = dict(zip(MISTAKES, done.stdout.splitlines(), strict=True))
    assert {words: line for words, line in told.items() if not line.startswith(MISTAKES[words])} == {}
    assert {words: line for words, line in told.items() if not line.endswith(" []")} == {}


def test_commands_about_a_sweep_take_the_newest_without_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_study_config(study(tmp_path, name="zz"))
    save_study_config(study(tmp_path, name="aa"))
    os.utime(tmp_path / "zz" / "study.json", (1, 1))
    assert Place(store=str(tmp_path)).sweep().name == "aa"
    assert capsys.readouterr().err == f"aa, the newest in {tmp_path}:\n"
    group: Any = typer.main.get_command(cli.app)
    for command in ("status", "report", "confirm", "export", "ui"):
        (name,) = (p for p in group.commands[command].params if p.name == "name")
        assert not name.required, command
    with pytest.raises(
        ConfigError,
        match=r"NAME: say which sweep goes on: .* a wrong one would train for hours",
    ):
        group(["resume"], standalone_mode=False)


def test_a_list_of_nowhere_is_an_error(tmp_path: Path) -> None:
    group: Any = typer.main.get_command(cli.app)
    with pytest.raises(ConfigError, match=r"--store .*/nowhere: there is no such folder"):
        group(["list", "--store", str(tmp_path / "nowhere")], standalone_mode=False)

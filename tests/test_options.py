"""From the options of `rin` to the study that runs, or to one line that says what is wrong."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dashboards.options import (
    SweepOptions,
    find_sweep,
    numbers,
    ray_address,
    repeated,
    study_config,
    trial_config,
    with_absolute_paths,
)
from search.schedulers import SCHEDULERS
from search.searchers import OBJECTIVES, SEARCHERS
from search.store import StudyConfig, default_tracking_uri, save_study_config
from spaces.config import ConfigError
from spaces.library import SPACES
from spaces.points import POINTS
from spaces.workloads import WORKLOADS
from tests.written_sweeps import study


def made(tmp_path: Path, **given: Any) -> StudyConfig:
    return study_config(SweepOptions(**{"store": str(tmp_path), **given}))


def test_without_options_it_is_the_default_sweep_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = study_config(SweepOptions())
    assert re.fullmatch(r"sigma-\d{8}-\d{6}", config.name)
    assert (config.space, config.workload, config.trials, config.replicates) == (SPACES["sigma"], "embedded", 8, 1)
    assert (config.searcher, config.scheduler, config.objectives) == ("gp", "none", ("accuracy",))
    assert (config.store, config.tracking_uri) == (str(tmp_path / "runs"), default_tracking_uri(str(tmp_path / "runs")))
    assert list(tmp_path.iterdir()) == []


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
        "scheduler": "none",
        "budget": 1.5,
        "cpus": 2,
        "gpus": 0.5,
        "name": "mine",
        "tracking_uri": "http://host:5000",
        "address": "HEAD:6379",
    }
    assert set(given) | {"store"} == {field.name for field in fields(SweepOptions)}, "a new option belongs into this test"
    config = made(tmp_path, **given)
    assert (config.name, config.space.name, config.workload, config.trials, config.replicates) == ("mine", "schedule", "tiny", 12, 3)
    assert (config.concurrent, config.seed, config.searcher, config.scheduler) == (2, 5, "tpe", "none")
    assert config.settings == {"noise": {"modules": "linear"}, "eval": {"questions": 16}}
    assert (config.points, config.evidence, config.warm_start) == (("e12", "e13h"), ("e13i-baseline",), "earlier")
    assert config.objectives == ("accuracy", "collapses")
    assert (config.budget_hours, config.cpus, config.gpus) == (1.5, 2, 0.5)
    assert (config.tracking_uri, config.address) == ("http://host:5000", "HEAD:6379")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"space": "nothing"}, f"SPACE=nothing: unknown; choose one of {', '.join(SPACES)}, or give a YAML file"),
        ({"space": "missing.yaml"}, "missing.yaml"),
        ({"workload": "big"}, f"--workload big: unknown; choose one of {', '.join(WORKLOADS)}"),
        ({"searcher": "magic"}, f"--searcher magic: unknown; choose one of {', '.join(SEARCHERS)}"),
        ({"scheduler": "magic"}, f"--scheduler magic: unknown; choose one of {', '.join(SCHEDULERS)}"),
        ({"objectives": ["fun"]}, f"--objective fun: unknown; choose one of {', '.join(OBJECTIVES)}"),
        ({"points": "e99"}, "--points e99: unknown point"),
        ({"name": "../up"}, "--name ../up: use letters"),
        ({"name": ".hidden"}, "--name .hidden: use letters"),
        ({"budget": 0.0}, "--budget 0: nothing could run"),
        ({"overrides": ["noise"]}, "--set noise: expected dotted.key=value"),
        ({"store": "s3://bucket/runs"}, "--store s3://bucket/runs: a database cannot lie there; give --tracking-uri"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option_and_what_is_allowed(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, **given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


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
        "name: mine\ndescription: my own\ndimensions:\n- key: noise.sigma_start\n  domain: {kind: float, low: 0.001, high: 0.01}\n"
    )
    config = made(tmp_path / "store", space=str(file))
    assert (config.space.name, config.name.split("-")[0]) == ("mine", "mine")


def test_files_that_trials_read_are_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run in other folders; what is no file here (a name on a hub, the embedded model) stays as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "q.jsonl").write_text("")
    settings = with_absolute_paths({"model": {"name": "weights"}, "task": {"path": "q.jsonl"}, "eval": {"questions": 3}})
    assert settings == {"model": {"name": str(tmp_path / "weights")}, "task": {"path": str(tmp_path / "q.jsonl")}, "eval": {"questions": 3}}
    unchanged: dict[str, Any] = {"model": {"name": "embedded"}, "task": {"path": "missing.jsonl"}}
    assert with_absolute_paths(unchanged) == {"model": {"name": "embedded"}, "task": {"path": "missing.jsonl"}}
    assert with_absolute_paths({"model": 3}) == {"model": 3}, "a mistake that is told elsewhere"


# A sweep that is there


def test_a_sweep_is_found_with_its_tracking_where_it_now_is(tmp_path: Path) -> None:
    save_study_config(study(tmp_path, tracking_uri="http://old:5000"))
    assert find_sweep("s", str(tmp_path), None).tracking_uri == "http://old:5000"
    assert find_sweep("s", str(tmp_path), "http://new:5000").tracking_uri == "http://new:5000"
    with pytest.raises(ConfigError, match=r"NAME=x: no sweep of that name in .*there are s"):
        find_sweep("x", str(tmp_path), None)


def test_a_relative_store_is_found_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_study_config(study(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    assert find_sweep("s", "runs", None).store == str(tmp_path / "runs")


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
def test_it_goes_on_where_it_ran_before_unless_told_otherwise(address: str | None, before: str | None, place: str | None) -> None:
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
def test_the_next_command_repeats_what_it_needs_and_a_shell_reads_it_right(store: str, tracking_uri: str | None, said: str) -> None:
    assert repeated(store, tracking_uri) == said
    words = subprocess.run(["sh", "-c", f"printf '%s\\n'{said}"], capture_output=True, text=True, check=True).stdout.split("\n")
    assert [word for word in words if "/" in word] == [word for word in (store if store != "runs" else None, tracking_uri) if word]


@pytest.mark.parametrize(("text", "found"), [("5", (5,)), ("5,8,12", (5, 8, 12)), (" 5 , 8,", (5, 8))])
def test_numbers(text: str, found: tuple[int, ...]) -> None:
    assert numbers("--looks", text) == found


@pytest.mark.parametrize("text", ["five", "5;8", "5,8.5"])
def test_what_is_no_list_of_numbers_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--looks {text}: give whole numbers separated by commas, for example 5,8,12")):
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
    code = "import sys, dashboards.options; print([m for m in ('torch', 'ray', 'mlflow', 'optuna', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.slow
def test_a_mistake_in_the_settings_is_told_before_the_slow_imports() -> None:
    code = (
        "import sys\nfrom dashboards.options import SweepOptions, study_config\nfrom spaces.errors import ConfigError\n"
        "try:\n    study_config(SweepOptions(overrides=['noise.sigma_strat=0.1']))\n"
        "except ConfigError as error:\n    print(error, [m for m in ('torch', 'ray', 'mlflow', 'optuna') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "config: unknown key noise.sigma_strat=0.1; did you mean noise.sigma_start? []\n"

"""`rin` as its users meet it: real processes, exit codes, one-line errors."""

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from dashboards import cli
from dashboards.doctor import CHECKS, Check, examine
from search.arms import read_arms
from search.store import StudyConfig, load_study_config, save_study_config, sweeps
from spaces.config import TrialConfig
from spaces.reading import parse_yaml
from tests import processes
from tests.written_sweeps import make_arm, study, write_sweep
from trainable.failure import TrialFailed

RIN = Path(sys.executable).parent / "rin"


def rin(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(
        [str(RIN), *arguments], capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trial", "e99"], "POINT=e99: unknown; choose one of control"),
        (["sweep", "--workload", "tiny", "--tracking-uri", "http://u:secret@127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_remedy_and_exit_code_2(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    """Of the whole process: what libraries say while they are imported would be seen here."""
    done = rin(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert said in line
    assert "secret" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


COMMANDS = (
    "sweep",
    "extend",
    "resume",
    "trial",
    "plan",
    "list",
    "status",
    "watch",
    "report",
    "confirm",
    "export",
    "audit",
    "ui",
    "note",
    "delete",
    "restore",
    "probe",
    "srdd",
    "doctor",
)
Said = tuple[int, str, str]
"""Exit code, stdout, stderr."""


def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> Said:
    """`rin` in this process, for what needs no process of its own."""
    done = processes.rin(*arguments)
    return done.code, done.out, done.err


def test_the_commands_are_those_of_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group: Any = typer.main.get_command(cli.app)
    assert set(group.commands) == {*COMMANDS, "program"}
    _, out, _ = here(monkeypatch, capsys, "--help")
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_its_options(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = here(monkeypatch, capsys, command, "--help")
    assert code == 0
    assert "Usage:" in out
    group: Any = typer.main.get_command(cli.app)
    unexplained = [
        parameter.name
        for parameter in group.commands[command].params
        if not getattr(parameter, "help", "") and parameter.name != "help"
    ]
    assert unexplained == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trial"], "POINT or --config"),
        (["trial", "control", "--config", "x.yaml"], "POINT or --config"),
        (["trial", "--config", "missing.yaml"], "missing.yaml: cannot be read"),
        (
            ["trial", "control", "--set", "noise.sigma_strat=1"],
            "unknown key noise.sigma_strat=1; did you mean noise.sigma_start?",
        ),
        (
            ["trial", "control", "--set", "rollout.backend=trt"],
            "rollout.backend=trt: Input should be 'torch' or 'vllm'",
        ),
        (["trial", "control", "--set", "quant.weights"], "--set quant.weights: expected dotted.key=value"),
        (["trial", "control", "--workload", "big"], "--workload big: unknown"),
        (["sweep", "nothing"], "SPACE=nothing: unknown; choose one of sigma"),
        (["sweep", "--name", "../up"], "--name ../up: use letters"),
        (["sweep", "--searcher", "magic"], "--searcher magic: unknown"),
        (["sweep", "--points", "e99"], "--points e99: unknown point"),
        (["status", "nobody"], "NAME=nobody: no sweep of that name"),
        (["export", "nobody"], "NAME=nobody: no sweep of that name"),
        (["plan", "--trials", "1", "--points", "e12"], "--trials 1: the control and the points are 3"),
        (["resume", "nobody"], "NAME=nobody: no sweep of that name"),
        (["report", "nobody"], "NAME=nobody: no sweep of that name"),
        (["confirm", "nobody"], "NAME=nobody: no sweep of that name"),
        (["ui", "nobody"], "NAME=nobody: no sweep of that name"),
        (["report", "../up"], "--name ../up: use letters"),
        (["sweep", "--ablate", "nobody"], "NAME=nobody: no sweep of that name"),
        (["sweep", "--warm-start", "nobody", "--workload", "tiny"], "NAME=nobody: no sweep of that name"),
        (["sweep", "--evidence", "e99", "--workload", "tiny"], "--evidence e99"),
        (["sweep", "--scheduler", "asha"], "--scheduler asha: no trial is stopped because others lead"),
        (["sweep", "--scheduler", "none"], "leave it out"),
        (["sweep", "--objective", "fun"], "--objective fun: unknown"),
        (["sweep", "--budget", "0"], "--budget 0: nothing could run"),
        (["sweep", "--store", "s3://bucket/runs"], "a database cannot lie there; give --tracking-uri"),
        (["sweep", "--submit", "head:8265"], "--submit head:8265: give the address of the cluster's dashboard"),
        (["resume", "s", "--submit", "head:8265"], "--submit head:8265: give the address of the cluster's dashboard"),
    ],
)
def test_every_other_mistake_is_such_a_line_too(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = here(monkeypatch, capsys, *arguments)
    assert code == 2, err
    assert len(out.splitlines()) <= 2
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("rin: ")
    assert said in line
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_submitting_without_ray_s_job_client_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "aiohttp_cors" else find(name, *rest)
    )
    code, _, err = here(monkeypatch, capsys, "sweep", "--workload", "tiny", "--submit", "http://127.0.0.1:9")
    assert code == 2
    assert 'pip install "ray[default,tune]' in err
    assert len(err.splitlines()) == 1


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A sweep in ./runs, c01 ahead of the control, c02 collapsed once."""
    config = study(tmp_path / "runs", trials=3, replicates=3)
    arms = [make_arm(config, "control"), make_arm(config, "c01"), make_arm(config, "c02")]
    write_sweep(
        config, arms, {"control": [280, 285, 283], "c01": [330, 336, 332], "c02": [300, ("collapsed", 50), None]}
    )
    monkeypatch.chdir(tmp_path)
    return config


def test_report_prints_every_arm_and_what_to_do_next(
    swept: StudyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = here(monkeypatch, capsys, "report", "s")
    assert code == 0
    for said in (
        "control",
        "c01 (candidate)",
        "ahead",
        "1: filter_rejection",
        "undecided: c02",
        "rin confirm s",
        "rin resume s",
    ):
        assert said in out
    assert not re.search("better|worse", out.replace("Only rin confirm says better or worse.", ""), re.IGNORECASE)


def test_report_as_json_is_strict_json_and_nothing_else(
    swept: StudyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = here(monkeypatch, capsys, "report", "s", "--json")
    tree = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (code, [arm["arm"] for arm in tree["arms"]], tree["candidate"]) == (0, ["control", "c01", "c02"], "c01")


def test_report_needs_no_tracking(
    swept: StudyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(monkeypatch, capsys, "report", "s")[0] == 0
    assert not (swept.folder.local or Path()).parent.joinpath("mlflow.db").exists()


def test_a_store_with_a_sweep_of_another_version_still_shows_the_others(
    swept: StudyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (swept.folder.local or Path()).parent.joinpath("old").mkdir()
    (swept.folder.local or Path()).parent.joinpath("old", "study.json").write_text('{"version": 1}')
    code, out, _ = here(monkeypatch, capsys, "list")
    assert code == 0
    assert re.search(r"^old .*written by version 1", out, re.MULTILINE)
    assert re.search("^s .*tiny", out, re.MULTILINE)
    assert here(monkeypatch, capsys, "report", "old")[0] == 2


def test_a_confirmation_is_gone_on_with_by_confirm(
    swept: StudyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_study_config(swept.model_copy(update={"name": "s-confirm", "kind": "confirm", "parent": "s"}))
    code, _, err = here(monkeypatch, capsys, "resume", "s-confirm")
    assert (code, err) == (2, "rin: NAME=s-confirm: is a confirmation; go on with it by: rin confirm s\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--looks", "5;8"], "--looks 5;8: give whole numbers separated by commas"),
        (["--looks", "2,5"], "looks 2,5: name growing numbers of replicates from 3 on"),
        (["--arm", "c09"], "--arm c09: no such arm in s; it has c01, c02"),
    ],
)
def test_a_confirmation_s_mistakes_are_told_before_anything_runs(
    arguments: list[str],
    said: str,
    swept: StudyConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = here(monkeypatch, capsys, "confirm", "s", *arguments)
    assert code == 2
    assert said in err
    assert sweeps(swept.store) == ["s"]


def test_a_reward_whose_process_dies_is_one_line_wherever_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rin doctor --task` and the look ahead of a sweep once showed a traceback."""
    import dashboards.task_text

    def dies(name: str, overrides: list[str]) -> None:
        raise TrialFailed("reward", "the process of r.py:f died")

    monkeypatch.setattr(dashboards.task_text, "examine_task", dies)
    code, _, err = here(monkeypatch, capsys, "doctor", "--task", "python")
    assert (code, err) == (1, "rin: failed: reward: the process of r.py:f died\n")


def test_a_full_disk_is_told_as_such(
    swept: StudyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import search.report

    def full(config: StudyConfig) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/runs/s/arms/0003.json")
        except OSError as error:
            raise RuntimeError("what Tune says about it") from error

    monkeypatch.setattr(search.report, "report_study", full)
    code, _, err = here(monkeypatch, capsys, "report", "s")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "no space left for /data/runs/s/arms/0003.json" in err


def test_an_interruption_before_the_first_trial_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While Ray starts; click would end with an empty line."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("search.study.run_study", interrupted)
    ended = processes.rin("sweep", "--workload", "tiny", cwd=tmp_path)
    said = "interrupted before its first trial; the same command begins again\n"
    assert (ended.code, ended.err) == (1, said)


def test_a_bug_is_not_hidden(
    swept: StudyConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import search.report

    def broken(config: StudyConfig) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(search.report, "report_study", broken)
    with pytest.raises(ZeroDivisionError):
        here(monkeypatch, capsys, "report", "s")


@pytest.mark.slow
def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; import dashboards.cli; "
        "print([m for m in ('torch', 'ray', 'mlflow', 'transformers', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert rin("--help").returncode == 0


@pytest.mark.slow
def test_trial_prints_one_object_per_step_and_the_outcome_last() -> None:
    done = rin("trial", "e13i-v3", "--workload", "tiny", "--json", "--set", "eval.questions=16")
    assert done.returncode == 0, done.stderr
    *steps, outcome = [json.loads(line) for line in done.stdout.splitlines()]
    assert [s["step"] for s in steps] == list(range(6))
    for step in steps:
        assert set(step) == {"step", "sigma", "signals", "verdict", "seconds"}
        assert set(step["verdict"]) == {"collapsed", "rule", "evidence"}
    assert {"outcome", "rule", "step", "eval", "receipt", "config", "seconds"} <= set(outcome)
    assert {"accuracy", "accuracy_bf16", "accuracy_start", "n", "correct"} <= set(outcome["eval"])
    assert outcome["eval"]["n"] == len(outcome["eval"]["correct"]) == 16
    assert {"quantized", "noised"} <= set(outcome["receipt"])
    TrialConfig.model_validate(outcome["config"])


def test_trial_in_words_says_how_it_ended_and_what_was_touched() -> None:
    done = processes.rin("trial", "e13i-v3", "--workload", "tiny", "--set", "eval.questions=16")
    assert done.code == 0, done.err
    assert "completed after 6 steps" in done.out
    assert "quantised 14 layers, noised 4 weights" in done.out


def test_plan_lists_what_would_run_and_trains_nothing(tmp_path: Path) -> None:
    done = processes.rin(
        "plan", "--points", "e13i-baseline,e13m-rmsnorm", "--trials", "6", "--replicates", "3", cwd=tmp_path
    )
    assert done.code == 0, done.err
    for said in (
        "control-resample",
        "e13i-baseline",
        "3 ",
        "runs: 18 = 6 configurations x 3 replicates",
        "trial-slot hours",
    ):
        assert said in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_new_user_s_walk(tmp_path: Path) -> None:
    """sweep -> list -> status -> export -> trial --config."""
    swept = rin(
        *("sweep", "--workload", "tiny", "--trials", "3", "--name", "first", "--no-confirm"),
        *("--set", "eval.questions=32"),
        cwd=tmp_path,
    )
    assert swept.returncode == 0, swept.stderr
    assert "candidate:" in swept.stdout
    assert "rin export first --to verl" in swept.stdout
    (listed,) = json.loads(processes.rin("list", "--json", cwd=tmp_path).out)
    assert (listed["name"], listed["runs"], listed["of"]) == ("first", 3, 3)
    rows = json.loads(processes.rin("status", "first", "--json", cwd=tmp_path).out)
    assert [row["arm"] for row in rows] == ["control", "c01", "c02"]
    exported = processes.rin("export", "first", "--output", "best.yaml", cwd=tmp_path)
    assert exported.code == 0, exported.err
    tree = parse_yaml((tmp_path / "best.yaml").read_text(), "best.yaml")
    assert TrialConfig.model_validate(tree).threads == 1
    repeated = processes.rin("trial", "--config", "best.yaml", "--json", cwd=tmp_path)
    outcome = json.loads(repeated.out.splitlines()[-1])
    arms = {arm.name: arm for arm in read_arms(load_study_config(str(tmp_path / "runs"), "first"))}
    candidate = next(row["arm"] for row in rows if row["candidate"])
    assert outcome["eval"]["correct"] == list(arms[candidate].results[0].eval.correct)
    verl = processes.rin("export", "first", "--to", "verl", cwd=tmp_path).out.splitlines()
    assert next(line for line in verl if not line.startswith("#")).startswith("trainer.noise_injection.enabled=")
    refused = processes.rin("export", "first", "--to", "toml", cwd=tmp_path)
    assert (refused.code, "choose one of yaml, verl" in refused.err) == (2, True)


def test_doctor_counts_the_cores_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashboards.doctor.os.cpu_count", lambda: 64)
    monkeypatch.setattr("dashboards.doctor.usable_cpus", lambda: 4)
    assert CHECKS["Python"]().detail.endswith(", 4 of 64 cores, by affinity or quota")
    monkeypatch.setattr("dashboards.doctor.usable_cpus", lambda: 64)
    assert CHECKS["Python"]().detail.endswith(", 64 cores")


@pytest.mark.slow
def test_doctor_tries_everything_and_reports_a_broken_part(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = examine()
    assert {checks[name].state for name in ("Python", "torch", "Ray", "MLflow")} == {"ok"}
    import dashboards.doctor as module

    def explode() -> Check:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(module.CHECKS, "torch add-ons", explode)
    broken = examine()["torch add-ons"]
    assert broken.state == "broken"
    assert "nms" in broken.detail
    assert broken.remedy

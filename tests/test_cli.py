"""`rin` as its users meet it: real processes, exit codes, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dashboards.doctor import Check, examine
from search.store import default_tracking_uri
from search.tracking import load_study
from spaces.config import TrialConfig
from spaces.reading import parse_yaml

RIN = Path(sys.executable).parent / "rin"


def rin(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run([str(RIN), *arguments], capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trial", "e99"], "POINT=e99: unknown; choose one of control"),
        (["trial"], "POINT or --config"),
        (["trial", "control", "--config", "x.yaml"], "POINT or --config"),
        (["trial", "--config", "missing.yaml"], "missing.yaml: cannot be read"),
        (["trial", "control", "--set", "noise.sigma_strat=1"], "unknown key noise.sigma_strat=1; did you mean noise.sigma_start?"),
        (["trial", "control", "--set", "rollout.backend=vllm"], "rollout.backend=vllm: Input should be 'torch'"),
        (["trial", "control", "--set", "quant.weights"], "--set quant.weights: expected dotted.key=value"),
        (["trial", "control", "--workload", "big"], "--workload big: unknown"),
        (["sweep", "nothing"], "SPACE=nothing: unknown; choose one of sigma"),
        (["sweep", "--name", "../up"], "--name ../up: use letters"),
        (["sweep", "--searcher", "magic"], "--searcher magic: unknown"),
        (["sweep", "--points", "e99"], "--points e99: unknown point"),
        (["sweep", "--workload", "tiny", "--tracking-uri", "http://u:secret@127.0.0.1:9"], "127.0.0.1:9"),
        (["status", "nobody"], "NAME=nobody: no sweep of that name"),
        (["export", "nobody"], "NAME=nobody: no sweep of that name"),
        (["plan", "--trials", "1", "--points", "e12"], "--trials 1: the control and the points are 3"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_remedy_and_exit_code_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = rin(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert said in lines[0]
    assert "secret" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; import dashboards.cli; print([m for m in ('torch', 'ray', 'mlflow', 'transformers', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert rin("--help").returncode == 0


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
    done = rin("trial", "e13i-v3", "--workload", "tiny", "--set", "eval.questions=16")
    assert done.returncode == 0, done.stderr
    assert "completed after 6 steps" in done.stdout
    assert "quantised 14 layers, noised 4 weights" in done.stdout


def test_plan_lists_what_would_run_and_trains_nothing(tmp_path: Path) -> None:
    done = rin("plan", "--points", "e13i-baseline,e13m-rmsnorm", "--trials", "6", "--replicates", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("control-resample", "e13i-baseline", "3 ", "runs: 18 = 6 configurations x 3 replicates", "trial-slot hours"):
        assert said in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_new_user_s_walk(tmp_path: Path) -> None:
    """sweep -> list -> status -> export -> trial --config."""
    swept = rin("sweep", "--workload", "tiny", "--trials", "3", "--name", "first", "--set", "eval.questions=32", cwd=tmp_path)
    assert swept.returncode == 0, swept.stderr
    assert "candidate:" in swept.stdout
    assert "rin export first --to verl" in swept.stdout
    (listed,) = json.loads(rin("list", "--json", cwd=tmp_path).stdout)
    assert (listed["name"], listed["runs"], listed["of"]) == ("first", 3, 3)
    rows = json.loads(rin("status", "first", "--json", cwd=tmp_path).stdout)
    assert [row["arm"] for row in rows] == ["control", "c01", "c02"]
    exported = rin("export", "first", "--output", "best.yaml", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    tree = parse_yaml((tmp_path / "best.yaml").read_text(), "best.yaml")
    assert TrialConfig.model_validate(tree).threads == 1
    repeated = rin("trial", "--config", "best.yaml", "--json", cwd=tmp_path)
    outcome = json.loads(repeated.stdout.splitlines()[-1])
    records = load_study(default_tracking_uri(str(tmp_path / "runs")), "first")
    assert any(r.metrics["eval/accuracy"] == outcome["eval"]["accuracy"] for r in records)
    assert rin("export", "first", "--to", "verl", cwd=tmp_path).stdout.startswith("++trainer.noise_injection.enabled=")
    refused = rin("export", "first", "--to", "toml", cwd=tmp_path)
    assert (refused.returncode, "choose one of yaml, verl" in refused.stderr) == (2, True)


def test_doctor_tries_everything_and_reports_a_broken_part(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {check.name: check for check in examine()}
    assert {checks[name].state for name in ("Python", "torch", "Ray", "MLflow")} == {"ok"}
    import dashboards.doctor as module

    def explode() -> Check:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(module.CHECKS, "torch add-ons", explode)
    broken = {check.name: check for check in examine()}["torch add-ons"]
    assert broken.state == "broken"
    assert "nms" in broken.detail
    assert broken.remedy

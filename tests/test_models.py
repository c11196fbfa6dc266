"""Every architecture of `tests/zoo.py` trains in W4A4 with noise, or is refused in one line before step 0.

`make test` tries a few that differ most from one another, CI all of them.
"""

import os
import re
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

import trainable.trial
from spaces.config import ConfigError, ModelConfig, Module, NoiseConfig, QuantConfig
from tests.benchmarks.models import PAGE, on_vllm
from tests.conftest import byte_tokenizer
from tests.zoo import ZOO, network_of, trial_of
from trainable.forward.logps import packs
from trainable.noise import injected, noise_targets
from trainable.policy.loading import load_policy
from trainable.policy.policy import block_of
from trainable.trial import Trial

pytestmark = pytest.mark.slow  # many seconds of computing

FEW = (
    *("cohere", "cohere2", "deepseek_v3", "dots1", "falcon_h1", "gemma2", "gemma2_eager", "gemma3_mm", "glm4", "gpt2"),
    *("gpt_oss", "jetmoe", "lfm2", "mamba", "mistral_sliding", "mixtral", "nanochat", "olmo2", "phi3_longrope"),
    *("qwen2", "qwen2_h80", "qwen3_moe", "zamba2"),
)
TRIED = list(ZOO) if os.environ.get("CI") else FEW
EXACT = 1e-4


@pytest.mark.parametrize("name", TRIED)
def test_an_architecture_trains_or_is_refused_in_one_line(name: str) -> None:
    row = ZOO[name]
    network = network_of(row)
    if row.refused:
        with pytest.raises(ConfigError, match=row.refused) as error:
            trial_of(row, network)
        assert "\n" not in str(error.value)
        return
    for adapter in ("full", "lora"):
        trial = trial_of(row, network, adapter)
        assert max(trial.agreement.rows, trial.agreement.sampler) <= EXACT
        assert packs(trial.policy) == row.packs
        assert trial.agreement.lengths[-1] == 24
        check_targets(trial, row.norms)
        check_that_noise_leaves_nothing(trial)
        with patch.object(trainable.trial, "shaped_rewards", lambda *_: torch.tensor([[0.0, 1.0], [1.0, 0.0]])):
            trial.step()
        check_receipt(trial, network)


def check_targets(trial: Trial, norms: tuple[str, ...]) -> None:
    """Each kind of norm that it has is a word of noise.modules, each other word an error that says what is there."""
    for word in get_args(Module):
        noise = NoiseConfig.model_validate({"modules": [word]})
        if word == "linear" or word in norms:
            assert {target.layer for target in noise_targets(trial.policy, noise)} <= set(range(trial.policy.depth))
        else:
            with pytest.raises(ConfigError, match=rf"^noise\.modules={word}: .*; the model has \d+ x .*; set noise"):
                noise_targets(trial.policy, noise)


def check_that_noise_leaves_nothing(trial: Trial) -> None:
    policy, ids = trial.policy, torch.arange(5, 25)[None]
    tensors = [*policy.model.parameters(), *policy.model.buffers()]
    before = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        clean = policy.model(input_ids=ids).logits
        with injected(policy, trial.config.noise, trial.targets, step=0, total_steps=1, seed=0):
            assert not torch.equal(policy.model(input_ids=ids).logits, clean)
        assert torch.equal(policy.model(input_ids=ids).logits, clean)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    assert all(linear.deployed_weight is None for linear in policy.linears.values())


def check_receipt(trial: Trial, network: Any) -> None:
    receipt, coverage = trial.receipt(), trial.policy.coverage
    matrices = {
        name: parameter.numel()
        for name, parameter in network.named_parameters()
        if block_of(name) is not None and parameter.dim() >= 2 and not re.search(r"norm\.weight$|proj_bias", name)
    }
    assert coverage.weights == sum(matrices.values()) == coverage.quantized + coverage.excluded + coverage.left
    quantized = [name for name in receipt.quantized if block_of(name) is not None]
    assert coverage.quantized == sum(trial.policy.linears[name].weight.numel() for name in quantized)
    of_blocks = [name for name in trial.policy.linears if block_of(name) is not None]
    assert list(receipt.adapted) == (of_blocks if trial.config.model.adapter == "lora" else [])
    assert [effect.name for effect in receipt.effects] == list(receipt.noised)
    assert {f"{name}.weight" for name in of_blocks} <= set(receipt.noised)
    assert all(effect.applied > 0 for effect in receipt.effects)
    assert receipt.moved["matrices"] > 0.1


@pytest.mark.parametrize("form", ["in pieces", "in 16 bits", "pytorch_model.bin"])
def test_a_folder_in_another_form_is_the_same_model(tmp_path: Path, form: str) -> None:
    network = network_of(ZOO["qwen3"])
    if form == "in 16 bits":
        network.bfloat16()
    network.save_pretrained(tmp_path, max_shard_size="60KB" if form == "in pieces" else "1GB")
    byte_tokenizer().save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) == (form == "in pieces")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=ids).logits
        if form == "pytorch_model.bin":
            torch.save(network.state_dict(), tmp_path / form)
            (tmp_path / "model.safetensors").unlink()
        found = load_policy(ModelConfig(name=str(tmp_path)), QuantConfig(weights="none", activations="none"), 0)
        torch.testing.assert_close(found.model(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_the_page_of_models_says_of_every_row_what_is_so() -> None:
    lines = PAGE.read_text(encoding="utf-8").split("|---|---|---|---|---|---|---|\n")[1].splitlines()
    for line, (name, row) in zip(lines, ZOO.items(), strict=True):
        label, trains, vllm, *_, targets = (cell.strip() for cell in line.strip("|").split(" |"))
        assert name.startswith(label)
        assert trains.startswith("**refused**" if row.refused else "yes")
        assert re.search(row.refused, trains)
        assert vllm == ("" if row.refused else on_vllm(name))
        assert {word for word in re.findall(r"[a-z_]+", targets.split("[")[0]) if word != "w"} == set(row.norms)


def test_the_few_are_of_the_zoo_and_differ() -> None:
    assert set(FEW) <= set(ZOO)
    assert {row.norms for row in ZOO.values()} == {ZOO[name].norms for name in FEW}
    assert {row.refused for row in ZOO.values()} - {ZOO[name].refused for name in FEW} == set()

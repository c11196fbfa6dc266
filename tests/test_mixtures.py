"""A mixture of experts goes the whole way, as Qwen3-MoE and Mixtral have them.

It is sampled from, trained for three steps with experts in 4 bits and noise on them, exported, and loaded by
transformers, which computes what was trained.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import trainable.trial
from spaces.config import ModelConfig
from tests.conftest import byte_tokenizer
from tests.test_export_checkpoint import Exported, run_and_export
from tests.zoo import SUMS, ZOO, network_of
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, deployed, unquantized

pytestmark = pytest.mark.slow  # many seconds of computing

LAYERS, EXPERTS = 2, 4


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(5, 29).view(2, 12)).logits
    return out


def trained_and_exported(kind: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exported:
    network_of(ZOO[kind]).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    better = torch.tensor([0.0, 1.0])  # of whatever a random model says
    monkeypatch.setattr(trainable.trial, "shaped_rewards", lambda groups, *_: better.repeat(len(groups), 1))
    settings = {
        "model": {"name": str(tmp_path / "base"), "recipe": None, "adapter": adapter},
        "task": {"name": "gsm8k", "path": str(SUMS), "prompt": "{question}=", "digits": 3},
        "grpo": {"steps": 3, "prompts": 4, "group_size": 2, "updates_per_step": 1, "learning_rate": 1e-3},
        "rollout": {"max_prompt_tokens": 18, "max_new_tokens": 6},
        "eval": {"questions": 4, "every": 0},
        "collapse": {"mode": "off"},
    }
    noise = ("noise.modules=[rmsnorm, linear]", "noise.num_stages=1", "noise.scale=rms", "noise.sigma_start=0.1")
    return run_and_export(tmp_path, *noise, settings=settings)


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_mixture_is_trained_exported_and_loaded_again(
    kind: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = trained_and_exported(kind, adapter, tmp_path, monkeypatch)
    outcome, policy = exported.outcome, exported.trial.policy
    experts = {
        f"model.layers.{layer}.mlp.experts.{part}.{expert}"
        for layer in range(LAYERS)
        for part in ("gate_up_proj", "down_proj")
        for expert in range(EXPERTS)
    }
    receipt = outcome.receipt
    assert (outcome.outcome, outcome.step) == ("completed", 3)
    assert experts <= set(receipt.quantized)
    assert receipt.coverage.quantized > 0.99 * receipt.coverage.weights
    assert {entry.name for entry in receipt.coverage.left_out} == {"model.layers.*.mlp.gate"}
    applied = {effect.name.removesuffix(".weight"): effect.applied_relative for effect in receipt.effects}
    assert all(0.05 < applied[name] < 0.2 for name in experts), "sigma is 0.1 of the weight"
    assert (experts <= set(receipt.adapted)) == (adapter == "lora")

    count = len(exported.right)
    assert f"answered {count} of {count} questions as the trial did" in exported.said[1]
    assert set(exported.layers["layers"]) == set(policy.linears)
    assert "lies otherwise in files than where it is quantised" in exported.readme
    found = AutoModelForCausalLM.from_pretrained(exported.folder)
    check_that_it_computes_what_was_trained(policy, exported, found)
    before = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "base").named_parameters())
    for name, parameter in found.named_parameters():
        if ".experts." in name:  # [E, .., ..]
            moved = (parameter != before[name]).flatten(1).any(1)
            assert moved.all(), f"{name}: every expert has had tokens, and learned"


def check_that_it_computes_what_was_trained(policy: Policy, exported: Exported, found: Any) -> None:
    """Unquantised by transformers itself; in 4 bits by us (but adapters are quantised with their base now)."""
    with unquantized(policy):
        torch.testing.assert_close(logits(found), logits(policy.model), rtol=1e-3, atol=1e-3)
    if exported.config.model.adapter == "full":
        again = load_policy(ModelConfig(name=str(exported.folder)), exported.config.quant, 0)
        with deployed(policy), deployed(again):
            assert torch.equal(logits(again.model), logits(policy.model))

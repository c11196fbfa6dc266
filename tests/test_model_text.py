"""What `rin doctor --model` says of a model is what a trial does with it; its bytes are those of real tensors."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dashboards.model_text import examine_model, memory
from spaces.config import ConfigError, TrialConfig
from tests.conftest import ModelFolder, Tiny
from trainable.forward.head import LOGITS_AT_ONCE
from trainable.policy.loading import load_policy
from trainable.trial import Trial

SMALL = ("rollout.max_prompt_tokens=16", "rollout.max_new_tokens=8")


def said(model: str, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Lines by their first word."""
    found: dict[str, list[str]] = {}
    for line in examine_model(model, overrides):
        found.setdefault(line[:12].strip(), []).append(line[12:])
    return found


def test_the_parts_of_a_folder_s_model_are_counted(model_folder: ModelFolder) -> None:
    found = said(model_folder("llama", layers=2, tied=False), [*SMALL, "quant.skip_layers=[0]", "model.adapter=lora"])
    assert found["model"][0].startswith("LlamaForCausalLM: 2 blocks, ")
    assert found["model"][0].endswith("(LoRA beside 14 layers)")
    assert found["quantised"] == ["W4A4: 7 of 14 linear layers"]
    assert "50.0 % quantised, 50.0 % excluded by name, 0.0 % left out" in found[""][0]
    assert found["norms"] == ["4 x rmsnorm, gain w, pre_norm", "1 x rmsnorm, gain w, final"]
    assert found["noise"] == [
        "noise.modules=rmsnorm: 4 tensors, the first model.layers.0.input_layernorm.weight",
        "noise.modules=qk_norm: refused: blocks [0, 1] have no RMSNorm with a gain of queries or keys",
        "noise.modules=post_norm: refused: blocks [0, 1] have no RMSNorm with a gain behind attention or MLP",
        "noise.modules=linear: 14 tensors, the first model.layers.0.self_attn.q_proj.weight",
    ]
    assert len(found["forward"]) == 3
    assert found["vLLM"] == ["serves: a small llama passed the gate with vLLM 0.32.0 on a CPU"]
    assert all(float(line.split(": ")[1].split()[0]) < 1e-4 for line in found["forward"])


@pytest.mark.parametrize("overrides", [(), ("model.dtype=bfloat16",), ("model.adapter=lora", "model.dtype=bfloat16")])
def test_bytes_are_those_of_a_trial_s_tensors(overrides: tuple[str, ...], tiny: Tiny) -> None:
    config: TrialConfig = tiny(
        "eval.questions=8", "grpo.prompts=4", "grpo.steps=1", "grpo.learning_rate=1e-4", *overrides
    )
    trial = Trial(config)
    trial.step()
    sizes = memory(config, trial.policy)
    held = trial.optimizer.state_dict()["state"].values()
    state = sum(t.nbytes for one in held for name, t in one.items() if name in ("exp_avg", "exp_avg_sq", "master"))
    narrow = sum(1 for p in trial.policy.trainable().values() if p.dtype != torch.float32)
    assert sizes["AdamW's moments and masters in fp32"] == state
    assert (narrow > 0) == any("master" in one for one in held)
    assert sizes["weights"] == sum(p.nbytes for p in trial.policy.model.parameters())
    ids = torch.zeros(3, 5, dtype=torch.long)
    cache = trial.policy.network(input_ids=ids, use_cache=True).past_key_values
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / ids.numel()
    tokens = config.rollout.batch_size * (config.rollout.max_prompt_tokens + config.rollout.max_new_tokens)
    assert sizes["keys and values of a rollout, if all blocks attend to all tokens"] == per_token * tokens


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        (("grpo.micro_batch_size=8",), 8 * 100 * 1000),
        (("grpo.micro_batch_tokens=1200",), 3 * 2 * 100 * 1000),  # rows of 200 and twice 100, no logits of the prompts
        (("grpo.micro_batch_tokens=1200", "rollout.max_prompt_tokens=400"), 2 * 100 * 1000),
        (("grpo.micro_batch_tokens=100",), 2 * 100 * 1000),  # a row that is longer alone
        (("grpo.micro_batch_size=1000", "grpo.prompts=1000"), LOGITS_AT_ONCE),  # the head keeps no more of them alive
        (("grpo.micro_batch_size=1000", "grpo.prompts=1000", "quant.exclude=[]"), 1000 * 100 * 1000),  # a quantised one
    ],
)
def test_logits_are_those_of_completions_and_no_more_than_the_head_keeps(
    changes: tuple[str, ...], numbers: int, tiny: Tiny
) -> None:
    sizes = ("grpo.group_size=8", "rollout.max_prompt_tokens=200", "rollout.max_new_tokens=100")
    config = tiny(*sizes, *changes)
    policy = load_policy(config.model, config.quant, 0)
    policy.network.config.vocab_size = 1000
    assert memory(config, policy)["logits of a micro-batch in fp32"] == 4 * numbers


def test_a_model_that_a_trial_refuses_is_refused(tmp_path: Path, model_folder: ModelFolder) -> None:
    with pytest.raises(ConfigError, match=r"model\.name="):
        examine_model(str(tmp_path / "nowhere"), [])
    with pytest.raises(ConfigError, match=r"quant\.exclude"):
        examine_model(model_folder("llama", layers=2), [*SMALL, "quant.exclude=[nothing_like_this]"])


def test_an_own_model_gets_sizes_of_text_and_set_wins(model_folder: ModelFolder) -> None:
    """Rows as long as a trial's were compared."""
    lengths = [said(model_folder("llama", layers=2), given)[""][-1] for given in ((), SMALL)]
    assert "rows of up to 1024 tokens" in lengths[0]
    assert "rows of up to 24 tokens" in lengths[1]

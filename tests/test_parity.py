"""What trains and what samples is the model that transformers computes, or the trial does not start.

A zoo of tiny random models, two layers of hidden 64, with a window of 8 in rows of 24: each is equal, or refused in one
line. And errors that are put in: each is found.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import trainable.forward.logps
import trainable.parity
from spaces.config import ConfigError, ModelConfig, QuantConfig, RolloutConfig, TaskConfig, TrialConfig
from tests.conftest import Tiny, byte_tokenizer
from trainable.forward import decoder
from trainable.parity import LIMIT, Agreement, load_checked
from trainable.policy import loading
from trainable.policy.policy import Policy, bare_name
from trainable.trial import Trial

pytestmark = pytest.mark.slow  # many seconds of computing

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = WINDOW | {"query_pre_attn_scalar": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 64}
DEEPSEEK = {
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 64},
    **{"n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8},
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 8}
LINEAR = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **EXPERTS,
    "shared_expert_intermediate_size": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 16,
}
FALCON = {"head_dim": None, "alibi": False, "multi_query": True, "parallel_attn": True}

SIDE_BY_SIDE = "completions share rows"
ROWS = "completions have rows of their own"
EAGER = r"nats per token from transformers' own \(allowed 0\.001\); set model\.attention=eager"
SHORTER = r"keep rollout\.max_prompt_tokens \+ rollout\.max_new_tokens at 16 or below"
CACHE = r"generation from a cache is .* nats per token .*take another model"

ZOO: dict[str, tuple[str, dict[str, Any], str]] = {
    "apertus": ("apertus", {}, SIDE_BY_SIDE),
    "arcee": ("arcee", {}, SIDE_BY_SIDE),
    "bamba": ("bamba", MAMBA | {"attn_layer_indices": [1], "mamba_n_groups": 1}, ROWS),
    "bitnet": ("bitnet", {}, SIDE_BY_SIDE),
    "bloom": ("bloom", {"eager": True}, ROWS),
    "codegen": ("codegen", {"eager": True, "rotary_dim": 8}, SIDE_BY_SIDE),
    "cohere": ("cohere", {}, SIDE_BY_SIDE),
    "cohere2": ("cohere2", WINDOW, ROWS),
    "cwm": ("cwm", WINDOW, ROWS),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK, SIDE_BY_SIDE),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK, SIDE_BY_SIDE),
    "diffllama": ("diffllama", {}, SIDE_BY_SIDE),
    "dots1": ("dots1", DEEPSEEK | {"n_shared_experts": 1, "head_dim": 16}, SIDE_BY_SIDE),
    "ernie4_5": ("ernie4_5", {}, SIDE_BY_SIDE),
    "exaone4": ("exaone4", WINDOW | {"sliding_window_pattern": 2}, ROWS),
    "falcon_7b": ("falcon", FALCON, SIDE_BY_SIDE),
    "falcon_alibi": ("falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False}, ROWS),
    "falcon_h1": ("falcon_h1", MAMBA | {"mamba_d_ssm": 128}, ROWS),
    "falcon_mamba": ("falcon_mamba", {"eager": True, "state_size": 8}, ROWS),
    "gemma": ("gemma", {}, SIDE_BY_SIDE),
    "gemma2": ("gemma2", GEMMA, EAGER),
    "gemma2_eager": ("gemma2", GEMMA | {"eager": True}, ROWS),
    "gemma3_text": ("gemma3_text", GEMMA, ROWS),
    "glm": ("glm", {}, SIDE_BY_SIDE),
    "glm4": ("glm4", {}, SIDE_BY_SIDE),
    "gpt2": ("gpt2", {}, SIDE_BY_SIDE),
    "gpt_neo": ("gpt_neo", {"eager": True, "attention_types": [[["global", "local"], 1]], "window_size": 8}, ROWS),
    "gpt_neox": ("gpt_neox", {}, SIDE_BY_SIDE),
    "gpt_oss": ("gpt_oss", WINDOW | EXPERTS | {"eager": True}, ROWS),
    "gptj": ("gptj", {"eager": True, "rotary_dim": 8}, SIDE_BY_SIDE),
    "granite": ("granite", {}, SIDE_BY_SIDE),
    "granitemoe": ("granitemoe", EXPERTS, SIDE_BY_SIDE),
    "helium": ("helium", {}, SIDE_BY_SIDE),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}, SIDE_BY_SIDE),
    "jamba": (
        "jamba",
        EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        ROWS,
    ),
    "jetmoe": ("jetmoe", EXPERTS | {"kv_channels": 16}, SIDE_BY_SIDE),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}, ROWS),
    "llama": ("llama", {}, SIDE_BY_SIDE),
    "llama_dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
        SHORTER,
    ),
    "llama_longrope": ("llama", {"rope_parameters": LONGROPE}, SHORTER),
    "llama4_text": ("llama4_text", EXPERTS | {"intermediate_size_mlp": 128, "attention_chunk_size": 8}, ROWS),
    "mamba": ("mamba", {"eager": True, "state_size": 8}, ROWS),
    "ministral": ("ministral", WINDOW, ROWS),
    "mistral": ("mistral", {"sliding_window": None}, SIDE_BY_SIDE),
    "mistral_sliding": ("mistral", {"sliding_window": 8}, ROWS),
    "mixtral": ("mixtral", EXPERTS, SIDE_BY_SIDE),
    "mpt": ("mpt", {"eager": True}, ROWS),
    "nanochat": ("nanochat", {}, SIDE_BY_SIDE),
    "nemotron": ("nemotron", {}, SIDE_BY_SIDE),
    "olmo": ("olmo", {}, SIDE_BY_SIDE),
    "olmo2": ("olmo2", {}, SIDE_BY_SIDE),
    "olmo3": ("olmo3", WINDOW, ROWS),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 32}, SIDE_BY_SIDE),
    "persimmon": ("persimmon", {}, SIDE_BY_SIDE),
    "phi": ("phi", {}, SIDE_BY_SIDE),
    "phi3": ("phi3", {"sliding_window": None}, SIDE_BY_SIDE),
    "phi3_longrope": (
        "phi3",
        {"sliding_window": None, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
        SHORTER,
    ),
    "phi3_sliding": ("phi3", {"sliding_window": 8}, ROWS),
    "phimoe": ("phimoe", EXPERTS | {"sliding_window": None}, SIDE_BY_SIDE),
    "qwen2": ("qwen2", {}, SIDE_BY_SIDE),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64}, SIDE_BY_SIDE),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, ROWS),
    "qwen3": ("qwen3", {}, SIDE_BY_SIDE),
    "qwen3_moe": ("qwen3_moe", EXPERTS, SIDE_BY_SIDE),
    "qwen3_next": ("qwen3_next", LINEAR, ROWS),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"attention_window_size": 8, "lru_width": 64, "block_types": ["recurrent", "attention"]},
        CACHE,
    ),
    "smollm3": ("smollm3", {}, SIDE_BY_SIDE),
    "stablelm": ("stablelm", {"qk_layernorm": True}, SIDE_BY_SIDE),
    "starcoder2": ("starcoder2", {"sliding_window": 8}, ROWS),
    "vaultgemma": ("vaultgemma", GEMMA, EAGER),
}


def network_of(kind: str, settings: dict[str, Any], attention: str) -> Any:
    """A random model as if it had been loaded from a folder."""
    tree = {key: value for key, value in {**SIZES, **settings}.items() if key != "eager"}
    if tree.get("head_dim") is None:
        del tree["head_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **tree)
        network = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    network.generation_config.eos_token_id = [1]
    return network


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Policy, Agreement]]:
    """checked("mistral", {"sliding_window": 8}): loaded for a trial of at most 24 tokens, nothing quantised."""

    def load(kind: str, settings: dict[str, Any], change: Callable[[Any], object] = id, **model: Any) -> Any:
        attention = "eager" if settings.get("eager") else "sdpa"
        network = network_of(kind, settings, attention)
        change(network)
        monkeypatch.setattr(trainable.parity, "load_network", lambda *_: (network, byte_tokenizer()))
        return load_checked(
            TrialConfig(
                model=ModelConfig(name=kind, attention=attention, **model),
                quant=QuantConfig(weights="none", activations="none", exclude=()),
                rollout=RolloutConfig(max_prompt_tokens=18, max_new_tokens=6),
                task=TaskConfig(name="reasoning_gym:chain_sum"),
            )
        )

    return load


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_is_equal_or_refused_in_one_line(name: str, checked: Any) -> None:
    kind, settings, expected = ZOO[name]
    if expected in (SIDE_BY_SIDE, ROWS):
        policy, agreement = checked(kind, settings)
        assert max(agreement.rows, agreement.sampler) <= 1e-4
        assert policy.packs == (expected == SIDE_BY_SIDE)
        assert (agreement.packed > 100 * LIMIT) != policy.packs, "no doubt about it"
        assert agreement.lengths[-1] == 24
    else:
        with pytest.raises(ConfigError, match=expected) as error:
            checked(kind, settings)
        assert "\n" not in str(error.value)


# --- errors that are put in -------------------------------------------------------------------------------------------


def stretch_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainable.forward.logps.positions
    monkeypatch.setattr(trainable.forward.logps, "positions", lambda mask: 2 * real(mask))


def forget_to_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoder._Transformers.step

    def step(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        before = self.position
        logits = real(self, tokens)
        self.position = before
        return logits

    monkeypatch.setattr(decoder._Transformers, "step", step)


def lose_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoder._Transformers._forward
    monkeypatch.setattr(
        decoder._Transformers, "_forward", lambda self, ids, mask, at: real(self, ids, torch.ones_like(mask), at)
    )


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (stretch_positions, "training's forward is "),
        (forget_to_advance, "generation from a cache is "),
        (lose_padding, "generation from a cache is "),
    ],
)
def test_a_wrong_way_through_the_model_is_refused(
    checked: Any, monkeypatch: pytest.MonkeyPatch, breakage: Any, message: str
) -> None:
    breakage(monkeypatch)
    with pytest.raises(ConfigError, match=rf"model\.name=qwen3: {message}[\d.]+ nats per token from transformers' own"):
        checked("qwen3", {})


def test_our_own_packed_rows_must_agree(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are always packed."""
    real = trainable.forward.logps._mask_of_packed
    monkeypatch.setattr(
        trainable.forward.logps,
        "_mask_of_packed",
        lambda policy, real_tokens, tokens, together: real(policy, real_tokens, tokens * together, 1),
    )
    with pytest.raises(ConfigError, match="completions side by side is"):
        checked("qwen2", {})


class Signs(nn.Linear):
    """As in BitNet: weights of one bit and a scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


def use_signs(network: Any) -> None:
    old = network.model.layers[0].mlp.up_proj
    new = Signs(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    network.model.layers[0].mlp.up_proj = new


def test_a_linear_layer_that_computes_more_is_not_replaced(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, agreement = checked("qwen3", {}, use_signs)
    assert "model.layers.0.mlp.up_proj" not in policy.linears
    assert "model.layers.1.mlp.up_proj" in policy.linears
    assert agreement.rows < LIMIT
    monkeypatch.setattr(loading, "_is_linear", lambda module: isinstance(module, nn.Linear))
    with pytest.raises(ConfigError, match=r"training's forward is .* from transformers' own"):
        checked("qwen3", {}, use_signs)


def test_what_is_not_finite_is_refused(checked: Any) -> None:
    with pytest.raises(ConfigError, match="training's forward is inf nats"):
        checked("llama", {}, lambda network: network.model.norm.weight.data.fill_(float("nan")))


def test_a_window_is_crossed_while_tokens_are_generated_too(checked: Any) -> None:
    _, agreement = checked("mistral", {"sliding_window": 12})
    assert agreement.lengths == (12, 16, 24)


# --- what the check leaves behind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_nothing_changes_by_being_checked(checked: Any, dtype: str, adapter: str) -> None:
    """In bf16 too the comparison is in fp32; every bit and the random state come back."""
    before: dict[str, torch.Tensor] = {}

    def narrow(network: Any) -> None:
        network.to(getattr(torch, dtype))
        before.update({name: tensor.clone() for name, tensor in network.state_dict().items()})

    state = torch.get_rng_state()
    policy, agreement = checked("gemma3_text", GEMMA, narrow, adapter=adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert (agreement.dtype, agreement.limit) == ("float32", LIMIT)
    assert max(agreement.rows, agreement.sampler) < 1e-4
    after = {bare_name(name): tensor for name, tensor in policy.model.state_dict().items()}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)


# --- a trial ----------------------------------------------------------------------------------------------------------


def test_a_trial_says_how_far_it_is_from_transformers(tiny: Tiny) -> None:
    trial = Trial(tiny())
    found = trial.receipt().forward
    assert found == asdict(trial.agreement)
    assert max(found[way] for way in ("rows", "packed", "sampler")) < 1e-4
    assert found["lengths"] == (trial.config.rollout.max_prompt_tokens + trial.config.rollout.max_new_tokens,)


def test_a_trial_whose_forward_is_wrong_does_not_start(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    stretch_positions(monkeypatch)
    with pytest.raises(ConfigError, match="training's forward is"):
        Trial(tiny())

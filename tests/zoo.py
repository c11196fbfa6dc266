"""The architectures that were tried: tiny random models of two layers, each a row with what a trial says to it.

A row trains (W4A4, noise on every kind of norm that it has and on its linear layers, full and LoRA), or it is refused
in one line before step 0. `tests/test_models.py` tries every row, docs/models.md is made from them.
"""

import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

import trainable.parity
from spaces.config import TrialConfig
from spaces.reading import read_config
from tests.conftest import byte_tokenizer
from trainable.trial import Trial

SUMS = Path(__file__).parent / "data" / "short_sums.jsonl"
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
SHARED = {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
DEEPSEEK = {
    **SHARED,
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"num_key_value_heads": 4, "head_dim": 8},
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 8}
LINEAR = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
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
JAMBA = EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
DBRX = {
    **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
}
LLAMA4 = EXPERTS | {"intermediate_size_mlp": 128, "attention_chunk_size": 8}
GEMMA3N = {
    **WINDOW,
    **{"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 260, "num_kv_shared_layers": 0},
    **{"laurel_rank": 32, "activation_sparsity_pattern": [0.0, 0.0]},
}

EAGER = r"nats per token from transformers' own \(allowed 0\.001\); set model\.attention=eager"
SHORTER = r"keep rollout\.max_prompt_tokens \+ rollout\.max_new_tokens at 16 or below"
CACHE = r"generation from a cache is .* nats per token .*take another model"
BLOCKS = r"mxfp4 needs in_features that are a multiple of 32, but got \d+; name this layer in quant\.exclude"
REACH = r"W4A4 would leave out \d+ % of the blocks' weights, .*; name .* in quant\.exclude to train like that"

RMS, POST, QK = "rmsnorm", "post_norm", "qk_norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Example: Row(kind="mistral", settings={"sliding_window": 8}, norms=("rmsnorm",), packs=False)"""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    """Words of `noise.modules` that it has RMSNorms for."""
    packs: bool = True
    """Completions share a row with their prompt."""
    attention: str = "sdpa"
    exclude: tuple[str, ...] = ("lm_head",)
    refused: str = ""
    """What the one line says; empty: it trains."""


ZOO: dict[str, Row] = {
    "apertus": Row(kind="apertus", norms=(RMS, QK)),
    "arcee": Row(kind="arcee", norms=(RMS,)),
    "bamba": Row(
        kind="bamba", settings=MAMBA | {"attn_layer_indices": [1], "mamba_n_groups": 1}, norms=(RMS,), packs=False
    ),
    "bitnet": Row(kind="bitnet", norms=(RMS,)),
    "bloom": Row(kind="bloom", attention="eager", packs=False),
    "codegen": Row(kind="codegen", settings={"rotary_dim": 8}, attention="eager"),
    "cohere": Row(kind="cohere", settings={"use_qk_norm": True}),
    "cohere2": Row(kind="cohere2", settings=WINDOW, packs=False),
    "cwm": Row(kind="cwm", settings=WINDOW, norms=(RMS,), packs=False),
    "dbrx": Row(kind="dbrx", settings=DBRX, refused=REACH),
    "dbrx_excluded": Row(kind="dbrx", settings=DBRX, exclude=("lm_head", "experts.mlp.*")),
    "deepseek_v2": Row(kind="deepseek_v2", settings=DEEPSEEK, norms=(RMS,)),
    "deepseek_v3": Row(kind="deepseek_v3", settings=DEEPSEEK, norms=(RMS,)),
    "diffllama": Row(kind="diffllama", norms=(RMS,)),
    "dots1": Row(kind="dots1", settings=SHARED | {"n_shared_experts": 1}, norms=(RMS, QK)),
    "ernie4_5": Row(kind="ernie4_5", norms=(RMS,)),
    "ernie4_5_moe": Row(kind="ernie4_5_moe", settings={**EXPERTS, "moe_num_experts": 4, "moe_k": 2}, norms=(RMS,)),
    "exaone4": Row(kind="exaone4", settings=WINDOW | {"sliding_window_pattern": 2}, norms=(POST, QK), packs=False),
    "falcon_7b": Row(kind="falcon", settings=FALCON),
    "falcon_alibi": Row(
        kind="falcon", settings=FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False}, packs=False
    ),
    "falcon_h1": Row(kind="falcon_h1", settings=MAMBA | {"mamba_d_ssm": 128}, norms=(RMS,), packs=False),
    "falcon_mamba": Row(
        kind="falcon_mamba",
        settings={"state_size": 8, "time_step_rank": 32},
        norms=(RMS,),
        attention="eager",
        packs=False,
    ),
    "falcon_new": Row(
        kind="falcon", settings=FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}
    ),
    "gemma": Row(kind="gemma", norms=(RMS,)),
    "gemma2": Row(kind="gemma2", settings=GEMMA, refused=EAGER),
    "gemma2_eager": Row(kind="gemma2", settings=GEMMA, norms=(RMS, POST), packs=False, attention="eager"),
    "gemma3_mm": Row(kind="gemma3", norms=(RMS, POST, QK)),
    "gemma3_text": Row(kind="gemma3_text", settings=GEMMA, norms=(RMS, POST, QK), packs=False),
    "gemma3n_text": Row(kind="gemma3n_text", settings=GEMMA3N, refused=BLOCKS),
    "gemma3n_text_excluded": Row(
        kind="gemma3n_text",
        settings=GEMMA3N,
        norms=(RMS, POST, QK),
        packs=False,
        exclude=("lm_head", "altup.*"),
    ),
    "gemma4_text": Row(
        kind="gemma4_text",
        settings=WINDOW | {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 260},
        norms=(RMS, POST, QK),
        packs=False,
    ),
    "glm": Row(kind="glm", norms=(RMS,)),
    "glm4": Row(kind="glm4", norms=(RMS, POST)),
    "glm4_moe": Row(kind="glm4_moe", settings=SHARED | {"use_qk_norm": True}, norms=(RMS, QK)),
    "gpt2": Row(kind="gpt2"),
    "gpt_bigcode": Row(kind="gpt_bigcode"),
    "gpt_neo": Row(
        kind="gpt_neo",
        settings={"attention_types": [[["global", "local"], 1]], "window_size": 8},
        attention="eager",
        packs=False,
    ),
    "gpt_neox": Row(kind="gpt_neox"),
    "gpt_oss": Row(kind="gpt_oss", settings=WINDOW | EXPERTS, norms=(RMS,), attention="eager", packs=False),
    "gptj": Row(kind="gptj", settings={"rotary_dim": 8}, attention="eager"),
    "granite": Row(kind="granite", norms=(RMS,)),
    "granitemoe": Row(kind="granitemoe", settings=EXPERTS, norms=(RMS,)),
    "granitemoehybrid": Row(
        kind="granitemoehybrid",
        settings={**EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
        norms=(RMS,),
        packs=False,
    ),
    "helium": Row(kind="helium", norms=(RMS,)),
    "hunyuan_v1_dense": Row(kind="hunyuan_v1_dense", norms=(RMS, QK)),
    "hunyuan_v1_moe": Row(kind="hunyuan_v1_moe", settings=EXPERTS | {"moe_topk": 2}, norms=(RMS, QK)),
    "jamba": Row(kind="jamba", settings=JAMBA, refused=BLOCKS),
    "jamba_excluded": Row(
        kind="jamba", settings=JAMBA, norms=(RMS,), packs=False, exclude=("lm_head", "mamba.dt_proj")
    ),
    "jetmoe": Row(kind="jetmoe", settings=EXPERTS | {"kv_channels": 16}, refused=REACH),
    "jetmoe_excluded": Row(
        kind="jetmoe",
        settings=EXPERTS | {"kv_channels": 16},
        norms=(RMS,),
        exclude=("lm_head", "mlp.*", "self_attention.experts.*"),
    ),
    "lfm2": Row(
        kind="lfm2",
        settings={"layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
        norms=(RMS, QK),
        packs=False,
    ),
    "llama": Row(kind="llama", norms=(RMS,)),
    "llama_dynamic": Row(
        kind="llama", settings={"max_position_embeddings": 16, "rope_parameters": DYNAMIC}, refused=SHORTER
    ),
    "llama_longrope": Row(kind="llama", settings={"rope_parameters": LONGROPE}, refused=SHORTER),
    "llama4_text": Row(kind="llama4_text", settings=LLAMA4, refused=REACH),
    "llama4_text_excluded": Row(
        kind="llama4_text",
        settings=LLAMA4,
        norms=(RMS,),
        packs=False,
        exclude=("lm_head", "feed_forward.experts.*", "feed_forward.router"),
    ),
    "mamba": Row(
        kind="mamba", settings={"state_size": 8, "time_step_rank": 32}, norms=(RMS,), attention="eager", packs=False
    ),
    "mamba2": Row(
        kind="mamba2",
        settings={"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 8},
        norms=(RMS,),
        attention="eager",
        packs=False,
    ),
    "minimax_m2": Row(kind="minimax_m2", settings=EXPERTS, norms=(RMS, QK)),
    "ministral": Row(kind="ministral", settings=WINDOW, norms=(RMS,), packs=False),
    "ministral3": Row(kind="ministral3", norms=(RMS,)),
    "mistral": Row(kind="mistral", settings={"sliding_window": None}, norms=(RMS,)),
    "mistral_sliding": Row(kind="mistral", settings={"sliding_window": 8}, norms=(RMS,), packs=False),
    "mixtral": Row(kind="mixtral", settings=EXPERTS, norms=(RMS,)),
    "mpt": Row(kind="mpt", attention="eager", packs=False),
    "nanochat": Row(kind="nanochat"),
    "nemotron": Row(kind="nemotron"),
    "olmo": Row(kind="olmo"),
    "olmo2": Row(kind="olmo2", norms=(POST, QK)),
    "olmo3": Row(kind="olmo3", settings=WINDOW, norms=(POST, QK), packs=False),
    "olmoe": Row(kind="olmoe", settings=EXPERTS, norms=(RMS, QK)),
    "opt": Row(kind="opt", settings={"ffn_dim": 128}),
    "opt_proj": Row(kind="opt", settings={"ffn_dim": 128, "word_embed_proj_dim": 32}),
    "persimmon": Row(kind="persimmon"),
    "phi": Row(kind="phi"),
    "phi3": Row(kind="phi3", settings={"sliding_window": None}, norms=(RMS,)),
    "phi3_longrope": Row(
        kind="phi3",
        settings={"sliding_window": None, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
        refused=SHORTER,
    ),
    "phi3_partial": Row(kind="phi3", settings={"sliding_window": None, "partial_rotary_factor": 0.5}, norms=(RMS,)),
    "phi3_sliding": Row(kind="phi3", settings={"sliding_window": 8}, norms=(RMS,), packs=False),
    "phimoe": Row(kind="phimoe", settings=EXPERTS | {"sliding_window": None}),
    "qwen2": Row(kind="qwen2", norms=(RMS,)),
    "qwen2_h80": Row(kind="qwen2", settings={"hidden_size": 80, "head_dim": None}, refused=BLOCKS),
    "qwen2_h96": Row(kind="qwen2", settings={"hidden_size": 96, "head_dim": None}, norms=(RMS,)),
    "qwen2_inter72": Row(kind="qwen2", settings={"intermediate_size": 72}, refused=BLOCKS),
    "qwen2_inter72_excluded": Row(
        kind="qwen2", settings={"intermediate_size": 72}, norms=(RMS,), exclude=("lm_head", "down_proj")
    ),
    "qwen2_moe": Row(kind="qwen2_moe", settings=EXPERTS | {"shared_expert_intermediate_size": 64}, norms=(RMS,)),
    "qwen2_sliding": Row(
        kind="qwen2",
        settings={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        norms=(RMS,),
        packs=False,
    ),
    "qwen3": Row(kind="qwen3", norms=(RMS, QK)),
    "qwen3_5_text": Row(kind="qwen3_5_text", settings=LINEAR, norms=(RMS, QK), packs=False),
    "qwen3_moe": Row(kind="qwen3_moe", settings=EXPERTS, norms=(RMS, QK)),
    "qwen3_next": Row(
        kind="qwen3_next",
        settings={**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 64},
        norms=(RMS, QK),
        packs=False,
    ),
    "qwen3_sliding": Row(
        kind="qwen3",
        settings={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        norms=(RMS, QK),
        packs=False,
    ),
    "recurrent_gemma": Row(
        kind="recurrent_gemma",
        settings={"attention_window_size": 8, "lru_width": 64, "block_types": ["recurrent", "attention"]},
        refused=CACHE,
    ),
    "seed_oss": Row(kind="seed_oss", norms=(RMS,)),
    "smollm3": Row(kind="smollm3", norms=(RMS,)),
    "stablelm": Row(kind="stablelm"),
    "stablelm_qk": Row(kind="stablelm", settings={"qk_layernorm": True}),
    "starcoder2": Row(kind="starcoder2", settings={"sliding_window": 8}, packs=False),
    "vaultgemma": Row(kind="vaultgemma", settings=GEMMA, refused=EAGER),
    "vaultgemma_eager": Row(kind="vaultgemma", settings=GEMMA, norms=(RMS,), packs=False, attention="eager"),
    "zamba2": Row(
        kind="zamba2",
        settings={
            **{"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 4, "mamba_d_state": 16},
            **{"chunk_size": 8, "num_mem_blocks": 1, "head_dim": None, "adapter_rank": 32},
        },
        refused=CACHE,
    ),
}


def network_of(row: Row) -> Any:
    """A random model as if it had been loaded from a folder."""
    tree = {key: value for key, value in {**SIZES, **row.settings}.items() if value is not None or key != "head_dim"}
    if row.kind == "gemma3":
        tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
        vision = {**tower, "image_size": 28, "patch_size": 14}
        config: Any = Gemma3Config(text_config=tree, vision_config=vision, mm_tokens_per_image=4)
    else:
        config = AutoConfig.for_model(row.kind, **tree)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, attn_implementation=row.attention).eval()
    network.generation_config.eos_token_id = [1]
    return network


def trial_of(row: Row, network: Any, adapter: str = "full", backend: str = "torch") -> Trial:
    """A trial on a copy of it: one step in W4A4, with noise wherever the row says that it can be, in rows of at most 24
    tokens. Raises ConfigError."""
    model = (copy.deepcopy(network), _tokenizer())
    with patch.object(trainable.parity, "load_network", lambda *_: model):
        return Trial(_config(row, adapter, backend))


_tokenizer = cache(byte_tokenizer)


def _config(row: Row, adapter: str, backend: str) -> TrialConfig:
    cache = {"kv_cache_gib": 0.1} if backend == "vllm" else {}
    return read_config(
        {
            "model": {"name": row.kind, "attention": row.attention, "adapter": adapter},
            "quant": {"exclude": row.exclude},
            "noise": {"modules": [*row.norms, "linear"], "num_stages": 1, "sigma_start": 0.05, "scale": "rms"},
            "grpo": {"steps": 1, "prompts": 2, "group_size": 2, "updates_per_step": 1, "learning_rate": 1e-3},
            "rollout": {"backend": backend, "max_prompt_tokens": 18, "max_new_tokens": 6, **cache},
            "eval": {"questions": 1, "every": 0},
            "task": {"name": "gsm8k", "path": str(SUMS), "prompt": "{question}="},
        }
    )

"""Other architectures, two random layers each: what is quantised, noised and adapted is told by what a part computes,
and every weight of the blocks is accounted for."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3Config, PretrainedConfig

import trainable.trial
from search.checkpoint_export import _only_here, _write_plain
from spaces.config import ConfigError, ModelConfig, NoiseConfig, QuantConfig
from spaces.reading import read_config
from tests.conftest import byte_tokenizer
from trainable.engines.backend import _check_served
from trainable.noise import effects_of, injected, noise_targets
from trainable.policy.embedded import character_tokenizer
from trainable.policy.loading import wrapped
from trainable.policy.policy import Policy, block_of, deployed
from trainable.quantization import fake_quantize
from trainable.trial import Trial

pytestmark = pytest.mark.slow  # many seconds of computing

W16A16 = QuantConfig(weights="none", activations="none")
W4A16 = QuantConfig(activations="none")

COMMON = {
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 64}
SIZES: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": True},
    "deepseek_v3": {**SHARED, **LATENT, "num_key_value_heads": 4},
    "gpt2": GPT,
    "gpt_oss": EXPERTS,
    "granitemoe": EXPERTS,
    "jamba": {
        **EXPERTS,
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    },
    "jetmoe": {**EXPERTS, "kv_channels": 16, "num_key_value_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {**EXPERTS, "intermediate_size_mlp": 96},
    "mixtral": EXPERTS,
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 2},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, "layer_types": ["full_attention"] * 2, "shared_expert_intermediate_size": 64},
}
BEFORE = ("input_layernorm", "post_attention_layernorm")
QK = ("self_attn.q_norm", "self_attn.k_norm")
POST = ("post_attention_layernorm", "post_feedforward_layernorm")
Names = tuple[str, ...]
RMS: dict[str, tuple[float, Names, Names, Names, int]] = {
    # what is added to the weight to make the gain; norms of a block by what noise.modules calls them: rmsnorm,
    # post_norm, qk_norm; and how many it has elsewhere
    "apertus": (0, ("attention_layernorm", "feedforward_layernorm"), (), QK, 0),
    "bitnet": (0, BEFORE, (), (), 2),
    "deepseek_v3": (0, BEFORE, (), (), 2),
    "exaone4": (0, (), POST, QK, 0),
    "gemma": (1, BEFORE, (), (), 0),
    "gemma2": (1, ("input_layernorm", "pre_feedforward_layernorm"), POST, (), 0),
    "gemma3_text": (1, ("input_layernorm", "pre_feedforward_layernorm"), POST, QK, 0),
    "glm4": (0, BEFORE, ("post_self_attn_layernorm", "post_mlp_layernorm"), (), 0),
    "gpt_oss": (0, BEFORE, (), (), 0),
    "granitemoe": (0, BEFORE, (), (), 0),
    "mixtral": (0, BEFORE, (), (), 0),
    "olmo2": (0, (), POST, QK, 0),
    "phi3": (0, BEFORE, (), (), 0),
    "qwen2_moe": (0, BEFORE, (), (), 0),
    "qwen3": (0, BEFORE, (), QK, 0),
    "qwen3_moe": (0, BEFORE, (), QK, 0),
    "qwen3_next": (1, BEFORE, (), QK, 0),
}
NO_RMS = {  # what a model has instead
    "cohere": "4 x layernorm, gain w, qk_norm",
    "gpt2": "4 x layernorm, gain w, pre_norm",
    "gpt_neox": "4 x layernorm, gain w, pre_norm",
    "mpt": "4 x layernorm, gain w, pre_norm",
    "nanochat": "4 x rmsnorm, no gain, pre_norm",
    "nemotron": "4 x layernorm, gain 1 + w, pre_norm",
    "olmo": "4 x layernorm, no gain, pre_norm",
    "phi": "2 x layernorm, gain w, pre_norm",
    "stablelm": "4 x layernorm, gain w, pre_norm",
    "starcoder2": "4 x layernorm, gain w, pre_norm",
}
MIXTURES = ("deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "qwen2_moe", "qwen3_moe")


def config_of(kind: str) -> PretrainedConfig:
    if kind != "gemma3":
        return CONFIG_MAPPING[kind](**{**COMMON, **SIZES.get(kind, {})})
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return Gemma3Config(
        text_config=COMMON, vision_config={**tower, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )


def network_of(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config_of(kind))
        for parameter in network.parameters():
            if parameter.dim() == 1:  # gains and biases of their own, so that none can pass for another
                parameter.data += 0.1 * torch.randn_like(parameter)
        network.generation_config.eos_token_id = [1]  # as a folder that was loaded has it
        return network.eval()


def load(kind: str, quant: QuantConfig | None = None, **model: Any) -> Policy:
    return wrapped(network_of(kind), character_tokenizer(), ModelConfig(name=kind, **model), quant or QuantConfig(), 0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(12).view(2, 6)).logits
    return out


# --- every weight is accounted for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted({*RMS, *NO_RMS, "lfm2"}))
def test_the_sums_make_up_all_matrices_of_the_blocks_and_nearly_all_are_quantised(kind: str) -> None:
    norms = {type(m) for n, m in network_of(kind).named_modules() if "norm" in n.split(".")[-1] or "ln_" in n}
    parts = [
        (n, m) for n, m in network_of(kind).named_modules() if type(m) not in norms and block_of(f"{n}.") is not None
    ]
    wanted = sum(
        p.numel() for _, m in parts for n, p in m.named_parameters(recurse=False) if p.dim() >= 2 and "bias" not in n
    )
    found = load(kind).coverage
    assert found.weights == wanted
    assert found.quantized + found.excluded + sum(entry.weights for entry in found.left_out) == wanted
    assert found.quantized > 0.98 * wanted
    assert all("Router" in entry.reason or entry.reason == "a convolution" for entry in found.left_out)


def test_what_is_named_is_counted_as_named() -> None:
    whole = load("mixtral").coverage
    assert [entry.name for entry in whole.left_out] == ["model.layers.*.mlp.gate"]
    found = load("mixtral", QuantConfig(exclude=("mlp.gate", "layers.0.mlp.experts.down_proj"))).coverage
    assert (found.left, found.excluded) == (0, whole.left + 4 * 64 * 96)
    skipped = load("mixtral", QuantConfig(skip_layers=(0,))).coverage
    assert skipped.excluded == whole.weights / 2
    nothing = load("mixtral", W16A16).coverage
    assert (nothing.quantized, nothing.left) == (0, whole.weights)
    assert nothing.left_out[0].reason == "nothing is quantised"


@pytest.mark.parametrize(
    ("kind", "share", "left"),
    [
        ("jetmoe", 92, ("mlp.input_linear", "self_attention.experts.output_linear")),
        ("llama4_text", 71, ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")),
    ],
)
def test_a_model_that_would_be_quantised_in_part_is_refused_until_the_rest_is_named(
    kind: str, share: int, left: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError, match=rf"W4A4 would leave out {share} % .*; name ") as error:
        load(kind)
    assert all(f"model.layers.*.{name}" in str(error.value) for name in left)
    said = str(error.value).split("; name ")[1].split(" in quant.exclude to")[0].split(", ")
    found = load(kind, QuantConfig(exclude=("lm_head", *said)))
    assert round(100 * found.coverage.excluded / found.coverage.weights) == share
    plain = load(kind, W16A16)
    assert noise_targets(plain, NoiseConfig()), "what means norms alone leaves nothing out"
    with pytest.raises(ConfigError, match=rf"noise\.modules=linear: would leave out {share} % "):
        noise_targets(plain, NoiseConfig(modules=("linear",)))
    named = load(kind, W16A16.model_copy(update={"exclude": ("lm_head", *said)}))
    assert noise_targets(named, NoiseConfig(modules=("linear",)))


def test_of_a_multimodal_model_the_text_model_alone_is_trained_and_the_rest_is_named() -> None:
    policy = load("gemma3", adapter="lora", lora_rank=4)
    assert all(name.startswith("model.language_model.layers.") for name in policy.linears)
    assert (len(policy.linears), policy.depth) == (14, 2)
    assert policy.adapted == tuple(policy.linears)
    assert {entry.reason for entry in policy.coverage.left_out} == {"not of the text model"}
    assert policy.coverage.quantized + policy.coverage.left == policy.coverage.weights
    assert {block_of(name) for name in policy.norms} == {0, 1}
    assert all("vision" not in name for name in load("gemma3").trainable())
    with pytest.raises(ConfigError, match=r"rollout\.backend=vllm: .*set rollout.backend=torch"):
        _check_served(policy)


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RMS)
def test_each_kind_of_norm_is_told_by_where_it_stands_and_gets_noise_by_its_word_alone(kind: str) -> None:
    offset, *names, elsewhere = RMS[kind]
    policy = load(kind)
    clean = logits(policy.model)
    for word, parts in zip(("rmsnorm", "post_norm", "qk_norm"), names, strict=True):
        noise = NoiseConfig.model_validate({"modules": [word], "num_stages": 1, "final_norm": True, "scale": "rms"})
        if not parts:
            with pytest.raises(
                ConfigError, match=rf"noise\.modules={word}: .* have no RMSNorm .*; set noise\.modules to"
            ):
                noise_targets(policy, noise)
            continue
        targets = noise_targets(policy, noise)
        of_blocks = [target for target in targets if target.layer is not None]
        assert sorted(target.name for target in of_blocks) == sorted(
            f"model.layers.{block}.{name}.weight" for block in (0, 1) for name in parts
        )
        assert len(targets) == len(of_blocks) + 1, "and the one before the head"
        with injected(policy, noise, targets, step=0, total_steps=2, seed=0, measured=True) as changes:
            effects = effects_of(noise, changes, step=0, total_steps=2)
        for target, effect in zip(targets, effects, strict=True):
            weight: Any = target.module.weight
            gain = (weight.detach() + offset).square().mean().sqrt().item()
            assert effect.nominal == pytest.approx(0.01 * gain, rel=1e-5), "scale=rms counts in the gain"
            assert effect.applied_relative == pytest.approx(0.01, rel=0.5)
        with injected(policy, noise, targets, step=0, total_steps=2, seed=0):
            assert not torch.equal(logits(policy.model), clean), "and the model computes with it"
    assert torch.equal(logits(policy.model), clean)
    assert sum(count for norm, count in policy.norm_kinds.items() if norm.endswith("inside")) == 2 * elsewhere


def test_in_a_hybrid_model_norms_of_queries_are_those_of_its_attention() -> None:
    """In lfm2 one of two blocks is a convolution; norms in jamba's state-space mixer stand before no scores."""
    policy = load("lfm2")
    assert {name for name, word in policy.norm_targets.items() if word == "qk_norm"} == {
        f"model.layers.1.self_attn.{part}_layernorm" for part in "qk"
    }
    assert len([word for word in policy.norm_targets.values() if word == "rmsnorm"]) == 4
    assert load("jamba", QuantConfig(exclude=("lm_head", "dt_proj"))).norm_kinds["rmsnorm, gain w, inside"] == 3


@pytest.mark.parametrize("kind", NO_RMS)
def test_rmsnorm_noise_on_a_model_without_one_is_an_error_that_says_what_is_there(kind: str) -> None:
    policy = load(kind)
    with pytest.raises(ConfigError, match=r"noise\.modules=rmsnorm: blocks \[0, 1\] have no RMSNorm") as error:
        noise_targets(policy, NoiseConfig())
    assert NO_RMS[kind] in str(error.value)
    linear = noise_targets(policy, NoiseConfig(modules=("linear",)))
    assert {block_of(target.name) for target in linear} == {0, 1}


# --- projections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", *MIXTURES])
def test_a_rearranged_model_computes_what_transformers_does_and_is_saved_as_transformers_has_it(
    kind: str, tmp_path: Path
) -> None:
    wanted = logits(network_of(kind))
    policy = load(kind, W16A16)
    torch.testing.assert_close(logits(policy.model), wanted, rtol=1e-4, atol=1e-4)
    policy.network.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "mixtral"])
def test_its_export_holds_the_merged_adapters_and_says_that_nobody_else_computes_with_it(
    kind: str, tmp_path: Path
) -> None:
    policy = load(kind, W16A16, adapter="lora", lora_rank=4)
    torch.manual_seed(0)
    for name, parameter in policy.trainable().items():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)
    wanted = logits(policy.model)
    assert not torch.allclose(wanted, logits(network_of(kind)), atol=0.1)
    _write_plain(policy, tmp_path, {})
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert _only_here(load(kind)).endswith("lies otherwise in files than where it is quantised")
    assert _only_here(load("qwen3")) == ""


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "mixtral"])
def test_its_weights_are_quantised_along_their_inputs(kind: str) -> None:
    """transformers' own model on weights that were rounded beforehand is the reference."""
    reference = network_of(kind)
    turned = ("c_attn", "c_proj", "c_fc") if kind == "gpt2" else ("experts",) if kind == "gpt_oss" else ()
    for name, weight in reference.named_parameters():
        if block_of(name) is not None and weight.dim() >= 2 and not re.search(r"router|mlp\.gate\.|bias", name):
            lies = any(part in name.split(".") for part in turned)
            rows = weight.detach().transpose(-1, -2).contiguous() if lies else weight.detach()
            weight.data = fake_quantize(rows).transpose(-1, -2).contiguous() if lies else fake_quantize(rows)
    policy = load(kind, W4A16)
    torch.testing.assert_close(logits(policy.model), logits(reference), rtol=1e-4, atol=1e-4)
    with deployed(policy):
        torch.testing.assert_close(logits(policy.model), logits(reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", *MIXTURES])
def test_noise_and_adapters_reach_every_projection_of_it_and_nothing_else(kind: str) -> None:
    policy = load(kind, adapter="lora", lora_rank=4)
    wanted = [name for name in policy.linears if block_of(name) is not None]
    assert list(policy.adapted) == wanted
    assert len(policy.trainable()) == 2 * len(wanted)
    noise = NoiseConfig(modules=("linear",), num_stages=1, scale="rms", sigma_start=0.1)
    targets = noise_targets(policy, noise)
    assert [target.name for target in targets] == [f"{name}.weight" for name in wanted]
    with injected(policy, noise, targets, step=0, total_steps=2, seed=0, measured=True) as changes:
        effects = effects_of(noise, changes, step=0, total_steps=2)
    assert all(0.05 < effect.applied_relative < 0.2 for effect in effects)
    policy.model(input_ids=torch.arange(12).view(2, 6)).logits.square().sum().backward()
    touched = {name for name, parameter in policy.trainable().items() if parameter.grad is not None}
    assert len(touched) > 0.7 * len(policy.trainable()), "all but those of experts that no token went to"
    with pytest.raises(ConfigError, match=r"rollout\.backend=vllm: .*set rollout.backend=torch"):
        _check_served(policy)


def test_experts_that_compute_otherwise_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    original: Any = MixtralExperts.forward
    monkeypatch.setattr(MixtralExperts, "forward", lambda self, *routed: 1.01 * original(self, *routed))
    with pytest.raises(ConfigError, match="MixtralExperts computes with it itself"):
        load("mixtral")


def test_a_norm_is_told_by_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    original: Any = Qwen3RMSNorm.forward
    monkeypatch.setattr(Qwen3RMSNorm, "forward", lambda self, x: original(self, x - x.mean(-1, keepdim=True)))
    assert set(load("qwen3").norms) == set(), "that was LayerNorm"
    monkeypatch.setattr(Qwen3RMSNorm, "forward", lambda self, x: nn.functional.silu(original(self, x)))
    assert load("qwen3").norm_kinds == {"unknown, qk_norm": 4, "unknown, pre_norm": 4, "unknown, final": 1}


def test_a_trial_on_a_mixture_learns_and_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no token went to an expert, which then has no moments."""
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "num_experts": 32, "num_local_experts": 32}
    config = CONFIG_MAPPING["mixtral"](**{**COMMON, **EXPERTS, **sizes, "eos_token_id": tokenizer.eos_token_id})
    network: Any = AutoModelForCausalLM.from_config(config)
    network.model.layers[0].mlp.gate.weight.data[0] = 0.0  # never among the two best of 32
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {
        "model": {"name": str(tmp_path)},
        "task": {"name": "gsm8k", "path": str(Path(__file__).parent / "data" / "gsm8k_small.jsonl")},
        "noise": {"num_stages": 1, "modules": ["linear"]},
        "grpo": {"steps": 2, "prompts": 2, "group_size": 2, "updates_per_step": 1},
        "rollout": {"max_prompt_tokens": 240, "max_new_tokens": 2},
        "eval": {"questions": 2, "every": 0},
    }
    draw = torch.Generator()
    monkeypatch.setattr(
        trainable.trial, "shaped_rewards", lambda groups, *_: torch.rand(2, 2, generator=draw.manual_seed(0))
    )
    trial, again = Trial(read_config(settings)), Trial(read_config(settings))
    trial.step()
    state = trial.state_dict()
    trained = {key.split("/")[0] for key in state["optimizer"]}
    assert len(trained) <= len(trial.policy.trainable()) - 2, "one expert is idle"
    again.load_state_dict(state)
    trial.step()
    again.step()
    assert all(torch.equal(p, again.policy.trainable()[name]) for name, p in trial.policy.trainable().items())
    assert 0.5 < trial.receipt().moved["matrices"] < 1

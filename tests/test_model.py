"""The policy: which layers compute in 4 bits, what LoRA sees, and that nothing temporary is left behind."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import trainable.policy.loading
from spaces.config import ConfigError, ModelConfig, QuantConfig, TaskConfig
from tests.conftest import ModelFolder, Tiny, byte_tokenizer
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, block_of, deployed, matches, unquantized
from trainable.quantization import UNQUANTIZED, Arithmetic, QuantLinear, fake_quantize
from trainable.rollout import encode_prompts
from trainable.tasks.task import Question

PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
NONE: Any = {"weights": "none", "activations": "none"}
W16A16 = QuantConfig(**NONE)
W4A16 = QuantConfig(activations="none")
W4A4 = QuantConfig()


def lora(folder: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**{"name": folder, "adapter": "lora", "lora_rank": 4, "lora_alpha": 12.0, **changes})


def logits(policy: Policy) -> torch.Tensor:
    """[2, 5, V], of the policy as it is now."""
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        out: torch.Tensor = policy.model(input_ids=ids).logits
    return out


# --- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_projection_of_every_block_is_wrapped_and_the_head_is_not(
    model_folder: ModelFolder, kind: str, tied: bool
) -> None:
    policy = load_policy(ModelConfig(name=model_folder(kind, tied=tied)), W4A4, seed=0)
    expected = [f"model.layers.{block}.{name}" for block in range(3) for name in PROJECTIONS]
    assert sorted(policy.linears) == sorted(expected)
    assert policy.quantized == tuple(policy.linears)
    for name, module in policy.model.named_modules():
        assert isinstance(module, QuantLinear) == (name in expected)
    assert all(linear is policy.model.get_submodule(name) for name, linear in policy.linears.items())
    assert all(linear.name == name for name, linear in policy.linears.items())


def test_norms_are_the_two_of_every_block_and_the_final_one_apart(model_folder: ModelFolder) -> None:
    policy = load_policy(ModelConfig(name=model_folder()), W4A4, seed=0)
    kinds = ("input_layernorm", "post_attention_layernorm")
    assert list(policy.norms) == [f"model.layers.{block}.{kind}" for block in range(3) for kind in kinds]
    assert list(policy.final_norm) == ["model.norm"]
    assert policy.depth == 3


@pytest.mark.parametrize(
    ("pattern", "blocks", "projections"),
    [
        ("layers.1", {1}, PROJECTIONS),
        ("model.layers.1", {1}, PROJECTIONS),
        ("layers.1*", {1, 10, 11}, PROJECTIONS),
        ("layers.?", set(range(10)), PROJECTIONS),
        ("layers.10.mlp", {10}, PROJECTIONS[4:]),
        ("q_proj", set(range(12)), ["self_attn.q_proj"]),
        ("layers.1.*.v_proj", {1}, ["self_attn.v_proj"]),
    ],
)
def test_a_pattern_excludes_whole_name_parts(
    model_folder: ModelFolder, pattern: str, blocks: set[int], projections: list[str]
) -> None:
    folder = model_folder(layers=12)
    policy = load_policy(ModelConfig(name=folder), QuantConfig(exclude=("lm_head", pattern)), seed=0)
    excluded = {f"model.layers.{block}.{name}" for block in blocks for name in projections}
    assert set(policy.linears) - set(policy.quantized) == excluded
    assert len(policy.linears) == 12 * len(PROJECTIONS), (
        "an excluded layer of a block stays wrapped, so that noise can see it"
    )
    for name, linear in policy.linears.items():
        assert linear.arithmetic == (UNQUANTIZED if name in excluded else Arithmetic())


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "model.layers.10.mlp.up_proj", False),
        ("layers.1", "model.layers.1", True),
        ("1", "model.layers.1.mlp", True),
        ("ayers.1", "model.layers.1.mlp", False),
        ("up", "model.layers.1.mlp.up_proj", False),
        ("up*", "model.layers.1.mlp.up_proj", True),
        ("layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj", False),
        ("lm_head", "lm_head", True),
        ("*", "lm_head", True),
    ],
)
def test_matching(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.11.mlp.up_proj", 11),
        ("transformer.h.3.attn.c_attn", 3),
        ("lm_head", None),
        ("model.norm", None),
        ("layers.7.x", 7),
    ],
)
def test_block_of_a_name(name: str, block: int | None) -> None:
    assert block_of(name) == block


@pytest.mark.parametrize(
    ("indices", "blocks"),
    [((), set()), ((0,), {0}), ((-1,), {11}), ((0, -1), {0, 11}), ((11, -1), {11}), ((-12,), {0})],
)
def test_skipped_blocks_stay_at_16_bits(model_folder: ModelFolder, indices: tuple[int, ...], blocks: set[int]) -> None:
    policy = load_policy(ModelConfig(name=model_folder(layers=12)), QuantConfig(skip_layers=indices), seed=0)
    assert {block_of(name) for name in set(policy.linears) - set(policy.quantized)} == blocks


@pytest.mark.parametrize("index", [12, -13, 100])
def test_a_block_that_does_not_exist_cannot_be_skipped(model_folder: ModelFolder, index: int) -> None:
    with pytest.raises(ConfigError, match=rf"quant\.skip_layers={index}: the model has blocks 0 to 11"):
        load_policy(ModelConfig(name=model_folder(layers=12)), QuantConfig(skip_layers=(index,)), seed=0)


@pytest.mark.parametrize("pattern", ["layers.12", "head", "mlp.q_proj", ""])
def test_a_pattern_that_matches_nothing_is_an_error(model_folder: ModelFolder, pattern: str) -> None:
    with pytest.raises(ConfigError, match=rf"quant\.exclude={pattern}: matches no linear layer"):
        load_policy(ModelConfig(name=model_folder(layers=12)), QuantConfig(exclude=("lm_head", pattern)), seed=0)


def test_a_quantised_tied_head_stays_tied(model_folder: ModelFolder) -> None:
    policy = load_policy(ModelConfig(name=model_folder()), QuantConfig(exclude=()), seed=0)
    model: Any = policy.model
    head, embedding = policy.linears["lm_head"], model.get_input_embeddings()
    assert "lm_head" in policy.quantized
    assert head.weight is embedding.weight
    assert sum(parameter is head.weight for parameter in policy.trainable().values()) == 1
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(embedding(ids), head.weight[ids]), "the embedding is not quantised"
    hidden = torch.randn(2, 64)
    assert torch.equal(head(hidden), F.linear(fake_quantize(hidden), fake_quantize(head.weight)))


@pytest.mark.parametrize(
    ("sizes", "quant", "layer"),
    [
        ({"hidden": 48}, W4A4, "model.layers.*.self_attn.q_proj: mxfp4"),
        ({"intermediate": 80}, W4A4, "model.layers.*.mlp.down_proj: mxfp4"),
        ({"hidden": 40}, QuantConfig(weights="nvfp4", activations="none"), "model.layers.*.self_attn.q_proj: nvfp4"),
        ({"hidden": 48}, QuantConfig(weights="none", activations="mxfp8"), "model.layers.*.self_attn.q_proj: mxfp8"),
    ],
)
def test_widths_that_the_block_does_not_divide_name_every_layer_that_has_to_be_excluded(
    model_folder: ModelFolder, sizes: dict[str, int], quant: QuantConfig, layer: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(layer)) as error:
        load_policy(ModelConfig(name=model_folder(**sizes)), quant, seed=0)
    said = re.findall(r"model\.layers\.[\w.*]+", str(error.value))
    assert len(said) == (1 if "intermediate" in sizes else 6)
    load_policy(
        ModelConfig(name=model_folder(**sizes)), quant.model_copy(update={"exclude": ("lm_head", *said)}), seed=0
    )


@pytest.mark.parametrize(
    ("sizes", "quant"),
    [
        ({"intermediate": 80}, QuantConfig(exclude=("lm_head", "down_proj"))),
        ({"hidden": 48}, QuantConfig(weights="nvfp4", activations="none")),
        ({"hidden": 48}, W16A16),
    ],
)
def test_what_an_error_about_width_recommends_works(
    model_folder: ModelFolder, sizes: dict[str, int], quant: QuantConfig
) -> None:
    assert logits(load_policy(ModelConfig(name=model_folder(**sizes)), quant, seed=0)).isfinite().all()


# --- LoRA -------------------------------------------------------------------------------------------------------------


def test_lora_names_are_those_without_it(model_folder: ModelFolder) -> None:
    folder = model_folder()
    plain = load_policy(ModelConfig(name=folder), W4A4, seed=0)
    adapted = load_policy(lora(folder), W4A4, seed=0)
    for parts in ("linears", "norms", "final_norm"):
        assert list(getattr(adapted, parts)) == list(getattr(plain, parts))
    assert adapted.quantized == plain.quantized
    assert adapted.depth == plain.depth


def test_lora_starts_as_the_policy_without_it(model_folder: ModelFolder) -> None:
    folder = model_folder()
    expected = logits(load_policy(ModelConfig(name=folder), W4A4, seed=0))
    assert torch.equal(logits(load_policy(lora(folder), W4A4, seed=0)), expected)


def adapted_layer(policy: Policy, name: str) -> Any:
    model: Any = policy.model
    return model.base_model.model.get_submodule(name)


def with_random_adapters(policy: Policy) -> Policy:
    torch.manual_seed(1)
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return policy


@pytest.mark.parametrize("quant", [W16A16, W4A16, W4A4, QuantConfig(skip_layers=(0,))], ids=lambda q: q.mode)
def test_adapters_see_the_quantised_input_and_are_not_quantised(
    model_folder: ModelFolder, quant: QuantConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainable.policy.loading, "KNOWN_BLOCKS", ())  # each layer quantises for itself
    policy = with_random_adapters(load_policy(lora(model_folder()), quant, seed=0))
    for name, linear in policy.linears.items():
        adapted = adapted_layer(policy, name)
        assert adapted.base_layer is linear
        first, second = adapted.lora_A["default"], adapted.lora_B["default"]
        assert type(first) is type(second) is nn.Linear
        x = torch.randn(3, linear.in_features)
        seen = fake_quantize(x, linear.arithmetic.activations)
        base = F.linear(seen, fake_quantize(linear.weight, linear.arithmetic.weights), linear.bias)
        expected = base + 12.0 / 4 * (seen @ first.weight.T @ second.weight.T)
        torch.testing.assert_close(adapted(x), expected)


def test_only_adapters_learn_and_the_gradient_reaches_both(model_folder: ModelFolder) -> None:
    policy = with_random_adapters(load_policy(lora(model_folder()), W4A4, seed=0))
    trainable = policy.trainable()
    assert len(trainable) == 2 * len(policy.linears)
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    policy.model(input_ids=torch.arange(10).view(2, 5)).logits.square().sum().backward()
    for name, parameter in policy.model.named_parameters():
        if name in trainable:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_the_gradient_of_an_adapter_passes_the_quantiser_straight_through(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainable.policy.loading, "KNOWN_BLOCKS", ())  # each layer quantises for itself
    policy = with_random_adapters(load_policy(lora(model_folder()), W4A4, seed=0))
    name, linear = next(iter(policy.linears.items()))
    adapted = adapted_layer(policy, name)
    first, second = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    x = torch.randn(3, linear.in_features, requires_grad=True)
    up = torch.randn(3, linear.out_features)
    adapted(x).backward(up)
    seen = fake_quantize(x.detach())
    torch.testing.assert_close(second.grad, 3.0 * up.T @ (seen @ first.T))
    torch.testing.assert_close(first.grad, 3.0 * (up @ second).T @ seen)
    torch.testing.assert_close(x.grad, up @ fake_quantize(linear.weight.detach()) + 3.0 * up @ second @ first)


def test_adapters_depend_on_the_seed_alone(model_folder: ModelFolder) -> None:
    folder = model_folder()

    def adapters(seed: int) -> torch.Tensor:
        torch.rand(seed + 7)  # whatever was drawn before
        policy = load_policy(lora(folder), W4A4, seed=seed)
        return torch.cat([p.detach().flatten() for n, p in policy.trainable().items() if "lora_A" in n])

    state = torch.get_rng_state()
    load_policy(lora(folder), W4A4, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert torch.equal(adapters(3), adapters(3))
    assert not torch.equal(adapters(3), adapters(4))


# --- for a while ------------------------------------------------------------------------------------------------------


def formats(policy: Policy) -> list[tuple[Arithmetic, bool]]:
    return [(m.arithmetic, m.quantize_input) for m in policy.linears.values()]


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("quant", [W16A16, W4A16, W4A4], ids=lambda q: q.mode)
def test_deployed_computes_the_same_function(model_folder: ModelFolder, adapter: str, quant: QuantConfig) -> None:
    folder = model_folder()
    policy = load_policy(lora(folder) if adapter == "lora" else ModelConfig(name=folder), quant, seed=0)
    expected = logits(with_random_adapters(policy))
    with deployed(policy):
        assert all(linear.deployed_weight is not None for linear in policy.linears.values())
        assert torch.equal(logits(policy), expected)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_unquantised_is_the_policy_at_16_bits(model_folder: ModelFolder, adapter: str) -> None:
    folder = model_folder()
    model = lora(folder) if adapter == "lora" else ModelConfig(name=folder)
    policy, plain = (with_random_adapters(load_policy(model, quant, seed=0)) for quant in (W4A4, W16A16))
    assert not torch.equal(logits(policy), logits(plain))
    with unquantized(policy):
        assert torch.equal(logits(policy), logits(plain))
        with deployed(policy):
            assert torch.equal(logits(policy), logits(plain))


@pytest.mark.parametrize("context", [deployed, unquantized])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before_afterwards(
    model_folder: ModelFolder, context: Callable[[Policy], AbstractContextManager[None]], adapter: str, fails: bool
) -> None:
    folder = model_folder()
    policy = load_policy(
        lora(folder) if adapter == "lora" else ModelConfig(name=folder), QuantConfig(skip_layers=(1,)), seed=0
    )
    weights = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    before, before_formats = logits(policy), formats(policy)

    def body() -> None:
        with context(policy):
            if fails:
                raise RuntimeError("in between")

    if fails:
        with pytest.raises(RuntimeError, match="in between"):
            body()
    else:
        body()
    assert torch.is_grad_enabled()
    assert formats(policy) == before_formats
    assert all(linear.deployed_weight is None for linear in policy.linears.values())
    assert all(torch.equal(p, weights[name]) for name, p in policy.model.named_parameters())
    assert torch.equal(logits(policy), before)


def test_nothing_learns_through_deployed_weights(model_folder: ModelFolder) -> None:
    policy = load_policy(ModelConfig(name=model_folder()), W4A4, seed=0)
    with deployed(policy), torch.enable_grad(), pytest.raises(AssertionError, match="training must not see"):
        policy.model(input_ids=torch.arange(4)[None])


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_bfloat16_computes_in_bfloat16(model_folder: ModelFolder, adapter: str) -> None:
    folder = model_folder()
    model = lora(folder, dtype="bfloat16") if adapter == "lora" else ModelConfig(name=folder, dtype="bfloat16")
    policy = load_policy(model, W4A4, seed=0)
    assert {p.dtype for n, p in policy.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    if adapter == "lora":  # peft keeps adapters in fp32: small updates would be lost in bf16
        assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    out = policy.model(input_ids=torch.arange(10).view(2, 5)).logits
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.trainable().values())


def test_the_embedded_base_loads(tiny: Tiny) -> None:
    config = tiny()
    policy = load_policy(config.model, config.quant, seed=0)
    assert policy.depth == 2
    assert len(policy.linears) == 2 * len(PROJECTIONS)
    assert policy.tokenizer.padding_side == "left"
    assert not policy.model.training


def test_a_blind_guess_is_among_the_tokens_that_the_model_can_say(tiny: Tiny) -> None:
    """Two special tokens, ten digits, + - =. Loading gives the tokenizer one more that the model has no row for."""
    config = tiny()
    policy = load_policy(config.model, config.quant, seed=0)
    assert policy.vocabulary == 15
    assert policy.network.get_output_embeddings().weight.shape[0] == 15


def broken(place: Path, damage: str) -> str:
    match damage:
        case "missing":
            return str(place / "none")
        case "on the hub, which is offline":
            return "nobody/no-such-model"
        case "empty":
            pass
        case "not JSON":
            (place / "config.json").write_text("{")
        case "unknown architecture":
            (place / "config.json").write_text('{"model_type": "nope"}')
        case "cut off":
            (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:1000])
    return str(place)


@pytest.mark.parametrize(
    "damage", ["missing", "on the hub, which is offline", "empty", "not JSON", "unknown architecture", "cut off"]
)
def test_a_model_that_cannot_be_loaded_is_explained_in_one_line(
    model_folder: ModelFolder, tmp_path: Path, damage: str
) -> None:
    if damage not in ("missing", "empty"):
        for file in Path(model_folder()).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    name = broken(tmp_path, damage)
    with pytest.raises(ConfigError) as error:
        load_policy(ModelConfig(name=name), W4A4, seed=0)
    text = str(error.value)
    assert text.startswith(f"model.name={name}: ")
    assert text.endswith("give a folder with a transformers model")
    assert "\n" not in text


def folder_of(place: Path, kind: str, **settings: Any) -> str:
    """A tiny model of another architecture, with the byte-level tokenizer."""
    tree = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **settings}
    config = AutoConfig.for_model(kind, eos_token_id=1, pad_token_id=0, **tree)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "bitnet"])
def test_a_folder_that_somebody_quantised_is_refused_before_it_is_loaded(
    model_folder: ModelFolder, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")  # some would end the process
    with pytest.raises(ConfigError, match=rf"its weights are quantised already \({method}\); give the model that they"):
        load_policy(ModelConfig(name=str(folder)), W4A4, seed=0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("bloom", {}), ("gpt_oss", {"num_local_experts": 4, "head_dim": 16, "num_key_value_heads": 2})],
)
def test_an_architecture_without_fused_attention_is_told_to_take_the_eager_one(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    folder = folder_of(tmp_path, kind, **settings)
    with pytest.raises(ConfigError, match=r"^model\.attention=sdpa: .* does not have it; set model\.attention=eager$"):
        load_policy(ModelConfig(name=folder), W16A16, seed=0)
    load_policy(ModelConfig(name=folder, attention="eager"), QuantConfig(**NONE, exclude=()), seed=0)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "qwen2", num_key_value_heads=2, intermediate_size=64)
    load_policy(ModelConfig(name=folder), W16A16, seed=0)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"])  # which the model has no embedding of, nor any use
    tokenizer.save_pretrained(folder)
    policy = load_policy(ModelConfig(name=folder), W16A16, seed=0)
    question = Question(prompt="an <image>", answer="")
    with pytest.raises(
        ConfigError, match=r"a prompt has <image> \(token 260\), and the model embeddings for 260 tokens"
    ):
        encode_prompts(policy, [question], TaskConfig(name="reasoning_gym:chain_sum"), 64)
    small = folder_of(tmp_path / "small", "qwen2", num_key_value_heads=2, intermediate_size=64, vocab_size=100)
    with pytest.raises(
        ConfigError, match=r"the tokenizer has 26\d tokens, the model embeddings for 100; give the token"
    ):
        load_policy(ModelConfig(name=small), W16A16, seed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_missing_or_do_not_fit_are_not_drawn_at_random(
    model_folder: ModelFolder, tmp_path: Path, tied: bool
) -> None:
    shutil.copytree(model_folder(tied=tied), tmp_path, dirs_exist_ok=True)
    whole = load_file(tmp_path / "model.safetensors")
    up = "model.layers.1.mlp.up_proj.weight"
    changes: dict[str, dict[str, torch.Tensor]] = {
        rf"lacks weights \({up} and 1 others\)": {n: w for n, w in whole.items() if n not in (up, "model.norm.weight")},
        rf"{up} is \[64, 64\], by config.json \[128, 64\]": whole | {up: whole[up][:64].clone()},
    }
    if not tied:
        changes[r"lacks weights \(lm_head.weight and 0 others\)"] = {
            n: w for n, w in whole.items() if n != "lm_head.weight"
        }
    for message, weights in changes.items():
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=message):
            load_policy(ModelConfig(name=str(tmp_path)), W4A4, seed=0)
    save_file(whole | {"another": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_policy(ModelConfig(name=str(tmp_path)), W4A4, seed=0)  # what is there besides does no harm

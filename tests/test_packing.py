"""Packed MXFP4: what other programs unpack equals `fake_quantize` bit for bit, by the library's own decompressor."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ModelFolder
from trainable.engines.engine import CONFIG_FILE
from trainable.packing import MAGNITUDES, no_packed_form, pack, pack_checkpoint, quantization_config, uneven_blocks
from trainable.quantization import SCALE_RULES, Arithmetic, fake_quantize

library: Any = pytest.importorskip("compressed_tensors.compressors")
quantization: Any = pytest.importorskip("compressed_tensors.quantization")

RULES = tuple(SCALE_RULES)


def scheme(inputs: bool = True) -> Any:
    """As a program reads it from config.json."""
    config = json.loads(json.dumps(quantization_config([], inputs=inputs, head=False)))
    return quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]


def compressor() -> Any:
    return library.BaseCompressor.get_value_from_registry(scheme().format or "mxfp4-pack-quantized")


def unpacked(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = compressor().decompress({"weight_packed": codes, "weight_scale": scales}, scheme())["weight"]
    return weight


def bits(x: torch.Tensor) -> torch.Tensor:
    """fp32 bits: tells +0 from -0."""
    return x.float().view(torch.int32)


def weights(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """[64, 96], of a distribution or an edge of the format."""
    source = torch.Generator().manual_seed(3)
    x = torch.randn(64, 96, generator=source)
    match kind:
        case "ordinary":
            x *= 0.02
        case "heavy tails":
            x = x.sign() * x.abs() ** 6
        case "wide range":  # a binade per block
            x *= torch.exp2(torch.randint(-100, 100, (64, 3), generator=source)).repeat_interleave(32, 1)
        case "midpoints":  # in bf16 ordinary
            x = torch.randint(-13, 14, (64, 96), generator=source) / 4.0
        case "thresholds":  # the largest of a block next to where the rules part
            top = torch.tensor([1.0, 1.5, 1.75, 2.0, 3.0, 3.5, 6.0, 7.0]).repeat(24).view(64, 3)
            top *= 1 + torch.randint(-1, 2, (64, 3), generator=source) * torch.finfo(dtype).eps
            x = x.clamp(-0.9, 0.9)
            x[:, ::32] = top
        case "smallest":  # scales of 2^-127 and a little more
            x *= (
                torch.exp2(torch.randint(-132, -120, (64, 3), generator=source).double())
                .float()
                .repeat_interleave(32, 1)
            )
        case "zeros":
            x = torch.zeros(64, 96)
            x[::2] = -0.0
            x[:, 7] = 1.0
            x[5] = 0.0
    return x.to(dtype)


KINDS = ("ordinary", "heavy tails", "wide range", "midpoints", "thresholds", "smallest", "zeros")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_what_the_library_unpacks_is_the_fake_quantised_weight_bit_for_bit(
    rule: str, kind: str, dtype: torch.dtype
) -> None:
    weight = weights(kind, dtype)
    codes, scales = pack(weight, rule)
    assert (codes.dtype, codes.shape) == (torch.uint8, (64, 48))
    assert (scales.dtype, scales.shape) == (torch.uint8, (64, 3))
    assert torch.equal(bits(unpacked(codes, scales)), bits(fake_quantize(weight, "mxfp4", rule)))


@pytest.mark.slow  # it compiles: torch starts a Python to ask what the machine can
@pytest.mark.parametrize("rule", RULES)
def test_on_ordinary_weights_the_library_s_packer_with_these_scales_writes_the_same_bytes(rule: str) -> None:
    weight = weights("ordinary", torch.float32)
    codes, scales = pack(weight, rule)
    given = {"weight": weight, "weight_scale": torch.exp2(scales.float() - 127)}
    written = compressor().compress(given, scheme())
    assert torch.equal(written["weight_packed"], codes)
    assert torch.equal(written["weight_scale"], scales)


def test_the_rules_differ_and_the_library_s_own_is_even() -> None:
    """Else equality under `floor` would show nothing."""
    weight = weights("ordinary", torch.float32)
    args = scheme().weights
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    scale, _ = helpers.compute_dynamic_scales_and_zp(weight, args, torch.nn.Linear(1, 1))
    own = (torch.log2(scale) + 127).to(torch.uint8)
    assert [rule for rule in RULES if torch.equal(pack(weight, rule)[1], own)] == ["even"]


def test_every_element_has_its_code_and_the_even_one_lies_low() -> None:
    block = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)]).repeat(2)[None]  # [1, 32], amax 6: X = 1
    codes, scales = pack(block * 2.0**-3, "floor")
    expected = [*range(0, 8), *range(8, 16)] * 2
    assert codes.tolist() == [[low | high << 4 for low, high in zip(expected[::2], expected[1::2], strict=True)]]
    assert scales.tolist() == [[127 - 3]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(1, 32)
    weight[0, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        pack(weight, "floor")


@pytest.mark.parametrize(
    ("weight_format", "input_format", "said"),
    [
        ("mxfp4", "mxfp4", ""),
        ("mxfp4", "none", ""),
        ("mxfp4", "mxfp8", "mxfp8 inputs"),
        ("mxfp4", "nvfp4", "nvfp4 inputs"),
        ("nvfp4", "nvfp4", "nvfp4 scales inputs per token"),
        ("nvfp4", "none", "nvfp4"),
        ("mxfp8", "mxfp8", "mxfp8 weights"),
        ("none", "mxfp4", "only inputs are quantised"),
        ("none", "none", "nothing is quantised"),
    ],
)
def test_which_formats_can_be_packed_and_why_not(weight_format: str, input_format: str, said: str) -> None:
    reason = no_packed_form(Arithmetic(weights=weight_format, activations=input_format))
    assert said in reason
    assert bool(reason) == bool(said)


def test_parts_of_a_block_that_vllm_computes_as_one_are_named_when_they_are_uneven() -> None:
    block = {f"model.layers.0.self_attn.{name}_proj": "mxfp4" for name in "qkvo"}
    block |= {f"model.layers.0.mlp.{name}_proj": "mxfp4" for name in ("gate", "up", "down")}

    def uneven(*changes: str) -> list[str]:
        layers = {name: Arithmetic(weights="none" if name.endswith(changes) else form) for name, form in block.items()}
        return uneven_blocks(layers)

    assert uneven("nothing") == uneven("o_proj", "down_proj") == uneven("q_proj", "k_proj", "v_proj") == []
    assert uneven("k_proj") == ["model.layers.0.self_attn.qkv_proj"]
    assert uneven("q_proj", "up_proj") == ["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"]


# A folder


def plain(folder: str, **formats: str) -> Path:
    """With the formats of layers by their last name; others mxfp4/none."""
    place = Path(folder)
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")]
    chosen = {name: formats.get(name.split(".")[-1], "mxfp4") for name in names}
    chosen |= {name: form for name, form in formats.items() if name == "lm_head"}
    layers = {
        name: asdict(Arithmetic(weights=form, activations="none", scale_rule="rceil")) for name, form in chosen.items()
    }
    (place / CONFIG_FILE).write_text(json.dumps({"version": 2, "layers": layers}))
    return place


def test_a_packed_folder_holds_each_weight_once_and_the_rest_in_bfloat16(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    source = plain(model_folder("qwen2", seed=11), q_proj="none")
    pack_checkpoint(source, tmp_path / "packed")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "packed" / "model.safetensors")
    packed = {f"model.layers.{i}.mlp.down_proj" for i in range(3)}
    expected = {name for name in before if name.removesuffix(".weight") not in packed}
    assert set(after) == expected | {f"{name}.weight_{part}" for name in packed for part in ("packed", "scale")}
    for name in expected:
        assert torch.equal(after[name], before[name].to(torch.bfloat16)), name
    for name in packed:
        decoded = unpacked(after[f"{name}.weight_packed"], after[f"{name}.weight_scale"])
        assert torch.equal(decoded.float(), fake_quantize(before[f"{name}.weight"], "mxfp4", "rceil")), name
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["ignore"] == [
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(3)),
        "lm_head",
    ]
    assert config["quantization_config"]["config_groups"]["group_0"]["input_activations"] is None
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert CONFIG_FILE not in names


def test_a_head_can_be_packed_and_is_named_because_vllm_s_is_no_linear(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    source = plain(model_folder("qwen2", tied=False, seed=12), lm_head="mxfp4")
    pack_checkpoint(source, tmp_path / "packed")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "packed" / "model.safetensors")
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"].to(torch.bfloat16))
    decoded = unpacked(after["lm_head.weight_packed"], after["lm_head.weight_scale"])
    assert torch.equal(decoded.float(), fake_quantize(before["lm_head.weight"], "mxfp4", "rceil"))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert "lm_head" not in config["quantization_config"]["ignore"]

"""MXFP4 weights, packed: two elements a byte and a byte of scale for 32 of them, as other programs load them.

Training computes on fake-quantised weights, X * P in the model's dtype, and keeps the clean master. Here that product
is taken apart again and stored, in the layout of compressed-tensors' `mxfp4-pack-quantized`, which transformers (with
compressed-tensors) and vLLM read:

    NAME.weight_packed   uint8 [N, K/2]    P as E2M1 codes (OCP MX v1.0, 5.3.3): sign, then 0 .5 1 1.5 2 3 4 6; the even
                         element low
    NAME.weight_scale    uint8 [N, K/32]   X as E8M0 (5.4.1): its exponent plus 127
    config.json          quantization_config: which layers, and whether inputs are quantised too

The scales are those of the trial's own rule: the format stores whatever power of two it is given, and what is unpacked
equals `fake_quantize` bit for bit. The library's own quantiser knows one rule, `even`, and its packer loses the sign of
a zero that comes in negative; therefore it is the judge in the tests and does not pack, and nobody needs it in order to
export.

What the format cannot say is how *inputs* get their scale: each program that loads it has a rule of its own, and none
takes `floor`.

Choices. The packed form is bfloat16 outside of the packed layers, also of an fp32 model: compressed-tensors unpacks to
bfloat16 whatever the model's dtype (and then cannot multiply it with fp32 inputs), and the kernels of vLLM compute in
16 bits.

Left out: nvfp4, whose outer scale of inputs is per token here and per tensor there, and mxfp8; see `no_packed_form`.

Shapes: N = output features, K = input features.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spaces.formats import FORMATS
from trainable.engines.engine import CONFIG_FILE, arithmetic_of
from trainable.quantization import Arithmetic, element_step, fake_quantize

FORMAT = "mxfp4-pack-quantized"
BLOCK = FORMATS["mxfp4"].block
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1, by code
_SIGN = 3  # its bit in a code
_BIAS = 127  # E8M0

_NO_KERNEL = {
    "mxfp8": (
        "vLLM knows 8-bit inputs beside MXFP4 weights with fp32 scales per token or per 128 elements, "
        "none with powers of two per 32"
    ),
    "nvfp4": "vLLM knows 4-bit inputs of MXFP4 layers as MXFP4 only",
}

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def no_packed_form(arithmetic: Arithmetic) -> str:
    """Why layers that compute so cannot be packed so that a stock program computes what was trained; else empty."""
    weights, activations = arithmetic.weights, arithmetic.activations
    if arithmetic.hadamard:
        return "inputs are turned by a Hadamard matrix before they are quantised, and the format has no word for that"
    if weights == activations == "none":
        return "nothing is quantised: the plain form is all there is"
    if weights == "none":
        return f"only inputs are quantised (to {activations}), and the format holds weights"
    if weights == "nvfp4":
        return (
            "nvfp4 scales inputs per token here, and by one scale per tensor, "
            "calibrated beforehand, in every stock program"
        )
    if weights == "mxfp8":
        return "mxfp8 weights are not 4-bit weights: this writes mxfp4 only"
    return "" if activations in ("none", "mxfp4") else f"{activations} inputs: {_NO_KERNEL[activations]}"


def uneven_blocks(layers: Mapping[str, Arithmetic]) -> list[str]:
    """Parts of blocks that vLLM computes as one layer, and refuses to load when some of its projections are packed and
    others not."""
    found = []
    for part, projections in _FUSED.items():
        for first in [name for name in layers if name.endswith(f".{projections[0]}")]:
            parent = first.removesuffix(projections[0])
            if len({layers[parent + name].weights for name in projections if parent + name in layers}) > 1:
                found.append(parent + part)
    return found


def pack(weight: Tensor, scale_rule: str) -> tuple[Tensor, Tensor]:
    """`fake_quantize(weight, "mxfp4", scale_rule)` as codes [N, K/2] and scales [N, K/32].

    Example: a block whose largest magnitude is 6 has X = 1, scale byte 127; its neighbours 3.0, -0.5 become the byte
    0x95.
    Raises ValueError for weights that are not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("weights that are not finite have no MXFP4 form")
    half = element_step(weight, "mxfp4", scale_rule)[..., ::BLOCK].float()  # [N, K/32], X / 2
    exponent = torch.frexp(half).exponent  # half = 0.5 * 2^exponent, so X = 2^exponent
    scaled = fake_quantize(weight, "mxfp4", scale_rule).float().view(len(weight), -1, BLOCK)  # [N, K/32, 32]
    elements = torch.ldexp(scaled, -exponent[..., None]).flatten(-2)  # [N, K], exactly on the grid
    codes = (
        torch.bucketize(elements.abs(), torch.tensor(MAGNITUDES, device=weight.device))
        | elements.signbit().long() << _SIGN
    )
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed.to(torch.uint8), (exponent + _BIAS).to(torch.uint8)


def pack_checkpoint(plain: Path, packed: Path) -> None:
    """Write the packed form of a transformers folder with a `rin_quantization.json` that has one; a head to be packed
    is not tied.

    Example: pack_checkpoint(Path("best"), Path("best/packed")).
    """
    layers = arithmetic_of(json.loads((plain / CONFIG_FILE).read_text(encoding="utf-8")))
    quantized = [name for name, how in layers.items() if how.weights != "none"]
    (arithmetic,) = {layers[name] for name in quantized}
    assert not no_packed_form(arithmetic), arithmetic
    tensors: dict[str, Tensor] = {}
    for file in sorted(plain.glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    for name in quantized:
        codes, scales = pack(tensors.pop(f"{name}.weight"), arithmetic.scale_rule)
        tensors |= {f"{name}.weight_packed": codes, f"{name}.weight_scale": scales}
    tensors = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    ignored = [name for name, how in layers.items() if how.weights == "none"] + (
        [] if "lm_head" in layers else ["lm_head"]
    )
    config |= {
        "dtype": "bfloat16",
        "quantization_config": quantization_config(
            ignored, inputs=arithmetic.activations != "none", head="lm_head" in quantized
        ),
    }
    packed.mkdir(parents=True, exist_ok=True)
    for file in plain.iterdir():  # the tokenizer and how to generate
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name not in (
            CONFIG_FILE,
            "config.json",
            "model.safetensors.index.json",
        ):
            shutil.copyfile(file, packed / file.name)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        packed / "model.safetensors",
        metadata={"format": "pt"},
    )
    (packed / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def quantization_config(ignore: Sequence[str], *, inputs: bool, head: bool) -> dict[str, Any]:
    """The entry of config.json by which compressed-tensors and vLLM know a packed model.

    `ignore`: linear layers that stay as they are; `inputs`: inputs are quantised as well, when they come; `head`: the
    head is packed too (vLLM's is no `Linear`, and has to be named).
    """
    args = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": BLOCK,
        "symmetric": True,
        "scale_dtype": "torch.uint8",
    }
    group = {
        "targets": ["Linear", "lm_head"] if head else ["Linear"],
        "weights": {**args, "dynamic": False},
        "input_activations": {**args, "dynamic": True} if inputs else None,
        "output_activations": None,
        "format": FORMAT,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }

"""Quantised values against exact oracles, gradients against explicit products.

The oracle knows nothing of fp32 bits: scales come from frexp on float64, elements from gfloat and ml_dtypes, which must
agree with each other. Values are compared exactly, the sign of zero and the places of NaN included.
"""

import math
from typing import Any, NamedTuple, get_args

import gfloat  # type: ignore[import-untyped]
import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gfloat.formats import format_info_ocp_e2m1, format_info_ocp_e4m3  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.config import Format as FormatName
from spaces.config import ScaleRule
from spaces.formats import FORMATS
from tests.quantised_samples import ALL, CLASSES, MX, QUANTISED, RULES, SHAPE, Array, assert_same, sample
from trainable import quantization
from trainable.quantization import (
    SCALE_RULES,
    Arithmetic,
    QuantLinear,
    element_step,
    fake_quantize,
    fake_quantize_eager,
    ste_quantize,
)

FLT_MAX = float(torch.finfo(torch.float32).max)
DTYPES = (torch.float32, torch.bfloat16)


# --- the oracle ------------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    info: Any
    """gfloat's description of the element."""
    type: Any
    """ml_dtypes' type of it."""
    largest: float
    emax: int
    even: float
    """Mantissa of amax from which the rule doubles the scale."""
    rceil: float
    """Mantissa of amax above which it does."""


E2M1 = Grid(format_info_ocp_e2m1, ml_dtypes.float4_e2m1fn, largest=6.0, emax=2, even=1.75, rceil=1.5)
E4M3 = Grid(format_info_ocp_e4m3, ml_dtypes.float8_e4m3fn, largest=448.0, emax=8, even=1.9375, rceil=1.75)
GRIDS = {"mxfp4": E2M1, "mxfp8": E4M3, "nvfp4": E2M1}


def to_element(values: Array, grid: Grid) -> Array:
    """Round to nearest even with saturation, by two libraries that must agree."""
    clipped = np.clip(values, -grid.largest, grid.largest)
    rounded: Array = gfloat.round_ndarray(grid.info, clipped, gfloat.RoundMode.TiesToEven, sat=True)
    np.testing.assert_array_equal(rounded, clipped.astype(grid.type).astype(np.float64))
    return rounded


def mx_exponent(amax: Array, grid: Grid, rule: str) -> NDArray[np.int64]:
    """log2 of the block scale, from exact mantissas and exponents."""
    half, exponent = np.frexp(amax)
    mantissa = 2 * half  # amax = mantissa * 2^(exponent - 1), mantissa in [1, 2)
    doubled = {
        "floor": np.zeros_like(amax),
        "even": mantissa >= grid.even,
        "rceil": mantissa > grid.rceil,
        "ceil": mantissa > 1,
    }[rule]
    out: NDArray[np.int64] = np.maximum(exponent - 1 - grid.emax + doubled, -127).astype(np.int64)
    return out


def mx_oracle(x: Array, grid: Grid, rule: str) -> Array:
    """[rows, n] -> [rows, n], exact in float64."""
    blocks = x.reshape(-1, 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    finite = np.isfinite(amax)
    exponent = mx_exponent(np.where(finite, amax, 1.0), grid, rule)
    elements = to_element(np.ldexp(np.where(finite, blocks, 0.0), -exponent), grid)
    return np.where(finite, np.ldexp(elements, exponent), np.nan).reshape(x.shape)


def nvfp4_oracle(x: Array, per_tensor: bool) -> Array:
    """Its scales are not powers of two, so each step is rounded to fp32 where the definition says so."""
    one, six = np.float32(1), np.float32(6)
    blocks = x.astype(np.float32).reshape(x.shape[0], -1, 16)
    top = np.abs(blocks).max(axis=None if per_tensor else (1, 2), keepdims=True)
    finite = np.isfinite(top)
    blocks, top = np.where(finite, blocks, 0 * one), np.where(finite, top, one)
    outer = np.where(top < np.float32(2.0**-100), one, top / np.float32(448 * 6))
    amax = np.abs(blocks).max(-1, keepdims=True)
    scale = to_element((amax / six / outer).astype(np.float64), E4M3).astype(np.float32) * outer
    inverse = np.where(scale == 0, 0 * one, one / np.where(scale == 0, one, scale))
    elements = to_element((blocks * inverse).astype(np.float64), E2M1).astype(np.float32)
    return np.where(finite, elements * scale, np.nan).reshape(x.shape).astype(np.float64)


def oracle(x: Tensor, fmt: str, rule: str, per_tensor: bool = False) -> Tensor:
    values = x.double().numpy()
    quantized = nvfp4_oracle(values, per_tensor) if fmt == "nvfp4" else mx_oracle(values, GRIDS[fmt], rule)
    return torch.from_numpy(np.copysign(quantized, values)).to(x.dtype)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("fmt", "rule"), ALL)
def test_every_value_equals_the_oracle(fmt: str, rule: str, kind: str, dtype: torch.dtype) -> None:
    x = sample(kind, fmt, dtype)
    before = x.clone()
    assert_same(fake_quantize(x, fmt, rule), oracle(x, fmt, rule))
    assert_same(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_nvfp4_with_one_scale_per_tensor_equals_the_oracle(kind: str, dtype: torch.dtype) -> None:
    x = sample(kind, "nvfp4", dtype)
    assert_same(fake_quantize(x, "nvfp4", per_tensor=True), oracle(x, "nvfp4", "floor", per_tensor=True))


@pytest.mark.parametrize(("fmt", "rule"), ALL)
def test_float16_goes_through_fp32(fmt: str, rule: str) -> None:
    x = sample("normal", fmt, torch.float16)
    assert_same(fake_quantize(x, fmt, rule), oracle(x, fmt, rule))


@pytest.mark.parametrize("kind", ["normal", "student_t2", "cauchy", "wide_range"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["floor", "even", "ceil"])
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp8"])
def test_torchao_agrees_on_ordinary_blocks(fmt: str, rule: str, dtype: torch.dtype, kind: str) -> None:
    # Not rceil: torchao 0.18 takes its log2 in fp32. Not tiny blocks: it clamps the scale to 2^-126 on the way there
    # and to 2^-127 on the way back.
    from torchao.prototype.mx_formats.config import ScaleCalculationMode  # type: ignore[import-untyped]
    from torchao.prototype.mx_formats.mx_tensor import MXTensor  # type: ignore[import-untyped]

    x = sample(kind, fmt, dtype)
    amax = x.reshape(-1, 32).abs().amax(-1)
    x = x.reshape(-1, 32)[(amax > 2.0**-110) & (amax < 2.0**120)].contiguous()
    assert len(x) > 500
    element = torch.float4_e2m1fn_x2 if fmt == "mxfp4" else torch.float8_e4m3fn
    expected = MXTensor.to_mx(x, element, 32, ScaleCalculationMode(rule)).dequantize()
    assert torch.equal(fake_quantize(x, fmt, rule), expected)


E2M1_ROWS = [
    # input, output in a block with scale 1: all values, all ties, and both sides of every tie
    *((v, v) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
    *((0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)),
    *((math.nextafter(0.25, 9) + 1e-7, 0.5), (0.75 - 1e-6, 0.5), (1.25 + 1e-6, 1.5), (1.75 - 1e-6, 1.5)),
    *((2.5 + 1e-6, 3.0), (3.5 - 1e-6, 3.0), (5.0 + 1e-6, 6.0), (5.0 - 1e-6, 4.0)),
    *((6.5, 6.0), (7.0, 6.0), (7.999, 6.0), (1e-30, 0.0)),
]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("value", "expected"), E2M1_ROWS)
def test_e2m1_rounds_to_nearest_even_and_saturates(value: float, expected: float, sign: float) -> None:
    x = torch.zeros(32)
    x[0], x[1] = 4.0, sign * value  # amax in [4, 8): X = 1
    quantized = fake_quantize(x, "mxfp4", "floor")
    assert quantized[1].item() == sign * expected
    assert math.copysign(1.0, quantized[1].item()) == sign


SCALE_ROWS = [
    # format, rule, amax, its block's scale
    ("mxfp4", "floor", 4.0, 1.0), ("mxfp4", "floor", 7.9999995, 1.0), ("mxfp4", "floor", 3.9999998, 0.5),
    ("mxfp4", "even", 6.9999995, 1.0), ("mxfp4", "even", 7.0, 2.0), ("mxfp4", "even", 4.0, 1.0),
    ("mxfp4", "rceil", 6.0, 1.0), ("mxfp4", "rceil", 6.0000005, 2.0), ("mxfp4", "rceil", 7.9999995, 2.0),
    ("mxfp4", "ceil", 4.0, 1.0), ("mxfp4", "ceil", 4.0000005, 2.0), ("mxfp4", "ceil", 8.0, 2.0),
    ("mxfp8", "floor", 256.0, 1.0), ("mxfp8", "floor", 511.99997, 1.0),
    ("mxfp8", "even", 495.99997, 1.0), ("mxfp8", "even", 496.0, 2.0),
    ("mxfp8", "rceil", 448.0, 1.0), ("mxfp8", "rceil", 448.00003, 2.0),
    ("mxfp8", "ceil", 256.0, 1.0), ("mxfp8", "ceil", 256.00003, 2.0),
    ("mxfp4", "floor", 2.0**-125, 2.0**-127), ("mxfp4", "floor", 2.0**-149, 2.0**-127),
    ("mxfp4", "ceil", FLT_MAX, 2.0**126),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "rule", "amax", "scale"), SCALE_ROWS)
def test_scale_rule_doubles_at_its_threshold(fmt: str, rule: str, amax: float, scale: float) -> None:
    x = torch.zeros(32)
    x[5] = -amax
    step = {"mxfp4": 0.5, "mxfp8": 2.0**-9}[fmt]
    assert torch.equal(element_step(x, fmt, rule), torch.full((32,), scale * step))


def test_blocks_below_2_to_the_minus_124_are_exact() -> None:
    x = torch.zeros(32)
    x[:4] = torch.tensor([2.0**-128, 3 * 2.0**-128, -(2.0**-129), 2.0**-149])
    expected = torch.zeros(32)
    expected[:3] = torch.tensor([2.0**-128, 3 * 2.0**-128, -0.0])  # X = 2^-127, step 2^-128; the third is a tie
    assert_same(fake_quantize(x), expected)


def test_nvfp4_flushes_a_row_below_2_to_the_minus_100() -> None:
    x = torch.stack([torch.full((16,), -(2.0**-101)), torch.full((16,), 2.0**-100)])
    quantized = fake_quantize(x, "nvfp4")
    assert_same(quantized[0], torch.full((16,), -0.0))
    assert torch.equal(quantized[1], x[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("fmt", "rule"), MX)
def test_one_bad_element_makes_its_block_nan_and_no_other(fmt: str, rule: str, bad: float) -> None:
    x = sample("normal")
    x[3, 40] = bad
    nan = fake_quantize(x, fmt, rule).isnan()
    assert nan[3, 32:64].all()
    assert nan.sum() == 32


@pytest.mark.parametrize("per_tensor", [False, True])
def test_one_bad_element_makes_all_nan_under_its_nvfp4_scale(per_tensor: bool) -> None:
    x = sample("normal")
    x[3, 40] = math.inf
    nan = fake_quantize(x, "nvfp4", per_tensor=per_tensor).isnan()
    assert nan[3].all()
    assert nan.sum() == (x.numel() if per_tensor else x.shape[1])


@pytest.mark.parametrize(
    ("fmt", "rule", "sqnr"),
    [
        *(("mxfp4", "floor", 18.8), ("mxfp4", "even", 19.0), ("mxfp4", "rceil", 18.75), ("mxfp4", "ceil", 16.8)),
        ("nvfp4", "floor", 20.4),
    ],
)
def test_gaussian_noise_keeps_the_published_signal_to_noise_ratio(fmt: str, rule: str, sqnr: float) -> None:
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    error = fake_quantize(x, fmt, rule, per_tensor=True) - x
    assert 10 * math.log10(x.square().mean() / error.square().mean()) == pytest.approx(sqnr, abs=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind != "near_max"])
@pytest.mark.parametrize(("fmt", "rule"), MX)
def test_quantising_twice_changes_nothing(fmt: str, rule: str, kind: str, dtype: torch.dtype) -> None:
    once = fake_quantize(sample(kind, fmt, dtype), fmt, rule)
    assert_same(fake_quantize(once, fmt, rule), once)


# --- shapes, rows, memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", QUANTISED)
def test_a_row_does_not_depend_on_its_batch(fmt: str) -> None:
    x = sample("cauchy")
    together = fake_quantize(x, fmt)
    for row in range(0, len(x), 7):
        assert torch.equal(fake_quantize(x[row], fmt), together[row])


def test_one_nvfp4_scale_per_tensor_does_depend_on_the_other_rows() -> None:
    x = sample("cauchy")
    assert not torch.equal(fake_quantize(x, "nvfp4", per_tensor=True), fake_quantize(x, "nvfp4"))


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("fmt", QUANTISED)
def test_the_chunk_size_does_not_show(fmt: str, per_tensor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample("cauchy")
    expected = fake_quantize(x, fmt, per_tensor=per_tensor)
    for size in (1, 500, 2 * SHAPE[1]):
        monkeypatch.setattr(quantization, "_CHUNK", size)
        assert torch.equal(fake_quantize(x, fmt, per_tensor=per_tensor), expected)


@pytest.mark.parametrize("fmt", QUANTISED)
@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 0, 64), (3, 5, 64), (2, 3, 4, 96)])
def test_shape_and_dtype_are_kept(shape: tuple[int, ...], fmt: str) -> None:
    for dtype in DTYPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for out in (fake_quantize(x, fmt), element_step(x, fmt)):
            assert (out.shape, out.dtype) == (x.shape, x.dtype)
        assert torch.equal(fake_quantize(x, fmt).reshape(-1, shape[-1]), fake_quantize(x.reshape(-1, shape[-1]), fmt))


@pytest.mark.parametrize("fmt", QUANTISED)
def test_blocks_lie_along_the_last_axis_of_any_memory_layout(fmt: str) -> None:
    x = sample("cauchy")
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(fake_quantize(strided, fmt), fake_quantize(x, fmt))
    assert torch.equal(fake_quantize(x[:, 32:96], fmt), fake_quantize(x[:, 32:96].clone(), fmt))


def test_none_passes_the_tensor_itself() -> None:
    x = torch.randn(3, 5)
    assert fake_quantize(x, "none") is x
    assert ste_quantize(x, "none") is x


@pytest.mark.parametrize(("fmt", "block"), [("mxfp4", 32), ("mxfp8", 32), ("nvfp4", 16)])
def test_a_width_that_the_block_does_not_divide_is_an_error_with_a_remedy(fmt: str, block: int) -> None:
    for function in (fake_quantize, element_step):
        with pytest.raises(ValueError, match=f"multiple of {block}, but got 40; exclude"):
            function(torch.randn(2, 40), fmt)


def test_the_tables_have_the_names_of_the_config() -> None:
    assert set(FORMATS) == set(get_args(FormatName))
    assert all(name == form.name for name, form in FORMATS.items())
    assert set(SCALE_RULES) == set(get_args(ScaleRule)) == set(RULES)


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "rule"), ALL)
def test_values_are_multiples_of_the_step_and_some_are_one_step_from_zero(fmt: str, rule: str) -> None:
    x = sample("student_t2")
    x[:, ::2] *= 2.0**-13  # subnormals of E4M3
    count = fake_quantize(x, fmt, rule) / element_step(x, fmt, rule)
    tolerance = 1e-5 if fmt == "nvfp4" else 0.0
    torch.testing.assert_close(count, count.round(), rtol=tolerance, atol=0.0)
    assert 1 in count.round().abs()
    assert count.abs().max() <= {"mxfp4": 12, "mxfp8": 448 * 512, "nvfp4": 12.001}[fmt]


def test_the_step_of_a_bad_block_is_nan() -> None:
    x = torch.ones(64)
    x[0] = math.inf
    assert element_step(x, "mxfp4").isnan().sum() == 32


def test_the_nvfp4_step_follows_the_outer_scale_that_is_asked_for() -> None:
    x = sample("cauchy")
    count = fake_quantize(x, "nvfp4", per_tensor=True) / element_step(x, "nvfp4", per_tensor=True)
    torch.testing.assert_close(count.nan_to_num(), count.nan_to_num().round(), rtol=1e-5, atol=0.0)


def test_full_precision_has_no_step() -> None:
    with pytest.raises(ValueError, match="got none; count in another unit"):
        element_step(torch.ones(32), "none")


# --- the layer -------------------------------------------------------------------------------------------------------

PAIRS = [
    *(("mxfp4", "mxfp4"), ("mxfp4", "none"), ("mxfp4", "mxfp8"), ("nvfp4", "nvfp4")),
    *(("none", "mxfp4"), ("none", "none")),
]


def quant_linear(
    weights: str = "mxfp4", activations: str = "mxfp4", rule: str = "floor", bias: bool = True
) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_linear(
        nn.Linear(64, 48, bias=bias),
        name="q_proj",
        arithmetic=Arithmetic(weights=weights, activations=activations, scale_rule=rule),
    )


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["floor", "even"])
@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_gradients_are_products_with_the_quantised_operands(
    weights: str, activations: str, rule: str, dtype: torch.dtype, bias: bool
) -> None:
    layer, x = quant_linear(weights, activations, rule, bias).to(dtype), tokens(dtype)
    wq = fake_quantize(layer.weight, weights, rule, per_tensor=True).detach()
    xq = fake_quantize(x, activations, rule).detach()
    y = layer(x)
    assert torch.equal(y, F.linear(xq, wq, layer.bias))
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(g)
    assert x.grad is not None
    assert layer.weight.grad is not None
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(x.grad, g @ wq, rtol=close, atol=close)
    torch.testing.assert_close(layer.weight.grad, torch.einsum("bto,bti->oi", g, xq), rtol=close, atol=close)
    if bias:
        assert layer.bias.grad is not None
        torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)), rtol=close, atol=close)


def test_without_formats_the_layer_is_linear_bit_for_bit() -> None:
    layer = quant_linear("none", "none")
    plain = nn.Linear(64, 48)
    plain.load_state_dict(layer.state_dict())
    a, b = tokens(), tokens()
    ya, yb = layer(a), plain(b)
    assert torch.equal(ya, yb)
    ya.square().sum().backward()
    yb.square().sum().backward()
    for left, right in ((a, b), (layer.weight, plain.weight), (layer.bias, plain.bias)):
        assert left.grad is not None
        assert right.grad is not None
        assert torch.equal(left.grad, right.grad)


def kept_for_backward(layer: QuantLinear, x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    return kept


def test_only_the_quantised_operands_are_kept_for_backward() -> None:
    layer, x = quant_linear(), tokens()
    kept = sorted(kept_for_backward(layer, x), key=Tensor.numel)
    assert [t.numel() for t in kept] == [x.numel(), layer.weight.numel()]
    assert torch.equal(kept[0].reshape(x.shape), fake_quantize(x))
    wq = layer.quantized_weight()
    assert torch.equal(kept[1] if kept[1].shape == wq.shape else kept[1].t(), wq)


def test_a_frozen_weight_gets_no_gradient_and_its_input_is_not_kept() -> None:
    layer, x = quant_linear(), tokens()
    layer.weight.requires_grad_(False)
    assert [t.numel() for t in kept_for_backward(layer, x)] == [layer.weight.numel()]
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


def test_an_input_without_gradient_keeps_no_weight() -> None:
    layer, x = quant_linear(), tokens().detach()
    assert [t.numel() for t in kept_for_backward(layer, x)] == [x.numel()]
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("fmt", QUANTISED)
def test_the_straight_through_gradient_is_the_identity_even_where_values_saturate(fmt: str) -> None:
    x = sample("cauchy").requires_grad_()
    g = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    y = ste_quantize(x, fmt)
    assert torch.equal(y, fake_quantize(x, fmt))
    assert torch.equal(torch.autograd.grad(y, x, g)[0], g)


def test_fake_quantize_itself_has_no_gradient() -> None:
    assert not fake_quantize(tokens()).requires_grad


def test_an_input_that_is_quantised_already_is_left_alone() -> None:
    layer, x = quant_linear("mxfp4", "nvfp4"), tokens()
    layer.quantize_input = False
    assert torch.equal(layer(x), F.linear(x, layer.quantized_weight(), layer.bias))


def test_the_layer_shares_the_parameters_it_is_built_from() -> None:
    linear = nn.Linear(64, 48)
    before = torch.get_rng_state()
    layer = QuantLinear.from_linear(linear.eval(), name="lm_head")
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert torch.equal(torch.get_rng_state(), before)
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(("weights", "activations"), [("mxfp4", "none"), ("none", "mxfp8"), ("nvfp4", "mxfp4")])
def test_a_layer_that_cannot_be_quantised_is_named_together_with_the_remedy(weights: str, activations: str) -> None:
    message = r"layers\.3\.down_proj: .* multiple of 32, but got 48; name this layer in quant\.exclude"
    how = Arithmetic(weights=weights, activations=activations)
    with pytest.raises(ValueError, match=message):
        QuantLinear.from_linear(nn.Linear(48, 8), name="layers.3.down_proj", arithmetic=how)


def test_the_deployed_weight_is_used_as_it_is() -> None:
    layer, x = quant_linear(), tokens()
    noised = layer.quantized_weight() + 0.01
    with torch.no_grad():
        clean = layer(x)
        layer.deployed_weight = noised
        assert torch.equal(layer(x), F.linear(fake_quantize(x), noised, layer.bias))
        layer.deployed_weight = None
        assert torch.equal(layer(x), clean)


def test_training_never_sees_the_deployed_weight() -> None:
    layer = quant_linear()
    layer.deployed_weight = layer.quantized_weight()
    with pytest.raises(AssertionError, match="q_proj: training must not see the weights of the rollout"):
        layer(tokens())


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_deployed_weight_is_no_parameter_and_leaves_the_state_dict_alone(fmt: str) -> None:
    # A Parameter would be registered by nn.Module, and the class attribute would then hide it from the forward pass.
    layer = quant_linear(fmt)
    for _ in range(2):
        layer.deployed_weight = layer.quantized_weight()
        assert type(layer.deployed_weight) is Tensor
        assert list(layer.state_dict()) == ["weight", "bias"]
        assert len(list(layer.parameters())) == 2
        layer.deployed_weight = None


def test_nvfp4_weights_have_one_outer_scale_and_activations_one_per_token() -> None:
    layer, x = quant_linear("nvfp4", "nvfp4"), tokens()
    assert torch.equal(layer.quantized_weight(), fake_quantize(layer.weight, "nvfp4", per_tensor=True))
    assert not torch.equal(layer.quantized_weight(), fake_quantize(layer.weight, "nvfp4"))
    xq = torch.stack([fake_quantize(row, "nvfp4") for row in x.detach().reshape(-1, 64)]).reshape(x.shape)
    assert torch.equal(layer(x), F.linear(xq, layer.quantized_weight(), layer.bias))


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 32), (3, 0), (2, 0, 64)])
def test_nothing_quantises_to_nothing(fmt: str, per_tensor: bool, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert fake_quantize_eager(x, fmt, per_tensor=per_tensor).shape == shape
    assert fake_quantize(x, fmt).shape == shape
    assert element_step(x, fmt, per_tensor=per_tensor).shape == shape

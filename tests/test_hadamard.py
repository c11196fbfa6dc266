"""The Hadamard rotation against matrices of float64 and a transform of numpy's, in every place where an operand is
made."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn
from torch.nn import functional as F

import trainable.hadamard
from spaces.config import Format, ModelConfig, QuantConfig
from tests.conftest import ModelFolder
from tests.quantised_samples import CLASSES, assert_same, sample
from tests.test_arithmetic import IDS, policy_of
from tests.test_quantization import oracle
from trainable.hadamard import rotate, rotate_eager
from trainable.kernels import cpu
from trainable.packing import no_packed_form
from trainable.policy.loading import load_policy
from trainable.policy.policy import deployed
from trainable.quantization import Arithmetic, QuantLinear, fake_quantize

MATRIX = torch.from_numpy(hadamard(32) / np.sqrt(32))
PAIRS: list[tuple[Format, Format]] = [
    *(("mxfp4", "mxfp4"), ("mxfp4", "none"), ("none", "mxfp4"), ("mxfp4", "mxfp8")),
    *(("nvfp4", "nvfp4"), ("mxfp8", "mxfp8")),
]


def exact(x: Tensor) -> Tensor:
    """x H in float64."""
    blocks = x.detach().double().reshape(*x.shape[:-1], -1, 32)
    return (blocks @ MATRIX).reshape(x.shape)


def by_numpy(x: Tensor) -> Tensor:
    """The transform, written apart: recursive, in numpy's float32, halves first; rounded to the dtype of x."""

    def halves(v: Any) -> Any:
        if v.shape[-1] == 1:
            return v
        a, b = np.split(v, 2, axis=-1)
        return np.concatenate([halves(a + b), halves(a - b)], axis=-1)

    blocks = x.detach().float().numpy().reshape(*x.shape[:-1], -1, 32)
    turned = halves(blocks) * np.float32(32**-0.5)
    return torch.from_numpy(turned.reshape(x.shape)).to(x.dtype)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- the rotation -----------------------------------------------------------------------------------------------------


def test_it_is_sylvester_s_matrix_its_own_transpose_and_inverse() -> None:
    torch.testing.assert_close(MATRIX @ MATRIX, torch.eye(32).double())
    assert torch.equal(MATRIX, MATRIX.T)
    torch.testing.assert_close(rotate(torch.eye(32)).double(), MATRIX, rtol=1e-7, atol=0)
    assert torch.equal(rotate(2.0**-20 * torch.eye(96)).ne(0).sum(-1), torch.full((96,), 32)), "blocks are turned apart"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_all_ways_have_the_bits_of_the_plain_transform(kind: str, dtype: torch.dtype, threads: int) -> None:
    """Also for NaN, Inf, subnormals and zeros of either sign."""
    x, before = sample(kind, dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with np.errstate(all="ignore"):
            expected = by_numpy(x)
        for way in (rotate, rotate_eager):
            assert_same(way(x), expected)
            assert_same(way(x[5]), expected[5])
            assert_same(way(x.t().contiguous().t()), expected)
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_it_is_eager_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = drawn(5, 96).requires_grad_(), drawn(5, 96, seed=1)
    expected = rotate(x), torch.autograd.grad(rotate(x), x, g)[0]
    monkeypatch.setattr(trainable.hadamard.cpu, "load", lambda: None)
    y = rotate(x)
    assert torch.equal(y, expected[0])
    assert torch.equal(torch.autograd.grad(y, x, g)[0], expected[1])
    assert torch.equal(expected[1], rotate(g)), "symmetric"


def test_its_gradient_has_a_gradient_or_says_that_it_has_none() -> None:
    """Never one that lacks a part without a word."""
    narrow = drawn(2, 32, dtype=torch.bfloat16).requires_grad_()
    (first,) = torch.autograd.grad(rotate(narrow).square().sum(), narrow, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), narrow)
    torch.testing.assert_close(second, torch.full_like(narrow, 2.0), rtol=2e-2, atol=2e-2)
    x = drawn(2, 32).requires_grad_()
    with pytest.raises(NotImplementedError, match="has none of its own"):
        torch.autograd.grad(rotate(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 32), (1, 32)])
def test_shapes_stay(shape: tuple[int, ...]) -> None:
    for way in (rotate, rotate_eager):
        assert way(torch.zeros(shape)).shape == shape


def test_blocks_that_do_not_fit_are_refused() -> None:
    for way in (rotate, rotate_eager):
        with pytest.raises(
            ValueError, match="a Hadamard rotation needs a last dim that is a multiple of 32, but got 48; exclude it"
        ):
            way(torch.zeros(2, 48))
    kernels, x = cpu.load(), torch.zeros(2, 48)
    assert kernels is not None
    for fused in (
        lambda: kernels.swiglu(x, x, -1, 0, True),
        lambda: kernels.rms_norm(x, None, x[0], 1e-6, -1, 0, True),
    ):
        with pytest.raises(ValueError, match="multiple of 32, but got 48"):
            fused()


def test_it_takes_the_dead_zone_away_where_there_are_outliers() -> None:
    x = drawn(4096, 64)
    x[:, ::32] *= 30
    flushed = [(fake_quantize(y) == 0).double().mean().item() for y in (x, rotate(x))]
    assert flushed[0] > 0.5
    assert flushed[1] < 0.15


# --- the layer --------------------------------------------------------------------------------------------------------


def q(x: Tensor, fmt: str, rule: str, *, per_tensor: bool = False) -> Tensor:
    """The operand of a rotated x by the test's own transform and quantiser."""
    turned = by_numpy(x)
    if fmt == "none":
        return turned
    return oracle(turned.reshape(-1, x.shape[-1]), fmt, rule, per_tensor).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["floor", "even"])
@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_a_layer_multiplies_rotated_operands_and_its_gradients_turn_back(
    weights: Format, activations: Format, rule: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    how = Arithmetic(weights=weights, activations=activations, scale_rule=rule, hadamard=True)
    layer = QuantLinear.from_linear(nn.Linear(96, 48), name="q_proj", arithmetic=how).to(dtype)
    x = drawn(2, 5, 96, seed=1, dtype=dtype).requires_grad_()
    wq, xq = q(layer.weight, weights, rule, per_tensor=True), q(x, activations, rule)
    assert torch.equal(layer.quantized_weight(), wq)
    y, g = layer(x), drawn(2, 5, 48, seed=2, dtype=dtype)
    assert torch.equal(y, F.linear(xq, wq, layer.bias))
    with torch.no_grad():
        layer.deployed_weight = layer.quantized_weight()
        assert torch.equal(layer(x), y)
        layer.deployed_weight = None
    y.backward(g)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert x.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(x.grad.double(), exact(g.double() @ wq.double()), rtol=close, atol=close)
    expected = exact(torch.einsum("bto,bti->oi", g.double(), xq.double()))
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=close, atol=close)


def test_the_product_stays_what_it_was_where_nothing_is_rounded() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), drawn(7, 64, seed=1)
    layer = QuantLinear.from_linear(
        linear, name="o_proj", arithmetic=Arithmetic(weights="none", activations="none", hadamard=True)
    )
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)


def test_what_an_adapter_sees_is_the_rounded_input_in_the_models_own_basis() -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 8), name="q_proj", arithmetic=Arithmetic(hadamard=True))
    x = drawn(7, 64)
    operand = q(x, "mxfp4", "floor")
    torch.testing.assert_close(layer.seen(x).double(), exact(operand), rtol=1e-6, atol=1e-6)
    layer.quantize_input = False
    torch.testing.assert_close(layer.seen(operand).double(), exact(operand), rtol=1e-6, atol=1e-6)
    assert (layer.seen(operand) - x).abs().max() < 1.0 < (operand - x).abs().max(), "x again, but for its rounding"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_and_their_gradients_are_in_the_models_own_basis(
    model_folder: ModelFolder, dtype: str, shared: bool
) -> None:
    """An adapter's product and gradients, from the input that its layer is given, by float64."""
    policy = policy_of(
        model_folder("qwen2"), Arithmetic(hadamard=True), adapter="lora", lora_rank=4, lora_alpha=8.0, dtype=dtype
    )
    name = "model.layers.0.self_attn.v_proj"
    linear, adapted = policy.linears[name], policy.model.get_submodule(f"base_model.model.{name}")
    linear.quantize_input = not shared
    x = drawn(2, 5, linear.in_features, dtype=getattr(torch, dtype))
    operand = q(x, "mxfp4", "floor")
    given = (operand if shared else x).clone().requires_grad_()
    first, second = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight  # type: ignore[union-attr,index]
    y, g = adapted(given), drawn(2, 5, linear.out_features, seed=1, dtype=getattr(torch, dtype))
    y.backward(g)
    wq, seen, up = q(linear.weight, "mxfp4", "floor", per_tensor=True).double(), exact(operand), g.double()
    expected = operand.double() @ wq.T + linear.bias.double() + 2.0 * seen @ first.double().T @ second.double().T
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(y.double(), expected, **close)
    torch.testing.assert_close(
        first.grad.double(), 2.0 * torch.einsum("btr,bti->ri", up @ second.double(), seen), **close
    )
    torch.testing.assert_close(
        second.grad.double(), 2.0 * torch.einsum("bto,btr->or", up, seen @ first.double().T), **close
    )
    through = up @ wq  # in the basis of the operand; the adapter's is in the model's
    beside = 2.0 * up @ second.double() @ first.double()
    wanted = through + exact(beside) if shared else exact(through) + beside
    assert given.grad is not None
    torch.testing.assert_close(given.grad.double(), wanted, **close)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"exclude": ()}, {"skip_layers": (0, -1)}, {"weights": "nvfp4", "activations": "nvfp4"}], ids=str
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_its_layers(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], tied: bool
) -> None:
    """transformers' model of plain linear layers, each with operands of the test's own making, against ours, fused and
    deployed."""
    folder = model_folder("qwen2", tied=tied)
    quant = QuantConfig(hadamard=True, **options)
    policy = load_policy(ModelConfig(name=folder), quant, seed=0)
    theirs = load_policy(ModelConfig(name=folder), QuantConfig(weights="none", activations="none"), seed=0)
    for name in policy.quantized:
        layer = theirs.model.get_submodule(name)

        def forward(x: Tensor, layer: Any = layer) -> Tensor:
            weight = q(layer.weight, quant.weights, "floor", per_tensor=True)
            return F.linear(q(x, quant.activations, "floor"), weight, layer.bias)

        monkeypatch.setattr(layer, "forward", forward)
    with torch.no_grad():
        expected = theirs.model(input_ids=IDS).logits
        assert torch.equal(policy.model(input_ids=IDS).logits, expected)
    with deployed(policy):
        assert torch.equal(policy.model(input_ids=IDS).logits, expected)
    plain = load_policy(ModelConfig(name=folder), quant.model_copy(update={"hadamard": False}), seed=0)
    with torch.no_grad():
        assert not torch.equal(plain.model(input_ids=IDS).logits, expected)
    assert policy.arithmetic == (replace(plain.arithmetic[0], hadamard=True),), "the receipt says so"


def test_a_layer_that_cannot_be_rotated_is_named_together_with_the_remedy() -> None:
    message = (
        r"layers\.3\.down_proj: a Hadamard rotation needs in_features .* multiple of 32, but got 48; "
        r"name this layer in quant\.exclude"
    )
    with pytest.raises(ValueError, match=message):
        QuantLinear.from_linear(nn.Linear(48, 8), name="layers.3.down_proj", arithmetic=NVFP4)


NVFP4 = Arithmetic(weights="nvfp4", activations="nvfp4", hadamard=True)


def test_what_other_programs_cannot_say_is_not_packed() -> None:
    assert no_packed_form(Arithmetic()) == ""
    assert no_packed_form(Arithmetic(hadamard=True)).startswith("inputs are turned by a Hadamard matrix")


def test_a_rotation_without_a_use_is_refused() -> None:
    with pytest.raises(ValueError, match="hadamard=true does nothing where nothing is quantised"):
        QuantConfig(weights="none", activations="none", hadamard=True)

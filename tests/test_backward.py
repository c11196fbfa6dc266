"""`quant.backward`: gradients are products with the operands before quantisation, and the forward pass is what it was.

The reference is q + p - p.detach(), where q has no gradient and p is the plain product: the bits of q, the gradients of
p.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spaces.config import Format, ModelConfig, QuantConfig
from tests.conftest import ModelFolder
from tests.test_arithmetic import IDS, assert_equal, learned, policy_of
from trainable.kernels import cpu
from trainable.packing import no_packed_form
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, computing, deployed
from trainable.quantization import Arithmetic, QuantLinear

HIGH = Arithmetic(backward="high_precision")
PAIRS: list[tuple[Format, Format]] = [
    *(("mxfp4", "mxfp4"), ("mxfp4", "none"), ("none", "mxfp4"), ("mxfp4", "mxfp8")),
    *(("nvfp4", "nvfp4"), ("mxfp8", "mxfp8")),
]


def reference(x: Tensor, linear: nn.Linear, how: Arithmetic) -> Tensor:
    plain = F.linear(x, linear.weight, linear.bias)
    quantized = F.linear(how.input.of(x.detach()), how.weight.of(linear.weight.detach()), linear.bias)
    return plain - plain.detach() + quantized.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_a_layer_has_the_gradients_of_its_unquantised_operands(
    weights: Format, activations: Format, hadamard: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 48).to(dtype)
    how = Arithmetic(weights=weights, activations=activations, hadamard=hadamard, backward="high_precision")
    layer = QuantLinear.from_linear(linear, name="q_proj", arithmetic=how)
    x, g = torch.randn(2, 5, 96).to(dtype).requires_grad_(), torch.randn(2, 5, 48).to(dtype)
    leaves = (x, linear.weight, linear.bias)
    y, theirs = layer(x), reference(x, linear, how)
    assert torch.equal(y, theirs)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    expected = (
        g.double() @ linear.weight.double(),
        torch.einsum("bto,bti->oi", g.double(), x.double()),
        g.double().sum((0, 1)),
    )
    for ours, plain, exact in zip(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(theirs, leaves, g), expected, strict=True
    ):
        torch.testing.assert_close(ours, plain, **close)
        torch.testing.assert_close(ours.double(), exact, **close)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        layer.deployed_weight = layer.quantized_weight()
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize(
    ("options", "kept"),
    [("both", [("x", 960), ("weight", 4608)]), ("frozen", [("weight", 4608)]), ("first", [("x", 960)])],
)
def test_only_the_operands_that_a_gradient_needs_are_kept(options: str, kept: list[tuple[str, int]]) -> None:
    layer = QuantLinear.from_linear(nn.Linear(96, 48), name="q_proj", arithmetic=HIGH)
    layer.weight.requires_grad_(options != "frozen")
    x = torch.randn(2, 5, 96, requires_grad=options != "first")
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.detach()) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(x)
    assert sorted(t.numel() for t in found) == [count for _, count in kept]
    assert {t.data_ptr() for t in found} == {(x if name == "x" else layer.weight).data_ptr() for name, _ in kept}, (
        "nothing is copied"
    )


def by_reference(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Policy:
    for name in policy.quantized:
        layer, how = policy.linears[name], policy.linears[name].arithmetic
        monkeypatch.setattr(layer, "forward", lambda x, layer=layer, how=how: reference(x, layer, how))
        layer.compute_as(Arithmetic(weights="none", activations="none"))
    with computing(policy, {}):  # which decides who shares an input
        pass
    return policy


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exclude": ()},
        {"hadamard": True, "skip_layers": (0,)},
        {"activations": "none", "hadamard": True},
        {"weights": "none"},
    ],
    ids=str,
)
def test_a_model_learns_by_the_gradients_of_the_reference(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], fused: bool
) -> None:
    if not fused:
        monkeypatch.setattr(cpu, "load", lambda: None)
    model = ModelConfig(name=model_folder("qwen2", tied=not options))
    quant = QuantConfig(backward="high_precision", **options)
    policy = load_policy(model, quant, seed=0)
    ours, theirs = learned(policy), learned(by_reference(load_policy(model, quant, seed=0), monkeypatch))
    assert_equal(ours, theirs)
    straight = learned(load_policy(model, quant.model_copy(update={"backward": "dequantized"}), seed=0))
    assert torch.equal(ours["logits"], straight["logits"]), "the forward pass is the same"
    apart = max(((ours[n] - straight[n]).abs().max() / straight[n].abs().max()).item() for n in ours if n != "logits")
    assert apart > 0.01, "the backward pass is not"
    with deployed(policy):
        assert torch.equal(policy.model(input_ids=IDS).logits, ours["logits"])
    assert [how.backward for how in policy.arithmetic] == ["high_precision"], "the receipt says so"


def test_with_adapters_the_frozen_weight_itself_carries_the_gradient(model_folder: ModelFolder) -> None:
    """And an adapter has its own: exact, by the rounded input that it sees."""
    policy = policy_of(model_folder("qwen2"), HIGH, adapter="lora", lora_rank=4, lora_alpha=8.0)
    name = "model.layers.1.self_attn.q_proj"
    linear, adapted = policy.linears[name], policy.model.get_submodule(f"base_model.model.{name}")
    first, second = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight  # type: ignore[union-attr,index]
    x, g = torch.randn(2, 5, linear.in_features, requires_grad=True), torch.randn(2, 5, linear.out_features)
    y = adapted(x)
    seen = HIGH.input.of(x.detach())
    torch.testing.assert_close(
        y, F.linear(seen, linear.quantized_weight(), linear.bias) + 2 * seen @ first.T @ second.T
    )
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ linear.weight + 2 * g @ second @ first)
    torch.testing.assert_close(first.grad, 2 * torch.einsum("btr,bti->ri", g @ second, seen))
    assert linear.weight.grad is None


def test_how_it_was_learned_changes_nothing_that_is_taken_away() -> None:
    assert no_packed_form(HIGH) == ""
    assert HIGH.input == Arithmetic().input
    assert HIGH.weight == Arithmetic().weight

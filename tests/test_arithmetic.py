"""How layers compute, and who quantises what they share: under any arithmetic, sharing an input changes no bit."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from spaces.config import Backward, Format, ModelConfig, QuantConfig, ScaleRule
from tests.conftest import ModelFolder
from trainable.engines.engine import CONFIG_FILE, arithmetic_of, quantization_tree
from trainable.kernels import cpu
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, computing, deployed, unquantized, unshared
from trainable.quantization import AS_IT_IS, UNQUANTIZED, Arithmetic, InputSource, QuantLinear

IDS = torch.tensor([[3, 4, 12, 5, 14, 7], [9, 1, 1, 13, 2, 8]])
W4A4 = Arithmetic()
W4A8 = Arithmetic(activations="mxfp8")
CHOICES: dict[str, tuple[Any, ...]] = {
    "weights": get_args(Format),
    "activations": get_args(Format),
    "scale_rule": get_args(ScaleRule),
    "hadamard": (False, True),
    "backward": get_args(Backward),
}


def policy_of(folder: str, arithmetic: Arithmetic = W4A4, **model: Any) -> Policy:
    policy = load_policy(
        ModelConfig(name=folder, **model), QuantConfig(exclude=("lm_head",), **asdict(arithmetic)), seed=0
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if ".lora_B." in name:  # which begin at zero
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return policy


def sources(policy: Policy) -> dict[str, InputSource]:
    return {name: module for name, module in policy.model.named_modules() if isinstance(module, InputSource)}


def state(policy: Policy) -> list[Any]:
    """All that says how the policy computes."""
    layers = [(name, layer.arithmetic, layer.quantize_input) for name, layer in policy.linears.items()]
    return [*layers, *((name, source.apart, source.output) for name, source in sources(policy).items())]


def learned(policy: Policy) -> dict[str, Tensor]:
    """Logits, and every gradient."""
    policy.model.zero_grad()
    logits = policy.model(input_ids=IDS).logits
    logits.float().square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}
    assert len(gradients) == len(policy.trainable())
    return {"logits": logits.detach(), **gradients}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, gradients: bool = True) -> None:
    """Every bit forward. Gradients of a shared input are added up before and not after they pass the norm: in another
    order."""
    assert torch.equal(ours["logits"], theirs["logits"])
    for name, tensor in ours.items() if gradients else ():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5 * scale + 1e-30, msg=name)


def any_arithmetic(draw: random.Random) -> Arithmetic:
    chosen = {name: draw.choice(options) for name, options in CHOICES.items()}
    return Arithmetic(**chosen)


# --- records ----------------------------------------------------------------------------------------------------------


def test_every_part_of_an_arithmetic_is_a_setting_and_has_its_default() -> None:
    assert {field.name for field in fields(Arithmetic)} == set(CHOICES) <= set(QuantConfig.model_fields)
    assert Arithmetic.of(QuantConfig()) == Arithmetic()


def test_a_rule_that_a_format_does_not_know_makes_no_other_operand() -> None:
    assert Arithmetic(activations="none", scale_rule="even").input == AS_IT_IS
    assert Arithmetic(activations="nvfp4", scale_rule="ceil").input == Arithmetic(activations="nvfp4").input
    assert Arithmetic(scale_rule="ceil").input != Arithmetic().input
    assert Arithmetic(activations="none", hadamard=True).input != AS_IT_IS, "it is turned, though not rounded"
    assert Arithmetic().input != Arithmetic().weight, "nvfp4 tells them apart"


def test_arithmetic_survives_the_file_beside_a_model_layer_by_layer(model_folder: ModelFolder) -> None:
    policy = policy_of(model_folder())
    draw = random.Random(0)
    chosen = {name: any_arithmetic(draw) for name in policy.linears}
    with computing(policy, chosen):
        tree = quantization_tree(policy.linears, synced=False)
    assert arithmetic_of(tree) == chosen
    with pytest.raises(ValueError, match=rf"{CONFIG_FILE}: version 1 is of another rin-search; export the model again"):
        arithmetic_of(tree | {"version": 1})


# --- who quantises a shared input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "model", [{}, {"adapter": "lora", "lora_rank": 4}, {"dtype": "bfloat16"}], ids=["full", "lora", "bf16"]
)
@pytest.mark.parametrize("seed", range(3))
def test_sharing_changes_no_bit_whatever_each_layer_computes(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], fused: bool, seed: int
) -> None:
    """One arithmetic in all layers of a block, another in some of them: some inputs are shared and some are not."""
    if not fused:
        monkeypatch.setattr(cpu, "load", lambda: None)
    policy = policy_of(model_folder("qwen2"), **model)
    draw = random.Random(seed)
    of_block = {block: any_arithmetic(draw) for block in range(policy.depth)}
    chosen = {name: of_block[int(name.split(".")[2])] for name in policy.linears}
    chosen |= {name: any_arithmetic(draw) for name in draw.sample(list(chosen), 3)}
    with computing(policy, chosen):
        ours = learned(policy)
        with deployed(policy):
            logits = policy.model(input_ids=IDS).logits
        with unshared(policy):
            assert all(layer.quantize_input for layer in policy.linears.values())
            theirs = learned(policy)
    assert torch.equal(ours["logits"], logits), "generation computes what training does"
    assert_equal(ours, theirs, gradients=not model.get("dtype"))


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize(
    ("reader", "siblings"),
    [
        ("self_attn.k_proj", ("self_attn.q_proj", "self_attn.v_proj")),
        ("mlp.up_proj", ("mlp.gate_proj",)),
        ("mlp.down_proj", ()),
    ],
)
def test_one_reader_that_computes_otherwise_ends_the_sharing_of_its_input_alone(
    model_folder: ModelFolder, adapter: str, reader: str, siblings: tuple[str, ...]
) -> None:
    policy = policy_of(model_folder("qwen2"), adapter=adapter)
    before = state(policy)
    apart = {name for name, layer in policy.linears.items() if layer.quantize_input}
    assert apart == {name for name in policy.linears if name.endswith("o_proj")}
    own = f"model.layers.1.{reader}"
    with computing(policy, {own: W4A8}):
        now = {name for name, layer in policy.linears.items() if layer.quantize_input}
        assert now - apart == ({own, *(f"model.layers.1.{name}" for name in siblings)} if siblings else set())
        assert policy.linears[own]._input == W4A8.input
        ours = learned(policy)
        with unshared(policy):
            assert_equal(ours, learned(policy))
    assert state(policy) == before
    with computing(policy, {own: Arithmetic(weights="nvfp4")}):
        assert {name for name, layer in policy.linears.items() if layer.quantize_input} == apart, (
            "weights are nobody's input"
        )


def test_contexts_within_contexts_decide_anew_and_restore_what_was(model_folder: ModelFolder) -> None:
    policy = policy_of(model_folder("qwen2"))
    start = state(policy)
    queries = "model.layers.0.self_attn.q_proj"
    with computing(policy, W4A8):
        second = state(policy)
        with computing(policy, {queries: UNQUANTIZED}):
            third = state(policy)
            with unshared(policy):
                with unquantized(policy), computing(policy, {queries: W4A8}):
                    assert all(layer.quantize_input for layer in policy.linears.values()), "still unshared"
                    with unshared(policy):
                        pass
                    assert all(layer.quantize_input for layer in policy.linears.values()), "still unshared"
                assert [name for name, layer in policy.linears.items() if layer.arithmetic == UNQUANTIZED] == [queries]
            assert state(policy) == third
        assert state(policy) == second
    assert state(policy) == start
    assert len({str(one) for one in (start, second, third)}) == 3


def test_a_reader_that_wants_its_input_itself_gets_it(model_folder: ModelFolder) -> None:
    """Whoever else reads the norm: an operand made in front of them would be all that is left of the input."""
    policy = policy_of(model_folder("qwen2"))
    up = "model.layers.1.mlp.up_proj"

    def sharing(**changes: Any) -> bool:
        with computing(policy, {up: replace(W4A4, backward="high_precision", **changes)}):
            return not policy.linears["model.layers.1.mlp.gate_proj"].quantize_input

    assert not sharing()
    with computing(policy, {"model.layers.1.mlp.gate_proj": Arithmetic(activations="none")}):
        assert sharing(activations="none"), "an input that is its own operand"


@contextmanager
def fails() -> Iterator[None]:
    with pytest.raises(RuntimeError, match="in between"):
        yield


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_all_is_restored_exactly_on_error(model_folder: ModelFolder, adapter: str) -> None:
    policy = policy_of(model_folder("qwen2"), adapter=adapter)
    before, logits = state(policy), learned(policy)["logits"]
    with fails(), computing(policy, W4A8), unshared(policy), unquantized(policy):
        raise RuntimeError("in between")
    assert state(policy) == before
    assert torch.equal(learned(policy)["logits"], logits)


def test_arithmetic_that_does_not_fit_a_layer_names_it_and_changes_nothing(model_folder: ModelFolder) -> None:
    policy = policy_of(model_folder("qwen2"), UNQUANTIZED)
    before = state(policy)
    first, *_, last = policy.linears
    policy.linears[last].in_features = 48
    with (
        pytest.raises(ValueError, match=rf"{last}: mxfp4 needs in_features .* but got 48"),
        computing(policy, {first: W4A8, last: W4A8}),
    ):
        pass
    assert state(policy) == before
    with pytest.raises(KeyError, match="nobody"), computing(policy, {"nobody": W4A8}):
        pass


def test_arithmetic_does_not_change_under_deployed_weights(model_folder: ModelFolder) -> None:
    """They would stay what they were."""
    policy = policy_of(model_folder("qwen2"))
    with deployed(policy), pytest.raises(AssertionError, match="deployed in another arithmetic"), unquantized(policy):
        pass


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("loaded", [UNQUANTIZED, Arithmetic(activations="none"), Arithmetic()], ids=str)
def test_any_policy_can_compute_as_any_other_does(model_folder: ModelFolder, loaded: Arithmetic, adapter: str) -> None:
    """It was decided when a policy was loaded who quantises, and loading unquantised was then of no use."""
    folder = model_folder("qwen2")
    policy = policy_of(folder, loaded, adapter=adapter)
    for wanted in (Arithmetic(), W4A8, UNQUANTIZED, Arithmetic(weights="nvfp4", activations="nvfp4")):
        with computing(policy, dict.fromkeys(policy.linears, wanted)):
            assert torch.equal(learned(policy)["logits"], learned(policy_of(folder, wanted, adapter=adapter))["logits"])


def test_a_layer_outside_of_any_source_quantises_for_itself(model_folder: ModelFolder) -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 8), name="alone")
    assert layer.quantize_input
    assert layer.arithmetic == Arithmetic()
    layer.compute_as(replace(layer.arithmetic, activations="none"))
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.quantized_weight(), layer.bias))

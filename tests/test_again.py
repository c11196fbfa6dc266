"""What is made again in the backward pass is the same bit for bit, and is not kept for it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

import trainable.forward.logps
from spaces.config import ModelConfig, QuantConfig
from tests.conftest import ModelFolder, ragged_prompts, sampled_groups
from trainable import again
from trainable.again import remaking, remember
from trainable.forward.logps import Batch, completion_logps, make_batch
from trainable.forward.transformer import head_size
from trainable.kernels import cpu
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, decoder_blocks, unquantized, unshared


def loaded(folder: str, adapter: Any = "full", attention: Any = "sdpa", **quant: Any) -> tuple[Policy, Batch]:
    policy = load_policy(ModelConfig(name=folder, adapter=adapter, attention=attention), QuantConfig(**quant), seed=0)
    groups = sampled_groups(policy, ragged_prompts(3))
    return policy, make_batch(policy, groups, torch.arange(12.0).view(3, 4))


def learned(policy: Policy, batch: Batch) -> list[Tensor]:
    """Log-probs and gradients."""
    logps = completion_logps(policy, batch, 1.0)
    parameters = list(policy.trainable().values())
    gradients = torch.autograd.grad((logps * batch.mask * batch.advantages[:, None]).sum(), parameters)
    return [logps.detach(), *gradients]


def all_of_it(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """However small a tensor is; gives what autograd kept."""
    kept: list[Any] = []
    pack = again._pack

    def spy(tensor: Tensor) -> Any:
        kept.append(pack(tensor))
        return kept[-1]

    monkeypatch.setattr(again, "_pack", spy)
    for module in (again, trainable.forward.logps):
        monkeypatch.setattr(module, "AT_LEAST", 1)
    return kept


@pytest.mark.parametrize(
    "quant",
    [{}, {"hadamard": True}, {"backward": "high_precision"}, {"activations": "none"}, {"weights": "nvfp4"}],
    ids=str,
)
@pytest.mark.parametrize(("adapter", "kernels"), [("full", True), ("lora", True), ("full", False)])
def test_log_probs_and_gradients_are_the_same_bit_for_bit(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, adapter: Any, quant: Any, kernels: bool
) -> None:
    if not kernels:
        monkeypatch.setattr(cpu, "load", lambda: None)
    policy, batch = loaded(model_folder(), adapter, **quant)
    packed, alone = learned(policy, batch), learned(policy, replace(batch, group_size=1))
    kept = all_of_it(monkeypatch)
    for before, way in ((packed, batch), (alone, replace(batch, group_size=1))):
        kept.clear()
        after = learned(policy, way)
        assert any(not isinstance(one, again._AsItWas) for one in kept) or quant == {"activations": "none"}
        assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_no_operand_of_a_product_that_can_be_made_again_is_kept(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, adapter: Any
) -> None:
    """Of a block: the residual stream twice, queries, keys, values, what attention gives (and the logarithms of its
    sums), gate and up; the cosines and sines of all of them once; and no quantised weight."""
    policy, batch = loaded(model_folder(), adapter)
    kept = all_of_it(monkeypatch)
    completion_logps(policy, replace(batch, group_size=1), 1.0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    network = policy.network.config
    rows = int((batch.prompt_lengths + batch.lengths).max()) * len(batch)
    as_they_were = [one.numbers for one in kept if isinstance(one, again._AsItWas)]
    alive = {one.untyped_storage().data_ptr(): one for one in as_they_were}
    inner = [one for key, one in alive.items() if key not in weights and one.numel() % rows == 0]
    width = sum(one.numel() for one in inner) / rows / policy.depth
    attended = network.num_attention_heads * head_size(network)
    given = attended + 2 * network.num_key_value_heads * head_size(network)
    wanted = 2 * network.hidden_size + given + attended + 2 * network.intermediate_size
    adapters = 7 * ModelConfig().lora_rank if adapter == "lora" else 0
    assert (
        wanted <= width <= wanted + adapters + network.num_attention_heads + 2 + 3 * network.hidden_size / policy.depth
    )


def test_a_recipe_is_not_taken_for_what_was_changed_or_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "AT_LEAST", 1)
    x = torch.ones(4, requires_grad=True)
    with remaking():
        y = remember(x * 2, lambda given: given * 3, x)  # a wrong recipe shows whether it is followed
        assert torch.autograd.grad((y * y).sum(), x, retain_graph=True)[0].tolist() == [2 * 2 * 3.0] * 4
        z = remember(x * 2, lambda given: given * 3, x)
        z += 1
        assert torch.autograd.grad((z * z).sum(), x)[0].tolist() == [2 * 2 * 3.0] * 4
        assert id(z.untyped_storage()) in (again._recipes or {})
        w = z.detach()
        del z
        assert isinstance(again._pack(w), again._AsItWas)


@pytest.mark.parametrize("attention", ["sdpa", "eager"], ids=["our forward", "transformers'"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_block_that_is_computed_again_gives_the_same_gradients(
    model_folder: ModelFolder, attention: Any, adapter: Any
) -> None:
    policy, batch = loaded(model_folder(), adapter, attention)
    calls: Counter[str] = Counter()
    for name, block in enumerate(decoder_blocks(policy)):
        block.get_submodule("mlp").register_forward_pre_hook(lambda *_, name=f"{name}": calls.update([name]))
    results = []
    for checkpoints in (False, True):
        calls.clear()
        results.append(learned(replace(policy, checkpoints=checkpoints), batch))
        assert calls == dict.fromkeys(map(str, range(policy.depth)), 1 + checkpoints)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert "forward" not in vars(decoder_blocks(policy)[0])


@pytest.mark.parametrize(("adapter", "kernels"), [("full", True), ("lora", True), ("full", False)])
@pytest.mark.parametrize(
    "changed", ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.1.input_layernorm", "norm", "lm_head"]
)
def test_a_weight_that_changed_before_the_backward_pass_is_an_error(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, changed: str, adapter: Any, kernels: bool
) -> None:
    """A quantised one, an excluded one, a norm's and the head's: made again or kept."""
    if not kernels:
        monkeypatch.setattr(cpu, "load", lambda: None)
    policy, batch = loaded(model_folder(), adapter, exclude=("lm_head", "*.down_proj"))
    all_of_it(monkeypatch)
    loss = completion_logps(policy, batch, 1.0).sum()
    network = policy.network
    with torch.no_grad():
        (network if changed == "lm_head" else network.model).get_submodule(changed).weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="was changed before the backward pass"):
        loss.backward()


def test_a_kept_tensor_that_changed_before_the_backward_pass_is_an_error() -> None:
    w, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    with remaking():
        y = w * 1.0
        z = y * x
    y.add_(5)
    with pytest.raises(RuntimeError, match=r"a tensor \[3\] of the forward pass was changed before the backward pass"):
        z.sum().backward()


def test_what_autograd_keeps_goes_with_a_graph_that_nobody_followed() -> None:
    """Also the result of the node that keeps it."""
    with remaking():
        y = torch.ones(3, requires_grad=True).exp()
    here = ref(y)
    del y
    assert here() is None


@pytest.mark.parametrize(("adapter", "kernels"), [("full", True), ("lora", True), ("full", False)])
@pytest.mark.parametrize("forward", ["unquantized", "unshared", "other gains"])
def test_the_backward_pass_makes_what_the_forward_pass_made_however_modules_compute_by_then(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, forward: str, adapter: Any, kernels: bool
) -> None:
    """Another arithmetic, another module that quantises an input, a norm's weight that was put in its place (as noise
    is)."""
    if not kernels:
        monkeypatch.setattr(cpu, "load", lambda: None)
    policy, batch = loaded(model_folder(), adapter)

    @contextmanager
    def other_gains() -> Iterator[None]:
        before = {norm.weight: norm.weight.data for norm in policy.norms.values()}
        for weight in before:
            weight.data = weight.data * 1.5
        yield
        for weight, data in before.items():
            weight.data = data

    ways = {
        "unquantized": lambda: unquantized(policy),
        "unshared": lambda: unshared(policy),
        "other gains": other_gains,
    }

    def gradients(inside: bool) -> list[Tensor]:
        with ways[forward]():
            loss = (completion_logps(policy, batch, 1.0) * batch.mask).sum()
            if inside:
                return list(torch.autograd.grad(loss, list(policy.trainable().values())))
        return list(torch.autograd.grad(loss, list(policy.trainable().values())))

    wanted = gradients(inside=True)
    all_of_it(monkeypatch)
    found = gradients(inside=False)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"], ids=["our forward", "transformers'"])
@pytest.mark.parametrize("changed", ["weight", "weight in its place", "arithmetic"])
def test_no_block_is_computed_again_in_another_way(model_folder: ModelFolder, attention: Any, changed: str) -> None:
    policy, batch = loaded(model_folder(), attention=attention)
    policy = replace(policy, checkpoints=True)
    with unquantized(policy) if changed == "arithmetic" else nullcontext():
        loss = completion_logps(policy, batch, 1.0).sum()
    weight = decoder_blocks(policy)[0].get_submodule("mlp.up_proj").weight
    if changed == "weight":
        with torch.no_grad():
            weight.mul_(2.0)
    elif changed == "weight in its place":
        weight.data = weight.data * 2.0
    with pytest.raises(RuntimeError, match=r"changed before the backward pass|another arithmetic or other weights"):
        loss.backward()


def test_no_recipe_asks_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "AT_LEAST", 1)
    layer, x = torch.nn.Linear(4, 4), torch.ones(4)
    for make in (layer, layer.forward, lambda given: layer(given), partial(layer.forward)):
        with remaking(), pytest.raises(AssertionError, match="may give another tensor"):
            remember(layer(x), make, x)

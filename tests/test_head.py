"""Log-probs with a few logits alive at a time are those of all logits at once, in value and in gradient."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spaces.config import ModelConfig, QuantConfig
from tests.conftest import ModelFolder, ragged_prompts, sampled_groups
from trainable.forward import head
from trainable.forward.head import is_plain, sampled_logps
from trainable.forward.logps import completion_logps, make_batch
from trainable.policy.loading import load_policy
from trainable.seeds import generator

N, H, V = 37, 16, 101


@pytest.mark.parametrize("at_once", [V, 5 * V, 10**9])
@pytest.mark.parametrize("learns", [("hidden",), ("hidden", "head"), ("head",)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, at_once: int, learns: tuple[str, ...], bias: bool, temperature: float
) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", at_once)
    source = generator("head", at_once)
    layer = nn.Linear(H, V, bias=bias).requires_grad_("head" in learns)
    hidden = (3 * torch.randn(N, H, generator=source)).requires_grad_("hidden" in learns)
    tokens, slope = torch.randint(V, (N,), generator=source), torch.randn(N, generator=source)
    leaves = [leaf for leaf in (hidden, *layer.parameters()) if leaf.requires_grad]

    plain = torch.log_softmax(layer(hidden).double() / temperature, -1)[torch.arange(N), tokens]
    expected = torch.autograd.grad((plain * slope).sum(), leaves)
    found = sampled_logps(hidden, layer, tokens, temperature)
    torch.testing.assert_close(found.double(), plain, rtol=0, atol=1e-5)
    for one, other in zip(torch.autograd.grad((found * slope).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers that any operation gave as logits: last dimension V (and is no view of the head's weights)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.numbers = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.t.default:
            return out
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor) and one.dim() > 1 and one.shape[-1] == self.vocabulary:
                self.numbers = max(self.numbers, one.numel())
        return out


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_training_takes_this_way_where_logits_are_many_and_never_has_more_of_them(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, adapter: Any
) -> None:
    policy = load_policy(ModelConfig(name=model_folder("qwen2"), adapter=adapter), QuantConfig(), seed=0)
    groups = sampled_groups(policy, ragged_prompts(3))
    batch = make_batch(policy, groups, torch.arange(12.0).view(3, 4))
    learned = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    vocabulary = policy.network.lm_head.out_features

    def passed() -> tuple[torch.Tensor, list[torch.Tensor], int]:
        with Largest(vocabulary) as largest:
            logps = completion_logps(policy, batch, 0.9) * batch.mask
            gradients = torch.autograd.grad((logps * batch.advantages[:, None]).sum(), learned, allow_unused=True)
        return logps.detach(), [one for one in gradients if one is not None], largest.numbers

    logps, gradients, alive = passed()
    few = 2 * vocabulary
    assert alive > few
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", few)
    found, others, alive = passed()
    assert alive <= few
    torch.testing.assert_close(found, logps, rtol=0, atol=1e-5)
    assert len(others) == len(gradients)
    for one, other in zip(others, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-7)


def test_a_head_that_is_more_than_a_linear_layer_goes_the_plain_way(model_folder: ModelFolder) -> None:
    assert is_plain(nn.Linear(4, 4))
    policy = load_policy(ModelConfig(name=model_folder("qwen2")), QuantConfig(exclude=()), seed=0)
    assert not is_plain(policy.network.lm_head)

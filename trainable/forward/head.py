"""Log-probs of sampled tokens from hidden states, with a few logits alive at a time.

The logits of a batch are its largest tensor by far: 8,192 tokens of a vocabulary of 152,000 are 5 GB in fp32, and
log-softmax, its division by the temperature and its backward pass each make another. All that is wanted of them is one
number per token. So the head is applied to some tokens at a time, and what a backward pass needs is kept in another
form:

    d logp(y) / d hidden = (W[y] - sum_v p(v) W[v]) / temperature          [hidden]

is one vector per token, known when logp is. A head that does not learn (LoRA) therefore needs no logits in its backward
pass. For one that does they are computed again, some tokens at a time, which costs one more product with the head.

Logits are those of the head's own dtype, sums over the vocabulary are in fp32 (as where all logits are alive). Left
out: a head that is quantised or has an adapter, which goes the plain way.

Shapes: N = tokens, H = hidden, V = vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_AT_ONCE = 2**24
"""Most logits alive: 64 MiB in fp32. Below it nothing is gained; every part of the embedded model lies there."""


def is_plain(head: nn.Module) -> bool:
    """A linear layer and nothing more: neither a quantised one nor one with an adapter."""
    return type(head) is nn.Linear


def too_many(tokens: int, head: nn.Linear) -> bool:
    """Whether the logits of so many tokens are not to be alive at once."""
    return tokens * head.out_features > LOGITS_AT_ONCE


def sampled_logps(hidden: Tensor, head: nn.Linear, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probs [N] in fp32 of tokens [N] after hidden states [N, H] (behind the final norm)."""
    apply: Callable[..., Tensor] = _SampledLogps.apply
    return apply(hidden, head.weight, head.bias, tokens, temperature)


class _SampledLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
    ) -> Tensor:
        logps = torch.empty(len(tokens), device=hidden.device)  # [N]
        learns = ctx.needs_input_grad
        ctx.head_learns = learns[1] or learns[2]
        slopes = torch.empty_like(hidden) if learns[0] and not ctx.head_learns else None  # [N, H]
        for part in _parts(len(tokens), len(weight)):
            logits = _logits(hidden[part], weight, bias, temperature)  # [n, V]
            total = logits.logsumexp(-1, keepdim=True)  # [n, 1]
            logps[part] = (logits.gather(-1, tokens[part, None]) - total)[:, 0]
            if slopes is not None:
                likely = logits.sub_(total).exp_().to(weight.dtype)  # [n, V], probabilities
                slopes[part] = (weight[tokens[part]] - likely @ weight) / temperature
        ctx.temperature = temperature
        ctx.save_for_backward(*((hidden, weight, bias, tokens) if ctx.head_learns else (slopes,)))
        return logps

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = given  # [N]
        if not ctx.head_learns:
            (slopes,) = ctx.saved_tensors
            return (None if slopes is None else slopes * slope[:, None].to(slopes.dtype)), None, None, None, None
        hidden, weight, bias, tokens = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        for part in _parts(len(tokens), len(weight)):
            likely = _logits(hidden[part], weight, bias, ctx.temperature).softmax(-1)  # [n, V]
            likely.neg_().scatter_add_(-1, tokens[part, None], torch.ones_like(slope[part, None]))
            pull = likely.mul_(slope[part, None] / ctx.temperature).to(weight.dtype)  # [n, V]
            if of_hidden is not None:
                of_hidden[part] = pull @ weight
            if of_weight is not None:
                of_weight += pull.t() @ hidden[part]
            if of_bias is not None:
                of_bias += pull.sum(0)
        sums = (None if total is None else total.to(weight.dtype) for total in (of_weight, of_bias))
        return of_hidden, *sums, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, V] in fp32, over the temperature; its own memory."""
    logits = nn.functional.linear(hidden, weight, bias)
    return logits.float().div_(temperature)


def _parts(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))

"""The floor: how far two exact forward passes of one model drift apart. Nothing can agree with training better than
training with itself.

One set of weights and tokens has many correct log-probs. Generation reads a token at a time from its key/value cache,
training reads all of them at once; fused attention sums in another order than eager attention. Each order rounds
differently in the last bit. At 16 bits that is the end of it. 4-bit activations do two things to it: mostly they round
the difference away, so that small models agree bit for bit; but a value next to a rounding boundary flips to the other
side, by a whole 4-bit step, and the layers behind it make more flips of that one. The larger the model, the surer the
flip: on SmolLM2-135M in fp32 the floor is a KL of 1e-11 in W16A16 and about 0.05 in W4A4, with no error anywhere; on
the embedded model of 0.8 M parameters at most a few tokens in a thousand differ at all.

So "rollout and training agree to 1e-3" is the wrong demand on a real model, and a KL of 0.1 is no sign of a broken
rollout. The right demand is a multiple of the floor, measured on the same tokens. Two pairs are measured, both against
training's forward (`clean_logps`):

    cached   the generation decoder, fed the given tokens
    eager    transformers' forward with eager attention (of a policy that trains with eager attention: our forward with
             torch's sdpa)

The numbers are those that an importance correction would see: k3-KL and effective sample share as in
`logps.importance_weights`, with two differences. They are computed in double precision: in single precision exp(d) - d
- 1 of a difference d = 1e-5 is rounding noise a thousand times as large as itself. And k3 estimates KL(p || q) where p
sampled the tokens, but here a third pass may have. Tokens that p finds unlikely, which p itself would hardly ever have
sampled, then carry the sum: 40 nats instead of 0.6 (SmolLM2-135M, W4A4, bf16, eager). So a token counts p / p_sampler
times, which makes it an estimate of KL(p || q) again.

Left out: other orders of summation (number of threads, size of a batch, another device). They are of the same kind and
size.

Shapes: B = completions, T = completion tokens, L = prompt tokens (left-padded), V = vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spaces.config import MicroBatch
from trainable.forward.decoder import decoder
from trainable.forward.logps import Batch, by_parts, clean_logps, importance_weights
from trainable.policy.attention import attention, attention_of
from trainable.policy.policy import Policy, block_of

APART = 1e-4
"""In nats. Sums in another order stay below it in fp32, a flipped rounding hardly ever does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Log-probs of the same tokens by two forward passes. NaN rule: one that is not finite makes kl NaN, and NaN is
    below no limit.

    Example: Gap(kl=0.09, mean_abs=0.17, max_abs=7.2, apart=0.6, tokens=384, token_share=0.6, sequence_share=0.2)
    """

    kl: float
    """KL(behaviour || reference) in nats per token, by the k3 estimator. Few tokens carry it: read it together with
    mean_abs."""
    mean_abs: float
    """Mean distance of log-probs, in nats."""
    max_abs: float
    apart: float
    """Share of the tokens whose log-probs differ by more than APART."""
    tokens: int
    """Compared."""
    token_share: float
    """Effective sample size over sample size under a correction per token, of the weights before the cap. Like the next
    one, an estimate only where the behaviour itself sampled the tokens."""
    sequence_share: float
    """The same under a correction per sequence."""

    @property
    def effective_share(self) -> dict[str, float]:
        """By `rollout.correction`. Without one every token counts in full, and the update is biased instead."""
        return {"none": 1.0, "token": self.token_share, "sequence": self.sequence_share}


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Training's forward pass against itself."""

    pairs: dict[str, Gap]
    """cached, eager."""

    @property
    def widest(self) -> Gap:
        """The pair with the larger KL; one whose KL is NaN is the widest of all."""
        return max(self.pairs.values(), key=lambda pair: math.inf if math.isnan(pair.kl) else pair.kl)

    @property
    def kl(self) -> float:
        """In nats per token; NaN where a forward pass is not finite."""
        return self.widest.kl


def measure_floor(
    policy: Policy, batch: Batch, temperature: float, micro_batch: MicroBatch, decoded_size: int = 0
) -> Floor:
    """On the batch's tokens, whoever sampled them with `rollout_logps`. Call it inside `deployed`.

    Costs a rollout, `decoded_size` completions at once, and two forward passes, a `micro_batch` at a time. Raises
    ConfigError for an architecture whose attention cannot be switched.
    """
    arguments = (policy, batch, temperature, micro_batch)
    decoded = max(micro_batch, decoded_size) if isinstance(micro_batch, int) else decoded_size or micro_batch
    behaviours = {"cached": cached_logps(policy, batch, temperature, decoded), "eager": eager_logps(*arguments)}
    return floor_of(behaviours, clean_logps(*arguments), batch.rollout_logps, batch.mask)


def floor_of(behaviours: Mapping[str, Tensor], reference_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Floor:
    """From log-probs that are known already, all [B, T]."""
    return Floor(pairs={name: gap(logps, reference_logps, mask, sampler_logps) for name, logps in behaviours.items()})


def gap(behaviour_logps: Tensor, reference_logps: Tensor, mask: Tensor, sampler_logps: Tensor | None = None) -> Gap:
    """Of two times log-probs [B, T] where the mask [B, T] is 1.

    `sampler_logps` [B, T]: of the pass that sampled the tokens, where that was not the behaviour.
    """
    behaviour, reference = behaviour_logps.double(), reference_logps.double()
    token = importance_weights("token", reference, behaviour, mask, cap=math.inf)
    sequence = importance_weights("sequence", reference, behaviour, mask, cap=math.inf)
    d = (reference - behaviour)[mask > 0]
    distance = d.abs()
    assert len(distance), "a gap needs a token"
    kl = token.kl
    if sampler_logps is not None:
        weight = (behaviour - sampler_logps)[mask > 0].exp()
        kl = ((weight * (d.exp() - d - 1)).sum() / weight.sum()).item()
    return Gap(
        kl=kl,
        mean_abs=distance.mean().item(),
        max_abs=distance.max().item(),
        apart=1.0 - (distance <= APART).double().mean().item(),  # NaN is apart
        tokens=len(distance),
        token_share=token.effective_share,
        sequence_share=sequence.effective_share,
    )


# --- the other ways through the model ---------------------------------------------------------------------------------


@torch.no_grad()
def cached_logps(policy: Policy, batch: Batch, temperature: float, micro_batch: MicroBatch) -> Tensor:
    """Log-probs [B, T] as generation computes them: each prompt once for its group, then a token at a time. Of padding:
    anything."""

    def computed(part: Batch) -> Tensor:
        together = part.group_size
        forward = decoder(policy, part.completion_ids.shape[1])
        logits = forward.prefill(part.prompt_ids[::together], part.prompt_mask[::together], together)  # [rows, V]
        columns = [_of_tokens(logits, part.completion_ids[:, 0], temperature)]
        for before, token in zip(part.completion_ids.T, part.completion_ids.T[1:], strict=False):
            columns.append(_of_tokens(forward.step(before), token, temperature))
        return torch.stack(columns, 1)

    return by_parts(policy, batch, micro_batch, computed)


def _of_tokens(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probs [rows] of tokens [rows] under logits [rows, V]."""
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, tokens[:, None])[:, 0]


def eager_logps(policy: Policy, batch: Batch, temperature: float, micro_batch: MicroBatch) -> Tensor:
    """Log-probs [B, T] of training's tokens with the other attention: eager, or sdpa where training is eager."""
    with other_attention(policy):
        return clean_logps(policy, batch, temperature, micro_batch)


def other_attention(policy: Policy) -> AbstractContextManager[None]:
    """Raises ConfigError on entering it where the architecture has one alone: it then has no floor."""
    return attention(policy.network, "sdpa" if attention_of(policy) == "eager" else "eager")


# --- the same weights in a shallower model ----------------------------------------------------------------------------


@contextmanager
def first_blocks(policy: Policy, blocks: int) -> Iterator[Policy]:
    """The policy that goes from its `blocks`-th decoder block straight to the final norm and the head; the others are
    out of the way."""
    assert 1 <= blocks <= policy.depth, f"{blocks=} {policy.depth=}"
    network = policy.network
    name, stack = next(
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and block_of(f"{name}.0.") == 0
    )
    # Both are asked how many blocks there are: the forward pass, and the cache of transformers.
    counts = {
        key: getattr(network.config, key)
        for key in ("num_hidden_layers", "layer_types")
        if hasattr(network.config, key)
    }
    try:
        network.set_submodule(name, stack[:blocks])
        for key, value in counts.items():
            setattr(network.config, key, blocks if key == "num_hidden_layers" else value and value[:blocks])
        yield replace(
            policy,
            linears={key: module for key, module in policy.linears.items() if _within(key, blocks)},
            norms={key: module for key, module in policy.norms.items() if _within(key, blocks)},
            depth=blocks,
        )
    finally:
        network.set_submodule(name, stack)
        for key, value in counts.items():
            setattr(network.config, key, value)


def _within(name: str, blocks: int) -> bool:
    """In one of the first blocks, or in none."""
    index = block_of(name)
    return index is None or index < blocks

"""Is what trains and what samples the model that transformers computes? Asked when a trial loads, before step 0.

A model goes through three forward passes here that are not the one it came with: training's, with left-padded prompts
and a mask of ours; the same with several completions of a prompt in one row; and generation's, a token at a time from a
cache. Each can be wrong in silence where an architecture does what they do not know of: a sliding window, a bias or a
window by place in the row, soft-capping that one kernel of attention leaves out, a rotation that depends on the longest
row of the batch, a linear layer that is more than one. Rollout and training may even agree, and both be wrong.

So all three are compared with transformers' own forward of each row alone, without padding, by the modules as they
were loaded, before any was replaced: on prompts of mixed length, as long as the trial's can get, and across every
length at which the model's configuration says that it changes its ways. Unquantised and in fp32, also for a model in
bf16, because then nothing but the order of sums may differ: 1e-5 is usual, and a window ignored is 1 and more. Where
fp32 does not fit the accelerator, the model's own dtype is compared, by what its rounding allows on average.

Packed rows are no promise: where they alone are apart, completions get rows of their own. All else is refused, with
the remedy that was tried and helps.

Left out: fp16 and quantised arithmetic (`floor`), and an engine's own forward (`engines/gate.py`).

Shapes: B = completions, T = completion tokens, L = prompt tokens (left-padded).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from spaces.config import ConfigError, MicroBatch, ModelConfig, TrialConfig
from trainable.floor import cached_logps
from trainable.forward.logps import PACKED_TOKENS, Batch, by_parts, completion_logps
from trainable.forward.transformer import forward_of, left_padded
from trainable.policy.attention import attention
from trainable.policy.embedded import Progress
from trainable.policy.loading import wrapped
from trainable.policy.policy import Policy, deployed, unquantized
from trainable.policy.sources import load_network
from trainable.seeds import generator

LIMIT = 1e-3
"""Largest distance of a token's log-probs in fp32, in nats."""
DOUBTFUL = 1e-4
"""What a receipt warns of, in nats: the order of sums makes 1e-5, also in thirty blocks. An architecture whose cached
step differs a little from its forward (Zamba 2) can stay below the limit."""
NARROW_LIMIT = 0.1
"""Mean distance in 16 bits, in nats: rounding alone makes 0.01 to 0.03."""
_GROUP, _TOKENS = 2, 8
"""Completions of each of two prompts, and their length."""
_LONGEST_REASON = 200
"""Characters of what an architecture says about itself."""
_PACKED = PACKED_TOKENS - _TOKENS
"""The longest rows whose completions share one; asked too where a trial's rows are longer."""
_EAGER = 1024
"""Longest row of which transformers' own attention is the eager one, which holds a number per pair of tokens."""
_TURNS = (
    "sliding_window",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "chunk_size",
    "mamba_chunk_size",
    "original_max_position_embeddings",
)
"""Keys of a configuration that name a length at which a model changes its ways; with a dynamic rotation also
max_position_embeddings."""

WAYS = {
    "rows": "training's forward",
    "packed": "training's forward of completions side by side",
    "sampler": "generation from a cache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far each way through the model is from transformers' own, in nats per token, unquantised.

    Example: Agreement(rows=2e-6, packed=3e-6, sampler=2e-6, limit=1e-3, dtype="float32", lengths=(70,))
    """

    rows: float
    packed: float
    """Above the limit: completions are not packed."""
    sampler: float
    limit: float
    dtype: str
    lengths: tuple[int, ...]
    """Longest rows of the probes, in tokens."""


def load_checked(config: TrialConfig, progress: Progress | None = None) -> tuple[Policy, Agreement]:
    """The policy of a trial, and by how much its ways through the model differ.

    Raises ConfigError for a model that cannot be found, and for one that is not computed as transformers does.
    """
    network, tokenizer = load_network(config.model, progress)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    batches = probes(network, tokenizer, longest)
    with _widened(network) as dtype:
        references = [
            _tried(config.model, None, "transformers' own forward", partial(own_logps, network, batch))
            for batch in batches
        ]
    policy = wrapped(network, tokenizer, config.model, config.quant, config.seed)
    micro = config.grpo.micro_batch
    narrow = dtype != torch.float32

    def measured() -> list[dict[str, float]]:
        """Of each batch."""
        return [
            _distances(config.model, policy, *pair, micro, narrow) for pair in zip(batches, references, strict=True)
        ]

    with _widened(policy.model):
        found = measured()
        agreement = Agreement(
            **{way: _largest(one[way] for one in found) for way in WAYS},
            limit=NARROW_LIMIT if narrow else LIMIT,
            dtype=str(dtype).removeprefix("torch."),
            lengths=tuple(_length(batch) for batch in batches),
        )
        way = _wrong(policy, agreement)
        if way is not None:
            remedy = _eager(config.model, policy, measured, agreement.limit) or _shorter(found, agreement)
            raise ConfigError(
                f"model.name={config.model.name}: {WAYS[way]} is {getattr(agreement, way):.2g} nats per token from "
                f"transformers' own (allowed {agreement.limit:g}); {remedy or 'take another model'}"
            )
    packs = agreement.packed <= agreement.limit
    return replace(policy, packs=packs, checkpoints=config.grpo.checkpoint_activations), agreement


def doubts(agreement: Agreement) -> list[str]:
    """A line for each way that is allowed, and further off than rounding explains."""
    far = [way for way in WAYS if agreement.limit == LIMIT and DOUBTFUL < getattr(agreement, way) <= LIMIT]
    return [
        f"{WAYS[way]} is {getattr(agreement, way):.2g} nats per token from transformers' own: allowed, but rounding "
        "makes 1e-05"
        for way in far
    ]


def _wrong(policy: Policy, agreement: Agreement) -> str | None:
    """The first way that may not be apart and is. Our own forward always packs."""
    needed = WAYS if forward_of(policy) is not None else ("rows", "sampler")
    return next((way for way in needed if not getattr(agreement, way) <= agreement.limit), None)


def _eager(
    model: ModelConfig, policy: Policy, measured: Callable[[], list[dict[str, float]]], limit: float
) -> str | None:
    """The remedy for what a kernel of attention leaves out; None where it does not help."""
    if model.attention == "eager":
        return None
    try:
        with attention(policy.network, "eager"):
            helps = all(one[way] <= limit for one in measured() for way in ("rows", "sampler"))
    except ConfigError:  # it does not run
        return None
    return "set model.attention=eager" if helps else None


def _shorter(found: Sequence[Mapping[str, float]], agreement: Agreement) -> str | None:
    """The remedy for what goes wrong from some length on."""
    right = [all(one[way] <= agreement.limit for way in ("rows", "sampler")) for one in found]
    longest = max((n for n, fine in zip(agreement.lengths, right, strict=True) if fine), default=None)
    if longest is None or any(n < longest for n, fine in zip(agreement.lengths, right, strict=True) if not fine):
        return None
    return f"keep rollout.max_prompt_tokens + rollout.max_new_tokens at {longest} or below, or take another model"


def _largest(distances: Iterable[float]) -> float:
    """NaN counts as infinitely far."""
    return max(math.inf if math.isnan(one) else one for one in distances)


# --- what is asked ----------------------------------------------------------------------------------------------------


def probes(network: Any, tokenizer: Any, longest: int) -> list[Batch]:
    """Groups of completions on left-padded prompts from one token to the length that a trial can have, and across what
    the configuration names below that."""
    turns = {turn for turn in _turns(network.config.to_dict()) if _TOKENS < turn < longest}
    ends = {longest, _PACKED if longest > PACKED_TOKENS else longest, min(turns, default=longest)}
    ends |= {min(longest, turn + _TOKENS // 2) for turn in turns}
    return [_probe(network, tokenizer, end) for end in sorted(ends)]


def _turns(tree: Mapping[str, Any]) -> Iterator[int]:
    dynamic = (tree.get("rope_parameters") or {}).get("rope_type") == "dynamic"
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _turns(value)
        elif isinstance(value, int) and (key in _TURNS or (dynamic and key == "max_position_embeddings")):
            yield value


def _probe(network: Any, tokenizer: Any, longest: int) -> Batch:
    """Rows of at most so many tokens; every second completion is shorter by one."""
    vocabulary = min(len(tokenizer), network.get_input_embeddings().num_embeddings)
    plain = sorted(set(range(vocabulary)) - set(tokenizer.all_special_ids)) or [0]
    source = generator("probe", longest)
    tokens = min(_TOKENS, max(1, longest - 1))
    width = max(1, longest - tokens)

    def text(rows: int, length: int) -> Tensor:
        return torch.tensor(plain)[torch.randint(len(plain), (rows, length), generator=source)]

    device = network.device
    prompts = [text(1, length)[0].tolist() for length in (width, 1 + width // 8)]
    prompt_ids, prompt_mask = left_padded(
        [prompt for prompt in prompts for _ in range(_GROUP)], tokenizer.pad_token_id, device
    )
    mask = torch.ones(len(prompt_ids), tokens, device=device)
    if tokens > 1:
        mask[1::_GROUP, -1] = 0.0
    zeros = torch.zeros_like(mask)
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=text(len(prompt_ids), tokens).to(device),
        mask=mask,
        rollout_logps=zeros,
        advantages=zeros[:, 0],
        old_logps=zeros,
        group_size=_GROUP,
    )


def _length(batch: Batch) -> int:
    return batch.prompt_ids.shape[1] + batch.completion_ids.shape[1]


# --- the ways through the model ---------------------------------------------------------------------------------------


@torch.no_grad()
def own_logps(network: Any, batch: Batch) -> Tensor:
    """Log-probs [B, T] by transformers' own forward of each row alone. Of padding: zeros."""
    logps = torch.zeros_like(batch.mask)
    with ExitStack() as stack:
        if _length(batch) <= _EAGER:
            with suppress(ConfigError):  # an architecture without a choice has one attention
                stack.enter_context(attention(network, "eager"))
        for row, (prompt, tokens) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
            prompt, tokens = prompt[batch.prompt_mask[row] > 0], tokens[batch.mask[row] > 0]
            out = network(input_ids=torch.cat([prompt, tokens])[None], use_cache=False, logits_to_keep=len(tokens) + 1)
            distribution = torch.log_softmax(out.logits[0, :-1].float(), -1)
            logps[row, : len(tokens)] = distribution.gather(-1, tokens[:, None])[:, 0]
    return logps


def _ways(policy: Policy, batch: Batch, micro: MicroBatch) -> dict[str, Callable[[], Tensor]]:
    """Inside `unquantized`. Training's with gradients, as it trains."""

    def trained(policy: Policy, batch: Batch) -> Tensor:
        with torch.enable_grad():
            return by_parts(policy, batch, micro, lambda part: completion_logps(policy, part, 1.0).detach())

    def sampled() -> Tensor:
        with deployed(policy):
            return cached_logps(policy, batch, 1.0, micro)

    return {
        "rows": lambda: trained(policy, replace(batch, group_size=1)),
        "packed": lambda: trained(replace(policy, packs=True), batch),
        "sampler": sampled,
    }


def _distances(
    model: ModelConfig, policy: Policy, batch: Batch, reference: Tensor, micro: MicroBatch, narrow: bool
) -> dict[str, float]:
    """Of each way from the reference, at most, or on average in few bits; inside `_widened`."""
    found = {}
    with unquantized(policy):
        for way, compute in _ways(policy, batch, micro).items():
            try:
                logps = _tried(model, policy, WAYS[way], compute)
            except ConfigError:
                if way != "packed":
                    raise
                logps = torch.full_like(reference, math.inf)
            apart = (logps - reference)[batch.mask > 0].abs()
            found[way] = (apart.mean() if narrow else apart.max()).item()
    return found


def _tried(model: ModelConfig, policy: Policy | None, what: str, compute: Callable[[], Tensor]) -> Tensor:
    """Raises ConfigError where an architecture's own code raises; an error of our own forward is a bug."""
    try:
        return compute()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the code of an architecture raises when it is fed what it does not know
        if policy is not None and forward_of(policy) is not None:
            raise
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise ConfigError(
            f"model.name={model.name}: {what} does not run ({type(error).__name__}: {reason}); take another model"
        ) from error


@contextmanager
def _widened(network: nn.Module) -> Iterator[torch.dtype]:
    """In fp32 where that fits; gives the dtype. Every 16-bit number comes back as it was."""
    narrow = [(t, t.dtype) for t in chain(network.parameters(), network.buffers()) if t.is_floating_point()]
    narrow = [(tensor, dtype) for tensor, dtype in narrow if dtype.itemsize < 4]
    more = sum(tensor.numel() * (4 - dtype.itemsize) for tensor, dtype in narrow)
    if narrow and narrow[0][0].is_cuda and torch.cuda.mem_get_info()[0] < 1.5 * more:
        yield narrow[0][1]
        return
    try:
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        yield torch.float32
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)

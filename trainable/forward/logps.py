"""Log-probs of completions: sampled tokens as tensors, what training's forward pass gives them, and how two passes
differ.

Whatever learns from completions, or compares who computed them, needs the same three things: a batch, its log-probs by
the policy's present weights, and the importance weights between two sets of log-probs. Log-probs are those of the
sampled tokens, at the sampling temperature, in fp32; a noisy policy sampled (`rollout_logps`), a clean one learns
(`old_logps`).

A group's completions share their prompt, which is computed once for several of them (packed rows), in training as in
generation. How completions become advantages and a loss is another matter (`trainable/grpo.py`).

A device is never asked for a number on this way, which would make it wait until its work is done: how long prompts and
completions are is known on the host, and what is chosen by it is chosen by indices from there.

Shapes: B = completions, G = completions of a prompt, T = completion tokens (right-padded), L = prompt tokens
(left-padded), N = tokens of all completions, H = hidden, V = vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from spaces.config import Correction, MicroBatch, RolloutConfig
from trainable.again import AT_LEAST, blocks_again, remaking
from trainable.episode import Group
from trainable.forward.head import is_plain, sampled_logps, too_many
from trainable.forward.transformer import Forward, Rule, forward_of, left_padded, positions
from trainable.policy.policy import Policy, decoder_blocks
from trainable.sharding import is_sharded, through

PACKED_TOKENS = 512
"""Longest row of a prompt with several completions. Up to here attention is little of the work, also what is masked."""
LARGEST_MASK = 2**24
"""Most pairs of tokens in a dense mask on a GPU."""
LARGEST_NATS = 20.0
"""Differences of log-probs above it count as it where they become a ratio (verl's limit, too). In single precision
exp(89) is infinite, and the gradient of a token that the clip has cut out would be 0 times that."""

Counts = NDArray[np.int64]
"""Numbers of tokens, or of rows, on the host."""


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Completions as tensors; log-probs are those of the sampled tokens, at the sampling temperature."""

    prompt_ids: torch.Tensor  # [B, L]
    prompt_mask: torch.Tensor  # [B, L]
    completion_ids: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, T], 1 up to and including the end token
    rollout_logps: torch.Tensor  # [B, T], of the noisy policy that sampled
    advantages: torch.Tensor  # [B]
    old_logps: torch.Tensor  # [B, T], of the clean policy when the step began
    reference_logps: torch.Tensor | None = None  # [B, T]
    weights: torch.Tensor | None = None  # [B, T], by which a correction multiplies each token's loss
    group_size: int = 1
    """G: so many rows side by side continue one prompt."""
    prompt_lengths: Counts = None  # type: ignore[assignment]  # [B], what the masks say; where it is left out, asked
    lengths: Counts = None  # type: ignore[assignment]  # [B], of the completions

    def __post_init__(self) -> None:
        if self.lengths is None:
            object.__setattr__(self, "prompt_lengths", _counted(self.prompt_mask))
            object.__setattr__(self, "lengths", _counted(self.mask))

    def __len__(self) -> int:
        return len(self.completion_ids)

    def rows(self, index: Counts | slice, group_size: int = 1) -> "Batch":
        """A sub-batch, whose rows continue one prompt each, or `group_size` of them side by side the same one."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        place = index if isinstance(index, slice) else torch.from_numpy(index).to(self.mask.device)
        tensors = {name: value[place] for name, value in values.items() if isinstance(value, torch.Tensor)}
        counts = {name: value[index] for name, value in values.items() if isinstance(value, np.ndarray)}
        return Batch(**{**values, **tensors, **counts, "group_size": group_size})

    def rows_of(self, groups: Counts) -> Counts:
        """Indices of all rows of these groups."""
        return (groups[:, None] * self.group_size + np.arange(self.group_size)).flatten()

    def groups(self, span: range) -> "Batch":
        """Of consecutive groups."""
        return self.rows(slice(span.start * self.group_size, span.stop * self.group_size), self.group_size)

    def slices(self, size: int) -> list[slice]:
        """Consecutive rows, at most `size`: whole groups, or equal parts of a group that is larger."""
        if size >= self.group_size:
            size -= size % self.group_size
        while size < self.group_size and self.group_size % size:
            size -= 1
        return [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def part(self, rows: slice) -> "Batch":
        """One of the `slices`, which knows how many of its rows continue one prompt."""
        count: int = rows.stop - rows.start
        return self.rows(rows, min(self.group_size, count))

    def trimmed(self) -> "Batch":
        """Without the columns that are padding in every row."""
        first, last = self.prompt_ids.shape[1] - int(self.prompt_lengths.max()), int(self.lengths.max())
        cut: dict[str, torch.Tensor] = {}
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                columns = slice(first, None) if name in ("prompt_ids", "prompt_mask") else slice(last)
                cut[name] = value[:, columns].contiguous()
        return replace(self, **cut)  # type: ignore[arg-type]

    def correction(self, rollout: RolloutConfig) -> "ImportanceWeights":
        """Of the clean policy over the noisy one, as the configuration wishes."""
        return importance_weights(
            rollout.correction, self.old_logps, self.rollout_logps, self.mask, rollout.correction_cap
        )


def _counted(mask: torch.Tensor) -> Counts:
    """Ones [B] of a mask [B, ..]."""
    counts: Counts = mask.sum(1).long().cpu().numpy()
    return counts


def make_batch(policy: Policy, groups: Sequence[Group], advantages: torch.Tensor) -> Batch:
    """Tensors from groups; old log-probs still to be computed (zeros). `advantages` is [groups, G]."""
    episodes = [episode for group in groups for episode in group]
    device, pad = policy.device, policy.tokenizer.pad_token_id
    prompt_ids, prompt_mask = left_padded([e.prompt_ids for e in episodes], pad, device)  # [B, L]
    width = max(len(e.completion.ids) for e in episodes)

    def padded(rows: Sequence[Sequence[float]], fill: float) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)

    mask = padded([[1.0] * len(e.completion.ids) for e in episodes], 0.0)  # [B, T]
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=padded([e.completion.ids for e in episodes], pad).long(),
        mask=mask,
        rollout_logps=padded([e.completion.logps for e in episodes], 0.0),
        advantages=advantages.flatten().to(device),
        old_logps=torch.zeros_like(mask),
        group_size=advantages.shape[1],
        prompt_lengths=np.array([len(e.prompt_ids) for e in episodes]),
        lengths=np.array([len(e.completion.ids) for e in episodes]),
    )


# --- training's forward pass -----------------------------------------------------------------------------------------


def completion_logps(policy: Policy, batch: Batch, temperature: float) -> torch.Tensor:
    """Log-probs [B, T] of the completions' tokens at the sampling temperature.

    A prompt is computed once for several of its completions: they follow it in one row and do not see each other.
    The longer the row, the more of its attention is masked away, so there is a limit to it; from there on each
    completion has a row of its own. So it has in an architecture of which nobody has shown that packing is equal.
    """
    together = side_by_side(policy, batch)
    arguments = (policy, batch, temperature)
    work = partial(_logps_alone, *arguments) if together == 1 else partial(_logps_packed, *arguments, together)
    with remaking() if torch.is_grad_enabled() and _keeps_much(policy, batch) else nullcontext():
        logps: torch.Tensor = through(policy.network, work)
    return logps


def _keeps_much(policy: Policy, batch: Batch) -> bool:
    """Whether what autograd keeps of it counts. Blocks in shards are computed again in any case."""
    hidden: int = policy.network.get_input_embeddings().weight.shape[-1]
    return batch.mask.numel() * hidden >= AT_LEAST and not is_sharded(policy.network)


def side_by_side(policy: Policy, batch: Batch) -> int:
    """Completions of a prompt in one row."""
    return in_a_row(policy, batch.group_size, batch.prompt_ids.shape[1], batch.completion_ids.shape[1])


def in_a_row(policy: Policy, group_size: int, length: int, tokens: int) -> int:
    """Completions of so many tokens beside each other behind a prompt of such length."""
    even = [k for k in range(1, group_size + 1) if group_size % k == 0] if packs(policy) else []
    return max((k for k in even if length + k * tokens <= PACKED_TOKENS), default=1)


def micro_batches(policy: Policy, batch: Batch, size: MicroBatch) -> Iterator[tuple[Counts | slice, Batch]]:
    """What is computed at once, with its rows in the batch: so many completions, one behind the other; or of like
    length, the longest first, as many as have so many tokens together with their padding (at least one row of them)."""
    if isinstance(size, int):
        yield from ((rows, batch.part(rows)) for rows in batch.slices(size))
        return
    together = side_by_side(policy, batch)
    for rows in _of_like_length(batch, together, size.number):
        yield rows, batch.rows(rows, together).trimmed()


def _of_like_length(batch: Batch, together: int, tokens: int) -> Iterator[Counts]:
    """Indices of completions; so many of a prompt stay side by side."""
    prompts = batch.prompt_lengths[::together]
    completions = batch.lengths.reshape(-1, together).max(1)

    def width(lines: Counts) -> int:
        """Of the longest row."""
        if together == 1:
            return int((prompts + completions)[lines].max())
        return int(prompts[lines].max() + together * completions[lines].max())

    order = np.argsort(-(prompts + together * completions), kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * width(order[start : end + 1]) > tokens:
            lines = order[start:end]
            yield (lines[:, None] * together + np.arange(together)).flatten()
            start = end


def by_parts(policy: Policy, batch: Batch, size: MicroBatch, compute: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
    """[B, T] of a batch from what is computed of its `micro_batches`."""
    found = torch.zeros_like(batch.mask)
    for rows, part in micro_batches(policy, batch, size):
        place = rows if isinstance(rows, slice) else _on(batch.mask.device, rows)
        found[place, : part.mask.shape[1]] = compute(part)
    return found


def packs(policy: Policy) -> bool:
    """Whether completions of a prompt may share a row."""
    return policy.packs or forward_of(policy) is not None


def _logps_alone(policy: Policy, batch: Batch, temperature: float) -> torch.Tensor:
    """Rows of a prompt and one completion [B, S], S = tokens of the longest.

    Every row begins with its first real token, so padding comes behind all that is read: causal attention alone is
    exact, and needs no mask, which would be a number for each pair of tokens and keep the fastest kernels away.
    transformers makes what it needs beside that: it knows of windows, chunks and biases by distance.
    """
    tokens, device = batch.completion_ids.shape[1], batch.mask.device
    width = int((batch.prompt_lengths + batch.lengths).max())  # S
    place = torch.arange(width, device=device)  # [S]
    given = torch.cat([batch.prompt_ids, batch.completion_ids], 1)  # [B, L + T]
    start = batch.prompt_ids.shape[1] - batch.prompt_mask.sum(1, keepdim=True).long()  # [B, 1]
    ids = given.gather(1, (start + place).clamp(max=given.shape[1] - 1))  # [B, S]
    position_ids = positions(torch.ones_like(ids))  # [B, S]
    row, step = _real(batch.lengths, tokens)  # [N] both
    before = batch.prompt_lengths[row] + step - 1  # [N], where the token before each stands in its row
    wanted = _on(device, row * tokens + step)  # [N]
    said, forward = batch.completion_ids.flatten()[wanted], forward_of(policy)
    if forward is not None:
        hidden = forward.hidden(ids, forward.angles(position_ids), forward.causal(len(batch))).flatten(0, 1)
        found = _logps_of(forward, hidden.index_select(0, _on(device, row * width + before)), said, temperature)
    else:
        first = int(before.min())
        logits = _logits(policy, ids, position_ids, None, width - first).flatten(0, 1)
        chosen = logits.index_select(0, _on(device, row * (width - first) + before - first))  # [N, V]
        found = _of_tokens(chosen, said, temperature)
    return _spread(found, wanted, batch)


def _logps_packed(policy: Policy, batch: Batch, temperature: float, side_by_side: int) -> torch.Tensor:
    """R = rows of a prompt and K = `side_by_side` of its completions, S = L + K * T.

    On a GPU that would have to hold many masks at once attention goes by blocks of them; small ones, and a CPU, take a
    dense mask: there a block's kernel has no backward pass, and would first be compiled.
    """
    (_, tokens), device = batch.completion_ids.shape, batch.mask.device
    prompt_mask = batch.prompt_mask[::side_by_side]  # [R, L]
    rows = len(prompt_mask)
    completions = batch.completion_ids.view(rows, -1)  # [R, K * T]
    ids = torch.cat([batch.prompt_ids[::side_by_side], completions], 1)  # [R, S]
    step = torch.arange(tokens, device=device).repeat(side_by_side)  # [K * T]: 0, 1, .., T - 1, 0, 1, ..
    position_ids = torch.cat([positions(prompt_mask), prompt_mask.sum(1, keepdim=True) + step], 1)  # [R, S]
    real = torch.cat([prompt_mask, batch.mask.view(rows, -1)], 1) > 0  # [R, S]
    # A completion's first token follows the prompt's last one, which comes first here; others follow the one before.
    before = torch.arange(side_by_side * tokens, device=device).where(step > 0, 0)  # [K * T]
    row, kept, forward = torch.arange(rows, device=device)[:, None], side_by_side * tokens + 1, forward_of(policy)
    sees = seen_in_packed(real, prompt_mask.shape[1], tokens)
    if forward is None:
        logits = _logits(policy, ids, position_ids, dense(sees, real, policy.dtype), kept)
    else:
        many = real.is_cuda and real.numel() * real.shape[1] > LARGEST_MASK
        mix = forward.ruled(sees, real) if many else forward.masked(dense(sees, real, policy.dtype))
        hidden = forward.hidden(ids, forward.angles(position_ids), mix)[:, -kept:]  # [R, 1 + K * T, H]
        if is_plain(forward.head) and too_many(rows * kept, forward.head):
            wanted = _on(device, np.ravel_multi_index(_real(batch.lengths, tokens), batch.mask.shape))  # [N]
            chosen = hidden[row, before].flatten(0, 1).index_select(0, wanted)  # [N, H]
            found = _logps_of(forward, chosen, batch.completion_ids.flatten()[wanted], temperature)
            return _spread(found, wanted, batch)
        logits = forward.logits(hidden)
    distribution = torch.log_softmax(logits.float() / temperature, dim=-1)
    return distribution[row, before, completions].view(-1, tokens)  # of [R, 1 + K * T, V]


def _real(lengths: Counts, tokens: int) -> tuple[Counts, Counts]:
    """Row and place [N] of each real token of completions [B, T]: padding needs no log-prob."""
    row, place = np.nonzero(np.arange(tokens) < lengths[:, None])
    return row, place


def _on(device: torch.device, index: Counts) -> torch.Tensor:
    return torch.from_numpy(index).to(device)


def _spread(found: torch.Tensor, wanted: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probs [N] at their places [N] of [B, T]; 0 on padding."""
    zeros = torch.zeros(batch.mask.numel(), dtype=found.dtype, device=found.device)
    return zeros.index_copy(0, wanted, found).view_as(batch.mask)


def _logps_of(forward: Forward, hidden: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs [N] of tokens [N] after hidden states [N, H] behind the last block."""
    if is_plain(forward.head) and too_many(len(tokens), forward.head):
        return sampled_logps(forward.normed(hidden), forward.head, tokens, temperature)
    return _of_tokens(forward.logits(hidden), tokens, temperature)


def _of_tokens(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs [N] of tokens [N] under logits [N, V]."""
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, tokens[:, None])[:, 0]


def seen_in_packed(real: torch.Tensor, length: int, tokens: int) -> Rule:
    """A token sees its prompt and its own completion, up to itself; real [R, S] is false on padding, which sees itself:
    a row that sees nothing would become NaN. `length`: of the prompts; `tokens`: of each completion."""

    def sees(row: torch.Tensor, head: torch.Tensor, token: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        related = (other < length) | ((token - length) // tokens == (other - length) // tokens)
        return (related & (other <= token) & real[row, other]) | (token == other)

    return sees


def dense(sees: Rule, real: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A rule as an additive mask [R, 1, S, S]."""
    row, place = (torch.arange(size, device=real.device) for size in real.shape)
    visible = sees(row[:, None, None], row[:1], place[:, None], place)  # [R, S, S]
    mask = torch.zeros(visible.shape, dtype=dtype, device=real.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def _logits(
    policy: Policy, ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None, keep: int
) -> torch.Tensor:
    """By transformers, of the last `keep` tokens of each row, [R, keep, V]; ids and position ids [R, S], additive mask
    [R, 1, S, S], or none where attention is causal and nothing more."""
    with blocks_again(decoder_blocks(policy)) if policy.checkpoints and torch.is_grad_enabled() else nullcontext():
        out = policy.model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False, logits_to_keep=keep
        )
    logits: torch.Tensor = out.logits
    return logits


@torch.no_grad()
def clean_logps(policy: Policy, batch: Batch, temperature: float, micro_batch: MicroBatch) -> torch.Tensor:
    """Log-probs [B, T] without gradient, some rows at a time."""
    return by_parts(policy, batch, micro_batch, lambda part: completion_logps(policy, part, temperature))


# --- two passes over the same tokens ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWeights:
    """Importance weights of a batch and what they say about it."""

    weights: torch.Tensor  # [B, T]
    mean: float
    effective_share: float
    """Effective sample size over sample size, (sum w)^2 / (n sum w^2), of the weights before the cap."""
    kl: float
    """KL(rollout || clean) in nats per token, by the k3 estimator: mean of exp(d) - d - 1, d = clean - rollout."""


def importance_weights(
    level: Correction, clean: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, cap: float
) -> ImportanceWeights:
    """min(pi_clean / pi_rollout, cap) per token or per sequence, all [B, T]; `none` weighs 1, reports token weights.

    Whatever the finite log-probs, the numbers are finite: what only describes a step cannot end a trial.
    """
    difference = (clean - rollout).where(mask > 0, 0.0)  # [B, T]
    inside = difference[mask > 0]  # [tokens]
    logs = difference.sum(1) if level == "sequence" else inside
    return ImportanceWeights(
        weights=correction_weights(level, clean, rollout, mask, cap),
        mean=logs.exp().clamp(max=cap).mean().item(),
        effective_share=effective_share(logs),
        kl=(inside.clamp(max=LARGEST_NATS).exp() - inside - 1).mean().item(),
    )


def correction_weights(
    level: Correction, clean: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, cap: float
) -> torch.Tensor:
    """Of `importance_weights` the weights alone, [B, T]; no number leaves the device."""
    difference = (clean - rollout).where(mask > 0, 0.0).detach()  # [B, T]
    if level == "sequence":
        return difference.sum(1).exp().clamp(max=cap)[:, None].expand_as(mask)
    return difference.exp().clamp(max=cap) if level == "token" else torch.ones_like(mask)


def effective_share(logs: torch.Tensor) -> float:
    """(sum w)^2 / (n sum w^2) of the weights exp(logs), in [1 / n, 1]. A common factor cancels, so the largest weight
    is 1: sums of squares of e^-60 are 0, and of e^60 infinite."""
    relative = (logs.detach().double() - logs.max()).exp()
    return (relative.sum().square() / (len(relative) * relative.square().sum())).clamp(max=1.0).item()

"""Log-probs of completions: sampled tokens as tensors, what training's forward pass gives them, and how two passes
differ.

Whatever learns from completions, or compares who computed them, needs the same three things: a batch, its log-probs by
the policy's present weights, and the importance weights between two sets of log-probs. Log-probs are those of the
sampled tokens, at the sampling temperature, in fp32; a noisy policy sampled (`rollout_logps`), a clean one learns
(`old_logps`).

A group's completions share their prompt, which is computed once for several of them (packed rows), in training as in
generation. How completions become advantages and a loss is another matter (`trainable/grpo.py`).

Shapes: B = completions, G = completions of a prompt, T = completion tokens (right-padded), L = prompt tokens
(left-padded), V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch

from spaces.config import Correction, RolloutConfig
from trainable.episode import Group
from trainable.forward.head import is_plain, sampled_logps, too_many
from trainable.forward.transformer import forward_of, left_padded, positions
from trainable.policy.policy import Policy
from trainable.sharding import through

PACKED_TOKENS = 512
"""Longest row of a prompt with several completions. Up to here attention is little of the work, also what is masked."""
LARGEST_NATS = 20.0
"""Differences of log-probs above it count as it where they become a ratio (verl's limit, too). In single precision
exp(89) is infinite, and the gradient of a token that the clip has cut out would be 0 times that."""


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
    group_size: int = 1
    """G: so many rows side by side continue one prompt."""

    def __len__(self) -> int:
        return len(self.completion_ids)

    def rows(self, index: torch.Tensor | slice, group_size: int = 1) -> "Batch":
        """A sub-batch, whose rows continue one prompt each, or `group_size` of them side by side the same one."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value[index] for name, value in values.items() if isinstance(value, torch.Tensor)}
        return Batch(**{**values, **tensors, "group_size": group_size})

    def rows_of(self, groups: torch.Tensor) -> torch.Tensor:
        """Indices of all rows of these groups."""
        return (groups[:, None] * self.group_size + torch.arange(self.group_size, device=groups.device)).flatten()

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

    def correction(self, rollout: RolloutConfig) -> "ImportanceWeights":
        """Of the clean policy over the noisy one, as the configuration wishes."""
        return importance_weights(
            rollout.correction, self.old_logps, self.rollout_logps, self.mask, rollout.correction_cap
        )


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
    )


# --- training's forward pass -----------------------------------------------------------------------------------------


def completion_logps(policy: Policy, batch: Batch, temperature: float) -> torch.Tensor:
    """Log-probs [B, T] of the completions' tokens at the sampling temperature.

    A prompt is computed once for several of its completions: they follow it in one row and do not see each other.
    The longer the row, the more of its attention is masked away, so there is a limit to it; from there on each
    completion has a row of its own. So it has in an architecture of which nobody has shown that packing is equal.
    """
    length, tokens = batch.prompt_ids.shape[1], batch.completion_ids.shape[1]
    even = [k for k in range(1, batch.group_size + 1) if batch.group_size % k == 0]
    fitting = [k for k in even if length + k * tokens <= PACKED_TOKENS]
    side_by_side = max(fitting, default=1) if packs(policy) else 1
    logps: torch.Tensor = through(policy.network, partial(_logps_packed, policy, batch, temperature, side_by_side))
    return logps


def packs(policy: Policy) -> bool:
    """Whether completions of a prompt may share a row."""
    return policy.packs or forward_of(policy) is not None


def _logps_packed(policy: Policy, batch: Batch, temperature: float, side_by_side: int) -> torch.Tensor:
    """R = rows of a prompt and K = `side_by_side` of its completions, S = L + K * T.

    In rows of their own transformers makes the mask: it knows of windows, chunks and biases by distance.
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
    by_transformers = side_by_side == 1 and forward is None
    mask = real.long() if by_transformers else _mask_of_packed(policy, real, tokens, side_by_side)
    if forward is not None and is_plain(forward.head) and too_many(rows * kept, forward.head):
        hidden = forward.normed(forward.hidden(ids, forward.angles(position_ids), forward.masked(mask))[:, -kept:])
        inside = real[:, -kept + 1 :]  # [R, K * T]: padding needs no log-prob, and gets 0
        logps = torch.zeros(inside.shape, device=device)
        found = sampled_logps(hidden[row, before][inside], forward.head, completions[inside], temperature)
        return logps.masked_scatter(inside, found).view(-1, tokens)
    distribution = torch.log_softmax(_logits(policy, ids, position_ids, mask, kept).float() / temperature, dim=-1)
    return distribution[row, before, completions].view(-1, tokens)  # of [R, 1 + K * T, V]


def _mask_of_packed(policy: Policy, real: torch.Tensor, tokens: int, side_by_side: int) -> torch.Tensor:
    """Additive, [R, 1, S, S]: a token sees its prompt and its own completion; real [R, S] is false on padding."""
    device, length = real.device, real.shape[1] - side_by_side * tokens
    numbers = 1 + torch.arange(side_by_side, device=device)
    owner = torch.cat([torch.zeros(length, device=device), numbers.repeat_interleave(tokens)])  # [S]
    related = (owner[:, None] == owner) | (owner == 0)  # [S, S]: the same completion, or the prompt
    visible = related.tril() & real[:, None]  # [R, S, S]
    # Padding sees itself: a row that sees nothing would become NaN.
    visible |= torch.eye(len(owner), dtype=torch.bool, device=device)
    dtype = next(policy.model.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def _logits(
    policy: Policy, ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor, keep: int
) -> torch.Tensor:
    """Of the last `keep` tokens of each row, [R, keep, V]; ids and position ids [R, S], additive mask [R, 1, S, S] or
    for transformers also [R, S]."""
    forward = forward_of(policy)
    if forward is not None:
        return forward.logits(forward.hidden(ids, forward.angles(position_ids), forward.masked(mask))[:, -keep:])
    out = policy.model(
        input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False, logits_to_keep=keep
    )
    logits: torch.Tensor = out.logits
    return logits


@torch.no_grad()
def clean_logps(policy: Policy, batch: Batch, temperature: float, micro_batch: int) -> torch.Tensor:
    """Log-probs [B, T] without gradient, some rows at a time."""
    return torch.cat([completion_logps(policy, batch.part(rows), temperature) for rows in batch.slices(micro_batch)])


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
    if level == "sequence":
        logs = difference.sum(1)  # [B]
        weights = logs.exp().clamp(max=cap)[:, None].expand_as(mask)
    else:
        logs = difference[mask > 0]  # [tokens]
        weights = difference.exp().clamp(max=cap) if level == "token" else torch.ones_like(mask)
    inside = difference[mask > 0]
    return ImportanceWeights(
        weights=weights.detach(),
        mean=logs.exp().clamp(max=cap).mean().item(),
        effective_share=effective_share(logs),
        kl=(inside.clamp(max=LARGEST_NATS).exp() - inside - 1).mean().item(),
    )


def effective_share(logs: torch.Tensor) -> float:
    """(sum w)^2 / (n sum w^2) of the weights exp(logs), in [1 / n, 1]. A common factor cancels, so the largest weight
    is 1: sums of squares of e^-60 are 0, and of e^60 infinite."""
    relative = (logs.detach().double() - logs.max()).exp()
    return (relative.sum().square() / (len(relative) * relative.square().sum())).clamp(max=1.0).item()

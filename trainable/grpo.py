"""GRPO in small pure functions: groups -> advantages -> loss.

A group of completions of one question is its own baseline: advantage = reward minus the group's mean, over the group's std
(DeepSeekMath, arXiv 2402.03300). The loss is PPO's clipped ratio per token; four ways of averaging it are in use, and the clip
may be wider upwards (DAPO, arXiv 2503.14476). The ratio compares two clean 4-bit policies: now, and when the step began. The
noisy policy that sampled is a third one; the correction weight min(pi_train_old / pi_rollout, cap) tells it apart when it is
switched on.

What a group without variance means is a policy with a typed outcome, not an exception: a filter that raised is how low scores
were once taken for a broken run. Rejected groups are counted apart as all-wrong and all-right, because running out of the
latter is success.

Mini-batches are made of whole groups, as in verl: a group's completions share its prompt, which is then computed once for all of them,
in training as in generation.

Shapes: B = completions, G = completions of a prompt, T = completion tokens (right-padded), L = prompt tokens (left-padded).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from spaces.config import Correction, FilterPolicy, GRPOConfig, Loss, RolloutConfig
from trainable.episode import FilterOutcome, Group
from trainable.forward import forward_of, positions
from trainable.model import Policy
from trainable.rollout import left_padded

_EPSILON = 1e-4  # added to the std of a group, as in TRL
_PACKED_TOKENS = 512
"""Longest row of a prompt with several completions. Up to here attention is a small part of the work, also the part that is masked."""


# --- groups ------------------------------------------------------------------------------------------------------------------


def shaped_rewards(groups: Sequence[Group], grpo: GRPOConfig, max_new_tokens: int) -> torch.Tensor:
    """Rewards [groups, G] after the overlong penalty (DAPO: it grows linearly over the last `overlong_buffer` tokens)."""
    rewards = torch.tensor([[e.score.reward for e in group] for group in groups], dtype=torch.float32)
    if grpo.overlong_buffer == 0:
        return rewards
    lengths = torch.tensor([[len(e.completion.ids) for e in group] for group in groups], dtype=torch.float32)
    excess = (lengths - (max_new_tokens - grpo.overlong_buffer)).clamp(min=0) / grpo.overlong_buffer
    return rewards - grpo.overlong_penalty * excess


def group_advantages(rewards: torch.Tensor, scale: str = "group") -> torch.Tensor:
    """Advantages [groups, G] from rewards [groups, G]; a group without variance has advantage 0.

    `scale` divides by the std of the group, of the whole batch, or by nothing (Dr. GRPO, arXiv 2503.20783).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    # The mean of equal rewards may round, and Adam would make a whole update of what is left.
    centred = centred.where(rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True), 0.0)
    if scale == "group":
        return centred / (rewards.std(1, keepdim=True) + _EPSILON)
    if scale == "batch":
        return centred / (rewards.std() + _EPSILON)
    return centred


def filter_groups(policy: FilterPolicy, groups: Sequence[Group], wanted: int) -> FilterOutcome:
    """Choose what is trained on. off: the first `wanted` groups; drop: those with variance; resample: as drop, but all `wanted`
    or none."""
    rewards = [[e.score.reward for e in group] for group in groups]
    flat = [max(row) == min(row) for row in rewards]
    wrong = [f and not any(e.score.correct for e in g) for f, g in zip(flat, groups, strict=True)]
    right = [f and all(e.score.correct for e in g) for f, g in zip(flat, groups, strict=True)]
    kept = [g for g, f in zip(groups, flat, strict=True) if policy == "off" or not f][:wanted]
    return FilterOutcome(
        groups=tuple(kept),
        generated=len(groups),
        all_wrong=sum(wrong),
        all_right=sum(right),
        enough=policy != "resample" or len(kept) == wanted,
    )


# --- batches -----------------------------------------------------------------------------------------------------------------


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
        reference = self.reference_logps
        return Batch(
            prompt_ids=self.prompt_ids[index],
            prompt_mask=self.prompt_mask[index],
            completion_ids=self.completion_ids[index],
            mask=self.mask[index],
            rollout_logps=self.rollout_logps[index],
            advantages=self.advantages[index],
            old_logps=self.old_logps[index],
            reference_logps=None if reference is None else reference[index],
            group_size=group_size,
        )

    def rows_of(self, groups: torch.Tensor) -> torch.Tensor:
        """Indices of all rows of these groups."""
        return (groups[:, None] * self.group_size + torch.arange(self.group_size, device=groups.device)).flatten()

    def slices(self, size: int) -> list[slice]:
        """Consecutive rows, at most `size`: whole groups, or equal parts of a group that is larger."""
        if size >= self.group_size:
            size -= size % self.group_size
        while size < self.group_size and self.group_size % size:
            size -= 1
        return [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]


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


def completion_logps(policy: Policy, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [B, T] of the completions' tokens and entropies [B, T] (no gradient), fp32, at the sampling temperature.

    A prompt is computed once for several of its completions: they follow it in one row and do not see each other. The longer the row,
    the more of its attention is masked away, so there is a limit to it; from there on each completion has a row of its own.
    """
    length, tokens = batch.prompt_ids.shape[1], batch.completion_ids.shape[1]
    fitting = [k for k in range(1, batch.group_size + 1) if batch.group_size % k == 0 and length + k * tokens <= _PACKED_TOKENS]
    return _logps_packed(policy, batch, temperature, max(fitting, default=1))


def _logps_packed(policy: Policy, batch: Batch, temperature: float, side_by_side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """R = rows of a prompt and K = `side_by_side` of its completions, S = L + K * T."""
    (_, tokens), device = batch.completion_ids.shape, batch.mask.device
    prompt_mask = batch.prompt_mask[::side_by_side]  # [R, L]
    rows, length = prompt_mask.shape
    completions = batch.completion_ids.view(rows, -1)  # [R, K * T]
    ids = torch.cat([batch.prompt_ids[::side_by_side], completions], 1)  # [R, S]
    step = torch.arange(tokens, device=device).repeat(side_by_side)  # [K * T]: 0, 1, .., T - 1, 0, 1, ..
    position_ids = torch.cat([positions(prompt_mask), prompt_mask.sum(1, keepdim=True) + step], 1)  # [R, S]
    owner = torch.cat([torch.zeros(length, device=device), 1 + torch.arange(side_by_side, device=device).repeat_interleave(tokens)])  # [S]
    related = (owner[:, None] == owner) | (owner == 0)  # [S, S]: the same completion, or the prompt
    real = torch.cat([prompt_mask, batch.mask.view(rows, -1)], 1) > 0  # [R, S]
    visible = related.tril() & real[:, None]  # [R, S, S]
    visible |= torch.eye(len(owner), dtype=torch.bool, device=device)  # padding sees itself: a row that sees nothing would become NaN
    dtype = next(policy.model.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]  # [R, 1, S, S]
    logits = _logits(policy, ids, position_ids, mask, keep=side_by_side * tokens + 1)
    distribution = torch.log_softmax(logits.float() / temperature, dim=-1)  # [R, 1 + K * T, V]
    # A completion's first token follows the prompt's last one, which comes first here; any other follows the one before it.
    before = torch.arange(side_by_side * tokens, device=device).where(step > 0, 0)  # [K * T]
    logps = distribution[torch.arange(rows, device=device)[:, None], before, completions]  # [R, K * T]
    return logps.view(-1, tokens), _entropies(distribution)[:, before].view(-1, tokens)


def _logits(policy: Policy, ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
    """Of the last `keep` tokens of each row, [R, keep, V]; ids and position ids [R, S], additive mask [R, 1, S, S]."""
    forward = forward_of(policy)
    if forward is not None:
        return forward.logits(forward.hidden(ids, forward.angles(position_ids), forward.masked(mask))[:, -keep:])
    out = policy.model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False, logits_to_keep=keep)
    logits: torch.Tensor = out.logits
    return logits


def _entropies(distribution: torch.Tensor) -> torch.Tensor:
    """In nats, without gradient, from log-probs on the last axis; a token of probability 0 counts nothing."""
    detached = distribution.detach()
    return -(detached.exp() * detached.clamp(min=-1e30)).sum(-1)


@torch.no_grad()
def clean_logps(policy: Policy, batch: Batch, temperature: float, micro_batch: int) -> torch.Tensor:
    """Log-probs [B, T] without gradient, some rows at a time."""
    slices = batch.slices(micro_batch)
    return torch.cat([completion_logps(policy, batch.rows(rows, _together(batch, rows)), temperature)[0] for rows in slices])


def _together(batch: Batch, rows: slice) -> int:
    """Rows with one prompt, of those that `Batch.slices` gave."""
    count: int = rows.stop - rows.start
    return min(batch.group_size, count)


# --- loss --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWeights:
    """Importance weights of a batch and what they say about it."""

    weights: torch.Tensor  # [B, T]
    mean: float
    effective_share: float
    """Effective sample size over sample size, (sum w)^2 / (n sum w^2), of the weights before the cap."""
    kl: float
    """KL(rollout || clean) in nats per token, by the k3 estimator: mean of exp(d) - d - 1 with d = logp_clean - logp_rollout."""


def importance_weights(level: Correction, clean: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, cap: float) -> ImportanceWeights:
    """min(pi_clean / pi_rollout, cap) per token or per sequence, all [B, T]; `none` weighs 1 and reports the token weights."""
    difference = (clean - rollout).where(mask > 0, 0.0)  # [B, T]
    if level == "sequence":
        ratio = difference.sum(1).exp()  # [B]
        weights = ratio.clamp(max=cap)[:, None].expand_as(mask)
        sample = ratio
    else:
        ratio = difference.exp()  # [B, T]
        weights = ratio.clamp(max=cap) if level == "token" else torch.ones_like(mask)
        sample = ratio[mask > 0]
    inside = difference[mask > 0]
    return ImportanceWeights(
        weights=weights.detach(),
        mean=sample.clamp(max=cap).mean().item(),
        effective_share=(sample.sum().square() / (len(sample) * sample.square().sum())).item(),
        kl=(inside.exp() - inside - 1).mean().item(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMetrics:
    """Sums over tokens (or completions), so that micro-batches add up."""

    clipped: float
    """Tokens whose ratio was clipped against the advantage."""
    kl: float
    """Sum of the k3 KL to the reference policy."""
    tokens: float


def grpo_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    loss: Loss,
    clip_low: float,
    clip_high: float,
    normalizer: float,
    weights: torch.Tensor | None = None,
    reference_logps: torch.Tensor | None = None,
    kl_beta: float = 0.0,
) -> tuple[torch.Tensor, LossMetrics]:
    """Clipped policy loss. logps, old_logps, mask, weights, reference_logps: [B, T]; advantages: [B].

    `normalizer` is what the summed loss is divided by (see `loss_normalizer`), so that micro-batches add up to their
    mini-batch. grpo sums per-sequence means, the others sum tokens. The KL is that of the GRPO paper (TRL:
    use_bias_correction_kl=False).
    """
    inside = mask > 0
    # A padded token may hold anything: it is taken out before exp, because a product with 0 would keep its NaN, also in the gradient.
    ratio = (logps - old_logps).where(inside, 0.0).exp()  # [B, T]
    advantage = advantages[:, None]
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    token_loss = -torch.minimum(unclipped, clipped)  # [B, T]
    if weights is not None:
        token_loss = token_loss * weights
    kl = torch.zeros_like(token_loss)
    if reference_logps is not None:
        difference = (reference_logps - logps).where(inside, 0.0)
        kl = difference.exp() - difference - 1
        token_loss = token_loss + kl_beta * kl
    token_loss = token_loss.where(inside, 0.0)
    per_sequence = token_loss.sum(1) / mask.sum(1).clamp(min=1.0) if loss == "grpo" else token_loss.sum(1)  # [B]
    metrics = LossMetrics(
        clipped=((clipped < unclipped) & inside).sum().item(), kl=kl.detach()[inside].sum().item(), tokens=inside.sum().item()
    )
    return per_sequence.sum() / normalizer, metrics


def loss_normalizer(loss: Loss, mini_batch: Batch, whole: Batch, minibatches: int, max_new_tokens: int) -> float:
    """grpo: sequences; bnpo: tokens of the mini-batch; dapo: tokens of the step, shared among its mini-batches; dr_grpo: a
    constant."""
    if loss == "grpo":
        return float(len(mini_batch))
    if loss == "dr_grpo":
        return float(len(mini_batch) * max_new_tokens)
    if loss == "bnpo":
        return max(1.0, mini_batch.mask.sum().item())
    return max(1.0, whole.mask.sum().item() / minibatches)


# --- update ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMetrics:
    """Means over a step's updates."""

    loss: float
    grad_norm: float
    """Largest global norm before clipping. Not finite: the update was not applied, so that the weights stay usable."""
    clip_fraction: float
    reference_kl: float
    correction: ImportanceWeights


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    grpo: GRPOConfig,
    rollout: RolloutConfig,
    *,
    first_update: int,
    shuffle: torch.Generator,
) -> UpdateMetrics:
    """All updates of a step: epochs over mini-batches of shuffled groups, each in micro-batches whose gradients add up."""
    correction = importance_weights(rollout.correction, batch.old_logps, batch.rollout_logps, batch.mask, rollout.correction_cap)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses, norms, sums = [], [], [0.0, 0.0, 0.0]
    order = torch.empty(0, dtype=torch.long)
    for number in range(grpo.updates_per_step):
        part = number % grpo.minibatches
        if part == 0:
            order = torch.randperm(len(batch) // batch.group_size, generator=shuffle).to(batch.mask.device)
        chosen = batch.rows_of(order.tensor_split(grpo.minibatches)[part])
        if len(chosen) == 0:  # a filter left fewer groups than mini-batches
            continue
        mini, weights = batch.rows(chosen, batch.group_size), correction.weights[chosen]
        normalizer = loss_normalizer(grpo.loss, mini, batch, grpo.minibatches, rollout.max_new_tokens)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for rows in mini.slices(grpo.micro_batch_size):
            micro = mini.rows(rows, _together(mini, rows))
            logps, _ = completion_logps(policy, micro, rollout.temperature)
            loss, metrics = grpo_loss(
                logps,
                micro.old_logps,
                micro.advantages,
                micro.mask,
                loss=grpo.loss,
                clip_low=grpo.clip_low,
                clip_high=grpo.clip_high,
                normalizer=normalizer,
                weights=None if rollout.correction == "none" else weights[rows],
                reference_logps=micro.reference_logps,
                kl_beta=grpo.kl_beta,
            )
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            sums = [a + b for a, b in zip(sums, (metrics.clipped, metrics.kl, metrics.tokens), strict=True)]
        norm = torch.nn.utils.clip_grad_norm_(parameters, grpo.max_grad_norm).item()
        losses.append(total)
        norms.append(norm)
        if not (norm < float("inf")):
            break
        for group in optimizer.param_groups:
            group["lr"] = grpo.learning_rate * warmup_factor(first_update + number, grpo.warmup_updates)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    clipped, kl, tokens = sums
    return UpdateMetrics(
        loss=sum(losses) / len(losses),
        grad_norm=max(norms, key=lambda norm: float("inf") if norm != norm else norm),
        clip_fraction=clipped / max(tokens, 1.0),
        reference_kl=kl / max(tokens, 1.0),
        correction=correction,
    )


def warmup_factor(update: int, warmup_updates: int) -> float:
    """Linear from 1 / warmup at the first update to 1."""
    return min(1.0, (update + 1) / warmup_updates) if warmup_updates else 1.0


def with_old_logps(batch: Batch, old: torch.Tensor, reference: torch.Tensor | None) -> Batch:
    """The batch once the clean policy has spoken."""
    return replace(batch, old_logps=old, reference_logps=reference)

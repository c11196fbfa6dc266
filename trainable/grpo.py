"""GRPO in small pure functions: groups -> advantages -> loss.

A group of completions of one question is its own baseline: advantage = reward minus the group's mean, over the group's
std (DeepSeekMath, arXiv 2402.03300). The loss is PPO's clipped ratio per token; four ways of averaging it are in use,
and the clip may be wider upwards (DAPO, arXiv 2503.14476). The ratio compares two clean 4-bit policies: now, and when
the step began. The noisy policy that sampled is a third one; the correction weight min(pi_train_old / pi_rollout, cap)
tells it apart when it is switched on.

What a group without variance means is a policy with a typed outcome, not an exception: a filter that raised is how low
scores were once taken for a broken run. Rejected groups are counted apart as all-wrong and all-right, because running
out of the latter is success.

Mini-batches are made of whole groups, as in verl: a group's completions share its prompt, which is computed once for
all of them (`trainable/forward/logps.py`).

Shapes: B = completions, G = completions of a prompt, T = completion tokens (right-padded).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spaces.config import FilterPolicy, GRPOConfig, Loss, RolloutConfig
from trainable.episode import FilterOutcome, Group
from trainable.forward.logps import LARGEST_NATS, Batch, completion_logps
from trainable.masters import Rows
from trainable.policy.policy import Policy
from trainable.sharding import is_sharded
from trainable.signals import UpdateMetrics
from trainable.team import ALONE, Team

_EPSILON = 1e-4  # added to the std of a group, as in TRL


# --- groups -----------------------------------------------------------------------------------------------------------


def shaped_rewards(groups: Sequence[Group], grpo: GRPOConfig, max_new_tokens: int) -> torch.Tensor:
    """Rewards [groups, G] after the overlong penalty (DAPO: it grows linearly over the last `overlong_buffer`
    tokens)."""
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
    """Choose what is trained on. off: the first `wanted` groups; drop: those with variance; resample: as drop, but all
    `wanted` or none."""
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


# --- loss -------------------------------------------------------------------------------------------------------------


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
    # A padded token may hold anything: it is taken out before exp, because a product with 0 would keep its NaN, also in
    # the gradient.
    ratio = (logps - old_logps).where(inside, 0.0).clamp(max=LARGEST_NATS).exp()  # [B, T]
    advantage = advantages[:, None]
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    token_loss = -torch.minimum(unclipped, clipped)  # [B, T]
    if weights is not None:
        token_loss = token_loss * weights
    kl = torch.zeros_like(token_loss)
    if reference_logps is not None:
        difference = (reference_logps - logps).where(inside, 0.0)
        kl = difference.clamp(max=LARGEST_NATS).exp() - difference - 1
        token_loss = token_loss + kl_beta * kl
    token_loss = token_loss.where(inside, 0.0)
    per_sequence = token_loss.sum(1) / mask.sum(1).clamp(min=1.0) if loss == "grpo" else token_loss.sum(1)  # [B]
    metrics = LossMetrics(
        clipped=((clipped < unclipped) & inside).sum().item(),
        kl=kl.detach()[inside].sum().item(),
        tokens=inside.sum().item(),
    )
    return per_sequence.sum() / normalizer, metrics


def loss_normalizer(loss: Loss, mini_batch: Batch, whole: Batch, minibatches: int, max_new_tokens: int) -> float:
    """grpo: sequences; bnpo: tokens of the mini-batch; dapo: tokens of the step, shared among its mini-batches;
    dr_grpo: a constant."""
    if loss == "grpo":
        return float(len(mini_batch))
    if loss == "dr_grpo":
        return float(len(mini_batch) * max_new_tokens)
    if loss == "bnpo":
        return max(1.0, mini_batch.mask.sum().item())
    return max(1.0, whole.mask.sum().item() / minibatches)


# --- update -----------------------------------------------------------------------------------------------------------


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    grpo: GRPOConfig,
    rollout: RolloutConfig,
    *,
    first_update: int,
    shuffle: torch.Generator,
    team: Team = ALONE,
) -> UpdateMetrics:
    """All updates of a step: epochs over mini-batches of shuffled groups, each in micro-batches whose gradients add
    up. A team shares the groups of each mini-batch out; every process then makes the same step."""
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = [p for p in everything if not isinstance(p, Rows)]
    correction = None if rollout.correction == "none" else batch.correction(rollout).weights
    losses, norms, sums = [], [], [0.0, 0.0, 0.0]
    order = torch.empty(0, dtype=torch.long)
    for number in range(grpo.updates_per_step):
        part = number % grpo.minibatches
        if part == 0:
            order = torch.randperm(len(batch) // batch.group_size, generator=shuffle).to(batch.mask.device)
        chosen = batch.rows_of(order.tensor_split(grpo.minibatches)[part])
        if len(chosen) == 0:  # a filter left fewer groups than mini-batches
            continue
        mini = batch.rows(chosen, batch.group_size)
        weights = None if correction is None else correction[chosen]
        normalizer = loss_normalizer(grpo.loss, mini, batch, grpo.minibatches, rollout.max_new_tokens)
        learned, gradients = [], []
        spans = team.spans(len(mini) // mini.group_size)
        idle = _idle_passes([mini.groups(groups) for groups in spans], grpo, team) if is_sharded(policy.network) else 0
        optimizer.zero_grad(set_to_none=True)
        for groups in spans:
            for parameter in parameters:
                parameter.grad = None
            rows = slice(groups.start * mini.group_size, groups.stop * mini.group_size)
            own = None if weights is None else weights[rows]
            loss = backward(policy, mini.groups(groups), own, grpo, rollout, normalizer)
            gradients.append([parameter.grad for parameter in parameters])
            learned.append((loss, [grad is not None for grad in gradients[-1]]))
        for _ in range(idle):
            nothing = 0.0 * completion_logps(policy, mini.rows(slice(0, 1)), rollout.temperature).sum()
            nothing.backward()  # type: ignore[no-untyped-call]
        shares = [share for own in team.gather("update", learned) for share in own]
        add_up(parameters, gradients, [any(row) for row in zip(*(has for _, has in shares), strict=True)], team)
        for (_, metrics), _ in shares:
            sums = [a + b for a, b in zip(sums, (metrics.clipped, metrics.kl, metrics.tokens), strict=True)]
        norm = clip(everything, grpo.max_grad_norm, team)
        losses.append(sum(loss for (loss, _), _ in shares))
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
    )


def backward(
    policy: Policy,
    share: Batch,
    weights: torch.Tensor | None,
    grpo: GRPOConfig,
    rollout: RolloutConfig,
    normalizer: float,
) -> tuple[float, LossMetrics]:
    """Add the gradients of some groups of a mini-batch; returns their part of its loss. There may be none."""
    total, sums = 0.0, LossMetrics(clipped=0.0, kl=0.0, tokens=0.0)
    for rows in share.slices(grpo.micro_batch_size):
        micro = share.part(rows)
        logps = completion_logps(policy, micro, rollout.temperature)
        loss, metrics = grpo_loss(
            logps,
            micro.old_logps,
            micro.advantages,
            micro.mask,
            loss=grpo.loss,
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            normalizer=normalizer,
            weights=None if weights is None else weights[rows],
            reference_logps=micro.reference_logps,
            kl_beta=grpo.kl_beta,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        sums = LossMetrics(
            clipped=sums.clipped + metrics.clipped, kl=sums.kl + metrics.kl, tokens=sums.tokens + metrics.tokens
        )
    return total, sums


def add_up(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor | None]],
    have: Sequence[bool],
    team: Team,
) -> None:
    """Give each parameter the sum of its gradients over all shares. `gradients`: of the shares of this process; `have`:
    which parameters have one in any share. The others keep none: an optimizer would decay them."""
    used = [(index, parameter) for index, parameter in enumerate(parameters) if have[index]]
    parts = [[torch.zeros_like(p) if (grad := own[index]) is None else grad for index, p in used] for own in gradients]
    for parameter in parameters:
        parameter.grad = None
    for (_, parameter), total in zip(used, team.add_up(parts), strict=True):
        parameter.grad = total


def _idle_passes(shares: Sequence[Batch], grpo: GRPOConfig, team: Team) -> int:
    """By how many passes this process has fewer than another: matrices in shards come together in all at once, so it
    goes along, with a gradient of 0."""
    own = sum(len(share.slices(grpo.micro_batch_size)) for share in shares)
    return max(team.gather("passes", own)) - own


def clip(parameters: Sequence[torch.Tensor], limit: float, team: Team) -> float:
    """Scale gradients down to this norm where theirs is larger; returns theirs, over all rows of every process."""
    rows = [p.grad for p in parameters if isinstance(p, Rows) and p.grad is not None]
    if not rows:
        return torch.nn.utils.clip_grad_norm_(parameters, limit).item()
    whole = [p.grad for p in parameters if not isinstance(p, Rows) and p.grad is not None]
    squares = [torch.nn.utils.get_total_norm(some).item() ** 2 for some in (rows, whole)]
    norm = math.sqrt(sum(team.gather("norm", squares[0])) + squares[1])
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norm))
    return norm


def warmup_factor(update: int, warmup_updates: int) -> float:
    """Linear from 1 / warmup at the first update to 1."""
    return min(1.0, (update + 1) / warmup_updates) if warmup_updates else 1.0

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
from dataclasses import dataclass, replace

import numpy as np
import torch

from spaces.config import FilterPolicy, GRPOConfig, Loss, RolloutConfig
from trainable.episode import FilterOutcome, Group
from trainable.forward.logps import LARGEST_NATS, Batch, completion_logps, correction_weights, micro_batches
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
    """Sums over tokens, so that micro-batches add up; numbers that are still on the device."""

    clipped: torch.Tensor
    """Tokens whose ratio was clipped against the advantage."""
    kl: torch.Tensor
    """Sum of the k3 KL to the reference policy."""
    tokens: torch.Tensor


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
        clipped=((clipped < unclipped) & inside).sum(),
        kl=kl.detach().where(inside, 0.0).sum(),
        tokens=inside.sum(),
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
        return max(1.0, float(mini_batch.lengths.sum()))
    return max(1.0, float(whole.lengths.sum()) / minibatches)


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
    """All updates of a step: epochs over mini-batches of shuffled groups, each in micro-batches whose gradients add up.
    A team shares the groups of each mini-batch out; every process then makes the same step.

    Nothing is asked of the device but the norm of each update's gradient, which decides whether it is applied, and in
    the end the sums that are told. (Several processes tell each other theirs before each of their sums of gradients.)
    """
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = [p for p in everything if not isinstance(p, Rows)]
    if rollout.correction != "none":
        batch = replace(batch, weights=_correction(batch, rollout))
    norms = []
    sums = torch.zeros(4, dtype=torch.double, device=batch.mask.device)  # loss, then those of LossMetrics
    order = np.empty(0, dtype=np.int64)
    for number in range(grpo.updates_per_step):
        part = number % grpo.minibatches
        if part == 0:
            order = torch.randperm(len(batch) // batch.group_size, generator=shuffle).numpy()
        chosen = batch.rows_of(np.array_split(order, grpo.minibatches)[part])
        if len(chosen) == 0:  # a filter left fewer groups than mini-batches
            continue
        mini = batch.rows(chosen, batch.group_size)
        normalizer = loss_normalizer(grpo.loss, mini, batch, grpo.minibatches, rollout.max_new_tokens)
        learned, gradients = [], []
        own = [mini.groups(groups) for groups in team.spans(len(mini) // mini.group_size)]
        idle = _idle_passes(policy, own, grpo, team) if is_sharded(policy.network) else 0
        optimizer.zero_grad(set_to_none=True)
        for share in own:
            for parameter in parameters:
                parameter.grad = None
            told = backward(policy, share, grpo, rollout, normalizer)
            gradients.append([parameter.grad for parameter in parameters])
            has = [grad is not None for grad in gradients[-1]]
            learned.append((told if team.size == 1 else told.cpu(), has))
        for _ in range(idle):
            nothing = 0.0 * completion_logps(policy, mini.rows(slice(0, 1)), rollout.temperature).sum()
            nothing.backward()  # type: ignore[no-untyped-call]
        shares = [share for one in team.gather("update", learned) for share in one]
        add_up(parameters, gradients, [any(row) for row in zip(*(has for _, has in shares), strict=True)], team)
        for told, _ in shares:
            sums += told.to(sums.device)
        norm = clip(everything, grpo.max_grad_norm, team)
        norms.append(norm)
        if not (norm < float("inf")):
            break
        for group in optimizer.param_groups:
            group["lr"] = grpo.learning_rate * warmup_factor(first_update + number, grpo.warmup_updates)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss_sum, clipped, kl, tokens = (number.item() for number in sums)
    return UpdateMetrics(
        loss=loss_sum / len(norms),
        grad_norm=max(norms, key=lambda norm: float("inf") if norm != norm else norm),
        clip_fraction=clipped / max(tokens, 1.0),
        reference_kl=kl / max(tokens, 1.0),
    )


def backward(policy: Policy, share: Batch, grpo: GRPOConfig, rollout: RolloutConfig, normalizer: float) -> torch.Tensor:
    """Add the gradients of some groups of a mini-batch, of which there may be none; returns their part of its loss and
    of the sums in LossMetrics, [4] on the device."""
    sums = torch.zeros(4, dtype=torch.double, device=share.mask.device)
    for _, micro in micro_batches(policy, share, grpo.micro_batch):
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
            weights=micro.weights,
            reference_logps=micro.reference_logps,
            kl_beta=grpo.kl_beta,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        told = (loss.detach(), metrics.clipped, metrics.kl, metrics.tokens)
        sums += torch.stack([number.double() for number in told])
    return sums


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


def _idle_passes(policy: Policy, shares: Sequence[Batch], grpo: GRPOConfig, team: Team) -> int:
    """By how many passes this process has fewer than another: matrices in shards come together in all at once, so it
    goes along, with a gradient of 0."""
    own = sum(1 for share in shares for _ in micro_batches(policy, share, grpo.micro_batch))
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


def _correction(batch: Batch, rollout: RolloutConfig) -> torch.Tensor:
    """Weights [B, T] of the clean policy over the noisy one."""
    arguments = (batch.old_logps, batch.rollout_logps, batch.mask, rollout.correction_cap)
    return correction_weights(rollout.correction, *arguments)


def warmup_factor(update: int, warmup_updates: int) -> float:
    """Linear from 1 / warmup at the first update to 1."""
    return min(1.0, (update + 1) / warmup_updates) if warmup_updates else 1.0

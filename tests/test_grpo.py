"""GRPO's arithmetic, with TRL's own trainer as the oracle: advantages, losses, gradients, clip and KL metrics.

The trainer is a real `trl.GRPOTrainer` on the CPU. Where a claim is about the loss alone, the log-probs that it would
compute are handed to it; where it is about parameters, both sides compute them on the same weights.
"""

import importlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import trainable.forward.head
import trainable.forward.logps
import trainable.grpo
from spaces.config import GRPOConfig, Loss, ModelConfig, QuantConfig, RolloutConfig
from tests.conftest import ModelFolder, completed, episode, ragged_prompts, sampled_groups
from trainable.episode import Group
from trainable.forward.logps import Batch, completion_logps, importance_weights, make_batch
from trainable.grpo import (
    filter_groups,
    group_advantages,
    grpo_loss,
    loss_normalizer,
    shaped_rewards,
    update,
    warmup_factor,
)
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy
from trainable.seeds import generator

LOSSES = get_args(Loss)
W16A16 = QuantConfig(weights="none", activations="none")
MAX_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def oracle(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A GRPOTrainer on the model that `policy` loads, with a reference model; its rewards are read from
    `oracle.rewards`."""
    from datasets import Dataset

    with pytest.MonkeyPatch.context() as patch:
        utils = importlib.import_module("trl.import_utils")
        patch.setattr(utils, "is_vllm_available", lambda *_, **__: False)  # else it is imported, for nothing
        from trl.trainer.grpo_config import GRPOConfig as TRLConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

    arguments = TRLConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=12,
        num_generations=4,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=0.7,
        beta=0.1,
        use_bias_correction_kl=False,  # ours is the KL term of the GRPO paper
        model_init_kwargs={"dtype": "float32"},
    )
    trainer: Any = GRPOTrainer(
        model=model_folder(),
        reward_funcs=lambda completions, **_: trainer.rewards,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1+2="}] * 12),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture
def policy(model_folder: ModelFolder) -> Policy:
    return load_policy(ModelConfig(name=model_folder()), W16A16, seed=0)


def random_batch(rows: int, seed: int = 0, spread: float = 0.3) -> Batch:
    """Ragged rows whose log-probs are `spread` apart, so that a good part of the ratios leaves [0.8, 1.28]."""
    source = generator("batch", seed)
    lengths = torch.randint(1, MAX_NEW_TOKENS + 1, (rows,), generator=source)
    lengths[0] = MAX_NEW_TOKENS - 2
    width = int(lengths.max())
    mask = (torch.arange(width) < lengths[:, None]).float()

    def near(logps: torch.Tensor) -> torch.Tensor:
        return logps + spread * torch.randn(logps.shape, generator=source)

    old = -3 * torch.rand(rows, width, generator=source)
    return Batch(
        prompt_ids=torch.ones(rows, 1, dtype=torch.long),
        prompt_mask=torch.ones(rows, 1, dtype=torch.long),
        completion_ids=torch.ones(rows, width, dtype=torch.long),
        mask=mask,
        rollout_logps=near(old),
        advantages=torch.randn(rows, generator=source),
        old_logps=old,
        reference_logps=near(old),
    )


def our_loss(
    logps: torch.Tensor, batch: Batch, loss: Loss, normalizer: float, **options: Any
) -> tuple[torch.Tensor, Any]:
    arguments = {"clip_low": 0.2, "clip_high": 0.28, **options}
    return grpo_loss(
        logps, batch.old_logps, batch.advantages, batch.mask, loss=loss, normalizer=normalizer, **arguments
    )


def trl_loss(
    oracle: Any,
    monkeypatch: pytest.MonkeyPatch,
    batch: Batch,
    loss: Loss,
    *,
    logps: torch.Tensor | None = None,
    whole: Batch | None = None,
    minibatches: int = 1,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    weights: torch.Tensor | None = None,
    kl_beta: float = 0.0,
) -> torch.Tensor:
    """TRL's loss of a mini-batch, from given log-probs or those of its own model."""
    for name, setting in {
        "loss_type": loss,
        "epsilon_low": clip_low,
        "epsilon_high": clip_high,
        "beta": kl_beta,
        "use_vllm": weights is not None,
        "vllm_importance_sampling_correction": weights is not None,
    }.items():
        monkeypatch.setattr(oracle, name, setting)
    monkeypatch.setattr(oracle.args, "steps_per_generation", minibatches)
    if logps is not None:
        monkeypatch.setattr(
            oracle, "_get_per_token_logps_and_entropies", lambda *_, **__: (logps, torch.zeros_like(logps), None)
        )
    inputs = {
        "prompt_ids": batch.prompt_ids,
        "prompt_mask": batch.prompt_mask,
        "completion_ids": batch.completion_ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "num_items_in_batch": (whole or batch).mask.sum(),
        "old_per_token_logps": batch.old_logps,
        "ref_per_token_logps": batch.reference_logps,
        "importance_sampling_ratio": weights,
    }
    value: torch.Tensor = oracle._compute_loss(oracle.model, inputs)
    return value


def with_gradient(loss: torch.Tensor, logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kl_beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 2.0)])
@pytest.mark.parametrize("level", ["none", "token", "sequence"])
def test_loss_and_gradient_are_those_of_trl(
    oracle: Any,
    monkeypatch: pytest.MonkeyPatch,
    loss: Loss,
    kl_beta: float,
    clip_low: float,
    clip_high: float,
    level: Any,
) -> None:
    whole = random_batch(12)
    weights = importance_weights(level, whole.old_logps, whole.rollout_logps, whole.mask, cap=2.0).weights
    for part in (slice(0, 4), slice(4, 12)):
        batch = whole.rows(part)
        logps = (
            batch.old_logps + 0.3 * torch.randn(batch.mask.shape, generator=generator("now", part.start))
        ).requires_grad_()
        options: dict[str, Any] = {
            "clip_low": clip_low,
            "clip_high": clip_high,
            "kl_beta": kl_beta,
            "weights": None if level == "none" else weights[part],
        }
        expected = with_gradient(
            trl_loss(oracle, monkeypatch, batch, loss, logps=logps, whole=whole, minibatches=2, **options), logps
        )
        normalizer = loss_normalizer(loss, batch, whole, 2, MAX_NEW_TOKENS)
        ours, metrics = our_loss(logps, batch, loss, normalizer, reference_logps=batch.reference_logps, **options)
        for value, reference in zip(with_gradient(ours, logps), expected, strict=True):
            torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)
        assert metrics.tokens == batch.mask.sum()
        assert metrics.clipped / metrics.tokens == pytest.approx(
            oracle._metrics["train"]["clip_ratio/region_mean"][-1], abs=1e-6
        )
        if kl_beta:
            assert metrics.kl / metrics.tokens == pytest.approx(oracle._metrics["train"]["kl"][-1], rel=1e-5)


def test_the_rows_of_that_comparison_reach_both_clips() -> None:
    batch = random_batch(12)
    ratio = (0.3 * torch.randn(batch.mask.shape, generator=generator("now", 0))).exp()
    outside = ((ratio < 0.8) & (batch.advantages < 0)[:, None], (ratio > 1.28) & (batch.advantages > 0)[:, None])
    assert all((here & (batch.mask > 0)).sum() > 3 for here in outside)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_update_is_on_policy(oracle: Any, monkeypatch: pytest.MonkeyPatch, loss: Loss) -> None:
    """Ratios of 1: nothing is clipped, and the gradient is that of -A log p."""
    batch = random_batch(8)
    logps = batch.old_logps.clone().requires_grad_()
    normalizer = loss_normalizer(loss, batch, batch, 1, MAX_NEW_TOKENS)
    ours, metrics = our_loss(logps, batch, loss, normalizer)
    expected = trl_loss(oracle, monkeypatch, batch, loss, logps=logps)
    _, gradient = with_gradient(ours, logps)
    torch.testing.assert_close(gradient, with_gradient(expected, logps)[1], atol=1e-6, rtol=1e-5)
    tokens = batch.mask.sum(1, keepdim=True) if loss == "grpo" else 1.0
    torch.testing.assert_close(gradient, -batch.advantages[:, None] * batch.mask / tokens / normalizer)
    assert metrics.clipped == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
def test_the_gradient_of_every_parameter_is_that_of_trl(
    oracle: Any, monkeypatch: pytest.MonkeyPatch, policy: Policy, loss: Loss, kl_beta: float
) -> None:
    """From token ids to gradients, at temperature 0.7, with left- and right-padding."""
    groups = sampled_groups(policy, ragged_prompts(3), temperature=0.7)
    batch = make_batch(policy, groups, group_advantages(torch.rand(3, 4, generator=generator("rewards"))))
    logps = completion_logps(policy, batch, 0.7)
    shift = 0.2 * torch.randn(logps.shape, generator=generator("old"))
    batch = replace(batch, old_logps=logps.detach() + shift, reference_logps=logps.detach() - shift)
    normalizer = loss_normalizer(loss, batch, batch, 1, MAX_NEW_TOKENS)
    ours, _ = our_loss(logps, batch, loss, normalizer, reference_logps=batch.reference_logps, kl_beta=kl_beta)
    expected = trl_loss(oracle, monkeypatch, batch, loss, kl_beta=kl_beta)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    our_parameters, their_parameters = policy.trainable(), dict(oracle.model.named_parameters())
    assert list(our_parameters) == list(their_parameters)
    gradients, theirs = (
        torch.autograd.grad(value, list(parameters.values()))
        for value, parameters in ((ours, our_parameters), (expected, their_parameters))
    )
    torch.testing.assert_close(gradients, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("filling", [float("nan"), float("inf"), -1e30, 50.0])
def test_what_stands_in_the_padding_does_not_matter(loss: Loss, level: Any, filling: float) -> None:
    def results(value: float) -> tuple[list[float], torch.Tensor]:
        batch, padding = random_batch(6), random_batch(6).mask == 0
        spoilt = replace(
            batch,
            old_logps=batch.old_logps.masked_fill(padding, -value),
            rollout_logps=batch.rollout_logps.masked_fill(padding, value),
        )
        reference = batch.old_logps.masked_fill(padding, -value)
        now = (batch.old_logps + 0.1).masked_fill(padding, value).requires_grad_()
        correction = importance_weights(level, spoilt.old_logps, spoilt.rollout_logps, spoilt.mask, 2.0)
        ours, metrics = our_loss(
            now, spoilt, loss, 7.0, weights=correction.weights, reference_logps=reference, kl_beta=0.1
        )
        reported = [
            metrics.clipped,
            metrics.kl,
            metrics.tokens,
            correction.mean,
            correction.effective_share,
            correction.kl,
        ]
        return [ours.item(), *reported], with_gradient(ours, now)[1]

    numbers, gradient = results(filling)
    expected_numbers, expected_gradient = results(0.0)
    assert numbers == expected_numbers
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("nats", [-1e4, 95.0, 1e4])
def test_a_token_however_far_away_makes_neither_the_loss_nor_a_gradient_infinite(loss: Loss, nats: float) -> None:
    """Single precision ends at e^88: a token that the clip cuts out would give the gradient 0 times infinity."""
    batch = random_batch(6)
    for advantage in (1.0, 0.0, -1.0):
        now = batch.old_logps.clone()
        now[0, 0] += nats
        now.requires_grad_()
        ours, metrics = our_loss(
            now,
            replace(batch, advantages=torch.full((6,), advantage)),
            loss,
            7.0,
            reference_logps=batch.old_logps - nats,
            kl_beta=0.1,
        )
        value, gradient = with_gradient(ours, now)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        assert math.isfinite(metrics.kl)


# --- advantages -------------------------------------------------------------------------------------------------------


REWARDS = [
    [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    [0.1, 0.1, 0.1, 0.1, 0.3, -0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.5] * 12,
]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("rewards", REWARDS)
def test_advantages_are_those_of_trl(
    oracle: Any, monkeypatch: pytest.MonkeyPatch, scale: str, rewards: list[float]
) -> None:
    oracle.rewards = rewards
    monkeypatch.setattr(oracle, "scale_rewards", scale)
    monkeypatch.setattr(oracle, "beta", 0.0)
    monkeypatch.setattr(oracle, "_generate_single_turn", lambda *_: ([[3, 4, 1]] * 12, None))
    expected = oracle._generate_and_score_completions([{"prompt": "1+2="}] * 12)["advantages"]
    torch.testing.assert_close(
        group_advantages(torch.tensor(rewards).view(3, 4), scale).flatten(), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.3, 1 / 3])
@pytest.mark.parametrize("size", [2, 3, 6, 7, 8])
def test_a_group_without_variance_has_advantage_zero(scale: str, reward: float, size: int) -> None:
    """Exactly zero, although a mean of equal floats may round."""
    rewards = torch.tensor([[reward] * size, [0.0] * (size - 1) + [1.0]])
    advantages = group_advantages(rewards, scale)
    assert advantages[0].tolist() == [0.0] * size
    assert (advantages[1] != 0).all()


def test_advantages_of_a_group_sum_to_zero() -> None:
    rewards = torch.rand(5, 8, generator=generator("rewards"))
    for scale in ("group", "batch", "none"):
        torch.testing.assert_close(group_advantages(rewards, scale).sum(1), torch.zeros(5), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (6, 0.0), (7, 0.125), (8, 0.25), (9, 0.375), (10, 0.5)])
def test_the_overlong_penalty_grows_over_the_buffer(length: int, penalty: float) -> None:
    groups = [(episode(1.0, completion=completed(length)), episode(0.0, completion=completed(1)))]
    rewards = shaped_rewards(groups, GRPOConfig(overlong_buffer=4, overlong_penalty=0.5), max_new_tokens=10)
    assert rewards.tolist() == [[1.0 - penalty, 0.0]]
    assert shaped_rewards(groups, GRPOConfig(), max_new_tokens=10).tolist() == [[1.0, 0.0]]


# --- the filter -------------------------------------------------------------------------------------------------------


def groups_of(kinds: str) -> list[Group]:
    """m = mixed, w = all wrong, r = all right, p = all the same partial credit (wrong), d = differing partial credit
    (all wrong)."""
    rewards = {"m": (1.0, 0.0), "w": (0.0, 0.0), "r": (1.0, 1.0), "p": (0.3, 0.3), "d": (0.3, 0.1)}
    return [tuple(episode(reward) for reward in rewards[kind]) for kind in kinds]


@pytest.mark.parametrize(
    ("policy", "generated", "kept", "wrong", "right", "enough", "rejected_as_wrong"),
    [
        # off trains on what a batch is, without looking
        ("off", "mwrm", "mwrm", 1, 1, True, False),
        ("off", "wwww", "wwww", 4, 0, True, False),
        ("off", "mwrmww", "mwrm", 3, 1, True, False),
        # drop leaves out, and is content with what is left
        ("drop", "mwrm", "mm", 1, 1, True, False),
        ("drop", "wwww", "", 4, 0, True, False),
        ("drop", "mmmmm", "mmmm", 0, 0, True, False),
        # resample wants all of them
        ("resample", "mmmm", "mmmm", 0, 0, True, False),
        ("resample", "mmmdmm", "mmmd", 0, 0, True, False),
        ("resample", "mmmw", "mmm", 1, 0, False, True),
        ("resample", "wwww", "", 4, 0, False, True),
        ("resample", "pppp", "", 4, 0, False, True),
        ("resample", "mrrr", "m", 0, 3, False, False),
        ("resample", "mwrr", "m", 1, 2, False, False),
        ("resample", "mwr", "m", 1, 1, False, True),
        ("resample", "wwwwmwmwwmm", "mmmm", 7, 0, True, False),
    ],
)
def test_filter(
    policy: Any, generated: str, kept: str, wrong: int, right: int, enough: bool, rejected_as_wrong: bool
) -> None:
    groups = groups_of(generated)
    outcome = filter_groups(policy, groups, 4)
    allowed = [g for g, kind in zip(groups, generated, strict=True) if policy == "off" or kind in "md"]
    assert list(outcome.groups) == allowed[:4], "the first ones, in order"
    assert len(outcome.groups) == len(kept)
    assert (outcome.generated, outcome.all_wrong, outcome.all_right) == (len(generated), wrong, right)
    assert (outcome.enough, outcome.rejected_as_wrong) == (enough, rejected_as_wrong)


def test_a_flat_group_that_is_partly_correct_is_neither_all_wrong_nor_all_right() -> None:
    outcome = filter_groups("drop", [(episode(0.5, correct=True), episode(0.5, correct=False))], 4)
    assert (outcome.all_wrong, outcome.all_right, outcome.groups) == (0, 0, ())


# --- the update -------------------------------------------------------------------------------------------------------


class Recorder(torch.optim.SGD):
    """Plain gradient descent that remembers the learning rate of each step; its first step leaves -lr * gradient in the
    weights."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.trainable().values(), lr=1.0)
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def ready_batch(policy: Policy, prompts: int = 3, rewards: Sequence[float] = (1.0, 0.0, 0.0, 0.5)) -> Batch:
    groups = sampled_groups(policy, ragged_prompts(prompts))
    batch = make_batch(policy, groups, group_advantages(torch.tensor([rewards] * prompts)))
    logps = completion_logps(policy, batch, 1.0).detach()
    return replace(batch, old_logps=logps + 0.1 * torch.randn(logps.shape, generator=generator("old")))


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


def run_update(
    policy: Policy, batch: Batch, rollout: RolloutConfig | None = None, first_update: int = 0, **options: Any
) -> tuple[Recorder, Any]:
    settings: dict[str, Any] = {"learning_rate": 1e-3, "max_grad_norm": 1e9, "updates_per_step": 1, **options}
    optimizer = Recorder(policy)
    metrics = update(
        policy,
        optimizer,
        batch,
        GRPOConfig(**settings),
        rollout or RolloutConfig(max_new_tokens=MAX_NEW_TOKENS),
        first_update=first_update,
        shuffle=generator("shuffle"),
    )
    return optimizer, metrics


def moved(policy: Policy, before: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(p.detach() - before[name]).flatten() for name, p in policy.trainable().items()])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("updates", [1, 2])
def test_micro_batches_add_up(model_folder: ModelFolder, loss: Loss, updates: int) -> None:
    shifts, values = [], []
    slicings: list[dict[str, int]] = [{"micro_batch_size": size} for size in (1, 5, 1024)]
    slicings[:0] = [{"micro_batch_tokens": tokens} for tokens in (1, 150, 10**6)]
    for slicing in slicings:
        policy = load_policy(ModelConfig(name=model_folder()), W16A16, seed=0)
        before, batch = weights_of(policy), ready_batch(policy)
        rollout = RolloutConfig(max_new_tokens=MAX_NEW_TOKENS, correction="token")
        _, metrics = run_update(policy, batch, rollout, loss=loss, updates_per_step=updates, **slicing)
        shifts.append(moved(policy, before))
        values.append((metrics.loss, metrics.grad_norm, metrics.clip_fraction))
    assert shifts[-1].norm() > 1e-4
    for shift, value in zip(shifts[:-1], values[:-1], strict=True):
        torch.testing.assert_close(shift, shifts[-1], atol=1e-6, rtol=1e-3)
        assert value[0] == pytest.approx(values[-1][0], abs=1e-6)
        assert value == pytest.approx(values[-1], rel=1e-3, abs=1e-6)


class Asked(TorchDispatchMode):
    """What makes the host wait for a device: a number, or indices that are not known before the work is done."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [1, 4, 1024])
@pytest.mark.parametrize("correction", ["none", "token", "sequence"])
def test_an_update_asks_the_device_for_the_norm_of_its_gradient_and_nothing_else(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, size: int, correction: Any
) -> None:
    batch = ready_batch(policy)
    batch = replace(batch, reference_logps=batch.old_logps)
    monkeypatch.setattr(trainable.forward.logps, "_counted", None)
    rollout = RolloutConfig(max_new_tokens=MAX_NEW_TOKENS, correction=correction)
    for many in (trainable.forward.head.LOGITS_AT_ONCE, 30):  # the second takes the head's logits in chunks
        monkeypatch.setattr(trainable.forward.head, "LOGITS_AT_ONCE", many)
        with Asked() as asked:
            run_update(policy, batch, rollout, micro_batch_size=size, updates_per_step=3, kl_beta=0.1)
        assert asked.calls == {"_local_scalar_dense": 3 + 4}, "and in the end for what is told"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("correction", ["none", "token"])
def test_an_update_descends_the_gradient_of_the_loss(policy: Policy, loss: Loss, correction: Any) -> None:
    batch = ready_batch(policy)
    batch = replace(batch, reference_logps=batch.old_logps)
    logps = completion_logps(policy, batch, 1.0)
    weights = importance_weights(correction, batch.old_logps, batch.rollout_logps, batch.mask, 2.0).weights
    value, _ = our_loss(
        logps,
        batch,
        loss,
        loss_normalizer(loss, batch, batch, 1, MAX_NEW_TOKENS),
        weights=weights,
        reference_logps=batch.reference_logps,
        kl_beta=0.1,
    )
    gradients = torch.autograd.grad(value, list(policy.trainable().values()))
    before = weights_of(policy)
    rollout = RolloutConfig(max_new_tokens=MAX_NEW_TOKENS, correction=correction)
    _, metrics = run_update(policy, batch, rollout, loss=loss, kl_beta=0.1)
    expected = -1e-3 * torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(moved(policy, before), expected, atol=1e-7, rtol=1e-3)
    assert metrics.loss == pytest.approx(value.item(), rel=1e-4)
    assert metrics.grad_norm == pytest.approx(expected.norm().item() / 1e-3, rel=1e-3)


def test_without_correction_the_rollout_has_no_say(model_folder: ModelFolder) -> None:
    shifts = {}
    for correction in ("none", "token", "sequence"):
        for shift in (0.0, 0.4):
            policy = load_policy(ModelConfig(name=model_folder()), W16A16, seed=0)
            before, batch = weights_of(policy), ready_batch(policy)
            source = generator("shift")
            batch = replace(
                batch, rollout_logps=batch.rollout_logps + shift * torch.randn(batch.mask.shape, generator=source)
            )
            run_update(policy, batch, RolloutConfig(max_new_tokens=MAX_NEW_TOKENS, correction=correction))
            shifts[correction, shift] = moved(policy, before)
    assert torch.equal(shifts["none", 0.0], shifts["none", 0.4])
    for correction in ("token", "sequence"):
        assert not torch.allclose(shifts[correction, 0.0], shifts[correction, 0.4])


@pytest.mark.parametrize(
    ("updates", "epochs", "completions", "steps", "sizes"),
    [
        (1, 1, 12, 1, [12]),
        (4, 1, 12, 4, [3, 3, 3, 3]),
        (5, 1, 12, 5, [3, 3, 2, 2, 2]),
        (4, 2, 12, 4, [6, 6, 6, 6]),
        (3, 3, 12, 3, [12, 12, 12]),
        (8, 2, 3, 6, [1, 1, 1, 1, 1, 1]),  # the filter left fewer completions than mini-batches
    ],
)
def test_every_epoch_sees_every_completion_once(
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
    updates: int,
    epochs: int,
    completions: int,
    steps: int,
    sizes: list[int],
) -> None:
    batch = ready_batch(policy).rows(slice(0, completions))
    batch = replace(batch, advantages=torch.arange(1.0, completions + 1))  # names of the rows
    seen: list[list[float]] = []

    def spy(policy: Policy, rows: Batch, temperature: float) -> torch.Tensor:
        seen.append(rows.advantages.tolist())
        return completion_logps(policy, rows, temperature)

    monkeypatch.setattr(trainable.grpo, "completion_logps", spy)
    optimizer, _ = run_update(policy, batch, updates_per_step=updates, epochs=epochs)
    assert len(optimizer.rates) == steps
    assert [len(part) for part in seen] == sizes
    per_epoch = len(seen) // epochs
    orders = [list(chain(*seen[start : start + per_epoch])) for start in range(0, len(seen), per_epoch)]
    assert all(sorted(order) == list(range(1, completions + 1)) for order in orders)
    if completions == 12:
        assert all(a != b for a, b in pairwise([sorted(orders[0]), *orders])), "shuffled anew in each epoch"


@pytest.mark.parametrize(
    ("update", "warmup", "factor"),
    [(0, 0, 1.0), (7, 0, 1.0), (0, 4, 0.25), (1, 4, 0.5), (3, 4, 1.0), (9, 4, 1.0), (0, 1, 1.0)],
)
def test_warm_up(update: int, warmup: int, factor: float) -> None:
    assert warmup_factor(update, warmup) == factor


def test_warm_up_counts_updates_over_steps(policy: Policy) -> None:
    optimizer, _ = run_update(
        policy, ready_batch(policy, prompts=4), first_update=6, updates_per_step=4, warmup_updates=8, learning_rate=0.8
    )
    assert optimizer.rates == pytest.approx([0.7, 0.8, 0.8, 0.8])


def test_the_gradient_is_clipped_to_its_norm(policy: Policy) -> None:
    before = weights_of(policy)
    _, metrics = run_update(policy, ready_batch(policy), max_grad_norm=0.01, learning_rate=1.0)
    assert metrics.grad_norm > 0.1, "the norm that is reported is the one before clipping"
    assert moved(policy, before).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_applied(policy: Policy, value: float) -> None:
    before, batch = weights_of(policy), ready_batch(policy)
    batch = replace(batch, advantages=batch.advantages.index_fill(0, torch.tensor([5]), value))
    optimizer = torch.optim.AdamW(policy.trainable().values())
    metrics = update(
        policy,
        optimizer,
        batch,
        GRPOConfig(updates_per_step=1),
        RolloutConfig(max_new_tokens=MAX_NEW_TOKENS),
        first_update=0,
        shuffle=generator("shuffle"),
    )
    assert not math.isfinite(metrics.grad_norm)
    assert moved(policy, before).abs().max() == 0
    assert not optimizer.state, "Adam's moments have not seen it either"
    assert all(p.grad is None for p in policy.trainable().values())


def test_a_step_ends_at_the_first_gradient_that_is_not_finite(policy: Policy) -> None:
    """With two mini-batches, one of them broken, at most the other one was applied, and weights stay finite."""
    batch = ready_batch(policy)
    batch = replace(batch, advantages=batch.advantages.index_fill(0, torch.tensor([5]), float("nan")))
    optimizer, metrics = run_update(policy, batch, updates_per_step=4, epochs=2)
    assert len(optimizer.rates) <= 1
    assert math.isnan(metrics.grad_norm)
    assert all(p.isfinite().all() for p in policy.trainable().values())

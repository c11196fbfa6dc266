"""Batches hold what was sampled; importance weights are those of the definition, by hand and by sampling."""

import math
from typing import Any

import pytest
import torch

import trainable.forward.logps
from spaces.config import ModelConfig, QuantConfig, Tokens
from tests.conftest import ModelFolder, ragged_prompts, sampled_groups
from trainable.forward.logps import (
    Batch,
    clean_logps,
    importance_weights,
    make_batch,
    micro_batches,
    side_by_side,
)
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy
from trainable.seeds import generator

W16A16 = QuantConfig(weights="none", activations="none")


@pytest.fixture
def policy(model_folder: ModelFolder) -> Policy:
    return load_policy(ModelConfig(name=model_folder("qwen2")), W16A16, seed=0)


def test_a_batch_holds_every_token_in_its_place(policy: Policy) -> None:
    groups = sampled_groups(policy, ragged_prompts(3))
    batch = make_batch(policy, groups, torch.arange(12.0).view(3, 4))
    for row, e in enumerate(e for group in groups for e in group):
        length = len(e.completion.ids)
        assert batch.completion_ids[row, :length].tolist() == list(e.completion.ids)
        assert batch.mask[row].tolist() == [1.0] * length + [0.0] * (batch.mask.shape[1] - length)
        assert batch.rollout_logps[row, :length].tolist() == pytest.approx(e.completion.logps)
        assert batch.prompt_ids[row][batch.prompt_mask[row] > 0].tolist() == list(e.prompt_ids)
        assert batch.advantages[row] == row


@pytest.mark.parametrize(
    ("size", "expected"),
    [(100, [24, 6]), (24, [24, 6]), (20, [18, 12]), (6, [6] * 5), (5, [3] * 10), (2, [2] * 15), (1, [1] * 30)],
)
def test_slices_hold_whole_groups_or_equal_parts_of_one(size: int, expected: list[int]) -> None:
    zeros = torch.zeros(30, 1)
    batch = Batch(
        prompt_ids=zeros,
        prompt_mask=zeros,
        completion_ids=zeros,
        mask=zeros,
        rollout_logps=zeros,
        advantages=zeros[:, 0],
        old_logps=zeros,
        group_size=6,
    )
    lengths = [rows.stop - rows.start for rows in batch.slices(size)]
    assert lengths == (expected if size < 30 else [30])


@pytest.mark.parametrize("longest", [512, 30], ids=["side by side", "in rows of their own"])
@pytest.mark.parametrize("tokens", [1, 60, 300, 10**6])
def test_micro_batches_of_tokens_hold_each_completion_once_and_little_padding(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, tokens: int, longest: int
) -> None:
    """Of 12 prompts by 4 completions: what is computed at once is so many tokens or one row; it is sorted, so that
    padding is little; and log-probs are those of all at once."""
    monkeypatch.setattr(trainable.forward.logps, "PACKED_TOKENS", longest)
    groups = sampled_groups(policy, ragged_prompts(12), max_new_tokens=40)
    batch = make_batch(policy, groups, torch.zeros(12, 4))
    seen, computed = [], 0
    for rows, part in micro_batches(policy, batch, Tokens(tokens)):
        assert not isinstance(rows, slice)
        seen += rows.tolist()
        assert torch.equal(part.completion_ids, batch.completion_ids[rows, : part.completion_ids.shape[1]])
        assert (part.lengths == batch.lengths[rows]).all()
        assert part.lengths.max() == part.mask.shape[1], "no column is padding alone"
        assert part.prompt_lengths.max() == part.prompt_ids.shape[1]
        together = side_by_side(policy, part)
        assert together == part.group_size == (4 if longest == 512 else 1)
        width = int((part.prompt_lengths + part.lengths).max())
        if together > 1:
            width = part.prompt_ids.shape[1] + together * part.mask.shape[1]
        lines = len(part) // together
        assert lines * width <= tokens or lines == 1
        computed += lines * width
    assert sorted(seen) == list(range(48))
    if longest == 30 and tokens == 300:
        assert computed < 1.25 * (batch.prompt_lengths + batch.lengths).sum()
    inside = batch.mask > 0
    found, expected = (clean_logps(policy, batch, 0.8, size)[inside] for size in (Tokens(tokens), 1024))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- importance weights -----------------------------------------------------------------------------------------------


# Differences clean - rollout, in nats; the last token of the second row is padding.
DIFFERENCE = [[math.log(0.5), math.log(3.0)], [math.log(1.5), 99.0]]
MASK = [[1.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("level", "cap", "weights", "sample"),
    [
        ("token", 2.0, [[0.5, 2.0], [1.5, 1.0]], [0.5, 3.0, 1.5]),
        ("token", 10.0, [[0.5, 3.0], [1.5, 1.0]], [0.5, 3.0, 1.5]),
        ("sequence", 2.0, [[1.5, 1.5], [1.5, 1.5]], [1.5, 1.5]),
        ("sequence", 1.2, [[1.2, 1.2], [1.2, 1.2]], [1.5, 1.5]),
        ("none", 2.0, [[1.0, 1.0], [1.0, 1.0]], [0.5, 3.0, 1.5]),
    ],
)
def test_importance_weights_by_hand(level: Any, cap: float, weights: list[list[float]], sample: list[float]) -> None:
    rollout = torch.full((2, 2), -2.0)
    clean = (rollout + torch.tensor(DIFFERENCE)).requires_grad_()
    result = importance_weights(level, clean, rollout, torch.tensor(MASK), cap)
    torch.testing.assert_close(result.weights, torch.tensor(weights))
    assert not result.weights.requires_grad
    assert result.mean == pytest.approx(sum(min(w, cap) for w in sample) / len(sample))
    assert result.effective_share == pytest.approx(sum(sample) ** 2 / len(sample) / sum(w * w for w in sample))
    inside = [math.log(0.5), math.log(3.0), math.log(1.5)]
    assert result.kl == pytest.approx(sum(math.exp(d) - d - 1 for d in inside) / 3)


def test_k3_estimates_the_kl_of_the_rollout_to_the_clean_policy() -> None:
    rollout, clean = (torch.log_softmax(torch.randn(6, generator=generator("policy", i)), -1) for i in range(2))
    tokens = torch.multinomial(rollout.exp(), 200_000, replacement=True, generator=generator("tokens"))[None]
    estimated = importance_weights("none", clean[tokens], rollout[tokens], torch.ones(tokens.shape), 2.0).kl
    exact = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=p) for p in (rollout, clean))
    ).item()
    assert exact > 0.1
    assert estimated == pytest.approx(exact, rel=0.02)


def test_the_clean_policy_weighs_one() -> None:
    logps = -torch.rand(3, 4)
    for level in ("none", "token", "sequence"):
        result = importance_weights(level, logps, logps, torch.ones(3, 4), 2.0)
        assert (result.mean, result.effective_share, result.kl) == (1.0, 1.0, 0.0)
        assert torch.equal(result.weights, torch.ones(3, 4))


@pytest.mark.parametrize("nats", [-1e4, -60.0, 60.0, 100.0, 1e4])
def test_weights_that_are_alike_have_an_effective_share_of_1_however_small_or_large_they_are(nats: float) -> None:
    """exp(-60) squared is 0 in single precision, exp(100) is infinite."""
    for level in ("none", "token", "sequence"):
        result = importance_weights(level, torch.full((1, 1), nats), torch.zeros(1, 1), torch.ones(1, 1), 2.0)
        assert result.effective_share == 1.0
        assert all(math.isfinite(number) for number in (result.mean, result.kl, *result.weights.flatten().tolist()))


@pytest.mark.parametrize("level", ["none", "token", "sequence"])
def test_what_describes_a_step_is_finite_for_all_finite_log_probs(level: Any) -> None:
    for seed in range(20):
        source = generator("wild", seed)
        clean, rollout = (-(10.0 ** (8 * torch.rand(4, 5, generator=source) - 4)) for _ in range(2))
        result = importance_weights(level, clean, rollout, torch.ones(4, 5), 2.0)
        assert 1 / 20 <= result.effective_share <= 1
        assert all(math.isfinite(number) for number in (result.mean, result.kl, *result.weights.flatten().tolist()))

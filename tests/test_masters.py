"""What learns in fp32 while the model computes in bfloat16: small steps add up, and a continuation is equal in bits."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import Tiny
from trainable.masters import MasterAdamW, followed, moved_shares
from trainable.trial import Trial

OPTIONS = {"lr": 3e-5, "weight_decay": 0.1, "betas": (0.9, 0.999), "fused": True}


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(t.to(dtype)) for t in (torch.randn(8, 64, generator=draw), torch.ones(64))]


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """On a fixed series of gradients, each in two micro-batches."""
    for step in range(first, first + steps):
        optimizer.zero_grad(set_to_none=True)
        for half in (0, 1):
            draw = torch.Generator().manual_seed(2 * step + half)
            sum((p * torch.rand(p.shape, generator=draw)).sum() for p in parameters).backward()  # type: ignore[union-attr]
        optimizer.step()


def test_of_fp32_weights_it_is_adamw_in_every_bit() -> None:
    ours, theirs = weights(torch.float32), weights(torch.float32)
    train(ours, MasterAdamW(ours, **OPTIONS), 20)
    train(theirs, torch.optim.AdamW(theirs, **OPTIONS), 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bf16_weights_are_those_of_fp32_rounded_and_no_step_is_lost() -> None:
    """A gain of 1 that 300 steps of 3e-5 move by 0.009 moves; without masters it stays where it is."""
    ours, plain, exact = weights(torch.bfloat16), weights(torch.bfloat16), weights(torch.bfloat16)
    exact = [nn.Parameter(p.detach().float()) for p in exact]
    train(ours, MasterAdamW(ours, **OPTIONS), 300)
    train(plain, torch.optim.AdamW(plain, **OPTIONS), 300)
    train(exact, torch.optim.AdamW(exact, **OPTIONS), 300)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2**-8, atol=2e-4)  # its gradients were rounded to bf16
    assert ours[1].dtype == torch.bfloat16
    assert (ours[1] < 0.995).all()
    assert (plain[1] == 1).all(), "what this is for"


def test_masters_and_moments_continue_where_they_were_saved() -> None:
    whole = weights(torch.bfloat16)
    train(whole, MasterAdamW(whole, **OPTIONS), 12)
    first, second = weights(torch.bfloat16), weights(torch.bfloat16)
    before = MasterAdamW(first, **OPTIONS)
    train(first, before, 5)
    saved = {key: dict(values) for key, values in before.state_dict()["state"].items()}
    assert {name for values in saved.values() for name in values} == {"master", "step", "exp_avg", "exp_avg_sq"}
    after = MasterAdamW(second, **OPTIONS)
    after.load_state_dict({**after.state_dict(), "state": saved})
    train(second, after, 7, first=5)
    assert all(torch.equal(a, b) for a, b in zip(second, whole, strict=True))
    assert all(
        torch.equal(a, b) for (_, a), b in zip(after.rounded.values(), second, strict=True) if a.dtype == b.dtype
    )
    with pytest.raises(KeyError, match="master"):
        after.load_state_dict({**after.state_dict(), "state": {0: {}, 1: {}}})


def test_the_share_of_moved_weights_counts_matrices_and_vectors_apart() -> None:
    start = {"w": torch.zeros(4, 100_000), "b": torch.zeros(10), "g": torch.zeros(30)}
    seen = followed(start)
    start["w"][:2] = 1
    start["g"][:] = torch.nan
    assert moved_shares(seen, start) == {"matrices": pytest.approx(0.5, abs=1e-4), "vectors": 0.75}


def test_a_trial_in_bf16_moves_its_weights_says_so_and_continues_bit_for_bit(tiny: Tiny) -> None:
    config = tiny(
        "model.dtype=bfloat16", "grpo.steps=2", "grpo.learning_rate=1e-4", "eval.questions=16", "eval.every=0"
    )
    trial = Trial(config)
    assert trial.receipt().moved == {"matrices": 0.0, "vectors": 0.0}
    trial.step()
    state: dict[str, Any] = trial.state_dict()
    assert {t.dtype for name, t in state["optimizer"].items() if name.endswith("master")} == {torch.float32}
    assert {t.dtype for t in state["model"].values()} == {torch.bfloat16}
    again = Trial(config)
    again.load_state_dict(state)
    ours, theirs = trial.step(), again.step()
    assert ours.signals["grpo/loss"] == theirs.signals["grpo/loss"]
    assert all(torch.equal(p, again.policy.trainable()[name]) for name, p in trial.policy.trainable().items())
    assert trial.receipt().moved == again.receipt().moved
    assert trial.receipt().moved["matrices"] > 0.3
    exact = Trial(config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})}))
    exact.step()
    assert exact.receipt().moved["matrices"] > 0.9

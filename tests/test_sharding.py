"""Weights in shards: the numbers of whole ones, at a part of the memory, over real processes and gloo.

A layer computes with its whole matrix either way. So what is sampled and measured in a first step is equal in bits, and
later ones are apart by the order in which gradients were added up.
"""

import gc
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from spaces.config import ConfigError, TrialConfig
from tests.conftest import Tiny
from tests.ranked import Ended, together
from tests.test_trial import comparable, same_weights
from trainable.disk.checkpoint import newest_checkpoint, save_checkpoint
from trainable.disk.folder import Folder
from trainable.engines.engine import deployed_weights, digest
from trainable.failure import TrialFailed
from trainable.noise import injected
from trainable.outcome import EffectReceipt
from trainable.policy.policy import decoder_blocks
from trainable.sharding import first_row, is_shard, local, rows_like, shard, whole, whole_like
from trainable.team import ALONE, Team
from trainable.trial import Trial

SHARDED = "parallel.weights=sharded"
NOISY = (
    *("grpo.steps=2", "noise.num_stages=1", "noise.modules=[linear, rmsnorm]", "noise.sigma_start=0.02"),
    *("noise.sigma_end=0.01", "parallel.ranks=2", "eval.questions=8"),
)
APART = 2e-6
"""Largest difference of a number of a trial, relative to it where that is above 1."""


def compute(team: Team, config: TrialConfig, folder: str = "", stop: int = 0, dies: int = -1) -> dict[str, Any]:
    """A trial from its newest checkpoint on; up to `stop` steps, with a checkpoint then, or to its end. The rank that
    `dies` is killed between two blocks of its first update."""
    trial, held = Trial(config, team=team), list[int]()
    trial.optimizer.register_step_post_hook(lambda *_: held.append(bytes_held()))
    if team.rank == dies:
        last = decoder_blocks(trial.policy)[-1].get_submodule("mlp")
        last.register_forward_pre_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGKILL) if torch.is_grad_enabled() else None
        )
    state = newest_checkpoint(Folder(folder))[0] if folder else None
    if state is not None:
        trial.load_state_dict(state)
    reports = []
    while not trial.done and not (stop and trial.so_far.next_step >= stop):
        reports.append(comparable(trial.step())["signals"])
    saved = trial.state_dict()
    if folder and team.rank == 0:
        save_checkpoint(Folder(folder), trial.so_far.next_step, saved)
    receipt = None if stop else trial.outcome().receipt
    assert same_weights(trial.final, {} if stop else saved["model"])
    return {"signals": reports, "receipt": receipt, "weights": saved["model"], "bytes": max(held)}


def bytes_held() -> int:
    """By all tensors that Python knows of, each memory once. (Others' tests leave some that have none.)"""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter, DTensor)]
    memories = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in map(local, tensors)}
    return sum(memories.values())


def values(ended: list[Ended]) -> list[Any]:
    assert [one.error for one in ended] == [None] * len(ended)
    return [one.value for one in ended]


def assert_same_trial(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for one, other in zip(ours["signals"], theirs["signals"], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, float) and not math.isnan(value):
                assert abs(value - other[name]) <= APART * max(1.0, abs(value)), name
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in ours["weights"].items():
        torch.testing.assert_close(weight, theirs["weights"][name], rtol=0, atol=APART)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("model.dtype=bfloat16", "grpo.kl_beta=0.1"),
        ("model.adapter=lora",),
        # Uneven: 64 rows for 3 processes, and 2 or 3 groups at once; the head, which is the embedding, is quantised.
        ("parallel.ranks=3", "grpo.prompts=5", "grpo.micro_batch_size=4", "quant.exclude=[]", "quant.weights=nvfp4"),
    ],
    ids=["bf16", "lora", "uneven"],
)
def test_a_trial_in_shards_has_the_numbers_of_whole_weights(more: tuple[str, ...], tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(*NOISY, *more)
    theirs = compute(ALONE, config)
    ours, *_ = values(together(config.parallel.ranks, compute, tmp_path, tiny(*NOISY, *more, SHARDED)))
    assert_same_trial(ours, theirs)
    receipts: tuple[EffectReceipt, EffectReceipt] = (ours["receipt"], theirs["receipt"])
    assert len({receipt.effects for receipt in receipts}) == 1, "noise and what it does are equal in bits"
    assert len({str(receipt.moved) for receipt in receipts}) == 1


@pytest.mark.slow
def test_a_process_holds_its_part_of_weights_gradients_and_moments(tiny: Tiny, tmp_path: Path) -> None:
    """All tensors of a process just after an optimizer's step, with the batch and what is whole: gains and biases."""
    wide = ("grpo.steps=1", "parallel.ranks=2", "model.recipe.hidden_size=128", "model.recipe.intermediate_size=512")
    wide = (*wide, "model.recipe.clean_steps=1", "model.recipe.signed_steps=1", "eval.questions=8")
    both, ours = (
        [one["bytes"] for one in values(together(2, compute, tmp_path, tiny(*wide, *more)))]
        for more in ((), (SHARDED,))
    )
    assert max(ours) < 0.5 * min(both)


@pytest.mark.slow
def test_a_checkpoint_goes_from_two_processes_in_shards_to_one_and_back(tiny: Tiny, tmp_path: Path) -> None:
    """In bf16: with masters."""
    given, folder = (*NOISY, "grpo.steps=3", "model.dtype=bfloat16"), str(tmp_path)
    straight = compute(ALONE, tiny(*given))
    parts = [
        values(together(2, compute, tmp_path, tiny(*given, SHARDED), folder, 1))[0],
        compute(ALONE, tiny(*given, SHARDED), folder, 2),
        values(together(2, compute, tmp_path, tiny(*given, SHARDED), folder))[0],
    ]
    signals = [report for part in parts for report in part["signals"]]
    assert_same_trial({**parts[-1], "signals": signals}, straight)
    assert str(parts[-1]["receipt"].moved) == str(straight["receipt"].moved)


@pytest.mark.slow
def test_who_waits_for_rows_of_a_process_that_died_fails_by_that_rule(tiny: Tiny, tmp_path: Path) -> None:
    left, killed = together(2, compute, tmp_path, tiny(*NOISY, SHARDED), "", 0, 1)
    assert killed.code == -signal.SIGKILL
    assert isinstance(left.error, TrialFailed)
    assert left.error.rule == "ranks"


def pieces(team: Team, config: TrialConfig) -> dict[str, Any]:
    """Deployed weights under noise in every format, and rows of matrices of every height."""
    trial = Trial(config, team=team)
    noise = {"step": 0, "total_steps": config.grpo.steps, "seed": config.seed}
    with injected(trial.policy, config.noise, trial.targets, **noise):
        digests = {name: digest(weight) for name, weight in deployed_weights(trial.policy).items()}
    shards = sum(is_shard(parameter) for parameter in trial.policy.model.parameters())
    heights = {}
    for rows in (1, 2, 3, 5, 8):
        model = torch.nn.Linear(3, rows, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.arange(3.0 * rows).view(rows, 3))
        if team.size > 1:
            shard(model, (), "cpu")
        weight, all_rows = model.weight.detach(), torch.arange(3.0 * rows).view(rows, 3)
        own = rows_like(all_rows, weight)
        equal = torch.equal(own, local(weight)) and torch.equal(whole(weight), whole_like(own.clone(), weight))
        heights[rows] = (equal and torch.equal(whole(weight), all_rows), first_row(weight), len(own))
    return {"digests": digests, "shards": shards, "heights": heights}


@pytest.mark.slow
def test_deployed_weights_have_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    """Also with one scale for a whole matrix."""
    given = (*NOISY, "noise.modules=[linear]", "quant.weights=nvfp4", "quant.hadamard=true", "noise.scale=step")
    theirs = pieces(ALONE, tiny(*given))
    ours = values(together(2, pieces, tmp_path, tiny(*given, SHARDED)))
    assert [one["digests"] for one in ours] == [theirs["digests"]] * 2
    assert theirs["shards"] == 0
    assert [one["shards"] for one in ours] == [15, 15], (
        "seven matrices of two blocks, and the embedding, which is the head"
    )
    assert ours[0]["heights"] == {1: (True, 0, 1), 2: (True, 0, 1), 3: (True, 0, 2), 5: (True, 0, 3), 8: (True, 0, 4)}
    assert ours[1]["heights"] == {1: (True, 1, 0), 2: (True, 1, 1), 3: (True, 2, 1), 5: (True, 3, 2), 8: (True, 4, 4)}


def test_what_goes_through_the_forward_of_transformers_is_refused_with_the_remedy(tiny: Tiny) -> None:
    with pytest.raises(
        ConfigError, match=r"parallel\.weights=sharded.*transformers' forward.*set parallel\.weights=whole"
    ):
        Trial(tiny("parallel.ranks=2", SHARDED, "model.attention=eager"))

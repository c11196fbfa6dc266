"""The gate around a whole trial, without vLLM: an engine that is training's own modules, and errors that are put in."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import trainable.trial
from spaces.reading import read_config
from spaces.workloads import WORKLOADS
from tests.conftest import Tiny
from trainable.engines import gate
from trainable.engines.backend import TorchBackend
from trainable.engines.engine import Request, deployed_weights, digest
from trainable.episode import Completion
from trainable.failure import TrialFailed
from trainable.forward.logps import Batch
from trainable.policy.policy import Policy, deployed, unshared
from trainable.trial import Trial

Shift = Callable[[Policy, int], float]
"""Of the log-probs that it tells, by policy and number of the batch."""


class Echo(TorchBackend):
    """An engine that computes what training computes, and may tell other log-probs."""

    def __init__(self, policy: Policy, shift: Shift) -> None:
        self.engine: Any = self
        self.policy, self.shift, self.batches = policy, shift, 0

    def generate(self, policy: Policy, request: Request) -> list[list[Completion]]:
        groups = super().generate(policy, request)
        if request.temperature == 0:
            return groups
        self.batches += 1
        apart = self.shift(policy, int(str(request.draw[-1])))
        return [[replace(one, logps=tuple(p + apart for p in one.logps)) for one in group] for group in groups]

    def digests(self) -> dict[str, str]:
        return {name: digest(tensor) for name, tensor in deployed_weights(self.policy).items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        with unshared(self.policy), torch.no_grad():
            y: Tensor = gate._layers(self.policy)[name](x)
        return y


@pytest.fixture
def trial_with(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trial]:
    """trial_with(lambda policy, number: 0.0): of one step, whose engine tells log-probs that are apart by so much."""

    def build(shift: Shift, *overrides: str) -> Trial:
        monkeypatch.setattr(trainable.trial, "start_backend", lambda config, policy, told: Echo(policy, shift))
        return Trial(tiny("grpo.steps=1", "noise.num_stages=1", "eval.questions=8", *overrides))

    return build


def test_an_engine_that_computes_what_training_computes_passes_on_one_rollout(trial_with: Any) -> None:
    trial = trial_with(lambda policy, number: 0.0)
    report = trial.step()
    assert trial.agreed
    assert report.signals["rollout_corr/gate_kl"] <= 3 * report.signals["rollout_corr/floor_kl"] + 1e-9
    assert trial.backend.batches == 3, "the baseline, an unquantised one, and the step's"


@pytest.mark.parametrize("overrides", [(), ("quant.weights=none", "quant.activations=none")], ids=["W4A4", "W16A16"])
def test_an_unquantised_rollout_that_is_apart_fails_whatever_the_floor(
    trial_with: Any, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    """As with a window that the engine knows and training does not, or the other way round."""
    monkeypatch.setattr(gate, "FLOOR_FACTOR", float("inf"))
    monkeypatch.setattr(gate, "FLIPPED_PROMPTS", 1.0)
    trial = trial_with(lambda policy, number: 0.0 if policy.quantized else 0.002, *overrides)
    with pytest.raises(
        TrialFailed, match=r"with nothing quantised .* by 0\.002 nats per token .*\(allowed 0\.001\)"
    ) as f:
        trial.step()
    assert (f.value.rule, trial.agreed) == ("rollout_mismatch", False)


def test_one_rollout_that_is_apart_is_joined_by_others_before_it_counts(trial_with: Any) -> None:
    trial = trial_with(lambda policy, number: 0.5 if number == 0 and policy.quantized else 0.0)
    trial.step()
    assert trial.agreed


def test_rollouts_that_are_all_apart_fail(trial_with: Any) -> None:
    trial = trial_with(lambda policy, number: 0.5)
    with pytest.raises(gate.LogpsApart, match="log-probs: engine and training are apart"):
        trial.step()
    assert trial.backend.batches == gate.BATCHES
    with deployed(trial.policy):
        pass  # nothing is left deployed


def test_of_a_large_rollout_the_gate_decodes_a_few_prompts(trial_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token at a time, as the floor does it, 1,024 completions of 1,024 tokens take hours."""
    sizes = {name: read_config(workload.settings) for name, workload in WORKLOADS.items()}
    assert [gate.prompts_for(config) for config in sizes.values()] == [32, 8, 8, 8]
    assert sizes["qwen2.5-1.5b-gsm8k"].grpo.prompts == 128
    monkeypatch.setattr(gate, "MOST_TOKENS", 1)
    monkeypatch.setattr(gate, "LEAST_PROMPTS", 2)
    seen: list[tuple[int, int]] = []
    check = gate.check

    def watched(engine: Any, policy: Policy, batch: Batch, *more: Any) -> Any:
        seen.append((len(batch.completion_ids), batch.group_size))
        return check(engine, policy, batch, *more)

    monkeypatch.setattr(gate, "check", watched)
    trial_with(lambda policy, number: 0.5 if number == 0 and policy.quantized else 0.0).step()
    assert [size // group for size, group in seen] == [2, 4, 6, 8], "two prompts a rollout, of which one is apart"

"""What trains and what samples is the model that transformers computes, or the trial does not start.

Errors that are put in are found, and what is checked is left as it was. Every architecture is tried in
`tests/test_models.py`.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

import trainable.forward.logps
import trainable.parity
import trainable.trial
from spaces.config import ConfigError, ModelConfig, QuantConfig, RolloutConfig, TaskConfig, TrialConfig
from tests.conftest import Tiny, byte_tokenizer
from tests.zoo import GEMMA, Row, network_of
from trainable.forward import decoder
from trainable.parity import LIMIT, Agreement, load_checked
from trainable.policy import loading
from trainable.policy.policy import Policy, bare_name
from trainable.trial import Trial

pytestmark = pytest.mark.slow  # many seconds of computing


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Policy, Agreement]]:
    """checked("mistral", {"sliding_window": 8}): loaded for a trial of at most 24 tokens, nothing quantised."""

    def load(kind: str, settings: dict[str, Any], change: Callable[[Any], object] = id, **model: Any) -> Any:
        network = network_of(Row(kind=kind, settings=settings))
        change(network)
        monkeypatch.setattr(trainable.parity, "load_network", lambda *_: (network, byte_tokenizer()))
        return load_checked(
            TrialConfig(
                model=ModelConfig(name=kind, **model),
                quant=QuantConfig(weights="none", activations="none", exclude=()),
                rollout=RolloutConfig(max_prompt_tokens=18, max_new_tokens=6),
                task=TaskConfig(name="reasoning_gym:chain_sum"),
            )
        )

    return load


# --- errors that are put in -------------------------------------------------------------------------------------------


def stretch_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainable.forward.logps.positions
    monkeypatch.setattr(trainable.forward.logps, "positions", lambda mask: 2 * real(mask))


def forget_to_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoder._Transformers.step

    def step(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        before = self.position
        logits = real(self, tokens)
        self.position = before
        return logits

    monkeypatch.setattr(decoder._Transformers, "step", step)


def lose_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoder._Transformers._forward
    monkeypatch.setattr(
        decoder._Transformers, "_forward", lambda self, ids, mask, at: real(self, ids, torch.ones_like(mask), at)
    )


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (stretch_positions, "training's forward is "),
        (forget_to_advance, "generation from a cache is "),
        (lose_padding, "generation from a cache is "),
    ],
)
def test_a_wrong_way_through_the_model_is_refused(
    checked: Any, monkeypatch: pytest.MonkeyPatch, breakage: Any, message: str
) -> None:
    breakage(monkeypatch)
    with pytest.raises(ConfigError, match=rf"model\.name=qwen3: {message}[\d.]+ nats per token from transformers' own"):
        checked("qwen3", {})


def test_our_own_packed_rows_must_agree(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are always packed."""
    sees = trainable.forward.logps.seen_in_packed
    monkeypatch.setattr(
        trainable.forward.logps,
        "seen_in_packed",
        lambda real, length, tokens: sees(real, length, real.shape[1]),  # completions see those before them
    )
    with pytest.raises(ConfigError, match="completions side by side is"):
        checked("qwen2", {})


class Signs(nn.Linear):
    """As in BitNet: weights of one bit and a scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


def use_signs(network: Any) -> None:
    old = network.model.layers[0].mlp.up_proj
    new = Signs(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    network.model.layers[0].mlp.up_proj = new


def test_a_linear_layer_that_computes_more_is_not_replaced(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, agreement = checked("qwen3", {}, use_signs)
    assert "model.layers.0.mlp.up_proj" not in policy.linears
    assert "model.layers.1.mlp.up_proj" in policy.linears
    assert agreement.rows < LIMIT
    monkeypatch.setattr(loading, "_is_linear", lambda module: isinstance(module, nn.Linear))
    with pytest.raises(ConfigError, match=r"training's forward is .* from transformers' own"):
        checked("qwen3", {}, use_signs)


def test_what_is_not_finite_is_refused(checked: Any) -> None:
    with pytest.raises(ConfigError, match="training's forward is inf nats"):
        checked("llama", {}, lambda network: network.model.norm.weight.data.fill_(float("nan")))


def test_a_window_is_crossed_while_tokens_are_generated_too(checked: Any) -> None:
    _, agreement = checked("mistral", {"sliding_window": 12})
    assert agreement.lengths == (12, 16, 24)


# --- what the check leaves behind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_nothing_changes_by_being_checked(checked: Any, dtype: str, adapter: str) -> None:
    """In bf16 too the comparison is in fp32; every bit and the random state come back."""
    before: dict[str, torch.Tensor] = {}

    def narrow(network: Any) -> None:
        network.to(getattr(torch, dtype))
        before.update({name: tensor.clone() for name, tensor in network.state_dict().items()})

    state = torch.get_rng_state()
    policy, agreement = checked("gemma3_text", GEMMA, narrow, adapter=adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert (agreement.dtype, agreement.limit) == ("float32", LIMIT)
    assert max(agreement.rows, agreement.sampler) < 1e-4
    after = {bare_name(name): tensor for name, tensor in policy.model.state_dict().items()}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)


# --- a trial ----------------------------------------------------------------------------------------------------------


def test_a_trial_says_how_far_it_is_from_transformers(tiny: Tiny) -> None:
    trial = Trial(tiny())
    found = trial.receipt().forward
    assert found == asdict(trial.agreement)
    assert max(found[way] for way in ("rows", "packed", "sampler")) < 1e-4
    assert found["lengths"] == (trial.config.rollout.max_prompt_tokens + trial.config.rollout.max_new_tokens,)


@pytest.mark.parametrize(
    ("found", "ways"),
    [
        ({"rows": 1.4e-5, "packed": 9e-6, "sampler": 1.4e-5}, []),
        ({"sampler": 6.8e-4}, ["generation from a cache is 0.00068 "]),
        (
            {"rows": 2e-4, "packed": 2e-4},
            ["training's forward is 0.0002 ", "training's forward of completions side by "],
        ),
        ({"packed": 3.0}, []),  # they have rows of their own
        ({"rows": 0.02, "sampler": 0.02, "limit": 0.1, "dtype": "bfloat16"}, []),
    ],
)
def test_what_is_allowed_and_yet_more_than_rounding_is_told(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], ways: list[str]
) -> None:
    agreement = Agreement(
        **{"rows": 1e-6, "packed": 1e-6, "sampler": 1e-6, "limit": LIMIT, "dtype": "float32", "lengths": (24,)} | found
    )
    monkeypatch.setattr(trainable.trial, "load_checked", lambda *asked: (load_checked(*asked)[0], agreement))
    told = Trial(tiny("noise.sigma_start=0")).receipt().warnings
    assert len(told) == len(ways)
    assert all(line.startswith(way) for line, way in zip(told, ways, strict=True))


def test_a_trial_whose_forward_is_wrong_does_not_start(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    stretch_positions(monkeypatch)
    with pytest.raises(ConfigError, match="training's forward is"):
        Trial(tiny())

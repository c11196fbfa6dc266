"""Does the engine compute what training computes? Asked before noise starts, and again after every restore.

Public trainers mix precisions between rollout and training, and the mismatch looks like a collapse. Log-probs alone
cannot tell: in W4A4 two exact forwards of one model already differ, because rounding flips amplify the order of sums
(`trainable/floor.py`). So the question is asked in four parts, of which the first two are exact:

    a  weights   the hash of every tensor that the engine holds is that of the tensor training would use
    b  layers    each linear layer, fed the same captured input on both sides, gives the same output
    c  log-probs the KL from the engine's to training's log-probs of a noise-free rollout is at most three times the
       floor, and so is
                 their mean distance: a few large flips carry the KL and could hide that every token is a little off. Or
                 the tokens of three prompts in four agree: on a small model flips are so rare that a rollout may have
                 one, which moves all completions of its prompt, where the floor has none; an error in attention, norms
                 or sampling spares no prompt. A rollout that does not agree is joined by others, up to four, before it
                 counts
    d  plain     with nothing quantised, the log-probs of a small rollout agree by an absolute limit, that of
                 `trainable/parity.py`: a floor in 4 bits may be wide enough for an error

A failure is neither a collapse nor a finding: the trial has `failed`, by rule `rollout_mismatch`.
"""

from typing import Any

import torch
from torch import Tensor

from spaces.config import MicroBatch, RolloutConfig, TrialConfig
from trainable.engines.engine import Engine, deployed_weights, digest
from trainable.failure import TrialFailed
from trainable.floor import APART, Floor, gap, measure_floor
from trainable.forward.logps import Batch, completion_logps
from trainable.metrics import FLOOR_KL, GATE_KL
from trainable.parity import LIMIT, NARROW_LIMIT
from trainable.policy.policy import Policy, bare_name, unshared

RULE = "rollout_mismatch"
LAYER_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Largest difference of a layer's outputs over the largest output: sums in another order, rounded to the dtype."""
FLOOR_FACTOR = 3.0
FLIPPED_PROMPTS = 0.25
"""Share of the prompts that may have tokens whose log-probs are apart (by `floor.APART`), whatever the floor."""
BATCHES = 4
"""Rollouts that part c is decided by, at most: the floor of one is a few tokens' and varies threefold. vLLM in bf16 on
`tiny`: one of 8 prompts refuses one healthy engine in ten, four together none of 400."""
MOST_TOKENS = 1 << 16
LEAST_PROMPTS = 8
"""Of a rollout, part c looks at so many prompts that their completions at their longest have at most so many tokens,
but at least at so many. The floor decodes them a token at a time: all 128 x 8 completions of 1,024 tokens of the plan's
workload, 8 at once, were 131,072 forward passes before the first step; 8 x 8 together are 1,024."""
UNQUANTIZED_PROMPTS = 4
"""Of the rollout of part d."""
_CAPTURED_ROWS = 64


class LogpsApart(TrialFailed):
    """Part c, which may be the floor of too few tokens."""


def prompts_for(config: TrialConfig) -> int:
    """Of each rollout that part c looks at."""
    tokens = config.grpo.group_size * config.rollout.max_new_tokens
    return min(config.grpo.prompts, max(LEAST_PROMPTS, MOST_TOKENS // tokens))


def check(
    engine: Engine, policy: Policy, batch: Batch, rollout: RolloutConfig, micro_batch: MicroBatch
) -> dict[str, float]:
    """Parts a to c, inside `deployed`, on a noise-free rollout that the engine made; metrics of part c. Raises
    TrialFailed."""
    check_weights(engine, policy)
    check_layers(engine, policy, batch, rollout)
    floor = measure_floor(policy, batch, rollout.temperature, micro_batch, rollout.batch_size)
    return check_logps(batch, floor)


def check_weights(engine: Engine, policy: Policy) -> None:
    """Part a."""
    wanted = {name: digest(tensor) for name, tensor in deployed_weights(policy).items()}
    held = engine.digests()
    wrong = sorted(name for name in wanted.keys() & held.keys() if wanted[name] != held[name])
    missing, unknown = sorted(wanted.keys() - held.keys()), sorted(held.keys() - wanted.keys())
    for names, what in (
        (missing, "the engine does not have"),
        (unknown, "training does not have"),
        (wrong, "the engine has other values of"),
    ):
        if names:
            raise TrialFailed(
                RULE, f"weights: {what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            )


def check_layers(engine: Engine, policy: Policy, batch: Batch, rollout: RolloutConfig) -> None:
    """Part b, in model order: the first layer that differs is the one that is named."""
    with unshared(policy), torch.no_grad():  # as in the engine, each layer gets its input as it is
        inputs, layers = _captured_inputs(policy, batch, rollout), _layers(policy)
        outputs = {name: layers[name](x).cpu().float() for name, x in inputs.items()}
    for name, x in inputs.items():
        ours = outputs[name]
        theirs = engine.linear(name, x.cpu()).float()
        tolerance = LAYER_TOLERANCE[x.dtype]
        difference = ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30)).item()
        if not difference <= tolerance:
            raise TrialFailed(
                RULE,
                f"layers: {name} differs by {difference:.2g} relative for the same input (allowed {tolerance:.2g})",
            )


def check_logps(batch: Batch, floor: Floor) -> dict[str, float]:
    """Part c; the batch has the engine's log-probs and training's."""
    found = gap(batch.rollout_logps, batch.old_logps, batch.mask)
    usual = max(pair.mean_abs for pair in floor.pairs.values())
    within = found.kl <= FLOOR_FACTOR * floor.kl and found.mean_abs <= FLOOR_FACTOR * usual
    near = ((batch.rollout_logps - batch.old_logps).abs() <= APART) | (batch.mask == 0)  # [B, T]; NaN is not near
    flipped = 1.0 - near.all(1).view(-1, batch.group_size).all(1).double().mean().item()
    if not (within or flipped <= FLIPPED_PROMPTS):
        raise LogpsApart(
            RULE,
            f"log-probs: engine and training are apart by KL {found.kl:.3g} and {found.mean_abs:.3g} on average, in "
            f"nats per token, training from itself by {floor.kl:.3g} and {usual:.3g}; tokens of {100 * flipped:.0f} % "
            "of the prompts differ. Weights and single layers are equal, so attention, norms or sampling differ",
        )
    return {FLOOR_KL: floor.kl, GATE_KL: found.kl}


def check_unquantized(batch: Batch, dtype: str) -> None:
    """Part d; the batch has the engine's log-probs and training's, both unquantised."""
    limit = LIMIT if dtype == "float32" else NARROW_LIMIT
    found = gap(batch.rollout_logps, batch.old_logps, batch.mask)
    if not found.mean_abs <= limit:
        raise TrialFailed(
            RULE,
            f"log-probs: with nothing quantised engine and training are apart by {found.mean_abs:.3g} nats per token "
            f"on average (allowed {limit:g}), so attention, norms or sampling differ; set rollout.backend=torch",
        )


def _captured_inputs(policy: Policy, batch: Batch, rollout: RolloutConfig) -> dict[str, Tensor]:
    """Some rows [<= 64, inputs] of what each linear layer is fed when training computes the batch's first group.

    Inside `unshared`, where that is no operand yet.
    """
    inputs: dict[str, Tensor] = {}

    def capture(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            inputs.setdefault(name, x.reshape(-1, x.shape[-1])[-_CAPTURED_ROWS:].clone())

        return hook

    layers = _layers(policy).items()
    handles = [module.register_forward_pre_hook(capture(name), prepend=True) for name, module in layers]
    try:
        completion_logps(policy, batch.rows(slice(0, batch.group_size)), rollout.temperature)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _layers(policy: Policy) -> dict[str, torch.nn.Module]:
    """Each linear layer by bare name, with its adapter where it has one."""
    adapted = {bare_name(name): module for name, module in policy.model.named_modules() if hasattr(module, "lora_A")}
    return {name: adapted.get(name, linear) for name, linear in policy.linears.items()}

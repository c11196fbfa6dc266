"""What it would buy: how much nearer to the unquantised model a change of arithmetic brings the quantised one, and for
how many bits.

The changes: each layer at 16 bits, the worst 2, 4, 8, .. layers (those that save most alone) and all of them, the other
scale rules, and a Hadamard rotation of both operands (or none, where there is one). All else stays in the trial's
arithmetic. KL saved is the KL at the logits of the quantised model less that of the changed one, in nats per token, on
the same tokens; so a change that does harm saves less than nothing.

**Bits** are counted per multiplication: the bits of its two operands, a weight and an input, on average over all
multiplications of the blocks' linear layers for one token, more than now. Each weight is multiplied once per token, so
this is the mean over weights of (bits of the weight + bits of the inputs of its layer). A 4-bit MX number has 4.25
bits, one 32nd of its block's 8-bit scale included, NVFP4 4.5, MXFP8 8.25, and what is not quantised counts as 16, also
in fp32. So one of 30 equal layers at 16 bits costs 2 * 11.75 / 30 = 0.78 bits, half of it in weights, which are stored,
and half in inputs, which are not; both halves are given. Of a mixture every expert's weights count as if they were
multiplied, though most are not for a given token.

A scale rule and a rotation cost no bits, and the time of the rotation is not counted. They have no KL per bit: those
that save something come first in the table, those that do not come last, each in the order of what they save.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from spaces.formats import FORMATS
from trainable.divergence import Variant, divergences
from trainable.policy.embedded import Progress
from trainable.policy.policy import Policy, block_of
from trainable.quantization import SCALE_RULES, UNQUANTIZED, Arithmetic
from trainable.scan import Estimate, Purchase, kl_per_bit

Mean = Callable[[Sequence[float]], Estimate]


def free_changes(policy: Policy) -> dict[str, Variant]:
    """The changes that cost no bits and fit the model, by what they are."""
    own = {name: policy.linears[name].arithmetic for name in policy.quantized}
    found: dict[str, Variant] = {}
    for rule in SCALE_RULES:
        changed = {name: replace(how, scale_rule=rule) for name, how in own.items()}
        if any((how.input, how.weight) != (own[name].input, own[name].weight) for name, how in changed.items()):
            found[f"scale rule {rule}"] = changed
    turned = {name: replace(how, hadamard=not how.hadamard) for name, how in own.items()}
    try:
        for name, how in turned.items():
            how.check_fits(name, policy.linears[name].in_features)
    except ValueError:  # blocks of a rotation are longer than those of nvfp4
        return found
    return {**found, _turned(own): turned}


def _turned(own: Variant) -> str:
    return "no Hadamard rotation" if all(how.hadamard for how in own.values()) else "Hadamard-32"


def lifted(own: Variant, layers: Sequence[int]) -> Variant:
    """Those layers at 16 bits."""
    return {name: UNQUANTIZED if block_of(name) in layers else how for name, how in own.items()}


def purchases(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    now: Tensor,
    without_layer: Tensor,
    free: Mapping[str, Tensor],
    mean: Mean,
    progress: Progress,
) -> tuple[Purchase, ...]:
    """What is known already, and the worst layers together. KL of each prompt now [prompts], without each layer
    [depth, prompts], and after each of the `free_changes` [prompts]; `mean`: over prompts."""
    own = {name: policy.linears[name].arithmetic for name in policy.quantized}
    blocks = {block for name in own if (block := block_of(name)) is not None}
    ranked = sorted(blocks, key=lambda block: (without_layer[block].mean().item(), block))
    worst = [tuple(sorted(ranked[:k])) for k in _numbers(len(ranked))]
    together = divergences(policy, prompts, [lifted(own, layers) for layers in worst], progress)

    def purchase(what: str, layers: Sequence[int], kl: Tensor) -> Purchase:
        weights, inputs = _bits(policy, lifted(own, layers))
        weights_now, inputs_now = _bits(policy, own)
        return Purchase(
            what=what,
            layers=tuple(layers),
            weight_bits=weights - weights_now,
            activation_bits=inputs - inputs_now,
            kl_saved=mean((now - kl).tolist()),
        )

    found = [purchase(f"layer {layer} at 16 bits", (layer,), without_layer[layer]) for layer in ranked]
    for layers, kl in zip(worst, together, strict=True):
        what = "all layers" if len(layers) == len(ranked) else f"the worst {len(layers)} layers"
        found.append(purchase(f"{what} at 16 bits", layers, kl))
    found += [purchase(what, (), kl) for what, kl in free.items()]
    return tuple(sorted(found, key=lambda one: (-kl_per_bit(one), -one.kl_saved.value, one.what)))


def _numbers(layers: int) -> list[int]:
    """How many of the worst layers are tried together: 2, 4, 8, .. and all."""
    return sorted({k for power in range(1, 10) if (k := 2**power) < layers} | ({layers} if layers > 1 else set()))


def _bits(policy: Policy, variant: Variant) -> tuple[float, float]:
    """Of a weight, and of an input, on average over the multiplications of the blocks' linear layers."""
    linears = {name: linear for name, linear in policy.linears.items() if block_of(name) is not None}
    sizes = [linear.weight.numel() for linear in linears.values()]
    how: list[Arithmetic] = [variant.get(name, linear.arithmetic) for name, linear in linears.items()]
    weights = math.fsum(n * FORMATS[each.weights].stored_bits for n, each in zip(sizes, how, strict=True))
    inputs = math.fsum(n * FORMATS[each.activations].stored_bits for n, each in zip(sizes, how, strict=True))
    return weights / sum(sizes), inputs / sum(sizes)

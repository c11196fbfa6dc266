"""Noise in the rollout's weights: how much, where, when; put in, taken out exactly, and measured.

Method (QeRL, arXiv 2510.11696: AQN). Before the completions of a step are sampled, Gaussian noise is added to some
weights; the samples explore; the update then learns with clean weights. Sigma decays over K stages of the run, stage 0
being quiet.

Choices, each of which answers a defect of an earlier system. The master weights are never written to: a noisy copy
stands in for a weight during the rollout and is dropped afterwards, so nothing can pile up and evaluation is clean by
construction. Noise is drawn in fp32 by counters under a key of (trial seed, step, parameter name), so it does not
depend on order, device, threads or what else is noised (philox.py, noised.py). What was asked for is not what arrives:
in bf16 a norm gain near 1 does not move at sigma 0.0005, and MXFP4 swallows small noise on linear weights. So the
effect receipt holds the measured rms change of each deployed weight beside the nominal sigma, counted as it is
injected.

Layer zones are the plan's, at relative depth: a block belongs to the zone of its midpoint, (i + 0.5) * 28 / depth.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import nn

from spaces.config import ConfigError, Module, NoiseConfig, ZoneSigma
from spaces.scans import refuse_rule, settled
from spaces.schedules import SCHEDULES as SCHEDULES
from spaces.schedules import sigma_at as sigma_at
from spaces.schedules import sigma_of
from spaces.schedules import stage_at as stage_at
from trainable.noised import Drawn, noised
from trainable.outcome import Effect
from trainable.philox import key_of
from trainable.policy.coverage import check_reach
from trainable.policy.policy import Policy, block_of, deployed
from trainable.quantization import AS_IT_IS, QuantLinear
from trainable.sharding import whole

# The plan's zones of a 28-layer model, as half-open intervals of layer midpoints.
ZONES = {"first": (0, 4), "early_mid": (4, 10), "middle": (10, 20), "late_mid": (20, 26), "last": (26, 28)}
_PLAN_DEPTH = 28

_KINDS: dict[Module, str] = {
    "rmsnorm": "RMSNorm with a gain in front of attention or MLP",
    "qk_norm": "RMSNorm with a gain of queries or keys",
    "post_norm": "RMSNorm with a gain behind attention or MLP",
    "linear": "linear layer",
}
"""Words of noise.modules, and what each takes."""


# --- where: the targets -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseTarget:
    """One weight that gets noise."""

    name: str
    """Bare name of the parameter, e.g. model.layers.3.input_layernorm.weight."""
    kind: str
    """A word of noise.modules."""
    layer: int | None
    """Decoder block; None for the final norm."""
    module: nn.Module
    sigma_start: float
    sigma_end: float
    multiplier: float
    offset: float
    """What is added to the weight to make the gain of a norm (1 in Gemma's); 0 of a linear layer."""


def layer_zones(depth: int) -> list[list[str]]:
    """The zones of every block: its own one first, then each empty zone for which it is the block nearest to the zone's
    middle."""
    midpoints = [(i + 0.5) * _PLAN_DEPTH / depth for i in range(depth)]
    zones = [[name for name, (low, high) in ZONES.items() if low <= midpoint < high] for midpoint in midpoints]
    for name, (low, high) in ZONES.items():
        if not any(name in held for held in zones):
            distances = [abs(midpoint - (low + high) / 2) for midpoint in midpoints]
            zones[distances.index(min(distances))].append(name)
    return zones


def zone_layers(zone: str, depth: int) -> tuple[int, ...]:
    """Blocks of a zone; never empty."""
    return tuple(i for i, zones in enumerate(layer_zones(depth)) if zone in zones)


def layer_multipliers(noise: NoiseConfig, depth: int) -> tuple[float, ...]:
    """One factor per block: as given, or interpolated at relative depth when another number of them is given."""
    given = settled("noise.layer_multipliers", noise.layer_multipliers)
    if not given:
        return (1.0,) * depth
    if len(given) == depth:
        return given
    wanted = (np.arange(depth) + 0.5) / depth
    known = (np.arange(len(given)) + 0.5) / len(given)
    return tuple(float(m) for m in np.interp(wanted, known, given))


def noise_targets(policy: Policy, noise: NoiseConfig) -> tuple[NoiseTarget, ...]:
    """Every weight that gets noise, in model order; empty for the control.

    Raises ConfigError when nothing, or less than what is named, would be touched.
    """
    if noise.sigma_start == 0:
        return ()
    chosen = chosen_layers(noise, policy.depth)
    sources = _sigma_sources(noise, policy.depth)
    multipliers = layer_multipliers(noise, policy.depth)

    def target(name: str, kind: str, layer: int | None, module: nn.Module) -> NoiseTarget:
        source = noise if layer is None else sources[layer]
        return NoiseTarget(
            name=f"{name}.weight",
            kind=kind,
            layer=layer,
            module=module,
            sigma_start=source.sigma_start,
            sigma_end=source.sigma_end,
            multiplier=1.0 if layer is None else multipliers[layer],
            offset=policy.gain_offsets.get(name, 0.0),
        )

    found: list[NoiseTarget] = []
    for kind in noise.modules:
        if kind == "linear":
            check_reach(policy.coverage, "noise.modules=linear:")
        matching = _in_blocks(policy, kind, chosen)
        if not matching:
            there = ", ".join(f"{count} x {norm}" for norm, count in policy.norm_kinds.items()) or "no norms"
            others = " or ".join(other for other in get_args(Module) if _in_blocks(policy, other, chosen))
            remedy = f"set noise.modules to {others}" if others else "take another model"
            raise ConfigError(
                f"noise.modules={kind}: blocks {sorted(chosen)} have no {_KINDS[kind]}, "
                f"noise would touch nothing; the model has {there}; {remedy}"
            )
        found += [target(name, kind, block_of(name), module) for name, module in matching.items()]
    if noise.final_norm:
        if not policy.final_norm:
            raise ConfigError(
                "noise.final_norm=true: the model has no RMSNorm with a gain before its head; set it to false"
            )
        found += [target(name, "rmsnorm", None, module) for name, module in policy.final_norm.items()]
    if all(t.multiplier == 0 or t.sigma_start == 0 for t in found):
        raise ConfigError(
            "noise.layer_multipliers and noise.zones give every chosen layer sigma 0; "
            "noise would touch nothing, raise one"
        )
    plain = [t.name for t in found if isinstance(t.module, QuantLinear) and t.module.arithmetic.weights == "none"]
    if noise.scale == "step" and plain:
        raise ConfigError(
            f"noise.scale=step: {plain[0]} is not quantised and has no step; "
            "set scale=rms or leave its block out of layers"
        )
    return tuple(found)


def _in_blocks(policy: Policy, kind: Module, chosen: Collection[int]) -> dict[str, nn.Module]:
    """What a word of noise.modules takes in these blocks."""
    modules: Mapping[str, nn.Module] = policy.linears
    if kind != "linear":
        modules = {name: norm for name, norm in policy.norms.items() if policy.norm_targets[name] == kind}
    return {name: module for name, module in modules.items() if block_of(name) in chosen}


def chosen_layers(noise: NoiseConfig, depth: int) -> set[int]:
    """Blocks that may get noise. Raises ConfigError for one that the model does not have, and for a zone that sets the
    sigma of none of them."""
    refuse_rule("noise.layers", noise.layers)
    if noise.layers == "all":
        chosen = set(range(depth))
    elif isinstance(noise.layers, str):
        chosen = set(zone_layers(noise.layers, depth))
    elif max(noise.layers) >= depth:
        raise ConfigError(f"noise.layers={max(noise.layers)}: the model has blocks 0 to {depth - 1}")
    else:
        chosen = set(noise.layers)
    sources = _sigma_sources(noise, depth)
    for unused in (zone for zone in noise.zones if not any(sources[i] is zone for i in chosen)):
        raise ConfigError(
            f"noise.zones: {unused.zone} sets the sigma of no chosen block (noise.layers={noise.layers}, "
            f"{depth} blocks); remove it"
        )
    return chosen


def _sigma_sources(noise: NoiseConfig, depth: int) -> list[NoiseConfig | ZoneSigma]:
    """What gives each block its sigmas: the first of its zones that has a pair, else the global one."""
    given = {zone.zone: zone for zone in noise.zones}
    return [next((given[name] for name in zones if name in given), noise) for zones in layer_zones(depth)]


# --- in and out again -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What noise did to one weight."""

    target: NoiseTarget
    sigma: float
    """Nominal, in units of noise.scale."""
    unit: torch.Tensor | None
    """Those units; None: 1."""
    size: torch.Tensor
    """Rms of the clean weight, or gain."""
    count: int
    """Of its elements."""
    sums: torch.Tensor
    """Of the deployed weight's change: its squares, and how many elements changed; fp64 [2], on the weight's device."""


@contextmanager
def injected(
    policy: Policy,
    noise: NoiseConfig,
    targets: tuple[NoiseTarget, ...],
    *,
    step: int,
    total_steps: int,
    seed: int,
    measured: bool = False,
) -> Iterator[tuple[Change, ...]]:
    """The deployed policy of this step's rollout: 4-bit weights with noise; everything is as before afterwards, also on
    error. Yields what it changed where it is to be `measured`, for `effects_of`."""
    norms: list[tuple[nn.Parameter, torch.Tensor]] = []
    changes: list[Change] = []
    with deployed(policy):
        try:
            for target in targets:
                sigma = target_sigma(noise, target, step, total_steps)
                if sigma == 0:
                    continue
                weight, change = noised_weight(noise, target, sigma, step=step, seed=seed, measured=measured)
                changes += [] if change is None else [change]
                if isinstance(target.module, QuantLinear):
                    target.module.deployed_weight = weight
                else:
                    parameter = target.module.weight
                    assert isinstance(parameter, nn.Parameter)
                    norms.append((parameter, parameter.data))
                    parameter.data = weight
            yield tuple(changes)
        finally:
            for parameter, clean in reversed(norms):
                parameter.data = clean


def target_sigma(noise: NoiseConfig, target: NoiseTarget, step: int, total_steps: int) -> float:
    """Nominal sigma of one weight, in units of noise.scale."""
    return target.multiplier * sigma_of(noise, target.sigma_start, target.sigma_end, step, total_steps)


def noised_weight(
    noise: NoiseConfig, target: NoiseTarget, sigma: float, *, step: int, seed: int, measured: bool = False
) -> tuple[torch.Tensor, Change | None]:
    """The weight that the rollout computes with: drawn and added in fp32, cast, and quantised before or after; and,
    where it is `measured`, how far that is from the clean one."""
    unit = _unit(noise, target)
    drawn = Drawn(key=key_of("noise", seed, step, target.name), sigma=sigma, unit=unit)
    if isinstance(target.module, QuantLinear):
        base, operand, clean = target.module.under_noise(noise.placement)
    else:
        base, operand = _weight(target), AS_IT_IS
        clean = base
    weight, sums = noised(base, drawn, operand, clean if measured else None)
    if sums is None:
        return weight, None
    size, count = _rms(target), weight.numel()
    return weight, Change(target=target, sigma=sigma, unit=unit, size=size, count=count, sums=sums)


def _weight(target: NoiseTarget) -> torch.Tensor:
    weight = target.module.weight
    assert isinstance(weight, torch.Tensor)
    return whole(weight.detach())


def _rms(target: NoiseTarget) -> torch.Tensor:
    """Of what the weight multiplies with: W, or the gain of a norm, which may be 1 + W. fp32, in no dimension."""
    weight = _weight(target)
    gain = weight if target.offset == 0 else weight.float() + target.offset
    # In fp32 it is off in the fourth digit of a large one.
    size: torch.Tensor = torch.linalg.vector_norm(gain, dtype=torch.float64)
    return (size / math.sqrt(weight.numel())).float()


def _unit(noise: NoiseConfig, target: NoiseTarget) -> torch.Tensor | None:
    """What sigma counts: 1, rms(W) [1], or the local quantisation step [blocks]."""
    if noise.scale == "absolute":
        return None
    if noise.scale == "rms":
        return _rms(target)[None]
    assert isinstance(target.module, QuantLinear)
    return target.module.weight_steps()


# --- the proof --------------------------------------------------------------------------------------------------------


def stage_begins(noise: NoiseConfig, step: int, total_steps: int) -> bool:
    """Whether a step is its stage's first, whose noise is measured."""
    return step == 0 or stage_at(noise, step, total_steps) != stage_at(noise, step - 1, total_steps)


def effects_of(noise: NoiseConfig, changes: tuple[Change, ...], *, step: int, total_steps: int) -> tuple[Effect, ...]:
    """What this step's noise was to do and what it did, from the very weights that were injected."""
    effects = []
    for change in changes:
        target, count = change.target, change.count
        squares, changed = change.sums.tolist()
        applied, size = math.sqrt(squares / count), change.size.item()
        unit = 1.0 if change.unit is None else change.unit.double().square().mean().sqrt().item()
        effects.append(
            Effect(
                stage=stage_at(noise, step, total_steps),
                step=step,
                name=target.name,
                layer=target.layer,
                kind=target.kind,
                nominal=change.sigma * unit,
                applied=applied,
                applied_relative=applied / size if size > 0 else math.inf,
                changed=changed / count,
            )
        )
    return tuple(effects)


def effect_warnings(effects: tuple[Effect, ...]) -> tuple[str, ...]:
    """One line per stage and kind in which some weight moved by less than half or more than twice its nominal sigma."""
    lines = []
    for stage, kind in sorted({(e.stage, e.kind) for e in effects}):
        here = [e for e in effects if (e.stage, e.kind) == (stage, kind)]
        off = [e for e in here if not e.nominal / 2 <= e.applied <= e.nominal * 2]
        if off:
            worst = max(off, key=lambda e: abs(math.log(max(e.applied, 1e-30) / e.nominal)))
            lines.append(
                f"stage {stage}, {kind}: {len(off)} of {len(here)} weights moved by less than half or more than twice "
                f"their sigma (worst {worst.name}: nominal {worst.nominal:.3g}, applied {worst.applied:.3g})"
            )
    return tuple(lines)

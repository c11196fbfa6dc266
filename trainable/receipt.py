"""The effect receipt, made from what was wrapped, noised and moved: one way, whoever trains."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trainable.noise import NoiseTarget, effect_warnings
from trainable.outcome import Effect, EffectReceipt, Followed
from trainable.policy.policy import Policy


def receipt_of(
    policy: Policy,
    targets: Sequence[NoiseTarget],
    effects: Sequence[Effect],
    *,
    moved: Mapping[str, float],
    warnings: Sequence[str],
    forward: Mapping[str, Any],
    generation: Mapping[str, Any],
    followed: Sequence[Followed] = (),
) -> EffectReceipt:
    """So far. `moved`: by `masters.moved_shares`."""
    return EffectReceipt(
        quantized=policy.quantized,
        coverage=policy.coverage,
        adapted=policy.adapted,
        norms=policy.norm_kinds,
        arithmetic=tuple(asdict(arithmetic) for arithmetic in policy.arithmetic),
        noised=tuple(target.name for target in targets),
        moved=moved,
        effects=tuple(effects),
        warnings=(*warnings, *effect_warnings(tuple(effects))),
        forward=forward,
        generation=generation,
        followed=tuple(followed),
    )

"""Does a trial fit a device, and with which settings would it?

What it holds is counted, not guessed (`trainable/footprint.py`); what a device needs beside live tensors is added, by
the two constants below. An engine of vLLM's is the exception: what it holds is written down from its settings.

Where a trial does not fit, settings are lowered until it does, those first that change no number of it; each proposal
is counted as the trial was.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spaces.config import ConfigError, TrialConfig
from spaces.devices import Memory
from spaces.reading import read_config
from trainable.engines.memory import EngineMemory, choose
from trainable.footprint import GIB, CannotCount, Footprint, footprint, pass_at_k_rows

CONTEXT_GIB = 1.0
"""CUDA's context, its libraries' workspaces, Triton's modules. (An engine's are in its working space.)"""
GAPS = 0.05
"""Of what is alive: lost between the blocks of torch's allocator."""
_LEARNING = ("log-probs", "update", "optimizer")
"""While they run an engine may sleep."""
MADE = ("activations", "logits", "KV cache", "the engine's KV cache")
"""Parts that are in proportion to how many completions are computed at once."""
WITH_ENGINE = "rollout: the engine"

ASSUMED = (
    f"{CONTEXT_GIB:g} GiB for CUDA itself, and {GAPS:.0%} of what is alive lost between blocks",
    "every prompt and every completion is as long as rollout.max_prompt_tokens and rollout.max_new_tokens allow",
    "fused kernels of Triton's; attention without a mask in 16 bits by the flash kernel, with one by the "
    "memory-efficient kernel",
)
ASSUMED_OF_ENGINES = "what vLLM holds is what a trial gives it there (trainable/engines/memory.py); it was not run"
ASSUMED_OF_RANKS = "each of parallel.ranks computes on a GPU of its own; sums over ranks take no time and no memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A trial on a device."""

    config: TrialConfig
    device: Memory
    shapes: Footprint
    phases: Mapping[str, Mapping[str, int]]
    """Bytes by part when they are most, an engine's included."""
    engine: EngineMemory | None
    refused: str = ""
    """What a trial would say there where it finds no room for its engine."""

    def needed_gib(self, phase: str) -> float:
        """With what is needed besides live tensors."""
        return sum(self.phases[phase].values()) / GIB * (1 + GAPS) + CONTEXT_GIB

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.needed_gib)

    @property
    def too_large(self) -> tuple[str, ...]:
        """Phases that do not fit; among them an engine's that a trial refuses, which leaves more to gaps."""
        return tuple(phase for phase in self.phases if self._too_large(phase))

    def _too_large(self, phase: str) -> bool:
        return self.needed_gib(phase) > self.device.memory_gib or (phase == WITH_ENGINE and bool(self.refused))

    def room(self, phase: str) -> float:
        """Share that there is room for of what grows with the completions that are computed at once."""
        parts = self.phases[phase]
        made = sum(size for part, size in parts.items() if part in MADE)
        free = (self.device.memory_gib - CONTEXT_GIB) / (1 + GAPS) * GIB
        return max(0.0, (free - sum(parts.values()) + made) / max(made, 1))


def fit(config: TrialConfig, device: Memory) -> Fit:
    """Raises ConfigError for a model whose shapes are not known on this machine, CannotCount for one that shapes do not
    tell enough of."""
    shapes = footprint(config)
    phases = {name: dict(phase.peak) for name, phase in shapes.phases.items()}
    if config.rollout.backend == "torch":
        return Fit(config=config, device=device, shapes=shapes, phases=phases, engine=None)
    engine, refused = _engine(config, shapes, device)
    parts = {"the engine's weights and working space": shapes.engine.engine, "the engine's KV cache": engine.cache}
    phases[WITH_ENGINE] = phases["deploy"] | parts
    if not engine.sleep_level:
        phases |= {name: phases[name] | parts for name in _LEARNING}
    return Fit(config=config, device=device, shapes=shapes, phases=phases, engine=engine, refused=refused)


def _engine(config: TrialConfig, shapes: Footprint, device: Memory) -> tuple[EngineMemory, str]:
    """As a trial chooses it there; where it would refuse: what was asked for, or what its batch needs, and why."""
    total, rollout = int(device.memory_gib * GIB), config.rollout
    cache = None if rollout.kv_cache_gib is None else int(rollout.kv_cache_gib * GIB)
    try:
        chosen = choose(
            shapes.engine,
            free=total - shapes.weight_bytes - int(CONTEXT_GIB * GIB),
            total=total,
            on_device=True,
            inside=rollout.engine == "inside",
            cache=cache,
            sleep=rollout.sleep,
        )
    except ConfigError as error:
        needed, level = shapes.engine.cache, 0 if rollout.sleep is False else 1
        wanted = needed if cache is None else cache
        return EngineMemory(cache=wanted, needed=needed, sleep_level=level, share=1.0), str(error)
    return chosen, ""


# --- what makes it fit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Example: str(Remedy(settings={"grpo.micro_batch_size": 2}, fit=...)) == "--set grpo.micro_batch_size=2" """

    settings: Mapping[str, Any]
    """By dotted key."""
    fit: Fit
    """With them."""

    def __str__(self) -> str:
        return " ".join(f"--set {key}={_written(value)}" for key, value in self.settings.items())


def remedy(config: TrialConfig, device: Memory) -> Remedy | None:
    """Settings with which it fits; None where none would do."""
    settings: dict[str, Any] = {}
    while (now := fit(_with(config, settings), device)).too_large:
        proposal: dict[str, Any] = {}
        for phase in now.too_large:
            proposal |= _lower(now, phase)
        if _with(config, settings | proposal) == now.config:
            return None
        settings |= proposal
    return Remedy(settings=settings, fit=now)


def _lower(now: Fit, phase: str) -> dict[str, Any]:
    """What the phase hangs on at a lower value, that should do: of what is in proportion to it as much as there is room
    for, and at most half. Else what makes the model smaller."""
    config = now.config
    grpo, rollout, asked = config.grpo, config.rollout, min(config.eval.batch_size, config.eval.questions)
    drawn = pass_at_k_rows(config)
    sampled = rollout.batch_size - rollout.batch_size % grpo.group_size
    micro_batch = ("grpo.micro_batch_size", min(grpo.micro_batch_size, grpo.prompts * grpo.group_size), 1)
    if grpo.micro_batch_tokens is not None:
        row = rollout.max_prompt_tokens + rollout.max_new_tokens
        micro_batch = ("grpo.micro_batch_tokens", grpo.micro_batch_tokens, row)
    one_sequence = max(0.1, math.ceil(10 * now.shapes.engine.sequence / GIB) / 10)
    levers = {
        "update": micro_batch,
        "log-probs": micro_batch,
        WITH_ENGINE: ("rollout.kv_cache_gib", 0.0 if now.engine is None else now.engine.cache / GIB, one_sequence),
        "rollout: prompts": ("rollout.batch_size", sampled, grpo.group_size),
        "rollout: a token": ("rollout.batch_size", sampled, grpo.group_size),
        "evaluation: prompts": ("eval.batch_size", asked, 1),
        "evaluation: a token": ("eval.batch_size", asked, 1),
        "pass@k: prompts": ("eval.batch_size", drawn, max(1, config.eval.samples)),
        "pass@k: a token": ("eval.batch_size", drawn, max(1, config.eval.samples)),
    }
    if phase in _LEARNING and now.engine is not None and not now.engine.sleep_level and rollout.sleep is None:
        return {"rollout.sleep": True}
    if phase in levers:
        key, value, least = levers[phase]
        if value > least:
            return {key: max(least, _lowered(value, now.room(phase)))}
    if phase == "update" and not grpo.checkpoint_activations:
        return {"grpo.checkpoint_activations": True}
    if config.model.dtype == "float32":
        return {"model.dtype": "bfloat16"}
    return {"model.adapter": "lora"} if config.model.adapter == "full" else {}


def _lowered(value: Any, share: float) -> Any:
    """To this share or below: a whole number is halved, at least once, another one loses a tenth at least."""
    if isinstance(value, int):
        return value // 2 ** max(1, math.ceil(math.log2(1 / max(share, 1e-3))))
    return math.floor(10 * value * min(share, 0.9)) / 10


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _with(config: TrialConfig, settings: Mapping[str, Any]) -> TrialConfig:
    return read_config(config.model_dump(mode="json"), [f"{key}={_written(value)}" for key, value in settings.items()])


def does_not_fit(config: TrialConfig, device: Memory) -> str | None:
    """One line with the settings that make it fit; None where it fits, and where that cannot be told."""
    try:
        now = fit(config, device)
    except (ConfigError, CannotCount):
        return None
    if not now.too_large:
        return None
    found = remedy(config, device)
    cure = "and no setting that it could do with makes it fit" if found is None else f"it fits with {found}"
    if now.needed_gib(now.largest) <= device.memory_gib:
        return f"on {device.name} a trial would be refused ({now.refused}); {cure}"
    return (
        f"a trial needs about {now.needed_gib(now.largest):.1f} GiB ({now.largest}), and {device.name} has "
        f"{device.memory_gib:.1f}; {cure}"
    )


def device_here() -> Memory | None:
    """The accelerator that a trial of this machine would compute on."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)  # which, unlike mem_get_info, takes none of it
    return Memory(name=found.name, memory_gib=found.total_memory / GIB)

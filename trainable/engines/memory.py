"""How much memory an engine gets, and whether it gives it back while training learns.

A rollout wants keys and values of all its sequences at their longest at once. With less, vLLM keeps sequences waiting
or computes them again; more is of no use. So an engine is given what the batch needs, as far as there is room:

    on a GPU    both live on one device. What training holds in a rollout (weights, their 4-bit copies, moments) and
                what it takes to learn (gradients, activations) is told from the shapes; the engine takes its own
                weights and a working space. Where all of that fits, both stay. Where it does not, the engine sleeps
                while training learns, and only what training holds in a rollout is in its way
    on a CPU    nothing sleeps, and a cache takes a quarter of the free memory at most

What training takes to learn is counted by `trainable/footprint.py`, of the code as it stands and at the longest that
the configuration allows. Where shapes alone do not tell, the engine sleeps. The rest is pure: numbers in, numbers out.
"""

from dataclasses import dataclass
from typing import Any

import torch

from spaces.config import ConfigError, TrialConfig
from trainable.forward.transformer import head_size
from trainable.policy.policy import Policy
from trainable.sharding import is_shard, local

GIB = 1 << 30
_BLOCK = 128
"""Tokens that vLLM's cache is divided by on a CPU; on a GPU it is fewer."""
_LEAST_CACHE = GIB // 4
_STATES = GIB
"""Cache of a model without attention, whose states are not told from here."""
_WORKING_SPACE = 2 * GIB
"""Of an engine beside weights and cache: a CUDA context in a child, the hidden states of one batch, logits."""
_SHARE_OF_RAM = 0.25
_SHARE_OF_DEVICE = 0.95
"""What is left to fragmentation is the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes.

    Example: Qwen2.5-1.5B with LoRA, 256 sequences of 1,536 tokens: cache 10.6 GiB, engine 4.9 GiB.
    """

    cache: int
    """Keys and values of all sequences at their longest."""
    sequence: int
    """Of one sequence: with less there is no rollout."""
    engine: int
    """The engine's weights and working space."""
    held: int
    """What training will hold besides what it holds now, also while the engine generates."""
    learning: int | None
    """What training takes on top of that while it learns; None = not known."""
    micro_batch: str
    """Setting by which that can be less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Example: EngineMemory(cache=11390681088, needed=11390681088, sleep_level=0, share=0.2)"""

    cache: int
    """Bytes for keys and values."""
    needed: int
    """Bytes that the batch needs."""
    sleep_level: int
    """Of vLLM's between a rollout and learning: 0 = stays, 1 = weights wait in the host's memory, 2 = they are dropped.
    """
    share: float
    """Of the device that the engine takes; vLLM refuses to start where so much is not free."""

    def as_tree(self) -> dict[str, Any]:
        """For the receipt, in GiB."""
        return {
            "kv_cache_gib": round(self.cache / GIB, 3),
            "kv_cache_needed_gib": round(self.needed / GIB, 3),
            "sleep_level": self.sleep_level,
        }


def needs_of(config: TrialConfig, policy: Policy, *, peak: int | None) -> Needs:
    """From a model's shapes. `peak`: bytes that training holds at most in a step, the model's own included; None = not
    known."""
    rollout, weights = config.rollout, list(policy.model.parameters())
    learned = list(policy.trainable().values())
    count = sum(local(weight).numel() for weight in learned)
    masters = sum(local(weight).numel() for weight in learned if weight.dtype != torch.float32)
    tokens = rollout.max_prompt_tokens + rollout.max_new_tokens
    each = cache_numbers_per_token(policy.network.config.get_text_config()) * weights[0].element_size()
    sequence = -(-tokens // _BLOCK) * _BLOCK * each
    size = sum(weight.nbytes for weight in weights)
    quantized = {id(policy.linears[name].weight) for name in policy.quantized}
    deployed = sum(weight.nbytes for weight in weights if id(weight) in quantized or is_shard(weight))  # whole ones
    held = deployed + 4 * (2 * count + masters)
    return Needs(
        cache=max(_LEAST_CACHE, (rollout.batch_size + 1) * sequence) if sequence else _STATES,
        sequence=sequence,
        engine=size + _WORKING_SPACE,
        held=held,
        learning=None if peak is None else max(0, peak - size - held),
        micro_batch=config.grpo.micro_batch_key,
    )


def cache_numbers_per_token(text: Any) -> int:
    """Keys and values, by a transformers configuration, where layers differ as if all were the widest; 0 without
    attention."""
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    each = [
        2 * (getattr(one, "num_key_value_heads", None) or one.num_attention_heads) * head_size(one)
        for one in layers
        if getattr(one, "num_attention_heads", None)
    ]
    return int(text.num_hidden_layers * max(each, default=0))


def choose(
    needs: Needs, *, free: int, total: int, on_device: bool, inside: bool, cache: int | None, sleep: bool | None
) -> EngineMemory:
    """`free` of `total` bytes, of the device where there is one, else of the host. `cache` and `sleep`: what the user
    wants, None = what fits. Raises ConfigError where there is no room."""
    if not on_device:
        if sleep:
            raise ConfigError(
                "rollout.sleep=true: there is no GPU here whose memory an engine could give back; leave it out"
            )
        room = int(_SHARE_OF_RAM * free)
        given = cache if cache is not None else min(needs.cache, max(room, _LEAST_CACHE))
        _check_room(cache, free)
        return _checked(EngineMemory(cache=given, needed=needs.cache, sleep_level=0, share=1.0), needs, room)
    beside = free - int((1 - _SHARE_OF_DEVICE) * total) - needs.held - needs.engine
    together = None if needs.learning is None else beside - needs.learning
    wanted = needs.cache if cache is None else cache
    sleeps = (together is None or together < wanted) if sleep is None else sleep
    room = beside if sleeps or together is None else together
    given = wanted if cache is not None else min(wanted, room)
    _check_room(cache, room)
    # In this process weights come from the same device: dropped, they are there again at once. A child would be sent
    # all of them through a pipe; from the host's memory they come twenty times faster.
    level = (2 if inside else 1) if sleeps else 0
    share = min(1.0, (given + needs.engine) / total)
    return _checked(EngineMemory(cache=given, needed=needs.cache, sleep_level=level, share=share), needs, room)


def _check_room(cache: int | None, room: int) -> None:
    """Of a cache that the user gives: vLLM would start to take it, and die on a machine that does not have it."""
    if cache is not None and cache > max(0, room):
        raise ConfigError(
            f"rollout.kv_cache_gib={cache / GIB:g}: there is room for {max(0, room) / GIB:.2f} GiB of keys and values; "
            "lower it, or leave it out for as much as fits"
        )


def _checked(memory: EngineMemory, needs: Needs, room: int) -> EngineMemory:
    if memory.cache < needs.sequence:
        raise ConfigError(
            f"rollout.backend=vllm: keys and values of one sequence need {needs.sequence / GIB:.2f} GiB, there is room "
            f"for {max(0, min(room, memory.cache)) / GIB:.2f}; lower rollout.max_new_tokens or {needs.micro_batch}, "
            "or set rollout.kv_cache_gib"
        )
    return memory

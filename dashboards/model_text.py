"""What a trial would do with a model: its parts, what is quantised and what is not, which words of `noise.modules` it
has, whether it computes what transformers computes, and how much memory that takes.

It is loaded as a trial loads it, with every check; nothing is trained. Bytes are counted from the shapes. What the
blocks keep for the backward pass is not among them; where a GPU is known, all of a step is counted (`search/fit.py`),
and one line says what a trial lacks there.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from search.fit import device_here, does_not_fit
from spaces.config import ConfigError, Module, NoiseConfig, TrialConfig
from spaces.devices import Memory
from spaces.paths import anchored
from spaces.reading import merge, parse_overrides, read_config
from spaces.workloads import WORKLOADS
from trainable.engines.served import standing
from trainable.forward.head import LOGITS_AT_ONCE, is_plain
from trainable.forward.logps import in_a_row
from trainable.forward.transformer import forward_of
from trainable.noise import noise_targets
from trainable.outcome import Coverage
from trainable.parity import WAYS, Agreement, doubts, load_checked
from trainable.policy.policy import Policy

TEXT = {
    "rollout": {"max_prompt_tokens": 512, "max_new_tokens": 512, "batch_size": 64},
    "grpo": {"micro_batch_size": 8},
    "eval": {"batch_size": 64},
    "task": {"name": "reasoning_gym:chain_sum"},
}
"""Sizes for a model that no workload names; `--set` gives others. No question is asked."""
FP32 = 4
"""Bytes of a number."""


def examine_model(model: str, overrides: Sequence[str], device: Memory | None = None) -> list[str]:
    """`model`: a workload, a folder or a hub id; `device`: another than this machine's. Raises ConfigError for what a
    trial would refuse."""
    base = WORKLOADS[model].settings if model in WORKLOADS else merge(TEXT, {"model": {"name": model, "recipe": None}})
    here = anchored(merge(base, parse_overrides(overrides)), Path.cwd())
    config = read_config(here, origin=f"--model {model}")
    policy, agreement = load_checked(config)
    lines, where = list(_lines(config, policy, agreement)), device or device_here()
    told = None if where is None else does_not_fit(config, where)
    return lines if told is None else [*lines, f"warning     {told}"]


def _lines(config: TrialConfig, policy: Policy, agreement: Agreement) -> Iterator[str]:
    network, tokenizer = policy.network, policy.tokenizer
    weights = sum(parameter.numel() for parameter in network.parameters())
    learned = sum(parameter.numel() for parameter in policy.trainable().values())
    beside = f" (LoRA beside {len(policy.adapted)} layers)" if policy.adapted else ""
    sizes = f"{policy.depth} blocks, {weights:,} weights, {learned:,} learned{beside}"
    yield f"model       {type(network).__name__}: {sizes}"
    ends = ", ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in policy.ends)
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    yield f"tokenizer   {policy.vocabulary:,} tokens, {template}; a completion ends at {ends}"
    yield f"quantised   {config.quant.mode}: {len(policy.quantized)} of {len(policy.linears)} linear layers"
    yield from _coverage(policy.coverage)
    for kind, count in policy.norm_kinds.items():
        yield f"norms       {count} x {kind}"
    quiet = NoiseConfig(sigma_start=0.01, sigma_end=0.001)
    for word in get_args(Module):
        yield f"noise       noise.modules={word}: {_targets(policy, quiet.model_copy(update={'modules': (word,)}))}"
    for way, what in WAYS.items():
        kept = way != "packed" or policy.packs
        apart = f"{getattr(agreement, way):.1e} nats per token from transformers' own"
        yield f"forward     {what}: {apart}" + ("" if kept else "; completions get rows of their own")
    yield f"            unquantised, in {agreement.dtype}, rows of up to {max(agreement.lengths)} tokens"
    yield from (f"warning     {doubt}" for doubt in doubts(agreement))
    yield f"vLLM        {standing(policy)}"
    for part, size in memory(config, policy).items():
        yield f"memory      {part}: {_bytes(size)}"


def _coverage(coverage: Coverage) -> Iterator[str]:
    """What became of the blocks' weights, and each that was left out."""
    parts = {
        "quantised": coverage.quantized,
        "excluded by name": coverage.excluded,
        "left out": coverage.left,
    }
    shares = ", ".join(f"{100 * size / max(coverage.weights, 1):.1f} % {what}" for what, size in parts.items())
    yield f"            of the blocks' {coverage.weights:,} weights {shares}"
    for entry in coverage.left_out:
        yield f"            left out: {entry.name}, {entry.weights:,} weights: {entry.reason}"


def _targets(policy: Policy, noise: NoiseConfig) -> str:
    """How many weights noise would touch, or why none."""
    try:
        found = noise_targets(policy, noise)
    except ConfigError as error:
        reason = str(error).partition(": ")[2]
        return f"refused: {reason.partition(', noise would touch nothing')[0]}"
    return f"{len(found)} tensors, the first {found[0].name}"


def memory(config: TrialConfig, policy: Policy) -> dict[str, int]:
    """Bytes of the parts whose size the shapes tell, of one trial with `rollout.backend=torch`."""
    network: Any = policy.network
    text = network.config.get_text_config()
    width = next(network.parameters()).element_size()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.model.parameters())
    learned = list(policy.trainable().values())
    count = sum(parameter.numel() for parameter in learned)
    masters = sum(parameter.numel() for parameter in learned if parameter.element_size() < FP32)
    rollout, grpo = config.rollout, config.grpo
    sizes = {
        "weights": weights,
        "their quantised copies, while nothing learns": sum(
            policy.linears[name].weight.numel() * width for name in policy.quantized
        ),
        "gradients in fp32": FP32 * count,
        "AdamW's moments and masters in fp32": FP32 * (2 * count + masters),
        "logits of a micro-batch in fp32": FP32 * _logits_alive(config, policy),
    }
    if grpo.kl_beta > 0 and config.model.adapter == "full":
        sizes["the reference model"] = weights
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    if heads and getattr(text, "num_attention_heads", None):
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        tokens = rollout.batch_size * (rollout.max_prompt_tokens + rollout.max_new_tokens)
        sizes["keys and values of a rollout, if all blocks attend to all tokens"] = (
            2 * policy.depth * heads * head * tokens * width
        )
    return sizes


def _logits_alive(config: TrialConfig, policy: Policy) -> int:
    """Numbers of one micro-batch of completions at their longest; as many as the head keeps where it is plain
    (`forward/head.py`)."""
    grpo, rollout, forward = config.grpo, config.rollout, forward_of(policy)
    rows = min(grpo.micro_batch_size, grpo.prompts * grpo.group_size)
    if grpo.micro_batch_tokens is not None:  # which counts the prompts, too; nothing is computed of theirs
        together = in_a_row(policy, grpo.group_size, rollout.max_prompt_tokens, rollout.max_new_tokens)
        width = rollout.max_prompt_tokens + together * rollout.max_new_tokens
        rows = together * max(1, grpo.micro_batch_tokens // width)
    alive = rows * rollout.max_new_tokens * int(policy.network.config.get_text_config().vocab_size)
    return min(alive, LOGITS_AT_ONCE) if forward is not None and is_plain(forward.head) else alive


def _bytes(size: int) -> str:
    """Example: 1.4 GiB"""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}"

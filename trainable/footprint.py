"""How much memory a trial of these shapes holds, and what its phases compute: without weights, download or GPU.

The policy is built from the model's configuration on torch's meta device, wrapped by the code that wraps a real one,
and goes through the parts of a step as a trial does: deployed for a rollout, prompts read, a token sampled, an
evaluation's prompts read, log-probs, two micro-batches forward and backward, the optimizer's step. `counting.Counted`
follows every storage by the way. So a number here is that of the code as it stands, and no formula beside it that
could go out of step.

It is the most that a trial can hold: every prompt and completion is as long as the configuration allows. Kernels are
those of a CUDA device with Triton. What a device needs besides live tensors (its context, gaps between the blocks of
the allocator, workspaces of libraries) is not here: `search/fit.py` allows for it. An engine beside the trainer is not
run; what it holds is its weights, its cache and its own forward pass (`engine_parts`).

Shapes: B = completions, L = prompt tokens, T = completion tokens, V = vocabulary.
"""

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from spaces.config import ConfigError, GRPOConfig, TrialConfig
from trainable.counting import OTHER, Counted, StepOnShapes, Work
from trainable.engines.memory import Needs, cache_numbers_per_token, needs_of
from trainable.forward.decoder import decoder
from trainable.forward.logps import Batch, clean_logps, micro_batches
from trainable.grpo import update
from trainable.layers.experts import Experts
from trainable.policy.loading import wrapped
from trainable.policy.policy import KNOWN_BLOCKS, Policy, deployed
from trainable.policy.sources import Architecture, architecture_of
from trainable.rollout import sample

_MICRO_BATCHES = 2
"""From the second on its gradients meet those of the first."""
GIB = 1 << 30
_LONGEST_REASON = 160
"""Characters of what an architecture says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One part of a step."""

    peak: Mapping[str, int]
    """Bytes by part when they are most, with all that stays between the parts of a step."""
    work: tuple[Work, ...]
    rows: int
    """Completions that this work is for."""

    @property
    def bytes(self) -> int:
        return sum(self.peak.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Of one trial on one device."""

    phases: Mapping[str, Phase]
    """By name, in the order of a step."""
    weights: int
    """Numbers of the model, adapters included."""
    learned: int
    weight_bytes: int
    blocks: int
    hidden: int
    intermediate: int
    vocabulary: int
    cache_bytes_per_token: int
    """Keys and values of one token of one completion, where all blocks attend to all tokens."""
    engine: Needs
    """Of vLLM, where it generates."""
    source: str
    """Where the shapes are from."""

    @property
    def largest(self) -> str:
        """Name of the phase that holds most."""
        return max(self.phases, key=lambda name: self.phases[name].bytes)


class CannotCount(Exception):
    """An architecture whose code asks for values, so that shapes alone do not tell; the reason in one line."""


@functools.cache
def footprint(config: TrialConfig) -> Footprint:
    """Of a trial of this configuration. Raises ConfigError for a model whose shapes are not known here, CannotCount for
    one that shapes do not tell enough of."""
    if config.parallel.weights == "sharded":
        raise CannotCount("parallel.weights=sharded: what one process of several holds is not counted")
    architecture = architecture_of(config.model)
    counted = Counted()
    try:
        with counted:
            policy = without_weights(config, architecture, counted)
            phases = count_step(config, policy, counted)
    except ConfigError:
        raise
    except Exception as error:  # whatever the code of an architecture raises that has no numbers to look at
        if architecture.config.model_type in KNOWN_BLOCKS:
            raise
        raise CannotCount(
            f"{architecture.config.model_type}: {' '.join(str(error).split())[:_LONGEST_REASON]}"
        ) from error
    parameters, text = list(policy.model.parameters()), architecture.config.get_text_config()
    return Footprint(
        phases=phases,
        weights=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        blocks=policy.depth,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        cache_bytes_per_token=cache_numbers_per_token(text) * getattr(torch, config.model.dtype).itemsize,
        learned=sum(parameter.numel() for parameter in policy.trainable().values()),
        engine=needs_of(config, policy, peak=max(phase.bytes for phase in phases.values())),
        source=architecture.source,
    )


def count_step(config: TrialConfig, policy: Policy, counted: Counted) -> dict[str, Phase]:
    """The parts of a step of this policy, inside `counted`; its weights may be real. Raises CannotCount."""
    if any(isinstance(module, Experts) for module in policy.model.modules()):
        raise CannotCount("which experts a token goes to hangs on its values")
    with counted.making("reference model"):
        copied = config.grpo.kl_beta > 0 and config.model.adapter == "full"
        reference = copy.deepcopy(policy) if copied else None
    optimizer = _optimizer(config, policy, counted)
    batch = _batch(config, policy, counted)
    phases = _rollout(config, policy, counted) | _learning(config, policy, optimizer, batch, counted)
    del reference
    return phases


# --- what is there before a step ------------------------------------------------------------------------------------


def without_weights(config: TrialConfig, architecture: Architecture, counted: Counted) -> Policy:
    with counted.making("weights"), torch.device("meta"):
        network = AutoModelForCausalLM.from_config(
            architecture.config, dtype=getattr(torch, config.model.dtype), attn_implementation=config.model.attention
        )
    network.generation_config.eos_token_id = [0]
    tokenizer: Any = None  # nobody asks a shape for its text
    with counted.making("weights"):
        policy = wrapped(network, tokenizer, config.model, config.quant, config.seed)
        for tensor in (*policy.model.parameters(), *policy.model.buffers()):
            tensor.detach()  # seen, if no operation of torch's made it
    return replace(policy, checkpoints=config.grpo.checkpoint_activations)


def _optimizer(config: TrialConfig, policy: Policy, counted: Counted) -> StepOnShapes:
    grpo, learned = config.grpo, list(policy.trainable().values())
    with counted.making("optimiser"):
        optimizer = StepOnShapes(
            learned, lr=grpo.learning_rate, betas=(0.9, grpo.adam_beta2), weight_decay=grpo.weight_decay
        )
        optimizer.make_moments()
    masters = optimizer.param_groups[0]["params"]
    for parameter, master in zip(learned, masters, strict=True):

        def is_gradient(_: Tensor, master: Tensor = master) -> None:
            assert master.grad is not None
            counted.relabel(master.grad, "gradients")

        parameter.register_post_accumulate_grad_hook(is_gradient)  # type: ignore[no-untyped-call]
    return optimizer


def _labels(policy: Policy, caches: Collection[int] = ()) -> Callable[[str, Tensor], str | None]:
    """Of what operations make; `caches`: numbers of keys, or values, of all blocks."""
    text = policy.network.config.get_text_config()
    matrices = {tuple(linear.weight.shape) for linear in policy.linears.values()}

    def label(operation: str, made: Tensor) -> str | None:
        if operation == "fake_quantize" and tuple(made.shape) in matrices:
            return "quantised weights"
        if made.dim() >= 2 and made.shape[-1] == text.vocab_size:
            return "logits"
        return "KV cache" if made.numel() in caches else None

    return label


def _rows_at_once(config: TrialConfig) -> tuple[int, int]:
    """Completions that a rank generates together in a rollout and in an evaluation."""
    grpo, ranks = config.grpo, config.parallel.ranks
    prompts = max(1, min(config.rollout.batch_size // grpo.group_size, share(grpo.batch_prompts, ranks)))
    return prompts * grpo.group_size, min(config.eval.batch_size, share(config.eval.questions, ranks))


def pass_at_k_rows(config: TrialConfig) -> int:
    """Completions that a rank samples together for pass@k, of some questions as often as `eval.samples` says
    (`evaluation.count_right`); 0 where none are."""
    samples, questions = config.eval.samples, share(config.eval.questions, config.parallel.ranks)
    return samples and samples * min(questions, max(1, config.eval.batch_size // samples))


def share(number: int, ranks: int) -> int:
    """The largest part of it that one of them has."""
    return -(-number // ranks)


# --- the parts of a step ----------------------------------------------------------------------------------------------


@contextmanager
def _phase(counted: Counted, phases: dict[str, Phase], name: str, rows: int) -> Iterator[None]:
    counted.begin()
    yield
    phases[name] = _so_far(counted, rows)


def _so_far(counted: Counted, rows: int) -> Phase:
    peak = {part: size for part, size in counted.peak.items() if size}
    return Phase(peak=peak, work=counted.work, rows=rows)


def _rollout(config: TrialConfig, policy: Policy, counted: Counted) -> dict[str, Phase]:
    """By the modules that are trained: of a rollout, an evaluation and pass@k the prompts, and a token in the middle of
    the completions. With an engine beside the trainer: what it is given."""
    phases: dict[str, Phase] = {}
    rollout, group = config.rollout, config.grpo.group_size
    sampled, asked = _rows_at_once(config)
    generated = [("rollout", sampled, group), ("evaluation", asked, 1)]
    if drawn := pass_at_k_rows(config):
        generated.append(("pass@k", drawn, config.eval.samples))
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    each_token = cache_numbers_per_token(policy.network.config.get_text_config()) // 2
    counted.label = _labels(policy, {each_token * longest * rows for _, rows, _ in generated})
    with _phase(counted, phases, "deploy", 1), deployed(policy):
        pass
    if rollout.backend == "vllm":
        return phases
    for name, rows, each in generated:
        with torch.no_grad(), deployed(policy):
            with _phase(counted, phases, f"{name}: prompts", rows):
                reading = decoder(policy, rollout.max_new_tokens)
                ids = torch.zeros(rows // each, rollout.max_prompt_tokens, dtype=torch.long, device=policy.device)
                logits = reading.prefill(ids, torch.ones_like(ids), each)
            with _phase(counted, phases, f"{name}: a token", rows):
                token, _, _ = sample(logits, 0.0 if name == "evaluation" else rollout.temperature, None)
                del logits
                logits = reading.step(token)
            del reading, logits
    return phases


def _batch(config: TrialConfig, policy: Policy, counted: Counted) -> Batch:
    """Of a whole step, a rank's share of it."""
    rows, tokens = (
        share(config.grpo.prompts, config.parallel.ranks) * config.grpo.group_size,
        config.rollout.max_new_tokens,
    )
    device = policy.device
    with counted.making("batch"):
        ids = torch.zeros(rows, config.rollout.max_prompt_tokens, dtype=torch.long, device=device)
        mask = torch.ones(rows, tokens, device=device)
        return Batch(
            prompt_ids=ids,
            prompt_mask=torch.ones_like(ids),
            completion_ids=torch.zeros(rows, tokens, dtype=torch.long, device=device),
            mask=mask,
            rollout_logps=torch.zeros_like(mask),
            advantages=torch.zeros(rows, device=device),
            old_logps=torch.zeros_like(mask),
            reference_logps=torch.zeros_like(mask) if config.grpo.kl_beta > 0 else None,
            group_size=config.grpo.group_size,
            prompt_lengths=np.full(rows, config.rollout.max_prompt_tokens),
            lengths=np.full(rows, tokens),
        )


def _learning(
    config: TrialConfig, policy: Policy, optimizer: StepOnShapes, batch: Batch, counted: Counted
) -> dict[str, Phase]:
    """Two micro-batches of the log-probs and of the update, or all where there are fewer."""
    phases: dict[str, Phase] = {}
    grpo, rollout = config.grpo, config.rollout
    counted.label = _labels(policy)
    with counted.making("batch"):
        some = _some_of(policy, batch, grpo)
    with _phase(counted, phases, "log-probs", len(some)), deployed(policy):
        clean_logps(policy, some, rollout.temperature, grpo.micro_batch)

    def learned(*_: Any) -> None:
        phases["update"] = _so_far(counted, len(some))
        counted.begin()
        counted.making_now = "optimiser"

    optimizer.register_step_pre_hook(learned)
    once = grpo.model_copy(update={"updates_per_step": 1, "epochs": 1})
    counted.begin()
    update(policy, optimizer, some, once, rollout, first_update=0, shuffle=torch.Generator())
    phases["optimizer"] = _so_far(counted, 1)
    counted.making_now = OTHER
    return phases


def _some_of(policy: Policy, batch: Batch, grpo: GRPOConfig) -> Batch:
    """Groups enough for two of them as large as they get, or those of a mini-batch where there are fewer."""
    group = batch.group_size
    for groups in range(1, max(1, len(batch) // group // grpo.minibatches) + 1):
        some = batch.rows(slice(0, groups * group), group)
        sizes = [len(part) for _, part in micro_batches(policy, some, grpo.micro_batch)]
        if sizes.count(max(sizes)) >= _MICRO_BATCHES:
            break
    return some

"""How long a trial takes on a device at best: an estimate before anything has run, and never a measurement.

A roofline (Williams et al., CACM 52(4), 2009): each operation of the trial's own code, counted without numbers
(`trainable/footprint.py`), takes as long as its arithmetic at the device's peak or its bytes at its bandwidth,
whichever is longer, at the share of either that such code reaches; and a phase takes no less than Python needs to
launch its operations one by one, by which generating with the trained modules is bound on a fast device. Those shares
are assumptions, and are told with the numbers that hang on them.

vLLM is not run: its tokens are as long as the weights, and the keys and values of the sequences in work, take to be
read once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from spaces.config import TrialConfig
from spaces.devices import Device
from spaces.schedules import quiet_steps
from trainable.footprint import Footprint, Phase, pass_at_k_rows, share

PEAK_SHARE = 0.6
"""Of the peak that large matrix products reach."""
BANDWIDTH_SHARE = 0.8
"""Of the bandwidth that an operation over a large tensor reaches."""
LAUNCH_SECONDS = 8e-6
"""From one operation of eager torch to the next, on the host."""
HOST_GB_PER_SECOND = 10.0
"""From a process to another through the host's memory."""
_ENGINE_OPERATIONS = 25
"""Launches of a block in vLLM without CUDA graphs."""

ASSUMED = (
    f"{PEAK_SHARE:.0%} of the device's peak in matrix products, {BANDWIDTH_SHARE:.0%} of its bandwidth elsewhere, "
    f"{LAUNCH_SECONDS * 1e6:.0f} microseconds to launch an operation",
    "one generated batch in a step, every completion as long as rollout.max_new_tokens allows; rewards, noise of "
    "norms, an engine's gate before step 0, checkpoints and loading take no time; nothing collapses",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """Example: Time(what="log-probs", seconds=24.3, how="64 x 0.38 s")"""

    what: str
    seconds: float
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Of a trial."""

    step: tuple[Time, ...]
    baseline: tuple[Time, ...]
    """Noise-free, before step 0."""
    evaluation: tuple[Time, ...]
    """Between steps: deployed alone."""
    ends: tuple[Time, ...]
    """Of the start, and again of the end: unquantised as well, and with the samples of pass@k."""
    steps: int
    between: int
    """Evaluations between steps."""

    @property
    def seconds(self) -> float:
        often = ((self.steps, self.step), (1, self.baseline), (self.between, self.evaluation), (2, self.ends))
        return sum(count * summed(parts) for count, parts in often)


def summed(parts: tuple[Time, ...]) -> float:
    """Seconds of all of them."""
    return sum(part.seconds for part in parts)


def times(config: TrialConfig, shapes: Footprint, device: Device, cache_bytes: int = 0) -> Times:
    """`cache_bytes`: of vLLM's keys and values, where it generates."""
    steps, every, arguments = config.grpo.steps, config.eval.every, (config, shapes, device, cache_bytes)
    questions = share(config.eval.questions, config.parallel.ranks)
    evaluation = tuple(_generation(*arguments, "evaluation", questions, 1))
    return Times(
        step=tuple(_step(*arguments)),
        baseline=tuple(_baseline(*arguments)),
        evaluation=evaluation,
        ends=(*evaluation, *_only_at_ends(*arguments, evaluation)),
        steps=steps,
        between=(steps - 1) // every if every else 0,
    )


def seconds_of(phase: Phase, device: Device) -> float:
    """Its operations one after the other, no faster than they are launched."""
    computing, launches = 0.0, 0
    for work in phase.work:
        arithmetic = work.flops / ((device.fp32_tflops if work.wide else device.bf16_tflops) * 1e12 * PEAK_SHARE)
        moving = work.bytes / (device.gb_per_second * 1e9 * BANDWIDTH_SHARE)
        computing += work.count * max(arithmetic, moving)
        launches += work.count
    return max(computing, launches * LAUNCH_SECONDS)


def _step(config: TrialConfig, shapes: Footprint, device: Device, cache_bytes: int) -> Iterator[Time]:
    grpo, steps = config.grpo, config.grpo.steps
    yield _quantising(config, shapes, device)
    noisy = steps - quiet_steps(config.noise, steps)
    if config.noise.sigma_start > 0 and "linear" in config.noise.modules:
        deploy = seconds_of(shapes.phases["deploy"], device)
        how = f"of linear layers, as long as to quantise them, in {noisy} of {steps} steps"
        yield Time(what="noise", seconds=deploy * noisy / steps, how=how)
    ranks = config.parallel.ranks
    sampled = share(grpo.batch_prompts, ranks)
    yield from _generation(config, shapes, device, cache_bytes, "rollout", sampled, grpo.group_size)
    yield from _log_probs(config, shapes, device)
    rows = share(grpo.prompts, ranks) * grpo.group_size * grpo.epochs
    yield _repeated(shapes, device, "update", rows / shapes.phases["update"].rows)
    yield _repeated(shapes, device, "optimizer", grpo.updates_per_step)


def _baseline(config: TrialConfig, shapes: Footprint, device: Device, cache_bytes: int) -> Iterator[Time]:
    """The rollout before step 0, of as many prompts as a step learns from."""
    yield _quantising(config, shapes, device)
    sampled = share(config.grpo.prompts, config.parallel.ranks)
    yield from _generation(config, shapes, device, cache_bytes, "rollout", sampled, config.grpo.group_size)
    yield from _log_probs(config, shapes, device)


def _quantising(config: TrialConfig, shapes: Footprint, device: Device) -> Time:
    once, copied = (
        seconds_of(shapes.phases["deploy"], device),
        config.grpo.kl_beta > 0 and config.model.adapter == "full",
    )
    times, reference = (3, ", and of the reference") if copied else (2, "")
    how = f"{times} x {once:.2g} s, for rollout and log-probs{reference}"
    return Time(what="quantise the weights", seconds=times * once, how=how)


def _log_probs(config: TrialConfig, shapes: Footprint, device: Device) -> Iterator[Time]:
    """By the policy, and by a reference where the loss has its KL."""
    rows = share(config.grpo.prompts, config.parallel.ranks) * config.grpo.group_size
    own = _repeated(shapes, device, "log-probs", rows / shapes.phases["log-probs"].rows)
    yield own
    if config.grpo.kl_beta > 0:
        yield replace(own, what="log-probs of the reference")


def _only_at_ends(
    config: TrialConfig, shapes: Footprint, device: Device, cache_bytes: int, evaluation: tuple[Time, ...]
) -> Iterator[Time]:
    if config.quant.mode != "W16A16":
        yield Time(what="evaluation: unquantised", seconds=summed(evaluation), how="about as long as deployed")
    if config.eval.samples:
        questions = share(config.eval.questions, config.parallel.ranks)
        yield from _generation(config, shapes, device, cache_bytes, "pass@k", questions, config.eval.samples)


def _generation(
    config: TrialConfig, shapes: Footprint, device: Device, cache_bytes: int, which: str, prompts: int, each: int
) -> Iterator[Time]:
    """Of so many completions of each prompt."""
    if config.rollout.backend == "vllm":
        yield from _by_engine(config, shapes, device, cache_bytes, which, prompts, each)
        return
    chunks = math.ceil(prompts * each / shapes.phases[f"{which}: prompts"].rows)
    yield _repeated(shapes, device, f"{which}: prompts", chunks)
    yield _repeated(shapes, device, f"{which}: a token", chunks * config.rollout.max_new_tokens)


def _repeated(shapes: Footprint, device: Device, name: str, times: float) -> Time:
    once = seconds_of(shapes.phases[name], device)
    return Time(what=name, seconds=times * once, how=f"{times:g} x {once:.2g} s")


def _by_engine(
    config: TrialConfig, shapes: Footprint, device: Device, cache_bytes: int, which: str, prompts: int, each: int
) -> Iterator[Time]:
    """Weights are handed over; prompts are bound by arithmetic; each token reads all weights, and the keys and values
    of the sequences in work, which are as many as the cache holds half-grown."""
    rollout = config.rollout
    peak = (device.fp32_tflops if config.model.dtype == "float32" else device.bf16_tflops) * 1e12 * PEAK_SHARE
    speed = device.gb_per_second * 1e9 * BANDWIDTH_SHARE
    handed = HOST_GB_PER_SECOND * 1e9 if rollout.engine == "process" else speed / 2
    through = "through the host's memory" if rollout.engine == "process" else "on the device"
    yield Time(what=f"{which}: weights to vLLM", seconds=shapes.weight_bytes / handed, how=f"once, {through}")
    read = 2 * shapes.weights * prompts * rollout.max_prompt_tokens / peak
    yield Time(what=f"{which}: prompts", seconds=read, how=f"{prompts} of {rollout.max_prompt_tokens} tokens")
    grown = rollout.max_prompt_tokens + rollout.max_new_tokens // 2
    held = int(cache_bytes / (shapes.cache_bytes_per_token * grown))
    asked = pass_at_k_rows(config) if which == "pass@k" else prompts * each
    together = max(1, min(rollout.batch_size, held, asked))
    moved = shapes.weight_bytes + together * grown * shapes.cache_bytes_per_token
    launching = shapes.blocks * _ENGINE_OPERATIONS * LAUNCH_SECONDS
    token = max(moved / speed, 2 * shapes.weights * together / peak, launching)
    waves = prompts * each / together
    yield Time(
        what=f"{which}: tokens",
        seconds=waves * rollout.max_new_tokens * token,
        how=f"{waves:.3g} x {together} sequences at once x {rollout.max_new_tokens} tokens x {token:.2g} s",
    )

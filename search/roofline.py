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
from dataclasses import dataclass

from spaces.config import TrialConfig
from spaces.devices import Device
from trainable.footprint import Footprint, Phase, share

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
    "one generated batch in a step, every completion as long as rollout.max_new_tokens allows; rewards, checkpoints "
    "and loading take no time; nothing collapses",
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
    evaluation: tuple[Time, ...]
    steps: int
    evaluations: int

    @property
    def step_seconds(self) -> float:
        return sum(part.seconds for part in self.step)

    @property
    def evaluation_seconds(self) -> float:
        return sum(part.seconds for part in self.evaluation)

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds + self.evaluations * self.evaluation_seconds


def times(config: TrialConfig, shapes: Footprint, device: Device, cache_bytes: int = 0) -> Times:
    """`cache_bytes`: of vLLM's keys and values, where it generates."""
    steps, every = config.grpo.steps, config.eval.every
    return Times(
        step=tuple(_step(config, shapes, device, cache_bytes)),
        evaluation=tuple(_evaluation(config, shapes, device, cache_bytes)),
        steps=steps,
        evaluations=2 + ((steps - 1) // every if every else 0),
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
    grpo = config.grpo
    deploy = seconds_of(shapes.phases["deploy"], device)
    yield Time(what="quantise the weights", seconds=2 * deploy, how=f"2 x {deploy:.2g} s, for rollout and log-probs")
    yield Time(what="noise", seconds=deploy, how="where it is on linear layers, as long as to quantise them")
    ranks = config.parallel.ranks
    sampled = share(grpo.batch_prompts, ranks) * grpo.group_size
    yield from _generation(config, shapes, device, "rollout", sampled, cache_bytes)
    rows = share(grpo.prompts, ranks) * grpo.group_size
    for name, count in (("log-probs", rows), ("update", rows * grpo.epochs), ("optimizer", grpo.updates_per_step)):
        yield _repeated(shapes, device, name, count / shapes.phases[name].rows)


def _evaluation(config: TrialConfig, shapes: Footprint, device: Device, cache_bytes: int) -> Iterator[Time]:
    """In the deployed precision and unquantised, which takes about as long."""
    twice = 2 if config.quant.mode != "W16A16" else 1
    asked = share(config.eval.questions, config.parallel.ranks)
    for part in _generation(config, shapes, device, "evaluation", asked, cache_bytes):
        yield Time(what=part.what, seconds=twice * part.seconds, how=f"{twice} x {part.how}")


def _generation(
    config: TrialConfig, shapes: Footprint, device: Device, which: str, rows: int, cache_bytes: int
) -> Iterator[Time]:
    """Of so many completions."""
    if config.rollout.backend == "vllm":
        yield from _by_engine(config, shapes, device, which, rows, cache_bytes)
        return
    chunks = math.ceil(rows / shapes.phases[f"{which}: prompts"].rows)
    yield _repeated(shapes, device, f"{which}: prompts", chunks)
    yield _repeated(shapes, device, f"{which}: a token", chunks * config.rollout.max_new_tokens)


def _repeated(shapes: Footprint, device: Device, name: str, times: float) -> Time:
    once = seconds_of(shapes.phases[name], device)
    return Time(what=name, seconds=times * once, how=f"{times:g} x {once:.2g} s")


def _by_engine(
    config: TrialConfig, shapes: Footprint, device: Device, which: str, rows: int, cache_bytes: int
) -> Iterator[Time]:
    """Weights are handed over; prompts are bound by arithmetic; each token reads all weights, and the keys and values
    of the sequences in work, which are as many as the cache holds half-grown."""
    rollout = config.rollout
    peak = (device.fp32_tflops if config.model.dtype == "float32" else device.bf16_tflops) * 1e12 * PEAK_SHARE
    speed = device.gb_per_second * 1e9 * BANDWIDTH_SHARE
    handed = HOST_GB_PER_SECOND * 1e9 if rollout.engine == "process" else speed / 2
    through = "through the host's memory" if rollout.engine == "process" else "on the device"
    yield Time(what=f"{which}: weights to vLLM", seconds=shapes.weight_bytes / handed, how=f"once, {through}")
    prompts = rows // config.grpo.group_size if which == "rollout" else rows
    read = 2 * shapes.weights * prompts * rollout.max_prompt_tokens / peak
    yield Time(what=f"{which}: prompts", seconds=read, how=f"{prompts} of {rollout.max_prompt_tokens} tokens")
    grown = rollout.max_prompt_tokens + rollout.max_new_tokens // 2
    held = int(cache_bytes / (shapes.cache_bytes_per_token * grown))
    together = max(1, min(rollout.batch_size, held, rows))
    moved = shapes.weight_bytes + together * grown * shapes.cache_bytes_per_token
    launching = shapes.blocks * _ENGINE_OPERATIONS * LAUNCH_SECONDS
    token = max(moved / speed, 2 * shapes.weights * together / peak, launching)
    waves = rows / together
    yield Time(
        what=f"{which}: tokens",
        seconds=waves * rollout.max_new_tokens * token,
        how=f"{waves:.3g} x {together} sequences at once x {rollout.max_new_tokens} tokens x {token:.2g} s",
    )

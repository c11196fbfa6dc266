"""A trial on a device that is not here, in words: what it would hold, part by part, and how long it would take.

Every number is an estimate, and the assumptions that it hangs on are told below it. None was measured.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from dashboards.tables import duration
from search import fit as memory
from search import roofline
from search.fit import Fit, Remedy, fit, remedy
from search.roofline import Time, summed, times
from spaces.config import TrialConfig
from spaces.devices import Device
from trainable.footprint import GIB, CannotCount


def estimate_lines(config: TrialConfig, device: Device) -> list[str]:
    """Raises ConfigError for a model whose shapes are not known on this machine."""
    head = f"on {device.name} ({device.memory_gib:g} GiB, {device.gb_per_second:g} GB/s, {device.bf16_tflops:g} TFLOPS)"
    try:
        now = fit(config, device)
    except CannotCount as reason:
        return [f"{head}: memory and time cannot be told from shapes ({reason})"]
    found = remedy(config, device) if now.too_large else None
    return [f"one trial {head}, an estimate of which nothing was measured:", *_memory(now, found), *_time(now, device)]


def _memory(now: Fit, found: Remedy | None) -> Iterator[str]:
    shapes = now.shapes
    yield f"  shapes    {shapes.weights:,} weights, {shapes.learned:,} learned: {shapes.source}"
    most = f"{now.needed_gib(now.largest):.1f} GiB in {now.largest}"
    if not now.too_large:
        yield f"  memory    fits: at most {most}"
    elif found is None:
        yield f"  memory    DOES NOT FIT: {most}, and no setting that it could do with makes it fit"
    else:
        yield f"  memory    DOES NOT FIT: {most}; with {found}: {found.fit.needed_gib(found.fit.largest):.1f} GiB"
    if now.refused:
        yield f"  vLLM      REFUSED: {now.refused}"
    elif now.engine is not None:
        cache, needed = now.engine.cache / GIB, now.engine.needed / GIB
        rest = "sleeps while training learns" if now.engine.sleep_level else "stays beside training"
        yield f"  vLLM      gets {cache:.1f} of the {needed:.1f} GiB that its batch could use, and {rest}"
    for phase, parts in now.phases.items():
        yield f"    {now.needed_gib(phase):7.1f} GiB  {phase}: {_parts(parts)}"
    yield from _assumed(memory.ASSUMED)
    if now.engine is not None:
        yield from _assumed((memory.ASSUMED_OF_ENGINES,))
    if now.config.parallel.ranks > 1:
        yield from _assumed((memory.ASSUMED_OF_RANKS,))


def _parts(parts: Mapping[str, int]) -> str:
    """The largest first; what is below 10 MiB is not worth a word."""
    told = sorted(((size, part) for part, size in parts.items() if size > GIB / 100), reverse=True)
    return ", ".join(f"{part} {size / GIB:.2f}" for size, part in told)


def _time(now: Fit, device: Device) -> Iterator[str]:
    taken = times(now.config, now.shapes, device, 0 if now.engine is None else now.engine.cache)
    step, baseline, between, end = map(summed, (taken.step, taken.baseline, taken.evaluation, taken.ends))
    yield (
        f"  time      {duration(taken.seconds)} a trial: {taken.steps} steps of {duration(step)}, a baseline of "
        f"{duration(baseline)}, evaluations at both ends of {duration(end)}, {taken.between} between of "
        f"{duration(between)}"
    )
    yield from map(_line, taken.step)
    yield from (_line(replace(part, what=f"baseline: {part.what}")) for part in taken.baseline)
    yield from map(_line, taken.ends)
    yield from _assumed((*roofline.ASSUMED, device.source))


def _line(part: Time) -> str:
    return f"    {part.seconds:7.1f} s    {part.what}: {part.how}"


def _assumed(lines: tuple[str, ...]) -> Iterator[str]:
    for line in lines:
        yield f"            assumed: {line}"

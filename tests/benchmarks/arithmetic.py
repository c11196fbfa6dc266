"""The 4-bit arithmetic: fake quantisation against copying the tensor and against torchao, QuantLinear against a plain
linear layer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import nn

from spaces.workloads import TRIAL_ENVIRONMENT
from tests.benchmarks.timing import in_turns, ratio, seconds
from trainable.noised import Drawn, noised
from trainable.philox import key_of
from trainable.quantization import Arithmetic, QuantLinear, fake_quantize, fake_quantize_eager
from trainable.seeds import generator

SHAPES = ((64, 256), (1792, 96), (4096, 4096))
DTYPES = (torch.float32, torch.bfloat16)
_SLOW = ("eager", "torchao")


def quantiser() -> list[str]:
    """Times as multiples of `copy_` into a tensor that is there (ours allocates its output), two threads; median and
    range of five processes (they differ), in each of which all took turns. torchao 0.18 in the same runs; eager is our
    definition in plain torch."""
    lines = [
        (
            "| shape, dtype | copy_ us | mxfp4 floor | even | rceil | ceil | mxfp8 | nvfp4 | "
            "nvfp4, one scale | eager mxfp4 | torchao mxfp4 |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    gains = []
    runs = [_in_a_process("turns") for _ in range(5)]
    for name in runs[0]:
        medians = {rival: [run[name][rival] for run in runs] for rival in runs[0][name]}
        copy = median(medians["copy_"])
        cells = [ratio(medians, rival, "copy_") for rival in medians if rival not in ("copy_", *_SLOW)]
        cells += [f"{median(medians[rival]) / copy:.0f}" for rival in _SLOW]
        lines.append(f"| {name} | {copy * 1e6:.3g} | {' | '.join(cells)} |")
        gains.append(f"{name} {median(medians['torchao']) / median(medians['mxfp4 floor']):.0f}")
    return [*lines, "", f"Times faster than torchao (mxfp4, floor): {'; '.join(gains)}."]


def turns() -> dict[str, dict[str, float]]:
    """Per shape and dtype the seconds of each rival: medians of three rounds."""
    results = {}
    for shape in SHAPES:
        for dtype in DTYPES:
            x = torch.randn(shape, generator=generator("bench")).to(dtype)
            large = x.numel() > 10**6
            medians = in_turns(_rivals(x), repeats=9 if large else 300, rounds=3)
            medians |= in_turns(_slow_rivals(x), repeats=2 if large else 10, rounds=1)
            name = f"{shape[0]}x{shape[1]}, {str(dtype).removeprefix('torch.')}"
            results[name] = {rival: median(times) for rival, times in medians.items()}
    return results


def _in_a_process(function: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What a function of this module returns in a process of its own."""
    code = f"import json; from tests.benchmarks.arithmetic import {function}; print(json.dumps({function}()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _rivals(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    out = torch.empty_like(x)
    rivals: dict[str, Callable[[], object]] = {"copy_": lambda: out.copy_(x)}
    for rule in ("floor", "even", "rceil", "ceil"):
        rivals[f"mxfp4 {rule}"] = lambda rule=rule: fake_quantize(x, "mxfp4", rule)  # type: ignore[misc]
    return rivals | {
        "mxfp8": lambda: fake_quantize(x, "mxfp8"),
        "nvfp4": lambda: fake_quantize(x, "nvfp4"),
        "nvfp4 one": lambda: fake_quantize(x, "nvfp4", per_tensor=True),
    }


def _slow_rivals(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode  # type: ignore[import-untyped]

    return {
        "eager": lambda: fake_quantize_eager(x),
        "torchao": lambda: MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR).dequantize(),
    }


def quant_linear() -> list[str]:
    """Forward and backward of a layer with bias at W4A4, as multiples of a plain linear layer's, two threads; and what
    each keeps for the backward pass: both the layer's input (quantised or not), ours the quantised weight besides."""
    lines = [
        "| tokens x in x out, dtype | plain ms | W4A4 / plain | kept MiB, plain | kept MiB, W4A4 |",
        "|---|---|---|---|---|",
    ]
    for dtype in DTYPES:
        for tokens, inputs, outputs in ((4096, 96, 256), (4096, 576, 576), (4096, 1536, 1536), (8192, 1536, 8960)):
            plain = nn.Linear(inputs, outputs).to(dtype)
            layers = {"plain": plain, "W4A4": QuantLinear.from_linear(plain, name="bench")}
            x = torch.randn(tokens, inputs, generator=generator("x")).to(dtype).requires_grad_()
            grad = torch.randn(tokens, outputs, generator=generator("grad")).to(dtype)
            runs = {name: _round_trip(layer, x, grad) for name, layer in layers.items()}
            medians = in_turns(runs, repeats=3 if inputs > 1000 else 9, rounds=3)
            kept = [f"{_kept_mib(layer, x):.1f}" for layer in layers.values()]
            name = f"{tokens}x{inputs}x{outputs}, {str(dtype).removeprefix('torch.')}"
            lines.append(
                f"| {name} | {median(medians['plain']) * 1e3:.3g} | {ratio(medians, 'W4A4', 'plain')} | "
                f"{' | '.join(kept)} |"
            )
    return lines


def noise() -> list[str]:
    lines = [
        "A noisy MXFP4 weight of 1536 x 8960: by torch.randn (which draws on one core), then added, cast and "
        "quantised, as it was until Philox; and in one pass. The last column is a stage's first step, whose receipt "
        "was a second draw and is counted in the same pass now. They took turns, the ratios are those of each turn.",
        "",
        "| dtype, threads | before ms | now ms | times faster | with the receipt, times faster |",
        "|---|---|---|---|---|",
    ]
    how, threads = Arithmetic().weight, torch.get_num_threads()
    try:
        for dtype, count in product(DTYPES, (1, 2)):
            torch.set_num_threads(count)
            weight = torch.randn(1536, 8960, generator=generator("weight")).mul_(0.02).to(dtype)
            clean, drawn = fake_quantize(weight), Drawn(key=key_of("bench"), sigma=0.01)

            def before(weight: torch.Tensor = weight) -> torch.Tensor:
                shift = torch.randn(weight.shape, generator=generator("bench")).mul_(0.01)
                return fake_quantize((weight.float() + shift).to(weight.dtype))

            def twice(weight: torch.Tensor = weight) -> tuple[torch.Tensor, float, float]:
                change = before(weight).float() - fake_quantize(weight).float()
                return before(weight), change.square().mean().sqrt().item(), (change != 0).float().mean().item()

            rivals: dict[str, Callable[[], object]] = {
                "before": before,
                "now": lambda weight=weight, drawn=drawn: noised(weight, drawn, how),  # type: ignore[misc]
                "twice": twice,
                "counted": lambda weight=weight, drawn=drawn, clean=clean: noised(weight, drawn, how, clean),  # type: ignore[misc]
            }
            medians = in_turns(rivals, repeats=5, rounds=5)
            lines.append(
                f"| {str(dtype).removeprefix('torch.')}, {count} | {median(medians['before']) * 1e3:.3g} | "
                f"{median(medians['now']) * 1e3:.3g} | {ratio(medians, 'before', 'now', 1)} | "
                f"{ratio(medians, 'twice', 'counted', 1)} |"
            )
    finally:
        torch.set_num_threads(threads)
    return lines


def _round_trip(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(grad)

    return run


def _kept_mib(layer: nn.Module, x: torch.Tensor) -> float:
    """Of saved tensors, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(storages.values()) / 2**20


def allocator() -> list[str]:
    """The allocator settings that `rin` gives its processes keep freed memory instead of returning it page by page:
    4096x4096, fp32."""
    results: dict[str, dict[str, Any]] = {}
    for name, settings in (("without", {}), ("with", TRIAL_ENVIRONMENT)):
        environment = {key: value for key, value in os.environ.items() if key not in TRIAL_ENVIRONMENT} | settings
        results[name] = _in_a_process("large", environment)
    lines = ["| | without ms | with ms | gain |", "|---|---|---|---|"]
    for what in results["with"]:
        before, after = results["without"][what], results["with"][what]
        lines.append(f"| {what} | {before * 1e3:.3g} | {after * 1e3:.3g} | {before / after:.1f} |")
    return lines


def large() -> dict[str, float]:
    x = torch.randn(4096, 4096)
    works: dict[str, Callable[[], object]] = {
        "clone": x.clone,
        "mxfp4": lambda: fake_quantize(x),
        "eager": lambda: fake_quantize_eager(x),
    }
    return {name: median(seconds(work, 9)) for name, work in works.items()}

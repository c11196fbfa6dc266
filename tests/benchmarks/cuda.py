"""The CUDA kernels against copying the tensor, in GB/s of bytes read and written: `python -m tests.benchmarks.cuda`
prints the table.

A kernel that passes over the memory once can at best be as fast as the copy. Eager torch is our definition, several
passes counted as one. Medians of Triton's `do_bench`, which empties the L2 cache in between.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainable.kernels import cuda
from trainable.quantization import KERNEL_CODES, fake_quantize, fake_quantize_eager

SHAPES = ((4096, 1536), (8192, 8960), (16384, 16384))
DTYPES = (torch.float32, torch.bfloat16)
_PASSES = {"swiglu to mxfp4": 3}
"""Tensors read and written; otherwise one each."""


def kernels() -> list[str]:
    """The Triton kernels against copying the tensor, in GB/s of bytes read and written. Without a GPU they are tested
    in Triton's interpreter and by reading their assembly (tests/test_cuda_kernels.py)."""
    if not torch.cuda.is_available():
        return ["There was no GPU: NOT TIMED."]
    if cuda.load(torch.zeros(1)) is None:
        return ["There was no Triton: NOT TIMED."]
    lines: list[str] = []
    for shape in SHAPES:
        for dtype in DTYPES:
            x = torch.randn(shape, device="cuda").to(dtype)
            speeds = {
                name: f"{_gigabytes_per_second(x, work, _PASSES.get(name, 2)):.0f}" for name, work in _rivals(x).items()
            }
            lines = lines or [
                f"| {torch.cuda.get_device_name()}, GB/s | {' | '.join(speeds)} |",
                "|---" * (len(speeds) + 1) + "|",
            ]
            lines.append(
                f"| {shape[0]}x{shape[1]}, {str(dtype).removeprefix('torch.')} | {' | '.join(speeds.values())} |"
            )
    return lines


def _rivals(x: Tensor) -> dict[str, Callable[[], object]]:
    out, weight = torch.empty_like(x), torch.ones_like(x[0])
    return {
        "copy_": lambda: out.copy_(x),
        "mxfp4": lambda: fake_quantize(x),
        "mxfp4 even": lambda: fake_quantize(x, "mxfp4", "even"),
        "mxfp8": lambda: fake_quantize(x, "mxfp8"),
        "nvfp4": lambda: fake_quantize(x, "nvfp4"),
        "nvfp4, one scale": lambda: fake_quantize(x, "nvfp4", per_tensor=True),
        "norm": lambda: cuda.rms_norm(x, weight, 1e-6, -1, 0),
        "norm to mxfp4": lambda: cuda.rms_norm(x, weight, 1e-6, *KERNEL_CODES["mxfp4", "floor"]),
        "swiglu to mxfp4": lambda: cuda.swiglu(x, out, *KERNEL_CODES["mxfp4", "floor"]),
        "eager mxfp4": lambda: fake_quantize_eager(x),
        "eager nvfp4": lambda: fake_quantize_eager(x, "nvfp4"),
    }


def _gigabytes_per_second(x: Tensor, work: Callable[[], object], passes: int) -> float:
    from triton.testing import do_bench

    milliseconds: float = do_bench(work, return_mode="median")
    return passes * x.numel() * x.element_size() / milliseconds / 1e6


if __name__ == "__main__":
    print("\n".join(kernels()))

"""Data that quantisers are tested on, and what it is for two results to be the same.

Without the packages of an oracle: a machine with a GPU and little else checks its kernels on them, too
(tests/benchmarks/gpu.py).
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RULES = ("floor", "even", "rceil", "ceil")
MX = [(fmt, rule) for fmt in ("mxfp4", "mxfp8") for rule in RULES]
ALL = [*MX, ("nvfp4", "floor")]
QUANTISED = ("mxfp4", "mxfp8", "nvfp4")
ELEMENTS = {"mxfp4": ml_dtypes.float4_e2m1fn, "mxfp8": ml_dtypes.float8_e4m3fn, "nvfp4": ml_dtypes.float4_e2m1fn}

Array = NDArray[np.float64]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    wrong = (actual != expected) & ~nan
    first = (actual[wrong][:5].tolist(), expected[wrong][:5].tolist())
    assert not wrong.any(), f"{int(wrong.sum())} wrong, the first of them {first[0]} instead of {first[1]}"
    assert torch.equal(actual.signbit()[~nan], expected.signbit()[~nan])


SHAPE = (96, 192)  # 6 blocks of 32 in a row
Draw = Callable[[np.random.Generator, str], Array]


def per_block(rng: np.random.Generator, low: float, high: float) -> Array:
    return np.repeat(rng.uniform(low, high, (SHAPE[0], SHAPE[1] // 32)), 32, axis=1)


def midpoints(rng: np.random.Generator, fmt: str) -> Array:
    """Every element half-way between neighbours of the grid, under an exact power of two as scale."""
    codes = np.arange(128 if fmt == "mxfp8" else 8, dtype=np.uint8).view(ELEMENTS[fmt]).astype(np.float64)
    grid = np.sort(codes[np.isfinite(codes)])
    x: Array = rng.choice((grid[1:] + grid[:-1]) / 2, SHAPE) * rng.choice([-1.0, 1.0], SHAPE)
    x[:, ::16] = grid[-1]
    x *= np.exp2(np.round(per_block(rng, -20, 20)))
    return x


def near_thresholds(rng: np.random.Generator, fmt: str) -> Array:
    """amax within 4 ulp (of fp32 or of bf16) of where a rule doubles the scale."""
    edge = rng.choice([1.0, 1.5, 1.75, 1.9375], SHAPE)
    ulps = rng.integers(-4, 5, SHAPE) * rng.choice([2.0**-23, 2.0**-7], SHAPE)
    top = (edge + ulps) * np.exp2(np.round(per_block(rng, -30, 30)))
    x: Array = top * rng.uniform(-1, 1, SHAPE)
    x[:, ::16] = top[:, ::16]
    x[:, 1::16] = top[:, ::16] * rng.choice([0.03125, 0.125, 0.375, 0.625], (SHAPE[0], SHAPE[1] // 16))
    return x


def near_max(rng: np.random.Generator, fmt: str) -> Array:
    x = rng.uniform(-1, 1, SHAPE) * 2.0 ** per_block(rng, 100, 128)
    x[rng.random(SHAPE) < 0.02] = np.inf  # clipped to the largest value of the dtype
    return x


def specials(rng: np.random.Generator, fmt: str) -> Array:
    x = rng.standard_normal(SHAPE)
    hit = rng.random(SHAPE) < 0.005
    x[hit] = rng.choice([np.nan, -np.nan, np.inf, -np.inf], int(hit.sum()))
    return x


CLASSES: dict[str, Draw] = {
    "normal": lambda rng, fmt: rng.standard_normal(SHAPE),
    "student_t2": lambda rng, fmt: rng.standard_t(2, SHAPE),
    "cauchy": lambda rng, fmt: rng.standard_cauchy(SHAPE),
    "wide_range": lambda rng, fmt: rng.standard_normal(SHAPE) * 2.0 ** per_block(rng, -120, 120),
    "midpoints": midpoints,
    "near_thresholds": near_thresholds,
    "tiny": lambda rng, fmt: rng.uniform(-1, 1, SHAPE) * 2.0 ** per_block(rng, -150, -115),
    "zeros": lambda rng, fmt: rng.choice([0.0, -0.0, -1e-9, 1e-9, 3.0], SHAPE, p=[0.48, 0.48, 0.015, 0.015, 0.01]),
    "near_max": near_max,
    "specials": specials,
}


def sample(kind: str, fmt: str = "mxfp4", dtype: torch.dtype = torch.float32) -> Tensor:
    x = CLASSES[kind](np.random.default_rng(7), fmt)
    if kind == "near_max":
        x = x.clip(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return torch.from_numpy(x).to(dtype)

"""Fused kernels for a CUDA device, in Triton: fake quantisation in one pass over memory, RMSNorm and SwiGLU with
quantised output, weights with noise.

Eager torch takes some ten passes, each at the speed of the memory. Triton is a compiler that comes with torch's CUDA
builds (`pip install triton` elsewhere) and compiles a kernel at its first call, within seconds; it needs a C compiler
for the call itself. Where it is not installed `load` returns None, one line says so, and eager torch computes the same.

The kernels are called as they are, which is quicker, and as operators `rin_cuda::...` where torch.compile looks on, so
that it goes around them, and on meta tensors, which have shapes alone: they go a CUDA device's way with Triton, so that
what is counted on them (trainable/footprint.py) is what such a device would hold. With TRITON_INTERPRET=1, set before
the first call, Triton's interpreter runs them on CPU tensors: so they are tested without a GPU.

`RMSNorm` and `SwiGLU` are these with their gradients, whose backward passes are plain torch. That of the
quantisation is the identity.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from spaces.formats import FORMATS
from trainable.hadamard import rotate
from trainable.kernels.cpu import Kernel

log = logging.getLogger(__name__)

Launch = TypeVar("Launch", bound=Callable[..., Any])

WIDEST = 1 << 14
"""Largest row that the norm holds in the registers of one program."""
_TILE = 1 << 12
"""Elements of a tile: 32 for each of 128 threads."""
_BY_CODE = {form.code: form for form in FORMATS.values()}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FUSED_DTYPES = (torch.float32, torch.bfloat16)
"""Those in which the fused kernels round between two operations as torch does."""
_INSTALLED = importlib.util.find_spec("triton") is not None
"""A constant, for torch.compile cannot look for it."""
_OPTIONS = {"enable_fp_fusion": False}
"""Contraction of a * b + c would skip a rounding on which the kernels rest."""


def takes(x: Tensor) -> bool:
    """Whether `x` lies, or is to be counted as if it lay, where these kernels run."""
    return x.is_cuda or x.is_meta


def load(x: Tensor) -> Kernel | None:
    """`fake_quantize` of a tensor like x; None where triton is not installed, which is logged once."""
    return fake_quantize if _INSTALLED or x.is_meta else _missing()


@functools.cache
def _missing() -> None:
    log.warning(
        "4-bit arithmetic without its fused CUDA kernels, several times slower; pip install triton to have them"
    )


def can_activate(gate: Tensor, up: Tensor) -> bool:
    return gate.dtype == up.dtype and gate.dtype in _FUSED_DTYPES and load(gate) is not None


def can_norm(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.dtype in _FUSED_DTYPES and x.shape[-1] <= WIDEST and load(x) is not None


# --- launches ---------------------------------------------------------------------------------------------------------


def _operator(like: Callable[..., Any]) -> Callable[[Launch], Launch]:
    """A launch that torch.compile sees as the operator `rin_cuda::NAME`; `like`: empty results for its arguments."""

    def made(launch: Launch) -> Launch:
        operator: Any = torch.library.custom_op(f"rin_cuda::{launch.__name__}", launch, mutates_args=())
        operator.register_fake(like)

        @functools.wraps(launch)
        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or arguments[0].is_meta:
                return operator(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))
            return launch(*arguments)

        return cast(Launch, call)

    return made


@_operator(lambda x, *_: x.new_empty(x.shape))
def fake_quantize(x: Tensor, code: int, addend: int, per_tensor: bool) -> Tensor:
    """`x` on the grid of a format, without gradient; the arguments are those of `trainable.kernels.cpu.Kernel`."""
    from trainable.kernels import cuda_blocks as kernels

    if x.dtype not in _DTYPES:
        return fake_quantize(x.to(torch.float32), code, addend, per_tensor).to(x.dtype)
    _check(x, code)
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    count, columns = x.numel(), x.shape[-1]
    if count == 0:
        return out
    form = _BY_CODE[code]
    assert form.element is not None
    tiles = (-(-count // _TILE),)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if form.scale is None:
            mantissa = form.element.mantissa_bits
            kernels.mx_tensor[tiles](_bits(x), _bits(out), count, addend, mantissa, _TILE // 32, **_OPTIONS)
        elif per_tensor:
            kernels.nv_tensor[tiles](_bits(x), _bits(out), count, _largest(x), _TILE // 16, **_OPTIONS)
        else:
            blocks = min(_power_of_two(columns // 16), _TILE // 16)
            kernels.nv_rows[(count // columns,)](
                _bits(x), _bits(out), columns, blocks, num_warps=_warps(blocks * 16), **_OPTIONS
            )
    return out


@_operator(lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)))
def rms_norm(x: Tensor, weight: Tensor, epsilon: float, code: int, addend: int) -> tuple[Tensor, Tensor]:
    """y = Q(weight * x / sqrt(mean(x^2) + epsilon)), and 1 / sqrt(..) of each row in fp32; without gradient.

    x [.., n] -> y [.., n], [rows]. `code` is -1 for no quantisation. n is at most WIDEST, and x and `weight` share a
    dtype.
    """
    from trainable.kernels import cuda_blocks as kernels

    assert can_norm(x, weight), f"{x.dtype=} {weight.dtype=} {x.shape=}"
    _check(x, code)
    x, weight = x.detach().contiguous(), weight.detach().contiguous()
    columns = x.shape[-1]
    y, inverse = torch.empty_like(x), x.new_empty(x.numel() // columns, dtype=torch.float32)
    room = max(32, _power_of_two(columns))
    if x.numel():
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            kernels.norm_rows[(len(inverse),)](
                *(_bits(x), _bits(weight), _bits(y), inverse, epsilon, addend, columns, code, room),
                num_warps=_warps(room),
                **_OPTIONS,
            )
    return y, inverse


@_operator(lambda gate, *_: gate.new_empty(gate.shape))
def swiglu(gate: Tensor, up: Tensor, code: int, addend: int) -> Tensor:
    """Q(silu(gate) * up), all [.., m], of one dtype; without gradient. `code` is -1 for no quantisation."""
    from trainable.kernels import cuda_blocks as kernels

    assert can_activate(gate, up), f"{gate.dtype=} {up.dtype=}"
    _check(gate, code)
    gate, up = gate.detach().contiguous(), up.detach().contiguous()
    out, count = torch.empty_like(gate), gate.numel()
    whole_rows = _BY_CODE[code].scale is not None  # whose outer scale is known when the row is
    if count:
        with torch.cuda.device_of(gate):  # type: ignore[no-untyped-call]
            kernels.swiglu_tensor[(-(-count // _TILE),)](
                *(_bits(gate), _bits(up), _bits(out), count, addend, -1 if whole_rows else code, _TILE // 32),
                **_OPTIONS,
            )
    return fake_quantize(out, code, addend, False) if whole_rows else out


def noised(
    base: Tensor,
    clean: Tensor | None,
    unit: Tensor | None,
    key: int,
    start: int,
    sigma: float,
    code: int,
    addend: int,
    per_tensor: bool,
) -> tuple[Tensor, Tensor | None]:
    """Q(base + noise), fp32 or bf16, and its change against `clean`: the definition is trainable/noised.py.

    NVFP4 is rounded in a pass of its own: its outer scale is known when all noise has been added.
    """
    from trainable.kernels import cuda_blocks as kernels

    assert base.dtype in _FUSED_DTYPES, f"{base.dtype=}"
    assert start % 4 == 0, f"{start=}"
    _check(base, code)
    base = base.detach().contiguous()
    clean = None if clean is None else clean.detach().contiguous()
    out, count = torch.empty_like(base), base.numel()
    apart = _BY_CODE[code].scale is not None
    measured = clean is not None and not apart
    tiles = -(-count // _TILE)
    sums = torch.zeros(tiles if measured else 0, 2, dtype=torch.float32, device=base.device)
    if count:
        per = count // unit.numel() if unit is not None else count
        with torch.cuda.device_of(base):  # type: ignore[no-untyped-call]
            kernels.noised_tensor[(tiles,)](
                *(
                    _bits(base),
                    _bits(base if clean is None else clean),
                    sums if unit is None else unit,
                    _bits(out),
                ),
                *(sums, count, per, key, start, sigma, addend, -1 if apart else code),
                *(unit is not None, measured, _TILE // 32),
                **_OPTIONS,
            )
    if apart:
        out = fake_quantize(out, code, addend, per_tensor)
    if clean is None:
        return out, None
    if apart:
        change = out.float() - clean.float()
        return out, torch.stack((change.double().square().sum(), (change != 0).sum().double()))
    return out, sums.sum(0, dtype=torch.float64)


def _check(x: Tensor, code: int) -> None:
    form, columns = _BY_CODE[code], x.shape[-1]
    if columns % form.block != 0:
        raise ValueError(
            f"{form.name} needs a last dim that is a multiple of {form.block}, but got {columns}; exclude it"
        )


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude, fp32 and in no dimension; NaN where there is one. Its quotient by 448 * 6 is left to the
    kernel: torch multiplies by the reciprocal when it divides a CUDA tensor by a number."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).to(torch.float32)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _warps(elements: int) -> int:
    return min(16, max(1, elements // 1024))


# --- with their gradients ---------------------------------------------------------------------------------------------


class RMSNorm(torch.autograd.Function):
    """`rms_norm` without its second result. Keeps x and one number a row; computed in fp32, and rounded at the end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, code: int, addend: int, rotated: bool) -> Tensor:
        y, inverse = rms_norm(x, weight, epsilon, *((-1, 0) if rotated else (code, addend)))
        ctx.save_for_backward(x, weight, inverse)
        ctx.rotated = rotated
        return _rotated(y, code, addend) if rotated else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dy = rotate(grads[0]) if ctx.rotated else grads[0]
        dy, inverse = dy.to(torch.float32), inverse.view(*x.shape[:-1], 1)
        h = x * inverse  # fp32, as `inverse` is
        g = dy * weight
        dx = (g - h * (g * h).mean(-1, keepdim=True)) * inverse
        dw = (dy * h).reshape(-1, x.shape[-1]).sum(0)
        return dx.to(x.dtype), dw.to(weight.dtype), None, None, None, None


class SwiGLU(torch.autograd.Function):
    """`swiglu`. Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, code: int, addend: int, rotated: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.rotated = rotated
        return _rotated(swiglu(gate, up, -1, 0), code, addend) if rotated else swiglu(gate, up, code, addend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dy = rotate(grads[0]) if ctx.rotated else grads[0]
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate), None, None, None


def _rotated(y: Tensor, code: int, addend: int) -> Tensor:
    """Q(y H): the rotation is eager torch here, the rest is fused."""
    turned = rotate(y.detach())
    return fake_quantize(turned, code, addend, False) if code >= 0 else turned

"""Fake quantisation to 4 and 8 bits, and how a linear layer computes with it: the arithmetic under study.

Method. Neighbours on the last axis form a block. A block has one scale X, each element is rounded to the grid of a
tiny float P, and the layer computes with X * P in the tensor's own dtype. Nothing is packed: the GEMM stays in 16 or
32 bits and only its operands lie on the grid, which is what 4-bit hardware computes up to the order of its sums.
The backward pass is the straight-through estimator (arXiv 1308.3432): rounding counts as the identity, so
dX = dY Wq and dW = dY^T Xq. Its GEMMs are not quantised further.

Formats. OCP Microscaling Formats (MX) v1.0: MXFP4 = E2M1 elements (section 5.3.3), MXFP8 = E4M3 elements (5.3.1), in
blocks of 32 whose scale is a power of two (E8M0, 5.4.1), converted as in 6.3; companion paper arXiv 2310.10537.
NVFP4 (arXiv 2509.25149): E2M1 in blocks of 16 whose scale is E4M3, under an fp32 outer scale amax / (448 * 6). That
one is per tensor for weights, per row (token) for activations: with a common one, what a completion computes would
depend on the rest of its batch.

Choices, each of which some library makes differently:
- The scale rule. Let amax = m * 2^e, m in [1, 2), be the largest magnitude of the block and emax the exponent of the
  grid's largest value (6: 2, 448: 8). X is 2^(e - emax), or twice that:
    floor  never twice: OCP 6.3. Elements above the largest value saturate (E2M1: m > 1.5, E4M3: m > 1.75).
    even   when amax rounds up to 2^(e+1) at the element's mantissa bits (E2M1: m >= 1.75, E4M3: m >= 1.9375).
    rceil  when needed to hold amax: X = 2^ceil(log2(amax / largest)) (E2M1: m > 1.5, E4M3: m > 1.75).
    ceil   when m > 1: X = 2^(ceil(log2 amax) - emax). Never saturates, wastes up to a binade.
  All four are one integer add to the bits of amax and a mask. A log2 in floats errs next to powers of two, and in
  bf16 on ordinary data. The spec has `floor` alone; for E4M3 the thresholds of the others are carried over from E2M1.
- Elements round to nearest, ties to even, saturate at the largest value, and keep their sign, also that of zero.
- NaN or Inf anywhere makes the whole block NaN, in NVFP4 all that shares the outer scale: divergence is not hidden.
- MX is exact for every finite block, subnormals included: the scale stops at E8M0's 2^-127, and nothing is flushed
  that the format can hold (torch.set_flush_denormal(True) would flush; it is off by default). In NVFP4 a row, or
  tensor, with amax < 2^-100 becomes zero, as products of its two scales would no longer be normal numbers; so does a
  block whose scale rounds to zero in E4M3 (its amax is 448 * 1024 times below that of the row or tensor).
- A result is Inf only where the dtype ends: `even`, `rceil` and `ceil` may round fp32's largest values to 2^128.
- bf16 and fp16 are computed in fp32. MX results are exact in them, NVFP4 results are rounded once more.

Speed. On CPU and CUDA devices a fused kernel does all of it in one pass (`trainable/kernels/`); other devices and a
machine without a compiler (or Triton) take eager torch, which is also the definition: few passes, in place, over chunks
that stay in the L2 cache, and rounding by adding and subtracting 1.5 * 2^23 steps, so that the adder itself rounds to
nearest even.

How a layer computes is a record, `Arithmetic`; what becomes of one of its operands is another, `Operand`. Layers,
engines, noise, folders and receipts hold or ask these, so that another transform of operands is written here and in the
kernels, and nowhere else. An input that several layers make the same operand of is made once, by the module in front of
them (`InputSource`); whether it is follows from what the layers are, and is decided anew whenever that changes
(`model.computing`).

Left out: packing; stochastic rounding (3 dB worse in the forward pass, and the policy would no longer be a function
of its weights); quantised gradients. A Hadamard rotation of both operands is an option (trainable/hadamard.py), because
it removes the dead zone that noise is meant to act on.

Shapes: R = rows (tokens or output features), B = blocks of a row, K = elements of a block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spaces.formats import FORMATS, Element, Format
from trainable.again import remember
from trainable.hadamard import POINTS, rotate
from trainable.kernels import cpu, cuda
from trainable.sharding import whole

if TYPE_CHECKING:
    from spaces.config import QuantConfig

_MAGNITUDE = 0x7FFFFFFF  # fp32 bits without the sign
_EXPONENT = 0x7F800000
_FRACTION = 0x007FFFFF
_FRACTION_BITS = 23
_CHUNK = 1 << 17
"""Elements per chunk and CPU thread: input, output and scratch of 512 KiB each stay in an L2 cache of 2 MiB."""
_NVFP4_MIN_AMAX = 2.0**-100


# --- the function ----------------------------------------------------------------------------------------------------


def fake_quantize(x: Tensor, fmt: str = "mxfp4", scale_rule: str = "floor", *, per_tensor: bool = False) -> Tensor:
    """`x` on the grid of `fmt`, in its own shape and dtype, blocks along the last axis; without gradient.

    `scale_rule` concerns the MX formats; `per_tensor` the outer scale of nvfp4: one for all of `x` instead of one
    per row. A block with a NaN or Inf becomes NaN. Blocks with amax < 2^-124 are exact in MX, zero in nvfp4.
    `none` returns `x` itself.

    Example: amax = 6 gives X = 1 in mxfp4, so [6.0, 2.6, -0.2, 0.75, ...] becomes [6.0, 3.0, -0.0, 1.0, ...].

    Raises ValueError if the block does not divide the last dimension.
    """
    if fmt == "none":
        return x
    kernel = _kernel(x)
    if kernel is None:
        return fake_quantize_eager(x, fmt, scale_rule, per_tensor=per_tensor)
    return kernel(x, *KERNEL_CODES[fmt, scale_rule], per_tensor)


def _kernel(x: Tensor) -> cpu.Kernel | None:
    """The fused kernel for where `x` lies."""
    if cuda.takes(x):
        return cuda.load(x)
    if not x.is_cpu:
        return None
    if torch.compiler.is_compiling():  # which cannot look into the kernel
        operator: cpu.Kernel = torch.ops.rin.fake_quantize
        return operator
    kernels = cpu.load()
    return None if kernels is None else kernels.fake_quantize


def fake_quantize_eager(
    x: Tensor, fmt: str = "mxfp4", scale_rule: str = "floor", *, per_tensor: bool = False
) -> Tensor:
    """`fake_quantize` in plain torch, for any device and dtype: the definition that the fused kernels must equal in
    every value."""
    form = FORMATS[fmt]
    assert form.element is not None
    with torch.no_grad():
        rows = _blocks(x, form)  # [R, B, K]
        out = torch.empty_like(rows)
        whole = per_tensor and form.scale is not None
        for piece, result in zip(_chunks(rows, whole), _chunks(out, whole), strict=True):
            exact = piece.to(torch.float32)
            scratch = exact.view(torch.int32) & _MAGNITUDE
            scale, inverse = _scales(scratch.amax(-1, keepdim=True), form, scale_rule, per_tensor)  # [R, B, 1]
            y = _round_to_grid_(exact * inverse, form.element, scratch).mul_(scale)
            torch.copysign(y, exact, out=result)
        return out.view(x.shape)


def element_step(x: Tensor, fmt: str, scale_rule: str = "floor", *, per_tensor: bool = False) -> Tensor:
    """Per element the smallest distance of grid points in its block: 0.5 X (mxfp4, nvfp4), 2^-9 X (mxfp8).

    Like `x` in shape and dtype; NaN in a block with a NaN or Inf, 0 in one that nvfp4 flushes. For the weights of a
    `QuantLinear`, nvfp4 needs per_tensor=True. Raises ValueError for `none`, which has no grid.
    """
    with torch.no_grad():
        steps = _block_steps(x, fmt, scale_rule, per_tensor)  # [R, B, 1]
        return steps.expand(*steps.shape[:2], FORMATS[fmt].block).reshape(x.shape).to(x.dtype)


def _block_steps(x: Tensor, fmt: str, scale_rule: str, per_tensor: bool) -> Tensor:
    """`element_step` of each block, fp32. -> [R, B, 1]"""
    form = FORMATS[fmt]
    if form.element is None:
        raise ValueError(f"a quantisation step needs a quantised format, but got {fmt}; count in another unit")
    pieces = _chunks(_blocks(x, form), False)
    amax = torch.cat([(p.to(torch.float32).view(torch.int32) & _MAGNITUDE).amax(-1, keepdim=True) for p in pieces])
    scale, _ = _scales(amax, form, scale_rule, per_tensor)
    return scale * form.element.smallest_step


def ideal_quantize(x: Tensor, fmt: str) -> Tensor:
    """`x` on the grid of `fmt` under a scale that is not rounded, amax / largest of each block, in fp32: what a format
    would give whose scales cost nothing. Raises ValueError for `none`, which has no grid."""
    form = FORMATS[fmt]
    if form.element is None:
        raise ValueError(f"an ideal scale needs a quantised format, but got {fmt}")
    with torch.no_grad():
        rows = _blocks(x, form).to(torch.float32)
        scale = rows.abs().amax(-1, keepdim=True) / form.element.largest
        y = (rows / scale).masked_fill_(scale == 0, 0.0)
        return _round_to_grid_(y, form.element, torch.empty_like(y, dtype=torch.int32)).mul_(scale).view(x.shape)


def _blocks(x: Tensor, form: Format) -> Tensor:
    """`x` as [R, B, K]; shares memory with `x` if it can."""
    n = x.shape[-1]
    if n % form.block != 0:
        raise ValueError(f"{form.name} needs a last dim that is a multiple of {form.block}, but got {n}; exclude it")
    return x.reshape(math.prod(x.shape[:-1]), n // form.block, form.block)


def _chunks(rows: Tensor, whole: bool) -> tuple[Tensor, ...]:
    """Views of some rows each; one view if they share a scale, and on devices that want few large launches."""
    size = _CHUNK * torch.get_num_threads()
    if whole or rows.numel() <= size or rows.device.type != "cpu":
        return (rows,)
    return torch.split(rows, max(1, size // (rows.shape[1] * rows.shape[2])))


def _scales(amax: Tensor, form: Format, scale_rule: str, per_tensor: bool) -> tuple[Tensor, Tensor]:
    """Block scales and their reciprocals from the bits of amax, all [R, B, 1]. NaN where amax is not finite."""
    assert form.element is not None
    if form.scale is not None:
        return _two_level_scales(amax.view(torch.float32), form.element, form.scale, per_tensor)
    emax = form.element.largest_exponent
    # Twice the scale, which is a normal number even for X = 2^-127 and never overflows for X <= 2^126.
    double = amax.clamp_min(emax << _FRACTION_BITS)
    double += SCALE_RULES[scale_rule](form.element) - ((emax - 1) << _FRACTION_BITS)
    double &= _EXPONENT
    scale = double.view(torch.float32).add_(amax.view(torch.float32), alpha=0).mul_(0.5)  # 0 * Inf = 0 * NaN = NaN
    return scale, scale.reciprocal()


def _two_level_scales(amax: Tensor, element: Element, grid: Element, per_tensor: bool) -> tuple[Tensor, Tensor]:
    """NVFP4: an outer fp32 scale brings the block scales amax / 6 into the range of E4M3, to which they are rounded."""
    if amax.numel() == 0:
        return amax, amax  # of no block
    top = amax.amax() if per_tensor else amax.amax(-2, keepdim=True)
    outer = (top / (grid.largest * element.largest)).masked_fill_(top < _NVFP4_MIN_AMAX, 1.0)
    inner = amax.div(element.largest).div_(outer)
    scale = _round_to_grid_(inner, grid, torch.empty_like(inner, dtype=torch.int32)).mul_(outer)
    return scale, scale.reciprocal().masked_fill_(scale == 0, 0.0)


def _round_to_grid_(y: Tensor, element: Element, scratch: Tensor) -> Tensor:
    """Round `y` in place to nearest even on the grid of `element`, saturating; a zero may lose its sign.

    (y + 1.5 * 2^23 step) - 1.5 * 2^23 step rounds exactly to multiples of the step, which is 2^-mantissa_bits times
    the power of two below |y|, and at least the smallest one. `scratch` is int32 and as large as `y`.
    """
    y.clamp_(-element.largest, element.largest)
    smallest = (math.frexp(element.smallest_normal)[1] + 126) << _FRACTION_BITS  # its fp32 bits
    binade = torch.bitwise_and(y.view(torch.int32), _EXPONENT, out=scratch).clamp_min_(smallest).view(torch.float32)
    magic = 1.5 * 2.0 ** (_FRACTION_BITS - element.mantissa_bits)
    return y.add_(binade, alpha=magic).sub_(binade, alpha=magic)


# --- its gradient ----------------------------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    """Quantise forward, identity backward; keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: str, scale_rule: str, per_tensor: bool) -> Tensor:
        return fake_quantize(x, fmt, scale_rule, per_tensor=per_tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


def ste_quantize(x: Tensor, fmt: str, scale_rule: str = "floor", *, per_tensor: bool = False) -> Tensor:
    """`fake_quantize` whose gradient is the identity, also where a value saturates. `none` returns `x` itself."""
    if FORMATS[fmt].element is None or not (x.requires_grad and torch.is_grad_enabled()):
        return fake_quantize(x, fmt, scale_rule, per_tensor=per_tensor)
    if x.is_cpu and not torch.compiler.is_compiling():
        kernels = cpu.load()
        if kernels is not None:
            return kernels.ste_quantize(x, *KERNEL_CODES[fmt, scale_rule], per_tensor)
    quantized: Tensor = _StraightThrough.apply(x, fmt, scale_rule, per_tensor)  # type: ignore[no-untyped-call]
    return quantized


# --- how a layer computes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """What becomes of a tensor before it is multiplied. Two that are equal do the same.

    Example: Operand(format="mxfp4", scale_rule="floor", per_tensor=False, hadamard=False)
    """

    format: str
    scale_rule: str
    """`floor` where the format has no choice of rules."""
    per_tensor: bool
    hadamard: bool
    """Turned by the Hadamard matrix first (trainable/hadamard.py)."""

    def of(self, x: Tensor) -> Tensor:
        """`x` [..., I] as it is multiplied; its gradient passes straight through the rounding."""
        made = self._rounded(self._turned(x))
        return made if made is x else remember(made, self.of, x)

    def _turned(self, x: Tensor) -> Tensor:
        return rotate(x) if self.hadamard else x

    def _rounded(self, turned: Tensor) -> Tensor:
        return ste_quantize(turned, self.format, self.scale_rule, per_tensor=self.per_tensor)

    def seen(self, given: Tensor) -> Tensor:
        """What an adapter beside the layer reads where the layer multiplies `given`: with the error of its rounding.

        Turned back into the model's own basis: an adapter can be merged, and means the same in every arithmetic.
        """
        return self._turned(given)

    def under_noise(self, weight: Tensor, clean: Tensor, placement: str) -> tuple[Tensor, "Operand"]:
        """What noise is added to, and what becomes of the sum, with noise `before` or `after` rounding; `clean` is
        `of(weight)`.

        Added to the turned weight either way, where its steps are. A rotation changes neither the law of Gaussian noise
        of one size nor its rms, so a sigma means the same with and without one.
        """
        if placement == "before":
            return self._turned(weight), replace(self, hadamard=False)
        return clean, AS_IT_IS

    def step(self, weight: Tensor) -> Tensor:
        """What noise is counted in: per element of `weight` the distance of grid points (see `element_step`), fp32."""
        return element_step(self._turned(weight).float(), self.format, self.scale_rule, per_tensor=self.per_tensor)

    def block_steps(self, weight: Tensor) -> Tensor:
        """`step` once for each block. -> [blocks]"""
        with torch.no_grad():
            return _block_steps(self._turned(weight), self.format, self.scale_rule, self.per_tensor).flatten()

    @property
    def codes(self) -> tuple[int, int, bool]:
        """The last arguments of a fused kernel that makes this operand of its output; it has no `per_tensor`."""
        return (*KERNEL_CODES[self.format, self.scale_rule], self.hadamard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How a linear layer computes; every field is one of `QuantConfig`. JSON: `asdict`, back by `Arithmetic(**tree)`.

    Example: Arithmetic(weights="mxfp4", activations="none")
    """

    weights: str = "mxfp4"
    """Format of the weight, as in FORMATS."""
    activations: str = "mxfp4"
    """Format of the input."""
    scale_rule: str = "floor"
    """As in SCALE_RULES."""
    hadamard: bool = False
    """Both operands are turned by the Hadamard matrix, also one that is not quantised, or the product would change."""

    backward: str = "dequantized"
    """Which operands gradients are products with: those that were multiplied, or the tensors they were made from."""

    @classmethod
    def of(cls, quant: "QuantConfig") -> "Arithmetic":
        """Of the layers that a configuration does not exclude."""
        return cls(**{field.name: getattr(quant, field.name) for field in fields(cls)})

    @property
    def quantizes(self) -> bool:
        return (self.weights, self.activations) != ("none", "none")

    @property
    def input(self) -> Operand:
        return self._operand(self.activations, per_tensor=False)

    @property
    def needs_input(self) -> bool:
        """The input itself is wanted, and not its operand alone: nobody may make that in front of the layer."""
        return self.backward == "high_precision" and self.input != AS_IT_IS

    @property
    def weight(self) -> Operand:
        return self._operand(self.weights, per_tensor=True)

    def _operand(self, fmt: str, *, per_tensor: bool) -> Operand:
        form = FORMATS[fmt]
        free = form.element is not None and form.scale is None
        rule = self.scale_rule if free else "floor"
        return Operand(format=fmt, scale_rule=rule, per_tensor=per_tensor, hadamard=self.hadamard)

    def check_fits(self, name: str, in_features: int) -> None:
        """Raises ValueError, which names the layer, if a block does not divide in_features."""
        blocks = {FORMATS[fmt].name: FORMATS[fmt].block for fmt in (self.weights, self.activations)}
        for what, block in (blocks | {"a Hadamard rotation": POINTS if self.hadamard else 1}).items():
            if in_features % block != 0:
                raise ValueError(
                    f"{name}: {what} needs in_features that are a multiple of {block}, "
                    f"but got {in_features}; name this layer in quant.exclude"
                )

    def __str__(self) -> str:
        turned = f", {POINTS}-point Hadamard rotation of both" if self.hadamard else ""
        back = "" if self.backward == "dequantized" else ", gradients by the operands before that"
        return f"weights {self.weights}, activations {self.activations}, scale rule {self.scale_rule}{turned}{back}"


UNQUANTIZED = Arithmetic(weights="none", activations="none")
AS_IT_IS = UNQUANTIZED.input


class _HighPrecision(torch.autograd.Function):
    """y = Q(x) Q(W)^T + b; backward the gradients of x W^T + b, of whose operands each is kept only if needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operand: Tensor, quantized: Tensor) -> Tensor:
        of_input, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_input else None)
        return F.linear(operand, quantized, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, (x, weight) = grads[0], ctx.saved_tensors  # [..., O], [..., I], [O, I]
        rows = dy.reshape(-1, dy.shape[-1])  # [R, O]
        dx = dy @ weight if weight is not None else None
        dw = rows.T @ x.reshape(-1, x.shape[-1]) if x is not None else None
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None


class QuantLinear(nn.Linear):
    """`nn.Linear` on quantised operands, y = Q(x) Q(W)^T + b. Build it with `from_linear`.

    Training: dx = dy Q(W), dW = dy^T Q(x), db = sum dy. Only Q(x) and Q(W) are kept for it, each only if needed. With
    backward=high_precision: dx = dy W, dW = dy^T x, and x and W are kept.
    Rollout and evaluation: `deployed_weight` stands in for Q(W), which is then computed once and not once per token.
    """

    name: str
    arithmetic: Arithmetic
    """Set by `compute_as`."""
    quantize_input: bool
    """False: the input comes as the operand that it is to be, made by the `InputSource` in front of this layer."""
    deployed_weight: Tensor | None = None
    """What the forward pass computes with, as it is: quantised, perhaps noised. A plain tensor, no parameter."""
    lies_transposed: bool = False
    """Files have its weight as [inputs, outputs]; here it is [outputs, inputs]."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str, arithmetic: Arithmetic = Arithmetic()) -> "QuantLinear":
        """A layer on the very parameters of `linear`: tied weights stay tied. By default W4A4 in MXFP4.

        Raises ValueError, which names the layer, if a format's block does not divide in_features.
        """
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.name, layer.quantize_input = name, True
        layer.compute_as(arithmetic)
        return layer.train(linear.training)

    def compute_as(self, arithmetic: Arithmetic) -> None:
        """From now on; who shares an input is to be decided anew (`model.computing` does both).

        Raises ValueError, which names the layer, if a format's block does not divide in_features.
        """
        arithmetic.check_fits(self.name, self.in_features)
        self.arithmetic, self._input, self._weight = arithmetic, arithmetic.input, arithmetic.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.arithmetic.backward == "high_precision" and self.deployed_weight is None:
            return self._high_precision(x)
        if self.quantize_input:
            x = self._input.of(x)
        if self.deployed_weight is not None:
            assert not torch.is_grad_enabled(), f"{self.name}: training must not see the weights of the rollout"
            return F.linear(x, self.deployed_weight, self.bias)
        return F.linear(x, self._weight.of(self.weight), self.bias)

    def _high_precision(self, x: Tensor) -> Tensor:
        operand = self._input.of(x.detach()) if self.quantize_input else x.detach()
        arguments = (x, self.weight, self.bias, operand, self.quantized_weight())
        y: Tensor = _HighPrecision.apply(*arguments)  # type: ignore[no-untyped-call]
        return y

    def seen(self, x: Tensor) -> Tensor:
        """What an adapter beside this layer reads, in the dtype of x: of the input x the part that the layer sees.

        Computed in the layer's dtype, as the layer's own operand is: peft casts to its adapters', which is wider.
        """
        if x.dtype == self.weight.dtype:
            return _seen(x, self._input, self.quantize_input, x.dtype)
        arguments = (x.to(self.weight.dtype), self._input, self.quantize_input, x.dtype)
        return remember(_seen(*arguments), _seen, *arguments)

    def quantized_weight(self) -> Tensor:
        """Q of the layer's weight as a plain tensor; with `none` it shares memory with it."""
        return self._weight.of(whole(self.weight.detach()))

    def under_noise(self, placement: str) -> tuple[Tensor, Operand, Tensor]:
        """What noise is added to, what becomes of the sum (see `Operand.under_noise`), and what the rollout computes
        with where there is none."""
        clean = self.quantized_weight() if self.deployed_weight is None else self.deployed_weight
        return *self._weight.under_noise(whole(self.weight.detach()), clean, placement), clean

    def weight_steps(self) -> Tensor:
        """See `Operand.block_steps`."""
        return self._weight.block_steps(whole(self.weight.detach()))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lies_transposed:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T.contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """From what `_save_to_state_dict` made: a square one would fit the wrong way round, too."""
        stored = state_dict.get(f"{prefix}weight")
        if self.lies_transposed and stored is not None:
            state_dict[f"{prefix}weight"] = stored.T
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.arithmetic}"


def _seen(x: Tensor, operand: Operand, quantizes: bool, dtype: torch.dtype) -> Tensor:
    return operand.seen(operand.of(x) if quantizes else x).to(dtype)


class InputSource(nn.Module):
    """A module whose output some `QuantLinear`s read and nothing else does: a norm, or the product within a gated MLP.

    Where all of them make the same operand of it, it is made here, once, within a fused kernel: equal bits, less work.
    """

    readers: tuple[QuantLinear, ...]
    apart: bool
    """Each reader is to quantise for itself, whatever they are."""
    output: Operand
    """What it makes of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.readers, self.apart, self.output = (), False, AS_IT_IS

    def share(self) -> None:
        """Decide who quantises, from what the readers are now."""
        operands = {reader.arithmetic.input for reader in self.readers}
        wanted_itself = any(reader.arithmetic.needs_input for reader in self.readers)
        shared = len(operands) == 1 and not self.apart and not wanted_itself
        self.output = operands.pop() if shared else AS_IT_IS
        for reader in self.readers:
            reader.quantize_input = not shared


# --- choices by name -------------------------------------------------------------------------------------------------


SCALE_RULES: dict[str, Callable[[Element], int]] = {
    # What is added to the bits of amax: where it carries into the exponent, the scale doubles.
    "floor": lambda element: 0,
    "even": lambda element: 1 << (_FRACTION_BITS - 1 - element.mantissa_bits),
    "rceil": lambda element: _FRACTION - element.largest_fraction,
    "ceil": lambda element: _FRACTION,
}

KERNEL_CODES = {
    (name, rule): (form.code, SCALE_RULES[rule](form.element) if form.element is not None else 0)
    for name, form in FORMATS.items()
    for rule in SCALE_RULES
}
"""What fused kernels take for a format and a scale rule."""

"""A weight with noise: drawn, added in fp32, cast to the weight's dtype and rounded to its format, in one pass.

    noisy = Q(cast(base + normal * sigma * unit))

Element e of a weight takes normal number start + e of its stream (philox.py), whatever the device, the number of
threads, or the process that holds this part of it. Each product and each sum is rounded to fp32 on its own, so kernels
can have the same bits: on the CPU `kernels/noised.h`, on CUDA `kernels/cuda.py`; elsewhere, and where there is no
compiler, the eager torch of this module, which is also the definition.

How far the noise took the weight from the clean one is counted in the same pass, where it is asked for: the sum of
squared changes and the number of changed elements. It stays on the device until somebody reads it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainable.kernels import cpu, cuda
from trainable.philox import normals
from trainable.quantization import KERNEL_CODES, Operand, fake_quantize

_FUSED_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The noise of one weight."""

    key: int
    sigma: float
    unit: Tensor | None = None
    """What sigma counts, fp32 [U]: each for an equal stretch of neighbouring elements; None: 1."""
    start: int = 0
    """Where in its stream the weight begins: above 0 for the rows that a rank has of a larger one."""


def noised(base: Tensor, drawn: Drawn, operand: Operand, clean: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What `operand` makes of `base` with noise on it, without gradient; and of its change against `clean`, if given,
    [sum of squares, number of changed elements] in fp64."""
    assert not operand.hadamard, "noise is added to the turned weight"
    code, addend = KERNEL_CODES[operand.format, operand.scale_rule]
    arguments = (base, clean, drawn.unit, drawn.key, drawn.start, drawn.sigma, code, addend, operand.per_tensor)
    if base.dtype in _FUSED_DTYPES and drawn.start % 4 == 0 and _is_even(base, drawn.unit):
        if base.is_cuda and cuda.load(base) is not None:
            return cuda.noised(*arguments)
        if base.is_cpu and (kernels := cpu.load()) is not None:
            out, sums = kernels.noised(*arguments)
            return out, sums if clean is not None else None
    return noised_eager(base, drawn, operand, clean)


def _is_even(base: Tensor, unit: Tensor | None) -> bool:
    """Whether each vector of 16 elements has one unit."""
    return unit is None or unit.numel() == 1 or (unit.numel() > 0 and base.numel() // unit.numel() % 16 == 0)


def noised_eager(
    base: Tensor, drawn: Drawn, operand: Operand, clean: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`noised` in plain torch, for any device and dtype: the definition."""
    with torch.no_grad():
        shift = normals(drawn.key, drawn.start, base.numel(), device=base.device) * drawn.sigma
        if drawn.unit is not None and base.numel():
            shift = (shift.view(len(drawn.unit), -1) * drawn.unit[:, None]).flatten()
        noisy = (base.float() + shift.view(base.shape)).to(base.dtype)
        out = fake_quantize(noisy, operand.format, operand.scale_rule, per_tensor=operand.per_tensor)
        return out, None if clean is None else change_of(out, clean)


def change_of(out: Tensor, clean: Tensor) -> Tensor:
    """[sum of squared differences, number of elements that differ], fp64."""
    change = out.float() - clean.float()
    return torch.stack((change.double().square().sum(), (change != 0).sum().double()))

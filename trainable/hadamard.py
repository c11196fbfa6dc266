"""The Hadamard rotation of operands: in blocks of 32 along the input axis, each element becomes a signed sum of all.

H is Sylvester's matrix of 32 points, +-1, over sqrt(32): symmetric and orthonormal, so its own transpose and inverse.
Turned by it, an outlier is spread over its block, whose values become nearly Gaussian, and 4 bits round next to none of
them to zero. That is the counter-hypothesis to noise, which is meant to act on this dead zone.

Since (x H)(W H)^T = x W^T, a layer that turns both its operands needs no way back: y = Q(x H) Q(W H)^T. The weight is
turned when it is quantised, the input whenever it comes; both operands, also where one of them stays at 16 bits.
Gradients follow by the chain rule, with the rounding as the identity: dx = (dy Q(W H)) H^T, dW = (dy^T Q(x H)) H^T.

A fast transform: sums and differences of pairs in a fixed order, in fp32, then one rounding to the dtype. A product
with the matrix would add up in an order that depends on how many rows come along; so generation, training and engines
have equal bits. On a CPU a kernel does it.

Shapes: K = 32.
"""

from typing import Any

import torch
from torch import Tensor

from trainable.kernels import cpu

POINTS = 32
_SHRINK = POINTS**-0.5


def rotate(x: Tensor) -> Tensor:
    """`x` [.., n] H, in its own dtype, with its gradient; applied twice it gives x back, but for rounding.

    Example: 1, 0, 0, .. becomes 32 times 0.1768. Raises ValueError if n is no multiple of 32.
    """
    if x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        kernels = cpu.load()
        if kernels is not None:
            return kernels.rotate(x)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return rotate_eager(x)
    turned: Tensor = _Rotation.apply(x)  # type: ignore[no-untyped-call]
    return turned


def rotate_eager(x: Tensor) -> Tensor:
    """`rotate` in plain torch, without gradient: the definition."""
    if x.shape[-1] % POINTS != 0:
        raise ValueError(
            f"a Hadamard rotation needs a last dim that is a multiple of {POINTS}, but got {x.shape[-1]}; exclude it"
        )
    with torch.no_grad():
        y = x.to(torch.float32).reshape(x.numel() // POINTS, POINTS)  # [.., K]
        for distance in (16, 8, 4, 2, 1):
            lower, upper = y.view(len(y), POINTS // 2 // distance, 2, distance).unbind(2)
            y = torch.stack((lower + upper, lower - upper), 2)
        turned: Tensor = y.view(x.shape) * _SHRINK
        return turned.to(x.dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rotate_eager(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return rotate(grads[0])

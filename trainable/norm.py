"""RMSNorm whose output is quantised at once for every projection that reads it.

q, k and v read one norm's output, gate and up the other's: quantised here it is quantised once instead of three times and twice, with
equal bits. The sum of the residual stream that a norm reads is taken here too. On a CPU one fused kernel does sum, norm and quantisation
while a row is in the cache, and another the whole backward pass; torch would take ten passes forward and twice as many backward. On a CUDA
device the forward pass is fused, the backward pass is plain torch. The backward pass of the quantisation is the identity
(straight-through).

Shapes: n = hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainable.kernels import cpu, cuda
from trainable.quantization import QuantLinear, kernel_codes, ste_quantize

LANES = 16
"""The fused kernels take rows of whole vectors."""


class RMSNorm(nn.Module):
    """y = Q(weight * x / sqrt(mean(x^2) + epsilon)) over the last axis (arXiv 1910.07467), for the norms of Qwen2, Llama and Mistral."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon
        self.readers: tuple[QuantLinear, ...] = ()
        """Projections whose input format is this output's; none: each of them quantises for itself."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., n] -> [.., n]."""
        kernels = self._kernels(x)
        if kernels is not None:
            y: Tensor = kernels.rms_norm(x, None, self.weight, self.epsilon, *self._codes())
            return y
        if x.is_cuda and cuda.can_norm(x, self.weight):
            on_device: Tensor = _FusedOnCuda.apply(x, self.weight, self.epsilon, *self._codes())  # type: ignore[no-untyped-call]
            return on_device
        exact = x.to(torch.float32)
        normal = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return ste_quantize(self.weight * normal.to(x.dtype), *self._format())

    def of_sum(self, stream: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
        """The stream with its latest term, and y of it: [.., n] both -> [.., n] both."""
        kernels = self._kernels(term)
        if kernels is not None:
            y, stream = kernels.rms_norm(term, stream, self.weight, self.epsilon, *self._codes())
            return stream, y
        stream = stream + term
        return stream, self(stream)

    def _kernels(self, x: Tensor) -> cpu.Kernels | None:
        """Those that fuse it, where they can."""
        fitting = x.is_cpu and x.dtype == self.weight.dtype == torch.float32 and x.shape[-1] % LANES == 0
        return cpu.load() if fitting and not torch.compiler.is_compiling() else None

    def _format(self) -> tuple[str, str]:
        return (self.readers[0].activation_format, self.readers[0].scale_rule) if self.readers else ("none", "floor")

    def _codes(self) -> tuple[int, int]:
        return kernel_codes(*self._format())

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, epsilon={self.epsilon}"


class _FusedOnCuda(torch.autograd.Function):
    """Keeps x and one number a row. Computed in fp32, and rounded to the dtypes of x and of the weight at the end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, code: int, addend: int) -> Tensor:
        y, inverse = cuda.rms_norm(x, weight, epsilon, code, addend)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        dy, inverse = grads[0].to(torch.float32), inverse.view(*x.shape[:-1], 1)
        h = x * inverse  # fp32, as `inverse` is
        g = dy * weight
        dx = (g - h * (g * h).mean(-1, keepdim=True)) * inverse
        dw = (dy * h).reshape(-1, x.shape[-1]).sum(0)
        return dx.to(x.dtype), dw.to(weight.dtype), None, None, None

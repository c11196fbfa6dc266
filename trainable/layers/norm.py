"""RMSNorm whose output is quantised at once for every projection that reads it.

q, k and v read one norm's output, gate and up the other's: quantised here it is quantised once instead of three times
and twice, with equal bits. The sum of the residual stream that a norm reads is taken here too. On a CPU one fused
kernel does sum, norm and quantisation while a row is in the cache, and another the whole backward pass; torch would
take ten passes forward and twice as many backward. On a CUDA device the forward pass is fused, the backward pass is
plain torch. The backward pass of the quantisation is the identity (straight-through).

Shapes: n = hidden size.
"""

import torch
from torch import Tensor, nn

from trainable.again import remember
from trainable.kernels import cpu, cuda
from trainable.quantization import InputSource, Operand

LANES = 16
"""The fused kernels take rows of whole vectors."""


class RMSNorm(InputSource):
    """y = Q(weight * x / sqrt(mean(x^2) + epsilon)) over the last axis (arXiv 1910.07467), for the norms of Qwen2,
    Llama and Mistral."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[.., n] -> [.., n]."""
        return _normed(x, self.weight, self.epsilon, self.output)

    def of_sum(self, stream: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
        """The stream with its latest term, and y of it: [.., n] both -> [.., n] both."""
        kernels = _kernels(term, self.weight)
        if kernels is not None:
            y, stream = kernels.rms_norm(term, stream, self.weight, self.epsilon, *self.output.codes)
            return stream, remember(y, _normed, stream, self.weight, self.epsilon, self.output)
        stream = stream + term
        return stream, self(stream)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, epsilon={self.epsilon}"


def _normed(x: Tensor, weight: Tensor, epsilon: float, output: Operand) -> Tensor:
    """[.., n] -> [.., n]."""
    kernels = _kernels(x, weight)
    if kernels is not None:
        y: Tensor = kernels.rms_norm(x, None, weight, epsilon, *output.codes)
        return remember(y, _normed, x, weight, epsilon, output)
    if cuda.takes(x) and cuda.can_norm(x, weight):
        on_device: Tensor = cuda.RMSNorm.apply(x, weight, epsilon, *output.codes)  # type: ignore[no-untyped-call]
        return remember(on_device, _normed, x, weight, epsilon, output)
    exact = x.to(torch.float32)
    normal = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
    return output.of(weight * normal.to(x.dtype))


def _kernels(x: Tensor, weight: Tensor) -> cpu.Kernels | None:
    """Those that fuse it, where they can."""
    fitting = x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.shape[-1] % LANES == 0
    return cpu.load() if fitting and not torch.compiler.is_compiling() else None

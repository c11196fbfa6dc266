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
from trainable.quantization import InputSource

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
        kernels = self._kernels(x)
        if kernels is not None:
            y: Tensor = kernels.rms_norm(x, None, self.weight, self.epsilon, *self.output.codes)
            return remember(y, self._again, x, self.weight)
        if cuda.takes(x) and cuda.can_norm(x, self.weight):
            arguments = (x, self.weight, self.epsilon, *self.output.codes)
            on_device: Tensor = cuda.RMSNorm.apply(*arguments)  # type: ignore[no-untyped-call]
            return remember(on_device, self._again, x, self.weight)
        exact = x.to(torch.float32)
        normal = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.output.of(self.weight * normal.to(x.dtype))

    def of_sum(self, stream: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
        """The stream with its latest term, and y of it: [.., n] both -> [.., n] both."""
        kernels = self._kernels(term)
        if kernels is not None:
            y, stream = kernels.rms_norm(term, stream, self.weight, self.epsilon, *self.output.codes)
            return stream, remember(y, self._again, stream, self.weight)
        stream = stream + term
        return stream, self(stream)

    def _again(self, x: Tensor, _: Tensor) -> Tensor:
        y: Tensor = self(x)
        return y

    def _kernels(self, x: Tensor) -> cpu.Kernels | None:
        """Those that fuse it, where they can."""
        fitting = x.is_cpu and x.dtype == self.weight.dtype == torch.float32 and x.shape[-1] % LANES == 0
        return cpu.load() if fitting and not torch.compiler.is_compiling() else None

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, epsilon={self.epsilon}"

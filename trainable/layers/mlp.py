"""The gated MLP of a block, whose activation is quantised at once for the projection that reads it.

transformers computes silu, product and (in a `QuantLinear`) quantisation one after the other, each over the widest
tensor of the model. On a CPU one fused kernel does all three while a row is in the cache, and another the whole
backward pass; bits are those of torch's own vectors (see `kernels/swiglu.h`). On a CUDA device the forward pass is
fused, the backward pass is plain torch. Either keeps gate and up for the backward pass, where torch keeps silu(gate)
too. The backward pass of the quantisation is the identity (straight-through).

Shapes: n = hidden size, m = intermediate size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainable.again import remember
from trainable.kernels import cpu, cuda
from trainable.layers.norm import LANES
from trainable.quantization import InputSource, Operand, QuantLinear


class GatedMLP(InputSource):
    """y = down(Q(silu(gate(x)) * up(x))) (SwiGLU, arXiv 2002.05202), for Qwen2, Llama and Mistral; on their own
    projections."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.readers = (down_proj,) if isinstance(down_proj, QuantLinear) else ()

    def forward(self, x: Tensor) -> Tensor:
        """[.., n] -> [.., n]."""
        y: Tensor = self.down_proj(self._between(self.gate_proj(x), self.up_proj(x)))
        return y

    def _between(self, gate: Tensor, up: Tensor) -> Tensor:
        """Of which the frame that calls `down_proj` holds neither: without gradient they go before it."""
        return remember(_activation(gate, up, self.output), _activation, gate, up, self.output)


def _activation(gate: Tensor, up: Tensor, output: Operand) -> Tensor:
    """[.., m] both -> [.., m]."""
    if (
        gate.is_cpu
        and gate.dtype == torch.float32
        and gate.shape[-1] % LANES == 0
        and not torch.compiler.is_compiling()
    ):
        kernels = cpu.load()
        if kernels is not None:
            return kernels.swiglu(gate, up, *output.codes)
    if cuda.takes(gate) and cuda.can_activate(gate, up):
        on_device: Tensor = cuda.SwiGLU.apply(gate, up, *output.codes)  # type: ignore[no-untyped-call]
        return on_device
    return output.of(F.silu(gate) * up)

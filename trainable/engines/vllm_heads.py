"""Attention heads that vLLM's CPU kernel has no code for.

It takes heads of 32, 64, 80 .. 512 numbers; small research models, the embedded one among them (24), have others. Zeros at the end of
queries and keys add nothing to a dot product, and zeros at the end of values become zeros at the end of the result: so heads are padded in
front of the kernel, in the cache too, and the result is cut. The scale of the scores stays the model's own.

Registered through vLLM's hook for attention backends in the place of its CPU backend, of which it is a subclass; heads of a size that
the kernel knows pass untouched, and nothing of this is used on a GPU. Read on vLLM 0.32.0, whose `customize_spec` is named temporary there.

Shapes: T = tokens, H = heads, D = their size, P = the next size that the kernel knows.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

KERNEL_SIZES = tuple(CPUAttentionBackend.get_supported_head_sizes())


class PaddedHeads(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's CPU attention for heads of any size up to the kernel's largest."""

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(1, max(KERNEL_SIZES) + 1))

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The cache holds padded heads."""
        size = _padded_size(spec.head_size)
        return replace(spec, head_size=size, head_size_v=size)

    @staticmethod
    def get_impl_cls() -> type["PaddedHeadsImpl"]:
        return PaddedHeadsImpl


class PaddedHeadsImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """The two calls that see heads: the one that stores keys and values, and the one that mixes."""

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, *more: Any) -> None:
        super().do_kv_cache_update(layer, _padded(key), _padded(value), *more)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *more: Any,
        **named: Any,
    ) -> Tensor:
        """query and output [T, H, D]; keys and values are in the cache already."""
        wide = _padded(query)  # [T, H, P]
        mixed = output if wide is query else wide.new_empty(wide.shape)
        super().forward(layer, wide, key, value, kv_cache, attn_metadata, mixed, *more, **named)
        if mixed is not output:
            output.copy_(mixed[..., : output.shape[-1]])
        return output


def register() -> None:
    """From now on vLLM's CPU engines in this process use it."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{PaddedHeads.__name__}")


def _padded(x: Tensor) -> Tensor:
    size = _padded_size(x.shape[-1])
    return x if size == x.shape[-1] else F.pad(x, (0, size - x.shape[-1]))


def _padded_size(size: int) -> int:
    padded: int = min(known for known in KERNEL_SIZES if known >= size)
    return padded

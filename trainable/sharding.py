"""Weights that no process holds whole: each keeps some rows of every matrix, with their gradients, masters and moments.

Training a weight takes 16 to 18 bytes of it (two in bf16, a master in fp32, its gradient, two moments); with N
processes each holds an N-th of them. FSDP2 (`torch.distributed.fsdp.fully_shard`, after ZeRO, arXiv 1910.02054) brings
a block's matrices together before it computes, forward and backward, drops them afterwards, and hands each process the
sum of the gradients of its own rows. Embedding and head are together from a pass's begin to its end.

What is computed does not change. A layer computes with its whole matrix, so a block of a 4-bit format, the outer scale
of nvfp4 and a draw of noise are what they are without shards: log-probs have the same bits. Gradients are sums
in another order, in fp32 also of a model in bf16 (1e-7 apart).

Choices. A block is computed again in the backward pass: what autograd keeps for it are its quantised matrices, or the
matrices to make them of, and would be a whole model. Rollout and evaluation write down each deployed matrix
whole, once, for as long as they take: processes sample different prompts, of different lengths, and could not meet at
every token. That is one copy of the model in its own dtype, as an engine would hold it, and it goes before the first
gradient is made. Vectors (gains, biases) and adapters are whole everywhere: a thousandth of the weights.

Left out: a model of which one device cannot hold one copy in its own dtype; architectures that go through transformers'
forward.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

_IN_FP32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)


class _Sums:
    """How FSDP2 adds gradients up, and the last ones as they were added up: it hands them on in the weights' dtype."""

    last: Tensor | None = None
    """Of all matrices of a unit, one behind the other."""

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self.last = output_tensor
        return dist.reduce_scatter_single(output_tensor, input_tensor, op, group, async_op)


_SUMS = _Sums()


def summed(parameter: Tensor) -> Tensor:
    """Its gradient over all processes in fp32, of this process's rows: just when FSDP2 has handed it on."""
    assert parameter.grad is not None
    rows, sums = local(parameter.grad), _SUMS.last
    assert sums is not None
    return sums.as_strided(rows.size(), rows.stride(), rows.storage_offset())


def shard(network: nn.Module, blocks: Iterable[nn.Module], device: str) -> None:
    """Leave this process its rows of every matrix of a model whose weights are equal in all processes."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    left_whole = {p for name, p in network.named_parameters() if p.dim() < 2 or ".lora_" in name}
    for unit, work in [*((block, _recomputed) for block in blocks), (network, _computed)]:
        sharded = fully_shard(unit, mesh=mesh, ignored_params=left_whole, mp_policy=_IN_FP32)
        sharded.set_custom_reduce_scatter(_SUMS)  # type: ignore[arg-type]  # whose base has no public name
        sharded.set_gradient_divide_factor(1.0)  # losses are parts of one sum, and no means
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        type(unit).__name__ = type(unit).__mro__[2].__name__  # an engine is told what the model is called
        unit.forward = work


def through(unit: nn.Module, work: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """work(*tensors) with the matrices of a block, or of the whole model's ends, together: in training, by all
    processes at once. Where nothing is in shards, or deployed weights compute, it is that call alone."""
    if isinstance(unit, FSDPModule) and torch.is_grad_enabled():
        return unit(work, *tensors)
    return work(*tensors)


@contextmanager
def ends_together(network: nn.Module) -> Iterator[None]:
    """Embedding and head are whole inside, by all processes at once, in memory of their own: FSDP2 could not free what
    numpy, or an engine, has looked at."""
    if not is_sharded(network):
        yield
        return
    blocks = [unit for unit in network.modules() if isinstance(unit, FSDPModule) and unit is not network]
    inside = {module for block in blocks for module in block.modules()}
    shards = [
        (module, name, parameter)
        for module in network.modules()
        if module not in inside
        for name, parameter in module.named_parameters(recurse=False)
        if is_shard(parameter)
    ]
    together = {id(p): nn.Parameter(whole(p.detach()), requires_grad=False) for _, _, p in shards}  # a tied one once
    _SUMS.last = None  # until the next backward pass
    try:
        for module, name, parameter in shards:
            module.register_parameter(name, together[id(parameter)])
        yield
    finally:
        for module, name, parameter in shards:
            module.register_parameter(name, parameter)


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def is_shard(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All rows, gathered by all processes at once; a tensor that is no shard is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The rows of this process; shares their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_like(rows: Tensor, parameter: Tensor) -> Tensor:
    """What belongs to every row of a parameter, from what belongs to those of this process (a master, a moment).
    Numbers of no shape are of the whole parameter already."""
    if not isinstance(parameter, DTensor) or rows.dim() == 0:
        return rows
    mesh, placed = parameter.device_mesh, parameter.placements
    return DTensor.from_local(rows, mesh, placed, shape=parameter.shape, stride=parameter.stride()).full_tensor()


def rows_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The other way round: of a whole tensor what belongs to this process."""
    if not isinstance(parameter, DTensor) or tensor.dim() == 0:
        return tensor
    start = first_row(parameter)
    return tensor[start : start + len(parameter.to_local())]


def first_row(parameter: Tensor) -> int:
    """Of this process, within a parameter: rows are dealt out in equal runs; the last may be short or empty."""
    if not isinstance(parameter, DTensor):
        return 0
    assert parameter.placements == (Shard(0),), f"{parameter.placements=}"
    mesh = parameter.device_mesh
    return min(len(parameter), mesh.get_local_rank() * -(-len(parameter) // mesh.size()))


def over_shards(number: Tensor, parameter: Tensor) -> Tensor:
    """Its sum over the processes that hold rows of the parameter, each with a number of its own."""
    if isinstance(parameter, DTensor):
        dist.all_reduce(number, group=parameter.device_mesh.get_group())
    return number


def _computed(work: Callable[..., Tensor]) -> Tensor:
    return work().clone()  # what has been done to a view is forgotten where a backward pass begins


def _recomputed(work: Callable[..., Any], *tensors: Tensor | None) -> Any:
    return checkpoint(work, *tensors, use_reentrant=False, preserve_rng_state=False)

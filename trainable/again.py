"""What is cheap to make is made again in the backward pass, instead of being kept for it.

Autograd keeps the operands of every product. In a 4-bit model most of them are made of something that is kept beside
them, in one pass over it: a quantised weight of the weight, a norm's quantised output of the residual stream, the
quantised activation of an MLP of gate and up, the quantised input of the output projection of what attention gives.
Kept, these are two fifths of a block's activations and a second model; made again they are the same bits for a
hundredth of the time, because their making is elementwise.

So whoever makes such a tensor says how (`remember`), and within `remaking` autograd keeps the recipe where it would
have kept the tensor (torch's saved_tensors_hooks). A recipe is taken for a tensor only while that tensor is alive and
as it was, and followed only while what it starts from is: a weight that was changed before the backward pass is an
error, as it is in autograd itself.

What a product makes is kept, but where whole blocks are wished to be computed again (`block_again`): torch's
checkpoints, which take the place of recipes within a block.

Left out: small tensors, whose memory is nothing and whose recipes would cost time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

AT_LEAST = 2**18
"""Numbers of a tensor that is worth it: 1 MiB in fp32. All of the embedded model's are smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    made: "ReferenceType[Tensor]"
    storage: "ReferenceType[torch.UntypedStorage]"
    version: int
    make: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def is_of(self, tensor: Tensor) -> bool:
        """This is its tensor, or a view of it, and was not written to."""
        made = self.made()
        same = made is not None and self.storage() is tensor.untyped_storage()
        return same and made is not None and made._version == self.version

    def follow(self) -> Tensor:
        now = tuple(one._version for one in self.inputs)
        assert now == self.versions, "what a tensor is made of was changed before the backward pass"
        with torch.no_grad():
            return self.make(*self.inputs)


_recipes: dict[int, _Recipe] | None = None
"""By the storages of their tensors; None outside of `remaking`."""


def remember(made: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`made` itself, of which `make(*inputs)` would give an equal one, with equal strides."""
    if _recipes is not None and torch.is_grad_enabled() and made.numel() >= AT_LEAST:
        storage = made.untyped_storage()
        _recipes[id(storage)] = _Recipe(
            made=ref(made),
            storage=ref(storage),
            version=made._version,
            make=make,
            inputs=tuple(one.detach() for one in inputs),
            versions=tuple(one._version for one in inputs),
        )
    return made


@contextmanager
def remaking() -> Iterator[None]:
    """What autograd keeps of a forward pass in here it keeps as recipes, where there are any."""
    global _recipes
    before, _recipes = _recipes, {}
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _recipes = before


def block_again(block: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What the block makes; of it autograd keeps what goes in. Blocks draw no random numbers."""
    return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False, **named)


@contextmanager
def blocks_again(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """`block_again` for each of these modules, called by whoever."""
    try:
        for block in blocks:
            block.forward = partial(block_again, block.forward)
        yield
    finally:
        for block in blocks:
            del block.forward  # its class has one


_Layout = tuple[torch.Size, tuple[int, ...], int]
_Kept = Tensor | tuple[_Recipe, _Layout]


def _pack(tensor: Tensor) -> _Kept:
    recipe = _recipes.get(id(tensor.untyped_storage())) if _recipes else None
    if recipe is None or not recipe.is_of(tensor):
        return tensor
    return recipe, (tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: _Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, layout = kept
    return recipe.follow().as_strided(*layout)

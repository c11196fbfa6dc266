"""What is cheap to make is made again in the backward pass, instead of being kept for it.

Autograd keeps the operands of every product. In a 4-bit model most of them are made of something that is kept beside
them, in one pass over it: a quantised weight of the weight, a norm's quantised output of the residual stream, the
quantised activation of an MLP of gate and up, the quantised input of the output projection of what attention gives.
Kept, these are two fifths of a block's activations and a second model; made again they are the same bits for a
hundredth of the time, because their making is elementwise.

So whoever makes such a tensor says how (`remember`), and within `remaking` autograd keeps the recipe where it would
have kept the tensor (torch's saved_tensors_hooks). A recipe is taken for a tensor only while that tensor is alive and
as it was. It holds all that the forward pass made the tensor of (weight, format, epsilon), and no module, which may
compute in another way by then.

What is kept, and what recipes start from, is used only as it was. Autograd no longer asks that where hooks keep a
tensor for it, so it is asked here: one that was written to before the backward pass is the error that it is in autograd
itself.

What a product makes is kept, but where whole blocks are wished to be computed again (`block_again`): torch's
checkpoints, which take the place of recipes within a block, under the same rule: with other weights or another
arithmetic than in the forward pass it is not computed again, but an error.

Left out: small tensors, whose memory is nothing and whose recipes would cost time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple, Self
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

AT_LEAST = 2**18
"""Numbers of a tensor that is worth it: 1 MiB in fp32. All of the embedded model's are smaller."""


class _AsItWas(NamedTuple):
    """A tensor's numbers, without its past: a node of autograd that held its own result would never go."""

    numbers: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(tensor.detach(), tensor._version)  # which count together

    def get(self) -> Tensor:
        """Raises RuntimeError where somebody wrote to it since."""
        if self.numbers._version != self.version:
            raise RuntimeError(
                f"a tensor {list(self.numbers.shape)} of the forward pass was changed before the backward pass, whose "
                "gradients would be wrong; change weights and activations in place after the backward pass"
            )
        return self.numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    made: "ReferenceType[Tensor]"
    storage: "ReferenceType[torch.UntypedStorage]"
    version: int
    make: Callable[..., Tensor]
    given: tuple[Any, ...]

    def is_of(self, tensor: Tensor) -> bool:
        """This is its tensor, or a view of it, and was not written to."""
        made = self.made()
        same = made is not None and self.storage() is tensor.untyped_storage()
        return same and made is not None and made._version == self.version

    def follow(self) -> Tensor:
        given = [one.get() if isinstance(one, _AsItWas) else one for one in self.given]
        with torch.no_grad():
            return self.make(*given)


_recipes: dict[int, _Recipe] | None = None
"""By the storages of their tensors; None outside of `remaking`."""


def remember(made: Tensor, make: Callable[..., Tensor], *given: Any) -> Tensor:
    """`made` itself, of which `make(*given)` would give an equal one, with equal strides, whenever it is called."""
    if _recipes is not None and torch.is_grad_enabled() and made.numel() >= AT_LEAST:
        assert _stays(make, given), f"{make} may give another tensor in the backward pass"
        storage = made.untyped_storage()
        _recipes[id(storage)] = _Recipe(
            made=ref(made),
            storage=ref(storage),
            version=made._version,
            make=make,
            given=tuple(_AsItWas.of(one) if isinstance(one, Tensor) else one for one in given),
        )
    return made


def _stays(make: Callable[..., Tensor], given: Sequence[Any]) -> bool:
    """Whether the call gives the same later: behind it is what is given alone, and that is no module."""
    alone = isinstance(make, FunctionType | MethodType) and make.__closure__ is None
    return alone and not any(isinstance(one, nn.Module) for one in (getattr(make, "__self__", None), *given))


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


def block_again(block: nn.Module, work: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """work(..), which is done with this block's modules; of it autograd keeps what goes in. Blocks draw no random
    numbers."""
    weights = [(one, _AsItWas.of(one)) for one in block.parameters()]
    tensors = [_AsItWas.of(one) for one in (*given, *named.values()) if isinstance(one, Tensor)]
    arithmetic = _arithmetic(block)

    def as_then(*given: Any, **named: Any) -> Any:
        for one in (*(then for _, then in weights), *tensors):
            one.get()
        moved = any(now.untyped_storage() is not then.numbers.untyped_storage() for now, then in weights)
        if moved or _arithmetic(block) != arithmetic:
            raise RuntimeError(
                "a block has another arithmetic or other weights in the backward pass than in the forward pass, and "
                "would be computed again in another way; go backward where you went forward"
            )
        return work(*given, **named)

    return checkpoint(as_then, *given, use_reentrant=False, preserve_rng_state=False, **named)


def _arithmetic(block: nn.Module) -> list[Any]:
    """Of its linear layers, which decide for all else."""
    return [module.arithmetic for module in block.modules() if hasattr(module, "arithmetic")]


@contextmanager
def blocks_again(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """`block_again` for each of these modules, called by whoever."""
    try:
        for block in blocks:
            block.forward = partial(block_again, block, block.forward)
        yield
    finally:
        for block in blocks:
            del block.forward  # its class has one


_Layout = tuple[torch.Size, tuple[int, ...], int]
_Kept = _AsItWas | tuple[_Recipe, _Layout]


def _pack(tensor: Tensor) -> _Kept:
    recipe = _recipes.get(id(tensor.untyped_storage())) if _recipes else None
    if recipe is None or not recipe.is_of(tensor):
        return _AsItWas.of(tensor)
    return recipe, (tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: _Kept) -> Tensor:
    if isinstance(kept, _AsItWas):
        return kept.get()
    recipe, layout = kept
    return recipe.follow().as_strided(*layout)

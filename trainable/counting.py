"""Bytes alive and operations done, counted while code runs: on real tensors, or on meta tensors that have shapes alone.

`Counted` sees every operation of torch (a TorchDispatchMode) and follows each storage from the operation that made it
until nothing holds it any more, the graph of a backward pass included. On meta tensors nothing is computed and nothing
held: a model of any size goes through its real code in seconds. Three things do not work there by themselves:
- A number that code asks for (`.item()`) is 1, a question is answered by yes, and a choice by a mask takes all.
- Attention: torch would choose the one kernel that holds a number per pair of tokens. Here it is what a CUDA device
  takes: the flash kernel for 16 bits without a mask, the memory-efficient one for as many keys as queries, else that.
- AdamW's fused step, which refuses meta tensors (`StepOnShapes`).

Labels are for reading: a total does not hang on them. Not seen: what a kernel holds only while it runs.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainable.masters import MasterAdamW

OTHER = "activations"
_ATEN = torch.ops.aten
_LOOKS_UP = ("embedding", "index", "gather", "index_select")
"""Operations that read no more of their first tensor than they write."""
_MAKES_ROOM = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Operations that are alike.

    Example: Work(flops=225_485_783_040, bytes=199_229_440, wide=False, count=56)
    """

    flops: int
    bytes: int
    """Read and written."""
    wide: bool
    """In 32 bits."""
    count: int


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, everything is counted. What lived before and is only read counts from its first use on."""

    def __init__(self, label: Callable[[str, Tensor], str | None] = lambda operation, made: None) -> None:
        """`label`: of a tensor that an operation made where no `making` says it; None: OTHER."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.label, self.making_now = label, OTHER
        self.alive: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.most = 0
        self._labels: dict[int, str] = {}
        self._work: Counter[tuple[int, int, bool]] = Counter()
        self._attention = patch.object(F, "scaled_dot_product_attention", scaled_dot_product_attention)

    def __enter__(self) -> "Counted":
        self._attention.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._attention.__exit__(*error)

    @contextmanager
    def making(self, label: str) -> Iterator[None]:
        """What is made inside is called so."""
        before, self.making_now = self.making_now, label
        try:
            yield
        finally:
            self.making_now = before

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Of a tensor that was seen."""
        storage = tensor.untyped_storage()
        self.alive[self._labels[id(storage)]] -= storage.nbytes()
        self.alive[label] += storage.nbytes()
        self._labels[id(storage)] = label

    def begin(self) -> None:
        """Forget the peak and the work so far, and what only waits for the collector of cycles."""
        gc.collect()
        self._work.clear()
        self.peak, self.most = dict(self.alive), self.alive.total()

    @property
    def work(self) -> tuple[Work, ...]:
        """Since `begin`."""
        return tuple(
            Work(flops=flops, bytes=size, wide=wide, count=count)
            for (flops, size, wide), count in sorted(self._work.items())
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        answer = _ANSWERS.get(name) if inputs and inputs[0].is_meta else None
        out = func(*args, **kwargs) if answer is None else answer(func, *args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._count(func, name, args, kwargs, inputs, out, made)
        for tensor in inputs:
            self._follow(tensor, None)
        for tensor in made:
            self._follow(tensor, self.label(name, tensor) if self.making_now == OTHER else None)
        return out

    def _follow(self, tensor: Tensor, label: str | None) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._labels:
            return
        self._labels[id(storage)] = label = label or self.making_now
        self.alive[label] += storage.nbytes()
        weakref.finalize(storage, self._gone, id(storage), storage.nbytes()).atexit = False
        total = self.alive.total()
        if total > self.most:
            self.most, self.peak = total, dict(self.alive)

    def _gone(self, storage: int, size: int) -> None:
        self.alive[self._labels.pop(storage)] -= size

    def _count(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Mapping[str, Any],
        inputs: list[Tensor],
        out: Any,
        made: list[Tensor],
    ) -> None:
        """A view is no work; what is changed in place is."""
        before = {id(tensor.untyped_storage()) for tensor in inputs}
        written = [tensor for tensor in made if id(tensor.untyped_storage()) not in before]
        if name in _MAKES_ROOM or not (written or name.endswith("_")):
            return
        output = sum(map(_size, written or inputs[:1]))
        read = inputs[1:] if name in _LOOKS_UP else inputs
        looked_up = output if name in _LOOKS_UP else 0
        formula = flop_registry.get(func.overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
        wide = any(tensor.dtype == torch.float32 for tensor in inputs)
        self._work[flops, output + looked_up + sum(map(_size, read)), wide] += 1


def _size(tensor: Tensor) -> int:
    """Bytes of its numbers; of one that was expanded, of those that there are."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


# --- what meta tensors do not have by themselves ----------------------------------------------------------------------


def _number(func: Any, x: Tensor) -> float:
    return x.dtype.is_floating_point if x.dtype == torch.bool else 1.0


def _all_places(func: Any, x: Tensor) -> Tensor:
    return x.new_empty((x.numel(), x.dim()), dtype=torch.long)


def _chosen(func: Any, x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """By one mask over the first dimensions: all of them."""
    mask = indices[0]
    if mask is None or mask.dtype != torch.bool:
        result: Tensor = func(x, indices)
        return result
    assert len(indices) == 1, f"{len(indices)=}"
    return x.new_empty((mask.numel(), *x.shape[mask.dim() :]))


_ANSWERS: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": _number,
    "nonzero": _all_places,
    "index": _chosen,
}


_torchs_own = F.scaled_dot_product_attention


def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
    """torch's, but on meta tensors; under its name, by which modes know it. (A mode of its own would be out of force in
    a backward pass, where blocks may be computed again.)"""
    if not args[0].is_meta:
        return _torchs_own(*args, **kwargs)
    if has_torch_function(args[:3]):
        watched: Tensor = handle_torch_function(scaled_dot_product_attention, args[:3], *args, **kwargs)
        return watched
    return _attend(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """[B, H, T, D]. The flash kernel knows shared heads and no mask, the memory-efficient one the reverse."""
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        flash = _ATEN._scaled_dot_product_flash_attention
        out: Tensor = flash(query, key, value, 0.0, is_causal, scale=scale)[0]
        return out
    if enable_gqa and key.shape[1] < query.shape[1]:
        exact: Tensor = _ATEN._scaled_dot_product_attention_math(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=True
        )[0]
        return exact
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        if attn_mask.shape[-1] % 8:  # the kernel wants rows of whole vectors
            attn_mask = F.pad(attn_mask, (0, 8 - attn_mask.shape[-1] % 8))[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    efficient = _ATEN._scaled_dot_product_efficient_attention
    mixed: Tensor = efficient(query, key, value, attn_mask, torch.is_grad_enabled(), 0.0, is_causal, scale=scale)[0]
    return mixed


class StepOnShapes(MasterAdamW):
    """With the fused step, which holds moments and nothing beside them; they are there from the start."""

    def make_moments(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            learned = [parameter for parameter in group["params"] if parameter.grad is not None]
            with torch.no_grad():
                states = [self.state[parameter] for parameter in learned]
                for state in states:
                    state["step"] += 1
                torch._fused_adamw_(
                    learned,
                    [parameter.grad for parameter in learned],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )
        self.write_back()

"""Which projection of a block stands where, told by what its input is computed from and not by what it is called.

On a few tokens, the output of every projection is made a new root of the graph, and so is what attention gave. A
projection whose input hangs on that is attention's output projection; those whose outputs it hangs on, through
attention alone, make queries, keys and values. Of the others, one whose input hangs on the outputs of further ones,
each token's on its own token's, is the last of an MLP, and those are its first. So fused projections, GPT-2's and the
experts of a mixture are found like any other. What mixes tokens by something else than attention (state-space layers,
linear attention), and what feeds only other projections of attention (latents), has no site: it is among the `others`.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trainable.policy.policy import Policy, after_block, any_number, block_of, unquantized, unshared

_TOKENS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSites:
    """Names of the projections of one block, by where they stand; those that read one tensor are a group of their own.

    Example: BlockSites(qkv=(("q_proj", "k_proj", "v_proj"),), o=(("o_proj",),), gate_up=.., down=..)
    """

    qkv: tuple[tuple[str, ...], ...] = ()
    o: tuple[tuple[str, ...], ...] = ()
    gate_up: tuple[tuple[str, ...], ...] = ()
    down: tuple[tuple[str, ...], ...] = ()
    others: tuple[tuple[str, ...], ...] = ()
    """Of no site."""

    def names(self) -> Iterator[str]:
        return chain(*chain(self.qkv, self.o, self.gate_up, self.down, self.others))


@dataclass(slots=True)
class _Seen:
    """One block's projections as they ran."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    attended: list[Tensor] = field(default_factory=list)


def find_sites(policy: Policy) -> tuple[BlockSites, ...]:
    """Of each block. An expert to whom no token went stands where its like does."""
    sites = [_sort(block) for block in _run(policy)]
    places = {_alike(name): site for found in sites for site, groups in found.items() for name in chain(*groups)}
    for name in policy.linears:
        block = block_of(name)
        if block is not None and not any(name in chain(*groups) for groups in sites[block].values()):
            sites[block].setdefault(places.get(_alike(name), "others"), []).append((name,))
    return tuple(BlockSites(**{site: tuple(groups) for site, groups in found.items()}) for found in sites)


def _alike(name: str) -> str:
    return any_number(after_block(name))


def _run(policy: Policy) -> list[_Seen]:
    seen = [_Seen() for _ in range(policy.depth)]
    with ExitStack() as stack:
        stack.enter_context(unquantized(policy))
        stack.enter_context(unshared(policy))
        stack.enter_context(torch.enable_grad())
        watch = stack.enter_context(_Attention())
        for name, linear in policy.linears.items():
            if (block := block_of(name)) is not None:
                stack.callback(linear.register_forward_hook(_root(seen[block], name, watch)).remove)
        ids = torch.arange(1, 1 + _TOKENS, device=policy.device)[None]
        policy.network.get_decoder()(input_ids=ids, use_cache=False)
    return seen


def _root(seen: _Seen, name: str, watch: "_Attention") -> Any:
    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.attended += watch.take()  # what attention gave since the projection before
        seen.inputs.setdefault(name, args[0])
        root = output.detach().requires_grad_()
        seen.outputs.setdefault(name, root)
        return root

    return hook


class _Attention(TorchFunctionMode):
    """Adds a root to what attention gives: a zero, so that it stays as it is. Of eager attention, to its weights, which
    are a softmax of four axes (a router's has fewer)."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name != "scaled_dot_product_attention" and not (name == "softmax" and output.dim() == 4):
            return output
        self.roots.append(torch.zeros_like(output, requires_grad=True))
        return output + self.roots[-1]

    def take(self) -> list[Tensor]:
        taken, self.roots = self.roots, []
        return taken


def _sort(seen: _Seen) -> dict[str, list[tuple[str, ...]]]:
    """Groups of the projections that ran, by site."""
    ran = list(seen.inputs)
    hangs = {name: _hangs_on(seen, name) for name in ran}
    o = {name for name in ran if _slopes(seen.inputs[name], seen.attended)}
    qkv = {before for name in o for before in hangs[name]} - o
    rest = {name: [one for one in hangs[name] if one not in o | qkv] for name in ran if name not in o | qkv}
    down = {name for name, before in rest.items() if before and not _mixes_tokens(seen, name, before)}
    gate_up = {one for name in down for one in rest[name]} - down
    sites = {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down}
    return {site: _groups(seen, [name for name in ran if name in names]) for site, names in sites.items()}


def _hangs_on(seen: _Seen, name: str) -> list[str]:
    """Projections of the block whose outputs the input of this one was computed from, with no other one between."""
    others = list(seen.outputs)
    found = _slopes(seen.inputs[name], list(seen.outputs.values()))
    return [other for i, other in enumerate(others) if i in found]


def _slopes(x: Tensor, roots: list[Tensor]) -> dict[int, Tensor]:
    """By place of the root: the gradient of the sum of x, where it hangs on it."""
    if not x.requires_grad or not roots:
        return {}
    slopes = torch.autograd.grad(x.sum(), roots, allow_unused=True, retain_graph=True)
    return {i: slope for i, slope in enumerate(slopes) if slope is not None}


def _mixes_tokens(seen: _Seen, name: str, before: list[str]) -> bool:
    """Whether the last row of its input hangs on other rows of those outputs."""
    x = seen.inputs[name]
    roots = [seen.outputs[one] for one in before]
    last = x.reshape(-1, x.shape[-1])[-1]
    slopes = torch.autograd.grad(last.sum(), roots, allow_unused=True, retain_graph=True)
    return any(s is not None and bool(s.reshape(-1, s.shape[-1])[:-1].count_nonzero()) for s in slopes)


def _groups(seen: _Seen, names: list[str]) -> list[tuple[str, ...]]:
    """Those that read one tensor, together."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        x = seen.inputs[name]
        groups.setdefault((x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape)), []).append(name)
    return [tuple(group) for group in groups.values()]

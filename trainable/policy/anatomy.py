"""What the parts of a foreign model are, told by what they compute and not by what they are called.

Names deceive: `input_layernorm` is an RMSNorm in Llama, a LayerNorm in GPT-NeoX, and an RMSNorm whose gain is 1 + w in
Gemma. So whatever might be a norm is asked: with a gain of ours, is its output for an input of ours that of RMSNorm
(arXiv 1910.07467) or of LayerNorm (arXiv 1607.06450), and is the gain w or 1 + w? Weights as they are stored do not
matter, and neither does epsilon beside an input of this size.

Where a norm stands is told by what its output becomes, on a few tokens. A block's own child is on the residual stream:
in front of attention or MLP where one of the block's other parts reads what it made, else behind one (a
`post_attention_layernorm` is the former in Llama, the latter in Gemma 2 and OLMo 2). Deeper in a block, a norm of
queries or keys is one that attention's scores hang on though no layer with a matrix lies between: norms of latents feed
such a layer, those of other mixers no scores. The norm before the head is the first that follows the blocks.

A multimodal model has towers beside its text model. Only the text model is trained on texts.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainable.policy.policy import after_block, block_of
from trainable.seeds import generator

_TOLERANCE = 1e-3
"""Of the largest output: epsilon and roundings are far below, another kind of norm is far above."""
_PROBES = 4
_LARGEST = 1 << 16
"""Numbers of a gain; what is larger is a matrix."""

Kind = Literal["rmsnorm", "layernorm", "unknown"]
Place = Literal["pre_norm", "post_norm", "qk_norm", "inside", "final", "beside"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """Example: Norm(kind="rmsnorm", offset=1.0, place="pre_norm") is the input norm of a block of Gemma."""

    kind: Kind
    """unknown: it has a gain, or whatever else it does with a vector."""
    offset: float | None
    """What is added to its weight to make the gain: 0 or 1; None: it has no weight, or is unknown."""
    place: Place
    """pre_norm: in front of a block's attention or MLP; post_norm: behind one; qk_norm: of queries or keys; inside:
    elsewhere within attention, a mixer or an MLP; final: before the head; beside: anywhere else, or never run."""

    def __str__(self) -> str:
        if self.kind == "unknown":
            return f"unknown, {self.place}"
        gain = {None: "no gain", 0.0: "gain w", 1.0: "gain 1 + w"}[self.offset]
        return f"{self.kind}, {gain}, {self.place}"


def text_model(network: Any) -> tuple[str, nn.Module]:
    """The part of a transformers model that reads text, and its name: a prefix of those of its parts, with its dot."""
    body = network.get_decoder()
    name = next((name for name, module in network.named_modules() if module is body), "")
    return (f"{name}." if name else ""), body


def find_norms(network: Any) -> dict[str, Norm]:
    """Every norm of the text model by name, in model order."""
    prefix, _ = text_model(network)
    width = network.get_input_embeddings().weight.shape[-1]
    modules = {name: module for name, module in network.named_modules() if name.startswith(prefix)}
    kinds = {name: kind for name, module in modules.items() if (kind := _kind(module, width)) is not None}
    final = next((name for name in _behind_the_blocks(network, modules) if name in kinds), None)
    of_blocks = [name for name in kinds if block_of(f"{name}.") is not None]
    places: dict[str, Place] = _places(network, {name: modules[name] for name in of_blocks})

    def place(name: str) -> Place:
        return "final" if name == final else places.get(name, "beside")

    return {name: Norm(kind=kind, offset=offset, place=place(name)) for name, (kind, offset) in kinds.items()}


def _places(network: nn.Module, norms: Mapping[str, nn.Module]) -> dict[str, Place]:
    """Of the norms of blocks that run."""
    training = network.training
    with torch.enable_grad(), ExitStack() as stack:
        stack.callback(network.train, training)
        network.eval()  # dropout would draw
        made: dict[str, list[Tensor]] = {}  # what each norm gave; new roots of the graph, so that gradients end there
        held, read = set(norms.values()), list[Tensor]()  # what layers with a matrix were fed
        for name, norm in norms.items():
            stack.enter_context(norm.register_forward_hook(_root(made.setdefault(name, []))))
        for module in network.modules():
            if module not in held and any(p.dim() >= 2 for p in module.parameters()):
                stack.enter_context(module.register_forward_pre_hook(_remember(read), with_kwargs=True))
            if module not in held and any(p.dim() >= 2 for p in module.parameters(recurse=False)):
                stack.enter_context(module.register_forward_hook(_cut))
        scores = stack.enter_context(_Scores())
        device = next(network.parameters()).device
        network(input_ids=torch.arange(1, 1 + _PROBES, device=device)[None], use_cache=False)
        compared = scores.hang_on([(name, root) for name, roots in made.items() for root in roots])
    fed = {id(tensor.untyped_storage()) for tensor in read}  # an address would be 0 in a model without weights

    def place(name: str, roots: list[Tensor]) -> Place:
        if "." in after_block(name):
            return "qk_norm" if name in compared else "inside"
        return "pre_norm" if any(id(root.untyped_storage()) in fed for root in roots) else "post_norm"

    return {name: place(name, roots) for name, roots in made.items() if roots}


def _root(made: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        made.append(output.detach().requires_grad_())
        return made[-1]

    return hook


def _remember(read: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))

    return hook


def _cut(module: nn.Module, args: Any, output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else output


class _Scores(TorchFunctionMode):
    """Watches what attention compares: queries and keys, or their products on the way into a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {"scaled_dot_product_attention": ("query", "key"), "softmax": ("input",)}
        names = known.get(getattr(func, "__name__", ""), ())
        found = [*args[: len(names)], *(kwargs[name] for name in names if name in kwargs)]
        self.operands += [x for x in found if x.requires_grad]
        return func(*args, **kwargs)

    def hang_on(self, roots: list[tuple[str, Tensor]]) -> set[str]:
        """Names of those that some operand was computed from."""
        found = set()
        for operand in self.operands:
            inputs = [root for _, root in roots]
            slopes = torch.autograd.grad(operand.sum(), inputs, allow_unused=True, retain_graph=True)
            found |= {name for (name, _), slope in zip(roots, slopes, strict=True) if slope is not None}
        return found


def _behind_the_blocks(network: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the modules that stand beside the list of blocks and follow it."""
    stack = next((n for n, m in modules.items() if isinstance(m, nn.ModuleList) and block_of(f"{n}.0.") == 0), "")
    parent, _, last = stack.rpartition(".")
    children = [name for name, _ in network.get_submodule(parent).named_children()]
    return [f"{parent}.{name}".lstrip(".") for name in children[children.index(last) + 1 :]] if stack else []


def _kind(module: nn.Module, width: int) -> tuple[Kind, float | None] | None:
    """None for what is no norm; a module without weights is asked with an input of this width."""
    own = dict(module.named_parameters())
    weight = own.get("weight")
    if set(own) not in ({"weight", "bias"}, {"weight"}, set()) or len({p.shape for p in own.values()}) > 1:
        return None
    shape = (width,) if weight is None else tuple(weight.shape)
    if any(True for _ in module.children()) or len(shape) > 2 or math.prod(shape) > _LARGEST:
        return None
    draw = generator("norm", *shape)
    x = 3 + 4 * torch.randn(_PROBES, *shape, generator=draw)  # [P, .., n], of a mean that LayerNorm takes away
    chosen = {name: torch.randn(shape, generator=draw) for name in own}
    y = _answer(module, x, chosen)
    normal: dict[Kind, Tensor] = {
        "rmsnorm": x * x.square().mean(-1, keepdim=True).rsqrt(),
        "layernorm": (x - x.mean(-1, keepdim=True)) * x.var(-1, keepdim=True, correction=0).rsqrt(),
    }
    for kind, z in normal.items():
        for offset in (0.0, 1.0) if weight is not None else (None,):
            wanted = (z if offset is None else (offset + chosen["weight"]) * z) + chosen.get("bias", torch.zeros(()))
            if y is not None and (y - wanted).abs().max() <= _TOLERANCE * wanted.abs().max():
                return kind, offset
    return ("unknown", None) if weight is not None and len(shape) == 1 else None


def _answer(module: nn.Module, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor | None:
    """What a module makes of x with other weights, in fp32; None where it does not make one tensor of another."""
    if any(parameter.is_meta for parameter in module.parameters()):  # a model without weights
        module = copy.deepcopy(module).to_empty(device=x.device)
    device = next((parameter.device for parameter in module.parameters()), x.device)
    with torch.no_grad(), _standing_in(module, {name: weight.to(device) for name, weight in weights.items()}):
        try:
            y = module(x.to(device))
        except Exception:  # whatever a foreign module raises when it wants more than x
            return None
    return y.float().cpu() if isinstance(y, Tensor) and y.is_floating_point() and y.shape == x.shape else None


@contextmanager
def _standing_in(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values, perhaps of another dtype, for a module's parameters."""
    before = {name: parameter.data for name, parameter in module.named_parameters()}
    try:
        for name, parameter in module.named_parameters():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = before[name]

"""The experts of a mixture as linear layers like any other.

transformers 5 keeps the weights of all experts of a block in two tensors [E, .., ..] and lets an interface choose how
they are multiplied. Here each expert's two matrices are layers of their own, on the same storage, so that formats,
noise and adapters reach them as they reach every projection, blocks along the input axis. How gate and up are joined
stays the architecture's own. Whether the outcome is the same is asked at load, on routed vectors of ours
(`as_linears`); files are written as transformers has them.

Shapes: E = experts, T = tokens, K = experts of a token, n = hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainable.seeds import generator

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
"""Of the largest output: sums in another order, in the dtype."""
_PROBES = 16


class Experts(nn.Module):
    """`origin`: transformers' module, whose weights move in here."""

    def __init__(self, origin: Any) -> None:
        super().__init__()
        self.origin = (origin,)  # in a tuple it is no part of this module
        self.up, self.down = ("gate_up_proj" if origin.has_gate else "up_proj"), "down_proj"
        for name in (self.up, self.down):
            bias = getattr(origin, f"{name}_bias") if origin.has_bias else None
            self.add_module(name, nn.ModuleList(_linears(getattr(origin, name), bias, origin.is_transposed)))
        self.register_state_dict_post_hook(_as_files_have_it)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """x [T, n], then experts and their weights [T, K] -> [T, n]."""
        chosen, shares = (*routing, *named.values())
        origin, up, down = self.origin[0], self.get_submodule(self.up), self.get_submodule(self.down)
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            token, place = torch.where(chosen == expert)
            inner = up[expert](x[token])  # type: ignore[index]  # a ModuleList
            inner = origin._apply_gate(inner) if origin.has_gate else origin.act_fn(inner)
            y = down[expert](inner) * shares[token, place, None]  # type: ignore[index]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def as_linears(origin: Any) -> Experts | None:
    """None for what is no experts' module of transformers' interface, or computes something else with its weights."""
    if not all(hasattr(origin, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate")):
        return None
    weights = dict([*origin.named_parameters(), *origin.named_buffers()])
    wanted = {"gate_up_proj" if origin.has_gate else "up_proj", "down_proj"}
    wanted |= {f"{name}_bias" for name in wanted} if origin.has_bias else set()
    if set(weights) != wanted or any(weights[name].dim() != 3 for name in wanted if not name.endswith("_bias")):
        return None
    ours = Experts(origin)
    if not _same(origin, ours):
        return None
    for name in weights:
        delattr(origin, name)
    return ours


def _linears(weight: Tensor, bias: Tensor | None, transposed: bool) -> list[nn.Linear]:
    layers = []
    for expert, matrix in enumerate(weight.detach()):
        lying = matrix.T.contiguous() if transposed else matrix  # [outputs, inputs]
        linear = nn.Linear(lying.shape[1], lying.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(lying)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach()[expert])
        layers.append(linear)
    return layers


def _same(origin: Any, ours: Experts) -> bool:
    layers: Any = ours.get_submodule(ours.up)
    draw = generator("experts")
    x = torch.randn(_PROBES, layers[0].in_features, generator=draw).to(layers[0].weight)  # its dtype and device
    scores = torch.rand(_PROBES, len(layers), generator=draw).to(x.device)
    shares, chosen = scores.topk(min(2, len(layers)), dim=-1)
    with torch.no_grad():
        wanted, found = (module(x, chosen, shares.to(x.dtype)) for module in (origin, ours))
    return bool((wanted - found).abs().max() <= _TOLERANCE[x.dtype] * wanted.abs().max())


def _as_files_have_it(module: Experts, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict with one tensor for all experts."""
    for name in (module.up, module.down):
        for kind, stored in (("weight", name), ("bias", f"{name}_bias")):
            layers: Any = module.get_submodule(name)
            keys = [f"{prefix}{name}.{expert}.{kind}" for expert in range(len(layers))]
            if keys[0] in state:
                stack = torch.stack([state.pop(key) for key in keys])
                turned = kind == "weight" and module.origin[0].is_transposed
                state[f"{prefix}{stored}"] = stack.transpose(-1, -2).contiguous() if turned else stack

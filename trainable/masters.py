"""AdamW whose weights live in fp32 while the model computes in bfloat16.

A weight near 1 has neighbours at distances of 0.004 and 0.008 in bfloat16; steps of a learning rate of 3e-5 are rounded
away there, and it never moves, however long the run. So weights of fewer than 32 bits have a master in fp32, kept here:
gradients of micro-batches add up in it, moments and steps are its own, and after each step the model gets it rounded to
nearest. The model's weights are what generation, noise and evaluation see. A weight in fp32 is its own master. Of a
weight in shards (`trainable/sharding.py`) there are here the rows of this process, and a state of the whole in files.

What came of it is measured: the share of the model's weights that differ from the start (`moved_shares`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainable.sharding import first_row, is_shard, local, over_shards, summed

_LOOKED_AT = 1 << 16
"""Weights of a tensor whose fate is followed: all of a small one, evenly spaced ones of a large one."""


class Rows(nn.Parameter):
    """The rows that this process has of a matrix in shards, as the optimizer knows them. Their gradient comes as a sum
    over all processes."""


class MasterAdamW(torch.optim.AdamW):
    """As `torch.optim.AdamW`, and equal to it in every bit where all parameters are fp32."""

    def __init__(self, parameters: Sequence[nn.Parameter], **options: Any) -> None:
        masters = [_master(parameter) for parameter in parameters]
        super().__init__(masters, **options)
        self.parameters = tuple(parameters)
        pairs = list(enumerate(zip(parameters, masters, strict=True)))
        self.rounded = {index: pair for index, pair in pairs if pair[0].dtype != torch.float32}
        self.gathering = [
            parameter.register_post_accumulate_grad_hook(_gather_in(master))  # type: ignore[no-untyped-call]
            for _, (parameter, master) in pairs
            if parameter is not master
        ]

    def release(self) -> None:
        """Let the parameters go: their gradients are their own again."""
        for hook in self.gathering:
            hook.remove()

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.write_back()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """With a `master` beside the moments; of this process's rows."""
        tree = super().state_dict()
        masters = {index: {"master": master.detach()} for index, (_, master) in self.rounded.items()}
        indices = sorted({*tree["state"], *masters})
        return {**tree, "state": {i: tree["state"].get(i, {}) | masters.get(i, {}) for i in indices}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises KeyError where a master is missing."""
        with torch.no_grad():
            for index, (_, master) in self.rounded.items():
                master.copy_(state_dict["state"][index]["master"])
        moments = {
            index: {name: value for name, value in values.items() if name != "master"}
            for index, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": {index: values for index, values in moments.items() if values}})
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """The parameters become their masters, rounded."""
        for parameter, master in self.rounded.values():
            local(parameter).copy_(master)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """On the parameter's own memory where that is fp32."""
    if is_shard(parameter):
        return Rows(local(parameter.detach()).float())
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())


def _gather_in(master: nn.Parameter) -> Callable[[Tensor], None]:
    def gather(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = summed(parameter) if is_shard(parameter) else parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return gather


def followed(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `moved_shares` looks at, as they are now."""
    return {name: _some_of(parameter).clone() for name, parameter in parameters.items()}


def moved_shares(start: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of the weights that are not what they were at the start, of matrices and of vectors (gains, biases)."""
    moved: dict[str, float] = {}
    weights: dict[str, int] = {}
    for name, parameter in parameters.items():
        kind = "matrices" if parameter.dim() > 1 else "vectors"
        changed = _some_of(parameter) != start[name]
        found = torch.stack([changed.float().sum(), torch.tensor(float(len(changed)), device=changed.device)])
        found = over_shards(found, parameter)
        moved[kind] = moved.get(kind, 0.0) + (found[0] / found[1]).item() * parameter.numel()
        weights[kind] = weights.get(kind, 0) + parameter.numel()
    return {kind: moved[kind] / weights[kind] for kind in moved}


def _some_of(parameter: Tensor) -> Tensor:
    """Of this process's rows those that would be looked at in the whole."""
    every = -(-parameter.numel() // _LOOKED_AT)
    rows = local(parameter.detach())
    before = first_row(parameter) * (rows.numel() // max(1, len(rows)))
    return rows.flatten()[-before % every :: every]

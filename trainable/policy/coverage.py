"""Every weight of the blocks is accounted for: quantised, excluded by name, or left out with a reason.

A model of which 6 % is quantised is no W4A4, whatever the configuration says; architectures hold weights in more than
linear layers, and a list of those that were found does not show what was not. So what is counted are all matrices of
the decoder blocks (what has two axes or more; gains and biases are no operands), and the three sums make up all of
them. What is left out because no layer of ours holds it gets neither few bits nor noise nor an adapter. Where that is
more than a twentieth and nobody named it, a trial that quantises, or puts noise on linear layers, does not start.

A weight is named by `quant.exclude` or `quant.skip_layers`. Entries of one kind in all blocks are one line, whose name
is a pattern for `quant.exclude`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from spaces.config import ConfigError
from trainable.outcome import Coverage, LeftOut
from trainable.policy.anatomy import text_model
from trainable.policy.policy import any_number, block_of
from trainable.quantization import QuantLinear

LARGEST_UNNAMED = 0.05
"""Share of the text model's blocks that may be left out without being named: routers, convolutions, decay rates of
state-space models are below, the experts of a mixture are far above."""

_OTHER_TOWER = "not of the text model"
_NOTHING = "nothing is quantised"


def block_matrices(network: Any, norms: Collection[str]) -> dict[str, int]:
    """Sizes of all matrices in blocks by the names by which they are excluded: a module's for its `weight`, else the
    parameter's own."""
    named = ((name.removesuffix(".weight"), p) for name, p in network.named_parameters() if block_of(name) is not None)
    return {name: parameter.numel() for name, parameter in named if parameter.dim() >= 2 and name not in norms}


def cover(
    network: Any, linears: Mapping[str, QuantLinear], matrices: Mapping[str, int], excluded: Callable[[str], bool]
) -> Coverage:
    """`excluded`: whether the user named it."""
    prefix, _ = text_model(network)
    modules = dict(network.named_modules())
    quantized = named = 0
    left: dict[tuple[str, str], int] = {}
    for name, size in matrices.items():
        linear = linears.get(name)
        if linear is not None and linear.arithmetic.quantizes:
            quantized += size
        elif excluded(name):
            named += size
        else:
            owner = modules.get(name) or modules[name.rpartition(".")[0]]
            key = any_number(name), _reason(owner) if name.startswith(prefix) else _OTHER_TOWER
            left[key] = left.get(key, 0) + size
    return Coverage(
        weights=sum(matrices.values()),
        quantized=quantized,
        excluded=named,
        left_out=tuple(LeftOut(name=name, weights=size, reason=reason) for (name, reason), size in left.items()),
    )


def check_reach(coverage: Coverage, setting: str) -> None:
    """Raises ConfigError where much of the blocks is out of reach, unnamed, for a `setting` that means all of it."""
    ours = [entry for entry in coverage.left_out if entry.reason != _OTHER_TOWER]
    out = [entry for entry in ours if entry.reason != _NOTHING]
    whole = coverage.weights - coverage.left + sum(entry.weights for entry in ours)
    share = sum(entry.weights for entry in out) / max(whole, 1)
    if share > LARGEST_UNNAMED:
        largest = max(out, key=lambda entry: entry.weights)
        raise ConfigError(
            f"{setting} would leave out {100 * share:.0f} % of the blocks' weights, most of it {largest.name} "
            f"({largest.reason}); name {', '.join(entry.name for entry in out[:4])} in quant.exclude to train like "
            "that, or take another model"
        )


def _reason(owner: nn.Module) -> str:
    if isinstance(owner, QuantLinear):
        return _NOTHING
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "a convolution"
    if isinstance(owner, nn.Embedding):
        return "a table to look up"
    return f"{type(owner).__name__} computes with it itself"

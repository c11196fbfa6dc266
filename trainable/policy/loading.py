"""From a model to a policy: every projection wrapped, norms and MLPs as ours, adapters beside the layers that learn."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spaces.config import ConfigError, ModelConfig, QuantConfig
from trainable.hashing import stable_hash
from trainable.kernels import cpu
from trainable.layers.mlp import GatedMLP
from trainable.layers.norm import RMSNorm
from trainable.policy.embedded import Progress
from trainable.policy.policy import KNOWN_BLOCKS, Policy, block_of, matches, share_inputs
from trainable.policy.sources import load_network
from trainable.quantization import UNQUANTIZED, Arithmetic, QuantLinear

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def load_policy(model: ModelConfig, quant: QuantConfig, seed: int, progress: Progress | None = None) -> Policy:
    """Load, wrap, and (for LoRA) add adapters initialised from `seed`.

    Raises ConfigError for a model that cannot be found and a layer that cannot be quantised.
    """
    network, tokenizer = load_network(model, progress)
    names = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    blocks = {index for name in names if (index := block_of(name)) is not None}
    depth = max(blocks, default=-1) + 1
    skipped = {index % depth for index in _existing(quant.skip_layers, depth)}
    linears: dict[str, QuantLinear] = {}
    for name, linear in names.items():
        index = block_of(name)
        excluded = index in skipped or any(matches(pattern, name) for pattern in quant.exclude)
        if index is None and excluded:
            continue
        linears[name] = _wrap(network, name, linear, UNQUANTIZED if excluded else Arithmetic.of(quant))
    _check_patterns(quant, names)
    _own_norms(network, linears)
    _own_mlps(network)
    norms = {n: m for n, m in network.named_modules() if n.endswith(("input_layernorm", "post_attention_layernorm"))}
    final = {n: m for n, m in network.named_modules() if n in ("model.norm", "norm", "model.final_layernorm")}
    share_inputs(network)
    if model.adapter == "lora":
        network = _with_adapters(network, linears, model, seed)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    cpu.load()  # compiled here, where a process may take its time, and not within its first step
    # Training mode would only switch on dropout, which none of these models uses; eval keeps sampling and training one
    # function.
    network.eval()
    return Policy(model=network, tokenizer=tokenizer, linears=linears, norms=norms, final_norm=final, depth=depth)


def _existing(indices: Sequence[int], depth: int) -> Sequence[int]:
    for index in indices:
        if not -depth <= index < depth:
            raise ConfigError(f"quant.skip_layers={index}: the model has blocks 0 to {depth - 1}")
    return indices


def _check_patterns(quant: QuantConfig, names: dict[str, nn.Linear]) -> None:
    for pattern in quant.exclude:
        if not any(matches(pattern, name) for name in names):
            raise ConfigError(
                f"quant.exclude={pattern}: matches no linear layer; one of them is {next(iter(names), 'none')}"
            )


def _wrap(network: Any, name: str, linear: nn.Linear, arithmetic: Arithmetic) -> QuantLinear:
    try:
        wrapped = QuantLinear.from_linear(linear, name=name, arithmetic=arithmetic)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    network.set_submodule(name, wrapped)
    return wrapped


def _own_norms(network: Any, linears: Mapping[str, QuantLinear]) -> None:
    """Every norm as ours, on its own weight, with the projections that read it."""
    if network.config.model_type not in KNOWN_BLOCKS:
        return
    for name, module in list(network.named_modules()):
        if name.endswith(("input_layernorm", "post_attention_layernorm", "model.norm")):
            norm = RMSNorm(module.weight, module.variance_epsilon)
            block, _, kind = name.rpartition(".")
            norm.readers = tuple(linears[f"{block}.{reader}"] for reader in _READERS.get(kind, ()))
            network.set_submodule(name, norm)


def _own_mlps(network: Any) -> None:
    """Every block's MLP as ours, on its own projections."""
    if network.config.model_type not in KNOWN_BLOCKS or network.config.hidden_act != "silu":
        return
    for name, module in list(network.named_modules()):
        if name.endswith(".mlp"):
            network.set_submodule(name, GatedMLP(module.gate_proj, module.up_proj, module.down_proj))


def _with_adapters(network: Any, linears: dict[str, QuantLinear], model: ModelConfig, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = [name for name in linears if block_of(name) is not None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_hash("adapters", seed) % 2**31)
        adapted = get_peft_model(
            network, LoraConfig(r=model.lora_rank, lora_alpha=model.lora_alpha, target_modules=targets)
        )
    for name in targets:
        dropouts = adapted.base_model.model.get_submodule(name).lora_dropout
        for key in dropouts:
            dropouts[key] = _Seen(linears[name])
    return adapted


class _Seen(nn.Module):
    """What an adapter reads of an input: as much as the layer beside it. In the place of peft's dropout, which is
    none."""

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        self.beside = (linear,)  # in a tuple it is no part of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.beside[0].seen(x)

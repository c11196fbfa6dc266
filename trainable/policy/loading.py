"""From a model to a policy: every projection wrapped, norms and MLPs as ours, adapters beside the layers that learn."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from spaces.config import ConfigError, ModelConfig, QuantConfig
from spaces.scans import settled
from trainable.hashing import stable_hash
from trainable.kernels import cpu
from trainable.layers.experts import as_linears
from trainable.layers.mlp import GatedMLP
from trainable.layers.norm import RMSNorm
from trainable.policy.anatomy import find_norms, text_model
from trainable.policy.coverage import block_matrices, check_reach, cover
from trainable.policy.embedded import Progress
from trainable.policy.policy import KNOWN_BLOCKS, Policy, any_number, bare_name, block_of, matches, share_inputs
from trainable.policy.sources import load_network
from trainable.quantization import UNQUANTIZED, Arithmetic, QuantLinear

_TARGETS = {"pre_norm": "rmsnorm", "post_norm": "post_norm", "qk_norm": "qk_norm"}
"""Where a norm stands, and how `noise.modules` calls those that stand there."""
_HEAD = "lm_head"
"""By this name `quant.exclude` means the head, whatever an architecture calls it."""
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def load_policy(model: ModelConfig, quant: QuantConfig, seed: int, progress: Progress | None = None) -> Policy:
    """Load, wrap, and (for LoRA) add adapters initialised from `seed`.

    Raises ConfigError for a model that cannot be found and a layer that cannot be quantised.
    """
    return wrapped(*load_network(model, progress), model, quant, seed)


def wrapped(
    network: Any, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, quant: QuantConfig, seed: int
) -> Policy:
    """The policy on the very parameters of a model that was just loaded. Raises ConfigError."""
    policy = in_place(network, tokenizer, quant, tuple(network.generation_config.eos_token_id))
    if model.adapter == "lora":
        policy = replace(policy, model=_with_adapters(network, policy.linears, model, seed))
    # Training mode would only switch on dropout, which none of these models uses; eval keeps sampling and training one
    # function.
    policy.model.eval()
    return policy


def in_place(network: Any, tokenizer: PreTrainedTokenizerBase, quant: QuantConfig, ends: tuple[int, ...]) -> Policy:
    """Every layer of a model as ours, on its very parameters. Raises ConfigError."""
    found = find_norms(network)
    _own_experts(network)
    modules = _projections(network)
    matrices = block_matrices(network, found)
    depth = max((index for name in modules if (index := block_of(name)) is not None), default=-1) + 1
    skipped = skipped_layers(quant, depth)
    head = _name_of(network, network.get_output_embeddings())

    def excluded(name: str) -> bool:
        names = (name, _HEAD) if name == head else (name,)
        return block_of(name) in skipped or any(matches(pattern, one) for pattern in quant.exclude for one in names)

    _check_patterns(quant, [*modules, *matrices, _HEAD])
    _check_blocks(Arithmetic.of(quant), {name: module for name, module in modules.items() if not excluded(name)})
    linears = {
        name: _wrap(network, name, module, UNQUANTIZED if excluded(name) else Arithmetic.of(quant))
        for name, module in modules.items()
        if block_of(name) is not None or not excluded(name)
    }
    coverage = cover(network, linears, matrices, excluded)
    if Arithmetic.of(quant).quantizes:
        check_reach(coverage, f"quant.exclude={list(quant.exclude)}: {quant.mode}")
    _own_norms(network, linears)
    _own_mlps(network)
    gains = {name: norm for name, norm in found.items() if norm.kind == "rmsnorm" and norm.offset is not None}
    norms = {name: network.get_submodule(name) for name, norm in gains.items() if norm.place in _TARGETS}
    final = {name: network.get_submodule(name) for name, norm in gains.items() if norm.place == "final"}
    share_inputs(network)
    _freeze_other_towers(network)
    cpu.load()  # compiled here, where a process may take its time, and not within its first step
    return Policy(
        model=network,
        tokenizer=tokenizer,
        linears=linears,
        norms=norms,
        final_norm=final,
        norm_targets={name: _TARGETS[gains[name].place] for name in norms},
        gain_offsets={name: norm.offset for name, norm in gains.items() if norm.offset is not None},
        norm_kinds=dict(Counter(str(norm) for norm in found.values())),
        depth=depth,
        coverage=coverage,
        ends=ends,
    )


def _projections(network: Any) -> dict[str, nn.Linear | Conv1D]:
    """Linear layers of the text model, and its head, by name and in model order."""
    prefix, _ = text_model(network)
    head = network.get_output_embeddings()
    return {
        name: module
        for name, module in network.named_modules()
        if (isinstance(module, Conv1D) or _is_linear(module)) and (name.startswith(prefix) or module is head)
    }


def _name_of(network: Any, wanted: nn.Module | None) -> str:
    return next((name for name, module in network.named_modules() if module is wanted), "")


def _freeze_other_towers(network: Any) -> None:
    """What reads images or sounds has no part in texts."""
    _, body = text_model(network)
    ends = [end for end in (network.get_input_embeddings(), network.get_output_embeddings()) if end is not None]
    ours = {id(parameter) for module in (body, *ends) for parameter in module.parameters()}
    for parameter in network.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(False)


def _is_linear(module: nn.Module) -> bool:
    """By what it computes: a router, or a layer of somebody else's 4 or 8 bits, is an nn.Linear too, and does more."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    x = torch.linspace(-1, 1, 2 * module.in_features, device=module.weight.device).view(2, -1).to(module.weight.dtype)
    try:
        y = module(x)
    except Exception:  # whatever its code raises when it is fed as a linear layer is
        return False
    return isinstance(y, torch.Tensor) and torch.allclose(y, nn.functional.linear(x, module.weight, module.bias))


def skipped_layers(quant: QuantConfig, depth: int) -> set[int]:
    """Blocks that stay unquantised. Raises ConfigError for one that the model does not have."""
    indices = settled("quant.skip_layers", quant.skip_layers)
    for index in indices:
        if not -depth <= index < depth:
            raise ConfigError(f"quant.skip_layers={index}: the model has blocks 0 to {depth - 1}")
    return {index % depth for index in indices}


def check_names(skeleton: Any, quant: QuantConfig) -> None:
    """Raises ConfigError for a pattern that matches no part of a model without weights. Of a mixture nothing is said:
    experts that lie in one tensor get names of their own when they are loaded."""
    parts = dict(skeleton.named_parameters())
    if all(parameter.dim() <= 2 for parameter in parts.values()):
        linears = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        _check_patterns(quant, [*linears, *(name.removesuffix(".weight") for name in parts), _HEAD])


def _check_patterns(quant: QuantConfig, names: Sequence[str]) -> None:
    for pattern in quant.exclude:
        if not any(matches(pattern, name) for name in names):
            raise ConfigError(f"quant.exclude={pattern}: matches no linear layer; one of them is {names[0]}")


def _check_blocks(arithmetic: Arithmetic, modules: Mapping[str, nn.Linear | Conv1D]) -> None:
    """Raises ConfigError that names every layer with inputs that are no whole blocks; equal layers of all blocks are
    one pattern."""
    misfits: dict[str, str] = {}
    for name, module in modules.items():
        try:
            arithmetic.check_fits(any_number(name), module.weight.shape[0 if isinstance(module, Conv1D) else 1])
        except ValueError as error:
            misfits.setdefault(any_number(name), str(error))
    if misfits:
        _, *others = misfits
        raise ConfigError(next(iter(misfits.values())) + (f", and {', '.join(others)}" if others else ""))


def _wrap(network: Any, name: str, module: nn.Linear | Conv1D, arithmetic: Arithmetic) -> QuantLinear:
    wrapped = QuantLinear.from_linear(_as_linear(module), name=name, arithmetic=arithmetic)
    wrapped.lies_transposed = isinstance(module, Conv1D)
    network.set_submodule(name, wrapped)
    return wrapped


def _as_linear(module: nn.Linear | Conv1D) -> nn.Linear:
    """GPT-2's Conv1D is a linear layer whose weight lies [inputs, outputs]."""
    if isinstance(module, nn.Linear):
        return module
    inputs, outputs = module.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight, linear.bias = nn.Parameter(module.weight.detach().T.contiguous()), module.bias
    return linear.train(module.training)


def _own_experts(network: Any) -> None:
    """Those that are held in one tensor, as layers of their own."""
    prefix, _ = text_model(network)
    for name, module in list(network.named_modules()):
        if name.startswith(prefix) and (experts := as_linears(module)) is not None:
            network.set_submodule(name, experts)


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
    with torch.random.fork_rng(devices=[]), _without_renaming(network):
        torch.manual_seed(stable_hash("adapters", seed) % 2**31)
        adapters = LoraConfig(r=model.lora_rank, lora_alpha=model.lora_alpha, target_modules=targets)
        adapted = get_peft_model(network, adapters, low_cpu_mem_usage=network.device.type == "meta")
    have = {bare_name(name) for name, module in adapted.named_modules() if getattr(module, "lora_A", None)}
    assert have == set(targets), f"adapters are beside other layers: {sorted(have.symmetric_difference(targets))[:3]}"
    see_as_their_layers(adapted)
    return adapted


def see_as_their_layers(adapted: nn.Module) -> None:
    """Every adapter reads of its input what the layer beside it sees; a dropout of its own comes after that."""
    for module in adapted.modules():
        layer = getattr(module, "base_layer", None)
        if isinstance(layer, QuantLinear):
            dropouts: Any = module.lora_dropout
            for key, dropout in dropouts.items():
                seen = _Seen(layer)
                dropouts[key] = seen if isinstance(dropout, nn.Identity) else nn.Sequential(seen, dropout)


@contextmanager
def _without_renaming(network: Any) -> Iterator[None]:
    """peft takes the layers of some mixtures for those that transformers 4 had under these names, and would adapt
    others; it goes by the architecture's name."""
    before = network.config.model_type
    network.config.model_type = ""
    try:
        yield
    finally:
        network.config.model_type = before


class _Seen(nn.Module):
    """What an adapter reads of an input: as much as the layer beside it. It stands where peft has its dropout."""

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        self.beside = (linear,)  # in a tuple it is no part of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.beside[0].seen(x)

"""The policy: a causal language model whose projections compute in 4 bits, and the names by which its parts are spoken
of.

Every linear layer of the text model becomes a `QuantLinear`, within the blocks also one that stays at 16 bits (its
formats are then `none`): one kind of layer carries quantisation, noise and the receipt, so none of them can miss a
layer that another one sees. The head, and what else is beside the blocks, is wrapped only when the configuration does
not exclude it; embeddings and norms are never quantised.

With LoRA the frozen base is quantised and adapters are not; they see the quantised input, because that is what the
layer sees (quantised adapters cost an earlier system half of its accuracy). Names are those of the bare model: peft's
prefixes are stripped, so that a seed for `layers.3.mlp.up_proj` is the same either way.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainable.layers.experts import Experts
from trainable.outcome import Coverage
from trainable.quantization import UNQUANTIZED, Arithmetic, InputSource, QuantLinear
from trainable.sharding import ends_together

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
KNOWN_BLOCKS = ("qwen2", "llama", "mistral")
"""Architectures in which known norms feed known projections and nothing else, and whose MLP is a gated one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A model, its tokenizer, and its parts by bare name."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    linears: dict[str, QuantLinear]
    """Wrapped linear layers by name, in model order."""
    norms: dict[str, nn.Module]
    """RMSNorms with a gain within blocks that may get noise, by name, in model order: in front of attention and MLP,
    behind them, of queries and keys."""
    final_norm: dict[str, nn.Module]
    """The norm before the head, as a dict of one (or none: it is no RMSNorm)."""
    depth: int
    """Decoder blocks."""
    ends: tuple[int, ...]
    """Tokens that end a completion: the tokenizer's, and those of the folder's generation_config.json."""
    coverage: Coverage = field(default_factory=Coverage)
    """What became of the blocks' weights."""
    norm_targets: dict[str, str] = field(default_factory=dict)
    """Of norms by name: by which word `noise.modules` takes them (rmsnorm, post_norm, qk_norm)."""
    gain_offsets: dict[str, float] = field(default_factory=dict)
    """Of norms by name: 1 where the gain is 1 + w, as in Gemma; else 0."""
    norm_kinds: dict[str, int] = field(default_factory=dict)
    """What the model has in norms, and how often, e.g. {"rmsnorm, gain w, pre_norm": 16}."""
    checkpoints: bool = False
    """Learning keeps of each block what goes into it, and computes the block again in the backward pass."""
    packs: bool = False
    """Completions of a prompt were shown to be equal side by side in transformers' forward (`trainable/parity.py`)."""

    @property
    def network(self) -> Any:
        """The transformers model itself, without peft's wrapper around it."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def vocabulary(self) -> int:
        """Tokens among which a blind guess would choose: those that the tokenizer names and the model can say. Loading
        gives some tokenizers a token that their model has no row for, and models are padded with rows of no token."""
        rows: int = self.network.config.get_text_config().vocab_size
        return min(len(self.tokenizer), rows)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the layers whose weights or inputs are really quantised."""
        return tuple(n for n, m in self.linears.items() if m.arithmetic.quantizes)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of the layers that have an adapter, as they stand in the model."""
        return tuple(bare_name(n) for n, m in self.model.named_modules() if getattr(m, "lora_A", None))

    @property
    def rearranged(self) -> tuple[str, ...]:
        """Names of the layers whose weight lies otherwise in files and in other programs: transposed, or in one tensor
        with that of other experts."""
        mixtures = tuple(f"{name}." for name, module in self.network.named_modules() if isinstance(module, Experts))
        return tuple(n for n, m in self.linears.items() if m.lies_transposed or n.startswith(mixtures))

    @property
    def arithmetic(self) -> tuple[Arithmetic, ...]:
        """How those compute: each record once, in model order."""
        return tuple(dict.fromkeys(self.linears[name].arithmetic for name in self.quantized))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters with gradients, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def block_of(name: str) -> int | None:
    """Index of the decoder block that a parameter or module belongs to; None outside of the blocks."""
    match = _BLOCK.search(name)
    return int(match.group(1)) if match else None


def decoder_blocks(policy: Policy) -> tuple[nn.Module, ...]:
    """The blocks themselves, first to last."""
    named = policy.network.get_decoder().named_modules()
    stacks = (module for name, module in named if isinstance(module, nn.ModuleList) and block_of(f"{name}.0.") == 0)
    return tuple(next(stacks))


def after_block(name: str) -> str:
    """What follows the block in a name: `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`."""
    match = _BLOCK.search(name)
    return name[match.end() :] if match else name


def any_number(name: str) -> str:
    """A name as a pattern for all blocks and experts: `layers.*.mlp.gate` of `layers.3.mlp.gate`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def bare_name(name: str) -> str:
    """A parameter's name without peft's and our wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def matches(pattern: str, name: str) -> bool:
    """Whether whole dotted parts of `name` match: `layers.1` hits `model.layers.1.mlp` and not
    `model.layers.10.mlp`."""
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatch.fnmatchcase(part, want) for part, want in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


@contextmanager
def deployed(policy: Policy) -> Iterator[None]:
    """Freeze the quantised weights while nothing learns (rollout, evaluation): each is computed once, not once per
    token."""
    linears = policy.linears.values()
    assert all(linear.deployed_weight is None for linear in linears), "deployed already: leaving would undo both"
    with torch.no_grad(), ends_together(policy.network):
        try:
            for linear in linears:
                linear.deployed_weight = linear.quantized_weight()
            yield
        finally:
            for linear in linears:
                linear.deployed_weight = None


@contextmanager
def computing(policy: Policy, arithmetic: Arithmetic | Mapping[str, Arithmetic]) -> Iterator[None]:
    """Other arithmetic, by name of the layer, or one for all layers that are quantised now. Before `deployed`.

    Who quantises an input is decided anew, here and on the way back. Raises ValueError, which names the layer, where a
    format does not fit.
    """
    chosen = dict.fromkeys(policy.quantized, arithmetic) if isinstance(arithmetic, Arithmetic) else arithmetic
    before = {name: policy.linears[name].arithmetic for name in chosen}
    clean = all(policy.linears[name].deployed_weight is None for name in chosen)
    assert clean, "weights are deployed in another arithmetic"
    try:
        _compute_as(policy, chosen)
        yield
    finally:
        _compute_as(policy, before)


def unquantized(policy: Policy) -> AbstractContextManager[None]:
    """The forward pass of the master weights in the model's dtype, for `accuracy_bf16`."""
    return computing(policy, UNQUANTIZED)


@contextmanager
def redeployed(policy: Policy, arithmetic: Mapping[str, Arithmetic]) -> Iterator[None]:
    """Inside `deployed`, without noise: other arithmetic by name of the layer; the weights of all others stay as they
    are."""
    before = {name: policy.linears[name].arithmetic for name in arithmetic}
    weights = {name: policy.linears[name].deployed_weight for name in arithmetic}
    assert all(weight is not None for weight in weights.values()), "nothing is deployed"
    try:
        _compute_as(policy, arithmetic)
        for name in arithmetic:
            policy.linears[name].deployed_weight = policy.linears[name].quantized_weight()
        yield
    finally:
        _compute_as(policy, before)
        for name, weight in weights.items():
            policy.linears[name].deployed_weight = weight


@contextmanager
def unshared(policy: Policy) -> Iterator[None]:
    """Every layer is fed its input as it is, and quantises it itself: equal bits, and each layer can be asked alone."""
    sources = [module for module in policy.model.modules() if isinstance(module, InputSource)]
    before = [source.apart for source in sources]
    try:
        for source in sources:
            source.apart = True
            source.share()
        yield
    finally:
        for source, apart in zip(sources, before, strict=True):
            source.apart = apart
            source.share()


def without_adapters(policy: Policy) -> AbstractContextManager[None]:
    """The base alone, which does not learn: with adapters beside it it stays the policy that a trial began with."""
    model: Any = policy.model
    bare: AbstractContextManager[None] = model.disable_adapter()
    return bare


def _compute_as(policy: Policy, arithmetic: Mapping[str, Arithmetic]) -> None:
    for name, how in arithmetic.items():
        policy.linears[name].compute_as(how)
    share_inputs(policy.model)


def share_inputs(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, InputSource):
            module.share()

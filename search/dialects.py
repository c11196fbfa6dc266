"""How other trainers say what a trial says: one row per setting, one column per trainer.

A key of the same name is not the same setting. Batches are counted in prompts (verl) or completions (TRL, NeMo RL),
training in rollouts (verl, NeMo RL) or optimizer steps (TRL, QeRL); a mean over tokens is one over a micro-batch here
and over a mini-batch there; a limit of 5 generated batches is one of 4 in NeMo RL, and verl's newest trainer ignores
it. So a cell is not a name but a function of the whole configuration, to the options that come to the same, perhaps
with a note of what differs all the same. None means that the trainer has no key for that value, and the export says
so. What was read, and in which version, says `search/option_names/`; that no option is written which a trainer does
not have, and that no setting lacks a row, is tested.

A method has more than settings: `FIXED` holds what every export must say because a trainer's default is another method
(TRL corrects by importance weights, QeRL masks truncated completions and decays its learning rate, NeMo RL's baseline
leaves one out, verl clips twice).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from search.foreign import System
from spaces.config import CollapseConfig, TrialConfig
from spaces.scans import settled


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A setting in another trainer's words; no options: it does that anyway."""

    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    """What differs all the same."""


Cell = Callable[[TrialConfig, Any], Said | None]
"""Of the configuration and the row's own value. None: there is no key for that value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Every trainer has its cell; a setting without a row has no key anywhere."""

    verl: Cell
    upstream: Cell
    trl: Cell
    qerl: Cell
    nemo: Cell

    def cell(self, system: System) -> Cell:
        return {
            "verl": self.verl,
            "verl-upstream": self.upstream,
            "trl": self.trl,
            "qerl": self.qerl,
            "nemo-rl": self.nemo,
        }[system]


# --- what a cell may be -----------------------------------------------------------------------------------------------


def no_key(config: TrialConfig, value: Any) -> None:
    """The trainer has no option for it."""


def local(config: TrialConfig, value: Any) -> None:
    """It concerns this program and this machine alone, and is named only where somebody has set it."""


def to(option: str, note: str = "") -> Cell:
    """The same number under another name."""
    return lambda config, value: Said(options={option: value}, note=note)


def anyway(*values: Any) -> Cell:
    """The trainer does that without being told, and nothing else."""
    return lambda config, value: Said() if value in values else None


def if_(holds: Callable[[TrialConfig], bool], cell: Cell) -> Cell:
    return lambda config, value: cell(config, value) if holds(config) else None


def options(of: Callable[[TrialConfig], Mapping[str, Any]], note: str = "") -> Cell:
    return lambda config, value: Said(options=of(config), note=note)


def _row(*, verl: Cell, trl: Cell, qerl: Cell, nemo: Cell, upstream: Cell | None = None) -> Row:
    """Without a cell of its own, upstream says it as its fork does."""
    return Row(verl=verl, upstream=upstream or verl, trl=trl, qerl=qerl, nemo=nemo)


_HERE = _row(verl=local, trl=local, qerl=local, nemo=local)
_NOWHERE = _row(verl=no_key, trl=no_key, qerl=no_key, nemo=no_key)


def _ours(config_class: str, name: str) -> Cell:
    """In a TRL script, noise and quantisation are those of this library."""
    return to(f"{config_class}.{name}")


# --- quantities -------------------------------------------------------------------------------------------------------

_ACTOR, _ROLLOUT, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
_NOISE, _HARDWARE = "trainer.noise_injection", "trainer.hw_error_injection"
_QAT = f"{_ACTOR}.fsdp_config.qat"
_AVERAGES = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}


def _even(c: TrialConfig) -> bool:
    """Mini-batches of one size; other trainers have no others."""
    return c.grpo.prompts % c.grpo.minibatches == 0


def _completions(c: TrialConfig) -> int:
    """Of one update."""
    return c.grpo.prompts // c.grpo.minibatches * c.grpo.group_size


def _at_once(c: TrialConfig) -> int:
    """Completions of one forward pass: the largest divisor of an update's that the micro-batch allows."""
    longest = c.rollout.max_prompt_tokens + c.rollout.max_new_tokens
    tokens = c.grpo.micro_batch_tokens
    most = c.grpo.micro_batch_size if tokens is None else max(1, tokens // longest)
    return max(n for n in range(1, _completions(c) + 1) if _completions(c) % n == 0 and n <= most)


def _accumulated(c: TrialConfig) -> int:
    return _completions(c) // _at_once(c)


def _noisy(c: TrialConfig) -> bool:
    return c.noise.sigma_start > 0


def _resampled(c: TrialConfig) -> bool:
    return c.grpo.filter_groups == "resample"


def _lora(c: TrialConfig) -> bool:
    return c.model.adapter == "lora"


def _formats(c: TrialConfig) -> tuple[str, str]:
    return c.quant.weights, c.quant.activations


def _injection(c: TrialConfig) -> str | None:
    """Where the plan's fork quantises: it knows one format per run, in two places."""
    weights, activations = _formats(c)
    if {weights, activations} - {"none"} not in ({"mxfp4"}, {"nvfp4"}):
        return None
    return "both" if weights == activations else "weight" if activations == "none" else "input"


def _fork_excluded(c: TrialConfig) -> list[str]:
    """Substrings of module names, so that `layers.1.` needs its second dot; hooks sit on an adapter's wrapper."""
    adapters = ["lora_A", "lora_B", "base_layer"] if _lora(c) else []
    return [
        "lm_head",
        "embed_tokens",
        *adapters,
        *(f"layers.{n}." for n in settled("quant.skip_layers", c.quant.skip_layers) if n >= 0),
    ]


def _fork_quant(c: TrialConfig, value: Any) -> Said | None:
    if _formats(c) == ("none", "none"):
        return Said(options={f"{_HARDWARE}.enabled": False})
    point = _injection(c)
    if point is None:
        return None
    return Said(
        options={
            f"{_HARDWARE}.enabled": True,
            f"{_HARDWARE}.error_type": next(f for f in _formats(c) if f != "none"),
            f"{_HARDWARE}.injection_point": point,
            f"{_HARDWARE}.apply_during": "both",
            f"{_HARDWARE}.target_modules": ["linear"],
            f"{_HARDWARE}.exclude_modules": _fork_excluded(c),
            f"{_ROLLOUT}.enforce_eager": True,  # hooks do not run in captured graphs
        }
    )


def _upstream_quant(c: TrialConfig, value: Any) -> Said | None:
    modes = {("nvfp4", "none"): "w4a16", ("nvfp4", "nvfp4"): "w4a4"}
    if _formats(c) == ("none", "none"):
        return Said(options={f"{_QAT}.enable": False})
    if _formats(c) not in modes:
        return None
    return Said(
        options={f"{_QAT}.enable": True, f"{_QAT}.mode": modes[_formats(c)]},
        note=f"{_QAT}.quantization_config_path must name vLLM's quantisation file, too",
    )


def _nemo_quant(c: TrialConfig, value: Any) -> Said | None:
    """ModelOpt's fake quantisation, in NeMo RL's Megatron backend alone."""
    if _formats(c) == ("none", "none"):
        return Said()
    if _formats(c) != ("nvfp4", "nvfp4"):
        return None
    return Said(
        options={
            "policy.quant_cfg": "NVFP4_DEFAULT_CFG",
            "policy.generation.quant_cfg": "NVFP4_DEFAULT_CFG",
            "policy.megatron_cfg.enabled": True,
            "policy.dtensor_cfg.enabled": False,
        },
        note="NeMo RL's own table of verified configurations says of W4A4 GRPO: known convergence issue",
    )


def _megatron(c: TrialConfig) -> bool:
    return _formats(c) == ("nvfp4", "nvfp4")


def _nemo(optimizer: str, megatron: str) -> Cell:
    """Two backends, each with its own name for it."""
    return lambda c, value: Said(options={megatron if _megatron(c) else optimizer: value})


def _fork_noise(c: TrialConfig, value: Any) -> Said:
    if not _noisy(c):
        return Said(options={f"{_NOISE}.enabled": False})
    return Said(
        options={f"{_NOISE}.enabled": True, f"{_NOISE}.sigma_start": value},
        note="the noise is drawn from an unseeded generator: two runs of one seed differ",
    )


def _qerl_noise(c: TrialConfig, value: Any) -> Said:
    """Norms are written anew in each step, and so freed of their noise, only where they are trained."""
    return Said(
        options={"sigma_start": value, "ln": True},
        note="ln trains the norms in front of attention and MLP, too; without it the noise of a step stays in them",
    )


def _fork_targets(c: TrialConfig, value: Any) -> Said | None:
    """Blocks by their names: the fork's target_layers never reach the rollout, its target_modules do."""
    if isinstance(c.noise.layers, str) and c.noise.layers != "all":
        return None
    final = ["model.norm"] if c.noise.final_norm else []
    blocks = [] if c.noise.layers == "all" else [f"layers.{n}." for n in c.noise.layers]
    return Said(options={f"{_NOISE}.target_modules": [*blocks, *final] if blocks else []})


def _fork_modules(c: TrialConfig, value: Any) -> Said | None:
    """It knows norms by their names, and those of queries or behind attention by none."""
    if {"qk_norm", "post_norm"} & {*c.noise.modules}:
        return None
    norms = [] if c.noise.final_norm else ["model.norm"]
    wrapped = ["base_layer"] if _lora(c) else []  # vLLM's wrapper counts as linear, too, and would be noised again
    return Said(
        options={
            f"{_NOISE}.layer_types": list(c.noise.modules),
            f"{_NOISE}.exclude_patterns": ["lm_head", "embed_tokens", "lora_", *wrapped, "q_norm", "k_norm", *norms],
        }
    )


def _decay(sigma_end: str, others: Cell = no_key) -> Cell:
    """QeRL's code decays exponentially; without a decay it is given the same sigma twice."""

    def cell(c: TrialConfig, value: Any) -> Said | None:
        if not _noisy(c) or value == "qerl_code":
            return Said()
        return Said(options={sigma_end: c.noise.sigma_start}) if value == "constant" else others(c, value)

    return cell


def _qerl_stages(c: TrialConfig, value: Any) -> Said | None:
    """Below three stages its code has no noise at all (K = 1) or 0/0 (K = 2)."""
    if value < 3:
        return None
    prompts = c.grpo.steps * c.grpo.prompts
    return Said(
        options={"num_stages": value},
        note="stages are counted in optimizer steps from 1, so that one may begin a rollout early, and every epoch "
        f"begins the schedule anew: the data must hold {prompts} prompts",
    )


def _stretch(c: TrialConfig) -> int:
    """The fork's schedule counts batches of its loader, and its filter may spend as many for a step as it is allowed:
    so a schedule with a filter has that many times the batches and the stages, and a run reaches its first part."""
    return c.grpo.batch_limit if _noisy(c) else 1


def _fork_end(c: TrialConfig, value: Any) -> Said | None:
    """Of the whole schedule, so that its first part ends at ours."""
    start, stages = c.noise.sigma_start, c.noise.num_stages
    end = start * (value / start) ** ((_stretch(c) * stages - 2) / (stages - 2)) if stages > 2 else 0.0
    return (
        Said(options={f"{_NOISE}.sigma_end": end}) if end > 0 else None
    )  # 0 where the stretch is past what floats hold


def _fork_stages(c: TrialConfig, value: Any) -> Said | None:
    if not _noisy(c):
        return Said()
    if value < 3:
        return None  # no noise at all (K = 1), or 0/0 (K = 2)
    times = _stretch(c)
    return Said(
        options={f"{_NOISE}.num_stages": times * value},
        note=f"rin audit: stages-unreached is meant: the filter may spend {times} batches on a step, so the schedule "
        f"has {times} times the stages over {times} times the batches, and the run ends after the first {value}"
        if times > 1
        else "",
    )


def _fork_length(c: TrialConfig, value: Any) -> Said:
    """The schedule's length is what the loader holds, whatever total_training_steps says."""
    samples = value * c.grpo.batch_prompts
    return Said(
        options={
            "trainer.total_training_steps": value,
            "trainer.total_epochs": _stretch(c) if _noisy(c) else c.grpo.batch_limit,
            "data.train_max_samples": samples,
        },
        note=f"the noise schedule counts total_epochs times the loader's batches; the data must hold {samples} prompts"
        if _noisy(c)
        else "",
    )


def _fork_evaluation(c: TrialConfig, value: Any) -> Said:
    """Its validation is noisy after the quiet stage: it keeps checkpoints instead."""
    every = value or c.grpo.steps
    if not _noisy(c):
        return Said(options={"trainer.val_before_train": True, "trainer.test_freq": every, "trainer.save_freq": every})
    return Said(
        options={"trainer.val_before_train": True, "trainer.test_freq": -1, "trainer.save_freq": every},
        note="this fork leaves the noise in during validation: it keeps checkpoints in place of that; evaluate them, "
        "and the control's, apart and in the precision of the training",
    )


def _verl_averages(c: TrialConfig, value: Any) -> Said | None:
    if c.grpo.loss == "dapo" and c.grpo.minibatches > 1:
        return None  # its mean over tokens is one over a mini-batch
    return Said(options={f"{_ACTOR}.loss_agg_mode": _AVERAGES[value]})


def _fork_averages(c: TrialConfig, value: Any) -> Said | None:
    said = _verl_averages(c, value)
    if said is None or _AVERAGES[value] != "token-mean":
        return said
    return Said(options=said.options, note="token-mean is one over a micro-batch in this fork")


def _upstream_averages(c: TrialConfig, value: Any) -> Said | None:
    said = _verl_averages(c, value)
    if said is None or value != "dr_grpo":
        return said
    return Said(options={**said.options, f"{_ACTOR}.loss_scale_factor": c.rollout.max_new_tokens})


def _trl_loss(c: TrialConfig, value: Any) -> Said:
    split = value == "bnpo" and _even(c) and _accumulated(c) > 1
    return Said(options={"loss_type": value}, note="bnpo is a mean over a micro-batch here" if split else "")


def _kl(c: TrialConfig, value: Any) -> Said:
    if not value:
        return Said(options={f"{_ACTOR}.use_kl_loss": False})
    return Said(
        options={
            f"{_ACTOR}.use_kl_loss": True,
            f"{_ACTOR}.kl_loss_coef": value,
            f"{_ACTOR}.kl_loss_type": "low_var_kl",
        }
    )


def _fork_overlong(c: TrialConfig, value: Any) -> Said:
    section = "reward_model.overlong_buffer"
    if not value:
        return Said(options={f"{section}.enable": False})
    return Said(
        options={"reward_model.reward_manager": "dapo", f"{section}.enable": True, f"{section}.len": value},
    )


def _upstream_overlong(c: TrialConfig, value: Any) -> Said:
    section = "reward.reward_kwargs.overlong_buffer_cfg"
    if not value:
        return Said()
    return Said(
        options={
            "reward.reward_manager.name": "dapo",
            "reward.reward_kwargs.max_resp_len": c.rollout.max_new_tokens,
            f"{section}.enable": True,
            f"{section}.len": value,
            f"{section}.log": False,
        }
    )


def _verl_filter(c: TrialConfig, value: Any) -> Said | None:
    section = "algorithm.filter_groups"
    if value == "drop":
        return None  # a step with too few groups ends the run there
    if value == "off":
        return Said(options={f"{section}.enable": False})
    return Said(
        options={f"{section}.enable": True, f"{section}.metric": "acc"},
        note="acc is the score itself where compute_score returns a number; one that returns a dict must hold acc",
    )


def _upstream_filter(c: TrialConfig, value: Any) -> Said | None:
    said = _verl_filter(c, value)
    if said is None or value == "off":
        return said
    return Said(options=said.options, note=f"{said.note}; nothing ends a search for groups that does not succeed")


def _seeds(*names: str, note: str = "") -> Cell:
    return lambda c, value: Said(options=dict.fromkeys(names, value), note=note)


def _trl_overlong(c: TrialConfig, value: Any) -> Said:
    if not value:
        return Said()
    return Said(options={"overlong.max_completion_len": c.rollout.max_new_tokens, "overlong.soft_punish_cache": value})


def _trl_weights(c: TrialConfig, value: Any) -> Said:
    """Of all rewards, the overlong penalty behind them."""
    own = [float(weight) for weight in c.task.reward_weights] or [1.0] * max(1, len(c.task.reward))
    penalty = [c.grpo.overlong_penalty] if c.grpo.overlong_buffer else []
    return Said(options={"reward_weights": [*own, *penalty]} if penalty or c.task.reward_weights else {})


def _of(kind: str) -> Callable[[TrialConfig], bool]:
    """Whether the task came in that trainer's format, and may go back as it came."""
    return lambda c: c.task.kind == kind


def _as_it_came(c: TrialConfig, value: Any) -> Said:
    return Said()


_HELD_OUT = "all rows are trained on there; here some are kept for choosing, by a hash of the row"


def _trl_rows(c: TrialConfig, value: Any) -> Said | None:
    """JSONL and parquet, by the loaders of `datasets`; a folder or a hub id is loaded otherwise."""
    loader = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    kinds = {loader.get(PurePath(path).suffix) for path in value}
    if c.task.kind != "trl" or len(kinds) != 1 or None in kinds:
        return None
    return Said(
        options={
            "load_dataset.path": kinds.pop(),
            "load_dataset.data_files": list(value),
            "load_dataset.split": "train",
        },
        note=_HELD_OUT,
    )


def _verl_reward(section: str) -> Cell:
    """One function of one file."""

    def cell(c: TrialConfig, value: Any) -> Said | None:
        source, _, function = value[0].rpartition(":") if value else ("", "", "")
        if not value:
            return Said()
        if c.task.kind != "verl" or len(value) > 1 or not source.endswith(".py"):
            return None
        return Said(options={f"{section}.path": source, f"{section}.name": function})

    return cell


def _verl_options(section: str) -> Cell:
    return lambda c, value: Said(options={f"{section}.reward_kwargs.{key}": item for key, item in value})


def _in_vllm(c: TrialConfig) -> bool:
    return c.rollout.backend == "vllm"


def _trl_engine(c: TrialConfig, value: Any) -> Said:
    """vLLM begins from a folder that names our layers, so that it quantises inputs, too."""
    folder = {"for_vllm.folder": "for-vllm"} if _in_vllm(c) else {}
    return Said(options={"use_vllm": _in_vllm(c), **folder})


def _trl_correction(c: TrialConfig, value: Any) -> Said | None:
    if value == "none":
        return Said(options={"vllm_importance_sampling_correction": False})
    if not _in_vllm(c):
        return None  # without vLLM nothing is corrected
    return Said(
        options={
            "vllm_importance_sampling_correction": True,
            "vllm_importance_sampling_mode": f"{value}_truncate",
        }
    )


def _warmup(option: str) -> Cell:
    """transformers' warm-up begins at a learning rate of 0, ours at 1/n."""
    late = "its first update has a learning rate of 0: it is one update behind"
    return lambda c, value: Said(
        options={"lr_scheduler_type": "constant_with_warmup" if value else "constant", option: value},
        note=late if value else "",
    )


def _trl_decay(c: TrialConfig, value: Any) -> Said:
    return Said(
        options={"weight_decay": value},
        note="transformers leaves norms and biases out of the decay" if value else "",
    )


def _scale_of(option: str) -> Cell:
    return lambda c, value: None if value == "batch" else Said(options={option: value == "group"})


_UPDATES = options(
    lambda c: {
        "generation_batch_size": c.grpo.prompts * c.grpo.group_size,
        "per_device_train_batch_size": _at_once(c),
        "gradient_accumulation_steps": _accumulated(c),
    },
    note="for one process: divide per_device_train_batch_size by the number of processes",
)
"""TRL and QeRL count completions: an update takes batch size x accumulation of a generation's."""


def _with_updates(c: TrialConfig, value: Any) -> Said:
    """generation_batch_size holds it."""
    return Said()


# --- the table --------------------------------------------------------------------------------------------------------

ROWS: dict[str, Row] = {
    "model.name": _row(
        verl=if_(lambda c: c.model.recipe is None, to(f"{_MODEL}.path")),
        trl=if_(lambda c: c.model.recipe is None, to("from_pretrained.pretrained_model_name_or_path")),
        qerl=if_(lambda c: c.model.recipe is None, to("model_name")),
        nemo=if_(lambda c: c.model.recipe is None, to("policy.model_name")),
    ),
    "model.recipe": _NOWHERE,
    "model.adapter": _row(
        verl=lambda c, v: Said(options={} if _lora(c) else {f"{_MODEL}.lora_rank": 0}),
        trl=anyway("full", "lora"),
        qerl=anyway("lora"),
        nemo=lambda c, v: Said(
            options={
                "policy.megatron_cfg.peft.enabled" if _megatron(c) else "policy.dtensor_cfg.lora_cfg.enabled": _lora(c)
            }
        ),
    ),
    "model.lora_rank": _row(
        verl=to(f"{_MODEL}.lora_rank"),
        trl=options(lambda c: {"LoraConfig.r": c.model.lora_rank, "LoraConfig.target_modules": "all-linear"}),
        qerl=to("lora_rank"),
        nemo=_nemo("policy.dtensor_cfg.lora_cfg.dim", "policy.megatron_cfg.peft.dim"),
    ),
    "model.lora_alpha": _row(
        verl=to(f"{_MODEL}.lora_alpha"),
        trl=to("LoraConfig.lora_alpha"),
        qerl=lambda c, v: Said(options={"lora_alpha": int(v)}) if v == int(v) else None,  # a whole number there
        nemo=_nemo("policy.dtensor_cfg.lora_cfg.alpha", "policy.megatron_cfg.peft.alpha"),
    ),
    "model.dtype": _row(
        verl=options(
            lambda c: {
                f"{_ACTOR}.fsdp_config.model_dtype": "fp32",
                f"{_ACTOR}.fsdp_config.dtype": c.model.dtype,
                f"{_ROLLOUT}.dtype": c.model.dtype,
            }
        ),
        trl=lambda c, v: Said(
            options={"from_pretrained.dtype": v, "bf16": v == "bfloat16"},
            note="no weights in fp32 stand beside those in bfloat16" if v == "bfloat16" else "",
        ),
        qerl=lambda c, v: Said(options={"bf16": True}) if v == "bfloat16" else None,  # loaded as the checkpoint has it
        nemo=to("policy.precision"),
    ),
    "model.attention": _HERE,
    "quant.weights": _row(
        verl=_fork_quant,
        upstream=_upstream_quant,
        trl=_ours("QuantConfig", "weights"),
        qerl=lambda c, v: (
            Said(
                note="model_name must be an NVFP4 checkpoint, with nvfp4 in its name: that alone switches the noise on"
            )
            if v == "nvfp4"
            else None
        ),
        nemo=_nemo_quant,
    ),
    "quant.activations": _row(
        verl=_fork_quant,
        upstream=_upstream_quant,
        trl=_ours("QuantConfig", "activations"),
        qerl=anyway("none"),
        nemo=_nemo_quant,
    ),
    "quant.scale_rule": _row(
        verl=anyway("floor"), upstream=no_key, trl=_ours("QuantConfig", "scale_rule"), qerl=no_key, nemo=no_key
    ),
    "quant.hadamard": _row(
        verl=anyway(False), trl=_ours("QuantConfig", "hadamard"), qerl=anyway(False), nemo=anyway(False)
    ),
    "quant.backward": _row(
        verl=anyway("dequantized"),
        trl=_ours("QuantConfig", "backward"),
        qerl=anyway("dequantized"),
        nemo=anyway("dequantized"),
    ),
    "quant.exclude": _row(
        verl=if_(lambda c: _injection(c) is not None, anyway(("lm_head",))),  # said with the format
        upstream=anyway(("lm_head",)),
        trl=_ours("QuantConfig", "exclude"),
        qerl=anyway(("lm_head",)),
        nemo=anyway(("lm_head",)),
    ),
    "quant.skip_layers": _row(
        verl=lambda c, v: Said() if all(n >= 0 for n in v) and (not v or _injection(c)) else None,
        upstream=anyway(()),
        trl=_ours("QuantConfig", "skip_layers"),
        qerl=anyway(()),
        nemo=anyway(()),
    ),
    "noise.sigma_start": _row(
        verl=_fork_noise,
        upstream=anyway(0.0),
        trl=_ours("NoiseConfig", "sigma_start"),
        qerl=if_(_noisy, _qerl_noise),  # 0 gives 0/0; without nvfp4 in the model's name there is no noise
        nemo=anyway(0.0),
    ),
    "noise.sigma_end": _row(
        verl=_fork_end,
        upstream=no_key,
        trl=_ours("NoiseConfig", "sigma_end"),
        qerl=to("sigma_end"),
        nemo=no_key,
    ),
    "noise.num_stages": _row(
        verl=_fork_stages,
        upstream=lambda c, v: None if _noisy(c) else Said(),
        trl=_ours("NoiseConfig", "num_stages"),
        qerl=_qerl_stages,
        nemo=lambda c, v: None if _noisy(c) else Said(),
    ),
    "noise.schedule": _row(
        verl=_decay(f"{_NOISE}.sigma_end"),
        upstream=no_key,
        trl=_ours("NoiseConfig", "schedule"),
        qerl=_decay("sigma_end"),
        nemo=no_key,
    ),
    "noise.modules": _row(
        verl=_fork_modules,
        upstream=no_key,
        trl=_ours("NoiseConfig", "modules"),
        qerl=anyway(("rmsnorm",)),
        nemo=no_key,
    ),
    "noise.final_norm": _row(
        verl=anyway(True, False),  # said with the modules
        upstream=no_key,
        trl=_ours("NoiseConfig", "final_norm"),
        qerl=anyway(True),
        nemo=no_key,
    ),
    "noise.layers": _row(
        verl=_fork_targets,
        upstream=no_key,
        trl=_ours("NoiseConfig", "layers"),
        qerl=anyway("all"),
        nemo=no_key,
    ),
    "noise.layer_multipliers": _row(
        verl=anyway(()),
        upstream=anyway(()),
        trl=_ours("NoiseConfig", "layer_multipliers"),
        qerl=anyway(()),
        nemo=anyway(()),
    ),
    "noise.zones": _row(
        verl=anyway(()), upstream=anyway(()), trl=_ours("NoiseConfig", "zones"), qerl=anyway(()), nemo=anyway(())
    ),
    "noise.scale": _row(
        verl=anyway("absolute"),
        upstream=no_key,
        trl=_ours("NoiseConfig", "scale"),
        qerl=anyway("absolute"),
        nemo=no_key,
    ),
    "noise.placement": _row(
        verl=anyway("before"),
        upstream=no_key,
        trl=_ours("NoiseConfig", "placement"),
        qerl=no_key,  # only norms have noise there
        nemo=no_key,
    ),
    "grpo.steps": _row(
        verl=_fork_length,
        upstream=options(
            lambda c: {"trainer.total_training_steps": c.grpo.steps, "trainer.total_epochs": c.grpo.steps}
        ),
        trl=options(lambda c: {"max_steps": c.grpo.steps * c.grpo.updates_per_step}),
        qerl=options(lambda c: {"max_steps": c.grpo.steps * c.grpo.updates_per_step}),
        nemo=options(lambda c: {"grpo.max_num_steps": c.grpo.steps, "grpo.max_num_epochs": c.grpo.steps}),
    ),
    "grpo.updates_per_step": _row(
        verl=if_(_even, options(lambda c: {f"{_ACTOR}.ppo_mini_batch_size": c.grpo.prompts // c.grpo.minibatches})),
        trl=if_(_even, _UPDATES),
        qerl=if_(_even, _UPDATES),
        nemo=if_(
            lambda c: _even(c) and c.grpo.epochs == 1,
            options(lambda c: {"policy.train_global_batch_size": _completions(c)}),
        ),
    ),
    "grpo.epochs": _row(
        verl=to(f"{_ACTOR}.ppo_epochs"), trl=to("num_iterations"), qerl=to("num_iterations"), nemo=anyway(1)
    ),
    "grpo.prompts": _row(
        verl=to("data.train_batch_size"),
        trl=if_(_even, _with_updates),
        qerl=if_(_even, _with_updates),
        nemo=to("grpo.num_prompts_per_step"),
    ),
    "grpo.generation_prompts": _row(
        verl=if_(_resampled, options(lambda c: {"data.gen_batch_size": c.grpo.batch_prompts})),
        upstream=no_key,  # with a filter its loader hands out one prompt at a time
        trl=no_key,
        qerl=no_key,
        nemo=if_(_resampled, options(lambda c: {"grpo.batch_multiplier": c.grpo.batch_prompts / c.grpo.prompts})),
    ),
    "grpo.group_size": _row(
        verl=to(f"{_ROLLOUT}.n"),
        trl=to("num_generations"),
        qerl=to("num_generations"),
        nemo=to("grpo.num_generations_per_prompt"),
    ),
    "grpo.learning_rate": _row(
        verl=to(f"{_ACTOR}.optim.lr"),
        trl=to("learning_rate"),
        qerl=to("learning_rate"),
        nemo=lambda c, v: Said(
            options={"policy.megatron_cfg.optimizer.lr": v, "policy.megatron_cfg.optimizer.min_lr": v}
            if _megatron(c)
            else {"policy.optimizer.kwargs.lr": v}
        ),
    ),
    "grpo.warmup_updates": _row(  # verl and NeMo RL warm up by rollouts
        verl=lambda c, v: None if v else Said(options={f"{_ACTOR}.optim.lr_warmup_steps": 0}),
        trl=_warmup("warmup_steps"),
        qerl=lambda c, v: (
            None
            if (said := _warmup("warmup_steps")(c, v)) is None
            else Said(options={**said.options, "warmup_ratio": 0.0}, note=said.note)
        ),
        nemo=lambda c, v: (
            None
            if v
            else Said(
                options={"policy.megatron_cfg.scheduler.lr_warmup_iters": 0}
                if _megatron(c)
                else {
                    "policy.scheduler": [
                        {"name": "torch.optim.lr_scheduler.ConstantLR", "kwargs": {"factor": 1.0, "total_iters": 1}},
                        {"milestones": []},
                    ]
                }
            )
        ),
    ),
    "grpo.weight_decay": _row(
        verl=to(f"{_ACTOR}.optim.weight_decay"),
        trl=_trl_decay,
        qerl=_trl_decay,
        nemo=_nemo("policy.optimizer.kwargs.weight_decay", "policy.megatron_cfg.optimizer.weight_decay"),
    ),
    "grpo.adam_beta2": _row(
        verl=options(lambda c: {f"{_ACTOR}.optim.betas": [0.9, c.grpo.adam_beta2]}),
        trl=to("adam_beta2"),
        qerl=to("adam_beta2"),
        nemo=lambda c, v: Said(
            options={"policy.megatron_cfg.optimizer.adam_beta2": v}
            if _megatron(c)
            else {"policy.optimizer.kwargs.betas": [0.9, v]}
        ),
    ),
    "grpo.max_grad_norm": _row(
        verl=to(f"{_ACTOR}.grad_clip"),
        trl=to("max_grad_norm"),
        qerl=to("max_grad_norm"),
        nemo=to("policy.max_grad_norm"),
    ),
    "grpo.loss": _row(
        verl=_fork_averages,
        upstream=_upstream_averages,
        trl=_trl_loss,
        qerl=lambda c, v: None if v == "dapo" else _trl_loss(c, v),
        nemo=lambda c, v: (
            None
            if v == "dr_grpo" or (v == "dapo" and c.grpo.minibatches > 1)
            else Said(options={"loss_fn.token_level_loss": v != "grpo"})
        ),
    ),
    "grpo.clip_low": _row(
        verl=to(f"{_ACTOR}.clip_ratio_low"), trl=to("epsilon"), qerl=to("epsilon"), nemo=to("loss_fn.ratio_clip_min")
    ),
    "grpo.clip_high": _row(
        verl=to(f"{_ACTOR}.clip_ratio_high"),
        trl=to("epsilon_high"),
        qerl=to("epsilon_high"),
        nemo=to("loss_fn.ratio_clip_max"),
    ),
    "grpo.reward": _row(verl=anyway("task"), trl=anyway("task"), qerl=anyway("task"), nemo=anyway("task")),
    "grpo.advantage_scale": _row(
        verl=_scale_of("algorithm.norm_adv_by_std_in_grpo"),
        trl=to("scale_rewards"),
        qerl=_scale_of("scale_rewards"),
        nemo=_scale_of("grpo.normalize_rewards"),
    ),
    "grpo.kl_beta": _row(verl=_kl, trl=to("beta"), qerl=to("beta"), nemo=to("loss_fn.reference_policy_kl_penalty")),
    "grpo.overlong_buffer": _row(
        verl=_fork_overlong,
        upstream=_upstream_overlong,
        trl=_trl_overlong,
        qerl=anyway(0),
        nemo=lambda c, v: Said(
            options={
                "grpo.reward_shaping.enabled": True,
                "grpo.reward_shaping.overlong_buffer_length": v,
                "grpo.reward_shaping.max_response_length": c.rollout.max_new_tokens,
            }
            if v
            else {"grpo.reward_shaping.enabled": False}
        ),
    ),
    "grpo.overlong_penalty": _row(
        verl=to("reward_model.overlong_buffer.penalty_factor"),
        upstream=to("reward.reward_kwargs.overlong_buffer_cfg.penalty_factor"),
        trl=_trl_weights,
        qerl=no_key,
        nemo=to("grpo.reward_shaping.overlong_buffer_penalty"),
    ),
    "grpo.filter_groups": _row(
        verl=_verl_filter,
        upstream=_upstream_filter,
        trl=anyway("off"),
        qerl=anyway("off"),
        nemo=lambda c, v: None if v == "drop" else Said(options={"grpo.use_dynamic_sampling": v == "resample"}),
    ),
    "grpo.max_gen_batches": _row(
        verl=to("algorithm.filter_groups.max_num_gen_batches"),
        upstream=no_key,  # its trainer warns, and goes on without a limit
        trl=no_key,
        qerl=no_key,
        # raised only when one batch more than the limit did not suffice; a limit of 0 is an assertion
        nemo=lambda c, v: Said(options={"grpo.dynamic_sampling_max_gen_batches": v - 1}) if v > 1 else None,
    ),
    "grpo.micro_batch_size": _HERE,
    "grpo.micro_batch_tokens": _HERE,
    "grpo.checkpoint_activations": _HERE,
    "rollout.backend": _row(
        verl=local,
        trl=_trl_engine,
        qerl=local,
        nemo=local,
    ),
    "rollout.engine": _HERE,
    "rollout.kv_cache_gib": _HERE,
    "rollout.sleep": _HERE,
    "rollout.start_seconds": _HERE,
    "rollout.answer_seconds": _HERE,
    "rollout.temperature": _row(
        verl=to(f"{_ROLLOUT}.temperature"),
        trl=to("temperature"),
        qerl=to("temperature"),
        nemo=to("policy.generation.temperature"),
    ),
    "rollout.max_new_tokens": _row(
        verl=to("data.max_response_length"),
        trl=to("max_completion_length"),
        qerl=to("max_completion_length"),
        nemo=options(
            lambda c: {
                "policy.generation.max_new_tokens": c.rollout.max_new_tokens,
                "policy.max_total_sequence_length": c.rollout.max_prompt_tokens + c.rollout.max_new_tokens,
            }
        ),
    ),
    "rollout.max_prompt_tokens": _row(
        verl=to("data.max_prompt_length"),
        trl=no_key,
        qerl=to("max_prompt_length", note="longer prompts are cut from the left"),
        nemo=to("data.max_input_seq_length"),
    ),
    "rollout.batch_size": _HERE,
    "rollout.correction": _row(
        verl=lambda c, v: (
            Said()
            if v == "none"
            else Said(options={"algorithm.rollout_correction.rollout_is": v, f"{_ROLLOUT}.calculate_log_probs": True})
        ),
        trl=_trl_correction,
        qerl=anyway("none"),
        nemo=lambda c, v: (
            None
            if v == "sequence"  # it would make the clipped ratio one per sequence, too
            else Said(
                options={"loss_fn.use_importance_sampling_correction": v == "token"}
                | ({"loss_fn.truncated_importance_sampling_type": "tis"} if v == "token" else {})
            )
        ),
    ),
    "rollout.correction_cap": _row(
        verl=to("algorithm.rollout_correction.rollout_is_threshold"),
        trl=if_(_in_vllm, to("vllm_importance_sampling_clip_max")),
        qerl=no_key,
        nemo=if_(lambda c: c.rollout.correction == "token", to("loss_fn.truncated_importance_sampling_ratio")),
    ),
    "task.name": _row(verl=if_(_of("verl"), _as_it_came), trl=if_(_of("trl"), _as_it_came), qerl=no_key, nemo=no_key),
    "task.digits": _NOWHERE,
    "task.path": _row(
        verl=if_(_of("verl"), to("data.train_files", note=_HELD_OUT)), trl=_trl_rows, qerl=no_key, nemo=no_key
    ),
    "task.eval_path": _row(verl=if_(_of("verl"), to("data.val_files")), trl=no_key, qerl=no_key, nemo=no_key),
    "task.options": _row(verl=anyway(()), trl=anyway(()), qerl=anyway(()), nemo=anyway(())),
    "task.prompt": _row(verl=anyway(None), trl=anyway(None), qerl=anyway(None), nemo=anyway(None)),
    "task.chat": _row(
        verl=lambda c, v: Said() if c.task.in_template else None,
        trl=anyway(True, False),
        qerl=anyway(True),
        nemo=anyway(True),
    ),
    "task.chat_options": _row(
        verl=lambda c, v: Said(options={f"data.apply_chat_template_kwargs.{key}": item for key, item in v}),
        trl=lambda c, v: Said(options={"chat_template_kwargs": dict(v)} if v else {}),
        qerl=anyway(()),
        nemo=lambda c, v: Said(options={"policy.tokenizer.chat_template_kwargs": dict(v)} if v else {}),
    ),
    "task.chat_date": _HERE,
    "task.reward": _row(
        verl=_verl_reward("custom_reward_function"),
        upstream=_verl_reward("reward.custom_reward_function"),
        trl=lambda c, v: (to("rewards.functions") if _of("trl")(c) else anyway(()))(c, v),
        qerl=anyway(()),
        nemo=anyway(()),
    ),
    "task.reward_weights": _row(verl=anyway(()), trl=if_(_of("trl"), _trl_weights), qerl=anyway(()), nemo=anyway(())),
    "task.reward_options": _row(
        verl=_verl_options("custom_reward_function"),
        upstream=_verl_options("reward.custom_reward_function"),
        trl=anyway(()),
        qerl=anyway(()),
        nemo=anyway(()),
    ),
    "task.correct_at": _HERE,
    "task.reward_timeout_seconds": _HERE,
    "task.reward_check": _HERE,
    "task.reward_sha256": _HERE,
    "task.too_long": _row(
        verl=lambda c, v: Said(options={"data.filter_overlong_prompts": v == "leave_out", "data.truncation": "error"}),
        trl=no_key,
        qerl=no_key,
        nemo=no_key,
    ),
    **{
        f"collapse.{name}": _row(verl=local, trl=_ours("CollapseConfig", name), qerl=local, nemo=local)
        for name in CollapseConfig.model_fields
    },
    "eval.questions": _row(verl=to("data.val_max_samples"), trl=no_key, qerl=no_key, nemo=to("grpo.max_val_samples")),
    "eval.every": _row(
        verl=_fork_evaluation,
        upstream=lambda c, v: Said(options={"trainer.val_before_train": True, "trainer.test_freq": v or c.grpo.steps}),
        trl=no_key,  # its evaluation samples at the training temperature
        qerl=no_key,
        nemo=options(lambda c: {"grpo.val_period": c.eval.every, "grpo.val_at_start": True, "grpo.val_at_end": True}),
    ),
    # Their samples take the place of greedy answers.
    "eval.samples": _row(verl=anyway(0), trl=anyway(0), qerl=anyway(0), nemo=anyway(0)),
    "eval.split": _HERE,
    "eval.draw": _HERE,
    "eval.batch_size": _HERE,
    "seed": _row(
        verl=_seeds("data.seed", f"{_ACTOR}.data_loader_seed", f"{_ACTOR}.fsdp_config.seed"),
        upstream=_seeds("data.seed", f"{_ACTOR}.data_loader_seed", f"{_ACTOR}.fsdp_config.seed", f"{_ROLLOUT}.seed"),
        trl=to("seed"),
        qerl=to("seed", note="the noise is drawn anew by every process, from a generator of its own"),
        nemo=to("grpo.seed"),
    ),
    "parallel.ranks": _HERE,
    "parallel.weights": _HERE,
    "threads": _HERE,
    "hang_seconds": _HERE,
}
"""Setting -> how each trainer says it."""


FIXED: dict[System, dict[str, Any]] = {
    "verl": {
        "algorithm.adv_estimator": "grpo",
        f"{_ACTOR}.clip_ratio_c": 1e9,  # a second clip at 3 otherwise
        f"{_ROLLOUT}.name": "vllm",
    },
    "verl-upstream": {
        "algorithm.adv_estimator": "grpo",
        f"{_ACTOR}.clip_ratio_c": 1e9,
        f"{_ROLLOUT}.name": "vllm",
    },
    "trl": {},
    "qerl": {"mask_truncated_completions": False, "vllm_model_impl": "transformers", "optim": "adamw_torch"},
    "nemo-rl": {
        "grpo.use_leave_one_out_baseline": False,
        "policy.generation.val_temperature": 0.0,
        "loss_fn.reference_policy_kl_type": "k3",
    },
}
"""Options that every export states, because the trainer's default is another method."""

"""A candidate's configuration, taken away: a YAML file that runs again, or the lines another trainer understands.

What a candidate is, and what must be known of it, says `search/arms.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from pydantic import BaseModel

from search.arms import Candidate
from spaces.config import TrialConfig
from spaces.reading import as_tree, dump_yaml
from spaces.uses import idle


def to_yaml(candidate: Candidate) -> str:
    """`rin trial --config` repeats the trial from this text alone."""
    study, arm, control = candidate.study, candidate.arm, candidate.control
    runs, beside = _mean(candidate.accuracies), _mean(candidate.control_accuracies)
    apart = "not known" if candidate.difference is None else f"{100 * candidate.difference:+.2f} points"
    return dump_yaml(
        as_tree(candidate.config),
        comment=(
            f"candidate of {study.kind} {study.name}: {arm.name}\n"
            f"accuracy on the {candidate.config.eval.split} questions: {runs}; {control.name}: {beside}; "
            f"paired difference {apart}\n"
            f"{candidate.caveat}\n"
            "repeat its first replicate: rin trial --config FILE"
        ),
    )


def to_verl(candidate: Candidate) -> str:
    """Override lines for the trainer of the plan. What it has no key for stands as a comment: there it would be dropped
    in silence."""
    lines, without = list[str](), list[str]()
    for key, value in _settings(candidate.config):
        said = VERL[key](candidate.config) if key in VERL else None
        if said is None:
            without.append(f"# no key for: {key}={value}")
        else:
            lines += said
    noise_first = sorted(["algorithm.adv_estimator=grpo", *lines], key=lambda line: not line.startswith(_NOISE))
    return "\n".join([*noise_first, *without]) + "\n"


def _settings(config: TrialConfig) -> Iterator[tuple[str, Any]]:
    """Every setting that has an effect here, by its dotted key; those of this machine only where somebody set them."""
    plain, nothing = TrialConfig(), idle(config) - {"noise.sigma_start"}  # which says whether there is noise at all
    nothing |= {"model.recipe"} if config.model.recipe is None else set()
    nothing |= {"rollout.correction_cap"} if config.rollout.correction == "none" else set()
    for name in TrialConfig.model_fields:
        part = getattr(config, name)
        for key in type(part).model_fields if isinstance(part, BaseModel) else [""]:
            value, usual = (getattr(getattr(of, name), key) if key else getattr(of, name) for of in (config, plain))
            dotted = f"{name}.{key}" if key else name
            if dotted not in nothing and not (value == usual and dotted.startswith(OF_THIS_MACHINE)):
                yield dotted, as_tree(value) if isinstance(value, BaseModel) else value


def _mean(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return "no outcome"
    return (
        f"{fmean(accuracies):.4f} ({'mean of ' if len(accuracies) > 1 else ''}{len(accuracies)} "
        f"replicate{'s'[: len(accuracies) > 1]})"
    )


OF_THIS_MACHINE = (
    *("threads", "hang_seconds", "model.attention", "grpo.micro_batch_size", "eval.batch_size", "eval.split"),
    *("eval.draw", "rollout.backend", "rollout.batch_size", "collapse."),
)
"""Beginnings of keys that say how much at once, how long to wait and when to give up."""

_ACTOR, _NOISE = "actor_rollout_ref.actor", "++trainer.noise_injection"
_AVERAGES = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}
VERL: dict[str, Callable[[TrialConfig], list[str] | None]] = {
    "model.name": lambda c: None if c.model.recipe is not None else [f"actor_rollout_ref.model.path={c.model.name}"],
    "model.adapter": lambda c: ["actor_rollout_ref.model.lora_rank=0"] if c.model.adapter == "full" else [],
    "model.lora_rank": lambda c: [f"actor_rollout_ref.model.lora_rank={c.model.lora_rank}"],
    "model.lora_alpha": lambda c: [f"actor_rollout_ref.model.lora_alpha={c.model.lora_alpha:g}"],
    "noise.sigma_start": lambda c: (
        [f"{_NOISE}.enabled=True", f"{_NOISE}.sigma_start={c.noise.sigma_start!r}"]
        if c.noise.sigma_start > 0
        else [f"{_NOISE}.enabled=False"]
    ),
    "noise.sigma_end": lambda c: [f"{_NOISE}.sigma_end={c.noise.sigma_end!r}"],
    "noise.num_stages": lambda c: [f"{_NOISE}.num_stages={c.noise.num_stages}"],
    "noise.modules": lambda c: [
        f"{_NOISE}.layer_types=[{','.join(c.noise.modules)}]",
        f"{_NOISE}.target_modules=[]",
        f"{_NOISE}.exclude_patterns=[lm_head,embed_tokens,lora_]",
    ],
    "noise.schedule": lambda c: [] if c.noise.schedule == "qerl_code" else None,
    "noise.layers": lambda c: [] if c.noise.layers == "all" else None,
    "noise.layer_multipliers": lambda c: None if c.noise.layer_multipliers else [],
    "noise.zones": lambda c: None if c.noise.zones else [],
    "noise.scale": lambda c: [] if c.noise.scale == "absolute" else None,
    "noise.placement": lambda c: [] if c.noise.placement == "before" else None,
    "grpo.steps": lambda c: [f"trainer.total_training_steps={c.grpo.steps}"],
    "grpo.updates_per_step": lambda c: (
        None
        if c.grpo.prompts % c.grpo.minibatches
        else [f"{_ACTOR}.ppo_mini_batch_size={c.grpo.prompts // c.grpo.minibatches}"]
    ),
    "grpo.epochs": lambda c: [f"{_ACTOR}.ppo_epochs={c.grpo.epochs}"],
    "grpo.prompts": lambda c: [f"data.train_batch_size={c.grpo.prompts}"],
    "grpo.generation_prompts": lambda c: [f"++data.gen_batch_size={c.grpo.batch_prompts}"],
    "grpo.group_size": lambda c: [f"actor_rollout_ref.rollout.n={c.grpo.group_size}"],
    "grpo.learning_rate": lambda c: [f"{_ACTOR}.optim.lr={c.grpo.learning_rate!r}"],
    "grpo.warmup_updates": lambda c: None if c.grpo.warmup_updates else [f"{_ACTOR}.optim.lr_warmup_steps=0"],
    "grpo.weight_decay": lambda c: [f"{_ACTOR}.optim.weight_decay={c.grpo.weight_decay!r}"],
    "grpo.adam_beta2": lambda c: [f"{_ACTOR}.optim.betas=[0.9,{c.grpo.adam_beta2!r}]"],
    "grpo.max_grad_norm": lambda c: [f"{_ACTOR}.grad_clip={c.grpo.max_grad_norm!r}"],
    "grpo.loss": lambda c: (
        None  # its mean over tokens is one over a mini-batch
        if c.grpo.loss == "dapo" and c.grpo.minibatches > 1
        else [f"{_ACTOR}.loss_agg_mode={_AVERAGES[c.grpo.loss]}"]
    ),
    "grpo.clip_low": lambda c: [f"{_ACTOR}.clip_ratio_low={c.grpo.clip_low!r}"],
    "grpo.clip_high": lambda c: [f"{_ACTOR}.clip_ratio_high={c.grpo.clip_high!r}"],
    "grpo.advantage_scale": lambda c: (
        None
        if c.grpo.advantage_scale == "batch"
        else [f"algorithm.norm_adv_by_std_in_grpo={c.grpo.advantage_scale == 'group'}"]
    ),
    "grpo.kl_beta": lambda c: (
        [f"{_ACTOR}.use_kl_loss=True", f"{_ACTOR}.kl_loss_coef={c.grpo.kl_beta!r}", f"{_ACTOR}.kl_loss_type=low_var_kl"]
        if c.grpo.kl_beta
        else [f"{_ACTOR}.use_kl_loss=False"]
    ),
    "grpo.overlong_buffer": lambda c: (
        ["++reward_model.overlong_buffer.enable=True", f"++reward_model.overlong_buffer.len={c.grpo.overlong_buffer}"]
        if c.grpo.overlong_buffer
        else ["++reward_model.overlong_buffer.enable=False"]
    ),
    "grpo.overlong_penalty": lambda c: [f"++reward_model.overlong_buffer.penalty_factor={c.grpo.overlong_penalty!r}"],
    "grpo.filter_groups": lambda c: (
        None  # a step with too few groups ends the run there
        if c.grpo.filter_groups == "drop"
        else [f"++algorithm.filter_groups.enable={c.grpo.filter_groups == 'resample'}"]
    ),
    "grpo.max_gen_batches": lambda c: [f"++algorithm.filter_groups.max_num_gen_batches={c.grpo.max_gen_batches}"],
    "rollout.temperature": lambda c: [f"actor_rollout_ref.rollout.temperature={c.rollout.temperature!r}"],
    "rollout.max_new_tokens": lambda c: [f"data.max_response_length={c.rollout.max_new_tokens}"],
    "rollout.max_prompt_tokens": lambda c: [f"data.max_prompt_length={c.rollout.max_prompt_tokens}"],
    "rollout.correction": lambda c: (
        []
        if c.rollout.correction == "none"
        else [
            f"algorithm.rollout_correction.rollout_is={c.rollout.correction}",
            "actor_rollout_ref.rollout.calculate_log_probs=True",
        ]
    ),
    "rollout.correction_cap": lambda c: [
        f"algorithm.rollout_correction.rollout_is_threshold={c.rollout.correction_cap!r}"
    ],
    "task.chat": lambda c: [] if c.task.chat else None,
    "task.too_long": lambda c: [
        f"data.filter_overlong_prompts={c.task.too_long == 'leave_out'}",
        "data.truncation=error",
    ],
    "eval.every": lambda c: [f"trainer.test_freq={c.eval.every or -1}"],
}
"""How verl spells a setting: its lines, none where it does that anyway, or None where it has no key for the value. A
setting without an entry has no key there."""

EXPORTS = {"yaml": to_yaml, "verl": to_verl}

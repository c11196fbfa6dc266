"""A candidate's configuration, taken away: a YAML file that runs again, or the lines another trainer understands.

What a candidate is, and what must be known of it, says `search/arms.py`.
"""

from collections.abc import Sequence
from statistics import fmean

from search.arms import Candidate
from spaces.config import TrialConfig
from spaces.reading import as_tree, dump_yaml


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
    config = candidate.config
    noise, grpo = config.noise, config.grpo
    on = noise.sigma_start > 0
    lines = [f"++trainer.noise_injection.enabled={on}"]
    if on:
        lines += [
            f"++trainer.noise_injection.sigma_start={noise.sigma_start!r}",
            f"++trainer.noise_injection.sigma_end={noise.sigma_end!r}",
            f"++trainer.noise_injection.num_stages={noise.num_stages}",
            f"++trainer.noise_injection.layer_types=[{','.join(noise.modules)}]",
            "++trainer.noise_injection.target_modules=[]",
            "++trainer.noise_injection.exclude_patterns=[lm_head,embed_tokens,lora_]",
        ]
    batches = grpo.max_gen_batches if grpo.filter_groups == "resample" else 1
    lines += [
        f"++algorithm.filter_groups.enable={grpo.filter_groups != 'off'}",
        f"++algorithm.filter_groups.max_num_gen_batches={batches}",
        f"actor_rollout_ref.actor.optim.lr={grpo.learning_rate!r}",
        f"actor_rollout_ref.actor.clip_ratio_low={grpo.clip_low!r}",
        f"actor_rollout_ref.actor.clip_ratio_high={grpo.clip_high!r}",
        f"actor_rollout_ref.rollout.temperature={config.rollout.temperature!r}",
        f"actor_rollout_ref.rollout.n={grpo.group_size}",
        f"data.train_batch_size={grpo.prompts}",
    ]
    return "\n".join([*lines, *(f"# no key for: {text}" for text in _without_a_key(config))]) + "\n"


def _mean(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return "no outcome"
    return (
        f"{fmean(accuracies):.4f} ({'mean of ' if len(accuracies) > 1 else ''}{len(accuracies)} "
        f"replicate{'s'[: len(accuracies) > 1]})"
    )


def _without_a_key(config: TrialConfig) -> list[str]:
    noise, default = config.noise, type(config.noise)()
    named = {
        f"noise.{name}": getattr(noise, name)
        for name in ("schedule", "layers", "layer_multipliers", "zones", "scale", "placement", "final_norm")
        if noise.sigma_start > 0 and getattr(noise, name) != getattr(default, name)
    }
    always, plain = ("weights", "activations", "scale_rule"), type(config.quant)()
    quant = {
        f"quant.{name}": getattr(config.quant, name)
        for name in type(config.quant).model_fields
        if name in always or getattr(config.quant, name) != getattr(plain, name)
    }
    if config.rollout.correction != "none":
        named["rollout.correction"] = config.rollout.correction
    return [f"{key}={value}" for key, value in (named | quant).items()]


EXPORTS = {"yaml": to_yaml, "verl": to_verl}

"""The best configuration, taken away: a YAML file that runs again, or the lines another trainer understands.

Best means best feasible: the highest median accuracy on the selection questions among configurations of which no replicate
collapsed or failed. It is a *candidate*: choosing and judging on the same questions flatters the winner, so nothing here says
better or worse.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from search.tracking import TrialRecord, load_config
from spaces.config import ConfigError, TrialConfig
from spaces.reading import as_tree, dump_yaml, read_config

ACCURACY = "eval/accuracy"


@dataclass(frozen=True, slots=True, kw_only=True)
class BestConfig:
    """A candidate with its provenance."""

    sweep: str
    arm: str
    origin: str
    """control | point | searcher | ..."""
    run_ids: tuple[str, ...]
    accuracy: float
    """Median over replicates, on the selection questions."""
    accuracies: tuple[float, ...]
    control_accuracy: float | None
    """Median of the control with the same filter policy; None when it did not complete."""
    config: TrialConfig
    """Of replicate 0, with its seed and threads: `rin trial --config` repeats that run."""


def by_arm(records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Records of each configuration in order of their first start, replicates in order."""
    arms: dict[str, list[TrialRecord]] = defaultdict(list)
    for record in records:
        arms[record.arm].append(record)
    return {arm: sorted(runs, key=lambda run: run.replicate) for arm, runs in arms.items()}


def control_of(record: TrialRecord, arms: Mapping[str, Sequence[TrialRecord]]) -> Sequence[TrialRecord]:
    """The control's replicates with the record's own filter policy: the policy alone moves an accuracy by points."""
    policy = _policy(record)
    for runs in arms.values():
        if runs[0].origin == "control" and _policy(runs[0]) == policy:
            return runs
    return ()


def _policy(record: TrialRecord) -> tuple[str | None, str | None]:
    filter_groups = record.params.get("grpo.filter_groups")
    return filter_groups, record.params.get("grpo.max_gen_batches") if filter_groups == "resample" else None


def feasible(runs: Sequence[TrialRecord], replicates: int = 1) -> bool:
    """Every replicate ran to its end, and `replicates` of them did."""
    return len(runs) >= replicates and all(run.status == "completed" and ACCURACY in run.metrics for run in runs)


def choose_best(sweep: str, records: Sequence[TrialRecord], uri: str, replicates: int = 1) -> BestConfig:
    """The best feasible configuration of a sweep of so many replicates. Raises ConfigError when there is none."""
    arms = by_arm(records)
    scores = {arm: median(run.metrics[ACCURACY] for run in runs) for arm, runs in arms.items() if feasible(runs, replicates)}
    if not scores:
        ended = ", ".join(f"{arm} {runs[0].status}" for arm, runs in arms.items()) or "no trial ran"
        raise ConfigError(f"sweep {sweep}: no configuration completed ({ended}); try smaller sigmas, or collapse.mode=monitor")
    arm = max(scores, key=lambda name: scores[name])
    runs = arms[arm]
    control = control_of(runs[0], arms)
    return BestConfig(
        sweep=sweep,
        arm=arm,
        origin=runs[0].origin,
        run_ids=tuple(run.run_id for run in runs),
        accuracy=scores[arm],
        accuracies=tuple(run.metrics[ACCURACY] for run in runs),
        control_accuracy=median(run.metrics[ACCURACY] for run in control) if control and feasible(control) else None,
        config=read_config(load_config(uri, runs[0].run_id), origin=f"run {runs[0].run_id}"),
    )


def to_yaml(best: BestConfig) -> str:
    """`rin trial --config` repeats the trial from this text alone."""
    control = "did not complete" if best.control_accuracy is None else f"{best.control_accuracy:.4f}"
    return dump_yaml(
        as_tree(best.config),
        comment=(
            f"candidate of sweep {best.sweep}: configuration {best.arm}, MLflow runs {' '.join(best.run_ids)}\n"
            f"accuracy on the selection questions: median {best.accuracy:.4f} of {len(best.accuracies)} replicate(s); control {control}\n"
            "a candidate is not a finding: it was chosen and judged on the same questions\n"
            "repeat its first replicate: rin trial --config FILE"
        ),
    )


def to_verl(best: BestConfig) -> str:
    """Override lines for the trainer of the plan. What it has no key for stands as a comment: there it would be dropped in
    silence."""
    config = best.config
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
    lines += [
        f"++algorithm.filter_groups.enable={grpo.filter_groups != 'off'}",
        f"++algorithm.filter_groups.max_num_gen_batches={grpo.max_gen_batches if grpo.filter_groups == 'resample' else 1}",
        f"actor_rollout_ref.actor.optim.lr={grpo.learning_rate!r}",
        f"actor_rollout_ref.actor.clip_ratio_low={grpo.clip_low!r}",
        f"actor_rollout_ref.actor.clip_ratio_high={grpo.clip_high!r}",
        f"actor_rollout_ref.rollout.temperature={config.rollout.temperature!r}",
        f"actor_rollout_ref.rollout.n={grpo.group_size}",
        f"data.train_batch_size={grpo.prompts}",
    ]
    return "\n".join([*lines, *(f"# no key for: {text}" for text in _without_a_key(config))]) + "\n"


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

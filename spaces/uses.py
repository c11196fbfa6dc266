"""Which settings have a use, and under which others: one table.

Whoever gives a setting that can change nothing believes that it ran. So what is *given* (by --set, in a file of
settings, in a space) is refused where no number that a trial computes could hang on it, with what it would need.
Defaults are not given, and a file that holds a whole trial (`rin export` writes them) is a record: a control has a
sigma_end, too.

What hangs on the schedule is found by computing it: two settings that lead to the same sigma in every step are one.
What only the model can tell (a pattern that matches no layer, a zone without a block) is refused when it is loaded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from spaces.config import (
    CONVERSATIONS,
    FOREIGN,
    MARKED,
    TAKEN_BY,
    CollapseConfig,
    ConfigError,
    NoiseConfig,
    Schedule,
    TrialConfig,
    Zone,
    ZoneSigma,
)
from spaces.reading import flatten_fields
from spaces.schedules import is_quiet, sigma_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """When a setting can change something."""

    holds: Callable[[TrialConfig], bool]
    needs: str
    """The same in words, for whoever gave it in vain."""


def idle(config: TrialConfig) -> set[str]:
    """Keys whose value changes nothing in this trial."""
    return {key for key, use in USES.items() if not use.holds(config)}


def refuse_idle(given: Mapping[str, Any], configs: Sequence[TrialConfig], origin: str) -> None:
    """Raises ConfigError for a setting that was given and has a use in none of the configurations. `origin`: who gave
    it, ending where the key begins. Whoever gives nothing (null, {}, false, 0) takes away, and asks for nothing."""
    for _, known in without_use(given, configs):
        raise ConfigError(
            f"{origin}{known}={setting(configs[0], known)}: does nothing here, it needs {USES[known].needs}; "
            "leave it out"
        )


def without_use(given: Mapping[str, Any], configs: Sequence[TrialConfig]) -> Iterator[tuple[str, str]]:
    """(key as it was given, setting in it that changes nothing in any of the configurations)."""
    useless = set.intersection(*(idle(config) for config in configs))
    for key in (key for key, value in leaves(given).items() if value not in (None, {}, [], False)):
        for known in sorted(useless):
            if known == key or known.startswith(f"{key}.") or key.startswith(f"{known}."):
                yield key, known


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything that a tree gives; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= leaves(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def is_record(tree: Mapping[str, Any]) -> bool:
    """Whether it holds a whole trial, or most of one that another version wrote."""
    every = set(flatten_fields(TrialConfig))
    return 2 * len(every & leaves(tree).keys()) > len(every)


SCHEDULE = ("noise.sigma_start", "noise.sigma_end", "noise.num_stages", "noise.schedule")
"""Keys that a trial knows by its timetable alone."""


def timetable(config: TrialConfig) -> tuple[tuple[float, ...], ...]:
    """Of each step: whether it belongs to the quiet baseline, then sigma of the global pair and of each zone. All that
    a trial knows of its schedule."""
    noise, steps = config.noise, config.grpo.steps
    pairs: list[NoiseConfig | ZoneSigma] = [noise, *noise.zones]
    return tuple(
        (
            float(is_quiet(noise, step, steps)),
            *(float(f"{sigma_of(noise, p.sigma_start, p.sigma_end, step, steps):.9g}") for p in pairs),
        )
        for step in range(steps)
    )


def _with_noise(config: TrialConfig, **changes: Any) -> TrialConfig:
    return config.model_copy(update={"noise": config.noise.model_copy(update=changes)})


def is_noisy(config: TrialConfig) -> bool:
    """A control is not."""
    return config.noise.sigma_start > 0


def _judged(config: TrialConfig) -> bool:
    return config.collapse.mode != "off"


def _can_fire(config: TrialConfig) -> bool:
    """Rules about levels look at the steps after the quiet ones, and want so many in a row."""
    steps = config.grpo.steps
    loud = sum(not is_quiet(config.noise, step, steps) for step in range(steps))
    return _judged(config) and loud >= config.collapse.patience


def _pair_is_used(config: TrialConfig) -> bool:
    """Not every chosen block has a zone's own pair."""
    noise = config.noise
    own = {zone.zone for zone in noise.zones}
    return noise.final_norm or not (own >= set(get_args(Zone)) or noise.layers in own)


def _end_is_used(config: TrialConfig) -> bool:
    changed = _with_noise(config, sigma_end=config.noise.sigma_end / 2)
    return is_noisy(config) and _pair_is_used(config) and timetable(changed) != timetable(config)


def _schedule_is_used(config: TrialConfig) -> bool:
    """qerl_paper counts stages in a way of its own; of the others, one is as good as another without a decay."""
    here, own = timetable(config), config.noise.schedule
    others = set(get_args(Schedule)) - ({own} if own == "qerl_paper" else {own, "qerl_paper"})
    return is_noisy(config) and any(timetable(_with_noise(config, schedule=other)) != here for other in others)


def _quantized(config: TrialConfig) -> bool:
    return {config.quant.weights, config.quant.activations} != {"none"}


def _sharded(config: TrialConfig) -> bool:
    return config.parallel.ranks > 1 and config.parallel.weights == "sharded"


def _recipe(of: Callable[[Any], bool]) -> Callable[[TrialConfig], bool]:
    return lambda config: config.model.recipe is None or of(config.model.recipe)


def _of_kinds(kinds: Sequence[str]) -> Use:
    return Use(holds=lambda config: config.task.kind in kinds, needs=f"task.name={' or '.join(kinds)}")


_NOISE = Use(holds=is_noisy, needs="noise.sigma_start above 0")
_LORA = Use(holds=lambda c: c.model.adapter == "lora", needs="model.adapter=lora")
_FORMAT = Use(holds=_quantized, needs="a format in quant.weights or quant.activations")
_VLLM = Use(holds=lambda c: c.rollout.backend == "vllm", needs="rollout.backend=vllm")
_CHILD = Use(
    holds=lambda c: (c.rollout.backend, c.rollout.engine) == ("vllm", "process"),
    needs="rollout.backend=vllm and rollout.engine=process",
)
_TEXT = Use(holds=lambda c: c.task.name != "addition", needs="a task of texts (gsm8k, reasoning_gym:...)")
_CHAT = Use(holds=lambda c: c.task.in_template, needs="task.chat=true, or a task of conversations without task.prompt")
_REWARDS = Use(holds=lambda c: bool(c.task.reward), needs="task.reward")
_WORKER = Use(holds=lambda c: bool(c.task.reward) or c.task.kind in FOREIGN, needs="task.reward")
_SIGNED = Use(holds=_recipe(lambda r: r.signed_steps > 0), needs="model.recipe.signed_steps above 0")
_RULE = Use(
    holds=_can_fire,
    needs="collapse.mode enforce or monitor, and at least collapse.patience steps after the quiet stage",
)
_GRADIENT = Use(
    holds=lambda c: _can_fire(c) and c.noise.num_stages > 1,
    needs=f"noise.num_stages above 1 (quiet steps to compare gradients with), {_RULE.needs}",
)

USES: dict[str, Use] = {
    "model.recipe.batch_size": Use(
        holds=_recipe(lambda r: r.clean_steps + r.signed_steps > 0), needs="steps of the recipe"
    ),
    "model.recipe.clean_learning_rate": Use(
        holds=_recipe(lambda r: r.clean_steps > 0), needs="model.recipe.clean_steps above 0"
    ),
    "model.recipe.signed_learning_rate": _SIGNED,
    "model.recipe.signed_share": _SIGNED,
    "model.lora_rank": _LORA,
    "model.lora_alpha": _LORA,
    "quant.scale_rule": Use(
        holds=lambda c: bool({c.quant.weights, c.quant.activations} & {"mxfp4", "mxfp8"}),
        needs="mxfp4 or mxfp8 in quant.weights or quant.activations",
    ),
    "quant.hadamard": _FORMAT,
    "quant.backward": Use(
        holds=lambda c: c.quant.weights != "none" or (c.quant.activations != "none" and c.model.adapter == "full"),
        needs="a format in quant.weights (in quant.activations with model.adapter=full)",
    ),
    "quant.exclude": _FORMAT,
    "quant.skip_layers": _FORMAT,
    "noise.sigma_start": Use(
        holds=lambda c: not is_noisy(c) or _pair_is_used(c), needs="a chosen block without a pair in noise.zones"
    ),
    "noise.sigma_end": Use(
        holds=_end_is_used,
        needs="noise.sigma_start above 0, a noise.schedule that decays, 3 stages that are reached, and a block without "
        "a pair in noise.zones",
    ),
    "noise.num_stages": Use(
        holds=lambda c: is_noisy(c) or _judged(c), needs="noise.sigma_start above 0, or collapse rules with a baseline"
    ),
    "noise.schedule": Use(
        holds=_schedule_is_used,
        needs="noise.sigma_start above noise.sigma_end, and noise.num_stages of at least 3 that are reached",
    ),
    "noise.modules": _NOISE,
    "noise.final_norm": _NOISE,
    "noise.layers": _NOISE,
    "noise.layer_multipliers": _NOISE,
    "noise.scale": _NOISE,
    "noise.placement": Use(
        holds=lambda c: is_noisy(c) and "linear" in c.noise.modules and c.quant.weights != "none",
        needs="noise.sigma_start above 0, linear in noise.modules, and a format in quant.weights",
    ),
    "grpo.generation_prompts": Use(
        holds=lambda c: c.grpo.filter_groups != "off", needs="grpo.filter_groups=drop or resample"
    ),
    "grpo.max_gen_batches": Use(
        holds=lambda c: c.grpo.filter_groups == "resample", needs="grpo.filter_groups=resample"
    ),
    "grpo.micro_batch_size": Use(
        holds=lambda c: c.grpo.micro_batch_tokens is None, needs="grpo.micro_batch_tokens=null, which takes its place"
    ),
    "grpo.checkpoint_activations": Use(
        holds=lambda c: not _sharded(c), needs="parallel.weights=whole, as shards are always computed again"
    ),
    "grpo.overlong_penalty": Use(holds=lambda c: c.grpo.overlong_buffer > 0, needs="grpo.overlong_buffer above 0"),
    "rollout.engine": _VLLM,
    "rollout.kv_cache_gib": _VLLM,
    "rollout.sleep": _VLLM,
    "rollout.start_seconds": _CHILD,
    "rollout.answer_seconds": _CHILD,
    "task.digits": Use(holds=lambda c: c.task.name == "addition", needs="task.name=addition"),
    **{f"task.{field}": _of_kinds(kinds) for field, kinds in TAKEN_BY.items()},
    "task.prompt": _TEXT,
    "task.chat": Use(
        holds=lambda c: c.task.name != "addition" and not (c.task.kind in CONVERSATIONS and c.task.prompt is None),
        needs="prompts that are texts (conversations are in the chat template anyway)",
    ),
    "task.reward_weights": _REWARDS,
    "task.reward_options": Use(
        holds=lambda c: bool(c.task.reward) or c.task.kind == "python", needs="task.reward, or task.name=python"
    ),
    "task.correct_at": Use(holds=lambda c: c.task.kind in MARKED, needs=f"task.name={' or '.join(MARKED)}"),
    "task.reward_timeout_seconds": _WORKER,
    "task.reward_check": _WORKER,
    "task.reward_sha256": _WORKER,
    "task.chat_options": _CHAT,
    "task.chat_date": _CHAT,
    "eval.draw": Use(
        holds=lambda c: c.eval.split == "confirm" and c.task.endless,
        needs="eval.split=confirm and a task whose questions are endless",
    ),
    "eval.every": Use(holds=lambda c: c.eval.every < c.grpo.steps, needs="to be below grpo.steps (0 = not in between)"),
    "parallel.weights": Use(holds=lambda c: c.parallel.ranks > 1, needs="parallel.ranks above 1"),
    "collapse.patience": Use(holds=_judged, needs="collapse.mode enforce or monitor"),
    **{
        f"collapse.{name}": _GRADIENT if name.startswith("grad_norm") else _RULE
        for name in CollapseConfig.model_fields
        if name not in ("mode", "patience")
    },
}
"""Key -> what it hangs on; every other key always counts. Sizes of what is computed at once (`batch_size`,
`micro_batch_size`, `micro_batch_tokens`) and `checkpoint_activations` change memory and time, `threads` the order of
sums."""


def setting(config: TrialConfig, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def given_twice(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value below, value above) of every setting that one tree gives and another one above it gives otherwise."""
    above = leaves(upper)
    for key, value in leaves(lower).items():
        if key in above and not same(value, above[key]):
            yield key, value, above[key]


def same(one: Any, other: Any) -> bool:
    """Two values as they were written; a single name stands for a list of one."""
    a, b = (list(value) if isinstance(value, list | tuple) else [value] for value in (one, other))
    return a == b

"""The rules of `rin audit`: what each looks at, what it means, what to do.

Each is a row: an id, how bad it is, a function from runs to hits, a sentence and a remedy. The facts behind them were
read in the code of these systems (versions: `search/option_names/`); what is an inference is told as one. `wrong`: the
run is not the one that its file describes. `doubt`: it is, and does not carry its conclusion.

Rules look at what stands in the files. A rule that would need the model, the data or the clock is not here.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from search.audit.run import UNKNOWN, Run
from search.foreign import option_names

Severity = Literal["wrong", "doubt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    run: Run
    line: int
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the rule's sentence and remedy name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    id: str
    severity: Severity
    looks_at: str
    find: Callable[[Sequence[Run]], Iterator[Hit]]
    message: str
    """With {names} of a hit's values."""
    remedy: str


Look = Callable[[Run], Iterator[Hit]]
N, H, F = "trainer.noise_injection", "trainer.hw_error_injection", "algorithm.filter_groups"
ROLLOUT, MODEL = "actor_rollout_ref.rollout", "actor_rollout_ref.model"


def _each(look: Look, *systems: str) -> Callable[[Sequence[Run]], Iterator[Hit]]:
    """Run by run, of these systems; of all where none is named."""

    def find(runs: Sequence[Run]) -> Iterator[Hit]:
        for run in runs:
            if not systems or run.system in systems:
                yield from look(run)

    return find


def _fork(look: Look) -> Callable[[Sequence[Run]], Iterator[Hit]]:
    """Settings of the plan's fork."""
    return _each(lambda run: look(run) if run.given else iter(()), "verl")


# --- keys -------------------------------------------------------------------------------------------------------------

DROPPED = {
    f"{N}.layer_sigma_config": "it is read in the rollout, and nobody brings it there: the noise is uniform",
    f"{N}.target_layers": "nothing reads it: all layers get noise",
    f"{N}.use_variable_sigma": "nothing reads it: the noise is uniform",
    f"{N}.layer_multipliers": "nothing reads it: the noise is uniform",
    f"{N}.zone_schedule": "nothing reads it: the noise is uniform",
    f"{H}.use_ste": "it is not brought to the workers, which use their default, True",
    f"{H}.stochastic_rounding": "it is not brought to the workers, which round to nearest",
    f"{H}.mxfp4_stochastic_rounding": "it is not brought to the workers, which round to nearest",
    f"{H}.nvfp4_stochastic_rounding": "it is not brought to the workers, which round to nearest",
    f"{H}.mxfp4_block_2d": "it is not brought to the workers, which take blocks in a row",
}
"""Keys of the fork that stand in scripts and reach nothing."""


def _dropped(run: Run) -> Iterator[Hit]:
    for setting in run.given:
        for key, what in DROPPED.items():
            if setting.key == key or setting.key.startswith(f"{key}."):
                yield Hit(run=run, line=setting.line, values={"key": setting.key, "what": what})


def _unknown(run: Run) -> Iterator[Hit]:
    for setting in run.given:
        key = setting.key
        if run.knows(key) or any(key == known or key.startswith(f"{known}.") for known in DROPPED):
            continue
        if run.system == "trl" and "." in key:  # our own records, which check themselves
            continue
        names = option_names(run.system)
        nearest = names.nearest(key)
        if run.system == "trl" and run.entry and nearest is None:  # a script has arguments of its own, too
            continue
        yield Hit(
            run=run,
            line=setting.line,
            values={
                "key": key,
                "origin": names.origin,
                "so": "nothing reads it" if setting.added and "." in key else "the run does not start",
                "meant": f"did you mean {nearest}? " if nearest else "",
            },
        )


def _twice(run: Run) -> Iterator[Hit]:
    before: dict[str, Any] = {}
    for setting in run.given:
        known = UNKNOWN not in (setting.value, before.get(setting.key))
        if setting.key in before and known and before[setting.key] != setting.value:
            values = {"key": setting.key, "first": before[setting.key], "last": setting.value}
            yield Hit(run=run, line=setting.line, values=values)
        before[setting.key] = setting.value


SWITCHES = {
    f"{N}.enabled": f"{N}.",
    f"{H}.enabled": f"{H}.",
    f"{F}.enable": f"{F}.",
    "reward_model.overlong_buffer.enable": "reward_model.overlong_buffer.",
    "reward.reward_kwargs.overlong_buffer_cfg.enable": "reward.reward_kwargs.overlong_buffer_cfg.",
    "actor_rollout_ref.actor.fsdp_config.qat.enable": "actor_rollout_ref.actor.fsdp_config.qat.",
}
"""Switch -> what it switches; all are off by default."""


def _switched_off(run: Run) -> Iterator[Hit]:
    """Who gives nothing (null, 0, []) gives nothing in vain; who switches a filter off in so many words keeps its
    settings for the next run."""
    for switch, section in SWITCHES.items():
        below = [s for s in run.given if s.key.startswith(section) and s.key != switch and s.value]
        plain = switch in run.settings and "_injection" not in switch
        if below and not plain and run.value(switch, False) is False:
            said = "is False" if switch in run.settings else "is not set, and False by default"
            yield Hit(
                run=run,
                line=below[0].line,
                values={"keys": f"{below[0].key} and {len(below) - 1} more", "switch": switch, "said": said}
                if len(below) > 1
                else {"keys": below[0].key, "switch": switch, "said": said},
            )


def _model_without_nvfp4(run: Run) -> Iterator[Hit]:
    name = run.value("model_name", UNKNOWN)
    if "sigma_start" in run.settings and isinstance(name, str) and name and "nvfp4" not in name.lower():
        yield Hit(run=run, line=run.line("model_name"), values={"name": name})


# --- targets ----------------------------------------------------------------------------------------------------------

_NORMS = ("input_layernorm", "post_attention_layernorm")
_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def _names(layer_types: Sequence[str]) -> list[str]:
    """Modules of a model as vLLM names them, in 100 blocks (patterns are substrings of these)."""
    blocks = [f"model.layers.{n}" for n in range(100)]
    norms = [f"{b}.{name}" for b in blocks for name in (*_NORMS, "self_attn.q_norm", "self_attn.k_norm")]
    linears = [f"{b}.{name}" for b in blocks for name in (*_LINEARS, "mlp.gate", "mlp.experts", "mlp.shared_expert")]
    linears = [name for linear in linears for name in (linear, f"{linear}.base_layer", f"{linear}.lora_A")]
    return (["model.norm", *norms] if "rmsnorm" in layer_types else []) + (
        ["lm_head", *linears] if "linear" in layer_types else []
    )


def _layer_types(run: Run) -> Any:
    """UNKNOWN holds neither kind."""
    types = run.value(f"{N}.layer_types")
    return () if types is UNKNOWN else types or ["rmsnorm"]


def _targets_nothing(run: Run) -> Iterator[Hit]:
    types, targets = _layer_types(run), run.value(f"{N}.target_modules") or []
    excluded = run.value(f"{N}.exclude_patterns") or []
    given = [run.value(f"{N}.{key}") for key in ("layer_types", "target_modules", "exclude_patterns")]
    if not run.noisy or UNKNOWN in given or not all(isinstance(value, list) for value in (types, targets, excluded)):
        return
    hit = [
        name
        for name in _names(types)
        if (not targets or any(str(t) in name for t in targets)) and not any(str(e) in name for e in excluded)
    ]
    if not hit:
        key = next(
            f"{N}.{key}" for key in ("target_modules", "layer_types", "exclude_patterns") if run.value(f"{N}.{key}")
        )
        yield Hit(run=run, line=run.line(key), values={"key": key, "value": run.value(key)})


def _layer_by_substring(run: Run) -> Iterator[Hit]:
    for key in (f"{N}.target_modules", f"{N}.exclude_patterns", f"{H}.exclude_modules", f"{H}.target_modules"):
        for pattern in run.value(key) if isinstance(run.value(key), list) else []:
            found = re.search(r"layers\.([1-9])$", str(pattern))
            if found:
                n = found[1]
                yield Hit(run=run, line=run.line(key), values={"key": key, "pattern": pattern, "n": n})


def _adapters_noised(run: Run) -> Iterator[Hit]:
    types, excluded = _layer_types(run), run.value(f"{N}.exclude_patterns") or []
    noised = _lora(run) and run.noisy and isinstance(excluded, list) and "linear" in types
    if noised and not any(str(e) in "lora_A" for e in excluded):
        yield Hit(run=run, line=run.line(f"{N}.exclude_patterns", f"{N}.layer_types"))


def _noised_twice(run: Run) -> Iterator[Hit]:
    types, excluded = _layer_types(run), run.value(f"{N}.exclude_patterns") or []
    noised = _lora(run) and run.noisy and isinstance(excluded, list) and "linear" in types
    if noised and "base_layer" not in excluded:
        yield Hit(run=run, line=run.line(f"{N}.exclude_patterns", f"{N}.layer_types"))


def _adapters_quantised(run: Run) -> Iterator[Hit]:
    excluded = run.value(f"{H}.exclude_modules") or []
    if _lora(run) and _quantised(run) and isinstance(excluded, list):
        missing = [name for name in ("lora_A", "lora_B") if not any(str(e).lower() in name.lower() for e in excluded)]
        if missing:
            key = f"{H}.exclude_modules"
            yield Hit(run=run, line=run.line(key, f"{H}.enabled"), values={"missing": " and ".join(missing)})


def _lora(run: Run) -> bool:
    return (run.number(f"{MODEL}.lora_rank") or 0) > 0


def _quantised(run: Run) -> bool:
    return run.value(f"{H}.enabled") is True and run.value(f"{H}.error_type") in ("mxfp4", "nvfp4", "fp8")


# --- schedule ---------------------------------------------------------------------------------------------------------


def _stages(run: Run) -> tuple[float | None, int]:
    """K, and where it stands."""
    key = {"verl": f"{N}.num_stages", "qerl": "num_stages", "trl": "NoiseConfig.num_stages"}.get(run.system, "")
    return run.number(key), run.line(key)


def _one_stage(run: Run) -> Iterator[Hit]:
    stages, line = _stages(run)
    if run.noisy and stages is not None and stages <= 1:
        yield Hit(run=run, line=line, values={"stages": f"{stages:g}"})


def _two_stages(run: Run) -> Iterator[Hit]:
    stages, line = _stages(run)
    if run.noisy and stages == 2:
        yield Hit(run=run, line=line)


def _sigmas(run: Run) -> tuple[float | None, float | None, int]:
    section = {"verl": f"{N}.", "trl": "NoiseConfig."}.get(run.system, "")
    return run.number(f"{section}sigma_start"), run.number(f"{section}sigma_end"), run.line(f"{section}sigma_end")


def _rises(run: Run) -> Iterator[Hit]:
    start, end, line = _sigmas(run)
    if run.noisy and start is not None and end is not None and end > start > 0:
        yield Hit(run=run, line=line, values={"start": f"{start:g}", "end": f"{end:g}"})


def _zero(run: Run) -> Iterator[Hit]:
    start, end, line = _sigmas(run)
    switched = run.system == "qerl" or run.value(f"{N}.enabled") is True
    if switched and start == 0:
        key = f"{N}.sigma_start" if run.system == "verl" else "sigma_start"
        yield Hit(run=run, line=run.line(key), values={"what": "sigma_start=0 divides 0 by 0: sigma is not a number"})
    elif run.noisy and end == 0:
        yield Hit(run=run, line=line, values={"what": "sigma_end=0 ends the noise after its first stage"})


def _epoch_aware(run: Run) -> Iterator[Hit]:
    if run.noisy and run.value(f"{N}.epoch_aware") is True:
        yield Hit(run=run, line=run.line(f"{N}.epoch_aware"))


def _restarts(run: Run) -> Iterator[Hit]:
    epochs = run.number("num_train_epochs", 1)
    if run.given and run.noisy and epochs is not None and epochs > 1 and (run.number("max_steps", -1) or 0) <= 0:
        yield Hit(run=run, line=run.line("num_train_epochs"), values={"epochs": f"{epochs:g}"})


def _loader(run: Run) -> float | None:
    """Batches of an epoch, where the file tells."""
    samples = run.number("data.train_max_samples")
    batch = run.number("data.gen_batch_size") or run.number("data.train_batch_size")
    return None if not samples or samples < 0 or not batch else samples // batch


def _scheduled(run: Run) -> float | None:
    """Steps that the fork's schedule counts."""
    loader, epochs = _loader(run), run.number("trainer.total_epochs", 30)
    return None if loader is None or epochs is None else loader * epochs


def _stages_unreached(run: Run) -> Iterator[Hit]:
    stages, _ = _stages(run)
    if run.system == "trl":
        steps, scheduled = _trl_rollouts(run), _trl_rollouts(run)
    else:
        steps = run.number("trainer.total_training_steps") or run.number("max_steps")
        scheduled = _scheduled(run) if run.system == "verl" else steps
    if not run.noisy or stages is None or stages < 3 or steps is None or steps <= 0:
        return
    line = run.line("trainer.total_training_steps", "max_steps")
    if scheduled is None:
        epochs = run.number("trainer.total_epochs", 30)
        if epochs is not None and epochs != 1:
            how = f"total_epochs={epochs:g} times the loader's batches"
            yield Hit(
                run=run,
                line=line,
                values={"steps": f"{steps:g}", "counts": how, "reached": "perhaps 1", "of": f"{stages:g}"},
            )
        return
    last = min(int((steps - 1) // (scheduled / stages)), int(stages) - 1) if scheduled else 0
    if last < stages - 1:
        values = {"steps": f"{steps:g}", "counts": f"{scheduled:g} steps", "reached": last + 1, "of": f"{stages:g}"}
        yield Hit(run=run, line=line, values=values)


def _trl_rollouts(run: Run) -> float | None:
    """TRL makes one for each `num_iterations` times `steps_per_generation` micro-batches."""
    steps = run.number("max_steps")
    if steps is None or steps <= 0:
        return None
    accumulated, size = run.number("gradient_accumulation_steps", 1), run.number("per_device_train_batch_size", 8)
    generated, iterations = run.number("generation_batch_size"), run.number("num_iterations", 1)
    per = run.number("steps_per_generation") or (generated / size if generated and size else accumulated)
    if not (accumulated and iterations and per):
        return None
    return steps * accumulated / (per * iterations)


def _filter_eats_schedule(run: Run) -> Iterator[Hit]:
    if not run.noisy or run.value(f"{F}.enable") is not True:
        return
    limit, steps, scheduled = (
        run.number(f"{F}.max_num_gen_batches", 0),
        run.number("trainer.total_training_steps"),
        None,
    )
    scheduled = _scheduled(run)
    if limit == 1 or (scheduled and steps and limit and scheduled >= steps * limit):
        return
    yield Hit(run=run, line=run.line(f"{F}.enable"), values={"limit": f"{limit:g}" if limit else "any number of"})


# --- filter -----------------------------------------------------------------------------------------------------------


def _endless(run: Run) -> Iterator[Hit]:
    limit = run.number(f"{F}.max_num_gen_batches", 0)
    if run.value(f"{F}.enable") is True and limit is not None and limit <= 0 and "main_ppo" not in run.entry:
        yield Hit(run=run, line=run.line(f"{F}.max_num_gen_batches", f"{F}.enable"), values={"limit": f"{limit:g}"})


def _without_recipe(run: Run) -> Iterator[Hit]:
    if run.value(f"{F}.enable") is True and "main_ppo" in run.entry:
        yield Hit(run=run, line=run.line(f"{F}.enable"))


def _limit_small(run: Run) -> Iterator[Hit]:
    limit, train = run.number(f"{F}.max_num_gen_batches"), run.number("data.train_batch_size")
    generated = run.number("data.gen_batch_size") or train
    if (
        run.value(f"{F}.enable") is True
        and limit
        and limit > 0
        and train
        and generated
        and limit * generated < 2 * train
    ):
        share = 100 * (1 - train / (limit * generated))
        yield Hit(
            run=run, line=run.line(f"{F}.max_num_gen_batches"), values={"limit": f"{limit:g}", "share": f"{share:.0f}"}
        )


def _limit_ignored(run: Run) -> Iterator[Hit]:
    key = f"{F}.max_num_gen_batches"
    newest = "main_dapo" not in run.entry and run.value("trainer.use_v1", True) is True
    if newest and run.value(f"{F}.enable") is True and (run.number(key) or 0) > 0:
        yield Hit(run=run, line=run.line(key), values={"limit": run.value(key)})


def _without_metric(run: Run) -> Iterator[Hit]:
    if run.value(f"{F}.enable") is True and run.value(f"{F}.metric") is None:
        yield Hit(run=run, line=run.line(f"{F}.enable"))


def _batch_of_generation(run: Run) -> Iterator[Hit]:
    train, generated = run.number("data.train_batch_size"), run.number("data.gen_batch_size")
    if (
        "main_dapo" in run.entry
        and run.value(f"{F}.enable", False) is False
        and train
        and generated
        and generated > train
    ):
        yield Hit(
            run=run,
            line=run.line("data.gen_batch_size"),
            values={"generated": f"{generated:g}", "train": f"{train:g}"},
        )


# --- evaluation -------------------------------------------------------------------------------------------------------


def _noisy_validation(run: Run) -> Iterator[Hit]:
    every = run.number("trainer.test_freq", -1)
    stages, _ = _stages(run)
    if run.noisy and every is not None and every > 0 and (stages is None or stages > 1):
        yield Hit(run=run, line=run.line("trainer.test_freq"), values={"every": f"{every:g}"})


def _noisy_evaluation(run: Run) -> Iterator[Hit]:
    if run.noisy and run.value("eval_strategy", "no") not in ("no", UNKNOWN):
        yield Hit(run=run, line=run.line("eval_strategy"))


def _one_side(run: Run) -> Iterator[Hit]:
    during = run.value(f"{H}.apply_during", "rollout")
    if _quantised(run) and during in ("rollout", "training"):
        said = "" if f"{H}.apply_during" in run.settings else " (the default)"
        other = "training" if during == "rollout" else "rollouts and validation"
        yield Hit(
            run=run,
            line=run.line(f"{H}.apply_during", f"{H}.enabled"),
            values={"during": f"{during}{said}", "other": other},
        )


def _other_precision(run: Run) -> Iterator[Hit]:
    quantised = _quantised(run) or run.system == "qerl"
    for line in run.lines if quantised else ():
        if re.search(r"\beval\w*\.py\b", line.text) and re.search(r"\b(bf16|bfloat16|float16|fp16)\b", line.text):
            yield Hit(run=run, line=line.number)


def _without_adapter(run: Run) -> Iterator[Hit]:
    for line in run.lines:
        if re.search(r"\beval[/]gsm8k(_Nemotron)?\.py\b", line.text):
            yield Hit(run=run, line=line.number)


def _hooks_in_graphs(run: Run) -> Iterator[Hit]:
    if _quantised(run) and run.value(f"{ROLLOUT}.enforce_eager", False) is False:
        yield Hit(run=run, line=run.line(f"{ROLLOUT}.enforce_eager", f"{H}.enabled"))


def _never_judged(run: Run) -> Iterator[Hit]:
    every, kept = run.number("trainer.test_freq", -1), run.number("trainer.save_freq", -1)
    if run.entry and every is not None and kept is not None and every <= 0 and kept <= 0:
        yield Hit(run=run, line=run.line("trainer.test_freq", "trainer.save_freq"))


# --- QeRL, TRL --------------------------------------------------------------------------------------------------------


def _other_classes(run: Run) -> Iterator[Hit]:
    if run.given and run.noisy and run.value("vllm_model_impl", "vllm") in ("vllm", "auto"):
        yield Hit(run=run, line=run.line("vllm_model_impl", "sigma_start"))


def _stays(run: Run) -> Iterator[Hit]:
    if run.given and run.noisy and run.value("ln", False) is False:
        yield Hit(run=run, line=run.line("ln", "sigma_start"))


def _corrected(run: Run) -> Iterator[Hit]:
    if run.noisy and run.value("use_vllm") is True and "vllm_importance_sampling_correction" not in run.settings:
        yield Hit(run=run, line=run.line("use_vllm"))


# --- several runs -----------------------------------------------------------------------------------------------------


def _launches(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.given]


def _no_control(runs: Sequence[Run]) -> Iterator[Hit]:
    noisy = [run for run in _launches(runs) if run.noisy]
    if noisy and len(noisy) == len(_launches(runs)):
        yield Hit(run=noisy[0], line=noisy[0].launch, values={"files": _count(noisy, "run")})


SEEDS = {
    "verl": ("data.seed", "actor_rollout_ref.actor.fsdp_config.seed", "actor_rollout_ref.actor.data_loader_seed"),
    "verl-upstream": ("data.seed", f"{ROLLOUT}.seed", "actor_rollout_ref.actor.data_loader_seed"),
    "trl": ("seed",),
    "qerl": ("seed",),
    "nemo-rl": ("grpo.seed",),
}


def _one_seed(runs: Sequence[Run]) -> Iterator[Hit]:
    noisy = [run for run in _launches(runs) if run.noisy]
    seeds = {tuple(str(run.value(key)) for key in SEEDS[run.system]) for run in noisy}
    if noisy and len(seeds) == 1 and not any(run.value(key) is UNKNOWN for run in noisy for key in SEEDS[run.system]):
        given = [key for key in SEEDS[noisy[0].system] if key in noisy[0].settings]
        said = f"{given[0]}={noisy[0].value(given[0])}" if given else "none is set, so it is the default"
        yield Hit(run=noisy[0], line=noisy[0].line(*given), values={"files": _count(noisy, "run"), "said": said})


def _count(items: Sequence[Any], word: str) -> str:
    return f"{len(items)} {word}{'s'[: len(items) != 1]}"


# --- logs -------------------------------------------------------------------------------------------------------------


def _in_log(pattern: str, holds: Callable[[re.Match[str]], bool] = lambda found: True) -> Look:
    """Lines that match; the groups are the values."""

    def look(run: Run) -> Iterator[Hit]:
        for line in run.lines:
            for found in re.finditer(pattern, line.text):
                if holds(found):
                    yield Hit(run=run, line=line.number, values=found.groupdict())

    return look


def _first(look: Look) -> Look:
    """One hit is enough."""

    def once(run: Run) -> Iterator[Hit]:
        yield from list(look(run))[:1]

    return once


def _noisy_validation_in_log(run: Run) -> Iterator[Hit]:
    """A validation after noise was put in and before it was left out."""
    sigma = 0.0
    for line in run.lines:
        if "Skipping noise injection during validation" in line.text:
            sigma = 0.0
        applied = re.search(
            r"\[AQN\] Applying noise injection: step=\d+/\d+, sigma_id=\d+, sigma=([\d.e-]+)", line.text
        )
        sigma = float(applied[1]) if applied else sigma
        validated = re.search(r"val-core/\S*?:\s*(?:np\.float64\()?([\d.]+)", line.text)
        if validated and sigma > 0:
            yield Hit(run=run, line=line.number, values={"sigma": f"{sigma:g}"})
            return


def _ended_early(run: Run) -> Iterator[Hit]:
    last: tuple[int, int, int] | None = None
    for line in run.lines:
        applied = re.search(r"\[AQN\] Applying noise injection: step=(\d+)/(\d+)", line.text)
        last = (int(applied[1]), int(applied[2]), line.number) if applied else last
    if last is not None and last[0] < last[1] - 1:
        yield Hit(run=run, line=last[2], values={"step": last[0], "total": last[1]})


def _disagrees(found: re.Match[str]) -> bool:
    share, right, of = float(found["share"]), int(found["right"]), int(found["of"])
    digits = len(found["share"].partition(".")[2])
    return of > 0 and abs(share - 100 * right / of) > 0.51 * 10**-digits


def _share_of_kept(run: Run) -> Iterator[Hit]:
    filtered = run.value(f"{F}.enable") is True
    for line in run.lines if filtered else ():
        if re.search(r"\bgrep\b.*(score|reward)s?/mean", line.text) and "val-core" not in line.text:
            yield Hit(run=run, line=line.number)


# --- the table --------------------------------------------------------------------------------------------------------

RULES: tuple[Rule, ...] = (
    Rule(
        id="never-arrives",
        severity="wrong",
        looks_at="keys of the plan's fork that its code drops",
        find=_fork(_dropped),
        message="{key} never takes effect: {what}",
        remedy="leave it out, and do not count the run as one with it; single blocks go by target_modules=[layers.10.]",
    ),
    Rule(
        id="unknown-key",
        severity="wrong",
        looks_at="every key, against the system's option names",
        find=_each(_unknown),
        message="{key} is no option of {origin}: {so}",
        remedy="{meant}Correct it or leave it out",
    ),
    Rule(
        id="set-twice",
        severity="wrong",
        looks_at="keys that are given twice in one launch",
        find=_each(_twice),
        message="{key} was {first} before and is {last} here: the last one holds, the first has no effect",
        remedy="keep one of the two",
    ),
    Rule(
        id="switched-off",
        severity="wrong",
        looks_at="settings of a section whose switch is off",
        find=_each(_switched_off),
        message="{keys} do nothing: {switch} {said}",
        remedy="set {switch}=True, or leave them out so that nobody believes that they ran",
    ),
    Rule(
        id="model-without-nvfp4",
        severity="wrong",
        looks_at="QeRL's model_name",
        find=_each(_model_without_nvfp4, "qerl"),
        message="sigma does nothing: QeRL adds noise only where the model's name holds nvfp4, and this is {name}",
        remedy="give the folder a name with nvfp4, or count the run as a control",
    ),
    Rule(
        id="targets-nothing",
        severity="wrong",
        looks_at="target_modules, layer_types and exclude_patterns of the noise",
        find=_fork(_targets_nothing),
        message="{key}={value} leaves no module: patterns are substrings of module names such as "
        "model.layers.0.input_layernorm, and kinds stand in layer_types (rmsnorm, linear); the noise is zero",
        remedy="name the kind in layer_types, and leave target_modules=[]",
    ),
    Rule(
        id="layer-by-substring",
        severity="wrong",
        looks_at="patterns that end in a layer's number",
        find=_fork(_layer_by_substring),
        message="{key}: {pattern} is a substring of layers.{n}0 to layers.{n}9, too",
        remedy="write {pattern}. with its second dot",
    ),
    Rule(
        id="adapters-noised",
        severity="wrong",
        looks_at="noise on linear layers beside LoRA",
        find=_fork(_adapters_noised),
        message="the noise is also added to the adapters, which are trained: exclude_patterns does not hold lora_",
        remedy="add lora_ to trainer.noise_injection.exclude_patterns",
    ),
    Rule(
        id="noised-twice",
        severity="doubt",
        looks_at="noise on linear layers beside LoRA",
        find=_fork(_noised_twice),
        message="vLLM's LoRA wrapper and the layer in it both count as linear: noise is probably drawn twice, which is "
        "1.41 times the sigma",
        remedy="add base_layer to trainer.noise_injection.exclude_patterns, and compare the count of layers in the log",
    ),
    Rule(
        id="adapters-quantised",
        severity="wrong",
        looks_at="exclude_modules of the 4-bit layers beside LoRA",
        find=_fork(_adapters_quantised),
        message="the adapters are quantised, too: exclude_modules lacks {missing} (recorded: 32.75 % against 63.84 %)",
        remedy="add lora_A, lora_B and base_layer to trainer.hw_error_injection.exclude_modules",
    ),
    Rule(
        id="one-stage",
        severity="wrong",
        looks_at="num_stages of 1 or less",
        find=_each(_one_stage, "verl", "qerl"),
        message="num_stages={stages}: the list of sigmas is empty, and there is never any noise",
        remedy="for a constant sigma take num_stages=3 or more and sigma_end=sigma_start (the first stage stays quiet)",
    ),
    Rule(
        id="two-stages",
        severity="wrong",
        looks_at="num_stages of 2",
        find=_each(_two_stages, "verl", "qerl"),
        message="num_stages=2: the decay divides 0 by 0, and sigma is not a number",
        remedy="take num_stages=3 or more",
    ),
    Rule(
        id="sigma-rises",
        severity="wrong",
        looks_at="sigma_start and sigma_end",
        find=_each(_rises, "verl", "qerl", "trl"),
        message="sigma_end={end} is above sigma_start={start}: the noise grows",
        remedy="exchange the two, or say in the file that it is meant",
    ),
    Rule(
        id="sigma-zero",
        severity="wrong",
        looks_at="a sigma of 0 in an exponential decay",
        find=_each(_zero, "verl", "qerl"),
        message="{what}",
        remedy="switch the noise off for a control; for little noise give a small sigma_end above 0",
    ),
    Rule(
        id="epoch-aware",
        severity="wrong",
        looks_at="trainer.noise_injection.epoch_aware",
        find=_fork(_epoch_aware),
        message="epoch_aware=True hands the injector step 0, which is its quiet stage: there is never any noise",
        remedy="leave epoch_aware out",
    ),
    Rule(
        id="stages-unreached",
        severity="wrong",
        looks_at="steps of the run, steps that the schedule counts, stages",
        find=_each(_stages_unreached, "verl", "qerl", "trl"),
        message="the run has {steps} steps and its schedule counts {counts}: it gets as far as stage {reached} of {of}",
        remedy="make both equal (the fork counts total_epochs x batches of the loader: total_epochs=1, "
        "data.train_max_samples = steps x batch), or take fewer stages",
    ),
    Rule(
        id="schedule-restarts",
        severity="wrong",
        looks_at="num_train_epochs of QeRL",
        find=_each(_restarts, "qerl"),
        message="num_train_epochs={epochs}: QeRL counts the step anew in every epoch and divides by the steps of all: "
        "each epoch has the first stages alone",
        remedy="num_train_epochs=1 on data that are long enough",
    ),
    Rule(
        id="filter-eats-schedule",
        severity="wrong",
        looks_at="a schedule by the loader's batches beside a filter that spends them",
        find=_fork(_filter_eats_schedule),
        message="the filter may spend {limit} batches on a step, the schedule counts batches: the run ends before its "
        "last stages, and at another sigma than one without rejections",
        remedy="give total_training_steps and batches for all of them (rin export --to verl stretches the schedule), "
        "or filter_groups.enable=False",
    ),
    Rule(
        id="endless-filter",
        severity="wrong",
        looks_at="algorithm.filter_groups.max_num_gen_batches of 0",
        find=_fork(_endless),
        message="max_num_gen_batches={limit} is no limit: a collapsed model generates for ever, and looks like a hang",
        remedy="set a limit, for example 5, and take reaching it for a result",
    ),
    Rule(
        id="filter-without-recipe",
        severity="wrong",
        looks_at="the filter beside main_ppo of the plan's fork",
        find=_fork(_without_recipe),
        message="filter_groups is read by recipe.dapo.main_dapo alone: main_ppo trains on every group",
        remedy="start recipe.dapo.main_dapo, or leave the filter out",
    ),
    Rule(
        id="filter-limit-small",
        severity="doubt",
        looks_at="the filter's limit against the two batch sizes",
        find=_each(_limit_small, "verl", "verl-upstream"),
        message="max_num_gen_batches={limit} ends the run where {share} % of the groups are alike; healthy runs have "
        "22 to 66 %",
        remedy="raise max_num_gen_batches, or data.gen_batch_size",
    ),
    Rule(
        id="limit-ignored",
        severity="wrong",
        looks_at="the filter's limit in verl's newest trainer",
        find=_each(_limit_ignored, "verl-upstream"),
        message="max_num_gen_batches={limit} is ignored by main_ppo with use_v1=True: nothing ends the search for "
        "groups",
        remedy="run recipe.dapo.main_dapo, or watch training/filter_groups/evicted_samples",
    ),
    Rule(
        id="filter-without-metric",
        severity="wrong",
        looks_at="algorithm.filter_groups.metric",
        find=_each(_without_metric, "verl", "verl-upstream"),
        message="filter_groups.enable=True without filter_groups.metric: the first batch ends in an error",
        remedy="set algorithm.filter_groups.metric=acc",
    ),
    Rule(
        id="filter-off-other-batch",
        severity="doubt",
        looks_at="batch sizes with the filter off",
        find=_each(_batch_of_generation, "verl", "verl-upstream"),
        message="with the filter off the DAPO recipe trains on all {generated} prompts of a generated batch, not on "
        "{train}: switching the filter changes the batch, too",
        remedy="set data.gen_batch_size={train} where filter_groups.enable=False",
    ),
    Rule(
        id="noise-in-evaluation",
        severity="wrong",
        looks_at="validation of the plan's fork while noise is on",
        find=_fork(_noisy_validation),
        message="validation every {every} steps generates with that step's noise: is_validation is never set",
        remedy="test_freq=-1 and save_freq instead; evaluate the checkpoints apart, those of the control likewise",
    ),
    Rule(
        id="noise-in-evaluation-qerl",
        severity="wrong",
        looks_at="eval_strategy of QeRL",
        find=_each(_noisy_evaluation, "qerl"),
        message="evaluations generate with that step's noise",
        remedy="eval_strategy=no; evaluate the checkpoints apart",
    ),
    Rule(
        id="quantised-on-one-side",
        severity="wrong",
        looks_at="trainer.hw_error_injection.apply_during",
        find=_fork(_one_side),
        message="apply_during={during}: {other} compute in another precision",
        remedy="set trainer.hw_error_injection.apply_during=both",
    ),
    Rule(
        id="evaluation-in-other-precision",
        severity="doubt",
        looks_at="evaluation commands beside a quantised training",
        find=_each(_other_precision, "verl", "qerl"),
        message="the evaluation loads 16 bits, and the model was trained in 4: it is another model's number",
        remedy="evaluate in the deployed precision, and say which",
    ),
    Rule(
        id="evaluation-without-adapter",
        severity="wrong",
        looks_at="QeRL's gsm8k.py, in its folder eval",
        find=_each(_without_adapter),
        message="QeRL's gsm8k.py never attaches the adapter (its issue 20): it measures the base model",
        remedy="merge the adapter first, and evaluate the merged folder",
    ),
    Rule(
        id="hooks-in-graphs",
        severity="doubt",
        looks_at="enforce_eager beside 4-bit hooks",
        find=_fork(_hooks_in_graphs),
        message="rollouts quantise by hooks, and hooks may not run in a captured CUDA graph: enforce_eager is not True",
        remedy="set actor_rollout_ref.rollout.enforce_eager=True",
    ),
    Rule(
        id="never-judged",
        severity="doubt",
        looks_at="trainer.test_freq and trainer.save_freq",
        find=_fork(_never_judged),
        message="nothing is validated and nothing saved: the end of the run is not known",
        remedy="set trainer.save_freq (and trainer.test_freq where validation is clean)",
    ),
    Rule(
        id="noise-of-other-classes",
        severity="doubt",
        looks_at="vllm_model_impl of QeRL",
        find=_each(_other_classes, "qerl"),
        message="the noise looks for transformers' RMSNorm classes, and vLLM's own implementation has others: probably "
        "nothing matches, and there is no noise",
        remedy="set vllm_model_impl=transformers, and look for a line of sigma for each norm in the log",
    ),
    Rule(
        id="noise-stays",
        severity="wrong",
        looks_at="ln of QeRL",
        find=_each(_stays, "qerl"),
        message="with ln=False no step writes the norms anew: the noise of every step stays in them and adds up",
        remedy="set ln=True",
    ),
    Rule(
        id="corrected-by-default",
        severity="doubt",
        looks_at="TRL's importance sampling correction",
        find=_each(_corrected, "trl"),
        message="with vLLM TRL masks sequences that the noise made unlikely (vllm_importance_sampling_correction=True "
        "by default): part of what the noise did is taken back",
        remedy="say it in the file: vllm_importance_sampling_correction=False, or True with its mode",
    ),
    Rule(
        id="no-control",
        severity="doubt",
        looks_at="all files together",
        find=_no_control,
        message="{files} and noise in each: nothing shows what the noise did",
        remedy="add the run without noise that shares seeds, data and filter (rin audit takes its file, too)",
    ),
    Rule(
        id="one-seed",
        severity="doubt",
        looks_at="all files together",
        find=_one_seed,
        message="{files} with noise and one seed ({said}): runs of one configuration have differed by 4.3 points",
        remedy="run three seeds or more, the same ones in the control",
    ),
    Rule(
        id="log-no-layers",
        severity="wrong",
        looks_at="[AQN] lines of a log",
        find=_each(_first(_in_log(r"\[AQN\] Applied noise to 0 (?P<kind>\S+) layers"))),
        message="noise was added to 0 {kind} layers",
        remedy="patterns are substrings of module names; name the kind in layer_types",
    ),
    Rule(
        id="log-filter-limit",
        severity="doubt",
        looks_at="num_gen_batches lines of a log",
        find=_each(_first(_in_log(r"num_gen_batches=(?P<made>\d+) >= max_num_gen_batches=(?P<limit>\d+)"))),
        message="the run ended because {made} batches held too few groups with variance: all wrong is a collapse, all "
        "right an easy data set, and both look like this",
        remedy="see critic/score/mean before it: near 0 it is a collapse of the model, near 1 it is not",
    ),
    Rule(
        id="log-noise-in-evaluation",
        severity="wrong",
        looks_at="[AQN] and val-core lines of a log",
        find=_each(_noisy_validation_in_log),
        message="this validation generated with noise of sigma {sigma}",
        remedy="evaluate the checkpoint again without noise",
    ),
    Rule(
        id="log-stages-unreached",
        severity="doubt",
        looks_at="the last [AQN] step of a log",
        find=_each(_ended_early),
        message="the last noise was that of step {step} of {total}: the schedule did not end",
        remedy="do not report it as the whole schedule; compare at a common step, or run it to the end",
    ),
    Rule(
        id="wrong-share",
        severity="wrong",
        looks_at="percentages beside their counts",
        find=_each(_in_log(r"(?P<share>\d+(?:\.\d+)?)\s*%\s*[(=,:]*\s*(?P<right>\d+)\s*/\s*(?P<of>\d+)", _disagrees)),
        message="{share} % is not {right} of {of}",
        remedy="count again, over all questions of the test set",
    ),
    Rule(
        id="other-total",
        severity="doubt",
        looks_at="counts of right answers on GSM8K",
        find=_each(_in_log(r"(?i)gsm8k.*\bacc\w*.*?\b\d+\s*/\s*(?P<of>\d{2,})\b", lambda found: found["of"] != "1319")),
        message="the total is {of}, and GSM8K has 1319 test questions: it is the share of a part, or of others",
        remedy="say which questions, and compare only runs that were asked the same ones",
    ),
    Rule(
        id="share-of-kept-groups",
        severity="doubt",
        looks_at="scores read from training where the filter is on",
        find=_each(_share_of_kept),
        message="critic/score/mean is a mean over the groups that the filter kept, near one half by construction: no "
        "accuracy",
        remedy="compare validations (val-core/...), or scores of a run with the filter off",
    ),
)

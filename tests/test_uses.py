"""The table of uses says what is so: where a key is idle nothing that a trial computes changes with it, and every key
that is not in the table changes something."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dashboards.options import SweepOptions, study_config, trial_config
from search.lineup import fixed_arms
from spaces.config import CollapseConfig, ConfigError, TaskConfig, TrialConfig
from spaces.reading import as_tree, dump_yaml, parse_overrides, read_config
from spaces.uses import USES, idle, timetable
from tests.conftest import Tiny
from tests.test_arrival import keys
from tests.test_trial import comparable, finish, weights_of, with_checksums
from trainable.metrics import SIGMA
from trainable.trial import Trial

pytestmark = pytest.mark.slow  # many seconds of computing

SHORT = ("grpo.steps=3", "eval.questions=8", "eval.every=0", "noise.sigma_start=0.05", "noise.sigma_end=0.02")
# Settings under which keys are idle, with another value for each.
IDLE: list[tuple[tuple[str, ...], list[str]]] = [
    (
        ("noise.sigma_start=0",),
        [
            *("noise.sigma_end=0.3", "noise.schedule=cosine", "noise.modules=linear", "noise.final_norm=true"),
            *("noise.layers=[0]", "noise.layer_multipliers=[0.1, 2]", "noise.scale=rms"),
            *("noise.layers=srdd:top1", "noise.layer_multipliers=srdd:deadzone"),
        ],
    ),
    (
        ("noise.num_stages=2",),
        ["noise.sigma_end=0.01", "noise.schedule=cosine", "noise.schedule=constant"],
    ),
    (("noise.num_stages=1",), ["noise.sigma_end=0.01", "noise.schedule=linear", "collapse.grad_norm_clip=0"]),
    (("noise.num_stages=1", "noise.schedule=constant"), ["noise.sigma_end=0.01"]),
    (("noise.num_stages=3", "noise.schedule=constant"), ["noise.sigma_end=0.01"]),
    (("noise.num_stages=3", "noise.sigma_end=0.05"), ["noise.schedule=linear"]),
    (("grpo.steps=2", "noise.num_stages=3"), ["noise.sigma_end=0.01", "noise.schedule=log"]),
    (
        ("noise.layers=first", "noise.zones=[{zone: first, sigma_start: 0.2, sigma_end: 0.1}]"),
        ["noise.sigma_start=0.3", "noise.sigma_end=0.001"],
    ),
    (("noise.modules=[linear]", "quant.weights=none"), ["noise.placement=after"]),
    (
        ("quant.weights=none", "quant.activations=none"),
        ["quant.exclude=[q_proj]", "quant.skip_layers=[0]", "quant.skip_layers=srdd:top1"],
    ),
    ((), ["grpo.generation_prompts=8", "grpo.max_gen_batches=2", "grpo.overlong_penalty=0.2"]),
    (("grpo.filter_groups=drop",), ["grpo.max_gen_batches=2"]),
    (("eval.every=3",), ["eval.every=9"]),
    (
        ("collapse.mode=off", "noise.num_stages=1", "noise.sigma_start=3", "noise.sigma_end=3"),
        [
            "collapse.patience=1",
            *(f"collapse.{name}=0.01" for name in ("entropy_high_floor", "mismatch_kl", "reward_floor")),
        ],
    ),
    (("collapse.patience=5", "noise.num_stages=1"), ["collapse.entropy_high_floor=0", "collapse.mismatch_kl=1e-9"]),
    (("collapse.mode=off", "noise.sigma_start=0"), ["noise.num_stages=1"]),
]
WRECKED = ("noise.num_stages=1", "noise.sigma_start=3", "noise.sigma_end=3")
LINEAR = ("noise.modules=[linear]",)
STAGES = ("noise.num_stages=3",)
# Another value for each key, and the settings under which something changes with it.
COUNTS: list[tuple[tuple[str, ...], list[str]]] = [
    (
        (),
        [
            *("seed=3", "model.attention=eager", "model.dtype=bfloat16", "model.adapter=lora", "task.digits=2"),
            *("quant.weights=mxfp8", "quant.activations=mxfp8", "quant.scale_rule=even", "quant.hadamard=true"),
            *("quant.backward=high_precision", "quant.exclude=[lm_head, q_proj]", "quant.skip_layers=[0]"),
            *("grpo.steps=2", "grpo.updates_per_step=1", "grpo.epochs=2", "grpo.prompts=6", "grpo.group_size=3"),
            *("grpo.learning_rate=1e-3", "grpo.warmup_updates=5", "grpo.weight_decay=0.5", "grpo.adam_beta2=0.5"),
            *(
                "grpo.max_grad_norm=0.01",
                "grpo.loss=dr_grpo",
                "grpo.reward=random",
                "grpo.reward=format",
                "grpo.advantage_scale=none",
                "grpo.kl_beta=0.5",
            ),
            *(
                "grpo.overlong_buffer=3",
                "grpo.filter_groups=drop",
                "rollout.temperature=0.5",
                "rollout.correction=token",
            ),
            *("rollout.correction_cap=0.1", "rollout.max_new_tokens=3", "eval.questions=9", "eval.every=1"),
            "eval.samples=2",
            *("eval.split=confirm", "parallel.ranks=2"),
        ],
    ),
    (("grpo.learning_rate=0.01",), ["grpo.clip_low=0.001", "grpo.clip_high=0.001"]),
    (("model.adapter=lora", "grpo.learning_rate=0.01"), ["model.lora_rank=2", "model.lora_alpha=2"]),
    (
        STAGES,
        [
            *("noise.sigma_start=0.3", "noise.sigma_end=0.001", "noise.schedule=constant", "noise.num_stages=1"),
            *("noise.modules=linear", "noise.final_norm=true", "noise.layers=[0]", "noise.layer_multipliers=[0.1, 2]"),
            "noise.zones=[{zone: first, sigma_start: 0.2, sigma_end: 0.1}]",
            *("noise.layers=srdd:top1", "noise.layer_multipliers=srdd:deadzone", "quant.skip_layers=srdd:top1"),
        ],
    ),
    ((*STAGES, *LINEAR), ["noise.scale=rms", "noise.placement=after"]),
    (("grpo.filter_groups=drop",), ["grpo.generation_prompts=9"]),
    (("grpo.filter_groups=resample",), ["grpo.max_gen_batches=1"]),
    (("grpo.overlong_buffer=3",), ["grpo.overlong_penalty=0.2"]),
    (("eval.split=confirm",), ["eval.draw=another"]),
    ((*WRECKED, "collapse.patience=1"), ["collapse.mode=monitor", "collapse.patience=2"]),
]
# What does not change numbers (memory, time, where things are), or in ways that nothing here shows.
ELSEWHERE = {
    *(
        "model.name",
        "task.name",
        "threads",
        "parallel.weights",  # test_sharding.py
        "hang_seconds",
        "task.path",
        "task.eval_path",
        "task.options",
        "task.prompt",
        "task.chat",
        "task.chat_options",
        "task.chat_date",
        "task.too_long",
        "task.correct_at",
        *(f"task.{name}" for name in TaskConfig.model_fields if name.startswith("reward")),  # test_foreign.py
    ),
    *("eval.batch_size", "rollout.batch_size", "rollout.max_prompt_tokens"),
    *("grpo.micro_batch_size", "grpo.micro_batch_tokens", "grpo.checkpoint_activations"),
    *("rollout.backend", "rollout.engine", "rollout.kv_cache_gib", "rollout.sleep", "rollout.start_seconds"),
    "rollout.answer_seconds",
    *(key for key in keys() if key.startswith("model.recipe.")),  # any other recipe is another base, by its hash
    *(
        f"collapse.{name}" for name in CollapseConfig.model_fields if name not in ("mode", "patience")
    ),  # test_collapse.py
}
# Idle keys for which the configuration holds no other value than the default: written, they are refused.
UNWRITABLE = [
    *("model.lora_rank=3", "model.lora_alpha=3.0", "rollout.engine=process", "rollout.kv_cache_gib=2.0"),
    "rollout.sleep=true",
    *(
        "rollout.start_seconds=3.0",
        "rollout.answer_seconds=3.0",
        "task.path=x.jsonl",
        "task.eval_path=x.jsonl",
        "task.options={a: 1}",
    ),
    *("task.reward_weights=[0.5]", "task.correct_at=0.5"),
    *("task.prompt=x", "task.chat=true", "task.chat_options={a: 1}", "task.chat_date=2025-01-02", "eval.draw=another"),
]
W16A16 = ("quant.weights=none", "quant.activations=none")


@cache
def came_to(config: TrialConfig) -> str:
    """Everything that a trial computes, but for the clock."""
    trial = with_checksums(Trial(config))  # so that rewards differ, however little the model knows
    reports = [{**comparable(report, without=(SIGMA,)), "sigma": None} for report in finish(trial)]  # as asked for
    outcome = trial.outcome()
    seen = [reports, outcome.eval, outcome.alarms, outcome.outcome, outcome.rule, outcome.receipt.noised]
    weights = [(name, p.float().numpy().tobytes()) for name, p in sorted(weights_of(trial).items())]
    return hashlib.blake2b(repr((seen, weights)).encode()).hexdigest()


@pytest.mark.parametrize(("settings", "others"), IDLE, ids=[" ".join(settings) or "default" for settings, _ in IDLE])
def test_where_the_table_calls_a_key_idle_nothing_changes_with_it(
    settings: tuple[str, ...], others: list[str], tiny: Tiny
) -> None:
    base = tiny(*SHORT, *settings)
    for other in others:
        key = other.partition("=")[0]
        changed = tiny(*SHORT, *(s for s in settings if s.partition("=")[0] != key), other)
        assert key in idle(base), key
        assert changed != base, other
        assert came_to(changed) == came_to(base), other


@pytest.mark.parametrize(
    ("settings", "others"), COUNTS, ids=[" ".join(settings) or "default" for settings, _ in COUNTS]
)
def test_where_the_table_does_not_call_it_idle_something_changes(
    settings: tuple[str, ...], others: list[str], tiny: Tiny
) -> None:
    base = tiny(*SHORT, *settings)
    for other in others:
        key = other.partition("=")[0]
        assert key not in idle(base), key
        changed = tiny(*(s for s in (*SHORT, *settings) if s.partition("=")[0] != key), other)
        assert came_to(changed) != came_to(base), other


def test_every_key_is_tried_or_said_to_change_no_number() -> None:
    tried = {other.partition("=")[0] for _, others in COUNTS for other in others}
    assert tried | ELSEWHERE == set(keys())
    assert tried & ELSEWHERE == set()
    assert set(USES) <= set(keys())


@pytest.mark.parametrize("other", UNWRITABLE)
def test_an_idle_key_is_refused_where_the_configuration_holds_no_other_value(other: str, tiny: Tiny) -> None:
    assert other.partition("=")[0] in idle(tiny())
    with pytest.raises(ConfigError, match=other.partition("=")[0].rpartition(".")[2]):
        tiny(other)


@pytest.mark.parametrize("other", ["quant.scale_rule=ceil", "quant.hadamard=true", "quant.backward=high_precision"])
def test_so_are_the_arithmetics_of_formats_where_there_is_none(other: str, tiny: Tiny) -> None:
    assert other.partition("=")[0] in idle(tiny(*W16A16))
    with pytest.raises(ConfigError):
        tiny(*W16A16, other)


# --- whoever gives one is told ----------------------------------------------------------------------------------------

DEAD: list[list[str]] = [
    ["noise.num_stages=2", "noise.schedule=cosine"],
    ["noise.num_stages=2", "noise.schedule=qerl_code"],  # the default, given
    ["noise.num_stages=2", "noise.sigma_end=0.0005"],
    ["noise.schedule=constant", "noise.sigma_end=0.001"],
    ["grpo.max_gen_batches=3"],
    ["collapse.mode=off", "collapse.patience=2"],
    ["model.lora_rank=32"],
    ["eval.every=100"],
    ["grpo.micro_batch_tokens=4096", "grpo.micro_batch_size=8"],
]


@pytest.mark.parametrize("overrides", DEAD, ids=[" ".join(overrides) for overrides in DEAD])
def test_a_setting_that_would_do_nothing_is_refused_by_every_command(overrides: list[str], tmp_path: Path) -> None:
    key, _, value = overrides[-1].partition("=")
    noisy = ["noise.sigma_start=0.05", "noise.modules=rmsnorm"]
    said = rf"{key}={value}0*: does nothing here, it needs .*; leave it out"
    for workload in ("embedded", "tiny"):
        with pytest.raises(ConfigError, match=said):
            trial_config("e13i-v3", None, workload, overrides)
        with pytest.raises(ConfigError, match=said):
            fixed_arms(study_config(SweepOptions(workload=workload, overrides=overrides, store=str(tmp_path))))
    place = tmp_path / "mine.yaml"
    place.write_text(dump_yaml(parse_overrides(overrides + noisy)))
    with pytest.raises(ConfigError, match=said):
        trial_config(None, place, None, [])
    with pytest.raises(ConfigError, match=said):
        fixed_arms(study_config(SweepOptions(points=str(place), store=str(tmp_path))))


def test_a_file_that_holds_a_whole_trial_is_a_record_and_may_hold_idle_settings(tmp_path: Path) -> None:
    place = tmp_path / "control.yaml"
    control = read_config({}, ["noise.sigma_start=0", "noise.modules=linear"])
    place.write_text(dump_yaml(as_tree(control)))
    assert trial_config(None, place, None, []) == control
    with pytest.raises(ConfigError, match=r"--set noise\.schedule=cosine: does nothing here"):
        trial_config(None, place, None, ["noise.schedule=cosine"])


def test_weights_in_shards_are_computed_again_anyway() -> None:
    asked = ["parallel.ranks=2", "grpo.checkpoint_activations=true"]
    assert trial_config("control", None, "tiny", asked).grpo.checkpoint_activations
    with pytest.raises(ConfigError, match=r"grpo\.checkpoint_activations=True: does nothing here"):
        trial_config("control", None, "tiny", [*asked, "parallel.weights=sharded"])


def test_what_nobody_watches_has_no_time_to_hang(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hang_seconds=5: does nothing here"):
        trial_config("control", None, "tiny", ["hang_seconds=5"])


def test_a_setting_with_a_use_in_one_arm_alone_is_taken(tmp_path: Path) -> None:
    given: dict[str, Any] = {"overrides": ["grpo.max_gen_batches=3"], "workload": "tiny", "store": str(tmp_path)}
    for more in ({"space": "full"}, {"points": "e13h"}):
        assert fixed_arms(study_config(SweepOptions(**given, **more)))


def test_two_schedules_with_the_same_sigmas_have_one_timetable() -> None:
    one, other = (read_config({}, ["noise.num_stages=3", f"noise.schedule={name}"]) for name in ("linear", "cosine"))
    assert timetable(one) == timetable(other) != timetable(TrialConfig())

"""Every setting of a trial arrives in another trainer's lines, or is said to have no key there."""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from search.dialects import ROWS
from search.export import EXPORTS, SCRIPT, Translation, to_trl, translate
from search.foreign import SYSTEMS, System, option_names
from spaces import config as configuration
from spaces.config import TrialConfig
from spaces.points import POINTS
from spaces.reading import as_tree, merge, parse_overrides, parse_yaml, read_config
from spaces.schedules import sigma_of
from spaces.workloads import WORKLOADS
from tests import processes
from tests.conftest import ModelFolder
from tests.written_sweeps import make_arm, study, write_sweep

RICH = [  # every setting has an effect
    "model={name: /m, recipe: null, adapter: lora}",
    "quant.exclude=[lm_head]",
    "noise={sigma_start: 0.02, sigma_end: 0.001, modules: [rmsnorm, linear], num_stages: 10}",
    "grpo={filter_groups: resample, overlong_buffer: 2, updates_per_step: 4, epochs: 2, kl_beta: 0.1}",
    "rollout={correction: token, backend: vllm, engine: process, max_new_tokens: 64}",
    "task={name: gsm8k, path: /q.jsonl, chat: true, reward: 'a.b:c'}",
]
OTHER: dict[str, Any] = {
    "model.name": "/other",
    "quant.exclude": ["lm_head", "q_proj"],
    "quant.skip_layers": [0, -1],
    "noise.modules": ["linear"],
    "noise.layers": "middle",
    "noise.layer_multipliers": [1.0, 2.0],
    "noise.zones": [{"zone": "first", "sigma_start": 0.03, "sigma_end": 0.001}],
    "noise.scale": "rms",
    "grpo.generation_prompts": 64,
    "grpo.micro_batch_tokens": 4096,
    "grpo.updates_per_step": 2,
    "grpo.epochs": 4,
    "rollout.temperature": 0.7,
    "rollout.kv_cache_gib": 2.0,
    "rollout.sleep": True,
    "task.name": "reasoning_gym:gcd",
    "task.path": "/p.jsonl",
    "task.prompt": "'Q {question}'",
    "grpo.weight_decay": 0.1,
    "task.chat_options": "{enable_thinking: false}",
    "task.chat_date": "2025-01-01",
    "task.reward": "a.b:d",
    "task.reward_options": "{penalty: 0.1}",
    "task.reward_sha256": "[abc]",
    "threads": 2,
}
ALONE = {
    "model.recipe": ["model.recipe.depth=4"],
    "task.digits": ["task.digits=2"],
    "eval.draw": ["eval={split: confirm, draw: a}"],
}
"""Settings of the embedded model."""
TOGETHER = {
    "model.adapter": ["model.adapter=full"],
    "rollout.backend": ["rollout={backend: torch, engine: inside}"],
    "task.name": ["task={name: 'reasoning_gym:gcd', path: null}"],
    "task.options": ["task={name: 'reasoning_gym:gcd', path: null, options: {max_numbers: 3}}"],
    "task.eval_path": ["task={name: open_instruct, eval_path: /e.jsonl}"],
    "task.chat": ["task.chat=false"],
    "task.reward_weights": ["task.reward_weights=[0.5]"],
    "task.correct_at": ["task={name: trl, correct_at: 0.5}"],
    "parallel.weights": ["parallel={ranks: 2, weights: sharded}"],
}


def configured(*overrides: str, base: list[str] | None = None) -> TrialConfig:
    tree: dict[str, Any] = {}
    for override in [*(RICH if base is None else base), *overrides]:
        tree = merge(tree, parse_overrides([override]))
    return read_config(tree)


def exported(to: str, config: TrialConfig) -> list[str]:
    candidate: Any = SimpleNamespace(config=config)
    return EXPORTS[to](candidate).splitlines()


def every_point() -> Iterator[TrialConfig]:
    """Every experiment of the plan on every workload, the control among them."""
    for workload in WORKLOADS.values():
        for point in POINTS.values():
            yield read_config(merge(workload.settings, point.settings))


def keys() -> Iterator[str]:
    for name, field in TrialConfig.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield from (f"{name}.{key}" for key in part.model_fields)
        else:
            yield name


def another(key: str) -> str:
    """`key=value` with a value that is not that of RICH."""
    if key in OTHER:
        return f"{key}={OTHER[key]}"
    tree: Any = as_tree(read_config(merge({}, parse_overrides([]))))
    for override in RICH:
        tree = merge(tree, parse_overrides([override]))
    section, _, leaf = key.rpartition(".")
    now = (tree[section] if section else tree)[leaf]
    field = (TrialConfig.model_fields[section].annotation if section else TrialConfig).model_fields[leaf]  # type: ignore[union-attr]
    if get_origin(field.annotation) is Literal:
        return f"{key}={next(name for name in get_args(field.annotation) if name != now)}"
    if isinstance(now, bool):
        return f"{key}={str(not now).lower()}"
    return f"{key}={now + 1 if isinstance(now, int) else now * 0.9}"


@pytest.mark.parametrize("key", keys())
def test_every_setting_is_said_in_every_system_or_has_no_key_there(key: str) -> None:
    if key in ALONE:
        plain, changed = configured(base=[]), configured(*ALONE[key], base=[])
    else:
        plain, changed = configured(), configured(*(TOGETHER.get(key) or [another(key)]))
    for system in SYSTEMS:
        before, after = translate(plain, system), translate(changed, system)
        if before == after:  # it does this value and that one anyway: only where its cell says so
            assert ROWS[key].cell(system)(changed, value_of(changed, key)) is not None, system
            assert (key, system) in INDIFFERENT, f"{key} of {system} was dropped in silence"


INDIFFERENT = {
    ("model.adapter", "trl"),  # told by the adapters' own lines
    ("task.chat", "trl"),  # told by the data set: rows of messages or of text
}


def value_of(config: TrialConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("word", ["qk_norm", "post_norm"])
def test_a_system_that_knows_norms_by_name_has_no_key_for_those_of_queries_or_behind_attention(word: str) -> None:
    config = configured(f"noise.modules=[{word}]")
    said = {system: ROWS["noise.modules"].cell(system)(config, (word,)) for system in SYSTEMS}
    assert {system for system, one in said.items() if one is not None} == {"trl"}


def test_every_setting_has_its_row() -> None:
    assert set(ROWS) == set(keys())


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_option_is_written_that_the_system_does_not_have(system: System) -> None:
    """Of all points on all workloads, and of a configuration in which every setting has an effect."""
    names = option_names(system)
    for config in (*every_point(), configured()):
        for option in translate(config, system).options:
            assert names.knows(option) or (system == "trl" and option.startswith(SCRIPT)), option


@pytest.mark.parametrize("system", SYSTEMS)
def test_option_names_say_where_they_are_from(system: System) -> None:
    names = option_names(system)
    assert any(mark in names.origin for mark in ("commit ", "release ")), names.origin
    assert len(names.names) > 150


@pytest.mark.parametrize(
    ("system", "key", "known", "nearest"),
    [
        ("verl", "trainer.noise_injection.sigma_start", True, None),
        ("verl", "trainer.noise_injection", True, None),
        ("verl", "trainer.noise_injection.layer_sigma_config", False, None),
        ("verl", "noise_injection.enabled", False, "trainer.noise_injection.enabled"),
        ("verl-upstream", "trainer.noise_injection.sigma_start", False, None),
        ("verl-upstream", "reward.reward_kwargs.overlong_buffer_cfg.len", True, None),
        ("verl", "actor_rollout_ref.actor.lr", False, "actor_rollout_ref.actor.optim.lr"),
        ("trl", "epsilon_hi", False, "epsilon_high"),
        ("qerl", "num_stages", True, None),
        ("nemo-rl", "grpo.use_dynamic_sampling", True, None),
    ],
)
def test_a_name_is_known_or_has_a_nearest_one(system: System, key: str, known: bool, nearest: str | None) -> None:
    names = option_names(system)
    assert names.knows(key) is known
    assert known or names.nearest(key) == nearest


def test_hydra_is_told_to_add_what_its_yaml_lacks() -> None:
    lines = exported("verl", configured())
    assert "++trainer.noise_injection.layer_types=[rmsnorm,linear]" in lines
    assert "trainer.noise_injection.enabled=True" in lines
    upstream = exported("verl-upstream", configured())
    assert "++reward.reward_kwargs.overlong_buffer_cfg.len=2" in upstream


NOISE, ACTOR = "trainer.noise_injection", "actor_rollout_ref.actor"


@pytest.mark.parametrize(
    ("system", "override", "said"),
    [
        ("verl", "grpo.loss=dr_grpo", {f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum-norm"}),
        ("verl-upstream", "grpo.loss=dr_grpo", {f"{ACTOR}.loss_scale_factor": 64}),
        ("verl", "grpo.loss=dapo", "grpo.loss=dapo"),  # its mean over tokens is one over a mini-batch
        ("trl", "grpo.loss=dapo", {"loss_type": "dapo"}),
        ("qerl", "grpo.loss=dapo", "grpo.loss=dapo"),
        ("nemo-rl", "grpo.loss=grpo", {"loss_fn.token_level_loss": False}),
        ("nemo-rl", "grpo.loss=dr_grpo", "grpo.loss=dr_grpo"),
        ("verl", "grpo.advantage_scale=none", {"algorithm.norm_adv_by_std_in_grpo": False}),
        ("verl", "grpo.advantage_scale=batch", "grpo.advantage_scale=batch"),
        ("trl", "grpo.advantage_scale=batch", {"scale_rewards": "batch"}),
        ("verl", "grpo.filter_groups=drop", "grpo.filter_groups=drop"),
        ("verl", "grpo.filter_groups=drop", "grpo.generation_prompts=None"),  # it would be the batch that is trained on
        ("verl", "grpo.max_gen_batches=3", {"algorithm.filter_groups.max_num_gen_batches": 3}),
        ("verl-upstream", "grpo.max_gen_batches=3", "grpo.max_gen_batches=3"),  # ignored by its newest trainer
        ("nemo-rl", "grpo.max_gen_batches=3", {"grpo.dynamic_sampling_max_gen_batches": 2}),
        ("nemo-rl", "grpo.max_gen_batches=1", "grpo.max_gen_batches=1"),
        ("nemo-rl", "grpo.generation_prompts=64", {"grpo.batch_multiplier": 2.0}),
        ("verl", "grpo.kl_beta=0.04", {f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_coef": 0.04}),
        ("verl", "grpo.warmup_updates=3", "grpo.warmup_updates=3"),  # it warms up by rollouts
        ("trl", "grpo.warmup_updates=3", {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}),
        ("qerl", "grpo.warmup_updates=3", {"warmup_steps": 3, "warmup_ratio": 0.0}),
        ("verl", "grpo.steps=29", {"trainer.total_training_steps": 29, "data.train_max_samples": 29 * 32}),
        ("verl", "grpo.filter_groups=off", {"trainer.total_epochs": 1, f"{NOISE}.num_stages": 10}),
        ("verl", "grpo.max_gen_batches=3", {"trainer.total_epochs": 3, f"{NOISE}.num_stages": 30}),
        ("trl", "grpo.steps=29", {"max_steps": 116}),  # optimizer steps
        ("verl", "grpo.epochs=1", {f"{ACTOR}.ppo_mini_batch_size": 8}),  # prompts
        ("trl", "grpo.epochs=1", {"generation_batch_size": 256, "per_device_train_batch_size": 64}),  # completions
        ("trl", "grpo.micro_batch_size=24", {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 8}),
        ("nemo-rl", "grpo.epochs=1", {"policy.train_global_batch_size": 64}),
        ("nemo-rl", "grpo.epochs=2", "grpo.updates_per_step=4"),
        ("verl", "model.lora_rank=7", {"actor_rollout_ref.model.lora_rank": 7}),
        ("qerl", "model.lora_alpha=1.5", "model.lora_alpha=1.5"),  # a whole number there
        ("qerl", "model.adapter=full", "model.adapter=full"),
        ("verl", "quant.activations=none", {"trainer.hw_error_injection.injection_point": "weight"}),
        ("verl", "quant.weights=mxfp8", "quant.weights=mxfp8"),
        (
            "verl",
            "quant.skip_layers=[0]",
            {
                "trainer.hw_error_injection.exclude_modules": [
                    *("lm_head", "embed_tokens", "lora_A", "lora_B", "base_layer", "layers.0.")
                ]
            },
        ),
        ("verl", "quant.skip_layers=[0, -1]", "quant.skip_layers=(0, -1)"),  # which is the last, it cannot know
        ("verl-upstream", "quant={weights: nvfp4, activations: none}", {f"{ACTOR}.fsdp_config.qat.mode": "w4a16"}),
        ("trl", "quant.scale_rule=even", {"QuantConfig.scale_rule": "even"}),
        ("verl", "noise.layers=[10, 11]", {f"{NOISE}.target_modules": ["layers.10.", "layers.11."]}),
        ("verl", "noise.layers=middle", "noise.layers=middle"),
        ("verl", "noise.num_stages=2", "noise.num_stages=2"),  # 0/0 there
        ("qerl", "noise.num_stages=1", "noise.num_stages=1"),  # never any noise there
        ("verl", "noise.schedule=constant", {f"{NOISE}.sigma_end": 0.02}),
        ("verl", "noise.schedule=linear", "noise.schedule=linear"),
        ("verl-upstream", "noise.sigma_start=0.03", "noise.sigma_start=0.03"),
        ("nemo-rl", "noise.sigma_start=0.03", "noise.sigma_start=0.03"),
        ("verl", "rollout.correction_cap=3", {"algorithm.rollout_correction.rollout_is_threshold": 3.0}),
        ("trl", "quant.activations=none", {"vllm_importance_sampling_mode": "token_truncate", "use_vllm": True}),
        ("trl", "seed=3", {"use_vllm": True, "for_vllm.folder": "for-vllm"}),  # so that it quantises inputs, too
        ("trl", "noise.num_stages=1", {"NoiseConfig.num_stages": 1, "CollapseConfig.mode": "enforce"}),
        ("trl", "rollout.correction=none", {"vllm_importance_sampling_correction": False}),  # on by default
        ("trl", "rollout={backend: torch, engine: inside}", "rollout.correction=token"),
        ("nemo-rl", "rollout.correction=sequence", "rollout.correction=sequence"),
        ("verl-upstream", "eval.every=0", {"trainer.test_freq": 29}),  # at the end, which happens here in any case
        ("verl", "eval.every=7", {"trainer.test_freq": -1, "trainer.save_freq": 7}),  # its validation is noisy
        ("verl", "noise.sigma_start=0", {"trainer.test_freq": 15, "trainer.save_freq": 15}),  # to be evaluated alike
        (
            *("verl", "task={name: verl, path: /t.parquet, reward: '/r.py:f', chat: false}"),
            {"data.train_files": ("/t.parquet",), "custom_reward_function.path": "/r.py"},
        ),
        ("verl", "seed=3", {"data.seed": 3, f"{ACTOR}.data_loader_seed": 3}),
        ("qerl", "seed=3", {"mask_truncated_completions": False}),  # its default is another method
        ("nemo-rl", "seed=3", {"grpo.use_leave_one_out_baseline": False}),
        ("verl", "seed=3", {f"{ACTOR}.clip_ratio_c": 1e9}),
    ],
)
def test_settings_by_hand(system: System, override: str, said: dict[str, Any] | str) -> None:
    """A dict: options with these values; a text: it has no key for that."""
    found = translate(configured(override), system)
    if isinstance(said, str):
        assert said in found.without
    else:
        assert said.items() <= found.options.items()


@pytest.mark.parametrize("override", ["grpo.filter_groups=off", "grpo.max_gen_batches=5", "noise.num_stages=7"])
def test_the_fork_s_schedule_is_ours_in_every_step_although_the_filter_spends_batches(override: str) -> None:
    """By the fork's own arithmetic, as it was read: stages over total_epochs times the loader's batches."""
    config = configured(override)
    said = translate(config, "verl").options
    start, end, stages = (said[f"{NOISE}.{key}"] for key in ("sigma_start", "sigma_end", "num_stages"))
    trend = [start * (end / start) ** (j / (stages - 2)) for j in range(stages - 1)]
    total = said["trainer.total_epochs"] * (said["data.train_max_samples"] // said.get("data.gen_batch_size", 32))
    assert total >= config.grpo.steps * config.grpo.batch_limit  # enough for every batch that the filter may spend
    for step in range(config.grpo.steps):
        stage = int(step // (total / (len(trend) + 1)))
        there = trend[min(stage - 1, len(trend) - 1)] if stage else 0.0
        assert there == pytest.approx(sigma_of(config.noise, 0.02, 0.001, step, config.grpo.steps), rel=1e-9), step


def test_what_has_no_key_and_what_differs_stands_in_every_file_as_a_comment() -> None:
    config = configured("noise.schedule=linear")
    for system in SYSTEMS:
        found: Translation = translate(config, system)
        comments = [line for line in exported(system, config) if line.startswith("#")]
        assert {f"# no key for: {setting}" for setting in found.without} <= set(comments)
        assert {f"# note: {note}" for note in found.notes} <= set(comments)


def test_what_has_no_effect_is_not_told() -> None:
    lines = exported("verl", configured("noise.sigma_start=0", base=[]))
    assert "trainer.noise_injection.enabled=False" in lines
    assert not any("sigma_end" in line or "lora_alpha" in line or "penalty" in line for line in lines)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_reward_that_nobody_gave_is_not_missed(system: System) -> None:
    assert not [line for line in translate(configured(base=[]), system).without if line.startswith("task.reward")]


def test_a_setting_of_this_machine_is_told_where_somebody_set_it() -> None:
    assert not any("hang_seconds" in setting for setting in translate(configured(), "verl").without)
    assert "hang_seconds=600.0" in translate(configured("hang_seconds=600"), "verl").without


def test_nemo_rl_s_file_is_yaml_over_its_example() -> None:
    tree = parse_yaml("\n".join(exported("nemo-rl", configured())), "export")
    assert tree["defaults"] == "grpo_math_1B.yaml"
    assert tree["policy"]["scheduler"][1] == {"milestones": []}


def test_a_trl_script_is_python_that_makes_our_own_records() -> None:
    """Each configuration that it writes is the candidate's."""
    config = configured("noise.zones=[{zone: first, sigma_start: 0.03, sigma_end: 0.001}]")
    for statement in ast.walk(ast.parse(to_trl(config))):
        if isinstance(statement, ast.Call) and ast.unparse(statement.func) in ("NoiseConfig", "QuantConfig"):
            name = ast.unparse(statement.func)
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in statement.keywords}
            assert getattr(configuration, name)(**given) == getattr(config, name[:5].lower())


@pytest.fixture(scope="module")
def trl() -> Any:
    """Without the seconds that an import of vLLM takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("trl.import_utils"), "is_vllm_available", lambda *_, **__: False)
        importlib.import_module("trl.trainer.grpo_trainer")
    return importlib.import_module("trl")


@pytest.mark.slow
def test_trl_s_options_are_those_of_the_installed_version_and_its_configuration_takes_them(trl: Any) -> None:
    from peft import LoraConfig
    from trl.rewards import get_soft_overlong_punishment

    known = {field.name for field in fields(trl.GRPOConfig) if field.init}
    assert known == set(option_names("trl").names)
    assert option_names("trl").origin == f"TRL, release {trl.__version__}"
    arguments = {"GRPOTrainer": set(inspect.signature(trl.GRPOTrainer.__init__).parameters)}
    arguments |= {"LoraConfig": {field.name for field in fields(LoraConfig)}}
    arguments |= {"get_soft_overlong_punishment": set(inspect.signature(get_soft_overlong_punishment).parameters)}
    for override in ("seed=1", "grpo.epochs=1", "grpo.micro_batch_size=24", "grpo.warmup_updates=3"):
        config = configured(override)
        for statement in ast.walk(ast.parse(to_trl(config))):
            if isinstance(statement, ast.Call) and (name := ast.unparse(statement.func)) in arguments:
                assert {keyword.arg for keyword in statement.keywords} <= arguments[name]
        given = {name: value for name, value in translate(config, "trl").options.items() if "." not in name}
        made = trl.GRPOConfig(use_cpu=True, report_to=[], **given)
        updates = made.num_iterations * made.steps_per_generation / made.gradient_accumulation_steps
        assert updates == config.grpo.updates_per_step
        assert made.max_steps == config.grpo.steps * config.grpo.updates_per_step


@pytest.mark.slow
def test_the_trl_script_runs_as_it_is_written(
    trl: Any, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters, an overlong penalty and two updates per rollout; the receipt is that of the candidate's settings."""
    rows, reward = tmp_path / "rows.jsonl", tmp_path / "rewards.py"
    rows.write_text("\n".join(json.dumps({"prompt": f"{i}+2="}) for i in range(9)))
    reward.write_text("def ones(completions, **_):\n    return [float(text.count('1')) for text in completions]\n")
    config = configured(
        f"task={{name: trl, path: {rows}, reward: '{reward}:ones', chat: false}}",
        f"model.name={model_folder(layers=2)}",
        "model.lora_rank=4",
        "noise={num_stages: 2, sigma_start: 0.05}",
        "grpo={steps: 2, prompts: 4, group_size: 4, updates_per_step: 2, epochs: 1}",
        "rollout={backend: torch, engine: inside, correction: none, max_new_tokens: 6}",
    )
    monkeypatch.chdir(tmp_path)
    done: dict[str, Any] = {"__name__": "script"}
    exec(compile(to_trl(config), "script", "exec"), done)
    assert done["trainer"].state.global_step == 4
    receipt = done["rin"].receipt()
    assert (done["rin"].rollouts, len(receipt.quantized)) == (2, 14)
    assert {effect.nominal for effect in receipt.effects} == {0.05}
    assert sum("lora_A" in name for name, _ in done["trainer"].model.named_parameters()) == 14


@pytest.mark.parametrize(
    ("kind", "system", "key", "value", "said"),
    [
        ("verl", "verl", "task.path", ("/train.parquet",), {"data.train_files": ("/train.parquet",)}),
        ("verl", "verl", "task.eval_path", ("/val.parquet",), {"data.val_files": ("/val.parquet",)}),
        (
            *("verl", "verl", "task.reward", ("/r.py:compute_score",)),
            {"custom_reward_function.path": "/r.py", "custom_reward_function.name": "compute_score"},
        ),
        ("verl", "verl-upstream", "task.reward", ("/r.py:f",), {"reward.custom_reward_function.path": "/r.py"}),
        ("verl", "verl", "task.reward", ("pack.age:f",), None),
        ("verl", "verl", "task.reward", ("/r.py:f", "/r.py:g"), None),
        ("verl", "verl", "task.reward_options", (("a", 1),), {"custom_reward_function.reward_kwargs.a": 1}),
        ("verl", "trl", "task.path", ("/train.parquet",), None),
        ("trl", "trl", "task.path", ("/a.jsonl", "/b.jsonl"), {"load_dataset.path": "json"}),
        ("trl", "trl", "task.path", ("/folder",), None),
        ("trl", "trl", "task.reward", ("/r.py:f", "pack.age:g"), {"rewards.functions": ("/r.py:f", "pack.age:g")}),
        ("trl", "trl", "task.reward_weights", (0.5,), {"reward_weights": [0.5, 1.0]}),  # of the overlong penalty
        ("trl", "verl", "task.reward", ("/r.py:f",), None),
        ("gsm8k", "trl", "task.reward", ("/r.py:f",), None),
    ],
)
def test_a_task_goes_back_to_the_trainer_that_it_came_from(
    kind: str, system: System, key: str, value: tuple[Any, ...], said: dict[str, Any] | None
) -> None:
    config = configured()
    task = config.task.model_copy(update={"name": kind, key.removeprefix("task."): value})
    found = ROWS[key].cell(system)(config.model_copy(update={"task": task}), value)
    assert (found is None) == (said is None)
    assert found is None or said is None or said.items() <= found.options.items()
    assert found is None or all(option_names(system).knows(o) or o.startswith(SCRIPT) for o in found.options)


def test_rewards_of_files_and_of_packages_are_called_in_a_trl_script() -> None:
    task = configured().task.model_copy(update={"name": "trl", "path": ("/a.jsonl",), "reward": ("/r.py:f", "p.q:g")})
    script = to_trl(configured().model_copy(update={"task": task}))
    assert "reward_funcs=[runpy.run_path('/r.py')['f'], g, get_soft_overlong_punishment(" in script
    assert "from p.q import g" in script
    ast.parse(script)


def test_the_command_exports_a_sweep_for_every_system_and_audits_what_it_wrote(tmp_path: Path) -> None:
    config = study(tmp_path)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [200, 202], "c01": [260, 262]})
    written = []
    for system in SYSTEMS:
        said = processes.rin("export", "s", "--to", system, "--store", str(tmp_path))
        assert said.code == 0, said.err
        assert f"for {option_names(system).origin}" in said.out
        assert re.search(r"sigma_start[= ]0\.01\b|noise.sigma_start=0.01", said.out), said.out
        written.append(tmp_path / f"{system}.{SUFFIX[system]}")
        written[-1].write_text(said.out)
    assert processes.rin("audit", *map(str, written)).code == 0  # each of them is recognised
    refused = processes.rin("export", "s", "--to", "toml", "--store", str(tmp_path))
    assert (refused.code, "choose one of yaml, verl, verl-upstream, trl, qerl, nemo-rl, checkpoint" in refused.err) == (
        2,
        True,
    )


SUFFIX = {"verl": "sh", "verl-upstream": "sh", "trl": "py", "qerl": "sh", "nemo-rl": "yaml"}


def test_a_trl_script_lets_vllm_begin_with_our_layers() -> None:
    lines = to_trl(configured()).splitlines()
    quantized, begun, trainer = (
        next(number for number, line in enumerate(lines) if line.startswith(start))
        for start in ("quantize(", "for_vllm(model, tokenizer, 'for-vllm')", "trainer = ")
    )
    assert quantized < begun < trainer
    assert "    processing_class=tokenizer," in lines
    assert not any(
        "for_vllm" in line for line in to_trl(configured("rollout={backend: torch, engine: inside}")).splitlines()
    )

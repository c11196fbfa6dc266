"""What a user sets arrives in every trial of the sweep, or the command ends with one line: every key of a trial, by
--set, by the file of a trial, of a space and of a point, on every shipped space, workload and point. Nothing runs: what
is looked at is the configuration of every arm that is planned, and of some that the searcher draws."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dashboards.options import SweepOptions, study_config, trial_config
from search.arms import Arm
from search.lineup import fixed_arms
from search.searchers import RinSearch
from search.store import StudyConfig
from spaces.config import ConfigError, Record, TrialConfig
from spaces.library import SPACES
from spaces.narrowing import values
from spaces.points import POINTS
from spaces.reading import dump_yaml, merge, parts, read_config, unflatten
from spaces.workloads import WORKLOADS

pytestmark = pytest.mark.slow  # many seconds of computing


def keys(model: type[Record] = TrialConfig, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings; a list of records is one."""
    for name, field in model.model_fields.items():
        inner = [] if name == "zones" else parts(field)
        for part in inner:
            yield from keys(part, f"{prefix}{name}.")
        if not inner:
            yield prefix + name


# Two trials that between them give every key a value of its own, which is the default of none.
SUMS: dict[str, Any] = {
    "model.recipe": {
        **{"depth": 3, "hidden_size": 64, "intermediate_size": 96, "heads": 2, "kv_heads": 2, "digits": 4},
        **{"batch_size": 32, "clean_steps": 7, "clean_learning_rate": 0.003, "signed_steps": 5},
        **{"signed_learning_rate": 0.0004, "signed_share": 0.3, "seed": 4},
    },
    "model.attention": "eager",
    "model.dtype": "bfloat16",
    "quant.weights": "mxfp8",
    "quant.activations": "mxfp8",
    "quant.scale_rule": "ceil",
    "quant.hadamard": True,
    "quant.backward": "high_precision",
    "quant.exclude": ["lm_head", "*.down_proj"],
    "quant.skip_layers": [0, -1],
    "noise.sigma_start": 0.03,
    "noise.sigma_end": 0.02,
    "noise.num_stages": 6,
    "noise.schedule": "log",
    "noise.modules": ["linear", "rmsnorm"],
    "noise.final_norm": True,
    "noise.layers": [0, 2],
    "noise.layer_multipliers": [0.5, 2.0],
    "noise.zones": [{"zone": "first", "sigma_start": 0.2, "sigma_end": 0.1}],
    "noise.scale": "rms",
    "noise.placement": "after",
    "grpo.steps": 12,
    "grpo.updates_per_step": 2,
    "grpo.epochs": 2,
    "grpo.prompts": 6,
    "grpo.generation_prompts": 7,
    "grpo.group_size": 3,
    "grpo.learning_rate": 2e-6,
    "grpo.warmup_updates": 3,
    "grpo.weight_decay": 0.2,
    "grpo.adam_beta2": 0.95,
    "grpo.max_grad_norm": 0.7,
    "grpo.loss": "dr_grpo",
    "grpo.clip_low": 0.1,
    "grpo.clip_high": 0.15,
    "grpo.reward": "random",
    "grpo.advantage_scale": "batch",
    "grpo.kl_beta": 0.01,
    "grpo.overlong_buffer": 2,
    "grpo.overlong_penalty": 0.4,
    "grpo.filter_groups": "resample",
    "grpo.max_gen_batches": 3,
    "grpo.micro_batch_size": 9,
    "grpo.micro_batch_tokens": None,  # where a workload has some
    "rollout.temperature": 1.1,
    "rollout.max_new_tokens": 9,
    "rollout.max_prompt_tokens": 40,
    "rollout.batch_size": 11,
    "rollout.correction": "sequence",
    "rollout.correction_cap": 3.0,
    "task.digits": 4,
    "eval.questions": 33,
    "eval.every": 5,
    "eval.samples": 3,
    "eval.batch_size": 13,
    "collapse.mode": "monitor",
    "collapse.patience": 2,
    "collapse.entropy_high_ratio": 4.0,
    "collapse.entropy_high_floor": 0.3,
    "collapse.entropy_low_ratio": 0.2,
    "collapse.length_ratio": 2.0,
    "collapse.truncation_rise": 0.35,
    "collapse.gibberish_share": 0.1,
    "collapse.repetition_rise": 0.4,
    "collapse.reward_ratio": 0.3,
    "collapse.reward_floor": 0.2,
    "collapse.grad_norm_ratio": 6.0,
    "collapse.grad_norm_clip": 0.2,
    "collapse.mismatch_kl": 2.0,
    "parallel.ranks": 3,
    "parallel.weights": "sharded",
    "hang_seconds": 99.0,
}
TEXTS: dict[str, Any] = {
    "model.recipe": None,
    "model.name": "some/model",
    "model.adapter": "lora",
    "model.lora_rank": 5,
    "model.lora_alpha": 7.0,
    "grpo.micro_batch_tokens": 900,
    "grpo.checkpoint_activations": True,
    "task.prompt": "{question}!",
    "task.chat": True,
    "task.chat_options": {"enable_thinking": False},
    "task.chat_date": "2025-01-02",
    "task.too_long": "leave_out",
    "task.reward": ["math:sqrt", "cmath:sqrt"],
    "task.reward_weights": [0.5, 0.25],
    "task.reward_options": {"penalty": 0.1},
    "task.reward_timeout_seconds": 7.0,
    "task.reward_check": "warn",
    "task.reward_sha256": ["a", "b"],
    "rollout.backend": "vllm",
    "rollout.engine": "process",
    "rollout.kv_cache_gib": 2.5,
    "rollout.sleep": True,
    "rollout.start_seconds": 77.0,
    "rollout.answer_seconds": 88.0,
}
TRIALS = {
    "sums": {
        "model.name": "embedded",
        "task.name": "addition",
        **{"task.options": {}, "task.prompt": None, "task.chat": False},
        **SUMS,
    },
    "scans": {
        **{"model.name": "embedded", "task.name": "addition"},
        **{"task.options": {}, "task.prompt": None, "task.chat": False},
        **SUMS,
        **{"quant.skip_layers": "srdd:top1", "noise.layers": "srdd:deadzone@down:top2"},
        "noise.layer_multipliers": "srdd:nmse",
    },
    "problems": {**TEXTS, "task.name": "gsm8k", "task.path": "/data/q.jsonl", "task.options": {}},
    "rows": {
        **{**TEXTS, "task.name": "trl", "task.path": ["/data/a.parquet", "/data/b.jsonl"]},
        **{"task.eval_path": "/data/e.jsonl", "task.options": {}, "task.correct_at": 0.5},
    },
    "puzzles": {**TEXTS, "task.name": "reasoning_gym:chain_sum", "task.options": {"min_terms": 3}},
}
BY_OPTION = {"seed": "--seed 5", "threads": "--cpus 2"}
"""What a sweep sets itself, by an option that the refusal names."""
ALL_POINTS = ",".join(POINTS)
REFUSED = {"eval.split", "eval.draw"}
"""What no sweep takes."""


def at(config: TrialConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def arms_of(tmp_path: Path, **given: Any) -> tuple[StudyConfig, list[Arm]]:
    """As planned: those known beforehand, and two of the searcher's."""
    study = study_config(SweepOptions(store=str(tmp_path), **given))
    arms = fixed_arms(study)
    search = RinSearch(study.model_copy(update={"trials": len(arms) + 2}), arms)
    for _ in range(2):
        drawn = search._next_arm()
        if drawn is None:
            break
        search.arms.append(drawn)
    return study, search.arms


def as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def assert_arrived(settings: dict[str, Any], arms: list[Arm]) -> None:
    """A control differs in what makes it one; options are merged into those of a workload, as all mappings are."""
    expected = read_config(unflatten(settings))
    for arm in arms:
        for key in settings:
            if arm.origin == "control" and key in ("noise.sigma_start", "noise.zones"):
                continue
            value, wanted = at(arm.config, key), at(expected, key)
            assert value == wanted or (key == "task.options" and set(wanted) < set(value)), (arm.name, key, value)


def test_every_key_is_given_here_and_no_value_is_the_default() -> None:
    found = {key for trial in TRIALS.values() for key in trial}
    recipe = {f"model.recipe.{key}" for key in SUMS["model.recipe"]}
    assert found - {"model.recipe"} | recipe | set(BY_OPTION) | REFUSED == set(keys())
    plain = TrialConfig()
    for trial in TRIALS.values():
        config = read_config(unflatten(trial))
        switches = ("model.name", "task.name", "model.recipe", "task.options", "task.prompt", "task.chat")
        switches = (*switches, "grpo.micro_batch_tokens")
        assert [key for key in trial if at(config, key) == at(plain, key) and key not in switches] == []


@pytest.mark.parametrize("trial", ["sums", "problems"])
@pytest.mark.parametrize("space", SPACES)
def test_what_is_set_arrives_in_every_arm_of_every_space_workload_and_point(
    space: str, trial: str, tmp_path: Path
) -> None:
    """But for one dimension, which is left to search."""
    settings = {key: value for key, value in TRIALS[trial].items() if key != SPACES[space].dimensions[-1].key}
    for workload in WORKLOADS:
        _, arms = arms_of(tmp_path, space=space, workload=workload, overrides=as_overrides(settings), points=ALL_POINTS)
        assert len(arms) > len(POINTS)
        assert_arrived(settings, arms)


@pytest.mark.parametrize("space", SPACES)
def test_a_key_that_is_searched_can_be_fixed_and_leaves_the_space(space: str, tmp_path: Path) -> None:
    for dimension in SPACES[space].dimensions:
        fixed = {dimension.key: values(dimension)[-1]}
        if dimension.when is not None and dimension.when.parent == "noise.modules":
            fixed["noise.modules"] = dimension.when.labels[0]
        study, arms = arms_of(tmp_path, space=space, workload="tiny", overrides=as_overrides(fixed))
        assert [d.key for d in study.space.dimensions if d.key in fixed] == []
        assert [arm.origin for arm in arms[-2:]] == ["searcher"] * 2
        assert_arrived(fixed, arms)


@pytest.mark.parametrize("trial", TRIALS)
def test_the_settings_of_a_file_arrive(trial: str, tmp_path: Path) -> None:
    """Of a trial, of a space, of a point; of a space under each of its values too."""
    settings = unflatten(TRIALS[trial])
    place = tmp_path / "mine.yaml"
    place.write_text(dump_yaml(settings))
    config = trial_config(None, place, None, [])
    assert_arrived(TRIALS[trial], [Arm(name="trial", origin="point", config=config)])
    ranks = {key: value for key, value in TRIALS[trial].items() if key == "parallel.ranks"}  # of all arms, or of none
    for workload in WORKLOADS:
        _, arms = arms_of(tmp_path, workload=workload, points=str(place), overrides=as_overrides(ranks))
        assert_arrived(TRIALS[trial], [arm for arm in arms if arm.name == "mine"])
    searched = {"key": "collapse.mode", "domain": {"kind": "choice", "options": {"look": "monitor", "stop": "enforce"}}}
    given = {key: value for key, value in TRIALS[trial].items() if key != searched["key"]}
    space = {"name": "mine", "description": "d", "settings": unflatten(given), "dimensions": [searched]}
    place.write_text(dump_yaml(space))
    for workload in WORKLOADS:
        _, arms = arms_of(tmp_path, workload=workload, space=str(place))
        assert_arrived(given, arms)
        assert {arm.config.collapse.mode for arm in arms[1:]} == {"monitor", "enforce"}


@pytest.mark.parametrize("trial", TRIALS)
def test_what_is_set_arrives_in_a_single_trial_of_every_point_and_workload(trial: str) -> None:
    given = {key: value for key, value in TRIALS[trial].items() if key != "hang_seconds"}
    for workload in WORKLOADS:
        for point in POINTS:
            config = trial_config(point, None, workload, as_overrides(given))
            assert_arrived(given, [Arm(name=point, origin="point", config=config)])


@pytest.mark.parametrize("trial", TRIALS)
def test_each_setting_alone_arrives_or_is_refused(trial: str) -> None:
    taken = set()
    for key, value in TRIALS[trial].items():
        for point in POINTS:
            tree = merge(WORKLOADS["embedded"].settings, POINTS[point].settings)
            try:
                config = trial_config(point, None, "embedded", as_overrides({key: value}))
                wanted = read_config(merge(tree, unflatten({key: value})))
            except ConfigError:
                continue
            assert at(config, key) == at(wanted, key)
            taken.add(key)
    assert len(taken) > (50 if trial == "sums" else 0), taken


@pytest.mark.parametrize("key", BY_OPTION)
def test_what_a_sweep_sets_itself_is_refused_by_every_way_with_its_option(key: str, tmp_path: Path) -> None:
    option = BY_OPTION[key].partition(" ")[0]
    point, space, searched = tmp_path / "point.yaml", tmp_path / "space.yaml", tmp_path / "searched.yaml"
    point.write_text(f"{key}: 7\n")
    plain = {"name": "mine", "description": "d"}
    dimension = {"key": "noise.sigma_end", "domain": {"kind": "float", "low": 0.0001, "high": 0.0002}}
    space.write_text(dump_yaml({**plain, "settings": {key: 7}, "dimensions": [dimension]}))
    searched.write_text(
        dump_yaml({**plain, "dimensions": [{"key": key, "domain": {"kind": "int", "low": 1, "high": 2}}]})
    )
    for given in (
        {"overrides": [f"{key}=7"]},
        {"points": str(point)},
        {"space": str(space)},
        {"space": str(searched)},
    ):
        with pytest.raises(ConfigError, match=option):
            arms_of(tmp_path, **given)
    assert trial_config("control", None, "tiny", [f"{key}=7"]).model_dump()[key] == 7
    record = read_config(WORKLOADS["tiny"].settings, ["seed=5", "threads=2", "noise.modules=linear"])
    point.write_text(record.model_dump_json())  # what rin export writes, beside the same seed and as many CPUs
    _, arms = arms_of(tmp_path, points=str(point), seed=5, cpus=2)
    assert [arm.config.noise.modules for arm in arms if arm.name == "point"] == [("linear",)]


def test_questions_for_confirming_choose_nothing_whoever_asks_for_them(tmp_path: Path) -> None:
    point, space = tmp_path / "point.yaml", tmp_path / "space.yaml"
    point.write_text("eval: {split: confirm}\n")
    splits = {"key": "eval.split", "domain": {"kind": "choice", "options": {"a": "selection", "b": "confirm"}}}
    space.write_text(dump_yaml({"name": "mine", "description": "d", "dimensions": [splits]}))
    for given in ({"overrides": ["eval.split=confirm"]}, {"points": str(point)}, {"space": str(space)}):
        with pytest.raises(ConfigError, match="those questions are for rin confirm"):
            arms_of(tmp_path, **given)

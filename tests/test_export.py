"""Every setting of a trial arrives in another trainer's lines, or is said to have no key there."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from search.export import OF_THIS_MACHINE, VERL, to_verl
from spaces.config import TrialConfig
from spaces.reading import as_tree, merge, parse_overrides, read_config

RICH = [  # every setting has an effect
    "model={name: /m, recipe: null, adapter: lora}",
    "quant.exclude=[lm_head]",
    "noise={sigma_start: 0.02, sigma_end: 0.001, modules: [rmsnorm, linear], num_stages: 10}",
    "grpo={filter_groups: resample, overlong_buffer: 2, updates_per_step: 4, epochs: 2, kl_beta: 0.1}",
    "rollout={correction: token, backend: vllm, engine: process, max_new_tokens: 64}",
    "task={name: gsm8k, path: /q.jsonl, chat: true}",
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
    "grpo.updates_per_step": 2,
    "grpo.epochs": 4,
    "rollout.temperature": 0.7,
    "task.name": "reasoning_gym:gcd",
    "task.path": "/p.jsonl",
    "task.prompt": "'Q {question}'",
    "grpo.weight_decay": 0.1,
    "task.chat_options": "{enable_thinking: false}",
    "task.chat_date": "2025-01-01",
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
    "task.chat": ["task.chat=false"],
}


def exported(*overrides: str, base: list[str] | None = None) -> list[str]:
    tree: dict[str, Any] = {}
    for override in [*(RICH if base is None else base), *overrides]:
        tree = merge(tree, parse_overrides([override]))
    candidate: Any = SimpleNamespace(config=read_config(tree))
    return to_verl(candidate).splitlines()


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
def test_every_setting_is_a_line_or_is_said_to_have_no_key(key: str) -> None:
    if key in ALONE:
        plain, changed = exported(base=[]), exported(*ALONE[key], base=[])
    else:
        plain, changed = exported(), exported(*(TOGETHER.get(key) or [another(key)]))
    new = set(changed) ^ set(plain)
    assert new, "a setting that changes nothing was dropped in silence"
    assert key in VERL or any(line.startswith(f"# no key for: {key}=") for line in new)


def test_the_tables_name_settings_that_exist() -> None:
    known = set(keys())
    assert VERL.keys() <= known
    assert all(any(key.startswith(start) for key in known) for start in OF_THIS_MACHINE)


@pytest.mark.parametrize(
    ("override", "lines"),
    [
        ("grpo.loss=dr_grpo", ["actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm"]),
        ("grpo.loss=dapo", ["# no key for: grpo.loss=dapo"]),
        ("grpo.advantage_scale=none", ["algorithm.norm_adv_by_std_in_grpo=False"]),
        ("grpo.advantage_scale=batch", ["# no key for: grpo.advantage_scale=batch"]),
        ("grpo.filter_groups=drop", ["# no key for: grpo.filter_groups=drop"]),
        (
            "grpo.kl_beta=0.04",
            ["actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_coef=0.04"],
        ),
        ("grpo.warmup_updates=3", ["# no key for: grpo.warmup_updates=3"]),
        ("model.lora_rank=7", ["actor_rollout_ref.model.lora_rank=7"]),
        ("quant.skip_layers=[0, -1]", ["# no key for: quant.skip_layers=(0, -1)"]),
        ("rollout.correction_cap=3", ["algorithm.rollout_correction.rollout_is_threshold=3.0"]),
        ("noise.zones=[]", ["++trainer.noise_injection.sigma_start=0.02", "# no key for: quant.weights=mxfp4"]),
    ],
)
def test_lines_by_hand(override: str, lines: list[str]) -> None:
    assert set(lines) <= set(exported(override))


def test_what_has_no_effect_is_not_told() -> None:
    lines = exported("noise.sigma_start=0", base=[])
    assert "++trainer.noise_injection.enabled=False" in lines
    assert not any("sigma_end" in line or "lora_alpha" in line or "penalty" in line for line in lines)

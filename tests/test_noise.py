"""Noise arrives where it is asked for, as large as it is said to be, and leaves no trace."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from spaces.config import ConfigError, ModelConfig, NoiseConfig, QuantConfig, Schedule, ZoneSigma
from spaces.points import POINTS, SRDD_MULTIPLIERS
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS
from trainable.hadamard import rotate
from trainable.noise import (
    SCHEDULES,
    NoiseTarget,
    effect_warnings,
    effects_of,
    injected,
    layer_multipliers,
    layer_zones,
    noise_targets,
    sigma_at,
    stage_at,
    zone_layers,
)
from trainable.outcome import Effect
from trainable.philox import key_of, normals
from trainable.policy.embedded import character_tokenizer
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy
from trainable.quantization import Arithmetic, element_step, fake_quantize

STEPS = 29
HIDDEN = 64


# --- when -------------------------------------------------------------------------------------------------------------

ALL_SCHEDULES: tuple[Any, ...] = get_args(Schedule)
STAGES = (1, 2, 3, 5, 10, 29, 40)


def sigmas(schedule: Any, stages: int, start: float = 0.05, end: float = 0.0005, total: int = STEPS) -> list[float]:
    noise = NoiseConfig(schedule=schedule, num_stages=stages, sigma_start=start, sigma_end=end)
    return [sigma_at(noise, step, total) for step in range(total)]


# facts/rin-grpo.md 1.1: total 29, K = 10, 0.05 -> 0.0005; three steps per stage.
QERL_CODE = [0.0, 0.05, 0.02812, 0.01581, 0.00889, 0.005, 0.00281, 0.00158, 0.00089, 0.0005]


def test_qerl_code_gives_the_recorded_test_vector() -> None:
    got = sigmas("qerl_code", 10)
    assert got == pytest.approx([QERL_CODE[step // 3] for step in range(29)], abs=5e-6)
    noise = NoiseConfig(sigma_start=0.05, sigma_end=0.0005, num_stages=10)
    assert [stage_at(noise, step, 29) for step in range(29)] == [step // 3 for step in range(29)]
    # Steps 27 to 29 are the last stage: 29 // 2.9 = 10 is clamped.
    assert sigma_at(noise, 29, 29) == sigma_at(noise, 1000, 29) == 0.0005


def test_qerl_paper_gives_equation_8_worked_out_by_hand() -> None:
    # floor(29 / 10) = 2 steps per stage; k = 0 is quiet; sigma(k) = 0.05 * 0.01^((k - 1) / 9); k stays at 9 from step
    # 18 on.
    by_hand = [0.0, 0.05, 0.0299742, 0.0179691, 0.0107722, 0.00645775, 0.00387132, 0.00232079, 0.00139128, 0.000834050]
    assert sigmas("qerl_paper", 10) == pytest.approx([by_hand[min(step // 2, 9)] for step in range(29)], rel=1e-5)


def qerl_get_sigma_by_step(step: int, total: int, start: float, end: float, stages: int) -> float:
    """QeRL's noise_scheduler.py as written, in floats."""
    trend = start * (end / start) ** (np.arange(stages - 1) / (stages - 2))
    step = min(step, total)
    n = len(trend) + 1
    interval = int(step // (total / n))
    return 0.0 if interval == 0 else float(trend[min(interval - 1, len(trend) - 1)])


@pytest.mark.parametrize("total", [5, 29, 40, 100])
@pytest.mark.parametrize("stages", [3, 4, 5, 10, 29])
def test_qerl_code_agrees_with_qerls_code(stages: int, total: int) -> None:
    expected = [qerl_get_sigma_by_step(step, total, 0.05, 0.0005, stages) for step in range(total)]
    assert sigmas("qerl_code", stages, total=total) == pytest.approx(expected, rel=1e-12)


# Independent of the code: K = 6, so five noisy stages u = 0, 1/4, 1/2, 3/4, 1, from 1.0 to 0.0625.
SHAPES: list[tuple[str, list[float]]] = [
    ("qerl_code", [0, 1, 0.5, 0.25, 0.125, 0.0625]),
    ("qerl_paper", [0, 1, 0.0625**0.2, 0.0625**0.4, 0.0625**0.6, 0.0625**0.8]),
    ("linear", [0, 1, 0.765625, 0.53125, 0.296875, 0.0625]),
    (
        "cosine",
        [0, 1, 0.0625 + 0.9375 * (2 + math.sqrt(2)) / 4, 0.53125, 0.0625 + 0.9375 * (2 - math.sqrt(2)) / 4, 0.0625],
    ),
    ("log", [0, 1, *(1 - 0.9375 * math.log(n, 5) for n in (2, 3, 4, 5))]),
    ("constant", [0, 1, 1, 1, 1, 1]),
]


@pytest.mark.parametrize(("schedule", "stages"), SHAPES)
def test_each_schedule_has_its_shape(schedule: str, stages: list[float]) -> None:
    assert sigmas(schedule, 6, 1.0, 0.0625, total=12) == pytest.approx(
        [stages[step // 2] for step in range(12)], rel=1e-12
    )


def test_every_schedule_has_a_row_of_its_shape() -> None:
    assert {name for name, _ in SHAPES} == set(SCHEDULES)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize(("start", "end"), [(0.05, 0.0005), (0.03, 0.03), (0.05, 1e-20)])
@pytest.mark.parametrize("total", [1, 6, 29])
def test_sigma_is_finite_and_falls_from_start_to_end(
    schedule: Any, stages: int, start: float, end: float, total: int
) -> None:
    got = sigmas(schedule, stages, start, end, total)
    noisy = got if stages == 1 else [sigma for step, sigma in enumerate(got) if sigma != 0 or step >= total / stages]
    assert all(math.isfinite(sigma) and 0 <= sigma <= start for sigma in got)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(noisy))
    if stages == 1:
        assert got == [start] * total
        return
    assert got[0] == 0
    if stages > total:  # stages are skipped
        return
    assert noisy[0] == start
    if stages == 2:
        assert set(got) == {0.0, start}
    elif schedule in ("qerl_code", "linear", "cosine", "log"):
        assert got[-1] == pytest.approx(end, abs=1e-17)
    elif schedule == "qerl_paper":
        assert got[-1] == pytest.approx(start * (end / start) ** ((stages - 2) / (stages - 1)))


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("stages", STAGES)
def test_sigma_start_zero_is_silent_throughout(schedule: Any, stages: int) -> None:
    assert sigmas(schedule, stages, 0.0, 0.0005) == [0.0] * STEPS


# --- where ------------------------------------------------------------------------------------------------------------


def test_zones_at_depth_28_are_the_plans() -> None:
    expected = {"first": (0, 3), "early_mid": (4, 9), "middle": (10, 19), "late_mid": (20, 25), "last": (26, 27)}
    assert {zone: (layers[0], layers[-1]) for zone in expected if (layers := zone_layers(zone, 28))} == expected
    assert sum(len(zone_layers(zone, 28)) for zone in expected) == 28


# Midpoints by hand. Depth 8: 1.75, 5.25, 8.75, 12.25, 15.75, 19.25, 22.75, 26.25. Depth 2: 7 and 21, so first, middle
# (its own middle is 15) and last are empty and take the nearest. Depth 1: 14.
SMALL: list[tuple[int, dict[str, tuple[int, ...]]]] = [
    (8, {"first": (0,), "early_mid": (1, 2), "middle": (3, 4, 5), "late_mid": (6,), "last": (7,)}),
    (2, {"first": (0,), "early_mid": (0,), "middle": (1,), "late_mid": (1,), "last": (1,)}),
    (1, dict.fromkeys(("first", "early_mid", "middle", "late_mid", "last"), (0,))),
]


@pytest.mark.parametrize(("depth", "zones"), SMALL)
def test_zones_of_small_models_lie_at_relative_depth(depth: int, zones: dict[str, tuple[int, ...]]) -> None:
    assert {zone: zone_layers(zone, depth) for zone in zones} == zones


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8, 14, 28, 36, 64])
def test_every_layer_has_one_own_zone_and_every_zone_a_layer(depth: int) -> None:
    zones = layer_zones(depth)
    assert len(zones) == depth
    order = list(zones[0][:1])
    for names in zones:
        order += [names[0]] if names[0] != order[-1] else []
    every = ["first", "early_mid", "middle", "late_mid", "last"]
    assert order == [name for name in every if name in order]
    assert {name for names in zones for name in names} == set(every)


def test_multipliers_are_interpolated_at_relative_depth() -> None:
    given = tuple(SRDD_MULTIPLIERS)
    noise = NoiseConfig(layer_multipliers=given)
    assert layer_multipliers(noise, 28) == given
    # The middles of 4 blocks fall on blocks 3, 10, 17, 24 of 28; those of 2 between 6 and 7, and 20 and 21.
    assert layer_multipliers(noise, 4) == pytest.approx((given[3], given[10], given[17], given[24]))
    assert layer_multipliers(noise, 2) == pytest.approx(((given[6] + given[7]) / 2, (given[20] + given[21]) / 2))
    assert layer_multipliers(NoiseConfig(layer_multipliers=(1.0, 3.0)), 4) == pytest.approx((1.0, 1.5, 2.5, 3.0))
    assert layer_multipliers(NoiseConfig(), 3) == (1.0, 1.0, 1.0)


# --- a tiny model -----------------------------------------------------------------------------------------------------


class Load(Protocol):
    def __call__(self, depth: int = 4, *, dtype: Any = "float32", adapter: Any = "full", **quant: Any) -> Policy: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folders with random Qwen2 models of hidden size 64, by depth; norm gains are spread around 1."""
    root = tmp_path_factory.mktemp("models")

    def build(depth: int) -> Path:
        path = root / f"depth{depth}"
        if path.exists():
            return path
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(depth)
            model = Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=15,
                    hidden_size=HIDDEN,
                    intermediate_size=2 * HIDDEN,
                    num_hidden_layers=depth,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=64,
                    tie_word_embeddings=True,
                )
            )
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(0.05 * torch.randn(parameter.shape))
        model.save_pretrained(path)
        character_tokenizer().save_pretrained(path)
        return path

    return build


@pytest.fixture(scope="module")
def load(folder: Callable[[int], Path]) -> Load:
    def policy(depth: int = 4, *, dtype: Any = "float32", adapter: Any = "full", **quant: Any) -> Policy:
        return load_policy(
            ModelConfig(name=str(folder(depth)), dtype=dtype, adapter=adapter), QuantConfig(**quant), seed=0
        )

    return policy


def names_of(targets: tuple[NoiseTarget, ...]) -> list[str]:
    return [target.name for target in targets]


PROJECTIONS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
NORMS = ["input_layernorm", "post_attention_layernorm"]


def expected_names(layers: tuple[int, ...], parts: list[str]) -> list[str]:
    return [f"model.layers.{layer}.{part}.weight" for layer in layers for part in parts]


TARGETS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, expected_names((0, 1, 2, 3), NORMS)),
    ({"modules": "linear"}, expected_names((0, 1, 2, 3), PROJECTIONS)),
    (
        {"modules": ["rmsnorm", "linear"]},
        expected_names((0, 1, 2, 3), NORMS) + expected_names((0, 1, 2, 3), PROJECTIONS),
    ),
    ({"layers": "first"}, expected_names((0,), NORMS)),
    ({"layers": "middle"}, expected_names((1, 2), NORMS)),  # midpoints 3.5, 10.5, 17.5, 24.5
    ({"layers": "late_mid"}, expected_names((3,), NORMS)),
    ({"layers": "early_mid"}, expected_names((0,), NORMS)),  # empty: the nearest, and of two the first
    ({"layers": "last"}, expected_names((3,), NORMS)),  # empty: the nearest
    ({"layers": [1, 3], "modules": "linear"}, expected_names((1, 3), PROJECTIONS)),
    ({"layers": 0, "final_norm": True}, [*expected_names((0,), NORMS), "model.norm.weight"]),
]


@pytest.mark.parametrize(("settings", "names"), TARGETS)
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_targets_are_the_named_modules_of_the_named_layers(
    settings: dict[str, Any], names: list[str], adapter: str, load: Load
) -> None:
    targets = noise_targets(load(adapter=adapter), NoiseConfig.model_validate(settings))
    assert names_of(targets) == names
    assert [t.layer for t in targets] == [int(n.split(".")[2]) if ".layers." in n else None for n in names]
    assert [t.kind for t in targets] == ["linear" if "_proj" in n else "rmsnorm" for n in names]


def test_linear_noise_also_reaches_layers_that_stay_at_16_bits(load: Load) -> None:
    policy = load(skip_layers=(0, -1), exclude=("lm_head", "down_proj"))
    assert len(policy.quantized) == 2 * 6
    assert names_of(noise_targets(policy, NoiseConfig(modules=("linear",)))) == expected_names(
        (0, 1, 2, 3), PROJECTIONS
    )


def test_the_head_is_never_a_target_even_when_it_is_quantised(load: Load) -> None:
    policy = load(exclude=())
    assert "lm_head" in policy.quantized
    targets = noise_targets(policy, NoiseConfig(modules=("rmsnorm", "linear"), final_norm=True))
    assert not any("lm_head" in name or "embed" in name for name in names_of(targets))


def test_the_control_has_no_targets(load: Load) -> None:
    assert noise_targets(load(), NoiseConfig(sigma_start=0.0)) == ()


def zone(name: Any, start: float = 0.02, end: float = 0.01) -> dict[str, Any]:
    return {"zone": name, "sigma_start": start, "sigma_end": end}


NOTHING: list[tuple[dict[str, Any], list[str]]] = [
    *(
        ({"modules": [word]}, [f"noise.modules={word}", "nothing", "set noise.modules to rmsnorm or linear"])
        for word in ("qk_norm", "post_norm")
    ),
    ({"layers": [0, 4]}, ["noise.layers=4", "0 to 3"]),
    ({"layer_multipliers": [0, 0]}, ["noise.layer_multipliers", "nothing"]),
    ({"layers": 0, "layer_multipliers": [0, 1, 1, 1]}, ["noise.layer_multipliers", "nothing"]),
    ({"layers": "middle", "zones": [zone("middle", 0.0, 0.0)]}, ["noise.zones", "nothing"]),
    # A zone whose sigmas reach no chosen block: not among the layers, or all of its block belongs to a zone that is
    # also named.
    ({"layers": "first", "zones": [zone("middle")]}, ["noise.zones", "middle", "remove it"]),
    ({"zones": [zone("late_mid"), zone("last")]}, ["noise.zones", "last", "remove it"]),
]


@pytest.mark.parametrize(("settings", "words"), NOTHING)
def test_a_setting_that_would_touch_nothing_is_an_error(settings: dict[str, Any], words: list[str], load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        noise_targets(load(), NoiseConfig.model_validate(settings))
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("missing", "settings", "words"),
    [
        ("norms", {}, "noise.modules=rmsnorm"),
        ("linears", {"modules": ["rmsnorm", "linear"]}, "noise.modules=linear"),
        ("final_norm", {"final_norm": True}, "noise.final_norm=true"),
    ],
)
def test_a_model_without_the_named_modules_is_an_error(
    missing: str, settings: dict[str, Any], words: str, load: Load
) -> None:
    without: dict[str, Any] = {missing: {}}
    policy = dataclasses.replace(load(), **without)
    with pytest.raises(ConfigError, match=words):
        noise_targets(policy, NoiseConfig.model_validate(settings))


def test_noise_in_quantisation_steps_needs_every_target_quantised(load: Load) -> None:
    policy = load(skip_layers=(0,))
    with pytest.raises(
        ConfigError, match=r"noise\.scale=step: model\.layers\.0\.self_attn\.q_proj\.weight is not quantised"
    ):
        noise_targets(policy, NoiseConfig(modules=("linear",), scale="step"))
    assert noise_targets(policy, NoiseConfig(modules=("linear",), scale="step", layers=(1, 2, 3)))


@pytest.mark.parametrize("depth", [2, 4])
def test_every_point_of_the_plan_reaches_a_weight_at_any_depth(depth: int, load: Load) -> None:
    policy = load(depth)
    for name, point in POINTS.items():
        noise = read_config(merge(WORKLOADS["tiny"].settings, point.settings)).noise
        assert bool(noise_targets(policy, noise)) == (noise.sigma_start > 0), name


# --- in and out again -------------------------------------------------------------------------------------------------


def deployed_weights(policy: Policy) -> dict[str, torch.Tensor]:
    """What the forward pass computes with at this moment, by bare name."""
    weights: dict[str, torch.Tensor] = {}
    for name, linear in policy.linears.items():
        weights[f"{name}.weight"] = (
            linear.quantized_weight() if linear.deployed_weight is None else linear.deployed_weight
        ).clone()
    for name, norm in (policy.norms | policy.final_norm).items():
        assert isinstance(norm.weight, torch.Tensor)
        weights[f"{name}.weight"] = norm.weight.detach().clone()
    return weights


def during(policy: Policy, noise: NoiseConfig, step: int = STEPS - 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """The deployed weights of a rollout with noise."""
    with injected(policy, noise, noise_targets(policy, noise), step=step, total_steps=STEPS, seed=seed):
        return deployed_weights(policy)


def shifts(policy: Policy, noise: NoiseConfig, step: int = STEPS - 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """What noise changes, by name; unchanged weights are left out."""
    clean = deployed_weights(policy)
    changes = {
        name: weight.double() - clean[name].double() for name, weight in during(policy, noise, step, seed).items()
    }
    return {name: change for name, change in changes.items() if bool((change != 0).any())}


def snapshot(policy: Policy) -> dict[str, tuple[torch.Tensor, int]]:
    """A copy and the address of every parameter and buffer."""

    def everything() -> Iterator[tuple[str, torch.Tensor]]:
        yield from policy.model.named_parameters()
        yield from policy.model.named_buffers()

    return {name: (tensor.detach().clone(), tensor.data_ptr()) for name, tensor in everything()}


def assert_untouched(policy: Policy, before: dict[str, tuple[torch.Tensor, int]]) -> None:
    after = snapshot(policy)
    assert after.keys() == before.keys()
    for name, (tensor, address) in before.items():
        assert torch.equal(after[name][0], tensor), name
        assert after[name][1] == address, name
    assert all(linear.deployed_weight is None for linear in policy.linears.values())


BOTH = NoiseConfig(sigma_start=0.05, sigma_end=0.01, modules=("rmsnorm", "linear"), final_norm=True)
RESTORED: list[tuple[NoiseConfig, dict[str, Any]]] = [
    (BOTH, {}),
    (BOTH, {"dtype": "bfloat16"}),
    (BOTH, {"adapter": "lora"}),
    (BOTH, {"weights": "none", "activations": "none"}),
    (BOTH, {"weights": "nvfp4", "exclude": ()}),
    (BOTH.model_copy(update={"scale": "rms", "placement": "after"}), {}),
]


@pytest.mark.parametrize(("noise", "options"), RESTORED)
def test_everything_is_restored_bit_for_bit(noise: NoiseConfig, options: dict[str, Any], load: Load) -> None:
    policy = load(**options)
    before = snapshot(policy)
    assert len(shifts(policy, noise)) == 4 * 9 + 1
    assert_untouched(policy, before)


def test_everything_is_restored_when_the_rollout_fails(load: Load) -> None:
    policy = load()
    before = snapshot(policy)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        injected(policy, BOTH, noise_targets(policy, BOTH), step=28, total_steps=STEPS, seed=0),
    ):
        raise RuntimeError("out of memory")
    assert_untouched(policy, before)


def test_everything_is_restored_when_the_injection_itself_fails(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load()
    before = snapshot(policy)
    targets = noise_targets(policy, BOTH)
    broken = dataclasses.replace(targets[5], module=torch.nn.Identity())  # after some norms have been replaced
    with (
        pytest.raises(AttributeError),
        injected(policy, BOTH, (*targets[:5], broken), step=28, total_steps=STEPS, seed=0),
    ):
        pytest.fail("the rollout must not run")
    assert_untouched(policy, before)


def test_noise_never_accumulates(load: Load) -> None:
    noise = BOTH.model_copy(update={"layers": (1,)})
    fresh, used = load(depth=2), load(depth=2)
    for step in range(100):
        during(used, noise, step % STEPS)
    got, expected = during(used, noise, step=5), during(fresh, noise, step=5)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert shifts(fresh, noise, step=5)


def test_the_rollout_computes_with_the_noisy_weights_and_nothing_else_does(
    load: Load, folder: Callable[[int], Path]
) -> None:
    policy = load(activations="none")
    ids = torch.tensor([[2, 5, 12, 7, 14]])
    quiet = policy.model(input_ids=ids).logits
    noise = BOTH.model_copy(update={"layers": (0, 2)})
    with injected(policy, noise, noise_targets(policy, noise), step=28, total_steps=STEPS, seed=3):
        noisy = policy.model(input_ids=ids).logits
    weights = during(policy, noise, seed=3)
    assert torch.equal(policy.model(input_ids=ids).logits, quiet)
    # An ordinary model of the same folder, given those weights.
    reference = AutoModelForCausalLM.from_pretrained(folder(4))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
        torch.testing.assert_close(reference(input_ids=ids).logits, noisy, rtol=1e-5, atol=1e-6)
    assert (noisy - quiet).abs().max() > 1e-3


def test_learning_never_sees_noise(load: Load) -> None:
    policy = load()
    with injected(policy, BOTH, noise_targets(policy, BOTH), step=28, total_steps=STEPS, seed=0):
        assert not torch.is_grad_enabled()
        with torch.enable_grad(), pytest.raises(AssertionError, match="training must not see"):
            policy.model(input_ids=torch.tensor([[2, 5]]))


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_noise_reaches_its_targets_and_neither_head_embedding_nor_adapters(adapter: str, load: Load) -> None:
    policy = load(adapter=adapter, exclude=())
    before = snapshot(policy)
    targets = set(names_of(noise_targets(policy, BOTH)))
    assert set(shifts(policy, BOTH)) == targets
    with injected(policy, BOTH, noise_targets(policy, BOTH), step=28, total_steps=STEPS, seed=0):
        moved = {name for name, (tensor, _) in snapshot(policy).items() if not torch.equal(tensor, before[name][0])}
    assert moved
    assert all(name.endswith(("layernorm.weight", "model.norm.weight")) for name in moved)
    if adapter == "lora":
        assert any("lora_A" in name for name in before)


def test_no_step_is_noisy_in_the_quiet_stage(load: Load) -> None:
    policy = load()
    assert [bool(shifts(policy, BOTH, step=step)) for step in (0, 2, 3)] == [False, False, True]


# --- the draw ---------------------------------------------------------------------------------------------------------

NAME = "model.layers.1.input_layernorm.weight"
OTHERS: list[dict[str, Any]] = [
    {"layers": 1},
    {"modules": ["rmsnorm", "linear"]},
    {"final_norm": True},
    {"layer_multipliers": [3, 1, 0, 2]},
    {"zones": [zone("first", 0.5, 0.5)]},
]


@pytest.mark.parametrize("settings", OTHERS)
def test_noise_of_a_weight_does_not_depend_on_what_else_is_noised(settings: dict[str, Any], load: Load) -> None:
    policy = load()
    alone = during(policy, NoiseConfig())[NAME]
    assert torch.equal(during(policy, NoiseConfig.model_validate(settings))[NAME], alone)


def test_noise_of_a_weight_is_the_same_under_lora_and_in_other_precisions(load: Load) -> None:
    alone = during(load(), NoiseConfig())[NAME]
    others: list[dict[str, Any]] = [{"adapter": "lora"}, {"weights": "none", "activations": "none"}]
    for options in others:
        assert torch.equal(during(load(**options), NoiseConfig())[NAME], alone)


def test_every_seed_step_and_weight_draws_its_own_noise(load: Load) -> None:
    policy = load(weights="none", activations="none")
    noise = NoiseConfig(modules=("rmsnorm", "linear"), schedule="constant")
    first = shifts(policy, noise, step=10)
    for other in (shifts(policy, noise, step=11), shifts(policy, noise, step=10, seed=1)):
        for name, change in first.items():
            assert abs(correlation(change, other[name])) < 5 / math.sqrt(change.numel())
    same_shape = [change for name, change in first.items() if name.endswith("q_proj.weight")]
    assert abs(correlation(same_shape[0], same_shape[1])) < 5 / HIDDEN
    again = shifts(policy, noise, step=10)
    assert all(torch.equal(change, again[name]) for name, change in first.items())


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@pytest.mark.parametrize("sigma", [0.5, 0.01, 1e-4])
def test_noise_is_gaussian_with_std_sigma(sigma: float, load: Load) -> None:
    policy = load(weights="none", activations="none")
    noise = NoiseConfig(sigma_start=sigma, sigma_end=sigma, modules=("linear",))
    change = torch.cat([shift.flatten() for shift in shifts(policy, noise).values()]) / sigma
    count = change.numel()
    assert count == 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert abs(change.mean().item()) < 5 / math.sqrt(count)
    assert change.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * count))
    for bound in (0.5, 1.0, 2.0, 3.0):  # the normal distribution
        share = math.erfc(bound / math.sqrt(2))
        assert (change.abs() > bound).double().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share / count))


def rms(x: torch.Tensor) -> float:
    return math.sqrt(x.double().square().mean().item())


def test_scale_rms_counts_in_the_size_of_each_weight(load: Load) -> None:
    policy = load(weights="none", activations="none")
    with torch.no_grad():
        policy.linears["model.layers.2.mlp.up_proj"].weight.mul_(100)
    noise = NoiseConfig(sigma_start=0.1, sigma_end=0.1, modules=("rmsnorm", "linear"), scale="rms")
    clean = deployed_weights(policy)
    for name, change in shifts(policy, noise).items():
        assert rms(change) == pytest.approx(0.1 * rms(clean[name]), rel=5 / math.sqrt(2 * change.numel())), name


def test_scale_step_counts_in_the_local_quantisation_step(load: Load) -> None:
    policy = load()
    with torch.no_grad():  # blocks of very different size in one weight
        policy.linears["model.layers.0.self_attn.q_proj"].weight[::2, :32].mul_(64)
    noise = NoiseConfig(
        sigma_start=0.25, sigma_end=0.25, modules=("linear",), scale="step", placement="after", layers=(0,)
    )
    for name, change in shifts(policy, noise).items():
        weight = policy.linears[name.removesuffix(".weight")].weight.detach().numpy()
        blocks = weight.reshape(weight.shape[0], -1, 32)
        # E2M1's largest exponent is 2 and its smallest step 0.5 (OCP MX v1.0, 5.3.3 and 6.3).
        steps = 0.5 * 2.0 ** (np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2)
        drawn = torch.from_numpy(change.numpy().reshape(blocks.shape) / steps)
        assert rms(drawn) == pytest.approx(0.25, rel=5 / math.sqrt(2 * change.numel())), name
        assert rms(drawn[::2, 0]) == pytest.approx(0.25, rel=0.15), name


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_placement_says_whether_noise_passes_the_quantiser(fmt: Any, load: Load) -> None:
    settings: dict[str, Any] = {"sigma_start": 0.01, "sigma_end": 0.01, "modules": ("linear",)}
    plain = load(weights="none")  # with `none` the noise itself comes out
    drawn = shifts(plain, NoiseConfig(**settings))
    policy = load(weights=fmt)
    before = during(policy, NoiseConfig(**settings, placement="before"))
    after = during(policy, NoiseConfig(**settings, placement="after"))
    for name, shift in drawn.items():
        weight = policy.linears[name.removesuffix(".weight")].weight.detach()
        noisy = (weight.double() + shift).float()
        assert torch.equal(before[name], fake_quantize(noisy, fmt, per_tensor=True))
        torch.testing.assert_close(
            after[name].double(), fake_quantize(weight, fmt, per_tensor=True).double() + shift, rtol=0, atol=1e-8
        )


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize(
    ("fmt", "scale"), [("mxfp4", "absolute"), ("mxfp4", "step"), ("nvfp4", "step"), ("none", "rms")]
)
def test_noise_on_a_rotated_weight_is_added_where_it_is_counted(
    fmt: Any, scale: Any, placement: Any, load: Load
) -> None:
    """And arrives with the rms that it has on a weight that is not rotated, in the basis of either."""
    policy = load(weights=fmt, hadamard=True)
    sigma = 0.02 if scale == "absolute" else 0.3
    noise = NoiseConfig(sigma_start=sigma, sigma_end=sigma, modules=("linear",), scale=scale, placement=placement)
    got = during(policy, noise)
    for name, weight in got.items():
        if "norm" in name:
            continue
        master = policy.linears[name.removesuffix(".weight")].weight.detach()
        turned = rotate(master)
        unit = {"absolute": 1.0, "rms": rms(master)}.get(scale) or element_step(turned, fmt, per_tensor=True)
        shift = normals(key_of("noise", 0, STEPS - 1, name), 0, master.numel()).view(master.shape) * sigma * unit
        if placement == "before":
            expected = fake_quantize(turned + shift, fmt, per_tensor=True)
            assert ((weight - expected).abs() > 1e-6).float().mean() < 0.001, "but for the last bit of rms"
        else:
            torch.testing.assert_close(
                weight, fake_quantize(turned, fmt, per_tensor=True) + shift, rtol=1e-6, atol=1e-7
            )
            back = rotate(weight - fake_quantize(turned, fmt, per_tensor=True))
            assert rms(back) == pytest.approx(rms(shift), rel=1e-4), "the change of the weight in the model's own basis"


def test_the_step_of_a_rotated_weight_is_that_of_the_blocks_that_are_rounded() -> None:
    """In bf16 a rotated block may round up to the next power of two, where its step is twice as large."""
    weight = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    step = Arithmetic(hadamard=True).weight.step(weight)
    assert torch.equal(step, element_step(rotate(weight), "mxfp4", per_tensor=True).float())
    assert not torch.equal(step, element_step(rotate(weight.float()), "mxfp4", per_tensor=True)), "so it matters"


def test_noise_is_added_in_fp32_and_cast_to_bf16_afterwards(load: Load) -> None:
    narrow, wide = load(dtype="bfloat16", weights="none"), load(weights="none")
    with torch.no_grad():
        for there, here in zip(wide.model.parameters(), narrow.model.parameters(), strict=True):
            there.copy_(here)
    noise = NoiseConfig(sigma_start=0.01, sigma_end=0.01, modules=("rmsnorm", "linear"))
    got, expected = during(narrow, noise), during(wide, noise)
    assert all(
        weight.dtype == torch.bfloat16 and torch.equal(weight, expected[name].bfloat16())
        for name, weight in got.items()
    )


# --- the proof --------------------------------------------------------------------------------------------------------


def measured(policy: Policy, noise: NoiseConfig, step: int = STEPS - 1, seed: int = 0) -> tuple[Effect, ...]:
    targets = noise_targets(policy, noise)
    with injected(policy, noise, targets, step=step, total_steps=STEPS, seed=seed, measured=True) as changes:
        return effects_of(noise, changes, step=step, total_steps=STEPS)


PROVEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"modules": ["rmsnorm", "linear"], "final_norm": True}, {}),
    ({"modules": "linear", "placement": "after"}, {}),
    ({"modules": "linear", "scale": "step"}, {}),
    ({"modules": "linear", "scale": "step"}, {"hadamard": True, "weights": "nvfp4"}),
    ({"modules": "linear", "placement": "after"}, {"hadamard": True, "adapter": "lora"}),
    ({"modules": ["rmsnorm", "linear"], "scale": "rms"}, {"dtype": "bfloat16"}),
    ({"modules": ["rmsnorm", "linear"], "layer_multipliers": [1, 2, 3, 4]}, {"adapter": "lora", "skip_layers": (0,)}),
]


@pytest.mark.parametrize(("settings", "options"), PROVEN)
def test_the_receipt_holds_what_really_changed(settings: dict[str, Any], options: dict[str, Any], load: Load) -> None:
    policy = load(**options)
    before = snapshot(policy)
    noise = NoiseConfig.model_validate({"sigma_start": 0.05, "sigma_end": 0.05, **settings})
    effects = measured(policy, noise, seed=7)
    assert_untouched(policy, before)
    changes, clean = shifts(policy, noise, seed=7), deployed_weights(policy)
    assert [e.name for e in effects] == names_of(noise_targets(policy, noise))
    for e in effects:
        assert (e.stage, e.step) == (9, 28)
        assert e.applied == pytest.approx(rms(changes[e.name]), rel=1e-4)
        assert e.changed == pytest.approx((changes[e.name] != 0).double().mean().item())
        assert e.applied_relative == pytest.approx(
            e.applied / rms(clean[e.name]), rel=0.05
        )  # of the master weight, here of the quantised


def test_nominal_sigma_in_the_receipt_follows_zone_multiplier_and_stage(load: Load) -> None:
    policy = load()  # blocks of first, middle, middle, late_mid
    noise = NoiseConfig(
        sigma_start=0.05,
        sigma_end=0.0005,
        zones=(
            ZoneSigma(zone="middle", sigma_start=0.08, sigma_end=0.001),
            ZoneSigma(zone="last", sigma_start=0.02, sigma_end=0.02),
        ),
        layer_multipliers=(1.0, 1.0, 0.5, 2.0),
        final_norm=True,
    )
    first = [(e.layer, e.nominal) for e in measured(policy, noise, step=3)]
    assert first == [(0, 0.05)] * 2 + [(1, 0.08)] * 2 + [(2, 0.04)] * 2 + [(3, 0.04)] * 2 + [(None, 0.05)]
    last = [e.nominal for e in measured(policy, noise, step=28)]
    assert last == pytest.approx([0.0005] * 2 + [0.001] * 2 + [0.0005] * 2 + [0.04] * 2 + [0.0005])
    assert measured(policy, noise, step=0) == ()


def test_a_layers_own_zone_wins_over_an_empty_one_that_takes_it(load: Load) -> None:
    noise = NoiseConfig.model_validate({"zones": [zone("early_mid", 0.3, 0.3), zone("middle", 0.2, 0.2)]})
    # Depth 2: block 0 is early_mid, block 1 is late_mid, which has no pair of its own; the empty middle takes it.
    assert [e.nominal for e in measured(load(2), noise)] == [0.3, 0.3, 0.2, 0.2]
    both = NoiseConfig.model_validate({"layers": 1, "zones": [zone("late_mid", 0.4, 0.4)]})
    assert [e.nominal for e in measured(load(2), both)] == [0.4, 0.4]


def test_in_bf16_a_norm_near_one_does_not_move_at_sigma_0_0005_and_the_receipt_says_so(load: Load) -> None:
    policy = load(dtype="bfloat16")
    effects = measured(policy, NoiseConfig(sigma_start=0.0005, sigma_end=0.0005, layers=(0, 1)))
    assert [(e.nominal, e.applied, e.changed) for e in effects] == [(0.0005, 0.0, 0.0)] * 4
    (line,) = effect_warnings(effects)
    assert "stage 9, rmsnorm: 4 of 4 weights" in line
    assert "nominal 0.0005, applied 0" in line
    # At twice the sigma about 2 % of the gains move.
    moved = measured(policy, NoiseConfig(sigma_start=0.001, sigma_end=0.001))
    assert 0 < sum(e.changed for e in moved) / len(moved) < 0.05


def test_in_fp32_a_norm_moves_by_the_same_sigma_without_a_warning(load: Load) -> None:
    effects = measured(load(), NoiseConfig(sigma_start=0.0005, sigma_end=0.0005))
    assert all(e.applied == pytest.approx(0.0005, rel=0.4) and e.changed > 0.99 for e in effects)
    assert effect_warnings(effects) == ()


def test_what_mxfp4_makes_of_linear_noise_is_measured(load: Load) -> None:
    policy = load()
    loud = measured(policy, NoiseConfig(sigma_start=0.05, sigma_end=0.05, modules=("linear",)))
    assert all(e.applied == pytest.approx(0.05, rel=0.1) and 0.5 < e.changed < 1 for e in loud)
    assert effect_warnings(loud) == ()
    # Weights of std 0.02 have steps of about 0.007: small noise flips few codes, each by a whole step.
    quiet = measured(policy, NoiseConfig(sigma_start=0.0005, sigma_end=0.0005, modules=("linear",)))
    assert all(e.applied > 2 * e.nominal and 0 < e.changed < 0.2 for e in quiet)
    (line,) = effect_warnings(quiet)
    assert "stage 9, linear: 28 of 28 weights" in line


def effect(nominal: float, applied: float, *, stage: int = 1, kind: str = "linear") -> Effect:
    return Effect(
        stage=stage,
        step=3,
        name=f"w{applied}",
        layer=0,
        kind=kind,
        nominal=nominal,
        applied=applied,
        applied_relative=1,
        changed=1,
    )


WARNINGS: list[tuple[list[Effect], list[str]]] = [
    ([], []),
    ([effect(0.01, 0.01), effect(0.01, 0.0051), effect(0.01, 0.0199)], []),
    ([effect(0.01, 0.01), effect(0.01, 0.0049)], ["stage 1, linear: 1 of 2", "worst w0.0049"]),
    ([effect(0.01, 0.03), effect(0.01, 0.0)], ["stage 1, linear: 2 of 2", "worst w0.0:"]),
    ([effect(0.01, math.nan)], ["1 of 1", "applied nan"]),
    ([effect(0.01, math.inf)], ["1 of 1", "applied inf"]),
]


@pytest.mark.parametrize(("effects", "words"), WARNINGS)
def test_a_warning_names_what_moved_by_less_than_half_or_more_than_twice(
    effects: list[Effect], words: list[str]
) -> None:
    lines = effect_warnings(tuple(effects))
    assert len(lines) == (1 if words else 0)
    assert [word for word in words if word not in lines[0]] == []


def test_warnings_come_per_stage_and_kind() -> None:
    bad = [effect(1.0, 0.0, stage=s, kind=k) for s in (2, 1) for k in ("rmsnorm", "linear")]
    lines = [line.partition(":")[0] for line in effect_warnings(tuple(bad))]
    assert lines == ["stage 1, linear", "stage 1, rmsnorm", "stage 2, linear", "stage 2, rmsnorm"]

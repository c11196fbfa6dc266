"""Every experiment of the plan is a point with the plan's numbers, every workload takes it, every space stays inside
the rules."""

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import pytest

from spaces.config import ConfigError, Correction, FilterPolicy, Format, ScaleRule, Schedule, TrialConfig, Zone
from spaces.library import SPACES, Choice, Dimension, Float, Int, Space, load_space
from spaces.points import POINTS, SRDD_MULTIPLIERS
from spaces.reading import as_tree, dump_yaml, flatten_fields, merge, read_config, unflatten
from spaces.workloads import WORKLOADS

CONTROLS = ["random-reward", "format-reward"]  # negative ones, beside the plan
PLAN = [
    "control",
    "bf16",
    "e12",
    "e13g",
    "e13h",
    "e13i-baseline",
    "e13i-v2",
    "e13i-v3",
    "e13i-v3-sigma0.005",
    "e13i-v4-filter-off",
    "e13i-v4-rmsnorm",
    "e13i-targeted",
    "e13i-targeted-sigma0.005",
    "e13i-high",
    "e13i-low",
    "e13j-variable",
    "e13k-constant",
    "e13l-conservative",
    "e13m-rmsnorm",
    "e14",
]


def config(workload: str, point: str) -> TrialConfig:
    return read_config(merge(WORKLOADS[workload].settings, POINTS[point].settings), origin=f"{workload}/{point}")


def value_of(trial: TrialConfig, key: str) -> Any:
    value: Any = trial
    for part in key.split("."):
        value = getattr(value, part)
    return value


# --- points -----------------------------------------------------------------------------------------------------------


def test_the_points_are_the_experiments_of_the_plan() -> None:
    assert sorted(POINTS) == sorted(PLAN + CONTROLS)
    assert all(name == point.name and point.hypothesis for name, point in POINTS.items())


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("point", POINTS)
def test_every_workload_takes_every_point(workload: str, point: str) -> None:
    trial = config(workload, point)
    assert trial.grpo.steps == WORKLOADS[workload].settings.get("grpo", {}).get("steps", 29)


FILTER_OFF = {"e13i-v3", "e13i-v4-filter-off"}  # the arms that ask whether the filter is the cause


@pytest.mark.parametrize("workload", ["embedded", "tiny", "smollm2-135m"])
def test_experiments_of_the_plan_carry_its_filter_and_controls_do_not(workload: str) -> None:
    for name in PLAN:
        grpo = config(workload, name).grpo
        if name in FILTER_OFF | {"control", "bf16"}:
            assert grpo.filter_groups == "off", name
        else:
            assert (grpo.filter_groups, grpo.max_gen_batches) == ("resample", 5), name


def test_on_the_plans_own_workload_the_control_shares_the_filter() -> None:
    for name in PLAN:
        filtering = config("qwen2.5-1.5b-gsm8k", name).grpo.filter_groups
        assert filtering == ("off" if name in FILTER_OFF else "resample"), name


LINEAR, NORMS = ("linear",), ("rmsnorm",)
# name, sigma_start, sigma_end, stages, schedule, modules, layers
NOISY: list[tuple[str, float, float, int, str, tuple[str, ...], str]] = [
    ("e12", 0.05, 0.0005, 10, "qerl_code", NORMS, "all"),
    ("e13i-baseline", 0.05, 0.0005, 10, "qerl_code", LINEAR, "all"),
    ("e13i-v2", 0.01, 0.0001, 10, "qerl_code", LINEAR, "all"),
    ("e13i-v3", 0.05, 0.0005, 10, "qerl_code", NORMS, "all"),
    ("e13i-v3-sigma0.005", 0.005, 0.00005, 10, "qerl_code", LINEAR, "all"),
    ("e13i-v4-filter-off", 0.05, 0.0005, 10, "qerl_code", LINEAR, "all"),
    ("e13i-v4-rmsnorm", 0.05, 0.0005, 10, "qerl_code", NORMS, "all"),
    ("e13i-targeted", 0.05, 0.0005, 10, "qerl_code", LINEAR, "middle"),
    ("e13i-targeted-sigma0.005", 0.005, 0.00005, 10, "qerl_code", LINEAR, "middle"),
    ("e13i-high", 0.05, 0.0005, 10, "qerl_code", LINEAR, "all"),
    ("e13i-low", 0.05, 0.0005, 10, "qerl_code", LINEAR, "all"),
    ("e13j-variable", 0.05, 0.0005, 10, "qerl_code", LINEAR, "all"),
    ("e13k-constant", 0.03, 0.03, 1, "constant", LINEAR, "all"),
    ("e13l-conservative", 0.05, 0.005, 5, "qerl_code", LINEAR, "all"),
    ("e13m-rmsnorm", 0.05, 0.0005, 10, "qerl_code", NORMS, "all"),
    ("e14", 0.05, 0.0005, 10, "qerl_code", NORMS, "all"),
]


@pytest.mark.parametrize(("name", "start", "end", "stages", "schedule", "modules", "layers"), NOISY)
def test_noisy_points_carry_the_plans_numbers(
    name: str, start: float, end: float, stages: int, schedule: str, modules: tuple[str, ...], layers: str
) -> None:
    noise = config("embedded", name).noise
    assert (noise.sigma_start, noise.sigma_end, noise.num_stages, noise.schedule) == (start, end, stages, schedule)
    assert (noise.modules, noise.layers) == (modules, layers)


def test_every_other_point_is_without_noise() -> None:
    quiet = {name for name in PLAN if config("embedded", name).noise.sigma_start == 0}
    assert quiet == set(PLAN) - {row[0] for row in NOISY} == {"control", "bf16", "e13g", "e13h"}


PRECISION = {"bf16": "W16A16", "e12": "W4A16", "e14": "W4A16"}


def test_points_compute_in_the_plans_precision() -> None:
    for name in PLAN:
        quant = config("embedded", name).quant
        assert quant.mode == PRECISION.get(name, "W4A4"), name
        if quant.mode != "W16A16":
            assert quant.weights == ("nvfp4" if name == "e13g" else "mxfp4"), name


@pytest.mark.parametrize(("name", "start", "end"), [("e13i-high", 0.08, 0.001), ("e13i-low", 0.03, 0.0003)])
def test_sigma_of_the_middle_zone_alone_differs_in_e13i_high_and_low(name: str, start: float, end: float) -> None:
    (zone,) = config("embedded", name).noise.zones
    assert (zone.zone, zone.sigma_start, zone.sigma_end) == ("middle", start, end)


def test_multipliers_are_the_28_of_the_plans_scan() -> None:
    assert len(SRDD_MULTIPLIERS) == 28
    assert {i: SRDD_MULTIPLIERS[i] for i in (0, 9, 15, 26, 27)} == {0: 0.83, 9: 1.02, 15: 1.17, 26: 0.79, 27: 0.88}
    assert [name for name in PLAN if config("embedded", name).noise.layer_multipliers] == ["e12", "e13j-variable"]
    assert config("embedded", "e13j-variable").noise.layer_multipliers == tuple(SRDD_MULTIPLIERS)


CONFIDENCE = {
    "e13i-baseline": 0.70,
    "e13i-targeted": 0.60,
    "e13i-high": 0.55,
    "e13i-low": 0.45,
    "e13j-variable": 0.65,
    "e13k-constant": 0.30,
    "e13l-conservative": 0.40,
    "e13m-rmsnorm": 0.50,
}


def test_confidences_are_the_plans() -> None:
    assert {name: point.confidence for name, point in POINTS.items() if point.confidence is not None} == CONFIDENCE


def test_the_collapses_that_the_plan_recorded_are_those_of_its_text() -> None:
    assert {name: point.collapsed_at_step for name, point in POINTS.items() if point.collapsed_at_step is not None} == {
        "e13i-baseline": 3,
        "e13i-v2": 4,
    }
    for name, point in POINTS.items():
        assert (point.collapsed_at_step is not None) == (
            f"failed at step {point.collapsed_at_step}" in (point.recorded or "")
        ), name


# --- workloads --------------------------------------------------------------------------------------------------------

# facts/rin-grpo.md, section 5.1, and what its E13h left unquantised
QWEN: list[tuple[str, Any]] = [
    ("model.name", "Qwen/Qwen2.5-1.5B-Instruct"),
    ("model.adapter", "lora"),
    ("model.lora_rank", 32),
    ("model.lora_alpha", 16.0),
    ("model.dtype", "bfloat16"),
    ("quant.skip_layers", (0, -1)),
    ("quant.exclude", ("lm_head",)),
    ("task.name", "gsm8k"),
    ("grpo.steps", 29),
    ("grpo.generation_prompts", 256),
    ("grpo.prompts", 128),
    ("grpo.updates_per_step", 128 // 32),
    ("grpo.epochs", 1),
    ("grpo.group_size", 8),
    ("grpo.learning_rate", 1e-5),
    ("grpo.warmup_updates", 10),
    ("grpo.weight_decay", 0.1),
    ("grpo.clip_low", 0.2),
    ("grpo.clip_high", 0.25),
    ("grpo.kl_beta", 0.0),
    ("grpo.loss", "dapo"),
    ("grpo.overlong_buffer", 256),
    ("grpo.overlong_penalty", 0.5),
    ("grpo.filter_groups", "resample"),
    ("grpo.max_gen_batches", 5),
    ("rollout.max_new_tokens", 1024),
    ("rollout.temperature", 1.0),
    ("eval.every", 20),
]


@pytest.mark.parametrize(("key", "value"), QWEN)
def test_the_qwen_workload_carries_the_plans_number(key: str, value: Any) -> None:
    assert value_of(config("qwen2.5-1.5b-gsm8k", "e13h"), key) == value


def test_workloads_say_their_names_and_cost() -> None:
    assert {name: w.name for name, w in WORKLOADS.items()} == {name: name for name in WORKLOADS}
    assert all(w.description and w.trial_seconds > 0 and w.trial_cpus >= 1 for w in WORKLOADS.values())
    assert set(WORKLOADS) == {"embedded", "tiny", "smollm2-135m", "qwen2.5-1.5b-gsm8k"}


def test_the_default_configuration_is_the_embedded_workload() -> None:
    assert read_config(WORKLOADS["embedded"].settings) == TrialConfig()
    assert TrialConfig().model.recipe is not None


# --- spaces -----------------------------------------------------------------------------------------------------------


def values(dimension: Dimension) -> list[Any]:
    """The corners of a dimension: both ends, or every option."""
    domain = dimension.domain
    return list(domain.options.values()) if isinstance(domain, Choice) else [domain.low, domain.high]


def active(space: Space, labels: dict[str, str]) -> list[Dimension]:
    """The dimensions that exist under these labels of the conditioning choices."""
    return [d for d in space.dimensions if d.when is None or labels[d.when.parent] in d.when.labels]


def corners(space: Space) -> Iterator[dict[str, Any]]:
    """Every combination of conditioning labels and numeric ends, each with every option of every other choice in
    turn."""
    parents = sorted({d.when.parent for d in space.dimensions if d.when is not None})
    options = {d.key: d.domain.options for d in space.dimensions if isinstance(d.domain, Choice)}
    for chosen in product(*(options[parent] for parent in parents)):
        labels = dict(zip(parents, chosen, strict=True))
        fixed = {parent: options[parent][label] for parent, label in labels.items()}
        rest = [d for d in active(space, labels) if d.key not in parents]
        numbers = [d for d in rest if not isinstance(d.domain, Choice)]
        choices = [d for d in rest if isinstance(d.domain, Choice)]
        first = {d.key: values(d)[0] for d in choices}
        in_turn = [first | {d.key: option} for d in choices for option in values(d)] or [{}]
        for ends in product(*(values(d) for d in numbers)):
            for options_now in in_turn:
                yield fixed | dict(zip([d.key for d in numbers], ends, strict=True)) | options_now


@pytest.mark.parametrize("name", SPACES)
def test_every_corner_of_a_space_is_a_valid_trial_on_every_workload(name: str) -> None:
    space = SPACES[name]
    points = list(corners(space))
    assert len(points) >= 4
    for workload in WORKLOADS.values():
        base = merge(workload.settings, space.settings)
        for point in points if workload.name == "embedded" else points[:: max(1, len(points) // 100)]:
            trial = read_config(merge(base, unflatten(point)), origin=f"{workload.name} {point}")
            assert trial.noise.sigma_start == point["noise.sigma_start"]


@pytest.mark.parametrize("name", SPACES)
def test_every_dimension_is_a_key_of_the_configuration(name: str) -> None:
    known = set(flatten_fields(TrialConfig))
    assert [d.key for d in SPACES[name].dimensions if d.key not in known] == []
    assert SPACES[name].name == name
    assert SPACES[name].description


def test_there_is_a_space_for_sigma_targets_schedule_everything_and_each_mode() -> None:
    assert set(SPACES) == {"sigma", "targets", "schedule", "full", "w4a4", "w4a8", "w4a16", "w16a16"}


def sigma_range(space: str, module: str) -> tuple[float, float]:
    (domain,) = (
        d.domain
        for d in SPACES[space].dimensions
        if d.key == "noise.sigma_start" and d.when is not None and d.when.value == module
    )
    assert isinstance(domain, Float)
    assert domain.log
    return domain.low, domain.high


# The plan: "W4A16: sigma in {0.01, 0.03, 0.05, 0.08}; W4A4: sigma in {0.002, 0.005, 0.01, 0.02}", for linear layers.
@pytest.mark.parametrize(
    ("space", "low", "high"),
    [
        ("w4a4", 0.002, 0.02),
        ("sigma", 0.002, 0.02),
        ("targets", 0.002, 0.02),
        ("full", 0.002, 0.02),
        ("w4a16", 0.01, 0.08),
    ],
)
def test_sigma_on_linear_layers_has_the_range_of_the_plans_table(space: str, low: float, high: float) -> None:
    assert sigma_range(space, "linear") == (low, high)


def test_sigma_of_w4a8_lies_between_its_neighbours() -> None:
    ranges = [sigma_range(space, "linear") for space in ("w4a4", "w4a8", "w4a16")]
    assert sorted(ranges) == ranges
    assert [high for _, high in ranges] == sorted(high for _, high in ranges)


@pytest.mark.parametrize("space", ["w4a4", "w4a8", "w4a16", "w16a16"])
def test_a_mode_space_computes_in_its_mode(space: str) -> None:
    assert read_config(SPACES[space].settings).quant.mode.lower() == space


@pytest.mark.parametrize("space", ["sigma", "targets", "w4a4", "w4a16", "full"])
def test_sigma_on_norms_reaches_from_qerls_ranges_and_not_from_those_of_linear_layers(space: str) -> None:
    low, high = sigma_range(space, "rmsnorm")
    assert low <= 0.01 < 0.05 <= high
    assert (low, high) != sigma_range(space, "linear")


FULL: list[tuple[str, Any]] = [
    ("quant.scale_rule", ScaleRule),
    ("grpo.filter_groups", FilterPolicy),
    ("rollout.correction", Correction),
    ("noise.schedule", Schedule),
    ("noise.layers", Zone),
]


@pytest.mark.parametrize(("key", "names"), FULL)
def test_the_full_space_holds_every_option(key: str, names: Any) -> None:
    (domain,) = (d.domain for d in SPACES["full"].dimensions if d.key == key)
    assert isinstance(domain, Choice)
    assert set(domain.options) - {"all"} == set(get_args(names))
    assert all(label == value for label, value in domain.options.items())


@pytest.mark.parametrize(
    ("key", "inside"),
    [("rollout.temperature", 1.0), ("grpo.learning_rate", 3e-5), ("noise.num_stages", 10), ("noise.sigma_end", 0.0005)],
)
def test_the_full_space_reaches_around_the_default(key: str, inside: float) -> None:
    (domain,) = (d.domain for d in SPACES["full"].dimensions if d.key == key)
    assert isinstance(domain, Float | Int)
    assert domain.low < inside < domain.high


def test_every_format_of_a_mode_space_is_a_format() -> None:
    quant = [space.settings.get("quant", {}) for space in SPACES.values()]
    assert {value for settings in quant for value in settings.values()} <= set(get_args(Format))


# Every way in which a space can contradict itself is refused before anything runs.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"key": "noise.sigma_start", "domain": {"kind": "float", "low": 1, "high": 1}}, "low < high"),
    ({"key": "noise.sigma_start", "domain": {"kind": "float", "low": 0, "high": 1, "log": True}}, "0 < low with log"),
    ({"key": "noise.num_stages", "domain": {"kind": "int", "low": 3, "high": 2}}, "low < high"),
    ({"key": "noise.schedule", "domain": {"kind": "choice", "options": {}}}, "at least 1"),
    ({"key": "noise.schedule", "domain": {"kind": "gauss"}}, "gauss"),
    ({"key": "noise.num_stages", "domain": {"kind": "int", "low": 3, "high": 5, "log": True}}, "unknown key"),
    (
        {
            "key": "noise.num_stages",
            "domain": {"kind": "int", "low": 3, "high": 5},
            "when": {"parent": "noise.modules", "value": "linear"},
        },
        "must be a choice listed before it",
    ),
]


@pytest.mark.parametrize(("dimension", "words"), WRONG)
def test_a_space_that_contradicts_itself_is_refused_in_one_line(
    dimension: dict[str, Any], words: str, tmp_path: Any
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(dump_yaml({"name": "mine", "description": "d", "dimensions": [dimension]}), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_space(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("name", SPACES)
def test_a_space_equals_itself_after_yaml(name: str, tmp_path: Any) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(dump_yaml(as_tree(SPACES[name])), encoding="utf-8")
    assert load_space(path) == SPACES[name]

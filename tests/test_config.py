"""A configuration arrives whole, or is refused in one line that says what to do."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from spaces.config import (
    ConfigError,
    GRPOConfig,
    ModelConfig,
    NoiseConfig,
    QuantConfig,
    TaskConfig,
    TrialConfig,
    ZoneSigma,
)
from spaces.points import POINTS
from spaces.reading import (
    as_tree,
    dump_yaml,
    flatten,
    flatten_fields,
    load_yaml,
    merge,
    parse_overrides,
    parse_yaml,
    read_config,
    unflatten,
)
from spaces.workloads import WORKLOADS

ROOT = Path(__file__).parents[1]

# Every kind of field that is not a plain scalar, filled.
RICH = TrialConfig(
    model=ModelConfig(name="some/model", adapter="lora", lora_rank=8),
    quant=QuantConfig(exclude=("lm_head", "*.down_proj"), skip_layers=(0, -1)),
    noise=NoiseConfig(
        sigma_start=0.05,
        sigma_end=1e-05,
        modules=("rmsnorm", "linear"),
        layers=(0, 3),
        layer_multipliers=(0.5, 1.0, 2.0),
        zones=(ZoneSigma(zone="first", sigma_start=0.02, sigma_end=0.001),),
    ),
    grpo=GRPOConfig(filter_groups="off", generation_prompts=64),
    task=TaskConfig(
        name="reasoning_gym:chain_sum", options=(("max_terms", 3), ("off", "on"), ("share", 0.5), ("strict", True))
    ),
    seed=3,
)


# --- YAML 1.2 ---------------------------------------------------------------------------------------------------------

YAML_12: list[tuple[str, Any]] = [
    ("off", "off"),
    ("on", "on"),
    ("yes", "yes"),
    ("no", "no"),
    ("y", "y"),
    ("OFF", "OFF"),
    ("true", True),
    ("false", False),
    ("null", None),
    ("1e-3", 0.001),
    ("1E-3", 0.001),
    ("5e5", 500000.0),
    ("0.05", 0.05),
    ("-1", -1),
    ("012", 12),
    ("0o14", 12),
    ("1:30", "1:30"),
    ("'1e-3'", "1e-3"),
    ("[0, 3]", [0, 3]),
    ("{a: off}", {"a": "off"}),
]


@pytest.mark.parametrize(("text", "value"), YAML_12)
def test_yaml_is_version_1_2_in_files_and_in_set(text: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"key: {text}\n", encoding="utf-8")
    for got in (load_yaml(path)["key"], parse_overrides([f"key={text}"])["key"]):
        assert (type(got), got) == (type(value), value)


def test_the_filter_can_be_switched_off_in_a_file_and_in_set(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("grpo:\n  filter_groups: off\n  learning_rate: 1e-3\n", encoding="utf-8")
    from_file = read_config(load_yaml(path))
    assert (from_file.grpo.filter_groups, from_file.grpo.learning_rate) == ("off", 0.001)
    assert (
        read_config({"grpo": {"filter_groups": "drop"}}, ["grpo.filter_groups=off", "grpo.learning_rate=1e-3"])
        == from_file
    )


# --- there and back ---------------------------------------------------------------------------------------------------


def point_on(workload: str, point: str) -> TrialConfig:
    return read_config(merge(WORKLOADS[workload].settings, POINTS[point].settings))


def assert_same_after_round_trips(config: TrialConfig) -> None:
    tree = as_tree(config)
    for again in (
        read_config(parse_yaml(dump_yaml(tree, comment="a\nb"), "text")),
        TrialConfig.model_validate_json(config.model_dump_json()),
        TrialConfig.model_validate(json.loads(json.dumps(tree))),
        TrialConfig.model_validate(unflatten(flatten(tree))),
        TrialConfig.model_validate(config.model_dump()),
    ):
        assert again == config
        assert hash(again) == hash(config)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_point_equals_itself_after_yaml_and_json(workload: str) -> None:
    for point in POINTS:
        assert_same_after_round_trips(point_on(workload, point))


def test_every_kind_of_field_equals_itself_after_yaml_and_json() -> None:
    assert_same_after_round_trips(RICH)


def test_configurations_are_dictionary_keys() -> None:
    options: dict[str, Any] = {"b": 1, "a": 2}
    tree = {"model": {"name": "x"}, "task": {"name": "reasoning_gym:x", "options": options}}
    turned = {"model": {"name": "x"}, "task": {"name": "reasoning_gym:x", "options": dict(reversed(options.items()))}}
    assert len({read_config(tree), read_config(turned), RICH, RICH.model_copy(), TrialConfig()}) == 3


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RICH.seed = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        RICH.noise.sigma_start = 0.1  # type: ignore[misc]


def test_single_values_stand_for_tuples_of_one() -> None:
    config = read_config({}, ["noise.modules=linear", "quant.exclude=lm_head", "noise.layers=2"])
    assert (config.noise.modules, config.quant.exclude, config.noise.layers) == (("linear",), ("lm_head",), (2,))


NUMPY: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"seed": np.int64(3)}, {"seed": 3}),
    ({"seed": np.array(3)}, {"seed": 3}),
    ({"noise": {"sigma_start": np.float64(0.25)}}, {"noise": {"sigma_start": 0.25}}),
    ({"noise": {"sigma_start": np.float32(0.25)}}, {"noise": {"sigma_start": 0.25}}),
    ({"noise": {"final_norm": np.bool_(True)}}, {"noise": {"final_norm": True}}),
    ({"noise": {"schedule": np.str_("linear")}}, {"noise": {"schedule": "linear"}}),
    ({"noise": {"layers": np.array([1, 2])}}, {"noise": {"layers": [1, 2]}}),
    ({"noise": {"layers": [np.int64(1), np.int32(2)]}}, {"noise": {"layers": [1, 2]}}),
    ({"noise": {"layers": np.int64(1)}}, {"noise": {"layers": 1}}),
    ({"noise": {"modules": np.array(["linear"])}}, {"noise": {"modules": ["linear"]}}),
    ({"noise": {"layer_multipliers": (np.float32(0.5), np.float32(2))}}, {"noise": {"layer_multipliers": [0.5, 2.0]}}),
    (
        {"noise": {"zones": [{"zone": "middle", "sigma_start": np.float64(0.5), "sigma_end": np.float32(0.25)}]}},
        {"noise": {"zones": [{"zone": "middle", "sigma_start": 0.5, "sigma_end": 0.25}]}},
    ),
    (
        {"model": {"name": "x"}, "task": {"name": "reasoning_gym:x", "options": {"terms": np.int64(2)}}},
        {"model": {"name": "x"}, "task": {"name": "reasoning_gym:x", "options": {"terms": 2}}},
    ),
]


@pytest.mark.parametrize(("numpy", "plain"), NUMPY)
def test_numpy_values_become_python_values(numpy: dict[str, Any], plain: dict[str, Any]) -> None:
    config = read_config(numpy)
    assert config == read_config(plain)
    assert_same_after_round_trips(config)
    assert not any(isinstance(value, np.generic) for value in leaves(config.model_dump()))


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def test_merge_lets_the_leaves_of_the_second_win_and_changes_neither() -> None:
    base: dict[str, Any] = {"a": {"b": 1, "c": [2]}, "d": {"e": 3}, "h": {"i": 8}}
    changes: dict[str, Any] = {"a": {"b": 5}, "d": 4, "f": {"g": 6}}
    merged = merge(base, changes)
    assert merged == {"a": {"b": 5, "c": [2]}, "d": 4, "f": {"g": 6}, "h": {"i": 8}}
    merged["a"]["b"] = merged["h"]["i"] = 7
    assert (base["a"]["b"], base["h"]["i"], changes["a"]["b"]) == (1, 8, 5)


def test_an_empty_mapping_empties() -> None:
    base = {"model": {"name": "x"}, "task": {"name": "reasoning_gym:x", "options": {"min_terms": 2}}}
    assert read_config(base).task.options == (("min_terms", 2),)
    assert read_config(base, ["task.options={}"]).task.options == ()
    assert merge({"a": {"b": 1}}, {}) == {"a": {"b": 1}}


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(overrides: list[str], tree: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(tree or {}, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


UNKNOWN = [
    ("noise.sigma_strat=0.1", "noise.sigma_start"),
    ("sigma_start=0.1", "noise.sigma_start"),
    ("grpo.sigma_end=0.1", "noise.sigma_end"),
    ("nosie={sigma_start: 0.1}", "noise"),
    ("noise.layer=middle", "noise.layers"),
    ("noise.layers[0]=3", "noise.layers"),
    ("noise.target_modules=linear", "noise.modules"),
    ("model.recipe.dept=4", "model.recipe.depth"),
    ("noise.zones=[{zone: middle, sigma_start: .1, sigma_edn: .1}]", "noise.zones.sigma_end"),
    # The names of types are dropped from pydantic's paths, but these are names that the user gave.
    ("noise.float=3", "noise.layers"),
    ("int=3", "quant"),
]


@pytest.mark.parametrize(("override", "nearest"), UNKNOWN)
def test_an_unknown_key_is_refused_by_path_with_the_nearest_known_one(override: str, nearest: str) -> None:
    key = override.partition("=")[0]
    message = refusal([override])
    assert f"unknown key {key}" in message
    assert message.endswith(f"did you mean {nearest}?")
    assert nearest in flatten_fields(TrialConfig)


FILLED: dict[str, Any] = {
    **as_tree(RICH),
    "threads": 2,
    "noise": {**as_tree(RICH)["noise"], "layers": [0, 3]},
}
EMBEDDED = as_tree(TrialConfig())


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every number and truth in a tree, also inside lists."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(item, (*path, key))
    elif isinstance(value, int | float):
        yield path, value


def with_value(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = tree.copy()
    changed[path[0]] = with_value(tree[path[0]], path[1:], value)
    return changed


def test_what_is_no_number_is_never_taken_for_one_at_any_depth() -> None:
    """`true` for 1, 1 for true, "5" and 5.0 for 5: each would run with a value that nobody wrote."""
    keys = set()
    for tree in (FILLED, EMBEDDED):
        for path, value in numbers(tree):
            if path[:2] == ("task", "options"):
                continue  # of another program, and of any type
            keys.add(".".join(str(part) for part in path if isinstance(part, str)))
            wrong = [str(value), 1 if isinstance(value, bool) else True]
            wrong += [float(value)] if type(value) is int else []
            for other in wrong:
                with pytest.raises(ConfigError):
                    read_config(with_value(tree, path, other))
    assert {"noise.layers", "noise.zones.sigma_end", "quant.skip_layers", "noise.layer_multipliers"} <= keys
    assert {"threads", "grpo.generation_prompts", "model.recipe.depth", "noise.final_norm"} <= keys


# The settings that earlier systems dropped on the way: none may be taken silently.
@pytest.mark.parametrize(
    "key", ["noise.target_layers", "noise.use_variable_sigma", "noise.layer_sigma_config", "noise.layer_types"]
)
def test_what_earlier_systems_dropped_silently_is_refused(key: str) -> None:
    assert f"unknown key {key}" in refusal([f"{key}=[1]"])


REFUSED: list[tuple[list[str], list[str]]] = [
    # sigma
    (["noise.sigma_start=-0.1"], ["noise.sigma_start=-0.1", "greater than or equal to 0"]),
    (["noise.sigma_start=.nan"], ["noise.sigma_start=nan", "finite"]),
    (["noise.sigma_start=.inf"], ["noise.sigma_start=inf", "finite"]),
    (["noise.sigma_start=1e400"], ["noise.sigma_start=inf", "finite"]),
    (["noise.sigma_end=.nan"], ["noise.sigma_end=nan", "finite"]),
    (["noise.sigma_start=off"], ["noise.sigma_start=off", "valid number"]),
    (["noise.sigma_start=null"], ["noise.sigma_start=nothing", "valid number"]),
    (
        ["noise.sigma_start=0.01", "noise.sigma_end=0.02"],
        ["noise", "sigma_start=0.01", "sigma_end=0.02", "at most sigma_start"],
    ),
    (["noise.sigma_start=0.01", "noise.sigma_end=0"], ["sigma_end=0", "above 0", "sigma_start=0 switches noise off"]),
    (
        ["noise.zones=[{zone: middle, sigma_start: .1, sigma_end: .2}]"],
        ["noise.zones.0", "sigma_start=0.1", "sigma_end=0.2", "at most"],
    ),
    (["noise.zones=[{zone: middle, sigma_start: .1}]"], ["noise.zones.0.sigma_end", "required"]),
    # ranges and choices
    (["grpo.steps=0"], ["grpo.steps=0", "greater than or equal to 1"]),
    (["grpo.steps=2.5"], ["grpo.steps=2.5", "integer"]),
    (["grpo.group_size=1"], ["grpo.group_size=1", "greater than or equal to 2"]),
    (["quant.scale_rule=round"], ["quant.scale_rule=round", "'floor', 'even', 'rceil' or 'ceil'"]),
    (["quant.weights=int4"], ["quant.weights=int4", "'mxfp4'"]),
    (["noise.modules=[]"], ["noise.modules=[]", "at least 1"]),
    (["noise.modules=norms"], ["noise.modules.0=norms", "'rmsnorm', 'qk_norm', 'post_norm' or 'linear'"]),
    (["noise.modules=[linear, linear]"], ["noise.modules", "twice", "['linear', 'linear']", "keep one"]),
    (["noise.layers=[]"], ["noise.layers", "[]", "block indices"]),
    (["noise.layers=[-1]"], ["noise.layers", "[-1]", ">= 0"]),
    (["noise.layers=[1, 1]"], ["noise.layers", "[1, 1]", "different"]),
    (["noise.layers=true"], ["noise.layers", "True", "block indices"]),
    (["noise.layers=top"], ["noise.layers", "top", "middle"]),
    (["noise.layer_multipliers=[1]"], ["noise.layer_multipliers", "[1.0]", "at least 2"]),
    (["noise.layer_multipliers=[1, -1]"], ["noise.layer_multipliers", "[1.0, -1.0]", ">= 0"]),
    (["model.recipe.heads=5"], ["model.recipe", "heads=5", "must divide"]),
    (["noise=3"], ["noise=3", "dictionary"]),
    # options without a use
    (["model.lora_rank=8"], ["model", "lora_rank=8", "adapter=full", "set adapter=lora"]),
    (["model.lora_alpha=8"], ["model", "lora_alpha=8.0", "adapter=full", "set adapter=lora"]),
    (["model.name=x", "model.recipe.depth=4"], ["model", "recipe", "name=x", "null"]),
    (["quant.backward=exact"], ["quant.backward=exact", "'dequantized' or 'high_precision'"]),
    (
        ["quant.backward=high_precision", "quant.weights=none", "quant.activations=none"],
        ["quant", "backward=high_precision", "nothing is quantised"],
    ),
    (
        ["quant.backward=high_precision", "quant.weights=none", "model.adapter=lora"],
        ["quant.backward=high_precision", "model.adapter=lora", "quant.weights=none", "remove it"],
    ),
    (["quant.hadamard=1"], ["quant.hadamard=1", "boolean"]),
    (["quant.hadamard=yes"], ["quant.hadamard=yes", "boolean"]),
    (
        ["quant.hadamard=true", "quant.weights=none", "quant.activations=none"],
        ["quant", "hadamard=true", "nothing is quantised"],
    ),
    (
        ["quant.weights=nvfp4", "quant.activations=none", "quant.scale_rule=ceil"],
        ["quant", "scale_rule=ceil", "mxfp4 or mxfp8"],
    ),
    (
        ["noise.modules=linear", "noise.final_norm=true"],
        ["noise", "final_norm=true", "a kind of norm", "['linear']", "set final_norm=false"],
    ),
    (["noise.placement=after"], ["noise", "placement=after", "add linear", "set placement=before"]),
    (["noise.modules=[linear, qk_norm]"], ["noise.modules=qk_norm", "embedded", "set it to rmsnorm or linear"]),
    (["noise.modules=post_norm"], ["noise.modules=post_norm", "embedded", "choose another model.name"]),
    (["noise.scale=step"], ["noise", "scale=step", "['rmsnorm']", "set scale=rms"]),
    (
        ["noise.scale=step", "noise.modules=linear", "quant.weights=none"],
        ["noise.scale=step", "quant.weights=none", "scale=rms"],
    ),
    (
        ["noise.sigma_start=0", "noise.zones=[{zone: last, sigma_start: 1, sigma_end: 1}]"],
        ["noise", "zones", "sigma_start=0", "remove zones"],
    ),
    (
        [f"noise.zones=[{', '.join(['{zone: last, sigma_start: 1, sigma_end: 1}'] * 2)}]"],
        ["noise", "zones", "['last', 'last']", "keep one"],
    ),
    (["task.options={a: 1}"], ["task", "options={'a': 1}", "name=addition", "reasoning_gym"]),
    (["task.path=x.jsonl"], ["task", "path=x.jsonl", "name=addition", "gsm8k"]),
    (["task.chat=true"], ["task", "chat=True", "name=addition", "remove"]),
    (["task.prompt=Q"], ["task", "prompt=Q", "name=addition", "remove"]),
    # parts that do not fit together
    (["grpo.epochs=3"], ["grpo", "epochs=3", "updates_per_step=4", "divide"]),
    (["grpo.updates_per_step=999"], ["grpo", "updates_per_step=999", "prompts=32", "raise prompts or epochs"]),
    (["grpo.overlong_buffer=6"], ["grpo.overlong_buffer", "6", "below rollout.max_new_tokens"]),
    (["task.digits=4"], ["task.digits=4", "model.recipe.digits=3"]),
    (["task.name=gsm8k"], ["task.name=gsm8k", "model.name"]),
    (["model.name=some/model"], ["task.name=addition", "model.name=some/model", "another task"]),
    # what is not YAML, or not an assignment
    (["seed"], ["--set seed", "key=value"]),
    (["=3"], ["--set =3", "key=value"]),
    (["seed=[1, 2"], ["--set seed", "not valid YAML", "line 1"]),
    (["seed={a: 1, a: 2}"], ["--set seed", "duplicate"]),
    (["seed=2020-99-99"], ["--set seed", "not valid YAML", "quote"]),
    (["seed=!!int abc"], ["--set seed", "not valid YAML", "abc"]),
    (["seed=!!python/object:os.system x"], ["--set seed", "not valid YAML", "tag"]),
    (["seed=\x00"], ["--set seed", "not valid YAML"]),
    (['seed="a\\nb"'], ["seed=a b", "valid integer"]),
    # a key and a part of it: one of the two would be lost
    (["noise.sigma_start=0.3", "noise={num_stages: 3}"], ["noise=", "either the whole or its parts"]),
    (["noise=3", "noise.sigma_start=0.3"], ["noise.sigma_start=0.3", "either the whole or its parts"]),
    (["noise={sigma_start:0.1}"], ["noise.sigma_start:0.1", "a space follows the colon: {sigma_start: 0.1}"]),
    (["task.reward_options={a:1}"], ["task.reward_options", "a space follows the colon: {a: 1}"]),
    # everything that is missing, at once
    (["noise.zones=[{zone: middle}]"], ["noise.zones.0.sigma_start, noise.zones.0.sigma_end", "required"]),
]


@pytest.mark.parametrize(
    ("overrides", "words"), REFUSED, ids=[" ".join(overrides)[:70].replace("\x00", "NUL") for overrides, _ in REFUSED]
)
def test_a_refusal_is_one_line_with_key_value_and_remedy(overrides: list[str], words: list[str]) -> None:
    message = refusal(overrides)
    assert [word for word in words if word not in message] == []


TREES: list[tuple[dict[Any, Any], str]] = [
    ({"a\nb": 3}, "unknown key a b=3"),
    ({"noise": {1: 3}}, "Keys should be strings"),
    ({"noise": {"sigma_start": "a\nb"}}, "noise.sigma_start=a b"),
    ({"noise": {"sigma_start": "x" * 500}}, "noise.sigma_start=xxx"),
    ({"model": {"name": "x"}, "task": {"name": "reasoning_gym:x", "options": {1: 2, "a": 3}}}, "task.options"),
    ({"model": {"name": "x"}, "task": {"name": "reasoning_gym:x", "options": {"a": [1]}}}, "task.options"),
    ({"model": {"name": "x"}, "task": {"name": "reasoning_gym:x", "options": {"a": float("nan")}}}, "task.options"),
]


@pytest.mark.parametrize(("tree", "words"), TREES)
def test_a_refused_file_is_explained_in_one_short_line(tree: dict[Any, Any], words: str) -> None:
    message = refusal([], tree)
    assert words in message
    assert len(message) < 300


FILES = [
    ("- 1\n- 2\n", "holds list, not a mapping"),
    ("", "holds NoneType, not a mapping"),
    ("a: [1\n", "not valid YAML at line"),
    ("a: 1\na: 2\n", "duplicate"),
    ("a: \x07\n", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "words"), FILES)
def test_a_file_without_settings_is_refused_by_its_path(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused_by_their_path(tmp_path: Path) -> None:
    binary = tmp_path / "model.bin"
    binary.write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "missing.yaml", tmp_path, binary):
        with pytest.raises(ConfigError) as caught:
            load_yaml(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "give the path of a YAML file" in str(caught.value)


# --- sigma ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [0.0, 0.0005, 5.0])
def test_sigma_start_zero_is_the_control_and_ignores_sigma_end(end: float) -> None:
    assert NoiseConfig(sigma_start=0.0, sigma_end=end).sigma_start == 0


@pytest.mark.parametrize(("start", "end"), [(0.05, 0.0005), (0.03, 0.03), (1e-9, 1e-12), (2.0, 0.1)])
def test_sigma_end_may_be_anything_above_zero_up_to_sigma_start(start: float, end: float) -> None:
    noise = NoiseConfig(sigma_start=start, sigma_end=end)
    assert (noise.sigma_start, noise.sigma_end) == (start, end)


@pytest.mark.parametrize(
    ("weights", "activations", "mode"),
    [
        ("mxfp4", "mxfp4", "W4A4"),
        ("nvfp4", "nvfp4", "W4A4"),
        ("mxfp4", "mxfp8", "W4A8"),
        ("mxfp4", "none", "W4A16"),
        ("none", "none", "W16A16"),
    ],
)
def test_the_mode_is_said_in_the_words_of_the_field(weights: Any, activations: Any, mode: str) -> None:
    assert QuantConfig(weights=weights, activations=activations).mode == mode


# --- the module -------------------------------------------------------------------------------------------------------


def records(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from records(kind)


def test_every_field_is_documented() -> None:
    found = list(records(TrialConfig))
    assert {ZoneSigma, NoiseConfig, QuantConfig} <= set(found)
    assert [
        f"{m.__name__}.{name}" for m in found for name, field in m.model_fields.items() if not field.description
    ] == []


@pytest.mark.slow
def test_spaces_can_be_imported_without_torch_and_ray() -> None:
    code = (
        "import sys, spaces.config, spaces.library, spaces.points, spaces.workloads\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'mlflow', 'optuna'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("day", [0, 1738281600.5, True, "20250131", "2025", "2025-01-31T10:00", ["2025-01-31"]])
def test_a_day_is_a_day(day: Any) -> None:
    """pydantic would take a number for seconds since 1970."""
    text = {"name": "reasoning_gym:chain_sum", "chat": True}
    with pytest.raises(ValidationError, match="chat_date"):
        TaskConfig.model_validate({**text, "chat_date": day})
    task = TaskConfig.model_validate({**text, "chat_date": "2025-01-31"})
    assert TaskConfig.model_validate(task.model_dump(mode="json")) == task

"""What is set is never searched, and what is searched can run."""

from pathlib import Path
from typing import Any

import pytest

from dashboards.options import SweepOptions, study_config
from search.coordinates import settings_of
from search.lineup import fixed_arms, overridden
from search.proposals import lattice
from search.searchers import _identity
from search.store import StudyConfig
from spaces.config import ConfigError
from spaces.library import SPACES, Choice, Dimension, Float, Int, Space, When
from spaces.narrowing import narrowed, searched
from spaces.reading import dump_yaml, merge, parse_overrides, read_config, unflatten
from spaces.workloads import WORKLOADS


def left(space: str, *overrides: str) -> list[str]:
    """Names of the dimensions that a sweep with these settings searches."""
    return [d.name for d in searched(SPACES[space], WORKLOADS["tiny"].settings, parse_overrides(overrides)).dimensions]


FIXED: list[tuple[str, list[str], list[str]]] = [
    ("sigma", ["noise.sigma_end=0.001"], ["noise.modules", "noise.sigma_start|rmsnorm", "noise.sigma_start|linear"]),
    # the children of the fixed option stay, without their condition; those of others go
    ("sigma", ["noise.modules=linear"], ["noise.sigma_start", "noise.sigma_end"]),
    ("sigma", ["noise.modules=[linear]"], ["noise.sigma_start", "noise.sigma_end"]),
    ("sigma", ["noise.sigma_start=0.02"], ["noise.modules", "noise.sigma_end"]),
    # what has no use beside the fixed key goes too
    ("sigma", ["noise.schedule=constant", "noise.modules=linear"], ["noise.sigma_start"]),
    ("sigma", ["noise.num_stages=2", "noise.modules=linear"], ["noise.sigma_start"]),
    ("schedule", ["noise.num_stages=2"], ["noise.sigma_start"]),
    ("schedule", ["noise.schedule=constant"], ["noise.sigma_start"]),
    ("schedule", ["noise.schedule=cosine"], ["noise.sigma_start", "noise.num_stages", "noise.sigma_end"]),
]


@pytest.mark.parametrize(("space", "overrides", "names"), FIXED)
def test_a_fixed_key_leaves_the_space_with_what_hangs_on_it(space: str, overrides: list[str], names: list[str]) -> None:
    assert left(space, *overrides) == names


def test_a_format_without_scale_rules_takes_that_dimension_along() -> None:
    assert "quant.scale_rule" in left("full")
    assert "quant.scale_rule" not in left("full", "quant.weights=nvfp4", "quant.activations=nvfp4")


@pytest.mark.parametrize(
    ("space", "overrides", "said"),
    [
        ("sigma", ["noise.sigma_start=0"], "leave nothing of what it searches"),
        ("sigma", ["noise.modules=[rmsnorm, linear]"], "set noise.sigma_start too"),
        ("sigma", ["noise={modules: [rmsnorm], sigma_start: 0.02, sigma_end: 0.001}"], "leave nothing"),
        ("sigma", ["noise.sigma_start=0.001"], "sigma_end=0.002"),  # the upper end of its range never fits
        ("sigma", ["seed=3"], "--seed"),
        ("sigma", ["threads=2"], "--cpus"),
    ],
)
def test_settings_that_leave_no_search_are_refused(space: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        left(space, *overrides)


def test_a_study_holds_no_dimension_that_its_settings_fix() -> None:
    """However it is made, and read again."""
    given = {"name": "s", "space": SPACES["sigma"], "store": "/x", "tracking_uri": "x", "workload": "tiny"}
    config = StudyConfig.model_validate({**given, "settings": {"noise": {"modules": "rmsnorm"}}})
    assert [d.name for d in config.space.dimensions] == ["noise.sigma_start", "noise.sigma_end"]
    assert StudyConfig.model_validate_json(config.model_dump_json()) == config


def made(tmp_path: Path, **given: Any) -> StudyConfig:
    return study_config(SweepOptions(**{"store": str(tmp_path), "workload": "tiny", **given}))


@pytest.mark.parametrize(
    ("space", "overrides", "low", "high"),
    [
        ("schedule", ["noise.modules=linear"], 0.002, 0.02),
        ("schedule", ["noise.modules=[rmsnorm, linear]"], 0.002, 0.02),
        ("schedule", ["noise.modules=linear", "quant.activations=none"], 0.01, 0.08),
        ("schedule", ["quant.activations=none"], 0.01, 0.15),
        ("schedule", [], 0.005, 0.1),
        ("w4a16", ["noise.modules=linear"], 0.01, 0.08),
    ],
)
def test_the_range_of_sigma_is_that_of_the_modules_and_the_precision_that_are_set(
    space: str, overrides: list[str], low: float, high: float, tmp_path: Path
) -> None:
    (domain,) = (
        d.domain
        for d in made(tmp_path, space=space, overrides=overrides).space.dimensions
        if d.key == "noise.sigma_start"
    )
    assert isinstance(domain, Float)
    assert (domain.low, domain.high) == (low, high)


# --- a space that cannot run as it is written -------------------------------------------------------------------------

SIGMA = {"key": "noise.sigma_start", "domain": {"kind": "float", "low": 0.01, "high": 0.02}}
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"dimensions": [{"key": "noise.schedule", "domain": {"kind": "choice", "options": {"linear": "linaer"}}}]},
        "linaer",
    ),
    (
        {
            "dimensions": [
                {"key": "noise.schedule", "domain": {"kind": "choice", "options": {"a": "log", "b": "linaer"}}}
            ]
        },
        "noise.schedule=linaer",
    ),
    ({"dimensions": [{**SIGMA, "domain": {**SIGMA["domain"], "low": -0.01}}]}, "noise.sigma_start=-0.01"),
    (
        {"dimensions": [{"key": "grpo.clip_low", "domain": {"kind": "float", "low": 0.1, "high": 1.5}}]},
        "grpo.clip_low=1.5",
    ),
    ({"dimensions": [{"key": "grpo.group_size", "domain": {"kind": "int", "low": 1, "high": 4}}]}, "grpo.group_size=1"),
    ({"dimensions": [{"key": "noise.num_stages", "domain": {"kind": "float", "low": 3, "high": 9}}]}, "valid integer"),
    ({"dimensions": [{"key": "grpo.epochs", "domain": {"kind": "int", "low": 1, "high": 3}}]}, "epochs=3"),
    ({"dimensions": [{"key": "noise.sigma_strat", "domain": SIGMA["domain"]}]}, "did you mean noise.sigma_start"),
    (
        {"dimensions": [SIGMA, {"key": "noise", "domain": {"kind": "choice", "options": {"a": {}}}}]},
        "keep one of the two",
    ),
    ({"settings": {"noise": {"sigma_start": 0.01}}, "dimensions": [SIGMA]}, "stands in settings and is searched"),
    (
        {"settings": {"noise": {"schedule": "constant", "sigma_end": 0.001}}, "dimensions": [SIGMA]},
        "noise.sigma_end=0.001",
    ),
    (
        {"dimensions": [SIGMA, {"key": "grpo.max_gen_batches", "domain": {"kind": "int", "low": 1, "high": 3}}]},
        "changes nothing",
    ),
    ({"dimensions": [{**SIGMA, "domain": {**SIGMA["domain"], "low": True}}]}, "valid number"),
]


@pytest.mark.parametrize(("space", "said"), WRONG)
def test_a_space_with_a_value_that_never_runs_is_refused_when_the_file_is_read(
    space: dict[str, Any], said: str, tmp_path: Path
) -> None:
    place = tmp_path / "mine.yaml"
    place.write_text(dump_yaml({"name": "mine", "description": "d", **space}))
    with pytest.raises(ConfigError, match=said) as caught:
        fixed_arms(made(tmp_path, space=str(place)))
    assert "mine" in str(caught.value)


def test_ranges_that_fit_only_beside_others_are_not_refused() -> None:
    """sigma_end beyond the sigma_start of the workload, within that of the space; batches where a filter is drawn."""
    space = Space(
        name="mine",
        description="",
        dimensions=(
            Dimension(key="noise.sigma_start", domain=Float(low=0.05, high=0.1)),
            Dimension(key="noise.sigma_end", domain=Float(low=0.02, high=0.05)),
            Dimension(key="grpo.filter_groups", domain=Choice(options={"off": "off", "more": "resample"})),
            Dimension(
                key="grpo.max_gen_batches",
                domain=Int(low=1, high=4),
                when=When(parent="grpo.filter_groups", value=("more",)),
            ),
        ),
    )
    assert searched(space, WORKLOADS["tiny"].settings, {}) == space
    assert [d.name for d in narrowed(space, {"grpo": {"filter_groups": "off"}}).dimensions] == [
        "noise.sigma_start",
        "noise.sigma_end",
    ]


# --- no arm twice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_space_schedule_holds_no_identical_arms(workload: str) -> None:
    space = SPACES["schedule"]
    base = merge(WORKLOADS[workload].settings, space.settings)
    arms = [
        _identity(read_config(merge(base, unflatten(settings_of(space, params)))))
        for params in lattice(space, levels=3)
    ]
    assert len(arms) > 100
    assert len(set(arms)) == len(arms)


def test_two_ways_of_saying_the_same_schedule_are_one_arm() -> None:
    def identity(*overrides: str) -> str:
        return _identity(read_config({}, overrides))

    three = [
        identity("noise.num_stages=3", f"noise.schedule={name}") for name in ("qerl_code", "linear", "cosine", "log")
    ]
    assert len(set(three)) == 1
    assert identity("noise.schedule=constant") == identity("noise.schedule=constant", "noise.sigma_end=0.0001")
    assert identity("noise.num_stages=10") != identity("noise.num_stages=9")
    assert identity("noise.sigma_start=0", "noise.modules=linear") == identity("noise.sigma_start=0")


# --- one over the other -----------------------------------------------------------------------------------------------


def test_a_setting_that_gives_way_to_another_is_named(tmp_path: Path) -> None:
    said = overridden(made(tmp_path, points="e13i-v2", overrides=["noise.num_stages=4", "noise.modules=linear"]))
    assert said == ["e13i-v2: noise.num_stages=4 by --set, in place of its own 10"]
    said = overridden(made(tmp_path, space="w16a16", points="e13g"))
    assert said == [
        "space w16a16: quant.weights=nvfp4 by e13g, in place of its own none",
        "space w16a16: quant.activations=nvfp4 by e13g, in place of its own none",
    ]

"""Every experiment of the plan as a point: what it changes, what it was meant to show, and what was recorded. Two more
beside them are negative controls: they learn from a reward that does not know the task.

A point lies on top of any workload and any depth: layers are named by zone, multipliers are interpolated at relative
depth. All experiments of the plan ran with a filter that resamples groups without variance (5 batches at most), so all
of them carry it here, and a fair control shares it. Recorded outcomes are kept as they were written down, with what is
known against them: single seeds (two runs of one configuration differed by 4.3 points), noise that was never removed,
settings that never arrived. A point whose experiment had two meanings stands here twice.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spaces.errors import ConfigError
from spaces.paths import home, load_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Example: POINTS["e13m-rmsnorm"].settings["noise"]["modules"] == ["rmsnorm"]."""

    name: str
    hypothesis: str
    """What the plan expected to learn."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """A tree over the workload's settings."""
    confidence: float | None = None
    """The plan's own confidence, 0 to 1."""
    recorded: str | None = None
    """The outcome that was written down, and what is known against it."""
    collapsed_at_step: int | None = None
    """Step of the recorded collapse; None = none was recorded."""


# Layer error over mean error of the plan's scan, layers 0..27 (its section E13j).
SRDD_MULTIPLIERS = [
    *(0.83, 0.89, 0.93, 0.93, 0.93, 0.98, 0.99, 1.01, 1.00, 1.02, 1.06, 1.10, 1.12, 1.11),
    *(1.15, 1.17, 1.15, 1.12, 1.09, 1.07, 1.02, 0.99, 0.96, 0.94, 0.91, 0.90, 0.79, 0.88),
]
_FILTER = {"filter_groups": "resample", "max_gen_batches": 5}


def _noisy(start: float, end: float, **noise: Any) -> dict[str, Any]:
    """The plan's global noise on linear layers, ten stages, with its filter; keywords change the noise."""
    settings = {
        "sigma_start": start,
        "sigma_end": end,
        "num_stages": 10,
        "schedule": "qerl_code",
        "modules": ["linear"],
    }
    return {"noise": settings | noise, "grpo": dict(_FILTER)}


_QUIET = {"noise": {"sigma_start": 0.0}}

POINTS: dict[str, Point] = {
    point.name: point
    for point in (
        Point(
            name="control",
            hypothesis="the same code path without noise: what every arm is compared with",
            settings=_QUIET,
        ),
        Point(
            name="bf16",
            hypothesis="no quantisation, no noise: the positive control, whether anything can be learned at all",
            settings=_QUIET | {"quant": {"weights": "none", "activations": "none"}},
        ),
        Point(
            name="random-reward",
            hypothesis=(
                "negative control: a coin in the place of the reward; "
                "a method that gains from this has not learned the task"
            ),
            settings=_QUIET | {"grpo": {"reward": "random"}},
        ),
        Point(
            name="format-reward",
            hypothesis=(
                "negative control: any well-formed answer is rewarded, right or wrong; "
                "a method that gains from this has not learned the task, but its form"
            ),
            settings=_QUIET | {"grpo": {"reward": "format"}},
        ),
        Point(
            name="e12",
            hypothesis="W4A16 tolerates sigma 0.05 when layers are weighted by their error",
            settings=_noisy(0.05, 0.0005, layer_multipliers=SRDD_MULTIPLIERS, modules=["rmsnorm"])
            | {"quant": {"activations": "none"}},
            recorded="72.48 %; but the multipliers never reached its rollout, and the plan also quotes sigma 0.1",
        ),
        Point(
            name="e13g",
            hypothesis="NVFP4 W4A4 without noise",
            settings=_QUIET | {"quant": {"weights": "nvfp4", "activations": "nvfp4"}, "grpo": dict(_FILTER)},
            recorded="70.89 % at step 29, 60.88 % at step 20; its NVFP4 lacked the tensor scale",
        ),
        Point(
            name="e13h",
            hypothesis="MXFP4 W4A4 without noise: the plan's baseline",
            settings=_QUIET | {"grpo": dict(_FILTER)},
            recorded=(
                "71.42 % at step 29, 56.41 % at step 20 of a run that hung; "
                "the same set-up again had 60.73 % at step 20"
            ),
        ),
        Point(
            name="e13i-baseline",
            hypothesis="H1a: noise in every linear layer helps W4A4",
            settings=_noisy(0.05, 0.0005),
            confidence=0.70,
            recorded="failed at step 3, the first noisy step: the filter rejected five batches",
            collapsed_at_step=3,
        ),
        Point(
            name="e13i-v2",
            hypothesis="the same at a fifth of the noise",
            settings=_noisy(0.01, 0.0001),
            recorded="failed at step 4: the filter rejected five batches",
            collapsed_at_step=4,
        ),
        Point(
            name="e13i-v3-sigma0.005",
            hypothesis="there is a sigma that W4A4 survives (first meaning of v3)",
            settings=_noisy(0.005, 0.00005),
        ),
        Point(
            name="e13i-v3",
            hypothesis="with both bugs fixed (no filter, RMSNorm targets) sigma 0.05 trains (second meaning of v3)",
            settings=_noisy(0.05, 0.0005, modules=["rmsnorm"]) | {"grpo": {"filter_groups": "off"}},
        ),
        Point(
            name="e13i-v4-filter-off",
            hypothesis="the filter alone is the cause: off, with noise still on linear layers",
            settings=_noisy(0.05, 0.0005) | {"grpo": {"filter_groups": "off"}},
        ),
        Point(
            name="e13i-v4-rmsnorm",
            hypothesis="the target alone is the cause: RMSNorm, with the filter still on",
            settings=_noisy(0.05, 0.0005, modules=["rmsnorm"]),
        ),
        Point(
            name="e13i-targeted",
            hypothesis="H1b: noise in the middle zone alone, where the scan saw the largest error, is better",
            settings=_noisy(0.05, 0.0005, layers="middle"),
            confidence=0.60,
        ),
        Point(
            name="e13i-targeted-sigma0.005",
            hypothesis="few layers and little noise: the most careful arm (option C)",
            settings=_noisy(0.005, 0.00005, layers="middle"),
        ),
        Point(
            name="e13i-high",
            hypothesis="H2a: the zone with the largest error needs more noise to escape",
            settings=_noisy(0.05, 0.0005, zones=[{"zone": "middle", "sigma_start": 0.08, "sigma_end": 0.001}]),
            confidence=0.55,
        ),
        Point(
            name="e13i-low",
            hypothesis="H2b: the zone with the largest error has noise enough",
            settings=_noisy(0.05, 0.0005, zones=[{"zone": "middle", "sigma_start": 0.03, "sigma_end": 0.0003}]),
            confidence=0.45,
        ),
        Point(
            name="e13j-variable",
            hypothesis="H3a: sigma in proportion to each layer's error",
            settings=_noisy(0.05, 0.0005, layer_multipliers=SRDD_MULTIPLIERS),
            confidence=0.65,
            recorded="70.20 % at step 20, 65.96 % at step 29 (RMSNorm); the multipliers never reached the rollout",
        ),
        Point(
            name="e13k-constant",
            hypothesis=(
                "H4c: no decay; with one stage the original code would never have been noisy, here it is throughout"
            ),
            settings=_noisy(0.03, 0.03, num_stages=1, schedule="constant"),
            confidence=0.30,
        ),
        Point(
            name="e13l-conservative",
            hypothesis="H4b: slower decay",
            settings=_noisy(0.05, 0.005, num_stages=5),
            confidence=0.40,
        ),
        Point(
            name="e13m-rmsnorm",
            hypothesis="H5a: noise on RMSNorm only, as in QeRL",
            settings=_noisy(0.05, 0.0005, modules=["rmsnorm"]),
            confidence=0.50,
            recorded="never ran as written: its target pattern matched no module, so sigma would have been 0",
        ),
        Point(
            name="e14",
            hypothesis="the same noise on W4A16: is W4A4 the problem, or our code?",
            settings=_noisy(0.05, 0.0005, modules=["rmsnorm"]) | {"quant": {"activations": "none"}},
        ),
    )
}


def read_point(named: str) -> tuple[str, Mapping[str, Any]]:
    """Name and settings of a point of the plan, or of a YAML file with settings of a trial (`rin export` writes such
    files). Raises ConfigError."""
    path = home(named)
    if path.suffix not in (".yaml", ".yml"):
        if named not in POINTS:
            raise ConfigError(f"--points {named}: unknown point; choose from {', '.join(POINTS)}, or give a YAML file")
        return named, POINTS[named].settings
    if (
        not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", path.stem)
        or path.stem in POINTS
        or re.fullmatch(r"c\d+|control.*", path.stem)
    ):
        raise ConfigError(
            f"--points {named}: {path.stem} would name an arm; "
            "rename the file (letters, digits, '.', '_', '-'; no name of another arm)"
        )
    return path.stem, load_settings(path)

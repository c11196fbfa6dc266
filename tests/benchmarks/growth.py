"""How time and memory grow with the model and the rollout: each point a process of its own, on a random model of the
embedded shape."""

import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from spaces.reading import read_config
from spaces.workloads import TRIAL_ENVIRONMENT
from tests.benchmarks.timing import never_end

CURVES: dict[str, tuple[str, list[int], str]] = {
    "depth": ("blocks", [4, 8, 16, 32], "every block costs the same; head, sampling and scoring do not grow"),
    "width": (
        "hidden size",
        [96, 192, 384, 768],
        "at 96 the calls around small tensors; from 384 on matrix products, whose exponent is 2",
    ),
    "group_size": (
        "completions per prompt",
        [4, 8, 16, 32],
        "their tokens, not their prompt, which is computed once; in a rollout calls that do not grow; in updates "
        "attention too: it is square in the row that a prompt shares with its completions, until the row is full",
    ),
    "prompts": ("prompts", [16, 32, 64, 128], "rows of all products; the smallest are bound by calls"),
    "tokens": (
        "tokens per completion",
        [8, 32, 128, 512],
        "a forward pass for each in a rollout; attention to all before, towards 2",
    ),
}
"""What grows, to which values, and what bounds it."""


def one_point(curve: str, value: int) -> dict[str, float]:
    """Median seconds of a step's rollout and of its updates, and the memory in GiB that steps take besides the loaded
    model."""
    from trainable.trial import Trial

    shape = {"depth": {"depth": value}, "width": {"hidden_size": value, "intermediate_size": 8 * value // 3 // 32 * 32}}
    settings: dict[str, Any] = {
        "model": {"recipe": {"clean_steps": 0, "signed_steps": 0, **shape.get(curve, {})}},  # random weights
        "grpo": {"steps": 5, "updates_per_step": 4},
        "rollout": {"max_new_tokens": value if curve == "tokens" else 8},
        "collapse": {"mode": "off"},
        "eval": {"questions": 8, "every": 0},
    }
    if curve in ("group_size", "prompts"):
        settings["grpo"][curve] = value
    if curve == "tokens":
        settings["grpo"]["prompts"] = 8
    trial = Trial(read_config(settings))
    never_end(trial.policy.tokenizer)
    before = _forget_the_peak()
    reports = [trial.step() for _ in range(4)][1:]
    return {
        "rollout": median(report.signals["perf/rollout_seconds"] for report in reports),
        "updates": median(report.signals["perf/update_seconds"] for report in reports),
        "gib": _gib("VmHWM") - before,
        "processor": time.process_time(),
    }


def _forget_the_peak() -> float:
    """Memory in use, in GiB, after what was freed has gone back to the system; the kernel's peak starts again from
    there."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _gib("VmRSS")


def _gib(line: str) -> float:
    """Of /proc/self/status, in KiB there."""
    (value,) = [
        row.split()[1] for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{line}:")
    ]
    return int(value) / 2**20


def _in_its_own_process(curve: str, value: int) -> dict[str, float]:
    code = (
        f"import json; from tests.benchmarks.growth import one_point; print(json.dumps(one_point({curve!r}, {value})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | TRIAL_ENVIRONMENT, capture_output=True, text=True, check=True
    )
    point: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return point


def growth() -> list[str]:
    """Exponents of time (and of the memory that a step adds to the loaded model) against each size, fitted over all
    four points and over the last two: what is bound by arithmetic grows with its share of the work, what is bound by
    overheads does not grow. Against the number of trials: docs/overhead.md."""
    lines = [
        (
            "| against | values | rollout s | updates s | memory GiB | "
            "exponents: rollout | updates | memory | of the last two | bound by |"
        )
    ]
    lines.append("|" + "---|" * 10)
    for curve, (name, values, bound) in CURVES.items():
        points = [_in_its_own_process(curve, value) for value in values]
        cells = [", ".join(f"{point[what]:.3g}" for point in points) for what in ("rollout", "updates", "gib")]
        all_of_them = [_exponent(values, [point[what] for point in points]) for what in ("rollout", "updates", "gib")]
        last = " / ".join(
            _exponent(values[-2:], [point[what] for point in points[-2:]]) for what in ("rollout", "updates", "gib")
        )
        lines.append(
            f"| {name} | {', '.join(map(str, values))} | {' | '.join(cells)} | "
            f"{' | '.join(all_of_them)} | {last} | {bound} |"
        )
    return lines


def _exponent(values: list[int], measured: list[float]) -> str:
    slope = linear_regression([math.log(v) for v in values], [math.log(max(m, 1e-4)) for m in measured]).slope
    return f"{slope:.2f}"

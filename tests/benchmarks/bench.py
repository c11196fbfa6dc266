"""How long things take here: rivals side by side in one run, as ratios with their spread.

    make bench                        about 12 minutes on two quiet cores; writes docs/benchmarks.md
    make bench ARGS="step growth"     some parts; the others stay as they were

Timings on shared machines are noisy, so rivals take turns, each figure is a median with its range, and what matters is
a ratio within one run.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from spaces.workloads import TRIAL_ENVIRONMENT
from tests.benchmarks.timing import seconds, spread

DOCS = Path(__file__).parents[2] / "docs"
RIN = Path(sys.executable).parent / "rin"


def start_up() -> list[str]:
    times = seconds(lambda: subprocess.run([str(RIN), "--help"], capture_output=True, check=True), 9)
    return [f"- `rin --help`: {spread(times)} s"]


def whole_trials() -> list[str]:
    """Trials in processes of their own, so that start-up and peak memory are theirs."""
    lines = []
    for arguments in (["control"], ["bf16"]):
        times = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([str(RIN), "trial", *arguments, "--json"], capture_output=True, text=True, check=True)
            times.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        lines.append(f"- `rin trial {' '.join(arguments)}`: {spread(times)} s, largest process so far {peak:.2f} GiB")
    return lines


def _part(module: str, function: str) -> Callable[[], list[str]]:
    """Imported when it runs: torch first, then rivals."""

    def run() -> list[str]:
        import importlib

        part = getattr(importlib.import_module(f"tests.benchmarks.{module}"), function)
        lines: list[str] = part()
        return [" ".join((part.__doc__ or "").split()), "", *lines]

    return run


PARTS: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "startup": ("Start-up", start_up),
    "trials": ("Whole trials", whole_trials),
    "quantiser": ("Fake quantisation", _part("arithmetic", "quantiser")),
    "cuda": ("Kernels on a GPU", _part("cuda", "kernels")),
    "noise": ("Noise", _part("arithmetic", "noise")),
    "linear": ("QuantLinear", _part("arithmetic", "quant_linear")),
    "allocator": ("The allocator", _part("arithmetic", "allocator")),
    "rollout": ("Rollout", _part("step", "rollout")),
    "step": ("A step against TRL", _part("step", "against_trl")),
    "profile": ("Where a step's time goes", _part("step", "profiled")),
    "trial": ("A trial", _part("step", "trial_time")),
    "growth": ("Growth", _part("growth", "growth")),
    "memory": ("The memory of a step", _part("memory", "step_memory")),
    "reading": ("Reading a sweep", _part("reading", "reading")),
    "engines": ("Engines that generate", _part("engines", "engines")),
    "backends": ("One trial by both backends", _part("engines", "backends")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    chosen = parser.parse_args().parts or list(PARTS)
    if not TRIAL_ENVIRONMENT.items() <= os.environ.items():  # read by the allocator when a process starts
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.benchmarks.bench", *chosen], os.environ | TRIAL_ENVIRONMENT
        )
    kept = DOCS / "benchmarks.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    machine = f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {date.today()}"
    for name in chosen:
        title, part = PARTS[name]
        print(title, flush=True)
        results[name] = {"lines": part(), "made": machine}
        print("\n".join(results[name]["lines"]), flush=True)
        kept.write_text(json.dumps(results, indent=1))
    page = ["# Benchmarks", "", "Made by `make bench`, part by part; below each stands where and when.", ""]
    for name, (title, _) in PARTS.items():
        if name in results:
            page += [f"## {title}", "", *results[name]["lines"], "", f"({results[name]['made']})", ""]
    (DOCS / "benchmarks.md").write_text("\n".join(page), encoding="utf-8")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

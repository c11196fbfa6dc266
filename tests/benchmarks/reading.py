"""What reading a large sweep takes: commands and `load` in processes of their own, so that their imports count."""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.drawn_sweeps import drawn_sweep

RIN = Path(sys.executable).parent / "rin"
LOAD = "import sys; from dashboards.frames import load; load('s', store=sys.argv[1])"


def reading() -> list[str]:
    """A drawn sweep of 300 trials x 60 steps, 7 noised weights in each of 8 layers: whole processes, imports included;
    median of three and the slowest, and the median of their CPU seconds."""
    with tempfile.TemporaryDirectory() as store:
        drawn_sweep(store, arms=100, replicates=3, steps=60, questions=2048, weights=7)
        asked = {
            "`dashboards.frames.load`": [sys.executable, "-c", LOAD, store],
            "`rin report`": [str(RIN), "report", "s", "--store", store],
            "`rin report --csv`": [str(RIN), "report", "s", "--csv", f"{store}/csv", "--store", store],
            "`rin report --html`": [str(RIN), "report", "s", "--html", f"{store}/s.html", "--store", store],
        }
        rows = [f"| {what} | {_told(command)} |" for what, command in asked.items()]
    return ["| | s | slowest | CPU s |", "|---|---|---|---|", *rows]


def _told(command: list[str]) -> str:
    walls, cpus = [], []
    for _ in range(3):
        started, before = time.perf_counter(), _cpu()
        subprocess.run(command, capture_output=True, check=True)
        walls.append(time.perf_counter() - started)
        cpus.append(_cpu() - before)
    return f"{median(walls):.1f} | {max(walls):.1f} | {median(cpus):.1f}"


def _cpu() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

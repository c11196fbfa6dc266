"""How many cores and GPUs this process may use."""

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: those that it may be put on (taskset, Slurm), and no more than its control
    groups' quota pays for (containers)."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return max(1, int(min([cores, *_quotas(cgroups, own)])))


def visible_gpus() -> int:
    """GPUs that torch sees, which takes seconds to import."""
    import torch

    return torch.cuda.device_count()


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """Cores by the quota of each group that this process is in, of both versions of control groups."""
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, place in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        for folder in (root / place.lstrip("/"), *(root / place.lstrip("/")).parents):
            if not folder.is_relative_to(root):
                break
            limit = _numbers(folder / "cpu.max") or [
                *_numbers(folder / "cpu.cfs_quota_us"),
                *_numbers(folder / "cpu.cfs_period_us"),
            ]
            if len(limit) == 2 and min(limit) > 0:
                yield limit[0] / limit[1]


def _numbers(file: Path) -> list[int]:
    """`150000 100000`; none for a file that is not there, or that says max."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []

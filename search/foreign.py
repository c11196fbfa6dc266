"""The option names that other trainers really have: data, with the version they were read from.

A key that a trainer does not have is the quietest way to lose an experiment: the plan's fork took `layer_sigma_config`
by `++`, nothing read it, and five experiments ran as another one. So whoever writes lines for a trainer, or reads
them, asks here. One text file per system in `option_names/`: a header that says which version, then a name per line.
`+` in front: its code reads the key and its YAML lacks it, so that hydra wants `++`. `.*` behind: a section in which
anything may stand.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal, get_args

System = Literal["verl", "verl-upstream", "trl", "qerl", "nemo-rl"]
SYSTEMS: tuple[System, ...] = get_args(System)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionNames:
    """Of one system.

    Example: option_names("qerl").knows("sigma_start") is True
    """

    system: System
    origin: str
    """Which system, and which version of it, in words."""
    names: frozenset[str]
    added: frozenset[str]
    """Those of `names` that its YAML lacks."""
    open: tuple[str, ...]
    """Sections in which anything may stand."""

    def knows(self, key: str) -> bool:
        """Whether it is an option, a section of options, or lies in an open section."""
        inside = any(key == section or key.startswith(f"{section}.") for section in self.open)
        return inside or key in self.names or any(name.startswith(f"{key}.") for name in (*self.names, *self.open))

    def nearest(self, key: str) -> str | None:
        """What was probably meant: the same last part elsewhere, or a name that is written alike."""
        section, _, last = key.rpartition(".")
        elsewhere = [name for name in self.names if name.rpartition(".")[2] == last]
        if elsewhere:
            return min(elsewhere, key=lambda name: (not name.endswith(f".{key}"), -_shared(name, key), name))
        beside = sorted(name.rpartition(".")[2] for name in self.names if name.rpartition(".")[0] == section)
        alike = get_close_matches(last, beside, n=1, cutoff=0.75)
        return f"{section}.{alike[0]}".lstrip(".") if alike else None

    def override(self, key: str) -> str:
        """The key as hydra wants it on a command line."""
        missing = key in self.added or any(key.startswith(f"{section}.") for section in self.open)
        return f"++{key}" if missing else key


def _shared(name: str, key: str) -> int:
    """Sections that two keys have in common."""
    return sum(a == b for a, b in zip(name.split("."), key.split("."), strict=False))


@cache
def option_names(system: System) -> OptionNames:
    lines = (Path(__file__).parent / "option_names" / f"{system}.txt").read_text(encoding="utf-8").splitlines()
    said = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    written = [line for line in lines if line and not line.startswith("#")]
    bare = {line.lstrip("+").removesuffix(".*"): line for line in written}
    return OptionNames(
        system=system,
        origin=f"{said['system']}, {said['commit']}",
        names=frozenset(name for name, line in bare.items() if not line.endswith(".*")),
        added=frozenset(name for name, line in bare.items() if line.startswith("+")),
        open=tuple(name for name, line in bare.items() if line.endswith(".*")),
    )

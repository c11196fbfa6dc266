"""Where `rin` starts: outside of the four packages, whose names are everybody's.

A person's `search.py` or `spaces/` that is found before ours ends any import of it in a traceback, and of `dashboards`
before the command line has begun. So they are looked for here, by a name that nobody else has.
"""

import importlib.util
import sys
from pathlib import Path

KNOWN_BY = {"spaces": "config", "trainable": "trial", "search": "study", "dashboards": "cli"}
"""Package -> a module that it has."""


def namesake() -> str | None:
    """A line about another package of one of our names that is found before ours: one without the module that ours is
    known by. (A job's packages come in a folder each.)"""
    for name, module in KNOWN_BY.items():
        spec = importlib.util.find_spec(name)
        folders = [Path(folder) for folder in (spec.submodule_search_locations or () if spec is not None else ())]
        if not any((folder / f"{module}.py").is_file() for folder in folders):
            file = spec.origin if spec is not None else "ours is gone"
            return (
                f"PYTHONPATH: another package named {name} hides ours ({', '.join(map(str, folders)) or file}); "
                "take its folder off PYTHONPATH, or start rin elsewhere"
            )
    return None


def main() -> None:
    """Entry point."""
    line = namesake()
    if line is not None:
        print(f"rin: {line}", file=sys.stderr)
        sys.exit(2)
    from dashboards.cli import main as run

    run()

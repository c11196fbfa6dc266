"""Where this machine keeps what is made once: base models, compiled kernels, what sweeps ship to their workers."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$RIN_CACHE, else $XDG_CACHE_HOME/rin-search, else ~/.cache/rin-search."""
    own = os.environ.get("RIN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rin-search"

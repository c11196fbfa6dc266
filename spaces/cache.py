"""Where this machine keeps what is made once: base models, compiled kernels, what sweeps ship to their workers."""

import os
from pathlib import Path

from spaces.errors import ConfigError


def cache_folder() -> Path:
    """$RIN_CACHE, else $XDG_CACHE_HOME/rin-search, else ~/.cache/rin-search. Raises ConfigError where nobody has a
    home."""
    if own := os.environ.get("RIN_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rin-search"
    except RuntimeError:
        raise ConfigError("RIN_CACHE: there is no home folder; set it to a folder for what is made once") from None

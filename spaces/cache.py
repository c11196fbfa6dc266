"""Where this machine keeps what is made once: base models, compiled kernels, what sweeps ship to their workers."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from spaces.errors import ConfigError

if TYPE_CHECKING:
    from spaces.config import BaseRecipe

_BASE_FORMAT = 1  # raise when the way of building a base changes: it is part of its name


def cache_folder() -> Path:
    """$RIN_CACHE, else $XDG_CACHE_HOME/rin-search, else ~/.cache/rin-search. Raises ConfigError where nobody has a
    home."""
    if own := os.environ.get("RIN_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rin-search"
    except RuntimeError:
        raise ConfigError("RIN_CACHE: there is no home folder; set it to a folder for what is made once") from None


def base_folder(recipe: "BaseRecipe") -> Path:
    """Where the embedded base of this recipe lies, or will lie (`trainable/policy/embedded.py`)."""
    key = hashlib.blake2b(f"{_BASE_FORMAT}/{recipe.model_dump_json()}".encode(), digest_size=6).hexdigest()
    return cache_folder() / f"embedded-{key}"

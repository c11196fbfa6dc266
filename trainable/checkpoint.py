"""A trial on disk: tensors as safetensors, plain values as JSON, nothing that unpickles.

Written to a scratch name and renamed, so that a folder that exists is whole. Loading a file can therefore run no code, whoever
wrote it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from spaces.config import ConfigError

VERSION = 1
_TENSORS = "tensors.safetensors"
_VALUES = "progress.json"


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `Trial.state_dict()` into an existing folder."""
    tensors = {f"{part}/{name}": t.contiguous() for part in ("model", "optimizer") for name, t in state[part].items()}
    save_file(tensors, folder / f"{_TENSORS}.part")
    os.replace(folder / f"{_TENSORS}.part", folder / _TENSORS)
    text = json.dumps({"version": VERSION, "progress": state["progress"]})
    (folder / f"{_VALUES}.part").write_text(text, encoding="utf-8")
    os.replace(folder / f"{_VALUES}.part", folder / _VALUES)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises ConfigError for another version."""
    values = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
    if values["version"] != VERSION:
        raise ConfigError(f"{folder}: checkpoint version {values['version']}, this program writes {VERSION}; use the program that wrote it")
    state: dict[str, Any] = {"model": {}, "optimizer": {}, "progress": values["progress"]}
    for key, tensor in load_file(folder / _TENSORS).items():
        part, _, name = key.partition("/")
        state[part][name] = tensor
    return state

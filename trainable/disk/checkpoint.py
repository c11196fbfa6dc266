"""A trial on disk: tensors as safetensors, plain values as JSON, nothing that unpickles.

    TRIAL/checkpoint-000012/tensors.safetensors     what is trained (of LoRA the adapters), optimizer moments
    TRIAL/checkpoint-000012/progress.json           everything else, and the checksums of both; written last
    TRIAL/final.safetensors                         weights that were trained, of a trial that is over; its own head
                                                    holds the checksum

A checkpoint without a whole `progress.json` was never finished and is none. Two are kept: when the newest is damaged (a
disk, a power cut, a truncated upload) the one before it is taken, and that is said. Loading a file can run no code,
whoever wrote it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from spaces.config import ConfigError
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import (
    FINAL_FILE,
    PROGRESS_FILE,
    checkpoint_name,
    checkpoints,
    progress_parts,
    progress_text,
)

VERSION = 4
KEPT = 2
FINAL_VERSION = "1"
_FINAL_KEY = "version checksum"  # one entry: the order of several is not fixed
_TENSORS = "tensors.safetensors"


def save_state(folder: Folder, state: Mapping[str, Any]) -> None:
    """Write `Trial.state_dict()` (and what else of plain values it holds). Raises OSError, for example when the disk is
    full."""
    tensors = save_tensors(
        {f"{part}/{name}": t.contiguous() for part in ("model", "optimizer") for name, t in state[part].items()}
    )
    values = json.dumps({name: value for name, value in state.items() if name not in ("model", "optimizer")})
    head = {"version": VERSION, "tensors": _digest(tensors), "values": _digest(values.encode())}
    folder.write(_TENSORS, tensors)
    folder.write(PROGRESS_FILE, progress_text(head, values))


def load_state(folder: Folder) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises ConfigError for another version, ValueError for a damaged or unfinished
    one."""
    text = folder.read(PROGRESS_FILE)
    if text is None:
        raise ValueError("it was never finished")
    first, values = progress_parts(text)
    try:
        head = json.loads(first)
    except ValueError:
        head = {}
    head = head if isinstance(head, dict) else {}
    if head.get("version", VERSION) != VERSION:
        raise ConfigError(
            f"{folder.uri}: checkpoint version {head['version']}, this program reads {VERSION}; "
            "use the program that wrote it"
        )
    tensors = folder.read(_TENSORS) or b""
    if head.get("values") != _digest(values) or head.get("tensors") != _digest(tensors):
        raise ValueError("a checksum differs")
    state: dict[str, Any] = {"model": {}, "optimizer": {}, **json.loads(values)}
    for key, tensor in load_tensors(tensors).items():
        part, _, name = key.partition("/")
        state[part][name] = tensor
    return state


def save_checkpoint(trial: Folder, step: int, state: Mapping[str, Any]) -> None:
    """Checkpoint of a trial after `step` steps; older ones than the newest two are removed. Raises OSError."""
    save_state(trial / checkpoint_name(step), state)
    for name in checkpoints(trial)[KEPT:]:
        trial.remove(name)


def newest_checkpoint(trial: Folder) -> tuple[dict[str, Any] | None, list[str]]:
    """State of the newest checkpoint that is whole (None: there is none), and a line for each that had to be passed
    over.

    Raises ConfigError for one of another version: it is not damaged, and starting anew would throw its steps away.
    """
    passed: list[str] = []
    for name in checkpoints(trial):
        try:
            return load_state(trial / name), passed
        except ConfigError:  # which is a ValueError, too
            raise
        except ValueError as error:
            passed.append(f"{name} is damaged ({error}) and passed over")
            trial.remove(name)  # it would be kept in the place of a whole one
    return None, passed


def remove_checkpoints(trial: Folder) -> None:
    """Of a trial that is over."""
    for name in checkpoints(trial):
        trial.remove(name)


def save_final(trial: Folder, weights: Mapping[str, torch.Tensor]) -> None:
    """Keep the weights that a trial ended with, by name. Raises OSError, for example when the disk is full."""
    tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
    trial.write(FINAL_FILE, save_tensors(tensors, metadata={_FINAL_KEY: f"{FINAL_VERSION} {digest_of(tensors)}"}))


def load_final(trial: Folder) -> dict[str, torch.Tensor]:
    """What `save_final` wrote. Raises ConfigError for another version, ValueError for a file that is damaged or not
    there."""
    data = trial.read(FINAL_FILE)
    if data is None:
        raise ValueError("is not there")
    try:
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])[
            "__metadata__"
        ]  # as safetensors lays its files out
        version, checksum = head[_FINAL_KEY].split(" ")
        weights: dict[str, torch.Tensor] = load_tensors(data)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        raise ValueError("is damaged") from None
    if version != FINAL_VERSION:
        raise ConfigError(
            f"{trial.uri}/{FINAL_FILE}: version {version}, this program reads {FINAL_VERSION}; "
            "use the program that wrote it"
        )
    if checksum != digest_of(weights):
        raise ValueError("is damaged (its checksum differs)")
    return weights


def _digest(data: bytes) -> str:
    """BLAKE2b (RFC 7693), 128 bits: 1 GB/s here, against accidents and not against forgers."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and values, however they are laid out in a file."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

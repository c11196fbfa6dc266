"""Which architectures vLLM serves: what was measured, as data beside this file.

`python -m tests.benchmarks.served` starts an engine on a CPU for each architecture of the tests' zoo, gives it weights
and asks the gate (`trainable/engines/gate.py`); `served.json` holds what came of it, with date and vLLM's version. A
model type of which every tried variant failed there is refused before an engine starts, on a CPU: nothing was measured
on a GPU. What is not in the file goes on to the gate.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from spaces.config import ConfigError
from trainable.floor import other_attention
from trainable.policy.policy import Policy

FILE = Path(__file__).with_name("served.json")


@cache
def measured() -> dict[str, Any]:
    """vllm, date, and rows by name: the model type, and why it is not served ("" where it is)."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def standing(policy: Policy) -> str:
    """For a person. Example: refused: the model has more than a text model"""
    if why := unserved(policy):
        return f"refused: {why}"
    kind = policy.network.config.model_type
    if all(row["kind"] != kind or row["refused"] for row in measured()["rows"].values()):
        return "not tried; the gate decides before noise starts"
    return f"serves: a small {kind} passed the gate with {_origin()}"


def unserved(policy: Policy) -> str:
    """Why an engine for this model need not be started; "" where nothing is known against it."""
    config = policy.network.config
    if policy.rearranged:
        return f"{policy.rearranged[0]} lies otherwise in vLLM than in training"
    if config.get_text_config() is not config:
        return "the model has more than a text model"
    try:
        with other_attention(policy):
            pass
    except ConfigError:
        return f"{type(policy.network).__name__} has one attention alone, so the gate has no floor to compare with"
    tried = [row["refused"] for row in measured()["rows"].values() if row["kind"] == config.model_type]
    if policy.device.type == "cpu" and tried and all(tried):
        return f"a small {config.model_type} failed with {_origin()}: {tried[0]}"
    return ""


def _origin() -> str:
    return f"vLLM {measured()['vllm']} on a CPU"

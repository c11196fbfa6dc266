"""What `rin srdd` is asked for: a model in a mode, tokens to scan it on, and how much of a scan; checked before torch
is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spaces.config import ConfigError, TrialConfig
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS

PROMPTS, EMBEDDED_PROMPTS, MOST_PROMPTS = 8, 32, 256
"""Of a text model; of the embedded one, which is quick; and at most."""
TEXT_TOKENS = 64
"""Of a row that is cut from a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be scanned."""

    model: str
    config: TrialConfig
    """Of the workload: task, mode, layers that stay at 16 bits."""
    prompts: int
    text: Path | None
    """Scanned on it instead of prompts of the task."""
    completions: bool
    """Scanned on prompts together with what the policy samples for them."""
    functional: bool
    seed: int

    @property
    def source(self) -> str:
        """As in `Scan.source`."""
        return str(self.text) if self.text is not None else "completions" if self.completions else "prompts"


def plan_srdd(
    model: str,
    *,
    overrides: Sequence[str] = (),
    prompts: int | None = None,
    text: Path | None = None,
    completions: bool = False,
    functional: bool = True,
    seed: int = 0,
) -> Plan:
    """Raises ConfigError."""
    config = _config(model, overrides)
    if prompts is not None and not 1 <= prompts <= MOST_PROMPTS:
        raise ConfigError(f"--prompts {prompts}: out of range; give 1 to {MOST_PROMPTS}")
    if text is not None and completions:
        raise ConfigError(f"--text {text}: a text is scanned as it is; leave out --completions")
    if text is not None and not text.is_file():
        raise ConfigError(f"--text {text}: no such file; give a file of plain text")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: out of range; give 0 or more")
    if config.quant.weights == config.quant.activations == "none":
        raise ConfigError("quant.weights=none, quant.activations=none: there is nothing to scan; choose a format")
    usual = PROMPTS if config.model.recipe is None else EMBEDDED_PROMPTS
    return Plan(
        model=model,
        config=config,
        prompts=prompts or usual,
        text=text,
        completions=completions,
        functional=functional,
        seed=seed,
    )


def _config(model: str, overrides: Sequence[str]) -> TrialConfig:
    """A workload, or a folder with the task of a text model."""
    if model in WORKLOADS:
        return read_config(WORKLOADS[model].settings, list(overrides), origin=model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"MODEL={model}: unknown; choose one of {', '.join(WORKLOADS)}, or give a folder with a transformers model"
        )
    changes: dict[str, Any] = {"model": {"name": str(folder.absolute())}}
    return read_config(merge(WORKLOADS["smollm2-135m"].settings, changes), list(overrides), origin=model)

"""What `rin probe` is asked for: a model, dtypes, lengths and prompts, checked before torch is imported."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from spaces.config import MODES, ConfigError, ModelConfig, TrialConfig
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS

DTYPES: tuple[str, ...] = get_args(ModelConfig.model_fields["dtype"].annotation)
PROMPTS, TOKENS = 8, 16
"""Of a text model. The embedded one gets as many prompts as there may be, being quick, and is as long as its workload
says."""
MOST_PROMPTS, MOST_TOKENS = 64, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured."""

    model: str
    config: TrialConfig
    """Of the workload: task, temperature, layers that stay at 16 bits."""
    dtypes: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of a completion, ascending; the last one is sampled."""
    prompts: int
    seed: int


def plan_probe(
    model: str, *, dtypes: str, tokens: int | None = None, prompts: int | None = None, seed: int = 0
) -> Plan:
    """Raises ConfigError."""
    given = {name.strip() for name in dtypes.split(",") if name.strip()}
    names = tuple(name for name in DTYPES if name in given)
    if not names or given - set(DTYPES):
        raise ConfigError(f"--dtype {dtypes}: choose {', '.join(DTYPES)}, or both with a comma between them")
    for option, value, least, most in (("--prompts", prompts, 1, MOST_PROMPTS), ("--tokens", tokens, 1, MOST_TOKENS)):
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{option} {value}: out of range; give {least} to {most}")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: out of range; give 0 or more")
    config = _config(model, names[0])
    many, longest = (PROMPTS, TOKENS) if config.model.recipe is None else (MOST_PROMPTS, config.rollout.max_new_tokens)
    return Plan(
        model=model, config=config, dtypes=names, lengths=parts(tokens or longest), prompts=prompts or many, seed=seed
    )


def _config(model: str, dtype: str) -> TrialConfig:
    """A workload, or a folder with the task of a text model."""
    changes: dict[str, Any] = {"model": {"dtype": dtype}, "quant": MODES["W4A4"]}
    if model in WORKLOADS:
        return read_config(merge(WORKLOADS[model].settings, changes), origin=model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"MODEL={model}: unknown; choose one of {', '.join(WORKLOADS)}, or give a folder with a transformers model"
        )
    changes["model"]["name"] = str(folder.absolute())
    return read_config(merge(WORKLOADS["smollm2-135m"].settings, changes), origin=model)


def parts(whole: int) -> tuple[int, ...]:
    """A quarter, half and all of it, as far as they differ."""
    return tuple(sorted({max(1, whole // 4), max(1, whole // 2), whole}))


def check_plot(path: Path, kinds: tuple[str, ...] = (".png",)) -> None:
    """Whether the figure can be drawn, before anything is measured. Raises ConfigError."""
    if path.suffix not in kinds:
        words = " or ".join(kind[1:].upper() for kind in kinds)
        raise ConfigError(f"--plot {path}: is drawn as {words}; give a name that ends with {' or '.join(kinds)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: no folder {path.absolute().parent}; give a file in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--plot {path}: needs matplotlib; run: pip install 'matplotlib>=3.10', or use --json")

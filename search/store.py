"""What a store folder holds: one database of runs, and a folder per sweep.

    STORE/mlflow.db             every run of every sweep
    STORE/NAME/study.json       the sweep, written down before it starts (StudyConfig)
    STORE/NAME/optuna.db        what the searcher knows
    STORE/NAME/trials/          Ray Tune's own files, one folder per trial
    STORE/NAME/best.yaml        the candidate

Light on purpose: `rin list` and `rin status` read sweeps without importing ray or torch.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from spaces.config import ConfigError
from spaces.library import Space

STUDY_FILE, BEST_FILE = "study.json", "best.yaml"
VERSION = 1


class StudyConfig(BaseModel):
    """A sweep, written down; `study.json` holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: int = VERSION
    name: str
    space: Space
    workload: str = "embedded"
    settings: dict[str, Any] = Field(default_factory=dict)
    """Overrides of every trial, as a tree."""
    points: tuple[str, ...] = ()
    """Experiments of the plan that run beside the control."""
    trials: int = Field(8, ge=1)
    """Configurations, the control included; runs = trials x replicates."""
    replicates: int = Field(1, ge=1)
    """Runs per configuration, with seeds seed, seed + 1, ..."""
    concurrent: int | None = Field(None, ge=1)
    """Trials at once; null = what the machine's cores (or the cluster) hold."""
    searcher: str = "gp"
    seed: int = Field(0, ge=0)
    store: str
    """Absolute path of the store folder."""
    tracking_uri: str
    address: str | None = None
    """Of a running Ray cluster; null = a local one for this sweep."""

    @property
    def folder(self) -> Path:
        return Path(self.store) / self.name


def load_study_config(store: Path, name: str) -> StudyConfig:
    """What `study.json` says. Raises ConfigError for a sweep that does not exist or that another version wrote."""
    path = store / name / STUDY_FILE
    if not path.is_file():
        known = sweeps(store)
        raise ConfigError(f"NAME={name}: no sweep of that name in {store}; {'there are ' + ', '.join(known) if known else 'it holds none'}")
    tree = json.loads(path.read_text(encoding="utf-8"))
    if tree.get("version") != VERSION:
        raise ConfigError(f"{path}: written by version {tree.get('version')}, this program reads {VERSION}; use the program that wrote it")
    return StudyConfig.model_validate(tree)


def sweeps(store: Path) -> list[str]:
    """Names of the sweeps in a store, sorted."""
    return sorted(path.parent.name for path in store.glob(f"*/{STUDY_FILE}"))

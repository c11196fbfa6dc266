"""What a sweep decided and what came of it, read from and written to its folder.

An arm is written before its first replicate runs, an outcome by the trial itself when it ends. Whatever was killed in between is
found here by the next start: an arm without all its outcomes has runs to go, a trial folder without an outcome has a checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from search.searchers import Arm, Evidence
from search.store import EVIDENCE_FILE, StudyConfig
from search.trials import read_outcome
from spaces.config import ConfigError
from spaces.reading import read_config
from trainable.folder import Folder


def trial_folder(config: StudyConfig, arm: str, replicate: int) -> Folder:
    return config.trials_folder / f"{arm}-{replicate}"


def write_arm(config: StudyConfig, number: int, arm: Arm) -> None:
    tree = {"name": arm.name, "origin": arm.origin, "tree": dict(arm.tree), "params": dict(arm.params)}
    (config.folder / "arms").write(f"{number:04d}.json", json.dumps(tree, indent=1))


def read_arms(config: StudyConfig) -> list[Arm]:
    """In their order, with the outcome of every trial that is over. Raises ConfigError for a damaged file."""
    folder = config.folder / "arms"
    arms = []
    for name in folder.names():
        try:
            tree = json.loads(folder.read(name) or b"")
            arm = Arm(name=tree["name"], origin=tree["origin"], tree=tree["tree"], params=tree["params"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{folder.uri}/{name}: is damaged (not the JSON of an arm); restore it from a backup") from None
        for replicate in range(config.replicates):
            outcome = read_outcome(trial_folder(config, arm.name, replicate))
            if outcome is not None:
                arm.results[replicate] = outcome
        arms.append(arm)
    return arms


def filter_policy(tree: Mapping[str, Any]) -> tuple[str, int]:
    """What a control must share with the arms that are compared with it: the filter, and for `resample` how long it tries."""
    grpo = read_config(tree).grpo
    return grpo.filter_groups, grpo.max_gen_batches if grpo.filter_groups == "resample" else 0


def write_evidence(config: StudyConfig, evidence: Sequence[Evidence]) -> None:
    config.folder.write(EVIDENCE_FILE, json.dumps([asdict(item) for item in evidence], indent=1))


def read_evidence(config: StudyConfig) -> list[Evidence]:
    return [Evidence(**tree) for tree in json.loads(config.folder.read(EVIDENCE_FILE) or b"[]")]


def unfinished(config: StudyConfig, arms: Sequence[Arm]) -> int:
    """Runs that are still to be made, of arms that are known and of those to come."""
    return config.trials * config.replicates - sum(len(arm.results) for arm in arms)

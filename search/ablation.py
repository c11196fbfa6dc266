"""What makes the winner win: one change at a time from it back to the control.

The arms are the control, the winner, and for each setting in which the winner differs from what the control runs with,
the winner with that one setting taken back. A setting whose return makes a configuration impossible, or makes it the
control itself, is no arm and is named. Noise as a whole is such a one: sigma_start = 0 is the control.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from search.arms import Arm, as_ran, candidate_of, read_arms
from search.store import StudyConfig
from spaces.config import ConfigError, TrialConfig
from spaces.reading import as_tree, flatten, merge, read_config, unflatten
from spaces.workloads import WORKLOADS

_OF_THE_RUN = ("seed", "threads", "hang_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """What would run."""

    config: StudyConfig
    arms: tuple[Arm, ...]
    skipped: tuple[str, ...]
    """A line for each change that is no arm."""


def ablation(parent: StudyConfig, options: StudyConfig, *, named: bool) -> Ablation:
    """The study that takes the winner of `parent` apart; replicates, seed, budget, resources (with more GPUs also the
    ranks) and place are those of `options`.

    Raises NoCandidate when the parent has none, ConfigError when it is a confirmation.
    """
    if parent.kind == "confirm":
        raise ConfigError(f"--ablate {parent.name}: is a confirmation; give the sweep: --ablate {parent.parent}")
    candidate = candidate_of(parent, read_arms(parent))
    best, control = candidate.arm, candidate.control
    threads = {"threads": options.cpus or WORKLOADS[parent.workload].trial_cpus}
    ranks = {"parallel": {"ranks": given}} if (given := flatten(options.settings).get("parallel.ranks")) else {}
    won, plain = (read_config(merge(as_tree(one), {**threads, **ranks})) for one in as_ran(best, control))
    steps, skipped = single_changes(as_tree(won), as_tree(plain))
    chosen = [
        Arm(name=control.name, origin="control", config=plain),
        Arm(name=best.name, origin="winner", config=won),
    ]
    short = _short_names(steps)
    chosen += [
        Arm(name=f"{best.name}-without-{short[key]}", origin="ablation", config=config) for key, config in steps.items()
    ]
    config = options.model_copy(
        update={
            "name": options.name if named else f"{parent.name}-ablation",
            "kind": "ablation",
            "parent": parent.name,
            "parent_id": parent.id,
            "space": parent.space,
            "workload": parent.workload,
            "settings": merge(parent.settings, ranks),
            "points": (),
            "evidence": (),
            "warm_start": "",
            "given": None,
            "confirm_pairs": 0,
            "trials": len(chosen),
        }
    )
    return Ablation(config=config, arms=tuple(chosen), skipped=tuple(skipped))


def single_changes(winner: Mapping[str, Any], control: Mapping[str, Any]) -> tuple[dict[str, TrialConfig], list[str]]:
    """Key -> the winner's configuration with that key as the control has it; then a line for each difference that gives
    no arm."""
    won, plain = flatten(winner), flatten(control)
    steps: dict[str, TrialConfig] = {}
    skipped = []
    for key, value in won.items():
        # Without noise there is no decay either: what the control has for sigma_end is none.
        target = won["noise.sigma_start"] if key == "noise.sigma_end" else plain.get(key)
        if key in _OF_THE_RUN or key == "noise.sigma_start" or target == value:
            continue
        try:
            steps[key] = read_config(merge(winner, unflatten({key: target})))
        except ConfigError as error:
            skipped.append(f"{key}={value} cannot be taken back alone: {error}")
    if not steps:
        skipped.append("the winner differs from the control in noise.sigma_start alone; the control is that ablation")
    return steps, skipped


def _short_names(keys: Collection[str]) -> dict[str, str]:
    """The last word of each key, or the whole key where two end alike; a name is also a folder."""
    words = {key: key.rsplit(".", 1)[-1] for key in keys}
    last = Counter(words.values())
    return {key: (word if last[word] == 1 else key.replace(".", "-")).replace("_", "-") for key, word in words.items()}

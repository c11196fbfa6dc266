"""What another run of each arm would gain on its control, by all that has been run.

Arms may have different seeds, and a seed may be a lucky one for all: it decides the prompts and the sampling. So what a
seed adds to the runs of a family (a control, and what is compared with it) is taken off before arms are put side by
side. Where all have the same seeds that makes no difference.
"""

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from search.arms import Arm, control_for, is_negative, replicates_of
from search.replicates import Replicate
from search.store import StudyConfig
from search.surrogate import Seen, expected


def promises(study: StudyConfig, arms: Sequence[Arm]) -> dict[str, float]:
    """A collapsed run is worth nothing, so it loses what the control has."""
    found = seen_of(study, arms)
    both = zip(found.items(), expected(study.space, [seen for _, seen in found.values()]), strict=True)
    return {name: what.holds * (level + what.gain) - level for (name, (level, _)), what in both}


def seen_of(study: StudyConfig, arms: Sequence[Arm]) -> dict[str, tuple[float, Seen]]:
    """Level of its control and what has been seen, of each arm that can be compared with one."""
    controls = {arm.name: control_for(arm, arms) for arm in arms}
    found = {}
    for control in arms:
        plain = replicates_of(study, control)
        family = [arm for arm in arms if controls[arm.name] is control and not is_negative(arm)]
        if not plain or not family:
            continue
        runs = {arm.name: replicates_of(study, arm) for arm in family}
        held = {name: [run for run in of_arm if not run.collapsed] for name, of_arm in runs.items()}
        luck = _luck_of_seeds([plain, *held.values()])
        level = fmean(run.accuracy for run in plain)
        without = fmean(run.accuracy - luck[run.seed] for run in plain)
        for arm in family:
            common = [run for run in held[arm.name] if run.seed in {other.seed for other in plain}]
            if not runs[arm.name] or (not common and len(held[arm.name]) == len(runs[arm.name])):
                continue  # no seed of its control's, and no collapse: it says nothing
            gain = fmean(run.accuracy - luck[run.seed] for run in common) - without if common else None
            collapsed = len(runs[arm.name]) - len(held[arm.name])
            found[arm.name] = level, Seen(params=arm.params, gain=gain, held=len(common), collapsed=collapsed)
    return {arm.name: found[arm.name] for arm in arms if arm.name in found}


def _luck_of_seeds(arms: Sequence[Sequence[Replicate]]) -> dict[int, float]:
    """Least squares of accuracy = arm + seed, the seeds drawn towards 0 as if they differed as much as runs do."""
    seeds = sorted({run.seed for runs in arms for run in runs})
    place = {seed: number for number, seed in enumerate(seeds)}
    left, right = np.eye(len(seeds)), np.zeros(len(seeds))
    for runs in arms:
        if runs:
            here = [place[run.seed] for run in runs]
            accuracies = np.array([run.accuracy for run in runs])
            left[here, here] += 1
            left[np.ix_(here, here)] -= 1 / len(here)
            right[here] += accuracies - accuracies.mean()
    return dict(zip(seeds, np.linalg.solve(left, right).tolist(), strict=True))

"""When there is how much noise: sigma decays over K stages of the run, stage 0 being quiet.

Six shapes. `qerl_code` and `qerl_paper` are QeRL's own (arXiv 2510.11696), which differ in how they count stages and in
whether the last one reaches sigma_end. Pure arithmetic on the configuration, so that a setting which changes no sigma
can be found without torch (`spaces/uses.py`).
"""

import math
from collections.abc import Callable

from spaces.config import NoiseConfig


def sigma_at(noise: NoiseConfig, step: int, total_steps: int) -> float:
    """Sigma of the global pair at a step (0-based); steps beyond the end keep the last stage's. Always finite.

    Stage 0 is quiet unless there is only one stage. sigma_start = 0 is the control: 0 throughout.
    """
    return sigma_of(noise, noise.sigma_start, noise.sigma_end, step, total_steps)


def stage_at(noise: NoiseConfig, step: int, total_steps: int) -> int:
    """Index of the stage, 0..K-1.

    qerl_paper (arXiv 2510.11696, Eq. 8) makes stages of floor(M / K) steps and stays in its last; every other schedule
    follows QeRL's code (`get_sigma_by_step`): stages of M / K steps.
    """
    stages = noise.num_stages
    if noise.schedule == "qerl_paper":
        return min(step // max(1, total_steps // stages), stages - 1)
    return min(step * stages // total_steps, stages - 1)


def is_quiet(noise: NoiseConfig, step: int, total_steps: int) -> bool:
    """Whether a step belongs to the quiet stage: no noise for whatever pair, and the baseline of the collapse rules."""
    return noise.num_stages > 1 and stage_at(noise, step, total_steps) == 0


def quiet_steps(noise: NoiseConfig, total_steps: int) -> int:
    """How many steps that is, from the first one on."""
    return sum(is_quiet(noise, step, total_steps) for step in range(total_steps))


def sigma_of(noise: NoiseConfig, start: float, end: float, step: int, total_steps: int) -> float:
    """Sigma at a step of one pair: the global one, or a zone's."""
    if start == 0 or is_quiet(noise, step, total_steps):
        return 0.0
    if noise.num_stages <= 2:
        return start
    return SCHEDULES[noise.schedule](start, end, stage_at(noise, step, total_steps) - 1, noise.num_stages)


SCHEDULES: dict[str, Callable[[float, float, int, int], float]] = {
    # From s0 to s1; j counts the stages behind the quiet one.
    "qerl_code": lambda s0, s1, j, stages: s0 * math.pow(s1 / s0, j / (stages - 2)),
    # Eq. 8 divides by K - 1: its last stage does not reach s1.
    "qerl_paper": lambda s0, s1, j, stages: s0 * math.pow(s1 / s0, j / (stages - 1)),
    "linear": lambda s0, s1, j, stages: s0 + (s1 - s0) * (j / (stages - 2)),
    "cosine": lambda s0, s1, j, stages: s1 + (s0 - s1) * (1 + math.cos(math.pi * j / (stages - 2))) / 2,
    "log": lambda s0, s1, j, stages: s0 + (s1 - s0) * math.log(1 + j) / math.log(stages - 1),
    "constant": lambda s0, s1, j, stages: s0,
}

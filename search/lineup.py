"""Which arms a sweep begins with: the control, one more for each other filter policy, and the points that were asked
for.

A control is a configuration without noise on the same code path. One is not enough where arms differ in their filter:
the filter alone moves an accuracy by points, so every policy that a point or the space brings has a control of its own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from search.arms import Arm, filter_policy
from search.store import StudyConfig
from spaces.config import ConfigError
from spaces.library import Choice
from spaces.paths import home, load_settings
from spaces.points import POINTS
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS


def base_tree(config: StudyConfig) -> dict[str, Any]:
    """Settings under every configuration: workload, space, overrides; one thread per CPU of a trial."""
    workload = WORKLOADS[config.workload]
    threads = {"threads": config.cpus or workload.trial_cpus}
    return merge(merge(merge(threads, workload.settings), config.space.settings), config.settings)


def fixed_arms(config: StudyConfig) -> list[Arm]:
    """The controls, then the points. Raises ConfigError for an unknown point and for settings that contradict each
    other."""
    base = base_tree(config)
    if read_config(base).eval.split != "selection":
        raise ConfigError(
            "--set eval.split=confirm: those questions are for rin confirm, "
            "and lose their worth by choosing; leave it out"
        )
    points = []
    for given in config.points:
        name, settings = _point(given)
        if name != "control":
            # A point says what it changes; what the user sets himself wins.
            tree = merge(merge(base, settings), config.settings)
            points.append(Arm(name=name, origin="point", config=read_config(tree, origin=name)))
    arms = [*_controls(config, base, points), *points]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--points {','.join(config.points)}: {name} would be there twice; name each point once")
    if config.trials < len(arms):
        raise ConfigError(
            f"--trials {config.trials}: the control and the points are {len(arms)} ({', '.join(names)}); "
            "raise --trials to that"
        )
    return arms


def _controls(config: StudyConfig, base: Mapping[str, Any], points: Sequence[Arm]) -> list[Arm]:
    """One per filter policy."""
    quiet = merge(base, {"noise": {"sigma_start": 0.0, "zones": []}})
    searched = [d.domain for d in config.space.dimensions if d.key == "grpo.filter_groups"]
    options = [value for domain in searched if isinstance(domain, Choice) for value in domain.options.values()]
    filtered = [read_config(merge(base, {"grpo": {"filter_groups": option}})) for option in options]
    plain = read_config(quiet, origin="control")
    controls = {filter_policy(plain): Arm(name="control", origin="control", config=plain)}
    for grpo in [point.config.grpo for point in points] + [config.grpo for config in filtered]:
        changes = {"grpo": {"filter_groups": grpo.filter_groups, "max_gen_batches": grpo.max_gen_batches}}
        other = read_config(merge(quiet, changes), origin=f"control-{grpo.filter_groups}")
        policy = filter_policy(other)
        if policy not in controls:
            taken = f"control-{policy[0]}" in [arm.name for arm in controls.values()]
            name = f"control-{policy[0]}-{policy[1]}" if taken else f"control-{policy[0]}"
            controls[policy] = Arm(name=name, origin="control", config=other)
    return list(controls.values())


def _point(named: str) -> tuple[str, Mapping[str, Any]]:
    """Name and settings of a point of the plan, or of a YAML file with settings of a trial (`rin export` writes such
    files)."""
    path = home(named)
    if path.suffix not in (".yaml", ".yml"):
        if named not in POINTS:
            raise ConfigError(f"--points {named}: unknown point; choose from {', '.join(POINTS)}, or give a YAML file")
        return named, POINTS[named].settings
    if (
        not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", path.stem)
        or path.stem in POINTS
        or re.fullmatch(r"c\d+|control.*", path.stem)
    ):
        raise ConfigError(
            f"--points {named}: {path.stem} would name an arm; "
            "rename the file (letters, digits, '.', '_', '-'; no name of another arm)"
        )
    settings = load_settings(path)
    return path.stem, {key: value for key, value in settings.items() if key not in ("seed", "threads", "hang_seconds")}

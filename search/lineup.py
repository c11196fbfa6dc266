"""Which arms a sweep begins with: the control, one more for each other filter policy, and the points that were asked
for.

A control is a configuration without noise on the same code path. One is not enough where arms differ in their filter:
the filter alone moves an accuracy by points, so every policy that a point or the space brings has a control of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from search.arms import Arm, filter_policy
from search.store import StudyConfig
from spaces.config import ConfigError, TrialConfig
from spaces.library import Choice
from spaces.narrowing import refuse_settings_of_the_run, searched, tried
from spaces.points import POINTS, read_point
from spaces.reading import merge, read_config
from spaces.uses import given_twice, is_record, refuse_idle
from spaces.workloads import WORKLOADS


def base_tree(config: StudyConfig) -> dict[str, Any]:
    """Settings under every configuration: workload, space, overrides; one thread per CPU of a trial."""
    workload = WORKLOADS[config.workload]
    threads = {"threads": config.cpus or workload.trial_cpus}
    return merge(merge(merge(threads, workload.settings), config.space.settings), config.settings)


def fixed_arms(config: StudyConfig) -> list[Arm]:
    """The controls, then the points. Raises ConfigError for an unknown point and for settings that contradict each
    other, that the sweep would override, or that change nothing in any of its trials."""
    workload = WORKLOADS[config.workload].settings
    left = searched(config.space, workload, config.settings).dimensions
    for dimension in config.space.dimensions:
        if dimension not in left:
            raise ConfigError(
                f"space {config.space.name}: {dimension.key} is searched and changes nothing under these settings; "
                "remove it"
            )
    base = base_tree(config)
    drawn = tried(config.space, base).configs
    points, files = [], []
    for given in config.points:
        name, settings = _point(config, given)
        if name != "control":
            # A point says what it changes; what the user sets himself wins.
            tree = merge(merge(base, settings), config.settings)
            points.append(Arm(name=name, origin="point", config=read_config(tree, origin=name)))
            files.append({} if name in POINTS or is_record(settings) else settings)
    arms = [*_controls(config, base, points), *points]
    _refuse_confirm_questions([*drawn, *(arm.config for arm in arms)])
    treated = [*drawn, *(point.config for point in points)]
    refuse_idle(config.settings, treated, "--set ")
    refuse_idle(config.space.settings, treated, f"space {config.space.name}: settings: ")
    for point, settings in zip(points, files, strict=True):
        refuse_idle(settings, [point.config], f"{point.name}: ")
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


def overridden(config: StudyConfig) -> list[str]:
    """A line for each setting of a point that the user sets otherwise, and of the space that a point sets otherwise."""
    lines = []
    space = (f"space {config.space.name}", config.space.settings)
    named = [_point(config, given) for given in config.points]
    for (under, lower), (over, upper) in [
        (space, ("--set", config.settings)),
        *((space, point) for point in named),
        *((point, ("--set", config.settings)) for point in named),
    ]:
        for key, below, above in given_twice(lower, upper):
            lines.append(f"{under}: {key}={above} by {over}, in place of its own {below}")
    return lines


def _refuse_confirm_questions(trials: Sequence[TrialConfig]) -> None:
    if any(trial.eval.split != "selection" for trial in trials):
        raise ConfigError(
            "eval.split=confirm: those questions are for rin confirm, and lose their worth by choosing; leave it out"
        )


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


def _point(config: StudyConfig, named: str) -> tuple[str, Mapping[str, Any]]:
    """Name and settings of an arm beside the control."""
    name, settings = read_point(named)
    return name, settings if name in POINTS else _of_every_replicate(config, settings, named)


def _of_every_replicate(config: StudyConfig, settings: Mapping[str, Any], named: str) -> dict[str, Any]:
    """Without the seed and the threads that the sweep gives its trials anyway. Raises ConfigError for others."""
    run = {"seed": config.seed, "threads": base_tree(config)["threads"]}
    others = {key: settings[key] for key in run if key in settings and settings[key] not in (run[key], None)}
    refuse_settings_of_the_run(others, f"{named}: ")
    return {key: value for key, value in settings.items() if key not in run}

"""Which arms a sweep begins with: the control, one more for each other code path, and the points that were asked for.

A control is a configuration without noise on the same code path. One is not enough where arms differ in more than their
noise: the filter alone moves an accuracy by points, and so does the precision. So every point has a control that
differs from it in its noise alone (`arms.control_for`), and one that is without noise is such a control itself, unless
it learns from another reward than the sweep: then it is a negative control, and has a control like any point. What the
searcher draws brings its control when it is drawn.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from search.arms import Arm, apart, control_for, is_negative, is_of_the_path
from search.rewards import pinned
from search.store import StudyConfig, check_ranks
from spaces.config import ConfigError, TrialConfig
from spaces.narrowing import refuse_settings_of_the_run, searched, tried
from spaces.points import POINTS, read_point
from spaces.reading import as_tree, flatten, merge, read_config, unflatten
from spaces.uses import given_twice, is_noisy, is_record, refuse_idle, without_use
from spaces.workloads import WORKLOADS
from trainable.pass_at_k import k_of


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
    points, files = _points(config, base)
    arms = _with_controls(config, base, points)
    check_ranks(config, [*drawn, *(arm.config for arm in arms)])
    _refuse_confirm_questions([*drawn, *(arm.config for arm in arms)])
    _refuse_too_few_samples(config.objectives, [*drawn, *(arm.config for arm in arms)])
    treated = [*drawn, *(point.config for point in points)]
    refuse_idle(config.settings, treated, "--set ")
    refuse_idle(config.space.settings, treated, f"space {config.space.name}: settings: ")
    for point, settings in zip(points, files, strict=True):
        refuse_idle(settings, [point.config], f"{point.name}: ")
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--points {','.join(config.points)}: {name} would be there twice; name each point once")
    option, most = ("--trials", config.trials) if config.total is None else ("--runs", config.total)
    if most < len(arms):
        raise ConfigError(
            f"{option} {most}: the control and the points are {len(arms)} ({', '.join(names)}); raise {option} to that"
        )
    return arms


def _points(config: StudyConfig, base: Mapping[str, Any]) -> tuple[list[Arm], list[Mapping[str, Any]]]:
    """The arms that were asked for beside the control, and of each the settings that the user wrote into its file."""
    points, files, usual = [], [], read_config(base).grpo.reward
    for given in config.points:
        name, settings = _point(config, given)
        if name != "control":
            # A point says what it changes; what the user sets himself wins.
            tree = merge(merge(base, settings), config.settings)
            made = pinned(read_config(tree, origin=name), config.derived)
            other = is_noisy(made) or made.grpo.reward != usual
            points.append(Arm(name=name, origin="point" if other else "control", config=made))
            files.append({} if name in POINTS or is_record(settings) else settings)
    return points, files


def idle_settings(config: StudyConfig) -> list[str]:
    """Dotted keys of the sweep's settings that change nothing in any of its trials."""
    base = base_tree(config)
    treated = [*tried(config.space, base).configs, *(point.config for point in _points(config, base)[0])]
    return list(dict.fromkeys(key for key, _ in without_use(config.settings, treated)))


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


def _refuse_too_few_samples(objectives: Sequence[str], trials: Sequence[TrialConfig]) -> None:
    least = min(trial.eval.samples for trial in trials)
    for name in objectives:
        if (k := k_of(name)) and k > least:
            raise ConfigError(
                f"--objective {name}: needs eval.samples of at least {k} in every trial, but one has {least}; "
                f"add --set eval.samples={k} (more samples make it more exact)"
            )


def _with_controls(config: StudyConfig, base: Mapping[str, Any], points: Sequence[Arm]) -> list[Arm]:
    """The control of the sweep, those that the points need and do not bring themselves, the points; of these too, those
    without noise come first."""
    quiet = merge(base, {"noise": {"sigma_start": 0.0, "zones": []}})
    plain = pinned(read_config(quiet, origin="control"), config.derived)
    controls = [Arm(name="control", origin="control", config=plain)]
    for point in points:
        if missing := missing_control(point, [*controls, *points]):
            controls.append(missing)
    return [*controls, *sorted(points, key=lambda point: point.origin != "control")]


def missing_control(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The control that an arm needs and that is not among the arms, whose first is the control of the sweep; the arm's
    settings with the noise of that one, which is none, and of a negative control with its reward."""
    plain = arms[0].config
    if arm.origin == "control" or control_for(arm, arms) is not None:
        return None
    shared = as_tree(arm.config) if arm.origin == "point" else _on_the_path(arm.config, plain)
    usual: dict[str, Any] = {"noise": as_tree(plain.noise)}
    if is_negative(arm):
        usual["grpo"] = {"reward": plain.grpo.reward}
    config = read_config(merge(shared, usual), origin=f"the control of {arm.name}")
    words = ["control", *_words(config, plain)]
    taken = {other.name for other in arms}
    names = ("-".join([*words, *([str(number)] if number > 1 else [])]) for number in count(1))
    return Arm(name=next(name for name in names if name not in taken), origin="control", config=config)


def _on_the_path(config: TrialConfig, plain: TrialConfig) -> dict[str, Any]:
    """The plain settings with the filter, the reward and the quantisation of this one."""
    tree = as_tree(plain)
    there = flatten(as_tree(config))
    changes = {key: there[key] for key in apart(config, plain) if is_of_the_path(key)}
    return merge(tree, unflatten(changes))


def _words(config: TrialConfig, plain: TrialConfig) -> list[str]:
    """Filter, reward and precision of a control, where they are not those of the sweep's."""
    keys = apart(config, plain)
    words: list[str] = [config.grpo.filter_groups] if "grpo.filter_groups" in keys else []
    words += [f"{config.grpo.reward}-reward"] if "grpo.reward" in keys else []
    if keys & {"quant.weights", "quant.activations"}:
        other = config.quant.mode != plain.quant.mode
        words.append(config.quant.mode.lower() if other else config.quant.weights)
    return words


def _point(config: StudyConfig, named: str) -> tuple[str, Mapping[str, Any]]:
    """Name and settings of an arm beside the control."""
    held = None if config.given is None else config.given.points.get(named)
    name, settings = read_point(named) if held is None else (Path(named).stem, held)
    return name, settings if name in POINTS else _of_every_replicate(config, settings, named)


def _of_every_replicate(config: StudyConfig, settings: Mapping[str, Any], named: str) -> dict[str, Any]:
    """Without the seed and the threads that the sweep gives its trials anyway. Raises ConfigError for others."""
    run = {"seed": config.seed, "threads": base_tree(config)["threads"]}
    others = {key: settings[key] for key in run if key in settings and settings[key] not in (run[key], None)}
    refuse_settings_of_the_run(others, f"{named}: ")
    return {key: value for key, value in settings.items() if key not in run}

"""The same sweep with a change: what another one takes over of a sweep that lies in the store, and what is different.

Everything that was asked for is taken over (space, workload, settings, points, seeds, numbers, searcher, budget), and
nothing that came of it: results are told to the new searcher by a warm start alone. What was read from files comes from
what the sweep wrote down when it began, since a file may have changed: spaces and points from `study.json`, rewards by
their hash, from its copies where the files are gone; a file that lies there and has changed is refused. Of data
(`task.path`) a sweep keeps no copy: that is read as it is today.

The changes are found by comparing the two studies field by field, so that none can be forgotten, and are written into
the new `study.json`. What the program itself has changed since (a setting of a workload) is one of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from search.arms import Arm, read_arms
from search.lineup import base_tree, fixed_arms, idle_settings
from search.rewards import recorded
from search.store import Derived, StudyConfig
from spaces.config import ConfigError
from spaces.library import SPACES, Choice, Dimension, Space
from spaces.narrowing import named, searched
from spaces.points import POINTS
from spaces.reading import as_tree, flatten, read_config, unflatten
from spaces.uses import leaves
from spaces.workloads import WORKLOADS

OWN = (
    *("version", "name", "id", "kind", "parent", "parent_id", "looks", "derived", "extensions"),
    *("store", "tracking_uri", "address"),  # where it lies and runs is no part of what it asks
)
"""Fields in which two studies that are the same differ."""
_OF_THE_RUN = ("seed", "threads", "task.reward_sha256")


def refuse_as_source(before: StudyConfig) -> None:
    """Raises ConfigError for what does not choose its arms as a sweep does."""
    name = before.name
    if before.kind == "confirm":
        raise ConfigError(f"--from {name}: is a confirmation; give its sweep: --from {before.parent}")
    if before.kind == "ablation":
        raise ConfigError(
            f"--from {name}: is an ablation, whose arms come from {before.parent}; give that sweep: "
            f"--from {before.parent}, or take it apart again: --ablate {before.parent}"
        )
    if before.kind == "program":
        raise ConfigError(
            f"--from {name}: is a programme, whose arms hang on its gates; "
            "run one with a change by: rin program run --name NEW --set ..."
        )


def space_for(before: StudyConfig, workload: Mapping[str, Any], settings: Mapping[str, Any], changed: Any) -> Space:
    """What was searched before settings narrowed it; one of ours with the ranges that it has under the new settings.
    `changed`: those of the settings that are given now.

    Raises ConfigError where nobody knows what these would leave of it.
    """
    kept = before.given.space if before.given is not None else before.space
    there = WORKLOADS[before.workload].settings if before.workload in WORKLOADS else {}
    if kept.name in SPACES:
        ours = named(kept.name, there, before.settings)
        if kept == (ours if before.given is not None else searched(ours, there, before.settings)):
            return named(kept.name, workload, settings)
    both = sorted(leaves(before.settings).keys() & leaves(changed).keys())
    if before.given is None and both:
        raise ConfigError(
            f"--from {before.name}: an earlier version began it and kept of its space only what {both[0]} left of it; "
            f"name the space as well: rin sweep SPACE --from {before.name}"
        )
    return kept


def files_of(before: StudyConfig) -> dict[str, dict[str, Any]]:
    """What its points that are files held. Raises ConfigError for a sweep that did not write that down."""
    kept = {} if before.given is None else before.given.points
    for point in before.points:
        if point.endswith((".yaml", ".yml")) and point not in kept:
            raise ConfigError(
                f"--from {before.name}: an earlier version began it and did not keep what {point} held; "
                f"give its points again, as their files are today: --points {','.join(before.points)}"
            )
    return dict(kept)


def derived(before: StudyConfig, study: StudyConfig, changed: Mapping[str, Any]) -> StudyConfig:
    """The study, with what it was made from and how it differs from that. `changed`: the settings that are given now;
    of the others those are taken out that would change nothing any more."""
    arms = read_arms(before)
    again = leaves(changed).keys() & {"task.reward", "task.path", "task.name"}
    origin = Derived(name=before.name, id=before.id, rewards={} if again else recorded(arms))
    study = study.model_copy(update={"derived": origin})
    useless = set(idle_settings(study)) - leaves(changed).keys()
    left = unflatten({key: value for key, value in leaves(study.settings).items() if key not in useless})
    study = study.model_copy(update={"settings": left})
    found = (*_changes(before, study), *_of_the_program(before, origin, arms))
    data = read_config(base_tree(study)).task.path
    return study.model_copy(update={"derived": origin.model_copy(update={"changes": found, "data": data})})


def _changes(before: StudyConfig, study: StudyConfig) -> Iterator[str]:
    for field in StudyConfig.model_fields:
        there, here = getattr(before, field), getattr(study, field)
        if field in OWN or there == here:
            continue
        if field == "settings":
            yield from _settings(there, here)
        elif field == "space":
            yield from _spaces(there, here)
        elif field == "given":
            held = {} if there is None else there.points
            for name in [name for name, settings in here.points.items() if name in held and settings != held[name]]:
                yield f"{name} as it is now"
        else:
            yield f"{field}={_said(here)} (there {_said(there)})"


def _settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    old, new = leaves(there), leaves(here)
    for key, value in new.items():
        if key not in old or old[key] != value:
            yield f"{key}={_said(value)}" + (f" (there {_said(old[key])})" if key in old else "")
    for key in [key for key in old if key not in new]:
        yield f"without {key}={_said(old[key])}, which has no use here"


def _spaces(there: Space, here: Space) -> Iterator[str]:
    if here.name != there.name:
        yield f"space={here.name} (there {there.name})"
        return
    old, new = ({dimension.name: dimension for dimension in space.dimensions} for space in (there, here))
    for name, dimension in new.items():
        if name not in old:
            yield f"searched: {_range(dimension)}"
        elif dimension.domain != old[name].domain:
            yield f"searched: {_range(dimension)} (there {_range(old[name])})"
    for name in [name for name in old if name not in new]:
        yield f"{name} not searched"
    if here.settings != there.settings:
        yield "other settings of its space"


def _range(dimension: Dimension) -> str:
    domain = dimension.domain
    values = "|".join(domain.options) if isinstance(domain, Choice) else f"{domain.low:g}..{domain.high:g}"
    return f"{dimension.name} {values}"


def _of_the_program(before: StudyConfig, origin: Derived, arms: Sequence[Arm]) -> Iterator[str]:
    """Settings of its controls and of the plan's points, as they were written down, that the same options no longer
    come to."""
    if not arms or before.workload not in WORKLOADS:
        return
    plan = tuple(point for point in before.points if point in POINTS)
    try:
        today = fixed_arms(before.model_copy(update={"derived": origin, "points": plan}))
    except ConfigError:
        yield "by a version of the program that took what this one refuses"
        return
    then = {arm.name: flatten(as_tree(arm.config)) for arm in arms}
    told = set()
    for arm in today:
        now, there = flatten(as_tree(arm.config)), then.get(arm.name, {})
        for key in [key for key in now if key in there and now[key] != there[key] and key not in _OF_THE_RUN]:
            words = f"{key}={_said(now[key])} by this version of the program (there {_said(there[key])})"
            if words not in told:
                yield words if arm is today[0] else f"{arm.name}: {words}"
            told.add(words)


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_said, value)) or "none"
    return "none" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)

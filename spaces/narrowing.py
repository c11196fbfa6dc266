"""A space under the settings of a sweep: what is left to search, and that each of its values can run.

A key that a setting fixes leaves the space, and what hangs on it goes with it: dimensions that exist only under another
of its options, and those that have no use beside it (sigma_end under schedule=constant). So no draw ever overrides what
was set. Whatever remains is tried before anything runs: every option, both ends and the middle of every range, each on
the settings as they are, or beside some value of the other dimensions. A value that never fits is a mistake and not a
draw to be made again in silence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spaces.config import ConfigError, TrialConfig
from spaces.library import SPACES, Choice, Dimension, Int, Space, named_spaces
from spaces.reading import merge, read_config, unflatten
from spaces.uses import idle, leaves, same

OPTION_OF = {"seed": "--seed", "threads": "--cpus"}
"""Settings that a sweep gives every trial, and what gives them to the sweep."""
_ALL_OF = 64  # whole numbers of a range up to which each is tried


def refuse_settings_of_the_run(settings: Mapping[str, Any], origin: str) -> None:
    """Raises ConfigError for a setting that a sweep would override. `origin` ends where the key begins."""
    for key, option in OPTION_OF.items():
        if key in settings:
            raise ConfigError(
                f"{origin}{key}={settings[key]}: in a sweep {option} says so for every trial; leave it out"
            )


def named(name: str, workload: Mapping[str, Any], settings: Mapping[str, Any]) -> Space:
    """A space of ours with the ranges of the precision and the modules that the settings choose."""
    base = read_config(merge(merge(workload, SPACES[name].settings), settings))
    modules = base.noise.modules if "noise.modules" in leaves(settings) else None
    return named_spaces(base.quant.mode, modules)[name]


def narrowed(space: Space, settings: Mapping[str, Any]) -> Space:
    """Without the dimensions that the settings fix and without what hangs on other options of those.

    Raises ConfigError where a setting and a dimension are parts of one another, where a fixed key has none of the
    options that a range hangs on, and where nothing is left.
    """
    fixed = leaves(settings)
    labels: dict[str, str | None] = {}
    """Of fixed choices: the option that the setting is; None = another value."""
    kept: list[Dimension] = []
    for dimension in space.dimensions:
        key, when = dimension.key, dimension.when
        for other in fixed:
            if other.startswith(f"{key}.") or key.startswith(f"{other}."):
                raise ConfigError(
                    f"{other}={fixed[other]}: space {space.name} searches {key}; set that as a whole, or leave it out"
                )
        if key in fixed and isinstance(dimension.domain, Choice):
            labels[key] = next((n for n, v in dimension.domain.options.items() if same(v, fixed[key])), None)
        if key in fixed:
            continue
        if when is not None and when.parent in labels:
            label = labels[when.parent]
            if label is None:
                raise ConfigError(
                    f"{when.parent}={fixed[when.parent]}: in space {space.name} {key} hangs on it, and has no range "
                    f"for that; set {key} too, or choose one of the space's options"
                )
            if label not in when.labels:
                continue
            dimension = dimension.model_copy(update={"when": None})
        elif when is not None and not any(when.parent == other.key for other in kept):
            continue  # its parent has left with another option
        kept.append(dimension)
    return _with(space, kept)


def _with(space: Space, kept: Sequence[Dimension]) -> Space:
    if not kept:
        raise ConfigError(
            f"space {space.name}: the settings leave nothing of what it searches "
            f"({', '.join(dict.fromkeys(_keys(space)))}); leave one free, or give the configuration as a point: "
            "--points FILE.yaml"
        )
    return space if len(kept) == len(space.dimensions) else space.model_copy(update={"dimensions": tuple(kept)})


def searched(space: Space, workload: Mapping[str, Any], settings: Mapping[str, Any]) -> Space:
    """What a sweep searches of a space: narrowed, without what has no use under these settings, every value tried.

    Raises ConfigError for what could not run, and for a dimension that has no use even without the settings.
    """
    refuse_settings_of_the_run(settings, "--set ")
    refuse_settings_of_the_run(space.settings, f"space {space.name}: ")
    for key in _keys(space):
        refuse_settings_of_the_run({key: "searched"}, f"space {space.name}: ")
    below = merge(workload, space.settings)
    base = merge(below, settings)
    left = narrowed(space, settings)
    came = tried(left, base)
    useless = came.useless
    if useless:
        kept = [d for d in left.dimensions if d.key not in useless and (d.when is None or d.when.parent not in useless)]
        for key in sorted(useless & _useless_without(space, below)):
            raise ConfigError(
                f"space {space.name}: {key} is searched and changes nothing in any of its trials; remove it"
            )
        left = _with(left, kept)
        came = tried(left, base)
    for problem in came.problems:
        raise problem
    return left


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What came of the values of a space."""

    configs: tuple[TrialConfig, ...]
    """The base, and it with each value of each dimension that fits."""
    problems: tuple[ConfigError, ...]
    """Of values that fit beside none of the others."""
    useless: frozenset[str]
    """Keys that are searched and change nothing beside any value of the others."""


def tried(space: Space, base: Mapping[str, Any]) -> Tried:
    """Raises ConfigError for a base that is no trial."""
    configs, problems = [read_config(base)], []
    for dimension in space.dimensions:
        for value in values(dimension):
            reasons = []
            for changes in _beside(space, dimension, value):
                try:
                    configs.append(read_config(merge(base, unflatten(changes)), origin=f"space {space.name}"))
                    break
                except ConfigError as error:
                    reasons.append(error)
            else:
                remedy = f"change {dimension.key} in the space, or set it"
                problems.append(ConfigError(f"{reasons[0]}; {remedy}"))
    useless = set(_keys(space)).intersection(*(idle(config) for config in configs))
    return Tried(configs=tuple(configs), problems=tuple(problems), useless=frozenset(useless))


def _useless_without(space: Space, base: Mapping[str, Any]) -> frozenset[str]:
    """Without the user's settings; nothing where the space cannot do without them."""
    try:
        return tried(space, base).useless
    except ConfigError:
        return frozenset()


def values(dimension: Dimension) -> list[Any]:
    """Every option, or both ends and the middle of a range; of a short range of whole numbers each."""
    domain = dimension.domain
    if isinstance(domain, Choice):
        return list(domain.options.values())
    if isinstance(domain, Int):
        numbers = range(domain.low, domain.high + 1)
        return list(
            numbers if len(numbers) <= _ALL_OF else (domain.low, sum((domain.low, domain.high)) // 2, domain.high)
        )
    middle = (domain.low * domain.high) ** 0.5 if domain.log else (domain.low + domain.high) / 2
    return [domain.low, middle, domain.high]


def _beside(space: Space, dimension: Dimension, value: Any) -> Iterator[dict[str, Any]]:
    """Settings with this value: alone with the options that it hangs on; beside each value of each other dimension;
    beside all low ends, all middles, all high ends."""
    alone = {**_parents(space, dimension), dimension.key: value}
    yield alone
    others = [d for d in space.dimensions if d.key not in alone]
    for other in others:
        for beside in values(other):
            yield {**_parents(space, other), other.key: beside, **alone}
    for place in (0, 1, 2):
        found = {other.key: (v := values(other))[place * (len(v) - 1) // 2] for other in others if other.when is None}
        yield {**found, **alone}


def _parents(space: Space, dimension: Dimension) -> dict[str, Any]:
    """The choices under which a dimension exists."""
    if dimension.when is None:
        return {}
    parent = next(d for d in space.dimensions if d.key == dimension.when.parent and isinstance(d.domain, Choice))
    assert isinstance(parent.domain, Choice)
    return {**_parents(space, parent), parent.key: parent.domain.options[dimension.when.labels[0]]}


def _keys(space: Space) -> list[str]:
    return [dimension.key for dimension in space.dimensions]

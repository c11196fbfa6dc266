"""The axes of a space: where a configuration lies.

Conditional spaces. In a space where sigma has one range per module kind, each range is a dimension of its own, and a
model that looks at what all configurations have in common would not see sigma at all. So dimensions of one key share a
*coordinate*: their relative place between low and high, which every configuration has. Where no dimension of a
coordinate exists, it rests in the middle.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spaces.library import Choice, Dimension, Float, Int, Space

Params = Mapping[str, Any]
"""Dimension name -> number, or label of a choice; dimensions that do not exist in this configuration are left out."""
Point = dict[str, Any]
"""Coordinate name -> label, or place in the range (0 = low end, 1 = high end)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinate:
    """One axis of a space as a method sees it."""

    name: str
    dimensions: tuple[Dimension, ...]
    """Of one key; their conditions differ."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Of a choice."""
        domain = self.dimensions[0].domain
        return tuple(domain.options) if isinstance(domain, Choice) else None

    @property
    def middle(self) -> Any:
        return self.labels[0] if self.labels else 0.5


def coordinates(space: Space) -> tuple[Coordinate, ...]:
    """Numeric dimensions of one key share a coordinate; a choice is its own."""
    grouped: dict[str, list[Dimension]] = {}
    for dimension in space.dimensions:
        group = dimension.name if isinstance(dimension.domain, Choice) else f"{dimension.key}/number"
        grouped.setdefault(group, []).append(dimension)
    groups = grouped.values()
    return tuple(Coordinate(name=", ".join(d.name for d in found), dimensions=tuple(found)) for found in groups)


def decode(space: Space, point: Mapping[str, Any]) -> Params:
    """The configuration at a point; numbers beyond a range (the place of a known result) are moved to its end."""
    axis = {dimension.name: coordinate.name for coordinate in coordinates(space) for dimension in coordinate.dimensions}
    labels: dict[str, str] = {}
    params: dict[str, Any] = {}
    for dimension in space.dimensions:
        when = dimension.when
        if when is not None and labels.get(when.parent) not in when.labels:
            continue
        place = point[axis[dimension.name]]
        if isinstance(dimension.domain, Choice):
            labels[dimension.key] = place
            params[dimension.name] = place
        else:
            params[dimension.name] = value_at(dimension.domain, min(max(place, 0.0), 1.0))
    return params


def encode(space: Space, params: Params) -> Point:
    """The inverse of `decode`; coordinates without a dimension in this configuration rest in the middle."""
    point: Point = {}
    for coordinate in coordinates(space):
        point[coordinate.name] = coordinate.middle
        for dimension in coordinate.dimensions:
            if dimension.name in params:
                value, domain = params[dimension.name], dimension.domain
                point[coordinate.name] = value if isinstance(domain, Choice) else place_of(domain, value)
    return point


def value_at(domain: Float | Int, place: float) -> float | int:
    if isinstance(domain, Int):
        size = domain.high - domain.low + 1
        return domain.low + min(int(place * size), size - 1)
    low, high = domain.low, domain.high
    value = low * (high / low) ** place if domain.log else low + place * (high - low)
    return min(max(value, low), high)  # rounding


def place_of(domain: Float | Int, value: float) -> float:
    """0 to 1 inside the range, beyond it outside."""
    if isinstance(domain, Int):
        return (value - domain.low + 0.5) / (domain.high - domain.low + 1)
    if domain.log:
        return math.log(value / domain.low) / math.log(domain.high / domain.low)
    return (value - domain.low) / (domain.high - domain.low)


def settings_of(space: Space, params: Params) -> dict[str, Any]:
    """Dotted settings of a configuration."""
    drawn = {}
    for dimension in space.dimensions:
        if dimension.name in params:
            value, domain = params[dimension.name], dimension.domain
            drawn[dimension.key] = domain.options[value] if isinstance(domain, Choice) else value
    return drawn

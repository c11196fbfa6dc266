"""Named search spaces: many points, written as data. `search/proposals.py` alone turns them into a sampler's words.

A space is a tuple of dimensions over dotted configuration keys. The same key may occur twice under different
conditions, because sigma is not comparable between module kinds or precisions: RMSNorm gains are near 1 and linear
weights near 0.05, so one absolute range for both would compare a whisper with a shout. The ranges for linear layers are
the plan's lookup table. Choices are labels (strings) with a value behind each, so that a stored study never meets a
list or a new object.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spaces.config import MODES, ConfigError, Flag, Number, Whole
from spaces.paths import anchored, anchored_value
from spaces.reading import explain, flatten, load_yaml


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Float(_Record):
    """A number in a range."""

    kind: Literal["float"] = "float"
    low: Number
    """Smallest value; above 0 with log."""
    high: Number
    """Largest value."""
    log: Flag = False
    """Sample the logarithm evenly."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"needs low < high (and 0 < low with log), but got low={self.low:g} high={self.high:g}")
        return self


class Int(_Record):
    """A whole number in a range."""

    kind: Literal["int"] = "int"
    low: Whole
    """Smallest value."""
    high: Whole
    """Largest value, itself included."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"needs low < high, but got low={self.low} high={self.high}")
        return self


class Choice(_Record):
    """One of some values."""

    kind: Literal["choice"] = "choice"
    options: dict[str, Any] = Field(min_length=1)
    """Label -> value of the configuration key."""


class When(_Record):
    """The dimension exists only where the parent, a choice, has this label (or one of these)."""

    parent: str
    """Key of the choice that it hangs on."""
    value: str | tuple[str, ...]
    """Label of the parent, or several."""

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.value,) if isinstance(self.value, str) else self.value


class Dimension(_Record):
    """A setting that is searched."""

    key: str
    """Dotted configuration key."""
    domain: Annotated[Float | Int | Choice, Field(discriminator="kind")]
    """What its values are drawn from."""
    when: When | None = None
    """Where it exists; null = everywhere."""

    @property
    def name(self) -> str:
        """Unique within a space: the key, and the condition where there is one."""
        return self.key if self.when is None else f"{self.key}|{','.join(self.when.labels)}"


class Space(_Record):
    """Example: Space(name="mine", description="...", dimensions=(Dimension(key="noise.num_stages", domain=Int(low=2,
    high=12)),))."""

    name: str
    """Of the space; sweeps are called by it."""
    description: str
    """What it asks."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """A tree over the workload's settings, under every point of the space and its control."""
    dimensions: tuple[Dimension, ...] = Field(min_length=1)
    """What is searched; a parent stands before those that hang on it."""

    @model_validator(mode="after")
    def _parents_exist(self) -> Self:
        names = [dimension.name for dimension in self.dimensions]
        if len(set(names)) != len(names):
            raise ValueError("two dimensions have the same key and condition; keep one")
        choices: dict[str, Choice] = {}
        for dimension in self.dimensions:
            when = dimension.when
            known = choices[when.parent].options if when is not None and when.parent in choices else {}
            if when is not None and not (when.labels and set(when.labels) <= known.keys()):
                raise ValueError(
                    f"{dimension.key}: when.parent={when.parent} with value {', '.join(when.labels)} must "
                    "be a choice listed before it"
                )
            if isinstance(dimension.domain, Choice):
                choices[dimension.key] = dimension.domain
        return self

    @model_validator(mode="after")
    def _nothing_is_said_twice(self) -> Self:
        keys = {dimension.key for dimension in self.dimensions if dimension.when is None}
        for key, value in flatten(self.settings).items():
            if key in keys:
                raise ValueError(f"{key}={value} stands in settings and is searched; keep one of the two")
        for key in (dimension.key for dimension in self.dimensions):
            for other in self.dimensions:
                if other.key.startswith(f"{key}."):
                    raise ValueError(f"{other.key} is searched, and {key} that holds it; keep one of the two")
        return self


# The plan's sigma lookup table, for linear layers, as {quantisation mode: (lowest, highest)}; W4A8 lies between its
# neighbours.
LINEAR_SIGMA = {"W4A4": (0.002, 0.02), "W4A8": (0.005, 0.04), "W4A16": (0.01, 0.08), "W16A16": (0.01, 0.08)}
# RMSNorm gains are near 1: QeRL's published starts run from 0.01 to 0.05.
RMSNORM_SIGMA = {"W4A4": (0.005, 0.1), "W4A8": (0.005, 0.1), "W4A16": (0.01, 0.15), "W16A16": (0.01, 0.15)}


def _choice(*values: Any) -> Choice:
    return Choice(options={str(value): value for value in values})


_MODULES = Dimension(key="noise.modules", domain=Choice(options={"rmsnorm": ["rmsnorm"], "linear": ["linear"]}))
_LAYERS = Dimension(key="noise.layers", domain=_choice("all", "first", "early_mid", "middle", "late_mid", "last"))
_END = Float(low=0.0001, high=0.002, log=True)

# Without a decay (constant) neither its end nor its stages have a use; with fewer than five stages its shapes are one
# (three: start, then end; four: linear is cosine).
_DECAYS = ("qerl_code", "qerl_paper", "linear", "cosine", "log")
_DECAYING = When(parent="noise.schedule", value=_DECAYS)
_SCHEDULE = (
    Dimension(key="noise.schedule", domain=_choice(*_DECAYS, "constant")),
    Dimension(key="noise.num_stages", domain=Int(low=5, high=12), when=_DECAYING),
    Dimension(key="noise.sigma_end", domain=_END, when=_DECAYING),
)
_SIGMA_END = Dimension(key="noise.sigma_end", domain=_END)
_TRAINING = (
    Dimension(key="rollout.temperature", domain=Float(low=0.7, high=1.2)),
    Dimension(key="grpo.learning_rate", domain=Float(low=5e-6, high=1e-4, log=True)),
    Dimension(key="quant.scale_rule", domain=_choice("floor", "even", "rceil", "ceil")),
    Dimension(key="grpo.filter_groups", domain=_choice("off", "drop", "resample")),
    Dimension(key="rollout.correction", domain=_choice("none", "token", "sequence")),
)


def _start(mode: str, modules: Sequence[str], when: When | None = None) -> Dimension:
    """Its range for noise in these modules; where both get the same sigma, that of the linear layers."""
    table = LINEAR_SIGMA if "linear" in modules else RMSNORM_SIGMA
    low, high = table.get(mode, table["W4A4"])
    return Dimension(key="noise.sigma_start", domain=Float(low=low, high=high, log=True), when=when)


def _sigma(mode: str, modules: Sequence[str] | None) -> tuple[Dimension, ...]:
    """On which modules, unless that is settled, and how much there."""
    if modules is not None:
        return (_start(mode, modules),)
    kinds = ("rmsnorm", "linear")
    return _MODULES, *(_start(mode, (kind,), When(parent="noise.modules", value=kind)) for kind in kinds)


def named_spaces(mode: str = "", modules: Sequence[str] | None = None) -> dict[str, Space]:
    """With the ranges of sigma for this precision (by default a space's own) and these modules, where they are
    settled."""
    coarse = mode or "W4A4"
    sigma = _sigma(coarse, modules)
    where = "RMSNorm" if modules is None else " and ".join(modules)
    found = (
        Space(
            name="sigma",
            description=f"which sigma, on which module kind ({coarse})",
            dimensions=(*sigma, _SIGMA_END),
        ),
        Space(
            name="targets",
            description=f"which modules and which zone of layers ({coarse})",
            dimensions=(*sigma, _LAYERS),
        ),
        Space(
            name="schedule",
            description=f"how noise decays: shape, stages, start and end ({coarse}, {where})",
            dimensions=(_start(coarse, modules or ("rmsnorm",)), *_SCHEDULE),
        ),
        Space(
            name="full",
            description=f"everything at once, training settings included ({coarse})",
            dimensions=(*sigma, _LAYERS, *_SCHEDULE, *_TRAINING),
        ),
        *(
            Space(
                name=own.lower(),
                description=f"which sigma, on which module kind, in {mode or own}",
                settings={"quant": MODES[own]},
                dimensions=(*_sigma(mode or own, modules), _SIGMA_END),
            )
            for own in MODES
        ),
    )
    return {space.name: space for space in found}


SPACES = named_spaces()


def load_space(path: Path) -> Space:
    """A space from a YAML file with the fields of `Space`, paths in it from the file's folder. Raises ConfigError."""
    space = read_space(path)
    dimensions = tuple(_anchored(dimension, path.parent) for dimension in space.dimensions)
    return space.model_copy(update={"settings": anchored(space.settings, path.parent), "dimensions": dimensions})


def read_space(path: Path) -> Space:
    """As it is written. Raises ConfigError."""
    try:
        return Space.model_validate(load_yaml(path))
    except ValidationError as error:
        raise ConfigError(explain(error, Space, str(path))) from None


def _anchored(dimension: Dimension, folder: Path) -> Dimension:
    """Models or data to choose from are named from the root too."""
    if not isinstance(dimension.domain, Choice):
        return dimension
    options = {label: anchored_value(dimension.key, value, folder) for label, value in dimension.domain.options.items()}
    return dimension.model_copy(update={"domain": Choice(options=options)})

"""Named search spaces: many points, written as data. `search/proposals.py` alone turns them into a sampler's words.

A space is a tuple of dimensions over dotted configuration keys. The same key may occur twice under different
conditions, because sigma is not comparable between module kinds or precisions: RMSNorm gains are near 1 and linear
weights near 0.05, so one absolute range for both would compare a whisper with a shout. The ranges for linear layers are
the plan's lookup table. Choices are labels (strings) with a value behind each, so that a stored study never meets a
list or a new object.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spaces.config import MODES, ConfigError, Flag, Number, Whole
from spaces.paths import anchored, anchored_value
from spaces.reading import explain, load_yaml


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Float(_Record):
    kind: Literal["float"] = "float"
    low: Number
    high: Number
    log: Flag = False
    """Sample the logarithm evenly."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"needs low < high (and 0 < low with log), but got low={self.low:g} high={self.high:g}")
        return self


class Int(_Record):
    kind: Literal["int"] = "int"
    low: Whole
    high: Whole
    """Inclusive."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"needs low < high, but got low={self.low} high={self.high}")
        return self


class Choice(_Record):
    kind: Literal["choice"] = "choice"
    options: dict[str, Any] = Field(min_length=1)
    """Label -> value of the configuration key."""


class When(_Record):
    """The dimension exists only where the parent key has this label (a Choice) or value."""

    parent: str
    value: str


class Dimension(_Record):
    key: str
    """Dotted configuration key."""
    domain: Annotated[Float | Int | Choice, Field(discriminator="kind")]
    when: When | None = None

    @property
    def name(self) -> str:
        """Unique within a space: the key, and the condition where there is one."""
        return self.key if self.when is None else f"{self.key}|{self.when.value}"


class Space(_Record):
    """Example: Space(name="mine", description="...", dimensions=(Dimension(key="noise.num_stages", domain=Int(low=2,
    high=12)),))."""

    name: str
    description: str
    settings: dict[str, Any] = Field(default_factory=dict)
    """A tree over the workload's settings, under every point of the space and its control."""
    dimensions: tuple[Dimension, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _parents_exist(self) -> Self:
        names = [dimension.name for dimension in self.dimensions]
        if len(set(names)) != len(names):
            raise ValueError("two dimensions have the same key and condition; keep one")
        choices: dict[str, Choice] = {}
        for dimension in self.dimensions:
            when = dimension.when
            if when is not None and when.value not in (choices[when.parent].options if when.parent in choices else {}):
                raise ValueError(
                    f"{dimension.key}: when.parent={when.parent} with value {when.value} must "
                    "be a choice listed before it"
                )
            if isinstance(dimension.domain, Choice):
                choices[dimension.key] = dimension.domain
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
_SIGMA_END = Dimension(key="noise.sigma_end", domain=Float(low=0.0001, high=0.002, log=True))


def _sigma_start(mode: str) -> tuple[Dimension, ...]:
    """One range per module kind."""
    return tuple(
        Dimension(
            key="noise.sigma_start",
            domain=Float(low=table[mode][0], high=table[mode][1], log=True),
            when=When(parent="noise.modules", value=module),
        )
        for module, table in (("rmsnorm", RMSNORM_SIGMA), ("linear", LINEAR_SIGMA))
    )


_SCHEDULE = (
    Dimension(key="noise.schedule", domain=_choice("qerl_code", "qerl_paper", "linear", "cosine", "log", "constant")),
    Dimension(key="noise.num_stages", domain=Int(low=2, high=12)),
    _SIGMA_END,
)
_FULL = (
    _MODULES,
    *_sigma_start("W4A4"),
    _LAYERS,
    *_SCHEDULE,
    Dimension(key="rollout.temperature", domain=Float(low=0.7, high=1.2)),
    Dimension(key="grpo.learning_rate", domain=Float(low=5e-6, high=1e-4, log=True)),
    Dimension(key="quant.scale_rule", domain=_choice("floor", "even", "rceil", "ceil")),
    Dimension(key="grpo.filter_groups", domain=_choice("off", "drop", "resample")),
    Dimension(key="rollout.correction", domain=_choice("none", "token", "sequence")),
)

SPACES: dict[str, Space] = {
    space.name: space
    for space in (
        Space(
            name="sigma",
            description="which sigma, on which module kind (W4A4)",
            dimensions=(_MODULES, *_sigma_start("W4A4"), _SIGMA_END),
        ),
        Space(
            name="targets",
            description="which modules and which zone of layers (W4A4)",
            dimensions=(_MODULES, *_sigma_start("W4A4"), _LAYERS),
        ),
        Space(
            name="schedule",
            description="how noise decays: shape, stages, start and end (W4A4, RMSNorm)",
            dimensions=(Dimension(key="noise.sigma_start", domain=Float(low=0.005, high=0.1, log=True)), *_SCHEDULE),
        ),
        Space(name="full", description="everything at once, training settings included (W4A4)", dimensions=_FULL),
        *(
            Space(
                name=mode.lower(),
                description=f"which sigma, on which module kind, in {mode}",
                settings={"quant": MODES[mode]},
                dimensions=(_MODULES, *_sigma_start(mode), _SIGMA_END),
            )
            for mode in MODES
        ),
    )
}


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

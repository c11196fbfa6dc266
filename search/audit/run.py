"""What a file of somebody else's says about a run: settings with the line that gave them, and the lines of a log.

A value that only the shell or Python could know (`$1`, a variable that an `if` sets, a function's result) is UNKNOWN.
No rule looks at it: a finding is about what stands there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from search.foreign import System, option_names

UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "?", "__bool__": lambda self: False})()
"""A value that does not stand in the file."""

Verls: tuple[System, ...] = ("verl", "verl-upstream")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Example: Setting(key="trainer.noise_injection.num_stages", value=1, line=12, added=True)."""

    key: str
    value: Any
    line: int
    added: bool = False
    """With `+` or `++`: hydra takes it, known or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    number: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One launch, configuration or log."""

    path: str
    system: System
    given: tuple[Setting, ...] = ()
    """In the order in which they stand; of two with one key the last one holds."""
    lines: tuple[LogLine, ...] = ()
    """Of a script or log, comments left out."""
    launch: int = 1
    """Line that starts it; of a file that does not, the first."""
    entry: str = ""
    """What is started, such as recipe.dapo.main_dapo."""
    meant: frozenset[str] = frozenset()
    """Rules that the file says are meant."""
    settings: Mapping[str, Setting] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", {setting.key: setting for setting in self.given})

    def value(self, key: str, default: Any = None) -> Any:
        setting = self.settings.get(key)
        return default if setting is None else setting.value

    def number(self, key: str, default: float | None = None) -> float | None:
        """None where it is not known, or is no number."""
        value = self.value(key, default)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def line(self, *keys: str) -> int:
        """Where the first of these was given; else where the run starts."""
        return next((self.settings[key].line for key in keys if key in self.settings), self.launch)

    def knows(self, key: str) -> bool:
        """By any version of the system whose names are held here."""
        return any(option_names(system).knows(key) for system in self.versions)

    @property
    def versions(self) -> tuple[System, ...]:
        return Verls if self.system in Verls else (self.system,)

    @property
    def sigma(self) -> Any:
        """Of the first noisy stage; 0 where no noise is switched on, UNKNOWN where the file does not tell."""
        if self.system == "verl":
            switch = self.value("trainer.noise_injection.enabled", False)
            return self.value("trainer.noise_injection.sigma_start", 0.05) if switch is not False else 0.0
        if self.system == "qerl":
            model = self.value("model_name", UNKNOWN)
            named = model is UNKNOWN or model == "" or "nvfp4" in str(model).lower()
            return self.value("sigma_start", 0.05) if named else 0.0
        if self.system == "trl":
            return self.value("NoiseConfig.sigma_start", 0.0)
        return 0.0

    @property
    def noisy(self) -> bool:
        """Whether noise is switched on, as far as the file tells."""
        return self.sigma is UNKNOWN or (isinstance(self.sigma, int | float) and self.sigma > 0)

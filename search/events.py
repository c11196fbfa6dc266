"""What a sweep tells whoever watches it, as it happens. A view is a function of an event: a live table, plain lines, or
nothing; it prints, and the sweep does not. Light on purpose: a view needs neither Ray nor torch."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from search.store import StudyConfig
from spaces.config import TrialConfig
from trainable.outcome import Status

CHECKS, RAY_STARTS = "what its trials need is checked", "Ray starts"
ENDS = "MLflow is told the rest, Ray ends"
WAITS = "ends as soon as what is under way is done (Ray starts, or MLflow is told); the third Ctrl-C does not wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEvent:
    """Something happened to a trial; what a view draws.

    Example: TrialEvent(arm="c03", replicate=0, status="running", config=..., step=4, metrics={...})
    """

    arm: str
    replicate: int
    status: Status
    config: TrialConfig
    step: int = 0
    """Steps done."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    rule: str = ""
    why: str = ""
    """Evidence of the rule, or the reason of a failure."""
    seconds: float = 0.0
    """Of the step, where one was made."""
    at: float = field(default_factory=time.time)
    """Unix seconds."""
    hours: float = 0.0
    """That the whole sweep has used by then."""

    @property
    def trial(self) -> str:
        return f"{self.arm}/{self.replicate}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyEvent:
    """What a sweep does itself, before, after and between its trials.

    Example: StudyEvent(study=..., doing="Ray starts")
    """

    study: StudyConfig
    doing: str
    """Empty once trials run."""
    asked: bool = False
    """By a signal, in whose handler nothing may be printed."""
    at: float = field(default_factory=time.time)


Event = TrialEvent | StudyEvent
View = Callable[[Event], None]


def waiting(study: StudyConfig, view: View) -> Callable[[], None]:
    """What a signal does that has to wait."""
    return lambda: view(StudyEvent(study=study, doing=WAITS, asked=True))

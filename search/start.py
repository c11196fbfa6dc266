"""From the checks to the first trial: tracking is asked, Ray starts, and what all trials build is built, one beside the
other."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from search.arms import Arm
from search.events import RAY_STARTS, StudyEvent, View, waiting
from search.execution import sweep_ray
from search.first_build import built_beside, lacks_a_base
from search.interruption import Interruption, interruptible
from search.mlflow_client import check_tracking
from search.store import StudyConfig

if TYPE_CHECKING:
    from trainable.policy.embedded import Progress


@contextmanager
def on_ray(config: StudyConfig, arms: Sequence[Arm], view: View, progress: "Progress | None") -> Iterator[Interruption]:
    """With Ray, and with all that trials build once; one starts beside the other. Raises ConfigError."""
    trials = [arm.config for arm in arms]
    with built_beside(config, trials, progress) as built, ThreadPoolExecutor(1) as beside:
        tracked = _asked(config, beside)
        if lacks_a_base(trials):
            tracked()
            built()
        view(StudyEvent(study=config, doing=RAY_STARTS))
        with interruptible(waiting(config, view)) as interruption, sweep_ray(config):
            with interruption.passed_on(_leave):
                tracked()
                built()
            yield interruption


def _asked(config: StudyConfig, beside: ThreadPoolExecutor) -> Callable[[], object]:
    """A tracking server at once: one that is away is told of before anything else starts. A file beside the rest, its
    tables take a second to make; what this gives waits for it. Both raise ConfigError."""
    what = config.tracking_uri, config.name, config.owner
    if config.tracking_uri.startswith("sqlite:"):
        return beside.submit(check_tracking, *what).result
    check_tracking(*what)
    return lambda: None


def _leave() -> None:
    raise KeyboardInterrupt


@contextmanager
def at_rest(config: StudyConfig, view: View) -> Iterator[Interruption]:
    """Where nothing is to run. Raises ConfigError."""
    check_tracking(config.tracking_uri, config.name, config.owner)
    with interruptible(waiting(config, view)) as interruption:
        interruption.listen()
        yield interruption

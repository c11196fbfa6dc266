"""A sweep while it runs: a table that redraws itself in a terminal, plain lines elsewhere (a log file, a pipe)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dashboards.tables import COLORS, describe_noise, empty_table, points, say
from search.execution import TrialEvent, View
from trainable.metrics import ACCURACY, ENTROPY, GIBBERISH, REWARD, SIGMA

_NUMBERS = (SIGMA, REWARD, ENTROPY, GIBBERISH, ACCURACY)


@contextmanager
def sweep_view(console: Console, runs: int) -> Iterator[View]:
    """Yields the view that a sweep reports to; `runs` is how many trials are to come."""
    if not console.is_terminal:
        yield _PlainLines(console, runs)
        return
    events: dict[str, TrialEvent] = {}
    with Live(_table(events, runs), console=console, refresh_per_second=4) as live:

        def view(event: TrialEvent) -> None:
            known = events.get(event.trial)  # an evaluation stays visible in the steps after it
            events[event.trial] = replace(event, metrics={**(known.metrics if known else {}), **event.metrics})
            live.update(_table(events, runs))

        yield view


def _table(events: Mapping[str, TrialEvent], runs: int) -> Table:
    ended = sum(event.status != "running" for event in events.values())
    numbers = ("step", "sigma", "reward", "entropy", "gibberish", "accuracy")
    table = empty_table(f"{ended} of {runs} trials ended", ("trial", "noise", "status"), numbers)
    for event in events.values():
        status = f"{event.status} ({event.rule})" if event.rule else event.status
        sigma, reward, entropy, gibberish, accuracy = (event.metrics.get(name) for name in _NUMBERS)
        table.add_row(
            event.trial,
            describe_noise(event.config),
            f"[{COLORS.get(event.status, 'white')}]{status}[/]",
            f"{event.step}/{event.config.grpo.steps}",
            "-" if sigma is None else f"{sigma:.4g}",
            points(reward),
            "-" if entropy is None else f"{entropy:.2f}",
            points(gibberish),
            points(accuracy),
        )
    return table


class _PlainLines:
    """One line when a trial starts, evaluates or ends."""

    def __init__(self, console: Console, runs: int) -> None:
        self.console, self.runs, self.ended = console, runs, 0

    def __call__(self, event: TrialEvent) -> None:
        if event.status == "running" and event.step == 0:
            self._say(f"{event.trial}: starts, noise {describe_noise(event.config)}")
        elif event.status == "running" and ACCURACY in event.metrics:
            accuracy = points(event.metrics[ACCURACY])
            self._say(f"{event.trial}: step {event.step}/{event.config.grpo.steps}, accuracy {accuracy}")
        elif event.status != "running":
            self.ended += 1
            rule = f", rule {event.rule}" if event.rule else ""
            accuracy = points(event.metrics.get(ACCURACY))
            self._say(
                f"[{self.ended}/{self.runs}] {event.trial}: {event.status} after {event.step} steps{rule}, "
                f"accuracy {accuracy}"
            )

    def _say(self, line: str) -> None:
        say(self.console, [line])


@contextmanager
def build_progress(console: Console) -> Iterator[Any]:
    """A progress bar for the embedded base; appears only when something is built."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=False,
    ) as bar:
        task = bar.add_task("", visible=False)
        said: set[str] = set()

        def progress(done: int, total: int, what: str) -> None:
            if console.is_terminal:
                description = f"embedded base model: {what}"
                bar.update(task, total=total, completed=done, description=description, visible=True)
            elif what not in said:
                said.add(what)
                console.print(f"building the embedded base model, once: {what} ({total} steps in all, about 2 minutes)")

        yield progress

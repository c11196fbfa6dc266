"""A sweep while it runs: a table that redraws itself in a terminal, plain lines elsewhere (a log file, a pipe)."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dashboards.tables import COLORS, describe_noise, empty_table, points, say
from trainable.metrics import ACCURACY, ENTROPY, GIBBERISH, REWARD, SIGMA
from trainable.outcome import in_step

if TYPE_CHECKING:
    from search.execution import TrialEvent, View

_NUMBERS = (SIGMA, REWARD, ENTROPY, GIBBERISH, ACCURACY)


@contextmanager
def sweep_view(console: Console, runs: int | None) -> Iterator["View"]:
    """Yields the view that a sweep reports to; `runs` is how many trials are to come, None where that hangs on them."""
    if not console.is_terminal:
        yield partial(_plain_line, console, runs, count(1))
        return
    events: dict[str, TrialEvent] = {}
    with Live(_table(events, runs), console=console, refresh_per_second=4) as live:

        def view(event: "TrialEvent") -> None:
            known = events.get(event.trial)  # an evaluation stays visible in the steps after it
            events[event.trial] = replace(event, metrics={**(known.metrics if known else {}), **event.metrics})
            live.update(_table(events, runs))

        yield view


def _table(events: "Mapping[str, TrialEvent]", runs: int | None) -> Table:
    ended = sum(event.status != "running" for event in events.values())
    numbers = ("steps done", "sigma", "reward", "entropy", "gibberish", "accuracy")
    table = empty_table(
        f"{ended}{'' if runs is None else f' of {runs}'} trials ended", ("trial", "noise", "status"), numbers
    )
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


def _plain_line(console: Console, runs: int | None, ended: Iterator[int], event: "TrialEvent") -> None:
    """When a trial starts, evaluates or ends; `ended` counts the last."""
    accuracy, steps = points(event.metrics.get(ACCURACY)), event.config.grpo.steps
    if event.status != "running":
        rule = f", rule {event.rule}" if event.rule else ""
        when = in_step(event.step - 1, steps) if event.status == "collapsed" else f"after {event.step} steps"
        told = f"{event.status} {when}{rule}, accuracy {accuracy}"
        number = f"{next(ended)}" if runs is None else f"{next(ended)}/{runs}"
        say(console, [f"[{number}] {event.trial}: {told}"])
    elif event.step == 0:
        say(console, [f"{event.trial}: starts, noise {describe_noise(event.config)}"])
    elif ACCURACY in event.metrics:
        say(console, [f"{event.trial}: after {event.step} of {steps} steps, accuracy {accuracy}"])


@contextmanager
def interruption_told() -> Iterator[None]:
    """Of one that comes before there is a trial: while the base is built, or Ray starts."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted before its first trial; the same command begins again", file=sys.stderr)
        sys.exit(1)


@contextmanager
def build_progress(console: Console) -> Iterator[Any]:
    """A progress bar for the embedded base; appears only when something is built."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
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


@contextmanager
def scan_progress(console: Console) -> Iterator[Any]:
    """A bar for each part of a scan; nothing where nobody watches."""
    if not console.is_terminal:
        yield lambda done, total, what: None
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console) as bar:
        task = bar.add_task("")

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, total=total, completed=done, description=what)

        yield progress

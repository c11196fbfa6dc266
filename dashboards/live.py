"""A sweep while it runs: lines that are drawn anew in a terminal, plain lines elsewhere (a log file, a pipe).

What is shown is decided in `live_rows.py`; here it meets the terminal. A phase may follow another in the same view (a
confirmation after its sweep): whatever an event belongs to is what is shown.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dashboards.live_folder import SweepFolder
from dashboards.live_rows import ENDED, Watched, clock, dated, frame, news, told
from dashboards.tables import say
from search.events import Event, StudyEvent, View
from spaces.errors import ConfigError

ECHO = 2
"""Characters left free on the right, for the ^C of the terminal itself: where it goes on in the next line, one is left
behind."""
REDRAWS_PER_SECOND = 2
"""A screen that is looked at for ten hours should not cost the trials their core."""


class Board:
    """What the driver of a sweep knows of it: its events, after what its folder held when trials began."""

    def __init__(self) -> None:
        self.watched: Watched | None = None
        self._folder: SweepFolder | None = None
        self._ended = -1
        self._ahead = ""

    def hear(self, event: Event) -> str:
        """What is new, in a line; empty where nothing is to be said."""
        before = self.watched
        if isinstance(event, StudyEvent):
            self.watched = self._doing(event)
            return ""
        assert before is not None, "a sweep says what it does before its trials do anything"
        self.watched = told(before, event)
        return news(before.trials.get(event.trial), self.watched.trials[event.trial])

    def draw(self, console: Console) -> Group:
        """For the screen as it is now."""
        if self.watched is None:
            return Group()
        self._look_who_is_ahead(self.watched)
        watched = replace(self.watched, ahead=self._ahead)
        width, height = console.size
        ascii_only = console.options.ascii_only
        return Group(*frame(watched, width=width - ECHO, height=height - 1, now=time.time(), ascii_only=ascii_only))

    def _doing(self, event: StudyEvent) -> Watched:
        """Another sweep is a new page; one whose trials are about to run may have some that ran before."""
        watched = self.watched
        if watched is None or watched.study.id != event.study.id:
            watched, self._folder = Watched(study=event.study), SweepFolder(event.study)
            self._ended, self._ahead = -1, ""
        if not event.doing and self._folder is not None:
            self._folder.study = event.study  # a later look of a confirmation has more replicates
            watched = self._folder.look(driven=True, now=event.at)
        return replace(watched, study=event.study, doing=event.doing, since=event.at)

    def _look_who_is_ahead(self, watched: Watched) -> None:
        """When a trial has ended. In the thread that draws: trials do not wait for it."""
        ended = len(watched.having(*ENDED))
        if ended != self._ended and self._folder is not None and not watched.doing:
            self._ended = ended
            with suppress(OSError, ConfigError):  # of a store that does not answer: the next end asks again
                self._ahead = self._folder.look(driven=True, now=time.time()).ahead


@contextmanager
def sweep_view(console: Console) -> Iterator[View]:
    """Yields the view that a sweep reports to."""
    board = Board()
    if not console.is_interactive:  # nor is a terminal that cannot move its cursor
        yield lambda event: _plainly(console, board, event)
        return
    # An end has its own table: what ran stays to be read there.
    with Live(
        get_renderable=lambda: board.draw(console),
        console=console,
        refresh_per_second=REDRAWS_PER_SECOND,
        transient=True,
    ):
        yield lambda event: _silently(board, event)


def _silently(board: Board, event: Event) -> None:
    board.hear(event)


def _plainly(console: Console, board: Board, event: Event) -> None:
    line = board.hear(event)
    if isinstance(event, StudyEvent):
        if event.asked:
            with suppress(OSError):  # of a terminal that is gone
                os.write(2, f"{event.doing}\n".encode())
        elif event.doing:
            say(console, [f"{clock(event.at)} {event.doing}"])
    elif line:
        assert board.watched is not None
        say(console, [dated(board.watched, line, event.at)])


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
    with Progress(*columns, console=console, refresh_per_second=REDRAWS_PER_SECOND) as bar:  # of a view within it, too
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

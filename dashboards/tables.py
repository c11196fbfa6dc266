"""Rows of the sweep as people read them: pure functions from records to cells, and one that draws them as a terminal
table.

NaN rule: an accuracy that is missing is shown as a dash; one that is not finite is shown as it is.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from search.curves import CurvePoint
from search.report import MARGIN, ArmReport, screening
from spaces.naming import describe_noise

COLORS = {"completed": "green", "collapsed": "red", "stopped": "yellow", "failed": "bold red", "running": "cyan"}


def status_row(row: ArmReport) -> dict[str, Any]:
    """Of `rin status --json`; accuracies and differences are shares."""
    return {
        "arm": row.arm,
        "noise": describe_noise(row.config),
        "status": row.status,
        "rule": why(row),
        "step": steps_text(row),
        **fields_of(row, "accuracy", "start", "measure", "score", "difference", "failed"),
        **fields_of(row, "replicates", "missing", "candidate", "hours"),
    }


def curve_rows(rows: Sequence[ArmReport]) -> list[dict[str, Any]]:
    """pass@k over k, arm by arm, with its band and its difference to the control; shares. Empty where no answers were
    sampled."""
    return [_curve_row(row, point) for row in rows for point in row.curve]


def _curve_row(row: ArmReport, point: CurvePoint) -> dict[str, Any]:
    beside = row.beside.get(point.measure)
    seen = None if beside is None or beside.corrected.replicates == 0 else beside.corrected
    return {
        "arm": row.arm,
        "control": row.control,
        **fields_of(point, "k", "share", "low", "high", "start", "seeds"),
        "difference": None if seen is None else seen.difference,
        "difference_low": None if seen is None else finite(seen.low),
        "difference_high": None if seen is None else finite(seen.high),
        "replicates": 0 if seen is None else seen.replicates,
        "verdict": "" if beside is None else screening(beside.finding.words()),
    }


def fields_of(record: Any, *names: str) -> dict[str, Any]:
    """Those of a record that its JSON holds as they are."""
    return {name: getattr(record, name) for name in names}


def why(row: ArmReport) -> str:
    """Rules by which its replicates collapsed, or what they failed by."""
    return ", ".join(sorted({trial.rule or trial.reason for trial in row.trials} - {""}))


def steps_text(row: ArmReport) -> str:
    """Steps done: `29`, or `4-29` where replicates differ."""
    return "-".join(map(str, row.steps if len(row.steps) < 2 else (row.steps[0], row.steps[-1])))


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def arm_table(rows: Sequence[ArmReport], title: str) -> "FittingTable":
    """The table at the end of a sweep and of `rin status`."""
    measure = rows[0].measure if rows else "accuracy"

    def column(name: str, rank: int, cell: Callable[[ArmReport], str], *, right: bool = True, most: int = 99) -> Column:
        return Column(name=name, rank=rank, cells=[cell(row) for row in rows], right=right, most=most)

    def difference(row: ArmReport) -> str:
        return "failed" if row.failed else "" if row.difference is None else f"{100 * row.difference:+.1f}"

    def runs(row: ArmReport) -> str:
        return f"{row.replicates}" if not row.missing else f"{row.replicates}/{row.replicates + row.missing}"

    status = column("status", 1, lambda row: row.status, right=False)
    columns = (
        column("configuration", 0, lambda row: row.arm + (" (candidate)" if row.candidate else ""), right=False),
        column("noise", 5, lambda row: describe_noise(row.config), right=False),
        replace(status, styles=[COLORS.get(row.status, "") for row in rows]),
        column("rule", 6, why, right=False, most=24),
        column("steps done", 8, steps_text),
        column("start", 9, lambda row: points(row.score_start)),
        column(measure, 2, lambda row: points(row.score)),
        column("vs control", 3, difference),
        column("runs", 4, runs),
        column("time", 7, lambda row: duration(3600 * sum(trial.hours for trial in row.trials))),
    )
    caption = "\n".join(row.failed for row in rows if row.failed)
    return FittingTable(title=title, columns=columns, caption=caption)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Where a terminal is too narrow for all, those with the smallest `rank` are shown."""

    name: str
    rank: int
    cells: Sequence[str]
    right: bool = False
    styles: Sequence[str] = ()
    most: int = 99
    """Characters side by side; what is longer goes on below."""

    @property
    def width(self) -> int:
        """With its border and the blanks beside it."""
        return 3 + min(max(len(text) for text in (self.name, *self.cells)), self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class FittingTable:
    """Drawn with as many columns as there is room for, and no number is broken. The first two are there in any case."""

    title: str
    columns: Sequence[Column]
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        ranked = sorted(self.columns, key=lambda column: column.rank)
        kept, spare = ranked[:2], options.max_width - 1 - sum(column.width for column in ranked[:2])
        for column in ranked[2:]:
            if column.width <= spare:
                kept.append(column)
                spare -= column.width
        shown = [column for column in self.columns if column in kept]
        table = Table(title=self.title, title_justify="left", header_style="bold", caption=self.caption or None)
        for column in shown:
            whole = spare >= 0 and column.width < 3 + column.most
            table.add_column(column.name, justify="right" if column.right else "left", overflow="fold", no_wrap=whole)
        for number in range(len(self.columns[0].cells)):
            table.add_row(*(Text(one.cells[number], one.styles[number] if one.styles else "") for one in shown))
        yield table


def empty_table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Its columns of words, then those of numbers."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def terminal(stderr: bool = False) -> Console:
    """The user's terminal; a pipe or a log file is wide enough for every table."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


def say(console: Console, lines: Iterable[str]) -> None:
    """As they are: unbroken, and nothing in them is markup."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def points(share: float | None) -> str:
    """A share as percent with one digit; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def marks_apart(marks: Mapping[str, float]) -> str:
    """`strict 12.0 %, flexible 63.0 %`, where the means of a task's marks differ by a point or more; else empty. Marks
    of somebody's own may be no shares, and are then numbers."""
    if len(marks) < 2 or max(marks.values()) - min(marks.values()) < MARGIN:
        return ""
    shares = all(0 <= mark <= 1 for mark in marks.values())
    told = ", ".join(f"{name} {points(mark) if shares else f'{mark:.3g}'}" for name, mark in marks.items())
    return f"marks (means): {told}; one of them tells right from wrong, which is the accuracy"


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.3 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

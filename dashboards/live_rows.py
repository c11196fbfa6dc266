"""A sweep as somebody watches it: what was heard of its trials in one record, and the lines that show it.

Pure functions. `told` folds an event of the driver into the record, `live_folder.py` makes the same record from the
sweep's folder, `frame` makes lines of it for a screen of any size, `news` a line for a log. For somebody who looks for
ten hours: trials that run come first, then those that ended last, and what does not fit is counted. What a narrow
screen has no room for leaves column by column, the least important first, and no number is ever cut.

The time to go is an estimate from measured times: steps left of each running trial at its own pace, and for each trial
to come what ended ones took, over as many places as there are running ones. A trial that collapses ends sooner.

NaN rule: a reward that is not finite has a mark of its own in the sparkline; one that was not heard of is a blank.
"""

import math
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

from rich.text import Text

from dashboards.tables import COLORS, duration, points
from search.events import TrialEvent
from search.store import StudyConfig, gpus_of, slots_of
from spaces.config import TrialConfig
from spaces.naming import describe_noise
from trainable.collapse_rules import WORDS
from trainable.failure import FAILURES
from trainable.metrics import ACCURACY, ENTROPY, GIBBERISH, REWARD, SIGMA
from trainable.outcome import STATUSES, Status, in_step

PACE_STEPS = 7
"""Steps whose median is a trial's pace."""
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
NOT_FINITE, ASCII_NOT_FINITE = "×", "!"
LEAST_SPARK, MOST_SPARK = 10, 18
LEAST_WHY, MOST_WHY = max(map(len, [*WORDS, *FAILURES])) + 5, 80  # a rule, and that there is more
GAP = 2
LEAST_TABLE = 4
"""Lines: names of columns, a trial, the next, how many more."""
ENDED: tuple[Status, ...] = ("completed", "collapsed", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was heard of a trial.

    Example: Seen(name="c03/0", config=..., status="running", step=4, rewards={0: 0.1, 1: 0.2, 2: 0.2, 3: 0.3}, ...)
    """

    name: str
    config: TrialConfig
    status: Status = "waiting"
    step: int = 0
    """Steps done."""
    loads: bool = False
    """Its process has made no step yet."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Each as it was last measured."""
    evaluated: int = 0
    """Steps done when its accuracy was."""
    rewards: Mapping[int, float] = field(default_factory=dict)
    """By step."""
    pace: tuple[float, ...] = ()
    """Seconds of its last steps."""
    rule: str = ""
    why: str = ""
    begun: float = 0.0
    """Unix seconds; of the process that works on it, or did last."""
    changed: float = 0.0
    """Unix seconds of its last step, or of its end."""
    alive: float = 0.0
    """Unix seconds of the last sign of life, where that was asked for."""
    took: float = 0.0
    """Seconds of all its processes, of one that has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A sweep and its trials, in the order in which they began."""

    study: StudyConfig
    doing: str = ""
    """What it does itself; empty while trials run."""
    since: float = 0.0
    """Unix seconds from which on it does that."""
    trials: Mapping[str, Seen] = field(default_factory=dict)
    hours: float = 0.0
    """Used at `hours_at`: trial-slot hours or GPU hours."""
    hours_at: float = 0.0
    ahead: str = ""
    """Who is ahead so far, in a sentence."""

    def having(self, *statuses: Status) -> list[Seen]:
        return [trial for trial in self.trials.values() if trial.status in statuses]

    @property
    def total(self) -> int | None:
        """Trials that there will be; of a confirmation up to its next look, of a programme nobody knows."""
        return None if self.study.kind == "program" else self.study.runs

    def hours_by(self, now: float) -> float:
        """Those of running trials included."""
        return self.hours + slots_of(self.study) * len(self.having("running")) * max(now - self.hours_at, 0.0) / 3600

    def seconds_left(self, now: float) -> float | None:
        """None before a step was timed, and where the number of trials is not known."""
        running, ended = self.having("running"), self.having("completed", "collapsed")
        timed = [seconds for trial in self.trials.values() for seconds in trial.pace]
        if self.total is None or not timed:
            return None

        def left(trial: Seen) -> float:
            steps = trial.config.grpo.steps - trial.step
            since = 0.0 if trial.loads else max(now - trial.changed, 0.0)
            return max(steps * median(trial.pace or timed) - since, 0.0)

        own = [left(trial) for trial in running]
        each = fmean(trial.took for trial in ended) if ended else median(timed) * _steps(self.trials.values())
        to_come = max(self.total - len(self.having(*ENDED)) - len(running), 0)
        return max([(sum(own) + to_come * each) / self.places, *own])

    @property
    def places(self) -> int:
        """Trials side by side: those that run, or ran when the last one began, since one that has just ended will have
        a successor."""
        last = max((trial.begun for trial in self.trials.values()), default=0.0)
        then = [
            trial for trial in self.trials.values() if trial.status in ENDED and trial.begun <= last < trial.changed
        ]
        running = len(self.having("running"))
        return max(running + (len(then) if self.total is None or len(self.trials) < self.total else 0), 1)


def told(watched: Watched, event: TrialEvent) -> Watched:
    """What is known once an event was heard."""
    known = watched.trials.get(event.trial) or Seen(name=event.trial, config=event.config)
    seen = _heard(known, event)
    trials = {**watched.trials, event.trial: seen}
    return replace(watched, trials=trials, hours=event.hours, hours_at=event.at)


def _heard(known: Seen, event: TrialEvent) -> Seen:
    status, now = event.status, event.at
    if status == "running" and event.step == 0:  # its process starts; where it goes on from, its first step says
        return replace(known, status=status, loads=True, rule="", why="", begun=now, changed=now)
    seen = replace(known, status=status, step=event.step, rule=event.rule, why=event.why, changed=now, loads=False)
    if event.metrics:
        made = event.step - 1
        rewards = {step: reward for step, reward in known.rewards.items() if step < made}  # of before a retry
        if REWARD in event.metrics:
            rewards[made] = event.metrics[REWARD]
        evaluated = event.step if ACCURACY in event.metrics else known.evaluated
        pace = (*known.pace[1 - PACE_STEPS :], event.seconds)
        metrics = {**known.metrics, **event.metrics}
        seen = replace(seen, metrics=metrics, evaluated=evaluated, rewards=rewards, pace=pace)
    return seen if status == "running" else replace(seen, took=known.took + now - known.begun)


def _steps(trials: Iterable[Seen]) -> float:
    return fmean(trial.config.grpo.steps for trial in trials)


# --- a line for a log -------------------------------------------------------------------------------------------------


def news(before: Seen | None, after: Seen) -> str:
    """When a trial starts, evaluates or ends; else empty."""
    steps = after.config.grpo.steps
    accuracy = points(after.metrics.get(ACCURACY) if after.evaluated == after.step else None)
    if after.status in (*ENDED, "stopped"):
        if before is not None and (before.status, before.begun) == (after.status, after.begun):
            return ""
        rule = f", rule {after.rule}" if after.rule else ""
        when = in_step(after.step - 1, steps) if after.status == "collapsed" else f"after {after.step} steps"
        return f"{after.name}: {after.status} {when}{rule}, accuracy {accuracy}"
    if after.status == "running" and (before is None or before.status != "running" or before.begun != after.begun):
        return f"{after.name}: starts, noise {describe_noise(after.config)}"
    if after.evaluated > (0 if before is None else before.evaluated):
        return f"{after.name}: after {after.step} of {steps} steps, accuracy {accuracy}"
    return ""


def dated(watched: Watched, line: str, now: float) -> str:
    """`10:47:12 [7/24, about 31 min to go] c03/0: starts, noise rmsnorm 0.011 -> 0.0011`"""
    ended, total = len(watched.having(*ENDED)), watched.total
    told = f"{ended}" if total is None else f"{ended}/{total}"
    left = watched.seconds_left(now)
    to_go = "" if left is None else f", about {duration(left)} to go"
    return f"{clock(now)} [{told}{to_go}] {line}"


def clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


# --- lines for a screen -----------------------------------------------------------------------------------------------


def frame(watched: Watched, *, width: int, height: int | None, now: float, ascii_only: bool = False) -> list[Text]:
    """At most `height` lines of at most `width` characters; None = as many as there are trials."""
    head: list[Text] = []
    for parts, style in _head(watched, now):
        lines = [Text(line, style) for line in _wrapped(parts, width, ascii_only)]
        if height is None or len(head) + len(lines) <= height - LEAST_TABLE:  # whole or not at all
            head += lines
    if not watched.trials:
        return head
    if height is None or height > 20:
        head.append(Text(""))
    room = len(watched.trials) if height is None else height - len(head) - 1
    shown, folded = _shown(watched, room)
    table = _table(shown, watched, width, now, ascii_only)
    return [*head, *table, *([Text(_cut(folded, width, ascii_only), "dim")] if folded else [])]


def _head(watched: Watched, now: float) -> Iterable[tuple[Sequence[str], str]]:
    """Parts that stay together where they can, and their style."""
    running, failed = len(watched.having("running")), len(watched.having("failed"))
    parts = [headline(watched), *([f"{running} running"] if running else [])]
    left = watched.seconds_left(now)
    if running and left is not None and not watched.doing:
        by = time.strftime("%H:%M" if left < 20 * 3600 else "%a %H:%M", time.localtime(now + left))
        parts.append(f"about {duration(left)} to go, until {by}")
    yield parts, "bold"
    if watched.doing:
        yield [f"{watched.doing} ({duration(now - watched.since)})"], "yellow"
    yield [_hours(watched, now), *_collapses(watched), *([f"{failed} failed"] if failed else [])], ""
    if watched.ahead:
        yield [watched.ahead], ""


def headline(watched: Watched) -> str:
    """`sweep NAME: 7 of 24 trials ended`"""
    study = watched.study
    what = {"confirm": "confirmation", "program": "programme"}.get(study.kind, study.kind)
    ended, total = len(watched.having(*ENDED)), watched.total
    look = f", look after {study.replicates} pairs" if study.kind == "confirm" else ""
    return f"{what} {study.name}: {ended}{'' if total is None else f' of {total}'} trials ended{look}"


def _hours(watched: Watched, now: float) -> str:
    unit = "GPU hours" if gpus_of(watched.study) else "trial-slot hours"
    limit = watched.study.budget_hours
    return f"{watched.hours_by(now):.2f}{'' if limit is None else f' of {limit:g}'} {unit}"


def _collapses(watched: Watched) -> list[str]:
    rules = Counter(trial.rule for trial in watched.having("collapsed")).most_common()
    told = ", ".join(f"{rule} {count}" for rule, count in rules)
    return [f"{sum(count for _, count in rules)} collapsed: {told}"] if rules else []


def _shown(watched: Watched, room: int) -> tuple[list[Seen], str]:
    """Trials that have a line, and the line that counts the others."""
    trials = list(watched.trials.values())
    running = sorted(watched.having("running"), key=lambda trial: trial.begun)
    ended = sorted(watched.having(*ENDED, "stopped"), key=lambda trial: trial.changed, reverse=True)
    ordered = [*running, *ended, *watched.having("waiting")]
    if len(trials) <= room:
        return ordered, ""
    rest = ordered[max(room - 1, 0) :]
    counts = ", ".join(f"{n} {status}" for status, n in Counter(trial.status for trial in rest).most_common())
    return ordered[: max(room - 1, 0)], f"{len(rest)} more: {counts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Cells of a table. Where there is little room, those with the smallest `rank` have it."""

    name: str
    rank: int
    cells: Sequence[str]
    right: bool = False
    styles: Sequence[str] = ()
    least: int | None = None
    """Of one that takes what room there is, up to `most`."""
    most: int = 0
    extra: bool = False
    """Shown where the others have all that they can use."""

    @property
    def widths(self) -> tuple[int, int]:
        """The least and the most of use."""
        natural = max(map(len, (self.name, *self.cells)))
        if self.least is None:
            return natural, natural
        return self.least, max(self.most, self.least)


def _table(trials: Sequence[Seen], watched: Watched, width: int, now: float, ascii_only: bool) -> list[Text]:
    columns = _columns(trials, now)
    widths = fitting(columns, width)
    kept = [column for column in columns if column.name in widths]
    low, high = _range(trials)
    lines = [Text("", "bold")]
    for column in kept:
        _append(lines[0], column.name, widths[column.name], column.right)
    for number, trial in enumerate(trials):
        line = Text()
        for column in kept:
            cell, room = column.cells[number], widths[column.name]
            if column.name == REWARD_CURVE:
                cell = sparkline(trial.rewards, trial.config.grpo.steps, room, low, high, ascii_only)
            elif column.least is not None:
                cell = _cut(cell, room, ascii_only)
            _append(line, cell, room, column.right, column.styles[number] if column.styles else "")
        lines.append(line)
    for line in lines:
        line.rstrip()
    return lines


REWARD_CURVE = "reward"


def _columns(trials: Sequence[Seen], now: float) -> list[Column]:
    """In their order on the screen."""

    def number(metric: str, shown: Callable[[float | None], str]) -> list[str]:
        return [shown(trial.metrics.get(metric)) for trial in trials]

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    def significant(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    def pace(trial: Seen) -> str:
        seconds = median(trial.pace) if trial.pace else math.nan
        return "-" if not trial.pace else f"{seconds:.1f} s" if seconds < 10 else duration(seconds)

    states = [("loading" if trial.loads else trial.status) for trial in trials]
    styles = [COLORS.get(trial.status, "") for trial in trials]
    wide = max(map(len, STATUSES))  # whichever are shown: columns should not come and go with them
    steps = [f"{trial.step}/{trial.config.grpo.steps}" for trial in trials]
    took = [duration(now - trial.begun if trial.status == "running" else trial.took) for trial in trials]
    reasons = list(map(_why, trials))
    needed = min(max(map(len, reasons)), MOST_WHY)
    longest = min(max(trial.config.grpo.steps for trial in trials), MOST_SPARK)
    return [
        Column(name="trial", rank=0, cells=[trial.name for trial in trials]),
        Column(name="noise", rank=5, cells=[describe_noise(trial.config) for trial in trials]),
        Column(name="state", rank=1, cells=states, styles=styles, least=wide, most=wide),
        Column(name="step", rank=2, cells=steps, right=True),
        Column(name="sigma", rank=6, cells=number(SIGMA, significant), right=True),
        Column(name="acc %", rank=3, cells=number(ACCURACY, percent), right=True),
        Column(name=REWARD_CURVE, rank=4, cells=["" for _ in trials], least=LEAST_SPARK, most=longest),
        Column(name="now", rank=8, cells=number(REWARD, significant), right=True),
        Column(name="entropy", rank=10, cells=number(ENTROPY, significant), right=True, extra=True),
        Column(name="gibb. %", rank=11, cells=number(GIBBERISH, percent), right=True, extra=True),
        Column(name="a step", rank=12, cells=list(map(pace, trials)), right=True, extra=True),
        Column(name="time", rank=9, cells=took, right=True, extra=True),
        Column(name="why", rank=7, cells=reasons, least=LEAST_WHY, most=needed, styles=["dim" for _ in trials]),
    ]


def _why(trial: Seen) -> str:
    """The last verdict."""
    if trial.status in ("running", "completed") and trial.rule:
        return f"alarm: {trial.rule}: {trial.why}"
    return ": ".join(part for part in (trial.rule, trial.why) if part)


def fitting(columns: Sequence[Column], width: int) -> dict[str, int]:
    """Width of each column that has room, asked in the order of their ranks; the first always has. What is left over
    goes to those that can use it, in the same order, and then to the extra ones."""
    widths: dict[str, int] = {}
    spare = width
    ranked = sorted(columns, key=lambda column: column.rank)
    for extra in (False, True):
        for column in ranked:
            gap = GAP if widths else 0
            if column.extra == extra and (not widths or column.widths[0] + gap <= spare):
                widths[column.name] = column.widths[0]
                spare -= column.widths[0] + gap
        for column in ranked:
            if column.name in widths:
                more = max(min(spare, column.widths[1] - widths[column.name]), 0)
                widths[column.name] += more
                spare -= more
    return widths


def sparkline(
    rewards: Mapping[int, float], steps: int, width: int, low: float, high: float, ascii_only: bool = False
) -> str:
    """The whole trial over `width` characters, so that trials stand step above step; a character is the mean of its
    steps. `low`, `high`: what the lowest and the highest bar stand for."""
    bars, broken = (ASCII_BARS, ASCII_NOT_FINITE) if ascii_only else (BARS, NOT_FINITE)
    width = min(width, steps)
    of: list[list[float]] = [[] for _ in range(width)]
    for step, reward in rewards.items():
        of[min(step * width // steps, width - 1)].append(reward)

    def bar(values: Sequence[float]) -> str:
        if not values:
            return " "
        if not all(map(math.isfinite, values)):
            return broken
        share = (fmean(values) - low) / (high - low) if high > low else 0.5
        return bars[min(max(int(share * len(bars)), 0), len(bars) - 1)]

    return "".join(map(bar, of))


def _range(trials: Sequence[Seen]) -> tuple[float, float]:
    finite = [reward for trial in trials for reward in trial.rewards.values() if math.isfinite(reward)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)


def _append(line: Text, cell: str, width: int, right: bool, style: str = "") -> None:
    if len(line):
        line.append(" " * GAP)
    line.append(cell.rjust(width) if right else cell.ljust(width), style or None)


def _wrapped(parts: Sequence[str], width: int, ascii_only: bool) -> list[str]:
    """Parts side by side as far as they go; one that is too long is broken at blanks."""
    joint = " | " if ascii_only else " · "
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(joint) + len(part) <= width:
            lines[-1] += joint + part
        else:
            lines += textwrap.wrap(part, width, break_on_hyphens=False)
    return lines


def _cut(text: str, width: int, ascii_only: bool) -> str:
    """Whole words only: half a number is another number."""
    mark = " ..." if ascii_only else " …"  # apart: a number that it hangs on looks cut
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    kept = text[: max(width - len(mark), 0) + 1].rpartition(" ")[0]
    return f"{kept.rstrip(':,;')}{mark}" if kept else mark.strip()[:width]

"""Rows for people: pure functions from records to rows, and one that draws rows as a terminal table.

NaN rule: an accuracy that is missing is shown as a dash; one that is not finite is shown as it is.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.table import Table

from search.export import ACCURACY, by_arm, control_of, feasible
from search.tracking import TrialRecord

_COLORS = {"completed": "green", "collapsed": "red", "stopped": "yellow", "failed": "bold red", "running": "cyan"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRow:
    """One configuration of a sweep, its replicates taken together."""

    arm: str
    noise: str
    status: str
    rule: str
    step: str
    """Steps done, of a collapsed arm: where it ended."""
    accuracy: float | None
    """Median over replicates, of the clean model at its end, on the selection questions."""
    start: float | None
    difference: float | None
    """Accuracy minus the median of the control with the same filter policy; no verdict."""
    replicates: int
    seconds: float


def arm_rows(records: Sequence[TrialRecord]) -> list[ArmRow]:
    """One row per configuration, in order of their first start."""
    arms = by_arm(records)
    return [_row(arm, runs, control_of(runs[0], arms)) for arm, runs in arms.items()]


def describe_noise(params: Mapping[str, str]) -> str:
    """`rmsnorm 0.05 -> 0.0005`, with layers and other formats where they are not the default."""
    start = float(params.get("noise.sigma_start", 0))
    quant = f"{params.get('quant.weights', '')}/{params.get('quant.activations', '')}"
    suffix = "" if quant == "mxfp4/mxfp4" else f", {quant}"
    if start == 0:
        return f"none{suffix}"
    modules = params.get("noise.modules", "").strip("[]").replace('"', "").replace(",", "+")
    layers = params.get("noise.layers", "all")
    where = "" if layers == "all" else f" {layers}"
    return f"{modules}{where} {start:.3g} -> {float(params.get('noise.sigma_end', 0)):.3g}{suffix}"


def _row(arm: str, runs: Sequence[TrialRecord], control: Sequence[TrialRecord]) -> ArmRow:
    accuracies = [run.metrics[ACCURACY] for run in runs if ACCURACY in run.metrics]
    accuracy = median(accuracies) if accuracies else None
    baseline = median(run.metrics[ACCURACY] for run in control) if control and feasible(control) else None
    starts = [run.metrics["eval/accuracy_start"] for run in runs if "eval/accuracy_start" in run.metrics]
    counts = Counter(run.status for run in runs)
    status = next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {word}" for word, n in counts.most_common())
    steps = sorted({int(run.metrics["rin/steps_done"]) for run in runs if "rin/steps_done" in run.metrics})
    return ArmRow(
        arm=arm,
        noise=describe_noise(runs[0].params),
        status=status,
        rule=", ".join(sorted({run.rule or (run.reason if run.status == "failed" else "") for run in runs} - {""})),
        step="-".join(str(s) for s in (steps[:1] + steps[-1:] if len(steps) > 1 else steps)),
        accuracy=accuracy,
        start=median(starts) if starts else None,
        difference=None if accuracy is None or baseline is None or runs is control else accuracy - baseline,
        replicates=len(runs),
        seconds=sum((run.ended or run.started) - run.started for run in runs),
    )


def arm_table(rows: Sequence[ArmRow], title: str) -> Table:
    """The table at the end of a sweep and of `rin status`."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("configuration", "noise", "status", "rule"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "start", "accuracy", "vs control", "runs", "time"):
        table.add_column(name, justify="right")
    for row in rows:
        color = _COLORS.get(row.status, "")
        table.add_row(
            row.arm,
            row.noise,
            f"[{color}]{row.status}[/]" if color else row.status,
            row.rule,
            row.step,
            points(row.start),
            points(row.accuracy),
            "" if row.difference is None else f"{100 * row.difference:+.1f}",
            str(row.replicates),
            duration(row.seconds),
        )
    return table


def terminal(stderr: bool = False) -> Console:
    """The user's terminal; a pipe or a log file is wide enough for every table."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


def points(share: float | None) -> str:
    """A share as percent with one digit; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.3 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

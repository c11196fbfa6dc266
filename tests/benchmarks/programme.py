"""The plan as a programme, run whole on the embedded workload, with its driver killed once on the way.

    make programme                                               about 11 minutes on two cores
    make programme ARGS="--workload tiny --output /tmp/programme"   the chain alone, in minutes

A fresh store; `rin program run plan`; kill -9 of the driver once so many trials have ended; the same command again,
which goes on to the end; `rin program report`. The page (docs/programme.md) and its picture (docs/programme.png) say
what the workload says about the plan's hypotheses, undecided included. Nothing here asserts.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashboards.program_documents import read_report
from dashboards.program_text import summary
from search.program import Decision, End
from search.program_report import ExperimentRow, FamilyReport, ProgramReport
from search.program_study import read_state
from search.store import load_study_config

DOCS = Path(__file__).parents[2] / "docs"
RIN = Path(sys.executable).with_name("rin")
NAME = "plan"
BLUE, VERMILION, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#A66A00", "#6B6B6B", "#222222"  # after Okabe & Ito 2008
COLORS = {"better": BLUE, "worse": ORANGE, "collapsed": VERMILION, "same": INK, "undecided": GREY}
SIGNS = {"better": "▲", "worse": "▼", "collapsed": "✕", "same": "=", "undecided": "○"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Wall seconds of the two drivers; trials that had ended when the first was killed, and in the end."""

    before: float
    after: float
    killed_at: int
    trials: int


# --- running ----------------------------------------------------------------------------------------------------------


def run(store: Path, options: Sequence[str], kill_after: int) -> Clock:
    command = [str(RIN), "program", "run", NAME, "--store", str(store), *options]
    started = time.monotonic()
    driver = subprocess.Popen(command)
    while driver.poll() is None and ended(store) < kill_after:
        time.sleep(0.2)
    if driver.poll() is not None:
        raise SystemExit(f"the driver ended by itself ({driver.returncode}) before {kill_after} trials had ended")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    killed, at = time.monotonic(), ended(store)
    print(f"killed the driver after {killed - started:.0f} s, {at} trials had ended", flush=True)
    again = [str(RIN), "program", "run", "--name", NAME, "--store", str(store)]
    subprocess.run(again, check=True)
    done = time.monotonic()
    return Clock(before=killed - started, after=done - killed, killed_at=at, trials=ended(store))


def ended(store: Path) -> int:
    return len(list((store / NAME / "trials").glob("*/outcome.json")))


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(family: FamilyReport, path: Path) -> None:
    """Phases from left to right: what ran and how it ended above, the decision and its reason below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    decisions = family.walk.decisions
    rows = {row.name: row for row in family.experiments}
    columns = len(decisions) + 1
    most = max([len(made.replicates) for made in decisions], default=2)
    floor = 8.6 - 0.92 * max(most, 2)
    wide = 26 if columns > 3 else 34
    figure, axes = pyplot.subplots(figsize=(2.35 * max(columns, 3), 5.2))
    axes.set_position((0, 0, 1, 1))
    axes.set(xlim=(0, max(columns, 3)), ylim=(0, 10))
    axes.axis("off")
    for place, made in enumerate(decisions):
        _card(axes, place, f"{place + 1}  {made.phase}", 9.7, floor, INK)
        for line, name in enumerate(made.replicates):
            _experiment(axes, place, 8.75 - 0.92 * line, rows[name])
        _decision(axes, place, floor - 0.3, made, wide)
        if place + 1 < columns:
            arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.6, "mutation_scale": 13}
            height = (9.7 + floor) / 2
            axes.annotate("", xy=(place + 1.045, height), xytext=(place + 0.935, height), arrowprops=arrow)
    _ending(axes, len(decisions), floor, family, wide)
    reasons: dict[str, list[str]] = {}
    for row in family.experiments:
        if not row.arm:
            reasons.setdefault(row.why_not.partition(":")[0], []).append(row.name)
    left = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    note = "\n".join(left) or "nothing: every experiment ran"
    axes.text(0.04, floor - 3.3, "did not run", fontsize=9, fontweight="bold", color=GREY, va="top")
    axes.text(0.04, floor - 3.7, note, fontsize=8, color=GREY, va="top", linespacing=1.3)
    axes.set_ylim(floor - 3.9 - 0.34 * max(1, len(left)), 10)
    figure.savefig(path, dpi=120, facecolor="white")
    pyplot.close(figure)


def _card(axes: Any, place: int, title: str, top: float, bottom: float, color: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.05"
    box = FancyBboxPatch((place + 0.04, bottom), 0.9, top - bottom, style, fill=False, edgecolor=color, linewidth=1.2)
    box.set_mutation_aspect(5)
    axes.add_patch(box)
    axes.text(place + 0.09, top - 0.18, title, fontsize=10.5, fontweight="bold", color=color, va="top")


def _experiment(axes: Any, place: int, height: float, row: ExperimentRow) -> None:
    verdict, words = result(row)
    axes.text(place + 0.09, height, SIGNS[verdict], fontsize=10, color=COLORS[verdict], va="center")
    axes.text(place + 0.18, height, row.name, fontsize=9, color=INK, va="center")
    axes.text(place + 0.18, height - 0.38, words, fontsize=8, color=COLORS[verdict], va="center")


def result(row: ExperimentRow) -> tuple[str, str]:
    """Example: ("collapsed", "collapsed 2 of 2"); ("undecided", "-0.4 points, undecided (12)")"""
    runs = len(row.trials)
    if row.collapsed and row.judged is None:
        return "collapsed", f"collapsed {row.collapsed} of {runs}"
    assert row.judged is not None
    assert row.beside_control is not None
    seen = f"{100 * row.judged.difference:+.1f} points, {row.judged.verdict} ({row.judged.replicates})"
    return row.judged.verdict, seen


def _decision(axes: Any, place: int, top: float, made: Decision, wide: int) -> None:
    axes.text(place + 0.06, top, f"→ {made.go}", fontsize=9.5, fontweight="bold", color=INK, va="top")
    text = textwrap.fill(made.because, wide)
    if made.skipped:
        text += "\n" + textwrap.fill(f"skips {', '.join(made.skipped)}", wide)
    if made.winner:
        text += f"\nwinner: {made.winner}"
    axes.text(place + 0.06, top - 0.5, text, fontsize=8.5, color=INK, va="top", linespacing=1.25)


def _ending(axes: Any, place: int, floor: float, family: FamilyReport, wide: int) -> None:
    last, scenario = family.walk.next, family.walk.scenario
    if not isinstance(last, End):
        title, text = "not ended", f"next: {last.phase}"
    elif scenario is None:
        names = ", ".join(sorted(family.walk.programme.scenarios))
        title, text = "end", f"none of the scenarios {names}: {last.because}"
    else:
        title, text = f"scenario {last.scenario}", f"{scenario.title}: {scenario.says}"
    _card(axes, place, title, 9.7, floor, BLUE)
    best = family.best
    if best is not None and best.beside_control is not None:
        text += f"\n\nbest that held: {best.name}, {100 * best.beside_control.difference:+.1f} points"
    filled = "\n".join(textwrap.fill(part, wide - 2) for part in text.split("\n"))
    axes.text(place + 0.09, 8.9, filled, fontsize=9, color=INK, va="top", linespacing=1.3)


# --- the page ---------------------------------------------------------------------------------------------------------


def page(report: ProgramReport, clock: Clock, options: Sequence[str], picture: str) -> str:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch on the CPU, Python {platform.python_version()}"
    total = clock.before + clock.after
    head = [
        f"# The plan as a programme, on the {report.study.workload} workload",
        "",
        f"Made by `make programme` on {machine}: `rin program run plan{''.join(f' {one}' for one in options)}`, its "
        f"driver killed (kill -9) after {clock.before:.0f} s, when {clock.killed_at} trials had ended, and the command "
        f"given again, which went on for {clock.after:.0f} s. {total / 60:.1f} minutes of clock time in all, "
        f"{clock.trials} trials.",
        "",
        f"![decision path of the programme]({picture})",
        "",
        "*Phases from left to right; above, what ran, its difference to its control and its verdict at the programme's "
        "level (replicates in brackets); below, the decision that followed and why.*",
        "",
    ]
    return "\n".join([*head, ""]) + summary(report).replace("\n# ", "\n## ").replace("# Programme", "## Programme", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workload", default="embedded")
    parser.add_argument("--concurrent", type=int, default=2)
    parser.add_argument("--kill-after", type=int, default=12, help="trials that have ended when the driver is killed")
    parser.add_argument("--modes", default="", help="as of rin program run")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of programme.md and programme.png")
    parser.add_argument("--store", type=Path, default=None, help="a fresh folder that is kept; default a temporary one")
    given = parser.parse_args()
    options = ["--workload", given.workload, "--concurrent", str(given.concurrent)]
    options += ["--modes", given.modes] if given.modes else []
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        store = (given.store or Path(folder)).absolute()
        clock = run(store, options, given.kill_after)
        subprocess.run([str(RIN), "program", "report", NAME, "--store", str(store)], check=True)
        state = read_state(load_study_config(str(store), NAME))
        last = state.registration
        report = read_report(state.study, last.programme, last.words(), state.walks, state.arms)
    for family in report.families:
        picture = f"programme{f'-{family.mode.lower()}' if family.mode else ''}.png"
        draw(family, given.output / picture)
    first = "programme.png" if not report.families[0].mode else f"programme-{report.families[0].mode.lower()}.png"
    (given.output / "programme.md").write_text(page(report, clock, options, first), encoding="utf-8")
    print(f"wrote {given.output / 'programme.md'}")


if __name__ == "__main__":
    main()

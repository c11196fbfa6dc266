"""Rows to figures: what plotly draws, as plain dicts.

One style for all of them. The four colours are Okabe and Ito's that stand 3 to 1 or more apart from white and from near
black, so that one drawing serves light, dark and paper; no meaning hangs on a colour alone (a collapse is a cross, an
undecided arm an open circle). Areas are translucent, so that text on them can be read on both grounds. Labels stand
above what they name and not beside it, which leaves a telephone its width. Plain dicts: plotly's own objects check
every value, which a page of hundreds of panels would wait for; the tests check each kind once.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from dashboards.figure_rows import (
    DecisionCurve,
    ForestRow,
    HeatCell,
    HoursRow,
    ParetoRow,
    RiskContour,
    RiskPanel,
    SpaceCell,
)
from dashboards.tables import points
from dashboards.trial_rows import Anatomy, CurvePanel, MeanPoint, ReceiptPanel, mean_curve
from search.importance import Importance

BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A7F85"
INK = "#1f2328"
LINE, GRID = "rgba(127,127,127,0.7)", "rgba(127,127,127,0.22)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
WIDTH_IN_LETTERS = 46
"""Of a label on a telephone."""
HEIGHT = 250

Trace = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What is drawn, under which name it is exported, and what it shows in words."""

    name: str
    alt: str
    data: Sequence[Trace]
    layout: Mapping[str, Any]

    @property
    def height(self) -> int:
        return int(self.layout["height"])


def faint(color: str, alpha: float) -> str:
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:.2f})"


def _layout(height: int, **more: Any) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 54, "r": 12, "t": 44, "b": 42},
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        **more,
    }


def _axis(title: str = "", **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "font": {"size": 12}, "standoff": 6},
        "gridcolor": GRID,
        "linecolor": LINE,
        "showline": True,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": LINE,
        "ticklen": 4,
        "fixedrange": True,
        **more,
    }


def _bare(low: float, high: float) -> dict[str, Any]:
    """An axis that only places things."""
    return {"range": [low, high], "visible": False, "fixedrange": True}


def _log_axis(title: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    """Of positive numbers, labelled at 1, 2 and 5."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) > 7:
        inside = [tick for tick in inside if f"{tick:e}"[0] == "1"]
    span = {"type": "log", "range": [math.log10(low), math.log10(high)]}
    return _axis(title, tickvals=inside, ticktext=[f"{tick:g}" for tick in inside], **span, **more)


def _words(text: str, **more: Any) -> dict[str, Any]:
    """An annotation without an arrow."""
    return {"text": text, "showarrow": False, "align": "left", "xanchor": "left", "yanchor": "bottom", **more}


def _title(first: str, second: str) -> dict[str, Any]:
    """Of a panel, in its left upper corner."""
    text = f"<b>{escape(_cut(first, 40))}</b><br>{escape(_cut(second, WIDTH_IN_LETTERS))}"
    return _words(text, xref="paper", yref="paper", x=0, y=1.0, yshift=4)


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _box(x0: Any, x1: Any, y0: Any, y1: Any, **more: Any) -> dict[str, Any]:
    edge = more.pop("line", {"width": 0})
    return {"type": "rect", "x0": x0, "x1": x1, "y0": y0, "y1": y1, "line": edge, "layer": "below", **more}


def _percent_axis(title: str, **more: Any) -> dict[str, Any]:
    return _axis(title, tickformat=".3~%", **more)


# --- comparisons ------------------------------------------------------------------------------------------------------

MARKS = {
    **dict.fromkeys(("ahead", "better"), (BLUE, "circle")),
    **dict.fromkeys(("behind", "worse"), (VERMILLION, "square")),
    "same": (GREEN, "diamond"),
}
"""Of a verdict's first word: colour and symbol; every other is an open grey circle."""


def forest(rows: Sequence[ForestRow], measure: str = "accuracy") -> Figure:
    """Differences to the control with their intervals, best first; verdict and power in words above each."""
    data: list[Trace] = []
    notes, place, reach = [], 0.0, _reach(rows)
    for row in rows:
        said = textwrap.wrap(f"{row.verdict or 'not compared'}", WIDTH_IN_LETTERS)
        said += textwrap.wrap(row.power, WIDTH_IN_LETTERS)
        name = row.arm + (" (candidate)" if row.candidate else "")
        head = f"<b>{escape(_cut(name, 24))}</b> {escape(_cut(row.noise, 34))}"
        place -= len(said) + 1.6
        notes.append(
            _words("<br>".join([head, *map(escape, said)]), xref="paper", x=0, y=place, yshift=7, bgcolor="#ffffff")
        )
        color, symbol = MARKS.get(row.verdict.split(" ")[0], (GREY, "circle-open"))
        told = f"{escape(row.arm)}: {100 * row.difference:+.1f} points"
        if row.low is not None and row.high is not None:
            told += f" [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
            line = {"color": color, "width": 2.5}
            ends, beside = [100 * row.low, 100 * row.high], [place, place]
            data.append({"x": ends, "y": beside, "mode": "lines", "line": line, "hoverinfo": "skip"})
            for end, out in zip((-reach, reach), (ends[0] < -reach, ends[1] > reach), strict=True):
                if out:
                    arrow = {"color": color, "size": 10, "symbol": f"triangle-{'left' if end < 0 else 'right'}"}
                    beyond = {"x": [0.985 * end], "y": [place], "mode": "markers", "hoverinfo": "skip"}
                    data.append({**beyond, "marker": arrow})
        told += f", {row.replicates} pairs, {row.collapsed} collapsed"
        mark = {"color": color, "symbol": symbol, "size": 11, "line": {"color": color, "width": 2}}
        data.append(
            {
                "x": [100 * row.difference],
                "y": [place],
                "mode": "markers",
                "marker": mark,
                "text": told,
                "hoverinfo": "text",
            }
        )
        place -= 0.9
    layout = _layout(
        70 + round(-place * 17),
        margin={"l": 8, "r": 8, "t": 6, "b": 46},
        xaxis=_axis(
            f"points of {measure} against the control", range=[-reach, reach], zeroline=True, zerolinecolor=LINE
        ),
        yaxis=_bare(place, 0.2),
        annotations=notes,
    )
    return Figure(name="forest", alt=f"Differences of {len(rows)} arms to their control.", data=data, layout=layout)


def _reach(rows: Sequence[ForestRow]) -> float:
    """Of the axis on both sides of 0, in points: every difference, and of intervals what tells them apart."""
    points_seen = max((abs(100 * row.difference) for row in rows), default=1.0)
    ends = [abs(100 * end) for row in rows for end in (row.low, row.high) if end is not None]
    return max(2.0, 1.1 * max(points_seen, min(max(ends, default=0.0), 1.5 * points_seen + 5)))


def risk(panel: RiskPanel) -> Figure:
    """How often runs collapse: exact intervals of what was counted, and the band in which the boundary lies."""
    low = min(point.low_x for point in panel.points) / 1.5
    high = max(point.high_x for point in panel.points) * 1.5
    data: list[Trace] = []
    if panel.contours:
        data.append(_band(panel.contours, low, high))
        known = [one for one in panel.contours if one.x is not None and low <= one.x <= high]
        line = {"color": BLUE, "width": 2}
        xs, ys = [one.x for one in known], [one.share for one in known]
        data.append({"x": xs, "y": ys, "mode": "lines", "line": line, "hoverinfo": "skip"})
    seen = panel.points
    data.append(
        {
            "x": [point.x for point in seen],
            "y": [point.share for point in seen],
            "mode": "markers",
            "marker": {"color": VERMILLION, "size": [7 + min(9, point.runs / 2) for point in seen]},
            "error_y": _errors([p.high - p.share for p in seen], [p.share - p.low for p in seen]),
            "error_x": _errors([p.high_x - p.x for p in seen], [p.x - p.low_x for p in seen]),
            "text": [f"{p.collapsed} of {p.runs} runs collapsed, {p.low_x:.3g} to {p.high_x:.3g}" for p in seen],
            "hoverinfo": "text",
        }
    )
    what = "sigma_start" if panel.axis == "sigma" else "applied dose (share of the weights' size)"
    layout = _layout(
        HEIGHT + 20,
        margin={"l": 50, "r": 12, "t": 48, "b": 44},
        xaxis=_log_axis(what, low, high),
        yaxis=_percent_axis("runs that collapse", range=[-0.04, 1.04]),
        annotations=[_title(f"{panel.mode}, noise on {panel.kind}", f"P(collapse) over {panel.axis}, 95 % intervals")],
    )
    alt = f"Share of collapsed runs over {panel.axis}, {panel.mode}, noise on {panel.kind}. {panel.words}"
    return Figure(name=f"collapse-{panel.axis}-{panel.mode}-{panel.kind}", alt=alt, data=data, layout=layout)


def _band(contours: Sequence[RiskContour], low: float, high: float) -> Trace:
    left = [min(max(one.low or low, low), high) for one in contours]
    right = [max(min(one.high or high, high), low) for one in contours]
    shares = [one.share for one in contours]
    return {
        "x": [*left, *right[::-1]],
        "y": [*shares, *shares[::-1]],
        "mode": "lines",
        "fill": "toself",
        "fillcolor": faint(BLUE, 0.18),
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def _errors(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": list(above),
        "arrayminus": list(below),
        "color": VERMILLION,
        "thickness": 1.3,
        "width": 3,
    }


def heat(cells: Sequence[HeatCell]) -> Figure:
    """Sigma by target: blue ahead of the control, orange behind it, framed where half the runs or more collapse."""
    targets = list(dict.fromkeys(cell.target for cell in cells))
    columns = sorted({(cell.column, cell.low, cell.high) for cell in cells})
    place = {column: number for number, (column, _, _) in enumerate(columns)}
    worst = max((abs(cell.difference) for cell in cells if cell.difference is not None), default=0.0) or 1.0
    shapes, notes = [], []
    for cell in cells:
        x, y = place[cell.column], -targets.index(cell.target)
        color = GREY if cell.difference is None else BLUE if cell.difference > 0 else VERMILLION
        alpha = 0.12 if cell.difference is None else 0.08 + 0.37 * abs(cell.difference) / worst
        broken = 2 * cell.collapsed >= cell.runs
        line = {"color": VERMILLION, "width": 3} if broken else {"color": LINE, "width": 0.5}
        shapes.append(_box(x - 0.48, x + 0.48, y - 0.38, y + 0.3, fillcolor=faint(color, alpha), line=line))
        apart = "no pair" if cell.difference is None else f"{100 * cell.difference:+.1f}"
        lost = f"✕ {cell.collapsed}/{cell.runs}" if cell.collapsed else f"{cell.runs} run{'s'[: cell.runs != 1]}"
        centre = {"align": "center", "xanchor": "center", "yanchor": "middle"}
        notes.append(_words(f"<b>{apart}</b><br>{lost}", x=x, y=y - 0.04, **centre))
    notes += [
        _words(f"<b>{escape(_cut(target, WIDTH_IN_LETTERS))}</b>", x=-0.48, y=0.31 - number)
        for number, target in enumerate(targets)
    ]
    names = [f"{low:.2g}" if low == high else f"{low:.2g}-<br>{high:.2g}" for _, low, high in columns]
    layout = _layout(
        90 + 74 * len(targets),
        margin={"l": 8, "r": 8, "t": 10, "b": 66},
        xaxis=_axis(
            "sigma_start",
            range=[-0.5, len(columns) - 0.5],
            tickvals=list(range(len(columns))),
            ticktext=names,
            tickangle=0,
            showgrid=False,
            showline=False,
        ),
        yaxis=_bare(0.45 - len(targets), 0.62),
        shapes=shapes,
        annotations=notes,
    )
    places = {"x": [place[cell.column] for cell in cells], "y": [-targets.index(cell.target) for cell in cells]}
    told = [f"{c.arms} arms, {c.runs} runs, {c.collapsed} collapsed; {c.low:.3g} to {c.high:.3g}" for c in cells]
    data = [{**places, "mode": "markers", "marker": {"opacity": 0, "size": 40}, "text": told, "hoverinfo": "text"}]
    alt = f"Mean difference to the control by sigma, for {', '.join(targets)}."
    return Figure(name="heat-map", alt=alt, data=data, layout=layout)


def bars(name: str, alt: str, rows: Sequence[tuple[str, float, str, float | None]], color: str = BLUE) -> Figure:
    """(label, share, value in words, mark) from top to bottom; the label and the value stand above their bar."""
    shapes, notes = [], []
    longest = max((max(share, mark or 0.0) for _, share, _, mark in rows), default=0.0) or 1.0
    for number, (label, share, value, mark) in enumerate(rows):
        y = -number
        shapes.append(_box(0, share, y - 0.42, y - 0.12, fillcolor=color))
        if mark is not None:
            line = {"color": LINE, "width": 3}
            shapes.append(
                {"type": "line", "x0": mark, "x1": mark, "y0": y - 0.5, "y1": y - 0.04, "line": line, "layer": "above"}
            )
        notes.append(_words(f"<b>{value}</b> {escape(_cut(label, 44))}", xref="paper", x=0, y=y - 0.12))
    layout = _layout(
        20 + 46 * len(rows),
        margin={"l": 8, "r": 8, "t": 10, "b": 6},
        xaxis=_bare(0, 1.02 * longest),
        yaxis=_bare(-len(rows) + 0.45, 0.4),
        shapes=shapes,
        annotations=notes,
    )
    hidden = {"x": [0], "y": [0], "mode": "markers", "marker": {"opacity": 0}, "hoverinfo": "skip"}
    return Figure(name=name, alt=alt, data=[hidden], layout=layout)


def importances(items: Sequence[Importance]) -> Figure:
    rows = [
        (
            f"{item.dimension} ({item.trials} of {item.of} trials)",
            item.importance,
            f"{item.importance:.0%}",
            item.chance,
        )
        for item in items
        if item.importance is not None
    ]
    alt = "Importance of each dimension; the mark is what chance alone stays below."
    return bars("importance", alt, rows)


def hours(rows: Sequence[HoursRow], unit: str) -> Figure:
    told = [(row.what, row.share, f"{row.hours:.3g} h ({row.share:.0%})", None) for row in rows]
    return bars("hours", f"Where the {unit} went.", told, color=PURPLE)


def pareto(rows: Sequence[ParetoRow], measure: str) -> Figure:
    """Score over the hours of a run; the front is a line."""
    groups = (
        ("front", [row for row in rows if row.front], BLUE, "circle"),
        ("control", [row for row in rows if row.control and not row.front], GREY, "diamond"),
        ("collapses", [row for row in rows if row.collapsed and not row.front and not row.control], VERMILLION, "x"),
        ("other", [r for r in rows if not (r.front or r.control or r.collapsed)], GREY, "circle-open"),
    )
    data: list[Trace] = []
    for name, members, color, symbol in groups:
        members = sorted(members, key=lambda row: row.hours)
        data.append(
            {
                "x": [60 * row.hours for row in members],
                "y": [row.score for row in members],
                "name": name,
                "mode": "markers+lines" if name == "front" else "markers",
                "line": {"color": BLUE, "width": 1.5, "shape": "hv"},
                "marker": {"color": color, "symbol": symbol, "size": 9, "line": {"color": color, "width": 1.5}},
                "text": [
                    f"{escape(row.arm)} ({escape(row.noise)}): {points(row.score)}, {60 * row.hours:.3g} min a run, "
                    f"{row.collapsed:.0%} collapsed"
                    for row in members
                ],
                "hoverinfo": "text",
            }
        )
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}}
    layout = _layout(
        360,
        showlegend=True,
        legend=legend,
        margin={"l": 52, "r": 12, "t": 40, "b": 44},
        xaxis=_axis("minutes of a run"),
        yaxis=_percent_axis(measure),
    )
    alt = f"{measure} over the minutes of a run; in front: {', '.join(row.arm for row in rows if row.front) or 'none'}."
    return Figure(name="pareto", alt=alt, data=data, layout=layout)


def decision(curve: DecisionCurve, unit: str) -> Figure:
    """How wide the interval is after how many hours, and how wide it may be for the difference that was seen."""
    seen = [point for point in curve.points if not point.projected]
    ahead = [*seen[-1:], *(point for point in curve.points if point.projected)]
    data: list[Trace] = []
    for members, dash, symbol in ((seen, "solid", "circle"), (ahead, "dot", "circle-open")):
        data.append(
            {
                "x": [point.hours for point in members],
                "y": [100 * point.half_width for point in members],
                "mode": "lines+markers",
                "line": {"color": BLUE, "width": 2, "dash": dash},
                "marker": {"color": BLUE, "symbol": symbol, "size": 7},
                "text": [f"{p.pairs} pairs, {p.hours:.2f} h: ± {100 * p.half_width:.2f} points" for p in members],
                "hoverinfo": "text",
            }
        )
    limit = 100 * abs(curve.difference)
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit}
    shape |= {"line": {"color": VERMILLION, "width": 2, "dash": "dash"}}
    told = f"the difference seen, {limit:.1f}: below it, it is told from 0"
    layout = _layout(
        320,
        margin={"l": 52, "r": 12, "t": 48, "b": 44},
        xaxis=_axis(f"{unit}, of both arms", rangemode="tozero"),
        yaxis=_axis("± points", rangemode="tozero"),
        shapes=[shape],
        annotations=[
            _title(f"{curve.arm} against {curve.control}", "half width of the interval; open: projected"),
            _words(told, xref="paper", x=1, xanchor="right", y=limit, yshift=2),
        ],
    )
    return Figure(name="cost-to-decision", alt="Width of the interval over hours.", data=data, layout=layout)


def space_map(cells: Sequence[SpaceCell]) -> Figure:
    """A strip per dimension: how many configurations were tried in each part; a dashed frame where none was."""
    dimensions = list(dict.fromkeys(cell.dimension for cell in cells))
    most = max((cell.tried for cell in cells), default=0) or 1
    widths = {name: sum(cell.dimension == name for cell in cells) for name in dimensions}
    shapes, notes = [], []
    for cell in cells:
        y, width = -dimensions.index(cell.dimension), 1 / widths[cell.dimension]
        x0, x1 = cell.order * width, (cell.order + 1) * width - 0.006
        fill = faint(BLUE, 0.1 + 0.35 * cell.tried / most) if cell.tried else "rgba(0,0,0,0)"
        line = {"color": LINE, "width": 0.5} if cell.tried else {"color": VERMILLION, "width": 1.5, "dash": "dot"}
        shapes.append(_box(x0, x1, y - 0.26, y + 0.1, fillcolor=fill, line=line))
        broke = f" ✕{cell.collapsed}" if cell.collapsed else ""
        centre = {"align": "center", "xanchor": "center", "yanchor": "middle"}
        middle = (x0 + x1) / 2
        notes.append(_words(f"<b>{cell.tried}</b>{broke}" if cell.tried else "none", x=middle, y=y - 0.08, **centre))
        below = {**centre, "yanchor": "top", "font": {"size": 10}}
        label = cell.label.split(" to ")[0]
        letters = max(3, 54 // widths[cell.dimension])
        notes.append(_words(escape(_cut(label, letters)), x=middle, y=y - 0.27, **below))
    notes += [
        _words(f"<b>{escape(_cut(name, WIDTH_IN_LETTERS))}</b>", x=0, y=0.12 - number)
        for number, name in enumerate(dimensions)
    ]
    layout = _layout(
        24 + 82 * len(dimensions),
        margin={"l": 8, "r": 8, "t": 8, "b": 4},
        xaxis=_bare(0, 1),
        yaxis=_bare(0.5 - len(dimensions), 0.42),
        shapes=shapes,
        annotations=notes,
    )
    hidden = {"x": [0], "y": [0], "mode": "markers", "marker": {"opacity": 0}, "hoverinfo": "skip"}
    alt = "Configurations tried in each part of the space."
    return Figure(name="space", alt=alt, data=[hidden], layout=layout)


# --- trials -----------------------------------------------------------------------------------------------------------


def spread(panels: Iterable[CurvePanel]) -> tuple[float, float]:
    """Of all values, with some air: one axis for all panels, so that they can be compared."""
    seen = [value for panel in panels for curve in (*panel.seeds, *panel.behind) for value in curve.values]
    known = [value for value in seen if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    air = 0.06 * (high - low) or 0.05
    return low - air, high + air


def curves(panel: CurvePanel, span: tuple[float, float], metric: str = "reward") -> Figure:
    """Every seed of an arm, its control behind it, a cross where a run collapsed, a ring where a rule spoke and it went
    on, noisy stages shaded by sigma."""
    data: list[Trace] = []
    for curve in panel.behind:
        line = {"color": GREY, "width": 1, "dash": "dot"}
        data.append(
            {
                "x": list(curve.steps),
                "y": _rounded(curve.values),
                "mode": "lines",
                "line": line,
                "opacity": 0.75,
                "hoverinfo": "skip",
            }
        )
    for curve in panel.seeds:
        data.append(
            {
                "x": list(curve.steps),
                "y": _rounded(curve.values),
                "mode": "lines" if len(curve.steps) > 1 else "markers",
                "marker": {"color": BLUE, "size": 6},
                "line": {"color": BLUE, "width": 1.6},
                "name": escape(curve.name),
                "hovertemplate": f"{escape(curve.name)}<br>step %{{x}}: %{{y:.3f}}<extra></extra>",
            }
        )
    for curve in panel.seeds:
        if curve.alarms:
            value = dict(zip(curve.steps, curve.values, strict=True))
            heights = [span[0] if value[step] is None else value[step] for step, _ in curve.alarms]
            place = {"x": [step for step, _ in curve.alarms], "y": _rounded(heights)}
            spoke = [f"{curve.name}, step {step}: {rule} spoke, the trial went on" for step, rule in curve.alarms]
            ring = {"symbol": "circle-open", "size": 10, "color": VERMILLION, "line": {"color": VERMILLION, "width": 2}}
            data.append(
                {**place, "mode": "markers", "marker": ring, "text": list(map(escape, spoke)), "hoverinfo": "text"}
            )
        if curve.ending in ("collapsed", "failed"):
            broken = curve.ending == "collapsed"
            last = next((value for value in reversed(curve.values) if value is not None), span[0])
            mark = {"symbol": "x" if broken else "triangle-up", "size": 10, "color": VERMILLION if broken else PURPLE}
            told = escape(f"{curve.name} {curve.ending} in step {curve.steps[-1]}: {curve.rule}")
            end = {"x": [curve.steps[-1]], "y": _rounded([last])}
            data.append({**end, "mode": "markers", "marker": mark, "text": told, "hoverinfo": "text"})
    logs = [math.log(stage.sigma) for stage in panel.stages]
    width = (max(logs) - min(logs)) or 1.0 if logs else 1.0
    shapes = []
    for stage, log in zip(panel.stages, logs, strict=True):
        alpha = 0.06 + 0.2 * (log - min(logs)) / width
        area = _box(stage.first - 0.5, stage.last + 0.5, 0, 1, yref="paper", fillcolor=faint(PURPLE, alpha))
        shapes.append(area)
    name = panel.arm + (" (candidate)" if panel.candidate else "")
    layout = _layout(
        HEIGHT,
        xaxis=_axis("step", range=[-0.8, panel.steps - 0.2]),
        yaxis=_axis(metric, range=list(span), nticks=6),
        shapes=shapes,
        annotations=[_title(name, panel.noise)],
    )
    broke = sum(curve.ending == "collapsed" for curve in panel.seeds)
    alt = f"{metric} over steps of {name}, {len(panel.seeds)} seeds, {broke} collapsed; {panel.noise}."
    return Figure(name=f"curves-{panel.arm}", alt=alt, data=data, layout=layout)


def mean_curves(panel: CurvePanel, span: tuple[float, float]) -> Figure:
    """The same with the mean over seeds and its 95 % band in front, the control's mean dotted; where there are two
    seeds."""
    drawn = curves(panel, span)
    seeds = [{**trace, "opacity": 0.35} if "lines" in trace["mode"] else trace for trace in drawn.data]
    means: list[Trace] = []
    mean, behind = mean_curve(panel.seeds), mean_curve(panel.behind)
    if mean:
        steps = [point.step for point in mean]
        low, high = (_rounded(clipped) for clipped in _within(mean, span))
        band = {"x": [*steps, *reversed(steps)], "y": [*low, *reversed(high)], "fill": "toself", "mode": "none"}
        means.append({**band, "fillcolor": faint(BLUE, 0.2), "hoverinfo": "skip"})
    for line, points_of in (
        ({"color": GREY, "width": 2, "dash": "dot"}, behind),
        ({"color": BLUE, "width": 2.5}, mean),
    ):
        if points_of:
            place = {"x": [one.step for one in points_of], "y": _rounded([one.mean for one in points_of])}
            means.append({**place, "mode": "lines", "line": line, "hoverinfo": "skip"})
    return replace(drawn, data=[*seeds, *means], alt=f"{drawn.alt} Mean over seeds with its 95 % band.")


def _within(mean: Sequence[MeanPoint], span: tuple[float, float]) -> tuple[list[float], list[float]]:
    """Of two seeds the band may be wider than any axis."""
    return [max(one.low, span[0]) for one in mean], [min(one.high, span[1]) for one in mean]


def anatomy(found: Anatomy) -> Figure:
    """The signal of the rule in the last steps, its limit, and where it was passed."""
    line = {"color": BLUE, "width": 2}
    values = _rounded(found.values)
    data: list[Trace] = [
        {
            "x": list(found.steps),
            "y": values,
            "mode": "lines+markers",
            "line": line,
            "marker": {"color": BLUE, "size": 6},
            "hovertemplate": "step %{x}: %{y:.4g}<extra></extra>",
        }
    ]
    shapes, notes = [], [_title(f"{found.name}: {found.rule}", found.signal or "no signal is known for this rule")]
    if found.limit is not None:
        dash = {"color": VERMILLION, "width": 2, "dash": "dash"}
        level = {"y0": found.limit, "y1": found.limit}
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, **level, "line": dash})
        side = "wrong below" if found.below else "wrong above"
        notes.append(_words(f"{side} {found.limit:.3g}", xref="paper", x=0.01, y=found.limit, yshift=2))
        data.append({"x": [found.steps[-1]], "y": [found.limit], "mode": "markers", "marker": {"opacity": 0}})
    shapes.append(_box(found.first - 0.5, found.steps[-1] + 0.5, 0, 1, yref="paper", fillcolor=faint(VERMILLION, 0.13)))
    layout = _layout(
        HEIGHT - 10,
        xaxis=_axis("step", range=[found.steps[0] - 0.6, found.steps[-1] + 0.6], dtick=1),
        yaxis=_axis("", nticks=6, rangemode="tozero"),
        shapes=shapes,
        annotations=notes,
    )
    alt = f"{found.signal} of {found.name} before its collapse by {found.rule}: {found.evidence}."
    return Figure(name=f"anatomy-{found.name.replace('/', '-')}", alt=alt, data=data, layout=layout)


def receipt(panel: ReceiptPanel) -> Figure:
    """Applied sigma layer by layer, a line per stage; dotted: what was asked for."""
    stages = sorted({cell.stage for cell in panel.cells})
    data: list[Trace] = []
    notes = [_title(f"{panel.arm}, {panel.kind}", "line: applied, dotted: asked for; by stage")]
    for number, stage in enumerate(stages):
        cells = [cell for cell in panel.cells if cell.stage == stage]
        layers, nominal = [cell.layer for cell in cells], [cell.nominal for cell in cells]
        grey = {"color": GREY, "width": 1.2, "dash": "dot"}
        data.append({"x": layers, "y": nominal, "mode": "lines", "line": grey, "hoverinfo": "skip"})
        color = (BLUE, GREEN, PURPLE)[number % 3]
        data.append(
            {
                "x": layers,
                "y": [cell.applied if cell.applied > 0 else None for cell in cells],
                "mode": "lines+markers",
                "line": {"color": color, "width": 1.8},
                "marker": {"color": color, "size": 5},
                "text": [f"stage {stage}, layer {c.layer}: {c.applied:.3g} for {c.nominal:.3g}" for c in cells],
                "hoverinfo": "text",
            }
        )
    values = [value for cell in panel.cells for value in (cell.nominal, cell.applied) if value > 0]
    every = max(1, round(max(cell.layer for cell in panel.cells) / 10))
    low, high = (min(values) / 1.4, max(values) * 1.4) if values else (0.001, 0.1)
    layout = _layout(
        340,
        margin={"l": 58, "r": 12, "t": 48, "b": 44},
        xaxis=_axis("layer", tick0=0, dtick=every),
        yaxis=_log_axis("sigma", low, high),
        annotations=notes,
    )
    alt = f"Nominal and applied sigma per layer of {panel.arm}, noise on {panel.kind}, {len(stages)} stages."
    return Figure(name=f"receipt-{panel.arm}-{panel.kind}", alt=alt, data=data, layout=layout)


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    """Four digits: what a picture shows, and a page of hundreds of runs can hold."""
    return [None if value is None else float(f"{value:.4g}") for value in values]

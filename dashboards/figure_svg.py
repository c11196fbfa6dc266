"""Figures as SVG without a browser: what a sweep leaves beside its page, and MLflow shows as pictures.

`figure_export.py` has plotly itself draw every figure, in a Chromium, for a paper. Where sweeps run there is none, so
the two pictures that answer most (differences to the control with their intervals, learning curves with the mean over
seeds and its band) are drawn here from the same figures: lines, marks, boxes and words, on white. What else plotly can
do is not understood, and refused.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dashboards.figures import FONT, Figure

COLUMNS = 3
PANEL, WIDE = 440, 860
"""Widths in pixels."""
LINE = 14.5
"""Height of a line of text of size 12, in pixels."""
DASHES = {"dot": "2 3", "dash": "6 4"}
_BREAK = re.compile(r"<br>")
_BOLD = re.compile(r"</?b>")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """From values to pixels."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        return self.left + (x - x0) / (x1 - x0) * self.width, self.top + (y1 - y) / (y1 - y0) * self.height

    def place(self, what: Mapping[str, Any], x: float, y: float) -> tuple[float, float]:
        """With each coordinate a value or, by `xref` and `yref`, a share of the frame."""
        across, down = self.at(x, y)
        if what.get("xref") == "paper":
            across = self.left + x * self.width
        if what.get("yref") == "paper":
            down = self.top + (1 - y) * self.height
        return across, down


def svg(figures: Sequence[Figure], title: str, columns: int = COLUMNS) -> str:
    """Of several, side by side."""
    width = WIDE if len(figures) == 1 else PANEL
    across = min(columns, len(figures))
    rows = [figures[start : start + across] for start in range(0, len(figures), across)]
    heights = [max(figure.height for figure in row) for row in rows]
    parts, top = [], 34.0
    for row, height in zip(rows, heights, strict=True):
        for column, figure in enumerate(row):
            body = "".join(_drawn(figure, width))
            parts.append(f'<g transform="translate({column * width},{top:g})"><title>{escape(figure.alt)}</title>')
            parts.append(f"{body}</g>")
        top += height + 8
    size = f'width="{across * width}" height="{top:g}" viewBox="0 0 {across * width} {top:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{escape(FONT)}" font-size="12" fill="#1f2328">'
    heading = f'<text x="10" y="22" font-size="15" font-weight="bold">{escape(title)}</text>'
    return f'{head}<rect width="100%" height="100%" fill="#ffffff"/>{heading}{"".join(parts)}</svg>'


def _drawn(figure: Figure, width: int) -> Iterator[str]:
    layout = figure.layout
    margin, xaxis, yaxis = layout["margin"], layout["xaxis"], layout["yaxis"]
    frame = _Frame(
        left=margin["l"],
        top=margin["t"],
        width=width - margin["l"] - margin["r"],
        height=figure.height - margin["t"] - margin["b"],
        x=tuple(xaxis["range"]),
        y=tuple(yaxis["range"]),
    )
    for shape in layout.get("shapes", ()):
        yield _box(frame, shape)
    yield from _axis(frame, xaxis, "x")
    yield from _axis(frame, yaxis, "y")
    for trace in figure.data:
        yield from _trace(frame, trace)
    for note in layout.get("annotations", ()):
        yield from _words(frame, note)


def _box(frame: _Frame, shape: Mapping[str, Any]) -> str:
    assert shape["type"] == "rect", shape["type"]
    (x0, y0), (x1, y1) = frame.place(shape, shape["x0"], shape["y0"]), frame.place(shape, shape["x1"], shape["y1"])
    x0, x1 = max(min(x0, x1), frame.left), min(max(x0, x1), frame.left + frame.width)
    fill = f'fill="{shape.get("fillcolor", "none")}"'
    return f'<rect x="{x0:.1f}" y="{min(y0, y1):.1f}" width="{x1 - x0:.1f}" height="{abs(y1 - y0):.1f}" {fill}/>'


def _axis(frame: _Frame, axis: Mapping[str, Any], which: str) -> Iterator[str]:
    if not axis.get("visible", True):
        return
    low, high = frame.x if which == "x" else frame.y
    bottom, right = frame.top + frame.height, frame.left + frame.width
    for tick in _ticks(low, high):
        x, y = frame.at(tick if which == "x" else frame.x[0], tick if which == "y" else frame.y[0])
        zero = tick == 0 and axis.get("zeroline")
        color = axis["zerolinecolor"] if zero else axis["gridcolor"]
        if which == "x":
            yield f'<path d="M{x:.1f} {frame.top:g}V{bottom:g}" stroke="{color}"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 16:g}" text-anchor="middle">{tick:g}</text>'
        else:
            yield f'<path d="M{frame.left:g} {y:.1f}H{right:g}" stroke="{color}"/>'
            yield f'<text x="{frame.left - 6:g}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    said = escape(axis["title"]["text"])
    middle_x, middle_y = frame.left + frame.width / 2, frame.top + frame.height / 2
    if which == "x":
        yield f'<path d="M{frame.left:g} {bottom:g}H{right:g}" stroke="{axis["linecolor"]}"/>'
        yield f'<text x="{middle_x:g}" y="{bottom + 34:g}" text-anchor="middle">{said}</text>'
    else:
        yield f'<path d="M{frame.left:g} {frame.top:g}V{bottom:g}" stroke="{axis["linecolor"]}"/>'
        yield f'<text transform="translate(14,{middle_y:g}) rotate(-90)" text-anchor="middle">{said}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _trace(frame: _Frame, trace: Mapping[str, Any]) -> Iterator[str]:
    seen = [None if y is None else frame.at(x, y) for x, y in zip(trace["x"], trace["y"], strict=True)]
    faint = f' opacity="{trace["opacity"]:g}"' if "opacity" in trace else ""
    if trace.get("fill") == "toself":
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in filter(None, seen))
        yield f'<polygon points="{corners}" fill="{trace["fillcolor"]}"/>'
        return
    if "lines" in trace["mode"]:
        line, path, pen = trace["line"], [], "M"
        for point in seen:
            if point is not None:
                path.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
            pen = "M" if point is None else "L"
        dash = f' stroke-dasharray="{DASHES[line["dash"]]}"' if "dash" in line else ""
        ink = f'stroke="{line["color"]}" stroke-width="{line["width"]:g}"'
        yield f'<path d="{"".join(path)}" fill="none" {ink}{dash}{faint}/>'
    if "markers" in trace["mode"]:
        yield from (_mark(*point, trace["marker"]) for point in seen if point is not None)


def _mark(x: float, y: float, marker: Mapping[str, Any]) -> str:
    symbol, color, r = marker.get("symbol", "circle"), marker["color"], marker["size"] / 2
    outline = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "diamond": [(0, -r), (r, 0), (0, r), (-r, 0)],
        "triangle-up": [(0, -r), (r, r), (-r, r)],
        "triangle-left": [(-r, 0), (r, -r), (r, r)],
        "triangle-right": [(r, 0), (-r, -r), (-r, r)],
    }
    if symbol in ("circle", "circle-open"):
        fill = "#ffffff" if symbol == "circle-open" else color
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" fill="{fill}" stroke="{color}" stroke-width="2"/>'
    if symbol == "x":
        d = f"M{x - r:.1f} {y - r:.1f}L{x + r:.1f} {y + r:.1f}M{x - r:.1f} {y + r:.1f}L{x + r:.1f} {y - r:.1f}"
        return f'<path d="{d}" stroke="{color}" stroke-width="2.5"/>'
    corners = " ".join(f"{x + across:.1f},{y + down:.1f}" for across, down in outline[symbol])
    return f'<polygon points="{corners}" fill="{color}"/>'


def _words(frame: _Frame, note: Mapping[str, Any]) -> Iterator[str]:
    """Lines above the place, or centred in it; the first may be bold."""
    x, y = frame.place(note, note["x"], note["y"])
    lines = _BREAK.split(note["text"])
    top = y - note.get("yshift", 0) - LINE * len(lines) + 11
    for number, line in enumerate(lines):
        bold, found, rest = line.partition("</b>")
        spans = f'<tspan font-weight="bold">{_BOLD.sub("", bold)}</tspan>{rest}' if found else line
        clear = 'stroke="#ffffff" stroke-width="4" paint-order="stroke"' if note.get("bgcolor") else ""
        yield f'<text x="{x:.1f}" y="{top + number * LINE:.1f}" {clear}>{spans}</text>'

"""The two pictures beside the page: SVG that draws what its rows say, without a browser."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from scipy import stats

from dashboards import figure_rows, figures, trial_rows
from dashboards.figure_svg import svg
from dashboards.page import Material, read_material, write_page
from dashboards.pictures import pictures
from dashboards.trial_rows import Curve, mean_curve
from search.store import CURVES_FILE, FOREST_FILE
from tests.drawn_sweeps import drawn_sweep


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return read_material(drawn_sweep(tmp_path_factory.mktemp("store"), arms=9))


def words(picture: str) -> list[str]:
    tree = ElementTree.fromstring(picture)
    return ["".join(text.itertext()) for text in tree.iter("{http://www.w3.org/2000/svg}text")]


def curve(*values: float | None, ending: str = "completed") -> Curve:
    return Curve(name="c/0", steps=tuple(range(len(values))), values=values, ending=ending, rule="")


def test_a_mean_with_its_band_is_of_steps_that_every_seed_made() -> None:
    found = mean_curve([curve(0.1, 0.2, None, 0.4, 0.5), curve(0.3, 0.2, 0.3, 0.6, ending="collapsed")])
    assert [point.step for point in found] == [0, 1, 3]
    first = found[0]
    low, high = stats.t.interval(0.95, 1, loc=0.2, scale=stats.sem([0.1, 0.3]))
    assert (first.mean, first.low, first.high) == pytest.approx((0.2, low, high))
    assert (found[1].low, found[1].high) == pytest.approx((0.2, 0.2))


def test_one_seed_has_no_mean() -> None:
    assert mean_curve([curve(0.1, 0.2)]) == ()


def test_both_pictures_are_drawn_with_the_words_of_their_figures(material: Material) -> None:
    drawn = pictures(material.report, material.runs, arms=4, panels=5)
    assert set(drawn) == {FOREST_FILE, CURVES_FILE}
    rows = figure_rows.forest_rows(material.report)[:4]
    said = " ".join(words(drawn[FOREST_FILE]))
    assert all(row.arm in said and row.verdict.split(",")[0][:20] in said for row in rows)
    panels = trial_rows.curve_panels(material.report, material.runs)[:5]
    assert all(panel.arm in " ".join(words(drawn[CURVES_FILE])) for panel in panels)
    assert all("nan" not in picture and len(picture) < 300_000 for picture in drawn.values())


def test_a_value_stands_where_its_axis_says(material: Material) -> None:
    """The mark of each difference, between the ticks to its left and right."""
    row = figure_rows.forest_rows(material.report)[0]
    tree = ElementTree.fromstring(svg([figures.forest([row])], "one"))
    name = "{http://www.w3.org/2000/svg}"
    ticks = {float(text.text or ""): float(text.get("x", "")) for text in tree.iter(f"{name}text") if _is_tick(text)}
    low, high = min(ticks), max(ticks)
    expected = ticks[low] + (100 * row.difference - low) / (high - low) * (ticks[high] - ticks[low])
    marks = [float(mark.get("cx", "")) for mark in tree.iter(f"{name}circle")]
    marks += [_middle(mark) for mark in tree.iter(f"{name}polygon") if _middle(mark) > 0]
    assert min(abs(place - expected) for place in marks) < 0.2


def _is_tick(text: ElementTree.Element) -> bool:
    return text.get("text-anchor") == "middle" and (text.text or "").lstrip("-").replace(".", "").isdigit()


def _middle(mark: ElementTree.Element) -> float:
    across = [float(corner.split(",")[0]) for corner in mark.get("points", "").split()]
    return math.fsum((min(across), max(across))) / 2


def test_the_pictures_lie_beside_the_page_and_not_beside_a_copy_of_it(tmp_path: Path) -> None:
    config = drawn_sweep(tmp_path, arms=3)
    write_page(config, tmp_path / "copy.html")
    assert FOREST_FILE not in config.folder.names()
    write_page(config)
    assert {FOREST_FILE, CURVES_FILE} <= set(config.folder.names())

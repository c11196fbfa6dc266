"""Every figure is one that plotly takes, and draws what its rows say."""

from pathlib import Path

import pytest

from dashboards import figures
from dashboards.figure_rows import ForestRow
from dashboards.page import Material, read_material, sections_of
from tests.drawn_sweeps import drawn_sweep

ROW = ForestRow(
    arm="ünïcode & <b>", noise="linear 0.01", control="control", difference=0.02, low=0.01, high=0.03,
    verdict="ahead where it holds; a collapse risk up to 71 % is not excluded", power="", replicates=3, collapsed=0,
    candidate=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return read_material(drawn_sweep(tmp_path_factory.mktemp("store"), arms=9))


def drawn(material: Material) -> list[figures.Figure]:
    return [figure for section in sections_of(material) for block in section.blocks for figure in block.figures]


def test_plotly_takes_every_figure_and_each_has_a_name_of_its_own(material: Material) -> None:
    from plotly.graph_objects import Figure

    found = drawn(material)
    kinds = {figure.name.split("-")[0] for figure in found}
    assert kinds == {
        *("forest", "collapse", "heat", "curves", "anatomy", "pareto", "receipt", "hours", "cost", "space")
    }
    for figure in found:
        Figure({"data": list(figure.data), "layout": dict(figure.layout)})
        assert figure.alt
        assert figure.height > 0
    assert len({figure.name for figure in found}) == len(found)


def test_names_of_the_user_are_text_and_not_markup() -> None:
    text = " ".join(note["text"] for note in figures.forest([ROW]).layout["annotations"])
    assert "ünïcode &amp; &lt;b&gt;" in text


def test_a_verdict_is_told_by_its_mark_and_in_words() -> None:
    figure = figures.forest([ROW])
    assert figure.data[-1]["marker"]["symbol"] == "circle"
    assert "a collapse risk up to" in figure.layout["annotations"][0]["text"].replace("<br>", " ")


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", ["BLUE", "VERMILLION", "GREEN", "PURPLE", "GREY"])
def test_every_colour_of_a_mark_stands_three_to_one_apart_from_both_grounds(name: str) -> None:
    style = (Path(figures.__file__).parent / "page.css").read_text()
    grounds = [part.split(";")[0].strip() for part in style.split("--ground:")[1:]]
    assert len(grounds) == 2
    for ground in grounds:
        dark, light = sorted((luminance(ground), luminance(getattr(figures, name))))
        assert (light + 0.05) / (dark + 0.05) >= 3, ground

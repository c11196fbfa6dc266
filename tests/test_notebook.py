"""docs/notebook.ipynb as a reader finds it, and run on a sweep that nobody has looked at."""

import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest

from dashboards.frames import load
from tests.benchmarks.notebook import NOTEBOOK, run
from tests.drawn_sweeps import drawn_sweep


def cells_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell: Any) -> str:
    return "\n".join(output.data.get("text/plain", "") for output in cell.outputs if "data" in output)


def test_it_is_short_and_shows_what_it_does() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(notebook.cells) <= 12
    assert NOTEBOOK.stat().st_size < 400_000
    assert all(cell.outputs for cell in cells_of(notebook))
    kinds = {kind for cell in cells_of(notebook) for output in cell.outputs for kind in output.get("data", {})}
    assert {"text/html", "image/png"} <= kinds, "run `make notebook`"
    assert {output.output_type for cell in cells_of(notebook) for output in cell.outputs} == {
        "execute_result",
        "display_data",
    }


@pytest.mark.slow
def test_it_runs_on_any_sweep_and_shows_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLOTLY_RENDERER", "")  # which `run` sets
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    config = drawn_sweep(tmp_path / "runs")
    (tmp_path / "docs").mkdir()
    shutil.copy(NOTEBOOK, tmp_path / "docs")
    ran = cells_of(run(tmp_path / "docs" / NOTEBOOK.name, "plotly_mimetype"))
    outputs = [output for cell in ran for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"execute_result", "display_data"}
    assert "sweep s: 7 arms, 21 trials" in text_of(ran[0])
    beside = next(text_of(cell) for cell in ran if "by_hand" in cell.source)
    for difference in load("s", config.store).comparisons.difference:
        assert beside.count(f"{difference:.6f}") == 2, "by hand, and by the report"
    assert any("entropy_high" in text_of(cell) for cell in ran), "collapsed runs, with what they wrote"
    assert sum("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs) == 2

"""The figures of a page as files for a paper: PNG and SVG, on white, each named by what it shows.

Drawn by plotly's own JavaScript in a Chromium that is there already, which kaleido talks to: nothing is downloaded.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dashboards.figures import Figure
from dashboards.page import Material, sections_of
from spaces.errors import ConfigError

WIDE, PANEL = 860, 440
"""Width in pixels; a PNG has twice as many."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    files: tuple[Path, ...]
    folded: int
    """Figures that are folded away on the page, of which no file was written."""


def export_figures(material: Material, folder: Path) -> Exported:
    """Two files for each figure that the page shows unfolded. Raises ConfigError where nothing can draw or be
    written."""
    _find_browser(folder)
    import kaleido

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--figures {folder}: {error.strerror}; give a folder of yours") from None
    asked, files, folded = list[dict[str, object]](), list[Path](), 0
    for figure, width, hidden in _figures(material):
        folded += hidden
        if hidden:
            continue
        layout = {**figure.layout, "width": width, "paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff"}
        for kind, scale in (("png", 2), ("svg", 1)):
            files.append(folder / f"{figure.name}.{kind}")
            options = {"format": kind, "width": width, "height": figure.height, "scale": scale}
            asked.append({"fig": {"data": figure.data, "layout": layout}, "path": files[-1], "opts": options})
    kaleido.write_fig_from_object_sync(asked)
    return Exported(files=tuple(files), folded=folded)


def _figures(material: Material) -> Iterator[tuple[Figure, int, bool]]:
    for section in sections_of(material):
        for block in section.blocks:
            for figure in block.figures:
                yield figure, WIDE if block.place == "wide" else PANEL, bool(block.summary)


def _find_browser(folder: Path) -> None:
    """Raises ConfigError for what has to be installed."""
    import importlib.util

    if importlib.util.find_spec("kaleido") is None:
        raise ConfigError(f"--figures {folder}: needs kaleido; pip install 'rin-search[figures]'")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None) or os.environ.get("BROWSER_PATH")
    if not found:
        raise ConfigError(
            f"--figures {folder}: needs a Chromium to draw with; apt-get install chromium, or set BROWSER_PATH"
        )
    os.environ.setdefault("BROWSER_PATH", found)

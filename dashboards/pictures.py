"""Two pictures beside the page of a sweep, for MLflow and for slides: what MLflow's own charts cannot draw.

The forest of differences to the control with their intervals, and learning curves with the mean over seeds and its
band: of what the page shows unfolded, by the same rows and figures.
"""

from collections.abc import Sequence

from dashboards import figure_rows, figures, trial_rows
from dashboards.figure_svg import svg
from dashboards.trial_rows import Run
from search.report import StudyReport
from search.store import CURVES_FILE, FOREST_FILE


def pictures(report: StudyReport, runs: Sequence[Run], *, arms: int, panels: int) -> dict[str, str]:
    """SVG by name of file, of at most so many arms; one for which there is nothing to draw is not there."""
    found, name = {}, report.config.name
    rows = figure_rows.forest_rows(report)[:arms]
    if rows:
        found[FOREST_FILE] = svg([figures.forest(rows, report.config.measure)], f"{name}: differences to the control")
    shown = trial_rows.curve_panels(report, runs)
    if shown:
        span = figures.spread(shown)
        title = f"{name}: mean reward over steps; thick: mean over seeds with its 95 % band, dotted: the control"
        found[CURVES_FILE] = svg([figures.mean_curves(panel, span) for panel in shown[:panels]], title)
    return found

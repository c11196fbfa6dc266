"""What the page draws, as rows: asserted here, so that drawing is left with nothing to decide."""

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dashboards.figure_rows import (
    column_edges,
    decision_curve,
    forest_rows,
    heat_cells,
    hours_rows,
    pareto_rows,
    parts_of,
    risk_panels,
    risk_points,
    space_cells,
    untested,
)
from dashboards.figures import curves
from dashboards.trial_rows import anatomies, curve_panels, read_runs, receipt_panels, signal_of
from search.arms import read_arms
from search.report import report_study
from search.tolerance import NoisyRun, boundaries, contours
from spaces.library import SPACES
from tests.drawn_sweeps import drawn_sweep
from tests.written_sweeps import make_arm, study, write_sweep
from trainable.collapse_rules import RULES
from trainable.metrics import METRICS
from trainable.outcome import CollapseVerdict


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    config = drawn_sweep(tmp_path_factory.mktemp("store"))
    report, arms = report_study(config), read_arms(config)
    return config, report, arms, read_runs(config, arms, report)


def test_the_forest_has_each_arm_once_with_its_verdict_its_power_and_an_interval_that_holds_it(small) -> None:
    _, report, _, _ = small
    rows = forest_rows(report)
    assert sorted(row.arm for row in rows) == [f"c{number:02d}" for number in range(1, 7)]
    assert rows[0].candidate
    assert [row.difference for row in rows[1:]] == sorted((row.difference for row in rows[1:]), reverse=True)
    for row in rows:
        assert row.low is not None
        assert row.high is not None
        assert row.low < row.difference < row.high
        assert row.verdict
        assert row.power.startswith("3 pairs see ")
        assert row.control == "control"


def test_two_pairs_have_no_interval_and_no_power(tmp_path: Path) -> None:
    config = study(tmp_path, replicates=2)
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "a")], {"control": [200, 210], "a": [220, 228]})
    (row,) = forest_rows(report_study(config))
    assert (row.low, row.high, row.power) == (None, None, "")
    assert row.difference == pytest.approx(0.0475)


def test_risk_points_count_every_run_once_and_hold_the_exact_interval() -> None:
    few = risk_points([(0.01, False), (0.01, False), (0.01, True), (0.05, True)])
    assert [(p.x, p.runs, p.collapsed) for p in few] == [(pytest.approx(0.01), 3, 1), (pytest.approx(0.05), 1, 1)]
    assert (few[0].low, few[0].high) == (pytest.approx(0.00840, abs=1e-5), pytest.approx(0.90570, abs=1e-5))
    draw = random.Random(1)
    many = [(10 ** draw.uniform(-3, -1), draw.random() < 0.5) for _ in range(100)]
    points = risk_points(many)
    assert len(points) == 6
    assert sum(p.runs for p in points) == 100
    assert sum(p.collapsed for p in points) == sum(bad for _, bad in many)
    assert all(a.high_x < b.low_x for a, b in pairwise(points))


@pytest.mark.parametrize("broken", [(0, 0, 3), (0, 0, 0), (3, 3, 3), (0, 1, 2)])
def test_the_band_of_collapse_risk_passes_through_the_interval_that_the_report_tells(broken: tuple[int, ...]) -> None:
    """`broken`: runs of three at each sigma."""
    runs = [(sigma, n < bad) for sigma, bad in zip((0.01, 0.02, 0.05), broken, strict=True) for n in range(3)]
    (told,) = boundaries(NoisyRun(mode="W4A4", kind="linear", sigma=s, collapsed=c) for s, c in runs)
    tenth, half = contours(runs, (0.1, 0.5))
    assert (half.low, half.high) == (told.low_50, told.high_50)
    assert (tenth.low, tenth.high) == (pytest.approx(told.low_10), pytest.approx(told.high_10))
    assert half.sigma == told.sigma_50


def test_collapse_risk_is_told_per_kind_over_sigma_and_over_dose(small) -> None:
    _, report, arms, _ = small
    panels = risk_panels(report, arms)
    assert [(p.mode, p.kind, p.axis) for p in panels] == [
        *(("W4A4", kind, "sigma") for kind in ("linear", "rmsnorm")),
        *(("W4A4", kind, "dose") for kind in ("linear", "rmsnorm")),
    ]
    assert all(sum(point.runs for point in panel.points) == 9 for panel in panels)
    assert panels[0].words == report.tolerance[0].words()


def test_heat_cells_hold_every_run_with_noise_once(small) -> None:
    _, report, _, _ = small
    cells = heat_cells(report)
    assert sum(cell.runs for cell in cells) == 18
    assert sum(cell.collapsed for cell in cells) == sum(row.collapsed for row in report.arms)
    assert {cell.target for cell in cells} == {"linear, all layers", "rmsnorm, all layers"}
    alone = next(cell for cell in cells if cell.column == 0)
    row = next(row for row in report.arms if row.config.noise.sigma_start == alone.low)
    assert alone.difference == row.difference


def test_columns_hold_every_sigma() -> None:
    sigmas = [0.001 * number for number in range(1, 30)]
    edges = column_edges(sigmas)
    assert len(edges) == 6
    assert all(sum(low <= sigma <= high for low, high in edges) == 1 for sigma in sigmas)


def test_the_front_and_the_hours_are_those_of_the_report(small) -> None:
    _, report, arms, _ = small
    rows = pareto_rows(report, arms)
    assert [row.arm for row in rows] == [row.arm for row in report.arms]
    assert not any(row.front and row.collapsed for row in rows)
    assert any(row.front for row in rows)
    hours = {row.what: row.hours for row in hours_rows(report)}
    assert hours["all"] == pytest.approx(report.ledger.hours)
    assert hours["in trials that collapsed"] == pytest.approx(report.ledger.collapsed)


def test_the_cost_of_a_decision_begins_where_the_sweep_is_and_only_narrows(small) -> None:
    _, report, arms, _ = small
    curve = decision_curve(report, arms)
    assert curve is not None
    assert report.candidate is not None
    assert curve.arm == report.candidate.arm
    seen = [point for point in curve.points if not point.projected]
    judged = report.candidate.corrected
    assert judged is not None
    assert seen[-1].half_width == pytest.approx((judged.high - judged.low) / 2)
    widths = [point.half_width for point in curve.points if point.projected]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("name", SPACES)
def test_parts_of_a_space_hold_each_of_its_values_once(name: str) -> None:
    for dimension in SPACES[name].dimensions:
        parts, domain = parts_of(dimension), dimension.domain
        values = list(domain.options) if domain.kind == "choice" else [domain.low, domain.high]
        for value in values:
            assert sum(inside(value) for _, inside in parts) == 1, (dimension.name, value)


def test_what_nobody_tried_is_named(small) -> None:
    config, _, arms, _ = small
    cells = space_cells(config, arms)
    assert sum(cell.tried for cell in cells if cell.dimension == "noise.modules") == 6
    assert "0.005 to 0.00824" in untested(cells)["noise.sigma_start|rmsnorm"]
    assert all(cell.tried for cell in cells if cell.label not in untested(cells).get(cell.dimension, []))


def test_a_learning_curve_has_every_seed_its_control_behind_it_and_the_stages_of_its_noise(small) -> None:
    _, report, _, runs = small
    panels = {panel.arm: panel for panel in curve_panels(report, runs)}
    assert next(iter(panels.values())).candidate
    assert {len(panel.seeds) for panel in panels.values()} == {3}
    assert panels["c01"].behind == panels["control"].seeds
    assert panels["control"].behind == ()
    assert panels["control"].stages == ()
    stages = panels["c01"].stages
    assert stages[0].sigma == config_of(report, "c01").noise.sigma_start
    assert stages[-1].last == 28
    broken = [curve for curve in panels["c06"].seeds if curve.ending == "collapsed"]
    assert all(curve.alarms == () for curve in broken), "the rule that ended a trial has its cross"
    assert broken
    assert all(curve.rule == "entropy_high" and curve.steps[-1] < 28 for curve in broken)


def test_an_alarm_is_where_a_rule_begins_to_speak_and_the_trial_goes_on(small) -> None:
    _, report, _, runs = small
    spoke = {3: "entropy_high", 4: "entropy_high", 5: "gibberish", 9: "entropy_high"}
    told = [
        replace(run, reports=[replace(r, verdict=replace(r.verdict, rule=spoke.get(r.step, ""))) for r in run.reports])
        if run.name == "control/0"
        else run
        for run in runs
    ]
    panel = next(panel for panel in curve_panels(report, told) if panel.arm == "control")
    alarmed, *others = panel.seeds
    assert alarmed.alarms == ((3, "entropy_high"), (5, "gibberish"), (9, "entropy_high"))
    assert all(curve.alarms == () for curve in others)
    rings = [
        trace for trace in curves(panel, (0.0, 1.0)).data if trace.get("marker", {}).get("symbol") == "circle-open"
    ]
    assert [trace["x"] for trace in rings] == [[3, 5, 9]]


def config_of(report, arm: str):
    return next(row.config for row in report.arms if row.arm == arm)


def test_the_anatomy_of_a_collapse_is_about_the_step_in_which_its_rule_first_held(small) -> None:
    _, report, _, runs = small
    found = anatomies(report, runs)
    assert len(found) == sum(row.collapsed for row in report.arms)
    for one in found:
        now = dict(zip(one.steps, one.values, strict=True))
        assert one.signal == "gen/entropy"
        assert one.limit == pytest.approx(3 * 0.612)
        assert now[one.first - 1] < one.limit < now[one.first]
        assert [moment.label for moment in one.moments] == ["t - 1", "t", "t + 1"]
        assert one.moments[1].step == one.first
        assert one.moments[0].samples[0].completion == "579"
        assert one.moments[1].samples[0].completion == "+7<?9 zß"


def test_a_collapse_by_a_number_that_is_none_names_its_signal_and_leaves_a_gap(small) -> None:
    _, report, _, runs = small
    run = next(run for run in runs if run.collapsed)
    verdict = CollapseVerdict(collapsed=True, rule="nonfinite", evidence="grpo/loss is nan")
    last = replace(run.reports[-1], verdict=verdict, signals={**run.reports[-1].signals, "grpo/loss": math.nan})
    state = replace(run.state, rule="nonfinite")
    (found,) = anatomies(report, [replace(run, reports=[*run.reports[:-1], last], state=state)])
    assert (found.signal, found.limit, found.first) == ("grpo/loss", None, last.step)
    assert found.values[-1] is None
    json.dumps([moment.signals for moment in found.moments], allow_nan=False)


@pytest.mark.parametrize("rule", [*RULES, "filter_rejection"])
def test_every_rule_has_a_signal_that_is_tracked(rule: str) -> None:
    assert signal_of(rule, "") in METRICS


def test_the_receipt_shows_the_candidate_and_the_other_kinds_layer_by_layer(small) -> None:
    _, report, _, _ = small
    panels = receipt_panels(report)
    assert [panel.kind for panel in panels if panel.candidate] == ["rmsnorm"]
    assert sorted(panel.kind for panel in panels) == ["linear", "rmsnorm"]
    for panel in panels:
        assert {cell.layer for cell in panel.cells} == set(range(8))
        assert all(0 < cell.applied <= cell.nominal for cell in panel.cells)

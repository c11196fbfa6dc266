"""Rows of the figures that compare arms: the forest, collapse risk, heat map, Pareto front, hours, what nobody tried.

Pure functions from a report and its arms to records; `figures.py` draws them, `trial_rows.py` has those that look into
trials. Accuracies and differences are shares. NaN rule: what is not finite, or open on a side, is None.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from scipy import stats

from dashboards.tables import finite
from dashboards.trial_rows import ordered
from search.arms import Arm, replicates_of
from search.confirm import Confirmation
from search.objectives import pareto_front
from search.power import detectable_difference, half_width, planned_error
from search.replicates import MIN_REPLICATES
from search.report import MARGIN, ArmReport, StudyReport, noisy_runs
from search.statistics import compare_arms
from search.store import StudyConfig
from search.tolerance import contours
from spaces.config import TrialConfig
from spaces.library import Choice, Dimension, Float, Int
from spaces.naming import describe_noise

BINS = 6
"""Of an axis with more values than that."""
CONTOUR_SHARES = tuple(round(0.02 + 0.04 * number, 2) for number in range(25))


# --- forest -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestRow:
    """Example: ForestRow(arm="c03", noise="rmsnorm 0.01 -> 0.001", control="control", difference=0.012, low=-0.02,
    high=0.044, verdict="undecided, needs about 7 more replicates", power="sees 2.9 points", replicates=3, ...)"""

    arm: str
    noise: str
    control: str
    difference: float
    low: float | None
    high: float | None
    """Corrected for the arms that share the control; None where the spread is not known."""
    verdict: str
    power: str
    """The smallest difference that so many replicates see with 80 % power."""
    replicates: int
    collapsed: int
    candidate: bool


def forest_rows(report: StudyReport) -> tuple[ForestRow, ...]:
    """Arms that can be compared with their control: the candidate, then by falling difference."""
    rows = []
    for row in ordered(report.arms):
        seen = row.corrected
        if seen is None or seen.replicates == 0 or finite(seen.difference) is None:
            continue
        known = seen.replicates >= MIN_REPLICATES
        rows.append(
            ForestRow(
                arm=row.arm,
                noise=describe_noise(row.config),
                control=row.control,
                difference=seen.difference,
                low=finite(seen.low) if known else None,
                high=finite(seen.high) if known else None,
                verdict=row.verdict,
                power=_power(row),
                replicates=seen.replicates,
                collapsed=row.collapsed,
                candidate=row.candidate,
            )
        )
    return tuple(rows)


def confirmed_row(report: StudyReport, state: Confirmation) -> ForestRow | None:
    """What the confirmation of an arm of this sweep found, beside what the sweep saw; None before its first look."""
    seen, arm = state.comparison, next((row for row in report.arms if row.arm == state.winner), None)
    low, high = finite(seen.low), finite(seen.high)
    if arm is None or state.finding is None or low is None or high is None:
        return None
    return ForestRow(
        arm=f"{state.winner}, its confirmation",
        noise=describe_noise(arm.config),
        control=state.control,
        difference=seen.difference,
        low=low,
        high=high,
        verdict=state.finding.words(),
        power=f"with fresh seeds ({state.pairs}), on questions that chose nothing",
        replicates=seen.replicates,
        collapsed=state.finding.collapsed,
        candidate=False,
    )


def _power(row: ArmReport) -> str:
    seen = row.corrected
    if seen is None or seen.sd is None or seen.replicates < MIN_REPLICATES:
        return ""
    confidence = 1 - seen.level / max(row.family, 1)
    points = 100 * detectable_difference(seen.sd, seen.replicates, confidence=confidence)
    return f"{seen.replicates} pairs see {points:.1f} points or more (80 % power)"


# --- collapse risk ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskPoint:
    """Runs of one sigma, or of a range of sigmas. Example: RiskPoint(low_x=0.01, high_x=0.02, x=0.014, runs=6,
    collapsed=1, share=0.17, low=0.004, high=0.64)"""

    low_x: float
    high_x: float
    x: float
    runs: int
    collapsed: int
    share: float
    low: float
    high: float
    """Exact 95 % interval (Clopper & Pearson)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskContour:
    """Where a share of the runs collapses. Example: RiskContour(share=0.1, x=0.012, low=0.003, high=0.018)"""

    share: float
    x: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskPanel:
    """How often runs collapse over sigma, or over the applied dose, of one mode and module kind."""

    mode: str
    kind: str
    axis: str
    """`sigma` or `dose`."""
    points: tuple[RiskPoint, ...]
    contours: tuple[RiskContour, ...]
    words: str


def risk_panels(report: StudyReport, arms: Sequence[Arm]) -> tuple[RiskPanel, ...]:
    """By sigma those that share an absolute one on all layers (`noisy_runs`); by dose all, each at its arm's mean."""
    by_sigma: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    by_dose: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    for run in noisy_runs(arms):
        by_sigma[run.mode, run.kind].append((run.sigma, run.collapsed))
    for row in report.arms:
        if row.dose is not None and math.isfinite(row.dose) and row.dose > 0:
            place = row.config.quant.mode, "+".join(row.config.noise.modules)
            ended = (state.outcome for state in row.trials if state.status in ("completed", "collapsed"))
            by_dose[place] += [(row.dose, outcome.collapsed) for outcome in ended if outcome is not None]
    words = {(boundary.mode, boundary.kind): boundary.words() for boundary in report.tolerance}
    panels = [_risk_panel(*key, "sigma", runs, words.get(key, "")) for key, runs in sorted(by_sigma.items())]
    return (*panels, *(_risk_panel(*key, "dose", runs, "") for key, runs in sorted(by_dose.items())))


def _risk_panel(mode: str, kind: str, axis: str, runs: Sequence[tuple[float, bool]], words: str) -> RiskPanel:
    found = contours(runs, CONTOUR_SHARES)
    return RiskPanel(
        mode=mode,
        kind=kind,
        axis=axis,
        points=risk_points(runs),
        contours=tuple(
            RiskContour(share=one.share, x=one.sigma, low=one.low or None, high=finite(one.high)) for one in found
        ),
        words=words,
    )


def risk_points(runs: Iterable[tuple[float, bool]]) -> tuple[RiskPoint, ...]:
    """A point per place that was tried; where there are more than BINS, of ranges with about as many runs each."""
    seen = sorted(runs)
    places = sorted({x for x, _ in seen})
    if len(places) <= BINS:
        groups = [[run for run in seen if run[0] == x] for x in places]
    else:
        size = len(places) / BINS
        ranges = [places[round(n * size) : round((n + 1) * size)] for n in range(BINS)]
        groups = [[run for run in seen if inside[0] <= run[0] <= inside[-1]] for inside in ranges]
    return tuple(_risk_point(group) for group in groups)


def _risk_point(group: Sequence[tuple[float, bool]]) -> RiskPoint:
    collapsed, xs = sum(bad for _, bad in group), [x for x, _ in group]
    interval = stats.binomtest(collapsed, len(group)).proportion_ci(0.95, method="exact")
    return RiskPoint(
        low_x=xs[0],
        high_x=xs[-1],
        x=math.exp(fmean(map(math.log, xs))),
        runs=len(group),
        collapsed=collapsed,
        share=collapsed / len(group),
        low=float(interval.low),
        high=float(interval.high),
    )


# --- heat map ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatCell:
    """Arms of one target and a range of sigma. Example: HeatCell(target="linear, all layers", column=2, low=0.01,
    high=0.02, arms=3, runs=9, collapsed=4, difference=-0.021)"""

    target: str
    column: int
    low: float
    high: float
    """Of sigma_start, of the whole column."""
    arms: int
    runs: int
    collapsed: int
    difference: float | None
    """To the control, mean over arms; None where nothing can be compared."""


def heat_cells(report: StudyReport) -> tuple[HeatCell, ...]:
    """Target (modules, layers, precision) by sigma; only cells in which something has ended."""
    noisy = [row for row in report.arms if row.config.noise.sigma_start > 0 and row.replicates]
    sigmas = sorted({row.config.noise.sigma_start for row in noisy})
    edges = column_edges(sigmas)
    cells: dict[tuple[str, int], list[ArmReport]] = defaultdict(list)
    for row in noisy:
        column = next(n for n, (_, high) in enumerate(edges) if row.config.noise.sigma_start <= high)
        cells[target_of(row.config), column].append(row)
    return tuple(
        HeatCell(
            target=target,
            column=column,
            low=edges[column][0],
            high=edges[column][1],
            arms=len(rows),
            runs=sum(row.replicates for row in rows),
            collapsed=sum(row.collapsed for row in rows),
            difference=_mean([row.difference for row in rows]),
        )
        for (target, column), rows in sorted(cells.items())
    )


def column_edges(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """A column per sigma, or BINS ranges with about as many sigmas each."""
    if len(sigmas) <= BINS:
        return [(sigma, sigma) for sigma in sigmas]
    size = len(sigmas) / BINS
    ranges = [sigmas[round(n * size) : round((n + 1) * size)] for n in range(BINS)]
    return [(inside[0], inside[-1]) for inside in ranges]


def target_of(config: TrialConfig) -> str:
    """`linear, all layers`; the precision where it is not W4A4, the unit of sigma where it is not absolute."""
    noise = config.noise
    if noise.zones or noise.layer_multipliers:
        layers = "by layer"
    elif isinstance(noise.layers, str):
        layers = f"{noise.layers} layers"
    else:
        layers = f"layers {','.join(map(str, noise.layers))}"
    more = "" if config.quant.mode == "W4A4" else f", {config.quant.mode}"
    more += "" if noise.scale == "absolute" else f", sigma in {noise.scale}"
    return f"{'+'.join(noise.modules)}, {layers}{more}"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if known else None


# --- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoRow:
    """Example: ParetoRow(arm="c03", noise="linear 0.01 -> 0.001", hours=0.11, score=0.62, collapsed=0.33, front=True,
    control=False)"""

    arm: str
    noise: str
    hours: float
    """Of one run, mean."""
    score: float
    collapsed: float
    """Share of the runs."""
    front: bool
    """No arm beats it in one without losing in the other; one that collapses is never in front."""
    control: bool


def pareto_rows(report: StudyReport, arms: Sequence[Arm]) -> tuple[ParetoRow, ...]:
    front = {arm.name for arm in pareto_front(arms, (report.config.measure, "hours"), report.config.each)}
    by_name = {arm.name: arm for arm in arms}
    return tuple(
        ParetoRow(
            arm=row.arm,
            noise=describe_noise(row.config),
            hours=fmean(outcome.seconds / 3600 for outcome in by_name[row.arm].results.values()),
            score=row.score,
            collapsed=row.collapsed / row.replicates,
            front=row.arm in front,
            control=row.origin == "control",
        )
        for row in report.arms
        if row.score is not None and by_name[row.arm].results
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HoursRow:
    """Example: HoursRow(what="in trials that collapsed", hours=0.02, share=0.18)"""

    what: str
    hours: float
    share: float
    """Of all hours."""


def hours_rows(report: StudyReport) -> tuple[HoursRow, ...]:
    """All of them, then those that bought no answer by themselves; one hour may be in two of these."""
    ledger = report.ledger
    parts = {
        "all": ledger.hours,
        "of controls": sum(row.hours for row in report.arms if row.origin == "control"),
        "in trials that collapsed": ledger.collapsed,
        "repeated after faults": ledger.repeated,
        "generating groups that the filter threw away": ledger.filtered,
    }
    return tuple(HoursRow(what=what, hours=hours, share=hours / (ledger.hours or 1.0)) for what, hours in parts.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionPoint:
    """Example: DecisionPoint(pairs=5, hours=0.6, half_width=0.017, projected=False)"""

    pairs: int
    hours: float
    """Of both arms, for so many pairs."""
    half_width: float
    """Of the interval of the difference; a share."""
    projected: bool
    """At the present spread; else seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionCurve:
    """What a narrower answer costs: the candidate, or the arm with the most pairs, against its control."""

    arm: str
    control: str
    difference: float
    points: tuple[DecisionPoint, ...]


def decision_curve(report: StudyReport, arms: Sequence[Arm]) -> DecisionCurve | None:
    """None below three pairs: nobody knows the spread."""
    rows = [row for row in report.arms if row.corrected is not None and row.corrected.replicates >= MIN_REPLICATES]
    if not rows:
        return None
    row = min(rows, key=lambda row: (not row.candidate, -(row.corrected.replicates if row.corrected else 0)))
    by_name = {arm.name: arm for arm in arms}
    treated, plain = (
        {run.seed: run for run in replicates_of(report.config, by_name[name])} for name in (row.arm, row.control)
    )
    seeds = sorted(treated.keys() & plain.keys())
    per_pair = sum(
        report.ledger.arms.get(name, 0.0) / len(runs) for name, runs in ((row.arm, treated), (row.control, plain))
    )
    points, level = [], 0.05 / max(row.family, 1)
    for count in range(MIN_REPLICATES, len(seeds) + 1):
        seen = compare_arms([treated[s] for s in seeds[:count]], [plain[s] for s in seeds[:count]], margin=MARGIN)
        if seen.primary.se is not None and seen.primary.df is not None:
            width = half_width(seen.primary.se, seen.primary.df, level)
            points.append(DecisionPoint(pairs=count, hours=count * per_pair, half_width=width, projected=False))
    now = row.corrected
    assert now is not None
    if now.sd is not None and now.se is not None:
        shared = max(0.0, now.se**2 - now.sd**2 / now.replicates)
        for count in range(len(seeds) + 1, max(len(seeds) + 6, 21)):
            width = half_width(*planned_error(now.sd, shared, count), level)
            points.append(DecisionPoint(pairs=count, hours=count * per_pair, half_width=width, projected=True))
    if not points:
        return None
    return DecisionCurve(arm=row.arm, control=row.control, difference=now.difference, points=tuple(points))


# --- what was never tested --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceCell:
    """A part of a dimension. Example: SpaceCell(dimension="noise.sigma_start|linear", label="0.002 to 0.003", order=0,
    tried=0, collapsed=0)"""

    dimension: str
    label: str
    order: int
    tried: int
    """Configurations with an outcome there; 0 = never tested."""
    collapsed: int
    """Of those, with a collapse."""


def space_cells(config: StudyConfig, arms: Sequence[Arm]) -> tuple[SpaceCell, ...]:
    """Every dimension of the space in parts, with what was tried in each, points and evidence of other sweeps aside."""
    drawn = [arm for arm in arms if arm.params and arm.results]
    cells = []
    for dimension in config.space.dimensions:
        values = [(arm.params[dimension.name], arm) for arm in drawn if dimension.name in arm.params]
        for order, (label, inside) in enumerate(parts_of(dimension)):
            there = [arm for value, arm in values if inside(value)]
            broke = sum(any(outcome.collapsed for outcome in arm.results.values()) for arm in there)
            cells.append(
                SpaceCell(dimension=dimension.name, label=label, order=order, tried=len(there), collapsed=broke)
            )
    return tuple(cells)


def parts_of(dimension: Dimension) -> list[tuple[str, Callable[[Any], bool]]]:
    """(label, whether a value lies there): each choice, each whole number of a short range, or BINS ranges."""
    domain = dimension.domain
    if isinstance(domain, Choice):
        return [(label, lambda value, label=label: value == label) for label in domain.options]  # type: ignore[misc]
    if isinstance(domain, Int) and domain.high - domain.low < 2 * BINS:
        numbers = range(domain.low, domain.high + 1)
        return [(str(number), lambda value, number=number: value == number) for number in numbers]  # type: ignore[misc]
    edges = _edges(domain)
    last = len(edges) - 2

    def inside(number: int) -> Callable[[Any], bool]:
        low, high = edges[number], edges[number + 1]
        return lambda value: (number == 0 or low <= value) and (number == last or value < high)

    return [(f"{edges[n]:.3g} to {edges[n + 1]:.3g}", inside(n)) for n in range(BINS)]


def _edges(domain: Float | Int) -> list[float]:
    low, high = float(domain.low), float(domain.high)
    shares = [number / BINS for number in range(BINS + 1)]
    if isinstance(domain, Float) and domain.log:
        return [low * (high / low) ** share for share in shares]
    return [low + (high - low) * share for share in shares]


def untested(cells: Iterable[SpaceCell]) -> Mapping[str, list[str]]:
    """Dimension -> its parts in which nothing was tried."""
    holes: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        if cell.tried == 0:
            holes[cell.dimension].append(cell.label)
    return holes

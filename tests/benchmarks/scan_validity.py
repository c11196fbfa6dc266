"""Does a scan of quantisation errors say which layers matter in training? Every score against what was measured.

    python -m tests.benchmarks.scan_validity            part of `make science`; goes on where it was stopped
    python -m tests.benchmarks.scan_validity --kept     the runs of docs/srdd-validity.json with today's scores

Measured (`scan_runs.py`): what each layer and each of the plan's zones in 16 bits changes in accuracy after training,
against the control with the same seeds; the sigma each zone tolerates, and what sigma 0.05 in it costs.

A rank correlation with effects that differ by chance alone is one of noise. So it is said first whether layers can be
told apart at all: layers by seeds, a block design in which the control cancels out, with an F test and a permutation
test of layers within seeds. From its mean squares follows the share of the variance of a layer's mean that is the
layer's own (`reliability`), whose root bounds the correlation that any score can be expected to show.

Then Spearman's correlation of each score with each effect. p is exact, over all orders of the layers (8! or 5!); its
correction for the number of scores is the exact distribution of the largest |rho| among them (Westfall & Young 1993),
which takes into account that scores go together. The interval is a bootstrap over seeds: how far the number hangs on
the seeds that were run. It tends to 0, because resampling adds noise, and does not say what other models would show.
"""

import argparse
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from search.statistics import Comparison, adjust, compare
from search.tolerance import Boundary, NoisyRun, boundaries
from spaces.config import BaseRecipe
from spaces.errors import ConfigError
from spaces.reading import read_config
from tests.benchmarks.scan_runs import (
    CONTROL,
    COST_SIGMA,
    FILTERED,
    Row,
    Runner,
    lift_arm,
    measure,
    noise_arm,
    rows_file,
)
from tests.benchmarks.scan_statistics import (
    DRAWS,
    Array,
    Correlation,
    correlations,
    over_seeds,
    smallest_seen,
    smallest_seen_corrected,
    spread_of,
)
from trainable.noise import ZONES, zone_layers
from trainable.policy.loading import load_policy
from trainable.rollout import encode_prompts
from trainable.scan import SCORES, SITES, Scan, as_tree, score
from trainable.sensitivity import with_sensitivities
from trainable.srdd import scan_policy
from trainable.tasks.table import build_task

DOCS = Path(__file__).parents[2] / "docs"
PROMPTS = 64
"""Of the scan."""
MEASURES = {"deployed": "accuracy", "unquantised": "accuracy_bf16"}
"""Words of the page -> fields of a row."""


# --- what was measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Of several units on accuracy after training, paired by seed with the control."""

    units: tuple[str, ...]
    treated: Array
    """[S seeds, U units]"""
    control: Array
    """[S]"""

    @property
    def table(self) -> Array:
        return np.asarray(self.treated - self.control[:, None])

    @property
    def means(self) -> Array:
        return np.asarray(self.table.mean(axis=0))

    def comparisons(self) -> dict[str, Comparison]:
        """Of every unit with the control, corrected for their number."""
        control = self.control.tolist()
        return adjust({unit: compare(self.treated[:, i].tolist(), control) for i, unit in enumerate(self.units)})


def effects_of(rows: Sequence[Row], arms: Mapping[str, str], control: str) -> dict[str, Effect]:
    """By MEASURES, of the arm of each unit, over the seeds that all of them have. Raises ConfigError where those are
    fewer than two."""
    by_run = {(row.arm, row.seed): row for row in rows}
    whole = [s for s in sorted({row.seed for row in rows}) if all((a, s) in by_run for a in (control, *arms.values()))]
    if len(whole) < 2:
        raise ConfigError(f"{control} and its arms: {len(whole)} whole seeds are there, two are needed; run more")

    def accuracies(arm: str, field: str) -> list[float]:
        return [getattr(by_run[arm, seed], field) for seed in whole]

    return {
        name: Effect(
            units=tuple(arms),
            treated=np.array([accuracies(arm, field) for arm in arms.values()]).T,
            control=np.array(accuracies(control, field)),
        )
        for name, field in MEASURES.items()
    }


def zone_boundaries(rows: Sequence[Row]) -> dict[str, Boundary]:
    """Of every zone: all runs with noise in it alone."""
    runs = [
        NoisyRun(mode="w4a4", kind=zone, sigma=row.sigma, collapsed=row.outcome == "collapsed")
        for zone in ZONES
        for row in rows
        if row.sigma > 0 and row.arm == noise_arm(zone, row.sigma)
    ]
    return {boundary.kind: boundary for boundary in boundaries(runs)}


def tolerance_draws(found: Mapping[str, Boundary], seed: int = 0) -> tuple[Array, Array]:
    """Log of the tolerated sigma of each zone: the middle of its interval, and draws [DRAWS, zones] from a normal
    distribution with that interval. An open end counts as ten times the other."""
    ends = np.array([[b.low_50 or b.high_50 / 10, b.high_50] for b in found.values()])
    ends[:, 1] = np.where(np.isinf(ends[:, 1]), ends[:, 0] * 10, ends[:, 1])
    middle = np.log(ends).mean(axis=1)
    sd = np.diff(np.log(ends), axis=1)[:, 0] / (2 * stats.norm.ppf(0.98))
    return middle, middle + sd * np.random.default_rng(seed).normal(size=(DRAWS, len(middle)))


def of_zones(scores: Mapping[str, Sequence[float]], depth: int) -> dict[str, list[float]]:
    """A zone's score: the mean of its layers'."""
    return {
        kind: [float(np.mean([values[layer] for layer in zone_layers(zone, depth)])) for zone in ZONES]
        for kind, values in scores.items()
    }


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that the page says, from runs and a scan's scores."""

    depth: int
    scores: Mapping[str, Sequence[float]]
    layers: Mapping[str, Effect]
    zones: Mapping[str, Effect]
    cost: Mapping[str, Effect]
    """Of sigma COST_SIGMA in a zone, against the control with the same filter."""
    boundaries: Mapping[str, Boundary]
    start: Mapping[str, float]
    """Accuracy before training with a layer in 16 bits, minus the control's: one base, no seeds."""
    rows: Sequence[Row]

    def held_against(self) -> dict[str, tuple[Mapping[str, Sequence[float]], Array, Array]]:
        """Name of an effect -> scores of its units, the effect, its bootstrap draws."""
        by_zone = of_zones(self.scores, self.depth)
        found: dict[str, tuple[Mapping[str, Sequence[float]], Array, Array]] = {
            f"layer lifted, {name}": (self.scores, effect.means, over_seeds(effect.table))
            for name, effect in self.layers.items()
        }
        before = np.array(list(self.start.values()))
        found["layer lifted, before training"] = (self.scores, before, before[None])
        found |= {
            f"zone lifted, {name}": (by_zone, effect.means, over_seeds(effect.table))
            for name, effect in self.zones.items()
        }
        found["sigma a zone tolerates"] = (by_zone, *tolerance_draws(self.boundaries))
        found |= {
            f"sigma {COST_SIGMA:g} in a zone, {name}": (by_zone, effect.means, over_seeds(effect.table))
            for name, effect in self.cost.items()
        }
        return found


def findings(rows: Sequence[Row], depth: int, scores: Mapping[str, Sequence[float]]) -> Findings:
    """Raises ConfigError where not two whole seeds are there."""
    layers = {str(layer): lift_arm([layer]) for layer in range(depth)}
    zones = {zone: lift_arm(zone_layers(zone, depth)) for zone in ZONES}
    start = {row.arm: row.accuracy_start for row in rows}
    return Findings(
        depth=depth,
        scores=scores,
        layers=effects_of(rows, layers, CONTROL),
        zones=effects_of(rows, zones, CONTROL),
        cost=effects_of(rows, {zone: noise_arm(zone, COST_SIGMA) for zone in ZONES}, FILTERED),
        boundaries={zone: zone_boundaries(rows)[zone] for zone in ZONES},
        start={layer: start[arm] - start[CONTROL] for layer, arm in layers.items()},
        rows=rows,
    )


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def cells(effect: Effect) -> dict[str, str]:
    return {
        unit: f"{points(c.difference)} [{points(c.low)}, {points(c.high)}]{'' if c.verdict == 'undecided' else ' *'}"
        for unit, c in effect.comparisons().items()
    }


def page(found: Findings, scan: str) -> str:
    seconds = sum(row.seconds for row in found.rows)
    text = [
        "# Does the scan say which layers matter?",
        "",
        "Made by `make science` on the embedded model (W4A4 MXFP4); method and statistics: "
        "`tests/benchmarks/scan_validity.py`. Accuracies are greedy on 2,048 questions after 29 steps, in points "
        f"against the control with the same seed. Runs: {len(found.rows)}, {seconds / 60:.0f} minutes of one thread, "
        f"code {', '.join(sorted({row.code for row in found.rows}))}. {scan}",
        "",
        *_told_apart(found),
        *_layers(found),
        *_zones(found),
        *_correlated(found),
        *_seen(found),
        *_claim(found),
    ]
    return "\n".join(text) + "\n"


def _told_apart(found: Findings) -> list[str]:
    lines = [
        "## First: can layers be told apart at all?",
        "",
        'Each seed trains every arm, so seeds are blocks. F and permutation test (labels within seeds) of "all do the '
        'same"; standard deviations in points; reliability is the share of the variance of the means that belongs '
        "to the layers and not to chance. Its root is the most that any score's correlation can be expected to reach.",
        "",
        "| effect | units | seeds | F | p | p, permuted | sd between units | sd of one run | reliability |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = {"layer lifted": found.layers, "zone lifted": found.zones, f"sigma {COST_SIGMA:g} in a zone": found.cost}
    for what, effects in groups.items():
        for name, effect in effects.items():
            s = spread_of(effect.table)
            lines.append(
                f"| {what}, {name} | {s.units} | {s.seeds} | {s.f:.2f} | {chance(s.p_f)} | {chance(s.p)} | "
                f"{100 * s.sd_units:.1f} | {100 * s.sd_seeds:.1f} | {s.reliability:.2f} |"
            )
    return [*lines, ""]


def _layers(found: Findings) -> list[str]:
    deployed, plain = (cells(found.layers[name]) for name in MEASURES)
    both = ", ".join(f"{zone} {_span(zone_layers(zone, found.depth))}" for zone in ZONES)
    return [
        "## What a layer in 16 bits is worth",
        "",
        "Simultaneous 95 % intervals (Bonferroni over layers; paired by seed); * = not 0 (Holm). *Deployed*: the "
        "layer stays in 16 bits; *unquantised*: the master weights that were learned; *before training*: what the "
        f"lift does to the base. Zones: {both}.",
        "",
        "| layer | deployed | unquantised | before training |",
        "|---|---|---|---|",
        *(f"| {unit} | {deployed[unit]} | {plain[unit]} | {points(found.start[unit])} |" for unit in deployed),
        "",
    ]


def _span(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _zones(found: Findings) -> list[str]:
    lift, lift_plain = (cells(found.zones[name]) for name in MEASURES)
    cost, cost_plain = (cells(found.cost[name]) for name in MEASURES)
    return [
        "## Zones",
        "",
        "*Tolerated*: where half the runs with noise in that zone's linear layers alone collapse (`rin report`'s own "
        "boundary; up-and-down runs; the plan's filter). A zone with more layers gets more noise in all, and more is "
        f"lifted. *Cost*: of sigma {COST_SIGMA:g}, collapsed runs with the accuracy at their stop.",
        "",
        "| zone | layers | lifted, deployed | unquantised | tolerated | cost, deployed | unquantised |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {zone} | {_span(zone_layers(zone, found.depth))} | {lift[zone]} | {lift_plain[zone]} | "
            f"{boundary.words()} ({boundary.collapsed} of {boundary.runs} broke) | {cost[zone]} | {cost_plain[zone]} |"
            for zone, boundary in found.boundaries.items()
        ),
        "",
    ]


def _correlated(found: Findings) -> list[str]:
    tables: dict[str, dict[str, dict[str, Correlation]]] = {"layers": {}, "zones": {}}
    for name, against in found.held_against().items():
        level = "layers" if len(against[1]) == found.depth else "zones"
        tables[level][name] = {c.score: c for c in correlations(*against)}
    lines = [
        "## Every score against every effect",
        "",
        "Spearman's rho [bootstrap over seeds] exact p (corrected for the number of scores; the effects stand for "
        "themselves). More score is worse: if a scan says where 16 bits help, rho with a lift is positive; if it says "
        "where noise hurts, rho with the tolerated sigma and with the cost (a loss, hence negative) is negative. A "
        "score without a site is one of the whole layer; a zone's is the mean of its layers'. Before training there is "
        "one base and no seed, hence no interval; nor is there one where every draw has the same order.",
    ]
    for level, effects in tables.items():
        lines += ["", f"### {level.capitalize()}", "", f"| score | {' | '.join(effects)} |"]
        lines.append("|---" * (1 + len(effects)) + "|")
        for kind in found.scores:
            row = [_cell(by_score[kind]) if kind in by_score else "no ranks" for by_score in effects.values()]
            lines.append(f"| {kind} | {' | '.join(row)} |")
        lines += ["", f"Best by p of {level}:", ""]
        for name, by_score in effects.items():
            lines.append(f"- {name}: {_best(by_score.values())}")
    return [*lines, ""]


def _best(tested: Iterable[Correlation]) -> str:
    best = min(tested, key=lambda c: (c.p, -abs(c.rho)), default=None)
    return "nothing has ranks" if best is None else f"{best.score}, {_cell(best)}"


def _cell(c: Correlation) -> str:
    low, rho, high = (f"{round(value, 2) + 0.0:+.2f}" for value in (c.low, c.rho, c.high))
    between = "" if c.low == c.high else f" [{low}, {high}]"
    return f"{rho}{between} p {chance(c.p)} ({chance(c.p_corrected)})"


def _seen(found: Findings) -> list[str]:
    by_zone = of_zones(found.scores, found.depth)
    lines = ["## What could have been seen", ""]
    for what, units, scores in (("layers", found.depth, found.scores), ("zones", len(ZONES), by_zone)):
        alone, among = smallest_seen(units), smallest_seen_corrected(scores, units)
        lines.append(
            f"- {units} {what}: one score chosen beforehand needs |rho| of at least {_needed(alone)} for p <= 0.05; "
            f"the best of these {len(scores)} scores {_needed(among)}."
        )
    return [*lines, ""]


def _needed(rho: float | None) -> str:
    return "more than 1 (it cannot be shown)" if rho is None else f"{rho:.2f}"


def _claim(found: Findings) -> list[str]:
    """The plan: layers 10 to 19 of 28 have the largest error, and are where something is to be done."""
    by_zone = of_zones(found.scores, found.depth)
    middle = [str(layer) for layer in zone_layers("middle", found.depth)]
    lines = ["## The plan's claim: the middle layers are the worst", ""]
    for kind in ("relative_error@output", "deadzone@output"):
        if kind in by_zone:
            values = ", ".join(f"{zone} {100 * v:.1f} %" for zone, v in zip(ZONES, by_zone[kind], strict=True))
            worst = list(ZONES)[int(np.argmax(by_zone[kind]))]
            lines.append(f"- Mean {kind}: {values}; the worst zone is {worst}.")
    for name, effect in found.layers.items():
        inside = np.array([unit in middle for unit in effect.units])
        outside = ~inside
        c = compare(effect.treated[:, inside].mean(axis=1).tolist(), effect.treated[:, outside].mean(axis=1).tolist())
        lines.append(
            f"- A middle layer lifted against another one, {name}: {points(c.difference)} points "
            f"[{points(c.low)}, {points(c.high)}], {c.words()}."
        )
    ranked = sorted(found.boundaries, key=lambda zone: tolerance_draws({zone: found.boundaries[zone]})[0][0])
    lines.append(f"- From the zone that tolerates least sigma to the one that tolerates most: {', '.join(ranked)}.")
    return lines


def draw(found: Findings, path: Path) -> None:
    """Effects of layers with their seeds, tolerated sigmas, and the scores' correlations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((left, right), (below, beside)) = pyplot.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    for axis, (name, effect) in zip((left, right), found.layers.items(), strict=True):
        for run in effect.table:
            axis.plot(range(found.depth), 100 * run, ".", color="tab:blue", alpha=0.5)
        means = list(effect.comparisons().values())
        low, high = ([100 * abs(getattr(c, end) - c.difference) for c in means] for end in ("low", "high"))
        axis.errorbar(range(found.depth), 100 * effect.means, yerr=[low, high], fmt="D", color="black", capsize=3)
        axis.axhline(0, color="gray", linewidth=0.8)
        spread = spread_of(effect.table)
        axis.set_title(f"a layer in 16 bits, {name}: F {spread.f:.1f}, p {chance(spread.p_f)}", fontsize=10)
        axis.set_xlabel("layer")
        axis.set_ylabel("points against the control")
    for i, (zone, boundary) in enumerate(found.boundaries.items()):
        runs = [row for row in found.rows if row.sigma > 0 and row.arm == noise_arm(zone, row.sigma)]
        for broke, mark, color in ((False, "o", "tab:green"), (True, "X", "tab:red")):
            ends = [row for row in runs if (row.outcome == "collapsed") is broke]
            offsets = [i - 0.24 + 0.06 * row.seed for row in ends]
            below.plot(offsets, [row.sigma for row in ends], mark, color=color, alpha=0.8)
        end = boundary.high_50 if math.isfinite(boundary.high_50) else 10 * boundary.low_50
        below.plot([i + 0.35] * 2, [boundary.low_50 or end / 10, end], color="black", linewidth=2)
    below.set_yscale("log")
    below.set_xticks(range(len(ZONES)), list(ZONES))
    below.set_ylabel("sigma of the first noisy stage")
    below.set_title("noise in one zone: o held, X collapsed, line: where half collapse", fontsize=10)
    tested = found.held_against()
    for i, name in enumerate(tested):
        seen = correlations(*tested[name])
        beside.plot([c.rho for c in seen], [i] * len(seen), "|", color="tab:blue", markersize=14)
        hits = [c for c in seen if c.p_corrected <= 0.05]
        beside.plot([c.rho for c in hits], [i] * len(hits), "o", color="tab:red")
    beside.set_yticks(range(len(tested)), list(tested), fontsize=8)
    beside.invert_yaxis()
    beside.set_xlim(-1.05, 1.05)
    beside.axvline(0, color="gray", linewidth=0.8)
    beside.set_title("Spearman's rho, a line per score; dot: p <= 0.05 after correction", fontsize=10)
    for axis in (left, right, below, beside):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# --- the whole of it --------------------------------------------------------------------------------------------------


def embedded_scan() -> Scan:
    """Of the base, on prompts of its task, with the functional part."""
    config = read_config({"threads": 1, "noise": {"sigma_start": 0.0}})
    policy = load_policy(config.model, config.quant, config.seed)
    task = build_task(config.task)
    questions = task.sample(PROMPTS, seed=config.seed, step=0, batch=0)
    prompts = encode_prompts(policy, questions, config.task, config.rollout.max_prompt_tokens)
    scan = scan_policy(policy, prompts, model=config.model, quant=config.quant, seed=config.seed)
    return with_sensitivities(scan, policy, prompts, task=task, config=config)


def all_scores(scan: Scan) -> dict[str, tuple[float, ...]]:
    """Every score that the scan has of every layer, at every site."""
    found = {}
    for name, (part, *_) in SCORES.items():
        for kind in [f"{name}@{site}" for site in SITES] if part == "sites" else [name]:
            try:
                found[kind] = score(scan, kind)
            except ConfigError:  # a part or a site that this scan has not
                continue
    return found


def write(rows: Sequence[Row]) -> Findings:
    """The page, its numbers and its picture, from runs and today's scan."""
    scan = embedded_scan()
    found = findings(rows, scan.depth, all_scores(scan))
    said = f"Scan: {scan.prompts} prompts of the task, {scan.tokens} tokens, {len(found.scores)} scores."
    (DOCS / "srdd-validity.md").write_text(page(found, said), encoding="utf-8")
    numbers = {"rows": [asdict(row) for row in rows], "scores": found.scores, "scan": as_tree(scan)}
    (DOCS / "srdd-validity.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    draw(found, DOCS / "srdd-validity.png")
    return found


def summary(found: Findings) -> list[str]:
    """For the page of all parts."""
    lines = []
    for name, effect in found.layers.items():
        s = spread_of(effect.table)
        tested = correlations(*found.held_against()[f"layer lifted, {name}"])
        lines.append(
            f"- a layer in 16 bits, {name}: layers differ with F {s.f:.1f}, p {chance(s.p_f)} ({s.seeds} seeds); of "
            f"{len(found.scores)} scores of the scan the best is {_best(tested)}"
        )
    return [*lines, "", "Every score, zones, the sigma that each tolerates: [srdd-validity.md](srdd-validity.md)."]


def part(seeds: int, workers: int) -> tuple[list[str], dict[str, Any]]:
    """Of `make science`: train what is missing, then write."""

    def say(row: Row) -> None:
        print(f"  {row.arm} seed {row.seed}: {row.outcome} {row.rule} accuracy {row.accuracy}", flush=True)

    with Runner(rows_file(), workers, say) as runner:
        rows = measure({}, BaseRecipe().depth, seeds, runner)
    return summary(write(rows)), {}


def kept_rows() -> list[Row]:
    tree = json.loads((DOCS / "srdd-validity.json").read_text(encoding="utf-8"))
    return [Row(**row) for row in tree["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--kept", action="store_true", help="only hold the kept runs against today's scan")
    options = parser.parse_args()
    lines = summary(write(kept_rows())) if options.kept else part(options.seeds, options.workers)[0]
    print("\n".join(lines))


if __name__ == "__main__":
    main()

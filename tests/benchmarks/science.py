"""The plan in miniature, with replicates: what reproduces on the embedded workload, and what does not.

    make science                          every part, about 30 minutes on two cores
    make science ARGS="--seeds 3"         fewer replicates
    make science ARGS="--only Watched"    one part again; the others keep their results

Each part is an ordinary sweep of the product, but for the last, which trains outside of one and has a page of its own,
docs/srdd-validity.md. Results go to docs/science.md (for people), docs/science.json (every number) and docs/sweep.png.
Nothing here asserts: a finding that does not reproduce is written down as it is. `make test` holds one seed of each
claim.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search.arms import trial_folder
from search.events import Event, TrialEvent
from search.statistics import Comparison, compare
from search.store import StudyConfig, default_tracking_uri
from search.study import run_study
from spaces.library import SPACES
from spaces.reading import parse_overrides
from tests.benchmarks import scan_validity
from trainable.disk.trial_folder import read_reports
from trainable.outcome import Outcome, StepReport
from trainable.philox import GENERATOR

DOCS = Path(__file__).parents[2] / "docs"
POINTS = ("bf16", "e13i-baseline", "e13i-v2", "e13i-v4-filter-off", "e13m-rmsnorm")
CURVES = ("control", "bf16", "e13i-baseline", "e13i-v4-filter-off", "e13m-rmsnorm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A trial that is over, from its folder."""

    arm: str
    replicate: int
    outcome: Outcome
    reports: tuple[StepReport, ...]

    @property
    def rule(self) -> str:
        """Of its collapse; of its first alarm where it was only watched."""
        alarms = self.outcome.alarms
        return self.outcome.rule or (alarms[0].rule if alarms else "")

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each signal, and the evaluation at its end."""
        numbers = {name: value for report in self.reports for name, value in report.signals.items()}
        scores = {
            f"eval/{name}": value for name, value in asdict(self.outcome.eval).items() if isinstance(value, int | float)
        }
        return {**numbers, **scores}

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(report.step, report.signals[name]) for report in self.reports]


def sweep(store: Path, name: str, points: Sequence[str], seeds: int, *overrides: str, seed: int = 0) -> list[Run]:
    """An ordinary sweep of fixed points; every trial of it, arm by arm."""
    arms = len(points) + 1 + (1 if any(p.startswith("e13") and "off" not in p for p in points) else 0)
    config = StudyConfig(
        name=name,
        space=SPACES["sigma"],
        trials=arms,
        points=tuple(points),
        replicates=seeds,
        seed=seed,
        settings=parse_overrides(overrides),
        store=str(store),
        tracking_uri=default_tracking_uri(str(store)),
    )

    def view(event: Event) -> None:
        if isinstance(event, TrialEvent) and event.status != "running":
            accuracy = event.metrics.get("eval/accuracy")
            print(
                f"  {name} {event.trial}: {event.status} {event.rule} step {event.step} accuracy {accuracy}", flush=True
            )

    result = run_study(config, view)
    assert result.unfinished == 0, "a trial failed"
    return [
        Run(
            arm=arm.name,
            replicate=number,
            outcome=outcome,
            reports=tuple(read_reports(trial_folder(config, arm.name, number))),
        )
        for arm in result.arms
        for number, outcome in sorted(arm.results.items())
    ]


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs)}


def accuracies(runs: Sequence[Run], metric: str = "eval/accuracy") -> list[float]:
    return [run.metrics[metric] for run in runs]


def percent(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
    return f"{100 * mean:.1f} ± {100 * spread:.1f}"


def interval(c: Comparison) -> str:
    return (
        f"{100 * c.difference:+.1f} points [{100 * c.low:+.1f}, {100 * c.high:+.1f}], "
        f"{c.verdict} ({c.replicates} replicates)"
    )


def ending(runs: Sequence[Run]) -> str:
    """`collapsed 5 of 5 (filter_rejection at step 3)`; a collapse at step k is in the step with index k."""
    counts = Counter(run.outcome.outcome for run in runs)
    text = ", ".join(f"{word} {count} of {len(runs)}" for word, count in counts.most_common())
    ends = Counter((run.rule, run.outcome.step - 1) for run in runs if run.outcome.collapsed)
    return text + "".join(f"; {rule} at step {step} ({count}x)" for (rule, step), count in ends.most_common())


def plan_in_miniature(store: Path, seeds: int) -> tuple[list[str], dict[str, Any]]:
    records = sweep(store, "plan", POINTS, seeds)
    arms = by_arm(records)
    lines = ["| configuration | ending | W4A4 start | accuracy | unquantised | gain |", "|---|---|---|---|---|---|"]
    for arm, runs in arms.items():
        gain = [e - s for e, s in zip(accuracies(runs), accuracies(runs, "eval/accuracy_start"), strict=True)]
        cells = (percent(accuracies(runs, m)) for m in ("eval/accuracy_start", "eval/accuracy", "eval/accuracy_bf16"))
        lines.append(f"| {arm} | {ending(runs)} | {' | '.join(cells)} | {percent(gain)} |")
    control, filtered = arms["control"], arms["control-resample"]
    positive = arms["bf16"]
    comparisons = {
        "positive control: bf16 at the end against its own start": compare(
            accuracies(positive), accuracies(positive, "eval/accuracy_start")
        ),
        "e13m-rmsnorm against control-resample (same filter, same seeds)": compare(
            accuracies(arms["e13m-rmsnorm"]), accuracies(filtered)
        ),
        "e13i-v4-filter-off against control (collapsed runs with the accuracy at their stop)": compare(
            accuracies(arms["e13i-v4-filter-off"]), accuracies(control)
        ),
        "the filter alone: control-resample against control": compare(accuracies(filtered), accuracies(control)),
        "W4A4 training (control) against its own start": compare(
            accuracies(control), accuracies(control, "eval/accuracy_start")
        ),
    }
    lines += ["", *(f"- {what}: {interval(c)}" for what, c in comparisons.items())]
    # The base is the same for every seed, so the start is one number and not a replicate.
    quantised, plain = (accuracies(arms[arm], "eval/unsigned_start")[0] for arm in ("control", "bf16"))
    lines.append(
        f"- before training, sign ignored: W4A4 {100 * quantised:.1f} %, "
        f"BF16 {100 * plain:.1f} % (one base, 2,048 questions)"
    )
    draw(records, DOCS / "sweep.png")
    return lines, {"runs": [run_numbers(r) for r in records]}


def monitored(store: Path, seeds: int) -> tuple[list[str], dict[str, Any]]:
    """The collapsing point with the filter off, watched instead of stopped."""
    records = sweep(store, "monitored", ["e13i-v4-filter-off"], seeds, "collapse.mode=monitor")
    arms = by_arm(records)
    treated, control = arms["e13i-v4-filter-off"], arms["control"]
    rules = Counter(run.rule or "none" for run in treated)
    alarms = ", ".join(f"{rule} ({n}x)" for rule, n in rules.items())
    return [
        f"- e13i-v4-filter-off: {ending(treated)}; first alarm: {alarms}",
        f"- against its control: {interval(compare(accuracies(treated), accuracies(control)))}",
    ], {"runs": [run_numbers(r) for r in records]}


def false_alarms(store: Path, seeds: int) -> tuple[list[str], dict[str, Any]]:
    """Healthy runs under enforce, with seeds that the plan in miniature did not use; its own controls are healthy runs
    too."""
    records = sweep(store, "healthy", [], 3 * seeds, seed=seeds)
    return [f"- {len(records)} further seeds without noise (seeds {seeds} to {4 * seeds - 1}): {ending(records)}"], {
        "runs": [run_numbers(r) for r in records]
    }


def real_model() -> tuple[list[str], dict[str, Any]]:
    """Five GRPO steps of SmolLM2-135M in W4A4 with RMSNorm noise, in a process of its own."""
    rin = Path(sys.executable).parent / "rin"
    arguments = [
        "trial",
        "e13i-v3",
        "--workload",
        "smollm2-135m",
        "--set",
        "noise.sigma_start=0.01",
    ]  # QeRL's published start
    command = [str(rin), *arguments, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    *steps, outcome = [json.loads(line) for line in done.stdout.splitlines()]
    lines = [
        (
            f"`rin {' '.join(arguments)}`: {seconds:.0f} s in all, peak memory {peak:.1f} GiB, "
            f"outcome {outcome['outcome']}"
        ),
        "",
        "| step | sigma | reward | entropy | length | KL to the clean policy | gradient norm | rollout s | update s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = (
        "grpo/reward",
        "gen/entropy",
        "gen/length",
        "rollout_corr/kl",
        "grpo/grad_norm",
        "perf/rollout_seconds",
        "perf/update_seconds",
    )
    for step in steps:
        cells = " | ".join(f"{step['signals'].get(name, float('nan')):.3g}" for name in names)
        lines.append(f"| {step['step']} | {step['sigma']:.4g} | {cells} |")
    scores = outcome["eval"]
    lines.append("")
    lines.append(
        f"accuracy on {scores['n']} questions: W4A4 {scores['accuracy_start']:.3f} -> {scores['accuracy']:.3f}, "
        f"unquantised {scores['accuracy_bf16_start']:.3f} -> {scores['accuracy_bf16']:.3f} "
        "(5 steps: signals, not a finding)"
    )
    return lines, {
        "steps": steps,
        "eval": {k: v for k, v in scores.items() if k != "correct"},
        "seconds": seconds,
        "peak_gib": peak,
    }


def run_numbers(run: Run) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "replicate": run.replicate,
        "status": run.outcome.outcome,
        "rule": run.rule,
        "reason": next((report.verdict.evidence for report in run.reports if report.verdict.rule), ""),
        "metrics": run.metrics,
    }


def draw(trials: Sequence[Run], path: Path) -> None:
    """Sampled reward over steps, a line per replicate, and the sigma that was in force."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    colors = pyplot.get_cmap("tab10").colors
    for color, (arm, runs) in zip(colors, ((a, r) for a, r in by_arm(trials).items() if a in CURVES), strict=False):
        for run in runs:
            curve = run.curve("grpo/reward")
            label = f"{arm} ({ending(runs).split(';')[0]})" if run is runs[0] else None
            top.plot(*zip(*curve, strict=True), color=color, alpha=0.8, linewidth=1.2, label=label)
            if run.outcome.collapsed:
                top.plot(*curve[-1], marker="X", color=color, markersize=9, zorder=3)
    noisy = next(run for run in trials if run.arm == "e13m-rmsnorm")
    bottom.step(*zip(*noisy.curve("rin/sigma"), strict=True), where="post", color="black")
    top.set_ylabel("mean reward of the rollout")
    top.set_title("GRPO in W4A4 MXFP4 on three-digit sums: a line per seed, X = stopped as collapsed")
    top.legend(fontsize=8)
    top.grid(alpha=0.3)
    bottom.set_ylabel("sigma")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


PARTS: dict[str, Callable[[Path, int], tuple[list[str], dict[str, Any]]]] = {
    "The plan in miniature": plan_in_miniature,
    "Watched instead of stopped": monitored,
    "False alarms": false_alarms,
    "A real model on a real task": lambda store, seeds: real_model(),
    "The scan validated": lambda store, seeds: scan_validity.part(seeds, os.cpu_count() or 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="run the parts whose title contains this")
    options = parser.parse_args()
    DOCS.mkdir(exist_ok=True)
    path = DOCS / "science.json"
    parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if options.only and path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for title, part in PARTS.items():
            if options.only not in title:
                continue
            print(title, flush=True)
            started = time.perf_counter()
            lines, numbers = part(Path(folder), options.seeds)
            seconds = time.perf_counter() - started
            parts[title] = {"lines": lines, "seeds": options.seeds, "seconds": seconds, "draws": GENERATOR, **numbers}
            path.write_text(json.dumps(parts, indent=1), encoding="utf-8")
            (DOCS / "science.md").write_text(page(parts), encoding="utf-8")
    print(page(parts))


def page(parts: dict[str, Any]) -> str:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch on the CPU, Python {platform.python_version()}"
    text = ["# What reproduces", "", f"Made by `make science` on {machine}.", ""]
    for title in PARTS:
        if title in parts:
            part = parts[title]
            draws = part.get("draws", "another generator than this program has: other draws of the same noise")
            made = f"({part['seeds']} seeds, {part['seconds']:.0f} s; noise by {draws})"
            text += [f"## {title}", "", *part["lines"], "", made, ""]
    return "\n".join(text)


if __name__ == "__main__":
    main()

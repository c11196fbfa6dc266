"""One trial in words, for `rin trial`: a line per step, and what it came to. Pure: a report or an outcome in, lines
out."""

from dashboards.tables import marks_apart, points
from trainable.metrics import ACCURACY, ENTROPY, KEPT_GROUPS, LENGTH, REWARD
from trainable.outcome import Coverage, Outcome, StepReport, in_step
from trainable.pass_at_k import pass_at, shown

ALARMS_SHOWN = 5


def step_line(report: StepReport) -> str:
    """Example: step   3  sigma 0.01  reward 0.412  entropy 0.310  length 4.1  kept 21  0.62 s"""
    signals = report.signals
    parts = [
        f"step {report.step:3d}",
        f"sigma {report.sigma:.4g}",
        f"reward {signals[REWARD]:.3f}",
        f"entropy {signals[ENTROPY]:.3f}",
        f"length {signals[LENGTH]:.1f}",
        f"kept {signals[KEPT_GROUPS]:.0f}",
        f"{report.seconds:.2f} s",
    ]
    if ACCURACY in signals:
        parts.append(f"accuracy {signals[ACCURACY]:.4f}")
    if report.verdict.collapsed:
        parts.append(f"COLLAPSE {report.verdict.rule}: {report.verdict.evidence}")
    return "  ".join(parts)


def outcome_lines(outcome: Outcome, mode: str) -> list[str]:
    """How it ended, from where to where, what was touched, and what must be known; `mode`: W4A4, ..."""
    scores, receipt = outcome.eval, outcome.receipt
    rule = f" by rule {outcome.rule}" if outcome.rule else ""
    marks, steps = marks_apart(scores.parts), outcome.config.grpo.steps
    when = in_step(outcome.step - 1, steps) if outcome.outcome == "collapsed" else f"after {outcome.step} steps"
    return [
        f"{outcome.outcome}{rule} {when}, {outcome.seconds:.1f} s",
        f"accuracy {scores.accuracy_start:.4f} -> {scores.accuracy:.4f} ({mode}), "
        f"{scores.accuracy_bf16_start:.4f} -> {scores.accuracy_bf16:.4f} (unquantised), {scores.n} questions",
        *([marks] if marks else []),
        *_pass_lines(outcome),
        f"quantised {len(receipt.quantized)} layers, noised {len(receipt.noised)} weights"
        + (f", adapters beside {len(receipt.adapted)} layers" if receipt.adapted else ""),
        *(str(one) for one in receipt.followed),
        *_coverage_lines(receipt.coverage),
        "of the trained weights moved: " + ", ".join(f"{100 * x:.1f} % of {kind}" for kind, x in receipt.moved.items()),
        *(f"warning: {warning}" for warning in receipt.warnings),
        *(
            f"alarm {in_step(alarm.step, steps)}: {alarm.rule}: {alarm.evidence}"
            for alarm in outcome.alarms[:ALARMS_SHOWN]
        ),
    ]


def _pass_lines(outcome: Outcome) -> list[str]:
    """A line per k, where answers were sampled."""
    scores, samples = outcome.eval, outcome.config.eval.samples
    both = [
        (pass_at(scores.right_start, samples, k), pass_at(scores.right, samples, k))
        for k in (shown(samples) if scores.right else ())
    ]
    return [
        f"pass@{after.k} {points(before.share)} -> {points(after.share)} "
        f"[{100 * after.low:.1f}, {100 * after.high:.1f}] over questions, {samples} samples each"
        for before, after in both
    ]


def _coverage_lines(coverage: Coverage) -> list[str]:
    """The sums, unless all or nothing is quantised."""
    if coverage.quantized in (0, coverage.weights):
        return []
    quantized, excluded, left = (
        f"{100 * part / coverage.weights:.1f} %" for part in (coverage.quantized, coverage.excluded, coverage.left)
    )
    reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in coverage.left_out)
    return [
        f"of the blocks' {coverage.weights:,} weights {quantized} quantised, {excluded} excluded by name, "
        f"{left} left out" + (f" ({reasons})" if reasons else "")
    ]

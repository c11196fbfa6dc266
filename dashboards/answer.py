"""The answer of a sweep in a few sentences: does noise help, which, by how much, how sure; or what it would take.

A sweep alone never says that noise helps: its candidate was chosen and judged on the same questions. Where a
confirmation of it lies in the store, the confirmation's word comes first. Each answer ends with how far anything was
looked at, because nothing is known beyond that.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dashboards.report_text import interval
from dashboards.tables import describe_noise, points
from search.confirm import Confirmation
from search.finding import Finding
from search.report import ArmReport, StudyReport, screening
from search.statistics import Comparison

QUESTION = "Does noise help?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Example: Answer(word="Undecided", lines=("c03 (rmsnorm 0.01 -> 0.001): +1.2 points against control ...",))"""

    word: str
    lines: tuple[str, ...]


def answer_of(report: StudyReport, confirmation: Confirmation | None) -> Answer:
    """`confirmation`: of the sweep's candidate, or the study itself where that is one."""
    if confirmation is not None and confirmation.finding is not None:
        word, lines = CONFIRMED[confirmation.finding.verdict], list(_confirmed(confirmation, confirmation.finding))
    else:
        word, lines = _screened(report)
    return Answer(word=word, lines=(*lines, *_collapses(report), *_missing(report), _horizon(report)))


CONFIRMED = {
    "better": "Yes, confirmed",
    "better where it holds": "Yes where it holds: a collapse risk is not excluded",
    "same": "No difference, confirmed",
    "same where it holds": "No difference where it holds: a collapse risk is not excluded",
    "worse": "No, it is worse, confirmed",
    "undecided": "Undecided, also by its confirmation",
}
SCREENED = {
    "better": "It looks so, not confirmed",
    "better where it holds": "It looks so where it holds, not confirmed",
    "same": "It looks like no difference, not confirmed",
    "same where it holds": "It looks like no difference where it holds, not confirmed",
    "worse": "It does not look so: the best of it is behind",
    "undecided": "Undecided",
}


def _confirmed(state: Confirmation, finding: Finding) -> Iterator[str]:
    of = "" if state.config.measure == "accuracy" else f" of {state.config.measure}"
    yield (
        f"{state.winner} against {state.control}: {finding.words()}. Difference {_points(state.comparison)} "
        f"points{of} {interval(state.comparison)} (95 % over all looks), {state.replicates} pairs of fresh seeds, "
        "on questions that chose nothing."
    )
    if said := finding.risk_words():
        yield f"{said}."
    yield from (f"{note}." for note in state.notes)


def _screened(report: StudyReport) -> tuple[str, list[str]]:
    row, name = report.candidate, report.config.name
    if row is None:
        return "Nothing can be said yet", [_why_not(report)]
    if row.corrected is None or row.finding is None:
        return "Undecided", [f"{row.arm} ({describe_noise(row.config)}) could not be compared: {row.failed}."]
    seen = row.corrected
    of = "" if report.config.measure == "accuracy" else f" of {report.config.measure}"
    lines = [
        f"The candidate is {row.arm} ({describe_noise(row.config)}), {points(row.score)}: {_points(seen)} points{of} "
        f"{interval(seen)} against {row.control}, over {seen.replicates} pair{'s'[: seen.replicates != 1]} of "
        f"runs with the same seeds; interval at 95 %"
        f"{f' for all {row.family} arms together' if row.family > 1 else ''}."
    ]
    if seen.replicates and seen.difference <= 0:
        lines.append("No configuration with noise came out ahead of its control.")
    lines.append(f"What it says: {screening(row.finding.words())}.")
    if said := row.finding.risk_words():
        lines.append(f"{said[0].upper()}{said[1:]}.")
    if report.config.kind == "sweep":
        lines.append(f"It was chosen and judged on the same questions: not a finding. To find out: rin confirm {name}")
    return SCREENED[row.finding.verdict], lines


def _why_not(report: StudyReport) -> str:
    noisy = [row for row in report.arms if row.config.noise.sigma_start > 0]
    ended = [row for row in noisy if row.replicates]
    if not report.arms:
        return "No arm has been written down yet."
    if not any(row.origin == "control" and row.replicates for row in report.arms):
        return "No control has ended with an accuracy, so nothing can be compared with one."
    if not ended:
        return "No trial with noise has ended with an accuracy."
    if all(row.collapsed for row in ended):
        return f"All of the {len(ended)} configurations with noise that ended collapsed in some run."
    return "No configuration with noise has completed all its replicates beside its control."


def _collapses(report: StudyReport) -> Iterator[str]:
    noisy = [row for row in report.arms if row.config.noise.sigma_start > 0]
    runs, collapsed = sum(row.replicates for row in noisy), sum(row.collapsed for row in noisy)
    if runs:
        yield f"{collapsed} of {runs} runs with noise collapsed."
    for boundary in report.tolerance:
        yield f"{boundary.mode}, noise on {boundary.kind}: {boundary.words()}."


def _missing(report: StudyReport) -> Iterator[str]:
    if report.unfinished:
        yield f"{report.unfinished} trials have no outcome yet; what they would say is missing here."
    failed = [row.arm for row in report.arms if any(trial.status == "failed" for trial in row.trials)]
    if failed:
        yield f"Failed, which says nothing about noise: trials of {', '.join(failed)}."


def _horizon(report: StudyReport) -> str:
    """Up to which step and dose anything was looked at."""
    noisy = [row for row in report.arms if row.config.noise.sigma_start > 0 and row.replicates]
    steps = max((max(row.steps, default=0) for row in report.arms), default=0)
    if not noisy:
        return f"Looked at: {steps} steps, nothing with noise."
    by_kind: dict[str, list[ArmReport]] = {}
    for row in noisy:
        by_kind.setdefault("+".join(row.config.noise.modules), []).append(row)
    parts = []
    for kind, rows in by_kind.items():
        doses = [row.dose for row in rows if row.dose is not None]
        dose = f" (applied: up to {100 * max(doses):.3g} % of the weights' size)" if doses else ""
        parts.append(f"{kind} up to sigma {max(row.config.noise.sigma_start for row in rows):.3g}{dose}")
    return f"Looked at: up to {steps} steps; noise on {', '.join(parts)}. Nothing is known beyond that."


def _points(seen: Comparison) -> str:
    return "unknown" if seen.replicates == 0 else f"{100 * seen.difference:+.1f}"

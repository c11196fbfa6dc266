"""The answer of a sweep in a few sentences: does noise help, which, by how much, how sure; or what it would take.

A sweep alone never says that noise helps: its candidate was chosen and judged on the same questions. Where a
confirmation of it lies in the store, the confirmation's word comes first. Each answer ends with how far anything was
looked at, because nothing is known beyond that.

The answer in one sentence is what a sweep ends with in the terminal and what its page begins with. It never says more
than the finding does: of accuracies that are not told apart the interval, of a gain the collapse risk that is not
excluded, of noise that broke runs what was seen and in how many.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dashboards.report_text import interval
from dashboards.tables import points
from search.confirm import Confirmation, confirm_command, in_its_place
from search.finding import Finding, FindingVerdict
from search.replicates import MIN_REPLICATES
from search.report import ArmReport, StudyReport, screening
from search.statistics import Comparison
from search.tolerance import Boundary
from spaces.naming import describe_noise

QUESTION = "Does noise help?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Example: Answer(word="Undecided", sentence="c03, rmsnorm 0.01 -> 0.001: undecided, within ±1.8 points ...",
    lines=("The candidate is c03 (rmsnorm 0.01 -> 0.001): +1.2 points against control ...",))"""

    word: str
    sentence: str
    lines: tuple[str, ...]


def answer_of(report: StudyReport, confirmation: Confirmation | None) -> Answer:
    """`confirmation`: of the sweep's candidate, or the study itself where that is one."""
    if confirmation is not None and confirmation.finding is not None:
        word, lines = _word(confirmation.finding, CONFIRMED), list(_confirmed(confirmation, confirmation.finding))
    else:
        word, lines = _screened(report)
    return Answer(
        word=word,
        sentence="; ".join([_sentence(report, confirmation), *_broken(report)]),
        lines=(*lines, *_collapses(report), *_missing(report), _horizon(report)),
    )


CONFIRMED: dict[FindingVerdict, str] = {
    "better": "Yes, confirmed",
    "better where it holds": "Yes where it holds: a collapse risk is not excluded",
    "same": "No difference, confirmed",
    "same where it holds": "No difference where it holds: a collapse risk is not excluded",
    "worse": "No, it is worse, confirmed",
    "undecided": "Undecided, also by its confirmation",
}
SCREENED: dict[FindingVerdict, str] = {
    "better": "It looks so, not confirmed",
    "better where it holds": "It looks so where it holds, not confirmed",
    "same": "It looks like no difference, not confirmed",
    "same where it holds": "It looks like no difference where it holds, not confirmed",
    "worse": "It does not look so: the best of it is behind",
    "undecided": "Undecided",
}


CANCELLED = ": a collapse risk is not excluded", ": collapses as often as seen would cancel that"


def _word(finding: Finding, words: Mapping[FindingVerdict, str]) -> str:
    said = words[finding.verdict]
    if not finding.cancelled:
        return said
    return said.replace(*CANCELLED) if words is CONFIRMED else f"{said}{CANCELLED[1]}"


def _confirmed(state: Confirmation, finding: Finding) -> Iterator[str]:
    of = "" if state.config.measure == "accuracy" else f" of {state.config.measure}"
    yield (
        f"{state.winner} against {state.control}: {finding.words()}. Difference {_points(state.comparison)} "
        f"points{of} {interval(state.comparison)} (95 % over all looks), with fresh seeds ({state.pairs}), "
        "on questions that chose nothing."
    )
    if said := finding.risk_words():
        yield f"{said}."
    yield from (f"{note}." for note in state.notes)


def _screened(report: StudyReport) -> tuple[str, list[str]]:
    row, config = report.candidate, report.config
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
    if config.kind == "sweep":
        find_out = confirm_command(config, row.arm)
        lines.append(f"It was chosen and judged on the same questions: not a finding. To find out: {find_out}")
        lines += filter(None, [in_its_place(config)])
    return _word(row.finding, SCREENED), lines


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


# --- in one sentence --------------------------------------------------------------------------------------------------


def _sentence(report: StudyReport, confirmation: Confirmation | None) -> str:
    if confirmation is not None and confirmation.finding is not None:
        row = next((row for row in report.arms if row.arm == confirmation.winner), None)
        noise = "" if row is None else f", {describe_noise(row.config)}"
        now = "" if report.candidate is None else report.candidate.arm
        since = f"; by now the candidate is {now}" if now not in ("", confirmation.winner) else ""
        return f"{confirmation.winner}{noise}: {_found(confirmation, confirmation.finding)}{since}"
    row = report.candidate
    if row is None:
        return f"undecided: {_why_not(report)[0].lower()}{_why_not(report)[1:].rstrip('.')}"
    if row.corrected is None:
        return f"{row.arm}, {describe_noise(row.config)}: undecided, it could not be compared"
    return (
        f"{row.arm}, {describe_noise(row.config)}: undecided; {_points(row.corrected)} {_unit(report.config.measure)} "
        f"against {row.control} on the questions that chose it ({_pairs(row.corrected)}), which is no finding"
    )


def _found(state: Confirmation, finding: Finding) -> str:
    """What a confirmation found. Of an interval that is not all on one side, how far the arm can be from its control;
    of collapses, the arm's and the control's, how many there were."""
    seen, unit = state.comparison, _unit(state.config.measure)
    notes = [state.pairs]
    if finding.qualified:
        notes.append(finding.caveat)
    if finding.collapsed and not finding.cancelled:
        notes.append(f"{finding.collapsed} of its {finding.runs} runs collapsed")
    if state.arms is not None and (risk := state.arms.control_risk).collapsed:
        notes.append(f"{risk.collapsed} of {risk.replicates} runs of the control collapsed")
    where = " where it holds" if finding.qualified else ""
    apart = f"{_points(seen)} {unit} {interval(seen)}"
    if finding.unheld:
        said = f"undecided: {finding.unheld}; {apart}"
    elif seen.verdict == "same":
        said = f"same within ±{100 * seen.margin:g} {unit} of {state.control}{where}: {apart}"
    elif seen.verdict != "undecided":
        said = f"{seen.verdict} than {state.control}{where}: {apart}"
    elif math.isinf(seen.low) or seen.replicates < MIN_REPLICATES:
        said = f"undecided; {_points(seen)} {unit} against {state.control}"
        notes.append(f"the first look is after {state.looks[0]}")
    else:
        most = math.ceil(1000 * max(abs(seen.low), abs(seen.high))) / 10
        said = f"undecided, within ±{most:.1f} {unit} of {state.control}: {apart}"
        notes.append(seen.words().removeprefix("undecided").lstrip(",: "))
    return f"{said} ({'; '.join(notes)})"


def _broken(report: StudyReport) -> Iterator[str]:
    """Noise that broke runs, by mode and module kind: from which sigma on, as far as the runs say. A confirmation has
    one sigma, and has told its collapses."""
    for boundary in report.tolerance:
        if boundary.collapsed and report.config.kind != "confirm":
            yield _broke(boundary)


def _broke(boundary: Boundary) -> str:
    """Example: `linear noise broke every W4A4 run from sigma 0.05 on, and none up to 0.012 (4 runs)`."""
    noise, mode, runs = f"{boundary.kind} noise", boundary.mode, f"({boundary.runs} run{'s'[: boundary.runs != 1]})"
    if boundary.status == "fitted":
        ends = f"[{_sigma(boundary.low_50)}, {_sigma(boundary.high_50)}]"
        half = _sigma(boundary.sigma_50 or math.inf)
        return f"{noise} breaks half of the {mode} runs at sigma {half} {ends} {runs}"
    if boundary.broke is None or boundary.status not in ("bracketed", "broke"):
        return f"{noise} broke {boundary.collapsed} of {boundary.runs} {mode} run{'s'[: boundary.runs != 1]}"
    held = "" if boundary.held is None else f", and none up to {_sigma(boundary.held)}"
    return f"{noise} broke every {mode} run from sigma {_sigma(boundary.broke)} on{held} {runs}"


def _sigma(sigma: float) -> str:
    return "..." if math.isinf(sigma) else f"{sigma:.3g}"


def _unit(measure: str) -> str:
    return "points" if measure == "accuracy" else f"points of {measure}"


def _pairs(seen: Comparison) -> str:
    return f"{seen.replicates} pair{'s'[: seen.replicates != 1]}"


def _points(seen: Comparison) -> str:
    return "unknown" if seen.replicates == 0 else f"{100 * seen.difference:+.1f}"

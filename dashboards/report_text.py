"""What a study says, as text: the report's table, a confirmation's sentences, a plan's lines. Pure functions from
records to lines."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from dashboards.tables import curve_rows, duration, empty_table, fields_of, finite, marks_apart, points
from search.confirm import Confirmation, confirm_command, in_its_place
from search.finding import Finding
from search.importance import Importance
from search.lineup import overridden
from search.plan import StudyPlan, recorded_collapse
from search.replicates import MIN_REPLICATES
from search.report import ArmReport, ControlsApart, StudyReport, screening
from search.statistics import ArmComparison, CollapseRisk, Comparison
from spaces.naming import describe_noise
from spaces.reading import as_tree as config_tree
from spaces.uses import is_noisy
from trainable.outcome import in_step

NOT_A_FINDING = (
    "ahead, behind: on the selection questions, by which arms were also chosen; "
    "corrected for the arms that share a control ({families}). Only rin confirm says better or worse."
)


def report_table(report: StudyReport) -> Table:
    words = ("arm", "noise", "runs", "collapsed")
    numbers = (report.config.measure, "vs control", "interval", "dose", "hours")
    table = empty_table(f"{report.config.kind} {report.config.name}", words, numbers)
    table.add_column("verdict", overflow="fold")
    for row in report.arms:
        mark = " (candidate)" if row.candidate else ""
        table.add_row(
            row.arm + mark,
            describe_noise(row.config),
            _runs(row),
            _collapsed(row),
            points(row.score),
            "" if row.difference is None else f"{100 * row.difference:+.1f}",
            "" if row.corrected is None else escape(interval(row.corrected)),
            "-" if row.dose is None else _dose(row.dose),
            f"{row.hours:.3f}",
            row.verdict,
        )
    return table


def report_lines(report: StudyReport, where: str = "") -> list[str]:
    """What stands below the table; `where`: options that find the sweep again."""
    ledger = report.ledger
    families = {row.control: row.family for row in report.arms if row.corrected is not None}
    lines = [NOT_A_FINDING.format(families=", ".join(f"{control}: {n}" for control, n in families.items()) or "none")]
    lines += [*report.config.history, *_candidates_before(report)]
    if report.unfinished:
        lines.append(f"{report.unfinished} trials have no outcome yet: {report.config.go_on}{where}")
    for row in report.arms:
        risk = row.comparison
        if risk is not None and (risk.treated_risk.collapsed or risk.control_risk.collapsed):
            lines.append(
                f"{row.arm}: collapse probability {_risk(risk.treated_risk)}, its control {_risk(risk.control_risk)}, "
                f"different at p = {risk.risk_p:.2g}{_completed(row)}"
            )
    for row in report.arms:
        if row.finding is not None and (said := row.finding.risk_words()):
            lines.append(f"{row.arm}: {said}")
    lines += [_controls_line(pair, report.config.measure) for pair in report.controls]
    lines += _negative_lines(report)
    lines += _curve_lines(report)
    undecided = [row for row in report.arms if row.finding is not None and row.finding.verdict == "undecided"]
    if undecided:
        lines.append(f"undecided: {', '.join(f'{row.arm} ({_missing(row)})' for row in undecided)}")
    lines += [f"{row.arm}: {marks}" for row in report.arms if (marks := marks_apart(row.marks))]
    lines += [
        f"{row.arm}: warning: {row.warnings[0]}" + (f" (and {more} more)" if (more := len(row.warnings) - 1) else "")
        for row in report.arms
        if row.warnings
    ]
    lines += [f"{boundary.mode}, noise on {boundary.kind}: {boundary.words()}" for boundary in report.tolerance]
    lines += [_importance(item) for item in report.importance if item.importance is not None]
    lines += report.failed
    lines.append(
        f"{_hours(ledger.hours)} {ledger.unit}: {_hours(ledger.collapsed)} in trials that collapsed, "
        f"{_hours(ledger.repeated)} repeated after faults, {_hours(ledger.filtered)} generating groups that the filter "
        "threw away" + (f"; {_hours(ledger.saved)} more saved by beginnings that trials share" if ledger.saved else "")
    )
    if report.candidate is not None and report.config.kind == "sweep":
        arm = report.candidate.arm
        lines.append(f"candidate: {arm}. Is it a finding? {confirm_command(report.config, arm, where)}")
        lines += filter(None, [in_its_place(report.config)])
    return lines


def _hours(number: float) -> str:
    """Example: 0.004; 0.13; 0 where there were none."""
    return f"{number:.2f}" if number >= 0.01 else f"{number:.1g}"


def _candidates_before(report: StudyReport) -> Iterator[str]:
    """Of a sweep that was extended: who is not ahead any more, and may have been confirmed."""
    now = report.candidate.arm if report.candidate is not None else "none"
    for extension in report.config.extensions:
        if extension.candidate not in ("", now):
            yield (
                f"before it was extended on {extension.at[:10]} the candidate was {extension.candidate}, now it is "
                f"{now}: a confirmation that began then stays one of {extension.candidate}"
            )


def _controls_line(pair: ControlsApart, measure: str) -> str:
    """What a precision, or a filter, does without noise."""
    settings = ", ".join(f"{key}={here} (there {there})" for key, (here, there) in pair.settings.items())
    seen, judged = pair.comparison, ""
    if any(key.startswith("quant.") for key in pair.settings):
        judged = ", each judged in its own precision"
    return (
        f"{pair.control} against {pair.other}, both without noise: {_apart(seen)} points of {measure} {interval(seen)} "
        f"over {seen.replicates} seed{'s'[: seen.replicates != 1]}{judged}; {settings or 'the same settings'}"
    )


def _negative_lines(report: StudyReport) -> list[str]:
    """Of a negative control: which part of its control's gain it has without the task's reward."""
    lines = []
    rows = {row.arm: row for row in report.arms}
    for row in report.arms:
        if row.origin != "point" or is_noisy(row.config) or row.control not in rows:
            continue
        gains = [
            one.score - one.score_start
            for one in (row, rows[row.control])
            if one.score is not None and one.score_start is not None
        ]
        if len(gains) == 2:
            own, full = (f"{100 * gain:+.1f}" for gain in gains)
            lines.append(
                f"{row.arm}: negative control, {row.config.grpo.reward} reward: {own} points since its start, "
                f"{row.control} {full}: so much of a gain needs no {rows[row.control].config.grpo.reward} reward"
            )
    return lines


def _curve_lines(report: StudyReport) -> list[str]:
    """pass@k over k of every arm, where answers were sampled; below it what it is."""
    lines, rows = [], curve_rows(report.arms)
    for row in rows:
        line = f"{row['arm']}: pass@{row['k']} {points(row['start'])} -> {points(row['share'])} {_range(row, '')}"
        if row["difference"] is not None:
            known = row["replicates"] >= MIN_REPLICATES and row["difference_low"] is not None
            apart = _range(row, "difference_", sign="+") if known else "[unknown]"
            line += f", {100 * row['difference']:+.1f} points {apart} to {row['control']}: {row['verdict']}"
        lines.append(line)
    if rows:
        band = "seeds and questions" if all(row["seeds"] for row in rows) else "questions (below 3 runs), seeds too"
        lines.append(
            f"pass@k: of sampled answers, unbiased; bands over {band}; differences paired by seed, corrected for the "
            "arms and the k that share a control"
        )
    return lines


def _range(row: Mapping[str, Any], prefix: str, sign: str = "") -> str:
    low, high = (100 * row[f"{prefix}{end}"] for end in ("low", "high"))
    return f"[{low:{sign}.1f}, {high:{sign}.1f}]"


def confirmation_lines(state: Confirmation, where: str = "") -> list[str]:
    """The verdict, with all that it hangs on; `where`: options that find the sweep again."""
    seen, config = state.comparison, state.config
    of = "" if config.measure == "accuracy" else f" of {config.measure}"
    lines = [
        f"{state.winner} against {state.control}: {seen.words() if state.finding is None else state.finding.words()}",
        f"  difference {_apart(seen, 2)} points{of} {interval(seen)} (95 % over all looks), "
        f"with fresh seeds ({state.pairs}), on the confirmation questions",
        f"  looks after {', '.join(map(str, state.looks))} replicates; "
        "collapsed replicates count with the accuracy at their stop",
    ]
    if state.finding is not None and (said := state.finding.risk_words()):
        lines.append(f"  {said}")
        needed = state.finding.runs + (state.finding.needs or 0)
        if state.finding.verdict == "better where it holds" and state.looks[-1] < needed and not state.unfinished:
            lines.append(f"  to find out: {config.go_on}{where} --looks {','.join(map(str, (*state.looks, needed)))}")
    if state.arms is not None:
        risks = state.arms
        lines.append(
            f"  collapsed: {_risk(risks.treated_risk)}, control {_risk(risks.control_risk)}, "
            f"different at p = {risks.risk_p:.2g}"
        )
        if risks.completed is not None and (risks.treated_risk.collapsed or risks.control_risk.collapsed):
            lines.append(f"  completed pairs alone: {_apart(risks.completed, 2)} points {interval(risks.completed)}")
    lines += [f"  {note}" for note in state.notes]
    left = [look for look in state.looks if look > state.replicates]
    if state.unfinished and state.budget_spent:
        lines.append(f"  its budget is spent; with a larger one: {config.go_on}{where} --budget HOURS")
    elif state.unfinished:
        lines.append(f"  {state.unfinished} trials are not finished; go on: {config.go_on}{where}")
    elif left and not state.settled:
        lines.append(f"  looks after {', '.join(map(str, left))} pairs are left; go on: {config.go_on}{where}")
    return lines


def plan_lines(plan: StudyPlan) -> list[str]:
    study, config = plan.study, plan.config
    lines = [f"space {study.space.name} ({study.space.description}) on workload {study.workload}", *overridden(study)]
    for number, arm in enumerate(plan.arms):
        step = recorded_collapse(arm)
        recorded = "" if step is None else f"   recorded: collapsed {in_step(step, arm.config.grpo.steps)}"
        lines.append(f"  {number:2d}  {arm.name:28s} {describe_noise(arm.config)}{recorded}")
    if plan.searched:
        lines.append(f"  {len(plan.arms):2d}+ {plan.searched} configurations chosen by {study.searcher} from:")
        for dimension in study.space.dimensions:
            domain = dimension.domain
            values = " | ".join(domain.options) if domain.kind == "choice" else f"{domain.low:g} .. {domain.high:g}"
            condition = (
                f"   where {dimension.when.parent} = {' | '.join(dimension.when.labels)}" if dimension.when else ""
            )
            lines.append(f"        {dimension.key:22s} {values}{condition}")
    last = study.seed_of(study.replicates - 1)
    counted = f"runs: {study.runs} = {study.trials} configurations x {study.replicates} replicates"
    if study.total is not None:
        first = len(plan.arms) + plan.searched
        counted = (
            f"runs: {study.runs}: {first} configurations once, then replicates where they matter, "
            f"up to {study.replicates} of an arm"
        )
    lines += [
        f"{counted} (seeds {study.seed} to {last}){', arm by arm' if study.total is None else ''}",
        f"each: {config.grpo.steps} steps of {config.grpo.prompts} x {config.grpo.group_size} completions, "
        f"{config.quant.mode}, filter {config.grpo.filter_groups}",
        *_samples(plan),
        *_cost(plan),
        *_confirmation(plan),
        f"one accuracy has a standard error of {100 * plan.question_se:.1f} points from "
        f"its {config.eval.questions} questions alone",
    ]
    if plan.detectable is not None and plan.difference_sd is not None and plan.study.replicates >= 3:
        lines.append(
            f"smallest difference of one arm that is seen with 80 % power: {100 * plan.detectable:.1f} points "
            f"(seed to seed {100 * plan.difference_sd:.1f}, {plan.sd_source})"
        )
    elif plan.difference_sd is None and study.total is None:
        lines.append(
            "how much differences vary from seed to seed is not known yet: "
            "what it can decide will show after 3 replicates"
        )
    return lines + [f"warning: {line}" for line in plan.warnings]


def _samples(plan: StudyPlan) -> list[str]:
    """What pass@k costs beside the training."""
    config, grpo = plan.config, plan.config.grpo
    if not plan.sampled:
        return []
    trained = grpo.steps * grpo.batch_prompts * grpo.group_size
    return [
        f"pass@k: {config.eval.samples} samples of {config.eval.questions} questions before and after training, "
        f"{plan.sampled:,} answers beside {trained:,} completions of training; "
        "fewer eval.questions or eval.samples cost less"
    ]


def forecast_line(plan: StudyPlan) -> str:
    """Of a sweep that is about to begin, its confirmation included."""
    if plan.wall_seconds is None or plan.confirm_seconds is None:
        return f"how long it takes is not known yet for this model, task and size; {plan.slots} trials at once"
    rest = f" and {duration(plan.confirm_seconds)} for the confirmation" if plan.confirm_runs else ""
    return (
        f"about {duration(plan.wall_seconds)}{rest} at most, {plan.slots} trials at once "
        f"({duration(plan.trial_seconds or 0.0)} each: {plan.seconds_source})"
    )


def _confirmation(plan: StudyPlan) -> list[str]:
    """What follows the sweep by itself."""
    if not plan.confirm_runs:
        return []
    cost = ""
    if plan.confirm_seconds is not None and plan.confirm_hours is not None:
        cost = f": about {duration(plan.confirm_seconds)} and {plan.confirm_hours:.2f} hours more"
    return [
        f"then its candidate is confirmed: up to {plan.study.confirm_pairs} pairs, {plan.confirm_runs} runs with fresh "
        f"seeds and other questions{cost} (--no-confirm leaves that out)"
    ]


def _cost(plan: StudyPlan) -> list[str]:
    """Time and hours, where trials like these have been measured."""
    at_once = f"{plan.slots} at once{_ranks(plan)}"
    if plan.trial_seconds is None or plan.wall_seconds is None or plan.hours is None:
        return [f"time, cost: not known yet for this model, task and size (rin trial tells); {at_once}"]
    unit = "GPU hours" if plan.gpus else f"trial-slot hours on {plan.cpus} CPU each"
    adjusted = plan.adjusted_share
    sooner = f", {duration(plan.wall_seconds * adjusted)} with the collapses that are to be expected"
    cheaper = f", {plan.hours * adjusted:.2f} with collapses"
    return [
        f"time: {duration(plan.trial_seconds)} per trial ({plan.seconds_source}), {at_once}",
        f"      about {duration(plan.wall_seconds)} if nothing collapses{sooner if adjusted < 1 else ''}",
        f"cost: about {plan.hours:.2f} {unit} if nothing collapses{cheaper if adjusted < 1 else ''}",
    ]


def costs_line(plan: StudyPlan) -> str:
    """Below a device's estimate: which of the two figures the costs above it hang on."""
    if plan.trial_seconds is None:
        return "time and cost of the sweep: not known above, and not made of this estimate"
    return (
        f"time and cost of the sweep above are made of {duration(plan.trial_seconds)} per trial "
        f"({plan.seconds_source}), and not of this estimate"
    )


def _ranks(plan: StudyPlan) -> str:
    """Of a trial that several processes compute."""
    if plan.processes == 1:
        return ""
    gpus = f" and {plan.gpus:g} GPUs" if plan.gpus else ""
    return f", each by {plan.processes} processes with {plan.cpus} CPUs{gpus} of one node"


def _apart(comparison: Comparison, digits: int = 1) -> str:
    """In points; without a pair nobody knows."""
    return "unknown" if comparison.replicates == 0 else f"{100 * comparison.difference:+.{digits}f}"


def interval(comparison: Comparison) -> str:
    """In points. That of two replicates reaches beyond all accuracies: they say nothing about their spread."""
    if math.isinf(comparison.low) or comparison.replicates < MIN_REPLICATES:
        return "[unknown]"
    return f"[{100 * comparison.low:+.1f}, {100 * comparison.high:+.1f}]"


def _dose(share: float) -> str:
    """`0.21 %`, `163 %`"""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _collapsed(row: ArmReport) -> str:
    """`2: entropy_high, in steps 4 and 6`; steps count from 0."""
    steps = sorted({trial.step - 1 for trial in row.trials if trial.status == "collapsed"})
    told = " and ".join(map(str, steps))
    return f"{row.collapsed}: {', '.join(row.rules)}, in step{'s'[: len(steps) > 1]} {told}" if row.collapsed else ""


def _runs(row: ArmReport) -> str:
    return f"{row.replicates}" if not row.missing else f"{row.replicates} of {row.replicates + row.missing}"


def _importance(item: Importance) -> str:
    chance = "" if item.chance is None else f"; chance alone stays below {item.chance:.0%}"
    where = "" if item.trials == item.of else f", in the {item.trials} of {item.of} configurations that have it"
    return f"importance of {item.dimension}: {item.importance:.0%}{where}{chance}"


def _risk(risk: CollapseRisk) -> str:
    return f"{risk.collapsed} of {risk.replicates} [{100 * risk.low:.0f}, {100 * risk.high:.0f} %]"


def _completed(row: ArmReport) -> str:
    alone = row.comparison.completed if row.comparison is not None else None
    return "" if alone is None else f"; completed pairs alone {_apart(alone)} points {interval(alone)}"


def _missing(row: ArmReport) -> str:
    assert row.finding is not None
    return row.finding.words().removeprefix("undecided").lstrip(",: ") or "no estimate"


def as_tree(report: StudyReport) -> dict[str, object]:
    """Of `rin report --json`; accuracies and differences are shares."""
    ledger = report.ledger
    return {
        "name": report.config.name,
        "kind": report.config.kind,
        "history": list(report.config.history),
        "extensions": [extension.model_dump() for extension in report.config.extensions],
        "unfinished": report.unfinished,
        "candidate": report.candidate.arm if report.candidate is not None else None,
        "arms": [_row(row) for row in report.arms],
        "controls": [_controls(pair) for pair in report.controls],
        "tolerance": [_finite(asdict(boundary)) for boundary in report.tolerance],
        "importance": [asdict(item) for item in report.importance],
        "failed": list(report.failed),
        "hours": {"total": ledger.hours, **fields_of(ledger, "unit", "collapsed", "repeated", "filtered", "saved")},
    }


def confirmation_tree(state: Confirmation) -> dict[str, object]:
    """Of `rin confirm --json`."""
    return {
        "name": state.config.name,
        "measure": state.config.measure,
        "winner": state.winner,
        "control": state.control,
        "verdict": "undecided" if state.finding is None else state.finding.verdict,
        "words": state.comparison.words() if state.finding is None else state.finding.words(),
        "finding": _finding(state.finding, screened=False),
        "comparison": _comparison(state.comparison),
        **_beside(state.arms),
        "replicates": state.replicates,
        "looks": list(state.looks),
        "unfinished": state.unfinished,
        "notes": list(state.notes),
    }


def _controls(pair: ControlsApart) -> dict[str, object]:
    settings = {key: list(both) for key, both in pair.settings.items()}
    return {"control": pair.control, "other": pair.other, "settings": settings, **(_comparison(pair.comparison) or {})}


def _row(row: ArmReport) -> dict[str, object]:
    return {
        **fields_of(row, "arm", "origin", "candidate", "control", "replicates", "missing", "collapsed"),
        "rules": list(row.rules),
        "accuracy": row.accuracy,
        "accuracy_start": row.start,
        **fields_of(row, "measure", "score", "score_start"),
        "curve": curve_rows([row]),
        "marks": dict(row.marks),
        "warnings": list(row.warnings),
        **fields_of(row, "dose", "hours", "verdict"),
        "finding": _finding(row.finding, screened=True),
        "comparison": _comparison(row.corrected),
        **_beside(row.comparison),
        "config": config_tree(row.config),
    }


def _comparison(comparison: Comparison | None) -> dict[str, object] | None:
    names = ("difference", "low", "high", "p", "replicates", "needs", "unpaired")
    return None if comparison is None else _finite(fields_of(comparison, *names))


def _finding(finding: Finding | None, screened: bool) -> dict[str, object] | None:
    """Accuracies and collapse risk together. Its verdict is `better` (in a sweep `ahead`) only where the risk that is
    not excluded would not cancel the gain; else `better where it holds`."""
    if finding is None:
        return None
    verdict = screening(finding.verdict) if screened else finding.verdict
    names = ("collapsed", "runs", "risk_high", "tipping", "worth", "worth_seen", "needs")
    return {"verdict": verdict, **fields_of(finding, *names)}


def _beside(seen: ArmComparison | None) -> dict[str, object]:
    """What stands beside the comparison of all replicates."""
    if seen is None:
        return {"completed_only": None, "collapse": None}
    risks = {"arm": asdict(seen.treated_risk), "control": asdict(seen.control_risk), "p": seen.risk_p}
    return {"completed_only": _comparison(seen.completed), "collapse": risks}


def _finite(tree: Mapping[str, object]) -> dict[str, object]:
    """An interval that is open on a side has null there."""
    return {key: finite(value) for key, value in tree.items()}

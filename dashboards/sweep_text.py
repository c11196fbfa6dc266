"""What a sweep came to, in words: what stands below its table, what went wrong, the exit code. A result to lines."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from rich.cells import cell_len

from dashboards.tables import duration
from dashboards.trial_rows import Anatomy, Run, anatomies
from search.arms import Candidate, failures, is_negative, trial_folder
from search.confirm import confirm_command
from search.objectives import pareto_front
from search.report import StudyReport
from search.store import BEST_FILE, StudyConfig
from search.study import StudyResult
from spaces.points import POINTS
from trainable.disk.trial_folder import read_reports
from trainable.metrics import SIGMA

COLUMNS = 80
SAMPLES = 2
"""Completions shown of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Example: Ending(lines=("candidate: c03, ...",), commands=("  rin report s   # ...",), troubles=(), code=0)"""

    lines: tuple[str, ...]
    commands: tuple[str, ...]
    """What can be done with it now."""
    troubles: tuple[str, ...]
    """For stderr."""
    code: int
    """0: done, or its budget is spent; 1: trials are missing for another reason."""


def ending_of(result: StudyResult, runs: int, where: str, folder: str) -> Ending:
    """`runs`: trials that were asked for; `where`: options that find the sweep and its tracking again, `folder`: those
    that find its folder, for commands that need no tracking."""
    config = result.config
    again = config.go_on + where
    lines = list(_candidate_lines(result))
    troubles = list(failures(config, result.arms))
    interrupted = not troubles
    if result.untold:
        troubles.insert(
            0,
            f"MLflow did not take {result.untold} records; the sweep's folder has what they are of. "
            f"Once it answers: {again}",
        )
    if config.runs < runs:
        lines.append(f"the space has no further configuration that fits into the trials: {config.trials} were all")
    missing = f"{result.unfinished} of {runs} trials are not finished"
    if result.unfinished and result.budget_spent:
        lines.append(f"the budget of {config.budget_hours:g} hours is spent: {missing}")
        lines.append(f"with a larger one: {config.go_on} --budget HOURS{where}")
    elif result.unfinished:
        troubles.append(f"{'interrupted: ' if interrupted else ''}{missing}; what ran is kept. Go on: {again}")
    code = int(result.unfinished > 0 and not result.budget_spent)
    commands = tuple(_commands(result, where, folder))
    return Ending(lines=tuple(lines), commands=commands, troubles=tuple(troubles), code=code)


def announced(config: StudyConfig, *, begins: bool) -> Iterator[str]:
    """Before anything runs: what else will train than the searcher's configurations. `begins`: not one that goes on."""
    for name in config.points:
        if name in POINTS and (step := POINTS[name].collapsed_at_step) is not None:
            yield f"among them {name}, an experiment of the plan that was recorded to collapse in step {step}"
    if config.confirm_pairs:
        without = " (--no-confirm leaves that out)" if begins else ""
        yield (
            f"then its candidate is confirmed: up to {config.confirm_pairs} pairs of runs, candidate and control, with "
            f"fresh seeds and other questions{without}"
        )


def confirmation_begins(config: StudyConfig, candidate: Candidate) -> Iterator[str]:
    """Where the second part begins, or goes on; how long it takes by the candidate's own runs."""
    seconds = [outcome.seconds for arm in (candidate.arm, candidate.control) for outcome in arm.results.values()]
    runs = 2 * config.confirm_pairs
    yield (
        f"is that a finding? {candidate.arm.name} against {candidate.control.name}: up to {config.confirm_pairs} pairs "
        f"with fresh seeds, on questions that chose nothing; {runs} trials at most, {duration(fmean(seconds))} each"
    )


def _candidate_lines(result: StudyResult) -> Iterator[str]:
    if result.candidate is None:
        hint = "" if result.unfinished else ". Try smaller sigmas, or --set collapse.mode=monitor"
        yield f"no configuration with noise has completed all its replicates: nothing to export{hint}"
        return
    yield candidate_line(result.candidate)
    if (result.candidate.difference or 0.0) <= 0:
        yield "no configuration with noise came out ahead of its control"
    objectives = result.config.objectives
    if len(objectives) > 1:
        treated = [arm for arm in result.arms if arm.origin != "control" and not is_negative(arm)]
        front = pareto_front(treated, objectives, result.config.each)
        yield f"Pareto front of {', '.join(objectives)}: {', '.join(arm.name for arm in front) or 'empty'}"


def _commands(result: StudyResult, where: str, folder: str) -> Iterator[str]:
    if result.candidate is None:
        return
    name, place = result.config.name, result.config.folder.local
    if place is not None:
        yield f"  rin trial --config {place / BEST_FILE}   # repeat it"
    yield f"  rin report {name}{where}   # every arm against its control"
    confirm = confirm_command(result.config, result.candidate.arm.name, where)
    yield f"  {confirm}   # is it a finding? fresh seeds, other questions"
    yield f"  rin export {name}{folder} --to verl   # take it to another trainer"
    yield f"  rin ui {name}{where}   # look at every trial"


def collapse_lines(report: StudyReport) -> list[str]:
    """One collapse as it was: what the model wrote in the step before and in the step in which it broke. That of an
    experiment of the plan where there is one, else the first."""
    rows = sorted(report.arms, key=lambda row: row.origin != "point")
    broken = ((row, number) for row in rows for number, trial in enumerate(row.trials) if trial.status == "collapsed")
    row, replicate = next(broken, (None, 0))
    if row is None:
        return []
    run = Run(
        arm=row.arm,
        replicate=replicate,
        seed=report.config.seed_of(replicate),
        state=row.trials[replicate],
        reports=read_reports(trial_folder(report.config, row.arm, replicate)),
    )
    return [line for anatomy in anatomies(report, [run]) for line in _collapse(anatomy)]


def _collapse(seen: Anatomy) -> Iterator[str]:
    yield f"what a collapse looks like: {seen.name}, {seen.noise}, rule {seen.rule}"
    yield f"  {seen.evidence}"
    for moment in seen.moments[:2]:
        sigma = moment.signals.get(SIGMA)
        head = f"  step {moment.step}" + ("" if sigma is None else f", sigma {sigma:.3g}")
        for sample in moment.samples[:SAMPLES]:
            asked = f"{_cut(sample.prompt, 20, end=True)} -> "
            verdict = f"   reward {sample.reward:.3g}"
            room = COLUMNS - cell_len(f"{head:24s}{asked}{verdict}")
            yield f"{head:24s}{asked}{_cut(sample.completion, room)}{verdict}"
            head = ""


def _cut(text: str, columns: int, *, end: bool = False) -> str:
    """In quotes and escaped, in so many columns; its beginning, or its `end`."""
    shown = repr(text[-columns:] if end else text[:columns])
    while cell_len(shown) > columns:
        text = text[1:] if end else text[: min(len(text), columns) - 1]
        shown = "..." + repr(text[-columns:]) if end else repr(text[:columns]) + "..."
    return shown


def candidate_line(candidate: Candidate) -> str:
    """Example: candidate: c03, +1.2 points against control on the selection questions (...: not a finding)"""
    assert candidate.difference is not None
    measure = candidate.study.measure
    of = "" if measure == "accuracy" else f" of {measure}"
    apart = f"{100 * candidate.difference:+.1f} points{of} against {candidate.control.name}"
    return (
        f"candidate: {candidate.arm.name}, {apart} on the selection questions "
        "(chosen and judged on the same questions: not a finding)"
    )

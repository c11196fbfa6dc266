"""What a sweep came to, in words: what stands below its table, what went wrong, the exit code. A result to lines."""

from collections.abc import Iterator
from dataclasses import dataclass

from search.arms import Candidate, failures, is_negative
from search.objectives import pareto_front
from search.store import BEST_FILE
from search.study import StudyResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Example: Ending(lines=("candidate: c03, ...",), troubles=(), code=0)"""

    lines: tuple[str, ...]
    troubles: tuple[str, ...]
    """For stderr."""
    code: int
    """0: done, or its budget is spent; 1: trials are missing for another reason."""


def ending_of(result: StudyResult, runs: int, where: str, folder: str) -> Ending:
    """`runs`: trials that were asked for; `where`: options that find the sweep and its tracking again, `folder`: those
    that find its folder, for commands that need no tracking."""
    config = result.config
    again = config.go_on + where
    lines = list(_candidate_lines(result, where, folder))
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
    return Ending(lines=tuple(lines), troubles=tuple(troubles), code=code)


def _candidate_lines(result: StudyResult, where: str, folder: str) -> Iterator[str]:
    if result.candidate is None:
        hint = "" if result.unfinished else ". Try smaller sigmas, or --set collapse.mode=monitor"
        yield f"no configuration with noise has completed all its replicates: nothing to export{hint}"
        return
    yield candidate_line(result.candidate)
    if (result.candidate.difference or 0.0) <= 0:
        yield "no configuration with noise came out ahead of its control"
    objectives, name, place = result.config.objectives, result.config.name, result.config.folder.local
    if len(objectives) > 1:
        treated = [arm for arm in result.arms if arm.origin != "control" and not is_negative(arm)]
        front = pareto_front(treated, objectives, result.config.each)
        yield f"Pareto front of {', '.join(objectives)}: {', '.join(arm.name for arm in front) or 'empty'}"
    if place is not None:
        yield f"  rin trial --config {place / BEST_FILE}   # repeat it"
    yield f"  rin report {name}{where}   # every arm against its control"
    yield f"  rin confirm {name}{where}   # is it a finding? fresh seeds, other questions"
    yield f"  rin export {name}{folder} --to verl   # take it to another trainer"
    yield f"  rin ui {name}{where}   # look at every trial"


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

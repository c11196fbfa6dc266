"""A programme in words: what it says, how far it is, where it would go. Records to lines."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from search.program import Walk, path_lines
from search.program_study import ProgramState
from search.what_if import Branch
from spaces.programme import Programme


def programme_lines(programme: Programme) -> Iterator[str]:
    """Its phases and rules."""
    yield f"programme {programme.name}: {programme.about}".rstrip(": ")
    looks = ", ".join(map(str, programme.replicates.looks))
    yield (
        f"{len(programme.experiments)} experiments, looks at {looks} replicates; a false difference anywhere in "
        f"{100 * programme.replicates.level:g} % at most, over {len(programme.comparisons())} comparisons"
    )
    for phase in programme.phases:
        over = f", over the winner of {' or '.join(phase.base)}" if phase.base else ""
        yield f"phase {phase.name}: {phase.goal}"
        yield f"  runs {', '.join(phase.run)}{over}"
        for rule in phase.then:
            asked = "else" if rule.when is None else f"if {rule.when.words()}"
            skip = f"; without {', '.join(rule.skip)}" if rule.skip else ""
            yield f"  {asked}: go to {rule.go}{skip} ({rule.because})"
    for rule in programme.stop:
        assert rule.when is not None
        yield f"after any phase, if {rule.when.words()}: {rule.go} ({rule.because})"
    for name, scenario in programme.scenarios.items():
        yield f"scenario {name}, {scenario.title}: if {scenario.when.words()}"


def state_lines(state: ProgramState) -> Iterator[str]:
    """Registration, path with reasons, next step, lookup table."""
    yield state.registration.words()
    yield from (f"  before it: {earlier.words()}" for earlier in reversed(state.registrations[:-1]))
    for mode, seen in state.walks.items():
        if mode:
            yield f"{mode}:"
        yield from (f"  {line}" if mode else line for line in path_lines(seen))
    if state.table:
        yield "sigma lookup table:"
        yield from (f"  {line}" for line in table_lines(state))


def table_lines(state: ProgramState) -> Iterator[str]:
    """Example: `W4A4: sigma 0.002 held 3 of 3, 0.005 held 1 of 3; half the runs collapse at ...`."""
    bounds = {bound.mode: bound for bound in state.boundaries}
    for mode in dict.fromkeys(row.mode for row in state.table):
        rows = [row for row in state.table if row.mode == mode]
        held = [
            f"{row.sigma:g} held {row.runs - row.collapsed} of {row.runs}" if row.runs else f"{row.sigma:g} has not run"
            for row in rows
        ]
        said = f"; {bounds[mode].words()}" if mode in bounds else ""
        yield f"{mode}: sigma {', '.join(held)}{said}"


def state_tree(state: ProgramState) -> dict[str, Any]:
    """Of `rin program show --json`."""
    return {
        "name": state.study.name,
        "hash": state.registration.hash,
        "registered": state.registration.at,
        "registrations": [{"hash": one.hash, "changes": list(one.changes)} for one in state.registrations],
        "ended": state.ended,
        "modes": {mode: _walk_tree(seen) for mode, seen in state.walks.items()},
        "table": [asdict(row) for row in state.table],
        "boundaries": [asdict(bound) for bound in state.boundaries],
    }


def _walk_tree(seen: Walk) -> dict[str, Any]:
    steps = [{"step": type(step).__name__.lower(), **asdict(step)} for step in seen.steps]
    return {"steps": steps, "replicates": dict(seen.shown), "bases": dict(seen.bases), "winners": dict(seen.winners)}


def branch_line(branch: Branch) -> str:
    """Example: `foundation [7 of 16]: -> sigma, winner e13i-baseline: noise helps (e13i-baseline=3, ...)`."""
    decision = branch.decision
    winner = f", winner {decision.winner}" if decision.winner else ""
    ended = ""
    if branch.end is not None:
        ended = f" | {'no scenario' if branch.end.scenario is None else f'scenario {branch.end.scenario}'}"
    here = {name: said for name, said in branch.assumed.items() if name in decision.replicates}
    example = ", ".join(
        f"{name}={said:g}" if isinstance(said, float) else f"{name}={said}" for name, said in here.items()
    )
    return (
        f"{'  ' * branch.depth}{decision.phase} [{branch.share} of {branch.of}]: -> {decision.go}{winner}: "
        f"{decision.because}{ended} ({example})"
    )

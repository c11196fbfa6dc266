"""Where a programme would go: assumed outcomes walked by its own rules, without training.

An assumed experiment gains so many points on its control with next to no spread, is spread too widely for any verdict
(`undecided`), or `collapses`; whatever is not assumed gains nothing. The tree assumes every combination of four such
outcomes (3 points over the base or control, 0, undecided, collapses) for the experiments of each phase that is reached,
and goes on with one example of those that lead to the same decision and winner, or to the same scenario: a map of the
rules, not of their probabilities.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from search.program import Decision, End, Outcomes, Run, Walk, walk
from search.replicates import Replicate
from spaces.config import ConfigError
from spaces.programme import CONTROL, Programme

Assumed = float | str
"""Points, or `undecided`, or `collapses`."""
KINDS: tuple[Assumed, ...] = (3.0, 0.0, "undecided", "collapses")
"""What the tree assumes of an experiment."""
MOST = 4
"""Experiments of a phase of which the tree takes every combination; of more than that, the rest are level with it."""


def read_assumptions(programme: Programme, given: Sequence[str]) -> dict[str, Assumed]:
    """`["e13i-baseline=2.5", "e13i-high=collapses"]`. Raises ConfigError."""
    found: dict[str, Assumed] = {}
    for text in given:
        name, _, said = text.partition("=")
        if name not in programme.experiments:
            known = ", ".join(programme.experiments)
            raise ConfigError(f"--assume {text}: unknown experiment {name}; choose one of {known}")
        if name in found:
            raise ConfigError(f"--assume {text}: {name} is assumed twice; keep one of the two")
        try:
            found[name] = said if said in ("undecided", "collapses") else float(said)
        except ValueError:
            found[name] = math.nan
        if isinstance(number := found[name], float) and not -40 <= number <= 40:
            raise ConfigError(
                f"--assume {text}: give a gain in points (-40 to 40), undecided or collapses: --assume {name}=1.5"
            )
    return found


def assumed_outcomes(programme: Programme, assumed: Mapping[str, Assumed]) -> Outcomes:
    """Of every replicate that may be asked for."""
    last = programme.replicates.looks[-1]

    def run(k: int, place: int, said: Assumed) -> Replicate:
        if said == "collapses":
            return Replicate(seed=k, accuracy=0.1, collapsed=True)
        if said == "undecided":
            return Replicate(seed=k, accuracy=0.5 + 0.1 * (-1) ** k, collapsed=False)
        gain, wave = float(said) / 100, 0.0005 * math.sin(3.0 * k + place)
        return Replicate(seed=k, accuracy=0.5 + gain + wave, collapsed=False)

    places = enumerate((CONTROL, *programme.experiments))
    return {name: {k: run(k, place, assumed.get(name, 0.0)) for k in range(last)} for place, name in places}


def what_if(programme: Programme, assumed: Mapping[str, Assumed]) -> Walk:
    """The whole way to its end."""
    return walk(programme, assumed_outcomes(programme, assumed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Example: Branch(depth=0, phase="foundation", decision=..., end=None, share=7, of=16, assumed={...})"""

    depth: int
    """Decisions before it."""
    decision: Decision
    end: End | None
    """Where it ends the programme."""
    share: int
    """Combinations of assumed outcomes of its phase that lead here."""
    of: int
    assumed: Mapping[str, Assumed]
    """One of them, with what was assumed before."""


def tree(programme: Programme) -> Iterator[Branch]:
    """Depth first."""
    yield from _grow(programme, {}, 0)


def _grow(programme: Programme, before: Mapping[str, Assumed], depth: int) -> Iterator[Branch]:
    fresh, level = _asked(programme, before)
    kinds = list(product(*[KINDS] * len(fresh[:MOST])))
    groups: dict[tuple[object, ...], list[tuple[dict[str, Assumed], Walk]]] = {}
    for combination in kinds:
        said = [level + one if isinstance(one, float) else one for one in combination]
        assumed = {**before, **dict.fromkeys(fresh, level), **dict(zip(fresh, said, strict=False))}
        seen = what_if(programme, assumed)
        decision = seen.decisions[depth]
        over = isinstance(seen.next, End) and len(seen.decisions) == depth + 1
        leads = seen.scenario if over else decision.winner
        key = (decision.stops, decision.rule, over, leads)
        groups.setdefault(key, []).append((assumed, seen))
    for found in groups.values():
        assumed, seen = found[0]
        over = len(seen.decisions) == depth + 1
        end = seen.next if over and isinstance(seen.next, End) else None
        yield Branch(
            depth=depth,
            decision=seen.decisions[depth],
            end=end,
            share=len(found),
            of=len(kinds),
            assumed=assumed,
        )
        if not over:
            yield from _grow(programme, assumed, depth + 1)


def _asked(programme: Programme, assumed: Mapping[str, Assumed]) -> tuple[list[str], float]:
    """The experiments of the first phase of which nothing is assumed yet, and what the base below them gains."""
    known = {name: runs for name, runs in assumed_outcomes(programme, assumed).items() if name in (CONTROL, *assumed)}
    seen = walk(programme, known)
    names = list(seen.next.replicates) if isinstance(seen.next, Run) else []
    gains = [assumed[seen.bases[name]] for name in names if name in seen.bases]
    return names, next((gain for gain in gains if isinstance(gain, float)), 0.0)

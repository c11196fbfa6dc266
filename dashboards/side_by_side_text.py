"""Two sweeps side by side, as rows, a table and lines. Pure functions of what `search/side_by_side.py` found.

A and B are the two in the order in which they were given; a difference is B minus A.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from dashboards.report_text import interval
from dashboards.tables import empty_table, fields_of, finite, points
from search.confirm import confirm_command
from search.report import ArmReport, screening
from search.side_by_side import Pair, Settings, Side, SideBySide
from search.statistics import Comparison
from spaces.naming import describe_noise

NOT_A_CONFIRMATION = (
    "not a confirmation: arms were chosen on the questions by which they are compared here; for a finding confirm in "
    "each: {here}, {there}"
)


def side_by_side_table(seen: SideBySide) -> Table:
    """An arm of both sweeps in each row, then those of one alone. Numbers stand below each other, so that a narrow
    terminal has room for all of them."""
    table = empty_table("", ("arm", "noise"), ("A", "B", "B - A"))
    table.add_column("verdict", overflow="fold")
    for pair in seen.pairs:
        a, b = seen.here.rows[pair.here], seen.there.rows[pair.there]
        table.add_row(
            a.arm if a.arm == b.arm else f"{a.arm} = {b.arm}",
            _noise(a, b),
            *(escape(_cell(side, row)) for side, row in ((seen.here, a), (seen.there, b))),
            "-" if pair.between is None else escape(_points(pair.between)),
            verdict(pair),
        )
    for letter, side, names in zip("AB", (seen.here, seen.there), seen.alone, strict=True):
        for row in (side.rows[name] for name in names):
            cell = escape(_cell(side, row))
            cells = (cell, "") if letter == "A" else ("", cell)
            table.add_row(row.arm, describe_noise(row.config), *cells, "", f"only in {letter}")
    return table


def _cell(side: Side, row: ArmReport) -> str:
    """What it scores, its difference to its control, how many runs collapsed and how many are missing."""
    own = side.own.get(row.arm)
    lines = [points(row.score), *([] if own is None or own.replicates == 0 else [_points(own)])]
    if row.collapsed:
        lines.append(f"{row.collapsed} of {row.replicates} collapsed")
    if row.missing:
        lines.append(f"{row.replicates} of {row.replicates + row.missing} runs")
    return "\n".join(lines)


def _points(seen: Comparison) -> str:
    return f"{100 * seen.difference:+.1f}\n{interval(seen)}"


def _noise(a: ArmReport, b: ArmReport) -> str:
    """Without the formats and rewards in which they differ, which stand above."""
    one, other = describe_noise(a.config), describe_noise(b.config)
    if one == other:
        return one
    bare = [text.partition(", ")[0] for text in (one, other)]
    return bare[0] if bare[0] == bare[1] else f"{one} | {other}"


def side_by_side_lines(seen: SideBySide) -> tuple[list[str], list[str]]:
    """What stands above the table and below it."""
    above = [f"{letter}: {_title(side)}" for letter, side in (("A", seen.here), ("B", seen.there))]
    above += ["They differ in:" if seen.study or seen.settings or seen.versions else "Nothing in them differs."]
    above += list(_settings_lines("", seen.study))
    above += list(_settings_lines("", seen.settings))
    above += list(_settings_lines("version of ", seen.versions))
    below = list(_pair_lines(seen))
    below += [f"note: {line}" for line in seen.cautions]
    below.append(NOT_A_CONFIRMATION.format(here=_confirmed_by(seen.here), there=_confirmed_by(seen.there)))
    return above, below


def _confirmed_by(side: Side) -> str:
    if side.config.kind == "confirm":
        return side.config.go_on
    candidate = side.report.candidate
    return f"rin confirm {side.config.name}" if candidate is None else confirm_command(side.config, candidate.arm)


def _pair_lines(seen: SideBySide) -> Iterator[str]:
    compared = [pair for pair in seen.pairs if pair.between is not None]
    if not seen.pairs:
        yield "no arm of one did what an arm of the other did: there is nothing to compare"
    elif compared:
        paired = sum(pair.paired for pair in compared)
        how = "paired by seed" if paired == len(compared) else "without common seeds (Welch)"
        if 0 < paired < len(compared):
            how = f"{paired} paired by seed, {len(compared) - paired} without common seeds (Welch)"
        yield "A, B: the score, and with its interval the difference to the control of that sweep"
        yield (
            f"B - A: of controls in accuracy, of arms with noise in what they differ from their control; {how}; "
            f"intervals at 95 % for all {len(compared)} together"
        )
    if any(key.startswith("quant.") for pair in compared for key in pair.settings):
        yield "accuracies are those in the precision of each"
    for pair in seen.pairs:
        name = pair.here if pair.here == pair.there else f"{pair.here} = {pair.there}"
        others = {key: both for key, both in pair.settings.items() if seen.settings.get(key) != both}
        if pair.settings.keys() != seen.settings.keys() or others:
            said = ", ".join(f"{key} {_told(a)} | {_told(b)}" for key, (a, b) in pair.settings.items())
            yield f"{name}: {f'differs in {said}' if said else 'the very same configuration in both'}"
        if pair.note:
            yield f"{name}: {'' if pair.between is not None else 'not compared: '}{pair.note}"


def verdict(pair: Pair) -> str:
    """`B ahead`, `B behind`, `same within ...`, `undecided, ...`"""
    if pair.between is None:
        return "not compared"
    words = screening(pair.between.words())
    return f"B {words}" if words in ("ahead", "behind") else words


def as_tree(seen: SideBySide) -> dict[str, object]:
    """Of `rin report A B --json`; accuracies and differences are shares."""
    return {
        "a": seen.here.config.name,
        "b": seen.there.config.name,
        "study": _tree(seen.study),
        "settings": _tree(seen.settings),
        "versions": _tree(seen.versions),
        "pairs": [_pair(seen, pair) for pair in seen.pairs],
        "only_a": list(seen.alone[0]),
        "only_b": list(seen.alone[1]),
        "notes": list(seen.cautions),
    }


def _pair(seen: SideBySide, pair: Pair) -> dict[str, object]:
    sides = {"a": (seen.here, pair.here), "b": (seen.there, pair.there)}
    return {
        **{key: _arm(side, name) for key, (side, name) in sides.items()},
        "settings": _tree(pair.settings),
        "between": _comparison(pair.between),
        "paired": pair.paired,
        "verdict": verdict(pair),
        "note": pair.note,
    }


def _arm(side: Side, name: str) -> dict[str, object]:
    row = side.rows[name]
    numbers = fields_of(row, "arm", "control", "replicates", "missing", "collapsed", "measure", "score")
    return {**numbers, "noise": describe_noise(row.config), "comparison": _comparison(side.own.get(name))}


def _comparison(seen: Comparison | None) -> dict[str, object] | None:
    if seen is None:
        return None
    found = fields_of(seen, "difference", "low", "high", "p", "replicates", "needs", "unpaired")
    return {key: finite(value) for key, value in found.items()}


def _tree(settings: Settings) -> dict[str, list[object]]:
    return {key: list(both) for key, both in settings.items()}


def _title(side: Side) -> str:
    config, report = side.config, side.report
    ended = sum(row.replicates for row in report.arms)
    what = {"confirm": "confirmation", "program": "programme"}.get(config.kind, config.kind)
    return f"{what} {config.name}: {len(report.arms)} arms, {ended} runs with a number"


def _settings_lines(prefix: str, settings: Settings) -> Iterator[str]:
    for key, (here, there) in settings.items():
        yield f"  {prefix}{key}: {_told(here)} | {_told(there)}"


def _told(value: Any) -> str:
    """As a person reads it: a domain of a space in short."""
    if value is None:
        return "none"
    if isinstance(value, Mapping) and value.get("kind") == "choice":
        return "one of " + ", ".join(value["options"])
    if isinstance(value, Mapping) and {"low", "high"} <= value.keys():
        return f"{value['low']:g} to {value['high']:g}{', in logarithms' if value.get('log') else ''}"
    if isinstance(value, list | tuple):
        return ",".join(map(_told, value)) or "none"
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)

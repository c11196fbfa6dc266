"""Findings of an audit as text: where, how bad, what it means, what to do."""

import textwrap
from collections.abc import Iterator, Sequence

from search.audit.audit import Finding
from search.audit.rules import RULES


def audit_lines(found: Sequence[Finding], files: int) -> Iterator[str]:
    where = f"{files} file{'s'[: files != 1]}"
    for one in found:
        yield f"{one.file}:{one.line}: {one.severity} ({one.rule})"
        yield from textwrap.wrap(one.message, 110, initial_indent="    ", subsequent_indent="    ")
        yield from textwrap.wrap(f"remedy: {one.remedy}", 110, initial_indent="    ", subsequent_indent="    ")
    if not found:
        yield f"nothing found in {where} by {len(RULES)} rules"
        return
    wrong = sum(one.severity == "wrong" for one in found)
    yield f"{len(found)} finding{'s'[: len(found) != 1]} in {where}: {wrong} wrong, {len(found) - wrong} in doubt"

"""Findings: what the rules see in runs, in the order of the files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from search.audit.reading import read_runs
from search.audit.rules import RULES, Severity
from search.audit.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Example: Finding(rule="one-stage", severity="wrong", file="run.sh", line=12, message="...", remedy="...")."""

    rule: str
    severity: Severity
    file: str
    line: int
    message: str
    remedy: str


def audit(paths: Iterable[str]) -> list[Finding]:
    """Of all files together: whether there is a control or a second seed, only all of them tell. Raises ConfigError."""
    return findings([run for path in paths for run in read_runs(path)])


def findings(runs: Sequence[Run]) -> list[Finding]:
    found = [
        Finding(
            rule=rule.id,
            severity=rule.severity,
            file=hit.run.path,
            line=hit.line,
            message=rule.message.format(**hit.values),
            remedy=rule.remedy.format(**hit.values),
        )
        for rule in RULES
        for hit in rule.find(runs)
        if rule.id not in hit.run.meant
    ]
    order = {run.path: place for place, run in reversed(list(enumerate(runs)))}
    return sorted(dict.fromkeys(found), key=lambda one: (order[one.file], one.line))

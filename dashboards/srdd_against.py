"""Two checkpoints side by side: did the layers with high error improve?

Both are scanned in one mode on one set of questions. Of each score: how many layers have less of it in the second, and
Spearman's rank correlation between the first scan's score and what it lost since, with the interval that a programme's
documents have (`search/improvement.py`). A word of warning belongs to it: where two scans differ by chance alone, the
layers that were high by chance come back, and the correlation is above 0 without any cause. So read it where changes
are larger than the intervals of the scans.

NaN rule: a correlation of equal ranks, or of fewer than four layers, is NaN and not known.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from dashboards.srdd_plan import Plan
from dashboards.tables import finite
from search.improvement import spearman
from spaces.config import ConfigError
from trainable.scan import Scan, score

_KINDS = ("relative_error", "deadzone", "sqnr", "deadzone@down", "kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Example: Change(kind="deadzone", before=0.21, after=0.2, better=2, layers=3, spearman=0.4, low=0.1, high=0.6)"""

    kind: str
    before: float
    """Mean score of the layers."""
    after: float
    better: int
    """Layers whose score went down."""
    layers: int
    spearman: float
    """Of the score before with what it lost; above 0: the worst layers lost most."""
    low: float
    high: float


def other_plan(plan: Plan, against: str) -> Plan:
    """The same scan of a checkpoint. Raises ConfigError."""
    folder = Path(against).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--against {against}: no such folder; give one that rin export --to checkpoint has made")
    model = plan.config.model.model_copy(update={"name": str(folder.absolute()), "recipe": None})
    return replace(plan, model=against, config=plan.config.model_copy(update={"model": model}))


def changes(before: Scan, after: Scan) -> tuple[Change, ...]:
    """Of every score that both scans have. Raises ConfigError for models of different depth."""
    if before.depth != after.depth:
        raise ConfigError(
            f"--against {after.model}: has {after.depth} layers, and {before.model} has {before.depth}; "
            "give a checkpoint of the same model"
        )
    return tuple(found for kind in _KINDS if (found := _change(before, after, kind)) is not None)


def _change(before: Scan, after: Scan, kind: str) -> Change | None:
    try:
        first, second = score(before, kind), score(after, kind)
    except ConfigError:  # one of them does not have it, or not of every layer
        return None
    lost = [was - now for was, now in zip(first, second, strict=True)]
    found = spearman(first, lost)
    return Change(
        kind=kind,
        before=fmean(first),
        after=fmean(second),
        better=sum(value > 0 for value in lost),
        layers=len(lost),
        spearman=found.r,
        low=found.low,
        high=found.high,
    )


def lines(found: tuple[Change, ...], before: str, against: str) -> Iterator[str]:
    yield f"{against} against {before}: did the layers with high error improve?"
    yield f"{'score':16s}{'before':>10s}{'after':>10s}{'less in':>14s} {'rank correlation (95 %)':>30s}"
    for one in found:
        told = "-" if math.isnan(one.spearman) else f"{one.spearman:.2f} ({one.low:.2f} to {one.high:.2f})"
        yield (f"{one.kind:16s}{one.before:>10.4g}{one.after:>10.4g}{f'{one.better} of {one.layers}':>14s} {told:>30s}")
    yield "of a layer's score before with what it lost; above 0: the worst layers lost most (docs/srdd.md)"


def as_tree(found: tuple[Change, ...]) -> list[dict[str, Any]]:
    """Null for what is not known."""
    return [{key: finite(value) for key, value in asdict(one).items()} for one in found]

"""The effect receipt as a page that MLflow shows in place: what was quantised, what was noised, and by how much.

`receipt.json` beside it is exact and has every weight; here the weights of one kind are one row per stage. NaN rule: a
number that is not finite is shown as it is.
"""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from statistics import fmean

from trainable.outcome import Effect, EffectReceipt

STYLE = (
    "body{font:14px system-ui,sans-serif;margin:1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:2px 8px;text-align:left}"
)
HEADS = ("stage", "from step", "kind", "weights", "sigma asked for", "sigma applied", "applied, relative", "changed")


def receipt_page(receipt: EffectReceipt) -> str:
    coverage = receipt.coverage
    facts = [
        f"{len(receipt.quantized)} layers quantised, {len(receipt.adapted)} with an adapter, "
        f"{len(receipt.noised)} weights with noise",
        f"of {coverage.weights:,} weights of the blocks' matrices: {coverage.quantized:,} quantised, "
        f"{coverage.excluded:,} excluded, {coverage.left:,} left out",
        *(f"left out: {one.name}, {one.weights:,} weights: {one.reason}" for one in coverage.left_out),
        *(f"{share:.1%} of the trained {kind} moved" for kind, share in receipt.moved.items()),
        *(f"norms: {count} x {name}" for name, count in receipt.norms.items()),
        *(f"warning: {warning}" for warning in receipt.warnings),
        *map(str, receipt.followed),
    ]
    return (
        f'<!doctype html><meta charset="utf-8"><title>Receipt</title><style>{STYLE}</style><h3>What ran</h3>'
        f"<ul>{''.join(f'<li>{escape(fact)}</li>' for fact in facts)}</ul><h3>Noise</h3>{_effects(receipt.effects)}"
    )


def _effects(effects: Sequence[Effect]) -> str:
    if not effects:
        return "<p>None was applied.</p>"
    rows = [HEADS, *_rows(effects)]
    lines = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in _tagged(rows)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _tagged(rows: Sequence[Sequence[str]]) -> Iterable[tuple[str, Sequence[str]]]:
    return (("th" if number == 0 else "td", row) for number, row in enumerate(rows))


def _rows(effects: Sequence[Effect]) -> Iterable[Sequence[str]]:
    def place(effect: Effect) -> tuple[int, int, str]:
        return effect.stage, effect.step, effect.kind

    for (stage, step, kind), found in groupby(sorted(effects, key=place), key=place):
        of = list(found)
        numbers = (fmean(e.nominal for e in of), fmean(e.applied for e in of), fmean(e.applied_relative for e in of))
        shown = [f"{number:.3g}" for number in numbers[:2]]
        yield (
            str(stage),
            str(step),
            kind,
            str(len(of)),
            *shown,
            f"{numbers[2]:.2%}",
            f"{fmean(e.changed for e in of):.1%}",
        )

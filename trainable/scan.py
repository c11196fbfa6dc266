"""What a scan of a model's quantisation errors found (SRDD, "static relative deadzone detection" in the plan), and
what a trial or a table may take from it: scores, the worst layers, multipliers, zones. Without torch, so that whoever
reads a scan needs none; `srdd.py` says how one is made and how each number is defined.

A *site* is a place in a decoder layer whose numbers are rounded. `output` is the residual stream behind the layer,
which the plan scanned; no 4-bit arithmetic rounds it. The inputs of the layer's projections and its weights are what
W4A4 really rounds. A site that a layer does not have, or that stays at 16 bits, is in `missing`, with the reason.

A *score* is one number per layer, never negative, and larger means worse, so that scores of all kinds can be ranked and
made multipliers by the plan's one rule, `layer score / mean score`: decibels and cosines are turned into ratios first.
Of `kl_all_but` it is 1 / KL: the less KL is left without a layer, the more of it was that layer's.
`deadzone@down` is the score `deadzone` at the site `down`; without a site it is `output`, as in the plan.

NaN rule: a number that is not finite stays one in a record and is null in JSON; a score that has one is refused.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from spaces.errors import ConfigError

VERSION = 1
"""Of the JSON form. Raise it when a number changes its meaning: a scan of another version is refused."""

SITES = ("output", "qkv", "o", "gate_up", "down", "weights")
"""Of a decoder layer: behind it; the inputs of queries, keys and values, of attention's output projection, of the first
and of the last projection of the MLP; the weights of all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over prompts with a 95 % bootstrap interval over them; NaN bounds where one prompt cannot tell.

    Example: Estimate(value=0.339, low=0.331, high=0.347)
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteErrors:
    """What rounding does at one site of one layer; each number is a prompt's, then the mean over prompts. Weights are
    one set of numbers, whose bounds are the value itself."""

    relative_error: Estimate
    """Mean of |q - x| / |x| over elements; not a number to use where operands are rotated."""
    deadzone: Estimate
    """Share of the elements that are rounded to zero."""
    saturation: Estimate
    """Share of the blocks that hold an element beyond the largest value of their grid."""
    sqnr_db: Estimate
    """Energy of x over that of the error, all tokens together: few huge first tokens decide it."""
    sqnr_token_db: Estimate
    """The same of each token alone, the first one left out: the median. Of weights: of a row."""
    sqnr_first_token_db: Estimate | None
    """Of each prompt's first token; None where no row is known to be that (weights, an expert's inputs)."""
    nmse: Estimate
    """Energy of the error over that of x."""
    scale_bias: Estimate
    """Shares of the error's energy, which add up to 1 (`srdd.py`): by the block's scale not being the ideal one; may be
    negative, where that scale makes up for other errors."""
    dead: Estimate
    """By small values that the ideal scale would round to zero, too."""
    grid: Estimate
    """By the distance of grid points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSensitivity:
    """What a layer's rounding does to the model and to learning (`sensitivity.py`)."""

    kl_alone: Estimate
    """KL in nats per token at the logits, of the unquantised model to the one in which this layer alone is quantised.
    """
    kl_all_but: Estimate
    """The same where all layers but this one are quantised."""
    fisher: Estimate
    """What one backward pass foresees of kl_alone, in its unit."""
    cosine: Estimate
    """Between the layer's gradients in quantised and in unquantised arithmetic; NaN where no gradient is."""
    norm_ratio: Estimate
    """Of those gradients."""
    survival: Estimate
    """Share of the layer's weights whose code one GRPO step changes: one step, so without bounds. NaN with adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScan:
    layer: int
    sites: Mapping[str, SiteErrors]
    """By SITES."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Sites without numbers, and why."""
    functional: LayerSensitivity | None = None
    """None: not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Purchase:
    """A change of arithmetic, what it costs and what it saves (`purchases.py` says how a bit is counted).

    Example: Purchase(what="layer 3 at 16 bits", layers=(3,), weight_bits=0.39, activation_bits=0.39, kl_saved=...)
    """

    what: str
    layers: tuple[int, ...]
    """Lifted to 16 bits; empty where all layers change."""
    weight_bits: float
    """More bits of a weight than now, on average over the multiplications of the blocks."""
    activation_bits: float
    """The same of the other operand."""
    kl_saved: Estimate
    """In nats per token at the logits; below 0 where the change does harm."""


def kl_per_bit(bought: Purchase) -> float:
    """KL saved per bit of an operand pair. What costs no bits is infinite, with the sign of what it saves."""
    bits = bought.weight_bits + bought.activation_bits
    if bits == 0:
        return math.copysign(math.inf, bought.kl_saved.value)
    return bought.kl_saved.value / bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """JSON: `as_tree`, back by `from_tree`."""

    model: str
    """As in model.name."""
    fingerprint: str
    """Of its weights: equal ones have equal scans."""
    quant: Mapping[str, Any]
    """The mode, as in `quant` of a trial."""
    depth: int
    source: str
    """Where the tokens come from: prompts, completions, or a file."""
    prompts: int
    tokens: int
    seed: int
    seconds: float
    layers: tuple[LayerScan, ...]
    bought: tuple[Purchase, ...] = ()
    """Sorted by KL saved per bit; empty where it was not asked for."""


# --- the plan's thresholds --------------------------------------------------------------------------------------------


THRESHOLDS: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        "relative_error": (0.10, "high"),
        "deadzone": (0.05, "high"),
        "sqnr_db": (20.0, "low"),
        "saturation": (0.01, "high"),
    }
)
"""The plan's limits, and what a number on the wrong side of its limit is called."""


def statuses(errors: SiteErrors) -> dict[str, str]:
    """By the plan's thresholds: `ok`, `high` or `low`; `unknown` of what is not a number."""

    def status(name: str, limit: float, word: str) -> str:
        value: float = getattr(errors, name).value
        if math.isnan(value):
            return "unknown"
        return word if (value > limit if word == "high" else value < limit) else "ok"

    return {name: status(name, limit, word) for name, (limit, word) in THRESHOLDS.items()}


# --- scores -----------------------------------------------------------------------------------------------------------


def _ratio(sqnr_db: float) -> float:
    """Noise over signal, as amplitudes."""
    ratio: float = 10.0 ** (-sqnr_db / 20)
    return ratio


SCORES: Mapping[str, tuple[str, str, Callable[[float], float]]] = MappingProxyType(
    {
        "relative_error": ("sites", "relative_error", float),
        "deadzone": ("sites", "deadzone", float),
        "saturation": ("sites", "saturation", float),
        "sqnr": ("sites", "sqnr_token_db", _ratio),
        "sqnr_global": ("sites", "sqnr_db", _ratio),
        "nmse": ("sites", "nmse", float),
        "kl": ("functional", "kl_alone", float),
        "kl_all_but": ("functional", "kl_all_but", lambda kl: 1 / kl if kl else math.inf),
        "fisher": ("functional", "fisher", float),
        "cosine": ("functional", "cosine", lambda cosine: 1 - cosine),
        "norm_ratio": ("functional", "norm_ratio", lambda ratio: abs(math.log(ratio))),
        "survival": ("functional", "survival", lambda share: 1 - share),
    }
)
"""By name: the part of a layer that has it, its field there, and what makes it one of which more is worse."""


def score(scan: Scan, kind: str) -> tuple[float, ...]:
    """One number per layer; larger is worse. Raises ConfigError for a kind that there is not, and for one of which the
    scan does not have every layer."""
    part, name, worse = _score_of(kind)
    site = kind.partition("@")[2] or "output"
    values = []
    for layer in scan.layers:
        record = layer.functional if part == "functional" else layer.sites.get(site)
        if record is None and part == "functional":
            raise ConfigError(f"srdd:{kind}: the scan of {scan.model} has no functional part; scan it with that part")
        if record is None:
            reason = layer.missing.get(site, "it has no such site")
            have = [other for other in SITES if all(other in each.sites for each in scan.layers)]
            raise ConfigError(
                f"srdd:{kind}: layer {layer.layer} of {scan.model} has no {site} errors ({reason}); "
                f"choose one of {', '.join(have) or 'the functional scores'}"
            )
        values.append(worse(getattr(record, name).value))
    bad = next((scan.layers[i].layer for i, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        raise ConfigError(f"srdd:{kind}: of layer {bad} of {scan.model} it is not finite; choose another score")
    return tuple(values)


def _score_of(kind: str) -> tuple[str, str, Callable[[float], float]]:
    name, at, site = kind.partition("@")
    known = SCORES.get(name)
    if known is None:
        raise ConfigError(f"srdd:{kind}: unknown score {name}; choose one of {', '.join(SCORES)}")
    if at and (site not in SITES or known[0] != "sites"):
        static = ", ".join(key for key, (part, *_) in SCORES.items() if part == "sites")
        raise ConfigError(f"srdd:{kind}: no such site; give one of {', '.join(SITES)} behind one of {static}")
    return known


def check_score(kind: str) -> None:
    """Before there is a scan. Raises ConfigError for a kind that there is not."""
    _score_of(kind)


def worst(scan: Scan, k: int, kind: str = "relative_error") -> tuple[int, ...]:
    """The k layers with the largest score, the worst first; of equal ones the lower index. Raises ConfigError where
    the model does not have so many."""
    if not 1 <= k <= scan.depth:
        raise ConfigError(f"srdd:top{k}: {scan.model} has {scan.depth} layers; give 1 to {scan.depth}")
    scores = score(scan, kind)
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return tuple(scan.layers[i].layer for i in ranked[:k])


def multipliers(scan: Scan, kind: str) -> tuple[float, ...]:
    """A factor per layer, by the plan's rule: the layer's score over the mean score, so that their mean is 1. Raises
    ConfigError where all scores are 0."""
    scores = score(scan, kind)
    mean = math.fsum(scores) / len(scores)
    if min(scores) < 0 or mean == 0:
        raise ConfigError(f"srdd:{kind}: makes no multipliers of {scan.model}: its scores are 0; choose another score")
    return tuple(value / mean for value in scores)


# --- zones from the profile -------------------------------------------------------------------------------------------


def zones(profile: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Stretches of layers, first to last, within which a profile is level, by its change points.

    For each number of stretches the cut with the least squared deviation from their means, by dynamic programming;
    among those numbers the one with the least Schwarz criterion, n log(deviation / n) + 2 m log n for m stretches: each
    adds a mean and a place. A stretch has two layers or more. Where the profile is level, that is one stretch.

    Example: (1, 1, 1, 5, 5, 5) -> ((0, 2), (3, 5))
    """
    values = np.asarray(profile, dtype=float)
    n = len(values)
    sums, squares = np.concatenate([[0.0], values.cumsum()]), np.concatenate([[0.0], (values**2).cumsum()])

    def deviation(start: int, end: int) -> float:
        return float(max(squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / (end - start), 0.0))

    best: dict[int, tuple[float, tuple[int, ...]]] = {
        end: (deviation(0, end), (0, end)) for end in range(min(2, n), n + 1)
    }  # by where the last stretch ends
    # Rounding noise of the values is no level: without a floor, two equal values would cut out a zone of their own.
    floor = 1e-6 * max(float((values**2).sum()), 1e-300)
    found = best[n]
    least = _schwarz(found, n, floor)
    for stretches in range(2, n // 2 + 1):
        longer = {}
        for end in range(2 * stretches, n + 1):
            longer[end] = min(
                (best[cut][0] + deviation(cut, end), (*best[cut][1], end)) for cut in range(2 * stretches - 2, end - 1)
            )
        best = longer
        if (criterion := _schwarz(best[n], n, floor)) < least:
            found, least = best[n], criterion
    return tuple((start, end - 1) for start, end in pairwise(found[1]))


def _schwarz(cut: tuple[float, tuple[int, ...]], n: int, floor: float) -> float:
    deviation, borders = cut
    return n * math.log((deviation + floor) / n) + 2 * (len(borders) - 1) * math.log(n)


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_tree(scan: Scan) -> dict[str, Any]:
    """Plain values with the version in front; null for what is not finite."""
    return {"version": VERSION, **_plain(scan)}


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_tree(tree: Any, origin: str) -> Scan:
    """Raises ConfigError, which names the origin, for what `as_tree` has not made."""
    version = tree.get("version") if isinstance(tree, Mapping) else None
    if version != VERSION:
        said = "no scan" if version is None else f"a scan of version {version}, and this program reads {VERSION}"
        raise ConfigError(f"{origin}: {said}; make it anew: rin srdd MODEL --json")
    try:
        scan: Scan = _built(Scan, tree)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of somebody's own making
        raise ConfigError(f"{origin}: is no whole scan ({error}); make it anew: rin srdd MODEL --json") from None
    return scan


def load_scan(path: Path) -> Scan:
    """Raises ConfigError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give what rin srdd --json wrote") from None
    except ValueError:
        raise ConfigError(f"{path}: is no JSON; give what rin srdd --json wrote") from None
    return from_tree(tree, str(path))


def _built(kind: Any, value: Any) -> Any:
    """A value of this type from its plain form."""
    origin, inner = get_origin(kind), get_args(kind)
    if hasattr(kind, "__dataclass_fields__"):
        hints = get_type_hints(kind)
        return kind(**{name: _built(hints[name], value[name]) for name in kind.__dataclass_fields__})
    if origin in (Union, UnionType):
        return None if value is None else _built(inner[0], value)
    if origin is tuple:
        return tuple(_built(inner[0], one) for one in value)
    if origin is not None and issubclass(origin, Mapping):
        return {key: _built(inner[1], one) for key, one in value.items()}
    if kind is float:
        return math.nan if value is None else float(value)
    if kind is not Any and not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value

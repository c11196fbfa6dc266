"""Settings that follow a scan of a model's quantisation errors: how they are written, and what must hold before there
is a scan.

    noise.layers=srdd:top5                  the five worst layers by the relative error of their outputs
    noise.layers=srdd:deadzone@down:top5    by another score, at another site
    noise.layer_multipliers=srdd:deadzone   a factor per layer: its score over the mean score
    quant.skip_layers=srdd:top2             the two worst layers stay at 16 bits

A trial puts plain numbers in their place before anything else happens (`trainable/following.py`); whoever meets such a
text where no scan was made refuses it (`refuse_rule`).

The names are those of `trainable.scan`, which a test compares; here they can be asked without it.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from spaces.errors import ConfigError

Number = TypeVar("Number", int, float)
PREFIX = "srdd"
STATIC = ("relative_error", "deadzone", "saturation", "sqnr", "sqnr_global", "nmse")
"""Scores of the errors at a site."""
FUNCTIONAL = ("kl", "kl_all_but", "fisher", "cosine", "norm_ratio", "survival")
"""Scores of what a layer's rounding does to the model: minutes on a large one."""
UPDATES = ("cosine", "norm_ratio", "survival")
"""Those of them that hang on how is learned."""
SITES = ("output", "qkv", "o", "gate_up", "down", "weights")
"""Of a layer; the first is meant where none is named."""
RANKED = {"noise.layers": True, "noise.layer_multipliers": False, "quant.skip_layers": True}
"""Settings that may follow a scan: by its worst layers, or by a score of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Example: parse_rule("srdd:deadzone@down:top5", ranked=True) == Rule(score="deadzone@down", top=5)."""

    score: str
    top: int = 0
    """So many of the worst layers; 0: a factor for each."""

    @property
    def functional(self) -> bool:
        return self.score in FUNCTIONAL

    @property
    def site(self) -> str:
        return self.score.partition("@")[2] or SITES[0]

    def check_depth(self, key: str, depth: int | None) -> None:
        """Raises ConfigError for more of the worst layers than there are; None: not known yet."""
        if depth is not None and self.top > depth:
            raise ConfigError(f"{key}: the worst {self.top} of {depth} layers; give top1 to top{depth}")

    def lacks(self, weights: str, activations: str) -> str:
        """What would have to be quantised for there to be such a score; empty where it is."""
        if weights == activations == "none":
            return "nothing is quantised, so there is nothing to scan; choose a format, or give numbers"
        if self.functional:
            return ""
        if activations == "none" and self.site != "weights":
            return f"inputs are not quantised; choose {self.score.partition('@')[0]}@weights"
        if weights == "none" and self.site == "weights":
            return "weights are not quantised; choose another site"
        return ""


def is_rule(value: Any) -> bool:
    return isinstance(value, str) and value.partition(":")[0] == PREFIX


def parse_rule(text: str, *, ranked: bool) -> Rule:
    """Raises ValueError with what was probably meant."""
    prefix, *parts = text.split(":")
    example = "srdd:top5 or srdd:deadzone:top5" if ranked else "srdd:relative_error or srdd:deadzone"
    if prefix != PREFIX or not 1 <= len(parts) <= (2 if ranked else 1):
        raise ValueError(f"{text} names no part of a scan; write {example}")
    top = re.fullmatch(r"top([1-9]\d*)", parts[-1])
    if ranked and top is None:
        raise ValueError(f"{text} does not say how many of the worst layers; write {example}")
    if not ranked and top is not None:
        raise ValueError(f"{text} ranks layers, and multipliers follow their scores; write {example}")
    score = parts[0] if len(parts) > 1 or not ranked else STATIC[0]
    _check_score(text, score)
    return Rule(score=score, top=int(top[1]) if top else 0)


def _check_score(text: str, score: str) -> None:
    name, at, site = score.partition("@")
    known = (*STATIC, *FUNCTIONAL)
    if name not in known:
        raise ValueError(f"{text}: unknown score {name}; did you mean {_nearest(name, known)}? (of {', '.join(known)})")
    if at and name in FUNCTIONAL:
        raise ValueError(f"{text}: {name} is a whole layer's and has no site; write {name}")
    if at and site not in SITES:
        raise ValueError(f"{text}: unknown site {site}; did you mean {_nearest(site, SITES)}? (of {', '.join(SITES)})")


def _nearest(word: str, known: tuple[str, ...]) -> str:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def refuse_rule(key: str, value: object) -> None:
    """Raises ConfigError where nobody has made the scan that a setting follows."""
    if is_rule(value):
        raise ConfigError(
            f"{key}={value}: follows a scan, and only a trial makes one; give numbers (of its receipt, or by rin srdd)"
        )


def settled(key: str, value: tuple[Number, ...] | str) -> tuple[Number, ...]:
    """The numbers. Raises ConfigError for a rule."""
    refuse_rule(key, value)
    assert not isinstance(value, str), value
    return value

"""What verl gives an answer whose rows come without a reward function: by the row's `data_source`, as there.

- `openai/gsm8k`: 1 when the number behind the last "#### " is the truth, as text without commas; else 0. Only the end
  of an answer is looked at, 300 characters.
- MATH (`lighteval/MATH` and its namesakes, `math_dapo`, `aime...`): whether the two are the same mathematics, asked of
  the package math-verify, as verl's own `math_verify.py` asks it. Its defaults compare texts that were brought into one
  form by long lists of exceptions; the two differ where such a list fails (0.5 against \\frac{1}{2}). `math_dapo` and
  `aime...` give 1 and -1, as there; the others 1 and 0.

Other sources (code, geometry, search) need a sandbox or lists like those, and are refused.
"""

import re
from collections.abc import Callable
from typing import Any

_GSM8K = re.compile(r"#### (-?[0-9.,]+)")
_LOOKED_AT = 300
_MATH = ("lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500")
_DAPO = ("math_dapo", "math", "math_dapo_reasoning")

Scorer = Callable[[str, str], float | dict[str, float]]


def scorer_of(data_source: str) -> Scorer | None:
    """None where there is none here."""
    if data_source == "openai/gsm8k":
        return gsm8k
    if data_source in _MATH:
        return same_mathematics
    return signed_mathematics if data_source in _DAPO or data_source.startswith("aime") else None


SOURCES = ", ".join(("openai/gsm8k", *_MATH, *_DAPO, "aime..."))


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> Any:
    """As verl calls it."""
    scorer = scorer_of(data_source)
    assert scorer is not None, data_source  # rows of other sources were refused when they were read
    return scorer(solution_str, ground_truth)


def gsm8k(text: str, truth: str) -> float:
    found = _GSM8K.findall(text[-_LOOKED_AT:])
    return float(bool(found) and found[-1].replace(",", "") == truth)


def same_mathematics(text: str, truth: str) -> float:
    """Of any expression in the text that math-verify finds; what it cannot read, or not in time, is worth 0."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    true = parse(f"\\boxed{{{truth}}}", (LatexExtractionConfig(),))
    said = parse(text, (ExprExtractionConfig(), LatexExtractionConfig()))
    return float(any(verify(gold, one) for gold in true for one in said))


def signed_mathematics(text: str, truth: str) -> dict[str, float]:
    right = same_mathematics(text, truth)
    return {"score": 2 * right - 1, "acc": right}

"""reasoning_gym's procedural data sets as a source of questions and of partial credit, with the care that outside code
needs.

Its scorers meet model output, so a few exception types are caught around them, and only here: such an answer is worth
0. Its data sets were tried one by one (version 0.1.25: 60 questions each in two processes with different hash seeds, 40
kinds of garbage marked): those whose questions differ between processes, or whose scorer executes the answer, never
returns or pays for garbage, are refused by name with the reason. Six scorers pass lists or sums to eval(); there an
answer in other characters is worth 0 unseen. Partial credit is reasoning_gym's own: many data sets give 0.01 to 0.1 to
a wrong answer, or a share to a text that contains the right one. Left out: a time limit on scorers; data sets whose
options are lists.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from spaces.config import ConfigError

CHUNK = 64
"""Questions taken from a data set before it is built again with another seed."""

_IRREPRODUCIBLE = "it makes other questions in every process, so trials can be neither compared nor resumed"
REFUSED: dict[str, str] = {
    "codeio": _IRREPRODUCIBLE,
    "coin_flip": "its scorer does not return from the answer 1e99999999",
    "complex_arithmetic": "its scorer takes nan for every answer",
    "composite": "it is a mixture of data sets; name them (a+b)",
    "game_of_life_halting": "its scorer takes any text for the answer False",
    "intermediate_integration": _IRREPRODUCIBLE,
    "isomorphic_strings": _IRREPRODUCIBLE,
    "knight_swap": _IRREPRODUCIBLE,
    "list_functions": _IRREPRODUCIBLE,
    "polynomial_multiplication": _IRREPRODUCIBLE,
    "ransom_note": _IRREPRODUCIBLE,
    "simple_integration": "its scorer executes the answer as Python code",
    "word_ladder": _IRREPRODUCIBLE,
}
_SUM = re.compile(r"(?!.*\*\s*\*)[0-9\s+\-*/()]{1,200}", re.DOTALL)  # without powers: 9**9**9 does not return
_TABLE = re.compile(r"[0-9A-Z_\s,'\"\[\]]{1,5000}")  # no lower case and no parentheses: no keywords, no calls
HARMLESS: dict[str, re.Pattern[str]] = {
    "binary_matrix": _TABLE,
    "countdown": _SUM,
    "n_queens": _TABLE,
    "puzzle24": _SUM,
    "spiral_matrix": _TABLE,
    "string_insertion": _TABLE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GymDataset:
    name: str
    options: Mapping[str, Any]
    scorer: Any
    """An instance of the data set; marking needs its options, not its questions."""

    def entries(self, rng: Random) -> Iterator[Mapping[str, Any]]:
        """Endless: {"question": ..., "answer": ..., "metadata": ...}."""
        while True:
            chunk = _create(self.name, self.options, seed=rng.getrandbits(31))
            yield from map(chunk.__getitem__, range(CHUNK))

    def score(self, completion: str, entry: Mapping[str, Any]) -> float:
        """The mark in [0, 1]; anything else that the scorer says or does about a bad answer is 0."""
        answer = extract_answer(completion, lines=1 + str(entry["answer"]).count("\n"))
        harmless = HARMLESS.get(self.name)
        if not answer or (harmless is not None and not harmless.fullmatch(answer)):
            return 0.0
        try:
            mark = float(self.scorer.score_answer(answer, entry))
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, SyntaxError, RecursionError):
            return 0.0  # outside code that met model output
        return mark if 0.0 <= mark <= 1.0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GymMixture:
    """Several data sets, each as often as it weighs."""

    parts: Mapping[str, GymDataset]
    weights: Mapping[str, float]

    def entries(self, rng: Random) -> Iterator[Mapping[str, Any]]:
        """Endless, each with the name of its part."""
        sources = {name: part.entries(Random(rng.getrandbits(64))) for name, part in self.parts.items()}
        edges = dict(zip(sources, itertools.accumulate(self.weights[name] for name in sources), strict=True))
        *_, (last, whole) = edges.items()
        while True:
            point = rng.random() * whole
            name = next((name for name, edge in edges.items() if point < edge), last)
            yield {**next(sources[name]), "part": name}

    def score(self, completion: str, entry: Mapping[str, Any]) -> float:
        return self.parts[entry["part"]].score(completion, entry)


def extract_answer(completion: str, lines: int = 1) -> str:
    """The text in the last <answer>...</answer>; without one, the last lines, as many as the reference answer has."""
    before, closed, _ = completion.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return inside.strip() if closed and opened else "\n".join(completion.strip().splitlines()[-lines:]).strip()


def open_gym(name: str, options: Mapping[str, Any]) -> GymDataset | GymMixture:
    """A data set, or a+b, whose options say of which of them they are: {a.weight: 2, b.min_terms: 3}.

    Raises ConfigError for an unknown or refused data set and for options that it does not take.
    """
    names = name.split("+")
    if len(names) == 1:
        return _open(name, options)
    if len(set(names)) < len(names):
        raise ConfigError(f"task.name=reasoning_gym:{name}: names a data set twice; say how often by its weight")
    own: dict[str, dict[str, Any]] = {part: {} for part in names}
    for key, value in options.items():
        part, _, option = key.partition(".")
        if part not in own or not option:
            raise ConfigError(
                f"task.options: {key} of which data set? Say {names[0]}.{option or key}, or {names[1]}.{option or key}"
            )
        own[part][option] = value
    weights = {part: own[part].pop("weight", 1.0) for part in names}
    for part, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise ConfigError(f"task.options: {part}.weight={weight}: give a number above 0, or leave {part} out")
    return GymMixture(parts={part: _open(part, own[part]) for part in names}, weights=weights)


def _open(name: str, options: Mapping[str, Any]) -> GymDataset:
    from reasoning_gym.factory import DATASETS  # a second of imports that other tasks do without

    key = f"task.name=reasoning_gym:{name}"
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{key}: no such data set; did you mean reasoning_gym:{near}?")
    if name in REFUSED:
        raise ConfigError(f"{key}: {REFUSED[name]}; choose another data set, for example reasoning_gym:chain_sum")
    known = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    if unknown := sorted(options.keys() - known):
        raise ConfigError(f"task.options: {name} has no option {unknown[0]}; it has {', '.join(sorted(known))}")
    try:
        scorer = _create(name, options, seed=0)
    except (AssertionError, TypeError, ValueError) as error:  # how its data sets refuse a value
        raise ConfigError(f"task.options: {name} refuses {dict(options)}: {error}; change the options") from None
    return GymDataset(name=name, options=options, scorer=scorer)


def _create(name: str, options: Mapping[str, Any], seed: int) -> Any:
    from reasoning_gym import create_dataset

    return create_dataset(name, **options, seed=seed, size=CHUNK)

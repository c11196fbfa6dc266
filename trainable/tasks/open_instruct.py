"""Rows in the format of open-instruct: a conversation, what is true, and the names of verifiers.

    {"messages": [{"role": ..., "content": ...}, ...], "ground_truth": "42", "dataset": "gsm8k"}

The last message is the model answer and goes, where there is more than one. `dataset` names the verifier, or several,
each with its own member of `ground_truth`; their scores are summed, in 0 to 1 each (open-instruct multiplies by
`--verification_reward`, 10 by default: a scale, which advantages per group divide out again). An answer is correct when
every verifier of its row gives 1. The verifiers here are those that are a rule of a few lines; the others (a judge, a
sandbox, instruction checkers, their normalisation of mathematics) are refused by name. An answer is at worst worth 0,
but for the two lengths, whose scale is open-instruct's own.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spaces.config import TaskConfig
from trainable.tasks.rows import Row, kind_of, read_sets, three_sets
from trainable.tasks.task import RIGHT, Answer, FiniteTask, Question, Task

NEEDS = "a row of task.name=open_instruct has messages (role, content), ground_truth, and dataset (the verifier's name)"
LENGTH_SCALE = 8192
"""Tokens away from the length asked for that cost a whole point, in open-instruct."""
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_COMMA = re.compile(r"(\d),(?=\d)")

Verifier = Callable[[Answer, Any], float]


def bare(text: str) -> str:
    """As SQuAD compares answers: small letters without punctuation, articles and more than one space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1(text: str, truth: str) -> float:
    """Of the words that both have."""
    said, true = bare(text).split(), bare(truth).split()
    common = (Counter(said) & Counter(true)).total()
    return 2 * common / (len(said) + len(true)) if common else 0.0


def spoken(text: str) -> str:
    """Without thoughts and the tags around an answer."""
    said = text.replace("<|assistant|>", "").strip().split("</think>")[-1]
    return said.replace("<answer>", "").replace("</answer>", "").strip()


def _last_number(answer: Answer, truth: Any) -> float:
    """A whole number counts without its sign, as there."""
    numbers = _NUMBER.findall(_COMMA.sub(r"\1", answer.text))
    return float((numbers[-1] if numbers else answer.text).lower() == str(truth).lower())


def _in_tags(answer: Answer, truth: Any) -> float:
    if "<answer>" not in answer.text or "</answer>" not in answer.text:
        return 0.0
    return float(bare(answer.text.split("<answer>")[-1].split("</answer>")[0]) == bare(str(truth)))


def _words(answer: Answer, truth: Any) -> float:
    return max(f1(spoken(answer.text), str(one)) for one in (truth if isinstance(truth, list) else [truth]))


def _flan(answer: Answer, truth: Any) -> float:
    return float(bare(answer.text.split("The answer is: ")[-1]) == bare(str(truth)))


def _whole(answer: Answer, truth: Any) -> float:
    return float(bare(spoken(answer.text)) == bare(str(truth)))


def _length(answer: Answer, truth: Any) -> float:
    return 1 - abs(len(answer.ids) - float(truth)) / LENGTH_SCALE


def _length_at_most(answer: Answer, truth: Any) -> float:
    return 1 - max(len(answer.ids) - float(truth), 0.0) / LENGTH_SCALE


VERIFIERS: dict[str, Verifier] = {
    "gsm8k": _last_number,
    "string_matcher": _in_tags,
    "string_f1": _words,
    "flan": _flan,
    "puzzle": _whole,
    "max_length": _length,
    "up_to_max_length": _length_at_most,
}
LENGTHS = ("max_length", "up_to_max_length")
"""Verifiers that look at no word."""


def build_open_instruct(config: TaskConfig) -> Task:
    """Raises ConfigError for rows that are not so, and for a verifier that is not here."""

    def question_of(row: Row) -> Question:
        messages = row.messages("messages")
        truth = dict(_verified(row))
        answer = next(iter(truth.values())) if len(truth) == 1 else truth
        prompt = messages[:-1] or messages
        if all(role == "system" for role, _ in prompt):
            raise row.mistake("messages", "asks nothing when its last message, the model answer, is taken away")
        return row.question(config, prompt, answer if isinstance(answer, str) else str(answer), {"truth": truth})

    sets = three_sets(read_sets(config.path, config.eval_path, NEEDS), question_of)
    hopeless = [question for part in sets.questions.values() for question in part if not _can_be_met(question)]
    told = (
        [f"{len(hopeless)} rows have a truth that no answer meets, as {hopeless[0].answer!r} of {hopeless[0].where}"]
        if hopeless
        else []
    )
    used = {name for part in sets.questions.values() for question in part for name in question.entry["truth"]}
    return FiniteTask(
        name=config.name,
        reward=_marks,
        weights=dict.fromkeys(sorted(used), 1.0),
        judges={"correct": RIGHT},
        questions=sets.questions,
        warnings=(*sets.warnings, *told),
    )


def _verified(row: Row) -> list[tuple[str, Any]]:
    """Verifier and truth, pair by pair."""
    names, truths = row.take("dataset"), row.take("ground_truth")
    if isinstance(names, str):
        names, truths = [names], truths if isinstance(truths, list) and len(truths) == 1 else [truths]
    if not isinstance(names, list) or not isinstance(truths, list) or len(names) != len(truths) or not names:
        raise row.mistake(
            "ground_truth", f"is {kind_of(truths)} and should have one member for each verifier of dataset ({names})"
        )
    for name, truth in zip(names, truths, strict=True):
        if name not in VERIFIERS:
            raise row.mistake(
                "dataset", f"names the verifier {name}, and those here are {', '.join(VERIFIERS)}; leave such rows out"
            )
        if name in LENGTHS and not _is_number(truth):
            raise row.mistake("ground_truth", f"is {truth!r} and should be a number of tokens for {name}")
        several = name == "string_f1" and isinstance(truth, list) and truth
        if not all(map(_is_text, truth if several else [truth])):
            raise row.mistake("ground_truth", f"is {kind_of(truth)} and should be text for {name}")
    if len(set(names)) < len(names):
        raise row.mistake("dataset", f"names a verifier twice ({', '.join(names)})")
    return list(zip(names, truths, strict=True))


def _can_be_met(question: Question) -> bool:
    """Whether the truth itself is right, in the form that is asked for: `-5` is not for gsm8k, nor is `1,000`."""
    for name, truth in question.entry["truth"].items():
        said = str(truth[0] if isinstance(truth, list) else truth)
        answer = Answer(question=question, text=f"<answer>{said}</answer>" if name == "string_matcher" else said)
        if name not in LENGTHS and VERIFIERS[name](answer, truth) < RIGHT:
            return False
    return True


def _is_text(truth: Any) -> bool:
    """Or a number, which is read as text."""
    return isinstance(truth, str | int | float) and not isinstance(truth, bool)


def _is_number(truth: Any) -> bool:
    try:
        return 0 <= float(truth) < float("inf")
    except (TypeError, ValueError):
        return False


def _marks(answers: Sequence[Answer]) -> list[Mapping[str, float | None]]:
    marked: list[Mapping[str, float | None]] = []
    for answer in answers:
        marks = {name: VERIFIERS[name](answer, truth) for name, truth in answer.question.entry["truth"].items()}
        marked.append({**marks, "correct": float(min(marks.values()) >= RIGHT)})
    return marked

"""What must hold of a reward that somebody brought along, before anything is learned from it.

On a few rows: the known answer is right and scores more than an empty one and than the known answer of another row,
which are wrong; every mark is a finite number; the same answer scores the same again, in another order. What the user's
code expects around an answer nobody says, so the known answer is tried in the forms that are usual, and the form in
which most rows come out right is taken. Where no answer is known, or all rows have the same, that part is not checked,
and says so.

A reward may be meant to fail this (form alone, chance, length): task.reward_check=warn.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainable.tasks.task import Answer, Question, Score, Task

ROWS = 8
FORMS = ("{}", "#### {}", "\\boxed{{{}}}", "<answer>{}</answer>", "<think>So it is.</think>\n<answer>{}</answer>")
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Example: Finding(part="wrong answers score less", state="failed", detail="train.parquet row 3: an empty answer
    scores 1, and the known one 1")"""

    part: str
    state: Literal["holds", "failed", "not checked"]
    detail: str


def check_contract(task: Task, questions: Sequence[Question], encode: Encode, per_step: int) -> list[Finding]:
    """`per_step`: answers that a step has, of which the time is told. Raises ConfigError for what the user's code
    raises."""
    questions = questions[:ROWS]

    def scores(asked: Sequence[tuple[Question, str]]) -> list[Score]:
        return task.scores([Answer(question=q, text=text, ids=tuple(encode(text))) for q, text in asked])

    known = _known(questions, scores)
    wrong = [(question, "") for question in questions]
    others = _of_other_rows(questions, known)
    asked = [*zip(questions, known, strict=True), *wrong, *others] if known else wrong
    started = time.perf_counter()
    first = scores(asked)
    seconds = (time.perf_counter() - started) / len(asked)
    again = scores(asked[::-1])[::-1]
    rights = dict(zip(map(id, questions), first, strict=False)) if known else {}
    return [
        _known_score_high(questions, known, first) if known else _unknown("known answers are right"),
        *_wrong_score_less("an empty answer is wrong", wrong, first[len(known) :], rights),
        *(
            _wrong_score_less("another row's answer is wrong", others, first[len(known) + len(wrong) :], rights)
            if others
            else [_unknown("another row's answer is wrong")]
        ),
        _the_same_twice(asked, first, again),
        Finding(
            part="time",
            state="holds",
            detail=f"{1000 * seconds:.2g} ms an answer, {seconds * per_step:.2g} s a batch of {per_step}",
        ),
    ]


def _unknown(part: str) -> Finding:
    return Finding(part=part, state="not checked", detail="no answer is known, or no two differ")


def _known(questions: Sequence[Question], scores: Callable[[Any], list[Score]]) -> list[str]:
    """A completion per question that should be right; none where no answer is known."""
    told = [_told(question) for question in questions]
    ways = [[form.format(text) for text in texts] for form in FORMS for texts in zip(*told, strict=True)]
    if not ways or not all(map(all, told)):
        return []
    marked = scores([pair for way in ways for pair in zip(questions, way, strict=True)])
    by_way = [marked[start : start + len(questions)] for start in range(0, len(marked), len(questions))]
    best = max(
        range(len(ways)), key=lambda n: (sum(s.correct for s in by_way[n]), sum(s.reward for s in by_way[n]), -n)
    )
    return ways[best]


def _told(question: Question) -> list[str]:
    """The answer, and the worked solution that some data sets have beside it (as often for every row)."""
    more = question.entry.get("extra_info")
    solution = question.entry.get("solution") or (more.get("answer") if isinstance(more, Mapping) else None)
    return [question.answer, solution if isinstance(solution, str) else question.answer]


def _of_other_rows(questions: Sequence[Question], known: Sequence[str]) -> list[tuple[Question, str]]:
    """The known answer of the next row that has another."""
    pairs = []
    for number, question in enumerate(questions if known else ()):
        rest = [*range(number + 1, len(questions)), *range(number)]
        other = next((n for n in rest if questions[n].answer != question.answer), None)
        if other is not None:
            pairs.append((question, known[other]))
    return pairs


def _known_score_high(questions: Sequence[Question], known: Sequence[str], scores: Sequence[Score]) -> Finding:
    part = "known answers are right"
    for question, text, score in zip(questions, known, scores, strict=False):
        if not score.correct:
            detail = f"{question.name}: the known answer {text[-40:]!r} counts as wrong (marks {_marks(score)})"
            return Finding(part=part, state="failed", detail=detail)
    return Finding(part=part, state="holds", detail=f"{len(questions)} rows, as {known[0][-40:]!r}")


def _wrong_score_less(
    part: str, asked: Sequence[tuple[Question, str]], scores: Sequence[Score], rights: Mapping[int, Score]
) -> list[Finding]:
    for (question, text), score in zip(asked, scores, strict=False):
        right = rights.get(id(question))
        if score.correct or (right is not None and score.reward >= right.reward):
            compared = "" if right is None else f", and the known one {right.reward:g}"
            counts = "counts as right and " if score.correct else ""
            detail = f"{question.name}: the wrong answer {text[-40:]!r} {counts}scores {score.reward:g}{compared}"
            return [Finding(part=part, state="failed", detail=detail)]
    return [Finding(part=part, state="holds", detail=f"{len(asked)} rows")]


def _the_same_twice(asked: Sequence[tuple[Question, str]], first: Sequence[Score], again: Sequence[Score]) -> Finding:
    part = "the same answer scores the same"
    for (question, text), one, two in zip(asked, first, again, strict=True):
        if one.parts != two.parts:
            detail = (
                f"{question.name}: the same answer {text[-40:]!r} had marks {_marks(one)}, and then {_marks(two)}, in "
                "another order"
            )
            return Finding(part=part, state="failed", detail=detail)
    return Finding(part=part, state="holds", detail=f"{len(asked)} answers, in another order")


def _marks(score: Score) -> str:
    return ", ".join(f"{name} {mark:g}" for name, mark in score.parts.items())

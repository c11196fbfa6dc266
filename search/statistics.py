"""What may be concluded from replicates.

The unit of inference for a configuration is the replicate: training with another seed differs by more than answering
other questions. Arms share seeds, so the difference per seed is what is looked at: a paired t interval with R - 1
degrees of freedom (Student 1908). Fewer than three replicates say nothing about their own spread, so the verdict is
then `undecided`, whatever the difference.

**What replicates cannot see.** All runs answer the same questions. If an arm suits these questions by chance, every
replicate repeats it, and if seeds do not matter at all, identical differences would make an interval of no width. So
the spread is never taken below what the questions leave open:

- *Every answer is known* (`correct`): difference [replicate, question] = mean + replicate + question + rest, a crossed
  layout with mean squares MS_R, MS_Q, MS_E. The variance of the mean difference is (MS_R + max(0, MS_Q - MS_E)) / (R
  Q): the paired t test's own MS_R / (R Q) plus the part that all replicates share, with Satterthwaite's (1946) degrees
  of freedom. And it is at least 2 / Q^2, as if one more question had gone each way (after Agresti & Min 2005): arms
  that agree on every question of a test could still differ on the next one. The widest of these intervals counts, so
  `correct` can only widen the paired t interval.
- *Only the number of questions is known* (`questions`): a spread that answering alone would undercut once in 1,000
  times (the 0.1 % quantile of chi-square, R - 1 df, on the binomial variance of two arms) means that the replicates are
  copies of each other. They then count as one run: the binomial variance of both accuracies, not divided by R.
- *Neither is known*: differences without any spread leave the interval infinite and the verdict `undecided`.

**Arms whose seeds do not all match** (a run failed, or has not ended): the seeds that both arms have are compared, and
what has no partner is counted as `unpaired`. Left out: a mixed model over all runs. Its intervals are 5 to 22 %
narrower (simulated, 3 to 5 common seeds among 4 to 8); running what is missing (`rin resume`) wins more.

**Runs that share no seeds** (`compare_groups`, of two sweeps): Welch's (1947) interval, which takes neither pairs nor
one spread for granted, and the part of the questions as above. That is a difference of mean squares: where it is near
zero and runs hardly differ, Satterthwaite's degrees of freedom fall far below 1 and the interval spans everything, so
they are at least those of the smaller group.

**Collapses** (`compare_arms`): intention to treat. A collapsed run keeps its place, with the accuracy of its clean
model at the stop; to drop it would compare the lucky seeds of one arm with all seeds of the other. How often arms
collapse is tested apart.

**Several arms against one control** (`adjust`): Holm (1979).

Looks while replicates are added: `search/sequential.py`. What a number of them can show: `search/power.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from search.power import half_width, level_of, replicates_to_decide
from search.replicates import MIN_REPLICATES, Replicate

Array = NDArray[np.float64]
Name = TypeVar("Name")
Verdict = Literal["better", "worse", "same", "undecided"]

COPIES = 0.001
"""How improbably small the spread of differences must be before replicates count as copies of one run."""
NO_SPREAD = 1e-12
"""Accuracies are shares of questions; differences closer than this are equal but for rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """With nothing but a difference it is undecided and open on both sides.

    Example: Comparison(verdict="undecided", difference=0.012, low=-0.02, high=0.044, replicates=3, needs=7, ...).
    """

    verdict: Verdict = "undecided"
    """`better` and `worse`: the interval excludes 0. `same`: it lies within the margin. Else `undecided`."""
    difference: float
    """Treated minus control, a share (0.01 = one point), over the seeds of both; NaN where there is none."""
    low: float = -math.inf
    high: float = math.inf
    """Interval of the difference; infinite where its spread is not known (one pair, or copies of one)."""
    replicates: int
    """Pairs: seeds that both arms have."""
    unpaired: int = 0
    """Runs of a seed that the other arm has not; they are not looked at."""
    margin: float = 0.01
    """Differences within +-margin count as the same; a share."""
    level: float = 0.05
    """Two-sided level of interval and `p`: 1 - confidence, or less where several looks or arms share it."""
    p: float | None = None
    """Of "no difference", two-sided; from three replicates on below `level` exactly where better or worse."""
    se: float | None = None
    """Standard error of the difference."""
    df: float | None = None
    sd: float | None = None
    """Of the differences per seed, questions included."""
    needs: int | None = None
    """About how many more replicates until decided, at the present difference and spread (power 80 %). None when it is
    decided, when the spread is unknown, or when no number would do (the questions are too few)."""

    def words(self) -> str:
        """Example: `same within ±1 points`; `undecided, needs about 7 more replicates`."""
        if self.verdict == "same":
            return f"same within ±{100 * self.margin:g} points"
        if self.verdict != "undecided":
            return self.verdict
        if self.needs is not None:
            return f"undecided, needs about {self.needs} more {_replicates(self.needs)}"
        if self.se is None and self.replicates < MIN_REPLICATES:
            missing = MIN_REPLICATES - self.replicates
            why = f": {('no seed', 'one seed', 'two seeds')[self.replicates]} in both arms" if self.unpaired else ""
            return f"undecided{why}, needs at least {missing} more {_replicates(missing)}"
        if self.se is None:
            return "undecided: the replicates are identical, and how many questions they answered is not known"
        return "undecided, needs more questions: replicates alone will not decide"


def compare(
    treated: Sequence[float],
    control: Sequence[float],
    *,
    confidence: float = 0.95,
    margin: float = 0.01,
    correct: tuple[ArrayLike, ArrayLike] | None = None,
    questions: int | None = None,
) -> Comparison:
    """Accuracies [replicates] of an arm and of its control, paired by seed. Within +-margin the interval says `same`.

    `correct`: the answers behind them, treated and control, each [replicates, questions], the same questions in the
    same order. `questions`: their number, where the answers are not kept.

    Raises ValueError for unequal or empty lists, for accuracies that are not finite (a NaN is never averaged away) or
    no shares, and for answers that do not add up to the accuracies.
    """
    return compare_pairs(pair(treated, control, correct, questions), margin=margin, level=level_of(confidence))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Runs of two arms, seed by seed, that have been found to belong together."""

    treated: Array
    control: Array
    """Accuracies [replicates], shares."""
    answers: Array | None
    """Treated minus control [replicates, questions], each from -1 to 1; None where they were not kept."""
    questions: int | None
    """How many were asked; None where that is not known."""

    def first(self, count: int) -> "Pairs":
        answers = None if self.answers is None else self.answers[:count]
        return replace(self, treated=self.treated[:count], control=self.control[:count], answers=answers)


def pair(
    treated: Sequence[float],
    control: Sequence[float],
    correct: tuple[ArrayLike, ArrayLike] | None = None,
    questions: int | None = None,
) -> Pairs:
    """Raises ValueError as `compare` says."""
    if len(treated) != len(control) or len(treated) == 0:
        got = f"{len(treated)} and {len(control)}"
        raise ValueError(f"needs as many treated as control replicates and at least one, but got {got}")
    a, b = _accuracies(treated), _accuracies(control)
    answers = None if correct is None else _answers(a, b, correct)
    return Pairs(treated=a, control=b, answers=answers, questions=questions if answers is None else answers.shape[1])


def compare_pairs(pairs: Pairs, *, margin: float, level: float, later_level: float | None = None) -> Comparison:
    """`compare` at a level. `later_level`: that at which more replicates would be judged, where it is another."""
    differences = pairs.treated - pairs.control
    count = len(differences)
    seen = Comparison(difference=float(differences.mean()), replicates=count, margin=margin, level=level)
    if count == 1:
        return seen
    variance = float(differences.var(ddof=1))
    spread = math.sqrt(variance) if variance > NO_SPREAD**2 else 0.0
    errors = [(spread / math.sqrt(count), count - 1.0)]
    if pairs.answers is not None:
        questions = pairs.answers.shape[1]
        errors += [_layout(pairs.answers), (math.sqrt(2) / questions, questions - 1.0)]
    elif pairs.questions is not None:
        errors += _copies(spread, pairs, pairs.questions)
    se, df = max(errors, key=lambda error: half_width(error[0], error[1], level or 0.05))
    return _judge(replace(seen, sd=spread, se=se, df=df) if se > 0 else seen, later_level)


def compare_groups(
    treated: ArrayLike, control: ArrayLike, *, answers: tuple[ArrayLike, ArrayLike], margin: float = 0.01
) -> Comparison:
    """Two groups of runs [replicates] with no seed in common, which may be differences to controls of their own:
    treated minus control at 95 %. `answers`: what they are means of, each [replicates, questions], the same questions.

    `replicates` is the smaller group's number; `needs` counts for both. Raises ValueError for empty groups and for what
    is not finite.
    """
    a, b = (np.asarray(side, dtype=np.float64) for side in (treated, control))
    asked = [np.asarray(side, dtype=np.float64) for side in answers]
    if not (len(a) and len(b)) or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"needs finite runs in both groups, but got {a.tolist()} and {b.tolist()}")
    questions = asked[0].shape[1]
    seen = Comparison(difference=float(a.mean() - b.mean()), replicates=min(len(a), len(b)), margin=margin)
    if seen.replicates == 1:
        return seen
    own = [float(side.var(ddof=1)) / len(side) for side in (a, b)]
    spread = [part**2 / (len(side) - 1) for part, side in zip(own, (a, b), strict=True)]
    by_question = float((asked[0].mean(axis=0) - asked[1].mean(axis=0)).var(ddof=1))
    shared = (by_question - sum(_rest(side) / len(side) for side in asked)) / questions
    errors = [(math.sqrt(2) / questions, questions - 1.0)]
    if sum(own) > NO_SPREAD**2:
        errors.append((math.sqrt(sum(own)), sum(own) ** 2 / sum(spread)))
    if shared > 0:
        total = sum(own) + shared
        df = total**2 / (sum(spread) + (by_question / questions) ** 2 / (questions - 1))
        errors.append((math.sqrt(total), max(df, seen.replicates - 1.0)))  # as Welch's has at least
    se, df = max(errors, key=lambda error: half_width(error[0], error[1], 0.05))
    return _judge(replace(seen, sd=math.sqrt(sum(own) * seen.replicates), se=se, df=df))


def _rest(answers: Array) -> float:
    """Mean square of what neither the run nor the question explains of [replicates, questions]."""
    runs, questions = answers.shape
    left = answers - answers.mean(axis=1, keepdims=True) - answers.mean(axis=0) + answers.mean()
    return float(np.square(left).sum()) / float((runs - 1) * (questions - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapseRisk:
    """Example: CollapseRisk(collapsed=5, replicates=5, probability=1.0, low=0.478, high=1.0).

    The interval is Clopper & Pearson's (1934). Wilson's is narrower on average, but covers too little just where arms
    are found: all or none of a handful collapsed.
    """

    collapsed: int
    replicates: int
    probability: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmComparison:
    """Example: compare_arms(treated, control).primary.verdict == "worse", .risk_p == 0.002."""

    primary: Comparison
    """Every replicate, collapsed ones with the accuracy at their stop (intention to treat)."""
    completed: Comparison | None
    """Secondary: without collapsed replicates, which flatters an arm that collapses. None if nothing is left."""
    treated_risk: CollapseRisk
    control_risk: CollapseRisk
    risk_p: float
    """Of "equal collapse probability", two-sided, Boschloo's (1970) exact test. Fisher's conditions on the total of
    collapses, which no sweep fixes, and is weaker. McNemar's on seed pairs cannot reach 5 % below six replicates; that
    collapses share seeds makes Boschloo's test cautious, not false."""


def compare_arms(treated: Sequence[Replicate], control: Sequence[Replicate], *, margin: float = 0.01) -> ArmComparison:
    """An arm against its control by intention to treat, with the risk of collapse apart; all at 95 %.

    Seeds need not all match: accuracies are compared on those of both arms, risks over all runs. Raises ValueError for
    an arm without a run and for a seed that occurs twice in one.
    """
    for arm in (treated, control):
        if len({run.seed for run in arm}) != len(arm):
            raise ValueError(f"a seed occurs twice in one arm: {sorted(run.seed for run in arm)}")
    survived, plain = ([run for run in arm if not run.collapsed] for arm in (treated, control))
    risk, control_risk = _risk(treated), _risk(control)
    return ArmComparison(
        primary=_on_common_seeds(treated, control, margin),
        completed=_on_common_seeds(survived, plain, margin) if survived and plain else None,
        treated_risk=risk,
        control_risk=control_risk,
        risk_p=_boschloo(risk, control_risk),
    )


def mean_interval(answers: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % interval of the mean of [replicates, questions], each from 0 to 1, over seeds and questions; needs two
    replicates. The same layout as that of a difference."""
    array = _shares(answers)
    se, df = _layout(array)
    half = half_width(se, df, 0.05)
    return max(0.0, float(array.mean()) - half), min(1.0, float(array.mean()) + half)


def adjust(comparisons: Mapping[Name, Comparison]) -> dict[Name, Comparison]:
    """Several arms against one control: verdicts that are false for any arm at all with the level that each had alone.

    Better or worse by Holm's p values, which need no assumption about how the arms hang together. Dunnett's test does
    not fit: it pools one variance over all arms, and arms that collapse spread more than others; nor does it pair
    seeds. Intervals are simultaneous ones, Bonferroni's (level / arms each): Holm has none that are both of use and
    two-sided. So an arm may be `better` by Holm with an interval that touches 0; `same` is said by the interval.
    """
    if not comparisons:
        return {}
    levels = {comparison.level for comparison in comparisons.values()}
    if len(levels) != 1:
        raise ValueError(f"the arms were compared at different levels: {sorted(levels)}")
    level, count = levels.pop(), len(comparisons)
    # Without a p value (one replicate) an arm can show nothing, but it was an arm: it counts, with p = 1.
    p = {name: 1.0 if c.p is None else c.p for name, c in comparisons.items()}
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, p[name] * (count - rank)))
        adjusted[name] = largest
    result = {}
    for name, before in comparisons.items():
        after = replace(_judge(replace(before, level=level / count)), level=level)
        if before.p is not None:
            after = replace(after, p=adjusted[name])
            if adjusted[name] < level and before.replicates >= MIN_REPLICATES:
                after = replace(after, verdict="better" if before.difference > 0 else "worse", needs=None)
        result[name] = after
    return result


# Below: how the numbers come about.


def _judge(comparison: Comparison, later_level: float | None = None) -> Comparison:
    """Interval, p value, verdict and need from difference, standard error, degrees of freedom and level."""
    difference, se, df, sd = comparison.difference, comparison.se, comparison.df, comparison.sd
    margin, level, count = comparison.margin, comparison.level, comparison.replicates
    if se is None or df is None or sd is None:
        return comparison
    half = half_width(se, df, level)
    low, high = difference - half, difference + half
    verdict: Verdict = "undecided"
    if count >= MIN_REPLICATES:
        if low > 0:
            verdict = "better"
        elif high < 0:
            verdict = "worse"
        elif -margin <= low and high <= margin:
            verdict = "same"
    p = 2 * float(special.stdtr(df, -abs(difference) / se))
    needs = None
    if verdict == "undecided":
        needs = replicates_to_decide(difference, sd, se, count, margin=margin, level=later_level or level)
    return replace(comparison, verdict=verdict, low=low, high=high, p=p, needs=needs)


def _layout(differences: Array) -> tuple[float, float]:
    """Standard error of the mean difference [replicates, questions] and its degrees of freedom.

    Random replicates and random questions, one observation (from -1 to 1) per cell.
    """
    runs, questions = differences.shape
    total = float(differences.mean())
    by_run, by_question = differences.mean(axis=1), differences.mean(axis=0)
    ms_run = questions * float(((by_run - total) ** 2).sum()) / (runs - 1)
    ms_question = runs * float(((by_question - total) ** 2).sum()) / (questions - 1)
    all_squares = float(((differences - total) ** 2).sum())
    rest = all_squares - (runs - 1) * ms_run - (questions - 1) * ms_question
    ms_rest = max(0.0, rest) / ((runs - 1) * (questions - 1))
    cells = runs * questions
    ms, df = ms_run, runs - 1.0
    if ms_question > ms_rest:
        ms = ms_run + ms_question - ms_rest
        spread = ms_run**2 / (runs - 1) + ms_question**2 / (questions - 1) + ms_rest**2 / ((runs - 1) * (questions - 1))
        df = ms**2 / spread
    return math.sqrt(ms / cells), df


def _copies(spread: float, pairs: Pairs, questions: int) -> list[tuple[float, float]]:
    """Error of one run each (standard error, degrees of freedom), if replicates look like copies of each other."""
    chances, df = (float(pairs.treated.mean()), float(pairs.control.mean())), len(pairs.treated) - 1
    binomial = max(sum(chance * (1 - chance) for chance in chances) / questions, 2 / questions**2)
    if spread**2 < binomial * float(stats.chi2.ppf(COPIES, df)) / df:
        return [(math.sqrt(binomial), questions - 1.0)]
    return []


def _on_common_seeds(treated: Sequence[Replicate], control: Sequence[Replicate], margin: float) -> Comparison:
    arms = [{run.seed: run for run in arm} for arm in (treated, control)]
    seeds = sorted(arms[0].keys() & arms[1].keys())
    unpaired = len(treated) + len(control) - 2 * len(seeds)
    if not seeds:
        return Comparison(difference=math.nan, replicates=0, unpaired=unpaired, margin=margin)
    a, b = ([arm[seed] for seed in seeds] for arm in arms)
    kept = [run.correct for run in (*a, *b) if run.correct is not None]
    seen = compare(
        [run.accuracy for run in a],
        [run.accuracy for run in b],
        margin=margin,
        correct=(kept[: len(a)], kept[len(a) :]) if len(kept) == len(a) + len(b) else None,
        questions=min((len(answers) for answers in kept), default=None),
    )
    return replace(seen, unpaired=unpaired)


def _risk(arm: Sequence[Replicate]) -> CollapseRisk:
    if not arm:
        raise ValueError("needs at least one replicate of each arm")
    collapsed = sum(run.collapsed for run in arm)
    interval = stats.binomtest(collapsed, len(arm)).proportion_ci(0.95, method="exact")
    return CollapseRisk(
        collapsed=collapsed,
        replicates=len(arm),
        probability=collapsed / len(arm),
        low=float(interval.low),
        high=float(interval.high),
    )


def _boschloo(treated: CollapseRisk, control: CollapseRisk) -> float:
    if treated.probability == control.probability and treated.probability in (0.0, 1.0):
        return 1.0  # all alike: there is nothing to test
    arms = (treated, control)
    table = [[arm.collapsed for arm in arms], [arm.replicates - arm.collapsed for arm in arms]]
    return float(stats.boschloo_exact(table).pvalue)


def _accuracies(values: Sequence[float]) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("an accuracy is not finite; a failed run has no accuracy and must be run again")
    if array.size and (array.min() < -NO_SPREAD or array.max() > 1 + NO_SPREAD):
        raise ValueError(
            f"an accuracy is a share from 0 to 1 (0.72, not 72), but got {array.min():g} to {array.max():g}"
        )
    return array


def _shares(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise ValueError("an answer is right (1), wrong (0) or a share of both; something else was given")
    return array


def _answers(a: Array, b: Array, correct: tuple[ArrayLike, ArrayLike]) -> Array:
    """Differences [replicates, questions] of the answers, once they have been found to be those of the accuracies."""
    sides = [_shares(side) for side in correct]
    shape = sides[0].shape
    if len(shape) != 2 or sides[1].shape != shape or shape[0] != len(a) or shape[1] < 2:
        shapes = " and ".join(str(side.shape) for side in sides)
        needed = f"[{len(a)} replicates, questions]"
        raise ValueError(f"needs answers {needed} of both arms to the same questions, but got {shapes}")
    for accuracy, side in zip((a, b), sides, strict=True):
        if np.abs(side.mean(axis=1) - accuracy).max() > 1e-6:
            raise ValueError("the answers do not add up to the accuracies: they are in another order, or of other runs")
    return np.asarray(sides[0] - sides[1])


def _replicates(count: int) -> str:
    return "replicate" if count == 1 else "replicates"

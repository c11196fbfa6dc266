"""What may be concluded from replicates.

The unit of inference for a configuration is the replicate: training with another seed differs by more than answering other
questions. Arms share seeds, so the difference per seed is what is looked at: a paired t interval with R - 1 degrees of freedom
(Student 1908). Fewer than three replicates say nothing about their own spread, so the verdict is then `undecided`, whatever the
difference.

**What replicates cannot see.** All runs answer the same questions. If an arm suits these questions by chance, every replicate
repeats it, and if seeds do not matter at all, identical differences would make an interval of no width. So the spread is never
taken below what the questions leave open:

- *Every answer is known* (`correct`): difference [replicate, question] = mean + replicate + question + rest, a crossed layout with
  mean squares MS_R, MS_Q, MS_E. The variance of the mean difference is (MS_R + max(0, MS_Q - MS_E)) / (R Q): the paired t
  test's own MS_R / (R Q) plus the part that all replicates share, with Satterthwaite's (1946) degrees of freedom. And it is at least
  2 / Q^2, as if one more question had gone each way (after Agresti & Min 2005): arms that agree on every question of a test
  could still differ on the next one. The widest of these intervals counts, so `correct` can only widen the paired t interval.
- *Only the number of questions is known* (`questions`): a spread that answering alone would undercut once in 1,000 times (the
  0.1 % quantile of chi-square, R - 1 df, on the binomial variance of two arms) means that the replicates are copies of each other.
  They then count as one run: the binomial variance of both accuracies, not divided by R.
- *Neither is known*: differences without any spread leave the interval infinite and the verdict `undecided`.

**Arms whose seeds do not all match** (`compare_by_seed`): accuracy ~ arm + (1 | seed) by REML, Satterthwaite degrees of freedom
from the observed information (Kuznetsova, Brockhoff & Christensen 2017). With at most one run per arm and seed the model falls
apart into independent numbers (difference and mean of a pair, runs that stand alone), which makes it small. At 3 to 8 replicates
Satterthwaite's degrees of freedom are too many where the seeds' variance is estimated as 0 (intervals held the truth in 91 to 94 %), so
no more are used than the pairs alone would have (94 to 96 %). Fully paired arms are the paired t test exactly; with fewer than two pairs
there is nothing to estimate the pairing from: Welch's test.

**Collapses** (`compare_arms`): intention to treat. A collapsed run keeps its place, with the accuracy of its clean model at the stop;
to drop it would compare the lucky seeds of one arm with all seeds of the other. How often arms collapse is tested apart.

**Several arms against one control** (`adjust`): Holm (1979).

**More replicates until decided** (`sequential_compare`): looking again and again finds a difference by chance sooner or later, so
each look may use a part of the error level only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from spaces.errors import ConfigError

Verdict = Literal["better", "worse", "same", "undecided"]

MIN_REPLICATES = 3
MAX_REPLICATES = 10_000
"""Where the search for a number of replicates ends: nobody trains more."""
COPIES = 0.001
"""How improbably small the spread of differences must be before replicates count as copies of one run."""
SURELY = 6
"""At a true difference of this many critical values and 8 standard errors the t test has power 1, for any degrees of freedom from 2."""
NULL_PATHS = 400_000
"""Experiments drawn for the levels of looks: 18 in 1,000 of them are known to 0.2 in 1,000."""
NO_SPREAD = 1e-12
"""Accuracies are shares of questions; differences closer than this are equal but for rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Example: Comparison(verdict="undecided", difference=0.012, low=-0.02, high=0.044, replicates=3, needs=7, ...)."""

    verdict: Verdict
    """`better` and `worse`: the interval excludes 0. `same`: it lies within the margin. Else `undecided`."""
    difference: float
    """Of treated minus control, as a share (0.01 = one point)."""
    low: float
    high: float
    """Interval of the difference; infinite where its spread cannot be known (one replicate, copies without known questions)."""
    replicates: int
    """Of the arm that has fewer."""
    margin: float = 0.01
    """Differences within +-margin count as the same; a share."""
    level: float = 0.05
    """Two-sided level of the interval and of `p`: 1 - confidence, or less where several looks or several arms share it."""
    p: float | None = None
    """Of "no difference", two-sided; below `level` exactly where the verdict is better or worse (with three replicates or more)."""
    se: float | None = None
    """Standard error of the difference."""
    df: float | None = None
    sd: float | None = None
    """Of the differences per seed, questions included; None where the seeds do not pair."""
    question_se: float | None = None
    """The part of `se` that comes from having asked these questions and not others, these runs given; from `correct` only."""
    question_share: float | None = None
    """How much of the variance of the difference is that part; the rest is from run to run. 0 to 1; from `correct` only."""
    needs: int | None = None
    """About how many more replicates until decided, at the present difference and spread (power 80 %). None when it is decided, when
    the spread is unknown, or when no number of replicates would do (the questions are too few)."""
    method: str = "paired t"
    """paired t | mixed model | Welch"""

    def words(self) -> str:
        """Example: `same within ±1 points`; `undecided, needs about 7 more replicates`."""
        if self.verdict == "same":
            return f"same within ±{100 * self.margin:g} points"
        if self.verdict != "undecided":
            return self.verdict
        if self.needs is not None:
            return f"undecided, needs about {self.needs} more {'replicate' if self.needs == 1 else 'replicates'}"
        if self.se is None and self.replicates < MIN_REPLICATES:
            missing = MIN_REPLICATES - self.replicates
            return f"undecided, needs at least {missing} more {'replicate' if missing == 1 else 'replicates'}"
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

    `correct`: the answers behind them, treated and control, each [replicates, questions], the same questions in the same order.
    `questions`: their number, where the answers are not kept.

    Raises ValueError for unequal or empty lists, for accuracies that are not finite (a NaN is never averaged away) and for answers
    that do not add up to the accuracies.
    """
    a, b, answers = _checked(treated, control, correct)
    return _paired(a, b, answers, questions, margin, _level(confidence))


def compare_by_seed(
    treated: Mapping[int, float],
    control: Mapping[int, float],
    *,
    confidence: float = 0.95,
    margin: float = 0.01,
    questions: int | None = None,
) -> Comparison:
    """Accuracies {seed: accuracy} of arms that need not have the same seeds: `compare` where they have, a mixed model where not.

    The degrees of freedom are Satterthwaite's, but no more than common seeds - 1.
    """
    if not treated or not control:
        raise ValueError(f"needs at least one replicate of each arm, but got {len(treated)} and {len(control)}")
    if treated.keys() == control.keys():
        seeds = sorted(treated)
        shares = [treated[seed] for seed in seeds], [control[seed] for seed in seeds]
        return compare(*shares, confidence=confidence, margin=margin, questions=questions)
    a, b = _accuracies(list(treated.values())), _accuracies(list(control.values()))
    pairs, count, level = len(treated.keys() & control.keys()), min(len(a), len(b)), _level(confidence)
    if pairs >= 2:
        fit = mixed_model(treated, control)
        difference, se, df = fit.difference, fit.se, min(fit.df, pairs - 1.0)
    elif count >= 2:
        difference, se, df = _welch(a, b)
    else:
        difference, se, df = float(a.mean() - b.mean()), 0.0, 1.0
    if questions is not None and count >= 2:
        floors = _copies(se * math.sqrt(count), count - 1, a, b, questions)
        se, df = max([(se, df), *floors], key=lambda error: _half_width(error[0], error[1], level))
    return _judge(
        Comparison(
            verdict="undecided",
            difference=difference,
            low=-math.inf,
            high=math.inf,
            replicates=count,
            margin=margin,
            level=level,
            se=se if se > 0 else None,
            df=df if se > 0 else None,
            method="mixed model" if pairs >= 2 else "Welch",
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedModel:
    """Example: MixedModel(difference=0.0126, se=0.0029, df=2.29)."""

    difference: float
    se: float
    df: float
    """Satterthwaite's."""


def mixed_model(treated: Mapping[int, float], control: Mapping[int, float]) -> MixedModel:
    """accuracy ~ arm + (1 | seed) by REML, for {seed: accuracy} with two common seeds or more; the numbers of R's lmerTest.

    A pair's difference and mean are independent, so every number here is, with variance residual * own + seed * common.
    """
    both = sorted(treated.keys() & control.keys())
    if len(both) < 2:
        raise ValueError(f"needs at least two seeds that both arms have, but got {len(both)}")
    paired_a, paired_b = _accuracies([treated[seed] for seed in both]), _accuracies([control[seed] for seed in both])
    alone_a = _accuracies([treated[seed] for seed in sorted(treated.keys() - control.keys())])
    alone_b = _accuracies([control[seed] for seed in sorted(control.keys() - treated.keys())])
    pairs = len(both)
    z = np.concatenate([paired_a - paired_b, (paired_a + paired_b) / 2, alone_a, alone_b])
    x = np.repeat([[0.0, 1.0], [1.0, 0.5], [1.0, 1.0], [1.0, 0.0]], [pairs, pairs, len(alone_a), len(alone_b)], axis=0)
    parts = np.repeat([[2.0, 0.0], [0.5, 1.0], [1.0, 1.0], [1.0, 1.0]], [pairs, pairs, len(alone_a), len(alone_b)], axis=0)
    if np.ptp(z[:pairs]) < NO_SPREAD:
        return MixedModel(difference=float(z[:pairs].mean()), se=0.0, df=pairs - 1.0)

    def fit(variances: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Inverse information of the coefficients, coefficients, and the projection P = W - W X (X'WX)^-1 X'W."""
        w = 1 / (parts @ variances)
        inverse = np.linalg.inv((x.T * w) @ x)
        return inverse, inverse @ (x.T * w) @ z, np.diag(w) - (w[:, None] * x) @ inverse @ (x.T * w)

    def scaled(ratio: float) -> tuple[float, NDArray[np.float64]]:
        """REML deviance at seed variance / residual variance = ratio, and both variances at its best scale."""
        inverse, _, p = fit(np.array([1.0, ratio]))
        residual = float(z @ p @ z) / (len(z) - 2)
        deviance = (len(z) - 2) * math.log(residual) + float(np.log(parts @ [1.0, ratio]).sum()) - float(np.linalg.slogdet(inverse)[1])
        return deviance, residual * np.array([1.0, ratio])

    grid = np.linspace(math.log(1e-6), math.log(1e8), 29)
    start = int(np.argmin([scaled(math.exp(point))[0] for point in grid]))
    bounds = (grid[max(0, start - 1)], grid[min(len(grid) - 1, start + 1)])
    best = optimize.minimize_scalar(lambda point: scaled(math.exp(point))[0], bounds=bounds, method="bounded", options={"xatol": 1e-8})
    on_boundary = scaled(0.0)[0] <= scaled(math.exp(best.x))[0] + 1e-9
    variances = scaled(0.0 if on_boundary else math.exp(best.x))[1]
    inverse, coefficients, p = fit(variances)
    derivatives = [p * parts[:, k] for k in range(2)]  # P times the derivative of V with respect to each variance
    hessian = np.array(
        [[float(-np.trace(d @ e) + 2 * (z @ d @ e @ p @ z)) for e in derivatives] for d in derivatives]
    )  # of the deviance; twice its inverse is the covariance of the variances
    w = 1 / (parts @ variances)
    gradient = np.array([(inverse @ ((x.T * (w**2 * parts[:, k])) @ x) @ inverse)[1, 1] for k in range(2)])
    if on_boundary:  # the seed variance is 0 and stays there: one variance is left
        hessian, gradient = hessian[:1, :1], gradient[:1]
    variance = float(inverse[1, 1])
    return MixedModel(
        difference=float(coefficients[1]),
        se=math.sqrt(variance),
        df=variance**2 / float(gradient @ np.linalg.solve(hessian, gradient)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicate:
    """Example: Replicate(seed=3, accuracy=0.71, collapsed=True)."""

    seed: int
    accuracy: float
    """Share of the questions that the clean model answers right: at the end, or at the stop of a collapsed run."""
    collapsed: bool
    correct: tuple[bool, ...] | None = None
    """Answer by answer, where they were kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapseRisk:
    """Example: CollapseRisk(collapsed=5, replicates=5, probability=1.0, low=0.478, high=1.0).

    The interval is Clopper & Pearson's (1934). Wilson's is narrower on average, but covers too little just where arms are found:
    all or none of a handful collapsed.
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
    """Secondary: without collapsed replicates. It compares what survived, so it flatters an arm that collapses. None if nothing is left."""
    treated_risk: CollapseRisk
    control_risk: CollapseRisk
    risk_difference: float
    """Collapse probability of treated minus control, -1 to 1."""
    risk_p: float
    """Of "equal collapse probability", two-sided, Boschloo's (1970) exact test. Fisher's conditions on the total of collapses, which no
    sweep fixes, and is weaker at 3 to 8 replicates. McNemar's on seed pairs could not reach 5 % below six replicates (0.0625 for 5 of 5
    against 0 of 5); that collapses share seeds makes Boschloo's test cautious, not false."""


def compare_arms(
    treated: Sequence[Replicate], control: Sequence[Replicate], *, confidence: float = 0.95, margin: float = 0.01
) -> ArmComparison:
    """An arm against its control by intention to treat, with the risk of collapse apart. Seeds need not all match."""
    for arm in (treated, control):
        if len({run.seed for run in arm}) != len(arm):
            raise ValueError(f"a seed occurs twice in one arm: {sorted(run.seed for run in arm)}")
    survivors = [run for run in treated if not run.collapsed], [run for run in control if not run.collapsed]
    risks = _risk(treated, confidence), _risk(control, confidence)
    return ArmComparison(
        primary=_compare_replicates(treated, control, confidence, margin),
        completed=_compare_replicates(*survivors, confidence, margin) if all(survivors) else None,
        treated_risk=risks[0],
        control_risk=risks[1],
        risk_difference=risks[0].probability - risks[1].probability,
        risk_p=_boschloo(*risks),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDifference:
    """Whether two *checkpoints* differ on one set of questions; whether their *configurations* differ is not in it.

    Example: CheckpointDifference(only_a=41, only_b=12, questions=2048, difference=0.0142, p=8e-05).
    """

    only_a: int
    """Questions that A alone answers right."""
    only_b: int
    questions: int
    difference: float
    """Accuracy of A minus accuracy of B, a share."""
    p: float
    """McNemar's (1947) exact test, two-sided: of two checkpoints that are right equally often on questions like these."""

    def words(self) -> str:
        kind = "differ" if self.p < 0.05 else "do not differ detectably"
        return f"these two checkpoints {kind} (p = {self.p:.2g}); this says nothing about their configurations"


def checkpoints_differ(correct_a: ArrayLike, correct_b: ArrayLike) -> CheckpointDifference:
    """Exact McNemar test on the answers [questions] of two single checkpoints to the same questions in the same order.

    A configuration trained again gives another checkpoint. Two runs of *one* configuration with different seeds often differ by this
    test, rightly. So it must not be used to compare configurations, and pooling replicates into it makes that worse.
    """
    a, b = _booleans(correct_a), _booleans(correct_b)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"needs two lists of answers to the same questions, but got shapes {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return CheckpointDifference(only_a=only_a, only_b=only_b, questions=a.size, difference=(only_a - only_b) / a.size, p=p)


def adjust(comparisons: Mapping[str, Comparison], *, method: Literal["holm", "bonferroni"] = "holm") -> dict[str, Comparison]:
    """Several arms against one control: verdicts that are false for any arm at all with the level that each had alone.

    Better or worse by Holm's p values, which need no assumption about how the arms hang together. Dunnett's test does not
    fit: it pools one variance over all arms, and arms that collapse spread more than others; nor does it pair seeds. Intervals
    are simultaneous ones, Bonferroni's (level / arms each): Holm has none that are both of use and two-sided. So an arm may be
    `better` by Holm with an interval that touches 0; `same` is said by the interval. `bonferroni` takes both from the interval.
    """
    if not comparisons:
        return {}
    levels = {comparison.level for comparison in comparisons.values()}
    if len(levels) != 1:
        raise ValueError(f"the arms were compared at different levels: {sorted(levels)}")
    level, count = levels.pop(), len(comparisons)
    # Without a p value (one replicate) an arm can show nothing, but it was an arm: it counts, with p = 1.
    p = {name: 1.0 if c.p is None else c.p for name, c in comparisons.items()}
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, p[name] * (count - rank if method == "holm" else count)))
        adjusted[name] = largest
    result = {}
    for name, before in comparisons.items():
        after = _judge(replace(before, level=level / count))
        if before.p is not None:
            after = replace(after, p=adjusted[name], level=level)
            if method == "holm" and adjusted[name] < level and before.replicates >= MIN_REPLICATES:
                after = replace(after, verdict="better" if before.difference > 0 else "worse", needs=None)
        result[name] = replace(after, level=level)
    return result


Spending = Literal["pocock", "obrien-fleming"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialRule:
    """When arms are compared while replicates are still being added, and how much of the error level each look may use.

    To look at an ordinary 95 % interval five times is wrong in 15 % of null cases. Alpha spending (Lan & DeMets 1983) gives each look
    the part of the level that its share of the last look's replicates has earned, so a look that was not planned (the budget ended) has its
    part too. What a look may use is turned into a level for its t test under the joint distribution of the t statistics of all looks. That
    distribution is the same for any spread and is drawn here, with a fixed seed: the normal approximation (Jennison & Turnbull 2000,
    ch. 11) makes 5.3 to 5.9 % out of 5 % at so few replicates.

    `pocock` spends evenly and can end at the first look, which is the purpose where a replicate is hours of training;
    `obrien-fleming` keeps nearly everything for the last look.

    Example: SequentialRule(looks=(5, 8, 12, 16, 20)).levels((5, 8)) == (0.0179, 0.0135)
    """

    looks: tuple[int, ...] = (5, 8, 12, 16, 20)
    """Replicates per arm at each planned look."""
    level: float = 0.05
    """Two-sided, over all looks."""
    spending: Spending = "pocock"

    def __post_init__(self) -> None:
        if not self.looks or self.looks[0] < MIN_REPLICATES or any(b <= a for a, b in pairwise(self.looks)):
            raise ConfigError(
                f"looks {','.join(map(str, self.looks))}: name growing numbers of replicates from {MIN_REPLICATES} on, such as 5,8,12,16,20"
            )
        if not 0 < self.level <= 0.5:
            raise ConfigError(f"level {self.level}: an error level is a share between 0 and 0.5, such as 0.05")

    def next_look(self, replicates: int) -> int | None:
        """How many replicates the next planned look needs; None after the last."""
        return next((look for look in self.looks if look > replicates), None)

    def levels(self, taken: Sequence[int]) -> tuple[float, ...]:
        """The two-sided level of the t test at each of these looks."""
        return _levels_of_looks(tuple(taken), self.looks[-1], self.level, self.spending)


CONFIRM = SequentialRule()
"""What `rin confirm` uses unless told otherwise."""


def sequential_compare(
    treated: Sequence[float],
    control: Sequence[float],
    *,
    rule: SequentialRule = CONFIRM,
    final: bool = False,
    margin: float = 0.01,
    correct: tuple[ArrayLike, ArrayLike] | None = None,
    questions: int | None = None,
) -> Comparison:
    """`compare` while replicates are being added: all that is said at all looks together is false with at most `rule.level`.

    Replicates in the order in which they were planned. A decision at a look stands, so replicates after it are not used. Between looks
    the last planned one counts; `final=True` says that no replicate will follow, and judges all of them at their own part of the level.
    Before the first look nothing has been spent: undecided, infinite interval.

    The interval is a repeated confidence interval (Jennison & Turnbull 1989): those of all looks together hold the truth with 1 - level,
    for whatever reason one stops. So `same` keeps the level too, and a single one of them is wider than an interval of its number of
    replicates alone would be. `level` of the result is that of its look; `needs` counts from there, at the level of the last look.
    """
    a, b, answers = _checked(treated, control, correct)
    count = len(a)
    if count > rule.looks[-1]:
        raise ValueError(f"{count} replicates, but the last look was planned at {rule.looks[-1]}: the level is spent")
    taken = [look for look in rule.looks if look <= count]
    if final and count >= MIN_REPLICATES and count not in taken:
        taken.append(count)
    levels = rule.levels(taken)
    later_level = rule.levels(rule.looks)[-1]
    for look, level in zip(taken, levels, strict=True):
        result = _paired(a[:look], b[:look], None if answers is None else answers[:look], questions, margin, level, later_level)
        if result.verdict != "undecided":
            return result
    return result if taken else _paired(a, b, answers, questions, margin, 0.0, later_level)


@lru_cache(maxsize=64)
def _levels_of_looks(taken: tuple[int, ...], last: int, level: float, spending: Spending) -> tuple[float, ...]:
    """Runs the t statistics of NULL_PATHS experiments without a difference through the looks; each look ends its part of them."""
    rng = np.random.default_rng(0)
    sums, squares = np.zeros(NULL_PATHS), np.zeros(NULL_PATHS)
    running = np.ones(NULL_PATHS, dtype=np.bool_)
    result: list[float] = []
    before, spent = 0, 0
    for look in taken:
        added = look - before
        z = rng.standard_normal(NULL_PATHS)  # the sum of the new differences over its root; their squares around it are chi-square
        sums += math.sqrt(added) * z
        squares += z**2 + (rng.chisquare(added - 1, NULL_PATHS) if added > 1 else 0.0)
        t = np.abs(sums) / np.sqrt(np.maximum(squares - sums**2 / look, 1e-300) * look / (look - 1))
        ending = round(NULL_PATHS * _spent(look / last, level, spending)) - spent
        if result:
            kept = t[running]
            critical = float(np.partition(kept, len(kept) - ending)[len(kept) - ending])
            result.append(2 * float(special.stdtr(look - 1, -critical)))
        else:  # the first look is an ordinary t test: no need to draw its level
            result.append(_spent(look / last, level, spending))
            critical = float(special.stdtrit(look - 1, 1 - result[0] / 2))
        running &= t < critical
        before, spent = look, NULL_PATHS - int(running.sum())
    return tuple(result)


def _spent(fraction: float, level: float, spending: Spending) -> float:
    """Of the two-sided level, up to this share of the last look's replicates (Lan & DeMets 1983)."""
    if spending == "pocock":
        return level * math.log(1 + (math.e - 1) * fraction)
    return 4 * float(special.ndtr(special.ndtri(level / 4) / math.sqrt(fraction)))


def detectable_difference(sd: float, replicates: int, *, power: float = 0.8, confidence: float = 0.95, question_se: float = 0.0) -> float:
    """The smallest true difference that a paired t test of so many replicates calls better or worse with this power; a share.

    `sd`: of the differences per seed. `question_se`: the standard error that all replicates share. Infinite below three replicates.
    """
    _check_planning(sd, power)
    if replicates < MIN_REPLICATES:
        return math.inf
    se, df = _planned_error(sd, question_se**2, replicates)
    if se == 0:
        return 0.0
    upper = SURELY * _half_width(1.0, df, _level(confidence)) + 8
    return se * float(optimize.brentq(lambda ratio: _power(ratio, df, _level(confidence)) - power, 0.0, upper, xtol=1e-10))


def replicates_needed(
    difference: float, sd: float, *, power: float = 0.8, confidence: float = 0.95, question_se: float = 0.0
) -> int | None:
    """How many replicates a paired t test needs to call this true difference better or worse with this power; at least three.

    None where more than MAX_REPLICATES would be needed, or none would do (a difference of 0, or below what the questions allow).
    """
    _check_planning(sd, power)
    return _first(lambda count: _power_of(difference, sd, question_se**2, count, _level(confidence)) >= power, MIN_REPLICATES)


# Below: how the numbers come about.


def _judge(comparison: Comparison, later_level: float | None = None) -> Comparison:
    """Interval, p value, verdict and need from difference, standard error, degrees of freedom and level."""
    difference, se, df, margin, level = comparison.difference, comparison.se, comparison.df, comparison.margin, comparison.level
    if se is None or df is None:
        return replace(comparison, verdict="undecided", low=-math.inf, high=math.inf, p=None, needs=None)
    half = _half_width(se, df, level)
    low, high = difference - half, difference + half
    verdict: Verdict = "undecided"
    if comparison.replicates >= MIN_REPLICATES:
        if low > 0:
            verdict = "better"
        elif high < 0:
            verdict = "worse"
        elif -margin <= low and high <= margin:
            verdict = "same"
    p = 2 * float(special.stdtr(df, -abs(difference) / se))
    needs = _needs(comparison, se, later_level or level) if verdict == "undecided" else None
    return replace(comparison, verdict=verdict, low=low, high=high, p=p, needs=needs)


def _paired(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    answers: NDArray[np.float64] | None,
    questions: int | None,
    margin: float,
    level: float,
    later_level: float | None = None,
) -> Comparison:
    """`compare` on what has been checked. `later_level`: the level at which more replicates would be judged, where it is another one."""
    differences = a - b
    count, mean = len(differences), float(differences.mean())
    if count == 1:
        return Comparison(verdict="undecided", difference=mean, low=-math.inf, high=math.inf, replicates=1, margin=margin, level=level)
    variance = float(differences.var(ddof=1))
    spread = math.sqrt(variance) if variance > NO_SPREAD**2 else 0.0
    errors = [(spread / math.sqrt(count), count - 1.0)]
    question_se = question_share = None
    if answers is not None:
        questions = answers.shape[1]
        layout = _layout(answers)
        errors += [layout.error, (math.sqrt(2) / questions, questions - 1.0)]
        question_se, question_share = layout.question_se, layout.question_share
    elif questions is not None:
        errors += _copies(spread, count - 1, a, b, questions)
    se, df = max(errors, key=lambda error: _half_width(error[0], error[1], level or 0.05))
    return _judge(
        Comparison(
            verdict="undecided",
            difference=mean,
            low=-math.inf,
            high=math.inf,
            replicates=count,
            margin=margin,
            level=level,
            se=se if se > 0 else None,
            df=df if se > 0 else None,
            sd=spread,
            question_se=question_se,
            question_share=question_share,
        ),
        later_level,
    )


def _half_width(se: float, df: float, level: float) -> float:
    return float(special.stdtrit(df, 1 - level / 2)) * se


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """What the crossed layout of replicates and questions says about the mean difference."""

    error: tuple[float, float]
    """Standard error and degrees of freedom."""
    question_se: float
    question_share: float | None


def _layout(differences: NDArray[np.float64]) -> _Layout:
    """Differences [replicates, questions], each -1, 0 or 1; random replicates and random questions, one observation per cell."""
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
    variance = ms_run + ms_question - ms_rest
    return _Layout(
        error=(math.sqrt(ms / cells), df),
        question_se=math.sqrt(ms_question / cells),
        question_share=min(1.0, max(0.0, ms_question / variance)) if variance > 0 else None,
    )


def _copies(spread: float, df: int, a: NDArray[np.float64], b: NDArray[np.float64], questions: int) -> list[tuple[float, float]]:
    """The standard error of one run each, if the spread of the differences is smaller than that of runs that answer for themselves."""
    binomial = float(a.mean() * (1 - a.mean()) + b.mean() * (1 - b.mean())) / questions
    binomial = max(binomial, 2 / questions**2)
    if spread**2 < binomial * float(stats.chi2.ppf(COPIES, df)) / df:
        return [(math.sqrt(binomial), questions - 1.0)]
    return []


def _welch(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float, float]:
    """Welch (1947): no pairing, each arm with its own spread."""
    parts = [float(arm.var(ddof=1)) / len(arm) for arm in (a, b)]
    variance = sum(parts)
    difference = float(a.mean() - b.mean())
    if variance <= NO_SPREAD**2:
        return difference, 0.0, 1.0
    df = variance**2 / sum(part**2 / (len(arm) - 1) for part, arm in zip(parts, (a, b), strict=True))
    return difference, math.sqrt(variance), df


def _compare_replicates(treated: Sequence[Replicate], control: Sequence[Replicate], confidence: float, margin: float) -> Comparison:
    arms = [{run.seed: run for run in arm} for arm in (treated, control)]
    answers = [[run.correct for run in arm] for arm in (treated, control)]
    if arms[0].keys() == arms[1].keys() and arms[0] and all(given is not None for arm in answers for given in arm):
        seeds = sorted(arms[0])
        accuracies = [[arm[seed].accuracy for seed in seeds] for arm in arms]
        correct = tuple(np.array([arm[seed].correct for seed in seeds]) for arm in arms)
        return compare(*accuracies, confidence=confidence, margin=margin, correct=(correct[0], correct[1]))
    counts = {len(given) for arm in answers for given in arm if given is not None}
    shares = [{seed: run.accuracy for seed, run in arm.items()} for arm in arms]
    return compare_by_seed(*shares, confidence=confidence, margin=margin, questions=min(counts, default=None))


def _risk(arm: Sequence[Replicate], confidence: float) -> CollapseRisk:
    if not arm:
        raise ValueError("needs at least one replicate of each arm")
    collapsed = sum(run.collapsed for run in arm)
    interval = stats.binomtest(collapsed, len(arm)).proportion_ci(confidence, method="exact")
    return CollapseRisk(
        collapsed=collapsed, replicates=len(arm), probability=collapsed / len(arm), low=float(interval.low), high=float(interval.high)
    )


def _boschloo(treated: CollapseRisk, control: CollapseRisk) -> float:
    if treated.probability == control.probability and treated.probability in (0.0, 1.0):
        return 1.0  # all alike: there is nothing to test
    arms = (treated, control)
    table = [[arm.collapsed for arm in arms], [arm.replicates - arm.collapsed for arm in arms]]
    return float(stats.boschloo_exact(table).pvalue)


def _planned_error(sd: float, shared: float, count: int) -> tuple[float, float]:
    """Standard error and degrees of freedom that so many replicates would have; `shared` is the variance that none of them reduces."""
    own = sd**2 / count
    if own == 0:
        return math.sqrt(shared), float(MAX_REPLICATES)
    return math.sqrt(own + shared), (own + shared) ** 2 / (own**2 / (count - 1))


def _power(ratio: float, df: float, level: float) -> float:
    """Of the two-sided t test, the true difference being `ratio` standard errors: the noncentral t distribution."""
    critical = float(special.stdtrit(df, 1 - level / 2))
    if ratio > SURELY * critical + 8:
        return 1.0
    # Rejecting on the wrong side: below 1e-7 or half the level where it is left out, since scipy has no number for some of these.
    below = float(special.nctdtr(df, ratio, -critical)) if ratio < 4 and level > 1e-4 else 0.0
    power = 1 - float(special.nctdtr(df, ratio, critical)) + below
    if not math.isfinite(power):
        raise ArithmeticError(f"the noncentral t distribution has no number at df {df}, noncentrality {ratio}, level {level}")
    return power


def _power_of(difference: float, sd: float, shared: float, count: int, level: float) -> float:
    se, df = _planned_error(sd, shared, count)
    if se == 0:
        return 1.0 if difference != 0 else 0.0
    return _power(abs(difference) / se, df, level)


def _chance_of_same(difference: float, sd: float, shared: float, count: int, level: float, margin: float) -> float:
    """That the interval comes to lie within the margin; normal mean, spread as it is now."""
    se, df = _planned_error(sd, shared, count)
    if se == 0:
        return 1.0 if abs(difference) <= margin else 0.0
    room = margin - _half_width(se, df, level)
    return float(special.ndtr((room - difference) / se) - special.ndtr((-room - difference) / se)) if room > 0 else 0.0


def _needs(comparison: Comparison, se: float, level: float) -> int | None:
    """More replicates until `better`, `worse` or `same` has a chance of 80 %, were this difference and this spread the true ones."""
    difference, margin, count = comparison.difference, comparison.margin, comparison.replicates
    # Unpaired arms have no such spread: n more of each shrink the standard error about as n more pairs of a paired test would.
    sd = se * math.sqrt(count) if comparison.sd is None else comparison.sd
    shared = max(0.0, se**2 - sd**2 / count)

    def enough(total: int) -> bool:
        return (
            _power_of(difference, sd, shared, total, level) >= 0.8 or _chance_of_same(difference, sd, shared, total, level, margin) >= 0.8
        )

    total = _first(enough, max(count + 1, MIN_REPLICATES))
    return None if total is None else total - count


def _first(enough: Callable[[int], bool], least: int) -> int | None:
    """The smallest count from `least` on that is enough; chances grow with the count, so it is bracketed and halved."""
    if enough(least):
        return least
    low, high = least, 2 * least
    while not enough(high):
        if high >= MAX_REPLICATES:
            return None
        low, high = high, min(2 * high, MAX_REPLICATES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _checked(
    treated: Sequence[float], control: Sequence[float], correct: tuple[ArrayLike, ArrayLike] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """Accuracies of both arms, and the differences of their answers if there are any."""
    if len(treated) != len(control) or len(treated) == 0:
        raise ValueError(f"needs as many treated as control replicates and at least one, but got {len(treated)} and {len(control)}")
    a, b = _accuracies(treated), _accuracies(control)
    return a, b, None if correct is None else _answers(a, b, correct)


def _accuracies(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("an accuracy is not finite; a failed run has no accuracy and must be run again")
    return array


def _booleans(values: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise ValueError("an answer is right (1) or wrong (0); something else was given")
    return array.astype(np.bool_)


def _answers(a: NDArray[np.float64], b: NDArray[np.float64], correct: tuple[ArrayLike, ArrayLike]) -> NDArray[np.float64]:
    """Differences [replicates, questions] of the answers, once they have been found to be those of the accuracies."""
    sides = [_booleans(side).astype(np.float64) for side in correct]
    if any(side.ndim != 2 or len(side) != len(a) for side in sides) or sides[0].shape != sides[1].shape or sides[0].shape[1] < 2:
        shapes = " and ".join(str(side.shape) for side in sides)
        raise ValueError(f"needs answers [{len(a)} replicates, questions] of both arms to the same questions, but got {shapes}")
    for accuracy, side in zip((a, b), sides, strict=True):
        if np.abs(side.mean(axis=1) - accuracy).max() > 1e-6:
            raise ValueError("the answers do not add up to the accuracies: they are in another order, or of other runs")
    return np.asarray(sides[0] - sides[1])


def _level(confidence: float) -> float:
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is a share between 0.5 and 1 (0.95 = 95 %), but got {confidence}")
    return round(1 - confidence, 12)


def _check_planning(sd: float, power: float) -> None:
    if not (math.isfinite(sd) and sd >= 0):
        raise ValueError(f"sd is a finite spread of at least 0, but got {sd}")
    if not 0.5 <= power < 1:
        raise ValueError(f"power is a share from 0.5 to below 1, but got {power}")

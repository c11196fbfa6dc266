"""Which of several hypotheses is true: the plan's confidences beforehand, the replicates, and what to believe then.

A set of hypotheses (H1: global or targeted?) says of each alternative which arm is the best one. All alternatives and
"no difference" exclude each other, so their probabilities have to sum to one, and the plan's confidences (70 and 60 %)
do not. They are read as independent claims of which at most one turned out true: the weight of an alternative is then
its odds c / (1 - c), that of "none of them" 1. Where the set has arms that no alternative speaks for (H2's uniform
sigma), "none of them" is split evenly into "no difference" and "another arm is best".

**Model.** Accuracy [seed, arm] = seed + arm + luck. Beforehand arms are alike ("no difference"), or each effect is
drawn from N(0, s^2 / 2) and the best one names the alternative: any two arms then differ by N(0, s^2), s = 2 points.
Seeds drop out, as in a paired t test: what counts are contrasts between arms (for two arms their difference per seed).

**Few replicates.** Two to five say little about their own spread, so the variance has a prior from the run-to-run
spread (`run_spread`): what is known of the workload (else DIFFERENCE_SD) counts as KNOWN_DF degrees of freedom, and the
other arms of the same programme add theirs. Scaled inverse chi-square, integrated out on a grid: the likelihood is a t
with more degrees of freedom than the replicates alone would give, and replicates that agree by chance make no
certainty. What all replicates share, because they answer the same questions, is taken from the crossed layout of
`search/statistics.py` and added to the variance of the mean, so that more seeds do not turn the luck of one list of
questions into evidence. The prior ends at MOST_SPREAD times what is known: without an end, arms 50 points apart would
be taken for alike with a wild spread, since N(0, 2 points) finds such an effect harder to believe.

**Status.** confirmed: at least CONFIRMED at the stated width of the prior, and more likely than not at the others of
PRIOR_SDS; rejected: at most REJECTED, and less likely than not; else inconclusive, with the reason. Since the rule
looks at nothing but data, what is called confirmed is true as often as its probabilities say (simulated in
tests/test_hypotheses.py, also with a spread that the prior has wrong).

**Collapses.** A collapsed run counts with the accuracy at its stop. But where every arm collapsed in half of its runs
or more, these accuracies say which arm was stopped with less damage, and not which is the better way to train: the set
is inconclusive then, and so is an alternative that is ahead by an arm that collapses like that.

Left out: unequal variances of arms (with two arms there is one variance; with three the pooled one), and seeds that not
all arms have.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from search.replicates import Replicate

Array = NDArray[np.float64]
Status = Literal["confirmed", "rejected", "inconclusive"]

NO_DIFFERENCE, OTHERWISE = "no difference", "none of these"
PRIOR_SDS = (0.01, 0.02, 0.04)
"""Std of the difference between two arms beforehand, shares; the middle one is the stated one."""
PRIOR_SD = 0.02
KNOWN_DF = 4.0
DIFFERENCE_SD = 0.03
"""Std from seed to seed of the difference between two arms where nothing is known of the workload: of the plan, two
runs of one configuration differed by 4.3 points at step 20."""
CONFIRMED, REJECTED = 0.95, 0.05
MIN_SEEDS = 2
"""Fewer common seeds leave the probabilities where they were: one pair cannot be told from the luck of its run."""
MOST_SPREAD = 3.0
"""Times what is known of the spread: a wider one, which no run has shown, must not explain any difference away."""
_LOG_SPREADS = np.linspace(math.log(0.05), math.log(MOST_SPREAD), 160)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(40)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Example: Alternative(name="H1a", arm="e13i-baseline", confidence=0.7)."""

    name: str
    arm: str
    """Which it says is the best of the set."""
    confidence: float
    """The plan's own, 0 to 1 (both excluded); these do not sum to one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Example: Spread(sd=0.0146, df=19.0)."""

    sd: float
    """From seed to seed, of the difference between two arms; a share."""
    df: float
    """Degrees of freedom that it is worth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """A line of the tracker.

    Example: Belief(name="H1a", arm="e13i-baseline", confidence=0.7, prior=0.483, posterior=0.971,
    by_sd=((0.01, 0.955), (0.02, 0.971), (0.04, 0.974)), bayes_factor=31.0, status="confirmed", reason="")
    """

    name: str
    """Of the alternative; NO_DIFFERENCE; OTHERWISE: an arm is best for which no alternative speaks."""
    arm: str
    """Empty where it names none."""
    confidence: float | None
    """As the plan wrote it; None for what it did not write."""
    prior: float
    posterior: float
    """At PRIOR_SD."""
    by_sd: tuple[tuple[float, float], ...]
    """(prior sd, posterior) at each of PRIOR_SDS."""
    bayes_factor: float | None
    """Against "no difference", at PRIOR_SD; None where nothing was measured."""
    status: Status
    reason: str
    """Why it is inconclusive; empty elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """A set of hypotheses, as far as it could be tested."""

    beliefs: tuple[Belief, ...]
    """The alternatives, NO_DIFFERENCE, and OTHERWISE where there is such an arm."""
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    """That all arms have: the replicates behind it."""
    means: Mapping[str, float]
    """Accuracy over those seeds, by arm; empty where nothing could be compared."""
    collapsed: Mapping[str, tuple[int, int]]
    """(collapsed, runs) of each arm that has run, over all its seeds."""
    spread: Spread
    """What was thought of the run-to-run spread before these arms were looked at."""
    not_tested: str
    """Why the probabilities are those of beforehand; empty where they are not."""

    @property
    def likeliest(self) -> Belief:
        return max(self.beliefs, key=lambda belief: belief.posterior)


def weigh(
    alternatives: Sequence[Alternative],
    runs: Mapping[str, Sequence[Replicate]],
    *,
    others: Sequence[str] = (),
    known_sd: float | None = None,
) -> Weighed:
    """`runs`: by arm, of the whole programme; an arm without an entry has not run. `others`: arms of the set for which
    no alternative speaks. `known_sd`: std from seed to seed of the difference between two arms, known of the workload.

    Raises ValueError for fewer than two arms, two alternatives for one arm, and confidences that are no odds.
    """
    arms = tuple(dict.fromkeys([*(one.arm for one in alternatives), *others]))
    _check(alternatives, arms)
    prior = priors(alternatives, others=len(arms) > len(alternatives))
    by_seed = {arm: {run.seed: run for run in runs.get(arm, ())} for arm in arms}
    common = set.intersection(*(set(by_seed[arm]) for arm in arms))
    seeds = tuple(sorted(common))
    not_tested = ""
    if absent := [arm for arm in arms if not by_seed[arm]]:
        not_tested = f"not measured: no runs of {', '.join(absent)}"
    elif len(seeds) < MIN_SEEDS:
        have = "one seed is" if seeds else "no seed is"
        not_tested = f"{have} common to {', '.join(arms)}; at least {MIN_SEEDS} are needed"
    collapsed = {
        arm: (sum(run.collapsed for run in by_seed[arm].values()), len(by_seed[arm])) for arm in arms if by_seed[arm]
    }
    spread = run_spread({arm: own for arm, own in runs.items() if arm not in arms}, known_sd)
    if not_tested:
        unmoved = dict.fromkeys(PRIOR_SDS, prior)
        beliefs = _beliefs(alternatives, prior, unmoved, None, dict.fromkeys(prior, not_tested))
        means: dict[str, float] = {}
    else:
        table = [[by_seed[arm][seed] for arm in arms] for seed in seeds]
        accuracies = np.array([[run.accuracy for run in row] for row in table])  # [R, K]
        if not np.isfinite(accuracies).all():
            raise ValueError("an accuracy is not finite; a failed run has no accuracy and must be run again")
        shared = _shared_variance(table)
        evidence = {sd: _evidence(accuracies, shared, spread, sd, alternatives) for sd in PRIOR_SDS}
        posterior = {sd: _posterior(prior, logs) for sd, logs in evidence.items()}
        stated = evidence[PRIOR_SD]
        factors = {name: _exp(stated[name] - stated[NO_DIFFERENCE]) for name in prior}
        beliefs = _beliefs(alternatives, prior, posterior, factors, _blocked(alternatives, prior, collapsed))
        means = dict(zip(arms, map(float, accuracies.mean(axis=0)), strict=True))
    return Weighed(
        beliefs=beliefs,
        arms=arms,
        seeds=seeds,
        means=means,
        collapsed=collapsed,
        spread=spread,
        not_tested=not_tested,
    )


def priors(alternatives: Sequence[Alternative], *, others: bool) -> dict[str, float]:
    """By name, summing to one. Example: confidences 0.7 and 0.6 -> 0.483, 0.310, no difference 0.207."""
    weights = {one.name: one.confidence / (1 - one.confidence) for one in alternatives}
    weights |= {NO_DIFFERENCE: 0.5, OTHERWISE: 0.5} if others else {NO_DIFFERENCE: 1.0}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def run_spread(runs: Mapping[str, Sequence[Replicate]], known_sd: float | None) -> Spread:
    """Of what is known of the workload, and of runs that held: what seed and arm leave over, by least squares."""
    known = known_sd or DIFFERENCE_SD
    held = [(arm, run) for arm, own in runs.items() for run in own if not run.collapsed]
    left, df = 0.0, 0
    if held:
        columns = [[label == one for label in labels] for labels in _labels(held) for one in dict.fromkeys(labels)]
        design = np.array(columns, dtype=np.float64).T  # [runs, seeds + arms]
        values = np.array([run.accuracy for _, run in held])
        fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
        left, df = 2 * float(((values - design @ fitted) ** 2).sum()), len(held) - int(rank)
    total = KNOWN_DF + df
    return Spread(sd=math.sqrt((KNOWN_DF * known**2 + left) / total), df=total)


def _labels(held: Sequence[tuple[str, Replicate]]) -> tuple[list[object], list[object]]:
    return [run.seed for _, run in held], [arm for arm, _ in held]


def _check(alternatives: Sequence[Alternative], arms: Sequence[str]) -> None:
    if len(arms) < 2:
        raise ValueError(f"a hypothesis compares at least two arms, but got {', '.join(arms) or 'none'}")
    if len({one.arm for one in alternatives}) != len(alternatives):
        raise ValueError("two alternatives say that the same arm is best: they do not exclude each other")
    for one in alternatives:
        if not 0 < one.confidence < 1:
            raise ValueError(f"{one.name}: confidence {one.confidence} leaves nothing to learn; give 0.01 to 0.99")


# --- the probability of the data --------------------------------------------------------------------------------------


def _evidence(
    accuracies: Array, shared: float, spread: Spread, prior_sd: float, alternatives: Sequence[Alternative]
) -> dict[str, float]:
    """Log marginal likelihood by hypothesis, up to a constant. `accuracies` [R, K], the alternatives' arms first;
    `shared`: variance of a contrast's mean that all replicates share."""
    runs, arms = accuracies.shape
    around = accuracies - accuracies.mean(axis=1, keepdims=True)  # [R, K], without the seed: contrasts, K - 1 of them
    effects = around.mean(axis=0)  # [K], sums to 0
    free = arms - 1
    squares = float(((around - effects) ** 2).sum())  # of (R - 1)(K - 1) degrees of freedom
    length = float((effects**2).sum())

    variance = (spread.sd**2 / 2) * np.exp(2 * _LOG_SPREADS)  # [S] of one run's contrast; a difference has twice that
    logs = -spread.df * (_LOG_SPREADS + np.exp(-2 * _LOG_SPREADS) / 2)  # scaled inverse chi-square, per log
    logs -= (runs - 1) * free / 2 * np.log(variance) + squares / (2 * variance)
    logs[[0, -1]] -= math.log(2)  # the trapezoidal rule
    error = variance / runs + shared  # [S] of a contrast's mean
    null = logs + _log_normal(length, error, free)
    width = prior_sd**2 / 2
    differs = logs + _log_normal(length, error + width, free)
    # Given the spread, effects are normal around their shrunken means, independent but for their sum: who is best?
    shrink = width / (width + error)  # [S]
    centres = shrink[:, None] * effects  # [S, K]
    scale = np.sqrt(shrink * error)  # [S]
    result = {NO_DIFFERENCE: float(special.logsumexp(null))}
    chances = [_is_best(centres, scale, arm) for arm in range(arms)]  # each [S]
    for arm, one in enumerate(alternatives):
        result[one.name] = _weighted(differs, chances[arm]) + math.log(arms)
    if rest := chances[len(alternatives) :]:
        result[OTHERWISE] = _weighted(differs, np.sum(rest, axis=0)) + math.log(arms / len(rest))
    return result


def _log_normal(length: float, variance: Array, free: int) -> Array:
    return -0.5 * (free * np.log(variance) + length / variance)


def _is_best(centres: Array, scale: Array, arm: int) -> Array:
    """[S]: that this arm's effect is the largest; effects ~ N(centres [S, K], scale [S])."""
    ahead = (centres[:, [arm]] - np.delete(centres, arm, axis=1)) / scale[:, None]  # [S, K - 1]
    if ahead.shape[1] == 1:
        return np.asarray(special.ndtr(ahead[:, 0] / math.sqrt(2)))
    others = special.ndtr(ahead[:, :, None] + _NODES)  # [S, K - 1, nodes]
    return np.asarray((others.prod(axis=1) * _WEIGHTS).sum(axis=1) / math.sqrt(2 * math.pi))


def _weighted(logs: Array, chances: Array) -> float:
    return float(special.logsumexp(logs, b=np.maximum(chances, 1e-300)))


def _shared_variance(table: Sequence[Sequence[Replicate]]) -> float:
    """Of a contrast's mean: what stays however many seeds answer the same questions (`statistics._layout`'s second
    part); at least as if one question more had gone each way. 0 where answers were not kept."""
    if any(run.correct is None for row in table for run in row):
        return 0.0
    answers = np.array([[run.correct for run in row] for row in table], dtype=np.float64)  # [R, K, Q]
    runs, arms, questions = answers.shape
    around = answers - answers.mean(axis=1, keepdims=True)
    by_question = around.mean(axis=0)  # [K, Q]
    total = by_question.mean(axis=1, keepdims=True)  # [K, 1]
    free = arms - 1
    ms_question = runs * float(((by_question - total) ** 2).sum()) / ((questions - 1) * free)
    rest = around - by_question - around.mean(axis=2, keepdims=True) + total
    ms_rest = float((rest**2).sum()) / ((runs - 1) * (questions - 1) * free)
    return float(max((ms_question - ms_rest) / (runs * questions), 1 / questions**2))


# --- what is said -----------------------------------------------------------------------------------------------------


def _posterior(prior: Mapping[str, float], logs: Mapping[str, float]) -> dict[str, float]:
    joint = {name: math.log(share) + logs[name] for name, share in prior.items()}
    total = float(special.logsumexp(list(joint.values())))
    return {name: math.exp(log - total) for name, log in joint.items()}


def _exp(logarithm: float) -> float:
    return math.exp(logarithm) if logarithm < 700 else math.inf


def _blocked(
    alternatives: Sequence[Alternative], prior: Mapping[str, float], collapsed: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """By name, why accuracies must not confirm it (or, where all arms collapsed, say anything)."""
    breaking = {arm: of for arm, of in collapsed.items() if 2 * of[0] >= of[1]}
    told = ", ".join(f"{arm} collapsed in {of[0]} of {of[1]} runs" for arm, of in breaking.items())
    if len(breaking) == len(collapsed):
        why = f"{told}: accuracies at the stop say which was stopped with less damage, not which trains better"
        return dict.fromkeys(prior, why)
    arms = {one.name: one.arm for one in alternatives}
    return {
        name: f"{arm} collapsed in {breaking[arm][0]} of {breaking[arm][1]} runs: accuracies at a stop confirm nothing"
        for name, arm in arms.items()
        if arm in breaking
    } | ({NO_DIFFERENCE: f"{told}: arms that collapse and arms that hold differ"} if breaking else {})


def _beliefs(
    alternatives: Sequence[Alternative],
    prior: Mapping[str, float],
    posterior: Mapping[float, Mapping[str, float]],
    factors: Mapping[str, float] | None,
    blocked: Mapping[str, str],
) -> tuple[Belief, ...]:
    named = {one.name: one for one in alternatives}
    everything = len(blocked) == len(prior)
    beliefs = []
    for name in prior:
        by_sd = tuple((sd, shares[name]) for sd, shares in posterior.items())
        status, reason = _status(dict(by_sd))
        if name in blocked and (everything or status == "confirmed"):
            status, reason = "inconclusive", blocked[name]
        beliefs.append(
            Belief(
                name=name,
                arm=named[name].arm if name in named else "",
                confidence=named[name].confidence if name in named else None,
                prior=prior[name],
                posterior=posterior[PRIOR_SD][name],
                by_sd=by_sd,
                bayes_factor=None if factors is None else factors[name],
                status=status,
                reason=reason,
            )
        )
    return tuple(beliefs)


def _status(by_sd: Mapping[float, float]) -> tuple[Status, str]:
    stated, low, high = by_sd[PRIOR_SD], min(by_sd.values()), max(by_sd.values())
    if stated >= CONFIRMED and low > 0.5:
        return "confirmed", ""
    if stated <= REJECTED and high < 0.5:
        return "rejected", ""
    if stated >= CONFIRMED or stated <= REJECTED:
        return "inconclusive", f"it hangs on the prior: {100 * low:.0f} to {100 * high:.0f} % over its widths"
    return "inconclusive", f"{100 * stated:.0f} %, neither {100 * CONFIRMED:g} nor {100 * REJECTED:g}"

"""pass@k over k: an arm's curve with its band.

The curve is the mean over replicates of what `trainable/pass_at_k.py` estimates. Its band says where a run of another
seed on other questions would lie: from three replicates on the interval of the crossed layout of
`search/statistics.py`, before that the interval over questions alone, which is said (`seeds`). Bands of two arms that
overlap decide nothing: arms share seeds and questions, and the comparison beside the curve is of their differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from search.arms import Arm, measured
from search.replicates import MIN_REPLICATES
from search.statistics import mean_interval
from trainable.pass_at_k import interval, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Example: CurvePoint(k=4, share=0.76, low=0.74, high=0.78, start=0.41, seeds=True)"""

    k: int
    share: float
    """Mean over replicates, of the clean models at the end or at the stop."""
    low: float
    high: float
    start: float
    """Before training."""
    seeds: bool
    """Whether the band holds the spread over seeds too."""

    @property
    def measure(self) -> str:
        return f"pass@{self.k}"


def sampled_in(arms: Sequence[Arm]) -> int:
    """Samples per question that every trial with an outcome has; 0 where one has none, or none has ended."""
    return min((outcome.config.eval.samples for arm in arms for outcome in arm.results.values()), default=0)


def curve_of(arm: Arm, samples: int) -> tuple[CurvePoint, ...]:
    """At the k that tables have room for; empty where nothing was sampled."""
    points = []
    for k in shown(samples):
        runs = [seen for outcome in arm.results.values() if (seen := measured(outcome, f"pass@{k}")) is not None]
        if not runs:
            return ()
        answers = [run.answers for run in runs]
        low, high = _over_questions(answers, samples)
        seeds = len(runs) >= MIN_REPLICATES
        if seeds:
            wider = mean_interval(answers)
            low, high = min(low, wider[0]), max(high, wider[1])
        share, start = fmean(run.share for run in runs), fmean(run.start for run in runs)
        points.append(CurvePoint(k=k, share=share, low=low, high=high, start=start, seeds=seeds))
    return tuple(points)


def _over_questions(answers: Sequence[Sequence[float]], samples: int) -> tuple[float, float]:
    means = [fmean(of_question) for of_question in zip(*answers, strict=True)]
    share = fmean(means)
    squares = sum((mean - share) ** 2 for mean in means)
    return interval(share, squares, len(means), len(means) * samples * len(answers))

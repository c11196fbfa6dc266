"""What a step showed, as named numbers.

Every signal is a field of one record; rules read the field, everyone else the name under which it is tracked
(`metrics.py`). None means "not measured in this step" (a baseline rollout has no gradient); NaN means that something
broke, is kept, and makes the collapse rule `nonfinite` fire.

Entropy and log-probs are those of the policy that sampled, noise included. Gibberish is judged by the clean policy: the
share of sampled tokens that it finds less likely than exp(-2) / V, V being the tokens that it can say: clearly worse
than a blind guess (prime-rl's rule without its vocabulary order).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from trainable.episode import FilterOutcome, Group
from trainable.forward.logps import Batch, ImportanceWeights
from trainable.metrics import METRICS, REWARD
from trainable.tasks.task import Score

_N_GRAM = 4  # of the repetition signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """One step; what each field means, and how it is tracked, says `metrics.py`."""

    sigma: float
    reward: float
    reward_std: float
    accuracy: float
    all_wrong: float
    all_right: float
    kept_groups: float
    gen_batches: float
    wasted: float
    entropy: float
    length: float
    truncated: float
    distinct_2: float
    repetition: float
    gibberish: float
    kl: float
    logp_gap: float
    weight: float
    effective_share: float
    loss: float | None = None
    grad_norm: float | None = None
    clip_fraction: float | None = None
    reference_kl: float | None = None
    rewards: tuple[tuple[str, float], ...] = ()
    """Mean of each reward function, tracked as grpo/reward/NAME."""

    def as_metrics(self) -> dict[str, float]:
        """Tracked name -> value, for everything that was measured."""
        metrics = {name: value for attribute, name in NAMES.items() if (value := getattr(self, attribute)) is not None}
        return metrics | {f"{REWARD}/{name}": value for name, value in self.rewards}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMetrics:
    """Means over a step's updates; fields of `Signals`."""

    loss: float
    grad_norm: float
    """Largest global norm before clipping. Not finite: the update was not applied, so that the weights stay usable."""
    clip_fraction: float
    reference_kl: float


def measure(
    groups: Sequence[Group],
    batch: Batch,
    rewards: Sequence[Sequence[float]],
    outcome: FilterOutcome,
    *,
    sigma: float,
    gen_batches: int,
    vocabulary: int,
    correction: ImportanceWeights,
    update: UpdateMetrics | None = None,
) -> Signals:
    """`groups` and `rewards` are all that was generated, `batch` what was trained on (or would have been), with clean
    log-probs and `correction`."""
    episodes = [episode for group in groups for episode in group]
    flat = [reward for row in rewards for reward in row]
    inside = batch.mask > 0
    gap = (batch.old_logps - batch.rollout_logps)[inside]
    return Signals(
        sigma=sigma,
        reward=mean(flat),
        reward_std=mean([_std(row) for row in rewards]),
        accuracy=mean([float(e.score.correct) for e in episodes]),
        all_wrong=outcome.all_wrong / outcome.generated,
        all_right=outcome.all_right / outcome.generated,
        kept_groups=float(len(outcome.groups)),
        gen_batches=float(gen_batches),
        wasted=1 - len(outcome.groups) / outcome.generated,
        entropy=mean([e.completion.entropy for e in episodes]),
        length=mean([float(len(e.completion.ids)) for e in episodes]),
        truncated=mean([float(not e.completion.finished) for e in episodes]),
        distinct_2=mean([distinct_share(e.completion.ids, 2) for e in episodes]),
        repetition=mean([1 - distinct_share(e.completion.ids, _N_GRAM) for e in episodes]),
        gibberish=(batch.old_logps[inside] < -math.log(vocabulary) - 2).float().mean().item(),
        kl=correction.kl,
        logp_gap=gap.abs().mean().item(),
        weight=correction.mean,
        effective_share=correction.effective_share,
        **({} if update is None else asdict(update)),
        rewards=tuple(sorted(mean_parts([e.score for e in episodes]).items())),
    )


def distinct_share(ids: Sequence[int], n: int) -> float:
    """Different n-grams over all n-grams; 1 for a sequence too short to hold two."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN stays NaN."""
    return sum(values) / len(values)


def mean_parts(scores: Sequence[Score]) -> dict[str, float]:
    """Of every mark, over the answers that have it."""
    names = dict.fromkeys(name for score in scores for name in score.parts)
    return {name: mean([score.parts[name] for score in scores if name in score.parts]) for name in names}


def _std(row: Sequence[float]) -> float:
    centre = mean(row)
    return math.sqrt(sum((value - centre) ** 2 for value in row) / (len(row) - 1))


NAMES: dict[str, str] = {
    field.name: tracked
    for field in fields(Signals)
    for tracked in METRICS
    if tracked.split("/")[0] not in ("eval", "perf") and tracked.split("/")[1] == field.name
}
"""Field -> tracked name: a signal is the last word of its name."""

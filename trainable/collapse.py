"""When generation has collapsed: rules over signals, and a verdict that says which rule, when, and on what evidence.

A collapse is a result, not a crash. Recorded collapses go both ways (entropy to 9.5 nats and to 0.01; answers twice as
long and half as long), so the rules look both ways. They compare a step with the run's own noise-free baseline (a
rollout before step 0, and the quiet stage where the schedule has one) because healthy runs differ: 22 to 66 % of the
groups of a healthy run are all wrong, so no absolute limit on that exists here. A level has to be wrong for `patience`
steps in a row; two things fire at once: a number that is not finite, and a filter that found too few groups with
variance because nothing was right.

The rules themselves: `collapse_rules.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from spaces.config import CollapseConfig
from trainable.collapse_rules import RULES, Baseline
from trainable.episode import FilterOutcome
from trainable.outcome import HEALTHY, CollapseVerdict
from trainable.signals import NAMES, Signals, mean


@dataclass(slots=True, kw_only=True)
class CollapseDetector:
    """Feed it the baseline, then every step in order. NaN rule: a non-finite signal is a collapse at once, in every
    mode."""

    config: CollapseConfig
    baseline: list[dict[str, float]] = field(default_factory=list)
    """Signals of the noise-free rollouts so far."""
    streaks: dict[str, int] = field(default_factory=dict)
    """Steps in a row in which a rule held."""

    def observe(self, signals: Signals, *, quiet: bool, filtered: FilterOutcome | None = None) -> CollapseVerdict:
        """Judge one step. `quiet`: it belongs to the noise-free baseline and extends it."""
        verdict = not_finite(signals.as_metrics())
        if verdict.collapsed:
            return verdict
        if filtered is not None and filtered.rejected_as_wrong:
            return CollapseVerdict(collapsed=True, rule="filter_rejection", evidence=_rejection(signals))
        return self.judge(_values(signals), quiet=quiet)

    def judge(self, values: Mapping[str, float], *, quiet: bool) -> CollapseVerdict:
        """`observe` for finite values by field name, of whoever has no filter and not all signals: those that rules
        look at."""
        if quiet:
            self.baseline.append(dict(values))
            return HEALTHY
        base = self._baseline()
        verdict = HEALTHY
        for name, rule in RULES.items():
            holds = rule.holds(values, base, self.config)
            self.streaks[name] = streak = self.streaks.get(name, 0) + 1 if holds else 0
            if holds and streak >= self.config.patience and not verdict.collapsed:
                evidence = rule.evidence.format(now=values, base=base)
                verdict = CollapseVerdict(collapsed=True, rule=name, evidence=f"{evidence}, {streak} steps in a row")
        return verdict

    def state(self) -> dict[str, Any]:
        return {"baseline": self.baseline, "streaks": self.streaks}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.baseline = [dict(values) for values in state["baseline"]]
        self.streaks = dict(state["streaks"])

    def _baseline(self) -> Baseline:
        assert self.baseline, "the baseline rollout comes before the first step"
        names = set.intersection(*(set(values) for values in self.baseline))
        base = {name: mean([values[name] for values in self.baseline]) for name in names}
        norms = [values["grad_norm"] for values in self.baseline if "grad_norm" in values]
        return base | ({"grad_norm": median(norms)} if norms else {})


def not_finite(metrics: Mapping[str, float]) -> CollapseVerdict:
    """By tracked name. Healthy where all are finite."""
    broken = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    return CollapseVerdict(collapsed=True, rule="nonfinite", evidence=broken[0]) if broken else HEALTHY


def _values(signals: Signals) -> dict[str, float]:
    return {name: value for name in NAMES if (value := getattr(signals, name)) is not None}


def _rejection(signals: Signals) -> str:
    return (
        f"{signals.kept_groups:.0f} groups with variance after {signals.gen_batches:.0f} batches; "
        f"{signals.all_wrong:.0%} of groups all wrong, {signals.all_right:.0%} all right"
    )

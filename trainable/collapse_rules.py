"""The collapse rules about a level: which signal, on which side of which limit, and what is said of it.

A rule is data, so that whoever looks at a collapse afterwards can draw the limit that was passed: `drawn_limit` takes
the baseline from the evidence, which names it to three digits, and asks the rule again. Read without torch.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spaces.config import CollapseConfig

Baseline = Mapping[str, float]
"""Mean of each signal over the noise-free baseline, by field name; grad_norm is a median and may be missing."""
_BASELINE = re.compile(r"(?:baseline|quiet steps) ([-+.\de]+)(%?)")


@dataclass(frozen=True, slots=True)
class Rule:
    """When something is wrong with a step, and what is said of it."""

    signal: str
    """Field of `Signals`."""
    limit: Callable[[Baseline, CollapseConfig], float]
    evidence: str
    """With `now` and `base`."""
    below: bool = False
    """Wrong below the limit; else above it."""
    only_if: Callable[[Baseline, Baseline, CollapseConfig], bool] = lambda now, base, limits: True
    """What else must hold; asked first."""

    def holds(self, now: Baseline, base: Baseline, limits: CollapseConfig) -> bool:
        if not self.only_if(now, base, limits):
            return False
        value, limit = now[self.signal], self.limit(base, limits)
        return value < limit if self.below else value > limit


def drawn_limit(rule: str, evidence: str, limits: CollapseConfig) -> float | None:
    """The limit that a verdict was about, to the three digits of its evidence; None for a rule without one."""
    if rule not in RULES:
        return None
    found = _BASELINE.search(evidence)
    base = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    return RULES[rule].limit({RULES[rule].signal: base}, limits)


RULES: dict[str, Rule] = {
    "entropy_high": Rule(
        "entropy",
        lambda base, limits: max(limits.entropy_high_ratio * base["entropy"], limits.entropy_high_floor),
        "entropy {now[entropy]:.3g} nats, baseline {base[entropy]:.3g}",
    ),
    "gibberish": Rule(
        "gibberish",
        lambda base, limits: base["gibberish"] + limits.gibberish_share,
        "{now[gibberish]:.1%} of tokens are gibberish to the clean policy, baseline {base[gibberish]:.1%}",
    ),
    "mismatch": Rule(
        "kl", lambda base, limits: limits.mismatch_kl, "KL(rollout || clean policy) {now[kl]:.3g} nats per token"
    ),
    "truncation": Rule(
        "truncated",
        lambda base, limits: base["truncated"] + limits.truncation_rise,
        "{now[truncated]:.0%} of completions cut off, baseline {base[truncated]:.0%}",
    ),
    "repetition": Rule(
        "repetition",
        lambda base, limits: base["repetition"] + limits.repetition_rise,
        "{now[repetition]:.0%} of 4-grams repeated, baseline {base[repetition]:.0%}",
    ),
    "length_up": Rule(
        "length",
        lambda base, limits: limits.length_ratio * base["length"],
        "mean length {now[length]:.3g} tokens, baseline {base[length]:.3g}",
    ),
    "length_down": Rule(
        "length",
        lambda base, limits: base["length"] / limits.length_ratio,
        "mean length {now[length]:.3g} tokens, baseline {base[length]:.3g}",
        below=True,
    ),
    # A policy that grows certain while it grows right is learning.
    "entropy_low": Rule(
        "entropy",
        lambda base, limits: limits.entropy_low_ratio * base["entropy"],
        "entropy {now[entropy]:.3g} nats, baseline {base[entropy]:.3g}, reward not above its baseline",
        below=True,
        only_if=lambda now, base, limits: now["reward"] <= base["reward"],
    ),
    # Without a quiet stage there is no gradient to compare with, and this rule is silent.
    "grad_norm": Rule(
        "grad_norm",
        lambda base, limits: limits.grad_norm_ratio * base["grad_norm"],
        "gradient norm {now[grad_norm]:.3g}, quiet steps {base[grad_norm]:.3g}; "
        "{now[clip_fraction]:.0%} of ratios clipped",
        only_if=lambda now, base, limits: (
            "grad_norm" in now.keys() & base.keys() and now["clip_fraction"] > limits.grad_norm_clip
        ),
    ),
    "reward_low": Rule(
        "reward",
        lambda base, limits: limits.reward_ratio * base["reward"],
        "reward {now[reward]:.3g}, baseline {base[reward]:.3g}",
        below=True,
        only_if=lambda now, base, limits: base["reward"] >= max(limits.reward_floor, 1e-9),
    ),
}
"""In order: where several fire in one step, the first names the collapse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A rule for whoever meets it in a report."""

    means: str
    look: str
    """At what, to tell what was behind it."""


WORDS: dict[str, Words] = {
    "nonfinite": Words(
        means="A number that was measured is NaN or infinite: training cannot go on. It ends a trial in every mode.",
        look="the number that the evidence names; gradient norm and learning rate in the steps before it",
    ),
    "filter_rejection": Words(
        means="The filter found too few groups whose rewards differ, and mostly because nothing was right.",
        look="what the model wrote, beside the step before: gibberish is the noise; wrong answers from step 0 on are a "
        "task that is too hard for a filter",
    ),
    "entropy_high": Words(
        means="What is sampled comes close to chance: noise drowns what the model knows.",
        look="what the model wrote, and the applied sigma in the receipt; less sigma, or other modules",
    ),
    "gibberish": Words(
        means="The noisy policy says tokens that the clean one finds less likely than a blind guess.",
        look="what the model wrote; entropy and KL of the same steps",
    ),
    "mismatch": Words(
        means="Rollout and clean policy are far apart: what is learned from is not what the policy does.",
        look="effective sample share and importance weight; with sigma 0 it is arithmetic and not noise: `rin probe`",
    ),
    "truncation": Words(
        means="Many more answers than before run into the length limit.",
        look="mean length, and rollout.max_new_tokens",
    ),
    "repetition": Words(
        means="Answers repeat themselves.",
        look="what the model wrote; entropy of the same steps",
    ),
    "length_up": Words(
        means="Answers have become much longer: rambling, or a reward that pays for length.",
        look="reward and accuracy of the same steps, whether longer answers earn more",
    ),
    "length_down": Words(
        means="Answers have become much shorter: the model gives up, or a reward is won by saying little.",
        look="what the model wrote; reward beside accuracy",
    ),
    "entropy_low": Words(
        means="The policy has become certain without its reward having risen: nothing is left to learn from.",
        look="share of groups without variance; learning rate",
    ),
    "grad_norm": Words(
        means="Gradients are far larger than in the quiet steps, and many ratios are clipped.",
        look="share of clipped ratios, learning rate, updates per step; silent without a quiet stage",
    ),
    "reward_low": Words(
        means="The noisy rollouts earn a small part of what the clean model earned.",
        look="the clean accuracy: it may well hold, and rise again when sigma decays (collapse.mode=monitor shows it)",
    ),
}
"""Of every rule, also of the two that fire at once (`collapse.py`)."""

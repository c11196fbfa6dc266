"""Collapses that were recorded are found, at the right step and under the right name; what was healthy goes on."""

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest

from spaces.config import CollapseConfig
from trainable.collapse import CollapseDetector
from trainable.collapse_rules import RULES, drawn_limit
from trainable.episode import FilterOutcome
from trainable.outcome import HEALTHY, CollapseVerdict
from trainable.signals import NAMES, Signals

# A dense model in its noise-free stage, after the recorded runs: entropy 0.27 nats, length 215, a third of the groups
# all wrong.
DENSE = Signals(
    sigma=0.0,
    reward=0.73,
    reward_std=0.3,
    accuracy=0.73,
    all_wrong=0.33,
    all_right=0.1,
    kept_groups=64.0,
    gen_batches=1.0,
    wasted=0.4,
    entropy=0.27,
    length=215.0,
    truncated=0.03,
    distinct_2=0.9,
    repetition=0.05,
    gibberish=0.001,
    kl=0.001,
    logp_gap=0.02,
    weight=1.0,
    effective_share=0.98,
    loss=0.01,
    grad_norm=0.4,
    clip_fraction=0.01,
    reference_kl=0.0,
    rewards=(("correct", 0.73),),
)
# The recorded mixture of experts.
EXPERTS = replace(DENSE, reward=0.79, accuracy=0.79, entropy=0.051, kl=0.029, grad_norm=17.0, length=95.0)
# Before step 0 nothing has been learned, so there is no gradient.
UNLEARNED: dict[str, Any] = {"loss": None, "grad_norm": None, "clip_fraction": None, "reference_kl": None}


def run(
    steps: list[dict[str, Any]],
    base: Signals = DENSE,
    quiet: int = 3,
    filtered: FilterOutcome | None = None,
    **limits: Any,
) -> tuple[str, int | None]:
    """The rule that ends a trial, and its step: `quiet` quiet steps, then one step per dict of changes."""
    detector = CollapseDetector(config=CollapseConfig(**limits))
    assert detector.observe(replace(base, **UNLEARNED), quiet=True) == HEALTHY
    for step, changes in enumerate([{}] * quiet + steps):
        verdict = detector.observe(
            replace(base, **changes), quiet=step < quiet, filtered=filtered if step >= quiet else None
        )
        if verdict.collapsed:
            return verdict.rule, step
    return "", None


MOE = {
    "entropy": 0.217,
    "kl": 0.134,
    "grad_norm": 88.7,
    "clip_fraction": 0.13,
    "length": 55.0,
    "reward": 0.34,
    "accuracy": 0.34,
}

# what was recorded, its steady state, the baseline, the rule; facts/rin-grpo.md section 4.3
RECORDED: list[tuple[str, dict[str, Any], Signals, str]] = [
    ("linear noise 0.05: entropy 9.5", {"entropy": 9.5, "reward": 0.0, "accuracy": 0.0}, DENSE, "entropy_high"),
    ("linear noise 0.005: entropy 2.56", {"entropy": 2.56, "reward": 0.2, "accuracy": 0.2}, DENSE, "entropy_high"),
    ("linear noise 0.001: entropy stays", {"entropy": 0.3}, DENSE, ""),
    ("linear noise 0.001: entropy stays, lower end", {"entropy": 0.05}, DENSE, ""),
    (
        "head quantised: entropy to 0.01, accuracy 72.55 to 7.66",
        {"entropy": 0.01, "reward": 0.0766},
        DENSE,
        "entropy_low",
    ),
    ("reward hacking: length 215 to 410", {"length": 410.0, "entropy": 0.11, "reward": 0.66}, DENSE, "length_up"),
    ("mixture of experts", MOE, EXPERTS, "entropy_high"),
    ("mixture of experts, by its gradients alone", {"grad_norm": 88.7, "clip_fraction": 0.13}, EXPERTS, "grad_norm"),
    ("mixture of experts, shorter answers alone", {"length": 53.0}, EXPERTS, "length_down"),
    ("healthy: overlong penalty", {"entropy": 0.32, "length": 237.0}, DENSE, ""),
    ("healthy: 22 % of groups all wrong", {"all_wrong": 0.22, "entropy": 0.32, "length": 237.0}, DENSE, ""),
    ("healthy: 66 % of groups all wrong", {"all_wrong": 0.66, "entropy": 0.32, "length": 237.0}, DENSE, ""),
    ("healthy: certain because right", {"entropy": 0.01, "reward": 0.95, "accuracy": 0.95}, DENSE, ""),
    (
        "healthy: everything solved",
        {"entropy": 0.02, "reward": 1.0, "all_right": 1.0, "all_wrong": 0.0, "grad_norm": 0.0},
        DENSE,
        "",
    ),
    ("healthy: 8 % right at the start", {"reward": 0.08}, replace(DENSE, reward=0.08), ""),
    ("healthy: nothing right at the start", {"reward": 0.0}, replace(DENSE, reward=0.0), ""),
]


@pytest.mark.parametrize(("what", "state", "base", "rule"), RECORDED, ids=[row[0] for row in RECORDED])
def test_recorded_runs_are_judged_as_they_ended(what: str, state: dict[str, Any], base: Signals, rule: str) -> None:
    assert run([state] * 10, base) == (rule, 3 + 3 - 1 if rule else None)


# rule, just over its limit, just under it; both directions where a signal has two
LIMITS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("entropy_high", {"entropy": 0.82}, {"entropy": 0.80}),  # 3 x 0.27 = 0.81
    ("entropy_low", {"entropy": 0.026, "reward": 0.73}, {"entropy": 0.028}),  # 0.1 x 0.27
    ("length_up", {"length": 377.0}, {"length": 376.0}),  # 1.75 x 215 = 376.25
    ("length_down", {"length": 122.0}, {"length": 123.0}),  # 215 / 1.75 = 122.9
    ("truncation", {"truncated": 0.29}, {"truncated": 0.27}),  # 0.03 + 0.25
    ("gibberish", {"gibberish": 0.052}, {"gibberish": 0.05}),  # 0.001 + 0.05
    ("repetition", {"repetition": 0.36}, {"repetition": 0.34}),  # 0.05 + 0.3
    ("mismatch", {"kl": 1.01}, {"kl": 0.99}),
    ("grad_norm", {"grad_norm": 2.01, "clip_fraction": 0.11}, {"grad_norm": 1.99, "clip_fraction": 0.11}),  # 5 x 0.4
    ("reward_low", {"reward": 0.18}, {"reward": 0.19}),  # 0.25 x 0.73
]


@pytest.mark.parametrize(("rule", "over", "under"), LIMITS, ids=[row[0] for row in LIMITS])
def test_each_rule_fires_over_its_limit_and_not_under_it(
    rule: str, over: dict[str, Any], under: dict[str, Any]
) -> None:
    assert run([over] * 3) == (rule, 5)
    assert run([under] * 30) == ("", None)


def test_every_rule_has_a_row_of_its_limit() -> None:
    assert {rule for rule, _, _ in LIMITS} == set(RULES)


FLOORS: list[tuple[str, dict[str, Any], Signals]] = [
    (
        "entropy below 0.2 nats is not high, however small the baseline",
        {"entropy": 0.19},
        replace(DENSE, entropy=0.001),
    ),
    (
        "gradient norms are heavy-tailed: without clipped ratios they prove nothing",
        {"grad_norm": 99.0, "clip_fraction": 0.1},
        DENSE,
    ),
    ("too few right answers to fall from", {"reward": 0.0}, replace(DENSE, reward=0.09)),
    ("low entropy with the reward above its baseline is learning", {"entropy": 0.001, "reward": 0.74}, DENSE),
    ("a baseline without reward cannot be undercut", {"reward": -1.0}, replace(DENSE, reward=-0.5)),
]


@pytest.mark.parametrize(("what", "state", "base"), FLOORS, ids=[row[0] for row in FLOORS])
def test_floors_keep_small_numbers_from_looking_like_collapses(what: str, state: dict[str, Any], base: Signals) -> None:
    assert run([state] * 10, base) == ("", None)


def test_where_several_rules_fire_the_first_in_the_table_names_the_collapse() -> None:
    everything = {
        key: value for _, over, _ in reversed(LIMITS) for key, value in over.items() if key not in ("entropy", "length")
    }
    names = list(RULES)
    assert run([everything | {"entropy": 5.0, "length": 1000.0}] * 3) == (names[0], 5)
    assert run([everything] * 3) == ("gibberish", 5)
    assert names.index("entropy_low") < names.index("reward_low")


# --- how long ---------------------------------------------------------------------------------------------------------

BAD: dict[str, Any] = {"entropy": 5.0}
GOOD: dict[str, Any] = {}

# patience, steps after the quiet stage of three, the step of the verdict
PATIENCE: list[tuple[int, list[dict[str, Any]], int | None]] = [
    (1, [BAD], 3),
    (2, [BAD], None),
    (2, [BAD, BAD], 4),
    (3, [BAD, BAD, GOOD, BAD, BAD], None),
    (3, [BAD, BAD, GOOD, BAD, BAD, BAD], 8),
    (2, [BAD, {"length": 999.0}, BAD, {"length": 999.0}], None),  # two different rules do not add up
    (2, [BAD, BAD | {"length": 999.0}], 4),
]


@pytest.mark.parametrize(("patience", "steps", "expected"), PATIENCE)
def test_a_level_must_be_wrong_for_patience_steps_in_a_row(
    patience: int, steps: list[dict[str, Any]], expected: int | None
) -> None:
    assert run(steps, patience=patience) == ("" if expected is None else "entropy_high", expected)


def test_the_quiet_stage_is_never_a_collapse_of_level() -> None:
    detector = CollapseDetector(config=CollapseConfig(patience=1))
    assert detector.observe(replace(DENSE, **UNLEARNED), quiet=True) == HEALTHY
    wild: list[dict[str, Any]] = [{"entropy": 9.0}, {"length": 1.0}, {"reward": 0.0}]
    for changes in wild:
        assert detector.observe(replace(DENSE, **changes), quiet=True) == HEALTHY


def test_without_a_quiet_stage_the_rollout_before_step_0_is_the_baseline() -> None:
    assert run([BAD] * 3, quiet=0) == ("entropy_high", 2)
    # ... which has no gradient to compare with.
    assert run([{"grad_norm": 1e6}] * 9, quiet=0) == ("", None)


def test_the_baseline_is_the_mean_of_all_quiet_rollouts_and_the_median_of_their_gradients() -> None:
    def detector() -> CollapseDetector:
        made = CollapseDetector(config=CollapseConfig(patience=1))
        made.observe(replace(DENSE, **UNLEARNED, length=100.0), quiet=True)
        for length, norm in ((200.0, 1.0), (300.0, 2.0), (400.0, 300.0)):
            made.observe(replace(DENSE, length=length, grad_norm=norm), quiet=True)
        return made

    assert detector().observe(replace(DENSE, length=437.0), quiet=False) == HEALTHY  # 1.75 x 250 = 437.5
    verdict = detector().observe(replace(DENSE, length=438.0), quiet=False)
    assert verdict.rule == "length_up"
    assert verdict.evidence == "mean length 438 tokens, baseline 250, 1 steps in a row"
    assert (
        detector().observe(replace(DENSE, length=250.0, grad_norm=9.9, clip_fraction=0.2), quiet=False) == HEALTHY
    )  # 5 x 2
    assert (
        detector().observe(replace(DENSE, length=250.0, grad_norm=10.1, clip_fraction=0.2), quiet=False).rule
        == "grad_norm"
    )


def test_noisy_steps_do_not_move_the_baseline() -> None:
    drift = [{"entropy": 0.27 + 0.06 * n} for n in range(20)]  # a slow rise ends as a collapse against the start
    assert run(drift) == ("entropy_high", 3 + 10 + 2)


# --- at once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [field.name for field in fields(Signals)])
def test_a_number_that_is_not_finite_is_a_collapse_at_once(name: str, value: float) -> None:
    broken: Any = (("correct", 0.5), ("format", value)) if name == "rewards" else value
    tracked = "grpo/reward/format" if name == "rewards" else NAMES[name]
    for quiet in (True, False):
        detector = CollapseDetector(config=CollapseConfig(patience=9, mode="off"))
        detector.observe(replace(DENSE, **UNLEARNED), quiet=True)
        verdict = detector.observe(replace(DENSE, **{name: broken}), quiet=quiet)
        assert verdict == CollapseVerdict(collapsed=True, rule="nonfinite", evidence=f"{tracked} is {value}")
        assert len(detector.baseline) == 1


# groups: generated, all wrong, all right; enough for the policy; the rule
FILTERS: list[tuple[int, int, int, bool, str]] = [
    (160, 158, 0, False, "filter_rejection"),
    (160, 80, 60, False, "filter_rejection"),
    (160, 0, 158, False, ""),  # everything solved: success
    (160, 60, 80, False, ""),
    (160, 158, 0, True, ""),  # the filter is off or only drops: low scores are no collapse
    (160, 100, 0, True, ""),
]


@pytest.mark.parametrize(("generated", "wrong", "right", "enough", "rule"), FILTERS)
def test_the_filter_collapses_only_where_too_little_is_left_because_it_is_wrong(
    generated: int, wrong: int, right: int, enough: bool, rule: str
) -> None:
    outcome = FilterOutcome(groups=(), generated=generated, all_wrong=wrong, all_right=right, enough=enough)
    assert run([{}], filtered=outcome) == (rule, 3 if rule else None)


def test_a_filter_rejection_tells_its_groups_and_batches() -> None:
    detector = CollapseDetector(config=CollapseConfig())
    signals = replace(DENSE, kept_groups=5.0, gen_batches=5.0, all_wrong=0.9, all_right=0.05)
    outcome = FilterOutcome(groups=(), generated=160, all_wrong=144, all_right=8, enough=False)
    verdict = detector.observe(signals, quiet=True, filtered=outcome)
    assert verdict.rule == "filter_rejection"
    assert verdict.evidence == "5 groups with variance after 5 batches; 90% of groups all wrong, 5% all right"


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_after", range(8))
def test_a_restored_detector_goes_on_as_if_nothing_had_happened(saved_after: int) -> None:
    steps: list[tuple[dict[str, Any], bool]] = [
        (UNLEARNED, True),
        ({"grad_norm": 0.5}, True),
        ({"length": 200.0}, True),
    ]
    steps += [(BAD, False), (BAD, False), (GOOD, False), (BAD, False), (BAD, False), (BAD, False)]
    steady = CollapseDetector(config=CollapseConfig())
    detector = CollapseDetector(config=CollapseConfig())
    for number, (changes, quiet) in enumerate(steps):
        signals = replace(DENSE, **changes)
        assert detector.observe(signals, quiet=quiet) == steady.observe(signals, quiet=quiet)
        if number == saved_after:  # checkpoints hold plain values
            state = json.loads(json.dumps(detector.state()))
            detector = CollapseDetector(config=CollapseConfig())
            detector.restore(state)
            assert detector.state() == steady.state()
    assert steady.streaks["entropy_high"] == 3


def test_a_restored_detector_shares_nothing_with_the_state_it_came_from() -> None:
    first, second = CollapseDetector(config=CollapseConfig()), CollapseDetector(config=CollapseConfig())
    first.observe(DENSE, quiet=True)
    second.restore(first.state())
    second.observe(replace(DENSE, length=1.0), quiet=True)
    assert (len(first.baseline), len(second.baseline)) == (1, 2)


@pytest.mark.parametrize("name", RULES)
def test_the_limit_that_a_verdict_was_about_can_be_drawn_from_its_evidence(name: str) -> None:
    """To the digits that the evidence has of the baseline."""
    base = {**dict.fromkeys(("entropy", "length", "grad_norm", "reward"), 0.612), "kl": 0.001, "clip_fraction": 0.0}
    base |= {"truncated": 0.12, "repetition": 0.12, "gibberish": 0.012}
    limits, rule = CollapseConfig(), RULES[name]
    evidence = rule.evidence.format(now={**base, rule.signal: 9.87}, base=base)
    assert drawn_limit(name, f"{evidence}, 3 steps in a row", limits) == pytest.approx(rule.limit(base, limits))

"""The receipts of all points side by side: every two of them did something else to the model, or filter otherwise; the
pairs that share even that are named, with the reason."""

from functools import cache
from itertools import combinations
from typing import Any

import pytest

from spaces.config import TrialConfig
from spaces.points import POINTS, SRDD_MULTIPLIERS
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS
from trainable.noise import effects_of, injected, layer_multipliers, stage_begins, zone_layers
from trainable.outcome import EffectReceipt
from trainable.trial import Trial

pytestmark = pytest.mark.slow  # seconds of computing

DEPTH, STEPS = 4, 10
LOUD, LAST = 1, 9
"""Stages: the first noisy one, and the last; a step each."""
FILTER_ALONE = {
    ("bf16", "bf16-resample"),  # made here, as the rule's own control
    ("control", "e13h"),
    ("e13i-baseline", "e13i-v4-filter-off"),
    ("e13i-v3", "e13i-v4-rmsnorm"),
    ("e13i-v3", "e13m-rmsnorm"),
    ("e13h", "format-reward"),
    ("e13h", "random-reward"),
}
REWARD_ALONE = {("control", "format-reward"), ("control", "random-reward"), ("format-reward", "random-reward")}
"""Negative controls: nothing but what is learned from."""
PLANNED_TWICE = {("e13i-v4-rmsnorm", "e13m-rmsnorm")}
"""One experiment under two names: the plan asks for it once to tell the filter from the target, once for H5a."""


def config_of(point: str) -> TrialConfig:
    settings = POINTS[point.removesuffix("-resample")].settings
    more = ["grpo.filter_groups=resample"] if point.endswith("-resample") else []
    base = [f"model.recipe.depth={DEPTH}", "model.recipe.clean_steps=0", "model.recipe.signed_steps=0"]
    sizes = [f"grpo.steps={STEPS}", "grpo.prompts=2", "eval.questions=1"]
    return read_config(merge(WORKLOADS["tiny"].settings, settings), [*base, *sizes, *more])


@cache
def receipt_of(point: str) -> EffectReceipt:
    """Of a trial that has been loaded and has measured its noise in some steps; nothing is trained."""
    trial = Trial(config_of(point))
    noise = trial.config.noise
    for step in (step for step in (0, LOUD, LAST - 1, LAST) if stage_begins(noise, step, STEPS)):
        with injected(
            trial.policy, noise, trial.targets, step=step, total_steps=STEPS, seed=0, measured=True
        ) as changes:
            trial.so_far.effects += effects_of(noise, changes, step=step, total_steps=STEPS)
    return trial.receipt()


def done_to_the_model(point: str) -> dict[str, Any]:
    receipt = receipt_of(point)
    return {
        "quantized": (receipt.quantized, receipt.arithmetic),
        "noised": {(e.step, e.name): (e.applied, e.changed) for e in receipt.effects},
    }


def filter_of(point: str) -> tuple[str, int]:
    grpo = config_of(point).grpo
    return grpo.filter_groups, grpo.max_gen_batches


def test_every_two_points_differ_in_what_was_done_to_the_model_or_in_their_filter() -> None:
    same_model = {
        pair
        for pair in combinations(sorted([*POINTS, "bf16-resample"]), 2)
        if done_to_the_model(pair[0]) == done_to_the_model(pair[1])
    }
    same_in_all = {pair for pair in same_model if filter_of(pair[0]) == filter_of(pair[1])}
    assert same_model - same_in_all == FILTER_ALONE
    assert same_in_all == REWARD_ALONE | PLANNED_TWICE
    assert [config_of(a).grpo.reward != config_of(b).grpo.reward for a, b in sorted(REWARD_ALONE)] == [True] * 3
    for one, other in PLANNED_TWICE:
        assert config_of(one) == config_of(other)


@pytest.mark.parametrize(("point", "middle"), [("e13i-high", (0.08, 0.001)), ("e13i-low", (0.03, 0.0003))])
def test_the_receipts_of_e13i_high_and_low_show_another_sigma_in_the_middle_zone_alone(
    point: str, middle: tuple[float, float]
) -> None:
    zone = zone_layers("middle", DEPTH)
    assert 0 < len(zone) < DEPTH
    for stage, of_middle, of_others in ((LOUD, middle[0], 0.05), (LAST, middle[1], 0.0005)):
        here = [e for e in receipt_of(point).effects if e.stage == stage]
        expected = {layer: pytest.approx(of_middle if layer in zone else of_others) for layer in range(DEPTH)}
        assert {e.layer: e.nominal for e in here} == expected, stage
        assert len({e.name for e in here}) == len(receipt_of(point).noised) == 7 * DEPTH
    applied = [e.applied for e in receipt_of(point).effects if e.stage == LOUD and e.layer in zone]
    plain = [e.applied for e in receipt_of("e13i-baseline").effects if e.stage == LOUD and e.layer in zone]
    assert all((a > b) == (middle[0] > 0.05) for a, b in zip(applied, plain, strict=True))


def test_the_receipt_of_e13j_variable_shows_sigma_times_each_layers_multiplier() -> None:
    noise = config_of("e13j-variable").noise
    assert noise.layer_multipliers == tuple(SRDD_MULTIPLIERS)
    factors = layer_multipliers(noise, DEPTH)
    assert min(abs(factor - 1) for factor in factors) > 0
    plain = {(e.step, e.name): e for e in receipt_of("e13i-baseline").effects}
    mine = {(e.step, e.name): e for e in receipt_of("e13j-variable").effects}
    assert mine.keys() == plain.keys()
    for key, effect in mine.items():
        assert effect.layer is not None
        assert effect.nominal == pytest.approx(plain[key].nominal * factors[effect.layer])
        if effect.stage == LOUD:
            assert (effect.applied > plain[key].applied) == (factors[effect.layer] > 1)

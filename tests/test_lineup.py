"""An arm is compared with a run that differs from it in its noise alone, whoever brought the arm."""

from pathlib import Path
from typing import Any

import pytest

from search.arms import Arm, apart, candidate_of, control_for, read_arms
from search.lineup import fixed_arms
from search.store import StudyConfig
from spaces.errors import NoCandidate
from spaces.library import SPACES, Choice, Dimension, Float, Space
from spaces.points import POINTS
from spaces.reading import as_tree, flatten
from spaces.uses import is_noisy
from tests.searches import control, drive, outcome, reread, searcher
from tests.written_sweeps import make_arm, study, write_sweep


def lineup(tmp_path: Path, *points: str, **given: Any) -> dict[str, Arm]:
    arms = fixed_arms(study(tmp_path, trials=99, points=points, settings={}, **given))
    return {arm.name: arm for arm in arms}


def besides_noise(arm: Arm) -> dict[str, Any]:
    return {key: value for key, value in flatten(as_tree(arm.config)).items() if not key.startswith("noise.")}


def kept(arm: Arm) -> dict[str, Any]:
    """Without how often a filter resamples that is off."""
    plain = besides_noise(arm)
    if arm.config.grpo.filter_groups != "resample":
        del plain["grpo.max_gen_batches"]
    return plain


@pytest.mark.parametrize("workload", ["tiny", "qwen2.5-1.5b-gsm8k"])
@pytest.mark.parametrize("space", ["sigma", "w4a16"])
def test_the_control_of_every_point_differs_from_it_in_its_noise_alone(
    tmp_path: Path, workload: str, space: str
) -> None:
    """Alone in a sweep, and all together. A point without noise is a control itself, but a negative one: it differs
    from its control in what it learns from alone."""
    together = lineup(tmp_path, *POINTS, workload=workload, space=SPACES[space])
    for name in set(POINTS) - {"control"}:
        for arms in (lineup(tmp_path, name, workload=workload, space=SPACES[space]), together):
            arm, beside = arms[name], list(arms.values())
            plain = control_for(arm, beside)
            treated = is_noisy(arm.config) or arm.config.grpo.reward != "task"
            assert treated == (plain is not None) == (arm.origin == "point"), name
            if plain is not None:
                assert plain.config.noise.sigma_start == 0
                assert kept(plain) == {**kept(arm), "grpo.reward": "task"}, name


def test_a_sweep_of_points_has_no_two_controls_that_are_one(tmp_path: Path) -> None:
    arms = lineup(tmp_path, "e12", "e14", "e13h", "e13i-v2", "e13i-v3")
    assert list(arms) == ["control", "control-resample-w4a16", "e13h", "e12", "e14", "e13i-v2", "e13i-v3"]
    found = {name: control_for(arm, list(arms.values())) for name, arm in arms.items()}
    assert {name: plain.name for name, plain in found.items() if plain is not None} == {
        "e12": "control-resample-w4a16",
        "e14": "control-resample-w4a16",
        "e13i-v2": "e13h",
        "e13i-v3": "control",
    }


def test_whatever_a_file_changes_besides_noise_its_control_changes_too(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("noise: {sigma_start: 0.03, sigma_end: 0.003}\ngrpo: {learning_rate: 1.0e-5}\n")
    other = tmp_path / "other.yaml"
    other.write_text("noise: {sigma_start: 0.03, sigma_end: 0.003}\nquant: {skip_layers: [0]}\n")
    arms = lineup(tmp_path, str(mine), str(other))
    assert list(arms) == ["control", "control-2", "control-3", "mine", "other"]
    assert arms["control-2"].config.grpo.learning_rate == 1e-5
    assert arms["control-3"].config.quant.skip_layers == (0,)
    assert [apart(arms[name].config, arms["control"].config) for name in ("mine", "other")] == [
        {"grpo.learning_rate"},
        {"quant.skip_layers"},
    ]


def test_a_run_without_noise_is_no_candidate_however_good_it_is(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, points=("bf16",))
    arms = fixed_arms(config)
    assert [arm.name for arm in arms] == ["control", "bf16"]
    write_sweep(config, arms, {"control": [280], "bf16": [320]})
    with pytest.raises(NoCandidate):
        candidate_of(config, read_arms(config))


def mixed(*more: Dimension) -> Space:
    sigma = Dimension(key="noise.sigma_start", domain=Float(low=0.01, high=0.02))
    return Space(name="mixed", description="", dimensions=(sigma, *more))


PRECISION = Dimension(key="quant.activations", domain=Choice(options={"4": "mxfp4", "8": "mxfp8", "16": "none"}))
FILTER = Dimension(key="grpo.filter_groups", domain=Choice(options={"off": "off", "resample": "resample"}))
RATE = Dimension(key="grpo.learning_rate", domain=Float(low=1e-5, high=1e-4, log=True))


def test_what_the_searcher_draws_brings_its_control_and_what_it_trains_with_is_tried() -> None:
    search = searcher(mixed(PRECISION, FILTER, RATE), trials=16, replicates=2)
    given = drive(search, lambda suggestion: outcome(0.5))
    assert len(search.arms) == 16
    assert len(given) == 32
    for number, arm in enumerate(search.arms):
        assert arm.origin == "control" or arm.name == f"c{number:02d}"
        plain = control_for(arm, search.arms)
        if arm.origin == "searcher":
            assert plain is not None
            assert plain in search.arms[:number], "it has been run before"
            assert apart(arm.config, plain.config) <= {"grpo.learning_rate"}
    controls = [arm for arm in search.arms if arm.origin == "control"]
    assert 3 <= len(controls) <= 6
    assert len({str(besides_noise(arm)) for arm in controls}) == len(controls)


def test_a_draw_is_not_compared_with_what_a_point_of_one_s_own_trains_without_noise(tmp_path: Path) -> None:
    """It has the draw's precision, and a learning rate of its own: only a control that trains like the sweep's will
    do."""
    own = make_arm(study(tmp_path), "control-own", "quant.activations=mxfp8", "grpo.learning_rate=1e-3")
    eight = Dimension(key="quant.activations", domain=Choice(options={"8": "mxfp8"}))
    search = searcher(mixed(eight), trials=6, settings={}, known=[control(), own])
    drive(search, lambda suggestion: outcome(0.5))
    drawn = [arm for arm in search.arms if arm.origin == "searcher"]
    assert len(drawn) == 3
    plain = [control_for(arm, search.arms) for arm in drawn]
    assert [arm.name for arm in plain if arm is not None] == ["control-w4a8"] * 3


def test_a_search_that_was_killed_between_a_control_and_its_arm_goes_on_with_the_arm() -> None:
    whole = searcher(mixed(PRECISION), trials=6)
    drive(whole, lambda suggestion: outcome(0.5))
    cut = next(number for number, arm in enumerate(whole.arms) if arm.origin == "control" and number > 0) + 1
    again = searcher(mixed(PRECISION), trials=6, known=reread(whole.arms[:cut]))
    drive(again, lambda suggestion: outcome(0.5))
    assert [(arm.name, arm.config) for arm in again.arms] == [(arm.name, arm.config) for arm in whole.arms]


def test_a_last_trial_is_no_arm_without_a_control() -> None:
    """Two are left, and one: the first draw that needs no other control is taken, or the search ends."""
    only = Space(name="one", description="", dimensions=(*mixed().dimensions, PRECISION))
    for trials in (2, 3, 4):
        search = searcher(only, trials=trials, settings={}, known=[control()])
        drive(search, lambda suggestion: outcome(0.5))
        assert len(search.arms) <= trials
        assert all(control_for(arm, search.arms) for arm in search.arms if arm.origin == "searcher")
    narrow = Dimension(key="quant.activations", domain=Choice(options={"8": "mxfp8"}))
    search = searcher(mixed(narrow), trials=2)
    drive(search, lambda suggestion: outcome(0.5))
    assert ([arm.name for arm in search.arms], search.exhausted) == (["control"], True)


def test_a_confirmation_and_an_ablation_have_the_control_that_the_sweep_compared_with(tmp_path: Path) -> None:
    """Their arms differ from it in what the space searched, too."""
    config: StudyConfig = study(tmp_path, trials=3)
    arms = [make_arm(config, "control"), make_arm(config, "control-b", "quant.activations=none")]
    arms += [make_arm(config, name, "grpo.learning_rate=1e-5", origin=name) for name in ("winner", "ablation")]
    assert [control_for(arm, arms) for arm in arms] == [None, None, arms[0], arms[0]]

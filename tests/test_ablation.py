"""One change at a time: every arm but the winner and the control differs from the winner in one setting."""

from pathlib import Path
from typing import Any

import pytest

from search.ablation import Ablation, ablation, single_changes
from search.arms import Arm
from search.store import StudyConfig, ranks_of
from spaces.config import TrialConfig
from spaces.errors import NoCandidate
from spaces.reading import as_tree, flatten, read_config
from tests.written_sweeps import make_arm, study, write_sweep


def tree(*overrides: str) -> dict[str, Any]:
    return as_tree(read_config({"noise": {"sigma_start": 0.0, "sigma_end": 0.0}}, overrides))


def different(one: TrialConfig, other: TrialConfig) -> dict[str, Any]:
    """Key -> (in one, in the other)."""
    a, b = (flatten(as_tree(side)) for side in (one, other))
    return {key: (a.get(key), b.get(key)) for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


NOISE = ("noise.sigma_start=0.05", "noise.sigma_end=0.005")


def test_each_change_takes_one_setting_back_to_the_control_s(tmp_path: Path) -> None:
    control = tree()
    winner = tree(
        *NOISE, "noise.modules=[linear]", "noise.num_stages=5", "grpo.learning_rate=0.0002", "quant.scale_rule=even"
    )
    steps, skipped = single_changes(winner, control)
    assert set(steps) == {
        "noise.sigma_end",
        "noise.modules",
        "noise.num_stages",
        "grpo.learning_rate",
        "quant.scale_rule",
    }
    assert skipped == []
    plain, won = flatten(control), flatten(winner)
    for key, step in steps.items():
        changed = different(read_config(winner), step)
        assert set(changed) == {key}
        before, after = changed[key]
        assert before == won[key]
        assert after == (0.05 if key == "noise.sigma_end" else plain[key])


def test_without_its_decay_the_noise_stays_at_its_start(tmp_path: Path) -> None:
    steps, _ = single_changes(tree(*NOISE), tree())
    assert list(steps) == ["noise.sigma_end"]
    noise = steps["noise.sigma_end"].noise
    assert (noise.sigma_start, noise.sigma_end) == (0.05, 0.05)


def test_noise_that_does_not_decay_and_nothing_else_is_the_control_s_own_ablation() -> None:
    steps, skipped = single_changes(tree("noise.sigma_start=0.05", "noise.sigma_end=0.05"), tree())
    assert steps == {}
    assert skipped == ["the winner differs from the control in noise.sigma_start alone; the control is that ablation"]


def test_what_the_sweep_sets_for_its_control_too_is_no_change_of_the_winner() -> None:
    """A workload's stages and modules are under every arm."""
    winner = tree(*NOISE, "noise.modules=[linear]", "noise.num_stages=3")
    control = tree("noise.modules=[linear]", "noise.num_stages=3", "noise.sigma_start=0")
    assert set(single_changes(winner, control)[0]) == {"noise.sigma_end"}
    assert single_changes(winner, control)[0]["noise.sigma_end"].noise.sigma_end == winner["noise"]["sigma_start"], (
        "no decay"
    )


@pytest.mark.parametrize("key", ["seed=3", "threads=2", "hang_seconds=60"])
def test_settings_of_the_run_are_no_arms(key: str) -> None:
    assert list(single_changes(tree(*NOISE, key), tree())[0]) == ["noise.sigma_end"]


def test_a_change_that_makes_the_configuration_impossible_is_named_and_no_arm() -> None:
    """Noise after the linear layers cannot be noise on RMSNorm."""
    winner = tree(*NOISE, "noise.modules=[linear]", "noise.placement=after")
    steps, skipped = single_changes(winner, tree())
    assert set(steps) == {"noise.sigma_end", "noise.placement"}
    (line,) = skipped
    assert line.startswith("noise.modules=")
    assert "cannot be taken back alone" in line
    assert "\n" not in line


def planned(
    tmp_path: Path, *winner: str, control: tuple[str, ...] = (), named: bool = False, **options: Any
) -> tuple[StudyConfig, Ablation]:
    parent = study(tmp_path, trials=2, replicates=2, seed=3)
    arms = [make_arm(parent, "control"), make_arm(parent, "c01", *winner, origin="searcher")]
    arms[1] = Arm(name="c01", origin="searcher", config=arms[1].config, params={"noise.sigma_start": 0.01})
    write_sweep(parent, arms, {"control": [280, 281], "c01": [300, 301]})
    given = study(tmp_path, name="mine", trials=99, points=("e12",), evidence=("e13h",), **options)
    return parent, ablation(parent, given, named=named)


def test_the_study_has_the_control_the_winner_and_the_winner_without_each_of_its_settings(tmp_path: Path) -> None:
    _, parts = planned(tmp_path, "noise.num_stages=5")
    names = [arm.name for arm in parts.arms]
    assert names[:2] == ["control", "c01"]
    assert set(names[2:]) == {"c01-without-num-stages", "c01-without-sigma-end"}
    assert [arm.origin for arm in parts.arms] == ["control", "winner", "ablation", "ablation"]
    for arm in parts.arms[2:]:
        assert len(different(parts.arms[1].config, arm.config)) == 1
    assert all(arm.results == {} for arm in parts.arms), "old results are not the new study's"


def test_the_study_is_the_parent_s_in_what_is_compared_and_the_user_s_in_how_it_runs(tmp_path: Path) -> None:
    parent, parts = planned(tmp_path, replicates=5, seed=40, budget_hours=2.0, concurrent=1)
    config = parts.config
    assert (config.name, config.kind, config.parent) == ("s-ablation", "ablation", "s")
    assert (config.space, config.workload, config.settings) == (parent.space, parent.workload, parent.settings)
    assert (config.replicates, config.seed, config.budget_hours, config.concurrent) == (5, 40, 2.0, 1)
    assert (config.trials, config.points, config.evidence) == (len(parts.arms), (), ())


def test_more_gpus_are_more_ranks_of_every_arm_and_of_the_study(tmp_path: Path) -> None:
    for settings, ranks in (({"parallel": {"ranks": 4}}, 4), ({}, 1)):
        config = (parts := planned(tmp_path, "noise.num_stages=5", settings=settings)[1]).config
        assert {ranks_of(config), *(arm.config.parallel.ranks for arm in parts.arms)} == {ranks}


def test_a_name_that_was_given_is_kept(tmp_path: Path) -> None:
    assert planned(tmp_path, named=True)[1].config.name == "mine"


def test_names_of_arms_are_unlike(tmp_path: Path) -> None:
    """Two settings whose last words are the same must not share a folder."""
    _, parts = planned(tmp_path, "rollout.batch_size=7", "eval.batch_size=9", "noise.num_stages=5")
    names = {arm.name for arm in parts.arms}
    assert names >= {"c01-without-rollout-batch-size", "c01-without-eval-batch-size", "c01-without-num-stages"}
    assert len(names) == len(parts.arms)


def test_a_sweep_without_a_winner_cannot_be_taken_apart(tmp_path: Path) -> None:
    parent = study(tmp_path, trials=2, replicates=1)
    write_sweep(
        parent, [make_arm(parent, "control"), make_arm(parent, "c01")], {"control": [280], "c01": [("collapsed", 10)]}
    )
    with pytest.raises(NoCandidate, match="there is no candidate"):
        ablation(parent, study(tmp_path, name="x"), named=False)

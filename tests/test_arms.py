"""Arms, evidence and what is still to be run, as a sweep writes them down and reads them back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from search.arms import Arm, read_arms, trial_config, trial_folder, unfinished, write_arm
from search.evidence import Evidence, read_evidence, write_evidence
from search.store import StudyConfig
from spaces.config import ConfigError
from tests.written_sweeps import make_arm, outcome, study, write_trial


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return study(tmp_path, trials=3, replicates=2)


def test_arms_come_back_in_their_order_as_they_were(config: StudyConfig) -> None:
    """Twelve of them: 10 comes after 9."""
    arms = [
        make_arm(config, "control"),
        *(
            Arm(name=f"c{n:02}", origin="searcher", config=make_arm(config, "x").config, params={"sigma": 0.1 * n})
            for n in range(11)
        ),
    ]
    for number, arm in reversed(list(enumerate(arms))):
        write_arm(config, number, arm)
    assert read_arms(config) == arms


def test_arms_come_back_from_an_object_store(s3_store: Callable[[str], str], tmp_path: Path) -> None:
    config = study(s3_store(tmp_path.name), replicates=2)
    arm = make_arm(config, "control")
    write_arm(config, 0, arm)
    write_trial(config, arm, 1, outcome(arm, 1, 300))
    (read,) = read_arms(config)
    assert (read.name, read.config, list(read.results)) == ("control", arm.config, [1])


def test_a_sweep_that_wrote_nothing_has_no_arms_and_no_evidence(config: StudyConfig) -> None:
    assert (read_arms(config), read_evidence(config)) == ([], [])
    assert unfinished(config, []) == 6


def test_an_arm_has_the_outcomes_of_its_own_replicates_and_of_no_other_trial(config: StudyConfig) -> None:
    """Names that begin alike; a replicate that this look of a confirmation does not ask for."""
    arms = [make_arm(config, "control"), make_arm(config, "control-0", origin="control")]
    for number, arm in enumerate(arms):
        write_arm(config, number, arm)
    write_trial(config, arms[0], 0, outcome(arms[0], 0, 300))
    write_trial(config, arms[0], 1, None)
    write_trial(config, arms[1], 1, outcome(arms[1], 1, 200))
    write_trial(config, arms[1], 2, outcome(arms[1], 2, 100))
    first, second = read_arms(config)
    assert {k: v.eval.accuracy for k, v in first.results.items()} == {0: 0.75}
    assert {k: v.eval.accuracy for k, v in second.results.items()} == {1: 0.5}
    assert unfinished(config, [first, second]) == 6 - 2


def test_a_trial_runs_its_arm_s_configuration_with_its_replicate_s_seed(config: StudyConfig) -> None:
    arm = make_arm(config, "c01")
    ran = trial_config(config.model_copy(update={"seed": 40}), arm, 1)
    assert ran.seed == 41
    assert ran.model_copy(update={"seed": arm.config.seed}) == arm.config


def test_an_arm_s_file_holds_every_setting_so_that_another_default_changes_nothing(config: StudyConfig) -> None:
    write_arm(config, 0, make_arm(config, "c01"))
    written = json.loads((config.folder / "arms").read("0000.json") or b"")["config"]
    assert written["grpo"]["clip_high"] == 0.28, "a default"
    assert "seed" not in written


def test_evidence_comes_back_as_it_was(config: StudyConfig) -> None:
    evidence = [
        Evidence(params={"sigma": 0.05, "kind": "linear"}, accuracy=None, collapses=1, source="the plan"),
        Evidence(params={"sigma": 0.01}, accuracy=0.7, collapses=0, replicates=3, hours=0.5, source="sweep s"),
    ]
    write_evidence(config, evidence)
    assert read_evidence(config) == evidence


@pytest.mark.parametrize("text", ["{", "3", '[{"colour": 1}]', "[1]"])
def test_damaged_evidence_is_named(config: StudyConfig, text: str) -> None:
    config.folder.write("evidence.json", text)
    with pytest.raises(ConfigError, match=r"evidence\.json: is damaged \(not the JSON of evidence\); restore it"):
        read_evidence(config)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"name": "c01"',
        "\x00",
        "[]",
        "3",
        '{"name": "c01"}',
        '{"name": "c01", "origin": "point", "config": [], "params": {}}',
    ],
)
def test_a_damaged_arm_is_named(config: StudyConfig, text: str) -> None:
    write_arm(config, 0, make_arm(config, "control"))
    (config.folder / "arms").write("0001.json", text)
    with pytest.raises(ConfigError, match=r"arms/0001\.json: is damaged \(not the JSON of an arm\); restore it"):
        read_arms(config)


@pytest.mark.parametrize("arm", ["../../up", "a/b", ".."])
def test_the_name_of_an_arm_cannot_lead_out_of_the_sweep(config: StudyConfig, arm: str) -> None:
    with pytest.raises(ConfigError, match="nothing may lead out"):
        trial_folder(config, arm, 0)

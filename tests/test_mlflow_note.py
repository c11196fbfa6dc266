"""The description of an experiment in MLflow: a sweep's answer, and what stands there before there is one."""

from dataclasses import replace
from pathlib import Path

import pytest

from dashboards.mlflow_note import leave_note, note_lines
from search.arms import read_arms
from search.confirm import planned_confirmation
from search.mirror import tell_beginning
from search.mlflow_client import NOTE_TAG, claim, client
from search.report import report_study
from search.store import StudyConfig, only_driver
from tests.written_sweeps import make_arm, outcome, study, write_sweep, write_trial


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    config = study(tmp_path_factory.mktemp("store"), name="e13", trials=2, replicates=3)
    write_sweep(
        config, [make_arm(config, "control"), make_arm(config, "c01")], {"control": [300] * 3, "c01": [301] * 3}
    )
    claim(config.tracking_uri, config.name, config.owner)
    return config


def described(config: StudyConfig) -> str:
    found = client(config.tracking_uri).get_experiment_by_name(config.name)
    return str(found.tags[NOTE_TAG])


def test_before_its_end_an_experiment_says_that_its_sweep_runs_and_afterwards_the_answer(sweep: StudyConfig) -> None:
    tell_beginning(sweep)
    assert described(sweep).startswith("**It runs, since ")
    assert "rin watch e13" in described(sweep)
    leave_note(sweep)
    said = described(sweep)
    assert said.startswith("**Does noise help? ")
    assert "+0.2 points" in said
    assert f"{sweep.folder.uri}/report.html" in said
    with only_driver(sweep):
        leave_note(sweep)
    assert described(sweep).startswith("**It runs: this is how far it was at ")


def test_a_confirmation_is_the_answer_of_its_sweep_too(sweep: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config, arms = planned_confirmation(sweep, (5,))
    write_sweep(config, arms, {"control": [300] * 5, "c01": [340, 341, 339, 340, 342]})
    claim(config.tracking_uri, config.name, config.owner)
    leave_note(config)
    assert described(config).startswith("**Does noise help? Yes, confirmed") or "where it holds" in described(config)
    assert described(sweep).splitlines()[0] == described(config).splitlines()[0]
    assert capsys.readouterr().err == ""


def test_a_description_that_cannot_be_told_is_one_line_and_holds_no_password(
    sweep: StudyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_note(sweep.model_copy(update={"tracking_uri": "http://rin:geheim@127.0.0.1:9"}))
    said = capsys.readouterr().err
    assert said.startswith("MLflow has no description of e13 yet (ConfigError: ")
    assert said.count("\n") == 1
    assert "geheim" not in said


def test_a_sweep_in_which_everything_broke_says_so(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [300]})
    broke = outcome(arms[1], 0, 20, "collapsed", rule="entropy_high", dose=0.1)
    write_trial(config, arms[1], 0, replace(broke, step=3))
    text = "\n".join(note_lines(report_study(config, read_arms(config)), None, running=False))
    assert "Nothing can be said yet" in text
    assert "1 of 1 runs with noise collapsed" in text

"""The candidate as a LoggedModel: made once, updated, passed on, and told later where MLflow was away."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.arms import Arm, candidate_of, read_arms
from search.delivery import MlflowWriter
from search.logged_model import DIFFERENCE, MEAN, candidate_now, record_of
from search.mirror import send_missing, tell_candidate
from search.mlflow_client import check_tracking, claim, client
from search.store import StudyConfig, default_tracking_uri
from tests.processes import free_port
from tests.real_mlflow import everything, runs
from tests.written_sweeps import make_arm, outcome, study, write_sweep, write_trial

pytestmark = pytest.mark.slow  # a real sqlite store


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_tracking_uri(str(tmp_path_factory.mktemp("tracking")))


@pytest.fixture
def sweep(tmp_path: Path, uri: str, request: pytest.FixtureRequest) -> StudyConfig:
    config = study(tmp_path, name=request.node.name[:40], tracking_uri=uri, trials=3, replicates=2)
    check_tracking(uri, config.name, config.owner)
    claim(uri, config.name, config.owner)
    write_sweep(config, arms_of(config), {"control": [280, 290], "c01": [310, 312], "c02": [300]})
    return config


def arms_of(config: StudyConfig) -> list[Arm]:
    return [make_arm(config, "control"), make_arm(config, "c01"), make_arm(config, "c02", "noise.sigma_start=0.02")]


def models(config: StudyConfig) -> list[Any]:
    mlflow = client(config.tracking_uri)
    number = mlflow.get_experiment_by_name(config.name).experiment_id
    return sorted(mlflow.search_logged_models([number]), key=lambda model: model.name)


def test_the_candidate_is_a_model_with_its_runs_scores_and_questions(sweep: StudyConfig) -> None:
    assert send_missing(sweep) == 0
    (model,) = models(sweep)
    by_name = {run.info.run_name: run.info.run_id for run in runs(sweep.tracking_uri, sweep.name)}
    assert (model.name, str(model.status), model.source_run_id) == ("candidate c01", "READY", by_name["c01/0"])
    expected = {"arm": "c01", "control": "control", "replicates": "2", "state": "candidate", "weights": "were not kept"}
    assert expected.items() <= model.tags.items()
    assert "not a finding" in model.tags["caveat"]
    said = model.tags["mlflow.note.content"]
    assert "Mean accuracy 77.8% over 2 replicates, +6.5 points against its control control." in said
    assert (model.params["noise.sigma_start"], model.params["model.name"]) == ("0.01", "embedded")
    scored = {(one.key, one.run_id): one for one in model.metrics}
    assert scored["eval/accuracy", by_name["c01/0"]].value == 310 / 400
    assert scored["eval/accuracy", by_name["c01/1"]].value == 312 / 400
    assert scored[MEAN, by_name["c01/0"]].value == pytest.approx(311 / 400)
    assert scored[DIFFERENCE, by_name["c01/0"]].value == pytest.approx((310 - 280 + 312 - 290) / 800)
    assert {one.dataset_name for one in model.metrics} == {"addition selection"}
    mlflow = client(sweep.tracking_uri)
    for name in ("c01/0", "c01/1"):
        run = mlflow.get_run(by_name[name])
        assert [one.model_id for one in run.outputs.model_outputs] == [model.model_id]
        assert [one.dataset.name for one in run.inputs.dataset_inputs] == ["addition selection"]


def test_a_candidate_that_is_judged_by_pass_at_k_says_so_and_nothing_of_accuracy(tmp_path: Path) -> None:
    """Greedy it is at 50 %; of four samples one is right in 98.6 %."""
    config = study(
        tmp_path,
        trials=2,
        replicates=1,
        objectives=("pass@4",),
        settings={"eval": {"questions": 400, "samples": 8}},
    )
    arms = [make_arm(config, "control"), make_arm(config, "c01", origin="searcher")]
    write_sweep(config, arms, {})
    for arm, right in zip(arms, (3, 4), strict=True):
        ended = outcome(arm, 0, 200)
        sampled = replace(ended.eval, right=(right,) * 400, right_start=(1,) * 400)
        write_trial(config, arm, 0, replace(ended, eval=sampled))
    model = record_of(config, candidate_of(config, read_arms(config)))["model"]
    shares = [1 - math.comb(8 - right, 4) / math.comb(8, 4) for right in (3, 4)]
    expected = {"candidate/pass_at_4": shares[1], "candidate/pass_at_4_difference": shares[1] - shares[0]}
    assert model["metrics"] == pytest.approx(expected)
    said = model["tags"]["mlflow.note.content"]
    assert "Mean pass@4 98.6% over 1 replicates, +5.7 points" in said
    assert "accuracy" not in said


def test_a_second_look_makes_no_second_model_and_changes_nothing(
    sweep: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert send_missing(sweep) == 0
    shown, before = everything(sweep.tracking_uri, sweep.name), models(sweep)[0].to_dictionary()
    assert send_missing(sweep) == 0
    record = record_of(sweep, candidate_of(sweep, read_arms(sweep)))
    assert MlflowWriter(sweep.tracking_uri, sweep.owner).send([record], lambda: None) == ([], "")
    assert everything(sweep.tracking_uri, sweep.name) == shown
    (after,) = models(sweep)
    assert {**after.to_dictionary(), "last_updated_timestamp": 0} == {**before, "last_updated_timestamp": 0}
    assert "refuses" not in caplog.text


def test_another_candidate_takes_over_and_the_one_before_says_so(sweep: StudyConfig) -> None:
    assert send_missing(sweep) == 0
    arm = arms_of(sweep)[2]
    for replicate, right in enumerate((360, 362)):
        write_trial(sweep, arm, replicate, outcome(arm, replicate, right))
    assert send_missing(sweep) == 0
    assert {model.name: model.tags["state"] for model in models(sweep)} == {
        "candidate c01": "no longer the candidate",
        "candidate c02": "candidate",
    }


def test_a_sweep_without_a_candidate_has_no_model(sweep: StudyConfig) -> None:
    assert candidate_now(sweep.model_copy(update={"kind": "confirm"}), read_arms(sweep)) is None
    assert tell_candidate(sweep, None) == 0
    assert models(sweep) == []


def test_where_mlflow_is_away_it_is_told_later_and_no_password_is_said(
    sweep: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    away = sweep.model_copy(update={"tracking_uri": f"http://me:secret@127.0.0.1:{free_port()}"})
    candidate = candidate_of(sweep, read_arms(sweep))
    assert tell_candidate(away, candidate) == 1
    assert "secret" not in caplog.text
    assert "secret" not in str(record_of(away, candidate))
    assert send_missing(sweep) == 0
    assert len(models(sweep)) == 1

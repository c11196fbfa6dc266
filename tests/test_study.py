"""Whole sweeps through real Ray Tune, Optuna and MLflow on the workload `tiny`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from search.export import choose_best, to_verl, to_yaml
from search.plan import plan_study
from search.report import report_study
from search.store import StudyConfig, default_tracking_uri, load_study_config, sweeps
from search.study import StudyResult, TrialEvent, fixed_arms, resume_study, run_study
from search.tracking import load_config, load_correct, load_history, load_study
from spaces.config import ConfigError
from spaces.library import SPACES
from spaces.reading import load_yaml, parse_yaml, read_config
from trainable.trial import Trial

CRASHING = {"noise": {"modules": ["linear"], "sigma_start": 5.0, "sigma_end": 5.0}}


def study(store: Path, **changes: Any) -> StudyConfig:
    given = {
        "name": "s",
        "space": SPACES["sigma"],
        "workload": "tiny",
        "store": str(store),
        "tracking_uri": default_tracking_uri(str(store)),
    }
    return StudyConfig(**{**given, **changes})


def folder(config: StudyConfig) -> Path:
    place = config.folder.local
    assert place is not None
    return place


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyResult, list[TrialEvent]]:
    """Three configurations, two replicates: a control, its twin with the filter, and a point that must collapse."""
    store = tmp_path_factory.mktemp("store")
    events: list[TrialEvent] = []
    settings = {
        "eval": {"questions": 64},
        "noise": {"sigma_end": 0.01, "sigma_start": 4.0},
        "grpo": {"max_gen_batches": 40},  # the tiny model is often all wrong: enough batches for its healthy steps
    }
    config = study(store, trials=4, replicates=2, points=("e13i-baseline",), settings=settings, seed=5)
    return run_study(config, events.append), events


@pytest.mark.slow
def test_every_trial_is_one_closed_run_and_the_control_comes_first(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, _ = finished
    assert [(r.arm, r.replicate) for r in result.records[:2]] == [("control", 0), ("control", 1)]
    assert len(result.records) == 8
    assert {r.status for r in result.records} <= {"completed", "collapsed"}
    assert all(r.ended is not None for r in result.records)
    assert result.unfinished == 0


@pytest.mark.slow
def test_a_collapse_is_a_result_with_rule_and_final_accuracy(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, _ = finished
    collapsed = [r for r in result.records if r.arm == "e13i-baseline"]
    assert [r.status for r in collapsed] == ["collapsed", "collapsed"]
    assert {r.rule for r in collapsed} == {"filter_rejection"}
    for record in collapsed:
        correct = load_correct(result.config.tracking_uri, record.run_id)
        assert sum(correct) / len(correct) == record.metrics["eval/accuracy"]
        assert record.metrics["rin/steps_done"] < 6


@pytest.mark.slow
def test_arms_are_paired_by_seed_and_a_point_brings_its_filter_s_own_control(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, _ = finished
    arms = {r.arm: r for r in result.records}
    assert {(r.replicate, r.params["seed"]) for r in result.records} == {(0, "5"), (1, "6")}
    assert arms["control"].params["grpo.filter_groups"] == "off"
    assert arms["control-resample"].params["grpo.filter_groups"] == arms["e13i-baseline"].params["grpo.filter_groups"] == "resample"
    for arm in ("control", "control-resample"):
        assert float(arms[arm].params["noise.sigma_start"]) == 0


@pytest.mark.slow
def test_the_settings_reach_the_model(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    """What was asked for, what the trial's receipt measured and what tracking shows are the same."""
    result, _ = finished
    record = next(r for r in result.records if r.arm == "e13i-baseline")
    assert load_config(result.config.tracking_uri, record.run_id)["noise"]["sigma_start"] == 4.0
    assert max(sigma for _, sigma in load_history(result.config.tracking_uri, record.run_id, "rin/sigma")) == 4.0


@pytest.mark.slow
def test_the_view_hears_of_every_trial_s_start_and_end(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, events = finished
    ended = {e.trial: e.status for e in events if e.status != "running"}
    assert ended == {f"{r.arm}/{r.replicate}": r.status for r in result.records}
    assert {e.trial for e in events if e.status == "running" and e.step == 0} == set(ended)


@pytest.mark.slow
def test_the_exported_trial_repeats_its_evaluation_exactly(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, _ = finished
    best = result.best
    assert best is not None
    exported = read_config(load_yaml(folder(result.config) / "best.yaml"))
    assert exported == best.config
    trial = Trial(exported)
    while not trial.done:
        trial.step()
    assert trial.outcome().eval["correct"] == load_correct(result.config.tracking_uri, best.run_ids[0])


@pytest.mark.slow
def test_the_best_configuration_is_feasible_and_called_a_candidate(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, _ = finished
    best = choose_best("s", result.records, result.config.tracking_uri)
    assert best.arm != "e13i-baseline"
    text = to_yaml(best)
    assert "candidate" in text
    assert "better" not in text
    assert read_config(parse_yaml(text, "text")) == best.config
    lines = to_verl(best).splitlines()
    assert any(line.startswith("++trainer.noise_injection.enabled=") for line in lines)
    assert any(line.startswith("# no key for: quant.weights=mxfp4") for line in lines)


@pytest.mark.slow
def test_a_store_remembers_its_sweeps(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, _ = finished
    store = result.config.store
    assert sweeps(store) == ["s"]
    assert load_study_config(store, "s") == result.config
    with pytest.raises(ConfigError, match=r"NAME=other: no sweep of that name.*there are s"):
        load_study_config(store, "other")
    with pytest.raises(ConfigError, match=r"--name s: .*exists already"):
        run_study(result.config, lambda event: None)
    planned = plan_study(study(Path(store), name="next", trials=5, replicates=3), cpus=2)
    assert (planned.runs, planned.searched, planned.slots) == (15, 4, 2)
    assert "median" in planned.seconds_source


def test_points_need_room_and_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--points e99: unknown point; choose from control"):
        fixed_arms(study(tmp_path, points=("e99",)))
    with pytest.raises(ConfigError, match="--trials 2: the control and the points are 3"):
        fixed_arms(study(tmp_path, trials=2, points=("e13m-rmsnorm",)))


def test_a_user_s_own_point_is_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("noise: {sigma_start: 0.03, sigma_end: 0.003}\nseed: 7\n")
    control, point = fixed_arms(study(tmp_path, points=(str(mine),)))
    assert (point.name, point.origin) == ("mine", "point")
    assert point.tree["noise"]["sigma_start"] == 0.03
    assert "seed" not in point.tree, "replicates have the sweep's seeds"
    assert {**point.tree, "noise": control.tree["noise"]} == control.tree
    taken = tmp_path / "e13h.yaml"
    taken.write_text("{}")
    with pytest.raises(ConfigError, match="e13h would name an arm; rename the file"):
        fixed_arms(study(tmp_path, points=(str(taken),)))


def test_a_setting_that_touches_nothing_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = study(tmp_path, points=("e13i-v3",), settings={"noise": {"layers": [7]}})
    with pytest.raises(ConfigError, match=r"noise.layers=7: the model has blocks 0 to 1"):
        run_study(config, lambda event: None)
    assert not folder(config).exists()


def test_tracking_that_is_down_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = study(tmp_path, tracking_uri="http://user:secret@127.0.0.1:9/")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9") as caught:
        run_study(config, lambda event: None)
    assert "secret" not in str(caught.value)
    assert not folder(config).exists()


@pytest.mark.slow
def test_a_sweep_whose_tracking_is_gone_at_the_end_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(uri: str, experiment: str) -> tuple[Any, ...]:
        raise ConfigError(f"tracking {uri}: cannot read experiment {experiment}")

    monkeypatch.setattr("search.study.load_study", lost)
    result = run_study(study(tmp_path, trials=1, settings={"eval": {"questions": 8}}), lambda event: None)
    assert "cannot read experiment s" in result.tracking_lost
    assert result.best is None


@pytest.mark.slow
def test_a_trial_that_fails_is_a_failure_and_not_a_finding(tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    settings = {"model": {"name": str(missing), "recipe": None}, "task": {"name": "reasoning_gym:chain_sum"}}
    result = run_study(study(tmp_path, workload="embedded", trials=1, settings=settings), lambda event: None)
    (record,) = result.records
    assert record.status == "failed"
    assert "no-such-model" in record.reason
    assert result.best is None


@pytest.mark.slow
def test_ctrl_c_keeps_what_ran_and_leaves_nothing_open(tmp_path: Path) -> None:
    rin = Path(sys.executable).parent / "rin"
    command = [
        str(rin),
        "sweep",
        "--workload",
        "tiny",
        "--trials",
        "40",
        "--name",
        "s",
        "--store",
        str(tmp_path),
        "--set",
        "grpo.steps=400",
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert running.stdout is not None
    lines = []
    for line in running.stdout:
        lines.append(line)
        if "accuracy" in line:
            break
    children = psutil.Process(running.pid).children(recursive=True)
    os.kill(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 1, err
    assert "interrupted" in err
    records = load_study(default_tracking_uri(str(tmp_path)), "s")
    assert {r.status for r in records} == {"stopped"}
    assert all(r.ended is not None for r in records)
    assert list((tmp_path / "s" / "trials").glob("*/checkpoint-*")), "saved before it evaluated itself"
    assert len(load_correct(default_tracking_uri(str(tmp_path)), records[0].run_id)) == 128, "evaluated as it left, and that was kept"
    deadline = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children) and time.monotonic() < deadline:
        time.sleep(0)
    assert not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]


def test_study_json_is_plain_data(tmp_path: Path) -> None:
    config = study(tmp_path, settings={"noise": {"modules": ["linear"]}})
    assert StudyConfig.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.slow
def test_a_finished_sweep_is_left_alone_and_its_report_agrees_with_tracking(
    finished: tuple[StudyResult, list[TrialEvent]],
) -> None:
    result, _ = finished
    events: list[TrialEvent] = []
    again = resume_study(load_study_config(result.config.store, "s"), events.append)
    assert events == []
    assert again.records == result.records
    report = report_study(result.config)
    for row in report.arms:
        tracked = [r.metrics["eval/accuracy"] for r in result.records if r.arm == row.arm]
        assert row.accuracy == pytest.approx(sum(tracked) / len(tracked))
    baseline = next(row for row in report.arms if row.arm == "e13i-baseline")
    assert (baseline.collapsed, baseline.control, baseline.verdict.split(",")[0]) == (2, "control-resample", "undecided")
    assert report.ledger.hours > 0


@pytest.mark.slow
def test_the_budget_ends_trials_cleanly_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    config = study(tmp_path, trials=3, searcher="random", settings={"eval": {"questions": 16}, "grpo": {"steps": 12}}, budget_hours=1e-5)
    stopped = run_study(config, lambda event: None)
    assert stopped.budget_spent
    assert stopped.unfinished == 3
    assert {r.status for r in stopped.records} == {"stopped"}
    assert all(r.ended is not None for r in stopped.records)
    finished = resume_study(config.model_copy(update={"budget_hours": 1.0}), lambda event: None)
    assert (finished.unfinished, finished.budget_spent) == (0, False)
    assert [(r.arm, r.status) for r in finished.records] == [("control", "completed"), ("c01", "completed"), ("c02", "completed")]

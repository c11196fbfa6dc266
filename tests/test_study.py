"""Whole sweeps through real Ray Tune, Optuna and MLflow on the workload `tiny`."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import CONFIG_MAPPING

import search.study
from search.arms import Arm, read_trials, replicates_of, trial_folder
from search.budget import Budget
from search.events import Event, StudyEvent, TrialEvent
from search.execution import SweepCallback
from search.export import to_verl, to_yaml
from search.extension import extended
from search.lineup import fixed_arms
from search.plan import plan_study
from search.preflight import check_sources
from search.report import report_study
from search.store import StudyConfig, default_tracking_uri, load_study_config, sweeps
from search.study import StudyResult, begin_study, resume_study, run_study
from search.told import step_metrics
from search.tracking import Tracker
from spaces.config import ConfigError, ModelConfig, QuantConfig
from spaces.library import SPACES
from spaces.reading import load_yaml, merge, parse_yaml, read_config
from tests.conftest import ModelFolder
from tests.plain_sweeps import of_trials
from tests.real_mlflow import answered, points, runs
from tests.written_sweeps import attempt
from trainable.disk.trial_folder import PREFIXES, read_attempts, read_reports, read_stopped, read_trial
from trainable.policy.loading import check_names
from trainable.policy.sources import depth_of, load_network, skeleton_of
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
        "collapse": {"reward_floor": 1.0},  # nor does it fall by chance
    }
    config = study(store, trials=4, replicates=2, points=("e13i-baseline",), settings=settings, seed=5)
    return run_study(config, of_trials(events.append)), events


def named(result: StudyResult) -> dict[str, Arm]:
    return {arm.name: arm for arm in result.arms}


@pytest.mark.slow
def test_every_trial_is_one_closed_run_and_the_control_comes_first(
    finished: tuple[StudyResult, list[TrialEvent]],
) -> None:
    result, _ = finished
    shown = runs(result.config.tracking_uri, "s")
    assert [(run.data.tags["arm"], run.data.tags["replicate"]) for run in shown[:2]] == [
        ("control", "0"),
        ("control", "1"),
    ]
    assert [arm.name for arm in result.arms][:3] == ["control", "control-resample", "e13i-baseline"]
    assert len(shown) == 8
    for run in shown:
        outcome = named(result)[run.data.tags["arm"]].results[int(run.data.tags["replicate"])]
        assert run.data.tags["status"] == outcome.outcome
        assert run.info.status == ("KILLED" if outcome.collapsed else "FINISHED")
        assert run.info.end_time is not None
        assert answered(result.config.tracking_uri, run) == list(outcome.eval.correct)
    assert (result.unfinished, result.untold) == (0, 0)


@pytest.mark.slow
def test_a_collapse_is_a_result_with_rule_and_final_accuracy(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, _ = finished
    collapsed = named(result)["e13i-baseline"].results
    assert [outcome.outcome for outcome in collapsed.values()] == ["collapsed", "collapsed"]
    assert {outcome.rule for outcome in collapsed.values()} == {"filter_rejection"}
    for outcome in collapsed.values():
        assert sum(outcome.eval.correct) / len(outcome.eval.correct) == outcome.eval.accuracy
        assert outcome.step < 6


@pytest.mark.slow
def test_arms_are_paired_by_seed_and_a_point_brings_its_filter_s_own_control(
    finished: tuple[StudyResult, list[TrialEvent]],
) -> None:
    result, _ = finished
    arms = named(result)
    assert [(k, outcome.config.seed) for arm in result.arms for k, outcome in arm.results.items()] == [
        (0, 5),
        (1, 6),
    ] * 4
    policies = {name: arm.config.grpo.filter_groups for name, arm in arms.items()}
    assert policies["control"] == "off"
    assert policies["control-resample"] == policies["e13i-baseline"] == "resample"
    for name in ("control", "control-resample"):
        assert arms[name].config.noise.sigma_start == 0


@pytest.mark.slow
def test_the_settings_reach_the_model(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    """What was asked for, what the trial's receipt measured and what tracking shows are the same."""
    result, _ = finished
    outcome = named(result)["e13i-baseline"].results[0]
    assert outcome.config.noise.sigma_start == 4.0
    assert max(effect.nominal for effect in outcome.receipt.effects) == 4.0
    run = next(run for run in runs(result.config.tracking_uri, "s") if run.data.tags["arm"] == "e13i-baseline")
    assert run.data.params["noise.sigma_start"] == "4"
    assert max(sigma for _, sigma in points(result.config.tracking_uri, run, "rin/sigma")) == 4.0
    reported = read_reports(trial_folder(result.config, "e13i-baseline", 0))
    assert points(result.config.tracking_uri, run, "grpo/reward") == [
        (r.step, step_metrics(r)["grpo/reward"]) for r in reported
    ]


@pytest.mark.slow
def test_a_trial_takes_its_beginning_over_from_the_control_of_its_seed_and_a_sweep_that_is_over_keeps_none(
    finished: tuple[StudyResult, list[TrialEvent]],
) -> None:
    result, _ = finished
    for replicate in range(2):  # the last arm's: its control has ended before it begins
        shared = read_attempts(trial_folder(result.config, result.arms[-1].name, replicate))[-1].shared
        assert shared is not None
        assert shared.trial == f"control-{replicate}"
    assert report_study(result.config).ledger.saved > 0
    assert PREFIXES not in result.config.folder.names()


@pytest.mark.slow
def test_the_view_hears_of_every_trial_s_start_and_end(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, events = finished
    ended = {e.trial: e.status for e in events if e.status != "running"}
    assert ended == {f"{arm.name}/{k}": outcome.outcome for arm in result.arms for k, outcome in arm.results.items()}
    assert {e.trial for e in events if e.status == "running" and e.step == 0} == set(ended)


@pytest.mark.slow
def test_the_exported_trial_repeats_its_evaluation_exactly(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, _ = finished
    assert result.candidate is not None
    exported = read_config(load_yaml(folder(result.config) / "best.yaml"))
    assert exported == result.candidate.config
    trial = Trial(exported)
    while not trial.done:
        trial.step()
    assert trial.outcome().eval == result.candidate.arm.results[0].eval


@pytest.mark.slow
def test_the_candidate_is_feasible_and_called_a_candidate(finished: tuple[StudyResult, list[TrialEvent]]) -> None:
    result, _ = finished
    candidate = result.candidate
    assert candidate is not None
    assert candidate.arm.name == "c03", "the one with noise that completed: no control, and not the collapsed point"
    assert candidate.control.name == "control"
    yaml = to_yaml(candidate)
    assert (folder(result.config) / "best.yaml").read_text() == yaml
    assert "candidate" in yaml
    assert "better" not in yaml
    assert read_config(parse_yaml(yaml, "text")) == candidate.config
    lines = to_verl(candidate.config).splitlines()
    assert "trainer.noise_injection.enabled=True" in lines
    assert any(line.startswith("# no key for: task.name=") for line in lines)


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
    same_work = {"eval": {"questions": 64}}
    planned = plan_study(study(Path(store), name="next", trials=5, replicates=3, settings=same_work), cpus=2)
    assert (planned.study.runs, planned.searched, planned.slots) == (15, 4, 2)
    assert "median" in planned.seconds_source


def test_points_need_room_and_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--points e99: unknown point; choose from control"):
        fixed_arms(study(tmp_path, points=("e99",)))
    with pytest.raises(ConfigError, match="--trials 2: the control and the points are 3"):
        fixed_arms(study(tmp_path, trials=2, points=("e13m-rmsnorm",)))


def test_a_user_s_own_point_is_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("noise: {sigma_start: 0.03, sigma_end: 0.003}\nseed: 0\n")
    control, point = fixed_arms(study(tmp_path, points=(str(mine),)))
    assert (point.name, point.origin) == ("mine", "point")
    assert point.config.noise.sigma_start == 0.03
    assert point.config.seed == 0
    assert point.config.model_copy(update={"noise": control.config.noise}) == control.config
    taken = tmp_path / "e13h.yaml"
    taken.write_text("{}")
    with pytest.raises(ConfigError, match="e13h would name an arm; rename the file"):
        fixed_arms(study(tmp_path, points=(str(taken),)))


@pytest.mark.slow
def test_a_setting_that_touches_nothing_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = study(tmp_path, points=("e13i-v3",), settings={"noise": {"layers": [7]}})
    with pytest.raises(ConfigError, match=r"noise.layers=7: the model has blocks 0 to 1"):
        run_study(config, lambda event: None)
    assert not folder(config).exists()


@pytest.mark.slow
def test_tracking_that_is_down_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = study(tmp_path, tracking_uri="http://user:secret@127.0.0.1:9/")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9") as caught:
        run_study(config, lambda event: None)
    assert "secret" not in str(caught.value)
    assert not folder(config).exists()


def test_of_its_callback_nothing_is_in_what_tune_pickles_into_the_store(tmp_path: Path) -> None:
    config = study(tmp_path, tracking_uri="http://rin:canary-4711@127.0.0.1:9/")
    callback = SweepCallback(config, [], Budget(config, []), Tracker(config), lambda event: None)
    pickled = pickle.dumps(callback)
    assert b"canary" not in pickled
    assert vars(pickle.loads(pickled)) == {}


def test_an_arm_that_is_proposed_while_trials_run_is_known_without_reading_the_sweep_again(tmp_path: Path) -> None:
    """In an object store every outcome would be read again for each arm."""
    config = study(tmp_path, tracking_uri="http://127.0.0.1:9")
    arms: list[Arm] = fixed_arms(config)
    events: list[TrialEvent] = []
    tracker = Tracker(config)
    callback = SweepCallback(config, arms, Budget(config, arms), tracker, events.append)
    arms.append(replace(arms[0], name="c01", origin="searcher"))
    callback.on_trial_start(0, [], SimpleNamespace(trial_id="t", config={"number": 1, "arm": "c01", "replicate": 2}))
    assert ([event.trial for event in events], tracker.open()) == (["c01/2"], [("c01", 2)])
    assert not folder(config).exists()


def test_a_sweep_that_waits_for_a_node_says_so_until_its_first_trial_starts(tmp_path: Path) -> None:
    config = study(tmp_path, tracking_uri="http://127.0.0.1:9")
    arms = fixed_arms(config)
    events: list[Event] = []
    callback = SweepCallback(config, arms, Budget(config, arms), Tracker(config), events.append, waits=True)
    for replicate in (0, 1):
        given = {"number": 0, "arm": "control", "replicate": replicate}
        callback.on_trial_start(0, [], SimpleNamespace(trial_id=f"t{replicate}", config=given))
    told = [event.doing if isinstance(event, StudyEvent) else event.trial for event in events]
    assert told == ["", "control/0", "control/1"]


def test_a_trial_whose_process_does_not_start_does_not_fail_by_the_error_of_an_earlier_run(tmp_path: Path) -> None:
    config = study(tmp_path, tracking_uri="http://127.0.0.1:9")
    arms = fixed_arms(config)
    place = trial_folder(config, "control", 0)
    place.write("attempt-001.json", json.dumps(attempt(ended="hang", reason="too long")))
    (tmp_path / "error.txt").write_text("Traceback\nRuntimeError: no GPU\n")
    events: list[TrialEvent] = []
    callback = SweepCallback(config, arms, Budget(config, []), Tracker(config), events.append)
    given = {"number": 0, "arm": "control", "replicate": 0}
    trial = SimpleNamespace(trial_id="t", config=given, error_file=str(tmp_path / "error.txt"))
    callback.on_trial_error(0, [], trial)
    state = read_trial(place, driven=False)
    assert (state.status, state.rule) == ("failed", "")
    assert state.reason == "its process did not start: RuntimeError: no GPU (2 attempts)"
    assert events[-1].status == "failed"


# What every trial would fail by is said before Ray starts

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
GSM8K = Path(__file__).parent / "data" / "gsm8k_small.jsonl"
ABSENT: list[tuple[dict[str, Any], str]] = [
    ({"model": {"name": "/nope"}}, "model.name=/nope: cannot be loaded (there is no such folder)"),
    ({"task": {"path": "/nope.jsonl"}}, "task.path: /nope.jsonl cannot be read"),
    ({"task": {"name": "gsmk8", "path": None}}, "task.name=gsmk8: no such task; did you mean gsm8k?"),
    ({"eval": {"questions": 5000}}, "eval.questions=5000: gsm8k has"),
    ({"grpo": {"prompts": 5000}}, "gsm8k has"),
    ({"noise": {"layers": [7]}}, "noise.layers=7: the model has blocks 0 to 1"),
    (
        {"noise": {"layers": [1], "zones": [{"zone": "first", "sigma_start": 0.1, "sigma_end": 0.1}]}},
        "noise.zones: first sets the sigma of no chosen block",
    ),
    ({"quant": {"skip_layers": [-3]}}, "quant.skip_layers=-3: the model has blocks 0 to 1"),
    ({"quant": {"exclude": ["lm_head", "q_prj"]}}, "quant.exclude=q_prj: matches no linear layer"),
]


@pytest.mark.parametrize(("wrong", "said"), ABSENT, ids=[said.partition(":")[0] for _, said in ABSENT])
def test_what_is_not_there_is_refused_before_anything_starts(
    wrong: dict[str, Any], said: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    settings = {
        "model": {"name": model_folder("llama", layers=2, text=True), "recipe": None},
        "task": {"name": "gsm8k", "path": str(GSM8K)},
        "eval": {"questions": 4},
        "grpo": {"prompts": 4},
    }
    place = tmp_path / "store"
    config = study(place, workload="embedded", points=("e13i-v3",), settings=merge(settings, wrong))
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_sources(config, fixed_arms(config))


def test_patterns_that_match_are_taken_and_of_experts_nothing_is_said_before_they_are_loaded(tmp_path: Path) -> None:
    dense, mixture = (CONFIG_MAPPING[kind](**SMALL) for kind in ("llama", "mixtral"))
    for config, pattern in ((dense, "layers.1.mlp"), (dense, "lm_head"), (dense, "*_proj"), (mixture, "experts.*.up")):
        config.save_pretrained(tmp_path)
        model = ModelConfig(name=str(tmp_path), recipe=None)
        check_names(skeleton_of(model), QuantConfig(exclude=(pattern,)))


def test_a_sweep_looks_for_its_model_before_its_tracking(tmp_path: Path) -> None:
    settings = {"model": {"name": "/nope", "recipe": None}, "task": {"name": "reasoning_gym:chain_sum"}}
    with pytest.raises(ConfigError, match=r"model\.name=/nope"):
        begin_study(study(tmp_path, workload="embedded", settings=settings, tracking_uri="http://127.0.0.1:9"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_adapters_is_no_model(tmp_path: Path, model_folder: ModelFolder) -> None:
    """transformers would load the model that they belong to with them inside."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": model_folder("llama")}))
    adapters = ModelConfig(name=str(tmp_path))
    for load in (lambda: load_network(adapters, None), lambda: depth_of(adapters)):
        with pytest.raises(ConfigError, match=r"holds adapters \(adapter_config.json\) and no model; merge them"):
            load()


def test_a_cluster_may_have_what_this_machine_lacks(tmp_path: Path) -> None:
    settings = {"model": {"name": "/nope", "recipe": None}, "task": {"name": "gsm8k", "path": "/nope.jsonl"}}
    config = study(tmp_path, workload="embedded", settings=settings, address="HEAD:6379")
    check_sources(config, fixed_arms(config))


@pytest.mark.slow
def test_a_trial_that_fails_is_a_failure_and_not_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the user's mistake, which only shows there: it is not tried again."""
    monkeypatch.setattr(search.study, "check_sources", lambda config, arms: None)
    missing = tmp_path / "no-such-model"
    settings = {"model": {"name": str(missing), "recipe": None}, "task": {"name": "reasoning_gym:chain_sum"}}
    events: list[TrialEvent] = []
    result = run_study(study(tmp_path, workload="embedded", trials=1, settings=settings), of_trials(events.append))
    (control,) = result.arms
    (state,) = read_trials(result.config, control, driven=False)
    assert (control.results, state.status, len(state.attempts)) == ({}, "failed", 1)
    assert "no-such-model" in state.reason
    assert events[-1].status == "failed"
    (run,) = runs(result.config.tracking_uri, "s")
    assert (run.data.tags["status"], run.info.status) == ("failed", "FAILED")
    assert "no-such-model" in run.data.tags["error"]
    assert (result.candidate, result.unfinished) == (None, 1)
    assert not (folder(result.config) / "best.yaml").exists()


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
        "--no-confirm",
        "--name",
        "s",
        "--store",
        str(tmp_path),
        "--set",
        "grpo.steps=400",
    ]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
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
    config = load_study_config(str(tmp_path), "s")
    shown = runs(config.tracking_uri, "s")
    assert {(run.data.tags["status"], run.info.status) for run in shown} == {("stopped", "KILLED")}
    assert list((tmp_path / "s" / "trials").glob("*/checkpoint-*")), "saved before it evaluated itself"
    left = read_stopped(trial_folder(config, "control", 0))
    assert left is not None
    assert left.eval.n == 128, "evaluated as it left, and that was kept"
    assert answered(config.tracking_uri, shown[0]) == list(left.eval.correct)
    deadline = time.monotonic() + 30
    while (
        any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
        and time.monotonic() < deadline
    ):
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
    again = resume_study(load_study_config(result.config.store, "s"), of_trials(events.append))
    assert events == []
    assert again.arms == result.arms
    assert again.candidate == result.candidate
    report = report_study(result.config)
    for row in report.arms:
        measured = [run.accuracy for run in replicates_of(result.config, named(result)[row.arm])]
        tracked = [
            run.data.metrics["eval/accuracy"]
            for run in runs(result.config.tracking_uri, "s")
            if run.data.tags["arm"] == row.arm
        ]
        assert sorted(tracked) == pytest.approx(sorted(measured), rel=1e-3), "four digits are told"
        assert row.accuracy == pytest.approx(sum(tracked) / len(tracked), rel=1e-3)
    baseline = next(row for row in report.arms if row.arm == "e13i-baseline")
    assert (baseline.collapsed, baseline.control, baseline.verdict.split(",")[0]) == (
        2,
        "control-resample",
        "undecided",
    )
    assert report.ledger.hours > 0


@pytest.mark.slow
def test_the_budget_ends_trials_cleanly_and_a_larger_one_goes_on_also_with_more_configurations(tmp_path: Path) -> None:
    config = study(
        tmp_path,
        trials=2,
        searcher="random",
        concurrent=1,
        settings={"eval": {"questions": 16}, "grpo": {"steps": 12}},
        budget_hours=1e-5,
    )
    stopped = run_study(config, lambda event: None)
    assert stopped.budget_spent
    assert stopped.unfinished == 2
    assert not any(arm.results for arm in stopped.arms)
    shown = runs(config.tracking_uri, "s")
    assert shown
    assert {(run.data.tags["status"], run.info.status) for run in shown} == {("stopped", "KILLED")}
    larger = extended(config, stopped.arms, trials=1, replicates=None, runs=None)
    finished = resume_study(larger.model_copy(update={"budget_hours": 1.0}), lambda event: None)
    assert (finished.unfinished, finished.budget_spent) == (0, False)
    assert load_study_config(config.store, "s").extensions == larger.extensions
    assert [(arm.name, arm.results[0].outcome) for arm in finished.arms] == [
        (name, "completed") for name in ("control", "c01", "c02")
    ]
    again = runs(config.tracking_uri, "s")
    assert [(run.data.tags["arm"], run.data.tags["status"], run.info.status) for run in again] == [
        (name, "completed", "FINISHED") for name in ("control", "c01", "c02")
    ]
    steps = [points(config.tracking_uri, run, "rin/steps_done") for run in again]
    assert steps == [[(k, k + 1.0) for k in range(12)]] * 3, "each once"

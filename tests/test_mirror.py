"""What MLflow has not heard, told from the folder: after an outage, after a killed driver, and nothing where it knows
all."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dashboards.mlflow_views import TRIALS
from search import mirror
from search.ablation import ablation
from search.arms import Arm, read_arms, trial_folder, write_arm
from search.confirm import planned_confirmation
from search.delivery import Delivery
from search.events import TrialEvent
from search.logged_model import candidate_now
from search.mirror import catch_up, send_missing, tell_candidate, tell_report
from search.mlflow_client import NOTE_TAG, check_tracking, claim, client
from search.store import (
    BEST_FILE,
    FOREST_FILE,
    PAGE_FILE,
    StudyConfig,
    default_tracking_uri,
    load_study_config,
    save_study_config,
)
from search.study import StudyResult, resume_study, run_study
from search.tracking import Tracker, known_trials
from spaces.config import ConfigError
from tests.plain_sweeps import of_trials, without_ray
from tests.real_mlflow import Server, everything, files, others, points, runs, text
from tests.written_sweeps import attempt, make_arm, outcome, study, write_sweep, write_trial
from trainable.disk.checkpoint import save_checkpoint
from trainable.disk.trial_folder import AttemptLog, write_outcome
from trainable.outcome import HEALTHY, CollapseVerdict, StepReport

SETTINGS = {"eval": {"questions": 4}}


def made(step: int, time_ms: int | None = None, rule: str = "") -> StepReport:
    """`time_ms` differs where a step is made again."""
    return StepReport(
        step=step,
        sigma=0.0,
        signals={"rin/sigma": 0.0, "grpo/reward": step / 10},
        verdict=CollapseVerdict(collapsed=True, rule=rule, evidence=f"in step {step}") if rule else HEALTHY,
        seconds=0.5,
        samples=(),
        time_ms=1_700_000_000_000 + step if time_ms is None else time_ms,
    )


def checkpoint(study: StudyConfig, arm: Arm, reports: list[StepReport]) -> None:
    """What a trial that is killed leaves for the next start: its reports as far as they are safe."""
    state = {"model": {}, "optimizer": {}, "progress": {}, "reports": [report.as_record() for report in reports]}
    save_checkpoint(trial_folder(study, arm.name, 0), len(reports), state)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_tracking_uri(str(tmp_path_factory.mktemp("tracking")))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture
def sweep(tmp_path: Path, uri: str, name: str) -> StudyConfig:
    """Two trials, neither begun; MLflow knows the sweep and nothing of its trials."""
    config = study(tmp_path, name=name, tracking_uri=uri, trials=2, settings=SETTINGS)
    save_study_config(config)
    for number, arm in enumerate([make_arm(config, "control"), make_arm(config, "c01")]):
        write_arm(config, number, arm)
    claim(config.tracking_uri, config.name, config.owner)
    return config


def killed_driver(config: StudyConfig, arms: list[Arm], steps: int) -> None:
    """Told as far as this, and then gone without a word: neither an end of a run nor one of an attempt."""
    tracker = Tracker(config)
    for number, arm in enumerate(arms):
        log = AttemptLog(trial_folder(config, arm.name, 0))
        tracker.begin(arm, number, 0)
        for step in range(steps):
            log.step = step + 1
            log.beat()
            tracker.report(arm, 0, made(step))
    assert tracker.close() == 0


def statuses(config: StudyConfig) -> list[tuple[str, str]]:
    return [(run.data.tags["status"], run.info.status) for run in runs(config.tracking_uri, config.name)]


def test_of_a_killed_driver_s_trials_the_runs_are_closed_with_the_folder_s_statuses(sweep: StudyConfig) -> None:
    control, c01 = read_arms(sweep)
    killed_driver(sweep, [control, c01], steps=2)
    assert statuses(sweep) == [("running", "RUNNING")] * 2
    # c01 came to its end before the driver could be told
    reports = [made(step) for step in range(3)]
    write_outcome(trial_folder(sweep, "c01", 0), replace(outcome(c01, 0, 3), step=3), reports)
    checkpoint(sweep, control, reports[:2])
    assert send_missing(sweep) == 0
    assert statuses(sweep) == [("stopped", "KILLED"), ("completed", "FINISHED")]
    of_control, of_c01 = runs(sweep.tracking_uri, sweep.name)
    assert points(sweep.tracking_uri, of_control, "grpo/reward") == [(0, 0.0), (1, 0.1)]
    assert points(sweep.tracking_uri, of_c01, "grpo/reward") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert points(sweep.tracking_uri, of_c01, "eval/accuracy") == [(2, 0.75)]
    assert files(sweep.tracking_uri, of_c01) == ["config.yaml", "correct.json", "receipt.html", "receipt.json"]


def test_what_mlflow_knows_already_is_not_told_again(sweep: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    control, c01 = read_arms(sweep)
    write_trial(sweep, control, 0, outcome(control, 0, 3), reports=[made(step) for step in range(3)])
    killed_driver(sweep, [c01], steps=2)
    assert send_missing(sweep) == 0
    shown = everything(sweep.tracking_uri, sweep.name)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(Delivery, "put", lambda self, record: told.append(record))
    assert send_missing(sweep) == 0
    assert told == []
    write_outcome(trial_folder(sweep, "c01", 0), outcome(c01, 0, 3), [made(step) for step in range(3)])
    send_missing(sweep)
    assert {record["key"] for record in told} == {f"{sweep.name}/c01/0"}
    assert [record["step"] for record in told if "step" in record and "rin/steps_done" in record["metrics"]] == [2], (
        "the rest is known"
    )
    assert everything(sweep.tracking_uri, sweep.name) == shown


def test_a_trial_that_never_began_has_no_run(sweep: StudyConfig) -> None:
    assert send_missing(sweep) == 0
    assert runs(sweep.tracking_uri, sweep.name) == []


def test_steps_of_an_outage_between_two_stops_are_told_although_mlflow_knows_a_stop(sweep: StudyConfig) -> None:
    _, c01 = read_arms(sweep)
    write_trial(sweep, c01, 0, None, attempts=[attempt(ended="stopped", step=2)])
    checkpoint(sweep, c01, [made(step) for step in range(2)])
    assert send_missing(sweep) == 0
    assert statuses(sweep) == [("stopped", "KILLED")]
    # It went on for three steps and was stopped again, while the server was away.
    write_trial(sweep, c01, 0, None, attempts=[attempt(ended="stopped", step=2), attempt(ended="stopped", step=5)])
    checkpoint(sweep, c01, [made(step) for step in range(5)])
    assert send_missing(sweep) == 0
    (run,) = runs(sweep.tracking_uri, sweep.name)
    assert points(sweep.tracking_uri, run, "grpo/reward") == [(step, step / 10) for step in range(5)]


def test_a_trial_goes_on_in_its_run_and_steps_that_it_makes_again_are_told_once(sweep: StudyConfig) -> None:
    """The driver is killed after step 3, the newest checkpoint is of step 2."""
    control, _ = read_arms(sweep)
    killed_driver(sweep, [control], steps=4)
    checkpoint(sweep, control, [made(step) for step in range(2)])
    before = runs(sweep.tracking_uri, sweep.name)
    tracker = Tracker(sweep)
    catch_up(sweep, read_arms(sweep), tracker)
    log = AttemptLog(trial_folder(sweep, "control", 0))
    tracker.begin(control, 0, 0)
    again = [made(step, time_ms=1_800_000_000_000 + step) for step in range(2, 6)]
    for report in again:
        tracker.report(control, 0, report)
    write_outcome(trial_folder(sweep, "control", 0), outcome(control, 0, 3), [made(0), made(1), *again])
    log.end("outcome")
    tracker.end(control, 0)
    assert tracker.close() == 0
    (run,) = runs(sweep.tracking_uri, sweep.name)
    assert run.info.run_id == before[0].info.run_id
    assert (run.data.tags["status"], run.info.status) == ("completed", "FINISHED")
    assert points(sweep.tracking_uri, run, "grpo/reward") == [(step, step / 10) for step in range(6)]
    assert points(sweep.tracking_uri, run, "eval/accuracy") == [(5, 0.75)]


def test_the_first_word_of_a_rule_is_kept_over_a_restart(sweep: StudyConfig) -> None:
    control, _ = read_arms(sweep)
    first = [made(0), made(1, rule="entropy_high")]
    write_trial(sweep, control, 0, None, attempts=[attempt(ended="stopped", step=2)])
    checkpoint(sweep, control, first)
    assert send_missing(sweep) == 0
    tracker = Tracker(sweep)
    catch_up(sweep, read_arms(sweep), tracker)
    tracker.begin(control, 0, 0)
    tracker.report(control, 0, made(2, rule="reward_low"))
    assert tracker.close() == 0
    (run,) = runs(sweep.tracking_uri, sweep.name)
    assert (run.data.tags["collapse/rule"], run.data.tags["collapse/step"]) == ("entropy_high", "1")


# The page


def test_the_page_of_a_sweep_is_told_once_and_a_newer_one_takes_its_place(sweep: StudyConfig) -> None:
    assert send_missing(sweep) == 0
    assert others(sweep.tracking_uri, sweep.name) == []
    sweep.folder.write(PAGE_FILE, "<p>undecided</p>")
    tell_report(sweep)
    (run,) = others(sweep.tracking_uri, sweep.name)
    assert client(sweep.tracking_uri).search_runs([run.info.experiment_id], TRIALS) == [], "no row of a saved view"
    assert (run.data.tags["status"], run.info.status, run.info.run_name) == ("report", "FINISHED", "report")
    assert files(sweep.tracking_uri, run) == [PAGE_FILE]
    sweep.folder.write(PAGE_FILE, "<p>ahead</p>")
    sweep.folder.write(FOREST_FILE, "<svg/>")
    assert send_missing(sweep) == 0  # by the next look, where it was written while MLflow was away
    (again,) = others(sweep.tracking_uri, sweep.name)
    assert again.info.run_id == run.info.run_id
    assert text(sweep.tracking_uri, again, PAGE_FILE) == "<p>ahead</p>"
    assert files(sweep.tracking_uri, again) == [FOREST_FILE, PAGE_FILE]
    assert runs(sweep.tracking_uri, sweep.name) == []


def test_a_page_that_mlflow_has_is_not_told_again(sweep: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.folder.write(PAGE_FILE, "<p>undecided</p>")
    assert send_missing(sweep) == 0
    monkeypatch.setattr(mirror, "tell_page", lambda *given: pytest.fail("told again"))
    assert send_missing(sweep) == 0


# What a run says of its control


def difference_of(config: StudyConfig, arm: str) -> float | None:
    run = next(run for run in runs(config.tracking_uri, config.name) if run.data.tags["arm"] == arm)
    found: float | None = run.data.metrics.get("eval/vs_control")
    assert (f"difference **{found:+.1f} points**" if found is not None else "has not ended") in run.data.tags[NOTE_TAG]
    return found


def ends(config: StudyConfig, tracker: Tracker, arm: Arm, right: int, log: AttemptLog) -> None:
    reports = [made(step) for step in range(3)]
    write_outcome(trial_folder(config, arm.name, 0), replace(outcome(arm, 0, right), step=3), reports)
    log.end("outcome")
    tracker.end(arm, 0)


def test_a_run_and_its_control_say_the_same_whoever_ends_first_and_whether_it_is_told_live_or_afterwards(
    sweep: StudyConfig,
) -> None:
    control, c01 = read_arms(sweep)
    tracker = Tracker(sweep)
    logs = [AttemptLog(trial_folder(sweep, arm.name, 0)) for arm in (control, c01)]
    for number, arm in enumerate((control, c01)):
        tracker.begin(arm, number, 0)
        for step in range(3):
            tracker.report(arm, 0, made(step))
    ends(sweep, tracker, c01, 1, logs[1])
    assert tracker.close() == 0
    assert difference_of(sweep, "c01") is None
    ends(sweep, tracker, control, 3, logs[0])
    assert tracker.close() == 0
    assert difference_of(sweep, "c01") == -50.0
    assert tell_candidate(sweep, candidate_now(sweep, read_arms(sweep))) == 0
    live, mlflow = everything(sweep.tracking_uri, sweep.name), client(sweep.tracking_uri)
    for run in runs(sweep.tracking_uri, sweep.name):
        mlflow.delete_run(run.info.run_id)
    assert send_missing(sweep) == 0
    assert everything(sweep.tracking_uri, sweep.name) == live


def test_a_control_that_ended_unheard_has_news_for_runs_that_were_told_whole(sweep: StudyConfig) -> None:
    control, c01 = read_arms(sweep)
    write_trial(sweep, c01, 0, outcome(c01, 0, 1), reports=[made(step) for step in range(3)])
    killed_driver(sweep, [control], steps=2)
    assert send_missing(sweep) == 0
    assert difference_of(sweep, "c01") is None
    write_trial(sweep, control, 0, outcome(control, 0, 3), reports=[made(step) for step in range(3)])
    assert send_missing(sweep) == 0
    assert difference_of(sweep, "c01") == -50.0


def test_a_password_in_the_reason_of_a_failure_does_not_reach_mlflow(sweep: StudyConfig) -> None:
    _, c01 = read_arms(sweep)
    reason = "OSError: http://rin:geheim@host/model is not there"
    write_trial(sweep, c01, 0, None, attempts=[attempt(ended="error", reason=reason)])
    assert send_missing(sweep) == 0
    shown = everything(sweep.tracking_uri, sweep.name)
    assert "http://rin@host/model is not there" in shown
    assert "geheim" not in shown


# Whose an experiment is


def ended(config: StudyConfig) -> StudyConfig:
    """With all its outcomes, of which MLflow has heard when somebody resumed it."""
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "c01")], {"control": [3], "c01": [2]})
    assert resume_study(config, lambda event: None).untold == 0
    assert statuses(config) == [("completed", "FINISHED")] * 2
    return config


@pytest.mark.slow
def test_a_sweep_of_the_same_name_in_a_store_whose_folder_was_deleted_is_refused(
    tmp_path: Path, uri: str, name: str
) -> None:
    ended(study(tmp_path, name=name, tracking_uri=uri, trials=2, settings=SETTINGS))
    shown = everything(uri, name)
    shutil.rmtree(tmp_path / name)
    second = study(tmp_path, name=name, tracking_uri=uri, trials=2, settings=SETTINGS)
    with pytest.raises(
        ConfigError, match=f"--name {name}: .*another sweep .*{tmp_path}.*another --name, or another --tracking-uri"
    ):
        run_study(second, lambda event: None)
    assert not (tmp_path / name).exists()
    assert everything(uri, name) == shown
    check_tracking(uri, f"{name}-2", second.owner)


@pytest.mark.slow
def test_of_two_stores_on_one_tracking_uri_the_second_sweep_of_a_name_is_refused(
    tmp_path: Path, uri: str, name: str
) -> None:
    ended(study(tmp_path / "one", name=name, tracking_uri=uri, trials=2, settings=SETTINGS))
    second = study(tmp_path / "two", name=name, tracking_uri=uri, trials=2, settings=SETTINGS)
    with pytest.raises(ConfigError, match=f"lay in {tmp_path / 'one'}"):
        run_study(second, lambda event: None)
    assert not (tmp_path / "two").exists()
    # Neither does a resume, nor a look at it, tell anything under the name.
    write_sweep(second, [make_arm(second, "control"), make_arm(second, "c01")], {"control": [1], "c01": [1]})
    shown = everything(uri, name)
    for refused in (lambda: resume_study(second, lambda event: None), lambda: send_missing(second)):
        with pytest.raises(ConfigError, match="another sweep"):
            refused()
    assert everything(uri, name) == shown


@pytest.mark.slow
def test_a_start_that_is_refused_for_its_settings_leaves_its_name_free(tmp_path: Path, uri: str, name: str) -> None:
    wrong = study(tmp_path, name=name, tracking_uri=uri, points=("e13i-v3",), settings={"noise": {"layers": [7]}})
    with pytest.raises(ConfigError, match=r"noise\.layers"):
        run_study(wrong, lambda event: None)
    mended = study(tmp_path, name=name, tracking_uri=uri, trials=2, settings=SETTINGS)
    check_tracking(uri, name, mended.owner)


def test_a_sweep_keeps_its_id_and_a_confirmation_has_its_own(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, settings=SETTINGS)
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "c01")], {"control": [3], "c01": [2]})
    assert load_study_config(config.store, "s").id == config.id
    confirmation, _ = planned_confirmation(config, (3, 5))
    taken_apart = ablation(config, study(tmp_path), named=False).config
    assert len({config.id, confirmation.id, taken_apart.id}) == 3


# Through a whole sweep


def sweep_of(store: Path, uri: str) -> StudyConfig:
    settings = {
        "eval": {"questions": 64},
        "grpo": {"steps": 4},
        "noise": {"num_stages": 3},
        "collapse": {"mode": "off"},
    }
    return study(store, trials=3, searcher="random", tracking_uri=uri, settings=settings)


def accuracies(result: StudyResult) -> dict[str, float]:
    return {arm.name: arm.results[0].eval.accuracy for arm in result.arms}


@pytest.mark.slow
def test_a_sweep_whose_tracking_dies_in_the_middle_ends_as_if_nothing_had_happened_and_mlflow_is_told_later(
    server: Server, tmp_path: Path
) -> None:
    """By the next look at it, before anybody resumes it."""
    with without_ray():
        undisturbed = run_study(
            sweep_of(tmp_path / "undisturbed", f"sqlite:///{tmp_path}/undisturbed/mlflow.db"), lambda event: None
        )
    events: list[TrialEvent] = []

    def view(event: TrialEvent) -> None:
        events.append(event)
        if event.arm == "c01" and event.step == 1:
            server.kill()

    config = sweep_of(tmp_path / "runs", server.uri)
    with without_ray():
        result = run_study(config, of_trials(view))
    assert server.process is None
    assert (result.unfinished, result.candidate is not None) == (0, True)
    assert accuracies(result) == accuracies(undisturbed)
    assert result.candidate is not None
    assert undisturbed.candidate is not None
    assert result.candidate.arm.name == undisturbed.candidate.arm.name
    assert (tmp_path / "runs" / "s" / BEST_FILE).read_text() == (tmp_path / "undisturbed" / "s" / BEST_FILE).read_text()
    assert result.untold > 0
    server.start()
    assert ("completed", "FINISHED") not in statuses(config)[1:]
    assert send_missing(config) == 0
    assert [heard.steps for heard in known_trials(server.uri, "s", config.owner).values()] == [4, 4, 4]
    again = resume_study(
        load_study_config(config.store, "s"), of_trials(lambda event: pytest.fail("a trial ran again"))
    )
    assert again.untold == 0
    shown = runs(server.uri, "s")
    assert [run.data.tags["arm"] for run in shown] == ["control", "c01", "c02"]
    assert statuses(config) == [("completed", "FINISHED")] * 3
    expected = {run.data.tags["arm"]: run for run in runs(undisturbed.config.tracking_uri, "s")}
    for run in shown:
        twin = expected[run.data.tags["arm"]]
        assert run.data.metrics.keys() == twin.data.metrics.keys()
        assert files(server.uri, run) == files(undisturbed.config.tracking_uri, twin)
        for metric in run.data.metrics:
            kept = points(server.uri, run, metric)
            assert [step for step, _ in kept] == [
                step for step, _ in points(undisturbed.config.tracking_uri, twin, metric)
            ], metric
    once = everything(server.uri, "s")
    assert send_missing(config) == 0
    assert everything(server.uri, "s") == once

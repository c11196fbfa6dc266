"""The Tune trainable, driven as Tune drives it, without a cluster: what a trial leaves in its folder, and what it goes
on from."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import trainable.trial_worker
from spaces.config import ConfigError
from spaces.points import POINTS
from spaces.reading import as_tree, merge, read_config
from spaces.workloads import WORKLOADS
from trainable.disk.checkpoint import VERSION, load_final, save_checkpoint, save_final
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import (
    ANSWERS_FILE,
    FINAL_FILE,
    OUTCOME_FILE,
    STOPPED_FILE,
    read_attempts,
    read_outcome,
    read_reports,
    read_stopped,
    read_trial,
)
from trainable.failure import TrialFailed
from trainable.outcome import Outcome
from trainable.ray_trainable import REFUSED, RinTrainable
from trainable.trial import Trial, run_trial

STEP = trainable.trial_worker.TrialWorker.step


def setting(folder: Path, point: str = "e13i-v3", *overrides: str) -> dict[str, Any]:
    config = read_config(
        merge(WORKLOADS["tiny"].settings, POINTS[point].settings), ("eval.questions=16", "threads=1", *overrides)
    )
    return {"config": as_tree(config), "arm": "a", "replicate": 0, "folder": str(folder)}


def start(config: dict[str, Any]) -> RinTrainable:
    return RinTrainable(config=config)


@pytest.fixture(autouse=True)
def _a_checkpoint_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it took to write the last one; a step returns when it is written."""
    step = trainable.trial_worker.TrialWorker.step

    def written(work: Any) -> Any:
        result = step(work)
        work.writing.result()
        return result

    monkeypatch.setattr(trainable.trial_worker.TrialWorker, "step", written)
    monkeypatch.setattr(trainable.trial_worker, "CHECKPOINT_SHARE", 1e9)


def read(folder: Path, name: str = OUTCOME_FILE) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / name).read_text())
    return tree


def numbers(result: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if "/" in name and not name.startswith("perf/")}


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """All that a step reported, without clocks."""
    return {
        name: value
        for name, value in report.items()
        if name not in ("seconds", "time_ms") and not name.startswith("perf/")
    }


def comparable_outcome(folder: Path) -> dict[str, Any]:
    return {name: value for name, value in read(folder)["outcome"].items() if name != "seconds"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def first_steps(folder: Path) -> list[int]:
    """Where each attempt began, as its file says."""
    return [read(folder, name)["first_step"] for name in names(folder) if name.startswith("attempt-")]


def finish(trainable: RinTrainable) -> list[dict[str, Any]]:
    results = [trainable.train()]
    while not results[-1]["done"]:
        results.append(trainable.train())
    trainable.stop()
    return results


def abandon(trainable: RinTrainable) -> None:
    """What a kill leaves of it in this process: nothing but its thread."""
    if trainable.work is not None:
        trainable.work.watchdog.stop()


def trial_of(trainable: RinTrainable) -> Trial:
    assert trainable.work is not None
    assert trainable.work.trial is not None
    return trainable.work.trial


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a trial that ran from its start to its end in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(setting(folder)))
    return folder


# One start


def test_its_results_are_those_of_the_plain_trial_and_the_last_one_holds_the_outcome(tmp_path: Path) -> None:
    config = setting(tmp_path)
    reports = list(run_trial(read_config(config["config"])))
    trainable = start(config)
    for report in reports:
        result = trainable.train()
        plain = {k: v for k, v in report.signals.items() if not k.startswith("perf/")}
        assert {k: v for k, v in numbers(result).items() if k in plain} == plain
    assert result["done"]
    ended = read_outcome(Folder(str(tmp_path)))
    assert ended is not None
    assert (result["outcome"], result["collapsed"], result["accuracy"]) == ("completed", 0, ended.eval.accuracy)
    trainable.stop()
    tree = read(tmp_path)
    assert set(tree) == {"version", "outcome", "reports"}
    assert tree["outcome"]["outcome"] == "completed"
    assert tree["reports"] == [report.as_record() for report in read_reports(Folder(str(tmp_path)))]
    assert [report["step"] for report in tree["reports"]] == list(range(len(reports)))


def test_a_collapse_ends_it_as_a_result(tmp_path: Path) -> None:
    trainable = start(setting(tmp_path, "e13i-baseline", "noise.sigma_start=5", "noise.sigma_end=5"))
    for _ in range(6):
        result = trainable.train()
        if result["done"]:
            break
    assert (result["collapsed"], result["outcome"], result["rule"]) == (1, "collapsed", "filter_rejection")
    trainable.stop()
    assert (read(tmp_path)["outcome"]["outcome"], read(tmp_path)["outcome"]["rule"]) == (
        "collapsed",
        "filter_rejection",
    )
    assert names(tmp_path) == [ANSWERS_FILE, "attempt-001.json", FINAL_FILE, OUTCOME_FILE]


def test_checkpoints_are_written_at_each_step_and_none_is_left_after_the_outcome(tmp_path: Path) -> None:
    trainable = start(setting(tmp_path))
    seen = []
    while not trainable.train()["done"]:
        seen.append([name for name in names(tmp_path) if name.startswith("checkpoint-")])
    assert seen == [[f"checkpoint-{step:06d}" for step in range(max(1, last - 1), last + 1)] for last in range(1, 6)]
    trainable.stop()
    assert names(tmp_path) == [ANSWERS_FILE, "attempt-001.json", FINAL_FILE, OUTCOME_FILE]
    (attempt,) = read_attempts(Folder(str(tmp_path)))
    assert (attempt.ended, first_steps(tmp_path), attempt.step) == ("outcome", [0], 6)
    assert attempt.seen >= attempt.started + attempt.loading_seconds > attempt.started


def test_checkpoints_that_would_cost_more_than_their_share_of_time_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainable.trial_worker, "CHECKPOINT_SHARE", 1e-9)
    running = start(setting(tmp_path))
    for _ in range(3):
        running.train()
    assert [name for name in names(tmp_path) if name.startswith("checkpoint-")] == ["checkpoint-000001"], (
        "one, to know what it costs"
    )
    running.stop()
    assert "checkpoint-000003" in names(tmp_path), "a trial that is stopped in good order loses nothing"


@pytest.mark.parametrize("ending", ["outcome", "stop", "error"])
def test_training_does_not_wait_for_a_slow_disk_and_its_end_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    save, asked, free = save_checkpoint, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        asked.set()
        assert free.wait(60)
        save(*arguments)

    monkeypatch.setattr(trainable.trial_worker, "save_checkpoint", slow)
    monkeypatch.setattr(trainable.trial_worker.TrialWorker, "step", STEP)
    running = start(setting(tmp_path, "e13i-v3", "grpo.steps=4"))
    for _ in range(3):
        running.train()
    assert asked.wait(60)
    assert names(tmp_path) == ["attempt-001.json"], "three steps, and the first one is still being written"
    if ending == "error":
        monkeypatch.setattr(trial_of(running), "step", lambda: 1 / 0)
    timer = threading.Timer(0.5, free.set)
    timer.start()
    if ending == "error":
        with pytest.raises(ZeroDivisionError):
            running.train()
    elif ending == "outcome":
        assert running.train()["done"]
    running.stop()
    assert free.is_set(), "it waited"
    left = {
        "outcome": [ANSWERS_FILE, "attempt-001.json", FINAL_FILE, OUTCOME_FILE],
        "stop": [ANSWERS_FILE, "attempt-001.json", "checkpoint-000001", "checkpoint-000003", STOPPED_FILE],
        "error": ["attempt-001.json", "checkpoint-000001"],
    }
    assert names(tmp_path) == left[ending]


def test_what_goes_wrong_in_a_write_other_than_a_full_disk_is_a_bug_and_propagates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainable.trial_worker.TrialWorker, "step", STEP)
    monkeypatch.setattr(trainable.trial_worker, "save_checkpoint", lambda *_: 1 / 0)
    running = start(setting(tmp_path, "e13i-v3"))
    with pytest.raises(ZeroDivisionError):
        finish(running)
    running.stop()


def test_a_trial_that_is_stopped_saves_itself_and_is_evaluated_as_it_leaves(tmp_path: Path) -> None:
    trainable = start(setting(tmp_path))
    trainable.train()
    trainable.stop()
    assert names(tmp_path) == [ANSWERS_FILE, "attempt-001.json", "checkpoint-000001", STOPPED_FILE]
    tree = read(tmp_path, STOPPED_FILE)
    assert tree["outcome"]["outcome"] == "stopped"
    assert tree["outcome"]["eval"]["n"] == 16
    assert len(tree["reports"]) == 1
    folder = Folder(str(tmp_path))
    assert read_outcome(folder) is None, "it has steps to go"
    assert read_stopped(folder) == Outcome.from_tree(tree["outcome"])
    assert [attempt.ended for attempt in read_attempts(folder)] == ["stopped"]


def test_a_trial_that_is_stopped_saves_itself_before_it_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops it may not wait for the evaluation."""
    monkeypatch.setattr(trainable.trial_worker, "CHECKPOINT_SHARE", 1e-9)
    running = start(setting(tmp_path))
    for _ in range(2):
        running.train()

    def killed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial_of(running), "outcome", killed)
    with pytest.raises(KeyboardInterrupt):
        running.stop()
    abandon(running)
    assert "checkpoint-000002" in names(tmp_path)
    assert [attempt.ended for attempt in read_attempts(Folder(str(tmp_path)))] == ["stopped"]


def test_a_trial_that_is_stopped_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    start(setting(tmp_path)).stop()
    assert names(tmp_path) == []


def test_a_bug_in_a_step_propagates_and_is_not_evaluated(tmp_path: Path) -> None:
    trainable = start(setting(tmp_path))
    trainable.train()

    def broken(answers: object) -> list[dict[str, float | None]]:
        raise ZeroDivisionError("a reward function with a bug")

    trial_of(trainable).task.reward = broken
    with pytest.raises(ZeroDivisionError):
        trainable.train()
    trainable.stop()
    assert names(tmp_path) == ["attempt-001.json", "checkpoint-000001"]
    (attempt,) = read_attempts(Folder(str(tmp_path)))
    assert (attempt.ended, attempt.step) == ("error", 1)
    assert attempt.reason == "ZeroDivisionError: a reward function with a bug"


def test_the_user_s_mistake_ends_a_trial_without_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune starts a trial again after every exception."""
    monkeypatch.setattr(trainable.trial_worker.TrialWorker, "step", STEP)
    model = ("model.name=/nope", "model.recipe=null", "task.name=reasoning_gym:chain_sum")
    running = start(setting(tmp_path, "control", *model))
    result = running.train()
    assert (result["done"], result[REFUSED].partition(":")[0]) == (True, "model.name=/nope")
    running.stop()
    state = read_trial(Folder(str(tmp_path)), driven=False)
    assert (state.status, state.outcome, len(state.attempts)) == ("failed", None, 1)
    assert "there is no such folder" in state.reason


# Its final weights


@pytest.mark.parametrize(
    ("how", "overrides"),
    [
        ("completed", ()),
        ("completed", ("model.adapter=lora", "model.lora_rank=4")),
        ("collapsed", ("noise.sigma_start=5", "noise.sigma_end=5", "noise.modules=[linear]", "collapse.patience=1")),
    ],
    ids=["completed", "lora", "collapsed"],
)
def test_a_trial_that_ended_keeps_the_clean_weights_that_were_trained(
    tmp_path: Path, how: str, overrides: tuple[str, ...]
) -> None:
    running = start(setting(tmp_path, "e13i-baseline" if how == "collapsed" else "e13i-v3", *overrides))
    before = None
    while not running.train()["done"]:
        before = {name: p.detach().clone() for name, p in trial_of(running).policy.trainable().items()}
    trained = trial_of(running).policy.trainable()
    assert read(tmp_path)["outcome"]["outcome"] == how
    kept = load_final(Folder(str(tmp_path)))
    assert kept.keys() == trained.keys()
    assert all(("lora_" in name) == ("model.adapter=lora" in overrides) for name in kept)
    for name, parameter in trained.items():
        assert kept[name].dtype == parameter.dtype
        assert torch.equal(kept[name], parameter.detach()), name
    if how == "completed":
        assert before is not None
        assert any(not torch.equal(kept[name], before[name]) for name in kept), "not those of a step before"
    running.stop()


def test_a_kill_between_weights_and_outcome_loses_neither(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once there is an outcome, the trial is never run again: the weights are there by then."""
    write = Folder.write

    def killed(folder: Folder, name: str, data: bytes | str) -> None:
        if name == OUTCOME_FILE:
            raise KeyboardInterrupt
        write(folder, name, data)

    first = start(setting(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", killed)
        for _ in range(5):
            first.train()
        with pytest.raises(KeyboardInterrupt):
            first.train()
    abandon(first)
    assert FINAL_FILE in names(tmp_path)
    assert "checkpoint-000005" in names(tmp_path), "it has steps to go"
    (tmp_path / FINAL_FILE).write_bytes(b"not the weights of what comes")
    assert [result["step"] for result in finish(start(setting(tmp_path)))] == [5]
    assert comparable_outcome(tmp_path) == comparable_outcome(undisturbed)
    assert (tmp_path / FINAL_FILE).read_bytes() == (undisturbed / FINAL_FILE).read_bytes()


def test_a_full_disk_costs_the_final_weights_and_not_the_outcome(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = Folder.write

    def limited(folder: Folder, name: str, data: bytes | str) -> None:
        if name in (FINAL_FILE, ANSWERS_FILE):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, name, data)

    monkeypatch.setattr(Folder, "write", limited)
    finish(start(setting(tmp_path)))
    assert names(tmp_path) == ["attempt-001.json", OUTCOME_FILE]
    assert comparable_outcome(tmp_path) == comparable_outcome(undisturbed)
    assert f"no {FINAL_FILE}, so this trial cannot be exported" in caplog.text
    assert "No space left" in caplog.text


def test_final_weights_of_no_damaged_byte_are_taken_for_whole(tmp_path: Path) -> None:
    """A byte of each kind of place: length, head, checksum, values; harmless is what changes no weight."""
    folder = Folder(str(tmp_path))
    weights = {"a.weight": torch.randn(3, 5), "b": torch.tensor(2.0), "c": torch.randn(4).to(torch.bfloat16)}
    save_final(folder, weights)
    whole = (tmp_path / FINAL_FILE).read_bytes()
    said: list[str] = []
    for place in range(len(whole)):
        (tmp_path / FINAL_FILE).write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = load_final(folder)
        except ValueError as error:  # a ConfigError is one
            said.append("refused" if isinstance(error, ConfigError) else str(error)[:10])
            continue
        assert found.keys() == weights.keys()
        assert all(
            torch.equal(found[name], weights[name]) and found[name].dtype == weights[name].dtype for name in weights
        )
        said.append("harmless")
    assert set(said) <= {"is damaged", "refused", "harmless"}
    assert said.count("refused") == 1, "the version"
    assert said.count("harmless") <= 8, "padding of the head"


# Started again


@pytest.mark.parametrize("ended", ["killed", "stopped"])
@pytest.mark.parametrize("after", range(6))
def test_started_again_from_its_folder_after_any_step_it_continues_bit_for_bit(
    tmp_path: Path, undisturbed: Path, after: int, ended: str
) -> None:
    first = start(setting(tmp_path))
    for _ in range(after):
        first.train()
    abandon(first) if ended == "killed" else first.stop()
    results = finish(start(setting(tmp_path)))
    assert [result["step"] for result in results] == list(range(after, 6))
    assert [comparable(report) for report in read(tmp_path)["reports"]] == [
        comparable(report) for report in read(undisturbed)["reports"]
    ]
    assert comparable_outcome(tmp_path) == comparable_outcome(undisturbed)
    attempts = read_attempts(Folder(str(tmp_path)))
    first_ended = "" if ended == "killed" else "stopped"
    assert [attempt.ended for attempt in attempts] == ([first_ended, "outcome"] if after else ["outcome"])
    assert first_steps(tmp_path) == ([0, after] if after else [0])
    assert names(tmp_path) == [
        ANSWERS_FILE,
        *(f"attempt-{number:03d}.json" for number in range(1, len(attempts) + 1)),
        FINAL_FILE,
        OUTCOME_FILE,
    ]
    answers, outcome = json.loads((tmp_path / ANSWERS_FILE).read_text()), read(tmp_path)["outcome"]
    right = {row[0]: row[-1] for row in answers["data"]}
    assert [right[number] == "yes" for number in range(len(right))] == list(map(bool, outcome["eval"]["correct"]))
    assert (tmp_path / ANSWERS_FILE).read_bytes() == (undisturbed / ANSWERS_FILE).read_bytes()
    assert (tmp_path / FINAL_FILE).read_bytes() == (undisturbed / FINAL_FILE).read_bytes()


def test_a_trial_that_is_killed_at_every_step_ends_as_if_it_had_not_been(tmp_path: Path, undisturbed: Path) -> None:
    done = False
    while not done:
        running = start(setting(tmp_path))
        done = running.train()["done"]
        abandon(running)
    assert [comparable(report) for report in read(tmp_path)["reports"]] == [
        comparable(report) for report in read(undisturbed)["reports"]
    ]
    assert comparable_outcome(tmp_path) == comparable_outcome(undisturbed)
    assert first_steps(tmp_path) == list(range(6))


def test_a_trial_that_is_over_is_not_run_again_when_its_process_died_before_tune_heard_of_it(
    tmp_path: Path, undisturbed: Path
) -> None:
    first = start(setting(tmp_path))
    for _ in range(6):
        last = first.train()
    abandon(first)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = start(setting(tmp_path))
    (again,) = finish(second)
    assert again["done"]
    told = ("outcome", "collapsed", "accuracy", "step", "time_ms", "grpo/reward")
    assert {name: again[name] for name in told} == {name: last[name] for name in told}
    assert again["step"] == 5
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, "nor is it another attempt"


def test_the_next_trial_in_the_same_process_is_like_one_in_a_process_of_its_own(
    tmp_path: Path, undisturbed: Path
) -> None:
    """After one that was stopped, and after one that was over before it began."""
    reused = start(setting(tmp_path / "stopped", "control"))
    reused.train()
    assert reused.reset_config(setting(undisturbed))
    assert reused.train()["done"]
    assert reused.reset_config(setting(tmp_path / "next"))
    finish(reused)
    assert names(tmp_path / "stopped") == [ANSWERS_FILE, "attempt-001.json", "checkpoint-000001", STOPPED_FILE]
    assert [comparable(row) for row in read(tmp_path / "next")["reports"]] == [
        comparable(row) for row in read(undisturbed)["reports"]
    ]
    assert comparable_outcome(tmp_path / "next") == comparable_outcome(undisturbed)
    assert [attempt.ended for attempt in read_attempts(Folder(str(tmp_path / "next")))] == ["outcome"]


def test_what_a_stop_had_said_is_gone_once_the_trial_goes_on(tmp_path: Path) -> None:
    first = start(setting(tmp_path))
    first.train()
    first.stop()
    second = start(setting(tmp_path))
    second.train()
    assert STOPPED_FILE not in names(tmp_path)
    abandon(second)


def test_a_damaged_newest_checkpoint_costs_one_step_and_is_told_in_the_attempt(
    tmp_path: Path, undisturbed: Path
) -> None:
    first = start(setting(tmp_path))
    for _ in range(3):
        first.train()
    abandon(first)
    tensors = tmp_path / "checkpoint-000003" / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(data)
    results = finish(start(setting(tmp_path)))
    assert [result["step"] for result in results] == [2, 3, 4, 5]
    assert [comparable(report) for report in read(tmp_path)["reports"]] == [
        comparable(report) for report in read(undisturbed)["reports"]
    ]
    (told,) = read(tmp_path, "attempt-002.json")["damaged"]
    assert "checkpoint-000003 is damaged" in told


def test_a_checkpoint_of_another_version_stops_the_trial_and_stays(tmp_path: Path) -> None:
    first = start(setting(tmp_path))
    first.train()
    abandon(first)
    values = tmp_path / "checkpoint-000001" / "progress.json"
    values.write_text(values.read_text().replace(f'"version": {VERSION}', f'"version": {VERSION + 1}', 1))
    second = start(setting(tmp_path))
    assert f"checkpoint version {VERSION + 1}" in second.train()[REFUSED]
    abandon(second)
    assert values.exists()


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = Folder.write
    full = [False]

    def limited(folder: Folder, name: str, data: bytes | str) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, name, data)

    monkeypatch.setattr(Folder, "write", limited)
    running = start(setting(tmp_path))
    running.train()
    running.train()
    full[0] = True
    running.train()
    running.train()
    assert "no checkpoint of step 3" in caplog.text
    assert "No space left" in caplog.text
    assert [name for name in names(tmp_path) if name.startswith("checkpoint-")] == [
        "checkpoint-000001",
        "checkpoint-000002",
    ]
    full[0] = False
    running.train()
    assert "checkpoint-000005" in names(tmp_path)
    abandon(running)
    finish(start(setting(tmp_path)))
    assert [comparable(report) for report in read(tmp_path)["reports"]] == [
        comparable(report) for report in read(undisturbed)["reports"]
    ]


def test_after_a_disk_was_full_a_restart_goes_on_from_the_last_checkpoint_that_fitted(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start(setting(tmp_path))
    running.train()

    def full(folder: Folder, name: str, data: bytes | str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", full)
        running.train()
        abandon(running)
    results = finish(start(setting(tmp_path)))
    assert results[0]["step"] == 1
    assert comparable_outcome(tmp_path) == comparable_outcome(undisturbed)


HANGS = """
import json, sys, time
from pathlib import Path
import trainable.ray_trainable as module

config = json.loads(sys.argv[1])
running = module.RinTrainable(config=config)
running.train()
def a_reward_server_that_stopped_answering(answers):
    time.sleep(3600)
running.work.trial.task.reward = a_reward_server_that_stopped_answering
assert running.work.watchdog.limit == config["config"]["hang_seconds"]
running.work.watchdog.limit = 0.5
running.train()
"""


@pytest.mark.slow
def test_a_hang_kills_the_process_and_leaves_an_attempt_that_says_so(tmp_path: Path, undisturbed: Path) -> None:
    command = [sys.executable, "-c", HANGS, json.dumps(setting(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    tree = read(tmp_path, "attempt-001.json")
    assert tree["ended"] == "hang"
    assert "a_reward_server_that_stopped_answering" in tree["stacks"]
    state = read_trial(Folder(str(tmp_path)), driven=False)
    assert (state.status, state.rule) == ("failed", "hang")
    assert state.reason.startswith("step 1: phase ")
    assert "took over" in state.reason
    finish(start(setting(tmp_path)))
    assert comparable_outcome(tmp_path) == comparable_outcome(undisturbed)


def test_an_attempt_says_how_many_gpus_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(work: Any) -> Any:
        raise TrialFailed("engine", "died")

    monkeypatch.setattr(trainable.trial_worker.TrialWorker, "_step", fails)
    for more, slots in (({"slots": 4.0}, 4.0), ({}, None)):
        with pytest.raises(TrialFailed):
            start(setting(tmp_path) | more).step()
        assert read_attempts(Folder(str(tmp_path)))[-1].slots == slots

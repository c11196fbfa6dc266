"""A trial of two processes inside a real Ray: what Tune sees of it, and that nobody is left behind."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from search.arms import read_arms
from search.store import load_study_config
from search.store import ranks_of as ranks_of_trials
from spaces.reading import as_tree, merge, read_config
from spaces.workloads import TRIAL_ENVIRONMENT, WORKLOADS
from tests.benchmarks import faults
from tests.benchmarks.faults import Sweep, Tally
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import STOPPED_FILE, read_attempts, read_outcome, read_reports
from trainable.failure import TrialFailed
from trainable.outcome import Outcome, StepReport
from trainable.ray_ranks import Ranks
from trainable.ray_trainable import REFUSED, RinTrainable
from trainable.team import Team
from trainable.trial import Trial

SMALL = ("parallel.ranks=2", "eval.questions=16", "threads=1", "noise.num_stages=4", "hang_seconds=300")


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.02)
    return found


def ranks_of(parent: int) -> list[psutil.Process]:
    """Below a process, without the trial's own."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.Error):
            if "OtherRank" in "".join(process.cmdline()):
                found.append(process)
    return found


def plain(settings: dict[str, Any]) -> tuple[list[dict[str, float]], Outcome]:
    """The same trial in one process, without Ray: numbers and outcome."""
    trial = Trial(read_config(settings))
    reports = []
    while not trial.done:
        reports.append(numbers(trial.step()))
    outcome = trial.outcome()
    trial.close()
    return reports, outcome


def numbers(report: StepReport) -> dict[str, float]:
    return {key: value for key, value in report.signals.items() if not key.startswith("perf/")}


def comparable(outcome: Outcome) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(outcome.as_tree()))
    return {name: value for name, value in tree.items() if name != "seconds"}


# In a placement group, as Tune holds one for each trial


@pytest.fixture(scope="module")
def bundles() -> Iterator[PlacementGroup]:
    environment = {"env_vars": {**TRIAL_ENVIRONMENT, "OMP_NUM_THREADS": "1"}}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    group = placement_group([{"CPU": 1}] * 2, strategy="STRICT_PACK")
    ray.get(group.ready())
    yield group
    remove_placement_group(group)
    ray.shutdown()


@pytest.fixture
def two_ranks(bundles: PlacementGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial's own process is this one, which has imported torch already."""
    monkeypatch.setattr(RinTrainable, "_others", lambda self: Ranks(self.folder, self.settings, bundles))


def trainable(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {"config": settings, "arm": "a", "replicate": 0, "number": 0, "folder": str(folder)}


@pytest.mark.parametrize(
    ("ranks", "bundles_held", "team"),
    [(1, 1, None), (4, None, None), (4, 1, None), (4, 2, Team(0, 2, 4)), (4, 4, Team(0, 4, 4))],
)
def test_a_trial_has_as_many_processes_as_tune_holds_bundles_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, bundles_held: int | None, team: Team | None
) -> None:
    """Fewer than ranks where it goes on with fewer GPUs; without any, this process alone."""
    held = None if bundles_held is None else SimpleNamespace(bundle_count=bundles_held)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: held)
    settings = as_tree(read_config(WORKLOADS["tiny"].settings, (f"parallel.ranks={ranks}",)))
    others = RinTrainable(config=trainable(settings, tmp_path))._others()
    assert (others and others.team) == team


@pytest.mark.slow
@pytest.mark.usefixtures("two_ranks")
def test_two_ranks_are_stopped_killed_and_resumed_with_the_numbers_of_one_process_and_leave_nobody_behind(
    tmp_path: Path,
) -> None:
    settings = as_tree(read_config(WORKLOADS["tiny"].settings, SMALL))
    place = Folder(str(tmp_path / "trials" / "a-0"))
    config = trainable(settings, Path(place.uri))

    running = RinTrainable(config=config)
    assert running.train()["step"] == 0
    assert len(ranks_of(os.getpid())) == 1
    running.stop()  # as Tune does it: an early end, or Ctrl-C
    wait_for(lambda: not ranks_of(os.getpid()))
    assert STOPPED_FILE in place.names()
    assert [attempt.ended for attempt in read_attempts(place)] == ["stopped"]

    running = RinTrainable(config=config)
    assert running.train()["step"] == 1, "it went on"
    (other,) = ranks_of(os.getpid())
    assert running.work is not None
    assert running.work.trial is not None
    running.work.trial.on_phase = lambda phase: other.kill() if phase == "update" else None  # in the middle of a step
    with pytest.raises(TrialFailed, match=r"ranks: another process of this trial died"):
        running.train()
    running.stop()
    assert read_attempts(place)[-1].ended == "ranks"
    wait_for(lambda: not ranks_of(os.getpid()))

    running = RinTrainable(config=config)
    while not running.train()["done"]:
        assert len(ranks_of(os.getpid())) == 1
    wait_for(lambda: not ranks_of(os.getpid()))  # of a trial that is over, whose process waits for its next one
    running.stop()
    outcome = read_outcome(place)
    assert outcome is not None
    assert outcome.config.parallel.ranks == 2
    reports, alone = plain(settings)
    assert [numbers(report) for report in read_reports(place)] == reports
    assert comparable(outcome) == comparable(alone)


@pytest.mark.slow
@pytest.mark.usefixtures("two_ranks")
def test_a_mistake_that_all_ranks_meet_is_refused_as_that_of_one_process(tmp_path: Path) -> None:
    model = {"model": {"name": "/nope", "recipe": None}, "task": {"name": "reasoning_gym:chain_sum"}}
    settings = as_tree(read_config(merge(WORKLOADS["tiny"].settings, model), SMALL))
    running = RinTrainable(config=trainable(settings, tmp_path))
    result = running.train()
    assert (result["done"], result[REFUSED].partition(":")[0]) == (True, "model.name=/nope")
    running.stop()
    wait_for(lambda: not ranks_of(os.getpid()))


@pytest.mark.slow
def test_the_other_ranks_end_with_the_process_of_their_trial(bundles: PlacementGroup, tmp_path: Path) -> None:
    there = PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=0)
    actor = ray.remote(RinTrainable).options(num_cpus=1, scheduling_strategy=there)
    settings = as_tree(read_config(WORKLOADS["tiny"].settings, SMALL))
    running = actor.remote(config=trainable(settings, tmp_path))
    assert ray.get(running.train.remote())["step"] == 0
    assert len(ranks_of(os.getpid())) == 1
    below = psutil.Process().children(recursive=True)
    (trial,) = [process for process in below if "RinTrainable" in "".join(process.cmdline())]
    trial.kill()
    wait_for(lambda: not ranks_of(os.getpid()))


# In a sweep


@pytest.mark.slow
def test_a_sweep_of_two_ranks_whose_rank_is_killed_ends_with_the_undisturbed_numbers(tmp_path: Path) -> None:
    """Tune tries the trial again, in bundles that are free again; where it ran stands in its configuration."""
    sweep = Sweep(
        "ranks",
        tmp_path,
        None,  # type: ignore[arg-type]
        Tally(),
        more=("--set", "parallel.ranks=2", "--set", "grpo.steps=24", "--trials", "1"),
    )
    running = sweep.start()
    wait_for(lambda: list(sweep.folder.glob("trials/*/checkpoint-*")) or running.poll() is not None, 240)
    for rank in ranks_of(running.pid):
        rank.kill()
    assert running.wait(240) == 0, (tmp_path / "ranks.log").read_text()[-2000:]
    attempts = [read_attempts(Folder(str(trial))) for trial in (sweep.folder / "trials").iterdir()]
    assert [attempt.ended for trial in attempts for attempt in trial] == ["ranks", "outcome"]
    study = load_study_config(str(tmp_path), "ranks")
    assert ranks_of_trials(study) == 2, "for a resume, too"
    for arm in read_arms(study):
        assert arm.config.parallel.ranks == 2
        assert not faults._differences(sweep, study, arm, None)

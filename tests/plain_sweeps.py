"""Sweeps whose trials run in this process, one after the other, without Ray.

A sweep through Ray computes for half a minute before anything is trained: its own processes start, and each of a
trial's imports torch. A test whose claim is about what a sweep leaves behind (files, weights, what MLflow hears) runs
it here. Searcher, trainable and callback are the real ones, driven as Tune drives them; Tune itself is what
test_study.py and test_survival.py are about.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from ray.tune.search import Searcher

from search.arms import Arm
from search.budget import Budget
from search.events import Event, TrialEvent, View
from search.evidence import read_evidence
from search.execution import SweepCallback
from search.interruption import Interruption
from search.searchers import RinSearch
from search.store import StudyConfig
from search.tracking import Tracker
from trainable.ray_trainable import RinTrainable


def of_trials(hear: Callable[[TrialEvent], None]) -> View:
    """A view that hears of trials alone."""

    def view(event: Event) -> None:
        if isinstance(event, TrialEvent):
            hear(event)

    return view


@contextmanager
def without_ray() -> Iterator[None]:
    """Of every sweep that begins or goes on within it."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.start.sweep_ray", lambda study: nullcontext())
        patch.setattr("search.study.run_trials", _run_trials)
        yield
    torch.set_num_threads(threads)


def _run_trials(
    study: StudyConfig, arms: Sequence[Arm], budget: Budget, tracker: Tracker, view: View, interruption: Interruption
) -> bool:
    searcher = RinSearch(study, arms, read_evidence(study))
    callback = SweepCallback(study, searcher.arms, budget, tracker, view)
    for number in range(study.runs):
        trial = SimpleNamespace(trial_id=f"t{number}", config=searcher.suggest(f"t{number}"))
        if trial.config == Searcher.FINISHED:
            break
        callback.on_trial_start(0, [], trial)
        running = RinTrainable(config=trial.config)
        result = running.train()
        while not result["done"]:
            callback.on_trial_result(0, [], trial, result)
            result = running.train()
        callback.on_trial_result(0, [], trial, result)
        running.stop()
        searcher.on_trial_complete(trial.trial_id, result)
        callback.on_trial_complete(0, [], trial)
    return searcher.exhausted

"""What a run in MLflow reads like: its settings, its end in words, its numbers."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from search.arms import trial_config
from search.told import ending_words, last_metrics, note, params_of, start_metrics
from spaces.library import SPACES
from tests.written_sweeps import make_arm, outcome, report, study
from trainable.disk.trial_folder import Attempt, TrialState
from trainable.outcome import Alarm

CONFIG = make_arm(study("/s"), "c01").config


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"status": "running"}, "running"),
        ({"status": "completed"}, "completed, 29 steps"),
        ({"status": "collapsed", "rule": "entropy_high"}, "collapsed at step 3 of 29, entropy_high"),
        ({"status": "stopped"}, "stopped after 4 of 29 steps"),
        ({"status": "waiting"}, "stopped after 4 of 29 steps"),
        ({"status": "failed", "rule": "hang", "reason": "x"}, "failed after 4 of 29 steps: hang"),
        ({"status": "failed", "reason": "OSError: no GPU"}, "failed after 4 of 29 steps: OSError: no GPU"),
    ],
)
def test_an_end_is_said_in_words(state: dict[str, str], words: str) -> None:
    attempt = Attempt(started=0, seen=1, step=4, ended="outcome")
    assert ending_words(TrialState(**state, attempts=(attempt,)), 29) == words  # type: ignore[arg-type]


def test_a_rule_that_only_watched_is_said_too() -> None:
    arm = make_arm(study("/s"), "c01")
    alarm = Alarm(step=4, rule="reward_low", evidence="0.01")
    ended = replace(outcome(arm, 0, 9), alarms=(alarm,))
    state = TrialState(status="completed", outcome=ended)
    assert ending_words(state, 29) == "completed, 29 steps; reward_low at step 4, monitored"


def test_only_settings_that_are_searched_or_differ_from_the_workload_are_params() -> None:
    sweep = study("/s", space=SPACES["schedule"], settings={"grpo": {"prompts": 3}})
    arm = make_arm(sweep, "c01", "noise.sigma_start=0.0272720001285", "noise.schedule=linear", "noise.num_stages=10")
    shown = params_of(sweep, trial_config(sweep, arm, 2))
    assert shown == {
        **{"noise.sigma_start": "0.0273", "noise.sigma_end": "0.001", "noise.num_stages": "10"},
        **{"noise.schedule": "linear", "grpo.prompts": "3", "seed": "2", "threads": "1"},
    }
    constant = make_arm(sweep, "c02", "noise.schedule=constant")
    assert "noise.sigma_end" not in params_of(sweep, constant.config), "it changes nothing there"
    control = make_arm(sweep, "control")
    assert not {"noise.schedule", "noise.sigma_end"} & params_of(sweep, control.config).keys()


def test_a_start_is_the_point_at_step_0_accuracy_first() -> None:
    signals = {"eval/pass_at_1_start": 0.3, "eval/accuracy_start": 0.2, "rin/sigma": 0.0}
    first = replace(report(0), signals=signals)
    assert list(start_metrics(first).items()) == [("eval/accuracy", 0.2), ("eval/pass_at_1", 0.3)]
    assert start_metrics(report(1)) == {}


def test_axes_are_logarithms_where_there_are_any() -> None:
    sweep, hours = study("/s", gpus=0.5), Attempt(started=0, seen=7200, step=4, ended="outcome")
    arm = make_arm(sweep, "c01", "noise.sigma_start=0.01", "noise.sigma_end=0.001")
    state = TrialState(status="completed", outcome=outcome(arm, 0, 9, dose=0.02), attempts=(hours,))
    found = last_metrics(sweep, arm.config, state, replace(report(5), signals={"rollout_corr/kl": 100.0}), None)
    axes = ["log10/noise.sigma_start", "log10/noise.sigma_end", "log10/rollout_corr/kl"]
    assert [found[name] for name in axes] == pytest.approx([-2, -3, 2])
    assert (found["rin/dose"], found["rin/hours"]) == (0.02, 1.0)
    quiet = make_arm(sweep, "control")
    broken = replace(report(5), signals={"rollout_corr/kl": math.nan})
    assert not [name for name in last_metrics(sweep, quiet.config, state, broken, None) if name.startswith("log10/")]


def test_a_note_fits_into_its_tag_however_many_settings_there_are(tmp_path: Path) -> None:
    options = {f"key{number}": "x" * 100 for number in range(300)}
    task = {"name": "reasoning_gym:chain_sum", "options": options}
    sweep = study(tmp_path)
    config = CONFIG.model_copy(update={"task": CONFIG.task.model_copy(update=task)})
    said = note(sweep, make_arm(sweep, "c01"), config, TrialState(status="running"), "", None)
    assert len(said) < 3000
    assert f"{sweep.folder.uri}/report.html" in said
    assert "no control in this sweep" in said

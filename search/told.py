"""What MLflow is told of a trial: how its run is named, tagged and measured, and which files it has.

Pure functions of a trial's folder, so that a run reads the same whether its trial was followed live (`tracking.py`) or
is told afterwards (`mirror.py`).
"""

import json
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

from spaces.reading import as_tree, dump_yaml
from trainable import pass_at_k
from trainable.disk.trial_folder import TrialState
from trainable.metrics import EVAL, STEP_SECONDS, STEPS_DONE, TRIAL_SECONDS
from trainable.outcome import Outcome, Status, StepReport

RUN_STATUS: dict[Status, str] = {
    "completed": "FINISHED",
    "collapsed": "KILLED",
    "stopped": "KILLED",
    "failed": "FAILED",
}
LONGEST_PARAM = 6000  # characters, MLflow's limit


def trial_key(sweep: str, arm: str, replicate: int) -> str:
    """By which a run is found again; safe in MLflow's filter language."""
    return quote(f"{sweep}/{arm}/{replicate}", safe="/")


def standing(state: TrialState) -> str:
    """Where a trial stands that nobody works on, in a word that no later standing of it has again."""
    status = "stopped" if state.status == "waiting" else state.status
    return f"{status} after {state.step} steps, attempt {len(state.attempts)}"


def step_metrics(report: StepReport) -> dict[str, float]:
    return {STEP_SECONDS: report.seconds, **report.signals, STEPS_DONE: float(report.step + 1)}


def scores_of(outcome: Outcome) -> dict[str, float]:
    numbers = {f"{EVAL}{name}": value for name, value in asdict(outcome.eval).items() if isinstance(value, int | float)}
    sampled = pass_at_k.metrics(outcome.eval.right, outcome.config.eval.samples)
    return {**numbers, **sampled, TRIAL_SECONDS: outcome.seconds}


def reason_of(state: TrialState) -> dict[str, str]:
    """Empty once a trial that failed has ended well."""
    failed = state.status == "failed"
    return {"error": state.reason if failed else "", "failure/rule": state.rule if failed else ""}


def outcome_files(outcome: Outcome) -> dict[str, str]:
    """What ran, what it did to its weights, which questions it answered, and in how many of its samples."""
    sampled = {"right.json": as_json(outcome.eval.right)} if outcome.eval.right else {}
    return {
        "config.yaml": dump_yaml(as_tree(outcome.config)),  # as it ran: with the thread count that was in force
        "receipt.json": as_json(outcome.receipt.as_tree()),
        "correct.json": as_json(outcome.eval.correct),
        **sampled,
    }


def param_of(value: Any) -> str:
    text = value if isinstance(value, str) else as_json(value)
    mark = f"... ({len(text)} characters)"
    return text if len(text) <= LONGEST_PARAM else text[: LONGEST_PARAM - len(mark)] + mark


def as_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))

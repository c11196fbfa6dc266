"""What a trial left in its folder, whoever ran it: reports, outcome, attempts.

A trial writes these files itself (`trainable/ray_trainable.py` lists them), so they are there whether or not a driver heard of
them. It is over when it has an outcome, or when a scheduler stopped it (its ranking was the decision); stopped by a person, a signal
or the budget, it has steps to go.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spaces.config import ConfigError
from trainable.folder import Folder

OUTCOME_FILE, STOPPED_FILE, DECISION_FILE = "outcome.json", "stopped.json", "decision.json"
FAILURE_RULES = ("hang", "engine", "rollout_mismatch")
"""What a trial can fail by besides an error: a step that never ends, an engine that dies twice, one that computes something else."""


def read_outcome(trial: Folder) -> dict[str, Any] | None:
    """How a trial ended; None while it has steps to go."""
    names = trial.names()
    if OUTCOME_FILE in names:
        return _outcome(trial, OUTCOME_FILE)
    if DECISION_FILE in names:
        return _outcome(trial, STOPPED_FILE) if STOPPED_FILE in names else {"outcome": "stopped"}
    return None


def read_stopped(trial: Folder) -> dict[str, Any] | None:
    """Evaluation of a trial that was stopped from outside; None where there is none."""
    return _outcome(trial, STOPPED_FILE) if STOPPED_FILE in trial.names() else None


def write_decision(trial: Folder, why: str) -> None:
    """A scheduler has stopped this trial for good."""
    trial.write(DECISION_FILE, json.dumps({"stopped": why}))


def read_reports(trial: Folder) -> list[dict[str, Any]]:
    """What a trial has reported, as far as it is safe on disk, in order."""
    names = trial.names()
    if OUTCOME_FILE in names:
        reports: list[dict[str, Any]] = _read(trial, OUTCOME_FILE)["reports"]
        return reports
    for name in sorted((name for name in names if name.startswith("checkpoint-")), key=lambda name: (len(name), name), reverse=True):
        text = (trial / name).read("progress.json") or b""
        try:
            reports = json.loads(text.split(b"\n")[1])["reports"]
        except (IndexError, ValueError):
            continue  # unfinished or damaged: the one before it is what the trial goes on from, too
        return reports
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One process's work on one trial."""

    started: float
    """Unix seconds."""
    seen: float
    """Unix seconds; of a killed process up to 10 s before its end."""
    first_step: int
    step: int
    """Steps done at its last sign of life."""
    ended: str
    """outcome | stopped | error | hang | engine | rollout_mismatch, or empty: it was killed, or runs."""
    reason: str
    damaged: tuple[str, ...]
    """A line for each checkpoint that it had to pass over."""
    loading_seconds: float
    """Until it was ready for its first step."""

    @property
    def hours(self) -> float:
        return max(self.seen - self.started, 0.0) / 3600


def read_attempts(trial: Folder) -> list[Attempt]:
    """In order. A file that cannot be read counts as no time."""
    attempts = []
    for name in trial.names():
        if not re.fullmatch(r"attempt-\d+\.json", name):
            continue
        try:
            tree: Mapping[str, Any] = json.loads(trial.read(name) or b"")
        except ValueError:
            continue
        attempts.append(
            Attempt(
                started=tree["started"],
                seen=tree["seen"],
                first_step=tree.get("first_step", 0),
                step=tree["step"],
                ended=tree["ended"],
                reason=tree.get("reason", ""),
                damaged=tuple(tree.get("damaged", ())),
                loading_seconds=tree.get("loading_seconds", 0.0),
            )
        )
    return attempts


def read_failure(trial: Folder) -> tuple[str, str]:
    """(rule, reason) of a trial that failed, from its last attempt; two empty texts for an error that has no rule."""
    attempts = read_attempts(trial)
    if attempts and attempts[-1].ended in FAILURE_RULES:
        return attempts[-1].ended, f"{attempts[-1].reason} ({len(attempts)} attempts)"
    return "", ""


def _outcome(trial: Folder, name: str) -> dict[str, Any]:
    outcome: dict[str, Any] = _read(trial, name)["outcome"]
    return outcome


def _read(trial: Folder, name: str) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads(trial.read(name) or b"")
    except ValueError:
        raise ConfigError(f"{trial.uri}/{name}: is damaged (not JSON); remove it, and rin resume runs the trial again") from None
    return tree

"""A `Trial` inside Ray Tune: the only module here that imports ray.

A class trainable, because only its `cleanup` reliably runs when a trial is stopped early. A collapse arrives as a result with
`collapsed` = 1 and ends the trial; an exception means a bug or the machine, and Tune counts it as such. The last result carries
the outcome; a trial that is stopped from outside is evaluated in `cleanup` and leaves its outcome as a file beside its results.
"""

import json
from pathlib import Path
from typing import Any

from ray import tune

from spaces.config import TrialConfig
from trainable.checkpoint import load_state, save_state
from trainable.trial import Outcome, StepReport, Trial

OUTCOME_FILE = "outcome.json"


class RinTrainable(tune.Trainable):  # type: ignore[misc]
    """Its config is {"config": tree of TrialConfig, "arm": str, "replicate": int, "origin": str}."""

    def setup(self, config: dict[str, Any]) -> None:
        self.trial = Trial(TrialConfig.model_validate(config["config"]))
        self.ended = False
        self.broken = False

    def step(self) -> dict[str, Any]:
        self.broken = True  # until the step has returned
        report = self.trial.step()
        result = as_result(report, self._end() if self.trial.done else None)
        self.broken = False
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        save_state(Path(checkpoint_dir), self.trial.state_dict())

    def load_checkpoint(self, checkpoint_dir: str | None) -> None:
        assert checkpoint_dir is not None
        self.trial.load_state_dict(load_state(Path(checkpoint_dir)))

    def cleanup(self) -> None:
        """Runs on every ending but a killed process; a trial that was stopped is evaluated here."""
        if not self.ended and not self.broken and self.trial.so_far.next_step > 0:
            self._end()

    def _end(self) -> Outcome:
        outcome = self.trial.outcome()
        self.ended = True
        text = json.dumps(outcome.as_tree()).encode()
        if self._storage is None:  # outside of Tune
            (Path(self.logdir) / OUTCOME_FILE).write_bytes(text)
        else:  # the working folder is Tune's own and goes away; the trial's folder in the store stays
            store, folder = self._storage.storage_filesystem, self._storage.trial_fs_path
            store.create_dir(folder, recursive=True)  # Tune makes it at its first own write; a quick trial can be earlier
            with store.open_output_stream(f"{folder}/{OUTCOME_FILE}") as stream:
                stream.write(text)
        return outcome


def as_result(report: StepReport, outcome: Outcome | None = None) -> dict[str, Any]:
    """A flat Tune result: metrics by tracked name, and the outcome with the last one."""
    result: dict[str, Any] = {
        "step": report.step,
        "seconds": report.seconds,
        "collapsed": 0,
        "rule": report.verdict.rule,
        "evidence": report.verdict.evidence,
        "samples": list(report.samples),
        **report.signals,
        "rin/steps_done": float(report.step + 1),
    }
    if outcome is None:
        return result
    return {
        **result,
        "outcome": outcome.as_tree(),
        "collapsed": int(outcome.outcome == "collapsed"),
        "accuracy": outcome.eval["accuracy"],
        "done": True,
    }

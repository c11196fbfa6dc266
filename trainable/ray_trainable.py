"""A `Trial` inside Ray Tune; with `ray_ranks.py`, its other processes, the only module here that imports ray.

A class trainable, because only its `cleanup` reliably runs when a trial is stopped early. A collapse arrives as a
result with `collapsed` = 1 and ends the trial; an exception means a bug or the machine, and Tune counts it as such.

Who drives a sweep imports this module, and torch with whatever stands on it takes seconds to import: only a process
that computes a trial does that.
"""

import functools
import gc
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from spaces.config import ConfigError, TrialConfig
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import read_outcome, read_reports
from trainable.outcome import Outcome, StepReport

if TYPE_CHECKING:
    from trainable.ray_ranks import Ranks
    from trainable.trial_worker import TrialWorker

REFUSED = "refused"
"""Key of the result of a trial that cannot run as it is configured: with the reason, and without a report."""


class RinTrainable(tune.Trainable):  # type: ignore[misc]
    """Its config is {"config": tree of TrialConfig, "arm": str, "replicate": int, "number": int, "folder": place of the
    trial, "slots": that an hour of it counts}; the number is the arm's."""

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing that takes time or can fail: Tune tries a failed step again, and a failed start in a used process
        not."""
        self.settings = TrialConfig.model_validate(config["config"])
        self.folder = Folder(config["folder"])
        self.slots = config.get("slots")
        self.work: TrialWorker | None = None

    def step(self) -> dict[str, Any]:
        if self.work is None:
            outcome = read_outcome(self.folder)
            if outcome is not None:  # by a process that died before Tune heard of it
                return _result(read_reports(self.folder)[-1], outcome)
            self.work = _trial_worker()(self.folder, self.settings, self._others(), self.slots)
        try:
            return _result(*self.work.step())
        except ConfigError as mistake:  # the user's, which another attempt would meet again
            return {REFUSED: str(mistake), "done": True}

    def _others(self) -> "Ranks | None":
        """Of a trial for which Tune holds several bundles, one for each process; None where this one computes it."""
        placement = ray.util.get_current_placement_group() if ray.is_initialized() else None
        if self.settings.parallel.ranks == 1 or placement is None or placement.bundle_count == 1:
            return None
        from trainable.ray_ranks import Ranks

        return Ranks(self.folder, self.settings, placement)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in this process, which saves it the imports. It is built from its configuration alone, like
        the first one; of the last trial nothing is kept."""
        self.cleanup()
        self.work = None
        gc.collect()  # a model and its hooks refer to each other
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Runs on every ending but a killed process."""
        if self.work is not None:
            self.work.leave()


@functools.cache
def _trial_worker() -> "type[TrialWorker]":
    """With all that it stands on. No collection looks through that again: it would take 0.4 s between two trials."""
    from trainable.trial_worker import TrialWorker

    gc.collect()
    gc.freeze()
    return TrialWorker


def _result(report: StepReport, outcome: Outcome | None) -> dict[str, Any]:
    """A flat Tune result. Of a trial's last step Tune hears how it ended, and everyone else reads that in the trial's
    folder."""
    result = {**report.as_record(), "collapsed": 0}
    if outcome is None:
        return result
    ended = {"outcome": outcome.outcome, "collapsed": int(outcome.collapsed), "accuracy": outcome.eval.accuracy}
    return {**result, **ended, "done": True}

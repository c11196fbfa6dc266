"""The other processes of a trial that several compute together (`parallel.ranks`), inside Ray.

Tune reserves a bundle of CPUs and one GPU for each process, all on one node and all at once, and starts the trial in
the first. That process is rank 0 of the `Team`: it drives the trial, as the only process of any other trial does, and
alone writes into its folder. The others are actors in the remaining bundles, and make each call of the trial that rank
0 makes. What one raises all raise (`Team.agreed`), so a mistake, a collapse or a failure comes to Tune from rank 0, in
the same words as from a trial of one process.

Nobody is left behind: Ray ends the actors when rank 0 ends, however it does, and again when Tune gives the bundles
back. A rank that dies is missed at the next exchange; the attempt fails, and the next one goes on from the checkpoint.
A rank that hangs is waited for by rank 0, whose watchdog ends them all. Each rank has one GPU in its sight, and so has
an engine that it starts. They meet in a file of their node and talk over its loopback device: nothing listens outside.

Why not Ray Train's TorchTrainer, which starts such processes too (2.60): it reserves its own bundles, beside those of
the trial. Tune would start trials that cannot begin, whose hours the budget counts; and when a trial's process is
killed, its bundles stay taken unless Ray's dashboard runs, so that the next attempt waits for ever.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from spaces.config import TrialConfig
from spaces.reading import as_tree
from trainable.disk.checkpoint import load_state
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import checkpoint_name
from trainable.failure import TrialFailed
from trainable.team import Team, meet, part
from trainable.trial import Trial
from trainable.trial_worker import make_trial

T = TypeVar("T")

LEAVE_SECONDS = 30.0
"""For the other ranks to end an engine or a reward's process, before they are killed."""


class Ranks:
    """The other ranks, as rank 0 sees them."""

    def __init__(self, folder: Folder, settings: TrialConfig, placement: PlacementGroup) -> None:
        """`placement`: of this trial, a bundle for each rank; this process is in the first."""
        self._folder, self._settings, self._placement = folder, settings, placement
        self.team = Team(0, placement.bundle_count, settings.parallel.ranks)
        self._others: list[Any] = []
        self._place = ""

    def join(self) -> None:
        """Start them, and meet. Raises TrialFailed for one that does not start."""
        self._place = tempfile.mkdtemp(prefix="rin-ranks-")
        for rank in range(1, self.team.size):
            bundle = self._placement.bundle_specs[rank]
            there = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
            actor = ray.remote(OtherRank).options(
                num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_restarts=0, scheduling_strategy=there
            )
            team = Team(rank, self.team.size, self.team.shares)
            self._others.append(actor.remote(self._folder.uri, as_tree(self._settings), team))
        try:
            ray.get([other.starts.remote() for other in self._others])
        except RayError as error:
            raise TrialFailed("ranks", f"a process did not start: {' '.join(str(error).split())[:200]}") from error
        meeting = Path(self._place) / "meeting"
        for other in self._others:
            other.meets.remote(str(meeting))
        meet(meeting, self.team, waits(self._settings))

    def all(self, call: str, own: Callable[[], T], *given: object) -> T:
        """What rank 0 calls `own`, and the others by its name in `OtherRank`, at the same time. Raises what any of them
        raises."""
        for other in self._others:
            other.calls.remote(call, *given)
        with self.team.agreed(call):
            return own()

    def leave(self) -> None:
        """The others end, and what they have started. Nothing happens the second time."""
        if gone := [other.leaves.remote() for other in self._others]:
            ray.wait(gone, num_returns=len(gone), timeout=LEAVE_SECONDS)
        for other in self._others:
            ray.kill(other)
        self._others = []
        part()
        shutil.rmtree(self._place, ignore_errors=True)


class OtherRank:
    """A rank other than 0. It reads the trial's folder, and writes nothing into it."""

    def __init__(self, folder: str, settings: dict[str, Any], team: Team) -> None:
        self._folder, self._team = Folder(folder), team
        self._settings = TrialConfig.model_validate(settings)
        self._trial: Trial | None = None

    def starts(self) -> None:
        """It has, when this returns."""

    def meets(self, place: str) -> None:
        meet(Path(place), self._team, waits(self._settings))

    def calls(self, call: str, *given: Any) -> None:
        with self._team.agreed(call):
            getattr(self, call)(*given)

    def leaves(self) -> None:
        if self._trial is not None:
            self._trial.close()
        part()

    def load(self) -> None:
        self._trial = make_trial(self._folder, self._settings, self._team)

    def load_state_dict(self, step: int) -> None:
        """From the checkpoint that rank 0 has found to be whole."""
        self.trial.load_state_dict(load_state(self._folder / checkpoint_name(step)))

    def step(self) -> None:
        self.trial.step()

    def state_dict(self) -> None:
        self.trial.state_dict()

    def outcome(self) -> None:
        self.trial.outcome()

    @property
    def trial(self) -> Trial:
        assert self._trial is not None
        return self._trial


def waits(settings: TrialConfig) -> float:
    """Seconds for another rank. The watchdog of rank 0 comes first, and says what hangs."""
    return 2 * settings.hang_seconds

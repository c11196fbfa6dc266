"""A trial of several ranks on this machine, without Ray: this process and those that it starts.

This process is rank 0 and alone tells what comes of the trial. The others are Python programs of their own, load the
same trial and make the same calls, to its end. They end with this one, however it ends; that one of them has ended is
noticed here at the next exchange (`team.py`).

As many processes as ranks where there are the GPUs for it, one for each, or the cores where there is none; fewer
otherwise. The numbers are the same: they hang on `parallel.ranks`. Threads they share, so that `threads` is less than
one process would have; it is recorded, because the order of sums hangs on it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from spaces.config import ConfigError, TrialConfig
from spaces.reading import as_tree
from trainable.cores import usable_cpus
from trainable.failure import TrialFailed
from trainable.parent import die_with
from trainable.team import ALONE, FromAnother, Team, meet, part
from trainable.trial import Trial

_LOOK_SECONDS = 0.05
_LEAVE_SECONDS = 10.0
"""For the others to end an engine or a reward's process, before they are killed."""
_MEETING, _HERE = "meeting", "here-"


def processes(config: TrialConfig) -> int:
    """By how many it is computed on this machine."""
    cores = max(1, usable_cpus() // (config.threads or 1))
    return min(config.parallel.ranks, torch.cuda.device_count() if torch.cuda.is_available() else cores)


def fewer(config: TrialConfig, size: int) -> str:
    """A line of what that many processes are without; empty where there is one for each rank."""
    ranks = config.parallel.ranks
    if size == ranks:
        return ""
    room = "GPUs" if torch.cuda.is_available() else "cores"
    by = "one process computes" if size == 1 else f"{size} processes compute"
    line = f"parallel.ranks={ranks}: {by} here, by the {room} that there are, with the same numbers"
    if size > 1:
        return line
    line += "; nobody watches hang_seconds"
    return f"{line}, and parallel.weights=sharded is whole" if config.parallel.weights == "sharded" else line


@contextmanager
def launched(config: TrialConfig, size: int) -> Iterator[tuple[TrialConfig, Team]]:
    """The configuration with the threads that each has, and this process's place among so many. Raises TrialFailed for
    one that does not start."""
    if size == 1:
        yield config, ALONE
        return
    threads = config.threads or max(1, torch.get_num_threads() // size)
    config = config.model_copy(update={"threads": threads})
    with tempfile.TemporaryDirectory(prefix="rin-ranks-") as place:
        others = [_start(config, Path(place), rank, size) for rank in range(1, size)]
        try:
            _wait_for(others, Path(place))
            meet(Path(place) / _MEETING, Team(0, size), config.hang_seconds)
            yield config, Team(0, size)
            _leave(others)
        finally:
            for other in others:
                other.kill()
                other.wait()
            part()


def _start(config: TrialConfig, place: Path, rank: int, size: int) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads)}
    if torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = named[rank] if len(named) > rank else str(rank)
    started = subprocess.Popen(
        [sys.executable, "-P", "-m", "trainable.launch", str(place), str(rank), str(size), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=sys.__stderr__,  # stdout is for results
        env=environment,
    )
    assert started.stdin is not None
    with suppress(BrokenPipeError), started.stdin as pipe:  # it has ended, as will be seen
        pipe.write(json.dumps(as_tree(config)).encode())
    return started


def _wait_for(others: "Sequence[subprocess.Popen[bytes]]", place: Path) -> None:
    """Until all have imported what they need. Raises TrialFailed for one that has ended."""
    for rank, other in enumerate(others, 1):
        while not (place / f"{_HERE}{rank}").exists():
            if other.poll() is not None:
                raise TrialFailed("ranks", f"process {rank} of this trial did not start: exit code {other.returncode}")
            time.sleep(_LOOK_SECONDS)


def _leave(others: "Sequence[subprocess.Popen[bytes]]") -> None:
    """They have made the last call too, and end by themselves."""
    for other in others:
        with suppress(subprocess.TimeoutExpired):
            other.wait(_LEAVE_SECONDS)


# --- the side of the others -------------------------------------------------------------------------------------------


def main() -> None:
    place, rank, size, parent = Path(sys.argv[1]), *map(int, sys.argv[2:])
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which then ends this one
    config = TrialConfig.model_validate(json.load(sys.stdin))
    (place / f"{_HERE}{rank}").touch()
    meet(place / _MEETING, Team(rank, size), config.hang_seconds)
    try:
        trial = Trial(config, team=Team(rank, size))
        try:
            while not trial.done:
                trial.step()
            trial.outcome()
        finally:
            trial.close()
    except (ConfigError, TrialFailed, FromAnother):  # which rank 0 tells
        sys.exit(1)
    finally:
        part()


if __name__ == "__main__":
    main()

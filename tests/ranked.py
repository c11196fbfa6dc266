"""Processes of a test that compute something together: a group of their own, and what each of them came to.

They are forked from a server that has imported everything once (torch and transformers take five seconds) and has
computed nothing, so that a group of two costs a tenth of a second.
"""

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spaces.config import TrialConfig
from tests.test_trial import comparable, comparable_outcome, same_weights, weights_of
from trainable.disk.checkpoint import newest_checkpoint, save_checkpoint
from trainable.disk.folder import Folder
from trainable.team import ALONE, Team
from trainable.trial import Trial

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ranked"])
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One process: what it gave, or what it raised; neither where it was killed."""

    value: Any = None
    error: Exception | None = None
    seconds: float = 0.0
    """Until it had ended, from when all of them began."""
    code: int | None = 0


def together(
    size: int, work: Callable[..., Any], folder: Path, *arguments: Any, group_seconds: float = PATIENCE_SECONDS
) -> list[Ended]:
    """`work(team, *arguments)` in so many processes, by rank."""
    store = folder / f"store-{time.monotonic_ns()}"
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _CONTEXT.Process(target=_one, args=(pipes[rank][1], store, rank, size, group_seconds, work, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    ended = []
    try:
        for process, (ours, _) in zip(processes, pipes, strict=True):
            try:
                assert ours.poll(PATIENCE_SECONDS), "a process of the group hangs"
                found: Ended = pickle.loads(ours.recv_bytes())
            except EOFError:
                process.join()
                found = Ended(code=process.exitcode)
            ended.append(found)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return ended


def _one(
    pipe: Any, store: Path, rank: int, size: int, seconds: float, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size, timeout=timeout)
    began = time.monotonic()
    try:
        ended = Ended(value=work(Team(rank, size), *arguments), seconds=time.monotonic() - began)
    except Exception as error:
        plain = error if type(error).__module__.startswith(("spaces", "trainable")) else RuntimeError(repr(error))
        ended = Ended(error=plain, seconds=time.monotonic() - began)
    pipe.send_bytes(pickle.dumps(ended))  # by `send` tensors would stay with this process
    pipe.close()
    os._exit(0)  # a group whose process was killed cannot be taken down


def compute(team: Team, config: TrialConfig, folder: str, stop: int = 0, die: tuple[int, int] = (-1, -1)) -> Any:
    """A trial from its newest checkpoint on, which is saved after each step; up to `stop` steps, or to its end.
    `die`: (rank, step) that is killed in the midst of its updates.

    Returns comparable reports, the outcome, and the weights it ended with.
    """
    trial = Trial(config, team=team)
    state, _ = newest_checkpoint(Folder(folder))
    if state is not None:
        trial.load_state_dict(state)
    reports = []
    while not trial.done and not (stop and trial.so_far.next_step >= stop):
        if (team.rank, trial.so_far.next_step) == die:
            for parameter in trial.policy.trainable().values():
                parameter.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        reports.append(comparable(trial.step()))
        if team.rank == 0:
            save_checkpoint(Folder(folder), trial.so_far.next_step, trial.state_dict())
    outcome = None if stop else comparable_outcome(trial.outcome())
    trial.close()
    return reports, outcome, weights_of(trial)


def alone(config: TrialConfig, folder: Path, stop: int = 0) -> Any:
    """The same in this process."""
    return compute(ALONE, config, str(folder), stop)


def equal(one: Any, other: Any) -> bool:
    """Two results of `compute`, bit for bit."""
    return bool(one[:2] == other[:2] and same_weights(one[2], other[2]))

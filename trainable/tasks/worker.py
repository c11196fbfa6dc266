"""The process that a user's own code runs in, and the one that watches over it. Imports the standard library alone.

Two processes start from here. The first, the guard, runs no code of the user's: it waits for the end of the trial (the
end of a pipe that nobody else holds open, so however the trial ends) or of the second, and then ends whatever that one
has left behind. Orphans become its children (PR_SET_CHILD_SUBREAPER), also those that left their process group and
session, so none gets away. The second, the worker, answers one message at a time:

    4 bytes of length, a pickle       from the trial, which is trusted
    4 bytes of length, JSON           to the trial, which trusts nothing that comes from here

over pipes that the user's code has no name for. What it prints goes into another pipe. Global generators are seeded
from the message, so the same call gives the same numbers, also in a worker that was started again. A child that the
user's code forks and that comes back here ends here.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import pickle
import random
import select
import signal
import struct
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LOOK_SECONDS = 0.1
"""How often the guard looks whether the worker is there."""
LENGTH = struct.Struct("<I")


def main() -> None:
    asked, answers, life = (int(argument) for argument in sys.argv[1:])
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    worker = os.fork()
    if worker:
        os.close(asked)
        os.close(answers)
        sys.exit(_guard(worker, life))
    os.close(life)
    os.setpgid(0, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # with the guard
    for end in (asked, answers):
        os.set_inheritable(end, False)
    _serve(asked, answers)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(option, value)


def _guard(worker: int, life: int) -> int:
    """Until the trial or the worker ends. Returns the exit code to end with."""
    status = None
    while status is None and not select.select([life], [], [], _LOOK_SECONDS)[0]:
        pid, ended = os.waitpid(worker, os.WNOHANG)
        status = ended if pid else None
    _end_all(worker)
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _end_all(worker: int) -> None:
    """The worker's group, and all children; the children of those are then ours, until there are none."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)
    while True:
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = place.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(after_name[1]) == os.getpid():
            found.append(int(place.parent.name))
    return found


def _serve(asked: int, answers: int) -> None:
    """Until the trial closes its end."""
    own = os.getpid()
    sys.path.append(str(Path(__file__).parents[2]))  # last: nothing of the user's is hidden by what is ours
    from trainable.tasks.conventions import UserCode

    code = UserCode()
    requests = os.fdopen(asked, "rb")
    while len(head := requests.read(LENGTH.size)) == LENGTH.size:
        message = requests.read(LENGTH.unpack(head)[0])
        _seed(message)
        reply = _answer(code, pickle.loads(message))
        if os.getpid() != own:  # forked by the user's code
            os.kill(os.getpid(), signal.SIGKILL)
        body = json.dumps(reply).encode()
        _write(answers, LENGTH.pack(len(body)) + body)


def _answer(code: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What it found wrong is told to the trial, which decides; sys.exit in a reward is as wrong as any error."""
    from trainable.tasks.conventions import Mistake

    try:
        return {"value": getattr(code, request["call"])(**request["arguments"])}
    except Mistake as mistake:
        return {"mistake": str(mistake), "row": mistake.row}


def _seed(message: bytes) -> None:
    """Numpy and torch too, where the user's code has brought them in."""
    seed = int.from_bytes(hashlib.blake2b(message, digest_size=4).digest())
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def _write(end: int, content: bytes) -> None:
    while content:
        content = content[os.write(end, content) :]


if __name__ == "__main__":
    main()

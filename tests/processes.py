"""Programs that a test starts, and that end with it; and `rin` without a program.

A Python that imports torch, Ray and MLflow has worked for six seconds before it does anything: a test whose claim is
not about the process (its signals, its environment, its command line) calls `rin` here.

`with subprocess.Popen(..)` waits when it is left, also when an assertion failed: for a program that waits for something
itself, for ever.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from dashboards import cli


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


def rin(*arguments: str, cwd: Path | None = None) -> Said:
    """The command in this process, with this environment."""
    out, err, code = StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["rin", *arguments])
        patch.setenv("COLUMNS", "200")
        patch.setenv("MALLOC_TRIM_THRESHOLD_", "1")  # else `rin trial` starts its process again with it
        if cwd is not None:
            patch.chdir(cwd)
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Said(code=code, out=out.getvalue(), err=err.getvalue())


@contextmanager
def program(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A running program; killed where the body raises, with its whole session if it has one of its own. Options are
    those of Popen."""
    with subprocess.Popen(command, **options) as running:
        try:
            yield running
        except BaseException:  # Ctrl-C and the end of a test's time too
            with suppress(ProcessLookupError):  # it has ended already
                if options.get("start_new_session"):
                    os.killpg(running.pid, signal.SIGKILL)
                else:
                    running.kill()
            raise


def free_port() -> int:
    """Above the range that Ray gives to its workers (10002 to 19999)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return port if port > 20000 else free_port()

"""Programs that a test starts, and that end with it.

`with subprocess.Popen(..)` waits when it is left, also when an assertion failed: for a program that waits for something itself, for ever.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def program(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A running program; killed where the body raises, with its whole session if it has one of its own. Options are those of Popen."""
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

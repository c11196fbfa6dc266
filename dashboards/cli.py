"""`rin`: the command line. Thin: a command reads options, calls one function, and prints.

Its commands lie in `sweep_cli.py` (run), `look_cli.py` (look), `keep_cli.py` (keep house), `trial_cli.py` (without a
sweep), `trainer_cli.py` (other trainers) and `program_cli.py`. Heavy imports stay inside the commands, so that
`rin --help` answers at once.
Exit codes: 0 done (a collapse is a result), 2 the user's mistake (one line that names the key, the value and the
remedy), 1 a failure or an interruption.
"""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator

import typer

from dashboards import completion
from dashboards.keep_cli import keeping
from dashboards.lasting import lasting_output
from dashboards.look_cli import looks
from dashboards.program_cli import program
from dashboards.sweep_cli import sweeps
from dashboards.trainer_cli import trainers
from dashboards.trial_cli import trials
from spaces.errors import ConfigError, NoCandidate
from trainable.failure import TrialFailed

app = typer.Typer(
    name="rin",
    help="Sigma sweeps for 4-bit GRPO with noisy rollouts that can be believed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for commands in (sweeps, looks, keeping, trials, trainers, program):
    app.add_typer(commands)


def main() -> None:
    """Entry point."""
    # transformers imports torchao where it is installed; it warns about itself.
    for talkative in ("torchao", "torch.utils._pytree"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    with exit_codes(), lasting_output():
        _with_allocator_settings()
        command = completion.offering(typer.main.get_command(app)) if completion.asked() else app
        command(prog_name="rin")


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """A ConfigError becomes one line and exit code 2, no candidate, a failed trial and a full disk one line and exit
    code 1."""
    try:
        yield
    except (ConfigError, NoCandidate) as error:
        print(f"rin: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except TrialFailed as failure:
        print(f"rin: failed: {failure}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        full = _full_disk(error)
        if full is None:
            raise
        print(
            f"rin: no space left for {full.filename or 'a file of the sweep'}; free some, then go on by: rin resume",
            file=sys.stderr,
        )
        sys.exit(1)


def _full_disk(error: BaseException | None) -> OSError | None:
    """The full disk among the causes of an error: Tune wraps what goes wrong in it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


def _with_allocator_settings() -> None:
    """A trial or a probe runs in this process, and glibc reads its settings at start: start again with them."""
    if (
        sys.argv[1:2] not in (["trial"], ["probe"])
        or "MALLOC_TRIM_THRESHOLD_" in os.environ
        or not sys.platform.startswith("linux")
    ):
        return
    from spaces.workloads import TRIAL_ENVIRONMENT

    os.environ.update(TRIAL_ENVIRONMENT)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

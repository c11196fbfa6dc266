"""The commands of `rin` about other trainers: what they are given, what is wrong in their runs. Thin as `cli.py`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dashboards import options as given
from dashboards.options import Place
from spaces.errors import ConfigError

trainers = typer.Typer()


@trainers.command()
@given.takes(Place, without=["tracking_uri"])
def export(
    place: Place,
    to: Annotated[
        str,
        typer.Option(
            help="yaml, verl (the plan's fork), verl-upstream, trl, qerl, nemo-rl, or checkpoint: the model itself."
        ),
    ] = "yaml",
    arm: Annotated[str | None, typer.Option(help="Another arm than the candidate.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File (default: print); of a checkpoint the folder (NAME-checkpoint).")
    ] = None,
) -> None:
    """The candidate of a sweep: its configuration, or its model."""
    from search.arms import candidate_of, read_arms
    from search.export import EXPORTS

    if to not in (*EXPORTS, "checkpoint"):
        raise ConfigError(f"--to {to}: choose one of {', '.join(EXPORTS)}, checkpoint")
    study = place.sweep(confirmations=False)
    candidate = candidate_of(study, read_arms(study), arm)
    if to == "checkpoint":
        from dashboards.live import build_progress
        from dashboards.tables import terminal
        from search.checkpoint_export import export_checkpoint

        with build_progress(terminal()) as progress:
            export_checkpoint(candidate, output or Path(f"{study.name}-checkpoint"), progress=progress)
        return
    text = EXPORTS[to](candidate)
    if output is None:
        print(text, end="")
    else:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {output}: {error.strerror}; give a file in a folder that exists") from None


@trainers.command()
def audit(
    files: Annotated[
        list[str], typer.Argument(help="Launch scripts, configurations and logs of verl, QeRL, TRL or NeMo RL.")
    ],
    as_json: given.AsJson = False,
) -> None:
    """What is wrong in somebody else's noise run: each finding with file, line and remedy."""
    from dashboards.audit_text import audit_lines
    from search.audit.audit import audit as look

    found = look(files)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        for line in audit_lines(found, len(files)):
            print(line)

"""The commands of `rin` that keep house: notes, and sweeps that are thrown away. Thin, as `cli.py` is."""

import json
import sys
from typing import Annotated

import typer

from dashboards import options as given
from dashboards.options import DEFAULT_STORE, Place
from spaces.errors import ConfigError

keeping = typer.Typer()


@keeping.command()
def note(
    name: Annotated[str, typer.Argument(help="Name of a sweep (rin list).")],
    text: Annotated[str | None, typer.Argument(help="What is to be remembered. Without it: all notes.")] = None,
    store: given.Store = DEFAULT_STORE,
    tracking_uri: given.TrackingUri = None,
    as_json: given.AsJson = False,
) -> None:
    """Write something down about a sweep, also while it runs; list, status, report, page and MLflow show it."""
    from dashboards.listing import note_lines, note_rows
    from search.notes import read_notes, write_note

    study = Place(name=name, store=store, tracking_uri=tracking_uri).sweep()
    if text is not None:
        try:
            write_note(study, text)
        except OSError as error:
            raise ConfigError(f"NAME={name}: {study.folder.uri}: {error.strerror}; give a --store of yours") from None
        from dashboards.mlflow_note import leave_note

        leave_note(study)
    notes = read_notes(study)
    if as_json:
        print(json.dumps(note_rows(notes), indent=1))
    else:
        print("\n".join(note_lines(notes)) or f'no notes of {name}; write one: rin note {name} "..."')


@keeping.command()
def delete(
    name: Annotated[str, typer.Argument(help="Name of a sweep (rin list).")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Without asking.")] = False,
    store: given.Store = DEFAULT_STORE,
    tracking_uri: given.TrackingUri = None,
) -> None:
    """Move a sweep to the trash of its store, and mark its runs in MLflow deleted. rin restore brings it back."""
    from search.trash import TRASH, check_deletable
    from search.trash import delete as throw_away

    place = Place(name=name, store=store, tracking_uri=tracking_uri)
    study = place.sweep()
    check_deletable(study)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"NAME={name}: nobody can be asked here whether to delete it; add --yes")
        typer.confirm(f"Move {study.folder.uri} to {study.store}/{TRASH}, and delete its runs in MLflow?", abort=True)
    where = throw_away(study)
    print(f"{name} lies in {where}; back: rin restore {name}{place.again}; for good: rm -r {where}")


@keeping.command()
def restore(
    name: Annotated[str, typer.Argument(help="Name of a sweep that was deleted; the last one of that name.")],
    store: given.Store = DEFAULT_STORE,
    tracking_uri: given.TrackingUri = None,
) -> None:
    """Take a deleted sweep out of the trash, and its runs in MLflow, too."""
    from search.mlflow_client import absolute_uri
    from search.trash import restore as take_out

    study = take_out(store, name, None if tracking_uri is None else absolute_uri(tracking_uri))
    print(f"{name} lies in {study.folder.uri} again")

"""The commands of `rin` that look at sweeps. Thin, as `cli.py` is."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dashboards import options as given
from dashboards.options import DEFAULT_STORE, Place
from spaces.errors import ConfigError

if TYPE_CHECKING:
    from search.jobs import Job
    from search.store import StudyConfig


looks = typer.Typer()


@looks.command("list")
def list_sweeps(store: given.Store = DEFAULT_STORE, as_json: given.AsJson = False) -> None:
    """Sweeps in the store."""
    from dashboards.listing import sweep_line, sweep_row
    from search.store import absolute_store, check_store, sweeps

    folder = absolute_store(store)
    if store != DEFAULT_STORE:
        check_store(folder)
    rows = [sweep_row(folder, name) for name in sweeps(folder)]
    lines = [sweep_line(row) for row in rows] or [f"no sweeps in {store}; start one with: rin sweep"]
    print(json.dumps(rows, indent=1) if as_json else "\n".join(lines))


@looks.command()
@given.takes(Place)
def status(place: Place, as_json: given.AsJson = False) -> None:
    """Every configuration of a sweep; of one that was sent as a job, how that is, too."""
    from search.jobs import noted_job
    from search.store import absolute_store, check_name, sweeps

    store = absolute_store(place.store)
    job = noted_job(store, check_name(place.name)) if place.name else None
    if job is not None and place.name not in sweeps(store):
        _say_not_begun(f"NAME={place.name}: no sweep of that name in {store}", job, as_json)
        return
    study = place.sweep()
    from dashboards.listing import note_lines
    from dashboards.tables import arm_table, say, status_row, terminal
    from search.arms import failures, read_arms, unfinished
    from search.followup import second_part
    from search.notes import read_notes
    from search.report import arm_reports
    from search.store import is_driven

    arms = read_arms(study)
    rows = arm_reports(study, arms)
    if as_json:
        print(json.dumps([status_row(row) for row in rows], indent=1))
        return
    begun = sum(trial.status != "waiting" for row in rows for trial in row.trials)
    title = f"sweep {study.name}: {begun} of {study.runs} trials begun"
    if study.kind == "program":  # how many it comes to hangs on what they show
        title = f"programme {study.name}: {begun} trials begun"
    terminal().print(arm_table(rows, title))
    say(terminal(), note_lines(read_notes(study)))
    left = unfinished(study, arms)
    if is_driven(study):
        print("it is running")
    elif left:
        if (job := noted_job(store, study.name)) is not None:
            from search.submission import state_of

            state = state_of(job)
            print(state.words)
            if state.status == "runs":
                return
        for line in failures(study, arms):
            print(line)
        print(f"{left} trials are not finished and nobody is running them; go on: {study.go_on}{place.again}")
    elif line := second_part(study, arms):
        print(f"{line}{place.again}")


@looks.command()
@given.takes(Place, without=["tracking_uri"])
def watch(
    place: Place,
    once: Annotated[bool, typer.Option("--once", help="Print how it stands now, and leave.")] = False,
) -> None:
    """A sweep that another process runs, live: from another terminal, or from another machine with the store. Ctrl-C
    leaves the sweep alone."""
    study = place.sweep()
    from dashboards.tables import terminal
    from dashboards.watch import attend, print_once

    (print_once if once else attend)(study, terminal(), place.again)


def _say_not_begun(missing: str, job: "Job", as_json: bool) -> None:
    """Of a sweep whose folder is not there, or not to be seen from here. Raises ConfigError where its job says nothing
    either."""
    from search.submission import state_of

    state = state_of(job)
    said = f"{missing}; {state.words}"
    if state.status == "unknown":
        raise ConfigError(said)
    print(said, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print("[]")
    if state.status == "ended":
        raise typer.Exit(1)


@looks.command(cls=given.HtmlAlone)
@given.takes(Place)
def report(
    place: Place,
    other: Annotated[
        str | None, typer.Argument(help="Another sweep, to be set beside it: arms matched by what they did.")
    ] = None,
    as_json: given.AsJson = False,
    html: given.Html = None,
    figures: given.Figures = None,
    csv: given.Csv = None,
) -> None:
    """Every arm against its control: interval, verdict, collapses, dose, hours, and what it would take to know more."""
    asked = {"--html": html, "--figures": figures, "--csv": csv}
    files = [option for option, value in asked.items() if value is not None]
    if files and as_json:
        raise ConfigError(f"--json: has no use beside {files[0]}, which writes files; ask for them one at a time")
    if other is not None:
        if files:
            raise ConfigError(f"{files[0]}: is made of one sweep; leave {other} out (two: as a table, or by --json)")
        _report_two(place, other, as_json)
        return
    try:
        study = place.sweep()
    except ConfigError as error:
        if html is not None:
            from dashboards.page import say_unreadable

            say_unreadable(place, str(error), Path(html) if html else None)
        raise
    if files:
        _write_files(study, html, figures, csv)
        return
    if study.kind == "program":  # judged by its own rules and its own level
        from dashboards.program_cli import show

        show(named=None, name=study.name, store=place.store, as_yaml=False, as_json=as_json)
        return
    from dashboards.answer import answer_of
    from dashboards.listing import note_lines, note_rows
    from dashboards.report_text import as_tree, confirmation_lines, confirmation_tree, report_lines, report_table
    from dashboards.tables import say, terminal
    from search.confirm import confirmation_of, read_confirmation
    from search.notes import read_notes
    from search.report import report_study

    if study.kind == "confirm":
        state = read_confirmation(study)
        tree, lines = confirmation_tree(state), confirmation_lines(state, place.again)
    else:
        seen = report_study(study)
        answer = answer_of(seen, confirmation_of(study)).sentence
        tree, lines = {**as_tree(seen), "answer": answer}, [*report_lines(seen, place.again), f"{answer}."]
    notes = read_notes(study)
    if as_json:
        print(json.dumps({**tree, "notes": note_rows(notes)}, indent=1))
        return
    console = terminal()
    if study.kind != "confirm":
        console.print(report_table(seen))
    say(console, [*lines, *note_lines(notes)])


def _write_files(study: "StudyConfig", html: str | None, figures: Path | None, csv: Path | None) -> None:
    from dashboards.page import read_material, write_page

    if html is not None:
        print(f"page: {write_page(study, Path(html) if html else None)}")
    if figures is not None:
        from dashboards.figure_export import export_figures

        written = export_figures(read_material(study), figures)
        more = f"; {written.folded} that the page folds away are not among them" if written.folded else ""
        print(f"figures: {len(written.files)} files in {figures}{more}")
    if csv is not None:
        from dashboards.frames import frames_of, write_csv

        tables = write_csv(frames_of(read_material(study)), csv)
        print(f"csv: {len(tables)} files in {csv}; columns.csv says what is what")


def _report_two(place: Place, other: str, as_json: bool) -> None:
    here, there = place.sweep(), replace(place, name=other).sweep()
    from dashboards.side_by_side_text import as_tree, side_by_side_lines, side_by_side_table
    from dashboards.tables import say, terminal
    from search.side_by_side import sides_of

    seen = sides_of(here, there)
    if as_json:
        print(json.dumps(as_tree(seen), indent=1))
        return
    console, (above, below) = terminal(), side_by_side_lines(seen)
    say(console, above)
    console.print(side_by_side_table(seen))
    say(console, below)


@looks.command()
@given.takes(Place)
def ui(place: Place, port: Annotated[int, typer.Option(min=1, max=65535, help="On localhost.")] = 5000) -> None:
    """MLflow's UI on the sweep's saved views (on localhost; Ctrl-C ends it)."""
    study = place.sweep()
    from dashboards.mlflow_note import leave_note
    from dashboards.mlflow_views import serve_ui
    from search.mirror import send_missing
    from search.store import is_driven, only_driver

    if not is_driven(study):
        with only_driver(study):
            untold = send_missing(study)
        if untold:
            print(f"MLflow did not take {untold} records of the sweep", file=sys.stderr)
    leave_note(study)
    serve_ui(study, port, on_ready=lambda url: print(f"MLflow: {url}", flush=True))

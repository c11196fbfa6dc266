"""`rin program`: a plan as a registered programme. Thin, as `cli.py` is."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dashboards import options as given
from dashboards.options import DEFAULT_STORE, Place, SweepOptions, study_config
from spaces.errors import ConfigError

if TYPE_CHECKING:
    from search.store import StudyConfig
    from search.study import StudyResult
    from spaces.programme import Programme

program = typer.Typer(
    name="program",
    help="A plan as a registered programme: phases gated by what came before, decided by rules that are data.",
    no_args_is_help=True,
)

Named = Annotated[
    str | None,
    typer.Argument(metavar="[PROGRAM]", help="plan, or a YAML file. Default: what is registered, or plan."),
]
Name = Annotated[str | None, typer.Option(help="Of the study. Default: the programme's name.")]


@program.command()
def run(
    named: Named = None,
    workload: Annotated[str | None, typer.Option(help="What is trained; default embedded.")] = None,
    concurrent: given.Concurrent = None,
    seed: Annotated[int | None, typer.Option(min=0, help="First replicate's seed; default 0.")] = None,
    overrides: given.Overrides = None,
    modes: Annotated[
        str | None,
        typer.Option(help="w4a16,w4a8,w4a4: the programme in each quantisation mode, and the sigma lookup table."),
    ] = None,
    budget: given.Budget = None,
    cpus: given.Cpus = None,
    gpus: given.Gpus = None,
    name: Name = None,
    store: given.Store = DEFAULT_STORE,
    tracking_uri: given.TrackingUri = None,
    address: given.Address = None,
) -> None:
    """Register a programme and run it phase by phase; run again, it goes on where it was."""
    chosen = _modes(modes)
    programme = _programme(named)
    study = _begun(name or (programme.name if programme is not None else "plan"), store, tracking_uri)
    begun = study is not None
    if study is None:
        from spaces.programme import load_programme

        programme = programme or load_programme("plan")
        options = SweepOptions(
            workload=workload,
            concurrent=concurrent,
            seed=seed,
            overrides=overrides,
            budget=budget,
            cpus=cpus,
            gpus=gpus,
            name=name or programme.name,
            store=store,
            tracking_uri=tracking_uri,
            address=address,
        )
        study = study_config(options).model_copy(update={"kind": "program"})
    else:
        _refuse_other(study, workload, seed, overrides)
        changes = {"budget_hours": budget, "concurrent": concurrent, "cpus": cpus, "gpus": gpus}
        update = {key: value for key, value in changes.items() if value is not None}
        study = study.model_copy(update={**update, "address": given.ray_address(address, study.address)})
        from search.store import processes_of, refuse_second_driver

        processes_of(study)  # or it is told here
        refuse_second_driver(study)
    from dashboards.live import build_progress, interruption_told, sweep_view
    from dashboards.page import leave_behind
    from dashboards.program_view import state_lines
    from dashboards.tables import say, terminal
    from search.program_study import begin_program, go_on, read_state

    console = terminal()
    say(console, [f"programme {study.name}, {'goes on' if begun else f'on {study.workload}'}"])
    with interruption_told(), build_progress(console) as progress, sweep_view(console) as view:
        if begun:
            result = go_on(study, programme, chosen, view, progress)
        else:
            assert programme is not None
            result = begin_program(study, programme, chosen or (), view, progress)
    state = read_state(result.config)
    say(console, list(state_lines(state)))
    leave_behind(result.config)
    if not state.ended:
        again = Place(name=study.name, store=store, tracking_uri=tracking_uri).again
        _say_what_is_left(result, f"{result.config.go_on}{again}")


def _say_what_is_left(result: "StudyResult", again: str) -> None:
    """Of a programme that has not ended: why, and the command that goes on. Exit code 1, but for a spent budget."""
    from search.arms import failures

    if result.budget_spent:
        hours = f"{result.config.budget_hours:g}"
        print(f"the budget of {hours} hours is spent; with a larger one: {again} --budget HOURS")
        return
    for line in failures(result.config, result.arms):
        print(line, file=sys.stderr)
    print(f"it has not ended, and what ran is kept. Go on: {again}", file=sys.stderr)
    raise typer.Exit(1)


@program.command()
def show(
    named: Named = None,
    name: Name = None,
    store: given.Store = DEFAULT_STORE,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="The programme itself, as data: a template of one's own.")
    ] = False,
    as_json: given.AsJson = False,
) -> None:
    """How far it is: the path with its reasons, and the next step; of one that has not begun, its phases and rules."""
    from dashboards.program_view import programme_lines, state_lines, state_tree
    from dashboards.tables import say, terminal
    from spaces.programme import digest, load_programme, programme_yaml, programmes, shipped_text

    if as_yaml and name is None:
        chosen = named or "plan"
        print(shipped_text(chosen) if chosen in programmes() else programme_yaml(load_programme(chosen)), end="")
        return
    programme = _programme(named)
    study = _begun(name or (programme.name if programme is not None else "plan"), store, None)
    if study is None:
        if name is not None:
            raise ConfigError(f"--name {name}: no programme of that name in {store}; rin list shows what there is")
        say(terminal(), list(programme_lines(programme or load_programme("plan"))))
        return
    from search.program_study import read_state

    state = read_state(study)
    if as_yaml:
        print(programme_yaml(state.registration.programme), end="")
    elif as_json:
        print(json.dumps(state_tree(state), indent=1))
    else:
        lines = list(state_lines(state))
        if programme is not None and digest(programme) != digest(state.registration.programme):
            lines.append(f"PROGRAM={named} is not what is registered: rin program run {named} would register it anew")
        say(terminal(), lines)


@program.command("what-if")
def what_if(
    named: Named = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            help="EXPERIMENT=POINTS over its control, or =undecided, or =collapses; repeatable. Others gain 0."
        ),
    ] = None,
) -> None:
    """Where it would go with assumed outcomes; without any, the whole tree. Trains nothing."""
    from dashboards.program_view import branch_line
    from dashboards.tables import say, terminal
    from search.program import path_lines
    from search.what_if import read_assumptions, tree
    from search.what_if import what_if as assumed_walk
    from spaces.programme import load_programme

    programme = load_programme(named or "plan")
    assumed = read_assumptions(programme, assume or [])
    console = terminal()
    if assumed:
        say(console, path_lines(assumed_walk(programme, assumed)))
        return
    for branch in tree(programme):
        say(console, [branch_line(branch)])


def _programme(named: str | None) -> "Programme | None":
    from spaces.programme import load_programme

    return None if named is None else load_programme(named)


def _begun(name: str, store: str, tracking_uri: str | None) -> "StudyConfig | None":
    """The study of that name; None where there is none. Raises ConfigError for one that is no programme."""
    from search.mlflow_client import absolute_uri
    from search.store import STUDY_FILE, absolute_store, check_name, load_study_config
    from trainable.disk.folder import Folder

    place = absolute_store(store)
    if STUDY_FILE not in (Folder(place) / check_name(name)).names():
        return None
    study = load_study_config(place, name)
    if study.kind != "program":
        raise ConfigError(f"--name {name}: is a {study.kind} in {store} and no programme; choose another --name")
    return study if tracking_uri is None else study.model_copy(update={"tracking_uri": absolute_uri(tracking_uri)})


def _refuse_other(study: "StudyConfig", workload: str | None, seed: int | None, overrides: list[str] | None) -> None:
    """Options that would make other trials of a programme that has begun. Raises ConfigError."""
    from pathlib import Path

    from spaces.paths import anchored
    from spaces.reading import parse_overrides

    settings = None if overrides is None else anchored(parse_overrides(overrides), Path.cwd())
    for option, value, before in (
        ("--workload", workload, study.workload),
        ("--seed", seed, study.seed),
        ("--set", settings, study.settings),
    ):
        if value is not None and value != before:
            raise ConfigError(
                f"{option} {value}: {study.name} began with {before}; leave it out, or give another --name"
            )


def _modes(text: str | None) -> tuple[str, ...] | None:
    """Raises ConfigError."""
    if text is None:
        return None
    from spaces.config import MODES

    modes = tuple(part.strip().upper() for part in text.split(",") if part.strip())
    known = [mode for mode in MODES if mode != "W16A16"]
    for mode in modes:
        if mode not in known or modes.count(mode) > 1:
            why = "is named twice" if mode in known else "unknown"
            raise ConfigError(f"--modes {text}: {mode.lower()} {why}; choose from {','.join(known).lower()}, each once")
    return modes


@program.command()
def report(
    named: Annotated[str, typer.Argument(metavar="[NAME]", help="Of the study.")] = "plan",
    store: given.Store = DEFAULT_STORE,
    tracking_uri: given.TrackingUri = None,
    as_json: given.AsJson = False,
) -> None:
    """The programme's documents: a log of each experiment and a summary, in STORE/NAME/documents and in MLflow."""
    study = _begun(named, store, tracking_uri)
    if study is None:
        raise ConfigError(f"NAME={named}: no programme of that name in {store}; rin list shows what there is")
    from dashboards.program_documents import FOLDER, read_report, write_documents
    from dashboards.program_text import SUMMARY
    from search.program_report import as_tree
    from search.program_study import read_state

    state = read_state(study)
    last = state.registration
    seen = read_report(study, last.programme, last.words(), state.walks, state.arms)
    if as_json:
        print(json.dumps(as_tree(seen), indent=1))
        return
    files = write_documents(seen)
    print(files[SUMMARY])
    print(f"{len(files)} documents in {(study.folder / FOLDER).uri}")

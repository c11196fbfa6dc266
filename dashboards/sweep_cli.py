"""The commands of `rin` that run a sweep, or say what one would run. Thin, as `cli.py` is."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from dashboards import options as given
from dashboards.options import Place, SweepOptions, study_config
from spaces.devices import device_named
from spaces.errors import ConfigError

if TYPE_CHECKING:
    from search.plan import StudyPlan
    from search.store import StudyConfig
    from search.study import StudyResult
    from search.submission import JobServer, Submission


sweeps = typer.Typer()


@sweeps.command()
@given.takes(SweepOptions)
def sweep(
    options: SweepOptions,
    ablate: Annotated[
        str | None, typer.Option(help="Take the winner of that sweep apart: one change at a time back to the control.")
    ] = None,
    submit: Annotated[
        str | None, typer.Option(help="Run it as a job of the Ray cluster with this dashboard, http://HEAD:8265.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(hidden=True, help="Refused.", callback=given.refuse_scheduler)
    ] = None,
) -> None:
    """Run a sweep: the control first, then points, then what the searcher proposes."""
    if ablate is not None:
        given.refuse_with_ablate(options)
    study = study_config(options)
    from search.ablation import ablation
    from search.evidence import evidence_of
    from search.lineup import fixed_arms, overridden
    from search.store import refuse_taken_name

    refuse_taken_name(study)
    tracked = options if study.derived is None else replace(options, tracking_uri=study.tracking_uri)
    server = None if submit is None else given.destination(submit, tracked)
    for line in study.history:
        print(line)
    if ablate is None:
        arms = fixed_arms(study)  # a mistake in the settings is told before anything is announced
        for line in overridden(study):
            print(line)
    else:
        winner_of = Place(name=ablate, store=options.store, tracking_uri=options.tracking_uri)
        parts = ablation(winner_of.sweep(), study, named=options.name is not None)
        study, arms = parts.config, list(parts.arms)
        for line in parts.skipped:
            print(line)
    if server is not None:
        from search.submission import submit_sweep

        _follow(server, submit_sweep(server, study, arms))
        return
    for known in evidence_of(study):
        print(f"the searcher is told: {known.source}")
    from search.study import run_study

    place = Place(name=study.name, store=options.store, tracking_uri=options.tracking_uri)
    forecast = _forecast(study) if study.address is None and ablate is None else []
    _run(study, place, lambda view, progress: run_study(study, view, progress, arms), forecast=forecast)


@sweeps.command()
@given.takes(Place)
def resume(
    place: Place,
    budget: given.Budget = None,
    concurrent: given.Concurrent = None,
    cpus: given.Cpus = None,
    gpus: given.Gpus = None,
    address: given.Address = None,
    submit: Annotated[str | None, typer.Option(help="Go on as a job of the Ray cluster with this dashboard.")] = None,
) -> None:
    """Go on with a sweep that was interrupted: what has an outcome stays, what is missing runs."""
    if place.name is None:
        raise ConfigError(
            "NAME: say which sweep goes on: the newest is enough to look at, but a wrong one would train for hours; "
            "rin list shows them"
        )
    if submit is not None:
        from search.submission import submit_resume

        options = SweepOptions(store=place.store, tracking_uri=place.tracking_uri, address=address)
        server = given.destination(submit, options, begun=True)
        changes = {"--budget": budget, "--concurrent": concurrent, "--cpus": cpus, "--gpus": gpus}
        _follow(
            server, submit_resume(server, place.name, place.store, tracking_uri=place.tracking_uri, changes=changes)
        )
        return
    study = place.sweep()
    if study.kind in ("confirm", "program"):
        what = "confirmation" if study.kind == "confirm" else "programme"
        raise ConfigError(f"NAME={place.name}: is a {what}; go on with it by: {study.go_on}")
    from search.store import refuse_second_driver

    refuse_second_driver(study)
    study = _changed(study, address, budget_hours=budget, concurrent=concurrent, cpus=cpus, gpus=gpus)
    from search.arms import read_arms, unfinished
    from search.study import resume_study

    to_go = unfinished(study, read_arms(study))
    _run(study, place, lambda view, progress: resume_study(study, view, progress), to_go)


@sweeps.command()
@given.takes(Place)
def extend(
    place: Place,
    trials: Annotated[int | None, typer.Option(min=1, help="So many more configurations.")] = None,
    replicates: Annotated[
        int | None, typer.Option(min=1, help="So many more runs of every configuration, old and new.")
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="So many more trials, of a sweep that has --runs.")] = None,
    budget: given.Budget = None,
    concurrent: given.Concurrent = None,
    cpus: given.Cpus = None,
    gpus: given.Gpus = None,
    address: given.Address = None,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Write it down alone; rin resume NAME, also with --submit, runs it.")
    ] = False,
) -> None:
    """More of a sweep that has run or was interrupted: what has an outcome stays, and the extension is written down."""
    if place.name is None:
        raise ConfigError("NAME: say which sweep gets more: a wrong one would train for hours; rin list shows them")
    study = place.sweep()
    from search.arms import read_arms, unfinished
    from search.extension import extended, refuse_what_is_not_there, refuse_while_it_runs, write_extension

    refuse_while_it_runs(study)
    arms = read_arms(study)
    larger = _changed(
        extended(study, arms, trials=trials, replicates=replicates, runs=runs),
        address,
        budget_hours=budget,
        concurrent=concurrent,
        cpus=cpus,
        gpus=gpus,
    )
    refuse_what_is_not_there(study, larger, arms)
    print(f"extended: {larger.extensions[-1].words}")
    if no_run:
        write_extension(larger)
        print(f"{unfinished(larger, arms)} trials to go: {larger.go_on}{place.again}")
        return
    from search.study import resume_study

    _run(larger, place, lambda view, progress: resume_study(larger, view, progress), unfinished(larger, arms))


def _changed(study: "StudyConfig", address: str | None, **now: float | None) -> "StudyConfig":
    """With what is given when it goes on."""
    from search.store import processes_of

    changed = {key: value for key, value in now.items() if value is not None}
    study = study.model_copy(update={**changed, "address": given.ray_address(address, study.address)})
    processes_of(study)  # or it is told here
    return study


def _follow(server: "JobServer", job: "Submission") -> None:
    """Until the job has said that the sweep begins, or that it does not."""
    from search.submission import has_begun

    print(f"submitted as {job.id}: {job.command}")
    for line in job.follow:
        print(f"  {line}", flush=True)
    print(
        "it has begun"
        if has_begun(server, job)
        else "it has not said anything yet: the cluster is busy, or its nodes are still coming"
    )


def _forecast(study: "StudyConfig") -> list[str]:
    """Of a sweep on this machine."""
    from dashboards.report_text import forecast_line
    from search.plan import plan_study
    from search.store import gpus_of
    from trainable.cores import usable_cpus, visible_gpus

    gpus = visible_gpus() if gpus_of(study) else 0
    planned = plan_study(study, usable_cpus(), gpus)
    return [forecast_line(planned), *_too_large(planned, gpus)]


def _too_large(planned: "StudyPlan", gpus: int) -> list[str]:
    """A line that says why a trial does not fit this machine's GPU, and with which settings it would; none without
    one, and where it fits."""
    if not gpus:
        return []
    from search.fit import device_here, does_not_fit

    here = device_here()
    told = None if here is None else does_not_fit(planned.config, here)
    return [] if told is None else [f"warning: {told}"]


def _run(
    study: "StudyConfig",
    place: Place,
    run: "Callable[..., StudyResult]",
    to_go: int | None = None,
    forecast: Sequence[str] = (),
) -> None:
    """Run a sweep with its live view, then the confirmation of its candidate where one is to follow, and print what
    they came to; in the end the answer in one sentence. `to_go`: trials without an outcome, of a sweep that goes
    on."""
    from dashboards.answer import answer_of
    from dashboards.live import build_progress, interruption_told, sweep_view
    from dashboards.page import leave_behind
    from dashboards.sweep_text import announced, collapse_lines, ending_of
    from dashboards.tables import arm_table, say, terminal
    from search.confirm import confirmation_of
    from search.report import report_study

    console, runs = terminal(), study.runs
    left = f", {to_go} to go" if to_go is not None else ""
    say(console, [f"sweep {study.name}: {runs} trials{left}", *announced(study, begins=to_go is None), *forecast])
    with interruption_told(), build_progress(console) as progress, sweep_view(console) as view:
        result = run(view, progress)
    report = report_study(result.config)
    console.print(arm_table(report.arms, f"sweep {study.name}, in {result.config.folder.uri}"))
    say(console, collapse_lines(report))
    ending = ending_of(result, runs, place.again, replace(place, tracking_uri=None).again)
    say(console, ending.lines)
    unconfirmed = "" if ending.code else _confirm_candidate(result, place)
    say(console, ending.commands)
    leave_behind(result.config)
    for line in (*ending.troubles, *filter(None, [unconfirmed])):
        print(line, file=sys.stderr)
    say(console, [f"{answer_of(report, confirmation_of(result.config)).sentence}."])
    if ending.code or unconfirmed:
        raise typer.Exit(1)


def _confirm_candidate(result: "StudyResult", place: Place) -> str:
    """The second part of a sweep, where one was asked for; why it is not finished, else empty."""
    from dashboards.live import build_progress, sweep_view
    from dashboards.page import leave_behind, left_behind
    from dashboards.report_text import confirmation_lines
    from dashboards.sweep_text import confirmation_begins
    from dashboards.tables import say, terminal
    from search.confirm import confirm as run_confirmation
    from search.followup import follow_up

    config, console, again = result.config, terminal(), f"rin resume {result.config.name}{place.again}"
    follow = follow_up(config, result.arms)
    if follow is None:
        return ""
    if follow.candidate is None:
        say(console, [f"no confirmation: {follow.why_not}"])
        return ""
    if result.interrupted:
        return "" if follow.taken else f"interrupted: its candidate is not confirmed yet. Go on: {again}"
    left_behind(config)  # what follows takes its time
    if not follow.taken:
        say(console, confirmation_begins(config, follow.candidate))
    try:
        with build_progress(console) as progress, sweep_view(console) as view:
            state = run_confirmation(
                config,
                view,
                progress,
                arm=follow.arm,
                until=config.confirm_pairs,
                stepwise=follow.stepwise,
                budget_hours=follow.budget_hours,
                address=config.address,
            )
    except KeyboardInterrupt:  # before there was a trial
        return f"interrupted: its candidate is not confirmed yet. Go on: {again}"
    say(console, confirmation_lines(state, place.again))
    leave_behind(state.config)
    if not state.taken(config.confirm_pairs) and (state.interrupted or not state.budget_spent):
        return f"its confirmation is not finished. Go on: {again}"
    return ""


@sweeps.command()
@given.takes(SweepOptions, without=given.NO_USE_IN_A_PLAN)
def plan(
    options: SweepOptions,
    device: Annotated[
        str | None,
        typer.Option(help="What a trial would hold and take on it, estimated: h200, h100, a100 or 4090."),
    ] = None,
) -> None:
    """What a sweep would run, in which order, how long, and what its answer could show. Trains nothing."""
    wanted = None if device is None else device_named(device)
    study = study_config(replace(options, name="plan", tracking_uri="sqlite:///:memory:"))
    from dashboards.report_text import costs_line, plan_lines
    from search.plan import plan_study
    from search.store import gpus_of
    from trainable.cores import usable_cpus, visible_gpus

    gpus = visible_gpus() if gpus_of(study) else 0
    planned = plan_study(study, usable_cpus(), gpus)
    for line in (*study.history, *plan_lines(planned)):
        print(line)
    if wanted is None:
        told = _too_large(planned, gpus)
    else:
        from dashboards.estimate_text import estimate_lines

        told = [*estimate_lines(planned.config, wanted), costs_line(planned)]
    for line in told:
        print(line)


@sweeps.command()
@given.takes(Place)
def confirm(
    place: Place,
    arm: Annotated[str | None, typer.Option(help="Another arm than the candidate.")] = None,
    looks: Annotated[
        str | None, typer.Option(help="Replicates after which to compare, e.g. 5,8,12,16,20 (the default).")
    ] = None,
    budget: given.Budget = None,
    address: given.Address = None,
    as_json: given.AsJson = False,
) -> None:
    """The winner and the control again: fresh seeds, questions never used for choosing. Says better, worse, same or
    undecided."""
    planned = given.planned_looks(looks)
    study = place.sweep(confirmations=False)
    if arm is not None:
        from search.arms import candidate_of, read_arms

        candidate_of(study, read_arms(study), arm)
    from dashboards.live import build_progress, interruption_told, sweep_view
    from dashboards.page import leave_behind
    from dashboards.report_text import confirmation_lines, confirmation_tree
    from dashboards.tables import say, terminal
    from search.confirm import confirm as run_confirmation

    console = terminal(stderr=as_json)
    with interruption_told(), build_progress(console) as progress, sweep_view(console) as view:
        cluster = given.ray_address(address, study.address)
        state = run_confirmation(study, view, progress, looks=planned, arm=arm, budget_hours=budget, address=cluster)
    if as_json:
        print(json.dumps(confirmation_tree(state), indent=1))
    else:
        say(console, confirmation_lines(state, place.again))
    for one in (state.config, study):  # whose page tells the confirmation
        leave_behind(one, quiet=as_json)
    if (state.unfinished and not state.budget_spent) or (state.interrupted and not state.settled):
        raise typer.Exit(1)

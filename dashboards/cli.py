"""`rin`: the command line. Thin: it reads options, calls one function, and prints.

Heavy imports stay inside the commands, so that `rin --help` answers at once. Exit codes: 0 done (a collapse is a
result), 2 the user's mistake (one line that names the key, the value and the remedy), 1 a failure or an interruption.
"""

import contextlib
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dashboards import options as given
from dashboards.lasting import lasting_output
from dashboards.options import DEFAULT_STORE, Place, SweepOptions, study_config, trial_config
from dashboards.program_cli import program
from spaces.errors import ConfigError, NoCandidate
from trainable.failure import TrialFailed

if TYPE_CHECKING:
    from search.jobs import Job
    from search.store import StudyConfig
    from search.study import StudyResult
    from search.submission import JobServer, Submission

app = typer.Typer(
    name="rin",
    help="Sigma sweeps for 4-bit GRPO with noisy rollouts that can be believed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(program)


@app.command()
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
    server = None if submit is None else given.destination(submit, options)
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
    _run(study, place, lambda view, progress: run_study(study, view, progress, arms))


@app.command()
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
    from search.arms import read_arms, unfinished
    from search.study import resume_study

    given_now = {"budget_hours": budget, "concurrent": concurrent, "cpus": cpus, "gpus": gpus}
    changed = {key: value for key, value in given_now.items() if value is not None}
    study = study.model_copy(update={**changed, "address": given.ray_address(address, study.address)})
    to_go = unfinished(study, read_arms(study))
    _run(study, place, lambda view, progress: resume_study(study, view, progress), to_go)


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


def _run(study: "StudyConfig", place: Place, run: "Callable[..., StudyResult]", to_go: int | None = None) -> None:
    """Run a sweep with its live view, and print what it came to. `to_go`: trials without an outcome, of a sweep that
    goes on."""
    from dashboards.live import build_progress, interruption_told, sweep_view
    from dashboards.page import leave_behind
    from dashboards.sweep_text import ending_of
    from dashboards.tables import arm_table, say, terminal
    from search.report import arm_reports

    console, runs = terminal(), study.runs
    left = f", {to_go} to go" if to_go is not None else ""
    say(console, [f"sweep {study.name}: {runs} trials{left}"])
    to_come = runs if to_go is None else to_go
    with interruption_told(), build_progress(console) as progress, sweep_view(console, to_come) as view:
        result = run(view, progress)
    title = f"sweep {study.name}, in {result.config.folder.uri}"
    console.print(arm_table(arm_reports(result.config, result.arms), title))
    ending = ending_of(result, runs, place.again, replace(place, tracking_uri=None).again)
    say(console, ending.lines)
    leave_behind(result.config)
    for line in ending.troubles:
        print(line, file=sys.stderr)
    if ending.code:
        raise typer.Exit(ending.code)


@app.command()
def trial(
    point: Annotated[str | None, typer.Argument(help="A point of the plan, e.g. control, bf16, e13m-rmsnorm.")] = None,
    config: Annotated[Path | None, typer.Option(help="A trial's YAML file (rin export), in place of a point.")] = None,
    workload: Annotated[str | None, typer.Option(help="What is trained; default embedded. Not with --config.")] = None,
    overrides: given.Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per step; the last one is the outcome.")
    ] = False,
) -> None:
    """Run one trial in this process, without Ray."""
    settings = trial_config(point, config, workload, overrides or [])
    from dashboards.live import build_progress
    from dashboards.tables import say, terminal
    from dashboards.trial_text import outcome_lines, step_line
    from trainable.trial import Trial

    console = terminal(stderr=as_json)
    with build_progress(console) as progress:
        running = Trial(settings, progress)
    with contextlib.closing(running):
        while not running.done:
            report = running.step()
            if as_json:
                print(json.dumps(report.as_tree()), flush=True)
            else:
                say(console, [step_line(report)])
        outcome = running.outcome()
    if as_json:
        print(json.dumps(outcome.as_tree()))
    else:
        say(console, outcome_lines(outcome, settings.quant.mode))


@app.command()
@given.takes(SweepOptions, without=given.NO_USE_IN_A_PLAN)
def plan(options: SweepOptions) -> None:
    """What a sweep would run, in which order, how long, and what its answer could show. Trains nothing."""
    study = study_config(replace(options, name="plan", tracking_uri="sqlite:///:memory:"))
    import torch

    from dashboards.report_text import plan_lines
    from search.cores import usable_cpus
    from search.plan import plan_study

    for line in plan_lines(plan_study(study, usable_cpus(), torch.cuda.device_count())):
        print(line)


@app.command("list")
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


@app.command()
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
    from dashboards.tables import arm_table, status_row, terminal
    from search.arms import failures, read_arms, unfinished
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


@app.command(cls=given.HtmlAlone)
@given.takes(Place)
def report(place: Place, as_json: given.AsJson = False, html: given.Html = None, figures: given.Figures = None) -> None:
    """Every arm against its control: interval, verdict, collapses, dose, hours, and what it would take to know more."""
    try:
        study = place.sweep()
    except ConfigError as error:
        if html is not None:
            from dashboards.page import say_unreadable

            say_unreadable(place, str(error), Path(html) if html else None)
        raise
    if html is not None or figures is not None:
        if html is not None:
            from dashboards.page import write_page

            print(f"page: {write_page(study, Path(html) if html else None)}")
        if figures is not None:
            from dashboards.figure_export import export_figures
            from dashboards.page import read_material

            written = export_figures(read_material(study), figures)
            more = f"; {written.folded} that the page folds away are not among them" if written.folded else ""
            print(f"figures: {len(written.files)} files in {figures}{more}")
        return
    if study.kind == "program":  # judged by its own rules and its own level
        from dashboards.program_cli import show

        show(named=None, name=study.name, store=place.store, as_yaml=False, as_json=as_json)
        return
    from dashboards.report_text import as_tree, confirmation_lines, confirmation_tree, report_lines, report_table
    from dashboards.tables import say, terminal
    from search.confirm import read_confirmation
    from search.report import report_study

    if study.kind == "confirm":
        state = read_confirmation(study)
        tree, lines = confirmation_tree(state), confirmation_lines(state, place.again)
    else:
        seen = report_study(study)
        tree, lines = as_tree(seen), report_lines(seen, place.again)
    if as_json:
        print(json.dumps(tree, indent=1))
        return
    console = terminal()
    if study.kind != "confirm":
        console.print(report_table(seen))
    say(console, lines)


@app.command()
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
    from search.sequential import CONFIRM

    console = terminal(stderr=as_json)
    to_come = 2 * (planned or CONFIRM.looks)[-1]
    with interruption_told(), build_progress(console) as progress, sweep_view(console, to_come) as view:
        cluster = given.ray_address(address, study.address)
        state = run_confirmation(study, view, progress, looks=planned, arm=arm, budget_hours=budget, address=cluster)
    if as_json:
        print(json.dumps(confirmation_tree(state), indent=1))
    else:
        say(console, confirmation_lines(state, place.again))
    leave_behind(state.config, quiet=as_json)
    if state.unfinished and not state.budget_spent:
        raise typer.Exit(1)


@app.command()
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


@app.command()
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


@app.command()
@given.takes(Place)
def ui(place: Place, port: Annotated[int, typer.Option(min=1, max=65535, help="On localhost.")] = 5000) -> None:
    """MLflow's UI on the sweep's saved view (on localhost; Ctrl-C ends it)."""
    study = place.sweep()
    from dashboards.mlflow_views import serve_ui
    from search.mirror import send_missing
    from search.store import is_driven, only_driver

    if not is_driven(study):
        with only_driver(study):
            untold = send_missing(study)
        if untold:
            print(f"MLflow did not take {untold} records of the sweep", file=sys.stderr)
    serve_ui(study.tracking_uri, study.name, port, on_ready=lambda url: print(f"MLflow: {url}", flush=True))


@app.command()
def probe(
    model: Annotated[
        str,
        typer.Argument(help="A workload (embedded, tiny, smollm2-135m, ...), or a folder with a transformers model."),
    ],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or both.")] = "float32,bfloat16",
    tokens: Annotated[
        int | None, typer.Option(help="Longest completion, up to 1024. Default: 16; embedded: its answers.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(help="Questions, 2 completions each, up to 64. Default: 8; embedded: 64.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the questions and of the sampling.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Also draw it, as this PNG file.")] = None,
    as_json: given.AsJson = False,
) -> None:
    """How far two exact forward passes of one model drift apart in each precision: the floor under every log-prob
    comparison."""
    from dashboards.probe_plan import check_plot, plan_probe

    plan = plan_probe(model, dtypes=dtype, tokens=tokens, prompts=prompts, seed=seed)
    if plot is not None:
        check_plot(plot)
    from dashboards.live import build_progress
    from dashboards.probe import Row, as_tree, conclusion, draw, header, line, measure
    from dashboards.tables import terminal
    from trainable.policy.embedded import ensure_base

    if plan.config.model.recipe is not None:
        with build_progress(terminal(stderr=as_json)) as progress:
            ensure_base(plan.config.model.recipe, progress)
    started = time.perf_counter()
    rows: list[Row] = []
    for setting in measure(plan):
        for text in [] if as_json else [*(header(plan) if not rows else []), line(setting)]:
            print(text, flush=True)
        rows += setting
    seconds = time.perf_counter() - started
    if as_json:
        print(json.dumps(as_tree(plan, rows, seconds), indent=1))
    else:
        print("\n" + "\n".join(conclusion(rows)))
        print(f"{len(rows)} floors in {seconds:.0f} s")
    if plot is not None:
        draw(rows, plot)


@app.command()
def srdd(
    model: Annotated[
        str,
        typer.Argument(help="A workload (embedded, tiny, smollm2-135m, ...), or a folder with a transformers model."),
    ] = "embedded",
    settings: given.Overrides = None,
    prompts: Annotated[
        int | None, typer.Option(help="Rows to scan, up to 256. Default: 8 prompts of the task; embedded: 32.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Scan it on this text, in rows of 64 tokens.")] = None,
    completions: Annotated[
        bool, typer.Option("--completions", help="Scan it on prompts with what the policy samples for them.")
    ] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Errors alone: no KL, no gradients, nothing that it would buy.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the questions, the sampling and the intervals.")] = 0,
    against: Annotated[
        str | None, typer.Option(help="A later checkpoint's folder: did the layers with high error improve?")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it, as this PNG or SVG file.")] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Also log it in this sweep's experiment in MLflow; lies in --store.")
    ] = None,
    store: given.Store = DEFAULT_STORE,
    tracking_uri: given.TrackingUri = None,
    as_json: given.AsJson = False,
) -> None:
    """What rounding does to each layer of a model, to its predictions and to its learning (SRDD)."""
    from dashboards.srdd_plan import plan_srdd

    plan = plan_srdd(
        model,
        overrides=settings or (),
        prompts=prompts,
        text=text,
        completions=completions,
        functional=not static,
        seed=seed,
    )
    from dashboards.probe_plan import check_plot

    if plot is not None:
        check_plot(plot, (".png", ".svg"))
    from dashboards import srdd_against
    from dashboards.live import build_progress, scan_progress
    from dashboards.srdd import lines, measure
    from dashboards.srdd_logged import log_scan, logged_in
    from dashboards.srdd_plot import draw
    from dashboards.tables import terminal
    from trainable.policy.embedded import ensure_base
    from trainable.scan import as_tree

    later = None if against is None else srdd_against.other_plan(plan, against)
    study = logged_in(sweep, store, tracking_uri)
    if plan.config.model.recipe is not None:
        with build_progress(terminal(stderr=True)) as progress:
            ensure_base(plan.config.model.recipe, progress)
    started = time.perf_counter()
    with scan_progress(terminal(stderr=True)) as progress:
        scan = measure(plan, progress)
        other = None if later is None else measure(later, progress)
    changes = () if other is None else srdd_against.changes(scan, other)
    if plot is not None:
        draw(scan, plot)
    if study is not None:
        log_scan(study, scan, plan)
    if as_json:
        beside = {} if other is None else {"against": as_tree(other), "changes": srdd_against.as_tree(changes)}
        print(json.dumps({**as_tree(scan), **beside}, indent=1))
        return
    print("\n".join(lines(scan, plan)))
    if later is not None:
        print("\n" + "\n".join(srdd_against.lines(changes, plan.model, later.model)))
    print(f"scanned in {time.perf_counter() - started:.0f} s")


@app.command()
def doctor(
    task: Annotated[
        str | None, typer.Option(help="A task's name: its questions, and whether its reward keeps its contract.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A workload, a folder or a hub id: its layers, norms, shares, forward, memory.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="With --task: task.x=...; with --model: any setting of a trial.")
    ] = None,
) -> None:
    """What works here, and what to install; or what a trial would do with a task, or with a model."""
    if task is not None and model is not None:
        raise ConfigError(f"--model {model}: has no use beside --task; ask for one of them at a time")
    if model is not None:
        from dashboards.model_text import examine_model

        print("\n".join(examine_model(model, overrides or [])))
        return
    if task is not None:
        from dashboards.task_text import examine_task

        report = examine_task(task, overrides or [])
        print("\n".join(report.lines))
        if not report.good:
            raise typer.Exit(1)
        return
    if overrides:
        raise ConfigError(f"--set {overrides[0]}: has no use without --task or --model; give one of them")
    from dashboards.doctor import examine

    checks = examine()
    for name, check in checks.items():
        print(f"{check.state:8s} {name:14s} {check.detail}")
        if check.remedy:
            print(f"{'':23s} -> {check.remedy}")
    if any(check.state == "broken" for check in checks.values()):
        raise typer.Exit(1)


def main() -> None:
    """Entry point."""
    # transformers imports torchao where it is installed; it warns about itself.
    for talkative in ("torchao", "torch.utils._pytree"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    with exit_codes(), lasting_output():
        _with_allocator_settings()
        app()


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

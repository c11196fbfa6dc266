"""The commands of `rin` that need no sweep: one trial, one model, this machine. Thin, as `cli.py` is."""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from dashboards import options as given
from dashboards.options import DEFAULT_STORE, trial_config
from spaces.devices import device_named
from spaces.errors import ConfigError

trials = typer.Typer()


@trials.command()
def trial(
    point: Annotated[str | None, typer.Argument(help="A point of the plan, e.g. control, bf16, e13m-rmsnorm.")] = None,
    config: Annotated[Path | None, typer.Option(help="A trial's YAML file (rin export), in place of a point.")] = None,
    workload: Annotated[str | None, typer.Option(help="What is trained; default embedded. Not with --config.")] = None,
    overrides: given.Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per step; the last one is the outcome.")
    ] = False,
) -> None:
    """Run one trial without Ray: in this process, and with parallel.ranks also in others that it starts."""
    settings = trial_config(point, config, workload, overrides or [])
    from dashboards.live import build_progress
    from dashboards.tables import say, terminal
    from dashboards.trial_text import outcome_lines, step_line
    from trainable.launch import fewer, launched, processes
    from trainable.policy.embedded import ensure_base
    from trainable.trial import Trial

    console = terminal(stderr=as_json)
    with contextlib.ExitStack() as stack:
        with build_progress(console) as progress:
            if settings.model.recipe is not None:
                ensure_base(settings.model.recipe, progress)  # by the process that shows how far it is
            size = processes(settings)
            if line := fewer(settings, size):
                print(line, file=sys.stderr)
            settings, team = stack.enter_context(launched(settings, size))
            running = stack.enter_context(contextlib.closing(Trial(settings, progress, team=team)))
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


@trials.command()
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


@trials.command()
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


@trials.command()
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
    device: Annotated[
        str | None,
        typer.Option(help="With --model: whether a trial fits h200, h100, a100 or 4090. Default: this machine's GPU."),
    ] = None,
) -> None:
    """What works here, and what to install; or what a trial would do with a task, or with a model."""
    if task is not None and model is not None:
        raise ConfigError(f"--model {model}: has no use beside --task; ask for one of them at a time")
    if model is not None:
        from dashboards.model_text import examine_model

        print("\n".join(examine_model(model, overrides or [], None if device is None else device_named(device))))
        return
    if device is not None:
        raise ConfigError(f"--device {device}: has no use without --model; give one, or ask rin plan --device {device}")
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

"""`rin`: the command line. Thin: it reads options, calls one function, and prints.

Heavy imports stay inside the commands, so that `rin --help` answers at once. Exit codes: 0 done (a collapse is a result), 2 the
user's mistake (one line that names the key, the value and the remedy), 1 a failure.
"""

import json
import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spaces.errors import ConfigError

if TYPE_CHECKING:
    from search.store import StudyConfig
    from spaces.config import TrialConfig

app = typer.Typer(
    name="rin",
    help="Sigma sweeps for 4-bit GRPO with noisy rollouts that can be believed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Workload = Annotated[str, typer.Option(help="What is trained: embedded, tiny, smollm2-135m, qwen2.5-1.5b-gsm8k.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value (YAML), any setting of a trial; repeatable.")]
Store = Annotated[Path, typer.Option(help="Folder that holds sweeps, their MLflow database and their results.")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow server or database; default: sqlite in the store.")]
Space = Annotated[str, typer.Argument(help="A named space (sigma, targets, schedule, full, w4a4, w4a8, w4a16, w16a16) or a YAML file.")]
Points = Annotated[str, typer.Option(help="Experiments of the plan to run as well, separated by commas.")]
Trials = Annotated[int | None, typer.Option(help="Configurations, the control included. Default: 8, or what the points need.")]
Replicates = Annotated[int, typer.Option(min=1, help="Runs per configuration, with paired seeds.")]
Concurrent = Annotated[int | None, typer.Option(min=1, help="Trials at once. Default: what the cores hold.")]
Searcher = Annotated[str, typer.Option(help="gp, tpe or random.")]
Seed = Annotated[int, typer.Option(min=0, help="First replicate's seed, and the searcher's.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster (e.g. auto, or HOST:6379). Default: a local one.")]
Name = Annotated[str, typer.Argument(help="Name of a sweep (rin list).")]
DEFAULT_STORE = Path("runs")


@app.command()
def sweep(
    space: Space = "sigma",
    workload: Workload = "embedded",
    trials: Trials = None,
    replicates: Replicates = 1,
    concurrent: Concurrent = None,
    seed: Seed = 0,
    overrides: Overrides = None,
    points: Points = "",
    searcher: Searcher = "gp",
    name: Annotated[str | None, typer.Option(help="Default: the space and the time.")] = None,
    store: Store = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    address: Address = None,
) -> None:
    """Run a sweep: the control first, then points, then what the searcher proposes."""
    study = _study(space, workload, trials, replicates, concurrent, seed, overrides, points, searcher, name, store, tracking_uri, address)
    from dashboards.live import build_progress, sweep_view
    from dashboards.tables import arm_rows, arm_table, terminal
    from search.store import BEST_FILE
    from search.study import run_study

    console = terminal()
    console.print(
        f"sweep {study.name}: {study.trials * study.replicates} trials of {study.workload}, results in {study.folder}", soft_wrap=True
    )
    with build_progress(console) as progress:
        build = progress
        with sweep_view(console, study.trials * study.replicates) as view:
            result = run_study(study, view, build)
    if result.tracking_lost:
        print(f"{result.tracking_lost}\nwhat the trials reported is kept in {study.folder}; then: rin status {study.name}", file=sys.stderr)
        raise typer.Exit(1)
    console.print(arm_table(arm_rows(result.records), f"sweep {study.name}"))
    where = _options(store, tracking_uri)
    if result.best is None:
        console.print("no configuration completed: nothing to export. Try smaller sigmas, or --set collapse.mode=monitor", soft_wrap=True)
    else:
        console.print(
            f"candidate: {result.best.arm}, accuracy {result.best.accuracy:.4f} on the selection questions "
            "(chosen and judged on the same questions: not a finding)",
            soft_wrap=True,
        )
        best = study.folder / BEST_FILE
        for line, why in (
            (f"rin trial --config {best}", "repeat it"),
            (f"rin export {study.name}{where} --to verl", "take it to another trainer"),
            (f"rin ui {study.name}{where}", "look at every trial"),
        ):
            console.print(f"  {line}   # {why}", soft_wrap=True, highlight=False)
    failed = [record for record in result.records if record.status == "failed"]
    for record in failed:
        print(f"{record.arm}/{record.replicate} failed: {record.reason}", file=sys.stderr)
    if result.interrupted:
        print("interrupted: what ran is kept", file=sys.stderr)
    if failed or result.interrupted:
        raise typer.Exit(1)


@app.command()
def trial(
    point: Annotated[str | None, typer.Argument(help="A point of the plan, e.g. control, bf16, e13m-rmsnorm.")] = None,
    config: Annotated[Path | None, typer.Option(help="A trial's YAML file (rin export), in place of a point.")] = None,
    workload: Annotated[str | None, typer.Option(help="What is trained; default embedded. Not with --config.")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per step; the last one is the outcome.")] = False,
) -> None:
    """Run one trial in this process, without Ray."""
    settings = _trial_config(point, config, workload, overrides or [])
    from dashboards.live import build_progress
    from dashboards.tables import terminal
    from trainable.trial import Trial

    console = terminal(stderr=as_json)
    with build_progress(console) as progress:
        running = Trial(settings, progress)
    while not running.done:
        report = running.step()
        if as_json:
            print(json.dumps(report.as_tree()), flush=True)
        else:
            console.print(_step_line(report), highlight=False, soft_wrap=True)
    outcome = running.outcome()
    if as_json:
        print(json.dumps(outcome.as_tree()))
        return
    scores = outcome.eval
    rule = f" by rule {outcome.rule}" if outcome.rule else ""
    console.print(f"{outcome.outcome}{rule} after {outcome.step} steps, {outcome.seconds:.1f} s", highlight=False)
    console.print(
        f"accuracy {scores['accuracy_start']:.4f} -> {scores['accuracy']:.4f} ({settings.quant.mode}), "
        f"{scores['accuracy_bf16_start']:.4f} -> {scores['accuracy_bf16']:.4f} (unquantised), {scores['n']} questions",
        highlight=False,
    )
    receipt = outcome.receipt
    console.print(f"quantised {len(receipt['quantized'])} layers, noised {len(receipt['noised'])} weights", highlight=False)
    for warning in receipt["warnings"]:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True, highlight=False)
    for alarm in outcome.alarms[:5]:
        console.print(f"alarm at step {alarm['step']}: {alarm['rule']}: {alarm['evidence']}", markup=False, soft_wrap=True, highlight=False)


@app.command()
def plan(
    space: Space = "sigma",
    workload: Workload = "embedded",
    trials: Trials = None,
    replicates: Replicates = 1,
    concurrent: Concurrent = None,
    seed: Seed = 0,
    overrides: Overrides = None,
    points: Points = "",
    searcher: Searcher = "gp",
    store: Store = DEFAULT_STORE,
) -> None:
    """What a sweep would run, in which order, and how long it takes. Trains nothing."""
    study = _study(space, workload, trials, replicates, concurrent, seed, overrides, points, searcher, "plan", store, None, None)
    from dashboards.live import text_params
    from dashboards.tables import describe_noise, duration
    from search.plan import plan_study
    from spaces.reading import as_tree, read_config

    known = plan_study(study, os.cpu_count() or 1)
    print(f"space {study.space.name} ({study.space.description}) on workload {study.workload}")
    for number, arm in enumerate(known.arms):
        print(f"  {number:2d}  {arm.name:28s} {describe_noise(text_params(as_tree(read_config(arm.tree))))}")
    if known.searched:
        print(f"  {len(known.arms):2d}+ {known.searched} configurations chosen by {study.searcher} from:")
        for dimension in study.space.dimensions:
            domain = dimension.domain
            values = " | ".join(domain.options) if domain.kind == "choice" else f"{domain.low:g} .. {domain.high:g}"
            condition = f"   where {dimension.when.parent} = {dimension.when.value}" if dimension.when else ""
            print(f"        {dimension.key:22s} {values}{condition}")
    config = known.config
    print(f"runs: {known.runs} = {study.trials} configurations x {study.replicates} replicates (seeds {seed} to {seed + replicates - 1})")
    per_step = f"{config.grpo.prompts} x {config.grpo.group_size} completions"
    print(f"each: {config.grpo.steps} steps of {per_step}, {config.quant.mode}, filter {config.grpo.filter_groups}")
    print(f"time: {duration(known.trial_seconds)} per trial ({known.seconds_source}), {known.slots} at once")
    print(f"      at most {duration(known.wall_seconds)}; a collapsed trial stops early")
    cost = (
        f"{known.slot_hours * known.gpus:.2f} GPU hours"
        if known.gpus
        else f"{known.slot_hours:.2f} trial-slot hours on {known.cpus} CPU each"
    )
    print(f"cost: {cost}")
    print(f"one accuracy has a standard error of {100 * known.standard_error:.1f} points from its {config.eval.questions} questions alone")
    if replicates < 3:
        print("fewer than 3 replicates: every comparison will say undecided")


@app.command("list")
def list_sweeps(store: Store = DEFAULT_STORE, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Sweeps in the store."""
    from search.store import load_study_config, sweeps
    from search.tracking import load_study

    rows: list[dict[str, Any]] = []
    for name in sweeps(store):
        study = load_study_config(store, name)
        row: dict[str, Any] = {"name": study.name, "space": study.space.name, "workload": study.workload}
        try:
            records = load_study(study.tracking_uri, study.name)
        except ConfigError as error:
            rows.append({**row, "runs": 0, "of": study.trials * study.replicates, "status": {"unknown": 0}, "problem": str(error)})
            continue
        counts: dict[str, int] = {}
        for record in records:
            counts[record.status] = counts.get(record.status, 0) + 1
        rows.append({**row, "runs": len(records), "of": study.trials * study.replicates, "status": counts})
    if as_json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print(f"no sweeps in {store}; start one with: rin sweep")
    for row in [] if as_json else rows:
        counts_text = row.get("problem") or ", ".join(f"{count} {status}" for status, count in row["status"].items())
        print(f"{row['name']:32s} {row['space']:10s} {row['workload']:20s} {row['runs']}/{row['of']} runs: {counts_text}")


@app.command()
def status(
    name: Name, store: Store = DEFAULT_STORE, tracking_uri: TrackingUri = None, as_json: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """Every configuration of a sweep."""
    from dataclasses import asdict

    study, uri = _find(name, store, tracking_uri)
    from dashboards.tables import arm_rows, arm_table, terminal
    from search.tracking import load_study

    records = load_study(uri, study.name)
    rows = arm_rows(records)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    terminal().print(arm_table(rows, f"sweep {name}: {len(records)} of {study.trials * study.replicates} trials"))


@app.command()
def export(
    name: Name,
    to: Annotated[str, typer.Option(help="yaml or verl.")] = "yaml",
    output: Annotated[Path | None, typer.Option(help="File to write; default: print.")] = None,
    store: Store = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
) -> None:
    """The best feasible configuration of a sweep."""
    study, uri = _find(name, store, tracking_uri)
    from search.export import EXPORTS, choose_best
    from search.tracking import load_study

    if to not in EXPORTS:
        raise ConfigError(f"--to {to}: choose one of {', '.join(EXPORTS)}")
    text = EXPORTS[to](choose_best(study.name, load_study(uri, study.name), uri))
    if output is None:
        print(text, end="")
    else:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {output}: {error.strerror}; give a file in a folder that exists") from None


@app.command()
def ui(
    name: Name,
    store: Store = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On localhost.")] = 5000,
) -> None:
    """MLflow's UI on the sweep's saved view (on localhost; Ctrl-C ends it)."""
    study, uri = _find(name, store, tracking_uri)
    from dashboards.mlflow_views import serve_ui

    serve_ui(uri, study.name, port, on_ready=lambda url: print(f"MLflow: {url}", flush=True))


@app.command()
def doctor() -> None:
    """What works here, and what to install."""
    from dashboards.doctor import examine

    checks = examine()
    for check in checks:
        print(f"{check.state:8s} {check.name:14s} {check.detail}")
        if check.remedy:
            print(f"{'':23s} -> {check.remedy}")
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(1)


def _study(
    space: str,
    workload: str,
    trials: int | None,
    replicates: int,
    concurrent: int | None,
    seed: int,
    overrides: list[str] | None,
    points: str,
    searcher: str,
    name: str | None,
    store: Path,
    tracking_uri: str | None,
    address: str | None,
) -> "StudyConfig":
    """Options -> StudyConfig. Raises ConfigError."""
    import re

    from spaces.library import SPACES, load_space
    from spaces.reading import parse_overrides
    from spaces.workloads import WORKLOADS

    if space not in SPACES and not space.endswith((".yaml", ".yml")):
        raise ConfigError(f"SPACE={space}: unknown; choose one of {', '.join(SPACES)}, or give a YAML file")
    if workload not in WORKLOADS:
        raise ConfigError(f"--workload {workload}: unknown; choose one of {', '.join(WORKLOADS)}")
    chosen = SPACES[space] if space in SPACES else load_space(Path(space))
    name = name or f"{chosen.name}-{datetime.now():%Y%m%d-%H%M%S}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise ConfigError(f"--name {name}: use letters, digits, '.', '_' and '-' only (it names a folder and an MLflow experiment)")

    from search.searchers import SEARCHERS
    from search.store import StudyConfig
    from search.study import fixed_arms
    from search.tracking import absolute_uri, default_tracking_uri

    if searcher not in SEARCHERS:
        raise ConfigError(f"--searcher {searcher}: unknown; choose one of {', '.join(SEARCHERS)}")
    store = store.absolute()
    study = StudyConfig(
        name=name,
        space=chosen,
        workload=workload,
        settings=_with_absolute_paths(parse_overrides(overrides or [])),
        points=tuple(part.strip() for part in points.split(",") if part.strip()),
        trials=trials or 1000,
        replicates=replicates,
        concurrent=concurrent,
        searcher=searcher,
        seed=seed,
        store=str(store),
        tracking_uri=absolute_uri(tracking_uri) if tracking_uri else default_tracking_uri(store),
        address=address,
    )
    return study.model_copy(update={"trials": trials or (len(fixed_arms(study)) if points else 8)})


def _with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Trials run in other folders than this one: a local model or data file is named from the root."""
    for section, key in (("model", "name"), ("task", "path")):
        value = settings.get(section, {}).get(key) if isinstance(settings.get(section, {}), dict) else None
        if isinstance(value, str) and Path(value).exists():
            settings[section][key] = str(Path(value).absolute())
    return settings


def _trial_config(point: str | None, config: Path | None, workload: str | None, overrides: list[str]) -> "TrialConfig":
    from spaces.points import POINTS
    from spaces.reading import load_yaml, merge, read_config
    from spaces.workloads import WORKLOADS

    if (point is None) == (config is None):
        raise ConfigError("POINT or --config: give one of the two, for example: rin trial control")
    if config is not None:
        if workload is not None:
            raise ConfigError(f"--workload {workload}: has no use with --config, which holds a whole trial; change it by --set")
        return read_config(load_yaml(config), overrides, origin=str(config))
    assert point is not None
    if point not in POINTS:
        raise ConfigError(f"POINT={point}: unknown; choose one of {', '.join(POINTS)}")
    if (workload or "embedded") not in WORKLOADS:
        raise ConfigError(f"--workload {workload}: unknown; choose one of {', '.join(WORKLOADS)}")
    return read_config(merge(WORKLOADS[workload or "embedded"].settings, POINTS[point].settings), overrides, origin=point)


def _find(name: str, store: Path, tracking_uri: str | None) -> tuple["StudyConfig", str]:
    """The sweep and where its runs are, with what an earlier command could not deliver delivered first."""
    from search.store import load_study_config
    from search.tracking import deliver_spool

    study = load_study_config(store.absolute(), name)
    uri = tracking_uri or study.tracking_uri
    deliver_spool(study.folder, uri)
    return study, uri


def _options(store: Path, tracking_uri: str | None) -> str:
    """What has to be repeated so that a next command finds the sweep."""
    given = "" if store == DEFAULT_STORE else f" --store {store}"
    return given + (f" --tracking-uri {tracking_uri}" if tracking_uri else "")


def _step_line(report: Any) -> str:
    signals = report.signals
    parts = [
        f"step {report.step:3d}",
        f"sigma {report.sigma:.4g}",
        f"reward {signals['grpo/reward']:.3f}",
        f"entropy {signals['gen/entropy']:.3f}",
        f"length {signals['gen/length']:.1f}",
        f"kept {signals['filter/kept_groups']:.0f}",
        f"{report.seconds:.2f} s",
    ]
    if "eval/accuracy" in signals:
        parts.append(f"accuracy {signals['eval/accuracy']:.4f}")
    if report.verdict.collapsed:
        parts.append(f"COLLAPSE {report.verdict.rule}: {report.verdict.evidence}")
    return "  ".join(parts)


def main() -> None:
    """Entry point: a ConfigError becomes one line and exit code 2."""
    for talkative in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is installed; it warns about itself
        logging.getLogger(talkative).setLevel(logging.ERROR)
    try:
        _with_allocator_settings()
        app()
    except ConfigError as error:
        print(f"rin: {error}", file=sys.stderr)
        sys.exit(2)


def _with_allocator_settings() -> None:
    """A trial runs in this process, and glibc reads its settings at start: start again with them."""
    if sys.argv[1:2] != ["trial"] or "MALLOC_TRIM_THRESHOLD_" in os.environ or not sys.platform.startswith("linux"):
        return
    from spaces.workloads import TRIAL_ENVIRONMENT

    os.environ.update(TRIAL_ENVIRONMENT)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

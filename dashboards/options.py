"""What the options of `rin` mean: their help, and the way from options to a StudyConfig or a TrialConfig.

Imported by the command line at start, so nothing heavy is imported at the top. Every mistake is a ConfigError of one
line.
"""

import inspect
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
import typer.core

from search.replicates import AT_ONCE
from spaces.errors import ConfigError

if TYPE_CHECKING:
    from search.store import StudyConfig
    from search.submission import JobServer
    from spaces.config import TrialConfig
    from spaces.workloads import Workload

Concurrent = Annotated[int | None, typer.Option(min=1, help="Trials at once. Default: what the cores hold.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="dotted.key=value (YAML), any setting of a trial; repeatable.")
]


def usable_budget(hours: float | None) -> float | None:
    """Raises ConfigError for hours in which nothing could run."""
    if hours is not None and not 0 < hours < float("inf"):
        raise ConfigError(f"--budget {hours:g}: nothing could run; give hours above 0, or leave it out")
    return hours


def usable_gpus(number: float | None) -> float | None:
    """Raises ConfigError for a part of a GPU that no rank would compute on."""
    if number is not None and number > 1 and number % 1:
        raise ConfigError(
            f"--gpus {number:g}: a trial computes on whole GPUs, one for each of its ranks, or on a part of one; "
            f"give {number // 1:g}, or a fraction such as 0.5"
        )
    return number


Budget = Annotated[
    float | None, typer.Option(callback=usable_budget, help="Trial-slot hours (GPU hours) after which all is stopped.")
]
Cpus = Annotated[
    int | None, typer.Option(min=1, help="CPUs of one trial, or of each of its ranks. Default: the workload's.")
]
Gpus = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=usable_gpus,
        help="GPUs of one trial: 0.5 puts two trials on one; 4 compute a trial together (parallel.ranks). "
        "Default: the workload's.",
    ),
]
Store = Annotated[
    str,
    typer.Option(
        help="Folder (or s3:// URI) that holds sweeps, their results and, in a folder, their MLflow database."
    ),
]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow server or database; default: sqlite in the store.")]
Address = Annotated[
    str | None,
    typer.Option(help="A running Ray cluster (auto, or HOST:6379), or local. Default: local; where it ran before."),
]
Html = Annotated[
    str | None,
    typer.Option(
        "--html", metavar="[FILE.html]", help="As a page of its own, in that file. Default: report.html of the sweep."
    ),
]
Figures = Annotated[Path | None, typer.Option(help="The page's figures as PNG and SVG, in that folder.")]
Csv = Annotated[
    Path | None, typer.Option(help="All of it as CSV files, in that folder: arms, trials, steps, completions, ...")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
DEFAULT_STORE = "runs"
WHAT_RUNS = (
    *("space", "source", "workload", "runs", "trials"),
    *("overrides", "points", "evidence", "warm_start", "searcher"),
)
"""Options that say what a sweep runs; without any it is the one that shows what the product is for."""
COLLAPSES = "e13i-baseline"
"""The experiment of the plan that runs then, too."""


class HtmlAlone(typer.core.TyperCommand):
    """A command whose --html stands alone or before a file, which typer's options cannot: it is a file's name where it
    ends as one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--html" in args:
            place = args.index("--html") + 1
            if not "".join(args[place : place + 1]).endswith(".html"):
                args = [*args[:place], "", *args[place:]]
        return super().parse_args(ctx, args)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """What a sweep is asked for. Each field is an option of `rin sweep`, and of `rin plan` where it has a use there;
    None = it was not given (of the store: the default one). What holds then is the study's own default, or what
    `--from` takes over.

    Example: SweepOptions(workload="tiny", trials=3, overrides=["eval.questions=32"])
    """

    space: Annotated[
        str | None,
        typer.Argument(
            help="A named space (sigma, targets, schedule, full, w4a4, w4a8, w4a16, w16a16) or a YAML file. "
            "Default: sigma."
        ),
    ] = None
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="The same as that sweep in the store, but for the options given beside it; --set adds."
        ),
    ] = None
    workload: Annotated[
        str | None, typer.Option(help="What is trained: embedded (default), tiny, smollm2-135m, qwen2.5-1.5b-gsm8k.")
    ] = None
    runs: Annotated[
        int | None,
        typer.Option(min=2, help="Trials in all: new configurations first, then replicates where they matter."),
    ] = None
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Configurations, the control included. Default: 8, or what the points need; in the sweep that is "
            "asked for nothing the plan's e13i-baseline, which collapses, and its control are among them.",
        ),
    ] = None
    replicates: Annotated[int | None, typer.Option(min=1, help="Runs per configuration, with paired seeds. [1]")] = None
    concurrent: Concurrent = None
    seed: Annotated[int | None, typer.Option(min=0, help="First replicate's seed, and the searcher's. [0]")] = None
    overrides: Overrides = None
    points: Annotated[
        str | None,
        typer.Option(help="Experiments of the plan, or YAML files with settings, to run as well; separated by commas."),
    ] = None
    evidence: Annotated[
        str | None,
        typer.Option(
            help="Experiments of the plan whose recorded collapse the searcher is told, without running them."
        ),
    ] = None
    warm_start: Annotated[
        str | None, typer.Option(help="An earlier sweep in the store whose results the searcher is told.")
    ] = None
    searcher: Annotated[str | None, typer.Option(help="gp (default), tpe, random, grid or qmc.")] = None
    objectives: Annotated[
        list[str] | None,
        typer.Option(
            "--objective",
            help="accuracy (default), collapses, hours, or pass@K with eval.samples of K or more; several: a Pareto "
            "front. The first accuracy or pass@K is what arms are compared, chosen and confirmed by.",
        ),
    ] = None
    confirm: Annotated[
        bool | None,
        typer.Option(
            "--confirm/--no-confirm",
            help=f"Then confirm the candidate (the default), up to {AT_ONCE} pairs of runs; rin confirm goes on.",
        ),
    ] = None
    budget: Budget = None
    cpus: Cpus = None
    gpus: Gpus = None
    name: Annotated[str | None, typer.Option(help="Default: the space and the time.")] = None
    store: Store = DEFAULT_STORE
    tracking_uri: TrackingUri = None
    address: Address = None

    def taken_from(self) -> "StudyConfig | None":
        """The sweep that `--from` names. Raises ConfigError."""
        if self.source is None:
            return None
        from search.derived import refuse_as_source

        before = Place(name=self.source, store=self.store).sweep()
        refuse_as_source(before)
        return before


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which sweep, and where it lies: what every command about one asks for."""

    name: Annotated[str | None, typer.Argument(help="Name of a sweep (rin list). Default: the newest.")] = None
    store: Store = DEFAULT_STORE
    tracking_uri: TrackingUri = None

    def sweep(self, *, confirmations: bool = True) -> "StudyConfig":
        """With its tracking where it now is; without a name the newest, which is said. `confirmations`: that may be
        one. Raises ConfigError."""
        from search.mlflow_client import absolute_uri
        from search.store import absolute_store, check_store, load_study_config, newest_study

        store = absolute_store(self.store)
        if self.store != DEFAULT_STORE:
            check_store(store)
        study = load_study_config(store, self.name) if self.name else newest_study(store, confirmations=confirmations)
        if not self.name:
            print(f"{study.name}, the newest in {self.store}:", file=sys.stderr)
        moved = {} if self.tracking_uri is None else {"tracking_uri": absolute_uri(self.tracking_uri)}
        return study.model_copy(update=moved)

    @property
    def again(self) -> str:
        """What has to be repeated so that a next command finds the sweep, without a password."""
        from search.secrets import strip_password

        given = [] if self.store == DEFAULT_STORE else ["--store", self.store]
        given += ["--tracking-uri", strip_password(self.tracking_uri)] if self.tracking_uri else []
        return f" {shlex.join(given)}" if given else ""


NO_USE_IN_A_PLAN = (
    *("evidence", "warm_start", "objectives"),  # they change what is proposed, not how much runs
    *("name", "tracking_uri", "address"),
)


def takes(
    record: type[SweepOptions] | type[Place], *, without: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that typer gives the fields of a record, before what it asks for itself, and that gets them as one.

    `without`: fields that are no option of this command and keep their defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(record, include_extras=True)
        asked = inspect.signature(record).parameters.values()
        offered = [field.replace(annotation=hints[field.name]) for field in asked if field.name not in without]
        own = list(inspect.signature(command).parameters.values())[1:]

        @wraps(command)
        def called(**given: Any) -> None:
            command(record(**{field.name: given.pop(field.name) for field in offered}), **given)

        parameters = [*offered, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


def refuse_scheduler(name: str | None) -> None:
    """Other programs that sweep have schedulers. Raises ConfigError with the reason for whoever asks for one here."""
    if name is not None:
        raise ConfigError(
            f"--scheduler {name}: no trial is stopped because others lead: while sigma differs, "
            "the order says who is noisier now (noise on RMSNorm led by 9.5 points at step 20 of the recorded runs "
            "and lost by 5.4 at step 29); leave it out, collapses end at once and --budget bounds the rest"
        )


def study_config(options: SweepOptions) -> "StudyConfig":
    """Options -> StudyConfig. Raises ConfigError."""
    from search.derived import OWN, derived, files_of, space_for
    from search.lineup import fixed_arms
    from search.mlflow_client import absolute_uri
    from search.store import (
        AsGiven,
        ObjectiveName,
        SearcherName,
        StudyConfig,
        absolute_store,
        check_name,
        default_tracking_uri,
    )
    from spaces.library import SPACES, load_space
    from spaces.narrowing import named, refuse_settings_of_the_run, searched
    from spaces.paths import anchored, home
    from spaces.points import read_point
    from spaces.reading import merge, parse_overrides
    from spaces.workloads import WORKLOADS
    from trainable.pass_at_k import k_of

    before = options.taken_from()
    asked = {field.name: value for field in fields(options) if (value := getattr(options, field.name)) is not None}
    taken: dict[str, Any] = (
        {} if before is None else {key: getattr(before, key) for key in StudyConfig.model_fields if key not in OWN}
    )
    space = options.space or "sigma"
    if space not in SPACES and not _is_file(space):
        raise ConfigError(f"SPACE={space}: unknown; choose one of {', '.join(SPACES)}, or give a YAML file")
    kind = options.workload or taken.get("workload", "embedded")
    _known("--workload", kind, WORKLOADS)
    workload = WORKLOADS[kind].settings
    changes = anchored(parse_overrides(_once(options.overrides or [])), Path.cwd())
    changes = _with_ranks(changes, taken, options.gpus)
    settings = merge(taken.get("settings", {}), changes)
    refuse_settings_of_the_run(settings, "--set ")
    plain = not _decided(options)
    points = (COLLAPSES,) if plain else _names(options.points)
    held = {point: dict(read_point(point)[1]) for point in points}
    if options.space is None and before is not None:
        chosen = space_for(before, workload, settings, changes)
    else:
        chosen = named(space, workload, settings) if space in SPACES else load_space(home(space))
    if before is None:  # what is the same as an earlier sweep is generated as there
        elsewhere = [chosen.settings, *held.values()]
        if all(dimension.key != "rollout.backend" for dimension in chosen.dimensions):
            settings = _with_backend(WORKLOADS[kind], settings, elsewhere)
    name = check_name(options.name or f"{chosen.name}-{datetime.now():%Y%m%d-%H%M%S}")
    if confirmed := re.fullmatch(r"(.+)-confirm(-.+)?", options.name or ""):
        raise ConfigError(f"--name {name}: the confirmation of a sweep {confirmed[1]} has that name; choose another")
    left = searched(chosen, workload, settings)

    files = {point: settings for point, settings in held.items() if _is_file(point)}
    if before is not None and options.points is None:
        files = files_of(before)
    _known("--searcher", options.searcher or "gp", get_args(SearcherName))
    for objective in options.objectives or []:
        if not k_of(objective):
            _known("--objective", objective, (*get_args(ObjectiveName), "pass@K (pass@4, ...)"))
    usable_budget(options.budget)
    usable_gpus(options.gpus)
    store = absolute_store(options.store)

    tracked = options.tracking_uri or (None if before is None else before.tracking_uri)
    changed: dict[str, Any] = {
        **{key: value for key, value in asked.items() if key in StudyConfig.model_fields},
        **{key: _names(asked[key]) for key in ("points", "evidence") if key in asked},
        **_sizes(options, before),
        "name": name,
        "space": left,
        "settings": settings,
        "given": AsGiven(space=chosen, points=files),
        "store": store,
        "tracking_uri": absolute_uri(tracked) if tracked else default_tracking_uri(store),
        "address": ray_address(options.address, None if before is None else before.address),
    }
    if plain:
        changed["points"] = points
    if options.confirm is not None or before is None:
        changed["confirm_pairs"] = 0 if options.confirm is False else AT_ONCE
    if options.objectives is not None:
        changed["objectives"] = tuple(dict.fromkeys(options.objectives))
    if options.budget is not None:
        changed["budget_hours"] = options.budget
    number = (taken | changed).get("trials")
    study = StudyConfig(**{**taken, **changed, "trials": number or 1000})
    if before is not None:
        study = derived(before, study, changes)
    arms = fixed_arms(study)  # a setting that the sweep would not take is told here
    configurations = len(arms) if options.points else 8
    return study.model_copy(update={"trials": number or configurations})


def _with_backend(
    workload: "Workload", settings: Mapping[str, Any], elsewhere: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The user's settings over who generates, which is said. `elsewhere`: what else may give that, a space or a
    file."""
    from spaces.reading import merge
    from spaces.workloads import chosen_backend

    if any("backend" in tree.get("rollout", {}) for tree in elsewhere):
        return dict(settings)
    chosen, line = chosen_backend(workload, settings)
    if line:
        print(line, file=sys.stderr)
    return merge(chosen, settings)


def _with_ranks(changes: dict[str, Any], taken: Mapping[str, Any], gpus: float | None) -> dict[str, Any]:
    """Settings that are given, with as many ranks as GPUs. `taken`: fields of an earlier study. Raises ConfigError
    where both are given and differ."""
    from spaces.reading import flatten, merge

    key = "parallel.ranks"
    given, held = flatten(changes).get(key), flatten(taken.get("settings", {})).get(key, 1)
    if gpus is None and given is not None and taken.get("gpus") and given != max(taken["gpus"], 1):
        raise ConfigError(f"--set {key}={given}: the sweep of --from has --gpus {taken['gpus']:g}; give --gpus as well")
    if not gpus:
        return changes
    if gpus > 1 and given is None:
        return merge(changes, {"parallel": {"ranks": int(gpus)}})
    if (held if given is None else given) != max(gpus, 1):
        raise ConfigError(
            f"--gpus {gpus:g}: {key}={held if given is None else given} takes a GPU for each; leave one of the two out"
        )
    return changes


def _decided(options: SweepOptions) -> list[str]:
    """Which of the options that say what runs are given."""
    return [option for option in WHAT_RUNS if getattr(options, option) is not None]


def _sizes(options: SweepOptions, before: "StudyConfig | None") -> dict[str, int | None]:
    """How much runs, as far as it is asked for. Raises ConfigError for what contradicts itself."""
    from search.store import MOST

    given = {"trials": options.trials, "replicates": options.replicates}
    asked = {key: value for key, value in given.items() if value is not None}
    if options.runs is not None:
        for key, value in asked.items():
            raise ConfigError(
                f"--{key} {value}: with --runs {options.runs} the sweep decides how many configurations and how many "
                "replicates there are; leave one of the two out"
            )
        return {"trials": options.runs, "replicates": MOST, "total": options.runs}
    if before is not None and before.total is not None and len(asked) == 1:
        ((key, value),) = asked.items()
        raise ConfigError(
            f"--{key} {value}: {before.name} has --runs {before.total}, by which it decides that itself; "
            "give --trials and --replicates, or --runs"
        )
    return {**asked, "total": None} if asked else {}


def refuse_with_ablate(options: SweepOptions) -> None:
    """An ablation's arms come from its sweep alone. Raises ConfigError."""
    if options.confirm:
        raise ConfigError(
            "--confirm: has no use with --ablate, whose winner is the one that rin confirm judges; leave it out"
        )
    for option in _decided(options):
        flag = {"space": "SPACE", "overrides": "--set", "source": "--from"}.get(option, f"--{option.replace('_', '-')}")
        raise ConfigError(
            f"{flag}: has no use with --ablate, whose arms come from the sweep that it takes apart; leave it out"
        )


def destination(address: str, options: SweepOptions, *, begun: bool = False) -> "JobServer":
    """The cluster that a sweep is sent to, once every place that the options name can be reached from there.

    `begun`: the sweep lies in the store. Raises ConfigError.
    """
    if options.address is not None:
        raise ConfigError("--address: --submit names the cluster already; leave --address out")
    if not address.startswith(("http://", "https://")):
        shown = address.rpartition("@")[2]  # without a password
        raise ConfigError(
            f"--submit {shown}: give the address of the cluster's dashboard, for example http://HEAD:8265"
        )
    from search.submission import check_paths, check_places, check_space_paths, job_server
    from spaces.library import read_space
    from spaces.paths import home
    from spaces.reading import load_yaml, parse_overrides

    server = job_server(address)
    if server.on_this_machine:
        return server
    check_places(options.store, options.tracking_uri, begun=begun)
    check_paths("--set ", parse_overrides(options.overrides or []), Path.cwd())
    if options.space is not None and _is_file(options.space):
        check_space_paths(f"{options.space}: ", read_space(home(options.space)), home(options.space).parent)
    for name in filter(_is_file, _names(options.points)):
        check_paths(f"{name}: ", load_yaml(home(name)), home(name).parent)
    return server


def trial_config(point: str | None, config: Path | None, workload: str | None, overrides: list[str]) -> "TrialConfig":
    """A point of the plan on a workload, or a file. Raises ConfigError, also for a setting that would do nothing."""
    from spaces.paths import anchored, load_settings
    from spaces.points import POINTS
    from spaces.reading import merge, parse_overrides, read_config
    from spaces.uses import is_record, refuse_idle
    from spaces.workloads import WORKLOADS

    changes = anchored(parse_overrides(_once(overrides)), Path.cwd())
    if (point is None) == (config is None):
        raise ConfigError("POINT or --config: give one of the two, for example: rin trial control")
    if config is not None:
        if workload is not None:
            raise ConfigError(
                f"--workload {workload}: has no use with --config, which holds a whole trial; change it by --set"
            )
        tree, origin = load_settings(config), str(config)
        asked = {} if is_record(tree) else tree
    else:
        assert point is not None
        _known("POINT", point, POINTS)
        _known("--workload", workload or "embedded", WORKLOADS)
        named = WORKLOADS[workload or "embedded"]
        tree, origin = merge(named.settings, POINTS[point].settings), point
        tree, asked = merge(tree, _with_backend(named, changes)), {}
    made = read_config(merge(tree, changes), origin=origin)
    for given, who in ((asked, f"{origin}: "), (changes, "--set ")):
        refuse_idle(given, [made], who)
        if "hang_seconds" in given and made.parallel.ranks == 1:
            raise ConfigError(
                f"{who}hang_seconds={made.hang_seconds:g}: does nothing here, as nobody watches a single trial of one "
                "process; leave it out"
            )
    return made


def numbers(option: str, text: str) -> tuple[int, ...]:
    """`5,8,12` -> (5, 8, 12). Raises ConfigError."""
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise ConfigError(f"{option} {text}: give whole numbers separated by commas, for example 5,8,12") from None


def planned_looks(text: str | None) -> tuple[int, ...] | None:
    """Of a confirmation. Raises ConfigError."""
    if text is None:
        return None
    from search.replicates import check_looks

    try:
        return check_looks(numbers("--looks", text))
    except ConfigError as error:
        raise ConfigError(f"--{str(error).removeprefix('--')}") from None


def ray_address(address: str | None, before: str | None) -> str | None:
    """Where a study goes on: where it ran before, unless another address is given; `local` is a Ray of its own."""
    return before if address is None else None if address == "local" else address


def _once(overrides: Sequence[str]) -> Sequence[str]:
    """Raises ConfigError for a key that is set twice: one of the two would be without effect."""
    given: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if given.setdefault(key, override) != override:
            raise ConfigError(f"--set {override}: {given[key]} is given, too; keep one of the two")
    return overrides


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _known(option: str, value: str, table: Any) -> None:
    if value not in table:
        joint = "=" if option.isupper() else " "
        raise ConfigError(f"{option}{joint}{value}: unknown; choose one of {', '.join(table)}")

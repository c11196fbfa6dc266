"""`make reference`: docs/reference.md, every name a user meets, from the tables and docstrings of the code.

A reference that is written by hand is wrong after the next change. So nothing is said here that the code does not say:
fields have the string under them, metrics, rules, statuses and verdicts the table in which they are defined, options
their help. `tests/test_docs.py` compares the file with what this module gives.
"""

import ast
import inspect
import re
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
import typer
import typer.core
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dashboards.cli import app
from dashboards.frames import COLUMNS
from search.export import EXPORTS
from search.finding import VERDICTS, FindingVerdict
from search.objectives import OBJECTIVES
from search.proposals import SEARCHERS
from search.report import screening
from search.store import StudyConfig
from search.tolerance import Boundary
from spaces.config import MODES, CollapseConfig, NoiseConfig, TrialConfig
from spaces.formats import FORMATS
from spaces.library import SPACES, Choice, Dimension, Float, Int, Space, When
from spaces.points import POINTS
from spaces.reading import as_tree, flatten, parts
from spaces.schedules import SCHEDULES, sigma_at
from spaces.uses import USES
from spaces.workloads import WORKLOADS
from trainable.collapse_rules import RULES, WORDS
from trainable.failure import FAILURES
from trainable.metrics import GROUPS, METRICS, unit_of
from trainable.noise import ZONES, layer_zones
from trainable.outcome import STATUSES, Effect, EffectReceipt
from trainable.signals import NAMES

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
HEAD = """# Reference

Every setting, name and command. Written by `make reference` from the code, and compared with it in CI. Words are
explained in the [glossary](glossary.md).
"""


def page() -> str:
    """The whole file."""
    sections = {
        "Settings of a trial": settings(),
        "What some settings choose from": choices(),
        "Workloads": workloads(),
        "Points": points(),
        "Spaces": spaces(),
        "A file with a space": records(Space, Dimension, Float, Int, Choice, When),
        "Settings of a sweep": ["`study.json` in the sweep's folder.", "", *records(StudyConfig)],
        "Metrics": metrics(),
        "The receipt": receipt(),
        "Frames": frames(),
        "Collapse rules": collapse_rules(),
        "Statuses": statuses(),
        "Verdicts": verdicts(),
        "Searchers, objectives, exports": by_name(),
        "Commands": commands(),
    }
    contents = [f"- [{title}](#{slug(title)})" + below(lines) for title, lines in sections.items()]
    text = [HEAD, *contents, ""]
    for title, lines in sections.items():
        text += [f"## {title}", "", *lines, ""]
    return "\n".join(text).rstrip() + "\n"


def below(lines: Sequence[str]) -> str:
    """Links to the headings of a section."""
    found = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    links = " · ".join(f"[{title}](#{slug(title)})" for title in found)
    return f": {links}" if links else ""


def slug(title: str) -> str:
    """As GitHub makes it."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


# --- settings ---------------------------------------------------------------------------------------------------------


def settings() -> list[str]:
    """A table for each part of a trial."""
    lines = [
        "In YAML files by nesting, on the command line as `--set noise.sigma_start=0.02`. A setting that could change",
        "nothing is refused: *Needs* says under which others it has a use. A workload with another default is named.",
    ]
    for prefix, about, record in trial_parts():
        title = f"`{prefix}`" if prefix else "The trial itself"
        fields = {name: field for name, field in record.model_fields.items() if not parts(field) or name == "zones"}
        keys = {name: f"{prefix}.{name}".lstrip(".") for name in fields}
        often = Counter(USES[key].needs for key in keys.values() if key in USES)
        notes = {needs: f"<sup>{n}</sup>" for n, needs in enumerate((x for x in often if often[x] > 2), 1)}
        rows = [setting(keys[name], name, field, notes) for name, field in fields.items()]
        lines += ["", f"### {title}", "", about, "", *table(("setting", "values", "default", "meaning"), rows)]
        lines += [line for needs, mark in notes.items() for line in ("", f"{mark} *Needs* {prose(needs)}.")]
    return lines


def trial_parts() -> Iterator[tuple[str, str, type[BaseModel]]]:
    """(prefix, what it is, its record), the trial's own settings last."""

    def walk(record: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, type[BaseModel]]]:
        for name, field in record.model_fields.items():
            for part in parts(field):
                yield f"{prefix}{name}", prose(field.description), part
                yield from walk(part, f"{prefix}{name}.")

    yield from walk(TrialConfig, "")
    yield "", "Beside its parts.", TrialConfig


def setting(key: str, name: str, field: FieldInfo, notes: Mapping[str, str]) -> tuple[str, str, str, str]:
    """A row; `notes`: marks of needs that are told below the table."""
    needs = USES[key].needs if key in USES else ""
    said = [prose(field.description) + notes.get(needs, "")]
    if needs and needs not in notes:
        said.append(f"*Needs* {prose(needs)}.")
    if others := [f"{shown(value)} in `{one}`" for one, value in elsewhere(key) if value != plain(field.default)]:
        said.append(f"*Default* {', '.join(others)}.")
    return f"`{name}`", values(field.annotation, field.metadata), default(field), "<br>".join(said)


def elsewhere(key: str) -> Iterator[tuple[str, Any]]:
    """Workloads that give a value of their own."""
    for name, workload in WORKLOADS.items():
        given = flatten(workload.settings)
        if key in given:
            yield name, given[key]
        elif any(other.startswith(f"{key}.") for other in given):
            yield name, {k.removeprefix(f"{key}."): v for k, v in given.items() if k.startswith(f"{key}.")}


def prose(text: str | None) -> str:
    """A docstring as a sentence of a page, with a link to each document that it names."""
    return re.sub(r"docs/([a-z-]+\.md)", r"[\1](\1)", " ".join((text or "").split()))


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "drawn" if "id" in field.default_factory.__name__ else "none"
    return shown(plain(field.default))


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """A value as YAML has it; what is empty in words."""
    if value in ((), [], {}, ""):
        return "none"
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        return "see there"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(shown(item) for item in value)}]"
    return str(value)


def values(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What may be given, in words."""
    if get_origin(annotation) is tuple:
        inner = values(get_args(annotation)[0])
        return "mapping" if inner.startswith("list") else f"list of {PLURALS.get(inner, inner)}"
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return values(inner, [*more, *metadata])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{name}`" for name in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(values(one, metadata) for one in get_args(annotation)))
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"[`{annotation.__name__}`](#{annotation.__name__.lower()})" if annotation in LINKED else "mapping"
    kinds = {bool: "true, false", int: "whole number", float: "number", str: "text", date: "day", type(None): "null"}
    word = kinds.get(annotation, "any")
    span = bounds(metadata) if annotation in (int, float) else ""
    return f"{word} {span}".strip()


PLURALS = {"whole number": "whole numbers", "number": "numbers", "text": "texts", "mapping": "mappings"}
LINKED: set[type[BaseModel]] = {Float, Int, Choice, When, Dimension, Space}


def bounds(metadata: Sequence[Any]) -> str:
    """`0 to 1`, `above 0`, `from 1`."""
    low, high, above, below, step = (
        next((getattr(one, name) for one in metadata if isinstance(one, kind)), None)
        for kind, name in (
            (limits.Ge, "ge"),
            (limits.Le, "le"),
            (limits.Gt, "gt"),
            (limits.Lt, "lt"),
            (limits.MultipleOf, "multiple_of"),
        )
    )
    if low is not None and high is not None:
        said = [f"{low:g} to {high:g}"]
    else:
        said = [
            f"{word} {limit:g}"
            for word, limit in (("from", low), ("above", above), ("up to", high), ("below", below))
            if limit is not None
        ]
    return ", ".join([*said, *([f"in steps of {step:g}"] if step else [])])


def choices() -> list[str]:
    """Formats, modes, schedules and zones, with their numbers."""
    bits = [
        (
            f"`{name}`",
            "16, as it is" if form.element is None else str(form.bits),
            "" if form.element is None else f"{form.element.largest:g}",
            "" if form.element is None else str(form.block),
            "" if form.element is None else "power of two" if form.scale is None else "E4M3 under fp32",
            f"{form.stored_bits:g}",
        )
        for name, form in FORMATS.items()
    ]
    modes = [(mode, f"`{given['weights']}`", f"`{given['activations']}`") for mode, given in MODES.items()]
    noises = {name: NoiseConfig(sigma_start=0.05, sigma_end=0.0005, schedule=name) for name in SCHEDULES}
    steps = (0, 3, 6, 9, 12, 18, 24, 28)
    falls = [(f"`{name}`", *(f"{sigma_at(noise, step, 29):.3g}" for step in steps)) for name, noise in noises.items()]
    depths = (8, 28)
    held = {depth: layer_zones(depth) for depth in depths}
    zones = [
        (f"`{zone}`", *(span([i for i, there in enumerate(held[depth]) if zone in there]) for depth in depths))
        for zone in ZONES
    ]
    return [
        "### Formats",
        "",
        "Of `quant.weights` and `quant.activations`.",
        "",
        *table(("format", "bits", "largest value", "block", "scale of a block", "bits stored"), bits),
        "",
        *table(("mode", "weights", "activations"), modes),
        "",
        "### Schedules",
        "",
        "Of `noise.schedule`: sigma in some steps of 29, from 0.05 to 0.0005 in 10 stages. Stage 0 is quiet.",
        "",
        *table(("step", *map(str, steps)), falls),
        "",
        "### Zones",
        "",
        "Of `noise.layers` and `noise.zones`, by relative depth.",
        "",
        *table(("zone", *(f"layers of {depth}" for depth in depths)), zones),
    ]


def span(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def records(*models: type[BaseModel]) -> list[str]:
    """Their fields; several with a heading each."""
    lines: list[str] = []
    for model in models:
        rows = [
            (f"`{name}`", values(field.annotation, field.metadata), default(field), prose(field.description))
            for name, field in model.model_fields.items()
        ]
        if len(models) > 1:
            lines += ["", f"### {model.__name__}", ""]
        lines += table(("key", "values", "default", "meaning"), rows)
    return lines[1:] if len(models) > 1 else lines


# --- named tables -----------------------------------------------------------------------------------------------------


def workloads() -> list[str]:
    rows = [
        (
            f"`{name}`",
            workload.description,
            f"{workload.trial_seconds:g} s",
            f"{workload.trial_cpus}" + (f" and {workload.trial_gpus:g} GPU" if workload.trial_gpus else ""),
            ", ".join(workload.needs) or "-",
        )
        for name, workload in WORKLOADS.items()
    ]
    about = "`--workload NAME`: what is trained. Their settings stand beside each setting above."
    return [about, "", *table(("workload", "what it is", "a trial", "CPUs", "packages"), rows)]


def points() -> list[str]:
    usual = flatten(as_tree(TrialConfig()))
    rows = [
        (
            f"`{name}`",
            point.hypothesis + (f"<br>*Recorded:* {point.recorded}" if point.recorded else ""),
            "<br>".join(
                f"`{key}={brief(value)}`" for key, value in flatten(point.settings).items() if value != usual.get(key)
            ),
        )
        for name, point in POINTS.items()
    ]
    about = (
        "`rin trial NAME`, `rin sweep --points NAMES`: the experiments of the plan, with what was recorded, and "
        "negative controls. Settings that differ from a trial's defaults."
    )
    return [about, "", *table(("point", "what it asks", "settings"), rows)]


def brief(value: Any) -> str:
    """Long lists by their ends."""
    return f"[{value[0]:g}, ..., {value[-1]:g}]" if isinstance(value, list) and len(value) > 6 else shown(value)


def spaces() -> list[str]:
    lines = ["`rin sweep NAME`: what is searched, where nothing is fixed by `--set`."]
    ranges = []
    for name, space in SPACES.items():
        if space.settings:  # the space sigma, in a mode
            starts = [drawn(one) for one in space.dimensions if one.key == "noise.sigma_start"]
            ranges.append((f"`{name}`", *starts))
            continue
        rows = [
            (
                f"`{dimension.key}`",
                drawn(dimension),
                "" if dimension.when is None else f"{dimension.when.parent} is {' or '.join(dimension.when.labels)}",
            )
            for dimension in space.dimensions
        ]
        lines += [
            "",
            f"### `{name}`",
            "",
            f"{sentence(space.description)}.",
            "",
            *table(("setting", "drawn from", "where"), rows),
        ]
    head = ("space", "`noise.sigma_start` on rmsnorm", "on linear")
    about = "As `sigma`, in one mode. The ranges hold for the other spaces too, where `--set` chooses the mode."
    return [*lines, "", "### One for each mode", "", about, "", *table(head, ranges)]


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def drawn(dimension: Dimension) -> str:
    domain = dimension.domain
    if isinstance(domain, Choice):
        return ", ".join(domain.options)
    return f"{domain.low:g} to {domain.high:g}" + (", log" if isinstance(domain, Float) and domain.log else "")


def metrics() -> list[str]:
    lines = ["In MLflow, in `rin trial --json` and in every step of `outcome.json`. Shares are 0 to 1."]
    for group, when in GROUPS.items():
        rows = [(f"`{name}`", unit_of(name), said) for name, said in METRICS.items() if name.split("/")[0] == group]
        lines += ["", f"### `{group}/`", "", f"Logged {when}.", "", *table(("metric", "unit", "meaning"), rows)]
    return lines


def receipt() -> list[str]:
    about = (
        "`receipt` in the last line of `rin trial --json`, in `outcome.json` and in MLflow: proof of what a trial did."
    )
    rows = [(f"`{name}`", said) for name, said in under_fields(EffectReceipt).items()]
    effects = [(f"`{name}`", said) for name, said in under_fields(Effect).items()]
    return [
        about,
        "",
        *table(("key", "meaning"), rows),
        "",
        "Of each entry in `effects`:",
        "",
        *table(("key", "meaning"), effects),
    ]


def frames() -> list[str]:
    lines = [
        "Of `dashboards.frames.load(NAME)` and `rin report NAME --csv DIR` ([frames.md](frames.md)). Besides these "
        "columns `trials` and `steps` have the metrics above by their names, and `arms` each setting that differs "
        "between arms."
    ]
    for name, columns in COLUMNS.items():
        rows = [(f"`{column}`", kind, said) for column, (kind, said) in columns.items()]
        lines += ["", f"### `{name}`", "", *table(("column", "type", "meaning"), rows)]
    return lines


def under_fields(record: type) -> dict[str, str]:
    """Field -> the string under it; a dataclass does not keep them."""
    (tree,) = ast.parse(inspect.getsource(record)).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                found[name] = prose(said)
            case ast.AnnAssign(target=ast.Name(id=name)), _:
                found[name] = ""
    return found


def collapse_rules() -> list[str]:
    """Which signal, which limits, what it means, where to look."""
    limits = CollapseConfig()
    lines = [
        "A rule compares a step with the run's own noise-free baseline. It fires when it has held for",
        f"`collapse.patience` steps in a row ({limits.patience}); `nonfinite` and `filter_rejection` fire at once.",
        "Where several fire in one step, the first below names the collapse.",
    ]
    for name, words in WORDS.items():
        signal = [f"- Signal: `{NAMES[RULES[name].signal]}`"] if name in RULES else []
        given = [
            f"- `collapse.{field}` = {shown(getattr(limits, field))}: {said}"
            for field, info in CollapseConfig.model_fields.items()
            if (said := about_rule(name, prose(info.description)))
        ]
        lines += ["", f"### `{name}`", "", words.means, "", *signal, *given, f"- Look at: {words.look}."]
    failed = [(f"`{name}`", said) for name, said in FAILURES.items()]
    return [
        *lines,
        "",
        "### Rules of a failure",
        "",
        "They end a trial as `failed`, and are never counted as a collapse.",
        "",
        *table(("rule", "meaning"), failed),
    ]


def about_rule(rule: str, description: str) -> str:
    """What a limit's docstring says after the rules that it belongs to; empty for a limit of another rule."""
    named, colon, said = description.partition(": ")
    if colon and rule in named.split(" / "):
        return said
    return description.removeprefix(f"{rule} ") if description.startswith(f"{rule} ") else ""


def statuses() -> list[str]:
    return ["Of a trial, in `rin status`, reports and MLflow.", "", *table(("status", "meaning"), code(STATUSES))]


def code(words: Mapping[Any, str]) -> list[tuple[str, str]]:
    return [(f"`{word}`", said) for word, said in words.items()]


def verdicts() -> list[str]:
    """Of differences, and of the sigma at which runs break."""
    said: Mapping[FindingVerdict, str] = VERDICTS
    rows = [(f"`{word}`", f"`{screening(word)}`", meaning) for word, meaning in said.items()]
    boundary = under_fields(Boundary)["status"]
    return [
        "Of an arm against its control. Only a confirmation or a programme says `better` or `worse`; a sweep's report",
        "has words of its own ([how sweeps are judged](how-sweeps-are-judged.md)).",
        "",
        *table(("confirmation", "report", "meaning"), rows),
        "",
        "Of the sigma at which half the runs collapse (`tolerance` in `rin report --json`): " + boundary,
    ]


def by_name() -> list[str]:
    found = [(f"`{name}`", prose(inspect.getdoc(propose))) for name, propose in SEARCHERS.items()]
    judged = [(f"`{name}`", objective.direction) for name, objective in OBJECTIVES.items()]
    return [
        *table(("searcher", "how it proposes"), found),
        "",
        *table(("objective", "is to"), [*judged, ("`pass@K`", "maximize")]),
        "",
        f"`rin export --to`: {', '.join(f'`{name}`' for name in (*EXPORTS, 'checkpoint'))} ([export.md](export.md)).",
    ]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """A table for each; what many share stands in front."""
    found = dict(every_command(typer.main.get_command(app), "rin"))
    offered = {
        name: [option(one) for one in command.params if not getattr(one, "hidden", False) and one.name != "help"]
        for name, command in found.items()
    }
    count = Counter(row for rows in offered.values() for row in rows)
    shared = [row for row in count if count[row] > 2]
    head = ("option", "meaning")
    lines = [
        "Exit codes: 0 done (a collapse is a result), 2 your mistake, 1 a failure.",
        "",
        "### Options that commands share",
        "",
        *table(head, shared),
    ]
    for name, command in found.items():
        own = [row for row in offered[name] if row not in shared]
        also = [row[0] for row in offered[name] if row in shared]
        lines += ["", f"### `{name}`", "", prose(command.help)]
        lines += ["", *table(head, own)] if own else []
        lines += ["", f"Also {', '.join(also)}."] if also else []
    return lines


def every_command(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(command, typer.core.TyperGroup):
        for inner in command.commands.values():
            yield from every_command(inner, f"{name} {inner.name}")
    elif not command.hidden:
        yield name, command


def option(one: Any) -> tuple[str, str]:
    """Its names; its help, with the default where it has one."""
    argument = isinstance(one, typer.core.TyperArgument)
    names = (
        f"`{str(one.name).upper()}`"
        if argument
        else ", ".join(f"`{name}`" for name in [*one.opts, *one.secondary_opts])
    )
    said = [prose(one.help)]
    if one.required:
        said.append("Required.")
    elif one.default not in (None, False, "", [], ()):
        said.append(f"*Default* `{one.default}`.")
    return names, " ".join(said)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print("wrote docs/reference.md")

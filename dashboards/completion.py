"""What the shell offers behind `rin` when Tab is pressed: one table from options and arguments to words.

The shell starts `rin` for each Tab, so nothing here imports more than the words come from. Commands and options are
typer's to complete; an argument that several commands share (NAME, --set) is in the table once, and a new command has
it with its name. What is no name of ours is a file: where nothing is offered, the shell completes those.

Left out: sweeps in an object store, which a Tab would wait for; a `--store` to the right of the cursor.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from dashboards.options import DEFAULT_STORE
from spaces.errors import ConfigError

ASKED = "_RIN_COMPLETE"
"""Variable that the shell's script sets, which `rin --install-completion` writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """As typer's own: it writes `value`, and `help` beside it where the shell shows that."""

    value: str
    help: str = ""
    type: str = "plain"


def offering(command: Any, path: str = "") -> Any:
    """The command, its parameters and those of its own commands with what the table has for them."""
    for parameter in command.params:
        flag = max(parameter.opts, key=len)
        name = flag if flag.startswith("-") else flag.upper()
        words = WORDS.get(f"{path}{name}") or WORDS.get(name)
        if words is not None:
            parameter.shell_complete = partial(_offers, words, name in LISTS)
    for name, inner in getattr(command, "commands", {}).items():
        offering(inner, f"{path}{name} ")
    return command


def _offers(words: Callable[[Any], Iterator[Offer]], several: bool, context: Any, incomplete: str) -> list[Offer]:
    """`several`: words behind commas; the last one is completed."""
    head, comma, last = incomplete.rpartition(",") if several else ("", "", incomplete)
    try:
        found = [offer for offer in words(context) if offer.value.startswith(last)]
    except (OSError, ConfigError):  # a store that is not to be read
        return []
    return [Offer(value=f"{head}{comma}{offer.value}", help=offer.help) for offer in found]


def _store(context: Any) -> Path | None:
    """Where the options to the left of the cursor say that sweeps lie."""
    from spaces.paths import home

    store = context.params.get("store") or DEFAULT_STORE
    return None if "://" in store else home(store)


def _sweeps(context: Any) -> Iterator[Offer]:
    store = _store(context)
    for file in sorted(store.glob("*/study.json") if store else ()):
        if not file.parent.name.startswith("."):
            yield Offer(value=file.parent.name)


def _deleted(context: Any) -> Iterator[Offer]:
    store = _store(context)
    names = {file.parent.name.rpartition("-")[0] for file in (store.glob(".trash/*/study.json") if store else ())}
    yield from (Offer(value=name) for name in sorted(names))


def _arms(context: Any) -> Iterator[Offer]:
    import json

    # Before an option without its value yet, the parser leaves arguments where they were.
    store, name = _store(context), context.params.get("name") or next(iter(context.args), "")
    for file in sorted(store.glob(f"{name}/arms/*.json") if store and name else ()):
        tree = json.loads(file.read_bytes())
        if tree["origin"] != "control":
            yield Offer(value=tree["name"])


def _spaces(context: Any) -> Iterator[Offer]:
    from spaces.library import SPACES

    yield from (Offer(value=name, help=space.description) for name, space in SPACES.items())


def _workloads(context: Any) -> Iterator[Offer]:
    from spaces.workloads import WORKLOADS

    yield from map(_plain, WORKLOADS)


def _points(context: Any) -> Iterator[Offer]:
    from spaces.points import POINTS

    yield from map(_plain, POINTS)


def _recorded(context: Any) -> Iterator[Offer]:
    from spaces.points import POINTS

    yield from (_plain(name) for name, point in POINTS.items() if point.collapsed_at_step is not None)


def _settings(context: Any) -> Iterator[Offer]:
    """`noise.sigma_start=`"""
    from spaces.config import TrialConfig
    from spaces.reading import flatten_fields

    yield from (Offer(value=f"{key}=") for key in flatten_fields(TrialConfig))


def _searchers(context: Any) -> Iterator[Offer]:
    from search.store import SearcherName

    yield from map(_plain, get_args(SearcherName))


def _objectives(context: Any) -> Iterator[Offer]:
    from search.store import ObjectiveName

    yield from map(_plain, (*get_args(ObjectiveName), "pass@"))


def _exports(context: Any) -> Iterator[Offer]:
    from search.export import EXPORTS

    yield from map(_plain, (*EXPORTS, "checkpoint"))


def _plain(word: str) -> Offer:
    return Offer(value=word)


WORDS: dict[str, Callable[[Any], Iterator[Offer]]] = {
    "NAME": _sweeps,
    "OTHER": _sweeps,
    "--from": _sweeps,
    "--ablate": _sweeps,
    "--warm-start": _sweeps,
    "srdd --sweep": _sweeps,
    "restore NAME": _deleted,
    "--arm": _arms,
    "SPACE": _spaces,
    "MODEL": _workloads,
    "--workload": _workloads,
    "POINT": _points,
    "--points": _points,
    "--evidence": _recorded,
    "--set": _settings,
    "--searcher": _searchers,
    "--objective": _objectives,
    "--to": _exports,
}
"""Option, or argument in capitals; with its command before it where only that one means it so."""
LISTS = {"--points", "--evidence"}


def asked() -> bool:
    return ASKED in os.environ

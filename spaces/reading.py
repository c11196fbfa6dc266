"""From text to a TrialConfig: YAML 1.2 files, dotted `--set` overrides, and one line for each mistake.

YAML 1.2 throughout, for files and for values on the command line: `off` stays text and `1e-3` is a number, neither of
which holds for the YAML 1.1 that most parsers speak. Only plain data is read (no tags that build objects). Trees are
merged leaf by leaf, so that a point lies on a workload and an override on both.
"""

import difflib
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from spaces.config import ConfigError, Record, TrialConfig


def read_config(source: Mapping[str, Any], overrides: Iterable[str] = (), origin: str = "config") -> TrialConfig:
    """Validate a tree of plain values after dotted `key=value` overrides.

    Raises ConfigError: one line with the key, the value and the remedy.
    """
    tree = merge(source, parse_overrides(overrides))
    try:
        return TrialConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, TrialConfig, origin)) from None


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of `base` in which the leaves of `changes` win; an empty mapping in them is a leaf, and empties."""
    merged: dict[str, Any] = {
        key: merge(value, {}) if isinstance(value, Mapping) else value for key, value in base.items()
    }
    for key, value in changes.items():
        here = merged.get(key)
        merged[key] = (
            merge(here, value) if isinstance(here, Mapping) and isinstance(value, Mapping) and value else value
        )
    return merged


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"noise.sigma_start": 0.05} -> {"noise": {"sigma_start": 0.05}}.

    Raises ConfigError when one key runs through another's value: one of the two would be lost.
    """
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{dotted}={value}: {part} already has a value; give either the whole or its parts")
        if leaf in node:
            raise ConfigError(f"{dotted}={value}: parts of it already have values; give either the whole or its parts")
        node[leaf] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `unflatten`; empty mappings vanish."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["noise.sigma_start=1e-3", "grpo.filter_groups=off"]` -> a tree; values are YAML 1.2 (`off` is text, `1e-3` a
    number)."""
    flat: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {override}: expected dotted.key=value, for example noise.sigma_start=0.02")
        flat[key.strip()] = parse_yaml(text, origin=f"--set {key.strip()}")
    return unflatten(flat)


def parse_yaml(text: str, origin: str) -> Any:
    """YAML 1.2, data only (no tags that build objects). Raises ConfigError."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (
        YAMLError,
        ValueError,
    ) as error:  # ValueError: a scalar that only looks like a date or, by its tag, a number
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{origin}: not valid YAML{where}: {getattr(error, 'problem', None) or error}; quote text values"
        ) from None


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ConfigError."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), origin=str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text; give the path of a YAML file") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not a mapping of settings")
    return tree


def dump_yaml(tree: Mapping[str, Any], comment: str = "") -> str:
    """YAML 1.2 text of plain values, `comment` first as # lines."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(json.loads(json.dumps(tree)), stream)
    return "".join(f"# {line}\n" for line in comment.splitlines()) + stream.getvalue()


def as_tree(config: BaseModel) -> dict[str, Any]:
    """Plain values (lists, not tuples) that JSON, YAML and Ray can carry."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    return tree


def explain(error: ValidationError, model: type[BaseModel], origin: str) -> str:
    """A pydantic error as one line: key, value, remedy; one problem of it, or all the keys that are missing. A misspelt
    key comes before the missing one that it causes."""
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    path = _path(problem)
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        if problem["input"] is None and re.search(r":\S", path[-1]):
            name, _, value = path[-1].partition(":")
            return f"{origin}: {key}: in YAML a space follows the colon: {{{name}: {value}}}"
        known = flatten_fields(model)
        near = difflib.get_close_matches(".".join(part for part in path if not part.isdigit()), known, n=1, cutoff=0.0)
        same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == path[-1]]
        return f"{origin}: unknown key {key}={_short(problem['input'])}; did you mean {(same_leaf or near)[0]}?"
    missing = [".".join(_path(problem)) for problem in error.errors() if problem["type"] == "missing"]
    if problem["type"] == "missing" and len(missing) > 1:
        return f"{origin}: {', '.join(missing)}: Fields required"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] in ("value_error", "missing") else f"={_short(problem['input'])}"
    return f"{origin}: {key or 'settings'}{given}: {message}"


def _path(problem: Any) -> list[str]:
    """The keys to a problem, without the names of types that pydantic puts between them."""
    *parents, leaf = problem["loc"] or ("",)
    path = [str(part) for part in parents if not _is_union_branch(part)]
    keep = problem["type"] == "extra_forbidden" or not _is_union_branch(leaf)
    return [*path, str(leaf)] if keep else path


def _is_union_branch(part: Any) -> bool:
    text = str(part)
    return "[" in text or text in ("tuple", "int", "str", "float", "bool")


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def flatten_fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key a configuration of this type may hold."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for part in parts(field):
            names += flatten_fields(part, f"{prefix}{name}.")
    return names


def parts(field: FieldInfo) -> list[type[Record]]:
    """The records that a field holds."""
    kinds = (field.annotation, *get_args(field.annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Record)]

"""Settings that name files: which they are says the configuration, where they lie is settled when they are read.

A trial runs in another folder than the command that asked for it, and often on another machine. So a path is made
absolute where it comes in: on the command line from the current folder, in a YAML file (a space, a point, a trial) from
that file's folder; `~` is the user's home. Of a list every member is one. `model.name` may be a name instead
(`embedded`, an id on a hub): it is a path where it is written as one (`./`, `../`, `~`) or where something of that name
lies there, and what is no path stays as it is.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spaces.config import FUNCTION, Record, TrialConfig
from spaces.reading import flatten, load_yaml, merge, parts, unflatten


def path_settings(model: type[Record] = TrialConfig, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Dotted keys that the configuration marks as paths -> names that may stand there instead, and beginnings of such
    names (`hub:`); (): always a path."""
    found: dict[str, tuple[str, ...]] = {}
    for name, field in model.model_fields.items():
        marks = field.json_schema_extra
        names = marks.get("path") if isinstance(marks, dict) else None
        if isinstance(names, list):
            found[prefix + name] = tuple(str(other) for other in names)
        for part in parts(field):
            found |= path_settings(part, f"{prefix}{name}.")
    return found


PATHS = path_settings()


def anchored(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of the settings in which relative paths begin at `folder`."""
    return merge(tree, unflatten({key: anchored_value(key, value, folder) for key, value in _given(tree)}))


def anchored_value(key: str, value: Any, folder: Path) -> Any:
    """The value of one dotted key, or its list; whatever is no path comes back as it is."""
    if key in PATHS and isinstance(value, list | tuple):
        return type(value)(anchored_value(key, one, folder) for one in value)
    if key not in PATHS or not isinstance(value, str) or not value:
        return value
    if PATHS[key] == (FUNCTION,):
        file, colon, function = value.rpartition(":")
        return f"{(folder / home(file)).absolute()}{colon}{function}" if file.endswith(".py") else value
    prefixes = tuple(name for name in PATHS[key] if name.endswith(":"))
    if value.startswith(prefixes):
        return value
    names, path = set(PATHS[key]).difference(prefixes), folder / home(value)
    if names and not value.startswith(("./", "../", "~")) and (value in names or not path.exists()):
        return value
    return str(path.absolute())


def relative_paths(tree: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """(dotted key, path) of every setting that means something else in another folder or on another machine; code goes
    along."""
    return [
        (key, value)
        for key, value in _given(tree)
        if PATHS[key] != (FUNCTION,) and anchored_value(key, value, folder) != value
    ]


def load_settings(path: Path) -> dict[str, Any]:
    """Settings of a trial from a YAML file, its paths from the file's folder. Raises ConfigError."""
    return anchored(load_yaml(path), path.parent)


def home(path: str) -> Path:
    """`~/q.jsonl` -> /home/me/q.jsonl; a `~` of nobody is a name like another."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _given(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in flatten(tree).items() if key in PATHS)

"""Files of other people -> runs.

Scripts are read, never run. A shell script is taken line by line: variables that are set once, outside of any block,
are put in; what stands inside of an `if` or `case` is given, with a value that is not known; words that look like a
hydra override (`section.key=value`) or, behind `qerl.py`, like an option count as settings, wherever they stand, so
that arrays and echoed commands in logs are read alike. Python is taken by its syntax tree: what GRPOConfig and our
records are called with. YAML and JSON are trees.
"""

import ast
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from search.audit.run import UNKNOWN, LogLine, Run, Setting
from search.foreign import System, option_names
from spaces.errors import ConfigError

LOG_MARKS = ("[AQN]", "num_gen_batches", "critic/", "val-core/", "step:", "{'loss'", "'reward'")
"""What a log of these trainers is known by."""
LONGEST = 2000
"""Characters of a line that rules look at; completions in logs are longer."""
RECORDS = ("GRPOConfig", "QeRLConfig", "NoiseConfig", "QuantConfig", "CollapseConfig", "LoraConfig")

_LAUNCH = re.compile(r"(?:-m\s+|\s|^)((?:[\w.]+\.)?main_(?:ppo|dapo)|\S*\brun_grpo\.py)\b|(\S*(?:qerl|grpo\w*)\.py)\b")
"""What takes overrides, and what takes options."""
_OVERRIDE = re.compile(r"^(\+{0,2})([A-Za-z_]\w*(?:\.\w+)+)=(.*)$", re.DOTALL)
_SECTIONS = {"actor_rollout_ref", "algorithm", "data", "trainer", "reward", "reward_model", "critic"}
_SECTIONS |= {"custom_reward_function", "noise_injection", "hw_error_injection"}
_NEMO = {"grpo", "policy", "loss_fn", "checkpointing", "cluster", "env", "logger"}
_HINT = re.compile(rf"\b(?:{'|'.join(sorted(_SECTIONS | _NEMO))})\.[\w.]+=")
_ASSIGNED = re.compile(r"^\s*(?:export\s+|local\s+|readonly\s+)?([A-Za-z_]\w*)=(.*)$")
_INLINE = re.compile(r"(?:\bthen|\belse|\bdo|&&|\|\||;)\s*([A-Za-z_]\w*)=")
_BLOCK = re.compile(r"^\s*(if|for|while|case|until)\b|^\s*[\w-]+\s*\(\)\s*\{?\s*$")
_BLOCK_END = re.compile(r"^\s*(fi|done|esac|\})\s*;?\s*$")
_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")
_MEANT = re.compile(r"rin audit: ([\w-]+) is meant")


def read_runs(path: str) -> tuple[Run, ...]:
    """Raises ConfigError for a file that cannot be read, or in which nothing of these trainers stands."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: no text in UTF-8 (byte {error.start}); give a script, YAML, JSON or a log"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    suffix = Path(path).suffix
    try:
        if suffix == ".py":
            runs = tuple(_of_python(path, text))
        elif suffix in (".yaml", ".yml", ".json"):
            runs = tuple(_of_tree(path, text))
        else:
            runs = tuple(_of_shell(path, text))
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply to be a configuration of these trainers") from None
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno or 1}: no Python of this version: {error.msg}") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: no YAML or JSON: {' '.join(str(error).split())[:200]}") from None
    if not runs and suffix == ".py" and "GRPOConfig" in text:
        raise ConfigError(
            f"{path}: no setting stands in it: GRPOConfig comes from outside; give the script that starts it"
        )
    if not runs:
        raise ConfigError(
            f"{path}: nothing of verl, TRL, QeRL or NeMo RL stands in it; give a script, a configuration or a log"
        )
    return runs


def _meant(text: str) -> frozenset[str]:
    return frozenset(_MEANT.findall(text))


# --- shell and logs ---------------------------------------------------------------------------------------------------


def _of_shell(path: str, text: str) -> Iterator[Run]:
    """A run for each launch; settings in front of the first one belong to all."""
    variables = _variables(text)
    shared, parts = list[Setting](), list[tuple[int, str, list[Setting]]]()
    kept = list[LogLine]()
    bare = next((line for line in text.splitlines() if line.strip() and line[0] != "#"), "").startswith("--")
    options = bare  # a file of options alone
    inside = 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.rstrip().removesuffix("\\").rstrip()
        if line.lstrip().startswith("#"):
            continue
        kept.append(LogLine(number=number, text=line[:LONGEST]))
        launch = _LAUNCH.search(line)
        if launch and not line.lstrip().startswith("echo"):
            parts.append((number, (launch[1] or launch[2]), []))
            options = launch[2] is not None
        inside = max(0, inside - bool(re.match(r"\s*(fi|esac)\b", line)))
        into = parts[-1][2] if parts else shared
        found = _settings(_words(line), number, variables, options) if options or _HINT.search(line) else ()
        into += [replace(setting, value=UNKNOWN) for setting in found] if inside else found
        inside += bool(re.match(r"\s*(if|case)\b", line) and not re.search(r"\b(fi|esac)\b\s*$", line))
        options = bare or (options and raw.rstrip().endswith("\\"))
    log = any(mark in line.text for line in kept for mark in LOG_MARKS)
    if not parts and (shared or log):
        parts = [(shared[0].line if shared else 1, "", [])]
    for number, entry, own in parts:
        given = (*shared, *own)
        system = _system(entry, given, text)
        if system is not None:
            yield Run(
                path=path,
                system=system,
                given=given,
                lines=tuple(kept),
                launch=number,
                entry=entry,
                meant=_meant(text),
            )


def _system(entry: str, given: Sequence[Setting], text: str) -> System | None:
    keys = {setting.key for setting in given}
    if entry.endswith("run_grpo.py"):
        return "nemo-rl"
    if entry.endswith(".py") and not entry.endswith("qerl.py"):
        return "trl"
    if entry.endswith("qerl.py") or any(setting.key in ("sigma_start", "num_stages") for setting in given):
        return "qerl"
    noise = any(".noise_injection" in f".{key}" or ".hw_error_injection" in f".{key}" for key in keys)
    if noise or "main_dapo" in entry or "[AQN]" in text:
        return "verl"
    if keys and not any("." in key for key in keys):
        return "qerl"
    known = [key.split(".")[0] in _SECTIONS for key in keys]
    if entry or any(known) or any(mark in text for mark in ("critic/", "val-core/", "num_gen_batches")):
        return "verl-upstream"
    return "trl" if any(mark in text for mark in ("{'loss'", "'reward'")) else None


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # a quote that ends on another line
        return line.split()


def _settings(words: Sequence[str], number: int, variables: Mapping[str, Any], options: bool) -> Iterator[Setting]:
    for place, word in enumerate(words):
        override = _OVERRIDE.match(word)
        if override and override[2].split(".")[0] in _SECTIONS | _NEMO:
            value = _scalar(_filled(override[3], variables))
            yield Setting(key=override[2], value=value, line=number, added=bool(override[1]))
        elif options and word.startswith("--") and len(word) > 2:
            name, joined, rest = word[2:].partition("=")
            following = rest if joined else [*words[place + 1 :], "--"][0]
            value = True if following.startswith("--") else _scalar(_filled(following, variables))
            yield Setting(key=name.replace("-", "_"), value=value, line=number)


def _variables(text: str) -> dict[str, Any]:
    """What is assigned once, outside of blocks; the rest is UNKNOWN."""
    found, depth = dict[str, Any](), 0
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue
        depth = max(0, depth - 1) if _BLOCK_END.match(line) else depth
        assigned = _ASSIGNED.match(line)
        if assigned and not assigned[2].startswith("("):
            name, value = assigned[1], assigned[2]
            plain = _words(value.split(" #")[0])
            known = depth == 0 and name not in found
            found[name] = _filled(plain[0] if plain else "", found) if known else UNKNOWN
        found |= dict.fromkeys(_INLINE.findall(line), UNKNOWN)
        depth += 1 if _BLOCK.match(line) and not re.search(r"\b(fi|done|esac)\b\s*$", line) else 0
    return found


def _filled(text: str, variables: Mapping[str, Any]) -> Any:
    """With its variables in their places; UNKNOWN where one is not known."""
    if "$(" in text or "`" in text:
        return UNKNOWN
    values = list[Any]()

    def put(found: re.Match[str]) -> str:
        values.append(variables.get(found[1] or found[3], UNKNOWN if found[2] is None else found[2]))
        return str(values[-1])

    filled = _VARIABLE.sub(put, text)
    return UNKNOWN if any(value is UNKNOWN for value in values) or "$" in filled else filled


@lru_cache(4096)
def _scalar(text: Any) -> Any:
    """As hydra and transformers read it."""
    if text is UNKNOWN or not text:
        return text
    try:
        value = YAML(typ="safe", pure=True).load(text.replace("'", '"') if text.startswith("[") else text)
    except YAMLError:
        return text
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return {"True": True, "False": False, "None": None}.get(value, value) if isinstance(value, str) else value


# --- trees ------------------------------------------------------------------------------------------------------------


def _of_tree(path: str, text: str) -> Iterator[Run]:
    tree = YAML(typ="rt").load(text)
    if not isinstance(tree, dict):
        return
    given = tuple(_leaves(tree))
    tops = {str(key) for key in tree}
    system: System | None = None
    if tops & {"actor_rollout_ref", "trainer", "algorithm"}:
        noise = any("noise_injection" in setting.key or "hw_error" in setting.key for setting in given)
        system = "verl" if noise else "verl-upstream"
    elif {"noise", "quant"} & tops and "grpo" in tops:
        raise ConfigError(f"{path}: a trial of this program, which checks itself: rin trial --config {path}")
    elif tops & {"grpo", "policy", "loss_fn"} or ("defaults" in tops and tops <= _NEMO | {"defaults", "data"}):
        system = "nemo-rl"
    elif tops & {"sigma_start", "num_stages", "ln"}:
        system = "qerl"
    elif len(tops & option_names("trl").names) >= max(2, len(tops) // 2):
        system = "trl"
    if system is not None:
        lines = tuple(LogLine(number=n, text=line) for n, line in enumerate(text.splitlines(), 1))
        yield Run(path=path, system=system, given=given, lines=lines, meant=_meant(text))


def _leaves(tree: Any, prefix: str = "") -> Iterator[Setting]:
    for key, value in tree.items():
        if f"{prefix}{key}" in ("defaults", "hydra") or str(key) == "_target_":
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            plain = UNKNOWN if isinstance(value, str) and "${" in value else value
            items = list(plain) if isinstance(plain, list) else plain
            own = tree.lc.data or {}  # what another mapping was merged into has no place of its own
            line = (own[key][0] if key in own else tree.lc.line) + 1
            yield Setting(key=f"{prefix}{key}", value=items, line=line, added=True)


# --- Python -----------------------------------------------------------------------------------------------------------


def _of_python(path: str, text: str) -> Iterator[Run]:
    tree = ast.parse(text)
    names = _constants(tree)
    given, launch = list[Setting](), 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).rpartition(".")[2]
        if called not in RECORDS:
            continue
        launch = launch or node.lineno
        section = "" if called in ("GRPOConfig", "QeRLConfig") else f"{called}."
        for keyword in node.keywords:
            if keyword.arg is not None:
                value = _literal(keyword.value, names)
                given.append(Setting(key=f"{section}{keyword.arg}", value=value, line=keyword.value.lineno))
    if launch:
        lines = tuple(
            LogLine(number=n, text=line)
            for n, line in enumerate(text.splitlines(), 1)
            if not line.lstrip().startswith("#")
        )
        yield Run(path=path, system="trl", given=tuple(given), lines=lines, launch=launch, meant=_meant(text))


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Names that the module gives one literal, once."""
    found = dict[str, Any]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            found[name] = UNKNOWN if name in found or node not in tree.body else _literal(node.value, {})
    return found


def _literal(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id, UNKNOWN)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN

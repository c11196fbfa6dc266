"""How other trainers call their rewards: the worker's side, in which the user's own functions are loaded and called.

- `verl`: one answer at a time, `f(data_source=..., solution_str=..., ground_truth=..., extra_info=..., **options)`;
  gives a number, or a mapping with `score`, whose other numbers are marks too.
- `trl`: all answers in one call, `f(prompts=..., completions=..., completion_ids=..., <columns>, trainer_state=...,
  log_extra=..., log_metric=..., **options)`; gives a list of numbers, and None where it does not apply. Completions are
  messages where the prompt is messages, else texts. What it logs is a mark.
- `verifiers`: one answer at a time, and only the arguments that the function names, of `completion` and `prompt`
  (messages), `answer`, `info`, `task`, `state`. `state` is one mapping for all functions of an answer, which are called
  in their order.
- `python`: one answer at a time, `f(row, completion)`: the row is what `questions` gave, the completion its text.

Every answer has a row of its own: what a function does to one is not there for the next answer. What a function says
beside its score never takes the place of another mark: it then stands behind the function's name.

Each may be `async def`: answers are then waited for together. An error is told with the file and line of the user's
code that it came from, and with the row. In a batched call the row is looked for, by calling with halves of the batch.

A function is written `path/to/file.py:function` or `package.module:function`. A file is read once, hashed as it was
read, and run in its own folder, which is also where its imports begin.
"""

import asyncio
import copy
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_LIBRARY, _SITE = str(Path(os.__file__).parent), "site-packages"
"""Where code lies that is not the user's own."""
Row = Mapping[str, Any]
"""What a function needs of a question: prompt, answer, and what else the row holds."""
Asked = tuple[Row, str, Sequence[int]]
"""A row, and of an answer to it the text and the token ids."""
Marks = dict[str, float | None]


class Mistake(Exception):
    """Of the user's code: what, and in which answer of the call (None: in none that could be told)."""

    def __init__(self, what: str, row: int | None = None) -> None:
        super().__init__(what)
        self.row = row


class UserCode:
    """The functions of one task, called as their trainer calls them."""

    def __init__(self) -> None:
        self.convention, self.options = "", dict[str, Any]()
        self.names: list[str] = []
        self.functions: list[Callable[..., Any]] = []
        self.modules: dict[str, tuple[ModuleType, str]] = {}
        self.runner = asyncio.Runner()

    def open(self, convention: str, functions: Sequence[tuple[str, str]], options: Mapping[str, Any]) -> list[str]:
        """Load; `functions`: name of the mark, and how it is written. Returns the sha256 of the file of each."""
        self.convention, self.options = convention, dict(options)
        hashes = []
        for mark, written in functions:
            source, _, name = written.rpartition(":")
            module, sha256 = self._module(source)  # of a package: none yet
            function = getattr(module, name, None)
            if not callable(function):
                raise Mistake(f"{source} has no function {name}; it has {_functions_of(module)}")
            self.functions.append(function)
            self.names.append(mark)
            hashes.append(sha256 or _hash_of(function, module))
        return hashes

    def call(self, function: str, arguments: Sequence[Any]) -> Any:
        """What a function of the first file gives; for tasks that are files."""
        (module, _), *_ = self.modules.values()
        try:
            given = getattr(module, function)(*arguments)
            return self.runner.run(_value_of(given)) if inspect.isawaitable(given) else given
        except Mistake:
            raise
        except BaseException as error:
            raise Mistake(_told(error)) from error

    def score(self, rows: Sequence[Row], asked: Sequence[tuple[int, str, Sequence[int]]]) -> list[Marks]:
        """`asked`: (number of the row, text, token ids) of every answer."""
        answers = [(copy.deepcopy(rows[row]), text, ids) for row, text, ids in asked]
        return self._batched(answers) if self.convention == "trl" else self._one_by_one(answers)

    # --- loading ------------------------------------------------------------------------------------------------------

    def _module(self, source: str) -> tuple[ModuleType, str]:
        if source not in self.modules:
            try:
                self.modules[source] = from_file(Path(source)) if source.endswith(".py") else _from_package(source)
            except Mistake as mistake:
                raise Mistake(f"{source} {mistake}") from None
            except BaseException as error:
                raise Mistake(f"{source} does not load: {_told(error)}") from error
        return self.modules[source]

    # --- calling ------------------------------------------------------------------------------------------------------

    def _one_by_one(self, asked: Sequence[Asked]) -> list[Marks]:
        if any(map(_is_async, self.functions)):
            return self.runner.run(self._at_once(asked))
        return [self._marks(number, self._given(number, one)) for number, one in enumerate(asked)]

    async def _at_once(self, asked: Sequence[Asked]) -> list[Marks]:
        """Answers at the same time, the functions of an answer one after another. Raises the first row's mistake."""

        async def marks(number: int, one: Asked) -> Marks:
            given = []
            for result in self._given(number, one):
                try:
                    given.append(await result if inspect.isawaitable(result) else result)
                except BaseException as error:
                    raise Mistake(_told(error), number) from error
            return self._marks(number, given)

        found = await asyncio.gather(*map(marks, range(len(asked)), asked), return_exceptions=True)
        for outcome in found:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in found if not isinstance(outcome, BaseException)]

    def _given(self, number: int, asked: Asked) -> Iterator[Any]:
        """What each function returns, one after another."""
        shared: dict[str, Any] = {}
        for function in self.functions:
            try:
                positional, named = _ARGUMENTS[self.convention](function, asked, shared, self.options)
                yield function(*positional, **named)
            except BaseException as error:
                raise Mistake(_told(error, function), number) from error

    def _marks(self, number: int, given: Iterable[Any]) -> Marks:
        """Of all functions for one answer."""
        marks: Marks = {}
        for name, result in zip(self.names, given, strict=True):
            if isinstance(result, Mapping):
                if "score" not in result:
                    raise Mistake(f"{name} returned a mapping without score: {result!r:.60}", number)
                more, result = {key: _float(value) for key, value in result.items() if key != "score"}, result["score"]
                for key, value in more.items():
                    self._put(marks, name, str(key), value)
            marks[name] = _number(name, result, number)
        return marks

    def _put(self, marks: Marks, name: str, key: str, value: float | None) -> None:
        """What function `name` says beside its score; behind its name where something else is called so."""
        marks[f"{name}/{key}" if key in self.names or marks.get(key) is not None else key] = value

    def _batched(self, asked: Sequence[Asked]) -> list[Marks]:
        marks: list[Marks] = [{} for _ in asked]
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                given = self._call_batched(name, function, asked, marks)
            except BaseException as error:
                raise Mistake(_told(error, function), self._culprit(name, function, asked, 0)) from error
            if isinstance(given, str | Mapping) or not hasattr(given, "__len__"):
                raise Mistake(f"{name} returned {given!r:.60}, and should return a list of numbers")
            if len(given) != len(asked):
                raise Mistake(f"{name} returned {len(given)} rewards for {len(asked)} completions")
            for number, one in enumerate(given):
                marks[number][name] = _number(name, one, number)
        return marks

    def _call_batched(
        self, name: str, function: Callable[..., Any], asked: Sequence[Asked], marks: Sequence[Marks]
    ) -> Any:
        """What is logged becomes marks: of each answer, and of all of them the mean of what was said of the batch."""
        of_batch: dict[str, list[float]] = {}

        def log_extra(column: str, values: Sequence[Any]) -> None:
            for mark, value in zip(marks, values, strict=True):
                if (number := _float(value)) is not None:
                    self._put(mark, name, column, number)

        def log_metric(metric: str, value: float) -> None:
            of_batch.setdefault(metric, []).append(float(value))

        given = function(**_columns(asked), log_extra=log_extra, log_metric=log_metric, **self.options)
        given = self.runner.run(_value_of(given)) if inspect.isawaitable(given) else given
        for metric, values in of_batch.items():
            for mark in marks:
                self._put(mark, name, metric, sum(values) / len(values))
        return given

    def _culprit(self, name: str, function: Callable[..., Any], asked: Sequence[Asked], first: int) -> int | None:
        """The answer that alone makes it raise, if one does."""
        if len(asked) == 1:
            return first
        half = len(asked) // 2
        for start, part in ((0, asked[:half]), (half, asked[half:])):
            try:
                self._call_batched(name, function, part, [{} for _ in part])
            except BaseException:
                return self._culprit(name, function, part, first + start)
        return None


def from_file(path: Path) -> tuple[ModuleType, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Mistake(f"cannot be read ({error.strerror}); give the path of the file") from None
    os.chdir(path.parent)
    sys.path.insert(0, str(path.parent))
    name = path.stem if path.stem not in sys.modules else f"user_{path.stem}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(content, str(path), "exec"), module.__dict__)
    return module, hashlib.sha256(content).hexdigest()


def _from_package(name: str) -> tuple[ModuleType, str]:
    return importlib.import_module(name), ""


def _hash_of(function: Callable[..., Any], module: ModuleType) -> str:
    """Of the file that it is written in: a package hands on what lies in other files."""
    home = sys.modules.get(getattr(function, "__module__", None) or "", module)
    file = getattr(home, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _told(error: BaseException, called: Callable[..., Any] | None = None) -> str:
    """`reward.py:12: ZeroDivisionError: division by zero`: the innermost line that is the user's own, or else the
    innermost of all; where a function took other arguments, that one's first line."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if not frame.filename.startswith((_LIBRARY, "<")) and _SITE not in frame.filename]
    where = [f"{frame.filename}:{frame.lineno}: " for frame in (own or frames)[-1:]]
    if not where and (code := getattr(called, "__code__", None)) is not None:
        where = [f"{code.co_filename}:{code.co_firstlineno}: "]
    return f"{''.join(where)}{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _functions_of(module: ModuleType) -> str:
    """Those that are written in it."""
    own = [name for name, held in vars(module).items() if getattr(held, "__module__", None) == module.__name__]
    return ", ".join(name for name in own if inspect.isfunction(vars(module)[name])) or "none"


async def _value_of(given: Any) -> Any:
    return await given


def _is_async(function: Callable[..., Any]) -> bool:
    """Also of an object with an `async def __call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


# --- what a function is given -----------------------------------------------------------------------------------------

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


def _verl(function: Callable[..., Any], asked: Asked, shared: dict[str, Any], options: Mapping[str, Any]) -> Arguments:
    row, text, _ = asked
    extra = {**(row["extra_info"] or {}), "num_turns": 2, "rollout_reward_scores": {}}
    named = {"data_source": row["data_source"], "solution_str": text, "ground_truth": row["ground_truth"]}
    return (), {**named, "extra_info": extra, **options}


def _python(
    function: Callable[..., Any], asked: Asked, shared: dict[str, Any], options: Mapping[str, Any]
) -> Arguments:
    row, text, _ = asked
    return (dict(row), text), options


def _verifiers(
    function: Callable[..., Any], asked: Asked, shared: dict[str, Any], options: Mapping[str, Any]
) -> Arguments:
    row, text, _ = asked
    if not shared:
        shared |= {"info": {}, "task": "default", **row, "completion": [{"role": "assistant", "content": text}]}
    known = {**shared, "state": shared, **options}
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return (), known
    return (), {parameter.name: known[parameter.name] for parameter in parameters if parameter.name in known}


_ARGUMENTS: dict[str, Callable[..., Arguments]] = {"python": _python, "verifiers": _verifiers, "verl": _verl}


class _NoState:
    """In the place of a trainer's state."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state.{name}: a reward is not told here how far training is")


def _columns(asked: Sequence[Asked]) -> dict[str, Any]:
    """TRL's arguments, but for those that log. No column has the name of one of them (`trl.py`)."""
    messages = isinstance(asked[0][0]["prompt"], list)
    own = ("prompt", "completion", "completion_ids")
    keys = dict.fromkeys(key for row, _, _ in asked for key in row if key not in own)
    return {
        "prompts": [row["prompt"] for row, _, _ in asked],
        "completions": [[{"role": "assistant", "content": text}] if messages else text for _, text, _ in asked],
        "completion_ids": [list(ids) for _, _, ids in asked],
        **{key: [row.get(key) for row, _, _ in asked] for key in keys},
        "trainer_state": _NoState(),
    }


# --- what a function may give -----------------------------------------------------------------------------------------


def _float(value: Any) -> float | None:
    """Of whatever is one number, also numpy's and torch's; None of anything else."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except Exception:
        return None


def _number(name: str, value: Any, number: int) -> float | None:
    """Raises Mistake for what is neither a number nor None."""
    mark = _float(value)
    if mark is None and value is not None:
        raise Mistake(f"{name} returned {value!r:.60}, which is no number", number)
    return mark

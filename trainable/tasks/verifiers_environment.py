"""An environment of verifiers, in the worker that user code runs in: its rows, and what its rewards say of an answer.

The package has had two interfaces. The first (up to 0.2) has `load_environment(id, **options)` and a rubric of
functions, which are called here one by one with the arguments they name: its own way of calling them writes an error
into a log and goes on with 0. The second (`verifiers.v1`) has a taskset whose tasks score a trace; a trace of one
prompt and one reply is made here, as its own `replay` scores recorded ones, without a runtime.

What needs more than one reply, a tool, a sandbox, another model or the whole group is refused with that reason.
"""

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol


class Environment(Protocol):
    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(train or test, row)."""

    async def score(self, row: Mapping[str, Any], text: str) -> dict[str, float]: ...


def rows(env: str, options: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Of all sets that it has. Raises ValueError for an environment that is more than questions and marks."""
    return list(_opened(env, tuple(sorted(options.items()))).rows())


async def score(row: Mapping[str, Any], text: str, *, env: str, **options: Any) -> dict[str, float]:
    """`score`, the weighted sum, `correct`, and every function by its name."""
    return await _opened(env, tuple(sorted(options.items()))).score(row, text)


@cache
def _opened(env: str, options: tuple[tuple[str, Any], ...]) -> Environment:
    import verifiers

    if "load_environment" in {*dir(verifiers), *getattr(verifiers, "__all__", ())}:  # it may be loaded when asked for
        return _Rubric(verifiers, env, dict(options))
    return _Taskset(env, dict(options))


def _marked(marks: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """An answer is correct by the reward that weighs most."""
    total = sum(weights[name] * mark for name, mark in marks.items())
    judge = max(weights, key=weights.__getitem__)
    return {**marks, "score": total, "correct": float(marks[judge] >= 1)}


def _refuse(reason: str) -> None:
    raise ValueError(f"{reason}; only environments of one question, one answer and marks can be asked here")


class _Rubric:
    """The first interface."""

    def __init__(self, verifiers: Any, env: str, options: Mapping[str, Any]) -> None:
        self.environment = verifiers.load_environment(env, **options)
        if type(self.environment).env_response is not verifiers.SingleTurnEnv.env_response:
            _refuse(f"{type(self.environment).__name__} goes on after the first answer (it has an env_response)")
        self.functions: list[tuple[Any, float, Mapping[str, Any]]] = []
        waiting = [self.environment.rubric]
        while waiting:
            rubric = waiting.pop(0)
            waiting = [*getattr(rubric, "rubrics", ()), *waiting]
            own = zip(getattr(rubric, "funcs", ()), getattr(rubric, "weights", ()), strict=True)
            self.functions += [(function, weight, rubric.class_objects) for function, weight in own]
        for function, _, _ in self.functions:
            if {"completions", "states", "prompts", "answers"} & inspect.signature(function).parameters.keys():
                _refuse(f"{function.__name__} marks a whole group")

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from (("train", dict(row)) for row in self.environment.get_dataset())
        if self.environment.eval_dataset is not None:
            yield from (("test", dict(row)) for row in self.environment.get_eval_dataset())

    async def score(self, row: Mapping[str, Any], text: str) -> dict[str, float]:
        completion = [{"role": "assistant", "content": text}]
        state = {**row, "completion": completion, "info": row.get("info") or {}, "task": row.get("task", "default")}
        state["trajectory"] = [{"prompt": row["prompt"], "completion": completion}]
        marks, weights = dict[str, float](), dict[str, float]()
        for function, weight, objects in self.functions:
            known = {**state, **objects, "state": state}
            parameters = inspect.signature(function).parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                known = {name: known[name] for name in parameters if name in known}
            mark = function(**known)
            name = function.__name__
            if name in marks:  # of another rubric of the group
                name += f"_{sum(other.__name__ == name for other, *_ in self.functions[: len(marks)]) + 1}"
            marks[name] = float(await mark if inspect.isawaitable(mark) else mark)
            weights[name] = weight
        return _marked(marks, weights)


class _Taskset:
    """The second interface."""

    def __init__(self, env: str, options: Mapping[str, Any]) -> None:
        from verifiers.v1.envs.single_agent import SingleAgentEnv
        from verifiers.v1.task import Task
        from verifiers.v1.utils.loaders import environment_class, load_taskset, taskset_config_type

        if environment_class(env) is not SingleAgentEnv:
            _refuse(f"{environment_class(env).__name__} is an environment of its own, with agents that it runs")
        tree: dict[str, Any] = {"id": env}
        for key, value in options.items():
            *parents, leaf = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        taskset = load_taskset(taskset_config_type(env).model_validate(tree))
        if not taskset.bounded:
            _refuse(f"{env} makes tasks without end, which nothing holds in a train and a test set")
        self.tasks = list(taskset)
        kind = type(self.tasks[0]) if self.tasks else Task
        for hook in ("setup", "finalize"):
            if getattr(kind, hook) is not getattr(Task, hook):
                _refuse(f"{kind.__name__}.{hook} needs a runtime")
        if kind.NEEDS_CONTAINER or any(kind.toolsets(task.config) for task in self.tasks[:1]):
            _refuse(f"{kind.__name__} has tools, or needs a container")
        for task in self.tasks[:1]:
            if judges := task.plugged_judges():
                _refuse(f"{judges[0].reward_name} asks another model")
            for function in (*task.hooks("reward"), *task.hooks("metric")):
                runtime = inspect.signature(function).parameters.get("runtime")
                if runtime is not None and runtime.default is runtime.empty:
                    _refuse(f"{function.__name__} needs a runtime")

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, task in enumerate(self.tasks):
            told = task.data.model_dump(mode="json", exclude_none=True)
            answer = next((told[name] for name in ("answer", "solution", "ground_truth") if name in told), "")
            messages = [self._message(message) for message in self._messages(task.data)]
            yield "train", {"prompt": messages, "answer": answer, "number": number}

    @staticmethod
    def _messages(data: Any) -> list[Any]:
        from verifiers.v1.types import SystemMessage, UserMessage

        if not data.prompt:
            _refuse("a task without a prompt waits for a user to begin")
        prompt = [UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else list(data.prompt)
        return [*([SystemMessage(content=data.system_prompt)] if data.system_prompt else []), *prompt]

    @staticmethod
    def _message(message: Any) -> dict[str, Any]:
        told: dict[str, Any] = message.model_dump(mode="json", exclude_none=True)
        return told

    async def score(self, row: Mapping[str, Any], text: str) -> dict[str, float]:
        from verifiers.v1.configs.agent import AgentConfig
        from verifiers.v1.graph import MessageNode
        from verifiers.v1.trace import AgentInfo, Trace, TraceTask
        from verifiers.v1.types import AssistantMessage

        task = self.tasks[row["number"]]
        said = [*self._messages(task.data), AssistantMessage(content=text)]
        last = len(said) - 1
        nodes = [
            MessageNode(parent=number - 1 if number else None, message=message, sampled=number == last)
            for number, message in enumerate(said)
        ]
        trace = Trace(
            task=TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
            agent=AgentInfo(config=AgentConfig()),
            nodes=nodes,
            is_completed=True,
            ok=True,
        )
        await task.score(trace)
        rewards = {name: reward for name, reward in trace.rewards.items() if reward is not None}
        metrics = {name: float(value) for name, value in trace.metrics.items() if value is not None}
        marks = {name: float(reward.score) for name, reward in rewards.items()}
        return metrics | _marked(marks, {name: reward.weight for name, reward in rewards.items()})

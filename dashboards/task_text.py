"""What a trial would do with a task: its sets, a question, and whether its reward keeps its contract."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spaces.config import ConfigError, TrialConfig
from spaces.paths import anchored
from spaces.reading import merge, parse_overrides, read_config
from trainable.tasks.contract import ROWS, check_contract
from trainable.tasks.table import build_task
from trainable.tasks.task import FiniteTask

PER_STEP = 256
"""Answers of a step by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    lines: tuple[str, ...]
    good: bool
    """Whether a trial would begin with it."""


def examine_task(name: str, overrides: Sequence[str]) -> TaskReport:
    """`overrides`: task.x=... as in `--set`. Raises ConfigError for what a trial would refuse."""
    given = parse_overrides([f"task.name={name}", *overrides])
    if given.keys() != {"task"}:
        raise ConfigError(f"--set {min(given.keys() - {'task'})}: rin doctor --task takes settings of the task alone")
    model = {} if name == "addition" else {"model": {"name": "any", "recipe": None}}
    config = read_config(merge(model, anchored(given, Path.cwd())))
    return _report(config)


def _report(config: TrialConfig) -> TaskReport:
    task = build_task(config.task)
    try:
        sets = (
            ", ".join(f"{len(questions)} for {split}" for split, questions in task.questions.items())
            if isinstance(task, FiniteTask)
            else "endless"
        )
        most = len(task.questions["selection"]) if isinstance(task, FiniteTask) else ROWS
        questions = task.held_out("selection", min(ROWS, most))
        first = questions[0]
        lines = [
            f"{task.name}: questions: {sets}",
            f"the first for selection ({first.name}): {first.prompt[:200]!r} -> {first.answer[:80]!r}",
            *task.warnings,
        ]
        # Marks that look at token ids see one per character: there is no tokenizer here.
        findings = check_contract(task, questions, lambda text: [ord(c) for c in text], PER_STEP)
        lines += [f"{finding.state:11s} {finding.part}: {finding.detail}" for finding in findings]
        failed = any(finding.state == "failed" for finding in findings)
        if task.foreign is not None:
            lines += [
                f"{written}: sha256 {sha256}"
                for written, sha256 in zip(config.task.reward, task.foreign.hashes, strict=False)
            ]
    finally:
        if task.foreign is not None:
            task.foreign.close()
    return TaskReport(lines=tuple(lines), good=not failed or task.foreign is None or config.task.reward_check == "warn")

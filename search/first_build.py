"""What every trial of a sweep will build, built once before any of them starts, in a process of its own.

So a setting that touches nothing is one error, here, and not one in each trial. It takes torch, which takes seconds to
import: while this process does, the one that drives the sweep starts Ray and asks MLflow, and never imports torch
itself, unless it has to look at a GPU or at a model's own files. Only a base model that is not there yet is waited for,
because its training takes the whole machine and is shown.

    the driver    ->  {"study": .., "trials": [..]}
    this process  ->  {"done": 3, "total": 800, "what": "learning sums"}, .., perhaps {"error": ".."}, a line each

A ConfigError travels as its text; whatever else goes wrong is a bug, whose traceback stands on stderr.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from search.lineup import base_tree
from search.store import StudyConfig
from spaces.cache import base_folder
from spaces.config import ConfigError, ModelConfig, QuantConfig, TrialConfig
from spaces.narrowing import tried
from spaces.reading import as_tree, read_config
from trainable.parent import die_with

if TYPE_CHECKING:
    from trainable.policy.embedded import Progress


# --- the driver's side ------------------------------------------------------------------------------------------------


@contextmanager
def built_beside(
    config: StudyConfig, trials: Sequence[TrialConfig], progress: "Progress | None"
) -> Iterator[Callable[[], None]]:
    """Begin to build; what this gives waits for the end, and raises ConfigError for what is wrong with a setting.

    A process that was not waited for is killed.
    """
    wanted = to_build(config, trials)
    if not wanted:
        yield lambda: None
        return
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "search.first_build", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a signal to the terminal's group is for the driver, which then ends this
    )
    try:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # its exit code says more
            json.dump(
                {"study": config.model_dump_json(), "trials": [as_tree(trial) for trial in wanted]}, process.stdin
            )
            process.stdin.close()
        yield lambda: _hear(process, progress or (lambda done, total, what: None))
    finally:
        process.kill()
        process.wait()


def lacks_a_base(trials: Sequence[TrialConfig]) -> bool:
    """Whether one has to be trained first."""
    return not all(base_folder(trial.model.recipe).exists() for trial in trials if trial.model.recipe is not None)


def build_once(config: StudyConfig, trials: Sequence[TrialConfig], progress: "Progress | None") -> None:
    """The same with nothing beside it. Raises ConfigError."""
    with built_beside(config, trials, progress) as wait:
        wait()


def to_build(config: StudyConfig, trials: Sequence[TrialConfig]) -> list[TrialConfig]:
    """One trial of each kind that is quick to build, or follows a scan; of the searcher's own those that do."""
    drawn = tried(config.space, base_tree(config)).configs if config.kind == "sweep" else ()
    every = (*trials, *(trial for trial in drawn if trial.rules))
    here = config.address is None
    kinds = {(t.model, t.quant, t.noise, (t.task, t.grpo, t.rollout) if t.rules else None): t for t in every}
    return [trial for trial in kinds.values() if trial.model.recipe is not None or (trial.rules and here)]


def _hear(process: "subprocess.Popen[str]", progress: "Progress") -> None:
    """Until it has ended; a second time nothing is left to hear. Raises ConfigError."""
    assert process.stdout is not None
    for line in process.stdout:
        said = json.loads(line)
        if "error" in said:
            raise ConfigError(said["error"])
        progress(said["done"], said["total"], said["what"])
    if code := process.wait():
        raise RuntimeError(f"what trials build could not be built: the process that tried ended with {code}")


# --- the other side ---------------------------------------------------------------------------------------------------


def build(config: StudyConfig, trials: Sequence[TrialConfig], progress: "Progress | None") -> None:
    """Raises ConfigError for a setting that touches nothing, or less than it names."""
    from trainable.kernels.cpu import build_meanwhile
    from trainable.noise import noise_targets
    from trainable.policy.embedded import ensure_base
    from trainable.policy.loading import load_policy
    from trainable.policy.policy import Policy

    if config.address is None and any(trial.model.recipe is not None for trial in trials):
        build_meanwhile()
    built: dict[tuple[ModelConfig, QuantConfig], Policy] = {}
    for trial in trials:
        if trial.model.recipe is not None:
            ensure_base(trial.model.recipe, progress)
        if trial.rules and (trial.model.recipe is not None or config.address is None):
            trial = _followed(trial, progress)
        if trial.model.recipe is not None:
            what = trial.model, trial.quant
            if what not in built:
                built[what] = load_policy(*what, trial.seed)
            noise_targets(built[what], trial.noise)


def _followed(trial: TrialConfig, progress: "Progress | None") -> TrialConfig:
    from trainable.following import follow
    from trainable.tasks.table import build_task

    task = build_task(trial.task)
    if task.foreign is not None:
        task.foreign.open()
    try:
        return follow(trial, task, progress=progress)[0]
    finally:
        if task.foreign is not None:
            task.foreign.close()


def main() -> None:
    die_with(int(sys.argv[1]))
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does so elsewhere
    asked = json.load(sys.stdin)

    def tell(**said: Any) -> None:
        print(json.dumps(said), file=channel, flush=True)

    try:
        build(
            StudyConfig.model_validate_json(asked["study"]),
            [read_config(tree) for tree in asked["trials"]],
            lambda done, total, what: tell(done=done, total=total, what=what),
        )
    except ConfigError as mistake:
        tell(error=str(mistake))


if __name__ == "__main__":
    main()

"""The beginning that trials share: computed once, taken over bit for bit by all others of the sweep.

Up to its first noisy step a trial does not know its noise: the evaluation of the start, the noise-free baseline and
the quiet stage of the schedule are the same in every arm of a seed. So whoever has computed one of them writes it down
where all trials of the sweep look before they begin:

    SWEEP/prefixes/KEY/after-000000     the start is evaluated, no step is made; no tensors, the weights are untouched
    SWEEP/prefixes/KEY/after-000003     the quiet stage is over; as a checkpoint (`checkpoint.py`), reports included

KEY is a hash of all that these numbers hang on: the configuration without its noise, the weights that were loaded, the
tokenizer, the rows, the first questions (which an endless task draws), the programs, and the kind of machine, since
sums of another processor differ in the last bits. Of the schedule nothing is in it: quiet steps have no noise and
extend the baseline, whatever K is, and a trial takes the longest beginning that lies within its own quiet stage (one
with K = 1 has none, and takes the start). It is loaded before, so whatever it has to refuse is refused.

Taken over is the state and what every step has reported, but for the clock; how long it took there counts as the
trial's own seconds, so that arms stay comparable, and as saved hours in the ledger. Nobody waits and nothing is locked:
two that compute the same write the same, what is unfinished is not there yet, and whoever finds one damaged removes it.
A trial that died before its first checkpoint finds what it wrote itself: that it goes on from, as from a checkpoint,
and nobody has given it more than it had. A trial that goes on from a checkpoint of its own writes none, since it may
have begun on another machine.

Left out: beginnings of more than MOST_BYTES, which is a whole model that learns; of those the start alone is shared.
And trials of several processes (`parallel.ranks`), which would have to take one over together.
"""

import hashlib
import json
import logging
import platform
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spaces.reading import as_tree
from spaces.schedules import quiet_steps
from trainable.disk.checkpoint import digest_of, load_state, save_state
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import PROGRESS_FILE
from trainable.kernels import cpu
from trainable.outcome import Shared, StepReport
from trainable.tasks.task import fingerprint_of
from trainable.trial import Trial
from trainable.versions import versions

log = logging.getLogger(__name__)

MOST_BYTES = 2 << 30
_AFTER = re.compile(r"after-(\d{6,})")
_NOT_KEPT = "%s: %s is not there for other trials: %s"


def key_of(trial: Trial) -> str:
    """Equal for trials of equal seed that agree, bit for bit, on whatever lies within both their quiet stages."""
    policy, config = trial.policy, trial.config
    batch = trial.task.sample(config.grpo.batch_prompts, seed=config.seed, step=0, batch=0)
    parts = {
        "config": {name: value for name, value in as_tree(config).items() if name != "noise"},
        "weights": [trial.base, digest_of(policy.trainable())],
        "network": str(policy.network.config),
        "forward": asdict(trial.agreement),
        "tokenizer": [_tokenizer(policy.tokenizer), str(policy.tokenizer.chat_template), policy.ends],
        "rows": trial.rows,
        "questions": fingerprint_of({config.eval.split: trial.questions, "train": batch}),
        "versions": dict(versions()),
        "machine": _machine(policy.device),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def wanted(beginnings: Folder, trial: Trial) -> bool:
    """Whether to `give` what the trial has come to: others may go on otherwise from there, which is after the start and
    after the quiet stage, and it is neither there already nor too large."""
    step = trial.so_far.next_step
    if not trial.begun or trial.done or step not in (0, _quiet(trial)):
        return False
    tensors = [tensor for part in trial.held().values() for tensor in part.values()] if step > 0 else []
    if sum(tensor.nbytes for tensor in tensors) > MOST_BYTES:
        return False
    try:
        return not _whole(beginnings, step)
    except OSError as error:
        log.warning(_NOT_KEPT, beginnings.uri, _folder(step), error)
        return False


def give(name: str, trial: Trial, reports: Sequence[StepReport]) -> dict[str, Any]:
    """What `keep` writes down of the trial as it stands. `name`: of its folder."""
    step = trial.so_far.next_step
    assert step <= _quiet(trial), "no other trial has this noise"
    assert not trial.so_far.effects, "noise in the quiet stage"
    state = trial.state_dict() if step > 0 else {"model": {}, "optimizer": {}, "progress": trial.progress()}
    return {**state, "reports": [report.as_record() for report in reports], "trial": name}


def keep(beginnings: Folder, state: Mapping[str, Any]) -> None:
    """A full disk costs others the time that it would have saved them."""
    step = state["progress"]["so_far"]["next_step"]
    try:
        save_state(beginnings / _folder(step), state)
    except OSError as error:
        log.warning(_NOT_KEPT, beginnings.uri, _folder(step), error)


def find(beginnings: Folder, name: str, trial: Trial) -> tuple[dict[str, Any] | None, list[str]]:
    """The longest beginning that there is of a trial, `name`, which was just loaded, as what `load_state_dict` takes
    (None: there is none), with the reports of its steps; and a line for each that is damaged and was passed over."""
    passed: list[str] = []
    try:
        found = [int(match[1]) for folder in beginnings.names() if (match := _AFTER.fullmatch(folder))]
        for step in sorted((step for step in found if step <= _quiet(trial)), reverse=True):
            if not _whole(beginnings, step):
                continue
            try:
                state = load_state(beginnings / _folder(step))
            except ValueError as error:  # ConfigError too: one that another version wrote is of no use either
                passed.append(f"{beginnings.uri}/{_folder(step)} is passed over: {error}")
                with suppress(OSError):  # another trial removes it, too
                    beginnings.remove(_folder(step))  # nobody would write another in its place
            else:
                return _as_own(name, trial, step, state), passed
    except OSError as error:
        passed.append(f"{beginnings.uri} is passed over: {error}")
    return None, passed


def _as_own(name: str, trial: Trial, step: int, state: dict[str, Any]) -> dict[str, Any]:
    """With what hangs on this trial's noise, or on its own start."""
    own, theirs = trial.progress(), state["progress"]["so_far"]
    so_far = {**theirs, "warnings": own["so_far"]["warnings"]}
    if state["trial"] != name:
        so_far["shared"] = asdict(Shared(trial=state["trial"], steps=step, seconds=theirs["seconds"]))
        so_far["deaths"] = own["so_far"]["deaths"]  # of engines, which changed no number
    now = time.time_ns() // 1_000_000
    return {
        **(trial.held() if step == 0 else {part: state[part] for part in ("model", "optimizer")}),
        "progress": {**state["progress"], "so_far": so_far, "followed": own["followed"]},
        "reports": [{**report, "time_ms": now} for report in state["reports"]],
    }


def _quiet(trial: Trial) -> int:
    return quiet_steps(trial.config.noise, trial.config.grpo.steps)


def _folder(step: int) -> str:
    return f"after-{step:06d}"


def _whole(beginnings: Folder, step: int) -> bool:
    """Its writer has come to the end of it."""
    return PROGRESS_FILE in (beginnings / _folder(step)).names()


def _tokenizer(tokenizer: Any) -> Any:
    """All of it, but for how it was last asked to pad and to cut; the vocabulary alone of one that is written in
    Python."""
    if not tokenizer.is_fast:
        return sorted(tokenizer.get_vocab().items())
    return {**json.loads(tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}


def _machine(device: torch.device) -> list[Any]:
    """What bits may hang on beside the programs."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    vectors = torch.backends.cpu.get_cpu_capability()
    return [platform.machine(), model, vectors, cpu.load() is not None, torch.get_num_threads(), gpu]

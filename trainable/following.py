"""A trial that follows a scan: numbers in the place of its rules, once, before anything is built on them.

    scan       of that very model, by its weights and not by its name, in that very mode, on prompts of that task
    kept       by this machine, whose first trial makes it while others wait;
               in a sweep also in the sweep's folder, by the first trial that needs it: all others take that one
    followed   plain numbers in the configuration, and where they are from in the receipt

So an outcome, a checkpoint and whatever is exported know numbers alone and run without a scan. A sweep cannot disagree
with itself: whichever node a replicate runs on, its numbers are those of the one scan in the sweep's folder, and a node
that has other weights under the same name is refused.

One scan decides all settings of a trial. It is of the mode with no layer skipped where the layers to be skipped follow
it themselves. Its prompts are training questions that hang on no seed, so that replicates, arms and their control are
told the same; adapters are left out, which add nothing before the first step.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from filelock import FileLock

from spaces.cache import cache_folder
from spaces.config import ConfigError, TrialConfig
from spaces.reading import as_tree, merge, read_config, unflatten
from spaces.scans import RANKED, UPDATES, Rule, is_rule
from spaces.uses import setting
from trainable import scan as scans
from trainable.disk.folder import Folder
from trainable.outcome import Followed
from trainable.policy.embedded import Progress
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy
from trainable.rollout import TooLong, encode_prompts, without_too_long
from trainable.scan import Scan
from trainable.sensitivity import with_sensitivities
from trainable.srdd import fingerprint, scan_policy
from trainable.tasks.task import FiniteTask, Task

SCANS = "scans"
"""Folder of a machine's cache, and of a sweep."""
PROMPTS = 32
"""At most: the rows of `rin srdd --prompts 32`."""
_PLAIN: dict[str, Any] = {"noise.layers": "all", "noise.layer_multipliers": [], "quant.skip_layers": []}
assert _PLAIN.keys() == RANKED.keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is scanned."""

    config: TrialConfig
    """Of the trial, but for the layers that a scan is to skip."""
    policy: Policy
    rows: tuple[tuple[int, ...], ...]
    """Token ids of the prompts."""
    task: Task
    functional: bool
    """Whether the trial asks what layers do to the model, too."""
    updates: bool
    """Whether it asks what they do to learning, which hangs on how is learned."""
    fingerprint: str

    @property
    def name(self) -> str:
        """By content."""
        return _hash([scans.VERSION, self._said(), self.fingerprint, self.rows])

    @property
    def asked(self) -> str:
        """By what the configuration says, of a sweep in which that means one thing."""
        return _hash([self._said(), as_tree(self.config.task), self.config.rollout.max_prompt_tokens])

    def _said(self) -> list[Any]:
        learning = [self.config.grpo, self.config.rollout, self.config.task] if self.updates else []
        return [as_tree(self.config.model), as_tree(self.config.quant), self.functional, *map(as_tree, learning)]


def follow(
    config: TrialConfig, task: Task, sweep: Folder | None = None, progress: Progress | None = None
) -> tuple[TrialConfig, tuple[Followed, ...]]:
    """The configuration with numbers alone. `sweep`: its folder of scans. `progress`
    hears of a base model that is built. Raises ConfigError for more of the worst
    layers than there are, for a score that the model does not have, and for a scan of something else."""
    rules = config.rules
    numbers: dict[str, Any] = {key: _PLAIN[key] for key in RANKED if is_rule(setting(config, key))}
    if not numbers:
        return config, ()
    followed: tuple[Followed, ...] = ()
    if rules:
        subject = _subject(config, task, rules, progress)
        scan, name = _scan_of(subject, sweep, next(iter(rules)))
        followed = tuple(_followed(config, key, rule, scan, name) for key, rule in rules.items())
        numbers |= {one.setting: list(one.value) for one in followed}
    return read_config(merge(as_tree(config), unflatten(numbers))), followed


def _subject(config: TrialConfig, task: Task, rules: dict[str, Rule], progress: Progress | None) -> Subject:
    if "quant.skip_layers" in rules:
        config = config.model_copy(update={"quant": config.quant.model_copy(update={"skip_layers": ()})})
    policy = load_policy(config.model.model_copy(update={"adapter": "full"}), config.quant, 0, progress)
    for key, rule in rules.items():
        rule.check_depth(key, policy.depth)
    return Subject(
        config=config,
        policy=policy,
        rows=tuple(map(tuple, _prompts(policy, config, task))),
        task=task,
        functional=any(rule.functional for rule in rules.values()),
        updates=any(rule.score in UPDATES for rule in rules.values()),
        fingerprint=fingerprint(policy),
    )


def _prompts(policy: Policy, config: TrialConfig, task: Task) -> list[list[int]]:
    limit = config.rollout.max_prompt_tokens
    if config.task.too_long == "leave_out":
        task = without_too_long(policy, task, config.task, limit, TooLong())
    count = min(PROMPTS, len(task.questions["train"])) if isinstance(task, FiniteTask) else PROMPTS
    return encode_prompts(policy, task.sample(count, seed=0, step=0, batch=0), config.task, limit)


def _followed(config: TrialConfig, key: str, rule: Rule, scan: Scan, name: str) -> Followed:
    try:
        scores = scans.score(scan, rule.score)
        ranked = sorted(scans.worst(scan, rule.top, rule.score)) if rule.top else ()
        value = tuple(ranked) if rule.top else scans.multipliers(scan, rule.score)
    except ConfigError as error:
        raise ConfigError(f"{key}={setting(config, key)}: {error}") from None
    return Followed(
        setting=key,
        rule=setting(config, key),
        value=value,
        scan=name,
        fingerprint=scan.fingerprint,
        score=rule.score,
        scores=scores,
    )


# --- where scans are kept ---------------------------------------------------------------------------------------------


def _scan_of(subject: Subject, sweep: Folder | None, key: str) -> tuple[Scan, str]:
    """And its name. Of a sweep the one in its folder, which is put there where there is none."""
    if sweep is None:
        return _cached(subject, key), subject.name
    file = f"{subject.asked}.json"
    if sweep.read(file) is None:
        kept = {"name": subject.name, "scan": scans.as_tree(_cached(subject, key))}
        sweep.write_once(file, json.dumps(kept))
    place = f"{sweep.uri}/{file}"
    try:
        tree = json.loads(sweep.read(file) or b"")
        name, scan = str(tree["name"]), scans.from_tree(tree["scan"], place)
    except (ValueError, KeyError, TypeError):  # a ConfigError is a ValueError
        raise ConfigError(f"{place}: is damaged (not the JSON of a scan); restore it from a backup") from None
    remedy = "put back what the sweep began with, or begin a new one"
    check_fits(scan, subject, key, place, remedy)
    if name != subject.name:
        task = subject.config.task.name
        raise ConfigError(f"{key}: the scan {place} is on other prompts than those of task.name={task}; {remedy}")
    return scan, name


def _cached(subject: Subject, key: str) -> Scan:
    """Made where this machine has none, or a damaged one, while other processes wait for it."""
    place = cache_folder() / SCANS
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"RIN_CACHE={place.parent}: cannot be made ({error.strerror}), and a scan has no place; "
            "set RIN_CACHE to a folder that you may write to"
        ) from None
    path = place / f"{subject.name}.json"
    with FileLock(f"{path}.lock"):
        scan = _undamaged(Folder(str(place)), path.name)
        if scan is None:
            Folder(str(place)).write(path.name, json.dumps(scans.as_tree(_made(subject))))
            scan = scans.load_scan(path)
    check_fits(scan, subject, key, str(path), "remove that file, and it is made anew")
    return scan


def _undamaged(place: Folder, file: str) -> Scan | None:
    try:
        return scans.from_tree(json.loads(place.read(file) or b""), file)
    except ValueError:  # no JSON, or (a ConfigError) no scan of this version
        return None


def _made(subject: Subject) -> Scan:
    config = subject.config
    scan = scan_policy(subject.policy, subject.rows, model=config.model, quant=config.quant)
    if not subject.functional:
        return scan
    return with_sensitivities(scan, subject.policy, subject.rows, task=subject.task, config=config)


def check_fits(scan: Scan, subject: Subject, key: str, place: str, remedy: str) -> None:
    """Raises ConfigError for a scan of another model or mode than the trial's."""
    for what, there, here in _apart(scan, subject):
        raise ConfigError(f"{key}: the scan {place} is of {what}={there}, and this trial has {here}; {remedy}")


def _apart(scan: Scan, subject: Subject) -> Iterator[tuple[str, Any, Any]]:
    mode, config = dict(scan.quant), subject.config
    here = as_tree(config.quant)
    pairs = [
        ("model.name", scan.model, config.model.name),
        ("layers", scan.depth, subject.policy.depth),
        *((f"quant.{name}", mode.get(name), here.get(name)) for name in sorted(mode.keys() | here.keys())),
        ("weights", scan.fingerprint, subject.fingerprint),
    ]
    return ((what, one, other) for what, one, other in pairs if one != other)


def _hash(tree: Any) -> str:
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()

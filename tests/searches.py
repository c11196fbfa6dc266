"""A search without files and without Ray: arms are kept in memory, and trials end as a test says."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from ray.tune.search import Searcher

from search.arms import Arm
from search.evidence import Evidence, known_of
from search.lineup import base_tree
from search.proposals import optuna_study
from search.searchers import RinSearch
from search.store import StudyConfig
from spaces.config import TrialConfig
from spaces.library import SPACES, Choice, Dimension, Space
from spaces.reading import as_tree, merge, read_config
from spaces.workloads import WORKLOADS
from tests.written_sweeps import receipt, scores, study
from trainable.outcome import Ending, Outcome

BASE = WORKLOADS["tiny"].settings
STOPPED = "stopped"
"""What a trial comes to that is stopped from outside: no outcome, and no error either."""
Result = Outcome | str | None


class Search(RinSearch):
    """Its trials end as `ended` says."""

    def __init__(self, study: StudyConfig, arms: Sequence[Arm], evidence: Sequence[Evidence] = ()) -> None:
        super().__init__(study, arms, evidence)
        self.written: list[str] = []
        self.ended: dict[tuple[str, int], Outcome] = {}

    def record(self, number: int, arm: Arm) -> None:
        self.written.append(arm.name)

    def outcome(self, arm: Arm, replicate: int) -> Outcome | None:
        return self.ended.get((arm.name, replicate))

    def optuna(self) -> Any:
        """What is known, as an Optuna study."""
        return optuna_study(known_of(self.study, self.arms, self.evidence))


def control(config: StudyConfig | None = None) -> Arm:
    """Of a sweep, or of the workload."""
    base = BASE if config is None else base_tree(config)
    return Arm(name="control", origin="control", config=read_config(merge(base, {"noise": {"sigma_start": 0.0}})))


def searcher(
    space: Space = SPACES["sigma"],
    *,
    known: Sequence[Arm] | None = None,
    evidence: Sequence[Evidence] = (),
    **changes: Any,
) -> Search:
    """`known`: arms that are written down; the control alone, unless told otherwise."""
    given = {
        "space": space,
        "trials": 4,
        "seed": 3,
        "searcher": "random",
        "settings": {},
        "store": "/nowhere",
        **changes,
    }
    config = study(**given)
    return Search(config, [control(config)] if known is None else known, evidence)


@cache
def _config() -> TrialConfig:
    return read_config(BASE)


def outcome(accuracy: float, word: Ending = "completed", seconds: float = 36.0) -> Outcome:
    return Outcome(
        outcome=word,
        rule="",
        step=1,
        eval=scores((1,), accuracy),
        receipt=receipt(),
        alarms=(),
        config=_config(),
        seconds=seconds,
    )


def drive(search: Search, results: Callable[[Any], Result], trials: int = 1000) -> list[Any]:
    """Run a search to its end or for some trials; `results(suggestion)`: how a trial ends, None = it fails."""
    given: list[Any] = []
    while len(given) < trials:
        suggestion = search.suggest(f"t{len(given)}")
        if suggestion == Searcher.FINISHED:
            return given
        assert isinstance(suggestion, dict)
        result = results(suggestion)
        if isinstance(result, Outcome):
            search.ended[suggestion["arm"], suggestion["replicate"]] = result
        search.on_trial_complete(f"t{len(given)}", {}, error=result is None)
        given.append(suggestion)
    return given


def cliff(s: Any) -> Outcome:
    """Linear noise above 0.01 collapses; more noise on norms is better."""
    noise = s["config"]["noise"]
    bad = noise["modules"] == ["linear"] and noise["sigma_start"] > 0.01
    return outcome(0.1 if bad else 0.5 + noise["sigma_start"], "collapsed" if bad else "completed")


def trade(s: Any) -> Outcome:
    """More noise costs more time and gives more accuracy; one of three replicates collapses where sigma is large."""
    noise = s["config"]["noise"]
    collapsed = noise["sigma_start"] > 0.03 and s["replicate"] == 0
    how: Ending = "collapsed" if collapsed else "completed"
    return outcome(0.3 + noise["sigma_start"], how, seconds=3600 * noise["sigma_start"])


def choices(**options: int) -> Space:
    """A finite space: `options` labels for each key, on keys that always make a valid trial."""
    values = {"grpo__steps": range(3, 99), "grpo__prompts": range(2, 99), "grpo__group_size": range(2, 99)}
    return Space(
        name="finite",
        description="",
        dimensions=tuple(
            Dimension(key=key.replace("__", "."), domain=Choice(options={f"v{v}": v for v in list(values[key])[:n]}))
            for key, n in options.items()
        ),
    )


def trees(arms: Sequence[Arm]) -> list[str]:
    return [json.dumps([arm.name, as_tree(arm.config), arm.params], sort_keys=True) for arm in arms]


def reread(arms: Sequence[Arm]) -> list[Arm]:
    """As if from files."""
    return [
        Arm(
            name=arm.name,
            origin=arm.origin,
            config=read_config(as_tree(arm.config)),
            params=json.loads(json.dumps(dict(arm.params))),
            planned=arm.planned,
            results={replicate: Outcome.from_tree(ended.as_tree()) for replicate, ended in arm.results.items()},
        )
        for arm in arms
    ]

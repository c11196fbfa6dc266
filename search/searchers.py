"""Who proposes the next configuration, and what it is told about the last.

The truth about a sweep is in its files: an arm is written down before its first replicate is handed out (`record`), an outcome
when a trial ends. `RinSearch` is made anew from those whenever a sweep starts or resumes (`known`), hands out what is unfinished
first, then the fixed arms (the control is always configuration 0), then the searcher's own (`search/proposals.py`). The Optuna
study is in memory and is made from the arms for each draw: nothing stale, nothing left running, nothing unpickled.

Two lessons of earlier sweeps are built in. One seed per configuration is an anecdote: each configuration is run once per
replicate, with the same seeds in every arm, and a configuration counts once, when all replicates are in: by the median accuracy.
And a collapse is knowledge: a violated constraint (the number of collapsed replicates), so that one collapse among three is not
averaged away and the searcher learns where not to look. A failed run (a bug, the machine, an accuracy that is not a number)
teaches nothing and is told as failed; a trial that was stopped from outside was not measured at its end and is told as pruned,
never as complete.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from search.arms import Arm
from search.proposals import Known, Params, Proposer, Told, cmaes, every, gp, grid, random, settings_of, sobol, tpe
from search.store import EVIDENCE_FILE, StudyConfig
from spaces.config import ConfigError, TrialConfig
from spaces.library import Choice, Float, Space
from spaces.points import POINTS
from spaces.reading import as_tree, flatten, merge, read_config, unflatten
from trainable.outcome import Outcome

_ENUMERABLE = 20_000  # configurations of a finite space that are tried one by one to find out whether all have been run


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A result that is known without spending a trial."""

    params: Params
    """Dimension name -> value; a number may lie beyond its range."""
    accuracy: float | None
    """None = not known (the plan recorded a collapse and no accuracy)."""
    collapses: int
    replicates: int = 1
    hours: float | None = None
    source: str
    """Where it comes from, and what else was different there."""


class RinSearch(OptunaSearch):  # type: ignore[misc]
    """Hands out arms x replicates. Its suggestion is {"config", "arm", "replicate", "origin", "number", "folder"}."""

    def __init__(
        self,
        *,
        space: Space,
        base: Mapping[str, Any],
        fixed: Sequence[Arm],
        known: Sequence[Arm] = (),
        record: Callable[[Arm], None] = lambda arm: None,
        place: Callable[[str, int], str] = lambda arm, replicate: "",
        outcome: Callable[[str, int], Outcome | None] = lambda arm, replicate: None,
        configurations: int,
        replicates: int,
        seed: int,
        searcher: str = "gp",
        objectives: Sequence[str] = ("accuracy",),
        evidence: Sequence[Evidence] = (),
    ) -> None:
        """`base` is the tree of workload, space and overrides; `known` are the arms of earlier sessions, in their order, with the
        results of the replicates that ended; `record` is called once per new arm, before its first replicate is handed out; `place`
        says where a trial (arm, replicate) writes its files, `outcome` how it ended (None: it has not); `configurations` counts all
        arms, also fixed and known ones.
        """
        check_objectives(searcher, objectives)
        self.rin_space = space
        self.base = base
        self.configurations = configurations
        self.replicates = replicates
        self.first_seed = seed
        self.searcher_name = searcher
        self.objectives = tuple(objectives)
        self.evidence = tuple(evidence)
        self.record = record
        self.exhausted = False  # a finite space came to its end before `configurations`
        self.place, self.outcome = place, outcome
        self.arms: list[Arm] = list(known)
        names = {arm.name for arm in known}
        self.fixed = [arm for arm in fixed if arm.name not in names]
        self.waiting = [(arm, replicate) for arm in self.arms for replicate in range(replicates) if replicate not in arm.results]
        self.running: dict[str, tuple[Arm, int]] = {}
        self._seen = {_identity(arm.config) for arm in self.arms}
        # Without a space of its own the base class would ask Tune for one.
        super().__init__(space={"space": space.name}, metric="accuracy", mode="max")

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if not self.waiting:
            arm = self._next_arm()
            if arm is None:
                self.exhausted = len(self.arms) < self.configurations
                finished: str = Searcher.FINISHED
                return finished
            self.record(arm)
            self.arms.append(arm)
            self._seen.add(_identity(arm.config))
            self.waiting = [(arm, replicate) for replicate in range(self.replicates)]
        arm, replicate = self.waiting.pop(0)
        self.running[trial_id] = (arm, replicate)
        config = arm.config.model_copy(update={"seed": self.first_seed + replicate})
        folder, number = self.place(arm.name, replicate), [known.name for known in self.arms].index(arm.name)
        return {
            "config": as_tree(config),
            "arm": arm.name,
            "replicate": replicate,
            "origin": arm.origin,
            "number": number,
            "folder": folder,
        }

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Intermediate accuracies are measured under different noise; the searcher hears of the end alone."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """How it ended stands in its folder. Without an outcome there it has failed, or was stopped and has steps to go."""
        arm, replicate = self.running.pop(trial_id)
        outcome = self.outcome(arm.name, replicate)
        if outcome is not None:
            arm.results[replicate] = outcome
        elif error:
            arm.failed.add(replicate)

    def save(self, checkpoint_path: str) -> None:
        """Tune wants to pickle its searcher every few seconds; all that this one knows is in the sweep's own files."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a search is made anew from the sweep's files, never from Tune's")

    def _setup_study(self, mode: Any) -> None:
        """The study is made from the arms for each draw."""

    def _next_arm(self) -> Arm | None:
        """None when the search has ended: enough configurations, or a finite space without a new one."""
        if self.fixed and len(self.arms) < self.configurations:
            return self.fixed.pop(0)
        if len(self.arms) >= self.configurations:
            return None
        known = self._known()
        found, problem = self._first_new(SEARCHERS[self.searcher_name].propose(known))
        if found is None and (rest := every(self.rin_space)) is not None:
            found, problem = self._first_new(arm for number, arm in enumerate(rest) if number < _ENUMERABLE)
        if found is not None:
            return found
        # The grid, or a finite space, has come to its end, unless it was unusable to begin with.
        ends = self.searcher_name == "grid" or every(self.rin_space) is not None
        if ends and (known.number > 0 or not problem):
            return None
        raise ConfigError(
            f"space {self.rin_space.name}: no draw gave a configuration that is valid and new; the last: {problem or 'was run already'}; "
            "widen its ranges or choose fewer --trials"
        )

    def _first_new(self, candidates: Iterable[Params]) -> tuple[Arm | None, str]:
        """The first candidate that is valid and was not run yet; else what was wrong with the last invalid one."""
        problem = ""
        for params in candidates:
            tree = merge(self.base, unflatten(settings_of(self.rin_space, params)))
            try:
                config = read_config(tree, origin=f"space {self.rin_space.name}")
            except ConfigError as error:
                # Two ranges that overlap the wrong way (sigma_end above sigma_start): not a finding, draw again.
                problem = str(error)
                continue
            if _identity(config) not in self._seen:
                return Arm(name=f"c{len(self.arms):02d}", origin="searcher", config=config, params=dict(params)), ""
        return None, problem

    def _known(self) -> Known:
        return _known(self.rin_space, self.objectives, self.first_seed, self.replicates, self.arms, self.evidence)


def known_of(study: StudyConfig, arms: Sequence[Arm], evidence: Sequence[Evidence]) -> Known:
    """What a study's searcher knows."""
    return _known(study.space, study.objectives, study.seed, study.replicates, arms, evidence)


def _known(
    space: Space,
    objectives: tuple[str, ...],
    seed: int,
    replicates: int,
    arms: Sequence[Arm],
    evidence: Sequence[Evidence],
) -> Known:
    drawn = [arm for arm in arms if arm.origin == "searcher"]
    finished = [(arm, told(arm, objectives, replicates)) for arm in drawn]
    return Known(
        space=space,
        objectives=objectives,
        seed=seed,
        number=len(drawn),
        told=(*(_told_evidence(e, objectives) for e in evidence), *(t for _, t in finished if t is not None)),
        running=tuple(arm.params for arm, t in finished if t is None),
    )


def check_objectives(searcher: str, objectives: Sequence[str]) -> None:
    """Raises ConfigError for a name that is not known and for a searcher that cannot do this."""
    if searcher not in SEARCHERS:
        raise ConfigError(f"--searcher {searcher}: unknown; choose one of {', '.join(SEARCHERS)}")
    given = ",".join(objectives)
    for name in objectives:
        if name not in OBJECTIVES:
            raise ConfigError(f"--objective {given}: {name} is unknown; choose from {', '.join(OBJECTIVES)}")
    if not objectives or len(set(objectives)) < len(objectives):
        raise ConfigError(f"--objective {given}: name each objective once; choose from {', '.join(OBJECTIVES)}")
    if len(objectives) > 1 and not SEARCHERS[searcher].several:
        several = ", ".join(name for name, method in SEARCHERS.items() if method.several)
        raise ConfigError(f"--searcher {searcher}: can follow one objective, got {given}; choose one objective, or one of {several}")


def _identity(config: TrialConfig) -> str:
    """Equal for configurations that would run the same; numbers are equal within rounding."""
    plain = flatten(as_tree(config))
    del plain["seed"]
    return json.dumps({key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in plain.items()}, sort_keys=True)


# --- what an arm came to -----------------------------------------------------------------------------------------------------


def told(arm: Arm, objectives: Sequence[str], replicates: int) -> Told | None:
    """What a searcher is told about an arm; None while replicates are missing.

    A collapse counts whatever happened to the other replicates. Without one, a failed replicate or an accuracy that is not
    finite makes the arm failed.
    """
    if any(replicate not in arm.results and replicate not in arm.failed for replicate in range(replicates)):
        return None
    ended = [arm.results[replicate] for replicate in range(replicates) if replicate in arm.results]
    finite = [result for result in ended if math.isfinite(result.eval.accuracy)]
    collapses = sum(result.collapsed for result in ended)
    if not collapses and len(finite) < replicates:
        return Told(params=arm.params, state="failed")
    values = tuple(OBJECTIVES[name].value(finite, collapses / replicates) for name in objectives) if finite else None
    return Told(params=arm.params, state="complete", values=values, collapses=collapses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A number that a configuration is judged by."""

    better: str
    """more | less"""
    value: Callable[[Sequence[Outcome], float], float]
    """(outcomes of the replicates that ended, share of collapsed replicates) -> the number."""


def pareto_front(arms: Sequence[Arm], objectives: Sequence[str]) -> list[Arm]:
    """The arms that no other arm beats in one objective without losing in another, in their order.

    Arms that ended with a failed replicate, or with none at all, are left out; so are those with a collapse, unless
    collapses are an objective themselves.
    """
    judged = []
    for arm in arms:
        result = told(arm, objectives, len(arm.results)) if arm.results else None
        if result is None or result.values is None or (result.collapses and "collapses" not in objectives):
            continue
        judged.append((arm, [-v if OBJECTIVES[name].better == "more" else v for name, v in zip(objectives, result.values, strict=True)]))

    def beaten(costs: list[float]) -> bool:
        return any(all(a <= b for a, b in zip(other, costs, strict=True)) and other != costs for _, other in judged)

    return [arm for arm, costs in judged if not beaten(costs)]


# --- evidence ----------------------------------------------------------------------------------------------------------------

# Sigma is not comparable between these: another value of theirs is another question.
_SAME_QUESTION = ("quant.weights", "quant.activations", "noise.modules", "noise.layers", "noise.scale")


def evidence_from_points(names: Sequence[str], space: Space, base: Mapping[str, Any]) -> list[Evidence]:
    """The plan's recorded collapses as evidence. What else was different there is named in `source`.

    A sigma beyond the space's range is kept (the searcher's axis is widened, its proposals are not); a point on other modules or
    in another precision is an error. Raises ConfigError.
    """
    recorded = [name for name, point in POINTS.items() if point.collapsed_at_step is not None]
    found = []
    for name in names:
        if name not in recorded:
            raise ConfigError(f"--evidence {name}: the plan recorded no collapse of it; choose from {', '.join(recorded)}")
        config = read_config(merge(base, POINTS[name].settings))
        params = _params_of(config, space, f"--evidence {name}")
        differences = _differences(config, read_config(base), space)
        for key in _SAME_QUESTION:
            if key in differences:
                raise ConfigError(
                    f"--evidence {name}: {key}={differences[key][0]} there and {differences[key][1]} in this sweep, where sigma means "
                    "something else; leave it out, or search a space that contains it"
                )
        other = ", ".join(f"{key}={there} (here {here})" for key, (there, here) in differences.items())
        found.append(
            Evidence(
                params=params,
                accuracy=None,
                collapses=1,
                source=f"{name} of the plan: collapsed at step {POINTS[name].collapsed_at_step}"
                + (f"; different there: {other}" if other else ""),
            )
        )
    return found


def evidence_from_arms(arms: Sequence[Arm], space: Space, source: str, base: Mapping[str, Any] | None = None) -> list[Evidence]:
    """Results of an earlier sweep as evidence (a warm start). Arms that ended without a result, that do not lie in this space or,
    where `base` is given, were noised or quantised otherwise than it, are left out; `source` says how many."""
    fitting: list[tuple[Arm, Params, Told]] = []
    for arm in arms:
        result = told(arm, ("accuracy", "hours"), len(arm.results)) if arm.results else None
        try:
            params = _params_of(arm.config, space, arm.name)
        except ConfigError:
            continue  # another question: counted, and not an error of the user
        other = base is not None and any(key in _SAME_QUESTION for key in _differences(arm.config, read_config(base), space))
        if result is not None and result.state == "complete" and not other and _inside(space, params):
            fitting.append((arm, params, result))
    left_out = len(arms) - len(fitting)
    note = f"{source} ({left_out} of its {len(arms)} arms left out)" if left_out else source
    return [
        Evidence(
            params=params,
            accuracy=result.values[0] if result.values else None,
            collapses=result.collapses,
            replicates=len(arm.results),
            hours=result.values[1] if result.values else None,
            source=f"{note}: {arm.name}",
        )
        for arm, params, result in fitting
    ]


def _told_evidence(evidence: Evidence, objectives: Sequence[str]) -> Told:
    numbers = {"accuracy": evidence.accuracy, "collapses": evidence.collapses / evidence.replicates, "hours": evidence.hours}
    values = [numbers[name] for name in objectives]
    known = tuple(value for value in values if value is not None)
    return Told(params=evidence.params, state="complete", values=known if len(known) == len(values) else None, collapses=evidence.collapses)


def _params_of(config: TrialConfig, space: Space, origin: str) -> Params:
    """A configuration in the space's dimensions; numbers may lie beyond their ranges. Raises ConfigError for what a dimension
    cannot say."""
    settings = flatten(as_tree(config))
    labels: dict[str, str] = {}
    params: dict[str, Any] = {}
    for dimension in space.dimensions:
        when, domain, value = dimension.when, dimension.domain, settings[dimension.key]
        if when is not None and labels.get(when.parent) != when.value:
            continue
        if isinstance(domain, Choice):
            matching = [label for label, option in domain.options.items() if option == value]
            if not matching:
                raise ConfigError(
                    f"{origin}: {dimension.key}={value} is not an option of space {space.name}; add it there or leave this out"
                )
            labels[dimension.key] = matching[0]
            params[dimension.name] = matching[0]
        elif not isinstance(value, int | float) or (isinstance(domain, Float) and domain.log and value <= 0):
            raise ConfigError(f"{origin}: {dimension.key}={value} has no place in the range of space {space.name}; leave this out")
        else:
            params[dimension.name] = value
    return params


def _inside(space: Space, params: Params) -> bool:
    domains = {dimension.name: dimension.domain for dimension in space.dimensions}
    return all(isinstance(d := domains[name], Choice) or d.low <= value <= d.high for name, value in params.items())


def _differences(config: TrialConfig, base: TrialConfig, space: Space) -> dict[str, tuple[Any, Any]]:
    """Settings outside the space's dimensions that differ: key -> (there, here)."""
    there, here = flatten(as_tree(config)), flatten(as_tree(base))
    dimensions = {dimension.key for dimension in space.dimensions}
    return {key: (value, here[key]) for key, value in there.items() if key not in dimensions and key in here and value != here[key]}


def write_evidence(study: StudyConfig, evidence: Sequence[Evidence]) -> None:
    study.folder.write(EVIDENCE_FILE, json.dumps([asdict(item) for item in evidence], indent=1))


def read_evidence(study: StudyConfig) -> list[Evidence]:
    return [Evidence(**tree) for tree in json.loads(study.folder.read(EVIDENCE_FILE) or b"[]")]


# --- choices by name ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to search."""

    propose: Proposer
    several: bool = True
    """Whether it can follow several objectives."""


OBJECTIVES: dict[str, Objective] = {
    "accuracy": Objective(better="more", value=lambda outcomes, share: median(o.eval.accuracy for o in outcomes)),
    "collapses": Objective(better="less", value=lambda outcomes, share: share),
    "hours": Objective(better="less", value=lambda outcomes, share: fmean(o.seconds / 3600 for o in outcomes)),
}

SEARCHERS: dict[str, Method] = {
    "gp": Method(propose=gp),
    "tpe": Method(propose=tpe),
    "cmaes": Method(propose=cmaes, several=False),
    "random": Method(propose=random),
    "grid": Method(propose=grid),
    "qmc": Method(propose=sobol),
}

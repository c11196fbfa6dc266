"""What a search knows: the results of its own arms, and of runs that it never made (evidence).

Evidence spares trials: recorded collapses of the plan, results of an earlier sweep (a warm start). It is told only
where it answers the same question: sigma means something else on other modules or in another precision. What else was
different there is named.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from search.arms import Arm, read_arms
from search.coordinates import Params
from search.lineup import base_tree
from search.objectives import Told, told, told_by_run, told_in_full
from search.rewards import pinned
from search.store import EVIDENCE_FILE, Derived, StudyConfig, load_study_config
from spaces.config import ConfigError, TrialConfig
from spaces.library import Choice, Float, Space
from spaces.points import POINTS
from spaces.reading import as_tree, flatten, merge, read_config
from trainable.pass_at_k import k_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """All that a proposal may depend on."""

    space: Space
    objectives: tuple[str, ...]
    """Names of `OBJECTIVES`, or pass@k."""
    seed: int
    number: int
    """Configurations that were proposed before this one."""
    told: tuple[Told, ...] = ()
    """In the order in which they were proposed, whatever the order in which they ended."""
    running: tuple[Params, ...] = ()


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
    passed: Mapping[str, float] = field(default_factory=dict)
    """pass@k by the objective's name, as far as it was sampled."""
    source: str
    """Where it comes from, and what else was different there."""


def known_of(study: StudyConfig, arms: Sequence[Arm], evidence: Sequence[Evidence], *, by_run: bool = True) -> Known:
    """All that the next proposal of a study may depend on. `by_run`: where each arm has its own number of replicates
    each run is told, else what a configuration came to."""
    drawn = [arm for arm in arms if arm.origin == "searcher"]
    results = [(arm, _told(study, arm, by_run)) for arm in drawn]
    return Known(
        space=study.space,
        objectives=study.objectives,
        seed=study.seed,
        number=len(drawn),
        told=(
            *(_told_evidence(item, study.objectives) for item in evidence),
            *(result for _, found in results for result in found),
        ),
        running=tuple(arm.params for arm, found in results if not found),
    )


def _told(study: StudyConfig, arm: Arm, by_run: bool) -> list[Told]:
    if study.each is None and by_run:
        return told_by_run(arm, study.objectives)
    if study.each is None:
        result = told_in_full(arm, study.objectives, None)
    else:
        result = told(arm, study.objectives, study.each)
    return [] if result is None else [result]


def write_evidence(study: StudyConfig, evidence: Sequence[Evidence]) -> None:
    study.folder.write(EVIDENCE_FILE, json.dumps([asdict(item) for item in evidence], indent=1))


def read_evidence(study: StudyConfig) -> list[Evidence]:
    """Raises ConfigError for a damaged file."""
    try:
        return [Evidence(**tree) for tree in json.loads(study.folder.read(EVIDENCE_FILE) or b"[]")]
    except (ValueError, TypeError):
        raise ConfigError(
            f"{study.folder.uri}/{EVIDENCE_FILE}: is damaged (not the JSON of evidence); restore it from a backup"
        ) from None


def evidence_of(config: StudyConfig) -> list[Evidence]:
    """What the searcher is told beforehand: recorded collapses of the plan, results of an earlier sweep. Raises
    ConfigError."""
    base = base_tree(config)
    evidence = evidence_from_points(config.evidence, config.space, base)
    if config.warm_start:
        earlier = load_study_config(config.store, config.warm_start)
        if earlier.kind == "confirm":
            raise ConfigError(
                f"--warm-start {config.warm_start}: its questions are for confirming and not for choosing; give a sweep"
            )
        arms, source = read_arms(earlier), f"sweep {config.warm_start}"
        told_of = arms, earlier.each, config.space, source, base
        evidence += evidence_from_arms(*told_of, config.objectives, config.derived)
    return evidence


# Sigma is not comparable between these: another value of theirs is another question.
_SAME_QUESTION = ("quant.weights", "quant.activations", "noise.modules", "noise.layers", "noise.scale", "grpo.reward")


def evidence_from_points(names: Sequence[str], space: Space, base: Mapping[str, Any]) -> list[Evidence]:
    """The plan's recorded collapses as evidence. What else was different there is named in `source`.

    A sigma beyond the space's range is kept (the searcher's axis is widened, its proposals are not); a point on other
    modules or in another precision is an error. Raises ConfigError.
    """
    recorded = [name for name, point in POINTS.items() if point.collapsed_at_step is not None]
    found = []
    for name in names:
        if name not in recorded:
            known = ", ".join(recorded)
            raise ConfigError(f"--evidence {name}: the plan recorded no collapse of it; choose from {known}")
        config = read_config(merge(base, POINTS[name].settings))
        params = _params_of(config, space, f"--evidence {name}")
        differences = _differences(config, read_config(base), space)
        for key in _SAME_QUESTION:
            if key in differences:
                there, here = differences[key]
                raise ConfigError(
                    f"--evidence {name}: {key}={there} there and {here} in this sweep, where sigma means something "
                    "else; leave it out, or search a space that contains it"
                )
        found.append(
            Evidence(
                params=params,
                accuracy=None,
                collapses=1,
                source=f"{name} of the plan: collapsed in step {POINTS[name].collapsed_at_step}"
                + _told_apart(differences),
            )
        )
    return found


def evidence_from_arms(
    arms: Sequence[Arm],
    replicates: int | None,
    space: Space,
    source: str,
    base: Mapping[str, Any],
    objectives: Sequence[str] = (),
    derived: Derived | None = None,
) -> list[Evidence]:
    """Results of an earlier sweep of so many replicates (None: each arm has its own number) as evidence (a warm start).
    Arms that lack an outcome of any of them, that do not lie in this space, that were noised, quantised or rewarded
    otherwise than `base`, or did not sample the pass@k that is an objective, are left out; `source` says
    how many, and what else was different for each that is told."""
    passes = tuple(filter(k_of, objectives))
    here = pinned(read_config(base), derived)
    fitting: list[tuple[Arm, Params, Told, str]] = []
    for arm in arms:
        result = told_in_full(arm, ("accuracy", "hours", *passes), replicates)
        try:
            params = _params_of(arm.config, space, arm.name)
        except ConfigError:
            continue  # another question: counted, and not an error of the user
        differences = _differences(arm.config, here, space)
        other = any(key in _SAME_QUESTION for key in differences)
        if result is not None and result.state == "complete" and not other and _inside(space, params):
            fitting.append((arm, params, result, _told_apart(differences)))
    left_out = len(arms) - len(fitting)
    note = f"{source} ({left_out} of its {len(arms)} arms left out)" if left_out else source
    return [
        Evidence(
            params=params,
            accuracy=result.values[0] if result.values else None,
            collapses=result.collapses,
            replicates=len(arm.results),
            hours=result.values[1] if result.values else None,
            passed=dict(zip(passes, result.values[2:], strict=True)) if result.values else {},
            source=f"{note}: {arm.name}{different}",
        )
        for arm, params, result, different in fitting
    ]


def _told_evidence(evidence: Evidence, objectives: Sequence[str]) -> Told:
    share = evidence.collapses / evidence.replicates
    numbers = {"accuracy": evidence.accuracy, "collapses": share, "hours": evidence.hours, **evidence.passed}
    values = tuple(value for name in objectives if (value := numbers.get(name)) is not None)
    return Told(
        params=evidence.params,
        state="complete",
        values=values if len(values) == len(objectives) else None,
        collapses=evidence.collapses,
    )


def _params_of(config: TrialConfig, space: Space, origin: str) -> Params:
    """A configuration in the space's dimensions; numbers may lie beyond their ranges. Raises ConfigError for what a
    dimension cannot say."""
    settings = flatten(as_tree(config))
    labels: dict[str, str] = {}
    params: dict[str, Any] = {}
    for dimension in space.dimensions:
        when, domain, value = dimension.when, dimension.domain, settings[dimension.key]
        if when is not None and labels.get(when.parent) not in when.labels:
            continue
        if isinstance(domain, Choice):
            matching = [label for label, option in domain.options.items() if option == value]
            if not matching:
                where = f"an option of space {space.name}"
                raise ConfigError(f"{origin}: {dimension.key}={value} is not {where}; add it there or leave this out")
            labels[dimension.key] = matching[0]
            params[dimension.name] = matching[0]
        elif not isinstance(value, int | float) or (isinstance(domain, Float) and domain.log and value <= 0):
            where = f"in the range of space {space.name}"
            raise ConfigError(f"{origin}: {dimension.key}={value} has no place {where}; leave this out")
        else:
            params[dimension.name] = value
    return params


def _inside(space: Space, params: Params) -> bool:
    domains = {dimension.name: dimension.domain for dimension in space.dimensions}
    return all(isinstance(d := domains[name], Choice) or d.low <= value <= d.high for name, value in params.items())


def _told_apart(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """What else was different there than here."""
    other = ", ".join(f"{key}={there} (here {here})" for key, (there, here) in differences.items())
    return f"; different there: {other}" if other else ""


def _differences(config: TrialConfig, base: TrialConfig, space: Space) -> dict[str, tuple[Any, Any]]:
    """Settings outside the space's dimensions that differ: key -> (there, here); seed and threads are the sweep's."""
    there, here = flatten(as_tree(config)), flatten(as_tree(base))
    dimensions = {dimension.key for dimension in space.dimensions}
    shared = (there.keys() & here.keys()) - dimensions - {"seed", "threads"}
    return {key: (value, here[key]) for key, value in there.items() if key in shared and value != here[key]}

"""Two sweeps side by side: what differs between them, and what an arm does in one and in the other.

Arms have other names in another sweep, so they are matched by what they did: two arms belong together when they differ
in nothing but what the sweeps differ in as wholes, which is what their plain controls differ in. So the same noise in
W4A4 and in W4A16 is one pair, and each pair says its settings. What only one sweep tried stands alone.

What a pair is asked. Two controls: their accuracies. Two arms with noise: their differences to their own controls, and
the difference of these (does noise do more there than here?), since what the sweeps differ in moves the controls as
well. Seeds that all of them share pair the runs; else Welch's interval (`statistics.compare_groups`). Nothing is
compared where the questions or the measure are not the same, or what tells a right answer from a wrong one. All pairs
together are corrected for their number.

None of this is a confirmation: arms were chosen on the questions by which they are compared, and two sweeps are two
choices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.arms import Arm, read_arms, replicates_of
from search.confirm import read_confirmation
from search.lineup import base_tree
from search.replicates import MIN_REPLICATES, Replicate
from search.report import MARGIN, ArmReport, StudyReport, report_study
from search.statistics import Comparison, Pairs, adjust, compare_groups, compare_pairs
from search.store import StudyConfig
from spaces.config import MARKED, ConfigError, TrialConfig
from spaces.reading import as_tree, flatten, read_config
from spaces.uses import idle

LEVEL = 0.05
QUESTIONS = (
    *("task.name", "task.path", "task.eval_path", "task.digits", "task.options", "task.too_long"),
    *("eval.questions", "eval.split", "eval.draw"),
)
"""Settings that say which questions are answered."""
LENGTHS = (
    *("model.name", "rollout.max_prompt_tokens"),
    *("task.prompt", "task.chat", "task.chat_options", "task.chat_date"),
)
"""Which ones, too, where those that are too long are left out."""
REWARDS = ("task.reward", "task.reward_options", "task.reward_sha256", "task.correct_at")
"""Settings that say which answers are right, of a task that has no mark of its own (`MARKED`); of the others they say
only what is learned from."""
OF_THE_RUN = {"seed", "threads", "noise.sigma_start"}
"""Of each replicate and arm, never of a sweep as a whole."""
SAID = (
    *("kind", "parent", "workload", "measure", "searcher", "objectives", "trials", "replicates", "total", "seed"),
    *("points", "evidence", "warm_start", "looks", "budget_hours", "concurrent", "cpus", "gpus"),
)
"""What is told of two studies where it differs."""

Settings = dict[str, tuple[Any, Any]]
"""Key -> (here, there)."""
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two."""

    config: StudyConfig
    arms: Sequence[Arm]
    report: StudyReport
    own: Mapping[str, Comparison]
    """Arm -> its difference to its control, as the sweep's own report, or the confirmation's, has it."""

    @property
    def rows(self) -> dict[str, ArmReport]:
        return {row.arm: row for row in self.report.arms}

    @property
    def plain(self) -> TrialConfig:
        """What it is without noise and without points: its first control."""
        controls = [arm.ran for arm in self.arms if arm.origin == "control"]
        return controls[0] if controls else read_config(base_tree(self.config))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What did the same in both.

    Example: Pair(here="c03", there="c01", settings={"quant.activations": ("none", "mxfp4")}, between=Comparison(...),
    paired=True)
    """

    here: str
    there: str
    settings: Settings
    """In which the two differ."""
    between: Comparison | None = None
    """There minus here, corrected for the number of pairs: of accuracies where both are controls, else of the
    differences to their controls."""
    paired: bool = False
    """By seed; else two groups."""
    note: str = ""
    """Why there is no comparison, or what must be known of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    here: Side
    there: Side
    study: Settings
    settings: Settings
    """In which the plain controls differ."""
    versions: Settings
    pairs: tuple[Pair, ...]
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    """Arms of each that the other one has not."""
    cautions: tuple[str, ...]


def read_side(config: StudyConfig) -> Side:
    """Raises ConfigError for files that are damaged."""
    report = report_study(config)
    own = {row.arm: row.corrected for row in report.arms if row.corrected is not None}
    arms = read_arms(config)
    if config.kind == "confirm" and arms:
        state = read_confirmation(config)
        own = {state.winner: state.comparison}
    return Side(config=config, arms=arms, report=report, own=own)


def side_by_side(here: Side, there: Side) -> SideBySide:
    settings = _differing(here.plain, there.plain, OF_THE_RUN)
    pairs = [_compared(here, there, *match) for match in _matches(here, there, set(settings))]
    corrected = adjust({number: pair.between for number, pair in enumerate(pairs) if pair.between is not None})
    pairs = [replace(pair, between=corrected.get(number)) for number, pair in enumerate(pairs)]
    names = {pair.here for pair in pairs}, {pair.there for pair in pairs}
    return SideBySide(
        here=here,
        there=there,
        study=_studies_apart(here.config, there.config),
        settings=settings,
        versions=_versions_apart(here, there),
        pairs=tuple(pairs),
        alone=(
            tuple(arm.name for arm in here.arms if arm.name not in names[0]),
            tuple(arm.name for arm in there.arms if arm.name not in names[1]),
        ),
        cautions=tuple(_cautions(here, there)),
    )


# --- what differs -----------------------------------------------------------------------------------------------------


def _differing(one: TrialConfig, other: TrialConfig, besides: set[str]) -> Settings:
    here, there = (flatten(as_tree(config)) for config in (one, other))
    keys = sorted((here.keys() | there.keys()) - besides)
    return {key: (here.get(key), there.get(key)) for key in keys if here.get(key) != there.get(key)}


def _studies_apart(one: StudyConfig, other: StudyConfig) -> Settings:
    sides = [{name: getattr(config, name) for name in SAID} for config in (one, other)]
    for side, config in zip(sides, (one, other), strict=True):
        side["space"] = config.space.name
        side |= {f"space: {part.name}": part.domain.model_dump() for part in config.space.dimensions}
    return {key: (sides[0].get(key), sides[1].get(key)) for key in sides[0] | sides[1] if _unlike(key, sides)}


def _unlike(key: str, sides: Sequence[Mapping[str, Any]]) -> bool:
    return bool(sides[0].get(key) != sides[1].get(key))


def _versions_apart(here: Side, there: Side) -> Settings:
    sides = here.report.versions, there.report.versions
    names = dict.fromkeys(name for side in sides for seen in side for name in seen)
    if not all(sides):  # nobody knows
        return {}
    told = {
        name: [" and ".join(sorted({seen.get(name, "not written down") for seen in side})) for side in sides]
        for name in names
    }
    return {name: (one, other) for name, (one, other) in told.items() if one != other}


def _cautions(here: Side, there: Side) -> list[str]:
    one, other = here.config, there.config
    said = []
    if one.id == other.id:
        said.append(f"{other.name} is a copy of {one.name}: these are the same runs")
    if one.measure != other.measure:
        said.append(
            f"{one.name} is judged by {one.measure} and {other.name} by {other.measure}: nothing is compared between "
            "them"
        )
    for side in (here, there):
        name = side.config.name
        if not any(arm.origin == "control" for arm in side.arms):
            said.append(f"{name} has no control: nothing in it is measured against one")
        if side.config.kind == "program":
            said.append(f"{name} is a programme, which has rules of its own: rin program report --name {name}")
        if side.report.unfinished:
            said.append(f"{name}: {side.report.unfinished} trials have no outcome yet")
        if not side.report.versions:
            said.append(f"{name} did not write down the versions that it ran with")
        said += [f"{name}: {line}" for line in side.report.failed]
    return said


# --- who belongs together ---------------------------------------------------------------------------------------------


def _matches(here: Side, there: Side, apart: set[str]) -> list[tuple[Arm, Arm, Settings]]:
    """In the order of the arms here. `apart`: keys in which the sweeps differ as wholes; an arm that is as its sweep
    there belongs to one that is as its own."""
    plain = [flatten(as_tree(side.plain)) for side in (here, there)]
    known = [[(arm, flatten(as_tree(arm.ran)), idle(arm.ran)) for arm in side.arms] for side in (here, there)]
    found = []
    for (one, a, idle_here), (other, b, idle_there) in product(*known):
        if (one.origin == "control") != (other.origin == "control") or a["noise.sigma_start"] != b["noise.sigma_start"]:
            continue
        unlike = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
        unlike -= {"seed", "threads"} | idle_here | idle_there
        if all(key in apart and a.get(key) == plain[0].get(key) and b.get(key) == plain[1].get(key) for key in unlike):
            found.append((one, other, {key: (a.get(key), b.get(key)) for key in sorted(unlike)}))
    return found


# --- what is said of a pair -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runs:
    """What is compared: by seed a number, and the answers [questions] that it is the mean of."""

    shares: Mapping[int, float]
    answers: Mapping[int, Array]

    def of(self, seeds: Sequence[int]) -> tuple[Array, Array]:
        """[replicates] and [replicates, questions]."""
        return np.array([self.shares[seed] for seed in seeds]), np.array([self.answers[seed] for seed in seeds])


def _compared(here: Side, there: Side, one: Arm, other: Arm, settings: Settings) -> Pair:
    pair = Pair(here=one.name, there=other.name, settings=settings)
    if here.config.measure != there.config.measure:
        return replace(pair, note="judged by different measures")
    tasks = one.ran.task, other.ran.task
    lengths = LENGTHS if any(task.too_long == "leave_out" for task in tasks) else ()
    if asked := _told(settings, (*QUESTIONS, *lengths)):
        return replace(pair, note=f"they answer different questions ({asked})")
    if any(task.kind in MARKED for task in tasks) and (judged := _told(settings, REWARDS)):
        return replace(pair, note=f"judged by different rewards ({judged})")
    sides = []
    for side, arm in ((here, one), (there, other)):
        runs = replicates_of(side.config, arm)
        if not runs:
            return replace(pair, note=f"{arm.name} of {side.config.name} has no run that ended with a number")
        if arm.origin == "control":
            sides.append(_alone(runs))
            continue
        control = next((one for one in side.arms if one.name == side.rows[arm.name].control), None)
        if control is None:
            return replace(pair, note=f"{arm.name} of {side.config.name} has no control")
        against = _against(runs, replicates_of(side.config, control))
        if not against.shares:
            return replace(pair, note=f"{arm.name} of {side.config.name} shares no seed with its control")
        sides.append(against)
    return _judged(pair, *sides)


def _told(settings: Settings, keys: Sequence[str]) -> str:
    """Those of the keys in which a pair differs, with their values. Options of the user's are keys of their own below
    them: task.options.min_terms."""
    named = [key for above in keys for key in settings if key == above or key.startswith(f"{above}.")]
    return ", ".join(f"{key} {settings[key][0]} and {settings[key][1]}" for key in named)


def _alone(runs: Sequence[Replicate]) -> _Runs:
    return _Runs(
        shares={run.seed: run.accuracy for run in runs},
        answers={run.seed: np.asarray(run.correct, dtype=np.float64) for run in runs},
    )


def _against(treated: Sequence[Replicate], control: Sequence[Replicate]) -> _Runs:
    """Differences over common seeds."""
    a, b = _alone(treated), _alone(control)
    seeds = [seed for seed in a.shares if seed in b.shares and len(a.answers[seed]) == len(b.answers[seed])]
    return _Runs(
        shares={seed: a.shares[seed] - b.shares[seed] for seed in seeds},
        answers={seed: a.answers[seed] - b.answers[seed] for seed in seeds},
    )


def _judged(pair: Pair, here: _Runs, there: _Runs) -> Pair:
    numbers = {len(answers) for side in (here, there) for answers in side.answers.values()}
    if len(numbers) != 1 or min(numbers) < 2:
        told = " and ".join(map(str, sorted(numbers)))
        return replace(pair, note=f"they answered {told} questions, which are not the same")
    common = sorted(here.shares.keys() & there.shares.keys())
    other = any(key.startswith(("model.", "task.")) for key in pair.settings)  # a seed draws something else there
    paired = not other and len(common) >= min(MIN_REPLICATES, len(here.shares), len(there.shares))
    if not paired:
        (a, asked_a), (b, asked_b) = there.of(sorted(there.shares)), here.of(sorted(here.shares))
        return replace(pair, between=compare_groups(a, b, answers=(asked_a, asked_b), margin=MARGIN))
    (a, asked_a), (b, asked_b) = there.of(common), here.of(common)
    differences = Pairs(treated=a, control=b, answers=asked_a - asked_b, questions=min(numbers))
    seen = compare_pairs(differences, margin=MARGIN, level=LEVEL)
    same = not pair.settings and bool((asked_a == asked_b).all())
    note = "the same configuration, seeds and answers: one is the other run again, and says nothing new" if same else ""
    left = len(here.shares) + len(there.shares) - 2 * len(common)
    return replace(pair, between=replace(seen, unpaired=left), paired=True, note=note)


def sides_of(here: StudyConfig, there: StudyConfig) -> SideBySide:
    """Of two sweeps, or confirmations. Raises ConfigError for one that is given twice, and for damaged files."""
    if here.name == there.name:
        raise ConfigError(f"OTHER={there.name}: is the same sweep; give another one: rin list shows them")
    return side_by_side(read_side(here), read_side(there))

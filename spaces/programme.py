"""A programme: which experiments run after which results, as data that is read before anything runs.

A plan in prose leaves the decisions to whoever sees the numbers. Here they are written down first: experiments with
what is expected of them, hypotheses with their confidences, phases, and after each phase rules that say what follows
from which result and why. `spaces/programmes/plan.yaml` is the experiment plan in these words and the template of a
user's own (`rin program show plan --yaml`); docs/programs.md says what each word means.

A rule's condition is data, not an expression: one word with what it is about (`helps: e13i-baseline`), or `all`, `any`
and `not` of conditions. It is yes, no, or undecided; how results answer it says `search/program.py`. All differences
are points of accuracy against the measured control of the same filter policy and precision, never against a recorded
figure.

What could not be carried out is refused here, in one line: a point that does not exist, a rule about an experiment that
cannot have run by then, a phase that comes before itself, thresholds that overlap, a base that may not exist.
Light on purpose: no numpy, torch or ray.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from spaces.config import ConfigError, Number, Record, Texts, TrialConfig, Whole
from spaces.paths import anchored, home
from spaces.points import POINTS
from spaces.reading import as_tree, dump_yaml, explain, flatten_fields, load_yaml
from spaces.uses import leaves

CONTROL, BASE, END = "control", "base", "end"
"""Names that are taken: the measured control; the winner that an experiment's phase lies over; the programme's end."""
Word = Literal[
    "helps", "hurts", "collapses", "fails", "undecided", "beats", "gain", "every", "some", "all", "any", "not"
]
_OF_ONE = ("helps", "hurts", "collapses", "fails", "undecided")
_WORDS: tuple[str, ...] = (*_OF_ONE, "beats", "gain", "every", "some", "all", "any", "not")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_FOLDER = Path(__file__).parent / "programmes"


# --- conditions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Example: Condition(word="beats", names=("e13i-high", "base")); Condition(word="not", parts=(...,))"""

    word: Word
    names: tuple[str, ...] = ()
    """Experiments: one; of `beats` and `gain` the one and what it is compared with."""
    parts: tuple["Condition", ...] = ()
    """Of all, any, not."""
    above: float | None = None
    """Of `gain`: points."""
    below: float | None = None
    each: str = ""
    """Of `every` and `some`: a word that is about one experiment, asked of all that ran."""

    def tree(self) -> dict[str, Any]:
        """As it is written."""
        if self.word in ("all", "any"):
            return {self.word: [part.tree() for part in self.parts]}
        if self.word == "not":
            return {"not": self.parts[0].tree()}
        if self.word in ("every", "some"):
            return {self.word: self.each}
        if self.word == "gain":
            of = {"of": self.names[0], "over": self.names[1], "above": self.above, "below": self.below}
            return {"gain": {key: value for key, value in of.items() if value is not None}}
        return {self.word: list(self.names) if self.word == "beats" else self.names[0]}

    def words(self) -> str:
        """Example: `e13i-targeted beats e13i-baseline and not (e13i-high collapses)`."""
        if self.word == "not":
            return f"not ({self.parts[0].words()})"
        if self.word in ("all", "any"):
            inner = [f"({part.words()})" if part.word in ("all", "any") else part.words() for part in self.parts]
            return (" and " if self.word == "all" else " or ").join(inner)
        if self.word in ("every", "some"):
            return f"{self.word} experiment {'is undecided' if self.each == 'undecided' else self.each}"
        if self.word == "undecided":
            return f"{self.names[0]} is undecided"
        if self.word == "beats":
            return f"{self.names[0]} beats {self.names[1]}"
        if self.word == "gain":
            both = {"above": self.above, "below": self.below}
            ends = [f"{end} {points:g}" for end, points in both.items() if points is not None]
            return f"{self.names[0]} gains {' and '.join(ends)} points over {self.names[1]}"
        return f"{self.names[0]} {self.word}"

    def atoms(self) -> Iterator["Condition"]:
        """Its single statements."""
        if self.parts:
            for part in self.parts:
                yield from part.atoms()
        else:
            yield self


def read_condition(tree: Any) -> Condition:
    """Raises ValueError with what is wrong and what would do."""
    if isinstance(tree, Condition):
        return tree
    if not isinstance(tree, Mapping) or len(tree) != 1:
        raise ValueError(f"a condition is one word with what it is about, such as {{helps: NAME}}, but got {tree}")
    word, about = next(iter(tree.items()))
    if word not in _WORDS:
        raise ValueError(f"{word}: unknown word; did you mean {_nearest(str(word), _WORDS)}?")
    if word in _OF_ONE and isinstance(about, str):
        return Condition(word=word, names=(about,))
    if word == "beats" and isinstance(about, list | tuple) and len(about) == 2 and all(map(_is_text, about)):
        return Condition(word="beats", names=tuple(about))
    if word in ("every", "some") and about in _OF_ONE:
        return Condition(word=word, each=about)
    if word in ("all", "any") and isinstance(about, list | tuple) and about:
        return Condition(word=word, parts=tuple(map(read_condition, about)))
    if word == "not" and isinstance(about, Mapping):
        return Condition(word="not", parts=(read_condition(about),))
    if word == "gain" and isinstance(about, Mapping):
        return _gain(about)
    raise ValueError(f"{word}={about}: write it as {_FORMS.get(word, f'{word}: NAME of an experiment')}")


_FORMS = {
    "beats": "beats: [NAME, OTHER]",
    "every": f"every: one of {', '.join(_OF_ONE)}",
    "some": f"some: one of {', '.join(_OF_ONE)}",
    "all": "all: [condition, ...]",
    "any": "any: [condition, ...]",
    "not": "not: {condition}",
    "gain": "gain: {of: NAME, over: OTHER, above: POINTS, below: POINTS}",
}


def _gain(about: Mapping[str, Any]) -> Condition:
    for key in about:
        if key not in ("of", "over", "above", "below"):
            raise ValueError(f"gain.{key}: unknown word; did you mean {_nearest(str(key), ('of', 'over', 'above'))}?")
    above, below = (about.get(end) for end in ("above", "below"))
    numbers = [end for end in (above, below) if end is not None]
    if not _is_text(about.get("of")) or not numbers or not all(type(end) in (int, float) for end in numbers):
        raise ValueError(f"gain={dict(about)}: write it as {_FORMS['gain']}")
    if len(numbers) == 2 and numbers[0] >= numbers[1]:
        raise ValueError(f"gain: above {above:g} and below {below:g} leave nothing between; exchange them")
    return Condition(word="gain", names=(about["of"], about.get("over", CONTROL)), above=above, below=below)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


When = Annotated[
    Condition,
    BeforeValidator(read_condition),
    PlainSerializer(lambda condition: condition.tree(), return_type=dict),
]


# --- records ----------------------------------------------------------------------------------------------------------


class Success(Record):
    """What an experiment's gain on its control is called, in points."""

    minimum: Number
    good: Number
    excellent: Number

    @model_validator(mode="after")
    def _grow(self) -> Self:
        if not self.minimum < self.good < self.excellent:
            raise ValueError(
                f"thresholds overlap: minimum={self.minimum:g} good={self.good:g} excellent={self.excellent:g}; "
                "each must be above the one before"
            )
        return self


class Experiment(Record):
    point: str | None = None
    """A point of the plan (`spaces/points.py`); or `settings`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """A tree over the workload's settings, and over those of the phase's base."""
    about: str = ""
    tests: Texts = ()
    """Alternatives of hypotheses that it speaks to, such as H1a."""
    confidence: Number | None = Field(None, ge=0, le=1)
    """In what its hypothesis says, before anything ran."""
    priority: Whole = Field(3, ge=1)
    """1 runs first."""
    expected: tuple[Number, Number] | None = None
    """Gain on the measured control, lowest and highest, in points."""
    success: Success | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.point is None) == (not self.settings):
            raise ValueError("give one of point and settings")
        if self.expected is not None and self.expected[0] > self.expected[1]:
            raise ValueError(f"expected={list(self.expected)}: the lower end comes first")
        return self

    @property
    def tree(self) -> Mapping[str, Any]:
        """Its settings."""
        return self.settings if self.point is None else POINTS[self.point].settings


class Alternative(Record):
    says: str
    better: str
    """The experiment that would be ahead; or `control`, or `base`."""
    than: str
    """Of this one, or of these."""
    confidence: Number = Field(gt=0, lt=1)
    """As the plan gives it; those of one hypothesis need not sum to one. At 0 and 1 there is nothing to learn."""


class Hypothesis(Record):
    question: str
    alternatives: dict[str, Alternative] = Field(min_length=1)


class Rule(Record):
    when: When | None = None
    """Null: whatever happened; the last rule of a phase."""
    because: str
    """What is said of the decision."""
    go: str
    """The next phase, `end`, or a scenario that it ends in."""
    skip: Texts = ()
    """Experiments that have become pointless."""


class Phase(Record):
    name: str
    goal: str = ""
    run: tuple[str, ...] = Field(min_length=1)
    base: Texts = ()
    """Earlier phases: the settings of the winner of the first that has one lie under these experiments."""
    then: tuple[Rule, ...] = Field(min_length=1)


class Scenario(Record):
    title: str
    when: When
    says: str
    next: str = ""
    """What to do after the programme."""


class Replicates(Record):
    looks: tuple[Whole, ...] = Field((4, 8, 12), min_length=1)
    """Replicates of an experiment and its control at which its comparisons are judged; further ones are run only where
    a decision hangs on them."""
    level: Number = Field(0.05, gt=0, le=0.5)
    """Of a false difference anywhere in the programme, over all its comparisons and looks."""

    @model_validator(mode="after")
    def _grow(self) -> Self:
        if self.looks[0] < 3 or any(b <= a for a, b in pairwise(self.looks)):
            given = ",".join(map(str, self.looks))
            raise ValueError(f"looks={given}: name growing numbers of replicates from 3 on, such as 4,8,12")
        return self


class SigmaTable(Record):
    """The lookup table that `--modes` fills: how much noise each precision stands."""

    about: str = ""
    point: str
    """Its noise with other sigmas."""
    replicates: Whole = Field(3, ge=1)
    sigmas: dict[str, tuple[Number, ...]]
    """Mode (W4A4, W4A8, W4A16) -> sigma_start; sigma_end is a hundredth."""


class Programme(Record):
    """Example: load_programme("plan").phases[0].run == ("e13i-baseline", "e13i-targeted")"""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    about: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    """A tree over the workload's settings, under every experiment and its control."""
    replicates: Replicates = Replicates()
    success: dict[str, Number] = Field(default_factory=dict)
    """What the best experiment's gain on its control makes of the whole: word -> from so many points on, growing."""
    experiments: dict[str, Experiment] = Field(min_length=1)
    hypotheses: dict[str, Hypothesis] = Field(default_factory=dict)
    phases: tuple[Phase, ...] = Field(min_length=1)
    stop: tuple[Rule, ...] = ()
    """Rules that are asked after every phase, before its own; no replicates are run for them."""
    scenarios: dict[str, Scenario] = Field(default_factory=dict)
    """How it may end; the first whose condition holds."""
    table: SigmaTable | None = None

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    def phases_of(self, experiment: str) -> list[Phase]:
        return [phase for phase in self.phases if experiment in phase.run]

    def conditions(self) -> Iterator[Condition]:
        """Every one that its rules, stops and scenarios ask."""
        rules = [rule for phase in self.phases for rule in phase.then]
        yield from (rule.when for rule in (*rules, *self.stop) if rule.when is not None)
        yield from (scenario.when for scenario in self.scenarios.values())

    def comparisons(self) -> list[tuple[str, str]]:
        """All that it may make on any path, each once: the level is divided among them. Every experiment with its
        control, and with its base, by which a winner is chosen; and the pairs that conditions and hypotheses name."""
        pairs = [(name, CONTROL) for name in self.experiments]
        pairs += [(name, BASE) for phase in self.phases if phase.base for name in phase.run]
        pairs += [(c.names[0], c.names[1]) for when in self.conditions() for c in when.atoms() if len(c.names) == 2]
        pairs += [(a.better, a.than) for h in self.hypotheses.values() for a in h.alternatives.values()]
        distinct: dict[frozenset[str], tuple[str, str]] = {}
        for pair in pairs:
            distinct.setdefault(frozenset(pair), pair)
        return list(distinct.values())


# --- reading ----------------------------------------------------------------------------------------------------------


def programmes() -> list[str]:
    """Names of those that are shipped."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_programme(named: str) -> Programme:
    """One that is shipped, or a YAML file. Raises ConfigError, one line, for whatever could not be carried out."""
    if named in programmes():
        return read_programme(load_yaml(_FOLDER / f"{named}.yaml"), origin=named)
    if not named.endswith((".yaml", ".yml")):
        known = (*programmes(), "a YAML file")
        raise ConfigError(f"PROGRAM={named}: unknown programme; choose {' or '.join(known)}")
    path = home(named)
    return read_programme(load_yaml(path), origin=named, folder=path.parent)


def read_programme(tree: Mapping[str, Any], origin: str, folder: Path | None = None) -> Programme:
    """`folder`: where relative paths in its settings begin. Raises ConfigError."""
    try:
        programme = Programme.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, Programme, origin)) from None
    _check(programme, origin)
    if folder is None:
        return programme
    moved = {
        name: e.model_copy(update={"settings": anchored(e.settings, folder)})
        for name, e in programme.experiments.items()
    }
    return programme.model_copy(update={"settings": anchored(programme.settings, folder), "experiments": moved})


def shipped_text(named: str) -> str:
    """Of a programme that is shipped, comments and all: the template of a user's own."""
    return (_FOLDER / f"{named}.yaml").read_text(encoding="utf-8")


def programme_yaml(programme: Programme) -> str:
    """In the words that it is read by; what says nothing is left out."""
    return dump_yaml(_spoken(as_tree(programme)))


def digest(programme: Programme) -> str:
    """Of all that it says, in any order of its keys but those that count (scenarios, phases, rules)."""
    return hashlib.sha256(json.dumps(as_tree(programme)).encode()).hexdigest()[:16]


def _spoken(value: Any) -> Any:
    """Settings stay as they are: null, or a list of nothing, is a setting there."""
    if isinstance(value, dict):
        said = {key: inner for key, inner in value.items() if inner not in (None, "", [], {})}
        return {key: inner if key == "settings" else _spoken(inner) for key, inner in said.items()}
    return [_spoken(inner) for inner in value] if isinstance(value, list) else value


def _nearest(word: str, known: Sequence[str]) -> str:
    return (difflib.get_close_matches(word, known, n=1, cutoff=0.0) or known)[0]


# --- what could not be carried out ------------------------------------------------------------------------------------


def _check(programme: Programme, origin: str) -> None:
    """Raises ConfigError."""

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{origin}: {key}: {why}")

    for key, why in (*_unknown(programme), *_overlaps(programme), *_order(programme)):
        refuse(key, why)
    for key, why in _ways(programme):
        refuse(key, why)


def _unknown(programme: Programme) -> Iterator[tuple[str, str]]:
    """Names of what does not exist."""
    experiments, phases = tuple(programme.experiments), tuple(phase.name for phase in programme.phases)
    alternatives = tuple(name for h in programme.hypotheses.values() for name in h.alternatives)
    for name in (*experiments, *phases):
        if name in (BASE, END) or name.startswith((CONTROL, "sigma-")) or not _NAME.fullmatch(name):
            why = (
                f"is a name that is taken ({CONTROL}..., {BASE}, {END}, sigma-...) or more than letters, digits, . _ -"
            )
            yield name, f"{why}; choose another"
    for name in phases:
        if phases.count(name) > 1:
            yield f"phases.{name}", "stands there twice; give the second another name"
        if name in programme.scenarios:
            yield f"scenarios.{name}", "is the name of a phase, too; rename one of them"
    for name, experiment in programme.experiments.items():
        if experiment.point is not None and experiment.point not in POINTS:
            near = _nearest(experiment.point, tuple(POINTS))
            yield f"experiments.{name}.point={experiment.point}", f"unknown point; did you mean {near}?"
        yield from _unknown_settings(f"experiments.{name}.settings", experiment.settings)
        for tested in experiment.tests:
            if tested not in alternatives:
                yield f"experiments.{name}.tests={tested}", _unknown_name("alternative", tested, alternatives)
    yield from _unknown_settings("settings", programme.settings)
    if programme.table is not None:
        point = programme.table.point
        if point not in POINTS:
            yield f"table.point={point}", f"unknown point; did you mean {_nearest(point, tuple(POINTS))}?"
        modes = ("W4A4", "W4A8", "W4A16")
        for mode in programme.table.sigmas:
            if mode not in modes:
                yield f"table.sigmas.{mode}", f"unknown mode; did you mean {_nearest(mode, modes)}?"
    for question, hypothesis in programme.hypotheses.items():
        for name, alternative in hypothesis.alternatives.items():
            for key, said in (("better", alternative.better), ("than", alternative.than)):
                if said not in (*experiments, CONTROL, BASE):
                    yield (
                        f"hypotheses.{question}.{name}.{key}={said}",
                        _unknown_name("experiment", said, (*experiments, CONTROL, BASE)),
                    )
            if not {alternative.better, alternative.than} & programme.experiments.keys():
                yield f"hypotheses.{question}.{name}", "compares no experiment; name one in better or in than"
    targets = (*phases, END, *programme.scenarios)
    for key, rule in _rules(programme):
        if rule.go not in targets:
            yield f"{key}.go={rule.go}", _unknown_name("phase or scenario", rule.go, targets)
        for name in rule.skip:
            if name not in experiments:
                yield f"{key}.skip={name}", _unknown_name("experiment", name, experiments)
    for phase in programme.phases:
        for name in phase.run:
            if name not in experiments:
                yield f"phases.{phase.name}.run={name}", _unknown_name("experiment", name, experiments)
        for name in phase.base:
            if name not in phases:
                yield f"phases.{phase.name}.base={name}", _unknown_name("phase", name, phases)
    for key, when in _conditions(programme):
        for atom in when.atoms():
            for place, name in enumerate(atom.names):
                if name not in experiments and (place == 0 or name not in (CONTROL, BASE)):
                    yield f"{key}.{atom.word}={name}", _unknown_name("experiment", name, (*experiments, CONTROL, BASE))


def _unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    return f"unknown {what}; " + (f"did you mean {_nearest(name, known)}?" if known else "there is none")


def _unknown_settings(key: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    known = flatten_fields(TrialConfig)
    for setting in leaves(settings):
        if setting not in known and not any(setting.startswith(f"{whole}.") for whole in ("task", "model.recipe")):
            yield f"{key}.{setting}", f"unknown setting; did you mean {_nearest(setting, known)}?"
        if setting in ("seed", "threads"):
            yield f"{key}.{setting}", "the programme gives every trial its own (--seed, --cpus); leave it out"


def _overlaps(programme: Programme) -> Iterator[tuple[str, str]]:
    """Thresholds of one gain that two rules of a phase share, and growing words that do not grow."""
    for (below, low), (above, high) in pairwise(programme.success.items()):
        if high <= low:
            yield f"success.{above}={high:g}", f"thresholds overlap: {below} begins at {low:g}; give a larger number"
    for phase in programme.phases:
        seen: list[tuple[int, Condition]] = []
        for number, rule in enumerate(phase.then):
            for atom in _asked_together(rule.when):
                for other, earlier in seen:
                    if other != number and atom.names == earlier.names and _overlap(atom, earlier):
                        yield (
                            f"phases.{phase.name}.then.{number}.when",
                            f"thresholds overlap: {atom.words()}, and in then.{other} {earlier.words()}; "
                            "let one end where the other begins",
                        )
                seen.append((number, atom))


def _asked_together(when: Condition | None) -> list[Condition]:
    """Gains that must hold for it."""
    if when is None:
        return []
    if when.word == "all":
        return [atom for part in when.parts for atom in _asked_together(part)]
    return [when] if when.word == "gain" else []


def _overlap(one: Condition, other: Condition) -> bool:
    infinite = float("inf")
    low = max(-infinite if c.above is None else c.above for c in (one, other))
    high = min(infinite if c.below is None else c.below for c in (one, other))
    return low < high


def _order(programme: Programme) -> Iterator[tuple[str, str]]:
    """Phases run forward, each once, and every rule can be reached."""
    for name in programme.experiments:
        if not programme.phases_of(name):
            yield f"experiments.{name}", "runs in no phase; name it in the run of one, or remove it"
    place = {phase.name: number for number, phase in enumerate(programme.phases)}
    for phase in programme.phases:
        here = f"phases.{phase.name}"
        for number, rule in enumerate(phase.then):
            if rule.go in place and place[rule.go] <= place[phase.name]:
                later = [name for name, at in place.items() if at > place[phase.name]] or [END]
                yield (
                    f"{here}.then.{number}.go={rule.go}",
                    f"is a cycle: {rule.go} does not come after {phase.name}, and a phase runs once; "
                    f"go to {' or '.join(dict.fromkeys([*later, END]))}",
                )
            last = number == len(phase.then) - 1
            if rule.when is None and not last:
                yield f"{here}.then.{number}", "holds always, so the rules after it are never asked; put it last"
            if rule.when is not None and last:
                yield f"{here}.then.{number}", "is the last rule and has a condition; add one without `when` after it"
        for name in phase.base:
            if place[name] >= place[phase.name]:
                yield (
                    f"{here}.base={name}",
                    f"is a cycle: {name} does not come before {phase.name}; name an earlier one",
                )
        for name in phase.run:
            if phase.base and len(programme.phases_of(name)) > 1:
                yield f"{here}.run={name}", "runs in another phase without this base; give it another name there"
    for number, rule in enumerate(programme.stop):
        if rule.when is None or rule.go in place:
            yield f"stop.{number}", "needs a condition, and a `go` that ends the programme: end, or a scenario"


@dataclass(frozen=True, slots=True)
class _Way:
    """What is certain where a phase begins."""

    ran: frozenset[str]
    """Phases."""
    won: frozenset[str]
    """Phases with a winner."""


def _ways(programme: Programme) -> Iterator[tuple[str, str]]:
    """What cannot have run when a rule asks, and bases without a winner, over all ways through the phases."""
    first = programme.phases[0].name
    at: dict[str, set[_Way]] = {phase.name: set() for phase in programme.phases}
    at[first].add(_Way(frozenset(), frozenset()))
    for phase in programme.phases:  # forward only, so every way to it is known by now
        key = f"phases.{phase.name}"
        if not at[phase.name]:
            yield key, "is never reached: no rule goes to it; let one, or remove it"
        may = {name for way in at[phase.name] for ran in (*way.ran, phase.name) for name in programme.phase(ran).run}
        for number, rule in enumerate(phase.then):
            for atom in () if rule.when is None else rule.when.atoms():
                for name in atom.names:
                    if name in programme.experiments and name not in may:
                        yield (
                            f"{key}.then.{number}.when.{atom.word}={name}",
                            f"cannot have run by then; ask about one of {', '.join(sorted(may))}",
                        )
                    if name == BASE and not any(p.base for p in programme.phases_of(atom.names[0])):
                        yield (
                            f"{key}.then.{number}.when.{atom.word}",
                            f"{atom.names[0]} has no base; name an experiment",
                        )
            if rule.go in at:
                won = {p.name for p in programme.phases if _shows_help(rule.when, p.run)}
                for way in at[phase.name]:
                    ran = way.ran | {phase.name}
                    at[rule.go].add(_Way(ran, way.won | (won & ran)))
                    base = programme.phase(rule.go).base
                    if base and not set(base) & (way.won | (won & ran)):
                        helpers = [name for other in base for name in programme.phase(other).run]
                        yield (
                            f"phases.{rule.go}.base={','.join(base)}",
                            f"may have no winner when {key}.then.{number} goes there; let that rule ask for "
                            f"helps: {' or '.join(helpers)}, or leave base out",
                        )


def _shows_help(when: Condition | None, names: Sequence[str]) -> bool:
    """Whether the condition holds only where one of these helps."""
    if when is None:
        return False
    if when.word == "helps":
        return when.names[0] in names
    if when.word == "all":
        return any(_shows_help(part, names) for part in when.parts)
    return when.word == "any" and all(_shows_help(part, names) for part in when.parts)


def _rules(programme: Programme) -> Iterator[tuple[str, Rule]]:
    for phase in programme.phases:
        yield from ((f"phases.{phase.name}.then.{number}", rule) for number, rule in enumerate(phase.then))
    yield from ((f"stop.{number}", rule) for number, rule in enumerate(programme.stop))


def _conditions(programme: Programme) -> Iterator[tuple[str, Condition]]:
    for key, rule in _rules(programme):
        if rule.when is not None:
            yield f"{key}.when", rule.when
    yield from ((f"scenarios.{name}.when", scenario.when) for name, scenario in programme.scenarios.items())

"""What a programme does next: a pure function of what was registered and of the outcomes on disk.

    walk(programme, outcomes)   every step so far, with its reasons; the last is what comes next

There is no other state. `rin program run` asks it what is due, `show` prints it, `what-if` walks it with assumed
outcomes, documents are written from it; so a driver that is killed anywhere goes on with the decisions that it made.

**Replicates.** An experiment runs twice, then up to the first look, then from look to look while a decision hangs on it
and a look is left. Two collapses and it is not run again: it `collapses`. At each moment only as many replicates count
as the walk has asked for by then, so what is run later, for a later rule, never changes an earlier decision; a decision
stands. A replicate that is missing (its trial failed) is asked for again, and nothing is decided without it.

**Conditions** are yes, no or undecided:

    helps X      X is better than its control, at its part of the level; a collapsed arm does not help
    hurts X      worse than its control, or collapsed
    collapses X  two of its runs collapsed
    fails X      collapsed, or its interval ends below what would count: its `success.minimum`; without one, the first
                 of the programme's `success`; without that, 0. What helps does not fail
    beats X, Y   better than Y; where Y collapsed, X beats it if it helps; undecided where both collapsed
    gain X, Y    the interval of the difference lies above, or below, so many points
    undecided X  not known to help, to hurt or to collapse when no look is left
    every, some  of one of these words, over all experiments that ran

What did not run is undecided for all of them, and so is, but for `collapses`, what has a control that collapsed twice
itself. A rule that stays undecided at the last look does not fire.

`fails` and `gain` ask an interval against a limit, which a verdict does not answer: theirs is that of the last look,
also where the verdict fell before. All looks' intervals hold together, so the level does.

**The level** is Bonferroni's: every comparison that the programme may make on any path has its part of it, over all its
looks (`search/sequential.py`), and over all quantisation modes. So a programme without a difference anywhere says one
in at most that share of cases, whichever way it takes.

**The winner** of a phase helps (over a base: beats that base) and has the largest gain; the base of a later phase. Left
out: a winner that merely looked best.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from search.allocation import STOPPED
from search.replicates import Replicate
from search.sequential import SequentialRule, sequential_compare
from search.statistics import Comparison
from spaces.programme import BASE, CONTROL, END, Condition, Phase, Programme, Rule, Scenario

MARGIN = 0.01
"""Differences within one point count as the same."""
Outcomes = Mapping[str, Mapping[int, Replicate]]
"""Arm (a control's included) -> replicate -> how it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where an experiment runs. Example: Entry(arm="e13m-rmsnorm", control="control")."""

    arm: str
    """Its own name, or that of whatever has the same configuration and came before it."""
    control: str
    shared: str = ""
    """That arm, where it is not its own."""


Lineup = Callable[[str, Mapping[str, str]], Entry]
"""(experiment, experiment -> the winner that it lies over) -> where it runs."""


def alone(experiment: str, bases: Mapping[str, str]) -> Entry:
    """Each experiment an arm of its own, one control for all."""
    return Entry(arm=experiment, control=CONTROL)


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Example: Run(phase="foundation", replicates={"e13i-baseline": 4}, missing=(("e13i-baseline", 3),), why=...)"""

    phase: str
    replicates: Mapping[str, int]
    """Experiment, in the order of their rank -> how many replicates it is to have in all."""
    missing: tuple[tuple[str, int], ...]
    """Arm and replicate, without an outcome so far."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A rule that fired. Example: Decision(phase="foundation", rule=1, go="sigma", because="noise helps; ...", ...)"""

    phase: str
    rule: int
    """Of the phase's rules, from 0; of the programme's stops where `stops`."""
    stops: bool
    when: str
    """Its condition in words; empty for the last rule of a phase."""
    because: str
    go: str
    skipped: tuple[str, ...]
    winner: str | None
    """Of the phase."""
    facts: tuple[str, ...]
    """What the results say, a line each."""
    replicates: Mapping[str, int]
    """Of each experiment of the phase when it was decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Example: End(scenario="C", because="every experiment fails")."""

    scenario: str | None
    because: str


Step = Run | Decision | End


@dataclass(slots=True, kw_only=True)
class Walk:
    """A programme as far as its outcomes go."""

    programme: Programme
    outcomes: Outcomes
    lineup: Lineup = alone
    families: int = 1
    """Programmes that share the level: quantisation modes."""
    steps: list[Step] = field(default_factory=list)
    """In order; the last is a Run or an End."""
    shown: dict[str, int] = field(default_factory=dict)
    """Experiment that ran -> replicates that count so far."""
    bases: dict[str, str] = field(default_factory=dict)
    """Experiment -> winner that it lies over."""
    entries: dict[str, Entry] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    winners: dict[str, str] = field(default_factory=dict)
    """Phase -> experiment."""
    judged: dict[tuple[str, str, int, bool], Comparison] = field(default_factory=dict)
    """What has been compared: one and other, replicates, whether a verdict stands."""
    rule: SequentialRule = field(init=False)
    """Of each comparison."""

    def __post_init__(self) -> None:
        self.rule = rule_of(self.programme, self.families)

    @property
    def next(self) -> Run | End:
        last = self.steps[-1]
        assert not isinstance(last, Decision)
        return last

    @property
    def decisions(self) -> list[Decision]:
        return [step for step in self.steps if isinstance(step, Decision)]

    @property
    def scenario(self) -> Scenario | None:
        last = self.next
        name = last.scenario if isinstance(last, End) else None
        return None if name is None else self.programme.scenarios[name]

    def other(self, experiment: str, name: str) -> str | None:
        """What `base` means beside this experiment; None where that has none."""
        return self.bases.get(experiment) if name == BASE else name

    def runs(self, name: str, beside: str | None = None) -> list[Replicate]:
        """Of an experiment, as many as count; of `control`, those of the control of `beside`."""
        if name == CONTROL:
            assert beside is not None
            arm, count = self.entries[beside].control, self.shown[beside]
        else:
            arm, count = self.entries[name].arm, self.shown[name]
        held = self.outcomes.get(arm, {})
        return [held[number] for number in range(count) if number in held]

    def collapsed(self, name: str) -> bool:
        return sum(run.collapsed for run in self.runs(name)) >= STOPPED

    def without_measure(self, name: str) -> bool:
        """Its control breaks without any noise: whatever holds beside it would look like a gain."""
        return sum(run.collapsed for run in self.runs(CONTROL, beside=name)) >= STOPPED

    def compare(self, name: str, other: str = CONTROL, *, verdict_stands: bool = True) -> Comparison | None:
        """At the looks that both have had; None where one did not run. In between there is nothing to say."""
        against = self.other(name, other)
        if name not in self.shown or (against != CONTROL and against not in self.shown) or against is None:
            return None
        a, b = self.runs(name), self.runs(against, beside=name)
        looks = self.programme.replicates.looks
        count = max((look for look in looks if look <= min(len(a), len(b))), default=0)
        if count == 0:
            return Comparison(difference=math.nan, replicates=0, margin=MARGIN)
        key = (name, against, count, verdict_stands)
        if key not in self.judged:
            self.judged[key] = self._judge(a[:count], b[:count], verdict_stands)
        return self.judged[key]

    def _judge(self, a: Sequence[Replicate], b: Sequence[Replicate], verdict_stands: bool) -> Comparison:
        one, other = tuple(run.accuracy for run in a), tuple(run.accuracy for run in b)
        final = len(a) == self.programme.replicates.looks[-1]
        if any(run.correct is None for run in (*a, *b)):
            return _by_accuracy(one, other, self.rule, final, verdict_stands)
        correct = [run.correct or () for run in a], [run.correct or () for run in b]
        return sequential_compare(
            one,
            other,
            rule=self.rule,
            final=final,
            margin=MARGIN,
            correct=correct,
            verdict_stands=verdict_stands,
        )


@lru_cache(maxsize=4096)
def _by_accuracy(
    one: tuple[float, ...], other: tuple[float, ...], rule: SequentialRule, final: bool, verdict_stands: bool
) -> Comparison:
    """Kept: thousands of walks over assumed outcomes ask for the same few."""
    return sequential_compare(one, other, rule=rule, final=final, margin=MARGIN, verdict_stands=verdict_stands)


def rule_of(programme: Programme, families: int = 1) -> SequentialRule:
    """Each comparison's part of the level, over its looks."""
    given = programme.replicates
    return SequentialRule(looks=given.looks, level=given.level / (len(programme.comparisons()) * families))


def next_step(programme: Programme, outcomes: Outcomes, lineup: Lineup = alone, families: int = 1) -> Run | End:
    return walk(programme, outcomes, lineup, families).next


# --- the walk ---------------------------------------------------------------------------------------------------------


def walk(programme: Programme, outcomes: Outcomes, lineup: Lineup = alone, families: int = 1) -> Walk:
    """Until an outcome is missing, or the end."""
    so_far = Walk(programme=programme, outcomes=outcomes, lineup=lineup, families=families)
    place: str = programme.phases[0].name
    while True:
        phase = programme.phase(place)
        decided = _through(so_far, phase)
        if isinstance(decided, Run):
            so_far.steps.append(decided)
            return so_far
        so_far.steps.append(decided)
        so_far.skipped |= set(decided.skipped)
        if decided.winner is not None:
            so_far.winners[phase.name] = decided.winner
        if decided.go == END or decided.go in programme.scenarios:
            so_far.steps.append(_end(so_far, phase, decided.go))
            return so_far
        place = decided.go


def ranked(programme: Programme, names: Sequence[str], worth: Mapping[str, float] | None = None) -> list[str]:
    """By priority, then by `worth`, which is the registered confidence where nothing better is known; then as they are
    listed. The order in which they run, which decides nothing."""
    worth = worth or {}

    def key(name: str) -> tuple[float, float]:
        experiment = programme.experiments[name]
        return experiment.priority, -worth.get(name, experiment.confidence or 0.0)

    return sorted(names, key=key)


def _through(so_far: Walk, phase: Phase) -> Run | Decision:
    """All that happens in a phase, as far as outcomes go."""
    programme, looks = so_far.programme, so_far.programme.replicates.looks
    names = ranked(programme, [name for name in phase.run if name not in so_far.skipped])
    base = next((so_far.winners[name] for name in phase.base if name in so_far.winners), None)
    assert base is not None or not phase.base, f"{phase.name} has no base: {so_far.winners}"
    for name in names:
        if base is not None:
            so_far.bases[name] = base
        if name not in so_far.entries:
            so_far.entries[name] = so_far.lineup(name, so_far.bases)
    fresh = [name for name in names if name not in so_far.shown]
    for goal, why in ((min(STOPPED, looks[0]), "whether they hold"), (looks[0], "up to the first look")):
        if missing := _show(so_far, phase, fresh, goal, f"{phase.goal or phase.name}: {why}"):
            return missing
    while True:
        for number, rule in enumerate(programme.stop):
            assert rule.when is not None
            if _ask(so_far, rule.when)[0] is True:
                return _decision(so_far, phase, names, rule, number, stops=True)
        for number, rule in enumerate(phase.then):
            truth, open_ = (True, frozenset()) if rule.when is None else _ask(so_far, rule.when)
            if truth is None and open_:
                if missing := _further(so_far, phase, open_, rule.when):
                    return missing
                break  # asked anew, with more replicates
            if truth is True:
                return _decision(so_far, phase, names, rule, number, stops=False)


def _further(so_far: Walk, phase: Phase, names: frozenset[str], when: Condition | None) -> Run | None:
    """Those that have the fewest replicates get as many as the next look has."""
    least = min(so_far.shown[name] for name in names)
    goal = min(look for look in so_far.programme.replicates.looks if look > least)
    behind = ranked(so_far.programme, [name for name in names if so_far.shown[name] == least])
    assert when is not None
    return _show(so_far, phase, behind, goal, f"whether {when.words()} is undecided at {least} replicates")


def _show(so_far: Walk, phase: Phase, names: Sequence[str], goal: int, why: str) -> Run | None:
    """Let so many replicates count, of those that do not collapse; what is missing of them is to be run first."""
    missing: dict[tuple[str, int], None] = {}
    reach: dict[str, int] = {}
    for name in names:
        entry = so_far.entries[name]
        held = so_far.outcomes.get(entry.arm, {})
        reach[name] = _until_stopped(held, goal)
        for number in range(reach[name]):
            for arm in (entry.control, entry.arm):
                if number not in so_far.outcomes.get(arm, {}):
                    missing[arm, number] = None
    if missing:
        return Run(phase=phase.name, replicates=dict.fromkeys(names, goal), missing=tuple(missing), why=why)
    so_far.shown.update(reach)
    return None


def _until_stopped(held: Mapping[int, Replicate], goal: int) -> int:
    """Replicates up to the collapse that stops an arm, where the ones before it are known."""
    collapses = 0
    for number in range(goal):
        if number not in held:
            return goal
        collapses += held[number].collapsed
        if collapses == STOPPED:
            return number + 1
    return goal


def _decision(so_far: Walk, phase: Phase, names: Sequence[str], rule: Rule, number: int, *, stops: bool) -> Decision:
    return Decision(
        phase=phase.name,
        rule=number,
        stops=stops,
        when="" if rule.when is None else rule.when.words(),
        because=rule.because,
        go=rule.go,
        skipped=tuple(name for name in rule.skip if name not in so_far.shown),
        winner=_winner(so_far, names),
        facts=tuple(fact(so_far, name) for name in names),
        replicates={name: so_far.shown[name] for name in names},
    )


def _winner(so_far: Walk, names: Sequence[str]) -> str | None:
    gains = {}
    for name in names:
        over = BASE if name in so_far.bases else CONTROL
        found = so_far.compare(name, over)
        held = not (so_far.collapsed(name) or so_far.without_measure(name))
        if found is not None and found.verdict == "better" and held:
            gains[name] = found.difference
    return max(gains, key=lambda name: gains[name], default=None)


def _end(so_far: Walk, phase: Phase, go: str) -> Run | End:
    """In the scenario that the rule names, or in the first that holds; more replicates where one hangs on them."""
    if go != END:
        return End(scenario=go, because=f"phase {phase.name} ends in it")
    while True:
        for name, scenario in so_far.programme.scenarios.items():
            truth, open_ = _ask(so_far, scenario.when)
            if truth is True:
                return End(scenario=name, because=scenario.when.words())
            if truth is None and open_:
                if missing := _further(so_far, phase, open_, scenario.when):
                    return missing
                break
        else:
            return End(scenario=None, because="no scenario is shown to hold")


# --- conditions -------------------------------------------------------------------------------------------------------

Answer = tuple[bool | None, frozenset[str]]
"""Yes, no or undecided; undecided: experiments whose further replicates could decide it."""


def _ask(so_far: Walk, when: Condition) -> Answer:
    """Kleene's logic: a part that is not known leaves the whole undecided only where it could change it."""
    if when.word == "not":
        truth, open_ = _ask(so_far, when.parts[0])
        return (None if truth is None else not truth), open_
    if when.word in ("every", "some"):
        atoms = tuple(Condition(word=_each(when), names=(name,)) for name in so_far.shown)
        return _joined(so_far, atoms, of_all=when.word == "every") if atoms else (None, frozenset())
    if when.word in ("all", "any"):
        return _joined(so_far, when.parts, of_all=when.word == "all")
    if any(name not in so_far.shown for name in _named(so_far, when)):
        return None, frozenset()
    truth = _atom(so_far, when)
    return truth, _may_decide(so_far, when) if truth is None else frozenset()


def _each(when: Condition) -> Literal["helps", "hurts", "collapses", "fails", "undecided"]:
    return when.each  # type: ignore[return-value]


def _joined(so_far: Walk, parts: Sequence[Condition], *, of_all: bool) -> Answer:
    answers = [_ask(so_far, part) for part in parts]
    if any(truth is (not of_all) for truth, _ in answers):
        return not of_all, frozenset()
    if all(truth is of_all for truth, _ in answers):
        return of_all, frozenset()
    return None, frozenset().union(*(open_ for truth, open_ in answers if truth is None))


def _named(so_far: Walk, when: Condition) -> list[str]:
    """The experiments that it is about; '' for a base that is not there."""
    names = [so_far.other(when.names[0], name) or "" for name in when.names]
    return [name for name in names if name != CONTROL]


def _may_decide(so_far: Walk, when: Condition) -> frozenset[str]:
    """The ones that have the fewest replicates, where a look is left and none of them is stopped."""
    names = _named(so_far, when)
    last = so_far.programme.replicates.looks[-1]
    if any(so_far.collapsed(name) for name in names):
        return frozenset()
    if when.word != "collapses" and any(so_far.without_measure(name) for name in names):
        return frozenset()
    return frozenset(name for name in names if so_far.shown[name] < last)


def _atom(so_far: Walk, when: Condition) -> bool | None:
    """Of experiments that ran."""
    name = when.names[0]
    collapsed = so_far.collapsed(name)
    if when.word == "collapses":
        broken = sum(run.collapsed for run in so_far.runs(name))
        at_last = so_far.shown[name] >= so_far.programme.replicates.looks[-1]
        return True if collapsed else None if broken and not at_last else False
    if so_far.without_measure(name):
        return True if when.word == "undecided" else None
    if when.word in ("beats", "gain"):
        return _pair(so_far, when, collapsed)
    found = so_far.compare(name)
    assert found is not None
    if when.word == "undecided":
        settled = collapsed or found.verdict != "undecided"
        return False if settled else None if _may_decide(so_far, when) else True
    if collapsed:
        return when.word in ("hurts", "fails")
    if when.word == "fails":
        own = so_far.programme.experiments[name].success
        least = (min(so_far.programme.success.values(), default=0.0) if own is None else own.minimum) / 100
        seen = so_far.compare(name, verdict_stands=False)
        assert seen is not None
        return False if seen.low >= least or found.verdict == "better" else True if seen.high < least else None
    wanted = "better" if when.word == "helps" else "worse"
    return None if found.verdict == "undecided" else found.verdict == wanted


def _pair(so_far: Walk, when: Condition, collapsed: bool) -> bool | None:
    """A collapsed arm is behind one that held; of two that collapsed nothing is known."""
    name, other = when.names[0], so_far.other(when.names[0], when.names[1])
    assert other is not None
    other_collapsed = other != CONTROL and so_far.collapsed(other)
    if collapsed or other_collapsed:
        if collapsed and other_collapsed:
            return None
        ahead = False if collapsed else _atom(so_far, Condition(word="helps", names=(name,)))
        if when.word == "beats" or ahead is None:
            return ahead
        return ahead if when.below is None else not ahead if when.above is None else False
    found = so_far.compare(name, other, verdict_stands=when.word == "beats")
    assert found is not None
    if when.word == "beats":
        return None if found.verdict == "undecided" else found.verdict == "better"
    above = -math.inf if when.above is None else when.above / 100
    below = math.inf if when.below is None else when.below / 100
    if found.low > above and found.high < below:
        return True
    return False if found.high <= above or found.low >= below else None


# --- words ------------------------------------------------------------------------------------------------------------


def fact(so_far: Walk, name: str) -> str:
    """Example: `e13i-targeted: +1.20 points over control-resample [-0.31, +2.71], 8 replicates: undecided`."""
    entry, runs = so_far.entries[name], so_far.runs(name)
    same = f" (the same configuration as {entry.shared})" if entry.shared else ""
    broken = sum(run.collapsed for run in runs)
    if so_far.collapsed(name):
        return f"{name}{same}: {broken} of {len(runs)} runs collapsed, and it was not run again"
    if so_far.without_measure(name):
        lost = sum(run.collapsed for run in so_far.runs(CONTROL, beside=name))
        return (
            f"{name}{same}: {broken} of {len(runs)} runs collapsed, and {lost} of {entry.control}, which has no noise: "
            "nothing can be compared with it"
        )
    found = so_far.compare(name)
    assert found is not None
    words = interval(found, entry.control)
    return f"{name}{same}: {words}" + (f", {broken} collapsed" if broken else "")


def interval(found: Comparison, other: str) -> str:
    """Example: `+1.20 points over control [-0.31, +2.71], 8 replicates: undecided`."""
    if found.replicates == 0:
        return f"not compared with {other} yet"
    low, high = (f"{100 * end:+.2f}" if math.isfinite(end) else "..." for end in (found.low, found.high))
    return (
        f"{100 * found.difference:+.2f} points over {other} [{low}, {high}], {found.replicates} replicates: "
        f"{found.verdict}"
    )


def path_lines(so_far: Walk) -> list[str]:
    """Every decision with its reasons, and what comes next."""
    lines: list[str] = []
    for step in so_far.steps:
        if isinstance(step, Decision):
            asked = f"since {step.when}" if step.when else "since nothing else is shown"
            lines += [f"phase {step.phase}:", *(f"  {line}" for line in step.facts)]
            lines += [f"  -> {step.go}, {asked}: {step.because}"]
            lines += [f"     winner: {step.winner}"] if step.winner else []
            lines += [f"     skipped: {', '.join(step.skipped)}"] if step.skipped else []
        elif isinstance(step, Run):
            wanted = ", ".join(f"{name} to {count}" for name, count in step.replicates.items())
            lines.append(f"next: phase {step.phase}, {wanted} replicates ({len(step.missing)} runs): {step.why}")
        elif step.scenario is None:
            lines.append(f"end: in none of the scenarios; {step.because}")
        else:
            scenario = so_far.programme.scenarios[step.scenario]
            then = f"; next: {scenario.next}" if scenario.next else ""
            lines.append(f"end: scenario {step.scenario}, {scenario.title} ({step.because}): {scenario.says}{then}")
    return lines

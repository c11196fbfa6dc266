"""A programme as a study: which arms its experiments are, what is due, and how far it is.

One study of kind `program` holds it all. An experiment is an arm; two with the same configuration share one; every
filter policy, precision and reward has its control (`search/lineup.py`), run once for all phases; replicate k has the
same seed everywhere. With modes each quantisation mode walks the programme on its own, in arms named `w4a16-...` with
its own controls, and the level is divided among them. The lookup table's sigmas are arms, too.

What is due is asked of the walk (`search/program.py`) and written down as arms before it runs, at the start here and
run by run by the searcher, so that a killed driver's successor finds the same.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from search.allocation import STOPPED
from search.arms import Arm, control_for, read_arms, replicates_of, unfinished
from search.lineup import base_tree, missing_control
from search.program import Entry, Outcomes, Run, Walk, walk
from search.registration import (
    PROGRAMME_FILE,
    Registration,
    read_registrations,
    register,
    registrations_text,
)
from search.rewards import pinned
from search.store import StudyConfig, check_ranks, only_driver
from search.tolerance import Boundary, NoisyRun, boundaries
from spaces.config import MODES, ConfigError, TrialConfig
from spaces.points import POINTS
from spaces.programme import Programme
from spaces.reading import as_tree, merge, read_config
from spaces.uses import is_noisy, refuse_idle

if TYPE_CHECKING:
    from search.events import View
    from search.study import StudyResult
    from trainable.policy.embedded import Progress

_QUIET = {"noise": {"sigma_start": 0.0, "zones": []}}


# --- which arms -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Lineup:
    """The arms of one mode, those of the lookup table and then in the order in which a walk comes to them, without the
    mode in their names; the first is its control. An arm has the name of what came first, so the table, which is known
    from the start, is placed before any experiment: whatever follows, it finds the runs that there are."""

    study: StudyConfig
    programme: Programme
    mode: str = ""
    arms: list[Arm] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        return f"{self.mode.lower()}-" if self.mode else ""

    def config(self, experiment: str, bases: Mapping[str, str]) -> TrialConfig:
        """Workload, the programme's settings, the mode; the chain of its bases, itself; what the user sets. Raises
        ConfigError."""
        chain = [experiment]
        while chain[0] in bases:
            chain.insert(0, bases[chain[0]])
        tree = self._below()
        for name in chain:
            tree = merge(tree, self.programme.experiments[name].tree)
        return self._read(tree, " over ".join(reversed(chain)))

    def _below(self) -> dict[str, Any]:
        tree = merge(base_tree(self.study.model_copy(update={"settings": {}})), self.programme.settings)
        return merge(tree, {"quant": MODES[self.mode]} if self.mode else {})

    def _read(self, tree: Mapping[str, Any], origin: str) -> TrialConfig:
        return pinned(read_config(merge(tree, self.study.settings), origin=origin))

    def __call__(self, experiment: str, bases: Mapping[str, str]) -> Entry:
        return self.place(experiment, self.config(experiment, bases))

    def place(self, name: str, config: TrialConfig) -> Entry:
        """Beside what it is compared with; with those that run the same before it, where there is one."""
        if not self.arms:
            quiet = read_config(merge(as_tree(config), _QUIET), origin="control")
            self.arms.append(Arm(name="control", origin="control", config=quiet))
        arm = next((one for one in self.arms if one.config == config), None)
        if arm is None:
            arm = Arm(name=name, origin="point", config=config)
            if (missing := missing_control(arm, self.arms)) is not None:
                self.arms.append(missing)
            self.arms.append(arm)
        control = control_for(arm, self.arms)
        assert control is not None
        shared = "" if arm.name == name else f"{self.prefix}{arm.name}"
        return Entry(arm=f"{self.prefix}{arm.name}", control=f"{self.prefix}{control.name}", shared=shared)

    def named(self) -> list[Arm]:
        """Its arms as they are in the study."""
        return [replace(arm, name=f"{self.prefix}{arm.name}") for arm in self.arms]

    def table(self) -> list[tuple[float, str]]:
        """(sigma, arm) of the lookup table in this mode."""
        table = self.programme.table
        found = []
        for sigma in () if table is None else table.sigmas.get(self.mode, ()):
            noise = {"noise": {"sigma_start": sigma, "sigma_end": sigma / 100}}
            assert table is not None
            tree = merge(merge(self._below(), POINTS[table.point].settings), noise)
            name = f"sigma-{sigma:g}"
            found.append((sigma, self.place(name, self._read(tree, name)).arm))
        return found


def check_arms(study: StudyConfig, registration: Registration) -> list[Arm]:
    """Every arm that may run, over every base that may win. Raises ConfigError for an experiment that could not run, or
    that has nothing to be compared with."""
    programme, found = registration.programme, []
    for mode in registration.modes or ("",):
        lineup = Lineup(study=study, programme=programme, mode=mode)
        lineup.table()
        for phase in programme.phases:
            for name in phase.run:
                for bases in _possible_bases(programme, name):
                    config = lineup.config(name, bases)
                    refuse_idle(programme.experiments[name].settings, [config], f"experiments.{name}: ")
                    plain = read_config(merge(as_tree(config), _QUIET))
                    if not is_noisy(config) and config.grpo.reward == plain.grpo.reward:
                        raise ConfigError(
                            f"experiments.{name}: has no noise, so it is a control itself and nothing to compare with "
                            "one; give noise.sigma_start above 0"
                        )
                    lineup.place(name, config)
        found += lineup.named()
    check_ranks(study, [arm.config for arm in found])
    refuse_idle(study.settings, [arm.config for arm in found], "--set ")
    return found


def _possible_bases(programme: Programme, name: str) -> list[dict[str, str]]:
    """Each chain of winners that it may lie over."""
    (phase, *_) = programme.phases_of(name)
    if not phase.base:
        return [{}]
    return [
        {name: winner, **below}
        for winner in dict.fromkeys(other for base in phase.base for other in programme.phase(base).run)
        for below in _possible_bases(programme, winner)
    ]


# --- how far it is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """Example: TableRow(mode="W4A4", sigma=0.01, arm="w4a4-sigma-0.01", runs=3, collapsed=2)"""

    mode: str
    sigma: float
    arm: str
    runs: int
    collapsed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramState:
    """A programme that has begun, as its folder tells."""

    study: StudyConfig
    registrations: tuple[Registration, ...]
    arms: tuple[Arm, ...]
    walks: Mapping[str, Walk]
    """Mode -> how far it is; '' where none is named."""
    table: tuple[TableRow, ...]
    boundaries: tuple[Boundary, ...]
    """Of the lookup table: where noise begins to break runs, with its interval, per mode."""

    @property
    def registration(self) -> Registration:
        return self.registrations[-1]

    @property
    def ended(self) -> bool:
        return not any(isinstance(seen.next, Run) for seen in self.walks.values()) and not self.table_missing

    @property
    def table_missing(self) -> bool:
        table = self.registration.programme.table
        return table is not None and any(row.runs < table.replicates and row.collapsed < STOPPED for row in self.table)


def outcomes_of(study: StudyConfig, arms: Sequence[Arm]) -> Outcomes:
    return {arm.name: {run.seed - study.seed: run for run in replicates_of(study, arm)} for arm in arms}


def read_state(study: StudyConfig) -> ProgramState:
    """Raises ConfigError for files that are damaged, and for a study that is no programme."""
    registrations, arms = read_registrations(study), read_arms(study)
    last = registrations[-1]
    outcomes = outcomes_of(study, arms)
    walks, rows = {}, []
    for mode in last.modes or ("",):
        lineup = Lineup(study=study, programme=last.programme, mode=mode)
        table = lineup.table()
        walks[mode] = walk(last.programme, outcomes, lineup, families=len(last.modes) or 1)
        for sigma, name in table:
            runs = outcomes.get(name, {}).values()
            broken = sum(run.collapsed for run in runs)
            rows.append(TableRow(mode=mode, sigma=sigma, arm=name, runs=len(runs), collapsed=broken))
    kinds = {arm.name: "+".join(arm.config.noise.modules) for arm in arms}
    noisy = [
        NoisyRun(mode=row.mode, kind=kinds[row.arm], sigma=row.sigma, collapsed=run.collapsed)
        for row in rows
        for run in outcomes.get(row.arm, {}).values()
    ]
    return ProgramState(
        study=study,
        registrations=tuple(registrations),
        arms=tuple(arms),
        walks=walks,
        table=tuple(rows),
        boundaries=boundaries(noisy),
    )


def due(study: StudyConfig, registration: Registration, arms: Sequence[Arm]) -> list[Arm]:
    """Arms that are to have more replicates than are planned so far, new ones among them, with that number; in the
    order in which they are written down. Raises ConfigError where an experiment means something else than what ran
    under its name."""
    outcomes, known = outcomes_of(study, arms), {arm.name: arm for arm in arms}
    found = []
    for mode in registration.modes or ("",):
        lineup = Lineup(study=study, programme=registration.programme, mode=mode)
        table = lineup.table()
        seen = walk(registration.programme, outcomes, lineup, families=len(registration.modes) or 1)
        wanted: dict[str, int] = defaultdict(int)
        if isinstance(seen.next, Run):
            for name, count in seen.next.replicates.items():
                entry = seen.entries[name]
                wanted[entry.arm] = max(wanted[entry.arm], count)
                wanted[entry.control] = max(wanted[entry.control], count)
        if registration.programme.table is not None:
            for _, name in table:
                wanted[name] = max(wanted[name], registration.programme.table.replicates)
        for arm in lineup.named():
            before = known.get(arm.name)
            if before is not None and before.config != arm.config:
                raise ConfigError(
                    f"NAME={study.name}: {arm.name} has run there with other settings; give the experiment another "
                    "name, or the programme another --name"
                )
            broken = sum(run.collapsed for run in outcomes.get(arm.name, {}).values())
            held = 0 if before is None else before.planned
            if wanted[arm.name] > held and not (arm.origin != "control" and broken >= STOPPED):
                found.append(replace(arm if before is None else before, planned=wanted[arm.name]))
    return found


def most_runs(programme: Programme, modes: int = 1) -> int:
    """More than it can come to in so many modes."""
    table = sum(len(sigmas) for sigmas in programme.table.sigmas.values()) if programme.table else 0
    each = 2 * (len(programme.experiments) + table + 1)
    return each * programme.replicates.looks[-1] * modes


# --- running ----------------------------------------------------------------------------------------------------------


def begin_program(
    study: StudyConfig, programme: Programme, modes: Sequence[str], view: "View", progress: "Progress | None" = None
) -> "StudyResult":
    """Register it, and run it to its end. Raises ConfigError before anything is written down."""
    from search.first_build import build_once
    from search.preflight import check_sources
    from search.study import run_study

    registrations = register(study, programme, modes)
    every = check_arms(study, registrations[-1])
    first = due(study, registrations[-1], ())
    later = [arm for arm in every if arm.name not in {known.name for known in first}]  # run_study asks of the first
    check_sources(study, later)
    build_once(study, [arm.config for arm in later], progress)
    study = _bounded(study, registrations[-1])
    return run_study(study, view, progress, first, {PROGRAMME_FILE: registrations_text(registrations)})


def go_on(
    study: StudyConfig,
    programme: Programme | None,
    modes: Sequence[str] | None,
    view: "View",
    progress: "Progress | None" = None,
) -> "StudyResult":
    """Run what is missing. A programme or modes that differ from those registered are a new registration. Raises
    ConfigError."""
    from search.arms import write_arm
    from search.first_build import build_once
    from search.preflight import check_sources
    from search.study import resume_study

    with only_driver(study):
        before, arms = read_registrations(study), read_arms(study)
        last = before[-1]
        ended = sum(len(arm.results) for arm in arms)
        chosen = last.modes if modes is None else tuple(modes)
        registrations = register(study, programme or last.programme, chosen, before, ended)
        every = check_arms(study, registrations[-1])
        more = due(study, registrations[-1], arms)
        if len(registrations) > len(before):
            check_sources(study, every)
            build_once(study, [arm.config for arm in every], progress)
            study.folder.write(PROGRAMME_FILE, registrations_text(registrations))
        names = [arm.name for arm in arms]
        for arm in more:
            names += [] if arm.name in names else [arm.name]
            write_arm(study, names.index(arm.name), arm)
    if more or unfinished(study, arms):
        study = _bounded(study, registrations[-1])
    return resume_study(study, view, progress)


def _bounded(study: StudyConfig, registration: Registration) -> StudyConfig:
    """Room for whatever it may come to; when it has ended, what it came to stands there (`as_far_as_it_goes`)."""
    most = most_runs(registration.programme, len(registration.modes) or 1)
    looks = registration.programme.replicates.looks
    return study.model_copy(update={"trials": most, "total": most, "replicates": looks[-1]})


def stopped(arm: Arm) -> bool:
    """An arm that is not run again."""
    return arm.origin != "control" and sum(outcome.collapsed for outcome in arm.results.values()) >= STOPPED

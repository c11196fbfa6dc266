"""A sweep that some other process runs, as its folder shows it: from another terminal, or from another machine with the
store.

Trials write what is read here themselves. While one runs, its attempt's file says every few seconds how far it is, with
its last steps; a checkpoint has the steps before. Once it has ended, its outcome has everything and is never read
again, so that a look at 300 trials costs what the running ones do. Nothing is written, nobody is asked, and the sweep
does not notice.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from dashboards.live_rows import PACE_STEPS, Seen, Watched
from dashboards.report_text import interval
from search.arms import Arm, read_arm, trial_folder
from search.confirm import judge
from search.report import leading, screening
from search.statistics import Comparison
from search.store import StudyConfig, slots_of
from spaces.errors import ConfigError
from spaces.naming import describe_noise
from trainable.disk.trial_folder import TrialState, read_reports, read_trial
from trainable.metrics import ACCURACY, REWARD
from trainable.outcome import Outcome, StepReport

READERS = 8
"""Trials that are read at a time: in an object store each file is a journey."""


class SweepFolder:
    """Look at it again and again: `SweepFolder(study).look(driven=True)`."""

    def __init__(self, study: StudyConfig) -> None:
        self.study = study
        self.arms: list[Arm] = []
        """Those of which a trial has begun, with the outcomes that were read."""
        self._files: set[str] = set()
        self._states: dict[str, TrialState] = {}
        self._seen: dict[str, Seen] = {}
        self._ahead = (0, "")
        self._readers = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="watch")

    def look(self, *, driven: bool, now: float) -> Watched:
        """`driven`: a process runs the sweep now. Raises ConfigError for what is damaged, OSError of a store that does
        not answer."""
        names = [name for name in (self.study.folder / "trials").names() if not self._is_over(name)]
        self._read_arms(names)
        known = {arm.name for arm in self.arms}
        names = [name for name in names if _parts(name)[0] in known]
        for name, (state, seen) in zip(
            names, self._readers.map(lambda name: self._read(name, driven), names), strict=True
        ):
            self._states[name], self._seen[name] = state, seen
            if state.outcome is not None and state.status != "stopped":
                self._ended(name, state.outcome)
        trials = sorted(self._seen.values(), key=lambda seen: seen.begun)
        hours = sum(state.slot_hours(slots_of(self.study)) for state in self._states.values())
        return Watched(
            study=self.study,
            trials={seen.name: seen for seen in trials},
            hours=hours,
            hours_at=max([seen.alive for seen in trials if seen.status == "running"], default=now),
            ahead=self.ahead(),
        )

    def ahead(self) -> str:
        """Who is, by the outcomes that were read."""
        outcomes = sum(len(arm.results) for arm in self.arms)
        if self._ahead[0] != outcomes:
            self._ahead = outcomes, ahead_in(self.study, self.arms)
        return self._ahead[1]

    def _is_over(self, name: str) -> bool:
        return name in self._states and self._states[name].status in ("completed", "collapsed")

    def _read_arms(self, trials: Sequence[str]) -> None:
        """Where one is new."""
        known = {arm.name for arm in self.arms}
        if all(_parts(name)[0] in known for name in trials):
            return
        folder = self.study.folder / "arms"
        fresh = [name for name in folder.names() if name not in self._files]
        self.arms += self._readers.map(lambda name: read_arm(folder, name), fresh)
        self._files |= set(fresh)

    def _read(self, name: str, driven: bool) -> tuple[TrialState, Seen]:
        arm_name, replicate = _parts(name)
        arm = next(arm for arm in self.arms if arm.name == arm_name)
        folder = trial_folder(self.study, arm_name, replicate)
        state = read_trial(folder, driven=driven)
        known = self._seen.get(name)
        fresh = Seen(name=f"{arm_name}/{replicate}", config=arm.config)
        recent = [StepReport.from_record(record) for attempt in state.attempts[-1:] for record in attempt.recent]
        if known is None or state.outcome is not None or _misses_steps(known, state, recent):
            return state, seen_of(fresh, state, [*read_reports(folder), *recent])
        return state, seen_of(known, state, recent)

    def _ended(self, name: str, outcome: Outcome) -> None:
        arm_name, replicate = _parts(name)
        arm = next(arm for arm in self.arms if arm.name == arm_name)
        arm.results[replicate] = outcome
        arm.planned = max(arm.planned, replicate + 1)


def _parts(folder: str) -> tuple[str, int]:
    """Arm and replicate."""
    arm, _, replicate = folder.rpartition("-")
    return arm, int(replicate)


def _misses_steps(known: Seen, state: TrialState, recent: Sequence[StepReport]) -> bool:
    """Whether another process has it by now, or more steps were made than its attempt tells."""
    if state.attempts and state.attempts[-1].started != known.begun:
        return True
    return bool(recent) and recent[0].step > known.step


def seen_of(known: Seen, state: TrialState, reports: Sequence[StepReport]) -> Seen:
    """What was known of a trial, with what its folder says now; later reports of a step go before earlier ones."""
    attempts, outcome = state.attempts, state.outcome
    rewards, metrics, evaluated = dict(known.rewards), dict(known.metrics), known.evaluated
    steps = sorted({report.step: report for report in reports}.items())
    for step, report in steps:
        metrics |= report.signals
        evaluated = step + 1 if ACCURACY in report.signals else evaluated
        if REWARD in report.signals:
            rewards[step] = report.signals[REWARD]
    if outcome is not None:
        metrics[ACCURACY], evaluated = outcome.eval.accuracy, outcome.step
    last = attempts[-1] if attempts else None
    verdict = steps[-1][1].verdict if steps else None
    running = state.status == "running"
    return replace(
        known,
        status=state.status,
        step=max(state.step, steps[-1][0] + 1 if steps else 0),
        loads=running and last is not None and not last.recent,
        metrics=metrics,
        evaluated=evaluated,
        rewards=rewards,
        pace=tuple(report.seconds for _, report in steps)[-PACE_STEPS:] or known.pace,
        rule=state.rule or (verdict.rule if verdict else ""),
        why=state.reason or (verdict.evidence if verdict else ""),
        begun=last.started if last else 0.0,
        changed=steps[-1][1].time_ms / 1000 if running and steps else last.seen if last else 0.0,
        alive=last.seen if last else 0.0,
        took=3600 * state.hours,
    )


def ahead_in(study: StudyConfig, arms: Sequence[Arm]) -> str:
    """The candidate so far, or the arm that is confirmed, against its control: `candidate so far: c03 (rmsnorm 0.011 ->
    0.0011), +1.2 points [-0.4, +2.8] against control, 3 pairs: undecided, needs about 4 more replicates`. Empty where
    there is none; a programme has its own rules."""
    with suppress(ConfigError):  # of settings that a control does not share; the report says it in full
        if study.kind == "confirm" and len(arms) == 2:
            state = judge(study, arms=arms)
            if state.finding is not None:
                return f"{state.winner}, {_apart(state.comparison, state.control)}: {state.finding.words()}"
        elif study.kind in ("sweep", "ablation") and (found := leading(study, arms)) is not None:
            candidate, judged = found
            name = f"candidate so far: {candidate.arm.name} ({describe_noise(candidate.arm.config)})"
            if judged is None:
                return name
            said = screening(judged.finding.words())
            return f"{name}, {_apart(judged.corrected, candidate.control.name)}: {said}"
    return ""


def _apart(seen: Comparison, control: str) -> str:
    pairs = f"{seen.replicates} pair{'s'[: seen.replicates != 1]}"
    return f"{100 * seen.difference:+.1f} points {interval(seen)} against {control}, {pairs}"

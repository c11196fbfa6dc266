"""The live view, asserted as records and lines: of a sweep that this process drives, and of one that another does."""

import io
import json
import math
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from dashboards import watch
from dashboards.lasting import LastingStream
from dashboards.live import Board, sweep_view
from dashboards.live_folder import SweepFolder
from dashboards.live_rows import (
    ASCII_BARS,
    BARS,
    LEAST_WHY,
    Column,
    Seen,
    Watched,
    _cut,
    _wrapped,
    fitting,
    frame,
    news,
    sparkline,
    told,
)
from dashboards.watch import NOTHING_RUNS
from search.arms import Arm, trial_folder
from search.confirm import planned_confirmation
from search.events import StudyEvent, TrialEvent, View
from search.replicates import AT_ONCE
from search.store import StudyConfig, save_study_config
from spaces.points import POINTS
from spaces.reading import read_config
from tests import processes
from tests.written_sweeps import attempt, make_arm, outcome, report, study, write_sweep, write_trial
from trainable.collapse_rules import WORDS
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import RECENT, SHOWN, AttemptLog, read_attempts
from trainable.failure import FAILURES
from trainable.outcome import CollapseVerdict, StepReport

CONFIG = read_config(POINTS["e13i-baseline"].settings)
EVIDENCE = "entropy 2.56 nats, baseline 0.31, 3 steps in a row"


def event(status: str = "running", **changes: Any) -> TrialEvent:
    given: dict[str, Any] = {"arm": "c01", "replicate": 0, "status": status, "config": CONFIG, "metrics": {}, "at": 0.0}
    return TrialEvent(**{**given, **changes})


def step(number: int, reward: float = 0.25, **changes: Any) -> TrialEvent:
    """The event of a step; `number` steps are done after it."""
    metrics = {"grpo/reward": reward, "rin/sigma": 0.0123, **changes.pop("metrics", {})}
    return event(step=number, metrics=metrics, **{"seconds": 2.0, **changes})


def heard(events: Sequence[TrialEvent], config: StudyConfig | None = None) -> Watched:
    watched = Watched(study=config or study("/nowhere", trials=4))
    for one in events:
        watched = told(watched, one)
    return watched


def long_sweep(trials: int, running: int) -> Watched:
    """The last `running` of them still run; every fourth of the others collapsed."""
    events = []
    for number in range(trials):
        name = {0: "control", 3: "e13i-v4-filter-off"}.get(number, f"c{number:02d}")
        noise = {"sigma_start": 0.0123 * number, "sigma_end": 0.00123 * number}
        of = {"arm": name, "config": read_config({"noise": noise})}
        start = 100.0 * number
        events.append(event(at=start, **of))
        events += [step(done, 0.02 * done, at=start + 2 * done, **of) for done in range(1, 20)]
        if number < trials - running:
            how = {"status": "collapsed", "rule": "entropy_high", "why": EVIDENCE} if number % 4 == 1 else {}
            ended = {"step": 20, "metrics": {"eval/accuracy": 0.6125}, "at": start + 90, **how}
            events.append(event(**{"status": "completed", **ended, **of}))
    ahead = "candidate so far: c03 (rmsnorm 0.011 -> 0.0011), +1.2 points [-0.4, +2.8] against control, 3 pairs: ahead"
    return replace(heard(events, study("/nowhere", trials=trials + 10, budget_hours=3.5)), ahead=ahead)


def drawn(
    watched: Watched, width: int, height: int | None, *, ascii_only: bool = False, now: float = 5000
) -> list[str]:
    return [line.plain for line in frame(watched, width=width, height=height, now=now, ascii_only=ascii_only)]


# What is heard


def test_what_was_measured_stays_visible_in_the_steps_after_it() -> None:
    watched = heard([event(), step(1, metrics={"eval/accuracy": 0.375}), step(2, 0.5)])
    seen = watched.trials["c01/0"]
    assert (seen.step, seen.evaluated, seen.metrics["eval/accuracy"], seen.rewards) == (2, 1, 0.375, {0: 0.25, 1: 0.5})


def test_a_retry_loads_again_where_it_was_and_steps_that_are_made_again_replace_the_old_ones() -> None:
    before = [event(), *(step(done, done / 10) for done in range(1, 6))]
    again = heard([*before, event(at=50.0)]).trials["c01/0"]
    assert (again.status, again.loads, again.step, again.begun) == ("running", True, 5, 50.0)
    on = heard([*before, event(at=50.0), step(4, 0.9)]).trials["c01/0"]
    assert (on.loads, on.step, on.rewards) == (False, 4, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.9})


def test_hours_of_running_trials_tick_on_between_events() -> None:
    watched = heard([event(hours=1.0), event(arm="c02", hours=1.5, at=100.0)])
    assert watched.hours_by(100.0 + 3600) == pytest.approx(1.5 + 2.0)
    with_gpus = heard([event(hours=1.0)], study("/nowhere", gpus=0.5))
    assert with_gpus.hours_by(3600.0) == pytest.approx(1.0 + 0.5)
    assert "1.50 GPU hours" in drawn(with_gpus, 80, 20, now=3600.0)[1]


def ended(arm: str, seconds: float) -> list[TrialEvent]:
    return [event(arm=arm), step(1, arm=arm), event("completed", arm=arm, step=29, at=seconds)]


@pytest.mark.parametrize(
    ("events", "trials", "now", "seconds"),
    [
        ([event()], 1, 10.0, None),  # no step was timed
        ([event(), step(9, at=10.0)], 1, 10.0, 20 * 2.0),
        ([event(), step(9, at=10.0)], 1, 11.5, 20 * 2.0 - 1.5),
        ([event(), step(9, at=10.0)], 2, 10.0, 20 * 2.0 + 29 * 2.0),  # none has ended: the next has 29 such steps
        ([*ended("c00", 100.0), event(at=100.0), step(9, at=100.0)], 4, 100.0, 20 * 2.0 + 2 * 100.0),
        (
            [*ended("c00", 9.0), *(event(arm=c, at=9.0) for c in "ab"), *(step(9, arm=c, at=9.0) for c in "ab")],
            4,
            9.0,
            44.5,
        ),
        (
            [event(), event(arm="c02", at=1.0), step(9, at=90.0), event("completed", arm="c02", step=29, at=91.0)],
            4,
            90.0,
            (40 + 2 * 90) / 2,
        ),  # one has just ended
        ([event(), step(9), event(arm="c02"), step(28, arm="c02")], 2, 0.0, 40.0),  # the longer one
        ([event(), step(9, seconds=1.0), step(10, seconds=1.0), step(11, seconds=60.0)], 1, 0.0, 18 * 1.0),  # a median
        ([event(), step(9), event("failed", step=9)], 2, 0.0, 29 * 2.0),
    ],
)
def test_the_time_to_go_is_that_of_the_steps_left_over_the_places_that_there_are(
    events: list[TrialEvent], trials: int, now: float, seconds: float | None
) -> None:
    watched = heard(events, study("/nowhere", trials=trials))
    assert watched.seconds_left(now) == (None if seconds is None else pytest.approx(seconds))


def test_a_confirmation_counts_up_to_its_next_look_and_a_programme_alone() -> None:
    confirmation = study("/nowhere", kind="confirm", looks=(5, 8), trials=2, replicates=5)
    assert drawn(Watched(study=confirmation), 80, 20)[0] == "confirmation s: 0 of 10 trials ended, look after 5 pairs"
    assert drawn(Watched(study=study("/nowhere", kind="program")), 80, 20)[0] == "programme s: 0 trials ended"


# What is drawn


@pytest.mark.parametrize("size", [(200, 50), (160, 30), (120, 40), (80, 24), (60, 20), (60, 10), (40, 10)])
@pytest.mark.parametrize("trials", [1, 12, 60])
def test_lines_fit_into_any_screen_and_begin_with_the_trials_that_run(size: tuple[int, int], trials: int) -> None:
    """From the 25th trial on none of them was visible in 30 lines."""
    width, height = size
    lines = drawn(long_sweep(trials, running=1), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("trial ")) :]
    assert "running" in table[1]
    assert f"c{trials - 1:02d}/0" in table[1] or trials == 1
    if trials == 60 and height < 60:
        assert "completed" in table[2]
        assert "c58/0" in table[2]
        shown = len(table) - 2
        assert re.match(rf"{60 - shown} more: \d+ completed, \d+ collapsed$", table[-1])


@pytest.mark.parametrize("width", range(40, 201, 4))
def test_no_number_is_ever_cut(width: int) -> None:
    watched = long_sweep(30, running=3)

    def numbers(lines: list[str]) -> set[str]:
        return {word.strip("(),:;") for line in lines for word in line.split() if any(map(str.isdigit, word))}

    whole = numbers(drawn(watched, 1000, None))
    assert numbers(drawn(watched, width, 24)) - {f"{n}" for n in range(31)} - whole == set()


def test_columns_leave_in_the_order_of_what_they_are_worth() -> None:
    watched = long_sweep(12, running=2)

    def names(width: int) -> list[str]:
        return next(line for line in drawn(watched, width, 40) if line.startswith("trial ")).split("  ")

    shown = {width: [name.strip() for name in names(width) if name.strip()] for width in (60, 80, 120, 200)}
    assert shown[60] == ["trial", "state", "step", "acc %", "reward"]
    assert shown[80] == ["trial", "state", "step", "sigma", "acc %", "reward", "now"]
    assert shown[120] == ["trial", "noise", "state", "step", "sigma", "acc %", "reward", "why"]
    assert set(shown[200]) >= {*shown[120], "now", "time", "entropy"}


def test_room_is_given_by_rank_and_what_is_left_to_those_that_can_use_it() -> None:
    columns = [
        Column(name="a", rank=0, cells=["1234"]),
        Column(name="b", rank=2, cells=["123456"]),
        Column(name="c", rank=1, cells=[""], least=3, most=8),
    ]
    assert fitting(columns, 4) == {"a": 4}
    assert fitting(columns, 9) == {"a": 4, "c": 3}
    assert fitting(columns, 16) == {"a": 4, "c": 8}
    assert fitting(columns, 20) == {"a": 4, "c": 6, "b": 6}
    assert fitting(columns, 90) == {"a": 4, "c": 8, "b": 6}
    more = [*columns, Column(name="d", rank=3, cells=["12"], extra=True)]
    assert fitting(more, 21) == {"a": 4, "c": 7, "b": 6}
    assert fitting(more, 26) == {"a": 4, "c": 8, "b": 6, "d": 2}


@pytest.mark.parametrize(
    ("rewards", "steps", "width", "drawn"),
    [
        ({0: 0.0, 1: 0.5, 2: 1.0}, 3, 10, "▁▅█"),
        ({0: 0.0, 1: 1.0}, 4, 10, "▁█  "),  # it is half way
        ({0: 0.0, 2: 1.0}, 4, 10, "▁ █ "),  # a step that nobody heard of
        ({0: 0.0, 1: math.nan, 2: math.inf}, 3, 10, "▁××"),
        ({0: 0.0, 1: 1.0, 2: 1.0, 3: math.nan}, 4, 2, "▅×"),  # a mean does not hide it
        ({0: -5.0, 1: 7.0}, 2, 2, "▁█"),
        ({}, 2, 2, "  "),
    ],
)
def test_a_sparkline_spans_the_whole_trial(rewards: dict[int, float], steps: int, width: int, drawn: str) -> None:
    assert sparkline(rewards, steps, width, 0.0, 1.0) == drawn
    in_ascii = sparkline(rewards, steps, width, 0.0, 1.0, ascii_only=True)
    assert in_ascii.translate(str.maketrans(f"{ASCII_BARS}!", f"{BARS}×")) == drawn


def test_rewards_that_are_all_the_same_stand_in_the_middle() -> None:
    assert sparkline({0: 0.3, 1: 0.3}, 2, 2, 0.3, 0.3) == "▅▅"


def test_a_terminal_without_unicode_gets_ascii() -> None:
    watched = long_sweep(30, running=3)
    assert all(line.isascii() for line in drawn(watched, 100, 20, ascii_only=True))
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="latin-1"), force_terminal=True)
    assert console.options.ascii_only


@pytest.mark.parametrize(
    ("text", "width", "cut"),
    [("nats 2.56, base 0.31", 20, "nats 2.56, base 0.31"), ("nats 2.56, base 0.31", 19, "nats 2.56, base …"),
     ("nats 2.56, base 0.31", 12, "nats 2.56 …"), ("entropy_high: 2.5", 15, "entropy_high …"), ("1234", 3, "…")],
)  # fmt: skip
def test_text_is_cut_between_words(text: str, width: int, cut: str) -> None:
    assert _cut(text, width, ascii_only=False) == cut


@pytest.mark.parametrize("rule", [*WORDS, *FAILURES])
def test_the_narrowest_why_still_names_the_rule(rule: str) -> None:
    assert _cut(f"{rule}: {EVIDENCE}", LEAST_WHY, ascii_only=True).startswith(rule)


def test_parts_stay_together_and_long_ones_break_at_blanks() -> None:
    assert _wrapped(["one two", "three", "-4.5 to +6.25 points"], 17, False) == [
        "one two · three",
        "-4.5 to +6.25",
        "points",
    ]


def test_why_a_trial_ended_and_what_has_collapsed_so_far() -> None:
    of = {"rule": "entropy_high", "why": EVIDENCE}
    events = [
        *(event(arm=f"c{number}") for number in range(5)),
        event("collapsed", arm="c0", step=4, **of),
        event("collapsed", arm="c1", step=4, **of),
        event("collapsed", arm="c2", step=4, rule="gibberish", why="9 %"),
        event("failed", arm="c3", step=2, rule="hang", why="step 3: phase rollout took over 900 s"),
        step(3, arm="c4", **of),  # collapse.mode=monitor
    ]
    lines = drawn(heard(events), 240, 30)
    assert "3 collapsed: entropy_high 2, gibberish 1 · 1 failed" in lines[1]
    why = {line.split()[0]: line for line in lines if line.startswith("c")}
    assert why["c0/0"].endswith(f"entropy_high: {EVIDENCE}")
    assert why["c3/0"].endswith("hang: step 3: phase rollout took over 900 s")
    assert why["c4/0"].endswith(f"alarm: entropy_high: {EVIDENCE}")


def test_before_there_is_a_trial_it_says_what_is_going_on_and_for_how_long() -> None:
    """Twenty seconds of an empty table at the start, and of silence after Ctrl-C."""
    assert drawn(Watched(study=study("/nowhere"), doing="Ray starts", since=100.0), 60, 10, now=112.0) == [
        "sweep s: 0 of 8 trials ended",
        "Ray starts (12 s)",
        "0.00 trial-slot hours",
    ]
    assert "loading" in drawn(heard([event()]), 80, 10)[-1]


# What a sweep tells its view


def begin(view: View, config: StudyConfig) -> None:
    view(StudyEvent(study=config, doing="Ray starts", at=0.0))
    view(StudyEvent(study=config, doing="", at=1.0))


def test_outside_a_terminal_each_start_evaluation_and_end_is_one_line_with_its_time(tmp_path: Path) -> None:
    text = io.StringIO()
    with sweep_view(Console(file=text, width=200)) as view:
        begin(view, study(tmp_path, trials=3))
        view(event())
        view(step(1, metrics={"eval/accuracy": 0.125}))
        view(step(2))
        view(step(3, metrics={"eval/accuracy": 0.375}))
        view(event("collapsed", step=4, rule="filter_rejection", metrics={"grpo/reward": 0.0}, at=50.0))
        view(event("failed", arm="c02", step=2))
    lines = text.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == [
        "Ray starts",
        "[0/3] c01/0: starts, noise linear 0.05 -> 0.0005",
        "[0/3, about 2.9 min to go] c01/0: after 1 of 29 steps, accuracy 12.5 %",
        "[0/3, about 2.8 min to go] c01/0: after 3 of 29 steps, accuracy 37.5 %",
        "[1/3, about 1.7 min to go] c01/0: collapsed in step 3, the 4th of 29, rule filter_rejection, accuracy -",
        "[2/3, about 50 s to go] c02/0: failed after 2 steps, accuracy -",
    ]


def test_what_a_signal_is_answered_goes_past_python_s_buffers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a signal's handler print may raise."""
    with sweep_view(Console(file=io.StringIO())) as view:
        view(StudyEvent(study=study(tmp_path), doing="ends early", asked=True))
    assert capfd.readouterr().err == "ends early\n"


def test_a_terminal_shows_the_same_view_and_leaves_it_when_the_sweep_ends(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=200, height=20, color_system=None)
    with sweep_view(console) as view:
        begin(view, study(tmp_path))
        view(event())
        view(step(3, 0.25, metrics={"eval/accuracy": 0.375}))
    last = text.getvalue()
    for said in ("sweep s: 0 of 8 trials ended", "3/29", "37.5", "linear 0.05 -> 0.0005", "0.0123"):
        assert said in last
    assert last.rstrip("\x1b[0K").endswith("\x1b[1A\x1b[2K" * 1) or "\x1b[2K" in last


def test_a_phase_that_follows_another_has_its_own_title_and_trials(tmp_path: Path) -> None:
    config = study(tmp_path)
    write_sweep(config, [make_arm(config, "control")], {"control": [300]})
    board = Board()
    begin(board.hear, config)
    board.hear(event())
    confirmation = study(tmp_path, name="s-confirm", kind="confirm", looks=(5, 8), trials=2, replicates=5)
    begin(board.hear, confirmation)
    assert board.watched is not None
    assert (board.watched.study.name, dict(board.watched.trials)) == ("s-confirm", {})
    board.hear(event())
    begin(board.hear, confirmation.model_copy(update={"replicates": 8}))  # its next look
    assert board.watched.study.replicates == 8


def test_a_sweep_that_goes_on_shows_what_ran_before(tmp_path: Path) -> None:
    config = study(tmp_path, trials=3)
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "c01")], {"control": [300], "c01": [310]})
    console = Console(file=io.StringIO(), force_terminal=True, width=200, height=20)
    board = Board()
    begin(board.hear, config)
    assert board.watched is not None
    assert [trial.status for trial in board.watched.trials.values()] == ["completed", "completed"]
    board.draw(console)
    assert board._ahead.startswith(
        "candidate so far: c01 (rmsnorm 0.01 -> 0.001), +2.5 points [unknown] against control"
    )


# What another process reads


def running(config: StudyConfig, arm: Arm, reports: Sequence[StepReport], *, since: float = 1000.0) -> Folder:
    """A trial with its process, which has told of its last steps."""
    folder = trial_folder(config, arm.name, 0)
    log = AttemptLog(folder)
    for one in reports:
        log.stepped(one)
    log._values["started"] = since
    log.beat()
    return folder


def made(number: int, reward: float, **more: float) -> StepReport:
    signals = {"rin/sigma": 0.01, "grpo/reward": reward, "grpo/loss": 0.5, **more}
    return replace(report(number), signals=signals, seconds=3.0, time_ms=1000 * (1000 + number))


def test_an_attempt_tells_of_its_last_steps_and_of_no_more_than_is_shown(tmp_path: Path) -> None:
    config = study(tmp_path)
    folder = running(config, make_arm(config, "c01"), [made(n, n / 100, **{"eval/accuracy": 0.5}) for n in range(50)])
    (seen,) = read_attempts(folder)
    assert [record["step"] for record in seen.recent] == list(range(50 - RECENT, 50))
    assert StepReport.from_record(seen.recent[-1]).signals.keys() == {"rin/sigma", "grpo/reward", "eval/accuracy"}
    assert len(folder.read("attempt-001.json") or b"") < 400 * RECENT
    assert set(SHOWN) >= StepReport.from_record(seen.recent[-1]).signals.keys()


def test_a_reward_that_is_no_number_comes_through_an_attempt_s_file(tmp_path: Path) -> None:
    config = study(tmp_path)
    folder = running(config, make_arm(config, "c01"), [made(0, math.nan)])
    assert math.isnan(read_attempts(folder)[0].recent[0]["grpo/reward"])


def test_a_trial_that_runs_elsewhere_is_read_from_its_attempt_and_its_past_from_its_checkpoint(tmp_path: Path) -> None:
    config = study(tmp_path)
    control = make_arm(config, "control")
    write_sweep(config, [control], {})
    past = json.dumps({"reports": [made(n, 0.1).as_record() for n in range(3)]})
    (trial_folder(config, "control", 0) / "checkpoint-000003").write("progress.json", f"{{}}\n{past}\n")
    running(config, control, [made(3, 0.4), made(4, 0.5)])
    place = SweepFolder(config)
    seen = place.look(driven=True, now=0.0).trials["control/0"]
    assert seen.rewards == {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.4, 4: 0.5}
    assert (seen.status, seen.step, seen.loads, seen.pace[-1], seen.begun) == ("running", 5, False, 3.0, 1000.0)
    again = SweepFolder(config).look(driven=False, now=0.0).trials["control/0"]
    assert (again.status, again.why) == ("stopped", "its process was killed")


def test_a_trial_that_is_started_again_forgets_the_steps_that_were_lost(tmp_path: Path) -> None:
    config = study(tmp_path)
    control = make_arm(config, "control")
    write_sweep(config, [control], {})
    running(config, control, [made(n, 0.1) for n in range(4)])
    place = SweepFolder(config)
    assert place.look(driven=True, now=0.0).trials["control/0"].step == 4
    running(config, control, [], since=2000.0)
    seen = place.look(driven=True, now=0.0).trials["control/0"]
    assert (seen.loads, seen.step, dict(seen.rewards), seen.begun) == (True, 0, {}, 2000.0)


def test_what_has_ended_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at 300 trials costs what the running ones do."""
    config = study(tmp_path, trials=40, replicates=2)
    arms = [make_arm(config, "control"), *(make_arm(config, f"c{number:02d}") for number in range(1, 40))]
    write_sweep(config, arms, {arm.name: [300, 310] if arm.name != "c39" else [300] for arm in arms})
    write_trial(config, arms[-1], 1, None, attempts=[attempt(ended="")])
    place = SweepFolder(config)
    first = place.look(driven=True, now=0.0)
    assert (len(first.trials), len(first.having("running"))) == (80, 1)
    assert first.ahead.startswith("candidate so far: ")
    read: list[str] = []
    original = Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name: read.append(name) or original(self, name))
    second = place.look(driven=True, now=0.0)
    assert second == first
    assert sorted(read) == ["attempt-001.json", "outcome.json"]
    write_trial(config, arms[-1], 1, outcome(arms[-1], 1, 380))
    assert not place.look(driven=True, now=0.0).having("running")
    assert place.ahead() != first.ahead


def test_a_rule_has_its_evidence_and_hours_count_every_process(tmp_path: Path) -> None:
    config = study(tmp_path, gpus=0.5)
    arm = make_arm(config, "c01")
    write_sweep(config, [arm], {})
    verdict = CollapseVerdict(collapsed=True, rule="entropy_high", evidence=EVIDENCE)
    last = replace(made(5, 0.2), verdict=verdict)
    attempts = [attempt(0.0, 3600.0, ended="died"), attempt(4000.0, 7600.0)]
    collapsed = outcome(arm, 0, 200, "collapsed", rule="entropy_high")
    write_trial(config, arm, 0, collapsed, reports=[last], attempts=attempts)
    watched = SweepFolder(config).look(driven=False, now=0.0)
    seen = watched.trials["c01/0"]
    assert (seen.rule, seen.why, seen.took, watched.hours) == ("entropy_high", EVIDENCE, 7200.0, 1.0)
    assert seen.metrics["eval/accuracy"] == 0.5


def test_a_confirmation_shows_how_its_arm_stands(tmp_path: Path) -> None:
    config = study(tmp_path, kind="confirm", parent="p", looks=(3, 5), trials=2, replicates=3)
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "c01", origin="winner")],
                {"control": [300, 302, 298], "c01": [340, 341, 339]})  # fmt: skip
    assert SweepFolder(config).look(driven=True, now=0.0).ahead.startswith("c01, +10.0 points [")


# rin watch


@pytest.fixture
def sweep(tmp_path: Path) -> StudyConfig:
    """Two of its four trials have ended, one runs."""
    config = study(tmp_path, trials=4)
    arms = [make_arm(config, name) for name in ("control", "c01", "c02")]
    write_sweep(config, arms, {"control": [300], "c01": [310]})
    running(config, arms[-1], [made(0, 0.25)])
    return config


def test_watching_once_prints_how_it_stands(sweep: StudyConfig) -> None:
    with FileLock(sweep.scratch / "driver.lock"):
        said = processes.rin("watch", "--once", "--store", sweep.store)
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0].startswith("sweep s: 2 of 4 trials ended · 1 running · about ")
    assert re.search(r"^c02/0 .* running +1/6", said.out, re.M)
    assert lines[-1] == "it is running"
    assert "s, the newest in" in said.err


def test_watching_a_sweep_that_nobody_runs_says_so_and_how_to_go_on(sweep: StudyConfig) -> None:
    for more in ([], ["--once"]):
        said = processes.rin("watch", "s", "--store", sweep.store, *more)
        assert said.code == 0
        assert said.out.splitlines()[-1] == (
            f"2 trials are not finished and nobody is running them; go on: rin resume s --store {sweep.store}"
        )


class Clock:
    """In place of `time.sleep`: something happens at each look."""

    def __init__(self, *happens: Any) -> None:
        self.happens = list(happens)

    def __call__(self, seconds: float) -> None:
        self.happens.pop(0)()


def attended(config: StudyConfig, monkeypatch: pytest.MonkeyPatch, *happens: Any, **console: Any) -> str:
    text = io.StringIO()
    monkeypatch.setattr(watch.time, "sleep", Clock(*happens))
    monkeypatch.setattr(watch, "PATIENCE_SECONDS", 0.0)
    watch.attend(config, Console(file=text, width=150, **console), "")
    return text.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_watching_ends_with_the_sweep_and_its_table_and_last_sentence(
    sweep: StudyConfig, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    lock = FileLock(sweep.scratch / "driver.lock")
    lock.acquire()

    def goes_on() -> None:
        write_trial(sweep, make_arm(sweep, "c02"), 0, outcome(make_arm(sweep, "c02"), 0, 250))

    def ends() -> None:
        config = sweep.model_copy(update={"trials": 3})
        save_study_config(config)
        lock.release()

    said = attended(sweep, monkeypatch, goes_on, ends, force_terminal=terminal, color_system=None)
    assert (NOTHING_RUNS in said) == terminal  # between the end of the last trial and that of the sweep
    if not terminal:
        assert "[2/4, about 60 s to go] sweep s: 2 of 4 trials ended" in said
        assert "] c02/0: completed after 6 steps, accuracy 62.5 %" in said
    assert "c01 (candidate)" in said
    assert said.splitlines()[-1].startswith("c01, rmsnorm 0.01 -> 0.001: undecided; +2.5 points")


def test_the_confirmation_that_follows_a_sweep_is_followed(sweep: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep.model_copy(update={"trials": 2, "confirm_pairs": AT_ONCE})
    confirmation, arms = planned_confirmation(config, (3, 5))
    locks = [FileLock(one.scratch / "driver.lock") for one in (config, confirmation)]
    confirmation.scratch.mkdir()
    for lock in locks:
        lock.acquire()

    def sweep_ends() -> None:
        save_study_config(config)
        locks[0].release()

    def confirmation_begins() -> None:
        write_sweep(confirmation, arms, {})

    def confirmation_ends() -> None:
        write_sweep(confirmation, arms, {"control": [300, 302, 298], "c01": [340, 341, 339]})
        locks[1].release()

    said = attended(sweep, monkeypatch, sweep_ends, confirmation_begins, confirmation_ends)
    assert "its candidate is confirmed next: s-confirm is waited for" in said
    assert "] confirmation s-confirm: 0 of 6 trials ended, look after 3 pairs" in said
    assert "c01 against control: better" in said


def test_a_sweep_whose_candidate_nobody_confirms_says_how_to_go_on(sweep: StudyConfig) -> None:
    save_study_config(sweep.model_copy(update={"trials": 2, "confirm_pairs": AT_ONCE}))
    for more in ([], ["--once"]):
        said = processes.rin("watch", "s", "--store", sweep.store, *more)
        assert f"its candidate is not confirmed yet; go on: rin resume s --store {sweep.store}" in said.out


def test_ctrl_c_leaves_the_sweep_alone(sweep: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def stroke() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigpending()

    with FileLock(sweep.scratch / "driver.lock"):
        said = attended(sweep, monkeypatch, stroke)
    assert said.splitlines()[-1] == "no longer watching s, which goes on"


def test_watching_ends_where_nobody_reads_what_it_says(sweep: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rin watch | head -1`: for ten hours it would say its lines to nobody."""
    read, write = os.pipe()
    os.close(read)
    with (
        FileLock(sweep.scratch / "driver.lock"),
        os.fdopen(write, "w", buffering=1) as pipe,
        pytest.raises(SystemExit) as ended,
    ):
        watch.attend(sweep, Console(file=LastingStream(pipe), width=150), "")
    assert not ended.value.code


def test_a_store_that_does_not_answer_is_waited_for(sweep: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FileLock(sweep.scratch / "driver.lock")
    lock.acquire()
    original = Folder.read

    def away(self: Folder, name: str) -> bytes | None:
        raise OSError(116, "Stale file handle")

    said = attended(
        sweep,
        monkeypatch,
        lambda: monkeypatch.setattr(Folder, "read", away),
        lambda: None,
        lambda: monkeypatch.setattr(Folder, "read", original),
        lock.release,
        force_terminal=True,
        height=30,
        color_system=None,
    )
    assert "the store does not answer: Stale file handle (0 s)" in said
    assert "no trial runs" not in said
    assert "nobody is running them" in said


def test_a_line_of_news_is_told_once() -> None:
    seen = heard([event()]).trials["c01/0"]
    assert news(None, seen).startswith("c01/0: starts")
    assert news(seen, seen) == ""
    later = heard([event(), step(1), event("stopped", step=1)]).trials["c01/0"]
    assert news(seen, later) == "c01/0: stopped after 1 steps, accuracy -"
    assert news(later, later) == ""
    assert isinstance(later, Seen)

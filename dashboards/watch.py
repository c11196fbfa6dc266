"""`rin watch`: the view of a sweep that some other process runs.

It reads the sweep's folder and nothing else, so it may be started anywhere, ended at any moment and started again. It
ends with the sweep, and says what that came to; where nobody runs the sweep it says so, and how to go on. A store that
does not answer for a while is waited for. A confirmation that follows its sweep is followed.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dashboards.answer import answer_of
from dashboards.live import ECHO
from dashboards.live_folder import SweepFolder
from dashboards.live_rows import Seen, Watched, dated, frame, headline, news
from dashboards.report_text import confirmation_lines
from dashboards.tables import arm_table, say
from search.arms import failures, read_arms, unfinished
from search.confirm import confirmation_of, read_confirmation
from search.followup import second_part
from search.report import arm_reports, report_study
from search.store import StudyConfig, confirmation_name, is_driven, load_study_config, sweeps

NEAR_SECONDS, FAR_SECONDS = 1.0, 10.0
"""Between two looks at a folder, and at an object store."""
NOTHING_RUNS = "no trial runs at this moment: Ray starts or ends, or MLflow is told"
PATIENCE_SECONDS = 10.0
"""How long nobody may drive a confirmation: between two of its looks Ray starts anew."""
SECOND_PART_SECONDS = 120.0
"""How long a sweep's driver may take to begin with the confirmation: it writes a page, and Ray starts anew."""


def print_once(study: StudyConfig, console: Console, where: str) -> None:
    """For scripts, cron, ssh. `where`: options that find the sweep again."""
    driven, now = is_driven(study), time.time()
    watched = SweepFolder(study).look(driven=driven, now=now)
    height = console.size.height - 2 if console.is_terminal else None
    for line in _lines(console, watched, height, now):
        console.print(line, no_wrap=True, crop=False)
    say(console, ["it is running"] if driven else _standing(study, where))
    if not driven and study.kind == "sweep" and (more := second_part(study, read_arms(study))):
        say(console, [f"{more}{where}"])


def attend(study: StudyConfig, console: Console, where: str) -> None:
    """Until it ends, or Ctrl-C."""
    try:
        followed: StudyConfig | None = study
        while followed is not None:
            study = followed
            lived = _follow(study, console)
            study = load_study_config(study.store, study.name)
            if study.kind in ("sweep", "ablation"):
                title = f"{study.kind} {study.name}, in {study.folder.uri}"
                console.print(arm_table(arm_reports(study, read_arms(study)), title))
            say(console, _standing(study, where))
            followed = _second_part(study, console, where, patient=lived)
    except KeyboardInterrupt:
        say(console, [f"no longer watching {study.name}, which goes on"])


def _follow(study: StudyConfig, console: Console) -> bool:
    """Look until nobody drives it any more; whether somebody did at first."""
    folder = SweepFolder(study)
    every = NEAR_SECONDS if study.folder.local is not None else FAR_SECONDS
    seen: Mapping[str, Seen] | None = None
    watched, lived, last_driven = Watched(study=study), False, None
    before, since = "", 0.0
    screen = Live(console=console, auto_refresh=False, transient=True) if console.is_interactive else nullcontext()
    with screen as live:
        while True:
            now = time.time()
            try:
                folder.study = load_study_config(study.store, study.name)  # a budget or a look more than at first
                driven = is_driven(study)
                lived, last_driven = lived or driven, now if driven else last_driven
                watched = folder.look(driven=driven or _may_go_on(study, last_driven, now), now=now)
                doing = "" if watched.having("running") else NOTHING_RUNS
            except OSError as error:
                doing = f"the store does not answer: {error.strerror or error}"
            else:
                if not driven and not _may_go_on(study, last_driven, now):
                    return lived
            since = since if doing == before else now
            watched, before = replace(watched, doing=doing, since=since), doing
            if live is not None:
                live.update(Group(*_lines(console, watched, console.size.height - 1, now)), refresh=True)
            else:
                _say_news(console, seen, watched, now)
                seen = watched.trials
                if getattr(console.file, "gone", False):  # as after `rin watch | head`
                    raise SystemExit
            time.sleep(every)


def _may_go_on(study: StudyConfig, last_driven: float | None, now: float) -> bool:
    return last_driven is not None and now - last_driven < PATIENCE_SECONDS and study.kind == "confirm"


def _say_news(console: Console, before: Mapping[str, Seen] | None, watched: Watched, now: float) -> None:
    """At first how it stands, then a line for what has happened."""
    if before is None:
        say(console, [dated(watched, headline(watched), now)])
        return
    changed = [news(before.get(name), seen) for name, seen in watched.trials.items()]
    say(console, [dated(watched, line, now) for line in changed if line])


def _lines(console: Console, watched: Watched, height: int | None, now: float) -> list[Text]:
    return frame(
        watched, width=console.size.width - ECHO, height=height, now=now, ascii_only=console.options.ascii_only
    )


def _standing(study: StudyConfig, where: str) -> list[str]:
    """Of a sweep that nobody runs."""
    arms = read_arms(study)
    left = unfinished(study, arms)
    if study.kind == "confirm":
        return confirmation_lines(read_confirmation(study), where)
    if study.kind == "program":
        from dashboards.program_view import state_lines
        from search.program_study import read_state

        state = read_state(study)
        more = [] if state.ended else [f"nobody is running it; go on: {study.go_on}{where}"]
        return [*state_lines(state), *failures(study, arms), *more]
    if left:
        go_on = f"{left} trials are not finished and nobody is running them; go on: {study.go_on}{where}"
        return [*failures(study, arms), go_on]
    return [f"{answer_of(report_study(study, arms), confirmation_of(study)).sentence}."]


def _second_part(study: StudyConfig, console: Console, where: str, *, patient: bool) -> StudyConfig | None:
    """The confirmation that follows a sweep by itself, once somebody runs it. `patient`: whoever ran the sweep is
    expected to begin with it."""
    if study.kind != "sweep" or not (said := second_part(study, read_arms(study))):
        return None
    begun = confirmation_of(study)
    name = confirmation_name(study.name) if begun is None else begun.config.name
    until = time.monotonic() + (SECOND_PART_SECONDS if patient else 0)
    if patient:
        say(console, [f"its candidate is confirmed next: {name} is waited for; Ctrl-C leaves it alone"])
    while True:
        if name in sweeps(study.store) and is_driven(confirmation := load_study_config(study.store, name)):
            return confirmation
        if time.monotonic() >= until:
            say(console, [f"{said}{where}"])
            return None
        time.sleep(NEAR_SECONDS)

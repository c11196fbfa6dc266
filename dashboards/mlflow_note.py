"""The description of a sweep's experiment in MLflow: its answer, in the words of its page, and what people noted.

Written when a sweep, a confirmation or a programme ends, by `rin ui`, and by `rin note`. A confirmation changes what
its sweep has to say, so it writes both. While a sweep runs, its driver has said so there (`mirror.tell_beginning`).
"""

import sys
from collections.abc import Iterator
from datetime import datetime

from dashboards.answer import QUESTION, answer_of
from dashboards.program_view import state_lines
from search.arms import confirms
from search.confirm import Confirmation, confirmation_of
from search.mlflow_client import NOTE_TAG, tag_experiment
from search.notes import read_notes
from search.program_study import read_state
from search.report import StudyReport, report_study
from search.store import PAGE_FILE, StudyConfig, is_driven, load_study_config


def leave_note(config: StudyConfig) -> None:
    """A line on stderr where MLflow or the sweep's files do not allow it: it must never cost a sweep its end."""
    try:
        write_note(config)
        if config.kind == "confirm":
            parent = load_study_config(config.store, config.parent)
            if confirms(config, parent):
                write_note(parent.model_copy(update={"tracking_uri": config.tracking_uri}))
    except Exception as error:  # as of the page: whatever is wrong with it
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        again = f"rin ui {config.name} writes it"
        print(f"MLflow has no description of {config.name} yet ({said}); {again}", file=sys.stderr)


def write_note(config: StudyConfig) -> None:
    """Raises ConfigError for files that are damaged, and where MLflow cannot be told."""
    lines = [*note_lines(report_study(config), confirmation_of(config), running=is_driven(config))]
    lines += [f"Note of {note.written:%Y-%m-%d %H:%M} UTC: {note.text}" for note in reversed(read_notes(config))]
    tag_experiment(config.tracking_uri, config.owner, NOTE_TAG, "\n\n".join(lines))


def note_lines(report: StudyReport, confirmation: Confirmation | None, *, running: bool) -> Iterator[str]:
    """Paragraphs of Markdown."""
    config = report.config
    if running:
        yield f"**It runs: this is how far it was at {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}.**"
    if config.kind == "program":
        yield "\n".join(f"- {line}" for line in state_lines(read_state(config)))
    else:
        answer = answer_of(report, confirmation)
        yield f"**{QUESTION} {answer.word}.** {answer.sentence}"
        yield "\n".join(f"- {line}" for line in answer.lines)
    yield (
        f"Space {config.space.name} on workload {config.workload}. The page of it: `{config.folder.uri}/{PAGE_FILE}`; "
        f"in a terminal: `rin report {config.name}`. Runs and arms: the two saved views, under Views."
    )

"""What MLflow has yet to hear, told from the sweep's folder.

A driver that is killed, a server that is down, a trial that ends while everything is stopped: the folder has it, MLflow
does not. It is asked which trials it knows and in which state; of each that stands otherwise in the folder it is told
everything once more, which has no effect on what it has heard before. So with the page that a sweep left; its candidate
is told at every look, since the runs that it names may be new.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from search.arms import Arm, Candidate, planned, read_arms, trial_folder
from search.delivery import MlflowWriter
from search.logged_model import candidate_now, record_of
from search.mlflow_client import NOTE_TAG, absolute_uri, tag_experiment
from search.store import REPORT_FILES, StudyConfig
from search.told import standing, trial_key
from search.tracking import REPORT, Heard, Tracker, known_trials, tell_page
from trainable.disk.trial_folder import read_trial

log = logging.getLogger(__name__)


def catch_up(study: StudyConfig, arms: Sequence[Arm], tracker: Tracker) -> Mapping[str, Heard]:
    """Of a sweep that nobody runs at this moment; what MLflow knew of it. Raises ConfigError when it cannot be
    asked."""
    tracker.meet(arms)
    known = known_trials(study.tracking_uri, study.name, study.owner)
    untold: list[tuple[int, Arm, int]] = []
    for number, arm in enumerate(arms):
        for replicate in planned(study, arm):
            state = read_trial(trial_folder(study, arm.name, replicate), driven=False)
            heard = known.get(trial_key(study.name, arm.name, replicate))
            if heard is None and state.status == "waiting":
                continue  # it never began
            told = heard is not None and heard.standing == standing(state)
            if told and state.status in ("completed", "collapsed"):
                tracker.told_before(arm, replicate)
                continue
            if heard is not None:
                tracker.heard_before(arm, replicate, heard)
            if not told:
                untold.append((number, arm, replicate))
    for number, arm, replicate in untold:  # after all is known that was told before: a control has news for those
        tracker.begin(arm, number, replicate)
        tracker.end(arm, replicate)
    return known


def tell_beginning(study: StudyConfig) -> None:
    """What the experiment's description says until the sweep's answer takes its place. True of a driver that is killed,
    too. Raises ConfigError when MLflow cannot be told."""
    since, name = datetime.now(UTC), study.name
    text = (
        f"**It runs, since {since:%Y-%m-%d %H:%M} UTC; its answer will stand here.** How far it is: `rin watch {name}`."
        f" Where nobody runs it any more, `rin ui {name}` writes here what it came to, and `{study.go_on}` goes on."
    )
    tag_experiment(study.tracking_uri, study.owner, NOTE_TAG, text)


def tell_endings(study: StudyConfig, tracker: Tracker) -> None:
    """Of trials that were begun and have not been ended: one that is stopped from outside evaluates itself as it
    leaves, after its last word to Tune."""
    by_name = {arm.name: arm for arm in read_arms(study)}
    for name, replicate in tracker.open():
        tracker.end(by_name[name], replicate)


def tell_report(study: StudyConfig) -> None:
    """The page and the pictures that lie in its folder, in place of those that it was told before. Raises
    ConfigError."""
    files, digest = _report(study)
    if files:
        tell_page(study, files, digest)


def _report(study: StudyConfig) -> tuple[dict[str, str], str]:
    """Files, and a word that is theirs alone."""
    found = {name: text for name in REPORT_FILES if (text := study.folder.read(name)) is not None}
    digest = hashlib.blake2b(b"\0".join(found.values()), digest_size=16).hexdigest()
    return {name: text.decode() for name, text in found.items()}, digest


def tell_candidate(study: StudyConfig, candidate: Candidate | None) -> int:
    """Which it is now, with its runs as MLflow has them; whether (1) or not (0) that did not arrive."""
    writer = MlflowWriter(absolute_uri(study.tracking_uri), study.owner)
    left, trouble = writer.send([record_of(study, candidate)], lambda: None)
    if left:
        log.warning("tracking does not take the candidate: %s; it is told again later", trouble)
    return len(left)


def send_missing(study: StudyConfig) -> int:
    """All that MLflow lacks of a sweep that nobody runs; how many records it did not take. Raises ConfigError when it
    cannot be asked."""
    tracker = Tracker(study)
    arms = read_arms(study)
    known = catch_up(study, arms, tracker)
    left = tracker.close()
    left += tell_candidate(study, candidate_now(study, arms))
    files, digest = _report(study)
    heard = known.get(trial_key(study.name, REPORT, 0))
    if files and (heard is None or heard.standing != digest):
        tell_page(study, files, digest)
    return left

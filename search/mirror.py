"""What MLflow has yet to hear, told from the sweep's folder.

A driver that is killed, a server that is down, a trial that ends while everything is stopped: the folder has it, MLflow
does not. It is asked which trials it knows and in which state; of each that stands otherwise in the folder it is told
everything once more, which has no effect on what it has heard before.
"""

from collections.abc import Sequence

from search.arms import Arm, planned, read_arms, trial_folder
from search.store import StudyConfig
from search.told import standing, trial_key
from search.tracking import Tracker, known_trials
from trainable.disk.trial_folder import read_trial


def catch_up(study: StudyConfig, arms: Sequence[Arm], tracker: Tracker) -> None:
    """Of a sweep that nobody runs at this moment. Raises ConfigError when MLflow cannot be asked."""
    known = known_trials(study.tracking_uri, study.name, study.owner)
    for number, arm in enumerate(arms):
        for replicate in planned(study, arm):
            folder = trial_folder(study, arm.name, replicate)
            state = read_trial(folder, driven=False)
            heard = known.get(trial_key(study.name, arm.name, replicate))
            if heard is None and state.status == "waiting":
                continue  # it never began
            told = heard is not None and heard.standing == standing(state)
            if heard is not None and not (told and state.status in ("completed", "collapsed")):
                tracker.heard_before(arm, replicate, heard)
            if not told:
                tracker.begin(arm, number, replicate)
                tracker.end(arm, replicate)


def tell_endings(study: StudyConfig, tracker: Tracker) -> None:
    """Of trials that were begun and have not been ended: one that is stopped from outside evaluates itself as it
    leaves, after its last word to Tune."""
    by_name = {arm.name: arm for arm in read_arms(study)}
    for name, replicate in tracker.open():
        tracker.end(by_name[name], replicate)


def send_missing(study: StudyConfig) -> int:
    """All that MLflow lacks of a sweep that nobody runs; how many records it did not take. Raises ConfigError when it
    cannot be asked."""
    tracker = Tracker(study)
    catch_up(study, read_arms(study), tracker)
    return tracker.close()

"""Programmes that nobody trained: driven by the real searcher, trial by trial, with outcomes that a test chose."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ray.tune.search import Searcher

from search.arms import Arm, read_arms, write_arm
from search.program_study import check_arms, due, most_runs
from search.registration import PROGRAMME_FILE, Registration, register, registrations_text
from search.searchers import RinSearch
from search.store import StudyConfig, save_study_config
from spaces.programme import Programme, load_programme
from tests.written_sweeps import outcome, study, write_trial

Answers = Callable[[str, int], int]
"""(arm, replicate) -> how many of its questions are right; below 0: it collapses."""


def documented(folder: Path) -> Path:
    """The programme that docs/programs.md shows, as a file."""
    text = (Path(__file__).parents[1] / "docs" / "programs.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    file = folder / "mine.yaml"
    file.write_text(shown, encoding="utf-8")
    return file


def small(folder: Path) -> Programme:
    return load_programme(str(documented(folder)))


def begun(store: Path, programme: Programme, modes: Sequence[str] = ()) -> tuple[StudyConfig, Registration]:
    """As `rin program run` writes it down before the first trial."""
    most, last = most_runs(programme, len(modes) or 1), programme.replicates.looks[-1]
    config = study(store, name=programme.name, kind="program", trials=most, total=most, replicates=last)
    registrations = register(config, programme, modes)
    check_arms(config, registrations[-1])
    for number, arm in enumerate(due(config, registrations[-1], ())):
        write_arm(config, number, arm)
    config.folder.write(PROGRAMME_FILE, registrations_text(registrations))
    save_study_config(config)
    return config, registrations[-1]


def drive(config: StudyConfig, answers: Answers, most: int = 1000) -> list[tuple[str, int]]:
    """At most so many trials; which ones ran, in order."""
    searcher, ran = RinSearch(config, read_arms(config)), []
    while len(ran) < most:
        handed = searcher.suggest("t")
        if handed == Searcher.FINISHED:
            break
        assert isinstance(handed, dict)
        arm, replicate = searcher.running["t"]
        _end(config, arm, replicate, answers(arm.name, replicate))
        searcher.on_trial_complete("t")
        ran.append((arm.name, replicate))
    return ran


def _end(config: StudyConfig, arm: Arm, replicate: int, right: int) -> None:
    how = ("collapsed", -right, "filter_rejection") if right < 0 else ("completed", right, "")
    dose = None if arm.origin == "control" else 0.01
    ended = outcome(arm, replicate, how[1], how[0], rule=how[2], dose=dose)  # type: ignore[arg-type]
    write_trial(config, replace(arm), replicate, ended)


def finished(store: Path, programme: Programme, answers: Answers, modes: Sequence[str] = ()) -> StudyConfig:
    config, _ = begun(store, programme, modes)
    drive(config, answers)
    return config

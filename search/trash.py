"""A sweep that is deleted lies in the trash of its store, and can be taken out again.

    STORE/.trash/NAME-20261129T104512.250000/    its folder, as it was

Its experiment in MLflow is renamed and marked deleted, with its runs: a deleted one would keep its name for ever.
MLflow comes first and the folder last, in one rename, and an experiment is found by its owner: whatever is killed in
between is finished by the same command. Nothing here removes a file; the trash is emptied by its owner's `rm`.

What hangs on a sweep keeps it: a confirmation or an ablation says nothing without the sweep that it belongs to. A sweep
that was warm-started by it does not: what its searcher was told lies in its own folder.

Left out: object stores, which have no rename. A copy there can be cut off half-way, and costs hours.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from search.arms import confirms
from search.jobs import noted_job
from search.mlflow_client import client_of_what_is_there, experiments_of, one_line
from search.secrets import strip_password
from search.store import (
    STUDY_FILE,
    StudyConfig,
    absolute_store,
    check_name,
    check_writable,
    confirmation_name,
    default_tracking_uri,
    load_study_config,
    only_driver,
    sweeps,
)
from spaces.config import ConfigError
from spaces.uses import leaves

TRASH = ".trash"
_STAMP = r"\d{8}T\d{6}\.\d{6}"


# --- into it ----------------------------------------------------------------------------------------------------------


def check_deletable(study: StudyConfig) -> None:
    """Raises ConfigError for a sweep that is run, that others hang on, or that cannot be moved."""
    if study.folder.local is None:
        place = study.store.partition("?")[0]
        where = f"{place.rstrip('/')}/{study.name}"
        raise ConfigError(
            f"NAME={study.name}: nothing can be renamed in an object store; move it by the store's own tools, for "
            f"example: aws s3 mv --recursive {where} {place.rstrip('/')}/{TRASH}/{study.name}, and its experiment by: "
            "mlflow experiments rename, mlflow experiments delete"
        )
    check_writable(study.store)
    with only_driver(study):
        pass
    job = noted_job(study.store, study.name)
    if job is not None:
        from search.submission import state_of  # ray

        state = state_of(job)
        if state.status == "runs":
            raise ConfigError(f"NAME={study.name}: {state.words}; stop it: ray job stop {job.id}, or wait for its end")
    if others := dict(_hanging_on(study)):
        told = ", ".join(f"{name} ({why})" for name, why in others.items())
        raise ConfigError(
            f"NAME={study.name}: {told} would say nothing without it; delete {'that' if len(others) == 1 else 'those'} "
            f"first: rin delete {next(iter(others))}"
        )


def _hanging_on(study: StudyConfig) -> Iterator[tuple[str, str]]:
    """(name, why) of other sweeps in the store."""
    place = str(study.folder.local)
    for name in sweeps(study.store):
        if name == study.name:
            continue
        with suppress(ConfigError):  # one that cannot be read: nobody knows what it hangs on
            other = load_study_config(study.store, name)
            if other.parent == study.name and other.parent_id in ("", study.id):
                yield name, "its confirmation" if other.kind == "confirm" else f"an {other.kind} of it"
            for key, value in leaves(other.settings).items():
                if isinstance(value, str) and f"{value}/".startswith(f"{place}/"):
                    yield name, f"{key} lies in it"


def delete(study: StudyConfig) -> Path:
    """Where it lies now. Raises ConfigError."""
    check_deletable(study)
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    place = Path(study.store) / TRASH / f"{study.name}-{stamp}"
    with only_driver(study):
        _hide_in_mlflow(study, f"{study.name} (deleted {stamp})")
        _move(study.name, _folder(study), place)
    return place


def _hide_in_mlflow(study: StudyConfig, hidden: str) -> None:
    """Its experiment, and with it its runs, deleted under another name. Raises ConfigError."""
    uri = study.tracking_uri
    with one_line(uri, f"cannot delete experiment {study.name}"):
        mlflow = client_of_what_is_there(uri)
        for experiment in experiments_of(mlflow, study.owner):
            if experiment.lifecycle_stage == "active":
                if experiment.name == study.name:
                    mlflow.rename_experiment(experiment.experiment_id, hidden)
                mlflow.delete_experiment(experiment.experiment_id)


# --- out of it --------------------------------------------------------------------------------------------------------


def restore(store: str, name: str, tracking_uri: str | None = None) -> StudyConfig:
    """The one that was deleted last under that name, back in its place. Raises ConfigError."""
    place = Path(_with_rename(absolute_store(store)))
    trash = place / TRASH
    names = [one for one in _deleted(trash) if re.fullmatch(rf"{re.escape(check_name(name))}-{_STAMP}", one)]
    if not names:
        others = ", ".join(_deleted(trash)) or "nothing"
        raise ConfigError(f"NAME={name}: no sweep of that name was deleted here; {trash} holds {others}")
    if (place / name).exists():
        raise ConfigError(
            f"NAME={name}: {place / name} exists already; rename {trash / names[-1]} by hand to look at it under "
            "another name"
        )
    study = load_study_config(str(trash), names[-1])
    _refuse_another_s(study, name, str(place))
    here = {"name": name, "store": str(place)}
    if tracking_uri is not None:
        here["tracking_uri"] = tracking_uri
    elif study.tracking_uri == default_tracking_uri(str(trash)):
        here["tracking_uri"] = default_tracking_uri(str(place))
    study = study.model_copy(update=here)
    _show_in_mlflow(study)
    _move(name, trash / names[-1], place / name)
    return study


def _refuse_another_s(study: StudyConfig, name: str, store: str) -> None:
    """Raises ConfigError for a sweep and a confirmation that do not belong together, one of which lies here: what one
    says would be taken for the other's."""
    other = study.parent if study.kind == "confirm" else confirmation_name(name)
    try:
        there = load_study_config(store, other)
    except ConfigError:  # it is not there, or nobody can read whose it is
        return
    if not (confirms(study, there) if study.kind == "confirm" else confirms(there, study)):
        raise ConfigError(
            f"NAME={name}: the {other} that lies here now belongs to another sweep; rin delete {other}, then restore it"
        )


def _deleted(trash: Path) -> list[str]:
    """Oldest first, of each name."""
    return sorted(folder.name for folder in trash.glob("*") if (folder / STUDY_FILE).is_file())


def _show_in_mlflow(study: StudyConfig) -> None:
    """Raises ConfigError, also where its name is another's by now."""
    uri, name = study.tracking_uri, study.name
    with one_line(uri, f"cannot restore experiment {name}"):
        mlflow = client_of_what_is_there(uri)
        for experiment in experiments_of(mlflow, study.owner):
            number = experiment.experiment_id
            namesake = mlflow.get_experiment_by_name(name)
            if namesake is not None and namesake.experiment_id != number:
                raise ConfigError(
                    f"NAME={name}: tracking {strip_password(uri)} has another experiment of that name; rename that "
                    "one, or the sweep's runs would lie in two"
                )
            if experiment.lifecycle_stage != "active":
                mlflow.restore_experiment(number)
            if experiment.name != name:
                mlflow.rename_experiment(number, name)


def _move(name: str, here: Path, there: Path) -> None:
    """In one rename. Raises ConfigError where there is none: one of the two is a disk of its own, or another's."""
    try:
        there.parent.mkdir(exist_ok=True)
        here.rename(there)
    except OSError as error:
        raise ConfigError(
            f"NAME={name}: {here} cannot be renamed ({error.strerror}); mend that and say it again, or by hand: "
            f"mv {here} {there}"
        ) from None


def _folder(study: StudyConfig) -> Path:
    return Path(_with_rename(study.store)) / study.name


def _with_rename(store: str) -> str:
    if "://" in store:
        raise ConfigError(f"--store {strip_password(store)}: an object store has no trash; give a folder")
    return store

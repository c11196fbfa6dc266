"""The way to MLflow: where a tracking URI leads, a client for it, and one line for whatever goes wrong there.

Three things that MLflow does by itself are undone here, before anything else may use it: it retries for minutes where
nothing answers, it makes an empty database where one is only looked for, and it prints a page for each error that it
raises. It takes 1.5 s to import and reads its switches then, so whoever needs it calls `client` first.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from search.secrets import first_line, strip_password
from spaces.config import ConfigError
from spaces.paths import home

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # its default of 7 takes minutes; what cannot be delivered is kept and told later
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PGCONNECT_TIMEOUT": "10",  # seconds; libpq waits two minutes
}
"""Set, unless the user has set them, before mlflow is imported."""

SQL_SCHEMES = {"sqlite", "postgresql", "mysql", "mssql"}


def absolute_uri(uri: str) -> str:
    """A relative sqlite path is anchored here, `~` is the user's home: a resumed sweep may start in another folder."""
    prefix = "sqlite:///"
    return prefix + str(home(uri.removeprefix(prefix)).absolute()) if uri.startswith(prefix) else uri


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose an experiment is. Names are no proof: a folder is deleted and its name used again, two stores share one
    server."""

    id: str
    """Random, of the sweep."""
    store: str
    """Where the sweep lies."""


NOTE_TAG = "mlflow.note.content"
"""What MLflow shows as the description, of a run and of an experiment: Markdown."""
LONGEST_TAG = 5000  # characters of an experiment's, MLflow's limit
OWNER_TAG, STORE_TAG = "sweep_id", "sweep_store"
"""Of an experiment."""


def check_tracking(uri: str, experiment: str, owner: Owner) -> str:
    """Experiment id, made if it is new, after proof that it can be written to. Raises ConfigError within seconds.

    An experiment that nobody has claimed may be anybody's: a start that goes no further leaves no claim, and its name
    is free.
    """
    with one_line(uri, f"cannot write to experiment {experiment}"):
        mlflow = client(uri, create=True)
        number = experiment_id(mlflow, uri, experiment, owner)
        mlflow.set_experiment_tag(number, "written_by", "rin-search")
        return number


def claim(uri: str, experiment: str, owner: Owner) -> None:
    """From here on the experiment is this sweep's. Raises ConfigError when it is another's, or cannot be written to."""
    with one_line(uri, f"cannot write to experiment {experiment}"):
        claimed_experiment(client(uri, create=True), uri, experiment, owner)


def client(uri: str, create: bool = False) -> Any:
    """An MlflowClient. mlflow is imported here before anywhere else: that takes 1.5 s, and reads the switches in
    ENVIRONMENT."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it prints a page for each error that it then raises
    uri = absolute_uri(uri)
    if not _is_sql(uri):
        return MlflowClient(tracking_uri=uri)
    with _first_opening(uri) if create else nullcontext():
        _check_reachable(uri, create)
        made = MlflowClient(tracking_uri=uri)
        if create:
            made.search_experiments(max_results=1)  # which makes what is not there
    return made


def _first_opening(uri: str) -> FileLock:
    """MLflow makes or migrates the tables of a database when it is first opened; of two processes that do it at once
    one fails. By this machine's processes alone: a database of many machines has been opened by its server."""
    name = hashlib.blake2b(f"{os.getuid()} {uri}".encode(), digest_size=8).hexdigest()
    return FileLock(Path(tempfile.gettempdir()) / f"rin-mlflow-{name}.lock")


def _check_reachable(uri: str, create: bool) -> None:
    """Fail at once where MLflow would retry for 100 s, and where reading would make an empty database."""
    import sqlalchemy

    url = sqlalchemy.make_url(uri)
    if url.get_backend_name() == "sqlite" and url.database:
        if create:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        elif not Path(url.database).exists():
            raise FileNotFoundError("there is no such file")
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)  # which keeps no connection open
    sqlalchemy.inspect(engine).get_table_names()


def experiment_id(mlflow: Any, uri: str, name: str, owner: Owner) -> str:
    """Made if it is new. Files of its runs go where an MLflow server wants them; with a database and no server beside
    it if it is a file, otherwise into the sweep's store. Raises ConfigError for one that was deleted, and for another
    sweep's.
    """
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is not None:
        if experiment.lifecycle_stage != "active":
            raise ConfigError(
                f"MLflow experiment {name} was deleted; restore it (mlflow experiments restore) or choose another name"
            )
        refuse_other_owner(experiment, uri, owner)
        return str(experiment.experiment_id)
    scheme, _, database = absolute_uri(uri).partition(":///")
    store = None if "://" in owner.store else Path(owner.store)
    place = Path(database).parent if scheme == "sqlite" else store if _is_sql(uri) else None
    # MLflow's default is ./mlruns of whoever comes first.
    folder = None if place is None else str(place.absolute() / "artifacts")
    return str(mlflow.create_experiment(name, artifact_location=folder))


def claimed_experiment(mlflow: Any, uri: str, name: str, owner: Owner) -> str:
    """`experiment_id`, with the owner's tags on it."""
    number = experiment_id(mlflow, uri, name, owner)
    mlflow.set_experiment_tag(number, OWNER_TAG, owner.id)
    mlflow.set_experiment_tag(number, STORE_TAG, owner.store)
    return number


def client_of_what_is_there(uri: str) -> Any:
    """None where nothing was ever tracked: a database is not made by asking."""
    try:
        return client(uri)
    except FileNotFoundError:
        return None


def experiments_of(mlflow: Any, owner: Owner) -> list[Any]:
    """That are this sweep's, deleted or not, whatever they are called: one, or none where MLflow has never heard of
    it."""
    if mlflow is None:
        return []
    from mlflow.entities import ViewType

    return list(mlflow.search_experiments(ViewType.ALL, filter_string=f"tags.{OWNER_TAG} = '{owner.id}'"))


def tag_experiment(uri: str, owner: Owner, tag: str, text: str) -> None:
    """Of this sweep's experiment, where MLflow has one that is not deleted; without a password, and cut where MLflow
    would refuse it. Raises ConfigError where it cannot be told."""
    with one_line(uri, f"cannot write {tag} of its experiment"):
        mlflow = client_of_what_is_there(uri)
        for experiment in experiments_of(mlflow, owner):
            if experiment.lifecycle_stage == "active":
                mlflow.set_experiment_tag(experiment.experiment_id, tag, strip_password(text)[:LONGEST_TAG])


def refuse_other_owner(experiment: Any, uri: str, owner: Owner) -> None:
    """Raises ConfigError: the runs of two sweeps in one experiment would be told apart by nobody."""
    claimed = experiment.tags.get(OWNER_TAG, owner.id)
    if claimed != owner.id:
        where = experiment.tags.get(STORE_TAG, "a store that it does not name")
        raise ConfigError(
            f"--name {experiment.name}: tracking {strip_password(uri)} has an experiment of that name, of another "
            f"sweep ({claimed[:8]}, which lies or lay in {where}); give another --name, or another --tracking-uri"
        )


def _is_sql(uri: str) -> bool:
    return uri.split(":", 1)[0].split("+", 1)[0] in SQL_SCHEMES


@contextmanager
def one_line(uri: str, what: str) -> Iterator[None]:
    """What the outside world (network, database, server, disk) does wrong becomes one line with the remedy, without the
    password."""
    try:
        yield
    except Exception as error:
        library = type(error).__module__.split(".")[0]
        if not isinstance(error, (OSError, ImportError)) and library not in ("mlflow", "sqlalchemy"):
            raise
        said = first_line(error)
        reason = said if len(said) <= 300 else said[:300] + "..."
        remedy = "start the server there" if uri.startswith("http") else "check the path, the driver and the rights"
        raise ConfigError(
            f"tracking {strip_password(uri)}: {what}: {reason}; {remedy}, or give another --tracking-uri, "
            "for example http://HOST:5000 or sqlite:///FOLDER/mlflow.db"
        ) from None

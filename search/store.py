"""What a store holds, file by file. The truth about a sweep is here, in plain JSON that anyone can read.

    STORE/mlflow.db                       every run of every sweep, for looking at
    STORE/NAME/study.json                 the sweep, written down before it starts (StudyConfig); what it was given
                                          more of since then
    STORE/NAME/arms/0003.json             an arm, written down before its first replicate runs; where replicates go
                                          where they matter, again before each further one
    STORE/NAME/programme.json             of a programme: every registration (`search/registration.py`)
    STORE/NAME/evidence.json              what the searcher was told without spending a trial
    STORE/NAME/trials/c03-0/outcome.json  how a trial ended; checkpoints and attempts lie beside it
                                          (`trainable/disk/trial_folder.py`)
    STORE/NAME/scans/                     the scans that its trials follow (`trainable/following.py`)
    STORE/NAME/prefixes/                  beginnings that its trials share, until it is over (`trainable/prefix.py`)
    STORE/NAME/trials/c03-0/final.safetensors  the weights that it ended with
    STORE/NAME/tune/                      Ray Tune's own files and the trials' output; nothing is ever read back from
                                          them
    STORE/NAME/best.yaml                  the candidate, as the last driver left it; none while one runs trials
    STORE/NAME/notes/                     what people wrote about it (`notes.py`)
    STORE/NAME/report.html                the page of it, as the last driver left it (`rin report NAME --html`)
    STORE/NAME/driver.lock                of the process that runs it (driver.json in an object store); not of the sweep
    STORE/.trash/                         sweeps that were deleted (`trash.py`)

So a sweep goes on from any moment: what has an outcome is done, what is written down runs, the searcher is rebuilt from
both. The store may be a folder, an NFS mount or an object store. Light on purpose: `rin list` reads sweeps without
importing ray or torch.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from search.lease import holder, leased
from search.mlflow_client import Owner
from search.secrets import strip_password
from spaces.cache import cache_folder
from spaces.config import ConfigError, TrialConfig
from spaces.library import Space
from spaces.narrowing import narrowed
from spaces.paths import home
from spaces.reading import explain, merge
from spaces.workloads import WORKLOADS
from trainable.disk.folder import Folder
from trainable.pass_at_k import k_of

STUDY_FILE, BEST_FILE, EVIDENCE_FILE = "study.json", "best.yaml", "evidence.json"
PAGE_FILE, FOREST_FILE, CURVES_FILE = REPORT_FILES = ("report.html", "report-forest.svg", "report-curves.svg")
"""What it came to, for people: written at its end, and by `rin report --html`."""
VERSION = 3
MOST = 8
"""Replicates of one arm in a sweep that gives them where they matter: a confirmation knows more by further ones."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


SearcherName = Literal["gp", "tpe", "random", "grid", "qmc"]
ObjectiveName = Literal["accuracy", "collapses", "hours"]
PassObjective = Annotated[str, Field(pattern=r"^pass@[1-9]\d*$")]


def new_id() -> str:
    return uuid.uuid4().hex


class AsGiven(BaseModel):
    """What a command line named files and spaces for, as it was when the sweep began: the files may change."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    space: Space
    """Before the settings took their dimensions out of it."""
    points: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Of each point that is a file: the settings that it held."""


class Derived(BaseModel):
    """Of a sweep that is the same as an earlier one with a change (`rin sweep --from`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Of the earlier one, and the store's folder in which the code of its rewards lies."""
    id: str
    changes: tuple[str, ...] = ()
    """In words: grpo.learning_rate=0.0002 (there 3e-05)."""
    rewards: dict[str, str] = Field(default_factory=dict)
    """Function of the user's -> sha256 of its file there: it is the same code here."""
    data: tuple[str, ...] = ()
    """Files and folders of rows, of which a sweep keeps no copy."""

    @property
    def words(self) -> str:
        changes = f"but {', '.join(self.changes)}" if self.changes else "without a change"
        read = f"; rows as they were when this began, not as there: {', '.join(self.data)}" if self.data else ""
        return f"the same as {self.name} {changes}{read}"


class Extension(BaseModel):
    """That a sweep was given more (`rin extend`), and what it was before."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    at: str
    """2026-03-01T10:00:00+00:00"""
    version: str
    """Of the program, with its commit where it ran from a checkout."""
    ended: int
    """Trials that had an outcome."""
    candidate: str
    """The arm that was ahead; empty where there was none."""
    trials: tuple[int, int]
    """Configurations before and after."""
    replicates: tuple[int, int]
    total: tuple[int, int] | None = None

    @property
    def words(self) -> str:
        """Example: 4 -> 8 configurations on 2026-03-01 (0.1.0 3f2a9c1d04be), after 4 trials had ended"""
        numbers = {"configurations": self.trials, "replicates": self.replicates}
        grown = numbers if self.total is None else {"runs": self.total}
        more = [f"{before} -> {after} {what}" for what, (before, after) in grown.items() if before != after]
        return f"{', '.join(more)} on {self.at[:10]} ({self.version}), after {self.ended} trials had ended"


class StudyConfig(BaseModel):
    """A sweep, written down; `study.json` holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: int = VERSION
    """Of this file's form."""
    name: str
    """Of the sweep, and of its folder."""
    id: str = Field(default_factory=new_id)
    """Random: what another sweep of the same name is told apart by, in the same store or in another that shares its
    tracking."""
    kind: Literal["sweep", "ablation", "confirm", "program"] = "sweep"
    """What it is for: searching, taking a winner apart, confirming it, or running a programme."""
    parent: str = ""
    """Name of the sweep whose winner an ablation takes apart or a confirmation repeats."""
    parent_id: str = ""
    """Its id, since another sweep may have that name by now; empty in what an earlier version began."""
    looks: tuple[int, ...] = ()
    """Of a confirmation: numbers of replicates after which it compares."""
    confirm_pairs: int = Field(0, ge=0)
    """Pairs of runs up to which its candidate is confirmed when its own trials are done (`search/followup.py`); 0 = it
    is not."""
    workload: str = "embedded"
    """What is trained."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Overrides of every trial, as a tree."""
    space: Space
    """Without the dimensions that the settings fix, so that no proposal ever overrides them."""
    points: tuple[str, ...] = ()
    """Experiments of the plan that run beside the control."""
    evidence: tuple[str, ...] = ()
    """Experiments of the plan whose recorded collapse is told to the searcher without running them."""
    warm_start: str = ""
    """Name of an earlier sweep in the same store whose results the searcher is told."""
    trials: int = Field(8, ge=1)
    """Configurations, the controls included."""
    replicates: int = Field(1, ge=1)
    """Runs per configuration, with seeds seed, seed + 1, ..."""
    total: int | None = Field(None, ge=1)
    """Runs in all, where replicates go where they matter (`search/allocation.py`): `trials` and `replicates` are then
    the most that there may be; of a programme that has not ended more than it can come to. Null = trials x replicates.
    """
    concurrent: int | None = Field(None, ge=1)
    """Trials at once; null = what the machine's cores (or the cluster) hold."""
    searcher: SearcherName = "gp"
    """Who proposes configurations."""
    objectives: tuple[ObjectiveName | PassObjective, ...] = Field(("accuracy",), min_length=1)
    """What they are judged by; several: a Pareto front."""
    seed: int = Field(0, ge=0)
    """Of replicate 0, and of the searcher."""
    cpus: int | None = Field(None, ge=1)
    """CPUs of one trial, or of each of its ranks (`parallel.ranks`); null = the workload's."""
    gpus: float | None = Field(None, ge=0)
    """GPUs of one trial: one for each of its ranks, or a fraction of one. Null = the workload's, for each rank."""
    budget_hours: float | None = Field(None, gt=0)
    """Trial-slot hours (GPU hours where trials have GPUs) after which everything is stopped; null = no limit."""
    store: str
    """Absolute path or URI of the store."""
    tracking_uri: str
    """MLflow, without a password."""
    address: str | None = None
    """Of a running Ray cluster; null = a local one for this sweep."""
    given: AsGiven | None = None
    """Null for arms that were chosen elsewhere, and in what an earlier version began."""
    derived: Derived | None = None
    """Null = begun from its own options alone."""
    extensions: tuple[Extension, ...] = ()
    """What it was given more of since it began, oldest first; its size is that after the last."""

    @field_validator("space")
    @classmethod
    def _fixed_keys_leave(cls, space: Space, known: ValidationInfo) -> Space:
        return narrowed(space, known.data.get("settings", {}))

    @property
    def history(self) -> tuple[str, ...]:
        """What must be known of how it came about, a line each."""
        lines = [] if self.derived is None else [self.derived.words]
        if self.extensions:
            times = {1: "once", 2: "twice"}.get(len(self.extensions), f"{len(self.extensions)} times")
            lines.append(f"extended {times}: {'; '.join(extension.words for extension in self.extensions)}")
            lines.append(
                "whoever sees results and then asks for more chooses when to stop: intervals and verdicts of this "
                "sweep are not corrected for that; those of rin confirm are of runs of its own, with planned looks"
            )
        return tuple(lines)

    @property
    def runs(self) -> int:
        """Trials in all."""
        return self.trials * self.replicates if self.total is None else self.total

    @property
    def each(self) -> int | None:
        """Replicates of every arm; None where each has a number of its own."""
        return self.replicates if self.total is None else None

    @property
    def measure(self) -> str:
        """By which its arms are compared, chosen and confirmed: greedy accuracy, or pass@k where that is the first
        objective that says how good an arm is."""
        return next((name for name in self.objectives if name == "accuracy" or k_of(name)), "accuracy")

    @property
    def go_on(self) -> str:
        """The command that runs what is missing. A confirmation is gone on with by the sweep and the arm that it
        confirms."""
        if self.kind == "program":
            return f"rin program run --name {self.name}"
        if self.kind != "confirm":
            return f"rin resume {self.name}"
        arm = self.name.removeprefix(confirmation_name(self.parent)).removeprefix("-")
        return f"rin confirm {self.parent}" + (f" --arm {arm}" if arm else "")

    def seed_of(self, replicate: int) -> int:
        """The same in every arm, so that arms are paired."""
        return self.seed + replicate

    @property
    def owner(self) -> Owner:
        """Of its MLflow experiment."""
        return Owner(id=self.id, store=self.store)

    @property
    def folder(self) -> Folder:
        return Folder(self.store) / self.name

    @property
    def scratch(self) -> Path:
        """A folder on this machine for what belongs to one driver: the lock."""
        local = self.folder.local
        if local is not None:
            return local
        digest = hashlib.blake2b(self.store.encode(), digest_size=6).hexdigest()
        return cache_folder() / "sweeps" / f"{self.name}-{digest}"


def check_name(name: str) -> str:
    """A sweep's name is also a folder and an MLflow experiment. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name}: use letters, digits, '.', '_' and '-' only (it names a folder and an MLflow experiment)"
        )
    return name


def confirmation_name(sweep: str, arm: str | None = None) -> str:
    """Of its candidate, or of another arm."""
    return f"{sweep}-confirm" if arm is None else f"{sweep}-confirm-{arm}"


def absolute_store(store: str) -> str:
    """A relative folder is anchored here, `~` is the user's home; a URI stays as it is.

    Raises ConfigError for one that holds a secret: it is written down.
    """
    if strip_password(store) != store:
        raise ConfigError(
            f"--store {strip_password(store)}: holds a secret key, and a sweep writes its store's name into many "
            "files; leave it out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if "://" in store:
        return store
    place = str(home(store).absolute())
    if special := sorted(set(place) & set("%?#")):
        raise ConfigError(
            f"--store {store}: {special[0]} means something in the address of a database, which would lie elsewhere; "
            "choose a folder without %, ? and # in its path"
        )
    return place


def refuse_taken_name(config: StudyConfig) -> None:
    """Raises ConfigError where a sweep of that name lies already, or what would be taken for its confirmation."""
    if STUDY_FILE in config.folder.names():
        raise ConfigError(
            f"--name {config.name}: {config.folder.uri} exists already; go on with it by: "
            f"rin resume {config.name}, or choose another name"
        )
    second = confirmation_name(config.name)
    if config.kind != "confirm" and STUDY_FILE in (Folder(config.store) / second).names():
        raise ConfigError(
            f"--name {config.name}: {second} lies in {config.store} already, and is none of a sweep that begins now; "
            f"rin delete {second}, or choose another name"
        )


def save_study_config(config: StudyConfig) -> None:
    config.folder.write(STUDY_FILE, study_text(config))


def refuse_stale(config: StudyConfig) -> None:
    """Raises ConfigError where the sweep was extended since this was read: writing it would take that back."""
    now = load_study_config(config.store, config.name)
    if config.extensions[: len(now.extensions)] != now.extensions:
        raise ConfigError(
            f"NAME={config.name}: another process has extended it meanwhile; look at it by rin report {config.name}, "
            "then ask again"
        )


def study_text(config: StudyConfig) -> str:
    """Without the password of its tracking: the only way in which a study is written down."""
    return config.model_copy(update={"tracking_uri": strip_password(config.tracking_uri)}).model_dump_json(indent=1)


def load_study_config(store: str, name: str) -> StudyConfig:
    """What `study.json` says; where it lies wins over where it says it was written (a store may be moved or mounted
    elsewhere).

    Raises ConfigError for a sweep that does not exist, that another version wrote, or whose file is damaged.
    """
    place = Folder(store) / check_name(name)
    text = place.read(STUDY_FILE)
    if text is None:
        known = sweeps(store)
        raise ConfigError(
            f"NAME={name}: no sweep of that name in {store}; "
            f"{'there are ' + ', '.join(known) if known else 'it holds none'}"
        )
    where = f"{place.uri}/{STUDY_FILE}"
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{where}: is damaged (not JSON); restore it from a backup, or start the sweep anew under another name"
        ) from None
    if tree.get("version") != VERSION:
        raise ConfigError(
            f"{where}: written by version {tree.get('version')}, this program reads {VERSION}; "
            "use the program that wrote it"
        )
    try:
        config = StudyConfig.model_validate({**tree, "name": name})
    except ValidationError as error:
        raise ConfigError(explain(error, StudyConfig, where)) from None
    if config.store == store:
        return config
    moved = {"store": store}
    if config.tracking_uri == default_tracking_uri(config.store):
        moved["tracking_uri"] = default_tracking_uri(store)
    return config.model_copy(update=moved)


def newest_study(store: str, *, confirmations: bool = True) -> StudyConfig:
    """The one that was begun, or gone on with, last; of a sweep that goes on with its confirmation by itself the sweep.
    Raises ConfigError where there is none."""
    place = Folder(store)
    names = sweeps(store)
    for name in sorted(names, key=lambda name: (place / name).changed(STUDY_FILE), reverse=True):
        study = load_study_config(store, name)
        if study.kind != "confirm":
            return study
        parent = load_study_config(store, study.parent) if study.parent in names else None
        if parent is not None and parent.confirm_pairs and study.parent_id in ("", parent.id):
            return parent
        if confirmations:
            return study
    raise ConfigError(f"NAME: no sweeps in {store}; start one with: rin sweep")


def check_store(store: str) -> None:
    """Raises ConfigError for a folder that is not there, or that cannot be read."""
    place = Folder(store).local
    if place is None or (place.is_dir() and os.access(place, os.R_OK | os.X_OK)):
        return
    why = "it may not be read" if place.is_dir() else "is no folder" if place.exists() else "there is no such folder"
    raise ConfigError(f"--store {store}: {why}; give the folder in which sweeps lie")


def check_writable(store: str) -> None:
    """Raises ConfigError where nothing can be written. Leaves nothing behind."""
    place = Folder(store).local
    if place is None:
        return
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"--store {store}: nothing can be written there ({error.strerror}); give a folder of yours"
        ) from None
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def default_tracking_uri(store: str) -> str:
    """The sqlite file in the store folder. Raises ConfigError for an object store, which cannot hold a database."""
    if "://" in store:
        raise ConfigError(
            f"--store {store.partition('?')[0]}: a database cannot lie there; "
            "give --tracking-uri http://HOST:5000 as well"
        )
    return f"sqlite:///{Path(store) / 'mlflow.db'}"


def sweeps(store: str) -> list[str]:
    """Names of the sweeps in a store, sorted."""
    place = Folder(store)
    names = [name for name in place.names() if _NAME.fullmatch(name)]
    return [name for name in names if STUDY_FILE in (place / name).names()]


def ranks_of(config: StudyConfig) -> int:
    """Of one trial: the shares of its work (`parallel.ranks`)."""
    tree = merge(merge(WORKLOADS[config.workload].settings, config.space.settings), config.settings)
    return int(tree.get("parallel", {}).get("ranks", 1))


def check_ranks(config: StudyConfig, trials: Iterable[TrialConfig]) -> None:
    """Raises ConfigError for GPUs that no rank would compute on, and for a trial of another number of ranks: Tune holds
    the same for every trial, and numbers hang on how many ranks share the work."""
    processes_of(config)
    ranks = ranks_of(config)
    for trial in trials:
        if trial.parallel.ranks != ranks:
            raise ConfigError(
                f"parallel.ranks={trial.parallel.ranks}: in a sweep all trials have as many, and the others have "
                f"{ranks}; leave it out, and give --gpus or --set parallel.ranks"
            )


def gpus_of(config: StudyConfig) -> float:
    """GPUs of one trial."""
    return config.gpus if config.gpus is not None else WORKLOADS[config.workload].trial_gpus * ranks_of(config)


def processes_of(config: StudyConfig) -> int:
    """That compute one trial together: one for each of its GPUs, else one for each rank. A sweep that goes on where
    there are fewer GPUs has fewer of them, and the same numbers.

    Raises ConfigError for GPUs that no rank would compute on.
    """
    gpus, ranks = gpus_of(config), ranks_of(config)
    if gpus > ranks or (gpus > 1 and gpus % 1):
        raise ConfigError(
            f"--gpus {gpus:g}: a trial of {config.name} has parallel.ranks={ranks}, each of which computes on one GPU; "
            f"give {'1, or a fraction of it' if ranks == 1 else f'a whole number up to {ranks}'}"
        )
    return (max(1, int(gpus))) if gpus else ranks


def slots_of(config: StudyConfig) -> float:
    """Hours that one hour of a trial counts: its GPUs, or 1 where it has none."""
    return gpus_of(config) or 1.0


@contextmanager
def only_driver(config: StudyConfig) -> Iterator[None]:
    """One process drives a sweep. Raises ConfigError for the second."""
    if config.folder.local is None:
        with leased(config.folder, lambda owner: _busy(config, f" ({owner})")):
            yield
        return
    config.scratch.mkdir(parents=True, exist_ok=True)
    try:
        # `rin status` holds it for a moment.
        held = FileLock(config.scratch / "driver.lock", thread_local=False).acquire(timeout=1)
    except Timeout:
        raise _busy(config) from None
    with held:
        yield


def refuse_second_driver(config: StudyConfig) -> None:
    """Raises what `only_driver` would raise now: at once, where it comes after the imports of torch and ray."""
    check_writable(config.store)
    if config.folder.local is not None:
        with only_driver(config):
            pass
    elif owner := holder(config.folder):
        raise _busy(config, f" ({owner})")


def _busy(config: StudyConfig, owner: str = "") -> ConfigError:
    return ConfigError(
        f"sweep {config.name} is being run by another process{owner}; wait for it, or stop it and then: {config.go_on}"
    )


def is_driven(config: StudyConfig) -> bool:
    """Whether a process runs this sweep now."""
    if config.folder.local is None:
        return bool(holder(config.folder))
    try:  # as FileLock does it, but for readers too, who may not write here
        file = os.open(config.scratch / "driver.lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False

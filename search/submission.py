"""A sweep as a Ray job: it outlives the laptop that asked for it.

What is sent is the sweep itself: its StudyConfig and its fixed arms, made and checked on this machine, in the files
that a store holds them in. The job on the head node writes them into the sweep's store, where the name must be free, as
anywhere else, and goes on by `rin resume NAME --address auto`. So this machine need not reach the store, nothing that a
user wrote is read a second time elsewhere, and a sweep whose job dies is one that was interrupted. What the job says
first is waited for and told: a refusal there is a refusal here. Besides the sweep:

*The program.* The four packages are shipped as they lie here (editable or installed) in `py_modules`, which Ray puts on
the PYTHONPATH of the job and of every trial, ahead of what a node may have installed; so the cluster runs this version,
and needs only its dependencies (torch, ray, mlflow, ...). A wheel would be installed anew on every node, torch and all.

*Places.* `runs` is a folder on this machine, and so is a relative path in a setting. Unless the whole cluster is this
machine, a store, tracking, data and models that every node can reach must be named.

*Secrets.* Ray shows a job's command, its metadata and its runtime environment to whoever sees the dashboard. There is
no place in a submission that hides a password, so one that contains a password is refused: passwords belong into the
environment of the cluster (`ray start` on the head node hands its own to the job).

Left out: images (a job runs in the environment that the cluster has).
"""

import importlib.util
import logging
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError

from search.arms import Arm, read_arms, write_arm
from search.cluster import TOKEN_REMEDY, refuse_secrets
from search.evidence import read_evidence
from search.jobs import Job, note_job, noted_job
from search.mlflow_client import absolute_uri
from search.ray_internals import host_names
from search.rewards import bring_rewards, keep_rewards
from search.secrets import first_line, strip_password
from search.store import STUDY_FILE, StudyConfig, absolute_store, check_name, sweeps
from search.study import begin_study
from spaces.errors import ConfigError
from spaces.library import Choice, Space
from spaces.paths import relative_paths
from spaces.reading import flatten, unflatten
from trainable.disk.folder import Folder

if TYPE_CHECKING:
    from trainable.policy.embedded import Progress

PACKAGES = ("spaces", "trainable", "search", "dashboards")
SHIPPED = "sweep"
"""Folder with the sweep, in the working folder of its job."""
STOP_SECONDS = 120
"""`ray job stop` sends SIGTERM, waits this long (Ray's own default: 3 s) for trials to be checkpointed, then kills."""
AGENT_SECONDS = 60.0
"""How long a cluster may lack what takes jobs, which its dashboard announces before it is there."""
SIGN_SECONDS = 120.0
"""How long a job's first word is waited for; it needs half a minute to unpack and to import, and longer where nodes are
busy."""

ENTRY = f'''"""Begins the sweep that came with the job, if one did, and starts rin: on the head node, with the packages
of the job."""

import sys

try:
    import ray  # noqa: F401
except ImportError:
    sys.exit(
        f"rin: {{sys.executable}} is the first python on the head node's PATH, without ray; "
        "put the right one first, then `ray start`"
    )

from dashboards.cli import exit_codes, main
from dashboards.live import build_progress
from dashboards.tables import terminal
from search.submission import begin_shipped

with exit_codes(), build_progress(terminal()) as progress:
    for source in begin_shipped("{SHIPPED}", progress):
        print(f"the searcher is told: {{source}}")
main()
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class JobServer:
    """A cluster that takes jobs."""

    address: str
    """http://HEAD:8265"""
    client: Any
    """A JobSubmissionClient."""
    on_this_machine: bool
    """Whether every node is this machine. The address does not tell: http://localhost:8265 is often the end of a
    tunnel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A sweep on its way.

    Example: Submission(id="raysubmit_4LamXRuQpYdSMg7J", sweep="s", store="/shared/runs", follow=("ray job logs --follow
    raysubmit_4LamXRuQ...", ...), command="python rin.py resume s --store /shared/runs --address auto")
    """

    id: str
    sweep: str
    store: str
    command: str
    """What runs on the head node."""
    follow: tuple[str, ...]
    """Command lines that show how it goes, and that end it."""


# What can be sent


def job_server(address: str) -> JobServer:
    """The cluster at exactly this address, http://HOST:PORT. Raises ConfigError."""
    refuse_secrets([address])
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if os.environ.get(variable, address) != address:
            raise ConfigError(
                f"--submit {address}: {variable}={os.environ[variable]} would win over it; unset {variable}"
            )
    if importlib.util.find_spec("aiohttp_cors") is None:  # of what ray[default] brings, the part that nothing else does
        raise ConfigError(
            '--submit: Ray cannot submit jobs as it is installed here; pip install "ray[default,tune]==2.60.*"'
        )
    from ray.job_submission import JobSubmissionClient

    for talkative in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    with _told_by_the_cluster(address):
        client = JobSubmissionClient(address)
        hosts = host_names(client)
    return JobServer(address=address, client=client, on_this_machine=set(hosts) == {socket.gethostname()})


def check_places(store: str, tracking_uri: str | None, *, begun: bool) -> None:
    """Of a sweep that runs on other machines, as the user wrote them; `begun`: its study.json says where it is tracked.

    Raises ConfigError for a place of this machine.
    """
    if "://" not in store and not Path(store).is_absolute():
        raise ConfigError(
            f"--store {store}: is a folder of this machine, which the cluster cannot reach; "
            "give the absolute path of a folder that every node shares (NFS), or s3://BUCKET/PATH"
        )
    if tracking_uri is None and begun:
        return
    if tracking_uri is None or tracking_uri.startswith("sqlite:"):
        raise ConfigError(
            f"--tracking-uri {tracking_uri or 'sqlite in the store'}: sqlite loses data on shared storage; "
            "start an MLflow server where the nodes and this machine reach it and give its address, "
            "for example http://HEAD:5000"
        )
    if urlsplit(tracking_uri).hostname in ("localhost", "127.0.0.1", "::1"):
        raise ConfigError(
            f"--tracking-uri {tracking_uri}: each machine calls itself that; "
            "give the server's name, for example http://HEAD:5000"
        )


def check_paths(origin: str, settings: dict[str, Any], folder: Path) -> None:
    """Of settings as they were written, for a sweep that runs on other machines. Raises ConfigError for a path of this
    one."""
    for key, value in relative_paths(settings, folder):
        raise ConfigError(
            f"{origin}{key}={value}: lies on this machine, and trials run on others; "
            "put it on storage that every node shares and give its absolute path there"
        )


def check_space_paths(origin: str, space: Space, folder: Path) -> None:
    """Of a space as it was written, its choices included. Raises ConfigError for a path of this machine."""
    check_paths(origin, space.settings, folder)
    for dimension in space.dimensions:
        options = dimension.domain.options.values() if isinstance(dimension.domain, Choice) else ()
        for value in options:
            check_paths(origin, unflatten({dimension.key: value}), folder)


# Sending it


def submit_sweep(server: JobServer, study: StudyConfig, arms: Sequence[Arm]) -> Submission:
    """A new sweep, checked as far as it can be here. Raises ConfigError before anything is sent."""
    settings = flatten(study.space.settings) | flatten(study.settings)
    refuse_secrets([study.tracking_uri, *(f"--set {key}={value}" for key, value in settings.items())])
    bring_rewards(study, arms)  # of the sweep that this one is made from, whose files may be gone
    return _send(server, study.name, ["--store", study.store], shipped=(study, arms))


def submit_resume(
    server: JobServer, name: str, store: str, *, tracking_uri: str | None, changes: Mapping[str, float | None]
) -> Submission:
    """A sweep that lies in `store` already, wherever that is; `changes`: options of `rin resume` that are numbers.

    Raises ConfigError before anything is sent."""
    places = ["--store", absolute_store(store)] + (
        [] if tracking_uri is None else ["--tracking-uri", absolute_uri(tracking_uri)]
    )
    words = [word for option, value in changes.items() if value is not None for word in (option, f"{value:g}")]
    return _send(server, check_name(name), places, words)


def _send(
    server: JobServer,
    name: str,
    places: Sequence[str],
    changes: Sequence[str] = (),
    shipped: tuple[StudyConfig, Sequence[Arm]] | None = None,
) -> Submission:
    """`places` and `changes` are options of `rin resume`; `rin status` needs the first too, which begin with the
    store."""
    words = ["resume", name, *places, *changes]
    refuse_secrets(words)
    command = shlex.join(["python", "rin.py", *words, "--address", "auto"])
    with tempfile.TemporaryDirectory(prefix="rin-job-") as folder, _told_by_the_cluster(server.address):
        work = Path(folder) / "work"
        work.mkdir()
        (work / "rin.py").write_text(ENTRY, encoding="utf-8")
        if shipped is not None:
            ship(*shipped, work / SHIPPED)
        job = _taken(
            server.client,
            entrypoint=command,
            runtime_env={
                "working_dir": str(work),
                "py_modules": _packages(Path(folder) / "packages"),
                "env_vars": {
                    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # the sweep gives its trials a working folder of its own
                    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
                },
            },
            metadata={"sweep": name},
        )
    follow = (
        f"ray job logs --follow {job} --address {server.address}",
        shlex.join(["rin", "status", name, *places]),
        f"ray job stop {job} --address {server.address}",
    )
    return Submission(id=job, sweep=name, store=places[1], command=command, follow=follow)


def _taken(client: Any, **job: Any) -> str:
    """The id of the job, once the cluster has taken it: the agent of a head that has just started may come up later
    than its dashboard."""
    until = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            taken: str = client.submit_job(**job)
            return taken
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(1)


def has_begun(server: JobServer, job: Submission) -> bool:
    """Whether the job has said that its sweep begins; False when it is late. Raises ConfigError with the last word of
    one that ended before."""
    signs = (f"sweep {job.sweep}:", "building ")  # the base model is built for a sweep that is free to begin
    before = noted_job(job.store, job.sweep)
    note_job(job.store, job.sweep, Job(id=job.id, address=server.address))  # first: who waits may press Ctrl-C
    until = time.monotonic() + SIGN_SECONDS
    with _told_by_the_cluster(server.address):
        while True:
            ended = server.client.get_job_status(job.id).is_terminal()  # first: then the output is whole
            if any(line.startswith(signs) for line in _output(server, job.id)):
                return True
            if ended:
                if before is not None:  # the job that has the name
                    note_job(job.store, job.sweep, before)
                raise ConfigError(f"job {job.id} ended before the sweep began: {_last_word(server, job.id)}")
            if time.monotonic() > until:
                return False
            time.sleep(1)


def _output(server: JobServer, job: str) -> list[str]:
    return [line for line in server.client.get_job_logs(job).splitlines() if line.strip()]


def _last_word(server: JobServer, job: str) -> str:
    """Why it was refused, else its last line, else what Ray says."""
    lines = _output(server, job)
    refusals = [line.removeprefix("rin: ") for line in lines if line.startswith("rin: ")]
    return strip_password([server.client.get_job_info(job).message or "it said nothing", *lines[-1:], *refusals][-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What the cluster says of a job. Example: JobState(status="runs", words="its job raysubmit_4L... at
    http://HEAD:8265 is RUNNING")"""

    status: Literal["runs", "ended", "unknown"]
    """It runs as soon as it waits."""
    words: str


def state_of(job: Job) -> JobState:
    """Of a job that cannot be asked for, too, which is said."""
    where = f"its job {job.id} at {job.address}"
    try:
        server = job_server(job.address)
        with _told_by_the_cluster(job.address):
            status = server.client.get_job_status(job.id)
            if not status.is_terminal():
                return JobState(status="runs", words=f"{where} is {status.value}")
            return JobState(status="ended", words=f"{where} is {status.value}: {_last_word(server, job.id)}")
    except ConfigError as error:
        return JobState(status="unknown", words=f"{where} cannot be asked: {error}")


def _packages(folder: Path) -> list[str]:
    """Copies of the four packages as they are imported here, without compiled files, whose times would upload them
    anew."""
    compiled = shutil.ignore_patterns("__pycache__", "*.pyc")
    return [str(shutil.copytree(str(files(name)), folder / name, ignore=compiled)) for name in PACKAGES]


@contextmanager
def _told_by_the_cluster(address: str) -> Iterator[None]:
    """What the cluster refuses becomes one line with the remedy."""
    from requests import RequestException

    try:
        yield
    except AuthenticationError:
        raise ConfigError(f"--submit {address}: {TOKEN_REMEDY}") from None
    except (ConnectionError, RequestException, RuntimeError) as error:  # Ray's for every answer but 200
        raise ConfigError(
            f"--submit {address}: {first_line(error)[:300]}; start the head with ray[default] and give its dashboard's "
            "address"
        ) from None


# The files that travel


def ship(study: StudyConfig, arms: Sequence[Arm], folder: Path) -> None:
    """Write the sweep into `folder` as into a store; its own store stays named in it."""
    (Folder(str(folder)) / study.name).write(STUDY_FILE, study.model_dump_json(indent=1))
    lying = _lying_in(folder, study)
    keep_rewards(lying, arms)
    for number, arm in enumerate(arms):
        write_arm(lying, number, arm)


def begin_shipped(folder: str, progress: "Progress | None" = None) -> list[str]:
    """In the job: begin the sweep that came with it, if one did, in its store. Returns what its searcher is told
    beforehand.

    Raises ConfigError when its name is taken, and for whatever else a sweep is refused.
    """
    here = Path(folder).absolute()
    told: list[str] = []
    for name in sweeps(str(here)):
        study = StudyConfig.model_validate_json((here / name / STUDY_FILE).read_bytes())
        arms = read_arms(_lying_in(here, study))
        bring_rewards(_lying_in(here, study), arms)
        begin_study(study, progress, arms)
        told += [evidence.source for evidence in read_evidence(study)]
    return told


def _lying_in(folder: Path, study: StudyConfig) -> StudyConfig:
    return study.model_copy(update={"store": str(folder)})

"""Where a sweep runs: what a trial asks of a node, a Ray for this machine alone, and a Ray job that outlives the laptop.

`rin sweep ... --submit http://HEAD:8265` runs the very same command on the cluster's head node, as a Ray job: `--submit` goes,
`--address auto` comes. Three things do not travel by themselves.

*The program.* The four packages are shipped as they lie here (editable or installed) in `py_modules`, which Ray puts on the
PYTHONPATH of the job and of every trial, ahead of what a node may have installed; so the cluster runs this version, and needs
only its dependencies (torch, ray, mlflow, ...). A wheel would be installed anew on every node, torch and all. The job's working
folder holds what the command alone reads: `rin.py`, which starts it, and YAML files that it names. Everything else that the
command names must lie where trials can read it: shared storage, by absolute path.

*Places.* `runs` is a folder on this machine. Unless the whole cluster is this machine, a store and tracking that the nodes can
reach must be named.

*Secrets.* Ray shows a job's command, its metadata and its runtime environment to whoever sees the dashboard. There is no place in
a submission that hides a password, so one that contains a password is refused: passwords belong into the environment of the
cluster (`ray start` on the head node hands its own to the job).

Left out: `ray://` clients (they die with the laptop) and images (a job runs in the environment that the cluster has).
"""

import importlib.util
import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import tune
from ray._private import ray_constants
from ray.exceptions import AuthenticationError
from ray.tune.execution import class_cache

from search.mlflow_client import absolute_uri
from search.secrets import strip_password
from spaces.errors import ConfigError
from spaces.workloads import Workload

PACKAGES = ("spaces", "trainable", "search", "dashboards")
STOP_SECONDS = 120
"""`ray job stop` sends SIGTERM, waits this long (Ray's own default: 3 s) for trials to be checkpointed, then kills."""
AGENT_SECONDS = 60.0
"""How long a cluster may lack what takes jobs, which its dashboard announces before it is there."""
TOKEN_REMEDY = (
    "the cluster does not take this machine's token; copy what `ray get-auth-token` prints on the head node into RAY_AUTH_TOKEN, or "
    "into the file that RAY_AUTH_TOKEN_PATH names"
)
CLOUD_KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
READ_BY_TRIALS = ("model.name", "task.path")
"""Settings that may name a file or folder."""

ENTRY = '''"""Starts rin on the head node with the packages that came with the job."""

import sys

try:
    import ray  # noqa: F401
except ImportError:
    sys.exit(f"rin: {sys.executable} is the first python on the head node's PATH, without ray; put the right one first, then `ray start`")

from dashboards.cli import main

main()
'''


# What a trial asks of a node


def resources(workload: Workload, cpus: int | None = None, gpus: float | None = None) -> tune.PlacementGroupFactory:
    """What one trial occupies, for `tune.with_resources`: one bundle, because a trial is one process and must lie on one node.

    `gpus` may be a fraction: 0.5 puts two trials on a GPU (their memory is not fenced off from each other). A trial computes on
    one GPU, so more than one is refused: the rest would be held and idle. Raises ConfigError.
    """
    cpus = workload.trial_cpus if cpus is None else cpus
    gpus = workload.trial_gpus if gpus is None else gpus
    if cpus < 1:
        raise ConfigError(f"--cpus {cpus}: a trial needs at least one CPU")
    if not 0 <= gpus <= 1:
        raise ConfigError(f"--gpus {gpus:g}: a trial computes on one GPU; give 0, 1, or a fraction such as 0.5")
    return tune.PlacementGroupFactory([{"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}])


def check_fits(request: tune.PlacementGroupFactory, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError when no node (`ray.nodes()`) could ever hold a trial: Tune would wait for ever.

    Not for a cluster that grows on demand, whose nodes come when they are asked for.
    """
    need: Mapping[str, float] = request.bundles[0]
    offers: list[Mapping[str, float]] = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(offer.get(kind, 0.0) >= amount for kind, amount in need.items()) for offer in offers):
        return
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items())
    largest = ", ".join(f"{max((offer.get(kind, 0.0) for offer in offers), default=0.0):g} {kind}" for kind in need)
    raise ConfigError(f"a trial asks for {wanted}, which no node has (at most {largest}); give smaller --cpus or --gpus, or --address")


# The Ray that a sweep runs on


@contextmanager
def connected(address: str | None, runtime_env: Mapping[str, Any]) -> Iterator[None]:
    """The cluster at `address`, or with None a Ray of this process alone; left, or ended, on leaving.

    Raises ConfigError when no cluster answers, or does not take this machine's token, or would show a password.
    """
    # Tune hands the driver's cloud keys to its trials as part of their runtime environment, which the dashboard shows and Ray
    # writes into a log that everyone on the machine can read. The processes of a local Ray inherit them unseen; nodes have their own.
    class_cache.ENV_VARS_TO_PROPAGATE = class_cache.ENV_VARS_TO_PROPAGATE - CLOUD_KEYS
    quiet: dict[str, Any] = {"runtime_env": dict(runtime_env), "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        with _on_localhost():
            ray.init(num_cpus=os.cpu_count(), include_dashboard=False, configure_logging=True, **quiet)
    else:
        refuse_secrets(sys.argv[1:])  # Ray keeps the command line of every driver
        try:
            _knock(address)  # Ray would go on trying for more than ten minutes
            ray.init(address=address, **quiet)
        except AuthenticationError:
            raise ConfigError(f"--address {address}: {TOKEN_REMEDY}") from None
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--address {address}: no Ray cluster answers there ({str(error).splitlines()[0]})") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _on_localhost() -> Iterator[None]:
    """`ray.init` within this listens on the loopback interface alone.

    On Linux Ray otherwise takes the machine's own address, also for a Ray that only this process uses, and listens on every
    interface; a token is then all that stands between the network and whoever may run code here. Ray has no option for it, but
    the switch with which it spares Windows and macOS their firewall's question does it everywhere.
    """
    before = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes that it starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, which has read it already
    try:
        yield
    finally:
        variable, ray_constants.ENABLE_RAY_CLUSTER = before
        if variable is None:
            del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        else:
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = variable


def _knock(address: str) -> None:
    """Raises OSError when nothing listens at HOST:PORT; what has no port (`auto`) Ray finds, or not, at once."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def refuse_secrets(words: Sequence[str]) -> None:
    """Raises ConfigError for a password in a command that a cluster gets to see."""
    for word in words:
        shown = strip_password(word)
        if shown != word:
            raise ConfigError(
                f"{shown}: holds a password, and Ray shows a job's command to whoever sees its dashboard; leave the password out and set "
                "it where the sweep's process finds it, for --submit where `ray start` runs on the head node (MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD, PGPASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )


# A sweep as a Ray job


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A sweep on its way.

    Example: Submission(id="raysubmit_4LamXRuQpYdSMg7J", command="python rin.py sweep sigma --name s --address auto ...",
    follow=("ray job logs --follow raysubmit_4LamXRuQpYdSMg7J --address http://head:8265", ...))
    """

    id: str
    command: str
    """What runs on the head node."""
    follow: tuple[str, ...]
    """Command lines that show how it goes, and that end it."""


def submit(arguments: Sequence[str], address: str, name: str) -> Submission:
    """Submit `rin ARGUMENTS` (a `sweep` or a `resume`, without the program's name, `--submit` still in it) as a Ray job.

    `name` is the sweep's: where `--name` is not among the arguments it is added, so that the sweep can be found again. Returns
    when Ray has taken the job. Raises ConfigError for whatever the user can mend, before anything is sent.
    """
    command = _without(arguments, "--submit")
    refuse_secrets([*command, address])
    if _value(command, "--address") is not None:
        raise ConfigError("--address: --submit names the cluster already; leave --address out")
    client = _client(address)
    if command[0] == "sweep" and _value(command, "--name") is None:
        command += ["--name", name]
    command = _with_places(command, on_this_machine=_is_this_machine(client))
    with tempfile.TemporaryDirectory(prefix="rin-job-") as folder:
        work = Path(folder) / "work"
        command = [*_with_shipped_files(command, work), "--address", "auto"]
        (work / "rin.py").write_text(ENTRY, encoding="utf-8")
        entrypoint = shlex.join(["python", "rin.py", *command])
        with _told_by_the_cluster(address):
            job = _taken(
                client,
                entrypoint=entrypoint,
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
    return Submission(id=job, command=entrypoint, follow=_follow(job, address, name, command))


def _taken(client: Any, **job: Any) -> str:
    """The id of the job, once the cluster has taken it: the agent of a head that has just started may come up later than its dashboard."""
    until = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            taken: str = client.submit_job(**job)
            return taken
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(1)


def _follow(job: str, address: str, name: str, command: Sequence[str]) -> tuple[str, ...]:
    where = [part for option in ("--store", "--tracking-uri") if (value := _value(command, option)) for part in (option, value)]
    return (
        f"ray job logs --follow {job} --address {address}",
        shlex.join(["rin", "status", name, *where]),
        f"ray job stop {job} --address {address}",
    )


def _client(address: str) -> Any:
    """A JobSubmissionClient at exactly this address."""
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--submit {address}: give the address of the cluster's dashboard, for example http://HEAD:8265")
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if os.environ.get(variable, address) != address:
            raise ConfigError(f"--submit {address}: {variable}={os.environ[variable]} would win over it; unset {variable}")
    if importlib.util.find_spec("aiohttp_cors") is None:  # of what ray[default] brings, the part that nothing else does
        raise ConfigError('--submit: Ray cannot submit jobs as it is installed here; pip install "ray[default,tune]==2.60.*"')
    from ray.job_submission import JobSubmissionClient

    for talkative in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    with _told_by_the_cluster(address):
        return JobSubmissionClient(address)


@contextmanager
def _told_by_the_cluster(address: str) -> Iterator[None]:
    """What the cluster refuses becomes one line with the remedy."""
    from requests import RequestException

    try:
        yield
    except AuthenticationError:
        raise ConfigError(f"--submit {address}: {TOKEN_REMEDY}") from None
    except (ConnectionError, RequestException, RuntimeError) as error:  # Ray raises RuntimeError for every answer but 200
        lines = strip_password(str(error)).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"--submit {address}: {lines[0][:300]}; start the head with ray[default] and give its dashboard's address"
        ) from None


def _is_this_machine(client: Any) -> bool:
    """Whether every node is this machine. The address does not tell: http://localhost:8265 is often the end of a tunnel."""
    answer = client._do_request("GET", "/nodes?view=summary")  # the dashboard's own; Ray's public API shows no host names
    if answer.status_code != 200:
        return False
    nodes = answer.json()["data"]["summary"]
    return bool(nodes) and all(node.get("hostname") == socket.gethostname() for node in nodes)


# What the command names


def _with_places(command: Sequence[str], *, on_this_machine: bool) -> list[str]:
    """The command with places that the job can find: made absolute on this machine, checked for another one."""
    store, tracking = _value(command, "--store"), _value(command, "--tracking-uri")
    if on_this_machine:
        placed = list(command)
        if "://" not in (store or "runs"):
            placed = [*_without(placed, "--store"), "--store", str(Path(store or "runs").absolute())]
        if tracking is not None:
            placed = [*_without(placed, "--tracking-uri"), "--tracking-uri", absolute_uri(tracking)]
        return [_with_absolute_path(word) for word in placed]
    if store is None or ("://" not in store and not Path(store).is_absolute()):
        raise ConfigError(
            f"--store {store or 'runs'}: is a folder of this machine, which the cluster cannot reach; give the absolute path of a folder "
            "that every node shares (NFS), or s3://BUCKET/PATH"
        )
    if tracking is None and command[0] == "resume":
        tracking = "where the sweep began"
    if tracking is None or tracking.startswith("sqlite:"):
        raise ConfigError(
            f"--tracking-uri {tracking or 'sqlite in the store'}: sqlite loses data on shared storage; start an MLflow server where the "
            "nodes and this machine reach it and give its address, for example http://HEAD:5000"
        )
    if urlsplit(tracking).hostname in ("localhost", "127.0.0.1", "::1"):
        raise ConfigError(
            f"--tracking-uri {tracking}: each machine calls itself that; give the server's name, for example http://HEAD:5000"
        )
    for word in command:
        if _with_absolute_path(word) != word:
            raise ConfigError(
                f"--set {word.removeprefix('--set=')}: lies on this machine, and trials run on others; put it on storage that every node "
                "shares and give its absolute path there"
            )
    return list(command)


def _with_absolute_path(word: str) -> str:
    """`task.path=questions.jsonl` names a file of this folder, and trials read it in theirs."""
    key, equals, value = word.partition("=") if not word.startswith("--set=") else word.removeprefix("--set=").partition("=")
    if key not in READ_BY_TRIALS or not equals or Path(value).is_absolute() or not Path(value).exists():
        return word
    return word.removesuffix(value) + str(Path(value).absolute())


def _with_shipped_files(command: Sequence[str], work: Path) -> list[str]:
    """YAML files that the command names (a search space) travel in its working folder; the command alone reads them."""
    work.mkdir()
    shipped: list[str] = []
    for word in command:
        path = Path(word)
        if not word.startswith("-") and path.suffix in (".yaml", ".yml") and path.is_file():
            target = work / path.name
            if target.exists():
                raise ConfigError(f"{word}: another file of the name {path.name} is in the command; rename one of the two")
            shutil.copyfile(path, target)
            word = path.name
        shipped.append(word)
    return shipped


def _packages(folder: Path) -> list[str]:
    """Copies of the four packages as they are imported here, without compiled files, whose times would upload them anew."""
    copies = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        copies.append(str(shutil.copytree(Path(spec.origin).parent, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))))
    return copies


def _value(command: Sequence[str], option: str) -> str | None:
    """Of `--option value` or `--option=value`; the last one counts, as it does when the command is read."""
    found = None
    for index, word in enumerate(command):
        if word == option and index + 1 < len(command):
            found = command[index + 1]
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def _without(command: Sequence[str], option: str) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in command:
        if skip or word.startswith(f"{option}="):
            skip = False
        elif word == option:
            skip = True
        else:
            kept.append(word)
    return kept

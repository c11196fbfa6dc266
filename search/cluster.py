"""Where a sweep runs: what a trial asks of a node, and the Ray that carries it, of this machine alone or a cluster's.

A local Ray belongs to one sweep: it listens on localhost only and ends with it. A cluster is somebody else's: it is
entered and left, and shows what it is told to whoever sees its dashboard, so no password goes there. A sweep that is to
outlive this machine is sent there whole: `search/submission.py`.

Left out: `ray://` clients, which die with the laptop.
"""

import logging
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune
from ray.exceptions import AuthenticationError

from search.ray_internals import in_a_group_of_its_own, keep_cloud_keys, on_localhost
from search.secrets import first_line, strip_password
from search.store import StudyConfig, gpus_of, processes_of
from spaces.errors import ConfigError
from spaces.workloads import WORKLOADS
from trainable.cores import usable_cpus

TOKEN_REMEDY = (
    "the cluster does not take this machine's token; copy what `ray get-auth-token` prints on the head node into "
    "RAY_AUTH_TOKEN, or into the file that RAY_AUTH_TOKEN_PATH names"
)


# What a trial asks of a node


def resources(study: StudyConfig) -> tune.PlacementGroupFactory:
    """What one trial occupies, for `tune.with_resources`: a bundle for each of its processes, all on one node.

    `gpus` may be a fraction: 0.5 puts two trials on a GPU (their memory is not fenced off from each other).
    """
    cpus, gpus, processes = study.cpus or WORKLOADS[study.workload].trial_cpus, gpus_of(study), processes_of(study)
    bundle = {"CPU": float(cpus), **({"GPU": gpus / processes} if gpus else {})}
    return tune.PlacementGroupFactory([bundle] * processes, strategy="STRICT_PACK" if processes > 1 else "PACK")


def lacking(request: tune.PlacementGroupFactory, nodes: Sequence[Mapping[str, Any]]) -> str:
    """What a trial asks for that no node (`ray.nodes()`) has; empty where one could hold it."""
    need: Mapping[str, float] = request.required_resources
    offers: list[Mapping[str, float]] = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(offer.get(kind, 0.0) >= amount for kind, amount in need.items()) for offer in offers):
        return ""
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items())
    together = f" for its {len(request.bundles)} ranks" if len(request.bundles) > 1 else ""
    largest = ", ".join(f"{max((offer.get(kind, 0.0) for offer in offers), default=0.0):g} {kind}" for kind in need)
    return f"a trial asks for {wanted}{together}, which no node has (at most {largest})"


def check_fits(request: tune.PlacementGroupFactory, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError when no node could ever hold a trial: Tune would wait for ever.

    Not for a cluster that grows on demand, whose nodes come when they are asked for.
    """
    if lack := lacking(request, nodes):
        raise ConfigError(f"{lack}; give smaller --cpus or --gpus, or --address")


# The Ray that a sweep runs on


@contextmanager
def connected(address: str | None, runtime_env: Mapping[str, Any]) -> Iterator[None]:
    """The cluster at `address`, or with None a Ray of this process alone; left, or ended, on leaving.

    Raises ConfigError when no cluster answers, or does not take this machine's token, or would show a password.
    """
    keep_cloud_keys()
    quiet: dict[str, Any] = {"runtime_env": dict(runtime_env), "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        with on_localhost(), in_a_group_of_its_own():
            try:  # `local`: neither another Ray of this machine, nor what RAY_ADDRESS names
                ray.init("local", num_cpus=usable_cpus(), include_dashboard=False, configure_logging=True, **quiet)
            except OSError as error:  # its sockets' paths have 107 bytes at most
                ray.shutdown()
                raise ConfigError(
                    f"TMPDIR={tempfile.gettempdir()}: Ray cannot start there ({first_line(error)}); set TMPDIR to a "
                    "short path that you may write to, for example TMPDIR=/tmp"
                ) from None
    else:
        refuse_secrets(sys.argv[1:])  # Ray keeps the command line of every driver
        try:
            _check_reachable(address)  # Ray would go on trying for more than ten minutes
            ray.init(address=address, **quiet)
        except AuthenticationError:
            raise ConfigError(f"--address {address}: {TOKEN_REMEDY}") from None
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--address {address}: no Ray cluster answers there ({str(error).splitlines()[0]})"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
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
                f"{shown}: holds a password, and Ray shows a job's command to whoever sees its dashboard; "
                "leave the password out and set it where the sweep's process finds it, for --submit where "
                "`ray start` runs on the head node (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PGPASSWORD, "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )

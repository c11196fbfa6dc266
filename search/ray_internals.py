"""What is taken from inside Ray, where it has no public way: private names, pinned by Ray's version and named by tests.

Most are written to, because Ray reads them as module globals. Each function says what would happen without it.
"""

import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray._private import ray_constants, services, utils
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController

CLOUD_KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}


def keep_cloud_keys() -> None:
    """Tune hands the driver's cloud keys to its trials as part of their runtime environment, which the dashboard shows
    and Ray writes into a log that everyone on the machine can read. The processes of a local Ray inherit them unseen;
    nodes have their own."""
    class_cache.ENV_VARS_TO_PROPAGATE = class_cache.ENV_VARS_TO_PROPAGATE - CLOUD_KEYS


@contextmanager
def on_localhost() -> Iterator[None]:
    """`ray.init` within this listens on the loopback interface alone.

    On Linux Ray otherwise takes the machine's own address, also for a Ray that only this process uses, and listens on
    every interface; a token is then all that stands between the network and whoever may run code here. Ray has no
    option for it, but the switch with which it spares Windows and macOS their firewall's question does it everywhere.
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


@contextmanager
def in_a_group_of_its_own() -> Iterator[None]:
    """`ray.init` within this starts Ray's processes where signals to this process's group do not reach them.

    A batch system ends a job, and a terminal its window, by a signal to the whole group: Ray and the trials would be
    gone before the trials could save themselves. Ray also takes SIGTERM of this process for itself, and exits.
    """
    popen, take = services.ConsolePopen, utils.set_sigterm_handler
    services.ConsolePopen = partial(popen, process_group=0)
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        services.ConsolePopen, utils.set_sigterm_handler = popen, take


class _Patient(TuneController):  # type: ignore[misc]
    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._actor_cleanup_timeout = self._actor_force_cleanup_timeout = math.inf


@contextmanager
def trials_leave_in_their_time() -> Iterator[None]:
    """`Tuner.fit` within this ends when every trial has left.

    Tune kills one that takes longer: 10 minutes where the run goes on, 10 seconds where it ends. A trial that leaves
    finishes its step, saves itself and evaluates itself, for which 10 seconds are too short on a busy machine, and
    with a real model always. What hangs there its watchdog ends, and a second Ctrl-C does not wait.
    """
    runs: Any = importlib.import_module("ray.tune.tune")
    runs.TuneController = _Patient
    try:
        yield
    finally:
        runs.TuneController = TuneController


def host_names(client: Any) -> list[str]:
    """Of every node of the cluster that a JobSubmissionClient talks to; [] where its dashboard does not say. Asks what
    the dashboard's own page asks: Ray's public API shows no host names."""
    answer = client._do_request("GET", "/nodes?view=summary")
    return [str(node.get("hostname")) for node in answer.json()["data"]["summary"]] if answer.status_code == 200 else []

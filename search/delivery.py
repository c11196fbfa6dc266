"""How MLflow is told: records wait in a queue, and one thread applies them in order.

Tracking must never cost a trial. Ray's own callback logs each metric with a request of its own on the thread that
drives every trial (1.8 s per report of 40 metrics), aborts the whole sweep when a trial fails in its set-up, opens a
second run for each trial on resume, and leaves runs RUNNING after Ctrl-C. So here a `Tracker` only turns what happened
into records, and the one thread of a `Delivery` applies them in order. It lets reports gather for a moment: those of a
trial go in one `log_batch`, which costs little more than one of them alone. A record that MLflow refuses, rather than
misses, would block those behind it for good: it is dropped, with a warning.

Telling twice has no effect: a run is looked up by its tag `trial_key` before it is created, MLflow ignores a metric
that it has at the same step, time and value, files are overwritten, and traces have ids of ours.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from search import completions, logged_model
from search.mlflow_client import Owner, claimed_experiment, client
from search.secrets import strip_password

log = logging.getLogger(__name__)

PER_BATCH = 800  # MLflow takes 1000 of metrics, params and tags together
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}
BESIDE = {"file", "traces"}
"""Records for which later ones do not wait: artifacts may live elsewhere than the rest."""
GATHER_SECONDS = 2.0
"""That a record waits for others."""
LONGEST_PAUSE = 30.0  # seconds between two attempts
CLOSE_SECONDS = 30.0  # `close` waits this long for the next record to be delivered

Record = dict[str, Any]
Send = Callable[[Sequence[Record], Callable[[], None]], tuple[list[Record], str]]
"""Delivers records, calling its second argument after each; returns those that it could not deliver, in order, and why.
"""


class Delivery:
    """A queue that one background thread delivers in order. `put` takes microseconds and never waits for the receiver;
    `close` waits while records are being delivered, then gives up."""

    def __init__(self, send: Send, receiver: str) -> None:
        self._send, self._receiver = send, receiver
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._queue: list[Record] = []
        self._thread: threading.Thread | None = None
        self._delivered_at = 0.0

    def put(self, record: Record) -> None:
        with self._changed:
            self._queue.append(record)
            self._changed.notify()
        if self._thread is None:
            self._closing.clear()
            self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
            self._thread.start()

    def close(self) -> int:
        """How many records stay behind; they are gone, and the receiver is told again from where they came."""
        if self._thread is None:
            return 0
        self._note_delivery()
        with self._changed:
            self._closing.set()
            self._changed.notify()
        while self._thread.is_alive() and time.monotonic() - self._delivered_at < CLOSE_SECONDS:
            self._thread.join(0.1)
        left = len(self._queue)
        if not self._thread.is_alive():  # else it hangs in a request, and dies with this process
            self._thread = None
        return left

    def _note_delivery(self) -> None:
        self._delivered_at = time.monotonic()

    def _deliver(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing.is_set())
            self._closing.wait(GATHER_SECONDS)
            with self._changed:
                records = list(self._queue)
            last = self._closing.is_set()
            left, trouble = self._send(records, self._note_delivery)
            if left and not pause:
                log.warning("%s does not take records: %s; they are told again later", self._receiver, trouble)
            with self._changed:
                self._queue[: len(records)] = left
                if last and (left or not self._queue):
                    return
            if not left:
                pause = 0.0
                continue
            pause = min(max(2 * pause, 1.0), LONGEST_PAUSE)
            self._closing.wait(pause)


class MlflowWriter:
    """Applies records to MLflow; each is safe to apply twice.

    Example: {"do": "log", "experiment": "e13", "key": "e13/c03/0", "time": 1760000000000, "step": 3, "metrics":
    {"gen/length":
    4.1}} `do` is `open` (name, tags), `log` (step and metrics, params, tags), `file` (path, text), `traces`,
    `model`, `end` (status) or `told` (tags), which waits for the files and traces before it; `time` is Unix ms.
    """

    def __init__(self, uri: str, owner: Owner) -> None:
        self._uri, self._owner = uri, owner
        self._mlflow: Any = None
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, str] = {}
        self._traces = True
        """Whether MLflow there takes any."""

    def send(self, records: Sequence[Record], note_delivery: Callable[[], None]) -> tuple[list[Record], str]:
        """What could not be delivered, and why. Stops at the first record that fails, except for files: artifacts may
        live elsewhere than the rest, and metrics should not wait for them; nor for traces.
        """
        left: list[Record] = []
        trouble = ""
        groups = _together(records)
        for index, group in enumerate(groups):
            what = group[0]["do"]
            if what in ("file", "told") and left:
                left += group
                continue
            try:
                self._apply(group)
                note_delivery()
            except Exception as error:  # the network, the server, its database and its disk can fail in any way
                reason = strip_password(f"{type(error).__name__}: {error}".splitlines()[0])
                if what == "traces" and completions.no_traces_here(error):
                    log.warning("MLflow there takes no traces; completions lie in samples.json of each run: %s", reason)
                    self._traces = False
                    continue
                if self._is_refusal(error):
                    if len(group) > 1:  # one of them is at fault
                        groups[index + 1 : index + 1] = [[record] for record in group]
                    else:
                        log.warning("MLflow refuses a record of %s: %s", group[0]["key"], reason)
                    continue
                trouble = reason
                if what not in BESIDE:
                    return left + [record for later in groups[index:] for record in later], trouble
                left += group
        return left, trouble

    def _apply(self, group: Sequence[Record]) -> None:
        if self._mlflow is None:
            self._mlflow = client(self._uri)
        record = group[0]
        if record["do"] == "model":
            number = self._experiment(record["experiment"])
            return logged_model.deliver(self._mlflow, number, self._owner.id, record, partial(self._known_run, number))
        mlflow, run_id = self._mlflow, self._run_id(record)
        match record["do"]:
            case "file":
                mlflow.log_text(run_id, record["text"], record["path"])
            case "traces":
                if self._traces:
                    trial = f"{self._owner.id}/{record['key']}"
                    number = self._experiment(record["experiment"])
                    completions.deliver(self._uri, number, run_id, trial, record["traces"])
            case "end":
                mlflow.set_terminated(run_id, record["status"], record["time"])
            case "open":
                mlflow.update_run(run_id, status="RUNNING")
                self._log(run_id, group)
            case "log" | "told":
                self._log(run_id, group)

    def _log(self, run_id: str, group: Sequence[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [
            Metric(name, value, record["time"], record["step"])
            for record in group
            for name, value in record.get("metrics", {}).items()
        ]
        params = [Param(*item) for record in group for item in record.get("params", {}).items()]
        tags: dict[str, str] = {}
        for record in group:
            tags |= record.get("tags", {})  # the later counts
        for start in range(PER_BATCH, len(metrics), PER_BATCH):
            self._mlflow.log_batch(run_id, metrics=metrics[start : start + PER_BATCH])
        said = [RunTag(*item) for item in tags.items()]
        self._mlflow.log_batch(run_id, metrics=metrics[:PER_BATCH], params=params, tags=said)  # params by the hundred

    def _run_id(self, record: Record) -> str:
        """The run of this trial: known, found by its tag (opened before a restart or a crash), or new."""
        key, experiment = record["key"], record["experiment"]
        if key in self._runs:
            return self._runs[key]
        number = self._experiment(experiment)
        found = self._known_run(number, key)
        if found is None:
            tags = {"trial_key": key, **record.get("tags", {})}
            made = self._mlflow.create_run(number, start_time=record["time"], tags=tags, run_name=record.get("name"))
            found = str(made.info.run_id)
        self._runs[key] = found
        return found

    def _known_run(self, experiment: str, key: str) -> str | None:
        found = self._mlflow.search_runs([experiment], filter_string=f"tags.trial_key = '{key}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _experiment(self, name: str) -> str:
        if name not in self._experiments:
            self._experiments[name] = claimed_experiment(self._mlflow, self._uri, name, self._owner)
        return self._experiments[name]

    def _is_refusal(self, error: Exception) -> bool:
        """MLflow's own word. A proxy in front of it says "bad request" too, but as plain text."""
        own_word = type(error).__name__ == "RestException" or not self._uri.startswith("http")
        return own_word and getattr(error, "error_code", "") in REFUSALS


def _together(records: Sequence[Record]) -> list[list[Record]]:
    """In order: what is logged of a run with nothing else of it in between, as far as it fits in one batch, and
    everything else by itself."""
    groups: list[list[Record]] = []
    growing: dict[str, list[Record]] = {}
    for record in records:
        group = growing.get(record["key"], [])
        if record["do"] == "log" and group and sum(map(_size, [*group, record])) <= PER_BATCH:
            group.append(record)
            continue
        groups.append([record])
        growing[record["key"]] = groups[-1] if record["do"] == "log" else []
    return groups


def _size(record: Record) -> int:
    return sum(len(record.get(part, ())) for part in ("metrics", "params", "tags"))

"""How MLflow is told: records wait in a queue, and one thread applies them in order.

Tracking must never cost a trial. Ray's own callback logs each metric with a request of its own on the thread that
drives every trial (1.8 s per report of 40 metrics), aborts the whole sweep when a trial fails in its set-up, opens a
second run for each trial on resume, and leaves runs RUNNING after Ctrl-C. So here a `Tracker` only turns what happened
into records, and the one thread of a `Delivery` applies them in order, one `log_batch` per report. A record that MLflow
refuses, rather than misses, would block those behind it for good: it is dropped, with a warning.

Telling twice has no effect: a run is looked up by its tag `trial_key` before it is created, MLflow ignores a metric
that it has at the same step, time and value, files are overwritten, and traces have ids of ours.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from search import completions, logged_model
from search.mlflow_client import Owner, claimed_experiment, client
from search.secrets import strip_password

log = logging.getLogger(__name__)

METRICS_PER_BATCH = 800  # MLflow takes 1000 of metrics, params and tags together
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}
BESIDE = {"file", "traces"}
"""Records for which later ones do not wait: artifacts may live elsewhere than the rest."""
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
                records = list(self._queue)
            last = self._closing.is_set()
            left, trouble = self._send(records, self._note_delivery)
            with self._changed:
                self._queue[: len(records)] = left
                if last and (left or not self._queue):
                    return
            if not left:
                pause = 0.0
                continue
            if not pause:
                log.warning("%s does not take records: %s; they are told again later", self._receiver, trouble)
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
        for index, record in enumerate(records):
            if record["do"] in ("file", "told") and left:
                left.append(record)
                continue
            try:
                self._apply(record)
                note_delivery()
            except Exception as error:  # the network, the server, its database and its disk can fail in any way
                reason = strip_password(f"{type(error).__name__}: {error}".splitlines()[0])
                if record["do"] == "traces" and completions.no_traces_here(error):
                    log.warning("MLflow there takes no traces; completions lie in samples.json of each run: %s", reason)
                    self._traces = False
                    continue
                if self._is_refusal(error):
                    log.warning("MLflow refuses a record of %s: %s", record["key"], reason)
                    continue
                trouble = reason
                if record["do"] not in BESIDE:
                    return left + list(records[index:]), trouble
                left.append(record)
        return left, trouble

    def _apply(self, record: Record) -> None:
        if self._mlflow is None:
            self._mlflow = client(self._uri)
        from mlflow.entities import Metric, Param, RunTag

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
            case "open" | "log" | "told" as what:
                if what == "open":
                    mlflow.update_run(run_id, status="RUNNING")
                numbers: Mapping[str, float] = record.get("metrics", {})
                metrics = [Metric(name, value, record["time"], record["step"]) for name, value in numbers.items()]
                params = [Param(*item) for item in record.get("params", {}).items()]
                tags = [RunTag(*item) for item in record.get("tags", {}).items()]
                for start in range(METRICS_PER_BATCH, len(metrics), METRICS_PER_BATCH):
                    mlflow.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])
                few = metrics[:METRICS_PER_BATCH]
                mlflow.log_batch(run_id, metrics=few, params=params, tags=tags)  # it splits params into hundreds

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

"""MLflow is told everything and asked nothing, but for one thing: which trials it lacks.

What a sweep is lies in its folder (`search/arms.py`); MLflow is a place to look at it. So whatever MLflow has not
heard, because its server was down or a driver was killed, is told again from the folder by the next resume
(`search/mirror.py`), and no queue of ours needs to outlive its process. Telling twice has no effect: a run is looked up
by its tag `trial_key` before it is created, MLflow ignores a metric that it has at the same step, time and value, and
files are overwritten.

Tracking must never cost a trial. Ray's own callback logs each metric with a request of its own on the thread that
drives every trial (1.8 s per report of 40 metrics), aborts the whole sweep when a trial fails in its set-up, opens a
second run for each trial on resume, and leaves runs RUNNING after Ctrl-C. So here a `Tracker` only turns what happened
into records, and the one thread of a `Delivery` applies them in order, one `log_batch` per report. A record that MLflow
refuses, rather than misses, would block those behind it for good: it is dropped, with a warning.

A run that is closed and has been told whole, files included, says so in its tag `told`: where the trial stood then. By
it the next start finds what MLflow lacks. Steps that a trial makes again from its checkpoint are told once, the first
time.

A run's tag `status` is the trial's (`running`, then `completed | collapsed | stopped | failed`); MLflow's own status is
FINISHED, KILLED for a collapse or what was stopped, FAILED. Non-finite metrics are kept: NaN as NaN, an infinity as the
largest float (SQL has none), and the tag `nonfinite/<metric>` holds the first step of either.

Left out: nested runs (MLflow's table shows only the parent), traces, the model registry. mlflow is imported at first
use.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from search.arms import Arm, trial_config, trial_folder
from search.mlflow_client import Owner, absolute_uri, claim, claimed_experiment, client, one_line, refuse_other_owner
from search.secrets import strip_password
from search.store import StudyConfig, new_id
from spaces.config import ConfigError
from spaces.reading import as_tree, dump_yaml, flatten
from trainable import pass_at_k
from trainable.disk.trial_folder import TrialState, read_reports, read_trial
from trainable.metrics import EVAL, SCAN, STEP_SECONDS, STEPS_DONE, TRIAL_SECONDS
from trainable.outcome import Outcome, Sample, Status, StepReport

if TYPE_CHECKING:
    from trainable.scan import Scan

log = logging.getLogger(__name__)

RUN_STATUS: dict[Status, str] = {
    "completed": "FINISHED",
    "collapsed": "KILLED",
    "stopped": "KILLED",
    "failed": "FAILED",
}
TOLD_TAG = "told"
DOCUMENTS, SCANS = "documents", "srdd"
"""Status of a run that is no trial: of a programme's documents, which is its name too, and of a scan."""
LONGEST_PARAM = 6000  # characters, MLflow's limit
RUNS_PER_PAGE = 1000
METRICS_PER_BATCH = 800  # MLflow takes 1000 of metrics, params and tags together
SAMPLE_COLUMNS = ("step", "prompt", "completion", "answer", "reward")
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}
LONGEST_PAUSE = 30.0  # seconds between two attempts
CLOSE_SECONDS = 30.0  # `close` waits this long for the next record to be delivered

Record = dict[str, Any]
Send = Callable[[Sequence[Record], Callable[[], None]], tuple[list[Record], str]]
"""Delivers records, calling its second argument after each; returns those that it could not deliver, in order, and why.
"""


# --- what is told -----------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Run:
    """What has been said of a trial so far, by this process or by one before it."""

    status: Status = "waiting"
    steps: int = 0
    """Steps that MLflow has heard of."""
    rule: str = ""
    nonfinite: set[str] = field(default_factory=set)

    def news(self, report: StepReport) -> dict[str, str]:
        """Tags for what a step showed for the first time."""
        broken = {name for name, value in _metrics(report).items() if not math.isfinite(value)} - self.nonfinite
        self.nonfinite |= broken
        tags = {f"nonfinite/{name}": str(report.step) for name in sorted(broken)}
        verdict = report.verdict
        if verdict.rule and not self.rule:  # in monitor mode a rule speaks and the trial goes on: the first word counts
            self.rule = verdict.rule
            tags |= {"collapse/rule": verdict.rule, "collapse/step": str(report.step)}
            tags["collapse/evidence"] = verdict.evidence
        return tags


class Tracker:
    """Tells MLflow of the trials of one sweep: one flat run per trial, whoever runs it and however often it is
    started."""

    def __init__(self, study: StudyConfig) -> None:
        self._study = study
        writer = MlflowWriter(absolute_uri(study.tracking_uri), study.owner)
        self._delivery = Delivery(writer.send, f"tracking at {strip_password(study.tracking_uri)}")
        self._runs: dict[tuple[str, int], _Run] = {}

    def heard_before(self, arm: Arm, replicate: int, heard: "Heard") -> None:
        """MLflow knows this trial from a process before this one."""
        self._runs[arm.name, replicate] = run = _Run(steps=heard.steps)
        for report in read_reports(trial_folder(self._study, arm.name, replicate)):
            if report.step < run.steps:
                run.news(report)

    def begin(self, arm: Arm, number: int, replicate: int) -> None:
        """A process starts to work on it: for the first time, after a retry or a resume. `number` is the arm's."""
        config = as_tree(trial_config(self._study, arm, replicate))
        self._runs.setdefault((arm.name, replicate), _Run()).status = "running"
        attempts = read_trial(trial_folder(self._study, arm.name, replicate), driven=True).attempts
        tags = {"sweep": self._study.name, "arm": arm.name, "replicate": str(replicate), "status": "running"}
        tags |= {"origin": arm.origin, "arm_number": str(number)}
        since = _ms(attempts[0].started if attempts else None)
        self._put(arm, replicate, do="open", name=f"{arm.name}/{replicate}", tags=tags, time=since)
        params = {name: _param(value) for name, value in flatten(config).items()}
        self._put(arm, replicate, do="log", params=params)
        self._put(arm, replicate, do="file", path="config.yaml", text=dump_yaml(config))

    def report(self, arm: Arm, replicate: int, report: StepReport) -> None:
        """A step was made. One that is made again, from a checkpoint, is told once."""
        run = self._runs[arm.name, replicate]
        if report.step < run.steps:
            return
        run.steps = report.step + 1
        metrics, tags, when = _metrics(report), run.news(report), report.time_ms
        # At its own time: MLflow then knows it when it comes twice.
        self._put(arm, replicate, do="log", step=report.step, metrics=metrics, tags=tags, time=when)

    def retry(self, arm: Arm, replicate: int, failures: int, error: str) -> None:
        """It failed, and will be tried again from its checkpoint."""
        self._put(arm, replicate, do="log", tags={"retries": str(failures), "error": error})

    def end(self, arm: Arm, replicate: int) -> None:
        """Nobody works on it any more: what its folder says of its end."""
        folder = trial_folder(self._study, arm.name, replicate)
        state, reports = read_trial(folder, driven=False), read_reports(folder)
        for report in reports:  # a trial that is stopped makes a step of which Tune does not hear
            self.report(arm, replicate, report)
        status: Status = "stopped" if state.status == "waiting" else state.status
        self._runs[arm.name, replicate].status = status
        when = _ms(state.attempts[-1].seen if state.attempts else None)
        if state.outcome is not None:
            step = max(state.outcome.step - 1, 0)
            at = reports[-1].time_ms if reports and reports[-1].step == step else when
            self._put(arm, replicate, do="log", step=step, time=at, metrics=_scores(state.outcome))
        files = {} if state.outcome is None else _outcome_files(state.outcome)
        tags = {"status": status, **_reason(state)}
        samples = [sample for report in reports for sample in report.samples]
        if samples:
            files["samples.json"] = _table(samples)
            tags["mlflow.loggedArtifacts"] = as_json([{"path": "samples.json", "type": "table"}])
        for path, text in files.items():
            self._put(arm, replicate, do="file", path=path, text=text)
        self._put(arm, replicate, do="log", tags=tags)
        self._put(arm, replicate, do="end", status=RUN_STATUS[status], time=when)
        self._put(arm, replicate, do="told", tags={TOLD_TAG: standing(state)})

    def open(self) -> list[tuple[str, int]]:
        """(arm, replicate) of every trial that was begun and not ended."""
        return [key for key, run in self._runs.items() if run.status == "running"]

    def close(self) -> int:
        """Deliver what is left, as far as MLflow takes it; how many records it did not take."""
        return self._delivery.close()

    def _put(self, arm: Arm, replicate: int, **record: Any) -> None:
        key = trial_key(self._study.name, arm.name, replicate)
        self._delivery.put({"experiment": self._study.name, "key": key, "time": _ms(None), **record})


def trial_key(sweep: str, arm: str, replicate: int) -> str:
    """By which a run is found again; safe in MLflow's filter language."""
    return quote(f"{sweep}/{arm}/{replicate}", safe="/")


def standing(state: TrialState) -> str:
    """Where a trial stands that nobody works on, in a word that no later standing of it has again."""
    status = "stopped" if state.status == "waiting" else state.status
    return f"{status} after {state.step} steps, attempt {len(state.attempts)}"


def _metrics(report: StepReport) -> dict[str, float]:
    return {STEP_SECONDS: report.seconds, **report.signals, STEPS_DONE: float(report.step + 1)}


def _ms(seconds: float | None) -> int:
    return time.time_ns() // 1_000_000 if seconds is None else int(1000 * seconds)


def _scores(outcome: Outcome) -> dict[str, float]:
    numbers = {f"{EVAL}{name}": value for name, value in asdict(outcome.eval).items() if isinstance(value, int | float)}
    sampled = pass_at_k.metrics(outcome.eval.right, outcome.config.eval.samples)
    return {**numbers, **sampled, TRIAL_SECONDS: outcome.seconds}


def _reason(state: TrialState) -> dict[str, str]:
    """Empty once a trial that failed has ended well."""
    failed = state.status == "failed"
    return {"error": state.reason if failed else "", "failure/rule": state.rule if failed else ""}


def _outcome_files(outcome: Outcome) -> dict[str, str]:
    """What ran, what it did to its weights, which questions it answered, and in how many of its samples."""
    sampled = {"right.json": as_json(outcome.eval.right)} if outcome.eval.right else {}
    return {
        "config.yaml": dump_yaml(as_tree(outcome.config)),  # as it ran: with the thread count that was in force
        "receipt.json": as_json(outcome.receipt.as_tree()),
        "correct.json": as_json(outcome.eval.correct),
        **sampled,
    }


def _param(value: Any) -> str:
    text = value if isinstance(value, str) else as_json(value)
    mark = f"... ({len(text)} characters)"
    return text if len(text) <= LONGEST_PARAM else text[: LONGEST_PARAM - len(mark)] + mark


def _table(samples: Sequence[Sample]) -> str:
    """What MLflow's log_table writes; that one reads and uploads the whole table again at each call, and appends when
    retried."""
    cells = [[getattr(sample, column) for column in SAMPLE_COLUMNS] for sample in samples]
    strict = [[str(c) if isinstance(c, float) and not math.isfinite(c) else c for c in row] for row in cells]
    return as_json({"columns": SAMPLE_COLUMNS, "data": strict})


def as_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


# --- documents --------------------------------------------------------------------------------------------------------


def tell_documents(study: StudyConfig, files: Mapping[str, str]) -> None:
    """As artifacts of one run of the experiment, over those that it had before. Raises ConfigError."""
    _tell_run(study, DOCUMENTS, DOCUMENTS, files)


def tell_scan(study: StudyConfig, title: str, scan: "Scan", files: Mapping[str, str]) -> None:
    """As a run of its own, which another scan leaves as it is: every score that each layer has as a metric over layers,
    the rest as artifacts. Raises ConfigError."""
    from trainable.scan import SCORES, SITES, score  # numpy: a sweep is tracked without

    layers: list[dict[str, float]] = [{} for _ in scan.layers]
    kinds = [f"{kind}@{site}" if part == "sites" else kind for kind, (part, *_) in SCORES.items() for site in SITES]
    for kind in dict.fromkeys(kinds):
        with suppress(ConfigError):  # not of every layer, or not asked for: the JSON says why
            for layer, value in zip(layers, score(scan, kind), strict=True):
                layer[f"{SCAN}{kind.replace('@', '/')}"] = value
    steps = [{"do": "log", "step": one.layer, "metrics": found} for one, found in zip(scan.layers, layers, strict=True)]
    _tell_run(study, f"{SCANS}-{new_id()}", SCANS, files, title, steps)


def _tell_run(
    study: StudyConfig,
    key: str,
    status: str,
    files: Mapping[str, str],
    title: str = "",
    records: Sequence[Mapping[str, Any]] = (),
) -> None:
    """A run that is no trial, whole. Raises ConfigError."""
    claim(study.tracking_uri, study.name, study.owner)
    record = {"experiment": study.name, "key": trial_key(study.name, key, 0), "time": _ms(None)}
    told = [{**record, "do": "open", "name": title or status, "tags": {"sweep": study.name, "status": status}}]
    told += [{**record, **one} for one in records]
    told += [{**record, "do": "file", "path": path, "text": text} for path, text in files.items()]
    told.append({**record, "do": "end", "status": "FINISHED"})
    left, trouble = MlflowWriter(absolute_uri(study.tracking_uri), study.owner).send(told, lambda: None)
    if left:
        raise ConfigError(
            f"tracking {strip_password(study.tracking_uri)}: did not take {title or f'the {status}'}: {trouble}; "
            "start the server there, or give another --tracking-uri"
        )


# --- the one question -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What MLflow has heard of a trial."""

    standing: str
    """When it was last told all of it, files included; empty before that, and while its run is open."""
    steps: int


def known_trials(uri: str, experiment: str, owner: Owner) -> dict[str, Heard]:
    """By trial key.

    Raises ConfigError when it cannot be asked, and for an experiment of another sweep.
    """
    with one_line(uri, f"cannot read experiment {experiment}"):
        mlflow = client(uri)
        found = mlflow.get_experiment_by_name(experiment)
        if found is not None:
            refuse_other_owner(found, uri, owner)
        runs: list[Any] = []
        token = None
        while found is not None and (token is None or token):
            page = mlflow.search_runs([found.experiment_id], "", 1, RUNS_PER_PAGE, None, token)
            runs, token = runs + list(page), page.token or ""
    return {run.data.tags["trial_key"]: _heard(run) for run in runs if "trial_key" in run.data.tags}


def _heard(run: Any) -> Heard:
    closed = run.info.status != "RUNNING"
    steps = int(run.data.metrics.get(STEPS_DONE, 0))
    return Heard(standing=run.data.tags.get(TOLD_TAG, "") if closed else "", steps=steps)


# --- how it is told ---------------------------------------------------------------------------------------------------


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
    4.1}} `do` is `open` (name, tags), `log` (step and metrics, params, tags), `file` (path, text), `end` (status) or
    `told` (tags), which waits for the files before it; `time` is Unix ms.
    """

    def __init__(self, uri: str, owner: Owner) -> None:
        self._uri, self._owner = uri, owner
        self._mlflow: Any = None
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, str] = {}

    def send(self, records: Sequence[Record], note_delivery: Callable[[], None]) -> tuple[list[Record], str]:
        """What could not be delivered, and why. Stops at the first record that fails, except for files: artifacts may
        live elsewhere than the rest, and metrics should not wait for them.
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
                if self._is_refusal(error):
                    log.warning("MLflow refuses a record of %s: %s", record["key"], reason)
                    continue
                trouble = reason
                if record["do"] != "file":
                    return left + list(records[index:]), trouble
                left.append(record)
        return left, trouble

    def _apply(self, record: Record) -> None:
        if self._mlflow is None:
            self._mlflow = client(self._uri)
        from mlflow.entities import Metric, Param, RunTag

        mlflow, run_id = self._mlflow, self._run_id(record)
        match record["do"]:
            case "file":
                mlflow.log_text(run_id, record["text"], record["path"])
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
        if experiment not in self._experiments:
            self._experiments[experiment] = claimed_experiment(self._mlflow, self._uri, experiment, self._owner)
        number = self._experiments[experiment]
        found = self._mlflow.search_runs([number], filter_string=f"tags.trial_key = '{key}'", max_results=1)
        if not found:
            tags = {"trial_key": key, **record.get("tags", {})}
            found = [self._mlflow.create_run(number, start_time=record["time"], tags=tags, run_name=record.get("name"))]
        self._runs[key] = found[0].info.run_id
        return self._runs[key]

    def _is_refusal(self, error: Exception) -> bool:
        """MLflow's own word. A proxy in front of it says "bad request" too, but as plain text."""
        own_word = type(error).__name__ == "RestException" or not self._uri.startswith("http")
        return own_word and getattr(error, "error_code", "") in REFUSALS

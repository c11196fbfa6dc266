"""MLflow, both ends: the Tune callback that writes one run per trial, and the functions that read runs back as records.

Tracking must never cost a trial. Ray's own callback logs each metric with a request of its own on the thread that drives every
trial (1.8 s per report of 40 metrics), aborts the whole sweep when a trial fails in its set-up, opens a second run for each trial
on resume, and leaves runs RUNNING after Ctrl-C. So here the callback only turns what happened into records (plain JSON), and the
one thread of a `Spool` applies them to MLflow in order, one `log_batch` per report; what cannot be delivered stays in its file.
Delivery is at least once and every record is idempotent (a run is looked up by its tag `trial_key` before it is created, MLflow
ignores a metric it has at the same step, time and value, files are overwritten), so the effect is exactly once. A record that
MLflow refuses, rather than misses, would block those behind it for good: it is moved to `mlflow-refused.jsonl`, with a warning.

A run's tag `status` is the trial's outcome (`running`, then `completed | collapsed | stopped | failed`); MLflow's own status is
FINISHED, KILLED for a collapse or an interrupted sweep, FAILED. Non-finite metrics are kept: NaN as NaN, an infinity as the
largest float (SQL has none; the readers turn it back), and the tag `nonfinite/<metric>` holds the first step of either.

Left out: nested runs (MLflow's table shows only the parent), traces, the model registry. mlflow takes 1.5 s to import and ray.tune
2 s, and `rin list` needs neither to start: mlflow is imported at first use (`mlflow_client.client`), and the callback answers Tune's
methods without being a subclass (Tune does not ask; a test compares the names).
"""

import json
import logging
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.parse import quote

from search.mlflow_client import absolute_uri, client, experiment_id, one_line
from search.secrets import strip_password
from search.spool import Record, Spool, as_json, deliver
from search.trials import read_failure
from spaces.config import ConfigError
from spaces.reading import dump_yaml, flatten, parse_yaml
from trainable.folder import Folder

log = logging.getLogger(__name__)

RUN_STATUS = {"completed": "FINISHED", "stopped": "FINISHED", "collapsed": "KILLED", "failed": "FAILED"}
LONGEST_PARAM = 6000  # characters, MLflow's limit
RUNS_PER_PAGE = 1000
SPOOL = "mlflow-spool.jsonl"
SAMPLE_COLUMNS = ("step", "prompt", "completion", "answer", "reward")
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}


# Writing: records, their way to MLflow, the callback


class _Backend:
    """Applies records to MLflow; each is safe to apply twice.

    Example: {"do": "log", "experiment": "e13", "key": "e13/c03/0", "time": 1760000000000, "step": 3, "metrics": {"eval/n":
    64}} `do` is `open` (name, tags), `log` (step and metrics, params, tags), `file` (path, text) or `end` (status); `time` is
    Unix ms.
    """

    def __init__(self, uri: str, folder: Path, create: bool = True) -> None:
        self._uri, self._refused, self._create = uri, folder / "mlflow-refused.jsonl", create
        self._mlflow: Any = None
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, str] = {}

    def send(self, records: Sequence[Record], note_delivery: Callable[[], None]) -> tuple[list[Record], str]:
        """What could not be delivered, and why. Stops at the first record that fails, except for files: artifacts may live
        elsewhere than the rest, and metrics should not wait for them.
        """
        left: list[Record] = []
        trouble = ""
        for index, record in enumerate(records):
            if record["do"] == "file" and left:
                left.append(record)
                continue
            try:
                self._apply(record)
                note_delivery()
            except Exception as error:  # the network, the server, its database and its disk can fail in any way; training goes on
                reason = strip_password(f"{type(error).__name__}: {error}".splitlines()[0])
                if self._is_refusal(error):
                    self._refuse(record, reason)
                    continue
                trouble = reason
                if record["do"] != "file":
                    return left + list(records[index:]), trouble
                left.append(record)
        return left, trouble

    def _apply(self, record: Record) -> None:
        if self._mlflow is None:
            self._mlflow = client(self._uri, create=self._create)
        from mlflow.entities import Metric, Param, RunTag

        mlflow, run_id = self._mlflow, self._run_id(record)
        match record["do"]:
            case "open":
                mlflow.update_run(run_id, status="RUNNING")
                mlflow.log_batch(run_id, tags=[RunTag(*item) for item in record["tags"].items()])
            case "log":
                metrics = [Metric(name, value, record["time"], record["step"]) for name, value in record.get("metrics", {}).items()]
                params = [Param(*item) for item in record.get("params", {}).items()]
                tags = [RunTag(*item) for item in record.get("tags", {}).items()]
                mlflow.log_batch(run_id, metrics=metrics, params=params, tags=tags)  # the client splits params into hundreds
            case "file":
                mlflow.log_text(run_id, record["text"], record["path"])
            case "end":
                mlflow.set_terminated(run_id, record["status"], record["time"])

    def _run_id(self, record: Record) -> str:
        """The run of this trial: known, found by its tag (opened before a restart or a crash), or new."""
        key, experiment = record["key"], record["experiment"]
        if key in self._runs:
            return self._runs[key]
        if experiment not in self._experiments:
            self._experiments[experiment] = experiment_id(self._mlflow, self._uri, experiment)
        number = self._experiments[experiment]
        found = self._mlflow.search_runs([number], filter_string=f"tags.trial_key = '{key}'", max_results=1)
        if found:
            run = found[0]
        else:
            tags = {"trial_key": key, **record.get("tags", {})}
            run = self._mlflow.create_run(number, start_time=record["time"], tags=tags, run_name=record.get("name"))
        self._runs[key] = run.info.run_id
        return self._runs[key]

    def _is_refusal(self, error: Exception) -> bool:
        """MLflow's own word. A proxy in front of it says "bad request" too, but as plain text."""
        own_word = type(error).__name__ == "RestException" or not self._uri.startswith("http")
        return own_word and getattr(error, "error_code", "") in REFUSALS

    def _refuse(self, record: Record, reason: str) -> None:
        if not self._refused.exists():
            log.warning("MLflow refuses a record: %s; it and any that follow are kept in %s", reason, self._refused)
        with self._refused.open("a", encoding="utf-8") as file:
            file.write(as_json({"reason": reason, "record": record}) + "\n")


@dataclass(slots=True, kw_only=True)
class _OpenRun:
    key: str
    samples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    nonfinite: list[str] = field(default_factory=list)
    rule: str = ""


_LIVE: dict[str, "MLflowCallback"] = {}


def _live_callback(sweep: str) -> "MLflowCallback":
    if sweep not in _LIVE:
        raise ConfigError(f"sweep {sweep}: its MLflowCallback belongs to the process that made it; make a new one")
    return _LIVE[sweep]


def deliver_spool(folder: Path, uri: str) -> int:
    """Deliver what an earlier process could not; how many records are still undelivered.

    Makes no database: `uri` may be what a study.json of somebody else says, and a look at a sweep writes nowhere else.
    """
    return deliver(folder / SPOOL, _Backend(uri, folder, create=False).send, f"tracking at {strip_password(uri)}")


class MLflowCallback:
    """Writes one flat run per trial. Give it to Tune's RunConfig and call `close` in a `finally`.

    A run belongs to (sweep, arm, replicate): a trial that is started again, by a retry or by another driver, goes on in its run. Tune
    pickles its callbacks into the store; this one pickles as the name of its sweep, not as a tracking URI with a password in it.
    """

    def __init__(self, *, uri: str, experiment: str, sweep: str, spool: Path) -> None:
        self._experiment, self._sweep = experiment, sweep
        self._spool = Spool(spool / SPOOL, _Backend(absolute_uri(uri), spool).send, f"tracking at {strip_password(uri)}")
        self._open: dict[str, _OpenRun] = {}
        self._ended: set[str] = set()
        self._unheard: dict[str, str] = {}
        self._failed: set[str] = set()
        _LIVE[sweep] = self

    def __reduce__(self) -> Any:
        return _live_callback, (self._sweep,)

    def setup(self, **info: Any) -> None:
        """Before the first trial. Raises ConfigError when another process writes this sweep."""
        self._spool.start()

    def on_trial_start(self, *, trial: Any, **info: Any) -> None:
        """Also after a retry and after a resume: the run is then found by its key and is RUNNING again."""
        setting = trial.config
        arm, replicate = str(setting["arm"]), str(setting["replicate"])
        name = _name(trial)
        key = quote(f"{self._sweep}/{name}", safe="/")
        self._ended.discard(name)
        self._open.setdefault(name, _OpenRun(key=key))
        tags = {"sweep": self._sweep, "arm": arm, "replicate": replicate, "status": "running"}
        tags |= {"origin": str(setting["origin"]), "arm_number": str(setting["number"])}
        self._put(key, do="open", name=name, tags=tags)
        self._put(key, do="log", params={name: _param(value) for name, value in flatten(setting["config"]).items()})
        self._put(key, do="file", path="config.yaml", text=dump_yaml(setting["config"]))

    def on_trial_result(self, *, trial: Any, result: Mapping[str, Any], **info: Any) -> None:
        """Tune brings the last result here too, `done` set, before on_trial_complete."""
        run = self._run_of(trial)
        step, outcome = int(result.get("step", 0)), result.get("outcome") or {}
        named = {f"eval/{name}": value for name, value in (outcome.get("eval") or {}).items()}
        named |= {"perf/step_seconds": result.get("seconds"), "perf/trial_seconds": outcome.get("seconds")}
        named |= {name: value for name, value in result.items() if "/" in name}
        metrics = {name: float(value) for name, value in named.items() if isinstance(value, Real)}
        tags = {f"nonfinite/{name}": str(step) for name, value in metrics.items() if not math.isfinite(value) and name not in run.nonfinite}
        run.nonfinite += [name.removeprefix("nonfinite/") for name in tags]
        rule = result.get("rule") or outcome.get("rule") or ""
        if rule and not run.rule:  # in monitor mode a rule speaks and the trial goes on: the first word counts
            run.rule = rule
            tags |= {"collapse/rule": rule, "collapse/step": str(step), "collapse/evidence": str(result.get("evidence", ""))}
        when = {"time": int(result["time_ms"])} if "time_ms" in result else {}  # its own: MLflow then knows it when it comes twice
        self._put(run.key, do="log", step=step, metrics=metrics, tags=tags, **when)
        if result.get("samples"):
            run.samples[step] = list(result["samples"])
        if outcome:
            self._end(_name(trial), outcome["outcome"], outcome=outcome)

    def on_trial_complete(self, *, trial: Any, **info: Any) -> None:
        """A run that is still open here was stopped from outside: by the scheduler, a stopper or the budget."""
        if _name(trial) in self._open:
            self._end(_name(trial), "stopped")

    def on_trial_recover(self, *, trial: Any, **info: Any) -> None:
        """Failed, and will be tried again from its checkpoint."""
        self._put(self._run_of(trial).key, do="log", tags={"retries": str(trial.num_failures), "error": _last_line(trial)})

    def on_trial_error(self, *, trial: Any, **info: Any) -> None:
        """Tune comes here without on_trial_start when the set-up fails."""
        if _name(trial) not in self._ended:  # else the result is in and something failed after it: the result counts
            self._run_of(trial)
            rule, reason = read_failure(Folder(trial.config["folder"]))
            self._end(_name(trial), "failed", error=reason or _last_line(trial), rule=rule)

    def on_experiment_end(self, **info: Any) -> None:
        self.close()

    def on_step_begin(self, **info: Any) -> None:
        """Nothing happens here, nor at the four that follow; Tune calls every method of a callback."""

    on_step_end = on_trial_restore = on_trial_save = on_checkpoint = on_step_begin

    def get_state(self) -> dict[str, Any] | None:
        """Tune saves this. Run ids need no saving: a run is found by its key, also when the state is older than the run."""
        return {name: asdict(run) for name, run in self._open.items()} or None

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._open |= {name: _OpenRun(**run) for name, run in state.items()}

    def close(self) -> None:
        """Runs that are still open are `stopped` and KILLED; the last delivery is tried. Safe to call twice."""
        for name in list(self._open):
            self._end(name, "stopped", run_status="KILLED")
        self._spool.close()

    def called_stopped(self, arm: str, replicate: int) -> bool:
        """Whether this trial was closed without an outcome."""
        return f"{arm}/{replicate}" in self._unheard

    def add_outcome(self, arm: str, replicate: int, outcome: Mapping[str, Any]) -> None:
        """The final evaluation of a trial that was stopped from outside: it was made while the trial left, after its last
        report."""
        key = self._unheard.pop(f"{arm}/{replicate}", None)
        if key is None:
            return
        self._spool.start()
        metrics = {f"eval/{name}": float(value) for name, value in outcome["eval"].items() if isinstance(value, Real)}
        self._put(key, do="log", step=int(outcome["step"]), metrics=metrics, tags={})
        for path, text in _outcome_files(outcome).items():
            self._put(key, do="file", path=path, text=text)

    def _run_of(self, trial: Any) -> _OpenRun:
        if _name(trial) not in self._open:
            self.on_trial_start(trial=trial)
        return self._open[_name(trial)]

    def _end(
        self, name: str, status: str, *, run_status: str = "", error: str = "", rule: str = "", outcome: Mapping[str, Any] | None = None
    ) -> None:
        run, outcome = self._open.pop(name), outcome or {}
        self._ended.add(name)
        if status == "stopped" and not outcome:
            self._unheard[name] = run.key
        tags = {"status": status}
        if status == "failed" or name in self._failed:  # empty once a trial that failed has ended well
            tags |= {"error": error, "failure/rule": rule}
            self._failed.add(name)
        files = _outcome_files(outcome)
        if run.samples:
            files["samples.json"] = _table([{"step": step, **row} for step, rows in sorted(run.samples.items()) for row in rows])
            tags["mlflow.loggedArtifacts"] = as_json([{"path": "samples.json", "type": "table"}])
        for path, text in files.items():
            self._put(run.key, do="file", path=path, text=text)
        self._put(run.key, do="log", tags=tags)
        self._put(run.key, do="end", status=run_status or RUN_STATUS[status])

    def _put(self, key: str, **record: Any) -> None:
        self._spool.put({"experiment": self._experiment, "key": key, "time": time.time_ns() // 1_000_000, **record})


def _name(trial: Any) -> str:
    """`c03/0`: what a trial is, whoever runs it and however often it is started."""
    return f"{trial.config['arm']}/{trial.config['replicate']}"


def _outcome_files(outcome: Mapping[str, Any]) -> dict[str, str]:
    """Artifacts of a trial's outcome: what ran, what it did to its weights, which questions it answered."""
    files = {}
    if outcome.get("config"):
        files["config.yaml"] = dump_yaml(outcome["config"])  # as it ran: with the thread count that was in force
    if outcome.get("receipt"):
        files["receipt.json"] = as_json(outcome["receipt"])
    if (outcome.get("eval") or {}).get("correct") is not None:
        files["correct.json"] = as_json(outcome["eval"]["correct"])
    return files


def _param(value: Any) -> str:
    text = value if isinstance(value, str) else as_json(value)
    mark = f"... ({len(text)} characters)"
    return text if len(text) <= LONGEST_PARAM else text[: LONGEST_PARAM - len(mark)] + mark


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What MLflow's log_table writes; that one reads and uploads the whole table again at each call, and appends when retried."""
    cells = [[row.get(column) for column in SAMPLE_COLUMNS] for row in rows]
    cells = [[str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in cells]  # strict JSON
    return as_json({"columns": SAMPLE_COLUMNS, "data": cells})


def _last_line(trial: Any) -> str:
    """The error itself, without its traceback, from the file where Tune keeps it."""
    try:
        text = Path(trial.error_file or "").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[-1] if lines else "unknown"


# Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One run, read back.

    Example: TrialRecord(run_id="5d0c...", arm="c03", replicate=0, origin="searcher", status="collapsed",
    rule="nonfinite", reason="grpo/loss is nan", params={"noise.sigma_start": "0.05"}, metrics={"eval/accuracy": 0.39}, ...)
    """

    run_id: str
    arm: str
    replicate: int
    origin: str
    """`control`, `point` or `searcher`."""
    status: str
    """`running`, `completed`, `collapsed`, `stopped` or `failed`."""
    rule: str
    """The collapse rule that fired ("" if none); with collapse.mode=monitor also on a completed trial. `hang` on a failed one."""
    reason: str
    """Of a failed trial the last line of its error, else what the rule saw ("" if none fired)."""
    params: dict[str, str]
    """The configuration: dotted key -> text."""
    metrics: dict[str, float]
    """Last values; NaN and infinities as they were reported."""
    started: float
    """Unix seconds."""
    ended: float | None
    """Unix seconds; None while it runs."""


def load_study(uri: str, experiment: str) -> tuple[TrialRecord, ...]:
    """Every trial of an experiment: arms as they were handed out, the control first, and their replicates. Raises ConfigError when
    there is no such experiment."""
    with one_line(uri, f"cannot read experiment {experiment}"):
        mlflow = client(uri)
        found = mlflow.get_experiment_by_name(experiment)
        if found is None:
            raise ConfigError(f"tracking {strip_password(uri)}: no experiment {experiment}; give the name of a sweep that `rin list` shows")
        runs: list[Any] = []
        token = None
        while token is None or token:
            page = mlflow.search_runs([found.experiment_id], "", 1, RUNS_PER_PAGE, ["attributes.start_time ASC"], token)
            runs, token = runs + list(page), page.token or ""
    trials = [run for run in runs if "trial_key" in run.data.tags]
    return tuple(_record(run) for run in sorted(trials, key=_place))


def _place(run: Any) -> tuple[int, int]:
    tags = run.data.tags
    return int(tags.get("arm_number", 0)), int(tags.get("replicate", 0))


def _record(run: Any) -> TrialRecord:
    tags = run.data.tags
    running = run.info.status == "RUNNING"
    return TrialRecord(
        run_id=run.info.run_id,
        arm=tags.get("arm", ""),
        replicate=int(tags.get("replicate", 0)),
        origin=tags.get("origin", ""),
        status=tags.get("status", ""),
        rule=tags.get("failure/rule", "") if tags.get("status") == "failed" else tags.get("collapse/rule", ""),
        reason=tags.get("error" if tags.get("status") == "failed" else "collapse/evidence", ""),
        params=dict(run.data.params),
        metrics={name: _number(value) for name, value in run.data.metrics.items()},
        started=run.info.start_time / 1000,
        ended=None if running or run.info.end_time is None else run.info.end_time / 1000,
    )


def _number(value: float) -> float:
    """The largest float stands for an infinity in MLflow's database."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def load_history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) in order; of a step that was repeated after a resume, the last value. NaN and infinities as reported."""
    with one_line(uri, f"cannot read {metric} of run {run_id}"):
        points = client(uri).get_metric_history(run_id, metric)
    return sorted({point.step: _number(point.value) for point in sorted(points, key=lambda point: point.timestamp)}.items())


def load_correct(uri: str, run_id: str) -> list[int]:
    """1 or 0 per question of the evaluation set. Raises ConfigError when the trial did not get as far as its evaluation."""
    return [int(value) for value in json.loads(_read_file(uri, run_id, "correct.json"))]


def load_config(uri: str, run_id: str) -> dict[str, Any]:
    """The tree of a TrialConfig."""
    tree: dict[str, Any] = parse_yaml(_read_file(uri, run_id, "config.yaml"), origin=f"config.yaml of run {run_id}")
    return tree


def _read_file(uri: str, run_id: str, path: str) -> str:
    with one_line(uri, f"cannot read {path} of run {run_id}"), tempfile.TemporaryDirectory() as folder:
        mlflow = client(uri)
        if path not in {artifact.path for artifact in mlflow.list_artifacts(run_id)}:
            raise ConfigError(f"run {run_id} has no {path}; only trials that reached their last step have one")
        return Path(mlflow.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")

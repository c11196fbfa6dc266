"""MLflow is told everything and asked nothing, but for one thing: which trials it lacks.

What a sweep is lies in its folder (`search/arms.py`); MLflow is a place to look at it. So whatever MLflow has not
heard, because its server was down or a driver was killed, is told again from the folder by the next resume
(`search/mirror.py`), and no queue of ours needs to outlive its process. What is told of a trial is in `told.py`, how it
gets there in `delivery.py`; here is when.

A run that is closed and has been told whole, files included, says so in its tag `told`: where the trial stood then. By
it the next start finds what MLflow lacks. Steps that a trial makes again from its checkpoint are told once, the first
time.

A run's tag `status` is the trial's (`running`, then `completed | collapsed | stopped | failed`); MLflow's own status is
FINISHED, KILLED for a collapse or what was stopped, FAILED. Non-finite metrics are kept: NaN as NaN, an infinity as the
largest float (SQL has none), and the tag `nonfinite/<metric>` holds the first step of either.

Left out: nested runs (MLflow's table shows only the parent), the model registry. mlflow is imported at first
use.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from search import completions
from search.arms import Arm, control_for, trial_config, trial_folder
from search.delivery import Delivery, MlflowWriter
from search.mlflow_client import NOTE_TAG, Owner, absolute_uri, claim, client, one_line, refuse_other_owner
from search.secrets import strip_password
from search.store import StudyConfig, new_id
from search.told import (
    LONGEST_TAG,
    RUN_STATUS,
    Beside,
    as_json,
    beside,
    ending_words,
    last_metrics,
    note,
    outcome_files,
    params_of,
    reason_of,
    run_name,
    standing,
    start_metrics,
    step_metrics,
    trial_key,
)
from spaces.config import ConfigError
from spaces.reading import as_tree, dump_yaml
from trainable.disk.trial_folder import ANSWERS_FILE, TrialState, read_outcome, read_reports, read_trial
from trainable.metrics import SCAN, STEPS_DONE
from trainable.outcome import Outcome, Status, StepReport

if TYPE_CHECKING:
    from trainable.scan import Scan

TOLD_TAG = "told"
DOCUMENTS, SCANS, REPORT = "documents", "srdd", "report"
"""Status of a run that is no trial: of a programme's documents and of a sweep's page, which is its name too, and of a
scan."""
RUNS_PER_PAGE = 1000


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
        broken = {name for name, value in step_metrics(report).items() if not math.isfinite(value)} - self.nonfinite
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
        self._arms: dict[str, Arm] = {}
        self._plain: dict[tuple[str, int], Outcome] = {}
        """Of controls that have ended, as far as anybody asked."""
        writer = MlflowWriter(absolute_uri(study.tracking_uri), study.owner)
        self._delivery = Delivery(writer.send, f"tracking at {strip_password(study.tracking_uri)}")
        self._runs: dict[tuple[str, int], _Run] = {}
        self._ended: set[tuple[str, int]] = set()
        """Trials with an outcome, of which MLflow was told all but perhaps what their control came to."""

    def meet(self, arms: Sequence[Arm]) -> None:
        """Those that were written down before; an arm that begins is met by that."""
        self._arms |= {arm.name: arm for arm in arms}

    def told_before(self, arm: Arm, replicate: int) -> None:
        """MLflow knows all of this trial, which is over, from a process before this one."""
        self._ended.add((arm.name, replicate))

    def heard_before(self, arm: Arm, replicate: int, heard: "Heard") -> None:
        """MLflow knows this trial from a process before this one."""
        self._runs[arm.name, replicate] = run = _Run(steps=heard.steps)
        for report in read_reports(trial_folder(self._study, arm.name, replicate)):
            if report.step < run.steps:
                run.news(report)

    def begin(self, arm: Arm, number: int, replicate: int) -> None:
        """A process starts to work on it: for the first time, after a retry or a resume. `number` is the arm's."""
        config = trial_config(self._study, arm, replicate)
        self._arms[arm.name] = arm
        self._runs.setdefault((arm.name, replicate), _Run()).status = "running"
        state = read_trial(trial_folder(self._study, arm.name, replicate), driven=True)
        tags = {"sweep": self._study.name, "arm": arm.name, "replicate": str(replicate), "status": "running"}
        tags |= {"origin": arm.origin, "arm_number": str(number), "mode": config.quant.mode}
        tags |= self._words(arm, replicate, replace(state, status="running", outcome=None))
        since = _ms(state.attempts[0].started if state.attempts else None)
        self._put(arm, replicate, do="open", name=run_name(arm.name, replicate), tags=tags, time=since)
        self._put(arm, replicate, do="log", params=params_of(self._study, config))
        self._put(arm, replicate, do="file", path="config.yaml", text=dump_yaml(as_tree(config)))

    def report(self, arm: Arm, replicate: int, report: StepReport) -> None:
        """A step was made. One that is made again, from a checkpoint, is told once."""
        run = self._runs[arm.name, replicate]
        if report.step < run.steps:
            return
        run.steps = report.step + 1
        metrics, tags, when = step_metrics(report), run.news(report), report.time_ms
        if start := start_metrics(report):
            began = when - round(1000 * report.seconds)
            self._put(arm, replicate, do="log", step=report.step, metrics=start, time=began)
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
        files = {} if state.outcome is None else outcome_files(state.outcome)
        tags = {"status": status, **reason_of(state)}
        if files and (answers := folder.read(ANSWERS_FILE)) is not None:  # of a trial of today's version
            del files["correct.json"]
            files["answers.json"] = answers.decode()
        if any(report.samples for report in reports):
            steps = arm.config.grpo.steps
            files["samples.json"] = completions.table(reports, steps)
            of = {"arm": arm.name, "replicate": str(replicate), "trial": f"{arm.name}/{replicate}"}
            self._put(arm, replicate, do="traces", traces=completions.traces(reports, steps, of))
        for path, text in files.items():
            self._put(arm, replicate, do="file", path=path, text=text)
        tables = [{"path": path, "type": "table"} for path in ("samples.json", "answers.json") if path in files]
        if tables:
            tags["mlflow.loggedArtifacts"] = as_json(tables)
        self._say_ending(arm, replicate, state, reports, tags)
        if state.status in ("completed", "collapsed"):
            self._ended.add((arm.name, replicate))
        for other in self._waiting_for(arm, replicate):
            there = trial_folder(self._study, other.name, replicate)
            self._say_ending(other, replicate, read_trial(there, driven=False), read_reports(there), {})
        self._put(arm, replicate, do="end", status=RUN_STATUS[status], time=_last_seen(state))
        self._put(arm, replicate, do="told", tags={TOLD_TAG: standing(state)})

    def _say_ending(
        self, arm: Arm, replicate: int, state: TrialState, reports: Sequence[StepReport], tags: Mapping[str, str]
    ) -> None:
        """Its numbers, and in words; said again when its control has come to its end, too."""
        config = trial_config(self._study, arm, replicate)
        last = reports[-1] if reports else None
        step = max(state.step - 1, 0)
        at = last.time_ms if last is not None and last.step == step else _last_seen(state)
        metrics = last_metrics(self._study, config, state, last, self._beside(arm, replicate, state))
        words = self._words(arm, replicate, state, reports)
        self._put(arm, replicate, do="log", step=step, time=at, metrics=metrics, tags={**tags, **words})

    def _words(self, arm: Arm, replicate: int, state: TrialState, reports: Sequence[StepReport] = ()) -> dict[str, str]:
        config = trial_config(self._study, arm, replicate)
        said = [report.verdict.evidence for report in reports if report.verdict.rule]
        why = state.reason or (said[-1] if said else "")
        text = note(self._study, arm, config, state, why, self._beside(arm, replicate, state))
        return {"ended": ending_words(state, config.grpo.steps), NOTE_TAG: text}

    def _beside(self, arm: Arm, replicate: int, state: TrialState) -> Beside | None:
        """None where it has no control."""
        control = control_for(arm, list(self._arms.values()))
        if control is None:
            return None
        key = control.name, replicate
        if key not in self._plain and (there := read_outcome(trial_folder(self._study, *key))) is not None:
            self._plain[key] = there
        here = None if state.status == "stopped" else state.outcome
        return beside(self._study, control, replicate, here, self._plain.get(key))

    def _waiting_for(self, control: Arm, replicate: int) -> list[Arm]:
        """Arms whose replicate was told without what this one, its control, came to."""
        arms = list(self._arms.values()) if control.origin == "control" else []
        ended = [arm for arm in arms if (arm.name, replicate) in self._ended]
        return [arm for arm in ended if (found := control_for(arm, arms)) is not None and found.name == control.name]

    def open(self) -> list[tuple[str, int]]:
        """(arm, replicate) of every trial that was begun and not ended."""
        return [key for key, run in self._runs.items() if run.status == "running"]

    def close(self) -> int:
        """Deliver what is left, as far as MLflow takes it; how many records it did not take."""
        return self._delivery.close()

    def _put(self, arm: Arm, replicate: int, **record: Any) -> None:
        for part in ("params", "tags"):  # a reason or an address may hold a password
            if part in record:
                record[part] = {name: strip_password(text)[:LONGEST_TAG] for name, text in record[part].items()}
        key = trial_key(self._study.name, arm.name, replicate)
        self._delivery.put({"experiment": self._study.name, "key": key, "time": _ms(None), **record})


def _last_seen(state: TrialState) -> int:
    return _ms(state.attempts[-1].seen if state.attempts else None)


def _ms(seconds: float | None) -> int:
    return time.time_ns() // 1_000_000 if seconds is None else int(1000 * seconds)


# --- documents --------------------------------------------------------------------------------------------------------


def tell_documents(study: StudyConfig, files: Mapping[str, str]) -> None:
    """As artifacts of one run of the experiment, over those that it had before. Raises ConfigError."""
    _tell_run(study, DOCUMENTS, DOCUMENTS, files)


def tell_page(study: StudyConfig, files: Mapping[str, str], standing: str) -> None:
    """The same of a sweep's page and its pictures. Raises ConfigError."""
    _tell_run(study, REPORT, REPORT, files, standing=standing)


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
    standing: str = "",
) -> None:
    """A run that is no trial, whole. `standing`: of what it was made, where that is asked again. Raises ConfigError."""
    claim(study.tracking_uri, study.name, study.owner)
    record = {"experiment": study.name, "key": trial_key(study.name, key, 0), "time": _ms(None)}
    told = [{**record, "do": "open", "name": title or status, "tags": {"sweep": study.name, "status": status}}]
    told += [{**record, **one} for one in records]
    told += [{**record, "do": "file", "path": path, "text": text} for path, text in files.items()]
    told.append({**record, "do": "end", "status": "FINISHED"})
    told.append({**record, "do": "told", "tags": {TOLD_TAG: standing} if standing else {}})
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

"""What a trial's completions become in MLflow: a table beside the run, and traces that can be filtered and compared.

The table has every completion that the trial kept. Its first column, the name of a completion ("step 02, 1"), is the
same in all arms of a replicate, which are asked the same questions in the same steps: side by side, MLflow's view of
samples shows what each arm answered to one of them.

A trace is one completion: the prompt is its request, the completion its response, reward and correctness its
assessments, which MLflow draws as histograms and compares between runs, question by question; step, sigma, arm,
replicate and trial are tags to filter by. Around a collapse the tag `collapse` says before, at or after. A trace costs
a request and 8 ms, so a trial has at most TRACES of them, as many of each step as fit, and all that were kept of the
steps around a collapse. Its id is a hash of sweep, trial, step and place: telling it again changes nothing.

Left out: spans below the completion; live traces of a trial that has not ended or stopped.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from search.told import as_json
from trainable.outcome import Sample, StepReport

TRACES = 40
"""Of a trial, besides those around its collapse."""
COLUMNS = ("completion_id", "prompt", "completion", "answer", "reward", "sigma", "correct")
SOURCE = "rin-search"
PREVIEW = 1000  # letters, MLflow's limit
PREVIEW = 1000  # letters, MLflow's limit
NO_TRACES_HERE = (404, 405, 501)
"""HTTP status of a server that is older than traces, or keeps runs in files."""

Trace = dict[str, Any]


def completion_id(step: int, place: int, steps: int) -> str:
    """Example: "step 02, 1" of 29 steps: sorted as text, it is in order."""
    return f"step {step:0{max(2, len(str(steps - 1)))}d}, {place + 1}"


def table(reports: Sequence[StepReport], steps: int) -> str:
    """What MLflow's log_table writes; that one reads and uploads the whole table again at each call, and appends when
    retried."""
    rows = [
        [completion_id(report.step, place, steps), *_cells(sample, report.sigma)]
        for report in reports
        for place, sample in enumerate(report.samples)
    ]
    return as_json({"columns": COLUMNS, "data": rows})


def _cells(sample: Sample, sigma: float) -> list[Any]:
    """Strict JSON: browsers refuse NaN."""
    correct = None if sample.correct is None else _yes(sample.correct)
    reward = sample.reward if math.isfinite(sample.reward) else str(sample.reward)
    return [sample.prompt, sample.completion, sample.answer, reward, sigma, correct]


def _yes(correct: bool) -> str:
    return "yes" if correct else "no"


def traces(reports: Sequence[StepReport], steps: int, tags: Mapping[str, str]) -> list[Trace]:
    """In order. `tags`: of the trial, on each."""
    broke = next((report.step for report in reports if report.verdict.rule), None)
    by_step = {report.step: report for report in reports}
    found = []
    for step, place in sorted(_chosen(reports, broke)):
        report = by_step[step]
        sample = report.samples[place]
        own = {"step": str(step), "sigma": f"{report.sigma:.4g}", "reward": f"{sample.reward:.4g}"}
        own |= {} if sample.correct is None else {"correct": _yes(sample.correct)}
        own |= {} if broke is None or step < broke - 1 else {"collapse": _when(step, broke)}
        trace = {"step": step, "place": place, "name": completion_id(step, place, steps), "tags": {**tags, **own}}
        trace |= {"prompt": sample.prompt, "completion": sample.completion, "answer": sample.answer}
        found.append({**trace, "reward": sample.reward, "correct": sample.correct, "time": report.time_ms + place})
    return found


def _when(step: int, broke: int) -> str:
    return "before" if step < broke else "at" if step == broke else "after"


def _chosen(reports: Sequence[StepReport], broke: int | None) -> set[tuple[int, int]]:
    """(step, place) of those that are told: rounds of one completion of each step, while a whole round fits; of more
    steps than fit in one, evenly spaced ones."""
    kept = [[(report.step, place) for place in range(len(report.samples))] for report in reports if report.samples]
    if len(kept) > TRACES:
        kept = [kept[number * (len(kept) - 1) // (TRACES - 1)][:1] for number in range(TRACES)]
    chosen: set[tuple[int, int]] = set()
    for round_ in zip_longest(*kept):
        more = {one for one in round_ if one is not None}
        if len(chosen) + len(more) > TRACES:
            break
        chosen |= more
    if broke is None:
        return chosen
    around = [report for report in reports if abs(report.step - broke) <= 1]
    return chosen | {(report.step, place) for report in around for place in range(len(report.samples))}


# --- how they are told ------------------------------------------------------------------------------------------------


def deliver(uri: str, experiment: str, run_id: str, trial: str, told: Sequence[Trace]) -> None:
    """`trial`: its key, with what tells it from one of that name in another sweep. mlflow is imported already."""
    from mlflow.entities.span import Span
    from mlflow.tracing.client import TracingClient

    client = TracingClient(uri)
    spans = []
    for trace in told:
        name = hashlib.blake2b(f"{trial}/{trace['step']}/{trace['place']}".encode(), digest_size=16).digest()
        client.start_trace(trace_info(f"tr-{name.hex()}", experiment, run_id, trace))
        spans.append(Span.from_dict(_span(name, trace)))
    client.log_spans(experiment, spans)


def trace_info(name: str, experiment: str, run_id: str, trace: Trace) -> Any:
    """As MLflow has it, above its one span."""
    from mlflow.entities import AssessmentSource, Feedback, TraceInfo, TraceLocation, TraceState
    from mlflow.tracing.constant import TraceMetadataKey, TraceTagKey

    source = AssessmentSource(source_type="CODE", source_id=SOURCE)
    marks = []
    for mark in ("reward", "correct"):
        value = trace[mark]
        if value is not None and math.isfinite(value):
            times = {"create_time_ms": trace["time"], "last_update_time_ms": trace["time"]}
            feedback = Feedback(name=mark, value=value, source=source, trace_id=name, **times)
            feedback.assessment_id = f"a-{name.removeprefix('tr-')}-{mark}"
            marks.append(feedback)
    return TraceInfo(
        trace_id=name,
        trace_location=TraceLocation.from_experiment_id(experiment),
        request_time=trace["time"],
        state=TraceState.OK,
        request_preview=_end_of(trace["prompt"]),
        response_preview=trace["completion"][:PREVIEW],
        tags={TraceTagKey.TRACE_NAME: trace["name"], **trace["tags"]},
        trace_metadata={TraceMetadataKey.SOURCE_RUN: run_id},
        assessments=marks,
    )


def _end_of(prompt: str) -> str:
    """Where the question is: prompts begin alike, and MLflow pairs the completions of two runs by what it shows."""
    return prompt if len(prompt) <= PREVIEW else f"…{prompt[1 - PREVIEW :]}"


def _span(name: bytes, trace: Trace) -> dict[str, Any]:
    """As MLflow reads one, ids in base64 and attributes as JSON."""
    from mlflow.tracing.constant import SpanAttributeKey

    attributes = {
        SpanAttributeKey.REQUEST_ID: f"tr-{name.hex()}",
        SpanAttributeKey.INPUTS: trace["prompt"],
        SpanAttributeKey.OUTPUTS: trace["completion"],
        SpanAttributeKey.SPAN_TYPE: "LLM",
        "answer": trace["answer"],
    }
    return {
        "trace_id": base64.b64encode(name).decode(),
        "span_id": base64.b64encode(name[:8]).decode(),
        "parent_span_id": None,
        "name": trace["name"],
        "start_time_unix_nano": 1_000_000 * trace["time"],
        "end_time_unix_nano": 1_000_000 * trace["time"],
        "status": {"code": "STATUS_CODE_OK", "message": ""},
        "attributes": {key: json.dumps(value) for key, value in attributes.items()},
        "events": [],
    }


def no_traces_here(error: Exception) -> bool:
    """Whether MLflow there has no traces at all: they are left out then, and the rest is told."""
    status = getattr(error, "get_http_status_code", int)()
    return isinstance(error, NotImplementedError) or status in NO_TRACES_HERE

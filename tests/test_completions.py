"""Completions in MLflow: which become traces, how they are marked, found and told again. A real sqlite store."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest

from search import completions
from search.completions import TRACES, traces
from search.delivery import MlflowWriter
from search.mlflow_client import Owner, check_tracking, client
from search.store import default_tracking_uri
from trainable.outcome import HEALTHY, CollapseVerdict, Sample, StepReport

OWNER = Owner(id="0" * 32, store="/somewhere")
TAGS = {"arm": "c03", "replicate": "2", "trial": "c03/2"}


def report(step: int, kept: int = 4, rule: str = "", reward: float = 1.0, said: str = "3") -> StepReport:
    sample = {"step": step, "answer": "3", "reward": reward, "correct": reward == 1.0}
    return StepReport(
        step=step,
        sigma=0.01,
        signals={},
        verdict=CollapseVerdict(collapsed=True, rule=rule) if rule else HEALTHY,
        seconds=1.0,
        samples=tuple(Sample(prompt=f"{step}+{n}=", completion=said, **sample) for n in range(kept)),  # type: ignore[arg-type]
        time_ms=1_700_000_000_000 + 1000 * step,
    )


def told(reports: Sequence[StepReport]) -> list[dict[str, Any]]:
    return traces(reports, 29, TAGS)


# Which, and their marks


@pytest.mark.parametrize(
    ("steps", "kept", "expected"),
    [(3, 4, 12), (13, 4, 39), (29, 4, 29), (TRACES, 4, TRACES), (300, 4, TRACES), (5, 0, 0), (0, 0, 0)],
)
def test_a_trial_has_as_many_traces_of_each_step_as_fit(steps: int, kept: int, expected: int) -> None:
    found = told([report(step, kept) for step in range(steps)])
    assert len(found) == expected
    assert [(one["step"], one["place"]) for one in found] == sorted((one["step"], one["place"]) for one in found)
    if found:
        assert (found[0]["step"], found[-1]["step"]) == (0, steps - 1)


def test_around_a_collapse_every_completion_is_told_and_marked() -> None:
    found = told([report(step, rule="entropy_high" if step == 20 else "") for step in range(22)])
    marks = {step: [one["tags"].get("collapse") for one in found if one["step"] == step] for step in range(18, 22)}
    assert marks == {18: [None], 19: ["before"] * 4, 20: ["at"] * 4, 21: ["after"] * 4}


def test_every_step_after_a_rule_that_only_monitors_is_after_its_first_word() -> None:
    found = told([report(step, kept=1, rule="reward_low" if step in (1, 3) else "") for step in range(5)])
    assert [one["tags"].get("collapse") for one in found] == ["before", "at", "after", "after", "after"]


def test_a_reward_that_is_no_number_is_a_tag_and_no_assessment() -> None:
    (one,) = told([report(0, kept=1, reward=math.nan)])
    assert one["tags"]["reward"] == "nan"
    assert [mark.name for mark in completions.trace_info("tr-1", "1", "r", one).assessments] == ["correct"]


def test_a_long_prompt_shows_its_end_where_the_question_is() -> None:
    (one,) = told([report(0, kept=1)])
    shown = completions.trace_info("tr-1", "1", "r", {**one, "prompt": "x" * 2000 + "12+3="}).request_preview
    assert (len(shown), shown[-5:]) == (1000, "12+3=")


# In MLflow


def write(uri: str, reports: Sequence[StepReport], experiment: str = "s", owner: Owner = OWNER) -> None:
    record = {"experiment": experiment, "key": "s/c03/2", "time": 1}
    records = [{**record, "do": "open", "tags": {"arm": "c03"}}, {**record, "do": "traces", "traces": told(reports)}]
    assert MlflowWriter(uri, owner).send(records, lambda: None) == ([], "")


def shown(uri: str, found: str = "", name: str = "s") -> list[Any]:
    mlflow = client(uri)
    experiment = mlflow.get_experiment_by_name(name)
    return sorted(mlflow.search_traces(locations=[experiment.experiment_id], filter_string=found), key=_step)


def _step(trace: Any) -> tuple[int, str]:
    return int(trace.info.tags["step"]), trace.info.tags["mlflow.traceName"]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = default_tracking_uri(str(tmp_path_factory.mktemp("traces")))
    check_tracking(uri, "s", OWNER)
    return uri


@pytest.mark.slow
def test_traces_read_back_as_they_were_and_telling_again_changes_nothing(uri: str) -> None:
    reports = [report(step, kept=2, reward=float(step % 2), rule="gibberish" if step == 2 else "") for step in range(3)]
    write(uri, reports)
    first = shown(uri)
    assert [one.info.tags["mlflow.traceName"] for one in first] == [
        f"step {step:02d}, {place}" for step in range(3) for place in (1, 2)
    ]
    one = first[3]
    assert (one.info.request_preview, one.info.response_preview) == ("1+1=", "3")
    assert (one.data.request, one.data.response) == ('"1+1="', '"3"')
    expected = {"step": "1", "sigma": "0.01", "reward": "1", "correct": "yes", "collapse": "before", **TAGS}
    assert expected.items() <= one.info.tags.items()
    assert {mark.name: mark.value for mark in one.info.assessments} == {"reward": 1.0, "correct": True}
    (run,) = client(uri).search_runs([one.info.experiment_id])
    assert {trace.info.trace_metadata["mlflow.sourceRun"] for trace in first} == {run.info.run_id}
    # filters, as they are typed into MLflow's search
    assert len(shown(uri, "tags.step = '1'")) == 2
    assert len(shown(uri, "tags.collapse = 'at'")) == 2
    assert len(shown(uri, f"request_metadata.`mlflow.sourceRun` = '{run.info.run_id}' AND tags.reward = '0'")) == 4
    write(uri, reports)
    assert [trace.to_dict() for trace in shown(uri)] == [trace.to_dict() for trace in first]
    # a step that was made again, with another completion
    write(uri, [report(step, kept=2, said="7") for step in range(3)])
    assert {(trace.info.response_preview, trace.data.response) for trace in shown(uri)} == {("7", '"7"')}


@pytest.mark.slow
def test_a_sweep_of_the_same_name_has_traces_of_its_own(uri: str) -> None:
    """Ids are one for all experiments of a server."""
    write(uri, [report(0, kept=1)], "older")
    write(uri, [report(0, kept=1, said="other")], "newer", Owner(id="1" * 32, store="/elsewhere"))
    assert [shown(uri, name=name)[0].info.response_preview for name in ("older", "newer")] == ["3", "other"]


@pytest.mark.slow
def test_where_mlflow_takes_no_traces_one_line_says_so_and_the_rest_is_told(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def old_server(*arguments: Any) -> None:
        raise NotImplementedError("http://me:secret@host is older than traces")

    monkeypatch.setattr(completions, "deliver", old_server)
    record = {"experiment": "s", "time": 1}
    records = [
        {**record, "key": f"s/{arm}/0", **what}
        for arm in ("c01", "c02")
        for what in ({"do": "open", "tags": {"arm": arm}}, {"do": "traces", "traces": []}, {"do": "told", "tags": {}})
    ]
    with caplog.at_level(logging.WARNING):
        assert MlflowWriter(uri, OWNER).send(records, lambda: None) == ([], "")
    (line,) = caplog.messages
    assert line.startswith("MLflow there takes no traces")
    assert "secret" not in line


@pytest.mark.slow
def test_traces_that_do_not_arrive_hold_up_no_metric_and_leave_the_trial_untold(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(completions, "deliver", away)
    record = {"experiment": "s", "key": "s/c05/0", "time": 1}
    records: list[dict[str, Any]] = [
        {**record, "do": "open", "tags": {"arm": "c05"}},
        {**record, "do": "traces", "traces": []},
        {**record, "do": "log", "step": 0, "metrics": {"gen/length": 4.0}},
        {**record, "do": "told", "tags": {"told": "completed"}},
    ]
    left, trouble = MlflowWriter(uri, OWNER).send(records, lambda: None)
    assert ([one["do"] for one in left], trouble) == (["traces", "told"], "ConnectionError: gone")

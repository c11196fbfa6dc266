"""Rows for people, asserted as rows; drawing gets one look."""

import io
from typing import Any

import pytest
from rich.console import Console

from dashboards.live import sweep_view
from dashboards.tables import arm_rows, arm_table, describe_noise, duration, points
from search.study import TrialEvent
from search.tracking import TrialRecord
from spaces.points import POINTS
from spaces.reading import as_tree, read_config


def record(arm: str, replicate: int = 0, accuracy: float | None = 0.5, status: str = "completed", **changes: Any) -> TrialRecord:
    metrics = {} if accuracy is None else {"eval/accuracy": accuracy, "eval/accuracy_start": 0.1, "rin/steps_done": 29.0}
    given: dict[str, Any] = {
        "run_id": f"{arm}{replicate}",
        "arm": arm,
        "replicate": replicate,
        "origin": "control" if arm.startswith("control") else "searcher",
        "status": status,
        "rule": "",
        "reason": "",
        "params": {"grpo.filter_groups": "off", "noise.sigma_start": "0.0"},
        "metrics": metrics,
        "started": 100.0,
        "ended": 130.0,
    }
    return TrialRecord(**{**given, **changes})


def test_an_arm_is_the_median_of_its_replicates_against_the_control_with_its_own_filter() -> None:
    resample = {"grpo.filter_groups": "resample", "noise.sigma_start": "0.05", "noise.sigma_end": "0.0005", "noise.modules": '["linear"]'}
    records = [
        *(record("control", k, a) for k, a in enumerate((0.4, 0.5, 0.9))),
        *(record("control-resample", k, a, params=resample | {"noise.sigma_start": "0"}) for k, a in enumerate((0.6, 0.7, 0.8))),
        *(record("c03", k, a, params=resample) for k, a in enumerate((0.71, 0.72, 0.1))),
    ]
    rows = {row.arm: row for row in arm_rows(records)}
    assert rows["control"].accuracy == 0.5
    assert rows["control"].difference is None
    assert rows["c03"].accuracy == 0.71
    assert rows["c03"].difference == pytest.approx(0.01), "against control-resample, not control"
    assert rows["c03"].replicates == 3
    assert rows["c03"].seconds == 90.0


def test_a_control_that_did_not_complete_is_nothing_to_compare_with() -> None:
    rows = arm_rows([record("control", status="collapsed"), record("c01")])
    assert rows[1].difference is None


def test_mixed_endings_rules_and_errors_are_all_named() -> None:
    rows = arm_rows(
        [record("c01", 0, status="collapsed", rule="gibberish"), record("c01", 1), record("c02", 0, None, "failed", reason="Boom")]
    )
    assert rows[0].status == "1 collapsed, 1 completed"
    assert rows[0].rule == "gibberish"
    assert (rows[1].accuracy, rows[1].rule) == (None, "Boom")


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"noise.sigma_start": "0.0"}, "none"),
        ({"noise.sigma_start": "0.05", "noise.sigma_end": "0.0005", "noise.modules": '["rmsnorm"]'}, "rmsnorm 0.05 -> 0.0005"),
        (
            {
                "noise.sigma_start": "0.05",
                "noise.sigma_end": "0.001",
                "noise.modules": '["rmsnorm","linear"]',
                "noise.layers": "middle",
                "quant.weights": "mxfp4",
                "quant.activations": "none",
            },
            "rmsnorm+linear middle 0.05 -> 0.001, mxfp4/none",
        ),
    ],
)
def test_noise_in_a_few_words(params: dict[str, str], said: str) -> None:
    quant = {"quant.weights": "mxfp4", "quant.activations": "mxfp4"}
    assert describe_noise(quant | params) == said


def test_units() -> None:
    assert [points(None), points(0.5), duration(42), duration(210), duration(8280)] == ["-", "50.0 %", "42 s", "3.5 min", "2.3 h"]


def event(status: str, **changes: Any) -> TrialEvent:
    settings = as_tree(read_config(POINTS["e13i-baseline"].settings))
    given: dict[str, Any] = {
        "trial": "c01/0",
        "arm": "c01",
        "replicate": 0,
        "status": status,
        "settings": settings,
        "steps": 29,
        "metrics": {},
    }
    return TrialEvent(**{**given, **changes})


def tell(console: Console) -> None:
    with sweep_view(console, 1) as view:
        view(event("running"))
        view(event("running", step=3, metrics={"grpo/reward": 0.25, "eval/accuracy": 0.375}))
        view(event("collapsed", step=4, metrics={"grpo/reward": 0.0}, rule="filter_rejection"))


def test_outside_a_terminal_each_start_evaluation_and_end_is_one_plain_line() -> None:
    text = io.StringIO()
    tell(Console(file=text, width=200))
    assert text.getvalue().splitlines() == [
        "c01/0: starts, noise linear 0.05 -> 0.0005",
        "c01/0: step 3/29, accuracy 37.5 %",
        "[1/1] c01/0: collapsed after 4 steps, rule filter_rejection, accuracy -",
    ]


def test_in_a_terminal_a_table_shows_the_last_known_numbers() -> None:
    text = io.StringIO()
    tell(Console(file=text, force_terminal=True, width=200))
    last = text.getvalue()[-4000:]
    for said in ("1 of 1 trials ended", "filter_rejection", "4/29", "37.5 %", "linear 0.05 -> 0.0005"):
        assert said in last


def test_the_final_table_is_drawn() -> None:
    text = io.StringIO()
    Console(file=text, width=200).print(arm_table(arm_rows([record("control"), record("c01", accuracy=0.55)]), "sweep x"))
    assert "+5.0" in text.getvalue()

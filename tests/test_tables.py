"""Rows for people, asserted as rows; drawing gets one look."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dashboards.tables import arm_table, duration, points, status_row, steps_text, why
from search.arms import read_arms
from search.report import ArmReport, arm_reports
from spaces.naming import describe_noise
from spaces.reading import read_config
from tests.written_sweeps import attempt, make_arm, outcome, study, write_sweep, write_trial


def rows_of(tmp_path: Path, right: dict[str, list[Any]], replicates: int = 2) -> dict[str, ArmReport]:
    config = study(tmp_path, trials=len(right), replicates=replicates)
    write_sweep(config, [make_arm(config, name) for name in right], right)
    return {row.arm: row for row in arm_reports(config, read_arms(config))}


def test_the_difference_of_a_row_is_the_paired_one(tmp_path: Path) -> None:
    """Unpaired medians would say +20 points."""
    rows = rows_of(tmp_path, {"control": [100, 200, 300], "c01": [180, 140, 280]}, replicates=3)
    assert rows["c01"].difference == pytest.approx((80 - 60 - 20) / 3 / 400)
    assert rows["control"].difference is None


def test_mixed_endings_rules_and_errors_are_all_named(tmp_path: Path) -> None:
    config = study(tmp_path, trials=3, replicates=2)
    arms = [make_arm(config, name) for name in ("control", "c01", "c02")]
    write_sweep(config, arms, {"control": [200, 210], "c01": [("collapsed", 50), 220]})
    hung = attempt(step=3, ended="hang", reason="step 3: phase rollout took over 900 s")
    write_trial(config, arms[2], 0, None, attempts=[hung, attempt(step=3, ended="error", reason="OSError: Boom")])
    rows = {row.arm: row for row in arm_reports(config, read_arms(config))}
    assert (rows["c01"].status, why(rows["c01"])) == ("1 collapsed, 1 completed", "filter_rejection")
    assert (rows["c02"].status, why(rows["c02"])) == ("failed", "OSError: Boom (2 attempts)")
    assert (rows["c02"].accuracy, steps_text(rows["c02"])) == (None, "3")


def test_hours_of_a_trial_that_was_resumed_are_those_in_which_something_ran(tmp_path: Path) -> None:
    """A day lies between the kill and the resume."""
    config = study(tmp_path, trials=1, replicates=1)
    arm = make_arm(config, "control")
    write_sweep(config, [arm], {})
    write_trial(config, arm, 0, outcome(arm, 0, 300), attempts=[attempt(0, 60, ended=""), attempt(86_400, 86_430)])
    (row,) = arm_reports(config, read_arms(config))
    assert sum(trial.hours for trial in row.trials) == pytest.approx(90 / 3600)


def test_a_comparison_that_failed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cell would be a control's."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no root")

    monkeypatch.setattr("search.report.compare_arms", fails)
    rows = rows_of(tmp_path, {"control": [200, 210], "c01": [240, 250]})
    said = "c01 against its control could not be computed (RuntimeError: no root)"
    assert (rows["control"].failed, rows["c01"].failed, status_row(rows["c01"])["failed"]) == ("", said, said)
    console = Console(file=io.StringIO(), width=160)
    console.print(arm_table(list(rows.values()), "s"))
    shown = console.file.getvalue()
    assert said in " ".join(shown.split())
    assert [line.split("│")[8].strip() for line in shown.splitlines() if "│ c01" in line] == ["failed"]


def test_a_status_row_is_plain_data(tmp_path: Path) -> None:
    row = status_row(rows_of(tmp_path, {"control": [200, 210], "c01": [240, 250]})["c01"])
    assert (row["arm"], row["status"], row["step"], row["replicates"], row["candidate"]) == (
        "c01",
        "completed",
        "6",
        2,
        True,
    )
    assert row["difference"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["noise.sigma_start=0"], "none"),
        (["noise.sigma_start=0.05", "noise.sigma_end=0.0005"], "rmsnorm 0.05 -> 0.0005"),
        (
            [
                *("noise.sigma_start=0.05", "noise.sigma_end=0.001", "noise.modules=[rmsnorm,linear]"),
                *("noise.layers=middle", "quant.activations=none"),
            ],
            "rmsnorm+linear middle 0.05 -> 0.001, mxfp4/none",
        ),
        (["noise.sigma_start=0.05", "noise.sigma_end=0.001", "noise.layers=[0,3]"], "rmsnorm [0,3] 0.05 -> 0.001"),
    ],
)
def test_noise_in_a_few_words(overrides: list[str], said: str) -> None:
    assert describe_noise(read_config({}, overrides)) == said


def test_units() -> None:
    assert [points(None), points(0.5), duration(42), duration(210), duration(8280)] == [
        "-",
        "50.0 %",
        "42 s",
        "3.5 min",
        "2.3 h",
    ]


def test_the_final_table_is_drawn(tmp_path: Path) -> None:
    text = io.StringIO()
    rows = rows_of(tmp_path, {"control": [200, 210], "c01": [220, 230], "c02": [100, None]})
    Console(file=text, width=200).print(arm_table(list(rows.values()), "sweep x"))
    for said in ("+5.0", "c01 (candidate)", "1 completed, 1 stopped", "1/2"):
        assert said in text.getvalue()


@pytest.mark.parametrize("width", range(40, 201, 8))
def test_a_narrow_terminal_shows_fewer_columns_and_breaks_no_number(width: int, tmp_path: Path) -> None:
    """At 80 columns each of ten had five characters."""
    rows = list(rows_of(tmp_path, {"control": [200, 210], "c01": [220, 230], "c02": [100, None]}).values())

    def drawn(width: int) -> list[str]:
        text = io.StringIO()
        Console(file=text, width=width).print(arm_table(rows, "sweep x"))
        return text.getvalue().splitlines()

    def numbers(lines: list[str]) -> set[str]:
        return {word for line in lines for word in line.split() if any(map(str.isdigit, word))}

    assert numbers(drawn(width)) <= numbers(drawn(400))
    assert max(map(len, drawn(width))) <= width
    head = next(line for line in drawn(width) if "configuration" in line)
    assert "status" in head
    assert ("accuracy" in head) == (width >= 56)
    assert ("noise" in head) == (width >= 104)


def test_an_accuracy_that_is_not_finite_is_no_number_of_the_arm(tmp_path: Path) -> None:
    config = study(tmp_path, trials=1, replicates=1)
    arm = make_arm(config, "control")
    write_sweep(config, [arm], {})
    broken = outcome(arm, 0, 300)
    write_trial(config, arm, 0, replace(broken, eval=replace(broken.eval, accuracy=math.inf)))
    (row,) = arm_reports(config, read_arms(config))
    assert (row.status, row.accuracy, row.missing) == ("completed", None, 1)

"""What `rin trial` says in words, on reports that a test made."""

import re
from types import SimpleNamespace
from typing import Any

from dashboards.tables import marks_apart
from dashboards.trial_text import outcome_lines, step_line
from spaces.config import EvalConfig, TrialConfig
from trainable.outcome import Alarm, Coverage, LeftOut, in_step

SIGNALS = {"grpo/reward": 0.4123, "gen/entropy": 0.31, "gen/length": 4.12, "filter/kept_groups": 21.0}


def report(collapsed: bool = False, **signals: float) -> Any:
    verdict = SimpleNamespace(collapsed=collapsed, rule="entropy_high", evidence="entropy 3.1 above 0.9")
    return SimpleNamespace(step=3, sigma=0.01, signals={**SIGNALS, **signals}, verdict=verdict, seconds=0.617)


def touched(*warnings: str) -> Any:
    return SimpleNamespace(
        quantized=("a", "b"),
        coverage=Coverage(),
        adapted=(),
        noised=("n",),
        moved={"matrices": 0.4812, "vectors": 1.0},
        followed=(),
        warnings=warnings,
    )


def outcome(parts: dict[str, float] | None = None, **changes: Any) -> Any:
    scores = SimpleNamespace(
        **{"accuracy_start": 0.18, "accuracy": 0.43, "accuracy_bf16_start": 0.2, "accuracy_bf16": 0.5, "n": 2048},
        **{"right": (), "right_start": ()},
        parts=parts or {},
    )
    base = {"outcome": "completed", "rule": "", "step": 29, "seconds": 12.34, "eval": scores, "alarms": []}
    base["config"] = TrialConfig()
    return SimpleNamespace(**{**base, "receipt": touched(), **changes})


def test_a_step_is_one_line_with_its_accuracy_and_its_collapse_where_there_is_one() -> None:
    plain = "step   3  sigma 0.01  reward 0.412  entropy 0.310  length 4.1  kept 21  0.62 s"
    assert step_line(report()) == plain
    said = step_line(report(collapsed=True, **{"eval/accuracy": 0.43}))
    assert said == f"{plain}  accuracy 0.4300  COLLAPSE entropy_high: entropy 3.1 above 0.9"


def test_an_outcome_says_how_it_ended_what_was_touched_and_what_must_be_known() -> None:
    assert outcome_lines(outcome(), "W4A4") == [
        "completed after 29 steps, 12.3 s",
        "accuracy 0.1800 -> 0.4300 (W4A4), 0.2000 -> 0.5000 (unquantised), 2048 questions",
        "quantised 2 layers, noised 1 weights",
        "of the trained weights moved: 48.1 % of matrices, 100.0 % of vectors",
    ]
    alarms = [Alarm(step=number, rule="mismatch", evidence=f"kl {number}") for number in range(9)]
    receipt = touched("sigma below the grid")
    lines = outcome_lines(
        outcome(outcome="collapsed", rule="nonfinite", step=4, alarms=alarms, receipt=receipt), "W16A16"
    )
    assert lines[0] == "collapsed by rule nonfinite in step 3, the 4th of 29, 12.3 s"
    assert lines[4:6] == ["warning: sigma below the grid", "alarm in step 0, the 1st of 29: mismatch: kl 0"]
    assert len(lines) == 4 + 1 + 5, "the first alarms are enough"


def test_steps_count_from_0_and_people_from_1() -> None:
    told = [in_step(step, 130).split(", the ")[1].split()[0] for step in (0, 1, 2, 3, 10, 11, 12, 20, 110, 122)]
    assert told == ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "111th", "123rd"]
    assert in_step(3, 29) == "in step 3, the 4th of 29"


def test_marks_of_a_task_that_differ_are_told() -> None:
    lines = outcome_lines(outcome(parts={"strict": 0.12, "flexible": 0.63}), "W4A4")
    assert lines[2].startswith("marks (means): strict 12.0 %, flexible 63.0 %; one of them tells right from wrong")
    assert outcome_lines(outcome(parts={"strict": 0.62, "flexible": 0.625}), "W4A4") == outcome_lines(outcome(), "W4A4")


def test_pass_at_k_is_told_before_and_after_where_answers_were_sampled() -> None:
    config = TrialConfig(eval=EvalConfig(samples=3))
    plain = outcome(config=config)
    plain.eval.right_start, plain.eval.right = (0, 0, 3, 0), (3, 0, 3, 1)
    lines = outcome_lines(plain, "W4A4")[2:5]
    assert [line.partition(" [")[0] for line in lines] == [
        "pass@1 25.0 % -> 58.3 %",  # (3 + 0 + 3 + 1) / 12
        "pass@2 25.0 % -> 66.7 %",
        "pass@3 25.0 % -> 75.0 %",
    ]
    assert re.fullmatch(r"[0-9.]+, [0-9.]+\] over questions, 3 samples each", lines[0].partition(" [")[2])


def test_what_is_not_quantised_is_said_with_its_reason() -> None:
    router = LeftOut(name="layers.*.gate", weights=50, reason="Router computes with it itself")
    receipt = touched()
    receipt.coverage, receipt.adapted = Coverage(weights=1000, quantized=850, excluded=100, left_out=(router,)), ("a",)
    lines = outcome_lines(outcome(receipt=receipt), "W4A4")
    assert lines[2:4] == [
        "quantised 2 layers, noised 1 weights, adapters beside 1 layers",
        "of the blocks' 1,000 weights 85.0 % quantised, 10.0 % excluded by name, 5.0 % left out "
        "(layers.*.gate: Router computes with it itself)",
    ]


def test_marks_that_are_no_shares_are_numbers() -> None:
    assert marks_apart({"acc": 0.5, "length": 23.25}).startswith("marks (means): acc 0.5, length 23.2; one of them")
    assert marks_apart({"acc": 0.5, "exact": 0.501}) == ""

"""Reports on sweeps that were written by hand, their numbers computed a second time by scipy."""

import io
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from dashboards.report_text import as_tree, report_lines, report_table
from search import report as report_module
from search.arms import Arm, candidate_of, control_for, read_arms, replicates_of, trial_folder, write_arm
from search.report import StudyReport, noisy_runs, report_study
from search.store import StudyConfig
from spaces.config import ConfigError
from spaces.errors import NoCandidate
from spaces.library import SPACES
from tests.written_sweeps import QUESTIONS, attempt, make_arm, outcome, receipt, study, write_sweep, write_trial
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import write_outcome

CONTROL = [280, 291, 276, 288, 283]
AHEAD = [332, 338, 331, 337, 340]  # about 13 points above, in every seed
CLOSE = [284, 285, 281, 279, 290]


def written(tmp_path: Path, right: dict[str, list[Any]], **changes: Any) -> tuple[StudyConfig, StudyReport]:
    config = study(tmp_path, trials=len(right), replicates=5, **changes)
    write_sweep(config, [make_arm(config, name) for name in right], right)
    return config, report_study(config)


def row(report: StudyReport, arm: str) -> Any:
    return next(row for row in report.arms if row.arm == arm)


def text_of(report: StudyReport) -> str:
    out = io.StringIO()
    console = Console(file=out, width=250)
    console.print(report_table(report))
    for line in report_lines(report):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return out.getvalue()


def strict(report: StudyReport) -> dict[str, Any]:
    """As a strict reader of JSON sees it."""
    text = json.dumps(as_tree(report))
    tree: dict[str, Any] = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return tree


# Numbers


def test_differences_intervals_and_p_values_are_scipy_s_corrected_for_the_number_of_arms(tmp_path: Path) -> None:
    """Paired t per arm; Holm's p and Bonferroni's interval over two arms."""
    _, report = written(tmp_path, {"control": CONTROL, "c01": AHEAD, "c02": CLOSE})
    p = {}
    for arm, right in (("c01", AHEAD), ("c02", CLOSE)):
        differences = (np.array(right) - np.array(CONTROL)) / QUESTIONS
        seen = row(report, arm)
        alone = seen.comparison.primary
        test = stats.ttest_1samp(differences, 0)
        p[arm] = float(test.pvalue)
        assert alone.difference == seen.corrected.difference == pytest.approx(differences.mean())
        assert (alone.low, alone.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert (seen.corrected.low, seen.corrected.high) == pytest.approx(tuple(test.confidence_interval(1 - 0.05 / 2)))
        assert alone.p == pytest.approx(p[arm])
        assert seen.corrected.replicates == 5
        assert seen.accuracy == pytest.approx(np.mean(right) / QUESTIONS)
    assert p["c01"] < p["c02"]
    assert row(report, "c01").corrected.p == pytest.approx(2 * p["c01"])
    assert row(report, "c02").corrected.p == pytest.approx(max(2 * p["c01"], p["c02"]))
    assert row(report, "c01").verdict.startswith("ahead where it holds")
    assert row(report, "c02").verdict.startswith("undecided")


def test_one_arm_alone_needs_no_correction(tmp_path: Path) -> None:
    _, report = written(tmp_path, {"control": CONTROL, "c01": AHEAD})
    seen = row(report, "c01")
    assert (seen.corrected.low, seen.corrected.p) == pytest.approx(
        (seen.comparison.primary.low, seen.comparison.primary.p)
    )


def test_collapsed_replicates_count_with_their_accuracy_at_the_stop(tmp_path: Path) -> None:
    """Three of five collapsed: left out, the arm would be ahead."""
    right: list[Any] = [332, ("collapsed", 60), 331, ("collapsed", 90), ("collapsed", 75)]
    _, report = written(tmp_path, {"control": CONTROL, "c01": right})
    seen = row(report, "c01")
    counted = np.array([332, 60, 331, 90, 75]) / QUESTIONS
    assert (seen.replicates, seen.missing, seen.collapsed, seen.rules) == (5, 0, 3, ("filter_rejection",))
    assert seen.accuracy == pytest.approx(counted.mean())
    assert seen.corrected.difference == pytest.approx((counted - np.array(CONTROL) / QUESTIONS).mean())
    assert seen.corrected.difference < 0 < seen.comparison.completed.difference
    exact = stats.beta.ppf(0.025, 3, 3), stats.beta.ppf(0.975, 4, 2)  # Clopper & Pearson 1934
    risk = seen.comparison.treated_risk
    assert (risk.collapsed, risk.replicates) == (3, 5)
    assert (risk.low, risk.high) == pytest.approx(exact)
    assert seen.comparison.risk_p == pytest.approx(stats.boschloo_exact([[3, 0], [2, 5]]).pvalue, abs=1e-3)


def test_failed_and_unfinished_replicates_are_missing_and_said_to_be(tmp_path: Path) -> None:
    config, report = written(tmp_path, {"control": CONTROL, "c01": [332, None, 331, None, 340]})
    seen = row(report, "c01")
    assert (seen.replicates, seen.missing, seen.corrected.replicates) == (3, 2, 3)
    assert seen.accuracy == pytest.approx((332 + 331 + 340) / 3 / QUESTIONS)
    assert report.unfinished == 2
    assert f"2 trials have no outcome yet: rin resume {config.name}" in text_of(report)
    assert "3 of 5" in text_of(report)


def test_a_replicate_that_was_stopped_is_not_compared(tmp_path: Path) -> None:
    """It has no accuracy at the end, though it was evaluated as it left, and it has steps to go."""
    config = study(tmp_path, trials=2, replicates=5)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": CONTROL, "c01": [332, 338, 331, 337, None]})
    write_outcome(trial_folder(config, "c01", 4), outcome(arms[1], 4, 10, "stopped"), [])
    report = report_study(config)
    assert (row(report, "c01").replicates, row(report, "c01").missing, report.unfinished) == (4, 1, 1)
    assert row(report, "c01").accuracy == pytest.approx((332 + 338 + 331 + 337) / 4 / QUESTIONS)


def test_arms_without_a_common_seed_have_no_difference_anywhere(tmp_path: Path) -> None:
    _, report = written(
        tmp_path, {"control": [280, 291, None, None, None], "c01": [None, None, 331, 337, ("collapsed", 90)]}
    )
    seen = row(report, "c01")
    assert (seen.difference, seen.verdict) == (
        None,
        "undecided: no seed in both arms, needs at least 3 more replicates",
    )
    tree = next(arm for arm in strict(report)["arms"] if arm["arm"] == "c01")["comparison"]
    assert (tree["difference"], tree["replicates"], tree["unpaired"]) == (None, 0, 5)
    text = text_of(report)
    assert "nan" not in text
    assert "completed pairs alone unknown points [unknown]" in text


def test_an_accuracy_that_is_not_a_number_is_missing_and_not_averaged(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=5)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": CONTROL, "c01": AHEAD})
    broken = outcome(arms[1], 2, 331)
    write_trial(config, arms[1], 2, replace(broken, eval=replace(broken.eval, accuracy=math.nan)))
    report = report_study(config)
    assert (row(report, "c01").replicates, row(report, "c01").missing) == (4, 1)
    assert row(report, "c01").accuracy == pytest.approx((332 + 338 + 337 + 340) / 4 / QUESTIONS)


def test_each_arm_is_compared_with_the_control_of_its_own_filter_policy(tmp_path: Path) -> None:
    """The two controls differ by ten points, so a wrong pair shows."""
    config = study(tmp_path, trials=4, replicates=5)
    resample = ("grpo.filter_groups=resample", "grpo.max_gen_batches=5")
    arms = [make_arm(config, "control"), make_arm(config, "control-resample", *resample)]
    arms += [make_arm(config, "plain"), make_arm(config, "filtered", *resample)]
    better = [count + 40 for count in CONTROL]
    write_sweep(config, arms, {"control": CONTROL, "control-resample": better, "plain": AHEAD, "filtered": AHEAD})
    report = report_study(config)
    assert [row(report, arm).control for arm in ("control", "control-resample", "plain", "filtered")] == [
        "",
        "",
        "control",
        "control-resample",
    ]
    assert row(report, "plain").corrected.difference - row(report, "filtered").corrected.difference == pytest.approx(
        0.1
    )


def test_what_a_precision_does_without_noise_is_told_between_the_controls(tmp_path: Path) -> None:
    """bf16 hangs on the control; nvfp4 behind a filter on the one with that filter, not on the sweep's own."""
    config = study(tmp_path, trials=5, replicates=5)
    bf16, nvfp4 = (("quant.weights=" + name, "quant.activations=" + name) for name in ("none", "nvfp4"))
    arms = [make_arm(config, "control"), make_arm(config, "control-bf16", *bf16)]
    arms += [make_arm(config, "control-nvfp4", *nvfp4, "grpo.filter_groups=resample")]
    arms += [make_arm(config, "control-resample", "grpo.filter_groups=resample"), make_arm(config, "c01")]
    write_sweep(
        config,
        arms,
        {
            "control": CONTROL,
            "control-bf16": AHEAD,
            "control-nvfp4": CONTROL[:2] + [None] * 3,
            "control-resample": CLOSE,
            "c01": CLOSE,
        },
    )
    report = report_study(config)
    assert [(pair.control, pair.other) for pair in report.controls] == [
        ("control-resample", "control"),
        ("control-bf16", "control"),
        ("control-nvfp4", "control-resample"),
    ]
    differences = (np.array(AHEAD) - np.array(CONTROL)) / QUESTIONS
    seen = report.controls[1].comparison
    ends = stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 / 3)
    assert (seen.difference, seen.low, seen.high) == pytest.approx((differences.mean(), *ends))
    assert row(report, "control-bf16").verdict == "", "a precision is no effect of noise"
    text = text_of(report)
    assert (
        f"control-bf16 against control, both without noise: {100 * seen.difference:+.1f} points of accuracy [" in text
    )
    assert "each judged in its own precision; quant.activations=none (there mxfp4), quant.weights=none (th" in text
    assert re.search(r"control-nvfp4 against control-resample, .* \[unknown\] over 2 seeds", text)
    assert "control-resample against control, both without noise" in text
    assert strict(report)["controls"][1]["settings"]["quant.weights"] == ["none", "mxfp4"]


def test_an_arm_without_a_control_of_its_policy_is_not_compared_with_another(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=5)
    arms = [make_arm(config, "control"), make_arm(config, "c01", "grpo.filter_groups=resample")]
    write_sweep(config, arms, {"control": CONTROL, "c01": AHEAD})
    assert control_for(arms[1], arms) is None
    report = report_study(config)
    assert (row(report, "c01").control, row(report, "c01").corrected, row(report, "c01").verdict) == ("", None, "")
    with pytest.raises(ConfigError, match=r"c01: has no control in s: .* differs from it in grpo\.filter_groups, too"):
        candidate_of(config, read_arms(config), "c01")
    with pytest.raises(NoCandidate):
        candidate_of(config, read_arms(config))


@pytest.mark.parametrize(("replicates", "said"), [(1, "undecided, needs at least 2 more replicates"), (2, "undecided")])
def test_fewer_than_three_replicates_are_always_undecided(tmp_path: Path, replicates: int, said: str) -> None:
    config = study(tmp_path, trials=2, replicates=replicates)
    right = {"control": CONTROL[:replicates], "c01": AHEAD[:replicates]}
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "c01")], right)
    report = report_study(config)
    assert row(report, "c01").verdict.startswith(said)
    assert "undecided: c01" in text_of(report)
    strict(report)


def test_a_run_has_the_dose_of_its_loudest_stage_whether_or_not_it_reached_quieter_ones() -> None:
    loud, quiet = receipt(0.04), receipt(0.01)
    (later,) = quiet.effects
    both = replace(loud, effects=(*loud.effects, replace(later, stage=2)))
    assert both.dose == loud.dose == 0.04
    broken = replace(later, stage=2, applied_relative=math.nan)
    assert math.isnan(replace(both, effects=(broken, *loud.effects)).dose or 0.0)


def test_dose_start_and_hours_are_means_and_sums_of_the_files(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=2)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": CONTROL[:2]})
    for replicate, doses in enumerate(([0.01, 0.03], [0.06])):
        ended = outcome(arms[1], replicate, 300)
        effects = tuple(effect for dose in doses for effect in receipt(dose).effects)
        ended = replace(ended, receipt=replace(ended.receipt, effects=effects))
        write_trial(config, arms[1], replicate, ended, attempts=[attempt(0, 1800), attempt(0, 360)])
    report = report_study(config)
    assert row(report, "c01").dose == pytest.approx((0.02 + 0.06) / 2)
    assert row(report, "control").dose is None
    assert row(report, "c01").start == 0.25
    assert row(report, "c01").hours == pytest.approx(1.2)
    assert report.ledger.hours == pytest.approx(1.2 + 2 / 60)


def test_small_shares_of_hours_are_told_with_a_digit_that_counts(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=1)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": CONTROL[:1]})
    shared = {"trial": "control-0", "steps": 3, "seconds": 14.0}
    write_trial(config, arms[1], 0, outcome(arms[1], 0, 300), attempts=[attempt(0, 1800, shared=shared)])
    (line,) = [line for line in report_lines(report_study(config)) if "repeated after faults" in line]
    assert line.startswith("0.52 trial-slot hours: 0 in trials that collapsed, 0 repeated")
    assert line.endswith("0.004 more saved by beginnings that trials share")


# The candidate


def test_the_candidate_is_furthest_ahead_of_its_control_among_those_whose_replicates_all_completed(
    tmp_path: Path,
) -> None:
    _, report = written(
        tmp_path,
        {
            "control": [390] * 5,  # a control is no candidate
            "steady": [300, 301, 302, 303, 304],
            "low": [299, 299, 301, 303, 305],
            "collapses": [380, 380, 380, 380, ("collapsed", 379)],
            "unfinished": [380, 380, 380, 380, None],
        },
    )
    assert [row.arm for row in report.arms if row.candidate] == ["steady"]
    assert report.candidate is not None
    assert report.candidate.arm == "steady"
    assert "candidate: steady. Is it a finding? rin confirm s" in text_of(report)


def test_across_filters_the_candidate_is_judged_by_its_own_control(tmp_path: Path) -> None:
    """The filter moves an accuracy by points: the highest accuracy is not what noise gained most."""
    config = study(tmp_path, trials=4, replicates=5)
    resample = "grpo.filter_groups=resample"
    arms = [make_arm(config, "control"), make_arm(config, "control-resample", resample)]
    arms += [make_arm(config, "plain"), make_arm(config, "filtered", resample)]
    right = {
        "control": CONTROL,
        "control-resample": [count + 40 for count in CONTROL],
        "plain": [count + 9 for count in CONTROL],
        "filtered": [count + 42 for count in CONTROL],
    }
    write_sweep(config, arms, right)
    candidate = candidate_of(config, read_arms(config))
    assert (candidate.arm.name, candidate.control.name) == ("plain", "control")
    assert candidate.difference == pytest.approx(9 / QUESTIONS)
    report = report_study(config)
    assert report.candidate is not None
    assert report.candidate.difference == pytest.approx(9 / QUESTIONS), (
        "the number of the table is the one it was chosen by"
    )


def test_where_every_arm_collapsed_there_is_no_winner_and_the_report_says_nothing_of_one(tmp_path: Path) -> None:
    config, report = written(tmp_path, {"control": CONTROL, "c01": [("collapsed", 380)] * 5})
    assert report.candidate is None
    assert "candidate" not in text_of(report)
    assert strict(report)["candidate"] is None
    with pytest.raises(NoCandidate, match="no configuration with noise completed all its replicates"):
        candidate_of(config, read_arms(config))


def test_another_arm_can_be_named_if_it_exists_and_is_no_control(tmp_path: Path) -> None:
    config, _ = written(tmp_path, {"control": CONTROL, "c01": AHEAD, "c02": CLOSE})
    arms = read_arms(config)
    for named, expected in ((None, "c01"), ("c02", "c02")):
        candidate = candidate_of(config, arms, named)
        assert (candidate.arm.name, candidate.control.name) == (expected, "control")
    for name in ("c09", "control"):
        with pytest.raises(ConfigError, match=f"--arm {name}: no such arm in s; it has c01, c02"):
            candidate_of(config, arms, name)


# Words


@pytest.mark.parametrize(
    "right",
    [
        {"control": CONTROL, "c01": AHEAD, "c02": [100, 104, 99, 102, 107], "c03": CLOSE},
        {"control": CONTROL, "c01": [380, ("collapsed", 10), 381, 380, 379]},
        {"control": [("collapsed", 10)] * 5, "c01": AHEAD},
        {"control": CONTROL, "c01": CONTROL},
    ],
)
def test_no_word_of_a_sweep_s_report_is_better_or_worse_but_where_it_says_who_may(
    tmp_path: Path, right: dict[str, list[Any]]
) -> None:
    _, report = written(tmp_path, right)
    said = text_of(report).replace("Only rin confirm says better or worse.", "")
    for text in (said, json.dumps(strict(report))):
        assert not re.search("better|worse|improve|significant", text, re.IGNORECASE)


def test_what_stands_out_is_ahead_or_behind(tmp_path: Path) -> None:
    """Five runs without a collapse do not exclude one in two: two arms share the error of the bound."""
    _, report = written(tmp_path, {"control": CONTROL, "c01": AHEAD, "c02": [100, 104, 99, 102, 107]})
    said = "ahead where it holds; a collapse risk up to 58 % is not excluded"
    assert [row.verdict for row in report.arms] == ["", said, "behind"]
    trees = strict(report)["arms"]
    assert [arm["verdict"] for arm in trees] == ["", said, "behind"]
    assert [arm["finding"] and arm["finding"]["verdict"] for arm in trees] == [None, "ahead where it holds", "behind"]
    assert trees[1]["finding"]["risk_high"] == pytest.approx(1 - (0.05 / 4) ** (1 / 5))
    assert "c01: collapse risk: 0 of 5 runs, up to 58 % is not excluded; 15 % would cancel the gain" in text_of(report)


def test_an_arm_is_ahead_where_its_runs_exclude_the_collapse_risk_that_would_cancel_its_gain(tmp_path: Path) -> None:
    """Thirteen points gained, and the run that collapsed elsewhere was left with one point less than the control."""
    collapsed: list[Any] = [("collapsed", 279), 283, 282, 281, 280]
    _, report = written(tmp_path, {"control": CONTROL, "c01": AHEAD, "c02": collapsed})
    assert row(report, "c01").verdict == "ahead"
    assert strict(report)["arms"][1]["finding"]["worth"] == pytest.approx(279 / QUESTIONS)


def test_arms_are_counted_per_control(tmp_path: Path) -> None:
    config = study(tmp_path, trials=5, replicates=5)
    resample = "grpo.filter_groups=resample"
    arms = [make_arm(config, "control"), make_arm(config, "control-resample", resample)]
    arms += [make_arm(config, "c01"), make_arm(config, "c02"), make_arm(config, "c03", resample)]
    right = {"control": CONTROL, "control-resample": CONTROL, "c01": AHEAD, "c02": CLOSE, "c03": AHEAD}
    write_sweep(config, arms, right)
    report = report_study(config)
    assert "corrected for the arms that share a control (control: 2, control-resample: 1)" in text_of(report)
    alone = row(report, "c03").comparison.primary
    assert (row(report, "c03").corrected.low, row(report, "c03").corrected.p) == pytest.approx((alone.low, alone.p))
    assert row(report, "c01").corrected.low < alone.low


def test_a_dose_above_the_weights_is_written_as_people_write(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=1)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [280]})
    write_trial(config, arms[1], 0, outcome(arms[1], 0, 300, dose=1.634))
    assert "163 %" in text_of(report_study(config))
    assert "e+0" not in text_of(report_study(config))


def test_an_interval_of_two_replicates_is_not_shown(tmp_path: Path) -> None:
    """With one degree of freedom it reaches hundreds of points beyond what an accuracy can be."""
    config = study(tmp_path, trials=2, replicates=2)
    right = {"control": [280, 300], "c01": [320, 290]}
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "c01")], right)
    report = report_study(config)
    assert row(report, "c01").corrected.low < -0.4
    assert "[unknown]" in text_of(report)
    assert not re.search(r"\[-\d", text_of(report))


def test_what_could_not_be_decided_says_what_it_would_take(tmp_path: Path) -> None:
    _, report = written(tmp_path, {"control": CONTROL, "c02": CLOSE})
    needs = row(report, "c02").corrected.needs
    expected = "needs more questions" if needs is None else f"needs about {needs} more replicate"
    assert f"undecided: c02 ({expected}" in text_of(report)


# JSON


@pytest.mark.parametrize("replicates", [0, 1, 2, 3, 5])
def test_the_json_is_strict_and_complete_however_little_has_ended(tmp_path: Path, replicates: int) -> None:
    config = study(tmp_path, trials=4, replicates=5)
    right: dict[str, list[Any]] = {"control": CONTROL[:replicates], "c01": [("collapsed", 10)] * replicates}
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "c01"), make_arm(config, "c02")], right)
    report = report_study(config)
    tree = strict(report)
    assert [arm["arm"] for arm in tree["arms"]] == ["control", "c01", "c02"]
    assert tree["unfinished"] == 20 - 2 * replicates
    assert tree["arms"][1]["collapsed"] == replicates
    assert tree["arms"][2]["accuracy"] is None
    if replicates == 1:
        assert (tree["arms"][1]["comparison"]["low"], tree["arms"][1]["comparison"]["high"]) == (None, None), (
            "open on both sides"
        )
    text_of(report)


def test_json_and_records_have_the_same_numbers(tmp_path: Path) -> None:
    _, report = written(tmp_path, {"control": CONTROL, "c01": AHEAD})
    tree, seen = strict(report)["arms"][1], row(report, "c01")
    assert tree["comparison"]["difference"] == seen.corrected.difference
    assert (tree["comparison"]["low"], tree["comparison"]["high"]) == (seen.corrected.low, seen.corrected.high)
    assert tree["collapse"]["arm"]["replicates"] == 5
    assert tree["config"]["noise"]["sigma_start"] == 0.01


# Sources of other figures


def test_noisy_runs_are_those_that_ended_by_themselves_with_noise(tmp_path: Path) -> None:
    config, _ = written(tmp_path, {"control": CONTROL, "c01": [300, ("collapsed", 10), None]})
    runs = noisy_runs(read_arms(config))
    assert [(run.sigma, run.collapsed) for run in runs] == [(0.01, False), (0.01, True)]
    assert {run.mode for run in runs} == {"W4A4"}


def test_replicates_are_named_by_their_seeds(tmp_path: Path) -> None:
    config, _ = written(tmp_path, {"control": [280, None, 276]}, seed=40)
    (control,) = read_arms(config)
    assert [(run.seed, run.accuracy, sum(run.correct or ())) for run in replicates_of(config, control)] == [
        (40, 0.7, 280),
        (42, 0.69, 276),
    ]


def test_a_damaged_outcome_is_the_users_to_mend_and_named(tmp_path: Path) -> None:
    config, _ = written(tmp_path, {"control": CONTROL, "c01": AHEAD})
    trial_folder(config, "c01", 3).write("outcome.json", "{")
    with pytest.raises(ConfigError, match=r"c01-3/outcome\.json: is damaged"):
        report_study(config)


def test_a_sweep_s_own_draws_tell_what_mattered(tmp_path: Path) -> None:
    """Accuracy follows the sigma that was drawn, and not where it ends."""
    config = study(tmp_path, trials=31, replicates=1, space=SPACES["schedule"])
    write_sweep(config, [make_arm(config, "control")], {"control": [300]})
    for number in range(1, 31):
        sigma, end = 0.005 + 0.003 * number, 1e-4 * (1 + number * 7 % 30)
        params = {
            "noise.sigma_start": sigma,
            "noise.sigma_end": end,
            "noise.num_stages": 2 + number % 5,
            "noise.schedule": "constant",
        }
        params = {
            dimension.name: params[dimension.name] for dimension in config.space.dimensions if dimension.name in params
        }
        plain = make_arm(config, f"c{number:02}", f"noise.sigma_start={sigma}", f"noise.sigma_end={end}")
        arm = Arm(name=plain.name, origin="searcher", config=plain.config, params=params)
        write_arm(config, number, arm)
        write_trial(config, arm, 0, outcome(arm, 0, 380 - 9 * number, dose=sigma))
    report = report_study(config)
    by_name = {item.dimension: item.importance for item in report.importance if item.importance is not None}
    assert max(by_name, key=lambda name: by_name[name]) == "noise.sigma_start"
    assert "importance of noise.sigma_start" in text_of(report)
    strict(report)


def test_marks_that_differ_by_a_point_or_more_are_told(tmp_path: Path) -> None:
    config = study(tmp_path)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {})
    for arm, flexible in zip(arms, (0.63, 0.405), strict=True):
        ended = outcome(arm, 0, 160)
        marked = replace(ended.eval, parts={"strict": 0.4, "flexible": flexible})
        write_trial(config, arm, 0, replace(ended, eval=marked))
    report = report_study(config)
    assert "control: marks (means): strict 40.0 %, flexible 63.0 %" in text_of(report)
    assert "c01: strict" not in text_of(report)
    assert strict(report)["arms"][0]["marks"] == {"strict": 0.4, "flexible": 0.63}


# What fails


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("boundaries", "the boundary of W4A4, noise on rmsnorm could not be computed (RuntimeError: no root)"),
        ("importance", "the importance of dimensions could not be computed (RuntimeError: no root)"),
        ("compare_arms", "c01 against its control could not be computed (RuntimeError: no root)"),
    ],
)
def test_an_analysis_that_fails_is_a_line_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no\nroot")

    monkeypatch.setattr(report_module, what, fails)
    _, report = written(tmp_path, {"control": CONTROL, "c01": AHEAD})
    assert said in text_of(report)
    assert strict(report)["failed"] == [said]
    assert row(report, "c01").accuracy == pytest.approx(np.mean(AHEAD) / QUESTIONS), "the rest is there to be read"


def test_runs_on_which_the_boundary_once_failed_have_a_report(tmp_path: Path) -> None:
    """Linear noise at 0.006 held three times, at 0.01 and 0.016 it broke three times."""
    config = study(tmp_path, trials=4, replicates=3)
    arms = [make_arm(config, "control")]
    right: dict[str, list[Any]] = {"control": CONTROL[:3]}
    for sigma, ends in ((0.006, [300] * 3), (0.01, [("collapsed", 90)] * 3), (0.016, [("collapsed", 80)] * 3)):
        arms.append(make_arm(config, f"s{sigma}", "noise.modules=linear", f"noise.sigma_start={sigma}"))
        right[arms[-1].name] = ends
    write_sweep(config, arms, right)
    report = report_study(config)
    assert report.failed == ()
    assert "W4A4, noise on linear: every run held up to sigma 0.006, every run broke from 0.01" in text_of(report)


def test_warnings_of_receipts_are_told_by_the_report(tmp_path: Path) -> None:
    config = study(tmp_path)
    arms = [make_arm(config, "control")]
    write_sweep(config, arms, {})
    ended = outcome(arms[0], 0, 160)
    write_trial(config, arms[0], 0, replace(ended, receipt=replace(ended.receipt, warnings=("cut off", "off"))))
    report = report_study(config)
    assert "control: warning: cut off (and 1 more)" in text_of(report)
    assert strict(report)["arms"][0]["warnings"] == ["cut off", "off"]


def test_an_outcome_is_parsed_once_for_how_it_ended_and_once_for_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of hundreds of trials nothing else takes as long."""
    config = study(tmp_path, replicates=2)
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "a")], {"control": [200, 210], "a": [220, 228]})
    opened, read = Counter[str](), Folder.read

    def counted(folder: Folder, name: str) -> bytes | None:
        opened[f"{folder.uri}/{name}"] += name == "outcome.json"
        return read(folder, name)

    monkeypatch.setattr(Folder, "read", counted)
    report_study(config)
    assert set((+opened).values()) == {2}
    assert len(+opened) == 4

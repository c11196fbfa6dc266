"""What a plan promises, computed again by hand; and that it trains nothing."""

import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from dashboards.report_text import forecast_line, plan_lines
from search.arms import Arm
from search.plan import StudyPlan, experience, plan_study
from search.store import StudyConfig
from spaces.config import ConfigError
from spaces.points import POINTS
from spaces.workloads import WORKLOADS
from tests.written_sweeps import QUESTIONS, attempt, make_arm, outcome, study, write_sweep, write_trial

LIKE = make_arm(study("/nowhere"), "control").config
WHOLE: dict[str, Any] = {"settings": {}}
"""The workload as it stands, whose figures hold."""


def planned(store: Path, cpus: int = 4, **changes: Any) -> StudyPlan:
    return plan_study(study(store, name="new", **changes), cpus)


def text(plan: StudyPlan) -> str:
    return "\n".join(plan_lines(plan))


def test_time_and_hours_are_the_workload_s_figure_times_the_runs(tmp_path: Path) -> None:
    plan = planned(tmp_path, cpus=4, workload="embedded", settings={}, trials=6, replicates=3)
    seconds = WORKLOADS["embedded"].trial_seconds
    slots = 4 // WORKLOADS["embedded"].trial_cpus
    assert (plan.study.runs, plan.slots, plan.trial_seconds) == (18, slots, seconds)
    assert plan.wall_seconds == math.ceil(18 / slots) * seconds
    assert plan.hours == pytest.approx(18 * seconds / 3600)
    assert "runs: 18 = 6 configurations x 3 replicates (seeds 0 to 2)" in text(plan)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cpus", "per_trial", "concurrent", "slots"), [(8, 2, None, 4), (7, 2, None, 3), (1, 2, None, 1), (8, 2, 3, 3)]
)
def test_trials_at_once_are_what_the_cores_hold_or_what_was_asked(
    tmp_path: Path, cpus: int, per_trial: int, concurrent: int | None, slots: int
) -> None:
    asked = study(tmp_path, name="new", trials=5, replicates=2, concurrent=concurrent, cpus=per_trial, **WHOLE)
    plan = plan_study(asked, cpus)
    assert (plan.slots, plan.cpus) == (slots, per_trial)
    assert plan.trial_seconds is not None
    assert plan.wall_seconds == math.ceil(10 / slots) * plan.trial_seconds


def test_gpu_hours_count_gpus(tmp_path: Path) -> None:
    plain, shared = planned(tmp_path, trials=4, **WHOLE), planned(tmp_path, trials=4, gpus=0.5, **WHOLE)
    assert plain.hours is not None
    assert shared.hours == pytest.approx(0.5 * plain.hours)
    assert "GPU hours" in text(shared)
    assert "trial-slot hours" in text(plain)


def test_all_ranks_of_a_trial_count_in_what_it_takes_and_its_time_is_no_longer_the_workload_s(tmp_path: Path) -> None:
    ranks = {"settings": {"parallel": {"ranks": 2}}, "trials": 4}
    plan = planned(tmp_path, cpus=8, **ranks)
    assert (plan.processes, plan.cpus, plan.gpus, plan.slots, plan.trial_seconds) == (2, 2, 0.0, 4, None)
    assert "4 at once, each by 2 processes with 2 CPUs of one node" in text(plan)
    plan = plan_study(study(tmp_path, name="new", gpus=2.0, **ranks), cpus=64, gpus_here=8)
    assert (plan.processes, plan.gpus, plan.slots) == (2, 2.0, 4)
    assert "4 at once, each by 2 processes with 2 CPUs and 2 GPUs of one node" in text(plan)


def test_the_order_is_controls_then_points_then_the_searcher_s(tmp_path: Path) -> None:
    plan = planned(tmp_path, trials=6, points=("e13i-baseline", "e13i-v4-filter-off"))
    assert [arm.name for arm in plan.arms] == ["control", "control-resample", "e13i-baseline", "e13i-v4-filter-off"]
    assert plan.searched == 2
    assert " 4+ 2 configurations chosen by gp from:" in text(plan)


def test_a_recorded_collapse_of_the_plan_shortens_the_expected_time_and_not_the_worst_case(tmp_path: Path) -> None:
    plan = planned(tmp_path, workload="embedded", settings={}, trials=3, points=("e13i-baseline",))
    collapsed = POINTS["e13i-baseline"].collapsed_at_step
    assert collapsed is not None
    assert plan.adjusted_share == pytest.approx((1 + 1 + (collapsed + 1) / plan.config.grpo.steps) / 3)
    assert f"recorded: collapsed in step {collapsed}, the {collapsed + 1}th of 29" in text(plan)
    assert "with the collapses that are to be expected" in text(plan)
    calm = planned(tmp_path, workload="embedded", settings={}, trials=3)
    assert (calm.adjusted_share, calm.wall_seconds) == (1.0, plan.wall_seconds)
    assert "to be expected" not in text(calm)


# What earlier sweeps teach


def finished(store: Path, seconds: list[float], **changes: Any) -> tuple[StudyConfig, list[Arm]]:
    config = study(store, trials=2, replicates=len(seconds), **changes)
    arms = [make_arm(config, "control"), make_arm(config, "c01", origin="searcher")]
    write_sweep(config, arms, {})
    for arm in arms:
        for replicate, took in enumerate(seconds):
            write_trial(
                config, arm, replicate, outcome(arm, replicate, 60 + replicate), attempts=[attempt(100, 100 + took)]
            )
    return config, arms


def test_times_of_the_same_workload_in_this_store_replace_the_workload_s_figure(tmp_path: Path) -> None:
    finished(tmp_path, [10.0, 20.0, 90.0])
    plan = planned(tmp_path)
    assert plan.trial_seconds == 20.0
    assert "median of completed trials in this store" in text(plan)
    other = planned(tmp_path, workload="embedded", settings={})
    assert other.trial_seconds == WORKLOADS["embedded"].trial_seconds


def test_samples_for_pass_at_k_are_counted_and_timed(tmp_path: Path) -> None:
    sampled = {"settings": {"eval": {"samples": 8}}, "workload": "embedded"}
    plan, workload = planned(tmp_path, **sampled), WORKLOADS["embedded"]
    assert workload.answer_seconds is not None
    assert plan.sampled == 2 * 2048 * 8
    assert plan.trial_seconds == pytest.approx(workload.trial_seconds + plan.sampled * workload.answer_seconds)
    assert "8 samples of 2048 questions" in text(plan)
    assert "32,768 answers beside 7,424 completions of training" in text(plan)
    assert " s of pass@k), " in text(plan)
    bare = planned(tmp_path, workload="embedded", settings={})
    assert (bare.sampled, bare.trial_seconds) == (0, workload.trial_seconds)
    assert "pass@k" not in text(bare)


def test_times_with_and_without_samples_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """Trials that sampled as many answers are the measure; else the workload's figure for an answer is added, where it
    has one."""
    finished(tmp_path, [10.0, 20.0, 90.0], name="greedy", settings={})
    answer = WORKLOADS["tiny"].answer_seconds
    assert answer is not None
    asked: dict[str, Any] = {"settings": {"eval": {"samples": 4}}}
    assert planned(tmp_path, **asked).trial_seconds == pytest.approx(20.0 + 2 * 128 * 4 * answer)
    finished(tmp_path, [31.0, 33.0, 32.0], name="sampled", **asked)
    assert planned(tmp_path, **asked).trial_seconds == 32.0
    assert planned(tmp_path, settings={}).trial_seconds == 20.0
    other: dict[str, Any] = {"settings": {"eval": {"samples": 4, "questions": 64}}}
    assert planned(tmp_path, **other).trial_seconds is None
    assert "not known yet" in text(planned(tmp_path, **other))


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"name": "/my/model", "recipe": None}, "task": {"name": "reasoning_gym:gcd"}},
        {"grpo": {"steps": 500}},
        {"rollout": {"max_new_tokens": 512}},
    ],
)
def test_of_another_model_or_size_nothing_is_known_until_it_was_measured(tmp_path: Path, settings: Any) -> None:
    finished(tmp_path, [10.0, 20.0, 90.0])
    plan = planned(tmp_path, settings=settings, budget_hours=1.0, replicates=3)
    assert (plan.trial_seconds, plan.hours, plan.affordable, plan.difference_sd) == (None, None, None, None)
    assert "time, cost: not known yet for this model, task and size" in text(plan)
    assert "warning: what the budget of 1 hours pays for is not known yet" in text(plan)


def test_trials_that_collapsed_or_were_interrupted_teach_no_time(tmp_path: Path) -> None:
    config, arms = finished(tmp_path, [10.0, 10.0, 10.0])
    write_trial(config, arms[0], 0, outcome(arms[0], 0, 100, "collapsed"), attempts=[attempt(0, 1)])
    for replicate in range(3):
        attempts = [attempt(0, 500, ended=""), attempt(0, 500)]
        write_trial(config, arms[1], replicate, outcome(arms[1], replicate, 280), attempts=attempts)
    assert experience(str(tmp_path), LIKE).trial_seconds == 10.0


def test_the_spread_is_that_of_differences_from_the_control_over_seeds(tmp_path: Path) -> None:
    """Pooled over arms, one degree of freedom less for each; by the statistics module of Python."""
    config = study(tmp_path, trials=3, replicates=4)
    source = random.Random(0)
    right = {name: [280 + source.randrange(40) for _ in range(4)] for name in ("control", "c01", "c02")}
    write_sweep(config, [make_arm(config, name) for name in right], right)
    squares = 0.0
    for name in ("c01", "c02"):
        squares += 3 * statistics.variance(
            [(a - b) / QUESTIONS for a, b in zip(right[name], right["control"], strict=True)]
        )
    assert experience(str(tmp_path), LIKE).difference_sd == pytest.approx(math.sqrt(squares / 6))


def test_a_collapsed_replicate_teaches_no_spread(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=4)
    right: dict[str, list[Any]] = {"control": [280, 281, 282, 283], "c01": [290, 292, 294, ("collapsed", 10)]}
    write_sweep(config, [make_arm(config, name) for name in right], right)
    differences = [(a - b) / QUESTIONS for a, b in ((290, 280), (292, 281), (294, 282))]
    assert experience(str(tmp_path), LIKE).difference_sd == pytest.approx(statistics.stdev(differences))


def test_what_the_searcher_s_configurations_took_tells_what_the_next_ones_will(tmp_path: Path) -> None:
    config = study(tmp_path, trials=7, replicates=1)
    arms = [make_arm(config, "control"), *(make_arm(config, f"c{n:02}", origin="searcher") for n in range(1, 7))]
    write_sweep(config, arms, {})
    for number, arm in enumerate(arms):
        ended = outcome(arm, 0, 280) if number < 4 else outcome(arm, 0, 100, "collapsed")
        write_trial(config, arm, 0, ended, attempts=[attempt(0, 100.0 if number < 4 else 25.0)])
    assert experience(str(tmp_path), LIKE).searched_share == pytest.approx((3 * 1 + 3 * 0.25) / 6)
    plan = planned(tmp_path, trials=4)
    assert plan.adjusted_share == pytest.approx((1 + 3 * 0.625) / 4)


def test_a_sweep_that_cannot_be_read_does_not_prevent_a_plan(tmp_path: Path) -> None:
    finished(tmp_path, [10.0, 20.0, 90.0])
    for name, damaged in (("broken", "{"), ("old", '{"version": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.json").write_text(damaged)
    finished(tmp_path, [1000.0], name="half")
    (tmp_path / "half" / "arms" / "0000.json").write_text("{")
    assert planned(tmp_path).trial_seconds == 20.0


def test_an_empty_store_teaches_nothing(tmp_path: Path) -> None:
    found = experience(str(tmp_path), LIKE)
    assert (found.trial_seconds, found.difference_sd, found.searched_share) == (None, None, None)


# What it can decide


@pytest.mark.parametrize("replicates", [3, 5, 10])
def test_the_smallest_difference_has_eighty_percent_power_by_the_noncentral_t(tmp_path: Path, replicates: int) -> None:
    plan = planned(tmp_path, workload="embedded", settings={}, replicates=replicates)
    assert plan.difference_sd is not None
    assert plan.detectable is not None
    df, ncp = replicates - 1, plan.detectable / plan.difference_sd * math.sqrt(replicates)
    limit = stats.t.ppf(0.975, df)
    power = stats.nct.sf(limit, df, ncp) + stats.nct.cdf(-limit, df, ncp)
    assert power == pytest.approx(0.8, abs=1e-3)
    assert f"{100 * plan.detectable:.1f} points" in text(plan)


def test_one_accuracy_s_standard_error_is_the_binomial_one(tmp_path: Path) -> None:
    assert planned(tmp_path).question_se == pytest.approx(stats.binom(QUESTIONS, 0.5).std() / QUESTIONS)


def test_a_budget_pays_for_whole_configurations_and_a_plan_warns_when_it_cannot_decide(tmp_path: Path) -> None:
    whole = planned(tmp_path, trials=5, replicates=3, **WHOLE)
    assert whole.hours is not None
    for share, arms in ((0.1, 0), (0.39, 1), (0.41, 2), (0.61, 3), (1.0, 5), (3.0, 5)):
        plan = planned(tmp_path, trials=5, replicates=3, budget_hours=share * whole.hours, **WHOLE)
        assert plan.affordable == arms
        assert any("the budget of" in line for line in plan.warnings) == (share < 1)
        assert any("cannot decide anything" in line for line in plan.warnings) == (arms < 2)
        assert all(f"warning: {line}" in text(plan) for line in plan.warnings)


def test_a_plan_warns_of_few_replicates_and_of_stages_that_no_step_reaches(tmp_path: Path) -> None:
    assert any("fewer than 3 replicates" in line for line in planned(tmp_path, replicates=2).warnings)
    assert not any("fewer than 3 replicates" in line for line in planned(tmp_path, replicates=3).warnings)
    stages = planned(tmp_path, settings={"noise": {"num_stages": 9}})
    assert any("noise.num_stages=9 is more than grpo.steps=6" in line for line in stages.warnings)


def test_a_plan_refuses_what_a_sweep_would_refuse(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--points e99: unknown point"):
        planned(tmp_path, points=("e99",))
    with pytest.raises(ConfigError, match="--trials 1: the control and the points are 3"):
        planned(tmp_path, trials=1, points=("e13i-baseline",))


def test_the_confirmation_that_follows_is_in_the_plan_with_its_time_and_hours(tmp_path: Path) -> None:
    plan = planned(tmp_path, cpus=2, workload="embedded", settings={}, trials=4, confirm_pairs=8)
    seconds = WORKLOADS["embedded"].trial_seconds
    assert (plan.study.runs, plan.confirm_runs, plan.confirm_seconds) == (4, 16, 8 * seconds)
    assert plan.hours == pytest.approx(4 * seconds / 3600), "the sweep's own apart"
    said = text(plan)
    assert "up to 8 pairs, 16 runs with fresh seeds and other questions: about 1.7 min and 0.06 hours more" in said
    assert forecast_line(plan).startswith("about 26 s and 1.7 min for the confirmation at most, 2 trials at once (13 s")
    assert "say undecided" not in said, "which is what the confirmation is for"
    alone = planned(tmp_path, cpus=2, workload="embedded", settings={}, trials=4)
    assert "confirmed" not in text(alone)
    assert forecast_line(alone).startswith("about 26 s at most, 2 trials at once")
    unknown = planned(tmp_path, settings={"grpo": {"steps": 3}}, confirm_pairs=8)
    assert (unknown.confirm_seconds, forecast_line(unknown)[:26]) == (None, "how long it takes is not k")
    assert "16 runs with fresh seeds and other questions (--no-confirm" in text(unknown)


def test_a_budget_that_does_not_pay_for_the_confirmation_is_told(tmp_path: Path) -> None:
    given: dict[str, Any] = {"workload": "embedded", "settings": {}, "trials": 4, "confirm_pairs": 8}
    whole = 20 * WORKLOADS["embedded"].trial_seconds / 3600
    warning = "the budget holds for the confirmation, too, and does not pay for all of it"
    assert warning in text(planned(tmp_path, budget_hours=0.9 * whole, **given))
    assert warning not in text(planned(tmp_path, budget_hours=whole, **given))

"""Rewards that know nothing of the task: what they give, what they leave alone, and that a sweep shows them beside
their control and never takes them for one, nor for the candidate."""

from pathlib import Path
from typing import Any

import pytest

from dashboards.options import SweepOptions, study_config
from dashboards.report_text import report_lines
from search.arms import candidate_of, control_for, is_negative, read_arms
from search.lineup import fixed_arms
from search.preflight import check_sources
from search.report import report_study
from spaces.config import ConfigError, TaskConfig
from spaces.errors import NoCandidate
from spaces.naming import describe_noise
from tests.conftest import Tiny
from tests.test_trial import FROZEN, comparable, finish
from tests.written_sweeps import make_arm, study, write_sweep
from trainable.negative_controls import check_reward, learned_from
from trainable.tasks.table import build_task
from trainable.tasks.task import Question
from trainable.trial import Trial

GSM8K = str(Path(__file__).parent / "data" / "gsm8k_small.jsonl")
NEGATIVE = "random-reward,format-reward"


def form_of(task: TaskConfig) -> Any:
    return build_task(task).form


@pytest.mark.parametrize(
    ("task", "known", "formed", "not_formed"),
    [
        (TaskConfig(), "168", ["168", "0", "7"], ["+168", "-3", "007", "1 68", "168 ", "", "16a", "\u0661"]),
        (
            TaskConfig(name="gsm8k", path=GSM8K),
            "42",
            ["so #### 42", "#### 7", "I guess\n#### -1,234.5"],
            ["42", "#### 42 apples", "####", "#### 1,2"],
        ),
        (
            TaskConfig(name="reasoning_gym:chain_sum"),
            "42",
            ["42", " 7\n", "let me see\n<answer>9</answer>"],
            ["it is 42", "1\n2", "", "<answer></answer>", "forty"],
        ),
        (TaskConfig(name="reasoning_gym:letter_jumble"), "cat", ["dog", "a cat"], ["dog\ncat", ""]),
    ],
    ids=["addition", "gsm8k", "numbers", "words"],
)
def test_well_formed_is_what_each_task_says_right_or_wrong(
    task: TaskConfig, known: str, formed: list[str], not_formed: list[str]
) -> None:
    form, question = form_of(task), Question(prompt="?", answer=known)
    assert [form(question, text) for text in formed] == [1.0] * len(formed)
    assert [form(question, text) for text in not_formed] == [0.0] * len(not_formed)


def test_a_right_answer_is_well_formed() -> None:
    for task in (build_task(TaskConfig()), build_task(TaskConfig(name="reasoning_gym:chain_sum"))):
        assert task.form is not None
        for question in task.sample(20, seed=0, step=0, batch=0):
            assert task.form(question, question.answer) == 1.0


def test_a_task_that_does_not_say_has_no_reward_for_form() -> None:
    task = build_task(TaskConfig())
    task.form = None
    with pytest.raises(ConfigError, match=r"grpo\.reward=format: task addition does not say .*; choose random or task"):
        check_reward("format", task)
    check_reward("random", task)


# --- in a trial -------------------------------------------------------------------------------------------------------


def groups_of(trial: Trial, step: int = 0, batch: int = 0) -> list[Any]:
    return trial._generate(step, batch, 12)


@pytest.fixture(scope="module")
def trials(tiny: Tiny) -> dict[str, Trial]:
    quiet = ("noise.sigma_start=0", "grpo.group_size=8", "grpo.prompts=12")
    return {reward: Trial(tiny(*quiet, f"grpo.reward={reward}")) for reward in ("task", "random", "format")}


def test_only_the_reward_changes_and_what_is_correct_is_the_tasks_word(trials: dict[str, Trial]) -> None:
    def apart_from_the_reward(groups: list[Any]) -> list[Any]:
        return [(e.text, e.score.correct, dict(e.score.parts)) for group in groups for e in group]

    task, coin, form = (groups_of(trial) for trial in trials.values())
    assert apart_from_the_reward(task) == apart_from_the_reward(coin) == apart_from_the_reward(form)
    assert all(e.score.reward == float(e.score.correct) for group in task for e in group)
    assert [e.score.reward for group in form for e in group] == [float(e.text.isdigit()) for g in form for e in g]
    assert any(e.score.reward > e.score.correct for group in form for e in group), "wrong and well-formed"


def test_coins_are_fair_and_named_by_seed_step_batch_prompt_and_sample(trials: dict[str, Trial]) -> None:
    """Each of the five names changes half of them; the answer none."""
    task, groups = trials["random"].task, groups_of(trials["random"]) * 40

    def coins(*draw: int) -> list[float]:
        return [e.score.reward for group in learned_from("random", groups, task, draw) for e in group]

    first = coins(0, 0, 0)
    count = len(first)
    assert count == 12 * 8 * 40
    assert sum(first) == pytest.approx(count / 2, abs=4 * count**0.5 / 2)
    assert first == coins(0, 0, 0)
    for draw in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        same = sum(a == b for a, b in zip(first, coins(*draw), strict=True))
        assert same == pytest.approx(count / 2, abs=4 * count**0.5 / 2)
    of_right = [reward for reward, e in zip(first, (e for g in groups for e in g), strict=True) if e.score.correct]
    assert 0.4 < sum(of_right) / len(of_right) < 0.6
    answers = [tuple(reversed(group)) for group in groups]  # other answers at the same places
    assert [e.score.reward for g in learned_from("random", answers, task, (0, 0, 0)) for e in g] == first


def test_evaluation_and_logged_correctness_do_not_know_of_it(tiny: Tiny) -> None:
    """Nothing is learned at a rate of nothing, so all that is not the reward must be equal."""
    signals = {}
    for reward in ("task", "random", "format"):
        trial = Trial(tiny("grpo.steps=1", "noise.num_stages=1", *FROZEN, f"grpo.reward={reward}", "eval.samples=2"))
        without = ("grpo/reward", "grpo/reward_std", "grpo/grad_norm", "grpo/loss", "filter/all_wrong")
        reports = [comparable(report, without=(*without, "filter/all_right")) for report in finish(trial)]
        for report in reports:
            report["samples"] = [sample.completion for sample in report["samples"]]
        signals[reward] = reports, trial.outcome().eval
    assert signals["task"] == signals["random"] == signals["format"]


# --- in a sweep -------------------------------------------------------------------------------------------------------


def arms_of(tmp_path: Path, *overrides: str, points: str = NEGATIVE) -> dict[str, Any]:
    options = SweepOptions(points=points, store=str(tmp_path), workload="tiny", overrides=list(overrides))
    return {arm.name: arm for arm in fixed_arms(study_config(options))}


def test_negative_controls_are_points_beside_the_ordinary_control(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, points=f"{NEGATIVE},e13m-rmsnorm,bf16")
    controls = {name for name, arm in arms.items() if arm.origin == "control"}
    assert controls == {"control", "control-resample", "bf16"}
    for name in NEGATIVE.split(","):
        assert is_negative(arms[name])
        control = control_for(arms[name], list(arms.values()))
        assert control is arms["control"]
        assert (control.config.grpo.reward, arms[name].config.noise.sigma_start) == ("task", 0.0)
    noisy = control_for(arms["e13m-rmsnorm"], list(arms.values()))
    assert noisy is arms["control-resample"]


def test_under_another_filter_they_bring_a_control_that_learns_from_the_task(tmp_path: Path) -> None:
    point = tmp_path / "filtered.yaml"
    point.write_text("noise: {sigma_start: 0}\ngrpo: {reward: random, filter_groups: drop}\n")
    arms = arms_of(tmp_path, points=str(point))
    control = control_for(arms["filtered"], list(arms.values()))
    assert control is arms["control-drop"]
    assert control.config.grpo.reward == "task"


def test_noise_under_another_reward_is_compared_with_that_reward_without_noise(tmp_path: Path) -> None:
    point = tmp_path / "both.yaml"
    point.write_text("noise: {sigma_start: 0.05, sigma_end: 0.01}\ngrpo: {reward: random}\n")
    arms = arms_of(tmp_path, points=str(point))
    control = control_for(arms["both"], list(arms.values()))
    assert control is not None
    assert (control.name, control.config.grpo.reward) == ("control-random-reward", "random")


def test_where_the_whole_sweep_learns_from_a_coin_its_control_does_too(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, "grpo.reward=random", points="e13i-v3,bf16")
    assert {arm.config.grpo.reward for arm in arms.values()} == {"random"}
    assert not any(map(is_negative, arms.values()))


def test_a_negative_control_is_reported_and_is_never_the_candidate(tmp_path: Path) -> None:
    config = study(tmp_path, trials=4, replicates=3)
    quiet = ("noise.sigma_start=0",)
    arms = [
        make_arm(config, "control"),
        make_arm(config, "random-reward", *quiet, "grpo.reward=random"),
        make_arm(config, "format-reward", *quiet, "grpo.reward=format"),
        make_arm(config, "c01"),
    ]
    right = {"control": [300, 301, 302], "random-reward": [100, 101, 99], "format-reward": [380, 390, 385]}
    write_sweep(config, arms, {**right, "c01": [200, 210, 205]})
    report = report_study(config)
    rows = {row.arm: row for row in report.arms}
    assert rows["random-reward"].control == rows["format-reward"].control == "control"
    assert rows["format-reward"].verdict.startswith("ahead")
    assert candidate_of(config, read_arms(config)).arm.name == "c01"
    assert [row.arm for row in report.arms if row.candidate] == ["c01"]
    assert candidate_of(config, read_arms(config), "format-reward").arm.name == "format-reward", "it can be asked for"
    lines = report_lines(report)
    assert (
        "format-reward: negative control, format reward: +71.2 points since its start, control +50.2: "
        "so much of a gain needs no task reward"
    ) in lines
    assert sum("negative control" in line for line in lines) == 2
    assert describe_noise(arms[2].config) == "none, format reward"


def test_a_sweep_of_negative_controls_alone_has_no_candidate(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=1)
    arms = [make_arm(config, "control"), make_arm(config, "random-reward", "noise.sigma_start=0", "grpo.reward=random")]
    write_sweep(config, arms, {"control": [300], "random-reward": [390]})
    with pytest.raises(NoCandidate):
        candidate_of(config, read_arms(config))


def test_a_task_that_does_not_say_what_is_well_formed_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = arms_of(tmp_path)

    def formless(config: TaskConfig) -> Any:
        task = build_task(config)
        task.form = None
        return task

    monkeypatch.setattr("search.preflight.build_task", formless)
    config = study_config(SweepOptions(points=NEGATIVE, store=str(tmp_path), workload="tiny"))
    with pytest.raises(ConfigError, match=r"grpo\.reward=format"):
        check_sources(config, list(arms.values()))

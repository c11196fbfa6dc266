"""Two sweeps side by side: matched by what arms did, judged by seed where seeds are shared, silent where nothing may be
said."""

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from dashboards.page import page, read_material
from dashboards.side_by_side_text import side_by_side_lines, side_by_side_table
from search.arms import read_arms, trial_folder
from search.side_by_side import QUESTIONS, REWARDS, Pair, SideBySide, read_side, side_by_side, sides_of
from search.statistics import compare_groups
from search.store import StudyConfig
from spaces.config import ConfigError, EvalConfig, TaskConfig
from spaces.library import SPACES
from tests.written_sweeps import attempt, make_arm, outcome, scores, study, write_sweep, write_trial
from trainable import versions as versions_module
from trainable.disk.trial_folder import AttemptLog, read_attempts
from trainable.versions import versions

Rin = Callable[..., tuple[int, str, str]]
PLAIN = {"control": [250, 255, 260, 252, 249], "c03": [260, 262, 264, 266, 259]}
NOISY = {"control": [240, 245, 238, 239, 249], "x1": [260, 258, 264, 261, 263]}


def swept(
    store: Path,
    name: str,
    right: Mapping[str, Sequence[Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Sequence[str]] | None = None,
    **changes: Any,
) -> StudyConfig:
    """Arms by their names; those of the searcher have a sigma of 0.01 unless `overrides` says another."""
    tree = {"eval": {"questions": 400}, **(settings or {})}
    config = study(store, name=name, trials=max(1, len(right)), settings=tree, **{"replicates": 5, **changes})
    arms = [
        make_arm(config, arm, *(overrides or {}).get(arm, ()), origin="control" if "control" in arm else "searcher")
        for arm in right
    ]
    write_sweep(config, arms, right)
    return config


def of(seen: SideBySide, here: str, there: str) -> Pair:
    (found,) = [pair for pair in seen.pairs if (pair.here, pair.there) == (here, there)]
    return found


def apart(right: Mapping[str, Sequence[int]], arm: str) -> list[float]:
    return [(a - b) / 400 for a, b in zip(right[arm], right["control"], strict=True)]


# --- what is said -----------------------------------------------------------------------------------------------------


def test_same_seeds_pair_the_difference_of_differences(tmp_path: Path) -> None:
    here = swept(tmp_path, "a", PLAIN, settings={"quant": {"activations": "none"}})
    there = swept(tmp_path, "b", NOISY)
    seen = sides_of(here, there)
    assert seen.settings == {"quant.activations": ("none", "mxfp4")}
    assert [(pair.here, pair.there, pair.paired) for pair in seen.pairs] == [
        ("control", "control", True),
        ("c03", "x1", True),
    ]
    between = of(seen, "c03", "x1").between
    oracle = stats.ttest_rel(apart(NOISY, "x1"), apart(PLAIN, "c03"))
    both = oracle.confidence_interval(1 - 0.05 / 2)  # of two pairs
    assert between is not None
    assert (between.difference, between.low, between.high) == pytest.approx((0.025, both.low, both.high))
    controls = of(seen, "control", "control").between
    plain = stats.ttest_rel([n / 400 for n in NOISY["control"]], [n / 400 for n in PLAIN["control"]])
    assert controls is not None
    assert controls.low == pytest.approx(plain.confidence_interval(1 - 0.05 / 2).low)
    assert seen.here.own["c03"].difference == pytest.approx(np.mean(apart(PLAIN, "c03")))


def test_other_seeds_are_two_groups(tmp_path: Path) -> None:
    here, there = swept(tmp_path, "a", PLAIN), swept(tmp_path, "b", NOISY, seed=100)
    pair = of(sides_of(here, there), "c03", "x1")
    oracle = stats.ttest_ind(apart(NOISY, "x1"), apart(PLAIN, "c03"), equal_var=False)
    both = oracle.confidence_interval(1 - 0.05 / 2)
    assert pair.between is not None
    assert not pair.paired
    assert (pair.between.low, pair.between.high) == pytest.approx((both.low, both.high))


def test_a_model_of_another_kind_is_never_paired_by_seed(tmp_path: Path) -> None:
    here, there = swept(tmp_path, "a", PLAIN), swept(tmp_path, "b", NOISY, settings={"model": {"dtype": "bfloat16"}})
    seen = sides_of(here, there)
    assert list(seen.settings) == ["model.dtype"]
    assert [pair.paired for pair in seen.pairs] == [False, False]


def test_groups_cover_what_questions_and_runs_leave_open() -> None:
    """Both arms are the same but for luck: with questions that suit one of them for all its runs, Welch's interval of
    the accuracies alone is wrong far too often."""
    draw = np.random.default_rng(0)
    wrong = welch = 0
    for _ in range(300):
        groups = []
        for runs in (4, 6):
            chance = 0.5 + draw.normal(0, 0.3, 60)[None] + draw.normal(0, 0.02, (runs, 1))
            groups.append((draw.random((runs, 60)) < chance).astype(float))
        a, b = (group.mean(axis=1) for group in groups)
        seen = compare_groups(a, b, answers=(groups[0], groups[1]))
        wrong += not seen.low <= 0 <= seen.high
        welch += bool(stats.ttest_ind(a, b, equal_var=False).pvalue < 0.05)
    assert wrong / 300 < 0.08
    assert welch / 300 > 0.15


def test_runs_that_hardly_differ_get_no_absurd_interval() -> None:
    """All runs have the same accuracy, and what questions share is barely above zero: an interval of several points,
    and never the whole scale. Where questions share nothing it is what two answers leave open."""
    draw, widths = np.random.default_rng(0), []
    chance = draw.beta(1.2, 1, 400)
    for _ in range(60):
        draws = chance + draw.gumbel(0, 0.2, (2, 3, 400))
        groups = (draws > np.quantile(draws, 0.4, axis=2, keepdims=True)).astype(float)
        seen = compare_groups(*groups.mean(axis=2), answers=(groups[0], groups[1]))
        assert seen.df is not None
        assert seen.df >= 2
        widths.append(seen.high - seen.low)
    assert max(widths) < 0.15
    assert min(widths) == pytest.approx(2 * stats.t.ppf(0.975, 399) * np.sqrt(2) / 400)


def test_groups_of_one_run_and_groups_that_agree_in_all_say_nothing_for_sure() -> None:
    one = compare_groups([0.5], [0.7, 0.6], answers=([[0, 1]], [[1, 0], [0, 1]]))
    assert (one.verdict, one.low, one.high) == ("undecided", -np.inf, np.inf)
    same = compare_groups([0.5, 0.5], [0.5, 0.5], answers=([[0, 1], [0, 1]], [[0, 1], [0, 1]]))
    assert same.low < -0.5 < 0.5 < same.high, "two questions"
    with pytest.raises(ValueError, match="needs finite runs"):
        compare_groups([np.nan], [0.5], answers=([[1]], [[0]]))


# --- who is matched ---------------------------------------------------------------------------------------------------


def test_arms_are_matched_by_what_they_did_and_never_by_their_name(tmp_path: Path) -> None:
    runs = [250, 252, 254, 256, 258]
    arms = {"control": runs, "c01": runs, "c02": runs, "c03": runs}
    here = swept(
        tmp_path,
        "a",
        arms,
        overrides={"c02": ["noise.sigma_start=0.02"], "c03": ["grpo.learning_rate=1e-5"]},
    )
    there = swept(
        tmp_path,
        "b",
        arms,
        settings={"eval": {"questions": 400}, "grpo": {"filter_groups": "drop"}},
        overrides={
            "c01": ["noise.sigma_start=0.02"],
            "c02": ["noise.modules=[linear]"],
            "c03": ["noise.sigma_end=0.002"],
        },
    )
    seen = sides_of(here, there)
    assert [(pair.here, pair.there) for pair in seen.pairs] == [("control", "control"), ("c02", "c01")]
    assert seen.alone == (("c01", "c03"), ("c02", "c03"))
    assert set(of(seen, "c02", "c01").settings) == {"grpo.filter_groups"}


def test_an_arm_that_is_what_the_other_sweep_is_as_a_whole_is_the_same_configuration_there(tmp_path: Path) -> None:
    """A point that takes the activations' 4 bits away, and a sweep that has none: the pair differs in nothing."""
    runs = [250, 252, 254, 256, 258]
    bits = ["quant.activations=none"]
    here = swept(
        tmp_path,
        "a",
        {"control": runs, "control-w4a16": runs, "c01": runs, "c02": runs},
        overrides={"control-w4a16": bits, "c02": bits},
    )
    there = swept(tmp_path, "b", {"control": runs, "c01": runs}, settings={"quant": {"activations": "none"}})
    seen = sides_of(here, there)
    assert {(pair.here, pair.there): list(pair.settings) for pair in seen.pairs} == {
        ("control", "control"): ["quant.activations"],
        ("control-w4a16", "control"): [],
        ("c01", "c01"): ["quant.activations"],
        ("c02", "c01"): [],
    }
    assert of(seen, "c02", "c01").note.startswith("the same configuration, seeds and answers")
    below = side_by_side_lines(seen)[1]
    assert "c02 = c01: the very same configuration in both" in below


def test_a_setting_that_changes_nothing_in_one_of_them_parts_no_pair(tmp_path: Path) -> None:
    """Without a format nothing comes after the rounding of weights."""
    runs, linear = [250, 252, 254, 256, 258], "noise.modules=[linear]"
    exact = {"quant": {"weights": "none", "activations": "none"}}
    here = swept(
        tmp_path,
        "a",
        {"control": runs, "c01": runs},
        settings=exact,
        overrides={"c01": [linear, "noise.placement=after"]},
    )
    there = swept(tmp_path, "b", {"control": runs, "c01": runs}, overrides={"c01": [linear]})
    assert set(of(sides_of(here, there), "c01", "c01").settings) == {"quant.weights", "quant.activations"}


# --- where nothing may be said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"settings": {"eval": {"questions": 200}}}, "different questions (eval.questions 400 and 200)"),
        ({"settings": {"task": {"digits": 1}}}, "different questions (task.digits 2 and 1)"),
        (
            {
                "settings": {
                    "eval": {"questions": 400},
                    "task": {"name": "reasoning_gym", "options": {"min_terms": 2}},
                    "model": {"name": "folder", "recipe": None},
                }
            },
            "task.options.min_terms None and 2)",
        ),
        ({"objectives": ("pass@4",), "settings": {"eval": {"questions": 400, "samples": 4}}}, "different measures"),
    ],
)
def test_other_questions_and_another_measure_are_not_compared(tmp_path: Path, changes: Any, why: str) -> None:
    small = {arm: [120, 125, 130, 122, 119] for arm in NOISY}
    seen = sides_of(swept(tmp_path, "a", PLAIN), swept(tmp_path, "b", small, **changes))
    assert len(seen.pairs) == 2
    for pair in seen.pairs:
        assert pair.between is None
        assert why in pair.note
    assert seen.here.own["c03"].difference == pytest.approx(np.mean(apart(PLAIN, "c03"))), "its own stands"


TRL = {"name": "trl", "path": ("rows.jsonl",), "reward": ("r.py:f",), "reward_sha256": ("0" * 64,)}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"reward": ("other.py:f",)}, "task.reward ['r.py:f'] and ['other.py:f']"),
        ({"reward_sha256": ("1" * 64,)}, f"task.reward_sha256 ['{'0' * 64}'] and ['{'1' * 64}']"),
        ({"reward_options": {"penalty": 0.1}}, "task.reward_options.penalty None and 0.1"),
        ({"correct_at": 0.5}, "task.correct_at 1.0 and 0.5"),
    ],
)
def test_answers_that_are_right_by_different_rewards_are_not_compared(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    tree: dict[str, Any] = {"eval": {"questions": 400}, "model": {"name": "folder", "recipe": None}}
    here = swept(tmp_path, "a", PLAIN, settings={**tree, "task": TRL})
    there = swept(tmp_path, "b", NOISY, settings={**tree, "task": {**TRL, **change}})
    seen = sides_of(here, there)
    assert [(pair.between, pair.note) for pair in seen.pairs] == [(None, f"judged by different rewards ({why})")] * 2
    assert f"judged by different rewards ({why})" in "\n".join(side_by_side_lines(seen)[1])


def test_a_reward_that_is_only_learned_from_parts_no_pair_of_a_task_with_its_own_mark(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"eval": {"questions": 400}}
    settings = [{**tree, "task": {"reward": (f"{name}.py:f",)}} for name in "rs"]
    sides = [swept(tmp_path, name, PLAIN, settings=one) for name, one in zip("ab", settings, strict=True)]
    assert all(pair.between is not None and list(pair.settings) == ["task.reward"] for pair in sides_of(*sides).pairs)


def test_where_long_questions_are_left_out_another_limit_is_other_questions(tmp_path: Path) -> None:
    for number, (too_long, compared) in enumerate([("error", True), ("leave_out", False)]):
        tree = {"eval": {"questions": 400}, "task": {"too_long": too_long}}
        limits: list[dict[str, Any]] = [{**tree, "rollout": {"max_prompt_tokens": limit}} for limit in (64, 32)]
        sides = [swept(tmp_path, f"{number}{k}", PLAIN, settings=limit) for k, limit in enumerate(limits)]
        assert [pair.between is not None for pair in sides_of(*sides).pairs] == [compared] * 2


def test_of_every_setting_of_a_task_it_is_known_whether_another_value_is_another_yardstick() -> None:
    """A new one belongs in a list of the module, or here: what is learned from, how rewards are run, how a question is
    put to the model (which may be what is compared)."""
    no_yardstick = {"reward_weights", "reward_timeout_seconds", "reward_check"}
    no_yardstick |= {"prompt", "chat", "chat_options", "chat_date"}
    of_evaluation = {"every", "samples", "batch_size"}  # a measure by samples is in the measure's name
    for part, model, others in (("task", TaskConfig, no_yardstick), ("eval", EvalConfig, of_evaluation)):
        listed = {key.partition(".")[2] for key in (*QUESTIONS, *REWARDS) if key.startswith(f"{part}.")}
        assert not listed & others
        assert listed | others == set(model.model_fields)


def odd(store: Path) -> dict[str, StudyConfig]:
    """Sweeps of which something is wrong or missing, by what it is."""
    made = {
        "collapsed": swept(store, "collapsed", {"control": [("collapsed", 20)] * 5, "c01": [("collapsed", 10)] * 5}),
        "one": swept(store, "one", {"control": [250]}, replicates=1),
        "uncontrolled": swept(store, "uncontrolled", {"c01": [250, 251, 252]}),
        "unfinished": swept(store, "unfinished", {"control": [250, None], "c01": [None]}),
        "empty": swept(store, "empty", {}, total=2),
        "program": swept(store, "program", PLAIN, kind="program", total=40),
        "nan": swept(store, "nan", {"control": [250] * 5, "c01": []}),
        "confirm": swept(
            store,
            "confirm",
            {"control": [250, 251, 252], "c01": [260, 262, 261]},
            kind="confirm",
            parent="a",
            looks=(3,),
            settings={"eval": {"questions": 400, "split": "confirm", "draw": "x"}},
            replicates=3,
        ),
    }
    arm = read_arms(made["nan"])[1]
    for replicate in range(5):
        ended = outcome(arm, replicate, 200)
        write_trial(made["nan"], arm, replicate, replace(ended, eval=scores(ended.eval.correct, accuracy=float("nan"))))
    return made


def test_odd_sweeps_get_sentences_and_never_a_trace(tmp_path: Path) -> None:
    plain = swept(tmp_path, "a", {"control": PLAIN["control"], "c01": PLAIN["c03"]})
    said = {}
    for name, config in odd(tmp_path).items():
        seen = sides_of(plain, config)
        above, below = side_by_side_lines(seen)
        said[name] = "\n".join([*above, *below, *(pair.note for pair in seen.pairs)])
        assert "not a confirmation" in said[name]
    assert "uncontrolled has no control" in said["uncontrolled"]
    assert "unfinished: " in said["unfinished"]
    assert "have no outcome yet" in said["unfinished"]
    assert "nothing to compare" in said["empty"]
    assert "programme, which has rules of its own: rin program report --name program" in said["program"]
    assert "c01 of nan has no run that ended with a number" in said["nan"]
    assert "different questions (" in said["confirm"]
    assert "eval.split selection and confirm" in said["confirm"]


def test_a_copy_of_a_sweep_is_called_a_copy(tmp_path: Path) -> None:
    here = swept(tmp_path, "a", PLAIN)
    there = swept(tmp_path, "b", PLAIN, id=here.id)
    assert "b is a copy of a: these are the same runs" in sides_of(here, there).cautions
    with pytest.raises(ConfigError, match="OTHER=a: is the same sweep"):
        sides_of(here, here)


# --- the command ------------------------------------------------------------------------------------------------------


def test_report_sets_two_sweeps_beside_each_other_and_drops_no_option(rin: Rin, tmp_path: Path) -> None:
    store = tmp_path / "runs"
    swept(store, "a", PLAIN, settings={"quant": {"activations": "none"}})
    swept(
        store, "b", {**NOISY, "x9": [None] * 5}, overrides={"x9": ["noise.sigma_start=0.09"]}, space=SPACES["targets"]
    )
    code, out, err = rin("report", "a", "b")
    assert (code, err) == (0, "")
    for words in (
        "quant.activations: none | mxfp4",
        "space: sigma | targets",
        "c03 = x1",
        "only in B",
        "paired by seed",
    ):
        assert words in out
    code, out, _ = rin("report", "a", "b", "--json")
    tree = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [pair["verdict"] for pair in tree["pairs"]] == ["undecided, needs about 3 more replicates"] * 2
    assert tree["only_b"] == ["x9"]
    for option in (["--html"], ["--figures", "f"], ["--csv", "c"]):
        code, _, err = rin("report", "a", "b", *option)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{option[0]}: is made of one sweep; leave b out" in err
    assert rin("report", "a", "nobody")[0] == 2


def test_a_narrow_terminal_cuts_no_number(tmp_path: Path) -> None:
    here = swept(
        tmp_path, "a", {**PLAIN, "c04": [("collapsed", 100)] * 5}, overrides={"c04": ["noise.sigma_start=0.03"]}
    )
    seen = sides_of(
        here,
        swept(
            tmp_path,
            "b",
            {**NOISY, "x2": [250, 255, None, None, None]},
            seed=100,
            overrides={"x2": ["noise.sigma_start=0.04"]},
        ),
    )
    said = StringIO()
    Console(file=said, width=80).print(side_by_side_table(seen))
    assert "…" not in said.getvalue()
    cells = " ".join(said.getvalue().replace("│", " ").split())
    for words in ("65.5 %", "+2.3", "5 of 5", "2 of 5 runs", "only in A"):
        assert words in cells


# --- versions ---------------------------------------------------------------------------------------------------------


def test_an_attempt_writes_down_which_programs_ran_it(tmp_path: Path) -> None:
    config = swept(tmp_path, "a", {"control": []})
    AttemptLog(trial_folder(config, "control", 0))
    (seen,) = read_attempts(trial_folder(config, "control", 0))
    assert seen.versions == versions()
    assert {"python", "rin-search", "torch", "transformers"} <= seen.versions.keys()
    assert f"torch {versions()['torch']}" in page(read_material(config))


def test_the_commit_of_a_checkout_is_read_without_a_write_into_it(tmp_path: Path) -> None:
    """A file with another time and the same content is what makes git write the index anew."""

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert versions_module._commit(tmp_path) == "", "no checkout"
    git("init", "-q")
    assert versions_module._commit(tmp_path) == "", "nothing committed"
    file, index = tmp_path / "a.py", tmp_path / ".git" / "index"
    file.write_text("1")
    git("add", ".")
    git("commit", "-qm", "x")
    (tmp_path / "untracked").write_text("1")
    os.utime(file, (1e9, 1e9))
    before = index.read_bytes()
    assert versions_module._commit(tmp_path) == git("rev-parse", "HEAD")[:12]
    assert index.read_bytes() == before
    file.write_text("2")
    assert versions_module._commit(tmp_path) == git("rev-parse", "HEAD")[:12] + "-dirty"


def test_versions_that_differ_are_said_and_one_that_is_not_known_too(tmp_path: Path) -> None:
    here, there = (swept(tmp_path, name, {"control": [250]}, replicates=1) for name in "ab")
    assert sides_of(here, there).cautions == tuple(
        f"{name} did not write down the versions that it ran with" for name in "ab"
    )
    for config, torch in ((here, "2.12.0"), (there, "2.13.0")):
        (arm,) = read_arms(config)
        told = attempt(versions={"python": "3.11.7", "torch": torch})
        write_trial(config, arm, 0, None, attempts=[told, attempt(versions={"python": "3.11.7", "torch": "2.14.0"})])
    seen = side_by_side(read_side(here), read_side(there))
    assert seen.versions == {"torch": ("2.12.0 and 2.14.0", "2.13.0 and 2.14.0")}
    assert seen.cautions == ()

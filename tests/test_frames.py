"""Frames of a sweep: the numbers of its files and of its report, whatever lies in its folder."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from dashboards import frames as frames_module
from dashboards.cli import app
from dashboards.frames import COLUMNS, Sweep, frames_of, load, meaning, write_csv
from dashboards.page import read_material
from dashboards.report_text import as_tree, confirmation_tree
from dashboards.tables import curve_rows, finite
from search.arms import read_arms, trial_folder
from search.confirm import planned_confirmation, read_confirmation
from search.report import report_study
from search.store import StudyConfig, save_study_config
from spaces.errors import ConfigError
from tests.drawn_sweeps import drawn_sweep, steps_of
from tests.test_curves import written as sampled_sweep
from tests.test_page import ODD, all_collapsed
from tests.written_programs import finished, small
from tests.written_sweeps import attempt, make_arm, outcome, study, write_sweep, write_trial
from trainable.disk.trial_folder import read_reports
from trainable.metrics import METRICS


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    return drawn_sweep(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def sweep(config: StudyConfig) -> Sweep:
    return load(config.name, store=config.store)


def told(row: Any) -> dict[str, Any]:
    """A comparison of a frame as JSON tells it."""
    names = ("difference", "low", "high", "p", "replicates", "needs", "unpaired")
    return {name: None if pd.isna(row[name]) else finite(float(row[name])) for name in names}


def kept(tree: Any) -> dict[str, Any]:
    return {name: None if value is None else float(value) for name, value in tree.items() if name != "verdict"}


# Numbers


def test_comparisons_are_those_of_rin_report_number_by_number(sweep: Sweep, config: StudyConfig) -> None:
    tree: Any = as_tree(report_study(config))
    compared = {arm["arm"]: arm for arm in tree["arms"] if arm["comparison"] is not None}
    assert len(compared) == 6
    assert sweep.comparisons.arm.tolist() == list(compared)
    for _, row in sweep.comparisons.iterrows():
        arm = compared[row.arm]
        assert told(row) == kept(arm["comparison"])
        assert (row.judged_by, row.main, row.control) == ("sweep", True, arm["control"])
        assert (row.words, row.verdict) == (arm["verdict"], arm["finding"]["verdict"])
        assert row.risk_high == arm["finding"]["risk_high"]


def test_paired_differences_by_hand_are_those_of_the_report(sweep: Sweep) -> None:
    scores = sweep.trials[sweep.trials.counted].pivot(index="seed", columns="arm", values="score")
    for _, row in sweep.comparisons.iterrows():
        assert (scores[row.arm] - scores[row.control]).mean() == pytest.approx(row.difference, abs=1e-12)


def test_controls_and_pass_at_k_are_compared_as_the_report_compares_them(tmp_path: Path) -> None:
    config = sampled_sweep(tmp_path)
    sampled, report = load("s", str(tmp_path)), report_study(config)
    beside = sampled.comparisons[~sampled.comparisons.main].set_index(["arm", "measure"])
    rows = [row for row in curve_rows(report.arms) if row["difference"] is not None]
    assert len(rows) == len(beside) == 6
    for row in rows:
        seen = beside.loc[(row["arm"], f"pass@{row['k']}")]
        assert (seen.difference, finite(seen.low), finite(seen.high), seen.words) == (
            *(row["difference"], row["difference_low"], row["difference_high"]),
            row["verdict"],
        )
    trials = sampled.trials.groupby("arm")["eval/pass_at_2"].mean()
    assert {row["arm"]: row["share"] for row in curve_rows(report.arms) if row["k"] == 2} == pytest.approx(dict(trials))

    two = study(tmp_path, name="two", replicates=3)
    arms = [make_arm(two, "control"), make_arm(two, "control-bf16", "quant.weights=none", "quant.activations=none")]
    write_sweep(two, arms, {"control": [200, 204, 207], "control-bf16": [220, 222, 230]})
    (pair,) = as_tree(report_study(two))["controls"]  # type: ignore[misc, attr-defined]
    (row,) = [row for _, row in load("two", str(tmp_path)).comparisons.iterrows()]
    named = {"control": row.arm, "other": row.control}
    assert {**named, **told(row)} == {**named, **kept({k: v for k, v in pair.items() if k in told(row)})}
    assert (row.judged_by, row.verdict, pair["control"]) == ("controls", "", row.arm)


def test_a_confirmation_says_what_it_found_and_only_it_says_better(tmp_path: Path) -> None:
    base = study(tmp_path, replicates=8, trials=2)
    arms = [make_arm(base, "control"), make_arm(base, "better")]
    write_sweep(base, arms, {"control": [200, 204] * 4, "better": [260, 263] * 4})
    confirmation, again = planned_confirmation(base, (5, 8))
    write_sweep(confirmation, again, {"control": [200, 204, 201, 207, 203], "better": [260, 263, 255, 260, 262]})
    (row,) = [row for _, row in load("s-confirm", str(tmp_path)).comparisons.iterrows()]
    tree: Any = confirmation_tree(read_confirmation(confirmation))
    assert told(row) == kept(tree["comparison"])
    assert (row.judged_by, row.verdict, row.words) == ("confirmation", "better where it holds", tree["words"])
    said = load("s", str(tmp_path)).comparisons.set_index("judged_by")
    assert said.verdict.to_dict() == {"sweep": "ahead where it holds", "confirmation": "better where it holds"}
    assert said.loc["confirmation"].difference == row.difference
    assert "better" in load("s", str(tmp_path)).answer
    assert load(store=str(tmp_path)).name == "s", "the newest that is no confirmation"


def test_a_programme_is_judged_by_its_own_rules(tmp_path: Path) -> None:
    def found(name: str, right: dict[str, int]) -> pd.DataFrame:
        """`right`: of each arm's first replicate; each further one has one more right."""
        (tmp_path / name).mkdir()
        gain = lambda arm, number: right.get(arm, 300) + (number if right.get(arm, 0) >= 0 else 0)  # noqa: E731
        config = finished(tmp_path / name, small(tmp_path), gain)
        comparisons = load(config.name, config.store).comparisons
        assert set(comparisons.judged_by) == {"programme"}
        return comparisons.set_index("experiment")

    held = found("held", {"control": 280})
    assert len(held) > 1
    assert held.difference.tolist() == pytest.approx([20 / 400] * len(held))
    assert set(held.verdict) == {"better"}
    broken = found("broken", {"control": 280, "small": -60}).loc["small"]
    assert (broken.words, broken.replicates, math.isnan(broken.difference)) == ("collapsed", 0, True)


def test_trials_steps_completions_and_effects_are_those_of_the_files(sweep: Sweep, config: StudyConfig) -> None:
    arms = read_arms(config)
    outcomes = [(arm.name, number, outcome) for arm in arms for number, outcome in arm.results.items()]
    trials = sweep.trials.set_index(["arm", "replicate"])
    assert len(trials) == len(outcomes) == 21
    for arm, number, ended in outcomes:
        row = trials.loc[(arm, number)]
        assert (row.status, row.steps_done, row.seed) == (ended.outcome, ended.step, number)
        assert row["eval/accuracy"] == row.score == ended.eval.accuracy
        reports = read_reports(trial_folder(config, arm, number))
        steps = sweep.steps[(sweep.steps.arm == arm) & (sweep.steps.replicate == number)]
        assert steps["gen/entropy"].tolist() == [report.signals["gen/entropy"] for report in reports]
        assert steps["rin/sigma"].tolist() == [report.sigma for report in reports]
        texts = sweep.completions[(sweep.completions.arm == arm) & (sweep.completions.replicate == number)]
        assert texts.completion.tolist() == [sample.completion for report in reports for sample in report.samples]
        effects = sweep.effects[(sweep.effects.arm == arm) & (sweep.effects.replicate == number)]
        assert effects.sigma_applied.tolist() == [effect.applied for effect in ended.receipt.effects]
        assert effects.sigma_nominal.tolist() == [effect.nominal for effect in ended.receipt.effects]
        assert row.evidence == (reports[-1].verdict.evidence if ended.collapsed else "")
    assert sweep.steps.time.iloc[28] == pd.Timestamp(28, unit="ms", tz="UTC")
    assert len(sweep.steps) == trials.steps_done.sum()
    assert len(sweep.effects) > 200


def test_arms_have_their_noise_and_whatever_differs(tmp_path: Path) -> None:
    config = study(tmp_path, replicates=1)
    arms = [make_arm(config, "control"), make_arm(config, "a", "noise.layers=[3, 5]", "grpo.learning_rate=0.003")]
    write_sweep(config, arms, {"control": [200], "a": [210]})
    frame = load("s", str(tmp_path)).arms
    assert frame["noise.layers"].tolist() == ["all", "3,5"]
    assert frame["noise.sigma_start"].tolist() == [0.0, 0.01]
    assert frame["grpo.learning_rate"].tolist() == [arms[0].config.grpo.learning_rate, 0.003]
    assert frame["eval/accuracy"].tolist() == [200 / 400, 210 / 400]
    settings = {column for column in frame if "." in column}
    fixed = {"noise.modules", "noise.layers", "noise.sigma_start", "noise.sigma_end"}
    assert settings == fixed | {"grpo.learning_rate"}


def test_what_a_stopped_trial_had_come_to_is_shown_and_not_counted(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2)
    arms = [make_arm(config, "control"), make_arm(config, "a")]
    write_sweep(config, arms, {"control": [200]})
    write_trial(config, arms[1], 0, outcome(arms[1], 0, 150, "stopped"), attempts=[attempt(ended="stopped")])
    trials = load("s", str(tmp_path)).trials
    assert trials.status.tolist() == ["completed", "stopped"]
    assert trials.counted.tolist() == [True, False]
    assert trials["eval/accuracy"].tolist() == [0.5, 0.375]


# Whatever lies in its folder


def ablation(store: Path) -> StudyConfig:
    config = study(store, kind="ablation", parent="p", replicates=3, trials=3)
    arms = [make_arm(config, "control"), make_arm(config, "w", origin="winner")]
    arms.append(make_arm(config, "w-without-layers", origin="ablation"))
    write_sweep(config, arms, {"control": [200] * 3, "w": [220, 222, 221], "w-without-layers": [201, 203, 200]})
    return config


@pytest.mark.parametrize("make", [*ODD, sampled_sweep, ablation], ids=lambda make: make.__name__)
def test_frames_of_odd_data_have_their_columns_their_types_and_a_meaning_for_each(tmp_path: Path, make: Any) -> None:
    config = make(tmp_path)
    odd = load(config.name, str(tmp_path))
    for name, frame in odd.frames.items():
        assert list(frame)[: len(COLUMNS[name])] == list(COLUMNS[name])
        for column, (kind, _) in COLUMNS[name].items():
            assert str(frame[column].dtype) == kind, (name, column)
        assert all(meaning(name, column) for column in frame)
        numbers = [frame[column].dtype for column in frame if "/" in column]
        assert all(pd.api.types.is_float_dtype(kind) for kind in numbers)
    planned = sum(len(row.trials) for row in report_study(config).arms)
    assert len(odd.trials) == planned
    assert set(odd.trials.arm) == set(odd.arms.arm)
    assert all(odd.figure(name).layout.height for name in odd.figures)
    assert odd.answer


def test_a_metric_that_is_no_number_stays_one_that_is_none(tmp_path: Path) -> None:
    nan = load(ODD_BY_NAME["not_a_number"](tmp_path).name, str(tmp_path))
    row = nan.trials[nan.trials.arm == "c01"].iloc[0]
    assert (row.status, row.counted) == ("completed", False)
    assert math.isnan(row["eval/accuracy"])
    assert nan.steps[nan.steps.arm == "c01"]["gen/entropy"].isna().all()
    assert "c01" not in set(nan.comparisons[nan.comparisons.replicates > 0].arm)


ODD_BY_NAME = {make.__name__: make for make in ODD}


def test_a_sweep_that_runs_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    config = ODD_BY_NAME["unfinished"](tmp_path)
    running = frames_of(read_material(config), running=True)
    assert repr(running).startswith("sweep s, which is running: this is how far it was: 2 arms, 4 trials, 0 steps")
    assert running.trials.counted.tolist() == [True, False, True, False]
    assert running.trials.score.isna().tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("study.json", {"version": 1}, "written by version 1, this program reads 3; use the program that wrote it"),
        ("study.json", "{", "is damaged"),
        ("arms/0000.json", "{", "is damaged"),
        ("trials/a-0/outcome.json", {"version": 1}, "written by version 1"),
        ("trials/a-0/outcome.json", "{", "is damaged"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_one_line(tmp_path: Path, file: str, text: Any, why: str) -> None:
    all_collapsed(tmp_path)
    (tmp_path / "s" / file).write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ConfigError, match=f"{re.escape(file)}: .*{why}") as caught:
        load("s", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_sweep_that_is_not_there_is_one_line_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        load(store=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"NAME: no sweeps in .*; start one with: rin sweep"):
        load(store=str(tmp_path))
    save_study_config(study(tmp_path))
    with pytest.raises(ConfigError, match=r"NAME=t: no sweep of that name in .*; there are s"):
        load("t", str(tmp_path))


# Figures


def test_every_figure_of_the_page_is_drawn_by_its_name(sweep: Sweep) -> None:
    names = sweep.figures
    assert len(names) == len(set(names)) > 15
    assert {"forest", "heat-map", "pareto", "hours", "cost-to-decision", "space", "curves-c01"} <= set(names)
    for name in ("forest", "heat-map", "curves-c01", "space", "hours"):
        drawn = sweep.figure(name)
        assert drawn.layout.paper_bgcolor == "#ffffff"
        assert len(drawn.data) > 0
    with pytest.raises(ConfigError, match="figure forrest: there is none of that name; there are forest, collapse-"):
        sweep.figure("forrest")


def test_a_figure_of_some_arms_has_these_and_their_controls(sweep: Sweep) -> None:
    linear = sweep.arms.query("`noise.modules` == 'linear' and origin != 'control'").arm
    told = [note["text"] for note in sweep.figure("forest", arms=linear).layout.annotations]
    assert [re.match(r"<b>(\w+)", text)[1] for text in told] == ["c04", "c02", "c06"]  # type: ignore[index]
    assert len(sweep.figure("pareto", arms=["c02"]).data) == 4
    whole, part = (sweep.figure("curves-c02", arms=arms).data for arms in (None, ["c02"]))
    assert whole == part, "with the control behind it"
    for figure in ("hours", "importance"):
        with pytest.raises(ConfigError, match=f"figure {figure}: is of the sweep as a whole; leave arms out"):
            sweep.figure(figure, arms=["c02"])
    with pytest.raises(ConfigError, match="arms: c77 is none of s; it has control, c01"):
        sweep.figure("forest", arms=["c77"])
    with pytest.raises(ConfigError, match="figure curves-c01: there is none of that name; there are forest"):
        sweep.figure("curves-c01", arms=["c02"])


def test_what_a_figure_cannot_do_is_not_swallowed(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the page it is a line in its place."""
    monkeypatch.setitem(frames_module.SECTIONS, "Differences to the control", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sweep.figure("forest")


# CSV


def test_csv_files_hold_the_frames_and_what_their_columns_mean(sweep: Sweep, tmp_path: Path) -> None:
    files = write_csv(sweep, tmp_path / "a" / "csv")
    assert [file.name for file in files] == [*(f"{name}.csv" for name in COLUMNS), "columns.csv"]
    for name, frame in sweep.frames.items():
        kinds = {column: kind for column, (kind, _) in COLUMNS[name].items() if not kind.startswith("date")}
        read = pd.read_csv(tmp_path / "a" / "csv" / f"{name}.csv", dtype=kinds, keep_default_na=False, na_values=[""])
        words = [column for column, kind in kinds.items() if kind == "str"]
        read[words] = read[words].fillna("")
        if name == "steps":
            read["time"] = pd.to_datetime(read["time"]).astype("datetime64[ms, UTC]")
        pd.testing.assert_frame_equal(read, frame)
    listed = pd.read_csv(files[-1])
    assert len(listed) == sum(len(frame.columns) for frame in sweep.frames.values())
    row = listed[(listed.frame == "steps") & (listed.column == "gen/entropy")].iloc[0]
    assert (row.type, row.meaning) == ("float64", f"{METRICS['gen/entropy']} (nats per token)")


def test_csv_keeps_whatever_a_model_wrote(tmp_path: Path) -> None:
    config = drawn_sweep(tmp_path, arms=1, replicates=1, steps=2)
    (arm,) = read_arms(config)
    text = 'größer 数学,"x"\r\n\x07\u2028=1+1;NA'
    ended = arm.results[0]
    reports = [
        replace(one, samples=tuple(replace(sample, completion=text) for sample in one.samples))
        for one in steps_of(arm, random.Random(0))
    ]
    write_trial(config, arm, 0, ended, reports=reports)
    write_csv(load("s", str(tmp_path)), tmp_path / "csv")
    read = pd.read_csv(tmp_path / "csv" / "completions.csv", keep_default_na=False)
    assert set(read.completion) == {text}
    half = replace(reports[0], samples=(replace(reports[0].samples[0], completion="\ud800"),))
    write_trial(config, arm, 0, ended, reports=[half])
    write_csv(load("s", str(tmp_path)), tmp_path / "csv")
    assert "\\ud800" in (tmp_path / "csv" / "completions.csv").read_text(encoding="utf-8")


def test_csv_is_written_beside_a_page_and_json_is_not_left_out_in_silence(config: StudyConfig, tmp_path: Path) -> None:
    place, folder = ["--store", config.store], tmp_path / "csv"
    result = CliRunner().invoke(app, ["report", "s", "--csv", str(folder), "--html", str(tmp_path / "p.html"), *place])
    told = f"page: {tmp_path / 'p.html'}\ncsv: 7 files in {folder}; columns.csv says what is what\n"
    assert (result.exit_code, result.output) == (0, told)
    assert len(list(folder.iterdir())) == 7
    for option in ("--csv", "--html", "--figures"):
        result = CliRunner().invoke(app, ["report", "s", option, str(tmp_path / "x.html"), "--json", *place])
        assert f"--json: has no use beside {option}, which writes files" in str(result.exception)
        assert not (tmp_path / "x.html").exists()


def test_a_folder_that_cannot_be_written_is_one_line(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--csv .*/file/x: Not a directory; give a folder of yours"):
        write_csv(sweep, tmp_path / "file" / "x")

"""Wherever a candidate is named, it is the same one, and nobody has to ask MLflow."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from search.ablation import ablation
from search.arms import candidate_of, read_arms
from search.confirm import planned_confirmation
from search.report import arm_reports, report_study
from search.store import StudyConfig, only_driver, refuse_second_driver, save_study_config
from search.study import resume_study
from spaces.config import ConfigError
from spaces.reading import load_yaml
from tests.processes import rin
from tests.written_sweeps import make_arm, study, write_sweep
from trainable.disk.folder import Folder

pytestmark = pytest.mark.slow  # many seconds of computing


def ended(tmp_path: Path, **right: list[object]) -> StudyConfig:
    """A sweep with all its outcomes, whose driver comes once more and writes best.yaml; then its tracking is gone."""
    config = study(tmp_path / "runs", trials=len(right), replicates=2)
    sigmas = {name: f"noise.sigma_start={0.01 * (number + 1)}" for number, name in enumerate(right)}
    arms = [make_arm(config, name, *([] if name == "control" else [sigmas[name]])) for name in right]
    write_sweep(config, arms, right)
    result = resume_study(config, lambda event: None)
    assert result.unfinished == 0
    (tmp_path / "runs" / "mlflow.db").unlink()
    gone = config.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    save_study_config(gone)
    return gone


def test_with_the_control_best_everyone_names_the_same_candidate_and_says_that_it_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ended(tmp_path, control=[390, 392], c01=[300, 310], c02=[330, 340], c03=[("collapsed", 399), 398])
    monkeypatch.chdir(tmp_path)
    status = json.loads(rin("status", "s", "--json").out)
    report = json.loads(rin("report", "s", "--json").out)
    exported = rin("export", "s")
    best = load_yaml(Path("runs/s/best.yaml"))
    _, arms = planned_confirmation(config, (5,))
    named = {
        "status": [row["arm"] for row in status if row["candidate"]],
        "report": [report["candidate"]],
        "confirm": [arm.name for arm in arms if arm.origin == "winner"],
        "ablation": [
            arm.name for arm in ablation(config, study(tmp_path, name="a"), named=False).arms if arm.origin == "winner"
        ],
        "rule": [candidate_of(config, read_arms(config)).arm.name],
    }
    assert all(names == ["c02"] for names in named.values()), named
    assert exported.code == 0
    assert best["noise"]["sigma_start"] == 0.03, "of c02"
    assert exported.out == Path("runs/s/best.yaml").read_text(), "export says what the sweep wrote down"
    assert "paired difference -14.00 points" in exported.out
    differences = {row["arm"]: row["difference"] for row in status}
    assert differences["c02"] == pytest.approx(-0.14) == report_study(config).arms[2].difference


def test_where_every_noisy_arm_collapsed_there_is_nothing_to_take_home_and_that_is_no_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(tmp_path, control=[390, 392], c01=[("collapsed", 300), ("collapsed", 310)])
    monkeypatch.chdir(tmp_path)
    assert not Path("runs/s/best.yaml").exists()
    for command in (["export", "s"], ["confirm", "s"], ["export", "s", "--to", "verl"]):
        done = rin(*command)
        assert (done.code, done.out.strip()) == (1, "")
        (line,) = done.err.splitlines()
        assert line.startswith("rin: NAME=s: no configuration with noise completed all its replicates")


def test_a_candidate_of_an_earlier_state_does_not_stay_behind(tmp_path: Path) -> None:
    config = study(tmp_path, trials=2, replicates=1)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [280], "c01": [("collapsed", 10)]})
    config.folder.write("best.yaml", "noise: {}")
    assert resume_study(config, lambda event: None).candidate is None
    assert "best.yaml" not in config.folder.names()


def test_a_driver_that_is_killed_leaves_no_candidate_of_the_state_it_went_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study(tmp_path, trials=3, replicates=1)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [280], "c01": [300]})
    config.folder.write("best.yaml", "noise: {}")

    def killed(*_: object) -> bool:
        raise MemoryError

    monkeypatch.setattr("search.start.sweep_ray", lambda config: nullcontext())
    monkeypatch.setattr("search.study.run_trials", killed)
    with pytest.raises(MemoryError):
        resume_study(config, lambda event: None)
    assert "best.yaml" not in config.folder.names()


def test_a_sweep_that_is_over_keeps_no_beginning_of_its_trials_whoever_was_killed_before_and_ends_without_that_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = study(tmp_path, trials=2, replicates=1)
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [280], "c01": [300]})
    config.folder.write("prefixes", "")
    remove = Folder.remove

    def refused(folder: Folder, name: str) -> None:
        if name == "prefixes":
            raise OSError("it does not answer")
        remove(folder, name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", refused)
        assert resume_study(config, lambda event: None).unfinished == 0
    assert "was not removed: it does not answer" in caplog.text
    resume_study(config, lambda event: None)
    assert "prefixes" not in config.folder.names()


def test_an_arm_can_be_taken_home_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(tmp_path, control=[290, 292], c01=[300, 310], c02=[330, 340])
    monkeypatch.chdir(tmp_path)
    taken = rin("export", "s", "--arm", "c01")
    assert taken.code == 0
    assert taken.out.startswith("# candidate of sweep s: c01\n")
    refused = rin("export", "s", "--arm", "control")
    assert (refused.code, "--arm control: no such arm in s; it has c01, c02" in refused.err) == (2, True)


def test_of_a_confirmation_everyone_names_the_command_that_goes_on_with_it_and_no_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "runs"
    write_sweep(study(place), [], {})
    arms = [make_arm(study(place), "control"), make_arm(study(place), "c01", origin="winner")]
    for name, command in (("s-confirm", "rin confirm s"), ("s-confirm-c01", "rin confirm s --arm c01")):
        config = study(place, name=name, kind="confirm", parent="s", looks=(3, 5), trials=2, replicates=5)
        write_sweep(config, arms, {"control": [280, 281, 282], "c01": [300, 301, 302]})
        monkeypatch.chdir(tmp_path)
        assert f"go on: {command}\n" in rin("status", name).out
        assert f"go on: {command}\n" in rin("report", name).out
        assert rin("resume", name).err.endswith(f"go on with it by: {command}\n")
        with only_driver(config), pytest.raises(ConfigError, match=f"stop it and then: {command}$"):
            refuse_second_driver(config)
        assert [row["candidate"] for row in json.loads(rin("status", name, "--json").out)] == [False, False]
    text = rin("export", "s-confirm", "--arm", "c01").out
    assert "# judged on questions that chose nothing: what that found says rin report s-confirm\n" in text
    assert "not a finding" not in text


def test_list_and_status_count_trials_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(tmp_path / "runs", trials=3, replicates=2, tracking_uri="http://127.0.0.1:9")
    arms = [make_arm(config, "control"), make_arm(config, "c01")]
    write_sweep(config, arms, {"control": [280, 281], "c01": [("collapsed", 10), None]})
    monkeypatch.chdir(tmp_path)
    (row,) = json.loads(rin("list", "--json").out)
    assert (row["runs"], row["of"], row["status"]) == (4, 6, {"completed": 2, "collapsed": 1, "stopped": 1})
    said = rin("status", "s").out
    for part in (
        "4 of 6 trials begun",
        "1 collapsed, 1 stopped",
        "3 trials are not finished and nobody is running them",
    ):
        assert part in said


def test_a_trial_that_was_killed_with_the_last_driver_waits_while_the_next_one_runs_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study(tmp_path, trials=2, replicates=1)
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "c01")], {"control": [280], "c01": [None]})
    monkeypatch.setattr("search.start.sweep_ray", lambda config: nullcontext())

    def looked_at(*_: object) -> bool:
        rows = arm_reports(config, read_arms(config))
        assert [row.status for row in rows] == ["completed", "waiting"]
        return False

    monkeypatch.setattr("search.study.run_trials", looked_at)
    assert [row.status for row in arm_reports(config, read_arms(config))] == ["completed", "stopped"]
    assert resume_study(config, lambda event: None).unfinished == 1

"""Notes and the trash: nothing that a person wrote or ran is lost, whatever is killed in between."""

import json
import shutil
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from dashboards.page import page, read_material
from search import trash
from search.jobs import Job, note_job
from search.mlflow_client import NOTE_TAG, claim, client
from search.notes import NOTES, read_notes, write_note
from search.store import StudyConfig, default_tracking_uri, load_study_config, only_driver, save_study_config, sweeps
from search.submission import JobState
from search.trash import delete, restore
from spaces.config import ConfigError
from tests.real_mlflow import runs
from tests.written_sweeps import make_arm, study, write_sweep

Rin = Callable[..., tuple[int, str, str]]


def swept(store: Path, name: str = "s", **changes: Any) -> StudyConfig:
    config = study(store, name=name, trials=2, **changes)
    arms = [make_arm(config, "control"), make_arm(config, "e13m-rmsnorm")]
    write_sweep(config, arms, {arm.name: [300] for arm in arms})
    return config


# --- notes ------------------------------------------------------------------------------------------------------------


def test_every_note_is_kept_in_its_order_with_its_date(tmp_path: Path) -> None:
    config = swept(tmp_path)
    for text in ("erste Notiz, größer", "  noise on 层 0\nand a second line ", "third"):
        write_note(config, text)
    seen = read_notes(config)
    assert [note.text for note in seen] == ["erste Notiz, größer", "noise on 层 0\nand a second line", "third"]
    assert seen[0].written <= seen[1].written <= seen[2].written
    assert len((config.folder / NOTES).names()) == 3, "a file each: two writers never touch the same one"


def test_a_note_that_says_nothing_is_refused(tmp_path: Path) -> None:
    config = swept(tmp_path)
    with pytest.raises(ConfigError, match="TEXT: is empty; say what"):
        write_note(config, " \n ")
    assert read_notes(config) == []


def test_a_note_that_cannot_be_read_hides_neither_the_others_nor_the_sweep(tmp_path: Path) -> None:
    config = swept(tmp_path)
    write_note(config, "kept")
    (config.folder / NOTES).write("20990101-torn.json", '{"written": "20')
    kept, torn = read_notes(config)
    assert kept.text == "kept"
    assert torn.text.startswith("(this note cannot be read: ")


def test_list_status_report_and_page_show_notes(rin: Rin, tmp_path: Path) -> None:
    config = swept(tmp_path / "runs")
    assert rin("note", "s") == (0, 'no notes of s; write one: rin note s "..."\n', "")
    with only_driver(config):  # while it runs
        assert rin("note", "s", "[bold]größer\n<b>two")[0] == 0
    assert "]bold" not in rin("note", "s")[1]
    for command in (["list"], ["status", "s"], ["report", "s"]):
        code, out, _ = rin(*command)
        assert code == 0
        assert "[bold]größer" in out, command
    assert json.loads(rin("list", "--json")[1])[0]["notes"][0]["text"] == "[bold]größer\n<b>two"
    assert json.loads(rin("report", "s", "--json")[1])["notes"] == json.loads(rin("note", "s", "--json")[1])
    html = page(read_material(config))
    assert "[bold]größer" in html
    assert "&lt;b&gt;two" in html
    assert rin("note", "s", "")[0] == 2
    assert rin("note", "t", "x")[0] == 2


def test_notes_lie_in_an_object_store_too(s3_store: Callable[[str], str]) -> None:
    config = study(s3_store("noted"))
    save_study_config(config)
    write_note(config, "größer")
    write_note(config, "second")
    assert [note.text for note in read_notes(config)] == ["größer", "second"]


# --- the trash --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """To make a database takes seconds."""
    return default_tracking_uri(str(tmp_path_factory.mktemp("tracking")))


def tracked(config: StudyConfig) -> Any:
    """Its experiment, with a run in it."""
    claim(config.tracking_uri, config.name, config.owner)
    mlflow = client(config.tracking_uri)
    found = mlflow.get_experiment_by_name(config.name)
    mlflow.create_run(found.experiment_id, tags={"arm": "x", "arm_number": "0", "replicate": "0", "trial_key": "x"})
    return mlflow


def files(place: Path) -> list[Path]:
    return sorted(path.relative_to(place) for path in place.rglob("*.json"))


def test_a_deleted_sweep_is_gone_its_name_is_free_and_restore_brings_all_of_it_back(
    rin: Rin, tmp_path: Path, uri: str
) -> None:
    config = swept(tmp_path / "runs", "again", tracking_uri=uri)
    mlflow, place = tracked(config), Path(config.store, "again")
    before = files(place)
    code, out, _ = rin("delete", "again", "--yes")
    assert (code, "rin restore again" in out) == (0, True)
    assert sweeps(config.store) == []
    assert "no sweeps in runs" in rin("list")[1]
    assert mlflow.get_experiment_by_name("again") is None
    (first,) = Path(config.store, trash.TRASH).iterdir()
    assert files(first) == before

    other = swept(tmp_path / "runs", "again", tracking_uri=uri)  # its name is free, in the store and in MLflow
    claim(uri, "again", other.owner)
    delete(other)
    assert restore(config.store, "again").id == other.id, "the one that was deleted last"
    code, _, err = rin("restore", "again")
    assert (code, f"{place} exists already" in err) == (2, True)
    delete(other)
    (second,) = set(Path(config.store, trash.TRASH).iterdir()) - {first}
    shutil.rmtree(second)  # as its owner empties it
    assert rin("restore", "again") == (0, f"again lies in {place} again\n", "")
    assert files(place) == before
    assert load_study_config(config.store, "again") == config
    assert len(runs(uri, "again")) == 1
    code, _, err = rin("restore", "t")
    assert (code, "no sweep of that name was deleted here" in err) == (2, True)


def test_what_is_killed_half_way_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    config = swept(tmp_path, "killed", tracking_uri=uri)
    mlflow = tracked(config)

    def killed_at(owner: type, step: str, command: Callable[[], object]) -> None:
        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(owner, step, killed)
            with pytest.raises(KeyboardInterrupt):
                command()

    for owner, step in ((type(mlflow), "delete_experiment"), (Path, "rename")):
        killed_at(owner, step, lambda: delete(config))
        assert sweeps(config.store) == ["killed"]
    delete(config)
    assert (sweeps(config.store), mlflow.get_experiment_by_name("killed")) == ([], None)

    for owner, step in ((type(mlflow), "rename_experiment"), (Path, "rename")):
        killed_at(owner, step, lambda: restore(config.store, "killed"))
        assert sweeps(config.store) == []
    restore(config.store, "killed")
    assert sweeps(config.store) == ["killed"]
    assert len(runs(uri, "killed")) == 1


def test_mlflow_has_the_notes_below_the_answer_and_one_that_it_does_not_take_is_kept(
    rin: Rin, tmp_path: Path, uri: str
) -> None:
    config = swept(tmp_path / "runs", "noted", tracking_uri="http://127.0.0.1:9")
    code, out, err = rin("note", "noted", "größer")
    assert (code, "größer" in out) == (0, True)
    assert "rin ui noted writes it" in err
    mlflow = tracked(config.model_copy(update={"tracking_uri": uri}))
    assert rin("note", "noted", "second", "--tracking-uri", uri)[::2] == (0, "")
    said = mlflow.get_experiment_by_name("noted").tags[NOTE_TAG]
    assert said.index("Does noise help?") < said.index("UTC: second") < said.index("UTC: größer")


def test_an_experiment_of_that_name_that_is_another_sweeps_stays_as_it_is(tmp_path: Path, uri: str) -> None:
    theirs = swept(tmp_path / "theirs", "shared", tracking_uri=uri)
    mlflow = tracked(theirs)
    ours = swept(tmp_path / "ours", "shared", tracking_uri=uri)
    delete(ours)
    restore(ours.store, "shared")
    assert mlflow.get_experiment_by_name("shared").tags["sweep_id"] == theirs.id
    delete(theirs)
    claim(uri, "shared", ours.owner)
    with pytest.raises(ConfigError, match="has another experiment of that name"):
        restore(theirs.store, "shared")


def test_a_sweep_that_was_never_tracked_leaves_no_database_behind(tmp_path: Path) -> None:
    config = swept(tmp_path)
    delete(config)
    assert [path.name for path in tmp_path.iterdir()] == [trash.TRASH]
    assert restore(config.store, "s") == config


def test_a_sweep_that_others_hang_on_or_that_runs_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = swept(tmp_path)
    swept(tmp_path, "s-confirm", kind="confirm", parent="s", looks=(5,))
    swept(tmp_path, "warm", warm_start="s")
    with pytest.raises(ConfigError, match=r"s-confirm \(its confirmation\) would .* first: rin delete s-confirm"):
        delete(config)
    delete(load_study_config(config.store, "s-confirm"))
    model = {"model": {"name": f"{config.store}/s/model"}, "eval": {"questions": 400}}
    save_study_config(study(tmp_path, name="t", settings=model))
    with pytest.raises(ConfigError, match=r"t \(model.name lies in it\)"):
        delete(config)
    delete(load_study_config(config.store, "t"))
    with only_driver(config), pytest.raises(ConfigError, match="is being run by another process"):
        delete(config)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    note_job(config.store, "s", Job(id="raysubmit_1", address="http://127.0.0.1:9"))
    monkeypatch.setattr("search.submission.state_of", lambda job: JobState(status="runs", words="its job is RUNNING"))
    with pytest.raises(ConfigError, match="its job is RUNNING; stop it: ray job stop raysubmit_1"):
        delete(config)
    monkeypatch.setattr("search.submission.state_of", lambda job: JobState(status="unknown", words=""))
    assert delete(config).name.startswith("s-20")  # a warm start is told from its own folder


def test_a_sweep_and_the_confirmation_of_another_are_not_brought_together(tmp_path: Path) -> None:
    config = swept(tmp_path)
    swept(tmp_path, "s-confirm", kind="confirm", parent="s", parent_id=config.id, looks=(5,))
    delete(load_study_config(config.store, "s-confirm"))
    delete(config)
    other = swept(tmp_path)
    with pytest.raises(
        ConfigError, match=r"NAME=s-confirm: the s that .* belongs to another sweep; rin delete s, then"
    ):
        restore(config.store, "s-confirm")
    delete(other)
    restore(config.store, "s-confirm")
    with pytest.raises(ConfigError, match=r"NAME=s: the s-confirm that .* another sweep; rin delete s-confirm, then"):
        restore(config.store, "s")
    delete(load_study_config(config.store, "s-confirm"))
    assert restore(config.store, "s").id == other.id, "the one that was deleted last"
    delete(other)
    max((tmp_path / trash.TRASH).glob("s-20*")).rename(tmp_path / "x")
    assert restore(config.store, "s-confirm").parent_id == config.id
    assert restore(config.store, "s").id == config.id, "beside its own"


def test_what_cannot_be_renamed_is_said_in_one_line(tmp_path: Path) -> None:
    config = swept(tmp_path)
    (tmp_path / trash.TRASH).write_text("a file")
    with pytest.raises(ConfigError, match=r"NAME=s: .*/s cannot be renamed \(File exists\); mend that"):
        delete(config)
    assert sweeps(config.store) == ["s"]


def test_delete_asks_and_does_nothing_where_nobody_answers(
    rin: Rin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = swept(tmp_path / "runs")
    monkeypatch.setattr(sys, "stdin", StringIO("n\n"))
    code, _, err = rin("delete", "s")
    assert (code, "add --yes" in err) == (2, True)
    for answer, left in (("n\n", ["s"]), ("y\n", [])):
        monkeypatch.setattr(sys, "stdin", stdin := StringIO(answer))
        monkeypatch.setattr(stdin, "isatty", lambda: True)
        code, out, _ = rin("delete", "s")
        assert ("Move" in out, sweeps(config.store)) == (True, left)


def test_an_object_store_is_refused_with_the_commands_that_move_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aws s3 mv --recursive s3://b/runs/s s3://b/runs/\.trash/s"):
        delete(study("s3://b/runs?scheme=http&endpoint_override=127.0.0.1:9"))

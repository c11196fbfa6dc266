"""A checkpoint comes back bit for bit, or it is passed over, with a line, for the one before it."""

import errno
import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spaces.config import ConfigError
from trainable.disk.checkpoint import (
    VERSION,
    load_state,
    newest_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    save_state,
)
from trainable.disk.folder import Folder

TENSORS, VALUES = "tensors.safetensors", "progress.json"


def state(step: int, size: int = 1000) -> dict[str, Any]:
    """Of every kind that a trial holds: trained weights in two precisions, moments with a scalar, plain values."""
    source = torch.Generator().manual_seed(step)
    weights = torch.randn(size, generator=source)
    model = {
        "a.weight": weights,
        "b.weight": torch.randn(3, 5, generator=source).to(torch.bfloat16).T,
        "nan": torch.tensor([float("nan")]),
    }
    optimizer = {"0.exp_avg": weights * 2, "0.step": torch.tensor(float(step))}
    return {
        "model": model,
        "optimizer": optimizer,
        "progress": {"next_step": step, "seconds": 0.1 + 0.2},
        "reports": [{"step": 0, "x": 1e-17}],
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    for part in ("model", "optimizer"):
        if one[part].keys() != other[part].keys():
            return False
        for name, tensor in one[part].items():
            twin = other[part][name]
            if (tensor.dtype, tensor.shape) != (twin.dtype, twin.shape):
                return False
            if (
                tensor.contiguous().view(torch.uint8).tolist() != twin.contiguous().view(torch.uint8).tolist()
                if tensor.dim()
                else tensor != twin
            ):
                return False
    return {k: v for k, v in one.items() if k not in ("model", "optimizer")} == {
        k: v for k, v in other.items() if k not in ("model", "optimizer")
    }


@pytest.fixture
def trial(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "trial"))


def file(trial: Folder, step: int, name: str) -> Path:
    assert trial.local is not None
    return trial.local / f"checkpoint-{step:06d}" / name


def test_a_state_comes_back_bit_for_bit(trial: Folder) -> None:
    save_state(trial, state(7))
    assert same(load_state(trial), state(7))
    assert not same(load_state(trial), state(8)), "the comparison can tell two states apart"


def test_a_state_comes_back_bit_for_bit_from_an_object_store(s3_store: Callable[[str], str], tmp_path: Path) -> None:
    trial = Folder(s3_store(tmp_path.name))
    for step in (1, 2, 3):
        save_checkpoint(trial, step, state(step))
    found, passed = newest_checkpoint(trial)
    assert found is not None
    assert same(found, state(3))
    assert (passed, trial.names()) == ([], ["checkpoint-000002", "checkpoint-000003"])


def test_a_trial_without_checkpoints_has_none(trial: Folder) -> None:
    assert newest_checkpoint(trial) == (None, [])


def test_two_are_kept_and_the_newest_by_number_is_taken(trial: Folder) -> None:
    for step in (8, 9, 10, 999_999, 1_000_000):
        save_checkpoint(trial, step, state(step))
        found, _ = newest_checkpoint(trial)
        assert found is not None
        assert found["progress"]["next_step"] == step
        assert len(trial.names()) <= 2
    assert trial.names() == ["checkpoint-1000000", "checkpoint-999999"]


def test_of_a_trial_that_is_over_only_the_checkpoints_are_removed(trial: Folder) -> None:
    save_checkpoint(trial, 1, state(1))
    trial.write("outcome.json", "{}")
    trial.write("checkpoint-notes.txt", "mine")
    remove_checkpoints(trial)
    assert trial.names() == ["checkpoint-notes.txt", "outcome.json"]


def flipped(offset: float) -> Callable[[Path], None]:
    """One bit of the byte at that share of the file."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(offset * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return damage


def cut(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        os.truncate(path, int(share * path.stat().st_size))

    return damage


def garbage_head(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00garbage" + path.read_bytes()[10:])


def other_trials_file(path: Path) -> None:
    """Whole, but it belongs to other values."""
    other = Folder(str(path.parent.parent.parent / "other"))
    save_state(other, state(1234))
    path.write_bytes((Path(other.uri) / path.name).read_bytes())


DAMAGES = {
    "first byte": flipped(0.0),
    "head": flipped(0.2),
    "middle": flipped(0.5),
    "three quarters": flipped(0.75),
    "empty": cut(0.0),
    "truncated": cut(0.6),
    "last bytes gone": cut(0.99),
    "deleted": Path.unlink,
    "garbage head": garbage_head,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),  # what a power cut leaves
    "another trial's": other_trials_file,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", [TENSORS, VALUES])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_line(
    trial: Folder, name: str, damage: Callable[[Path], None]
) -> None:
    for step in (4, 5):
        save_checkpoint(trial, step, state(step))
    damage(file(trial, 5, name))
    found, passed = newest_checkpoint(trial)
    assert found is not None
    assert same(found, state(4))
    (line,) = passed
    assert "checkpoint-000005 is damaged" in line
    assert "passed over" in line
    assert trial.names() == ["checkpoint-000004"], "it does not take the place of a whole one"


def test_no_single_damaged_byte_changes_what_is_loaded(trial: Folder) -> None:
    """Each byte of both files, one at a time: passed over, or refused (a version number that changed), or nothing was
    lost (the name of the version, the newline at the end)."""
    small = {"model": {"w": torch.tensor([1.0, 2.0])}, "optimizer": {}, "progress": {"next_step": 3}}
    save_checkpoint(trial, 3, small)
    harmless = refused = 0
    for name in (TENSORS, VALUES):
        save_checkpoint(trial, 3, small)
        path = file(trial, 3, name)
        whole = path.read_bytes()
        for place in range(len(whole)):
            save_checkpoint(trial, 3, small)
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            try:
                found, passed = newest_checkpoint(trial)
            except ConfigError:
                refused += 1
                continue
            if found is not None:
                assert same(found, small), f"{name}, byte {place}"
                harmless += 1
            else:
                assert len(passed) == 1
    assert harmless <= len("version") + 1
    assert refused <= 1


def test_when_both_are_damaged_there_is_none_and_two_lines(trial: Folder) -> None:
    for step in (4, 5):
        save_checkpoint(trial, step, state(step))
        flipped(0.5)(file(trial, step, TENSORS))
    found, passed = newest_checkpoint(trial)
    assert found is None
    assert [line.split()[0] for line in passed] == ["checkpoint-000005", "checkpoint-000004"]


def test_another_version_is_not_damage_but_a_clear_refusal(trial: Folder) -> None:
    for step in (4, 5):
        save_checkpoint(trial, step, state(step))
    path = file(trial, 5, VALUES)
    path.write_text(path.read_text().replace(f'"version": {VERSION}', f'"version": {VERSION + 1}', 1))
    said = (
        f"checkpoint-000005: checkpoint version {VERSION + 1}, this program reads {VERSION}; "
        "use the program that wrote it"
    )
    with pytest.raises(ConfigError, match=said):
        newest_checkpoint(trial)


class _Bomb:
    def __reduce__(self) -> Any:
        return os.putenv, ("RIN_BOMB", "exploded")


def exploded() -> bool:
    """Asked of a child, which inherits the real environment."""
    return subprocess.run(["printenv", "RIN_BOMB"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", [TENSORS, VALUES, "state.pkl", "data.pt", "tune_metadata.pkl"])
def test_nothing_that_is_loaded_can_run_code(trial: Folder, name: str) -> None:
    save_checkpoint(trial, 1, state(1))
    bomb = pickle.dumps(_Bomb())
    file(trial, 1, name).write_bytes(bomb)
    newest_checkpoint(trial)
    assert not exploded()
    pickle.loads(bomb)
    try:
        assert exploded(), "it would have"
    finally:
        os.unsetenv("RIN_BOMB")


@pytest.mark.parametrize("full_at", [TENSORS, VALUES])
def test_a_full_disk_leaves_the_earlier_checkpoints_usable(
    trial: Folder, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    for step in (4, 5):
        save_checkpoint(trial, step, state(step))
    write = Folder.write

    def full(folder: Folder, name: str, data: bytes | str) -> None:
        if name == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(trial, 6, state(6))
    found, _ = newest_checkpoint(trial)
    assert found is not None
    assert same(found, state(5))
    save_checkpoint(trial, 7, state(7))  # there is room again
    found, _ = newest_checkpoint(trial)
    assert found is not None
    assert same(found, state(7))


def test_a_save_that_was_killed_between_its_two_files_was_never_finished(trial: Folder) -> None:
    save_checkpoint(trial, 4, state(4))
    save_checkpoint(trial, 5, state(5))
    file(trial, 5, VALUES).unlink()
    found, passed = newest_checkpoint(trial)
    assert found is not None
    assert found["progress"]["next_step"] == 4
    assert "never finished" in passed[0]


def test_a_step_that_is_saved_again_after_a_fault_replaces_what_the_fault_left(trial: Folder) -> None:
    save_checkpoint(trial, 4, state(4))
    save_checkpoint(trial, 5, state(5))
    flipped(0.5)(file(trial, 5, TENSORS))
    save_checkpoint(trial, 5, state(5))
    found, passed = newest_checkpoint(trial)
    assert found is not None
    assert same(found, state(5))
    assert passed == []


def test_the_values_are_plain_json_on_two_lines(trial: Folder) -> None:
    save_checkpoint(trial, 5, state(5))
    head, values = file(trial, 5, VALUES).read_text().splitlines()
    assert set(json.loads(head)) == {"version", "tensors", "values"}
    assert json.loads(values)["progress"] == {"next_step": 5, "seconds": 0.1 + 0.2}

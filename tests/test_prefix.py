"""Beginnings that trials share: whoever takes one over ends with the bits that it would have had alone."""

import ast
import json
import shutil
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from spaces.config import ConfigError, TrialConfig
from spaces.schedules import quiet_steps
from tests.conftest import Tiny
from trainable import prefix
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import ANSWERS_FILE, FINAL_FILE, OUTCOME_FILE, PREFIXES, read_attempts, read_outcome
from trainable.outcome import StepReport
from trainable.trial import Trial
from trainable.trial_worker import TrialWorker
from trainable.versions import COMPUTE

SMALL = ("eval.questions=8", "grpo.prompts=4", "grpo.group_size=2", "grpo.steps=4", "threads=1")
CONTROL = ("noise.sigma_start=0",)
WRONG = ("model.recipe.clean_steps=0", "model.recipe.signed_steps=0", "grpo.max_gen_batches=1")
LINEAR = ("noise.modules=[linear]", "noise.sigma_start=0.05", "noise.sigma_end=0.01")


class Sweep:
    """A store with trials of one sweep, run one after the other without Ray."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def begin(self, name: str, config: TrialConfig) -> TrialWorker:
        return TrialWorker(Folder(str(self.place / "trials" / name)), config)

    def run(self, name: str, config: TrialConfig) -> list[StepReport]:
        """What it told, step by step, to its end."""
        return finish(self.begin(name, config))

    def half(self, name: str, config: TrialConfig) -> list[StepReport]:
        """The quiet stage of a trial that is killed then."""
        work = self.begin(name, config)
        reports: list[StepReport] = []
        while len(reports) < max(1, quiet_steps(config.noise, config.grpo.steps)) and not work.ended:
            reports.append(work.step()[0])
        kill(work)
        return reports

    def folder(self, name: str) -> Path:
        return self.place / "trials" / name

    def shared(self, name: str) -> tuple[str, int] | None:
        """(from whom, how many steps), as the last attempt of a trial says."""
        found = read_attempts(Folder(str(self.folder(name))))[-1].shared
        return None if found is None else (found.trial, found.steps)

    @property
    def beginnings(self) -> list[str]:
        return sorted(path.name for path in (self.place / PREFIXES).glob("*/*"))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "sweep")


@pytest.fixture
def small(tiny: Tiny) -> Tiny:
    return lambda *overrides: tiny(*SMALL, *overrides)


def finish(work: TrialWorker) -> list[StepReport]:
    reports, outcome = [], None
    while outcome is None:
        report, outcome = work.step()
        reports.append(report)
    return reports


def kill(work: TrialWorker) -> None:
    """Between two steps, with all written that was to be written."""
    work.watchdog.stop()
    work.writer.shutdown()


def numbers(report: StepReport) -> dict[str, Any]:
    """All that a step reported, without clocks; NaN as text, because NaN is not itself."""
    record = report.as_record()
    return {
        name: repr(value)
        for name, value in record.items()
        if name not in ("seconds", "time_ms") and not name.startswith("perf/")
    }


def ending(sweep: Sweep, name: str) -> list[Any]:
    """What a trial left: outcome without its clock, answers, weights."""
    folder = sweep.folder(name)
    outcome = json.loads((folder / OUTCOME_FILE).read_text())["outcome"]
    del outcome["seconds"]
    return [outcome, (folder / ANSWERS_FILE).read_bytes(), (folder / FINAL_FILE).read_bytes()]


ROWS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], int]] = {
    # of both; of who computes it; of who takes it over; steps that it takes over (of 4; K = 3: the first 2 are quiet)
    "noise then control": ((), LINEAR, CONTROL, 2),
    "zones and multipliers": (
        (),
        CONTROL,
        ("noise.zones=[{zone: last, sigma_start: 0.2, sigma_end: 0.1}]", "noise.layer_multipliers=[1, 2]"),
        2,
    ),
    "a control of one stage": (("model.dtype=bfloat16",), LINEAR, (*CONTROL, "noise.num_stages=1"), 0),
    "a shorter quiet stage": ((), CONTROL, (*LINEAR, "noise.num_stages=4"), 0),
    "a longer quiet stage": ((), CONTROL, (*LINEAR, "noise.num_stages=2", "grpo.steps=4"), 2),
    "resampling beside a reference model": (("grpo.filter_groups=resample", "grpo.kl_beta=0.1"), CONTROL, LINEAR, 2),
    "adapters in bfloat16": (("model.adapter=lora", "model.dtype=bfloat16"), CONTROL, LINEAR, 2),
    "evaluations in the quiet stage": (("eval.every=1", "eval.samples=2"), CONTROL, LINEAR, 2),
    "a collapse in the quiet stage": (("grpo.filter_groups=resample", "task.digits=2", *WRONG), CONTROL, LINEAR, 0),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_beginning_that_is_taken_over_changes_no_bit_of_the_trial(row: str, sweep: Sweep, small: Tiny) -> None:
    both, first, second, steps = ROWS[row]
    config = small(*both, *second)
    sweep.half("control-0", small(*both, *first))
    told = sweep.run("c01-0", config)
    assert sweep.shared("c01-0") == ("control-0", steps)
    alone = Sweep(sweep.place / "alone")
    plain = alone.run("c01-0", config)
    assert alone.shared("c01-0") is None
    assert list(map(numbers, told)) == list(map(numbers, plain))
    assert ending(sweep, "c01-0") == ending(alone, "c01-0")
    if "collapse" in row:
        assert [report.verdict.rule for report in told] == ["filter_rejection"]


# --- what it hangs on -------------------------------------------------------------------------------------------------


def test_the_key_holds_all_but_the_noise(small: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(*overrides: str) -> str:
        trial = Trial(small(*overrides))
        trial.close()
        return prefix.key_of(trial)

    plain = key()
    assert key(*LINEAR, "noise.num_stages=1") == key(*CONTROL) == plain
    others = ["seed=1", "grpo.learning_rate=1e-4", "eval.questions=9", "quant.skip_layers=[0]", "threads=2"]
    keys = [key(other) for other in others]
    monkeypatch.setattr(prefix, "_machine", lambda device: ["another"])
    keys.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(prefix, "versions", lambda: {"torch": "3.0"})
    keys.append(key())
    monkeypatch.undo()
    assert len({plain, *keys}) == 1 + len(keys)


def test_what_another_version_or_another_file_may_have_otherwise_is_in_the_key(small: Tiny) -> None:
    """Under the same configuration: questions that are drawn, of the evaluation and to learn from; how text is cut into
    tokens, beside the vocabulary."""
    trial = Trial(small())
    keys = [prefix.key_of(trial)]
    assert trial.rows == "", "an endless task"
    trial.policy.tokenizer("1+2=", padding="max_length", max_length=9, truncation=True)
    assert prefix.key_of(trial) == keys[0], "how it was last called is of no account"
    first, *others = trial.questions
    trial.questions = [replace(first, answer="0"), *others]
    keys.append(prefix.key_of(trial))
    trial.questions = [first, *others]
    draws = trial.task.draws
    trial.task.draws = lambda rng, split: draws(Random(7), split)
    keys.append(prefix.key_of(trial))
    trial.task.draws = draws
    trial.policy.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    keys.append(prefix.key_of(trial))
    assert len(set(keys)) == len(keys)
    trial.close()


NO_NUMBERS = {"datasets", "filelock", "jinja2", "pyarrow", "pydantic", "safetensors", "tokenizers"}
"""What these read and check goes into the key, or changes nothing: rows, the tokenizer, text that is made of both."""


def test_the_version_of_every_package_that_a_trial_computes_with_is_in_the_key() -> None:
    trees = [ast.parse(file.read_text()) for file in sorted(Path(prefix.__file__).parent.rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [one.name for node in nodes if isinstance(node, ast.Import) for one in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"spaces", "trainable"}
    assert {name.replace("_", "-") for name in packages - NO_NUMBERS} <= {*COMPUTE}


def test_other_weights_under_the_same_name_are_another_beginning(small: Tiny) -> None:
    trial = Trial(small())
    before = prefix.key_of(trial)
    weight = next(iter(trial.policy.trainable().values()))
    with torch.no_grad():
        weight.view(-1)[0] += 1e-6
    assert prefix.key_of(trial) != before
    trial.close()


def test_a_trial_that_must_be_refused_is_refused_beside_a_beginning_that_fits(sweep: Sweep, small: Tiny) -> None:
    sweep.half("control-0", small(*CONTROL))
    work = sweep.begin("c01-0", small(*LINEAR, "noise.layer_multipliers=[0, 0]"))
    with pytest.raises(ConfigError, match="noise would touch nothing"):
        work.step()
    work.leave()


# --- who writes, and who reads ----------------------------------------------------------------------------------------


def test_what_was_taken_over_is_told_step_by_step_and_where_it_is_from_is_written_down(
    sweep: Sweep, small: Tiny
) -> None:
    theirs = sweep.half("control-0", small(*CONTROL))
    begun = time.time() * 1000
    ours = sweep.run("c01-0", small(*LINEAR))
    assert [report.step for report in ours] == [0, 1, 2, 3]
    assert [report.seconds for report in ours[:2]] == [report.seconds for report in theirs], "as long as it took"
    assert all(report.time_ms >= begun - 1 for report in ours), "at the time at which this trial had them"
    (attempt,) = read_attempts(Folder(str(sweep.folder("c01-0"))))
    assert attempt.shared is not None
    assert attempt.shared.seconds == pytest.approx(sum(report.seconds for report in theirs))
    outcome = read_outcome(Folder(str(sweep.folder("c01-0"))))
    assert outcome is not None
    assert outcome.seconds >= sum(report.seconds for report in ours), "arms stay comparable"
    assert sweep.beginnings == ["after-000000", "after-000002"]


def test_of_another_trial_s_warnings_those_of_the_start_are_this_one_s_too(
    sweep: Sweep, small: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was warned of as it loaded, this one is warned of by itself; and it has engines of its own."""

    class Warned(Trial):
        def _check_contract(self) -> None:
            self.so_far.warnings.append(f"the reward takes {len(told)} ms")

        def _open(self) -> dict[str, float]:
            self._tell_death("killed")
            return super()._open()

    told: list[tuple[str, ...]] = []
    monkeypatch.setattr("trainable.trial_worker.Trial", Warned)
    for name in ("control-0", "c01-0"):
        work = sweep.begin(name, small(*CONTROL, "rollout.max_new_tokens=1"))
        work.step()
        assert work.trial is not None
        told.append(work.trial.receipt().warnings)
        kill(work)
    (first, cut, death), second = told
    assert (first, death[:22]) == ("the reward takes 0 ms", "step 0: the engine die")
    assert second == ("the reward takes 1 ms", cut)


@pytest.mark.parametrize("told", [1, 2, 3])
def test_a_trial_that_is_killed_after_it_took_over_goes_on_and_still_says_so(
    told: int, sweep: Sweep, small: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainable.trial_worker.CHECKPOINT_SHARE", 1e9)
    sweep.half("control-0", small(*CONTROL))
    first = sweep.begin("c01-0", small(*LINEAR))
    reports = [first.step()[0] for _ in range(told)]
    kill(first)
    again = sweep.run("c01-0", small(*LINEAR))
    assert sweep.shared("c01-0") == ("control-0", 2)
    assert [report.step for report in again] == ([3] if told == 3 else [0, 1, 2, 3])
    alone = Sweep(sweep.place / "alone")
    plain = alone.run("c01-0", small(*LINEAR))
    assert list(map(numbers, (reports + again)[-4:])) == list(map(numbers, plain))
    assert ending(sweep, "c01-0") == ending(alone, "c01-0")


@pytest.mark.parametrize("given", [None, ("control-0", 0)])
def test_what_a_trial_wrote_itself_nobody_has_given_it(
    given: tuple[str, int] | None, sweep: Sweep, small: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died before its first checkpoint, and its retry finds its own quiet stage; of that the start may be
    another's."""
    monkeypatch.setattr(TrialWorker, "_save_is_due", lambda work: False)
    if given is not None:
        sweep.half("control-0", small(*CONTROL, "noise.num_stages=1"))
    sweep.half("c01-0", small(*LINEAR))
    assert not list(sweep.folder("c01-0").glob("checkpoint-*")), "it has none of its own"
    told = sweep.run("c01-0", small(*LINEAR))
    assert [report.step for report in told] == [0, 1, 2, 3]
    assert sweep.shared("c01-0") == given
    assert sweep.beginnings == ["after-000000", "after-000002"]


def test_a_trial_that_is_stopped_after_it_took_over_keeps_what_it_has(sweep: Sweep, small: Tiny) -> None:
    sweep.half("control-0", small(*CONTROL))
    first = sweep.begin("c01-0", small(*LINEAR))
    first.step()
    first.leave()
    shutil.rmtree(sweep.place / PREFIXES)
    assert [report.step for report in sweep.run("c01-0", small(*LINEAR))] == [2, 3]
    assert sweep.shared("c01-0") == ("control-0", 2)


def test_a_trial_that_goes_on_from_a_checkpoint_writes_none(
    sweep: Sweep, small: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first steps may be another machine's."""
    monkeypatch.setattr("trainable.trial_worker.CHECKPOINT_SHARE", 1e9)
    first = sweep.begin("control-0", small(*CONTROL))
    first.step()
    kill(first)
    sweep.run("control-0", small(*CONTROL))
    assert sweep.beginnings == ["after-000000"]


def test_a_damaged_beginning_is_passed_over_for_a_shorter_one(
    sweep: Sweep, small: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    sweep.half("control-0", small(*CONTROL))
    (file,) = (sweep.place / PREFIXES).glob("*/after-000002/tensors.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    told = sweep.run("c01-0", small(*LINEAR))
    assert "after-000002 is passed over: a checksum differs" in caplog.text
    assert sweep.shared("c01-0") == ("control-0", 0)
    sweep.half("c02-0", small(*LINEAR))
    assert sweep.shared("c02-0") == ("c01-0", 2), "it was written anew"
    plain = Sweep(sweep.place / "alone").run("c01-0", small(*LINEAR))
    assert list(map(numbers, told)) == list(map(numbers, plain))


def test_an_unfinished_beginning_is_written_by_the_next_trial_and_called_damaged_by_none(
    sweep: Sweep, small: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    """Its writer was killed between its two files, or is at it."""
    sweep.half("control-0", small(*CONTROL))
    for file in (sweep.place / PREFIXES).glob("*/*/progress.json"):
        file.unlink()
    sweep.half("c01-0", small(*LINEAR))
    assert sweep.shared("c01-0") is None
    assert "passed over" not in caplog.text
    sweep.half("c02-0", small(*LINEAR))
    assert sweep.shared("c02-0") == ("c01-0", 2)


def test_the_state_is_copied_once_and_only_where_it_is_given(
    sweep: Sweep, small: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at the start, whose weights are as they were loaded, nor to be found too large or there already, nor by
    whoever takes it over; and not while the writer holds another copy."""
    copies: list[tuple[int, bool]] = []
    copied = Trial.state_dict

    def counted(trial: Trial) -> dict[str, Any]:
        copies.append((trial.so_far.next_step, work.writing.done()))
        return copied(trial)

    monkeypatch.setattr(Trial, "state_dict", counted)
    monkeypatch.setattr(TrialWorker, "_save_is_due", lambda work: False)
    work = sweep.begin("control-0", small(*CONTROL))
    work.step()
    pending = work.writing = Future()
    monkeypatch.setattr(pending, "result", lambda: pending.set_result(None))  # it ends when it is waited for
    work.step()
    kill(work)
    assert copies == [(2, True)]
    for name, most in (("c01-0", prefix.MOST_BYTES), ("c02-0", 1000)):
        monkeypatch.setattr(prefix, "MOST_BYTES", most)
        work = sweep.begin(name, small(*LINEAR))
        work.step()
        work.step()
        kill(work)
        shutil.rmtree(sweep.place / PREFIXES)
    assert copies == [(2, True)]


def test_of_a_state_that_is_too_large_the_start_alone_is_shared(
    sweep: Sweep, small: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "MOST_BYTES", 1000)
    sweep.half("control-0", small(*CONTROL))
    assert sweep.beginnings == ["after-000000"]


def test_a_disk_that_takes_no_beginning_stops_no_trial(
    sweep: Sweep, small: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    sweep.place.mkdir()
    (sweep.place / PREFIXES).touch()
    assert len(sweep.half("control-0", small(*CONTROL))) == 2
    assert "after-000002 is not there for other trials" in caplog.text


def test_a_store_that_does_not_answer_stops_no_trial(
    sweep: Sweep, small: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = Folder.names

    def out(folder: Folder) -> list[str]:
        if PREFIXES in folder.uri:
            raise OSError("it does not answer")
        return names(folder)

    monkeypatch.setattr(Folder, "names", out)
    sweep.half("control-0", small(*CONTROL))
    assert "is passed over: it does not answer" in caplog.text
    assert "after-000002 is not there for other trials: it does not answer" in caplog.text


def test_a_trial_without_a_sweep_shares_nothing(tmp_path: Path, small: Tiny) -> None:
    work = TrialWorker(Folder(str(tmp_path / "trial")), small(*CONTROL, "grpo.steps=1"))
    finish(work)
    assert [path.name for path in tmp_path.iterdir()] == ["trial"]

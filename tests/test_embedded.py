"""The embedded base: the same bits from the same recipe, made once, whoever asks, and by one process while others
wait."""

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trainable.policy.embedded
from spaces.cache import base_folder, cache_folder
from spaces.config import BaseRecipe
from trainable.policy.embedded import BUILD_THREADS, character_tokenizer, ensure_base

SMALL = BaseRecipe(
    depth=1, hidden_size=32, intermediate_size=32, heads=1, digits=1, batch_size=8, clean_steps=3, signed_steps=2
)


def use_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("RIN_CACHE", str(folder))


def steps_of(recipe: BaseRecipe) -> list[tuple[int, int, str]]:
    steps: list[tuple[int, int, str]] = []
    ensure_base(recipe, lambda done, total, what: steps.append((done, total, what)))
    return steps


def test_the_same_recipe_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        use_cache(monkeypatch, tmp_path / name)
        torch.rand(3)
        weights.append(load_file(ensure_base(SMALL) / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("change", [{"seed": 1}, {"signed_steps": 3}, {"depth": 2}, {"digits": 2}])
def test_another_recipe_is_another_base(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, int]
) -> None:
    use_cache(monkeypatch, tmp_path)
    other = SMALL.model_copy(update=change)
    assert base_folder(other) != base_folder(SMALL)
    first, second = (load_file(ensure_base(recipe) / "model.safetensors") for recipe in (SMALL, other))
    assert first.keys() != second.keys() or any(not torch.equal(first[key], second[key]) for key in first)


def test_any_process_of_a_trial_writes_the_base_it_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers writes on rank 0 alone, and nothing elsewhere."""
    use_cache(monkeypatch, tmp_path)
    monkeypatch.setattr("transformers.distributed.mixin._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr("transformers.distributed.mixin._get_torch_distributed_rank", lambda: 1)
    assert load_file(ensure_base(SMALL) / "model.safetensors")


def test_a_base_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_cache(monkeypatch, tmp_path)
    assert steps_of(SMALL) == [(i + 1, 5, "learning sums" if i < 3 else "learning a bad habit") for i in range(5)]
    assert steps_of(SMALL) == []


def test_a_build_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_cache(monkeypatch, tmp_path)
    seen = []
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_num_threads(BUILD_THREADS + 1)
        ensure_base(SMALL, lambda done, total, what: seen.append(torch.get_num_threads()))
        assert set(seen) == {BUILD_THREADS}, "float sums depend on the number of threads"
        assert torch.get_num_threads() == BUILD_THREADS + 1
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


def test_a_build_that_fails_leaves_nothing_half_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_cache(monkeypatch, tmp_path)
    threads = torch.get_num_threads()

    def killed(done: int, total: int, what: str) -> None:
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [], (
            "a signal that nobody catches would leave it"
        )
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_base(SMALL, killed)
    assert not base_folder(SMALL).exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert torch.get_num_threads() == threads
    assert len(steps_of(SMALL)) == 5, "the next one builds it, and the lock is free"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RIN_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/rin-search"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/rin-search"),
    ],
)
def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("RIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_a_character_is_a_token() -> None:
    tokenizer = character_tokenizer()
    ids = tokenizer("12+34=-5").input_ids
    assert len(set(ids)) == len(ids) == 8
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)
    assert tokenizer.decode(ids) == "12+34=-5"
    assert (
        tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == "12+34=-5"
    )
    assert tokenizer.padding_side == "left"


def test_answers_are_what_is_learned() -> None:
    """The loss covers the answer and its end, in one share of the rows behind an unwanted sign."""
    ids, labels = trainable.policy.embedded._batch(random.Random(0), SMALL.model_copy(update={"batch_size": 200}), 0.6)
    tokenizer = character_tokenizer()
    signed = 0
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        prompt, _, answer = tokenizer.decode(row, skip_special_tokens=True).partition("=")
        learned = [token for token in label if token != -100]
        assert tokenizer.decode(learned[:-1]) == answer
        assert learned[-1] == tokenizer.eos_token_id
        a, _, b = prompt.partition("+")
        assert int(answer) == int(a) + int(b)
        signed += answer.startswith("+")
    assert signed / 200 == pytest.approx(0.6, abs=0.12)


def test_who_comes_while_a_base_is_built_waits_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_cache(monkeypatch, tmp_path)
    second: list[tuple[int, int, str]] = []
    other = threading.Thread(target=lambda: second.extend(steps_of(SMALL)))

    def interrupted(done: int, total: int, what: str) -> None:
        if done == 2:
            other.start()
            other.join(timeout=0.3)
            assert other.is_alive(), "it waits"

    ensure_base(SMALL, interrupted)
    other.join(timeout=60)
    assert not other.is_alive()
    assert second == []


TWO_BUILDERS = """
import json
import multiprocessing
import sys
import time

from spaces.config import BaseRecipe
import trainable.policy.embedded as embedded

def build(queue, barrier, recipe):
    steps = []
    def slowly(done, total, what):
        steps.append(done)
        time.sleep(0.1)  # long enough for the other one to come to the lock
    barrier.wait()
    folder = embedded.ensure_base(recipe, slowly)
    queue.put((len(steps), str(folder)))

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    recipe, queue, barrier = BaseRecipe.model_validate_json(sys.argv[1]), fork.Queue(), fork.Barrier(2)
    builders = [fork.Process(target=build, args=(queue, barrier, recipe)) for _ in range(2)]
    for builder in builders:
        builder.start()
    print(json.dumps([queue.get(timeout=60) for _ in builders]))
    for builder in builders:
        builder.join()
"""


@pytest.mark.slow
def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    environment = os.environ | {"RIN_CACHE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", TWO_BUILDERS, SMALL.model_dump_json()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    results = json.loads(run.stdout.splitlines()[-1])
    assert sorted(steps for steps, _ in results) == [0, 5]
    assert len({folder for _, folder in results}) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [Path(results[0][1]).name]

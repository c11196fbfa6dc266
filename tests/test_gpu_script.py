"""Tests of `make gpu`: its parts run here with small shapes, so that the first run on a GPU is no debugging run."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys
for name in ("pydantic", "transformers", "peft", "gfloat", "torchao", "ray", "mlflow"):
    sys.modules[name] = None
from tests.benchmarks.gpu import PARTS, SMALL
from tests.test_cuda_kernels import CHECKS
print(len(CHECKS), PARTS["noise"].work(SMALL, "cpu")[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["machine", "kernels", "noise", "step", "generate", "trial"])
def test_a_part_runs_with_small_shapes(name: str) -> None:
    lines = gpu.PARTS[name].work(gpu.SMALL, "cpu")
    assert lines
    assert not any("NOT" in line or "**" in line for line in lines), lines


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one() -> None:
    (line,) = gpu.ranks(gpu.SMALL, "cpu")
    assert line.endswith("; the same numbers")


@pytest.mark.slow
def test_kernels_and_noise_need_neither_configuration_nor_models() -> None:
    said = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.split()[1:4] == ["|", "dtype", "|"]
    assert int(said.stdout.split()[0]) > 10


def test_a_part_that_lacks_a_package_or_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu._here("machine", False) == ["NOT MEASURED: there was no GPU"]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("peft", "triton") else find(name))
    assert gpu._here("step", True) == ["NOT MEASURED: peft is not installed"]
    assert gpu._here("noise", True) == ["NOT MEASURED: triton is not installed"]


@pytest.mark.slow
def test_a_part_that_breaks_or_takes_too_long_costs_itself_alone() -> None:
    assert gpu.run_part("machine", True, 0.0) == ["NOT MEASURED: it took over 1 s"]


def test_the_page_has_every_part_and_says_what_was_not_measured() -> None:
    page = gpu.page({"noise": ["| a |"]})
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == [p.title for p in gpu.PARTS.values()]
    assert page.count("NOT MEASURED: it was not asked for") == len(gpu.PARTS) - 1
    assert sum(part.seconds for part in gpu.PARTS.values()) < 60 * 10

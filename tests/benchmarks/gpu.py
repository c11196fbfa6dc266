"""The real size on a machine with a GPU: whether kernels compute there what they compute on a CPU, and what a step of
the plan's model takes, beside what was estimated.

    make gpu                          all parts, at most 9 minutes; writes docs/gpu.md
    make gpu ARGS="kernels step"      some of them; the others stay as they were
    make gpu ARGS=--small             on this machine's CPU, with small shapes: shows that the parts run, writes nothing

For a machine that may have no network, another torch and none of this project's environment: `make gpu` takes .venv
where there is one, else python3. Needed are torch, triton, numpy, ml_dtypes and pytest for the kernels, and
transformers, peft, pydantic and what they need for the rest; a part that lacks something says what, and the others run.
Weights of the real shapes are random: times and memory hang on shapes alone.

Each part has a process and a time of its own, and the page is written after each, so that a part that crashes or takes
too long costs itself alone.
"""

import argparse
import contextlib
import importlib.util
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_step import GIB, REAL, SMALL, Sizes, generate, line, microseconds, step

_RAISED = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit)\b")
"""How the last line of a traceback begins."""
_NO_GPU = ["NOT MEASURED: there was no GPU"]
DOCS = Path(__file__).parents[2] / "docs"
TYPES = ("torch", "triton", "numpy", "ml_dtypes")
MODELS = ("torch", "transformers", "peft", "pydantic", "yaml", "safetensors", "filelock", "tokenizers")


MOST_SECONDS = 535.0
"""Of all parts."""


# --- parts ------------------------------------------------------------------------------------------------------------


def machine(sizes: Sizes, device: str) -> list[str]:
    """What this was measured on."""
    found = {}
    for name in (*TYPES, "transformers", "peft", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    lines = [f"- Python {platform.python_version()}, " + ", ".join(f"{name} {which}" for name, which in found.items())]
    import torch

    for index in range(torch.cuda.device_count()):
        has = torch.cuda.get_device_properties(index)
        lines.append(
            f"- {has.name}: {has.total_memory / GIB:.1f} GiB, {has.multi_processor_count} multiprocessors, "
            f"compute capability {has.major}.{has.minor}"
        )
    return lines if device == "cuda" else [*lines, f"- no GPU: {platform.processor() or platform.machine()}"]


def kernels(sizes: Sizes, device: str) -> list[str]:
    """Every check of tests/test_cuda_kernels.py: values, gradients and noise, compared with eager torch on the CPU."""
    from tests.test_cuda_kernels import CHECKS

    if device != "cuda":
        return [f"- {len(CHECKS)} checks; here `make test` runs them in Triton's interpreter"]
    lines = []
    for name, check in CHECKS.items():
        try:
            check(device)
            lines.append(f"- {name.replace('_', ' ')}: equal")
        except Exception as error:  # the page says so, and the other checks run
            lines.append(f"- **{name.replace('_', ' ')}: NOT EQUAL**: {line(error)}")
    return lines


def speeds(sizes: Sizes, device: str) -> list[str]:
    """Kernels against copying the tensor, in GB/s of bytes read and written."""
    from tests.benchmarks.cuda import kernels as table

    return table()


def noise(sizes: Sizes, device: str) -> list[str]:
    """One noisy weight of the MLP's shape: drawn, added, cast and quantised in one pass, beside copying it, beside
    torch.randn of as many numbers, and beside the same in eager torch."""
    import torch

    from trainable.noised import Drawn, noised, noised_eager
    from trainable.philox import key_of
    from trainable.quantization import Arithmetic, fake_quantize

    how, lines = (
        Arithmetic().weight,
        ["| dtype | copy us | noise | noise with the receipt | randn | eager |", "|---" * 6 + "|"],
    )
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(sizes.weight, device=device).mul_(0.02).to(dtype)
        out, clean, drawn = torch.empty_like(weight), fake_quantize(weight), Drawn(key=key_of("gpu"), sigma=0.01)
        rivals: dict[str, Callable[[], object]] = {
            "copy": lambda out=out, weight=weight: out.copy_(weight),  # type: ignore[misc]
            "noise": lambda weight=weight, drawn=drawn: noised(weight, drawn, how),  # type: ignore[misc]
            "receipt": lambda weight=weight, drawn=drawn, clean=clean: noised(weight, drawn, how, clean),  # type: ignore[misc]
            "randn": lambda: torch.randn(sizes.weight, device=device),
            "eager": lambda weight=weight, drawn=drawn: noised_eager(weight, drawn, how),  # type: ignore[misc]
        }
        taken = {name: microseconds(work, device) for name, work in rivals.items()}
        ratios = [f"{taken[name] / taken['copy']:.2f}" for name in ("noise", "receipt", "randn", "eager")]
        lines.append(f"| {str(dtype).removeprefix('torch.')} | {taken['copy']:.1f} | {' | '.join(ratios)} |")
    return [*lines, "", "Columns after the first are multiples of it."]


def trial(sizes: Sizes, device: str) -> list[str]:
    """A whole trial of the workload `tiny` with noise on linear layers, its base model made here; run twice."""
    (first, _), (again, seconds) = _run(_tiny(), 1), _run(_tiny(), 1)
    return [
        f"- {_tiny().grpo.steps} steps in {seconds:.1f} s: {first.outcome}, accuracy {first.eval.accuracy:.3f}, "
        f"{len(first.receipt.effects)} effects of noise measured; {_compared(first, again)}"
    ]


def ranks(sizes: Sizes, device: str) -> list[str]:
    """The same trial in two shares, computed by one process and by two, each with a GPU of its own."""
    import torch

    if device == "cuda" and torch.cuda.device_count() < 2:
        return ["NOT MEASURED: there was one GPU"]
    config = _tiny(parallel={"ranks": 2})
    (alone, one), (together, two) = _run(config, 1), _run(config, 2)
    return [f"- one process {one:.1f} s, two processes {two:.1f} s; {_compared(alone, together)}"]


def _tiny(**changes: Any) -> Any:
    from spaces.reading import merge, read_config
    from spaces.workloads import WORKLOADS

    noise = {"noise": {"modules": ["linear"], "sigma_start": 0.02, "sigma_end": 0.002}, "threads": 1}
    return read_config(merge(merge(WORKLOADS["tiny"].settings, noise), changes))


def _run(config: Any, processes: int) -> tuple[Any, float]:
    """How it ended, and the seconds of its steps."""
    from trainable.launch import launched
    from trainable.trial import Trial

    with launched(config, processes) as (settings, team):
        running = Trial(settings, team=team)
        started = time.perf_counter()
        while not running.done:
            running.step()
        outcome, seconds = running.outcome(), time.perf_counter() - started
        running.close()
    return outcome, seconds


def _compared(one: Any, other: Any) -> str:
    same = one.eval == other.eval and one.receipt.effects == other.receipt.effects
    return "the same numbers" if same else f"**other numbers: {one.eval.accuracy} and {other.eval.accuracy}**"


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    title: str
    work: Callable[[Sizes, str], list[str]]
    needs: tuple[str, ...]
    seconds: int
    """After which it is ended."""


PARTS = {
    "machine": Part(title="The machine", work=machine, needs=("torch",), seconds=30),
    "kernels": Part(title="Kernels: the same bits", work=kernels, needs=(*TYPES, "pytest"), seconds=120),
    "speeds": Part(title="Kernels: speed", work=speeds, needs=TYPES, seconds=60),
    "noise": Part(title="Noise", work=noise, needs=TYPES, seconds=30),
    "step": Part(title="A step of the plan's model", work=step, needs=MODELS, seconds=120),
    "generate": Part(title="Generation", work=generate, needs=MODELS, seconds=70),
    "trial": Part(title="A whole trial", work=trial, needs=MODELS, seconds=90),
    "ranks": Part(title="Two processes", work=ranks, needs=MODELS, seconds=70),
}


def run_part(name: str, small: bool, seconds_left: float) -> list[str]:
    """In a process of its own. Says why where there is nothing to tell."""
    limit = min(PARTS[name].seconds, max(seconds_left, 1.0))
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--part", name, *(["--small"] if small else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return [f"NOT MEASURED: it took over {limit:.0f} s"]
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if _RAISED.match(line)] or [f"exit status {done.returncode}"]
        return [f"NOT MEASURED: {said[-1][:200]}"]
    lines: list[str] = json.loads(done.stdout.splitlines()[-1])
    return lines


def _here(name: str, small: bool) -> list[str]:
    part = PARTS[name]
    missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if missing:
        return [f"NOT MEASURED: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"]
    import torch

    device = "cuda" if torch.cuda.is_available() and not small else "cpu"
    if device == "cpu" and not small:
        return _NO_GPU
    with _quiet():
        return part.work(SMALL if small else REAL, device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Whatever prints does so on stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def page(results: dict[str, list[str]]) -> str:
    lines = ["# The real size on a GPU", "", "Made by `make gpu`; see tests/benchmarks/gpu.py.", ""]
    for name, part in PARTS.items():
        told = " ".join((part.work.__doc__ or "").split())
        lines += [f"## {part.title}", "", told, "", *results.get(name, ["NOT MEASURED: it was not asked for"]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="on the CPU, with small shapes; writes nothing")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(_here(arguments.part, arguments.small)))
        return
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(PARTS)}")
    kept = DOCS / "gpu.json"
    results: dict[str, list[str]] = json.loads(kept.read_text()) if kept.exists() and not arguments.small else {}
    begun = time.perf_counter()
    for name in arguments.parts or PARTS:
        started = time.perf_counter()
        lines = run_part(name, arguments.small, MOST_SECONDS - (started - begun))
        print(f"{PARTS[name].title}, {time.perf_counter() - started:.0f} s", *lines, sep="\n", flush=True)
        if lines == _NO_GPU and name in results:
            continue  # what was measured elsewhere stays
        results[name] = lines
        if not arguments.small:
            kept.write_text(json.dumps(results, indent=1) + "\n")
            (DOCS / "gpu.md").write_text(page(results))


if __name__ == "__main__":
    main()

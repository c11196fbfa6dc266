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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
GIB = 1 << 30
TYPES = ("torch", "triton", "numpy", "ml_dtypes")
MODELS = ("torch", "transformers", "peft", "pydantic", "yaml", "safetensors", "filelock", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What parts compute with."""

    weight: tuple[int, int]
    """Of which noise is drawn."""
    prompts: int
    prompt: int
    completion: int
    """Tokens of each."""
    micro_batch_tokens: int
    sampled: tuple[int, ...]
    """Sequences that are generated at once."""
    new_tokens: int
    shapes: dict[str, int]
    """Changes of the model's config.json."""


REAL = Sizes(
    weight=(8960, 1536),
    prompts=2,
    prompt=512,
    completion=1024,
    micro_batch_tokens=8192,
    sampled=(8, 64, 256),
    new_tokens=64,
    shapes={},
)
SMALL = Sizes(
    weight=(64, 96),
    prompts=2,
    prompt=8,
    completion=16,
    micro_batch_tokens=128,
    sampled=(8,),
    new_tokens=4,
    shapes={
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "vocab_size": 512,
    },
)
GROUP = 8
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
            lines.append(f"- **{name.replace('_', ' ')}: NOT EQUAL**: {_line(error)}")
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
        taken = {name: _microseconds(work, device) for name, work in rivals.items()}
        ratios = [f"{taken[name] / taken['copy']:.2f}" for name in ("noise", "receipt", "randn", "eager")]
        lines.append(f"| {str(dtype).removeprefix('torch.')} | {taken['copy']:.1f} | {' | '.join(ratios)} |")
    return [*lines, "", "Columns after the first are multiples of it."]


def step(sizes: Sizes, device: str) -> list[str]:
    """The model of the plan with random weights: log-probs of a batch by the clean policy, and its update, both in
    micro-batches of so many tokens; the most memory that torch held, beside the estimate of the same configuration."""
    import torch

    lines = [
        f"{sizes.prompts} x {GROUP} completions of {sizes.completion} tokens, prompts of {sizes.prompt}, "
        f"micro-batches of {sizes.micro_batch_tokens} tokens.",
        "",
        "| | log-probs s | tokens/s | update s | tokens/s | most GiB | estimated GiB |",
        "|---" * 7 + "|",
    ]
    for name, overrides in _variants(sizes).items():
        config = _config(sizes, overrides)
        try:
            lines.append(f"| {name} | {' | '.join(_timed_step(config, sizes, device))} |")
        except torch.OutOfMemoryError as error:
            lines.append(f"| {name} | out of memory: {_line(error)} | | | | | {_estimated(config)} |")
        if device == "cuda":
            torch.cuda.empty_cache()
    return lines


def generate(sizes: Sizes, device: str) -> list[str]:
    """Sampled tokens per second of the torch backend, at W4A4, of completions that do not end by themselves."""
    from trainable.engines.engine import Request
    from trainable.policy.policy import deployed
    from trainable.rollout import generate as sample

    policy = _policy(_config(sizes, {}), sizes, device, ends=(1 << 40,))
    lines = ["| sequences | tokens each | tokens/s |", "|---|---|---|"]
    for count in sizes.sampled:
        request = Request(
            prompts=[list(range(1, sizes.prompt // 2))] * (count // GROUP),
            group_size=GROUP,
            max_new_tokens=sizes.new_tokens,
            temperature=1.0,
            batch_size=count,
            draw=("gpu", 0, 0, 0),
        )
        with deployed(policy):
            sample(policy, request)
            seconds = _seconds(partial(sample, policy, request), device)
        lines.append(f"| {count} | {sizes.new_tokens} | {count * sizes.new_tokens / seconds:.0f} |")
    return lines


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


# --- the real shapes --------------------------------------------------------------------------------------------------


def _variants(sizes: Sizes) -> dict[str, dict[str, Any]]:
    return {
        "W4A4": {},
        "W4A4, activations computed again": {"grpo": {"checkpoint_activations": True}},
        "no quantisation": {"quant": {"weights": "none", "activations": "none"}},
    }


def _config(sizes: Sizes, changes: dict[str, Any]) -> Any:
    from spaces.reading import merge, read_config
    from spaces.workloads import WORKLOADS

    settings = merge(WORKLOADS["qwen2.5-1.5b-gsm8k"].settings, changes)
    lengths = {
        "grpo": {
            "prompts": sizes.prompts,
            "generation_prompts": sizes.prompts,
            "updates_per_step": 1,
            "micro_batch_tokens": sizes.micro_batch_tokens,
            "overlong_buffer": 0,
        },
        "rollout": {"max_new_tokens": sizes.completion, "max_prompt_tokens": sizes.prompt, "backend": "torch"},
    }
    return read_config(merge(settings, lengths))


def _policy(config: Any, sizes: Sizes, device: str, ends: tuple[int, ...] = (0,)) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from spaces.architectures import ARCHITECTURES
    from trainable.policy.loading import wrapped

    shapes = {**ARCHITECTURES[config.model.name], **sizes.shapes}
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shapes), dtype=getattr(torch, config.model.dtype), attn_implementation="sdpa"
        )
    network.generation_config.eos_token_id = [0]
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    return replace(wrapped(network, tokenizer, config.model, config.quant, config.seed), ends=ends)


def _timed_step(config: Any, sizes: Sizes, device: str) -> list[str]:
    import torch

    from trainable.forward.logps import Batch, clean_logps
    from trainable.grpo import update
    from trainable.masters import MasterAdamW
    from trainable.policy.policy import deployed

    policy, rows = _policy(config, sizes, device), sizes.prompts * GROUP
    optimizer = MasterAdamW(list(policy.trainable().values()), lr=1e-5, fused=True)
    ids = torch.randint(1, 500, (rows, sizes.completion), device=device)
    mask = torch.ones(rows, sizes.completion, device=device)
    prompts = torch.randint(1, 500, (sizes.prompts, sizes.prompt), device=device).repeat_interleave(GROUP, 0)
    batch = Batch(
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts),
        completion_ids=ids,
        mask=mask,
        rollout_logps=torch.zeros_like(mask),
        advantages=torch.randn(rows, device=device),
        old_logps=torch.zeros_like(mask),
        group_size=GROUP,
    )
    tokens = rows * (sizes.prompt + sizes.completion)

    def learn() -> None:
        update(policy, optimizer, batch, config.grpo, config.rollout, first_update=0, shuffle=torch.Generator())

    with deployed(policy):
        logps = _seconds(lambda: clean_logps(policy, batch, 1.0, config.grpo.micro_batch), device)
    learn()  # which makes the moments
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    learned = _seconds(learn, device)
    most = f"{torch.cuda.max_memory_allocated() / GIB:.2f}" if device == "cuda" else "-"
    rates = [f"{logps:.3g}", f"{tokens / logps:.0f}", f"{learned:.3g}", f"{tokens / learned:.0f}"]
    return [*rates, most, _estimated(config) if not sizes.shapes else "-"]


def _estimated(config: Any) -> str:
    from trainable.footprint import footprint

    return f"{footprint(config).phases['update'].bytes / GIB:.2f}"


# --- clocks -----------------------------------------------------------------------------------------------------------


def _seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """The median, after one that warms up."""
    import torch

    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def _microseconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        milliseconds: float = do_bench(work, return_mode="median")
        return milliseconds * 1e3
    return _seconds(work, device) * 1e6


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


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
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
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
        return ["NOT MEASURED: there was no GPU"]
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
        results[name] = run_part(name, arguments.small, MOST_SECONDS - (started - begun))
        print(f"{PARTS[name].title}, {time.perf_counter() - started:.0f} s", *results[name], sep="\n", flush=True)
        if not arguments.small:
            kept.write_text(json.dumps(results, indent=1) + "\n")
            (DOCS / "gpu.md").write_text(page(results))


if __name__ == "__main__":
    main()

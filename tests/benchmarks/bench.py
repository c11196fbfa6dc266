"""How long things take here: rivals side by side in one run, as ratios with their spread.

    make bench      about 4 minutes on two quiet cores; writes docs/benchmarks.md

Timings on shared machines are noisy, so each figure is a median with its quartiles, and what matters is a ratio within one run.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch

from spaces.config import ModelConfig, QuantConfig
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS
from trainable.model import deployed, load_policy
from trainable.quantization import fake_quantize
from trainable.rollout import encode_prompts, generate
from trainable.seeds import generator
from trainable.tasks import build_task

DOCS = Path(__file__).parents[2] / "docs"
RIN = Path(sys.executable).parent / "rin"


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def spread(times: list[float], unit: float = 1.0) -> str:
    low, _, high = quantiles(times, n=4)
    return f"{median(times) / unit:.3g} ({low / unit:.3g} to {high / unit:.3g})"


def start_up() -> list[str]:
    times = seconds(lambda: subprocess.run([str(RIN), "--help"], capture_output=True, check=True), 9)
    return [f"- `rin --help`: {spread(times)} s"]


def whole_trials() -> list[str]:
    """Trials in processes of their own, so that start-up and peak memory are theirs."""
    lines = []
    for arguments in (["control"], ["bf16"]):
        times, steps = [], []
        for _ in range(3):
            started = time.perf_counter()
            done = subprocess.run([str(RIN), "trial", *arguments, "--json"], capture_output=True, text=True, check=True)
            times.append(time.perf_counter() - started)
            reports = [json.loads(line) for line in done.stdout.splitlines()][:-1]
            steps += [report["seconds"] for report in reports if "eval/accuracy" not in report["signals"]][1:]
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        lines.append(
            f"- `rin trial {' '.join(arguments)}`: {spread(times)} s, a step {spread(steps)} s, largest process so far {peak:.2f} GiB"
        )
    return lines


def quantiser() -> list[str]:
    """Against copying the tensor, and against torchao in the same run; one thread."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode

    torch.set_num_threads(1)
    lines = ["| shape, dtype | copy_ us | mxfp4 / copy_ | torchao / copy_ |", "|---|---|---|---|"]
    for shape in ((64, 256), (4096, 96), (2048, 2048)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, generator=generator("bench")).to(dtype)
            out = torch.empty_like(x)
            repeats = 200 if x.numel() < 10**5 else 20
            copy = median(seconds(lambda out=out, x=x: out.copy_(x), repeats))
            ours = median(seconds(lambda x=x: fake_quantize(x), repeats))
            theirs = median(
                seconds(lambda x=x: MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR).dequantize(), repeats)
            )
            name = f"{shape[0]}x{shape[1]}, {str(dtype).removeprefix('torch.')}"
            lines.append(f"| {name} | {copy * 1e6:.1f} | {ours / copy:.0f} | {theirs / copy:.0f} |")
    return lines


def rollout() -> list[str]:
    """Ours against transformers' `generate`, unquantised on both sides, greedy, equal tokens; two threads."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = read_config(merge(WORKLOADS["embedded"].settings, {"quant": {"weights": "none", "activations": "none"}}))
    policy = load_policy(ModelConfig(), QuantConfig(weights="none", activations="none"), 0)
    task = build_task(config.task)
    lines = ["| sequences | ours tokens/s | generate tokens/s | ratio |", "|---|---|---|---|"]
    for groups in (4, 32):
        questions = task.sample(groups, seed=0, step=0, batch=0)
        prompts = encode_prompts(policy, questions, config.task, 64)
        rows = [row for row in prompts for _ in range(8)]
        width = max(len(row) for row in rows)
        pad = policy.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = (ids != pad).long()

        def ours(prompts: list[list[int]] = prompts) -> None:
            with deployed(policy):
                generate(policy, prompts, group_size=8, max_new_tokens=6, temperature=0.0, batch_size=1024)

        def theirs(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            policy.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)  # type: ignore[operator]

        a, b = median(seconds(ours, 9)), median(seconds(theirs, 9))
        tokens = 6 * len(rows)
        lines.append(f"| {len(rows)} | {tokens / a:.0f} | {tokens / b:.0f} | {b / a:.2f} |")
    return lines


PARTS = {"Start-up": start_up, "Whole trials": whole_trials, "Fake quantisation": quantiser, "Rollout": rollout}


def main() -> None:
    page = ["# Benchmarks", "", f"Made by `make bench` on {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}.", ""]
    for title, part in PARTS.items():
        print(title, flush=True)
        page += [f"## {title}", "", part.__doc__ or "", "", *part(), ""] if part.__doc__ else [f"## {title}", "", *part(), ""]
    DOCS.mkdir(exist_ok=True)
    (DOCS / "benchmarks.md").write_text("\n".join(page), encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()

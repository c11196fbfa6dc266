"""The plan's model on a GPU, with random weights: a step and its generation, and the sizes and clocks of all parts of
`make gpu`."""

import atexit
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30
PLAN = "qwen2.5-1.5b-gsm8k"


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


_VARIANTS: dict[str, dict[str, Any]] = {
    "W4A4": {},
    "W4A4, blocks computed again": {"grpo": {"checkpoint_activations": True}},
    "no quantisation": {"quant": {"weights": "none", "activations": "none"}},
}


# --- parts ------------------------------------------------------------------------------------------------------------


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
    for name, overrides in _VARIANTS.items():
        config = _config(sizes, overrides)
        try:
            lines.append(f"| {name} | {' | '.join(_timed_step(config, sizes, device))} |")
        except Exception as error:  # the page says so, and the other rows are measured
            lines.append(f"| {name} | NOT MEASURED: {line(error)} | | | | | |")
        if device == "cuda":
            torch.cuda.empty_cache()
    return lines


def generate(sizes: Sizes, device: str) -> list[str]:
    """Sampled tokens per second of the torch backend, at W4A4, of completions that do not end by themselves."""
    from trainable.engines.engine import Request
    from trainable.policy.policy import deployed
    from trainable.rollout import generate as sample

    policy = _policy(_config(sizes, {}), device, ends=(1 << 40,))
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
            taken = seconds(partial(sample, policy, request), device)
        lines.append(f"| {count} | {sizes.new_tokens} | {count * sizes.new_tokens / taken:.0f} |")
    return lines


# --- the model --------------------------------------------------------------------------------------------------------


def _config(sizes: Sizes, changes: dict[str, Any]) -> Any:
    from spaces.reading import merge, read_config
    from spaces.workloads import WORKLOADS

    settings = merge(WORKLOADS[PLAN].settings, changes)
    ours = {
        "model": {"name": str(_shapes(sizes))},
        "grpo": {
            "prompts": sizes.prompts,
            "generation_prompts": sizes.prompts,
            "updates_per_step": 1,
            "micro_batch_tokens": sizes.micro_batch_tokens,
            "overlong_buffer": 0,
        },
        "rollout": {"max_new_tokens": sizes.completion, "max_prompt_tokens": sizes.prompt, "backend": "torch"},
    }
    return read_config(merge(settings, ours))


def _shapes(sizes: Sizes) -> Path:
    """A folder with the model's config.json and nothing else."""
    from spaces.architectures import ARCHITECTURES
    from spaces.workloads import WORKLOADS

    folder = Path(tempfile.mkdtemp(prefix="rin-shapes-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    known = ARCHITECTURES[WORKLOADS[PLAN].settings["model"]["name"]]
    (folder / "config.json").write_text(json.dumps({**known, **sizes.shapes}))
    return folder


def _policy(config: Any, device: str, ends: tuple[int, ...] = (0,)) -> Any:
    """Random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainable.policy.loading import wrapped

    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(config.model.name),
            dtype=getattr(torch, config.model.dtype),
            attn_implementation="sdpa",
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

    policy, rows = _policy(config, device), sizes.prompts * GROUP
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
        logps = seconds(lambda: clean_logps(policy, batch, 1.0, config.grpo.micro_batch), device)
    learn()  # which makes the moments
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    learned = seconds(learn, device)
    most = f"{torch.cuda.max_memory_allocated() / GIB:.2f}" if device == "cuda" else "-"
    rates = [f"{logps:.3g}", f"{tokens / logps:.0f}", f"{learned:.3g}", f"{tokens / learned:.0f}"]
    return [*rates, most, _estimated(config)]


def _estimated(config: Any) -> str:
    from trainable.footprint import footprint

    return f"{footprint(config).phases['update'].bytes / GIB:.2f}"


# --- clocks -----------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
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


def microseconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        milliseconds: float = do_bench(work, return_mode="median")
        return milliseconds * 1e3
    return seconds(work, device) * 1e6


def line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]

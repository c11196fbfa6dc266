"""The memory of a step's learning on SmolLM2-135M: the peak above the loaded model, in a process of its own.

    make bench ARGS=memory
    python -m tests.benchmarks.memory full|lora 8 [dotted=value ..]    one measurement of 8 prompts, a line of JSON

The second form runs in the checkout whose code it is to measure, also in an old one: it asks for nothing that came
later.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from spaces.reading import merge, read_config
from spaces.workloads import TRIAL_ENVIRONMENT, WORKLOADS
from tests.benchmarks.growth import _forget_the_peak, _gib

BEFORE = "94a1bd9~1"
"""The last commit that had all logits at once; the workload asked for 8 rows a micro-batch then."""
ROWS = "grpo.micro_batch_size"
WAYS_BEFORE: tuple[tuple[str, ...], ...] = ((f"{ROWS}=8",), (f"{ROWS}=4",))
"""The workload's own then, and one that lets half as many rows meet."""
WAYS: tuple[tuple[str, ...], ...] = (
    (),
    ("grpo.micro_batch_tokens=null", f"{ROWS}=8"),
    ("grpo.checkpoint_activations=true",),
)
HERE = Path(__file__).parents[2]
GROUP, PROMPT_TOKENS, TOKENS = 4, 16, 256


def one_step(adapter: str, prompts: str, *overrides: str) -> dict[str, float]:
    """Log-probs of 4 completions of 256 tokens for each prompt, and an update (AdamW, whose moments exist). Peak memory
    above the loaded model in GiB, seconds of processors and of the clock."""
    import torch

    from trainable.episode import Completion, Episode
    from trainable.forward.logps import clean_logps, make_batch
    from trainable.grpo import update
    from trainable.masters import MasterAdamW
    from trainable.policy.loading import load_policy
    from trainable.policy.policy import deployed
    from trainable.seeds import generator
    from trainable.tasks.task import Question, Score

    tree: Any = merge(
        WORKLOADS["smollm2-135m"].settings, {"model": {"adapter": adapter}, "grpo": {"updates_per_step": 1}}
    )
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        tree = merge(tree, {section: {name: json.loads(value)}})
    config = read_config(tree)
    policy = load_policy(config.model, config.quant, 0)
    if getattr(config.grpo, "checkpoint_activations", False):
        policy = replace(policy, checkpoints=True)
    source = random.Random(0)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(source.randrange(100, policy.vocabulary) for _ in range(number))

    def episode(prompt: tuple[int, ...]) -> Episode:
        completion = Completion(ids=tokens(TOKENS), logps=(-9.0,) * TOKENS, entropy=1.0, finished=False)
        return Episode(
            question=Question(prompt="", answer=""),
            prompt_ids=prompt,
            completion=completion,
            text="",
            score=Score(reward=0.0, correct=False, parts={}),
        )

    asked_for = [tokens(PROMPT_TOKENS) for _ in range(int(prompts))]
    groups = [tuple(episode(asked) for _ in range(GROUP)) for asked in asked_for]
    optimizer = MasterAdamW(list(policy.trainable().values()), lr=1e-6, fused=True)
    before, size = _forget_the_peak(), getattr(config.grpo, "micro_batch", config.grpo.micro_batch_size)

    for parameter in policy.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # moments exist, as from the second update on
    optimizer.zero_grad(set_to_none=True)
    started, processors = time.perf_counter(), time.process_time()
    batch = make_batch(policy, groups, torch.linspace(-1, 1, len(groups) * GROUP).view(-1, GROUP))
    with deployed(policy):
        batch.old_logps.copy_(clean_logps(policy, batch, 1.0, size))
    update(policy, optimizer, batch, config.grpo, config.rollout, first_update=0, shuffle=generator("shuffle"))
    seconds, used = time.perf_counter() - started, time.process_time() - processors
    return {"gib": _gib("VmHWM") - before, "seconds": seconds, "processors": used}


def measured(checkout: Path, adapter: str, prompts: int, *overrides: str) -> dict[str, float]:
    """`one_step` by the code of a checkout, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.memory", adapter, str(prompts), *overrides],
        cwd=checkout,
        env=os.environ | TRIAL_ENVIRONMENT | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def step_memory() -> list[str]:
    """A step's learning on SmolLM2-135M in fp32, W4A4: 32 completions of 256 tokens, an update; the peak above the
    loaded model, each in a process of its own, and what it was before heads were taken in chunks, by that code."""
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(before), BEFORE], cwd=HERE, check=True)
        try:
            shutil.copy(__file__, before / "tests" / "benchmarks")
            lines = [
                "| trained | code, settings | GiB | times before | processor seconds | times before |",
                "|" + "---|" * 6,
            ]
            for adapter in ("full", "lora"):
                rows = [(" ".join(["before", *ways]), measured(before, adapter, 8, *ways)) for ways in WAYS_BEFORE]
                rows += [(" ".join(["now", *ways]), measured(HERE, adapter, 8, *ways)) for ways in WAYS]
                first = rows[0][1]
                for name, found in rows:
                    memory, time_used = found["gib"] / first["gib"], found["processors"] / first["processors"]
                    lines.append(
                        f"| {adapter} | {name} | {found['gib']:.2f} | {memory:.2f} | {found['processors']:.0f} | "
                        f"{time_used:.2f} |"
                    )
            return lines
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=HERE, check=True)


if __name__ == "__main__":
    print(json.dumps(one_step(*sys.argv[1:])))

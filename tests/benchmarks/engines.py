"""Who generates fastest, and from where on vLLM pays: the torch backend, transformers' `generate`, vLLM."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from search.statistics import compare
from spaces.cache import base_folder
from spaces.reading import read_config
from spaces.workloads import WORKLOADS
from tests.benchmarks.timing import never_end, ratio, spread
from trainable.engines.backend import TorchBackend, VllmBackend, start_backend
from trainable.engines.engine import Request
from trainable.forward.transformer import left_padded
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, deployed
from trainable.policy.sources import SMOLLM2_FILE, smollm2_folder
from trainable.rollout import encode_prompts
from trainable.tasks.table import build_task
from trainable.trial import Trial

SHAPES = (("embedded", 6, (1, 32, 256)), ("smollm2-135m", 16, (1, 32, 256)), ("smollm2-135m", 96, (32,)))
"""Workload, tokens of a completion, sequences."""
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """One model, three ways to generate with it."""

    policy: Policy
    generate: Any
    torch: TorchBackend
    vllm: VllmBackend

    def speeds(self, prompts: list[list[int]], group: int, tokens: int) -> dict[str, list[float]]:
        """Tokens per second of each round; one call of each warms up. Call it inside `deployed`."""
        request = Request(
            prompts=prompts,
            group_size=group,
            max_new_tokens=tokens,
            temperature=1.0,
            batch_size=len(prompts) * group,
            draw=("sample", 0),
        )
        ids, mask = left_padded(
            [prompt for prompt in prompts for _ in range(group)], self.policy.tokenizer.pad_token_id, self.policy.device
        )
        fixed: dict[str, Any] = {
            "do_sample": True,
            "temperature": 1.0,
            "min_new_tokens": tokens,
            "max_new_tokens": tokens,
        }
        rivals: dict[str, Callable[[], object]] = {
            "generate": lambda: self.generate.generate(input_ids=ids, attention_mask=mask, **fixed),
            "torch": lambda: self.torch.generate(self.policy, request),
            "vllm": lambda: self.vllm.generate(self.policy, request),
        }
        return {name: [len(ids) * tokens / seconds for seconds in times] for name, times in _in_turns(rivals).items()}

    def sync_seconds(self) -> list[float]:
        times = []
        for _ in range(12):
            started = time.perf_counter()
            self.vllm.sync(self.policy)
            times.append(time.perf_counter() - started)
        return times[2:]


def engines() -> list[str]:
    """Tokens per second of sampled completions without an end token (so that all are equally long), at most 8 of a
    prompt, fp32, two threads, W4A4 but for `generate`, which is unquantised and computes no log-probs. The rivals take
    turns, three rounds; start-up is the time until the first completion can be asked for."""
    lines = [
        "| model | sequences x tokens | generate | torch backend | vLLM | vLLM / torch backend | vLLM / generate |",
        "|---" * 7 + "|",
    ]
    notes = []
    for workload, tokens, counts in SHAPES:
        config = read_config(WORKLOADS[workload].settings, ["rollout.backend=vllm", f"rollout.max_new_tokens={tokens}"])
        policy = load_policy(config.model, config.quant, 0)
        never_end(policy.tokenizer)
        started = time.perf_counter()
        vllm = start_backend(config, policy)
        start_up = time.perf_counter() - started
        assert isinstance(vllm, VllmBackend)
        rivals = Rivals(policy=policy, generate=_as_transformers_loads_it(workload), torch=TorchBackend(), vllm=vllm)
        questions = build_task(config.task).sample(max(counts), seed=0, step=0, batch=0)
        prompts = encode_prompts(policy, questions, config.task, config.rollout.max_prompt_tokens)
        with deployed(policy):
            vllm.sync(policy)
            for sequences in counts:
                group = min(8, sequences)
                speeds = rivals.speeds(prompts[: sequences // group], group, tokens)
                rates = " | ".join(f"{median(speeds[name]):.0f}" for name in ("generate", "torch", "vllm"))
                ratios = " | ".join(ratio(speeds, "vllm", rival) for rival in ("torch", "generate"))
                lines.append(f"| {workload} | {sequences} x {tokens} | {rates} | {ratios} |")
            syncs = rivals.sync_seconds()
        vllm.close()
        notes.append(
            f"- {workload}, {tokens} tokens: start-up of vLLM {start_up:.1f} s, weight sync {spread(syncs, 1e-3)} ms"
        )
    return [*lines, "", *notes, *_share_of_a_step()]


def backends() -> list[str]:
    """The default trial with RMSNorm noise by both backends, five seeds: equal receipts and sigmas, and the paired
    difference of their accuracies. They draw other samples, so the accuracies differ as those of two seeds do."""
    found: dict[str, list[float]] = {"torch": [], "vllm": []}
    for seed in range(5):
        told = []
        for backend, accuracies in found.items():
            trial = Trial(
                read_config(
                    WORKLOADS["embedded"].settings,
                    [f"rollout.backend={backend}", f"seed={seed}", "noise.sigma_start=0.05"],
                )
            )
            sigmas = []
            while not trial.done:
                sigmas.append(trial.step().sigma)
            outcome = trial.outcome()
            trial.close()
            accuracies.append(outcome.eval.accuracy)
            told.append(
                (
                    sigmas,
                    outcome.receipt.quantized,
                    outcome.receipt.noised,
                    [e.nominal for e in outcome.receipt.effects],
                )
            )
        assert told[0] == told[1], "equal receipts and sigmas"
    difference = compare(found["vllm"], found["torch"])
    rows = [
        f"| {backend} | {', '.join(f'{100 * value:.1f}' for value in values)} |" for backend, values in found.items()
    ]
    low, high = 100 * difference.low, 100 * difference.high
    verdict = (
        f"- vLLM minus torch: {100 * difference.difference:+.1f} points [{low:+.1f}, {high:+.1f}], {difference.verdict}"
    )
    return ["| backend | accuracy after 29 steps, seeds 0 to 4, % |", "|---|---|", *rows, "", verdict]


def _share_of_a_step() -> list[str]:
    """The sync in a real step of the default trial."""
    trial = Trial(
        read_config(
            WORKLOADS["embedded"].settings,
            ["rollout.backend=vllm", "grpo.steps=12", "eval.every=0", "eval.questions=64"],
        )
    )
    spent: list[float] = []
    real = trial.backend.sync

    def timed(policy: Policy) -> None:
        started = time.perf_counter()
        real(policy)
        spent.append(time.perf_counter() - started)

    trial.backend.sync = timed  # type: ignore[method-assign]
    steps, syncs = [], []
    for _ in range(11):
        spent.clear()
        report = trial.step()
        steps.append(report.seconds)
        syncs.append(sum(spent))
    trial.close()
    share = 100 * median(syncs[1:]) / median(steps[1:])
    return [f"- a step of the default trial with vLLM: {spread(steps[1:])} s, of which the weight sync {share:.1f} %"]


def _in_turns(rivals: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Median seconds of each round; a round is 20 calls or two seconds, whichever comes first."""
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for work in rivals.values():
        work()
    for _ in range(ROUNDS):
        for name, work in rivals.items():
            times: list[float] = []
            begun = time.perf_counter()
            while not times or (time.perf_counter() - begun < 2 and len(times) < 20):
                started = time.perf_counter()
                work()
                times.append(time.perf_counter() - started)
            found[name].append(median(times))
    return found


def _as_transformers_loads_it(workload: str) -> Any:
    config = read_config(WORKLOADS[workload].settings)
    if config.model.recipe is not None:
        return AutoModelForCausalLM.from_pretrained(str(base_folder(config.model.recipe)), dtype=torch.float32).eval()
    return AutoModelForCausalLM.from_pretrained(
        str(smollm2_folder()), gguf_file=SMOLLM2_FILE, dtype=torch.float32
    ).eval()

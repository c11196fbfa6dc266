"""A GRPO step: against TRL's, its rollout against transformers' `generate`, and where its time goes."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from spaces.cache import base_folder
from spaces.config import ModelConfig, QuantConfig
from spaces.reading import merge, read_config
from spaces.workloads import WORKLOADS
from tests.benchmarks.timing import in_turns, ratio, spread
from trainable.engines.engine import Request
from trainable.forward.transformer import left_padded
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, deployed
from trainable.rollout import encode_prompts, generate
from trainable.tasks.table import build_task
from trainable.tasks.task import Answer
from trainable.trial import Trial

PLAIN = {"weights": "none", "activations": "none"}
STEPS = 12


def _trial(**changes: Any) -> Trial:
    settings = {
        "grpo": {"steps": STEPS, "updates_per_step": 1},
        "eval": {"questions": 8, "every": 0},
        "rollout": {"max_new_tokens": 6},
    }
    return Trial(read_config(merge(merge(WORKLOADS["embedded"].settings, settings), changes)))


def _our_steps(**changes: Any) -> list[float]:
    trial = _trial(**changes)
    return [trial.step().seconds for _ in range(STEPS - 1)][1:]


def _trl_steps() -> list[float]:
    """TRL's GRPOTrainer on the same base and questions: 32 prompts x 8 samples x 6 tokens, one update, AdamW, no
    reference model."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig as TRLConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    config = read_config(WORKLOADS["embedded"].settings)
    assert config.model.recipe is not None
    task, clock = build_task(config.task), Clock()
    questions = [question for step in range(STEPS) for question in task.sample(32, seed=0, step=step, batch=0)]
    by_prompt = {question.prompt: question for question in questions}

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        rows = zip(prompts, completions, strict=True)
        return [score.reward for score in task.scores([Answer(question=by_prompt[p], text=text) for p, text in rows])]

    with tempfile.TemporaryDirectory() as folder:
        arguments = TRLConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=256,
            num_generations=8,
            max_completion_length=6,
            temperature=1.0,
            beta=0.0,
            learning_rate=3e-5,
            max_steps=STEPS,
            logging_strategy="no",
            save_strategy="no",
            model_init_kwargs={"dtype": "float32"},
        )
        trainer: Any = GRPOTrainer(
            model=str(base_folder(config.model.recipe)),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": question.prompt} for question in questions]),
            callbacks=[clock],
        )
        trainer.train()
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)][1:]


def against_trl() -> list[str]:
    """Seconds a step: 32 prompts x 8 samples x 6 tokens on the embedded base, one update, the same questions, rewards
    and optimiser, two threads; three rounds in turns. TRL quantises nothing. Ours computes the clean policy's log-probs
    besides, for its signals."""
    rivals: dict[str, Callable[[], list[float]]] = {
        "TRL": _trl_steps,
        "ours, no quantisation": lambda: _our_steps(quant=PLAIN),
        "ours, W4A4": _our_steps,
    }
    rounds: dict[str, list[float]] = defaultdict(list)
    for _ in range(3):
        for name, run in rivals.items():
            rounds[name].append(median(run()))
    lines = ["| | s a step | times TRL's |", "|---|---|---|"]
    return lines + [
        f"| {name} | {median(times):.3f} | {ratio(rounds, name, 'TRL')} |" for name, times in rounds.items()
    ]


def rollout() -> list[str]:
    """Tokens per second of greedy completions of at most 6 tokens, groups of 8, two threads: ours at W4A4 and without
    quantisation, transformers' `generate` on the same base as transformers loads it, which computes no log-probs.
    Tokens are counted up to the end."""
    lines = [
        "| sequences | generate tokens/s | ours tokens/s | times generate | ours W4A4 tokens/s | times generate |",
        "|---|---|---|---|---|---|",
    ]
    config = read_config(WORKLOADS["embedded"].settings)
    assert config.model.recipe is not None
    policies = {
        "ours": load_policy(ModelConfig(), QuantConfig(**PLAIN), 0),
        "W4A4": load_policy(ModelConfig(), QuantConfig(), 0),
    }  # type: ignore[arg-type]
    theirs: Any = AutoModelForCausalLM.from_pretrained(base_folder(config.model.recipe)).eval()
    plain, task = policies["ours"], build_task(config.task)
    for groups in (1, 4, 32):
        prompts = encode_prompts(plain, task.sample(groups, seed=0, step=0, batch=0), config.task, 64)
        ids, mask = left_padded([row for row in prompts for _ in range(8)], plain.tokenizer.pad_token_id, plain.device)

        def ours(policy: Policy, prompts: list[list[int]] = prompts) -> list[Any]:
            with deployed(policy):
                asked = Request(prompts=prompts, group_size=8, max_new_tokens=6, temperature=0.0, batch_size=1024)
                return generate(policy, asked)

        def generated(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> torch.Tensor:
            answer: torch.Tensor = theirs.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False
            )
            return answer[:, ids.shape[1] :]

        end = plain.tokenizer.eos_token_id
        rows = [[*c.ids, *[end] * (6 - len(c.ids))] for group in ours(plain) for c in group]
        expected = [
            [token if end not in row[:i] else end for i, token in enumerate(row)] for row in generated().tolist()
        ]
        assert [row[: len(e)] for row, e in zip(rows, expected, strict=True)] == expected, "equal greedy answers"
        tokens = {name: sum(len(c.ids) for group in ours(policy) for c in group) for name, policy in policies.items()}
        medians = in_turns(
            {"generate": generated, **{n: (lambda p=p: ours(p)) for n, p in policies.items()}}, repeats=9
        )  # type: ignore[misc]
        per_second = {name: tokens.get(name, tokens["ours"]) / median(times) for name, times in medians.items()}
        cells = [
            f"{per_second['generate']:.0f}",
            f"{per_second['ours']:.0f}",
            ratio(medians, "generate", "ours"),
            f"{per_second['W4A4']:.0f}",
            ratio(medians, "generate", "W4A4"),
        ]
        lines.append(f"| {len(ids)} | {' | '.join(cells)} |")
    return lines


PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "matrix products": (
        ("aten::mm", "aten::addmm", "aten::bmm"),
        "the arithmetic itself, in fp32 whatever the format; prompts are computed once per group",
    ),
    "attention": (
        (
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
            "rin::attend",
        ),
        "torch's kernel where many tokens meet: completions share a row with their prompt, "
        "and the mask hides most of it, which is less work than a row each; a kernel of our own in the rollout",
    ),
    "activation of the MLP, with its quantisation": (
        ("rin::swiglu", "rin::swiglu_backward"),
        "one kernel each way; what is left is the exponential",
    ),
    "optimiser and clipping": (
        ("aten::_fused_adamw_", "aten::linalg_vector_norm", "Optimizer.step#AdamW.step", "aten::mul_"),
        "torch's fused AdamW; clipping takes a norm and a product for each tensor",
    ),
    "fake quantisation": (
        ("rin::fake_quantize",),
        "weights, once an update, and the inputs of o_proj; all else is quantised as it is made",
    ),
    "sums of gradients and residuals": (
        ("aten::add", "aten::add_", "aten::sum"),
        (
            "residuals are summed in the norms; left are q, k, v and gate, up, "
            "whose gradients meet in one input, and biases"
        ),
    ),
    "norms, with the sum before and the quantisation after": (
        ("rin::rms_norm", "rin::rms_norm_backward"),
        "one kernel each way",
    ),
    "rotation": (("rin::rotary", "rin::rotary_backward"), "one kernel each way"),
}
"""Operators of a part, and why it costs what it does."""
BETWEEN = (
    "Python, autograd's nodes, and torch's way to each of some thousand small operations, "
    "which the profiler makes longer; gradients of our kernels do not go through Python"
)


def profiled() -> list[str]:
    """Where a step of the default trial (W4A4, 4 updates) spends its time, two threads, by torch's profiler, which
    itself slows the small operations down; the rest is Python, autograd and what lies between operations."""
    trial = _trial(grpo={"updates_per_step": 4})
    for _ in range(3):
        trial.step()
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(5):
            trial.step()
    whole = (time.perf_counter() - started) / 5
    own = {event.key: event.self_cpu_time_total / 5e6 for event in recorded.key_averages()}
    shares = {name: (sum(own.get(key, 0.0) for key in keys), why) for name, (keys, why) in PARTS.items()}
    shares["everything between"] = (whole - sum(value for value, _ in shares.values()), BETWEEN)
    lines = [
        f"A step under the profiler: {whole * 1e3:.0f} ms.",
        "",
        "| part | ms | share | why |",
        "|---|---|---|---|",
    ]
    ordered = sorted(shares.items(), key=lambda item: -item[1][0])
    return lines + [
        f"| {name} | {value * 1e3:.1f} | {100 * value / whole:.0f} % | {why} |" for name, (value, why) in ordered
    ]


def trial_time() -> list[str]:
    """The default trial (W4A4, 29 steps, all its evaluations) in this process, two threads."""
    times, steps = [], []
    for _ in range(3):
        started = time.perf_counter()
        trial = Trial(read_config(WORKLOADS["embedded"].settings))
        while not trial.done:
            report = trial.step()
            if "eval/accuracy" not in report.signals and report.step:
                steps.append(report.seconds)
        trial.outcome()
        times.append(time.perf_counter() - started)
    listed = ", ".join(f"{value:.1f}" for value in times)
    return [f"- 29 steps: {listed} s; a step without evaluation {spread(steps)} s"]

"""`rin probe`: the floor of a model in every precision, and what it depends on (`trainable/floor.py` says what a floor
is).

A setting is a precision (W16A16 to W4A4), a dtype, a scale rule and a depth (the first blocks, then straight to the
head). Scale rules other than OCP's are tried in W4A4 on the whole model. In each setting the model answers a few of its
workload's questions, at the workload's temperature. That generation is itself one of the forward passes that are
compared; training's forward and eager attention then read the same tokens. The first tokens of the completions give the
floor of shorter ones, without another pass. So a setting costs one generation and two forward passes; the model is
loaded once, and formats are switched on its layers.

Every setting samples tokens of its own, from the same random numbers: the k3 estimate is one of a KL only where the
tokens come from the distribution that it is about. For the same reason the effective sample shares are those of the
pair whose rollout was sampled. The same seed gives the same numbers, bit for bit on a CPU with the same number of
threads.

NaN rule: what is not finite is shown as it is, and is null in JSON.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from dashboards.probe_plan import DTYPES, Plan, parts
from dashboards.tables import fields_of, finite
from spaces.config import MODES, ConfigError, ScaleRule
from trainable.engines.engine import Request
from trainable.engines.gate import FLOOR_FACTOR
from trainable.floor import APART, Floor, eager_logps, first_blocks, floor_of
from trainable.forward.logps import clean_logps, make_batch
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, computing, deployed
from trainable.quantization import Arithmetic
from trainable.rollout import encode_prompts, generate, judge
from trainable.tasks.table import build_task
from trainable.tasks.task import Question, Task

GROUP_SIZE = 2
"""Completions of a prompt; few, because a flip in the prompt is in all of them."""
LEAST_DRAWN = 1e-16
"""A KL of 0 on a logarithmic axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The floor in one setting.

    Example: Row(dtype="float32", mode="W4A4", scale_rule="floor", blocks=30, depth=30, length=32, floor=Floor(...))
    """

    dtype: str
    mode: str
    scale_rule: str
    blocks: int
    """Decoder blocks that compute, of `depth`."""
    depth: int
    length: int
    """Tokens of a completion that are compared, at most."""
    floor: Floor

    @property
    def effective_share(self) -> dict[str, float]:
        """By `rollout.correction`: of a rollout by generation, learned from by training, with no noise between them."""
        return self.floor.pairs["cached"].effective_share


# --- options -> plan -> rows ------------------------------------------------------------------------------------------


def measure(plan: Plan) -> Iterator[tuple[Row, ...]]:
    """Every setting in turn, a row for each completion length.

    Raises ConfigError for a model or a task that cannot be had, and for a model without a layer to quantise.
    """
    task = build_task(plan.config.task)
    questions = task.sample(plan.prompts, seed=plan.seed, step=0, batch=0)
    for dtype, policy in _policies(plan):
        prompts = _prompts(plan, policy, questions)
        for mode, scale_rule, blocks in settings(policy.depth):
            quant = plan.config.quant.model_copy(update={**MODES[mode], "scale_rule": scale_rule})
            with computing(policy, Arithmetic.of(quant)), first_blocks(policy, blocks) as part, deployed(part):
                floors = _floors(plan, part, task, questions, prompts)
            yield tuple(
                Row(
                    dtype=dtype,
                    mode=mode,
                    scale_rule=scale_rule,
                    blocks=blocks,
                    depth=policy.depth,
                    length=length,
                    floor=floor,
                )
                for length, floor in floors.items()
            )


def _policies(plan: Plan) -> Iterator[tuple[str, Policy]]:
    """The policy in each dtype. Reading a model from its file may take longer than measuring it: one without adapters
    is read once."""
    policy = None
    for dtype in plan.dtypes:
        model = plan.config.model.model_copy(update={"dtype": dtype})
        if policy is None or model.adapter == "lora":
            policy = load_policy(model, plan.config.quant, plan.seed)
        else:
            cast(policy, getattr(torch, dtype))
        yield dtype, policy


def cast(policy: Policy, dtype: torch.dtype) -> None:
    """Give the parameters another dtype, for good. As if loaded in it: buffers, which hold the rotary frequencies, keep
    theirs."""
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.to(dtype)


def settings(depth: int) -> list[tuple[str, str, int]]:
    """Mode, scale rule, blocks: every mode at every depth under OCP's rule, then the other rules."""
    others = [("W4A4", rule, depth) for rule in get_args(ScaleRule) if rule != "floor"]
    return [(mode, "floor", blocks) for mode in reversed(MODES) for blocks in parts(depth)] + others


def _prompts(plan: Plan, policy: Policy, questions: Sequence[Question]) -> list[list[int]]:
    tokenizer: Any = policy.tokenizer
    prompts = encode_prompts(policy, questions, plan.config.task, plan.config.rollout.max_prompt_tokens)
    unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    if any(unknown & set(prompt) for prompt in prompts):
        raise ConfigError(
            f"MODEL={plan.model}: its tokenizer cannot spell {questions[0].prompt!r}; "
            "choose a model of text, or a workload"
        )
    network: Any = policy.model
    room = getattr(network.config, "max_position_embeddings", None)
    longest = max(len(prompt) for prompt in prompts)
    if room is not None and longest + plan.lengths[-1] > room:
        raise ConfigError(
            f"--tokens {plan.lengths[-1]}: the model has {room} positions, {longest} of them for the prompt; "
            f"give {room - longest} or fewer"
        )
    return prompts


def _floors(
    plan: Plan, policy: Policy, task: Task, questions: Sequence[Question], prompts: Sequence[Sequence[int]]
) -> dict[int, Floor]:
    """By completion length. Inside `deployed`."""
    config = plan.config
    request = Request(
        prompts=prompts,
        group_size=GROUP_SIZE,
        max_new_tokens=plan.lengths[-1],
        temperature=config.rollout.temperature,
        batch_size=GROUP_SIZE * len(prompts),
        draw=("probe", plan.seed),
    )
    groups = judge(policy, task, questions, prompts, generate(policy, request))
    batch = make_batch(policy, groups, torch.zeros(len(groups), GROUP_SIZE))
    arguments = (policy, batch, config.rollout.temperature, config.grpo.micro_batch)
    training = clean_logps(*arguments)
    cached, eager = batch.rollout_logps, eager_logps(*arguments)
    return {
        n: floor_of({"cached": cached[:, :n], "eager": eager[:, :n]}, training[:, :n], cached[:, :n], batch.mask[:, :n])
        for n in plan.lengths
    }


# --- rows -> text -----------------------------------------------------------------------------------------------------


def header(plan: Plan) -> list[str]:
    floors, shares = ("".join(f"{f'{name}@{length}':>9s}" for length in plan.lengths) for name in ("KL", "seq"))
    return [
        f"{plan.model}: the floor under every comparison of log-probs; {plan.prompts} prompts x {GROUP_SIZE} "
        f"completions, temperature {plan.config.rollout.temperature:g}, seed {plan.seed}",
        f"{'dtype':9s} {'mode':6s} {'rule':5s} {'blocks':>7s} {'tokens':>7s} {floors} "
        f"{'mean':>8s} {'max':>8s} {'apart':>7s} {'none':>7s} {'token':>7s}{shares}",
    ]


def line(rows: Sequence[Row]) -> str:
    """One setting, its completion lengths side by side; what is not of a length is of the longest one."""
    last = rows[-1]
    widest = last.floor.widest
    floors = "".join(f"{row.floor.kl:>9.2g}" for row in rows)
    shares = "".join(f"{_percent(row.effective_share['sequence']):>9s}" for row in rows)
    return (
        f"{last.dtype:9s} {last.mode:6s} {last.scale_rule:5s} {f'{last.blocks}/{last.depth}':>7s} "
        f"{widest.tokens:>7d} {floors} {widest.mean_abs:>8.2g} {widest.max_abs:>8.2g} {_percent(widest.apart, 1):>7s} "
        f"{_percent(last.effective_share['none']):>7s} {_percent(last.effective_share['token']):>7s}{shares}"
    )


LEGEND = f"""\
KL@n: per token in nats (k3), over the first n tokens of a completion; the larger of two gaps between exact forward
passes of the same weights on the same tokens: generation's cache against training, eager attention against training's.
mean, max: distance of log-probs, apart: by more than {APART:g}. none, token, seq@n: share of the samples that counts
under no importance correction, under one per token, under one per sequence. A few tokens carry the KL: with more of
them (--prompts) it is steadier."""


def conclusion(rows: Sequence[Row]) -> list[str]:
    """What the numbers mean for a comparison; from the whole model in W4A4 at the longest length."""
    whole = {
        (row.dtype, row.mode): row.floor.kl
        for row in rows
        if row.blocks == row.depth and row.length == rows[-1].length and row.scale_rule == "floor"
    }
    return [
        *LEGEND.splitlines(),
        *(_verdict(dtype, kl, whole[dtype, "W16A16"]) for (dtype, mode), kl in whole.items() if mode == "W4A4"),
    ]


def _verdict(dtype: str, found: float, plain: float) -> str:
    if found <= plain:
        return (
            f"W4A4 in {dtype}: no rounding flipped on these tokens, and without a flip it differs no more than W16A16 "
            f"(KL {found:.2g} and {plain:.2g}). Among more tokens (--prompts, --seed) some flip."
        )
    return (
        f"W4A4 in {dtype}: a rollout that differs from training by a KL of {found:.2g} or less is "
        f"as equal as arithmetic allows (W16A16: {plain:.2g}); above {FLOOR_FACTOR * found:.2g}, "
        f"{FLOOR_FACTOR:g} times that, look for an error."
    )


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else "nan"


# --- rows -> JSON -----------------------------------------------------------------------------------------------------


def as_tree(plan: Plan, rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    """Of `rin probe --json`. The same seed gives the same `rows`."""
    return {
        "model": plan.model,
        "seed": plan.seed,
        "temperature": plan.config.rollout.temperature,
        "prompts": plan.prompts,
        "group_size": GROUP_SIZE,
        "lengths": list(plan.lengths),
        "gate": FLOOR_FACTOR,
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "seconds": seconds,
        "rows": [_row(row) for row in rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        **fields_of(row, "dtype", "mode"),
        **MODES[row.mode],
        **fields_of(row, "scale_rule", "blocks", "depth", "length"),
        "kl": finite(row.floor.kl),
        "effective_share": {correction: finite(share) for correction, share in row.effective_share.items()},
        "pairs": {
            name: {key: finite(value) for key, value in asdict(gap).items() if not key.endswith("_share")}
            for name, gap in row.floor.pairs.items()
        },
    }


# --- rows -> figure ---------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path) -> None:
    """The floor over depth, and what a correction per sequence leaves over completion length; OCP's scale rule. Raises
    ConfigError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    plain = [row for row in rows if row.scale_rule == "floor"]
    deepest, longest = max(row.blocks for row in plain), max(row.length for row in plain)
    for dtype, style in zip(DTYPES, ("-", "--"), strict=True):
        for number, mode in enumerate(reversed(MODES)):
            mine = [row for row in plain if (row.dtype, row.mode) == (dtype, mode)]
            look = {"color": f"C{number}", "linestyle": style, "marker": "o", "label": f"{mode} {dtype}"}
            _curve(left, [(row.blocks, max(row.floor.kl, LEAST_DRAWN)) for row in mine if row.length == longest], look)
            _curve(
                right, [(row.length, row.effective_share["sequence"]) for row in mine if row.blocks == deepest], look
            )
    left.set(
        xlabel="decoder blocks",
        ylabel=f"floor: KL in nats per token (0 as {LEAST_DRAWN:g})",
        yscale="log",
        title="training against itself",
    )
    right.set(
        xlabel="tokens of a completion",
        ylabel="effective share of samples",
        ylim=(0, 1.05),
        title="correction per sequence",
    )
    left.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}; give a file that can be written") from None


def _curve(axes: Any, points: Sequence[tuple[int, float]], look: dict[str, Any]) -> None:
    if points:
        axes.plot([x for x, _ in points], [y for _, y in points], **look)

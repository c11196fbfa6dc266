"""What rounding does to learning: to the direction of each layer's gradient, and to what an update leaves behind.

Both are asked of a batch as a trial makes it (`grpo_batch`): the deployed policy, without noise, answers questions of
the task, is rewarded, and learns from the advantages within each group.

**Gradients.** Those of the loss at the first update (its ratio is 1), by the same completions and advantages, once in
the trial's arithmetic and once unquantised, in the model's dtype. Of a layer all parameters that learn are one vector:
the cosine between the two, and the norm of the first over that of the second. A prompt is a term of the sum that a
gradient is; so the interval is a bootstrap over prompts of the whole statistic. It is computed from each prompt's own
gradient at up to 8,192 weights of a tensor, evenly spaced, and put around the statistic of all weights.

**Survival.** One whole step, with the trial's optimizer, learning rate, clipping and number of updates, from moments of
zero and with warm-up over; then the share of a layer's weights whose code differs from before. A code is a weight's
place on the grid of its block: what 4-bit storage holds of it, beside the block's scale (so a scale that doubles
changes nearly all codes of its block; the sign of a zero is no change). An update that changes no code has not happened
as far as the deployed policy is concerned. Of a layer at 16 bits the code is the weight itself, in the model's dtype.
AdamW's first steps have the size of the learning rate whatever the gradient's, so this is more than later steps leave.
One step is one number for all prompts: no interval. With adapters the quantised weights do not learn, and it is NaN.

Afterwards the model is as it was, bit for bit, also after an error. What the step overwrites lies in a temporary file
meanwhile, which has no name, and so do the optimizer's moments but for those of the one parameter that moves:
otherwise a step took five times the model's memory.

NaN rule: a cosine and a ratio are NaN where no group of the batch has different rewards, because nothing is learned.

Shapes: N = prompts, n = weights that are looked at.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.config import TrialConfig
from spaces.formats import FORMATS
from trainable.engines.engine import Request
from trainable.episode import Group
from trainable.forward.logps import Batch, clean_logps, completion_logps, make_batch, micro_batches
from trainable.grpo import group_advantages, grpo_loss, loss_normalizer, shaped_rewards, update
from trainable.hashing import stable_hash
from trainable.masters import MasterAdamW
from trainable.policy.embedded import Progress
from trainable.policy.policy import Policy, block_of, deployed, unquantized
from trainable.quantization import QuantLinear
from trainable.rollout import encode_prompts, generate, judge
from trainable.scan import Estimate
from trainable.seeds import generator
from trainable.tasks.task import Task

_LOOKED_AT = 1 << 13
"""Weights of a tensor of which every prompt's gradient is kept."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_RESAMPLES = 1000
_BATCHES = 4
"""Times that questions are drawn anew where too few groups have different rewards."""

Array = NDArray[np.float64]


# --- a batch ----------------------------------------------------------------------------------------------------------


def grpo_batch(policy: Policy, task: Task, config: TrialConfig, prompts: int, seed: int) -> Batch:
    """Of `prompts` groups that the deployed policy answers now, those with something to learn first. Where too few
    have it, others take their place after a few draws."""
    learned: list[Group] = []
    others: list[Group] = []
    for number in range(_BATCHES):
        for group in _answered(policy, task, config, prompts, seed, number):
            (learned if len({episode.score.reward for episode in group}) > 1 else others).append(group)
        if len(learned) >= prompts:
            break
    groups = [*learned, *others][:prompts]
    rewards = shaped_rewards(groups, config.grpo, config.rollout.max_new_tokens)
    batch = make_batch(policy, groups, group_advantages(rewards, config.grpo.advantage_scale))
    with deployed(policy):
        old = clean_logps(policy, batch, config.rollout.temperature, config.grpo.micro_batch)
    return replace(batch, old_logps=old, reference_logps=old if config.grpo.kl_beta > 0 else None)


def _answered(policy: Policy, task: Task, config: TrialConfig, prompts: int, seed: int, number: int) -> list[Group]:
    questions = task.sample(prompts, seed=seed, step=-1, batch=number)
    encoded = encode_prompts(policy, questions, config.task, config.rollout.max_prompt_tokens)
    request = Request(
        prompts=encoded,
        group_size=config.grpo.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        batch_size=config.rollout.batch_size,
        draw=("srdd", seed, number),
    )
    with deployed(policy):
        completions = generate(policy, request)
    return judge(policy, task, questions, encoded, completions)


# --- the direction ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Between a layer's gradient in the trial's arithmetic and the unquantised one."""

    cosine: Estimate
    norm_ratio: Estimate
    """Norm of the former over that of the latter."""


def gradient_agreement(
    policy: Policy,
    batch: Batch,
    config: TrialConfig,
    seed: int,
    progress: Progress = lambda done, total, what: None,
) -> tuple[Agreement, ...]:
    """One per layer. Costs a forward and a backward pass over the batch in each of the two arithmetics, and the memory
    of two gradients."""
    quantized, ours = _gradients(policy, batch, config, progress, "gradients, quantised")
    with unquantized(policy):
        plain, theirs = _gradients(policy, batch, config, progress, "gradients, unquantised")
    found = []
    for layer in range(policy.depth):
        names = [name for name in quantized if block_of(name) == layer]
        products = [sum(_dot(a[name], b[name]) for name in names) for a, b in _pairs(quantized, plain)]
        a, b = (torch.cat([some[name] for name in names], 1).double().numpy() for some in (ours, theirs))
        found.append(_agreement(_statistics(*np.array(products)), a, b, seed))
    return tuple(found)


def _pairs(quantized: Any, plain: Any) -> tuple[tuple[Any, Any], ...]:
    """Whose scalar products the two statistics are made of."""
    return (quantized, plain), (quantized, quantized), (plain, plain)


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.flatten().double(), b.flatten().double()).item()


def _gradients(
    policy: Policy, batch: Batch, config: TrialConfig, progress: Progress, what: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of all that learns in the blocks, by name, in fp32 on the CPU: of the batch, and of each prompt [N, n] at some
    weights."""
    parameters = {name: p for name, p in policy.trainable().items() if block_of(name) is not None}
    whole = {name: torch.zeros(p.shape) for name, p in parameters.items()}
    groups = len(batch) // batch.group_size
    some = {name: torch.zeros(groups, len(_some_of(p))) for name, p in parameters.items()}
    normalizer = loss_normalizer(config.grpo.loss, batch, batch, 1, config.rollout.max_new_tokens)

    def take(group: int, name: str, gradient: Tensor) -> None:
        if name in whole:
            whole[name] += gradient.float().cpu()
            some[name][group] += _some_of(gradient).float().cpu()

    for group in range(groups):
        progress(group, groups, what)
        rows = batch.rows_of(np.array([group]))
        alone = batch.rows(rows, batch.group_size)
        with _given_away(policy, partial(take, group)):
            for _, part in micro_batches(policy, alone, config.grpo.micro_batch):
                _loss(policy, part, config, normalizer).backward()  # type: ignore[no-untyped-call]
    return whole, some


@contextmanager
def _given_away(policy: Policy, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Each gradient is handed over as it comes and kept nowhere else: all of them at once would be another model."""
    parameters = policy.trainable()
    before = {name: parameter.grad for name, parameter in parameters.items()}

    def hand_over(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            take(name, parameter.grad)
            parameter.grad = None

        return hook

    with ExitStack() as stack:
        for name, parameter in parameters.items():
            parameter.grad = None
            hook = parameter.register_post_accumulate_grad_hook(hand_over(name))  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.grad = before[name]


def _loss(policy: Policy, part: Batch, config: TrialConfig, normalizer: float) -> Tensor:
    """At the first update, where the policy is the one that the step began with."""
    logps = completion_logps(policy, part, config.rollout.temperature)
    loss, _ = grpo_loss(
        logps,
        logps.detach(),
        part.advantages,
        part.mask,
        loss=config.grpo.loss,
        clip_low=config.grpo.clip_low,
        clip_high=config.grpo.clip_high,
        normalizer=normalizer,
    )
    return loss


def _some_of(parameter: Tensor) -> Tensor:
    flat = parameter.detach().flatten()
    return flat[:: -(-len(flat) // _LOOKED_AT)]


def _statistics(ab: Array, aa: Array, bb: Array) -> tuple[Array, Array]:
    """Cosine, and logarithm of the ratio of norms, from scalar products."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return ab / np.sqrt(aa * bb), np.log(np.sqrt(aa / bb))


def _agreement(whole: tuple[Array, Array], a: Array, b: Array, seed: int) -> Agreement:
    """`whole`: the statistics of all weights; a and b: each prompt's gradients at some of them [N, n]."""
    prompts = len(a)
    drawn = np.random.default_rng(stable_hash("gradients", seed, prompts)).integers(0, prompts, (_RESAMPLES, prompts))
    counts = (drawn[:, :, None] == np.arange(prompts)).sum(1).astype(np.float64)  # [resamples, N]
    weights = np.concatenate([np.ones((1, prompts)), counts])  # the batch itself first
    products = [np.einsum("rn,nm,rm->r", weights, x @ y.T, weights) for x, y in _pairs(a, b)]
    with np.errstate(invalid="ignore"):
        cosine, log_ratio = (
            _around(float(value), resampled[1:] - resampled[0])
            for value, resampled in zip(whole, _statistics(*products), strict=True)
        )
    return Agreement(
        cosine=replace(cosine, low=max(cosine.low, -1.0), high=min(cosine.high, 1.0)),
        norm_ratio=Estimate(
            value=math.exp(log_ratio.value), low=math.exp(log_ratio.low), high=math.exp(log_ratio.high)
        ),
    )


def _around(value: float, deviations: Array) -> Estimate:
    """The value with the spread of its resamples; those without any gradient have no statistic."""
    known = deviations[np.isfinite(deviations)]
    if len(known) < 2:
        return Estimate(value=value, low=float("nan"), high=float("nan"))
    low, high = np.quantile(known, (0.025, 0.975))
    return Estimate(value=value, low=value + float(low), high=value + float(high))


# --- what is left of an update ----------------------------------------------------------------------------------------


def survival(policy: Policy, batch: Batch, config: TrialConfig, seed: int) -> tuple[float, ...]:
    """Share of each layer's weights whose code one GRPO step on this batch changes; NaN where none of them learns."""
    learning = {id(parameter) for parameter in policy.trainable().values()}
    linears = {n: m for n, m in policy.linears.items() if block_of(n) is not None and id(m.weight) in learning}
    if not linears:
        return (float("nan"),) * policy.depth
    changed, weights = [0.0] * policy.depth, [0] * policy.depth
    with restored(policy) as before:
        _step(policy, batch, config, seed)
        for name, linear in linears.items():
            layer = block_of(name)
            assert layer is not None
            old = codes(linear, before(linear.weight))
            changed[layer] += (codes(linear, linear.weight.detach()) != old).sum().item()
            weights[layer] += old.numel()
    return tuple(share / max(count, 1) for share, count in zip(changed, weights, strict=True))


def _step(policy: Policy, batch: Batch, config: TrialConfig, seed: int) -> None:
    grpo = config.grpo
    with tempfile.TemporaryFile() as file:
        optimizer = _Parked(
            list(policy.trainable().values()),
            lr=grpo.learning_rate,
            betas=(0.9, grpo.adam_beta2),
            weight_decay=grpo.weight_decay,
            fused=True,
        )
        optimizer.file, optimizer.places, optimizer.end = file, {}, 0
        try:
            update(
                policy,
                optimizer,
                batch,
                grpo,
                config.rollout,
                first_update=grpo.warmup_updates,
                shuffle=generator("shuffle", seed, 0),
            )
        finally:
            optimizer.release()
            optimizer.zero_grad(set_to_none=True)


class _Parked(MasterAdamW):
    """The trial's optimizer, whose moments lie in a file but for those of the parameter that moves."""

    file: IO[bytes]
    places: dict[int, int]
    end: int

    def step(self, closure: Any = None) -> Any:
        assert closure is None
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    self.param_groups = [{**group, "params": [parameter]}]
                    self._move(parameter)
        finally:
            self.param_groups = groups
        self.write_back()
        return None

    def _move(self, parameter: Tensor) -> None:
        if moments := self.state.get(parameter):
            self.file.seek(self.places[id(parameter)])
            moments.update({name: _read(self.file, parameter) for name in _MOMENTS})
        torch.optim.AdamW.step(self)
        if moments := self.state.get(parameter):
            self.file.seek(self.places.setdefault(id(parameter), self.end))
            for name in _MOMENTS:
                _write(self.file, moments.pop(name))
            self.end = max(self.end, self.file.tell())


def codes(linear: QuantLinear, weight: Tensor) -> Tensor:
    """What storage holds of a weight of this layer: its value in steps of its block; itself where it has no grid."""
    operand = linear.arithmetic.weight
    if FORMATS[operand.format].element is None:
        return operand.of(weight)
    return (operand.of(weight).float() / operand.step(weight)).nan_to_num(nan=0.0).round()  # a flushed block has step 0


@contextmanager
def restored(policy: Policy) -> Iterator["Before"]:
    """All that learns, and its gradients, as before, bit for bit; meanwhile what it was before."""
    parameters = list(policy.trainable().values())
    gradients = [parameter.grad for parameter in parameters]
    with tempfile.TemporaryFile() as file:
        before = Before(file, parameters)
        try:
            for parameter in parameters:
                parameter.grad = None
            yield before
        finally:
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.copy_(before(parameter))
                    parameter.grad = gradient


class Before:
    """Parameters as they were, in a file."""

    def __init__(self, file: IO[bytes], parameters: list[nn.Parameter]) -> None:
        self.file = file
        self.places: dict[int, int] = {}
        for parameter in parameters:
            self.places[id(parameter)] = file.tell()
            _write(file, parameter)

    def __call__(self, parameter: Tensor) -> Tensor:
        self.file.seek(self.places[id(parameter)])
        return _read(self.file, parameter)


def _write(file: IO[bytes], tensor: Tensor) -> None:
    file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _read(file: IO[bytes], like: Tensor) -> Tensor:
    """The next tensor of the file, which was like this one."""
    data = file.read(like.numel() * like.element_size())
    return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape).to(like.device)

"""What the callback takes from inside TRL's GRPOTrainer: the one room that knows the names TRL keeps to itself.

A TrainerCallback hears when steps begin and end, and nothing of generation. So these methods of one trainer are wrapped
(`attach` of `library.RinCallback`), and nothing of TRL is replaced:

    _generate                        every rollout and every evaluation passes it, whoever generates: model.generate, a
                                     colocated vLLM, the turns of tools, a rollout_func
    _generate_and_score_completions  rewards of a rollout; log-probs of the clean policy, where TRL computes them
    _get_grad_norm                   a gradient's norm before it was clipped
    vllm_generation.sync_weights     what an engine is given

and these are used: `_step` (forward and backward passes so far), `_metrics` (averaged and sent to `report_to` with
TRL's own), `_last_loaded_step` (set back, or an evaluation behind a rollout would generate with the weights of that,
noise included: TRL sends weights once per optimizer step) and `_get_per_token_logps_and_entropies`.

Read on TRL 1.16 with transformers 5.19; where one of them is missing the trainer is refused.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spaces.config import ConfigError
from trainable.floor import cached_logps
from trainable.forward.logps import Batch
from trainable.forward.transformer import left_padded
from trainable.policy.policy import Policy, bare_name
from trainable.quantization import AS_IT_IS, Arithmetic

_TRAINER = "GRPOTrainer"
_SEAMS = (
    "_generate",
    "_generate_and_score_completions",
    "_get_grad_norm",
    "_get_per_token_logps_and_entropies",
    "_metrics",
    "_step",
    "eos_token_ids",
    "num_iterations",
    "temperature",
    "use_transformers_continuous_batching",
    "use_vllm",
)
_VLLM_SEAMS = ("_last_loaded_step", "vllm_generation", "vllm_mode")
_ALONE = ("NO", "MULTI_CPU", "MULTI_GPU")
"""accelerate's words for one process, and for several with all weights each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a rollout sampled in this process. N = completions, T = tokens, right-padded."""

    completions: Sequence[Sequence[int]]
    """Token ids, as TRL has them."""
    prompts: Sequence[Sequence[int]]
    mask: Tensor  # [N, T], 1 on tokens that the policy said (and not a tool)
    logps: Tensor | None = None  # [N, T], of the policy that sampled
    entropies: Tensor | None = None  # [N, T], of its distributions


class Trl:
    """One GRPOTrainer."""

    def __init__(self, trainer: Any) -> None:
        """Raises ConfigError for what cannot be reached, or would be reached without effect."""
        if not any(kind.__name__ == _TRAINER for kind in type(trainer).__mro__):
            raise ConfigError(f"RinCallback.attach: {type(trainer).__name__} is no {_TRAINER} of TRL; give it one")
        lacking = [name for name in (*_SEAMS, *(_VLLM_SEAMS if trainer.use_vllm else ())) if not hasattr(trainer, name)]
        if lacking:
            raise ConfigError(
                f"RinCallback.attach: the {_TRAINER} of TRL {version('trl')} has no {lacking[0]}, on which noise in "
                "its rollouts relies; install trl==1.16.*"
            )
        self.trainer = trainer
        for holds, what, remedy in self._unfit():
            if holds:
                raise ConfigError(f"RinCallback.attach: {what}; {remedy}")

    def _unfit(self) -> Iterator[tuple[bool, str, str]]:
        args, kind = self.trainer.args, self.trainer.accelerator.distributed_type.name
        yield (
            kind not in _ALONE,
            f"{kind} keeps weights in pieces or elsewhere, where noise does not reach them",
            "train in one process or with DDP",
        )
        yield (
            bool(self.trainer.use_transformers_continuous_batching),
            "use_transformers_continuous_batching=True casts the model and generates with weights of its own",
            "set it to False",
        )
        yield (
            bool(getattr(args, "use_liger_kernel", False) or getattr(self.trainer.model, "use_kernels", False)),
            "use_liger_kernel or use_kernels replaces the forward of norms and MLPs, and inputs would not be quantised",
            "set it to False",
        )
        yield bool(args.torch_compile), "torch_compile=True was not tried with noise", "set it to False"
        yield (
            bool(getattr(args, "restore_callback_states_from_checkpoint", False)),
            "restore_callback_states_from_checkpoint=True would put another callback, without a trainer, in this place",
            "set it to False: RinCallback restores itself",
        )
        yield (
            not isinstance(self.trainer.processing_class, PreTrainedTokenizerBase),
            "the model reads more than texts",
            "give GRPOTrainer a tokenizer as processing_class, or another model",
        )

    def check_engine(self, policy: Policy) -> None:
        """Raises ConfigError where vLLM would compute something else than training does."""
        if not self.trainer.use_vllm:
            return
        if self.trainer.vllm_mode != "colocate":
            raise ConfigError("RinCallback.attach: vllm_mode=server was not tried with noise; set colocate")
        ours = {bare_name(name): parameter.dtype for name, parameter in policy.network.named_parameters()}
        other = [(name, t.dtype, ours[name]) for name, t in self.held().items() if ours.get(name, t.dtype) != t.dtype]
        name, theirs, wide = other[0] if other else ("", None, None)
        theirs_too = self.engine_layers()
        turned = [
            name
            for name in policy.quantized
            if policy.linears[name].arithmetic.input != AS_IT_IS
            and theirs_too.get(name) != policy.linears[name].arithmetic
        ]
        biased = any(any(getattr(module, "lora_bias", {}).values()) for module in policy.model.modules())
        for holds, what, remedy in (
            (
                bool(other),
                f"vLLM holds {name} in {theirs}, the model in {wide}, and would round noise that was measured before",
                f"load the model in {theirs}, or set use_vllm=False",
            ),
            (
                bool(turned),
                f"vLLM would not do to the inputs of {turned[0] if turned else ''} what training does to them",
                "call for_vllm(model, tokenizer, FOLDER) behind quantize, or set activations=none and hadamard=false "
                "in QuantConfig (W4A16), or use_vllm=False",
            ),
            (
                bool(policy.rearranged),
                f"{policy.rearranged[0] if policy.rearranged else ''} lies otherwise in vLLM than in training",
                "set use_vllm=False",
            ),
            (biased, "adapters with a bias are not merged exactly", "set lora_bias=False, or use_vllm=False"),
        ):
            if holds:
                raise ConfigError(f"RinCallback.attach: {what}; {remedy}")

    # --- asked -------------------------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """A rollout to learn from; else an evaluation."""
        training: bool = self.trainer.model.training
        return training

    @property
    def passes(self) -> int:
        """Forward and backward passes so far in this process."""
        passes: int = self.trainer._step
        return passes

    @property
    def passes_per_rollout(self) -> int:
        slices: int = self.trainer.args.steps_per_generation
        times: int = self.trainer.num_iterations
        return slices * times

    def rollouts(self, steps: int) -> int:
        """How many it takes for so many optimizer steps."""
        passes: int = steps * self.trainer.args.gradient_accumulation_steps
        return max(1, -(-passes // self.passes_per_rollout))

    def finished(self, completion: Sequence[int]) -> bool:
        return bool(completion) and completion[-1] in self.trainer.eos_token_ids

    def clip_fraction(self) -> float | None:
        """Of the latest pass; None where the loss does not clip."""
        clipped = self.trainer._metrics["train"].get("clip_ratio/region_mean")
        return float(clipped[-1]) if clipped else None

    def report(self, name: str, value: float) -> None:
        """To whatever TRL logs to, with its own numbers."""
        self.trainer._metrics["train"][name].append(value)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Over all processes."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return values
        mine = torch.tensor([list(values.values())], dtype=torch.float64, device=accelerator.device)
        return dict(zip(values, accelerator.gather(mine).mean(0).tolist(), strict=True))

    @torch.no_grad()
    def logps(self, sampled: Sampled) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N, T] by the weights that are in the model now, at the sampling temperature."""
        trainer, model = self.trainer, self.trainer.model
        pad, device = trainer.processing_class.pad_token_id, trainer.accelerator.device
        ids, mask = left_padded(sampled.prompts, pad, device)
        tokens, said = right_padded(sampled.completions, pad, device)
        with _without_dropout(model):
            logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
                model,
                torch.cat([ids, tokens], 1),
                torch.cat([mask, said], 1),
                tokens.shape[1],
                batch_size=trainer.args.per_device_train_batch_size,
                compute_entropy=True,
            )
        return logps, entropies

    def sampled(self, output: tuple[Any, ...]) -> Sampled:
        """Of what `_generate` gives."""
        prompts, completions, said = output[:3]
        device = self.trainer.accelerator.device
        rows = said if said is not None else [[1] * len(completion) for completion in completions]
        return Sampled(completions=completions, prompts=prompts, mask=right_padded(rows, 0, device)[0].float())

    @torch.no_grad()
    def cached_logps(self, policy: Policy, sampled: Sampled) -> Tensor:
        """Those of `logps`, a token at a time: how far the policy is from itself. Inside `deployed`."""
        trainer = self.trainer
        pad, device = trainer.processing_class.pad_token_id, trainer.accelerator.device
        prompt_ids, prompt_mask = left_padded(sampled.prompts, pad, device)
        completion_ids, said = right_padded(sampled.completions, pad, device)
        zeros = torch.zeros_like(sampled.mask)
        batch = Batch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=completion_ids,
            mask=said.float(),
            rollout_logps=zeros,
            advantages=zeros[:, 0],
            old_logps=zeros,
        )
        with _without_dropout(trainer.model):
            return cached_logps(policy, batch, trainer.temperature, trainer.args.per_device_train_batch_size)

    def engine_logps(self, output: tuple[Any, ...], sampled: Sampled) -> Tensor | None:
        """Those that an engine sampled with, [N, T], NaN where it had none; None where they are not of the whole
        distribution."""
        args, told = self.trainer.args, output[4]
        whole = args.top_p == 1 and args.top_k in (0, -1, None) and not args.min_p and args.repetition_penalty == 1
        if not (self.trainer.use_vllm and told and whole) or args.generation_kwargs:
            return None
        logps = torch.full_like(sampled.mask, math.nan)
        for row, values in zip(logps, told, strict=True):
            row[: len(values)] = torch.tensor([math.nan if value is None else value for value in values])
        return logps

    def clean_logps(self, scored: dict[str, Any], sampled: Sampled) -> Tensor:
        """Of the clean policy, [N, T]: TRL's where it computed them."""
        old = scored.get("old_per_token_logps")
        return self.logps(sampled)[0] if old is None else old[:, : sampled.mask.shape[1]]

    def reward(self) -> float:
        """Mean over the rollout that was just scored, in all processes."""
        return float(self.trainer._metrics["train"]["reward"][-1])

    # --- wrapped -----------------------------------------------------------------------------------------------------

    def around(self, name: str, wrapper: Callable[..., Any]) -> None:
        """`wrapper(original, *arguments)` in the place of a method of the trainer."""
        _around(self.trainer, name, wrapper)

    def around_sync(self, wrapper: Callable[..., Any]) -> None:
        if self.trainer.use_vllm:
            _around(self.trainer.vllm_generation, "sync_weights", wrapper)

    def forget_sync(self) -> None:
        """The next generation sends its weights."""
        if self.trainer.use_vllm:
            self.trainer._last_loaded_step = -1

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is generated here leaves neither numbers behind nor another state of torch's random numbers."""
        trainer, metrics = self.trainer, self.trainer._metrics["train"]
        before, seen = {name: list(values) for name, values in metrics.items()}, trainer.state.num_input_tokens_seen
        with torch.random.fork_rng():
            try:
                yield
            finally:
                metrics.clear()
                metrics.update(before)
                trainer.state.num_input_tokens_seen = seen

    def held(self) -> dict[str, Tensor]:
        """What a colocated engine computes with, under its own names: many of a model's, but not those it has fused."""
        return dict(self._engine().named_parameters()) if self.trainer.use_vllm else {}

    def engine_layers(self) -> dict[str, Arithmetic]:
        """How it computes its linear layers, where they are ours (`engines/vllm.py`)."""
        parts = [part for module in self._engine().modules() for part in getattr(module, "rin_parts", ())]
        return {part.name: part.arithmetic for part in parts}

    def _engine(self) -> Any:
        return self.trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model


def right_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [N, T]."""
    ids, mask = left_padded([row[::-1] for row in rows], pad, device)
    return ids.flip(1), mask.flip(1)


def _around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        return wrapper(lambda: original(*arguments, **named))

    setattr(owner, name, wrapped)


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Measuring draws no random number that training would draw."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

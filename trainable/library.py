"""4-bit layers, noise and collapse rules in a TRL script of your own.

    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    from trainable.library import CollapseConfig, NoiseConfig, QuantConfig, RinCallback, quantize

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-1.5B-Instruct", dtype="bfloat16")
    print(quantize(model, QuantConfig()).coverage)             # in place, before GRPOTrainer and before LoRA
    trainer = GRPOTrainer(model, reward_funcs=my_reward, args=GRPOConfig("out"), train_dataset=my_rows)
    rin = RinCallback(NoiseConfig(sigma_start=0.01), CollapseConfig()).attach(trainer)
    trainer.train()
    print(rin.verdict, rin.receipt().effects)                  # also in out/rin_receipt.json

What it does is what a trial does (`trial.py`), by the same functions. Every rollout of TRL, whoever generates, computes
with quantised weights and this rollout's noise; losses, log-probs and evaluations compute with the clean ones, because
nothing was ever written to those. Noise is drawn by (seed of TRL's arguments, rollout, parameter name): the same as in
a trial of that seed. Stages of the schedule are counted in rollouts, and not in optimizer steps: with `num_iterations`,
`steps_per_generation` or accumulated gradients there are fewer, or more, of the one than of the other.

Other than in a trial: TRL's forward is transformers' own; the baseline of the collapse rules is the quiet first stage
(where there is none, a rollout without noise that is not learned from); TRL filters no groups, so there is no
`filter_rejection`; an update whose gradient is not finite is made (by TRL), and the run stopped behind it. A rollout
costs up to two more forward passes, which tell how far the noise takes it from the clean policy; with collapse mode
`off` it does not.

A colocated vLLM computes with our layers when it begins from a folder that `for_vllm` wrote; without one it is fit for
weights in few bits alone. Left out, and refused in words: weights in pieces (FSDP, DeepSpeed), vLLM as a server, a
quantised head (TRL multiplies with its weight itself), continuous batching, Liger kernels.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from spaces.config import CollapseConfig as CollapseConfig
from spaces.config import ConfigError, TrialConfig
from spaces.config import NoiseConfig as NoiseConfig
from spaces.config import QuantConfig as QuantConfig
from spaces.reading import as_tree, load_yaml, read_config
from trainable.collapse import CollapseDetector, not_finite
from trainable.disk.folder import Folder
from trainable.engines.engine import NAME, quantization_tree
from trainable.engines.gate import FLOOR_FACTOR
from trainable.forward.logps import importance_weights
from trainable.inside_trl import Sampled, Trl
from trainable.layers.experts import Experts
from trainable.masters import followed, moved_shares
from trainable.metrics import COLLAPSED, DOSE, EVIDENCE, ROLLOUT, RULE
from trainable.noise import effects_of, injected, noise_targets, sigma_at, stage_at, stage_begins, target_sigma
from trainable.outcome import HEALTHY, Alarm, CollapseVerdict, Effect, EffectReceipt
from trainable.parity import LIMIT, NARROW_LIMIT
from trainable.philox import GENERATOR
from trainable.policy.anatomy import text_model
from trainable.policy.loading import in_place, see_as_their_layers
from trainable.policy.policy import Policy, bare_name, deployed, unquantized
from trainable.quantization import AS_IT_IS, QuantLinear
from trainable.receipt import receipt_of
from trainable.seeds import generator
from trainable.signals import NAMES, distinct_share, mean

RECEIPT_FILE = "rin_receipt.json"
_HOLDS = "rin_quantized"
"""Attribute of a quantised model that holds its `Quantized`."""
_USUAL_RULES = CollapseConfig()
_PROBE = (2, 16)
_PAST = (
    "RinCallback: TRL learns from a rollout that did not pass this callback and had no noise; does the trainer "
    "override how it generates? Attach to one that does not"
)
_CORRECTION_CAP = 2.0  # of the importance weights that are only reported
_SAID = logging.getLogger(__name__)


def settings(path: str | Path) -> TrialConfig:
    """A trial's YAML file, such as best.yaml of a sweep: its `quant`, `noise` and `collapse` are what `quantize` and
    `RinCallback` take. Raises ConfigError."""
    return read_config(load_yaml(Path(path)), origin=str(path))


# --- quantise ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What `quantize` made of a model."""

    policy: Policy
    quant: QuantConfig
    forward: Mapping[str, Any]
    """How far the wrapped model is from the one that came, with nothing quantised."""

    def receipt(self) -> EffectReceipt:
        return receipt_of(self.policy, (), (), moved={}, warnings=(), forward=self.forward, generation={})


def quantize(model: Any, quant: QuantConfig) -> EffectReceipt:
    """Every projection of a transformers causal LM as a `QuantLinear`, in place and on its very parameters, with norms,
    gated MLPs and experts as in a trial; the receipt says what was quantised and what was left out.

    Before adapters: peft wraps the layers that it finds, and they shall be these. Raises ConfigError for a model of
    which much would be left out unnamed, a block that does not fit, a pattern that matches nothing, and a model that
    would not compute what it did.
    """
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    if hasattr(model, "peft_config"):
        raise ConfigError(
            f"quantize: {name} has adapters already, which would stay beside layers of 16 bits; quantize the bare "
            "model first, then get_peft_model, or peft_config of GRPOTrainer"
        )
    if hasattr(model, _HOLDS):
        raise ConfigError(f"quantize: {name} is quantised already; load it again for other settings")
    if getattr(model.config, "quantization_config", None):
        raise ConfigError(
            f"quantize: the weights of {name} are quantised already; give the model that they were made from"
        )
    ids = torch.randint(model.config.get_text_config().vocab_size, _PROBE, generator=generator("probe"))
    before = _logps(model, ids)
    tokenizer: Any = None  # TRL's own, known when a callback is attached
    policy = in_place(model, tokenizer, quant, ())
    with unquantized(policy):
        apart = (_logps(model, ids) - before).abs()
    wide = next(model.parameters()).dtype == torch.float32
    limit, distance = (LIMIT, apart.max().item()) if wide else (NARROW_LIMIT, apart.mean().item())
    if not distance <= limit:
        raise ConfigError(
            f"quantize: {name} with our layers is {distance:.2g} nats per token from what it was (allowed {limit:g}), "
            "with nothing quantised; take another model"
        )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    held = Quantized(policy=policy, quant=quant, forward={"wrapped": distance, "limit": limit, "dtype": dtype})
    setattr(model, _HOLDS, held)
    return held.receipt()


def for_vllm(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Writes a quantised model where TRL's colocated vLLM then starts from, with our layers in it: it quantises inputs
    as training does (`engines/vllm.py`), and takes weights on a CPU too, where its own layers take none.

    Behind `quantize`, before GRPOTrainer. Raises ConfigError for a model that was not quantised.
    """
    held: Quantized | None = getattr(model, _HOLDS, None)
    if held is None:
        raise ConfigError("for_vllm: the model was not quantised; call quantize(model, QuantConfig(...)) first")
    place = Path(folder)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    told = json.loads((place / "config.json").read_text(encoding="utf-8"))
    layers = quantization_tree(held.policy.linears, synced=True)
    told["quantization_config"] = {"quant_method": NAME, **layers}
    (place / "config.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    model.name_or_path = str(place)  # where TRL lets vLLM begin


@torch.no_grad()
def _logps(model: Any, ids: Tensor) -> Tensor:
    """Of every next token, [rows, tokens, vocabulary], without dropout."""
    training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    finally:
        model.train(training)
    return torch.log_softmax(logits.float(), -1)


# --- the callback -----------------------------------------------------------------------------------------------------


class RinCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Noise in the rollouts of a GRPOTrainer, its receipt, and a stop when generation has collapsed.

    `attach` it to the trainer, before `train`; a checkpoint of the trainer holds its state.
    """

    def __init__(self, noise: NoiseConfig, collapse: CollapseConfig = _USUAL_RULES) -> None:
        self.noise, self.collapse = noise, collapse
        self.detector = CollapseDetector(config=collapse)
        self.rollouts = 0
        """Made so far, without those of evaluations."""
        self.clean = 0
        """Generations without noise, for evaluations."""
        self.verdict: CollapseVerdict = HEALTHY
        """Of the collapse that stopped the run."""
        self.alarms: list[Alarm] = []
        self.effects: list[Effect] = []
        self.trl: Trl | None = None
        self._warnings: list[str] = []
        self._total: int | None = None
        self._values: dict[str, float] | None = None
        """Signals of a rollout that is being learned from."""
        self._norms: list[float] = []
        self._clipped: list[float] = []
        self._begun = (0, 0)
        self._reached = self._aside = False
        self._sampled: Sampled | None = None
        self._limit: float | None = None
        """How far an engine's log-probs may be from ours, on average."""

    def attach(self, trainer: Any) -> "RinCallback":
        """Wrap the trainer's generation (`inside_trl.py` says what) and join its callbacks.

        Raises ConfigError for a trainer in which noise would have no effect, or another one than it should.
        """
        if self.trl is not None:
            raise ConfigError("RinCallback.attach: it is attached already; make one for each trainer")
        others = [one for one in trainer.callback_handler.callbacks if isinstance(one, RinCallback)]
        if any(other is not self for other in others):
            raise ConfigError("RinCallback.attach: the trainer has another RinCallback; noise would be added twice")
        trl = Trl(trainer)
        model = trainer.model
        network = model.get_base_model() if hasattr(model, "peft_config") else model
        held = getattr(network, _HOLDS, None)
        if held is None:
            raise ConfigError(
                "RinCallback.attach: the trainer's model was not quantised; call quantize(model, QuantConfig(...)) on "
                "what you give GRPOTrainer (weights=none and activations=none leave it at 16 bits)"
            )
        _check_adapters(model)
        see_as_their_layers(model)
        self.quantized: Quantized = held
        self.policy = replace(
            held.policy, model=model, tokenizer=trainer.processing_class, ends=tuple(trainer.eos_token_ids)
        )
        _check_in_place(self.policy)
        self._check_head()
        trl.check_engine(self.policy)
        if trainer.ref_model is not None and not hasattr(trainer.ref_model, _HOLDS):
            quantize(trainer.ref_model, held.quant)  # as in a trial, it computes as the policy does
        self.targets = noise_targets(self.policy, self.noise)
        if trainer.args.load_best_model_at_end:
            self._check_loads_back("load_best_model_at_end=True")
        self._warn_of_autocast(trainer)
        self.seed: int = trainer.args.seed
        self.start_weights = followed(self.policy.trainable())
        self.folder = Folder(str(Path(trainer.args.output_dir).absolute()))
        trl.around("_generate", self._generate)
        trl.around("_generate_and_score_completions", self._score)
        trl.around("_get_grad_norm", self._grad_norm)
        trl.around_sync(self._sync)
        self.trl = trl
        if not others:
            trainer.add_callback(self)
        return self

    def receipt(self) -> EffectReceipt:
        """What was quantised and noised so far, with the sigma really applied."""
        return receipt_of(
            self.policy,
            self.targets,
            self.effects,
            moved=moved_shares(self.start_weights, self.policy.trainable()),
            warnings=self._warnings,
            forward=self.quantized.forward,
            generation={},
        )

    def _check_head(self) -> None:
        head = self.policy.network.get_output_embeddings()
        named = [name for name, linear in self.policy.linears.items() if linear is head and linear.arithmetic.quantizes]
        if named:
            raise ConfigError(
                f"quant.exclude: {named[0]} is quantised, and TRL multiplies with its weight itself, unquantised; "
                "leave lm_head in quant.exclude"
            )

    def _check_loads_back(self, setting: str) -> None:
        """Raises ConfigError for weights that transformers saves under other names and does not find again: it would
        say so in a warning, and go on with those that are there."""
        inside = [name for name, module in self.policy.network.named_modules() if isinstance(module, Experts)]
        if inside and not self.policy.adapted:
            raise ConfigError(
                f"{setting}: a checkpoint has the experts of {inside[0]} in one tensor, which transformers does not "
                "load into layers of their own; begin from a saved model, or train adapters"
            )

    def _warn_of_autocast(self, trainer: Any) -> None:
        """What is measured is the weight; autocast rounds it once more, but for MX numbers, which bf16 holds."""
        after, narrow = self.noise.placement == "after", trainer.args.fp16
        rounded = [
            target.name
            for target in self.targets
            if isinstance(target.module, QuantLinear) and target.module.weight.dtype == torch.float32
            if narrow or after or target.module.arithmetic.weights in ("none", "nvfp4")
        ]
        if rounded and (trainer.args.bf16 or narrow):
            self._warnings.append(
                f"{rounded[0]} and {len(rounded) - 1} others are rounded to 16 bits where they are multiplied (bf16 or "
                "fp16 of the trainer's arguments), which is not in `applied`; load the model in that dtype to have it "
                "counted"
            )

    # --- rollouts ----------------------------------------------------------------------------------------------------

    def _generate(self, generate: Callable[[], Any]) -> Any:
        """A generation of TRL's: with noise to learn from, clean in evaluation."""
        trl = self._attached()
        trl.forget_sync()
        if not trl.training:
            with deployed(self.policy):
                output = generate()
            self.clean += 1
            return output
        if self._total is None:
            raise ConfigError("RinCallback: TRL generates before its training has begun; call trainer.train()")
        step, total = self.rollouts, self._total
        targets = () if self._aside else self.targets
        first = not self._aside and stage_begins(self.noise, step, total)
        noisy = any(target_sigma(self.noise, target, step, total) > 0 for target in targets)
        with injected(
            self.policy, self.noise, targets, step=step, total_steps=total, seed=self.seed, measured=first
        ) as changes:
            if first:
                self.effects += effects_of(self.noise, changes, step=step, total_steps=total)
            with self._watched():
                output = generate()
            if noisy and not self._reached:
                raise ConfigError(
                    f"RinCallback: rollout {step} has noise of sigma {sigma_at(self.noise, step, total):g}, and was "
                    "generated without the model and without a weight sync; let rollout_func generate with the "
                    "trainer's model or its vLLM, or take noise away"
                )
            sampled = trl.sampled(output)
            if self.collapse.mode != "off":
                logps, entropies = trl.logps(sampled)
                engine = trl.engine_logps(output, sampled)
                sampled = replace(sampled, logps=logps, entropies=entropies)
                if engine is not None:
                    sampled = replace(sampled, logps=self._agreed(trl, engine, logps, sampled))
        if first:
            self._write("running")
        self.rollouts += not self._aside
        self._sampled = sampled
        return output

    def _score(self, score: Callable[[], Any]) -> Any:
        """Measure a rollout when its rewards are known; the verdict follows its updates."""
        trl = self._attached()
        if not trl.training:
            return score()
        if self.noise.num_stages == 1 and self.collapse.mode != "off" and not self.detector.baseline:
            self._take_baseline(trl, score)
        scored, self._values = self._heard(trl, score)
        self._norms, self._clipped = [], []
        return scored

    def _take_baseline(self, trl: Trl, score: Callable[[], Any]) -> None:
        """Where no stage is quiet: a noise-free rollout that is not learned from, and leaves nothing else behind."""
        self._aside = True
        try:
            with trl.aside():
                _, values = self._heard(trl, score)
        finally:
            self._aside = False
        self.detector.judge(values, quiet=True)

    def _heard(self, trl: Trl, score: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """A rollout with its rewards, and its signals."""
        self._sampled = None
        scored = score()
        if self._sampled is None:
            raise ConfigError(_PAST)
        return scored, trl.mean(self._measured(trl, scored, self._sampled)) | {"reward": trl.reward()}

    def _grad_norm(self, measure: Callable[[], Any]) -> Any:
        norm = measure()
        if norm is not None:
            self._norms.append(float(norm))
        return norm

    def _sync(self, sync: Callable[[], Any]) -> None:
        """Weights for an engine: those that the layers compute with, noise included, in the place of the masters."""
        apart = any(linear.deployed_weight is None for linear in self.policy.linears.values())
        with deployed(self.policy) if apart else nullcontext(), _masters_stood_in_for(self.policy) as given:
            sync()
            held = self._attached().held()
            for name in given.keys() & held.keys():
                ours, theirs = given[name], held[name].detach()
                if theirs.shape == ours.shape and not torch.equal(ours.to(theirs), theirs):
                    raise ConfigError(f"RinCallback: vLLM was given {name} and holds other values; set use_vllm=False")
        self._reached = True

    def _agreed(self, trl: Trl, engine: Tensor, ours: Tensor, sampled: Sampled) -> Tensor:
        """Log-probs [N, T] that vLLM sampled with; ours, by the weights that it was given, where it tells none.

        Raises ConfigError where the two are apart: it computes something else than what it was given. With inputs in
        few bits roundings flip, and a policy is as far from itself: that is measured in the first rollout.
        """
        if self._limit is None:
            self._limit = NARROW_LIMIT
            if any(arithmetic.input != AS_IT_IS for arithmetic in self.policy.arithmetic):
                itself = (trl.cached_logps(self.policy, sampled) - ours)[sampled.mask > 0].abs().mean().item()
                self._limit = max(NARROW_LIMIT, FLOOR_FACTOR * itself)
        told = (sampled.mask > 0) & engine.isfinite()
        apart = (engine - ours)[told].abs().mean().item() if told.any() else 0.0
        if not apart <= self._limit:
            raise ConfigError(
                f"RinCallback: vLLM's log-probs are {apart:.2g} nats per token from those of the weights it was given "
                f"(allowed {self._limit:.2g}), so it computes with others, or otherwise; set use_vllm=False"
            )
        return engine.where(told, ours)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Whether a generation computes with the model that has the noise, itself or by what it sends to an engine."""
        _, body = text_model(self.policy.network)
        self._reached = False

        def reached(*_: Any) -> None:
            self._reached = True

        handle = nullcontext() if self._attached().trainer.use_vllm else body.register_forward_hook(reached)
        with handle:
            yield

    def _measured(self, trl: Trl, scored: dict[str, Any], sampled: Sampled) -> dict[str, float]:
        """Signals of this process's completions, by field of `Signals`."""
        values = {
            "length": mean(sampled.mask.sum(1).tolist()),
            "truncated": mean([float(not trl.finished(ids)) for ids in sampled.completions]),
            "distinct_2": mean([distinct_share(ids, 2) for ids in sampled.completions]),
            "repetition": mean([1 - distinct_share(ids, 4) for ids in sampled.completions]),
        }
        if sampled.logps is None or sampled.entropies is None:
            return values
        mask = sampled.mask
        inside = mask > 0
        clean = trl.clean_logps(scored, sampled)
        weights = importance_weights("none", clean, sampled.logps, mask, _CORRECTION_CAP)
        unlikely = clean[inside] < -math.log(self.policy.vocabulary) - 2
        return values | {
            "entropy": ((sampled.entropies * mask).sum(1) / mask.sum(1).clamp(min=1)).mean().item(),
            "gibberish": unlikely.float().mean().item(),
            "kl": weights.kl,
            "logp_gap": (clean - sampled.logps)[inside].abs().mean().item(),
            "weight": weights.mean,
            "effective_share": weights.effective_share,
        }

    # --- what TRL tells ----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trl is None:
            raise ConfigError("RinCallback: it is not attached, and noise would reach nothing; call attach(trainer)")
        if self.rollouts > 0:
            raise ConfigError(
                "RinCallback: its run has begun already; a new one needs a new trainer and a new callback"
            )
        if state.global_step > 0:
            self._restore(state)
        self._total = self.trl.rollouts(state.max_steps)
        self._begun = (self.trl.passes, self.rollouts)
        self.start_weights = followed(self.policy.trainable())
        self._write("running")

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        return self._passed(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        return self._passed(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._values is not None:
            self._judge(state, control)
        done = state.global_step >= state.max_steps
        self._write("collapsed" if self.verdict.collapsed else "completed" if done else "stopped")

    def _passed(self, state: Any, control: Any) -> Any:
        """Behind every forward and backward pass. Raises ConfigError where TRL has generated past this callback."""
        trl = self._attached()
        start, made = self._begun
        every = trl.passes_per_rollout
        expected = -(-trl.passes // every) - -(-start // every)
        if self.rollouts - made < expected:
            raise ConfigError(_PAST)
        clipped = trl.clip_fraction()
        if clipped is not None:
            self._clipped.append(clipped)
        if trl.passes % every == 0 and self._values is not None:
            self._judge(state, control)
        return control

    def _judge(self, state: Any, control: Any) -> None:
        """The verdict on a rollout and what was learned from it; it is reported, and ends the run."""
        trl, values = self._attached(), self._values
        assert values is not None
        assert self._total is not None
        self._values = None
        if self._norms and self._clipped:
            values |= {"grad_norm": max(self._norms, key=lambda n: math.inf if math.isnan(n) else n)}
            values |= {"clip_fraction": mean(self._clipped)}
        step = self.rollouts - 1
        stage = stage_at(self.noise, step, self._total)
        values["sigma"] = sigma_at(self.noise, step, self._total)
        verdict = not_finite({NAMES[field]: value for field, value in values.items()})
        if not verdict.collapsed and self.collapse.mode != "off":
            verdict = self.detector.judge(values, quiet=stage == 0 and self.noise.num_stages > 1)
        for field, value in values.items():
            trl.report(NAMES[field], value)
        trl.report(DOSE, fmean([e.applied_relative for e in self.effects if e.stage == stage] or [0.0]))
        trl.report(COLLAPSED, float(verdict.collapsed))
        if not verdict.collapsed:
            return
        told = {RULE: verdict.rule, EVIDENCE: verdict.evidence, ROLLOUT: step}
        state.log_history.append({"step": state.global_step, **told})  # words are no metric
        if verdict.rule != "nonfinite" and self.collapse.mode == "monitor":
            self.alarms.append(Alarm(step=step, rule=verdict.rule, evidence=verdict.evidence))
            return
        self.verdict = verdict
        _SAID.warning("collapsed in rollout %d by rule %s: %s", step, verdict.rule, verdict.evidence)
        control.should_log = control.should_training_stop = True
        self._write("collapsed")

    def _attached(self) -> Trl:
        assert self.trl is not None, "only wrapped methods and TRL's events come here"
        return self.trl

    # --- kept --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For a checkpoint of the trainer; plain values."""
        return {
            "args": {},
            "attributes": {
                "rollouts": self.rollouts,
                "clean": self.clean,
                "draws": GENERATOR,
                "effects": [asdict(effect) for effect in self.effects],
                "alarms": [asdict(alarm) for alarm in self.alarms],
                "detector": self.detector.state(),
            },
        }

    def _restore(self, state: Any) -> None:
        """Go on where a checkpoint was taken. Raises ConfigError for one that this callback did not see."""
        kept = (state.stateful_callbacks or {}).get(type(self).__name__)
        if kept is None:
            raise ConfigError(
                f"RinCallback: the checkpoint of step {state.global_step} is of a run without it, and stages cannot be "
                "counted; begin anew"
            )
        self._check_loads_back("resume_from_checkpoint")
        kept = kept["attributes"]
        if self.targets and kept.get("draws") != GENERATOR:
            raise ConfigError(
                "RinCallback: the checkpoint is of a run whose noise another generator drew, and this program draws by "
                f"{GENERATOR}; use the program that began it, or begin anew"
            )
        self.rollouts, self.clean = kept["rollouts"], kept["clean"]
        self.effects = TypeAdapter(list[Effect]).validate_python(kept["effects"])
        self.alarms = TypeAdapter(list[Alarm]).validate_python(kept["alarms"])
        self.detector.restore(kept["detector"])
        self._warnings.append(f"`moved` is counted from rollout {self.rollouts} on, where the run was resumed")

    def _write(self, outcome: str) -> None:
        """The receipt, beside the trainer's checkpoints; by the first process alone."""
        if not self._attached().trainer.is_world_process_zero():
            return
        tree = {
            "outcome": outcome,
            "rule": self.verdict.rule,
            "evidence": self.verdict.evidence,
            "step": self.rollouts,
            "steps": self._total,
            "clean_generations": self.clean,
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "receipt": self.receipt().as_tree(),
            "config": {
                "quant": as_tree(self.quantized.quant),
                "noise": as_tree(self.noise),
                "collapse": as_tree(self.collapse),
                "seed": self.seed,
            },
        }
        self.folder.write(RECEIPT_FILE, json.dumps(tree, indent=1))


def _check_adapters(model: nn.Module) -> None:
    """Raises ConfigError for adapters that do more than stand beside a layer (DoRA multiplies with the layer's weight
    itself, unquantised), and for those that are named and not there: peft looks for some mixtures' experts in tensors
    that quantised ones have no more."""
    there = {bare_name(name) for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for config in getattr(model, "peft_config", {}).values():
        listed = [getattr(config, key, None) for key in ("target_modules", "target_parameters")]
        for named in sorted(name for names in listed if isinstance(names, set | list) for name in names):
            if not any(f".{name}".endswith(f".{named}") for name in there):
                raise ConfigError(
                    f"RinCallback.attach: peft has put no adapter beside {named}; name layers as quantize told them: "
                    "LoraConfig(target_modules=list(receipt.quantized))"
                )
    for name, module in model.named_modules():
        beside = isinstance(getattr(module, "base_layer", None), QuantLinear)
        if beside and (not hasattr(module, "lora_dropout") or any(getattr(module, "lora_variant", {}).values())):
            raise ConfigError(
                f"RinCallback.attach: the adapter of {bare_name(name)} is no plain LoRA and may compute past its 4-bit "
                "layer; give LoraConfig without use_dora and the like"
            )


def _check_in_place(policy: Policy) -> None:
    """Raises ConfigError where the model computes with another module than the one that was wrapped, or would get
    noise: peft's modules_to_save are copies."""
    places = {id(module): name.split(".") for name, module in policy.model.named_modules()}
    for name, module in {**policy.linears, **policy.norms, **policy.final_norm}.items():
        if "original_module" in places.get(id(module), ["original_module"]):
            raise ConfigError(
                f"RinCallback.attach: the model computes with another {name} than quantize saw, without formats or "
                "noise; leave it out of modules_to_save, and change nothing behind quantize"
            )


@contextmanager
def _masters_stood_in_for(policy: Policy) -> Iterator[dict[str, Tensor]]:
    """Deployed weights under the names of parameters, for who reads those; gives what an engine then holds, by name.

    peft adds adapters to what lies there, and subtracts them again, which rounds: so it gets copies.
    """
    masters: list[tuple[Tensor, Tensor]] = []
    adapted = set(policy.adapted)
    try:
        given = {bare_name(name): parameter.data for name, parameter in policy.network.named_parameters()}
        for name, linear in policy.linears.items():
            assert linear.deployed_weight is not None, f"{name}: weights are sent from inside `deployed`"
            masters.append((linear.weight, linear.weight.data))
            linear.weight.data = linear.deployed_weight.clone() if name in adapted else linear.deployed_weight
            given[f"{name}.weight"] = linear.weight.data
        given = {name: weight for name, weight in given.items() if name.removesuffix(".weight") not in adapted}
        yield given
    finally:
        for parameter, clean in reversed(masters):
            parameter.data = clean

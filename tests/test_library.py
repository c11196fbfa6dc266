"""`trainable` in somebody's own TRL script: a real GRPOTrainer trains, and what it did is compared with a trial, with
itself without the callback, and with its own weights."""

import gc
import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from spaces.config import ConfigError, TrialConfig
from spaces.reading import as_tree, dump_yaml
from tests.conftest import ModelFolder
from tests.test_zoo import network_of
from trainable.engines.engine import NAME, arithmetic_of
from trainable.inside_trl import Trl
from trainable.library import (
    RECEIPT_FILE,
    CollapseConfig,
    NoiseConfig,
    QuantConfig,
    RinCallback,
    for_vllm,
    quantize,
    settings,
)
from trainable.metrics import COLLAPSED, DOSE, EVIDENCE, ROLLOUT, RULE, SIGMA
from trainable.noise import noised_weight, target_sigma
from trainable.quantization import Arithmetic, QuantLinear, fake_quantize
from trainable.trial import Trial

pytestmark = pytest.mark.slow  # TRL takes seconds to import

NOISE = NoiseConfig(sigma_start=0.05, sigma_end=0.01, num_stages=4, modules=("rmsnorm", "linear"))
QUIET = NoiseConfig(sigma_start=0.0)
W4A4, W4A16 = QuantConfig(), QuantConfig(activations="none")
STEPS = 10
GAP = "sampling/sampling_logp_difference/mean"
"""TRL's metric: log-probs of who sampled from those of training, before the first update."""

Script = Callable[..., Any]


@pytest.fixture(scope="module")
def trl() -> Iterator[Any]:
    """TRL's classes, without the seconds that an import of vLLM takes, and those of a look through all that was
    imported (gc) at the start of every training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("trl.import_utils"), "is_vllm_available", lambda *_, **__: False)
        config = importlib.import_module("trl.trainer.grpo_config")
        trainer = importlib.import_module("trl.trainer.grpo_trainer")
    gc.freeze()
    yield SimpleNamespace(Config=config.GRPOConfig, Trainer=trainer.GRPOTrainer)
    gc.unfreeze()


@pytest.fixture
def script(trl: Any, model_folder: ModelFolder, tmp_path: Path) -> Script:
    """A user's script up to `trainer.train()`: script(quant, num_iterations=2, reward=..) -> a GRPOTrainer."""
    from datasets import Dataset

    def trainer(
        quant: QuantConfig | None = W4A4, *, model: Any = None, reward: Any = None, peft: Any = None, **options: Any
    ) -> Any:
        folder = model_folder(layers=2)
        model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if quant is not None:
            quantize(model, quant)
        arguments: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": STEPS,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 3,
        }
        return trl.Trainer(
            model=model,
            reward_funcs=reward or (lambda completions, **_: [float(text.count("1")) for text in completions]),
            args=trl.Config(**arguments | options),
            train_dataset=Dataset.from_list([{"prompt": f"{i}+2="} for i in range(9)]),
            eval_dataset=Dataset.from_list([{"prompt": "7+1="}] * 2),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=peft,
        )

    return trainer


def lora(*more: str, **options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj", *more], **options)


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def numbers(trainer: Any) -> list[dict[str, Any]]:
    """What TRL logged, without times and without what the callback adds."""
    ours = ("rin/", "gen/", "rollout_corr/", "grpo/")
    return [
        {name: value for name, value in entry.items() if not name.startswith(ours) and "time" not in name}
        | {"train_samples_per_second": 0, "train_steps_per_second": 0, "eval_samples_per_second": 0}
        | {"eval_steps_per_second": 0, "train_runtime": 0, "eval_runtime": 0}
        for entry in trainer.state.log_history
    ]


# --- the receipt ------------------------------------------------------------------------------------------------------


def test_ten_steps_leave_the_receipt_that_a_trial_of_the_same_configuration_leaves(
    script: Script, model_folder: ModelFolder
) -> None:
    """With a learning rate that moves no weight, so that both measure the same ones in every stage."""
    trainer = script(learning_rate=1e-30)
    rin = RinCallback(NOISE, CollapseConfig(mode="monitor")).attach(trainer)
    trainer.train()
    config = TrialConfig.model_validate(
        {
            "model": {"name": model_folder(layers=2)},
            "task": {"name": "reasoning_gym:chain_sum"},
            "noise": NOISE,
            "grpo": {"steps": STEPS, "prompts": 2, "group_size": 2, "updates_per_step": 1, "learning_rate": 1e-30},
            "collapse": {"mode": "monitor"},
            "eval": {"questions": 2},
            "seed": 3,
        }
    )
    trial = Trial(config)
    while not trial.done:
        trial.step()
    ours, theirs = rin.receipt(), trial.receipt()
    assert len(ours.effects) == 3 * len(ours.noised) > 0
    assert theirs.generation, "of a script TRL knows it"
    assert replace(ours, forward={}) == replace(theirs, forward={}, warnings=ours.warnings, generation={})
    assert set(theirs.warnings) - set(ours.warnings) == set(trial.so_far.warnings)
    kept = json.loads((Path(trainer.args.output_dir) / RECEIPT_FILE).read_text())
    assert kept["receipt"] == json.loads(json.dumps(ours.as_tree()))
    assert (kept["outcome"], kept["step"], kept["steps"]) == ("completed", STEPS, STEPS)


def test_quantize_tells_what_it_wrapped_and_leaves_what_the_model_computes_with_nothing_quantised() -> None:
    receipt = quantize(network_of("qwen3_moe"), QuantConfig(exclude=("lm_head", "gate")))
    assert receipt.coverage.quantized > 0
    assert any(".experts." in name for name in receipt.quantized)
    assert receipt.forward["wrapped"] < 1e-5


def test_what_a_quantised_gpt2_saves_it_loads_back() -> None:
    """Its layers lie transposed in files, and square ones would fit the wrong way round."""
    model, other = network_of("gpt2"), network_of("gpt2")
    quantize(model, QuantConfig(weights="none", activations="none"))
    for parameter in model.parameters():
        parameter.data += 1
    quantize(other, W4A4)
    other.load_state_dict(model.state_dict())
    wanted = dict(model.named_parameters())
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in other.named_parameters())


def test_a_model_file_of_a_sweep_gives_the_settings(tmp_path: Path) -> None:
    best = TrialConfig(noise=NOISE, quant=W4A16, collapse=CollapseConfig(patience=2))
    (tmp_path / "best.yaml").write_text(dump_yaml(as_tree(best)))
    assert settings(tmp_path / "best.yaml") == best


def test_the_example_of_the_documentation_runs(
    trl: Any, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 64}
    fake = SimpleNamespace(
        GRPOTrainer=trl.Trainer,
        GRPOConfig=lambda **options: trl.Config(**options | sizes | {"gradient_checkpointing": False}),
    )
    monkeypatch.setitem(sys.modules, "trl", fake)
    script = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "examples" / "trl_noise.py"))
    (tmp_path / "best.yaml").write_text(
        dump_yaml(as_tree(TrialConfig(noise=NOISE, collapse=CollapseConfig(patience=9))))
    )
    rin = script["main"](model_folder(layers=2), str(tmp_path / "best.yaml"), str(tmp_path))
    assert (rin.noise, rin.rollouts) == (NOISE, 3)
    assert json.loads((tmp_path / RECEIPT_FILE).read_text())["outcome"] == "completed"


# --- noise in and out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_noise_is_in_rollouts_alone_and_every_weight_is_as_it_was(
    script: Script, peft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = script(
        peft=lora() if peft else None,
        eval_strategy="steps",
        eval_steps=3,
        steps_per_generation=2,
        max_steps=6,
    )
    rin = RinCallback(NoiseConfig(sigma_start=0.01, num_stages=2, modules=("rmsnorm", "linear"))).attach(trainer)
    heard: list[tuple[str, bool]] = []
    places = {target.name: target.module.weight.data_ptr() for target in rin.targets if target.kind == "rmsnorm"}

    def in_noise() -> bool:
        """Whether every norm and projection computes with something else than its clean weight; None of them, else."""
        found = set()
        for target in rin.targets:
            module: Any = target.module
            if target.kind == "rmsnorm":
                found.add(module.weight.data_ptr() != places[target.name])
            else:
                weight = module.deployed_weight
                found.add(weight is not None and not torch.equal(weight, module.quantized_weight()))
        assert len(found) == 1
        return found.pop()

    def listening(name: str, original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            heard.append((name if trainer.model.training else "eval", in_noise()))
            return original(*arguments, **named)

        return call

    def unmoved(rollout: Any) -> Any:
        before = weights(trainer)
        scored = rollout()
        assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
        return scored

    assert rin.trl is not None
    rin.trl.around("_generate_and_score_completions", unmoved)
    monkeypatch.setattr(trainer.model, "generate", listening("rollout", trainer.model.generate))
    monkeypatch.setattr(trainer, "compute_loss", listening("loss", trainer.compute_loss))
    trainer.train()
    assert [noisy for where, noisy in heard if where == "rollout"] == [False, False, True]
    assert {noisy for where, noisy in heard if where == "eval"} == {False}
    assert {noisy for where, noisy in heard if where == "loss"} == {False}
    assert (rin.rollouts, rin.clean) == (3, 2)
    if peft:
        assert set(rin.receipt().adapted) == {
            n for n in rin.policy.linears if n.endswith(("q_proj", "o_proj", "down_proj"))
        }


def test_without_noise_every_number_is_that_of_a_run_without_the_callback(
    script: Script, model_folder: ModelFolder
) -> None:
    """Of a model with dropout, which draws random numbers whenever it computes."""
    runs = []
    for callback in (True, False):
        model = AutoModelForCausalLM.from_pretrained(model_folder(layers=2), dtype=torch.float32, attention_dropout=0.3)
        trainer = script(model=model, eval_strategy="steps", eval_steps=2, num_iterations=2, max_steps=4)
        if callback:
            RinCallback(QUIET).attach(trainer)
        trainer.train()
        runs.append((numbers(trainer), weights(trainer)))
    (with_it, its_weights), (without, plain) = runs
    assert with_it == without
    assert all(torch.equal(its_weights[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("options", "rollouts"),
    [
        ({"num_iterations": 2, "max_steps": 8}, 4),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 2}, 4),
        ({"gradient_accumulation_steps": 2, "num_iterations": 3, "max_steps": 7}, 3),
    ],
    ids=lambda value: str(value),
)
def test_stages_are_counted_in_rollouts_and_not_in_optimizer_steps(
    script: Script, options: dict[str, Any], rollouts: int
) -> None:
    trainer = script(max_completion_length=1, **options)
    rin = RinCallback(NOISE, CollapseConfig(mode="off")).attach(trainer)
    trainer.train()
    stages = [effect.stage for effect in rin.effects if effect.name == rin.targets[0].name]
    assert rin.rollouts == rollouts
    assert stages == ([1, 2, 3] if rollouts > 3 else [1, 2])


def test_adapters_read_what_the_layer_beside_them_reads(script: Script) -> None:
    trainer = script(peft=lora(lora_alpha=8))
    rin = RinCallback(NOISE).attach(trainer)
    beside = trainer.model.base_model.model.model.layers[0].self_attn.o_proj
    torch.nn.init.normal_(beside.lora_B["default"].weight)
    x = torch.randn(5, beside.in_features)
    down, up = beside.lora_A["default"].weight, beside.lora_B["default"].weight
    wanted = 2.0 * (fake_quantize(x) @ down.T) @ up.T
    torch.testing.assert_close(beside(x) - beside.base_layer(x), wanted)
    assert "model.layers.0.self_attn.o_proj" in rin.receipt().adapted


def test_a_reference_model_computes_in_the_same_arithmetic(script: Script) -> None:
    trainer = script(beta=0.1, max_steps=2)
    RinCallback(NOISE, CollapseConfig(mode="off")).attach(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)  # that of another one would not be


def test_a_resumed_run_goes_on_with_its_stages_and_its_baseline(script: Script) -> None:
    noise = NoiseConfig(sigma_start=0.002, sigma_end=0.001, num_stages=4)
    first = script(save_strategy="steps", save_steps=3, max_steps=4)
    rin = RinCallback(noise).attach(first)
    first.train()
    again = script(save_steps=3, max_steps=4)
    resumed = RinCallback(noise).attach(again)
    again.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-3"))
    assert resumed.rollouts == rin.rollouts == 4
    assert [effect.stage for effect in resumed.effects] == [effect.stage for effect in rin.effects]
    assert resumed.effects[: len(resumed.targets) * 2] == rin.effects[: len(rin.targets) * 2]
    assert resumed.detector.baseline == rin.detector.baseline
    file = Path(first.args.output_dir) / "checkpoint-3" / "trainer_state.json"
    file.write_text(file.read_text().replace("philox4x32-10", "mt19937"))
    other = script(save_steps=3, max_steps=4)
    RinCallback(noise).attach(other)
    with pytest.raises(ConfigError, match=r"noise another generator drew, .* begin anew$"):
        other.train(resume_from_checkpoint=str(file.parent))


@pytest.mark.parametrize(("quant", "warned"), [(W4A4, 0), (QuantConfig(weights="none", activations="none"), 1)])
def test_a_receipt_says_where_autocast_rounds_what_it_measured(script: Script, quant: QuantConfig, warned: int) -> None:
    rin = RinCallback(NOISE).attach(script(quant, bf16=True))
    assert sum("where they are multiplied" in line for line in rin.receipt().warnings) == warned


# --- collapse ---------------------------------------------------------------------------------------------------------


def test_a_collapse_ends_the_run_by_its_rule_and_is_told_everywhere(script: Script) -> None:
    trainer = script(max_steps=40)
    noise = NoiseConfig(sigma_start=5.0, sigma_end=5.0, num_stages=20)
    rin = RinCallback(noise, CollapseConfig(patience=2)).attach(trainer)
    trainer.train()
    assert rin.verdict.collapsed
    assert trainer.state.global_step == rin.rollouts == 4  # two quiet rollouts, two noisy ones
    kept = json.loads((Path(trainer.args.output_dir) / RECEIPT_FILE).read_text())
    assert (kept["outcome"], kept["rule"], kept["step"]) == ("collapsed", rin.verdict.rule, 4)
    log = trainer.state.log_history
    assert [entry[COLLAPSED] for entry in log if COLLAPSED in entry] == [0, 0, 0, 1]
    assert [entry[DOSE] > 1 for entry in log if DOSE in entry] == [False, False, True, True]
    (told,) = [entry for entry in log if RULE in entry]
    assert told == {"step": 4, RULE: rin.verdict.rule, EVIDENCE: rin.verdict.evidence, ROLLOUT: 3}


def test_a_reward_that_falls_is_a_collapse_and_only_an_alarm_where_that_is_wished(script: Script) -> None:
    calls = 0

    def reward(completions: list[str], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [0.0 if calls > 3 else 1.0 + (i % 2) for i in range(len(completions))]

    trainer = script(reward=reward)
    rin = RinCallback(QUIET, CollapseConfig(mode="monitor", patience=2)).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert (rin.alarms[0].rule, rin.alarms[0].step) == ("reward_low", 4)
    assert not rin.verdict.collapsed


def test_where_no_stage_is_quiet_a_rollout_without_noise_comes_first_and_leaves_nothing_behind(script: Script) -> None:
    """One stage of almost no noise: what is learned and logged is what it is without collapse rules."""
    noise, runs = NoiseConfig(sigma_start=1e-12, sigma_end=1e-12, num_stages=1), []
    for mode in ("enforce", "off"):
        trainer = script(max_steps=3)
        rin = RinCallback(noise, CollapseConfig(mode=mode)).attach(trainer)
        trainer.train()
        assert (rin.rollouts, len(rin.detector.baseline)) == (3, int(mode == "enforce"))
        runs.append((numbers(trainer), weights(trainer)))
    (watched, moved), (unwatched, plain) = runs
    assert watched == unwatched
    assert all(torch.equal(moved[name], plain[name]) for name in plain)


def test_a_number_that_is_not_finite_ends_the_run_in_every_mode(script: Script) -> None:
    trainer = script(reward=lambda completions, **_: [float("nan")] * len(completions))
    rin = RinCallback(NOISE, CollapseConfig(mode="off")).attach(trainer)
    trainer.train()
    assert (rin.verdict.rule, trainer.state.global_step) == ("nonfinite", 1)


# --- what would have no effect ----------------------------------------------------------------------------------------


def test_a_callback_that_is_not_attached_is_an_error(script: Script) -> None:
    trainer = script()
    trainer.add_callback(RinCallback(NOISE))
    with pytest.raises(ConfigError, match=r"call attach\(trainer\)"):
        trainer.train()


def elsewhere(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A rollout_func with an engine of its own."""
    return {"prompt_ids": [[2]] * len(prompts), "completion_ids": [[2, 1]] * len(prompts), "logprobs": None}


def past(trainer: Any) -> None:
    trainer.rollout_func = elsewhere


def overridden(trainer: Any) -> None:
    """As a subclass that generates in its own way."""
    answer = ([[2]] * 8, [[2, 1]] * 8, None, ["1"] * 8, None, {}, None, [])
    trainer._generate = lambda prompts: answer


@pytest.mark.parametrize(
    ("change", "said"),
    [(past, "generated without the model and without a weight sync"), (overridden, "did not pass this callback")],
)
def test_a_generation_that_noise_did_not_reach_is_an_error(script: Script, change: Any, said: str) -> None:
    trainer = script()
    RinCallback(NOISE, CollapseConfig(mode="off")).attach(trainer)
    change(trainer)
    with pytest.raises(ConfigError, match=said):
        trainer.train()


BEST = {
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 5,
    "eval_steps": 5,
}


def refusals() -> Iterator[tuple[str, Any, str]]:
    yield "unquantised", lambda s: RinCallback(NOISE).attach(s(None)), "was not quantised; call quantize"
    yield "head", lambda s: RinCallback(NOISE).attach(s(QuantConfig(exclude=()))), "leave lm_head in quant.exclude"
    yield "nothing", lambda s: RinCallback(NoiseConfig(layers=(7,))).attach(s()), "blocks 0 to 1"
    yield (
        "step",
        lambda s: RinCallback(NoiseConfig(scale="step", modules=("linear",))).attach(
            s(QuantConfig(weights="none", activations="none"))
        ),
        "has no step",
    )
    yield "liger", lambda s: RinCallback(NOISE).attach(s(use_liger_kernel=True)), "use_liger_kernel"
    yield (
        "restored",
        lambda s: RinCallback(NOISE).attach(s(restore_callback_states_from_checkpoint=True)),
        "RinCallback restores itself",
    )
    yield "no trainer", lambda s: Trl(SimpleNamespace()), "is no GRPOTrainer"
    yield (
        "best",
        lambda s: RinCallback(NOISE).attach(s(model=network_of("mixtral"), **BEST)),
        "load_best_model_at_end=True: a checkpoint has the experts",
    )
    yield (
        "experts",
        lambda s: RinCallback(NOISE).attach(s(model=network_of("qwen3_moe"), peft=lora("gate_proj", "up_proj"))),
        "has put no adapter beside down_proj",
    )
    yield (
        "copied",
        lambda s: RinCallback(NOISE).attach(s(peft=lora(modules_to_save=["input_layernorm"]))),
        "another model.layers.0.input_layernorm than quantize saw",
    )
    yield "dora", lambda s: RinCallback(NOISE).attach(s(peft=lora(use_dora=True))), "is no plain LoRA"
    yield "again", lambda s: (trainer := attached(s)).train() and trainer.train(), "its run has begun already"
    yield "resumed", lambda s: resumed_without(s), "of a run without it"
    yield "twice", lambda s: RinCallback(NOISE).attach(attached(s)), "has another RinCallback"


def resumed_without(script: Script) -> None:
    """From a checkpoint of a run that had no callback."""
    first = script(save_strategy="steps", save_steps=1, max_steps=1)
    first.train()
    again = script(save_steps=1, max_steps=2)
    RinCallback(NOISE).attach(again)
    again.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-1"))


def attached(script: Script) -> Any:
    trainer = script(max_steps=1)
    RinCallback(NOISE).attach(trainer)
    return trainer


@pytest.mark.filterwarnings("ignore:.*did not match any:RuntimeWarning", "ignore:.*no parameter was:RuntimeWarning")
@pytest.mark.parametrize(("call", "said"), [pytest.param(c, s, id=name) for name, c, s in refusals()])
def test_what_cannot_be_done_is_refused_in_one_line(script: Script, call: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        call(script)
    assert "\n" not in str(error.value)


def test_a_trl_without_one_of_the_names_is_refused(script: Script, trl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = script()
    monkeypatch.delattr(trl.Trainer, "_generate")
    with pytest.raises(ConfigError, match=r"has no _generate, .* install trl==1\.16"):
        RinCallback(NOISE).attach(trainer)


def test_adapters_beside_every_expert_are_those_that_the_receipt_names(script: Script) -> None:
    from peft import LoraConfig

    model = network_of("qwen3_moe")
    named = quantize(model, W4A4).quantized
    trainer = script(None, model=model, peft=LoraConfig(r=4, target_modules=list(named)))
    assert RinCallback(NOISE).attach(trainer).receipt().adapted == named


def test_adapters_come_after_quantize(model_folder: ModelFolder) -> None:
    from peft import get_peft_model

    model = AutoModelForCausalLM.from_pretrained(model_folder(layers=2), dtype=torch.float32)
    adapted = get_peft_model(model, lora())
    with pytest.raises(ConfigError, match="has adapters already"):
        quantize(adapted, W4A4)


# --- vLLM's seam ------------------------------------------------------------------------------------------------------


class Engine:
    """In the place of vLLM: a transformers model of its own, which knows what TRL loads into it and nothing else."""

    def __init__(self, generation: Any) -> None:
        self.network: Any = AutoModelForCausalLM.from_pretrained(generation.model.name_or_path, dtype=torch.float32)
        self.generation = generation
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        self.llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=lambda: None)
        self.held: list[dict[str, Tensor]] = []
        """Weights in each generation."""

    def load_weights(self, pairs: list[tuple[str, Tensor]]) -> None:
        for name, tensor in pairs:
            self.network.get_parameter(name).data.copy_(tensor)

    def named_parameters(self) -> Any:
        return self.network.named_parameters()

    def modules(self) -> Any:
        return self.network.modules()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], **_: Any) -> Any:
        """Prompts of one length; nothing ends before the limit."""
        self.held.append({name: p.detach().clone() for name, p in self.network.named_parameters()})
        ids, logps = torch.tensor(prompts), []
        for _ in range(self.generation.max_completion_length):
            distribution = torch.log_softmax(self.network(ids).logits[:, -1], -1)
            token = torch.multinomial(distribution.exp(), 1)
            ids = torch.cat([ids, token], 1)
            logps.append(distribution.gather(1, token)[:, 0])
        said = ids[:, len(prompts[0]) :].tolist()
        return prompts, said, [[[p.item()] for p in row] for row in torch.stack(logps, 1)], None


@pytest.fixture
def colocated(script: Script, monkeypatch: pytest.MonkeyPatch, trl: Any) -> Script:
    """TRL's own path for a colocated vLLM, weight sync included, up to what is called of vLLM."""
    module = importlib.import_module("trl.generation.vllm_generation")

    def start(generation: Any) -> None:
        generation.engine = engine = Engine(generation)
        generation.llm, generation.generate = engine.llm, engine.generate

    monkeypatch.setattr(module.VLLMGeneration, "_init_vllm", start)
    return lambda *arguments, **options: script(
        *arguments, use_vllm=True, vllm_mode="colocate", vllm_importance_sampling_correction=True, **options
    )


def test_vllm_is_given_weights_with_noise_for_rollouts_and_clean_ones_for_evaluations(colocated: Script) -> None:
    """An evaluation and a rollout fall on one optimizer step, for which TRL by itself sends weights once."""
    trainer = colocated(W4A16, eval_strategy="steps", eval_steps=2, steps_per_generation=2)
    rin = RinCallback(NOISE).attach(trainer)
    wanted: list[tuple[bool, dict[str, Tensor]]] = []

    def before(generate: Any) -> Any:
        own: dict[str, Tensor] = {}
        for target in rin.targets:
            sigma = target_sigma(NOISE, target, rin.rollouts, 5) if trainer.model.training else 0.0
            own[target.name], _ = noised_weight(NOISE, target, sigma, step=rin.rollouts, seed=3)
        wanted.append((trainer.model.training, own))
        masters = weights(trainer)
        output = generate()
        assert all(torch.equal(value, masters[name]) for name, value in weights(trainer).items())
        return output

    assert rin.trl is not None
    rin.trl.around("_generate", before)
    trainer.train()
    held = trainer.vllm_generation.engine.held
    assert [training for training, _ in wanted] == [True, False] * 5
    for (_, own), found in zip(wanted, held, strict=True):
        assert all(torch.equal(found[name], value) for name, value in own.items())
    assert not torch.equal(held[4]["model.norm.weight"], held[0]["model.norm.weight"])  # it learned
    log = trainer.state.log_history
    gaps = [entry[GAP] for entry in log if GAP in entry]
    sigmas = [entry[SIGMA] for entry in log if SIGMA in entry]
    assert len(gaps) == len(sigmas) == 5
    assert all((gap > 1e-3) == (sigma > 0) for gap, sigma in zip(gaps, sigmas, strict=True))  # old ones are clean


def test_adapters_are_merged_for_vllm_into_copies_and_the_base_is_not_rounded(colocated: Script) -> None:
    trainer = colocated(W4A16, peft=lora(), learning_rate=0.1)
    rin = RinCallback(QUIET, CollapseConfig(mode="off")).attach(trainer)

    def untouched(sync: Any) -> None:
        deployed = [
            (linear, linear.deployed_weight.clone())  # type: ignore[union-attr]
            for linear in rin.policy.linears.values()
        ]
        sync()
        assert all(torch.equal(linear.deployed_weight, weight) for linear, weight in deployed)

    assert rin.trl is not None
    rin.trl.around_sync(untouched)
    base = {name: value for name, value in weights(trainer).items() if "lora" not in name}
    trainer.train()
    after = weights(trainer)
    assert all(torch.equal(value, after[name]) for name, value in base.items())
    gaps = [entry[GAP] for entry in trainer.state.log_history if GAP in entry]
    assert max(gaps) < 1e-4  # the engine computes what training computes, adapters included
    first, *_, last = (held["model.layers.0.self_attn.q_proj.weight"] for held in trainer.vllm_generation.engine.held)
    assert not torch.equal(first, last)


def test_vllm_that_holds_other_values_than_it_was_given_is_an_error(
    colocated: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = colocated(W4A16)
    RinCallback(NOISE).attach(trainer)
    monkeypatch.setattr(Engine, "load_weights", lambda self, pairs: None)
    with pytest.raises(ConfigError, match="holds other values"):
        trainer.train()


def test_vllm_that_computes_something_else_with_what_it_was_given_is_an_error(colocated: Script) -> None:
    trainer = colocated(W4A16)
    RinCallback(NOISE).attach(trainer)
    trainer.vllm_generation.engine.network.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with pytest.raises(ConfigError, match="nats per token from those of the weights it was given"):
        trainer.train()


def test_vllm_with_our_layers_computes_inputs_as_training_does(colocated: Script) -> None:
    """They say what they are by `rin_parts`, as in `engines/vllm.py`."""
    trainer = colocated(W4A4, max_steps=4)
    engine = trainer.vllm_generation.engine
    quantize(engine.network, W4A4)
    layers = [module for module in engine.network.modules() if isinstance(module, QuantLinear)]
    for layer in layers:
        layer.rin_parts = [layer]  # type: ignore[assignment]
    layers[3].rin_parts = [SimpleNamespace(name=layers[3].name, arithmetic=Arithmetic(scale_rule="even"))]  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=re.escape(f"would not do to the inputs of {layers[3].name}")):
        RinCallback(NOISE).attach(trainer)
    layers[3].rin_parts = [layers[3]]  # type: ignore[assignment]
    RinCallback(NoiseConfig(sigma_start=0.05, num_stages=2), CollapseConfig(mode="monitor")).attach(trainer)
    trainer.train()
    gaps = [entry[GAP] for entry in trainer.state.log_history if GAP in entry]
    assert max(gaps[:2]) < 1e-4 < 1e-2 < min(gaps[2:])


def test_a_folder_for_vllm_names_our_method_and_layers_and_is_where_trl_begins(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = model_folder(layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(ConfigError, match="was not quantised"):
        for_vllm(model, AutoTokenizer.from_pretrained(folder), tmp_path)
    quantized = quantize(model, W4A4).quantized
    for_vllm(model, AutoTokenizer.from_pretrained(folder), tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["synced"], model.name_or_path) == (NAME, True, str(tmp_path))
    assert {name for name, how in arithmetic_of(told).items() if how == Arithmetic()} == set(quantized)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters() if name in stored)
    assert {f"{name}.weight" for name in quantized} < set(stored)


def test_vllm_that_holds_fewer_bits_than_the_model_is_refused(colocated: Script) -> None:
    """It turns fp32 into bfloat16 by itself, in which a gain near 1 does not move at sigma 0.0005."""
    trainer = colocated(W4A16)
    trainer.vllm_generation.engine.network.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"holds .* in torch\.bfloat16, the model in torch\.float32"):
        RinCallback(NOISE).attach(trainer)


@pytest.mark.parametrize(
    ("quant", "said"),
    [(W4A4, "call for_vllm"), (QuantConfig(activations="none", hadamard=True), "hadamard=false")],
)
def test_vllm_is_refused_where_it_would_compute_inputs_otherwise(colocated: Script, quant: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RinCallback(NOISE).attach(colocated(quant))

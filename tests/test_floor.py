"""The floor under comparisons of log-probs: against transformers' own passes, by hand, and with an error put in."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.qwen2 import modeling_qwen2

import trainable.floor
from spaces.config import ConfigError, Correction, ModelConfig, QuantConfig
from tests.conftest import ModelFolder, byte_tokenizer, ragged_prompts, sampled_groups
from trainable.floor import Floor, Gap, cached_logps, eager_logps, first_blocks, gap, measure_floor
from trainable.forward.decoder import _Transformers, decoder
from trainable.forward.logps import Batch, clean_logps, make_batch
from trainable.forward.transformer import forward_of
from trainable.policy.attention import attention
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, computing, deployed
from trainable.quantization import Arithmetic, InputSource
from trainable.seeds import generator

pytestmark = pytest.mark.slow  # many seconds of computing

W16A16 = QuantConfig(weights="none", activations="none")
PLAIN = QuantConfig(weights="none", activations="none", exclude=())
"""The same, for models whose head has another name."""
TEMPERATURE = 0.7
MICRO = 8


def sampled_batch(policy: Policy, group_size: int = 4) -> Batch:
    groups = sampled_groups(policy, ragged_prompts(5), group_size=group_size, temperature=TEMPERATURE, batch_size=64)
    return make_batch(policy, groups, torch.zeros(5, group_size))


def policy_of(folder: str, quant: QuantConfig, **model: Any) -> Policy:
    return load_policy(ModelConfig(name=folder, **model), quant, seed=0)


def floor_in(policy: Policy, batch: Batch, micro: int = MICRO) -> Floor:
    with deployed(policy):
        return measure_floor(policy, batch, TEMPERATURE, micro)


# --- the gap ----------------------------------------------------------------------------------------------------------


def test_a_gap_worked_out_by_hand() -> None:
    behaviour = torch.tensor([[-1.0, -2.0], [-3.0, 99.0]])
    reference = torch.tensor([[-1.5, -1.0], [-3.25, -99.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    found = gap(behaviour, reference, mask)
    d = [-0.5, 1.0, -0.25]
    assert found.tokens == 3
    assert found.kl == pytest.approx(sum(math.exp(x) - x - 1 for x in d) / 3, rel=1e-12)
    assert (found.mean_abs, found.max_abs, found.apart) == (pytest.approx(1.75 / 3), 1.0, 1.0)
    token, sequence = [math.exp(x) for x in d], [math.exp(0.5), math.exp(-0.25)]
    for share, weights in ((found.token_share, token), (found.sequence_share, sequence)):
        assert share == pytest.approx(sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights)), rel=1e-12)
    assert found.effective_share == {"none": 1.0, "token": found.token_share, "sequence": found.sequence_share}
    assert list(found.effective_share) == list(get_args(Correction))


def test_tokens_of_a_third_pass_give_the_kl_of_the_two() -> None:
    """A vocabulary of 4, each token as often as the sampler says: then the estimate is the exact KL, whoever
    sampled."""
    behaviour, reference = torch.tensor([0.001, 0.199, 0.3, 0.5]), torch.tensor([0.25, 0.25, 0.4, 0.1])
    kl = (behaviour.double() * (behaviour.double() / reference.double()).log()).sum().item()
    for counts in ([400, 200, 100, 100], [2, 398, 600, 1000]):
        tokens = torch.arange(4).repeat_interleave(torch.tensor(counts))[None]  # [1, T]
        sampler = (torch.tensor(counts) / sum(counts)).log()[tokens]
        mask = torch.ones(tokens.shape)
        found = gap(behaviour.log()[tokens], reference.log()[tokens], mask, sampler_logps=sampler)
        assert found.kl == pytest.approx(kl, rel=1e-5)
        plain = gap(behaviour.log()[tokens], reference.log()[tokens], mask)
        assert (plain.kl == pytest.approx(kl, rel=1e-5)) == (counts[0] == 2), "the behaviour itself sampled them"


def test_a_tiny_gap_is_not_lost_in_rounding() -> None:
    """In single precision exp(d) - d - 1 of d = 2e-6 is 0 or 1e-7; it is d^2 / 2."""
    behaviour = -torch.rand(4, 50, generator=generator("logps"))
    reference = behaviour + 2e-6
    d = (reference.double() - behaviour.double()).square().mean().item() / 2
    found = gap(behaviour, reference, torch.ones(4, 50))
    assert found.kl == pytest.approx(d, rel=1e-3)
    assert found.apart == 0
    assert 1e-12 < d < 4e-12


def test_equal_log_probs_have_no_gap() -> None:
    logps = -torch.rand(3, 5, generator=generator("logps"))
    assert gap(logps, logps, torch.ones(3, 5)) == Gap(
        kl=0.0, mean_abs=0.0, max_abs=0.0, apart=0.0, tokens=15, token_share=1.0, sequence_share=1.0
    )


@pytest.mark.parametrize("bad", ["cached", "eager"])
def test_what_is_not_finite_makes_the_floor_nan_whichever_pair_it_is_in(bad: str) -> None:
    fine = gap(torch.zeros(1, 2), torch.full((1, 2), 0.5), torch.ones(1, 2))
    wrong = gap(torch.zeros(1, 2), torch.tensor([[0.0, float("nan")]]), torch.ones(1, 2))
    assert math.isnan(wrong.kl)
    assert wrong.apart == 0.5
    floor = Floor(pairs={"cached": fine, "eager": fine} | {bad: wrong})
    assert math.isnan(floor.kl)
    assert not floor.kl <= 1e9


def test_the_floor_is_the_wider_pair() -> None:
    near, far = (gap(torch.zeros(1, 2), torch.full((1, 2), d), torch.ones(1, 2)) for d in (0.1, 0.5))
    assert (
        Floor(pairs={"cached": near, "eager": far}).kl
        == Floor(pairs={"cached": far, "eager": near}).kl
        == far.kl
        > near.kl
    )


# --- the two other ways -----------------------------------------------------------------------------------------------


@torch.no_grad()
def logps_of_transformers(folder: str, batch: Batch, *, cached: bool, implementation: str) -> torch.Tensor:
    """Each row alone, without padding, by the model as transformers loads it; a token at a time or all at once.
    [B, T]"""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()
    logps = torch.zeros_like(batch.mask)
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row] > 0]
        tokens = batch.completion_ids[row][batch.mask[row] > 0]
        if cached:
            out = model(input_ids=prompt[None], use_cache=True)
            logits = [out.logits[0, -1]]
            for token in tokens[:-1]:
                out = model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits[0, -1])
            seen = torch.stack(logits)
        else:
            seen = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        logps[row, : len(tokens)] = torch.log_softmax(seen / TEMPERATURE, -1).gather(-1, tokens[:, None])[:, 0]
    return logps


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_both_ways_give_the_log_probs_of_transformers(model_folder: ModelFolder, kind: str) -> None:
    folder = model_folder(kind)
    policy = policy_of(folder, W16A16)
    batch = sampled_batch(policy)
    inside = batch.mask > 0
    with deployed(policy):
        cached = cached_logps(policy, batch, TEMPERATURE, MICRO)
        eager = eager_logps(policy, batch, TEMPERATURE, MICRO)
    theirs = [
        logps_of_transformers(folder, batch, cached=c, implementation=i) for c, i in ((True, "sdpa"), (False, "eager"))
    ]
    torch.testing.assert_close(cached[inside], theirs[0][inside], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eager[inside], theirs[1][inside], rtol=1e-4, atol=1e-4)


def test_the_cached_way_is_the_one_that_sampled(model_folder: ModelFolder) -> None:
    """In W4A4, where another way would show."""
    policy = policy_of(model_folder(), QuantConfig())
    batch = sampled_batch(policy)
    inside = batch.mask > 0
    with deployed(policy):
        cached = cached_logps(policy, batch, TEMPERATURE, len(batch))
    same = cached[inside] == batch.rollout_logps[inside]
    assert same.float().mean() > 0.95, (
        "but for rows that generation retired, and sums that change with the number of rows"
    )


def test_the_eager_way_is_that_of_a_policy_loaded_with_eager_attention(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(model_folder(), QuantConfig())
    batch = sampled_batch(policy)
    calls: list[int] = []
    real = modeling_qwen2.eager_attention_forward
    monkeypatch.setattr(modeling_qwen2, "eager_attention_forward", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    with deployed(policy):
        training = clean_logps(policy, batch, TEMPERATURE, MICRO)
        assert calls == []
        eager = eager_logps(policy, batch, TEMPERATURE, MICRO)
    assert len(calls) == policy.depth * len(batch.slices(MICRO)), "in every layer"
    other = policy_of(model_folder(), QuantConfig(), attention="eager")
    with deployed(other):
        assert torch.equal(eager, clean_logps(other, batch, TEMPERATURE, MICRO))
        assert torch.equal(training, eager_logps(other, batch, TEMPERATURE, MICRO)), "its other way is sdpa"
    assert not torch.equal(eager, training)


@pytest.mark.parametrize("micro", [1, 3, 6, 100])
def test_rows_at_a_time_change_no_more_than_rounding(model_folder: ModelFolder, micro: int) -> None:
    policy = policy_of(model_folder(), W16A16)
    batch = sampled_batch(policy, group_size=6)
    inside = batch.mask > 0
    with deployed(policy):
        expected = cached_logps(policy, replace(batch, group_size=1), TEMPERATURE, 100)
        found = cached_logps(policy, batch, TEMPERATURE, micro)
    torch.testing.assert_close(found[inside], expected[inside], rtol=5e-5, atol=5e-5)  # up to 1.6e-5, by processor


# --- the floor --------------------------------------------------------------------------------------------------------


def floors_of(folder: str, group_size: int = 4, **model: Any) -> tuple[Floor, Floor]:
    """In W16A16 and in W4A4, each on its own tokens; adapters are no longer zero."""
    floors = []
    for quant in (W16A16, QuantConfig()):
        policy = policy_of(folder, quant, **model)
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02, generator=generator(name))
        floors.append(floor_in(policy, sampled_batch(policy, group_size)))
    return floors[0], floors[1]


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_floor_of_4_bits_is_above_that_of_16(model_folder: ModelFolder, kind: str, adapter: str) -> None:
    plain, coarse = floors_of(model_folder(kind, layers=6), group_size=16, adapter=adapter, dtype="bfloat16")
    assert list(plain.pairs) == ["cached", "eager"]
    assert coarse.kl > 10 * plain.kl
    for pair in ("cached", "eager"):
        assert coarse.pairs[pair].kl > plain.pairs[pair].kl > 0
        assert coarse.pairs[pair].max_abs > 2 * plain.pairs[pair].max_abs
        assert coarse.pairs[pair].token_share < plain.pairs[pair].token_share


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_16_bits_in_fp32_agree(model_folder: ModelFolder, kind: str, adapter: str) -> None:
    plain, _ = floors_of(model_folder(kind), adapter=adapter)
    assert all(0 < pair.max_abs < 1e-4 for pair in plain.pairs.values())
    assert 0 < plain.kl < 1e-9
    assert (plain.widest.apart, plain.widest.token_share, plain.widest.sequence_share) == (
        0.0,
        pytest.approx(1),
        pytest.approx(1),
    )


def test_4_bits_in_fp32_agree_but_for_the_tokens_behind_a_flip(model_folder: ModelFolder) -> None:
    """Rounding takes differences away until one lies at a boundary: then they are as large as a 4-bit step."""
    plain, coarse = floors_of(model_folder(layers=12, hidden=128, intermediate=256), group_size=16)
    assert coarse.widest.max_abs > 100 * plain.widest.max_abs
    assert 0 < coarse.widest.apart < 1
    assert coarse.kl > 1000 * plain.kl


@pytest.mark.parametrize("quant", [W16A16, QuantConfig()], ids=["W16A16", "W4A4"])
@pytest.mark.parametrize("where", ["clean_logps", "cached_logps", "eager_logps"])
def test_an_error_in_one_way_raises_the_kl(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, quant: QuantConfig, where: str
) -> None:
    """One norm weight of the first block is another one, in that way alone."""
    policy = policy_of(model_folder(layers=2), quant)
    batch = sampled_batch(policy)
    honest = floor_in(policy, batch)
    real = getattr(trainable.floor, where)

    def with_another_weight(*arguments: Any) -> torch.Tensor:
        weight: Any = policy.norms["model.layers.0.input_layernorm"].weight
        kept = weight.detach().clone()
        weight[0] *= 1.5
        try:
            return real(*arguments)
        finally:
            weight.copy_(kept)

    monkeypatch.setattr(trainable.floor, where, with_another_weight)
    wrong = floor_in(policy, batch)
    changed = {"clean_logps": ("cached",), "cached_logps": ("cached",), "eager_logps": ("eager",)}[where]
    for pair in changed:
        assert wrong.pairs[pair].kl > max(3 * honest.kl, 1e-6), "above what the gate lets through"
    for pair in {"cached", "eager"} - set(changed) if where != "clean_logps" else ():
        assert wrong.pairs[pair] == honest.pairs[pair]


def test_the_same_floor_again_bit_for_bit(model_folder: ModelFolder) -> None:
    first, second = (
        floor_in(policy, sampled_batch(policy))
        for policy in (policy_of(model_folder(), QuantConfig()) for _ in range(2))
    )
    assert first == second
    assert first.kl > 0


# --- other architectures ----------------------------------------------------------------------------------------------


def gpt_neox(place: Path) -> str:
    return saved(
        place,
        lambda **sizes: GPTNeoXForCausalLM(
            GPTNeoXConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=128,
                **sizes,
            )
        ),
    )


def gpt2(place: Path) -> str:
    return saved(
        place, lambda **sizes: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=4, n_head=4, n_positions=128, **sizes))
    )


def saved(place: Path, build: Callable[..., Any]) -> str:
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build(
            vocab_size=len(tokenizer), initializer_range=0.3, bos_token_id=None, eos_token_id=1, pad_token_id=0
        ).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("build", [gpt2, gpt_neox])
def test_architectures_that_our_forward_does_not_know_have_a_floor_too(
    build: Callable[[Path], str], tmp_path: Path
) -> None:
    policy = policy_of(build(tmp_path), PLAIN)
    assert forward_of(policy) is None
    assert type(decoder(policy, 4)) is _Transformers
    batch = sampled_batch(policy)
    inside = batch.mask > 0
    floor = floor_in(policy, batch)
    assert all(0 < pair.max_abs < 1e-3 for pair in floor.pairs.values())
    with deployed(policy):
        cached, eager = (way(policy, batch, TEMPERATURE, MICRO) for way in (cached_logps, eager_logps))
    theirs = [logps_of_transformers(str(tmp_path), batch, cached=c, implementation="eager") for c in (True, False)]
    torch.testing.assert_close(cached[inside], theirs[0][inside], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eager[inside], theirs[1][inside], rtol=1e-4, atol=1e-4)


# --- everything is as before afterwards -------------------------------------------------------------------------------


def settings_of(policy: Policy) -> dict[str, Any]:
    network: Any = policy.model
    config = network.config
    return {
        "attention": config._attn_implementation,
        "config": copy.deepcopy(config.to_dict()),
        "modules": [(name, id(module)) for name, module in network.named_modules()],
        "formats": [(m.arithmetic, m.quantize_input) for m in policy.linears.values()],
        "shared": [(m.readers, m.output) for m in network.modules() if isinstance(m, InputSource)],
        "deployed": [m.deployed_weight for m in policy.linears.values()],
        "parts": (policy.depth, list(policy.linears), list(policy.norms)),
    }


@contextmanager
def every_setting(policy: Policy) -> Iterator[None]:
    with (
        computing(policy, Arithmetic(activations="mxfp8", scale_rule="even")),
        first_blocks(policy, 2) as part,
        deployed(part),
        attention(part.network, "eager"),
    ):
        assert forward_of(part) is None
        yield


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_every_setting_is_restored_exactly_also_on_error(model_folder: ModelFolder, adapter: str, fails: bool) -> None:
    policy = policy_of(model_folder(), QuantConfig(), adapter=adapter)
    before = settings_of(policy)
    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(RuntimeError, match="in between"))
        stack.enter_context(every_setting(policy))
        assert settings_of(policy) != before
        if fails:
            raise RuntimeError("in between")
    assert settings_of(policy) == before


def test_a_floor_that_fails_half_way_leaves_the_attention_as_it_was(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(model_folder(), QuantConfig())
    batch = sampled_batch(policy)
    before, seen = settings_of(policy), []

    def broken(policy: Policy, *rest: Any) -> torch.Tensor:
        network: Any = policy.model
        seen.append(network.config._attn_implementation)
        raise RuntimeError("in between")

    monkeypatch.setattr(trainable.floor, "clean_logps", broken)
    with pytest.raises(RuntimeError, match="in between"):
        floor_in(policy, batch)
    assert seen == ["eager"]
    assert settings_of(policy) == before


def test_an_attention_that_does_not_exist_is_one_line(model_folder: ModelFolder) -> None:
    policy = policy_of(model_folder(), QuantConfig())
    before = settings_of(policy)
    with pytest.raises(ConfigError, match=r"model\.attention=magic: ") as error, attention(policy.network, "magic"):
        pass
    assert "\n" not in str(error.value)
    assert settings_of(policy) == before


def test_an_architecture_that_only_warns_that_it_cannot_switch_is_refused(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(model_folder(), QuantConfig())
    monkeypatch.setattr(type(policy.model), "_can_set_attn_implementation_cached_value", False, raising=False)
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM cannot switch to it"), attention(policy.network, "eager"):
        pass


# --- the same weights in other settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize(
    "quant",
    [
        W16A16,
        QuantConfig(activations="none"),
        QuantConfig(activations="mxfp8"),
        QuantConfig(scale_rule="rceil"),
        QuantConfig(skip_layers=(0, -1)),
        QuantConfig(exclude=("lm_head", "q_proj")),
    ],
    ids=["W16A16", "W4A16", "W4A8", "rceil", "skipped", "excluded"],
)
def test_switched_formats_are_those_of_a_policy_loaded_with_them(
    model_folder: ModelFolder, quant: QuantConfig, adapter: str
) -> None:
    loaded = policy_of(model_folder(), quant, adapter=adapter)
    batch = sampled_batch(loaded)
    coarse = quant.model_copy(update={"weights": "mxfp4", "activations": "mxfp4", "scale_rule": "floor"})
    policy = policy_of(model_folder(), coarse, adapter=adapter)
    with deployed(loaded):
        expected = clean_logps(loaded, batch, TEMPERATURE, MICRO)
    with computing(policy, Arithmetic.of(quant)), deployed(policy):
        found = clean_logps(policy, batch, TEMPERATURE, MICRO)
    assert torch.equal(found, expected)
    with deployed(policy):
        back = clean_logps(policy, batch, TEMPERATURE, MICRO)
    assert torch.equal(back, expected) == (quant == coarse)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox"])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_the_first_blocks_are_a_model_of_that_depth(
    model_folder: ModelFolder, tmp_path: Path, kind: str, blocks: int
) -> None:
    """Against a model that transformers builds with so many blocks and the same weights."""
    folder = gpt_neox(tmp_path) if kind == "gpt_neox" else model_folder(kind, layers=4)
    whole: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    shallow = type(whole)(config)
    missing, _ = shallow.load_state_dict(whole.state_dict(), strict=False)
    assert missing == []
    shallow.save_pretrained(tmp_path / "shallow")

    policy = policy_of(folder, PLAIN)
    batch = sampled_batch(policy)
    inside = batch.mask > 0
    cached, full = (
        logps_of_transformers(str(tmp_path / "shallow"), batch, cached=c, implementation="eager") for c in (True, False)
    )
    with first_blocks(policy, blocks) as part, deployed(part):
        assert part.depth == blocks
        for way, theirs in ((cached_logps, cached), (eager_logps, full), (clean_logps, full)):
            torch.testing.assert_close(
                way(part, batch, TEMPERATURE, MICRO)[inside], theirs[inside], rtol=1e-4, atol=1e-4
            )
    with deployed(policy):
        deep = clean_logps(policy, batch, TEMPERATURE, MICRO)
    assert ((deep - full)[inside].abs().max() > 0.01) == (blocks < policy.depth), "the blocks behind matter"


@pytest.mark.slow
def test_a_real_model_has_a_floor_in_w4a4_and_next_to_none_in_16_bits(smollm2: str) -> None:
    def floor(dtype: Any, *quants: QuantConfig) -> list[Floor]:
        policy, found = load_policy(ModelConfig(name=smollm2, dtype=dtype), QuantConfig(), seed=0), []
        prompts = [policy.tokenizer(f"State the final answer to {a} + {a + 7} =")["input_ids"] for a in (3, 25, 48, 71)]
        for quant in quants:
            with computing(policy, Arithmetic.of(quant)):
                batch = make_batch(
                    policy, sampled_groups(policy, prompts, group_size=2, temperature=1.0), torch.zeros(4, 2)
                )
                with deployed(policy):
                    found.append(measure_floor(policy, batch, 1.0, MICRO))
        return found

    (exact,) = floor("float32", W16A16)
    plain, coarse = floor("bfloat16", W16A16, QuantConfig())
    assert exact.kl < 1e-9
    assert all(pair.max_abs < 1e-3 for pair in exact.pairs.values())
    assert plain.kl < 0.02
    assert coarse.kl > 0.1
    assert coarse.widest.apart > 0.5

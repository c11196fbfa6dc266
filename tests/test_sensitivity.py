"""The functional part of a scan, by other ways: transformers' own models, explicit gradients, codes of packed files."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import trainable.update_side
from spaces.config import ModelConfig, QuantConfig, TrialConfig
from spaces.reading import read_config
from tests.conftest import ModelFolder, ragged_prompts, sampled_groups
from trainable.divergence import _resumes, divergence, divergences, rows_of
from trainable.fisher import fisher, own_tokens
from trainable.forward.logps import Batch, clean_logps, make_batch
from trainable.grpo import group_advantages, update
from trainable.packing import MAGNITUDES, pack
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, block_of, deployed
from trainable.purchases import _bits, free_changes, lifted, purchases
from trainable.quantization import UNQUANTIZED, fake_quantize_eager
from trainable.scan import Estimate, Purchase, kl_per_bit
from trainable.seeds import generator
from trainable.update_side import gradient_agreement, survival

DEPTH = 3
PROMPTS = [*ragged_prompts(3, longest=9), *ragged_prompts(2, longest=9)]  # two of one length at least
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def folder(model_folder: ModelFolder) -> str:
    return model_folder(layers=DEPTH)


@pytest.fixture(scope="module")
def policy(folder: str) -> Policy:
    return load_policy(ModelConfig(name=folder), QuantConfig(), seed=0)


@pytest.fixture(scope="module")
def batch(policy: Policy) -> Batch:
    """Five groups of four; in the last one all rewards are equal."""
    groups = sampled_groups(policy, ragged_prompts(5), temperature=TEMPERATURE)
    rewards = torch.tensor([[0.0, 1, 0, 0], [1, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    made = make_batch(policy, groups, group_advantages(rewards))
    with deployed(policy):
        return replace(made, old_logps=clean_logps(policy, made, TEMPERATURE, 8))


@pytest.fixture(scope="module")
def config() -> TrialConfig:
    """How a trial would learn from that batch."""
    return read_config(
        {
            "rollout": {"temperature": TEMPERATURE, "max_new_tokens": 12},
            "grpo": {
                "prompts": 5,
                "group_size": 4,
                "updates_per_step": 2,
                "micro_batch_size": 4,
                "learning_rate": 1e-3,
                "warmup_updates": 10,  # which is over
            },
        },
        [],
    )


# --- the oracle: transformers' own model, some layers replaced --------------------------------------------------------


class Rounded(nn.Linear):
    """A linear layer on rounded operands; the gradient takes rounding for the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_rounded(x), _rounded(self.weight), self.bias)


def _rounded(x: Tensor) -> Tensor:
    return x + (fake_quantize_eager(x.detach()) - x.detach())


def plain_model(folder: str, layers: Sequence[int]) -> Any:
    """As transformers loads it, with every linear layer of these blocks rounded."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and block_of(name) in layers:
            layer = Rounded(module.in_features, module.out_features, bias=module.bias is not None)
            layer.weight, layer.bias = module.weight, module.bias
            model.set_submodule(name, layer)
    return model


@torch.no_grad()
def plain_kl(folder: str, layers: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[float]:
    p, q = plain_model(folder, []), plain_model(folder, layers)
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        log_p, log_q = (torch.log_softmax(model(ids).logits.double()[0], -1) for model in (p, q))
        found.append(F.kl_div(log_q, log_p, log_target=True, reduction="sum").item() / len(prompt))
    return found


# --- KL at the logits -------------------------------------------------------------------------------------------------


def test_kl_of_a_layer_alone_and_of_all_but_it_are_those_of_transformers_own_model(folder: str, policy: Policy) -> None:
    own = {name: policy.linears[name].arithmetic for name in policy.quantized}
    layers = range(DEPTH)
    alone = [lifted(own, [other for other in layers if other != layer]) for layer in layers]
    found = divergences(policy, PROMPTS, [*alone, *(lifted(own, [layer]) for layer in layers), own])
    others = [[other for other in layers if other != layer] for layer in layers]
    wanted = [plain_kl(folder, quantized, PROMPTS) for quantized in [*([layer] for layer in layers), *others, layers]]
    assert found.min() > 1e-3, "errors of these sizes are what is compared"
    assert found.numpy() == pytest.approx(np.array(wanted), rel=1e-3)


def test_a_forward_that_begins_within_the_model_gives_equal_bits(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it begins there: the blocks before are not computed."""
    own = {name: policy.linears[name].arithmetic for name in policy.quantized}
    variants = [lifted(own, [layer]) for layer in range(DEPTH)]
    runs = {"count": 0}

    def count(*_: Any) -> None:
        runs["count"] += 1

    hook = policy.linears["model.layers.0.mlp.down_proj"].register_forward_hook(count)
    assert _resumes(policy)
    probe, runs["count"] = runs["count"], 0
    resumed = divergences(policy, PROMPTS, variants)
    few = runs["count"]
    monkeypatch.setattr("trainable.divergence._resumes", lambda policy: False)
    runs["count"] = 0
    whole = divergences(policy, PROMPTS, variants)
    hook.remove()
    assert torch.equal(resumed, whole)
    groups = len(rows_of(policy, PROMPTS))
    # The first variant leaves every base at once and is one: of each of two bases there is a reference, and a forward
    # to remember; without memory there are the variants instead.
    assert (few - probe, runs["count"]) == (groups * 4, groups * 5)


def test_a_model_that_hands_on_more_than_blocks_give_is_run_from_the_start(folder: str) -> None:
    """A block whose second part reads what an earlier block left behind, beside the residual stream."""
    policy = load_policy(ModelConfig(name=folder), QuantConfig(), seed=0)
    left: list[Tensor] = []
    blocks = policy.network.model.layers
    blocks[0].mlp.register_forward_hook(lambda module, args, output: left.append(output))
    blocks[2].register_forward_pre_hook(lambda module, args: (args[0] + left.pop() * 0.5, *args[1:]))
    assert not _resumes(policy)


def test_rows_are_never_padded_and_logits_never_larger_than_their_room(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[2] * n for n in (5, 3, 5, 5, 7, 3)]
    assert [numbers for numbers, _ in rows_of(policy, prompts)] == [(1, 5), (0, 2, 3), (4,)]
    width = policy.network.get_input_embeddings().num_embeddings
    monkeypatch.setattr("trainable.divergence._LOGITS", 10 * width)
    parts = rows_of(policy, prompts)
    assert [numbers for numbers, _ in parts] == [(1, 5), (0, 2), (3,), (4,)]
    assert all(ids.numel() <= 10 for _, ids in parts)


def test_a_token_that_is_impossible_under_p_adds_nothing_and_one_that_is_not_finite_shows() -> None:
    p = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, -math.inf], [0.0, 1.0, 2.0]])
    q = torch.tensor([[7.0, 7.0, -math.inf], [0.0, 0.0, 0.0], [1.0, math.nan, 0.0]])
    same, wider, broken = divergence(p, q).tolist()
    assert (same, wider) == (0, pytest.approx(math.log(1.5), rel=1e-12))
    assert math.isnan(broken)


# --- the Fisher score -------------------------------------------------------------------------------------------------


def see(seen: dict[str, tuple[Tensor, Tensor]], name: str, module: Any, args: tuple[Tensor], y: Tensor) -> None:
    seen[name] = (args[0].detach(), y)


def test_the_fisher_score_is_that_of_explicit_gradients_on_transformers_own_model(folder: str, policy: Policy) -> None:
    """Each layer's outputs are made leaves by hand, one prompt at a time."""
    found = fisher(policy, PROMPTS, seed=5)
    model, source = plain_model(folder, []), generator("fisher", 5)
    wanted = torch.zeros(DEPTH, len(PROMPTS), dtype=torch.float64)
    for numbers, ids in rows_of(policy, PROMPTS):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and block_of(n) is not None}
        hooks = [layer.register_forward_hook(partial(see, seen, name)) for name, layer in layers.items()]
        log_p = torch.log_softmax(model(ids).logits, -1).flatten(0, 1)
        said = own_tokens(log_p, source)
        gradients = torch.autograd.grad(log_p[range(len(said)), said].sum(), [y for _, y in seen.values()])
        for (name, (x, y)), g in zip(seen.items(), gradients, strict=True):
            layer = model.get_submodule(name)
            weight = layer.weight.detach()
            d = (F.linear(fake_quantize_eager(x), fake_quantize_eager(weight), layer.bias) - y).detach()
            for row, number in enumerate(numbers):
                block = block_of(name)
                assert block is not None
                wanted[block, number] += (g[row] * d[row]).double().square().sum() / 2 / ids.shape[1]
        for hook in hooks:
            hook.remove()
    assert wanted.min() > 0
    assert found.numpy() == pytest.approx(wanted.numpy(), rel=2e-3)


def test_the_fisher_score_foresees_the_kl_of_small_errors(folder: str) -> None:
    """In 8 bits, where errors are small: within a factor of 3 of the KL of each layer alone, on average over draws."""
    eight = QuantConfig(weights="mxfp8", activations="mxfp8")
    policy = load_policy(ModelConfig(name=folder), eight, seed=0)
    prompts = ragged_prompts(12, longest=12)
    own = {name: policy.linears[name].arithmetic for name in policy.quantized}
    alone = [{n: how if block_of(n) == layer else UNQUANTIZED for n, how in own.items()} for layer in range(DEPTH)]
    kl = divergences(policy, prompts, alone).mean(1)
    foreseen = torch.stack([fisher(policy, prompts, seed).mean(1) for seed in range(8)]).mean(0)
    assert ((foreseen / kl) > 1 / 3).all()
    assert ((foreseen / kl) < 3).all()


def test_a_layer_at_16_bits_has_no_fisher_score_and_no_kl(folder: str) -> None:
    policy = load_policy(ModelConfig(name=folder), QuantConfig(skip_layers=(1,)), seed=0)
    own = {name: policy.linears[name].arithmetic for name in policy.quantized}
    assert (fisher(policy, PROMPTS, seed=0) == 0).all(1).tolist() == [False, True, False]
    kept = lifted(own, [0, 2])
    assert torch.equal(divergences(policy, PROMPTS, [kept]), torch.zeros(1, len(PROMPTS), dtype=torch.float64))


# --- gradients --------------------------------------------------------------------------------------------------------


def plain_gradients(model: Any, batch: Batch) -> dict[int, Tensor]:
    """Of each block, by transformers' own forward of each completion in a row of its own: one backward pass."""
    loss = torch.zeros(())
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row] > 0]
        tokens = int(batch.mask[row].sum())
        completion = batch.completion_ids[row, :tokens]
        scores = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logps = torch.log_softmax(scores, -1)[range(tokens), completion]
        loss = loss - batch.advantages[row] * logps.sum() / batch.mask.sum()
    loss.backward()
    gradients: dict[int, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        block = block_of(name)
        if block is not None:
            gradients.setdefault(block, []).append(parameter.grad.flatten().double())
    return {block: torch.cat(some) for block, some in gradients.items()}


def test_cosine_and_norm_ratio_are_those_of_two_plain_backward_passes(
    folder: str, policy: Policy, batch: Batch, config: TrialConfig
) -> None:
    found = gradient_agreement(policy, batch, config, seed=0)
    ours, theirs = (plain_gradients(plain_model(folder, layers), batch) for layers in (range(DEPTH), []))
    for layer, agreement in enumerate(found):
        a, b = ours[layer], theirs[layer]
        assert agreement.cosine.value == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=2e-3)
        assert agreement.norm_ratio.value == pytest.approx((a.norm() / b.norm()).item(), rel=2e-3)
        assert agreement.cosine.low <= agreement.cosine.value + 0.05
        assert agreement.norm_ratio.low < agreement.norm_ratio.value < agreement.norm_ratio.high


def test_equal_arithmetic_has_equal_gradients(folder: str, batch: Batch, config: TrialConfig) -> None:
    plain = QuantConfig(weights="none", activations="none")
    for agreement in gradient_agreement(load_policy(ModelConfig(name=folder), plain, seed=0), batch, config, seed=0):
        for estimate in (agreement.cosine, agreement.norm_ratio):
            assert [estimate.value, estimate.low, estimate.high] == pytest.approx([1, 1, 1], abs=1e-9)


def test_without_anything_to_learn_a_cosine_is_nan(policy: Policy, batch: Batch, config: TrialConfig) -> None:
    flat = replace(batch, advantages=torch.zeros_like(batch.advantages))
    for agreement in gradient_agreement(policy, flat, config, seed=0):
        assert math.isnan(agreement.cosine.value)
        assert math.isnan(agreement.norm_ratio.high)


def test_the_interval_over_prompts_is_that_of_resampled_gradients() -> None:
    """Of vectors that are made up: two arithmetics with a cosine of 0.8 in expectation."""
    source = np.random.default_rng(0)
    common, a, b = (source.standard_normal((16, 400)) for _ in range(3))
    ours, theirs = common + 0.5 * a + 1.0, common + 0.5 * b + 1.0
    whole = trainable.update_side._statistics(
        *(np.array(x.sum(0) @ y.sum(0)) for x, y in ((ours, theirs), (ours, ours), (theirs, theirs)))
    )
    found = trainable.update_side._agreement(whole, ours, theirs, seed=3)
    resampled = []
    for _ in range(1000):
        chosen = source.integers(0, 16, 16)
        x, y = ours[chosen].sum(0), theirs[chosen].sum(0)
        resampled.append((x @ y / np.linalg.norm(x) / np.linalg.norm(y), np.linalg.norm(x) / np.linalg.norm(y)))
    for number, estimate in enumerate((found.cosine, found.norm_ratio)):
        low, high = np.quantile([one[number] for one in resampled], (0.025, 0.975))
        assert (estimate.low, estimate.high) == (pytest.approx(low, abs=4e-3), pytest.approx(high, abs=4e-3))


# --- survival ---------------------------------------------------------------------------------------------------------


def test_survival_is_the_share_of_packed_codes_that_a_step_made_by_hand_changes(
    policy: Policy, batch: Batch, config: TrialConfig
) -> None:
    found = survival(policy, batch, config, seed=0)
    by_hand = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(by_hand.model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    grpo, shuffle = config.grpo.model_copy(update={"warmup_updates": 0}), generator("shuffle", 0, 0)
    update(by_hand, optimizer, batch, grpo, config.rollout, first_update=0, shuffle=shuffle)
    for layer in range(DEPTH):
        names = [name for name in policy.linears if block_of(name) == layer]
        changed = weights = 0
        for name in names:
            before, after = (nibbles(one.linears[name].weight.detach()) for one in (policy, by_hand))
            changed += int((before != after).sum())
            weights += before.numel()
        assert found[layer] == changed / weights
        assert 0.005 < found[layer] < 0.9


def nibbles(weight: Tensor) -> Tensor:
    """Codes as a packed file has them, the two zeros made one."""
    packed, _ = pack(weight, "floor")
    codes = torch.stack([packed & 15, packed >> 4], -1)
    assert MAGNITUDES[0] == 0.0
    return torch.where(codes == 8, 0, codes)


def test_a_layer_at_16_bits_counts_weights_that_move_and_adapters_count_nothing(
    folder: str, batch: Batch, config: TrialConfig
) -> None:
    skipping = load_policy(ModelConfig(name=folder), QuantConfig(skip_layers=(1,)), seed=0)
    found = survival(skipping, batch, config, seed=0)
    assert found[1] > 0.99
    assert max(found[0], found[2]) < 0.9
    adapted = load_policy(ModelConfig(name=folder, adapter="lora", lora_rank=2), QuantConfig(), seed=0)
    assert all(math.isnan(share) for share in survival(adapted, batch, config, seed=0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_restored_bit_for_bit_also_after_an_error(
    folder: str, batch: Batch, config: TrialConfig, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, gradients, who learns, who computes how, and hooks; the step itself did move weights."""
    policy = load_policy(ModelConfig(name=folder, dtype=dtype), QuantConfig(skip_layers=(1,)), seed=0)
    before = state(policy)
    moved: list[bool] = []
    real = trainable.update_side.update

    def update_and_fail(policy: Policy, *args: Any, fail: bool, **options: Any) -> None:
        real(policy, *args, **options)
        moved.append(state(policy)["values"] != before["values"])
        if fail:
            raise MemoryError

    def everything() -> None:
        fisher(policy, PROMPTS, seed=0)
        gradient_agreement(policy, batch, config, seed=0)
        divergences(policy, PROMPTS, [*free_changes(policy).values()])
        survival(policy, batch, config, seed=0)

    for fail in (False, True):
        monkeypatch.setattr(trainable.update_side, "update", partial(update_and_fail, fail=fail))
        if fail:
            with pytest.raises(MemoryError):
                everything()
        else:
            everything()
        assert state(policy) == before
    assert moved == [True, True]


def test_an_error_in_any_part_leaves_the_model_as_it_was(
    policy: Policy, batch: Batch, config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(policy)
    own = {name: policy.linears[name].arithmetic for name in policy.quantized}

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError

    parts: list[tuple[str, Callable[[], Any]]] = [
        ("trainable.divergence.divergence", lambda: divergences(policy, PROMPTS, [lifted(own, [1])])),
        ("trainable.fisher.own_tokens", lambda: fisher(policy, PROMPTS, seed=0)),
        ("trainable.update_side.grpo_loss", lambda: gradient_agreement(policy, batch, config, seed=0)),
    ]
    for name, call in parts:
        with monkeypatch.context() as patch:
            patch.setattr(name, broken)
            with pytest.raises(MemoryError):
                call()
        assert state(policy) == before, name


def state(policy: Policy) -> dict[str, Any]:
    """All of a policy that could be changed, in comparable form."""
    parameters = dict(policy.model.named_parameters())
    return {
        "values": {n: p.detach().contiguous().view(torch.uint8).numpy().tobytes() for n, p in parameters.items()},
        "learning": {name: (p.requires_grad, p.grad) for name, p in parameters.items()},
        "layers": {n: (m.arithmetic, m.deployed_weight, m.quantize_input) for n, m in policy.linears.items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in policy.model.modules()],
        "parameter hooks": [len(p._post_accumulate_grad_hooks or ()) for p in parameters.values()],
        "forwards": ["forward" in module.__dict__ for module in policy.model.modules()],
    }


# --- what it would buy ------------------------------------------------------------------------------------------------


def test_bits_are_counted_per_multiplication(policy: Policy) -> None:
    own = {name: policy.linears[name].arithmetic for name in policy.quantized}
    assert _bits(policy, own) == (4.25, 4.25)
    assert _bits(policy, lifted(own, range(DEPTH))) == (16, 16)
    assert _bits(policy, lifted(own, [1])) == pytest.approx((4.25 + 11.75 / 3, 4.25 + 11.75 / 3))
    halves = {name: replace(how, activations="none") for name, how in own.items()}
    assert _bits(policy, halves) == (4.25, 16)
    down = {name: UNQUANTIZED if name.endswith("down_proj") else how for name, how in own.items()}
    sizes = {name: linear.weight.numel() for name, linear in policy.linears.items() if block_of(name) is not None}
    share = sum(size for name, size in sizes.items() if name.endswith("down_proj")) / sum(sizes.values())
    assert _bits(policy, down)[0] == pytest.approx(4.25 + 11.75 * share)
    other = {"mxfp8": 8.25, "nvfp4": 4.5}
    for form, bits in other.items():
        assert _bits(policy, {name: replace(how, weights=form) for name, how in own.items()})[0] == bits


def test_the_table_has_every_change_and_is_sorted_by_kl_saved_per_bit(folder: str, policy: Policy) -> None:
    own = {name: policy.linears[name].arithmetic for name in policy.quantized}
    free = free_changes(policy)
    assert list(free) == ["scale rule even", "scale rule rceil", "scale rule ceil", "Hadamard-32"]
    kl = divergences(policy, PROMPTS, [own, *free.values(), *(lifted(own, [layer]) for layer in range(DEPTH))])
    without = kl[1 + len(free) :]
    table = purchases(
        policy,
        PROMPTS,
        now=kl[0],
        without_layer=without,
        free=dict(zip(free, kl[1:], strict=False)),
        mean=lambda values: Estimate(value=float(np.mean(values)), low=math.nan, high=math.nan),
        progress=lambda done, total, what: None,
    )
    ratios = [kl_per_bit(one) for one in table]
    assert ratios == sorted(ratios, reverse=True)
    worst = sorted(range(DEPTH), key=lambda layer: without[layer].mean())[:2]
    found = {one.what: one for one in table}
    assert set(found) == {
        *free,
        *(f"layer {layer} at 16 bits" for layer in range(DEPTH)),
        "the worst 2 layers at 16 bits",
        "all layers at 16 bits",
    }
    now = np.mean(plain_kl(folder, range(DEPTH), PROMPTS))
    rest = [layer for layer in range(DEPTH) if layer not in worst]
    both = found["the worst 2 layers at 16 bits"]
    assert set(both.layers) == set(worst)
    assert both.kl_saved.value == pytest.approx(now - np.mean(plain_kl(folder, rest, PROMPTS)), rel=2e-3)
    assert found["all layers at 16 bits"].kl_saved.value == pytest.approx(now, rel=1e-3)
    for what in free:
        assert found[what].weight_bits == found[what].activation_bits == 0
        assert math.isinf(kl_per_bit(found[what]))


def test_what_costs_nothing_and_does_harm_comes_last() -> None:
    def bought(bits: float, saved: float) -> Purchase:
        estimate = Estimate(value=saved, low=saved, high=saved)
        return Purchase(what="", layers=(), weight_bits=bits, activation_bits=bits, kl_saved=estimate)

    order = [bought(0, 0.1), bought(0.5, 0.2), bought(1, 0.2), bought(1, -0.2), bought(0, -0.1)]
    assert [kl_per_bit(one) for one in order] == [math.inf, 0.2, 0.1, -0.1, -math.inf]

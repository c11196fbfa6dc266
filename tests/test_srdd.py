"""The static part of a scan: known distributions, an independent computation on transformers' own model, and what a
reader makes of it."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from spaces.config import ConfigError, ModelConfig, QuantConfig
from tests.conftest import ModelFolder, byte_tokenizer, ragged_prompts
from tests.zoo import ZOO, network_of
from trainable.policy.loading import in_place, load_policy, wrapped
from trainable.policy.policy import Policy, block_of
from trainable.policy.sites import find_sites
from trainable.quantization import Arithmetic, fake_quantize_eager
from trainable.scan import (
    SCORES,
    SITES,
    Scan,
    as_tree,
    check_score,
    from_tree,
    load_scan,
    multipliers,
    score,
    statuses,
    worst,
    zones,
)
from trainable.seeds import generator
from trainable.srdd import estimate, numbers, row_sums, scan_policy

DEPTH = 3
PROMPTS = ragged_prompts(4, longest=9)


@pytest.fixture(scope="module")
def folder(model_folder: ModelFolder) -> str:
    return model_folder(layers=DEPTH)


@pytest.fixture(scope="module")
def policy(folder: str) -> Policy:
    return load_policy(ModelConfig(name=folder), QuantConfig(), seed=0)


@pytest.fixture(scope="module")
def scan(folder: str, policy: Policy) -> Scan:
    return scan_policy(policy, PROMPTS, model=ModelConfig(name=folder), quant=QuantConfig())


# --- the numbers ------------------------------------------------------------------------------------------------------


def generalised_gaussian(shape: float, count: int) -> Tensor:
    """Density exp(-|x|^shape), by powers of gamma variates."""
    source = torch.distributions.Gamma(1 / shape, 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return source.sample((count,)).pow(1 / shape) * torch.randint(0, 2, (count,)).mul(2).sub(1)


@pytest.mark.parametrize(
    ("shape", "width", "relative_error", "deadzone", "sqnr_db"),
    [(2.0, 2**0.5, 0.210, 0.088, 18.78), (0.7, 1.0, 0.384, 0.248, 17.38)],
)
def test_known_distributions_have_their_known_errors(
    shape: float, width: float, relative_error: float, deadzone: float, sqnr_db: float
) -> None:
    """Of the normal distribution, and of one with the plan's heavy tails."""
    x = width * generalised_gaussian(shape, 1 << 20).view(-1, 1024)
    found = numbers(row_sums(x, Arithmetic().input))
    assert found["relative_error"] == pytest.approx(relative_error, abs=0.003)
    assert found["deadzone"] == pytest.approx(deadzone, abs=0.003)
    assert found["sqnr_db"] == pytest.approx(sqnr_db, abs=0.15)


def gaussian_with_outlier_channels() -> Tensor:
    """One channel in a hundred is 8 times as large."""
    x = torch.randn(4096, 1024, generator=generator("outliers", 0))
    x[:, 50::100] *= 8
    return x


def test_a_rotation_all_but_ends_the_deadzone_and_makes_the_relative_error_useless() -> None:
    x = gaussian_with_outlier_channels()
    plain, turned = (numbers(row_sums(x, Arithmetic(hadamard=hadamard).input)) for hadamard in (False, True))
    assert plain["sqnr_db"] == pytest.approx(16.7, abs=0.2)
    assert turned["sqnr_db"] == pytest.approx(19.0, abs=0.2)
    assert plain["deadzone"] == pytest.approx(0.129, abs=0.005)
    assert 0 < turned["deadzone"] < 0.02
    assert plain["relative_error"] < 0.3
    assert turned["relative_error"] > 1


def test_relative_error_is_the_deadzone_and_the_error_of_what_is_not_lost() -> None:
    x = gaussian_with_outlier_channels()[:64]
    found, q = numbers(row_sums(x, Arithmetic().input)), fake_quantize_eager(x)
    kept = q != 0
    others = ((q - x).abs() / x.abs())[kept].double().mean().item()
    expected = found["deadzone"] + (1 - found["deadzone"]) * others
    assert found["deadzone"] == pytest.approx(1 - kept.double().mean().item())
    assert found["relative_error"] == pytest.approx(expected, rel=1e-6)


def test_the_interval_is_that_of_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(5).gamma(2.0, 1.0, 24)
    found = estimate(values.tolist(), seed=0)
    expected = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert found.value == pytest.approx(values.mean())
    # The ends of 1,000 resamples scatter by 5 % of the interval's width.
    near = 0.1 * (expected.high - expected.low)
    assert found.low == pytest.approx(expected.low, abs=near)
    assert found.high == pytest.approx(expected.high, abs=near)


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("hadamard", [False, True])
def test_the_three_parts_add_up_to_the_errors_energy(fmt: str, hadamard: bool) -> None:
    x = torch.randn(64, 128, generator=generator("split", fmt)) ** 3
    found = numbers(row_sums(x, Arithmetic(weights=fmt, activations=fmt, hadamard=hadamard).input))
    assert found["scale_bias"] + found["dead"] + found["grid"] == pytest.approx(1, abs=1e-6)
    assert found["nmse"] == pytest.approx(10 ** (-found["sqnr_db"] / 10))


def test_saturation_counts_blocks_beyond_their_grid() -> None:
    """6.5 is beyond 6 under a scale of 1; 5 is not, and 4 is what 8 becomes under a scale of 2."""
    x = torch.ones(1, 128)
    x[0, 0], x[0, 32], x[0, 64] = 6.5, 5.0, 8.0
    assert numbers(row_sums(x, Arithmetic().input))["saturation"] == 1 / 4


# --- a model ----------------------------------------------------------------------------------------------------------


def plain_errors(x: Tensor) -> tuple[float, float, float]:
    """Relative error, deadzone and SQNR as the plan's scanner defines them."""
    q = fake_quantize_eager(x)
    relative = ((q - x).abs() / (x.abs() + 1e-10)).double().mean().item()
    dead = ((x.abs() > 1e-10) & (q.abs() < 1e-10)).double().mean().item()
    return relative, dead, 10 * math.log10(x.double().square().mean() / (q - x).double().square().mean())


@torch.no_grad()
def test_a_scan_is_what_transformers_own_model_shows(folder: str, scan: Scan) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen: dict[tuple[int, str], list[tuple[float, float, float]]] = {}

    def watch(module: nn.Module, layer: int, site: str) -> None:
        def hook(module: nn.Module, args: Sequence[Tensor], output: Any) -> None:
            x = (output[0] if isinstance(output, tuple) else output) if site == "output" else args[0]
            seen.setdefault((layer, site), []).append(plain_errors(x))

        module.register_forward_hook(hook)

    for layer, block in enumerate(model.model.layers):
        projections = {"qkv": block.self_attn.q_proj, "o": block.self_attn.o_proj, "gate_up": block.mlp.gate_proj}
        for site, module in {"output": block, **projections, "down": block.mlp.down_proj}.items():
            watch(module, layer, site)
    for prompt in PROMPTS:
        model(torch.tensor([prompt]), use_cache=False)
    for (layer, site), prompts in seen.items():
        errors = scan.layers[layer].sites[site]
        found = errors.relative_error.value, errors.deadzone.value, errors.sqnr_db.value
        assert found == pytest.approx([sum(column) / len(prompts) for column in zip(*prompts, strict=True)], rel=1e-3)
        assert errors.deadzone.low <= errors.deadzone.value <= errors.deadzone.high
    assert set(seen) == {(layer, site) for layer in range(DEPTH) for site in SITES if site != "weights"}


def test_the_weights_site_is_all_weights_of_a_layer(policy: Policy, scan: Scan) -> None:
    for layer in scan.layers:
        linears = [linear for name, linear in policy.linears.items() if block_of(name) == layer.layer]
        x = torch.cat([linear.weight.detach().flatten() for linear in linears])
        errors = layer.sites["weights"]
        found = errors.relative_error.value, errors.deadzone.value, errors.sqnr_db.value
        assert found == pytest.approx(plain_errors(x), rel=1e-4)
        assert errors.deadzone.low == errors.deadzone.high == errors.deadzone.value


def test_a_layer_at_16_bits_is_missing_with_its_reason(folder: str) -> None:
    quant = QuantConfig(skip_layers=(1,))
    skipping = load_policy(ModelConfig(name=folder), quant, seed=0)
    scan = scan_policy(skipping, PROMPTS[:1], model=ModelConfig(name=folder), quant=quant)
    assert set(scan.layers[1].missing) == {"qkv", "o", "gate_up", "down", "weights"}
    assert "quant.skip_layers" in scan.layers[1].missing["down"]
    assert not scan.layers[0].missing
    with pytest.raises(ConfigError, match=r"srdd:deadzone@down: layer 1 .*has no down errors"):
        score(scan, "deadzone@down")


def test_nothing_to_scan_is_a_mistake(folder: str) -> None:
    plain = QuantConfig(weights="none", activations="none")
    policy = load_policy(ModelConfig(name=folder), plain, seed=0)
    with pytest.raises(ConfigError, match="nothing is quantised"):
        scan_policy(policy, PROMPTS, model=ModelConfig(name=folder), quant=plain)


def test_sites_are_told_by_data_flow_and_not_by_names(policy: Policy) -> None:
    first = find_sites(policy)[0]
    tails = {site: [name.rpartition(".")[2] for group in getattr(first, site) for name in group] for site in SITES[1:5]}
    assert tails == {
        "qkv": ["q_proj", "k_proj", "v_proj"],
        "o": ["o_proj"],
        "gate_up": ["gate_proj", "up_proj"],
        "down": ["down_proj"],
    }
    network = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=15))
    found = find_sites(in_place(network.eval(), byte_tokenizer(), QuantConfig(), (1,)))[0]
    assert [name.removeprefix("transformer.h.0.") for name in found.names()] == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]


# --- what a reader makes of it ----------------------------------------------------------------------------------------


def test_a_scan_is_read_as_it_was_written_and_another_version_refused(scan: Scan, tmp_path: Path) -> None:
    tree = json.loads(json.dumps(as_tree(scan), allow_nan=False))
    assert as_tree(from_tree(tree, "here")) == as_tree(scan)
    file = tmp_path / "scan.json"
    for broken, message in (
        ({**tree, "version": 0}, "a scan of version 0"),
        ([], "no scan"),
        ({key: value for key, value in tree.items() if key != "layers"}, "no whole scan"),
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match=message):
            load_scan(file)


def test_scores_rank_layers_and_multipliers_have_a_mean_of_1(scan: Scan) -> None:
    assert score(scan, "deadzone") == tuple(layer.sites["output"].deadzone.value for layer in scan.layers)
    down = score(scan, "sqnr@down")
    assert down == tuple(10 ** (-layer.sites["down"].sqnr_token_db.value / 20) for layer in scan.layers)
    assert worst(scan, 2, "sqnr@down") == tuple(sorted(range(DEPTH), key=lambda i: -down[i])[:2])
    factors = multipliers(scan, "relative_error")
    errors = score(scan, "relative_error")
    assert sum(factors) / DEPTH == pytest.approx(1)
    assert factors[0] / factors[1] == pytest.approx(errors[0] / errors[1])
    for kind in SCORES:
        check_score(kind)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda scan: score(scan, "zeal"), "unknown score zeal; choose one of relative_error"),
        (lambda scan: score(scan, "deadzone@head"), "no such site; give one of output"),
        (lambda scan: score(scan, "kl@down"), "no such site"),
        (lambda scan: score(scan, "kl"), "no functional part"),
        (lambda scan: worst(scan, 4), "has 3 layers; give 1 to 3"),
    ],
)
def test_a_score_that_there_is_not_is_a_mistake_with_a_remedy(scan: Scan, call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(scan)


def test_the_plans_thresholds(scan: Scan) -> None:
    errors = scan.layers[0].sites["output"]
    fine = replace(errors.deadzone, value=0.05)
    assert statuses(replace(errors, deadzone=fine))["deadzone"] == "ok"
    assert statuses(replace(errors, deadzone=replace(fine, value=0.051)))["deadzone"] == "high"
    assert statuses(replace(errors, sqnr_db=replace(fine, value=19.9)))["sqnr_db"] == "low"
    assert statuses(replace(errors, sqnr_db=replace(fine, value=math.nan)))["sqnr_db"] == "unknown"


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ((1, 1, 1, 5, 5, 5), ((0, 2), (3, 5))),
        ((2,) * 8, ((0, 7),)),
        ((0.20, 0.21, 0.20, 0.30, 0.31, 0.30, 0.31, 0.10, 0.11), ((0, 2), (3, 6), (7, 8))),
        ((3.0,), ((0, 0),)),
    ],
)
def test_zones_lie_between_change_points(profile: Sequence[float], expected: tuple[tuple[int, int], ...]) -> None:
    assert zones(profile) == expected


def test_scanning_changes_nothing(folder: str, policy: Policy, scan: Scan) -> None:
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    how = [linear.arithmetic for linear in policy.linears.values()]
    again = scan_policy(policy, PROMPTS, model=ModelConfig(name=folder), quant=QuantConfig())
    assert again.layers == scan.layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    assert [linear.arithmetic for linear in policy.linears.values()] == how
    assert not any(module._forward_hooks for module in policy.model.modules())


def test_a_value_that_is_not_finite_is_not_hidden() -> None:
    x = torch.ones(4, 32)
    x[2, 5] = math.nan
    found = numbers(row_sums(x, Arithmetic().input))
    assert math.isnan(found["relative_error"])
    assert math.isnan(found["sqnr_token_db"])


@pytest.mark.parametrize(
    ("kind", "sites"),
    [
        ("phi3", {"qkv": "qkv_proj", "o": "o_proj", "gate_up": "gate_up_proj", "down": "down_proj"}),
        ("mixtral", {"qkv": "q_proj k_proj v_proj", "o": "o_proj", "gate_up": "gate_up_proj", "down": "down_proj"}),
    ],
)
def test_fused_projections_and_experts_stand_where_they_belong(kind: str, sites: dict[str, str]) -> None:
    policy = wrapped(network_of(ZOO[kind]), byte_tokenizer(), ModelConfig(name=kind), QuantConfig(), 0)
    for block in find_sites(policy):
        for site, endings in sites.items():
            names = [name for group in getattr(block, site) for name in group]
            plain = {".".join(part for part in name.split(".") if not part.isdigit()) for name in names}
            assert len(plain) == len(endings.split())
            assert all(name.endswith(tuple(endings.split())) for name in plain)
        assert block.others == ()


GRID = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
TEXTS = (
    "The capital of France is",
    "2 + 2 equals",
    "Once upon a time there was",
    "def add(a, b):",
    "Water boils at a temperature of",
    "The largest planet is Jupiter",
    "She sells sea shells by the",
    "If x = 3 then x squared is",
)


@pytest.mark.slow
def test_smollm2s_outputs_are_those_of_a_plain_quantiser_and_in_the_plans_ranges(smollm2: str) -> None:
    """transformers' own forward, and OCP's conversion by a table; to 0.1 points and 0.1 dB."""
    policy = load_policy(ModelConfig(name=smollm2), QuantConfig(), seed=0)
    tokenizer: Any = policy.tokenizer
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    scan = scan_policy(policy, rows, model=ModelConfig(name=smollm2), quant=QuantConfig())
    seen: list[list[tuple[float, ...]]] = [[] for _ in scan.layers]

    def hook(module: nn.Module, args: Any, output: Tensor, layer: int) -> None:
        x = output.numpy().astype(np.float64)
        blocks = x.reshape(-1, 32)
        scale = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2)
        nearest = np.abs(np.abs(blocks / scale)[..., None] - GRID).argmin(-1)
        q = (np.copysign(np.array(GRID)[nearest], blocks) * scale).reshape(x.shape)
        error, lost = np.abs(q - x) / (np.abs(x) + 1e-10), (np.abs(x) > 1e-10) & (np.abs(q) < 1e-10)
        seen[layer].append((error.mean(), lost.mean(), 10 * np.log10((x**2).sum() / ((q - x) ** 2).sum())))

    network = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for number, block in enumerate(network.model.layers):
        block.register_forward_hook(partial(hook, layer=number))
    with torch.no_grad():
        for row in rows:
            network(input_ids=torch.tensor([row]), use_cache=False)
    for layer in scan.layers:
        relative, dead, decibels = np.mean(seen[layer.layer], 0)
        output = layer.sites["output"]
        assert output.relative_error.value == pytest.approx(relative, abs=1e-3)
        assert output.deadzone.value == pytest.approx(dead, abs=1e-3)
        assert output.sqnr_db.value == pytest.approx(decibels, abs=0.1)
        assert 0.26 < relative < 0.40
        assert 0.14 < dead < 0.26

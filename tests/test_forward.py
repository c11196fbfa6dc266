"""Our forward pass, decoder and fused kernels against transformers and plain torch."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

import trainable.forward.logps
import trainable.forward.transformer
from spaces.config import ModelConfig, QuantConfig
from tests.conftest import ModelFolder, ragged_prompts, sampled_groups
from trainable.forward import decoder as decoding
from trainable.forward.decoder import _Fused, _Ours, _Transformers, decoder
from trainable.forward.logps import Batch, completion_logps, make_batch
from trainable.forward.transformer import Forward, forward_of, left_padded, positions
from trainable.kernels import cpu
from trainable.layers.mlp import GatedMLP
from trainable.layers.norm import RMSNorm
from trainable.parity import own_logps
from trainable.policy.embedded import character_tokenizer
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, deployed
from trainable.quantization import Arithmetic, QuantLinear, fake_quantize
from trainable.seeds import generator

ChangedFolder = Callable[..., str]
W16A16 = QuantConfig(weights="none", activations="none")


@pytest.fixture(params=["qwen2", "llama", "mistral"])
def folder(request: pytest.FixtureRequest, model_folder: ModelFolder, tmp_path: Path) -> str:
    if request.param != "mistral":
        return model_folder(request.param)
    config = MistralConfig(
        vocab_size=15,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        initializer_range=0.3,
        sliding_window=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MistralForCausalLM(config).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def changed_folder(model_folder: ModelFolder, tmp_path: Path) -> ChangedFolder:
    """changed_folder(hidden_act="gelu"): a Qwen2 model whose config says so."""

    def changed(**settings: Any) -> str:
        place = Path(shutil.copytree(model_folder(), tmp_path / "changed"))
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | settings))
        return str(place)

    return changed


def padded_rows(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = left_padded(ragged_prompts(6), 0, policy.device)
    return ids, mask


def causal(mask: torch.Tensor) -> torch.Tensor:
    length = mask.shape[1]
    visible = mask.bool()[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
    return visible | torch.eye(length, dtype=torch.bool)


def both(folder: str) -> tuple[Policy, Any, torch.Tensor, torch.Tensor]:
    """The policy and the model as transformers loads it, with norms and linear layers of its own; and the logits of
    each."""
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    policy = load_policy(ModelConfig(name=folder), W16A16, seed=0)
    ids, mask = padded_rows(policy)
    forward = forward_of(policy)
    assert forward is not None
    ours = forward.logits(forward.hidden(ids, forward.angles(positions(mask)), forward.masked(causal(mask))))[mask > 0]
    return (
        policy,
        theirs,
        ours,
        theirs(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits[mask > 0],
    )


def test_logits_and_gradients_are_those_of_transformers(folder: str) -> None:
    policy, theirs, ours, expected = both(folder)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    ours.square().mean().backward()
    expected.square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in policy.trainable().items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_it_does_not_know_goes_through_transformers(model_folder: ModelFolder, attention: Any, dtype: Any) -> None:
    policy = load_policy(ModelConfig(name=model_folder(), attention=attention, dtype=dtype), W16A16, seed=0)
    used = {("sdpa", "float32"): _Fused, ("sdpa", "bfloat16"): _Ours}.get((attention, dtype), _Transformers)
    assert type(decoder(policy, 4)) is used


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_angles_that_depend_on_the_length_go_through_transformers(changed_folder: ChangedFolder, rope: str) -> None:
    folder = changed_folder(rope_parameters={"rope_type": rope, "rope_theta": 1e4, "factor": 2.0})
    used = {"default": _Fused, "dynamic": _Transformers}[rope]
    assert type(decoder(load_policy(ModelConfig(name=folder), W16A16, seed=0), 4)) is used


def test_another_activation_is_left_to_transformers(changed_folder: ChangedFolder) -> None:
    _, _, ours, expected = both(changed_folder(hidden_act="gelu"))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def rollout_logits(policy: Policy, kind: Any, tokens: torch.Tensor, keep: bool) -> list[torch.Tensor]:
    """Logits of given completions [B, T], a token at a time; from the middle on only of the odd rows."""
    ids, mask = padded_rows(policy)
    with deployed(policy):
        work = _Transformers(policy) if kind is _Transformers else kind(forward_of(policy), tokens.shape[1])
        seen = [work.prefill(ids, mask, 3)]
        for column in range(tokens.shape[1] - 1):
            if keep and column == 2:
                rows = torch.arange(1, len(tokens), 2)
                work.keep(rows)
                tokens = tokens[rows]
            seen.append(work.step(tokens[:, column]))
    return seen


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", [_Ours, _Fused])
def test_each_decoder_goes_on_as_transformers_does(folder: str, kind: Any, keep: bool) -> None:
    policy = load_policy(ModelConfig(name=folder), W16A16, seed=0)
    tokens = torch.randint(2, 15, (18, 21), generator=generator("tokens"))
    ours, theirs = (rollout_logits(policy, k, tokens, keep) for k in (kind, _Transformers))
    assert [len(x) for x in ours] == [18] * 3 + [9 if keep else 18] * 18
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_adapters_take_part(model_folder: ModelFolder) -> None:
    policy = load_policy(ModelConfig(name=model_folder(), adapter="lora"), QuantConfig(), seed=0)
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05, generator=generator(name))
    tokens = torch.randint(2, 15, (18, 5), generator=generator("tokens"))
    ours, theirs = (rollout_logits(policy, kind, tokens, False) for kind in (_Fused, _Transformers))
    for mine, other in zip(ours, theirs, strict=True):
        assert ((mine - other).abs().amax(-1) > 1e-3).float().mean() < 0.2, "but for flipped roundings"


# --- prompts that are computed once -----------------------------------------------------------------------------------


def sampled_batch(policy: Policy, group_size: int = 6) -> Batch:
    groups = sampled_groups(policy, ragged_prompts(5), group_size=group_size)
    return make_batch(policy, groups, torch.randn(5, group_size, generator=generator("advantages")))


@pytest.mark.parametrize("longest", [512, 60, 30], ids=["all side by side", "some", "none"])
def test_packed_completions_give_the_log_probs_and_gradients_of_rows_of_their_own(
    folder: str, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    policy = load_policy(ModelConfig(name=folder), W16A16, seed=0)
    batch = sampled_batch(policy)
    results = []
    for packed in (batch, replace(batch, group_size=1)):
        monkeypatch.setattr(trainable.forward.logps, "PACKED_TOKENS", longest)
        logps = completion_logps(policy, packed, 0.7)
        inside = batch.mask > 0
        loss = (logps * batch.advantages[:, None])[inside].sum() / inside.sum()
        results.append((logps[inside], torch.autograd.grad(loss, list(policy.trainable().values()))))
    (logps, gradients), (their_logps, theirs) = results
    torch.testing.assert_close(logps, their_logps, rtol=1e-5, atol=1e-5)
    for mine, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_that_shares_no_prompt_has_its_attention_without_a_mask(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, attention: Any
) -> None:
    """Equal to each row alone and unpadded, in transformers' forward too; what stands on padding is never read."""
    policy = load_policy(ModelConfig(name=model_folder(), attention=attention), W16A16, seed=0)
    batch = replace(sampled_batch(policy), group_size=1)
    masks: list[Any] = []
    plain = F.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return plain(*args, attn_mask=attn_mask, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        logps = completion_logps(policy, batch, 1.0)
    assert masks == ([None] * policy.depth if attention == "sdpa" else [])
    expected = own_logps(policy.network, batch)
    torch.testing.assert_close(logps * batch.mask, expected, rtol=1e-5, atol=1e-5)
    other = batch.completion_ids.masked_fill(batch.mask == 0, 7)
    assert torch.equal(completion_logps(policy, replace(batch, completion_ids=other), 1.0), logps)


def test_packed_completions_do_not_see_each_other(folder: str) -> None:
    policy = load_policy(ModelConfig(name=folder), W16A16, seed=0)
    batch = sampled_batch(policy)
    changed = batch.completion_ids.clone()
    changed[::6] = 2 + (changed[::6] + 3) % 13
    before = completion_logps(policy, batch, 1.0)
    after = completion_logps(policy, replace(batch, completion_ids=changed), 1.0)
    others = torch.arange(len(batch)) % 6 != 0
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("longest", [512, 60], ids=["all side by side", "some"])
def test_what_a_packed_token_sees_is_one_rule_as_a_mask_and_by_blocks(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    """FlexAttention, not compiled and without a backward pass, which it does not have on a CPU."""
    policy = load_policy(ModelConfig(name=model_folder()), W16A16, seed=0)
    batch = sampled_batch(policy)
    monkeypatch.setattr(trainable.forward.logps, "PACKED_TOKENS", longest)
    rules: list[tuple[Any, torch.Tensor]] = []
    make = trainable.forward.logps.dense

    def spy(sees: Any, real: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rules.append((sees, real))
        return make(sees, real, dtype)

    monkeypatch.setattr(trainable.forward.logps, "dense", spy)
    with torch.no_grad():
        expected = completion_logps(policy, batch, 1.0)
        ((sees, real),) = rules
        rows, length = real.shape
        visible = create_mask(sees, rows, None, length, length, device="cpu")
        assert torch.equal(visible, make(sees, real, torch.float32) == 0)
        monkeypatch.setattr(trainable.forward.transformer, "_by_blocks", lambda: flex_attention)
        monkeypatch.setattr(Forward, "masked", lambda self, mask: self.ruled(sees, real))
        torch.testing.assert_close(completion_logps(policy, batch, 1.0), expected, rtol=1e-5, atol=1e-5)


# --- kernels ----------------------------------------------------------------------------------------------------------


def cpu_kernels() -> cpu.Kernels:
    kernels = cpu.load()
    assert kernels is not None
    return kernels


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 16), (7, 96), (3, 5, 64), (900, 128)], ids=str)
def test_the_norm_and_its_gradients_are_those_of_transformers(shape: tuple[int, ...], threads: int) -> None:
    theirs = Qwen2RMSNorm(shape[-1], eps=1e-5)
    nn.init.normal_(theirs.weight, mean=1.0, generator=generator("weight"))
    ours = RMSNorm(nn.Parameter(theirs.weight.detach().clone()), 1e-5)
    x = torch.randn(shape, generator=generator("x"))
    grad = torch.randn(shape, generator=generator("grad"))
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for norm, value in zip((ours, theirs), inputs, strict=True):
            (norm(value) * grad).sum().backward()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp8", "nvfp4"])
def test_the_norm_quantises_as_the_layers_behind_it_would(fmt: str) -> None:
    norm = RMSNorm(nn.Parameter(1 + 0.1 * torch.randn(64, generator=generator("weight"))), 1e-6)
    x = torch.randn(10, 64, generator=generator("x"), requires_grad=True)
    plain = norm(x)
    how = Arithmetic(activations=fmt, scale_rule="even")
    norm.readers = (QuantLinear.from_linear(nn.Linear(64, 8), name="reader", arithmetic=how),)
    norm.share()
    assert torch.equal(norm(x), fake_quantize(plain, fmt, "even"))
    with torch.no_grad():
        assert torch.equal(norm(x), fake_quantize(plain, fmt, "even"))
    a, b = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (norm(x), plain))
    assert torch.equal(a, b), "straight through"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_norm_does_not_hide_what_is_not_finite(bad: float) -> None:
    x = torch.ones(3, 32)
    x[1, 5] = bad
    y = RMSNorm(nn.Parameter(torch.ones(32)), 1e-6)(x)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().all()


@pytest.mark.parametrize("fused", [True, False])
def test_the_norm_of_a_sum_is_that_of_the_sum(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """Bit for bit, the gradients too: of the stream, which goes on past the norm, and of its latest term."""
    if not fused:
        monkeypatch.setattr(cpu, "load", lambda: None)
    norm = RMSNorm(nn.Parameter(1 + 0.1 * torch.randn(96, generator=generator("weight"))), 1e-6)
    norm.readers = (QuantLinear.from_linear(nn.Linear(96, 8), name="reader"),)
    norm.share()
    source = generator("x")
    grads = torch.randn(2, 5, 7, 96, generator=source)
    inputs = [torch.randn(5, 7, 96, generator=source).requires_grad_() for _ in range(2)]
    results = []

    def apart(stream: torch.Tensor, term: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stream = stream + term
        return stream, norm(stream)

    for sums in (norm.of_sum, apart):
        for tensor in (*inputs, norm.weight):
            tensor.grad = None
        stream, y = sums(*inputs)
        (stream * grads[0] + y * grads[1]).sum().backward()
        results.append((stream.detach(), y.detach(), *(tensor.grad for tensor in (*inputs, norm.weight))))
        with torch.no_grad():
            assert torch.equal(sums(*inputs)[1], y), "without gradients the same"
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (3, 5, 64), (900, 256)], ids=str)
def test_the_activation_and_its_gradients_are_torch_s_bit_for_bit(shape: tuple[int, ...]) -> None:
    """Where torch itself computes in vectors: it takes the last elements of an odd piece one by one, with another
    exponential."""
    source = generator("swiglu", shape)
    values = [torch.randn(shape, generator=source) * scale for scale in (5, 3, 1)]
    values[0].flatten()[:8] = torch.tensor([0.0, -0.0, 90.0, -90.0, 1e-40, -1e-40, 3e38, -3e38])
    gate, up, grad = values
    results = []
    for activation in (cpu_kernels().swiglu, lambda gate, up, *_: nn.functional.silu(gate) * up):
        inputs = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        y = activation(*inputs, -1, 0, False)
        y.backward(grad)
        results.append((y.detach(), *(x.grad for x in inputs)))
    for name, ours, theirs in zip(("y", "gate", "up"), *results, strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_activation_does_not_hide_what_is_not_finite(bad: float) -> None:
    """Where silu itself is finite, -0 * inf of the product is not."""
    for place in range(2):
        inputs = [torch.ones(3, 32), torch.ones(3, 32)]
        inputs[place][1, 5] = bad
        y = cpu_kernels().swiglu(*inputs, -1, 0, False)
        expected = nn.functional.silu(inputs[0]) * inputs[1]
        torch.testing.assert_close(y, expected, equal_nan=True)
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("fmt", ["none", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_mlp_quantises_as_the_layers_in_it_would(monkeypatch: pytest.MonkeyPatch, fmt: Any, fused: bool) -> None:
    if not fused:
        monkeypatch.setattr(cpu, "load", lambda: None)
    linears = {name: nn.Linear(*sizes) for name, sizes in {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}.items()}
    how = Arithmetic(activations=fmt)
    gate, up, down = (QuantLinear.from_linear(linear, name=name, arithmetic=how) for name, linear in linears.items())
    mlp = GatedMLP(gate, up, down)
    x = torch.randn(40, 32, generator=generator("x"), requires_grad=True)
    parameters = [x, *mlp.parameters()]
    expected = down(nn.functional.silu(gate(x)) * up(x))
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    for mlp.apart in (True, False):
        mlp.share()
        assert down.quantize_input == mlp.apart
        assert torch.equal(mlp(x), expected)
        for a, b in zip(torch.autograd.grad(mlp(x).square().sum(), parameters), theirs, strict=True):
            assert torch.equal(a, b)


def test_arguments_of_another_kind_are_named() -> None:
    x = torch.ones(2, 32)
    with pytest.raises(TypeError, match="a tensor is wanted, not int"):
        cpu_kernels().swiglu(x, 3, -1, 0, False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="5 arguments are wanted, not 2"):
        cpu_kernels().swiglu(x, x)  # type: ignore[call-arg]


def test_shapes_that_do_not_fit_are_errors() -> None:
    """They would be read, or written, out of bounds."""
    kernels, x, weight = cpu_kernels(), torch.ones(4, 32), torch.ones(32)
    for wrong in (torch.ones(4, 16), torch.ones(32), torch.ones(2, 32)):
        with pytest.raises(ValueError, match=r"gate \[4, 32\] and up"):
            kernels.swiglu(x, wrong, -1, 0, False)
        with pytest.raises(ValueError, match=r"x \[4, 32\] and residual"):
            kernels.rms_norm(x, wrong, weight, 1e-6, -1, 0, False)
    ones = torch.ones
    for activation in (
        lambda x: kernels.swiglu(x, x, 0, 0, False),
        lambda x: kernels.rms_norm(x, None, ones(x.shape[-1]), 1e-6, 0, 0, False),
    ):
        with pytest.raises(ValueError, match="rows of 40 are not whole vectors"):
            activation(torch.ones(4, 40))
        with pytest.raises(ValueError, match="rows of 0 are not whole vectors"):
            activation(torch.ones(4, 0))
        with pytest.raises(ValueError, match="mxfp4 needs a last dim that is a multiple of 32, but got 48"):
            activation(torch.ones(4, 48))
    with pytest.raises(ValueError, match=r"a weight \[16\] for rows of 32"):
        kernels.rms_norm(x, None, torch.ones(16), 1e-6, -1, 0, False)
    with pytest.raises(RuntimeError, match="angles are not contiguous"):
        kernels.rotary(torch.ones(8, 2, 8), torch.ones(8, 8).t(), torch.ones(8, 8))


def test_gradients_of_gradients_are_refused() -> None:
    """Instead of lacking a part without a word."""
    kernels, x = cpu_kernels(), torch.ones(4, 32, requires_grad=True)
    angles = torch.ones(4, 32)
    for y in (
        kernels.swiglu(x, x, -1, 0, False),
        kernels.rms_norm(x, None, torch.ones(32), 1e-6, -1, 0, False),
        kernels.rotary(x[:, None], angles, angles),
    ):
        with pytest.raises(NotImplementedError, match="has none of its own"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_rotation_is_that_of_transformers() -> None:
    x = torch.randn(50, 3, 24, generator=generator("x"), requires_grad=True)
    angles = torch.randn(50, 12, generator=generator("angles")).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(x[None].transpose(1, 2), x[None].transpose(1, 2), cos[None], sin[None])
    expected = expected.transpose(1, 2)[0]
    rotated = cpu_kernels().rotary(x, cos, sin)
    torch.testing.assert_close(rotated, expected)
    grad = torch.randn(50, 3, 24, generator=generator("grad"))
    (ours,), (theirs,) = torch.autograd.grad(rotated, x, grad), torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 24), (3, 3, 16), (8, 1, 64)])
@pytest.mark.parametrize("filled", [0, 5, 15, 16, 40])
def test_attention_over_the_cache_is_torch_s(heads: int, kv_heads: int, size: int, filled: int) -> None:
    source = generator("attend", heads, filled)
    rows, room = 9, 48
    keys, values = (
        torch.randn(rows, kv_heads, room, size, generator=source),
        torch.randn(rows, kv_heads, room, size, generator=source),
    )
    q, k, v = (torch.randn(rows, n * size, generator=source) * 2 for n in (heads, kv_heads, kv_heads))
    starts = torch.randint(0, filled + 1, (rows,), generator=source)
    cos, sin = torch.ones(rows, size), torch.zeros(rows, size)
    own_keys, own_values = keys.transpose(-1, -2).contiguous(), values.clone()
    mixed = cpu_kernels().attend(q, k, v, cos, sin, own_keys, own_values, starts, filled, size**-0.5)
    keys[:, :, filled], values[:, :, filled] = k.view(rows, kv_heads, size), v.view(rows, kv_heads, size)
    assert torch.equal(own_keys.transpose(-1, -2), keys)
    assert torch.equal(own_values, values)
    visible = (torch.arange(filled + 1) >= starts[:, None])[:, None, None]
    expected = nn.functional.scaled_dot_product_attention(
        q.view(rows, heads, 1, size),
        keys[:, :, : filled + 1].repeat_interleave(heads // kv_heads, 1),
        values[:, :, : filled + 1].repeat_interleave(heads // kv_heads, 1),
        attn_mask=visible,
    )
    torch.testing.assert_close(mixed, expected.reshape(rows, -1), rtol=1e-4, atol=1e-5)


def test_attention_to_very_unequal_tokens_and_to_nan() -> None:
    size, room = 16, 16
    keys, values = torch.zeros(2, 1, size, room), torch.zeros(2, 1, room, size)
    values[:, 0, 0] = 1.0
    q = torch.full((2, size), 30.0)
    k = torch.full((2, size), -30.0)
    k[1, 3] = float("nan")
    v = torch.full((2, size), 5.0)
    args = (torch.ones(2, size), torch.zeros(2, size), keys, values, torch.zeros(2, dtype=torch.long), 1, 1.0)
    mixed = cpu_kernels().attend(q, k, v, *args)
    assert torch.equal(mixed[0], torch.ones(size)), "a token whose weight is e^-14400 has none"
    assert mixed[1].isnan().all()


def test_without_kernels_everything_is_computed_by_torch(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(ModelConfig(name=folder), QuantConfig(), seed=0)
    batch = sampled_batch(policy)
    fused = completion_logps(policy, batch, 1.0)
    monkeypatch.setattr(cpu, "load", lambda: None)
    plain = completion_logps(policy, batch, 1.0)
    assert ((fused - plain).abs() > 1e-4).float().mean() < 0.1, "but for flipped roundings"
    assert type(decoding.decoder(policy, 4)) is _Ours

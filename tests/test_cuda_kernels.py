"""The Triton kernels against the definition in eager torch: on a GPU where there is one, in Triton's interpreter on any
machine.

Each of CHECKS takes the device. The interpreter is chosen by an environment variable when triton is imported, so that
it gets a process of its own, and it is slow: it sees a part of the rows. What it cannot show, that the compiled code
rounds where the source does, is read off the assembly, which Triton makes without a GPU too.

Eager values are computed on the CPU, also for a GPU: torch divides a CUDA tensor by a number as it multiplies by the
rounded reciprocal, which moves some NVFP4 scales by an ulp.
"""

import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.quantised_samples import ALL, CLASSES, QUANTISED, assert_same, sample
from trainable.hadamard import rotate_eager
from trainable.kernels import cuda
from trainable.layers import mlp, norm
from trainable.noised import Drawn, noised_eager
from trainable.philox import key_of, normals
from trainable.quantization import (
    AS_IT_IS,
    KERNEL_CODES,
    Arithmetic,
    Operand,
    QuantLinear,
    fake_quantize,
    fake_quantize_eager,
)
from trainable.seeds import generator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton here: pip install triton==3.7.1"
)


def quantised(x: Tensor, fmt: str, rule: str, per_tensor: bool, device: str) -> Tensor:
    return cuda.fake_quantize(x.to(device), *KERNEL_CODES[fmt, rule], per_tensor).cpu()


def scopes(fmt: str) -> tuple[bool, ...]:
    return (False, True) if fmt == "nvfp4" else (False,)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, name: str = "x") -> Tensor:
    return torch.randn(shape, generator=generator(name)).to(dtype)


# --- checks -----------------------------------------------------------------------------------------------------------


def every_class_of_data(device: str) -> None:
    for (fmt, rule), kind, dtype in product(ALL, CLASSES, DTYPES):
        x = sample(kind, fmt, dtype)[: 12 if device == "cpu" else None]
        for per_tensor in scopes(fmt):
            assert_same(
                quantised(x, fmt, rule, per_tensor, device), fake_quantize_eager(x, fmt, rule, per_tensor=per_tensor)
            )


def odd_shapes_and_views(device: str) -> None:
    for fmt, dtype in product(QUANTISED, DTYPES):
        for shape in ((0, 64), (2, 0, 64), (1, 32), (32,), (3, 5, 2, 96), (7, 1056), (2, 8224)):
            x = 3 * drawn(*shape, dtype=dtype)
            for per_tensor in scopes(fmt) if x.numel() else (False,):
                expected = fake_quantize_eager(x, fmt, per_tensor=per_tensor)
                assert_same(quantised(x, fmt, "floor", per_tensor, device), expected)
        slab = drawn(32, 96, dtype=dtype)
        for view in (slab.t()[:9], slab[:9:2], slab[:5, 32:], slab[1:5], slab[0].expand(2, 3, 96)):
            assert_same(quantised(view, fmt, "floor", False, device), fake_quantize_eager(view, fmt))
        with pytest.raises(ValueError, match="but got 40; exclude"):
            quantised(drawn(2, 40), fmt, "floor", False, device)
    double = drawn(4, 64).double()
    assert_same(quantised(double, "mxfp4", "even", False, device), fake_quantize_eager(double, "mxfp4", "even"))


def bf16_beside_every_largest_value(device: str) -> None:
    """All finite bf16 values: each pair of a block's largest value and another, or on the CPU some of those."""
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = every[:: 1 if device == "cuda" else 97]
    values = torch.cat([values, -values, values[: -2 * len(values) % 31]]).reshape(-1, 31)
    for top in every[:: 0x20 if device == "cuda" else 0xE20]:
        x = torch.cat([top.expand(len(values), 1), values.where(values.abs() <= top, 0.0)], 1).contiguous()
        for rule in ("floor", "even", "rceil", "ceil"):
            assert_same(quantised(x, "mxfp4", rule, False, device), fake_quantize_eager(x, "mxfp4", rule))


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Eager torch, as in transformers."""
    exact = x.to(torch.float32)
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def norms(device: str) -> None:
    for dtype, shape in product((torch.float32, torch.bfloat16), ((5, 64), (2, 3, 96), (1, 896), (3, 1536))):
        x, weight = drawn(*shape, dtype=dtype), 1 + drawn(shape[-1], name="weight").mul_(0.1).to(dtype)
        on_device = x.to(device), weight.to(device)
        y, inverse = cuda.rms_norm(*on_device, 1e-6, -1, 0)
        flips = (
            dtype == torch.bfloat16
        )  # of the normalised value's rounding, where sums in another order move it across a midpoint
        torch.testing.assert_close(y.cpu(), normed(x, weight, 1e-6), rtol=2**-7 if flips else 1e-6, atol=0.0)
        assert (y.cpu() != normed(x, weight, 1e-6)).float().mean() < 0.01 or not flips
        expected = torch.rsqrt(x.float().pow(2).mean(-1).flatten() + 1e-6)
        torch.testing.assert_close(inverse.cpu(), expected, rtol=1e-6, atol=0.0)
        for fmt, rule in ALL:
            z, again = cuda.rms_norm(*on_device, 1e-6, *KERNEL_CODES[fmt, rule])
            assert_same(z.cpu(), fake_quantize_eager(y.cpu(), fmt, rule))
            assert torch.equal(again, inverse)


def norms_of_any_width(device: str) -> None:
    for n in (1, 40, 100):
        x, weight = drawn(3, n), drawn(n, name="weight")
        y, _ = cuda.rms_norm(x.to(device), weight.to(device), 1e-6, -1, 0)
        torch.testing.assert_close(y.cpu(), normed(x, weight, 1e-6), rtol=1e-6, atol=0.0)
    with pytest.raises(ValueError, match=r"mxfp4 .* multiple of 32, but got 40; exclude"):
        cuda.rms_norm(drawn(3, 40).to(device), drawn(40).to(device), 1e-6, 0, 0)


def norms_that_are_not_finite(device: str) -> None:
    for bad, dtype, fmt in product((float("nan"), float("inf")), (torch.float32, torch.bfloat16), ("none", *QUANTISED)):
        x = torch.ones(3, 96, dtype=dtype)
        x[1, 5] = bad
        y = cuda.rms_norm(x.to(device), torch.ones(96, dtype=dtype).to(device), 1e-6, *KERNEL_CODES[fmt, "floor"])[
            0
        ].cpu()
        assert y[[0, 2]].isfinite().all()
        expected = normed(x, torch.ones(96, dtype=dtype), 1e-6)
        assert_same(y[1:2], expected[1:2] if fmt == "none" else fake_quantize_eager(expected, fmt)[1:2])


def gradients_of_the_norm(device: str) -> None:
    for dtype, fmt in product((torch.float32, torch.bfloat16), ("none", "mxfp4")):
        leaves = [drawn(2, 3, 96, dtype=dtype), 1 + drawn(96, dtype=dtype, name="weight") / 10]
        ours = [leaf.to(device).requires_grad_() for leaf in leaves]
        theirs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        grad = drawn(2, 3, 96, dtype=dtype, name="grad")
        cuda.RMSNorm.apply(*ours, 1e-6, *KERNEL_CODES[fmt, "floor"], False).backward(grad.to(device))
        normed(*theirs, 1e-6).backward(grad)
        close = 1e-5 if dtype == torch.float32 else 3e-2
        for a, b in zip(ours, theirs, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert a.grad.dtype == dtype
            torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=close, atol=close)


def activations(device: str) -> None:
    for dtype, shape in product((torch.float32, torch.bfloat16), ((5, 64), (2, 3, 96), (0, 64), (3, 8960))):
        gate, up = 4 * drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, name="up")
        expected = nn.functional.silu(gate) * up
        y = cuda.swiglu(gate.to(device), up.to(device), -1, 0).cpu()
        flips = dtype == torch.bfloat16  # of silu's rounding, where another exponential moves it across a midpoint
        torch.testing.assert_close(y, expected, rtol=2**-7 if flips else 2e-6, atol=0.0)
        assert not flips or y.numel() == 0 or (y != expected).float().mean() < 0.01
        for fmt, rule in ALL:
            z = cuda.swiglu(gate.to(device), up.to(device), *KERNEL_CODES[fmt, rule]).cpu()
            assert_same(z, fake_quantize_eager(y, fmt, rule) if y.numel() else y)
    with pytest.raises(ValueError, match=r"mxfp4 .* multiple of 32, but got 40; exclude"):
        cuda.swiglu(drawn(3, 40).to(device), drawn(3, 40).to(device), 0, 0)
    odd = drawn(3, 40), drawn(3, 40, name="up")
    y = cuda.swiglu(*(x.to(device) for x in odd), -1, 0).cpu()
    torch.testing.assert_close(y, nn.functional.silu(odd[0]) * odd[1], rtol=2e-6, atol=0.0)


def activations_that_are_not_finite(device: str) -> None:
    for bad, place, fmt in product((float("nan"), float("inf"), float("-inf")), (0, 1), ("none", *QUANTISED)):
        inputs = [torch.ones(3, 96), torch.ones(3, 96)]
        inputs[place][1, 5] = bad
        y = cuda.swiglu(*(x.to(device) for x in inputs), *KERNEL_CODES[fmt, "floor"]).cpu()
        expected = nn.functional.silu(inputs[0]) * inputs[1]
        expected = expected if fmt == "none" else fake_quantize_eager(expected, fmt)
        torch.testing.assert_close(y, expected, equal_nan=True)


def gradients_of_the_activation(device: str) -> None:
    for dtype, fmt in product((torch.float32, torch.bfloat16), ("none", "mxfp4")):
        leaves = [4 * drawn(2, 3, 96, dtype=dtype), drawn(2, 3, 96, dtype=dtype, name="up")]
        ours = [leaf.to(device).requires_grad_() for leaf in leaves]
        theirs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        grad = drawn(2, 3, 96, dtype=dtype, name="grad")
        cuda.SwiGLU.apply(*ours, *KERNEL_CODES[fmt, "floor"], False).backward(grad.to(device))
        (nn.functional.silu(theirs[0]) * theirs[1]).backward(grad)
        for a, b in zip(ours, theirs, strict=True):
            assert a.grad is not None
            torch.testing.assert_close(a.grad.cpu(), b.grad)


def rotated_operands(device: str) -> None:
    """Fused norm and activation, then a rotation and a quantisation: operands and gradients, the latter turned back."""
    for dtype, fmt in product((torch.float32, torch.bfloat16), ("none", *QUANTISED)):
        x, weight, up = (
            drawn(2, 3, 96, dtype=dtype),
            1 + drawn(96, dtype=dtype, name="weight") / 10,
            drawn(2, 3, 96, dtype=dtype, name="up"),
        )
        grad = drawn(2, 3, 96, dtype=dtype, name="grad")
        for function, leaves, more in ((cuda.RMSNorm, (x, weight), (1e-6,)), (cuda.SwiGLU, (x, up), ())):
            ours, theirs = ([leaf.to(device).requires_grad_() for leaf in leaves] for _ in range(2))
            y = function.apply(*ours, *more, *KERNEL_CODES[fmt, "floor"], True)
            plain = function.apply(*theirs, *more, -1, 0, False)
            turned = rotate_eager(plain.detach().cpu())
            assert_same(y.detach().cpu(), turned if fmt == "none" else fake_quantize_eager(turned, fmt))
            y.backward(grad.to(device))
            plain.backward(rotate_eager(grad).to(device))
            assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def noise(device: str) -> None:
    """Drawn, added, cast, quantised and counted: every bit that of eager torch on the CPU."""
    steps = torch.rand(300, generator=generator("unit"))
    formats = (("none", "floor"), ("mxfp4", "even"), ("mxfp8", "floor"), ("nvfp4", "floor"))
    for (fmt, rule), dtype in product(formats, (torch.float32, torch.bfloat16)):
        base = drawn(100, 96, dtype=dtype)
        how = Operand(format=fmt, scale_rule=rule, per_tensor=True, hadamard=False)
        for unit, start, clean in ((None, 0, None), (steps[:1], 4 * 2**33 + 8, base), (steps, 0, base)):
            asked = Drawn(key=key_of("x"), sigma=0.2, unit=unit, start=start)
            there = [None if x is None else x.to(device) for x in (base, clean, unit)]
            out, sums = cuda.noised(*there, asked.key, start, asked.sigma, *KERNEL_CODES[fmt, rule], True)
            expected, counted = noised_eager(base, asked, how, clean)
            assert_same(out.cpu(), expected)
            assert (sums is None) == (counted is None)
            if sums is not None:
                torch.testing.assert_close(sums.cpu(), counted, rtol=1e-6, atol=0.0)
    odd, asked = drawn(41), Drawn(key=key_of("y"), sigma=0.2)
    out, _ = cuda.noised(odd.to(device), None, None, asked.key, 0, 0.2, -1, 0, False)
    assert_same(out.cpu(), noised_eager(odd, asked, AS_IT_IS)[0])


def normal_numbers(device: str) -> None:
    """In few large tiles: the interpreter takes as long for a small one."""
    count, key, tile = 1 << 21, key_of("normal"), cuda._TILE
    try:
        cuda._TILE = 1 << 18 if device == "cpu" else tile
        out, _ = cuda.noised(torch.zeros(count).to(device), None, None, key, 0, 1.0, -1, 0, False)
    finally:
        cuda._TILE = tile
    assert torch.equal(out.cpu(), normals(key, 0, count))


def compiled_around(device: str) -> None:
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        kernel = cuda.load(x)
        assert kernel is not None
        y = cuda.RMSNorm.apply(x, weight[0], 1e-6, 0, 0, True)
        y = cuda.SwiGLU.apply(y, x, 0, 0, True)
        return y @ kernel(weight, *KERNEL_CODES["nvfp4", "floor"], True).t()

    x, weight = drawn(8, 64).to(device).requires_grad_(), drawn(32, 64, name="weight").to(device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), layer(x, weight))
    (a,), (b,) = (torch.autograd.grad(function(x, weight).sum(), x) for function in (compiled, layer))
    assert torch.equal(a, b)
    torch.library.opcheck(torch.ops.rin_cuda.fake_quantize.default, (weight.t(), 0, 0, False))
    torch.library.opcheck(torch.ops.rin_cuda.rms_norm.default, (x.detach(), weight[0], 1e-6, 0, 0))
    torch.library.opcheck(torch.ops.rin_cuda.swiglu.default, (x.detach(), x.detach(), 0, 0))


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (
        *(every_class_of_data, odd_shapes_and_views, bf16_beside_every_largest_value),
        *(norms, norms_of_any_width, norms_that_are_not_finite, gradients_of_the_norm),
        *(activations, activations_that_are_not_finite, gradients_of_the_activation),
        *(rotated_operands, noise, normal_numbers, compiled_around),
    )
}


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter_every_check_holds() -> None:
    """One process for all of them: it takes longer to start than most of them."""
    code = (
        "from tests.test_cuda_kernels import CHECKS\n"
        "for name, check in CHECKS.items(): print(name, flush=True); check('cpu')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == list(CHECKS)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu_it_holds(name: str) -> None:
    CHECKS[name]("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("fmt", "rule"), [case for case in ALL if case[0] != "nvfp4"])
def test_eager_torch_on_the_gpu_is_the_same_definition(fmt: str, rule: str) -> None:
    for kind in CLASSES:
        x = sample(kind, fmt)
        assert_same(fake_quantize_eager(x.cuda(), fmt, rule).cpu(), fake_quantize_eager(x, fmt, rule))


# --- the compiled code ------------------------------------------------------------------------------------------------

TENSORS = ("*fp32", "*i16", "*fp16")
NORM = {"inverse": "*fp32", "epsilon": "fp32", "addend": "i32"}
NOISE = dict.fromkeys(("unit", "sums"), "*fp32") | {
    **{"count": "i32", "per": "i32", "key": "u64", "start": "i64", "sigma": "fp32", "addend": "i32"},
}
COMPILED = [
    *(
        ("mx_tensor", dict.fromkeys(("x", "out"), t) | {"count": "i32", "addend": "i32"}, {"MANTISSA": 3, "B": 128})
        for t in TENSORS
    ),
    *(("nv_tensor", dict.fromkeys(("x", "out"), t) | {"count": "i32", "top": "*fp32"}, {"B": 256}) for t in TENSORS),
    *(("nv_rows", dict.fromkeys(("x", "out"), t) | {"columns": "i32"}, {"B": 256}) for t in TENSORS),
    *(
        ("norm_rows", dict.fromkeys(("x", "weight", "out"), t) | NORM, {"COLUMNS": 896, "FORMAT": code, "N": 1024})
        for t, code in product(TENSORS[:2], (-1, 0, 2))
    ),
    *(
        (
            "swiglu_tensor",
            dict.fromkeys(("gate", "up", "out"), t) | {"count": "i32", "addend": "i32"},
            {"FORMAT": code, "B": 128},
        )
        for t, code in product(TENSORS[:2], (-1, 0))
    ),
    *(
        (
            "noised_tensor",
            dict.fromkeys(("base", "clean", "out"), t) | NOISE,
            {"FORMAT": code, "SCALED": scaled, "MEASURED": scaled, "B": 128},
        )
        for t, code, scaled in ((TENSORS[0], 0, True), (TENSORS[1], 0, True), (TENSORS[1], -1, False))
    ),
]


@needs_triton
@pytest.mark.parametrize(("name", "types", "constants"), COMPILED)
def test_the_assembly_contracts_flushes_and_approximates_nothing(
    name: str, types: dict[str, str], constants: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainable.kernels import cuda_blocks

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(cuda_blocks, name)
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(constant),): value for constant, value in constants.items()}
    )
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=cuda._OPTIONS).asm["ptx"]
    floats = set(re.findall(r"\b[a-z]+(?:\.\w+)*\.f32\b", assembly))
    assert "add.rn.f32" in floats
    if name == "swiglu_tensor":
        floats -= {"ex2.approx.f32", "ex2.approx.ftz.f32"}  # e^x, which has no exact value
    assert not [
        op for op in floats if re.search(r"^fma|^mad|\.ftz|\.approx|\.full|^(add|sub|mul|div|sqrt)\.f32", op)
    ], floats


# --- the way to them --------------------------------------------------------------------------------------------------


def on_cuda(*shape: int) -> Tensor:
    """A tensor that says it is on a GPU, and holds nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(shape, device="cuda")


def test_a_cuda_tensor_goes_to_the_kernel_and_without_triton_to_eager_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    x = on_cuda(4, 64)
    monkeypatch.setattr(cuda, "load", lambda like: lambda *arguments: calls.append(arguments) or x)
    assert fake_quantize(x, "nvfp4", per_tensor=True) is x
    assert calls == [(x, 2, 0, True)]
    monkeypatch.setattr(cuda, "load", lambda x: None)
    monkeypatch.setattr("trainable.quantization.fake_quantize_eager", lambda *_, **__: "eager")
    assert fake_quantize(x) == "eager"


def test_the_norm_of_a_cuda_tensor_goes_to_the_kernel_with_its_readers_format(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cuda, "RMSNorm", SimpleNamespace(apply=lambda x, weight, *arguments: calls.append(arguments)))
    monkeypatch.setattr(cuda, "load", lambda x: cuda.fake_quantize)
    layer = norm.RMSNorm(nn.Parameter(torch.ones(64)), 1e-6)
    layer(on_cuda(4, 64))
    how = Arithmetic(activations="mxfp8", scale_rule="even")
    layer.readers = (QuantLinear.from_linear(nn.Linear(64, 8), name="reader", arithmetic=how),)
    layer.share()
    layer(on_cuda(4, 64))
    assert calls == [(1e-6, -1, 0, False), (1e-6, *KERNEL_CODES["mxfp8", "even"], False)]


def test_the_activation_of_cuda_tensors_goes_to_the_kernel_with_its_reader_s_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(cuda, "SwiGLU", SimpleNamespace(apply=lambda gate, up, *arguments: calls.append(arguments)))
    monkeypatch.setattr(cuda, "load", lambda x: cuda.fake_quantize)
    layer = mlp.GatedMLP(nn.Identity(), nn.Identity(), nn.Identity())
    layer(on_cuda(4, 64))
    how = Arithmetic(activations="mxfp8", scale_rule="even")
    layer.readers = (QuantLinear.from_linear(nn.Linear(64, 8), name="reader", arithmetic=how),)
    layer.share()
    layer(on_cuda(4, 64))
    assert calls == [(-1, 0, False), (*KERNEL_CODES["mxfp8", "even"], False)]


def test_an_activation_or_a_norm_that_the_kernel_does_not_take_is_left_to_torch() -> None:
    half = torch.ones(2, 64, dtype=torch.float16)
    assert not cuda.can_activate(half, half)
    assert not cuda.can_activate(half.float(), half)
    assert not cuda.can_norm(half, half[0])
    weight = torch.ones(64)
    assert not cuda.can_norm(torch.ones(2, 64, dtype=torch.bfloat16), weight)
    assert not cuda.can_norm(torch.ones(2, 64, dtype=torch.float64), weight.double())
    assert not cuda.can_norm(torch.ones(1, cuda.WIDEST + 1), torch.ones(cuda.WIDEST + 1))


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cuda, "_INSTALLED", False)
    cuda._missing.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cuda.load(torch.zeros(1)) is None
        assert cuda.load(torch.zeros(1)) is None
    assert [record.message.split("; ")[1] for record in caplog.records] == ["pip install triton to have them"]


@pytest.mark.slow
def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, trainable.layers.norm; assert not {'triton', 'torch._dynamo'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

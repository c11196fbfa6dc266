"""Every way to a noisy weight gives the same bits, for any part of it, and counts what changed."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from spaces.formats import FORMATS
from trainable.kernels import cpu
from trainable.noised import Drawn, noised, noised_eager
from trainable.philox import key_of, normals
from trainable.quantization import AS_IT_IS, Operand, element_step, fake_quantize

KEY = key_of("noise", 0, 3, "w")
SHAPES = ((0, 32), (1,), (40,), (100,), (3, 32), (5, 7, 96), (40, 1056), (301, 512))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)


def operand(fmt: str, rule: str = "floor") -> Operand:
    return Operand(format=fmt, scale_rule=rule, per_tensor=fmt == "nvfp4", hadamard=False)


def assert_equal(got: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    assert got[0].dtype == expected[0].dtype
    assert torch.equal(got[0].isnan(), expected[0].isnan())
    assert torch.equal(got[0].nan_to_num(), expected[0].nan_to_num())
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None and expected[1] is not None:
        torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=0.0, equal_nan=True)


def units(base: Tensor, fmt: str) -> list[Tensor | None]:
    """1, one for all, one for each block."""
    given: list[Tensor | None] = [None, torch.tensor([0.37])]
    block = max(16, FORMATS[fmt].block)
    if base.numel() and base.shape[-1] % block == 0:
        given.append(element_step(base.float(), fmt if fmt != "none" else "nvfp4").flatten()[::block].contiguous())
    return given


@pytest.mark.parametrize(("fmt", "dtype"), list(product(("none", "mxfp4", "mxfp8", "nvfp4"), DTYPES)), ids=str)
def test_the_kernel_gives_the_bits_of_eager_torch(fmt: str, dtype: torch.dtype) -> None:
    for shape, rule in product(SHAPES, ("floor", "even") if fmt.startswith("mx") else ("floor",)):
        if shape[-1] % FORMATS[fmt].block or (0 in shape and fmt == "nvfp4"):
            continue
        base = weight(*shape, dtype=dtype)
        how, clean = operand(fmt, rule), fake_quantize(base, fmt, rule, per_tensor=True)
        for unit in units(base, fmt):
            drawn = Drawn(key=KEY, sigma=0.01, unit=unit)
            assert_equal(noised(base, drawn, how, clean), noised_eager(base, drawn, how, clean))
            assert_equal(noised(base, drawn, how), noised_eager(base, drawn, how))


@pytest.mark.skipif(cpu.load() is None, reason="no compiler here")
def test_the_kernel_s_normals_are_those_of_the_definition_bit_for_bit() -> None:
    count = 1 << 21
    for start in (0, 4 * (2**32 - 3), 2**40):
        got, _ = noised(torch.zeros(count), Drawn(key=KEY, sigma=1.0, start=start), AS_IT_IS)
        assert torch.equal(got, normals(KEY, start, count))


def test_noise_is_added_to_any_layout_by_the_order_of_its_elements() -> None:
    slab = weight(64, 96)
    for view in (slab.t(), slab[::2], slab[:, 32:]):
        drawn = Drawn(key=KEY, sigma=0.01)
        assert_equal(noised(view, drawn, operand("none"), view), noised_eager(view.contiguous(), drawn, AS_IT_IS, view))


@pytest.mark.parametrize("fmt", ["none", "mxfp4"])
@pytest.mark.parametrize("start", [4, 96, 98])
def test_rows_of_a_weight_get_the_noise_that_they_have_in_the_whole(fmt: str, start: int) -> None:
    """98 starts within a block of the stream, and takes the eager way."""
    whole = torch.cat((torch.zeros(start), weight(40, 96).flatten()))
    base = whole[start:].view(40, 96)
    part, _ = noised(base, Drawn(key=KEY, sigma=0.01, start=start), operand(fmt))
    noisy, _ = noised(whole, Drawn(key=KEY, sigma=0.01), AS_IT_IS)
    assert torch.equal(part, fake_quantize(noisy[start:].view(40, 96), fmt))


@pytest.mark.parametrize("fmt", ["none", "mxfp4", "nvfp4"])
def test_neither_noise_nor_what_is_counted_depends_on_threads(fmt: str) -> None:
    base, before = weight(400, 512), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(noised(base, Drawn(key=KEY, sigma=0.01), operand(fmt), base))
        for out, sums in results[1:]:
            assert torch.equal(out, results[0][0])
            assert sums is not None
            assert torch.equal(sums, results[0][1])
    finally:
        torch.set_num_threads(before)


def test_a_block_with_nan_or_infinity_shows_it() -> None:
    for bad, fmt, dtype in product((float("nan"), float("inf")), ("none", "mxfp4", "nvfp4"), DTYPES):
        base = weight(40, 96, dtype=dtype)
        base[1, 5] = bad
        drawn = Drawn(key=KEY, sigma=0.01)
        got, expected = noised(base, drawn, operand(fmt), base), noised_eager(base, drawn, operand(fmt), base)
        assert_equal(got, expected)
        assert not got[0].isfinite().all()


def test_what_a_kernel_cannot_take_is_an_error_and_no_memory_of_others() -> None:
    kernels = cpu.load()
    if kernels is None:
        pytest.skip("no compiler here")
    base = weight(4, 96)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"start": 2}, "within a block"),
        ({"clean": base[:2]}, "unlike"),
        ({"unit": torch.ones(7)}, "7 units"),
        ({"unit": torch.ones(12, dtype=torch.float64)}, "not fp32"),
        ({"base": base.double()}, "noise on"),
        ({"base": weight(4, 40), "code": 0}, "multiple of 32"),
    ]
    for change, words in cases:
        given = {"base": base, "clean": None, "unit": None, "start": 0, "code": -1} | change
        with pytest.raises(ValueError, match=words):
            kernels.noised(
                *(given["base"], given["clean"], given["unit"], KEY, given["start"], 0.1, given["code"], 0, False)
            )

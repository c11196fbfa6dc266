"""Philox is the published generator, its numbers have their laws, and a part of a stream is that of the whole."""

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from trainable import philox
from trainable.philox import bits, key_of, normals, uniforms, uniforms_at

KEY = key_of("noise", 0, 3, "model.layers.1.mlp.down_proj.weight")
DRAWS: dict[str, Callable[..., Tensor]] = {"bits": bits, "uniforms": uniforms, "normals": normals}


def reference_bits(key: int, start: int, count: int) -> np.ndarray[Any, Any]:
    """Philox 4x32-10 as in the paper's figure, in numpy's unsigned integers."""
    block = np.arange(start // 4, -(-(start + count) // 4), dtype=np.uint64)
    words = [block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), block * np.uint64(0), block * np.uint64(0)]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
        words = [
            (second >> high) ^ words[1] ^ np.uint64(k[0]),
            second & low,
            (first >> high) ^ words[3] ^ np.uint64(k[1]),
            first & low,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return np.stack(words, -1).reshape(-1)[start % 4 : start % 4 + count]


def reference_normals(key: int, start: int, count: int) -> np.ndarray[Any, Any]:
    """The definition of `normals` in numpy: every operation on float32, in the order that the module says."""
    f = np.float32
    first = start - start % 4
    words = reference_bits(key, first, start + count - first + 4).astype(np.int64)
    words = words[: len(words) // 2 * 2]

    def cubic(of: tuple[float, ...], x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return (x * f(of[1]) + f(of[0])) + x * x * (x * f(of[3]) + f(of[2]))

    u = (words[::2].astype(f) + f(0.5)).view(np.int32) - np.int32(0x3F3504F3 + 32 * 2**23)
    x = ((u & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)).view(f) - f(1)
    series = cubic(philox.LOG[:4], x) + x * x * (x * x) * cubic(philox.LOG[4:], x)
    r = np.sqrt((u >> np.int32(23)).astype(f) * f(-philox.LN2_TWICE) + x * series, dtype=f)
    r = np.where(words[1::2] >= 2**31, -r, r)
    a = (words[1::2].astype(np.uint32) << np.uint32(1)).view(np.int32).astype(f) * f(philox.HALF_TURN)
    z = a * a
    c = z * cubic(philox.COS, z) + f(1)
    s = z * a * cubic(philox.SIN, z) + a
    return np.stack((r * c, r * s), -1).reshape(-1)[start - first : start - first + count]


def exact_normals(key: int, count: int) -> tuple[Tensor, Tensor]:
    """Box-Muller by the library's fp64 functions, from the same uniform numbers; and the radii."""
    words = bits(key, 0, count)
    r = (-2 * ((words[::2].float() + 0.5).double() * 2.0**-32).log()).sqrt()
    half, rest = words[1::2] >> 31, (words[1::2] & 0x7FFFFFFF).double()
    angle = math.pi * (half + torch.where(rest < 2**30, rest, rest - 2**31) * 2.0**-31)
    return torch.stack((r * angle.cos(), r * angle.sin()), -1).flatten(), r.repeat_interleave(2)


# --- the generator ----------------------------------------------------------------------------------------------------

# Random123's kat_vectors for philox4x32 10: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_it_gives_the_known_answers_of_its_authors(counter: list[int], key: list[int], words: list[int]) -> None:
    given = [torch.tensor(word) for word in counter]
    assert [int(word) for word in philox._philox(key[0] | key[1] << 32, given)] == words


def test_words_of_a_stream_are_those_of_a_reference_in_unsigned_integers() -> None:
    for start in (0, 3, 4 * (2**32 - 5) + 2, 4 * (2**40)):  # across the counter's second word, too
        assert bits(KEY, start, 1001).tolist() == reference_bits(KEY, start, 1001).tolist()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here: pip install triton==3.7.1")
@pytest.mark.slow
def test_words_are_those_of_tritons_own_generator() -> None:
    """Which has the same counter and key in another's hands."""
    code = """
import torch, triton, triton.language as tl
from trainable.philox import bits, key_of

@triton.jit
def draw(out, key, N: tl.constexpr):
    block = tl.arange(0, N)
    a, b, c, d = tl.philox(key, block, block * 0, block * 0, block * 0)
    tl.store(out + 4 * block + 0, a)
    tl.store(out + 4 * block + 1, b)
    tl.store(out + 4 * block + 2, c)
    tl.store(out + 4 * block + 3, d)

key, out = key_of("x"), torch.zeros(256, dtype=torch.int32)
draw[(1,)](out, key, 64)
assert (out.long() & 0xFFFFFFFF).tolist() == bits(key, 0, 256).tolist()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


def test_a_key_is_64_bits_of_the_names() -> None:
    keys = [key_of("noise", seed, step, name) for seed in range(8) for step in range(8) for name in ("a", "b")]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    assert any(key >= 2**63 for key in keys), "all 64 of them"
    assert key_of("noise", 0, 1, "w") == 14534491702308330070


# --- parts of a stream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWS)
def test_any_part_of_a_stream_is_what_the_whole_has_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = DRAWS[name]
    monkeypatch.setattr(philox, "_CHUNK", 256)
    whole = draw(KEY, 0, 1500)
    for start in (0, 1, 2, 3, 5, 254, 255, 256, 257, 900):
        for count in (0, 1, 2, 3, 4, 7, 256, 511, 600):
            part = draw(KEY, start, count)
            assert torch.equal(part, whole[start : start + count]), (start, count)
            assert part.dtype == whole.dtype


def test_numbers_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = normals(KEY, 0, 100_000)
        torch.set_num_threads(3)
        assert torch.equal(normals(KEY, 0, 100_000), one)
    finally:
        torch.set_num_threads(threads)


def test_numbers_at_counters_are_the_first_of_their_blocks() -> None:
    stream = uniforms(KEY, 0, 4 * 24)[::4]
    assert torch.equal(uniforms_at(KEY, torch.arange(24)), stream)
    grid = uniforms_at(KEY, torch.arange(4)[:, None, None], torch.arange(3)[:, None], torch.arange(5))
    assert grid.shape == (4, 3, 5)
    assert len(grid.unique()) == 60, "each counter has its own"
    assert torch.equal(uniforms_at(KEY, 2, 1, torch.arange(5)), grid[2, 1])
    assert torch.equal(uniforms_at(KEY, torch.tensor([3, 0]), torch.tensor([2, 1]), 4, 0), grid[[3, 0], [2, 1], 4])


# --- the laws ---------------------------------------------------------------------------------------------------------

COUNT = 1 << 21


def test_uniform_numbers_are_odd_multiples_of_2_to_the_minus_24() -> None:
    words = torch.tensor([0, 1, 0x1FF, 0x200, 0xFFFFFFFF])
    assert philox._uniform(words).tolist() == [2**-24, 2**-24, 2**-24, 3 * 2**-24, 1 - 2**-24]
    assert stats.kstest(uniforms(KEY, 0, 100_000).double().numpy(), "uniform").pvalue > 1e-3


def test_normal_numbers_have_the_moments_and_tails_of_their_law() -> None:
    """Each within five standard errors."""
    x = normals(KEY, 0, COUNT).double()
    assert abs(x.mean().item()) < 5 / math.sqrt(COUNT)
    assert x.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / COUNT))
    assert abs((x**3).mean().item()) < 5 * math.sqrt(15 / COUNT)
    assert (x**4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / COUNT))
    for bound in (0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 4.5):
        share = stats.norm.sf(bound)
        for side in (x, -x):
            assert (side > bound).double().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share / COUNT))
    assert stats.kstest(x[:200_000].numpy(), "norm").pvalue > 1e-3
    pairs = x.reshape(-1, 2)
    for a, b in ((pairs[:, 0], pairs[:, 1]), (pairs[:, 0] ** 2, pairs[:, 1] ** 2), (x[:-4], x[4:]), (x[:-2], x[2:])):
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1].item()) < 5 / math.sqrt(len(a))


def test_the_extreme_words_give_finite_normals() -> None:
    words = torch.tensor([0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0, 1 << 31, 1, 1 << 30, 0xFFFFFF00, 3 << 29])
    got = philox._normal(words)
    assert got.isfinite().all()
    assert got[0].item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6), "the largest there is, 6.76"
    assert got[2:4].abs().max() == 0
    assert got[4].item() == -got[0].item()
    assert abs(got[6].item()) < 1e-6
    assert got[7].item() == pytest.approx(-math.sqrt(2 * math.log(2**32 / 1.5)), rel=1e-6)


@pytest.mark.parametrize("other", [(1, 3, "a"), (0, 4, "a"), (0, 3, "b")])
def test_seeds_steps_and_names_draw_independently(other: tuple[object, ...]) -> None:
    a, b = (normals(key_of("noise", *parts), 0, 200_000).double() for parts in ((0, 3, "a"), other))
    for x, y in ((a, b), (a[1:], b[:-1]), (a**2, b**2), (a.abs(), b)):
        assert abs(torch.corrcoef(torch.stack((x, y)))[0, 1].item()) < 5 / math.sqrt(len(x))


def test_streams_of_many_steps_and_names_have_no_common_part() -> None:
    streams = torch.stack([normals(key_of("noise", 0, i, name), 0, 4096) for i in range(16) for name in "abcd"])
    correlations = torch.corrcoef(streams.double()).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / math.sqrt(4096)
    assert correlations.square().mean().item() * 4096 == pytest.approx(1, abs=0.2)


# --- equal numbers ----------------------------------------------------------------------------------------------------


def test_eager_normals_are_those_of_the_reference_bit_for_bit() -> None:
    for start in (0, 1, 4 * 2**33 + 3):
        assert np.array_equal(normals(KEY, start, COUNT).numpy(), reference_normals(KEY, start, COUNT))


def test_normals_are_the_exact_function_of_their_words_but_for_their_last_bits() -> None:
    got, (exact, radius) = normals(KEY, 0, COUNT), exact_normals(KEY, COUNT)
    assert ((got.double() - exact).abs() / radius).max() < 4e-7

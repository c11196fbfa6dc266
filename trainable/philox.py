"""Random numbers of which any part can be drawn alone: Philox 4x32-10.

(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".)

Method. A keyed permutation of 128-bit counters: each counter gives four words of 32 bits, and nothing is carried from
one to the next. So any part of a stream can be drawn without the rest of it, on any device, by any number of threads
or processes. The key is a hash of names, `key_of("noise", seed, step, parameter)`.

A stream. Element e is word e % 4 of counter (e // 4, 0), of which the lower 32 bits come first; e < 2^63.

    bits      the word
    uniforms  (2 k + 1) 2^-24 with k the word's upper 23 bits: exact in fp32, never 0 and never 1
    normals   Box-Muller (1958) from neighbours: elements 2i and 2i + 1 are r cos(a) and r sin(a), where
              r = sqrt(-2 ln((w + 1/2) 2^-32)) of word w = 2i, and a = pi 2^-31 (v - 2^30), or pi more where the
              uppermost bit is set, of word w = 2i + 1 with v its other 31 bits

The radius takes all 32 bits of its word: with 24 a normal would end at 5.8, and of the 1.3 G weights of a real model
some ten are to lie beyond that. It ends at 6.8.

Equal numbers. ln, cos and sin of libraries differ in their last bits, so they are written out: exact steps on integers
down to a small interval, then a polynomial (minimax, from a weighted fit of our own), in pairs, which wait less for one
another than Horner's scheme. Each operation is rounded to fp32 on its own, in the order that is written here, and
`sqrt` is IEEE's. kernels/philox.h and kernels/cuda_blocks.py compute the same operations in the same order, and every
bit of a normal is the same there. It is off by at most 4e-7 r from the exact function of its words. (torch's own fp32
`sqrt` on the CPU is MKL's, and off by an ulp for a sixth of all numbers, so the root is taken in fp64 and rounded,
which is the same as rounding once.)

This is eager torch for any device: int64 arithmetic, in chunks, because torch has few operations on unsigned integers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainable.hashing import stable_bits

GENERATOR = "philox4x32-10"
"""Name of what draws noise: a checkpoint holds it, for a trial goes on with the draws that it began with."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
"""What is added to the key's halves each round: the golden ratio, and sqrt(3) - 1."""
_ROUNDS = 10
_CHUNK = 1 << 18
"""Elements drawn at a time: the eager arithmetic needs some 60 bytes for each."""

_SQRT_HALF = 0x3F3504F3
"""fp32 bits of sqrt(1/2)."""
_BEFORE_ONE = 32 << 23
"""What 2^32 adds to the bits of an fp32 number."""
LN2_TWICE = 1.3862943649291992
LOG = (
    -1.9999998807907104,
    1.000006914138794,
    -0.6667121648788452,
    0.49943119287490845,
    -0.3976847231388092,
    0.34424853324890137,
    -0.3267628848552704,
    0.207574263215065,
)
"""-2 ln(1 + f) = f (LOG[0] + LOG[1] f + ..), f from sqrt(1/2) - 1 to sqrt(2) - 1."""
HALF_TURN = 7.31459059988282e-10
"""pi 2^-32, as fp32 has it."""
SIN = (-0.16666661202907562, 0.008333087898790836, -0.00019811112724710256, 2.6089326183864614e-06)
"""sin(x) = x + x^3 (SIN[0] + SIN[1] x^2 + ..), |x| up to pi / 2."""
COS = (-0.4999993145465851, 0.041663989424705505, -0.001385592739097774, 2.31943868129747e-05)
"""cos(x) = 1 + x^2 (COS[0] + COS[1] x^2 + ..), |x| up to pi / 2."""


def key_of(*parts: object) -> int:
    """The key of a stream, 64 bits, e.g. key_of("noise", seed, step, parameter_name)."""
    return stable_bits(*parts)


# --- parts of a stream ------------------------------------------------------------------------------------------------


def bits(key: int, start: int, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Words start to start + count of a stream, int64 from 0 to 2^32 - 1. -> [count]"""
    return _drawn(key, start, count, device, torch.int64, lambda words: words)


def uniforms(key: int, start: int, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Numbers start to start + count of a stream, uniform on (0, 1), fp32. -> [count]"""
    return _drawn(key, start, count, device, torch.float32, _uniform)


def normals(key: int, start: int, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Numbers start to start + count of a stream, standard normal, fp32. -> [count]"""
    return _drawn(key, start, count, device, torch.float32, _normal)


def uniforms_at(key: int, *counter: Tensor | int) -> Tensor:
    """One number, uniform on (0, 1), of each counter of up to four words: integers from 0 to 2^32 - 1, the missing ones
    are 0. -> fp32, of the shape that the words broadcast to

    Example: uniforms_at(key_of("tokens", seed), prompts[:, None, None], completions[:, None], tokens)
    """
    assert 1 <= len(counter) <= 4, f"{len(counter)=}"
    device = next((word.device for word in counter if isinstance(word, Tensor)), torch.device("cpu"))
    given = (*counter, 0, 0, 0)[:4]
    return _uniform(_philox(key, [torch.as_tensor(word, dtype=torch.int64, device=device) for word in given])[0])


def _drawn(
    key: int,
    start: int,
    count: int,
    device: torch.device | str,
    dtype: torch.dtype,
    made: Callable[[Tensor], Tensor],
) -> Tensor:
    """`made` of the words of whole blocks, piece by piece, without what lies before `start` and behind the end."""
    assert start >= 0, f"{start=}"
    assert count >= 0, f"{count=}"
    out = torch.empty(count, dtype=dtype, device=device)
    for first in range(start - start % 4, start + count, _CHUNK):
        end = min(start + count, first + _CHUNK)
        block = torch.arange(first // 4, -(-end // 4), device=device)
        nothing = torch.zeros_like(block)
        words = torch.stack(_philox(key, [block & _WORD, block >> 32, nothing, nothing]), -1).flatten()
        begin = max(start, first)
        out[begin - start : end - start] = made(words)[begin - first : end - first]
    return out


# --- one block, one number --------------------------------------------------------------------------------------------


def _philox(key: int, counter: list[Tensor]) -> list[Tensor]:
    """Four words of each counter of four words, which broadcast; all int64 from 0 to 2^32 - 1."""
    a, b, c, d = counter
    low, high = key & _WORD, key >> 32
    for _ in range(_ROUNDS):
        one, two = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # of 64 bits; the sign is the uppermost
        a, c = (two >> 32 & _WORD) ^ b ^ low, (one >> 32 & _WORD) ^ d ^ high
        b, d = two & _WORD, one & _WORD
        low, high = low + _WEYL[0] & _WORD, high + _WEYL[1] & _WORD
    return [a, b, c, d]


def _uniform(words: Tensor) -> Tensor:
    return ((words >> 9) * 2 + 1).to(torch.float32) * 2.0**-24


def _normal(words: Tensor) -> Tensor:
    """Neighbours of neighbouring words. [2 n] -> [2 n]"""
    radius, angle = words[::2], words[1::2]
    r = _minus_twice_log(radius).double().sqrt().float()
    r = torch.where(angle >= 1 << 31, -r, r)  # half a turn more
    x = ((angle << 1 & _WORD) - ((angle & 1 << 30) << 2)).to(torch.float32) * HALF_TURN  # from -pi / 2 to pi / 2
    z = x * x
    cos = z * _cubic(COS, z) + 1.0
    sin = z * x * _cubic(SIN, z) + x
    return torch.stack((r * cos, r * sin), -1).flatten()


def _minus_twice_log(word: Tensor) -> Tensor:
    """-2 ln((w + 1/2) 2^-32), from 0 to 45.7: w + 1/2 is rounded to fp32, which makes 2^32 of the largest ones."""
    bits = (word.to(torch.float32) + 0.5).view(torch.int32) - (_SQRT_HALF + _BEFORE_ONE)
    exponent = bits >> 23  # from -33 to 0
    f = ((bits & 0x7FFFFF) + _SQRT_HALF).view(torch.float32) - 1.0
    square = f * f
    series = _cubic(LOG[:4], f) + square * square * _cubic(LOG[4:], f)
    return exponent.to(torch.float32) * -LN2_TWICE + f * series


def _cubic(of: tuple[float, ...], x: Tensor) -> Tensor:
    """Each product and each sum is rounded: no one contracts the operations of eager torch."""
    return (x * of[1] + of[0]) + x * x * (x * of[3] + of[2])

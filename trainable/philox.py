"""Random numbers of which any part can be drawn alone: Philox 4x32-10.

(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".)

Method. A keyed permutation of 128-bit counters: each counter gives four words of 32 bits, and nothing is carried from
one to the next. So any part of a stream can be drawn without the rest of it, on any device, by any number of threads
or processes. The key is a hash of names, `key_of("noise", seed, step, parameter)`.

A stream. Element e is word e % 4 of counter (e // 4, 0), of which the lower 32 bits come first; e < 2^63.

    bits      the word
    uniforms  (2 k + 1) 2^-24 with k the word's upper 23 bits: exact in fp32, never 0 and never 1
    normals   Box-Muller (1958) from neighbours: elements 2i and 2i + 1 are r cos(a) and r sin(a), where
              r = sqrt(-2 ln((w + 1/2) 2^-32)) of word w = 2i, and a = 2 pi 2^-32 w of word w = 2i + 1

The radius takes all 32 bits of its word: with 24 a normal would end at 5.8, and of the 1.3 G weights of a real model
some ten are to lie beyond that. It ends at 6.8.

Equal numbers. ln, cos and sin of libraries differ in their last bits, so they are written out: exact steps on integers
down to a small interval, then a polynomial (minimax, from a weighted fit of our own). Each operation is rounded to fp32
on its own, in the order that is written here, and `sqrt` is IEEE's. kernels/philox.h and kernels/cuda_blocks.py compute
the same operations in the same order, and every bit of a normal is the same there. Errors are below 5 ulp of the normal
number's exact value. (torch's own fp32 `sqrt` on the CPU is MKL's, and off by an ulp for a sixth of all numbers, so the
root is taken in fp64 and rounded, which is the same as rounding once.)

This is eager torch for any device: int64 arithmetic, in chunks, because torch has few operations on unsigned integers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainable.hashing import stable_bits

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
"""What is added to the key's halves each round: the golden ratio, and sqrt(3) - 1."""
_ROUNDS = 10
_CHUNK = 1 << 18
"""Elements drawn at a time: the eager arithmetic needs some 60 bytes for each."""

_SQRT_HALF = 0x3F3504F3
"""fp32 bits of sqrt(1/2)."""
LN2_TWICE = 1.3862943649291992
LOG = (
    0.9999996423721313,
    -0.6666786670684814,
    0.5000516772270203,
    -0.39926955103874207,
    0.3310357630252838,
    -0.29767367243766785,
    0.2885375916957855,
    -0.17959056794643402,
)
"""-2 ln(1 + f) = -2 f + f^2 (LOG[0] + LOG[1] f + ..), f from sqrt(1/2) - 1 to sqrt(2) - 1; error below 2^-25."""
TURN = 1.462918119976564e-09
"""2 pi 2^-32, as fp32 has it."""
SIN = (-0.16666655242443085, 0.008332177996635437, -0.0001951729936990887)
"""sin(x) = x + x^3 (SIN[0] + SIN[1] x^2 + ..), |x| up to pi / 4."""
COS = (0.04166664555668831, -0.001388736767694354, 2.4438451873720624e-05)
"""cos(x) = 1 - x^2 / 2 + x^4 (COS[0] + COS[1] x^2 + ..), |x| up to pi / 4."""


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
    r = _minus_twice_log(words[::2]).double().sqrt().float()
    cos, sin = _cos_sin(words[1::2])
    return torch.stack((r * cos, r * sin), -1).flatten()


def _minus_twice_log(word: Tensor) -> Tensor:
    """-2 ln((w + 1/2) 2^-32), from 0 to 45.7: w + 1/2 is rounded to fp32, which makes 1 of the largest ones."""
    u = ((word.to(torch.float32) + 0.5) * 2.0**-32).view(torch.int32)
    exponent = (u - _SQRT_HALF) >> 23  # from -33 to 0
    f = (u - (exponent << 23)).view(torch.float32) - 1.0
    return exponent.to(torch.float32) * -LN2_TWICE + (_polynomial(LOG, f) * (f * f) + f * -2.0)


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """Of the angle 2 pi 2^-32 w: of its distance to the nearest quarter of a turn, from -pi / 4 to pi / 4."""
    quarter = (word + (1 << 29)) >> 30  # from 0 to 4
    x = (word - (quarter << 30)).to(torch.float32) * TURN
    z = x * x
    sin = _polynomial(SIN, z) * (z * x) + x
    cos = _polynomial(COS, z) * (z * z) + (z * -0.5 + 1.0)
    odd = (quarter & 1).bool()
    first, second = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    left, lower = ((quarter + 1) & 2).bool(), (quarter & 2).bool()  # where cos < 0, and where sin < 0
    return torch.where(left, -first, first), torch.where(lower, -second, second)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's scheme: each product and each sum is rounded, as no one contracts the operations of eager torch."""
    y = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        y = y * x + coefficient
    return y

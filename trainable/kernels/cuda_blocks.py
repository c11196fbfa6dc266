"""The Triton functions behind `cuda.py`, which alone imports this module: it needs triton, and every machine has the
other.

What is computed, and why so, is said in trainable/quantization.py, whose eager torch is the definition: every value
here equals its value there. The method is that of blocks.h and mx.h. A tile is [B, K], a block per row, held in
registers between one load and one store, so that memory is passed over once; what several passes need (the largest of
an NVFP4 row) is read again from the cache.

    amax      the largest magnitude of a block, as an integer: the bits of non-negative floats sort as the floats do
    scale X   a power of two, and its inverse too: integer arithmetic on the exponent bits of amax, no log2 and no
              division. 1 / X is always a normal number; X itself may be 2^-127, a subnormal, which is why it is built
              from bits
    rounding  (y + 2^23 step) - 2^23 step: the adder rounds to nearest even at the step of y's binade

What a GPU's compiler could break, and why it does not:
- fma(a, b, c) for a * b + c skips a rounding. Launches say enable_fp_fusion=False. Nor is there a product that feeds a
  sum here: y is clamped as an integer between its product and the adder. (The sum of squares in a norm is the
  exception, and has no exact value.)
- The exponential in SwiGLU is the GPU's approximate one, as e^x has no exact value either; what is quantised is
  quantised exactly.
- Flushing of subnormals: Triton emits mul, add and div without .ftz. `tl.div_rn` and `tl.sqrt_rn` round to nearest; `/`
  and `tl.sqrt` are approximate.
- bf16 travels as int16, its bits, which are the upper half of fp32: the rounding to it is written out, and is that of
  torch.
A test reads the assembly for the first two.

Shapes: B = blocks of a tile, K = elements of a block.
"""

# mypy: ignore-errors
# These functions are a language of their own, whose arguments have no Python types.

import triton
import triton.language as tl

MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # fp32 bits without the sign
EXPONENT = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
FLUSHED = tl.constexpr((127 - 100) << 23)
"""Bits of 2^-100: NVFP4 rows, or tensors, below it become zero."""


@triton.jit
def read(x, at, seen):
    """Elements as bits of fp32."""
    value = tl.load(x + at, mask=seen, other=0)
    if x.dtype.element_ty == tl.int16:
        return value.to(tl.int32) << 16
    else:
        return value.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def write(out, at, seen, bits):
    if out.dtype.element_ty == tl.int16:
        tl.store(out + at, (nearest(bits, out) >> 16).to(tl.int16), mask=seen)
    else:
        tl.store(out + at, number(bits).to(out.dtype.element_ty), mask=seen)


@triton.jit
def number(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def nearest(bits, like):
    """The nearest even value of bf16 where that is what `like` points to. The sum would carry a NaN into the sign, so
    NaN is set apart."""
    if like.dtype.element_ty == tl.int16:
        carried = (bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000
        return tl.where((bits & MAGNITUDE) > EXPONENT, NAN, carried)
    else:
        return bits


@triton.jit
def rounded(y, MANTISSA: tl.constexpr):
    """Non-negative y on the grid of E2M1 (MANTISSA = 1) or E4M3 (3), saturating."""
    SMALLEST_NORMAL: tl.constexpr = 0x3F800000 if MANTISSA == 1 else 0x3C800000
    LARGEST: tl.constexpr = 0x40C00000 if MANTISSA == 1 else 0x43E00000
    bits = tl.minimum(y.to(tl.int32, bitcast=True), LARGEST)
    binade = tl.maximum(bits & EXPONENT, SMALLEST_NORMAL)
    magic = number(binade + ((23 - MANTISSA) << 23))
    return (number(bits) + magic) - magic


@triton.jit
def mx(bits, addend, MANTISSA: tl.constexpr):
    """A tile of MX blocks, bits to bits. All products are by powers of two, and exact but where the rounding yields 0
    anyway."""
    EMAX: tl.constexpr = 2 if MANTISSA == 1 else 8
    a = bits & MAGNITUDE
    amax = tl.max(a, axis=1, keep_dims=True)  # [B, 1]
    # Twice the scale: a normal number also where the scale is 2^-127, and finite where amax is.
    twice = (tl.maximum(amax, EMAX << 23) + (addend - ((EMAX - 1) << 23))) & EXPONENT
    scale = number(tl.maximum(twice - (1 << 23), 1 << 22))
    inverse = number(twice ^ EXPONENT)  # of exponent e the inverse has 255 - e
    y = rounded(number(a) * inverse, MANTISSA) * scale
    return tl.where(amax < EXPONENT, y.to(tl.int32, bitcast=True) | (bits ^ a), NAN)


@triton.jit
def nv(bits, top):
    """A tile of NVFP4 blocks under the outer scale of `top`, the bits of the largest magnitude of their row or tensor.

    These scales are no powers of two: each quotient and product below is rounded to fp32 on its own, as in the
    definition.
    """
    a = bits & MAGNITUDE
    amax = tl.max(a, axis=1, keep_dims=True)  # [B, 1]
    outer = tl.where(top < FLUSHED, 1.0, tl.div_rn(number(top), 2688.0))  # 448 * 6
    scale = rounded(tl.div_rn(tl.div_rn(number(amax), 6.0), outer), 3) * outer
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, scale))
    y = rounded(number(a) * inverse, 1) * scale
    return tl.where(top < EXPONENT, y.to(tl.int32, bitcast=True) | (bits ^ a), NAN)


@triton.jit
def cubic(a, b, c, d, x, square):
    return (x * b + a) + square * (x * d + c)


@triton.jit
def minus_twice_log(word):
    """As in trainable/philox.py: the same operations in the same order."""
    bits = (word.to(tl.float32) + 0.5).to(tl.int32, bitcast=True) - (0x3F3504F3 + (32 << 23))
    f = number((bits & 0x7FFFFF) + 0x3F3504F3) - 1.0
    square = f * f
    low = cubic(-1.9999998807907104, 1.000006914138794, -0.6667121648788452, 0.49943119287490845, f, square)
    high = cubic(-0.3976847231388092, 0.34424853324890137, -0.3267628848552704, 0.207574263215065, f, square)
    return (bits >> 23).to(tl.float32) * -1.3862943649291992 + f * (low + square * square * high)


@triton.jit
def normal(radius, angle):
    """Two normals of each pair of words."""
    r = tl.sqrt_rn(minus_twice_log(radius)).to(tl.int32, bitcast=True)
    turn = angle.to(tl.int32, bitcast=True)
    r = number(r ^ (turn & -0x80000000))
    x = (turn << 1).to(tl.float32) * 7.31459059988282e-10
    z = x * x
    square = z * z
    cos = z * cubic(-0.4999993145465851, 0.041663989424705505, -0.001385592739097774, 2.31943868129747e-05, z, square)
    sin = cubic(-0.16666661202907562, 0.008333087898790836, -0.00019811112724710256, 2.6089326183864614e-06, z, square)
    return r * (cos + 1.0), r * (z * x * sin + x)


@triton.jit
def normals(key, block, B: tl.constexpr):
    """A tile of [B, 32] of a stream, from its blocks of four [B, 8]."""
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, low, high, low * 0, low * 0)
    one, two = normal(a, b)
    three, four = normal(c, d)
    return tl.reshape(tl.join(tl.join(one, three), tl.join(two, four)), [B, 32])


@triton.jit
def tile(B: tl.constexpr, K: tl.constexpr):
    """Places of a tile's elements, from 0."""
    return tl.arange(0, B)[:, None] * K + tl.arange(0, K)[None, :]


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["addend"])
def mx_tensor(x, out, count, addend, MANTISSA: tl.constexpr, B: tl.constexpr):
    """Blocks of 32 side by side, whatever the rows."""
    at = tl.program_id(0).to(tl.int64) * (B * 32) + tile(B, 32)
    write(out, at, at < count, mx(read(x, at, at < count), addend, MANTISSA))


@triton.jit
def nv_tensor(x, out, count, top, B: tl.constexpr):
    """Blocks of 16 side by side under one outer scale, that of the number at `top`."""
    at = tl.program_id(0).to(tl.int64) * (B * 16) + tile(B, 16)
    common = tl.load(top).to(tl.int32, bitcast=True) & MAGNITUDE
    write(out, at, at < count, nv(read(x, at, at < count), common))


@triton.jit
def nv_rows(x, out, columns, B: tl.constexpr):
    """A row for each program: its largest magnitude, then its blocks, which the first pass left in the cache."""
    start = tl.program_id(0).to(tl.int64) * columns
    tops = tl.zeros([B, 16], tl.int32)
    for first in range(0, columns, B * 16):
        at = first + tile(B, 16)
        tops = tl.maximum(tops, read(x, start + at, at < columns) & MAGNITUDE)
    top = tl.max(tl.max(tops, axis=1), axis=0)
    for first in range(0, columns, B * 16):
        at = first + tile(B, 16)
        write(out, start + at, at < columns, nv(read(x, start + at, at < columns), top))


@triton.jit(do_not_specialize=["addend"])
def swiglu_tensor(gate, up, out, count, addend, FORMAT: tl.constexpr, B: tl.constexpr):
    """silu(gate) * up, then blocks of 32 side by side on the grid of FORMAT (an MX one, or -1: none). silu is rounded
    to the dtype before the product, as in torch."""
    at = tl.program_id(0).to(tl.int64) * (B * 32) + tile(B, 32)
    seen = at < count
    x = number(read(gate, at, seen))
    silu = nearest(tl.div_rn(x, 1.0 + tl.exp(-x)).to(tl.int32, bitcast=True), gate)
    y = nearest((number(silu) * number(read(up, at, seen))).to(tl.int32, bitcast=True), gate)
    if FORMAT == 0:
        y = mx(y, addend, 1)
    elif FORMAT == 1:
        y = mx(y, addend, 3)
    write(out, at, seen, y)


@triton.jit(do_not_specialize=["addend"])
def norm_rows(x, weight, out, inverse, epsilon, addend, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, N: tl.constexpr):
    """A row for each program: RMSNorm, then its output on the grid of FORMAT (-1: none). Between the two products the
    normalised value is rounded to the dtype of x, as in transformers. N is a power of two that holds COLUMNS, and in
    one dimension, so that the order of the sum is the same for all formats."""
    start = tl.program_id(0).to(tl.int64) * COLUMNS
    at = tl.arange(0, N)
    seen = at < COLUMNS
    value = number(read(x, start + at, seen))
    mean = tl.div_rn(tl.sum(value * value, axis=0), COLUMNS * 1.0)
    r = tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))
    tl.store(inverse + tl.program_id(0), r)
    normal = number(nearest((value * r).to(tl.int32, bitcast=True), x))
    y = nearest((number(read(weight, at, seen)) * normal).to(tl.int32, bitcast=True), x)
    if FORMAT == 0:
        y = tl.reshape(mx(tl.reshape(y, [N // 32, 32]), addend, 1), [N])
    elif FORMAT == 1:
        y = tl.reshape(mx(tl.reshape(y, [N // 32, 32]), addend, 3), [N])
    elif FORMAT == 2:
        y = tl.reshape(nv(tl.reshape(y, [N // 16, 16]), tl.max(y & MAGNITUDE, axis=0)), [N])
    write(out, start + at, seen, y)


@triton.jit(do_not_specialize=["addend", "key", "start", "per"])
def noised_tensor(
    base,
    clean,
    unit,
    out,
    sums,
    count,
    per,
    key,
    start,
    sigma,
    addend,
    FORMAT: tl.constexpr,
    SCALED: tl.constexpr,
    MEASURED: tl.constexpr,
    B: tl.constexpr,
):
    """base + normal * sigma * unit, cast, and on the grid of FORMAT (an MX one, or -1: none): one pass. `sums` gets of
    each program the sum of squared changes against `clean`, and the number of changes."""
    first = tl.program_id(0).to(tl.int64) * (B * 32)
    at = first + tile(B, 32)
    seen = at < count
    block = (start + first) // 4 + tile(B, 8)
    shift = normals(key, block, B) * sigma
    if SCALED:
        shift *= tl.load(unit + at // per, mask=seen, other=0)
    y = nearest((number(read(base, at, seen)) + shift).to(tl.int32, bitcast=True), base)
    if FORMAT == 0:
        y = mx(y, addend, 1)
    elif FORMAT == 1:
        y = mx(y, addend, 3)
    write(out, at, seen, y)
    if MEASURED:
        change = tl.where(seen, number(nearest(y, out)) - number(read(clean, at, seen)), 0.0)
        tl.store(sums + 2 * tl.program_id(0), tl.sum(tl.sum(change * change, axis=1), axis=0))
        tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(tl.sum((change != 0.0).to(tl.float32), axis=1), axis=0))

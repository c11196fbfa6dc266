// Fake quantisation on a CPU in one pass: a block is read, its scale taken from the bits of its largest magnitude, its elements rounded
// and written, all in registers. What is computed, and why so, is said in trainable/quantization.py, whose eager torch is the definition:
// every value here equals its value there.
//
//   amax      the largest magnitude of the block, as an integer: the bits of non-negative floats sort as the floats do
//   scale X   OCP MX v1.0, 6.3: a power of two, the exponent bits of amax + addend (the scale rule), less emax. No log2, no division
//   rounding  (a + 2^23 step) - 2^23 step: the adder rounds to nearest even at the step of a's binade, which is a's exponent bits, but
//             at least those of the grid's smallest normal times X. So elements are rounded where they lie, without scaling them first
//
// Blocks near the ends of fp32, where those products would leave it, and blocks with NaN or Inf go through plain loops that scale first;
// they are rare. bf16 with E2M1 elements, the case of training, is computed in 16-bit integers, of which a register holds twice as many.
//
// Not to be compiled with -ffast-math or with contraction of a * b + c: both skip roundings on which the method rests.

#pragma once

#include "vectors.h"

namespace {

// The grid of a tiny float; `emax`: the exponent of its largest value.
struct E2M1 { static constexpr int mantissa = 1, emax = 2; static constexpr uint32_t smallest_normal = 0x3F800000, largest = 0x40C00000; };
struct E4M3 { static constexpr int mantissa = 3, emax = 8; static constexpr uint32_t smallest_normal = 0x3C800000, largest = 0x43E00000; };
constexpr uint32_t kOne = 0x3F800000;  // bits of 1.0f: the difference to it turns bits of X into bits of a multiple of X

// 16 elements of fp32, or of bf16, which is the upper half of one.
inline u32x16 read16(const float* x) { return load<u32x16>(x); }
inline u32x16 read16(const uint16_t* x) { return __builtin_convertvector(load<u16x16>(x), u32x16) << 16; }
inline void write16(float* out, u32x16 v) { store(out, v); }
// The upper half is all there is where the value is exact in bf16, as everything from MX is.
inline void write16(uint16_t* out, u32x16 v) { store(out, __builtin_convertvector(v >> 16, u16x16)); }
// To nearest even, as torch does; not for NaN.
inline void write16_near(float* out, u32x16 v) { store(out, v); }
inline void write16_near(uint16_t* out, u32x16 v) { write16(out, v + (0x7FFF + ((v >> 16) & 1))); }

inline u32x16 larger_halves(u32x16 a, u32x16 b) { return bits_as<u32x16>(larger(bits_as<u16x32>(a), bits_as<u16x32>(b))); }

// The largest of 16 lanes, in all of them.
inline u32x16 spread_largest(u32x16 v) {
  v = larger(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return larger(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
}

// --- power-of-two scales (MX) --------------------------------------------------------------------------------------------------------

// 16 elements on the grid in units of X: non-negative, or NaN, which stays.
template <class Grid>
inline f32x16 rounded(f32x16 y) {
  const f32x16 largest = f32x16{} + float_of(Grid::largest);
  y = largest < y ? largest : y;
  const u32x16 binade = larger(bits_as<u32x16>(y) & kExponent, u32x16{} + Grid::smallest_normal);
  const f32x16 magic = bits_as<f32x16>(binade + (uint32_t{kFractionBits - Grid::mantissa} << kFractionBits));
  return (y + magic) - magic;
}

// 16 elements, scaled before and after they are rounded; with their signs.
template <class Grid>
inline u32x16 scaled_and_rounded(u32x16 v, float scale, float inverse) {
  return bits_as<u32x16>(rounded<Grid>(bits_as<f32x16>(v & kMagnitude) * inverse) * scale) | (v & kSign);
}

// Any block of 32, scaled to units of X before it is rounded.
template <class Grid, class T>
__attribute__((noinline)) void mx_block_anywhere(const T* x, T* out, uint32_t amax, uint32_t addend) {
  // Twice the scale: a normal number also where the scale is 2^-127, and finite where amax is.
  const uint32_t lowest = Grid::emax << kFractionBits;
  const uint32_t twice = (std::max(amax, lowest) + addend - ((Grid::emax - 1) << kFractionBits)) & kExponent;
  const float scale = amax < kExponent ? 0.5f * float_of(twice) : kNan;
  const u32x16 low = read16(x), high = read16(x + 16);
  write16(out, scaled_and_rounded<Grid>(low, scale, 1.0f / scale));
  write16(out + 16, scaled_and_rounded<Grid>(high, scale, 1.0f / scale));
}

// 16 elements (bits) on the grid, where they lie.
template <class Grid>
inline u32x16 mx_rounded(u32x16 v, u32x16 scale) {
  const u32x16 a = smaller(v & kMagnitude, scale + (Grid::largest - kOne));
  const u32x16 binade = larger(a & kExponent, scale - (kOne - Grid::smallest_normal));
  const f32x16 magic = bits_as<f32x16>(binade + (uint32_t{kFractionBits - Grid::mantissa} << kFractionBits));
  return bits_as<u32x16>((bits_as<f32x16>(a) + magic) - magic) | (v & kSign);
}

template <class Grid, class T>
inline void mx_block(const T* x, T* out, uint32_t addend) {
  const u32x16 low = read16(x), high = read16(x + 16);
  const u32x16 amax = spread_largest(larger(low & kMagnitude, high & kMagnitude));
  constexpr uint32_t least = 16u << kFractionBits, most = 228u << kFractionBits;  // here all of the above are normal numbers
  if (amax[0] - least >= most - least) return mx_block_anywhere<Grid>(x, out, amax[0], addend);
  const u32x16 scale = ((amax + addend) & kExponent) - (uint32_t{Grid::emax} << kFractionBits);
  write16(out, mx_rounded<Grid>(low, scale));
  write16(out + 16, mx_rounded<Grid>(high, scale));
}

// --- E2M1 in 16-bit integers -----------------------------------------------------------------------------------------------------------
//
// From X upwards the grid has one mantissa bit in every binade, so that rounding is an integer add to a's own bits, and 6 X is the end;
// below X there are 0, X/2 and X, with ties at X/4 (to 0) and 3X/4 (to X).

// A block on the grid; `four`: the bits of 4 X in all lanes.
inline u16x32 e2m1_rounded(u16x32 v, u16x32 four) {
  const u16x32 a = v & 0x7FFF;
  const u16x32 one = four - 0x100, half = four - 0x180, quarter = four - 0x200, three_quarters = four - 0x140, six = four + 0x40;
  const u16x32 near = (a + 0x1F + ((a >> 6) & 1)) & 0xFFC0, nothing = {};
  const u16x32 rounded = a < three_quarters ? (a > quarter ? half : nothing) : larger(smaller(near, six), one);
  return rounded | (v & 0x8000);
}

// 4 X from amax in all lanes. The addend's lower half is all ones or nothing and meets zeros: it never carries.
inline u16x32 four_of(u32x16 amax, uint32_t addend) { return (bits_as<u16x32>(amax) + static_cast<uint16_t>(addend >> 16)) & 0x7F80; }

// Each half of every 32 bits becomes the larger one.
inline u32x16 larger_half(u32x16 w) { return larger_halves(w, (w << 16) | (w >> 16)); }

// One quarter of the lanes, four times.
template <int i>
inline u32x16 quarter(u32x16 v) {
  constexpr int n = 4 * i;
  return __builtin_shufflevector(v, v, n, n + 1, n + 2, n + 3, n, n + 1, n + 2, n + 3, n, n + 1, n + 2, n + 3, n, n + 1, n + 2, n + 3);
}

// Neighbouring blocks; any number of them, one by one.
template <class Grid, class T>
inline void mx_blocks(const T* x, T* out, int64_t blocks, uint32_t addend) {
  for (int64_t block = 0; block < blocks; ++block) mx_block<Grid>(x + block * 32, out + block * 32, addend);
}

// Four at a time: finding the largest magnitude is a third of the work, and its later steps are shared.
template <>
inline void mx_blocks<E2M1, uint16_t>(const uint16_t* x, uint16_t* out, int64_t blocks, uint32_t addend) {
  constexpr uint16_t least = 16 << 7, most = 255 << 7;
  int64_t block = 0;
  for (; block + 4 <= blocks; block += 4) {
    u16x32 v[4];
    u32x16 a[4];  // pairs of lanes: shuffles of 32 bits are cheaper than those of 16
    for (int i = 0; i < 4; ++i) a[i] = bits_as<u32x16>((v[i] = load<u16x32>(x + (block + i) * 32)) & 0x7FFF);
    u32x16 pair[2];  // a block in each half
    for (int i = 0; i < 2; ++i) {
      pair[i] = larger_halves(
          __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
          __builtin_shufflevector(a[2 * i], a[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    }
    u32x16 w = larger_halves(  // a block in each quarter
        __builtin_shufflevector(pair[0], pair[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
        __builtin_shufflevector(pair[0], pair[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
    w = larger_halves(w, __builtin_shufflevector(w, w, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    w = larger_half(larger_halves(w, __builtin_shufflevector(w, w, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)));
    const u32x16 above = bits_as<u32x16>(bits_as<u16x32>(w) - least);
    bool ordinary = true;
    for (int i = 0; i < 16; i += 4) ordinary &= static_cast<uint16_t>(above[i]) < most - least;
    if (!ordinary) {
      for (int i = 0; i < 4; ++i) mx_block<E2M1>(x + (block + i) * 32, out + (block + i) * 32, addend);
      continue;
    }
    const u32x16 four = bits_as<u32x16>(four_of(w, addend));
    const u16x32 fours[] = {bits_as<u16x32>(quarter<0>(four)), bits_as<u16x32>(quarter<1>(four)), bits_as<u16x32>(quarter<2>(four)),
                            bits_as<u16x32>(quarter<3>(four))};
    for (int i = 0; i < 4; ++i) store(out + (block + i) * 32, e2m1_rounded(v[i], fours[i]));
  }
  for (; block < blocks; ++block) mx_block<E2M1>(x + block * 32, out + block * 32, addend);
}

// --- two scales (NVFP4) --------------------------------------------------------------------------------------------------------------

inline float nan_of(float) { return kNan; }
inline uint16_t nan_of(uint16_t) { return 0x7FC0; }

constexpr float kFlushed = 0x1p-100f;  // rows below it become zero: products of the two scales would no longer be normal

template <class T>
uint32_t largest_of(const T* x, int64_t n) {
  u32x16 amax = {};
  for (int64_t i = 0; i < n; i += 16) amax = larger(amax, read16(x + i) & kMagnitude);
  return spread_largest(amax)[0];
}

inline float outer_scale(uint32_t amax) {
  const float top = float_of(amax);
  return top < kFlushed ? 1.0f : top / (448.0f * 6.0f);
}

// Up to 16 blocks of 16 side by side: their scales are computed together.
template <class T>
inline void nv_blocks(const T* x, T* out, int64_t blocks, float outer) {
  float amax[16] = {}, scales[16], inverses[16];
  for (int64_t block = 0; block < blocks; ++block) amax[block] = float_of(spread_largest(read16(x + 16 * block) & kMagnitude)[0]);
  const f32x16 scale = rounded<E4M3>(load<f32x16>(amax) / 6.0f / outer) * outer, nothing = {};
  store(scales, scale);
  store(inverses, scale == nothing ? nothing : 1.0f / scale);
  for (int64_t block = 0; block < blocks; ++block) {
    write16_near(out + 16 * block, scaled_and_rounded<E2M1>(read16(x + 16 * block), scales[block], inverses[block]));
  }
}

// --- rows ------------------------------------------------------------------------------------------------------------------------------

enum Format : int64_t { kNone = -1, kMxfp4, kMxfp8, kNvfp4 };  // the codes of FORMATS in cpu.py

template <class T>
inline void nv_row(const T* x, T* out, int64_t columns, float outer) {
  if (outer - outer != 0) std::fill(out, out + columns, nan_of(T{}));
  else for (int64_t k = 0; k < columns; k += 256) nv_blocks(x + k, out + k, std::min<int64_t>(16, (columns - k) / 16), outer);
}

// One row in its own right; `out` may be `x`.
template <class T>
inline void quantize_row(const T* x, T* out, int64_t columns, int64_t format, uint32_t addend) {
  if (format == kNvfp4) return nv_row(x, out, columns, outer_scale(largest_of(x, columns)));
  if (format == kMxfp4) mx_blocks<E2M1>(x, out, columns / 32, addend);
  else mx_blocks<E4M3>(x, out, columns / 32, addend);
}

}  // namespace

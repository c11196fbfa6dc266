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
// they are rare. E2M1 elements of bf16, the case of training, are computed in 16-bit integers, of which a register holds twice as many.
//
// Not to be compiled with -ffast-math or with contraction of a * b + c: both skip roundings on which the method rests.

#pragma once

#include <vector>

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
// So that the upper half is the nearest bf16 number, of two the even one, as torch rounds; not for NaN.
inline u32x16 near(u32x16 v) { return v + (0x7FFF + ((v >> 16) & 1)); }

inline u32x16 larger_halves(u32x16 a, u32x16 b) { return bits_as<u32x16>(larger(bits_as<u16x32>(a), bits_as<u16x32>(b))); }

// The largest of 16 lanes, in all of them.
inline u32x16 spread_largest(u32x16 v) {
  v = larger(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return larger(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
}

// Two vectors, or two blocks in each, of which each half (quarter) becomes half as long: `larger_of` of its two halves.
template <u32x16 larger_of(u32x16, u32x16)>
inline u32x16 merged_halves(u32x16 a, u32x16 b) {
  return larger_of(
      __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
      __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
}
template <u32x16 larger_of(u32x16, u32x16)>
inline u32x16 merged_quarters(u32x16 a, u32x16 b) {
  return larger_of(
      __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
      __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
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
inline u32x16 scaled_and_rounded(u32x16 v, f32x16 scale, f32x16 inverse) {
  return bits_as<u32x16>(rounded<Grid>(bits_as<f32x16>(v & kMagnitude) * inverse) * scale) | (v & kSign);
}

// Any block of 32, scaled to units of X before it is rounded.
template <class Grid, class T>
__attribute__((noinline)) void mx_block_anywhere(const T* x, T* out, uint32_t amax, uint32_t addend) {
  // Twice the scale: a normal number also where the scale is 2^-127, and finite where amax is.
  const uint32_t lowest = Grid::emax << kFractionBits;
  const uint32_t twice = (std::max(amax, lowest) + addend - ((Grid::emax - 1) << kFractionBits)) & kExponent;
  const f32x16 scale = f32x16{} + (amax < kExponent ? 0.5f * float_of(twice) : kNan);
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

// --- bf16 ------------------------------------------------------------------------------------------------------------------------------
//
// Of each 32 bits the upper half is an fp32 number once the lower half is cleared, and so is the lower half once it is shifted up: so
// elements are computed in fp32 without being moved to other lanes.

inline u32x16 uppers(u16x32 v) { return bits_as<u32x16>(v) & 0xFFFF0000; }
inline u32x16 lowers(u16x32 v) { return bits_as<u32x16>(v) << 16; }
inline u16x32 together(u32x16 upper, u32x16 lower) { return bits_as<u16x32>((upper & 0xFFFF0000) | (lower >> 16)); }

// Each half of every 32 bits becomes the larger one.
inline u32x16 larger_half(u32x16 w) { return larger_halves(w, (w << 16) | (w >> 16)); }

// A block on the grid; `top`: the bits of X 2^emax in all lanes.
template <class Grid>
inline u16x32 block_rounded(u16x32 v, u16x32 top) {
  const u32x16 scale = uppers(top) - (uint32_t{Grid::emax} << kFractionBits);
  return together(mx_rounded<Grid>(uppers(v), scale), mx_rounded<Grid>(lowers(v), scale));
}

// E2M1 in 16-bit integers. From X upwards the grid has one mantissa bit in every binade, so that rounding is an integer add to a's own bits,
// and 6 X is the end; below X there are 0, X/2 and X, with ties at X/4 (to 0) and 3X/4 (to X).
template <>
inline u16x32 block_rounded<E2M1>(u16x32 v, u16x32 four) {
  const u16x32 a = v & 0x7FFF;
  const u16x32 one = four - 0x100, half = four - 0x180, quarter = four - 0x200, three_quarters = four - 0x140, six = four + 0x40;
  const u16x32 near = (a + 0x1F + ((a >> 6) & 1)) & 0xFFC0, nothing = {};
  const u16x32 rounded = a < three_quarters ? (a > quarter ? half : nothing) : larger(smaller(near, six), one);
  return rounded | (v & 0x8000);
}

// X 2^emax from amax in all lanes. The addend's lower half is all ones or nothing and meets zeros: it never carries.
inline u16x32 top_of(u32x16 amax, uint32_t addend) { return (bits_as<u16x32>(amax) + static_cast<uint16_t>(addend >> 16)) & 0x7F80; }

// Exponents of amax for which all of the above are normal numbers.
template <class Grid> constexpr uint16_t kLeast = 16 << 7;
template <class Grid> constexpr uint16_t kMost = 228 << 7;
template <> constexpr uint16_t kMost<E2M1> = 255 << 7;

// One quarter of the lanes, four times.
template <int i>
inline u32x16 quarter(u32x16 v) {
  constexpr int n = 4 * i;
  return __builtin_shufflevector(v, v, n, n + 1, n + 2, n + 3, n, n + 1, n + 2, n + 3, n, n + 1, n + 2, n + 3, n, n + 1, n + 2, n + 3);
}

// Neighbouring blocks; any number of them, one by one.
template <class Grid>
inline void mx_blocks(const float* x, float* out, int64_t blocks, uint32_t addend) {
  for (int64_t block = 0; block < blocks; ++block) mx_block<Grid>(x + block * 32, out + block * 32, addend);
}

// Four at a time: finding the largest magnitude is a third of the work, and its later steps are shared.
template <class Grid>
inline void mx_blocks(const uint16_t* x, uint16_t* out, int64_t blocks, uint32_t addend) {
  int64_t block = 0;
  for (; block + 4 <= blocks; block += 4) {
    u16x32 v[4];
    u32x16 a[4];  // pairs of lanes: shuffles of 32 bits are cheaper than those of 16
    for (int i = 0; i < 4; ++i) a[i] = bits_as<u32x16>((v[i] = load<u16x32>(x + (block + i) * 32)) & 0x7FFF);
    u32x16 pair[2];  // a block in each half
    for (int i = 0; i < 2; ++i) pair[i] = merged_halves<larger_halves>(a[2 * i], a[2 * i + 1]);
    u32x16 w = merged_quarters<larger_halves>(pair[0], pair[1]);  // a block in each quarter
    w = larger_halves(w, __builtin_shufflevector(w, w, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    w = larger_half(larger_halves(w, __builtin_shufflevector(w, w, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)));
    const u32x16 above = bits_as<u32x16>(bits_as<u16x32>(w) - kLeast<Grid>);
    bool ordinary = true;
    for (int i = 0; i < 16; i += 4) ordinary &= static_cast<uint16_t>(above[i]) < kMost<Grid> - kLeast<Grid>;
    if (!ordinary) {
      for (int i = 0; i < 4; ++i) mx_block<Grid>(x + (block + i) * 32, out + (block + i) * 32, addend);
      continue;
    }
    const u32x16 top = bits_as<u32x16>(top_of(w, addend));
    const u16x32 tops[] = {bits_as<u16x32>(quarter<0>(top)), bits_as<u16x32>(quarter<1>(top)), bits_as<u16x32>(quarter<2>(top)),
                           bits_as<u16x32>(quarter<3>(top))};
    for (int i = 0; i < 4; ++i) store(out + (block + i) * 32, block_rounded<Grid>(v[i], tops[i]));
  }
  for (; block < blocks; ++block) mx_block<Grid>(x + block * 32, out + block * 32, addend);
}

// --- two scales (NVFP4) --------------------------------------------------------------------------------------------------------------

constexpr float kFlushed = 0x1p-100f;  // rows below it become zero: products of the two scales would no longer be normal

// The largest magnitude of n elements, n a multiple of 16: in four strands, so that none waits for another.
inline uint32_t largest_of(const float* x, int64_t n) {
  u32x16 amax[4] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int j = 0; j < 4; ++j) amax[j] = larger(amax[j], read16(x + i + 16 * j) & kMagnitude);
  }
  for (; i < n; i += 16) amax[0] = larger(amax[0], read16(x + i) & kMagnitude);
  return spread_largest(larger(larger(amax[0], amax[1]), larger(amax[2], amax[3])))[0];
}
inline uint32_t largest_of(const uint16_t* x, int64_t n) {
  u16x32 amax[4] = {};
  int64_t i = 0;
  for (; i + 128 <= n; i += 128) {
    for (int j = 0; j < 4; ++j) amax[j] = larger(amax[j], load<u16x32>(x + i + 32 * j) & 0x7FFF);
  }
  u32x16 rest = bits_as<u32x16>(larger(larger(amax[0], amax[1]), larger(amax[2], amax[3])));
  rest = larger_half(rest) & 0xFFFF0000;
  for (; i < n; i += 16) rest = larger(rest, read16(x + i) & kMagnitude);
  return spread_largest(rest)[0];
}

inline float outer_scale(uint32_t amax) {
  const float top = float_of(amax);
  return top < kFlushed ? 1.0f : top / (448.0f * 6.0f);
}

// The largest magnitudes of 16 blocks of 16 side by side, in 16 lanes: a tree that halves the lanes of a block and doubles the blocks of a
// vector, from 8 vectors of 2 blocks on.
template <u32x16 larger_of(u32x16, u32x16)>
inline u32x16 largest_of_each(const u32x16* two) {
  u32x16 four[4], eight[2];
  for (int i = 0; i < 4; ++i) four[i] = merged_quarters<larger_of>(two[2 * i], two[2 * i + 1]);
  for (int i = 0; i < 2; ++i) {
    const u32x16 a = four[2 * i], b = four[2 * i + 1];
    eight[i] = larger_of(
        __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),
        __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31));
  }
  return larger_of(
      __builtin_shufflevector(eight[0], eight[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
      __builtin_shufflevector(eight[0], eight[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
}
inline u32x16 nv_largest(const float* x) {
  u32x16 two[8];
  for (int i = 0; i < 8; ++i) two[i] = merged_halves<larger>(read16(x + 32 * i) & kMagnitude, read16(x + 32 * i + 16) & kMagnitude);
  return largest_of_each<larger>(two);
}
inline u32x16 nv_largest(const uint16_t* x) {
  u32x16 two[8];
  for (int i = 0; i < 8; ++i) two[i] = bits_as<u32x16>(load<u16x32>(x + 32 * i) & 0x7FFF);
  return larger_half(largest_of_each<larger_halves>(two)) & 0xFFFF0000;
}

// Two neighbouring blocks under their scales.
inline void nv_pair(const float* x, float* out, const float* scales, const float* inverses) {
  for (int i = 0; i < 2; ++i) write16(out + 16 * i, scaled_and_rounded<E2M1>(read16(x + 16 * i), f32x16{} + scales[i], f32x16{} + inverses[i]));
}
inline void nv_pair(const uint16_t* x, uint16_t* out, const float* scales, const float* inverses) {
  const auto halves = [](const float* of) {
    return __builtin_shufflevector(f32x16{} + of[0], f32x16{} + of[1], 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const u16x32 v = load<u16x32>(x);
  const f32x16 scale = halves(scales), inverse = halves(inverses);
  store(out, together(near(scaled_and_rounded<E2M1>(uppers(v), scale, inverse)), near(scaled_and_rounded<E2M1>(lowers(v), scale, inverse))));
}

// The largest magnitude of each block, for any number of blocks side by side; of missing ones, up to a multiple of 16, it is 0.
template <class T>
inline void nv_largest_of(const T* x, int64_t blocks, float* amax) {
  int64_t block = 0;
  for (; block + 16 <= blocks; block += 16) store(amax + block, nv_largest(x + 16 * block));
  if (block == blocks) return;
  T padded[256] = {};
  std::copy(x + 16 * block, x + 16 * blocks, padded);
  store(amax + block, nv_largest(padded));
}

template <class T>
inline void nv_round(const T* x, T* out, int64_t blocks, const float* scales, const float* inverses) {
  int64_t block = 0;
  for (; block + 2 <= blocks; block += 2) nv_pair(x + 16 * block, out + 16 * block, scales + block, inverses + block);
  if (block == blocks) return;
  T padded[32] = {};
  std::copy_n(x + 16 * block, 16, padded);
  nv_pair(padded, padded, scales + block, inverses + block);
  std::copy_n(padded, 16, out + 16 * block);
}

// Rows side by side, each under the outer scale `common`, or where that is negative under one of its own. Blocks are taken 16 at a time,
// whatever the rows. Where an outer scale is not finite, the scales are NaN, and so is all under them.
template <class T>
inline void nv_rows(const T* x, T* out, int64_t rows, int64_t columns, float common) {
  thread_local std::vector<float> scratch;
  const int64_t of_row = columns / 16, blocks = rows * of_row, room = (blocks + 15) / 16 * 16;
  scratch.assign(3 * room, 1.0f);
  float *scales = scratch.data(), *outers = scales + room, *inverses = outers + room;
  nv_largest_of(x, blocks, scales);
  for (int64_t row = 0; row < rows; ++row) {
    uint32_t amax = 0;
    for (int64_t block = row * of_row; block < (row + 1) * of_row; ++block) amax = std::max(amax, bits_of(scales[block]));
    std::fill_n(outers + row * of_row, of_row, common < 0 ? outer_scale(amax) : common);
  }
  for (int64_t block = 0; block < blocks; block += 16) {
    const f32x16 outer = load<f32x16>(outers + block), nothing = {};
    const f32x16 scale = rounded<E4M3>(load<f32x16>(scales + block) / 6.0f / outer) * outer;
    store(scales + block, scale);
    store(inverses + block, scale == nothing ? nothing : 1.0f / scale);
  }
  nv_round(x, out, blocks, scales, inverses);
}

// --- rows ------------------------------------------------------------------------------------------------------------------------------

enum Format : int64_t { kNone = -1, kMxfp4, kMxfp8, kNvfp4 };  // the codes of FORMATS in cpu.py

// One row in its own right; `out` may be `x`.
template <class T>
inline void quantize_row(const T* x, T* out, int64_t columns, int64_t format, uint32_t addend) {
  if (format == kNvfp4) return nv_rows(x, out, 1, columns, -1.0f);
  if (format == kMxfp4) mx_blocks<E2M1>(x, out, columns / 32, addend);
  else mx_blocks<E4M3>(x, out, columns / 32, addend);
}

}  // namespace

// What the formats have in common: their grids, reading and writing elements, and rounding. What is computed, and why
// so, is said in trainable/quantization.py, whose eager torch is the definition: every value in mx.h and nvfp4.h
// equals its value there.
//
//   amax      the largest magnitude of a block, as an integer: the bits of non-negative floats sort as the floats do
//   rounding  (a + 2^23 step) - 2^23 step: the adder rounds to nearest even at the step of a's binade, which is a's
//             exponent bits, but at least those of the grid's smallest normal number
//
// A block is read, scaled, rounded and written in registers. Each format has a quick way for ordinary blocks and a
// plain one, which scales and clamps first, for all others: NaN and Inf, and what lies where the quick way's products
// would leave the normal numbers.
//
// Not to be compiled with -ffast-math or with contraction of a * b + c: both skip roundings on which the method rests.
#pragma once

#include "vectors.h"

namespace {

// The grid of a tiny float; `emax`: the exponent of its largest value.
struct E2M1 {
  static constexpr int mantissa = 1, emax = 2;
  static constexpr uint32_t smallest_normal = 0x3F800000, largest = 0x40C00000;
};
struct E4M3 {
  static constexpr int mantissa = 3, emax = 8;
  static constexpr uint32_t smallest_normal = 0x3C800000, largest = 0x43E00000;
};

// 16 elements of fp32, or of bf16, which is the upper half of one.
inline u32x16 read16(const float* x) { return load<u32x16>(x); }
inline u32x16 read16(const uint16_t* x) { return __builtin_convertvector(load<u16x16>(x), u32x16) << 16; }
inline void write16(float* out, u32x16 v) { store(out, v); }
// The upper half is all there is where the value is exact in bf16, as everything from MX is.
inline void write16(uint16_t* out, u32x16 v) { store(out, __builtin_convertvector(v >> 16, u16x16)); }

// 32 elements of bf16 in place: of each 32 bits the upper half is an fp32 number once the lower half is cleared, and
// so is the lower half once it is shifted up.
inline u32x16 uppers(u16x32 v) { return bits_as<u32x16>(v) & 0xFFFF0000; }
inline u32x16 lowers(u16x32 v) { return bits_as<u32x16>(v) << 16; }
inline u16x32 together(u32x16 upper, u32x16 lower) { return bits_as<u16x32>((upper & 0xFFFF0000) | (lower >> 16)); }

inline u32x16 larger_halves(u32x16 a, u32x16 b) {
  return bits_as<u32x16>(larger(bits_as<u16x32>(a), bits_as<u16x32>(b)));
}
// Each half of every 32 bits becomes the larger one.
inline u32x16 larger_half(u32x16 w) { return larger_halves(w, (w << 16) | (w >> 16)); }

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

// 16 elements on the grid in units of their scale: non-negative, or NaN, which stays.
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

}  // namespace

// MXFP4 and MXFP8: blocks of 32 under a scale that is a power of two.
//
//   scale X   OCP MX v1.0, 6.3: the exponent bits of amax + addend (the scale rule), less emax. No log2, no division
//   rounding  X shifts the grid's binades onto other binades, so elements are rounded where they lie, without scaling
//             them first
//
// bf16 elements, the case of training, are rounded in 16-bit integers, of which a register holds twice as many: where
// the grid has a fixed number of mantissa bits in every binade, rounding is an integer addition to an element's own
// bits.
#pragma once

#include "blocks.h"

namespace {

// Bits of 1.0f: the difference to it turns bits of X into bits of a multiple of X.
constexpr uint32_t kOne = 0x3F800000;

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
  // Between them all of the above are normal numbers.
  constexpr uint32_t least = 16u << kFractionBits, most = 228u << kFractionBits;
  if (amax[0] - least >= most - least) return mx_block_anywhere<Grid>(x, out, amax[0], addend);
  const u32x16 scale = ((amax + addend) & kExponent) - (uint32_t{Grid::emax} << kFractionBits);
  write16(out, mx_rounded<Grid>(low, scale));
  write16(out + 16, mx_rounded<Grid>(high, scale));
}

// --- bf16 -----------------------------------------------------------------------------------------------------------

// From kLeast to so far above it amax is finite, and all below in normal numbers.
constexpr uint16_t kLeast = 16 << 7, kAbove = (255 << 7) - kLeast;

// X 2^emax from amax in all lanes. The addend's lower half is all ones or nothing and meets zeros: it never carries.
inline u16x32 top_of(u32x16 amax, uint32_t addend) {
  return (bits_as<u16x32>(amax) + static_cast<uint16_t>(addend >> 16)) & 0x7F80;
}

// From X upwards E2M1 has one mantissa bit in every binade, and 6 X is the end; below X there are 0, X/2 and X, with
// ties at X/4 (to 0) and 3X/4 (to X).
inline u16x32 mx_rounded(E2M1, u16x32 v, u16x32 four) {
  const u16x32 a = v & 0x7FFF;
  const u16x32 one = four - 0x100, half = four - 0x180, quarter = four - 0x200;
  const u16x32 three_quarters = four - 0x140, six = four + 0x40;
  const u16x32 near = (a + 0x1F + ((a >> 6) & 1)) & 0xFFC0, nothing = {};
  const u16x32 rounded = a < three_quarters ? (a > quarter ? half : nothing) : larger(smaller(near, six), one);
  return rounded | (v & 0x8000);
}
inline u16x32 too_small(E2M1, u16x32, u16x32) { return u16x32{}; }

// From X/64 upwards E4M3 has three mantissa bits in every binade, and 448 X is the end. Zero stays; nothing else below
// X/64 may come here.
inline u16x32 mx_rounded(E4M3, u16x32 v, u16x32 top) {
  const u16x32 a = v & 0x7FFF;
  return smaller((a + 0x7 + ((a >> 4) & 1)) & 0xFFF0, top + 0x60) | (v & 0x8000);
}
inline u16x32 too_small(E4M3, u16x32 v, u16x32 top) { return bits_as<u16x32>((v & 0x7FFF) - 1 < top - (14 << 7) - 1); }

// One quarter of the lanes, four times.
template <int i>
inline u16x32 quarter(u32x16 v) {
  constexpr int n = 4 * i;
  return bits_as<u16x32>(
      __builtin_shufflevector(
          v, v, n, n + 1, n + 2, n + 3, n, n + 1, n + 2, n + 3, n, n + 1, n + 2, n + 3, n, n + 1, n + 2, n + 3));
}

// --- any number of neighbouring blocks ------------------------------------------------------------------------------

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
    w = larger_half(
        larger_halves(w, __builtin_shufflevector(w, w, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)));
    const u32x16 top = bits_as<u32x16>(top_of(w, addend));
    const u16x32 tops[] = {quarter<0>(top), quarter<1>(top), quarter<2>(top), quarter<3>(top)};
    u16x32 others = bits_as<u16x32>(bits_as<u16x32>(w) - kLeast >= kAbove);
    for (int i = 0; i < 4; ++i) others |= too_small(Grid{}, v[i], tops[i]);
    if (any(others)) {
      for (int i = 0; i < 4; ++i) mx_block<Grid>(x + (block + i) * 32, out + (block + i) * 32, addend);
    } else {
      for (int i = 0; i < 4; ++i) store(out + (block + i) * 32, mx_rounded(Grid{}, v[i], tops[i]));
    }
  }
  for (; block < blocks; ++block) mx_block<Grid>(x + block * 32, out + block * 32, addend);
}

}  // namespace

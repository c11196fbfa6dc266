// NVFP4: blocks of 16 under a scale in E4M3, under an outer scale in fp32 of the row, or of the tensor.
//
// Blocks are taken 16 at a time, whatever the rows, so that the arithmetic of the scales fills a vector. An ordinary
// block's elements need no clamp, because its scale, a normal number of E4M3, is at most a 17th too small, and 6.4
// rounds to 6; so they are scaled and rounded with their signs, by a magic number of 1.5 * 2^23 steps. In bf16 results
// are rounded once more: with one addition, where none lies halfway.
#pragma once

#include <vector>

#include "blocks.h"

namespace {

// Rows below it become zero: products of the two scales would no longer be normal.
constexpr float kFlushed = 0x1p-100f;

inline float outer_scale(uint32_t amax) {
  const float top = float_of(amax);
  return top < kFlushed ? 1.0f : top / (448.0f * 6.0f);
}

// --- largest magnitudes ---------------------------------------------------------------------------------------------

// Of n elements, n a multiple of 16: in four strands, so that none waits for another.
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

// Of 16 blocks side by side, in 16 lanes: a tree that halves the lanes of a block and doubles the blocks of a vector,
// from 8 vectors of 2 blocks on.
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
  for (int i = 0; i < 8; ++i) {
    two[i] = merged_halves<larger>(read16(x + 32 * i) & kMagnitude, read16(x + 32 * i + 16) & kMagnitude);
  }
  return largest_of_each<larger>(two);
}
inline u32x16 nv_largest(const uint16_t* x) {
  u32x16 two[8];
  for (int i = 0; i < 8; ++i) two[i] = bits_as<u32x16>(load<u16x32>(x + 32 * i) & 0x7FFF);
  return larger_half(largest_of_each<larger_halves>(two)) & 0xFFFF0000;
}

// Of each block, for any number of blocks; of missing ones, up to a multiple of 16, it is 0.
template <class T>
inline void nv_largest_of(const T* x, int64_t blocks, float* amax) {
  int64_t block = 0;
  for (; block + 16 <= blocks; block += 16) store(amax + block, nv_largest(x + 16 * block));
  if (block == blocks) return;
  T padded[256] = {};
  std::copy(x + 16 * block, x + 16 * blocks, padded);
  store(amax + block, nv_largest(padded));
}

// --- rounding -------------------------------------------------------------------------------------------------------

// So that the upper half is the nearest bf16 number, of two the even one, as torch rounds; not for NaN.
inline u32x16 near(u32x16 v) { return v + (0x7FFF + ((v >> 16) & 1)); }
inline u32x16 halfway(f32x16 v) { return bits_as<u32x16>((bits_as<u32x16>(v) & 0xFFFF) == 0x8000); }

// The scales of up to 16 blocks.
struct Scales {
  alignas(64) float scale[16], inverse[16];
  bool ordinary;  // all of them
};

template <class T>
inline Scales scales_of(const float* amax, const float* outers, int64_t blocks) {
  const u32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32x16 outer = load<f32x16>(outers), nothing = {};
  const f32x16 inner = rounded<E4M3>(load<f32x16>(amax) / 6.0f / outer), scale = inner * outer;
  u32x16 others = bits_as<u32x16>(!(inner >= float_of(E4M3::smallest_normal)));
  if constexpr (sizeof(T) == 2) others |= halfway(scale) | halfway(1.5f * scale);
  Scales by;
  store(by.scale, scale);
  store(by.inverse, scale == nothing ? nothing : 1.0f / scale);
  by.ordinary = !any(others & bits_as<u32x16>(lane < static_cast<uint32_t>(blocks)));
  return by;
}

// 16 elements of an ordinary block; a zero may lose its sign.
inline u32x16 quickly(u32x16 v, f32x16 scale, f32x16 inverse) {
  const f32x16 y = bits_as<f32x16>(v) * inverse;
  const u32x16 binade = larger(bits_as<u32x16>(y) & kExponent, u32x16{} + E2M1::smallest_normal);
  const f32x16 magic =
      bits_as<f32x16>(binade + (uint32_t{kFractionBits - E2M1::mantissa} << kFractionBits | 0x00400000));
  return bits_as<u32x16>(((y + magic) - magic) * scale);
}

// Two neighbouring blocks.
template <bool ordinary>
inline void nv_pair(const float* x, float* out, const float* scales, const float* inverses) {
  for (int i = 0; i < 2; ++i) {
    const u32x16 v = read16(x + 16 * i);
    const f32x16 scale = spread(scales[i]), inverse = spread(inverses[i]);
    write16(
        out + 16 * i,
        ordinary ? quickly(v, scale, inverse) | (v & kSign) : scaled_and_rounded<E2M1>(v, scale, inverse));
  }
}
template <bool ordinary>
inline void nv_pair(const uint16_t* x, uint16_t* out, const float* scales, const float* inverses) {
  const auto halves = [](const float* of) {
    return __builtin_shufflevector(
        spread(of[0]), spread(of[1]), 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const f32x16 scale = halves(scales), inverse = halves(inverses);
  const auto exact = [=](u32x16 v) {
    return ordinary ? quickly(v, scale, inverse) + 0x8000 : near(scaled_and_rounded<E2M1>(v, scale, inverse));
  };
  const u16x32 v = load<u16x32>(x);
  store(out, together(exact(uppers(v)), exact(lowers(v))) | (v & 0x8000));
}

template <bool ordinary, class T>
inline void nv_round(const T* x, T* out, int64_t blocks, const Scales& by) {
  int64_t block = 0;
  for (; block + 2 <= blocks; block += 2) {
    nv_pair<ordinary>(x + 16 * block, out + 16 * block, by.scale + block, by.inverse + block);
  }
  if (block == blocks) return;
  T padded[32] = {};
  std::copy_n(x + 16 * block, 16, padded);
  nv_pair<ordinary>(padded, padded, by.scale + block, by.inverse + block);
  std::copy_n(padded, 16, out + 16 * block);
}

// Rows side by side, each under the outer scale `common`, or where that is negative under one of its own. Where an
// outer scale is not finite, the scales are NaN, and so is all under them. `out` may be `x`. The memory behind x is
// fetched ahead: the next rows.
template <class T>
inline void nv_rows(const T* x, T* out, int64_t rows, int64_t columns, float common) {
  thread_local std::vector<float> scratch;
  thread_local std::vector<Scales> scales;
  const int64_t of_row = columns / 16, blocks = rows * of_row, room = (blocks + 15) / 16 * 16;
  scratch.assign(2 * room, 1.0f);
  float *largest = scratch.data(), *outers = largest + room;
  nv_largest_of(x, blocks, largest);
  for (int64_t block = 0; block < blocks; block += of_row) {
    uint32_t amax = 0;
    for (int64_t i = block; i < block + of_row; ++i) amax = std::max(amax, bits_of(largest[i]));
    std::fill_n(outers + block, of_row, common < 0 ? outer_scale(amax) : common);
  }
  scales.resize(room / 16);
  for (int64_t block = 0; block < blocks; block += 16) {
    scales[block / 16] = scales_of<T>(largest + block, outers + block, blocks - block);
  }
  for (int64_t block = 0; block < blocks; block += 16) {
    for (int64_t i = 0; i < 256; i += 64 / sizeof(T)) __builtin_prefetch(x + 16 * (blocks + block) + i);
    const int64_t some = std::min<int64_t>(16, blocks - block);
    const Scales& by = scales[block / 16];
    if (by.ordinary) nv_round<true>(x + 16 * block, out + 16 * block, some, by);
    else nv_round<false>(x + 16 * block, out + 16 * block, some, by);
  }
}

}  // namespace

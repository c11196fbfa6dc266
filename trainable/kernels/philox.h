// Philox 4x32-10 and normal numbers of it, 128 at a time. What is computed is said in trainable/philox.py, whose eager
// torch is the definition: every bit here is the same there.
//
// Both are long chains, of which each operation waits for the one before. So four vectors go through them in step, a
// `Four`, which is a sixth quicker than two. A product of 32 bits by 32 lies in a lane of 64, so the words of 8 counters
// do, in its lower half: what is left in the upper one is not looked at by the next product, and the upper half of a
// product needs one shift.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef uint64_t u64x8 __attribute__((vector_size(64)));

constexpr uint32_t kMultipliers[] = {0xD2511F53, 0xCD9E8D57}, kWeyl[] = {0x9E3779B9, 0xBB67AE85};
constexpr uint32_t kSqrtHalf = 0x3F3504F3;
constexpr float kLn2Twice = 1.3862943649291992f, kHalfTurn = 7.31459059988282e-10f;
constexpr float kLog[] = {
    -1.9999998807907104f, 1.000006914138794f,   -0.6667121648788452f, 0.49943119287490845f,
    -0.3976847231388092f, 0.34424853324890137f, -0.3267628848552704f, 0.207574263215065f};
constexpr float kSin[] = {-0.16666661202907562f, 0.008333087898790836f, -0.00019811112724710256f, 2.6089326183864614e-06f};
constexpr float kCos[] = {-0.4999993145465851f, 0.041663989424705505f, -0.001385592739097774f, 2.31943868129747e-05f};

// Of the lower halves of the lanes.
inline u64x8 product(u64x8 a, uint32_t b) {
#if defined(__AVX512F__)
  return bits_as<u64x8>(_mm512_mul_epu32(bits_as<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  struct Halves { __m256i one, two; } v = bits_as<Halves>(a);
  v.one = _mm256_mul_epu32(v.one, _mm256_set1_epi64x(b));
  v.two = _mm256_mul_epu32(v.two, _mm256_set1_epi64x(b));
  return bits_as<u64x8>(v);
#else
  return (a & 0xFFFFFFFF) * b;
#endif
}

// The key of each round, which whoever draws many numbers makes once.
struct Keys {
  uint64_t low[10], high[10];
  explicit Keys(uint64_t key) {
    for (uint32_t i = 0; i < 10; ++i) {
      low[i] = static_cast<uint32_t>(key) + i * kWeyl[0] & 0xFFFFFFFF;
      high[i] = static_cast<uint32_t>(key >> 32) + i * kWeyl[1] & 0xFFFFFFFF;
    }
  }
};

inline u32x16 lower_halves(u64x8 a, u64x8 b) {
  return __builtin_shufflevector(
      bits_as<u32x16>(a), bits_as<u32x16>(b), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

// --- four vectors in step ---------------------------------------------------------------------------------------------

template <class V>
struct Four { V of[4]; };
using Floats4 = Four<f32x16>;
using Bits4 = Four<u32x16>;

template <class To, class From, class Work>
inline Four<To> each(const Four<From>& x, const Work& work) {
  return {{work(x.of[0]), work(x.of[1]), work(x.of[2]), work(x.of[3])}};
}
inline Floats4 operator*(Floats4 a, const Floats4& b) {
  for (int i = 0; i < 4; ++i) a.of[i] *= b.of[i];
  return a;
}
inline Floats4 operator+(Floats4 a, const Floats4& b) {
  for (int i = 0; i < 4; ++i) a.of[i] += b.of[i];
  return a;
}
inline Floats4 operator*(Floats4 a, float b) {
  for (int i = 0; i < 4; ++i) a.of[i] *= b;
  return a;
}
inline Floats4 operator+(Floats4 a, float b) {
  for (int i = 0; i < 4; ++i) a.of[i] += b;
  return a;
}

inline Floats4 square_root(const Floats4& x) {
  using Floats = at::vec::Vectorized<float>;
  alignas(64) float of[64];
  std::memcpy(of, &x, sizeof(of));
  for (int i = 0; i < 64; i += Floats::size()) Floats::loadu(of + i).sqrt().store(of + i);
  return load<Floats4>(of);
}

inline Floats4 cubic(const float* of, const Floats4& x, const Floats4& square) {
  return (x * of[1] + of[0]) + square * (x * of[3] + of[2]);
}

inline Floats4 minus_twice_log(const Bits4& word) {
  const Bits4 bits = each<u32x16>(word, [](u32x16 w) {
    return bits_as<u32x16>(__builtin_convertvector(w, f32x16) + 0.5f) - (kSqrtHalf + (32u << 23));
  });
  const Floats4 f = each<f32x16>(bits, [](u32x16 b) { return bits_as<f32x16>((b & 0x7FFFFF) + kSqrtHalf) - 1.0f; });
  const Floats4 exponent =
      each<f32x16>(bits, [](u32x16 b) { return __builtin_convertvector(bits_as<i32x16>(b) >> 23, f32x16); });
  const Floats4 square = f * f;
  return exponent * -kLn2Twice + f * (cubic(kLog, f, square) + square * square * cubic(kLog + 4, f, square));
}

// Two normals of each pair of words.
struct Pairs { Floats4 first, second; };
inline Pairs normal(const Bits4& radius, const Bits4& angle) {
  Floats4 r = square_root(minus_twice_log(radius));
  for (int i = 0; i < 4; ++i) r.of[i] = bits_as<f32x16>(bits_as<u32x16>(r.of[i]) ^ (angle.of[i] & kSign));
  const Floats4 x =
      each<f32x16>(angle, [](u32x16 w) { return __builtin_convertvector(bits_as<i32x16>(w << 1), f32x16); }) *
      kHalfTurn;
  const Floats4 z = x * x, square = z * z;
  return {r * (z * cubic(kCos, z, square) + 1.0f), r * (z * x * cubic(kSin, z, square) + x)};
}

// The words of 32 counters: of each 8 in the lower halves of a vector's lanes.
struct Words { Four<u64x8> a, b, c, d; };
inline Words philox(const Keys& keys, uint64_t block) {
  const u64x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  Words w;
  for (int i = 0; i < 4; ++i) {
    w.a.of[i] = lane + (block + 8 * i), w.b.of[i] = w.a.of[i] >> 32, w.c.of[i] = w.d.of[i] = u64x8{};
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = keys.low[round], high = keys.high[round];
    Four<u64x8> one, two;
    for (int i = 0; i < 4; ++i) one.of[i] = product(w.a.of[i], kMultipliers[0]);
    for (int i = 0; i < 4; ++i) two.of[i] = product(w.c.of[i], kMultipliers[1]);
    for (int i = 0; i < 4; ++i) w.a.of[i] = (two.of[i] >> 32) ^ w.b.of[i] ^ low;
    for (int i = 0; i < 4; ++i) w.c.of[i] = (one.of[i] >> 32) ^ w.d.of[i] ^ high;
    w.b = two, w.d = one;
  }
  return w;
}

// Normals 4 block to 4 block + 128 of a stream.
constexpr int64_t kDrawn = 128;
struct Normals { f32x16 of[8]; };
inline Normals normals(const Keys& keys, uint64_t block) {
  const auto [a, b, c, d] = philox(keys, block);
  const auto both = [](const Four<u64x8>& x, const Four<u64x8>& y) -> Bits4 {
    return {{
        lower_halves(x.of[0], x.of[1]), lower_halves(y.of[0], y.of[1]), lower_halves(x.of[2], x.of[3]),
        lower_halves(y.of[2], y.of[3])}};
  };
  const auto [first, second] = normal(both(a, c), both(b, d));  // of 16 blocks elements 0 and 1, then 2 and 3; twice
  const auto lower = [](f32x16 a, f32x16 b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  };
  const auto upper = [](f32x16 a, f32x16 b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  };
  const auto left = [](f32x16 a, f32x16 b) {
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
  };
  const auto right = [](f32x16 a, f32x16 b) {
    return __builtin_shufflevector(a, b, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
  };
  Normals drawn;
  for (int i = 0; i < 4; i += 2) {
    const f32x16 p = lower(first.of[i], second.of[i]), q = lower(first.of[i + 1], second.of[i + 1]);
    const f32x16 r = upper(first.of[i], second.of[i]), s = upper(first.of[i + 1], second.of[i + 1]);
    drawn.of[2 * i] = left(p, q), drawn.of[2 * i + 1] = right(p, q);
    drawn.of[2 * i + 2] = left(r, s), drawn.of[2 * i + 3] = right(r, s);
  }
  return drawn;
}

}  // namespace

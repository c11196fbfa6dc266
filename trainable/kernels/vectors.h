// Vectors of the compiler (GCC's and Clang's `vector_size`), 64 bytes long, which it lowers to whatever the flags
// allow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef float f32x16 __attribute__((vector_size(64)));

constexpr uint32_t kMagnitude = 0x7FFFFFFF, kSign = 0x80000000, kExponent = 0x7F800000;
constexpr int kFractionBits = 23;
constexpr int64_t kGrain = 1 << 15;  // elements for which another thread is worth its start
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline uint32_t bits_of(float x) { return bits_as<uint32_t>(x); }
inline float float_of(uint32_t b) { return bits_as<float>(b); }

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
template <class V>
inline void store(void* to, V v) { std::memcpy(to, &v, sizeof(v)); }

// x in every lane. A sum with zeros would be one: it turns -0 into 0.
inline f32x16 spread(float x) { return bits_as<f32x16>(u32x16{} + bits_of(x)); }

template <class V>
inline V larger(V a, V b) { return a < b ? b : a; }
template <class V>
inline V smaller(V a, V b) { return a < b ? a : b; }

// Whether any bit is set.
template <class V>
inline bool any(V of) {
  u32x16 v = bits_as<u32x16>(of);
  v |= __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v |= __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v |= __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return v[0] | v[1];
}

inline float largest(f32x16 v) {
  v = larger(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return std::max(v[0], v[1]);
}

inline float sum(f32x16 v) {
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return v[0] + v[1];
}

}  // namespace

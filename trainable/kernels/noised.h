// A weight with noise: drawn, added in fp32, cast and quantised, in one pass over memory; and how far that takes it
// from the clean one. The definition is trainable/noised.py.
//
// A tile is what stays in the first cache. Its sum of squares is taken in 16 lanes of fp32 and then in fp64, tile after
// tile, so that it does not depend on threads. NVFP4 under one outer scale is the exception to one pass: its scale is
// known when all noise has been added. Without a clean weight nothing is measured.
#pragma once

#include <tuple>

#include "fake_quantize.h"
#include "philox.h"

namespace {

constexpr int64_t kTile = 1 << 11;

// The nearest number of the dtype; of bf16 in the upper half, NaN set apart.
inline u32x16 cast(f32x16 y, const float*) { return bits_as<u32x16>(y); }
inline u32x16 cast(f32x16 y, const uint16_t*) {
  return y == y ? near(bits_as<u32x16>(y)) : u32x16{} + 0x7FC00000;
}

// How the noise of a weight is drawn: element e of the stream of `key` is that of element e - start, times sigma, times
// the unit of its stretch of `per` elements.
struct Noise {
  Keys keys;
  int64_t start;
  float sigma;
  const float* units;  // nullptr: all are 1
  int64_t stretches, per;
};

struct Change { double squares = 0, changed = 0; };

// n elements from element i on, n at most a tile; the noisy ones, of the dtype, in `noisy`.
template <class T>
inline void add_noise(const T* base, T* noisy, int64_t i, int64_t n, const Noise& noise) {
  const auto add = [&](const T* from, T* to, int64_t first) {
    const Normals drawn = normals(noise.keys, (noise.start + first) / 4);
    for (int j = 0; j < kDrawn / 16; ++j) {
      f32x16 shift = drawn.of[j] * noise.sigma;
      if (noise.units != nullptr) shift *= noise.units[std::min((first + 16 * j) / noise.per, noise.stretches - 1)];
      write16(to + 16 * j, cast(bits_as<f32x16>(read16(from + 16 * j)) + shift, base));
    }
  };
  int64_t k = 0;
  for (; k + kDrawn <= n; k += kDrawn) add(base + i + k, noisy + k, i + k);
  if (k == n) return;
  T padded[kDrawn] = {};
  std::copy_n(base + i + k, n - k, padded);
  add(padded, padded, i + k);
  std::copy_n(padded, n - k, noisy + k);
}

template <class T>
inline Change change_of(const T* out, const T* clean, int64_t n) {
  f32x16 squares = {};
  i32x16 changed = {};
  const auto count = [&](const T* a, const T* b) {
    const f32x16 change = bits_as<f32x16>(read16(a)) - bits_as<f32x16>(read16(b));
    squares += change * change;
    changed -= change != 0.0f;
  };
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) count(out + k, clean + k);
  if (k < n) {
    T a[16] = {}, b[16] = {};
    std::copy_n(out + k, n - k, a), std::copy_n(clean + k, n - k, b);
    count(a, b);
  }
  Change sums;
  for (int lane = 0; lane < 16; ++lane) sums.squares += squares[lane], sums.changed += changed[lane];
  return sums;
}

template <class T>
Change noised(
    const T* base, const T* clean, T* out, int64_t rows, int64_t columns, const Noise& noise, int64_t format,
    uint32_t addend, bool per_tensor) {
  const int64_t count = rows * columns, tiles = (count + kTile - 1) / kTile;
  std::vector<Change> changes(tiles);
  const auto over_tiles = [=](const auto& work) {
    at::parallel_for(0, tiles, kGrain / kTile, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        work(tile, tile * kTile, std::min(kTile, count - tile * kTile));
      }
    });
  };
  Change* sums = changes.data();
  if (format == kNvfp4) {
    over_tiles([=](int64_t, int64_t i, int64_t n) { add_noise(base, out + i, i, n, noise); });
    nv(out, out, rows, columns, per_tensor ? common_scale(out, count) : -1.0f);
    over_tiles([=](int64_t tile, int64_t i, int64_t n) { if (clean != nullptr) sums[tile] = change_of(out + i, clean + i, n); });
  } else {
    over_tiles([=](int64_t tile, int64_t i, int64_t n) {
      alignas(64) T noisy[kTile];
      add_noise(base, format == kNone ? out + i : noisy, i, n, noise);
      if (format != kNone) quantize_row(noisy, out + i, n, format, addend);
      if (clean != nullptr) sums[tile] = change_of(out + i, clean + i, n);
    });
  }
  Change all;
  for (const Change& of : changes) all.squares += of.squares, all.changed += of.changed;
  return all;
}

// `base` and `clean` alike, fp32 or bf16, the latter perhaps undefined; `units` fp32, as many as divide them, or
// undefined. -> (like them, [2] fp64: the sum of squared changes and the number of elements that changed)
std::tuple<at::Tensor, at::Tensor> noised(
    const at::Tensor& any, const at::Tensor& any_clean, const at::Tensor& units, uint64_t key, int64_t start,
    double sigma, int64_t format, int64_t addend, bool per_tensor) {
  RECORD_FUNCTION("rin::noised", {});
  const at::Tensor base = any.contiguous(), clean = any_clean.defined() ? any_clean.contiguous() : any_clean;
  const at::Tensor out = made_like(base);
  const at::ScalarType type = base.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16, "noise on ", type);
  const bool measured = clean.defined();
  TORCH_CHECK_VALUE(
      !measured || (clean.sizes() == base.sizes() && clean.scalar_type() == type), "a clean weight unlike the noisy one");
  TORCH_CHECK_VALUE(start >= 0 && start % 4 == 0, "a stream from ", start, ", within a block");
  const int64_t count = base.numel(), columns = base.size(-1);
  if (format != kNone) check_blocks(columns, format);
  Noise noise = {Keys(key), start, static_cast<float>(sigma), nullptr, 1, count};
  if (units.defined()) {
    const int64_t stretches = units.numel();
    TORCH_CHECK_VALUE(units.is_contiguous() && units.scalar_type() == at::kFloat, "units that are not fp32 in a row");
    TORCH_CHECK_VALUE(
        stretches == 1 || (stretches > 0 && count % stretches == 0 && count / stretches % 16 == 0),
        stretches, " units for ", count, " elements");
    noise.units = units.const_data_ptr<float>(), noise.stretches = stretches;
    noise.per = std::max<int64_t>(1, count / stretches);
  }
  Change change;
  if (count > 0) {
    const int64_t rows = count / columns;
    if (type == at::kFloat) {
      change = noised(
          base.const_data_ptr<float>(), measured ? clean.const_data_ptr<float>() : nullptr,
          out.mutable_data_ptr<float>(), rows, columns, noise, format, addend, per_tensor);
    } else {
      change = noised(
          static_cast<const uint16_t*>(base.const_data_ptr()),
          measured ? static_cast<const uint16_t*>(clean.const_data_ptr()) : nullptr,
          static_cast<uint16_t*>(out.mutable_data_ptr()), rows, columns, noise, format, addend, per_tensor);
    }
  }
  const at::Tensor sums = made({2}, at::kDouble);
  sums.mutable_data_ptr<double>()[0] = change.squares, sums.mutable_data_ptr<double>()[1] = change.changed;
  return {out, sums};
}

}  // namespace

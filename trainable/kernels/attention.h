// One new token of every row attends to all before it, fp32: rotate its query and key, append key and value to the
// cache, mix the values.
//
// Keys lie transposed, [B, N, D, S] with S a multiple of 16: the scores of 16 tokens are one vector, whatever D is. A
// row is small, so one thread computes it from end to end. Grouped-query attention: H / N query heads side by side
// read one key/value head.
#pragma once

#include <vector>

#include "rotary.h"

namespace {

typedef float f32x8 __attribute__((vector_size(32)));

// e^x for x <= 0, within 2 ulp: 2^n e^r with r = x - n ln 2 in two parts (Cody and Waite), e^r by its series; below
// -87: 0. NaN stays.
inline f32x16 exp_negative(f32x16 x) {
  const f32x16 shift = f32x16{} + 0x1.8p23f, floor = f32x16{} - 87.0f;
  const f32x16 within = x < floor ? floor : x;
  const f32x16 n = (within * 1.44269504f + shift) - shift;
  const f32x16 r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
  f32x16 series = f32x16{} + 1.0f / 5040;
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + term;
  const u32x16 power = __builtin_convertvector(__builtin_convertvector(n, i32x16) + 127, u32x16) << kFractionBits;
  const f32x16 nothing = {};
  return x < floor ? nothing : series * bits_as<f32x16>(power);
}

// q [B, H * D]; k, v [B, N * D]; cos, sin [B, D]; keys [B, N, D, S]; values [B, N, S, D]; starts [B]: the first token
// that counts, behind the padding; `filled`: tokens in the cache before this one. D is a multiple of 8, S of 16.
// -> [B, H * D]
at::Tensor attend(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cos, const at::Tensor& sin,
    const at::Tensor& keys, const at::Tensor& values, const at::Tensor& starts, int64_t filled, double scale) {
  RECORD_FUNCTION("rin::attend", {});
  const int64_t rows = keys.size(0), kv_heads = keys.size(1), size = keys.size(2), room = keys.size(3);
  const int64_t heads = q.size(1) / size, shared = heads / kv_heads;
  TORCH_CHECK(
      filled < room && room % 16 == 0 && size % 8 == 0,
      "a cache for ", room, " tokens of size ", size, " that holds ", filled);
  for (const at::Tensor& x : {q, k, v, cos, sin, keys, values, starts}) {
    TORCH_CHECK(x.is_contiguous(), "a tensor is not contiguous");
  }
  at::Tensor mixed = made_like(q);
  const float *qs = q.const_data_ptr<float>(), *ks = k.const_data_ptr<float>(), *vs = v.const_data_ptr<float>();
  const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  float *all_keys = keys.mutable_data_ptr<float>(), *all_values = values.mutable_data_ptr<float>();
  float* out = mixed.mutable_data_ptr<float>();
  const int64_t* first = starts.const_data_ptr<int64_t>();
  at::parallel_for(0, rows, 1 + kGrain / 4 / (heads * size * (filled + 1)), [=](int64_t begin, int64_t end) {
    std::vector<float> turned(size), newest(size), scores(room);
    i32x16 lane;
    for (int i = 0; i < 16; ++i) lane[i] = i;
    const f32x16 unseen = f32x16{} - std::numeric_limits<float>::infinity();
    for (int64_t row = begin; row < end; ++row) {
      const float *cosine = c + row * size, *sine = s + row * size;
      const int from = static_cast<int>(first[row]), to = static_cast<int>(filled);
      for (int64_t n = 0; n < kv_heads; ++n) {
        float* key = all_keys + (row * kv_heads + n) * size * room;
        float* value = all_values + (row * kv_heads + n) * room * size;
        rotate(ks + (row * kv_heads + n) * size, newest.data(), cosine, sine, size / 2);
        std::copy_n(vs + (row * kv_heads + n) * size, size, value + filled * size);
        for (int64_t head = n * shared; head < (n + 1) * shared; ++head) {
          rotate(qs + (row * heads + head) * size, turned.data(), cosine, sine, size / 2);
          // The new token's score apart: a vector that is read before the float stored into it has left the store
          // buffer waits for it.
          float own = 0;
          for (int64_t d = 0; d < size; ++d) own += turned[d] * newest[d];
          f32x16 tops = unseen;
          for (int64_t t = 0; t <= filled; t += 16) {
            f32x16 score = {};
            for (int64_t d = 0; d < size; ++d) score += turned[d] * load<f32x16>(key + d * room + t);
            const i32x16 token = lane + static_cast<int>(t);
            score = (token == to ? f32x16{} + own : score) * static_cast<float>(scale);
            score = ((token >= from) & (token <= to)) != 0 ? score : unseen;
            store(scores.data() + t, score);
            tops = larger(tops, score);
          }
          // That of a NaN is not found here; its weight, and so the sum of weights, is NaN.
          const float top = largest(tops);
          f32x16 totals = {};
          for (int64_t t = 0; t <= filled; t += 16) {
            const f32x16 weight = exp_negative(load<f32x16>(scores.data() + t) - top);
            totals += weight;
            store(scores.data() + t, weight);
          }
          const float total = sum(totals);
          for (int64_t d = 0; d < size; d += 8) {
            f32x8 mean = {};
            for (int64_t t = from; t <= filled; ++t) mean += scores[t] * load<f32x8>(value + t * size + d);
            store(out + (row * heads + head) * size + d, mean / total);
          }
        }
        for (int64_t d = 0; d < size; ++d) key[d * room + filled] = newest[d];
      }
    }
  });
  return mixed;
}

}  // namespace

// Rotary position embedding (arXiv 2104.09864) of fp32 heads, the two halves of a head being a pair:
// y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2.
#pragma once

#include "tensors.h"
#include "vectors.h"

namespace {

// One head of `half` pairs; `out` may be `x`.
inline void rotate(const float* x, float* out, const float* cos, const float* sin, int64_t half) {
  for (int64_t d = 0; d < half; ++d) {
    const float one = x[d], two = x[half + d];
    out[d] = one * cos[d] - two * sin[d];
    out[half + d] = two * cos[half + d] + one * sin[half + d];
  }
}

inline void rotate_back(const float* dy, float* out, const float* cos, const float* sin, int64_t half) {
  for (int64_t d = 0; d < half; ++d) {
    const float one = dy[d], two = dy[half + d];
    out[d] = one * cos[d] + two * sin[half + d];
    out[half + d] = two * cos[half + d] - one * sin[d];
  }
}

// x [tokens, heads, D] by the angles of its tokens, cos and sin [tokens, D].
template <void turn(const float*, float*, const float*, const float*, int64_t)>
at::Tensor turned(const at::Tensor& any, const at::Tensor& cos, const at::Tensor& sin) {
  const at::Tensor x = any.contiguous();
  TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous(), "angles are not contiguous");
  at::Tensor y = made_like(x);
  const int64_t tokens = x.size(0), heads = x.size(1), size = x.size(2);
  const float *in = x.const_data_ptr<float>(), *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, tokens, 1 + kGrain / (heads * size), [=](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t at = (token * heads + head) * size;
        turn(in + at, out + at, c + token * size, s + token * size, size / 2);
      }
    }
  });
  return y;
}

struct Rotary : torch::autograd::Function<Rotary> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* saved, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    RECORD_FUNCTION("rin::rotary", {});
    saved->save_for_backward({cos, sin});
    return turned<rotate>(x, cos, sin);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* saved, torch::autograd::variable_list grads) {
    RECORD_FUNCTION("rin::rotary_backward", {});
    only_once();
    const auto kept = saved->get_saved_variables();
    return {turned<rotate_back>(grads[0], kept[0], kept[1]), {}, {}};
  }
};

}  // namespace

// RMSNorm (arXiv 1910.07467) of fp32 rows, y = w * x / sqrt(mean(x^2) + epsilon), rotated if so wished and quantised
// while the row is in the cache; and before it, where x is the latest term of a residual stream, the sum with the
// stream so far.
//
// Backward, with h = x / sqrt(..) and g = dy * w: dx = (g - h * mean(g * h)) / sqrt(..), dw = sum over rows of dy * h.
// Quantisation counts as the identity (straight-through estimator). Sums are taken in 16 lanes, and over rows in one
// order for a given number of threads.
#pragma once

#include <cmath>
#include <vector>

#include "fake_quantize.h"
#include "hadamard.h"

namespace {

inline f32x16 lanes(const float* x) { return load<f32x16>(x); }

// x, and residual where it is defined, [.., n], n a multiple of 16. -> (y like x, the stream x + residual,
// 1 / sqrt(..) of each row for the backward pass).
std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm(
    const at::Tensor& any, const at::Tensor& residual, const at::Tensor& weight, double epsilon, int64_t format,
    int64_t addend, bool rotated) {
  RECORD_FUNCTION("rin::rms_norm", {});
  const at::Tensor x = any.contiguous(), before = residual.defined() ? residual.contiguous() : residual;
  check_row(x.size(-1), format);
  if (rotated) check_rotated(x.size(-1));
  const int64_t n = x.size(-1), rows = x.numel() / n;
  TORCH_CHECK_VALUE(
      !before.defined() || before.sizes() == x.sizes(), "x ", x.sizes(), " and residual ", before.sizes());
  TORCH_CHECK_VALUE(weight.is_contiguous() && weight.numel() == n, "a weight ", weight.sizes(), " for rows of ", n);
  const at::Tensor stream = before.defined() ? made_like(x) : x;
  const at::Tensor y = made_like(x), inverse = made({rows});
  const float *term = x.const_data_ptr<float>(), *so_far = before.defined() ? before.const_data_ptr<float>() : nullptr;
  const float* w = weight.const_data_ptr<float>();
  float *sums = so_far ? stream.mutable_data_ptr<float>() : nullptr, *out = y.mutable_data_ptr<float>();
  float* inverses = inverse.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1 + kGrain / n, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = term + row * n;
      float* to = out + row * n;
      if (so_far) {
        for (int64_t k = 0; k < n; k += 16) store(sums + row * n + k, lanes(so_far + row * n + k) + lanes(from + k));
        from = sums + row * n;
      }
      f32x16 squares = {};
      for (int64_t k = 0; k < n; k += 16) squares += lanes(from + k) * lanes(from + k);
      const float r = inverses[row] = 1.0f / std::sqrt(sum(squares) / n + static_cast<float>(epsilon));
      for (int64_t k = 0; k < n; k += 16) store(to + k, lanes(w + k) * (lanes(from + k) * r));
      if (rotated) rotate_blocks(to, to, n / kRotated);
      if (format != kNone) quantize_row(to, to, n, format, addend);
    }
  });
  return {y, stream, inverse};
}

// `straight`, where it is defined, is the gradient that reaches x past the norm. -> (dx, dw)
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& any, const at::Tensor& straight, const at::Tensor& x, const at::Tensor& weight,
    const at::Tensor& inverse) {
  RECORD_FUNCTION("rin::rms_norm_backward", {});
  const at::Tensor grad = any.contiguous(), past = straight.defined() ? straight.contiguous() : straight;
  const int64_t n = x.size(-1), rows = x.numel() / n;
  at::Tensor dx = made_like(x), dw = made_like(weight);
  const float *in = x.const_data_ptr<float>(), *dy = grad.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  const float* inverses = inverse.const_data_ptr<float>();
  const float* more = past.defined() ? past.const_data_ptr<float>() : nullptr;
  float *out = dx.mutable_data_ptr<float>(), *total = dw.mutable_data_ptr<float>();
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), 1 + rows * n / kGrain);
  const int64_t size = (rows + parts - 1) / parts;
  std::vector<float> partial(parts * n, 0.0f);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      float* own = partial.data() + part * n;
      for (int64_t row = part * size; row < std::min(rows, (part + 1) * size); ++row) {
        const float *from = in + row * n, *back = dy + row * n;
        const float r = inverses[row];
        f32x16 products = {};
        for (int64_t k = 0; k < n; k += 16) {
          const f32x16 h = lanes(from + k) * r;
          products += lanes(back + k) * lanes(w + k) * h;
          store(own + k, lanes(own + k) + lanes(back + k) * h);
        }
        const float mean = sum(products) / n;
        for (int64_t k = 0; k < n; k += 16) {
          const f32x16 through = (lanes(back + k) * lanes(w + k) - lanes(from + k) * r * mean) * r;
          store(out + row * n + k, more ? through + lanes(more + row * n + k) : through);
        }
      }
    }
  });
  std::fill(total, total + n, 0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t k = 0; k < n; ++k) total[k] += partial[part * n + k];
  }
  return {dx, dw};
}

// {y}, or {y, x + residual}.
struct RMSNorm : torch::autograd::Function<RMSNorm> {
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* saved, const at::Tensor& x, const std::optional<at::Tensor>& residual,
      const at::Tensor& weight, double epsilon, int64_t format, int64_t addend, bool rotated) {
    const auto [y, stream, inverse] =
        rms_norm(x, residual.value_or(at::Tensor()), weight, epsilon, format, addend, rotated);
    if (rotated) saved->saved_data["rotated"] = true;
    saved->save_for_backward({stream, weight, inverse});
    if (residual) return {y, stream};
    return {y};
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* saved, torch::autograd::variable_list grads) {
    only_once();
    const auto kept = saved->get_saved_variables();
    const bool streams = grads.size() == 2;
    const at::Tensor dy = saved->saved_data.empty() ? grads[0] : rotate(grads[0]);
    const auto [dx, dw] = rms_norm_backward(dy, streams ? grads[1] : at::Tensor(), kept[0], kept[1], kept[2]);
    return {dx, streams ? dx : at::Tensor(), dw, {}, {}, {}, {}};
  }
};

}  // namespace

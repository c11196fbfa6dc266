// SwiGLU (arXiv 2002.05202) of fp32 rows, y = silu(gate) * up with silu(x) = x / (1 + e^-x), rotated if so wished and
// quantised while the row is in the cache.
//
// e^x is torch's own in vectors, and the order of the operations too, so that every bit is that of torch's silu and
// product (which take the last few elements of an odd piece one by one, with another exponential). Backward, with
// s = 1 / (1 + e^-gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * silu(gate). Quantisation counts as the
// identity.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "fake_quantize.h"
#include "hadamard.h"

namespace {

using Floats = at::vec::Vectorized<float>;

// gate and up [.., n], n a multiple of 16. -> like them
at::Tensor swiglu(const at::Tensor& any_gate, const at::Tensor& any_up, int64_t format, int64_t addend, bool rotated) {
  RECORD_FUNCTION("rin::swiglu", {});
  const at::Tensor gate = any_gate.contiguous(), up = any_up.contiguous(), y = made_like(gate);
  TORCH_CHECK_VALUE(gate.sizes() == up.sizes(), "gate ", gate.sizes(), " and up ", up.sizes());
  check_row(gate.size(-1), format);
  if (rotated) check_rotated(gate.size(-1));
  const int64_t n = gate.size(-1), rows = gate.numel() / n;
  const float *g = gate.const_data_ptr<float>(), *u = up.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1 + kGrain / 8 / n, [=](int64_t begin, int64_t end) {
    const Floats one(1.0f);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t k = row * n; k < (row + 1) * n; k += Floats::size()) {
        const Floats x = Floats::loadu(g + k);
        ((x / (one + x.neg().exp())) * Floats::loadu(u + k)).store(out + k);
      }
      if (rotated) rotate_blocks(out + row * n, out + row * n, n / kRotated);
      if (format != kNone) quantize_row(out + row * n, out + row * n, n, format, addend);
    }
  });
  return y;
}

// -> (dgate, dup)
std::tuple<at::Tensor, at::Tensor> swiglu_backward(
    const at::Tensor& any, const at::Tensor& gate, const at::Tensor& up) {
  RECORD_FUNCTION("rin::swiglu_backward", {});
  const at::Tensor grad = any.contiguous(), dgate = made_like(gate), dup = made_like(gate);
  const float *dy = grad.const_data_ptr<float>(), *g = gate.const_data_ptr<float>(), *u = up.const_data_ptr<float>();
  float *to_gate = dgate.mutable_data_ptr<float>(), *to_up = dup.mutable_data_ptr<float>();
  at::parallel_for(0, gate.numel() / Floats::size(), 1 + kGrain / 8 / Floats::size(), [=](int64_t begin, int64_t end) {
    const Floats one(1.0f);
    for (int64_t k = begin * Floats::size(); k < end * Floats::size(); k += Floats::size()) {
      const Floats x = Floats::loadu(g + k), back = Floats::loadu(dy + k);
      const Floats divisor = one + x.neg().exp(), sigmoid = one / divisor;
      (back * (x / divisor)).store(to_up + k);
      (back * Floats::loadu(u + k) * sigmoid * at::vec::fmadd(x, one - sigmoid, one)).store(to_gate + k);
    }
  });
  return {dgate, dup};
}

struct SwiGLU : torch::autograd::Function<SwiGLU> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* saved, const at::Tensor& gate, const at::Tensor& up, int64_t format,
      int64_t addend, bool rotated) {
    saved->save_for_backward({gate, up});
    if (rotated) saved->saved_data["rotated"] = true;
    return swiglu(gate, up, format, addend, rotated);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* saved, torch::autograd::variable_list grads) {
    only_once();
    const auto kept = saved->get_saved_variables();
    const at::Tensor dy = saved->saved_data.empty() ? grads[0] : rotate(grads[0]);
    const auto [dgate, dup] = swiglu_backward(dy, kept[0].contiguous(), kept[1].contiguous());
    return {dgate, dup, {}, {}, {}};
  }
};

}  // namespace

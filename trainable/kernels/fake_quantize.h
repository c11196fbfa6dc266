// Fake quantisation of a tensor, rows side by side, on all threads; and the straight-through estimator around it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include "blocks.h"

namespace {

constexpr const char* kNames[] = {"mxfp4", "mxfp8", "nvfp4"};
constexpr int64_t kBlocks[] = {32, 32, 16};

template <class Grid, class T>
void mx(const T* x, T* out, int64_t blocks, uint32_t addend) {
  at::parallel_for(0, blocks, kGrain / 32, [=](int64_t begin, int64_t end) {
    mx_blocks<Grid>(x + begin * 32, out + begin * 32, end - begin, addend);
  });
}

// `common` < 0: each row has an outer scale of its own.
template <class T>
void nv(const T* x, T* out, int64_t rows, int64_t columns, float common) {
  at::parallel_for(0, rows, 1 + kGrain / 4 / columns, [=](int64_t begin, int64_t end) {
    const int64_t some = 1 + (1 << 13) / columns;  // rows that stay in the cache from one pass over them to the next
    for (int64_t row = begin; row < end; row += some) {
      nv_rows(x + row * columns, out + row * columns, std::min(some, end - row), columns, common);
    }
  });
}

template <class T>
float common_scale(const T* x, int64_t n) {
  const auto largest = [x](int64_t begin, int64_t end, uint32_t so_far) {
    return std::max(so_far, largest_of(x + 16 * begin, 16 * (end - begin)));
  };
  return outer_scale(at::parallel_reduce(0, n / 16, kGrain / 16, 0u, largest, [](uint32_t a, uint32_t b) { return std::max(a, b); }));
}

template <class T>
void run(const T* x, T* out, int64_t rows, int64_t columns, int64_t format, uint32_t addend, bool per_tensor) {
  if (format == kMxfp4) mx<E2M1>(x, out, rows * columns / 32, addend);
  else if (format == kMxfp8) mx<E4M3>(x, out, rows * columns / 32, addend);
  else nv(x, out, rows, columns, per_tensor ? common_scale(x, rows * columns) : -1.0f);
}

// Any layout and floating dtype; other than fp32 and bf16 it is computed in fp32 and rounded at the end.
at::Tensor fake_quantize(const at::Tensor& any, int64_t format, int64_t addend, bool per_tensor) {
  RECORD_FUNCTION("rin::fake_quantize", {});
  const at::Tensor x = any.contiguous();
  const int64_t columns = x.size(-1), block = kBlocks[format];
  TORCH_CHECK_VALUE(columns % block == 0, kNames[format], " needs a last dim that is a multiple of ", block, ", but got ", columns, "; exclude it");
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16) {
    return fake_quantize(x.to(at::kFloat), format, addend, per_tensor).to(x.scalar_type());
  }
  at::Tensor out = at::empty_like(x);
  if (x.numel() == 0) return out;
  const int64_t rows = x.numel() / columns;
  if (x.scalar_type() == at::kFloat) {
    run(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), rows, columns, format, addend, per_tensor);
  } else {
    run(static_cast<const uint16_t*>(x.const_data_ptr()), static_cast<uint16_t*>(out.mutable_data_ptr()), rows, columns, format, addend,
        per_tensor);
  }
  return out;
}

// Backward: the identity (arXiv 1308.3432). Nothing is kept for it.
struct StraightThrough : torch::autograd::Function<StraightThrough> {
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x, int64_t format, int64_t addend, bool per_tensor) {
    return fake_quantize(x, format, addend, per_tensor);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list grads) {
    return {grads[0], {}, {}, {}};
  }
};

}  // namespace

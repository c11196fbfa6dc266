// Fake quantisation of a row, of a tensor on all threads, and with the straight-through estimator around it.
#pragma once

#include "mx.h"
#include "nvfp4.h"
#include "tensors.h"

namespace {

enum Format : int64_t { kNone = -1, kMxfp4, kMxfp8, kNvfp4 };  // the codes of FORMATS in spaces/formats.py
constexpr const char* kNames[] = {"mxfp4", "mxfp8", "nvfp4"};
constexpr int64_t kBlocks[] = {32, 32, 16};

inline void check_blocks(int64_t columns, int64_t format) {
  const int64_t block = kBlocks[format];
  TORCH_CHECK_VALUE(
      columns % block == 0,
      kNames[format], " needs a last dim that is a multiple of ", block, ", but got ", columns, "; exclude it");
}

// What kernels that quantise their output take: whole vectors, and blocks.
inline void check_row(int64_t columns, int64_t format) {
  TORCH_CHECK_VALUE(columns > 0 && columns % 16 == 0, "rows of ", columns, " are not whole vectors of 16");
  if (format != kNone) check_blocks(columns, format);
}

// One row in its own right; `out` may be `x`.
template <class T>
inline void quantize_row(const T* x, T* out, int64_t columns, int64_t format, uint32_t addend) {
  if (format == kNvfp4) return nv_rows(x, out, 1, columns, -1.0f);
  if (format == kMxfp4) mx_blocks<E2M1>(x, out, columns / 32, addend);
  else mx_blocks<E4M3>(x, out, columns / 32, addend);
}

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
    const int64_t some = 1 + (1 << 11) / columns;  // rows that stay in the cache from one pass over them to the next
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
  return outer_scale(at::parallel_reduce(
      0, n / 16, kGrain / 16, 0u, largest, [](uint32_t a, uint32_t b) { return std::max(a, b); }));
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
  const int64_t columns = x.size(-1);
  check_blocks(columns, format);
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16) {
    return fake_quantize(x.to(at::kFloat), format, addend, per_tensor).to(x.scalar_type());
  }
  at::Tensor out = made_like(x);
  if (x.numel() == 0) return out;
  const int64_t rows = x.numel() / columns;
  if (x.scalar_type() == at::kFloat) {
    run(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), rows, columns, format, addend, per_tensor);
  } else {
    run(static_cast<const uint16_t*>(x.const_data_ptr()), static_cast<uint16_t*>(out.mutable_data_ptr()), rows, columns,
        format, addend, per_tensor);
  }
  return out;
}

// Backward: the identity (arXiv 1308.3432). Nothing is kept for it.
struct StraightThrough : torch::autograd::Function<StraightThrough> {
  static at::Tensor forward(
      torch::autograd::AutogradContext*, const at::Tensor& x, int64_t format, int64_t addend, bool per_tensor) {
    return fake_quantize(x, format, addend, per_tensor);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext*, torch::autograd::variable_list grads) {
    return {grads[0], {}, {}, {}};
  }
};

}  // namespace

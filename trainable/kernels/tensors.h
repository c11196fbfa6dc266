// What the kernels need of tensors besides their numbers.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {

// A new tensor; at::empty takes longer, because it could be one of any device.
inline at::Tensor made(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  return at::detail::empty_cpu(sizes, dtype);
}
inline at::Tensor made_like(const at::Tensor& x) { return made(x.sizes(), x.scalar_type()); }

// For backward passes, which are not differentiable: gradients of gradients would lack a part without a word.
inline void only_once() {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "a gradient of a fused kernel has none of its own");
}

}  // namespace

// The Hadamard rotation of blocks of 32 side by side: Sylvester's matrix over sqrt(32), its own transpose and inverse.
//
// Sums and differences of elements 16, 8, 4, 2 and 1 places apart, in this order and in fp32, then one product: as in
// trainable/hadamard.py, whose eager torch is the definition, bit for bit. Backward it is the same rotation.
#pragma once

#include "tensors.h"
#include "vectors.h"

namespace {

constexpr int64_t kRotated = 32;  // elements of a block
constexpr float kShrink = 0.17677669529663687f;  // 1 / sqrt(32)

constexpr u32x16 kUpper8 = {
    0, 0, 0, 0, 0, 0, 0, 0, kSign, kSign, kSign, kSign, kSign, kSign, kSign, kSign};
constexpr u32x16 kUpper4 = {
    0, 0, 0, 0, kSign, kSign, kSign, kSign, 0, 0, 0, 0, kSign, kSign, kSign, kSign};
constexpr u32x16 kUpper2 = {
    0, 0, kSign, kSign, 0, 0, kSign, kSign, 0, 0, kSign, kSign, 0, 0, kSign, kSign};
constexpr u32x16 kUpper1 = {
    0, kSign, 0, kSign, 0, kSign, 0, kSign, 0, kSign, 0, kSign, 0, kSign, 0, kSign};

// The sum with the partner in the lower element of each pair, in the upper one the partner minus the element.
inline f32x16 with_partner(f32x16 v, f32x16 partner, u32x16 upper) {
  return partner + bits_as<f32x16>(bits_as<u32x16>(v) ^ upper);
}

inline f32x16 rotated_within(f32x16 v) {
  v = with_partner(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7), kUpper8);
  v = with_partner(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11), kUpper4);
  v = with_partner(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13), kUpper2);
  v = with_partner(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14), kUpper1);
  return v * kShrink;
}

// `out` may be `x`.
inline void rotate_blocks(const float* x, float* out, int64_t blocks) {
  for (int64_t k = 0; k < blocks * kRotated; k += kRotated) {
    const f32x16 lower = load<f32x16>(x + k), upper = load<f32x16>(x + k + 16);
    store(out + k, rotated_within(lower + upper));
    store(out + k + 16, rotated_within(lower - upper));
  }
}

inline void check_rotated(int64_t columns) {
  TORCH_CHECK_VALUE(
      columns % kRotated == 0, "a Hadamard rotation needs a last dim that is a multiple of ", kRotated, ", but got ",
      columns, "; exclude it");
}

// fp32. -> like x
at::Tensor rotate(const at::Tensor& any) {
  RECORD_FUNCTION("rin::rotate", {});
  const at::Tensor x = any.contiguous(), out = made_like(x);
  check_rotated(x.size(-1));
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel() / kRotated, kGrain / kRotated, [=](int64_t begin, int64_t end) {
    rotate_blocks(from + begin * kRotated, to + begin * kRotated, end - begin);
  });
  return out;
}

struct Rotation : torch::autograd::Function<Rotation> {
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x) { return rotate(x); }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext*, torch::autograd::variable_list grads) {
    only_once();
    return {rotate(grads[0])};
  }
};

}  // namespace

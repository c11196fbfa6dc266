// Fake quantisation on a CPU in one pass: a block is read, its scale taken from the bits of its largest magnitude, its elements rounded
// and written, all in registers. What is computed, and why so, is said in trainable/quantization.py, whose eager torch is the definition:
// every value here equals its value there.
//
//   amax      the largest magnitude of the block, as an integer: the bits of non-negative floats sort as the floats do
//   scale X   OCP MX v1.0, 6.3: a power of two, the exponent bits of amax + addend (the scale rule), less emax. No log2, no division
//   rounding  (a + 2^23 step) - 2^23 step: the adder rounds to nearest even at the step of a's binade, which is a's exponent bits, but
//             at least those of the grid's smallest normal times X. So elements are rounded where they lie, without scaling them first
//
// Blocks near the ends of fp32, where those products would leave it, and blocks with NaN or Inf go through plain loops that scale first;
// they are rare. bf16 with E2M1 elements, the case of training, is computed in 16-bit integers, of which a register holds twice as many.
//
// Vectors are GCC's and Clang's own (`vector_size`), 64 bytes long; the compiler lowers them to what the flags allow. Not to be compiled
// with -ffast-math or with contraction of a * b + c: both skip roundings on which the method rests.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

namespace {

typedef uint32_t u32x16 __attribute__((vector_size(64)));
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

template <class V>
inline V larger(V a, V b) { return a < b ? b : a; }
template <class V>
inline V smaller(V a, V b) { return a < b ? a : b; }

// The grid of a tiny float; `emax`: the exponent of its largest value.
struct E2M1 { static constexpr int mantissa = 1, emax = 2; static constexpr uint32_t smallest_normal = 0x3F800000, largest = 0x40C00000; };
struct E4M3 { static constexpr int mantissa = 3, emax = 8; static constexpr uint32_t smallest_normal = 0x3C800000, largest = 0x43E00000; };
constexpr uint32_t kOne = 0x3F800000;  // bits of 1.0f: the difference to it turns bits of X into bits of a multiple of X

// 16 elements of fp32, or of bf16, which is the upper half of one.
inline u32x16 read16(const float* x) { return load<u32x16>(x); }
inline u32x16 read16(const uint16_t* x) { return __builtin_convertvector(load<u16x16>(x), u32x16) << 16; }
inline void write16(float* out, u32x16 v) { store(out, v); }
// The upper half is all there is where the value is exact in bf16, as everything from MX is.
inline void write16(uint16_t* out, u32x16 v) { store(out, __builtin_convertvector(v >> 16, u16x16)); }
// To nearest even, as torch does; not for NaN.
inline void write16_near(float* out, u32x16 v) { store(out, v); }
inline void write16_near(uint16_t* out, u32x16 v) { write16(out, v + (0x7FFF + ((v >> 16) & 1))); }

inline u32x16 larger_halves(u32x16 a, u32x16 b) { return bits_as<u32x16>(larger(bits_as<u16x32>(a), bits_as<u16x32>(b))); }

// The largest of 16 lanes, in all of them.
inline u32x16 spread_largest(u32x16 v) {
  v = larger(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return larger(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
}

// --- power-of-two scales (MX) --------------------------------------------------------------------------------------------------------

// 16 elements on the grid in units of X: non-negative, or NaN, which stays.
template <class Grid>
inline f32x16 rounded(f32x16 y) {
  const f32x16 largest = f32x16{} + float_of(Grid::largest);
  y = largest < y ? largest : y;
  const u32x16 binade = larger(bits_as<u32x16>(y) & kExponent, u32x16{} + Grid::smallest_normal);
  const f32x16 magic = bits_as<f32x16>(binade + (uint32_t{kFractionBits - Grid::mantissa} << kFractionBits));
  return (y + magic) - magic;
}

// 16 elements, scaled before and after they are rounded; with their signs.
template <class Grid>
inline u32x16 scaled_and_rounded(u32x16 v, float scale, float inverse) {
  return bits_as<u32x16>(rounded<Grid>(bits_as<f32x16>(v & kMagnitude) * inverse) * scale) | (v & kSign);
}

// Any block of 32, scaled to units of X before it is rounded.
template <class Grid, class T>
__attribute__((noinline)) void mx_block_anywhere(const T* x, T* out, uint32_t amax, uint32_t addend) {
  // Twice the scale: a normal number also where the scale is 2^-127, and finite where amax is.
  const uint32_t lowest = Grid::emax << kFractionBits;
  const uint32_t twice = (std::max(amax, lowest) + addend - ((Grid::emax - 1) << kFractionBits)) & kExponent;
  const float scale = amax < kExponent ? 0.5f * float_of(twice) : kNan;
  const u32x16 low = read16(x), high = read16(x + 16);
  write16(out, scaled_and_rounded<Grid>(low, scale, 1.0f / scale));
  write16(out + 16, scaled_and_rounded<Grid>(high, scale, 1.0f / scale));
}

// 16 elements (bits) on the grid, where they lie.
template <class Grid>
inline u32x16 mx_rounded(u32x16 v, u32x16 scale) {
  const u32x16 a = smaller(v & kMagnitude, scale + (Grid::largest - kOne));
  const u32x16 binade = larger(a & kExponent, scale - (kOne - Grid::smallest_normal));
  const f32x16 magic = bits_as<f32x16>(binade + (uint32_t{kFractionBits - Grid::mantissa} << kFractionBits));
  return bits_as<u32x16>((bits_as<f32x16>(a) + magic) - magic) | (v & kSign);
}

template <class Grid, class T>
inline void mx_block(const T* x, T* out, uint32_t addend) {
  const u32x16 low = read16(x), high = read16(x + 16);
  const u32x16 amax = spread_largest(larger(low & kMagnitude, high & kMagnitude));
  constexpr uint32_t least = 16u << kFractionBits, most = 228u << kFractionBits;  // here all of the above are normal numbers
  if (amax[0] - least >= most - least) return mx_block_anywhere<Grid>(x, out, amax[0], addend);
  const u32x16 scale = ((amax + addend) & kExponent) - (uint32_t{Grid::emax} << kFractionBits);
  write16(out, mx_rounded<Grid>(low, scale));
  write16(out + 16, mx_rounded<Grid>(high, scale));
}

// E2M1 in 16-bit integers. From X upwards the grid has one mantissa bit in every binade, so that rounding is an integer add to a's own
// bits, and 6 X is the end; below X there are 0, X/2 and X, with ties at X/4 (to 0) and 3X/4 (to X).
template <>
inline void mx_block<E2M1, uint16_t>(const uint16_t* x, uint16_t* out, uint32_t addend) {
  const u16x32 v = load<u16x32>(x), a = v & 0x7FFF;
  u32x16 w = bits_as<u32x16>(a);  // pairs of lanes: shuffles of 32 bits are cheaper than those of 16
  w = larger_halves(w, __builtin_shufflevector(w, w, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  w = larger_halves(w, __builtin_shufflevector(w, w, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  w = larger_halves(w, __builtin_shufflevector(w, w, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  w = larger_halves(w, __builtin_shufflevector(w, w, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  w = larger_halves(w, (w << 16) | (w >> 16));
  const u16x32 top = bits_as<u16x32>(w);
  const uint32_t amax = w[0] << 16;
  constexpr uint32_t least = 16u << kFractionBits;
  if (amax - least >= kExponent - least) return mx_block_anywhere<E2M1>(x, out, amax, addend);
  // The addend's lower half is all ones or nothing and meets zeros: it never carries.
  const u16x32 four = (top + static_cast<uint16_t>(addend >> 16)) & 0x7F80;
  const u16x32 one = four - 0x100, half = four - 0x180, quarter = four - 0x200, three_quarters = four - 0x140, six = four + 0x40;
  const u16x32 near = (a + 0x1F + ((a >> 6) & 1)) & 0xFFC0, nothing = {};
  const u16x32 rounded = a < three_quarters ? (a > quarter ? half : nothing) : larger(smaller(near, six), one);
  store(out, rounded | (v & 0x8000));
}

template <class Grid, class T>
void mx(const T* x, T* out, int64_t blocks, uint32_t addend) {
  at::parallel_for(0, blocks, kGrain / 32, [=](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) mx_block<Grid>(x + block * 32, out + block * 32, addend);
  });
}

// --- two scales (NVFP4) --------------------------------------------------------------------------------------------------------------

inline float nan_of(float) { return kNan; }
inline uint16_t nan_of(uint16_t) { return 0x7FC0; }

constexpr float kFlushed = 0x1p-100f;  // rows below it become zero: products of the two scales would no longer be normal

template <class T>
uint32_t largest_of(const T* x, int64_t n) {
  u32x16 amax = {};
  for (int64_t i = 0; i < n; i += 16) amax = larger(amax, read16(x + i) & kMagnitude);
  return spread_largest(amax)[0];
}

inline float outer_scale(uint32_t amax) {
  const float top = float_of(amax);
  return top < kFlushed ? 1.0f : top / (448.0f * 6.0f);
}

// Up to 16 blocks of 16 side by side: their scales are computed together.
template <class T>
inline void nv_blocks(const T* x, T* out, int64_t blocks, float outer) {
  float amax[16] = {}, scales[16], inverses[16];
  for (int64_t block = 0; block < blocks; ++block) amax[block] = float_of(spread_largest(read16(x + 16 * block) & kMagnitude)[0]);
  const f32x16 scale = rounded<E4M3>(load<f32x16>(amax) / 6.0f / outer) * outer, nothing = {};
  store(scales, scale);
  store(inverses, scale == nothing ? nothing : 1.0f / scale);
  for (int64_t block = 0; block < blocks; ++block) {
    write16_near(out + 16 * block, scaled_and_rounded<E2M1>(read16(x + 16 * block), scales[block], inverses[block]));
  }
}

// `common` < 0: each row has an outer scale of its own.
template <class T>
void nv(const T* x, T* out, int64_t rows, int64_t columns, float common) {
  at::parallel_for(0, rows, 1 + kGrain / columns, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = x + row * columns;
      const float outer = common < 0 ? outer_scale(largest_of(in, columns)) : common;
      T* result = out + row * columns;
      if (outer - outer != 0) std::fill(result, result + columns, nan_of(T{}));
      else for (int64_t k = 0; k < columns; k += 256) nv_blocks(in + k, result + k, std::min<int64_t>(16, (columns - k) / 16), outer);
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

// --- the operator --------------------------------------------------------------------------------------------------------------------

enum Format : int64_t { kMxfp4, kMxfp8, kNvfp4 };  // the codes of FORMATS in cpu.py
constexpr const char* kNames[] = {"mxfp4", "mxfp8", "nvfp4"};

template <class T>
void run(const T* x, T* out, int64_t rows, int64_t columns, int64_t format, uint32_t addend, bool per_tensor) {
  if (format == kMxfp4) mx<E2M1>(x, out, rows * columns / 32, addend);
  else if (format == kMxfp8) mx<E4M3>(x, out, rows * columns / 32, addend);
  else nv(x, out, rows, columns, per_tensor ? common_scale(x, rows * columns) : -1.0f);
}

// Any layout and floating dtype; other than fp32 and bf16 it is computed in fp32 and rounded at the end.
at::Tensor fake_quantize(const at::Tensor& any, int64_t format, int64_t addend, bool per_tensor) {
  const at::Tensor x = any.contiguous();
  const int64_t columns = x.size(-1), block = format == kNvfp4 ? 16 : 32;
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

// The same for Python, past the general way of calling operators, which takes longer than a small tensor's arithmetic.
PyObject* fake_quantize_py(PyObject*, PyObject* const* arguments, Py_ssize_t) {
  HANDLE_TH_ERRORS
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rin::fake_quantize", "")
                             .typed<at::Tensor(const at::Tensor&, int64_t, int64_t, bool)>();
  if (!THPVariable_Check(arguments[0])) throw torch::TypeError("fake_quantize takes a tensor");
  return THPVariable_Wrap(op.call(
      THPVariable_Unpack(arguments[0]), PyLong_AsLongLong(arguments[1]), PyLong_AsLongLong(arguments[2]), arguments[3] == Py_True));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {{"fake_quantize", reinterpret_cast<PyCFunction>(fake_quantize_py), METH_FASTCALL, nullptr}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "rin_fake_quantize", nullptr, -1, methods};

}  // namespace

TORCH_LIBRARY(rin, library) { library.def("fake_quantize(Tensor x, int format, int addend, bool per_tensor) -> Tensor"); }
TORCH_LIBRARY_IMPL(rin, CPU, library) { library.impl("fake_quantize", fake_quantize); }
// Without gradient, also for an x that has one: the straight-through estimator is a matter of the layer.
TORCH_LIBRARY_IMPL(rin, Autograd, library) { library.impl("fake_quantize", torch::CppFunction::makeFallthrough()); }

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_rin_fake_quantize() { return PyModule_Create(&module); }

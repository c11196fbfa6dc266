// The library: what Python calls. One translation unit, because torch's headers take longer to read than all of this.
//
// Python comes in past the general way of calling operators, and gradients are computed without going back to it: both
// ways take longer than a small tensor's arithmetic. Only rin::fake_quantize is a registered operator too, for
// torch.compile, which goes around it.
#include <Python.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include "attention.h"
#include "fake_quantize.h"
#include "hadamard.h"
#include "noised.h"
#include "rms_norm.h"
#include "rotary.h"
#include "swiglu.h"

namespace {

const at::Tensor& tensor(PyObject* argument) {
  if (!THPVariable_Check(argument)) {
    throw torch::TypeError(std::string("a tensor is wanted, not ") + Py_TYPE(argument)->tp_name);
  }
  return THPVariable_Unpack(argument);
}
int64_t integer(PyObject* argument) { return PyLong_AsLongLong(argument); }
// Otherwise the arithmetic is done without looking whether a gradient is wanted, which takes a microsecond.
bool learning() { return at::GradMode::is_enabled(); }

// fake_quantize(x, format, addend, per_tensor) -> x on the grid, without gradient
PyObject* py_fake_quantize(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::NoGradGuard without;
  return THPVariable_Wrap(fake_quantize(tensor(given[0]), integer(given[1]), integer(given[2]), given[3] == Py_True));
  END_HANDLE_TH_ERRORS
}

// ste_quantize(x, format, addend, per_tensor) -> the same with the identity as its gradient
PyObject* py_ste_quantize(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  if (!learning()) return py_fake_quantize(nullptr, given, 4);
  return THPVariable_Wrap(
      StraightThrough::apply(tensor(given[0]), integer(given[1]), integer(given[2]), given[3] == Py_True));
  END_HANDLE_TH_ERRORS
}

// rotate(x) -> x in the basis of the Hadamard matrix, with its gradient
PyObject* py_rotate(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::Tensor& x = tensor(given[0]);
  return THPVariable_Wrap(learning() ? Rotation::apply(x) : rotate(x));
  END_HANDLE_TH_ERRORS
}

// rms_norm(x, residual or None, weight, epsilon, format, addend, rotated) -> y, or (y, x + residual)
PyObject* py_rms_norm(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::Tensor &x = tensor(given[0]), &weight = tensor(given[2]);
  const at::Tensor residual = given[1] == Py_None ? at::Tensor() : tensor(given[1]);
  const double epsilon = PyFloat_AsDouble(given[3]);
  const int64_t format = integer(given[4]), addend = integer(given[5]);
  const bool rotated = given[6] == Py_True;
  at::Tensor y, stream;
  if (!learning()) {
    std::tie(y, stream, std::ignore) = rms_norm(x, residual, weight, epsilon, format, addend, rotated);
  } else if (residual.defined()) {
    const auto both = RMSNorm::apply(x, std::optional(residual), weight, epsilon, format, addend, rotated);
    y = both[0], stream = both[1];
  } else {
    y = RMSNorm::apply(x, std::optional<at::Tensor>(), weight, epsilon, format, addend, rotated)[0];
  }
  return residual.defined() ? Py_BuildValue("(NN)", THPVariable_Wrap(y), THPVariable_Wrap(stream))
                            : THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// swiglu(gate, up, format, addend, rotated) -> y
PyObject* py_swiglu(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::Tensor &gate = tensor(given[0]), &up = tensor(given[1]);
  const int64_t format = integer(given[2]), addend = integer(given[3]);
  const bool rotated = given[4] == Py_True;
  return THPVariable_Wrap(
      learning() ? SwiGLU::apply(gate, up, format, addend, rotated) : swiglu(gate, up, format, addend, rotated));
  END_HANDLE_TH_ERRORS
}

// rotary(x, cos, sin) -> y
PyObject* py_rotary(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  return THPVariable_Wrap(Rotary::apply(tensor(given[0]), tensor(given[1]), tensor(given[2])));
  END_HANDLE_TH_ERRORS
}

// attend(q, k, v, cos, sin, keys, values, starts, filled, scale) -> the mixed values, without gradient; keys and
// values grow by k and v
PyObject* py_attend(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::NoGradGuard without;
  return THPVariable_Wrap(attend(
      tensor(given[0]), tensor(given[1]), tensor(given[2]), tensor(given[3]), tensor(given[4]), tensor(given[5]),
      tensor(given[6]), tensor(given[7]), integer(given[8]), PyFloat_AsDouble(given[9])));
  END_HANDLE_TH_ERRORS
}

// noised(base, clean or None, units or None, key, start, sigma, format, addend, per_tensor) -> (the noisy weight, [squared
// change, number of changed elements]), without gradient
PyObject* py_noised(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::NoGradGuard without;
  const auto [out, sums] = noised(
      tensor(given[0]), given[1] == Py_None ? at::Tensor() : tensor(given[1]),
      given[2] == Py_None ? at::Tensor() : tensor(given[2]), PyLong_AsUnsignedLongLong(given[3]), integer(given[4]),
      PyFloat_AsDouble(given[5]), integer(given[6]), integer(given[7]), given[8] == Py_True);
  return Py_BuildValue("(NN)", THPVariable_Wrap(out), THPVariable_Wrap(sums));
  END_HANDLE_TH_ERRORS
}

template <PyObject* function(PyObject*, PyObject* const*, Py_ssize_t), int wanted>
PyObject* counted(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  if (count == wanted) return function(self, given, count);
  return PyErr_Format(PyExc_TypeError, "%d arguments are wanted, not %zd", wanted, count);
}

template <PyObject* function(PyObject*, PyObject* const*, Py_ssize_t), int wanted>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(counted<function, wanted>), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<py_fake_quantize, 4>("fake_quantize"), method<py_ste_quantize, 4>("ste_quantize"),
    method<py_rotate, 1>("rotate"),               method<py_rms_norm, 7>("rms_norm"),
    method<py_swiglu, 5>("swiglu"),               method<py_rotary, 3>("rotary"),
    method<py_attend, 10>("attend"),              method<py_noised, 9>("noised"),
    {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "rin_kernels", nullptr, -1, methods};

}  // namespace

TORCH_LIBRARY(rin, library) {
  library.def("fake_quantize(Tensor x, int format, int addend, bool per_tensor) -> Tensor");
}
TORCH_LIBRARY_IMPL(rin, CPU, library) { library.impl("fake_quantize", fake_quantize); }
// Without gradient, also for an x that has one: the layers that call it know theirs.
TORCH_LIBRARY_IMPL(rin, Autograd, library) { library.impl("fake_quantize", torch::CppFunction::makeFallthrough()); }

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_rin_kernels() { return PyModule_Create(&module); }

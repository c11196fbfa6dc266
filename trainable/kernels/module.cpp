// The library: its operators, and what Python calls. One translation unit, because torch's headers take longer to read than all of this.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include "fake_quantize.h"
#include "rms_norm.h"
#include "rotary.h"
#include "attention.h"

namespace {

// rin::fake_quantize for Python, past the general way of calling operators, which takes longer than a small tensor's arithmetic.
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
PyModuleDef module = {PyModuleDef_HEAD_INIT, "rin_kernels", nullptr, -1, methods};

}  // namespace

TORCH_LIBRARY(rin, library) {
  library.def("fake_quantize(Tensor x, int format, int addend, bool per_tensor) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float epsilon, int format, int addend) -> (Tensor, Tensor)");
  library.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse) -> (Tensor, Tensor)");
  library.def("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  library.def("rotary_backward(Tensor grad, Tensor cos, Tensor sin) -> Tensor");
  library.def("attend(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor starts, int filled, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(rin, CPU, library) {
  library.impl("fake_quantize", fake_quantize);
  library.impl("rms_norm", rms_norm);
  library.impl("rms_norm_backward", rms_norm_backward);
  library.impl("rotary", rotary);
  library.impl("rotary_backward", rotary_backward);
  library.impl("attend", attend);
}
// Without gradient, also for an x that has one: the layers that call these know theirs.
TORCH_LIBRARY_IMPL(rin, Autograd, library) {
  for (const char* name : {"fake_quantize", "rms_norm", "rms_norm_backward", "rotary", "rotary_backward", "attend"}) {
    library.impl(name, torch::CppFunction::makeFallthrough());
  }
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_rin_kernels() { return PyModule_Create(&module); }

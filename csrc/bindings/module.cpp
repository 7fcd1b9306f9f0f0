// The Python module tinyvllm._core: puts its parts together and turns C++ errors into Python's.
#include <new>

#include "base/errors.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace tinyvllm {
namespace {

py::object make(const char* name, const std::exception& error) {
  return py::module_::import("tinyvllm.errors").attr(name)(error.what());
}

// Errors of our own; pybind11 knows what to make of the others.
void translate(std::exception_ptr pending) {
  if (!pending) return;
  try {
    std::rethrow_exception(pending);
  } catch (const Error&) {
    const py::object exception = python_exception(pending, "TinyvllmError");
    PyErr_SetObject(py::type::of(exception).ptr(), exception.ptr());
  }
}

}  // namespace

py::object python_exception(const std::exception_ptr& error, const char* otherwise) {
  try {
    std::rethrow_exception(error);
  } catch (const CheckpointError& e) {
    return make("CheckpointError", e);
  } catch (const UnsupportedModelError& e) {
    return make("UnsupportedModelError", e);
  } catch (const CapacityError& e) {
    return make("CapacityError", e);
  } catch (const DeviceError& e) {
    return make("DeviceError", e);
  } catch (const InvalidRequestError& e) {
    return make("InvalidRequestError", e);
  } catch (const std::bad_alloc& e) {
    return make("CapacityError", e);
  } catch (const std::exception& e) {
    return make(otherwise, e);
  }
}

}  // namespace tinyvllm

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // "Clang 14.0.6"
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core of tinyvllm: checkpoints, ops, and the engine.";
  module.attr("__version__") = TINYVLLM_VERSION;
  module.attr("compiler") = kCompiler;
  py::register_local_exception_translator(&tinyvllm::translate);
  tinyvllm::bind_checkpoint(module);
  tinyvllm::bind_cuda(module);
  tinyvllm::bind_matmul_plans(module);
  tinyvllm::bind_cuda_sampling(module);
  tinyvllm::bind_attention_timer(module);
  tinyvllm::bind_ops(module);
  tinyvllm::bind_engine(module);
}

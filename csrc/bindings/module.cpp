// The Python module tinyvllm._core: puts its parts together and turns C++ errors into Python's.
#include "base/errors.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace tinyvllm {
namespace {

void raise(const char* name, const Error& error) {
  const py::object type = py::module_::import("tinyvllm.errors").attr(name);
  PyErr_SetString(type.ptr(), error.what());
}

void translate(std::exception_ptr pending) {
  if (!pending) return;
  try {
    std::rethrow_exception(pending);
  } catch (const CheckpointError& error) {
    raise("CheckpointError", error);
  } catch (const UnsupportedModelError& error) {
    raise("UnsupportedModelError", error);
  } catch (const CapacityError& error) {
    raise("CapacityError", error);
  } catch (const DeviceError& error) {
    raise("DeviceError", error);
  } catch (const InvalidRequestError& error) {
    raise("InvalidRequestError", error);
  } catch (const Error& error) {
    raise("TinyvllmError", error);
  }
}

}  // namespace
}  // namespace tinyvllm

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core of tinyvllm: checkpoints, ops, and the engine.";
  module.attr("__version__") = TINYVLLM_VERSION;
  py::register_local_exception_translator(&tinyvllm::translate);
  tinyvllm::bind_checkpoint(module);
  tinyvllm::bind_ops(module);
  tinyvllm::bind_engine(module);
}

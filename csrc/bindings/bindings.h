// What the parts of the Python module tinyvllm._core share. Nothing outside this folder knows
// Python.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <string>
#include <vector>

namespace tinyvllm {

// The Python exception that a C++ one becomes: of the same name in tinyvllm.errors where there is
// one, else the type given.
pybind11::object python_exception(const std::exception_ptr& error, const char* otherwise);

void bind_checkpoint(pybind11::module_& module);
void bind_ops(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
void bind_matmul_plans(pybind11::module_& module);     // nothing in a build without CUDA
void bind_cuda_sampling(pybind11::module_& module);    // the same
void bind_attention_timer(pybind11::module_& module);  // the same

// What this module was built with: "gpu", "emulated" or "none".
const char* cuda_build();

// Where the libraries of pip packages lie that the running Python would import: nvidia/*/lib in each
// directory of sys.path.
std::vector<std::string> cuda_library_directories();

}  // namespace tinyvllm

// What the parts of the Python module tinyvllm._core share. Nothing outside this folder knows
// Python.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace tinyvllm {

// The Python exception that a C++ one becomes: of the same name in tinyvllm.errors where there is
// one, else the type given.
pybind11::object python_exception(const std::exception_ptr& error, const char* otherwise);

void bind_checkpoint(pybind11::module_& module);
void bind_ops(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace tinyvllm

// What the parts of the Python module tinyvllm._core share. Nothing outside this folder knows
// Python.
#pragma once

#include <pybind11/pybind11.h>

namespace tinyvllm {

void bind_checkpoint(pybind11::module_& module);
void bind_ops(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace tinyvllm

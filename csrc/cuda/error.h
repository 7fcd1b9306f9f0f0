// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "base/errors.h"

namespace tinyvllm::cuda {

// With a full stop at its end: CUDA's texts have none, those of the emulator have.
inline std::string sentence(const std::string& text) {
  return text.ends_with('.') ? text : text + ".";
}

// Throws Error "cuda: WHAT: CUDA's own words." unless `error` is cudaSuccess: a device that is there
// and fails is not DeviceError, that of one which cannot be had.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw Error("cuda: " + std::string(what) + ": " + sentence(cudaGetErrorString(error)));
}

}  // namespace tinyvllm::cuda

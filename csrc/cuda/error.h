// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "base/errors.h"

namespace tinyvllm::cuda {

// Throws DeviceError "cuda: WHAT: CUDA's own words." unless `error` is cudaSuccess.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw DeviceError("cuda: " + std::string(what) + ": " + cudaGetErrorString(error) + ".");
}

}  // namespace tinyvllm::cuda

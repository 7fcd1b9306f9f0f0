// A model's weights in the memory of a GPU.
#pragma once

#include "cuda/context.h"
#include "model/weights.h"

namespace tinyvllm {

// Copies weights, as load_weights() has found them, into one block of device memory, which the result
// owns. A matrix of several row blocks (q, k, v; gate, up) becomes one: its rows lie side by side.
// Throws CapacityError where they do not fit.
Weights upload_weights(const CudaContext& ctx, const Weights& host, const ModelConfig& config);

}  // namespace tinyvllm

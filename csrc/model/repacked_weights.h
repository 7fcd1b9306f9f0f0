// Weights with every matrix repacked for this CPU's products (ops/repack.h).
#pragma once

#include "checkpoint/checkpoint.h"
#include "model/weights.h"
#include "ops/cpu_context.h"

namespace tinyvllm {

// `weights` as load_weights() has found them, with their matrices in panels, which count as copies.
// What they were repacked from is given back as it goes: copies are freed, and of mapped files the
// process drops its pages (rows of the embedding are read again when needed). Throws CapacityError
// with the numbers if less memory is available than the panels take.
Weights repack_weights(const CpuContext& ctx, const Checkpoint& checkpoint, Weights weights);

}  // namespace tinyvllm

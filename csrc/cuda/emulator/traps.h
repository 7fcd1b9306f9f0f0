// Small programs with a mistake that is easily made on a GPU, and without it. The tests run both: the
// emulator has to find the mistake, and nothing in its absence. Nothing else uses them.
#pragma once

#include <string>
#include <vector>

#include "cuda/context.h"

namespace tinyvllm::cuda::traps {

std::vector<std::string> names();

// Runs a program and returns whether its result is right. Throws Error for a mistake that the
// emulator refuses to run, and for an unknown name.
bool run(const CudaContext& ctx, const std::string& name, bool with_mistake);

}  // namespace tinyvllm::cuda::traps

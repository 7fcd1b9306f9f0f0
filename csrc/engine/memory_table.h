// The lines below an error that says that a model does not fit: what takes how much memory.
#pragma once

#include <string>

#include "checkpoint/checkpoint.h"
#include "engine/runner.h"

namespace tinyvllm {

// Begins with a line end. Without a runner the device gave out before there was one, and what its
// workspace takes and what is free is not known.
std::string memory_table(const Checkpoint& checkpoint, DType compute, const Runner* runner);

}  // namespace tinyvllm

// The lines below an error that says that a model does not fit: what takes how much memory.
#pragma once

#include <string>

#include "checkpoint/checkpoint.h"
#include "engine/runner.h"

namespace tinyvllm {

// Begins with a line end.
std::string memory_table(const Checkpoint& checkpoint, DType compute, const MemoryUse& use);

}  // namespace tinyvllm

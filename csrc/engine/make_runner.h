// Which device runs the steps.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "engine/engine_config.h"
#include "engine/runner.h"

namespace tinyvllm {

// Throws DeviceError in a build that has no CUDA backend.
void require_cuda_build();

// Throws InvalidRequestError: repack_weights was asked for on a GPU, where it means nothing.
[[noreturn]] void refuse_repacked_weights();

// The checkpoint must outlive the runner. eos_token_ids: see Sampler; all in the vocabulary. Throws
// DeviceError where the device that the config names is missing, and what the runners' constructors
// throw.
std::unique_ptr<Runner> make_runner(const Checkpoint& checkpoint, const EngineConfig& config,
                                    std::vector<std::int32_t> eos_token_ids);

}  // namespace tinyvllm

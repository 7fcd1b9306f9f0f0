// Which device runs the steps.
#pragma once

#include <memory>

#include "checkpoint/checkpoint.h"
#include "engine/engine_config.h"
#include "engine/runner.h"

namespace tinyvllm {

// The checkpoint must outlive the runner. Throws DeviceError where the device that the config names is
// missing, and what the runners' constructors throw.
std::unique_ptr<Runner> make_runner(const Checkpoint& checkpoint, const EngineConfig& config);

// The ids of `tokens` that the model has: files name end tokens that it can never choose.
std::vector<std::int32_t> within_vocabulary(std::vector<std::int32_t> tokens, std::int64_t vocab);

}  // namespace tinyvllm

// What a runner takes of memory for its steps, and how much it gives to the KV cache where nobody says.
// Arithmetic that every build has, so that memory can be planned before there is a runner, and for a
// GPU that is elsewhere (src/tinyvllm/memory_plan.py).
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "checkpoint/model_config.h"

namespace tinyvllm {

class CpuContext;

struct StepLimits {
  std::int64_t max_tokens, max_sequences;  // of a step, without padding
  std::int64_t max_model_len;              // of a sequence
  std::int64_t block_size;                 // of the KV cache
  bool graphs = true;                      // a GPU records its steps of decodes
};

// The largest batch that a Transformer is made for. A GPU pads a step of decodes (decode_sizes.h).
struct BatchLimits {
  std::int64_t max_tokens, max_logit_rows;
};
BatchLimits batch_limits(const StepLimits& limits, bool on_gpu);

// On a GPU: the arrays of a step at their largest, of which there are so many (StepInputs), the block
// tables, and the scratch memory of the ops.
inline constexpr std::size_t kNumStepArrays = 2;
std::size_t step_array_bytes(const StepLimits& limits, const ModelConfig& model);
std::size_t block_table_bytes(const StepLimits& limits);
std::size_t op_workspace_bytes(const StepLimits& limits, const ModelConfig& model);
std::int64_t gpu_step_bytes(const StepLimits& limits, const ModelConfig& model);  // all of these

// On the CPU: the scratch memory of the products, of which each thread has its own part.
std::int64_t cpu_step_bytes(const CpuContext& ctx, const BatchLimits& batch,
                            const ModelConfig& model, DType compute);

// With the activations: what is taken beside the weights and the KV cache, on a GPU and on the CPU.
std::int64_t gpu_step_memory_bytes(const StepLimits& limits, const ModelConfig& model,
                                   DType compute);
std::int64_t cpu_step_memory_bytes(const CpuContext& ctx, const StepLimits& limits,
                                   const ModelConfig& model, DType compute);

// On the CPU 40% of what is available, as the weights may still have to be read into the rest.
constexpr std::int64_t host_kv_cache_budget(std::int64_t available) { return available / 5 * 2; }

// On a GPU what is left of the share that may be used. `used`: with the reserve.
constexpr std::int64_t gpu_kv_cache_budget(std::int64_t total, std::int64_t used,
                                           double utilization) {
  const auto allowed = static_cast<std::int64_t>(static_cast<double>(total) * utilization);
  const std::int64_t left = allowed - used;
  return left > 0 ? left : 0;
}

// What comes only when the KV cache is there: CUDA graphs, recorded when they are first needed; what
// the driver then loads, the code of kernels above all; arrays for logprobs and changes of logits,
// less than a MiB unless thousands of tokens are changed.
//
// How many graphs there may be and of how many nodes is known. What a node takes of the card NVIDIA
// does not document, and we have not measured it: 10,240 bytes is what NVIDIA's own cache of graphs
// reckons with (CCCL, executable_graph_cache.cuh). The driver's part is a round figure. A test of
// tests/test_cuda_engine.py asks a real GPU whether both together are enough; on an H200 they were.
inline constexpr std::int64_t kGraphNodeBytes = 10240;
inline constexpr std::int64_t kDriverReserveBytes = std::int64_t{128} << 20;
std::int64_t gpu_reserve_bytes(const StepLimits& limits, const ModelConfig& model);

}  // namespace tinyvllm

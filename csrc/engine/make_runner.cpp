#include "engine/make_runner.h"

#include <string>
#include <utility>

#include "base/errors.h"
#include "base/host.h"
#include "engine/cpu_runner.h"
#include "engine/memory_sizes.h"
#include "engine/memory_table.h"
#if defined(TINYVLLM_HAS_CUDA)
#include "cuda/memory.h"
#include "engine/cuda_runner.h"
#endif

namespace tinyvllm {
namespace {

DType compute_dtype(const EngineConfig& config, const Checkpoint& checkpoint) {
  if (config.dtype) return *config.dtype;
  return checkpoint.dtype() == DType::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
}

// Where the device gave out before there was a runner: what that would have taken, and what is free
// without it.
std::string table(const Checkpoint& checkpoint, const StepLimits& step, DType compute,
                  [[maybe_unused]] bool on_gpu, int num_threads) {
  const ModelConfig& model = checkpoint.config();
  const auto use = [&]() -> MemoryUse {
#if defined(TINYVLLM_HAS_CUDA)
    if (on_gpu) {
      return {
          .workspace = gpu_step_memory_bytes(step, model, compute) + gpu_reserve_bytes(step, model),
          .free = static_cast<std::int64_t>(cuda::memory_info().free)};
    }
#endif
    const CpuContext ctx(num_threads);
    return {.workspace = cpu_step_memory_bytes(ctx, step, model, compute),
            .free = available_memory()};
  };
  return memory_table(checkpoint, compute, use());
}

// The emulator is for those who ask for it.
bool use_cuda(Device device) {
#if !defined(TINYVLLM_HAS_CUDA)
  if (device == Device::kCuda) require_cuda_build();
  return false;
#elif defined(TINYVLLM_CUDA_EMULATE)
  return device == Device::kCuda;
#else
  return device == Device::kCuda || (device == Device::kAuto && CudaContext::is_available());
#endif
}

std::unique_ptr<Runner> runner_on([[maybe_unused]] bool on_gpu, const Checkpoint& checkpoint,
                                  const EngineConfig& config, const StepLimits& step, DType compute,
                                  std::vector<std::int32_t> eos_token_ids) {
#if defined(TINYVLLM_HAS_CUDA)
  if (on_gpu) {
    if (config.repack_weights) refuse_repacked_weights();
    const CudaOptions options{.compute = compute,
                              .step = step,
                              .memory_utilization = config.gpu_memory_utilization,
                              .batch_invariant = config.batch_invariant,
                              .library_directories = config.cuda_library_directories};
    return std::make_unique<CudaRunner>(checkpoint, options, std::move(eos_token_ids));
  }
#endif
  return std::make_unique<CpuRunner>(checkpoint, compute, config.repack_weights, config.num_threads,
                                     batch_limits(step, false), std::move(eos_token_ids));
}

}  // namespace

void require_cuda_build() {
#if !defined(TINYVLLM_HAS_CUDA)
  throw DeviceError(
      "device cuda: this build has no CUDA backend. Build it with `make cuda`, or use --device "
      "cpu.");
#endif
}

void refuse_repacked_weights() {
  throw InvalidRequestError(
      "repack_weights is for the CPU; a GPU has a copy of its own. Leave it out, or take device "
      "cpu.");
}

std::unique_ptr<Runner> make_runner(const Checkpoint& checkpoint, const EngineConfig& config,
                                    std::vector<std::int32_t> eos_token_ids) {
  const DType compute = compute_dtype(config, checkpoint);
  const StepLimits step{
      .max_tokens = config.max_num_batched_tokens,
      .max_sequences = config.max_num_seqs,
      .max_model_len = config.max_model_len.value_or(checkpoint.config().max_position_embeddings),
      .block_size = config.block_size,
      .graphs = !config.enforce_eager && !config.batch_invariant};
  const bool on_gpu = use_cuda(config.device);
  try {
    return runner_on(on_gpu, checkpoint, config, step, compute, std::move(eos_token_ids));
  } catch (const CapacityError& error) {
    throw CapacityError(error.what() +
                        table(checkpoint, step, compute, on_gpu, config.num_threads));
  }
}

}  // namespace tinyvllm

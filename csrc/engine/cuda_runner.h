// Runs steps on an NVIDIA GPU, two in flight: while one is computed the host prepares the next. A
// token that was just sampled goes into the next step on the device; the host learns it later.
//
// A step in which every sequence gets one token is padded to the next batch size of a short list and
// replayed as a CUDA graph, one a size (and split of the contexts), recorded when first needed. With
// `graphs` off the same kernels are launched one by one, on the same padded batch: the results are the
// same bits. A step with chunks of prompts is launched one by one and not padded.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "cuda/context.h"
#include "cuda/graph.h"
#include "cuda/memory.h"
#include "cuda/step_inputs.h"
#include "cuda/stream.h"
#include "engine/cuda_arrays.h"
#include "engine/cuda_logprobs.h"
#include "engine/runner.h"
#include "model/transformer.h"
#include "ops/sample.h"

namespace tinyvllm {

struct CudaOptions {
  DType compute;
  StepLimits step;
  double memory_utilization = 0.9;  // of the card's memory, for everything together
  bool batch_invariant = false;     // the same bits in any batch: every token as a chunk
  std::vector<std::string> library_directories;  // where cuBLASLt is looked for first
};

class CudaRunner : public Runner {
 public:
  // Uploads the weights. Throws DeviceError, CapacityError where they do not fit, and what
  // check_attention() throws.
  CudaRunner(const Checkpoint& checkpoint, const CudaOptions& options,
             std::vector<std::int32_t> eos_token_ids);

  RunnerInfo info() const override;
  MemoryUse memory_use() const override;
  std::int64_t kv_cache_budget() const override;
  void make_kv_cache(const KvShape& shape) override;
  std::size_t max_in_flight() const override { return kStepsInFlight; }
  void launch(const StepPlan& plan) override;
  StepResult& collect() override;
  void copy_logits(std::span<const std::int32_t> rows, float* out) override;
  void abandon() override;

 private:
  // What collect() has to know of a step in flight.
  struct InFlight {
    cuda::Event done;
    std::int32_t num_draws = 0;                // padded
    std::vector<DrawOrigin> origins;           // of each draw
    std::vector<std::int32_t> num_logprobs;    // of each draw; -1: none
    std::vector<std::int32_t> num_of_prompts;  // of each prompt row
  };

  SampleBatch describe_draws(const StepPlan& plan, const DeviceStep& step, InFlight& in_flight);
  void compute(const DeviceStep& step);
  void compute_as_graph(const DeviceStep& step, const SampleBatch& draws);
  void draw(const SampleBatch& draws);
  void copy_forked_blocks(const std::vector<BlockCopy>& copies);
  void find_prompt_logprobs(const StepPlan& plan, InFlight& step);
  std::int32_t* device_tokens() const { return results_.as<std::int32_t>(); }

  const CudaOptions options_;
  const std::vector<std::int32_t> eos_token_ids_;
  CudaContext ctx_;
  Transformer<CudaContext> model_;
  std::optional<KvCache> kv_cache_;

  const cuda::Stream copies_;
  StepArrays arrays_;
  StepInputs copy_inputs_, edit_inputs_, prompt_inputs_;
  cuda::DeviceMemory results_;  // int32 tokens, one a draw, then as many errors
  std::array<cuda::PinnedMemory, kStepsInFlight> host_results_;
  LogprobBuffers draw_logprobs_, prompt_logprobs_;

  struct GraphKey {
    std::int64_t num_sequences;  // padded
    std::int32_t split;          // of the decodes' contexts
    std::size_t slot;            // where its inputs and results lie
    bool draws_inside;           // not if the draws have options that depend on the request
    auto operator<=>(const GraphKey&) const = default;
  };
  std::map<GraphKey, cuda::Graph> graphs_;
  std::array<InFlight, kStepsInFlight> in_flight_;
  std::size_t num_launched_ = 0, num_collected_ = 0;
  StepResult result_;       // of the step that was collected last
  MutTensorView logits_{};  // of the step that was launched last
};

}  // namespace tinyvllm

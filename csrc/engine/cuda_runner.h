// Runs steps on an NVIDIA GPU, two in flight: while one is computed the host prepares the next. A
// token that was just sampled goes into the next step on the device; the host learns it later.
//
// A step in which every sequence gets one token is padded to the next batch size of a short list and
// replayed as a CUDA graph, one a size, recorded when first needed. With `eager` the same kernels are
// launched one by one, on the same padded batch: the results are the same bits. A step with chunks of
// prompts is launched one by one and not padded.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "cuda/context.h"
#include "cuda/graph.h"
#include "cuda/memory.h"
#include "cuda/step_inputs.h"
#include "cuda/stream.h"
#include "engine/runner.h"
#include "model/transformer.h"
#include "ops/sample.h"

namespace tinyvllm {

struct CudaOptions {
  DType compute;
  std::int64_t max_tokens, max_draws;  // of a step
  std::int64_t max_model_len;          // of a sequence
  std::int64_t block_size;             // of the KV cache
  double memory_utilization = 0.9;     // of the card's memory, for everything together
  bool eager = false;                  // no graphs
  bool batch_invariant = false;        // the same bits in any batch: every token as a chunk
  std::vector<std::string> library_directories;  // where cuBLASLt is looked for first
};

class CudaRunner : public Runner {
 public:
  // Uploads the weights. Throws DeviceError, and CapacityError where they do not fit.
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
  // A step on the device: the batch, which of its rows have logits, and what is drawn from them.
  struct DeviceStep {
    Batch<CudaSequences> batch;
    std::int32_t* tokens;         // those of the batch, where unknown ones are filled in
    const std::int32_t* sources;  // of each token: a draw of the step before, or -1
    const std::int32_t* table_entries;
    const std::int32_t* table_starts;
    std::int32_t num_sequences;
    std::span<const std::int32_t> logit_rows;
    SampleBatch draws;
  };

  // Logprobs of up to `rows` tokens, on the device and, for each step in flight, on the host.
  struct LogprobBuffers {
    std::int64_t rows = 0;
    cuda::DeviceMemory device;
    std::array<cuda::PinnedMemory, kStepsInFlight> host;
  };

  // What collect() has to know of a step in flight.
  struct InFlight {
    cuda::Event done;
    std::int32_t num_draws = 0;                // padded
    std::vector<DrawOrigin> origins;           // of each draw
    std::vector<std::int32_t> num_logprobs;    // of each draw; -1: none
    std::vector<std::int32_t> num_of_prompts;  // of each prompt row
  };

  std::int64_t padded(std::int64_t num_sequences) const;
  std::int64_t max_decode_items(std::int64_t num_decodes) const;
  DeviceStep send(const StepPlan& plan, InFlight& in_flight);
  SampleBatch send_draws(const StepPlan& plan, StepInputs::Array<SampleRow> rows,
                         std::int64_t num_rows, InFlight& step);
  void compute(const DeviceStep& step);
  void compute_as_graph(const DeviceStep& step);
  void draw(const SampleBatch& draws);
  void fetch_logprobs();
  std::size_t max_step_bytes() const;
  void copy_forked_blocks(const std::vector<BlockCopy>& copies);
  void find_prompt_logprobs(const StepPlan& plan, InFlight& step);
  void make_room(LogprobBuffers& buffers, std::int64_t rows);
  std::int32_t* device_tokens() const { return results_.as<std::int32_t>(); }

  const CudaOptions options_;
  const std::vector<std::int32_t> eos_token_ids_;
  CudaContext ctx_;
  Transformer<CudaContext> model_;
  const std::int64_t max_blocks_;  // of a block table
  std::optional<KvCache> kv_cache_;

  const cuda::Stream copies_;
  StepInputs step_inputs_, copy_inputs_, edit_inputs_, prompt_inputs_;
  cuda::DeviceMemory tables_;   // [padded sequences, max_blocks] int32
  cuda::DeviceMemory results_;  // int32 tokens, one a draw, then as many errors
  std::array<cuda::PinnedMemory, kStepsInFlight> host_results_;
  LogprobBuffers draw_logprobs_, prompt_logprobs_;

  struct GraphKey {
    std::int64_t num_sequences;  // padded
    std::size_t slot;            // where its inputs and results lie
    bool draws_inside;           // not if the draws have options that depend on the request
    auto operator<=>(const GraphKey&) const = default;
  };
  std::map<GraphKey, cuda::Graph> graphs_;
  std::array<InFlight, kStepsInFlight> in_flight_;
  std::size_t num_launched_ = 0, num_collected_ = 0;
  StepResult result_;                      // of the step that was collected last
  MutTensorView logits_{};                 // of the step that was launched last
  std::vector<std::int32_t> device_rows_;  // of each row of its plan
  std::vector<std::int32_t>
      logits_index_;  // of each row of the device: where its logits are, or -1
};

}  // namespace tinyvllm

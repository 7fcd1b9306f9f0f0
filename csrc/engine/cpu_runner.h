// Runs steps on the CPU: one at a time, to the end.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "engine/memory_sizes.h"
#include "engine/runner.h"
#include "model/transformer.h"
#include "ops/cpu_context.h"

namespace tinyvllm {

class CpuRunner : public Runner {
 public:
  // The checkpoint must outlive the runner: its mappings are the weights, but for those that are
  // copied or repacked.
  CpuRunner(const Checkpoint& checkpoint, DType compute, bool repack, int num_threads,
            const BatchLimits& batch, std::vector<std::int32_t> eos_token_ids);

  RunnerInfo info() const override;
  MemoryUse memory_use() const override;
  std::int64_t kv_cache_budget() const override;
  void make_kv_cache(const KvShape& shape) override;
  std::size_t max_in_flight() const override { return 1; }
  void launch(const StepPlan& plan) override;
  StepResult& collect() override { return result_; }
  void copy_logits(std::span<const std::int32_t> rows, float* out) override;
  void abandon() override {}

 private:
  TensorView forward(const StepPlan& plan);
  void draw(const std::vector<Draw>& draws, TensorView hidden);
  void find_prompt_logprobs(std::span<const PromptRow> rows);

  const BatchLimits batch_;
  const CpuContext ctx_;
  Transformer<CpuContext> model_;
  const Sampler sampler_;
  std::optional<KvCache> kv_cache_;

  // Kept, as what the model and the ops work in is, so that a step allocates nothing once there was
  // one as large: tests/test_allocations.py.
  StepResult result_;
  std::vector<Sampler::Workspace> sampler_workspaces_;  // of each thread
  std::vector<std::int32_t> tokens_, positions_, rows_;
  std::vector<std::int64_t> slots_;
  std::vector<BatchSequence> sequences_;
  std::vector<Largest> largest_;
};

}  // namespace tinyvllm

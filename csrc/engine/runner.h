// What the engine asks of a device: run this step, and what came of it?
//
// The engine decides what is computed; a runner holds the weights and the KV cache and computes it.
// On the CPU a step is done when launch() returns. On a GPU it has only begun, and the engine
// schedules and launches the next one meanwhile.
#pragma once

#include <cstdint>
#include <exception>
#include <span>
#include <string>
#include <vector>

#include "engine/request.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "ops/kv_cache.h"

namespace tinyvllm {

// One token to be sampled: output `sample` of the request of `sequence`, which is that output or
// stands for it, from the logits of a row of the batch.
struct Draw {
  const Sequence* sequence;
  std::int32_t sample;
  std::int32_t row;
};

// The logprob of a prompt's next token, and the best k, from the logits of a row of the batch.
struct PromptRow {
  std::int32_t row;
  std::int32_t token;
  std::int32_t k;
};

// A step. The batch is the scheduled tokens of its sequences, one sequence after the other; they
// begin at num_computed_tokens, and the last of them may be the one that the step in flight samples
// (Sequence::pending_draw).
struct StepPlan {
  const std::vector<ScheduledSequence>& sequences;
  const std::vector<BlockCopy>& copies;
  std::vector<Draw> draws;
  std::vector<PromptRow> prompt_rows;
  bool all_rows = false;  // copy_logits() will ask for rows that nothing is drawn from

  // Whether logits are wanted of the rows that are drawn from, and of no others.
  bool only_draws() const { return prompt_rows.empty() && !all_rows; }
};

struct StepResult {
  std::vector<Sample> samples;                 // of each draw
  std::vector<std::exception_ptr> errors;      // of each draw, or null
  std::vector<TokenLogprobs> prompt_logprobs;  // of each prompt row
};

struct RunnerInfo {
  std::string device;  // cpu, cuda
  std::string isa;     // of the CPU's kernels; for CUDA the card
  int num_threads = 0;
  DType compute = DType::kBFloat16;
  std::size_t copied_weight_bytes = 0;  // that do not lie in the mapped files
};

// Bytes of the device that runs the steps.
struct MemoryUse {
  std::int64_t workspace;  // for what a step computes, at its largest; without weights and KV cache
  std::int64_t free;
};

class Runner {
 public:
  virtual ~Runner() = default;

  virtual RunnerInfo info() const = 0;

  virtual MemoryUse memory_use() const = 0;

  // Bytes that a KV cache may take where nobody says how many, now that the weights are there.
  virtual std::int64_t kv_cache_budget() const = 0;

  // Once, before the first launch. Throws CapacityError.
  virtual void make_kv_cache(const KvShape& shape) = 0;

  // How many steps may have been launched and not collected.
  virtual std::size_t max_in_flight() const = 0;

  // Begins a step. What the plan points to may change as soon as it returns.
  virtual void launch(const StepPlan& plan) = 0;

  // The result of the oldest step in flight, when it is there; the runner's own, for the caller to
  // move from, until the next call.
  virtual StepResult& collect() = 0;

  // For tests: the logits [rows, vocab], float32, of some rows of the batch that was launched last,
  // with all_rows.
  virtual void copy_logits(std::span<const std::int32_t> rows, float* out) = 0;

  // After an error: waits for all steps in flight and drops their results.
  virtual void abandon() = 0;
};

// The most prompt rows that pass the output matrix at a time: [64, vocab] floats are 32 MB at 128k
// tokens.
inline constexpr std::int64_t kPromptLogprobRows = 64;

}  // namespace tinyvllm

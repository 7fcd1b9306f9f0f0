// The engine: requests go in, steps turn them into tokens, each request ends with exactly one
// event.
//
// It knows no text. The front end tokenizes, decodes, looks for stop strings and calls finish().
// It holds no global state: a process may own several.
#pragma once

#include <cstdint>
#include <exception>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "engine/block_pool.h"
#include "engine/request.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "model/transformer.h"
#include "ops/cpu_context.h"
#include "ops/kv_cache.h"

namespace tinyvllm {

struct EngineConfig {
  std::optional<DType> dtype;  // float32 or bfloat16; absent: from the checkpoint (DESIGN 5)
  // Prompt and output together. Absent: the smaller of the model's own and what the pool holds.
  std::optional<std::int64_t> max_model_len;
  std::int64_t max_num_seqs = 256;
  std::int64_t max_num_batched_tokens = 2048;
  std::int64_t block_size = 16;
  // The KV pool, by its number of blocks, else by its bytes, else the smaller of max_num_seqs x
  // max_model_len tokens and 40% of the available memory.
  std::optional<std::int64_t> num_blocks;
  std::optional<std::int64_t> kv_cache_memory_bytes;
  int num_threads = 0;  // 0: one a physical core
  std::uint64_t seed = 0;
  std::vector<std::int32_t> eos_token_ids;  // those outside the vocabulary are ignored
};

// What one step produced, as parallel arrays with an entry an event. An event is a new token, the
// end of a request, or both.
struct StepOutput {
  std::vector<RequestId> request;
  std::vector<std::int32_t> sample;  // which of the request's n outputs
  std::vector<std::int32_t> token;   // -1: no token, only the end
  std::vector<FinishReason> finish;
  std::vector<std::optional<TokenLogprobs>> logprobs;
  std::vector<std::pair<RequestId, std::exception_ptr>> errors;  // one for each kError
};

struct EngineStats {
  std::int64_t num_running = 0, num_waiting = 0;
  std::int64_t num_blocks = 0, num_free_blocks = 0;
  std::int64_t num_steps = 0, num_prompt_tokens = 0, num_output_tokens = 0;
};

class Engine {
 public:
  // Loads the model. Throws CheckpointError, UnsupportedModelError, CapacityError (weights or KV
  // cache do not fit, with the numbers) or InvalidRequestError (an option out of range).
  Engine(const std::filesystem::path& model, const EngineConfig& config);

  // Validates everything before queueing: throws InvalidRequestError, and the engine is as before.
  // Ids are the caller's; one in use is refused.
  void add_request(RequestId id, std::vector<std::int32_t> prompt, const SamplingParams& params);

  // Runs one forward pass over what the scheduler chose. A failure inside it ends the requests that
  // were in the step with kError and leaves the engine usable. If a model file could no longer be
  // read, the step's tokens are discarded.
  StepOutput step();

  // Ends one request early; its terminal event comes out of the next step(). Unknown ids and ids
  // that have ended are ignored: a late call is no mistake. `sample` is which output has ended (0).
  void finish(RequestId id, std::int32_t sample, FinishReason reason);
  void abort(RequestId id) { finish(id, 0, FinishReason::kAbort); }

  // True while step() has something to do or to report.
  bool has_unfinished() const;

  EngineStats stats() const;
  const Checkpoint& checkpoint() const { return checkpoint_; }
  const CpuContext& context() const { return ctx_; }
  const Transformer& model() const { return model_; }
  std::int64_t max_model_len() const { return max_model_len_; }
  std::int64_t num_blocks() const { return num_blocks_; }
  std::int64_t block_size() const { return config_.block_size; }

 private:
  void run(const std::vector<ScheduledRequest>& scheduled, StepOutput& output);
  FinishReason accept(Request& request, std::int32_t token) const;
  std::int64_t choose_num_blocks(const KvShape& one_block) const;

  const EngineConfig config_;
  const Checkpoint checkpoint_;
  const CpuContext ctx_;
  Transformer model_;
  const std::int64_t num_blocks_;
  const std::int64_t max_model_len_;
  KvCache kv_cache_;
  BlockPool pool_;
  Scheduler scheduler_;
  const std::vector<std::int32_t> eos_token_ids_;
  const Sampler sampler_;

  mutable std::mutex mutex_;  // add_request and finish may come from other threads than step's
  std::vector<std::pair<RequestId, FinishReason>> ended_;  // by finish(), not yet reported
  EngineStats totals_;
  std::uint64_t num_arrivals_ = 0;
};

}  // namespace tinyvllm

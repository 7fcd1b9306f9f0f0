// The engine: requests go in, steps turn them into tokens, each request ends with exactly one
// event.
//
// It knows no text. The front end tokenizes, decodes, looks for stop strings and calls finish().
// It holds no global state: a process may own several.
#pragma once

#include <cstdint>
#include <deque>
#include <exception>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "engine/block_pool.h"
#include "engine/engine_config.h"
#include "engine/prefix_cache.h"
#include "engine/request.h"
#include "engine/runner.h"
#include "engine/scheduler.h"
#include "engine/trace.h"

namespace tinyvllm {

// What one step produced. A request has ended when all its outputs have.
struct StepOutput {
  // A new token of an output, the end of that output, or both.
  struct Event {
    RequestId request;
    std::int32_t sample;  // which of the request's n outputs
    std::int32_t token;   // -1: no token, only the end
    FinishReason finish;
    std::unique_ptr<TokenLogprobs> logprobs;  // null: not asked for
  };
  std::vector<Event> events;

  struct Ended {
    RequestId request;
    std::int64_t num_cached_tokens;  // of its prompt, found in the prefix cache
    std::exception_ptr error;        // where its outputs ended with kError
  };
  std::vector<Ended> ended;  // exactly one a request, after its last output
  // Of prompt token 1, 2, ..., once the whole prompt is computed, where SamplingParams asks for
  // them.
  std::vector<std::pair<RequestId, std::vector<TokenLogprobs>>> prompt_logprobs;

  StepOutput() = default;
  StepOutput(StepOutput&&) = default;  // and no copies: logprobs have one owner
  StepOutput& operator=(StepOutput&&) = default;
};

struct EngineStats {
  std::int64_t num_running = 0, num_waiting = 0;  // sequences
  std::int64_t num_blocks = 0, num_free_blocks = 0, num_cached_blocks = 0;
  std::int64_t num_steps = 0;
  std::int64_t num_prefill_tokens = 0;  // computed; those of preempted sequences count again
  std::int64_t num_output_tokens = 0;
  // CPU time of the stepping thread: all of step(), and in it the forward pass and the sampler.
  // What is between the two is the cost of scheduling.
  double step_seconds = 0, model_seconds = 0;
  SchedulerStats scheduler;
};

// Throws InvalidRequestError where an engine could not have these limits of a step.
void check_batch_limits(std::int64_t max_num_seqs, std::int64_t max_num_batched_tokens);

// Where everything is, for tests of the bookkeeping.
struct EngineSnapshot {
  struct Entry {
    RequestId request;
    std::int32_t sample;
    bool running;
    std::int64_t num_slots;
    std::vector<std::int32_t> tokens;
    std::size_t num_computed;
    std::vector<BlockId> block_table;
  };
  std::vector<Entry> sequences;            // in the order of the scheduler
  std::vector<std::int32_t> block_counts;  // [num_blocks]
  std::vector<BlockId> cached_blocks;      // whose content can be found, used ones too
};

class Engine {
 public:
  // Loads the model. Throws CheckpointError, UnsupportedModelError, CapacityError (weights or KV
  // cache do not fit, with the numbers) or InvalidRequestError (an option out of range).
  Engine(const std::filesystem::path& model, const EngineConfig& config);

  // Validates everything before queueing: throws InvalidRequestError, and the engine is as before.
  // Ids are the caller's; one in use is refused, and it is until step() has reported its end.
  void add_request(RequestId id, std::vector<std::int32_t> prompt, const SamplingParams& params);

  // Runs one forward pass over what the scheduler chose. On a GPU it launches the next one before it
  // waits for the results of the oldest: the device is never idle while the host schedules. A failure
  // inside a step ends the requests that were in it, or in one after it, with kError and leaves the
  // engine usable. If a model file could no longer be read, the step's tokens are discarded.
  StepOutput step();

  // Ends one output of a request early; the events come out of the next step(). Unknown ids and
  // what has ended are ignored: a late call is no mistake. So is a request with n > 1 whose prompt
  // is not computed yet: it has no single outputs, abort() ends it.
  void finish(RequestId id, std::int32_t sample, FinishReason reason);
  // Ends all outputs of a request.
  void abort(RequestId id);

  // Forgets all cached prefixes. False, and nothing is done, while requests are unfinished.
  bool reset_prefix_cache();

  // True while step() has something to do or to report.
  bool has_unfinished() const;

  EngineStats stats() const;
  EngineSnapshot snapshot() const;
  // What the user should know: about the model files, and a trace that could not be written to its
  // end.
  std::vector<std::string> warnings() const;
  const Checkpoint& checkpoint() const { return checkpoint_; }
  const Runner& runner() const { return *runner_; }
  const KvShape& kv_shape() const { return kv_shape_; }
  std::int64_t max_model_len() const { return max_model_len_; }

 private:
  // A step that was launched and not collected.
  struct InFlight {
    ScheduledStep step;  // its sequences may have ended meanwhile
    std::vector<RequestId> requests;
    std::vector<Sequence*> targets;        // of each draw; null: it has ended meanwhile
    std::vector<RequestId> prompt_owners;  // of each prompt row
  };

  bool launch_next(StepOutput& output);
  StepPlan plan(const ScheduledStep& step, InFlight& in_flight) const;
  void advance(InFlight& in_flight, const StepPlan& plan);
  void collect_oldest(StepOutput& output);
  void fail_all_in_flight(const std::exception_ptr& error, StepOutput& output);
  void trace_end_of_step(bool failed);
  void accept(Sequence& sequence, Sample sample, StepOutput& output);
  void end(const Sequence& sequence, StepOutput& output, std::exception_ptr error = nullptr);
  void cut_off(const Sequence& sequence, FinishReason reason, StepOutput& output,
               std::exception_ptr error = nullptr);
  void fail(RequestId id, const std::exception_ptr& error, StepOutput& output);
  KvShape choose_kv_shape() const;
  KvShape make_kv_cache() const;
  std::int64_t choose_max_model_len() const;
  std::string memory_table() const;

  const EngineConfig config_;
  const Checkpoint checkpoint_;
  const std::vector<std::int32_t> eos_token_ids_;
  const std::unique_ptr<Runner> runner_;
  const KvShape kv_shape_;
  const std::int64_t max_model_len_;
  // Null: none. Behind what may fail, as it replaces a file.
  const std::unique_ptr<Trace> trace_;
  PrefixCache prefix_cache_;
  BlockPool pool_;
  Scheduler scheduler_;

  mutable std::mutex mutex_;  // add_request and finish may come from other threads than step's
  std::unordered_map<RequestId, std::unique_ptr<Request>> requests_;  // that have not ended
  std::deque<InFlight> in_flight_;                                    // oldest first
  StepOutput reported_;  // what finish() and abort() have ended, for the next step to hand over
  EngineStats totals_;
  std::uint64_t num_arrivals_ = 0;
};

}  // namespace tinyvllm

// What the next step computes: a list of (sequence, number of tokens), and the KV blocks for them.
//
// Continuous batching (Orca, Yu et al. 2022) with chunked prefill (Sarathi, Agrawal et al. 2023):
// running sequences get their next token first, what is left of the step's budget goes to chunks of
// waiting prompts. First come, first served, and nobody overtakes. When the pool runs dry, the
// sequence that came last gives its blocks back and is computed again later (preemption by
// recomputation).
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "engine/block_pool.h"
#include "engine/prefix_cache.h"
#include "engine/request.h"
#include "ops/kv_cache.h"

namespace tinyvllm {

class Trace;

struct SchedulerConfig {
  std::int64_t max_num_batched_tokens;  // tokens a step; at least max_num_seqs
  std::int64_t max_num_seqs;            // sequences that run at a time
  std::int64_t block_size;              // tokens a block
  bool prefix_caching = true;
  bool static_batching =
      false;  // admit only when nothing runs: the batch drains before the next one
};

struct ScheduledSequence {
  Sequence* sequence;
  std::int64_t num_tokens;  // of its tokens, from num_computed_tokens on
};

struct ScheduledStep {
  std::vector<ScheduledSequence> sequences;
  std::vector<BlockCopy> copies;   // to be made in this order, before anything is computed
  std::vector<BlockId> published;  // what forget() is for, should the step fail
};

struct SchedulerStats {
  std::int64_t num_preemptions = 0;
  std::int64_t prefix_cache_queries = 0, prefix_cache_hits = 0;  // in tokens
};

class Scheduler {
 public:
  Scheduler(const SchedulerConfig& config, BlockPool& pool, PrefixCache& cache,
            Trace* trace = nullptr)
      : config_(config), pool_(pool), cache_(cache), trace_(trace) {}

  // A sequence that alone is longer than the pool can never end; the engine refuses it before it
  // comes here, and one that needs more than max_num_seqs slots.
  void add(std::unique_ptr<Sequence> sequence);

  // Empty if there is nothing to do. Every sequence in it has blocks for its tokens.
  ScheduledStep schedule();

  // Takes a step's published blocks back, because their content was never computed.
  void forget(const ScheduledStep& step);

  // The n - 1 others of a sequence that stands for all, which then stands for sample 0. They share
  // its blocks. Returns them in order.
  std::vector<Sequence*> fork(Sequence& leader);

  // Frees the blocks of one sequence and drops it.
  void remove(const Sequence& sequence);

  // All sequences of a request, in order. They stay valid until removed.
  std::vector<Sequence*> find(RequestId id) const;

  // Calls f(sequence, whether it runs) for each sequence, in order.
  template <typename F>
  void visit(F&& f) const {
    for (const auto& sequence : running_) f(*sequence, true);
    for (const auto& sequence : waiting_) f(*sequence, false);
  }

  std::int64_t num_running() const { return static_cast<std::int64_t>(running_.size()); }
  std::int64_t num_waiting() const { return static_cast<std::int64_t>(waiting_.size()); }
  const SchedulerStats& stats() const { return stats_; }
  const SchedulerConfig& config() const { return config_; }

 private:
  bool make_room(Sequence& sequence, std::int64_t num_tokens, ScheduledStep& step);
  void preempt_last(const Sequence& needy);
  bool admit_first(std::int64_t& budget, ScheduledStep& step);
  std::vector<BlockId> find_prefix(const Sequence& sequence) const;
  void publish(Sequence& sequence, std::int64_t num_tokens, ScheduledStep& step);
  std::int64_t num_slots_used() const;

  const SchedulerConfig config_;
  BlockPool& pool_;
  PrefixCache& cache_;
  Trace* const trace_;  // null: none
  SchedulerStats stats_;
  // Both by arrival, then by sample (first come, first served), and all that runs is before all that
  // waits.
  std::vector<std::unique_ptr<Sequence>> running_;
  std::deque<std::unique_ptr<Sequence>> waiting_;
};

}  // namespace tinyvllm

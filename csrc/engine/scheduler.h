// What the next step computes: a list of (request, number of tokens), and the KV blocks for them.
//
// First come, first served, one request at a time: its prompt in chunks of at most
// max_num_batched_tokens, then one token a step.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "engine/block_pool.h"
#include "engine/request.h"

namespace tinyvllm {

struct ScheduledRequest {
  Request* request;
  std::int64_t num_tokens;  // of its tokens, from num_computed_tokens on
};

class Scheduler {
 public:
  // block_size: tokens a block. max_num_batched_tokens: tokens a step, at least 1.
  Scheduler(BlockPool& pool, std::int64_t block_size, std::int64_t max_num_batched_tokens)
      : pool_(pool), block_size_(block_size), max_num_batched_tokens_(max_num_batched_tokens) {}

  // A request of more than num_blocks * block_size tokens in all can never end; the engine refuses
  // it before it comes here.
  void add(std::unique_ptr<Request> request) { requests_.push_back(std::move(request)); }

  // Empty if there is nothing to do. Every request in it has blocks for its tokens.
  std::vector<ScheduledRequest> schedule();

  // Frees the request's blocks and hands it over; null if there is none of that id.
  std::unique_ptr<Request> remove(RequestId id);

  bool contains(RequestId id) const;
  std::int64_t num_running() const;
  std::int64_t num_waiting() const {
    return static_cast<std::int64_t>(requests_.size()) - num_running();
  }

 private:
  BlockPool& pool_;
  const std::int64_t block_size_;
  const std::int64_t max_num_batched_tokens_;
  std::deque<std::unique_ptr<Request>> requests_;  // by arrival; only the first one may hold blocks
};

}  // namespace tinyvllm

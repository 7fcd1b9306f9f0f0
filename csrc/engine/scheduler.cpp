#include "engine/scheduler.h"

#include <algorithm>
#include <string>

#include "base/errors.h"

namespace tinyvllm {

std::vector<ScheduledRequest> Scheduler::schedule() {
  if (requests_.empty()) return {};
  Request& request = *requests_.front();
  const auto missing =
      static_cast<std::int64_t>(request.tokens.size() - request.num_computed_tokens);
  const std::int64_t num_tokens = std::min(missing, max_num_batched_tokens_);
  const std::int64_t covered = static_cast<std::int64_t>(request.num_computed_tokens) + num_tokens;
  if (!pool_.grow(request.block_table, covered, block_size_)) {
    throw CapacityError("Request " + std::to_string(request.id) + " needs " +
                        std::to_string(covered) + " tokens of KV cache; the whole pool holds " +
                        std::to_string(pool_.num_blocks() * block_size_) +
                        ". Lower max_tokens or raise kv_cache_memory_bytes.");
  }
  return {{&request, num_tokens}};
}

std::unique_ptr<Request> Scheduler::remove(RequestId id) {
  const auto found = std::find_if(requests_.begin(), requests_.end(),
                                  [id](const auto& request) { return request->id == id; });
  if (found == requests_.end()) return nullptr;
  std::unique_ptr<Request> request = std::move(*found);
  requests_.erase(found);
  pool_.release(request->block_table);
  return request;
}

bool Scheduler::contains(RequestId id) const {
  return std::any_of(requests_.begin(), requests_.end(),
                     [id](const auto& request) { return request->id == id; });
}

std::int64_t Scheduler::num_running() const {
  return !requests_.empty() && !requests_.front()->block_table.empty() ? 1 : 0;
}

}  // namespace tinyvllm

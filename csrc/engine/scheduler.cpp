#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

#include "engine/trace.h"

namespace tinyvllm {
namespace {

// How many sequences ahead of its turn one is fetched.
constexpr std::size_t kPrefetch = 8;

std::int64_t num_missing(const Sequence& sequence) {
  return static_cast<std::int64_t>(sequence.num_tokens() - sequence.num_computed_tokens);
}

// Whether the next step can go on with a sequence though its last token is not known yet: not if it
// is the last one anyway, and not if what follows depends on which tokens came before.
bool may_run_ahead(const Sequence& sequence) {
  return static_cast<std::int64_t>(sequence.num_tokens()) < sequence.max_total_tokens &&
         !sequence.has_penalties;
}

}  // namespace

void Scheduler::add(std::unique_ptr<Sequence> sequence) {
  if (trace_) trace_->queued(*sequence);
  waiting_.push_back(std::move(sequence));
}

ScheduledStep Scheduler::schedule() {
  ScheduledStep step;
  std::int64_t budget = config_.max_num_batched_tokens;
  const std::int64_t num_preemptions = stats_.num_preemptions;
  const bool may_admit = !config_.static_batching || running_.empty();
  step.sequences.reserve(running_.size());

  for (std::size_t i = 0; i < running_.size() && budget > 0; ++i) {
    Sequence& sequence = *running_[i];
    if (i + kPrefetch < running_.size()) running_[i + kPrefetch]->prefetch();
    if (sequence.num_pending > 0 && !may_run_ahead(sequence)) continue;
    const std::int64_t num_tokens = std::min(num_missing(sequence), budget);
    bool fits = make_room(sequence, num_tokens, step);
    while (!fits && running_.size() > i + 1) {  // whoever came last gives way
      preempt_last(sequence);
      fits = make_room(sequence, num_tokens, step);
    }
    if (!fits) {
      preempt_last(sequence);  // itself
      break;
    }
    publish(sequence, num_tokens, step);
    sequence.is_new = false;
    step.sequences.push_back({&sequence, num_tokens});
    budget -= num_tokens;
  }
  // After a preemption there is no room, and whoever was preempted is the first to come back.
  if (may_admit && stats_.num_preemptions == num_preemptions) {
    while (budget > 0 && !waiting_.empty() && admit_first(budget, step)) {
    }
  }
  return step;
}

// Blocks for the next num_tokens tokens; a shared block that is not full is replaced by a copy. If
// there are too few free blocks it changes nothing and returns false.
bool Scheduler::make_room(Sequence& sequence, std::int64_t num_tokens, ScheduledStep& step) {
  const auto computed = static_cast<std::int64_t>(sequence.num_computed_tokens);
  const std::int64_t wanted = (computed + num_tokens + config_.block_size - 1) / config_.block_size;
  const std::int64_t missing = wanted - static_cast<std::int64_t>(sequence.block_table.size());
  const bool writes_shared =
      sequence.is_fork && computed % config_.block_size != 0 &&
      pool_.count(sequence.block_table[static_cast<std::size_t>(computed / config_.block_size)]) >
          1;
  if (missing + (writes_shared ? 1 : 0) > pool_.num_free()) return false;
  if (writes_shared) {
    BlockId& shared = sequence.block_table[static_cast<std::size_t>(computed / config_.block_size)];
    const BlockId own = pool_.allocate();
    step.copies.push_back({shared, own});
    if (trace_) {
      trace_->copied(sequence, static_cast<std::size_t>(computed / config_.block_size), shared,
                     own);
    }
    pool_.release(std::exchange(shared, own));
  }
  const std::size_t first_new = sequence.block_table.size();
  for (std::int64_t i = 0; i < missing; ++i) sequence.block_table.push_back(pool_.allocate());
  if (trace_ && missing > 0) {
    trace_->allocated(sequence, first_new, std::span(sequence.block_table).subspan(first_new));
  }
  return true;
}

// The sequence that came last gives way to `needy`, which may be the same.
void Scheduler::preempt_last(const Sequence& needy) {
  std::unique_ptr<Sequence> sequence = std::move(running_.back());
  running_.pop_back();
  if (trace_) {
    trace_->preempted(*sequence, needy, pool_.num_free());
    trace_->released(*sequence);
  }
  pool_.release_all(sequence->block_table);
  sequence->num_computed_tokens = 0;
  sequence->num_published_blocks = 0;
  sequence->published = {};
  waiting_.push_front(std::move(sequence));
  ++stats_.num_preemptions;
}

// Moves the first waiting sequence to the running ones, if there are slots and blocks for a chunk
// of it.
bool Scheduler::admit_first(std::int64_t& budget, ScheduledStep& step) {
  Sequence& sequence = *waiting_.front();
  if (sequence.num_pending > 0) return false;  // preempted while its next token was being computed
  if (num_slots_used() + sequence.num_slots() > config_.max_num_seqs) return false;
  const std::vector<BlockId> prefix = find_prefix(sequence);
  const std::int64_t num_cached = std::ssize(prefix) * config_.block_size;
  const std::int64_t num_tokens = std::min(num_missing(sequence) - num_cached, budget);
  const std::int64_t wanted =
      (num_cached + num_tokens + config_.block_size - 1) / config_.block_size - std::ssize(prefix);
  const std::int64_t revived = std::count_if(
      prefix.begin(), prefix.end(), [this](BlockId block) { return pool_.count(block) == 0; });
  if (wanted + revived > pool_.num_free()) return false;

  if (trace_) {
    trace_->admitted(sequence, num_cached);
    if (!prefix.empty()) trace_->hit(sequence, prefix);
  }
  for (const BlockId block : prefix) {
    pool_.share(block);
    sequence.block_table.push_back(block);
    sequence.published = cache_.key_of(block);
  }
  sequence.num_published_blocks = prefix.size();
  sequence.num_computed_tokens = static_cast<std::size_t>(num_cached);
  make_room(sequence, num_tokens, step);
  publish(sequence, num_tokens, step);

  if (config_.prefix_caching) {
    stats_.prefix_cache_queries += static_cast<std::int64_t>(sequence.tokens.size());
    stats_.prefix_cache_hits += num_cached;
  }
  Request& request = *sequence.request;
  if (request.num_cached_tokens < 0) request.num_cached_tokens = num_cached;
  sequence.is_new = true;
  step.sequences.push_back({&sequence, num_tokens});
  budget -= num_tokens;
  running_.push_back(std::move(waiting_.front()));
  waiting_.pop_front();
  return true;
}

// The cached blocks that the sequence begins with: whole ones, and never its last token, which must
// be computed for its logits, in a block of the sequence's own.
std::vector<BlockId> Scheduler::find_prefix(const Sequence& sequence) const {
  std::vector<BlockId> prefix;
  if (!config_.prefix_caching || sequence.request->wants_prompt_logprobs()) return prefix;
  const auto size = static_cast<std::size_t>(config_.block_size);
  ContentKey before;
  for (std::size_t end = size; end < sequence.tokens.size(); end += size) {
    const auto block = cache_.find(before, std::span(sequence.tokens).subspan(end - size, size));
    if (!block) break;
    prefix.push_back(*block);
    before = cache_.key_of(*block);
  }
  return prefix;
}

// Makes the blocks known that the next num_tokens tokens fill. They may be hit in the same step: a
// layer writes the K and V of the whole batch before a sequence that is new attends. A block with a
// token that is not known yet has to wait for it.
void Scheduler::publish(Sequence& sequence, std::int64_t num_tokens, ScheduledStep& step) {
  if (!config_.prefix_caching) return;
  const auto size = static_cast<std::size_t>(config_.block_size);
  const std::size_t full =
      std::min(sequence.num_computed_tokens + static_cast<std::size_t>(num_tokens),
               sequence.tokens.size()) /
      size;
  for (std::size_t& i = sequence.num_published_blocks; i < full; ++i) {
    const BlockId block = sequence.block_table[i];
    const bool known = cache_.contains(block);
    sequence.published = cache_.publish(block, sequence.published,
                                        std::span(sequence.tokens).subspan(i * size, size));
    if (known || !cache_.contains(block)) continue;
    step.published.push_back(block);
    if (trace_) trace_->published(sequence, i, block);
  }
}

void Scheduler::forget(const ScheduledStep& step) {
  for (const BlockId block : step.published) pool_.forget(block);
}

std::vector<Sequence*> Scheduler::fork(Sequence& leader) {
  leader.stands_for_all = false;
  leader.is_fork = true;
  std::vector<Sequence*> children;
  auto place = std::find_if(running_.begin(), running_.end(),
                            [&](const auto& sequence) { return sequence.get() == &leader; });
  for (std::int32_t sample = 1; sample < leader.request->params.n; ++sample) {
    auto child = std::make_unique<Sequence>(leader);
    child->sample = sample;
    for (const BlockId block : child->block_table) pool_.share(block);
    if (trace_) trace_->forked(leader, *child);
    children.push_back(child.get());
    place = running_.insert(place + 1, std::move(child));
  }
  return children;
}

void Scheduler::remove(const Sequence& sequence) {
  const auto is_it = [&](const auto& other) { return other.get() == &sequence; };
  const auto running = std::find_if(running_.begin(), running_.end(), is_it);
  if (running != running_.end()) {
    if (trace_) trace_->released(**running);
    pool_.release_all((*running)->block_table);
    running_.erase(running);
    return;
  }
  waiting_.erase(std::find_if(waiting_.begin(), waiting_.end(), is_it));
}

std::vector<Sequence*> Scheduler::find(RequestId id) const {
  std::vector<Sequence*> found;
  for (const auto& sequence : running_) {
    if (sequence->id == id) found.push_back(sequence.get());
  }
  for (const auto& sequence : waiting_) {
    if (sequence->id == id) found.push_back(sequence.get());
  }
  return found;
}

std::int64_t Scheduler::num_slots_used() const {
  std::int64_t slots = 0;
  for (const auto& sequence : running_) slots += sequence->num_slots();
  return slots;
}

}  // namespace tinyvllm

// A file that explains a run: what each step computed, what happened to each request and why, and
// every change of a block table, as events in Chrome's trace format (see docs/trace.md).
//
// The scheduler and the pool hold a pointer to it, null when there is no trace, and call the method
// that is named after what has just happened. Replaying the events gives every block table, the
// order of the queues and the set of cached blocks after every step; Replay in tests/test_trace.py
// does it in 50 lines.
//
// Events go to the file at the end of each step, so that a killed process leaves a readable file;
// memory is bounded by a buffer and by the requests that have not ended. Its callers hold the
// engine's lock.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "engine/request.h"

namespace tinyvllm {

class BlockPool;
struct ScheduledStep;
struct SchedulerConfig;

class Trace {
 public:
  // Replaces the file. Throws InvalidRequestError if it cannot be written.
  explicit Trace(const std::filesystem::path& path);
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  // What a replay starts from: everything is free.
  void engine_is_made(const SchedulerConfig& config, std::int64_t num_blocks);

  // A request's way. Every sequence of it has a track of its own.
  void queued(const Sequence& sequence);
  void admitted(const Sequence& sequence, std::int64_t num_cached_tokens);
  // `needy` could not go on; the sequence itself, if it came last.
  void preempted(const Sequence& sequence, const Sequence& needy, std::int64_t num_free_blocks);
  void forked(const Sequence& leader, const Sequence& child);  // the child's table is the leader's
  void finished(const Sequence& sequence, FinishReason reason);

  // Block tables. `position` is the index in the table of the first of the blocks.
  void hit(const Sequence& sequence, std::span<const BlockId> blocks);
  void allocated(const Sequence& sequence, std::size_t position, std::span<const BlockId> blocks);
  void copied(const Sequence& sequence, std::size_t position, BlockId from, BlockId to);
  void released(const Sequence& sequence);  // the whole table, which still has its blocks

  // The prefix cache: a block is known by its content, until it is evicted (the pool needs it) or
  // forgotten (its step failed, or the cache was reset).
  void published(const Sequence& sequence, std::size_t position, BlockId block);
  void evicted(BlockId block);
  void forgotten(BlockId block);

  // One step: begins, is scheduled, is computed (unless that fails), ends.
  void step_begins();
  void step_is_scheduled(const ScheduledStep& step);
  void step_is_computed(const ScheduledStep& step);  // its sequences have been advanced
  void step_ends(std::int64_t number, bool failed, const BlockPool& pool, std::int64_t num_running,
                 std::int64_t num_waiting);

  // Hands the events so far to the system.
  void flush();

  // Why the trace ends early, if writing failed; the run goes on without it. From any thread.
  std::optional<std::string> problem() const;

 private:
  using Nanoseconds = std::int64_t;  // since the trace began
  enum class Phase : std::uint8_t { kQueued, kPrefill, kPrefilled, kDecode };
  struct Track {  // where an event is shown
    std::int64_t process, thread;
  };
  static const Track kSteps, kPool;
  struct Tracks {  // of a request: one for each sample, side by side
    std::int64_t first_thread;
    std::int64_t num_open;  // samples that have not finished
    std::vector<Phase> phases;
  };
  struct Argument {
    const char* name;
    std::variant<std::int64_t, const char*, std::span<const BlockId>> value;
  };
  using Arguments = std::initializer_list<Argument>;

  Nanoseconds now() const;
  Track track_of(const Sequence& sequence) const;
  Phase& phase_of(const Sequence& sequence);
  void name(const char* kind, Track track, const std::string& name);
  void name_track(const Sequence& sequence);
  void instant(const char* name, Track track, Arguments arguments);
  void slice(const char* name, Track track, Nanoseconds from, Nanoseconds to, Arguments arguments);
  void event(char kind, const char* name, Track track, Nanoseconds at, Arguments arguments,
             Nanoseconds duration = 0);
  void fail(std::int64_t num_good_bytes);

  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  const std::filesystem::path path_;
  const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
  std::unique_ptr<std::FILE, Close> file_;  // null after a failure
  std::string buffer_ = "[";
  std::int64_t num_bytes_ = 0;  // handed to the system
  std::string problem_;
  std::atomic<bool> failed_ = false;

  std::unordered_map<RequestId, Tracks> requests_;  // that have not ended
  std::int64_t next_thread_;
  std::int64_t max_num_batched_tokens_ = 0;
  struct {
    Nanoseconds began, scheduled, computed;
    std::int64_t num_sequences, prefill_tokens, decode_tokens, num_preempted;
  } step_ = {};
};

}  // namespace tinyvllm

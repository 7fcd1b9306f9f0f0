#include "engine/trace.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>

#include "base/errors.h"
#include "base/printable.h"
#include "engine/block_pool.h"
#include "engine/scheduler.h"

namespace tinyvllm {
namespace {

constexpr std::size_t kBufferSize = 1 << 16;
constexpr std::int64_t kEngine = 1, kRequests = 2;  // "processes" of the trace format: groups
constexpr std::int64_t kFirstRequestThread = 100;

// Microseconds with three decimals, from integers: no locale can put a comma there.
void append_microseconds(std::string& text, std::int64_t nanoseconds) {
  const std::string fraction = std::to_string(1000 + nanoseconds % 1000);
  text += std::to_string(nanoseconds / 1000) + "." + fraction.substr(1);
}

}  // namespace

// A viewer takes a thread with the number of its process for the main thread, and shows it first.
constexpr Trace::Track Trace::kSteps{kEngine, 10}, Trace::kPool{kEngine, 11};

Trace::Trace(const std::filesystem::path& path) : path_(path), next_thread_(kFirstRequestThread) {
  file_.reset(std::fopen(path.c_str(), "we"));
  if (!file_) {
    throw InvalidRequestError("The trace file " + printable(path) + " cannot be written: " +
                              std::strerror(errno) + ". Choose a path in a folder that exists.");
  }
  std::setvbuf(file_.get(), nullptr, _IONBF, 0);  // there is a buffer already
  const Track engine{kEngine, 0}, requests{kRequests, 0};
  name("process_name", engine, "engine");
  name("thread_name", kSteps, "steps");
  name("thread_name", kPool, "block pool");
  name("process_name", requests, "requests");
}

Trace::~Trace() {
  flush();
  if (file_) std::fputs("\n]\n", file_.get());
}

void Trace::engine_is_made(const SchedulerConfig& config, std::int64_t num_blocks) {
  max_num_batched_tokens_ = config.max_num_batched_tokens;
  instant("engine", kSteps,
          {{"num_blocks", num_blocks},
           {"block_size", config.block_size},
           {"max_num_batched_tokens", config.max_num_batched_tokens},
           {"max_num_seqs", config.max_num_seqs}});
  flush();
}

// --- Requests ------------------------------------------------------------------------------------

void Trace::queued(const Sequence& sequence) {
  const Request& request = *sequence.request;
  const auto samples = static_cast<std::size_t>(request.params.n);
  requests_[request.id] = {next_thread_, request.params.n, {samples, Phase::kQueued}};
  next_thread_ += request.params.n;
  name_track(sequence);
  event('B', "queued", track_of(sequence), now(),
        {{"request", request.id},
         {"sample", sequence.sample},
         {"prompt_tokens", static_cast<std::int64_t>(request.num_prompt_tokens)},
         {"outputs", request.params.n}});
}

void Trace::admitted(const Sequence& sequence, std::int64_t num_cached_tokens) {
  const Track track = track_of(sequence);
  event('E', "queued", track, now(), {});
  instant("admitted", track,
          {{"request", sequence.id},
           {"sample", sequence.sample},
           {"tokens", std::ssize(sequence.tokens)},
           {"cached_tokens", num_cached_tokens}});
  phase_of(sequence) = Phase::kPrefill;
}

void Trace::preempted(const Sequence& sequence, const Sequence& needy,
                      std::int64_t num_free_blocks) {
  const Track track = track_of(sequence);
  if (phase_of(sequence) == Phase::kDecode) event('E', "decode", track, now(), {});
  const bool gives_way = &sequence != &needy;
  instant("preempted", track,
          {{"request", sequence.id},
           {"sample", sequence.sample},
           {"reason", gives_way ? "too few free blocks: the last to come gives way"
                                : "too few free blocks, and it came last itself"},
           {"for_request", needy.id},
           {"for_sample", needy.sample},
           {"free_blocks", num_free_blocks},
           {"lost_tokens", static_cast<std::int64_t>(sequence.num_computed_tokens)}});
  event('B', "queued", track, now(), {{"request", sequence.id}, {"sample", sequence.sample}});
  phase_of(sequence) = Phase::kQueued;
  ++step_.num_preempted;
}

void Trace::forked(const Sequence& leader, const Sequence& child) {
  name_track(child);
  instant("forked", track_of(child),
          {{"request", child.id}, {"sample", child.sample}, {"from_sample", leader.sample}});
  instant("share", kPool,
          {{"request", child.id},
           {"sample", child.sample},
           {"from_sample", leader.sample},
           {"blocks", child.block_table}});
  phase_of(child) = Phase::kPrefilled;
}

void Trace::finished(const Sequence& sequence, FinishReason reason) {
  const Track track = track_of(sequence);
  const Phase phase = phase_of(sequence);
  if (phase == Phase::kQueued) event('E', "queued", track, now(), {});
  if (phase == Phase::kDecode) event('E', "decode", track, now(), {});
  instant("finished", track,
          {{"request", sequence.id},
           {"sample", sequence.sample},
           {"reason", name_of(reason)},
           {"output_tokens", static_cast<std::int64_t>(sequence.num_output_tokens())}});
  Tracks& tracks = requests_.at(sequence.id);
  tracks.num_open -= sequence.num_slots();
  if (tracks.num_open == 0) requests_.erase(sequence.id);
}

// --- Blocks --------------------------------------------------------------------------------------

void Trace::hit(const Sequence& sequence, std::span<const BlockId> blocks) {
  instant("hit", kPool,
          {{"request", sequence.id},
           {"sample", sequence.sample},
           {"position", std::int64_t{0}},
           {"blocks", blocks}});
}

void Trace::allocated(const Sequence& sequence, std::size_t position,
                      std::span<const BlockId> blocks) {
  instant("allocate", kPool,
          {{"request", sequence.id},
           {"sample", sequence.sample},
           {"position", static_cast<std::int64_t>(position)},
           {"blocks", blocks}});
}

void Trace::copied(const Sequence& sequence, std::size_t position, BlockId from, BlockId to) {
  instant("copy", kPool,
          {{"request", sequence.id},
           {"sample", sequence.sample},
           {"position", static_cast<std::int64_t>(position)},
           {"from", from},
           {"to", to}});
}

void Trace::released(const Sequence& sequence) {
  instant(
      "release", kPool,
      {{"request", sequence.id}, {"sample", sequence.sample}, {"blocks", sequence.block_table}});
}

void Trace::published(const Sequence& sequence, std::size_t position, BlockId block) {
  instant("publish", kPool,
          {{"request", sequence.id},
           {"sample", sequence.sample},
           {"position", static_cast<std::int64_t>(position)},
           {"block", block}});
}

void Trace::evicted(BlockId block) { instant("evict", kPool, {{"block", block}}); }

void Trace::forgotten(BlockId block) { instant("forget", kPool, {{"block", block}}); }

// --- Steps ---------------------------------------------------------------------------------------

void Trace::step_begins() {
  step_ = {};
  step_.began = now();
}

void Trace::step_is_scheduled(const ScheduledStep& step) {
  step_.scheduled = now();
  step_.num_sequences = std::ssize(step.sequences);
  for (const auto& [sequence, num_tokens] : step.sequences) {
    const bool prefill = phase_of(*sequence) == Phase::kPrefill;
    (prefill ? step_.prefill_tokens : step_.decode_tokens) += num_tokens;
  }
}

// A chunk of prefill is a slice; all tokens of a decode from the first to the last are one.
void Trace::step_is_computed(const ScheduledStep& step) {
  step_.computed = now();
  for (const auto& [sequence, num_tokens] : step.sequences) {
    const std::int64_t id = sequence->id, sample = sequence->sample;
    const Track track = track_of(*sequence);
    Phase& phase = phase_of(*sequence);
    const std::int64_t first =
        static_cast<std::int64_t>(sequence->num_computed_tokens) - num_tokens;
    if (phase == Phase::kPrefill) {
      slice("prefill", track, step_.scheduled, step_.computed,
            {{"request", id}, {"sample", sample}, {"first", first}, {"tokens", num_tokens}});
      if (first + num_tokens == std::ssize(sequence->tokens)) phase = Phase::kPrefilled;
    } else if (phase == Phase::kPrefilled) {
      event('B', "decode", track, step_.scheduled, {{"request", id}, {"sample", sample}});
      phase = Phase::kDecode;
    }
  }
}

void Trace::step_ends(std::int64_t number, bool failed, const BlockPool& pool,
                      std::int64_t num_running, std::int64_t num_waiting) {
  const Nanoseconds end = now();
  slice("step", kSteps, step_.began, end,
        {{"step", number},
         {"tokens", step_.prefill_tokens + step_.decode_tokens},
         {"budget", max_num_batched_tokens_},
         {"sequences", step_.num_sequences},
         {"prefill_tokens", step_.prefill_tokens},
         {"decode_tokens", step_.decode_tokens},
         {"preempted", step_.num_preempted},
         {"failed", std::int64_t{failed}}});
  slice("schedule", kSteps, step_.began, step_.scheduled, {});
  slice("compute", kSteps, step_.scheduled, failed ? end : step_.computed, {});
  event('C', "blocks", kSteps, end,
        {{"used", pool.num_used()},
         {"cached", pool.num_cached()},
         {"empty", pool.num_free() - pool.num_cached()}});
  event('C', "sequences", kSteps, end, {{"running", num_running}, {"waiting", num_waiting}});
  flush();
}

// --- The file ------------------------------------------------------------------------------------

Trace::Nanoseconds Trace::now() const {
  using std::chrono::nanoseconds, std::chrono::steady_clock;
  return std::chrono::duration_cast<nanoseconds>(steady_clock::now() - began_).count();
}

Trace::Track Trace::track_of(const Sequence& sequence) const {
  return {kRequests, requests_.at(sequence.id).first_thread + sequence.sample};
}

Trace::Phase& Trace::phase_of(const Sequence& sequence) {
  Tracks& tracks = requests_.at(sequence.id);
  return tracks.phases[static_cast<std::size_t>(sequence.sample)];
}

void Trace::name_track(const Sequence& sequence) {
  std::string text = "request " + std::to_string(sequence.id);
  if (sequence.request->params.n > 1) text += " sample " + std::to_string(sequence.sample);
  const Track track = track_of(sequence);
  name("thread_name", track, text);
  event('M', "thread_sort_index", track, 0, {{"sort_index", track.thread}});
}

void Trace::name(const char* kind, Track track, const std::string& name) {
  event('M', kind, track, 0, {{"name", name.c_str()}});
}

void Trace::instant(const char* name, Track track, Arguments arguments) {
  event('i', name, track, now(), arguments);
}

void Trace::slice(const char* name, Track track, Nanoseconds from, Nanoseconds to,
                  Arguments arguments) {
  event('X', name, track, from, arguments, to - from);
}

// All names and texts are our own: none of them needs escaping.
void Trace::event(char kind, const char* name, Track track, Nanoseconds at, Arguments arguments,
                  Nanoseconds duration) {
  if (!file_) return;
  if (buffer_.size() > kBufferSize) flush();
  // The comma is the next event's, so that only a bracket is missing where a process was killed.
  const bool first = buffer_ == "[";
  ((buffer_ += first ? "\n{\"ph\":\"" : ",\n{\"ph\":\"") += kind) += "\",\"name\":\"";
  ((buffer_ += name) += "\",\"pid\":") += std::to_string(track.process);
  (buffer_ += ",\"tid\":") += std::to_string(track.thread);
  append_microseconds(buffer_ += ",\"ts\":", at);
  if (kind == 'X') append_microseconds(buffer_ += ",\"dur\":", duration);
  if (kind == 'i') buffer_ += ",\"s\":\"t\"";  // a mark on its own track only
  const char* separator = ",\"args\":{\"";
  for (const auto& [key, value] : arguments) {
    ((buffer_ += separator) += key) += "\":";
    separator = ",\"";
    if (const auto* number = std::get_if<std::int64_t>(&value)) {
      buffer_ += std::to_string(*number);
    } else if (const auto* text = std::get_if<const char*>(&value)) {
      ((buffer_ += '"') += *text) += '"';
    } else {
      const char* comma = "[";
      for (const BlockId block : std::get<std::span<const BlockId>>(value)) {
        (buffer_ += comma) += std::to_string(block);
        comma = ",";
      }
      buffer_ += *comma == '[' ? "[]" : "]";
    }
  }
  buffer_ += arguments.size() == 0 ? "}" : "}}";
}

void Trace::flush() {
  if (!file_) return;
  const std::size_t written = std::fwrite(buffer_.data(), 1, buffer_.size(), file_.get());
  num_bytes_ += static_cast<std::int64_t>(buffer_.size());
  if (written < buffer_.size()) fail(num_bytes_ - std::ssize(buffer_));
  buffer_.clear();
}

// Cuts the file after its last whole event and writes no more.
void Trace::fail(std::int64_t num_good_bytes) {
  problem_ = "the trace " + printable(path_) +
             " ends early, the run does not: " + std::string(std::strerror(errno)) +
             ". Make room for it and run again for a whole one.";
  // What cannot be cut (a pipe, a device) stays as it is.
  if (ftruncate(fileno(file_.get()), num_good_bytes) != 0) errno = 0;
  file_.reset();
  failed_.store(true, std::memory_order_release);
}

std::optional<std::string> Trace::problem() const {
  if (!failed_.load(std::memory_order_acquire)) return std::nullopt;
  return problem_;
}

}  // namespace tinyvllm

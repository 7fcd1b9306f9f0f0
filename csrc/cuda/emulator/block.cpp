#include "cuda/emulator/block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cuda/emulator/fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace tinyvllm::cuda::emulator {
namespace {

constexpr int kWarp = 32;

struct PendingCopy {
  void* shared;
  const void* global;  // null: zeros
  int group;
};

std::string line(const std::source_location& where) {
  const char* file = where.file_name();
  const char* slash = std::strrchr(file, '/');
  return std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(where.line());
}

bool same_line(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string text(uint3 index) {
  std::string result = "(";
  result += std::to_string(index.x) + ", " + std::to_string(index.y) + ", ";
  return result + std::to_string(index.z) + ")";
}

}  // namespace

struct Block::Thread {
  enum class State { kReady, kAtBarrier, kInWarp, kBeforePrevious, kEnded };

  Thread(Block& block_, int number_, uint3 index_)
      : block(block_), number(number_), index(index_), fiber(&Thread::main, this) {}

  int lane() const { return number % kWarp; }
  int warp() const { return number / kWarp; }

  static void main(void* self);

  Block& block;
  int number;
  uint3 index;
  State state = State::kReady;

  // Where it waits, and for whom.
  const char* waits_in = "";
  std::source_location where;
  unsigned mask = 0;
  void* mine = nullptr;

  std::vector<PendingCopy> copies;  // oldest first
  int open_group = 0;               // the number of groups committed so far

  Fiber fiber;
};

// The thread that runs now; none outside kernels.
struct Running {
  static inline Block::Thread* thread = nullptr;

  static Block::Thread& get(const char* caller) {
    if (thread == nullptr) throw KernelError(std::string(caller) + " is called outside a kernel.");
    return *thread;
  }
  static Block& block() { return thread->block; }

  // Leaves the thread in its new state until the block makes it ready.
  static void stop(Block::Thread& self, Block::Thread::State state) {
    self.state = state;
    Fiber::suspend();
  }

  static void barrier(Block::Thread& self, std::source_location where);
  static void meet(Block::Thread& self, const char* name, unsigned mask, void* mine,
                   Exchange exchange, std::source_location where);
  static void wait_for_previous(Block::Thread& self);
  static std::byte* shared_memory(Block::Thread& self) { return self.block.shared_memory_; }
  static std::size_t shared_bytes(Block::Thread& self) { return self.block.kernel_.shared_bytes; }
};

void Block::Thread::main(void* self) {
  Thread& thread = *static_cast<Thread*>(self);
  try {
    thread.block.kernel_.call();
  } catch (const std::exception& error) {
    if (thread.block.error_.empty()) {
      thread.block.error_ =
          thread.block.name() + ", thread " + text(thread.index) + ": " + error.what();
    }
  }
  thread.state = State::kEnded;
}

Block::Block(const Kernel& kernel, uint3 index, Random& random)
    : kernel_(kernel), index_(index), random_(random) {
  const int count = kernel.num_threads();
  for (int i = 0; i < count; ++i) {
    const auto n = static_cast<unsigned>(i);
    const uint3 position{n % kernel.block.x, n / kernel.block.x % kernel.block.y,
                         n / (kernel.block.x * kernel.block.y)};
    threads_.push_back(std::make_unique<Thread>(*this, i, position));
    ready_.push_back(threads_.back().get());
  }
  lanes_waiting_.resize(static_cast<std::size_t>((count + kWarp - 1) / kWarp));
  // As large as was asked for and no larger, so that AddressSanitizer sees who goes past its end.
  const std::size_t bytes = kernel.shared_bytes;
  if (bytes > 0) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes) != 0) throw std::bad_alloc();
    shared_memory_ = static_cast<std::byte*>(memory);
    std::memset(shared_memory_, 0xff, bytes);
  }
}

Block::~Block() { std::free(shared_memory_); }

std::string Block::name() const { return "kernel " + kernel_.name + ", block " + text(index_); }

void Block::make_ready(Thread& thread) {
  thread.state = Thread::State::kReady;
  ready_.push_back(&thread);
}

void Block::step(Thread& thread) {
  threadIdx = thread.index;
  blockIdx = index_;
  blockDim = kernel_.block;
  gridDim = kernel_.grid;
  Running::thread = &thread;
  thread.fiber.resume();
  Running::thread = nullptr;
  if (thread.state == Thread::State::kEnded) ++num_ended_;
}

void Block::run(bool previous_ended) {
  previous_ended_ = previous_ended;
  if (previous_ended) {
    for (Thread* thread : waiting_for_previous_) make_ready(*thread);
    waiting_for_previous_.clear();
  }
  while (!ready_.empty()) {
    const std::size_t pick = random_.below(ready_.size());
    Thread& thread = *ready_[pick];
    ready_[pick] = ready_.back();
    ready_.pop_back();
    step(thread);
    if (!error_.empty()) throw KernelError(error_);
  }
  if (!ended() && previous_ended) report_deadlock();
}

// Says who waits where: threads next to each other that do the same are named together.
void Block::report_deadlock() const {
  const auto doing = [](const Thread& thread) {
    if (thread.state == Thread::State::kEnded) return std::string("ended");
    return "wait in " + std::string(thread.waits_in) + " (" + line(thread.where) + ")";
  };
  constexpr int kShown = 6;
  std::string groups;
  int num_groups = 0;
  for (std::size_t first = 0, next = 0; first < threads_.size(); first = next) {
    const std::string what = doing(*threads_[first]);
    while (next < threads_.size() && doing(*threads_[next]) == what) ++next;
    if (++num_groups > kShown) continue;
    if (first > 0) groups += "; ";
    groups += std::to_string(first) + ".." + std::to_string(next - 1) + " " + what;
  }
  if (num_groups > kShown) groups += "; and so on";
  throw KernelError(name() + ": the threads do not meet: " + groups +
                    ". Let all of a block come to the same barrier, and all of a warp to the same "
                    "shuffle.");
}

// --- What a thread calls --------------------------------------------------------------------------

void Running::barrier(Block::Thread& self, std::source_location where) {
  self.waits_in = "__syncthreads";
  self.where = where;
  Block& block = self.block;
  if (++block.num_at_barrier_ == static_cast<int>(block.threads_.size())) {
    for (const auto& thread : block.threads_) {
      if (thread.get() != &self && !same_line(thread->where, where)) {
        throw KernelError("threads of one block wait at different barriers: " + line(where) +
                          " and " + line(thread->where) + ".");
      }
    }
    block.num_at_barrier_ = 0;
    for (const auto& thread : block.threads_) block.make_ready(*thread);
    Fiber::suspend();
    return;
  }
  stop(self, Block::Thread::State::kAtBarrier);
}

void Running::meet(Block::Thread& self, const char* name, unsigned mask, void* mine,
                   Exchange exchange, std::source_location where) {
  Block& block = self.block;
  const int first = self.warp() * kWarp;
  const int lanes_here = std::min(kWarp, static_cast<int>(block.threads_.size()) - first);
  const unsigned here = lanes_here == kWarp ? 0xffffffffu : (1u << lanes_here) - 1;
  const unsigned present = mask & here;
  if ((present >> self.lane() & 1u) == 0) {
    throw KernelError(std::string(name) + " (" + line(where) +
                      "): the mask does not hold the lane that calls.");
  }
  self.waits_in = name;
  self.where = where;
  self.mask = mask;
  self.mine = mine;
  unsigned& waiting = block.lanes_waiting_[static_cast<std::size_t>(self.warp())];
  waiting |= 1u << self.lane();
  if ((waiting & present) != present) {
    stop(self, Block::Thread::State::kInWarp);
    return;
  }

  void* lanes[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((present >> lane & 1u) == 0) continue;
    Block::Thread& other = *block.threads_[static_cast<std::size_t>(first + lane)];
    if (other.mask != mask || std::strcmp(other.waits_in, name) != 0 ||
        !same_line(other.where, where)) {
      throw KernelError("lanes of one warp do not meet: one is in " + std::string(name) + " (" +
                        line(where) + "), lane " + std::to_string(lane) + " is in " +
                        other.waits_in + " (" + line(other.where) + ") or gives another mask.");
    }
    lanes[lane] = other.mine;
  }
  exchange(lanes, present);
  waiting &= ~present;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane] != nullptr) {
      block.make_ready(*block.threads_[static_cast<std::size_t>(first + lane)]);
    }
  }
  Fiber::suspend();
}

void Running::wait_for_previous(Block::Thread& self) {
  Block& block = self.block;
  block.waited_for_previous_ = true;
  if (block.previous_ended_) return;
  block.waiting_for_previous_.push_back(&self);
  self.waits_in = "wait_for_previous";
  stop(self, Block::Thread::State::kBeforePrevious);
}

std::byte* shared_memory() { return Running::shared_memory(Running::get("shared_memory")); }
void wait_for_previous() { Running::wait_for_previous(Running::get("wait_for_previous")); }
void barrier(std::source_location where) { Running::barrier(Running::get("barrier"), where); }
void meet(const char* name, unsigned mask, void* mine, Exchange exchange,
          std::source_location where) {
  Running::meet(Running::get(name), name, mask, mine, exchange, where);
}

void require_aligned(const void* address, std::size_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    throw KernelError(std::string(what) + ": the address is not a multiple of " +
                      std::to_string(bytes) + ".");
  }
}

void copy_async(void* shared, const void* global, bool valid) {
  Block::Thread& self = Running::get("copy_async");
  require_aligned(shared, 16, "copy_async");
  if (valid) require_aligned(global, 16, "copy_async");
  const std::byte* memory = Running::shared_memory(self);
  const auto* target = static_cast<const std::byte*>(shared);
  if (target < memory || target + 16 > memory + Running::shared_bytes(self)) {
    throw KernelError("copy_async: the target is not in the block's shared memory.");
  }
  std::memset(shared, 0xff, 16);
  self.copies.push_back({shared, valid ? global : nullptr, self.open_group});
}

void commit_copies() { ++Running::get("commit_copies").open_group; }

void wait_for_copies(int pending) {
  Block::Thread& self = Running::get("wait_for_copies");
  const int landed = self.open_group - pending;  // the groups before this one
  auto copy = self.copies.begin();
  for (; copy != self.copies.end() && copy->group < landed; ++copy) {
    if (copy->global == nullptr) {
      std::memset(copy->shared, 0, 16);
    } else {
      std::memcpy(copy->shared, copy->global, 16);
    }
  }
  self.copies.erase(self.copies.begin(), copy);
}

}  // namespace tinyvllm::cuda::emulator

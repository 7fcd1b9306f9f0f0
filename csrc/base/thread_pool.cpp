#include "base/thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <system_error>
#include <utility>

#include "base/errors.h"

namespace tinyvllm {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Waits until `ready(value)` and returns the value: spins for about the time between two ops of one
// forward pass, where waking a sleeper would cost more than the wait, and then sleeps.
template <typename Ready>
std::uint32_t wait_until(const std::atomic<std::uint32_t>& value, Ready&& ready) {
  constexpr auto kSpin = std::chrono::microseconds(20);
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      const std::uint32_t now = value.load(std::memory_order_acquire);
      if (ready(now)) return now;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  for (;;) {
    const std::uint32_t now = value.load(std::memory_order_acquire);
    if (ready(now)) return now;
    value.wait(now, std::memory_order_acquire);
  }
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : owner_(getpid()) {
  if (num_threads < 1 || num_threads > 1024) {
    throw InvalidRequestError("num_threads is " + std::to_string(num_threads) +
                              "; give a number from 1 to 1024.");
  }
  threads_.reserve(static_cast<std::size_t>(num_threads - 1));
  try {
    for (int worker = 1; worker < num_threads; ++worker) {
      threads_.emplace_back([this, worker] { worker_loop(worker); });
    }
  } catch (const std::system_error& error) {
    const std::size_t started = threads_.size();
    stop_and_join();
    throw CapacityError("num_threads is " + std::to_string(num_threads) + ", but after " +
                        std::to_string(started + 1) + " the system gives no more: " + error.what() +
                        ". Lower num_threads.");
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() != owner_) {
    // A forked child: there is nobody to join, and even detach() would write to the memory of
    // threads that are gone, which a new one may have by now. The handles are leaked on purpose.
    std::make_unique<std::vector<std::thread>>(std::move(threads_)).release();
    return;
  }
  stop_and_join();
}

void ThreadPool::stop_and_join() {
  stop_.store(true, std::memory_order_relaxed);
  state_.fetch_add(State::kSerial | State::kOpen, std::memory_order_release);
  state_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(const Job& job) {
  if (getpid() != owner_) {
    throw Error("This engine was made in process " + std::to_string(owner_) +
                " and is used in its forked child " + std::to_string(getpid()) +
                ", where its threads do not exist. Make the engine after the fork.");
  }
  // Many short calls are taken several at a time: a core that takes one alone waits as long for the
  // cache line of the counter as it then works.
  constexpr std::int64_t kChunksPerThread = 32;
  job_ = job;
  job_.chunk = std::max<std::int64_t>(1, job.count / (kChunksPerThread * num_threads()));
  next_.store(0, std::memory_order_relaxed);
  if (!threads_.empty() && job.count > 1) {
    state_.fetch_add(State::kSerial | State::kOpen, std::memory_order_release);
    state_.notify_all();
    work(0);
    const std::uint32_t left = state_.fetch_and(~State::kOpen, std::memory_order_acq_rel);
    if ((left & State::kMembers) != 0) {
      wait_until(state_, [](std::uint32_t state) { return (state & State::kMembers) == 0; });
    }
  } else {
    work(0);
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::work(int worker) {
  try {
    for (;;) {
      const std::int64_t first = next_.fetch_add(job_.chunk, std::memory_order_relaxed);
      if (first >= job_.count) return;
      const std::int64_t end = std::min(first + job_.chunk, job_.count);
      for (std::int64_t index = first; index < end; ++index) {
        job_.call(job_.callable, index, worker);
      }
    }
  } catch (...) {
    next_.store(job_.count, std::memory_order_relaxed);  // the others need not begin anything new
    const std::lock_guard lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void ThreadPool::worker_loop(int worker) {
  for (std::uint32_t seen = 0;;) {  // the serial number of the last job
    std::uint32_t state = wait_until(state_, [seen](std::uint32_t now) {
      return (now & State::kOpen) != 0 && now / State::kSerial != seen;
    });
    if (stop_.load(std::memory_order_relaxed)) return;
    seen = state / State::kSerial;
    bool joined = false;
    while (!joined && (state & State::kOpen) != 0 && state / State::kSerial == seen) {
      joined =
          state_.compare_exchange_weak(state, state + State::kMember, std::memory_order_acquire);
    }
    if (!joined) continue;
    work(worker);
    const std::uint32_t before = state_.fetch_sub(State::kMember, std::memory_order_acq_rel);
    if ((before & (State::kMembers | State::kOpen)) == State::kMember) state_.notify_all();
  }
}

}  // namespace tinyvllm

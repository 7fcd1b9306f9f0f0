#include "base/thread_pool.h"

#include <unistd.h>

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

// Waits until `value` is no longer `old`: spins for about the time between two ops of one forward
// pass, where waking a sleeper would cost more than the wait, and then sleeps.
void wait_while_equal(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
  constexpr auto kSpin = std::chrono::microseconds(50);
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  while (std::chrono::steady_clock::now() < deadline) {
    for (int i = 0; i < 64; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
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
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(const Job& job) {
  if (getpid() != owner_) {
    throw Error("This engine was made in process " + std::to_string(owner_) +
                " and is used in its forked child " + std::to_string(getpid()) +
                ", where its threads do not exist. Make the engine after the fork.");
  }
  job_ = job;
  next_.store(0, std::memory_order_relaxed);
  if (!threads_.empty() && job.count > 1) {
    busy_workers_.store(static_cast<Count>(threads_.size()), std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    work(0);
    for (Count busy = busy_workers_.load(std::memory_order_acquire); busy != 0;
         busy = busy_workers_.load(std::memory_order_acquire)) {
      wait_while_equal(busy_workers_, busy);
    }
  } else {
    work(0);
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::work(int worker) {
  try {
    for (;;) {
      const std::int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= job_.count) return;
      job_.call(job_.callable, index, worker);
    }
  } catch (...) {
    next_.store(job_.count, std::memory_order_relaxed);  // the others need not begin anything new
    const std::lock_guard lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void ThreadPool::worker_loop(int worker) {
  for (Count seen = 0;;) {
    wait_while_equal(epoch_, seen);
    ++seen;  // jobs come one at a time, so the epoch is exactly one further
    if (stop_.load(std::memory_order_relaxed)) return;
    work(worker);
    if (busy_workers_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_workers_.notify_one();
  }
}

}  // namespace tinyvllm

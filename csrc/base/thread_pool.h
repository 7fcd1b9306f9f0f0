// A small thread pool: parallel_for, and nothing else.
//
// We do not use OpenMP: its settings are process-wide, its pools multiply with every library that
// brings its own copy, and it does not survive fork (DESIGN 6).
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace tinyvllm {

class ThreadPool {
 public:
  // num_threads counts the caller: 1 starts no thread. Throws InvalidRequestError outside 1..1024
  // and CapacityError where the system gives no more threads.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls f(index, worker) once for each index in [0, count), on all threads, in no fixed order;
  // worker is in [0, num_threads()) and no two calls at a time share one. Returns when all are
  // done. The first exception of f is thrown to the caller, after the calls that had begun have
  // ended.
  //
  // One caller at a time. In a forked child the threads do not exist: throws Error.
  template <typename F>
  void parallel_for(std::int64_t count, F&& f) {
    using Callable = std::remove_reference_t<F>;
    const auto call = [](const void* callable, std::int64_t index, int worker) {
      (*static_cast<const Callable*>(callable))(index, worker);
    };
    run({call, &f, count});
  }

 private:
  using Count = std::uint32_t;  // may wrap around: after 2^32 jobs epoch_ begins anew

  struct Job {
    void (*call)(const void* callable, std::int64_t index, int worker);
    const void* callable;
    std::int64_t count;
  };

  void run(const Job& job);
  void work(int worker);
  void worker_loop(int worker);
  void stop_and_join();

  const pid_t owner_;
  std::vector<std::thread> threads_;
  Job job_{};
  std::atomic<Count> epoch_{0};         // one more with every job
  std::atomic<Count> busy_workers_{0};  // threads that have not finished the current job
  std::atomic<std::int64_t> next_{0};
  std::atomic<bool> stop_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace tinyvllm

// A small thread pool: parallel_for, and nothing else.
//
// We do not use OpenMP: its settings are process-wide, its pools multiply with every library that
// brings its own copy, and it does not survive fork.
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
  struct Job {
    void (*call)(const void* callable, std::int64_t index, int worker);
    const void* callable;
    std::int64_t count;
    std::int64_t chunk = 1;  // successive indices that a thread takes at a time
  };

  // Jobs come one at a time. A thread joins the job while it is open and leaves it when no index is
  // left; then the caller closes it and waits for those that are still inside. A thread that was
  // asleep, or had to give its core to another process, is not waited for: the caller has done its
  // share by then.
  struct State {
    static constexpr std::uint32_t kMember = 1;         // bits 0 to 10: threads in the job
    static constexpr std::uint32_t kOpen = 1u << 11;    // bit 11
    static constexpr std::uint32_t kSerial = 1u << 12;  // the rest counts jobs, and wraps around
    static constexpr std::uint32_t kMembers = kOpen - 1;
  };

  void run(const Job& job);
  void work(int worker);
  void worker_loop(int worker);
  void stop_and_join();

  const pid_t owner_;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<std::uint32_t> state_{0};
  std::atomic<bool> stop_{false};
  std::atomic<std::int64_t> next_{0};  // index of the job
  Job job_{};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace tinyvllm

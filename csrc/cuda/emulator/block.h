// One block of a kernel, and what its threads do together.
//
// A GPU runs the threads of a block at the same time. Here each is a fiber, and one runs until it has
// to meet others: all of the block at a barrier, those of its warp (32 threads with consecutive
// numbers) in a shuffle, a vote or a tensor-core product. Who runs next is drawn at random. What is
// correct on a GPU is correct in every such order; what is right only if a neighbour happens to come
// first goes wrong here, and soon.
//
// What else is unkind: shared memory starts as NaN bytes; a copy into shared memory (copy_async_16)
// leaves NaN bytes at its target until its thread has waited for it, and reads its source only then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

// Numbers of a thread and its block, as kernels see them. They are set whenever a thread goes on.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace tinyvllm::cuda::emulator {

// A mistake of a kernel or of who launched it. The message names the kernel, the block, the threads.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Kernel {
  std::string name;
  dim3 grid, block;
  std::size_t shared_bytes;
  bool overlaps_previous;
  std::function<void()> call;         // with its arguments, copied at the launch
  std::vector<const void*> pointers;  // those of the arguments that are pointers

  int num_threads() const { return static_cast<int>(block.x * block.y * block.z); }
};

// xorshift64* (Marsaglia 2003; Vigna 2016).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  // In [0, count).
  std::size_t below(std::size_t count) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<std::size_t>((state_ * 0x2545f4914f6cdd1du >> 32) * count >> 32);
  }

 private:
  std::uint64_t state_;
};

class Block {
 public:
  Block(const Kernel& kernel, uint3 index, Random& random);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs until every thread has ended or, unless the kernel before this one has ended, stands in
  // wait_for_previous(). Throws KernelError for what the kernel does wrong.
  void run(bool previous_ended);
  bool ended() const { return num_ended_ == static_cast<int>(threads_.size()); }
  // Whether any thread came to wait_for_previous().
  bool waited_for_previous() const { return waited_for_previous_; }

  struct Thread;

 private:
  friend struct Running;

  void step(Thread& thread);
  void make_ready(Thread& thread);
  [[noreturn]] void report_deadlock() const;
  std::string name() const;

  const Kernel& kernel_;
  uint3 index_;
  Random& random_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> ready_;
  std::vector<Thread*> waiting_for_previous_;
  std::vector<unsigned> lanes_waiting_;  // by warp: who stands in a shuffle or the like
  std::byte* shared_memory_ = nullptr;
  int num_at_barrier_ = 0;
  int num_ended_ = 0;
  bool previous_ended_ = false;
  bool waited_for_previous_ = false;
  std::string error_;
};

// --- What a thread calls --------------------------------------------------------------------------

std::byte* shared_memory();
void wait_for_previous();
void barrier(std::source_location where);

void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(int pending);

// Throws KernelError unless the address is a multiple of `bytes`.
void require_aligned(const void* address, std::size_t bytes, const char* what);

// lanes[i] is what lane i gave, null where bit i of `present` is 0.
using Exchange = void (*)(void* const* lanes, unsigned present);
void meet(const char* name, unsigned mask, void* mine, Exchange exchange,
          std::source_location where);

// Waits until all lanes of `mask` (those that the block has) are here, from the same line. Then
// exchange(lanes, present) runs once, with a pointer to each lane's `mine`. The exchange is a lambda
// that captures nothing; the mask must hold the caller.
template <typename T, typename F>
void together(const char* name, unsigned mask, T& mine, F, std::source_location where) {
  const auto exchange = [](void* const* lanes, unsigned present) {
    T* typed[32];
    for (int i = 0; i < 32; ++i) typed[i] = static_cast<T*>(lanes[i]);
    F{}(typed, present);
  };
  meet(name, mask, &mine, exchange, where);
}

}  // namespace tinyvllm::cuda::emulator

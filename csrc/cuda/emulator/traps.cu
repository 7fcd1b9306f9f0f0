#include <map>
#include <memory>
#include <numeric>

#include "cuda/emulator/traps.h"
#include "cuda/graph.h"
#include "cuda/launch.h"
#include "cuda/memory.h"
#include "cuda/stream.h"

namespace tinyvllm::cuda::traps {
namespace {

using Ints = std::vector<int>;
constexpr int kThreads = 64;
constexpr std::size_t kBytes = kThreads * sizeof(int);

// --- Inside a block -------------------------------------------------------------------------------

// Each thread hands its number to the thread opposite, through shared memory.
template <bool kMistake>
__global__ void reverse_kernel(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if constexpr (!kMistake) __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// The same inside each warp, where __syncwarp is enough.
template <bool kMistake>
__global__ void reverse_in_warp_kernel(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if constexpr (!kMistake) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 31];
}

// Two rounds through the same shared memory: the second must not write before the first was read.
template <bool kMistake>
__global__ void reverse_twice_kernel(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  int value = static_cast<int>(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    shared[threadIdx.x] = value + 1000 * round;
    __syncthreads();
    value = shared[kThreads - 1 - threadIdx.x];
    if constexpr (!kMistake) __syncthreads();
  }
  out[threadIdx.x] = value;
}

// Half of the block leaves before the barrier.
template <bool kMistake>
__global__ void early_exit_kernel(int* out) {
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kMistake && threadIdx.x >= kThreads / 2) return;
  __syncthreads();
}

// The lanes of a warp do not all come to the shuffle.
template <bool kMistake>
__global__ void divergent_shuffle_kernel(int* out) {
  const int value = static_cast<int>(threadIdx.x);
  int got = value ^ 1;
  if (!kMistake || threadIdx.x % 2 == 0) got = __shfl_xor_sync(kAllLanes, value, 1);
  out[threadIdx.x] = got;
}

// A sum in shared memory that nobody has set to zero.
template <bool kMistake>
__global__ void unwritten_shared_kernel(int* out) {
  int* sum = reinterpret_cast<int*>(shared_memory());
  if (!kMistake && threadIdx.x == 0) *sum = 0;
  __syncthreads();
  atomicAdd(sum, 1);
  __syncthreads();
  out[threadIdx.x] = *sum;
}

// Each thread copies four ints into shared memory on its own.
template <bool kMistake>
__global__ void copy_wait_kernel(const int* in, int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const unsigned first = 4 * threadIdx.x;
  copy_async_16(shared + first, in + first);
  commit_copies();
  if constexpr (!kMistake) wait_for_copies<0>();
  __syncthreads();
  for (unsigned i = first; i < first + 4; ++i) out[i] = shared[i];
}

// The same in two groups, of which one too few is waited for.
template <bool kMistake>
__global__ void copy_groups_kernel(const int* in, int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  for (unsigned first = 4 * threadIdx.x; first < kThreads; first += kThreads / 2) {
    copy_async_16(shared + first, in + first);
    commit_copies();
  }
  wait_for_copies<kMistake ? 1 : 0>();
  for (unsigned first = 4 * threadIdx.x; first < kThreads; first += kThreads / 2) {
    for (unsigned i = first; i < first + 4; ++i) out[i] = shared[i];
  }
}

// One thread writes one past the end of what it may write. Only AddressSanitizer sees that.
template <bool kMistake>
__global__ void out_of_bounds_kernel(int* out) {
  out[threadIdx.x + (kMistake && threadIdx.x == kThreads - 1 ? 1 : 0)] =
      static_cast<int>(threadIdx.x);
}

template <bool kMistake>
__global__ void shared_out_of_bounds_kernel(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x + (kMistake ? 1 : 0)] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

// --- Between blocks and kernels -----------------------------------------------------------------------

// A block a number: it counts on the block before it having run. Without the mistake it does not.
template <bool kMistake>
__global__ void block_order_kernel(int* out) {
  const auto n = static_cast<int>(blockIdx.x);
  out[n] = kMistake && n > 0 ? out[n - 1] + 1 : n;
}

__global__ void count_kernel(int* out) { out[threadIdx.x] = static_cast<int>(threadIdx.x); }

enum class Wait { kFirst, kNever, kTooLate };

template <Wait kWait>
__global__ void copy_kernel(const int* in, int* out) {
  if constexpr (kWait == Wait::kFirst) wait_for_previous();
  const int value = in[threadIdx.x];
  if constexpr (kWait == Wait::kTooLate) wait_for_previous();
  out[threadIdx.x] = value;
}

struct Hidden {  // a pointer that the emulator does not see among the arguments
  const int* in;
};
__global__ void copy_hidden_kernel(Hidden hidden, int* out) {
  out[threadIdx.x] = hidden.in[threadIdx.x];
}

// --- The programs -----------------------------------------------------------------------------------

Ints counted() {
  Ints numbers(kThreads);
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

Ints reversed(int group, int more = 0) {
  Ints numbers = counted();
  for (int& n : numbers) n = n / group * group + group - 1 - n % group + more;
  return numbers;
}

Ints download(const CudaContext& ctx, const DeviceMemory& memory) {
  Ints result(memory.size() / sizeof(int));
  copy_to_host(ctx, result.data(), memory.data(), memory.size());
  ctx.synchronize();
  return result;
}

using Kernel1 = void (*)(int*);
using Kernel2 = void (*)(const int*, int*);

bool run_block(const CudaContext& ctx, Kernel1 kernel, const Ints& want) {
  const DeviceMemory out(kBytes, "a trap");
  launch(ctx, "trap", {.grid = 1, .block = kThreads, .shared_bytes = kBytes}, kernel,
         out.as<int>());
  return download(ctx, out) == want;
}

bool run_copies(const CudaContext& ctx, Kernel2 kernel, unsigned threads) {
  const DeviceMemory in(kBytes, "a trap"), out(kBytes, "a trap");
  const Ints numbers = counted();
  copy_to_device(ctx, in.data(), numbers.data(), kBytes);
  launch(ctx, "trap", {.grid = 1, .block = threads, .shared_bytes = kBytes}, kernel,
         static_cast<const int*>(in.as<int>()), out.as<int>());
  return download(ctx, out) == numbers;
}

bool run_block_order(const CudaContext& ctx, bool mistake) {
  const DeviceMemory out(kBytes, "a trap");
  launch(ctx, "trap", {.grid = kThreads, .block = 1},
         mistake ? block_order_kernel<true> : block_order_kernel<false>, out.as<int>());
  return download(ctx, out) == counted();
}

// A kernel that begins before the one whose result it reads has ended.
bool run_overlap(const CudaContext& ctx, Kernel2 kernel) {
  const DeviceMemory in(kBytes, "a trap"), out(kBytes, "a trap");
  launch(ctx, "first", {.grid = 1, .block = kThreads}, count_kernel, in.as<int>());
  launch(ctx, "second", {.grid = 1, .block = kThreads, .overlaps_previous = true}, kernel,
         static_cast<const int*>(in.as<int>()), out.as<int>());
  return download(ctx, out) == counted();
}

// The graph was recorded with a buffer that another one has taken the place of.
bool run_stale_pointer(const CudaContext& ctx, bool mistake) {
  const Ints numbers = counted();
  const DeviceMemory out(kBytes, "a trap");
  DeviceMemory in(kBytes, "a trap");
  const Graph graph(ctx, [&] {
    launch(ctx, "trap", {.grid = 1, .block = kThreads}, copy_kernel<Wait::kFirst>,
           static_cast<const int*>(in.as<int>()), out.as<int>());
  });
  if (mistake) in = DeviceMemory(kBytes, "a trap");
  copy_to_device(ctx, in.data(), numbers.data(), kBytes);
  graph.replay(ctx);
  return download(ctx, out) == numbers;
}

// Memory that is freed too early, behind a pointer inside a structure.
bool run_freed_memory(const CudaContext& ctx, bool mistake) {
  const Ints numbers = counted();
  const DeviceMemory out(kBytes, "a trap");
  DeviceMemory in(kBytes, "a trap");
  const Hidden hidden{in.as<int>()};
  copy_to_device(ctx, in.data(), numbers.data(), kBytes);
  if (mistake) in = {};
  launch(ctx, "trap", {.grid = 1, .block = kThreads}, copy_hidden_kernel, hidden, out.as<int>());
  return download(ctx, out) == numbers;
}

// The host writes into a buffer whose copy has been asked for and has not run.
bool run_reused_host_buffer(const CudaContext& ctx, bool mistake) {
  const PinnedMemory host(kBytes, "a trap");
  const DeviceMemory out(kBytes, "a trap");
  for (int i = 0; i < kThreads; ++i) host.as<int>()[i] = i;
  copy_to_device(ctx, out.data(), host.data(), kBytes);
  if (!mistake) ctx.synchronize();
  for (int i = 0; i < kThreads; ++i) host.as<int>()[i] = -1;
  return download(ctx, out) == counted();
}

// The host reads a result that has been asked for and has not come.
bool run_unfinished_result(const CudaContext& ctx, bool mistake) {
  const PinnedMemory host(kBytes, "a trap");
  const DeviceMemory out(kBytes, "a trap");
  launch(ctx, "trap", {.grid = 1, .block = kThreads}, count_kernel, out.as<int>());
  copy_to_host(ctx, host.data(), out.data(), kBytes);
  if (!mistake) ctx.synchronize();
  const Ints got(host.as<int>(), host.as<int>() + kThreads);
  ctx.synchronize();
  return got == counted();
}

// What one stream writes, another reads: an event has to say so. Several times, because without it
// the order is drawn.
bool run_streams(const CudaContext& ctx, bool mistake) {
  bool right = true;
  for (int i = 0; i < 8; ++i) {
    const DeviceMemory out(kBytes, "a trap");
    Ints result(kThreads);
    const Stream other;
    Event written;
    launch(ctx, "trap", {.grid = 1, .block = kThreads}, count_kernel, out.as<int>());
    written.record(ctx.stream());
    if (!mistake) written.order(other.get());
    check(cudaMemcpyAsync(result.data(), out.data(), kBytes, cudaMemcpyDeviceToHost, other.get()),
          "copying");
    other.synchronize();
    right = right && result == counted();
  }
  return right;
}

using Program = bool (*)(const CudaContext&, bool mistake);

const std::map<std::string, Program>& programs() {
  static const std::map<std::string, Program> all{
      {"barrier",
       [](const CudaContext& ctx, bool mistake) {
         return run_block(ctx, mistake ? reverse_kernel<true> : reverse_kernel<false>,
                          reversed(kThreads));
       }},
      {"barrier_in_warp",
       [](const CudaContext& ctx, bool mistake) {
         return run_block(ctx,
                          mistake ? reverse_in_warp_kernel<true> : reverse_in_warp_kernel<false>,
                          reversed(32));
       }},
      {"barrier_before_reuse",
       [](const CudaContext& ctx, bool mistake) {
         Ints want = counted();
         for (int& n : want) n += 1000;
         return run_block(ctx, mistake ? reverse_twice_kernel<true> : reverse_twice_kernel<false>,
                          want);
       }},
      {"exit_before_barrier",
       [](const CudaContext& ctx, bool mistake) {
         return run_block(ctx, mistake ? early_exit_kernel<true> : early_exit_kernel<false>,
                          counted());
       }},
      {"divergent_shuffle",
       [](const CudaContext& ctx, bool mistake) {
         return run_block(
             ctx, mistake ? divergent_shuffle_kernel<true> : divergent_shuffle_kernel<false>,
             reversed(2));
       }},
      {"unwritten_shared_memory",
       [](const CudaContext& ctx, bool mistake) {
         return run_block(ctx,
                          mistake ? unwritten_shared_kernel<true> : unwritten_shared_kernel<false>,
                          Ints(kThreads, kThreads));
       }},
      {"copy_wait",
       [](const CudaContext& ctx, bool mistake) {
         return run_copies(ctx, mistake ? copy_wait_kernel<true> : copy_wait_kernel<false>,
                           kThreads / 4);
       }},
      {"copy_groups",
       [](const CudaContext& ctx, bool mistake) {
         return run_copies(ctx, mistake ? copy_groups_kernel<true> : copy_groups_kernel<false>,
                           kThreads / 8);
       }},
      {"block_order", run_block_order},
      {"wait_for_previous",
       [](const CudaContext& ctx, bool mistake) {
         return run_overlap(ctx, mistake ? copy_kernel<Wait::kNever> : copy_kernel<Wait::kFirst>);
       }},
      {"wait_for_previous_too_late",
       [](const CudaContext& ctx, bool mistake) {
         return run_overlap(ctx, mistake ? copy_kernel<Wait::kTooLate> : copy_kernel<Wait::kFirst>);
       }},
      {"stale_captured_pointer", run_stale_pointer},
      {"freed_memory", run_freed_memory},
      {"reused_host_buffer", run_reused_host_buffer},
      {"unfinished_result", run_unfinished_result},
      {"streams_without_event", run_streams},
      {"write_out_of_bounds",
       [](const CudaContext& ctx, bool mistake) {
         return run_block(ctx, mistake ? out_of_bounds_kernel<true> : out_of_bounds_kernel<false>,
                          counted());
       }},
      {"shared_write_out_of_bounds",
       [](const CudaContext& ctx, bool mistake) {
         return run_block(
             ctx, mistake ? shared_out_of_bounds_kernel<true> : shared_out_of_bounds_kernel<false>,
             counted());
       }},
  };
  return all;
}

}  // namespace

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const auto& [name, program] : programs()) all.push_back(name);
  return all;
}

bool run(const CudaContext& ctx, const std::string& name, bool with_mistake) {
  const auto found = programs().find(name);
  if (found == programs().end()) throw Error("There is no trap \"" + name + "\".");
  return found->second(ctx, with_mistake);
}

}  // namespace tinyvllm::cuda::traps

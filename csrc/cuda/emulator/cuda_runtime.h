// What this project uses of CUDA's own <cuda_runtime.h>, for a build without CUDA: the words that
// kernels are written in, and the runtime's functions. A build with TINYVLLM_CUDA=EMULATE finds this
// file in its place and compiles the same .cu files with the host's compiler.
//
//   block.h      how a block's threads run
//   runtime.cpp  memory, streams, events, graphs
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "cuda/emulator/block.h"

// --- Words ----------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

inline constexpr int warpSize = 32;

// --- Vector types: as aligned as the GPU's wide loads want them --------------------------------------

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- A thread and its neighbours ------------------------------------------------------------------

// Every function in which threads meet remembers the line that called it: two threads that wait at
// different lines do not meet.

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  tinyvllm::cuda::emulator::barrier(where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       std::source_location where = std::source_location::current()) {
  struct Nothing {
  } nothing;
  tinyvllm::cuda::emulator::together(
      "__syncwarp", mask, nothing, [](Nothing* const*, unsigned) {}, where);
}

namespace tinyvllm::cuda::emulator {

// Each lane gives a value, and gets that of lane source(lane), or its own where that lies outside
// its group of `width` lanes. What a lane that takes no part holds is anybody's guess: NaN bytes.
template <typename T, typename Source>
T shuffle(const char* name, unsigned mask, T value, Source source, std::source_location where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  struct Lane {
    T given, got;
    Source source;
  } mine{value, value, source};
  together(
      name, mask, mine,
      [](Lane* const* lanes, unsigned present) {
        for (int lane = 0; lane < 32; ++lane) {
          if ((present >> lane & 1u) == 0) continue;
          const int from = lanes[lane]->source(lane);
          if ((present >> from & 1u) != 0) {
            lanes[lane]->got = lanes[from]->given;
          } else {
            std::memset(&lanes[lane]->got, 0xff, sizeof(T));
          }
        }
      },
      where);
  return mine.got;
}

// Each lane gives a value, and all get the same result of all of them.
template <typename T, typename Combine>
T combined(const char* name, unsigned mask, T value, Combine combine, std::source_location where) {
  struct Lane {
    T value;
    Combine combine;
  } mine{value, combine};
  together(
      name, mask, mine,
      [](Lane* const* lanes, unsigned present) {
        T values[32];
        for (int lane = 0; lane < 32; ++lane) {
          if ((present >> lane & 1u) != 0) values[lane] = lanes[lane]->value;
        }
        for (int lane = 0; lane < 32; ++lane) {
          if ((present >> lane & 1u) != 0) {
            lanes[lane]->value = lanes[lane]->combine(values, present);
          }
        }
      },
      where);
  return mine.value;
}

}  // namespace tinyvllm::cuda::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              std::source_location where = std::source_location::current()) {
  return tinyvllm::cuda::emulator::shuffle(
      "__shfl_sync", mask, value,
      [=](int lane) { return (lane & ~(width - 1)) + (source & (width - 1)); }, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  std::source_location where = std::source_location::current()) {
  return tinyvllm::cuda::emulator::shuffle(
      "__shfl_xor_sync", mask, value,
      [=](int lane) {
        const int from = lane ^ lane_mask;
        return from >= (lane & ~(width - 1)) + width ? lane : from;
      },
      where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   std::source_location where = std::source_location::current()) {
  return tinyvllm::cuda::emulator::shuffle(
      "__shfl_down_sync", mask, value,
      [=](int lane) {
        const int from = lane + static_cast<int>(delta);
        return (lane & (width - 1)) + static_cast<int>(delta) >= width ? lane : from;
      },
      where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 std::source_location where = std::source_location::current()) {
  return tinyvllm::cuda::emulator::shuffle(
      "__shfl_up_sync", mask, value,
      [=](int lane) {
        return (lane & (width - 1)) < static_cast<int>(delta) ? lane
                                                              : lane - static_cast<int>(delta);
      },
      where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location where = std::source_location::current()) {
  return tinyvllm::cuda::emulator::combined(
      "__ballot_sync", mask, static_cast<unsigned>(predicate != 0),
      [](const unsigned* values, unsigned present) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane) {
          if ((present >> lane & 1u) != 0) votes |= values[lane] << lane;
        }
        return votes;
      },
      where);
}
inline int __any_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, !predicate, where) == 0;
}

// The largest, the smallest, the sum over the lanes of the mask: of int or unsigned.
template <typename T>
T __reduce_max_sync(unsigned mask, T value,
                    std::source_location where = std::source_location::current()) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return tinyvllm::cuda::emulator::combined(
      "__reduce_max_sync", mask, value,
      [](const T* values, unsigned present) {
        T best = values[std::countr_zero(present)];
        for (int lane = 0; lane < 32; ++lane) {
          if ((present >> lane & 1u) != 0) best = std::max(best, values[lane]);
        }
        return best;
      },
      where);
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value,
                    std::source_location where = std::source_location::current()) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return ~__reduce_max_sync(mask, static_cast<T>(~value), where);
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value,
                    std::source_location where = std::source_location::current()) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return tinyvllm::cuda::emulator::combined(
      "__reduce_add_sync", mask, value,
      [](const T* values, unsigned present) {
        unsigned sum = 0;
        for (int lane = 0; lane < 32; ++lane) {
          if ((present >> lane & 1u) != 0) sum += static_cast<unsigned>(values[lane]);
        }
        return static_cast<T>(sum);
      },
      where);
}

// --- Atomics: nobody interrupts a fiber ----------------------------------------------------------

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = static_cast<T>(old + value);
  return old;
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = value;
  return old;
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// Blocks run one after the other and see each other's writes at once.
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- Arithmetic -----------------------------------------------------------------------------------

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) {
  return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T, typename U>
constexpr std::common_type_t<T, U> min(T a, U b) {
  using Common = std::common_type_t<T, U>;
  return std::min<Common>(a, b);
}
template <typename T, typename U>
constexpr std::common_type_t<T, U> max(T a, U b) {
  using Common = std::common_type_t<T, U>;
  return std::max<Common>(a, b);
}

// --- The runtime ------------------------------------------------------------------------------------

// Names, numbers and meanings are CUDA's; see its documentation of the runtime API.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotReady = 600,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
};

inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDisableTiming = 2;
inline constexpr unsigned cudaHostAllocDefault = 0;

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
struct cudaDeviceProp {
  char name[256];
};
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);

cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end);

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);

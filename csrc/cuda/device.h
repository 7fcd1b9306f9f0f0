// What a kernel uses of the machine beyond plain C++: vector loads, asynchronous copies, tensor-core
// products, and the dependent launch. Under nvcc each is one instruction; under the emulator
// (cuda/emulator/) the same in plain C++.
//
// Kernels here keep three rules, so that the emulator can run and check them:
//   - all shared memory is dynamic: shared_memory(), carved up by the kernel;
//   - threads of a warp that exchange values (shuffles, votes, mma, ldmatrix) do so all together;
//   - a kernel that is launched with overlaps_previous calls wait_for_previous() before its first
//     access to anything that an earlier kernel writes, and to anything that an earlier kernel reads
//     and it writes. Nor may the compiler move such an access up: what an earlier kernel writes is
//     read neither through a pointer that is const and __restrict__ nor by a load of the read-only
//     path (ld.global.nc), both of which promise that nobody writes while this kernel runs.
#pragma once

#include <cstdint>

#include "base/bfloat16.h"

#if defined(TINYVLLM_CUDA_EMULATE)
#include "cuda/emulator/device.h"
#else

#include <cuda_runtime.h>

namespace tinyvllm::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory, aligned to 128 bytes; its size is given at the launch.
__device__ inline std::byte* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<std::byte*>(memory);
}

// --- Dependent launch (programmatic dependent launch, compute capability 9.0 and later) -----------

// Waits until the kernels before this one in its stream have ended and their writes are visible. A
// launch without overlaps_previous, or an older card, has waited already.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin once every block has called this or ended. It says nothing about
// memory: that is what the next kernel's wait_for_previous() is for.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// --- Loads ------------------------------------------------------------------------------------------

// 16 bytes that are read once. The address is aligned to 16.
__device__ inline uint4 load_streaming(const void* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// The same, or zeros where `valid` is false; then the address is not read. No branch.
__device__ inline uint4 load_streaming(const void* address, bool valid) {
  uint4 v;
  asm volatile(
      "{\n"
      ".reg .pred valid;\n"
      "setp.ne.b32 valid, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@valid ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(address), "r"(static_cast<int>(valid)));
  return v;
}

// A float that another block has written in this kernel, before a fence: past the L1 cache.
__device__ inline float load_written(const float* address) { return __ldcg(address); }

// Asks for the 128 bytes around an address, of which some will be read soon.
__device__ inline void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// --- bfloat16 ----------------------------------------------------------------------------------------

// Two floats rounded to bfloat16, the first one in the low half.
__device__ inline std::uint32_t pack_bfloat16(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ inline float low_bfloat16(std::uint32_t packed) { return __uint_as_float(packed << 16); }
__device__ inline float high_bfloat16(std::uint32_t packed) {
  return __uint_as_float(packed & 0xffff0000u);
}

__device__ inline BFloat16 round_to_bfloat16(float value) {
  return {static_cast<std::uint16_t>(pack_bfloat16(value, 0.0f))};
}

// --- Arithmetic -----------------------------------------------------------------------------------

// 2^x to two units in the last place; results below 2^-126 are zero.
__device__ inline float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// --- Asynchronous copies into shared memory ------------------------------------------------------

// Copies 16 bytes, or writes 16 zero bytes where `valid` is false (then `global` is not read). Both
// addresses are aligned to 16. The bytes are there after the wait for their group, and for other
// threads after a barrier behind it.
__device__ inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
               "r"(bytes)
               : "memory");
}

// Closes this thread's group of copies issued since the last call.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups are unfinished.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- Tensor cores -------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements from shared memory: lane 8 i + r gives the address of row r of
// matrix i (16 bytes, aligned); register i of lane l receives elements 2 (l % 4), 2 (l % 4) + 1 of
// row l / 4 of matrix i. The transposed form receives those of column l / 4.
__device__ inline void load_matrices(std::uint32_t (&registers)[4], const void* shared_row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(std::uint32_t (&registers)[4],
                                                const void* shared_row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8], bfloat16 operands and float32 sums, one warp. With g = lane / 4 and
// t = lane % 4:  a[0]: row g, columns 2t, 2t+1;  a[1]: row g + 8;  a[2]: row g, columns 2t+8, 2t+9;
// a[3]: row g + 8, the same;  b[0]: rows 2t, 2t+1 of column g;  b[1]: rows 2t+8, 2t+9;
// d[0], d[1]: row g, columns 2t, 2t+1;  d[2], d[3]: row g + 8.  (PTX ISA, mma.m16n8k16.)
__device__ inline void multiply_add_16x8x16(float (&d)[4], const std::uint32_t (&a)[4],
                                            std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace tinyvllm::cuda

#endif

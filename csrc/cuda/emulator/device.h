// The functions of cuda/device.h in plain C++. Their contracts are there.
#pragma once

#include <cuda_runtime.h>

namespace tinyvllm::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

using emulator::commit_copies;
using emulator::shared_memory;
using emulator::wait_for_previous;

// Nothing to do: the emulator lets the next kernel begin whenever the launch allows it.
inline void let_next_begin() {}

inline uint4 load_streaming(const void* address) {
  emulator::require_aligned(address, 16, "load_streaming");
  uint4 value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

inline uint4 load_streaming(const void* address, bool valid) {
  return valid ? load_streaming(address) : uint4{};
}

inline float load_written(const float* address) { return *address; }

inline void prefetch(const void* /*address*/) {}  // changes nothing that a kernel could see

inline std::uint32_t pack_bfloat16(float low, float high) {
  return to_bfloat16(low).bits | static_cast<std::uint32_t>(to_bfloat16(high).bits) << 16;
}
inline float low_bfloat16(std::uint32_t packed) { return __uint_as_float(packed << 16); }
inline float high_bfloat16(std::uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

inline BFloat16 round_to_bfloat16(float value) { return to_bfloat16(value); }

inline float fast_exp2(float x) {
  const float result = std::exp2(x);
  return std::isnormal(result) || !std::isfinite(result) ? result : 0.0f;
}

inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  emulator::copy_async(shared, global, valid);
}
template <int kPending>
void wait_for_copies() {
  emulator::wait_for_copies(kPending);
}

namespace emulator {

inline void require_whole_warp(unsigned present) {
  if (present != kAllLanes) throw KernelError("a tensor-core operation needs a whole warp.");
}

struct MatrixLane {
  const std::uint16_t* row;
  std::uint32_t (&registers)[4];
  bool transposed;
};

inline void load_matrices(std::uint32_t (&registers)[4], const void* shared_row, bool transposed,
                          std::source_location where) {
  require_aligned(shared_row, 16, "load_matrices");
  MatrixLane mine{static_cast<const std::uint16_t*>(shared_row), registers, transposed};
  together(
      "load_matrices", 0xffffffffu, mine,
      [](MatrixLane* const* lanes, unsigned present) {
        require_whole_warp(present);
        for (int lane = 0; lane < 32; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            const auto element = [&](int row, int col) -> std::uint32_t {
              return lanes[8 * matrix + row]->row[col];
            };
            const int i = lane / 4, j = 2 * (lane % 4);
            lanes[lane]->registers[matrix] = lanes[lane]->transposed
                                                 ? element(j, i) | element(j + 1, i) << 16
                                                 : element(i, j) | element(i, j + 1) << 16;
          }
        }
      },
      where);
}

struct ProductLane {
  float (&d)[4];
  const std::uint32_t (&a)[4];
  std::uint32_t b[2];
};

}  // namespace emulator

inline void load_matrices(std::uint32_t (&registers)[4], const void* shared_row,
                          std::source_location where = std::source_location::current()) {
  emulator::load_matrices(registers, shared_row, false, where);
}
inline void load_matrices_transposed(std::uint32_t (&registers)[4], const void* shared_row,
                                     std::source_location where = std::source_location::current()) {
  emulator::load_matrices(registers, shared_row, true, where);
}

inline void multiply_add_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                 std::uint32_t b1,
                                 std::source_location where = std::source_location::current()) {
  emulator::ProductLane mine{d, a, {b0, b1}};
  emulator::together(
      "multiply_add_16x8x16", 0xffffffffu, mine,
      [](emulator::ProductLane* const* lanes, unsigned present) {
        emulator::require_whole_warp(present);
        float a_matrix[16][16], b_matrix[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i) {
            float* two = &a_matrix[g + i % 2 * 8][2 * t + i / 2 * 8];
            two[0] = low_bfloat16(lanes[lane]->a[i]);
            two[1] = high_bfloat16(lanes[lane]->a[i]);
          }
          for (int i = 0; i < 2; ++i) {
            b_matrix[2 * t + 8 * i][g] = low_bfloat16(lanes[lane]->b[i]);
            b_matrix[2 * t + 8 * i + 1][g] = high_bfloat16(lanes[lane]->b[i]);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, col = 2 * (lane % 4) + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += a_matrix[row][k] * b_matrix[k][col];
            lanes[lane]->d[i] += sum;
          }
        }
      },
      where);
}

}  // namespace tinyvllm::cuda

// The kernels of ops/sample.h.
#pragma once

#include "ops/cuda/logit_row.h"
#include "ops/gumbel.h"
#include "ops/sample.h"

namespace tinyvllm::cuda {

inline constexpr int kDrawThreads = 256;
inline constexpr int kDrawWarps = kDrawThreads / kWarpSize;
inline constexpr int kMaxParts = 64;  // into which a row is cut, so that few rows fill the GPU

inline constexpr Cut kKeepAll = {0, INT32_MAX};

__device__ inline LogitRow logits_of(const float* logits, std::int64_t stride, int vocab,
                                     const SampleRow& row) {
  return {logits + row.logits_row * stride, vocab,
          row.inverse_temperature == 0 ? 1.0f : row.inverse_temperature};
}

// --- Edits ---------------------------------------------------------------------------------------

__global__ void edit_logits_kernel(float* logits, std::int64_t stride, LogitEdit* edits,
                                   int count) {
  wait_for_previous();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  LogitEdit& edit = edits[i];
  if (edit.logits_row < 0) return;
  float* place = logits + edit.logits_row * stride + edit.token;
  float x = edit.original = *place;
  if (!is_finite(x)) return;  // an error, which stays where it will be found
  x += edit.bias;
  if (edit.repetition != 1.0f) x = x > 0 ? x / edit.repetition : x * edit.repetition;
  x -= edit.penalty;
  *place = edit.masked != 0 ? kMasked : fminf(fmaxf(x, kMasked), FLT_MAX);
}

__global__ void restore_logits_kernel(float* logits, std::int64_t stride, const LogitEdit* edits,
                                      int count) {
  wait_for_previous();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count || edits[i].logits_row < 0) return;
  logits[edits[i].logits_row * stride + edits[i].token] = edits[i].original;
}

// --- min_p, top_k, top_p -------------------------------------------------------------------------

// A block for each row that has a filter: where it cuts.
__global__ void __launch_bounds__(kRowThreads)
    filter_kernel(const float* logits, std::int64_t stride, int vocab, const SampleRow* rows,
                  Cut* cuts) {
  let_next_begin();
  wait_for_previous();
  const SampleRow& sample = rows[blockIdx.x];
  if (sample.logits_row < 0 || !sample.has_filter()) return;
  auto& memory = *reinterpret_cast<SelectMemory*>(shared_memory());
  const LogitRow row = logits_of(logits, stride, vocab, sample);

  float maximum = kMinusInfinity;
  row.for_each([&](int, float value) { maximum = fmaxf(maximum, value); });
  maximum = block_max(maximum, memory);
  Cut cut = kKeepAll;
  if (is_finite(maximum)) {  // else the draw finds an error
    // p >= min_p p_max is a bound on the distance of two logits, without any softmax.
    cut.key = key_of(fmaxf(maximum + sample.log_min_p, -FLT_MAX));
    if (sample.top_k > 0) cut = select<false>(row, maximum, cut, sample.top_k, memory);
    if (sample.top_p < 1) cut = select<true>(row, maximum, cut, sample.top_p, memory);
  }
  if (threadIdx.x == 0) cuts[blockIdx.x] = cut;
}

// --- The token -----------------------------------------------------------------------------------

struct Candidate {
  double score;
  std::int32_t token;
  std::int32_t not_finite;  // whether a logit is

  // Ties go to the lower id.
  __device__ void take_better(const Candidate& other) {
    if (other.score > score || (other.score == score && other.token < token)) {
      score = other.score, token = other.token;
    }
    not_finite |= other.not_finite;
  }
};

__device__ inline Candidate best_of_warp(Candidate best) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    best.take_better({__shfl_xor_sync(kAllLanes, best.score, step),
                      __shfl_xor_sync(kAllLanes, best.token, step),
                      __shfl_xor_sync(kAllLanes, best.not_finite, step)});
  }
  return best;
}

// Block (part, row): the best token of one part of a row of logits. The last part of a row to
// finish takes the best of all parts.
//
//   parts     [num_rows, gridDim.x]  in the workspace
//   counters  [num_rows]             zero, and zero again afterwards
__global__ void __launch_bounds__(kDrawThreads)
    draw_kernel(const float* logits, std::int64_t stride, int vocab, int part_size,
                const SampleRow* rows, const Cut* cuts, Candidate* parts, std::uint32_t* counters,
                std::int32_t* tokens, SampleError* errors) {
  let_next_begin();
  wait_for_previous();
  const int index = static_cast<int>(blockIdx.y), num_parts = static_cast<int>(gridDim.x);
  const SampleRow sample = rows[index];
  if (sample.logits_row < 0) return;
  const LogitRow row = logits_of(logits, stride, vocab, sample);
  const bool greedy = sample.inverse_temperature == 0;
  const Cut cut = sample.has_filter() ? cuts[index] : kKeepAll;
  const bool aligned = reinterpret_cast<std::uintptr_t>(row.logits) % 16 == 0;
  const int begin = static_cast<int>(blockIdx.x) * part_size, end = min(vocab, begin + part_size);

  Candidate best{kMinusInfinity, INT32_MAX, 0};
  // A random draw takes two logarithms a token, in float64. Nearly all tokens are ruled out by
  // cheap bounds: those whose score cannot reach `floor`, which some token's score does.
  float floor = kMinusInfinity;
  // All lanes of a warp go round together.
  for (int first = begin; first < end; first += 4 * kDrawThreads) {
    const int i = first + 4 * static_cast<int>(threadIdx.x);
    float x[4];
    if (aligned && i + 4 <= end) {
      const uint4 v = load_streaming(row.logits + i);
      x[0] = std::bit_cast<float>(v.x), x[1] = std::bit_cast<float>(v.y);
      x[2] = std::bit_cast<float>(v.z), x[3] = std::bit_cast<float>(v.w);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = i + j < end ? row.logits[i + j] : kMasked;
    }
    if (greedy) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        best.not_finite |= is_finite(x[j]) ? 0 : 1;
        if (x[j] != kMasked && x[j] > best.score) best.score = x[j], best.token = i + j;
      }
      continue;
    }
    const std::array<std::uint32_t, 4> noise = token_noise(
        sample.seed, sample.sample_index, sample.position, static_cast<std::uint32_t>(i) / 4);
    float highest[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      best.not_finite |= is_finite(x[j]) ? 0 : 1;
      x[j] = row.scaled(x[j]);
      const bool kept = x[j] > kMinusInfinity && cut.keeps(key_of(x[j]), i + j);
      const float slack = 1e-6f + fabsf(x[j]) * 1e-6f;  // of these float32 sums
      highest[j] = kept ? x[j] + gumbel_upper_bound(noise[j]) + slack : kMinusInfinity;
      if (kept) floor = fmaxf(floor, x[j] + gumbel_lower_bound(noise[j]) - slack);
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      floor = fmaxf(floor, __shfl_xor_sync(kAllLanes, floor, step));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (highest[j] == kMinusInfinity || highest[j] < floor) continue;
      best.take_better({static_cast<double>(x[j]) + gumbel(noise[j]), i + j, 0});
    }
  }

  auto* of_warps = reinterpret_cast<Candidate*>(shared_memory());
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  best = best_of_warp(best);
  if (lane == 0) of_warps[warp] = best;
  __syncthreads();
  if (warp > 0) return;
  best = of_warps[lane % kDrawWarps];
  best = best_of_warp(best);

  if (num_parts > 1) {
    Candidate* parts_of_row = parts + index * num_parts;
    int arrived = 0;
    if (lane == 0) {
      parts_of_row[blockIdx.x] = best;
      __threadfence();
      arrived = static_cast<int>(atomicAdd(counters + index, 1u));
    }
    if (__shfl_sync(kAllLanes, arrived, 0) < num_parts - 1) return;
    __threadfence();
    for (int i = lane; i < num_parts; i += kWarpSize) {
      const volatile Candidate& part = parts_of_row[i];
      best.take_better({part.score, part.token, part.not_finite});
    }
    best = best_of_warp(best);
    if (lane == 0) counters[index] = 0;
  }
  if (lane == 0) {
    const SampleError error = best.not_finite != 0      ? SampleError::kNotFinite
                              : best.token == INT32_MAX ? SampleError::kNoToken
                                                        : SampleError::kNone;
    errors[index] = error;
    tokens[index] = error == SampleError::kNone ? best.token : 0;
  }
}

// --- Logprobs ------------------------------------------------------------------------------------

// A block for each row that asks. Without `rows`: row i of logits, with num_logprobs.
__global__ void __launch_bounds__(kRowThreads)
    logprobs_kernel(const float* logits, std::int64_t stride, int vocab, const SampleRow* rows,
                    const std::int32_t* tokens, int num_logprobs, LogprobOutputs outputs) {
  let_next_begin();
  wait_for_previous();
  const int index = static_cast<int>(blockIdx.x);
  SampleRow sample{.logits_row = index, .num_logprobs = num_logprobs};
  if (rows != nullptr) sample = rows[index];
  if (sample.logits_row < 0 || sample.num_logprobs < 0) return;
  auto& memory = *reinterpret_cast<SelectMemory*>(shared_memory());
  const LogitRow row{logits + sample.logits_row * stride, vocab, 1.0f};

  float maximum = kMinusInfinity;
  row.for_each([&](int, float value) { maximum = fmaxf(maximum, value); });
  maximum = block_max(maximum, memory);
  const float taken = row.logits[tokens[index]];
  double total = 0, greater = 0;
  row.for_each([&](int, float value) {
    total += expf(value - maximum);
    greater += value > taken ? 1 : 0;
  });
  total = block_sum(total, memory);
  greater = block_sum(greater, memory);
  const double log_total = static_cast<double>(maximum) + std::log(total);
  if (threadIdx.x == 0) {
    outputs.chosen[index] = static_cast<float>(taken - log_total);
    outputs.ranks[index] = 1 + static_cast<std::int32_t>(greater);
  }

  const int count = min(min(sample.num_logprobs, kMaxLogprobs), vocab);
  if (count == 0 || !is_finite(maximum)) return;
  const Cut cut = select<false>(row, maximum, {key_of(-FLT_MAX), INT32_MAX}, count, memory);
  list_in_order(row, key_of(maximum), cut, memory);
  if (static_cast<int>(threadIdx.x) < count) {
    const int place = index * kMaxLogprobs + static_cast<int>(threadIdx.x);
    outputs.top_tokens[place] = memory.sorted_tokens[threadIdx.x];
    outputs.top_logprobs[place] =
        static_cast<float>(value_of(memory.sorted_keys[threadIdx.x]) - log_total);
  }
}

__global__ void feed_tokens_kernel(const std::int32_t* sampled, const std::int32_t* sources,
                                   int count, std::int32_t* tokens) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count && sources[i] >= 0) tokens[i] = sampled[sources[i]];
}

}  // namespace tinyvllm::cuda

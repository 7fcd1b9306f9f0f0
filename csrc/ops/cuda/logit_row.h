// One row of logits, read by one block: in the order of its values, and as sums that do not depend
// on the order in which threads run.
#pragma once

#include <bit>
#include <cfloat>
#include <cstdint>

#include "cuda/device.h"

namespace tinyvllm::cuda {

inline constexpr int kRowThreads = 512;
inline constexpr int kRowWarps = kRowThreads / kWarpSize;

inline constexpr float kMinusInfinity = -__builtin_inff();
// What stands in the place of a logit whose token cannot be chosen. Finite, and so not an error.
inline constexpr float kMasked = -FLT_MAX;

__device__ inline bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

// Integers in the order of the floats that they come from; -0 and 0 are equal.
__device__ inline std::uint32_t key_of(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value + 0.0f);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ inline float value_of(std::uint32_t key) {
  return std::bit_cast<float>(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

struct LogitRow {
  const float* logits;
  int vocab;
  float scale;  // 1 / temperature

  __device__ float scaled(float logit) const {
    return logit == kMasked ? kMinusInfinity : logit * scale;
  }

  // Calls f(token, scaled logit) for every token, each in one of the block's threads.
  template <typename F>
  __device__ void for_each(F&& f) const {
    constexpr int kLoads = 4;  // in flight, of 16 bytes
    constexpr int kStep = 4 * kRowThreads;
    int i = 4 * static_cast<int>(threadIdx.x);
    if (reinterpret_cast<std::uintptr_t>(logits) % 16 == 0) {
      for (; i + (kLoads - 1) * kStep + 4 <= vocab; i += kLoads * kStep) {
        uint4 v[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) v[j] = load_streaming(logits + i + j * kStep);
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          f(i + j * kStep, scaled(std::bit_cast<float>(v[j].x)));
          f(i + j * kStep + 1, scaled(std::bit_cast<float>(v[j].y)));
          f(i + j * kStep + 2, scaled(std::bit_cast<float>(v[j].z)));
          f(i + j * kStep + 3, scaled(std::bit_cast<float>(v[j].w)));
        }
      }
    }
    for (; i < vocab; i += kStep) {
      for (int j = i; j < i + 4 && j < vocab; ++j) f(j, scaled(logits[j]));
    }
  }
};

// The first tokens in the order of falling value, then rising id: up to this one.
struct Cut {
  std::uint32_t key;
  std::int32_t token;

  __device__ bool keeps(std::uint32_t other_key, std::int32_t other_token) const {
    return other_key > key || (other_key == key && other_token <= token);
  }
};

inline constexpr int kBins = 16;
inline constexpr int kListSize = 512;  // = kRowThreads: a thread sorts one

// A block's shared memory while it selects.
struct SelectMemory {
  double columns[kBins][kRowThreads];  // a thread adds in a column of its own
  double bins[kBins];
  std::uint32_t keys[kListSize];  // a list of tokens, as they came
  std::int32_t tokens[kListSize];
  std::uint32_t sorted_keys[kListSize];  // and in order
  std::int32_t sorted_tokens[kListSize];
  double weights[kListSize];
  double warp_sums[kRowWarps];
  float warp_maxima[kRowWarps];
  int counts[kRowThreads];
  int list_length;
  Cut cut;
};

__device__ inline float block_max(float value, SelectMemory& memory) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  if (threadIdx.x % kWarpSize == 0) memory.warp_maxima[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = memory.warp_maxima[0];
  for (int i = 1; i < kRowWarps; ++i) value = fmaxf(value, memory.warp_maxima[i]);
  __syncthreads();
  return value;
}

__device__ inline double block_sum(double value, SelectMemory& memory) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  if (threadIdx.x % kWarpSize == 0) memory.warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < kRowWarps; ++i) value += memory.warp_sums[i];
  __syncthreads();
  return value;
}

// Lists the tokens that `kept` keeps with a key of at most `highest`, in order. There are at most
// kListSize.
__device__ inline int list_in_order(const LogitRow& row, std::uint32_t highest, Cut kept,
                                    SelectMemory& memory) {
  if (threadIdx.x == 0) memory.list_length = 0;
  __syncthreads();
  row.for_each([&](int token, float value) {
    const std::uint32_t key = key_of(value);
    if (key > highest || !kept.keeps(key, token)) return;
    const int place = atomicAdd(&memory.list_length, 1);
    if (place < kListSize) memory.keys[place] = key, memory.tokens[place] = token;
  });
  __syncthreads();
  const int length = min(memory.list_length, kListSize);
  const int i = static_cast<int>(threadIdx.x);
  if (i < length) {
    const Cut mine{memory.keys[i], memory.tokens[i]};
    int rank = -1;  // how many are kept up to this one, itself apart
    for (int j = 0; j < length; ++j) rank += mine.keeps(memory.keys[j], memory.tokens[j]) ? 1 : 0;
    memory.sorted_keys[rank] = mine.key, memory.sorted_tokens[rank] = mine.token;
  }
  __syncthreads();
  return length;
}

// The `count`-th token, by rising id, among those whose key is `key`.
__device__ inline std::int32_t nth_with_key(const LogitRow& row, std::uint32_t key, int count,
                                            SelectMemory& memory) {
  const int share = (row.vocab + kRowThreads - 1) / kRowThreads;
  const int begin = min(row.vocab, static_cast<int>(threadIdx.x) * share);
  const int end = min(row.vocab, begin + share);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += key_of(row.scaled(row.logits[i])) == key ? 1 : 0;
  memory.counts[threadIdx.x] = mine;
  __syncthreads();
  int before = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) before += memory.counts[i];
  if (before < count && count <= before + mine) {
    for (int i = begin; i < end; ++i) {
      if (key_of(row.scaled(row.logits[i])) == key && ++before == count) memory.cut.token = i;
    }
  }
  __syncthreads();
  const std::int32_t token = memory.cut.token;
  __syncthreads();
  return token;
}

// Of the tokens that `kept` keeps, the shortest prefix whose weights reach the target. Either every
// token weighs 1 and the target is a count, or it weighs exp(value - maximum) and the target is a
// share of all weights together.
//
// The order is found by narrowing an interval of keys: 16 bins a pass over the row, the first ones
// half an octave wide, until few tokens are left to sort, or only equal ones. `maximum`, the
// largest value, is finite.
template <bool kExponential>
__device__ inline Cut select(const LogitRow& row, float maximum, Cut kept, double target,
                             SelectMemory& memory) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  const auto weight = [&](float value) { return kExponential ? expf(value - maximum) : 1.0f; };
  std::uint32_t highest = key_of(maximum), lowest = kept.key;
  double above = 0;  // the weight of what lies over the interval
  for (int pass = 0;; ++pass) {
    // The last bin takes all the rest.
    int shift = highest == lowest ? 0 : max(0, 28 - std::countl_zero(highest - lowest));
    if (pass == 0) shift = min(shift, 22);
    for (int bin = 0; bin < kBins; ++bin) memory.columns[bin][thread] = 0;
    row.for_each([&](int token, float value) {
      const std::uint32_t key = key_of(value);
      if (key > highest || key < lowest || !kept.keeps(key, token)) return;
      const int bin = static_cast<int>(min((highest - key) >> shift, kBins - 1u));
      memory.columns[bin][thread] += weight(value);
    });
    __syncthreads();
    if (warp < kBins) {
      double sum = 0;
      for (int i = thread % kWarpSize; i < kRowThreads; i += kWarpSize) {
        sum += memory.columns[warp][i];
      }
      for (int step = kWarpSize / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, step);
      }
      if (thread % kWarpSize == 0) memory.bins[warp] = sum;
    }
    __syncthreads();
    if (pass == 0) {
      double total = 0;
      for (int bin = 0; bin < kBins; ++bin) total += memory.bins[bin];
      if (kExponential) {
        target *= total;
      } else if (total <= target) {
        return kept;  // all of them
      }
    }
    int bin = 0;
    while (bin < kBins - 1 && above + memory.bins[bin] < target) above += memory.bins[bin++];
    while (bin > 0 && memory.bins[bin] == 0)
      above -= memory.bins[--bin];  // rounding: none is enough
    const double inside = memory.bins[bin];
    __syncthreads();
    if (bin < kBins - 1) {
      const std::uint32_t width = 1u << shift, offset = static_cast<std::uint32_t>(bin) << shift;
      // The bin may reach below the interval, but only by what holds no token.
      if (highest - lowest >= offset + width) lowest = highest - offset - (width - 1);
      highest -= offset;
    } else {
      highest -= static_cast<std::uint32_t>(bin) << shift;
    }

    if (highest == lowest) {
      const double each = weight(value_of(lowest)), there = rint(inside / each);
      const double wanted = fmin(fmax(ceil((target - above) / each), 1.0), there);
      return {lowest, nth_with_key(row, lowest, static_cast<int>(wanted), memory)};
    }
    // No weight in the interval is smaller than that of its lowest key.
    const double most = kExponential ? inside / weight(value_of(lowest)) : inside;
    if (!(most <= 0.98 * kListSize)) continue;
    const Cut interval = lowest == kept.key ? kept : Cut{lowest, INT32_MAX};
    const int length = list_in_order(row, highest, interval, memory);
    if (thread < length) {
      const double distance = static_cast<double>(value_of(memory.sorted_keys[thread])) - maximum;
      memory.weights[thread] = kExponential ? exp(distance) : 1.0;
    }
    __syncthreads();
    if (thread == 0) {
      int last = 0;
      for (; last < length - 1; ++last) {
        above += memory.weights[last];
        if (above >= target) break;
      }
      memory.cut = {memory.sorted_keys[last], memory.sorted_tokens[last]};
    }
    __syncthreads();
    const Cut cut = memory.cut;
    __syncthreads();
    return cut;
  }
}

}  // namespace tinyvllm::cuda

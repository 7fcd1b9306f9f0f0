// From the arguments of an attention op to the launch of its decodes.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>

#include "base/errors.h"
#include "cuda/launch.h"
#include "ops/cuda/attention_decode.h"
#include "ops/cuda/attention_prefill.h"

namespace tinyvllm::cuda {

// Rows of 16-bit elements that can be read 16 bytes at a time.
inline bool is_aligned(const void* data, std::int64_t row_stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && row_stride % 8 == 0;
}

// Whether the kernels on the tensor cores take such a cache, and these operands, where they know the
// head_dim.
inline bool for_tensor_cores(const KvShape& kv, std::int64_t num_heads) {
  return kv.dtype == DType::kBFloat16 && kv.block_size % kDecodeTile == 0 &&
         num_heads / kv.num_kv_heads <= kPrefillRows;
}
inline bool for_tensor_cores(TensorView q, const KvLayer& kv, std::int64_t num_heads,
                             TensorView out) {
  return for_tensor_cores(kv.shape, num_heads) && is_aligned(q.data, q.row_stride) &&
         is_aligned(out.data, out.row_stride) && is_aligned(kv.keys, 0) && is_aligned(kv.values, 0);
}

// Calls f(dim) with the one of kDims that the head_dim is, as a constant; false where it is none.
template <int... kDims, typename F>
bool with_dim(std::int64_t head_dim, F&& f) {
  return ((head_dim == kDims && (f(std::integral_constant<int, kDims>()), true)) || ...);
}

// How many counters a decode takes: a block has at most kDecodeHeads query heads of one KV head.
inline std::int64_t shares_of_a_decode(std::int64_t num_heads, std::int64_t num_kv_heads) {
  return num_kv_heads * ((num_heads / num_kv_heads + kDecodeHeads - 1) / kDecodeHeads);
}

template <typename T>
AttentionArguments<T> attention_arguments(TensorView q, const KvLayer& kv,
                                          const CudaSequences& sequences, std::int64_t num_heads,
                                          std::int64_t window, float scale, MutTensorView out) {
  const auto block_size = static_cast<std::uint32_t>(kv.shape.block_size);
  return {.q = static_cast<const T*>(q.data),
          .q_stride = q.row_stride,
          .keys = static_cast<const T*>(kv.keys),
          .values = static_cast<const T*>(kv.values),
          .out = static_cast<T*>(out.data),
          .out_stride = out.row_stride,
          .block_stride = kv.shape.block_stride(),
          .num_heads = static_cast<int>(num_heads),
          .num_kv_heads = static_cast<int>(kv.shape.num_kv_heads),
          .head_dim = static_cast<int>(kv.shape.head_dim),
          .block_size = static_cast<int>(block_size),
          .block_shift = std::has_single_bit(block_size) ? std::countr_zero(block_size) : -1,
          .window = static_cast<int>(window),
          .scale = scale,
          .sequences = sequences};
}

template <int kDim, bool kRotates>
void attend_decodes(const CudaContext& ctx, const AttentionArguments<BFloat16>& arguments,
                    const RopeArguments& rope) {
  const CudaSequences& sequences = arguments.sequences;
  const int group = arguments.num_heads / arguments.num_kv_heads;
  const auto shares =
      static_cast<int>(shares_of_a_decode(arguments.num_heads, arguments.num_kv_heads));
  const int num_shares = sequences.num_decodes * shares;
  if (static_cast<std::size_t>(num_shares) > CudaContext::kNumCounters) {
    throw Error("paged_attention: " + std::to_string(sequences.num_decodes) + " decodes of " +
                std::to_string(arguments.num_kv_heads) + " KV heads need more than " +
                std::to_string(CudaContext::kNumCounters) + " counters. Lower max_num_seqs.");
  }
  // Enough blocks for one split of each sequence; where fewer sequences have more splits, as many
  // as the GPU takes at once.
  const int blocks = std::max(num_shares, 2 * ctx.num_multiprocessors());
  const std::int64_t max_context = std::int64_t{sequences.max_blocks} * arguments.block_size;
  const std::int64_t max_splits = (max_context + sequences.split - 1) / sequences.split;
  auto* partials = reinterpret_cast<float*>(ctx.workspace(
      paged_attention_workspace_bytes(sequences.max_decode_items, arguments.num_heads, kDim)));
  const auto start = [&](auto warps) {
    launch(ctx, "decode_attention",
           {.grid = dim3(static_cast<unsigned>(blocks)),
            .block = warps() * kWarpSize,
            .shared_bytes = decode_shared_bytes(group, kDim, warps(), max_splits),
            .overlaps_previous = true},
           decode_attention_kernel<kDim, kRotates, warps()>, arguments, rope,
           static_cast<int>(sequences.split), partials, ctx.counters());
  };
  if (num_shares < 4 * ctx.num_multiprocessors()) {
    start(std::integral_constant<int, 8>());
  } else {
    start(std::integral_constant<int, 4>());
  }
}

}  // namespace tinyvllm::cuda

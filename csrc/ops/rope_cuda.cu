#include <bit>

#include "cuda/launch.h"
#include "ops/cuda/elements.h"
#include "ops/rope.h"

namespace tinyvllm {
namespace {

// A thread an angle.
__global__ void rope_angles_kernel(const std::int32_t* __restrict__ positions,
                                   const float* __restrict__ inverse_frequencies, int half,
                                   float scale, std::int64_t num_angles,
                                   float* __restrict__ cos_sin, std::int64_t stride) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  cuda::let_next_begin();
  if (index >= num_angles) return;
  const std::int64_t t = index / half, i = index % half;
  // A product of its own, not one end of a fused operation inside cosf.
  const float angle = __fmul_rn(static_cast<float>(positions[t]), inverse_frequencies[i]);
  cos_sin[t * stride + i] = cosf(angle) * scale;
  cos_sin[t * stride + half + i] = sinf(angle) * scale;
}

struct Heads {
  int num_heads, num_kv_heads, head_dim, block_size;
  int block_shift;  // log2(block_size); -1 where it is not a power of two
  std::int64_t block_stride;
};

// A token for each block in x, its heads over the blocks in y. A group of 2^lanes_shift lanes takes
// one head: each of them kWidth elements of the left half and the kWidth that turn with them. Heads
// of q are written back, heads of k and v go to the token's slot. There is so little to do for a head
// that a division of 64-bit numbers would be a good part of it.
template <typename T, typename Cache, int kWidth>
__global__ void qk_norm_rope_and_cache_kernel(T* qkv, std::int64_t qkv_stride, Heads heads,
                                              const float* q_norm, const float* k_norm, float eps,
                                              const float* cos_sin, std::int64_t cos_sin_stride,
                                              const std::int64_t* slots, int lanes_shift,
                                              Cache* keys, Cache* values) {
  const int lanes = 1 << lanes_shift;
  const int h =
      (static_cast<int>(blockIdx.y * blockDim.x) + static_cast<int>(threadIdx.x)) >> lanes_shift;
  const int first = (static_cast<int>(threadIdx.x) & (lanes - 1)) * kWidth, step = lanes * kWidth;
  const int half = heads.head_dim / 2;
  const std::int64_t t = blockIdx.x;
  const bool is_query = h < heads.num_heads;
  const bool is_value = h >= heads.num_heads + heads.num_kv_heads;
  cuda::let_next_begin();
  cuda::wait_for_previous();

  const std::int64_t slot = slots[t];
  // The lanes of the others still take part in the sums.
  const bool active = slot >= 0 && h < heads.num_heads + 2 * heads.num_kv_heads;
  T* head = qkv + t * qkv_stride + static_cast<std::int64_t>(h) * heads.head_dim;
  const float* norm = is_query ? q_norm : is_value ? nullptr : k_norm;
  float scale = 1;
  if (q_norm != nullptr || k_norm != nullptr) {
    float squares = 0;
    for (int i = first; active && norm != nullptr && i < half; i += step) {
      float left[kWidth], right[kWidth];
      cuda::load(head + i, left);
      cuda::load(head + half + i, right);
      for (int j = 0; j < kWidth; ++j) squares += left[j] * left[j] + right[j] * right[j];
    }
    squares = cuda::lanes_sum(squares, lanes);
    if (norm != nullptr) {
      scale = 1.0f / sqrtf(squares / static_cast<float>(heads.head_dim) + eps);
    }
  }
  if (!active) return;

  const std::int64_t block =
      heads.block_shift >= 0 ? slot >> heads.block_shift : slot / heads.block_size;
  const std::int64_t in_block = slot - block * heads.block_size;
  const int kv_head = h - heads.num_heads - (is_value ? heads.num_kv_heads : 0);
  const std::int64_t target =
      block * heads.block_stride +
      (static_cast<std::int64_t>(kv_head) * heads.block_size + in_block) * heads.head_dim;
  const float* angles = cos_sin + t * cos_sin_stride;
  for (int i = first; i < half; i += step) {
    float left[kWidth], right[kWidth];
    cuda::load(head + i, left);
    cuda::load(head + half + i, right);
    if (norm != nullptr) {
      float left_weight[kWidth], right_weight[kWidth];
      cuda::load(norm + i, left_weight);
      cuda::load(norm + half + i, right_weight);
      for (int j = 0; j < kWidth; ++j) {
        left[j] = left[j] * scale * left_weight[j];
        right[j] = right[j] * scale * right_weight[j];
      }
    }
    if (!is_value) {
      float cosine[kWidth], sine[kWidth];
      cuda::load(angles + i, cosine);
      cuda::load(angles + half + i, sine);
      for (int j = 0; j < kWidth; ++j) {
        const float x = left[j], y = right[j];
        left[j] = x * cosine[j] - y * sine[j];
        right[j] = y * cosine[j] + x * sine[j];
      }
    }
    if (is_query) {
      cuda::store(head + i, left);
      cuda::store(head + half + i, right);
    } else {
      Cache* slot_head = (is_value ? values : keys) + target;
      cuda::store(slot_head + i, left);
      cuda::store(slot_head + half + i, right);
    }
  }
}

constexpr int kThreads = 128;

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

// Never overlaps what comes before it: as the first kernel of a forward pass it is where the kernels
// behind it may rely on all of the last pass having ended.
void rope_angles(const CudaContext& ctx, std::span<const std::int32_t> positions,
                 std::span<const float> inverse_frequencies, float scale, MutTensorView cos_sin) {
  const auto half = static_cast<int>(inverse_frequencies.size());
  const std::int64_t num_angles = std::ssize(positions) * half;
  cuda::launch(ctx, "rope_angles", {.grid = blocks_for(num_angles), .block = kThreads},
               rope_angles_kernel, positions.data(), inverse_frequencies.data(), half, scale,
               num_angles, cos_sin.row<float>(0), cos_sin.row_stride);
}

void qk_norm_rope_and_cache(const CudaContext& ctx, MutTensorView qkv, std::int64_t num_heads,
                            const float* q_norm, const float* k_norm, float eps, TensorView cos_sin,
                            std::span<const std::int64_t> slots, const KvLayer& cache) {
  constexpr int kWidth = 8;
  const KvShape& shape = cache.shape;
  const auto block_size = static_cast<std::uint32_t>(shape.block_size);
  const Heads heads{
      .num_heads = static_cast<int>(num_heads),
      .num_kv_heads = static_cast<int>(shape.num_kv_heads),
      .head_dim = static_cast<int>(shape.head_dim),
      .block_size = static_cast<int>(block_size),
      .block_shift = std::has_single_bit(block_size) ? std::countr_zero(block_size) : -1,
      .block_stride = shape.block_stride()};
  const std::int64_t half = shape.head_dim / 2;
  const auto aligned = [&](const void* data, DType dtype, std::int64_t stride) {
    return cuda::wide_elements(data, dtype, stride, kWidth);
  };
  const bool wide = half % kWidth == 0 && aligned(qkv.data, qkv.dtype, qkv.row_stride) &&
                    aligned(q_norm, DType::kFloat32, 0) && aligned(k_norm, DType::kFloat32, 0) &&
                    aligned(cos_sin.data, DType::kFloat32, cos_sin.row_stride) &&
                    aligned(cache.keys, shape.dtype, 0) && aligned(cache.values, shape.dtype, 0);
  cuda::with_element(qkv.dtype, [&](auto element) {
    cuda::with_element(shape.dtype, [&](auto cached) {
      cuda::with_width<kWidth>(wide, [&](auto width) {
        using T = decltype(element);
        using Cache = decltype(cached);
        const auto pieces = static_cast<unsigned>((half + width() - 1) / width());
        const unsigned lanes = std::min(32u, std::bit_ceil(pieces));
        const auto threads = static_cast<unsigned>(num_heads + 2 * shape.num_kv_heads) * lanes;
        const unsigned block = std::min(256u, (threads + 31) / 32 * 32);
        cuda::launch(ctx, "qk_norm_rope_and_cache",
                     {.grid = dim3(static_cast<unsigned>(qkv.rows), (threads + block - 1) / block),
                      .block = block,
                      .overlaps_previous = true},
                     qk_norm_rope_and_cache_kernel<T, Cache, width()>, qkv.row<T>(0),
                     qkv.row_stride, heads, q_norm, k_norm, eps, cos_sin.row<float>(0),
                     cos_sin.row_stride, slots.data(), std::countr_zero(lanes),
                     static_cast<Cache*>(cache.keys), static_cast<Cache*>(cache.values));
      });
    });
  });
}

}  // namespace tinyvllm

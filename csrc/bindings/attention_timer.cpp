// What benchmarks/gpu_attention.py measures: attention and sampling on the GPU, on random data, in
// a CUDA graph as in a step of the engine.
#include "bindings/bindings.h"

#if defined(TINYVLLM_HAS_CUDA)
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cuda/context.h"
#include "cuda/graph.h"
#include "cuda/memory.h"
#include "cuda/stream.h"
#include "ops/paged_attention.h"
#include "ops/sample.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace tinyvllm {
namespace {

// Milliseconds of what `queue` queues, as a graph: `repetitions` measurements of `passes` each.
template <typename F>
std::vector<float> measure(const CudaContext& ctx, F&& queue, int passes, int repetitions) {
  queue();
  ctx.synchronize();
  const cuda::Graph graph(ctx, queue);
  graph.replay(ctx);
  std::vector<float> results;
  cuda::Event start, end;
  for (int i = 0; i < repetitions; ++i) {
    start.record(ctx.stream());
    for (int j = 0; j < passes; ++j) graph.replay(ctx);
    end.record(ctx.stream());
    end.synchronize();
    results.push_back(end.milliseconds_since(start) / static_cast<float>(passes));
  }
  ctx.synchronize();
  return results;
}

template <typename T>
cuda::DeviceMemory on_device(const CudaContext& ctx, const std::vector<T>& values) {
  cuda::DeviceMemory memory(std::max<std::size_t>(1, values.size() * sizeof(T)), "an array");
  cuda::copy_to_device(ctx, memory.data(), values.data(), values.size() * sizeof(T));
  ctx.synchronize();
  return memory;
}

// Fills the memory with `values` over and over.
template <typename T>
void fill(const CudaContext& ctx, const cuda::DeviceMemory& memory, const std::vector<T>& values) {
  std::size_t done = std::min(memory.size(), values.size() * sizeof(T));
  cuda::copy_to_device(ctx, memory.data(), values.data(), done);
  while (done < memory.size()) {
    const std::size_t more = std::min(done, memory.size() - done);
    cuda::copy_on_device(ctx, memory.data() + done, memory.data(), more);
    done += more;
  }
  ctx.synchronize();
}

// One call of attention a layer, each over a cache of its own: every sequence has `context` tokens,
// the last `num_tokens` of them in this step.
std::vector<float> time_attention(CudaContext& ctx, std::int32_t num_sequences,
                                  std::int32_t num_tokens, std::int32_t context,
                                  std::int64_t num_heads, std::int64_t num_kv_heads,
                                  std::int64_t head_dim, std::int64_t num_layers,
                                  std::int64_t block_size, std::int32_t split, int passes,
                                  int repetitions) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<BFloat16> random(std::size_t{1} << 20);
  for (BFloat16& value : random) value = to_bfloat16(normal(generator));

  const auto max_blocks = static_cast<std::int32_t>((context + block_size - 1) / block_size);
  const KvShape shape{.num_layers = num_layers,
                      .num_blocks = std::int64_t{num_sequences} * max_blocks,
                      .block_size = block_size,
                      .num_kv_heads = num_kv_heads,
                      .head_dim = head_dim,
                      .dtype = DType::kBFloat16};
  const std::int64_t array = shape.num_blocks * shape.block_stride();
  const cuda::DeviceMemory cache(static_cast<std::size_t>(2 * num_layers * array) * 2, "the cache");
  fill(ctx, cache, random);

  std::vector<std::int32_t> tables(static_cast<std::size_t>(shape.num_blocks));
  std::iota(tables.begin(), tables.end(), 0);
  std::ranges::shuffle(tables, generator);
  const bool decode = num_tokens == 1;
  const std::vector<std::int32_t> lengths(static_cast<std::size_t>(num_sequences), context);
  std::vector<std::int32_t> items, starts{0}, tiles;
  if (split == 0)
    split = static_cast<std::int32_t>(decode_split(num_sequences, num_kv_heads, context));
  for (std::int32_t i = 0; i < num_sequences; ++i) {
    if (decode) {
      append_decode_items(i, context, split, items);
    } else {
      append_chunk_tiles(i, num_tokens, chunk_tile_tokens(num_heads, num_kv_heads), tiles);
      starts.push_back(starts.back() + num_tokens);
    }
  }
  const auto num_items = static_cast<std::int32_t>(items.size() / 2);
  ctx.reserve_workspace(paged_attention_workspace_bytes(num_items, num_heads, head_dim));
  const cuda::DeviceMemory device_lengths = on_device(ctx, lengths);
  const cuda::DeviceMemory device_tables = on_device(ctx, tables);
  const cuda::DeviceMemory device_items = on_device(ctx, items);
  const cuda::DeviceMemory device_num_items = on_device(ctx, std::vector{num_items});
  const cuda::DeviceMemory device_starts = on_device(ctx, starts);
  const cuda::DeviceMemory device_tiles = on_device(ctx, tiles);
  const CudaSequences sequences{.num_decodes = decode ? num_sequences : 0,
                                .num_chunks = decode ? 0 : num_sequences,
                                .context_lengths = device_lengths.as<std::int32_t>(),
                                .block_tables = device_tables.as<std::int32_t>(),
                                .max_blocks = max_blocks,
                                .decode_items = device_items.as<std::int32_t>(),
                                .num_decode_items = device_num_items.as<std::int32_t>(),
                                .max_decode_items = num_items,
                                .split = split,
                                .chunk_starts = device_starts.as<std::int32_t>(),
                                .chunk_tiles = device_tiles.as<std::int32_t>(),
                                .num_chunk_tiles = static_cast<std::int32_t>(tiles.size() / 2)};

  const std::int64_t rows = std::int64_t{num_sequences} * num_tokens;
  const std::int64_t width = num_heads * head_dim, qkv = width + 2 * num_kv_heads * head_dim;
  const cuda::DeviceMemory q(static_cast<std::size_t>(rows * qkv) * 2, "q");
  const cuda::DeviceMemory out(static_cast<std::size_t>(rows * width) * 2, "the results");
  fill(ctx, q, random);
  const auto queue = [&] {
    for (std::int64_t layer = 0; layer < num_layers; ++layer) {
      std::byte* keys = cache.data() + 4 * layer * array;
      paged_attention(ctx, TensorView{q.data(), DType::kBFloat16, rows, width, qkv},
                      {keys, keys + 2 * array, shape}, sequences, num_heads, 0, 0.125f,
                      MutTensorView{out.data(), DType::kBFloat16, rows, width, width});
    }
  };
  return measure(ctx, queue, passes, repetitions);
}

// One call of sampling for `num_rows` rows of random logits, all with the same options.
std::vector<float> time_sampling(const CudaContext& ctx, std::int32_t num_rows, std::int64_t vocab,
                                 float temperature, std::int32_t top_k, double top_p,
                                 std::int32_t num_logprobs, int passes, int repetitions) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> random((std::size_t{1} << 20) + 7);  // no two rows alike
  for (float& value : random) value = normal(generator);
  const auto count = static_cast<std::size_t>(num_rows);
  const cuda::DeviceMemory logits(count * static_cast<std::size_t>(vocab) * 4, "the logits");
  fill(ctx, logits, random);

  std::vector<SampleRow> rows(count);
  for (std::int32_t i = 0; i < num_rows; ++i) {
    rows[static_cast<std::size_t>(i)] = {
        .logits_row = i,
        .top_k = top_k,
        .inverse_temperature = temperature == 0 ? 0.0f : 1.0f / temperature,
        .log_min_p = -std::numeric_limits<float>::infinity(),
        .top_p = top_p,
        .seed = static_cast<std::uint64_t>(i),
        .num_logprobs = num_logprobs};
  }
  const cuda::DeviceMemory device_rows = on_device(ctx, rows);
  const cuda::DeviceMemory tokens(count * 4, "tokens"), errors(count * 4, "errors");
  const cuda::DeviceMemory chosen(count * 4, "logprobs"), ranks(count * 4, "ranks");
  const cuda::DeviceMemory top_tokens(count * kMaxLogprobs * 4, "tokens");
  const cuda::DeviceMemory top_logprobs(count * kMaxLogprobs * 4, "logprobs");
  const auto queue = [&] {
    sample(ctx, {logits.data(), DType::kFloat32, num_rows, vocab, vocab},
           {.rows = device_rows.as<SampleRow>(),
            .num_rows = num_rows,
            .any_filter = rows.front().has_filter(),
            .any_logprobs = num_logprobs >= 0},
           {.tokens = tokens.as<std::int32_t>(),
            .errors = errors.as<SampleError>(),
            .logprobs = {.chosen = chosen.as<float>(),
                         .ranks = ranks.as<std::int32_t>(),
                         .top_tokens = top_tokens.as<std::int32_t>(),
                         .top_logprobs = top_logprobs.as<float>()}});
  };
  return measure(ctx, queue, passes, repetitions);
}

}  // namespace

void bind_attention_timer(py::module_& module) {
  module.def("time_attention", &time_attention, "ctx"_a, "num_sequences"_a, "num_tokens"_a,
             "context"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "num_layers"_a,
             "block_size"_a, "split"_a, "passes"_a, "repetitions"_a);
  module.def("time_sampling", &time_sampling, "ctx"_a, "num_rows"_a, "vocab"_a, "temperature"_a,
             "top_k"_a, "top_p"_a, "num_logprobs"_a, "passes"_a, "repetitions"_a);
}

}  // namespace tinyvllm

#else

namespace tinyvllm {

void bind_attention_timer(pybind11::module_& /*module*/) {}

}  // namespace tinyvllm

#endif

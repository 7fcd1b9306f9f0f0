// tinyvllm._core.ops: every op on NumPy arrays, for tests and for the curious.
//
// float32 arrays are float32 tensors; uint16 arrays are the bits of bfloat16. Results are new
// arrays, filled with NaN before the op runs, so that an element it forgets is seen. On CUDA the
// arrays are copied to the device and back (operands.h).
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/errors.h"
#include "bindings/attention.h"
#include "bindings/bindings.h"
#include "bindings/operands.h"
#include "model/rope_frequencies.h"
#include "ops/gather_rows.h"
#include "ops/logit_maxima.h"
#include "ops/machine_limits.h"
#include "ops/matmul.h"
#include "ops/norm_matmul.h"
#include "ops/paged_attention.h"
#include "ops/repack.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/rope_and_attend.h"
#include "ops/silu_mul.h"

#if defined(TINYVLLM_HAS_CUDA)
#include "ops/cuda/matmul_plan.h"
#endif

namespace py = pybind11;

namespace tinyvllm {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Ints = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;
using Longs = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

[[noreturn]] void refuse(const std::string& what) {
  throw InvalidRequestError("ops: " + what + ".");
}

DType dtype_of(const py::array& array) {
  if (py::isinstance<py::array_t<float>>(array)) return DType::kFloat32;
  if (py::isinstance<py::array_t<std::uint16_t>>(array)) return DType::kBFloat16;
  refuse("an array is neither float32 nor uint16 (the bits of bfloat16)");
}

// A matrix or a vector (one row) whose rows are contiguous; rows may lie further apart.
MutTensorView view(const py::array& array) {
  if (array.ndim() < 1 || array.ndim() > 2) refuse("an array is not a vector or a matrix");
  const DType dtype = dtype_of(array);
  const auto width = static_cast<py::ssize_t>(size_of(dtype));
  const bool matrix = array.ndim() == 2;
  const std::int64_t rows = matrix ? array.shape(0) : 1, cols = array.shape(array.ndim() - 1);
  const bool contiguous = cols <= 1 || array.strides(array.ndim() - 1) == width;
  if (!contiguous && array.size() > 0) refuse("the rows are not contiguous");
  const std::int64_t stride = matrix ? array.strides(0) / width : cols;
  return {const_cast<void*>(array.data()), dtype, rows, cols, stride};
}

// The same of an array that is float32, on the CPU or everywhere.
MutTensorView float_view(const py::array& array) {
  if (dtype_of(array) != DType::kFloat32) refuse("an array that must be float32 is uint16");
  return view(array);
}

py::array make(DType dtype, std::int64_t rows, std::int64_t cols) {
  if (dtype == DType::kFloat32) {
    py::array_t<float> out({rows, cols});
    std::fill_n(out.mutable_data(), rows * cols, std::numeric_limits<float>::quiet_NaN());
    return out;
  }
  py::array_t<std::uint16_t> out({rows, cols});
  std::fill_n(out.mutable_data(), rows * cols, std::uint16_t{0x7fc0});
  return out;
}

MutTensorView product_view(const AnyContext& any, const py::array& array) {
  return on_cpu(any) ? float_view(array) : view(array);
}

template <typename T, int kFlags>
std::span<const T> span_of(const py::array_t<T, kFlags>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

// Empty for None: an op gets a null pointer.
std::span<const float> span_of(const std::optional<Floats>& array) {
  return array ? span_of(*array) : std::span<const float>();
}

DType named(const std::string& dtype) {
  if (dtype == "float32") return DType::kFloat32;
  if (dtype == "bfloat16") return DType::kBFloat16;
  refuse("dtype \"" + dtype + "\" is not float32 or bfloat16");
}

py::array bind_gather_rows(const AnyContext& any, const Ints& rows, const py::array& table,
                           const std::string& dtype) {
  const MutTensorView source = view(table);
  if (named(dtype) != DType::kFloat32 && named(dtype) != source.dtype) {
    refuse("out is float32, or what the table is");
  }
  for (const std::int32_t row : span_of(rows)) {
    if (row < 0 || row >= source.rows) refuse("a row number is outside the table");
  }
  py::array out = make(named(dtype), rows.size(), source.cols);
  run(any, [&](const auto& ctx, auto& operands) {
    gather_rows(ctx, operands.read(span_of(rows)), operands.read(source),
                operands.write(view(out)));
  });
  return out;
}

py::array bind_rms_norm(const AnyContext& any, const py::array& x, const Floats& weight, float eps,
                        const std::string& dtype) {
  const MutTensorView source = float_view(x);
  if (weight.size() != source.cols) refuse("weight is not as long as a row of x");
  py::array out = make(named(dtype), source.rows, source.cols);
  run(any, [&](const auto& ctx, auto& operands) {
    rms_norm(ctx, operands.read(source), operands.read(span_of(weight)).data(), eps,
             operands.write(view(out)));
  });
  return out;
}

// One to three row blocks [rows, depth], each with its bias or none.
Weight weight_of(const std::vector<py::array>& blocks,
                 const std::vector<std::optional<Floats>>& biases) {
  Weight weight;
  if (blocks.empty() || blocks.size() > weight.blocks.size())
    refuse("give one to three row blocks");
  weight.dtype = dtype_of(blocks.front());
  weight.depth = view(blocks.front()).cols;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const MutTensorView block = view(blocks[i]);
    if (block.cols != weight.depth || block.row_stride != block.cols ||
        block.dtype != weight.dtype) {
      refuse("the row blocks differ in depth or dtype, or are not contiguous");
    }
    const float* bias = i < biases.size() ? span_of(biases[i]).data() : nullptr;
    if (bias != nullptr && biases[i]->size() != block.rows) refuse("a bias has another length");
    weight.blocks[i] = {block.data, block.rows, bias};
  }
  return weight;
}

// A weight, and the memory of its panels if it is in panels.
struct Repacked {
  Memory memory;
  Weight weight;
};

Repacked in_layout(const AnyContext& any, const Weight& weight, const std::string& layout) {
  if (layout == "rows") return {{}, weight};
  if (layout != "panels" || !on_cpu(any)) refuse("layout \"" + layout + "\" is unknown here");
  const CpuContext& ctx = *std::get<const CpuContext*>(any);
  Memory memory = ctx.allocate_in_large_pages(repacked_bytes(weight), "repacked weights");
  const Weight repacked = repack(ctx, weight, static_cast<std::byte*>(memory.get()));
  return {std::move(memory), repacked};
}

// The panels [ceil(rows / 32), ceil(depth / pair), 32 pair] of one row block.
py::array bind_repack(const CpuContext& ctx, const py::array& block) {
  const Weight weight = weight_of({block}, {});
  const std::int64_t columns = kPanelOutputs * panel_depth(weight.dtype, 1);
  const std::int64_t bytes = static_cast<std::int64_t>(repacked_bytes(weight));
  py::array out =
      make(weight.dtype, bytes / (columns * static_cast<int>(size_of(weight.dtype))), columns);
  repack(ctx, weight, static_cast<std::byte*>(view(out).data));
  return out;
}

py::array bind_matmul(const AnyContext& any, const py::array& x,
                      const std::vector<py::array>& blocks,
                      const std::vector<std::optional<Floats>>& biases,
                      const std::string& out_dtype, const std::string& layout) {
  const Repacked repacked = in_layout(any, weight_of(blocks, biases), layout);
  const Weight& weight = repacked.weight;
  py::array out = make(named(out_dtype), view(x).rows, weight.outputs());
  run(any, [&](const auto& ctx, auto& operands) {
    matmul(ctx, operands.read(view(x)), operands.read(weight), operands.write(view(out)));
  });
  return out;
}

// The logits, and the largest of each block of them.
py::tuple bind_matmul_logits(const CpuContext& ctx, const py::array& x, const py::array& block,
                             const std::string& layout) {
  const Repacked repacked = in_layout(&ctx, weight_of({block}, {}), layout);
  const std::int64_t rows = view(x).rows, vocab = repacked.weight.outputs();
  const py::array out = make(DType::kFloat32, rows, vocab);
  const py::array maxima = make(DType::kFloat32, rows, logit_blocks(vocab));
  matmul_logits(ctx, view(x), repacked.weight, view(out), view(maxima));
  return py::make_tuple(out, maxima);
}

// The largest result of each row, and the output that has it.
py::tuple bind_matmul_largest(const CpuContext& ctx, const py::array& x, const py::array& block,
                              const std::string& layout) {
  const Repacked repacked = in_layout(&ctx, weight_of({block}, {}), layout);
  std::vector<Largest> largest(static_cast<std::size_t>(view(x).rows));
  matmul_largest(ctx, view(x), repacked.weight, largest);
  py::array_t<float> values(std::ssize(largest));
  py::array_t<std::int32_t> outputs(std::ssize(largest));
  for (std::size_t i = 0; i < largest.size(); ++i) {
    values.mutable_data()[i] = largest[i].value;
    outputs.mutable_data()[i] = largest[i].output;
  }
  return py::make_tuple(values, outputs);
}

// Seconds of each of `rounds` rounds, a product each, after one that warms up. The weights are
// `copies` different matrices used in turn, as in a model, so that no cache holds them all.
std::vector<double> time_matmul(const CpuContext& ctx, std::int64_t rows, std::int64_t outputs,
                                std::int64_t depth, std::int64_t copies, std::int64_t rounds,
                                const std::string& layout) {
  if (std::min({rows, outputs, depth, copies, rounds}) < 1) refuse("a size is less than 1");
  const BFloat16 one = to_bfloat16(1.0f);
  // x as a model has it, and the weights at no special address, as in a file.
  const std::int64_t x_stride = ctx.operand_stride(DType::kBFloat16, depth);
  const Memory x_memory = ctx.allocate(static_cast<std::size_t>(rows * x_stride) * sizeof(one));
  auto* x = static_cast<BFloat16*>(x_memory.get());
  std::fill_n(x, rows * x_stride, one);
  std::vector<BFloat16> values(static_cast<std::size_t>(copies * outputs * depth), one);
  std::vector<Repacked> weights;
  for (std::int64_t copy = 0; copy < copies; ++copy) {
    Weight weight;
    weight.blocks[0] = {values.data() + copy * outputs * depth, outputs, nullptr};
    weight.depth = depth;
    weights.push_back(in_layout(&ctx, weight, layout));
  }
  std::vector<float> out(static_cast<std::size_t>(rows * outputs));
  std::vector<double> seconds;
  for (std::int64_t round = -1; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (const Repacked& repacked : weights) {
      matmul(ctx, {x, DType::kBFloat16, rows, depth, x_stride}, repacked.weight,
             {out.data(), DType::kFloat32, rows, outputs, outputs});
    }
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    if (round >= 0) seconds.push_back(passed.count() / static_cast<double>(copies));
  }
  return seconds;
}

// Returns the new residual.
py::array bind_matmul_add(const AnyContext& any, const py::array& x,
                          const std::vector<py::array>& blocks, const Floats& residual,
                          const std::vector<std::optional<Floats>>& biases,
                          const std::string& layout) {
  const Repacked repacked = in_layout(any, weight_of(blocks, biases), layout);
  const Weight& weight = repacked.weight;
  py::array sum = py::array(residual).attr("copy")();
  run(any, [&](const auto& ctx, auto& operands) {
    matmul_add(ctx, operands.read(view(x)), operands.read(weight), operands.write(view(sum)));
  });
  return sum;
}

// `dtype`: of the rows that enter the product.
py::array bind_norm_matmul(const AnyContext& any, const py::array& x, const Floats& norm, float eps,
                           const std::vector<py::array>& blocks, const std::string& dtype,
                           const std::vector<std::optional<Floats>>& biases,
                           const std::string& out_dtype) {
  const MutTensorView source = float_view(x);
  const Weight weight = weight_of(blocks, biases);
  if (norm.size() != source.cols) refuse("norm is not as long as a row of x");
  const py::array normalized = make(named(dtype), source.rows, source.cols);
  py::array out = make(named(out_dtype), source.rows, weight.outputs());
  run(any, [&](const auto& ctx, auto& operands) {
    norm_matmul(ctx, operands.read(source), operands.read(span_of(norm)).data(), eps,
                operands.read(weight), operands.write(view(normalized)), operands.write(view(out)));
  });
  return out;
}

py::array bind_norm_swiglu(const AnyContext& any, const py::array& x, const Floats& norm, float eps,
                           const std::vector<py::array>& blocks, const std::string& dtype,
                           const std::vector<std::optional<Floats>>& biases,
                           const std::string& layout) {
  const MutTensorView source = float_view(x);
  const Repacked repacked = in_layout(any, weight_of(blocks, biases), layout);
  const Weight& weight = repacked.weight;
  if (norm.size() != source.cols) refuse("norm is not as long as a row of x");
  if (weight.outputs() % 2 != 0) refuse("the weight has an odd number of rows");
  const py::array normalized = make(named(dtype), source.rows, source.cols);
  const std::int64_t gate_up_rows = on_cpu(any) ? 0 : source.rows;
  const py::array gate_up = make(named(dtype), gate_up_rows, weight.outputs());
  py::array out = make(named(dtype), source.rows, weight.outputs() / 2);
  run(any, [&](const auto& ctx, auto& operands) {
    norm_swiglu(ctx, operands.read(source), operands.read(span_of(norm)).data(), eps,
                operands.read(weight), operands.write(view(normalized)),
                operands.write(view(gate_up)), operands.write(view(out)));
  });
  return out;
}

#if defined(TINYVLLM_HAS_CUDA)

// One of the four above, by a plan of the caller's choice: "store" and "add" take x as it is,
// "norm" and "swiglu" the float32 residual stream. Returns what was written.
py::array bind_matmul_by_plan(const CudaContext& ctx, const cuda::MatmulPlan& plan,
                              const std::string& use, const py::array& x,
                              const std::vector<py::array>& blocks,
                              const std::vector<std::optional<Floats>>& biases,
                              const std::optional<Floats>& norm, float eps,
                              const std::optional<Floats>& residual, const std::string& out_dtype) {
  const Weight weight = weight_of(blocks, biases);
  const bool normalises = use == "norm" || use == "swiglu";
  const bool swiglu = use == "swiglu", adds = use == "add";
  if (!normalises && !adds && use != "store") refuse("unknown use \"" + use + "\"");
  if (normalises != norm.has_value() || adds != residual.has_value()) {
    refuse("a norm goes with norm and swiglu, a residual with add");
  }
  const MutTensorView source = view(x);
  const py::array normalized = make(weight.dtype, source.rows, source.cols);
  const py::array gate_up = make(weight.dtype, source.rows, weight.outputs());
  py::array out = adds ? py::array(residual->attr("copy")())
                       : make(named(out_dtype), source.rows, weight.outputs() / (swiglu ? 2 : 1));

  Operands<CudaContext> operands(ctx);
  const Weight stacked = operands.read(weight);
  cuda::MatmulCall call;
  call.use = swiglu       ? cuda::MatmulUse::kNormSwiGlu
             : normalises ? cuda::MatmulUse::kNorm
             : adds       ? cuda::MatmulUse::kAdd
                          : cuda::MatmulUse::kStore;
  call.x = operands.read(source);
  call.weight = &stacked;
  call.out = operands.write(view(out));
  call.norm = operands.read(span_of(norm)).data();
  call.eps = eps;
  call.normalized = operands.write(view(normalized));
  call.gate_up = operands.write(view(gate_up));
  cuda::run(ctx, call, plan);
  operands.finish();
  return out;
}

#endif

py::array bind_silu_mul(const AnyContext& any, const py::array& gate_up, const std::string& dtype) {
  const MutTensorView source = product_view(any, gate_up);
  if (source.cols % 2 != 0) refuse("gate_up has an odd number of columns");
  py::array out = make(named(dtype), source.rows, source.cols / 2);
  run(any, [&](const auto& ctx, auto& operands) {
    silu_mul(ctx, operands.read(source), operands.write(view(out)));
  });
  return out;
}

py::array bind_rope_angles(const AnyContext& any, const Ints& positions, const Floats& frequencies,
                           float scale) {
  py::array out = make(DType::kFloat32, positions.size(), 2 * frequencies.size());
  run(any, [&](const auto& ctx, auto& operands) {
    rope_angles(ctx, operands.read(span_of(positions)), operands.read(span_of(frequencies)), scale,
                operands.write(view(out)));
  });
  return out;
}

// keys and values: [num_blocks, num_kv_heads, block_size, head_dim], written or read in place.
KvLayer kv_layer(py::array& keys, py::array& values) {
  if (keys.ndim() != 4 || values.ndim() != 4 || (keys.flags() & py::array::c_style) == 0) {
    refuse(
        "keys and values are contiguous arrays [num_blocks, num_kv_heads, block_size, head_dim]");
  }
  const bool alike = std::equal(keys.shape(), keys.shape() + 4, values.shape()) &&
                     dtype_of(keys) == dtype_of(values) &&
                     (values.flags() & py::array::c_style) != 0;
  if (!alike || keys.size() == 0) refuse("keys and values differ in shape or dtype, or are empty");
  return {keys.mutable_data(), values.mutable_data(),
          KvShape{.num_layers = 1,
                  .num_blocks = keys.shape(0),
                  .block_size = keys.shape(2),
                  .num_kv_heads = keys.shape(1),
                  .head_dim = keys.shape(3),
                  .dtype = dtype_of(keys)}};
}

// Returns the new qkv; writes into keys and values.
py::array bind_qk_norm_rope_and_cache(const AnyContext& any, const py::array& qkv,
                                      std::int64_t num_heads, const std::optional<Floats>& q_norm,
                                      const std::optional<Floats>& k_norm, float eps,
                                      const Floats& cos_sin, const Longs& slots, py::array keys,
                                      py::array values) {
  py::array result = qkv.attr("copy")();
  product_view(any, result);
  const KvLayer cache = kv_layer(keys, values);
  const std::int64_t width = (num_heads + 2 * cache.shape.num_kv_heads) * cache.shape.head_dim;
  const MutTensorView angles = view(cos_sin);
  if (view(result).cols != width || slots.size() != view(result).rows ||
      angles.rows != slots.size() || angles.cols != cache.shape.head_dim || angles.cols % 2 != 0) {
    refuse("shapes do not fit");
  }
  for (const auto& norm : {q_norm, k_norm}) {
    if (norm && norm->size() != cache.shape.head_dim) refuse("a norm is not as long as a head");
  }
  for (const std::int64_t slot : span_of(slots)) {
    const std::int64_t lowest = on_cpu(any) ? 0 : -1;
    if (slot < lowest || slot >= cache.shape.num_blocks * cache.shape.block_size)
      refuse("a slot is outside");
  }
  run(any, [&](const auto& ctx, auto& operands) {
    qk_norm_rope_and_cache(ctx, operands.write(view(result)), num_heads,
                           operands.read(span_of(q_norm)).data(),
                           operands.read(span_of(k_norm)).data(), eps, operands.read(angles),
                           operands.read(span_of(slots)), operands.write(cache));
  });
  return result;
}

using Sequences = std::vector<std::tuple<std::int64_t, std::int64_t, std::vector<std::int32_t>>>;

// sequences: (first_position, num_tokens, block table) of each, in the order of the rows of q, which
// may be followed by k and v. On CUDA, (-1, 1, []) is a padded row.
AttentionCall attention_call(const AnyContext& any, const py::array& q, py::array& keys,
                             py::array& values, const Sequences& sequences, std::int64_t num_heads,
                             std::int64_t window, float scale, const std::string& dtype,
                             bool as_chunks) {
  AttentionCall call{.queries = product_view(any, q),
                     .cache = kv_layer(keys, values),
                     .sequences = {},
                     .table_sizes = {},
                     .num_heads = num_heads,
                     .window = window,
                     .scale = scale,
                     .as_chunks = as_chunks};
  const KvShape& shape = call.cache.shape;
  if (num_heads < 1 || num_heads % shape.num_kv_heads != 0) {
    refuse("num_heads is not a multiple of the KV heads");
  }
  if (!on_cpu(any) && (call.queries.dtype != shape.dtype || named(dtype) != shape.dtype)) {
    refuse("q, the cache and the result differ in dtype");
  }
  std::int64_t first_token = 0;
  for (const auto& [first_position, num_tokens, table] : sequences) {
    const std::int64_t covered = static_cast<std::int64_t>(table.size()) * shape.block_size;
    if (first_position < (on_cpu(any) ? 0 : -1) || num_tokens < 0) refuse("a position is negative");
    if (first_position + num_tokens > covered) refuse("a block table is too short");
    for (const std::int32_t block : table) {
      if (block < 0 || block >= shape.num_blocks) refuse("a block is outside the pool");
    }
    call.sequences.push_back({first_token, num_tokens, first_position, table.data()});
    call.table_sizes.push_back(std::ssize(table));
    first_token += num_tokens;
  }
  if (first_token != call.queries.rows) refuse("the sequences do not cover the rows of q");
  return call;
}

py::array bind_paged_attention(const AnyContext& any, const py::array& q, py::array keys,
                               py::array values, const Sequences& sequences, std::int64_t num_heads,
                               std::int64_t window, float scale, const std::string& dtype,
                               bool as_chunks) {
  const AttentionCall call =
      attention_call(any, q, keys, values, sequences, num_heads, window, scale, dtype, as_chunks);
  const std::int64_t width = num_heads * call.cache.shape.head_dim;
  if (call.queries.cols != width) refuse("q is not [tokens, num_heads * head_dim]");
  py::array out = make(named(dtype), call.queries.rows, width);
  run(any, [&](const auto& ctx, auto& operands) {
    paged_attention(ctx, operands.read(call.queries), operands.write(call.cache),
                    sequences_for(operands, call), num_heads, window, scale,
                    operands.write(view(out)));
  });
  return out;
}

// Writes into keys and values.
py::array bind_rope_and_attend(const AnyContext& any, const py::array& qkv, std::int64_t num_heads,
                               const std::optional<Floats>& q_norm,
                               const std::optional<Floats>& k_norm, float eps,
                               const Floats& cos_sin, const Longs& slots, py::array keys,
                               py::array values, const Sequences& sequences, std::int64_t window,
                               float scale, const std::string& dtype) {
  py::array rows = qkv.attr("copy")();
  const AttentionCall call = attention_call(any, rows, keys, values, sequences, num_heads, window,
                                            scale, dtype, /*as_chunks=*/false);
  const KvShape& shape = call.cache.shape;
  const MutTensorView angles = view(cos_sin);
  if (call.queries.cols != (num_heads + 2 * shape.num_kv_heads) * shape.head_dim ||
      angles.rows != call.queries.rows || angles.cols != shape.head_dim ||
      slots.size() != call.queries.rows) {
    refuse("shapes do not fit");
  }
  for (const auto& norm : {q_norm, k_norm}) {
    if (norm && norm->size() != shape.head_dim) refuse("a norm is not as long as a head");
  }
  py::array out = make(named(dtype), call.queries.rows, num_heads * shape.head_dim);
  run(any, [&](const auto& ctx, auto& operands) {
    rope_and_attend(ctx, operands.write(view(rows)), num_heads,
                    operands.read(span_of(q_norm)).data(), operands.read(span_of(k_norm)).data(),
                    eps, operands.read(angles), operands.read(span_of(slots)),
                    operands.write(call.cache), sequences_for(operands, call), window, scale,
                    operands.write(view(out)));
  });
  return out;
}

// pool: [num_layers, K and V, num_blocks, num_kv_heads, block_size, head_dim]. Returns the new pool.
py::array bind_copy_blocks(const AnyContext& any, const py::array& pool,
                           const std::vector<std::pair<std::int32_t, std::int32_t>>& copies) {
  py::array result = pool.attr("copy")();
  if (pool.ndim() != 6 || pool.shape(1) != 2) {
    refuse("pool is not [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]");
  }
  const KvShape shape{.num_layers = pool.shape(0),
                      .num_blocks = pool.shape(2),
                      .block_size = pool.shape(4),
                      .num_kv_heads = pool.shape(3),
                      .head_dim = pool.shape(5),
                      .dtype = dtype_of(pool)};
  std::vector<BlockCopy> blocks;
  for (const auto& [from, to] : copies) {
    const auto inside = [&](std::int32_t block) {
      return block < shape.num_blocks && (block >= 0 || (block == -1 && !on_cpu(any)));
    };
    if (!inside(from) || !inside(to)) refuse("a block is outside the pool");
    blocks.push_back({from, to});
  }
  run(any, [&](const auto& ctx, auto& operands) {
    const MutTensorView whole{result.mutable_data(), shape.dtype, 1, pool.size(), pool.size()};
    const auto leave = [](void*, std::size_t) {};
    const KvCache cache(shape, Memory(operands.write(whole).data, FreeMemory{leave, 0}));
    copy_blocks(ctx, cache, operands.read(std::span<const BlockCopy>(blocks)));
  });
  return result;
}

}  // namespace

void bind_ops(py::module_& module) {
  py::class_<CpuContext>(module, "CpuContext", "Threads and kernels for the ops on the CPU.")
      .def(py::init<int, const std::string&>(), py::arg("num_threads") = 0, py::arg("isa") = "")
      .def_property_readonly("num_threads", &CpuContext::num_threads)
      .def_property_readonly("isa", [](const CpuContext& ctx) { return ctx.kernels().isa; })
      .def(
          "parallel_for",
          [](const CpuContext& ctx, std::int64_t count, const py::function& call) {
            const py::gil_scoped_release release;
            ctx.parallel_for(count, [&](std::int64_t index, int worker) {
              const py::gil_scoped_acquire acquire;
              call(index, worker);
            });
          },
          py::arg("count"), py::arg("call"), "Calls call(index, worker) once for each index.");

  module.def(
      "measure_read_bandwidth",
      [](const CpuContext& ctx, double seconds,
         const std::optional<py::array_t<std::uint8_t, py::array::c_style>>& memory) {
        if (!memory) {
          const py::gil_scoped_release release;
          return measure_read_bandwidth(ctx, seconds);
        }
        const std::span bytes(memory->data(), static_cast<std::size_t>(memory->size()));
        const py::gil_scoped_release release;
        return measure_read_bandwidth(ctx, std::as_bytes(bytes), seconds);
      },
      py::arg("ctx"), py::arg("seconds") = 0.5, py::arg("memory").noconvert() = py::none(),
      "Bytes a second that the threads of ctx read from memory: this one, or 1 GiB of its own.");
  module.def("measure_arithmetic", &measure_arithmetic, py::arg("ctx"), py::arg("seconds") = 0.2,
             py::call_guard<py::gil_scoped_release>(),
             "Floating-point operations a second of the bfloat16 kernels of ctx, from registers.");
  module.def("time_matmul", &time_matmul, py::arg("ctx"), py::arg("rows"), py::arg("outputs"),
             py::arg("depth"), py::arg("copies") = 1, py::arg("rounds") = 5,
             py::arg("layout") = "rows", py::call_guard<py::gil_scoped_release>(),
             "Seconds of one bfloat16 matmul [rows, depth] x [outputs, depth], a value a round.");

  py::module_ ops = module.def_submodule("ops", "The ops of the engine on NumPy arrays.");
  ops.def("gather_rows", &bind_gather_rows, py::arg("ctx"), py::arg("rows"), py::arg("table"),
          py::arg("dtype") = "float32");
  ops.def("rms_norm", &bind_rms_norm, py::arg("ctx"), py::arg("x"), py::arg("weight"),
          py::arg("eps"), py::arg("dtype") = "float32");
  ops.def("matmul", &bind_matmul, py::arg("ctx"), py::arg("x"), py::arg("blocks"),
          py::arg("biases") = std::vector<std::optional<Floats>>(),
          py::arg("out_dtype") = "float32", py::arg("layout") = "rows");
  ops.def("matmul_logits", &bind_matmul_logits, py::arg("ctx"), py::arg("x"), py::arg("block"),
          py::arg("layout") = "rows");
  ops.def("matmul_largest", &bind_matmul_largest, py::arg("ctx"), py::arg("x"), py::arg("block"),
          py::arg("layout") = "rows");
  ops.def("repack", &bind_repack, py::arg("ctx"), py::arg("block"));
  ops.def("matmul_add", &bind_matmul_add, py::arg("ctx"), py::arg("x"), py::arg("blocks"),
          py::arg("residual"), py::arg("biases") = std::vector<std::optional<Floats>>(),
          py::arg("layout") = "rows");
  ops.def("norm_matmul", &bind_norm_matmul, py::arg("ctx"), py::arg("x"), py::arg("norm"),
          py::arg("eps"), py::arg("blocks"), py::arg("dtype") = "float32",
          py::arg("biases") = std::vector<std::optional<Floats>>(),
          py::arg("out_dtype") = "float32");
  ops.def("norm_swiglu", &bind_norm_swiglu, py::arg("ctx"), py::arg("x"), py::arg("norm"),
          py::arg("eps"), py::arg("blocks"), py::arg("dtype") = "float32",
          py::arg("biases") = std::vector<std::optional<Floats>>(), py::arg("layout") = "rows");
#if defined(TINYVLLM_HAS_CUDA)
  ops.def("matmul_by_plan", &bind_matmul_by_plan, py::arg("ctx"), py::arg("plan"), py::arg("use"),
          py::arg("x"), py::arg("blocks"), py::arg("biases") = std::vector<std::optional<Floats>>(),
          py::arg("norm") = py::none(), py::arg("eps") = 0.0f, py::arg("residual") = py::none(),
          py::arg("out_dtype") = "float32");
#endif
  ops.def("silu_mul", &bind_silu_mul, py::arg("ctx"), py::arg("gate_up"),
          py::arg("dtype") = "float32");
  ops.def("rope_angles", &bind_rope_angles, py::arg("ctx"), py::arg("positions"),
          py::arg("inverse_frequencies"), py::arg("scale") = 1.0f);
  ops.def("qk_norm_rope_and_cache", &bind_qk_norm_rope_and_cache, py::arg("ctx"), py::arg("qkv"),
          py::arg("num_heads"), py::arg("q_norm"), py::arg("k_norm"), py::arg("eps"),
          py::arg("cos_sin"), py::arg("slots"), py::arg("keys"), py::arg("values"));
  ops.def("copy_blocks", &bind_copy_blocks, py::arg("ctx"), py::arg("pool"), py::arg("copies"));
  ops.def("rope_and_attend", &bind_rope_and_attend, py::arg("ctx"), py::arg("qkv"),
          py::arg("num_heads"), py::arg("q_norm"), py::arg("k_norm"), py::arg("eps"),
          py::arg("cos_sin"), py::arg("slots"), py::arg("keys"), py::arg("values"),
          py::arg("sequences"), py::arg("window"), py::arg("scale"), py::arg("dtype"));
  ops.def("paged_attention", &bind_paged_attention, py::arg("ctx"), py::arg("q"), py::arg("keys"),
          py::arg("values"), py::arg("sequences"), py::arg("num_heads"), py::arg("window") = 0,
          py::arg("scale") = 1.0f, py::arg("dtype") = "float32", py::arg("as_chunks") = false);
}

}  // namespace tinyvllm

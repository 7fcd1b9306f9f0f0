// The arrays of one call of an op, where the op can reach them: on the CPU they stay where they are,
// for CUDA they are copied to the device, and what the op writes is copied back.
//
//   Operands<Context> operands(ctx);
//   rms_norm(ctx, operands.read(x), operands.read(weight).data(), eps, operands.write(out));
//   operands.finish();
#pragma once

#include <span>
#include <variant>

#include "base/tensor.h"
#include "ops/cpu_context.h"
#include "ops/kv_cache.h"
#include "ops/matmul.h"
#if defined(TINYVLLM_HAS_CUDA)
#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "cuda/context.h"
#include "cuda/memory.h"
#endif

namespace tinyvllm {

template <typename Context>
class Operands;

template <>
class Operands<CpuContext> {
 public:
  explicit Operands(const CpuContext& /*ctx*/) {}

  TensorView read(TensorView view) { return view; }
  template <typename T>
  std::span<const T> read(std::span<const T> values) {
    return values;
  }
  const Weight& read(const Weight& weight) { return weight; }
  MutTensorView write(MutTensorView view) { return view; }
  KvLayer write(const KvLayer& layer) { return layer; }
  void finish() {}
};

#if defined(TINYVLLM_HAS_CUDA)

// A copy lies at an address that is as aligned as the original's, up to 256 bytes, and what lies
// between its rows is NaN bytes: an op that takes either for granted is found out.
template <>
class Operands<CudaContext> {
 public:
  explicit Operands(const CudaContext& ctx) : ctx_(ctx) {}
  // An op that throws leaves copies behind that have not run yet and read from here.
  ~Operands() {
    try {
      ctx_.synchronize();
    } catch (...) {  // the op's own error is on its way already
    }
  }
  Operands(const Operands&) = delete;
  Operands& operator=(const Operands&) = delete;

  TensorView read(TensorView view) {
    view.data = upload(view);
    return view;
  }
  template <typename T>
  std::span<const T> read(std::span<const T> values) {
    if (values.empty()) return values;
    return {reinterpret_cast<const T*>(upload(values.data(), values.size_bytes(), 1, 0)),
            values.size()};
  }
  // The row blocks side by side, as CUDA wants them; zeros for the biases that are absent if one is
  // not.
  Weight read(const Weight& weight) {
    const std::size_t row_bytes = static_cast<std::size_t>(weight.depth) * size_of(weight.dtype);
    const auto outputs = static_cast<std::size_t>(weight.outputs());
    Weight stacked;
    stacked.depth = weight.depth;
    stacked.dtype = weight.dtype;
    RowBlock& whole = stacked.blocks[0];
    whole.rows = weight.outputs();
    if (weight.blocks[0].rows == whole.rows) {
      whole.data = upload(weight.blocks[0].data, row_bytes, outputs, row_bytes);
    } else {
      std::vector<std::byte> rows;
      for (const RowBlock& block : weight.blocks) {
        const auto* data = static_cast<const std::byte*>(block.data);
        rows.insert(rows.end(), data, data + static_cast<std::size_t>(block.rows) * row_bytes);
      }
      whole.data = upload(rows.data(), rows.size(), 1, 0);
    }
    std::vector<float> bias(outputs);
    std::size_t first = 0;
    for (const RowBlock& block : weight.blocks) {
      if (block.bias != nullptr) {
        std::copy_n(block.bias, block.rows, bias.begin() + static_cast<std::ptrdiff_t>(first));
        whole.bias = bias.data();
      }
      first += static_cast<std::size_t>(block.rows);
    }
    if (whole.bias != nullptr) whole.bias = read(std::span<const float>(bias)).data();
    return stacked;
  }
  // With what lies in it now, too.
  MutTensorView write(MutTensorView view) {
    std::byte* host = static_cast<std::byte*>(view.data);
    view.data = upload(view);
    if (view.data != nullptr) written_.push_back({host, &copies_.back()});
    return view;
  }
  KvLayer write(const KvLayer& layer) {
    const KvShape& shape = layer.shape;
    const std::int64_t size = shape.block_stride() * shape.num_blocks;
    const auto write_one = [&](void* data) {
      return write(MutTensorView{data, shape.dtype, 1, size, size}).data;
    };
    void* keys = write_one(layer.keys);
    return {keys, write_one(layer.values), shape};
  }

  // Waits for the op and brings back what it wrote.
  void finish() {
    for (const auto& [host, copy] : written_) {
      cuda::copy_to_host(ctx_, copy->bytes.data(), copy->start, copy->bytes.size());
    }
    ctx_.synchronize();
    for (const auto& [host, copy] : written_) {
      for (std::size_t row = 0; row < copy->rows; ++row) {
        std::memcpy(host + row * copy->stride, copy->bytes.data() + row * copy->stride,
                    copy->row_bytes);
      }
    }
  }

 private:
  struct Copy {
    cuda::DeviceMemory memory;
    std::byte* start;
    std::size_t row_bytes, rows, stride;
    std::vector<std::byte>
        bytes;  // from the first to the last element; lives until they are copied
  };
  struct Written {
    std::byte* host;
    Copy* copy;
  };

  std::byte* upload(TensorView view) {
    const std::size_t size = size_of(view.dtype);
    return upload(view.data, static_cast<std::size_t>(view.cols) * size,
                  static_cast<std::size_t>(view.rows),
                  static_cast<std::size_t>(view.row_stride) * size);
  }

  std::byte* upload(const void* data, std::size_t row_bytes, std::size_t rows, std::size_t stride) {
    if (rows == 0 || row_bytes == 0) return nullptr;
    constexpr std::size_t kAlignment = 256;
    const std::size_t offset = reinterpret_cast<std::uintptr_t>(data) % kAlignment;
    Copy copy{{}, nullptr, row_bytes, rows, stride, {}};
    copy.bytes.assign((rows - 1) * stride + row_bytes, std::byte{0xff});
    for (std::size_t row = 0; row < rows; ++row) {
      std::memcpy(copy.bytes.data() + row * stride,
                  static_cast<const std::byte*>(data) + row * stride, row_bytes);
    }
    copy.memory = cuda::DeviceMemory(offset + copy.bytes.size(), "an operand");
    copy.start = copy.memory.data() + offset;
    copies_.push_back(std::move(copy));
    Copy& kept = copies_.back();
    cuda::copy_to_device(ctx_, kept.start, kept.bytes.data(), kept.bytes.size());
    return kept.start;
  }

  const CudaContext& ctx_;
  std::deque<Copy> copies_;  // its elements stay where they are
  std::vector<Written> written_;
};

using AnyContext = std::variant<const CpuContext*, const CudaContext*>;
#else
using AnyContext = std::variant<const CpuContext*>;
#endif

// Calls op(ctx, operands) for the device of the context, and waits for the results.
template <typename Op>
void run(const AnyContext& any, Op&& op) {
  std::visit(
      [&]<typename Context>(const Context* ctx) {
        Operands<Context> operands(*ctx);
        op(*ctx, operands);
        operands.finish();
      },
      any);
}

inline bool on_cpu(const AnyContext& any) { return std::holds_alternative<const CpuContext*>(any); }

}  // namespace tinyvllm

// Views of tensors that somebody else owns: pointer, dtype, shape, and the distance between rows.
//
// Every tensor of the forward pass is a matrix [rows, cols] or a vector [cols] (rows = 1). The
// elements of a row are contiguous; rows may lie further apart (a slice of columns of a wider
// matrix).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/bfloat16.h"
#include "base/dtype.h"

namespace tinyvllm {

struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;  // in elements

  template <typename T>
  const T* row(std::int64_t index) const {
    return static_cast<const T*>(data) + index * row_stride;
  }
};

struct MutTensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;  // in elements

  template <typename T>
  T* row(std::int64_t index) const {
    return static_cast<T*>(data) + index * row_stride;
  }

  operator TensorView() const { return {data, dtype, rows, cols, row_stride}; }
};

inline TensorView columns(TensorView view, std::int64_t first, std::int64_t count) {
  const auto* bytes = static_cast<const std::byte*>(view.data);
  return {bytes + first * static_cast<std::int64_t>(size_of(view.dtype)), view.dtype, view.rows,
          count, view.row_stride};
}

inline MutTensorView columns(MutTensorView view, std::int64_t first, std::int64_t count) {
  auto* bytes = static_cast<std::byte*>(view.data);
  return {bytes + first * static_cast<std::int64_t>(size_of(view.dtype)), view.dtype, view.rows,
          count, view.row_stride};
}

inline MutTensorView first_rows(MutTensorView view, std::int64_t count) {
  return {view.data, view.dtype, count, view.cols, view.row_stride};
}

}  // namespace tinyvllm

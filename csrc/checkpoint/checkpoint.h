// A Hugging Face checkpoint directory: config.json, and model.safetensors or the shards that
// model.safetensors.index.json lists.
//
// Parse, don't validate: Checkpoint::open returns something wholly sound or throws. Afterwards the
// one thing that can go wrong is that a file changes underneath; any_file_failed() and
// check_files() say so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/mapped_file.h"
#include "checkpoint/model_config.h"
#include "checkpoint/safetensors.h"

namespace tinyvllm {

// A tensor where it lies in its file. `data` may be aligned to nothing at all: whoever builds
// weights from it (model/weights.cpp) copies a tensor whose address is not a multiple of its
// element size.
struct CheckpointTensor {
  DType dtype;
  std::vector<std::int64_t> shape;
  const std::byte* data;
  std::size_t num_bytes;
  const MappedFile* file;  // lives as long as the Checkpoint and its copies
};

class Checkpoint {
 public:
  // Maps every file and checks every header; reads no weight. Throws CheckpointError if a file is
  // missing or damaged, UnsupportedModelError for what this engine does not implement (pickled
  // weights, GGUF, quantised weights, other architectures).
  static Checkpoint open(const std::filesystem::path& directory);

  const ModelConfig& config() const { return config_; }
  bool contains(std::string_view name) const { return tensors_.contains(name); }

  // Throws CheckpointError if the tensor is absent or has another shape, UnsupportedModelError if
  // its dtype is not F32, F16 or BF16. `hint` is one more sentence for the message of an absent
  // tensor.
  CheckpointTensor tensor(std::string_view name, std::span<const std::int64_t> expected_shape,
                          std::string_view hint = {}) const;

  // The tensor as the file describes it, of any dtype and shape. Throws CheckpointError if it is
  // absent.
  const TensorInfo& info(std::string_view name, std::string_view hint = {}) const;

  std::vector<std::string> names() const;  // sorted

  // The dtype of most elements among the F32, F16 and BF16 tensors: what dtype=auto looks at.
  DType dtype() const { return dtype_; }

  // What is odd but harmless, one line each, for the front end to print.
  const std::vector<std::string>& warnings() const { return warnings_; }

  // See MappedFile, for a range inside one of the files; of any other memory, they do nothing.
  void populate_pages(const void* data, std::size_t bytes) const noexcept;
  void release_pages(const void* data, std::size_t bytes) const noexcept;

  // True once a page of any file could not be read. One atomic load a file; for use after every
  // step.
  bool any_file_failed() const noexcept;

  // Compares every file with its state when it was opened; throws CheckpointError. For use after
  // loading and on any failure.
  void check_files() const;

 private:
  Checkpoint() = default;
  const MappedFile* file_of(const void* data) const noexcept;  // null: of none
  void add_file(const std::filesystem::path& path);
  void open_shards(const std::filesystem::path& index);
  void choose_dtype();

  std::filesystem::path directory_;
  ModelConfig config_;
  std::vector<std::shared_ptr<const MappedFile>> files_;
  std::map<std::string, TensorInfo, std::less<>> tensors_;
  DType dtype_ = DType::kFloat32;
  std::vector<std::string> warnings_;
};

}  // namespace tinyvllm

// One safetensors file: 8 bytes of header length (little endian), a JSON header, the tensors'
// bytes.
//
//   {"__metadata__": {"format": "pt"},
//    "lm_head.weight": {"dtype": "BF16", "shape": [32000, 2048], "data_offsets": [0, 131072000]},
//    ...}
//
// Offsets count from the end of the header. The tensors must cover that area exactly: no gap, no
// overlap, no byte left over. Nothing in the file is trusted: open_safetensors either returns a
// file in which every pointer and size is sound, or throws CheckpointError with the file, the
// tensor and the numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/mapped_file.h"

namespace tinyvllm {

inline constexpr std::size_t kMaxHeaderBytes =
    100'000'000;  // as the reference implementation has it
inline constexpr std::size_t kMaxTensorsPerFile = 100'000;
inline constexpr std::size_t kMaxDimensions = 32;

struct TensorInfo {
  std::string name;
  std::string
      dtype;  // as the file spells it: F32, F16, BF16, or one that this engine only knows by name
  std::vector<std::int64_t> shape;  // empty: a scalar; a 0 in it: no elements
  const std::byte* data;            // inside the mapping; the format does NOT promise any alignment
  std::size_t num_bytes;
  const MappedFile* file;
};

struct SafetensorsFile {
  std::shared_ptr<const MappedFile> file;
  std::vector<TensorInfo> tensors;  // in the order of their bytes; no two have the same name
};

std::string shape_text(std::span<const std::int64_t> shape);  // "[8192, 2048]", for messages

SafetensorsFile open_safetensors(const std::filesystem::path& path);

}  // namespace tinyvllm

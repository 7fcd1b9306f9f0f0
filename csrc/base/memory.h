// A piece of memory with an owner, on whatever device. It has no type: views (tensor.h) say what
// lies there.
#pragma once

#include <cstddef>
#include <memory>

namespace tinyvllm {

struct FreeMemory {
  void (*release)(void* memory, std::size_t bytes) = nullptr;
  std::size_t bytes = 0;

  void operator()(void* memory) const { release(memory, bytes); }
};

using Memory = std::unique_ptr<void, FreeMemory>;

}  // namespace tinyvllm

// Memory of the GPU, and memory of the host that the GPU can reach, each with one owner.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/memory.h"
#include "cuda/context.h"

namespace tinyvllm::cuda {

struct MemoryInfo {
  std::size_t free, total;  // bytes, as the driver counts them now
};
MemoryInfo memory_info();

// Device memory, aligned to 256 bytes, with anything in it. Freed by the destructor, which waits for
// the device.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  // Throws CapacityError with `purpose`, the bytes and what is free: "the KV cache".
  DeviceMemory(std::size_t bytes, const char* purpose);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

  // Hands it to an owner that does not know CUDA.
  Memory release();

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Host memory that stays where it is, so that copies to and from the device run on their own and at
// full speed.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(std::size_t bytes, const char* purpose);  // throws CapacityError
  ~PinnedMemory();
  PinnedMemory(PinnedMemory&& other) noexcept;
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Queued in the context's stream. The memory on both sides, the host's too, stays as it is until the
// copy has run: until ctx.synchronize(), or an event behind it.
void copy_to_device(const CudaContext& ctx, void* device, const void* host, std::size_t bytes);
void copy_to_device(CUstream_st* stream, void* device, const void* host, std::size_t bytes);
void copy_to_host(const CudaContext& ctx, void* host, const void* device, std::size_t bytes);
void copy_on_device(const CudaContext& ctx, void* to, const void* from, std::size_t bytes);
void fill_bytes(const CudaContext& ctx, void* device, int value, std::size_t bytes);

}  // namespace tinyvllm::cuda

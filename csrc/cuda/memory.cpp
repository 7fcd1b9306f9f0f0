#include "cuda/memory.h"

#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "base/errors.h"
#include "cuda/error.h"

namespace tinyvllm::cuda {

MemoryInfo memory_info() {
  MemoryInfo info{};
  check(cudaMemGetInfo(&info.free, &info.total), "asking for the free memory");
  return info;
}

DeviceMemory::DeviceMemory(std::size_t bytes, const char* purpose) : size_(bytes) {
  if (bytes == 0) return;
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // forget it: the device is as usable as before
    const MemoryInfo info = memory_info();
    throw CapacityError(
        "The GPU has no room for " + std::string(purpose) + ": " + std::to_string(bytes) +
        " bytes are needed, " + std::to_string(info.free) + " of " + std::to_string(info.total) +
        " are free. Lower gpu_memory_utilization, max_model_len or max_num_seqs, or "
        "end other programs on the GPU.");
  }
  check(error, "allocating device memory");
  data_ = static_cast<std::byte*>(memory);
}

DeviceMemory::~DeviceMemory() { cudaFree(data_); }

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

Memory DeviceMemory::release() {
  const auto free = [](void* memory, std::size_t) { cudaFree(memory); };
  return {std::exchange(data_, nullptr), {free, std::exchange(size_, 0)}};
}

PinnedMemory::PinnedMemory(std::size_t bytes, const char* purpose) : size_(bytes) {
  if (bytes == 0) return;
  void* memory = nullptr;
  const cudaError_t error = cudaHostAlloc(&memory, bytes, cudaHostAllocDefault);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw CapacityError("Cannot pin " + std::to_string(bytes) + " bytes of host memory for " +
                        std::string(purpose) + ". Free memory of the machine, or raise its limit.");
  }
  check(error, "allocating pinned memory");
  data_ = static_cast<std::byte*>(memory);
}

PinnedMemory::~PinnedMemory() { cudaFreeHost(data_); }

PinnedMemory::PinnedMemory(PinnedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

namespace {

void copy(CUstream_st* stream, void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  check(cudaMemcpyAsync(to, from, bytes, kind, stream), "copying");
}

}  // namespace

void copy_to_device(const CudaContext& ctx, void* device, const void* host, std::size_t bytes) {
  copy_to_device(ctx.stream(), device, host, bytes);
}

void copy_to_device(CUstream_st* stream, void* device, const void* host, std::size_t bytes) {
  copy(stream, device, host, bytes, cudaMemcpyHostToDevice);
}

void copy_to_host(const CudaContext& ctx, void* host, const void* device, std::size_t bytes) {
  copy(ctx.stream(), host, device, bytes, cudaMemcpyDeviceToHost);
}

void copy_on_device(const CudaContext& ctx, void* to, const void* from, std::size_t bytes) {
  copy(ctx.stream(), to, from, bytes, cudaMemcpyDeviceToDevice);
}

void fill_bytes(const CudaContext& ctx, void* device, int value, std::size_t bytes) {
  check(cudaMemsetAsync(device, value, bytes, ctx.stream()), "filling device memory");
}

}  // namespace tinyvllm::cuda

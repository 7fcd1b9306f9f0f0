// Arrays of a step that lie side by side: written into pinned memory of the host, and sent in one
// copy to where they lie on the device. The steps in flight have a place each on the host, because a
// copy runs later than it is queued, and share the one on the device, where a step's arrays are
// overwritten only after it has run. In front of them is their length, for ops/host_copy.h.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/errors.h"
#include "cuda/memory.h"

namespace tinyvllm {

inline constexpr std::size_t kStepsInFlight = 2;

class StepInputs {
 public:
  template <typename T>
  struct Array {
    T* host = nullptr;
    T* device = nullptr;
  };

  explicit StepInputs(std::size_t bytes, const char* purpose) : purpose_(purpose) {
    allocate(bytes);
  }

  // The next step's arrays, up to three of them, of at most so many bytes together; 0: what was
  // allocated at the start suffices. It grows where it must, which moves it
  // on the device; what a graph reads has been made large enough at the start.
  void begin(const CudaContext& ctx, std::size_t step, std::size_t bytes) {
    bytes += 4 * kWord;  // the length, and what the arrays are rounded up by
    if (bytes > device_.size()) {
      ctx.synchronize();
      allocate(2 * bytes);
    }
    host_base_ = host_[step % kStepsInFlight].data();
    used_ = kWord;
  }

  // The next array, aligned to 16 bytes. Arrays that are added in the same order and with the same
  // sizes lie at the same addresses.
  template <typename T>
  Array<T> add(std::int64_t count) {
    const std::size_t first = used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + kWord - 1) / kWord * kWord;
    if (used_ > device_.size()) {
      throw Error("The arrays of a step take " + std::to_string(used_) +
                  " bytes, there is room for " + std::to_string(device_.size()) + " (" + purpose_ +
                  ").");
    }
    *reinterpret_cast<std::uint32_t*>(host_base_) = static_cast<std::uint32_t>(used_ / kWord);
    return {reinterpret_cast<T*>(host_base_ + first), reinterpret_cast<T*>(device_.data() + first)};
  }

  // All of them with their length, as they lie; aligned to 16 bytes.
  const std::byte* host() const { return host_base_; }
  std::byte* device() const { return device_.data(); }
  std::size_t bytes() const { return used_; }

  void send(const CudaContext& ctx) const {
    cuda::copy_to_device(ctx, device_.data(), host_base_, used_);
  }

 private:
  static constexpr std::size_t kWord = 16;

  void allocate(std::size_t bytes) {
    bytes = (bytes + kWord - 1) / kWord * kWord;
    device_ = cuda::DeviceMemory(bytes, purpose_);
    for (auto& host : host_) host = cuda::PinnedMemory(bytes, purpose_);
  }

  const char* const purpose_;
  cuda::DeviceMemory device_;
  std::array<cuda::PinnedMemory, kStepsInFlight> host_;
  std::byte* host_base_ = nullptr;
  std::size_t used_ = 0;
};

}  // namespace tinyvllm

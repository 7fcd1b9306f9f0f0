// Arrays of a step that lie side by side: written into pinned memory of the host, and sent in one
// copy to where they lie on the device. The copy goes through a stream of its own, while the step
// before still computes: in the context's stream it would take 10 us between two steps (measured on
// an H200). So each step in flight has a place of its own on either side, which is free again when
// the step has been collected.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/errors.h"
#include "cuda/memory.h"
#include "cuda/stream.h"

namespace tinyvllm {

inline constexpr std::size_t kStepsInFlight = 2;

class StepInputs {
 public:
  template <typename T>
  struct Array {
    T* host = nullptr;
    T* device = nullptr;
  };

  // The context and the stream of the copies outlive it.
  StepInputs(const CudaContext& ctx, const cuda::Stream& copies, std::size_t bytes,
             const char* purpose)
      : ctx_(ctx), copies_(copies), purpose_(purpose) {
    allocate(bytes);
  }

  // The next step's arrays, of at most so many bytes together. It grows where it must, which moves it
  // on the device; what a graph reads has been made large enough at the start.
  void begin(std::size_t step, std::size_t bytes) {
    if (bytes > size_) {
      ctx_.synchronize();
      allocate(2 * bytes);
    }
    place_ = &places_[step % kStepsInFlight];
    used_ = 0;
  }

  // The next array, aligned to 16 bytes. Arrays that are added in the same order and with the same
  // sizes lie at the same addresses.
  template <typename T>
  Array<T> add(std::int64_t count) {
    const std::size_t first = (used_ + 15) / 16 * 16;
    used_ = first + static_cast<std::size_t>(count) * sizeof(T);
    if (used_ > size_) {
      throw Error("The arrays of a step take " + std::to_string(used_) +
                  " bytes, there is room for " + std::to_string(size_) + " (" + purpose_ + ").");
    }
    return {reinterpret_cast<T*>(place_->host.data() + first),
            reinterpret_cast<T*>(place_->device.data() + first)};
  }

  // What is queued in the context's stream from now on finds them there.
  void send() {
    if (used_ == 0) return;
    cuda::copy_to_device(copies_.get(), place_->device.data(), place_->host.data(), used_);
    place_->sent.record(copies_.get());
    place_->sent.order(ctx_.stream());
  }

 private:
  struct Place {
    cuda::PinnedMemory host;
    cuda::DeviceMemory device;
    cuda::Event sent;
  };

  void allocate(std::size_t bytes) {
    size_ = bytes;
    for (Place& place : places_) {
      place.host = cuda::PinnedMemory(bytes, purpose_);
      place.device = cuda::DeviceMemory(bytes, purpose_);
      // Decode attention asks for entries of its work list before it knows how many there are.
      cuda::fill_bytes(ctx_, place.device.data(), 0, bytes);
    }
    ctx_.synchronize();  // the copies go through another stream
  }

  const CudaContext& ctx_;
  const cuda::Stream& copies_;
  const char* const purpose_;
  std::array<Place, kStepsInFlight> places_;
  Place* place_ = nullptr;
  std::size_t size_ = 0;  // of a place
  std::size_t used_ = 0;  // of this step's
};

}  // namespace tinyvllm

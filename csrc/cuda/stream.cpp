#include "cuda/stream.h"

#include <cuda_runtime.h>

#include "cuda/error.h"

namespace tinyvllm::cuda {

Stream::Stream() {
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
}

Stream::~Stream() { cudaStreamDestroy(stream_); }

void Stream::synchronize() const { check(cudaStreamSynchronize(stream_), "waiting for a stream"); }

Event::Event() { check(cudaEventCreateWithFlags(&event_, 0), "making an event"); }

Event::~Event() { cudaEventDestroy(event_); }

void Event::record(CUstream_st* stream) {
  check(cudaEventRecord(event_, stream), "recording an event");
}

void Event::synchronize() const { check(cudaEventSynchronize(event_), "waiting for an event"); }

bool Event::done() const {
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) return false;
  check(error, "asking for an event");
  return true;
}

void Event::order(CUstream_st* stream) const {
  check(cudaStreamWaitEvent(stream, event_, 0), "ordering a stream behind an event");
}

float Event::milliseconds_since(const Event& start) const {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, start.event_, event_), "timing");
  return milliseconds;
}

}  // namespace tinyvllm::cuda

// Streams beside the context's own, and events, which order one stream behind a point of another.
#pragma once

#include "cuda/context.h"

struct CUevent_st;

namespace tinyvllm::cuda {

class Stream {
 public:
  Stream();  // throws Error
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  CUstream_st* get() const { return stream_; }
  void synchronize() const;

 private:
  CUstream_st* stream_ = nullptr;
};

// A point in a stream: all that was queued before record().
class Event {
 public:
  Event();  // throws Error
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(CUstream_st* stream);
  void synchronize() const;               // the host waits for it
  bool done() const;                      // whether it has been reached
  void order(CUstream_st* stream) const;  // what is queued in `stream` from now on waits for it

  // Between two events that have been reached.
  float milliseconds_since(const Event& start) const;

 private:
  CUevent_st* event_ = nullptr;
};

}  // namespace tinyvllm::cuda

// CUDA graphs: what an op queues, recorded once and started again with one call.
//
// A graph keeps the arguments of its launches: pointers and numbers, not what the pointers point to.
// What changes from replay to replay lies in device arrays that stay where they are.
#pragma once

#include "cuda/context.h"

struct CUgraphExec_st;

namespace tinyvllm::cuda {

class Graph {
 public:
  // Records what `queue()` puts into the context's stream, without running it. It may neither
  // allocate nor free device memory nor wait; the context's workspace is reserved before. Throws
  // Error, and whatever queue() throws.
  template <typename F>
  Graph(const CudaContext& ctx, F&& queue) {
    const Recording recording(ctx);
    queue();
    executable_ = recording.end();
  }
  ~Graph();
  Graph(Graph&& other) noexcept;
  Graph& operator=(Graph&& other) noexcept;

  // Queues all of it in the context's stream.
  void replay(const CudaContext& ctx) const;

 private:
  // Ends the capture however the recording ends.
  class Recording {
   public:
    explicit Recording(const CudaContext& ctx);
    ~Recording();
    CUgraphExec_st* end() const;

   private:
    const CudaContext& ctx_;
    mutable bool open_ = true;
  };

  CUgraphExec_st* executable_ = nullptr;
};

}  // namespace tinyvllm::cuda

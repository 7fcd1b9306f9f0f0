#include "cuda/graph.h"

#include <cuda_runtime.h>

#include <utility>

#include "cuda/error.h"

namespace tinyvllm::cuda {

Graph::Recording::Recording(const CudaContext& ctx) : ctx_(ctx) {
  // Thread-local: what other threads do meanwhile, an upload say, is not forbidden.
  check(cudaStreamBeginCapture(ctx.stream(), cudaStreamCaptureModeThreadLocal),
        "beginning to record a graph");
}

Graph::Recording::~Recording() {
  if (!open_) return;
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(ctx_.stream(), &graph);
  if (graph != nullptr) cudaGraphDestroy(graph);
}

CUgraphExec_st* Graph::Recording::end() const {
  cudaGraph_t graph = nullptr;
  open_ = false;
  check(cudaStreamEndCapture(ctx_.stream(), &graph), "recording a graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(error, "making a recorded graph executable");
  return executable;
}

Graph::~Graph() {
  if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
}

Graph::Graph(Graph&& other) noexcept : executable_(std::exchange(other.executable_, nullptr)) {}

Graph& Graph::operator=(Graph&& other) noexcept {
  std::swap(executable_, other.executable_);
  return *this;
}

void Graph::replay(const CudaContext& ctx) const {
  check(cudaGraphLaunch(executable_, ctx.stream()), "starting a graph");
}

}  // namespace tinyvllm::cuda

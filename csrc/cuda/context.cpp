#include "cuda/context.h"

#include <cuda_runtime.h>

#include <cstdlib>
#include <thread>

#include "cuda/cublaslt.h"
#include "cuda/error.h"
#include "cuda/memory.h"
#include "cuda/stream.h"

namespace tinyvllm {
namespace {

using cuda::check;

// For what is asked of a device before it is used: then it cannot be had.
void check_device(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw DeviceError("device cuda: " + std::string(what) + ": " +
                    cuda::sentence(cudaGetErrorString(error)));
}

// "13.0" for 13000.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Makes the device current for this thread, or says why it cannot be used. cuBLASLt is opened beside
// it: each takes long, and neither needs the other.
void open_device(int device, const std::vector<std::string>& library_directories) {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    throw DeviceError("device cuda: no NVIDIA driver. Install it, or use --device cpu.");
  }
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    throw DeviceError("device cuda: the NVIDIA driver is for CUDA " + version_text(driver) +
                      ", this build for a later one. Update the driver, or use --device cpu.");
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    throw DeviceError("device cuda: the driver shows no GPU" +
                      (visible == nullptr
                           ? std::string()
                           : " (CUDA_VISIBLE_DEVICES is \"" + std::string(visible) + "\")") +
                      ". Make one visible, or use --device cpu.");
  }
  check_device(error, "looking for devices");
  if (device < 0 || device >= count) {
    throw DeviceError("device cuda: there is no GPU " + std::to_string(device) + "; there are " +
                      std::to_string(count) + ", counted from 0.");
  }
  const std::jthread opening(
      [&library_directories] { cuda::CublasLt::open_early(library_directories); });
  check_device(cudaSetDevice(device), "choosing the device");
}

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check_device(cudaDeviceGetAttribute(&value, attribute, device), "asking for a device attribute");
  return value;
}

std::string name_of_card(int device) {
  cudaDeviceProp properties{};
  check_device(cudaGetDeviceProperties(&properties, device), "asking for the card's name");
  return properties.name;
}

}  // namespace

struct CudaContext::State {
  State(int device_, bool batch_invariant_, const std::vector<std::string>& library_directories)
      : device((open_device(device_, library_directories), device_)),
        batch_invariant(batch_invariant_),
        num_multiprocessors(attribute_of(device, cudaDevAttrMultiProcessorCount)),
        compute_capability(10 * attribute_of(device, cudaDevAttrComputeCapabilityMajor) +
                           attribute_of(device, cudaDevAttrComputeCapabilityMinor)),
        name(name_of_card(device)),
        max_shared_bytes(static_cast<std::size_t>(
            attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin))),
        cublaslt(library_directories),
        counters(kNumCounters * sizeof(std::uint32_t), "the counters of kernels") {}

  const int device;
  const bool batch_invariant;
  const int num_multiprocessors;
  const int compute_capability;
  const std::string name;
  const std::size_t max_shared_bytes;
  const cuda::Stream stream;
  const cuda::CublasLt cublaslt;
  const cuda::DeviceMemory counters;
  cuda::DeviceMemory workspace;
};

CudaContext::CudaContext(int device, bool batch_invariant,
                         const std::vector<std::string>& library_directories)
    : state_(std::make_unique<State>(device, batch_invariant, library_directories)) {
  cuda::fill_bytes(*this, state_->counters.data(), 0, state_->counters.size());
}

CudaContext::~CudaContext() = default;

bool CudaContext::is_available() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

const std::string& CudaContext::name() const { return state_->name; }
CUstream_st* CudaContext::stream() const { return state_->stream.get(); }
int CudaContext::num_multiprocessors() const { return state_->num_multiprocessors; }
int CudaContext::compute_capability() const { return state_->compute_capability; }
std::size_t CudaContext::max_shared_bytes() const { return state_->max_shared_bytes; }
bool CudaContext::batch_invariant() const { return state_->batch_invariant; }
const cuda::CublasLt& CudaContext::cublaslt() const { return state_->cublaslt; }
std::uint32_t* CudaContext::counters() const { return state_->counters.as<std::uint32_t>(); }

Memory CudaContext::allocate(std::size_t bytes, const char* purpose) const {
  return cuda::DeviceMemory(bytes, purpose).release();
}

void CudaContext::activate() const { check(cudaSetDevice(state_->device), "choosing the device"); }

void CudaContext::synchronize() const { state_->stream.synchronize(); }

std::byte* CudaContext::workspace(std::size_t bytes) const {
  if (bytes > state_->workspace.size()) {
    throw Error("cuda: an op needs " + std::to_string(bytes) + " bytes of workspace, " +
                std::to_string(state_->workspace.size()) +
                " are reserved. Reserve what its ..._workspace_bytes() says.");
  }
  return state_->workspace.data();
}

void CudaContext::reserve_workspace(std::size_t bytes) {
  if (bytes <= state_->workspace.size()) return;
  synchronize();
  state_->workspace = {};  // before the new one, so that both need not fit
  state_->workspace = cuda::DeviceMemory(bytes, "the workspace of the ops");
}

}  // namespace tinyvllm

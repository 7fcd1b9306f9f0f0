// tinyvllm._core.CudaContext, and what this build knows of CUDA.
#include <filesystem>

#include "bindings/bindings.h"

#if defined(TINYVLLM_HAS_CUDA)
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "cuda/context.h"
#include "cuda/cublaslt.h"
#include "cuda/memory.h"
#include "cuda/upload.h"
#endif
#if defined(TINYVLLM_CUDA_EMULATE)
#include "cuda/emulator/traps.h"
#endif

namespace py = pybind11;

namespace tinyvllm {

const char* cuda_build() {
#if defined(TINYVLLM_CUDA_EMULATE)
  return "emulated";
#elif defined(TINYVLLM_HAS_CUDA)
  return "gpu";
#else
  return "none";
#endif
}

std::vector<std::string> cuda_library_directories() {
  std::vector<std::string> directories;
  for (const py::handle entry : py::module_::import("sys").attr("path")) {
    std::error_code ignored;
    const std::filesystem::path packages = std::filesystem::path(py::str(entry)) / "nvidia";
    for (const auto& package : std::filesystem::directory_iterator(packages, ignored)) {
      directories.push_back(package.path() / "lib");
    }
  }
  return directories;
}

#if defined(TINYVLLM_HAS_CUDA)
namespace {

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

// Each array on the device, and back from there.
std::vector<Bytes> upload_and_read_back(const CudaContext& ctx, const std::vector<Bytes>& arrays,
                                        int num_threads) {
  std::vector<cuda::DeviceMemory> memory;
  std::vector<cuda::Upload> pieces;
  for (const Bytes& array : arrays) {
    const auto bytes = static_cast<std::size_t>(array.size());
    memory.emplace_back(bytes, "a test");
    pieces.push_back({memory.back().data(), array.data(), bytes});
  }
  cuda::upload(ctx, pieces, num_threads);
  std::vector<Bytes> result;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    result.emplace_back(arrays[i].size());
    cuda::copy_to_host(ctx, result.back().mutable_data(), pieces[i].device, pieces[i].bytes);
  }
  ctx.synchronize();
  return result;
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_build", &cuda_build, "\"gpu\", \"emulated\" or \"none\".");
  py::class_<CudaContext>(module, "CudaContext", "A GPU for the ops, or the emulator of one.")
      .def(py::init([](int device, bool batch_invariant) {
             auto ctx =
                 std::make_unique<CudaContext>(device, batch_invariant, cuda_library_directories());
             constexpr std::size_t kWorkspace = std::size_t{32} << 20;  // for the shapes of tests
             ctx->reserve_workspace(kWorkspace);
             return ctx;
           }),
           py::arg("device") = 0, py::arg("batch_invariant") = false)
      .def_property_readonly("name", &CudaContext::name)
      .def_property_readonly("compute_capability", &CudaContext::compute_capability)
      .def_property_readonly("num_multiprocessors", &CudaContext::num_multiprocessors)
      .def_property_readonly("cublaslt",
                             [](const CudaContext& ctx) { return ctx.cublaslt().version(); });
  module.def(
      "cuda_memory",
      [] {
        const CudaContext ctx(0, false, cuda_library_directories());
        const cuda::MemoryInfo memory = cuda::memory_info();
        return py::make_tuple(memory.free, memory.total);
      },
      "The bytes of the GPU that are free beside a context, and all of them.");
  module.def("upload_and_read_back", &upload_and_read_back, py::arg("ctx"), py::arg("arrays"),
             py::arg("num_threads"));
#if defined(TINYVLLM_CUDA_EMULATE)
  module.def("trap_names", &cuda::traps::names);
  module.def("run_trap", &cuda::traps::run, py::arg("ctx"), py::arg("name"),
             py::arg("with_mistake"));
#endif
}

#else

void bind_cuda(py::module_& module) {
  module.def("cuda_build", &cuda_build, "\"gpu\", \"emulated\" or \"none\".");
}

#endif

}  // namespace tinyvllm

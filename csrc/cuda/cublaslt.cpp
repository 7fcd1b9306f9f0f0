#include "cuda/cublaslt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "base/errors.h"
#include "cuda/context.h"
#include "cuda/memory.h"

namespace tinyvllm::cuda {
namespace {

// "libcublasLt.so.13": a library of another major version has other structures.
const std::string kLibrary = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);

void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error("cuda: cuBLASLt, " + std::string(what) + ": status " + std::to_string(status) + ".");
}

// Opens the library in one of the directories or where the system looks; null: it is nowhere, and
// `tried` says where. It stays loaded until the process ends: it keeps threads and state of its own.
void* open_library(const std::vector<std::string>& directories, std::string& tried) {
  for (const std::string& directory : directories) {
    const std::string path = directory + "/" + kLibrary;
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle != nullptr) return handle;
    tried += path + ", ";
  }
  return dlopen(kLibrary.c_str(), RTLD_NOW | RTLD_LOCAL);
}

// The functions that are used of it.
struct Library {
  explicit Library(const std::vector<std::string>& directories) {
    std::string tried;
    void* handle = open_library(directories, tried);
    if (handle == nullptr) {
      throw DeviceError("device cuda: cuBLASLt is not there; tried " + tried + kLibrary +
                        " where the system looks. Run pip install 'nvidia-cublas>=13,<14'.");
    }
    find(handle, create, "cublasLtCreate");
    find(handle, destroy, "cublasLtDestroy");
    find(handle, version, "cublasLtGetVersion");
    find(handle, product_create, "cublasLtMatmulDescCreate");
    find(handle, product_destroy, "cublasLtMatmulDescDestroy");
    find(handle, product_set, "cublasLtMatmulDescSetAttribute");
    find(handle, layout_create, "cublasLtMatrixLayoutCreate");
    find(handle, layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(handle, preference_create, "cublasLtMatmulPreferenceCreate");
    find(handle, preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(handle, preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(handle, propose, "cublasLtMatmulAlgoGetHeuristic");
    find(handle, multiply, "cublasLtMatmul");
  }

  template <typename F>
  static void find(void* handle, F*& function, const char* name) {
    function = reinterpret_cast<F*>(dlsym(handle, name));
    if (function == nullptr) {
      throw DeviceError("device cuda: " + kLibrary + " has no function " + name +
                        ". Run pip install --upgrade 'nvidia-cublas>=13,<14'.");
    }
  }

  decltype(cublasLtCreate)* create = nullptr;
  decltype(cublasLtDestroy)* destroy = nullptr;
  decltype(cublasLtGetVersion)* version = nullptr;
  decltype(cublasLtMatmulDescCreate)* product_create = nullptr;
  decltype(cublasLtMatmulDescDestroy)* product_destroy = nullptr;
  decltype(cublasLtMatmulDescSetAttribute)* product_set = nullptr;
  decltype(cublasLtMatrixLayoutCreate)* layout_create = nullptr;
  decltype(cublasLtMatrixLayoutDestroy)* layout_destroy = nullptr;
  decltype(cublasLtMatmulPreferenceCreate)* preference_create = nullptr;
  decltype(cublasLtMatmulPreferenceDestroy)* preference_destroy = nullptr;
  decltype(cublasLtMatmulPreferenceSetAttribute)* preference_set = nullptr;
  decltype(cublasLtMatmulAlgoGetHeuristic)* propose = nullptr;
  decltype(cublasLtMatmul)* multiply = nullptr;
};

cudaDataType_t type_of(DType dtype) { return dtype == DType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF; }

// One of the library's objects, which it makes and destroys itself: their size is its own affair.
template <typename Object>
using Owned = std::unique_ptr<Object, cublasStatus_t (*)(Object*)>;

// The library thinks in columns: a row-major [rows, cols] matrix is to it a [cols, rows] one. So it
// computes out^T[outputs, rows] = weight[outputs, depth] x^T[depth, rows].
struct Description {
  Description(const Library& library, const Product& p)
      : product(make_product(library)),
        weight(make_layout(library, p.dtype, p.depth, p.outputs, p.depth)),
        x(make_layout(library, p.dtype, p.depth, p.rows, p.x_stride)),
        out(make_layout(library, p.out_dtype, p.outputs, p.rows, p.out_stride)) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check(library.product_set(product.get(), CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                              sizeof transposed),
          "describing a product");
  }

  Owned<cublasLtMatmulDescOpaque_t> product;
  Owned<cublasLtMatrixLayoutOpaque_t> weight, x, out;

 private:
  static Owned<cublasLtMatmulDescOpaque_t> make_product(const Library& library) {
    cublasLtMatmulDesc_t made = nullptr;
    check(library.product_create(&made, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describing a product");
    return {made, library.product_destroy};
  }

  static Owned<cublasLtMatrixLayoutOpaque_t> make_layout(const Library& library, DType dtype,
                                                         std::int64_t rows, std::int64_t cols,
                                                         std::int64_t stride) {
    cublasLtMatrixLayout_t made = nullptr;
    check(library.layout_create(&made, type_of(dtype), static_cast<std::uint64_t>(rows),
                                static_cast<std::uint64_t>(cols), stride),
          "describing a matrix");
    return {made, library.layout_destroy};
  }
};

}  // namespace

struct CublasLt::State {
  explicit State(const std::vector<std::string>& directories)
      : library(directories), workspace(kWorkspaceBytes, "the workspace of cuBLASLt") {
    check(library.create(&handle), "starting");
  }
  ~State() { library.destroy(handle); }

  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                         DType, DType, bool>;
  struct Plan {
    Description description;
    std::vector<cublasLtMatmulAlgo_t> algorithms;
  };

  // The plan for a shape, made when it is first asked for.
  const Plan& plan(const Product& p) {
    const Key key{p.rows,       p.outputs, p.depth,     p.x_stride,
                  p.out_stride, p.dtype,   p.out_dtype, p.accumulate};
    const std::lock_guard lock(mutex);
    const auto found = plans.find(key);
    if (found != plans.end()) return found->second;

    Plan made{Description(library, p), {}};
    cublasLtMatmulPreference_t made_preference = nullptr;
    check(library.preference_create(&made_preference), "asking for algorithms");
    const Owned<cublasLtMatmulPreferenceOpaque_t> preference(made_preference,
                                                             library.preference_destroy);
    const std::uint64_t bytes = kWorkspaceBytes;
    check(library.preference_set(preference.get(), CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                 sizeof bytes),
          "asking for algorithms");
    cublasLtMatmulHeuristicResult_t results[kMaxAlgorithms];
    int count = 0;
    const Description& d = made.description;
    library.propose(handle, d.product.get(), d.weight.get(), d.x.get(), d.out.get(), d.out.get(),
                    preference.get(), kMaxAlgorithms, results, &count);
    for (int i = 0; i < count; ++i) {
      if (results[i].state == CUBLAS_STATUS_SUCCESS) made.algorithms.push_back(results[i].algo);
    }
    if (made.algorithms.empty()) {
      throw Error("cuda: cuBLASLt has no algorithm for [" + std::to_string(p.rows) + ", " +
                  std::to_string(p.depth) + "] x [" + std::to_string(p.outputs) + ", " +
                  std::to_string(p.depth) + "], " + std::string(name_of(p.dtype)) + " to " +
                  std::string(name_of(p.out_dtype)) +
                  ". Rows of 16-bit elements have to begin at multiples of 16 bytes.");
    }
    return plans.emplace(key, std::move(made)).first->second;
  }

  Library library;
  cublasLtHandle_t handle = nullptr;
  DeviceMemory workspace;
  std::mutex mutex;
  std::map<Key, Plan> plans;
};

CublasLt::CublasLt(const std::vector<std::string>& directories)
    : state_(std::make_unique<State>(directories)) {}
CublasLt::~CublasLt() = default;

void CublasLt::open_early(const std::vector<std::string>& directories) {
  std::string tried;
  open_library(directories, tried);
}

std::string CublasLt::version() const {
  const std::size_t v = state_->library.version();  // 130100 for 13.1.0
  return std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." +
         std::to_string(v % 100);
}

int CublasLt::num_algorithms(const Product& product) const {
  return static_cast<int>(state_->plan(product).algorithms.size());
}

void CublasLt::multiply(const CudaContext& ctx, const Product& product, const void* x,
                        const void* weight, void* out, int rank) const {
  const State::Plan& plan = state_->plan(product);
  const Description& d = plan.description;
  const std::size_t last = plan.algorithms.size() - 1;
  const float one = 1, before = product.accumulate ? 1.0f : 0.0f;
  check(state_->library.multiply(state_->handle, d.product.get(), &one, weight, d.weight.get(), x,
                                 d.x.get(), &before, out, d.out.get(), out, d.out.get(),
                                 &plan.algorithms[std::min(static_cast<std::size_t>(rank), last)],
                                 state_->workspace.data(), kWorkspaceBytes, ctx.stream()),
        "multiplying");
}

}  // namespace tinyvllm::cuda

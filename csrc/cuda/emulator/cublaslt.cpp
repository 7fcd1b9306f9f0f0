// cuBLASLt of the emulated device: the plain loop that every matrix product is.
#include "cuda/cublaslt.h"

#include "base/bfloat16.h"
#include "cuda/context.h"
#include "cuda/emulator/runtime.h"
#include "cuda/error.h"

namespace tinyvllm::cuda {

struct CublasLt::State {};

CublasLt::CublasLt(const std::vector<std::string>&) {}
CublasLt::~CublasLt() = default;
void CublasLt::open_early(const std::vector<std::string>&) {}

std::string CublasLt::version() const { return "emulated"; }

int CublasLt::num_algorithms(const Product&) const { return 1; }

namespace {

template <typename T, typename Out>
void multiply_plainly(const Product& p, const T* x, const T* weight, Out* out) {
  for (std::int64_t m = 0; m < p.rows; ++m) {
    for (std::int64_t n = 0; n < p.outputs; ++n) {
      Out& target = out[m * p.out_stride + n];
      float sum = p.accumulate ? to_float(target) : 0.0f;
      for (std::int64_t k = 0; k < p.depth; ++k) {
        sum += to_float(x[m * p.x_stride + k]) * to_float(weight[n * p.depth + k]);
      }
      if constexpr (sizeof(Out) == 2) {
        target = to_bfloat16(sum);
      } else {
        target = sum;
      }
    }
  }
}

}  // namespace

void CublasLt::multiply(const CudaContext& ctx, const Product& product, const void* x,
                        const void* weight, void* out, int) const {
  const auto action = [=] {
    if (product.dtype == DType::kFloat32) {
      multiply_plainly(product, static_cast<const float*>(x), static_cast<const float*>(weight),
                       static_cast<float*>(out));
    } else if (product.out_dtype == DType::kFloat32) {
      multiply_plainly(product, static_cast<const BFloat16*>(x),
                       static_cast<const BFloat16*>(weight), static_cast<float*>(out));
    } else {
      multiply_plainly(product, static_cast<const BFloat16*>(x),
                       static_cast<const BFloat16*>(weight), static_cast<BFloat16*>(out));
    }
  };
  check(emulator::enqueue(ctx.stream(), "cublaslt", action), "a matrix product");
}

}  // namespace tinyvllm::cuda

// tinyvllm._core.MatmulPlan and MatmulTimer: what benchmarks/tune_gemm.py chooses from, and how it
// measures. Only in a module that was built with CUDA.
#include "bindings/bindings.h"

#if defined(TINYVLLM_HAS_CUDA)
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/errors.h"
#include "cuda/context.h"
#include "cuda/graph.h"
#include "cuda/memory.h"
#include "cuda/stream.h"
#include "ops/cuda/matmul_plan.h"
#include "ops/read_memory.h"

namespace py = pybind11;

namespace tinyvllm {
namespace {

using cuda::MatmulCall;
using cuda::MatmulKernel;
using cuda::MatmulPlan;
using cuda::MatmulUse;

constexpr std::pair<const char*, MatmulKernel> kKernels[] = {
    {"streaming", MatmulKernel::kStreaming},
    {"cublaslt", MatmulKernel::kCublasLt},
    {"plain", MatmulKernel::kPlain}};

template <typename T, std::size_t kCount>
T value_of(const std::string& name, const std::pair<const char*, T> (&names)[kCount]) {
  for (const auto& [known, value] : names) {
    if (name == known) return value;
  }
  throw InvalidRequestError("\"" + name + "\" names none of what there is to choose from.");
}

template <typename T, std::size_t kCount>
const char* name_of(T value, const std::pair<const char*, T> (&names)[kCount]) {
  return std::ranges::find(names, value, &std::pair<const char*, T>::second)->first;
}

// A matrix of a model and what surrounds its product. "logits" is "norm" with float32 results.
struct Matrix {
  MatmulUse use;
  DType out_dtype;
  std::int64_t outputs, depth;
};

Matrix matrix_of(const std::string& use, std::int64_t outputs, std::int64_t depth) {
  if (use == "logits") return {MatmulUse::kNorm, DType::kFloat32, outputs, depth};
  constexpr std::pair<const char*, MatmulUse> kUses[] = {{"store", MatmulUse::kStore},
                                                         {"add", MatmulUse::kAdd},
                                                         {"norm", MatmulUse::kNorm},
                                                         {"swiglu", MatmulUse::kNormSwiGlu}};
  const MatmulUse value = value_of(use, kUses);
  return {value, value == MatmulUse::kAdd ? DType::kFloat32 : DType::kBFloat16, outputs, depth};
}

// Runs the products of a step, one after the other in a CUDA graph, each with weights of its own,
// so that nothing is in a cache that would not be there in a model. bfloat16.
class MatmulTimer {
 public:
  MatmulTimer(const CudaContext& ctx,
              const std::vector<std::tuple<std::string, std::int64_t, std::int64_t>>& matrices,
              std::int64_t max_rows)
      : ctx_(ctx), max_rows_(max_rows) {
    std::int64_t weights = 0, widest = 0;
    for (const auto& [use, outputs, depth] : matrices) {
      matrices_.push_back(matrix_of(use, outputs, depth));
      weights += outputs * depth;
      widest = std::max({widest, outputs, depth});
    }
    const auto count = static_cast<std::size_t>(max_rows * widest);
    weights_ = cuda::DeviceMemory(static_cast<std::size_t>(weights) * 2, "the weights");
    norm_ = cuda::DeviceMemory(static_cast<std::size_t>(widest) * 4, "a norm");
    residual_ = cuda::DeviceMemory(count * 4, "the residual stream");
    operand_ = cuda::DeviceMemory(count * 2, "the operands");
    normalized_ = cuda::DeviceMemory(count * 2, "the normalised rows");
    out_ = cuda::DeviceMemory(count * 4, "the results");
    checksum_ = cuda::DeviceMemory(4, "a checksum");

    fill<BFloat16>(weights_, [](float value) { return to_bfloat16(value * 0.02f); });
    fill<BFloat16>(operand_, [](float value) { return to_bfloat16(value); });
    fill<float>(residual_, [](float value) { return value; });
    fill<float>(norm_, [](float value) { return 1.0f + 0.1f * value; });
  }

  std::vector<MatmulPlan> plans(std::int64_t rows) const {
    std::vector<MatmulPlan> plans;
    for (const Call& call : calls(rows)) plans.push_back(cuda::plan_of(ctx_, call.call));
    return plans;
  }

  // Milliseconds of one pass over all matrices, `repetitions` measurements of `passes` each.
  std::vector<float> milliseconds(std::int64_t rows, const std::vector<MatmulPlan>& plans,
                                  int passes, int repetitions) const {
    if (plans.size() != matrices_.size()) {
      throw InvalidRequestError("There is not one plan for each matrix.");
    }
    const std::vector<Call> all = calls(rows);
    const auto queue = [&] {
      for (std::size_t i = 0; i < all.size(); ++i) cuda::run(ctx_, all[i].call, plans[i]);
    };
    queue();  // what a library loads at its first call is loaded
    ctx_.synchronize();
    const cuda::Graph graph(ctx_, queue);
    return measure([&] { graph.replay(ctx_); }, passes, repetitions);
  }

  // The same of reading all weights, as fast as the card can.
  std::vector<float> read_milliseconds(int passes, int repetitions) const {
    const std::size_t bytes = weights_.size() / 16 * 16;
    return measure(
        [&] { read_memory(ctx_, weights_.data(), bytes, checksum_.as<std::uint32_t>()); }, passes,
        repetitions);
  }

  std::size_t weight_bytes() const { return weights_.size(); }

 private:
  struct Call {
    Weight weight;
    MatmulCall call;
  };

  template <typename T, typename F>
  void fill(const cuda::DeviceMemory& memory, F&& convert) const {
    // A pattern that repeats: random bits cost the memory the power that real weights do.
    std::vector<T> pattern(std::size_t{1} << 20);
    std::mt19937 generator(1);
    std::uniform_real_distribution<float> uniform(-1.7f, 1.7f);
    for (T& value : pattern) value = convert(uniform(generator));
    const std::size_t step = pattern.size() * sizeof(T);
    for (std::size_t start = 0; start < memory.size(); start += step) {
      cuda::copy_to_device(ctx_, memory.data() + start, pattern.data(),
                           std::min(step, memory.size() - start));
    }
    ctx_.synchronize();
  }

  std::vector<Call> calls(std::int64_t rows) const {
    if (rows < 1 || rows > max_rows_) throw InvalidRequestError("More rows than max_rows.");
    std::vector<Call> calls(matrices_.size());
    std::byte* weight = weights_.data();
    for (std::size_t i = 0; i < calls.size(); ++i) {
      const Matrix& matrix = matrices_[i];
      Call& call = calls[i];
      call.weight.blocks[0] = {weight, matrix.outputs, nullptr};
      call.weight.depth = matrix.depth;
      weight += matrix.outputs * matrix.depth * 2;

      const auto view = [&](const cuda::DeviceMemory& memory, DType dtype, std::int64_t cols) {
        return MutTensorView{memory.data(), dtype, rows, cols, cols};
      };
      const bool normalises =
          matrix.use == MatmulUse::kNorm || matrix.use == MatmulUse::kNormSwiGlu;
      call.call.use = matrix.use;
      call.call.x = normalises ? view(residual_, DType::kFloat32, matrix.depth)
                               : view(operand_, DType::kBFloat16, matrix.depth);
      call.call.out = view(out_, matrix.out_dtype, matrix.outputs);
      call.call.norm = norm_.as<float>();
      call.call.eps = 1e-5f;
      call.call.normalized = view(normalized_, DType::kBFloat16, matrix.depth);
      if (matrix.use == MatmulUse::kAdd)
        call.call.out = view(residual_, DType::kFloat32, matrix.outputs);
      if (matrix.use == MatmulUse::kNormSwiGlu) {
        call.call.gate_up = call.call.out;
        call.call.out = view(operand_, DType::kBFloat16, matrix.outputs / 2);
      }
    }
    for (Call& call : calls) call.call.weight = &call.weight;  // the elements no longer move
    return calls;
  }

  template <typename F>
  std::vector<float> measure(F&& pass, int passes, int repetitions) const {
    std::vector<float> results;
    pass();
    cuda::Event start, end;
    for (int i = 0; i < repetitions; ++i) {
      start.record(ctx_.stream());
      for (int j = 0; j < passes; ++j) pass();
      end.record(ctx_.stream());
      end.synchronize();
      results.push_back(end.milliseconds_since(start) / static_cast<float>(passes));
    }
    ctx_.synchronize();
    return results;
  }

  const CudaContext& ctx_;
  const std::int64_t max_rows_;
  std::vector<Matrix> matrices_;
  cuda::DeviceMemory weights_, norm_, residual_, operand_, normalized_, out_, checksum_;
};

}  // namespace

void bind_matmul_plans(py::module_& module) {
  py::class_<MatmulPlan>(module, "MatmulPlan", "How one product is computed on the GPU.")
      .def(py::init([](const std::string& kernel, int shape, int blocks_per_multiprocessor,
                       bool fuses_norm, int rank) {
             return MatmulPlan{value_of(kernel, kKernels), shape, blocks_per_multiprocessor,
                               fuses_norm, rank};
           }),
           py::arg("kernel"), py::kw_only(), py::arg("shape") = 0,
           py::arg("blocks_per_multiprocessor") = 0, py::arg("fuses_norm") = false,
           py::arg("rank") = 0)
      .def_property_readonly("kernel",
                             [](const MatmulPlan& plan) { return name_of(plan.kernel, kKernels); })
      .def_readonly("shape", &MatmulPlan::shape)
      .def_readonly("blocks_per_multiprocessor", &MatmulPlan::blocks_per_multiprocessor)
      .def_readonly("fuses_norm", &MatmulPlan::fuses_norm)
      .def_readonly("rank", &MatmulPlan::rank);
  module.def("streaming_shapes", [] {
    const auto shapes = cuda::streaming_shapes();
    return std::vector(shapes.begin(), shapes.end());
  });
  module.def("num_normalising_shapes", &cuda::num_normalising_shapes);

  py::class_<MatmulTimer>(module, "MatmulTimer", "Times the products of a step on the GPU.")
      .def(py::init<const CudaContext&,
                    const std::vector<std::tuple<std::string, std::int64_t, std::int64_t>>&,
                    std::int64_t>(),
           py::arg("ctx"), py::arg("matrices"), py::arg("max_rows"), py::keep_alive<1, 2>())
      .def("plans", &MatmulTimer::plans, py::arg("rows"))
      .def("milliseconds", &MatmulTimer::milliseconds, py::arg("rows"), py::arg("plans"),
           py::arg("passes"), py::arg("repetitions"))
      .def("read_milliseconds", &MatmulTimer::read_milliseconds, py::arg("passes"),
           py::arg("repetitions"))
      .def_property_readonly("weight_bytes", &MatmulTimer::weight_bytes);
}

}  // namespace tinyvllm

#else

namespace tinyvllm {

void bind_matmul_plans(pybind11::module_& /*module*/) {}

}  // namespace tinyvllm

#endif

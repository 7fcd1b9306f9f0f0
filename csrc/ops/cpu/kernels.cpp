// One table of kernels. CMakeLists.txt compiles this file once for each instruction set, with
// TINYVLLM_ISA set to its name.
#include "ops/cpu/kernels.h"

#include "ops/cpu/attention_kernel.h"
#include "ops/cpu/limits_kernel.h"
#if defined(__AMX_BF16__)
#include "ops/cpu/matmul_amx_kernel.h"
#elif defined(__AVX512BF16__)
#include "ops/cpu/matmul_bf16_kernel.h"
#endif
#include "ops/cpu/matmul_kernel.h"
#include "ops/cpu/matmul_lanes_kernel.h"
#include "ops/cpu/matmul_panels_kernel.h"
#include "ops/cpu/row_kernels.h"

#define TINYVLLM_STRING(text) #text
#define TINYVLLM_NAME(isa) TINYVLLM_STRING(isa)

namespace tinyvllm::TINYVLLM_ISA {

// The products of bfloat16, and what packs x for them or widens it.
#if defined(__AMX_BF16__)
constexpr auto kMatmul = &matmul_tiles<false>, kMatmulPanels = &matmul_tiles<true>;
constexpr auto kPackX = &pack_rows<false>, kPackXForPanels = &pack_rows<true>;
constexpr auto kPackXPanel = nullptr;
constexpr auto kLaneBf16 = nullptr;
#elif defined(__AVX512BF16__)
constexpr auto kMatmul = &matmul_bf16;
constexpr auto kMatmulPanels = &matmul_panels<BFloat16, BFloat16>;
constexpr auto kPackX = nullptr, kPackXForPanels = nullptr;
constexpr auto kPackXPanel = &pack_x_panel;
constexpr auto kLaneBf16 = nullptr;
#else
#if defined(__AVX512F__)  // tiles read more of x than the L2 cache gives, unless it is left short
constexpr auto kMatmul = &matmul<BFloat16, BFloat16>;
#else
constexpr auto kMatmul = nullptr;
#endif
constexpr auto kMatmulPanels = nullptr;
constexpr auto kPackX = nullptr, kPackXForPanels = nullptr, kPackXPanel = nullptr;
constexpr auto kLaneBf16 = &lane_row<BFloat16, BFloat16>;
#endif

#if defined(__AVX2__)
template <typename W>
constexpr auto kMatmulLanes = &matmul_lanes<W>;
#else  // with 16 registers of 128 bits the tiles of panels are slower than those of rows
template <typename W>
constexpr auto kMatmulLanes = nullptr;
#endif

extern const Kernels kKernels;
const Kernels kKernels = {
    .isa = TINYVLLM_NAME(TINYVLLM_ISA),
    .matmul_bf16_bf16 = kMatmul,
    .matmul_f32_bf16 = &matmul<float, BFloat16>,
    .matmul_f32_f32 = &matmul<float, float>,
    .matmul_lanes_f32_bf16 = kMatmulLanes<BFloat16>,
    .matmul_lanes_f32_f32 = kMatmulLanes<float>,
    .matmul_panels_bf16_bf16 = kMatmulPanels,
    .matmul_panels_f32_bf16 = &matmul_panels<float, BFloat16>,
    .matmul_panels_f32_f32 = &matmul_panels<float, float>,
    .pack_x = kPackX,
    .pack_x_for_panels = kPackXForPanels,
    .pack_x_panel = kPackXPanel,
    .pair_f32 = &pair_row<float>,
    .pair_bf16 = &pair_row<BFloat16>,
    .lane_f32 = &lane_row<float, BFloat16>,
    .lane_bf16 = kLaneBf16,
    .lane_f32_for_f32 = &lane_row<float, float>,
    .attention_bf16 = &attention<BFloat16>,
    .attention_f32 = &attention<float>,
    .attention_merge = &attention_merge,
    .divide_f32 = &divide<float>,
    .divide_bf16 = &divide<BFloat16>,
    .rms_norm_f32 = &rms_norm<float>,
    .rms_norm_bf16 = &rms_norm<BFloat16>,
    .rotate = &rotate,
    .silu_mul_f32 = &silu_mul<float>,
    .silu_mul_bf16 = &silu_mul<BFloat16>,
    .finite_maximum = &finite_maximum,
    .to_bfloat16 = &convert_to_bfloat16,
    .to_float = &convert_to_float,
    .read = &read,
    .multiply_registers = &multiply_registers,
};

}  // namespace tinyvllm::TINYVLLM_ISA

#include <algorithm>
#include <cstring>

#include "ops/repack.h"

namespace tinyvllm {
namespace {

// One panel. What is copied is 32 bits wide, whatever the dtype: a float32 or a pair of bfloat16.
// It is turned in a block that fits the L1 cache, because the rows do not: with a power of two
// between them, they all fall into one set.
void repack_panel(const std::byte* rows, std::int64_t num_rows, std::int64_t row_bytes,
                  std::uint32_t* panel) {
  constexpr std::int64_t kLane = sizeof(std::uint32_t), kBlock = 16;
  const std::int64_t lanes = (row_bytes + kLane - 1) / kLane;
  std::uint32_t block[kPanelOutputs][kBlock + 1] = {};
  for (std::int64_t first = 0; first < lanes; first += kBlock) {
    const std::int64_t count = std::min(kBlock, lanes - first);
    const std::int64_t bytes = std::min(count * kLane, row_bytes - first * kLane);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      block[row][count - 1] = 0;  // of which half may be absent
      std::memcpy(block[row], rows + row * row_bytes + first * kLane,
                  static_cast<std::size_t>(bytes));
    }
    for (std::int64_t lane = 0; lane < count; ++lane) {
      std::uint32_t* line = panel + (first + lane) * kPanelOutputs;
      for (std::int64_t row = 0; row < kPanelOutputs; ++row) line[row] = block[row][lane];
    }
  }
}

std::int64_t panel_bytes(const Weight& weight) {
  return kPanelOutputs * panel_depth(weight.dtype, weight.depth) *
         static_cast<std::int64_t>(size_of(weight.dtype));
}

std::int64_t num_panels(const RowBlock& block) {
  return (block.rows + kPanelOutputs - 1) / kPanelOutputs;
}

}  // namespace

std::size_t repacked_bytes(const Weight& weight) {
  std::int64_t panels = 0;
  for (const RowBlock& block : weight.blocks) panels += num_panels(block);
  return static_cast<std::size_t>(panels * panel_bytes(weight));
}

Weight repack(const CpuContext& ctx, const Weight& weight, std::byte* memory) {
  const std::int64_t row_bytes = weight.depth * static_cast<std::int64_t>(size_of(weight.dtype));
  Weight repacked = weight;
  repacked.layout = WeightLayout::kPanels;
  for (RowBlock& block : repacked.blocks) {
    if (block.rows == 0) continue;
    const auto* rows = static_cast<const std::byte*>(block.data);
    ctx.parallel_for(num_panels(block), [&](std::int64_t panel, int) {
      const std::int64_t first = panel * kPanelOutputs;
      repack_panel(rows + first * row_bytes, std::min(kPanelOutputs, block.rows - first), row_bytes,
                   reinterpret_cast<std::uint32_t*>(memory + panel * panel_bytes(weight)));
    });
    block.data = memory;
    memory += num_panels(block) * panel_bytes(weight);
  }
  return repacked;
}

}  // namespace tinyvllm

#include "model/repacked_weights.h"

#include <algorithm>
#include <string>
#include <vector>

#include "base/errors.h"
#include "base/host.h"
#include "ops/repack.h"

namespace tinyvllm {
namespace {

void give_back(const Checkpoint& checkpoint, const void* rows, std::size_t bytes,
               Weights& weights) {
  const auto copy = std::find_if(weights.copies.begin(), weights.copies.end(),
                                 [&](const Memory& memory) { return memory.get() == rows; });
  if (copy == weights.copies.end()) {
    checkpoint.release_pages(rows, bytes);
  } else if (rows != weights.embedding.data) {
    weights.copies.erase(copy);
    weights.copied_bytes -= bytes;
  }
}

}  // namespace

Weights repack_weights(const CpuContext& ctx, const Checkpoint& checkpoint, Weights weights) {
  const std::vector<Weight*> matrices = weights.matrices();
  std::size_t total = 0;
  for (const Weight* matrix : matrices) total += repacked_bytes(*matrix);
  const std::int64_t available = available_memory();
  if (static_cast<std::int64_t>(total) > available) {
    throw CapacityError("The repacked weights take " + std::to_string(total) + " bytes, and " +
                        std::to_string(available) +
                        " are available. Use them where they lie: do without repack_weights.");
  }
  Memory memory = ctx.allocate_in_large_pages(total, "repacked weights");
  auto* panels = static_cast<std::byte*>(memory.get());
  for (Weight* matrix : matrices) {
    const Weight rows = *matrix;
    *matrix = repack(ctx, rows, panels);
    panels += repacked_bytes(rows);
    for (const RowBlock& block : rows.blocks) {
      const auto size = static_cast<std::size_t>(block.rows * rows.depth) * size_of(rows.dtype);
      if (size > 0) give_back(checkpoint, block.data, size, weights);
    }
  }
  weights.copies.push_back(std::move(memory));
  weights.copied_bytes += total;
  return weights;
}

}  // namespace tinyvllm

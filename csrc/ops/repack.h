// A matrix copied into the order in which a CPU's products read it fastest.
//
// In a checkpoint the rows of a matrix lie one after the other, so that a product is made of dot
// products: each sum is a whole vector, added up at its end. In panels, 32 outputs lie side by side:
//
//   panels  [ceil(rows / 32), ceil(depth / pair), 32, pair]    pair = 2 for bfloat16, 1 for float32
//
// A lane of a vector is then an output of its own: an element of x is broadcast to all lanes, so that
// a tile reads about a quarter of the bytes, there is nothing to add up at its end, and the weights
// are one stream of memory. (OpenBLAS, oneDNN and llama.cpp's CPU_REPACK do the same; pairs are what
// vdpbf16ps multiplies.) The price is a second copy of the weights in memory of this process alone,
// and the time to write it. Zeros fill up the last panel and the last pair.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/cpu_context.h"
#include "ops/matmul.h"

namespace tinyvllm {

// The bytes that `weight` takes in panels.
std::size_t repacked_bytes(const Weight& weight);

// `weight`, which is in rows, in panels that begin at `memory` (repacked_bytes(weight), aligned to
// 64 bytes). Its row blocks are repacked one by one; the biases stay where they are.
Weight repack(const CpuContext& ctx, const Weight& weight, std::byte* memory);

}  // namespace tinyvllm

// The two limits of the machine that every speed is held against: how fast it reads memory, which
// bounds decode, and how fast it multiplies, which bounds prefill (the roofline of Williams,
// Waterman & Patterson 2009).
//
// Both are the median of repeated passes over about `seconds`: on a shared machine the limit moves,
// and what is compared with it must be measured beside it. Throws InvalidRequestError unless
// 0 < seconds <= 60.
#pragma once

#include <cstddef>
#include <span>

#include "ops/cpu_context.h"

namespace tinyvllm {

// Bytes a second that all threads of the context read together from `memory`, of which what is behind
// its last whole MiB is left out. Throws InvalidRequestError where there is none, or where it does not
// begin at a multiple of 4.
double measure_read_bandwidth(const CpuContext& ctx, std::span<const std::byte> memory,
                              double seconds);

// The same from 1 GiB of its own. Throws CapacityError where that is not to be had.
double measure_read_bandwidth(const CpuContext& ctx, double seconds);

// Floating-point operations a second of the instruction that this context's bfloat16 matmul is made
// of, on all its threads, from registers; a multiply-add counts as two.
double measure_arithmetic(const CpuContext& ctx, double seconds);

}  // namespace tinyvllm

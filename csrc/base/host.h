// What this process may use of the machine: instruction sets, cores, memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tinyvllm {

// The names of the kernel sets (csrc/ops/cpu/kernels.h) that this CPU can run, the fastest first.
// "portable" is always the last.
std::vector<std::string> supported_isas();

// One thread a physical core in the affinity mask, capped by the cgroup's CPU quota; at least 1.
int default_num_threads();

// CPU time of the calling thread so far, in seconds.
double thread_cpu_seconds();

// Bytes of memory that this process could still allocate: MemAvailable, capped by what is left
// under the limits of its cgroup (v2, or v1's memory controller) and of every cgroup above it.
// Cached pages of files count as free.
std::int64_t available_memory();

}  // namespace tinyvllm

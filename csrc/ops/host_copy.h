// Copies between pinned memory of the host and the device that are kernels, and so part of a graph.
// What a step needs and gives is a few kilobytes: a copy engine takes 5 to 8 us of the stream's time
// for either, a kernel 2 to 3 (measured on an H200).
#pragma once

#include <cstddef>

namespace tinyvllm {

class CudaContext;

// Copies arrays that say themselves how long they are: the first uint32 of `host` is the number of
// 16-byte words, itself included. A captured launch so takes arrays of any length.
//
//   sure_bytes  what may be read before the length is known: at least so much lies there
//
// Both addresses are aligned to 16 bytes. Never overlaps the kernel before it: it is the first of a
// step (see CudaSequences).
void pull_from_host(const CudaContext& ctx, const void* host, void* device, std::size_t sure_bytes);

// Copies `bytes`, a multiple of 4; they are there when an event behind it has happened.
void push_to_host(const CudaContext& ctx, const void* device, void* host, std::size_t bytes);

}  // namespace tinyvllm

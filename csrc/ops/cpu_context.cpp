#include "ops/cpu_context.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "base/errors.h"
#include "base/host.h"

namespace tinyvllm {

namespace portable {
extern const Kernels kKernels;
}
#ifdef TINYVLLM_HAS_AVX512BF16
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512bf16 {
extern const Kernels kKernels;
}
#endif
#ifdef TINYVLLM_HAS_AMX
namespace amx {
extern const Kernels kKernels;
}
#endif

const Kernels& kernels_for(const char* isa) {
  static constexpr const Kernels* kTables[] = {
#ifdef TINYVLLM_HAS_AMX
      &amx::kKernels,
#endif
#ifdef TINYVLLM_HAS_AVX512BF16
      &avx512bf16::kKernels, &avx512::kKernels, &avx2::kKernels,
#endif
      &portable::kKernels};
  const std::vector<std::string> supported = supported_isas();
  if (std::find(supported.begin(), supported.end(), isa) != supported.end()) {
    for (const Kernels* table : kTables) {
      if (std::strcmp(table->isa, isa) == 0) return *table;
    }
  }
  std::string known;
  for (const std::string& name : supported) known += (known.empty() ? "" : ", ") + name;
  throw InvalidRequestError("CPU kernels \"" + std::string(isa) +
                            "\" do not run here; this machine has: " + known +
                            ". Set TINYVLLM_CPU_ISA to one of these, or unset it.");
}

namespace {

const Kernels& choose_kernels(const std::string& isa) {
  if (!isa.empty()) return kernels_for(isa.c_str());
  const char* forced = std::getenv("TINYVLLM_CPU_ISA");
  if (forced != nullptr && *forced != '\0') return kernels_for(forced);
  return kernels_for(supported_isas().front().c_str());
}

}  // namespace

CpuContext::CpuContext(int num_threads, const std::string& isa)
    : kernels_(&choose_kernels(isa)),
      pool_(num_threads == 0 ? default_num_threads() : num_threads) {}

Memory CpuContext::allocate(std::size_t bytes, const char* purpose) const {
  if (bytes == 0) return {};  // of which mmap makes an error
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw CapacityError("Cannot reserve " + std::to_string(bytes) + " bytes for " + purpose +
                        ". Lower max_num_batched_tokens and max_num_seqs.");
  }
  return Memory(memory, {[](void* address, std::size_t size) { munmap(address, size); }, bytes});
}

Memory CpuContext::allocate_in_large_pages(std::size_t bytes, const char* purpose) const {
  Memory memory = allocate(bytes, purpose);
  madvise(memory.get(), bytes, MADV_HUGEPAGE);
  return memory;
}

std::byte* CpuContext::scratch(std::size_t bytes) const {
  constexpr std::size_t kAlignment = 64;
  if (bytes > scratch_bytes_) {
    scratch_.reset();
    scratch_bytes_ = 0;
    scratch_ = std::make_unique_for_overwrite<std::byte[]>(bytes + kAlignment);
    scratch_bytes_ = bytes;
  }
  void* start = scratch_.get();
  std::size_t space = scratch_bytes_ + kAlignment;
  return static_cast<std::byte*>(std::align(kAlignment, scratch_bytes_, start, space));
}

}  // namespace tinyvllm

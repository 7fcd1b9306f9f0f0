#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "base/errors.h"
#include "ops/machine_limits.h"

namespace tinyvllm {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The median rate of as many passes as fit into `seconds`, at least three; pass() returns the
// amount of work it did. One more before them warms up.
template <typename F>
double median_rate(double seconds, F&& pass) {
  if (!(seconds > 0 && seconds <= 60)) {
    throw InvalidRequestError("seconds is " + std::to_string(seconds) +
                              "; give more than 0 and at most 60.");
  }
  pass();
  std::vector<double> rates;
  const auto began = Clock::now();
  while (rates.size() < 3 || seconds_since(began) < seconds) {
    const auto start = Clock::now();
    const double work = pass();
    rates.push_back(work / seconds_since(start));
  }
  const auto middle = rates.begin() + static_cast<std::ptrdiff_t>(rates.size() / 2);
  std::nth_element(rates.begin(), middle, rates.end());
  return *middle;
}

constexpr std::int64_t kChunk = (1 << 20) / 4;  // numbers that a thread reads at a time, 1 MiB

}  // namespace

double measure_read_bandwidth(const CpuContext& ctx, std::span<const std::byte> memory,
                              double seconds) {
  const std::int64_t chunks = std::ssize(memory) / (4 * kChunk);
  if (chunks == 0) {
    throw InvalidRequestError("Of " + std::to_string(memory.size()) +
                              " bytes no read bandwidth can be measured; give 1 MiB or more.");
  }
  if (reinterpret_cast<std::uintptr_t>(memory.data()) % alignof(std::uint32_t) != 0) {
    throw InvalidRequestError(
        "The read bandwidth is measured from a multiple of 4 on, where this memory does not "
        "begin; leave out its first bytes.");
  }
  const auto* data = reinterpret_cast<const std::uint32_t*>(memory.data());
  std::atomic<std::uint32_t> checksum{0};  // so that no read can be left out
  return median_rate(seconds, [&] {
    ctx.parallel_for(chunks, [&](std::int64_t chunk, int) {
      checksum.fetch_xor(ctx.kernels().read(data + chunk * kChunk, kChunk),
                         std::memory_order_relaxed);
    });
    return static_cast<double>(4 * kChunk * chunks);
  });
}

double measure_read_bandwidth(const CpuContext& ctx, double seconds) {
  constexpr std::int64_t kChunks = 1024;
  std::unique_ptr<std::uint32_t[]> data;
  try {
    data = std::make_unique_for_overwrite<std::uint32_t[]>(kChunk * kChunks);
  } catch (const std::bad_alloc&) {
    throw CapacityError(
        "Measuring the read bandwidth takes 1 GiB of memory, which is not to be had. "
        "Free some, or measure on a larger machine.");
  }
  // Written first: pages never touched are all one page of zeros, which the cache holds.
  ctx.parallel_for(kChunks, [&](std::int64_t chunk, int) {
    std::fill_n(data.get() + chunk * kChunk, kChunk, static_cast<std::uint32_t>(chunk));
  });
  return measure_read_bandwidth(ctx, std::as_bytes(std::span(data.get(), kChunk * kChunks)),
                                seconds);
}

double measure_arithmetic(const CpuContext& ctx, double seconds) {
  constexpr std::int64_t kRounds = 1 << 18;  // a few milliseconds
  const std::vector<float> operands(64, 1.0f);
  std::vector<float> results(static_cast<std::size_t>(ctx.num_threads()));
  std::vector<double> work(results.size());
  return median_rate(seconds, [&] {
    ctx.parallel_for(ctx.num_threads(), [&](std::int64_t share, int) {
      const auto i = static_cast<std::size_t>(share);
      work[i] = ctx.kernels().multiply_registers(kRounds, operands.data(), &results[i]);
    });
    double total = 0;
    for (const double part : work) total += part;
    return total;
  });
}

}  // namespace tinyvllm

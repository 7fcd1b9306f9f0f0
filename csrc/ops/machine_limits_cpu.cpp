#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
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

}  // namespace

double measure_read_bandwidth(const CpuContext& ctx, double seconds) {
  constexpr std::int64_t kChunk = (1 << 20) / 4, kChunks = 1024;  // 1 MiB each
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
  std::atomic<std::uint32_t> checksum{0};  // so that no read can be left out
  return median_rate(seconds, [&] {
    ctx.parallel_for(kChunks, [&](std::int64_t chunk, int) {
      checksum.fetch_xor(ctx.kernels().read(data.get() + chunk * kChunk, kChunk),
                         std::memory_order_relaxed);
    });
    return static_cast<double>(kChunk * kChunks * 4);
  });
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

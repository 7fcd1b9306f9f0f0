#include "base/host.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(TINYVLLM_HAS_AMX)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>
#include <set>
#include <sstream>
#include <utility>

namespace tinyvllm {
namespace {

namespace fs = std::filesystem;

std::optional<std::int64_t> read_integer(const fs::path& path) {
  std::ifstream file(path);
  std::int64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;  // absent, or the word "max"
}

// The directories of this process's cgroup and of its ancestors, under one controller's mount.
// `controller` is empty for cgroup v2.
std::vector<fs::path> cgroup_directories(const std::string& controller) {
  std::ifstream file("/proc/self/cgroup");
  const fs::path mount =
      controller.empty() ? fs::path("/sys/fs/cgroup") : fs::path("/sys/fs/cgroup") / controller;
  std::vector<fs::path> directories;
  for (std::string line; std::getline(file, line);) {  // "hierarchy:controllers:path"
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::istringstream controllers(line.substr(first + 1, second - first - 1));
    bool matches = controller.empty() && second == first + 1;
    for (std::string name; std::getline(controllers, name, ',');) {
      matches = matches || (!controller.empty() && name == controller);
    }
    if (!matches) continue;
    for (fs::path relative = fs::path(line.substr(second + 1)).relative_path(); !relative.empty();
         relative = relative.parent_path()) {
      directories.push_back(mount / relative);
    }
  }
  directories.push_back(mount);  // inside a container the mount itself is our cgroup
  return directories;
}

// Bytes of a cgroup's usage that are cached file pages. The kernel takes them back before it
// refuses memory, and a container that has just downloaded a model is full of them.
std::int64_t cached_file_bytes(const fs::path& stat_file, const std::string& prefix) {
  std::ifstream file(stat_file);
  std::int64_t total = 0, bytes = 0;
  for (std::string key; file >> key >> bytes;) {
    if (key == prefix + "inactive_file" || key == prefix + "active_file") total += bytes;
  }
  return total;
}

double cpu_quota() {
  double quota = std::numeric_limits<double>::infinity();
  for (const fs::path& directory : cgroup_directories("")) {
    std::ifstream file(directory / "cpu.max");
    double limit = 0, period = 0;
    if (file >> limit >> period && period > 0) quota = std::min(quota, limit / period);
  }
  for (const fs::path& directory : cgroup_directories("cpu")) {
    const auto limit = read_integer(directory / "cpu.cfs_quota_us");
    const auto period = read_integer(directory / "cpu.cfs_period_us");
    if (limit && period && *limit > 0 && *period > 0) {
      quota = std::min(quota, static_cast<double>(*limit) / static_cast<double>(*period));
    }
  }
  return quota;
}

int physical_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) {
    return static_cast<int>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
  }
  std::set<std::pair<std::int64_t, std::int64_t>> cores;  // (package, core)
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    const fs::path topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology";
    const auto package = read_integer(topology / "physical_package_id");
    const auto core = read_integer(topology / "core_id");
    cores.emplace(package.value_or(-1), core.value_or(cpu));
  }
  return std::max(1, static_cast<int>(cores.size()));
}

#if defined(TINYVLLM_HAS_AMX)
// Whether the CPU has AMX for bfloat16 and the system lets this process use its tile registers, which
// it has to ask for: their 8 KiB make its threads' saved state larger.
bool may_use_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> isas;
#if defined(TINYVLLM_HAS_AVX512BF16)  // and so the others
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(TINYVLLM_HAS_AMX)
  static const bool amx = avx512bf16 && may_use_amx();
  if (amx) isas.emplace_back("amx");
#endif
  // vdpbf16ps multiplies half as fast as float32 on the Xeons measured, twice as fast on a Zen 4.
  const bool float32_is_faster = __builtin_cpu_is("intel");
  if (avx512bf16 && !float32_is_faster) isas.emplace_back("avx512bf16");
  if (avx512) isas.emplace_back("avx512");
  if (avx512bf16 && float32_is_faster) isas.emplace_back("avx512bf16");
  if (avx2) isas.emplace_back("avx2");
#endif
  isas.emplace_back("portable");
  return isas;
}

int default_num_threads() {
  const double quota = cpu_quota();
  const int cores = physical_cores();
  return quota < cores ? std::max(1, static_cast<int>(std::ceil(quota))) : cores;
}

double thread_cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

std::int64_t available_memory() {
  std::int64_t available = std::numeric_limits<std::int64_t>::max();
  std::ifstream meminfo("/proc/meminfo");
  for (std::string key, unit; meminfo >> key;) {
    std::int64_t kilobytes = 0;
    meminfo >> kilobytes;
    std::getline(meminfo, unit);
    if (key == "MemAvailable:") available = kilobytes * 1024;
  }
  const auto cap = [&](const fs::path& directory, const char* limit_file, const char* usage_file,
                       const char* stat_prefix) {
    const auto limit = read_integer(directory / limit_file);
    const auto usage = read_integer(directory / usage_file);
    if (!limit || !usage) return;
    const std::int64_t needed = std::max<std::int64_t>(
        0, *usage - cached_file_bytes(directory / "memory.stat", stat_prefix));
    available = std::min(available, std::max<std::int64_t>(0, *limit - needed));
  };
  for (const fs::path& directory : cgroup_directories("")) {
    cap(directory, "memory.max", "memory.current", "");
  }
  for (const fs::path& directory : cgroup_directories("memory")) {
    cap(directory, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_");
  }
  return available;
}

}  // namespace tinyvllm

#include "cuda/emulator/runtime.h"

#include <chrono>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator = tinyvllm::cuda::emulator;
using emulator::Kernel;
using emulator::KernelError;

// --- What lies in a stream ------------------------------------------------------------------------

// An event is done when as many recordings of it have run as were queued.
struct EventState {
  std::uint64_t num_queued = 0, num_done = 0;
  std::chrono::steady_clock::time_point time;
};

struct CUevent_st {
  std::shared_ptr<EventState> state = std::make_shared<EventState>();
};

namespace {

// A kernel on its way: which of its blocks have begun before the kernel in front had ended.
class Grid {
 public:
  Grid(const Kernel& kernel, emulator::Random& random) : kernel_(kernel), random_(random) {
    remaining_.resize(static_cast<std::size_t>(kernel.grid.x) * kernel.grid.y * kernel.grid.z);
    for (std::size_t i = 0; i < remaining_.size(); ++i) remaining_[i] = i;
  }

  // Runs a few blocks up to wait_for_previous(). Not all: each keeps its threads' stacks.
  void begin_early() {
    constexpr int kEarlyBlocks = 4;
    for (int i = 0; i < kEarlyBlocks && !remaining_.empty(); ++i) {
      auto block = std::make_unique<emulator::Block>(kernel_, take_block(), random_);
      block->run(false);
      waited_ |= block->waited_for_previous();
      if (!block->ended()) early_.push_back(std::move(block));
    }
  }

  // Runs all that is left, in random order.
  void finish() {
    while (!early_.empty() || !remaining_.empty()) {
      if (random_.below(early_.size() + remaining_.size()) < early_.size()) {
        const std::size_t pick = random_.below(early_.size());
        early_[pick]->run(true);
        early_.erase(early_.begin() + static_cast<std::ptrdiff_t>(pick));
      } else {
        emulator::Block block(kernel_, take_block(), random_);
        block.run(true);
        waited_ |= block.waited_for_previous();
      }
    }
    if (kernel_.overlaps_previous && !waited_) {
      throw KernelError("kernel " + kernel_.name +
                        " overlaps the one before it and never calls wait_for_previous(): what "
                        "comes after it could begin before what came before it has ended.");
    }
  }

 private:
  uint3 take_block() {
    const std::size_t pick = random_.below(remaining_.size());
    const std::size_t n = remaining_[pick];
    remaining_[pick] = remaining_.back();
    remaining_.pop_back();
    const std::size_t x = kernel_.grid.x, y = kernel_.grid.y;
    return {static_cast<unsigned>(n % x), static_cast<unsigned>(n / x % y),
            static_cast<unsigned>(n / (x * y))};
  }

  const Kernel& kernel_;
  emulator::Random& random_;
  std::vector<std::size_t> remaining_;
  std::vector<std::unique_ptr<emulator::Block>> early_;
  bool waited_ = false;
};

struct Entry {
  std::shared_ptr<const Kernel> kernel;  // a launch,
  std::function<void()> action;          // or something else that runs,
  std::shared_ptr<EventState> record;    // or the recording of an event,
  std::shared_ptr<EventState> wait;      // or the wait for its `ticket`-th recording
  std::uint64_t ticket = 0;
  std::unique_ptr<Grid> begun;  // a kernel of which some blocks have begun
};

// What is queued again and again by replays of a graph.
struct Recorded {
  std::shared_ptr<const Kernel> kernel;
  std::function<void()> action;
};

}  // namespace

struct CUgraph_st {
  std::vector<Recorded> entries;
  bool invalid = false;
};

struct CUgraphExec_st {
  std::vector<Recorded> entries;
};

struct CUstream_st {
  std::deque<Entry> queue;
  std::unique_ptr<CUgraph_st> capture;
};

// --- The device -----------------------------------------------------------------------------------

namespace {

std::uint64_t number_from(const char* variable, std::uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 10);
}

struct Device {
  std::recursive_mutex mutex;
  emulator::Random random{number_from("TINYVLLM_EMULATOR_SEED", 1)};
  std::set<CUstream_st*> streams;
  std::string failure;  // of a kernel; the next call that waits returns it

  // --- Memory ---
  struct Region {
    std::size_t bytes;
    bool on_device;
  };
  std::size_t total = number_from("TINYVLLM_EMULATOR_MEMORY", 512) << 20;
  std::size_t used = 0;
  std::map<const std::byte*, Region> memory;  // by its first byte
  // Freed memory is not given out again at once, so that a stale pointer finds NaN.
  std::deque<std::pair<std::byte*, std::size_t>> freed;
  std::size_t freed_bytes = 0;

  static Device& get() {
    static Device device;
    return device;
  }

  std::byte* allocate(std::size_t bytes, bool on_device) {
    void* pointer = nullptr;
    if (posix_memalign(&pointer, 256, bytes) != 0) return nullptr;
    std::memset(pointer, 0xff, bytes);
    auto* start = static_cast<std::byte*>(pointer);
    memory[start] = {bytes, on_device};
    if (on_device) used += bytes;
    return start;
  }

  bool release(void* pointer, bool on_device) {
    const auto found = memory.find(static_cast<std::byte*>(pointer));
    if (found == memory.end() || found->second.on_device != on_device) return false;
    const std::size_t bytes = found->second.bytes;
    memory.erase(found);
    if (!on_device) {
      std::free(pointer);
      return true;
    }
    used -= bytes;
    std::memset(pointer, 0xff, bytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(pointer, bytes);
#endif
    freed.emplace_back(static_cast<std::byte*>(pointer), bytes);
    freed_bytes += bytes;
    constexpr std::size_t kQuarantine = std::size_t{64} << 20;
    while (freed_bytes > kQuarantine) {
      const auto [oldest, size] = freed.front();
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(oldest, size);
#endif
      std::free(oldest);
      freed_bytes -= size;
      freed.pop_front();
    }
    return true;
  }

  // The memory that holds the address, its end included, or null.
  const Region* find(const void* address, std::size_t bytes, std::size_t* room = nullptr) const {
    const auto* byte = static_cast<const std::byte*>(address);
    auto after = memory.upper_bound(byte);
    if (after == memory.begin()) return nullptr;
    --after;
    const auto offset = static_cast<std::size_t>(byte - after->first);
    if (offset > after->second.bytes) return nullptr;
    if (room != nullptr) *room = after->second.bytes - offset;
    return offset + bytes <= after->second.bytes ? &after->second : nullptr;
  }

  void check_pointers(const Kernel& kernel) const {
    for (const void* pointer : kernel.pointers) {
      if (find(pointer, 0) == nullptr) {
        throw KernelError("kernel " + kernel.name +
                          " got a pointer that is not in allocated device memory: the memory was "
                          "freed (a graph keeps the pointers that it was captured with), or the "
                          "pointer is the host's.");
      }
    }
  }

  void check_range(const void* address, std::size_t bytes, const char* what) const {
    const Region* region = find(address, bytes);
    if (region == nullptr || !region->on_device) {
      throw KernelError(std::string(what) + " of " + std::to_string(bytes) +
                        " bytes is not within one piece of allocated device memory.");
    }
  }

  // --- Execution ---

  bool runnable(const CUstream_st& stream) const {
    if (stream.queue.empty()) return false;
    const Entry& entry = stream.queue.front();
    return entry.wait == nullptr || entry.wait->num_done >= entry.ticket;
  }

  void begin(Entry& entry) {
    if (entry.begun != nullptr) return;
    check_pointers(*entry.kernel);
    entry.begun = std::make_unique<Grid>(*entry.kernel, random);
  }

  // The kernels behind the first entry that may overlap it: the next one always begins early, those
  // behind that one sometimes.
  void begin_followers(CUstream_st& stream) {
    for (std::size_t i = 1; i < stream.queue.size(); ++i) {
      Entry& next = stream.queue[i];
      if (next.kernel == nullptr || !next.kernel->overlaps_previous) return;
      if (i > 1 && random.below(2) == 0) return;
      if (next.begun != nullptr) continue;
      begin(next);
      next.begun->begin_early();
    }
  }

  void run_first(CUstream_st& stream) {
    Entry& entry = stream.queue.front();
    if (entry.kernel != nullptr) {
      begin(entry);
      begin_followers(stream);
      entry.begun->finish();
    } else if (entry.action) {
      entry.action();
    } else if (entry.record != nullptr) {
      ++entry.record->num_done;
      entry.record->time = std::chrono::steady_clock::now();
    }
    stream.queue.pop_front();
  }

  // Runs entries of streams drawn at random until done(). A failure drops all that is queued.
  template <typename Done>
  cudaError_t run_until(Done done) {
    while (failure.empty() && !done()) {
      std::vector<CUstream_st*> able;
      for (CUstream_st* stream : streams) {
        if (runnable(*stream)) able.push_back(stream);
      }
      if (able.empty()) {
        fail("the streams wait for each other's events.");
        break;
      }
      try {
        run_first(*able[random.below(able.size())]);
      } catch (const std::exception& error) {
        fail(error.what());
      }
    }
    return take_failure();
  }

  bool idle() const {
    for (const CUstream_st* stream : streams) {
      if (!stream->queue.empty()) return false;
    }
    return true;
  }

  void fail(const std::string& what) {
    failure = what;
    for (CUstream_st* stream : streams) {
      for (const Entry& entry : stream->queue) {
        if (entry.record != nullptr) ++entry.record->num_done;
      }
      stream->queue.clear();
    }
  }

  // The text stays for cudaGetErrorString until the next failure.
  cudaError_t take_failure() {
    if (failure.empty()) return cudaSuccess;
    last_failure = std::move(failure);
    failure.clear();
    return cudaErrorLaunchFailure;
  }
  std::string last_failure = "unspecified launch failure";

  cudaError_t queue(CUstream_st* stream, Entry entry) {
    if (stream->capture != nullptr) {
      if (entry.kernel == nullptr && !entry.action) {  // an event: graphs here are plain lists
        stream->capture->invalid = true;
        return cudaErrorStreamCaptureUnsupported;
      }
      stream->capture->entries.push_back({std::move(entry.kernel), std::move(entry.action)});
      return cudaSuccess;
    }
    stream->queue.push_back(std::move(entry));
    return cudaSuccess;
  }

  // Waiting and allocating are not allowed while a stream records, and spoil what it recorded.
  bool spoils_capture() {
    bool capturing = false;
    for (CUstream_st* stream : streams) {
      if (stream->capture == nullptr) continue;
      stream->capture->invalid = true;
      capturing = true;
    }
    return capturing;
  }
};

// The device, held by one thread of the host at a time.
struct Held {
  std::unique_lock<std::recursive_mutex> lock{Device::get().mutex};
  Device* operator->() { return &Device::get(); }
};

}  // namespace

namespace tinyvllm::cuda::emulator {

cudaError_t launch(cudaStream_t stream, Kernel kernel) {
  constexpr std::size_t kMaxSharedBytes = 227 * 1024;  // of compute capability 9.0, opted in
  const bool valid = kernel.grid.x > 0 && kernel.grid.y > 0 && kernel.grid.z > 0 &&
                     kernel.grid.y <= 65535 && kernel.grid.z <= 65535 && kernel.block.x > 0 &&
                     kernel.block.y > 0 && kernel.block.z > 0 && kernel.block.z <= 64 &&
                     kernel.num_threads() <= 1024 && kernel.shared_bytes <= kMaxSharedBytes;
  if (!valid) return cudaErrorInvalidConfiguration;
  Held device;
  Entry entry;
  entry.kernel = std::make_shared<Kernel>(std::move(kernel));
  return device->queue(stream, std::move(entry));
}

cudaError_t enqueue(cudaStream_t stream, const std::string& name, std::function<void()> action) {
  Held device;
  Entry entry;
  entry.action = [name, action = std::move(action)] {
    try {
      action();
    } catch (const std::exception& error) {
      throw KernelError(name + ": " + error.what());
    }
  };
  return device->queue(stream, std::move(entry));
}

}  // namespace tinyvllm::cuda::emulator

// --- The runtime's functions ----------------------------------------------------------------------

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorLaunchFailure:
      return Device::get().last_failure.c_str();
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    default:
      return "unknown error";
  }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  *properties = {"emulated GPU"};
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 3;  // odd, so that work seldom divides evenly
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 * 1024;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaDeviceSynchronize() {
  Held device;
  if (device->spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  return device->run_until([&] { return device->idle(); });
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  Held device;
  *memory = nullptr;
  if (device->spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  if (bytes == 0) return cudaSuccess;
  if (bytes > device->total - device->used) return cudaErrorMemoryAllocation;
  *memory = device->allocate(bytes, true);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  Held device;
  if (device->spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  // As on the GPU, what is queued runs first.
  const cudaError_t error = device->run_until([&] { return device->idle(); });
  return device->release(memory, true) ? error : cudaErrorInvalidValue;
}

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  Held device;
  if (device->spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  *memory = device->allocate(bytes, false);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  Held device;
  const cudaError_t error = device->run_until([&] { return device->idle(); });
  return device->release(memory, false) ? error : cudaErrorInvalidValue;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  Held device;
  *free = device->total - device->used;
  *total = device->total;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  return emulator::enqueue(stream, "cudaMemcpyAsync", [=] {
    Held device;
    if (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) {
      device->check_range(to, bytes, "the target");
    }
    if (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) {
      device->check_range(from, bytes, "the source");
    }
    std::memmove(to, from, bytes);
  });
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  return emulator::enqueue(stream, "cudaMemsetAsync", [=] {
    Held device;
    device->check_range(memory, bytes, "the target");
    std::memset(memory, value, bytes);
  });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  Held device;
  *stream = new CUstream_st;
  device->streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Held device;
  const cudaError_t error = device->run_until([&] { return stream->queue.empty(); });
  device->streams.erase(stream);
  delete stream;
  return error;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Held device;
  if (device->spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  return device->run_until([&] { return stream->queue.empty(); });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Held device;
  Entry entry;
  entry.wait = event->state;
  entry.ticket = event->state->num_queued;
  return device->queue(stream, std::move(entry));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Held device;
  Entry entry;
  entry.record = event->state;
  const cudaError_t error = device->queue(stream, std::move(entry));
  if (error == cudaSuccess) ++event->state->num_queued;
  return error;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Held device;
  if (device->spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  const std::uint64_t ticket = event->state->num_queued;
  return device->run_until([&] { return event->state->num_done >= ticket; });
}

// Who asks again and again must get there: every question lets one entry run.
cudaError_t cudaEventQuery(cudaEvent_t event) {
  Held device;
  bool ran = false;
  const cudaError_t error = device->run_until([&] {
    return std::exchange(ran, true) || event->state->num_done >= event->state->num_queued;
  });
  if (error != cudaSuccess) return error;
  return event->state->num_done >= event->state->num_queued ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds =
      std::chrono::duration<float, std::milli>(end->state->time - start->state->time).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  Held device;
  if (stream->capture != nullptr) return cudaErrorInvalidValue;
  stream->capture = std::make_unique<CUgraph_st>();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Held device;
  *graph = nullptr;
  if (stream->capture == nullptr) return cudaErrorInvalidValue;
  const std::unique_ptr<CUgraph_st> captured = std::move(stream->capture);
  if (captured->invalid) return cudaErrorStreamCaptureInvalidated;
  *graph = new CUgraph_st(*captured);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  *executable = new CUgraphExec_st{graph->entries};
  // Nothing of a graph begins before all of what was queued in front of it has ended.
  auto& entries = (*executable)->entries;
  if (!entries.empty() && entries.front().kernel != nullptr) {
    auto first = std::make_shared<Kernel>(*entries.front().kernel);
    first->overlaps_previous = false;
    entries.front().kernel = std::move(first);
  }
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  Held device;
  for (const Recorded& recorded : executable->entries) {
    Entry entry;
    entry.kernel = recorded.kernel;
    entry.action = recorded.action;
    const cudaError_t error = device->queue(stream, std::move(entry));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

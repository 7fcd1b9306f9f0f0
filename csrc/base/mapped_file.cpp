#include "base/mapped_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <system_error>

#include "base/errors.h"
#include "base/printable.h"

namespace tinyvllm {

// An entry of the list below. It belongs to one mapping at a time, and to none while begin == end.
struct MappedRange {
  std::atomic<std::uint64_t> version{0};  // odd while begin and end are being changed
  std::atomic<std::uintptr_t> begin{0};
  std::atomic<std::uintptr_t> end{0};
  std::atomic<bool> failed{false};
  MappedRange* next = nullptr;  // never changes once the entry is in the list

  void set(std::uintptr_t new_begin, std::uintptr_t new_end) {
    version.fetch_add(1);
    begin.store(new_begin);
    end.store(new_end);
    version.fetch_add(1);
  }
};

namespace {

static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(std::atomic<std::uintptr_t>::is_always_lock_free);
static_assert(std::atomic<MappedRange*>::is_always_lock_free);

// The process-wide state. The list only grows, and its entries are used again instead of freed, so
// that the handler may walk it at any moment without a lock.
std::atomic<MappedRange*> g_ranges{nullptr};
std::mutex g_ranges_mutex;  // for those who change the list; the handler never takes it
struct sigaction g_previous_handler;
std::uintptr_t g_page_size;

// The range that holds `address`, or null. A version that is odd or changes while we look belongs
// to a mapping that is just being made or unmade, hence not to one that anybody reads from.
MappedRange* find_range(std::uintptr_t address) {
  for (MappedRange* range = g_ranges.load(); range != nullptr; range = range->next) {
    const std::uint64_t version = range->version.load();
    const bool inside = address >= range->begin.load() && address < range->end.load();
    if (inside && version % 2 == 0 && range->version.load() == version) return range;
  }
  return nullptr;
}

void call_previous_handler(int signal, siginfo_t* info, void* context) {
  const struct sigaction& previous = g_previous_handler;
  const bool raised_by_access = info->si_code > 0;  // else sent by kill() or raise()
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else if (previous.sa_handler == SIG_DFL || raised_by_access) {
    // Nobody handles it: let it do what it does without us. A faulting access runs again when we
    // return and faults for good (the kernel does not let a fault be ignored); a signal that was
    // sent is sent again.
    struct sigaction fatal{};
    fatal.sa_handler = SIG_DFL;
    sigaction(signal, &fatal, nullptr);
    if (!raised_by_access) raise(signal);
  }
}

// Runs in the middle of any instruction that reads a mapping: only lock-free loads and stores and
// system calls. The flag is set before the zeros appear, so that nobody can compute on them and
// then find it unset.
void handle_sigbus(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  bool ours = false;
  if (info->si_code > 0) {  // else si_addr means nothing
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    if (MappedRange* range = find_range(address)) {
      range->failed.store(true);
      void* page = reinterpret_cast<void*>(address & ~(g_page_size - 1));
      ours = mmap(page, g_page_size, PROT_READ, MAP_FIXED | MAP_ANONYMOUS | MAP_PRIVATE, -1, 0) ==
             page;
    }
  }
  if (!ours) call_previous_handler(signal, info, context);
  errno = saved_errno;
}

void install_handler_once() {
  static const bool installed = [] {
    g_page_size = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    // Asked for first, so that it is in place should the handler run at once in another thread.
    sigaction(SIGBUS, nullptr, &g_previous_handler);
    struct sigaction ours{};
    ours.sa_sigaction = handle_sigbus;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, nullptr);
    return true;
  }();
  static_cast<void>(installed);
}

MappedRange* register_range(std::uintptr_t begin, std::uintptr_t end) {
  const std::lock_guard lock(g_ranges_mutex);
  MappedRange* range = g_ranges.load();
  while (range != nullptr && range->begin.load() != range->end.load()) range = range->next;
  const bool reused = range != nullptr;
  if (!reused) range = std::make_unique<MappedRange>().release();  // stays in the list for good
  range->failed.store(false);
  range->set(begin, end);
  if (!reused) {
    range->next = g_ranges.load();
    g_ranges.store(range);
  }
  return range;
}

void release_range(MappedRange* range) {
  const std::lock_guard lock(g_ranges_mutex);
  range->set(0, 0);
}

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& what) {
  throw CheckpointError(printable(path) + ": " + what);
}

std::string reason(int error) { return std::generic_category().message(error); }

const char* kind_of(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path) {
  install_handler_once();
  // O_NONBLOCK: a pipe without a writer would otherwise never come back. It means nothing to a
  // regular file.
  const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0) {
    const int error = errno;
    std::error_code ignored;
    if (error == ENOENT && std::filesystem::is_symlink(path, ignored)) {
      fail(path, "is a symbolic link to " +
                     printable(std::filesystem::read_symlink(path, ignored)) +
                     ", which does not exist. Download the model again.");
    }
    fail(path, "cannot be opened: " + reason(error) + ". Check the path and its permissions.");
  }
  struct stat opened{};
  if (fstat(fd.get(), &opened) != 0) fail(path, "cannot be examined: " + reason(errno) + ".");
  if (!S_ISREG(opened.st_mode)) {
    fail(path, std::string("is ") + kind_of(opened.st_mode) + ", not a file. Give a regular file.");
  }
  if (opened.st_size == 0) fail(path, "is empty (0 bytes). Download it again.");

  const auto size = static_cast<std::size_t>(opened.st_size);
  void* address = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (address == MAP_FAILED) {
    fail(path, "cannot be mapped (" + std::to_string(size) + " bytes): " + reason(errno) +
                   ". Check `ulimit -v`.");
  }
  const std::span bytes(static_cast<const std::byte*>(address), size);
  std::unique_ptr<const MappedFile> file;
  try {
    file.reset(new MappedFile(path, opened, bytes));
  } catch (...) {
    munmap(address, size);
    throw;
  }
  return file;  // from here on the destructor unmaps
}

MappedFile::MappedFile(const std::filesystem::path& path, const struct stat& opened,
                       std::span<const std::byte> bytes)
    : path_(path), absolute_path_(std::filesystem::absolute(path)), opened_(opened), bytes_(bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes.data());
  const std::uintptr_t length = (bytes.size() + g_page_size - 1) & ~(g_page_size - 1);
  range_ = register_range(begin, begin + length);
}

MappedFile::~MappedFile() {
  release_range(range_);  // first: once unmapped, the addresses may belong to somebody else
  munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

void MappedFile::populate_pages(std::span<const std::byte> range) const noexcept {
#if defined(MADV_POPULATE_READ)  // Linux 5.14
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(range.data());
  const std::uintptr_t first = begin & ~(g_page_size - 1);
  madvise(reinterpret_cast<void*>(first), begin + range.size() - first, MADV_POPULATE_READ);
#endif
}

void MappedFile::release_pages(std::span<const std::byte> range) const noexcept {
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(range.data());
  const std::uintptr_t first = (begin + g_page_size - 1) & ~(g_page_size - 1);
  const std::uintptr_t end = (begin + range.size()) & ~(g_page_size - 1);
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

bool MappedFile::failed() const noexcept { return range_->failed.load(); }

void MappedFile::check() const {
  const std::string advice =
      " since it was opened. Load the model again, from a copy that nobody writes to.";
  struct stat now{};
  if (stat(absolute_path_.c_str(), &now) != 0) {
    const int error = errno;
    fail(path_, "is gone (" + reason(error) + ")" + advice);
  }
  const auto changed = [&](const std::string& what, auto before, auto after) {
    fail(path_, what + " changed from " + std::to_string(before) + " to " + std::to_string(after) +
                    advice);
  };
  if (now.st_size != opened_.st_size) changed("its size in bytes", opened_.st_size, now.st_size);
  if (now.st_ino != opened_.st_ino) changed("its inode", opened_.st_ino, now.st_ino);
  if (now.st_dev != opened_.st_dev) changed("its device", opened_.st_dev, now.st_dev);
  const auto nanoseconds = [](const struct stat& s) {
    return static_cast<std::int64_t>(s.st_mtim.tv_sec) * 1'000'000'000 + s.st_mtim.tv_nsec;
  };
  if (nanoseconds(now) != nanoseconds(opened_)) {
    changed("its modification time (ns)", nanoseconds(opened_), nanoseconds(now));
  }
  if (failed()) {
    fail(path_,
         "part of its " + std::to_string(bytes_.size()) +
             " bytes could not be read. The disk may be failing or the file was cut off for a"
             " moment; copy or download it again.");
  }
}

}  // namespace tinyvllm

// Files mapped read-only into memory, and what keeps a damaged one from killing the process.
//
// A weight is used where it lies in the mapping, so a page is read from disk when it is first
// touched. If somebody has cut the file off by then, the read raises SIGBUS. The first mapping
// installs one SIGBUS handler, which is the only process-wide state of the engine. For an address
// inside one of our mappings it sets that mapping's failed flag and puts a page of zeros there, so
// that the read goes on; whoever computes on the mapping looks at failed() before results leave.
// Any other address goes to the handler that was there before. (A handler that another library
// installs later comes before ours.)
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>

namespace tinyvllm {

struct MappedRange;  // the mapping's entry in the list that the SIGBUS handler reads

// One whole file, mapped read-only and unmapped by the destructor. Nothing is read ahead of need but
// by populate_pages().
class MappedFile {
 public:
  // Throws CheckpointError if the file is missing, unreadable, empty or not a regular file.
  // Symbolic links are followed.
  static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path);

  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  // The start is aligned to a page.
  std::span<const std::byte> bytes() const { return bytes_; }
  const std::filesystem::path& path() const { return path_; }

  // Puts the pages of `range` into this process's memory, as touching each of them would, but without
  // a fault for each. Where the system cannot, it does nothing.
  void populate_pages(std::span<const std::byte> range) const noexcept;

  // Takes the whole pages in `range` out of this process's memory; they are read again when touched.
  void release_pages(std::span<const std::byte> range) const noexcept;

  // True once a page of the file could not be read: what was computed from it is worthless. One
  // atomic load; for use after every step.
  bool failed() const noexcept;

  // Throws CheckpointError if failed(), or if the file's size, modification time or inode differ
  // from when it was opened. One stat; for use after loading and on any failure.
  void check() const;

 private:
  MappedFile(const std::filesystem::path& path, const struct stat& opened,
             std::span<const std::byte> bytes);

  std::filesystem::path path_;           // as the caller wrote it, for messages
  std::filesystem::path absolute_path_;  // for check(), which may run after a chdir
  struct stat opened_;
  std::span<const std::byte> bytes_;
  MappedRange* range_;
};

}  // namespace tinyvllm

// A fiber: a function with a stack of its own that can stop in the middle and go on later. The
// emulator runs each thread of a block as one, all on the same core, and so decides who runs when.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace tinyvllm::cuda::emulator {

// Memory for the stack of one fiber. The page below it is forbidden: a kernel that overflows its
// stack crashes there instead of writing into a neighbour's.
class Stack {
 public:
  static constexpr std::size_t kBytes = 256 * 1024;  // touched only as far as it is used

  Stack();  // throws std::bad_alloc
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  std::byte* bottom() const { return bottom_; }

 private:
  std::byte* bottom_;
};

class Fiber {
 public:
  // `entry` runs at the first resume(). It must not throw. A fiber may be dropped before it has
  // ended; what is on its stack is then forgotten, not destroyed.
  Fiber(void (*entry)(void*), void* argument);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs the fiber until it suspends or ends. Not from inside a fiber.
  void resume();
  // Goes back to whoever called resume(). From inside the fiber that runs.
  static void suspend();

  bool ended() const { return ended_; }

 private:
  friend struct FiberSwitch;

  void (*entry_)(void*);
  void* argument_;
  std::unique_ptr<Stack> stack_;
  void* context_;               // where it stopped: the top of its stack, or a ucontext
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  bool ended_ = false;
};

}  // namespace tinyvllm::cuda::emulator

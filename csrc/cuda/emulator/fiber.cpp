#include "cuda/emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || defined(TINYVLLM_EMULATOR_UCONTEXT)
#include <ucontext.h>
#define TINYVLLM_FIBERS_BY_UCONTEXT
#endif

namespace tinyvllm::cuda::emulator {
namespace {

constexpr std::size_t kGuard = 64 * 1024;  // at least one page, whatever its size

// Stacks of fibers that have ended, for the next ones: most blocks follow one of the same size.
std::vector<std::unique_ptr<Stack>>& free_stacks() {
  static std::vector<std::unique_ptr<Stack>> stacks;
  return stacks;
}

std::unique_ptr<Stack> take_stack() {
  if (free_stacks().empty()) return std::make_unique<Stack>();
  std::unique_ptr<Stack> stack = std::move(free_stacks().back());
  free_stacks().pop_back();
  return stack;
}

}  // namespace

Stack::Stack() {
  void* memory = mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuard, PROT_NONE);
  bottom_ = static_cast<std::byte*>(memory) + kGuard;
}

Stack::~Stack() { munmap(bottom_ - kGuard, kGuard + kBytes); }

// --- The switch -----------------------------------------------------------------------------------

#ifdef TINYVLLM_FIBERS_BY_UCONTEXT

namespace {

void switch_context(void** from, void* to) {
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
void* new_context() { return new ucontext_t; }
void prepare(void*& context, const Stack& stack, void (*begin)()) {
  context = new_context();
  auto* prepared = static_cast<ucontext_t*>(context);
  getcontext(prepared);
  prepared->uc_stack.ss_sp = stack.bottom();
  prepared->uc_stack.ss_size = Stack::kBytes;
  prepared->uc_link = nullptr;
  makecontext(prepared, begin, 0);
}

}  // namespace

#else

// Ten instructions in place of swapcontext, which asks the kernel to change the signal mask each
// time: a warp shuffle of the emulator is 32 switches. The registers that a function must keep go to
// the old stack, and come from the new one; `from` receives the old stack's top.
asm(R"(
  .text
  .type tinyvllm_switch_stack, @function
tinyvllm_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size tinyvllm_switch_stack, .-tinyvllm_switch_stack
)");
extern "C" void tinyvllm_switch_stack(void** from, void* to);

namespace {

void switch_context(void** from, void* to) { tinyvllm_switch_stack(from, to); }
void* new_context() { return nullptr; }
void prepare(void*& context, const Stack& stack, void (*begin)()) {
  auto* top = reinterpret_cast<std::uintptr_t*>(stack.bottom() + Stack::kBytes);
  *--top = 0;  // where `begin` would return to; it never does, but a call aligns the stack so
  *--top = reinterpret_cast<std::uintptr_t>(begin);
  for (int i = 0; i < 6; ++i) *--top = 0;  // the six registers
  context = top;
}

}  // namespace

#endif

// Who runs, and where the caller of resume() stopped.
struct FiberSwitch {
  static inline Fiber* running = nullptr;
  static inline void* caller = new_context();

#if defined(__SANITIZE_ADDRESS__)
  static inline const void* caller_bottom = nullptr;
  static inline std::size_t caller_size = 0;
#endif

  static void to_fiber(Fiber& fiber) {
    running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack_->bottom(), Stack::kBytes);
    switch_context(&caller, fiber.context_);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    switch_context(&caller, fiber.context_);
#endif
    running = nullptr;
  }

  static void to_caller(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber.ended_ ? nullptr : &fiber.fake_stack_, caller_bottom,
                                   caller_size);
    switch_context(&fiber.context_, caller);
    __sanitizer_finish_switch_fiber(fiber.fake_stack_, &caller_bottom, &caller_size);
#else
    switch_context(&fiber.context_, caller);
#endif
  }

  static void begin() {
    Fiber& fiber = *running;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &caller_bottom, &caller_size);
#endif
    fiber.entry_(fiber.argument_);
    fiber.ended_ = true;
    to_caller(fiber);
    __builtin_unreachable();
  }
};

Fiber::Fiber(void (*entry)(void*), void* argument)
    : entry_(entry), argument_(argument), stack_(take_stack()) {
  prepare(context_, *stack_, &FiberSwitch::begin);
}

Fiber::~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
  // A fiber that is dropped leaves forbidden bytes around its variables.
  if (!ended_) __asan_unpoison_memory_region(stack_->bottom(), Stack::kBytes);
#endif
#ifdef TINYVLLM_FIBERS_BY_UCONTEXT
  delete static_cast<ucontext_t*>(context_);
#endif
  free_stacks().push_back(std::move(stack_));
}

void Fiber::resume() { FiberSwitch::to_fiber(*this); }

void Fiber::suspend() { FiberSwitch::to_caller(*FiberSwitch::running); }

}  // namespace tinyvllm::cuda::emulator

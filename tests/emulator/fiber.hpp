// Switching between stacks: by hand on x86-64 (some nanoseconds), with ucontext elsewhere (two system calls a switch).
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)

extern "C" void emulator_switch(void** save, void* load);

struct Fiber {
  void* top = nullptr;

  // `entry` must never return. [stack, stack + bytes), 16-byte aligned.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    void** p = reinterpret_cast<void**>(stack + bytes);
    *--p = nullptr;  // where `entry` would return to; it also puts the stack where a call leaves it
    *--p = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--p = nullptr;  // callee-saved registers
    top = p;
  }
  static void change(Fiber& from, Fiber& to) { emulator_switch(&from.top, to.top); }
};

#else

struct Fiber {
  ucontext_t context;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
};

#endif

}  // namespace emulator

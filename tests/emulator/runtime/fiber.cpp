// SPDX-License-Identifier: BSD-3-Clause
#include "fiber.h"

#include <cstdint>

#ifdef __x86_64__

// The System V ABI leaves rbx, rbp and r12 to r15 to the callee; all else is the caller's, so a
// switch is a function call that returns on another stack.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch_stack(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden emulator_switch_stack
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
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
  retq
.size emulator_switch_stack, . - emulator_switch_stack
)");

namespace emulator {

void make_context(Context& c, unsigned char* stack, size_t bytes, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top);
  words[-1] = nullptr;  // where entry's return address would be: rsp is 8 modulo 16 in it
  words[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) words[-i] = nullptr;
  c.stack_pointer = &words[-8];
}

void switch_context(Context& from, Context& to) {
  emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
}

}  // namespace emulator

#else

namespace emulator {

void make_context(Context& c, unsigned char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = bytes;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

}  // namespace emulator

#endif

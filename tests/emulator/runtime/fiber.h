// SPDX-License-Identifier: BSD-3-Clause
// Stacks that are switched by hand. A fiber never changes its operating-system thread.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

struct Context {
#ifdef __x86_64__
  void* stack_pointer;
#else
  ucontext_t context;
#endif
};

// A context that starts in `entry` (which never returns) on [stack, stack + bytes).
void make_context(Context& c, unsigned char* stack, size_t bytes, void (*entry)());

// Leave `from` and go on in `to`; returns when something switches to `from`.
void switch_context(Context& from, Context& to);

}  // namespace emulator

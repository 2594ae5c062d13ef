// SPDX-License-Identifier: BSD-3-Clause
// Kernels are compiled with -fsanitize=thread,alignment,... but linked with these functions instead
// of the sanitizers' own: every load and store of a kernel comes by.
#include <cstdint>
#include <cstring>
#include <string>

#include "block.h"
#include "memory.h"
#include "run_lock.h"

namespace {

// Host code of the same file is compiled alike, and passes.
inline void access(const void* p, size_t bytes, bool write, const void* program) {
  if (emulator::Block* block = emulator::current_block) block->check(p, bytes, write, program);
}

// The head of every record that the compiler passes on undefined behaviour.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};

void undefined(const char* kind, const SourceLocation& at, const std::string& what) {
  const char* slash = std::strrchr(at.file, '/');
  const std::string text = what + " at " + (slash != nullptr ? slash + 1 : at.file) + ":" +
                           std::to_string(at.line) + ":" + std::to_string(at.column);
  if (emulator::Block* block = emulator::current_block) {
    block->fail(kind, text, block->self().thread, nullptr);
  }
  emulator::report(kind, text + ", on the host's side");
}

}  // namespace

#define PROGRAM __builtin_extract_return_addr(__builtin_return_address(0))
#define ACCESS(bytes)                                                              \
  void __tsan_read##bytes(void* p) { access(p, bytes, false, PROGRAM); }           \
  void __tsan_write##bytes(void* p) { access(p, bytes, true, PROGRAM); }           \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false, PROGRAM); } \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true, PROGRAM); } \
  void __tsan_volatile_read##bytes(void* p) { access(p, bytes, false, PROGRAM); }  \
  void __tsan_volatile_write##bytes(void* p) { access(p, bytes, true, PROGRAM); }

#define UNDEFINED(name, what) \
  void __ubsan_handle_##name(SourceLocation* at) { undefined("undefined", *at, what); }

extern "C" {

ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, unsigned long bytes) {
  if (bytes != 0) access(p, bytes, false, PROGRAM);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  if (bytes != 0) access(p, bytes, true, PROGRAM);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() { emulator::set_instrumented(); }

void __ubsan_handle_type_mismatch_v1(TypeMismatch* mismatch, uintptr_t p) {
  undefined("misaligned", mismatch->location,
            emulator::describe(reinterpret_cast<const unsigned char*>(p)) +
                " is not on a multiple of " + std::to_string(1u << mismatch->log_alignment));
}
UNDEFINED(out_of_bounds, "an index beyond its array")
UNDEFINED(shift_out_of_bounds, "a shift by too much")
UNDEFINED(add_overflow, "an overflow")
UNDEFINED(sub_overflow, "an overflow")
UNDEFINED(mul_overflow, "an overflow")
UNDEFINED(negate_overflow, "an overflow")
UNDEFINED(divrem_overflow, "a division by zero")

}  // extern "C"

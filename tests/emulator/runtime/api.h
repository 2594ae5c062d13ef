// SPDX-License-Identifier: BSD-3-Clause
// The emulator from the host's side: settings, device buffers, findings, counters. Every function
// may be called from any thread; one launch runs at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

// What a kernel did wrong.
struct Finding {
  std::string kind;  // race, out-of-bounds, ...
  std::string text;
  std::string kernel;
  unsigned block[3];
  int thread;        // -1: the block, or the host
  uint64_t program;  // the instruction, as an offset into this library; 0 if not known
};

// Strict: global memory is what allocate() gave. Lenient: other addresses are not checked.
struct Settings {
  uint64_t seed = 1;
  bool strict = false;
  int workers = 2;
};
void configure(const Settings& settings);

// True if a kernel was compiled with -fsanitize=thread: every load and store is checked.
bool checks_every_access();

// The findings since the last call; a launch stops at its first.
std::vector<Finding> take_findings();
// Tell one from outside of a kernel.
void report(const std::string& kind, const std::string& text);

enum class BufferKind {
  input,    // kernels only read it
  output,   // every element is written, once per launch
  scratch,  // what is read has been written
};
// A device buffer of exactly `bytes`, `misalign` bytes past a multiple of 256. Filled with 0xff.
unsigned char* allocate(size_t bytes, BufferKind kind, size_t misalign);
// Forgets all buffers, and reports what was written beside them.
void release_buffers();
// Which 2-byte units of a buffer belong to elements, all unless said here; nothing else is touched.
void mark_elements(const void* p, const unsigned char* units, size_t count);
// The number of 2-byte units of a buffer's elements that no kernel has written.
size_t count_unwritten(const void* p);

struct Counters {
  uint64_t launches = 0, blocks = 0, barriers = 0;
  uint64_t products = 0;        // warp-level mma
  uint64_t matrix_loads = 0;    // warp-level ldmatrix
  uint64_t bank_conflicts = 0;  // of these: passes beyond the eight-row minimum
  uint64_t copied_bytes = 0;    // read by cp.async
  uint64_t wgmma = 0;           // warpgroup-level products
  uint64_t tensor_loads = 0, tensor_stores = 0;
  uint64_t tensor_bytes = 0;   // that they moved, with what lies outside of the tensor
  uint64_t read_bytes = 0;     // from global memory otherwise, where every access is checked
  uint64_t written_bytes = 0;  // to global memory, likewise
  uint64_t shared_bytes = 0;   // most of any launch
};
Counters counters();

// A launch as the host asked for it.
struct Launched {
  std::string kernel;  // with the compiler's text for its template arguments
  int64_t grid[3];
};
// The launches since the counters were reset.
std::vector<Launched> launched();
// Forgets the launches as well.
void reset_counters();

}  // namespace emulator

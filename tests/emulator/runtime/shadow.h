// SPDX-License-Identifier: BSD-3-Clause
// Which thread touched which two bytes of shared memory last, and what was ordered by a barrier.
// Two threads that store one byte each to the same two bytes would be reported; elements have two
// bytes at least.
//
// Beside threads there are agents: copies of tensors and wgmma, which work while threads go on. An
// agent does not see what a thread wrote without a fence, not even behind a barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "clocks.h"

namespace emulator {

// One access: 0 is none.
struct Stamp {
  uint32_t bits = 0;
  static Stamp of(int who, uint32_t clock) {
    return {(clock << 11 | static_cast<uint32_t>(who)) + 1};
  }
  explicit operator bool() const { return bits != 0; }
  int who() const { return static_cast<int>((bits - 1) & 2047); }
  uint32_t clock() const { return (bits - 1) >> 11; }
};

struct Conflict {
  const char* kind;  // null: none
  const char* text;  // of the other access
  int other;         // the other thread or agent
  size_t at;         // offset of the two bytes
};

class SharedShadow {
 public:
  void reset(size_t bytes);
  Conflict read(size_t at, size_t bytes, int thread, const Clocks& clocks);
  Conflict write(size_t at, size_t bytes, int thread, const Clocks& clocks);
  // Accesses of an agent, by order of somebody who knows the row.
  Conflict agent_read(size_t at, size_t bytes, Stamp now, const uint32_t* row,
                      const Clocks& clocks);
  Conflict agent_write(size_t at, size_t bytes, Stamp now, const uint32_t* row,
                       const Clocks& clocks);
  // What no access may touch from now on.
  void close(size_t at, size_t bytes);
  // A copy that is under way, and its end.
  void begin_copy(size_t at, size_t bytes);
  void end_copy(size_t at, size_t bytes, int thread, const Clocks& clocks);

 private:
  struct Unit {
    Stamp writer;  // none: never written
    Stamp readers[2];
    uint32_t in_flight;  // thread + 1, or kClosed
  };
  static constexpr uint32_t kClosed = ~0u;
  static Conflict busy(const Unit& u, size_t at);
  void remember(Unit& u, Stamp now, bool first, bool second);
  std::vector<Unit> units_;
  uint32_t turn_ = 0;
};

}  // namespace emulator

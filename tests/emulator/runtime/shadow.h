// SPDX-License-Identifier: BSD-3-Clause
// Which thread touched which two bytes of shared memory last, and what was ordered by a barrier.
// Two threads that store one byte each to the same two bytes would be reported; elements have two
// bytes at least.
//
// Threads are ordered by whole-warp barriers and whole-block barriers only, so a clock per warp is
// exact: a warp's clock ticks at each barrier it takes part in, and known(w, v) is the latest tick
// of warp v that warp w has synchronised with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

class WarpClocks {
 public:
  void reset(int warps) {
    warps_ = warps;
    clock_.assign(warps, 0);
    known_.assign(warps * warps, 0);
  }
  uint32_t clock(int warp) const { return clock_[warp]; }
  void warp_barrier(int warp) { ++clock_[warp]; }
  void block_barrier() {
    for (int w = 0; w < warps_; ++w) {
      for (int v = 0; v < warps_; ++v) known_[w * warps_ + v] = clock_[v] + 1;
    }
    for (auto& c : clock_) ++c;
  }
  // True if what `other`'s warp did at tick `then` is before what `thread` does now.
  bool ordered(int other, uint32_t then, int thread) const {
    const int w = thread / 32, v = other / 32;
    if (other == thread) return true;
    return w == v ? then < clock_[w] : then < known_[w * warps_ + v];
  }

 private:
  int warps_ = 0;
  std::vector<uint32_t> clock_, known_;
};

// One access: 0 is none.
struct Stamp {
  uint32_t bits = 0;
  static Stamp of(int thread, uint32_t clock) {
    return {(clock << 10 | static_cast<uint32_t>(thread)) + 1};
  }
  explicit operator bool() const { return bits != 0; }
  int thread() const { return static_cast<int>((bits - 1) & 1023); }
  uint32_t clock() const { return (bits - 1) >> 10; }
};

struct Conflict {
  const char* kind;  // null: none
  const char* text;  // of the other access
  int other;         // the other thread
  size_t at;         // offset of the two bytes
};

class SharedShadow {
 public:
  void reset(size_t bytes);
  Conflict read(size_t at, size_t bytes, int thread, const WarpClocks& clocks);
  Conflict write(size_t at, size_t bytes, int thread, const WarpClocks& clocks);
  // A copy that is under way, and its end.
  void begin_copy(size_t at, size_t bytes);
  void end_copy(size_t at, size_t bytes, int thread, const WarpClocks& clocks);

 private:
  struct Unit {
    Stamp writer;  // none: never written
    Stamp readers[2];
    uint32_t in_flight;
  };
  std::vector<Unit> units_;
  uint32_t turn_ = 0;
};

}  // namespace emulator

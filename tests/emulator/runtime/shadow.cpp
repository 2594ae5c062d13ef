// SPDX-License-Identifier: BSD-3-Clause
#include "shadow.h"

#include <cstring>

namespace emulator {

void SharedShadow::reset(size_t bytes) {
  if (units_.size() < bytes / 2 + 1) units_.resize(bytes / 2 + 1);
  if (bytes != 0) std::memset(static_cast<void*>(units_.data()), 0, (bytes / 2 + 1) * sizeof(Unit));
}

Conflict SharedShadow::read(size_t at, size_t bytes, int thread, const WarpClocks& clocks) {
  const Stamp now = Stamp::of(thread, clocks.clock(thread / 32));
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    Unit& u = units_[i];
    if (u.in_flight != 0) {
      return {"in-flight", "a cp.async is under way to", static_cast<int>(u.in_flight) - 1, 2 * i};
    }
    if (!u.writer) return {"uninitialised", "nothing was written to", -1, 2 * i};
    if (!clocks.ordered(u.writer.thread(), u.writer.clock(), thread)) {
      return {"race", "without a barrier, it wrote", u.writer.thread(), 2 * i};
    }
    // Two readers are remembered. A later read of the same thread replaces its earlier one, and one
    // that is before this read goes first: whoever is after this read is after that one.
    if (u.readers[0].bits == now.bits || u.readers[1].bits == now.bits) continue;
    int slot = -1;
    for (int r = 0; r < 2 && slot < 0; ++r) {
      const Stamp s = u.readers[r];
      if (!s || clocks.ordered(s.thread(), s.clock(), thread)) slot = r;
    }
    u.readers[slot >= 0 ? slot : (turn_++ >> 1) & 1] = now;
  }
  return {};
}

Conflict SharedShadow::write(size_t at, size_t bytes, int thread, const WarpClocks& clocks) {
  const Stamp now = Stamp::of(thread, clocks.clock(thread / 32));
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    Unit& u = units_[i];
    if (u.in_flight != 0) {
      return {"in-flight", "a cp.async is under way to", static_cast<int>(u.in_flight) - 1, 2 * i};
    }
    if (u.writer && !clocks.ordered(u.writer.thread(), u.writer.clock(), thread)) {
      return {"race", "without a barrier, it wrote", u.writer.thread(), 2 * i};
    }
    for (const Stamp s : u.readers) {
      if (s && !clocks.ordered(s.thread(), s.clock(), thread)) {
        return {"race", "without a barrier, it read", s.thread(), 2 * i};
      }
    }
    u.writer = now;
    u.readers[0] = u.readers[1] = Stamp{};
  }
  return {};
}

void SharedShadow::begin_copy(size_t at, size_t bytes) {
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    units_[i].in_flight = static_cast<uint32_t>(units_[i].writer.thread()) + 1;
  }
}

void SharedShadow::end_copy(size_t at, size_t bytes, int thread, const WarpClocks& clocks) {
  const Stamp now = Stamp::of(thread, clocks.clock(thread / 32));
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    units_[i].in_flight = 0;
    units_[i].writer = now;
  }
}

}  // namespace emulator

// SPDX-License-Identifier: BSD-3-Clause
#include "shadow.h"

#include <cstring>

namespace emulator {
namespace {

const char* kind_of(Stamp other) { return other.who() < kMostThreads ? "race" : "in-flight"; }

Conflict conflict(Stamp other, const char* without, const char* under_way, size_t at) {
  return {kind_of(other), other.who() < kMostThreads ? without : under_way, other.who(), at};
}
Conflict with_writer(Stamp other, size_t at) {
  return conflict(other, "without a barrier, it wrote", "nobody has waited for it to write", at);
}
Conflict with_reader(Stamp other, size_t at) {
  return conflict(other, "without a barrier, it read", "nobody has waited for it to read", at);
}

}  // namespace

void SharedShadow::reset(size_t bytes) {
  if (units_.size() < bytes / 2 + 1) units_.resize(bytes / 2 + 1);
  if (bytes != 0) std::memset(static_cast<void*>(units_.data()), 0, (bytes / 2 + 1) * sizeof(Unit));
}

Conflict SharedShadow::busy(const Unit& u, size_t at) {
  if (u.in_flight == kClosed) return {"barrier-object", "there is a barrier object at", -1, at};
  return {"in-flight", "a cp.async is under way to", static_cast<int>(u.in_flight) - 1, at};
}

// Two readers are remembered: a slot that may be given away (what was read there is before this
// read) or else one by turns.
void SharedShadow::remember(Unit& u, Stamp now, bool first, bool second) {
  if (u.readers[0].bits == now.bits || u.readers[1].bits == now.bits) return;
  u.readers[first ? 0 : second ? 1 : (turn_++ >> 1) & 1] = now;
}

Conflict SharedShadow::read(size_t at, size_t bytes, int thread, const Clocks& clocks) {
  const Stamp now = Stamp::of(thread, clocks.clock(thread));
  const auto before = [&](Stamp s) { return !s || clocks.ordered(s.who(), s.clock(), thread); };
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    Unit& u = units_[i];
    if (u.in_flight != 0) return busy(u, 2 * i);
    if (!u.writer) return {"uninitialised", "nothing was written to", -1, 2 * i};
    if (!before(u.writer)) return with_writer(u.writer, 2 * i);
    remember(u, now, before(u.readers[0]), before(u.readers[1]));
  }
  return {};
}

Conflict SharedShadow::write(size_t at, size_t bytes, int thread, const Clocks& clocks) {
  const Stamp now = Stamp::of(thread, clocks.clock(thread));
  const auto before = [&](Stamp s) { return !s || clocks.ordered(s.who(), s.clock(), thread); };
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    Unit& u = units_[i];
    if (u.in_flight != 0) return busy(u, 2 * i);
    if (!before(u.writer)) return with_writer(u.writer, 2 * i);
    for (const Stamp s : u.readers) {
      if (!before(s)) return with_reader(s, 2 * i);
    }
    u.writer = now;
    u.readers[0] = u.readers[1] = Stamp{};
  }
  return {};
}

Conflict SharedShadow::agent_read(size_t at, size_t bytes, Stamp now, const uint32_t* row,
                                  const Clocks& clocks) {
  const auto before = [&](Stamp s) { return !s || s.clock() < row[clocks.column(s.who())]; };
  Stamp last;  // units mostly have one writer
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    Unit& u = units_[i];
    if (u.in_flight != 0) return busy(u, 2 * i);
    if (!u.writer) return {"uninitialised", "nothing was written to", -1, 2 * i};
    if (u.writer.bits != last.bits) {
      const Stamp s = last = u.writer;
      if (!before(s)) return with_writer(s, 2 * i);
      if (s.who() < kMostThreads && !clocks.fenced(Clocks::kAsync, s.who(), s.clock(), row)) {
        return {"proxy", "without fence_async_shared behind it, it wrote", s.who(), 2 * i};
      }
    }
    remember(u, now, before(u.readers[0]), before(u.readers[1]));
  }
  return {};
}

Conflict SharedShadow::agent_write(size_t at, size_t bytes, Stamp now, const uint32_t* row,
                                   const Clocks& clocks) {
  const auto before = [&](Stamp s) { return !s || s.clock() < row[clocks.column(s.who())]; };
  Stamp last;
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    Unit& u = units_[i];
    if (u.in_flight != 0) return busy(u, 2 * i);
    if (u.writer.bits != last.bits) {
      const Stamp s = last = u.writer;
      if (!before(s)) return with_writer(s, 2 * i);
      if (s && s.who() < kMostThreads && !clocks.fenced(Clocks::kAsync, s.who(), s.clock(), row)) {
        return {"proxy", "without fence_async_shared behind it, it wrote", s.who(), 2 * i};
      }
    }
    for (const Stamp s : u.readers) {
      if (!before(s)) return with_reader(s, 2 * i);
    }
    u.writer = now;
    u.readers[0] = u.readers[1] = Stamp{};
  }
  return {};
}

void SharedShadow::close(size_t at, size_t bytes) {
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) units_[i].in_flight = kClosed;
}

void SharedShadow::begin_copy(size_t at, size_t bytes) {
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    units_[i].in_flight = static_cast<uint32_t>(units_[i].writer.who()) + 1;
  }
}

void SharedShadow::end_copy(size_t at, size_t bytes, int thread, const Clocks& clocks) {
  const Stamp now = Stamp::of(thread, clocks.clock(thread));
  for (size_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    units_[i].in_flight = 0;
    units_[i].writer = now;
  }
}

}  // namespace emulator
